"""Claims leave a card and machine-readable facts; incomplete or unsound ones are refused."""

import json

import numpy as np
import pytest
import torch

from affnb import claims
from affnb.training import summarise

ENOUGH = {
    "method": "SymPy",
    "tolerance": 1e-12,
    "criterion": "mean difference > 0",
    "effect": 0.25,
    "spread": 0.5,
    "seeds": [0, 1, 2],
    "reason": "too few classes",
}


@pytest.fixture
def shown(monkeypatch):
    bundles = []
    monkeypatch.setattr(
        "IPython.display.display", lambda bundle, raw=False: bundles.append((bundle, raw))
    )
    return bundles


@pytest.mark.parametrize("verdict", claims.VERDICTS)
def test_every_verdict_makes_a_bundle(shown, verdict):
    evidence = {key: ENOUGH[key] for key in claims.VERDICTS[verdict][1]}
    claims.record("affinity/affinity_mass:some-claim", "It holds.", verdict, evidence)
    [(bundle, raw)] = shown
    assert raw is True
    assert set(bundle) == {claims.MIME, "text/markdown", "text/plain"}
    assert bundle[claims.MIME] == {
        "id": "affinity/affinity_mass:some-claim",
        "statement": "It holds.",
        "verdict": verdict,
        "evidence": evidence,
    }
    assert json.loads(json.dumps(bundle, allow_nan=False)) == bundle
    card = bundle["text/markdown"]
    assert 'id="claim-affinity-affinity-mass-some-claim"' in card
    assert f">{verdict}</strong> It holds." in card
    assert all(f"<dt>{key}</dt>" in card for key in evidence)
    assert verdict in bundle["text/plain"]


@pytest.mark.parametrize(
    ("verdict", "key"), [(v, key) for v, (_, keys) in claims.VERDICTS.items() for key in keys]
)
def test_each_required_key_is_required(shown, verdict, key):
    evidence = {k: ENOUGH[k] for k in claims.VERDICTS[verdict][1] if k != key}
    with pytest.raises(ValueError, match=rf"^evidence: expected {key} for '{verdict}'"):
        claims.record("affinity/affinity_mass:x", "It holds.", verdict, evidence)
    assert shown == []


def test_arrays_and_tensors_become_plain_numbers(shown):
    evidence = {
        "tolerance": np.float32(0.5),
        "tensor": torch.tensor([1.0, 2.0], requires_grad=True),
        "scalar": torch.tensor(3, dtype=torch.int32),
        "array": np.arange(3),
        "nested": (np.float64(1.5), [torch.tensor(True)]),
        "range": range(2),
    }
    claims.record("metric/smooth_ap:equal", "It holds.", "equal", evidence)
    facts = shown[0][0][claims.MIME]["evidence"]
    assert facts == {
        "tolerance": 0.5,
        "tensor": [1.0, 2.0],
        "scalar": 3,
        "array": [0, 1, 2],
        "nested": [1.5, [True]],
        "range": [0, 1],
    }
    assert type(facts["scalar"]) is int
    assert type(facts["tolerance"]) is float
    json.dumps(facts)


@pytest.mark.parametrize(
    "bad",
    [
        float("nan"),
        float("inf"),
        [0.0, -float("inf")],
        np.array([1.0, np.nan]),
        torch.tensor(float("nan")),
    ],
)
def test_evidence_that_is_not_finite_is_refused(shown, bad):
    with pytest.raises(ValueError, match=r"^evidence: expected finite numbers"):
        claims.record("a/b:c", "It holds.", "equal", {"tolerance": 0.1, "value": bad})
    assert shown == []


@pytest.mark.parametrize("bad", [None, {"a": 1}, object(), {1, 2}])
def test_evidence_of_another_type_is_refused(shown, bad):
    with pytest.raises(TypeError, match=r"^evidence: expected numbers, texts or lists"):
        claims.record("a/b:c", "It holds.", "equal", {"tolerance": 0.1, "value": bad})


@pytest.mark.parametrize(
    "bad", ["", "mass", "affinity:mass", "affinity/mass", "A/b:c", "a/b:c d", "a/b:c\n", "a/b:C"]
)
def test_ids_have_one_form(shown, bad):
    with pytest.raises(ValueError, match=r"^id: expected"):
        claims.record(bad, "It holds.", "equal", {"tolerance": 0.1})


def test_unknown_verdict_is_refused(shown):
    with pytest.raises(ValueError, match=r"^verdict: expected one of 'proved'.*got 'true'"):
        claims.record("a/b:c", "It holds.", "true", ENOUGH)


@pytest.mark.parametrize("bad", ["", "  \n"])
def test_an_empty_statement_is_refused(shown, bad):
    with pytest.raises(ValueError, match=r"^statement: expected a sentence"):
        claims.record("a/b:c", bad, "equal", {"tolerance": 0.1})


def test_card_escapes_evidence_and_keeps_the_statements_mathematics(shown):
    claims.record("a/b:c", "$M_0 = \\sigma(s)$.", "equal", {"tolerance": "<1e-3", "<k>": 1})
    bundle = shown[0][0]
    assert "<dd>&lt;1e-3</dd>" in bundle["text/markdown"]
    assert "<dt>&lt;k&gt;</dt>" in bundle["text/markdown"]
    assert "$M_0 = \\sigma(s)$." in bundle["text/markdown"]
    assert bundle[claims.MIME]["evidence"] == {"tolerance": "<1e-3", "<k>": 1}


def test_the_scoreboards_link_is_the_cards_id(shown):
    claims.record("a/b_c:d-e", "It holds.", "equal", {"tolerance": 0.1})
    assert f'id="{claims.anchor("a/b_c:d-e")}"' in shown[0][0]["text/markdown"]
    assert claims.anchor("a/b_c:d-e") != claims.anchor("a/b_c:d-f")


@pytest.mark.parametrize("verdict", claims.VERDICTS)
def test_badge_names_the_verdict_and_its_meaning(verdict):
    assert f">{verdict}<" in claims.badge(verdict)
    assert 'title="' in claims.badge(verdict)


@pytest.mark.parametrize(
    ("gains", "shown_above", "verdict"),
    [
        ([0.4, 0.5, 0.6], 0.0, "measured"),
        ([-0.4, -0.5, -0.6], 0.0, "refuted here"),
        ([-0.5, 0.1, 0.6], 0.0, "not shown at this scale"),
        ([0.4, 0.5, 0.6], 0.5, "not shown at this scale"),  # a gain, but less than asked for
        ([-0.4, -0.5, -0.6], 0.5, "refuted here"),
        ([-0.004, -0.005, -0.006], -0.01, "measured"),  # costs less than 0.01, though something
        ([-0.04, -0.05, -0.06], -0.01, "refuted here"),
    ],
)
def test_settle_gives_the_verdict_of_the_interval(shown, gains, shown_above, verdict):
    gain = summarise(gains)
    told = claims.settle(
        "affinity/affinity_mass:x",
        "It gains.",
        "interval above it",
        gain,
        seeds=range(3),
        note="toy",
        shown_above=shown_above,
    )
    [(bundle, _)] = shown
    made = bundle[claims.MIME]
    assert told == made["verdict"] == verdict
    assert made["evidence"]["effect"] == gain.mean
    assert made["evidence"]["seeds"] == [0, 1, 2]
    assert f"{gain.low:.3g} to {gain.high:.3g}" in made["evidence"]["spread"]
    assert made["evidence"]["setting"] == "toy"
    reason = made["evidence"].get("reason", "")
    assert reason.startswith("the interval is neither") == (verdict == "not shown at this scale")

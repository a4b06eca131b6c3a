"""What a chapter claims, with the verdict and the evidence, on the page and for the scoreboard.

`record` shows a card and puts the same facts into the executed notebook in machine-readable form (MIME
type `MIME`). The build collects them from all chapters into the book's *Scoreboard*.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .checks import check_one_of
from .training import Summary

__all__ = ["MIME", "VERDICTS", "anchor", "badge", "claim", "record", "settle"]

#: The MIME type of a recorded claim in a notebook's outputs.
MIME = "application/vnd.affnb.claim+json"

#: The verdicts, each with what it means and the keys that its evidence must have.
VERDICTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "proved": ("SymPy proved it, for all values of its symbols", ("method",)),
    "equal": ("two implementations agree, within the tolerance", ("tolerance",)),
    "measured": (
        "an experiment met the criterion that was stated before it",
        ("criterion", "effect", "spread", "seeds"),
    ),
    "not shown at this scale": (
        "the experiment is too small to tell, for the reason given",
        ("criterion", "reason"),
    ),
    "refuted here": (
        "an experiment contradicts it",
        ("criterion", "effect", "spread", "seeds"),
    ),
}
_CSS = {
    "proved": "proved",
    "equal": "equal",
    "measured": "measured",
    "not shown at this scale": "not-shown",
    "refuted here": "refuted",
}
_ID = re.compile(r"[a-z_]+/[a-z0-9_]+:[a-z0-9-]+")


def _plain(value: Any) -> Any:
    """Reduce evidence to what JSON has: numbers, texts and lists of them, all finite."""
    if hasattr(value, "tolist"):  # tensors and arrays
        value = value.tolist()
    if isinstance(value, (list, tuple, range)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"evidence: expected finite numbers, got {value!r}")
    if isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"evidence: expected numbers, texts or lists, got {type(value).__name__}")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_text(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def anchor(id: str) -> str:
    """Return the HTML id of a claim's card, to which the scoreboard links."""
    return "claim-" + re.sub(r"[^a-z0-9]+", "-", id)


def badge(verdict: str) -> str:
    """Return the HTML of a verdict's label."""
    meaning = html.escape(VERDICTS[verdict][0])
    return f'<strong class="affnb-verdict" title="{meaning}">{html.escape(verdict)}</strong>'


def claim(id: str, statement: str, verdict: str, evidence: Mapping[str, Any]) -> dict[str, Any]:
    """Check a claim and return it in the form that the scoreboard reads (see `record`)."""
    if not _ID.fullmatch(id):
        raise ValueError(f'id: expected "<part>/<method>:<slug>", got {id!r}')
    if not statement.strip():
        raise ValueError("statement: expected a sentence, got an empty text")
    check_one_of(verdict, "verdict", tuple(VERDICTS))
    facts = {key: _plain(value) for key, value in evidence.items()}
    missing = [key for key in VERDICTS[verdict][1] if key not in facts]
    if missing:
        raise ValueError(f"evidence: expected {', '.join(missing)} for {verdict!r}, got {facts!r}")
    return {"id": id, "statement": statement, "verdict": verdict, "evidence": facts}


def record(id: str, statement: str, verdict: str, evidence: Mapping[str, Any]) -> None:
    """Record a claim: show it as a card, and leave it in the notebook for the scoreboard.

    Parameters
    ----------
    id
        ``"<part>/<method>:<slug>"``, unique in the book, e.g. ``"affinity/affinity_mass:gradient"``.
    statement
        The claim, in one sentence (Markdown, with mathematics between dollar signs).
    verdict
        One of `VERDICTS`.
    evidence
        Numbers, texts, or lists of them. Required keys: ``method`` for *proved*; ``tolerance`` for
        *equal*; ``criterion`` (what was stated before the run), ``effect``, ``spread`` and ``seeds``
        for *measured* and *refuted here*; ``criterion`` and ``reason`` for *not shown at this scale*.

    Raises
    ------
    ValueError
        An id of another form, an unknown verdict, evidence without a required key or not finite.
    TypeError
        Evidence that is no number, text or list.
    """
    from IPython.display import display

    made = claim(id, statement, verdict, evidence)
    rows = "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(_text(value))}</dd>"
        for key, value in made["evidence"].items()
    )
    card = (
        f'<div class="affnb-card affnb-claim affnb-{_CSS[verdict]}" id="{anchor(id)}">\n\n'
        f"{badge(verdict)} {statement}\n\n<dl>{rows}</dl>\n\n</div>"
    )
    plain = f"[{verdict}] {statement} {json.dumps(made['evidence'])}"
    display({MIME: made, "text/markdown": card, "text/plain": plain}, raw=True)


def settle(
    id: str,
    statement: str,
    criterion: str,
    gain: Summary,
    *,
    seeds: Iterable[int],
    note: str,
    shown_above: float = 0.0,
) -> str:
    """Record the verdict that the 95 % confidence interval of a gain gives.

    *Measured* when the whole interval lies above ``shown_above``; *refuted here* when all of it lies
    below 0 (below ``shown_above``, if that is lower); otherwise *not shown at this scale*.

    Parameters
    ----------
    id, statement
        As in `record`.
    criterion
        What was stated before the run.
    gain
        The gain, paired by seed: `affnb.training.paired_difference` of method and baseline.
    seeds
        The seeds it was measured with.
    note
        The setting. When nothing could be shown, the reason that is recorded beside it is where the
        interval lies.
    shown_above
        The gain from which on the claim counts as shown. Default 0. For a claim that something costs
        nothing, or is no better, give the loss, minus the largest one that you would call nothing:
        "a gains at most 0.01 over b" is ``settle(..., paired_difference(b, a), shown_above=-0.01)``.

    Returns
    -------
    str
        The verdict.

    Raises
    ------
    ValueError, TypeError
        As `record`.
    """
    refuted_below = min(0.0, shown_above)
    if gain.low > shown_above:
        verdict = "measured"
    elif gain.high < refuted_below:
        verdict = "refuted here"
    else:
        verdict = "not shown at this scale"
    evidence = {
        "criterion": criterion,
        "effect": gain.mean,
        "spread": f"95 % interval {gain.low:.3g} to {gain.high:.3g}",
        "seeds": list(seeds),
        "setting": note,
    }
    if verdict == "not shown at this scale":
        evidence["reason"] = (
            f"the interval is neither all above {shown_above:g} nor all below {refuted_below:g}"
        )
    record(id, statement, verdict, evidence)
    return verdict

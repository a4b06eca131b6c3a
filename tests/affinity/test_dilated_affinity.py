"""Dilated affinity: offsets, targets, statistics, the loss, the head and the propagation."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import affnb.affinity.dilated_affinity as module
from affnb.affinity.dilated_affinity import (
    AffinityHead,
    DilatedAffinityLoss,
    dilated_affinity_target,
    dilated_offsets,
    neighbour_count_frequencies,
    propagate_affinity,
    steep_sigmoid,
)
from tests.fake_torchvision import run_on_voc

DOUBLE = torch.float64
SIDES = st.sampled_from([1, 2, 3, 5, 7])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def strided(x):
    """The same values with other strides: every second column of a wider tensor, transposed twice."""
    return x.mT.contiguous().mT.repeat_interleave(2, -1)[..., ::2]


@st.composite
def scenes(draw):
    """Labels with an ignored class, offsets that fit, and a generator."""
    batch, height, width = draw(st.sampled_from([0, 1, 3])), draw(SIDES), draw(SIDES)
    generator = seeded(draw(st.integers(0, 2**31)))
    labels = torch.randint(
        0, draw(st.sampled_from([1, 2, 4])), (batch, height, width), generator=generator
    )
    labels[
        torch.rand(labels.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    ] = 255
    if draw(st.booleans()):
        labels = labels.mT.contiguous().mT
    longest = max(1, max(height, width) - 1)
    rates = draw(st.sampled_from([[1], [longest], sorted({1, longest}), [(1, longest)]]))
    return labels, dilated_offsets(rates), generator


@st.composite
def propagations(draw):
    """Probabilities and affinities in float64 with offsets, some affinities 0."""
    batch, classes = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2, 3, 5]))
    height, width = draw(SIDES), draw(SIDES)
    generator = seeded(draw(st.integers(0, 2**31)))
    longest = max(1, max(height, width) - 1)
    offsets = dilated_offsets(draw(st.sampled_from([[1], sorted({1, longest}), [(longest, 1)]])))
    prob = (
        2 * torch.randn(batch, classes, height, width, generator=generator, dtype=DOUBLE)
    ).softmax(1)
    affinity = torch.rand(batch, len(offsets), height, width, generator=generator, dtype=DOUBLE)
    affinity = affinity * (torch.rand(affinity.shape, generator=generator) < 0.8)
    if draw(st.booleans()):
        prob, affinity = strided(prob), strided(affinity)
    return prob, affinity, offsets, generator


# --------------------------------------------------------------------------------------------------
# Offsets
# --------------------------------------------------------------------------------------------------


def test_offsets_are_the_documented_ones():
    expected = [[-3, -2], [-3, 0], [-3, 2], [0, -2], [0, 2], [3, -2], [3, 0], [3, 2]]
    offsets = dilated_offsets([(3, 2)])
    assert offsets.tolist() == expected
    assert offsets.dtype == torch.int64
    assert torch.equal(offsets, -offsets.flip(0))  # channels k and 7 - k are opposite
    both = dilated_offsets([8, (12, 24), 16], both=True)
    groups = [dilated_offsets([r]) for r in (8, (12, 24), (24, 12), 16)]
    assert torch.equal(both, torch.cat(groups))
    assert len(dilated_offsets([8, (12, 24), 16])) == 24


@pytest.mark.parametrize(
    ("error", "rates"),
    [
        (ValueError, []),
        (ValueError, [0]),
        (ValueError, [2, -1]),
        (ValueError, [(1, 0)]),
        (ValueError, [2, (2, 2)]),
        (TypeError, [1.0]),
        (TypeError, [True]),
        (TypeError, [(1, 2, 3)]),
        (TypeError, 3),
        (TypeError, "12"),
    ],
)
def test_offsets_reject(error, rates):
    with pytest.raises(error, match=r"^rates: expected"):
        dilated_offsets(rates)


def test_offsets_reject_both():
    with pytest.raises(TypeError, match=r"^both: expected"):
        dilated_offsets([1], both=1)


# --------------------------------------------------------------------------------------------------
# Targets and statistics
# --------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(scenes(), st.booleans())
def test_target_by_enumeration(scene, ignoring):
    labels, offsets, _ = scene
    ignore = 255 if ignoring else None
    target, valid = dilated_affinity_target(labels, offsets, ignore_index=ignore)
    batch, height, width = labels.shape
    for b, k, i, j in np.ndindex(batch, len(offsets), height, width):
        dy, dx = offsets[k].tolist()
        inside = 0 <= i + dy < height and 0 <= j + dx < width
        there = labels[b, i + dy, j + dx] if inside else None
        counts = inside and not (ignoring and 255 in (labels[b, i, j], there))
        assert valid[b, k, i, j] == counts
        assert target[b, k, i, j] == (counts and labels[b, i, j] == there)


def test_one_edge_is_seen_from_the_right_sides():
    """A map with a single vertical edge: directions of opposite sign differ."""
    labels = torch.zeros(1, 5, 6, dtype=torch.long)
    labels[:, :, 3:] = 1
    target, valid = dilated_affinity_target(labels, dilated_offsets([1]))
    left, right = 3, 4  # (0, -1) and (0, 1)
    assert (valid & ~target)[0, right].any(0).tolist() == [False, False, True, False, False, False]
    assert (valid & ~target)[0, left].any(0).tolist() == [False, False, False, True, False, False]
    assert not (valid & ~target)[0, [1, 6]].any()  # up and down cross nothing


def test_pairs_are_symmetric():
    labels = torch.randint(0, 3, (2, 9, 8), generator=seeded())
    target, valid = dilated_affinity_target(labels, dilated_offsets([2]), ignore_index=0)
    for k, (dy, dx) in enumerate(dilated_offsets([2]).tolist()):
        back = 7 - k
        here = target[:, k, max(0, -dy) : 9 - max(0, dy), max(0, -dx) : 8 - max(0, dx)]
        there = target[:, back, max(0, dy) : 9 - max(0, -dy), max(0, dx) : 8 - max(0, -dx)]
        assert torch.equal(here, there)
        assert valid[:, k].sum() == valid[:, back].sum()


def test_one_class_ignored_and_single_pixels():
    offsets = dilated_offsets([1, 2])
    target, valid = dilated_affinity_target(torch.full((2, 5, 5), 3), offsets)
    assert torch.equal(target, valid)
    # 2 ((H - s) W + H (W - s) + 2 (H - s)(W - s)) ordered pairs at rate s
    assert valid[0, :8].sum() == 2 * (4 * 5 + 5 * 4 + 2 * 4 * 4)
    assert valid[0, 8:].sum() == 2 * (3 * 5 + 5 * 3 + 2 * 3 * 3)
    for labels in (torch.full((2, 5, 5), 3), torch.zeros(1, 1, 1, dtype=torch.long)):
        _, none = dilated_affinity_target(labels, offsets, ignore_index=3)
        assert not none.any()


def test_halving_resolution_and_rate_keeps_targets():
    coarse = torch.randint(0, 3, (1, 12, 12), generator=seeded())
    fine = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)
    small = dilated_affinity_target(coarse, dilated_offsets([2]))
    large = dilated_affinity_target(fine, dilated_offsets([4]))
    for a, b in zip(small, large, strict=True):
        assert torch.equal(a, b[:, :, ::2, ::2])


@settings(max_examples=30, deadline=None)
@given(scenes())
def test_frequencies_by_enumeration(scene):
    labels, offsets, _ = scene
    target, valid = dilated_affinity_target(labels, offsets, ignore_index=255)
    rates = len(offsets) // 8
    expected = torch.zeros(rates, 9, dtype=torch.long)
    batch, height, width = labels.shape
    for r, b, i, j in np.ndindex(rates, batch, height, width):
        own = slice(8 * r, 8 * r + 8)
        if valid[b, own, i, j].all():
            expected[r, target[b, own, i, j].sum()] += 1
    counts = neighbour_count_frequencies(target, valid, rates, normalise=False)
    assert torch.equal(counts, expected)
    freqs = neighbour_count_frequencies(target, valid, rates)
    assert freqs.dtype == DOUBLE
    total = expected.sum(1, keepdim=True).double()
    torch.testing.assert_close(freqs * total, expected.double())
    torch.testing.assert_close(freqs.sum(1), (total[:, 0] > 0).double())


def test_counts_of_batches_add_up():
    labels = torch.randint(0, 2, (6, 9, 9), generator=seeded())
    offsets = dilated_offsets([1, 2])
    parts = [dilated_affinity_target(part, offsets) for part in labels.split(2)]
    counts = sum(neighbour_count_frequencies(*part, 2, normalise=False) for part in parts)
    whole = neighbour_count_frequencies(*dilated_affinity_target(labels, offsets), 2)
    torch.testing.assert_close(counts / counts.sum(1, keepdim=True), whole, check_dtype=False)


# --------------------------------------------------------------------------------------------------
# The loss
# --------------------------------------------------------------------------------------------------


def loss_and_grad(criterion, logits, target, valid):
    leaf = logits.detach().requires_grad_()
    loss = criterion(leaf, target, valid)
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    (grad,) = torch.autograd.grad((loss * weights).sum(), leaf)
    return loss.detach(), grad


def random_frequencies(rates, generator):
    freqs = torch.rand(rates, 9, generator=generator, dtype=DOUBLE)
    freqs[:, 2] = 0  # an empty category
    return freqs / freqs.sum(1, keepdim=True)


@pytest.mark.parametrize("strip", [2**17, 1])
@settings(max_examples=40, deadline=None)
@given(
    scenes(),
    st.sampled_from([0.0, 0.5, 2.0]),
    st.sampled_from(["sqrt", "inverse", "signal", "none"]),
    st.sampled_from(["mean", "sum", "none"]),
    st.booleans(),
)
def test_loss_equals_reference(strip, scene, gamma, weighting, reduction, transposed):
    labels, offsets, generator = scene
    target, valid = dilated_affinity_target(labels, offsets, ignore_index=255)
    freqs = random_frequencies(len(offsets) // 8, generator)
    logits = 3 * torch.randn(target.shape, generator=generator, dtype=DOUBLE)
    logits = strided(logits) if transposed else logits
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_STRIP_CPU", strip)
        for backend in ("auto", "reference"):
            criterion = DilatedAffinityLoss(freqs, gamma, weighting, reduction, backend=backend)
            found.append(loss_and_grad(criterion, logits, target, valid))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)


def test_loss_pair_by_pair():
    """Equation 5 with four nested loops, frequencies and weights included."""
    labels = torch.randint(0, 2, (2, 5, 6), generator=seeded(3))
    labels[0, 0, 0] = 255
    offsets = dilated_offsets([1, 2])
    target, valid = dilated_affinity_target(labels, offsets, ignore_index=255)
    freqs = random_frequencies(2, seeded(1))
    logits = torch.randn(target.shape, generator=seeded(2), dtype=DOUBLE)
    share = freqs @ torch.arange(9.0, dtype=DOUBLE) / 8
    rules = {
        "sqrt": lambda r, k, a: math.sqrt(freqs[r, 8] / max(freqs[r, k], 1e-6)),
        "inverse": lambda r, k, a: freqs[r, 8] / max(freqs[r, k], 1e-6),
        "signal": lambda r, k, a: 1 if a else share[r] / (1 - share[r]),
        "none": lambda r, k, a: 1,
    }
    for weighting, rule in rules.items():
        total = 0.0
        for r in range(2):
            own, pixels, part = slice(8 * r, 8 * r + 8), 0, 0.0
            for b, i, j in np.ndindex(2, 5, 6):
                a, v = target[b, own, i, j], valid[b, own, i, j]
                if not v.any():
                    continue
                pixels += 1
                k = math.floor(8 * int(a.sum()) / int(v.sum()) + 0.5)
                for c in range(8):
                    if v[c]:
                        p = torch.sigmoid(logits[b, 8 * r + c, i, j]).item()
                        p_t = p if a[c] else 1 - p
                        part -= rule(r, k, a[c]) * (1 - p_t) ** 2 * math.log(p_t)
            total += part / pixels
        loss = DilatedAffinityLoss(freqs, weighting=weighting)(logits, target, valid)
        assert loss.item() == pytest.approx(float(total), rel=1e-10)


@pytest.mark.parametrize("weighting", ["sqrt", "signal"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_loss_gradcheck(gamma, weighting):
    labels = torch.randint(0, 2, (2, 3, 4), generator=seeded())
    labels[0, 1, 1] = 255
    target, valid = dilated_affinity_target(labels, dilated_offsets([1, 2]), ignore_index=255)
    freqs = random_frequencies(2, seeded(1))
    logits = torch.randn(target.shape, generator=seeded(2), dtype=DOUBLE, requires_grad=True)
    for reduction in ("mean", "none"):
        criterion = DilatedAffinityLoss(freqs, gamma, weighting, reduction)
        assert gradcheck(lambda x, c=criterion: c(x, target, valid), (logits,))
    twice = DilatedAffinityLoss(freqs, gamma, weighting, backend="reference")
    assert gradgradcheck(lambda x: twice(x, target, valid), (logits,))
    loss = DilatedAffinityLoss(freqs)(logits, target, valid)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_focal_loss_is_the_peers():
    """With gamma 0 PyTorch's cross-entropy; otherwise torchvision's formula without alpha."""
    target = torch.rand(2, 8, 5, 5, generator=seeded()) < 0.7
    valid = torch.ones_like(target)
    logits = 3 * torch.randn(target.shape, generator=seeded(1), dtype=DOUBLE)
    entropy = F.binary_cross_entropy_with_logits(logits, target.double(), reduction="none")
    p_t = torch.where(target, logits.sigmoid(), (-logits).sigmoid())
    for gamma in (0.0, 2.0):
        criterion = DilatedAffinityLoss(None, gamma, "none", "sum")
        peer = (entropy * (1 - p_t) ** gamma).sum()
        torch.testing.assert_close(criterion(logits, target, valid), peer)


def test_focal_loss_of_a_pair_is_chapter_ones_focal_form():
    """One pair is a graph of one target and one other entry whose mass logit is its own."""
    from affnb.affinity.affinity_mass import affinity_mass_loss

    x = torch.linspace(-6, 6, 8, dtype=DOUBLE).view(1, 8, 1, 1)
    every = torch.ones(1, 8, 1, 1, dtype=torch.bool)
    ours = DilatedAffinityLoss(None, 2.0, "none", "sum")(x, every, every)
    graph = torch.full((8, 2, 2), -torch.inf, dtype=DOUBLE)
    graph[:, 0, 0], graph[:, 0, 1] = x.flatten(), 0
    first = torch.tensor([[True, False], [False, False]]).expand(8, 2, 2)
    torch.testing.assert_close(ours, affinity_mass_loss(graph, first, reduction="sum"))


def test_ignored_and_border_pairs_change_nothing():
    labels = torch.randint(0, 2, (2, 6, 6), generator=seeded())
    labels[:, 2:4, 2:4] = 255
    offsets = dilated_offsets([1, 2])
    target, valid = dilated_affinity_target(labels, offsets, ignore_index=255)
    criterion = DilatedAffinityLoss(random_frequencies(2, seeded(1)))
    logits = torch.randn(target.shape, generator=seeded(2), dtype=DOUBLE)
    loss, grad = loss_and_grad(criterion, logits, target, valid)
    assert (grad[~valid] == 0).all()
    assert (grad[valid] != 0).all()
    moved = torch.where(valid, logits, logits + 50)
    assert torch.equal(criterion(moved, target, valid), loss)
    assert torch.equal(criterion(logits, target | ~valid, valid), loss)  # targets there neither


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_loss_of_degenerate_images(backend):
    offsets = dilated_offsets([1])
    freqs = torch.zeros(1, 9)
    freqs[0, 8] = 1
    for reduction in ("mean", "sum", "none"):
        for weighting in ("sqrt", "inverse", "signal", "none"):
            criterion = DilatedAffinityLoss(freqs, 2.0, weighting, reduction, backend=backend)
            # All ignored; a single pixel; no image at all.
            for shape in ((2, 4, 4), (1, 1, 1), (0, 3, 3)):
                labels = torch.full(shape, 255)
                target, valid = dilated_affinity_target(labels, offsets, ignore_index=255)
                loss, grad = loss_and_grad(criterion, torch.randn(target.shape), target, valid)
                assert torch.equal(loss, torch.zeros_like(loss))
                assert torch.equal(grad, torch.zeros_like(grad))
    # One class: all weights are 1, and the loss is that of positives.
    target, valid = dilated_affinity_target(torch.zeros(1, 4, 4, dtype=torch.long), offsets)
    loss = DilatedAffinityLoss(freqs, backend=backend)(torch.zeros(target.shape), target, valid)
    assert loss.item() == pytest.approx(valid.sum().item() / 16 * math.log(2) / 4)


def test_weights_are_relative_to_the_inside():
    freqs = random_frequencies(2, seeded())
    sqrt, inverse = (DilatedAffinityLoss(freqs, weighting=w).table for w in ("sqrt", "inverse"))
    assert (sqrt[:, 8] == 1).all()
    torch.testing.assert_close(sqrt**2, inverse)
    assert torch.equal(sqrt[..., 0], sqrt[..., 1])
    assert sqrt.isfinite().all()  # category 2 is empty
    torch.testing.assert_close(sqrt[:, 2, 0], (freqs[:, 8] / 1e-6).sqrt())
    kept = freqs > 0
    weight = (freqs * sqrt[..., 0])[kept]
    geometric = (freqs * freqs[:, 8:]).sqrt()[kept]
    torch.testing.assert_close(weight, geometric)  # the mean between "as they come" and "all equal"


def test_large_logits_stay_finite():
    target = torch.rand(1, 8, 4, 4, generator=seeded()) < 0.5
    valid = torch.ones_like(target)
    logits = torch.randn(1, 8, 4, 4, generator=seeded(1)).sign() * 1e4
    for gamma in (0.0, 0.5, 2.0):
        loss, grad = loss_and_grad(DilatedAffinityLoss(None, gamma, "none"), logits, target, valid)
        assert loss.isfinite()
        assert grad.isfinite().all()


LABELS = torch.zeros(1, 4, 4, dtype=torch.long)
RATE = dilated_offsets([1])
TARGET, VALID = dilated_affinity_target(LABELS, RATE)
NAN = torch.full((1, 8, 4, 4), torch.nan)


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "labels", {"labels": LABELS.float()}),
        (ValueError, "labels", {"labels": LABELS[0]}),
        (TypeError, "offsets", {"offsets": [[1, 0]]}),
        (TypeError, "offsets", {"offsets": RATE.float()}),
        (ValueError, "offsets", {"offsets": RATE[:0]}),
        (ValueError, "offsets", {"offsets": RATE.T}),
        (ValueError, "offsets", {"offsets": torch.zeros(1, 2, dtype=torch.long)}),
        (ValueError, "offsets", {"offsets": 4 * RATE}),
        (TypeError, "ignore_index", {"ignore_index": 255.0}),
    ],
)
def test_target_rejects(error, name, arguments):
    given_ = {"labels": LABELS, "offsets": RATE} | arguments
    with pytest.raises(error, match=f"^{name}: expected"):
        dilated_affinity_target(given_.pop("labels"), given_.pop("offsets"), **given_)


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "target", {"target": TARGET.float()}),
        (ValueError, "target", {"target": TARGET[0]}),
        (ValueError, "target", {"num_rates": 2}),
        (ValueError, "valid", {"valid": VALID[:, :, :2]}),
        (TypeError, "valid", {"valid": None}),
        (TypeError, "num_rates", {"num_rates": 1.0}),
        (ValueError, "num_rates", {"num_rates": 0}),
        (TypeError, "normalise", {"normalise": 1}),
    ],
)
def test_frequencies_reject(error, name, arguments):
    given_ = {"target": TARGET, "valid": VALID, "num_rates": 1} | arguments
    with pytest.raises(error, match=f"^{name}: expected"):
        neighbour_count_frequencies(**given_)


FREQS = torch.full((1, 9), 1 / 9)


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (ValueError, "freqs", {"freqs": None}),
        (ValueError, "freqs", {"freqs": FREQS[0]}),
        (ValueError, "freqs", {"freqs": FREQS[:, :8]}),
        (ValueError, "freqs", {"freqs": FREQS[:0]}),
        (ValueError, "freqs", {"freqs": 2 * FREQS}),
        (ValueError, "freqs", {"freqs": FREQS * torch.nan}),
        (TypeError, "freqs", {"freqs": torch.ones(1, 9, dtype=torch.long)}),
        (ValueError, "gamma", {"gamma": -1}),
        (ValueError, "weighting", {"weighting": "neighbour"}),
        (ValueError, "reduction", {"reduction": "max"}),
        (ValueError, "min_frequency", {"min_frequency": 0}),
        (ValueError, "backend", {"backend": "triton"}),
        (TypeError, "logits", {"logits": NAN.long()}),
        (ValueError, "logits", {"logits": NAN}),
        (ValueError, "logits", {"logits": torch.zeros(1, 8, 4, 3)}),
        (ValueError, "target", {"target": TARGET[:, :7]}),
        (TypeError, "valid", {"valid": VALID.float()}),
        (ValueError, "valid", {"valid": VALID[..., :3]}),
    ],
)
def test_loss_rejects(error, name, arguments):
    call = {"logits": torch.zeros(1, 8, 4, 4), "target": TARGET, "valid": VALID}
    options = {"freqs": FREQS} | {k: v for k, v in arguments.items() if k not in call}
    call |= {k: v for k, v in arguments.items() if k in call}
    with pytest.raises(error, match=f"^{name}: expected"):
        DilatedAffinityLoss(**options)(**call)


# --------------------------------------------------------------------------------------------------
# The head
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [0.8, [0.9, 0.7], torch.linspace(0.1, 0.9, 16)])
def test_head_starts_at_the_prior(prior):
    offsets = dilated_offsets([1, 2])
    head = AffinityHead(5, offsets, prior)
    share = torch.as_tensor(prior).reshape(-1).float()
    expected = share.repeat_interleave(16 // len(share))
    torch.testing.assert_close(head.conv.bias.detach().sigmoid(), expected)
    torch.testing.assert_close(head(torch.zeros(1, 5, 2, 2)).sigmoid()[0, :, 1, 1], expected)
    assert (head(torch.randn(2, 5, 3, 3)).sigmoid() - expected[:, None, None]).abs().max() < 0.05
    assert torch.equal(head.offsets, offsets)
    assert "offsets" in head.state_dict()
    features = torch.randn(2, 5, 3, 4)
    assert head(features, size=(6, 8)).shape == (2, 16, 6, 8)
    assert torch.equal(head(features, size=(3, 4)), head(features))


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "in_channels", {"in_channels": 1.5}),
        (ValueError, "in_channels", {"in_channels": 0}),
        (ValueError, "offsets", {"offsets": RATE[:, :1]}),
        (ValueError, "prior", {"prior": 1.0}),
        (ValueError, "prior", {"prior": 0.0}),
        (ValueError, "prior", {"prior": [0.5, 0.5]}),
        (ValueError, "prior", {"prior": torch.full((1, 8), 0.5)}),
    ],
)
def test_head_rejects(error, name, arguments):
    given_ = {"in_channels": 2, "offsets": RATE, "prior": 0.5} | arguments
    with pytest.raises(error, match=f"^{name}: expected"):
        AffinityHead(**given_)
    with pytest.raises(ValueError, match=r"^features: expected"):
        AffinityHead(2, RATE, 0.5)(torch.zeros(1, 3, 2, 2))


def test_steep_sigmoid():
    x = torch.linspace(-5, 5, 11, dtype=DOUBLE)
    torch.testing.assert_close(steep_sigmoid(x), 7**x / (1 + 7**x))
    assert steep_sigmoid(torch.zeros(1)).item() == 0.5
    torch.testing.assert_close(steep_sigmoid(x, math.e), x.sigmoid())
    a, k = x.sigmoid(), math.log(7)
    torch.testing.assert_close(steep_sigmoid(x), a**k / (a**k + (1 - a) ** k))
    assert gradcheck(steep_sigmoid, (x.clone().requires_grad_(),))
    with pytest.raises(ValueError, match=r"^mu: expected"):
        steep_sigmoid(x, 1.0)
    with pytest.raises(TypeError, match=r"^logits: expected"):
        steep_sigmoid(torch.ones(2, dtype=torch.long))


# --------------------------------------------------------------------------------------------------
# The propagation
# --------------------------------------------------------------------------------------------------


def result_and_grads(prob, affinity, offsets, **options):
    """The refined map and the gradients of a weighted sum of it."""
    p, a = prob.detach().requires_grad_(), affinity.detach().requires_grad_()
    result = propagate_affinity(p, a, offsets, **options)
    weights = torch.linspace(-1, 1, result.numel(), dtype=DOUBLE).view(result.shape).cos()
    grads = torch.autograd.grad(
        (result * weights).sum(), (p, a), allow_unused=True, materialize_grads=True
    )
    return result.detach(), *grads


@pytest.mark.parametrize("strip", [2**17, 40, 1])
@settings(max_examples=25, deadline=None)
@given(propagations(), st.sampled_from([0, 1, 2, 3, 4]), st.sampled_from([0.5, 6.0]), st.booleans())
def test_propagation_equals_reference(strip, case, iterations, lam, anchored):
    prob, affinity, offsets, _ = case
    options = {"lam": lam, "iterations": iterations, "anchored": anchored}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_STRIP_CPU", strip)
        fast = result_and_grads(prob, affinity, offsets, **options)
    slow = result_and_grads(prob, affinity, offsets, **options, backend="reference")
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fast[0].sum(1), torch.ones_like(fast[0][:, 0]))


@pytest.mark.parametrize("iterations", [5, 7, 10, 16, 17])
@pytest.mark.parametrize("anchored", [False, True])
def test_propagation_over_several_stretches(iterations, anchored):
    prob = torch.randn(2, 3, 3, 2, generator=seeded(), dtype=DOUBLE).softmax(1)
    affinity = torch.rand(2, 8, 3, 2, generator=seeded(1), dtype=DOUBLE)
    options = {"iterations": iterations, "anchored": anchored}
    fast = result_and_grads(prob, affinity, RATE, **options)
    slow = result_and_grads(prob, affinity, RATE, **options, backend="reference")
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("anchored", [False, True])
def test_propagation_gradcheck(anchored):
    prob = torch.randn(2, 3, 3, 2, generator=seeded(), dtype=DOUBLE).softmax(1).requires_grad_()
    affinity = torch.rand(2, 8, 3, 2, generator=seeded(1), dtype=DOUBLE).add_(0.1).requires_grad_()

    def run(p, a, **options):
        return propagate_affinity(p, a, RATE, anchored=anchored, **options)

    assert gradcheck(lambda p, a: run(p, a, iterations=3), (prob, affinity))
    assert gradcheck(lambda p, a: run(p, a, lam=0.0, iterations=2), (prob, affinity))
    small = tuple(x[:1, :, :2].detach().requires_grad_() for x in (prob, affinity))
    assert gradgradcheck(lambda p, a: run(p, a, iterations=1, backend="reference"), small)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(run(prob, affinity).sum(), prob, create_graph=True)


def dense(affinity, offsets):
    """All affinities of one image as a matrix over its pixels."""
    channels, height, width = affinity.shape
    matrix = torch.zeros(height * width, height * width, dtype=affinity.dtype)
    for k, i, j in np.ndindex(channels, height, width):
        y, x = i + int(offsets[k, 0]), j + int(offsets[k, 1])
        if 0 <= y < height and 0 <= x < width:
            matrix[i * width + j, y * width + x] += affinity[k, i, j]
    return matrix


def test_a_step_is_a_row_stochastic_matrix():
    offsets = dilated_offsets([1, 3])
    prob = torch.randn(1, 3, 6, 6, generator=seeded(), dtype=DOUBLE).softmax(1)
    affinity = torch.rand(1, 16, 6, 6, generator=seeded(1), dtype=DOUBLE)
    p, a = prob[0].flatten(1).T, dense(affinity[0], offsets)
    c = 6 * p.amax(1)
    q = (c.diag() + a) / (c + a.sum(1))[:, None]
    torch.testing.assert_close(q.sum(1), torch.ones(36, dtype=DOUBLE))
    ours = propagate_affinity(prob, affinity, offsets, iterations=1)
    torch.testing.assert_close(ours[0].flatten(1).T, q @ p)


def test_fixed_points():
    """Anchored: the solution of a linear system. Otherwise: one constant for each component."""
    prob = torch.randn(1, 3, 5, 5, generator=seeded(), dtype=DOUBLE).softmax(1)
    affinity = torch.rand(1, 8, 5, 5, generator=seeded(1), dtype=DOUBLE)
    p, a = prob[0].flatten(1).T, dense(affinity[0], RATE)
    c = (6 * p.amax(1)).diag()
    fixed = torch.linalg.solve(c + a.sum(1).diag() - a, c @ p)
    anchored = propagate_affinity(prob, affinity, RATE, iterations=200, anchored=True)
    torch.testing.assert_close(anchored[0].flatten(1).T, fixed)
    free = propagate_affinity(prob, affinity, RATE, iterations=500)
    torch.testing.assert_close(free, free[..., :1, :1].expand_as(free))
    labels = torch.zeros(1, 5, 5, dtype=torch.long)
    labels[:, :, 2:] = 1
    truth = dilated_affinity_target(labels, RATE)[0].double()
    parts = propagate_affinity(prob, truth, RATE, iterations=500)
    for region in (parts[..., :2], parts[..., 2:]):
        torch.testing.assert_close(region, region[..., :1, :1].expand_as(region))
    assert (parts[..., 0] - parts[..., 4]).abs().max() > 1e-3


def test_symmetric_affinity_with_frozen_weights_keeps_a_weighted_mean():
    """All probabilities share their largest entry, so the weights c stay frozen while others mix."""
    generator = seeded()
    n = 8
    w = torch.rand(n, n, generator=generator, dtype=DOUBLE)
    w = ((w + w.T) / 2).fill_diagonal_(0)
    rest = torch.rand(n, generator=generator, dtype=DOUBLE)
    p = torch.stack([torch.full((n,), 0.6, dtype=DOUBLE), 0.4 * rest, 0.4 * (1 - rest)])
    # A row of eight pixels, all pairs: offsets -7 .. 7 along it.
    offsets = torch.tensor([[0, d] for d in range(-7, 8) if d])
    affinity = torch.zeros(1, len(offsets), 1, n, dtype=DOUBLE)
    for k, d in enumerate(offsets[:, 1].tolist()):
        for i in range(max(0, -d), n - max(0, d)):
            affinity[0, k, 0, i] = w[i, i + d]
    weight = 6 * 0.6 + w.sum(1)
    limit = (p * weight).sum(1) / weight.sum()
    found = propagate_affinity(p[None, :, None], affinity, offsets, iterations=400)
    torch.testing.assert_close(found[0, :, 0, 3], limit)


def test_labels_that_all_neighbours_share_do_not_change():
    prob = torch.randn(1, 4, 7, 7, generator=seeded(), dtype=DOUBLE).softmax(1)
    prob = prob.sort(1, descending=True).values  # class 0 leads everywhere
    affinity = torch.rand(1, 8, 7, 7, generator=seeded(1), dtype=DOUBLE)
    assert (propagate_affinity(prob, affinity, RATE).argmax(1) == 0).all()


def test_confident_pixel_among_certain_neighbours():
    """The brief's numbers: 6/38 of itself with 32 neighbours; with kappa 16 of 16, half."""
    offsets = dilated_offsets([8, (12, 24), 16], both=True)
    prob = torch.zeros(1, 2, 65, 65)
    prob[:, 0] = 1
    prob[0, :, 32, 32] = torch.tensor([0.0, 1.0])
    after = propagate_affinity(prob, torch.ones(1, 32, 65, 65), offsets, iterations=1)
    assert after[0, 1, 32, 32].item() == pytest.approx(6 / 38)
    offsets = dilated_offsets([1, 2])
    prob = prob[..., 28:37, 28:37]
    ones = torch.ones(1, 16, 9, 9)
    once, twice = (propagate_affinity(prob, ones, offsets, lam=16.0, iterations=t) for t in (1, 2))
    assert once[0, 1, 4, 4].item() == pytest.approx(0.5)
    assert twice[0, 1, 4, 4] < 0.5


def test_invariances():
    prob = torch.randn(2, 3, 6, 5, generator=seeded(), dtype=DOUBLE).softmax(1)
    affinity = torch.rand(2, 8, 6, 5, generator=seeded(1), dtype=DOUBLE)
    result = propagate_affinity(prob, affinity, RATE)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(propagate_affinity(prob[:, order], affinity, RATE), result[:, order])
    shuffle = torch.randperm(8, generator=seeded(2))  # channels and offsets together
    torch.testing.assert_close(
        propagate_affinity(prob, affinity[:, shuffle], RATE[shuffle]), result
    )
    mirrored = propagate_affinity(prob.flip(3), affinity.flip(3), RATE * torch.tensor([1, -1]))
    torch.testing.assert_close(mirrored, result.flip(3))
    scaled = propagate_affinity(prob, 3 * affinity, RATE, lam=18.0)
    torch.testing.assert_close(scaled, result)
    steps = prob
    for _ in range(10):
        steps = propagate_affinity(steps, affinity, RATE, iterations=1)
    torch.testing.assert_close(steps, result)


def test_affinities_out_of_the_image_change_nothing():
    prob = torch.randn(1, 3, 4, 5, generator=seeded(), dtype=DOUBLE).softmax(1)
    affinity = torch.rand(1, 8, 4, 5, generator=seeded(1), dtype=DOUBLE)
    _, inside = dilated_affinity_target(torch.zeros(1, 4, 5, dtype=torch.long), RATE)
    base = result_and_grads(prob, affinity, RATE)
    other = result_and_grads(prob, torch.where(inside, affinity, 1e3), RATE)
    torch.testing.assert_close(base, other, rtol=0, atol=0)
    assert (base[2][~inside] == 0).all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("anchored", [False, True])
def test_degenerate_propagation(backend, anchored):
    options = {"backend": backend, "anchored": anchored}
    # One pixel has no neighbours; nor has any pixel without affinity.
    for shape in ((2, 3, 1, 1), (1, 2, 4, 4)):
        prob = torch.rand(shape, generator=seeded()).softmax(1)
        affinity = torch.zeros(shape[0], 8, *shape[2:])
        torch.testing.assert_close(propagate_affinity(prob, affinity, RATE, **options), prob)
    one = torch.ones(1, 1, 3, 3)
    torch.testing.assert_close(
        propagate_affinity(one, torch.rand(1, 8, 3, 3), RATE, **options), one
    )
    prob = torch.zeros(1, 2, 3, 3)
    prob[:, 1] = 1  # one class everywhere, certain
    affinity = torch.rand(1, 8, 3, 3, generator=seeded())
    torch.testing.assert_close(propagate_affinity(prob, affinity, RATE, **options), prob)
    assert propagate_affinity(prob[:0], affinity[:0], RATE, **options).shape == (0, 2, 3, 3)
    same = propagate_affinity(prob, affinity, RATE, iterations=0, **options)
    assert torch.equal(same, prob)
    assert same.data_ptr() != prob.data_ptr()


PROB, AFFINITY = torch.full((1, 2, 4, 4), 0.5), torch.ones(1, 8, 4, 4)


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "prob", {"prob": None}),
        (TypeError, "prob", {"prob": PROB.long()}),
        (ValueError, "prob", {"prob": PROB[0]}),
        (ValueError, "prob", {"prob": PROB * 1.5}),
        (ValueError, "prob", {"prob": torch.cat([PROB[:, :1] + 1, -PROB[:, :1]], 1)}),
        (ValueError, "prob", {"prob": PROB * torch.nan}),
        (ValueError, "prob", {"prob": PROB[:, :0]}),
        (TypeError, "affinity", {"affinity": AFFINITY.bool()}),
        (ValueError, "affinity", {"affinity": AFFINITY[:, :7]}),
        (ValueError, "affinity", {"affinity": AFFINITY[..., :3]}),
        (ValueError, "affinity", {"affinity": -AFFINITY}),
        (ValueError, "affinity", {"affinity": AFFINITY / 0}),
        (ValueError, "affinity", {"affinity": AFFINITY.to("meta")}),
        (ValueError, "offsets", {"offsets": 4 * RATE}),
        (TypeError, "offsets", {"offsets": RATE.tolist()}),
        (ValueError, "lam", {"lam": -1}),
        (ValueError, "lam", {"lam": 0, "affinity": 0 * AFFINITY}),
        (TypeError, "lam", {"lam": "6"}),
        (TypeError, "iterations", {"iterations": 1.0}),
        (ValueError, "iterations", {"iterations": -1}),
        (TypeError, "anchored", {"anchored": 1}),
        (ValueError, "backend", {"backend": "unfold"}),
    ],
)
def test_propagation_rejects(error, name, arguments):
    given_ = {"prob": PROB, "affinity": AFFINITY, "offsets": RATE} | arguments
    with pytest.raises(error, match=f"^{name}: expected"):
        propagate_affinity(
            given_.pop("prob"), given_.pop("affinity"), given_.pop("offsets"), **given_
        )


def test_random_walker_of_scikit_image_is_the_anchored_form():
    """With seeds held by an infinite anchor and the others free, a random walk's probabilities."""
    from skimage.segmentation import random_walker

    image = torch.rand(7, 9, generator=seeded(), dtype=DOUBLE)
    seeds = torch.zeros(7, 9, dtype=torch.int64)
    seeds[1, 1], seeds[5, 7], seeds[1, 7] = 1, 2, 3
    beta = 30.0
    peer = random_walker(
        image.numpy(), seeds.numpy(), beta=beta, mode="bf", return_full_prob=True, tol=1e-9
    )
    # Its weights between 4-neighbours, of the image scaled by 10 over its standard deviation.
    scale = beta / (10 * image.std(correction=0).item())
    offsets = torch.tensor([[-1, 0], [0, -1], [0, 1], [1, 0]])
    affinity = torch.zeros(1, 4, 7, 9, dtype=DOUBLE)
    padded = F.pad(image, (1, 1, 1, 1), value=float("inf"))
    for k, (dy, dx) in enumerate(offsets.tolist()):
        there = padded[1 + dy : 8 + dy, 1 + dx : 10 + dx]
        affinity[0, k] = torch.exp(-scale * (image - there) ** 2) + 1e-10
    affinity[0, :, seeds > 0] = 0  # a seed listens to nobody
    prob = torch.full((1, 3, 7, 9), 1 / 3, dtype=DOUBLE)
    for label in (1, 2, 3):
        prob[0, :, seeds == label] = torch.eye(3, dtype=DOUBLE)[:, label - 1 : label]
    ours = propagate_affinity(prob, affinity, offsets, lam=1e-9, iterations=4000, anchored=True)
    torch.testing.assert_close(ours[0], torch.from_numpy(peer), rtol=0, atol=2e-3)


# --------------------------------------------------------------------------------------------------
# Precision, autocast, compile, memory
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    prob = torch.randn(1, 3, 6, 6, generator=seeded()).softmax(1)
    affinity = torch.rand(1, 8, 6, 6, generator=seeded(1)).to(dtype)
    target, valid = dilated_affinity_target(torch.zeros(1, 6, 6, dtype=torch.long), RATE)
    logits = torch.randn(target.shape, generator=seeded(2)).to(dtype).requires_grad_()
    criterion = DilatedAffinityLoss(None, weighting="none")
    with torch.autocast("cpu", dtype=dtype):
        refined = propagate_affinity(prob.to(dtype), affinity, RATE)
        loss = criterion(logits, target, valid)
    assert refined.dtype == loss.dtype == torch.float32
    wide = propagate_affinity(prob.to(dtype).float(), affinity.float(), RATE)
    torch.testing.assert_close(refined, wide, rtol=0, atol=0)
    torch.testing.assert_close(loss, criterion(logits.float(), target, valid), rtol=0, atol=0)
    loss.backward()
    assert logits.grad.dtype == dtype
    assert propagate_affinity(prob, affinity.double(), RATE).dtype == DOUBLE


def test_compile():
    prob = torch.randn(1, 3, 5, 5, generator=seeded())
    labels = torch.randint(0, 2, (1, 5, 5), generator=seeded(1))
    logits = torch.randn(1, 8, 5, 5, generator=seeded(2))
    target, valid = dilated_affinity_target(labels, RATE)
    criterion = DilatedAffinityLoss(None, weighting="none")

    def run(z, x):
        refined = propagate_affinity(z.softmax(1), steep_sigmoid(x), RATE, iterations=3)
        return refined[:, 0].log().mean() + criterion(x, target, valid)

    found = []
    for function in (torch.compile(run, backend="aot_eager"), run):
        leaves = [prob.clone().requires_grad_(), logits.clone().requires_grad_()]
        value = function(*leaves)
        found.append((value.detach(), *torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(found[0], found[1])


def test_speckled_regions():
    """The chapter's data: only speckles tell the class, and without lies they tell the truth."""
    from affnb.data.regions import speckled_regions

    images, labels = speckled_regions(40, speckles=0.3, wrong=0.0, noise=0.0, generator=seeded())
    again = speckled_regions(40, speckles=0.3, wrong=0.0, noise=0.0, generator=seeded())
    assert torch.equal(images, again.images)
    assert torch.equal(labels, again.labels)
    top, colour = images.max(1)
    speckled = top - images.amin(1) > 0.5
    assert 0.28 < speckled.float().mean() < 0.32
    assert torch.equal(colour[speckled], labels[speckled])
    grey = images.amin(1)
    means = [grey[labels == c].mean().item() for c in range(3)]
    assert max(means) - min(means) < 0.15  # the grey level says nothing
    for name, value in {"regions": 1, "speckles": 1.1, "noise": -1, "size": 7}.items():
        with pytest.raises(ValueError, match=rf"^{name}: expected"):
            speckled_regions(1, **{name: value})


LARGE = """
import torch
from affnb.affinity.dilated_affinity import *

def peak():  # bytes; the high-water mark of this process's resident memory
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

torch.set_num_threads(1)
offsets = dilated_offsets([8, 16])

def step(batch, side):
    logits = torch.randn(batch, 16, side, side).requires_grad_()
    scores = torch.randn(batch, 21, side, side).softmax(1).requires_grad_()
    labels = torch.randint(0, 21, (batch, side, side))
    before = peak()
    target, valid = dilated_affinity_target(labels, offsets, ignore_index=0)
    freqs = neighbour_count_frequencies(target, valid, 2)
    DilatedAffinityLoss(freqs)(logits, target, valid).backward()
    one = peak()
    del target, valid
    affinity = torch.rand(batch, 16, side, side).requires_grad_()
    propagate_affinity(scores, affinity, offsets, iterations=2).square().sum().backward()
    assert logits.grad.isfinite().all() and affinity.grad.any() and scores.grad.any()
    return before, one, peak()

step(1, 32)
print(*step(16, 240))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_large_batch_in_bounded_memory():
    run = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    before, loss, both = map(int, run.stdout.split())
    channel = 16 * 240 * 240 * 4  # one map of the batch in float32
    # The loss: gradient (16 channels) and targets (8, in bytes), and little more.
    assert loss - before < 1.6 * (16 + 8) * channel
    # The propagation: affinities, their gradient, the result, and copies of the probabilities;
    # unfolding the probabilities would take 16 * 21 channels.
    assert both - before < 0.75 * (16 * 21) * channel


# --------------------------------------------------------------------------------------------------
# The chapter's full profile, on a stand-in for the data and the ResNet
# --------------------------------------------------------------------------------------------------


def test_full_profile(tmp_path, monkeypatch):
    names, verdicts, trainings = run_on_voc(
        "affinity/dilated_affinity",
        tmp_path,
        monkeypatch,
        define=("shaded", "label_sets", "class_figure", "category_figure", "truth_affinity"),
        call=("settle", "display", "explore"),
        small={
            "rates": "[1, (2, 3), (3, 2), 2]",
            "batch_size": "2",
            "steps": "2",
            "[8, 16, 32, 64]": "[1, 2, 3, 4]",
            "voc(crop=)": "33",
            "DataLoader(num_workers=)": "0",
            "net_seeds": "[first_seed, first_seed + 1]",
            "toy_seeds": "[seed, seed + 1]",
            "maps": "2",
        },
        two_rates=dilated_offsets([2, 4]),
    )
    ids = {id.split(":")[1] for id in verdicts}
    assert {"joint-training", "root-above-inverse", "root-above-weights"} < ids
    assert len(ids) == 11

    for optimizer, (group,), schedule, steps, images in trainings:
        assert optimizer == "SGD"
        assert (group["initial_lr"], group["momentum"], group["weight_decay"]) == (7e-3, 0.9, 4e-5)
        assert (steps, schedule["total_iters"], schedule["power"]) == (2, 2, 0.9)
        assert (len(images), images.crop) == (5, 33)  # the augmented training set

    # The arms of Table 1, on its rates, and the best setting (all rates changed above).
    wide, best = dilated_offsets([1, 2, 3, 4]), dilated_offsets([1, (2, 3), 2], both=True)
    expected = {
        "classes alone": (None, None, 0.0, best),
        "equal weights, CE": ("none", 0.0, 1.1, wide),
        "weights by sign": ("signal", 2.0, 1.3, wide),
        "inverse weights": ("inverse", 2.0, 0.25, wide),
        "root weights, Table 1's rates": ("sqrt", 2.0, 1.5, wide),
        "root weights, focal": ("sqrt", 2.0, 1.2, best),
    }
    assert set(names["arms"]) == set(expected)
    assert len(trainings) == 6 * 2  # two seeds here
    for arm, (weighting, gamma, weight, offsets) in expected.items():
        criterion, found, (pairs, prior) = names["arms"][arm]
        assert getattr(criterion, "weighting", None) == weighting
        assert getattr(criterion, "gamma", None) == gamma
        assert found == weight
        assert torch.equal(pairs, offsets)
        assert prior.shape == (len(offsets) // 8,)
        assert ((prior > 0) & (prior < 1)).all()

    # Output stride 16 in training; in evaluation 8, by dilation: every second pixel is as it was.
    model, x = names["plain"], torch.randn(1, 3, 129, 129, generator=seeded())
    assert not model.training
    with torch.no_grad():
        fine = model.fine(x)
        sharp = model.deep(fine)
        assert (fine.shape[-1], sharp.shape[-1]) == (33, 17)
        model.train()
        rates = [branch[0].dilation[0] for branch in model.context.convs[1:4]]
        for part in model.modules():  # the statistics of evaluation, so that the two compare
            if isinstance(part, torch.nn.BatchNorm2d):
                part.eval()
        coarse = model.deep(fine)
    assert coarse.shape[-1] == 9
    torch.testing.assert_close(sharp[..., ::2, ::2], coarse)
    assert rates == [6, 12, 18]
    model.eval()
    assert [branch[0].dilation[0] for branch in model.context.convs[1:4]] == [12, 24, 36]
    assert [a.shape[1:] for a in model(x)] == [(21, 129, 129), (32, 129, 129)]

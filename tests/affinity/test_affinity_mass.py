"""The affinity mass, its losses, and the batch variant."""

import importlib
import math
import subprocess
import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from affnb.affinity import (
    BatchAffinityLoss,
    affinity_mass,
    affinity_mass_loss,
    batch_affinity_loss,
    log_affinity_mass,
    pair_recall_at_k,
    pairwise_sq_dist,
    relation_target,
    same_class_target,
)

# By its full name: affnb.affinity.affinity_mass is also the function of that name.
module = importlib.import_module("affnb.affinity.affinity_mass")

FORMS = ("focal", "log", "l2", "smooth_l1", "bce")
MASS_FORMS = FORMS[:4]
# Every loss that exists: the single-entry form has nothing to normalise by row.
KINDS = [*product(MASS_FORMS, ("matrix", "row")), ("bce", "matrix")]
DOUBLE = torch.float64
SIZES = st.sampled_from([1, 2, 3, 5, 7, 11, 13])


def value_and_grad(function, x, *args, **options):
    """Loss and gradient with respect to a fresh leaf with the strides of ``x``."""
    leaf = x.detach().requires_grad_()
    loss = function(leaf, *args, **options)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), grad


def assert_zero(loss, grad):
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(grad, torch.zeros_like(grad))


@st.composite
def graphs(draw):
    """Logits, target and mask in float64; batch dimensions, and memory layouts, vary."""
    n = draw(SIZES)
    batch = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 1.0, 5.0]))
    logits = scale * torch.randn(*batch, n, n, generator=generator, dtype=DOUBLE)
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    target = torch.rand(*batch, n, n, generator=generator) < density
    layout = draw(st.sampled_from(["plain", "transposed", "strided"]))
    if layout == "transposed":
        logits = logits.mT
    elif layout == "strided":
        logits = logits.repeat_interleave(2, -1)[..., ::2]
    mask = None
    if draw(st.booleans()):
        shape = (n, n) if draw(st.booleans()) else logits.shape
        mask = torch.rand(shape, generator=generator) < 0.7
        mask.view(-1)[0] = True
    return logits, target, mask


@st.composite
def batches(draw):
    """Features (off centre, sometimes strided, sometimes with equal rows) and labels."""
    n, d = draw(SIZES), draw(st.sampled_from([1, 2, 5]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    features = torch.randn(n, 2 * d, generator=generator, dtype=DOUBLE) + 3
    features = features[:, ::2] if draw(st.booleans()) else features[:, :d].contiguous()
    if n > 1 and draw(st.booleans()):
        features[1] = features[0]
    classes = draw(st.sampled_from([1, 2, 4, 100]))
    return features, torch.randint(-2, classes - 2 or 1, (n,), generator=generator)


# --------------------------------------------------------------------------------------------------
# Fast against reference
# --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    graphs(),
    st.sampled_from(KINDS),
    st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]),
    st.sampled_from(["mean", "sum", "none"]),
)
def test_loss_equals_reference(graph, kind, gamma, reduction):
    logits, target, mask = graph
    form, normalisation = kind
    options = {
        "form": form,
        "gamma": gamma,
        "normalisation": normalisation,
        "mask": mask,
        "reduction": reduction,
    }
    # (1 - M)^gamma with 0 < gamma < 1 has no finite slope at M = 1 in the printed form.
    mass = affinity_mass(logits, target, mask=mask, normalisation=normalisation)
    if 0 < gamma < 1 and form == "focal" and (mass == 1).any():
        options["gamma"] = 1.0
    fast = value_and_grad(affinity_mass_loss, logits, target, **options)
    slow = value_and_grad(affinity_mass_loss, logits, target, **options, backend="reference")
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(graphs(), st.sampled_from(["matrix", "row"]))
def test_mass_is_the_printed_sum(graph, normalisation):
    logits, target, mask = graph
    keep = torch.ones_like(target) if mask is None else mask.expand_as(target)
    weights = logits.exp() * keep
    dims = (-2, -1) if normalisation == "matrix" else -1
    total = weights.sum(dims)
    expected = torch.where(total > 0, (weights * target).sum(dims) / total, 0.0)
    mass = affinity_mass(logits, target, mask=mask, normalisation=normalisation)
    log_mass = log_affinity_mass(logits, target, mask=mask, normalisation=normalisation)
    torch.testing.assert_close(mass, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(log_mass, expected.log(), rtol=1e-10, atol=1e-12)


# One tile for all, many small tiles, and tiles wider than high: every path through the sweep.
@pytest.mark.parametrize("tile", [(512, 1024), (2, 3), (4, 4), (1, 7)])
@settings(max_examples=40, deadline=None)
@given(
    batches(),
    st.sampled_from(FORMS),
    st.sampled_from([0.0, 0.5, 4.0]),
    st.booleans(),
)
def test_batch_loss_equals_reference(tile, batch, form, gamma, include_self):
    features, labels = batch
    if form == "focal" and 0 < gamma < 1 and len(labels.unique()) == 1:
        gamma = 1.0  # at M = 1 the printed form of gamma < 1 has no finite slope
    options = {"form": form, "gamma": gamma, "include_self": include_self}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TILE_CPU", tile)
        fast = value_and_grad(batch_affinity_loss, features, labels, **options)
        with torch.no_grad():
            alone = batch_affinity_loss(features, labels, **options)
    slow = value_and_grad(batch_affinity_loss, features, labels, **options, backend="reference")
    torch.testing.assert_close(fast, slow, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(alone, slow[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("classes", [1, 3, 40, 1300])
@pytest.mark.parametrize("include_self", [False, True])
def test_batch_loss_over_real_tiles(classes, include_self):
    torch.manual_seed(0)
    features = torch.randn(1300, 6, dtype=DOUBLE)
    labels = torch.randint(0, classes, (1300,))
    for form in FORMS:
        options = {"form": form, "include_self": include_self}
        fast = value_and_grad(batch_affinity_loss, features, labels, **options)
        slow = value_and_grad(batch_affinity_loss, features, labels, **options, backend="reference")
        torch.testing.assert_close(fast, slow, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("tile", [(512, 1024), (16, 32)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_batch_loss_in_float32_with_an_offset_and_any_scale(tile, scale, monkeypatch):
    monkeypatch.setattr(module, "_TILE_CPU", tile)
    torch.manual_seed(1)
    exact = scale * torch.randn(100, 8, dtype=DOUBLE) + 1000 * scale
    exact = exact.float().double()  # what float32 can hold
    labels = torch.randint(0, 5, (100,))
    fast = value_and_grad(batch_affinity_loss, exact.float(), labels, form="log")
    slow = value_and_grad(batch_affinity_loss, exact, labels, form="log", backend="reference")
    assert fast[0].dtype == fast[1].dtype == torch.float32
    torch.testing.assert_close(fast[0].double(), slow[0], rtol=2e-4, atol=1e-4)
    error = (fast[1].double() - slow[1]).norm() / slow[1].norm()
    assert error < 2e-3


def test_running_sum_rescales_when_a_far_larger_logit_comes_late(monkeypatch):
    """Far-apart points first, a close pair last: the shift must rise by hundreds, twice."""
    monkeypatch.setattr(module, "_TILE_CPU", (2, 2))
    x = torch.tensor([0.0, 60, 130, 210, 300, 320, 400, 401, 500, 500.5], dtype=DOUBLE)[:, None]
    for labels in (torch.arange(10) // 2, torch.arange(10) % 2):
        fast = value_and_grad(batch_affinity_loss, x, labels, form="log")
        leaf = x.clone().requires_grad_()
        logits = -pairwise_sq_dist(leaf) / 2
        loss = affinity_mass_loss(
            logits, same_class_target(labels), form="log", mask=~torch.eye(10, dtype=torch.bool)
        )
        (grad,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(fast, (loss.detach(), grad), rtol=1e-11, atol=1e-11)


# --------------------------------------------------------------------------------------------------
# Derivatives
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "normalisation"), KINDS)
def test_gradcheck(form, normalisation):
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 4, dtype=DOUBLE, requires_grad=True)
    target = torch.rand(2, 4, 4) < 0.4
    target[1] = False
    mask = ~torch.eye(4, dtype=torch.bool)

    def loss(x):
        return affinity_mass_loss(x, target, form=form, normalisation=normalisation, mask=mask)

    assert gradcheck(loss, (logits,))
    assert gradgradcheck(loss, (logits,))


def test_gradcheck_of_the_mass_and_its_logarithm():
    torch.manual_seed(0)
    logits = torch.randn(3, 3, dtype=DOUBLE, requires_grad=True)
    target = torch.eye(3, dtype=torch.bool)
    for function in (affinity_mass, log_affinity_mass):
        assert gradcheck(lambda x, f=function: f(x, target), (logits,))
        assert gradgradcheck(lambda x, f=function: f(x, target), (logits,))


@pytest.mark.parametrize("tile", [(512, 1024), (2, 3)])
@pytest.mark.parametrize("form", FORMS)
def test_batch_gradcheck(form, tile, monkeypatch):
    monkeypatch.setattr(module, "_TILE_CPU", tile)
    torch.manual_seed(0)
    features = torch.randn(6, 3, dtype=DOUBLE, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    assert gradcheck(lambda x: batch_affinity_loss(x, labels, form=form), (features,))


def test_batch_loss_twice_through_autograd():
    torch.manual_seed(0)
    features = torch.randn(5, 2, dtype=DOUBLE, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 1, 1])
    loss = batch_affinity_loss(features, labels)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, features, create_graph=True)
    assert gradgradcheck(lambda x: batch_affinity_loss(x, labels, backend="reference"), (features,))


def test_gradient_of_the_mass_is_the_derived_one():
    torch.manual_seed(0)
    logits = torch.randn(5, 5, dtype=DOUBLE)
    target = torch.rand(5, 5) < 0.3
    mass, grad = value_and_grad(affinity_mass, logits, target)
    weights = logits.flatten().softmax(0).view(5, 5)
    torch.testing.assert_close(grad, weights * (target.double() - mass))
    assert abs(grad.sum()) < 1e-15


def test_slope_in_the_mass_logit_is_the_briefs_table():
    """One target and one other entry: the mass logit is their difference."""
    s = torch.linspace(-9, 9, 37, dtype=DOUBLE)
    logits = torch.zeros(37, 2, 2, dtype=DOUBLE)
    logits[:, 0, 0] = s
    target = torch.zeros(37, 2, 2, dtype=torch.bool)
    target[:, 0, 0] = True
    mask = torch.tensor([[True, True], [False, False]])
    m, x, gamma = s.sigmoid(), (-s).sigmoid(), 2.0
    slopes = {
        "l2": -2 * m * x**2,
        "smooth_l1": torch.where(x < 0.5, -2 * m * x**2, -m * x),
        "log": -x,
        "focal": x**gamma * (gamma * m * m.log() - x),
    }
    for form, slope in slopes.items():
        _, grad = value_and_grad(
            affinity_mass_loss, logits, target, form=form, gamma=gamma, mask=mask, reduction="sum"
        )
        if form == "smooth_l1":  # the form itself jumps nowhere, but its slope does, at M = 1/2
            keep = x != 0.5
            torch.testing.assert_close(grad[keep, 0, 0], slope[keep])
            continue
        torch.testing.assert_close(grad[:, 0, 0], slope, rtol=1e-10, atol=1e-14)


def test_batch_gradient_is_the_signed_laplacian():
    torch.manual_seed(0)
    features = torch.randn(9, 3, dtype=DOUBLE)
    labels = torch.arange(9) % 3
    logits = (-(torch.cdist(features, features) ** 2) / 2).fill_diagonal_(-torch.inf)
    _, slopes = value_and_grad(affinity_mass_loss, logits, same_class_target(labels), gamma=4.0)
    laplacian = slopes.sum(1).diag() - slopes
    _, grad = value_and_grad(batch_affinity_loss, features, labels)
    torch.testing.assert_close(grad, -2 * laplacian @ features)
    torch.testing.assert_close(grad.sum(0), torch.zeros(3, dtype=DOUBLE), rtol=0, atol=1e-14)


# --------------------------------------------------------------------------------------------------
# Invariances and identities
# --------------------------------------------------------------------------------------------------


def test_a_shift_of_all_logits_changes_nothing_and_of_one_row_only_the_matrix_form():
    torch.manual_seed(0)
    logits = torch.randn(6, 6, dtype=DOUBLE)
    target = torch.rand(6, 6) < 0.3
    row = torch.zeros(6, 1, dtype=DOUBLE)
    row[2] = 3
    for form in MASS_FORMS:
        for normalisation in ("matrix", "row"):
            options = {"form": form, "normalisation": normalisation}
            loss = affinity_mass_loss(logits, target, **options)
            torch.testing.assert_close(affinity_mass_loss(logits + 7, target, **options), loss)
            moved = affinity_mass_loss(logits + row, target, **options)
            assert torch.allclose(moved, loss) == (normalisation == "row")


def test_matrix_mass_is_the_row_share_average_and_jensen_bounds_it():
    torch.manual_seed(0)
    logits = torch.randn(4, 7, 7, dtype=DOUBLE)
    target = torch.rand(4, 7, 7) < 0.3
    target[..., 0] = True
    share = logits.logsumexp(-1).softmax(-1)
    rows = affinity_mass(logits, target, normalisation="row")
    mass = affinity_mass(logits, target)
    torch.testing.assert_close(mass, (share * rows).sum(-1))
    assert (-mass.log() <= -(share * rows.log()).sum(-1)).all()


@pytest.mark.parametrize("tile", [(512, 1024), (4, 5)])
def test_batch_loss_ignores_order_label_names_translation_and_rotation(tile, monkeypatch):
    monkeypatch.setattr(module, "_TILE_CPU", tile)
    torch.manual_seed(0)
    features = torch.randn(17, 4, dtype=DOUBLE)
    labels = torch.randint(0, 4, (17,))
    order = torch.randperm(17)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=DOUBLE)).Q
    for form in FORMS:
        loss, grad = value_and_grad(batch_affinity_loss, features, labels, form=form)
        moved, moved_grad = value_and_grad(
            batch_affinity_loss,
            (features @ rotation + 50)[order],
            90 - 7 * labels[order],
            form=form,
        )
        torch.testing.assert_close(moved, loss, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(moved_grad, (grad @ rotation)[order], rtol=1e-9, atol=1e-12)


def test_uniform_weights():
    """Equal logits: the mass is |S| / N^2; equal features give the brief's starting masses."""
    n, classes = 120, 10
    target = same_class_target(torch.arange(n) % classes)
    logits = torch.zeros(n, n, dtype=DOUBLE)
    mass = affinity_mass(logits, target)
    assert mass.item() == pytest.approx(0.1)
    off = affinity_mass(logits, target, mask=~torch.eye(n, dtype=torch.bool))
    assert off.item() == pytest.approx((n / classes - 1) / (n - 1))


# --------------------------------------------------------------------------------------------------
# Pitfalls
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("s", [-500.0, -200.0, -50.0, 0.0, 50.0, 200.0, 500.0])
def test_finite_at_any_mass_logit(s, gamma, dtype):
    logits = torch.tensor([[s, 0.0], [-torch.inf, -torch.inf]], dtype=dtype)
    target = torch.tensor([[True, False], [False, False]])
    for form in FORMS:
        loss, grad = value_and_grad(affinity_mass_loss, logits, target, form=form, gamma=gamma)
        assert loss.isfinite()
        assert grad.isfinite().all()
    loss, grad = value_and_grad(affinity_mass_loss, logits, target, gamma=gamma)
    if s <= -200:
        assert loss.item() == pytest.approx(-s)
        assert grad[0, 0].item() == pytest.approx(-1)
        assert log_affinity_mass(logits, target).item() == pytest.approx(s)
    if s >= 200:
        assert loss.item() == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize(
    ("wanted", "other"),
    [
        (0.0, 0.0),
        (0.0, 40.0),
        (50.0, 0.0),
        (0.0, 1e4),
        (0.0, 1e10),
        (-3e38, 0.0),
        (0.0, 3e38),
        (3e38, -3e38),
    ],
)
@pytest.mark.parametrize("normalisation", ["matrix", "row"])
def test_float32_is_float64_at_any_finite_logits(wanted, other, normalisation):
    """Near each other, targets and others share their exponentials; far from each other they cannot."""
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(3, 5, 5, generator=generator) < 0.4
    target[0], target[1, 2] = False, True  # a graph without targets, a row without others
    noise = torch.randn(3, 5, 5, generator=generator)
    logits = torch.where(target, wanted, other) + noise
    logits[2, 3] = -torch.inf
    found = []
    for dtype in (torch.float32, torch.float64):
        x = logits.to(dtype).requires_grad_()
        losses = affinity_mass_loss(
            x, target, form="log", normalisation=normalisation, reduction="none"
        )
        (gradient,) = torch.autograd.grad(losses.sum(), x)
        found.append((losses.detach().double(), gradient.double()))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_the_printed_form_fails_where_the_mass_logit_does_not():
    """What the fast backend is for: in float32 the printed equations give inf and NaN."""
    logits = torch.tensor([[-200.0, 0.0], [0.0, 0.0]])
    target = torch.tensor([[True, False], [False, False]])
    loss, grad = value_and_grad(affinity_mass_loss, logits, target, backend="reference")
    assert loss == math.inf
    assert grad.isnan().any()
    _, grad = value_and_grad(affinity_mass_loss, -logits, target, gamma=0.5, backend="reference")
    assert not grad.isfinite().all()
    loss, grad = value_and_grad(affinity_mass_loss, -logits, target, gamma=0.5)
    assert loss.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("form", "normalisation"), KINDS)
def test_graphs_and_rows_without_a_target_count_for_nothing(form, normalisation, backend):
    torch.manual_seed(0)
    logits = torch.randn(4, 3, 3, dtype=DOUBLE)
    logits[2] = -torch.inf  # a graph of padding
    target = torch.zeros(4, 3, 3, dtype=torch.bool)
    target[0, 1, 2] = target[2, 0, 0] = True
    options = {"form": form, "normalisation": normalisation, "backend": backend}
    loss, grad = value_and_grad(affinity_mass_loss, logits, target, **options)
    assert loss > 0
    assert grad.isfinite().all()
    assert_zero(torch.zeros(()), grad[1:])
    torch.testing.assert_close(loss, affinity_mass_loss(logits[0], target[0], **options))
    per_graph = affinity_mass_loss(logits, target, **options, reduction="none")
    assert per_graph.shape == ((4,) if normalisation == "matrix" else (4, 3))
    torch.testing.assert_close(per_graph.sum(), loss)
    empty = torch.zeros_like(target)
    assert_zero(*value_and_grad(affinity_mass_loss, logits, empty, **options))
    assert (log_affinity_mass(logits, empty, normalisation=normalisation) == -torch.inf).all()
    assert (affinity_mass(logits, empty, normalisation=normalisation) == 0).all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("normalisation", ["matrix", "row"])
def test_all_entries_targets(normalisation, backend):
    logits = torch.randn(3, 3, dtype=DOUBLE)
    target = torch.ones(3, 3, dtype=torch.bool)
    mass, grad = value_and_grad(affinity_mass, logits, target, normalisation=normalisation)
    assert torch.equal(mass, torch.ones_like(mass))
    assert torch.equal(grad, torch.zeros_like(grad))
    assert (log_affinity_mass(logits, target, normalisation=normalisation) == 0).all()
    for form in MASS_FORMS:
        loss, grad = value_and_grad(
            affinity_mass_loss,
            logits,
            target,
            form=form,
            gamma=1.0,
            normalisation=normalisation,
            backend=backend,
        )
        # The printed softmax may sum to 1 - eps; the mass logit says exactly 1.
        tolerance = 0 if backend == "auto" else 1e-15
        assert loss.abs() <= tolerance
        assert grad.abs().max() <= 1e-15


def test_an_entry_of_minus_infinity_is_a_masked_one():
    torch.manual_seed(0)
    logits = torch.randn(5, 5, dtype=DOUBLE)
    target = torch.rand(5, 5) < 0.4
    mask = torch.rand(5, 5) < 0.6
    for form, backend in product(FORMS, ("auto", "reference")):
        options = {"form": form, "backend": backend}
        masked = value_and_grad(affinity_mass_loss, logits, target, mask=mask, **options)
        filled = value_and_grad(
            affinity_mass_loss, logits.masked_fill(~mask, -torch.inf), target, **options
        )
        torch.testing.assert_close(masked, filled)
        assert (filled[1][~mask] == 0).all()


def test_no_entity_at_all():
    empty = torch.zeros(0, 0)
    target = torch.zeros(0, 0, dtype=torch.bool)
    for form in FORMS:
        assert affinity_mass_loss(empty, target, form=form) == 0
        for backend in ("auto", "reference"):
            loss, grad = value_and_grad(
                batch_affinity_loss,
                torch.zeros(0, 3),
                torch.zeros(0, dtype=torch.long),
                form=form,
                backend=backend,
            )
            assert loss == 0
            assert grad.shape == (0, 3)


@pytest.mark.parametrize("tile", [(512, 1024), (2, 2)])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_batches_without_contrast_give_zero(form, backend, tile, monkeypatch):
    monkeypatch.setattr(module, "_TILE_CPU", tile)
    options = {"form": form, "backend": backend}
    torch.manual_seed(0)
    features = torch.randn(5, 2)
    one = torch.zeros(5, dtype=torch.long)
    apart = torch.arange(5)
    # N = 1; no positive pair.
    assert_zero(*value_and_grad(batch_affinity_loss, features[:1], one[:1], **options))
    assert_zero(*value_and_grad(batch_affinity_loss, features, apart, **options))
    # One class: the mass is 1. (The cross-entropy has no mass, and still pulls.)
    loss, grad = value_and_grad(batch_affinity_loss, features, one, **options, gamma=1.0)
    if form == "bce":
        assert loss > 20 * math.log(2)
    else:
        torch.testing.assert_close(loss, torch.tensor(0.0), rtol=0, atol=1e-6)
        torch.testing.assert_close(grad, torch.zeros(5, 2), rtol=0, atol=1e-6)
    if backend == "auto" and form != "bce":
        assert_zero(loss, grad)


@pytest.mark.parametrize("tile", [(512, 1024), (8, 8)])
def test_the_diagonal_trap(tile, monkeypatch):
    """Random labels, inflated features: only the diagonal turns that into a mass of 1."""
    monkeypatch.setattr(module, "_TILE_CPU", tile)
    torch.manual_seed(0)
    features = 100 * torch.randn(32, 8, dtype=DOUBLE)
    labels = torch.arange(32) % 4
    nearest = torch.cdist(features, features).fill_diagonal_(torch.inf).argmin()
    a, b = divmod(nearest.item(), 32)
    assert labels[a] != labels[b]  # what makes the example: the closest pair is not a target
    options = {"form": "log"}
    assert batch_affinity_loss(features, labels, **options, include_self=True) < 1e-6
    assert batch_affinity_loss(features, labels, **options) > 1


def test_equal_mass_can_have_different_recall():
    one = torch.full((3, 3), -20.0)
    one[0, 1] = 10.0
    both = one.clone()
    both[1, 0] = 10.0
    target = torch.zeros(3, 3, dtype=torch.bool)
    target[0, 1] = target[1, 0] = True
    assert affinity_mass(one, target).item() == pytest.approx(affinity_mass(both, target).item())
    one[1, 0] = -30.0
    pairs = torch.tensor([[0, 1], [1, 0]])
    assign = torch.eye(3, dtype=torch.bool)
    assert pair_recall_at_k(one, pairs, assign, [2]).item() == 0.5
    assert pair_recall_at_k(both, pairs, assign, [2]).item() == 1.0


def test_squared_distances():
    torch.manual_seed(0)
    features = torch.randn(2, 7, 3, dtype=DOUBLE)
    expected = (features[:, :, None] - features[:, None]).square().sum(-1)
    torch.testing.assert_close(pairwise_sq_dist(features), expected)
    assert gradcheck(lambda x: pairwise_sq_dist(x), (features.clone().requires_grad_(),))
    # Equal rows, far from the origin: not below 0, and the diagonal is exactly 0.
    rows = torch.full((5, 64), 1e3) + 0.1 * torch.randn(1, 64)
    distance = pairwise_sq_dist(rows)
    assert (distance >= 0).all()
    assert (distance.diagonal() == 0).all()
    torch.testing.assert_close(distance, torch.zeros(5, 5), rtol=0, atol=1e-6)
    # Squared norms of 90,000 would overflow float16.
    half = torch.tensor([[300.0], [0.0]], dtype=torch.float16)
    assert pairwise_sq_dist(half).dtype == torch.float32
    assert pairwise_sq_dist(half)[0, 1] == 90000
    assert pairwise_sq_dist(torch.zeros(0, 3)).shape == (0, 0)


# --------------------------------------------------------------------------------------------------
# Precision, autocast, compile
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input(dtype):
    torch.manual_seed(0)
    logits = torch.randn(6, 6).to(dtype)
    target = torch.rand(6, 6) < 0.3
    features, labels = (10 * torch.randn(20, 8)).to(dtype), torch.arange(20) % 3
    for form in FORMS:
        for function, x, y in (
            (affinity_mass_loss, logits, target),
            (batch_affinity_loss, features, labels),
        ):
            loss, grad = value_and_grad(function, x, y, form=form)
            expected, expected_grad = value_and_grad(function, x.double(), y, form=form)
            assert loss.dtype == torch.float32
            assert grad.dtype == dtype
            torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4)
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(grad.double(), expected_grad, rtol=4 * eps, atol=1e-4)


@pytest.mark.parametrize("tile", [(512, 1024), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_reaches_the_model_but_not_the_loss(dtype, tile, monkeypatch):
    monkeypatch.setattr(module, "_TILE_CPU", tile)
    torch.manual_seed(0)
    x, labels = torch.randn(20, 6), torch.arange(20) % 3
    weight = torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        features = F.linear(x, weight)
        assert features.dtype == dtype
        loss = batch_affinity_loss(features, labels)
        distance = pairwise_sq_dist(features)
        matrix = affinity_mass_loss(-distance / 2, same_class_target(labels))
    wide = features.detach().float().requires_grad_()
    torch.testing.assert_close(loss, batch_affinity_loss(wide, labels), rtol=0, atol=0)
    torch.testing.assert_close(distance, pairwise_sq_dist(wide), rtol=0, atol=0)
    (loss + matrix).backward()
    assert weight.grad.dtype == torch.float32
    assert weight.grad.isfinite().all()


def test_compile():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 5)
    target = torch.rand(2, 5, 5) < 0.4
    mask = ~torch.eye(5, dtype=torch.bool)

    def dense(x):
        return affinity_mass_loss(x, target, mask=mask) + affinity_mass_loss(
            x, target, form="log", normalisation="row"
        )

    compiled = torch.compile(dense, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_grad(compiled, logits), value_and_grad(dense, logits))
    features, labels = torch.randn(9, 3), torch.arange(9) % 2

    def batch(x):
        return 2 * batch_affinity_loss(x.tanh(), labels)

    compiled = torch.compile(batch, backend="aot_eager")
    torch.testing.assert_close(value_and_grad(compiled, features), value_and_grad(batch, features))


# --------------------------------------------------------------------------------------------------
# Peers
# --------------------------------------------------------------------------------------------------


def test_single_entry_form_is_pytorchs_cross_entropy():
    torch.manual_seed(0)
    logits = 3 * torch.randn(4, 4, dtype=DOUBLE)
    target = torch.rand(4, 4) < 0.5
    ours = affinity_mass_loss(logits, target, form="bce")
    peer = F.binary_cross_entropy_with_logits(logits, target.double(), reduction="sum")
    torch.testing.assert_close(ours, peer)


def test_smooth_l1_is_pytorchs_with_beta_one_half():
    torch.manual_seed(0)
    logits = 3 * torch.randn(50, 3, 3, dtype=DOUBLE)
    target = torch.rand(50, 3, 3) < 0.5
    target[:, 0, 0] = True
    x = 1 - affinity_mass(logits, target)
    peer = F.smooth_l1_loss(x, torch.zeros_like(x), beta=0.5, reduction="none")
    ours = affinity_mass_loss(logits, target, form="smooth_l1", reduction="none")
    torch.testing.assert_close(ours, peer)


def test_focal_form_is_binary_focal_loss_on_the_mass_logit():
    """torchvision's sigmoid_focal_loss for target 1 without alpha, from PyTorch's own functions."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(50, 3, 3, dtype=DOUBLE)
    target = torch.rand(50, 3, 3) < 0.5
    target[:, 0, 0], target[:, 0, 1] = True, False
    inside = logits.masked_fill(~target, -torch.inf).logsumexp((-2, -1))
    outside = logits.masked_fill(target, -torch.inf).logsumexp((-2, -1))
    s = inside - outside
    cross_entropy = F.binary_cross_entropy_with_logits(s, torch.ones_like(s), reduction="none")
    for gamma in (0.0, 2.0, 5.0):
        peer = cross_entropy * (1 - s.sigmoid()) ** gamma
        ours = affinity_mass_loss(logits, target, gamma=gamma, reduction="none")
        torch.testing.assert_close(ours, peer)


def test_row_mass_is_scikit_learns_nca_objective():
    """Neighbourhood components analysis maximises the sum of row masses with the full square."""
    from sklearn.neighbors import NeighborhoodComponentsAnalysis

    torch.manual_seed(0)
    x = torch.randn(25, 4, dtype=DOUBLE)
    labels = torch.arange(25) % 3
    transformation = torch.randn(2, 4, dtype=DOUBLE)
    target = same_class_target(labels)
    nca = NeighborhoodComponentsAnalysis()
    nca.n_iter_ = 0
    peer, peer_grad = nca._loss_grad_lbfgs(
        transformation.numpy().ravel(), x.numpy(), target.numpy(), -1.0
    )
    own = torch.eye(25, dtype=torch.bool)
    leaf = transformation.requires_grad_()
    mass = affinity_mass(
        -pairwise_sq_dist(x @ leaf.T), target, mask=~own, normalisation="row"
    ).sum()
    (grad,) = torch.autograd.grad(-mass, leaf)
    assert mass.item() == pytest.approx(-peer)
    torch.testing.assert_close(grad.flatten(), torch.from_numpy(peer_grad).flatten())


def test_row_log_form_is_pytorch_metric_learnings_nca_loss():
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.losses import NCALoss

    torch.manual_seed(0)
    features = torch.randn(30, 4, dtype=DOUBLE)
    labels = torch.arange(30) % 4
    labels[0] = 9  # a class of one: neither counts its row
    # Its logit is -softmax_scale * distance^2, ours -distance^2 / 2; its mean is over rows with a
    # positive, as ours.
    peer = NCALoss(0.5, distance=LpDistance(power=2, normalize_embeddings=False))
    own = torch.eye(30, dtype=torch.bool)

    def ours(x):
        logits = -pairwise_sq_dist(x) / 2
        target = same_class_target(labels)
        return affinity_mass_loss(logits, target, form="log", mask=~own, normalisation="row")

    torch.testing.assert_close(
        value_and_grad(ours, features), value_and_grad(peer, features, labels), rtol=1e-6, atol=1e-8
    )


def test_the_benchmarked_peer_computes_the_same_loss():
    peers = importlib.import_module("benchmarks.affinity.bench_affinity_mass")
    torch.manual_seed(0)
    features = 0.3 * torch.randn(40, 8, dtype=DOUBLE)
    labels = torch.randint(0, 5, (40,))
    torch.testing.assert_close(
        value_and_grad(peers.cdist_softmax_loss, features, labels),
        value_and_grad(batch_affinity_loss, features, labels),
    )
    for case in peers.cases("cpu"):
        case.setup(case.implementation, case.small, "cpu")()


# --------------------------------------------------------------------------------------------------
# Targets and recall
# --------------------------------------------------------------------------------------------------


def test_same_class_target():
    labels = torch.tensor([3, -1, 3])
    assert same_class_target(labels).tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert same_class_target(labels[:0]).shape == (0, 0)


def test_relation_target_by_enumeration():
    """Against the three conditions of the paper, pair by pair, with an IoU of our own."""
    generator = torch.Generator().manual_seed(0)
    corner = 20 * torch.rand(5, 2, generator=generator)
    gt = torch.cat([corner, corner + 8 + 5 * torch.rand(5, 2, generator=generator)], 1)
    boxes = gt.repeat(5, 1) + 1.5 * torch.randn(25, 4, generator=generator)
    labels = torch.tensor([0, 1, 0, 2, 1])
    rule = torch.rand(5, 5, generator=generator) < 0.4
    rule.fill_diagonal_(False)

    def iou(a, b):
        width = min(a[2], b[2]) - max(a[0], b[0])
        height = min(a[3], b[3]) - max(a[1], b[1])
        overlap = max(width, 0) * max(height, 0)
        area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
        return overlap / (area - overlap)

    related = {
        "different_category": lambda i, j: labels[i] != labels[j],
        "different_instance": lambda i, j: i != j,
        rule: lambda i, j: rule[i, j],
    }
    on = [[iou(b, g) > 0.5 for g in gt.tolist()] for b in boxes.tolist()]
    for chosen, relates in related.items():
        expected = [
            [any(a[i] and b[j] and relates(i, j) for i in range(5) for j in range(5)) for b in on]
            for a in on
        ]
        target = relation_target(boxes, gt, labels, rule=chosen)
        assert target.tolist() == expected
        assert 0 < target.sum() < target.numel()


def test_relation_target_edges():
    gt = torch.tensor([[0.0, 0, 10, 10], [1.0, 0, 11, 10]])
    labels = torch.tensor([0, 1])
    between = torch.tensor([[0.5, 0, 10.5, 10]])
    assert relation_target(between, gt, labels).item()  # one box on two objects
    assert not relation_target(between, gt, torch.tensor([1, 1])).item()
    assert relation_target(between, gt[:0], labels[:0]).tolist() == [[False]]
    assert relation_target(between[:0], gt, labels).shape == (0, 0)
    # Strictly above: these two boxes overlap by exactly one half.
    half = torch.tensor([[0.0, 0, 10, 5], [20.0, 0, 30, 10]])
    objects = torch.tensor([[0.0, 0, 10, 10], [20.0, 0, 30, 10]])
    assert not relation_target(half, objects, labels).any()
    assert relation_target(half, objects, labels, iou_threshold=0.49).any()
    flat = torch.zeros(1, 4)  # no area: on nothing, and no NaN gets through
    assert not relation_target(flat, torch.cat([flat, objects]), torch.tensor([0, 1, 2])).any()


def test_recall_by_walking_down_the_list():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 12, generator=generator).round(decimals=1)  # with ties
    assign = torch.rand(12, 4, generator=generator) < 0.25
    pairs = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 1], [0, 1]])
    mask = torch.rand(12, 12, generator=generator) < 0.5
    ks = [1, 5, 20, 60, 500]
    for keep in (None, mask):
        cells = [(a, b) for a in range(12) for b in range(12) if keep is None or keep[a, b]]
        cells.sort(key=lambda cell: -logits[cell].item())  # stable: row-major among equals
        expected = [
            len(
                {
                    (i, j)
                    for a, b in cells[:k]
                    for i, j in pairs.tolist()
                    if assign[a, i] and assign[b, j]
                }
            )
            / 4
            for k in ks
        ]
        recall = pair_recall_at_k(logits, pairs, assign, ks, mask=keep)
        assert recall.tolist() == pytest.approx(expected)
        assert 0 < expected[2] < 1
        if keep is not None:
            filled = logits.masked_fill(~keep, -torch.inf)
            assert torch.equal(pair_recall_at_k(filled, pairs, assign, ks), recall)


def test_recall_follows_the_matrix_and_not_the_row_softmax():
    logits = torch.tensor([[5.0, 4.0], [0.0, -3.0]])
    pairs, assign = torch.tensor([[0, 1]]), torch.eye(2, dtype=torch.bool)
    assert pair_recall_at_k(logits, pairs, assign, [2]).item() == 1
    assert pair_recall_at_k(logits.flatten().softmax(0).view(2, 2), pairs, assign, [2]).item() == 1
    assert pair_recall_at_k(logits.softmax(-1), pairs, assign, [2]).item() == 0
    nobody = torch.zeros(2, 2, dtype=torch.bool)
    assert pair_recall_at_k(logits, pairs, nobody, [100]).item() == 0


# --------------------------------------------------------------------------------------------------
# The criterion, and bad input
# --------------------------------------------------------------------------------------------------


def test_criterion_is_the_function():
    torch.manual_seed(0)
    features, labels = torch.randn(8, 3), torch.arange(8) % 3
    for form, include_self in product(FORMS, (False, True)):
        criterion = BatchAffinityLoss(gamma=3.0, form=form, include_self=include_self)
        expected = batch_affinity_loss(
            features, labels, gamma=3.0, form=form, include_self=include_self
        )
        assert torch.equal(criterion(features, labels), expected)
    assert not list(BatchAffinityLoss().parameters())
    with pytest.raises(ValueError, match="form"):
        BatchAffinityLoss(form="huber")


NAN = torch.tensor([[0.0, torch.nan], [0.0, 0.0]])
INF = torch.tensor([[0.0, torch.inf], [0.0, 0.0]])
LOGITS, TARGET = torch.zeros(2, 2), torch.eye(2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "logits", {"logits": [[0.0]]}),
        (TypeError, "logits", {"logits": torch.zeros(2, 2, dtype=torch.long)}),
        (ValueError, "logits", {"logits": torch.zeros(2, 3)}),
        (ValueError, "logits", {"logits": torch.zeros(4)}),
        (ValueError, "logits", {"logits": NAN}),
        (ValueError, "logits", {"logits": INF}),
        (TypeError, "target", {"target": torch.eye(2)}),
        (TypeError, "target", {"target": None}),
        (ValueError, "target", {"target": torch.ones(3, 3, dtype=torch.bool)}),
        (ValueError, "target", {"target": torch.ones(1, 2, 2, dtype=torch.bool)}),
        (ValueError, "target", {"target": TARGET.to("meta")}),
        (TypeError, "mask", {"mask": torch.ones(2, 2)}),
        (ValueError, "mask", {"mask": torch.ones(3, 3, dtype=torch.bool)}),
        (ValueError, "mask", {"mask": torch.zeros(2, 2, dtype=torch.bool)}),
        (ValueError, "normalisation", {"normalisation": "column"}),
        (ValueError, "form", {"form": "huber"}),
        (ValueError, "form", {"form": "bce", "normalisation": "row"}),
        (ValueError, "gamma", {"gamma": -0.1}),
        (ValueError, "gamma", {"gamma": math.nan}),
        (TypeError, "gamma", {"gamma": "2"}),
        (ValueError, "reduction", {"reduction": "max"}),
        (ValueError, "backend", {"backend": "fast"}),
    ],
)
def test_loss_rejects(error, name, arguments):
    given_ = {"logits": LOGITS, "target": TARGET} | arguments
    with pytest.raises(error, match=f"^{name}: expected"):
        affinity_mass_loss(**given_)
    if given_.keys() <= {"logits", "target", "mask", "normalisation"}:
        for function in (affinity_mass, log_affinity_mass):
            with pytest.raises(error, match=f"^{name}: expected"):
                function(**given_)


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "features", {"features": [[0.0]]}),
        (TypeError, "features", {"features": torch.zeros(2, 2, dtype=torch.long)}),
        (ValueError, "features", {"features": torch.zeros(2)}),
        (ValueError, "features", {"features": torch.zeros(1, 2, 2)}),
        (ValueError, "features", {"features": NAN}),
        (ValueError, "features", {"features": -INF}),
        (ValueError, "features", {"features": torch.tensor([[1e25], [-1e25]])}),
        (TypeError, "labels", {"labels": torch.zeros(2)}),
        (TypeError, "labels", {"labels": torch.zeros(2, dtype=torch.bool)}),
        (TypeError, "labels", {"labels": [0, 1]}),
        (ValueError, "labels", {"labels": torch.zeros(3, dtype=torch.long)}),
        (ValueError, "labels", {"labels": torch.zeros(2, 1, dtype=torch.long)}),
        (ValueError, "labels", {"labels": torch.zeros(2, dtype=torch.long, device="meta")}),
        (ValueError, "gamma", {"gamma": -1}),
        (ValueError, "form", {"form": "mse"}),
        (TypeError, "include_self", {"include_self": 1}),
        (ValueError, "backend", {"backend": "triton"}),
        (TypeError, "group", {"group": 1}),
    ],
)
def test_batch_loss_rejects(error, name, arguments):
    given_ = {"features": LOGITS, "labels": torch.tensor([0, 1])} | arguments
    with pytest.raises(error, match=f"^{name}: expected"):
        batch_affinity_loss(**given_)


BOXES = torch.tensor([[0.0, 0, 1, 1], [2.0, 2, 3, 3]])


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "boxes", {"boxes": BOXES.long()}),
        (ValueError, "boxes", {"boxes": BOXES[:, :3]}),
        (ValueError, "boxes", {"boxes": BOXES.flip(1)}),
        (ValueError, "boxes", {"boxes": BOXES * torch.nan}),
        (ValueError, "gt_boxes", {"gt_boxes": BOXES[0]}),
        (ValueError, "gt_labels", {"gt_labels": torch.tensor([1])}),
        (TypeError, "gt_labels", {"gt_labels": torch.tensor([1.0, 2.0])}),
        (ValueError, "iou_threshold", {"iou_threshold": 1.0}),
        (ValueError, "iou_threshold", {"iou_threshold": -0.5}),
        (ValueError, "rule", {"rule": "same"}),
        (TypeError, "rule", {"rule": 3}),
        (TypeError, "rule", {"rule": torch.zeros(2, 2)}),
        (ValueError, "rule", {"rule": torch.zeros(3, 3, dtype=torch.bool)}),
        (ValueError, "rule", {"rule": torch.eye(2, dtype=torch.bool)}),
    ],
)
def test_relation_target_rejects(error, name, arguments):
    given_ = {"boxes": BOXES, "gt_boxes": BOXES, "gt_labels": torch.tensor([0, 1])} | arguments
    with pytest.raises(error, match=f"^{name}: expected"):
        relation_target(
            given_.pop("boxes"), given_.pop("gt_boxes"), given_.pop("gt_labels"), **given_
        )


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (ValueError, "logits", {"logits": torch.zeros(2, 3)}),
        (ValueError, "logits", {"logits": NAN}),
        (ValueError, "logits", {"logits": torch.zeros(1, 2, 2)}),
        (TypeError, "gt_pairs", {"gt_pairs": torch.zeros(1, 2)}),
        (ValueError, "gt_pairs", {"gt_pairs": torch.zeros(1, 3, dtype=torch.long)}),
        (ValueError, "gt_pairs", {"gt_pairs": torch.zeros(0, 2, dtype=torch.long)}),
        (ValueError, "gt_pairs", {"gt_pairs": torch.tensor([[0, 2]])}),
        (TypeError, "assign", {"assign": torch.eye(2)}),
        (ValueError, "assign", {"assign": torch.ones(3, 2, dtype=torch.bool)}),
        (TypeError, "ks", {"ks": 5}),
        (TypeError, "ks", {"ks": [1.5]}),
        (ValueError, "ks", {"ks": [0]}),
        (ValueError, "mask", {"mask": torch.zeros(2, 2, dtype=torch.bool)}),
    ],
)
def test_recall_rejects(error, name, arguments):
    given_ = {
        "logits": LOGITS,
        "gt_pairs": torch.tensor([[0, 1]]),
        "assign": TARGET,
        "ks": [1],
    } | arguments
    with pytest.raises(error, match=f"^{name}: expected"):
        pair_recall_at_k(**given_)


def test_other_functions_reject():
    with pytest.raises(ValueError, match=r"^labels: expected"):
        same_class_target(torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(TypeError, match=r"^labels: expected"):
        same_class_target(torch.zeros(2))
    with pytest.raises(ValueError, match=r"^features: expected"):
        pairwise_sq_dist(torch.zeros(3))
    with pytest.raises(ValueError, match=r"^features: expected"):
        pairwise_sq_dist(NAN)
    with pytest.raises(TypeError, match=r"^features: expected"):
        pairwise_sq_dist(torch.zeros(3, 2, dtype=torch.long))


# --------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------

LARGE_BATCH = """
import torch
from affnb.affinity import batch_affinity_loss

def peak():  # bytes; the high-water mark of this process's resident memory
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

torch.set_num_threads(1)
torch.manual_seed(0)
features = (0.1 * torch.randn(20_000, 128)).requires_grad_()
labels = torch.randint(0, 100, (20_000,))
batch_affinity_loss(features[:8].detach().requires_grad_(), labels[:8]).backward()
before = peak()
loss = batch_affinity_loss(features, labels)
loss.backward()
assert loss.isfinite() and features.grad.isfinite().all() and features.grad.any()
print(before, peak())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_twenty_thousand_points_in_far_less_memory_than_one_matrix():
    run = subprocess.run(
        [sys.executable, "-c", LARGE_BATCH], capture_output=True, text=True, check=True
    )
    before, peak = map(int, run.stdout.split())
    assert peak < 1e9  # the whole process, PyTorch included
    assert peak - before < 0.15 * (4 * 20_000**2)  # 1.6 GB would be one float32 matrix

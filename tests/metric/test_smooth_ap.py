"""Smooth-AP, exact average precision, the criterion over processes, and the batch sampler."""

import importlib
import itertools
import math
import subprocess
import sys
import types
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.parallel import DistributedDataParallel

from affnb.claims import VERDICTS
from affnb.metric import (
    PKSampler,
    SmoothAPLoss,
    average_precision,
    recall_at_k,
    smooth_ap_loss,
    smooth_average_precision,
)
from tests.chapter_cells import fake_modules, run_cells
from tests.processes import message_of, rows_of, run

module = importlib.import_module("affnb.metric.smooth_ap")

DOUBLE = torch.float64
SIZES = st.sampled_from([1, 2, 3, 5, 7, 11, 13])
# The paper's example: relevant items at ranks 1, 3, 4 and 8 of eight.
EXAMPLE = torch.tensor([[1, 0, 1, 1, 0, 0, 0, 1]], dtype=torch.bool)


def value_and_grad(function, *tensors, **options):
    """Value and gradients with respect to fresh leaves with the strides of the tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    value = function(*leaves, **options)
    weights = torch.arange(1.0, value.numel() + 1, dtype=value.dtype).view_as(value)
    return value.detach(), torch.autograd.grad((value * weights).sum(), leaves)


def unit(*shape, seed=0, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=1)


@pytest.fixture(params=[1 << 18, 16, 1], ids=["one block", "small blocks", "single rows"])
def block(request, monkeypatch):
    """Every way through the sweep: all at once, many blocks, one relevant item at a time."""
    monkeypatch.setattr(module, "_BLOCK_CPU", request.param)
    monkeypatch.setattr(module, "_QUERIES", 512 if request.param > 16 else 3)


@st.composite
def rows(draw):
    """Scores, relevance and valid in float64; layouts vary, every query has a relevant item."""
    queries, items = draw(st.sampled_from([0, 1, 2, 5, 7])), draw(SIZES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.randn(queries, 2 * items, generator=generator, dtype=DOUBLE)
    scores = scores[:, ::2] if draw(st.booleans()) else scores[:, :items].contiguous()
    if draw(st.booleans()):
        scores = scores.round()  # ties
    density = draw(st.sampled_from([0.0, 0.3, 1.0]))
    relevance = torch.rand(queries, items, generator=generator) < density
    valid = None
    if draw(st.booleans()):
        valid = torch.rand(queries, items, generator=generator) < 0.7
    chosen = torch.randint(items, (queries,), generator=generator)
    for mask in (relevance, valid):
        if mask is not None:
            mask[torch.arange(queries), chosen] = True
    return scores, relevance, valid


@st.composite
def batches(draw):
    """Normalised embeddings (sometimes strided, sometimes with equal rows) and labels."""
    n, d = draw(st.sampled_from([0, 1, 2, 3, 5, 7, 13])), draw(st.sampled_from([1, 2, 5]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = F.normalize(torch.randn(n, d, generator=generator, dtype=DOUBLE), dim=1)
    if n > 1 and draw(st.booleans()):
        x[1] = x[0]
    if draw(st.booleans()):
        x = x.repeat_interleave(2, 1)[:, ::2]
    classes = draw(st.sampled_from([1, 2, 4, 100]))
    return x, torch.randint(-2, classes - 2 or 1, (n,), generator=generator)


# --------------------------------------------------------------------------------------------------
# Fast against reference
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1 << 18, 16, 1])
@settings(max_examples=50, deadline=None)
@given(rows(), st.sampled_from([0.01, 0.3, 10.0]))
def test_smooth_ap_equals_reference(size, drawn, temperature):
    scores, relevance, valid = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_CPU", size)
        fast, slow = (
            value_and_grad(
                lambda x, backend=backend: smooth_average_precision(
                    x, relevance, temperature, valid, backend=backend
                ),
                scores,
            )
            for backend in ("auto", "reference")
        )
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)


@settings(max_examples=80, deadline=None)
@given(rows(), st.sampled_from(["strict", "mid", "sklearn"]))
def test_exact_ap_equals_reference(drawn, ties):
    scores, relevance, valid = drawn
    fast = average_precision(scores, relevance, valid, ties)
    slow = average_precision(scores, relevance, valid, ties, backend="reference")
    torch.testing.assert_close(fast, slow, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("size", [1 << 18, 16, 1])
@settings(max_examples=50, deadline=None)
@given(batches(), st.sampled_from([0.01, 0.3]), st.booleans())
def test_loss_equals_reference(size, batch, temperature, include_self):
    x, labels = batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_CPU", size)
        patch.setattr(module, "_QUERIES", 512 if size > 16 else 2)
        options = {"temperature": temperature, "include_self": include_self}
        fast = value_and_grad(lambda v: smooth_ap_loss(v, labels, **options), x)
        slow = value_and_grad(
            lambda v: smooth_ap_loss(v, labels, **options, backend="reference"), x
        )
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(batches(), batches(), st.sampled_from([0.01, 0.3]))
def test_cross_set_form_equals_reference(queries, gallery, temperature):
    x, labels = queries
    y, gallery_labels = gallery
    y = F.pad(y, (0, max(0, x.shape[1] - y.shape[1])))[:, : x.shape[1]]
    y = F.normalize(y, dim=1)  # cutting columns off leaves some rows shorter, or zero
    found = []
    for backend in ("auto", "reference"):
        criterion = SmoothAPLoss(temperature, backend=backend)
        found.append(
            value_and_grad(lambda a, b, c=criterion: c(a, labels, b, gallery_labels), x, y)
        )
    fast, slow = found
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)


def test_a_batch_of_real_blocks():
    """Large enough for several blocks of queries, with classes of many sizes."""
    x = unit(700, 6)
    labels = torch.randint(0, 60, (700,), generator=torch.Generator().manual_seed(1))
    labels[:80] = 99  # one class with more than one block of relevant items
    pairs = labels[:, None] == labels
    fast = value_and_grad(lambda v: smooth_ap_loss(v, labels), x)
    # The reference would hold 700^3 numbers: take the form for rows of scores.
    slow = value_and_grad(
        lambda v: 1 - smooth_average_precision(v @ v.T, pairs, valid=~torch.eye(700).bool()).mean(),
        x,
    )
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)


def test_gradcheck(block):
    relevance = torch.tensor([[1, 0, 1, 0, 1], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    valid = torch.ones_like(relevance)
    valid[0, 4] = valid[2, 1] = False
    scores = unit(3, 5).requires_grad_()
    assert gradcheck(lambda s: smooth_average_precision(s, relevance, 0.3, valid), scores)
    assert gradgradcheck(
        lambda s: smooth_average_precision(s, relevance, 0.3, valid, backend="reference"), scores
    )
    x, labels = unit(7, 3).requires_grad_(), torch.tensor([0, 1, 0, 2, 1, 0, 3])
    for include_self in (False, True):
        assert gradcheck(
            lambda v, i=include_self: smooth_ap_loss(v, labels, temperature=0.2, include_self=i), x
        )
    y = unit(6, 3, seed=1).requires_grad_()
    bank = torch.tensor([0, 0, 1, 5, 2, 0])
    assert gradcheck(lambda a, b: SmoothAPLoss(0.2)(a, labels, b, bank), (x, y))


def test_a_second_derivative_is_refused_and_not_silently_zero():
    x, labels = unit(7, 3).requires_grad_(), torch.tensor([0, 1, 0, 2, 1, 0, 3])
    loss = smooth_ap_loss(x, labels, temperature=0.2)
    rows_of_scores = smooth_average_precision(x @ x.T, labels[:, None] == labels)
    for value in (loss, rows_of_scores.sum()):
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(value, x, create_graph=True)
    literal = smooth_ap_loss(x, labels, temperature=0.2, backend="reference")
    (grad,) = torch.autograd.grad(literal, x, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), x)[0].any()


# --------------------------------------------------------------------------------------------------
# What the mathematics says
# --------------------------------------------------------------------------------------------------


def ap_of_list(order):
    """AP of a ranked list of 0 and 1, by walking down the list, as a fraction."""
    hits, total = 0, Fraction(0)
    for place, relevant in enumerate(order, 1):
        if relevant:
            hits += 1
            total += Fraction(hits, place)
    return total / hits


@pytest.mark.parametrize("ties", ["strict", "mid", "sklearn"])
def test_exact_ap_by_walking_down_the_list(ties):
    scores = torch.arange(6, 0, -1, dtype=DOUBLE)
    lists = [order for order in itertools.product([0, 1], repeat=6) if any(order)]
    found = average_precision(scores.expand(len(lists), 6), torch.tensor(lists).bool(), ties=ties)
    expected = torch.tensor([float(ap_of_list(order)) for order in lists], dtype=DOUBLE)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    assert ap_of_list(EXAMPLE[0].tolist()) == Fraction(35, 48)


def test_the_papers_example_and_its_swaps():
    scores = torch.arange(8, 0, -1, dtype=DOUBLE)[None]
    base = average_precision(scores, EXAMPLE)
    for places, gain in (((1, 2), 1 / 12), ((6, 7), 1 / 56)):
        swapped = EXAMPLE[0].clone()
        swapped[list(places)] = swapped[list(places[::-1])]
        after = average_precision(scores, swapped[None])
        torch.testing.assert_close((after - base).item(), gain, rtol=1e-12, atol=0)


def test_slopes_are_those_of_the_derivation():
    """d AP / d g_ij = n_i / b_i^2 or -a_i / b_i^2, and g' = g (1 - g) / tau, pair by pair."""
    s = 0.05 * torch.arange(8, 0, -1, dtype=DOUBLE)
    tau, relevant = 0.03, EXAMPLE[0].nonzero().flatten().tolist()
    g = torch.sigmoid((s[None] - s[:, None]) / tau).fill_diagonal_(0)
    expected = torch.zeros(8, dtype=DOUBLE)
    for i in relevant:
        a = 1 + g[i, relevant].sum()
        n = g[i].sum() - g[i, relevant].sum()
        for j in range(8):
            if j != i:
                slope = n if j in relevant else -a
                pull = slope / (a + n) ** 2 / len(relevant) * g[i, j] * (1 - g[i, j]) / tau
                expected[j] += pull
                expected[i] -= pull
    _, (grad,) = value_and_grad(
        smooth_average_precision, s[None], relevance=EXAMPLE, temperature=tau
    )
    torch.testing.assert_close(grad[0], expected, rtol=1e-12, atol=1e-14)


@settings(max_examples=40, deadline=None)
@given(rows(), st.floats(0.1, 10), st.floats(-3, 3), st.integers(0, 1000))
def test_scale_is_inverse_temperature_and_order_and_shift_do_not_matter(drawn, c, shift, seed):
    scores, relevance, valid = drawn
    value, (grad,) = value_and_grad(
        lambda s: smooth_average_precision(s, relevance, 0.2, valid), scores
    )
    same = smooth_average_precision(c * scores + shift, relevance, 0.2 * c, valid)
    torch.testing.assert_close(same, value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grad.sum(1), torch.zeros_like(value), rtol=0, atol=1e-12)
    order = torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(seed))
    shuffled = smooth_average_precision(
        scores[:, order], relevance[:, order], 0.2, None if valid is None else valid[:, order]
    )
    torch.testing.assert_close(shuffled, value, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(rows(), st.floats(0.005, 0.3))
def test_the_limits_of_the_temperature(drawn, temperature):
    scores, relevance, valid = drawn
    keep = torch.ones_like(relevance) if valid is None else valid
    p, m = (relevance & keep).sum(1), keep.sum(1)
    # As the temperature grows every comparison is a half.
    hot = smooth_average_precision(scores, relevance, 1e9, valid)
    torch.testing.assert_close(hot, (p + 1) / (m + 1).to(DOUBLE), rtol=1e-7, atol=0)
    # As it falls, the limit is the exact AP with ties counted as a half.
    cold = smooth_average_precision(scores, relevance, 1e-12, valid)
    torch.testing.assert_close(cold, average_precision(scores, relevance, valid, "mid"))
    # And for distinct scores the error is below (|P| + m - 2) exp(-gap / tau).
    far = torch.arange(scores.shape[1], dtype=DOUBLE)  # invalid items stand apart from all others
    ordered = scores.where(keep, 1e3 + far).sort(1).values
    gap = ordered.diff(dim=1).amin(1) if scores.shape[1] > 1 else torch.ones_like(hot)
    error = smooth_average_precision(scores, relevance, temperature, valid)
    error = (error - average_precision(scores, relevance, valid, "mid")).abs()
    assert (error <= (p + m - 2) * (-gap / temperature).exp() + 1e-12).all()


def test_the_smoothed_form_bounds_nothing():
    perfect = smooth_average_precision(
        torch.tensor([[1.0, 0.9, 0.2, 0.1]]), torch.tensor([[1, 1, 0, 0]]).bool(), 0.3
    )
    assert perfect < 1
    worst = torch.tensor([[0.10, 0.09, 0.11, 0.12]]), torch.tensor([[1, 1, 0, 0]]).bool()
    assert smooth_average_precision(*worst, 0.3) > average_precision(*worst) + 0.1


def test_moving_a_relevant_item_up_never_lowers_ap():
    relevance = torch.tensor([[0, 1, 0, 0, 1, 0]]).bool()
    scores = torch.linspace(0.5, 0.0, 6, dtype=DOUBLE)[None]
    climbing = scores.repeat(40, 1)
    climbing[:, 4] += torch.linspace(0, 0.6, 40, dtype=DOUBLE)
    exact = average_precision(climbing, relevance.expand(40, -1), ties="mid")
    assert (exact.diff() >= -1e-12).all()
    assert exact[-1] > exact[0]
    loss_grad = value_and_grad(
        smooth_average_precision, scores, relevance=relevance, temperature=0.1
    )
    assert loss_grad[1][0][0, 4] > 0
    assert loss_grad[1][0][0, 0] < 0  # the wrong item on top must sink


def test_including_the_query_lifts_every_ap():
    """k/r becomes (k + 1)/(r + 1), and a term 1 is added."""
    x, labels = unit(24, 5), torch.arange(24) % 6
    without, within = (
        smooth_ap_loss(x, labels, include_self=i, temperature=1e-9) for i in (False, True)
    )
    assert within < without
    scores, same = x @ x.T, labels[:, None] == labels
    exact = average_precision(scores.fill_diagonal_(1.0), same)
    torch.testing.assert_close(within, 1 - exact.mean(), rtol=1e-9, atol=0)
    p = 4  # of each query with itself; alone the query would already give 1 / p
    assert (exact > 1 / p).all()


def test_expected_ap_of_a_random_ranking():
    """The formula of the chapter, by enumeration with the package."""
    for m, p in ((5, 1), (6, 2), (7, 3)):
        placings = list(itertools.combinations(range(m), p))
        relevance = torch.zeros(len(placings), m, dtype=torch.bool)
        for row, places in zip(relevance, placings, strict=True):
            row[list(places)] = True
        scores = torch.arange(m, 0, -1, dtype=DOUBLE).expand_as(relevance)
        harmonic = sum(1 / k for k in range(1, m + 1))
        expected = (harmonic + (p - 1) / (m - 1) * (m - harmonic)) / m
        assert average_precision(scores, relevance).mean().item() == pytest.approx(expected)


def test_loss_ignores_order_label_names_and_rotation(block):
    x = unit(15, 4)
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 2, 2, 2, 2, 0, 0, 3, 1, 4])
    value, (grad,) = value_and_grad(lambda v: smooth_ap_loss(v, labels, temperature=0.1), x)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=DOUBLE))[0]
    other, (turned,) = value_and_grad(
        lambda v: smooth_ap_loss(v, 7 - 3 * labels[order], temperature=0.1), x[order] @ rotation
    )
    torch.testing.assert_close(other, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(turned, grad[order] @ rotation, rtol=1e-9, atol=1e-12)


def test_ragged_classes_by_a_loop_over_queries():
    """Counts 2, 3 and 7, and one class of a single item, which is nobody's query."""
    x = unit(13, 5, seed=3)
    labels = torch.tensor([0] * 2 + [1] * 3 + [2] * 7 + [3])
    scores, tau, losses = (x @ x.T).tolist(), 0.05, []
    for q in range(12):
        others = [j for j in range(13) if j != q]
        positive = [j for j in others if labels[j] == labels[q]]
        ap = 0.0
        for i in positive:
            g = {j: 1 / (1 + math.exp((scores[q][i] - scores[q][j]) / tau)) for j in others}
            a = 1 + sum(g[j] for j in positive if j != i)
            b = 1 + sum(g[j] for j in others if j != i)
            ap += a / b / len(positive)
        losses.append(1 - ap)
    for backend in ("auto", "reference"):
        loss = smooth_ap_loss(x, labels, temperature=tau, backend=backend)
        assert loss.item() == pytest.approx(sum(losses) / 12, rel=1e-12)


def test_a_batch_against_itself_without_the_query_is_the_cross_set_form():
    x, labels = unit(9, 4), torch.arange(9) % 3
    loss = smooth_ap_loss(x, labels, include_self=True)
    torch.testing.assert_close(SmoothAPLoss()(x, labels, x, labels), loss, rtol=1e-12, atol=0)


# --------------------------------------------------------------------------------------------------
# Degenerate input
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "labels", [[0, 1, 2, 3, 4], [7] * 5, []], ids=["no positive", "one class", "empty"]
)
def test_batches_without_an_order_to_learn_give_zero(labels, backend, block):
    x = unit(len(labels), 3) if labels else torch.zeros(0, 3, dtype=DOUBLE)
    y = torch.tensor(labels, dtype=torch.long)
    loss, (grad,) = value_and_grad(lambda v: smooth_ap_loss(v, y, backend=backend), x)
    assert loss == 0
    # The literal form adds up pulls that cancel; the sweep makes none.
    assert (grad.abs() <= (0 if backend == "auto" else 1e-15)).all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_one_pair_among_strangers(backend, block):
    """A single positive: AP is the inverse of the soft rank."""
    x = unit(6, 3)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    loss = smooth_ap_loss(x, labels, temperature=0.1, backend=backend)
    s = x @ x.T
    ranks = [1 + torch.sigmoid((s[q, 1:5] - s[q, i]) / 0.1).sum() for q, i in ((0, 5), (5, 0))]
    expected = 1 - sum(1 / r for r in ranks) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_collapsed_batch_is_a_stationary_point(backend, block):
    x = torch.zeros(8, 3, dtype=DOUBLE)
    x[:, 1] = 1
    labels = torch.arange(8) // 2
    loss, (grad,) = value_and_grad(
        lambda v: smooth_ap_loss(F.normalize(v, dim=1), labels, backend=backend), x
    )
    assert loss.item() == pytest.approx(0.75)  # 1 - (|P| + 1) / (m + 1) with |P| = 1, m = 7
    assert grad.abs().max() < 1e-12
    ties = {t: average_precision(x @ x.T, labels[:, None] == labels, ties=t) for t in module._TIES}
    for name, expected in (("strict", 1.0), ("mid", 3 / 9), ("sklearn", 2 / 8)):
        torch.testing.assert_close(ties[name], torch.full((8,), expected, dtype=DOUBLE))


def test_duplicates_and_zero_rows_are_finite(block):
    x = F.normalize(torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 0], [0, 1], [0, 0]]), dim=1)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    loss, (grad,) = value_and_grad(lambda v: smooth_ap_loss(v, labels), x)
    assert 0 < loss < 1
    assert grad.isfinite().all()


def test_no_rows_of_scores():
    empty = torch.zeros(0, 4)
    none = torch.zeros(0, 4, dtype=torch.bool)
    assert smooth_average_precision(empty, none).shape == (0,)
    assert average_precision(empty, none).shape == (0,)


def test_a_perfect_ranking_with_wide_gaps_has_ap_one():
    """No j = i in the sums: it would add a half to every rank."""
    scores = torch.tensor([[0.9, 0.8, -0.5, -0.9]], dtype=DOUBLE)
    ap = smooth_average_precision(scores, torch.tensor([[1, 1, 0, 0]]).bool())
    assert abs(ap.item() - 1) < 1e-6


def test_gaps_far_beyond_the_operating_region_give_no_signal():
    scores = torch.tensor([[0.9, 0.4]], dtype=torch.float32)
    _, (grad,) = value_and_grad(
        lambda s: smooth_average_precision(s, torch.tensor([[False, True]])), scores
    )
    assert grad.abs().max() < 1e-15
    wide = smooth_average_precision(scores.requires_grad_(), torch.tensor([[False, True]]), 0.3)
    wide.backward()
    assert scores.grad.abs().max() > 0.1


# --------------------------------------------------------------------------------------------------
# Precisions, compilation
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    torch.manual_seed(0)
    x, labels = torch.randn(20, 6), torch.arange(20) % 4
    weight = torch.randn(8, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        v = F.normalize(F.linear(x, weight), dim=1).to(dtype)
        loss = smooth_ap_loss(v, labels)
        rows_of_scores = smooth_average_precision(v @ v.T, labels[:, None] == labels)
    assert loss.dtype == rows_of_scores.dtype == torch.float32
    wide = v.detach().float()
    torch.testing.assert_close(loss, smooth_ap_loss(wide, labels), rtol=0, atol=0)
    for backend in ("auto", "reference"):
        with torch.autocast("cpu", dtype=dtype):
            inside = smooth_ap_loss(wide, labels, backend=backend)
        outside = smooth_ap_loss(wide, labels, backend=backend)
        torch.testing.assert_close(inside, outside, rtol=0, atol=0)
    (loss + rows_of_scores.sum()).backward()
    assert weight.grad.dtype == torch.float32
    assert weight.grad.isfinite().all()
    assert weight.grad.any()


def test_compile():
    x, labels = unit(12, 4, dtype=torch.float32), torch.arange(12) % 3
    relevance = labels[:, None] == labels

    def total(v):
        v = F.normalize(v.tanh(), dim=1)
        return smooth_ap_loss(v, labels) + smooth_average_precision(v @ v.T, relevance).sum()

    compiled = torch.compile(total, backend="aot_eager")
    torch.testing.assert_close(value_and_grad(compiled, x), value_and_grad(total, x))

    def literal(v):
        v = F.normalize(v.tanh(), dim=1)
        return smooth_ap_loss(v, labels, temperature=0.1, backend="reference")

    compiled = torch.compile(literal, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(value_and_grad(compiled, x), value_and_grad(literal, x))


# --------------------------------------------------------------------------------------------------
# Peers
# --------------------------------------------------------------------------------------------------


def test_exact_ap_is_scikit_learns():
    from sklearn.metrics import average_precision_score

    generator = torch.Generator().manual_seed(0)
    for rounded in (False, True):
        scores = torch.randn(30, 17, generator=generator, dtype=DOUBLE)
        scores = scores.round() if rounded else scores  # with ties only its own rule agrees
        relevance = torch.rand(30, 17, generator=generator) < 0.3
        relevance[:, 0] = True
        expected = [
            average_precision_score(r, s)
            for r, s in zip(relevance.numpy(), scores.numpy(), strict=True)
        ]
        for ties in ("sklearn",) if rounded else module._TIES:
            found = average_precision(scores, relevance, ties=ties)
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_exact_ap_and_recall_are_torchmetrics_on_positive_scores():
    from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP

    x, labels = unit(40, 6, dtype=torch.float32), torch.arange(40) % 8
    scores = x @ x.T
    relevance, valid = labels[:, None] == labels, ~torch.eye(40, dtype=torch.bool)
    index = torch.arange(40)[:, None].expand(40, 40)[valid]
    mean = average_precision(scores, relevance, valid).mean()
    # It takes scores for probabilities: a relevant item with a score of 0 or less is dropped, so
    # its mean over cosines as they come is another number.
    kept, wanted = scores[valid], relevance[valid]
    torch.testing.assert_close(mean, RetrievalMAP()(kept + 2, wanted, indexes=index))
    assert RetrievalMAP()(kept, wanted, indexes=index) > mean + 0.01
    for k in (1, 3, 10):
        expected = RetrievalHitRate(top_k=k)(kept + 2, wanted, indexes=index)
        torch.testing.assert_close(recall_at_k(scores, relevance, [k], valid)[0], expected)


def published_loss(v, classes, each, tau):
    """The published form: the query included, equal classes in a row, B x B x B numbers."""
    count = classes * each
    D = (v @ v.T)[:, None, :] - (v @ v.T)[:, :, None]
    rank_all = 1 + (torch.sigmoid(D / tau) * (1 - torch.eye(count, dtype=v.dtype))).sum(-1)
    groups = v.view(classes, each, -1)
    S = groups @ groups.mT
    D = S[:, :, None, :] - S[:, :, :, None]
    rank_positive = 1 + (torch.sigmoid(D / tau) * (1 - torch.eye(each, dtype=v.dtype))).sum(-1)
    ap = 0
    for c in range(classes):
        own = slice(c * each, (c + 1) * each)
        ap = ap + (rank_positive[c] / rank_all[own, own]).sum() / each / count
    return 1 - ap


@pytest.mark.parametrize(("classes", "each"), [(4, 4), (6, 4), (3, 5), (5, 1)])
def test_the_published_reading_is_include_self(classes, each):
    x, labels = unit(classes * each, 8), torch.arange(classes).repeat_interleave(each)
    ours = value_and_grad(lambda v: smooth_ap_loss(v, labels, include_self=True), x)
    theirs = value_and_grad(lambda v: published_loss(v, classes, each, 0.01), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_pytorch_metric_learning_is_right_for_as_many_classes_as_items_a_class():
    from pytorch_metric_learning.losses import SmoothAPLoss as Peer

    def both(classes, each, noise):
        centres = unit(classes, 8).repeat_interleave(each, 0)
        noisy = centres + noise * torch.randn(centres.shape, generator=generator, dtype=DOUBLE)
        x, labels = F.normalize(noisy, dim=1), torch.arange(classes).repeat_interleave(each)
        ours = value_and_grad(lambda v: smooth_ap_loss(v, labels, include_self=True), x)
        theirs = value_and_grad(lambda v: Peer(temperature=0.01)(v, labels), x)
        return ours, theirs

    generator = torch.Generator().manual_seed(0)
    for size in (2, 4, 5):
        ours, theirs = both(size, size, 1.0)
        torch.testing.assert_close(ours[0], theirs[0].to(DOUBLE), rtol=1e-6, atol=1e-7)
        # It normalises inside, which takes out the part of the gradient along each embedding.
        x = F.normalize(ours[1][0], dim=1)
        assert torch.cosine_similarity(x.flatten(), theirs[1][0].flatten(), dim=0) > 0.5
    # Six classes of four, perfectly clustered: the loss is 0, and the peer has another value.
    ours, theirs = both(6, 4, 0.01)
    assert ours[0] < 1e-6
    assert theirs[0] > 0.2
    # It says so neither for another order of the batch.
    x, labels = unit(16, 8), torch.arange(4).repeat_interleave(4)
    order = torch.randperm(16, generator=generator)
    shuffled = Peer(temperature=0.01)(x[order], labels[order])
    assert abs(shuffled - Peer(temperature=0.01)(x, labels)) > 0.01
    in_order, mixed = (
        smooth_ap_loss(x[o], labels[o], include_self=True) for o in (torch.arange(16), order)
    )
    torch.testing.assert_close(in_order, mixed, rtol=1e-12, atol=0)


def test_the_benchmarked_form_computes_the_same_loss():
    peers = importlib.import_module("benchmarks.metric.bench_smooth_ap")
    x, labels = unit(20, 6), torch.arange(20) % 6
    ours = value_and_grad(lambda v: smooth_ap_loss(v, labels), x)
    theirs = value_and_grad(lambda v: peers.relevant_rows_loss(v, labels), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for case in peers.cases("cpu"):
        case.setup(case.implementation, case.small, "cpu")()


# --------------------------------------------------------------------------------------------------
# Recall, criterion, sampler
# --------------------------------------------------------------------------------------------------


def test_recall_counts_ties_against_itself():
    flat = torch.zeros(1, 5)
    relevance = torch.tensor([[0, 0, 1, 1, 0]]).bool()
    assert recall_at_k(flat, relevance, [1, 3, 4]).tolist() == [0.0, 0.0, 1.0]
    valid = torch.tensor([[1, 0, 1, 1, 0]]).bool()
    assert recall_at_k(flat, relevance, [1, 2], valid).tolist() == [0.0, 1.0]
    assert recall_at_k(flat, relevance, []).shape == (0,)


def test_criterion_is_the_function():
    x, labels = unit(10, 4), torch.arange(10) // 2
    options = {"temperature": 0.05, "include_self": True}
    criterion = SmoothAPLoss(**options)
    torch.testing.assert_close(criterion(x, labels), smooth_ap_loss(x, labels, **options))
    assert not list(criterion.parameters())
    assert "temperature=0.05" in repr(criterion)


def test_sampler_draws_classes_and_items_without_repetition():
    labels = torch.tensor([5] * 7 + [1] * 3 + [2] * 2 + [9] + [4] * 6)
    sampler = PKSampler(labels, 3, 4, torch.Generator().manual_seed(0), batches=200)
    assert len(sampler) == 200
    seen = torch.zeros(19)
    for batch in sampler:
        assert len(set(batch)) == len(batch)
        found, counts = labels[batch].unique(return_counts=True)
        assert len(found) == 3
        for label, count in zip(found.tolist(), counts.tolist(), strict=True):
            assert count == min(4, int((labels == label).sum()))
        seen[batch] += 1
    assert seen[12] == 0  # the class of a single item
    assert (seen[labels != 9] > 0).all()
    per_class = torch.stack(
        [seen[labels == c].sum() / min(4, (labels == c).sum()) for c in (5, 1, 2, 4)]
    )
    assert (per_class - 150).abs().max() < 40  # each class in three quarters of the batches


def test_sampler_feeds_a_loader_and_repeats_under_a_seed():
    labels = [c for c in range(10) for _ in range(6)]
    data = torch.utils.data.TensorDataset(torch.arange(60), torch.tensor(labels))

    def epoch(seed):
        sampler = PKSampler(labels, 4, 3, torch.Generator().manual_seed(seed))
        loader = torch.utils.data.DataLoader(data, batch_sampler=sampler)
        return [x.tolist() for x, _ in loader]

    assert epoch(1) == epoch(1) != epoch(2)
    assert len(epoch(1)) == 5
    assert len(PKSampler(labels[:12], 2, 40)) == 1


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------

SCORES, RELEVANCE = torch.zeros(2, 3), torch.tensor([[True, False, False]] * 2)


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "scores", {"scores": [[0.0]]}),
        (TypeError, "scores", {"scores": SCORES.long()}),
        (ValueError, "scores", {"scores": SCORES[0]}),
        (ValueError, "scores", {"scores": SCORES / 0}),
        (TypeError, "relevance", {"relevance": RELEVANCE.int()}),
        (ValueError, "relevance", {"relevance": RELEVANCE[:1]}),
        (ValueError, "relevance", {"relevance": RELEVANCE & False}),
        (ValueError, "relevance", {"valid": ~RELEVANCE}),
        (TypeError, "valid", {"valid": SCORES}),
        (ValueError, "valid", {"valid": RELEVANCE[0]}),
        (TypeError, "relevance", {"relevance": None}),
    ],
)
def test_rows_reject(error, name, arguments):
    given_arguments = {"scores": SCORES, "relevance": RELEVANCE, "valid": None, **arguments}
    for function in (smooth_average_precision, average_precision, recall_at_k):
        options = {"ks": [1]} if function is recall_at_k else {}
        with pytest.raises(error, match=rf"^{name}: expected"):
            function(**given_arguments, **options)


def test_rows_reject_options():
    for temperature in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"^temperature: expected"):
            smooth_average_precision(SCORES, RELEVANCE, temperature)
    with pytest.raises(TypeError, match=r"^temperature: expected"):
        smooth_average_precision(SCORES, RELEVANCE, "0.1")
    for function in (smooth_average_precision, average_precision):
        with pytest.raises(ValueError, match=r"^backend: expected"):
            function(SCORES, RELEVANCE, backend="fast")
    with pytest.raises(ValueError, match=r"^ties: expected"):
        average_precision(SCORES, RELEVANCE, ties="half")
    for ks, error in (([0], ValueError), ([1.0], TypeError), (3, TypeError), ([True], TypeError)):
        with pytest.raises(error, match=r"^ks: expected"):
            recall_at_k(SCORES, RELEVANCE, ks)
    with pytest.raises(ValueError, match=r"^scores: expected at least one query"):
        recall_at_k(SCORES[:0], RELEVANCE[:0], [1])


X, Y = torch.eye(3), torch.tensor([0, 0, 1])


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "embeddings", {"embeddings": X.tolist()}),
        (TypeError, "embeddings", {"embeddings": X.long()}),
        (ValueError, "embeddings", {"embeddings": X[0]}),
        (ValueError, "embeddings", {"embeddings": X / 0}),
        (ValueError, "embeddings", {"embeddings": 2 * X}),
        (ValueError, "embeddings", {"embeddings": 0.5 * X}),
        (TypeError, "labels", {"labels": Y.float()}),
        (TypeError, "labels", {"labels": [0, 0, 1]}),
        (ValueError, "labels", {"labels": Y[:2]}),
        (ValueError, "labels", {"labels": Y[None]}),
        (ValueError, "temperature", {"temperature": 0.0}),
        (TypeError, "include_self", {"include_self": 1}),
        (ValueError, "backend", {"backend": "triton"}),
        (TypeError, "group", {"group": "world"}),
    ],
)
def test_loss_rejects(error, name, arguments):
    with pytest.raises(error, match=rf"^{name}: expected"):
        smooth_ap_loss(**{"embeddings": X, "labels": Y, **arguments})
    if name in ("temperature", "include_self", "backend", "group"):
        with pytest.raises(error, match=rf"^{name}: expected"):
            SmoothAPLoss(**arguments)


@pytest.mark.parametrize(
    ("name", "gallery"),
    [
        ("gallery_labels", (X, None)),
        ("gallery", (None, Y)),
        ("gallery", (torch.eye(2), Y[:2])),
        ("gallery", (3 * X, Y)),
        ("gallery_labels", (X, Y[:2])),
    ],
)
def test_gallery_rejects(name, gallery):
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        SmoothAPLoss()(X, Y, *gallery)


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "labels", {"labels": [0.5, 1.5]}),
        (ValueError, "labels", {"labels": torch.zeros(2, 2, dtype=torch.long)}),
        (ValueError, "labels", {"classes_per_batch": 3}),
        (ValueError, "classes_per_batch", {"classes_per_batch": 0}),
        (TypeError, "classes_per_batch", {"classes_per_batch": 2.0}),
        (ValueError, "samples_per_class", {"samples_per_class": 1}),
        (TypeError, "samples_per_class", {"samples_per_class": True}),
        (TypeError, "generator", {"generator": 0}),
        (ValueError, "batches", {"batches": 0}),
    ],
)
def test_sampler_rejects(error, name, arguments):
    usual = {"labels": [0, 0, 1, 1, 2], "classes_per_batch": 2, "samples_per_class": 2}
    with pytest.raises(error, match=rf"^{name}: expected"):
        PKSampler(**{**usual, **arguments})


# --------------------------------------------------------------------------------------------------
# Several processes, large batches
# --------------------------------------------------------------------------------------------------

# Uneven shards; with three ranks one of them is empty.
SHARDS = {2: (7, 4), 3: (6, 0, 5)}
LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 2, 3, 0, 1, 4])
BANK = torch.tensor([0, 0, 1, 5, 2, 3, 3, 9, 1, 0, 2])


def work(rank, world):
    """Everything that one process does: what it saw, for the tests to judge."""
    own, seen = rows_of(rank, SHARDS[world]), {}
    x, y, labels = unit(11, 4)[own], unit(11, 4, seed=1)[own], LABELS[own]
    for backend in ("auto", "reference"):
        for include_self in (False, True):
            criterion = SmoothAPLoss(0.1, include_self, dist.group.WORLD, backend)
            seen["batch", backend, include_self] = value_and_grad(
                lambda v, c=criterion: c(v, labels), x
            )
        seen["cross", backend] = value_and_grad(
            lambda a, b, c=criterion: c(a, labels, b, BANK[own]), x, y
        )
    criterion = SmoothAPLoss(0.1, group=dist.group.WORLD)
    seen["upstream"] = value_and_grad(lambda v: criterion(v, labels) * (rank + 1), x)
    with torch.no_grad():
        seen["no grad"] = criterion(x, labels)
    # Rank 0 alone wants a gradient: the others must still send their part of it.
    leaf = x.clone().requires_grad_(rank == 0)
    loss = criterion(leaf, labels)
    if rank == 0:
        loss.backward()
        seen["alone"] = leaf.grad
    seen["no positive"] = value_and_grad(lambda v: criterion(v, torch.arange(11)[own]), x)
    seen["one class"] = value_and_grad(lambda v: criterion(v, torch.zeros_like(labels)), x)
    seen["empty"] = value_and_grad(lambda v: criterion(v, labels[:0]), x[:0])
    seen["half"] = value_and_grad(lambda v: criterion(v, labels.int()), x.half())
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(4, 3).double())
    (world * criterion(F.normalize(model(x), dim=1), labels)).backward()
    seen["ddp"] = model.module.weight.grad
    seen["long rows"] = message_of(lambda: criterion(x * (1 + (rank == 0)), labels))
    return seen


@pytest.fixture(scope="module", params=sorted(SHARDS))
def ranks(request, tmp_path_factory):
    """What each rank of a world of two, and of three, saw."""
    world = request.param
    return run(work, world, tmp_path_factory.mktemp(f"world{world}"))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("form", [False, True, "cross"])
def test_shards_are_one_batch(ranks, backend, form):
    x, y = unit(11, 4), unit(11, 4, seed=1)
    criterion = SmoothAPLoss(0.1, form is True, backend="reference")
    if form == "cross":
        loss, grads = value_and_grad(lambda a, b: criterion(a, LABELS, b, BANK), x, y)
    else:
        loss, grads = value_and_grad(lambda v: criterion(v, LABELS), x)
    assert loss > 0
    for rank, seen in enumerate(ranks):
        own_loss, own_grads = seen[
            ("cross", backend) if form == "cross" else ("batch", backend, form)
        ]
        torch.testing.assert_close(own_loss, loss, rtol=1e-12, atol=1e-12)
        expected = [g[rows_of(rank, SHARDS[len(ranks)])] for g in grads]
        torch.testing.assert_close(list(own_grads), expected, rtol=1e-11, atol=1e-12)


def test_shards_upstream_ddp_and_degenerate(ranks):
    x = unit(11, 4)
    loss, (grad,) = value_and_grad(lambda v: smooth_ap_loss(v, LABELS, temperature=0.1), x)
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    smooth_ap_loss(F.normalize(model(x), dim=1), LABELS, temperature=0.1).backward()
    for rank, seen in enumerate(ranks):
        own = rows_of(rank, SHARDS[len(ranks)])
        torch.testing.assert_close(seen["upstream"][1][0], (rank + 1) * grad[own])
        torch.testing.assert_close(seen["no grad"], loss)
        torch.testing.assert_close(seen["ddp"], model.weight.grad, rtol=1e-9, atol=1e-12)
        for name in ("no positive", "one class", "empty"):
            assert seen[name][0] == 0
            assert (seen[name][1][0] == 0).all()
        half, (half_grad,) = seen["half"]
        assert half.dtype == torch.float32
        assert half_grad.dtype == torch.float16
        torch.testing.assert_close(half.double(), loss, rtol=0.02, atol=0.01)
        expected = "embeddings: expected rows of norm 1" if rank == 0 else "group: expected valid"
        assert seen["long rows"].startswith(f"ValueError: {expected}")
    torch.testing.assert_close(ranks[0]["alone"], grad[rows_of(0, SHARDS[len(ranks)])])


def test_mean_of_local_losses_is_another_objective():
    """Why the group exists: a shard has fewer wrong items, and flatters."""
    x = unit(11, 4)
    local = [
        smooth_ap_loss(x[rows_of(r, SHARDS[2])], LABELS[rows_of(r, SHARDS[2])]) for r in range(2)
    ]
    assert sum(local) / 2 < smooth_ap_loss(x, LABELS) - 0.05


LARGE = """
import torch
from affnb.metric.smooth_ap import *

def peak():  # bytes; the high-water mark of this process's resident memory
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

torch.set_num_threads(1)
def step(batch):
    x = torch.nn.functional.normalize(torch.randn(batch, 64), dim=1).requires_grad_()
    before = peak()
    smooth_ap_loss(x, torch.arange(batch) // 4).backward()
    assert x.grad.isfinite().all() and x.grad.any()
    return before, peak()

step(64)
print(*step(4096))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_four_thousand_items_in_less_than_one_matrix():
    run = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    before, after = map(int, run.stdout.split())
    assert after < 2e9  # the whole process, PyTorch included
    assert after - before < 4 * 4096**2  # one float32 matrix B x B; B x B x B would be 275 GB


# --------------------------------------------------------------------------------------------------
# The chapter with profile="full"
# --------------------------------------------------------------------------------------------------


def write_products(folder, classes):
    """Write pictures in the layout of Stanford Online Products: 4 of a class to train, 2 to test."""
    files = folder / "Stanford_Online_Products"
    files.mkdir(parents=True)
    for split, each, first in (("train", 4, 1), ("test", 2, 1 + classes)):
        lines = ["image_id class_id super_class_id path"]
        for k in range(each * classes):
            label = first + k // each
            looks = np.random.default_rng(label).integers(20, 236, (8, 8, 3))
            picture = looks + np.random.default_rng(1000 * label + k).integers(-9, 10, (8, 8, 3))
            if label == first:  # some of the real ones are grey
                picture = picture[..., 0]
            Image.fromarray(picture.astype(np.uint8)).save(files / f"{split}_{k}.png")
            lines.append(f"{k + 1} {label} 1 {split}_{k}.png")
        (files / f"Ebay_{split}.txt").write_text("\n".join(lines) + "\n")


def fake_torchvision(monkeypatch, seen, used):
    """Let ``import torchvision`` find a ResNet-50's ends, and transforms with all sides 1/32 as long.

    ``seen`` gets, for each batch that a network is given, whether it is in training mode, whether
    under autocast, and the batch's shape; ``used`` the names of the transforms.
    """

    class Trunk(nn.Module):
        def __init__(self, weights):
            super().__init__()
            assert weights == "pretrained"
            self.fc = nn.Linear(147, 1000)

        def forward(self, x):
            seen.append((self.training, torch.is_autocast_enabled("cpu"), tuple(x.shape)))
            return self.fc(x.flatten(1))

    def compose(steps):
        def apply(x):
            for name, step in steps:
                used.add(name)
                x = step(x)
            return x

        return apply

    def resize(size):
        def check(x):
            assert tuple(x.shape[1:]) == tuple(side // 32 for side in size)
            return x

        return check

    def crop(side):
        return lambda x: x[:, : side // 32, : side // 32]

    def normalise(*statistics):
        mean, sd = (torch.tensor(v)[:, None, None] for v in statistics)
        return lambda x: (x - mean) / sd

    def named(name, make):
        return lambda *given, **options: ((name, *given), make(*given, **options))

    transforms = {
        "RGB": lambda: lambda picture: picture.convert("RGB"),
        "ToImage": lambda: lambda picture: torch.from_numpy(np.array(picture)).permute(2, 0, 1),
        "Resize": resize,
        "RandomCrop": crop,
        "CenterCrop": crop,
        "RandomHorizontalFlip": lambda: lambda x: x,
        "ToDtype": lambda dtype, scale: lambda x: x.to(dtype) / (255 if scale else 1),
        "Normalize": normalise,
    }
    v2 = {name: named(name, make) for name, make in transforms.items()}
    weights = types.SimpleNamespace(IMAGENET1K_V1="pretrained")
    fake_modules(
        monkeypatch,
        {
            "torchvision": {},
            "torchvision.models": {"resnet50": Trunk, "ResNet50_Weights": weights},
            "torchvision.transforms": {"v2": types.SimpleNamespace(Compose=compose, **v2)},
        },
    )


def test_full_profile(tmp_path, monkeypatch):
    """The chapter's cells with ``profile="full"``, made small: they run, with the paper's settings."""
    sop = pytest.importorskip("pytorch_metric_learning.datasets.sop")
    monkeypatch.setattr(sop.StanfordOnlineProducts, "download_and_remove", None)  # it is all there
    write_products(tmp_path / "sop", 60)
    seen, used, trainings, temperatures = [], set(), [], []
    fake_torchvision(monkeypatch, seen, used)

    def fit(real, step, batches, optimizer):
        trainings.append((optimizer, batches.batch_sampler, len(batches.dataset)))
        return real(step, batches, optimizer)

    def noted(names):
        def loss(embeddings, labels, **options):
            if options:  # the measurement of time and memory passes none
                temperatures.append((*embeddings.shape, len(labels), options["temperature"]))
            return smooth_ap_loss(embeddings, labels, **options)

        names["smooth_ap_loss"] = loss

    names, verdicts = run_cells(
        "metric/smooth_ap",
        monkeypatch,
        define=("took", "held", "by_temperature"),
        call=("settle", "display"),
        small={
            "(64, 128, 256, 512)": "(8, 12, 16, 20)",
            "(*literal_sizes, 1024, 4096, 16384)": "(*literal_sizes, 24, 28, 32)",
            "30_000 if full else 100": "2 if full else 100",
            "3 if full else 6": "2 if full else 6",
            "DataLoader(num_workers=)": "0",
        },
        after={"smooth_ap_loss": noted},
        fit=fit,
        data_root=str(tmp_path),
    )

    # Three losses and two more temperatures, two seeds each; batches as in the paper.
    assert len(trainings) == 10
    for optimizer, sampler, items in trainings:
        (group,) = optimizer.param_groups
        assert type(optimizer) is torch.optim.Adam
        assert (group["lr"], group["weight_decay"]) == (1e-5, 4e-5)
        assert [p.shape for p in group["params"]] == [(512, 147), (512,)]
        assert (sampler.classes_per_batch, sampler.samples_per_class, len(sampler)) == (56, 4, 2)
        assert items == 240
    training, testing = (True, True, (224, 3, 7, 7)), (False, False, (120, 3, 7, 7))
    assert seen == [training, training, testing] * 10
    middle, ends = (224, 512, 224, 0.01), [(224, 512, 224, t) for t in (0.001, 0.1)]
    assert temperatures == [middle] * 4 + [t for t in ends for _ in range(4)]
    assert {("Resize", (256, 256)), ("RandomCrop", 224), ("CenterCrop", 224)} < used
    assert ("RandomHorizontalFlip",) in used

    # A linear layer at random keeps pictures of one product together: images go with their labels.
    assert set(names["found"]) == {"Smooth-AP", "triplet", "contrastive"}
    assert all(len(runs) == 2 for runs in names["found"].values())
    for mean_ap, recall in itertools.chain(*names["found"].values()):
        assert 0.9 < mean_ap <= 1
        assert len(recall) == 3  # at 1, 10 and 100 of 120
        assert 0.8 < recall[0] <= recall[1] <= recall[2] <= 1
    assert names["chosen"] == names["usual"]
    assert list(names["by_temperature"]) == [0.001, 0.01, 0.1]
    assert names["by_temperature"][0.01] == names["mAP"]["Smooth-AP"]
    assert set(verdicts) == {
        f"metric/smooth_ap:{claim}"
        for claim in ("beats-triplet", "beats-contrastive", "not-too-sharp", "not-too-smooth")
    }
    assert set(verdicts.values()) <= set(VERDICTS)

    for kind in ("took", "held"):
        assert {name: len(values) for name, values in names[kind].items()} == {
            "literal": 4,
            "affnb": 7,
        }
        assert all(v > 0 for values in names[kind].values() for v in values)

"""Graphical contrastive losses, the weightless parts of RelDN, and the metrics of scene graphs."""

import ast
import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torch import nn
from torch.autograd import gradcheck

from affnb.data.scene_graphs import scene_graphs
from affnb.data.visual_genome import RelationImage, VisualGenomeRelations
from tests import fake_torchvision
from tests.chapter_cells import cells_of
from tests.fake_torchvision import sampled_roi, thin_vgg16
from tests.processes import message_of, rows_of, run

gc = importlib.import_module("affnb.affinity.graphical_contrastive")
DOUBLE = torch.float64
SIZES = st.sampled_from([1, 2, 3, 5, 7])
LOSSES = ("class_agnostic", "entity_class_aware", "predicate_class_aware")


def loss_of(name, z, graph, **options):
    """Any of the three losses from logits; the affinity is differentiable, the arg max is not."""
    truth, subj_cls, obj_cls, mask = graph
    phi = gc.pair_affinity(z)
    keep = torch.ones_like(truth, dtype=torch.bool) if mask is None else mask
    pos, neg = (truth > 0) & keep, (truth == 0) & keep
    if name == "class_agnostic":
        return gc.class_agnostic_loss(phi, pos, neg, **options)
    if name == "entity_class_aware":
        return gc.entity_class_aware_loss(phi, pos, neg, subj_cls, obj_cls, **options)
    return gc.predicate_class_aware_loss(phi, z, truth, mask=mask, **options)


def value_and_grad(function, x):
    leaf = x.detach().requires_grad_()
    loss = function(leaf)
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


@st.composite
def graphs(draw):
    """Logits (with ties, sometimes not contiguous), labels with empty sets, classes, masks."""
    S, O, E = draw(SIZES), draw(SIZES), draw(st.sampled_from([1, 2, 4]))
    batch = draw(st.sampled_from([(), (1,), (2,), (2, 2)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    z = 2 * torch.randn(*batch, S, O, E + 1, generator=generator, dtype=DOUBLE)
    if draw(st.booleans()):
        z = z.round()  # equal affinities, equal logits
    layout = draw(st.sampled_from(["plain", "transposed", "strided"]))
    if layout == "transposed":
        z = z.transpose(-2, -3).contiguous().transpose(-2, -3)
    elif layout == "strided":
        z = z.repeat_interleave(2, -2)[..., ::2, :]
    truth = torch.randint(1, E + 1, (*batch, S, O), generator=generator)
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    truth *= torch.rand(truth.shape, generator=generator) < density
    subj_cls = torch.randint(0, 3, (*batch, S), generator=generator)
    obj_cls = 40 * torch.randint(0, 3, (*batch, O), generator=generator)
    mask = torch.rand(truth.shape, generator=generator) < 0.7 if draw(st.booleans()) else None
    return z, (truth, subj_cls, obj_cls, mask)


# --------------------------------------------------------------------------------------------------
# Fast against reference
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=80, deadline=None)
@given(
    graphs(),
    st.sampled_from(["both", "subject", "object"]),
    st.sampled_from(["paper", "released"]),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.booleans(),
    st.sampled_from(["unrelated", "incorrect"]),
)
def test_fast_equals_reference(name, graph, side, normalisation, alpha, include_none, negatives):
    z, rest = graph
    options = {"side": side, "normalisation": normalisation, "alpha": alpha}
    if name == "predicate_class_aware":
        options |= {"include_none": include_none, "negatives": negatives}
        if negatives == "incorrect" and alpha == 0:
            options["alpha"] = 0.1
    fast = value_and_grad(lambda v: loss_of(name, v, rest, **options), z)
    slow = value_and_grad(lambda v: loss_of(name, v, rest, backend="reference", **options), z)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)


def by_the_definition(z, graph, rule, alpha=0.2, released=False):
    """The sets of the paper, spelled out in Python for one graph; nothing of the package."""
    truth, subj_cls, obj_cls, _ = (None if t is None else t.tolist() for t in graph)
    p = z.softmax(-1)
    phi, guess = (1 - p[..., 0]).tolist(), (z[..., 1:].argmax(-1) + 1).tolist()
    S, O = len(truth), len(truth[0])
    total = 0.0
    for anchors, others, at in ((S, O, lambda a, b: (a, b)), (O, S, lambda a, b: (b, a))):
        classes = obj_cls if anchors is S and others is O and at(0, 1) == (0, 1) else subj_cls
        sums, hinges, count = 0.0, [], 0
        for a in range(anchors):
            cells = {b: at(a, b) for b in range(others)}
            plus = [b for b in cells if truth[cells[b][0]][cells[b][1]] > 0]
            minus = [b for b in cells if truth[cells[b][0]][cells[b][1]] == 0]

            def value(b, cells=cells):
                return phi[cells[b][0]][cells[b][1]]

            if rule == "class_agnostic":
                of = of_guess = lambda b: 0
            elif rule == "entity_class_aware":
                of = of_guess = lambda b, classes=classes: classes[b]
            else:

                def of(b, cells=cells):
                    return truth[cells[b][0]][cells[b][1]]

                def of_guess(b, cells=cells):
                    return guess[cells[b][0]][cells[b][1]]

            groups = {of(b) for b in plus}
            own = []
            for g in groups:
                rivals = [value(b) for b in minus if of_guess(b) == g]
                if rivals:
                    least = min(value(b) for b in plus if of(b) == g)
                    own.append(max(0.0, alpha - (least - max(rivals))))
            hinges += own
            if groups:
                count += 1
                sums += sum(own) / len(groups)
        total += sum(hinges) / (len(hinges) + 1) if released else sums / max(count, 1)
    return total


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("released", [False, True])
def test_value_by_the_definition(name, released):
    generator = torch.Generator().manual_seed(0)
    seen = []
    for S, O in ((3, 8), (6, 4), (1, 1), (9, 2)):
        z = 2 * torch.randn(S, O, 4, generator=generator, dtype=DOUBLE)
        truth = torch.randint(0, 4, (S, O), generator=generator)
        truth *= torch.rand(S, O, generator=generator) < 0.5
        classes = [torch.randint(0, 2, (n,), generator=generator) for n in (S, O)]
        graph = (truth, *classes, None)
        expected = by_the_definition(z, graph, name, released=released)
        got = loss_of(name, z, graph, normalisation="released" if released else "paper")
        assert got.item() == pytest.approx(expected, abs=1e-12)
        seen.append(expected)
    assert max(seen) > 0.1


def test_released_normalisation_is_a_mean_with_one_satisfied_couple():
    """What the released code does: hinge on lists of couples that begin with (1, 0)."""
    phi = torch.rand(6, 9, generator=torch.Generator().manual_seed(1))
    pos = torch.rand(6, 9, generator=torch.Generator().manual_seed(2)) < 0.3
    expected = 0.0
    for p, m in ((phi, pos), (phi.T, pos.T)):
        couples = [(1.0, 0.0)]
        couples += [
            (a[b].min(), a[~b].max()) for a, b in zip(p, m, strict=True) if b.any() and not b.all()
        ]
        high, low = (torch.tensor(side) for side in zip(*couples, strict=True))
        expected += F.margin_ranking_loss(high, low, torch.ones(len(high)), margin=0.2)
    got = gc.class_agnostic_loss(phi, pos, ~pos, normalisation="released")
    torch.testing.assert_close(got, expected)


def test_total_is_the_weighted_sum():
    scenes = scene_graphs(3, generator=torch.Generator().manual_seed(0))
    truth, classes = scenes.predicates, (scenes.subject_classes, scenes.object_classes)
    z = torch.randn(*truth.shape, 5, generator=torch.Generator().manual_seed(1))
    mask = torch.rand(truth.shape, generator=torch.Generator().manual_seed(2)) < 0.8
    graph = (truth, *classes, mask)
    parts = gc.graphical_contrastive_loss(z, truth, *classes, mask=mask, alphas=(0.1, 0.3, 0.5))
    for name, alpha in zip(LOSSES, (0.1, 0.3, 0.5), strict=True):
        torch.testing.assert_close(parts[name], loss_of(name, z, graph, alpha=alpha))
    entropy = F.cross_entropy(z[mask], truth[mask])
    torch.testing.assert_close(parts["cross_entropy"], entropy)
    total = entropy + parts[LOSSES[0]] + 0.5 * parts[LOSSES[1]] + 0.1 * parts[LOSSES[2]]
    torch.testing.assert_close(parts["loss"], total)
    off = gc.graphical_contrastive_loss(z, truth, *classes, weights=(0, 0, 0))
    assert off["loss"] == off["cross_entropy"]
    assert all(off[name] == 0 for name in LOSSES)


# --------------------------------------------------------------------------------------------------
# Affinity, margins, gradients
# --------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(0, 6), st.integers(0, 2**31))
def test_affinity_is_one_minus_the_softmax(predicates, none, seed):
    none = min(none, predicates)
    z = 4 * torch.randn(
        2, 3, predicates + 1, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)
    )
    got = value_and_grad(lambda v: (gc.pair_affinity(v, none) ** 2).sum(), z)
    expected = value_and_grad(lambda v: ((1 - v.softmax(-1)[..., none]) ** 2).sum(), z)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    shifted = gc.pair_affinity(z + 100 * torch.randn(2, 3, 1, dtype=DOUBLE), none)
    torch.testing.assert_close(shifted, gc.pair_affinity(z, none), rtol=1e-9, atol=1e-12)


def test_affinity_of_extreme_logits():
    z = torch.tensor([[500.0, -500.0], [-500.0, 500.0], [40.0, 0.0]], requires_grad=True)
    phi = gc.pair_affinity(z)
    assert phi[0] == 0
    assert phi[1] == 1
    assert phi[2].item() == pytest.approx(math.exp(-40), rel=1e-4)  # 1 - softmax is 0 here
    phi.sum().backward()
    assert z.grad.isfinite().all()
    saturated = torch.tensor([[[0.0, 0.0], [-30.0, 30.0]]], requires_grad=True)
    related = torch.tensor([[True, False]])
    gc.class_agnostic_loss(gc.pair_affinity(saturated), related, ~related).backward()
    assert saturated.grad[0, 0].abs().max() > 0.2  # the related pair in doubt moves
    assert saturated.grad[0, 1].abs().max() < 1e-12  # the confident mistake does not


@settings(max_examples=30, deadline=None)
@given(graphs(), st.sampled_from([-1, -2]))
def test_margin_certifies_every_couple(graph, dim):
    z, (truth, _, _, mask) = graph
    phi = gc.pair_affinity(z)
    keep = torch.ones_like(truth, dtype=torch.bool) if mask is None else mask
    pos, neg = (truth > 0) & keep, (truth == 0) & keep
    margin, valid = gc.anchor_margin(phi, pos, neg, dim)
    assert torch.equal(valid, pos.any(dim) & neg.any(dim))
    assert (margin[~valid] == 0).all()
    if dim == -2:
        phi, pos, neg = phi.mT, pos.mT, neg.mT
    gaps = phi[..., :, None] - phi[..., None, :]
    gaps = gaps.masked_fill(~(pos[..., :, None] & neg[..., None, :]), torch.inf).flatten(-2)
    assert torch.equal(gaps.amin(-1)[valid], margin[valid])


def test_margin_takes_any_real_scale():
    levels = torch.tensor([[3.0, -7.0, 1.0]])
    pos = torch.tensor([[True, False, True]])
    assert gc.anchor_margin(levels, pos, ~pos)[0].item() == 8
    with pytest.raises(ValueError, match=r"^phi: expected affinities in \[0, 1\]"):
        gc.class_agnostic_loss(levels, pos, ~pos)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(2, 3, 4, 4, generator=generator, dtype=DOUBLE, requires_grad=True)
    truth = torch.randint(0, 4, (2, 3, 4), generator=generator)
    truth *= torch.rand(truth.shape, generator=generator) < 0.5
    graph = (truth, torch.zeros(2, 3).long(), torch.zeros(2, 4).long(), None)
    assert loss_of(name, z, graph) > 0.05
    assert gradcheck(lambda v: loss_of(name, v, graph), (z,))


@settings(max_examples=80, deadline=None)
@given(graphs())
def test_restricting_the_rivals_never_raises_the_loss(graph):
    z, rest = graph
    whole = loss_of("class_agnostic", z, rest)
    for name in LOSSES[1:]:
        assert loss_of(name, z, rest) <= whole + 1e-12


def test_each_loss_sees_its_own_rival_only():
    """In the procedural scenes the subject side of L2 and of L3 reach different pairs."""
    scenes = scene_graphs(20, clutter=0, subjects=1, generator=torch.Generator().manual_seed(0))
    truth = scenes.predicates
    # A model that reads the predicate from the direction, as the spatial module can.
    shift = scenes.object_boxes[:, None] - scenes.subject_boxes[:, :, None]
    way = shift[..., :2] + shift[..., 2:]
    horizontal = way[..., 0].abs() > way[..., 1].abs()
    guess = torch.where(
        horizontal, torch.where(way[..., 0] > 0, 1, 3), torch.where(way[..., 1] > 0, 2, 4)
    )
    assert torch.equal(guess[truth > 0], truth[truth > 0])
    z = 2.0 * F.one_hot(guess, 5)
    z[..., 0] = 1 + 0.1 * torch.rand(truth.shape, generator=torch.Generator().manual_seed(1))
    graph = (truth, scenes.subject_classes, scenes.object_classes, None)
    reached = {}
    for name in LOSSES:
        phi = gc.pair_affinity(z).requires_grad_()
        pos = truth > 0
        loss = {
            "class_agnostic": lambda p, m=pos: gc.class_agnostic_loss(p, m, ~m, side="subject"),
            "entity_class_aware": lambda p, m=pos: gc.entity_class_aware_loss(
                p, m, ~m, *graph[1:3], side="subject"
            ),
            "predicate_class_aware": lambda p: gc.predicate_class_aware_loss(
                p, z, truth, side="subject"
            ),
        }[name](phi)
        (slope,) = torch.autograd.grad(loss, phi)
        reached[name] = {int(k) for k in scenes.rivals[slope > 0].unique()}
    assert reached == {
        "class_agnostic": {1, 2},
        "entity_class_aware": {1},
        "predicate_class_aware": {2},
    }


# --------------------------------------------------------------------------------------------------
# Invariances
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=25, deadline=None)
@given(graphs(), st.integers(0, 2**31))
def test_permutation_of_the_entities(name, graph, seed):
    z, (truth, subj_cls, obj_cls, mask) = graph
    generator = torch.Generator().manual_seed(seed)
    s = torch.randperm(truth.shape[-2], generator=generator)
    o = torch.randperm(truth.shape[-1], generator=generator)
    mixed = (truth[..., s, :][..., o], subj_cls[..., s], obj_cls[..., o])
    mixed_mask = None if mask is None else mask[..., s, :][..., o]
    before = value_and_grad(lambda v: loss_of(name, v, (truth, subj_cls, obj_cls, mask)), z)
    after = value_and_grad(
        lambda v: loss_of(name, v, (*mixed, mixed_mask)), z[..., s, :, :][..., o, :]
    )
    torch.testing.assert_close(before[0], after[0])
    torch.testing.assert_close(before[1][..., s, :, :][..., o, :], after[1])


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=25, deadline=None)
@given(graphs())
def test_duplicated_images_padding_and_roles(name, graph):
    z, (truth, subj_cls, obj_cls, mask) = graph
    S, O, E = z.shape[-3:]
    z, truth = z.reshape(-1, S, O, E), truth.reshape(-1, S, O)
    subj_cls, obj_cls = subj_cls.reshape(-1, S), obj_cls.reshape(-1, O)
    mask = torch.ones_like(truth, dtype=torch.bool) if mask is None else mask.reshape(-1, S, O)
    once = loss_of(name, z, (truth, subj_cls, obj_cls, mask))
    twice = [torch.cat([t, t]) for t in (z, truth, subj_cls, obj_cls, mask)]
    torch.testing.assert_close(loss_of(name, twice[0], tuple(twice[1:])), once)
    padded = (
        F.pad(truth, (0, 2, 0, 3)),
        F.pad(subj_cls, (0, 3)),
        F.pad(obj_cls, (0, 2)),
        F.pad(mask, (0, 2, 0, 3)),
    )
    z_padded = F.pad(z, (0, 0, 0, 2, 0, 3), value=7.0)
    torch.testing.assert_close(loss_of(name, z_padded, padded), once)
    swapped = (truth.mT, obj_cls, subj_cls, mask.mT)
    torch.testing.assert_close(loss_of(name, z.transpose(1, 2), swapped), once)


def test_class_ids_are_only_names():
    z = torch.randn(2, 4, 6, 3, generator=torch.Generator().manual_seed(0))
    truth = torch.randint(0, 3, (2, 4, 6), generator=torch.Generator().manual_seed(1))
    subj_cls, obj_cls = torch.arange(4) % 2, torch.arange(6) % 3
    small = (truth, subj_cls.expand(2, 4), obj_cls.expand(2, 6), None)
    large = (truth, 10**9 - subj_cls.expand(2, 4), 77 * obj_cls.expand(2, 6).int(), None)
    got = [loss_of("entity_class_aware", z, graph) for graph in (small, large)]
    assert torch.equal(*got)


def test_none_index_moves_with_the_logits():
    scenes = scene_graphs(2, generator=torch.Generator().manual_seed(0))
    truth, classes = scenes.predicates, (scenes.subject_classes, scenes.object_classes)
    z = torch.randn(*truth.shape, 5, generator=torch.Generator().manual_seed(1))
    first = gc.graphical_contrastive_loss(z, truth, *classes)
    for index, order in ((4, [1, 2, 3, 4, 0]), (2, [3, 1, 0, 2, 4])):
        moved = torch.tensor([order.index(e) for e in range(5)])[truth]
        other = gc.graphical_contrastive_loss(z[..., order], moved, *classes, none_index=index)
        torch.testing.assert_close(other, first)


# --------------------------------------------------------------------------------------------------
# The mined negatives of the predicate class aware loss
# --------------------------------------------------------------------------------------------------


def test_negatives_are_mined_from_the_current_model_without_gradient():
    truth = torch.tensor([[1, 0]])
    z = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.9, 1.0]]], requires_grad=True)
    phi = torch.tensor([[0.5, 0.6]], requires_grad=True)
    assert gc.predicate_class_aware_loss(phi, z, truth) == 0  # predicate 2 is predicted
    stepped = z.detach() + torch.tensor([0.0, 0.2, 0.0])
    loss = gc.predicate_class_aware_loss(phi, stepped.requires_grad_(), truth, side="subject")
    assert loss.item() == pytest.approx(0.3)
    loss.backward()
    assert phi.grad.tolist() == [[-1.0, 1.0]]
    assert stepped.grad is None


def test_who_may_be_a_negative():
    # One subject: related by 1; related by 2 but predicted as 1; unrelated, none wins over 1.
    truth = torch.tensor([[1, 2, 0]])
    z = torch.tensor([[[0.0, 3.0, 0.0], [0.0, 2.0, 0.0], [5.0, 1.0, 0.0]]])
    phi = torch.tensor([[0.5, 0.9, 0.3]], requires_grad=True)

    def reached(**options):
        loss = gc.predicate_class_aware_loss(phi, z, truth, side="subject", alpha=1.0, **options)
        if loss == 0:
            return set()
        (slope,) = torch.autograd.grad(loss, phi)
        return {int(k) for k in (slope[0] > 0).nonzero()}

    assert reached() == {2}
    assert reached(include_none=True) == set()
    assert reached(negatives="incorrect") == {1}
    assert reached(negatives="incorrect", include_none=True) == {1}


def test_related_pairs_are_never_negatives_by_default():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(50, 4, 6, 4, generator=generator)
    truth = torch.randint(0, 4, (50, 4, 6), generator=generator)
    phi = gc.pair_affinity(z).requires_grad_()
    (slope,) = torch.autograd.grad(gc.predicate_class_aware_loss(phi, z, truth, alpha=1.0), phi)
    assert not (slope[truth > 0] > 0).any()
    assert not (slope[truth == 0] < 0).any()
    assert (slope > 0).any()


# --------------------------------------------------------------------------------------------------
# Degenerate input, precision, compilation, several processes
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (1, 1), (2, 3)])
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_contrast_gives_zero_and_a_zero_gradient(shape, label, backend):
    z = torch.randn(2, *shape, 3, requires_grad=True)
    truth = torch.full((2, *shape), label)
    graph = (truth, torch.zeros(2, shape[0]).long(), torch.zeros(2, shape[1]).long(), None)
    for name in LOSSES:
        loss = loss_of(name, z, graph, backend=backend)
        assert loss == 0
        (grad,) = torch.autograd.grad(loss, z, allow_unused=True)
        assert grad is None or not grad.any()
    everything_masked = torch.zeros_like(truth, dtype=torch.bool)
    parts = gc.graphical_contrastive_loss(z, truth, *graph[1:3], mask=everything_masked)
    assert all(value == 0 for value in parts.values())


def test_ties_share_the_gradient():
    for backend in ("auto", "reference"):
        phi = torch.tensor([[0.5, 0.5, 0.9, 0.9, 0.9, 0.1]], requires_grad=True)
        pos = torch.tensor([[True, True, False, False, False, False]])
        gc.class_agnostic_loss(phi, pos, ~pos, side="subject", backend=backend).backward()
        expected = torch.tensor([[-1 / 2, -1 / 2, 1 / 3, 1 / 3, 1 / 3, 0]])
        torch.testing.assert_close(phi.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    scenes = scene_graphs(2, generator=torch.Generator().manual_seed(0))
    truth, classes = scenes.predicates, (scenes.subject_classes, scenes.object_classes)
    z = torch.randn(*truth.shape, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    z.requires_grad_()
    expected = gc.graphical_contrastive_loss(z.detach().float(), truth, *classes)["loss"]
    got = gc.graphical_contrastive_loss(z, truth, *classes)["loss"]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.detach(), expected)
    got.backward()
    assert z.grad.dtype == dtype
    assert z.grad.isfinite().all()
    layer = torch.nn.Linear(4, 5)
    with torch.autocast("cpu", dtype=dtype):
        loss = gc.graphical_contrastive_loss(layer(scenes.union_features), truth, *classes)["loss"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert layer.weight.grad.isfinite().all()


def test_compile():
    scenes = scene_graphs(2, generator=torch.Generator().manual_seed(0))
    truth, classes = scenes.predicates, (scenes.subject_classes, scenes.object_classes)
    z = torch.randn(*truth.shape, 5, generator=torch.Generator().manual_seed(1))

    def total(v):
        return gc.graphical_contrastive_loss(v, truth, *classes)["loss"]

    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(value_and_grad(compiled, z), value_and_grad(total, z))


SHARDS = (3, 2)


def whole_batch():
    """Five images; the second rank's have no anchor at all."""
    scenes = scene_graphs(5, generator=torch.Generator().manual_seed(0))
    z = torch.randn(*scenes.predicates.shape, 5, generator=torch.Generator().manual_seed(1))
    truth = scenes.predicates.clone()
    truth[SHARDS[0] :] = 0
    return z, truth, scenes.subject_classes, scenes.object_classes


def losses_and_grad(z, *labels, group=None):
    leaf = z.clone().requires_grad_()
    parts = gc.graphical_contrastive_loss(leaf, *labels, group=group)
    parts["loss"].backward()
    return {name: value.detach() for name, value in parts.items()}, leaf.grad


def work(rank, world):
    z, truth, *classes = (v[rows_of(rank, SHARDS)] for v in whole_batch())
    group = dist.group.WORLD
    bad = truth + 9 * rank
    return {
        "own": losses_and_grad(z, truth, *classes, group=group),
        "bad": message_of(lambda: losses_and_grad(z, bad, *classes, group=group)),
    }


def test_group_is_one_process_with_all_images(tmp_path):
    losses, grad = losses_and_grad(*whole_batch())
    for rank, seen in enumerate(run(work, len(SHARDS), tmp_path)):
        torch.testing.assert_close(seen["own"], (losses, grad[rows_of(rank, SHARDS)]))
        own = "gt_pred: expected values" if rank else "group: expected valid"
        assert seen["bad"].startswith(f"ValueError: {own}")


# --------------------------------------------------------------------------------------------------
# Frequencies and boxes
# --------------------------------------------------------------------------------------------------


def test_frequency_prior_counts():
    generator = torch.Generator().manual_seed(0)
    triples = torch.stack([torch.randint(n, (500,), generator=generator) for n in (3, 3, 5)], 1)
    prior = gc.frequency_prior(triples, C=3, E=4, smoothing=0.5)
    torch.testing.assert_close(prior.exp().sum(-1), torch.ones(3, 3))
    counts = np.zeros((3, 3, 5))
    for s, o, e in triples.tolist():
        counts[s, o, e] += 1
    expected = (counts + 0.5) / (counts + 0.5).sum(-1, keepdims=True)
    torch.testing.assert_close(prior.exp(), torch.tensor(expected).float())
    unseen = gc.frequency_prior(torch.zeros(0, 3).long(), C=2, E=3)
    torch.testing.assert_close(unseen.exp(), torch.full((2, 2, 4), 0.25))


BOXES = st.lists(st.floats(1, 100), min_size=8, max_size=8)


@settings(max_examples=80, deadline=None)
@given(BOXES, st.floats(0.1, 10), st.floats(-50, 50), st.floats(-50, 50))
def test_boxes(numbers, scale, right, down):
    a, b = torch.tensor(numbers, dtype=DOUBLE).view(2, 4)
    delta = gc.box_delta(a, b)
    expected = [
        (numbers[0] - numbers[4]) / numbers[6],
        (numbers[1] - numbers[5]) / numbers[7],
        math.log(numbers[2] / numbers[6]),
        math.log(numbers[3] / numbers[7]),
    ]
    assert delta.tolist() == pytest.approx(expected, abs=1e-9)
    moved = [
        torch.cat([scale * x[:2] + torch.tensor([right, down]), scale * x[2:]]) for x in (a, b)
    ]
    torch.testing.assert_close(gc.box_delta(*moved), delta, rtol=1e-8, atol=1e-8)
    reverse = gc.box_delta(b, a)
    torch.testing.assert_close(reverse[:2], -delta[:2] * torch.exp(-delta[2:]))
    torch.testing.assert_close(reverse[2:], -delta[2:])
    # Corners say the same.
    corners = [torch.cat([x[:2], x[:2] + x[2:]]) for x in (a, b)]
    torch.testing.assert_close(gc.box_delta(*corners, fmt="xyxy"), delta, rtol=1e-8, atol=1e-8)
    union = gc.union_box(*corners, fmt="xyxy")
    left_top, right_bottom = torch.stack(corners)[:, :2], torch.stack(corners)[:, 2:]
    torch.testing.assert_close(union, torch.cat([left_top.amin(0), right_bottom.amax(0)]))
    feature = gc.spatial_pair_feature(a, b, (200, 100))
    assert feature.shape == (22,)
    torch.testing.assert_close(
        gc.spatial_pair_feature(*corners, (200, 100), fmt="xyxy"), feature, rtol=1e-7, atol=1e-7
    )
    both = gc.union_box(a, b)
    parts = [gc.box_delta(a, b), gc.box_delta(a, both), gc.box_delta(both, b)]
    parts += [gc.normalised_box(x, (200, 100)) for x in (a, b)]
    torch.testing.assert_close(feature, torch.cat(parts))
    x, y, w, h = numbers[:4]
    corner = [x / 200, y / 100, (x + w) / 200, (y + h) / 100, w * h / 20000]
    assert parts[3].tolist() == pytest.approx(corner)
    longer = gc.spatial_pair_feature(a, b, (200, 100), reverse=True)
    assert longer.shape == (28,)
    torch.testing.assert_close(longer[4:6], reverse[:2])


def test_boxes_broadcast_to_pairs():
    s, o = torch.rand(2, 3, 4) + 1, torch.rand(2, 5, 4) + 1
    feature = gc.spatial_pair_feature(s[:, :, None], o[:, None], (10, 10))
    assert feature.shape == (2, 3, 5, 22)
    one = gc.spatial_pair_feature(s[1, 2], o[1, 4], (10, 10))
    torch.testing.assert_close(feature[1, 2, 4], one)


# --------------------------------------------------------------------------------------------------
# Metrics
# --------------------------------------------------------------------------------------------------


def random_lists(seed, images=6, found=40, truth=9, distinct=False):
    """Detections that are annotations, jittered or spoilt, and some of them twice."""
    generator = torch.Generator().manual_seed(seed)
    corner = 100 * torch.rand(truth, 2, 2, generator=generator)
    side = 5 + 30 * torch.rand(truth, 2, 2, generator=generator)
    boxes = torch.cat([corner, corner + side], -1)
    image = torch.randint(images, (truth,), generator=generator)
    labels = torch.randint(1, 4, (truth, 3), generator=generator)
    annotated = gc.Relations(image, labels, boxes, torch.ones(truth))
    pick = (
        torch.arange(found) % truth if not distinct else torch.randperm(truth, generator=generator)
    )
    n = len(pick)
    jitter = 3 * torch.randn(n, 2, 1, generator=generator) * torch.ones(4)
    wrong = torch.rand(n, 3, generator=generator) < 0.1
    spoilt = torch.where(wrong, torch.randint(1, 4, (n, 3), generator=generator), labels[pick])
    score = torch.rand(n, generator=generator)
    return gc.Relations(image[pick], spoilt, boxes[pick] + jitter, score), annotated


def iou(a, b):
    wide = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    high = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))

    def area(x):
        return (x[2] - x[0]) * (x[3] - x[1])

    return wide * high / (area(a) + area(b) - wide * high)


def overlap(d, g, phrase):
    if not phrase:
        return min(iou(d[0], g[0]), iou(d[1], g[1]))

    def around(p):
        return [min(p[0][k], p[1][k]) for k in (0, 1)] + [max(p[0][k], p[1][k]) for k in (2, 3)]

    return iou(around(d), around(g))


@pytest.mark.parametrize("phrase", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_metrics_by_walking_down_the_list(seed, phrase):
    found, truth = random_lists(seed)
    dets = list(zip(*(t.double().tolist() for t in found), strict=True))
    gts = list(zip(*(t.double().tolist() for t in truth), strict=True))
    ks = [1, 2, 5, 100]
    hits = {k: set() for k in ks}
    for i in range(6):
        own = sorted((d for d in dets if d[0] == i), key=lambda d: -d[3])
        for k in ks:
            for d in own[:k]:
                for g, (gi, labels, boxes, _) in enumerate(gts):
                    if gi == i and labels == d[1] and overlap(d[2], boxes, phrase) >= 0.5:
                        hits[k].add(g)
    got = gc.recall_at_k(found, truth, ks, phrase=phrase)
    assert got.tolist() == pytest.approx([len(hits[k]) / 9 for k in ks])
    assert 0 < got[0] < 1
    present = {g[0] for g in gts}
    each = [
        np.mean(
            [np.mean([g in hits[k] for g in range(9) if gts[g][0] == i]) for i in sorted(present)]
        )
        for k in ks
    ]
    per_image = gc.recall_at_k(found, truth, ks, per_image=True, phrase=phrase)
    assert per_image.tolist() == pytest.approx(each)

    wmap, ap, weights = gc.weighted_map(found, truth, 3, phrase=phrase)
    for e in (1, 2, 3):
        total = sum(g[1][1] == e for g in gts)
        if not total:
            assert ap[e - 1].isnan()
            continue
        taken, curve, right = set(), [], 0
        own = sorted((d for d in dets if d[1][1] == e), key=lambda d: -d[3])
        for rank, d in enumerate(own, 1):
            same = [
                (overlap(d[2], g[2], phrase), n)
                for n, g in enumerate(gts)
                if g[0] == d[0] and g[1] == d[1]
            ]
            best = max(same, default=(0.0, -1), key=lambda c: c[0])
            if best[0] >= 0.5 and best[1] not in taken:
                taken.add(best[1])
                right += 1
            curve.append((right / total, right / rank))
        area, last = 0.0, 0.0
        for n, (recall, _) in enumerate(curve):
            area += (recall - last) * max(p for _, p in curve[n:])
            last = recall
        assert ap[e - 1].item() == pytest.approx(area)
        assert weights[e - 1].item() == pytest.approx(total / 9)
    assert wmap.item() == pytest.approx(float((ap.nan_to_num() * weights).sum()))


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_that_of_scikit_learn(seed):
    """Every annotation is detected once, so that both count the same positives."""
    found, truth = random_lists(seed, images=40, truth=40, distinct=True)
    found = found._replace(
        boxes=truth.boxes[torch.randperm(40, generator=torch.Generator().manual_seed(seed))]
    )
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    boxes = torch.cat([truth.boxes, truth.boxes + 1000])
    image = torch.cat([truth.image, truth.image])
    labels = torch.cat([truth.labels, truth.labels[order]])
    score = torch.rand(80, generator=torch.Generator().manual_seed(seed + 9))
    found = gc.Relations(image, labels, boxes, score)
    _, ap, _ = gc.weighted_map(found, truth, 3, interpolated=False)
    true = torch.arange(80) < 40
    # Two annotations of one image with equal labels and boxes that overlap would share a detection.
    for e in (1, 2, 3):
        own = labels[:, 1] == e
        expected = average_precision_score(true[own].numpy(), score[own].numpy())
        assert ap[e - 1].item() == pytest.approx(expected)
    assert (gc.weighted_map(found, truth, 3)[1] >= ap - 1e-12).all()  # the envelope lies above


def test_metrics_of_nothing_found():
    _, truth = random_lists(0)
    nothing = gc.Relations(
        torch.zeros(0).long(), torch.zeros(0, 3).long(), torch.zeros(0, 2, 4), torch.zeros(0)
    )
    assert gc.recall_at_k(nothing, truth, [1, 50]).tolist() == [0, 0]
    wmap, ap, weights = gc.weighted_map(nothing, truth, 3)
    assert wmap == 0
    assert (ap[weights > 0] == 0).all()


def test_top_relations_by_sorting():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(2, 3, 4, 5, generator=generator).softmax(-1)
    subj_cls, obj_cls = torch.randint(9, (2, 3)), torch.randint(9, (2, 4))
    subj_boxes = torch.cat([torch.rand(2, 3, 2), 1 + torch.rand(2, 3, 2)], -1)
    obj_boxes = torch.cat([torch.rand(2, 4, 2), 1 + torch.rand(2, 4, 2)], -1)
    ps, po = torch.rand(2, 3, generator=generator), torch.rand(2, 4, generator=generator)
    mask = torch.rand(2, 3, 4, generator=generator) < 0.6
    got = gc.top_relations(
        p, subj_cls, obj_cls, subj_boxes, obj_boxes,
        subj_prob=ps, obj_prob=po, mask=mask, k=7, predicates_per_pair=2,
    )  # fmt: skip
    expected = []
    for b in range(2):
        rows = []
        for s in range(3):
            for o in range(4):
                if mask[b, s, o]:
                    best = sorted(range(1, 5), key=lambda e: -p[b, s, o, e])[:2]
                    rows += [(float(p[b, s, o, e] * ps[b, s] * po[b, o]), s, e, o) for e in best]
        expected += [(b, *row) for row in sorted(rows, reverse=True)[:7]]
    assert got.image.tolist() == [row[0] for row in expected]
    assert got.score.tolist() == pytest.approx([row[1] for row in expected])
    assert got.labels.tolist() == [
        [int(subj_cls[b, s]), e, int(obj_cls[b, o])] for b, _, s, e, o in expected
    ]
    for boxes, (b, _, s, _, o) in zip(got.boxes, expected, strict=True):
        assert torch.equal(boxes, torch.stack([subj_boxes[b, s], obj_boxes[b, o]]))


# --------------------------------------------------------------------------------------------------
# Procedural scenes
# --------------------------------------------------------------------------------------------------


def test_scenes_are_what_they_say():
    scenes = scene_graphs(300, nuisance=0.0, generator=torch.Generator().manual_seed(0))
    related, rivals = scenes.predicates > 0, scenes.rivals
    assert (related.sum(-1) == 1).all()
    assert not (related & (rivals > 0)).any()
    assert (((rivals == 1).sum(-1) == 2) & ((rivals == 2).sum(-1) == 2)).all()
    of = scenes.object_classes[:, None].expand_as(rivals)
    meant = of[related].view(300, 4, 1).expand_as(rivals)
    assert (of == meant)[rivals == 1].all()
    assert (of != meant)[rivals == 2].all()
    cues = scenes.union_features
    for kind, (contact, pose) in {0: (0, 0), 1: (0, 3), 2: (3, 0)}.items():
        chosen = cues[(rivals == kind) & ~related][:, :2].mean(0)
        torch.testing.assert_close(chosen, torch.tensor([contact, pose]).float(), atol=0.1, rtol=0)
    torch.testing.assert_close(
        cues[related][:, :2].mean(0), torch.full((2,), 3.0), atol=0.1, rtol=0
    )
    shaken = scene_graphs(300, nuisance=2.0, generator=torch.Generator().manual_seed(0))
    offset = (shaken.union_features - cues)[..., :2]
    assert offset.std(2).max() < 1e-5  # one offset for all pairs of a subject
    assert offset[:, :, 0].std() == pytest.approx(2.0, rel=0.1)
    assert (scenes.object_boxes[..., 2:] > scenes.object_boxes[..., :2]).all()


def test_scene_options():
    bare = scene_graphs(2, subjects=1, instance_rivals=0, proximal_rivals=0, clutter=0, noise_dim=0)
    assert bare.predicates.shape == (2, 1, 1)
    assert (bare.predicates > 0).all()
    assert bare.union_features.shape == (2, 1, 1, 2)
    for options in ({"subjects": 5}, {"nuisance": -1}, {"object_classes": 1}, {"clutter": -1}):
        with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected"):
            scene_graphs(2, **options)


# --------------------------------------------------------------------------------------------------
# Visual Genome's files
# --------------------------------------------------------------------------------------------------


def write_visual_genome(folder):
    """Three photographs: a test image with a relation, one without, and one of the training split."""
    h5py, image = pytest.importorskip("h5py"), pytest.importorskip("PIL.Image")
    (folder / "VG_100K").mkdir()
    for number in (7, 8, 9):
        image.new("RGB", (512, 256), (255, 0, number)).save(folder / f"VG_100K/{number}.jpg")
    (folder / "image_data.json").write_text(
        json.dumps([{"image_id": i} for i in (7, 1592, 8, 9)])  # the second cannot be decoded
    )
    with h5py.File(folder / "VG-SGG.h5", "w") as file:
        file["split"] = np.array([2, 2, 0])
        file["img_to_first_box"], file["img_to_last_box"] = np.array([0, 2, 5]), np.array([1, 4, 6])
        file["img_to_first_rel"], file["img_to_last_rel"] = (
            np.array([0, -1, 1]),
            np.array([0, -1, 1]),
        )
        file["labels"] = np.array([[1], [150], [3], [4], [5], [6], [7]])
        file["boxes_1024"] = np.array([[512, 256, 200, 100]] + [[10, 10, 4, 4]] * 6)
        file["relationships"], file["predicates"] = (
            np.array([[1, 0], [5, 6]]),
            np.array([[50], [3]]),
        )


def test_visual_genome_files(tmp_path):
    write_visual_genome(tmp_path)
    test = VisualGenomeRelations(tmp_path, "test")
    assert len(test) == 1  # the other test image has no relation
    photo = test[0]
    assert photo.image.shape == (3, 256, 512)
    torch.testing.assert_close(
        photo.image[:, 0, 0], torch.tensor([1, 0, 7 / 255]), atol=0.02, rtol=0
    )
    assert photo.boxes[0].tolist() == [206, 103, 306, 153]  # stored at twice the image's size
    assert photo.classes.tolist() == [0, 149]
    assert photo.relations.tolist() == [[1, 0, 50]]
    assert VisualGenomeRelations(tmp_path, "val").graph(0)[1].tolist() == [[0, 1, 3]]
    assert len(VisualGenomeRelations(tmp_path, "train")) == 0
    (tmp_path / "empty/VG_100K").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="VG-SGG"):
        VisualGenomeRelations(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"^split: expected"):
        VisualGenomeRelations(tmp_path, "all")


# --------------------------------------------------------------------------------------------------
# The chapter's full profile, on a stand-in for torchvision: a VGG-16 of few channels
# --------------------------------------------------------------------------------------------------


class Photographs(list):
    """Annotated photographs in the form of VisualGenomeRelations: 3 classes, 2 predicates."""

    num_classes, num_predicates = 3, 2

    def graph(self, index):
        return self[index].classes, self[index].relations


def photographs(count):
    generator = torch.Generator().manual_seed(count)
    made = Photographs()
    for _ in range(count):
        corner = torch.rand(4, 2, generator=generator) * 40
        made.append(
            RelationImage(
                torch.rand(3, 60, 80, generator=generator),
                torch.cat([corner, corner + 5 + torch.rand(4, 2, generator=generator) * 15], 1),
                torch.randint(3, (4,), generator=generator),
                torch.tensor([[0, 1, 1], [2, 3, 2], [3, 3, 1]]),  # the last one is with itself
            )
        )
    return made


@pytest.fixture
def chapter(monkeypatch):
    """What the chapter's cells import and define, with a stand-in for torchvision; nothing is run."""
    body = [node for cell in cells_of("affinity/graphical_contrastive") for node in cell.tree.body]
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    names = {"device": torch.device("cpu"), "chapter": "affinity/graphical_contrastive", "own": ""}
    names |= {"seeds": [], "arms": {"cross-entropy": (0, 0, 0), "+ all three": (1, 0.5, 0.1)}}
    names["Path"] = Path  # of the set-up cell
    tree = ast.Module([node for node in body if isinstance(node, kept)], [])
    exec(compile(tree, "definitions", "exec"), names)
    compared = [
        n for n in body if isinstance(n, ast.If) and "compare_on_photographs" in ast.dump(n)
    ]
    names["full_profile"] = compile(ast.Module(compared, []), "full profile", "exec")
    fake_torchvision.install(monkeypatch)
    return names


def test_photograph_pairs(chapter):
    predicates = chapter["predicate_matrix"](torch.tensor([[0, 2, 5], [0, 2, 7], [1, 1, 3]]), 3)
    assert predicates.tolist() == [[0, 0, 7], [0, 0, 0], [0, 0, 0]]  # the last label; not itself
    predicates = torch.zeros(40, 40, dtype=torch.long)
    predicates[:10] = 1
    predicates.fill_diagonal_(0)
    pairs = chapter["sampled_pairs"](predicates)
    assert int(pairs.sum()) == 512
    assert not pairs.diagonal().any()
    assert int((pairs & (predicates > 0)).sum()) == 128
    few = chapter["sampled_pairs"](predicates[:5, :5])  # all of few
    assert few.equal(~torch.eye(5, dtype=torch.bool))


def test_photograph_prior(chapter):
    made = Photographs([photographs(1)[0]._replace(classes=torch.tensor([0, 1, 0, 0]))])
    prior = chapter["photograph_prior"](made)
    assert prior.shape == (3, 3, 3)
    # 0 with 1: two unrelated pairs, one of predicate 1, and one more unrelated.
    torch.testing.assert_close(prior[0, 1].exp(), torch.tensor([0.751, 0.251, 0.001]))
    torch.testing.assert_close(prior[2, 2].exp(), torch.tensor([1.001, 0.001, 0.001]))


def test_photograph_features(chapter, monkeypatch):
    seen = []

    def watched(maps, boxes, output_size, spatial_scale):
        seen.append((maps.shape, boxes[0]))
        assert (output_size, spatial_scale) == (7, 1 / 16)
        return sampled_roi(maps, boxes, output_size, spatial_scale)

    monkeypatch.setattr(sys.modules["torchvision.ops"], "roi_align", watched)
    features = chapter["PhotographFeatures"](thin_vgg16()).eval()
    photo = photographs(1)[0]
    scenes, spatial, pairs = features(photo)
    assert scenes.union_features.shape == (1, 4, 4, 6)
    assert spatial.shape == (1, 4, 4, 28)
    assert pairs[0].equal(~torch.eye(4, dtype=torch.bool))
    assert scenes.predicates[0].nonzero().tolist() == [[0, 1], [2, 3]]
    # 60 x 80 pixels become 800 x 1066, which 13 and a half blocks of two make 50 x 66.
    assert [tuple(shape) for shape, _ in seen] == [(1, 2, 50, 66)] * 2
    torch.testing.assert_close(seen[0][1], photo.boxes * (800 / 60))
    low, high = photo.boxes[:, :2], photo.boxes[:, 2:]
    first, second = pairs[0].nonzero().T
    around = torch.cat([low[first].minimum(low[second]), high[first].maximum(high[second])], 1)
    torch.testing.assert_close(seen[1][1], around * (800 / 60))
    (scenes.subject_features.sum() + scenes.union_features.sum()).backward()
    assert all(w.grad is None for w in features.body_det.parameters())
    graded = [w.grad is not None for w in features.body_rel.parameters()]
    assert graded == [False] * 8 + [True] * 18  # conv1 and conv2: four layers with a bias each
    # A long image is bounded by its longer side.
    seen.clear()
    wide = photo._replace(image=torch.rand(3, 20, 80))
    features(wide._replace(boxes=torch.tensor([[1.0, 2, 9, 8]]).repeat(4, 1)))
    assert tuple(seen[0][0]) == (1, 2, 333 // 16, 1333 // 16)


def test_photograph_optimiser(chapter):
    features = chapter["PhotographFeatures"](thin_vgg16())
    model = nn.Linear(2, 2)
    optimizer, scheduler = chapter["photograph_optimiser"](features, model, 9000)
    rates = {id(g["params"][0]): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    frozen = [*features.body_det.parameters(), *features.body_rel[:10].parameters()]
    assert not any(id(w) in rates for w in frozen)
    start = 1 / 3  # of the warm-up
    for layer, rate in (
        (features.body_rel[10], 0.001),
        (features.head_rel[0], 0.001),
        (features.head_subject[3], 0.01),
        (features.head_object[3], 0.01),
        (model, 0.01),
    ):
        assert rates[id(layer.weight)] == pytest.approx((rate * start, 1e-4))
        assert rates[id(layer.bias)] == pytest.approx((2 * rate * start, 0))
    (factor,) = {id(f): f for f in scheduler.lr_lambdas}.values()
    assert [factor(i) for i in (0, 250, 500, 5999, 6000, 8000)] == pytest.approx(
        [1 / 3, 2 / 3, 1, 1, 0.1, 0.01]
    )


def test_photographs_from_training_to_verdicts(chapter):
    recorded, trained, plain = [], [], chapter["PhotographFeatures"]
    chapter["settle"] = lambda *given, **options: recorded.append((given, options))
    chapter["PhotographFeatures"] = lambda vgg: trained.append(plain(vgg)) or trained[-1]
    chapter["compare_on_photographs"](
        thin_vgg16, photographs(2), photographs(1), [0, 1], "a note", epochs=1, batch=2, workers=0
    )
    assert [given[0].split(":")[1] for given, _ in recorded] == [
        "visual-genome-r20",
        "visual-genome-r50",
        "visual-genome-r100",
        "visual-genome-wmap",
    ]
    assert all(
        -100 <= given[3].mean <= 100 and given[3].n == 2 and options["note"] == "a note"
        for given, options in recorded
    )
    assert recorded[1][0][3].mean == 0  # 12 pairs an image: all are among the first 50, for both
    fresh = plain(thin_vgg16())
    for features in trained:
        for kept in ("body_det", "body_rel"):
            torch.testing.assert_close(
                getattr(features, kept)[:10].state_dict(), getattr(fresh, kept)[:10].state_dict()
            )
        assert not features.head_rel[0].weight.equal(fresh.head_rel[0].weight)
    # The same seed: same start and same batches, but another loss.
    assert not trained[0].head_rel[0].weight.equal(trained[2].head_rel[0].weight)


def test_full_profile_takes_the_papers_body_and_data(chapter, tmp_path):
    write_visual_genome(tmp_path)
    called = []
    chapter |= {"full": True, "data_root": str(tmp_path), "few": [0, 1, 2, 3]}
    chapter["compare_on_photographs"] = lambda *given, **options: called.append((given, options))
    exec(chapter["full_profile"], chapter)
    ((make_vgg, train, test, seeds, note), options), *_ = called
    assert make_vgg().weights == "pretrained"
    assert "ImageNet" in note
    assert (len(train), len(test), seeds, options) == (0, 1, [0, 1, 2], {})

    vgg = thin_vgg16()
    own = {
        name: value + 1 for name, value in vgg.state_dict().items() if "classifier.6" not in name
    }
    torch.save(own, tmp_path / "vgg16_detector.pth")
    exec(chapter["full_profile"], chapter)
    (make_vgg, *_, note), _ = called[1]
    assert "detector" in note
    loaded = make_vgg().state_dict()
    torch.testing.assert_close({name: loaded[name] for name in own}, own)
    torch.save({**own, "RPN.weight": torch.ones(1)}, tmp_path / "vgg16_detector.pth")
    with pytest.raises(RuntimeError, match=r"RPN\.weight"):
        make_vgg()


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------

PHI = torch.full((2, 3), 0.5)
POS = torch.tensor([[True, False, False], [False, True, False]])
Z = torch.zeros(2, 3, 4)
TRUTH = torch.tensor([[1, 0, 0], [0, 3, 0]])
SUBJ, OBJ = torch.tensor([0, 1]), torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    ("error", "name", "given_"),
    [
        (TypeError, "logits", {"logits": [0.0]}),
        (TypeError, "logits", {"logits": torch.zeros(3, dtype=torch.long)}),
        (ValueError, "logits", {"logits": torch.zeros(2, 1)}),
        (ValueError, "logits", {"logits": torch.tensor([0.0, torch.nan])}),
        (ValueError, "logits", {"logits": torch.tensor([0.0, torch.inf])}),
        (TypeError, "none_index", {"none_index": 0.0}),
        (TypeError, "none_index", {"none_index": True}),
        (ValueError, "none_index", {"none_index": 4}),
        (ValueError, "none_index", {"none_index": -1}),
    ],
)
def test_affinity_rejects(error, name, given_):
    with pytest.raises(error, match=f"^{name}: expected"):
        gc.pair_affinity(**({"logits": Z} | given_))


@pytest.mark.parametrize(
    ("error", "name", "given_"),
    [
        (TypeError, "phi", {"phi": POS}),
        (TypeError, "phi", {"phi": 0.5}),
        (ValueError, "phi", {"phi": PHI[0]}),
        (ValueError, "phi", {"phi": PHI * torch.nan}),
        (TypeError, "pos", {"pos": POS.float()}),
        (ValueError, "pos", {"pos": POS[:1]}),
        (ValueError, "pos", {"pos": POS.to("meta")}),
        (TypeError, "neg", {"neg": None}),
        (ValueError, "neg", {"neg": POS.T}),
        (ValueError, "neg", {"neg": POS}),
        (ValueError, "phi", {"phi": PHI + 1}),
        (ValueError, "phi", {"phi": PHI - 1}),
        (ValueError, "alpha", {"alpha": 1.1}),
        (ValueError, "alpha", {"alpha": -0.1}),
        (TypeError, "alpha", {"alpha": "0.2"}),
        (ValueError, "side", {"side": "subjects"}),
        (ValueError, "normalisation", {"normalisation": "code"}),
        (ValueError, "backend", {"backend": "fast"}),
        (TypeError, "group", {"group": 1}),
    ],
)
def test_losses_reject(error, name, given_):
    arguments = {"phi": PHI, "pos": POS, "neg": ~POS} | given_
    with pytest.raises(error, match=f"^{name}: expected"):
        gc.class_agnostic_loss(**arguments)
    with pytest.raises(error, match=f"^{name}: expected"):
        gc.entity_class_aware_loss(**arguments, subj_cls=SUBJ, obj_cls=OBJ)
    if given_.keys() <= {"pos", "neg"}:
        with pytest.raises(error, match=f"^{name}: expected"):
            gc.anchor_margin(**arguments)
    if not given_.keys() <= {"pos", "neg"}:
        with pytest.raises(error, match=f"^{name}: expected"):
            gc.predicate_class_aware_loss(**({"phi": PHI, "logits": Z, "gt_pred": TRUTH} | given_))


@pytest.mark.parametrize(
    ("error", "name", "given_"),
    [
        (TypeError, "subj_cls", {"subj_cls": SUBJ.float()}),
        (ValueError, "subj_cls", {"subj_cls": OBJ}),
        (ValueError, "subj_cls", {"subj_cls": SUBJ - 1}),
        (ValueError, "obj_cls", {"obj_cls": SUBJ}),
        (ValueError, "obj_cls", {"obj_cls": OBJ[None]}),
        (ValueError, "obj_cls", {"obj_cls": OBJ.to("meta")}),
    ],
)
def test_classes_reject(error, name, given_):
    classes = {"subj_cls": SUBJ, "obj_cls": OBJ} | given_
    with pytest.raises(error, match=f"^{name}: expected"):
        gc.entity_class_aware_loss(PHI, POS, ~POS, **classes)
    with pytest.raises(error, match=f"^{name}: expected"):
        gc.graphical_contrastive_loss(Z, TRUTH, **classes)


@pytest.mark.parametrize(
    ("error", "name", "given_"),
    [
        (TypeError, "gt_pred", {"gt_pred": TRUTH.float()}),
        (ValueError, "gt_pred", {"gt_pred": TRUTH.T}),
        (ValueError, "gt_pred", {"gt_pred": TRUTH + 1}),
        (ValueError, "gt_pred", {"gt_pred": TRUTH - 1}),
        (ValueError, "logits", {"logits": Z[0]}),
        (ValueError, "logits", {"logits": Z / 0}),
        (TypeError, "mask", {"mask": TRUTH}),
        (ValueError, "mask", {"mask": POS.T}),
        (ValueError, "include_none", {"include_none": 1}),
        (ValueError, "negatives", {"negatives": "all"}),
        (ValueError, "none_index", {"none_index": 9}),
    ],
)
def test_predicates_reject(error, name, given_):
    arguments = {"logits": Z, "gt_pred": TRUTH} | given_
    with pytest.raises(error, match=f"^{name}: expected"):
        gc.predicate_class_aware_loss(PHI, **arguments)
    with pytest.raises(error, match=f"^{name}: expected"):
        gc.graphical_contrastive_loss(**arguments, subj_cls=SUBJ, obj_cls=OBJ)


def test_the_total_rejects():
    for name, values in (
        ("weights", (1, 1)), ("weights", (1, -1, 1)), ("weights", 1.0), ("weights", (math.nan, 1, 1)),
        ("alphas", (0.2, 0.2)), ("alphas", (0.2, 0.2, 1.2)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            gc.graphical_contrastive_loss(Z, TRUTH, SUBJ, OBJ, **{name: values})
    with pytest.raises(ValueError, match=r"^dim: expected"):
        gc.anchor_margin(PHI, POS, ~POS, dim=0)


def test_parts_reject():
    good = torch.tensor([[0, 1, 2]])
    for error, name, call in (
        (TypeError, "triples", lambda: gc.frequency_prior(good.float(), 2, 2)),
        (ValueError, "triples", lambda: gc.frequency_prior(good[:, :2], 2, 2)),
        (ValueError, "triples", lambda: gc.frequency_prior(good, 1, 2)),
        (ValueError, "triples", lambda: gc.frequency_prior(good, 2, 1)),
        (ValueError, "C", lambda: gc.frequency_prior(good, 0, 2)),
        (ValueError, "smoothing", lambda: gc.frequency_prior(good, 2, 2, 0.0)),
        (TypeError, "b1", lambda: gc.box_delta([0, 0, 1, 1], torch.ones(4))),
        (ValueError, "b2", lambda: gc.box_delta(torch.ones(4), torch.ones(3))),
        (ValueError, "b1", lambda: gc.box_delta(torch.tensor([0.0, 0, 0, 1]), torch.ones(4))),
        (ValueError, "b2", lambda: gc.union_box(torch.ones(4), torch.ones(4) * torch.nan)),
        (ValueError, "b1", lambda: gc.union_box(torch.ones(4), torch.ones(4), fmt="xyxy")),
        (ValueError, "fmt", lambda: gc.box_delta(torch.ones(4), torch.ones(4), fmt="cxcywh")),
        (ValueError, "size", lambda: gc.normalised_box(torch.ones(4), (0, 1))),
        (ValueError, "size", lambda: gc.normalised_box(torch.ones(4), (1,))),
        (TypeError, "b", lambda: gc.normalised_box(torch.ones(4).int(), (1, 1))),
    ):
        with pytest.raises(error, match=f"^{name}: expected"):
            call()


def test_metrics_reject():
    found, truth = random_lists(0)
    p = torch.rand(1, 2, 3, 4)
    box = torch.tensor([0.0, 0, 1, 1])
    given_ = (SUBJ[None], OBJ[None], box.expand(1, 2, 4), box.expand(1, 3, 4))
    none = gc.Relations(*(t[:0] for t in truth))
    for error, name, call in (
        (TypeError, "found", lambda: gc.recall_at_k(list(found), truth, [1])),
        (ValueError, "truth", lambda: gc.recall_at_k(found, none, [1])),
        (ValueError, "truth", lambda: gc.weighted_map(found, none, 3)),
        (ValueError, "ks", lambda: gc.recall_at_k(found, truth, [0])),
        (ValueError, "ks", lambda: gc.recall_at_k(found, truth, [])),
        (ValueError, "iou_threshold", lambda: gc.recall_at_k(found, truth, [1], iou_threshold=0.0)),
        (ValueError, "iou_threshold", lambda: gc.weighted_map(found, truth, 3, iou_threshold=1.5)),
        (ValueError, "found.labels", lambda: gc.weighted_map(found, truth, 2)),
        (ValueError, "num_predicates", lambda: gc.weighted_map(found, truth, 0)),
        (ValueError, "found.boxes", lambda: gc.weighted_map(found._replace(boxes=found.boxes[1:]), truth, 3)),
        (ValueError, "truth.boxes", lambda: gc.weighted_map(found, truth._replace(boxes=truth.boxes * 0), 3)),
        (ValueError, "found.image", lambda: gc.recall_at_k(found._replace(image=found.image - 9), truth, [1])),
        (TypeError, "truth.labels", lambda: gc.recall_at_k(found, truth._replace(labels=truth.labels.float()), [1])),
        (ValueError, "probabilities", lambda: gc.top_relations(p[0], *given_)),
        (TypeError, "probabilities", lambda: gc.top_relations(p.long(), *given_)),
        (ValueError, "probabilities", lambda: gc.top_relations(p[..., :1], *given_)),
        (ValueError, "subj_cls", lambda: gc.top_relations(p, OBJ[None], *given_[1:])),
        (ValueError, "obj_boxes", lambda: gc.top_relations(p, *given_[:3], given_[2])),
        (ValueError, "k", lambda: gc.top_relations(p, *given_, k=0)),
        (ValueError, "predicates_per_pair", lambda: gc.top_relations(p, *given_, predicates_per_pair=0)),
        (ValueError, "mask", lambda: gc.top_relations(p, *given_, mask=POS)),
    ):  # fmt: skip
        with pytest.raises(error, match=f"^{name}: expected"):
            call()


# --------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_classes():
    from affnb.measure import peak_bytes

    phi = torch.rand(1, 200, 300, generator=torch.Generator().manual_seed(0))
    pos = torch.rand(phi.shape, generator=torch.Generator().manual_seed(1)) < 0.02

    def step(classes):
        subj, obj = torch.arange(200) % classes, torch.arange(300) % classes
        loss = gc.entity_class_aware_loss(
            phi.clone().requires_grad_(), pos, ~pos, subj[None], obj[None]
        )
        loss.backward()

    few, many = (peak_bytes(lambda c=c: step(c)) for c in (2, 1000))
    assert many == few
    assert many < 16 * phi.numel() * phi.element_size()

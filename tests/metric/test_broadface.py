"""BroadFace: margins, the blockwise cross-entropy, the queue, the compensation, the head, the measures."""

import copy
import math
import types
from collections import deque

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

import affnb.metric.broadface as module
from affnb.metric.broadface import (
    BroadFaceHead,
    EmbeddingQueue,
    arcface_logits,
    compensate,
    cosface_logits,
    drift_report,
    margin_cross_entropy,
    tar_at_far,
)
from tests.chapter_cells import fake_modules, run_cells
from tests.processes import message_of, run

DOUBLE = torch.float64
KINDS = ("arcface", "cosface")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def strided(x):
    """The same values with other strides."""
    return x.mT.contiguous().mT.repeat_interleave(2, -1)[..., ::2]


def draw_batch(rows, classes, dim, generator):
    e = torch.randn(rows, dim, generator=generator, dtype=DOUBLE)
    w = torch.randn(classes, dim, generator=generator, dtype=DOUBLE)
    return e, w, torch.randint(classes, (rows,), generator=generator)


@st.composite
def batches(draw):
    rows, classes = draw(st.sampled_from([0, 1, 2, 5, 7])), draw(st.sampled_from([1, 2, 3, 11]))
    dim = draw(st.sampled_from([1, 2, 3, 7]))
    e, w, y = draw_batch(rows, classes, dim, seeded(draw(st.integers(0, 2**31))))
    if dim == 1:
        # acos has no slope at the two angles that one dimension has; the reference can't go there.
        e, w = (torch.cat([x, 0.3 + x.abs()], 1) for x in (e, w))
    if draw(st.booleans()):
        e, w = strided(e), strided(w)
    return e, w, y


def loss_and_grads(function, e, w):
    e, w = (x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in (e, w))
    loss = function(e, w)
    return loss.detach(), *torch.autograd.grad(1.7 * loss, (e, w))


# --------------------------------------------------------------------------------------------------
# Logits and their cross-entropy
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [2**22, 1, 13])
@settings(max_examples=40, deadline=None)
@given(
    batches(),
    st.sampled_from(KINDS),
    st.sampled_from([1.0, 7.0, 64.0]),
    st.sampled_from([0.0, 0.2, 0.5]),
    st.sampled_from(["mean", "sum"]),
)
def test_cross_entropy_equals_reference(block, batch, kind, scale, margin, reduction):
    e, w, y = batch
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_CPU", block)
        for backend in ("auto", "reference"):
            options = {"scale": scale, "margin": margin, "kind": kind, "reduction": reduction}
            found.append(
                loss_and_grads(
                    lambda a, b, options=options, backend=backend: margin_cross_entropy(
                        a, b, y, **options, backend=backend
                    ),
                    e,
                    w,
                )
            )
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(batches(), st.sampled_from(KINDS))
def test_cross_entropy_is_that_of_the_logits(batch, kind):
    e, w, y = batch
    logits = {"arcface": arcface_logits, "cosface": cosface_logits}[kind]
    ours = loss_and_grads(
        lambda a, b: margin_cross_entropy(a, b, y, scale=16.0, margin=0.3, kind=kind), e, w
    )
    theirs = loss_and_grads(
        lambda a, b: (
            F.cross_entropy(logits(a, b, y, scale=16.0, margin=0.3), y, reduction="sum")
            / max(1, len(y))
        ),
        e,
        w,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    e, w, y = draw_batch(4, 3, 5, seeded(1))
    e, w = e.requires_grad_(), w.requires_grad_()
    options = {"scale": 3.0, "margin": 0.4, "kind": kind}
    logits = {"arcface": arcface_logits, "cosface": cosface_logits}[kind]
    assert gradcheck(lambda a, b: margin_cross_entropy(a, b, y, **options), (e, w))
    assert gradcheck(lambda a: margin_cross_entropy(a, w.detach(), y, **options), (e,))
    assert gradcheck(lambda b: margin_cross_entropy(e.detach(), b, y, **options), (w,))
    assert gradcheck(lambda a, b: logits(a, b, y, scale=3.0, margin=0.4), (e, w))
    assert gradgradcheck(lambda a, b: logits(a, b, y, scale=3.0, margin=0.4), (e, w))
    twice = {**options, "backend": "reference"}
    assert gradgradcheck(lambda a, b: margin_cross_entropy(a, b, y, **twice), (e, w))
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(margin_cross_entropy(e, w, y, **options), e, create_graph=True)


def test_gradient_penalty_where_embedding_and_identity_coincide():
    w = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    e = w.clone().requires_grad_()
    y = torch.tensor([0, 0])  # at 0 and at 90 degrees
    (grad,) = torch.autograd.grad(arcface_logits(e, w, y).sum(), e, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), e)[0].isfinite().all()


def test_peers_of_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    generator = seeded(3)
    e, w, y = draw_batch(40, 9, 6, generator)
    # Within the range in which the angle plus the margin stays below 180 degrees.
    theta = F.cosine_similarity(e, w[y]).acos()
    keep = theta < math.pi - 0.55
    e, y = e[keep], y[keep]
    assert len(y) > 30
    peers = {
        "arcface": (losses.ArcFaceLoss(9, 6, margin=math.degrees(0.5), scale=64), 0.5),
        "cosface": (losses.CosFaceLoss(9, 6, margin=0.35, scale=64), 0.35),
    }
    for kind, (peer, margin) in peers.items():
        with torch.no_grad():
            peer.W = nn.Parameter(w.T.clone())
        leaf = e.clone().requires_grad_()
        value = peer(leaf, y)
        expected = (value.detach(), *torch.autograd.grad(value, (leaf, peer.W)))
        found = loss_and_grads(
            lambda a, b, kind=kind, margin=margin: margin_cross_entropy(
                a, b, y, kind=kind, margin=margin
            ),
            e,
            w,
        )
        torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=0)
        torch.testing.assert_close(found[1] / 1.7, expected[1], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(found[2] / 1.7, expected[2].T, rtol=1e-7, atol=1e-9)


def test_the_continuation_is_the_peers_without_its_jump():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    peer = losses.ArcFaceLoss(1, 2, margin=math.degrees(0.5), scale=1)
    theta = torch.linspace(math.pi - 0.49, math.pi, 20, dtype=DOUBLE)
    theirs = peer.modify_cosine_of_target_classes(theta.cos())
    points = torch.stack([theta.cos(), theta.sin()], 1)
    ours = arcface_logits(
        points, torch.eye(2, dtype=DOUBLE)[:1], torch.zeros(20, dtype=torch.long), scale=1.0
    )[:, 0]
    gap = math.cos(0.5) - 1 + 0.5 * math.sin(0.5)
    torch.testing.assert_close(ours - theirs, torch.full_like(ours, gap))


@pytest.mark.parametrize("margin", [0.0, 0.2, 0.5, 1.5])
def test_target_logit_is_continuous_and_falls_with_the_angle(margin):
    theta = torch.linspace(0, math.pi, 20_001, dtype=DOUBLE)
    points = torch.stack([theta.cos(), theta.sin()], 1)
    axis, zeros = torch.eye(2, dtype=DOUBLE)[:1], torch.zeros(len(theta), dtype=torch.long)
    z = arcface_logits(points, axis, zeros, scale=1.0, margin=margin)[:, 0]
    assert (z.diff() <= 1e-12).all()
    assert z.diff().abs().max() < 1.1 * math.pi / 20_000
    inside = theta <= math.pi - margin
    torch.testing.assert_close(z[inside], (theta[inside] + margin).cos(), rtol=0, atol=2e-8)


def test_floor_chance_and_scale():
    """A classifier of opposite vectors reaches the floor; equal cosines give log C."""
    w = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=DOUBLE)
    y = torch.tensor([0])
    for scale in (1.0, 3.0, 64.0):
        loss = margin_cross_entropy(w[:1], w, y, scale=scale, margin=0.0)
        assert loss.item() == pytest.approx(math.log1p(math.exp(-2 * scale)), rel=1e-9)
    same = torch.ones(7, 2, dtype=DOUBLE)
    loss = margin_cross_entropy(w[:1], same, y, margin=0.0)
    assert loss.item() == pytest.approx(math.log(7), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_invariances(kind):
    e, w, y = draw_batch(6, 5, 4, seeded(5))
    options = {"kind": kind, "margin": 0.3, "scale": 10.0}
    loss, ge, gw = loss_and_grads(lambda a, b: margin_cross_entropy(a, b, y, **options), e, w)
    lengths = torch.rand(6, 1, generator=seeded(6), dtype=DOUBLE) + 0.5
    scaled = loss_and_grads(
        lambda a, b: margin_cross_entropy(a, b, y, **options), lengths * e, 3 * w
    )
    torch.testing.assert_close(scaled, (loss, ge / lengths, gw / 3))
    # Only directions count, so gradients are tangential.
    torch.testing.assert_close((ge * e).sum(1), torch.zeros(6, dtype=DOUBLE), atol=1e-12, rtol=0)
    torch.testing.assert_close((gw * w).sum(1), torch.zeros(5, dtype=DOUBLE), atol=1e-12, rtol=0)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=seeded(7), dtype=DOUBLE)).Q
    torch.testing.assert_close(margin_cross_entropy(e @ turn, w @ turn, y, **options), loss)
    order = torch.randperm(5, generator=seeded(8))
    where = order.argsort()
    torch.testing.assert_close(margin_cross_entropy(e, w[order], where[y], **options), loss)
    # The mean over a union does not depend on how often all of it is repeated.
    doubled = margin_cross_entropy(torch.cat([e, e]), w, torch.cat([y, y]), **options)
    torch.testing.assert_close(doubled, loss)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_coinciding_and_opposite_vectors_have_finite_gradients(kind, dtype):
    w = torch.eye(3, dtype=dtype)
    for e in (w, -w, w + 1e-7):
        found = loss_and_grads(
            lambda a, b: margin_cross_entropy(a, b, torch.arange(3), kind=kind), e, w
        )
        assert all(x.isfinite().all() for x in found)
        leaf = e.clone().requires_grad_()
        logits = arcface_logits if kind == "arcface" else cosface_logits
        logits(leaf, w, torch.arange(3)).sum().backward()
        assert leaf.grad.isfinite().all()


def test_single_class_and_empty_batch():
    w = torch.randn(1, 3, generator=seeded())
    found = loss_and_grads(
        lambda a, b: margin_cross_entropy(a, b, torch.zeros(2, dtype=torch.long)),
        torch.randn(2, 3, generator=seeded(1)),
        w,
    )
    assert all((x == 0).all() for x in found)
    none = torch.zeros(0, dtype=torch.long)
    for reduction in ("mean", "sum"):
        found = loss_and_grads(
            lambda a, b, reduction=reduction: margin_cross_entropy(a, b, none, reduction=reduction),
            torch.zeros(0, 3),
            w,
        )
        assert all((x == 0).all() for x in found)
    assert arcface_logits(torch.zeros(0, 3), w, none).shape == (0, 1)


def test_no_logits_are_held(monkeypatch):
    from affnb.measure import peak_bytes

    monkeypatch.setattr(module, "_BLOCK_CPU", 2**16)
    e, w, y = (
        x.float() if x.is_floating_point() else x for x in draw_batch(2048, 500, 8, seeded())
    )
    leaf = w.requires_grad_()
    held = peak_bytes(lambda: margin_cross_entropy(e, leaf, y).backward())
    assert held < 2048 * 500 * 4 / 2  # half of one matrix of logits


def test_large_scale_neither_overflows_nor_cancels():
    w, y = torch.eye(4), torch.arange(4)
    for leaf in (w, w.clone().requires_grad_()):  # with the gradient, and without
        options = {"kind": "cosface", "margin": 0.0}
        far = margin_cross_entropy(-leaf, w, y, scale=1e4, **options)
        assert far.item() == pytest.approx(1e4 + math.log(3), rel=1e-6)
        near = margin_cross_entropy(leaf, w, y, scale=12.0, **options)
        assert near.item() == pytest.approx(math.log1p(3 * math.exp(-12)), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    e, w, y = draw_batch(6, 5, 4, seeded(2))
    expected = margin_cross_entropy(e.to(dtype), w, y)
    leaf = e.to(dtype).requires_grad_()
    loss = margin_cross_entropy(leaf, w.float(), y.int())
    loss.backward()
    assert loss.dtype == torch.float32
    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype):
        inside = margin_cross_entropy(e.float(), w.float(), y)
        logits = arcface_logits(e.float(), w.float(), y)
        head = BroadFaceHead(5, 4, 8)
        embeddings = nn.Linear(4, 4)(e.float())
        assert embeddings.dtype == dtype
        for _ in range(2):
            step = head(embeddings, y)
    assert torch.equal(inside, margin_cross_entropy(e.float(), w.float(), y))
    assert logits.dtype == step.dtype == torch.float32
    step.backward()
    assert head.weight.grad.isfinite().all()


# --------------------------------------------------------------------------------------------------
# Compensation
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_compensation_by_row_and_its_invariances(rows):
    generator = seeded(4)
    e, old, new = (torch.randn(rows, 3, generator=generator, dtype=DOUBLE) for _ in range(3))
    moved = compensate(e, old, new)
    for i in range(rows):
        ratio = e[i].norm() / old[i].norm()
        torch.testing.assert_close(moved[i], e[i] + ratio * (new[i] - old[i]))
    torch.testing.assert_close(compensate(e, 5 * old, 5 * new), moved)
    torch.testing.assert_close(compensate(strided(e), strided(old), strided(new)), moved)
    torch.testing.assert_close(compensate(2 * old, old, new), 2 * new)
    torch.testing.assert_close(compensate(e, old, old), e)
    # The error is the change of the offset from the scaled identity vector.
    now = torch.randn(rows, 3, generator=generator, dtype=DOUBLE)
    c = e.norm(dim=1, keepdim=True) / old.norm(dim=1, keepdim=True)
    torch.testing.assert_close(moved - now, (e - c * old) - (now - c * new))
    leaves = [x.requires_grad_() for x in (e, old, new)]
    assert gradcheck(compensate, leaves)


def test_common_rotation_changes_the_error_by_twice_the_sine():
    psi = torch.linspace(0, math.pi, 50, dtype=DOUBLE)
    spin = torch.tensor(
        [[math.cos(0.7), math.sin(0.7)], [-math.sin(0.7), math.cos(0.7)]], dtype=DOUBLE
    )
    past = 2 * torch.stack([psi.cos(), psi.sin()], 1)
    old = torch.tensor([[3.0, 0.0]], dtype=DOUBLE).expand(50, 2)
    after = (compensate(past, old, old @ spin) - past @ spin).norm(dim=1)
    before = (past - past @ spin).norm(dim=1)
    torch.testing.assert_close(after / before, 2 * (psi / 2).sin(), rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------------------
# The queue
# --------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 7), st.lists(st.integers(0, 7), max_size=8), st.integers(0, 2**31))
def test_queue_is_a_deque(size, counts, seed):
    generator = seeded(seed)
    queue, expected = EmbeddingQueue(size, 2), deque(maxlen=size)
    for step, count in enumerate(counts):
        e, w = torch.rand(2, count, 2, generator=generator) + 0.1
        y = torch.randint(9, (count,), generator=generator)
        if count > size:
            with pytest.raises(ValueError, match=r"^embeddings: expected at most"):
                queue.enqueue(e, w, y)
            return
        queue.enqueue(e, w, y)
        expected.extend((step, *row) for row in zip(e, w, y.tolist(), strict=True))
    valid = queue.valid()
    assert len(queue) == len(expected) == int(valid.sum())
    own = sorted(
        (a, tuple(e), tuple(w), y)
        for a, e, w, y in zip(
            queue.age[valid].tolist(),
            queue.embeddings[valid].tolist(),
            queue.proxies[valid].tolist(),
            queue.labels[valid].tolist(),
            strict=True,
        )
    )
    theirs = sorted(
        (len(counts) - step, tuple(e.tolist()), tuple(w.tolist()), y) for step, e, w, y in expected
    )
    assert own == theirs
    assert (queue.labels[~valid] == -1).all()
    assert (queue.age[~valid] == 0).all()


def test_queue_keeps_its_place_in_a_state_dict():
    queue = EmbeddingQueue(5, 2)
    queue.enqueue(torch.ones(3, 2), torch.ones(3, 2), torch.tensor([0, 1, 2]))
    other = EmbeddingQueue(5, 2)
    other.load_state_dict(queue.state_dict())
    for q in (queue, other, copy.deepcopy(queue)):
        q.enqueue(torch.ones(3, 2), torch.ones(3, 2), torch.tensor([3, 4, 5]))
        assert sorted(q.labels.tolist()) == [1, 2, 3, 4, 5]
        assert len(q) == 5
    assert "size=5, dim=2" in repr(queue)


def test_queue_holds_constants_in_its_own_dtype():
    queue = EmbeddingQueue(2, 2).double()
    e = torch.ones(1, 2, dtype=torch.float16, requires_grad=True)
    queue.enqueue(e, e, torch.tensor([0], dtype=torch.int32))
    assert queue.embeddings.dtype == DOUBLE
    assert not queue.embeddings.requires_grad
    assert queue.to(torch.float32).proxies.dtype == torch.float32


# --------------------------------------------------------------------------------------------------
# The head
# --------------------------------------------------------------------------------------------------


def run_head(head, steps=9, seed=0, rate=0.1):
    """Losses and gradients of a few steps, with a linear encoder; and the queue before each."""
    generator = seeded(seed)
    mix = torch.randn(4, 3, generator=generator, dtype=DOUBLE).requires_grad_()
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator, dtype=DOUBLE))
    trace = []
    optimizer = torch.optim.SGD([mix, head.weight], lr=rate)
    for _ in range(steps):
        x = torch.randn(4, 4, generator=generator, dtype=DOUBLE)
        y = torch.randint(len(head.weight), (4,), generator=generator)
        before = head.weight.detach().clone()
        e = x @ mix
        losses = head.losses(e, y)
        optimizer.zero_grad()
        sum(losses).backward()
        gradients = mix.grad.clone(), head.weight.grad.clone()
        trace.append((e.detach(), y, before, *(v.detach() for v in losses), *gradients))
        optimizer.step()
    return trace


@pytest.mark.parametrize("compensated", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_head_step_by_step(compensated, kind):
    """Equations 7 to 9 with a deque, against the head: losses and both gradients."""
    head = BroadFaceHead(
        5, 3, 10, scale=9.0, margin=0.3, kind=kind, compensate=compensated
    ).double()
    kept = deque(maxlen=10)
    for e, y, w, encoder, classifier, mix_grad, w_grad in run_head(head):
        star = [a + (a.norm() / b.norm() * (w[c] - b) if compensated else 0) for a, b, c in kept]
        union = torch.stack([*e, *star])
        labels = torch.tensor([*y.tolist(), *(c for _, _, c in kept)])
        options = {"scale": 9.0, "margin": 0.3, "kind": kind, "backend": "reference"}
        leaf = w.clone().requires_grad_()
        expected = margin_cross_entropy(union, leaf, labels, **options)
        torch.testing.assert_close(classifier, expected.detach())
        torch.testing.assert_close(w_grad, torch.autograd.grad(expected, leaf)[0])
        torch.testing.assert_close(encoder, margin_cross_entropy(e, w, y, **options))
        assert mix_grad.abs().max() > 0
        kept.extend(zip(e, w[y], y.tolist(), strict=True))
    assert len(head.queue) == 10


def test_gradients_go_where_they_belong():
    torch.manual_seed(0)
    head = BroadFaceHead(5, 3, 8)
    e, y = torch.randn(4, 3, requires_grad=True), torch.arange(4)
    head(e, y)
    losses = head.losses(e, y)
    assert not any(x.requires_grad for x in head.past())
    assert torch.autograd.grad(
        losses.encoder, head.weight, allow_unused=True, retain_graph=True
    ) == (None,)
    assert torch.autograd.grad(losses.classifier, e, allow_unused=True, retain_graph=True) == (
        None,
    )
    # The encoder's gradient is that of plain ArcFace.
    expected = torch.autograd.grad(margin_cross_entropy(e, head.weight.detach(), y), e)[0]
    torch.testing.assert_close(torch.autograd.grad(losses.encoder, e)[0], expected)


def test_no_queue_and_the_first_step_are_plain():
    generator = seeded(1)
    e, y = torch.randn(4, 3, generator=generator), torch.tensor([0, 0, 2, 1])
    for size in (0, 8):
        head = BroadFaceHead(5, 3, size)
        first = head.losses(e, y)
        assert torch.equal(first.encoder, first.classifier)
        for _ in range(3):
            head(e, y)
        assert len(head.queue) == size
    # Doubling the batch by means of the queue does not change the mean.
    head = BroadFaceHead(5, 3, 4, compensate=False)
    head(e, y)
    losses = head.losses(e, y)
    torch.testing.assert_close(losses.encoder, losses.classifier)


def test_evaluation_is_the_plain_loss_and_leaves_the_queue_alone():
    head = BroadFaceHead(5, 3, 8)
    e, y = torch.randn(4, 3, generator=seeded()), torch.tensor([0, 0, 2, 1])
    head(e, y)
    head.eval()
    many = e.repeat(5, 1), y.repeat(5)  # larger than the queue: fine here
    torch.testing.assert_close(head(*many), margin_cross_entropy(*(many[0], head.weight), many[1]))
    assert len(head.queue) == 0
    head.train()
    head(e, y)
    assert len(head.queue) == 4
    assert "compensate=True" in repr(head)


def test_the_identity_vectors_enqueued_are_those_before_the_step():
    head = BroadFaceHead(3, 2, 4).double()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    e, y = torch.tensor([[0.6, 0.8]], dtype=DOUBLE), torch.tensor([1])
    head(e, y)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]]))  # the "step"
    head(e, y)
    assert head.queue.proxies[0].tolist() == [0.0, 1.0]
    torch.testing.assert_close(head.past()[0], e + torch.tensor([[2.0, -1.0]], dtype=DOUBLE))


def test_compiles():
    head, plain = BroadFaceHead(5, 3, 8), None
    plain = copy.deepcopy(head)
    compiled = torch.compile(lambda e, y: head(2 * e, y), backend="eager")
    functional = torch.compile(lambda e, w, y: margin_cross_entropy(2 * e, w, y), backend="eager")
    for step in range(3):
        e, y = torch.randn(4, 3, generator=seeded(step), requires_grad=True), torch.arange(4)
        torch.testing.assert_close(compiled(e, y), plain(2 * e, y))
        torch.testing.assert_close(
            functional(e, head.weight, y), margin_cross_entropy(2 * e, head.weight, y)
        )


# --------------------------------------------------------------------------------------------------
# Measures
# --------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**31), st.booleans())
def test_tar_at_far_is_scikit_learns(genuine, impostor, seed, ties):
    metrics = pytest.importorskip("sklearn.metrics")
    generator = seeded(seed)
    scores = torch.randn(genuine + impostor, generator=generator, dtype=DOUBLE)
    if ties:
        scores = scores.round()
    same = torch.zeros(genuine + impostor, dtype=torch.bool)
    same[torch.randperm(len(same), generator=generator)[:genuine]] = True
    fpr, tpr, _ = metrics.roc_curve(same.numpy(), scores.numpy(), drop_intermediate=False)
    far = [0.0, 1 / impostor, 0.1, 0.29, 0.5, 1.0]
    expected = [max(t for f, t in zip(fpr, tpr, strict=True) if f <= rate) for rate in far]
    torch.testing.assert_close(tar_at_far(scores, same, far), torch.tensor(expected, dtype=DOUBLE))


def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


def test_drift_report_by_entry():
    generator = seeded(2)
    queue = EmbeddingQueue(7, 3)
    for count in (3, 0, 2):
        e, w = torch.randn(2, count, 3, generator=generator)
        queue.enqueue(e, w, torch.randint(4, (count,), generator=generator))
    current = torch.randn(7, 3, generator=generator)
    current[5:] = torch.nan  # empty entries are not looked at
    weight = torch.randn(4, 3, generator=generator)
    report = drift_report(queue, current, weight)
    assert report.age.tolist() == [1, 3]
    for k, rows in enumerate((range(3, 5), range(3))):
        columns = [[], [], [], []]
        for i in rows:
            past, old = queue.embeddings[i].double(), queue.proxies[i].double()
            now, new = current[i].double(), weight[queue.labels[i]].double()
            moved = past + past.norm() / old.norm() * (new - old)
            values = (
                1 - cosine(past, now),
                1 - cosine(moved, now),
                cosine(moved - past, now - past),
                math.degrees(math.acos(cosine(past, old))),
            )
            for column, number in zip(columns, values, strict=True):
                column.append(number)
        for field, column in zip(report[1:], columns, strict=True):
            assert field[k].item() == pytest.approx(sum(column) / len(column), abs=1e-6)


def test_tracking_decides_whether_an_entry_improves():
    """The criterion: closer if and only if the cosine exceeds half the ratio of the lengths."""
    generator = seeded(9)
    past, old, new, now = (torch.randn(500, 3, generator=generator, dtype=DOUBLE) for _ in range(4))
    moved = compensate(past, old, new)
    rho, drift = moved - past, now - past
    helps = (moved - now).norm(dim=1) < drift.norm(dim=1)
    rule = F.cosine_similarity(rho, drift) > rho.norm(dim=1) / (2 * drift.norm(dim=1))
    assert torch.equal(helps, rule)
    assert 50 < helps.sum() < 450


def test_nothing_moved():
    queue = EmbeddingQueue(2, 2)
    queue.enqueue(torch.eye(2), torch.eye(2), torch.tensor([0, 1]))
    report = drift_report(queue, torch.eye(2), torch.eye(2))
    assert [v.item() for v in report] == [1, 0, 0, 0, 0]


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------

E, W, Y = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 3])
NAN = torch.tensor([[1.0, 2.0, torch.nan], [1.0, 1.0, 1.0]])
ZERO = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
HUGE = torch.full((2, 3), 3e38)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "embeddings: expected a torch.Tensor", lambda: margin_cross_entropy([1.0], W, Y)),
        (TypeError, "embeddings: expected a floating", lambda: margin_cross_entropy(E.int(), W, Y)),
        (TypeError, "weight: expected a floating", lambda: margin_cross_entropy(E, W.int(), Y)),
        (ValueError, "weight: expected 2 dimensions", lambda: margin_cross_entropy(E, W[0], Y)),
        (ValueError, r"embeddings: expected shape \(\*, 3\)", lambda: margin_cross_entropy(torch.ones(2, 2), W, Y)),
        (TypeError, "labels: expected an integer", lambda: margin_cross_entropy(E, W, Y.float())),
        (ValueError, "labels: expected length 2", lambda: margin_cross_entropy(E, W, Y[:1])),
        (ValueError, r"labels: expected values in \[0, 4\), got 4", lambda: margin_cross_entropy(E, W, Y + 1)),
        (ValueError, "labels: expected the device of weight", lambda: margin_cross_entropy(E, W, Y.to("meta"))),
        (ValueError, "embeddings: expected finite", lambda: margin_cross_entropy(NAN, W, Y)),
        (ValueError, "weight: expected finite", lambda: margin_cross_entropy(E, NAN, Y % 2)),
        (ValueError, "embeddings: expected vectors whose norm", lambda: margin_cross_entropy(HUGE, W, Y)),
        (ValueError, "embeddings: expected rows longer than 0, got row 1", lambda: margin_cross_entropy(ZERO, W, Y)),
        (ValueError, "weight: expected rows longer than 0, got row 1", lambda: margin_cross_entropy(E, ZERO, Y % 2)),
        (ValueError, "scale: expected", lambda: margin_cross_entropy(E, W, Y, scale=0)),
        (ValueError, "margin: expected", lambda: margin_cross_entropy(E, W, Y, margin=-0.1)),
        (ValueError, "margin: expected radians", lambda: arcface_logits(E, W, Y, margin=1.6)),
        (ValueError, "margin: expected", lambda: cosface_logits(E, W, Y, margin=math.inf)),
        (TypeError, "scale: expected a real", lambda: cosface_logits(E, W, Y, scale="64")),
        (ValueError, "kind: expected one of", lambda: margin_cross_entropy(E, W, Y, kind="sphereface")),
        (ValueError, "reduction: expected one of", lambda: margin_cross_entropy(E, W, Y, reduction="none")),
        (ValueError, "backend: expected one of", lambda: margin_cross_entropy(E, W, Y, backend="triton")),
        (TypeError, "group: expected", lambda: margin_cross_entropy(E, W, Y, group="world")),
        (ValueError, "embeddings: expected 2 dim", lambda: compensate(E[0], E[0], E[0])),
        (TypeError, "proxy_old: expected a torch", lambda: compensate(E, None, E)),
        (TypeError, "proxy_new: expected a floating", lambda: compensate(E, E, E.int())),
        (ValueError, "proxy_new: expected shape", lambda: compensate(E, E, W)),
        (ValueError, "proxy_old: expected rows longer than 0.1", lambda: compensate(E, 0.01 * E, E, eps=0.1)),
        (ValueError, "embeddings: expected rows longer", lambda: compensate(ZERO, E, E)),
        (ValueError, "proxy_new: expected finite", lambda: compensate(E, E, NAN)),
        (ValueError, "proxy_old: expected the device", lambda: compensate(E, E.to("meta"), E)),
        (ValueError, "eps: expected", lambda: compensate(E, E, E, eps=-1)),
        (TypeError, "size: expected an integer", lambda: EmbeddingQueue(2.0, 2)),
        (TypeError, "size: expected an integer", lambda: EmbeddingQueue(True, 2)),
        (ValueError, "size: expected an integer >= 0", lambda: EmbeddingQueue(-1, 2)),
        (ValueError, "dim: expected an integer >= 1", lambda: EmbeddingQueue(2, 0)),
        (ValueError, "embeddings: expected shape", lambda: EmbeddingQueue(4, 2).enqueue(E, E, Y)),
        (ValueError, "proxies: expected shape", lambda: EmbeddingQueue(4, 3).enqueue(E, W, Y)),
        (TypeError, "proxies: expected a floating", lambda: EmbeddingQueue(4, 3).enqueue(E, E.int(), Y)),
        (ValueError, "labels: expected values >= 0", lambda: EmbeddingQueue(4, 3).enqueue(E, E, Y - 1)),
        (ValueError, "labels: expected length", lambda: EmbeddingQueue(4, 3).enqueue(E, E, Y[:1])),
        (ValueError, "proxies: expected rows longer", lambda: EmbeddingQueue(4, 3).enqueue(E, ZERO, Y)),
        (ValueError, "embeddings: expected the device", lambda: EmbeddingQueue(4, 3).enqueue(E.to("meta"), E, Y)),
        (ValueError, "embeddings: expected at most 1 rows", lambda: EmbeddingQueue(1, 3).enqueue(E, E, Y)),
        (ValueError, "embeddings: expected at most 1 rows", lambda: BroadFaceHead(4, 3, 1)(E, Y)),
        (ValueError, "labels: expected values", lambda: BroadFaceHead(3, 3, 4)(E, Y)),
        (ValueError, "embeddings: expected rows longer", lambda: BroadFaceHead(4, 3, 4)(ZERO, Y)),
        (ValueError, "num_classes: expected", lambda: BroadFaceHead(0, 3)),
        (TypeError, "dim: expected", lambda: BroadFaceHead(4, "3")),
        (ValueError, "queue_size: expected", lambda: BroadFaceHead(4, 3, -1)),
        (TypeError, "compensate: expected a bool", lambda: BroadFaceHead(4, 3, compensate=1)),
        (ValueError, "margin: expected radians", lambda: BroadFaceHead(4, 3, margin=2.0)),
        (ValueError, "backend: expected", lambda: BroadFaceHead(4, 3, backend="fast")),
        (TypeError, "group: expected", lambda: BroadFaceHead(4, 3, group=1)),
        (ValueError, "same: expected pairs of both", lambda: tar_at_far(E[0], torch.ones(3).bool(), [0.1])),
        (ValueError, "same: expected pairs of both", lambda: tar_at_far(E[0], torch.zeros(3).bool(), [0.1])),
        (TypeError, "same: expected dtype torch.bool", lambda: tar_at_far(E[0], torch.ones(3), [0.1])),
        (ValueError, "same: expected shape", lambda: tar_at_far(E[0], torch.ones(2).bool(), [0.1])),
        (ValueError, "similarities: expected finite", lambda: tar_at_far(NAN[0], NAN[0] > 1, [0.1])),
        (ValueError, r"far: expected a number in \[0, 1\]", lambda: tar_at_far(E[0], E[0] > 1, [1.5])),
        (ValueError, "far: expected", lambda: tar_at_far(E[0], E[0] > 1, [-0.5])),
        (TypeError, "far: expected", lambda: tar_at_far(E[0], E[0] > 1, 0.1)),
        (TypeError, "queue: expected an EmbeddingQueue", lambda: drift_report(None, E, W)),
        (ValueError, "queue: expected at least one", lambda: drift_report(EmbeddingQueue(2, 3), E, W)),
    ],
)  # fmt: skip
def test_bad_input(error, message, call):
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_drift_report_rejects():
    queue = EmbeddingQueue(2, 3)
    queue.enqueue(E, E, Y)
    for error, message, arguments in (
        (ValueError, "current: expected shape", (W, W)),
        (ValueError, "weight: expected shape", (E, torch.ones(4, 2))),
        (ValueError, "weight: expected a row for each label, up to 3, got 2", (E, E)),
        (ValueError, "current: expected rows longer", (ZERO, W)),
        (TypeError, "current: expected a floating", (E.int(), W)),
    ):
        with pytest.raises(error, match=f"^{message}"):
            drift_report(queue, *arguments)


# --------------------------------------------------------------------------------------------------
# Several processes
# --------------------------------------------------------------------------------------------------


def shards(step):
    """Six rows, of which the first rank has two (so that the queues differ, too)."""
    e, _, y = draw_batch(6, 5, 3, seeded(100 + step))
    return [(e[:2], y[:2]), (e[2:], y[2:])]


def work(rank, world):
    group = dist.group.WORLD
    _, w, _ = draw_batch(1, 5, 3, seeded(7))
    e, y = shards(0)[rank]
    seen = {}
    for reduction in ("mean", "sum"):
        for backend in ("auto", "reference"):
            options = {"reduction": reduction, "backend": backend, "scale": 8.0, "group": group}
            seen[reduction, backend] = loss_and_grads(
                lambda a, b, options=options: margin_cross_entropy(a, b, y, **options), e, w
            )
    none = slice(0, 0) if rank == 0 else slice(None)  # an empty shard
    seen["empty"] = loss_and_grads(
        lambda a, b: margin_cross_entropy(a, b, y[none], group=group), e[none], w
    )

    head = BroadFaceHead(5, 3, 8, scale=8.0, group=group).double()
    with torch.no_grad():
        head.weight.copy_(w)
    ddp = DistributedDataParallel(head, broadcast_buffers=False)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for step in range(4):
        e, y = (t.clone() for t in shards(step)[rank])
        e.requires_grad_()
        loss = ddp(e, y)
        optimizer.zero_grad()
        (world * loss).backward()
        seen["step", step] = (loss.detach(), e.grad / world, head.weight.grad.clone())
        optimizer.step()
    wrong = y + 5 if rank else y
    seen["bad"] = message_of(lambda: head(e.detach(), wrong))
    seen["bad function"] = message_of(
        lambda: margin_cross_entropy(e.detach(), w, wrong, group=group)
    )
    return seen


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run(work, 2, tmp_path_factory.mktemp("broadface"))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_global_loss_is_that_of_one_process(ranks, reduction, backend):
    _, w, _ = draw_batch(1, 5, 3, seeded(7))
    e, y = (torch.cat(parts) for parts in zip(*shards(0), strict=True))
    expected = loss_and_grads(
        lambda a, b: margin_cross_entropy(a, b, y, reduction=reduction, scale=8.0), e, w
    )
    for rank, rows in ((0, slice(0, 2)), (1, slice(2, 6))):
        loss, e_grad, _ = ranks[rank][reduction, backend]
        torch.testing.assert_close(loss, expected[0])
        torch.testing.assert_close(e_grad, expected[1][rows])
    parts = sum(seen[reduction, backend][2] for seen in ranks)
    torch.testing.assert_close(parts, expected[2])


def test_an_empty_shard(ranks):
    _, w, _ = draw_batch(1, 5, 3, seeded(7))
    e, y = shards(0)[1]
    expected = loss_and_grads(lambda a, b: margin_cross_entropy(a, b, y), e, w)
    torch.testing.assert_close(ranks[0]["empty"][0], expected[0])
    assert (ranks[0]["empty"][2] == 0).all()
    torch.testing.assert_close(ranks[1]["empty"], expected)


def test_head_over_ranks_is_one_head_with_all_queues(ranks):
    """A rank's queue is its own: eight rows of two, and eight of four, in one process."""
    _, w, _ = draw_batch(1, 5, 3, seeded(7))
    queues = [deque(maxlen=8), deque(maxlen=8)]
    for step in range(4):
        parts = shards(step)
        e, y = (torch.cat(both) for both in zip(*parts, strict=True))
        past = [entry for queue in queues for entry in queue]
        star = [a + a.norm() / b.norm() * (w[c] - b) for a, b, c in past]
        labels = torch.tensor([*y.tolist(), *(c for _, _, c in past)])
        leaf, own = w.clone().requires_grad_(), e.clone().requires_grad_()
        encoder = margin_cross_entropy(own, w, y, scale=8.0, backend="reference")
        classifier = margin_cross_entropy(
            torch.stack([*e, *star]), leaf, labels, scale=8.0, backend="reference"
        )
        e_grad, w_grad = torch.autograd.grad(encoder + classifier, (own, leaf))
        for rank, rows in ((0, slice(0, 2)), (1, slice(2, 6))):
            loss, own_grad, weight_grad = ranks[rank]["step", step]
            torch.testing.assert_close(loss, (encoder + classifier).detach())
            torch.testing.assert_close(own_grad, e_grad[rows])
            torch.testing.assert_close(weight_grad, w_grad)
        for queue, (a, c) in zip(queues, parts, strict=True):
            queue.extend(zip(a, w[c], c.tolist(), strict=True))
        w = w - 0.1 * w_grad


def test_an_error_on_one_rank_is_raised_on_all(ranks):
    for case in ("bad", "bad function"):
        assert ranks[1][case].startswith("ValueError: labels: expected values in [0, 5)")
        assert ranks[0][case].startswith("ValueError: group: expected valid input on every rank")


# --------------------------------------------------------------------------------------------------
# The chapter's full profile, on a stand-in for the data and the ResNet
# --------------------------------------------------------------------------------------------------


def write_products(folder, classes=40):
    """Write pictures of twice as many products in the layout of Stanford Online Products."""
    files = folder / "Stanford_Online_Products"
    files.mkdir(parents=True)
    for split, first in (("train", 1), ("test", 1 + classes)):
        lines = ["image_id class_id super_class_id path"]
        for k in range(2 * classes):
            shape = (12, 10) if k % 5 == 0 else (12, 10, 3)  # some of the real ones are grey
            values = np.random.default_rng(k).integers(0, 255, shape, dtype=np.uint8)
            Image.fromarray(values).save(files / f"{split}_{k}.png")
            lines.append(f"{k + 1} {first + k // 2} 1 {split}_{k}.png")
        (files / f"Ebay_{split}.txt").write_text("\n".join(lines) + "\n")


def fake_torchvision(monkeypatch):
    """Let ``import torchvision`` find a ResNet-50's ends, and transforms that give 8 x 8 pixels."""

    class Trunk(nn.Module):
        def __init__(self, weights):
            super().__init__()
            assert weights == "pretrained"
            self.fc = nn.Linear(192, 1000)

        def forward(self, x):
            return self.fc(x.flatten(1))

    class Compose:
        def __init__(self, steps):
            self.steps = steps

        def __call__(self, x):
            for step in self.steps:
                x = step(x)
            return x

    def resize(*size):
        return lambda picture: picture.resize((8, 8))

    transforms = {
        "Compose": Compose,
        "RGB": lambda: lambda picture: picture.convert("RGB"),
        "Resize": resize,
        "CenterCrop": resize,
        "RandomResizedCrop": resize,
        "RandomHorizontalFlip": resize,
        "ToImage": lambda: lambda picture: torch.from_numpy(np.array(picture)).permute(2, 0, 1),
        "ToDtype": lambda dtype, scale: lambda x: x.to(dtype) / 255,
        "Normalize": lambda mean, sd: lambda x: (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(sd)[:, None, None],
    }  # fmt: skip
    weights = types.SimpleNamespace(IMAGENET1K_V2="pretrained")
    fake_modules(
        monkeypatch,
        {
            "torchvision": {},
            "torchvision.models": {"resnet50": Trunk, "ResNet50_Weights": weights},
            "torchvision.transforms": {"v2": types.SimpleNamespace(**transforms)},
        },
    )


def test_full_profile(tmp_path, monkeypatch):
    pytest.importorskip("pytorch_metric_learning")
    write_products(tmp_path)
    fake_torchvision(monkeypatch)
    optimizers = []

    def fit(real, step, batches, optimizer):
        optimizers.append(optimizer)
        return real(step, batches, optimizer)

    names, verdicts = run_cells(
        "metric/broadface",
        monkeypatch,
        define=("losses_by_identity", "examples", "gap_of", "StubProducts"),
        call=("ask", "settle", "display"),
        small={
            "Products.batch": "4",
            "Products.dim": "16",
            "loader.workers": "0",
            "warm_up": "2",
            "steps": "24",
            "largest": "40",
            "seeds": "[seed + 40, seed + 41]",
            "sizes": "(8, 40, 80)",
        },
        fit=fit,
        data_root=str(tmp_path),
    )

    world = names["worlds"][40]
    assert (world.classes, len(world.parts["unseen"])) == (40, 80)
    x, y = next(world.batches(1, 0))
    assert x.shape == (4, 3, 8, 8)
    assert 0 <= int(y.min()) <= int(y.max()) < 40
    assert names["device"].type == "cpu"
    assert len(verdicts) == 16
    # The paper's rates: the encoder's, and the classifier's relative to it.
    assert all(
        g["momentum"] == 0.9 and g["weight_decay"] == 5e-4
        for o in optimizers
        for g in o.param_groups
    )
    rates = {tuple(g["lr"] for g in o.param_groups) for o in optimizers if len(o.param_groups) > 1}
    assert rates == {(5e-3, 5e-3), (5e-4, 5e-4), (5e-3, 5e-2)}
    assert {name for name, *_ in names["gaps"]} == {"settled", "moving", "fast classifier"}

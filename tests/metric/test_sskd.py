"""SSKD's losses against the printed equations, their selection rule, and many processes against one."""

import copy
import importlib
import math
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from affnb.metric import (
    SSHead,
    SSKDLoss,
    SSKDOutputs,
    affinity_transfer_loss,
    contrastive_prediction_loss,
    cosine_affinity,
    error_rank,
    freeze,
    info_nce,
    patch_nce_loss,
    selective_rows,
    soft_target_loss,
)
from tests.chapter_cells import fake_modules, run_cells
from tests.processes import message_of, rows_of, run

module = importlib.import_module("affnb.metric.sskd")


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def value_and_grads(loss, *leaves):
    leaves = [
        leaf.detach().clone(memory_format=torch.preserve_format).requires_grad_() for leaf in leaves
    ]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def assert_same(got, wanted, tol=1e-10):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol, check_dtype=False)


# The equations, written once more, pair by pair.


def cosine(a, b):
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def enumerated_cosines(rows, cols):
    return torch.stack([torch.stack([cosine(a, b) for b in cols]) for a in rows])


def enumerated_softmax(row, tau):
    return torch.exp(row / tau) / torch.exp(row / tau).sum()


def enumerated_soft(s, t, tau, kind, rows):
    total = s.sum() * 0
    for i in rows:
        p_s, p_t = enumerated_softmax(s[i], tau), enumerated_softmax(t[i], tau)
        for k in range(len(p_s)):
            ratio = p_t[k] / p_s[k] if kind == "kl" else 1 / p_s[k]
            total = total + tau**2 * p_t[k] * torch.log(ratio)
    return total


def enumerated_selection(A, own, percent, rounding=math.ceil):
    rank = [1 + sum(bool(v > row[o]) for v in row) for row, o in zip(A, own, strict=True)]
    wrong = sorted((i for i, r in enumerate(rank) if r > 1), key=lambda i: rank[i])
    kept = [i for i, r in enumerate(rank) if r == 1] + wrong[: rounding(len(wrong) * percent / 100)]
    return rank, sorted(kept)


@st.composite
def embeddings(draw_):
    """Student's and teacher's rows and columns of any strides, several rows an original, a block size."""
    n, views = draw_(st.sampled_from([1, 2, 3, 5, 7])), draw_(st.sampled_from([1, 2]))
    d, e = draw_(st.sampled_from([1, 2, 5])), draw_(st.sampled_from([2, 3]))
    seed = draw_(st.integers(0, 2**31 - 9))
    sizes = ((n * views, d), (n, d), (n * views, e), (n, e))
    tensors = [draw(*size, seed=seed + k) for k, size in enumerate(sizes)]
    if draw_(st.booleans()):  # other strides
        tensors = [t.T.contiguous().T for t in tensors]
    own = torch.arange(n).repeat_interleave(views) if views > 1 else None
    return (
        tensors,
        own,
        draw_(st.sampled_from([0.1, 0.5, 4.0])),
        draw_(st.sampled_from([1, 6, 2**19])),
    )


@pytest.fixture
def block(monkeypatch):
    return lambda entries: monkeypatch.setattr(module, "_BLOCK_CPU", entries)


@settings(max_examples=30, deadline=None)
@given(embeddings(), st.sampled_from([0, 50, 75, 100]), st.sampled_from(["kl", "ce"]))
def test_transfer_is_the_equation(case, percent, kind):
    (rows, cols, t_rows, t_cols), own, tau, entries = case
    index = torch.arange(len(rows)) if own is None else own
    A_t = enumerated_cosines(t_rows, t_cols)
    _, kept = enumerated_selection(A_t, index, percent)

    def literal(r, c):
        return enumerated_soft(enumerated_cosines(r, c), A_t, tau, kind, kept) / max(1, len(kept))

    wanted = value_and_grads(literal, rows, cols)
    before, module._BLOCK_CPU = module._BLOCK_CPU, entries
    try:
        for backend in ("auto", "reference"):

            def ours(r, c, backend=backend):
                return affinity_transfer_loss(
                    r, c, t_rows, t_cols, tau, keep_percent=percent, kind=kind, positive=own, backend=backend
                )  # fmt: skip

            assert_same(value_and_grads(ours, rows, cols), wanted)
    finally:
        module._BLOCK_CPU = before


@settings(max_examples=20, deadline=None)
@given(embeddings())
def test_contrastive_prediction_is_the_equation(case):
    (rows, cols, _, _), own, tau, entries = case
    if len(cols) < 2:
        return
    index = torch.arange(len(rows)) if own is None else own

    def literal(r, c):
        A = enumerated_cosines(r, c)
        return -sum(
            enumerated_softmax(a, tau)[o].log() for a, o in zip(A, index, strict=True)
        ) / len(r)

    wanted = value_and_grads(literal, rows, cols)
    before, module._BLOCK_CPU = module._BLOCK_CPU, entries
    try:
        for backend in ("auto", "reference"):
            for form in (
                lambda r, c, b=backend: contrastive_prediction_loss(r, c, tau, positive=own, backend=b),
                lambda r, c, b=backend: info_nce(cosine_affinity(r, c, backend=b), tau, positive=own, backend=b),
            ):  # fmt: skip
                assert_same(value_and_grads(form, rows, cols), wanted)
    finally:
        module._BLOCK_CPU = before


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([(1, 1), (1, 3), (5, 2), (7, 3)]),
    st.sampled_from(["kl", "ce"]),
    st.sampled_from(["batchmean", "sum", "none"]),
    st.integers(0, 2**31 - 9),
)
def test_soft_targets_are_the_equation(shape, kind, reduction, seed):
    s, t = 3 * draw(*shape, seed=seed), 3 * draw(*shape, seed=seed + 1)
    mask = draw(shape[0], seed=seed + 2) > 0
    kept = mask.nonzero()[:, 0].tolist()

    def literal(v):
        if reduction == "none":
            zero = v.sum() * 0
            return torch.stack(
                [
                    enumerated_soft(v, t, 2.0, kind, [i]) if i in kept else zero
                    for i in range(len(v))
                ]
            )
        return enumerated_soft(v, t, 2.0, kind, kept) / (
            max(1, len(kept)) if reduction == "batchmean" else 1
        )

    for backend in ("auto", "reference"):
        ours = value_and_grads(
            lambda v, b=backend: soft_target_loss(v, t, 2.0, reduction, kind, mask, backend=b), s
        )
        assert_same(ours, value_and_grads(literal, s))


# Peers.


def test_is_kl_div():
    s, t = draw(9, 5), draw(9, 5, seed=1)

    def peer(v):
        targets = (t / 4).log_softmax(1)
        return 16 * F.kl_div(
            (v / 4).log_softmax(1), targets, reduction="batchmean", log_target=True
        )

    assert_same(value_and_grads(lambda v: soft_target_loss(v, t, 4.0), s), value_and_grads(peer, s))


def test_is_patch_nce_of_unit_vectors():
    rows, cols = draw(40, 6), draw(40, 6, seed=1)

    def peer(r, c):
        r, c = F.normalize(r, dim=1)[None], F.normalize(c, dim=1)[None]
        return patch_nce_loss(r, c, temperature=0.5, detach_key=False)

    assert_same(
        value_and_grads(lambda r, c: contrastive_prediction_loss(r, c, 0.5), rows, cols),
        value_and_grads(peer, rows, cols),
    )


def test_is_cosine_similarity():
    rows, cols = draw(5, 3), draw(4, 3, seed=1)
    assert_same(
        value_and_grads(cosine_affinity, rows, cols),
        value_and_grads(lambda r, c: F.cosine_similarity(r[:, None], c[None], dim=-1), rows, cols),
    )


def test_one_selection_as_published():
    """Sort the scores, find the own column's place, keep right ones and int(wrong * 0.75) more."""
    A = draw(64, 64) + 2 * torch.eye(64)
    place = (A.argsort(1, descending=True) == torch.arange(64)[:, None]).long().argmax(1)
    assert torch.equal(place + 1, error_rank(A))
    wrong = int((place > 0).sum())
    kept = selective_rows(error_rank(A), 75, rounding="floor")
    assert 0 < wrong < 64
    assert int(kept.sum()) == 64 - wrong + int(wrong * 0.75)
    assert kept[place == 0].all()
    assert place[kept].max() <= place[~kept].min()


# Properties.


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 6), max_size=12), st.sampled_from([0, 10, 50, 75, 100]), st.booleans()
)
def test_selection_is_the_rule(ranks, percent, floor):
    wrong = sorted((i for i, r in enumerate(ranks) if r > 1), key=lambda i: ranks[i])
    share = len(wrong) * percent / 100
    wanted = {i for i, r in enumerate(ranks) if r == 1} | set(
        wrong[: math.floor(share) if floor else math.ceil(share)]
    )
    kept = selective_rows(
        torch.tensor(ranks, dtype=torch.long), percent, rounding="floor" if floor else "ceil"
    )
    assert set(kept.nonzero()[:, 0].tolist()) == wanted


def test_ties_are_no_mistake():
    assert error_rank(torch.ones(4, 4)).tolist() == [1] * 4
    assert selective_rows(torch.tensor([2, 2, 2, 2]), 50).tolist() == [True, True, False, False]


def test_invariances():
    rows, cols, t_rows, t_cols = (
        draw(7, 4),
        draw(7, 4, seed=1),
        draw(7, 3, seed=2),
        draw(7, 3, seed=3),
    )
    value = affinity_transfer_loss(rows, cols, t_rows, t_cols)
    Q, scale = torch.linalg.qr(draw(4, 4, seed=4))[0], draw(7, 1, seed=5).exp()
    assert_same([affinity_transfer_loss(scale * rows @ Q, cols @ Q, t_rows, t_cols)], [value])
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    permuted = (v[order] for v in (rows, cols, t_rows, t_cols))
    assert_same([affinity_transfer_loss(*permuted, keep_percent=100)], [affinity_transfer_loss(rows, cols, t_rows, t_cols, keep_percent=100)])  # fmt: skip
    s, t = draw(5, 3), draw(5, 3, seed=1)
    assert_same([soft_target_loss(s + 7, t - 3, 2.0)], [soft_target_loss(s, t, 2.0)])


def test_gradient_is_orthogonal_and_grows_as_vectors_shrink():
    rows, cols = draw(5, 3), draw(5, 3, seed=1)
    _, grad, _ = value_and_grads(lambda r, c: contrastive_prediction_loss(r, c, 0.5), rows, cols)
    assert (grad * rows).sum(1).abs().max() < 1e-12
    _, small, _ = value_and_grads(
        lambda r, c: contrastive_prediction_loss(r, c, 0.5), rows / 100, cols
    )
    assert_same([small], [100 * grad])


def test_confidence_ceiling():
    simplex = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    B = (cosine_affinity(simplex, simplex) / 0.5).softmax(1)
    assert B[0, 0].item() == pytest.approx(1 / (1 + math.exp(-4)))


def test_kinds_share_gradients_and_differ_by_the_entropy():
    s, t = draw(6, 4), draw(6, 4, seed=1)
    kl = value_and_grads(lambda v: soft_target_loss(v, t, 3.0), s)
    ce = value_and_grads(lambda v: soft_target_loss(v, t, 3.0, kind="ce"), s)
    p = (t / 3).softmax(1)
    assert_same([ce[0] - kl[0], ce[1]], [-9 * (p * p.log()).sum() / 6, kl[1]])


def test_gradcheck():
    rows, cols = (draw(3, 2, seed=k).requires_grad_() for k in (0, 1))
    teacher = draw(3, 2, seed=2), draw(3, 2, seed=3)
    assert torch.autograd.gradcheck(
        lambda r, c: affinity_transfer_loss(r, c, *teacher), (rows, cols)
    )
    assert torch.autograd.gradcheck(
        lambda r, c: contrastive_prediction_loss(r, c, 0.5), (rows, cols)
    )
    for loss in (
        lambda r, c: affinity_transfer_loss(r, c, *teacher, backend="reference"),
        lambda r, c: info_nce(cosine_affinity(r, c), 0.5),
    ):
        assert torch.autograd.gradgradcheck(loss, (rows, cols))
    assert torch.autograd.gradgradcheck(lambda r: soft_target_loss(r, teacher[0], 0.5), (rows,))


def test_a_second_derivative_is_refused():
    rows, cols = draw(3, 2).requires_grad_(), draw(3, 2, seed=1)
    loss = contrastive_prediction_loss(rows, cols, 0.5)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, rows, create_graph=True)


def test_the_teacher_is_a_constant():
    teacher = [draw(4, 3, seed=k).requires_grad_() for k in (2, 3)]
    student = [draw(4, 3, seed=k).requires_grad_() for k in (0, 1)]
    for backend in ("auto", "reference"):
        affinity_transfer_loss(*student, *teacher, backend=backend).backward()
        soft_target_loss(student[0], teacher[0], 2.0, backend=backend).backward()
    assert all(t.grad is None for t in teacher)


# Degenerate input, precision, compilation.


def test_no_direction_is_zero_with_zero_gradient():
    for size in (0.0, 1e-12):
        rows, cols = (size * torch.ones(3, 2)).requires_grad_(), torch.eye(3, 2)
        for backend in ("auto", "reference"):
            A = cosine_affinity(rows, cols, backend=backend)
            assert A.abs().max() == 0
            (grad,) = torch.autograd.grad(A.sum(), rows)
            assert grad.abs().max() == 0
        loss = affinity_transfer_loss(rows, cols, draw(3, 2), draw(3, 2, seed=1))
        (grad,) = torch.autograd.grad(loss, rows)
        assert math.isfinite(loss.item())
        assert grad.abs().max() == 0


def test_nothing_kept_is_zero_with_zero_gradient():
    rows = torch.eye(3).roll(1, 0).requires_grad_()
    for backend in ("auto", "reference"):
        loss = affinity_transfer_loss(
            rows, torch.eye(3), torch.eye(3).roll(1, 0), torch.eye(3), keep_percent=0, backend=backend
        )  # fmt: skip
        (grad,) = torch.autograd.grad(loss, rows)
        assert (loss.item(), grad.abs().max().item()) == (0, 0)
    logits = draw(2, 3).requires_grad_()
    loss = soft_target_loss(logits, logits + 1, 2.0, row_mask=torch.zeros(2, dtype=torch.bool))
    (grad,) = torch.autograd.grad(loss, logits)
    assert (loss.item(), grad.abs().max().item()) == (0, 0)


def test_empty_batches_are_zero():
    rows = torch.zeros(0, 3, requires_grad=True)
    for loss in (
        affinity_transfer_loss(rows, rows, torch.zeros(0, 2), torch.zeros(0, 2)),
        affinity_transfer_loss(
            rows, rows, torch.zeros(0, 2), torch.zeros(0, 2), backend="reference"
        ),
        contrastive_prediction_loss(rows, rows, 0.5),
        soft_target_loss(rows, torch.zeros(0, 3), 2.0),
    ):
        assert loss.item() == 0
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    tensors = [draw(16, 8, seed=k, dtype=torch.float32).to(dtype) for k in range(4)]
    wide = [t.float() for t in tensors]
    with torch.autocast("cpu", dtype):
        got = [
            affinity_transfer_loss(*tensors),
            contrastive_prediction_loss(*tensors[:2], 0.5),
            info_nce(cosine_affinity(*tensors[:2]), 0.5),
            soft_target_loss(*tensors[:2], 4.0),
        ]
    wanted = [
        affinity_transfer_loss(*wide),
        contrastive_prediction_loss(*wide[:2], 0.5),
        info_nce(cosine_affinity(*wide[:2]), 0.5),
        soft_target_loss(*wide[:2], 4.0),
    ]
    assert all(g.dtype == torch.float32 for g in got)
    assert_same(got, wanted, 1e-6)


def test_compiles():
    def everything(r, c, t_r, t_c):
        A = cosine_affinity(r, c)
        keep = selective_rows(error_rank(A))
        return soft_target_loss(A, cosine_affinity(t_r, t_c), 0.5, row_mask=keep) + info_nce(A, 0.5)

    teacher = draw(6, 3, seed=2), draw(6, 3, seed=3)
    rows, cols = draw(6, 4), draw(6, 4, seed=1)
    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    streamed = torch.compile(affinity_transfer_loss, backend="aot_eager")
    for plain, fast in ((everything, compiled), (affinity_transfer_loss, streamed)):
        assert_same(
            value_and_grads(lambda r, c, f=fast: f(r, c, *teacher), rows, cols),
            value_and_grads(lambda r, c, f=plain: f(r, c, *teacher), rows, cols),
        )


def test_large_batches_make_no_matrix():
    from affnb.measure import peak_bytes

    tensors = [torch.randn(3000, 8, requires_grad=k < 2) for k in range(4)]
    assert peak_bytes(lambda: affinity_transfer_loss(*tensors).backward()) < 3000 * 3000 * 4 / 2


# The criterion, the head, freezing.


def test_criterion_is_the_weighted_sum():
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    student = SSKDOutputs(make(4, 5), make(8, 5), make(4, 3), make(8, 3))
    teacher = SSKDOutputs(make(4, 5), make(8, 5), make(4, 6), make(8, 6))
    labels, own = torch.tensor([0, 4, 1, 1]), torch.arange(4).repeat_interleave(2)
    for backend in ("auto", "reference"):
        got = SSKDLoss(backend=backend)(student, teacher, labels, own)
        terms = (
            F.cross_entropy(student.logits, labels),
            soft_target_loss(student.logits, teacher.logits, 4.0),
            affinity_transfer_loss(student.transformed_z, student.z, teacher.transformed_z, teacher.z, positive=own),
            soft_target_loss(student.transformed_logits, teacher.transformed_logits, 4.0),
        )  # fmt: skip
        assert_same(got[1:], terms)
        assert_same([got.loss], [0.1 * terms[0] + 0.9 * terms[1] + 10 * terms[2] + 2.7 * terms[3]])
    only = SSKDLoss((0, 1, 0, 0))(SSKDOutputs(student.logits), SSKDOutputs(teacher.logits), labels)
    assert_same([only.loss], [terms[1]])
    assert "keep_percent=75" in repr(SSKDLoss())


def test_head_has_two_layers():
    head = SSHead(3, 5, 2)
    assert [tuple(p.shape) for p in head.parameters()] == [(5, 3), (5,), (2, 5), (2,)]
    assert head(torch.zeros(4, 3)).shape == (4, 2)


def test_freeze_holds_everything_and_gives_it_back():
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout())
    network[0].bias.requires_grad_(False)
    network[2].eval()
    state = copy.deepcopy(network.state_dict())
    x = torch.randn(5, 3, requires_grad=True)
    with freeze(network) as frozen:
        frozen(x).sum().backward()
        assert not any(p.requires_grad for p in network.parameters())
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert x.grad is not None
    assert [p.requires_grad for p in network[0].parameters()] == [True, False]
    assert [m.training for m in network] == [True, True, False]
    with pytest.raises(KeyError), freeze(network):
        raise KeyError
    assert network[1].training


# Messages.

E3 = torch.eye(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cosine_affinity([1.0], E3), TypeError, "z_rows: expected a torch.Tensor"),
        (lambda: cosine_affinity(E3.long(), E3), TypeError, "z_rows: expected a floating-point"),
        (lambda: cosine_affinity(E3, E3[0]), ValueError, "z_cols: expected 2 dimensions"),
        (lambda: cosine_affinity(E3, E3[:, :2]), ValueError, "z_cols: expected vectors as long as"),
        (lambda: cosine_affinity(E3[:0], E3), ValueError, "z_rows: expected at least one row"),
        (lambda: cosine_affinity(E3, E3, eps=0), ValueError, "eps: expected a finite number > 0"),
        (lambda: cosine_affinity(E3, E3 * math.nan), ValueError, "z_cols: expected finite values"),
        (lambda: cosine_affinity(E3, E3 * 1e38 * 3), ValueError, "z_cols: expected vectors whose norm"),
        (lambda: cosine_affinity(E3, E3.to("meta")), ValueError, "z_cols: expected the device of z_rows"),
        (lambda: cosine_affinity(E3, E3, backend="fast"), ValueError, "backend: expected one of"),
        (lambda: info_nce(E3[:2], 0.5), ValueError, r"A: expected shape \(..., N, N\)"),
        (lambda: info_nce(E3, 0), ValueError, "tau: expected a finite number > 0"),
        (lambda: info_nce(E3, "0"), TypeError, "tau: expected a real number"),
        (lambda: info_nce(E3[:1, :1], 1), ValueError, "A: expected a row and at least two columns"),
        (lambda: info_nce(E3, 1, positive=torch.tensor([0, 1, 3])), ValueError, r"positive: expected values in \[0, 3\)"),
        (lambda: info_nce(E3, 1, positive=torch.tensor([0, 1])), ValueError, "positive: expected length 3"),
        (lambda: info_nce(E3, 1, positive=E3[0]), TypeError, "positive: expected an integer dtype"),
        (lambda: info_nce(E3 / 0, 1), ValueError, "A: expected finite values"),
        (lambda: error_rank(E3[:2]), ValueError, "A: expected as many rows as columns"),
        (lambda: selective_rows(torch.tensor([1]), 101), ValueError, r"keep_percent: expected a number in \[0, 100\], got 101"),
        (lambda: selective_rows(torch.tensor([1]), -1), ValueError, r"keep_percent: expected a number in \[0, 100\], got -1"),
        (lambda: selective_rows(torch.tensor([0])), ValueError, "rank: expected ranks >= 1"),
        (lambda: selective_rows(torch.tensor([1.0])), TypeError, "rank: expected an integer dtype"),
        (lambda: selective_rows(torch.tensor([1]), rounding="up"), ValueError, "rounding: expected one of"),
        (lambda: soft_target_loss(E3, E3[:2], 1), ValueError, r"teacher_logits: expected shape \(3, 3\)"),
        (lambda: soft_target_loss(E3, E3, -1), ValueError, "tau: expected a finite number > 0"),
        (lambda: soft_target_loss(E3, E3, 1, "mean"), ValueError, "reduction: expected one of"),
        (lambda: soft_target_loss(E3, E3, 1, kind="js"), ValueError, "kind: expected one of"),
        (lambda: soft_target_loss(E3, E3, 1, row_mask=E3[0]), TypeError, "row_mask: expected dtype torch.bool"),
        (lambda: soft_target_loss(E3, E3, 1, row_mask=E3[0, :2] > 0), ValueError, r"row_mask: expected shape \(3\)"),
        (lambda: soft_target_loss(E3[:, :0], E3[:, :0], 1), ValueError, "student_logits: expected at least one column"),
        (lambda: soft_target_loss(E3, E3, 1, group="world"), TypeError, "group: expected a torch.distributed"),
        (lambda: contrastive_prediction_loss(E3[:2], E3, 1), ValueError, "z_rows: expected as many rows as columns"),
        (lambda: contrastive_prediction_loss(E3[:1], E3[:1], 1), ValueError, "z_cols: expected at least two rows"),
        (lambda: affinity_transfer_loss(E3, E3, E3[:2], E3), ValueError, r"teacher_rows: expected shape \(3, \*\)"),
        (lambda: affinity_transfer_loss(E3, E3, E3, E3[:, :2]), ValueError, "teacher_cols: expected vectors as long as"),
        (lambda: affinity_transfer_loss(E3, E3, E3, E3, keep_percent=200), ValueError, "keep_percent"),
        (lambda: affinity_transfer_loss(E3, E3, E3, E3, kind="mse"), ValueError, "kind: expected one of"),
        (lambda: SSKDLoss((1, 1)), ValueError, "weights: expected four numbers"),
        (lambda: SSKDLoss((1, 1, -1, 0)), ValueError, "weights: expected a finite number >= 0"),
        (lambda: SSKDLoss()(SSKDOutputs(E3), SSKDOutputs(E3), torch.arange(3)), ValueError, "student: expected z and"),
        (lambda: SSKDLoss((0, 0, 0, 1))(SSKDOutputs(E3), SSKDOutputs(E3), torch.arange(3)), ValueError, "expected transformed_logits"),
        (lambda: SSKDLoss()(SSKDOutputs(E3), SSKDOutputs(E3), torch.arange(1, 4)), ValueError, r"labels: expected values in \[0, 3\)"),
        (lambda: SSHead(0, 1, 1), ValueError, "in_dim: expected an integer >= 1"),
        (lambda: SSHead(1, 2.0, 1), TypeError, "hidden: expected an integer"),
        (lambda: freeze("teacher").__enter__(), TypeError, "module: expected a torch.nn.Module"),
    ],
)  # fmt: skip
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Several processes: exactly as if one held the batch.

SHARDS = (5, 2)


def whole_batch():
    own = torch.arange(7)
    return draw(7, 3), draw(7, 3, seed=1), draw(7, 4, seed=2), draw(7, 4, seed=3), draw(7, 5, seed=4), draw(7, 5, seed=5), own % 5  # fmt: skip


def losses(rows, cols, t_rows, t_cols, s, t, labels, **options):
    yield affinity_transfer_loss(rows, cols, t_rows, t_cols, keep_percent=50, **options)
    yield affinity_transfer_loss(rows, cols, t_rows, t_cols, keep_percent=100, kind="ce", **options)
    yield contrastive_prediction_loss(rows, cols, 0.5, **options)
    yield soft_target_loss(s, t, 4.0, row_mask=labels > 0, **options)
    outputs = (SSKDOutputs(s, s, cols, rows), SSKDOutputs(t, t, t_cols, t_rows))
    yield SSKDLoss(**options)(*outputs, labels).loss


def collect(batch, **options):
    leaves = [batch[k].clone().requires_grad_() for k in (0, 1, 4)]
    rows, cols, s = leaves
    found = []
    for loss in losses(rows, cols, *batch[2:4], s, *batch[5:], **options):
        found += [loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True)]
    return found


def work(rank, world):
    shard = [v[rows_of(rank, SHARDS)] for v in whole_batch()]
    found = {b: collect(shard, group=dist.group.WORLD, backend=b) for b in ("auto", "reference")}
    bad = shard[0] * math.nan if rank else shard[0]
    found["error"] = message_of(
        lambda: affinity_transfer_loss(bad, *shard[1:4], group=dist.group.WORLD)
    )
    return found


def test_many_processes_are_one(tmp_path):
    ranks = run(work, len(SHARDS), tmp_path)
    wanted = collect(whole_batch(), backend="reference")
    for backend in ("auto", "reference"):
        for k, value in enumerate(wanted):
            parts = [rank[backend][k] for rank in ranks]
            if value is None:
                assert parts == [None] * len(parts)
            elif value.ndim == 0:
                assert_same(parts, [value] * len(parts))
            else:
                assert_same([torch.cat(parts)], [value])
    assert ranks[1]["error"].startswith("ValueError: z_rows: expected finite values")
    assert ranks[0]["error"].startswith("ValueError: group: expected valid input on every rank")
    assert "rank [1]" in ranks[0]["error"]


# The chapter's full profile, small and on a stand-in for torchvision.


class FakeCIFAR100:
    """What torchvision's class of this name offers: a few bright and dark pictures a class."""

    def __init__(self, root, train, transform, download):
        assert transform is None
        assert download
        count = 120 if train else 40
        self.targets = [k % 5 for k in range(count)]
        generator = np.random.default_rng(int(train))
        noise = generator.integers(0, 100, (count, 32, 32, 3))
        self.data = (noise + 30 * np.array(self.targets)[:, None, None, None]).astype(np.uint8)


def test_full_profile_runs_on_a_stand_in(monkeypatch, tmp_path):
    datasets = types.SimpleNamespace(CIFAR100=FakeCIFAR100)
    fake_modules(monkeypatch, {"torchvision": {"datasets": datasets}})
    widgets = []
    names, verdicts = run_cells(
        "metric/sskd",
        monkeypatch,
        define=("told", "ceiling", "copies", "kept", "forms", "probes", "written", "checked"),
        call=("settle", "record", "display", "explore"),
        small={
            "N": "8",
            "classes": "5",
            "[64, 64, 0, 128, 128, 0, 256, 256, 0, 512, 512, 512, 512]": "[4, 0, 8, 0, 8]",
            "[64, 0, 128, 0, 256, 0, 512, 512]": "[4, 0, 4]",
            "teacher_steps": "8",
            "head_steps": "8",
            "student_steps": "8",
            "seeds": "[first_seed, first_seed + 1]",
            "(16, 32, 64)": "(4,)",
            "(256, 1024, 4096, 16384)": "(8, 16)",
            "range(10)": "range(5)",
        },
        explore=lambda draw, **given: widgets.append((draw, given)),
        data_root=str(tmp_path),
    )
    settled = {k.partition(":")[2] for k in verdicts} - {"literal-equals-fast"}
    assert settled == {
        "beats-kd-few", "beats-kd-noisy", "beats-kd-clean", "affinity-alone", "affinity-adds",
        "more-with-few", "selection", "affinity-teaches-random", "affinity-teaches-scrambled",
    }  # fmt: skip
    ((draw_frame, given),) = widgets
    assert given["strength"] == [90, 180, 270]
    assert [panel.count("<svg") for panel in draw_frame(strength=180, tau=0.5)] == [1, 1]

    # Three turned copies an image, each cropped out of the whole one.
    x = torch.rand(4, 3, 32, 32)
    copies, own = names["transformed"](x, torch.Generator().manual_seed(0))
    assert own.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    for k in range(12):
        turned = F.pad(x[k // 3].rot90(k % 3 + 1, (1, 2)), (4, 4, 4, 4))
        windows = turned.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        assert (windows == copies[k]).flatten(1).all(1).any()
    assert names["few"][0].unique().numel() == len(names["few"][0]) == 5 * 6

    # Side by side is one by one, batch normalisation and its statistics included.
    networks = [names["new_student"]() for _ in range(2)]
    together, x = names["Together"](networks), torch.rand(2, 6, 3, 32, 32)
    for training in (True, False):
        together.train(training)
        both = together(x)
        for k, network in enumerate(networks):
            alone = network.train(training)(x[k])
            assert_same([side[k].detach() for side in both], [v.detach() for v in alone], 1e-5)
    for name, statistics in together.statistics.items():
        assert_same(statistics, [network.state_dict()[name] for network in networks], 1e-5)

"""SSKD: a student copies its teacher's answers to a question that has nothing to do with the labels.

Knowledge distillation with a self-supervised pretext task (Xu et al., "Knowledge Distillation Meets
Self-Supervision", ECCV 2020; equation numbers below are that paper's). The question is: which of the
originals of this batch does a transformed image come from? Its answers are a row softmax of cosines
between transformed images (rows) and originals (columns), and the student copies them, wrong ones
included, except for the worst.

The building blocks work on a matrix that you hold (:func:`cosine_affinity`, :func:`info_nce`,
:func:`error_rank`, :func:`selective_rows`, :func:`soft_target_loss`). For large batches, and for
batches spread over processes, :func:`contrastive_prediction_loss` and :func:`affinity_transfer_loss`
start from the embeddings instead and go over blocks of rows: no matrix of the whole batch exists.

``backend="reference"`` computes the printed equations. It can be differentiated twice, and it has
their limits: exponentials that overflow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from affnb.checks import (
    check_at_least,
    check_between,
    check_bool,
    check_differentiated_once,
    check_finite,
    check_floating,
    check_integer,
    check_labels,
    check_norms,
    check_one_of,
    check_positive,
    check_same_device,
    check_shape,
    check_square,
)
from affnb.distributed import (
    all_gather_uneven,
    check_group,
    check_together,
    gather_with_grad,
)
from affnb.kernels import uncompiled
from affnb.precision import wide_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "SSHead",
    "SSKDLoss",
    "SSKDLosses",
    "SSKDOutputs",
    "affinity_transfer_loss",
    "contrastive_prediction_loss",
    "cosine_affinity",
    "error_rank",
    "freeze",
    "info_nce",
    "selective_rows",
    "soft_target_loss",
]

Backend = Literal["auto", "reference"]
Kind = Literal["kl", "ce"]
Reduction = Literal["batchmean", "sum", "none"]
Rounding = Literal["ceil", "floor"]
M = TypeVar("M", bound=nn.Module)

_BACKENDS = ("auto", "reference")

#: A vector no longer than this has no direction: its cosines count as 0.
_EPS = 1e-8

# Entries of a block of the matrix. On the CPU a block (0.5 MB in float32) stays in a core's L2 cache
# between the matrix products and the softmaxes; on a GPU launching is what costs.
_BLOCK_CPU = 2**17
_BLOCK_CUDA = 2**25


# --------------------------------------------------------------------------------------------------
# Checks and small helpers
# --------------------------------------------------------------------------------------------------


def _check_matrix(value: Tensor, name: str) -> None:
    check_floating(value, name, ndim=2)
    if not torch.compiler.is_compiling():  # values cannot be looked at while tracing
        check_finite(value, name)


def _check_embeddings(rows: Tensor, cols: Tensor, names: tuple[str, str]) -> None:
    both = ((names[0], rows), (names[1], cols))
    for name, value in both:
        check_floating(value, name, ndim=2)
    if rows.shape[1] != cols.shape[1]:
        raise ValueError(
            f"{names[1]}: expected vectors as long as those of {names[0]} ({rows.shape[1]}), "
            f"got shape {tuple(cols.shape)}"
        )
    check_same_device(both)
    for name, value in both:
        if torch.compiler.is_compiling() or not value.numel():
            continue
        check_norms(value, name)


def _check_positive_index(positive: Tensor | None, rows: int, cols: int, name: str) -> None:
    """Check the columns of the rows' own originals; ``None`` wants as many rows as columns."""
    if positive is None:
        if rows != cols:
            raise ValueError(
                f"{name}: expected as many rows as columns (or positive=), got {rows} x {cols}"
            )
        return
    tracing = torch.compiler.is_compiling()
    check_labels(positive, "positive", length=rows, num_classes=None if tracing else cols)


def _own_columns(positive: Tensor | None, rows: int, device: torch.device) -> Tensor:
    return torch.arange(rows, device=device) if positive is None else positive.to(device).long()


def _unit(z: Tensor, eps: float = _EPS) -> Tensor:
    """Vectors divided by their lengths; those no longer than ``eps`` become 0, with gradient 0."""
    length = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    unit: Tensor = z * length.clamp(min=eps).reciprocal().masked_fill(length <= eps, 0.0)
    return unit


def _sum_over_group(total: Tensor, group: ProcessGroup | None) -> Tensor:
    return total if group is None else gather_with_grad(total[None], group).sum()


def _count_over_group(count: Tensor, group: ProcessGroup | None) -> Tensor:
    if group is not None:
        count = count.clone()
        torch.distributed.all_reduce(count, group=group)
    return count.clamp(min=1)


def _rows_of_group(rows: Tensor, group: ProcessGroup | None) -> Tensor | int:
    if group is None:
        return max(1, len(rows))
    return _count_over_group(torch.tensor(len(rows), device=rows.device), group)


# --------------------------------------------------------------------------------------------------
# On a matrix that you hold
# --------------------------------------------------------------------------------------------------


def cosine_affinity(
    z_rows: Tensor, z_cols: Tensor, eps: float = _EPS, *, backend: Backend = "auto"
) -> Tensor:
    r"""Cosines of all pairs of two sets of vectors (Eq. 4).

    .. math:: A_{ij} = \frac{\tilde z_i \cdot z_j}{\lVert\tilde z_i\rVert\,\lVert z_j\rVert}

    Parameters
    ----------
    z_rows
        Embeddings of the transformed images, floating, shape ``(N, d)``, N at least 1.
    z_cols
        Embeddings of the originals, shape ``(M, d)``, M at least 1.
    eps
        A vector no longer than this has no direction: its cosines are 0, and so is its gradient. (That
        of the formula grows without bound as the vector shrinks.) Default 1e-8.
    backend
        ``"auto"``: normalise, one matrix product. ``"reference"``: pair by pair.

    Returns
    -------
    Tensor
        Shape ``(N, M)``, in [-1, 1] up to rounding; float64 for float64 input, else float32.

    Raises
    ------
    TypeError
        Not floating tensors.
    ValueError
        Not matrices, no rows, vectors of different length, devices that differ, values that are not
        finite or whose norm overflows, ``eps`` not positive, an unknown backend.

    Notes
    -----
    Time ``O(N M d)``, memory ``O(N M)``, the result. Differentiable in both arguments. To train with a
    batch whose matrix is too large, use :func:`affinity_transfer_loss`.

    Examples
    --------
    >>> A = cosine_affinity(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.5]]))
    >>> A
    tensor([[0.6000, 0.8000]])
    """
    check_one_of(backend, "backend", _BACKENDS)
    check_positive(eps, "eps")
    _check_embeddings(z_rows, z_cols, ("z_rows", "z_cols"))
    for value, name in ((z_rows, "z_rows"), (z_cols, "z_cols")):
        if not value.shape[0]:
            raise ValueError(f"{name}: expected at least one row, got shape {tuple(value.shape)}")
    with torch.autocast(z_rows.device.type, enabled=False):
        wide = wide_dtype(z_rows, z_cols)
        z_rows, z_cols = z_rows.to(wide), z_cols.to(wide)
        if backend == "reference":
            return torch.stack([torch.stack([_cosine(a, b, eps) for b in z_cols]) for a in z_rows])
        return torch.mm(_unit(z_rows, eps), _unit(z_cols, eps).T)


def _cosine(a: Tensor, b: Tensor, eps: float) -> Tensor:
    lengths = [torch.linalg.vector_norm(v) for v in (a, b)]
    if min(float(length.detach()) for length in lengths) <= eps:
        return (0 * a).sum() + (0 * b).sum()  # no direction: a 0 that keeps its graph
    cosine: Tensor = torch.dot(a, b) / (lengths[0] * lengths[1])
    return cosine


def info_nce(
    A: Tensor, tau: float, *, positive: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    r"""Loss of contrastive prediction: each row must pick its own column (Eq. 5, a mean over rows).

    .. math:: -\frac1N \sum_i \log \frac{e^{A_{ii}/\tau}}{\sum_k e^{A_{ik}/\tau}}

    Parameters
    ----------
    A
        Affinities, floating, shape ``(N, N)`` with N at least 2; or ``(M, N)`` with ``positive``.
    tau
        What the affinities are divided by, positive.
    positive
        Integers ``(M,)``: the column of each row's own original, for several transformed images of one
        original. Default ``None``: row i belongs to column i.
    backend
        ``"auto"``: a cross-entropy. ``"reference"``: the printed equation.

    Returns
    -------
    Tensor
        A scalar, at least 0; ``log N`` if all affinities are equal. float64 for float64 input, else
        float32.

    Raises
    ------
    TypeError
        ``A`` not floating, ``positive`` not integers, ``tau`` no number.
    ValueError
        ``A`` not square (without ``positive``), fewer than two columns, no rows, ``positive`` out of
        range, values that are not finite, ``tau`` not positive, an unknown backend.

    Notes
    -----
    Time and memory ``O(M N)``. The paper prints a sum over rows. For a batch over several processes
    use :func:`contrastive_prediction_loss`.

    Examples
    --------
    >>> info_nce(torch.eye(4), tau=1.0)  # log(1 + 3 / e)
    tensor(0.7437)
    >>> twice = torch.eye(4).repeat_interleave(2, 0)  # two transformed images of each original
    >>> info_nce(twice, tau=1.0, positive=torch.arange(4).repeat_interleave(2))
    tensor(0.7437)
    """
    check_one_of(backend, "backend", _BACKENDS)
    check_positive(tau, "tau")
    _check_matrix(A, "A")
    rows, cols = A.shape
    if positive is None:
        check_square(A, "A")
    if rows < 1 or cols < 2:
        raise ValueError(f"A: expected a row and at least two columns, got {tuple(A.shape)}")
    _check_positive_index(positive, rows, cols, "A")
    own = _own_columns(positive, rows, A.device)
    with torch.autocast(A.device.type, enabled=False):
        logits = A.to(wide_dtype(A)) / tau
        if backend == "reference":
            strength = logits.exp()
            return (strength.gather(1, own[:, None])[:, 0] / strength.sum(1)).log().mean().neg()
        return F.cross_entropy(logits, own)


def soft_target_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tau: float,
    reduction: Reduction = "batchmean",
    kind: Kind = "kl",
    row_mask: Tensor | None = None,
    *,
    group: ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""How far the student's softened answers are from the teacher's (Eqs. 2, 6 and 7).

    With :math:`p` the softmax of a row at temperature :math:`\tau`, the loss of a row is

    .. math:: -\tau^2 \sum_i p_t^i \log p_s^i \;(\text{"ce"}), \qquad
              \tau^2 \sum_i p_t^i \log \frac{p_t^i}{p_s^i} \;(\text{"kl"}).

    Parameters
    ----------
    student_logits
        Floating, shape ``(N, C)``: class logits, or rows of an affinity matrix.
    teacher_logits
        Same shape. Always a constant: no gradient flows into it.
    tau
        Temperature, positive. The released code has 4 for classes and 0.5 for affinities; the paper's
        text gives none.
    reduction
        ``"batchmean"`` (default): sum over the kept rows, divided by their number. ``"sum"``: as the
        paper prints it. ``"none"``: one value a row, ``(N,)``, 0 where the row is masked out.
    kind
        ``"kl"`` (default): the divergence, whose least value is 0. ``"ce"``: the paper's equations, a
        cross-entropy, whose least value is the teacher's entropy times :math:`\tau^2`. The gradients
        are the same.
    row_mask
        bool ``(N,)``: rows that count (:func:`selective_rows`). Default ``None``: all.
    group
        A ``torch.distributed`` process group: sum or mean over the rows of all its ranks; each rank's
        own rows get the exact gradient of that one value. Not for ``"none"``. Under
        ``DistributedDataParallel``, which averages gradients, multiply the loss by the world size.
    backend
        ``"auto"``: by logarithms of softmaxes. ``"reference"``: the printed double sum.

    Returns
    -------
    Tensor
        A scalar, or ``(N,)``; float64 for float64 input, else float32. Without any row that counts it
        is 0, with a zero gradient.

    Raises
    ------
    TypeError
        Not floating tensors, ``row_mask`` not bool, ``tau`` no number, ``group`` no process group.
    ValueError
        Shapes or devices that differ, no column, values that are not finite, ``tau`` not positive, an
        unknown option, ``reduction="none"`` with a group. With ``group``, an error on one rank is
        raised on all.

    Notes
    -----
    The gradient in a logit is :math:`\tau(p_s^i - p_t^i)`, which stays of order 1 as :math:`\tau`
    grows: that is what the factor :math:`\tau^2` is for. Time and memory ``O(N C)``.

    Examples
    --------
    >>> teacher, student = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    >>> soft_target_loss(student, teacher, tau=2.0)
    tensor(0.4438)
    >>> soft_target_loss(teacher, teacher, tau=2.0), soft_target_loss(teacher, teacher, 2.0, kind="ce")
    (tensor(0.), tensor(2.3288))
    """

    def check() -> None:
        check_one_of(reduction, "reduction", ("batchmean", "sum", "none"))
        check_one_of(kind, "kind", ("kl", "ce"))
        check_one_of(backend, "backend", _BACKENDS)
        check_positive(tau, "tau")
        if group is not None and reduction == "none":
            raise ValueError("reduction: expected 'batchmean' or 'sum' with a group, got 'none'")
        _check_matrix(student_logits, "student_logits")
        _check_matrix(teacher_logits, "teacher_logits")
        check_shape(teacher_logits, "teacher_logits", student_logits.shape)
        if not student_logits.shape[1]:
            raise ValueError("student_logits: expected at least one column, got none")
        if row_mask is not None:
            check_bool(row_mask, "row_mask")
            check_shape(row_mask, "row_mask", student_logits.shape[:1])
        check_same_device(
            [
                ("student_logits", student_logits),
                ("teacher_logits", teacher_logits),
                ("row_mask", row_mask),
            ]
        )

    check_together(check, group)
    with torch.autocast(student_logits.device.type, enabled=False):
        wide = wide_dtype(student_logits, teacher_logits)
        s, t = student_logits.to(wide) / tau, teacher_logits.detach().to(wide) / tau
        if backend == "reference":
            p_s, p_t = (v.exp() / v.exp().sum(1, keepdim=True) for v in (s, t))
            ratio = p_t / p_s if kind == "kl" else 1 / p_s
            rows = (p_t * ratio.log()).sum(1)
        else:
            log_s, log_t = s.log_softmax(1), t.log_softmax(1)
            rows = (log_t.exp() * (log_t - log_s if kind == "kl" else -log_s)).sum(1)
        if row_mask is not None:
            rows = torch.where(row_mask, rows, 0.0)
        rows = tau**2 * rows
        if reduction == "none":
            return rows
        total = _sum_over_group(rows.sum(), group)
        if reduction == "sum":
            return total
        kept = torch.tensor(len(rows), device=rows.device) if row_mask is None else row_mask.sum()
        return total / _count_over_group(kept, group)


def error_rank(A: Tensor, positive: Tensor | None = None) -> Tensor:
    r"""How wrong each row is: one more than the columns that beat its own, :math:`1+\sum_k[A_{ik}>A_{ii}]`.

    Parameters
    ----------
    A
        The teacher's affinities (or any increasing function of a row), floating, ``(N, N)``, or
        ``(M, N)`` with ``positive``.
    positive
        As in :func:`info_nce`.

    Returns
    -------
    Tensor
        int64 ``(N,)``, from 1 (right) to the number of columns. Columns that tie with the own one do
        not count against it.

    Raises
    ------
    TypeError
        ``A`` not floating, ``positive`` not integers.
    ValueError
        Not a matrix, not square (without ``positive``), out of range, values that are not finite.

    Notes
    -----
    One comparison an entry, no sorting: time ``O(N^2)``, memory ``O(N^2)`` booleans. (The released
    code sorts, so there a tie may go either way.)

    Examples
    --------
    >>> error_rank(torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.3, 0.7], [0.5, 0.1, 0.5]])).tolist()
    [1, 3, 1]
    """
    _check_matrix(A, "A")
    rows, cols = A.shape
    _check_positive_index(positive, rows, cols, "A")
    own = A.gather(1, _own_columns(positive, A.shape[0], A.device)[:, None])
    return 1 + (own < A).sum(1)


def selective_rows(
    rank: Tensor, keep_percent: float = 75, *, rounding: Rounding = "ceil"
) -> Tensor:
    """Rows worth copying: all that are right, and the least wrong ones of the others (Section 3.3).

    Parameters
    ----------
    rank
        Integers ``(N,)``, at least 1, 1 for a right answer (:func:`error_rank`).
    keep_percent
        How many per cent of the *wrong* rows to keep, from 0 (right rows only) to 100 (all rows), those
        of smallest rank; of equal ones the first. Default 75, as in all of the paper's comparisons.
    rounding
        What to do with a fraction of a row: ``"ceil"`` (default) keeps it, ``"floor"`` drops it, as
        the released code does. The paper does not say.

    Returns
    -------
    Tensor
        bool ``(N,)``.

    Raises
    ------
    TypeError
        ``rank`` not integers, ``keep_percent`` no number.
    ValueError
        ``rank`` not a vector, or below 1; ``keep_percent`` outside [0, 100]; an unknown rounding.

    Notes
    -----
    One stable sort: time ``O(N log N)``. No value leaves the device.

    Examples
    --------
    >>> selective_rows(torch.tensor([1, 4, 2, 1, 9]), keep_percent=50).tolist()  # 2 of 3 wrong rows
    [True, True, True, True, False]
    """
    _check_selection(keep_percent, rounding)
    check_labels(rank, "rank")
    if not torch.compiler.is_compiling() and rank.numel() and int(rank.min()) < 1:
        raise ValueError(f"rank: expected ranks >= 1, got {int(rank.min())}")
    return _selected(rank, keep_percent, rounding)


def _check_selection(keep_percent: float, rounding: str) -> None:
    check_between(keep_percent, "keep_percent", 0, 100)
    check_one_of(rounding, "rounding", ("ceil", "floor"))


def _selected(rank: Tensor, keep_percent: float, rounding: str) -> Tensor:
    right = (rank == 1).sum()
    share = (rank.numel() - right).double() * keep_percent / 100
    kept = right + (share.ceil() if rounding == "ceil" else share.floor())
    place = torch.empty_like(rank)  # of each row when all are in the order of their ranks
    place[rank.argsort(stable=True)] = torch.arange(
        rank.numel(), dtype=rank.dtype, device=rank.device
    )
    return place < kept


# --------------------------------------------------------------------------------------------------
# From embeddings, with no matrix
# --------------------------------------------------------------------------------------------------


def _blocks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    entries = _BLOCK_CUDA if device.type == "cuda" else _BLOCK_CPU
    height = max(1, entries // max(1, columns))
    return (slice(start, start + height) for start in range(0, rows, height))


def _gather_columns(cols: Tensor, group: ProcessGroup | None) -> tuple[Tensor, int]:
    """All ranks' columns, without history, and where this rank's begin."""
    if group is None:
        return cols.detach(), 0
    parts = all_gather_uneven(cols, group)
    return torch.cat(parts), sum(len(p) for p in parts[: torch.distributed.get_rank(group)])


def _log_softmax_of_products(a: Tensor, b: Tensor, tau: float, out: Tensor) -> None:
    """``log_softmax(a b' / tau)``, row by row, without other memory than that of the result."""
    torch.addmm(out, a, b.T, beta=0, alpha=1 / tau, out=out)
    torch.log_softmax(out, 1, out=out)


class _SumOfCrossEntropies(torch.autograd.Function):
    """Sum over rows of the cross-entropy (or divergence) of row softmaxes, gradients made on the way.

    ``rows`` and ``cols`` are the student's unit vectors. A row's target is the softmax of the
    teacher's row, or, without a teacher, its own column. With ``w`` the student's softmax and ``e``
    the target, the gradient in the logits is ``w - e``, and two products carry it to rows and columns.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        cols: Tensor,
        own: Tensor,
        teacher: tuple[Tensor, Tensor] | None,
        tau: float,
        kl: bool,
        group: ProcessGroup | None,
    ) -> Tensor:
        all_cols, first = _gather_columns(cols, group)
        # Ranks must agree on whether the columns' gradient is reduced, whatever each one needs.
        with_cols = ctx.needs_input_grad[1] or group is not None
        with_grad = ctx.needs_input_grad[0] or with_cols
        to_rows = torch.empty_like(rows) if with_grad else None
        to_cols = torch.zeros_like(all_cols) if with_cols else None
        total = rows.new_zeros(())
        blocks = list(_blocks(len(rows), len(all_cols), rows.device))
        # Fresh memory costs more than what is done in it: all blocks are made in the same.
        size = (1 if teacher is None else 3, len(rows[blocks[0]]) if blocks else 0, len(all_cols))
        buffers = rows.new_empty(size)
        for block in blocks:
            part = rows[block]
            log_w, *of_teacher = buffers[:, : len(part)].unbind()
            _log_softmax_of_products(part, all_cols, tau, log_w)
            if teacher is None:
                target = own[block, None]
                total -= log_w.gather(1, target).sum()
                log_w.exp_().scatter_add_(1, target, log_w.new_full(target.shape, -1.0))
            else:
                log_e, e = of_teacher
                _log_softmax_of_products(teacher[0][block], teacher[1], tau, log_e)
                torch.exp(log_e, out=e)
                if kl:
                    total += torch.dot(e.view(-1), log_e.sub_(log_w).view(-1))
                else:
                    total -= torch.dot(e.view(-1), log_w.view(-1))
                log_w.exp_().sub_(e)
            if to_rows is not None:  # log_w is w - e from here on
                torch.addmm(
                    to_rows[block], log_w, all_cols, beta=0, alpha=1 / tau, out=to_rows[block]
                )
            if to_cols is not None:
                to_cols.addmm_(log_w.T, part, alpha=1 / tau)
        if group is not None:
            torch.distributed.all_reduce(total, group=group)
            torch.distributed.all_reduce(to_cols, group=group)
        if to_cols is not None and group is not None:
            to_cols = to_cols[first : first + len(cols)].clone()  # not all ranks' memory
        ctx.save_for_backward(to_rows, to_cols)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_differentiated_once("this loss")
        needed = ctx.needs_input_grad
        both = (
            grad * g if g is not None and n else None
            for g, n in zip(ctx.saved_tensors, needed, strict=False)
        )
        return *both, None, None, None, None, None


def contrastive_prediction_loss(
    z_rows: Tensor,
    z_cols: Tensor,
    tau: float,
    *,
    positive: Tensor | None = None,
    group: ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """:func:`info_nce` of :func:`cosine_affinity`, with no matrix (Eqs. 4 and 5, a mean over rows).

    Parameters
    ----------
    z_rows
        Embeddings of the transformed images, floating, ``(M, d)``.
    z_cols
        Embeddings of the originals, ``(N, d)``. Both receive gradients.
    tau
        Temperature, positive. The released code trains the teacher's head with 1.
    positive
        Integers ``(M,)``: which of ``z_cols`` each row belongs to. Default ``None``: ``M = N``, row i
        to column i.
    group
        A ``torch.distributed`` process group: the originals of all ranks compete, and the mean is over
        all ranks' rows; ``positive`` counts this rank's own columns. Each rank gets the exact gradient
        of that one loss in its own embeddings. Under ``DistributedDataParallel``, which averages
        gradients, multiply the loss by the world size.
    backend
        ``"auto"``: in blocks of rows. ``"reference"``: through the whole matrix, as printed; it can be
        differentiated twice.

    Returns
    -------
    Tensor
        A scalar, at least 0; float64 for float64 input, else float32. No row at all gives 0.

    Raises
    ------
    TypeError, ValueError
        As :func:`cosine_affinity` and :func:`info_nce`; with ``group``, on all ranks.

    Notes
    -----
    Time ``O(M N d)``, memory ``O((M + N) d)``; ``"reference"`` takes ``O(M N)`` memory. Runs
    uncompiled under ``torch.compile``. It is :func:`affnb.metric.patch_nce_loss` of normalised vectors,
    with keys that are no constants, for one set and several queries a key.

    Examples
    --------
    >>> z = torch.eye(4)
    >>> contrastive_prediction_loss(2 * z, z, tau=1.0)  # log(1 + 3 / e)
    tensor(0.7437)
    """

    def check() -> None:
        check_one_of(backend, "backend", _BACKENDS)
        check_positive(tau, "tau")
        _check_embeddings(z_rows, z_cols, ("z_rows", "z_cols"))
        _check_positive_index(positive, len(z_rows), len(z_cols), "z_rows")
        if group is None and len(z_cols) == 1:
            raise ValueError("z_cols: expected at least two rows to choose from, got 1")

    check_together(check, group)
    return _contrastive(z_rows, z_cols, tau, positive, group, backend)


@uncompiled
def _contrastive(
    z_rows: Tensor,
    z_cols: Tensor,
    tau: float,
    positive: Tensor | None,
    group: ProcessGroup | None,
    backend: str,
) -> Tensor:
    own = _own_columns(positive, len(z_rows), z_rows.device)
    with torch.autocast(z_rows.device.type, enabled=False):
        wide = wide_dtype(z_rows, z_cols)
        rows, cols = _unit(z_rows.to(wide)), _unit(z_cols.to(wide))
        own = own + _gather_columns(cols, group)[1]
        if backend == "reference":
            all_cols = cols if group is None else gather_with_grad(cols, group)
            # Every rank needs all rows: a rank's columns appear in the others' rows too.
            if group is not None:
                rows = gather_with_grad(rows, group)
                own = torch.cat(all_gather_uneven(own, group))
            strength = (rows @ all_cols.T / tau).exp()
            logs = (strength.gather(1, own[:, None])[:, 0] / strength.sum(1)).log()
            return logs.sum().neg().div(max(1, len(rows)))
        total: Tensor = _SumOfCrossEntropies.apply(rows, cols, own, None, tau, False, group)  # type: ignore[no-untyped-call]
        return total / _rows_of_group(rows, group)


def affinity_transfer_loss(
    z_rows: Tensor,
    z_cols: Tensor,
    teacher_rows: Tensor,
    teacher_cols: Tensor,
    tau: float = 0.5,
    *,
    keep_percent: float = 75,
    rounding: Rounding = "ceil",
    kind: Kind = "kl",
    positive: Tensor | None = None,
    group: ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""The student's batch affinity against the teacher's, with selective transfer (Eqs. 4 and 6).

    With :math:`B` the row softmax of the cosines at temperature :math:`\tau`, and S the rows that
    :func:`selective_rows` keeps of the teacher's :func:`error_rank`,

    .. math:: L_{ss} = \frac{\tau^2}{|S|} \sum_{i \in S} \sum_j B^t_{ij} \log\frac{B^t_{ij}}{B^s_{ij}} .

    Parameters
    ----------
    z_rows, z_cols
        The student's embeddings of the transformed images, floating ``(M, d)``, and of the originals,
        ``(N, d)``.
    teacher_rows, teacher_cols
        The teacher's, ``(M, e)`` and ``(N, e)``; ``e`` may differ from ``d``. Constants.
    tau
        Temperature of both, positive. Default 0.5, the released code's.
    keep_percent, rounding
        See :func:`selective_rows`. 100 keeps every row.
    kind
        ``"kl"`` (default), or ``"ce"`` as the paper prints it; see :func:`soft_target_loss`.
    positive
        Integers ``(M,)``: which original each row belongs to. Default ``None``: ``M = N``, row i to
        column i.
    group
        As in :func:`contrastive_prediction_loss`. Rows are ranked and selected over all ranks.
    backend
        ``"auto"``: in blocks of rows. ``"reference"``: through both whole matrices, as printed.

    Returns
    -------
    Tensor
        A scalar; float64 for float64 input, else float32. If no row is kept (all wrong, 0 per cent) it
        is 0, with a zero gradient.

    Raises
    ------
    TypeError
        Not floating tensors, ``positive`` not integers, numbers that are none, ``group`` no process
        group.
    ValueError
        Shapes or devices that do not fit, values that are not finite or whose norm overflows, ``tau``
        not positive, ``keep_percent`` outside [0, 100], an unknown option. With ``group``, an error on
        one rank is raised on all.

    Notes
    -----
    One sweep over the teacher's blocks for the ranks, one over both for the kept rows: time
    ``O(M N (d + e))``, memory ``O((M + N)(d + e))``. No block is kept for the backward pass, and a
    second derivative raises a ``RuntimeError``. Runs uncompiled under ``torch.compile``. Vectors no
    longer than 1e-8 count as 0, with a zero gradient.

    Examples
    --------
    >>> teacher = torch.eye(3)
    >>> affinity_transfer_loss(teacher, teacher, teacher, teacher)  # the same answers
    tensor(0.)
    >>> turned = torch.eye(3).flip(1)  # a common rotation of rows and columns changes nothing
    >>> affinity_transfer_loss(turned, turned, teacher, teacher)
    tensor(0.)
    >>> round(affinity_transfer_loss(teacher.roll(1, 0), teacher, teacher, teacher).item(), 4)
    0.3402
    """

    def check() -> None:
        check_one_of(backend, "backend", _BACKENDS)
        check_one_of(kind, "kind", ("kl", "ce"))
        check_positive(tau, "tau")
        _check_selection(keep_percent, rounding)
        _check_embeddings(z_rows, z_cols, ("z_rows", "z_cols"))
        _check_embeddings(teacher_rows, teacher_cols, ("teacher_rows", "teacher_cols"))
        for value, name, like in (
            (teacher_rows, "teacher_rows", z_rows),
            (teacher_cols, "teacher_cols", z_cols),
        ):
            check_shape(value, name, (len(like), None))
            check_same_device([("z_rows", z_rows), (name, value)])
        _check_positive_index(positive, len(z_rows), len(z_cols), "z_rows")

    check_together(check, group)
    return _transfer(
        z_rows,
        z_cols,
        (teacher_rows.detach(), teacher_cols.detach()),
        tau,
        keep_percent,
        rounding,
        kind,
        positive,
        group,
        backend,
    )


def _streamed_rank(rows: Tensor, cols: Tensor, own: Tensor) -> Tensor:
    """:func:`error_rank` of ``rows @ cols.T``, a block at a time."""
    ranks = torch.empty_like(own)
    for block in _blocks(len(rows), len(cols), rows.device):
        affinity = rows[block] @ cols.T
        ranks[block] = 1 + (affinity > affinity.gather(1, own[block, None])).sum(1)
    return ranks


@uncompiled
def _transfer(
    z_rows: Tensor,
    z_cols: Tensor,
    teacher: tuple[Tensor, Tensor],
    tau: float,
    keep_percent: float,
    rounding: str,
    kind: str,
    positive: Tensor | None,
    group: ProcessGroup | None,
    backend: str,
) -> Tensor:
    own = _own_columns(positive, len(z_rows), z_rows.device)
    with torch.autocast(z_rows.device.type, enabled=False):
        wide = wide_dtype(z_rows, z_cols, *teacher)
        rows, cols, t_rows, t_cols = (_unit(v.to(wide)) for v in (z_rows, z_cols, *teacher))
        t_cols, first = _gather_columns(t_cols, group)
        own = own + first
        if backend == "reference":
            if group is not None:  # every rank computes the whole
                rows, cols = gather_with_grad(rows, group), gather_with_grad(cols, group)
                t_rows, own = (torch.cat(all_gather_uneven(v, group)) for v in (t_rows, own))
            A_t = t_rows @ t_cols.T
            keep = _selected(error_rank(A_t, own), keep_percent, rounding)
            options: dict[str, Any] = {"kind": kind, "row_mask": keep, "backend": backend}
            if not len(cols):
                return (rows.sum() + cols.sum()).mul(0)
            return soft_target_loss(rows @ cols.T, A_t, tau, **options)
        if keep_percent < 100:
            rank = _streamed_rank(t_rows, t_cols, own)
            ranks = [rank] if group is None else all_gather_uneven(rank, group)
            before = 0 if group is None else torch.distributed.get_rank(group)
            start = sum(len(r) for r in ranks[:before])
            keep = _selected(torch.cat(ranks), keep_percent, rounding)[start : start + len(rank)]
            rows, t_rows, own = rows[keep], t_rows[keep], own[keep]
        total: Tensor = _SumOfCrossEntropies.apply(  # type: ignore[no-untyped-call]
            rows, cols, own, (t_rows, t_cols), tau, kind == "kl", group
        )
        return tau**2 * total / _rows_of_group(rows, group)


# --------------------------------------------------------------------------------------------------
# The whole objective, and what it stands on
# --------------------------------------------------------------------------------------------------


class SSKDOutputs(NamedTuple):
    """What a network says about a batch, for :class:`SSKDLoss`.

    Attributes
    ----------
    logits, transformed_logits
        Class logits of the originals ``(N, C)``, and of the transformed images ``(M, C)``.
    z, transformed_z
        Embeddings of the originals ``(N, d)``, and of the transformed images ``(M, d)``.

    Examples
    --------
    >>> SSKDOutputs(torch.zeros(2, 10)).z is None  # enough for the terms on labels and logits
    True
    """

    logits: Tensor
    transformed_logits: Tensor | None = None
    z: Tensor | None = None
    transformed_z: Tensor | None = None


class SSKDLosses(NamedTuple):
    """The value of :class:`SSKDLoss`: the weighted sum, and its four terms before weighting.

    Attributes
    ----------
    loss
        The sum, a scalar: what to call ``backward`` on.
    ce, kd, ss, transformed
        :math:`L_{ce}, L_{kd}, L_{ss}, L_T`, scalars.

    Examples
    --------
    >>> out = SSKDOutputs(torch.zeros(1, 2))
    >>> losses = SSKDLoss(weights=(0.5, 0, 0, 0))(out, out, torch.tensor([1]))
    >>> losses.ce, losses.loss  # log 2, and half of it
    (tensor(0.6931), tensor(0.3466))
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor
    ss: Tensor
    transformed: Tensor


class SSKDLoss(nn.Module):
    r"""The student's objective (Eq. 8), :math:`\lambda_1L_{ce}+\lambda_2L_{kd}+\lambda_3L_{ss}+\lambda_4L_T`.

    Parameters
    ----------
    weights
        :math:`\lambda_1,\dots,\lambda_4`, at least 0. A term of weight 0 is not computed: its inputs may
        be ``None``, and its value is given as 0. Default (0.1, 0.9, 10, 2.7), from the released code;
        the paper's text has none.
    tau
        Temperature of the class logits. Default 4, the released code's.
    tau_ss
        Temperature of the affinities. Default 0.5, the released code's.
    keep_percent, rounding
        Of the rows of :math:`L_{ss}`: see :func:`selective_rows`. Default 75, the paper's.
    kind
        ``"kl"`` (default) or ``"ce"``; see :func:`soft_target_loss`.
    group, backend
        See :func:`affinity_transfer_loss`.

    Raises
    ------
    TypeError, ValueError
        Options out of range, when the criterion is made; otherwise as the functions.

    Notes
    -----
    Every term is a mean over the rows that it keeps. No parameters, no state.

    Examples
    --------
    >>> criterion = SSKDLoss(weights=(0.0, 1.0, 0.0, 0.0))
    >>> out = SSKDOutputs(torch.eye(3))
    >>> criterion(out, out, torch.tensor([0, 1, 2])).loss
    tensor(0.)
    """

    def __init__(
        self,
        weights: Sequence[float] = (0.1, 0.9, 10.0, 2.7),
        tau: float = 4.0,
        tau_ss: float = 0.5,
        keep_percent: float = 75,
        rounding: Rounding = "ceil",
        kind: Kind = "kl",
        group: ProcessGroup | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if len(weights) != 4:
            raise ValueError(f"weights: expected four numbers, got {weights!r}")
        for weight in weights:
            check_at_least(weight, "weights", 0)
        check_positive(tau, "tau")
        check_positive(tau_ss, "tau_ss")
        _check_selection(keep_percent, rounding)
        check_one_of(kind, "kind", ("kl", "ce"))
        check_one_of(backend, "backend", _BACKENDS)
        if group is not None:
            check_group(group)
        self.weights = tuple(weights)
        self.tau, self.tau_ss = tau, tau_ss
        self.keep_percent = keep_percent
        self.rounding: Rounding = rounding
        self.kind: Kind = kind
        self.group = group
        self.backend: Backend = backend

    def forward(
        self,
        student: SSKDOutputs,
        teacher: SSKDOutputs,
        labels: Tensor,
        positive: Tensor | None = None,
    ) -> SSKDLosses:
        """Return the losses of the student's outputs, given the teacher's and the labels ``(N,)``.

        ``positive`` says to which original each transformed image belongs, if not one to one.
        """
        shared: dict[str, Any] = {"kind": self.kind, "group": self.group, "backend": self.backend}
        nothing = student.logits.new_zeros((), dtype=wide_dtype(student.logits))
        ce = kd = ss = transformed = nothing
        if self.weights[0]:
            ce = _label_loss(student.logits, labels, self.group)
        if self.weights[1]:
            kd = soft_target_loss(student.logits, teacher.logits, self.tau, **shared)
        if self.weights[2]:
            for side, name in ((student, "student"), (teacher, "teacher")):
                if side.z is None or side.transformed_z is None:
                    raise ValueError(
                        f"{name}: expected z and transformed_z (weights[2] is not 0), got None"
                    )
            ss = affinity_transfer_loss(
                student.transformed_z,  # type: ignore[arg-type]
                student.z,  # type: ignore[arg-type]
                teacher.transformed_z,  # type: ignore[arg-type]
                teacher.z,  # type: ignore[arg-type]
                self.tau_ss,
                keep_percent=self.keep_percent,
                rounding=self.rounding,
                positive=positive,
                **shared,
            )
        if self.weights[3]:
            if student.transformed_logits is None or teacher.transformed_logits is None:
                raise ValueError(
                    "student, teacher: expected transformed_logits (weights[3] is not 0), got None"
                )
            transformed = soft_target_loss(
                student.transformed_logits, teacher.transformed_logits, self.tau, **shared
            )
        terms = (ce, kd, ss, transformed)
        loss = sum((w * t for w, t in zip(self.weights, terms, strict=True) if w), nothing)
        return SSKDLosses(loss, *terms)

    def extra_repr(self) -> str:
        """Return the options, for ``repr``."""
        return (
            f"weights={self.weights}, tau={self.tau}, tau_ss={self.tau_ss}, "
            f"keep_percent={self.keep_percent}, rounding={self.rounding!r}, kind={self.kind!r}, "
            f"backend={self.backend!r}"
        )


def _label_loss(logits: Tensor, labels: Tensor, group: ProcessGroup | None) -> Tensor:
    """Cross-entropy with labels, a mean over the rows of all ranks."""

    def check() -> None:
        _check_matrix(logits, "student.logits")
        tracing = torch.compiler.is_compiling()
        classes = None if tracing else logits.shape[1]
        check_labels(labels, "labels", length=len(logits), num_classes=classes)
        check_same_device([("student.logits", logits), ("labels", labels)])

    check_together(check, group)
    with torch.autocast(logits.device.type, enabled=False):
        total: Tensor = F.cross_entropy(
            logits.to(wide_dtype(logits)), labels.long(), reduction="sum"
        )
        count = torch.tensor(len(logits), device=logits.device)
        return _sum_over_group(total, group) / _count_over_group(count, group)


class SSHead(nn.Sequential):
    """The self-supervised head: a perceptron of two layers on the features of a backbone.

    Parameters
    ----------
    in_dim
        Length of the features, at least 1.
    hidden, out_dim
        Units of the hidden layer, and length of the embeddings. The released code has ``in_dim`` for
        both; the paper's text does not say.

    Raises
    ------
    TypeError, ValueError
        Not a positive integer.

    Notes
    -----
    Input ``(N, in_dim)``, output ``(N, out_dim)``, not normalised. Time ``O(N hidden (in_dim +
    out_dim))``.

    Examples
    --------
    >>> SSHead(8, 16, 4)(torch.zeros(2, 8)).shape
    torch.Size([2, 4])
    """

    def __init__(self, in_dim: int, hidden: int, out_dim: int) -> None:
        for name, value in (("in_dim", in_dim), ("hidden", hidden), ("out_dim", out_dim)):
            check_integer(value, name, 1)
        super().__init__(nn.Linear(in_dim, hidden), nn.ReLU(), nn.Linear(hidden, out_dim))


@contextmanager
def freeze(module: M) -> Iterator[M]:
    """Within a ``with`` block, make a network a constant: no gradients, and evaluation mode.

    Evaluation mode matters: a batch normalisation in training mode updates its running statistics at
    every forward pass, with or without gradients. Gradients still flow *through* the module to its
    input. On leaving, each parameter and each submodule is as it was.

    Parameters
    ----------
    module
        The teacher, or its backbone while the head is trained.

    Yields
    ------
    torch.nn.Module
        ``module``.

    Raises
    ------
    TypeError
        Not a module.

    Examples
    --------
    >>> teacher = nn.Linear(2, 2)
    >>> with freeze(teacher):
    ...     teacher(torch.zeros(1, 2)).requires_grad, teacher.training
    (False, False)
    >>> teacher.weight.requires_grad, teacher.training
    (True, True)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    learnt = [(p, p.requires_grad) for p in module.parameters()]
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.requires_grad_(False).eval()
        yield module
    finally:
        for parameter, flag in learnt:
            parameter.requires_grad_(flag)
        for submodule, mode in modes:
            submodule.training = mode

r"""Smooth-AP: train the order of a similarity matrix, row by row.

Average precision (AP) is a function of ranks, and a rank is a count of pairwise comparisons:
``1 + #{j : s_j > s_i}``. With each comparison replaced by a sigmoid of temperature ``tau`` the AP
of a query becomes differentiable (Brown et al., "Smooth-AP: Smoothing the Path Towards Large-Scale
Image Retrieval", ECCV 2020; equation numbers below are that paper's). For one query with relevant
items ``P`` and other items ``N``, and ``g_ij = sigmoid((s_j - s_i) / tau)``,

    a_i = 1 + sum over j in P, j != i of g_ij       (soft rank of i among the relevant)
    n_i = sum over j in N of g_ij                   (soft count of wrong items above i)
    AP  = mean over i in P of a_i / (a_i + n_i).

Only rows ``i`` in ``P`` are ever used, so the work is the number of (query, relevant item) pairs
times the number of items. The result for a query is one number, so its gradient for the scores is
collected in the same sweep, from the two slopes

    d(a_i / b_i) / dg_ij = n_i / b_i^2 (j in P)  or  -a_i / b_i^2 (j in N),   b_i = a_i + n_i.

The sweep goes block by block; nothing of the size of queries x items x items is ever stored.
``backend="reference"`` stores it: it is the printed equation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from affnb import kernels
from affnb.checks import (
    check_bool,
    check_differentiated_once,
    check_finite,
    check_flag,
    check_floating,
    check_integer,
    check_integers,
    check_labels,
    check_one_of,
    check_positive,
    check_same_device,
    check_shape,
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
    "PKSampler",
    "SmoothAPLoss",
    "average_precision",
    "recall_at_k",
    "smooth_ap_loss",
    "smooth_average_precision",
]

Ties = Literal["strict", "mid", "sklearn"]
Backend = Literal["auto", "reference"]

_TIES = ("strict", "mid", "sklearn")
_BACKENDS = ("auto", "reference")

# Numbers in one block of comparisons. On the CPU a block (1 MB in float32) stays in a core's L2
# cache through the few passes over it; on a GPU launching is what costs.
_BLOCK_CPU = 1 << 18
_BLOCK_CUDA = 1 << 23
# Queries whose scores (queries x items) exist at one time in the loss.
_QUERIES = 512
# How far the norm of an embedding may be from 1. bfloat16 rounds each entry by up to 0.4 %.
_NORM_SLACK = 0.02


# --------------------------------------------------------------------------------------------------
# Rows of scores
# --------------------------------------------------------------------------------------------------


def _check_scores(scores: Tensor, relevance: Tensor, valid: Tensor | None) -> None:
    check_floating(scores, "scores", ndim=2)
    check_bool(relevance, "relevance")
    check_shape(relevance, "relevance", scores.shape)
    if valid is not None:
        check_bool(valid, "valid")
        check_shape(valid, "valid", scores.shape)
    check_same_device([("scores", scores), ("relevance", relevance), ("valid", valid)])
    # Looking at values would break the graph while torch.compile traces, so it sees shapes only.
    if torch.compiler.is_compiling():
        return
    check_finite(scores, "scores")
    counted = relevance if valid is None else relevance & valid
    none = ~counted.any(1)
    if bool(none.any()):
        raise ValueError(
            "relevance: expected at least one relevant (and valid) item for every query, got none "
            f"for {int(none.sum())} of {len(none)} queries"
        )


def _blocks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _sweep(
    scores: Tensor, positives: Tensor, temperature: float, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Smooth AP of queries that have equally many relevant items, and its gradient.

    ``scores`` (n, M) holds ``-inf`` where an item is not in the retrieval set; ``positives`` (n, p)
    holds the columns of the relevant items. Returns (n,) values and (n, M) gradients, row by row.
    The scores may be overwritten.
    """
    if kernels.wanted(scores):
        from affnb.kernels.smooth_ap import sweep

        return sweep(scores.contiguous(), positives.contiguous(), temperature, with_grad)
    count, items = scores.shape
    p = positives.shape[1]
    budget = _BLOCK_CUDA if scores.is_cuda else _BLOCK_CPU
    rows = min(p, max(1, budget // items))  # relevant items i of a query in one block
    queries = max(1, budget // (rows * items))
    z = scores / temperature
    own = z.gather(1, positives)
    values = scores.new_zeros(count)
    gradient = torch.zeros_like(scores) if with_grad else None
    buffer = scores.new_empty(min(count, queries) * rows * items)
    for some in _blocks(count, queries):
        columns = positives[some]
        pull = z.new_zeros(columns.shape)  # the gradient at the relevant items
        for part in _blocks(p, rows):
            shape = (len(columns), part.stop - part.start, items)
            g = buffer[: math.prod(shape)].view(shape)
            torch.sub(z[some, None], own[some, part, None], out=g).sigmoid_()  # g[q, i, j]
            here = columns[:, None].expand(*shape[:2], p)
            among = g.gather(2, here)
            among.diagonal(offset=part.start, dim1=1, dim2=2).zero_()  # j = i is no comparison
            wrong = g.scatter_(2, here, 0.0)  # what is left: the comparisons with wrong items
            a, n = 1 + among.sum(2), wrong.sum(2)
            b = a + n
            values[some] += (a / b).sum(1) / p
            if gradient is None:
                continue
            # The slopes of the two kinds of comparisons, times the slope g (1 - g) of the sigmoid.
            rise, fall = n / b.square(), a / b.square()
            among.addcmul_(among, among, value=-1)
            wrong.addcmul_(wrong, wrong, value=-1)
            gradient[some] -= torch.bmm(fall[:, None], wrong)[:, 0]
            pull += torch.bmm(rise[:, None], among)[:, 0]
            pull[:, part] += fall * wrong.sum(2) - rise * among.sum(2)
        if gradient is not None:
            gradient[some] = gradient[some].scatter_(1, columns, pull)
    if gradient is not None:
        gradient /= p * temperature
    return values, gradient


def _by_count(count: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Queries (as indices, at most ``size`` at a time) that have equally many relevant items."""
    ordered, index = count.sort(stable=True)
    numbers, lengths = torch.unique_consecutive(ordered, return_counts=True)
    for number, same in zip(numbers.tolist(), torch.split(index, lengths.tolist()), strict=True):
        if number:
            for some in torch.split(same, size):
                yield number, some


class _SmoothRows(torch.autograd.Function):
    """Smooth AP of each row of scores, with its gradient made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, relevance: Tensor, temperature: float) -> Tensor:
        with_grad = ctx.needs_input_grad[0]
        values = scores.new_zeros(len(scores))
        gradient = torch.zeros_like(scores) if with_grad else None
        for count, some in _by_count(relevance.sum(1), _QUERIES):
            positives = relevance[some].nonzero()[:, 1].view(len(some), count)
            values[some], slopes = _sweep(scores[some], positives, temperature, with_grad)
            if gradient is not None and slopes is not None:
                gradient[some] = slopes
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        check_differentiated_once("smooth_average_precision")
        (gradient,) = ctx.saved_tensors
        return grads[0][:, None] * gradient, None, None


@uncompiled  # the blocks follow the number of relevant items, which a traced graph cannot
def _smooth_auto(
    scores: Tensor, relevance: Tensor, temperature: float, valid: Tensor | None
) -> Tensor:
    with torch.autocast(scores.device.type, enabled=False):
        x = scores.to(wide_dtype(scores))
        if valid is not None:
            x, relevance = x.masked_fill(~valid, -torch.inf), relevance & valid
        result: Tensor = _SmoothRows.apply(x, relevance, temperature)  # type: ignore[no-untyped-call]
    return result


def _smooth_reference(
    scores: Tensor, relevance: Tensor, temperature: float, valid: Tensor | None
) -> Tensor:
    """Equation 5 with Eq. 6 for the indicator, all comparisons at once; 0 for a query without P."""
    items = scores.shape[1]
    x = scores.to(wide_dtype(scores))
    keep = torch.ones_like(relevance) if valid is None else valid
    relevant = (relevance & keep).to(x.dtype)
    D = x[:, None, :] - x[:, :, None]  # D[q, i, j] = s_j - s_i
    others = ~torch.eye(items, dtype=torch.bool, device=x.device)
    G = torch.sigmoid(D / temperature) * (keep[:, None, :] & others)
    a = 1 + (G * relevant[:, None, :]).sum(-1)
    b = 1 + G.sum(-1)
    return ((a / b) * relevant).sum(-1) / relevant.sum(-1).clamp(min=1)


def smooth_average_precision(
    scores: Tensor,
    relevance: Tensor,
    temperature: float = 0.01,
    valid: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    r"""Smoothed average precision of each query (Eq. 5 with the sigmoid of Eq. 6).

    .. math::
        \mathrm{AP}^\tau = \frac1{|P|} \sum_{i \in P} \frac{a_i}{a_i + n_i}, \quad
        a_i = 1 + \sum_{j \in P, j \ne i} \sigma\!\Big(\frac{s_j - s_i}{\tau}\Big), \quad
        n_i = \sum_{j \notin P} \sigma\!\Big(\frac{s_j - s_i}{\tau}\Big)

    Parameters
    ----------
    scores
        Scores of ``M`` items for each of ``Q`` queries, floating, finite, shape ``(Q, M)``; larger
        means more similar. Any score will do; its scale acts as an inverse temperature.
    relevance
        Which items are relevant to which query, bool, shape ``(Q, M)``; at least one a query.
    temperature
        :math:`\tau`, in the unit of the scores, positive. Default 0.01, the paper's for cosines.
    valid
        Bool, ``(Q, M)``: ``False`` takes an item out of a query's retrieval set (the query itself,
        or padding). Default: all items take part.
    backend
        ``"auto"``: block by block. ``"reference"``: the printed equation, ``Q x M x M`` numbers; it
        can be differentiated twice.

    Returns
    -------
    Tensor
        Shape ``(Q,)``, in (0, 1]; float64 for float64 scores, else float32. It is 1, with a zero
        gradient, where every valid item is relevant.

    Raises
    ------
    TypeError
        ``scores`` not floating, ``relevance`` or ``valid`` not bool, or not tensors.
    ValueError
        Shapes or devices that do not fit, scores that are not finite, a query without a relevant
        valid item, ``temperature <= 0``, an unknown option. (While ``torch.compile`` traces, values
        are not looked at; a query without a relevant item is then 0.)

    Notes
    -----
    Time ``O(M sum_q |P_q|)``, memory ``O(Q M)``; the gradient is made in the forward pass, and
    ``create_graph=True`` raises a ``RuntimeError``. Comparisons are made in float32 at least, also
    under autocast. ``torch.compile`` runs the sweep uncompiled (a graph break).

    Examples
    --------
    >>> scores = torch.tensor([[0.9, 0.8, 0.1]])
    >>> smooth_average_precision(scores, torch.tensor([[True, False, True]]))  # (1/1 + 2/3) / 2
    tensor([0.8333])
    """
    _check_scores(scores, relevance, valid)
    check_positive(temperature, "temperature")
    check_one_of(backend, "backend", _BACKENDS)
    smooth = _smooth_auto if backend == "auto" else _smooth_reference
    return smooth(scores, relevance, float(temperature), valid)


def average_precision(
    scores: Tensor,
    relevance: Tensor,
    valid: Tensor | None = None,
    ties: Ties = "strict",
    *,
    backend: Backend = "auto",
) -> Tensor:
    r"""Exact average precision of each query (Eq. 2 with the ranks of Eq. 3).

    Parameters
    ----------
    scores, relevance, valid
        As for :func:`smooth_average_precision`.
    ties
        What an item with the same score as item ``i`` adds to the rank of ``i``. ``"strict"``
        (Eq. 3): nothing; *equal scores for everything then have AP 1*. ``"mid"``: one half, the
        limit of the smoothed form at temperature 0. ``"sklearn"``: one, as in
        ``sklearn.metrics.average_precision_score``, where a relevant item comes last among its
        equals. Without ties the three agree.
    backend
        ``"auto"``: by sorting. ``"reference"``: the printed double sum, ``Q x M x M`` numbers.

    Returns
    -------
    Tensor
        Shape ``(Q,)``, in (0, 1], without autograd history (AP is piecewise constant); float64 for
        float64 scores, else float32.

    Raises
    ------
    TypeError, ValueError
        As :func:`smooth_average_precision`; also for an unknown ``ties``.

    Notes
    -----
    Time ``O(Q M log M)``, memory ``O(Q M)``.

    Examples
    --------
    >>> scores = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]])
    >>> relevance = torch.tensor([[1, 0, 1, 1, 0, 0, 0, 1]], dtype=torch.bool)
    >>> average_precision(scores, relevance)  # 35/48
    tensor([0.7292])
    """
    _check_scores(scores, relevance, valid)
    check_one_of(ties, "ties", _TIES)
    check_one_of(backend, "backend", _BACKENDS)
    x = scores.detach().to(wide_dtype(scores))
    keep = torch.ones_like(relevance) if valid is None else valid
    relevance = relevance & keep
    if backend == "reference":
        return _exact_reference(x, relevance, keep, ties)
    # Only the places of relevant items matter: find their scores among all, and among themselves.
    number = relevance.sum(1)
    wanted = x.masked_fill(~relevance, -torch.inf)
    wanted = wanted.topk(int(number.max()) if len(number) else 0).values.contiguous()  # (Q, most)
    share = {"strict": 0.0, "mid": 0.5, "sklearn": 1.0}[ties]
    ranks = []
    for values in (wanted.flip(1), x.masked_fill(~keep, -torch.inf).sort(1).values):
        above = values.shape[1] - torch.searchsorted(values, wanted, right=True)
        equal = values.shape[1] - torch.searchsorted(values, wanted) - above - 1
        ranks.append(1 + above + share * equal)
    precision = (ranks[0].to(x.dtype) / ranks[1]).masked_fill(wanted == -torch.inf, 0.0)
    return precision.sum(1) / number.clamp(min=1)


def _exact_reference(x: Tensor, relevance: Tensor, keep: Tensor, ties: str) -> Tensor:
    others = ~torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    D = x[:, None, :] - x[:, :, None]
    at_zero = {"strict": 0.0, "mid": 0.5, "sklearn": 1.0}[ties]
    above = torch.heaviside(D, x.new_tensor(at_zero)) * (keep[:, None, :] & others)
    a = 1 + (above * relevance[:, None, :]).sum(-1)
    b = 1 + above.sum(-1)
    return ((a / b) * relevance).sum(-1) / relevance.sum(-1).clamp(min=1)


def recall_at_k(
    scores: Tensor, relevance: Tensor, ks: Sequence[int], valid: Tensor | None = None
) -> Tensor:
    """Share of queries with a relevant item among the first K: R@K as retrieval reports it.

    Parameters
    ----------
    scores, relevance, valid
        As for :func:`smooth_average_precision`.
    ks
        The values of K, positive integers.

    Returns
    -------
    Tensor
        float32, shape ``(len(ks),)``, in [0, 1]. A relevant item comes after the others with the
        same score, so ties never flatter.

    Raises
    ------
    TypeError, ValueError
        As :func:`smooth_average_precision`; no query at all; ``ks`` not integers, or below 1.

    Notes
    -----
    Time and memory ``O(Q M)``.

    Examples
    --------
    >>> scores = torch.tensor([[0.9, 0.8, 0.1], [0.5, 0.5, 0.5]])
    >>> relevance = torch.tensor([[True, False, False], [False, True, False]])
    >>> recall_at_k(scores, relevance, [1, 2, 3])
    tensor([0.5000, 0.5000, 1.0000])
    """
    _check_scores(scores, relevance, valid)
    if scores.shape[0] == 0:
        raise ValueError(f"scores: expected at least one query, got shape {tuple(scores.shape)}")
    check_integers(ks, "ks", 1)
    x = scores.detach()
    if valid is not None:
        relevance = relevance & valid
    best = x.masked_fill(~relevance, -torch.inf).amax(1, keepdim=True)
    ahead = (x >= best) & ~relevance
    if valid is not None:
        ahead &= valid
    rank = 1 + ahead.sum(1)
    return torch.stack([(rank <= k).float().mean() for k in ks]) if ks else x.new_zeros(0).float()


# --------------------------------------------------------------------------------------------------
# Batches of embeddings
# --------------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    """Where the relevant items of each query stand in a gallery sorted by label."""

    order: Tensor  # (M,) columns of the gallery, class after class
    first: Tensor  # (n,) where the class of a query begins in ``order``
    number: Tensor  # (n,) its relevant items, the query itself left out if it is in the gallery
    rank: Tensor | None  # (n,) where the query itself stands in its class, if it is


def _find(labels: Tensor, gallery_labels: Tensor, own: Tensor | None) -> _Found:
    ordered, order = gallery_labels.sort(stable=True)
    first = torch.searchsorted(ordered, labels)
    number = torch.searchsorted(ordered, labels, right=True) - first
    if own is None:
        return _Found(order, first, number, None)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return _Found(order, first, number - 1, place[own] - first)


def _positives(found: _Found, some: Tensor, count: int) -> Tensor:
    """Columns of the relevant items of some queries, all of which have ``count`` of them."""
    step = torch.arange(count, device=some.device).expand(len(some), count)
    if found.rank is not None:
        step = step + (step >= found.rank[some, None])  # step over the query itself
    return found.order[found.first[some, None] + step]


class _RetrievalValue(torch.autograd.Function):
    """Sum over queries of the smooth AP, with the gradients for queries and gallery.

    Each rank sweeps its own queries against the gallery of all. A gallery row then has pulls from
    the queries of every rank, which one all-reduce adds up; backward only multiplies.
    Returns the mean loss over the queries (of all ranks) that have a relevant item.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        labels: Tensor,
        gallery: Tensor,
        gallery_labels: Tensor,
        leave_out_self: bool,
        temperature: float,
        group: ProcessGroup | None,
    ) -> Tensor:
        with_grad = any(ctx.needs_input_grad)
        own_rows = slice(0, len(gallery))
        if group is not None:
            flag = torch.tensor(float(with_grad), device=queries.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=group)
            with_grad = bool(flag)  # the pulls of this rank's queries are the others' gradients
            parts = all_gather_uneven(gallery, group)
            begin = sum(len(part) for part in parts[: torch.distributed.get_rank(group)])
            own_rows = slice(begin, begin + len(gallery))
            gallery = torch.cat(parts)
            gallery_labels = torch.cat(all_gather_uneven(gallery_labels.long(), group))
        own = None
        if leave_out_self:
            own = torch.arange(own_rows.start, own_rows.stop, device=queries.device)
        found = _find(labels.long(), gallery_labels.long(), own)
        # A query whose whole retrieval set is relevant has AP 1, whatever the scores.
        perfect = (found.number == len(gallery) - leave_out_self) & (found.number > 0)
        # Both stay on the device until the end: a GPU would have to wait for each number read.
        total = perfect.sum(dtype=torch.float64)
        used = (found.number > 0).sum(dtype=torch.float64)
        todo = found.number.masked_fill(perfect, 0)
        pulls = [torch.zeros_like(v) if with_grad else None for v in (queries, gallery)]
        for count, some in _by_count(todo, _QUERIES):
            q = queries[some]
            scores = q @ gallery.T
            if own is not None:
                scores.scatter_(1, own[some, None], -torch.inf)
            values, slopes = _sweep(scores, _positives(found, some, count), temperature, with_grad)
            total += values.sum(dtype=torch.float64)
            if slopes is not None and pulls[0] is not None and pulls[1] is not None:
                pulls[0][some] = slopes @ gallery
                pulls[1].addmm_(slopes.T, q)
        if group is not None:
            numbers = torch.stack([total, used])
            torch.distributed.all_reduce(numbers, group=group)
            total, used = numbers
            if pulls[1] is not None:
                torch.distributed.all_reduce(pulls[1], group=group)
        if pulls[0] is not None and pulls[1] is not None:
            scale = (-1 / used.clamp(min=1)).to(queries.dtype)
            ctx.save_for_backward(pulls[0].mul_(scale), pulls[1][own_rows].mul_(scale))
        return ((used - total) / used.clamp(min=1)).to(queries.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_differentiated_once("smooth_ap_loss")
        for_queries, for_gallery = ctx.saved_tensors
        return grads[0] * for_queries, None, grads[0] * for_gallery, None, None, None, None


@uncompiled  # the blocks follow the labels' values, which a traced graph cannot
def _loss_auto(
    queries: Tensor,
    labels: Tensor,
    gallery: Tensor,
    gallery_labels: Tensor,
    leave_out_self: bool,
    temperature: float,
    group: ProcessGroup | None,
) -> Tensor:
    with torch.autocast(queries.device.type, enabled=False):
        result: Tensor = _RetrievalValue.apply(  # type: ignore[no-untyped-call]
            queries, labels, gallery, gallery_labels, leave_out_self, temperature, group
        )
    return result


def _loss_reference(
    queries: Tensor,
    labels: Tensor,
    gallery: Tensor,
    gallery_labels: Tensor,
    leave_out_self: bool,
    temperature: float,
    group: ProcessGroup | None,
) -> Tensor:
    """Equations 1, 5, 6 and 7 over all queries of all ranks at once."""
    if group is not None:
        queries, gallery = (gather_with_grad(v, group) for v in (queries, gallery))
        labels, gallery_labels = (
            torch.cat(all_gather_uneven(v.long(), group)) for v in (labels, gallery_labels)
        )
    with torch.autocast(queries.device.type, enabled=False):
        relevance = labels[:, None] == gallery_labels
        valid = torch.ones_like(relevance)
        if leave_out_self:
            valid.fill_diagonal_(False)
        has = (relevance & valid).any(1)
        ap = _smooth_reference(queries @ gallery.T, relevance, temperature, valid)
        return ((1 - ap) * has).sum() / has.sum().clamp(min=1)


def _check_embeddings(embeddings: Tensor, name: str, labels: Tensor, labels_name: str) -> None:
    check_floating(embeddings, name, ndim=2)
    check_labels(labels, labels_name, length=embeddings.shape[0])
    check_same_device([(name, embeddings), (labels_name, labels)])
    if torch.compiler.is_compiling() or embeddings.numel() == 0:
        return
    check_finite(embeddings, name)
    norms = torch.linalg.vector_norm(embeddings.detach().to(wide_dtype(embeddings)), dim=1)
    # A row of zeros, which normalising leaves as it is, stays legal.
    if bool((((norms - 1).abs() > _NORM_SLACK) & (norms > 0)).any()):
        raise ValueError(
            f"{name}: expected rows of norm 1 (torch.nn.functional.normalize), "
            f"got norms from {float(norms.min()):.4g} to {float(norms.max()):.4g}"
        )


def _check_options(
    temperature: float, include_self: bool, group: ProcessGroup | None, backend: str
) -> None:
    check_positive(temperature, "temperature")
    check_flag(include_self, "include_self")
    check_one_of(backend, "backend", _BACKENDS)
    if group is not None:
        check_group(group)


def _retrieval_loss(
    embeddings: Tensor,
    labels: Tensor,
    gallery: Tensor | None,
    gallery_labels: Tensor | None,
    temperature: float,
    include_self: bool,
    group: ProcessGroup | None,
    backend: str,
) -> Tensor:

    def check() -> None:
        _check_options(temperature, include_self, group, backend)
        _check_embeddings(embeddings, "embeddings", labels, "labels")
        if (gallery is None) != (gallery_labels is None):
            missing = "gallery" if gallery is None else "gallery_labels"
            raise ValueError(f"{missing}: expected both gallery and gallery_labels, got only one")
        if gallery is not None and gallery_labels is not None:
            _check_embeddings(gallery, "gallery", gallery_labels, "gallery_labels")
            check_shape(gallery, "gallery", (None, embeddings.shape[1]))
            check_same_device([("embeddings", embeddings), ("gallery", gallery)])

    check_together(check, group)

    leave_out_self = gallery is None and not include_self
    queries = embeddings.to(wide_dtype(embeddings))
    if gallery is None or gallery_labels is None:
        gallery, gallery_labels = queries, labels
    else:
        dtype = torch.promote_types(queries.dtype, gallery.dtype)
        queries, gallery = queries.to(dtype), gallery.to(dtype)
    loss = _loss_auto if backend == "auto" else _loss_reference
    return loss(queries, labels, gallery, gallery_labels, leave_out_self, float(temperature), group)


def smooth_ap_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.01,
    include_self: bool = False,
    group: ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Smooth-AP loss of a batch: one minus the mean smoothed AP, each item a query once (Eq. 7).

    .. math:: \mathcal L = \frac1m \sum_{q=1}^m (1 - \mathrm{AP}^\tau_q), \qquad
        s_{qi} = \langle v_q, v_i \rangle

    Parameters
    ----------
    embeddings
        *Normalised* embeddings, floating, shape ``(B, d)``, each row of norm 1 (to 2 %, so that half
        precision passes) or zero. Scores are their inner products, the cosines of Eq. 1. Were rows
        of any length accepted, the network would lower the loss by making them longer: the scale of
        the scores *is* the inverse temperature.
    labels
        Classes, integers, shape ``(B,)``, any values, any number of items a class, in any order.
    temperature
        :math:`\tau` of the sigmoid (Eq. 6), in units of the cosine, positive. Default 0.01, the
        paper's.
    include_self
        Whether a query is in its own retrieval set, as a relevant item with score 1. The paper's
        test protocol leaves it out (its section 5.2), and so do we. With ``True`` the loss is that
        of the authors' published code, for batches of equal classes.
    group
        A ``torch.distributed`` process group: the loss of the batch that its ranks hold together,
        and for each rank the exact gradient of that one loss with respect to its own rows (see
        Notes). Default ``None``: this process's rows alone, also where others run.
    backend
        ``"auto"``: block by block. ``"reference"``: the printed equations, ``B x B x B`` numbers; it
        can be differentiated twice.

    Returns
    -------
    Tensor
        A scalar in [0, 1); float64 for float64 embeddings, else float32. Queries without a relevant
        item are left out of the mean; with none left it is 0 with a zero gradient, as it is for a
        batch of one class and an empty one.

    Raises
    ------
    TypeError
        ``embeddings`` not floating, ``labels`` not integers, ``include_self`` not a bool, ``group``
        not a process group.
    ValueError
        Wrong shapes or lengths, values that are not finite, rows that are not normalised, devices
        that differ, ``temperature <= 0``, an unknown option. With ``group``, an error on one rank is
        raised on all.

    Notes
    -----
    Time ``O(B sum_q |P_q| + B^2 d)``, that is the number of (query, relevant item) pairs times the
    batch; memory ``O(B d)`` plus the scores of 512 queries and one block. The gradient is made in
    the forward pass, so backward only multiplies; ``create_graph=True`` raises a ``RuntimeError``.
    Autocast does not reach inside, and half-precision embeddings are widened to float32: their
    products near 1 would be 0.4 temperatures apart in bfloat16. On CUDA keep
    ``torch.set_float32_matmul_precision`` at ``"highest"`` for the same reason. ``torch.compile``
    runs the sweep uncompiled (a graph break).

    With ``group``, embeddings and labels are gathered (shards may be uneven, or empty), each rank
    sweeps its own queries, and one all-reduce of ``B x d`` numbers adds up what the queries of all
    ranks do to a row. Backward communicates nothing. Every rank gets the same value, and its rows
    the gradient of that value times the rank's own upstream gradient. ``DistributedDataParallel``
    *averages* gradients over ranks, so under it multiply the loss by the world size.

    Examples
    --------
    >>> angles = torch.tensor([0.0, 0.5, 0.3, 2.0])
    >>> v = torch.stack([angles.cos(), angles.sin()], 1).requires_grad_()
    >>> loss = smooth_ap_loss(v, torch.tensor([0, 0, 1, 1]))  # AP is 1/2, 1/2, 1/3, 1/2
    >>> round(loss.item(), 4)
    0.5416
    >>> loss.backward()
    """
    return _retrieval_loss(
        embeddings, labels, None, None, temperature, include_self, group, backend
    )


class SmoothAPLoss(nn.Module):
    """Criterion of :func:`smooth_ap_loss`, and its form with a gallery of its own.

    Parameters
    ----------
    temperature, include_self, group, backend
        See :func:`smooth_ap_loss`.

    Raises
    ------
    TypeError, ValueError
        As :func:`smooth_ap_loss`, for the options when the criterion is made.

    Notes
    -----
    Called with ``(embeddings, labels)`` it is :func:`smooth_ap_loss`. Called with
    ``(embeddings, labels, gallery, gallery_labels)`` the embeddings are queries alone and rank the
    gallery, from which nothing is left out (``include_self`` plays no part): a memory bank, say.
    Gradients flow to both; with ``group`` the gallery is that of all ranks together, so a bank that
    every rank holds in full must not be passed on more than one of them.
    Time ``O(M sum_q |P_q| + Q M d)``, memory ``O((Q + M) d)`` and a block of scores. No state.

    Examples
    --------
    >>> criterion = SmoothAPLoss(temperature=0.05)
    >>> criterion
    SmoothAPLoss(temperature=0.05, include_self=False, backend='auto')
    >>> query, bank = torch.tensor([[1.0, 0.0]]), torch.eye(2)
    >>> criterion(query, torch.tensor([7]), bank, torch.tensor([3, 7]))  # ranked second: 1 - 1/2
    tensor(0.5000)
    """

    def __init__(
        self,
        temperature: float = 0.01,
        include_self: bool = False,
        group: ProcessGroup | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _check_options(temperature, include_self, group, backend)
        self.temperature = temperature
        self.include_self = include_self
        self.group = group
        self.backend: Backend = backend

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        gallery: Tensor | None = None,
        gallery_labels: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of embeddings ``(B, d)``, labels ``(B,)`` (and a gallery ``(M, d)``)."""
        return _retrieval_loss(
            embeddings,
            labels,
            gallery,
            gallery_labels,
            self.temperature,
            self.include_self,
            self.group,
            self.backend,
        )

    def extra_repr(self) -> str:
        """Return the options, for ``repr``."""
        return (
            f"temperature={self.temperature}, include_self={self.include_self}, "
            f"backend={self.backend!r}"
        )


# --------------------------------------------------------------------------------------------------
# Batches of P classes with K items each
# --------------------------------------------------------------------------------------------------


class PKSampler(Sampler[list[int]]):
    """Batches of P classes, drawn at random, with K items each (the paper's section 5.3).

    Hand it to a loader as ``DataLoader(data, batch_sampler=PKSampler(labels, 56, 4))``.

    Parameters
    ----------
    labels
        Class of each item of the data set, integers, shape ``(n,)`` (a tensor or a sequence).
    classes_per_batch
        P, at least 1.
    samples_per_class
        K, at least 2 (the paper: 4). Of a class with fewer items all are taken, so such a batch is
        smaller; the loss takes any composition. Classes of a single item are never drawn: they
        have nothing to be ranked.
    generator
        Source of the draws. Default: PyTorch's global one. Under ``torch.distributed`` give each
        rank a generator with a seed of its own.
    batches
        Batches in one pass. Default: as many whole ones as the items would fill, at least 1.

    Raises
    ------
    TypeError
        ``labels`` not integers, sizes not integers, ``generator`` not a generator.
    ValueError
        Sizes below their minimum; fewer than P classes with at least two items.

    Notes
    -----
    Time ``O(n log n)`` once, then ``O(classes + P K)`` a batch; memory ``O(n)``. Neither a class nor
    an item comes twice in one batch; across batches draws are independent.

    Examples
    --------
    >>> labels = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    >>> sampler = PKSampler(labels, 2, 2, torch.Generator().manual_seed(0))
    >>> len(sampler), [len({labels[i] for i in batch}) for batch in sampler]
    (2, [2, 2])
    """

    def __init__(
        self,
        labels: Tensor | Sequence[int],
        classes_per_batch: int,
        samples_per_class: int,
        generator: torch.Generator | None = None,
        *,
        batches: int | None = None,
    ) -> None:
        given = labels if isinstance(labels, Tensor) else torch.as_tensor(labels)
        check_labels(given, "labels")
        sizes = [
            ("classes_per_batch", classes_per_batch, 1),
            ("samples_per_class", samples_per_class, 2),
        ]
        if batches is not None:
            sizes.append(("batches", batches, 1))
        for name, value, least in sizes:
            check_integer(value, name, least)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {generator!r}")
        ordered, order = given.cpu().sort(stable=True)
        lengths = torch.unique_consecutive(ordered, return_counts=True)[1].tolist()
        self._items = [items for items in torch.split(order, lengths) if len(items) > 1]
        if len(self._items) < classes_per_batch:
            raise ValueError(
                f"labels: expected at least {classes_per_batch} classes with two or more items, "
                f"got {len(self._items)}"
            )
        self.classes_per_batch = classes_per_batch
        self.samples_per_class = samples_per_class
        self.generator = generator
        full = len(given) // (classes_per_batch * samples_per_class)
        self.batches = batches if batches is not None else max(1, full)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.batches):
            batch: list[int] = []
            chosen = torch.randperm(len(self._items), generator=self.generator)
            for c in chosen[: self.classes_per_batch].tolist():
                items = self._items[c]
                drawn = torch.randperm(len(items), generator=self.generator)
                batch += items[drawn[: self.samples_per_class]].tolist()
            yield batch

"""Affinity fields: neighbouring pixels should agree or differ in their predictions as their labels do.

For each ordered pair of a pixel ``i`` and a neighbour ``j``, and each class channel ``c``, the
divergence ``D(p_j(c) || p_i(c))`` of two Bernoulli distributions is made small where the two one-hot
labels agree in the channel (grouping) and at least a margin where they differ (separating). Sizes of
the neighbourhood are weighed for each class, in the paper by an adversary (Ke et al., "Adaptive
Affinity Fields for Semantic Segmentation", ECCV 2018; equation numbers below are that paper's).

Two identities make it fast. With the binary logits ``a = logit p_i(c)`` and ``b = logit p_j(c)``,

    D(p_j || p_i) = softplus(a) - softplus(b) - p_j (a - b),
    D(p_j || p_i) + D(p_i || p_j) = (p_j - p_i) (b - a),

so nothing overflows, and the two orders of a grouping pair cost one product. A separating pair
differs in two channels only, those of its two labels, which are gathered. The images are walked over
in blocks of rows that fit a cache, forward and again backward; no unfolded copy exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affnb import kernels
from affnb.checks import (
    check_differentiated_once,
    check_finite,
    check_flag,
    check_floating,
    check_integer,
    check_labels,
    check_one_of,
    check_positive,
    check_same_device,
    check_shape,
    check_tensor,
)
from affnb.distributed import check_group, check_together
from affnb.kernels import uncompiled
from affnb.precision import wide_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "AdaptiveAffinityFieldLoss",
    "affinity_field_terms",
    "bernoulli_kl_with_logits",
    "boundary_scores",
    "class_logits",
    "instance_iou",
    "neighbour_offsets",
    "shifted_pair",
]

Same = Literal["channel", "class"]
Neighbourhood = Literal["ring8", "full"]
Weights = Literal["adversarial", "uniform", "hard_max", "entropic"]
ClassReduction = Literal["mean", "sum", "pairs"]
Backend = Literal["auto", "reference"]

_SAME = ("channel", "class")
_NEIGHBOURHOODS = ("ring8", "full")
_WEIGHTS = ("adversarial", "uniform", "hard_max", "entropic")
_CLASS_REDUCTIONS = ("mean", "sum", "pairs")
_BACKENDS = ("auto", "reference")

# Numbers in one array of a block, of which ten to twenty exist at a time. On a CPU they should stay in
# its cache; anywhere, all together should be below the size of the logits, unless those are small.
_CPU_BLOCK, _CUDA_BLOCK, _SMALL_BLOCK = 2**17, 2**22, 2**14


# --------------------------------------------------------------------------------------------------
# Pairs of pixels, and the divergence of a pair
# --------------------------------------------------------------------------------------------------


def neighbour_offsets(size: int, kind: Neighbourhood = "ring8") -> list[tuple[int, int]]:
    """List the offsets (down, right) from a pixel to its neighbours, row by row.

    Parameters
    ----------
    size
        Distance s in pixels, at least 1; the paper's kernel is ``2 s + 1`` wide.
    kind
        ``"ring8"``: the 8 points of ``{-s, 0, s}^2`` without the centre, as in the authors' published
        code. ``"full"``: all ``(2 s + 1)^2 - 1`` neighbours in the square, the other reading of a
        "k x k kernel".

    Returns
    -------
    list of (int, int)

    Raises
    ------
    TypeError, ValueError
        ``size`` not an integer or below 1; an unknown kind.

    Notes
    -----
    Time and memory ``O(1)`` or ``O(s^2)``.

    Examples
    --------
    >>> neighbour_offsets(2)
    [(-2, -2), (-2, 0), (-2, 2), (0, -2), (0, 2), (2, -2), (2, 0), (2, 2)]
    >>> len(neighbour_offsets(2, "full"))
    24
    """
    check_integer(size, "size", 1)
    check_one_of(kind, "kind", _NEIGHBOURHOODS)
    steps = (-size, 0, size) if kind == "ring8" else range(-size, size + 1)
    return [(dy, dx) for dy in steps for dx in steps if (dy, dx) != (0, 0)]


def _span(length: int, step: int) -> tuple[slice, slice]:
    """The slices of an axis that hold the first and the second ends of all pairs at a distance."""
    count = max(0, length - abs(step))
    first = slice(max(0, -step), max(0, -step) + count)
    return first, slice(first.start + step, first.stop + step)


def shifted_pair(x: Tensor, dy: int, dx: int) -> tuple[Tensor, Tensor]:
    """Return centres and neighbours of all pairs at one offset, as two views of ``x``.

    Parameters
    ----------
    x
        Shape ``(..., H, W)``, any dtype.
    dy, dx
        Offset from centre to neighbour in pixels, down and to the right; either may be negative.

    Returns
    -------
    tuple of Tensor
        Two views of shape ``(..., H - |dy|, W - |dx|)`` (empty where the offset leaves the image);
        nothing is copied, rolled or padded.

    Raises
    ------
    TypeError, ValueError
        ``x`` is not a tensor or has fewer than two dimensions.

    Notes
    -----
    Time and memory ``O(1)``.

    Examples
    --------
    >>> centre, neighbour = shifted_pair(torch.arange(6).view(2, 3), 0, 1)
    >>> centre.tolist(), neighbour.tolist()
    ([[0, 1], [3, 4]], [[1, 2], [4, 5]])
    """
    check_tensor(x, "x")
    if x.ndim < 2:
        raise ValueError(f"x: expected at least 2 dimensions, got shape {tuple(x.shape)}")
    (top, left), (bottom, right) = zip(_span(x.shape[-2], dy), _span(x.shape[-1], dx), strict=True)
    return x[..., top, left], x[..., bottom, right]


def _class_logits(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Binary logits of all channels, the largest channel's index, and the shares of the others.

    With ``t`` the largest logit and ``r`` the log-sum-exp of the others, whose shares are ``rho_c =
    exp(z_c - r)``: the largest channel has the binary logit ``t - r``, another one ``z_c - log(e^t +
    e^r (1 - rho_c))``. No term is a difference of nearly equal numbers, and nothing overflows.
    """
    top, index = z.max(1, keepdim=True)
    rest = z.scatter(1, index, -torch.inf)
    others = rest.logsumexp(1, keepdim=True)
    rho = (rest - others).exp()
    a = z - top - ((others - top).exp() * (1 - rho).clamp(min=0)).log1p()
    return a.scatter(1, index, top - others), index, rho


def class_logits(logits: Tensor) -> Tensor:
    r"""Turn class logits into one binary logit a channel, whose sigmoid is the softmax.

    .. math:: \operatorname{logit} p(c) = z_c - \operatorname{LSE}_{c' \ne c} z_{c'}

    Parameters
    ----------
    logits
        Floating, shape ``(B, C, H, W)``, C at least 2, finite.

    Returns
    -------
    Tensor
        The same shape; float64 for float64 input, else float32.

    Raises
    ------
    TypeError, ValueError
        Not a floating tensor of that shape, or not finite.

    Notes
    -----
    Time and memory ``O(BCHW)``. Accurate also where a probability rounds to 0 or 1.

    Examples
    --------
    >>> z = torch.tensor([2.0, 0.0, -100.0]).view(1, 3, 1, 1)
    >>> [round(x, 4) for x in class_logits(z).flatten().tolist()]
    [2.0, -2.0, -102.1269]
    """
    _check_logits(logits)
    return _class_logits(logits.to(wide_dtype(logits)))[0]


def bernoulli_kl_with_logits(neighbour: Tensor, centre: Tensor) -> Tensor:
    r"""Divergence :math:`D(p \| q)` of two Bernoulli distributions, from their logits.

    .. math:: D = \operatorname{sp}(a) - \operatorname{sp}(b) - \sigma(b) (a - b),
        \quad p = \sigma(b),\ q = \sigma(a)

    Parameters
    ----------
    neighbour, centre
        Binary logits b and a, floating, finite, shapes that broadcast. In an affinity field the
        neighbour's prediction comes first (Eq. 3).

    Returns
    -------
    Tensor
        Divergence in nats, at least 0, of the broadcast shape. Its gradient is ``q - p`` in ``a``
        and ``p (1 - p) (b - a)`` in ``b``.

    Raises
    ------
    TypeError
        Not floating-point tensors.
    ValueError
        Devices that differ.

    Notes
    -----
    Time and memory ``O(1)`` for each element. Both logits change sign where ``b > 0``, which leaves D
    as it is and keeps the terms from cancelling.

    Examples
    --------
    >>> p, q = torch.tensor(0.9), torch.tensor(0.5)
    >>> round(bernoulli_kl_with_logits(p.logit(), q.logit()).item(), 4)
    0.3681
    >>> bernoulli_kl_with_logits(torch.tensor(100.0), torch.tensor(-100.0)).item()
    100.0
    """
    for name, value in (("neighbour", neighbour), ("centre", centre)):
        check_floating(value, name)
    check_same_device([("neighbour", neighbour), ("centre", centre)])
    flip = neighbour > 0
    a, b = torch.where(flip, -centre, centre), torch.where(flip, -neighbour, neighbour)
    return (F.softplus(a) - F.softplus(b) - b.sigmoid() * (a - b)).clamp(min=0)


# What follows works on the pixels of one block. A pair has two ends, i (above, or to the left) and j,
# and is taken in both orders: first i is the centre, then j. ``w1`` and ``w2`` weigh the two orders.


class _Stable(NamedTuple):
    """Exact probabilities: binary logits and their sigmoid."""

    a: Tensor
    p: Tensor

    @staticmethod
    def of(a: Tensor, clip: float | None) -> _Stable:
        return _Stable(a, a.sigmoid())

    def total(self, j: _Stable) -> Tensor:
        """Sum of the divergences of both orders."""
        return (self.p - j.p).mul_(self.a - j.a)

    def both(self, j: _Stable) -> tuple[Tensor, Tensor]:
        """The divergences of the two orders."""
        step = self.a - j.a
        rise = F.softplus(self.a) - F.softplus(j.a)
        first = (rise - j.p * step).clamp_(min=0)
        return first, step.mul_(self.p).sub_(rise).clamp_(min=0)

    def slopes(self, j: _Stable, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of the weighed divergences in the logits of both ends."""
        step, gap = self.a - j.a, self.p - j.p
        at_i = (1 - self.p).mul_(self.p).mul_(step).mul_(w2).addcmul_(gap, w1)
        at_j = (1 - j.p).mul_(j.p).mul_(step).mul_(w1).addcmul_(gap, w2)
        return at_i, at_j.neg_()


class _Clipped(NamedTuple):
    """Clipped p and 1 - p with their logarithms, and the slopes of those logarithms in the logit.

    The two clipped values need not add up to 1, so a divergence can come out slightly negative.
    """

    p: Tensor
    n: Tensor
    log_p: Tensor
    log_n: Tensor
    slope_p: Tensor
    slope_n: Tensor

    @staticmethod
    def of(a: Tensor, clip: float | None) -> _Clipped:
        assert clip is not None
        p, n = a.sigmoid(), (-a).sigmoid()
        p_in, n_in = p.clamp(min=clip), n.clamp(min=clip)
        return _Clipped(p_in, n_in, p_in.log(), n_in.log(), n * (p >= clip), -p * (n >= clip))

    def both(self, j: _Clipped) -> tuple[Tensor, Tensor]:
        step_p, step_n = j.log_p - self.log_p, j.log_n - self.log_n
        return j.p * step_p + j.n * step_n, -(self.p * step_p + self.n * step_n)

    def total(self, j: _Clipped) -> Tensor:
        return (j.p - self.p) * (j.log_p - self.log_p) + (j.n - self.n) * (j.log_n - self.log_n)

    def slopes(self, j: _Clipped, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
        step_p, step_n = j.log_p - self.log_p, j.log_n - self.log_n
        at_i = self.slope_p * (self.p * (1 - step_p) * w2 - j.p * w1)
        at_i += self.slope_n * (self.n * (1 - step_n) * w2 - j.n * w1)
        at_j = j.slope_p * (j.p * (1 + step_p) * w1 - self.p * w2)
        at_j += j.slope_n * (j.n * (1 + step_n) * w1 - self.n * w2)
        return at_i, at_j


# --------------------------------------------------------------------------------------------------
# Sums over the pairs of a batch
# --------------------------------------------------------------------------------------------------


class _Field(NamedTuple):
    """The options of the sums. ``bins`` are the channels, or the classes of the centre pixels."""

    sizes: tuple[int, ...]
    margin: float
    ignore_index: int
    same: str
    neighbourhood: str
    clip: float | None
    require_opposite: bool
    bins: str


class _Pair(NamedTuple):
    """All pairs of one offset in one block."""

    size: int  # index of the size
    i: tuple[slice, slice]  # rows and columns of the first ends in the block
    j: tuple[slice, slice]
    labels: Tensor  # (n, 2, h, w): labels of i and of j; 0 where they are ignored
    equal: Tensor  # (n, 1, h, w), 0 or 1
    differ: Tensor  # 1 - equal
    w1: Tensor  # (n, 1, h, w), 0 or 1: the pair counts with i as its centre
    w2: Tensor  # ... with j as its centre


class _Block(NamedTuple):
    """Consecutive rows of some images. Its pairs have their first ends in the first ``rows`` rows."""

    images: slice
    first: int
    rows: int
    last: int  # one past the last row that a second end can lie in


def _blocks(shape: torch.Size, reach: int, device: torch.device) -> Iterator[_Block]:
    batch, classes, height, width = shape
    largest = _CUDA_BLOCK if device.type == "cuda" else _CPU_BLOCK
    limit = min(largest, max(_SMALL_BLOCK, shape.numel() // 24))
    if shape.numel() <= 2 * _SMALL_BLOCK:
        limit = 2 * _SMALL_BLOCK
    row = max(1, classes * width)
    images = max(1, limit // max(1, row * height))
    # Blocks of few rows would do the rows between them over and over.
    rows = (
        max(1, height) if images > 1 else min(max(1, height), max(2 * reach, limit // row - reach))
    )
    for b in range(0, batch, images):
        for r in range(0, height, rows):
            count = min(rows, height - r)
            yield _Block(slice(b, min(b + images, batch)), r, count, min(height, r + count + reach))


def _pairs(labels: Tensor, block: _Block, field: _Field, dtype: torch.dtype) -> Iterator[_Pair]:
    """All pairs with their first end in the block, each offset once (the other order is in w2)."""
    # The rows that the pairs reach, and those beyond that `require_opposite` asks for.
    reach = max(field.sizes)
    above = max(0, block.first - reach)
    y = labels[block.images, above : block.last + reach].long()
    valid = y != field.ignore_index
    y = y.masked_fill(~valid, 0)
    height, width = labels.shape[1] - above, labels.shape[2]
    first = block.first - above

    def counts(dy: int, dx: int, rows: slice, columns: slice) -> Tensor:
        """Whether the pixel at an offset from those of a window exists and has a label."""
        result = valid.new_zeros((len(y), rows.stop - rows.start, columns.stop - columns.start))
        top, left = rows.start + dy, columns.start + dx
        inside = valid[
            :, max(0, top) : max(0, rows.stop + dy), max(0, left) : max(0, columns.stop + dx)
        ]
        y0, x0 = max(0, -top), max(0, -left)
        result[:, y0 : y0 + inside.shape[1], x0 : x0 + inside.shape[2]] = inside
        return result

    for k, size in enumerate(field.sizes):
        for dy, dx in neighbour_offsets(size, field.neighbourhood):  # type: ignore[arg-type]
            if (dy, dx) < (0, 0) or dy >= height or abs(dx) >= width:
                continue  # the other order of an earlier pair, or no pair at all
            rows = slice(first, min(first + block.rows, height - dy))
            if rows.start >= rows.stop:
                continue
            left, right = _span(width, dx)
            below = slice(rows.start + dy, rows.stop + dy)
            u, v = y[:, rows, left], y[:, below, right]
            w1 = w2 = valid[:, rows, left] & valid[:, below, right]
            if field.require_opposite:
                w1, w2 = w1 & counts(-dy, -dx, rows, left), w1 & counts(dy, dx, below, right)
            equal = (u == v)[:, None].to(dtype)
            yield _Pair(
                k,
                (slice(0, rows.stop - rows.start), left),
                (slice(dy, dy + rows.stop - rows.start), right),
                torch.stack([u, v], 1),
                equal,
                1 - equal,
                w1[:, None].to(dtype),
                w1[:, None].to(dtype) if w2 is w1 else w2[:, None].to(dtype),
            )


def _end(features: Any, where: tuple[slice, slice]) -> Any:
    rows, columns = where
    return type(features)(*(x[..., rows, columns] for x in features))


def _silence(x: Tensor, pair: _Pair) -> Tensor:
    """Zero, in place, the two channels in which a pair of unequal labels differs."""
    return x.scatter_(1, pair.labels, x.gather(1, pair.labels).mul_(pair.equal))


def _bin(index: Tensor, weight: Tensor, bins: int) -> Tensor:
    """Sum of the weights by index, in double precision."""
    total = torch.zeros(bins, dtype=torch.float64, device=weight.device)
    return total.index_add_(0, index.reshape(-1), weight.reshape(-1).double())


def _block_sums(
    a: Tensor, labels: Tensor, block: _Block, field: _Field, sums: Tensor, counts: Tensor
) -> None:
    """Add a block's divergences, hinges and numbers of pairs to ``(2, K, C)`` totals."""
    of: Any = _Stable.of if field.clip is None else _Clipped.of
    classes, by_channel = a.shape[1], field.bins == "channel"
    features = of(a, field.clip) if field.same == "channel" else None
    # Whether both orders of a pair count alike, so that their sum is all that is needed.
    alike = by_channel and not field.require_opposite
    for pair in _pairs(labels, block, field, a.dtype):
        k, u, v = pair.size, pair.labels[:, :1], pair.labels[:, 1:]
        both_orders = pair.w1 + pair.w2

        # Grouping: in every channel but the two of unequal labels, or in the one of equal labels.
        if features is not None:
            i, j = _end(features, pair.i), _end(features, pair.j)
            w1, w2 = pair.w1, pair.w2
            channels = classes - 2 * pair.differ
        else:
            own = [a[(..., *x)].gather(1, index) for x, index in ((pair.i, u), (pair.j, v))]
            i, j = (of(x, field.clip) for x in own)
            w1, w2 = pair.w1 * pair.equal, pair.w2 * pair.equal
            channels = pair.equal
        values = (i.total(j),) if alike else i.both(j)
        for order, (value, weight) in enumerate(zip(values, (w1, w2), strict=False)):
            if features is not None:
                _silence(value, pair)
            value *= weight
            if not by_channel:
                sums[0, k] += _bin((u, v)[order], value.sum(1), classes)
            elif features is not None:
                sums[0, k] += value.sum((0, 2, 3)).double()
            else:
                sums[0, k] += _bin(u, value, classes)

        # Separating: the two channels of unequal labels.
        i, j = (of(a[(..., *x)].gather(1, pair.labels), field.clip) for x in (pair.i, pair.j))
        hinges = [
            (field.margin - value).clamp_(min=0).mul_(weight).mul_(pair.differ)
            for value, weight in zip(i.both(j), (pair.w1, pair.w2), strict=True)
        ]
        if by_channel:
            sums[1, k] += _bin(pair.labels, hinges[0] + hinges[1], classes)
            apart = _bin(pair.labels, (both_orders * pair.differ).expand(-1, 2, -1, -1), classes)
            counts[1, k] += apart
            if features is not None:
                counts[0, k] += both_orders.double().sum() - apart
            else:
                counts[0, k] += _bin(u, both_orders * pair.equal, classes)
        else:
            for index, hinge, weight in ((u, hinges[0], pair.w1), (v, hinges[1], pair.w2)):
                sums[1, k] += _bin(index, hinge.sum(1), classes)
                counts[1, k] += _bin(index, 2 * weight * pair.differ, classes)
                counts[0, k] += _bin(index, weight * channels, classes)


def _block_slopes(
    a: Tensor, labels: Tensor, block: _Block, field: _Field, scale: Tensor, grad: Tensor
) -> None:
    """Add to ``grad`` the slopes of a block's sums in the binary logits; ``scale`` is (2, K, C)."""
    of: Any = _Stable.of if field.clip is None else _Clipped.of
    by_channel = field.bins == "channel"
    features = of(a, field.clip) if field.same == "channel" else None
    for pair in _pairs(labels, block, field, a.dtype):
        u, v = pair.labels[:, :1], pair.labels[:, 1:]
        at_i, at_j = grad[(..., *pair.i)], grad[(..., *pair.j)]

        group = scale[0, pair.size]
        w1, w2 = (pair.w1, pair.w2) if by_channel else (pair.w1 * group[u], pair.w2 * group[v])
        if features is not None:
            slopes = _end(features, pair.i).slopes(_end(features, pair.j), w1, w2)
            for target, slope in zip((at_i, at_j), slopes, strict=True):
                _silence(slope, pair)
                if by_channel:
                    target.addcmul_(slope, group[:, None, None])
                else:
                    target += slope
        else:
            w1, w2 = w1 * pair.equal, w2 * pair.equal
            i, j = (of(x.gather(1, u), field.clip) for x in (a[(..., *pair.i)], a[(..., *pair.j)]))
            for target, slope in zip((at_i, at_j), i.slopes(j, w1, w2), strict=True):
                target.scatter_add_(1, u, slope * group[u] if by_channel else slope)

        apart = scale[1, pair.size]
        i, j = (of(a[(..., *x)].gather(1, pair.labels), field.clip) for x in (pair.i, pair.j))
        first, second = i.both(j)
        w1, w2 = (apart[pair.labels],) * 2 if by_channel else (apart[u], apart[v])
        w1 = (first < field.margin) * (pair.w1 * pair.differ).neg_() * w1
        w2 = (second < field.margin) * (pair.w2 * pair.differ).neg_() * w2
        for target, slope in zip((at_i, at_j), i.slopes(j, w1, w2), strict=True):
            target.scatter_add_(1, pair.labels, slope)


def _to_class_logits(a: Tensor, index: Tensor, rho: Tensor, grad: Tensor) -> Tensor:
    """Carry a gradient in the binary logits on to the class logits (see `_class_logits`)."""
    # For every channel but the largest, 1 / (1 - p) = 1 + e^a with a <= 0, and dz_j feels the others
    # through p_j / (1 - p_c); the largest one's 1 - p can underflow, but its ratio is rho_j.
    odds = a.exp().scatter(1, index, 0.0)
    largest = grad.gather(1, index)
    spread = grad * (1 + odds)
    total = spread.sum(1, keepdim=True) - largest
    return spread.sub_(a.sigmoid() * total).sub_(rho * largest)


class _Sums(torch.autograd.Function):
    """Sums over the pairs, ``(2, K, C)``: grouping, separating; and how many there are.

    Nothing of the images' size is kept but the logits themselves; backward goes through the blocks
    again. A pair belongs to the block of its upper pixel, so when a block is done the gradients of its
    rows are complete, and carried on to the class logits.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, field: _Field, group: ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        work = wide_dtype(logits)
        shape = (2, len(field.sizes), logits.shape[1])
        totals = torch.zeros(2, *shape, dtype=torch.float64, device=logits.device)
        with torch.autocast(logits.device.type, enabled=False):
            for block in _blocks(logits.shape, max(field.sizes), logits.device):
                z = logits[block.images, :, block.first : block.last].to(work)
                _block_sums(_class_logits(z)[0], labels, block, field, totals[0], totals[1])
        if group is not None:
            torch.distributed.all_reduce(totals, group=group)
        ctx.save_for_backward(logits, labels)
        ctx.field = field
        counts = totals[1].round().long()
        ctx.mark_non_differentiable(counts)
        return totals[0].to(work), counts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_differentiated_once("affinity field terms")
        logits, labels = ctx.saved_tensors
        field, scale = ctx.field, grads[0]
        result = torch.zeros_like(logits)
        grad = result
        for block in _blocks(logits.shape, max(field.sizes), logits.device):
            here = slice(block.first, block.first + block.rows)
            z = logits[block.images, :, block.first : block.last].to(scale.dtype)
            if block.first == 0:  # new images; half precision is summed up in single precision
                grad = result[block.images].to(scale.dtype)
            a, index, rho = _class_logits(z)
            _block_slopes(a, labels, block, field, scale, grad[:, :, block.first : block.last])
            own = slice(0, block.rows)
            result[block.images, :, here] = _to_class_logits(
                a[:, :, own], index[:, :, own], rho[:, :, own], grad[:, :, here]
            )
        return result, None, None, None


class _SumsByKernel(torch.autograd.Function):
    """What `_Sums` returns, by the GPU's kernel; it keeps the logits, and backward goes over them again."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, field: _Field, group: ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        from affnb.kernels.affinity_fields import sums

        labels = labels.masked_fill(labels == field.ignore_index, -1).int().contiguous()
        ctx.save_for_backward(logits, labels)
        ctx.options = {
            "offsets": [neighbour_offsets(s, field.neighbourhood) for s in field.sizes],  # type: ignore[arg-type]
            "margin": field.margin,
            "clip": field.clip,
            "require_opposite": field.require_opposite,
            "same_class": field.same == "class",
            "by_channel": field.bins == "channel",
        }
        totals = sums(logits.contiguous(), labels, **ctx.options)
        if group is not None:
            torch.distributed.all_reduce(totals, group=group)
        counts = totals[2:].round().long()
        ctx.mark_non_differentiable(counts)
        return totals[:2].float(), counts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_differentiated_once("affinity field terms")
        from affnb.kernels.affinity_fields import slopes

        logits, labels = ctx.saved_tensors
        scale = grads[0].float().contiguous()
        result = slopes(logits.contiguous(), labels, scale=scale, **ctx.options)
        return result, None, None, None


@uncompiled
def _auto_sums(
    logits: Tensor, labels: Tensor, field: _Field, group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    function = _SumsByKernel if logits.numel() and kernels.wanted(logits) else _Sums
    sums, counts = function.apply(logits, labels, field, group)  # type: ignore[no-untyped-call]
    return sums, counts


class _SumOverRanks(torch.autograd.Function):
    """All-reduce; every rank computes the same loss, so its gradient passes through as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _reference_sums(
    logits: Tensor, labels: Tensor, field: _Field, group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Equation 3, literally: every ordered pair, every channel, probabilities from a softmax."""
    work = wide_dtype(logits)
    prob = logits.to(work).softmax(1)
    classes = torch.arange(logits.shape[1], device=logits.device)
    label = labels.long()
    one_hot = label[:, None] == classes[:, None, None]
    valid = label != field.ignore_index
    totals = []
    for size in field.sizes:
        grouping, separating = [0.0 * prob.sum((0, 2, 3))], [0.0 * prob.sum((0, 2, 3))]
        n_grouping, n_separating = [0 * classes], [0 * classes]
        for dy, dx in neighbour_offsets(size, field.neighbourhood):  # type: ignore[arg-type]
            q, p = shifted_pair(prob, dy, dx)  # centre, neighbour
            n_q, n_p = 1 - q, 1 - p
            if field.clip is not None:
                q, p, n_q, n_p = (x.clamp(field.clip, 1.0) for x in (q, p, n_q, n_p))
            divergence = p * (p / q).log() + n_p * (n_p / n_q).log()
            y_i, y_j = shifted_pair(one_hot, dy, dx)
            keep = torch.logical_and(*shifted_pair(valid, dy, dx))
            if field.require_opposite:
                padding = [size] * 4
                opposite = F.pad(valid, padding)[
                    :,
                    size - dy : size - dy + valid.shape[1],
                    size - dx : size - dx + valid.shape[2],
                ]
                keep = keep & shifted_pair(opposite, dy, dx)[0]
            same = y_i == y_j if field.same == "channel" else y_i & y_j
            for mask, value, into, number in (
                (same, divergence, grouping, n_grouping),
                (y_i != y_j, (field.margin - divergence).clamp(min=0), separating, n_separating),
            ):
                mask = mask & keep[:, None]
                value = torch.where(mask, value, 0.0)
                if field.bins == "channel":
                    into.append(value.sum((0, 2, 3)))
                    number.append(mask.sum((0, 2, 3)))
                else:  # by the class of the centre pixel
                    into.append((value.sum(1, keepdim=True) * y_i).sum((0, 2, 3)))
                    number.append((mask.sum(1, keepdim=True) * y_i).sum((0, 2, 3)))
        totals.append(
            [torch.stack(x).sum(0) for x in (grouping, separating, n_grouping, n_separating)]
        )
    by_kind = [torch.stack(x) for x in zip(*totals, strict=True)]
    sums, counts = torch.stack(by_kind[:2]), torch.stack(by_kind[2:])
    if group is not None:
        sums = _SumOverRanks.apply(sums, group)  # type: ignore[no-untyped-call]
        torch.distributed.all_reduce(counts, group=group)
    return sums, counts


# --------------------------------------------------------------------------------------------------
# The loss
# --------------------------------------------------------------------------------------------------


def _check_logits(logits: Tensor) -> None:
    check_floating(logits, "logits", ndim=4)
    if logits.shape[1] < 2:
        raise ValueError(f"logits: expected at least 2 classes, got shape {tuple(logits.shape)}")
    # Looking at values would break the graph while torch.compile traces.
    if not torch.compiler.is_compiling():
        check_finite(logits, "logits")


def _check_batch(logits: Tensor, labels: Tensor, ignore_index: int) -> None:
    _check_logits(logits)
    check_tensor(labels, "labels")
    check_same_device([("logits", logits), ("labels", labels)])
    check_labels(
        labels,
        "labels",
        ndim=3,
        # Looking at values would break the graph while torch.compile traces.
        num_classes=None if torch.compiler.is_compiling() else logits.shape[1],
        ignore_index=ignore_index,
    )
    check_shape(labels, "labels", (logits.shape[0], *logits.shape[2:]))


def _check_field(
    sizes: Sequence[int],
    margin: float,
    ignore_index: int,
    same: str,
    neighbourhood: str,
    clip: float | None,
    require_opposite: bool,
    backend: str,
    group: ProcessGroup | None,
    *,
    name: str = "sizes",
    bins: str = "channel",
) -> _Field:
    for size in sizes:
        check_integer(size, name, 1)
    check_positive(margin, "margin")
    check_integer(ignore_index, "ignore_index")
    check_one_of(same, "same", _SAME)
    check_one_of(neighbourhood, "neighbourhood", _NEIGHBOURHOODS)
    if clip is not None:
        check_positive(clip, "clip")
        if clip >= 0.5:
            raise ValueError(f"clip: expected None or a number in (0, 0.5), got {clip!r}")
    check_flag(require_opposite, "require_opposite")
    check_one_of(backend, "backend", _BACKENDS)
    if group is not None:
        check_group(group)
    clip = None if clip is None else float(clip)
    return _Field(
        tuple(sizes), float(margin), ignore_index, same, neighbourhood, clip, require_opposite, bins
    )


def _sums(
    logits: Tensor, labels: Tensor, field: _Field, backend: str, group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Check the batch (on all ranks together), then sum."""
    check_together(lambda: _check_batch(logits, labels, field.ignore_index), group)
    if backend == "reference":
        return _reference_sums(logits, labels, field, group)
    result: tuple[Tensor, Tensor] = _auto_sums(logits, labels, field, group)
    return result


def affinity_field_terms(
    logits: Tensor,
    labels: Tensor,
    *,
    size: int,
    margin: float = 3.0,
    ignore_index: int = 255,
    same: Same = "channel",
    neighbourhood: Neighbourhood = "ring8",
    clip: float | None = None,
    require_opposite: bool = False,
    group: ProcessGroup | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Grouping and separating terms of an affinity field, for each class channel (Eq. 3).

    For an ordered pair of a centre i and a neighbour j with probabilities q and p in a channel,

    .. math:: D = p \log\frac pq + (1 - p) \log\frac{1 - p}{1 - q}

    is averaged over the pairs that are alike in the channel, and :math:`[\alpha - D]_+` over those
    that differ in it.

    Parameters
    ----------
    logits
        Class logits before any softmax, floating, shape ``(B, C, H, W)``, C at least 2, finite.
    labels
        Classes of the pixels, integers in ``[0, C)`` or ``ignore_index``, shape ``(B, H, W)``.
    size
        Distance s of the neighbours in pixels of this map, at least 1 (the paper's kernel is
        ``2 s + 1`` wide). A pair that leaves the image does not exist, so a size of H and W or more
        has no pairs.
    margin
        Divergence in nats from which a separating pair is satisfied. Default 3, the paper's.
    ignore_index
        Label without a class: no pair touches such a pixel. Default 255, that of PASCAL VOC.
    same
        Which pairs group in channel c. ``"channel"`` (Eq. 3): one-hot labels equal in the channel,
        so also two pixels that are both *not* c. ``"class"`` (the prose): both pixels are c. The
        pairs that separate, those of which exactly one is c, are the same.
    neighbourhood
        ``"ring8"`` or ``"full"``, see :func:`neighbour_offsets`.
    clip
        ``None``: exact. A number, 1e-4 in the published code: p, 1 - p, q and 1 - q are each raised to
        at least that number, with no gradient where they were below.
    require_opposite
        ``False`` (default): a pair counts if its own two pixels are inside the image and not ignored.
        ``True``, the mask of the authors' published code: with centre i and neighbour i + d, also the
        *opposite* pixel i - d must be inside and not ignored. See Notes.
    group
        A ``torch.distributed`` process group: the means over the pairs of all ranks' images, and for
        each rank the gradient of those means in its own logits. Default ``None``: this process alone.
    backend
        ``"auto"``: in blocks, as described under Notes. ``"reference"``: the printed equation, which
        overflows where a probability rounds to 0 or 1; it can be differentiated twice.

    Returns
    -------
    grouping, separating : Tensor
        Means over the pairs of each channel, shape ``(C,)``, in nats, at least 0 (with ``clip``, a
        divergence may be negative by about ``clip``); float64 for float64 logits, else float32. 0 with
        a zero gradient where there is no pair.
    n_grouping, n_separating : Tensor
        How many ordered pairs, shape ``(C,)``, int64.

    Raises
    ------
    TypeError
        Logits not floating, labels not integers, an option of the wrong type.
    ValueError
        Shapes or devices that do not fit, fewer than two classes, a label out of range, logits not
        finite, size below 1, margin not positive, an unknown option. With ``group``, an error on one
        rank is raised on all. (While ``torch.compile`` traces, values are not looked at.)

    Notes
    -----
    *Which pairs count.* The paper does not say what becomes of pairs at the frame and at ignored
    pixels. By default a pair is dropped if one of its own two pixels is ignored or outside: nothing
    else bears on what the pair says. The authors' code also drops it if the pixel opposite to the
    neighbour is ignored or outside, which costs pairs along the frame and around ignored regions and
    makes a pair count in one order but not always in the other. ``require_opposite=True, clip=1e-4``
    with ``ring8`` and ``channel`` (the defaults) gives exactly that code's sums and counts; in
    :class:`AdaptiveAffinityFieldLoss`, ``class_reduction="pairs"`` besides gives its loss.

    Time ``O(BCHW)`` for each offset of half a neighbourhood (both orders of a pair are made at once).
    Memory beyond the input: blocks, together less than twice the logits, or 3 MB if that is more;
    backward, the gradient besides. The gradient is made from recomputed blocks:
    it cannot be differentiated again. Under ``torch.compile`` the sweep runs uncompiled (a graph
    break). Half precision is widened block by block; its gradient is summed in single precision, a few
    images at a time. On a GPU a fused kernel keeps two maps of the logits' size in single precision,
    and nothing else.

    Examples
    --------
    >>> labels = torch.tensor([[[0, 0, 1]]])
    >>> logits = torch.tensor([[2.0, 2.0, 0.0], [0.0, 0.0, 0.0]]).view(1, 2, 1, 3)
    >>> grouping, separating, n_grouping, n_separating = affinity_field_terms(logits, labels, size=1)
    >>> grouping.tolist(), n_grouping.tolist()  # the two pixels of class 0 agree, in both orders
    ([0.0, 0.0], [2, 2])
    >>> separating, n_separating.tolist()
    (tensor([2.6192, 2.6192]), [2, 2])
    """
    field = _check_field(
        (size,), margin, ignore_index, same, neighbourhood, clip, require_opposite, backend, group,
        name="size",
    )  # fmt: skip
    sums, counts = _sums(logits, labels, field, backend, group)
    means = sums[:, 0] / counts[:, 0].clamp(min=1)
    return means[0], means[1], counts[0, 0], counts[1, 0]


class _Ascend(torch.autograd.Function):
    """Identity forward, minus the gradient backward: what is minimised is maximised here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -grads[0]


class AdaptiveAffinityFieldLoss(nn.Module):
    r"""Affinity field loss over several sizes, whose weights an adversary may choose (Eqs. 4 to 7).

    .. math:: L = \sum_c \sum_k \left(w^{group}_{ck} L^{group}_{ck} + w^{sep}_{ck} L^{sep}_{ck}\right),
        \quad w \ge 0,\ \sum_k w_{ck} = 1

    with the terms of :func:`affinity_field_terms`. The network minimises L, the weights maximise it:
    agree as far as you can, differ as near as you can.

    Parameters
    ----------
    num_classes
        Number of classes C, at least 2.
    sizes
        Distances s_k in pixels. Default (1, 2): kernels of 3 and 5, the best pair of the paper's
        Table 10. One size gives the plain (fixed) affinity field loss.
    margin, ignore_index, same, neighbourhood, clip, require_opposite, group, backend
        See :func:`affinity_field_terms`.
    weights
        ``"adversarial"`` (the paper's): softmax of a parameter ``eta``, shape ``(2, C, K)``, whose
        gradient is turned round on its way back, so the optimiser that minimises everything else
        makes it ascend. Give it to the optimiser *without weight decay* (see the example).
        ``"hard_max"``: the exact inner maximum, all weight on the largest term. ``"entropic"``: the
        exact maximum of L less ``tau`` times the divergence of the weights from equal ones, that is
        ``tau * log(mean_k exp(L_k / tau))``. ``"uniform"``: all sizes alike.
    tau
        Temperature of ``"entropic"`` in nats, positive; towards 0 it is the hard maximum, towards
        infinity the uniform mean. Default 0.1 (ours; the paper has no such form).
    class_reduction
        ``"mean"``: the mean over the C channels. ``"sum"``: their sum, as Eq. 7 is printed, C times as
        large, which is to be made up for in the loss's own weight. ``"pairs"``: as the published
        code has it, one mean over all pairs and channels, where a pair has the size weights of its
        *centre pixel's* class; then c above is that class. With ``require_opposite=True,
        clip=1e-4`` the loss is then exactly that of the published code.

    Raises
    ------
    TypeError, ValueError
        As :func:`affinity_field_terms`; ``num_classes`` below 2, no size or one twice, ``tau`` not
        positive; logits with another number of channels.

    Notes
    -----
    Weigh the result against the cross-entropy by the paper's 1.0, or less. The published code also
    lets that weight fall by a factor of 10 over the training. Time ``O(BCHW)`` for each offset, memory
    as :func:`affinity_field_terms`: all sizes are done in one sweep.

    Examples
    --------
    >>> model, criterion = nn.Conv2d(1, 3, 3, padding=1), AdaptiveAffinityFieldLoss(3)
    >>> optimizer = torch.optim.SGD(
    ...     [
    ...         {"params": model.parameters(), "weight_decay": 5e-4},
    ...         {"params": criterion.parameters(), "weight_decay": 0.0},
    ...     ],
    ...     lr=0.1,
    ... )
    >>> labels = torch.tensor([0, 1, 2]).repeat(1, 6, 2)
    >>> logits = model(labels[:, None].float())
    >>> loss = F.cross_entropy(logits, labels, ignore_index=255) + criterion(logits, labels)
    >>> loss.backward()
    >>> optimizer.step()
    >>> criterion.effective_size().shape
    torch.Size([2, 3])
    """

    last_weights: Tensor

    def __init__(
        self,
        num_classes: int,
        sizes: Sequence[int] = (1, 2),
        *,
        margin: float = 3.0,
        ignore_index: int = 255,
        weights: Weights = "adversarial",
        tau: float = 0.1,
        class_reduction: ClassReduction = "mean",
        same: Same = "channel",
        neighbourhood: Neighbourhood = "ring8",
        clip: float | None = None,
        require_opposite: bool = False,
        group: ProcessGroup | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_integer(num_classes, "num_classes", 2)
        if len(sizes) == 0 or len(set(sizes)) < len(sizes):
            raise ValueError(f"sizes: expected one or more different integers, got {sizes!r}")
        check_one_of(weights, "weights", _WEIGHTS)
        check_positive(tau, "tau")
        check_one_of(class_reduction, "class_reduction", _CLASS_REDUCTIONS)
        self._field = _check_field(
            sizes, margin, ignore_index, same, neighbourhood, clip, require_opposite, backend, group,
            bins="centre" if class_reduction == "pairs" else "channel",
        )  # fmt: skip
        self.num_classes, self.sizes, self.weights = num_classes, tuple(sizes), weights
        self.tau, self.class_reduction = float(tau), class_reduction
        self.group, self.backend = group, backend
        shape = (2, num_classes, len(sizes))
        if weights == "adversarial":
            self.eta = nn.Parameter(torch.zeros(shape))
        else:  # those of the last batch
            self.register_buffer(
                "last_weights", torch.full(shape, 1 / len(sizes)), persistent=False
            )

    def size_weights(self) -> Tensor:
        """Return the weights ``(2, C, K)``: grouping and separating, classes, sizes; sums over K are 1.

        Those of ``"hard_max"`` and ``"entropic"`` are of the last batch (equal before the first).
        """
        if self.weights == "adversarial":
            return self.eta.detach().softmax(-1)
        return self.last_weights

    def effective_size(self) -> Tensor:
        """Return the mean kernel width ``sum_k w_k (2 s_k + 1)``, shape ``(2, C)``, in pixels.

        The first row is of the grouping terms, the second of the separating ones, which the paper's
        Figure 4 shows.
        """
        w = self.size_weights()
        return w @ w.new_tensor([2.0 * size + 1 for size in self.sizes])

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss, a scalar in nats, of logits ``(B, C, H, W)`` and labels ``(B, H, W)``."""
        check_tensor(logits, "logits", ndim=4)
        check_shape(logits, "logits", (None, self.num_classes, None, None))
        sums, counts = _sums(logits, labels, self._field, self.backend, self.group)
        if self.class_reduction == "pairs":
            counts = counts.sum(-1, keepdim=True)
        terms = (sums / counts.clamp(min=1)).mT  # (2, C, K)
        if self.weights == "adversarial":
            eta: Tensor = _Ascend.apply(self.eta)  # type: ignore[no-untyped-call]
            total = (eta.to(terms.dtype).softmax(-1) * terms).sum()
        else:
            if self.weights == "hard_max":
                w = F.one_hot(terms.detach().argmax(-1), len(self.sizes)).to(terms.dtype)
            elif self.weights == "entropic":
                w = (terms.detach() / self.tau).softmax(-1)
            else:
                w = torch.full_like(terms, 1 / len(self.sizes))
            self.last_weights.copy_(w)
            if self.weights == "entropic":
                scaled = (terms / self.tau).logsumexp(-1) - math.log(len(self.sizes))
                total = self.tau * scaled.sum()
            else:
                total = (w * terms).sum()
        return total / self.num_classes if self.class_reduction == "mean" else total

    def extra_repr(self) -> str:
        """Return the options, for ``repr``."""
        return (
            f"num_classes={self.num_classes}, sizes={self.sizes}, weights={self.weights!r}, "
            f"margin={self._field.margin}, class_reduction={self.class_reduction!r}"
        )


# --------------------------------------------------------------------------------------------------
# Measures of a segmentation
# --------------------------------------------------------------------------------------------------


def _check_maps(prediction: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> None:
    check_integer(num_classes, "num_classes", 1)
    check_labels(prediction, "prediction", ndim=3, num_classes=num_classes)
    check_labels(labels, "labels", ndim=3, num_classes=num_classes, ignore_index=ignore_index)
    check_shape(labels, "labels", prediction.shape)
    check_same_device([("prediction", prediction), ("labels", labels)])


def boundary_scores(
    prediction: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    tolerance: int = 1,
    ignore_index: int = 255,
) -> tuple[Tensor, Tensor]:
    """Recall and precision of semantic boundaries, for each class, over a set of images (section 4.2).

    A pixel of a class is on its boundary if one of its four neighbours has another label. It is found
    (or right) if a predicted (true) boundary pixel of the same class lies within the tolerance.

    Parameters
    ----------
    prediction
        Predicted classes, integers in ``[0, num_classes)``, shape ``(B, H, W)``.
    labels
        True classes or ``ignore_index``, the same shape.
    num_classes
        Number of classes C.
    tolerance
        Largest Chebyshev distance of a match in pixels, at least 0. Default 1.
    ignore_index
        Label of pixels that are left out; neighbours of such a pixel make no boundary by it.

    Returns
    -------
    recall, precision : Tensor
        Shape ``(C,)``, float64, in [0, 1]; NaN for a class without a true (predicted) boundary.
        Report both: a noisy prediction has boundaries everywhere and misses none.

    Raises
    ------
    TypeError, ValueError
        Maps that are not integers of one shape, a class out of range, a negative tolerance.

    Notes
    -----
    Time ``O(BHW)`` for each class, memory ``O(HW)``. Many pixels may match the same one, without the
    one-to-one assignment of the contour benchmark that the paper uses.

    Examples
    --------
    >>> labels = torch.tensor([[[0, 0, 0, 1, 1, 1, 1, 1]]])
    >>> prediction = torch.tensor([[[0, 0, 0, 0, 1, 1, 0, 1]]])  # one pixel late, and a hole
    >>> recall, precision = boundary_scores(prediction, labels, 2)
    >>> [round(x, 3) for x in (*recall.tolist(), *precision.tolist())]
    [1.0, 1.0, 0.5, 0.333]
    """
    _check_maps(prediction, labels, num_classes, ignore_index)
    check_integer(tolerance, "tolerance", 0)

    def boundaries(y: Tensor, valid: Tensor) -> Tensor:
        found = torch.zeros_like(valid)
        for dy, dx in ((0, 1), (1, 0)):
            differ = torch.ne(*shifted_pair(y, dy, dx))
            differ &= torch.logical_and(*shifted_pair(valid, dy, dx))
            for side in shifted_pair(found, dy, dx):
                side |= differ
        return found

    def near(x: Tensor) -> Tensor:
        return F.max_pool2d(x.float(), 2 * tolerance + 1, 1, tolerance) > 0

    hits = torch.zeros(2, num_classes, dtype=torch.float64, device=labels.device)
    edges = torch.zeros_like(hits)
    at_once = max(1, 2**20 // max(1, labels[:1].numel()))  # images whose maps are small together
    for own_map, true_map in zip(
        torch.split(prediction, at_once), torch.split(labels, at_once), strict=True
    ):
        valid = true_map != ignore_index
        true_edge, own_edge = boundaries(true_map, valid), boundaries(own_map, valid)
        for c in range(num_classes):
            true, own = true_edge & (true_map == c), own_edge & (own_map == c)
            for k, (these, those) in enumerate(((true, own), (own, true))):
                hits[k, c] += (these & near(those)).sum()
                edges[k, c] += these.sum()
    recall, precision = hits / edges
    return recall, precision


def instance_iou(
    prediction: Tensor,
    labels: Tensor,
    instances: Tensor,
    *,
    ignore_index: int = 255,
) -> Tensor:
    r"""Intersection over union per class, each image weighed by its instances (section 4.2).

    .. math:: \hat U_c = \sum_x n_{c,x} U_{c,x} \Big/ \sum_x n_{c,x}

    Parameters
    ----------
    prediction
        Predicted classes, integers in ``[0, C)``, shape ``(B, H, W)``.
    labels
        True classes or ``ignore_index``, the same shape.
    instances
        Number n of instances of each class in each image, shape ``(B, C)``, at least 0.
    ignore_index
        Label of pixels that are left out.

    Returns
    -------
    Tensor
        Shape ``(C,)``, float64, in [0, 1]; NaN for a class without instances.

    Raises
    ------
    TypeError, ValueError
        Maps that are not integers of one shape, a class out of range, negative numbers.

    Notes
    -----
    Time and memory ``O(BHW)`` for each class.

    Examples
    --------
    >>> labels = torch.tensor([[[0, 1, 1, 1]], [[0, 0, 0, 1]]])
    >>> prediction = torch.tensor([[[0, 1, 1, 1]], [[0, 0, 1, 1]]])
    >>> instances = torch.tensor([[1, 3], [1, 1]])
    >>> instance_iou(prediction, labels, instances).tolist()  # class 1: (3 x 1 + 1 x 1/2) / 4
    [0.8333333333333333, 0.875]
    """
    check_tensor(instances, "instances", ndim=2)
    _check_maps(prediction, labels, instances.shape[1], ignore_index)
    check_shape(instances, "instances", (len(labels), None))
    check_same_device([("labels", labels), ("instances", instances)])
    if bool((instances < 0).any()):
        raise ValueError(f"instances: expected numbers >= 0, got {instances.min().item()}")
    valid = labels != ignore_index
    scores = []
    for c in range(instances.shape[1]):
        true, own = (labels == c), (prediction == c) & valid
        union = (true | own).sum((1, 2))
        iou = (true & own).sum((1, 2)) / union.clamp(min=1).double()
        n = instances[:, c].double()
        scores.append((n * iou).sum() / n.sum())
    return torch.stack(scores)

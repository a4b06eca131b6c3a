"""Dilated affinity: a network says which pixels some steps away have its class, and uses the answer.

For each pixel and each of eight directions at a few rates, a second output beside the class scores
predicts whether the pixel there has the same label (Wu et al., "Improving Semantic Segmentation via
Dilated Affinity", 2019; equation and table numbers below are that paper's). The labels for it come
free from the class map. In training it is an auxiliary loss; afterwards the predicted affinities are
the weights of a propagation that repairs the class map.

The order of channels is the same everywhere: that of :func:`dilated_offsets`.

``backend="reference"`` computes the printed equations, pixel by pixel or pair by pair. It is what the
tests compare with, and it can be differentiated twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affnb import kernels
from affnb.affinity.affinity_fields import _span
from affnb.checks import (
    check_at_least,
    check_bool,
    check_differentiated_once,
    check_finite,
    check_flag,
    check_floating,
    check_integer,
    check_labels,
    check_one_of,
    check_same_device,
    check_shape,
    check_tensor,
)
from affnb.kernels import uncompiled
from affnb.precision import wide_dtype

__all__ = [
    "AffinityHead",
    "DilatedAffinityLoss",
    "dilated_affinity_target",
    "dilated_offsets",
    "neighbour_count_frequencies",
    "propagate_affinity",
    "steep_sigmoid",
]

Weighting = Literal["sqrt", "inverse", "signal", "none"]
Reduction = Literal["mean", "sum", "none"]
Backend = Literal["auto", "reference"]

_BACKENDS = ("auto", "reference")

#: How far probabilities may be from a sum of 1, or below 0: what half precision leaves of a softmax.
_TOLERANCE = 1e-2

#: How many numbers loss and propagation work on at a time: whole images, or (propagation) a strip of
#: rows of one image. On a CPU they should stay in the cache; a GPU wants more work in each call.
_STRIP_CPU, _STRIP_CUDA = 2**17, 2**24

#: What picks a window of rows and columns from a map.
_Window = tuple[Any, slice, slice]


# --------------------------------------------------------------------------------------------------
# Offsets, targets, statistics
# --------------------------------------------------------------------------------------------------


def dilated_offsets(rates: Sequence[int | tuple[int, int]], *, both: bool = False) -> Tensor:
    r"""Offsets from a pixel to its eight neighbours at each rate (Eqs. 2 and 3).

    Parameters
    ----------
    rates
        Each an integer ``r``, short for ``(r, r)``, or a pair ``(down, right)``; in pixels of the map
        that the offsets are used on, at least 1.
    both
        Whether a pair ``(a, b)`` with ``a != b`` stands for the two rates ``(a, b)`` and ``(b, a)``,
        as in the paper's tables. Default ``False``.

    Returns
    -------
    Tensor
        int64, shape ``(8 R, 2)`` for R rates: (down, right). Rate by rate; within a rate in reading
        order, ``(-,-) (-,0) (-,+) (0,-) (0,+) (+,-) (+,0) (+,+)``, so that channels ``k`` and
        ``7 - k`` of a rate point in opposite directions.

    Raises
    ------
    TypeError
        ``rates`` not a sequence, a rate that is neither an integer nor a pair of integers.
    ValueError
        No rate, a rate below 1, one that occurs twice.

    Notes
    -----
    Time and memory ``O(R)``.

    Examples
    --------
    >>> dilated_offsets([2]).tolist()
    [[-2, -2], [-2, 0], [-2, 2], [0, -2], [0, 2], [2, -2], [2, 0], [2, 2]]
    >>> len(dilated_offsets([8, (12, 24), 16], both=True))  # four rates
    32
    """
    if not isinstance(rates, Sequence) or isinstance(rates, str):
        raise TypeError(f"rates: expected a sequence of integers or pairs, got {rates!r}")
    check_flag(both, "both")
    pairs: list[tuple[int, int]] = []
    for rate in rates:
        pair = rate if isinstance(rate, tuple) else (rate, rate)
        if len(pair) != 2:
            raise TypeError(f"rates: expected integers or pairs of integers, got {rate!r}")
        for r in pair:
            check_integer(r, "rates", 1)
        down, right = pair
        pairs.append((down, right))
        if both and down != right:
            pairs.append((right, down))
    if not pairs:
        raise ValueError("rates: expected at least one rate, got none")
    if len(set(pairs)) < len(pairs):
        raise ValueError(f"rates: expected each rate once, got {pairs}")
    signs = [(s, t) for s in (-1, 0, 1) for t in (-1, 0, 1) if (s, t) != (0, 0)]
    return torch.tensor([(s * down, t * right) for down, right in pairs for s, t in signs])


def _check_offsets(offsets: Any, height: int, width: int) -> list[tuple[int, int]]:
    check_tensor(offsets, "offsets")
    check_shape(offsets, "offsets", (None, 2))
    check_labels(offsets, "offsets", ndim=2)
    steps: list[tuple[int, int]] = [(int(dy), int(dx)) for dy, dx in offsets.tolist()]
    if not steps:
        raise ValueError("offsets: expected at least one, got none")
    for dy, dx in steps:
        if (dy, dx) == (0, 0):
            raise ValueError("offsets: expected no offset (0, 0), from a pixel to itself")
        # A single pixel has no pair at any rate, so there it is not the rates that are wrong.
        if abs(dy) >= height > 0 and abs(dx) >= width > 0 and (height, width) != (1, 1):
            raise ValueError(
                f"offsets: expected steps shorter than the image ({height} x {width} pixels) in at "
                f"least one direction, got {(dy, dx)}"
            )
    return steps


def _pairs(
    steps: list[tuple[int, int]], height: int, width: int
) -> list[tuple[int, tuple[slice, slice], tuple[slice, slice]]]:
    """For each offset that has any pair inside the image: its channel, the pixels, their neighbours.

    Views of these slices are all that the module ever makes of a shifted map.
    """
    found = []
    for k, (dy, dx) in enumerate(steps):
        (rows, far_rows), (columns, far_columns) = _span(height, dy), _span(width, dx)
        if rows.start < rows.stop and columns.start < columns.stop:
            found.append((k, (rows, columns), (far_rows, far_columns)))
    return found


def dilated_affinity_target(
    labels: Tensor, offsets: Tensor, *, ignore_index: int | None = None
) -> tuple[Tensor, Tensor]:
    """Whether each pixel and its neighbour at each offset have the same label (Eq. 1).

    Parameters
    ----------
    labels
        Classes, integers, shape ``(B, H, W)``, any values. At the resolution at which the affinities
        are compared: never interpolate labels or targets.
    offsets
        int64 ``(K, 2)``, (down, right) in pixels of ``labels``, as from :func:`dilated_offsets`.
    ignore_index
        A label that takes part in no pair, or ``None`` (default).

    Returns
    -------
    target : Tensor
        bool ``(B, K, H, W)``: both pixels count and their labels are equal.
    valid : Tensor
        bool ``(B, K, H, W)``: the neighbour lies inside the image and neither pixel is ignored.

    Raises
    ------
    TypeError
        ``labels`` or ``offsets`` not integers, or not tensors.
    ValueError
        Wrong shapes, an offset (0, 0), or one at least as long as the image both ways (an image of
        one pixel excepted, which has no pair at any rate: all of ``valid`` is then false).

    Notes
    -----
    Time ``O(B K H W)``, memory the two results and two maps of one offset.

    Examples
    --------
    >>> labels = torch.tensor([[[0, 0, 1]]])
    >>> target, valid = dilated_affinity_target(labels, dilated_offsets([1]))
    >>> target[0, 4].tolist(), valid[0, 4].tolist()  # one step to the right
    ([[True, False, False]], [[True, True, False]])
    """
    check_labels(labels, "labels", ndim=3)
    if ignore_index is not None:
        check_integer(ignore_index, "ignore_index")
    batch, height, width = labels.shape
    steps = _check_offsets(offsets, height, width)
    target = labels.new_zeros((batch, len(steps), height, width), dtype=torch.bool)
    valid = torch.zeros_like(target)
    counts = None if ignore_index is None else labels != ignore_index
    for k, here, there in _pairs(steps, height, width):
        at, to = (slice(None), *here), (slice(None), *there)
        same = labels[at] == labels[to]
        both = torch.ones_like(same) if counts is None else counts[at] & counts[to]
        valid[:, k][at] = both
        target[:, k][at] = same & both
    return target, valid


def _check_target(target: Tensor, valid: Tensor, rates: int | None) -> None:
    for value, name in ((target, "target"), (valid, "valid")):
        check_bool(value, name, ndim=4)
    channels = target.shape[1]
    if rates is None:
        if channels == 0 or channels % 8:
            raise ValueError(
                f"target: expected 8 channels a rate, got {channels} in {tuple(target.shape)}"
            )
    elif channels != 8 * rates:
        raise ValueError(
            f"target: expected {8 * rates} channels (8 for each of {rates} rates), "
            f"got {channels} in {tuple(target.shape)}"
        )
    check_shape(valid, "valid", target.shape)
    check_same_device([("target", target), ("valid", valid)])


def _categories(target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Category (number of positive signals of eight) and number of valid ones, for one rate.

    A pixel with fewer than eight valid signals gets the category of the same share of positives,
    rounded to the nearest (a half upwards).
    """
    # As bytes: sums of booleans are several times slower on a CPU.
    count, positive = (
        x.view(torch.uint8).sum(1, dtype=torch.uint8).int() for x in (valid, target & valid)
    )
    return (16 * positive + count) // (2 * count).clamp(min=1), count


def neighbour_count_frequencies(
    target: Tensor, valid: Tensor, num_rates: int, *, normalise: bool = True
) -> Tensor:
    """How often ``k`` of a pixel's eight signals are positive, for each rate (section 3.2, Fig. 3).

    Parameters
    ----------
    target, valid
        bool ``(B, 8 num_rates, H, W)``, as from :func:`dilated_affinity_target`.
    num_rates
        Number of rates, at least 1.
    normalise
        ``True`` (default): frequencies. ``False``: the counts themselves. To go through a data set,
        add up the counts of its batches and divide each row by its sum.

    Returns
    -------
    Tensor
        ``(num_rates, 9)``: entry ``[r, k]`` for the category ``n_k`` at rate r. float64, with rows that
        sum to 1, or int64 counts. Only pixels with all eight signals valid are counted; a rate without
        any such pixel has a row of zeros.

    Raises
    ------
    TypeError
        Tensors that are not bool, ``num_rates`` not an integer, ``normalise`` not a bool.
    ValueError
        Shapes that do not fit, ``num_rates`` below 1.

    Notes
    -----
    Time ``O(B K H W)``, memory ``O(B H W)``.

    Examples
    --------
    >>> labels = torch.tensor([[[0, 0, 0], [0, 0, 0], [0, 0, 1]]])
    >>> target, valid = dilated_affinity_target(labels, dilated_offsets([1]))
    >>> neighbour_count_frequencies(target, valid, 1, normalise=False)  # the centre pixel alone
    tensor([[0, 0, 0, 0, 0, 0, 0, 1, 0]])
    """
    check_integer(num_rates, "num_rates", 1)
    check_flag(normalise, "normalise")
    _check_target(target, valid, num_rates)
    rows = []
    for r in range(num_rates):
        own = slice(8 * r, 8 * r + 8)
        category, count = _categories(target[:, own], valid[:, own])
        rows.append(torch.bincount(category[count == 8], minlength=9))
    counts = torch.stack(rows)
    if not normalise:
        return counts
    return counts.double() / counts.sum(1, keepdim=True).clamp(min=1)


# --------------------------------------------------------------------------------------------------
# The loss
# --------------------------------------------------------------------------------------------------


def _weight_table(freqs: Tensor, weighting: str, floor: float) -> Tensor:
    """Weights ``[rate, category, signal]`` of a pair, relative to those inside a region (n_8)."""
    f = freqs.double()
    if weighting == "signal":
        empty = f.sum(1) == 0  # nothing known about the rate: no weighting
        share = f @ torch.arange(9, dtype=f.dtype, device=f.device) / 8
        negative = share / (1 - share).clamp(min=floor)
        table = torch.ones(len(f), 9, 2, dtype=f.dtype, device=f.device)
        table[:, :, 0] = negative.masked_fill(empty, 1.0)[:, None]
        return table
    if weighting == "none":
        ratio = torch.ones_like(f)
    else:
        f = f.clamp(min=floor)
        ratio = f[:, 8:] / f
        ratio = ratio.sqrt() if weighting == "sqrt" else ratio
    return ratio[:, :, None].expand(-1, -1, 2).contiguous()


class _WeightedFocal(torch.autograd.Function):
    """Weighted focal losses, summed over the eight directions: ``(B, 8 R, H, W) -> (B, R, H, W)``.

    One rate of a few images at a time, so that beside the input, its gradient and the result only
    small maps exist. The gradient is made on the way, so backward is one product.
    """

    @staticmethod
    def _parts(logits: Tensor) -> Iterator[tuple[int, slice, slice]]:
        """Each rate with its channels, and the images to take together."""
        budget = _STRIP_CUDA if logits.is_cuda else _STRIP_CPU
        images = max(1, budget // max(1, 8 * logits.shape[2] * logits.shape[3]))
        for first in range(0, len(logits), images):
            for rate in range(logits.shape[1] // 8):
                yield rate, slice(8 * rate, 8 * rate + 8), slice(first, first + images)

    @staticmethod
    def _terms(
        logits: Tensor, target: Tensor, valid: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weight of each pair of one rate, its sign, and its logit towards the truth."""
        category, _ = _categories(target, valid)
        # As numbers: a product with a boolean takes several times longer on a CPU.
        truth, counts = (x.view(torch.uint8).to(table.dtype) for x in (target, valid))
        negative, positive = (
            weights.index_select(0, category.flatten()).view(category.shape).unsqueeze(1)
            for weights in table.T.contiguous()
        )
        weight = torch.addcmul(negative, positive - negative, truth).mul_(counts)
        sign = truth.mul_(2).sub_(1)
        return weight, sign, logits.to(table.dtype) * sign

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        valid: Tensor,
        table: Tensor,
        gamma: float,
        with_grad: bool,
    ) -> Tensor:
        batch, channels, height, width = logits.shape
        sums = logits.new_empty((batch, channels // 8, height, width), dtype=table.dtype)
        slopes = torch.empty_like(logits, dtype=table.dtype) if with_grad else None
        for rate, own, part in _WeightedFocal._parts(logits):
            weight, sign, s = _WeightedFocal._terms(
                logits[part, own], target[part, own], valid[part, own], table[rate]
            )
            s.neg_()
            loss, wrong = F.softplus(s), torch.sigmoid(s)
            factor = wrong.pow(gamma).mul_(weight)
            sums[part, rate] = (factor * loss).sum(1)
            if slopes is not None:
                # d/ds = -(1 - p)^gamma ((1 - p) + gamma p log(1/p)) with p = sigmoid(s).
                slope = loss.addcmul_(loss, wrong, value=-1).mul_(gamma).add_(wrong)
                torch.mul(slope.mul_(factor), sign.neg_(), out=slopes[part, own])
        ctx.save_for_backward(slopes)
        ctx.dtype = logits.dtype
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_differentiated_once("DilatedAffinityLoss")
        (slopes,) = ctx.saved_tensors
        grad = torch.empty_like(slopes, dtype=ctx.dtype)
        for rate in range(grads[0].shape[1]):
            own = slice(8 * rate, 8 * rate + 8)
            torch.mul(slopes[:, own], grads[0][:, rate, None], out=grad[:, own])
        return grad, None, None, None, None, None


@uncompiled
def _weighted_focal(
    logits: Tensor, target: Tensor, valid: Tensor, table: Tensor, gamma: float
) -> Tensor:
    # A loop that keeps nothing: tracing it would only undo that.
    with_grad = logits.requires_grad and torch.is_grad_enabled()
    result: Tensor = _WeightedFocal.apply(logits, target, valid, table, gamma, with_grad)  # type: ignore[no-untyped-call]
    return result


def _weighted_focal_reference(
    logits: Tensor, target: Tensor, valid: Tensor, table: Tensor, gamma: float
) -> Tensor:
    """Equations 4 and 5, pair by pair."""
    p = torch.sigmoid(logits.to(table.dtype))
    p_t = torch.where(target, p, 1 - p)
    p_t = torch.where(valid, p_t, 0.5)  # any number: what is not valid is not counted
    focal = -((1 - p_t) ** gamma) * p_t.log() * valid
    sums = []
    for r in range(len(table)):
        own = slice(8 * r, 8 * r + 8)
        category, _ = _categories(target[:, own], valid[:, own])
        weight = table[r, category[:, None], target[:, own].long()]
        sums.append((weight * focal[:, own]).sum(1))
    return torch.stack(sums, 1)


class DilatedAffinityLoss(nn.Module):
    r"""Focal loss on dilated affinities, weighted by how ordinary a pixel's neighbourhood is (Eq. 5).

    .. math:: L = \sum_r \frac{1}{|P_r|} \sum_{i \in P_r} w_{k(i,r), r}
              \sum_{c=1}^{8} FL(p_{t}),\qquad FL(p_t) = -(1 - p_t)^\gamma \log p_t

    where :math:`p_t` is the probability given to the truth, k how many of the pixel's eight signals at
    rate r are positive, and :math:`P_r` the pixels with a valid pair at that rate. Add
    :math:`\lambda L` to the class loss (the paper's weight, there called beta, is 1.2 to 1.5 for
    ``"sqrt"`` and 0.25 for ``"inverse"``, Tables 1 and 2).

    Parameters
    ----------
    freqs
        Frequencies of the categories, ``(R, 9)``, non-negative, from
        :func:`neighbour_count_frequencies` over the training set. ``None`` only with
        ``weighting="none"``.
    gamma
        Focusing parameter, at least 0; 0 is binary cross-entropy. Default 2 (section 3.2).
    weighting
        ``"sqrt"`` (default): :math:`w_k = \sqrt{f_8 / f_k}`; ``"inverse"``: :math:`f_8 / f_k`;
        ``"signal"``: 1 for positive pairs and :math:`\pi/(1-\pi)` for negative ones, with
        :math:`\pi = \sum_k k f_k / 8`; ``"none"``: 1. All eight signals of a pixel share one weight,
        except under ``"signal"``. Printed Eq. 5 lacks the root; the text and Table 1 require it.
    reduction
        ``"mean"`` (default): over the pixels that have a valid pair, for each rate, then the sum over
        rates. ``"sum"`` over pixels and rates. ``"none"``: the map, ``(B, R, H, W)``.
    min_frequency
        Frequencies below it count as it, so an empty category has a finite weight. Default 1e-6.
    backend
        ``"auto"``: a few images at a time, stable for all finite logits. ``"reference"``: the printed
        equations, which need probabilities strictly between 0 and 1.

    Raises
    ------
    TypeError, ValueError
        Options outside the ranges above; frequencies of another shape, negative or not finite. When
        called: logits not floating or not finite, targets not bool, shapes or devices that differ.

    Notes
    -----
    Called with logits ``(B, 8 R, H, W)`` and what :func:`dilated_affinity_target` returns. The paper
    does not say whether it takes a mean or a sum over pixels, nor what becomes of pairs that leave the
    image: here they are left out, with those of ignored pixels, and a pixel with only some valid pairs
    gets the category of the same share of positives (rounded). No valid pair at all gives 0 with a zero
    gradient. The result is float64 for float64 logits, else float32.

    Time ``O(B R H W)``. Memory beyond the gradient of the logits, which is made on the way and once
    more, scaled, going back: the map ``(B, R, H, W)`` and a few maps of one rate and image.
    Differentiating twice needs the reference. Under ``torch.compile`` the loop over images and rates
    runs uncompiled.

    Examples
    --------
    >>> labels = torch.tensor([[[0, 0, 1, 1]]])
    >>> target, valid = dilated_affinity_target(labels, dilated_offsets([1]))
    >>> criterion = DilatedAffinityLoss(None, gamma=0.0, weighting="none")
    >>> logits = torch.zeros(1, 8, 1, 4, requires_grad=True)
    >>> loss = criterion(logits, target, valid)  # 6 pairs of log 2, over 4 pixels
    >>> round(loss.item(), 4)
    1.0397
    """

    table: Tensor

    def __init__(
        self,
        freqs: Tensor | None,
        gamma: float = 2.0,
        weighting: Weighting = "sqrt",
        reduction: Reduction = "mean",
        *,
        min_frequency: float = 1e-6,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_at_least(gamma, "gamma", 0)
        check_one_of(weighting, "weighting", ("sqrt", "inverse", "signal", "none"))
        check_one_of(reduction, "reduction", ("mean", "sum", "none"))
        check_at_least(min_frequency, "min_frequency", torch.finfo(torch.float32).tiny)
        check_one_of(backend, "backend", _BACKENDS)
        if freqs is None:
            if weighting != "none":
                raise ValueError(
                    f"freqs: expected frequencies for weighting={weighting!r}, got None"
                )
            table = torch.ones(1, 9, 2, dtype=torch.float64)
        else:
            check_tensor(freqs, "freqs", ndim=2)
            check_shape(freqs, "freqs", (None, 9))
            check_floating(freqs, "freqs")
            check_finite(freqs, "freqs")
            if len(freqs) == 0:
                raise ValueError("freqs: expected at least one rate, got none")
            sums = freqs.sum(1)
            if bool((freqs < 0).any()) or bool(
                ((sums - 1).abs() > _TOLERANCE).logical_and(sums != 0).any()
            ):
                raise ValueError(
                    "freqs: expected rows of frequencies (at least 0, with the sum 1; or all 0), "
                    f"got rows with the sums {sums.tolist()}"
                )
            table = _weight_table(freqs, weighting, float(min_frequency))
        self.rates = None if freqs is None else len(freqs)
        self.gamma = float(gamma)
        self.weighting: Weighting = weighting
        self.reduction: Reduction = reduction
        self.backend: Backend = backend
        self.register_buffer("table", table)

    def forward(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """Return the loss of logits ``(B, 8 R, H, W)`` for bool targets of the same shape."""
        check_floating(logits, "logits", ndim=4)
        _check_target(target, valid, self.rates)
        check_shape(logits, "logits", target.shape)
        check_same_device([("logits", logits), ("target", target)])
        # Looking at values would break the graph while torch.compile traces, so it sees shapes only.
        if not torch.compiler.is_compiling():
            check_finite(logits, "logits")
        dtype = wide_dtype(logits)
        rates = logits.shape[1] // 8
        table = self.table.to(logits.device, dtype).expand(rates, -1, -1)
        focal = _weighted_focal if self.backend == "auto" else _weighted_focal_reference
        with torch.autocast(logits.device.type, enabled=False):
            sums = focal(logits, target, valid, table, self.gamma)
            if self.reduction == "none":
                return sums
            if self.reduction == "sum":
                return sums.sum()
            # As bytes: far faster than any() of booleans on a CPU.
            pairs = valid.view(torch.uint8).view(len(valid), rates, 8, *valid.shape[2:])
            counted = pairs.amax(2).sum((0, 2, 3)).clamp(min=1)
            loss: Tensor = (sums.sum((0, 2, 3)) / counted).sum()
            return loss

    def extra_repr(self) -> str:
        """Return the options, for ``repr``."""
        return (
            f"rates={self.rates}, gamma={self.gamma}, weighting={self.weighting!r}, "
            f"reduction={self.reduction!r}, backend={self.backend!r}"
        )


# --------------------------------------------------------------------------------------------------
# The head
# --------------------------------------------------------------------------------------------------


class AffinityHead(nn.Module):
    r"""One 1x1 convolution from features to affinity logits, starting at the prior (section 3.2, 4.1).

    Its bias is :math:`b = +\log(\pi/(1-\pi))`, so that the first output is about :math:`\pi`, the
    frequency of positive pairs. (The paper prints a minus, which would start at :math:`1-\pi`.)

    Parameters
    ----------
    in_channels
        Channels of the feature map, at least 1 (256 in the paper's decoder).
    offsets
        int64 ``(K, 2)``: one output channel each. Kept as the buffer ``offsets``, so that targets and
        propagation can take it from the head.
    prior
        Frequency of positive pairs, strictly between 0 and 1: one number, or one for each rate (groups
        of 8 channels), or one for each channel. With frequencies of categories it is
        ``freqs @ torch.arange(9.0) / 8``.

    Raises
    ------
    TypeError, ValueError
        Arguments outside the ranges above.

    Notes
    -----
    Weights start as N(0, 0.01²), so the prior dominates. Time ``O(B in_channels K H W)``.

    Examples
    --------
    >>> head = AffinityHead(16, dilated_offsets([2, 4]), prior=[0.85, 0.76])
    >>> head(torch.zeros(1, 16, 5, 5)).sigmoid()[0, ::8, 0, 0]
    tensor([0.8500, 0.7600], grad_fn=<SelectBackward0>)
    >>> head(torch.zeros(1, 16, 5, 5), size=(20, 20)).shape
    torch.Size([1, 16, 20, 20])
    """

    offsets: Tensor

    def __init__(
        self, in_channels: int, offsets: Tensor, prior: float | Sequence[float] | Tensor
    ) -> None:
        super().__init__()
        check_integer(in_channels, "in_channels", 1)
        _check_offsets(offsets, 0, 0)
        channels = len(offsets)
        share = torch.as_tensor(prior, dtype=torch.float64).detach().cpu()
        if share.ndim > 1 or share.numel() not in {1, channels, channels / 8}:
            raise ValueError(
                f"prior: expected 1, {channels // 8} or {channels} numbers, got shape {tuple(share.shape)}"
            )
        if not bool(((share > 0) & (share < 1)).all()):
            raise ValueError(
                f"prior: expected numbers strictly between 0 and 1, got {share.tolist()}"
            )
        self.register_buffer("offsets", offsets.clone())
        self.conv = nn.Conv2d(in_channels, channels, 1)
        nn.init.normal_(self.conv.weight, std=0.01)
        with torch.no_grad():
            assert self.conv.bias is not None
            bias = torch.logit(share).reshape(-1)
            self.conv.bias.copy_(bias.repeat_interleave(channels // bias.numel()))

    def forward(self, features: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return logits ``(B, K, H, W)`` of features ``(B, in_channels, H, W)``.

        With ``size`` they are resized to it, bilinearly: offsets then count pixels of that size.
        """
        check_tensor(features, "features", ndim=4)
        check_shape(features, "features", (None, self.conv.in_channels, None, None))
        logits: Tensor = self.conv(features)
        if size is None:
            return logits
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


# --------------------------------------------------------------------------------------------------
# The propagation
# --------------------------------------------------------------------------------------------------


def steep_sigmoid(logits: Tensor, mu: float = 7.0) -> Tensor:
    r"""Sigmoid to the base ``mu``: :math:`\mu^x / (1 + \mu^x) = \sigma(x \log\mu)` (Eq. 7).

    In terms of the ordinary affinity :math:`a=\sigma(x)` it is :math:`a^k/(a^k + (1-a)^k)` with
    :math:`k=\log\mu`: 0.1 becomes 0.014, and 0.9 becomes 0.986.

    Parameters
    ----------
    logits
        Affinity *logits*, floating, any shape.
    mu
        The base, above 1. Default 7 (Eq. 7); ``math.e`` is the ordinary sigmoid. The equation as
        extracted reads ``mu x / (1 + mu x)``, which would do the opposite of what the text says.

    Returns
    -------
    Tensor
        In [0, 1], shape and dtype of ``logits``.

    Raises
    ------
    TypeError
        ``logits`` not a floating tensor.
    ValueError
        ``mu`` not above 1.

    Notes
    -----
    Time and memory ``O(N)`` for N logits.

    Examples
    --------
    >>> steep_sigmoid(torch.logit(torch.tensor([0.1, 0.5, 0.9])))
    tensor([0.0137, 0.5000, 0.9863])
    """
    check_floating(logits, "logits")
    check_at_least(mu, "mu", 1)
    if mu <= 1:
        raise ValueError(f"mu: expected a number > 1, got {mu!r}")
    return torch.sigmoid(logits * math.log(mu))


class _Propagation:
    """Steps of the propagation, forwards and backwards, on a few images.

    A step is ``v = c p + sum_k a_k p[shifted by k]``, ``p' = v / sum(v)`` over classes. Neighbours are
    views; each term is one multiply-add into one accumulator. The accumulator is a strip of rows, small
    enough for the cache that all offsets visit before the next strip begins.
    """

    def __init__(
        self,
        first: Tensor,
        affinity: Tensor,
        steps: list[tuple[int, int]],
        lam: float,
        anchored: bool,
    ) -> None:
        self.first, self.lam, self.anchored = first, lam, anchored
        images, classes, height, width = first.shape
        rows = max(1, _budget(first) // (images * classes * width))
        pairs = _pairs(steps, height, width)
        #: For each strip: its rows, and its part of each offset as channel, affinities, pixels
        #: (counted from the strip's first row) and neighbours.
        self.strips: list[tuple[slice, list[tuple[int, Tensor, _Window, _Window]]]] = []
        for top in range(0, height, rows):
            end, part = min(top + rows, height), []
            for k, (own, columns), (far, far_columns) in pairs:
                low, high, step = max(own.start, top), min(own.stop, end), far.start - own.start
                if low < high:
                    weights = affinity[:, k : k + 1, low:high, columns]
                    here = (..., slice(low - top, high - top), columns)
                    there = (..., slice(low + step, high + step), far_columns)
                    part.append((k, weights, here, there))
            self.strips.append((slice(top, end), part))

    def step(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next state, and the sums that normalised it."""
        after, totals = torch.empty_like(p), torch.empty_like(p[:, :1])
        source = self.first if self.anchored else p
        for rows, part in self.strips:
            own = source[:, :, rows]
            v = own * (self.lam * own.amax(1, keepdim=True))
            for _, weights, here, there in part:
                v[here].addcmul_(weights, p[there])
            total = v.sum(1, keepdim=True)
            torch.mul(v, total.reciprocal(), out=after[:, :, rows])
            totals[:, :, rows] = total
        return after, totals

    def back_own(self, p: Tensor, grad: Tensor) -> Tensor:
        """Gradient of ``lam p max(p)``."""
        top, index = p.max(1, keepdim=True)
        pull = (grad * p).sum(1, keepdim=True)
        return (grad * top).scatter_add_(1, index, pull).mul_(self.lam)

    def back(
        self, p: Tensor, after: Tensor, totals: Tensor, grad: Tensor, grad_a: Tensor, anchor: Tensor
    ) -> Tensor:
        """Go back from ``after`` to ``p``; add to the gradients of affinities and of the anchor."""
        before = torch.zeros_like(p)
        for rows, part in self.strips:
            g, reached = grad[:, :, rows], after[:, :, rows]
            # Normalising: the gain of each class over the mean gain.
            g = (g - (g * reached).sum(1, keepdim=True)).mul_(totals[:, :, rows].reciprocal())
            if self.anchored:
                anchor[:, :, rows] += g
            else:
                before[:, :, rows] += self.back_own(p[:, :, rows], g)
            own = grad_a[:, :, rows]
            for k, weights, here, there in part:
                pull = g[here]
                own[:, k][here] += (pull * p[there]).sum(1)
                before[there].addcmul_(weights, pull)
        return before


class _PropagationByKernel(_Propagation):
    """The same steps by the GPU's kernel, whole images at once."""

    def __init__(
        self,
        first: Tensor,
        affinity: Tensor,
        steps: list[tuple[int, int]],
        lam: float,
        anchored: bool,
    ) -> None:
        self.first, self.lam, self.anchored = first.contiguous(), lam, anchored
        self.affinity = affinity.contiguous()
        self.offsets = torch.tensor(steps, dtype=torch.int32, device=first.device)

    def step(self, p: Tensor) -> tuple[Tensor, Tensor]:
        from affnb.kernels import affinity_propagation as kernel

        p = p.contiguous()
        source = self.first if self.anchored else p
        return kernel.step(p, source, self.affinity, self.offsets, self.lam)

    def back(
        self, p: Tensor, after: Tensor, totals: Tensor, grad: Tensor, grad_a: Tensor, anchor: Tensor
    ) -> Tensor:
        from affnb.kernels import affinity_propagation as kernel

        p, grad = p.contiguous(), grad.contiguous()
        before, means = kernel.back(
            p, after, totals, grad, self.affinity, self.offsets, grad_a, self.lam,
            anchored=self.anchored,
        )  # fmt: skip
        if self.anchored:
            anchor += (grad - means) / totals
        return before


def _budget(prob: Tensor) -> int:
    return _STRIP_CUDA if prob.is_cuda else _STRIP_CPU


def _chunks(prob: Tensor) -> list[slice]:
    images = max(1, _budget(prob) // max(1, prob[:1].numel()))
    return [slice(i, i + images) for i in range(0, len(prob), images)]


class _Propagate(torch.autograd.Function):
    """The propagation, a few images at a time, keeping nothing but its inputs for the backward.

    Backward runs the steps again. Of T steps it keeps every sqrt(T)-th state, and the states of one
    stretch in between, for the images in hand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        prob: Tensor,
        affinity: Tensor,
        steps: Any,
        lam: float,
        iterations: int,
        anchored: bool,
    ) -> Tensor:
        ctx.save_for_backward(prob, affinity)
        ctx.options = steps, lam, iterations, anchored
        result = torch.empty_like(prob, memory_format=torch.contiguous_format)
        make = _PropagationByKernel if kernels.wanted(prob) else _Propagation
        for part in _chunks(prob):
            run = make(prob[part], affinity[part], steps, lam, anchored)
            p = prob[part]
            for _ in range(iterations):
                p, _ = run.step(p)
            result[part] = p
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_differentiated_once("propagate_affinity")
        prob, affinity = ctx.saved_tensors
        steps, lam, iterations, anchored = ctx.options
        grad_p = torch.empty_like(prob)
        grad_a = torch.zeros_like(affinity, memory_format=torch.contiguous_format)
        make = _PropagationByKernel if kernels.wanted(prob) else _Propagation
        stretch = math.isqrt(max(0, iterations - 1)) + 1
        for part in _chunks(prob):
            first = prob[part]
            run = make(first, affinity[part], steps, lam, anchored)
            marks, p = [first], first  # the state before each stretch
            for t in range((iterations - 1) // stretch * stretch):
                p, _ = run.step(p)
                if (t + 1) % stretch == 0:
                    marks.append(p)
            grad, anchor = grads[0][part], torch.zeros_like(first) if anchored else first
            done = iterations
            while marks:
                states, totals = [marks.pop()], []
                begin = len(marks) * stretch
                for _ in range(begin, done):
                    p, total = run.step(states[-1])
                    states.append(p)
                    totals.append(total)
                while totals:
                    after = states.pop()
                    grad = run.back(states[-1], after, totals.pop(), grad, grad_a[part], anchor)
                done = begin
            grad_p[part] = grad + run.back_own(first, anchor) if anchored else grad
        return grad_p, grad_a, None, None, None, None


@uncompiled
def _propagate_auto(
    prob: Tensor,
    affinity: Tensor,
    steps: list[tuple[int, int]],
    lam: float,
    iterations: int,
    anchored: bool,
) -> Tensor:
    # Thousands of small in-place operations that free their memory: nothing for a traced graph.
    result: Tensor = _Propagate.apply(prob, affinity, steps, lam, iterations, anchored)  # type: ignore[no-untyped-call]
    return result


def _propagate_reference(
    prob: Tensor,
    affinity: Tensor,
    steps: list[tuple[int, int]],
    lam: float,
    iterations: int,
    anchored: bool,
) -> Tensor:
    """Equation 6, pixel by pixel."""
    height, width = prob.shape[-2:]
    p = prob
    for _ in range(iterations):
        rows = []
        for i in range(height):
            row = []
            for j in range(width):
                q = prob[:, :, i, j] if anchored else p[:, :, i, j]
                v = lam * q * q.max(1, keepdim=True).values
                for k, (dy, dx) in enumerate(steps):
                    if 0 <= i + dy < height and 0 <= j + dx < width:
                        v = v + affinity[:, k, i, j, None] * p[:, :, i + dy, j + dx]
                row.append(v / v.sum(1, keepdim=True))
            rows.append(torch.stack(row, -1))
        p = torch.stack(rows, -2)
    return p


def propagate_affinity(
    prob: Tensor,
    affinity: Tensor,
    offsets: Tensor,
    *,
    lam: float = 6.0,
    iterations: int = 10,
    anchored: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    r"""Refine class probabilities through affinities (Eq. 6), repeatedly.

    .. math:: p_i' = \mathcal N\Big(c_i\, p_i + \sum_s a_{is}\, p_s\Big),\qquad
              c_i = \kappa \max_c p_i(c),\qquad \mathcal N(v) = v / \sum_c v_c

    Each step replaces a pixel's probabilities by a weighted mean of its own and its neighbours'. Many
    steps carry *any* leak of affinity across the whole image: without an anchor, a connected image ends
    as one constant, so the number of steps is a way of stopping early.

    Parameters
    ----------
    prob
        Class probabilities, floating ``(B, C, H, W)``, non-negative with the sum 1 over C (to 0.01).
    affinity
        Non-negative weights, floating ``(B, K, H, W)``: channel k is that of a pixel to its neighbour at
        ``offsets[k]``. Usually :func:`steep_sigmoid` of the predicted logits. Entries whose neighbour is
        outside the image are never looked at, except that they must be finite and not negative.
    offsets
        int64 ``(K, 2)``, (down, right), as from :func:`dilated_offsets`.
    lam
        Self-weight :math:`\kappa` (the paper's lambda), at least 0. Default 6 (section 4.2). It sets how
        fast the map changes; without an anchor it does not enter the fixed points.
    iterations
        Number of steps, at least 0. Default 10 (Tables 3 and 4).
    anchored
        ``False`` (default, as we read the paper): :math:`c_i` and the first term follow the current
        probabilities. ``True``: they stay those of ``prob`` (a random walk with restart), which has one
        fixed point and no collapse.
    backend
        ``"auto"``: shifted views into one accumulator. ``"reference"``: a loop over pixels.

    Returns
    -------
    Tensor
        Probabilities ``(B, C, H, W)``, with the sum 1; float64 if ``prob`` or ``affinity`` is, else
        float32. Gradients flow to both.

    Raises
    ------
    TypeError
        Tensors of another kind, ``iterations`` not an integer, ``anchored`` not a bool.
    ValueError
        Shapes or devices that do not fit (channels of ``affinity`` other than the number of offsets),
        values that are not finite, probabilities that are negative or do not sum to 1, negative
        affinities, ``lam < 0``, or ``lam = 0`` with a pixel that has no affinity to any neighbour;
        offsets as for :func:`dilated_affinity_target`.

    Notes
    -----
    Time ``O(B C K H W)`` a step. No unfolded copy, in either direction. Forward works on a few images
    at a time (one, if it is large) and holds the result and two states of those. Backward keeps nothing from forward but its inputs: it runs the steps of a few images again,
    holding about ``2 sqrt(T)`` of their states for T steps, beside the two gradients. So forward and
    backward cost about five forwards. Differentiating twice needs the reference. Where classes tie for
    the largest probability, one of them takes its gradient. Under ``torch.compile`` it runs uncompiled.

    Examples
    --------
    >>> prob = torch.tensor([[[[0.9, 0.4, 0.9]], [[0.1, 0.6, 0.1]]]])  # a doubtful pixel in between
    >>> affinity = torch.ones(1, 8, 1, 3)
    >>> propagate_affinity(prob, affinity, dilated_offsets([1]), lam=1.0, iterations=1)[0, 0]
    tensor([[0.6368, 0.7846, 0.6368]])
    """
    check_floating(prob, "prob", ndim=4)
    check_floating(affinity, "affinity", ndim=4)
    batch, classes, height, width = prob.shape
    steps = _check_offsets(offsets, height, width)
    check_shape(affinity, "affinity", (batch, len(steps), height, width))
    check_same_device([("prob", prob), ("affinity", affinity)])
    check_at_least(lam, "lam", 0)
    check_integer(iterations, "iterations", 0)
    check_flag(anchored, "anchored")
    check_one_of(backend, "backend", _BACKENDS)
    if classes == 0:
        raise ValueError("prob: expected at least one class, got none")
    # Looking at values would break the graph while torch.compile traces, so it sees shapes only.
    if not torch.compiler.is_compiling() and prob.numel():
        _check_values(prob, affinity, steps, float(lam))
    dtype = wide_dtype(prob, affinity)
    p, a = prob.to(dtype), affinity.to(dtype)
    if iterations == 0 or p.numel() == 0:
        return p.clone()
    run = _propagate_auto if backend == "auto" else _propagate_reference
    with torch.autocast(prob.device.type, enabled=False):
        result: Tensor = run(p, a, steps, float(lam), iterations, anchored)
    return result


def _check_values(prob: Tensor, affinity: Tensor, steps: list[tuple[int, int]], lam: float) -> None:
    check_finite(prob, "prob")
    check_finite(affinity, "affinity")
    lowest, sums = float(prob.detach().amin()), prob.detach().sum(1, dtype=torch.float32)
    off = float((sums - 1).abs().amax())
    if lowest < -_TOLERANCE or off > _TOLERANCE:
        raise ValueError(
            "prob: expected probabilities, at least 0 and with the sum 1 over dimension 1, got a "
            f"smallest value of {lowest:.3g} and a sum that is off by {off:.3g}"
        )
    if (least := float(affinity.detach().amin())) < 0:
        raise ValueError(f"affinity: expected values >= 0, got {least:.3g}")
    if lam == 0:
        total = torch.zeros_like(sums)
        for k, here, _ in _pairs(steps, *prob.shape[-2:]):
            total[(slice(None), *here)] += affinity.detach()[:, k][(slice(None), *here)]
        if bool((total == 0).any()):
            raise ValueError(
                "lam: expected a number > 0, because some pixel has no affinity to any neighbour, got 0"
            )

"""Sums of an affinity field over all pairs of pixels, and their gradient.

The class logits are turned into binary ones, and into probabilities, once. Then a program takes a run of
pixels, visits their neighbours, which are read from the cache, and what is left of a pair is one number
in a sum. Nothing is unfolded, and no pair is stored.

Pairs of unequal labels are separated in two channels only, those of the labels, so these are visited
apart: each pixel looks at the channel of its own class. Grouping goes on in all the other channels, but
the two orders of a pair, which are summed there, cost one product (see `affnb.affinity`).
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from affnb.kernels.tiles import (
    block_of_classes,
    configurations,
    planes,
    rounded,
    run_of_pixels,
)

__all__ = ["slopes", "sums"]

#: Programs of the kernels that sum: enough for any GPU. Each goes over several runs of pixels.
_PROGRAMS = 1024
#: Pixels of such a program, at most: it counts pairs in 32 bits.
_PIXELS = 2**16
#: What the autotuner goes by: the size of an image, and the number of its classes.
_KEY = ["near", "CLASSES"]
# With a block of 32 channels, a pixel a thread, or half as many channels.
_CONFIGURATIONS = configurations((1024, 1), (2048, 2), (4096, 4), (2048, 4))

# The compiler knows the number of classes, and makes no code for those that only fill up a block.


@triton.jit
def _here(height, width, P: tl.constexpr):
    """Image of a program, a run of its pixels, and which of them exist."""
    runs = tl.cdiv(height * width, P)
    image = (tl.program_id(0) // runs).to(tl.int64)
    pixels, inside = run_of_pixels(tl.program_id(0) % runs, height * width, P)
    return image, pixels, inside


@triton.jit
def _map(pointer, c, pixels, inside, size, CLASSES: tl.constexpr, absent: tl.constexpr = 0.0):
    """Load the channels of some pixels, shape ``(C, P)``."""
    keep = (c[:, None] < CLASSES) & inside[None, :]
    at = planes(pointer, c, size) + pixels[None, :]
    return tl.load(at, mask=keep, other=absent).to(tl.float32)


@triton.jit
def _logits(pointer, c, pixels, inside, size, CLASSES: tl.constexpr):
    # Channels that do not exist have no weight; pixels that do not exist need some finite value.
    z = _map(pointer, c, pixels, inside, size, CLASSES, float("-inf"))
    return tl.where(inside[None, :], z, 0.0)


@triton.jit
def _binary(z, c):
    """Binary logits of all channels, which channel is the largest, and the others' shares."""
    top = tl.max(z, 0)[None, :]
    largest = c[:, None] == tl.argmax(z, 0)[None, :]
    rest = tl.where(largest, float("-inf"), z)
    second = tl.max(rest, 0)[None, :]
    others = second + tl.log(tl.sum(tl.exp(rest - second), 0))[None, :]
    rho = tl.exp(rest - others)
    a = z - top - tl.log(1 + tl.exp(others - top) * tl.maximum(1 - rho, 0.0))
    return tl.where(largest, top - others, a), largest, rho


@triton.autotune(_CONFIGURATIONS, key=_KEY)
@triton.jit
def _to_binary(
    logits, a, p, height, width, near,
    CLASSES: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Binary logits, and their sigmoid."""
    P: tl.constexpr = (TILE + C - 1) // C
    image, pixels, inside = _here(height, width, P)
    size = height * width
    first = image * CLASSES * size
    c = tl.arange(0, C)
    value, _, _ = _binary(_logits(logits + first, c, pixels, inside, size, CLASSES), c)
    keep = (c[:, None] < CLASSES) & inside[None, :]
    tl.store(planes(a + first, c, size) + pixels[None, :], value, mask=keep)
    tl.store(planes(p + first, c, size) + pixels[None, :], tl.sigmoid(value), mask=keep)


@triton.jit
def _to_classes(z, g, c):
    """Carry a gradient in the binary logits on to the class logits."""
    a, largest, rho = _binary(z, c)
    at_largest = tl.sum(tl.where(largest, g, 0.0), 0)[None, :]
    spread = g * (1 + tl.exp(tl.where(largest, float("-inf"), a)))
    total = tl.sum(spread, 0)[None, :] - at_largest
    return spread - tl.sigmoid(a) * total - rho * at_largest


@triton.jit
def _tails(x):
    """``log(1 + e)`` and ``e / (1 + e)`` with ``e = exp(-|x|)``."""
    e = tl.exp(-tl.abs(x))
    return tl.log(1 + e), e / (1 + e)


@triton.jit
def _divergence(b, a, clip, CLIP: tl.constexpr):
    """Divergence of a neighbour (logit b) from a centre (logit a)."""
    if CLIP:
        p, n = tl.maximum(tl.sigmoid(b), clip), tl.maximum(tl.sigmoid(-b), clip)
        q, m = tl.maximum(tl.sigmoid(a), clip), tl.maximum(tl.sigmoid(-a), clip)
        d = p * (tl.log(p) - tl.log(q)) + n * (tl.log(n) - tl.log(m))
    else:
        # Both logits change sign where b > 0: the same divergence, and its terms do not cancel.
        log_b, share_b = _tails(b)
        log_a, _ = _tails(a)
        a = tl.where(b > 0, -a, a)
        d = tl.maximum(tl.maximum(a, 0.0) + log_a - log_b - share_b * (a + tl.abs(b)), 0.0)
    return d


@triton.jit
def _slope_of_centre(b, a, clip, CLIP: tl.constexpr):
    if CLIP:
        p, n = tl.maximum(tl.sigmoid(b), clip), tl.maximum(tl.sigmoid(-b), clip)
        q, m = tl.sigmoid(a), tl.sigmoid(-a)
        slope = tl.where(m >= clip, n * q, 0.0) - tl.where(q >= clip, p * m, 0.0)
    else:
        slope = tl.sigmoid(a) - tl.sigmoid(b)
    return slope


@triton.jit
def _slope_of_neighbour(b, a, clip, CLIP: tl.constexpr):
    p, n = tl.sigmoid(b), tl.sigmoid(-b)
    if CLIP:
        q, m = tl.maximum(tl.sigmoid(a), clip), tl.maximum(tl.sigmoid(-a), clip)
        up = tl.log(tl.maximum(p, clip)) - tl.log(q) + 1
        down = tl.log(tl.maximum(n, clip)) - tl.log(m) + 1
        slope = p * n * (tl.where(p >= clip, up, 0.0) - tl.where(n >= clip, down, 0.0))
    else:
        slope = p * n * (b - a)
    return slope


@triton.jit
def _label(labels, row, column, height, width):
    """Label of a pixel of an image; -1 where it is ignored or outside."""
    exists = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return tl.load(labels + row * width + column, mask=exists, other=-1)


@triton.jit
def _pairs(
    labels, offsets, o, y_i, pixels, row, column, height, width, OPPOSITE: tl.constexpr
):  # fmt: skip
    """Pairs of pixels with their neighbours at the o-th offset.

    Where the neighbours are and their labels; which pairs count with the pixel as their centre, and
    which with the neighbour (for these the opposite pixel is twice as far).
    """
    dy, dx = tl.load(offsets + 2 * o), tl.load(offsets + 2 * o + 1)
    y_j = _label(labels, row + dy, column + dx, height, width)
    from_here = (y_i >= 0) & (y_j >= 0)
    from_there = from_here
    if OPPOSITE:
        from_here &= _label(labels, row - dy, column - dx, height, width) >= 0
        from_there &= _label(labels, row + 2 * dy, column + 2 * dx, height, width) >= 0
    # The compiler sees that these are a run of pixels as well.
    return pixels + (dy * width + dx), y_j, from_here, from_there


@triton.jit
def _channel(pointer, y, size):
    """Pointers to where the channels of some labels begin."""
    return pointer + tl.maximum(y, 0).to(tl.int64) * size


@triton.autotune(_CONFIGURATIONS, key=_KEY)
@triton.jit
def _group(
    a, p, labels, offsets, ends, out, clip, height, width, sizes, programs, near,
    CLIP: tl.constexpr, OPPOSITE: tl.constexpr, BOTH: tl.constexpr, BY_CHANNEL: tl.constexpr,
    CLASSES: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Divergences in all channels in which labels agree.

    With ``BOTH``, of the two orders of pairs whose offsets are half a neighbourhood.
    """
    P: tl.constexpr = (TILE + C - 1) // C
    size = height * width
    image = (tl.program_id(0) // programs).to(tl.int64)
    labels += image * size
    a += image * CLASSES * size
    p += image * CLASSES * size
    c = tl.arange(0, C)
    for k in range(sizes):
        total = tl.zeros((C, P), tl.float32)
        for run in range(tl.program_id(0) % programs, tl.cdiv(size, P), programs):
            pixels, inside = run_of_pixels(run, size, P)
            row, column = pixels // width, pixels % width
            y_i = tl.load(labels + pixels, mask=inside, other=-1)
            own = _map(a, c, pixels, inside, size, CLASSES)
            own_p = _map(p, c, pixels, inside, size, CLASSES)
            before = total
            if not BY_CHANNEL:
                total = tl.zeros((C, P), tl.float32)
            for o in range(tl.load(ends + k), tl.load(ends + k + 1)):
                there, y_j, counts, _ = _pairs(
                    labels, offsets, o, y_i, pixels, row, column, height, width, OPPOSITE
                )
                other = _map(a, c, there, counts, size, CLASSES)
                differ = y_i != y_j
                u, v = tl.where(differ, y_i, -1)[None, :], tl.where(differ, y_j, -1)[None, :]
                alike = counts[None, :] & (c[:, None] != u) & (c[:, None] != v)
                if CLIP or not BOTH:
                    d = _divergence(other, own, clip, CLIP)
                    if BOTH:
                        d += _divergence(own, other, clip, CLIP)
                    total += tl.where(alike, d, 0.0)
                else:
                    step = _map(p, c, there, counts, size, CLASSES) - own_p
                    total += tl.where(alike, step, 0.0) * (other - own)
            total = tl.where(c[:, None] < CLASSES, total, 0.0)
            if not BY_CHANNEL:  # all channels, for the class of the centre
                each = tl.sum(total, 0)[None, :]
                total = before + tl.where(c[:, None] == y_i[None, :], each, 0.0)
        at = (tl.program_id(0).to(tl.int64) * sizes + k) * CLASSES + c
        tl.store(out + at, tl.sum(total, 1), mask=c < CLASSES)


@triton.autotune(_CONFIGURATIONS, key=_KEY)
@triton.jit
def _separate(
    a, labels, offsets, ends, out, numbers, margin, clip, height, width, sizes, programs, near,
    CLIP: tl.constexpr, OPPOSITE: tl.constexpr, SAME_CLASS: tl.constexpr, BY_CHANNEL: tl.constexpr,
    CLASSES: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Hinges of the pairs of unequal labels; divergences of equal ones in their own channel.

    And how many hinges, and pairs of equal labels. All is summed by the class of a pixel.
    """
    P: tl.constexpr = (TILE + C - 1) // C
    size = height * width
    image = (tl.program_id(0) // programs).to(tl.int64)
    labels += image * size
    a += image * CLASSES * size
    c = tl.arange(0, C)
    for k in range(sizes):
        grouping = tl.zeros((C, P), tl.float32)
        separating = tl.zeros((C, P), tl.float32)
        n_equal = tl.zeros((C, P), tl.int32)
        n_separating = tl.zeros((C, P), tl.int32)
        for run in range(tl.program_id(0) % programs, tl.cdiv(size, P), programs):
            pixels, inside = run_of_pixels(run, size, P)
            row, column = pixels // width, pixels % width
            y_i = tl.load(labels + pixels, mask=inside, other=-1)
            channel = _channel(a, y_i, size)
            own = tl.load(channel + pixels, mask=inside, other=0.0)
            d_equal = tl.zeros((P,), tl.float32)
            hinges = tl.zeros((P,), tl.float32)
            equal = tl.zeros((P,), tl.int32)
            unequal = tl.zeros((P,), tl.int32)
            for o in range(tl.load(ends + k), tl.load(ends + k + 1)):
                there, y_j, from_here, from_there = _pairs(
                    labels, offsets, o, y_i, pixels, row, column, height, width, OPPOSITE
                )
                other = tl.load(channel + there, mask=from_here | from_there, other=0.0)
                d = _divergence(other, own, clip, CLIP)
                differ = y_i != y_j
                if SAME_CLASS:
                    d_equal += tl.where(from_here & (y_i == y_j), d, 0.0)
                equal += (from_here & (y_i == y_j)).to(tl.int32)
                # A pair has hinges in the channels of both labels. Either is summed in the sum of its
                # channel, where its other pixel adds the other one; or both in that of the centre.
                hinges += tl.where(from_here & differ, tl.maximum(margin - d, 0.0), 0.0)
                unequal += (from_here & differ).to(tl.int32)
                if BY_CHANNEL:
                    second = from_there & differ
                    d = _divergence(own, other, clip, CLIP)
                else:
                    second = from_here & differ
                    channel_j = _channel(a, y_j, size)
                    d = _divergence(
                        tl.load(channel_j + there, mask=second, other=0.0),
                        tl.load(channel_j + pixels, mask=second, other=0.0),
                        clip, CLIP,
                    )  # fmt: skip
                hinges += tl.where(second, tl.maximum(margin - d, 0.0), 0.0)
                unequal += second.to(tl.int32)
            mine = (c[:, None] < CLASSES) & (c[:, None] == y_i[None, :])
            if SAME_CLASS:
                grouping += tl.where(mine, d_equal[None, :], 0.0)
            separating += tl.where(mine, hinges[None, :], 0.0)
            n_equal += tl.where(mine, equal[None, :], 0)
            n_separating += tl.where(mine, unequal[None, :], 0)
        at = (tl.program_id(0).to(tl.int64) * sizes + k) * 2 * CLASSES + c
        tl.store(out + at, tl.sum(grouping, 1), mask=c < CLASSES)
        tl.store(out + at + CLASSES, tl.sum(separating, 1), mask=c < CLASSES)
        tl.store(numbers + at, tl.sum(n_equal, 1), mask=c < CLASSES)
        tl.store(numbers + at + CLASSES, tl.sum(n_separating, 1), mask=c < CLASSES)


@triton.jit
def _push(own, other, w_here, w_there, margin, clip, CLIP: tl.constexpr):
    """Slope of a pair's two hinges in a pixel's own logit, as the centre and as the neighbour."""
    w_here = tl.where(_divergence(other, own, clip, CLIP) < margin, w_here, 0.0)
    w_there = tl.where(_divergence(own, other, clip, CLIP) < margin, w_there, 0.0)
    return -(
        w_here * _slope_of_centre(other, own, clip, CLIP)
        + w_there * _slope_of_neighbour(own, other, clip, CLIP)
    )


@triton.autotune(_CONFIGURATIONS, key=_KEY)
@triton.jit
def _backward(
    logits, a, p, labels, offsets, ends, scale, out, margin, clip, height, width, sizes, near,
    CLIP: tl.constexpr, OPPOSITE: tl.constexpr, SAME_CLASS: tl.constexpr, BY_CHANNEL: tl.constexpr,
    CLASSES: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradient of the sums in the logits of a run of pixels, as centres and as neighbours."""
    P: tl.constexpr = (TILE + C - 1) // C
    image, pixels, inside = _here(height, width, P)
    size = height * width
    row, column = pixels // width, pixels % width
    first = image * CLASSES * size
    labels += image * size
    a += first
    p += first
    c = tl.arange(0, C)
    y_i = tl.load(labels + pixels, mask=inside, other=-1)
    channel = _channel(a, y_i, size)
    own = tl.load(channel + pixels, mask=inside, other=0.0)
    own_a = _map(a, c, pixels, inside, size, CLASSES)
    own_p = _map(p, c, pixels, inside, size, CLASSES)
    own_slope = own_p * (1 - own_p)
    total = tl.zeros((C, P), tl.float32)
    at_own = tl.zeros((P,), tl.float32)  # in the channel of the pixel's class
    for k in range(sizes):
        group, apart = scale + k * CLASSES, scale + (sizes + k) * CLASSES
        group_i, apart_i = tl.load(_channel(group, y_i, 1)), tl.load(_channel(apart, y_i, 1))
        grouping = tl.zeros((C, P), tl.float32)
        for o in range(tl.load(ends + k), tl.load(ends + k + 1)):
            there, y_j, from_here, from_there = _pairs(
                labels, offsets, o, y_i, pixels, row, column, height, width, OPPOSITE
            )
            counts = from_here | from_there
            differ = counts & (y_i != y_j)
            here, back = tl.where(from_here, 1.0, 0.0), tl.where(from_there, 1.0, 0.0)
            # Separating, in the channels of the two labels. It is weighed by the channel, or by the
            # class of the centre.
            other = tl.load(channel + there, mask=counts, other=0.0)
            channel_j = _channel(a, y_j, size)
            own_j = tl.load(channel_j + pixels, mask=differ, other=0.0)
            other_j = tl.load(channel_j + there, mask=differ, other=0.0)
            apart_j = tl.load(_channel(apart, y_j, 1))
            if BY_CHANNEL:
                push = _push(own, other, here * apart_i, back * apart_i, margin, clip, CLIP)
                push_j = _push(own_j, other_j, here * apart_j, back * apart_j, margin, clip, CLIP)
            else:
                push = _push(own, other, here * apart_i, back * apart_j, margin, clip, CLIP)
                push_j = _push(own_j, other_j, here * apart_i, back * apart_j, margin, clip, CLIP)
            at_own += tl.where(differ, push, 0.0)
            u, v = tl.where(differ, y_i, -1)[None, :], tl.where(differ, y_j, -1)[None, :]
            total += tl.where(c[:, None] == v, push_j[None, :], 0.0)
            # Grouping, where the labels agree.
            if not BY_CHANNEL:
                here *= group_i
                back *= tl.load(_channel(group, y_j, 1))
            if SAME_CLASS:
                pull = here * _slope_of_centre(other, own, clip, CLIP)
                pull += back * _slope_of_neighbour(own, other, clip, CLIP)
                if BY_CHANNEL:
                    pull *= group_i
                at_own += tl.where(differ, 0.0, pull)
            else:
                others = _map(a, c, there, counts, size, CLASSES)
                if CLIP:
                    as_centre = _slope_of_centre(others, own_a, clip, CLIP)
                    as_neighbour = _slope_of_neighbour(own_a, others, clip, CLIP)
                else:
                    as_centre = own_p - _map(p, c, there, counts, size, CLASSES)
                    as_neighbour = own_slope * (own_a - others)
                if CLIP or OPPOSITE or not BY_CHANNEL:
                    as_centre *= here[None, :]
                    as_neighbour *= back[None, :]
                alike = counts[None, :] & (c[:, None] != u) & (c[:, None] != v)
                grouping += tl.where(alike, as_centre + as_neighbour, 0.0)
        if BY_CHANNEL:
            grouping *= tl.load(group + c, mask=c < CLASSES, other=0.0)[:, None]
        total += grouping
    total += tl.where(c[:, None] == y_i[None, :], at_own[None, :], 0.0)
    total = tl.where(c[:, None] < CLASSES, total, 0.0)
    z = _logits(logits + first, c, pixels, inside, size, CLASSES)
    value = _to_classes(z, total, c)
    keep = (c[:, None] < CLASSES) & inside[None, :]
    tl.store(planes(out + first, c, size) + pixels[None, :], value, mask=keep)


Offsets = list[list[tuple[int, int]]]


@lru_cache(maxsize=64)
def _on_device(
    offsets: tuple[tuple[tuple[int, int], ...], ...], device: torch.device
) -> list[Tensor]:
    """Offsets of all sizes in a row, and where each size begins and ends."""
    flat = [step for of_size in offsets for step in of_size]
    ends = [sum(len(of_size) for of_size in offsets[:k]) for k in range(len(offsets) + 1)]
    return [torch.tensor(x, dtype=torch.int32, device=device) for x in (flat, ends)]


class _Launch:
    """What the launches of one call have in common."""

    def __init__(self, logits: Tensor, offsets: Offsets) -> None:
        images, classes, height, width = logits.shape
        size, block = height * width, block_of_classes(classes)
        self.offsets, self.device = offsets, logits.device
        self.image = height, width
        self.near = rounded(size)
        self.blocks = {"CLASSES": classes, "C": block}
        self.grid = lambda meta: (images * triton.cdiv(size, -(-meta["TILE"] // block)),)
        # For sums, as many programs an image whatever the tile, so that their shape is known.
        enough = min(triton.cdiv(_PROGRAMS, images), triton.cdiv(size, 64))
        self.programs = max(enough, triton.cdiv(size, _PIXELS))
        self.total = images * self.programs

    def steps(self, half: bool = False) -> list[Tensor]:
        """Offsets on the device: all, or those that lead down or to the right."""
        chosen = tuple(
            tuple(step for step in of_size if not half or step > (0, 0)) for of_size in self.offsets
        )
        return _on_device(chosen, self.device)

    def binary(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Binary logits and probabilities."""
        a, p = (torch.empty_like(logits, dtype=torch.float32) for _ in range(2))
        _to_binary[self.grid](logits, a, p, *self.image, self.near, **self.blocks)
        return a, p


def sums(
    logits: Tensor,
    labels: Tensor,
    offsets: Offsets,
    *,
    margin: float,
    clip: float | None,
    require_opposite: bool,
    same_class: bool,
    by_channel: bool,
) -> Tensor:
    """Sums over all ordered pairs and their numbers.

    Parameters
    ----------
    logits
        Class logits, contiguous, not empty, ``(B, C, H, W)``, float32 or half precision.
    labels
        int32, contiguous, ``(B, H, W)``; -1 where they are ignored.
    offsets
        For each size, the offsets (down, right) of its neighbours; with each offset its opposite.
    margin, clip, require_opposite
        As for ``affnb.affinity.affinity_field_terms``.
    same_class, by_channel
        Whether a pair groups only in the channel of its class; whether sums are of channels (or of
        the classes of the centres).

    Returns
    -------
    Tensor
        float64 ``(4, K, C)``: grouping, separating, and how many of each.
    """
    launch = _Launch(logits, offsets)
    sizes, classes = len(offsets), logits.shape[1]
    shape = *launch.image, sizes, launch.programs, launch.near
    options = {"CLIP": clip is not None, "OPPOSITE": require_opposite, "BY_CHANNEL": by_channel}
    with torch.cuda.device_of(logits):
        a, p = launch.binary(logits)
        parts = a.new_empty(launch.total, sizes, 2, classes)
        numbers = torch.empty_like(parts, dtype=torch.int32)
        _separate[(launch.total,)](
            a, labels, *launch.steps(), parts, numbers, margin, clip or 0.0, *shape,
            SAME_CLASS=same_class, **options, **launch.blocks,
        )  # fmt: skip
        total = parts.sum(0, dtype=torch.float64)
        grouping, separating = total.unbind(1)
        n_equal, n_separating = numbers.sum(0).double().unbind(1)
        n_grouping = n_equal
        if not same_class:
            both = by_channel and not require_opposite
            parts = a.new_empty(launch.total, sizes, classes)
            _group[(launch.total,)](
                a, p, labels, *launch.steps(half=both), parts, clip or 0.0, *shape,
                BOTH=both, **options, **launch.blocks,
            )  # fmt: skip
            grouping = parts.sum(0, dtype=torch.float64)
            # Equal labels agree in all channels; unequal ones, which have two hinges, in all but two.
            if by_channel:
                pairs = n_equal.sum(1, keepdim=True) + n_separating.sum(1, keepdim=True) / 2
                n_grouping = pairs - n_separating
            else:
                n_grouping = classes * n_equal + (classes - 2) * n_separating / 2
    return torch.stack([grouping, separating, n_grouping, n_separating])


def slopes(
    logits: Tensor,
    labels: Tensor,
    offsets: Offsets,
    scale: Tensor,
    *,
    margin: float,
    clip: float | None,
    require_opposite: bool,
    same_class: bool,
    by_channel: bool,
) -> Tensor:
    """Gradient in the class logits; ``scale``, float32 ``(2, K, C)``, is that of the two sums."""
    launch = _Launch(logits, offsets)
    out = torch.empty_like(logits)
    with torch.cuda.device_of(logits):
        a, p = launch.binary(logits)
        _backward[launch.grid](
            logits, a, p, labels, *launch.steps(), scale, out, margin, clip or 0.0,
            *launch.image, len(offsets), launch.near,
            CLIP=clip is not None, OPPOSITE=require_opposite, SAME_CLASS=same_class,
            BY_CHANNEL=by_channel, **launch.blocks,
        )  # fmt: skip
    return out

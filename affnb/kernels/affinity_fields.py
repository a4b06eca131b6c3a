"""Sums of an affinity field over all pairs of pixels, and their gradient.

A program takes a run of pixels as the centres of pairs, with all their channels. The class logits are
turned into binary ones once; after that each offset reads the neighbours' from the cache, and what is
left of a pair is one number in a sum. Nothing is unfolded, and no pair is stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["slopes", "sums"]


@triton.jit
def _here(height, width, P: tl.constexpr):
    pixels = tl.program_id(0) * P + tl.arange(0, P)
    return tl.program_id(1).to(tl.int64), pixels, pixels < height * width


@triton.jit
def _map(pointer, image, classes, pixels, inside, size, other, C: tl.constexpr):
    c = tl.arange(0, C)[:, None]
    at = (image * classes + c) * size + pixels[None, :]
    return tl.load(pointer + at, mask=(c < classes) & inside[None, :], other=other).to(tl.float32)


@triton.jit
def _binary(z, C: tl.constexpr):
    """Binary logits of all channels, which channel is the largest, and the others' shares."""
    c = tl.arange(0, C)[:, None]
    top = tl.max(z, 0)[None, :]
    largest = c == tl.argmax(z, 0)[None, :]
    rest = tl.where(largest, float("-inf"), z)
    second = tl.max(rest, 0)[None, :]
    others = second + tl.log(tl.sum(tl.exp(rest - second), 0))[None, :]
    rho = tl.exp(rest - others)
    a = z - top - tl.log(1 + tl.exp(others - top) * tl.maximum(1 - rho, 0.0))
    return tl.where(largest, top - others, a), largest, rho


@triton.jit
def _to_binary(logits, a, classes, height, width, C: tl.constexpr, P: tl.constexpr):
    image, pixels, inside = _here(height, width, P)
    size = height * width
    # Channels that do not exist have no weight; pixels that do not exist need some finite value.
    z = _map(logits, image, classes, pixels, inside, size, float("-inf"), C)
    z = tl.where(inside[None, :], z, 0.0)
    c = tl.arange(0, C)[:, None]
    keep = (c < classes) & inside[None, :]
    tl.store(a + (image * classes + c) * size + pixels[None, :], _binary(z, C)[0], mask=keep)


@triton.jit
def _to_classes(logits, grad, out, classes, height, width, C: tl.constexpr, P: tl.constexpr):
    """Carry a gradient in the binary logits on to the class logits."""
    image, pixels, inside = _here(height, width, P)
    size = height * width
    z = _map(logits, image, classes, pixels, inside, size, float("-inf"), C)
    z = tl.where(inside[None, :], z, 0.0)
    g = _map(grad, image, classes, pixels, inside, size, 0.0, C)
    a, largest, rho = _binary(z, C)
    at_largest = tl.sum(tl.where(largest, g, 0.0), 0)[None, :]
    spread = g * (1 + tl.exp(tl.where(largest, float("-inf"), a)))
    total = tl.sum(spread, 0)[None, :] - at_largest
    c = tl.arange(0, C)[:, None]
    keep = (c < classes) & inside[None, :]
    value = spread - tl.sigmoid(a) * total - rho * at_largest
    tl.store(out + (image * classes + c) * size + pixels[None, :], value, mask=keep)


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1 + tl.exp(-tl.abs(x)))


@triton.jit
def _divergence(b, a, clip, CLIP: tl.constexpr):
    """Divergence of a neighbour (logit b) from a centre (logit a)."""
    if CLIP:
        p, n = tl.maximum(tl.sigmoid(b), clip), tl.maximum(tl.sigmoid(-b), clip)
        q, m = tl.maximum(tl.sigmoid(a), clip), tl.maximum(tl.sigmoid(-a), clip)
        d = p * (tl.log(p) - tl.log(q)) + n * (tl.log(n) - tl.log(m))
    else:
        # Both logits change sign where b > 0: the same divergence, and its terms do not cancel.
        flip = tl.where(b > 0, -1.0, 1.0)
        b, a = b * flip, a * flip
        d = tl.maximum(_softplus(a) - _softplus(b) - tl.sigmoid(b) * (a - b), 0.0)
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
def _label(labels, image, row, column, height, width):
    """Label of a pixel; -1 where it is ignored or outside."""
    exists = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    at = image * (height * width) + row * width + column
    return tl.load(labels + at, mask=exists, other=-1)


@triton.jit
def _kinds(y_i, y_j, counts, SAME_CLASS: tl.constexpr, C: tl.constexpr):
    """In which channels a pair groups, and in which it separates."""
    c = tl.arange(0, C)[:, None]
    is_i, is_j = c == y_i[None, :], c == y_j[None, :]
    differ = (is_i != is_j) & counts[None, :]
    if SAME_CLASS:
        alike = is_i & is_j & counts[None, :]
    else:
        alike = (is_i == is_j) & counts[None, :]
    return alike, differ


@triton.jit
def _total(value, y_i, BY_CHANNEL: tl.constexpr, C: tl.constexpr):
    """Sum by channel, or all channels by the class of the centre."""
    if BY_CHANNEL:
        total = tl.sum(value, 1)
    else:
        each = tl.sum(value, 0)[None, :]
        total = tl.sum(tl.where(tl.arange(0, C)[:, None] == y_i[None, :], each, 0.0), 1)
    return total


@triton.jit
def _forward(
    a, labels, offsets, ends, out, margin, clip, classes, height, width, sizes,
    CLIP: tl.constexpr, OPPOSITE: tl.constexpr, SAME_CLASS: tl.constexpr, BY_CHANNEL: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    image, pixels, inside = _here(height, width, P)
    size = height * width
    row, column = pixels // width, pixels % width
    y_i = tl.where(inside, _label(labels, image, row, column, height, width), -1)
    centre = _map(a, image, classes, pixels, inside, size, 0.0, C)
    exists = (tl.arange(0, C) < classes)[:, None]
    program = image * tl.num_programs(0) + tl.program_id(0)
    for k in range(sizes):
        grouping = tl.zeros((C,), tl.float32)
        separating = tl.zeros((C,), tl.float32)
        n_grouping = tl.zeros((C,), tl.float32)
        n_separating = tl.zeros((C,), tl.float32)
        for o in range(tl.load(ends + k), tl.load(ends + k + 1)):
            dy, dx = tl.load(offsets + 2 * o), tl.load(offsets + 2 * o + 1)
            y_j = _label(labels, image, row + dy, column + dx, height, width)
            counts = (y_i >= 0) & (y_j >= 0)
            if OPPOSITE:
                counts &= _label(labels, image, row - dy, column - dx, height, width) >= 0
            neighbour = _map(a, image, classes, pixels + dy * width + dx, counts, size, 0.0, C)
            d = _divergence(neighbour, centre, clip, CLIP)
            alike, differ = _kinds(y_i, y_j, counts, SAME_CLASS, C)
            alike = alike & exists
            grouping += _total(tl.where(alike, d, 0.0), y_i, BY_CHANNEL, C)
            hinge = tl.where(differ, tl.maximum(margin - d, 0.0), 0.0)
            separating += _total(hinge, y_i, BY_CHANNEL, C)
            n_grouping += _total(tl.where(alike, 1.0, 0.0), y_i, BY_CHANNEL, C)
            n_separating += _total(tl.where(differ, 1.0, 0.0), y_i, BY_CHANNEL, C)
        at = out + (program * sizes + k) * 4 * C + tl.arange(0, C)
        tl.store(at, grouping)
        tl.store(at + C, separating)
        tl.store(at + 2 * C, n_grouping)
        tl.store(at + 3 * C, n_separating)


@triton.jit
def _weight(scale, y, BY_CHANNEL: tl.constexpr, classes, C: tl.constexpr):
    """Upstream gradient of a pair's sums: of its channel, or of the class of its centre."""
    if BY_CHANNEL:
        c = tl.arange(0, C)
        weight = tl.load(scale + c, mask=c < classes, other=0.0)[:, None]
    else:
        weight = tl.load(scale + tl.maximum(y, 0))[None, :]
    return weight


@triton.jit
def _backward(
    a, labels, offsets, ends, scale, grad, margin, clip, classes, height, width, sizes,
    CLIP: tl.constexpr, OPPOSITE: tl.constexpr, SAME_CLASS: tl.constexpr, BY_CHANNEL: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Gradient of the sums in the binary logits of a run of pixels, as centres and as neighbours."""
    image, pixels, inside = _here(height, width, P)
    size = height * width
    row, column = pixels // width, pixels % width
    y_i = tl.where(inside, _label(labels, image, row, column, height, width), -1)
    own = _map(a, image, classes, pixels, inside, size, 0.0, C)
    exists = (tl.arange(0, C) < classes)[:, None]
    total = tl.zeros((C, P), tl.float32)
    for k in range(sizes):
        group, apart = scale + k * classes, scale + (sizes + k) * classes
        for o in range(tl.load(ends + k), tl.load(ends + k + 1)):
            dy, dx = tl.load(offsets + 2 * o), tl.load(offsets + 2 * o + 1)
            y_j = _label(labels, image, row + dy, column + dx, height, width)
            both = (y_i >= 0) & (y_j >= 0)
            other = _map(a, image, classes, pixels + dy * width + dx, both, size, 0.0, C)
            # As the centre: the neighbour is at the offset.
            counts = both
            if OPPOSITE:
                counts = both & (_label(labels, image, row - dy, column - dx, height, width) >= 0)
            alike, differ = _kinds(y_i, y_j, counts, SAME_CLASS, C)
            w = tl.where(alike & exists, _weight(group, y_i, BY_CHANNEL, classes, C), 0.0)
            closer = differ & (_divergence(other, own, clip, CLIP) < margin)
            w -= tl.where(closer, _weight(apart, y_i, BY_CHANNEL, classes, C), 0.0)
            total += w * _slope_of_centre(other, own, clip, CLIP)
            # As the neighbour: the centre is at the offset, and the opposite pixel twice as far.
            counts = both
            if OPPOSITE:
                far = _label(labels, image, row + 2 * dy, column + 2 * dx, height, width)
                counts = both & (far >= 0)
            alike, differ = _kinds(y_i, y_j, counts, SAME_CLASS, C)
            w = tl.where(alike & exists, _weight(group, y_j, BY_CHANNEL, classes, C), 0.0)
            closer = differ & (_divergence(own, other, clip, CLIP) < margin)
            w -= tl.where(closer, _weight(apart, y_j, BY_CHANNEL, classes, C), 0.0)
            total += w * _slope_of_neighbour(own, other, clip, CLIP)
    c = tl.arange(0, C)[:, None]
    keep = (c < classes) & inside[None, :]
    tl.store(grad + (image * classes + c) * size + pixels[None, :], total, mask=keep)


class _Launch:
    """What the launches of one call have in common."""

    def __init__(self, logits: Tensor, offsets: list[list[tuple[int, int]]]) -> None:
        images, classes, height, width = logits.shape
        flat = [step for of_size in offsets for step in of_size]
        ends = [sum(len(of_size) for of_size in offsets[:k]) for k in range(len(offsets) + 1)]
        self.offsets = torch.tensor(flat, dtype=torch.int32, device=logits.device)
        self.ends = torch.tensor(ends, dtype=torch.int32, device=logits.device)
        self.shape = classes, height, width
        block_c = triton.next_power_of_2(classes)
        # All channels of a run of pixels are in registers at once, so many classes mean short runs.
        self.blocks = {"C": block_c, "P": max(16, min(128, 1024 // block_c)), "num_warps": 4}
        self.grid = (triton.cdiv(height * width, self.blocks["P"]), images)


def sums(
    logits: Tensor,
    labels: Tensor,
    offsets: list[list[tuple[int, int]]],
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
        Class logits, contiguous, ``(B, C, H, W)``, float32 or half precision.
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
    a = torch.empty_like(logits, dtype=torch.float32)
    _to_binary[launch.grid](logits, a, *launch.shape, **launch.blocks)
    programs, block_c = launch.grid[0] * launch.grid[1], launch.blocks["C"]
    parts = a.new_empty(programs, len(offsets), 4, block_c)
    _forward[launch.grid](
        a, labels, launch.offsets, launch.ends, parts, margin, clip or 0.0, *launch.shape,
        len(offsets), CLIP=clip is not None, OPPOSITE=require_opposite, SAME_CLASS=same_class,
        BY_CHANNEL=by_channel, **launch.blocks,
    )  # fmt: skip
    return parts.sum(0, dtype=torch.float64).transpose(0, 1)[..., : logits.shape[1]]


def slopes(
    logits: Tensor,
    labels: Tensor,
    offsets: list[list[tuple[int, int]]],
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
    a = torch.empty_like(logits, dtype=torch.float32)
    _to_binary[launch.grid](logits, a, *launch.shape, **launch.blocks)
    grad = torch.empty_like(a)
    _backward[launch.grid](
        a, labels, launch.offsets, launch.ends, scale, grad, margin, clip or 0.0, *launch.shape,
        len(offsets), CLIP=clip is not None, OPPOSITE=require_opposite, SAME_CLASS=same_class,
        BY_CHANNEL=by_channel, **launch.blocks,
    )  # fmt: skip
    del a
    out = torch.empty_like(logits)
    _to_classes[launch.grid](logits, grad, out, *launch.shape, **launch.blocks)
    return out

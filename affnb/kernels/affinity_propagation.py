"""One step of the propagation of class probabilities through affinities, and its gradient.

A program takes a run of pixels of one image with all their classes, so each affinity is read once a
step, the neighbours' probabilities come from the cache, and nothing is unfolded.
"""

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

__all__ = ["back", "step"]

#: What the autotuner goes by: the size of an image, and the number of its classes.
_KEY = ["near", "CLASSES"]


def _configurations() -> list[triton.Config]:
    # With a block of 32 classes, a pixel a thread; half or twice as many classes a thread otherwise.
    return configurations((1024, 1), (2048, 2), (4096, 4), (2048, 4), (1024, 4), small=256)


@triton.jit
def _here(height, width, P: tl.constexpr):
    """Image of a program, its pixels with their rows and columns, and which of them exist."""
    runs = tl.cdiv(height * width, P)
    image = (tl.program_id(0) // runs).to(tl.int64)
    pixels, inside = run_of_pixels(tl.program_id(0) % runs, height * width, P)
    return image, pixels, pixels // width, pixels % width, inside


@triton.jit
def _neighbour(offsets, k, pixels, row, column, inside, height, width, SIGN: tl.constexpr):
    """Pixel at the k-th offset (or, with ``SIGN = -1``, the one whose k-th neighbour this is)."""
    dy, dx = SIGN * tl.load(offsets + 2 * k), SIGN * tl.load(offsets + 2 * k + 1)
    y, x = row + dy, column + dx
    exists = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return pixels + (dy * width + dx), exists  # so the compiler sees that these are a run as well


# The compiler knows the number of classes, and makes no code for those that only fill up a block.


@triton.jit
def _map(pointer, c, pixels, inside, size, CLASSES: tl.constexpr):
    """Load the classes of some pixels, shape ``(C, P)``."""
    keep = (c[:, None] < CLASSES) & inside[None, :]
    return tl.load(planes(pointer, c, size) + pixels[None, :], mask=keep, other=0.0)


@triton.autotune(_configurations(), key=_KEY)
@triton.jit
def _step(
    p, source, affinity, offsets, after, totals, lam, height, width, count, near,
    CLASSES: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = (TILE + C - 1) // C
    image, pixels, row, column, inside = _here(height, width, P)
    size = height * width
    p += image * CLASSES * size
    affinity += image * count * size
    c = tl.arange(0, C)
    own = _map(source + image * CLASSES * size, c, pixels, inside, size, CLASSES)
    v = own * (lam * tl.max(own, 0))[None, :]
    for k in range(count):
        there, exists = _neighbour(offsets, k, pixels, row, column, inside, height, width, 1)
        weight = tl.load(affinity + pixels, mask=exists, other=0.0)
        v += weight[None, :] * _map(p, c, there, exists, size, CLASSES)
        affinity += size
    total = tl.sum(tl.where(c[:, None] < CLASSES, v, 0.0), 0)
    share = v * (1 / tl.where(inside, total, 1.0))[None, :]
    at = planes(after + image * CLASSES * size, c, size) + pixels[None, :]
    tl.store(at, share, mask=(c[:, None] < CLASSES) & inside[None, :])
    tl.store(totals + image * size + pixels, total, mask=inside)


# Gradients of the affinities are added to those of later steps, which measuring must not do twice.
@triton.autotune(_configurations(), key=_KEY, restore_value=["grad_a"])
@triton.jit
def _back_to_affinity(
    p, after, totals, grad, offsets, means, grad_a, height, width, count, near,
    CLASSES: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Mean gradient of the new state at each pixel; add the gradient of the affinities."""
    P: tl.constexpr = (TILE + C - 1) // C
    image, pixels, row, column, inside = _here(height, width, P)
    size = height * width
    first = image * CLASSES * size
    p += first
    grad_a += image * count * size
    c = tl.arange(0, C)
    gain = _map(grad + first, c, pixels, inside, size, CLASSES)
    share = _map(after + first, c, pixels, inside, size, CLASSES)
    total = tl.load(totals + image * size + pixels, mask=inside, other=1.0)
    mean = tl.sum(gain * share, 0)
    tl.store(means + image * size + pixels, mean, mask=inside)
    # Normalising: the gain of each class over the mean gain.
    gain = (gain - mean[None, :]) * (1 / total)[None, :]
    for k in range(count):
        there, exists = _neighbour(offsets, k, pixels, row, column, inside, height, width, 1)
        pull = tl.sum(gain * _map(p, c, there, exists, size, CLASSES), 0)
        later = tl.load(grad_a + pixels, mask=exists, other=0.0)
        tl.store(grad_a + pixels, later + pull, mask=exists)
        grad_a += size


@triton.autotune(_configurations(), key=_KEY)
@triton.jit
def _back_to_state(
    p, totals, means, grad, affinity, offsets, before, lam, height, width, count, near,
    ANCHORED: tl.constexpr,
    CLASSES: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradient of the old state, from the pixels that a pixel is a neighbour of and from itself."""
    P: tl.constexpr = (TILE + C - 1) // C
    image, pixels, row, column, inside = _here(height, width, P)
    size = height * width
    first = image * CLASSES * size
    grad += first
    totals += image * size
    means += image * size
    affinity += image * count * size
    c = tl.arange(0, C)
    result = tl.zeros((C, P), tl.float32)
    if not ANCHORED:  # the pixel's own term, lam p max(p)
        own = _map(p + first, c, pixels, inside, size, CLASSES)
        mean = tl.load(means + pixels, mask=inside, other=0.0)
        total = tl.load(totals + pixels, mask=inside, other=1.0)
        gain = _map(grad, c, pixels, inside, size, CLASSES) - mean[None, :]
        gain *= (lam / total)[None, :]
        largest = c[:, None] == tl.argmax(own, 0)[None, :]
        pull = tl.sum(gain * own, 0)[None, :]
        result += gain * tl.max(own, 0)[None, :] + tl.where(largest, pull, 0.0)
    for k in range(count):
        there, exists = _neighbour(offsets, k, pixels, row, column, inside, height, width, -1)
        weight = tl.load(affinity + there, mask=exists, other=0.0)
        weight /= tl.load(totals + there, mask=exists, other=1.0)
        mean = tl.load(means + there, mask=exists, other=0.0)
        gain = _map(grad, c, there, exists, size, CLASSES) - mean[None, :]
        result += weight[None, :] * gain
        affinity += size
    at = planes(before + first, c, size) + pixels[None, :]
    tl.store(at, result, mask=(c[:, None] < CLASSES) & inside[None, :])


class _Launch:
    """What the launches of one step have in common."""

    def __init__(self, p: Tensor, offsets: Tensor) -> None:
        images, classes, height, width = p.shape
        size, block = height * width, block_of_classes(classes)
        self.sizes = height, width, len(offsets), rounded(size)
        self.blocks = {"CLASSES": classes, "C": block}
        self.grid = lambda meta: (images * triton.cdiv(size, -(-meta["TILE"] // block)),)


def step(
    p: Tensor, source: Tensor, affinity: Tensor, offsets: Tensor, lam: float
) -> tuple[Tensor, Tensor]:
    """Return the next state, and the sums that normalised it.

    Parameters
    ----------
    p, source
        float32 ``(B, C, H, W)``, contiguous: the state, and the state of the pixel's own term.
    affinity
        float32 ``(B, K, H, W)``, contiguous.
    offsets
        int32 ``(K, 2)``, (down, right).
    lam
        Self-weight of a pixel.
    """
    after, totals = torch.empty_like(p), torch.empty_like(p[:, :1])
    if p.numel():
        launch = _Launch(p, offsets)
        with torch.cuda.device_of(p):
            _step[launch.grid](
                p, source, affinity, offsets, after, totals, lam, *launch.sizes, **launch.blocks
            )
    return after, totals


def back(
    p: Tensor,
    after: Tensor,
    totals: Tensor,
    grad: Tensor,
    affinity: Tensor,
    offsets: Tensor,
    grad_a: Tensor,
    lam: float,
    *,
    anchored: bool,
) -> tuple[Tensor, Tensor]:
    """Go back from ``after``, with its gradient, to ``p``; add to ``grad_a`` that of the affinities.

    Returns the gradient in ``p`` (with ``anchored`` without that of the pixel's own term), and the mean
    gradient ``(B, 1, H, W)``: the sums before they were normalised have ``(grad - mean) / totals``.
    """
    before, means = torch.empty_like(p), torch.empty_like(totals)
    if p.numel():
        launch = _Launch(p, offsets)
        with torch.cuda.device_of(p):
            _back_to_affinity[launch.grid](
                p, after, totals, grad, offsets, means, grad_a, *launch.sizes, **launch.blocks
            )
            _back_to_state[launch.grid](
                p, totals, means, grad, affinity, offsets, before, lam, *launch.sizes,
                ANCHORED=anchored, **launch.blocks,
            )  # fmt: skip
    return before, means

"""One step of the propagation of class probabilities through affinities, and its gradient.

A program takes a run of pixels of one image with all their classes, so each affinity is read once a
step, the neighbours' probabilities come from the cache, and nothing is unfolded.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["back_to_map", "back_to_sums", "step"]


@triton.jit
def _map(pointer, image, classes, pixels, inside, size, C: tl.constexpr):
    """Load the classes of some pixels, shape ``(BLOCK_C, BLOCK_P)``."""
    c = tl.arange(0, C)
    at = (image * classes + c[:, None]).to(tl.int64) * size + pixels[None, :]
    return tl.load(pointer + at, mask=(c[:, None] < classes) & inside[None, :], other=0.0)


@triton.jit
def _store_map(pointer, value, image, classes, pixels, inside, size, C: tl.constexpr):
    c = tl.arange(0, C)
    at = (image * classes + c[:, None]).to(tl.int64) * size + pixels[None, :]
    tl.store(pointer + at, value, mask=(c[:, None] < classes) & inside[None, :])


@triton.jit
def _here(height, width, P: tl.constexpr):
    pixels = tl.program_id(0) * P + tl.arange(0, P)
    return tl.program_id(1), pixels, pixels // width, pixels % width, pixels < height * width


@triton.jit
def _neighbour(offsets, k, row, column, inside, height, width, SIGN: tl.constexpr):
    """Pixel at the k-th offset (or, with ``SIGN = -1``, the one whose k-th neighbour this is)."""
    y = row + SIGN * tl.load(offsets + 2 * k)
    x = column + SIGN * tl.load(offsets + 2 * k + 1)
    return y * width + x, inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit
def _step(
    p, source, affinity, offsets, after, totals, lam, classes, height, width, count,
    C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    image, pixels, row, column, inside = _here(height, width, P)
    size = height * width
    own = _map(source, image, classes, pixels, inside, size, C)
    v = own * (lam * tl.max(own, 0))[None, :]
    for k in range(count):
        there, exists = _neighbour(offsets, k, row, column, inside, height, width, 1)
        weight = tl.load(
            affinity + (image * count + k).to(tl.int64) * size + pixels, mask=exists, other=0.0
        )
        v += weight[None, :] * _map(p, image, classes, there, exists, size, C)
    total = tl.sum(v, 0)
    share = v / tl.where(inside, total, 1.0)[None, :]
    _store_map(after, share, image, classes, pixels, inside, size, C)
    tl.store(totals + image.to(tl.int64) * size + pixels, total, mask=inside)


@triton.jit
def _back_to_sums(
    p, after, totals, grad, offsets, g, grad_a, classes, height, width, count,
    C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Gradient of the sums before they were normalised; what it adds to that of the affinities."""
    image, pixels, row, column, inside = _here(height, width, P)
    size = height * width
    gain = _map(grad, image, classes, pixels, inside, size, C)
    share = _map(after, image, classes, pixels, inside, size, C)
    total = tl.load(totals + image.to(tl.int64) * size + pixels, mask=inside, other=1.0)
    gain = (gain - tl.sum(gain * share, 0)[None, :]) / total[None, :]
    _store_map(g, gain, image, classes, pixels, inside, size, C)
    for k in range(count):
        there, exists = _neighbour(offsets, k, row, column, inside, height, width, 1)
        pull = tl.sum(gain * _map(p, image, classes, there, exists, size, C), 0)
        at = grad_a + (image * count + k).to(tl.int64) * size + pixels
        tl.store(at, tl.load(at, mask=exists, other=0.0) + pull, mask=exists)


@triton.jit
def _back_to_map(
    g, own_gradient, affinity, offsets, before, classes, height, width, count,
    C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Add to the gradient of the probabilities what comes from the pixels they are neighbours of."""
    image, pixels, row, column, inside = _here(height, width, P)
    size = height * width
    total = _map(own_gradient, image, classes, pixels, inside, size, C)
    for k in range(count):
        there, exists = _neighbour(offsets, k, row, column, inside, height, width, -1)
        weight = tl.load(
            affinity + (image * count + k).to(tl.int64) * size + there, mask=exists, other=0.0
        )
        total += weight[None, :] * _map(g, image, classes, there, exists, size, C)
    _store_map(before, total, image, classes, pixels, inside, size, C)


def _launch(p: Tensor, offsets: Tensor) -> tuple[tuple[int, int], tuple[int, ...], dict[str, int]]:
    images, classes, height, width = p.shape
    block_c = triton.next_power_of_2(classes)
    # All classes of a run of pixels are in registers at once, so many classes mean short runs.
    block_p = max(16, min(256, 4096 // block_c))
    grid = (triton.cdiv(height * width, block_p), images)
    return grid, (classes, height, width, len(offsets)), {"C": block_c, "P": block_p}


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
    grid, sizes, blocks = _launch(p, offsets)
    after, totals = torch.empty_like(p), torch.empty_like(p[:, :1])
    _step[grid](p, source, affinity, offsets, after, totals, lam, *sizes, **blocks)
    return after, totals


def back_to_sums(
    p: Tensor, after: Tensor, totals: Tensor, grad: Tensor, offsets: Tensor, grad_a: Tensor
) -> Tensor:
    """Gradient in the sums before they were normalised; add to ``grad_a`` that of the affinities."""
    grid, sizes, blocks = _launch(p, offsets)
    g = torch.empty_like(p)
    _back_to_sums[grid](p, after, totals, grad, offsets, g, grad_a, *sizes, **blocks)
    return g


def back_to_map(g: Tensor, own: Tensor, affinity: Tensor, offsets: Tensor) -> Tensor:
    """Gradient in the state: ``own``, and what comes from the pixels that a pixel is a neighbour of."""
    grid, sizes, blocks = _launch(g, offsets)
    before = torch.empty_like(g)
    _back_to_map[grid](g, own, affinity, offsets, before, *sizes, **blocks)
    return before

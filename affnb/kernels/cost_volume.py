"""Local cost volume and its gradients: windows of inner products, with no unfolded copy.

A program takes a run of pixels. Their windows overlap, so what one displacement has read, the next finds
in the cache; and the width of a window is known to the compiler, which makes its displacements parts of
the loads' addresses. Sums are ordinary multiply-adds in float32: the windows are a narrow band of the
products of all pixels with all, of which matrix instructions would make, and drop, the rest as well.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from affnb.kernels.tiles import configurations, planes, rounded, run_of_pixels

__all__ = ["backward", "forward"]

#: Channels that a program of the backward pass takes.
_LEAST, _MOST = 8, 64
_CONFIGURATIONS = configurations((1024, 2), (2048, 2), (2048, 4), (4096, 4), small=128)


@triton.autotune(configurations((64, 2), (128, 4), (128, 2), (256, 4), small=32), key=["near", "v"])
@triton.jit
def _forward(
    a, b, out, channels, h, w, high, wide, u, near,
    v: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Scores of a run of pixels with all displacements of one row of the window."""
    size, padded = h * w, high * wide
    runs = tl.cdiv(size, TILE)
    p, inside = run_of_pixels(tl.program_id(0) % runs, size, TILE)
    k = tl.program_id(0) // runs % u
    image = (tl.program_id(0) // runs // u).to(tl.int64)
    # Programs at the end of a map repeat its last pixel, which spares every load a mask.
    here = tl.minimum(p, size - 1)
    corner = (here // w + k) * wide + here % w  # the first candidate, in the padded map
    a += image * channels * size
    b += image * channels * padded
    steps = tl.arange(0, V)[:, None]
    scores = tl.zeros((V, TILE), tl.float32)
    for _ in tl.range(0, channels, loop_unroll_factor=4):
        own = tl.load(a + here)
        for step in tl.static_range(v):
            product = own * tl.load(b + corner + step)
            scores = tl.where(steps == step, scores + product[None, :], scores)
        a += size
        b += padded
    at = planes(out + (image * u + k) * v * size, tl.arange(0, V), size) + p[None, :]
    tl.store(at, scores, mask=(steps < v) & inside[None, :])


@triton.jit
def _block(channels, rows, width, C: tl.constexpr, P: tl.constexpr):
    """Image of a program, a block of its channels, a row, some of its columns; which of them exist."""
    runs, blocks = tl.cdiv(width, P), tl.cdiv(channels, C)
    columns, inside = run_of_pixels(tl.program_id(0) % runs, width, P)
    row = tl.program_id(0) // runs % rows
    c = tl.program_id(0) // runs // rows % blocks * C + tl.arange(0, C)
    image = (tl.program_id(0) // runs // rows // blocks).to(tl.int64)
    return image, c, row, columns, (c < channels)[:, None] & inside[None, :]


@triton.autotune(_CONFIGURATIONS, key=["near", "v", "C"])
@triton.jit
def _back_to_own(
    b, grad, out, channels, h, w, high, wide, u, near,
    v: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradient of some pixels of ``a``: their candidates, weighed by those of the scores."""
    P: tl.constexpr = TILE // C
    size, padded = h * w, high * wide
    image, c, row, columns, inside = _block(channels, h, w, C, P)
    exists = columns < w
    # Again the last channel is repeated, to spare a mask.
    b = planes(b + image * channels * padded + row * wide, tl.minimum(c, channels - 1), padded)
    b += columns[None, :]
    grad += image * u * v * size + row * w
    total = tl.zeros((C, P), tl.float32)
    for _ in range(0, u):
        for step in tl.static_range(v):
            weight = tl.load(grad + columns, mask=exists, other=0.0)
            total += weight[None, :] * tl.load(b + step, mask=exists[None, :], other=0.0)
            grad += size
        b += wide
    out += image * channels * size + row * w
    tl.store(planes(out, c, size) + columns[None, :], total, mask=inside)


@triton.autotune(_CONFIGURATIONS, key=["near", "C"])
@triton.jit
def _back_to_padded(
    a, grad, out, channels, h, w, high, wide, u, near,
    v: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradient of some pixels of the padded ``b``, from the pixels whose candidates they are."""
    P: tl.constexpr = TILE // C
    size, padded = h * w, high * wide
    image, c, row, columns, inside = _block(channels, high, wide, C, P)
    a = planes(a + image * channels * size, tl.minimum(c, channels - 1), size)
    grad += image * u * v * size
    total = tl.zeros((C, P), tl.float32)
    # Displacement (k, step) leads from row - k, which is to be a row of ``a``, to here.
    first = tl.maximum(row - h + 1, 0)
    grad += first.to(tl.int64) * v * size
    for k in range(first, tl.minimum(row + 1, u)):
        for step in range(0, v):
            x = columns - step
            exists = (x >= 0) & (x < w)
            there = (row - k) * w + x
            weight = tl.load(grad + there, mask=exists, other=0.0)
            value = tl.load(a + there[None, :], mask=exists[None, :], other=0.0)
            total += weight[None, :] * value
            grad += size
    out += image * channels * padded + row * wide
    tl.store(planes(out, c, padded) + columns[None, :], total, mask=inside)


def _sizes(a: Tensor, b: Tensor) -> tuple[int, ...]:
    return *a.shape[1:], *b.shape[2:], b.shape[2] - a.shape[2] + 1


def forward(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of each feature with a window of the padded map.

    Parameters
    ----------
    a
        float32, contiguous, ``(B, c, h, w)``.
    b
        float32, contiguous, ``(B, c, h + u - 1, w + v - 1)``.

    Returns
    -------
    Tensor
        ``(B, u, v, h, w)``.
    """
    sizes, v = _sizes(a, b), b.shape[3] - a.shape[3] + 1
    images, u, pixels = len(a), sizes[-1], a.shape[2] * a.shape[3]
    out = a.new_empty(images, u, v, *a.shape[2:])
    if out.numel():
        with torch.cuda.device_of(a):
            _forward[lambda meta: (images * u * triton.cdiv(pixels, meta["TILE"]),)](
                a, b, out, *sizes, rounded(pixels), v=v, V=triton.next_power_of_2(v)
            )
    return out


def backward(a: Tensor, b: Tensor, grad: Tensor, *, to_padded: bool) -> Tensor:
    """Gradient with respect to ``a``, or to the padded ``b``; ``grad`` is contiguous."""
    x, out, kernel = (a, b, _back_to_padded) if to_padded else (b, a, _back_to_own)
    out = torch.empty_like(out)
    images, channels, rows, width = out.shape
    if out.numel():
        block = min(_MOST, max(_LEAST, triton.next_power_of_2(channels)))
        lines = images * triton.cdiv(channels, block) * rows
        with torch.cuda.device_of(a):
            kernel[lambda meta: (lines * triton.cdiv(width, meta["TILE"] // block),)](
                x, grad, out, *_sizes(a, b), rounded(rows * width), v=grad.shape[2], C=block
            )
    return out

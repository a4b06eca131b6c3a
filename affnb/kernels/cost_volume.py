"""Local cost volume and its gradients: windows of inner products, with no unfolded copy.

A program takes a run of pixels; the windows of neighbouring pixels overlap, so what one displacement
has read, the next finds in the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["backward", "forward"]

_BLOCK_P, _BLOCK_C = 64, 32


@triton.jit
def _forward(
    a, b, out, channels, h, w, high, wide, u, v, P: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Scores of a run of pixels with all displacements of one row of the window."""
    p = tl.program_id(0) * P + tl.arange(0, P)
    k = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    inside = p < h * w
    corner = (p // w + k) * wide + p % w  # the first candidate, in the padded map
    for step in range(0, v):
        total = tl.zeros((P,), tl.float32)
        for start in range(0, channels, C):
            c = start + tl.arange(0, C)
            there = (c[:, None] < channels) & inside[None, :]
            row = image * channels + c[:, None]
            own = tl.load(a + row * (h * w) + p[None, :], mask=there, other=0.0)
            other = tl.load(b + row * (high * wide) + corner[None, :] + step, mask=there, other=0.0)
            total += tl.sum(own * other, 0)
        tl.store(out + ((image * u + k) * v + step) * (h * w) + p, total, mask=inside)


@triton.jit
def _backward(
    x, grad, out, channels, h, w, high, wide, u, v,
    TO_PADDED: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradient of a run of pixels of ``a`` (``x`` is ``b``), or of the padded ``b`` (``x`` is ``a``)."""
    size, padded = h * w, high * wide
    p = tl.program_id(0) * P + tl.arange(0, P)
    c = tl.program_id(1) * C + tl.arange(0, C)
    image = tl.program_id(2).to(tl.int64)
    count = padded if TO_PADDED else size
    line = wide if TO_PADDED else w
    row, column = p // line, p % line
    channel = image * channels + c[:, None]
    total = tl.zeros((C, P), tl.float32)
    for k in range(0, u):
        for step in range(0, v):
            if TO_PADDED:  # the pixel of ``a`` whose candidate (k, step) this is
                y, z = row - k, column - step
                exists = (p < count) & (y >= 0) & (y < h) & (z >= 0) & (z < w)
                there = y * w + z
                at = there
                stride = size
            else:
                exists = p < count
                there = (row + k) * wide + column + step
                at = p
                stride = padded
            weight = tl.load(
                grad + ((image * u + k) * v + step) * size + at, mask=exists, other=0.0
            )
            keep = (c[:, None] < channels) & exists[None, :]
            value = tl.load(x + channel * stride + there[None, :], mask=keep, other=0.0)
            total += weight[None, :] * value
    keep = (c[:, None] < channels) & (p < count)[None, :]
    tl.store(out + channel * count + p[None, :], total, mask=keep)


def _sizes(a: Tensor, b: Tensor) -> tuple[int, ...]:
    h, w, high, wide = *a.shape[2:], *b.shape[2:]
    return a.shape[1], h, w, high, wide, high - h + 1, wide - w + 1


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
    c, h, w, high, wide, u, v = _sizes(a, b)
    out = a.new_empty(len(a), u, v, h, w)
    _forward[(triton.cdiv(h * w, _BLOCK_P), u, len(a))](
        a, b, out, c, h, w, high, wide, u, v, P=_BLOCK_P, C=_BLOCK_C
    )
    return out


def backward(a: Tensor, b: Tensor, grad: Tensor, *, to_padded: bool) -> Tensor:
    """Gradient with respect to ``a``, or to the padded ``b``; ``grad`` is contiguous."""
    sizes = _sizes(a, b)
    x, out = (a, torch.empty_like(b)) if to_padded else (b, torch.empty_like(a))
    pixels = out.shape[2] * out.shape[3]
    grid = (triton.cdiv(pixels, _BLOCK_P), triton.cdiv(sizes[0], _BLOCK_C), len(a))
    _backward[grid](x, grad, out, *sizes, TO_PADDED=to_padded, P=_BLOCK_P, C=_BLOCK_C)
    return out

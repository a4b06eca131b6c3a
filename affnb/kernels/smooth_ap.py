"""Smooth AP of rows of scores and its gradient: relevant items times all items, one sum at a time.

A comparison is a sigmoid that is added up where it is made, so nothing as large as queries times
relevant items times items exists, nor even a block of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["sweep"]

_BLOCK_I, _BLOCK_J = 16, 128


@triton.jit
def _sums_over(row, values, count, scale, LEAVE_OUT: tl.constexpr, index, J: tl.constexpr):
    """``sum_j g`` and ``sum_j g (1 - g)`` with ``g = sigmoid((row_j - value) scale)``."""
    first = tl.zeros_like(values)
    second = tl.zeros_like(values)
    for start in range(0, count, J):
        at = start + tl.arange(0, J)
        scores = tl.load(row + at, mask=at < count, other=float("-inf"))
        g = tl.sigmoid((scores[None, :] - values[:, None]) * scale)
        if LEAVE_OUT:
            g = tl.where(at[None, :] == index[:, None], 0.0, g)
        first += tl.sum(g, 1)
        second += tl.sum(g * (1 - g), 1)
    return first, second


@triton.jit
def _rank(
    wrong, own, ratio, rise, fall, at_own, items, p, scale, N: tl.constexpr, J: tl.constexpr
):  # fmt: skip
    """For some relevant items of a query: ``a / (a + n)``, its slopes, and their sums."""
    query = tl.program_id(1).to(tl.int64)
    wrong += query * items
    own += query * p
    i = tl.program_id(0) * N + tl.arange(0, N)
    value = tl.load(own + i, mask=i < p, other=0.0)
    n, slopes_of_wrong = _sums_over(wrong, value, items, scale, False, i, J)
    a, slopes_among = _sums_over(own, value, p, scale, True, i, J)
    a += 1
    b = a + n
    up, down = n / (b * b), a / (b * b)
    keep = i < p
    tl.store(ratio + query * p + i, a / b, mask=keep)
    tl.store(rise + query * p + i, up, mask=keep)
    tl.store(fall + query * p + i, down, mask=keep)
    tl.store(at_own + query * p + i, down * slopes_of_wrong - up * slopes_among, mask=keep)


@triton.jit
def _pull(
    row, own, weight, out, count, p, scale, sign,
    LEAVE_OUT: tl.constexpr, N: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """Add ``sign sum_i weight_i g_ij (1 - g_ij)`` to item j of ``out``."""
    query = tl.program_id(1).to(tl.int64)
    row += query * count
    own += query * p
    weight += query * p
    j = tl.program_id(0) * J + tl.arange(0, J)
    scores = tl.load(row + j, mask=j < count, other=float("-inf"))
    total = tl.zeros((J,), tl.float32)
    for start in range(0, p, N):
        i = start + tl.arange(0, N)
        value = tl.load(own + i, mask=i < p, other=0.0)
        w = tl.load(weight + i, mask=i < p, other=0.0)
        g = tl.sigmoid((scores[None, :] - value[:, None]) * scale)
        slope = w[:, None] * g * (1 - g)
        if LEAVE_OUT:
            slope = tl.where(i[:, None] == j[None, :], 0.0, slope)
        total += tl.sum(slope, 0)
    at = out + query * count + j
    tl.store(at, tl.load(at, mask=j < count, other=0.0) + sign * total, mask=j < count)


def sweep(
    scores: Tensor, positives: Tensor, temperature: float, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Smooth AP of queries that have equally many relevant items, and its gradient.

    Parameters
    ----------
    scores
        float32 ``(n, M)``; ``-inf`` where an item is not in the retrieval set.
    positives
        int64 ``(n, p)``: the columns of the relevant items, all different.
    temperature
        What differences of scores are divided by.
    with_grad
        Whether to make the gradient.

    Returns
    -------
    tuple
        Values ``(n,)``, and gradients ``(n, M)`` of each row's value in its scores, or ``None``.
    """
    (n, items), p = scores.shape, positives.shape[1]
    own = scores.gather(1, positives)
    wrong = scores.scatter(1, positives, -torch.inf)
    ratio, rise, fall, at_own = own.new_empty(4, n, p).unbind()
    scale = 1 / temperature
    blocks = {"N": _BLOCK_I, "J": _BLOCK_J}
    _rank[(triton.cdiv(p, _BLOCK_I), n)](
        wrong, own, ratio, rise, fall, at_own, items, p, scale, **blocks
    )
    if not with_grad:
        return ratio.mean(1), None
    gradient = torch.zeros_like(scores)
    _pull[(triton.cdiv(items, _BLOCK_J), n)](
        wrong, own, fall, gradient, items, p, scale, -1.0, LEAVE_OUT=False, **blocks
    )
    _pull[(triton.cdiv(p, _BLOCK_J), n)](
        own, own, rise, at_own, p, p, scale, 1.0, LEAVE_OUT=True, **blocks
    )
    return ratio.mean(1), gradient.scatter_(1, positives, at_own).div_(p * temperature)

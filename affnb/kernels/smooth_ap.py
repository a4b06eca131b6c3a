"""Smooth AP of rows of scores and its gradient: relevant items times all items, one sum at a time.

A comparison is a sigmoid that is added up where it is made, so nothing as large as queries times
relevant items times items exists, nor even a block of it. The scores are read twice, and the gradient
is written once.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from affnb.kernels.tiles import configurations, rounded

__all__ = ["sweep"]

#: Relevant items that a program compares at one time, at most.
_MOST = 16


@triton.jit
def _compare(scores, values, steep):
    """``g = sigmoid((scores_j - values_i) / temperature)`` and ``g (1 - g)``, shape ``(N, J)``.

    Both come from one exponential, and neither is a difference of nearly equal numbers. ``steep`` is
    ``log2(e) / temperature``: a power of two is the exponential that a GPU has an instruction for.
    """
    x = (scores[None, :] - values[:, None]) * steep
    e = tl.exp2(-tl.abs(x))
    r = 1 / (1 + e)
    return tl.where(x > 0, r, e * r), e * r * r


@triton.jit
def _others(row, at, count):
    """Scores of the items that are not relevant: the others, marked by +inf, compare as absent."""
    scores = tl.load(row + at, mask=at < count, other=float("-inf"))
    relevant = scores == float("inf")
    return tl.where(relevant, float("-inf"), scores), relevant


@triton.autotune(configurations((1024, 4), (2048, 4), (2048, 8), (4096, 8)), key=["N", "near"])
@triton.jit
def _rank(
    scores, own, ratio, rise, fall, at_own, items, p, near, steep,
    N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """For some relevant items of a query: ``a / (a + n)``, its slopes, and their sums."""
    J: tl.constexpr = TILE // N
    blocks = tl.cdiv(p, N)
    query = (tl.program_id(0) // blocks).to(tl.int64)
    scores += query * items
    own += query * p
    i = tl.program_id(0) % blocks * N + tl.arange(0, N)
    value = tl.load(own + i, mask=i < p, other=0.0)
    # Comparisons are added up place by place, and summed over a tile when all are done.
    wrong = tl.zeros((N, J), tl.float32)
    wrong_slopes = tl.zeros((N, J), tl.float32)
    for start in range(0, items, J):
        others, _ = _others(scores, start + tl.arange(0, J), items)
        g, slope = _compare(others, value, steep)
        wrong += g
        wrong_slopes += slope
    among = tl.zeros((N, J), tl.float32)
    among_slopes = tl.zeros((N, J), tl.float32)
    for start in range(0, p, J):
        j = start + tl.arange(0, J)
        g, slope = _compare(tl.load(own + j, mask=j < p, other=float("-inf")), value, steep)
        itself = i[:, None] == j[None, :]
        among += tl.where(itself, 0.0, g)
        among_slopes += tl.where(itself, 0.0, slope)
    n, a = tl.sum(wrong, 1), 1 + tl.sum(among, 1)
    b = a + n
    up, down = n / (b * b), a / (b * b)
    at, keep = query * p + i, i < p
    tl.store(ratio + at, a / b, mask=keep)
    tl.store(rise + at, up, mask=keep)
    tl.store(fall + at, down, mask=keep)
    pulled = down * tl.sum(wrong_slopes, 1) - up * tl.sum(among_slopes, 1)
    tl.store(at_own + at, pulled, mask=keep)


@triton.autotune(configurations((1024, 4), (2048, 4), (2048, 8), (4096, 8)), key=["N", "near"])
@triton.jit
def _pull(
    scores, own, positives, rise, fall, at_own, gradient, items, p, near, steep, gain,
    N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradient at some items of a query, or at some of its relevant ones (the last programs).

    ``gain`` is ``1 / (p temperature)``.
    """
    J: tl.constexpr = TILE // N
    tiles = tl.cdiv(items, J)
    programs = tiles + tl.cdiv(p, J)
    query = (tl.program_id(0) // programs).to(tl.int64)
    tile = tl.program_id(0) % programs
    scores += query * items
    gradient += query * items
    own += query * p
    rise += query * p
    fall += query * p
    total = tl.zeros((J,), tl.float32)
    if tile < tiles:
        j = tile * J + tl.arange(0, J)
        others, relevant = _others(scores, j, items)
        for start in range(0, p, N):
            i = start + tl.arange(0, N)
            value = tl.load(own + i, mask=i < p, other=0.0)
            weight = tl.load(fall + i, mask=i < p, other=0.0)
            _, slope = _compare(others, value, steep)
            total += tl.sum(weight[:, None] * slope, 0)
        # Relevant items are left to the other programs.
        tl.store(gradient + j, -total * gain, mask=(j < items) & (relevant == 0))
    else:
        j = (tile - tiles) * J + tl.arange(0, J)
        there = tl.load(own + j, mask=j < p, other=float("-inf"))
        for start in range(0, p, N):
            i = start + tl.arange(0, N)
            value = tl.load(own + i, mask=i < p, other=0.0)
            weight = tl.load(rise + i, mask=i < p, other=0.0)
            _, slope = _compare(there, value, steep)
            slope = tl.where(i[:, None] == j[None, :], 0.0, slope)
            total += tl.sum(weight[:, None] * slope, 0)
        total += tl.load(at_own + query * p + j, mask=j < p, other=0.0)
        column = tl.load(positives + query * p + j, mask=j < p, other=0)
        tl.store(gradient + column, total * gain, mask=j < p)


def sweep(
    scores: Tensor, positives: Tensor, temperature: float, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Smooth AP of queries that have equally many relevant items, and its gradient.

    Parameters
    ----------
    scores
        float32, contiguous, ``(n, M)``; ``-inf`` where an item is not in the retrieval set. They are
        overwritten at the relevant items.
    positives
        int64, contiguous, ``(n, p)``: the columns of the relevant items, all different.
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
    scores.scatter_(1, positives, torch.inf)
    ratio, rise, fall, at_own = own.new_empty(4, n, p).unbind()
    gradient = torch.empty_like(scores) if with_grad else None
    steep, gain, near = math.log2(math.e) / temperature, 1 / (p * temperature), rounded(items)
    block = min(_MOST, triton.next_power_of_2(p))
    sizes = items, p, near, steep

    def programs_of_pull(meta: dict[str, int]) -> tuple[int]:
        tile = meta["TILE"] // block
        return (n * (triton.cdiv(items, tile) + triton.cdiv(p, tile)),)

    with torch.cuda.device_of(scores):
        if n:
            _rank[(n * triton.cdiv(p, block),)](
                scores, own, ratio, rise, fall, at_own, *sizes, N=block
            )
        if n and gradient is not None:
            _pull[programs_of_pull](
                scores, own, positives, rise, fall, at_own, gradient, *sizes, gain, N=block
            )
    return ratio.mean(1), gradient

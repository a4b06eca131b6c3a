"""Streamed cross-entropy of similarities whose diagonal should win: PatchNCE, InfoNCE.

Sets of queries meet sets of keys; the logits are their products. No matrix of pairs is stored: the
forward pass leaves one log-sum-exp a query, the backward pass makes each tile again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from affnb.kernels.pairs import (
    add_to_running_sum,
    configurations,
    dot_precision,
    load_rows,
    log_of_sum,
    tile_of_products,
)

__all__ = ["pull", "row_losses"]


@triton.autotune(configurations(), key=["n", "m", "width"])
@triton.jit
def _forward(
    query, key, losses, logs, n, m, width, first,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    query += group * n * width
    key += group * m * width
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    own = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, m, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        logits = tile_of_products(
            query, key, rows, columns, n, m, width, width, width,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        logits = tl.where(columns[None, :] < m, logits, float("-inf"))
        top, total = add_to_running_sum(top, total, logits)
        own += tl.sum(tl.where(columns[None, :] == first + rows[:, None], logits, 0.0), 1)
    log = log_of_sum(top, total)
    tl.store(logs + group * n + rows, log, mask=rows < n)
    tl.store(losses + group * n + rows, log - own, mask=rows < n)


@triton.autotune(configurations(), key=["n", "m", "width"])
@triton.jit
def _backward(
    x, y, logs, pulled, n, m, width, first,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, TO_KEYS: tl.constexpr,
):  # fmt: skip
    """``sum_j (w - e) y_j`` of each row of x: of queries over keys, or of keys over queries."""
    group = tl.program_id(2).to(tl.int64)
    x += group * n * width
    y += group * m * width
    pulled += group * n * width
    logs += group * (m if TO_KEYS else n)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    coordinates = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if not TO_KEYS:
        log = tl.load(logs + rows, mask=rows < n, other=0.0)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, m, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        logits = tile_of_products(
            x, y, rows, columns, n, m, width, width, width, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )
        if TO_KEYS:
            log = tl.load(logs + columns, mask=columns < m, other=0.0)[None, :]
            own = rows[:, None] == first + columns[None, :]
        else:
            own = columns[None, :] == first + rows[:, None]
        slopes = tl.exp(logits - log) - tl.where(own, 1.0, 0.0)
        slopes = tl.where((rows[:, None] < n) & (columns[None, :] < m), slopes, 0.0)
        there = load_rows(y, columns, coordinates, m, width, width)
        total += tl.dot(slopes, there, input_precision=PRECISION)
    inside = (rows[:, None] < n) & (coordinates[None, :] < width)
    at = rows[:, None].to(tl.int64) * width + coordinates[None, :]
    tl.store(pulled + at, total, mask=inside)


def row_losses(query: Tensor, key: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each query, and the log-sum-exp of its logits.

    Parameters
    ----------
    query
        float32, contiguous, shape ``(sets, n, C)``, divided by the temperature.
    key
        float32, contiguous, shape ``(sets, m, C)``.
    first
        The key that belongs to query 0: that of query i is ``first + i``.

    Returns
    -------
    tuple of Tensor
        Two of shape ``(sets, n)``.
    """
    (sets, n, width), m = query.shape, key.shape[1]
    losses, logs = query.new_empty(2, sets, n).unbind()
    if losses.numel():
        _forward[lambda meta: (triton.cdiv(n, meta["BLOCK_M"]), sets)](
            query, key, losses, logs, n, m, width, first, PRECISION=dot_precision()
        )
    return losses, logs


def pull(query: Tensor, key: Tensor, logs: Tensor, first: int, *, to_keys: bool) -> Tensor:
    """Gradient of the sum of all rows' losses with respect to the queries, or to the keys."""
    x, y = (key, query) if to_keys else (query, key)
    (sets, n, width), m = x.shape, y.shape[1]
    pulled = torch.empty_like(x)
    block = min(128, max(16, triton.next_power_of_2(width)))
    if pulled.numel():
        _backward[lambda meta: (triton.cdiv(n, meta["BLOCK_M"]), triton.cdiv(width, block), sets)](
            x, y, logs, pulled, n, m, width, first,
            PRECISION=dot_precision(), BLOCK_D=block, TO_KEYS=to_keys,
        )  # fmt: skip
    return pulled

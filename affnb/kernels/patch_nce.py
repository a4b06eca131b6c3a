"""Streamed cross-entropy of similarities whose diagonal should win: PatchNCE, InfoNCE.

Sets of queries meet sets of keys; the logits are their products. No matrix of pairs is stored: the
forward pass leaves one log-sum-exp a query, the backward pass makes each tile again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from affnb.kernels.pairs import (
    LOG2_E,
    add_pieces,
    add_product,
    add_to_running_sum,
    configurations,
    layout,
    load_parts,
    log_of_sum,
    pieces_of_columns,
    rounded_size,
    split_tile,
    that_fit,
    tile_of_products,
)

__all__ = ["pull", "row_losses"]


@triton.autotune(
    configurations(),
    key=["size", "WIDTH", "PARTS"],
    prune_configs_by={"early_config_prune": that_fit},
)
@triton.jit
def _forward(
    query, key, own_logits, logs, scale, n, m, length, first, x_step, y_step, size,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # All programs are in the first axis of the grid, the only one that takes more than 65,535.
    blocks = tl.cdiv(n, BLOCK_M)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    query += group * n * WIDTH
    key += group * m * WIDTH
    coordinates = tl.arange(0, BLOCK_D)
    x1, x2, x3 = load_parts(query, row, coordinates, n, x_step, BLOCK_M, WIDTH, PARTS)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    own = tl.zeros((BLOCK_M,), tl.float32)
    begin = tl.program_id(1) * length
    for start in range(begin, tl.minimum(begin + length, m), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        products, _, _, _ = tile_of_products(
            query, key, x1, x2, x3, row, start, coordinates, n, m, x_step, y_step,
            WIDTH, PARTS, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        logits = tl.where(columns[None, :] < m, products * scale, float("-inf"))
        top, total = add_to_running_sum(top, total, logits)
        own += tl.sum(tl.where(columns[None, :] == first + rows[:, None], logits, 0.0), 1)
    at = (tl.program_id(1) * (tl.num_programs(0) // blocks) + group) * n + rows
    tl.store(logs + at, log_of_sum(top, total), mask=rows < n)
    tl.store(own_logits + at, own, mask=rows < n)


@triton.autotune(
    configurations(),
    key=["size", "WIDTH", "PARTS", "TO_KEYS"],
    prune_configs_by={"early_config_prune": that_fit},
)
@triton.jit
def _backward(
    x, y, logs, pulled, scale, n, m, length, first, x_step, y_step, size,
    TO_KEYS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``scale sum_j (w - e) y_j`` of each row of x: of queries over keys, or of keys over queries."""
    blocks = tl.cdiv(n, BLOCK_M)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    x += group * n * WIDTH
    y += group * m * WIDTH
    logs += group * (m if TO_KEYS else n)
    coordinates = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x1, x2, x3 = load_parts(x, row, coordinates, n, x_step, BLOCK_M, WIDTH, PARTS)
    if not TO_KEYS:
        log = tl.load(logs + rows, mask=rows < n, other=0.0)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    begin = tl.program_id(2) * length
    for start in range(begin, tl.minimum(begin + length, m), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        products, y1, y2, y3 = tile_of_products(
            x, y, x1, x2, x3, row, start, coordinates, n, m, x_step, y_step,
            WIDTH, PARTS, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if TO_KEYS:
            log = tl.load(logs + columns, mask=columns < m, other=0.0)[None, :]
            own = rows[:, None] == first + columns[None, :]
        else:
            own = columns[None, :] == first + rows[:, None]
        slopes = tl.exp2((products * scale - log) * LOG2_E) - tl.where(own, 1.0, 0.0)
        # What lies outside may be infinite, and has no weight.
        slopes = tl.where((rows[:, None] < n) & (columns[None, :] < m), slopes, 0.0)
        s1, s2, s3 = split_tile(slopes, y1)
        total = add_product(s1, s2, s3, y1, y2, y3, total, PARTS)
    at = (tl.program_id(2) * (tl.num_programs(0) // blocks) + group) * n + rows
    to = pulled + at[:, None] * WIDTH + coordinates[None, :]
    tl.store(to, scale * total, mask=rows[:, None] < n)


def row_losses(
    query: Tensor, key: Tensor, scale: float, first: int, width: int
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each query, and the log-sum-exp of its logits.

    Parameters
    ----------
    query, key
        Parts that `affnb.kernels.pairs.split` makes of features ``(sets, n, C)`` and ``(sets, m, C)``.
    scale
        One over the temperature: what products are multiplied by.
    first
        The key that belongs to query 0: that of query i is ``first + i``.
    width
        ``C``.

    Returns
    -------
    tuple of Tensor
        Two of shape ``(sets, n)``, float32.
    """
    (parts, sets, n, _), m = query.shape, key.shape[2]
    pieces, length = pieces_of_columns(sets * triton.cdiv(n, 64), m, query.device)
    own, logs = query.new_empty((2, pieces, sets, n), dtype=torch.float32).unbind()
    if logs.numel():
        with torch.cuda.device_of(query):
            _forward[lambda meta: (sets * triton.cdiv(n, meta["BLOCK_M"]), pieces)](
                query, key, own, logs, scale, n, m, length, first, query[0].numel(),
                key[0].numel(), rounded_size(sets * n, m), PARTS=parts, **layout(width),
            )  # fmt: skip
    total = logs[0] if pieces == 1 else logs.logsumexp(0)
    return total - add_pieces(own), total


def pull(
    query: Tensor, key: Tensor, logs: Tensor, scale: float, first: int, width: int, *, to_keys: bool
) -> Tensor:
    """Gradient of the sum of all rows' losses with respect to the queries, or to the keys."""
    x, y = (key, query) if to_keys else (query, key)
    (parts, sets, n, _), m, shape = x.shape, y.shape[2], layout(width)
    wide = shape["WIDTH"] // shape["BLOCK_D"]
    pieces, length = pieces_of_columns(sets * triton.cdiv(n, 64) * wide, m, query.device)
    pulled = logs.new_empty((pieces, sets, n, shape["WIDTH"]))  # whole tiles are written faster
    if pulled.numel():
        with torch.cuda.device_of(query):
            _backward[lambda meta: (sets * triton.cdiv(n, meta["BLOCK_M"]), wide, pieces)](
                x, y, logs, pulled, scale, n, m, length, first, x[0].numel(), y[0].numel(),
                rounded_size(sets * n, m), TO_KEYS=to_keys, PARTS=parts, **shape,
            )  # fmt: skip
    return add_pieces(pulled)[..., :width]

"""Streamed affinity mass of a batch: log-sum-exps of targets and of others, and their gradient.

The logits are ``-||f_m - f_n||^2 / 2`` of all ordered pairs of a row and another column. No matrix of
pairs is stored: the forward pass leaves two numbers a row, the backward pass makes each tile again.
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

__all__ = ["pull", "row_log_sums"]


@triton.jit
def _tile(
    x, norms, labels, x1, x2, x3, left_norms, left_labels, row, column, coordinates, count, step,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Logits of a tile, which of them are targets, and the columns' features.

    A logit of an item with itself is ``-inf``, and that of a row or column beyond the last, whose norm
    was loaded as infinite.
    """
    products, y1, y2, y3 = tile_of_products(
        x, x, x1, x2, x3, row, column, coordinates, count, count, step, step,
        WIDTH, PARTS, BLOCK_D, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    right_norms = tl.load(norms + columns, mask=columns < count, other=float("inf"))
    right_labels = tl.load(labels + columns, mask=columns < count, other=0)
    # Rounding can make a squared distance negative.
    logits = tl.minimum(products - left_norms[:, None] - right_norms[None, :], 0.0)
    logits = tl.where(rows[:, None] == columns[None, :], float("-inf"), logits)
    return logits, left_labels[:, None] == right_labels[None, :], y1, y2, y3


@triton.autotune(
    configurations(),
    key=["size", "WIDTH", "PARTS"],
    prune_configs_by={"early_config_prune": that_fit},
)
@triton.jit
def _forward(
    x, norms, labels, inside, outside, first, n, count, length, step, size,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = first + tl.program_id(0) * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    coordinates = tl.arange(0, BLOCK_D)
    x1, x2, x3 = load_parts(x, row, coordinates, count, step, BLOCK_M, WIDTH, PARTS)
    left_norms = tl.load(norms + rows, mask=rows < count, other=float("inf"))
    left_labels = tl.load(labels + rows, mask=rows < count, other=0)
    top_in = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    top_out = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sum_in = tl.zeros((BLOCK_M,), tl.float32)
    sum_out = tl.zeros((BLOCK_M,), tl.float32)
    begin = tl.program_id(1) * length
    for start in range(begin, tl.minimum(begin + length, count), BLOCK_N):
        logits, same, _, _, _ = _tile(
            x, norms, labels, x1, x2, x3, left_norms, left_labels, row, start, coordinates,
            count, step, WIDTH, PARTS, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        targets = tl.where(same, logits, float("-inf"))
        others = tl.where(same, float("-inf"), logits)
        top_in, sum_in = add_to_running_sum(top_in, sum_in, targets)
        top_out, sum_out = add_to_running_sum(top_out, sum_out, others)
    at = rows - first
    inside += tl.program_id(1) * n
    outside += tl.program_id(1) * n
    tl.store(inside + at, log_of_sum(top_in, sum_in), mask=at < n)
    tl.store(outside + at, log_of_sum(top_out, sum_out), mask=at < n)


@triton.autotune(
    configurations(),
    key=["size", "WIDTH", "PARTS"],
    prune_configs_by={"early_config_prune": that_fit},
)
@triton.jit
def _backward(
    x, norms, labels, log_sums, pulled, weights, first, n, count, length, step, size,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = first + tl.program_id(0) * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    coordinates = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x1, x2, x3 = load_parts(x, row, coordinates, count, step, BLOCK_M, WIDTH, PARTS)
    left_norms = tl.load(norms + rows, mask=rows < count, other=float("inf"))
    left_labels = tl.load(labels + rows, mask=rows < count, other=0)
    log_in = tl.load(log_sums)
    log_out = tl.load(log_sums + 1)
    points = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    begin = tl.program_id(2) * length
    for start in range(begin, tl.minimum(begin + length, count), BLOCK_N):
        logits, same, y1, y2, y3 = _tile(
            x, norms, labels, x1, x2, x3, left_norms, left_labels, row, start, coordinates,
            count, step, WIDTH, PARTS, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        share = tl.exp2((logits - tl.where(same, log_in, log_out)) * LOG2_E)
        slopes = tl.where(same, share, -share)
        total += tl.sum(slopes, 1)
        s1, s2, s3 = split_tile(slopes, y1)
        points = add_product(s1, s2, s3, y1, y2, y3, points, PARTS)
    at = tl.program_id(2).to(tl.int64) * n + rows - first
    to = pulled + at[:, None] * WIDTH + coordinates[None, :]
    tl.store(to, points, mask=(rows - first)[:, None] < n)
    if tl.program_id(1) == 0:
        tl.store(weights + at, total, mask=rows - first < n)


def row_log_sums(
    parts: Tensor, half_norms: Tensor, labels: Tensor, first: int, rows: int, width: int
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the logits of each row: over its targets, and over the others.

    Parameters
    ----------
    parts, half_norms
        What `affnb.kernels.pairs.split` makes of the features of all items, ``(N, d)``.
    labels
        Integers, contiguous, shape ``(N,)``.
    first, rows
        The items that are rows: ``first`` and those after it. All items are columns.
    width
        ``d``.

    Returns
    -------
    tuple of Tensor
        Two of shape ``(pieces, rows)``: the columns are summed in one piece or several. ``-inf`` where
        there is nothing to sum.
    """
    count = len(labels)
    pieces, length = pieces_of_columns(triton.cdiv(rows, 64), count, parts.device)
    inside, outside = half_norms.new_empty(2, pieces, rows).unbind()
    if rows:
        with torch.cuda.device_of(parts):
            _forward[lambda meta: (triton.cdiv(rows, meta["BLOCK_M"]), pieces)](
                parts, half_norms, labels, inside, outside, first, rows, count, length,
                parts[0].numel(), rounded_size(rows, count), PARTS=len(parts), **layout(width),
            )  # fmt: skip
    return inside, outside


def pull(
    centred: Tensor, parts: Tensor, half_norms: Tensor, labels: Tensor, first: int, log_sums: Tensor
) -> Tensor:
    r"""Half the gradient of ``log_sums[0] - log_sums[1]``, as sums over all pairs, in the rows.

    ``sum_n G_mn (f_n - f_m)`` with :math:`G_{mn}` the share of a pair in its sum, negative for the
    others. ``centred`` has the rows' features (contiguous, float32), ``log_sums`` the two totals; the
    rest as for `row_log_sums`.
    """
    (rows, width), count, shape = centred.shape, len(labels), layout(centred.shape[1])
    wide = shape["WIDTH"] // shape["BLOCK_D"]
    pieces, length = pieces_of_columns(triton.cdiv(rows, 64) * wide, count, parts.device)
    pulled = centred.new_empty((pieces, rows, shape["WIDTH"]))  # whole tiles are written faster
    weights = centred.new_empty((pieces, rows))
    if rows:
        with torch.cuda.device_of(parts):
            _backward[lambda meta: (triton.cdiv(rows, meta["BLOCK_M"]), wide, pieces)](
                parts, half_norms, labels, log_sums, pulled, weights, first, rows, count, length,
                parts[0].numel(), rounded_size(rows, count), PARTS=len(parts), **shape,
            )  # fmt: skip
    pulled, weights = add_pieces(pulled), add_pieces(weights)
    return pulled[:, :width].addcmul_(weights[:, None], centred, value=-1)

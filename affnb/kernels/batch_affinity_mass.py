"""Streamed affinity mass of a batch: log-sum-exps of targets and of others, and their gradient.

The logits are ``-||f_m - f_n||^2 / 2`` of all ordered pairs of a row and another column. No matrix of
pairs is stored: the forward pass leaves two numbers a row, the backward pass makes each tile again.
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

__all__ = ["pull", "row_log_sums"]


@triton.jit
def _tile(
    x, y, x_norms, y_norms, x_labels, y_labels, own, rows, columns, n, m, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of a tile, which of them are targets, and which exist."""
    products = tile_of_products(
        x, y, rows, columns, n, m, width, width, width, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
    )
    left = tl.load(x_norms + rows, mask=rows < n, other=0.0)
    right = tl.load(y_norms + columns, mask=columns < m, other=0.0)
    # Rounding can make a squared distance negative.
    logits = tl.minimum(products - left[:, None] - right[None, :], 0.0)
    left_labels = tl.load(x_labels + rows, mask=rows < n, other=0)
    right_labels = tl.load(y_labels + columns, mask=columns < m, other=0)
    own_columns = tl.load(own + rows, mask=rows < n, other=-1)
    same = left_labels[:, None] == right_labels[None, :]
    exists = (
        (rows[:, None] < n) & (columns[None, :] < m) & (columns[None, :] != own_columns[:, None])
    )
    return logits, same, exists


@triton.autotune(configurations(), key=["n", "m", "width"])
@triton.jit
def _forward(
    x, y, x_norms, y_norms, x_labels, y_labels, own, inside, outside, n, m, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    top_in = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    top_out = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sum_in = tl.zeros((BLOCK_M,), tl.float32)
    sum_out = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, m, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        logits, same, exists = _tile(
            x, y, x_norms, y_norms, x_labels, y_labels, own, rows, columns, n, m, width,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        targets = tl.where(same & exists, logits, float("-inf"))
        others = tl.where((same == 0) & exists, logits, float("-inf"))
        top_in, sum_in = add_to_running_sum(top_in, sum_in, targets)
        top_out, sum_out = add_to_running_sum(top_out, sum_out, others)
    tl.store(inside + rows, log_of_sum(top_in, sum_in), mask=rows < n)
    tl.store(outside + rows, log_of_sum(top_out, sum_out), mask=rows < n)


@triton.autotune(configurations(), key=["n", "m", "width"])
@triton.jit
def _backward(
    x, y, x_norms, y_norms, x_labels, y_labels, own, log_sums, pulled, weights, n, m, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    coordinates = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    log_in = tl.load(log_sums)
    log_out = tl.load(log_sums + 1)
    points = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, m, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        logits, same, exists = _tile(
            x, y, x_norms, y_norms, x_labels, y_labels, own, rows, columns, n, m, width,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        share = tl.exp(logits - tl.where(same, log_in, log_out))
        slopes = tl.where(exists, tl.where(same, share, -share), 0.0)
        there = load_rows(y, columns, coordinates, m, width, width)
        points += tl.dot(slopes, there, input_precision=PRECISION)
        total += tl.sum(slopes, 1)
    inside = (rows[:, None] < n) & (coordinates[None, :] < width)
    at = rows[:, None].to(tl.int64) * width + coordinates[None, :]
    tl.store(pulled + at, points, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(weights + rows, total, mask=rows < n)


def _half_norms(x: Tensor) -> Tensor:
    return x.square().sum(1) / 2


def row_log_sums(
    x: Tensor, y: Tensor, x_labels: Tensor, y_labels: Tensor, own: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the logits of each row: over its targets, and over the others.

    Parameters
    ----------
    x, y
        float32, contiguous, shapes ``(n, d)`` and ``(m, d)``: rows and columns.
    x_labels, y_labels
        int64, shapes ``(n,)`` and ``(m,)``.
    own
        int64, shape ``(n,)``: the column that holds the same item as the row, left out.

    Returns
    -------
    tuple of Tensor
        Two of shape ``(n,)``, ``-inf`` where there is nothing to sum.
    """
    (n, width), m = x.shape, len(y)
    inside, outside = x.new_empty(2, n).unbind()
    if n:
        _forward[lambda meta: (triton.cdiv(n, meta["BLOCK_M"]),)](
            x, y, _half_norms(x), _half_norms(y), x_labels, y_labels, own, inside, outside,
            n, m, width, PRECISION=dot_precision(),
        )  # fmt: skip
    return inside, outside


def pull(
    x: Tensor, y: Tensor, x_labels: Tensor, y_labels: Tensor, own: Tensor, log_sums: Tensor
) -> Tensor:
    r"""Gradient of ``log_sums[0] - log_sums[1]``, as sums over all pairs, with respect to ``x``.

    ``2 sum_n G_mn (f_n - f_m)`` with :math:`G_{mn}` the share of a pair in its sum, negative for the
    others. Arguments as for `row_log_sums`; ``log_sums`` has the two totals.
    """
    (n, width), m = x.shape, len(y)
    pulled, weights = torch.empty_like(x), x.new_zeros(n)
    block = min(128, max(16, triton.next_power_of_2(width)))
    if x.numel():
        _backward[lambda meta: (triton.cdiv(n, meta["BLOCK_M"]), triton.cdiv(width, block))](
            x, y, _half_norms(x), _half_norms(y), x_labels, y_labels, own, log_sums, pulled, weights,
            n, m, width, PRECISION=dot_precision(), BLOCK_D=block,
        )  # fmt: skip
    return pulled.sub_(weights[:, None] * x).mul_(2)

"""What the kernels over all pairs of rows share: one tile of inner products, one running log-sum-exp.

Imported only where Triton is (see `affnb.kernels.triton_available`). A kernel over pairs visits the
matrix tile by tile and keeps a few numbers a row, so its memory is that of its inputs.
"""

# Triton reads the annotations of a kernel's arguments, so they cannot be postponed to strings here.

import os

import torch
import triton
import triton.language as tl

__all__ = [
    "add_to_running_sum",
    "configurations",
    "dot_precision",
    "load_rows",
    "log_of_sum",
    "tile_of_products",
]


@triton.jit
def load_rows(pointer, rows, columns, count, width, stride):
    """Load ``x[rows, columns]`` of a matrix with contiguous rows; 0 outside of it."""
    inside = (rows[:, None] < count) & (columns[None, :] < width)
    at = rows[:, None].to(tl.int64) * stride + columns[None, :]  # more than 2**31 entries are legal
    return tl.load(pointer + at, mask=inside, other=0.0)


@triton.jit
def tile_of_products(
    x,
    y,
    rows,
    columns,
    x_count,
    y_count,
    width,
    x_stride,
    y_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``x[rows] @ y[columns].T``, float32, shape ``(BLOCK_M, BLOCK_N)``."""
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        left = load_rows(x, rows, at, x_count, width, x_stride)
        right = load_rows(y, columns, at, y_count, width, y_stride)
        products += tl.dot(left, tl.trans(right), input_precision=PRECISION)
    return products


@triton.jit
def log_of_sum(top, total):
    """``log(total * exp(top))``, and ``-inf`` for a sum over nothing."""
    return tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))


@triton.jit
def add_to_running_sum(top, total, tile):
    """Take a tile of logits into ``sum exp`` of each row, kept as ``total * exp(top)``.

    Rows that have seen nothing but ``-inf`` keep ``top = -inf`` and ``total = 0``.
    """
    higher = tl.maximum(top, tl.max(tile, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)  # -inf minus -inf is no number
    total = total * tl.exp(top - shift) + tl.sum(tl.exp(tile - shift[:, None]), 1)
    return higher, total


def dot_precision() -> str:
    """How the products of float32 matrices are rounded: as PyTorch is set to round them."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def configurations() -> list[triton.Config]:
    """List the few tile shapes among which the autotuner chooses.

    Triton's interpreter cannot time anything: there it is one, small enough that tests cross the
    borders of tiles.
    """
    shapes = [(64, 64, 32, 4, 3), (128, 64, 32, 4, 3), (128, 128, 32, 8, 3), (64, 128, 64, 8, 2)]
    if os.environ.get("TRITON_INTERPRET") == "1":
        shapes = [(32, 16, 16, 4, 1)]
    return [
        triton.Config(
            {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages
        )
        for m, n, k, warps, stages in shapes
    ]

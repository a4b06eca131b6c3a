"""What the kernels over all pairs of rows share: tiles of products, and running sums of exponentials.

Imported only where Triton is (see `affnb.kernels.triton_available`). A kernel over pairs visits the
matrix tile by tile and keeps a few numbers a row, so its memory is that of its inputs.

The products run on the matrix units, which are fastest in bfloat16. A number is therefore written as
a sum of bfloat16 parts (`split`), each of which holds 8 of its bits: float32 is three, and its product
six exact products of parts, summed in float32. What is left out is below float32's own rounding.
"""

# Triton reads the annotations of a kernel's arguments, so they cannot be postponed to strings here.

import math
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "LOG2_E",
    "add_pieces",
    "add_product",
    "add_to_running_sum",
    "as_parts",
    "configurations",
    "layout",
    "load_parts",
    "log_of_sum",
    "number_of_parts",
    "pieces_of_columns",
    "rounded_size",
    "split",
    "split_tile",
    "that_fit",
    "tile_of_products",
]

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter multiplies the bits of bfloat16 as integers, so it gets the same numbers in float32.
_PART = torch.float32 if _INTERPRETED else torch.bfloat16

_HELD = 256  # the widest rows that a program holds as a whole
_SHARED_BYTES = 220 * 2**10  # of the 227 KiB of a block on Hopper; the rest is the compiler's

LOG2_E = tl.constexpr(1.4426950408889634)  # the machine's exponential is that of base 2
BLOCK_K = tl.constexpr(64)  # coordinates at a time, of rows that are too wide to be held


# --------------------------------------------------------------------------------------------------
# Numbers as sums of bfloat16
# --------------------------------------------------------------------------------------------------


def number_of_parts(dtype: torch.dtype) -> int:
    """Into how many bfloat16 numbers one of this dtype is split for a product.

    bfloat16 is one, and float16 two, without a loss. For float32 it is what
    ``torch.set_float32_matmul_precision`` asks for, in that function's own terms: ``"highest"``
    (PyTorch's default) is three, which hold all 24 bits, so products are as exact as float32;
    ``"high"`` is two, 16 bits; ``"medium"`` is one, 8 bits.
    """
    if dtype != torch.float32:
        return {torch.bfloat16: 1, torch.float16: 2}[dtype]
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the newer name, which the older one refuses to read
        precision = "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"
    return {"highest": 3, "high": 2, "medium": 1}[precision]


def layout(width: int) -> dict[str, int]:
    """Length of the rows that `split` writes, and how many coordinates a program holds at once."""
    if width <= _HELD:
        padded = max(16, triton.next_power_of_2(width))
        return {"WIDTH": padded, "BLOCK_D": padded}
    return {"WIDTH": triton.cdiv(width, 128) * 128, "BLOCK_D": 128}


@triton.jit
def _split(
    x, parts, half_norms, count, width, step,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    norms = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        here = rows[:, None].to(tl.int64)
        inside = (rows[:, None] < count) & (columns[None, :] < width)
        value = tl.load(x + here * width + columns[None, :], mask=inside, other=0.0)
        value = value.to(tl.float32)
        rest = value
        to = parts + here * WIDTH + columns[None, :]
        for _ in tl.static_range(PARTS):
            part = rest.to(tl.bfloat16)
            tl.store(to, part.to(parts.dtype.element_ty), mask=rows[:, None] < count)
            rest -= part.to(tl.float32)
            to += step
        norms += tl.sum((value - rest) * (value - rest), 1)
    tl.store(half_norms + rows, norms / 2, mask=rows < count)


def split(x: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Write each number of the rows of ``x`` (contiguous, float) as a sum of bfloat16 numbers.

    Returns
    -------
    tuple of Tensor
        The parts, shape ``(parts, *x.shape)`` but for zeros at the end of each row (see `layout`),
        and half the squared norm of each row, as it is in these parts.
    """
    *sizes, width = x.shape
    count, padded = math.prod(sizes), layout(width)["WIDTH"]
    whole = x.new_empty((parts, *sizes, padded), dtype=_PART)
    half_norms = x.new_empty(sizes, dtype=torch.float32)
    if count:
        block = min(padded, 128)
        height = 4096 // block
        with torch.cuda.device_of(x):
            _split[(triton.cdiv(count, height),)](
                x, whole, half_norms, count, width, count * padded,
                WIDTH=padded, PARTS=parts, BLOCK_M=height, BLOCK=block,
            )  # fmt: skip
    return whole, half_norms


def as_parts(x: Tensor) -> Tensor:
    """Parts of ``x`` (any strides) that hold what its dtype asks for, or ``x`` if it is one already."""
    width = x.shape[-1]
    if x.dtype == torch.bfloat16 == _PART and layout(width)["WIDTH"] == width:
        return x.contiguous()[None]
    return split(x.contiguous(), number_of_parts(x.dtype))[0]


@triton.jit
def split_tile(x, like):
    """Parts of a tile that a program has made, in the dtype of the parts it has loaded."""
    first = x.to(tl.bfloat16)
    rest = x - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    third = (rest - second.to(tl.float32)).to(tl.bfloat16)
    return first.to(like.dtype), second.to(like.dtype), third.to(like.dtype)


@triton.jit
def load_parts(
    x, start, coordinates, count, step,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Load the parts of a block of rows of ``x``, 0 beyond the last; ``step`` leads to the next part.

    Three tiles; those beyond the number of parts mean nothing.
    """
    within = tl.arange(0, BLOCK)
    there = (start + within < count)[:, None]
    # 64 bits for the block (more than 2**31 entries are legal); within it, few known numbers.
    at = x + tl.cast(start, tl.int64) * WIDTH + (within[:, None] * WIDTH + coordinates[None, :])
    first = tl.load(at, mask=there, other=0.0)
    second, third = first, first
    if PARTS > 1:
        second = tl.load(at + step, mask=there, other=0.0)
    if PARTS > 2:
        third = tl.load(at + step + step, mask=there, other=0.0)
    return first, second, third


@triton.jit
def add_product(x1, x2, x3, y1, y2, y3, total, PARTS: tl.constexpr):
    """``total + x @ y`` of numbers in parts, the small products first.

    Of three parts, the products of a second and a third are left out: they are 2**-24 of the whole.
    """
    if PARTS > 2:
        total = tl.dot(x1, y3, total)
        total = tl.dot(x3, y1, total)
    if PARTS > 1:
        total = tl.dot(x2, y2, total)
        total = tl.dot(x1, y2, total)
        total = tl.dot(x2, y1, total)
    return tl.dot(x1, y1, total)


# --------------------------------------------------------------------------------------------------
# Tiles of the matrix of pairs
# --------------------------------------------------------------------------------------------------


@triton.jit
def tile_of_products(
    x, y, x1, x2, x3, row, column, coordinates, x_count, y_count, x_step, y_step,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``x @ y.T`` of the blocks that begin at a row of each, and the ``coordinates`` of that of y.

    Float32, and parts. Where the coordinates are all there are, ``x1, x2, x3`` are the parts of the
    block of x, which stay for the whole sweep; wider rows are loaded piece by piece.
    """
    y1, y2, y3 = load_parts(y, column, coordinates, y_count, y_step, BLOCK_N, WIDTH, PARTS)
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if BLOCK_D == WIDTH:
        products = add_product(
            x1, x2, x3, tl.trans(y1), tl.trans(y2), tl.trans(y3), products, PARTS
        )
    else:
        for start in range(0, WIDTH, BLOCK_K):
            at = start + tl.arange(0, BLOCK_K)
            a1, a2, a3 = load_parts(x, row, at, x_count, x_step, BLOCK_M, WIDTH, PARTS)
            b1, b2, b3 = load_parts(y, column, at, y_count, y_step, BLOCK_N, WIDTH, PARTS)
            products = add_product(
                a1, a2, a3, tl.trans(b1), tl.trans(b2), tl.trans(b3), products, PARTS
            )
    return products, y1, y2, y3


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
    kept = total * tl.exp2((top - shift) * LOG2_E)
    return higher, kept + tl.sum(tl.exp2((tile - shift[:, None]) * LOG2_E), 1)


# --------------------------------------------------------------------------------------------------
# Shapes of tiles
# --------------------------------------------------------------------------------------------------


def configurations() -> list[triton.Config]:
    """List the few tile shapes among which the autotuner chooses.

    Triton's interpreter cannot time anything: there it is one, small enough that tests cross the
    borders of tiles.
    """
    shapes = [(64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (128, 64, 8, 2)]
    if _INTERPRETED:
        shapes = [(32, 16, 4, 1)]
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
        for m, n, warps, stages in shapes
    ]


def that_fit(
    candidates: list[triton.Config], arguments: dict[str, Any], **constants: Any
) -> list[triton.Config]:
    """Configurations whose tiles fit into shared memory: the rows once, the columns for each stage."""
    known = {**arguments, **constants}
    a_row = 2 * known["PARTS"] * known["BLOCK_D"]
    return [
        c
        for c in candidates
        if a_row * (c.kwargs["BLOCK_M"] + c.num_stages * c.kwargs["BLOCK_N"]) <= _SHARED_BYTES
    ]


def pieces_of_columns(programs: int, columns: int, device: torch.device) -> tuple[int, int]:
    """Number and length of the pieces of the sweep that run side by side, their results added after.

    Few rows make few programs, which leave most of a GPU idle; many rows are swept in one piece. The
    length is a whole number of tiles. ``programs`` counts blocks of 64 rows.
    """
    if _INTERPRETED:
        tile, least, at_once = 16, 32, 8
    else:
        tile, least = 128, 256
        at_once = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    pieces = max(1, min(at_once // max(1, programs), columns // least))
    length = max(1, triton.cdiv(triton.cdiv(columns, pieces), tile)) * tile
    return max(1, triton.cdiv(columns, length)), length


def add_pieces(x: Tensor) -> Tensor:
    """Sum over the pieces, in the first axis, without a copy of a single one."""
    return x[0] if len(x) == 1 else x.sum(0)


def rounded_size(rows: int, columns: int) -> int:
    """What the autotuner remembers of a size: powers of two, so that no new batch is tried again."""
    return 64 * rows.bit_length() + columns.bit_length()

"""What the kernels over images and over rows of scores share: their tiles, and how these are chosen.

Imported only where Triton is (see `affnb.kernels.triton_available`). A tile is a block of numbers that
a program has in its registers at once, say some channels of a run of pixels.
"""

# Triton reads the annotations of a kernel's arguments, so they cannot be postponed to strings here.

import os

import triton
import triton.language as tl

__all__ = ["block_of_classes", "configurations", "planes", "rounded", "run_of_pixels"]


@triton.jit
def run_of_pixels(run, size, P: tl.constexpr):
    """Pixels of the ``run``-th run of an image of ``size`` pixels, and which of them exist."""
    pixels = run * P + tl.arange(0, P)
    return pixels, pixels < size


@triton.jit
def planes(pointer, channels, size):
    """Pointers ``(C, 1)`` to where channels of an image begin; in 64 bits, so of images of any size.

    They do not change inside a loop over neighbours, which then adds a pixel and nothing else.
    """
    return pointer + (channels.to(tl.int64) * size)[:, None]


def rounded(count: int) -> int:
    """Size as the autotuner sees it: it should not measure anew for every batch."""
    return max(16, int(triton.next_power_of_2(count)))


def block_of_classes(classes: int) -> int:
    """Power of two that the classes fit in; not less than 16, so that a thread has few pixels."""
    return max(16, int(triton.next_power_of_2(classes)))


def configurations(*choices: tuple[int, int], small: int = 512) -> list[triton.Config]:
    """Sizes of a tile, each with the warps that share it, among which the autotuner chooses.

    Triton's interpreter cannot time anything: there it is one, ``small`` enough that tests cross the
    borders of tiles.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        choices = ((small, 4),)
    return [triton.Config({"TILE": tile}, num_warps=warps, num_stages=2) for tile, warps in choices]

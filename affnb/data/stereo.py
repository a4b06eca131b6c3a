"""Pairs of images with known matches: scikit-image's real stereo pair, and photographs that were warped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_at_least

__all__ = ["StereoPair", "WarpedPairs", "motorcycle_stereo", "warped_photographs"]

#: Photographs that come with scikit-image (the stereo pair is not among them).
_PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "immunohistochemistry")


class StereoPair(NamedTuple):
    """A rectified stereo pair with the disparity of the left image.

    Attributes
    ----------
    left, right
        (3, h, w) float32 in [0, 1].
    disparity
        (h, w) float32, in pixels: the pixel (i, j) of the left image is (i, j - disparity) of the right
        one. 0 where it is not known.
    valid
        (h, w) bool: where it is known.
    """

    left: Tensor
    right: Tensor
    disparity: Tensor
    valid: Tensor


@cache
def motorcycle_stereo(factor: int = 4) -> StereoPair:
    """Load scikit-image's motorcycle (Scharstein et al., 2014), reduced by a whole factor.

    Parameters
    ----------
    factor
        By how much to reduce the 500 x 741 pixels, by averaging squares. Default 4: 125 x 185 pixels
        with disparities of 1.8 to 15. A disparity is known where three quarters of a square are.

    Raises
    ------
    ValueError
        ``factor`` below 1.

    Examples
    --------
    >>> pair = motorcycle_stereo()
    >>> pair.left.shape, pair.valid.float().mean() > 0.9
    (torch.Size([3, 125, 185]), tensor(True))
    """
    from skimage.data import stereo_motorcycle

    check_at_least(factor, "factor", 1)
    arrays = stereo_motorcycle()  # type: ignore[no-untyped-call]
    left, right, disparity = (torch.from_numpy(x.copy()).float() for x in arrays)
    left, right = (F.avg_pool2d(x.movedim(-1, 0)[None] / 255, factor)[0] for x in (left, right))
    known = torch.isfinite(disparity)
    share = F.avg_pool2d(known.float()[None], factor)[0]
    mean = F.avg_pool2d(torch.where(known, disparity, 0.0)[None], factor)[0]
    valid = share >= 0.75
    disparity = torch.where(valid, mean / share.clamp(min=0.75) / factor, 0.0)
    return StereoPair(left, right, disparity, valid)


class WarpedPairs(NamedTuple):
    """Pairs of images related by a known smooth flow.

    Attributes
    ----------
    first, second
        (B, 3, h, w) float32 in [0, 1].
    flow
        (B, 2, h, w) float32, in pixels, (right, down): what is at a pixel of the first image is that
        much further in the second (and may lie outside).
    """

    first: Tensor
    second: Tensor
    flow: Tensor


@cache
def _photograph(name: str, height: int) -> Tensor:
    import skimage.data

    image = (
        torch.from_numpy(getattr(skimage.data, name)().copy()).float().movedim(-1, 0)[None] / 255
    )
    width = round(height * image.shape[3] / image.shape[2])
    return F.interpolate(image, size=(height, width), mode="area")[0]


def warped_photographs(
    batch: int,
    *,
    size: tuple[int, int] = (48, 80),
    reach: Sequence[float] = (7.0, 0.0),
    height: int = 160,
    generator: torch.Generator | None = None,
) -> WarpedPairs:
    """Cut pairs from five photographs of scikit-image, the first of each warped by a random flow.

    Parameters
    ----------
    batch
        Number of pairs.
    size
        Rows and columns of an image, smaller than the photographs after reduction.
    reach
        Largest flow in pixels, (right, down). Default (7, 0): a stereo pair. The flow is that of a
        4 x 5 grid of uniform numbers, interpolated (bicubic).
    height
        To which height the photographs are reduced first. Default 160.
    generator
        Source of randomness; PyTorch's global one by default.

    Raises
    ------
    ValueError
        A negative batch or reach, a size below 2 or beyond the photographs.

    Examples
    --------
    >>> pairs = warped_photographs(2, generator=torch.Generator().manual_seed(0))
    >>> pairs.first.shape, pairs.flow.abs().amax() <= 7
    (torch.Size([2, 3, 48, 80]), tensor(True))
    """
    check_at_least(batch, "batch", 0)
    check_at_least(height, "height", 2)
    for value in reach:
        check_at_least(value, "reach", 0)
    photographs = [_photograph(name, height) for name in _PHOTOGRAPHS]
    h, w = size
    largest = min(p.shape[1] for p in photographs), min(p.shape[2] for p in photographs)
    if not (2 <= h <= largest[0] and 2 <= w <= largest[1]):
        raise ValueError(f"size: expected at least 2 x 2 and at most {largest}, got {tuple(size)}")
    first, second, flows = [], [], []
    limit = torch.tensor(list(reach)).view(2, 1, 1)
    for _ in range(batch):
        p = photographs[int(torch.randint(len(photographs), (), generator=generator))]
        y = int(torch.randint(p.shape[1] - h + 1, (), generator=generator))
        x = int(torch.randint(p.shape[2] - w + 1, (), generator=generator))
        coarse = (2 * torch.rand(2, 4, 5, generator=generator) - 1) * limit
        flow = F.interpolate(coarse[None], size=(h, w), mode="bicubic", align_corners=True)[0]
        flow = torch.minimum(torch.maximum(flow, -limit), limit)
        rows, columns = torch.meshgrid(torch.arange(h) + y, torch.arange(w) + x, indexing="ij")
        # The first image shows at a pixel what the second has at the pixel plus the flow.
        at = torch.stack([columns + flow[0], rows + flow[1]], -1)
        at = 2 * at / torch.tensor([p.shape[2] - 1.0, p.shape[1] - 1.0]) - 1
        warped = F.grid_sample(
            p[None], at[None], mode="bicubic", padding_mode="border", align_corners=True
        )
        first.append(warped[0].clamp(0, 1))
        second.append(p[:, y : y + h, x : x + w])
        flows.append(flow)
    if not first:
        return WarpedPairs(*(torch.zeros(0, c, h, w) for c in (3, 3, 2)))
    return WarpedPairs(torch.stack(first), torch.stack(second), torch.stack(flows))

"""Procedural images whose regions are easy to see and hard to name."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_at_least, check_between

__all__ = ["SpeckledRegions", "speckled_regions"]

#: The brightest region's grey level; a speckle adds 1 to one channel.
_BRIGHTEST = 1.2


class SpeckledRegions(NamedTuple):
    """Images with their label maps.

    Attributes
    ----------
    images
        (B, C, H, W) float32, one channel a class: the grey level of the region, noise, and a speckle
        (+1 in one channel) on a few pixels.
    labels
        (B, H, W) int64 in [0, C).
    """

    images: Tensor
    labels: Tensor


def speckled_regions(
    batch: int,
    *,
    size: int = 32,
    regions: int = 5,
    num_classes: int = 3,
    speckles: float = 0.06,
    wrong: float = 0.3,
    noise: float = 0.1,
    generator: torch.Generator | None = None,
) -> SpeckledRegions:
    """Draw images cut into regions, of which only sparse speckles tell the class.

    The regions of an image are the cells of random points (each pixel belongs to the nearest). Each
    region has a class, and a grey level of its own which says nothing about the class. A share of the
    pixels carries a speckle in the colour of the class, and some speckles lie. So where a region ends
    can be seen locally, while what it is must be gathered from afar.

    Parameters
    ----------
    batch
        Number of images B.
    size
        Side H = W in pixels, at least 8. Default 32.
    regions
        Regions an image, at least 2; neighbours may share a class. Their grey levels are evenly spaced.
    num_classes
        Number of classes C, and of channels, at least 2.
    speckles, wrong
        Share of pixels with a speckle, and share of speckles whose colour is drawn at random; in [0, 1].
    noise
        Standard deviation of the white noise.
    generator
        Source of randomness; PyTorch's global one by default.

    Returns
    -------
    SpeckledRegions

    Raises
    ------
    ValueError
        A number outside the ranges above.

    Examples
    --------
    >>> scenes = speckled_regions(2, generator=torch.Generator().manual_seed(0))
    >>> scenes.images.shape, scenes.labels.shape, scenes.labels.unique().tolist()
    (torch.Size([2, 3, 32, 32]), torch.Size([2, 32, 32]), [0, 1, 2])
    """
    for name, value, least in (("batch", batch, 1), ("size", size, 8), ("regions", regions, 2),
                               ("num_classes", num_classes, 2)):  # fmt: skip
        check_at_least(value, name, least)
    for name, share in (("speckles", speckles), ("wrong", wrong)):
        check_between(share, name, 0, 1)
    check_at_least(noise, "noise", 0)

    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    points = size * torch.rand(batch, regions, 2, 1, 1, generator=generator)
    distance = torch.hypot(y - points[:, :, 0], x - points[:, :, 1])
    owner = distance.min(1).indices.flatten(1)  # on a CPU many times faster here than `argmin`
    classes = torch.randint(num_classes, (batch, regions), generator=generator)
    levels = torch.rand(batch, regions, generator=generator).argsort(1) / (regions - 1)
    labels = classes.gather(1, owner).view(batch, size, size)
    images = _BRIGHTEST * levels.gather(1, owner).view(batch, 1, size, size)

    lies = torch.rand(labels.shape, generator=generator) < wrong
    any_class = torch.randint(num_classes, labels.shape, generator=generator)
    colour = F.one_hot(torch.where(lies, any_class, labels), num_classes).movedim(-1, 1)
    seen = torch.rand(labels.shape, generator=generator) < speckles
    images = images + colour * seen[:, None]
    images = images + noise * torch.randn(images.shape, generator=generator)
    return SpeckledRegions(images, labels)

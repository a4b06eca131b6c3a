"""Procedural images for segmentation: thick discs and thin wheels, with exact label maps."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_at_least

__all__ = ["ShapeScenes", "shape_scenes"]

#: Grey levels of background, disc and wheel before noise: the two shapes differ less in grey than both
#: differ from the background, so structure has to tell them apart.
_LEVELS = (0.0, 0.8, 1.1)


class ShapeScenes(NamedTuple):
    """Images with their label maps.

    Attributes
    ----------
    images
        (B, 1, H, W) float32: a grey level for each class, a random offset of the image, noise.
    labels
        (B, H, W) int64: 0 background, 1 disc, 2 wheel (a thin ring with three diameters).
    """

    images: Tensor
    labels: Tensor


def shape_scenes(
    batch: int,
    *,
    size: int = 40,
    discs: int = 2,
    wheels: int = 2,
    noise: float = 0.55,
    generator: torch.Generator | None = None,
) -> ShapeScenes:
    """Draw images of discs (thick) and wheels (one pixel thin) on a plain background.

    Shapes have a radius of 4 to 7 pixels and lie wholly inside the image; a later one covers an earlier
    one. Discs come first, so a wheel may lie upon a disc.

    Parameters
    ----------
    batch
        Number of images B.
    size
        Side H = W in pixels, at least 16. Default 40.
    discs, wheels
        How many of each an image has.
    noise
        Standard deviation of the white noise; the image's offset is uniform in [-0.2, 0.2].
    generator
        Source of randomness; PyTorch's global one by default.

    Returns
    -------
    ShapeScenes

    Raises
    ------
    ValueError
        A size below 16, a negative count or noise, a batch below 1.

    Examples
    --------
    >>> scenes = shape_scenes(2, generator=torch.Generator().manual_seed(0))
    >>> scenes.images.shape, scenes.labels.unique().tolist()
    (torch.Size([2, 1, 40, 40]), [0, 1, 2])
    """
    check_at_least(batch, "batch", 1)
    check_at_least(size, "size", 16)
    for name, count in (("discs", discs), ("wheels", wheels), ("noise", noise)):
        check_at_least(count, name, 0)

    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    labels = torch.zeros(batch, size, size, dtype=torch.int64)
    for shape in range(discs + wheels):
        radius = 4 + 3 * torch.rand(batch, 1, 1, generator=generator)
        room = size - 1 - 2 * radius
        cy = radius + room * torch.rand(batch, 1, 1, generator=generator)
        cx = radius + room * torch.rand(batch, 1, 1, generator=generator)
        turn = math.pi * torch.rand(batch, 1, 1, generator=generator)
        distance = torch.hypot(y - cy, x - cx)
        inside = distance <= radius
        if shape < discs:
            labels[inside] = 1
            continue
        wheel = (distance - radius).abs() <= 0.5
        for spoke in range(3):
            angle = turn + spoke * math.pi / 3
            across = ((x - cx) * torch.sin(angle) - (y - cy) * torch.cos(angle)).abs()
            wheel |= (across <= 0.5) & inside
        labels[wheel] = 2

    images = torch.tensor(_LEVELS)[labels]
    images += 0.4 * torch.rand(batch, 1, 1, generator=generator) - 0.2
    images += noise * torch.randn(batch, size, size, generator=generator)
    return ShapeScenes(images[:, None], labels)

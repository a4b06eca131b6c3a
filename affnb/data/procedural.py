"""Procedural data whose ground truth is known exactly."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_at_least

__all__ = ["RelationScenes", "relation_scenes"]


class RelationScenes(NamedTuple):
    """A batch of scenes: proposals (boxes with features) around a few ground-truth objects.

    Attributes
    ----------
    features
        (B, N, D + 4) float32: a noisy class prototype of D numbers, then the box in units of the image
        (centre x, centre y, width, height).
    boxes
        (B, N, 4) float32, proposals as x1, y1, x2, y2 in [0, 1] of the image's side.
    labels
        (B, N) int64, the class of each proposal's object; ``num_classes`` means background.
    gt_boxes
        (B, G, 4) float32, the objects.
    gt_labels
        (B, G) int64 in [0, num_classes).
    assign
        (B, N, G) bool, whether the proposal was made by jittering that object's box.
    """

    features: Tensor
    boxes: Tensor
    labels: Tensor
    gt_boxes: Tensor
    gt_labels: Tensor
    assign: Tensor


def _corners(centre: Tensor, size: Tensor) -> Tensor:
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def relation_scenes(
    batch: int,
    *,
    objects: int = 4,
    proposals: int = 4,
    background: int = 8,
    num_classes: int = 6,
    feature_dim: int = 16,
    noise: float = 0.7,
    prototype_seed: int = 0,
    generator: torch.Generator | None = None,
) -> RelationScenes:
    """Draw scenes in which a detector proposes several jittered boxes for each object.

    Objects and their proposals stand in distinct cells of a 3 x 3 grid, so that boxes of two objects
    never overlap, while a proposal overlaps its own object with an intersection over union of more than
    0.7. Background proposals lie anywhere, but are so small that they overlap every object with less
    than 0.5; their features are pure noise.

    Parameters
    ----------
    batch
        Number of scenes B.
    objects, proposals, background
        Objects a scene (at most 9), proposals an object, background proposals a scene; N is
        ``objects * proposals + background``.
    num_classes, feature_dim, noise
        Number of classes; D, the prototypes' length; the standard deviation of the noise on features
        (prototypes have unit variance in each coordinate).
    prototype_seed
        Seed of the class prototypes, which all scenes share.
    generator
        Source of everything else; PyTorch's global one by default.

    Returns
    -------
    RelationScenes

    Raises
    ------
    ValueError
        A count below 1 (``background`` below 0), more than 9 objects, negative noise.

    Examples
    --------
    >>> scenes = relation_scenes(2, generator=torch.Generator().manual_seed(0))
    >>> scenes.features.shape, scenes.assign.sum(1).tolist()
    (torch.Size([2, 24, 20]), [[4, 4, 4, 4], [4, 4, 4, 4]])
    """
    for name, value in (("batch", batch), ("objects", objects), ("proposals", proposals),
                        ("num_classes", num_classes), ("feature_dim", feature_dim)):  # fmt: skip
        check_at_least(value, name, 1)
    check_at_least(background, "background", 0)
    check_at_least(noise, "noise", 0)
    if objects > 9:
        raise ValueError(f"objects: expected at most 9 (one a grid cell), got {objects}")

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    prototypes = torch.randn(
        num_classes, feature_dim, generator=torch.Generator().manual_seed(prototype_seed)
    )
    cells = torch.rand(batch, 9, generator=generator).argsort(-1)[:, :objects]
    corner = torch.stack([cells % 3, cells // 3], dim=-1) / 3
    centre = corner + uniform(batch, objects, 2, low=0.15, high=0.18)
    size = uniform(batch, objects, 2, low=0.16, high=0.24)
    gt_labels = torch.randint(num_classes, (batch, objects), generator=generator)

    # A shift of at most 8 % of the side and a scale within 8 % keep the IoU above 0.72, and keep a
    # proposal inside its object's cell.
    shift = uniform(batch, objects, proposals, 2, low=-0.08, high=0.08)
    scale = uniform(batch, objects, proposals, 2, low=0.92, high=1.08)
    near = (centre[:, :, None] + shift * size[:, :, None]).flatten(1, 2)
    near_size = (scale * size[:, :, None]).flatten(1, 2)
    # At most 0.11 x 0.11 inside at least 0.16 x 0.16: an IoU below 0.48 wherever it falls.
    far = uniform(batch, background, 2, low=0.1, high=0.9)
    far_size = uniform(batch, background, 2, low=0.05, high=0.11)
    centres, sizes = torch.cat([near, far], 1), torch.cat([near_size, far_size], 1)

    count = objects * proposals
    owner = torch.arange(objects).repeat_interleave(proposals)
    assign = torch.zeros(batch, count + background, objects, dtype=torch.bool)
    assign[:, torch.arange(count), owner] = True
    labels = torch.full((batch, count + background), num_classes)
    labels[:, :count] = gt_labels[:, owner]

    appearance = noise * torch.randn(batch, count + background, feature_dim, generator=generator)
    appearance[:, :count] += prototypes[gt_labels[:, owner]]
    features = torch.cat([appearance, centres, sizes], dim=-1)
    return RelationScenes(
        features, _corners(centres, sizes), labels, _corners(centre, size), gt_labels, assign
    )

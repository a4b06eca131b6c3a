"""Procedural scene graphs with planted rivals."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_at_least

__all__ = ["IMAGE_SIZE", "SceneGraphs", "scene_graphs"]

#: Width and height of the procedural images, in pixels.
IMAGE_SIZE = (640, 480)
#: Unit vectors of the four directions in which a related object may lie (right, down, left, up).
_DIRECTIONS = ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))


class SceneGraphs(NamedTuple):
    """A batch of scenes: every pair of a subject and an object, with what a detector would see.

    Attributes
    ----------
    subject_features, object_features
        (B, S, D) and (B, O, D) float32: a noisy prototype of the entity's class.
    union_features
        (B, S, O, P) float32, what is seen in the box around the pair: the *contact* cue, the *pose* cue,
        and P - 2 numbers of noise.
    subject_boxes, object_boxes
        (B, S, 4) and (B, O, 4) float32: x1, y1, x2, y2 in pixels of a 640 x 480 image.
    subject_classes, object_classes
        (B, S) and (B, O) int64, from 0.
    predicates
        (B, S, O) int64: 0 is no relation; e = 1 to 4 is "the object lies to the right of, below, to the
        left of, above the subject, and the two interact".
    rivals
        (B, S, O) int64: 1 for an *instance rival* (same class as the subject's related object, another
        direction, pose but no contact), 2 for a *proximal rival* (same direction, another class, contact
        but no pose), else 0.
    """

    subject_features: Tensor
    object_features: Tensor
    union_features: Tensor
    subject_boxes: Tensor
    object_boxes: Tensor
    subject_classes: Tensor
    object_classes: Tensor
    predicates: Tensor
    rivals: Tensor


def scene_graphs(
    batch: int,
    *,
    subjects: int = 4,
    instance_rivals: int = 2,
    proximal_rivals: int = 2,
    clutter: int = 4,
    nuisance: float = 2.0,
    cue: float = 3.0,
    subject_classes: int = 3,
    object_classes: int = 8,
    feature_dim: int = 6,
    noise_dim: int = 2,
    prototype_seed: int = 0,
    generator: torch.Generator | None = None,
) -> SceneGraphs:
    """Draw scenes in which each subject is related to one object, beside rivals of two kinds.

    Around each subject lie one related object, its instance rivals and its proximal rivals, at distances
    drawn alike; clutter lies anywhere. Two cues in the box around a pair tell them apart. *Contact* is
    there for the related object and for proximal rivals; *pose* for the related object and for instance
    rivals. Each cue has unit noise, and an offset of its own that all pairs of a subject share (light,
    blur, the size of a person): within a subject it does not change the order, across subjects it does.

    Parameters
    ----------
    batch
        Number of scenes B.
    subjects, instance_rivals, proximal_rivals, clutter
        Subjects S a scene (at most 4), rivals a subject, other objects a scene; O is
        ``subjects * (1 + instance_rivals + proximal_rivals) + clutter``.
    nuisance
        Standard deviation of the shared offsets, in units of the cues' noise. Default 2.
    cue
        How much a present cue adds, in the same unit. Default 3.
    subject_classes, object_classes, feature_dim, noise_dim
        Numbers of classes; length D of the entities' features; noise numbers in ``union_features``.
    prototype_seed
        Seed of the class prototypes and of the predicates' frequencies, which all scenes share.
    generator
        Source of everything else; PyTorch's global one by default.

    Returns
    -------
    SceneGraphs

    Raises
    ------
    ValueError
        A count below 1 (rivals, clutter, noise: below 0), more than 4 subjects, a single object class
        with proximal rivals, a negative ``nuisance``.

    Examples
    --------
    >>> scenes = scene_graphs(2, generator=torch.Generator().manual_seed(0))
    >>> scenes.union_features.shape, (scenes.predicates > 0).sum((1, 2)).tolist()
    (torch.Size([2, 4, 24, 4]), [4, 4])
    """
    for name, value, least in (
        ("batch", batch, 1), ("subjects", subjects, 1), ("instance_rivals", instance_rivals, 0),
        ("proximal_rivals", proximal_rivals, 0), ("clutter", clutter, 0), ("nuisance", nuisance, 0),
        ("subject_classes", subject_classes, 1), ("feature_dim", feature_dim, 1),
        ("object_classes", object_classes, 2 if proximal_rivals else 1), ("noise_dim", noise_dim, 0),
    ):  # fmt: skip
        check_at_least(value, name, least)
    if subjects > 4:
        raise ValueError(
            f"subjects: expected at most 4 (one a quarter of the image), got {subjects}"
        )
    B, S, near = batch, subjects, 1 + instance_rivals + proximal_rivals

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    fixed = torch.Generator().manual_seed(prototype_seed)
    subject_prototypes = torch.randn(subject_classes, feature_dim, generator=fixed)
    object_prototypes = torch.randn(object_classes, feature_dim, generator=fixed)
    # Which predicate two classes prefer: the semantic module can learn it, within limits.
    preference = torch.randn(subject_classes, object_classes, 4, generator=fixed).softmax(-1)

    # Classes and directions of what lies around a subject: the related object comes first.
    subject_class = integers(subject_classes, B, S)
    object_class = integers(object_classes, B, S, near)
    object_class[..., 1 : 1 + instance_rivals] = object_class[..., :1]
    other = 1 + integers(max(object_classes - 1, 1), B, S, proximal_rivals)
    object_class[..., 1 + instance_rivals :] = (object_class[..., :1] + other) % object_classes
    likely = preference[subject_class, object_class[..., 0]].flatten(0, 1)
    direction = torch.multinomial(likely, 1, generator=generator).view(B, S, 1).repeat(1, 1, near)
    direction[..., 1 : 1 + instance_rivals] += 1 + integers(3, B, S, instance_rivals)
    direction %= 4

    # Boxes: subjects in quarters of the image, each with its objects around it.
    wide, high = IMAGE_SIZE
    quarter = torch.rand(B, 4, generator=generator).argsort(-1)[:, :S]
    centre = torch.stack(
        [quarter % 2 * wide / 2 + wide / 4, quarter // 2 * high / 2 + high / 4], -1
    )
    centre = centre + uniform(B, S, 2, low=-20.0, high=20.0)
    way = torch.tensor(_DIRECTIONS)[direction] * uniform(B, S, near, 1, low=50.0, high=80.0)
    around = centre[:, :, None] + way + uniform(B, S, near, 2, low=-12.0, high=12.0)
    anywhere = torch.rand(B, clutter, 2, generator=generator) * torch.tensor(
        [float(wide), float(high)]
    )
    object_centre = torch.cat([around.flatten(1, 2), anywhere], 1)
    object_class = torch.cat([object_class.flatten(1), integers(object_classes, B, clutter)], 1)
    O = object_centre.shape[1]  # noqa: E741

    def boxes(middle: Tensor, low: float, top: float) -> Tensor:
        half = uniform(*middle.shape, low=low, high=top) / 2
        return torch.cat([middle - half, middle + half], -1)

    # Relations, rivals and cues of the pairs; a subject has nothing to do with another's objects.
    kind = torch.tensor([3] + [1] * instance_rivals + [2] * proximal_rivals)
    pair_kind = torch.zeros(B, S, O, dtype=torch.long)
    for s in range(S):
        pair_kind[:, s, s * near : (s + 1) * near] = kind
    related = pair_kind == 3
    predicates = torch.zeros(B, S, O, dtype=torch.long)
    predicates[related] = (direction[..., 0] + 1).flatten()
    present = torch.stack([related | (pair_kind == 2), related | (pair_kind == 1)], -1)
    cues = cue * present + torch.randn(B, S, O, 2, generator=generator)
    cues = cues + nuisance * torch.randn(B, S, 1, 2, generator=generator)
    noise = torch.randn(B, S, O, noise_dim, generator=generator)

    # Objects in random order, so that a position tells nothing.
    order = torch.rand(B, O, generator=generator).argsort(-1)
    scene, subject = torch.arange(B)[:, None], torch.arange(S)[:, None]
    object_class, object_centre = object_class[scene, order], object_centre[scene, order]
    pairs = (scene[:, None], subject, order[:, None])  # (B, S, O)
    pair_kind, predicates, cues = pair_kind[pairs], predicates[pairs], cues[pairs]

    def seen(prototypes: Tensor, classes: Tensor) -> Tensor:
        found = prototypes[classes]
        return found + 0.3 * torch.randn(found.shape, generator=generator)

    return SceneGraphs(
        seen(subject_prototypes, subject_class),
        seen(object_prototypes, object_class),
        torch.cat([cues, noise], -1),
        boxes(centre, 60.0, 90.0),
        boxes(object_centre, 20.0, 40.0),
        subject_class,
        object_class,
        predicates,
        torch.where(pair_kind == 3, 0, pair_kind),
    )

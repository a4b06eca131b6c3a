"""Graphical contrastive losses: ours, the literal loops, and what one would write in PyTorch first."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from affnb.affinity.graphical_contrastive import (
    entity_class_aware_loss,
    graphical_contrastive_loss,
)
from benchmarks.harness import COMPILED, Case, Step, Work, as_named

OURS, LITERAL, PYTORCH = "affnb", "literal equations", "PyTorch (an axis of classes)"
CLASSES, PREDICATES = 150, 50  # Visual Genome's


def contrast(phi: torch.Tensor, pos: torch.Tensor, neg: torch.Tensor) -> torch.Tensor:
    """Mean over anchors of the hinges of their groups; ``pos`` and ``neg`` are ``(B, S, O, groups)``."""
    least = torch.where(pos, phi[..., None], 2.0).amin(2)
    most = torch.where(neg, phi[..., None], -2.0).amax(2)
    present = least < 2
    hinge = torch.relu(0.2 - (least - most)) * (present & (most > -2))
    groups = present.sum(-1)
    return (hinge.sum(-1) / groups.clamp(min=1)).sum() / (groups > 0).sum()


def spread_loss(
    phi: torch.Tensor, pos: torch.Tensor, subj_cls: torch.Tensor, obj_cls: torch.Tensor
) -> torch.Tensor:
    """The entity class aware loss with every pair once for each class: ``(B, S, O, C)``."""
    total = phi.new_zeros(())
    for p, m, classes in ((phi, pos, obj_cls), (phi.mT, pos.mT, subj_cls)):
        of_class = classes[:, None, :, None] == torch.arange(CLASSES, device=phi.device)
        total = total + contrast(p, m[..., None] & of_class, ~m[..., None] & of_class)
    return total


def spread_total(
    logits: torch.Tensor, truth: torch.Tensor, subj_cls: torch.Tensor, obj_cls: torch.Tensor
) -> torch.Tensor:
    """All four losses; the predicate class aware one with an axis of predicates."""
    phi, pos = 1 - logits.softmax(-1)[..., 0], truth > 0
    predicates = torch.arange(1, PREDICATES + 1, device=logits.device)
    guess = logits.detach()[..., 1:].argmax(-1) + 1
    total = F.cross_entropy(logits.flatten(0, 2), truth.flatten())
    total = total + 0.5 * spread_loss(phi, pos, subj_cls, obj_cls)
    for turn in (lambda x: x, lambda x: x.transpose(1, 2)):
        p, m, t, g = (turn(x)[..., None] for x in (phi, pos, truth, guess))
        total = total + contrast(p[..., 0], m, ~m)
        total = total + 0.1 * contrast(p[..., 0], t == predicates, ~m & (g == predicates))
    return total


def graph(shape: dict[str, int], device: str) -> tuple[torch.Tensor, ...]:
    """About two relations an entity; labels, and classes of subjects and objects."""
    torch.manual_seed(0)
    B, N = shape["images"], shape["N"]
    truth = torch.randint(1, PREDICATES + 1, (B, N, N), device=device)
    truth *= torch.rand(B, N, N, device=device) < 2 / N
    classes = [torch.randint(CLASSES, (B, N), device=device) for _ in range(2)]
    return (truth, *classes)


def setup_entity(implementation: str, shape: dict[str, int], device: str) -> Step:
    truth, subj_cls, obj_cls = graph(shape, device)
    phi, pos, neg = torch.rand(truth.shape, device=device), truth > 0, truth == 0
    phi.requires_grad_()
    spread = as_named(spread_loss, implementation)

    def step() -> torch.Tensor:
        phi.grad = None
        if implementation.startswith(PYTORCH):
            loss = spread(phi, pos, subj_cls, obj_cls)
        else:
            backend = "auto" if implementation == OURS else "reference"
            loss = entity_class_aware_loss(phi, pos, neg, subj_cls, obj_cls, backend=backend)
        loss.backward()
        return loss

    return step


def setup_total(implementation: str, shape: dict[str, int], device: str) -> Step:
    truth, subj_cls, obj_cls = graph(shape, device)
    logits = torch.randn(*truth.shape, PREDICATES + 1, device=device).requires_grad_()
    backend = "auto" if implementation == OURS else "reference"
    spread = as_named(spread_total, implementation)

    def step() -> torch.Tensor:
        logits.grad = None
        if implementation.startswith(PYTORCH):
            loss = spread(logits, truth, subj_cls, obj_cls)
        else:
            entities = (subj_cls, obj_cls)
            loss = graphical_contrastive_loss(logits, truth, *entities, backend=backend)["loss"]
        loss.backward()
        return loss

    return step


def cases(device: str) -> list[Case]:
    found = []
    on_gpu = device == "cuda"
    for n in (32, 64, 128, 256, 512):  # entities an image; 512 is the paper's bound
        shape, small = {"images": 2, "N": n}, {"images": 2, "N": 8}
        # The loops index pair by pair; the axis of classes makes 150 copies of every pair.
        names = (
            [OURS] + [LITERAL] * (n <= 64) + [PYTORCH, PYTORCH + COMPILED] * (on_gpu or n <= 256)
        )
        work = Work(bytes=2 * n * n * (2 * 4 + 2))  # affinities in, gradient out, two masks
        found += [
            Case("entity_class_aware_loss", name, shape, setup_entity, small, work)
            for name in names
        ]
    for n in (32, 64, 128, 256, *[512] * on_gpu):
        shape, small = {"images": 2, "N": n}, {"images": 2, "N": 8}
        names = [OURS] + [LITERAL] * (n <= 64) + [PYTORCH, PYTORCH + COMPILED]
        work = Work(bytes=2 * n * n * (2 * 4 * (PREDICATES + 1) + 8))
        found += [
            Case("graphical_contrastive_loss", name, shape, setup_total, small, work)
            for name in names
        ]
    return found

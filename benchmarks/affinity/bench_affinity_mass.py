"""Affinity mass: ours, the literal equations, and what one would write in PyTorch first."""

from __future__ import annotations

import torch

from affnb.affinity import affinity_mass_loss, batch_affinity_loss
from benchmarks.harness import Case, Step

OURS, LITERAL, PYTORCH = "affnb", "literal equations", "PyTorch (cdist, softmax)"


def cdist_softmax_loss(
    features: torch.Tensor, labels: torch.Tensor, gamma: float = 4.0
) -> torch.Tensor:
    logits = -torch.cdist(features, features).square() / 2
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    weights = logits.masked_fill(own, -torch.inf).flatten().softmax(0).view_as(logits)
    mass = (weights * (labels[:, None] == labels)).sum()
    return -((1 - mass) ** gamma) * mass.log()


def setup_batch(implementation: str, shape: dict[str, int], device: str) -> Step:
    torch.manual_seed(0)
    # Ten classes, as in CIFAR-10; a scale at which neither side of the mass underflows.
    features = (0.3 * torch.randn(shape["N"], shape["d"], device=device)).requires_grad_()
    labels = torch.randint(0, 10, (shape["N"],), device=device)

    def step() -> None:
        features.grad = None
        if implementation == PYTORCH:
            loss = cdist_softmax_loss(features, labels)
        else:
            backend = "auto" if implementation == OURS else "reference"
            loss = batch_affinity_loss(features, labels, backend=backend)
        loss.backward()

    return step


def setup_matrix(implementation: str, shape: dict[str, int], device: str) -> Step:
    torch.manual_seed(0)
    size = (shape["graphs"], shape["N"], shape["N"])
    logits = torch.randn(size, device=device).requires_grad_()
    target = torch.rand(size, device=device) < 0.02  # the share of targets in COCO is this small
    backend = "auto" if implementation == OURS else "reference"

    def step() -> None:
        logits.grad = None
        affinity_mass_loss(logits, target, backend=backend).backward()

    return step


def cases(device: str) -> list[Case]:
    found = []
    for n in (128, 512, 2048, 8192, 20_000):
        shape, small = {"N": n, "d": 128}, {"N": 16, "d": 128}
        # The literal form holds N x N x d numbers, the PyTorch form N x N several times.
        names = [OURS] + [LITERAL] * (n <= 512) + [PYTORCH] * (n <= 8192)
        found += [Case("batch_affinity_loss", name, shape, setup_batch, small) for name in names]
    for n in (100, 300, 1000):  # proposals per image
        shape, small = {"graphs": 2, "N": n}, {"graphs": 2, "N": 8}
        found += [
            Case("affinity_mass_loss", name, shape, setup_matrix, small) for name in (OURS, LITERAL)
        ]
    return found

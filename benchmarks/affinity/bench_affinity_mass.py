"""Affinity mass: ours, the literal equations, and what one would write in PyTorch first."""

from __future__ import annotations

from functools import partial

import torch

from affnb.affinity import affinity_mass_loss, batch_affinity_loss
from benchmarks.harness import COMPILED, Case, Step, Work, as_named

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
    if implementation.startswith(PYTORCH):
        loss = as_named(cdist_softmax_loss, implementation)
    else:
        loss = partial(
            batch_affinity_loss, backend="auto" if implementation == OURS else "reference"
        )

    def step() -> torch.Tensor:
        features.grad = None
        value = loss(features, labels)
        value.backward()
        return value

    return step


def setup_matrix(implementation: str, shape: dict[str, int], device: str) -> Step:
    torch.manual_seed(0)
    size = (shape["graphs"], shape["N"], shape["N"])
    logits = torch.randn(size, device=device).requires_grad_()
    target = torch.rand(size, device=device) < 0.02  # the share of targets in COCO is this small
    backend = "auto" if implementation == OURS else "reference"
    loss = as_named(partial(affinity_mass_loss, backend=backend), implementation)

    def step() -> torch.Tensor:
        logits.grad = None
        value = loss(logits, target)
        value.backward()
        return value

    return step


def cases(device: str) -> list[Case]:
    found = []
    on_gpu = device == "cuda"
    for n in (128, 512, 2048, 8192, 20_000, *[65_536] * on_gpu):
        shape, small = {"N": n, "d": 128}, {"N": 16, "d": 128}
        # The literal form holds N x N x d numbers, the PyTorch form N x N several times.
        names = [OURS] + [LITERAL] * (n <= (8192 if on_gpu else 512))
        names += [PYTORCH, PYTORCH + COMPILED] * (on_gpu or n <= 8192)
        # Products of all pairs, and their gradient times the features.
        work = Work(bytes=2 * 4 * n * 128 + 8 * n, flops=2 * 2 * n * n * 128)
        found += [
            Case("batch_affinity_loss", name, shape, setup_batch, small, work) for name in names
        ]
    for n in (100, 300, 1000):  # proposals per image
        shape, small = {"graphs": 2, "N": n}, {"graphs": 2, "N": 8}
        work = Work(bytes=2 * n * n * (2 * 4 + 1))  # logits in, their gradient out, targets
        found += [
            Case("affinity_mass_loss", name, shape, setup_matrix, small, work)
            for name in (OURS, LITERAL, LITERAL + COMPILED)
        ]
    return found

"""Dilated affinity: ours, the printed equations, and what one would write in PyTorch first."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from affnb.affinity import (
    DilatedAffinityLoss,
    dilated_affinity_target,
    dilated_offsets,
    neighbour_count_frequencies,
    propagate_affinity,
)
from benchmarks.harness import COMPILED, Case, Step, Work, as_named

OURS, LITERAL, PYTORCH = "affnb", "literal equations", "PyTorch (unfold)"
PLAIN = "PyTorch (binary cross-entropy)"
RATES = (8, 16)


def unfolded_propagation(
    prob: torch.Tensor, affinity: torch.Tensor, rates: tuple[int, ...], iterations: int
) -> torch.Tensor:
    batch, classes, height, width = prob.shape
    for _ in range(iterations):
        v = 6.0 * prob * prob.amax(1, keepdim=True)
        for r, rate in enumerate(rates):
            around = F.unfold(prob, 3, dilation=rate, padding=rate)
            around = around.view(batch, classes, 9, height, width)
            around = torch.cat([around[:, :, :4], around[:, :, 5:]], 2)
            v = v + (affinity[:, None, 8 * r : 8 * r + 8] * around).sum(2)
        prob = v / v.sum(1, keepdim=True)
    return prob


def setup_propagation(implementation: str, shape: dict[str, int], device: str) -> Step:
    torch.manual_seed(0)
    batch, classes, side = shape["B"], shape["C"], shape["H"]
    rates = tuple(r for r in RATES if r < side) or (1,)
    offsets = dilated_offsets(rates)
    prob = torch.randn(batch, classes, side, side, device=device).softmax(1).requires_grad_()
    affinity = torch.rand(batch, len(offsets), side, side, device=device).requires_grad_()
    steps = shape["steps"]
    unfolded = as_named(unfolded_propagation, implementation)

    def step() -> torch.Tensor:
        prob.grad = affinity.grad = None
        if implementation.startswith(PYTORCH):
            refined = unfolded(prob, affinity, rates, steps)
        else:
            backend = "auto" if implementation == OURS else "reference"
            refined = propagate_affinity(prob, affinity, offsets, iterations=steps, backend=backend)
        value = refined.square().sum()
        value.backward()
        return value

    return step


def plain_loss(
    weights: torch.Tensor, logits: torch.Tensor, target: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """The focal loss of each pair by PyTorch's own functions, weighted by categories, ``(R, 9)``."""
    truth = target.float()
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    focal = (1 - torch.exp(-entropy)) ** 2 * entropy * valid
    per_rate = (len(target), len(weights), 8, *target.shape[2:])
    counted = valid.view(per_rate).sum(2)
    positive = (target & valid).view(per_rate).sum(2)
    category = (8 * positive / counted.clamp(min=1) + 0.5).floor().long()
    weight = torch.stack([weights[r][category[:, r]] for r in range(len(weights))], 1)
    loss = (weight * focal.view(per_rate).sum(2)).sum((0, 2, 3))
    return (loss / (counted > 0).sum((0, 2, 3)).clamp(min=1)).sum()


def setup_loss(implementation: str, shape: dict[str, int], device: str) -> Step:
    torch.manual_seed(0)
    batch, side = shape["B"], shape["H"]
    rates = tuple(r for r in RATES if r < side) or (1,)
    offsets = dilated_offsets(rates)
    # Regions of 24 pixels, so that most pairs are positive as in photographs.
    coarse = torch.randint(0, 21, (batch, side // 24 + 1, side // 24 + 1), device=device)
    labels = coarse.repeat_interleave(24, 1).repeat_interleave(24, 2)[:, :side, :side]
    target, valid = dilated_affinity_target(labels, offsets)
    freqs = neighbour_count_frequencies(target, valid, len(rates))
    backend = "auto" if implementation == OURS else "reference"
    criterion = DilatedAffinityLoss(freqs, backend=backend)
    if implementation.startswith(PLAIN):
        f = freqs.clamp(min=1e-6).float()
        criterion = partial(as_named(plain_loss, implementation), (f[:, 8:] / f).sqrt())
    logits = torch.randn(target.shape, device=device).requires_grad_()

    def step() -> torch.Tensor:
        logits.grad = None
        value = criterion(logits, target, valid)
        value.backward()
        return value

    return step


def cases(device: str) -> list[Case]:
    found = []
    small = {"B": 1, "C": 3, "H": 8, "steps": 2}
    # The literal form visits each pixel from Python; unfold keeps 18 copies of the probabilities a step.
    for side, names in (
        (12, [OURS, LITERAL, PYTORCH, PYTORCH + COMPILED]),
        (60, [OURS, PYTORCH, PYTORCH + COMPILED]),
        (240, [OURS, PYTORCH, PYTORCH + COMPILED]),
        *[(960, [OURS, PYTORCH, PYTORCH + COMPILED])] * (device == "cuda"),
    ):
        shape = {"B": 1, "C": 21, "H": side, "steps": 10}
        # Each iteration reads probabilities and affinity and writes probabilities; going back it
        # reads them again and writes both gradients.
        per_pixel = 10 * (2 * 21 + 16) + 10 * (3 * 21 + 2 * 16)
        work = Work(bytes=4 * side**2 * per_pixel)
        found += [
            Case("propagate_affinity", name, shape, setup_propagation, small, work)
            for name in names
        ]
    for side in (60, 240, *[960] * (device == "cuda")):
        shape, tiny = {"B": 4, "H": side}, {"B": 1, "H": 8}
        work = Work(bytes=4 * 16 * side**2 * (2 * 4 + 2))  # logits in, gradient out, two masks
        found += [
            Case("DilatedAffinityLoss", name, shape, setup_loss, tiny, work)
            for name in (OURS, LITERAL, PLAIN, PLAIN + COMPILED)
        ]
    return found

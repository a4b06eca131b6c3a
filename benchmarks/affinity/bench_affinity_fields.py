"""Affinity fields: ours, the literal equation over shifted copies, and PyTorch's unfold."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from affnb.affinity import AdaptiveAffinityFieldLoss
from benchmarks.harness import COMPILED, Case, Step, Work, as_named

OURS, LITERAL, PYTORCH = "affnb", "literal equations", "PyTorch (unfold)"
SIZES = (1, 2)


def unfold_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Equal weights of the sizes, by copies of all neighbours side by side."""
    batch, classes, height, width = logits.shape
    prob = logits.softmax(1)
    one_hot = F.one_hot(labels, classes).movedim(-1, 1).to(prob.dtype)
    ring = [k for k in range(9) if k != 4]
    total = logits.new_zeros(())
    for size in SIZES:

        def neighbours(x: torch.Tensor, size: int = size) -> torch.Tensor:
            columns = F.unfold(x, 3, dilation=size, padding=size)
            return columns.view(batch, x.shape[1], 9, height, width)[:, :, ring]

        inside = neighbours(torch.ones_like(prob[:, :1])) > 0
        p, q = neighbours(prob).clamp(1e-6, 1 - 1e-6), prob[:, :, None].clamp(1e-6, 1 - 1e-6)
        divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        same = neighbours(one_hot) == one_hot[:, :, None]
        for mask, value in ((same, divergence), (~same, (3.0 - divergence).clamp(min=0))):
            mask = mask & inside
            sums = torch.where(mask, value, 0.0).sum((0, 2, 3, 4))
            total = total + (sums / mask.sum((0, 2, 3, 4)).clamp(min=1)).mean() / len(SIZES)
    return total


def setup(implementation: str, shape: dict[str, int], device: str) -> Step:
    torch.manual_seed(0)
    batch, classes, side = shape["B"], shape["C"], shape["H=W"]
    logits = torch.randn(batch, classes, side, side, device=device).requires_grad_()
    # Regions of 8 x 8 pixels, about as much boundary as a label map at stride 8 has.
    coarse = torch.randint(classes, (batch, -(-side // 8), -(-side // 8)), device=device)
    labels = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :side, :side].contiguous()
    backend = "auto" if implementation == OURS else "reference"
    criterion = AdaptiveAffinityFieldLoss(classes, SIZES, weights="uniform", backend=backend)
    loss = criterion.to(device)
    if implementation.startswith(PYTORCH):
        loss = as_named(unfold_loss, implementation)

    def step() -> torch.Tensor:
        logits.grad = None
        value = loss(logits, labels)
        value.backward()
        return value

    return step


def cases(device: str) -> list[Case]:
    found = []
    # Crops of 336 and 480 pixels at stride 8 with VOC's 21 classes, then maps at full resolution.
    for batch, side in ((8, 42), (16, 60), (4, 120), (16, 240)):
        shape, small = {"B": batch, "C": 21, "H=W": side}, {"B": 1, "C": 21, "H=W": 8}
        # The others hold 120 (literal) and 190 (unfold) times the logits at once.
        names = [OURS]
        if device == "cuda" or batch * side**2 <= 60_000:
            names += [LITERAL, PYTORCH, PYTORCH + COMPILED]
        pixels = batch * side**2
        work = Work(bytes=2 * 4 * 21 * pixels + 8 * pixels)  # logits in, their gradient out, labels
        found += [Case("affinity_fields", name, shape, setup, small, work) for name in names]
    return found

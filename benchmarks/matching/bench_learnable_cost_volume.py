"""Cost volume: ours, the equation displacement by displacement, and what one writes in PyTorch first."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from affnb.matching import CayleySPD, cost_volume
from benchmarks.harness import Case, Step

OURS, LITERAL, PYTORCH, ALL_PAIRS = (
    "affnb",
    "literal equations",
    "PyTorch (unfold)",
    "PyTorch (all pairs)",
)


def unfolded(f1: torch.Tensor, f2: torch.Tensor, radius: int) -> torch.Tensor:
    batch, channels, height, width = f1.shape
    side = 2 * radius + 1
    around = F.unfold(f2, side, padding=radius).view(batch, channels, side, side, height, width)
    return (f1[:, :, None, None] * around).sum(1)


def all_pairs(f1: torch.Tensor, f2: torch.Tensor, radius: int) -> torch.Tensor:
    """As RAFT does: the products of all pixels with all, then the window of each picked out."""
    batch, _, height, width = f1.shape
    side = 2 * radius + 1
    products = f1.flatten(2).mT @ f2.flatten(2)
    products = F.pad(products.view(batch, height, width, height, width), [radius] * 4)
    steps = torch.arange(side, device=f1.device)
    rows = torch.arange(height, device=f1.device)
    columns = torch.arange(width, device=f1.device)
    return products[
        :,
        rows[None, None, :, None],
        columns[None, None, None, :],
        rows[None, None, :, None] + steps[:, None, None, None],
        columns[None, None, None, :] + steps[None, :, None, None],
    ]


def setup_volume(implementation: str, shape: dict[str, int], device: str) -> Step:
    torch.manual_seed(0)
    size = shape["B"], shape["C"], shape["H"], shape["W"]
    f1, f2 = (torch.randn(size, device=device).requires_grad_() for _ in range(2))
    radius = shape["radius"]

    def step() -> None:
        f1.grad = f2.grad = None
        if implementation == PYTORCH:
            volume = unfolded(f1, f2, radius)
        elif implementation == ALL_PAIRS:
            volume = all_pairs(f1, f2, radius)
        else:
            backend = "auto" if implementation == OURS else "reference"
            volume = cost_volume(f1, f2, radius=radius, backend=backend)
        volume.square().sum().backward()

    return step


def setup_learned(implementation: str, shape: dict[str, int], device: str) -> Step:
    """The same with a learned metric; in PyTorch, its factor applied to both maps before."""
    torch.manual_seed(0)
    size = shape["B"], shape["C"], shape["H"], shape["W"]
    f1, f2 = (torch.randn(size, device=device).requires_grad_() for _ in range(2))
    metric = CayleySPD(shape["C"], init="perturbed").to(device)
    radius = shape["radius"]

    def step() -> None:
        f1.grad = f2.grad = None
        metric.zero_grad()
        if implementation == PYTORCH:
            q = metric.factor()[:, :, None, None]
            volume = unfolded(F.conv2d(f1, q), F.conv2d(f2, q), radius)
        else:
            backend = "auto" if implementation == OURS else "reference"
            volume = cost_volume(f1, f2, radius=radius, weight=metric(), backend=backend)
        volume.square().sum().backward()

    return step


def cases(device: str) -> list[Case]:
    found = []
    small = {"B": 1, "C": 4, "H": 6, "W": 8, "radius": 1}
    # All pairs of pixels of the largest map would take 1.5 GB, and as much for the gradient.
    for height, names in (
        (15, [OURS, LITERAL, PYTORCH, ALL_PAIRS]),
        (60, [OURS, LITERAL, PYTORCH, ALL_PAIRS]),
        (120, [OURS, LITERAL, PYTORCH]),
    ):
        shape = {"B": 1, "C": 64, "H": height, "W": 4 * height // 3, "radius": 4}
        found += [Case("cost_volume", name, shape, setup_volume, small) for name in names]
    shape = {"B": 1, "C": 128, "H": 48, "W": 64, "radius": 4}
    found += [
        Case("cost_volume + CayleySPD", name, shape, setup_learned, small)
        for name in (OURS, LITERAL, PYTORCH)
    ]
    return found

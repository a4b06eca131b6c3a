"""Cost volume: ours, the equation displacement by displacement, and what one writes in PyTorch first."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from affnb.matching import CayleySPD, cost_volume
from benchmarks.harness import COMPILED, Case, Step, Work, as_named

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
    peer = as_named(unfolded if implementation.startswith(PYTORCH) else all_pairs, implementation)

    def step() -> torch.Tensor:
        f1.grad = f2.grad = None
        if implementation.startswith((PYTORCH, ALL_PAIRS)):
            volume = peer(f1, f2, radius)
        else:
            backend = "auto" if implementation == OURS else "reference"
            volume = cost_volume(f1, f2, radius=radius, backend=backend)
        value = volume.square().sum()
        value.backward()
        return value

    return step


def setup_learned(implementation: str, shape: dict[str, int], device: str) -> Step:
    """The same with a learned metric; in PyTorch, its factor applied to both maps before."""
    torch.manual_seed(0)
    size = shape["B"], shape["C"], shape["H"], shape["W"]
    f1, f2 = (torch.randn(size, device=device).requires_grad_() for _ in range(2))
    metric = CayleySPD(shape["C"], init="perturbed").to(device)
    radius = shape["radius"]
    peer = as_named(unfolded, implementation)

    def step() -> torch.Tensor:
        f1.grad = f2.grad = None
        metric.zero_grad()
        if implementation.startswith(PYTORCH):
            q = metric.factor()[:, :, None, None]
            volume = peer(F.conv2d(f1, q), F.conv2d(f2, q), radius)
        else:
            backend = "auto" if implementation == OURS else "reference"
            volume = cost_volume(f1, f2, radius=radius, weight=metric(), backend=backend)
        value = volume.square().sum()
        value.backward()
        return value

    return step


def work(shape: dict[str, int], metric: bool = False) -> Work:
    """Features in, their gradients out, scores out and their gradient in; products of all three."""
    pixels, scores = shape["B"] * shape["H"] * shape["W"], (2 * shape["radius"] + 1) ** 2
    channels = shape["C"]
    flops = 3 * 2 * pixels * scores * channels + metric * 3 * 2 * pixels * channels**2
    return Work(bytes=4 * pixels * (4 * channels + 2 * scores), flops=flops)


def cases(device: str) -> list[Case]:
    found = []
    small = {"B": 1, "C": 4, "H": 6, "W": 8, "radius": 1}
    on_gpu = device == "cuda"
    for height in (15, 60, 120, *[480] * on_gpu):
        shape = {"B": 1, "C": 64, "H": height, "W": 4 * height // 3, "radius": 4}
        names = [OURS, LITERAL, PYTORCH, PYTORCH + COMPILED]
        # All pairs of pixels of a map 120 high take 1.5 GB, and as much for the gradient.
        names += [ALL_PAIRS, ALL_PAIRS + COMPILED] * (on_gpu or height <= 60)
        found += [
            Case("cost_volume", name, shape, setup_volume, small, work(shape)) for name in names
        ]
    shape = {"B": 1, "C": 128, "H": 48, "W": 64, "radius": 4}
    found += [
        Case("cost_volume + CayleySPD", name, shape, setup_learned, small, work(shape, True))
        for name in (OURS, LITERAL, PYTORCH, PYTORCH + COMPILED)
    ]
    return found

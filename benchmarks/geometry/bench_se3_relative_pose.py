"""Minimal solvers in batches: ours, PoseLib and kornia (five points), the printed templates, RANSAC."""

from __future__ import annotations

import math

import poselib
import torch

from affnb.geometry import (
    PoseCandidates,
    quat_to_rot,
    ransac_relative_pose,
    sampson_distance,
    solve_4p_st0,
    solve_five_point,
    solve_known_angle,
)
from benchmarks.harness import Case, Step

try:
    from kornia.geometry.epipolar import find_essential
except ImportError:
    find_essential = None

OURS, LITERAL, POSELIB, LOOP = "affnb", "printed templates", "PoseLib (C++)", "PyTorch (loop)"
KORNIA = "kornia (matrices only)"
POINTS = {"solve_five_point": 5, "solve_4p_st0": 4, "solve_known_angle": 4, "planar": 3}


def pairs(batch: int, points: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bearings of points 4 to 20 steps away, a sideways step, small planar rotations, 1 pixel of noise."""
    torch.manual_seed(0)
    first = torch.cat(
        [torch.rand(batch, points, 2) - 0.5, torch.ones(batch, points, 1)], -1
    ).double()
    theta = 0.01 + 0.1 * torch.rand(batch, dtype=torch.float64)
    axis = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    half = theta[:, None] / 2
    R = quat_to_rot(torch.cat([half.cos(), half.sin() * axis], 1))
    second = first * (4 + 16 * torch.rand(batch, points, 1)) @ R.mT
    second = second + torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    second = second / second[..., 2:]
    second[..., :2] += torch.randn(batch, points, 2) / 500
    first, second = (q / q.norm(dim=-1, keepdim=True) for q in (first, second))
    return first.to(device), second.to(device), theta.to(device)


def setup_solver(operation: str, implementation: str, shape: dict[str, int], device: str) -> Step:
    q1, q2, theta = pairs(shape["B"], POINTS[operation], device)
    backend = "reference" if implementation == LITERAL else "auto"
    if implementation == POSELIB:
        a, b = q1.cpu().numpy(), q2.cpu().numpy()
        return lambda: [poselib.essential_matrix_5pt(x, y) for x, y in zip(a, b, strict=True)]
    if implementation == KORNIA:
        p1, p2 = (q[..., :2] / q[..., 2:] for q in (q1, q2))
        return lambda: find_essential(p1, p2)

    def step() -> PoseCandidates:
        if operation == "solve_five_point":
            return solve_five_point(q1, q2, backend=backend)
        if operation == "solve_4p_st0":
            return solve_4p_st0(q1, q2, backend=backend)
        return solve_known_angle(q1, q2, theta, planar=operation == "planar", backend=backend)

    return step


def setup_five(implementation: str, shape: dict[str, int], device: str) -> Step:
    return setup_solver("solve_five_point", implementation, shape, device)


def setup_st0(implementation: str, shape: dict[str, int], device: str) -> Step:
    return setup_solver("solve_4p_st0", implementation, shape, device)


def setup_angle(implementation: str, shape: dict[str, int], device: str) -> Step:
    return setup_solver("solve_known_angle", implementation, shape, device)


def setup_planar(implementation: str, shape: dict[str, int], device: str) -> Step:
    return setup_solver("planar", implementation, shape, device)


def setup_gradient(implementation: str, shape: dict[str, int], device: str) -> Step:
    q1, q2, _ = pairs(shape["B"], 4, device)
    leaves = [q1.requires_grad_(), q2.requires_grad_()]
    backend = "reference" if implementation == LITERAL else "auto"

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        solve_4p_st0(*leaves, backend=backend).E.square().sum().backward()

    return step


def looped(q1: torch.Tensor, q2: torch.Tensor, samples: int, threshold: float) -> torch.Tensor:
    """RANSAC as one would write it first: sample by sample, hypothesis by hypothesis."""
    best, least = q1.new_zeros(3, 3), math.inf
    for _ in range(samples):
        index = torch.randperm(len(q1), device=q1.device)[:5]
        found = solve_five_point(q1[index], q2[index])
        for E in found.E[found.valid]:
            square = sampson_distance(E, q1, q2, squared=True).clamp(max=threshold**2)
            if float(square.sum()) < least:
                best, least = E, float(square.sum())
    return best


def setup_ransac(implementation: str, shape: dict[str, int], device: str) -> Step:
    first, second, _ = pairs(1, shape["N"], device)
    q1, q2 = first[0], second[0]
    q2[: shape["N"] // 4] = q2[: shape["N"] // 4].flip(0)
    if implementation == OURS:
        return lambda: ransac_relative_pose(q1, q2, samples=shape["samples"])
    if implementation == LOOP:
        return lambda: looped(q1, q2, shape["samples"], 0.004)
    a, b = ((q / q[:, 2:])[:, :2].cpu().numpy() for q in (q1, q2))
    camera = {"model": "SIMPLE_PINHOLE", "width": 2, "height": 2, "params": [1.0, 0.0, 0.0]}
    options = {
        "max_iterations": shape["samples"], "min_iterations": shape["samples"], "max_epipolar_error": 0.004
    }  # fmt: skip
    return lambda: poselib.estimate_relative_pose(
        a, b, camera, camera, options, {"max_iterations": 0}
    )


def cases(device: str) -> list[Case]:
    if find_essential is None:
        print("kornia is not installed: solve_five_point is measured without it")
    found = []
    tiny = {"B": 2}
    for operation, setup in (
        ("solve_five_point", setup_five),
        ("solve_4p_st0", setup_st0),
        ("solve_known_angle, planar", setup_planar),
        ("solve_known_angle", setup_angle),
    ):
        for batch in (1, 100, 2000):
            names = [OURS, *([LITERAL] if batch <= 100 else [])]
            if operation == "solve_five_point":
                names += [POSELIB] + [KORNIA] * (find_essential is not None)
            found += [Case(operation, name, {"B": batch}, setup, tiny) for name in names]
    for name in (OURS, LITERAL):
        found.append(Case("solve_4p_st0, with gradients", name, {"B": 100}, setup_gradient, tiny))
    shape, small = {"N": 500, "samples": 200}, {"N": 20, "samples": 2}
    for name in (OURS, LOOP, POSELIB):
        found.append(Case("ransac_relative_pose", name, shape, setup_ransac, small))
    return found

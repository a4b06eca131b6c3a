"""Relative pose from SE(3) invariants: identities, solvers against oracles and a peer, RANSAC."""

import itertools
import math
import re

import numpy as np
import poselib
import pytest
import sympy as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.autograd import gradcheck
from torch.func import jacrev, vmap

import affnb.geometry.se3_relative_pose as module
from affnb.claims import VERDICTS
from affnb.geometry import (
    cayley_to_rot,
    decompose_essential,
    essential_nullspace,
    hat,
    quat_to_rot,
    ransac_relative_pose,
    sampson_distance,
    se3_invariants,
    sir2_matrix,
    sir3_matrix,
    sir6_matrix,
    solve_4p_st0,
    solve_five_point,
    solve_known_angle,
    solve_translation_only,
)
from tests.chapter_cells import run_cells

DOUBLE = torch.float64
POINTS = {"5p": 5, "4p_st0": 4, "4p_ra": 4, "3p_ra_st0": 3}
COUNTS = {"5p": 10, "4p_st0": 10, "4p_ra": 20, "3p_ra_st0": 12}
PLANAR = ("4p_st0", "3p_ra_st0")
KINDS = (
    "random",
    "forward",
    "sideways",
    "planar scene",
    "any angle",
    "half-turn",
    "near half-turn",
    "tiny angle",
    "no rotation",
)
solvers = pytest.mark.parametrize("solver", list(POINTS))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=DOUBLE)


def unit(v):
    return v / v.norm(dim=-1, keepdim=True)


def strided(x):
    """The same values with other strides."""
    return x.mT.contiguous().mT.repeat_interleave(2, -1)[..., ::2]


def problems(kind, count, solver, seed=0):
    """Bearings, rotation, translation and angle of noise-free problems that the solver is made for."""
    points = POINTS.get(solver, 2)
    generator = seeded(seed)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=DOUBLE)

    def gauss(*shape):
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    plane = (2 * draw(count, points, 2) - 1) * math.tan(math.radians(30))
    rays = torch.cat([plane, torch.ones(count, points, 1, dtype=DOUBLE)], -1)
    depth = 4 + 16 * draw(count, points, 1)
    if kind == "planar scene":
        face = torch.cat([gauss(count, 2).clamp(-1, 1) / 2, torch.ones(count, 1)], -1)
        depth = 10 / (rays * face[:, None]).sum(-1, keepdim=True)
    first = rays * depth
    theta = {
        "any angle": math.pi * draw(count),
        "half-turn": torch.full((count,), math.pi, dtype=DOUBLE),
        "near half-turn": math.pi - 10 ** (-7 + 5 * draw(count)),
        "tiny angle": 10 ** (-6 + 4 * draw(count)),
        "no rotation": torch.zeros(count, dtype=DOUBLE),
    }.get(kind, gauss(count).abs() * math.radians(5))
    t, axis = unit(gauss(count, 3)), unit(gauss(count, 3))
    if kind in ("forward", "sideways"):
        t = torch.eye(3, dtype=DOUBLE)[{"forward": 2, "sideways": 0}[kind]].expand(count, 3)
    if solver in PLANAR:
        axis = unit(torch.linalg.cross(t, axis))
    half = theta[:, None] / 2
    R = quat_to_rot(torch.cat([half.cos(), half.sin() * axis], -1))
    second = first @ R.mT + (0 if kind == "pure rotation" else 1) * t[:, None]
    return unit(first), unit(second), R, t, theta


def solve(solver, q1, q2, theta, backend="auto"):
    if solver == "5p":
        return solve_five_point(q1, q2, backend=backend)
    if solver == "4p_st0":
        return solve_4p_st0(q1, q2, backend=backend)
    return solve_known_angle(q1, q2, theta, planar=solver == "3p_ra_st0", backend=backend)


def errors(found, R, t):
    """Distance of each candidate from a pose, infinite where it is not valid."""
    error = (found.R - R[..., None, :, :]).flatten(-2).norm(dim=-1)
    error = error + (found.t - t[..., None, :]).norm(dim=-1)
    return error.where(found.valid, torch.tensor(math.inf, dtype=DOUBLE))


# --------------------------------------------------------------------------------------------------
# Conventions, rotations, invariants
# --------------------------------------------------------------------------------------------------


def test_conventions_are_transposes():
    q = normal(6, 4)
    paper, ours = quat_to_rot(q, convention="paper"), quat_to_rot(q)
    torch.testing.assert_close(paper, ours.mT)
    size = (q * q).sum(-1)[:, None, None]
    torch.testing.assert_close(ours @ ours.mT, size**2 * torch.eye(3, dtype=DOUBLE).expand(6, 3, 3))
    v = q[:, 1:] / q[:, :1]
    torch.testing.assert_close(cayley_to_rot(v), ours / size)
    torch.testing.assert_close(cayley_to_rot(v, convention="paper"), paper / size)
    inverse = torch.linalg.inv(torch.eye(3, dtype=DOUBLE) + hat(v))  # Eq. 4
    literal = (torch.eye(3, dtype=DOUBLE) - hat(v)) @ inverse
    torch.testing.assert_close(cayley_to_rot(v, convention="paper"), literal)


def test_one_convention_for_motions():
    """X2 = R X1 + t; the paper's t and u are minus ours, and tr E has the sign that follows."""
    q1, q2, R, t, theta = problems("random", 20, "5p")
    E = hat(t) @ R
    assert (q2 * (q1 @ E.mT)).sum(-1).abs().max() < 1e-12
    quaternion = module._quaternion(R)
    axis = unit(quaternion[:, 1:])
    trace = E.diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(trace, -2 * theta.sin() * (axis * t).sum(-1))
    paper = torch.cat([quaternion[:, :1], -quaternion[:, 1:]], -1)
    torch.testing.assert_close(quat_to_rot(paper, convention="paper"), R)
    paper_trace = (hat(-t) @ R).diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(paper_trace, 2 * theta.sin() * (-axis * -t).sum(-1))


def motion(q, t):
    H = torch.eye(4, dtype=DOUBLE).repeat(*q.shape[:-1], 1, 1)
    H[..., :3, :3], H[..., :3, 3] = quat_to_rot(unit(q)), t
    return H


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(), (1,), (2, 3), (0,)]))
def test_invariants_do_not_depend_on_the_frame(seed, shape):
    H = motion(normal(*shape, 4, seed=seed), normal(*shape, 3, seed=seed + 1))
    X = motion(normal(*shape, 4, seed=seed + 2), 10 * normal(*shape, 3, seed=seed + 3))
    before, after = se3_invariants(H), se3_invariants(torch.linalg.inv(X) @ H @ X)
    torch.testing.assert_close(before, after, rtol=1e-7, atol=1e-9)
    assert before[0].shape == shape


@pytest.mark.parametrize("theta", [1e-9, 1e-4, 0.3, 3.0, math.pi - 1e-7])
def test_invariants_are_the_angle_and_the_screw(theta):
    axis, t = unit(normal(7, 3)), normal(7, 3, seed=1)
    half = torch.full((7, 1), theta / 2, dtype=DOUBLE)
    found, delta = se3_invariants(motion(torch.cat([half.cos(), half.sin() * axis], -1), t))
    torch.testing.assert_close(found, 2 * half[:, 0], rtol=1e-7, atol=0)
    torch.testing.assert_close(delta, (axis * t).sum(-1), rtol=1e-6, atol=1e-6)


def test_invariants_at_the_ends():
    identity = motion(torch.tensor([1.0, 0, 0, 0], dtype=DOUBLE), normal(3))
    theta, delta = se3_invariants(identity)
    assert theta == 0
    assert delta.isnan()
    turn = motion(torch.tensor([0.0, -0.6, 0.8, 0], dtype=DOUBLE), torch.tensor([1.0, 2.0, 3.0]))
    theta, delta = se3_invariants(turn)
    assert theta.item() == pytest.approx(math.pi)
    assert delta.item() == pytest.approx(0.6 - 1.6)  # the axis is (0.6, -0.8, 0)
    small = motion(torch.tensor([1.0, 1e-5, 0, 0], dtype=DOUBLE), normal(3))
    assert se3_invariants(small)[1].isfinite()
    assert se3_invariants(small, tol=1e-4)[1].isnan()


def test_invariants_gradients():
    def invariants(q, t):
        last = torch.tensor([[0.0, 0, 0, 1]], dtype=DOUBLE)
        top = torch.cat([quat_to_rot(unit(q)), t[:, None]], -1)
        return se3_invariants(torch.cat([top, last], -2))

    leaves = normal(4).requires_grad_(), normal(3, seed=1).requires_grad_()
    assert gradcheck(invariants, leaves)
    still = torch.eye(4, dtype=DOUBLE).requires_grad_()
    (grad,) = torch.autograd.grad(se3_invariants(still)[0], still)
    assert torch.equal(grad, torch.zeros(4, 4, dtype=DOUBLE))


# --------------------------------------------------------------------------------------------------
# Determinants, null space, decomposition, distance
# --------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(), (1,), (2, 3), (0,)]), st.booleans())
def test_the_three_determinants(seed, shape, apart):
    """det G = -det M = -N det F, and with u as a row +N, for quaternions of any length."""
    q = normal(*shape, 4, seed=seed)
    q1, q2 = normal(*shape, 3, 3, seed=seed + 1), normal(*shape, 3, 3, seed=seed + 2)
    if apart:
        q1, q2 = strided(q1), strided(q2)
    R, size = quat_to_rot(q), (q * q).sum(-1)
    G, M, F_ = (f(R, q1, q2) for f in (sir3_matrix, sir6_matrix, sir2_matrix))
    det = torch.linalg.det
    torch.testing.assert_close(det(M), -det(G), rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(det(G), -size * det(F_), rtol=1e-9, atol=1e-8)
    u = q[..., 1:]
    row = torch.stack([-(u * q1[..., 0, :]).sum(-1), (u * q2[..., 0, :]).sum(-1)], -1)
    with_axis = torch.stack([G[..., 0, :], G[..., 1, :], u], -2)
    planar = torch.stack([F_[..., 0, :], row], -2)
    torch.testing.assert_close(det(with_axis), size * det(planar), rtol=1e-9, atol=1e-8)


def test_the_determinants_vanish_at_the_truth():
    q1, q2, R, _, _ = problems("random", 30, "5p")
    for three in itertools.combinations(range(5), 3):
        for matrix in (sir2_matrix, sir3_matrix, sir6_matrix):
            value = torch.linalg.det(matrix(R, q1[:, three], q2[:, three]))
            assert value.abs().max() < 1e-14
    assert sir3_matrix(R[0], q1, q2).shape == (30, 5, 3)  # broadcasts


@pytest.mark.parametrize(("points", "trace_row"), [(5, False), (4, True), (3, True), (1, False)])
def test_null_space(points, trace_row):
    q1, q2 = normal(2, 3, points, 3), normal(2, 3, points, 3, seed=1)
    basis = essential_nullspace(q1, q2, trace_row=trace_row)
    assert basis.shape == (2, 3, 9 - points - trace_row, 3, 3)
    flat = basis.flatten(-2)
    torch.testing.assert_close(
        flat @ flat.mT, torch.eye(flat.shape[-2]).double().expand(2, 3, -1, -1)
    )
    values = torch.einsum("abni,abkij,abnj->abkn", q2, basis, q1)
    assert values.abs().max() < 1e-13
    if trace_row:
        assert basis.diagonal(dim1=-2, dim2=-1).sum(-1).abs().max() < 1e-14


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(), (1,), (2, 3), (0,)]), st.floats(1e-3, 1e3))
def test_decomposition(seed, shape, scale):
    R, t = quat_to_rot(unit(normal(*shape, 4, seed=seed))), unit(normal(*shape, 3, seed=seed + 1))
    E = hat(t) @ R
    rotations, direction = decompose_essential(-scale * E)
    assert rotations.shape == (*shape, 2, 3, 3)
    nearest = (rotations - R[..., None, :, :]).abs().amax((-1, -2)).amin(-1)
    assert (nearest < 1e-12).all()
    assert (torch.linalg.cross(direction, t).norm(dim=-1) < 1e-12).all()
    twin = 2 * t[..., :, None] * t[..., None, :] - torch.eye(3, dtype=DOUBLE)
    other = (rotations - (twin @ R)[..., None, :, :]).abs().amax((-1, -2)).amin(-1)
    assert (other < 1e-12).all()


def test_decomposition_gradients():
    def parts(q, t):
        return decompose_essential(hat(unit(t)) @ quat_to_rot(unit(q)))

    leaves = normal(2, 4).requires_grad_(), normal(2, 3, seed=1).requires_grad_()
    assert gradcheck(parts, leaves)


@pytest.mark.parametrize("spherical", [False, True])
def test_sampson_distance_is_value_over_slope(spherical):
    E, q1, q2 = normal(2, 1, 3, 3), normal(2, 4, 5, 3, seed=1), normal(2, 4, 5, 3, seed=2)
    if not spherical:
        q1, q2 = q1.abs() + 0.1, q2.abs() + 0.1
    found = sampson_distance(E, q1, q2, spherical=spherical)
    squared = sampson_distance(E, q1, q2, spherical=spherical, squared=True)
    assert found.shape == (2, 4, 5)
    torch.testing.assert_close(found**2, squared)
    place = unit if spherical else lambda q: q / q[..., 2:]
    p = torch.cat([place(q1), place(q2)], -1).requires_grad_()
    value = torch.einsum("abni,abij,abnj->abn", p[..., 3:], E.expand(2, 4, 3, 3), p[..., :3])
    (slope,) = torch.autograd.grad(value.sum(), p)
    halves = [slope[..., :3], slope[..., 3:]]
    if spherical:  # without the part along the bearing
        bearings = [p[..., :3], p[..., 3:]]
        halves = [
            s - (s * b).sum(-1, keepdim=True) * b for s, b in zip(halves, bearings, strict=True)
        ]
    else:
        halves = [s[..., :2] for s in halves]
    length = torch.cat(halves, -1).norm(dim=-1)
    torch.testing.assert_close(found, (value.abs() / length).detach())
    torch.testing.assert_close(sampson_distance(-7 * E, 2 * q1, 3 * q2, spherical=spherical), found)


def test_sampson_distance_degenerates():
    E = hat(torch.tensor([1.0, 0, 0], dtype=DOUBLE)).requires_grad_()
    q = torch.tensor([[0.2, 0.3, 1.0], [0.0, 0.0, 1.0]], dtype=DOUBLE)
    distance = sampson_distance(E, q, q)
    assert torch.equal(distance, torch.zeros(2, dtype=DOUBLE))
    (grad,) = torch.autograd.grad(distance.sum(), E)
    assert torch.equal(grad, torch.zeros(3, 3, dtype=DOUBLE))
    assert torch.equal(sampson_distance(torch.zeros(3, 3), q, q), torch.zeros(2, dtype=DOUBLE))
    assert sampson_distance(torch.eye(3), q[:0], q[:0]).shape == (0,)
    other = q + 0.1 * normal(2, 3).abs()
    assert gradcheck(
        lambda e: sampson_distance(e, q, other, squared=True), (normal(3, 3).requires_grad_(),)
    )


# --------------------------------------------------------------------------------------------------
# Solvers: the truth is found
# --------------------------------------------------------------------------------------------------


@solvers
@pytest.mark.parametrize("kind", KINDS)
def test_finds_the_truth(solver, kind):
    if kind == "no rotation" and solver in ("4p_ra", "3p_ra_st0"):
        return  # an angle of 0 is refused; tested below
    q1, q2, R, t, theta = problems(kind, 120, solver, seed=3)
    found = solve(solver, q1, q2, theta)
    assert all(x.isfinite().all() for x in found[:3])
    error = errors(found, R, t).amin(1)
    assert error.median() < 1e-13
    assert error.max() < 1e-6
    # The sample lies in front, so the truth is not among those behind.
    assert torch.where(found.in_front, errors(found, R, t), math.inf).amin(1).max() < 1e-6


@solvers
def test_candidates_are_what_they_say(solver):
    q1, q2, _, _, theta = problems("any angle", 60, solver, seed=5)
    found = solve(solver, q1, q2, theta)
    assert found.R.shape == (60, COUNTS[solver], 3, 3)
    assert found.valid.shape == found.in_front.shape == found.t.shape[:2] == found.E.shape[:2]
    v = found.valid
    assert torch.equal(v, v.sort(dim=1, descending=True, stable=True)[0])  # valid ones first
    assert not (found.in_front & ~v).any()
    eye = torch.eye(3, dtype=DOUBLE)
    assert torch.equal(found.R[~v], eye.expand(int((~v).sum()), 3, 3))
    assert not found.t[~v].any()
    assert not found.E[~v].any()
    torch.testing.assert_close(found.R @ found.R.mT, eye.expand_as(found.R))
    torch.testing.assert_close(found.E, hat(found.t) @ found.R)
    torch.testing.assert_close(found.t.norm(dim=-1), v.double())
    value = torch.einsum("bni,bkij,bnj->bkn", q2, found.E, q1)
    assert value.abs().max() < 1e-10
    quaternion = module._quaternion(found.R)
    if solver in PLANAR:
        assert (quaternion[..., 1:] * found.t).sum(-1).abs().max() < 1e-10
    if solver not in ("5p", "4p_st0"):
        angle = 2 * torch.atan2(quaternion[..., 1:].norm(dim=-1), quaternion[..., 0])
        assert (angle - theta[:, None])[v].abs().max() < 1e-10
    # In front: depths along both bearings, by least squares, are positive.
    rays = torch.stack([q1[:, None] @ found.R.mT, -q2[:, None].expand(-1, v.shape[1], -1, -1)], -1)
    depths = torch.linalg.lstsq(rays, -found.t[..., None, :, None].expand(*rays.shape[:3], 3, 1))[0]
    ahead = (depths > 0).all(-1).all(-1).all(-1)
    assert torch.equal(ahead[v], found.in_front[v])


def test_translation_only():
    q1, q2, _, t, _ = problems("no rotation", 200, "2p_to")
    found = solve_translation_only(q1, q2)
    assert found.R.shape == (200, 1, 3, 3)
    assert found.valid.all()
    assert found.in_front.all()
    torch.testing.assert_close(found.t[:, 0], t, rtol=0, atol=1e-9)
    assert solve_translation_only(q1[0], q2[0]).t.shape == (1, 3)
    for a, b in ((q1, q1), (q1[:, [0, 0]], q2[:, [0, 0]])):  # no parallax, one point twice
        none = solve_translation_only(a, b)
        assert not none.valid.any()
        assert not none.t.any()


# --------------------------------------------------------------------------------------------------
# Solvers: all roots, against a peer, oracles and the printed equations
# --------------------------------------------------------------------------------------------------


def polished_essential(E, q1, q2):
    """Gauss-Newton on Eqs. 7, 18 and 19, independently of the package. Returns E and the residual."""

    def constraints(e, a, b):
        E = e.view(3, 3)
        square = E @ E.T
        nine = (2 * square @ E - square.trace() * E).flatten()
        rows = (b * (a @ E.T)).sum(-1)
        return torch.cat([nine, rows, torch.linalg.det(E)[None], (e @ e - 2)[None]])

    e = E.flatten(1)
    slope = vmap(jacrev(constraints))
    for _ in range(40):
        value = vmap(constraints)(e, q1, q2)
        e = e - (torch.linalg.pinv(slope(e, q1, q2)) @ value[..., None])[..., 0]
    return e.view(-1, 3, 3), vmap(constraints)(e, q1, q2).abs().amax(-1)


def test_five_point_finds_the_essential_matrices_that_kornia_finds():
    epipolar = pytest.importorskip("kornia.geometry.epipolar")
    q1, q2, *_ = problems("random", 100, "5p", seed=12)
    theirs = epipolar.find_essential(q1[..., :2] / q1[..., 2:], q2[..., :2] / q2[..., 2:])
    ours = solve_five_point(q1, q2)
    same = 0
    for E, found, valid in zip(theirs, ours.E / 2**0.5, ours.valid, strict=True):
        E, found = E[~E.isnan().any(-1).any(-1)], found[valid]
        assert len(found)
        if len(E) != len(found):  # a double root is one or two, or none, by its rounding
            continue
        away = torch.stack([found[:, None] - E, found[:, None] + E]).abs().amax((-1, -2)).amin(0)
        same += bool(away.amin(0).max() < 1e-6) and bool(away.amin(1).max() < 1e-6)
    assert same >= 95


@pytest.mark.parametrize(
    ("kind", "noise"), [("random", 0.0), ("random", 3e-3), ("planar scene", 0.0)]
)
def test_five_point_finds_every_root_that_poselib_finds(kind, noise):
    q1, q2, *_ = problems(kind, 300, "5p", seed=8)
    q1 = unit(q1 + noise * normal(*q1.shape, seed=1))
    q2 = unit(q2 + noise * normal(*q2.shape, seed=2))
    ours = solve_five_point(q1, q2)
    theirs, which = [], []
    for i, (a, b) in enumerate(zip(q1.numpy(), q2.numpy(), strict=True)):
        for E in poselib.essential_matrix_5pt(a, b):
            theirs.append(torch.from_numpy(E.copy()))
            which.append(i)
    E = torch.stack(theirs)
    E = E * (2**0.5 / E.flatten(1).norm(dim=-1))[:, None, None]

    def distance(E, which):
        both = torch.stack([ours.E[which] - E[:, None], ours.E[which] + E[:, None]])
        away = both.flatten(-2).norm(dim=-1).amin(0)
        return away.where(ours.valid[which], torch.tensor(math.inf, dtype=DOUBLE)).amin(1)

    which = torch.tensor(which)
    raw = distance(E, which)
    assert raw.median() < (1e-9 if kind == "planar scene" else 1e-11)
    # The peer's roots are not polished: some are off by more than 1e-4. Where they lead to, we were.
    far = raw > 1e-6
    E, residual = polished_essential(E[far], q1[which[far]], q2[which[far]])
    good = residual < 1e-12
    assert good.sum() >= far.sum() - 3
    assert distance(E, which[far])[good].max() < 1e-5
    peer = torch.bincount(which, minlength=300)
    assert (ours.valid.sum(1) >= peer).double().mean() > 0.99


def test_five_point_pose_is_the_peers():
    """Convention and cheirality: the same poses as PoseLib, which keeps those with all points in front."""
    q1, q2, R, t, _ = problems("random", 60, "5p", seed=9)
    ours, truths = solve_five_point(q1, q2), 0
    for i in range(60):
        for pose in poselib.relpose_5pt(q1[i].numpy(), q2[i].numpy()):
            a, b = torch.from_numpy(pose.R.copy()), unit(torch.from_numpy(pose.t.copy()))
            truths += bool((R[i] - a).norm() + (t[i] - b).norm() < 1e-5)
            if residual_of(a, b, q1[i], q2[i]) < 1e-11:
                keep = ours.in_front[i]
                away = (ours.R[i][keep] - a).flatten(1).norm(dim=1)
                assert (away + (ours.t[i][keep] - b).norm(dim=1)).min() < 1e-4
    assert truths >= 57  # its least accurate roots are off by more


def residual_of(R, t, q1, q2):
    return (q2 * (q1 @ (hat(t) @ R).T)).sum(-1).abs().max()


@pytest.mark.parametrize("solver", ["4p_st0", "4p_ra", "3p_ra_st0"])
def test_finds_every_root_that_many_starts_find(solver):
    """Gauss-Newton from 150 random poses a problem, with a rotation vector and autograd's slopes."""
    count, starts = 6, 150
    q1, q2, _, _, theta = problems("any angle", count, solver, seed=12)
    ours = solve(solver, q1, q2, theta)

    def turn(q, x):
        s, u, h = q[0], q[1:], x / 2
        return unit(torch.cat([(s - h @ u)[None], u + s * h + torch.linalg.cross(h, u)]))

    def constraints(x, q, t, a, b, angle):
        q, t = turn(q, x[:3]), unit(t + x[3:])
        values = [(b * (a @ (hat(t) @ quat_to_rot_plain(q)).T)).sum(-1)]
        if solver != "4p_st0":
            values.append((q[0] ** 2 - (angle / 2).cos() ** 2)[None])
        if solver in PLANAR:
            values.append((q[1:] @ t)[None])
        return torch.cat(values)

    which = torch.arange(count).repeat_interleave(starts)
    q, t = unit(normal(count * starts, 4)), unit(normal(count * starts, 3, seed=1))
    data = q1[which], q2[which], theta[which]
    for _ in range(25):
        x = torch.zeros(count * starts, 6, dtype=DOUBLE)
        value = vmap(constraints)(x, q, t, *data)
        slope = vmap(jacrev(constraints))(x, q, t, *data)
        step = -(torch.linalg.pinv(slope, rtol=1e-9) @ value[..., None])[..., 0]
        step = step * (0.5 / step.norm(dim=-1).clamp(min=1e-9)).clamp(max=1)[:, None]
        q, t = vmap(turn)(q, step[:, :3]), unit(t + step[:, 3:])
    size = value.abs().amax(-1)
    done = (size < 1e-13) & (step.norm(dim=-1) < 1e-8)
    if solver != "4p_st0":  # rotations by the full angle less theta solve it as well
        done &= (q[:, 0].abs() - (theta[which] / 2).cos()).abs() < 1e-9
    R, E = quat_to_rot(q), hat(t) @ quat_to_rot(q)
    assert done.sum() > 100
    away = (ours.R[which] - R[:, None]).flatten(-2).norm(dim=-1)
    both = torch.stack([ours.E[which] - E[:, None], ours.E[which] + E[:, None]])
    away = away + both.flatten(-2).norm(dim=-1).amin(0)
    away = away.where(ours.valid[which], torch.tensor(math.inf, dtype=DOUBLE)).amin(1)
    assert away[done].max() < 1e-5


def quat_to_rot_plain(q):
    """Eq. 1 without checks, which look at values and so cannot run under vmap."""
    s, u = q[0], q[1:]
    return 2 * (torch.outer(u, u) + s * hat(u)) + (s * s - u @ u) * torch.eye(3, dtype=DOUBLE)


@solvers
@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 2**31), shape=st.sampled_from([(), (1,), (3,), (2, 2)]), apart=st.booleans()
)
def test_equals_the_printed_equations(solver, seed, shape, apart):
    q1, q2, _, _, theta = problems("any angle", math.prod(shape), solver, seed=seed)
    theta = theta.clamp(0.3, 2.8).reshape(shape)
    q1, q2 = (x.reshape(*shape, *x.shape[1:]) for x in (q1, q2))
    if apart:
        q1, q2 = strided(q1), strided(q2)
    # With the angle changed these are problems like any other: there is no truth, but roots there are.
    leaves = [x.clone().requires_grad_() for x in (q1, q2)]
    fast = solve(solver, *leaves, theta)
    slow = solve(solver, *leaves, theta, backend="reference")
    assert fast.R.shape == slow.R.shape == (*shape, COUNTS[solver], 3, 3)
    away = (fast.R[..., :, None, :, :] - slow.R[..., None, :, :, :]).flatten(-2).norm(dim=-1)
    E = [x.E.flatten(-2) for x in (fast, slow)]
    signs = [(E[0][..., :, None, :] - s * E[1][..., None, :, :]).norm(dim=-1) for s in (1, -1)]
    away = away + torch.minimum(*signs)
    # The printed equations are not polished, and lose roots that almost coincide.
    none = ~(fast.valid[..., :, None] & slow.valid[..., None, :])
    away = away.masked_fill(none, math.inf)
    mine, other = away.amin(-1)[fast.valid], away.amin(-2)[slow.valid]
    assert (other < 1e-4).double().mean() > 0.9 or len(other) < 4
    assert (mine < 1e-4).double().mean() > 0.8 or len(mine) < 4
    near = away.argmin(-1)
    sure = (away.amin(-1) < 1e-9) & fast.valid
    if not sure.any():
        return
    # Where they found the same root, their gradients are the same too.
    grads = []
    index = near[..., None, None].expand(*near.shape, 3, 3)
    for E in (fast.E, slow.E.gather(-3, index)):
        flat = E[sure].flatten(1)
        grads.append(
            torch.autograd.grad(
                (flat * flat.detach()[:, [2, 0, 1, 5, 3, 4, 8, 6, 7]]).sum(), leaves
            )
        )
    for a, b in zip(*grads, strict=True):
        scale = float(a.abs().max()) + 1
        assert float((a - b).abs().max()) < 1e-3 * scale


@solvers
def test_gradients_by_finite_differences(solver):
    q1, q2, R, t, theta = problems("any angle", 1, solver, seed=4)

    def nearest(a, b, angle):
        found = solve(solver, a, b, angle)
        best = errors(found, R, t).detach().argmin(1)
        rows = torch.arange(1)
        return found.R[rows, best], found.t[rows, best], found.E[rows, best]

    leaves = [x.clone().requires_grad_() for x in (q1, q2, theta)]
    assert gradcheck(nearest, leaves, eps=1e-7, atol=1e-4, rtol=1e-4)


def test_translation_only_gradients():
    q1, q2, *_ = problems("no rotation", 3, "2p_to", seed=4)
    leaves = [q1.requires_grad_(), q2.requires_grad_()]
    assert gradcheck(lambda a, b: solve_translation_only(a, b).t, leaves, eps=1e-7, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Solvers: invariances, precision, degenerate input
# --------------------------------------------------------------------------------------------------


def same_roots(a, b, tolerance=1e-6):
    """The same candidates in any order, but for a few that almost coincide with another."""
    away = (a.R[:, :, None] - b.R[:, None]).flatten(-2).norm(dim=-1)
    if a.R.shape[1] == 10:  # where no pose has more points in front the choice may change
        away = away * (a.in_front[:, :, None] | b.in_front[:, None])
    signs = [(a.t[:, :, None] - s * b.t[:, None]).norm(dim=-1) for s in (1, -1)]
    away = away + torch.minimum(*signs)
    away = away.masked_fill(~(a.valid[:, :, None] & b.valid[:, None]), math.inf)
    found = (away.amin(2) < tolerance) | ~a.valid
    also = (away.amin(1) < tolerance) | ~b.valid
    return found.double().mean() > 0.995 and also.double().mean() > 0.995


@solvers
def test_changes_of_frame(solver):
    """Order and length of bearings do not matter; turning the cameras turns the pose."""
    q1, q2, _, _, theta = problems("random", 60, solver, seed=6)
    found = solve(solver, q1, q2, theta)
    order = torch.randperm(POINTS[solver], generator=seeded())
    scale = normal(60, POINTS[solver], 1).abs() + 0.1
    assert same_roots(found, solve(solver, 3 * (scale * q1)[:, order], q2[:, order], theta))
    A, B = quat_to_rot(unit(normal(2, 60, 4)))
    if solver != "5p":
        B = A  # an invariant stays one if both cameras turn alike: the mount
    turned = solve(solver, q1 @ A.mT, q2 @ B.mT, theta)
    back = turned._replace(
        R=B[:, None].mT @ turned.R @ A[:, None], t=(turned.t[:, :, None] @ B[:, None])[:, :, 0]
    )
    assert same_roots(found, back)


@solvers
def test_shapes_dtypes_and_autocast(solver):
    q1, q2, _, _, theta = problems("random", 6, solver, seed=7)
    found = solve(solver, q1, q2, theta)
    single = solve(solver, q1[0], q2[0], float(theta[0]))
    grid = solve(solver, q1.view(2, 3, -1, 3), q2.view(2, 3, -1, 3), theta.view(2, 3))
    empty = solve(solver, q1[:0], q2[:0], theta[:0])
    for name in found._fields:
        whole = getattr(found, name)
        torch.testing.assert_close(getattr(single, name), whole[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(getattr(grid, name), whole.view(2, 3, *whole.shape[1:]))
        assert getattr(empty, name).shape == (0, *whole.shape[1:])
    half = solve(solver, q1.float(), q2.float(), theta.float())
    assert half.R.dtype == DOUBLE
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(solve(solver, q1, q2, theta), found)


def test_works_under_compile():
    q1, q2, _, _, theta = problems("random", 4, "3p_ra_st0", seed=7)

    def pose(a, b, angle):
        return solve_known_angle(a, b, angle, planar=True).E * 2

    compiled = torch.compile(pose, backend="eager")
    torch.testing.assert_close(compiled(q1, q2, theta), pose(q1, q2, theta))


@solvers
def test_a_pure_rotation_has_its_rotation(solver):
    q1, q2, R, _, theta = problems("pure rotation", 50, solver, seed=2)
    q1.requires_grad_()
    found = solve(solver, q1, q2, theta)
    assert torch.equal(found.valid.sum(1), torch.ones(50, dtype=torch.long))
    assert (found.R[:, 0] - R).abs().max() < 1e-12
    assert not found.in_front.any()
    assert (found.t[:, 0].norm(dim=-1) - 1).abs().max() < 1e-12
    if solver in PLANAR:
        axis = module._quaternion(found.R[:, 0])[:, 1:]
        assert (axis * found.t[:, 0]).sum(-1).abs().max() < 1e-12
    (grad,) = torch.autograd.grad(found.E.sum(), q1)
    assert not grad.any()


@solvers
def test_hopeless_samples_are_masked_and_do_not_spread(solver):
    q1, q2, R, t, theta = problems("random", 8, solver, seed=2)
    theta = theta.clamp(min=1e-3)
    q1, q2 = q1.clone(), q2.clone()
    q1[0], q2[0] = q1[0, :1], q2[0, :1]  # one point many times
    q1[1] = unit(torch.tensor([[1.0, 0, 5], [2, 0, 5], [3, 0, 5], [4, 0, 5], [5, 0, 6]]).double())[
        : POINTS[solver]
    ]
    q2[2] = -q1[2]  # a mirror
    q1[3], q2[3] = q1[3] * 1e-100, q2[3] * 1e100
    q1[4, 1] = q1[4, 0]
    q2[4, 1] = q2[4, 0]
    q1.requires_grad_()
    found = solve(solver, q1, q2, theta)
    assert all(x.isfinite().all() for x in found[:3])
    assert errors(found, R, t).amin(1)[5:].max() < 1e-6
    (grad,) = torch.autograd.grad(found.E[3:].square().sum() + found.R[3:].sum(), q1)
    assert grad[5:].isfinite().all()


def test_an_eigenvalue_iteration_that_fails_is_one_problems_matter(monkeypatch):
    q1, q2, R, t, _ = problems("random", 5, "5p", seed=2)
    original, failed = torch.linalg.eig, []

    def eig(matrices):
        if len(matrices) > 1:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        failed.append(len(failed) == 2)
        if failed[-1]:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return original(matrices)

    monkeypatch.setattr(torch.linalg, "eig", eig)
    found = solve_five_point(q1, q2)
    error = errors(found, R, t).amin(1)
    assert error[[0, 1, 3, 4]].max() < 1e-6
    assert found.R.isfinite().all()


def test_the_size_of_a_chunk_does_not_matter(monkeypatch):
    q1, q2, *_ = problems("random", 7, "5p", seed=2)
    whole = solve_five_point(q1, q2)
    monkeypatch.setattr(module, "_CHUNK", 3)
    torch.testing.assert_close(solve_five_point(q1, q2), whole, rtol=1e-7, atol=1e-7)


@solvers
def test_when_starts_leave_the_loop_does_not_matter(solver, monkeypatch):
    q1, q2, _, _, theta = problems("random", 40, solver, seed=2)
    together = solve(solver, q1, q2, theta)
    monkeypatch.setattr(module, "_WORTH", 0)
    alone = solve(solver, q1, q2, theta)
    assert torch.equal(alone.valid, together.valid)
    assert same_roots(alone, together, tolerance=1e-9)


def test_tables_made_in_inference_mode_serve_gradients():
    q1, q2, _, _, theta = problems("random", 2, "3p_ra_st0", seed=7)
    module._newton_tables.cache_clear()
    module._rotation_table.cache_clear()
    with torch.inference_mode():
        solve_known_angle(q1, q2, theta, planar=True)
    theta.requires_grad_()
    found = solve_known_angle(q1, q2, theta, planar=True)
    (grad,) = torch.autograd.grad(found.R.diagonal(dim1=-2, dim2=-1).sum(), theta)
    assert grad.all()


# --------------------------------------------------------------------------------------------------
# Counts of solutions
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("points", "count"), [(3, 12), (4, 10)])
def test_number_of_solutions_over_a_prime_field(points, count):
    """3P-RA-ST0 (quaternion, known angle) has 12 solutions, 4P-ST0 (Cayley) 10: Table 3."""
    prime, draw = 32003, torch.randint(1, 32003, (2, points, 3), generator=seeded(1)).tolist()
    u = sp.Matrix(sp.symbols("alpha beta gamma"))
    s = 1234 if points == 3 else 1
    R = 2 * (u * u.T - s * u.hat()) + (s**2 - u.dot(u)) * sp.eye(3)
    p, q = ([sp.Matrix(v) for v in side] for side in draw)

    def row(i, j):
        return sp.Matrix([[q[j].dot(R * p[i].cross(p[j])), q[i].cross(q[j]).dot(R * p[j])]])

    triples, pairs = (list(itertools.combinations(range(points), k)) for k in (3, 2))
    system = [row(i, j).col_join(row(i, k)).det() for i, j, k in triples]
    system += [row(i, j).col_join(sp.Matrix([[-u.dot(p[i]), u.dot(q[i])]])).det() for i, j in pairs]
    if points == 3:
        system.append(u.dot(u) + s**2 - 1)
    basis = sp.groebner([sp.expand(e) for e in system], *u, modulus=prime, order="grevlex")
    lead = [sp.Poly(g, *u, modulus=prime).monoms(order="grevlex")[0] for g in basis.exprs]
    free = [
        m
        for m in itertools.product(range(10), repeat=3)
        if not any(all(a >= b for a, b in zip(m, n, strict=True)) for n in lead)
    ]
    assert len(free) == count


# --------------------------------------------------------------------------------------------------
# RANSAC
# --------------------------------------------------------------------------------------------------


def scenes(solver, batch=3, count=40, wrong=10, noise=0.0, kind="random", seed=0):
    """Many points with one motion each, of which the first ``wrong`` are mismatched."""
    pieces = [problems(kind, count, solver, seed=seed + 10 * b) for b in range(batch)]
    q1 = torch.stack([p[0][:, 0] for p in pieces])
    R, t, theta = (torch.stack([p[k][0] for p in pieces]) for k in (2, 3, 4))
    depth = 4 + 16 * torch.rand(batch, count, 1, generator=seeded(seed), dtype=DOUBLE)
    second = (q1 * depth) @ R.mT + t[:, None]
    second = second / second[..., 2:]
    second[:, :wrong] = second[:, :wrong].roll(1, 1)
    second[..., :2] += noise * normal(batch, count, 2, seed=seed)
    return q1 / q1[..., 2:], second, R, t, theta


@solvers
def test_ransac_finds_pose_and_inliers(solver):
    q1, q2, R, t, theta = scenes(solver)
    angle = theta if solver in ("4p_ra", "3p_ra_st0") else None
    for spherical in (False, True):
        found = ransac_relative_pose(
            q1,
            q2,
            solver=solver,
            theta=angle,
            samples=50,
            threshold=1e-6,
            spherical=spherical,
            generator=seeded(),
        )
        assert found.valid.all()
        assert not found.fallback.any()
        assert (found.R - R).abs().max() < 1e-6
        assert (found.t - t).abs().max() < 1e-6
        assert found.inliers[:, 10:].all()
        assert found.inliers.double().mean() < 0.85
        torch.testing.assert_close(found.E, hat(found.t) @ found.R)
        square = sampson_distance(found.E, q1, q2, squared=True, spherical=spherical).clamp(
            max=1e-12
        )
        torch.testing.assert_close(found.cost, square.sum(-1))
        torch.testing.assert_close(found.inliers, square < 1e-12)


def test_ransac_chunks_seeds_and_shapes(monkeypatch):
    q1, q2, *_ = scenes("4p_st0", noise=1e-3)

    def run(a, b):
        return ransac_relative_pose(a, b, solver="4p_st0", samples=20, generator=seeded(1))

    whole = run(q1, q2)
    assert all(torch.equal(a, b) for a, b in zip(run(q1, q2), whole, strict=True))
    monkeypatch.setattr(module, "_RESIDUALS", 100)
    for a, b in zip(run(q1, q2), whole, strict=True):
        torch.testing.assert_close(a, b)
    single = run(q1[0], q2[0])
    assert single.R.shape == (3, 3)
    assert single.valid.shape == ()
    nested = run(q1[None], q2[None])
    torch.testing.assert_close(nested.E[0], whole.E)
    empty = run(q1[:0], q2[:0])
    assert empty.inliers.shape == (0, 40)


def test_ransac_decides_the_sign_by_all_inliers():
    q1, q2, R, t, _ = scenes("5p", batch=20, wrong=5, noise=2e-3, kind="forward")
    found = ransac_relative_pose(q1, q2, samples=40, generator=seeded())
    assert ((found.t * t).sum(-1) > 0.9).all()
    assert ((found.R - R).abs().amax((-1, -2)) < 0.2).all()


def test_ransac_falls_back_where_nothing_rotates():
    q1, q2, _, t, _ = scenes("4p_st0", batch=12, noise=1e-3, kind="no rotation")
    alone = ransac_relative_pose(
        q1, q2, solver="4p_st0", samples=40, fallback_samples=0, generator=seeded()
    )
    helped = ransac_relative_pose(q1, q2, solver="4p_st0", samples=40, generator=seeded())
    assert not alone.fallback.any()
    assert helped.fallback.double().mean() > 0.5
    off = [1 - (e.t * t).sum(-1).abs().mean() for e in (helped, alone)]
    assert off[0] < off[1]
    only = ransac_relative_pose(q1, q2, solver="2p_to", samples=40, generator=seeded())
    assert torch.equal(only.R, torch.eye(3, dtype=DOUBLE).expand(12, 3, 3))
    assert not only.fallback.any()


def test_ransac_without_any_root():
    q = torch.tensor([[0.0, 0.0, 1.0]]).repeat(9, 1)
    found = ransac_relative_pose(q, q, solver="2p_to", threshold=0.1)
    assert not found.valid
    assert torch.equal(found.R, torch.eye(3, dtype=DOUBLE))
    assert not found.t.any()
    assert not found.inliers.any()
    assert found.cost.item() == pytest.approx(9 * 0.01)


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------

FIVE, FOUR, THREE = normal(2, 5, 3), normal(2, 4, 3), normal(2, 3, 3)
BAD = FIVE.clone()
BAD[0, 0, 0] = math.nan
ZERO = FIVE.clone()
ZERO[1, 2] = 0
FRONT = FIVE.abs() + 0.1


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "v: expected a torch.Tensor", lambda: hat([1.0, 2.0, 3.0])),
        (TypeError, "v: expected a floating", lambda: hat(torch.ones(3, dtype=torch.long))),
        (ValueError, "v: expected shape", lambda: hat(torch.ones(4))),
        (ValueError, "q: expected shape", lambda: quat_to_rot(torch.ones(3))),
        (ValueError, "q: expected finite", lambda: quat_to_rot(torch.full((4,), math.inf))),
        (ValueError, "convention: expected", lambda: quat_to_rot(torch.ones(4), convention="left")),
        (ValueError, "v: expected shape", lambda: cayley_to_rot(torch.ones(4))),
        (ValueError, "convention: expected", lambda: cayley_to_rot(torch.ones(3), convention=0)),
        (ValueError, "H: expected at least 2", lambda: se3_invariants(torch.ones(4))),
        (ValueError, "H: expected shape", lambda: se3_invariants(torch.eye(3))),
        (ValueError, "H: expected rotations", lambda: se3_invariants(2 * torch.eye(4))),
        (ValueError, "H: expected rotations", lambda: se3_invariants(torch.diag(torch.tensor([1.0, 1, -1, 1])))),
        (ValueError, r"H: expected \(0, 0", lambda: se3_invariants(torch.eye(4) + torch.eye(4).flip(1).tril(-2))),
        (ValueError, "tol: expected", lambda: se3_invariants(torch.eye(4), tol=-1)),
        (ValueError, "R: expected shape", lambda: sir3_matrix(torch.eye(4), FIVE, FIVE)),
        (ValueError, "R: expected leading", lambda: sir3_matrix(torch.ones(3, 3, 3), FIVE, FIVE)),
        (ValueError, "q1: expected shape", lambda: sir6_matrix(torch.eye(3), FIVE, FIVE)),
        (ValueError, "q1: expected shape", lambda: sir2_matrix(torch.eye(3), FOUR, FOUR)),
        (TypeError, "trace_row: expected", lambda: essential_nullspace(FIVE, FIVE, trace_row=1)),
        (ValueError, "q1: expected at most 8", lambda: essential_nullspace(normal(9, 3), normal(9, 3))),
        (ValueError, "q1: expected at most 7", lambda: essential_nullspace(normal(8, 3), normal(8, 3), trace_row=True)),
        (ValueError, "E: expected shape", lambda: decompose_essential(torch.ones(3, 4))),
        (ValueError, "E: expected matrices", lambda: decompose_essential(torch.zeros(2, 3, 3))),
        (ValueError, "E: expected leading", lambda: sampson_distance(torch.ones(3, 3, 3), FRONT, FRONT)),
        (ValueError, "q2: expected shape", lambda: sampson_distance(torch.eye(3), FRONT, FOUR)),
        (ValueError, "q1: expected points in front", lambda: sampson_distance(torch.eye(3), -FRONT, FRONT)),
        (ValueError, "q2: expected points in front", lambda: sampson_distance(torch.eye(3), FRONT, -FRONT)),
        (ValueError, "q1: expected bearings", lambda: sampson_distance(torch.eye(3), ZERO, FRONT, spherical=True)),
        (TypeError, "squared: expected", lambda: sampson_distance(torch.eye(3), FRONT, FRONT, squared=1)),
        (TypeError, "spherical: expected", lambda: sampson_distance(torch.eye(3), FRONT, FRONT, spherical=1)),
        (ValueError, "q1: expected shape", lambda: solve_five_point(FOUR, FOUR)),
        (ValueError, "q2: expected shape", lambda: solve_five_point(FIVE, FIVE[:1])),
        (ValueError, "q1: expected finite", lambda: solve_five_point(BAD, FIVE)),
        (ValueError, "q2: expected bearings", lambda: solve_five_point(FIVE, ZERO)),
        (ValueError, "q1: expected at least 2", lambda: solve_five_point(FIVE[0, 0], FIVE[0, 0])),
        (TypeError, "q2: expected a torch", lambda: solve_five_point(FIVE, FIVE.numpy())),
        (ValueError, "backend: expected", lambda: solve_five_point(FIVE, FIVE, backend="cuda")),
        (ValueError, "q1: expected shape", lambda: solve_4p_st0(FIVE, FIVE)),
        (ValueError, "backend: expected", lambda: solve_4p_st0(FOUR, FOUR, backend="")),
        (ValueError, "q1: expected shape", lambda: solve_known_angle(FOUR, FOUR, 0.1, planar=True)),
        (ValueError, "q1: expected shape", lambda: solve_known_angle(THREE, THREE, 0.1, planar=False)),
        (TypeError, "planar: expected", lambda: solve_known_angle(FOUR, FOUR, 0.1, planar=None)),
        (ValueError, "backend: expected", lambda: solve_known_angle(FOUR, FOUR, 0.1, planar=False, backend=None)),
        (ValueError, "theta: expected a finite", lambda: solve_known_angle(FOUR, FOUR, 0.0, planar=False)),
        (ValueError, "theta: expected angles", lambda: solve_known_angle(FOUR, FOUR, 3.2, planar=False)),
        (ValueError, "theta: expected angles", lambda: solve_known_angle(FOUR, FOUR, torch.zeros(2), planar=False)),
        (ValueError, "theta: expected finite", lambda: solve_known_angle(FOUR, FOUR, BAD[0, :2, 0], planar=False)),
        (ValueError, "theta: expected a shape", lambda: solve_known_angle(FOUR, FOUR, torch.ones(3), planar=False)),
        (TypeError, "theta: expected", lambda: solve_known_angle(FOUR, FOUR, "1", planar=False)),
        (TypeError, "theta: expected a floating", lambda: solve_known_angle(FOUR, FOUR, torch.tensor(1), planar=False)),
        (ValueError, "q1: expected shape", lambda: solve_translation_only(THREE, THREE)),
        (ValueError, "solver: expected", lambda: ransac_relative_pose(FRONT, FRONT, solver="6p")),
        (ValueError, "q1: expected at least 5", lambda: ransac_relative_pose(FOUR, FOUR)),
        (ValueError, "q1: expected points in", lambda: ransac_relative_pose(-FRONT, FRONT)),
        (ValueError, "q1: expected bearings", lambda: ransac_relative_pose(ZERO, FRONT, spherical=True)),
        (ValueError, "theta: expected an angle", lambda: ransac_relative_pose(FRONT, FRONT, solver="4p_ra")),
        (ValueError, "theta: expected None", lambda: ransac_relative_pose(FRONT, FRONT, theta=0.1)),
        (ValueError, "threshold: expected", lambda: ransac_relative_pose(FRONT, FRONT, threshold=0.0)),
        (ValueError, "samples: expected", lambda: ransac_relative_pose(FRONT, FRONT, samples=0)),
        (TypeError, "samples: expected", lambda: ransac_relative_pose(FRONT, FRONT, samples=2.0)),
        (ValueError, "fallback_samples: expected", lambda: ransac_relative_pose(FRONT, FRONT, fallback_samples=-1)),
        (TypeError, "fallback_samples: expected", lambda: ransac_relative_pose(FRONT, FRONT, fallback_samples=True)),
        (TypeError, "spherical: expected", lambda: ransac_relative_pose(FRONT, FRONT, spherical=None)),
    ],
)  # fmt: skip
def test_bad_input(error, message, call):
    with pytest.raises(error, match="^" + message):
        call()


# --------------------------------------------------------------------------------------------------
# The chapter with profile="full"
# --------------------------------------------------------------------------------------------------


def write_drives(folder, focal=250.0, size=(320, 240)):
    """Write two drives past patterned squares in KITTI's layout, and return their motions.

    A drive has three frames more than 1 m apart, and one between that is not; it turns about the
    vertical axis. A motion is ``(R, t, angle)``: from the first camera's coordinates to the second's.
    """
    random = np.random.default_rng(0)
    points = random.uniform((-12, -8, 8), (12, 8, 30), (900, 3))
    patterns = random.integers(0, 256, (900, 7, 7), dtype=np.uint8)
    motions = []
    (folder / "poses").mkdir()
    for sequence, turn in (("00", 0.02), ("07", -0.03)):
        images = folder / "sequences" / sequence / "image_0"
        images.mkdir(parents=True)
        P0 = [focal, 0, size[0] / 2, 0, 0, focal, size[1] / 2, 0, 0, 0, 1, 0]
        lines = ["P1: " + " ".join(["9"] * 12), "P0: " + " ".join(map(str, P0))]
        (images.parent / "calib.txt").write_text("\n".join(lines) + "\n")
        poses = []
        for frame, way in enumerate((0, 0.4, 1, 2)):
            cos, sin = math.cos(turn * way), math.sin(turn * way)
            rotation = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
            poses.append(np.c_[rotation, [0.1 * way, 0, 1.1 * way]])  # camera to world
            seen, picture = (points - poses[-1][:, 3]) @ rotation, np.zeros(size[::-1], np.uint8)
            for k in np.argsort(-seen[:, 2]):  # the farthest first
                u, v = (focal * seen[k, :2] / seen[k, 2] + np.divide(size, 2)).round().astype(int)
                if 3 < u < size[0] - 4 and 3 < v < size[1] - 4:
                    picture[v - 3 : v + 4, u - 3 : u + 4] = patterns[k]
            Image.fromarray(picture).save(images / f"{frame:06d}.png")
        np.savetxt(folder / "poses" / f"{sequence}.txt", np.reshape(poses, (4, 12)))
        for first, second in ((0, 2), (2, 3)):
            back = poses[second][:, :3].T
            step = back @ (poses[first][:, 3] - poses[second][:, 3])
            motions.append((back @ poses[first][:, :3], step, abs(turn)))
    return [(torch.from_numpy(R), torch.from_numpy(t), angle) for R, t, angle in motions]


def test_full_profile(tmp_path, monkeypatch, capsys):
    """The chapter's cells with ``profile="full"``, made small: they run, and tell the solvers the truth."""
    motions, calls, poses = write_drives(tmp_path), [], []

    def noted(names):
        def invariants(H):
            poses.append(H)
            return se3_invariants(H)

        def ransac(q1, q2, **options):
            found = ransac_relative_pose(q1, q2, **options)
            calls.append((q1, q2, options, found))
            return found

        names["ransac_relative_pose"], names["se3_invariants"] = ransac, invariants

    names, verdicts = run_cells(
        "geometry/se3_relative_pose",
        monkeypatch,
        define=("accuracy", "took", "panels", "arms", "kitti_errors"),
        call=("settle",),
        small={
            "5000 if full else 100": "6 if full else 100",
            "(1, 8, 64, 512, 4096, 16384)": "(1, 2, 3)",
            "200 if full else 20": "4 if full else 20",
            "10 if full else 6": "2 if full else 6",
        },
        after={"ransac_relative_pose": noted},
        data_root=str(tmp_path),
    )

    # KITTI: two pairs of each drive, each to three solvers, with the true rotation and angle.
    drives = [call for call in calls if call[2]["samples"] == 60]
    assert [call[2]["solver"] for call in drives] == ["5p", "4p_st0", "3p_ra_st0"] * 4
    for (R, t, _), H in zip(motions, poses[-4:], strict=True):
        torch.testing.assert_close(H[:3], torch.cat([R, t[:, None]], 1))
        assert H[3].tolist() == [0, 0, 0, 1]
    errors = {"5P": [], "4P-ST0": [], "3P-RA-ST0": []}
    for (R, t, angle), solved in zip(motions, zip(*[iter(drives)] * 3, strict=True), strict=True):
        for name, (q1, q2, options, found) in zip(errors, solved, strict=True):
            assert q1.shape == q2.shape == (len(q1), 3)
            assert len(q1) > 20
            off = sampson_distance(hat(unit(t)) @ R, q1, q2)
            assert off.median() < 1 / 250  # a pixel
            assert options["threshold"] == pytest.approx(2 / 250)
            told = options["theta"]
            if name == "3P-RA-ST0":
                assert told.item() == pytest.approx(angle)
            else:
                assert told is None
            assert found.valid
            errors[name].append(math.degrees(math.acos(min(1, (found.t @ unit(t)).abs().item()))))
    printed = re.findall(r"KITTI, (\S+): median (\S+), mean (\S+) degrees", capsys.readouterr().out)
    assert [name for name, *_ in printed] == list(errors)
    for name, *values in printed:
        expected = np.median(errors[name]), np.mean(errors[name])
        assert [float(v) for v in values] == pytest.approx(expected, abs=0.006)
        assert max(expected) < 15

    # The synthetic pairs: 4 of each of 2 seeds.
    assert all(len(call[0]) == 4 for call in calls if call[2]["samples"] == 40)
    assert all(len(values) == 2 for values in names["results"].values())
    assert all(0 <= v <= 90 for values in names["results"].values() for v in values)
    assert {e.shape for e in names["accuracy"].values()} == {(6,)}
    assert {size for _, size in names["took"]} == {1, 2, 3}
    assert {size for _, size in names["held"]} == {2, 3}
    assert all(v > 0 for v in (*names["took"].values(), *names["held"].values()))
    slugs = [slug for slug, *_ in names["plan"]]
    assert len(slugs) == 6
    assert set(verdicts) >= {
        f"geometry/se3_relative_pose:{slug}" for slug in (*slugs, "noise-free")
    }
    assert set(verdicts.values()) <= set(VERDICTS)
    assert verdicts["geometry/se3_relative_pose:noise-free"] == "measured"

r"""Relative pose of two calibrated views from few points and from what no camera mount can change.

A motion has two numbers that do not depend on the frame in which it is written: its rotation angle
``theta`` and its screw translation ``delta``, the part of its translation along its axis, zero for every
planar motion. Either replaces one point pair of a minimal solver (Li, Martyushev and Lee, "Relative Pose
Estimation of Calibrated Cameras with Known SE(3) Invariants", 2020; equation and table numbers below are
that paper's).

**One convention everywhere.** ``q1`` and ``q2`` are bearings (directions) of the same points in the first
and in the second camera, and a scene point ``X1`` in the first camera's frame is ``X2 = R X1 + t`` in the
second's. Rotations follow the right-hand rule. ``E = hat(t) @ R``, so ``q2 @ E @ q1 = 0``. The paper's
``t`` and its quaternion's ``u`` are minus ours; ``delta`` is the same.

Everything is computed in float64, whatever the input's dtype: single precision is too coarse for the
eigenvalue problems behind these solvers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations, combinations_with_replacement
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from affnb.checks import (
    check_at_least,
    check_finite,
    check_flag,
    check_floating,
    check_integer,
    check_one_of,
    check_positive,
    check_same_device,
    check_shape,
)
from affnb.kernels import uncompiled

__all__ = [
    "PoseCandidates",
    "PoseEstimate",
    "cayley_to_rot",
    "decompose_essential",
    "essential_nullspace",
    "hat",
    "quat_to_rot",
    "ransac_relative_pose",
    "sampson_distance",
    "se3_invariants",
    "sir2_matrix",
    "sir3_matrix",
    "sir6_matrix",
    "solve_4p_st0",
    "solve_five_point",
    "solve_known_angle",
    "solve_translation_only",
]

Convention = Literal["hamilton", "paper"]
Backend = Literal["auto", "reference"]
Solver = Literal["5p", "4p_st0", "4p_ra", "3p_ra_st0", "2p_to"]

_CONVENTIONS, _BACKENDS = ("hamilton", "paper"), ("auto", "reference")

#: Problems solved at a time, and residuals of hypotheses held at a time: they bound the memory.
_CHUNK, _RESIDUALS = 512, 2**18

#: A root is one when its constraints hold to this (radians, for bearings of length 1).
_ZERO = 1e-11
#: Two candidates nearer than this are the same root, found from two starts.
_SAME = 1e-9
#: Below this (radians), the bearings of a sample show no parallax: a rotation alone explains them.
_NEAR = 1e-10
#: Imaginary part, relative to the root, up to which Newton's method tries for a real root near by.
_REAL = 0.1
#: How near theta = pi the polynomial system may come, where its equations become dependent. Newton's
#: method then goes from there to the true angle.
_HALF_TURN = math.pi - 2e-5
#: After a step of Newton's method this small no other is needed. A start that has not halved its error in
#: so many steps has no root near by (at a double root a step makes a quarter of it).
_ARRIVED, _PATIENCE = 1e-8, 5
#: Starts that are done are taken out of the loop when they are more than this: it costs a dozen operations.
_WORTH = 64
#: Below these angles (radians; planar or not) the polynomials of SIR2 are helped by starts near the
#: identity. Without, planar ones begin to lose roots at 1e-7, others at 1e-3 (and a few at any angle).
_SMALL = {True: 1e-5, False: 0.3}
_TINY = 1e-300  # keeps a division by zero finite

P = ParamSpec("P")
T = TypeVar("T")


def _constant(make: Callable[P, T]) -> Callable[P, T]:
    """Keep what a function makes, as ordinary tensors: made in inference mode, autograd could not use them."""
    kept: Any = cache(torch.inference_mode(False)(make))
    result: Callable[P, T] = kept
    return result


class PoseCandidates(NamedTuple):
    """All real solutions of minimal problems, padded to the most that there can be, and a mask.

    Attributes
    ----------
    R, t, E
        float64 ``(..., K, 3, 3)``, ``(..., K, 3)``, ``(..., K, 3, 3)``: rotation, unit translation and
        ``hat(t) @ R``. Where ``valid`` is false they are the identity and zeros.
    valid
        bool ``(..., K)``. Valid candidates come first.
    in_front
        bool ``(..., K)``: all points of the sample lie in front of both cameras.

    Examples
    --------
    Five bearings, seen again after a step to the right:

    >>> q1 = torch.tensor([[0.1, 0.2, 1], [-0.3, 0.1, 1], [0.4, -0.2, 1], [0.2, 0.5, 1], [0, 0, 1]])
    >>> depth = torch.tensor([[3.0], [4.0], [5.0], [3.5], [4.5]])
    >>> q2 = q1 + torch.tensor([1.0, 0, 0]) / depth
    >>> found = solve_five_point(q1.double(), q2.double())
    >>> found.R.shape == (10, 3, 3) and found.valid.shape == (10,)
    True
    >>> turned = (found.R[found.valid] - torch.eye(3)).abs().amax((-2, -1))
    >>> bool(turned.min() < 1e-6)  # one of the candidates does not turn
    True
    """

    R: Tensor
    t: Tensor
    E: Tensor
    valid: Tensor
    in_front: Tensor


class PoseEstimate(NamedTuple):
    """What RANSAC found: the hypothesis of the least cost.

    Attributes
    ----------
    R, t, E
        float64 ``(..., 3, 3)``, ``(..., 3)``, ``(..., 3, 3)``; identity and zeros if no sample had a
        real solution.
    inliers
        bool ``(..., N)``: pairs within the threshold.
    cost
        float64 ``(...)``: sum over pairs of the squared Sampson distance, each at most the squared
        threshold.
    valid
        bool ``(...)``: there is an estimate.
    fallback
        bool ``(...)``: it comes from the translation-only fallback.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> q1 = torch.cat([torch.rand(30, 2, generator=generator) - 0.5, torch.ones(30, 1)], dim=1)
    >>> depth = 2 + 4 * torch.rand(30, 1, generator=generator)
    >>> q2 = q1 + torch.tensor([1.0, 0, 0]) / depth  # a step to the right
    >>> estimate = ransac_relative_pose(q1.double(), q2.double(), threshold=1e-3)
    >>> bool(estimate.valid), int(estimate.inliers.sum())
    (True, 30)
    """

    R: Tensor
    t: Tensor
    E: Tensor
    inliers: Tensor
    cost: Tensor
    valid: Tensor
    fallback: Tensor


# --------------------------------------------------------------------------------------------------
# Rotations and invariants
# --------------------------------------------------------------------------------------------------


def _real(value: Any, name: str, tail: Sequence[int | None]) -> Tensor:
    """Check a floating tensor whose last dimensions are ``tail`` and return it in float64."""
    check_floating(value, name)
    shape = (*value.shape[: max(0, value.ndim - len(tail))], *tail)
    if value.ndim < len(tail):
        raise ValueError(f"{name}: expected at least {len(tail)} dimensions, got {value.ndim}")
    check_shape(value, name, shape)
    check_finite(value, name)
    result: Tensor = value.double()
    return result


def hat(v: Tensor) -> Tensor:
    """Skew-symmetric matrices of the cross product: ``hat(a) @ b`` is ``a x b``.

    Parameters
    ----------
    v
        Floating, ``(..., 3)``.

    Returns
    -------
    Tensor
        ``(..., 3, 3)``, of the same dtype.

    Raises
    ------
    TypeError
        Not a floating-point tensor.
    ValueError
        The last dimension is not 3.

    Notes
    -----
    Time and memory ``O(1)`` a vector.

    Examples
    --------
    >>> hat(torch.tensor([1.0, 2.0, 3.0]))
    tensor([[ 0., -3.,  2.],
            [ 3.,  0., -1.],
            [-2.,  1.,  0.]])
    """
    check_floating(v, "v")
    check_shape(v, "v", (*v.shape[:-1], 3))
    return _hat(v)


def _hat(v: Tensor) -> Tensor:
    x, y, z = v.unbind(-1)
    o = torch.zeros_like(x)
    matrix = torch.stack([o, -z, y, z, o, -x, -y, x, o], -1)
    return matrix.reshape(*matrix.shape[:-1], 3, 3)


def quat_to_rot(q: Tensor, *, convention: Convention = "hamilton") -> Tensor:
    r"""Evaluate Eq. 1, ``2 (u u^T +- s hat(u)) + (s^2 - |u|^2) I``, for quaternions ``(s, u)``.

    Parameters
    ----------
    q
        Floating, ``(..., 4)``: the scalar part ``s`` first. Not normalised here: for a quaternion that is
        not of length 1 the result is ``s^2 + |u|^2`` times a rotation (that factor is what the book's
        chapter follows through the determinants).
    convention
        ``"hamilton"`` (default): the plus sign, a rotation by the right-hand rule about ``u``.
        ``"paper"``: the minus sign of Eq. 1, its transpose.

    Returns
    -------
    Tensor
        float64 ``(..., 3, 3)``.

    Raises
    ------
    TypeError
        Not a floating-point tensor.
    ValueError
        A wrong shape, values that are not finite, an unknown convention.

    Notes
    -----
    Time and memory ``O(1)`` a quaternion. Differentiable everywhere.

    Examples
    --------
    >>> quat_to_rot(torch.tensor([1.0, 0.0, 0.0, 1.0])) / 2  # a quarter turn about z takes x to y
    tensor([[ 0., -1.,  0.],
            [ 1.,  0.,  0.],
            [ 0.,  0.,  1.]], dtype=torch.float64)
    """
    check_one_of(convention, "convention", _CONVENTIONS)
    R = _rotation(_real(q, "q", (4,)))
    return R if convention == "hamilton" else R.mT


def _rotation(q: Tensor) -> Tensor:
    return _folded(_outer(q, q) @ _rotation_table(q.device).to(q.dtype), 3)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """All products of an entry of ``a`` and one of ``b``, in one last dimension."""
    return (a[..., :, None] * b[..., None, :]).flatten(-2)


def _folded(x: Tensor, columns: int) -> Tensor:
    """The last dimension as rows of so many columns."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // columns, columns)


@_constant
def _rotation_table(device: torch.device) -> Tensor:
    """Eq. 1 as a table, (16, 9): how often each product of two of (s, u) is in each entry of R."""
    s, x, y, z = torch.eye(4, dtype=torch.float64)
    a, b, c, d = (_outer(v, v) for v in (s, x, y, z))

    def twice(a: Tensor, b: Tensor) -> Tensor:
        return _outer(a, b) + _outer(b, a)

    rows = [
        a + b - c - d, twice(x, y) - twice(s, z), twice(x, z) + twice(s, y),
        twice(x, y) + twice(s, z), a - b + c - d, twice(y, z) - twice(s, x),
        twice(x, z) - twice(s, y), twice(y, z) + twice(s, x), a - b - c + d,
    ]  # fmt: skip
    return torch.stack(rows, -1).to(device)


def _eye(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)


def cayley_to_rot(v: Tensor, *, convention: Convention = "hamilton") -> Tensor:
    r"""Rotations by the Cayley transform (Eq. 4), for vectors of length ``tan(theta / 2)``.

    Parameters
    ----------
    v
        Floating, ``(..., 3)``: the axis times ``tan(theta / 2)``. No vector gives a half-turn.
    convention
        ``"hamilton"`` (default): right-hand rule. ``"paper"``: Eq. 4, its transpose.

    Returns
    -------
    Tensor
        float64 ``(..., 3, 3)``.

    Raises
    ------
    TypeError
        Not a floating-point tensor.
    ValueError
        A wrong shape, values that are not finite, an unknown convention.

    Notes
    -----
    Time and memory ``O(1)`` a vector. Differentiable everywhere.

    Examples
    --------
    >>> R = cayley_to_rot(torch.tensor([0.0, 0.0, 1.0]))  # a quarter turn about z
    >>> torch.allclose(R, torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]).double())
    True
    """
    v = _real(v, "v", (3,))
    q = torch.cat([torch.ones_like(v[..., :1]), v], -1)
    return quat_to_rot(q, convention=convention) / (q * q).sum(-1)[..., None, None]


def _quaternion(R: Tensor) -> Tensor:
    """Unit quaternion q with a scalar part of at least 0 of a (nearly) rotation matrix.

    Each entry of ``4 q q^T - I`` is a sum of entries of R: the table of Eq. 1 read the other way.
    """
    table = R.flatten(-2) @ _rotation_table(R.device).to(R.dtype).mT
    q = _direction(_folded(table, 4) + _eye(4, R))
    return torch.where(q[..., :1] < 0, -q, q)


def _direction(matrices: Tensor) -> Tensor:
    """Unit vectors v of matrices near a multiple of v v^T: of their rows that of the largest diagonal entry."""
    best = matrices.detach().diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
    rows = matrices.gather(-2, best.expand(*best.shape[:-1], matrices.shape[-1]))
    return _unit(rows[..., 0, :])


def _unit(v: Tensor) -> Tensor:
    unit: Tensor = v / torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp(min=_TINY)
    return unit


def se3_invariants(H: Tensor, *, tol: float = 1e-12) -> tuple[Tensor, Tensor]:
    r"""Rotation angle and screw translation of rigid motions (Eqs. 3 and 8), the same in every frame.

    Parameters
    ----------
    H
        Floating, ``(..., 4, 4)``: ``[[R, t], [0, 1]]``.
    tol
        Angles (radians) below this have no axis. Default 1e-12.

    Returns
    -------
    theta : Tensor
        float64 ``(...)``: radians, in [0, pi].
    delta : Tensor
        float64 ``(...)``: the translation along the axis, ``r^T t`` with the axis ``r`` by the
        right-hand rule for ``theta``, in the unit of ``t``. NaN where ``theta < tol``, since a
        translation alone has no axis. Of a half-turn only ``|delta|`` is defined; the sign is then that
        of the axis whose first component that is not 0 is positive.

    Raises
    ------
    TypeError
        Not a floating-point tensor, ``tol`` not a number.
    ValueError
        A wrong shape, values that are not finite, ``R`` not a rotation to 1e-6, a last row other than
        (0, 0, 0, 1), ``tol`` negative.

    Notes
    -----
    The angle is ``2 atan2(|u|, s)`` of the quaternion ``(s, u)``, exact to rounding for small angles and
    half-turns alike, where an arc cosine of the trace loses half of the digits. Differentiable where
    ``tol <= theta < pi``; the gradient is 0 where ``theta < tol``. Time and memory ``O(1)`` a motion.

    Examples
    --------
    >>> H = torch.eye(4)
    >>> H[:3, :3] = quat_to_rot(torch.tensor([0.8, 0.0, 0.0, 0.6]))
    >>> H[:3, 3] = torch.tensor([1.0, 2.0, 3.0])
    >>> theta, delta = se3_invariants(H)
    >>> f"{theta:.4f} {delta:.4f}"  # the axis is z
    '1.2870 3.0000'
    """
    H = _real(H, "H", (4, 4))
    check_at_least(tol, "tol", 0)
    R, t = H[..., :3, :3], H[..., :3, 3]
    last = H.new_tensor([0.0, 0.0, 0.0, 1.0])
    if H.numel():
        off = float((R @ R.mT - _eye(3, R)).abs().amax().detach())
        if off > 1e-6 or float(torch.linalg.det(R.detach()).min()) < 0:
            raise ValueError(
                f"H: expected rotations to 1e-6, got a difference of {off:.3g}, or a mirror"
            )
        if float((H[..., 3, :] - last).abs().amax().detach()) > 1e-6:
            raise ValueError("H: expected (0, 0, 0, 1) as the last row")
    q = _quaternion(R)
    s, u = q[..., 0], q[..., 1:]
    # Where there is no axis a made-up one keeps the square root's gradient finite.
    none = (u.detach().norm(dim=-1) < math.sin(min(tol, 1.0) / 2)) | (u.detach() == 0).all(-1)
    safe = torch.where(none[..., None], torch.ones_like(u), u)
    length = safe.norm(dim=-1)
    theta = torch.where(none, 0.0, 2 * torch.atan2(length, s))
    half = (s == 0) & (_first_nonzero(u) < 0)
    axis = torch.where(half[..., None], -safe, safe) / length[..., None]
    delta = torch.where(none, math.nan, (axis * t).sum(-1))
    return theta, delta


def _first_nonzero(u: Tensor) -> Tensor:
    index = (u != 0).to(torch.uint8).argmax(-1, keepdim=True)
    return u.gather(-1, index)[..., 0]


# --------------------------------------------------------------------------------------------------
# The three matrices whose determinants vanish
# --------------------------------------------------------------------------------------------------


def _pairs(q1: Any, q2: Any, n: int | None) -> tuple[Tensor, Tensor]:
    """Check two tensors of ``n`` vectors each (any number for ``None``) and return them in float64."""
    first, second = _real(q1, "q1", (n, 3)), _real(q2, "q2", (n, 3))
    check_shape(q2, "q2", q1.shape)
    check_same_device([("q1", q1), ("q2", q2)])
    return first, second


def _check_leading(matrices: Tensor, name: str, q1: Tensor) -> None:
    try:
        torch.broadcast_shapes(matrices.shape[:-2], q1.shape[:-2])  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise ValueError(
            f"{name}: expected leading dimensions that fit those of q1 {tuple(q1.shape[:-2])}, "
            f"got {tuple(matrices.shape[:-2])}"
        ) from None


def _triple(R: Any, q1: Any, q2: Any, n: int | None) -> tuple[Tensor, Tensor, Tensor]:
    first, second = _pairs(q1, q2, n)
    R = _real(R, "R", (3, 3))
    check_same_device([("q1", q1), ("R", R)])
    _check_leading(R, "R", first)
    return R, first, second


def sir3_matrix(R: Tensor, q1: Tensor, q2: Tensor) -> Tensor:
    """Normals ``(R q1) x q2`` of the epipolar planes, one a row: ``G t = 0`` (Eq. 12).

    Parameters
    ----------
    R
        Floating, ``(..., 3, 3)``: a rotation, or a multiple of one.
    q1, q2
        Floating, ``(..., n, 3)``: bearings.

    Returns
    -------
    Tensor
        float64 ``(..., n, 3)``.

    Raises
    ------
    TypeError
        Not floating-point tensors.
    ValueError
        Shapes that do not fit, values that are not finite.

    Notes
    -----
    Time and memory ``O(n)``.

    Examples
    --------
    >>> q1, q2 = torch.eye(3), torch.eye(3).roll(1, 0)
    >>> sir3_matrix(torch.eye(3), q1, q2).shape
    torch.Size([3, 3])
    """
    R, q1, q2 = _triple(R, q1, q2, None)
    return _normals(R, q1, q2)


def _normals(R: Tensor, q1: Tensor, q2: Tensor) -> Tensor:
    a = q1 @ R.mT
    normals: Tensor = torch.linalg.cross(a, q2.expand_as(a))
    return normals


def sir6_matrix(R: Tensor, q1: Tensor, q2: Tensor) -> Tensor:
    """Evaluate the matrix of Eq. 14, which multiplies the six depths of three points.

    The columns belong to the depths of point 1 in both views, of point 2, of point 3.

    Parameters
    ----------
    R, q1, q2
        As in :func:`sir3_matrix`, with three points.

    Returns
    -------
    Tensor
        float64 ``(..., 6, 6)``. Its determinant is minus that of :func:`sir3_matrix` (Theorem 2).

    Raises
    ------
    TypeError, ValueError
        As :func:`sir3_matrix`.

    Notes
    -----
    Time and memory ``O(1)``.

    Examples
    --------
    >>> q1, q2 = torch.eye(3), torch.eye(3).roll(1, 0)
    >>> torch.linalg.det(sir6_matrix(torch.eye(3), q1, q2))
    tensor(1., dtype=torch.float64)
    """
    R, q1, q2 = _triple(R, q1, q2, 3)
    a = q1 @ R.mT
    b = q2.expand_as(a)
    o = torch.zeros_like(a[..., 0, :])
    upper = [a[..., 0, :], -b[..., 0, :], -a[..., 1, :], b[..., 1, :], o, o]
    lower = [a[..., 0, :], -b[..., 0, :], o, o, -a[..., 2, :], b[..., 2, :]]
    return torch.cat([torch.stack(upper, -1), torch.stack(lower, -1)], -2)


def sir2_matrix(R: Tensor, q1: Tensor, q2: Tensor) -> Tensor:
    """Evaluate the matrix of Eq. 16, which multiplies the two depths of point 1 put at the origin.

    Parameters
    ----------
    R, q1, q2
        As in :func:`sir3_matrix`, with three points.

    Returns
    -------
    Tensor
        float64 ``(..., 2, 2)``. For ``R = N`` times a rotation, minus ``N`` times its determinant is
        that of :func:`sir3_matrix` (Theorem 3).

    Raises
    ------
    TypeError, ValueError
        As :func:`sir3_matrix`.

    Notes
    -----
    Time and memory ``O(1)``.

    Examples
    --------
    >>> q1, q2 = torch.eye(3), torch.eye(3).roll(1, 0)
    >>> torch.linalg.det(sir2_matrix(torch.eye(3), q1, q2))
    tensor(1., dtype=torch.float64)
    """
    R, q1, q2 = _triple(R, q1, q2, 3)
    i1, j1, i2, j2 = q1[..., :1, :], q1[..., 1:, :], q2[..., :1, :], q2[..., 1:, :]
    left = (j2 * (torch.linalg.cross(i1.expand_as(j1), j1) @ R.mT)).sum(-1)
    right = (torch.linalg.cross(i2.expand_as(j2), j2) * (j1 @ R.mT)).sum(-1)
    return torch.stack([left, right], -1)


def essential_nullspace(q1: Tensor, q2: Tensor, *, trace_row: bool = False) -> Tensor:
    """Orthonormal basis of the matrices ``E`` with ``q2 @ E @ q1 = 0`` for all pairs.

    Parameters
    ----------
    q1, q2
        Floating, ``(..., n, 3)``: bearings, at most 8 rows in all.
    trace_row
        Whether to demand ``tr E = 0`` besides (Eq. 21, planar motion). Default ``False``.

    Returns
    -------
    Tensor
        float64 ``(..., 9 - rows, 3, 3)``. Where rows depend on each other the null space is larger than
        what is returned.

    Raises
    ------
    TypeError
        Not floating-point tensors, ``trace_row`` not a bool.
    ValueError
        Shapes that do not fit, more than 8 rows, values that are not finite.

    Notes
    -----
    A complete QR decomposition, time and memory ``O(1)``. Not differentiable; the solvers' results are.

    Examples
    --------
    >>> essential_nullspace(torch.randn(7, 5, 3), torch.randn(7, 5, 3)).shape
    torch.Size([7, 4, 3, 3])
    """
    q1, q2 = _pairs(q1, q2, None)
    check_flag(trace_row, "trace_row")
    if q1.shape[-2] + trace_row > 8:
        raise ValueError(f"q1: expected at most {8 - trace_row} points, got {q1.shape[-2]}")
    return _nullspace(_outer(q2.detach(), q1.detach()), trace_row)


def _nullspace(rows: Tensor, trace_row: bool) -> Tensor:
    if trace_row:
        identity = _eye(3, rows).flatten().expand(*rows.shape[:-2], 1, 9)
        rows = torch.cat([rows, identity], -2)
    basis = _complement(rows).mT
    return basis.reshape(*basis.shape[:-1], 3, 3)


def _complement(rows: Tensor) -> Tensor:
    """Orthonormal columns that are orthogonal to all rows."""
    basis, _ = torch.linalg.qr(rows.mT, mode="complete")
    complement: Tensor = basis[..., rows.shape[-2] :]
    return complement


# --------------------------------------------------------------------------------------------------
# Essential matrices
# --------------------------------------------------------------------------------------------------


def decompose_essential(E: Tensor) -> tuple[Tensor, Tensor]:
    """Both rotations of essential matrices, and the translation up to its sign.

    Parameters
    ----------
    E
        Floating, ``(..., 3, 3)``: of any scale but 0. For matrices that are not quite essential (from
        eight points, say) replace their singular values by (1, 1, 0) first; here they are taken for
        essential.

    Returns
    -------
    R : Tensor
        float64 ``(..., 2, 3, 3)``: the twisted pair. One is the other times a half-turn about ``t``.
    t : Tensor
        float64 ``(..., 3)``: of length 1. With each rotation both ``t`` and ``-t`` give ``E`` up to its
        scale and sign.

    Raises
    ------
    TypeError
        Not a floating-point tensor.
    ValueError
        A wrong shape, values that are not finite, a matrix of zeros.

    Notes
    -----
    ``t t^T = tr(E E^T) I / 2 - E E^T`` and ``R = cof(E) -+ hat(t) E`` for ``E`` scaled to a norm of
    ``sqrt(2)`` (Horn, 1990). No singular value decomposition, whose gradient would be infinite at the
    equal singular values of an essential matrix. Time and memory ``O(1)``.

    Examples
    --------
    >>> R = quat_to_rot(torch.tensor([0.8, 0.0, 0.6, 0.0], dtype=torch.float64))
    >>> t = torch.tensor([0.0, 0.6, 0.8], dtype=torch.float64)
    >>> rotations, direction = decompose_essential(3 * hat(t) @ R)
    >>> bool((rotations - R).abs().amax((-1, -2)).min() < 1e-14)
    True
    >>> direction.abs()
    tensor([0.0000, 0.6000, 0.8000], dtype=torch.float64)
    """
    E = _real(E, "E", (3, 3))
    if E.numel() and float(E.detach().abs().amax((-1, -2)).min()) == 0:
        raise ValueError("E: expected matrices other than 0, got zeros")
    first, second, t = _decompose(E)
    return torch.stack([_rotation(_quaternion(R)) for R in (first, second)], -3), t


def _decompose(E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    E = E * (math.sqrt(2) / E.flatten(-2).norm(dim=-1).clamp(min=_TINY))[..., None, None]
    t = _direction(_eye(3, E) - E @ E.mT)
    cofactor, turned = _cofactor(E), _essential(E, t)
    return cofactor - turned, cofactor + turned, t


def _cofactor(matrices: Tensor) -> Tensor:
    """Matrices whose rows are the cross products of the other two rows."""
    cofactor: Tensor = torch.linalg.cross(matrices.roll(-1, -2), matrices.roll(-2, -2))
    return cofactor


def _essential(R: Tensor, t: Tensor) -> Tensor:
    """``hat(t) @ R``."""
    E: Tensor = torch.linalg.cross(t[..., :, None], R, dim=-2)
    return E


def sampson_distance(
    E: Tensor, q1: Tensor, q2: Tensor, *, squared: bool = False, spherical: bool = False
) -> Tensor:
    r"""First-order distance of pairs from the epipolar constraint ``q2 @ E @ q1 = 0``.

    Parameters
    ----------
    E
        Floating, ``(..., 3, 3)``, of any scale. The distance of pairs to a matrix of zeros is 0.
    q1, q2
        Floating, ``(..., n, 3)``, with leading dimensions that broadcast with those of ``E``.
    squared
        Whether to return the square, which is differentiable at 0 too. Default ``False``.
    spherical
        ``False`` (default): distance in the image planes at depth 1; times the focal length it is in
        pixels. Points must have a positive third coordinate. ``True``: on the unit spheres, in
        radians, for bearings in any direction.

    Returns
    -------
    Tensor
        float64 ``(..., n)``, at least 0.

    Raises
    ------
    TypeError
        Not floating-point tensors, ``squared`` or ``spherical`` not bools.
    ValueError
        Shapes that do not fit, values that are not finite, in planes a point that is not in front of
        its camera, on spheres a bearing of length 0.

    Notes
    -----
    ``|q2 E q1|`` over the length of its gradient in both points (their two coordinates in the plane, or
    the two directions tangent to the sphere). Time and memory ``O(n)``.

    Examples
    --------
    >>> E = hat(torch.tensor([1.0, 0.0, 0.0]))  # sideways: a pair must have equal y
    >>> q1, q2 = torch.tensor([[0.2, 0.1, 1.0]]), torch.tensor([[0.3, 0.2, 1.0]])
    >>> sampson_distance(E, q1, q2)  # each point moves by half of the difference
    tensor([0.0707], dtype=torch.float64)
    """
    E = _real(E, "E", (3, 3))
    q1, q2 = _pairs(q1, q2, None)
    check_same_device([("q1", q1), ("E", E)])
    for flag, name in ((squared, "squared"), (spherical, "spherical")):
        check_flag(flag, name)
    _check_leading(E, "E", q1)
    first, second = _on_surface(q1, "q1", spherical), _on_surface(q2, "q2", spherical)
    square = _sampson_squared(E, first, second, spherical)
    if squared:
        return square
    # The root has no slope at 0: there its gradient is taken to be 0.
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def _on_surface(q: Tensor, name: str, spherical: bool) -> Tensor:
    if spherical:
        return _checked_unit(q, name)
    if q.numel() and float(q.detach()[..., 2].min()) <= 0:
        raise ValueError(
            f"{name}: expected points in front of the camera (third coordinate > 0), "
            f"got {float(q.detach()[..., 2].min()):.3g}; for any bearings use spherical=True"
        )
    return q / q[..., 2:]


def _checked_unit(q: Tensor, name: str) -> Tensor:
    length = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    if q.numel() and float(length.detach().min()) < 1e-150:
        raise ValueError(f"{name}: expected bearings of a length above 0, got one of length 0")
    unit: Tensor = q / length
    return unit


def _sampson_squared(E: Tensor, q1: Tensor, q2: Tensor, spherical: bool) -> Tensor:
    line2, line1 = q1 @ E.mT, q2 @ E
    value = (q2 * line2).sum(-1)
    if spherical:
        slope = (line1 * line1).sum(-1) + (line2 * line2).sum(-1) - 2 * value * value
    else:
        slope = (line1[..., :2] ** 2).sum(-1) + (line2[..., :2] ** 2).sum(-1)
    return value * value / slope.clamp(min=_TINY)


# --------------------------------------------------------------------------------------------------
# Homogeneous polynomials in four variables, as rows of coefficients
# --------------------------------------------------------------------------------------------------


@cache
def _monomials(degree: int) -> tuple[tuple[int, ...], ...]:
    """Exponents of the monomials of a degree, in the order of the coefficients."""
    chosen = combinations_with_replacement(range(4), degree)
    return tuple(tuple(c.count(i) for i in range(4)) for c in chosen)


@cache
def _product_table(left: int, right: int) -> Tensor:
    """Which product of a monomial of one degree and one of another is which monomial (0 or 1)."""
    where = {m: i for i, m in enumerate(_monomials(left + right))}
    a, b = _monomials(left), _monomials(right)
    table = torch.zeros(len(a), len(b), len(where), dtype=torch.float64)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i, j, where[tuple(map(sum, zip(x, y, strict=True)))]] = 1
    return table.flatten(0, 1)


def _times(p: Tensor, p_degree: int, q: Tensor, q_degree: int) -> Tensor:
    """Product of polynomials; leading dimensions broadcast."""
    return _outer(p, q) @ _product_table(p_degree, q_degree)


@cache
def _reduced(degree: int) -> list[int]:
    """Monomials that are at most linear in the second variable."""
    return [i for i, m in enumerate(_monomials(degree)) if m[1] < 2]


@cache
def _reduction(degree: int) -> Tensor:
    """Coefficients after the square of the second variable is replaced: w1^2 = w0^2 - w2^2 - w3^2."""
    monomials = _monomials(degree)
    column = {monomials[i]: k for k, i in enumerate(_reduced(degree))}
    table = torch.zeros(len(monomials), len(column), dtype=torch.float64)
    for i, monomial in enumerate(monomials):
        terms = {monomial: 1.0}
        while any(m[1] > 1 for m in terms):
            replaced: dict[tuple[int, ...], float] = {}
            for m, c in terms.items():
                parts = ((0, 1.0), (2, -1.0), (3, -1.0)) if m[1] > 1 else ()
                if not parts:
                    replaced[m] = replaced.get(m, 0.0) + c
                for variable, sign in parts:
                    new = list(m)
                    new[1] -= 2
                    new[variable] += 2
                    replaced[tuple(new)] = replaced.get(tuple(new), 0.0) + sign * c
            terms = replaced
        for m, c in terms.items():
            table[i, column[m]] += c
    return table


# A root is found by comparing two linear forms: the eigenvalues are their ratios, and the first must not
# be near 0 at any root. For a root of NullE nothing singles out a form, so these are arbitrary; real
# quaternions (1, w) with |w| = 1 have |form| >= 0.7 below.
_FORMS = {False: ((0.62, -0.41, 0.53, 0.4), (-0.37, 0.55, 0.71, -0.24)),
          True: ((1.0, 0.21, -0.13, 0.17), (0.3, 0.6, 0.8, -0.45))}  # fmt: skip


@_constant
def _root_tables(degree: int, sphere: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows that pick, from values of all monomials of a degree at a point, what the solver needs.

    First come the values of (first form) x m, then those of (second form) x m, for all monomials m of one
    degree less; the last four rows give (first form)^(degree - 1) x each variable. The second tensor is
    the first form itself.
    """
    picked = []
    for form in _FORMS[sphere]:
        linear = torch.tensor(form, dtype=torch.float64)
        lower = torch.eye(len(_monomials(degree - 1)), dtype=torch.float64)
        picked.append(_times(lower, degree - 1, linear, 1))
    first = torch.tensor(_FORMS[sphere][0], dtype=torch.float64)
    power = torch.ones(1, dtype=torch.float64)
    for d in range(degree - 1):
        power = _times(power, d, first, 1)
    picked.append(_times(power, degree - 1, torch.eye(4, dtype=torch.float64), 1))
    if sphere:
        keep = _reduced(degree - 1)
        picked = [
            table @ _reduction(degree) for table in (*(p[keep] for p in picked[:2]), picked[2])
        ]
    return torch.cat(picked).to(device), first.to(device, torch.complex128)


def _roots(rows: Tensor, degree: int, sphere: bool) -> Tensor:
    """All common roots of homogeneous polynomials, by eigenvectors.

    ``rows`` (B, r, m) are coefficients on m monomials, with m - r roots. The values of the monomials at a
    root are orthogonal to all rows, so they span the orthogonal complement. Multiplying by a linear form
    acts on it, and its eigenvectors are the roots.

    Returns (B, m - r, 4), complex, of any scale. Not finite where it fails.
    """
    picked = _root_tables(degree, sphere, rows.device)[0]
    values = picked @ _complement(_unit(rows))
    n = (len(picked) - 4) // 2
    below, above, variables = values[:, :n], values[:, n:-4], values[:, -4:]
    if n > below.shape[-1]:  # more monomials than roots: least squares
        basis, below = torch.linalg.qr(below)
        above = basis.mT @ above
    vectors = _eigenvectors(torch.linalg.solve_ex(below, above)[0])
    z: Tensor = (variables.to(vectors.dtype) @ vectors).mT
    return z


def _eigenvectors(matrices: Tensor) -> Tensor:
    """Eigenvectors; those of the identity where a matrix is not finite or the iteration fails.

    On the CPU even for CUDA tensors: there it is faster for small matrices.
    """
    found = matrices.cpu()
    identity = _eye(matrices.shape[-1], found)
    finite = torch.isfinite(found)
    if not bool(finite.all()):
        found = torch.where(finite.all(-1).all(-1)[..., None, None], found, identity)
    vectors: Tensor
    try:
        vectors = torch.linalg.eig(found)[1]
    except RuntimeError:  # one of them did not converge: find out which
        if len(found) == 1:
            return identity.to(matrices.device, torch.complex128)[None]
        vectors = torch.cat([_eigenvectors(m[None]) for m in found])
    return vectors.to(matrices.device)


def _starts(z: Tensor) -> Tensor:
    """Real starting points from complex roots; zeros for those that are far from real.

    A real root is itself. Rounding may turn two real roots that lie close to each other into a complex
    pair; the sums of real and imaginary part are then one on either side.
    """
    real = z.imag.abs().amax(-1) < _REAL * z.abs().amax(-1)
    return torch.where(real[..., None], torch.nan_to_num(z.real + z.imag, 0.0, 0.0, 0.0), 0.0)


# --------------------------------------------------------------------------------------------------
# The two polynomial systems
# --------------------------------------------------------------------------------------------------


@_constant
def _essential_tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the cubics are made with: the products of degrees 1 and 1 and of 2 and 1, and two more.

    The third, (9, 9), makes 2 M - tr(M) I of a matrix M. The fourth, (144, 30), makes the cross product of
    two rows of linear forms, (10, 3), of the products of their 4 x 3 coefficients.
    """
    trace = torch.eye(3, dtype=torch.float64).flatten()
    double = 2 * torch.eye(9, dtype=torch.float64) - trace[:, None] * trace
    cross = torch.zeros(4, 3, 4, 3, 10, 3, dtype=torch.float64)
    pairs = _product_table(1, 1).reshape(4, 4, 10)
    for i in range(3):
        j, k = (i + 1) % 3, (i + 2) % 3
        cross[:, j, :, k, :, i], cross[:, k, :, j, :, i] = pairs, -pairs
    tables = _product_table(1, 1), _product_table(2, 1), double, cross.reshape(144, 30)
    one, two, three, four = (x.to(device) for x in tables)
    return one, two, three, four


def _essential_cubics(basis: Tensor) -> Tensor:
    """Coefficients (B, 10, 20) of Eqs. 18 and 19 for E = sum of z_k times basis_k, (B, 4, 3, 3)."""
    quadratic, cubic, double, cross = _essential_tables(basis.device)
    B = len(basis)
    forms = basis.movedim(1, -1)  # (B, 3, 3, 4): each entry is a linear form
    E = basis.transpose(1, 2).reshape(B, 12, 3)  # rows of E, each with the four coefficients
    square = (E @ E.mT).view(B, 3, 4, 3, 4).transpose(2, 3).reshape(B, 9, 16) @ quadratic  # E E^T
    factor = (double @ square).view(B, 3, 3, 10).mT.reshape(B, 30, 3)
    nine = (factor @ forms.reshape(B, 3, 12)).view(B, 3, 10, 3, 4).transpose(2, 3).reshape(B, 9, 40)
    a, b, c = E.view(B, 3, 12).unbind(1)
    determinant = _folded(_outer(a, b) @ cross, 3) @ c.view(B, 4, 3).mT
    return torch.cat([nine, determinant.view(B, 1, 40)], 1) @ cubic


def _start_from_essential(rows: Tensor, planar: bool) -> tuple[Tensor, Tensor]:
    """Quaternions with translations (B, S, 7), and which of them count, (B, S), from NullE."""
    basis = _nullspace(rows, planar)
    z = _roots(_essential_cubics(basis), 3, sphere=False)
    form = _root_tables(3, False, rows.device)[1]
    E = _starts(z / (z @ form)[..., None]) @ basis.flatten(-2)
    q, t, keep = _poses_of(_folded(E, 3), planar, 1e-3)
    return torch.cat([q, t], -1), keep


def _poses_of(E: Tensor, planar: bool, slack: float) -> tuple[Tensor, Tensor, Tensor]:
    """One pose for each essential matrix; two where both of a planar one are planar up to ``slack``."""
    first, second, t = _decompose(E)
    keep = E.flatten(-2).any(-1)
    if not planar:
        return _quaternion(first), t, keep
    # One rotation of the pair has its axis normal to t. The other is a half-turn, and does so as well
    # only if the first is a half-turn too.
    q = _quaternion(torch.stack([first, second]))
    slope = (q[..., 1:] * t).sum(-1).abs()
    keep = keep & ((slope <= slope.flip(0)) | (slope < slack))
    return torch.cat([q[0], q[1]], 1), torch.cat([t, t], 1), torch.cat([keep[0], keep[1]], 1)


class _AngleTables(NamedTuple):
    """What the polynomials of SIR2 are made with.

    ``first`` and ``second`` are the points of each of p pairs; ``rotation`` (9, 10) the entries of R as
    quadratic forms, and ``factors`` (2, 10) the unknowns in their monomials; ``left`` and ``right`` the rows, of p and p, whose products make the quartics, and
    ``quartic`` and ``cubic`` take products of coefficients to the reduced coefficients of the system.
    """

    first: Tensor
    second: Tensor
    rotation: Tensor
    factors: Tensor
    left: Tensor
    right: Tensor
    quartic: Tensor
    cubic: Tensor


@_constant
def _angle_tables(n: int, planar: bool, device: torch.device) -> _AngleTables:
    pairs = list(combinations(range(n), 2))
    row, p = {pair: k for k, pair in enumerate(pairs)}, len(pairs)
    triples = list(combinations(range(n), 3))
    ij, ik = [row[i, j] for i, j, _ in triples], [row[i, k] for i, _, k in triples]

    def shifted(degree: int) -> Tensor:
        """Take a polynomial of a degree to its reduced products with the four unknowns."""
        table = _product_table(degree, 1) @ _reduction(degree + 1)
        return table.reshape(len(table) // 4, -1)

    quartic = _product_table(2, 2) @ (_reduction(4) if planar else shifted(4))
    cubic = _product_table(2, 1).view(10, 4, 20)[:, 1:].flatten(0, 1) @ shifted(3)
    index = [
        list(zip(*combinations_with_replacement(range(4), 2), strict=True)),
        [i for i, _ in pairs],
        [j for _, j in pairs],
        ij + [p + k for k in ij],
        [p + k for k in ik] + ik,
    ]
    factors, first, second, left, right = (torch.tensor(x, device=device) for x in index)
    rotation = _rotation_table(torch.device("cpu")).mT @ _product_table(1, 1)
    rotation, quartic, cubic = (x.to(device) for x in (rotation, quartic, cubic))
    return _AngleTables(first, second, rotation, factors, left, right, quartic, cubic)


def _start_from_angle(q1: Tensor, q2: Tensor, theta: Tensor, planar: bool) -> tuple[Tensor, Tensor]:
    """Axes (B, S, 3), and which of them count, (B, S), from SIR2 with a known angle."""
    table = _angle_tables(q1.shape[1], planar, q1.device)
    q = torch.stack([q1, q2])
    i, j = q[:, :, table.first], q[:, :, table.second]
    cross = torch.linalg.cross(i, j)
    # The row F_ij of Eq. 16 for each pair i < j: first all the left, then all the right forms.
    forms = _outer(torch.cat([j[1], cross[1]], 1), torch.cat([cross[0], j[0]], 1)) @ table.rotation
    # In the unknowns (w0, w) with u = s w, where the scalar part is c w0.
    scale = _scale(theta.clamp(max=_HALF_TURN))
    forms = forms * (scale[:, table.factors[0]] * scale[:, table.factors[1]])[:, None]
    products = _outer(forms[:, table.left], forms[:, table.right])
    plus, minus = products.chunk(2, 1)
    rows, degree = (plus - minus) @ table.quartic, 4 if planar else 5
    if planar:
        # The row (u.q1_i, -u.q2_i) below F_ij. The length of u, a common factor, is left out.
        plus, minus = _outer(forms, torch.cat([i[1], i[0]], 1)).chunk(2, 1)
        cubics = _folded((plus + minus) @ table.cubic, rows.shape[-1]).flatten(1, 2)
        rows = torch.cat([rows, cubics], 1)
    else:
        rows = _folded(rows, rows.shape[-1] // 4).flatten(1, 2)
    z = _roots(rows, degree, sphere=True)
    w = _starts(z[..., 1:] / z[..., :1])
    keep = w.any(-1)
    small = theta < _SMALL[planar]
    if bool(small.any()):
        w = torch.cat([w, _start_near_identity(q1, q2, theta, planar)], 1)
        keep = torch.cat([keep, small[:, None].expand(-1, 2)], 1)
    return _unit(w), keep


def _start_near_identity(q1: Tensor, q2: Tensor, theta: Tensor, planar: bool) -> Tensor:
    """Two axes (B, 2, 3) for small angles, where the polynomials of SIR2 nearly lose their dependence on u.

    At the identity the constraints are linear in (u, t). Where all hold there is a plane, in which the
    directions with ``|u| = sin(theta / 2) |t|`` are two: the zeros of a quadratic form.
    """
    normals = torch.linalg.cross(q1, q2)
    t = _smallest_direction(normals)[:, None]
    rows = torch.cat([2 * torch.linalg.cross(q1, torch.linalg.cross(q2, t)), normals], -1)
    if planar:
        rows = torch.cat([rows, F.pad(t, (0, 3))], 1)
    plane = _complement(rows)
    size = torch.sin(theta / 2).square()
    u, along = plane[:, :3], plane[:, 3:]
    form, vectors = torch.linalg.eigh(u.mT @ u - size[:, None, None] * (along.mT @ along))
    # Where the form hardly has a zero, the two starts stay a fifth of |u| apart on either side.
    reach = torch.stack([form[:, 1], torch.maximum(-form[:, 0], size / 25)], -1)
    reach = reach.clamp(min=_TINY).sqrt()[:, :, None] * reach.new_tensor([[1, 1], [1, -1]])
    both = (plane @ (vectors @ reach)).mT
    axes: Tensor = both[..., :3] * (both[..., 3:] * t).sum(-1, keepdim=True).sign()
    return axes


def _smallest_direction(G: Tensor) -> Tensor:
    """Unit vectors t that make |G t| least, where G has a rank of 2 but for noise."""
    return _direction(_cofactor(G.mT @ G))


# --------------------------------------------------------------------------------------------------
# Newton's method on rotation and translation
# --------------------------------------------------------------------------------------------------

# The unknowns are x = (q, t), a unit quaternion and a unit vector. If the angle is known they are
# (1, w, t), and q = (cos(theta / 2), sin(theta / 2) w) with a unit vector w.


def _scale(theta: Tensor) -> Tensor:
    """Factors (..., 7) that take (1, w, t) to (q, t) with the given angle."""
    c, s = torch.cos(theta / 2), torch.sin(theta / 2)
    one = torch.ones_like(s)
    return torch.stack([c, s, s, s, one, one, one], -1)


@_constant
def _newton_tables(
    known: bool, planar: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What Newton's system is made with.

    The first takes all products of two entries of (q, t) to the slopes (9, 7) of hat(t) @ R. The second
    takes x to the slopes (r, 7) of the constraints on x alone, |t| = 1 being the last. The third is 1
    there and 0 at all others, and the fourth takes the squares of x to the squared length of the vector that
    each entry belongs to.
    """
    R = _rotation_table(torch.device("cpu")).reshape(4, 4, 3, 3)
    E = torch.einsum("cik,abkj->abcij", _hat(torch.eye(3, dtype=torch.float64)), R)
    slopes = torch.zeros(7, 7, 3, 3, 7, dtype=torch.float64)
    slopes[:4, 4:, :, :, :4] = 2 * E.permute(1, 2, 3, 4, 0)
    slopes[:4, :4, :, :, 4:] = E.permute(0, 1, 3, 4, 2)
    unit = torch.eye(7, dtype=torch.float64)
    groups = [
        unit[a:b].sum(0) for a, b in (((0, 1), (1, 4), (4, 7)) if known else ((0, 4), (4, 7)))
    ]
    linear = [group.diag() for group in groups]
    if planar:  # u.t
        linear.insert(0, torch.zeros(7, 7, dtype=torch.float64))
        linear[0][1:4, 4:], linear[0][4:, 1:4] = torch.eye(3), torch.eye(3)
    norms = sum((torch.outer(group, group) for group in groups), torch.zeros_like(unit))
    tables = slopes.reshape(49, 63), torch.stack(linear, 1).flatten(1), unit[-1], norms
    one, two, three, four = (x.to(device) for x in tables)
    return one, two, three, four


def _newton_system(
    x: Tensor, scale: Tensor | None, rows: Tensor, planar: bool
) -> tuple[Tensor, Tensor]:
    """Slopes (..., 7, 7) and values (..., 7) of the constraints at x (..., 7).

    They are Eq. 7 for each point, with the products ``rows`` (..., n, 9) of the bearings; u.t if planar
    (with w for u if the angle is known); and that the vectors in x keep their lengths.
    """
    slopes, linear, last, _ = _newton_tables(scale is not None, planar, x.device)
    y = x if scale is None else x * scale
    slope = rows @ _folded(_outer(y, y) @ slopes, 7)
    if scale is not None:
        slope = slope * scale[..., None, :]
    slope = torch.cat([slope, _folded(x @ linear, 7)], -2)
    # All but the last constraint, |t| = 1, are linear in t.
    return slope, (slope[..., 4:] @ x[..., 4:, None])[..., 0] - last


def _newton(
    x: Tensor, scale: Tensor | None, rows: Tensor, planar: bool, steps: int = 20
) -> tuple[Tensor, Tensor]:
    """Newton's method from each of M starts; the best point met, and its largest constraint.

    A start has arrived when its step was so small that the error after it, of the order of its square, is
    rounding: it is evaluated once more, and no further step is computed. One that finds nothing much
    better for several steps is given up.
    """
    norms = _newton_tables(scale is not None, planar, x.device)[3]
    # The smaller the angle, the less exactly does it show its axis.
    enough = torch.full_like(x[:, 0], _ARRIVED)
    if scale is not None:
        enough = torch.maximum(enough, 1e-14 / scale[:, 1])
    all_x, all_errors = x.clone(), torch.full_like(x[:, 0], math.inf)
    active = torch.arange(len(x), device=x.device)
    best_x, best, moving, vain = all_x, all_errors, active, torch.zeros_like(active)
    for _ in range(steps + 1):
        slope, value = _newton_system(x, scale, rows, planar)
        error = value.abs().amax(-1)
        going = vain < _PATIENCE  # given up for good, whether still in the loop or not
        vain = torch.where((error < best / 2) & going, 0, vain + 1)
        better = (error <= best) & going
        best_x, best = torch.where(better[:, None], x, best_x), torch.where(better, error, best)
        if not len(moving):
            break
        if len(x) - len(moving) > _WORTH:
            all_x[active], all_errors[active] = best_x, best
            active, x, rows, enough, best_x, best, vain, slope, value = (
                a[moving] for a in (active, x, rows, enough, best_x, best, vain, slope, value)
            )
            scale = None if scale is None else scale[moving]
        step, _ = torch.linalg.solve_ex(slope, value)
        step = torch.nan_to_num(step, 0.0, 0.0, 0.0)
        length = torch.linalg.vector_norm(step, dim=-1, keepdim=True)
        x = x - step * (0.5 / length).clamp(max=1.0)
        x = x * (x.square() @ norms).rsqrt()
        moving = ((length[:, 0] > enough) & (vain < _PATIENCE)).nonzero()[:, 0]
    all_x[active], all_errors[active] = best_x, best
    return all_x, all_errors


# --------------------------------------------------------------------------------------------------
# From roots to candidates
# --------------------------------------------------------------------------------------------------


def _face_forward(
    R: Tensor,
    t: Tensor,
    q1: Tensor,
    q2: Tensor,
    twins: Tensor | None,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the sign of t, and where ``twins`` the rotation, by how many points lie in front.

    ``R`` (..., 3, 3), points of length 1 (..., n, 3), ``weight`` (..., n). Returns R, t, and whether all
    points do.
    """
    a = q1 @ R.mT
    along, far = (a @ t[..., None])[..., 0], (q2 @ t[..., None])[..., 0]
    weight = torch.ones_like(along) if weight is None else weight
    cosine = (a * q2).sum(-1)

    def score(cosine: Tensor) -> Tensor:
        """Sum over both views of the signs of the depths that the rays a = R q1 and q2 get by t."""
        signs = torch.sign(far * cosine - along) + torch.sign(far - along * cosine)
        return (signs * weight).sum(-1)

    best = score(cosine)
    if twins is not None:
        other = score(2 * along * far - cosine)  # with a turned about t by pi
        turned = twins & (other.abs() > best.abs())
        best = torch.where(turned, other, best)
        twin = 2 * t[..., :, None] * (t[..., None, :] @ R) - R
        R = torch.where(turned[..., None, None], twin, R)
    front = best.abs() == 2 * weight.sum(-1)
    return R, torch.where(best[..., None] < 0, -t, t), front


@_constant
def _keys(device: torch.device) -> tuple[Tensor, Tensor]:
    """Arbitrary forms, (81, 2) and (9, 2)."""
    generator = torch.Generator().manual_seed(0)
    quadratic = torch.randn(2, 81, generator=generator, dtype=torch.float64).mT
    linear = torch.randn(9, 2, generator=generator, dtype=torch.float64)
    return quadratic.to(device), linear.to(device)


@_constant
def _nothing(device: torch.device) -> Tensor:
    """A candidate that is not valid: R, t, whether it is valid, whether all points lie in front."""
    R = torch.eye(3, dtype=torch.float64, device=device)
    return F.pad(R.flatten(), (0, 5))


def _candidates(
    x: Tensor,
    error: Tensor,
    problem: Tensor,
    q1: Tensor,
    q2: Tensor,
    twins: bool,
    count: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotations, translations, valid and in front, (B, count, ...): each root once, valid ones first.

    ``x`` (quaternion and translation), ``error`` and ``problem`` (which of the B problems) have one row
    for each root found.
    """
    order = error.argsort(stable=True)
    order = order[problem[order].argsort(stable=True)]  # by problem, the best first
    order = order[error[order] < _ZERO]
    x, problem = x[order], problem[order]
    R, t = _rotation(x[:, :4]), x[:, 4:]
    # Two fixed quadratic forms of E, whatever its sign, tell roots apart; where the twisted pair of one
    # E counts as two roots, two linear ones of R besides. Of those at one root the best stays.
    quadratic, linear = _keys(x.device)
    E = _essential(R, t).flatten(1)
    keys = _outer(E, E) @ quadratic
    if not twins:
        keys = torch.cat([keys, R.flatten(1) @ linear], -1)
    each = torch.arange(len(q1), device=x.device)
    place = torch.arange(len(x), device=x.device) - torch.searchsorted(problem, each)[problem]
    at = problem, place  # in a table of all problems
    most = int(place.max()) + 1 if len(place) else 0
    table = keys.new_full((len(q1), most, keys.shape[1]), math.nan)
    table[at] = keys
    near = ((table[:, :, None] - table[:, None]).abs() < _SAME).all(-1)
    new = ~near.tril(-1).any(-1)
    rank = new.cumsum(1) - 1
    kept = (new & (rank < count))[at].nonzero()[:, 0]
    R, t, problem, rank = R[kept], t[kept], problem[kept], rank[at][kept]
    choice = torch.ones_like(problem, dtype=torch.bool) if twins else None
    R, t, front = _face_forward(R, t, q1[problem], q2[problem], choice)
    found = torch.cat([R.flatten(1), t, torch.ones_like(t[:, :1]), front[:, None]], 1)
    result = _nothing(x.device).repeat(len(q1), count, 1)
    result[problem, rank] = found
    flags = result[..., 12:] > 0
    R, t = _folded(result[..., :9], 3), result[..., 9:12]
    return R, t, flags[..., 0], flags[..., 1]


def _implicit_gradient(
    R: Tensor,
    t: Tensor,
    valid: Tensor,
    q1: Tensor,
    q2: Tensor,
    theta: Tensor | None,
    planar: bool,
) -> tuple[Tensor, Tensor]:
    """One more Newton step at the roots, of length 0, which carries the implicit function's gradient.

    The root x(q) satisfies f(x, q) = 0, so dx = -(df/dx)^-1 (df/dq) dq: the slope is kept constant and f
    alone is differentiated in the data. Eigenvectors are never differentiated.
    """
    rows = _outer(q2, q1)[:, None]
    scale = None if theta is None else _scale(theta)[:, None]
    with torch.no_grad():
        q = _quaternion(R)
        if theta is not None:
            q = torch.cat([torch.ones_like(q[..., :1]), _unit(q[..., 1:])], -1)
        x = torch.cat([q, t], -1)
        slope, _ = _newton_system(x, scale, rows, planar)
        inverse, failed = torch.linalg.inv_ex(slope)
        usable = valid & (failed == 0) & torch.isfinite(inverse).all(-1).all(-1)
        inverse = torch.where(usable[..., None, None], inverse, 0.0)
    value = torch.where(usable[..., None], _newton_system(x, scale, rows, planar)[1], 0.0)
    y = x - (inverse @ value[..., None])[..., 0]
    if scale is not None:
        y = torch.where(usable[..., None], y * scale, 0.0)
    moved, shifted = _rotation(y[..., :4]), y[..., 4:]
    # The values stay those of the root.
    return R + (moved - moved.detach()), t + (shifted - shifted.detach())


def _pure_rotation(
    q1: Tensor, q2: Tensor, theta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Samples that a rotation alone explains: which, and their rotation and one possible translation."""
    index = ((q1 @ q1.mT - q2 @ q2.mT).abs().amax((-1, -2)) < _NEAR).nonzero()[:, 0]
    if not len(index):
        return None
    a, b = q1[index], q2[index]
    left, _, right = torch.linalg.svd(b.mT @ a)
    sign = torch.linalg.det(left @ right)
    left = torch.cat([left[..., :2], left[..., 2:] * sign[:, None, None]], -1)
    R = left @ right
    fits = (a @ R.mT - b).abs().amax((-1, -2)) < _NEAR
    q = _quaternion(R)
    if theta is not None:
        angle = 2 * torch.atan2(q[:, 1:].norm(dim=-1), q[:, 0])
        fits &= (angle - theta[index]).abs() < 1e-7
    # Any direction explains them. For a planar motion it is normal to the axis.
    other = F.one_hot(q[:, 1:].abs().argmin(-1), 3).to(q)
    across = torch.linalg.cross(q[:, 1:], other)
    bare = across.norm(dim=-1, keepdim=True) < _NEAR
    t = torch.where(bare, other, _unit(across))
    return index[fits], R[fits], t[fits]


# --------------------------------------------------------------------------------------------------
# The solvers
# --------------------------------------------------------------------------------------------------


def _bearings(q1: Any, q2: Any, n: int) -> tuple[Tensor, Tensor]:
    first, second = _pairs(q1, q2, n)
    return _checked_unit(first, "q1"), _checked_unit(second, "q2")


def _angle(theta: Any, batch: torch.Size, like: Tensor) -> Tensor:
    if isinstance(theta, Tensor):
        check_floating(theta, "theta")
        check_finite(theta, "theta")
        check_same_device([("q1", like), ("theta", theta)])
        try:
            value = theta.double().expand(batch)
        except RuntimeError:
            raise ValueError(
                f"theta: expected a shape that broadcasts to {tuple(batch)}, got {tuple(theta.shape)}"
            ) from None
    else:
        check_positive(theta, "theta")
        value = like.new_tensor(float(theta)).expand(batch)
    bad = (value.detach() <= 0) | (value.detach() > math.pi)
    if bool(bad.any()):
        raise ValueError(
            f"theta: expected angles in (0, pi], got {float(value.detach()[bad][0]):.6g}"
        )
    return value


@uncompiled
def _solve(
    q1: Tensor,
    q2: Tensor,
    theta: Tensor | None,
    planar: bool,
    count: int,
    backend: Backend,
) -> PoseCandidates:
    """All of a solver but its checks: chunk by chunk, starts, Newton, candidates, gradients."""
    batch, n = q1.shape[:-2], q1.shape[-2]
    first, second = q1.reshape(-1, n, 3), q2.reshape(-1, n, 3)
    angle = None if theta is None else theta.reshape(-1)
    parts = []
    for low in range(0, max(1, len(first)), _CHUNK):
        own = slice(low, low + _CHUNK)
        parts.append(
            _solve_chunk(
                first[own],
                second[own],
                None if angle is None else angle[own],
                planar,
                count,
                backend,
            )
        )
    R, t, valid, front = (torch.cat(x) for x in zip(*parts, strict=True))
    E = _essential(R, t)
    return PoseCandidates(*(x.reshape((*batch, *x.shape[1:])) for x in (R, t, E, valid, front)))


def _solve_chunk(
    q1: Tensor, q2: Tensor, theta: Tensor | None, planar: bool, count: int, backend: Backend
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.no_grad():
        if backend == "reference":
            q, t, keep = _reference(q1, q2, theta, planar, count)
            problem, x = keep.nonzero()[:, 0], torch.cat([q, t], -1)[keep]
            error = torch.zeros_like(x[:, 0])
        else:
            problem, x, error = _polished_roots(q1, q2, theta, planar)
        twins = theta is None and not planar
        R, t, valid, front = _candidates(x, error, problem, q1, q2, twins, count)
        determined = valid
        still = _pure_rotation(q1, q2, theta)
        if still is not None:
            index, turned, any_t = still
            R[index], t[index], front[index] = _eye(3, R), 0.0, False
            R[index, 0], t[index, 0] = turned, any_t
            determined = valid.index_fill(0, index, False)
            valid = determined.clone()
            valid[index, 0] = True
    inputs = [x for x in (q1, q2, theta) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        R, t = _implicit_gradient(R, t, determined, q1, q2, theta, planar)
    return R, t, valid, front


def _polished_roots(
    q1: Tensor, q2: Tensor, theta: Tensor | None, planar: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """All roots of all problems: whose each is, its quaternion and translation, its largest constraint."""
    rows = _outer(q2, q1)
    if theta is None:
        x, keep = _start_from_essential(rows, planar)
        problem = keep.nonzero()[:, 0]
        x, error = _newton(x[keep], None, rows[problem], planar)
        return problem, x, error
    w, keep = _start_from_angle(q1, q2, theta, planar)
    problem = keep.nonzero()[:, 0]
    rows, scale = rows[problem], _scale(theta)[problem]
    x = F.pad(w[keep], (1, 3))
    x[:, 0] = 1
    # The translation that fits best: its slopes are the normals G (and the axis).
    slope, _ = _newton_system(x, scale, rows, planar)
    x[:, 4:] = _smallest_direction(slope[:, :-3, 4:])
    x, error = _newton(x, scale, rows, planar)
    return problem, x * scale, error


# --------------------------------------------------------------------------------------------------
# The same by the printed equations
# --------------------------------------------------------------------------------------------------


class _Polynomial:
    """A polynomial in three unknowns, term by term, for NumPy's arrays of objects."""

    def __init__(self, terms: dict[tuple[int, ...], float]) -> None:
        self.terms = terms

    def __add__(self, other: Any) -> _Polynomial:
        constant: dict[tuple[int, ...], float] = {(0, 0, 0): other}
        more = other.terms if isinstance(other, _Polynomial) else constant
        return _Polynomial(
            {m: self.terms.get(m, 0.0) + more.get(m, 0.0) for m in {*self.terms, *more}}
        )

    def __mul__(self, other: Any) -> _Polynomial:
        if not isinstance(other, _Polynomial):
            return _Polynomial({m: c * other for m, c in self.terms.items()})
        result: dict[tuple[int, ...], float] = {}
        for m, c in self.terms.items():
            for n, d in other.terms.items():
                key = (m[0] + n[0], m[1] + n[1], m[2] + n[2])
                result[key] = result.get(key, 0.0) + c * d
        return _Polynomial(result)

    __radd__, __rmul__ = __add__, __mul__

    def __sub__(self, other: Any) -> _Polynomial:
        return self.__add__(other * -1.0)

    def __rsub__(self, other: Any) -> _Polynomial:
        return self.__mul__(-1.0).__add__(other)


_UNKNOWNS = np.array([_Polynomial({m: 1.0}) for m in ((1, 0, 0), (0, 1, 0), (0, 0, 1))], object)


def _monomials_up_to(degree: int) -> list[_Polynomial]:
    return [_Polynomial({m[1:]: 1.0}) for m in _monomials(degree)]


def _template_roots(equations: list[_Polynomial], degree: int) -> np.ndarray[Any, Any]:
    """Real roots (k, 3) of polynomials whose multiples are all given, up to a degree."""
    column = {m[1:]: i for i, m in enumerate(_monomials(degree))}
    rows = np.zeros((len(equations), len(column)))
    for row, equation in zip(rows, equations, strict=True):
        for m, c in equation.terms.items():
            row[column[m]] = c
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    space = np.linalg.svd(rows)[2][len(rows) :].T
    lower = [next(iter(p.terms)) for p in _monomials_up_to(degree - 1)]

    def shift(m: tuple[int, ...], k: int) -> int:
        return column[tuple(e + int(i == k) for i, e in enumerate(m))]

    above = np.zeros((len(lower), space.shape[1]))
    for k, weight in enumerate((0.2, 0.6, 0.8)):
        above += weight * space[[shift(m, k) for m in lower]]
    action = np.linalg.pinv(space[[column[m] for m in lower]]) @ above
    values = space @ np.linalg.eig(action)[1]
    one = column[0, 0, 0]
    roots = np.stack([values[shift((0, 0, 0), k)] / values[one] for k in range(3)], 1)
    size = 1 + np.abs(roots).max(1, keepdims=True)
    real: np.ndarray[Any, Any] = roots[(np.abs(roots.imag) <= 1e-6 * size).all(1)].real
    return real


def _reference(
    q1: Tensor, q2: Tensor, theta: Tensor | None, planar: bool, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Quaternions, translations and which count, (B, S, ...): the paper's systems, one by one."""
    found = []
    for b in range(len(q1)):
        if theta is None:
            basis = _nullspace(_outer(q2[b : b + 1], q1[b : b + 1]), planar)[0]
            E = (_UNKNOWNS[:, None, None] * basis[:3].cpu().numpy()).sum(0) + basis[3].cpu().numpy()
            square = E @ E.T
            nine = (2 * square @ E - E * np.trace(square)).flatten()  # Eq. 19
            minors = [np.cross(E[0], E[1]) @ E[2]]  # Eq. 18
            roots = basis.new_tensor(_template_roots([*nine, *minors], 3))
            coefficients = torch.cat([roots, torch.ones_like(roots[:, :1])], 1)
            pose = _poses_of(torch.einsum("sk,kij->sij", coefficients, basis)[None], planar, 1e-6)
        else:
            pose = _angle_reference(q1[b], q2[b], theta[b : b + 1], planar)
        q, t, keep = (x[0] for x in pose)
        found.append((q[keep][:count], t[keep][:count]))
    q = q1.new_tensor([1.0, 0.0, 0.0, 0.0]).repeat(len(q1), count, 1)
    t = q1.new_tensor([1.0, 0.0, 0.0]).repeat(len(q1), count, 1)
    keep = torch.zeros(len(q1), count, dtype=torch.bool, device=q1.device)
    for b, (own_q, own_t) in enumerate(found):
        q[b, : len(own_q)], t[b, : len(own_q)], keep[b, : len(own_q)] = own_q, own_t, True
    return q, t, keep


def _angle_reference(
    q1: Tensor, q2: Tensor, theta: Tensor, planar: bool
) -> tuple[Tensor, Tensor, Tensor]:
    p, q = q1.cpu().numpy(), q2.cpu().numpy()
    sigma, u = math.cos(float(theta) / 2), _UNKNOWNS
    x, y, z = u
    square = x * x + y * y + z * z
    turn = np.array([[x * 0, z * -1, y], [z, x * 0, x * -1], [y * -1, x, x * 0]], object)
    R = 2 * (np.outer(u, u) + turn * sigma) + np.eye(3) * np.array(sigma**2 - square, object)

    def row(i: int, j: int) -> tuple[Any, Any]:  # F_ij of Eq. 16
        return q[j] @ R @ np.cross(p[i], p[j]), np.cross(q[i], q[j]) @ R @ p[j]

    def det(a: tuple[Any, Any], b: tuple[Any, Any]) -> Any:
        return a[0] * b[1] - a[1] * b[0]

    sphere = square + (sigma**2 - 1)
    linear = _monomials_up_to(1)
    quartics = [det(row(i, j), row(i, k)) for i, j, k in combinations(range(len(p)), 3)]
    degree = 4 if planar else 5
    equations = [m * sphere for m in _monomials_up_to(degree - 2)]
    if planar:
        cubics = [det(row(i, j), (u @ p[i], u @ q[i] * -1)) for i, j in ((0, 1), (0, 2), (1, 2))]
        equations += quartics + [m * c for c in cubics for m in linear]
    else:
        equations += [m * c for c in quartics for m in linear]
    w = _unit(q1.new_tensor(_template_roots(equations, degree)))[None]
    half = (theta / 2).view(1, 1, 1)
    both = torch.cat([torch.cos(half).expand_as(w[..., :1]), torch.sin(half) * w], -1)
    G = _normals(_rotation(both), q1[None, None], q2[None, None])
    if planar:
        G = torch.cat([G, w[..., None, :]], -2)
    t = torch.linalg.eigh(G.mT @ G)[1][..., 0]
    return both, t, torch.ones_like(both[..., 0], dtype=torch.bool)


# --------------------------------------------------------------------------------------------------
# Public solvers
# --------------------------------------------------------------------------------------------------


def solve_five_point(q1: Tensor, q2: Tensor, *, backend: Backend = "auto") -> PoseCandidates:
    r"""All relative poses of five point pairs (5P): NullE, Eqs. 18 and 19.

    Parameters
    ----------
    q1, q2
        Floating, ``(..., 5, 3)``: bearings of the same points in both cameras, of any length but 0.
    backend
        ``"auto"`` (default): all problems at once. ``"reference"``: the equations as printed, one
        problem at a time, without the final Newton steps.

    Returns
    -------
    PoseCandidates
        With K = 10. One candidate for each real essential matrix; of its two rotations and two
        translations the one with the most points in front of both cameras.

    Raises
    ------
    TypeError
        Not floating-point tensors.
    ValueError
        Shapes that do not fit, other than five points, values that are not finite, a bearing of
        length 0, an unknown backend.

    Notes
    -----
    Ten cubics in the four coordinates of the null space span all but ten of its 20 cubic monomials;
    eigenvectors of a 10 x 10 matrix give the roots, which Newton's method on rotation and translation
    then polishes. A root is valid when its constraints hold to 1e-11.

    A sample without parallax (a pure rotation) determines its rotation, and no translation: it has one
    valid candidate with that rotation, one of the translations that explain it as well as any other, and
    ``in_front`` false.

    Differentiable in ``q1`` and ``q2``, by the implicit function theorem at each root (``"auto"`` and
    ``"reference"`` alike); the gradient is 0 where a candidate is not valid, has no parallax, or is a
    multiple root. Time ``O(B)`` with about a thousand multiplications a problem beside the eigenvalues;
    memory ``O(B)`` for the result and for 512 problems at a time. On a GPU the eigenvalues are computed
    on the CPU.

    Examples
    --------
    >>> X1 = torch.tensor([[0, 0, 5], [1, 0, 6], [0, 1, 7], [-1, 1, 4], [1, -1, 5]]).double()
    >>> R, t = quat_to_rot(torch.tensor([0.96, 0.0, 0.28, 0.0])), torch.tensor([0.6, 0.0, 0.8])
    >>> found = solve_five_point(X1, X1 @ R.T + t)
    >>> found.R.shape
    torch.Size([10, 3, 3])
    >>> error = (found.R - R).abs().amax((-1, -2)) + (found.t - t).abs().amax(-1)
    >>> bool(error[found.valid & found.in_front].min() < 1e-6)  # R and t above are rounded
    True
    """
    check_one_of(backend, "backend", _BACKENDS)
    first, second = _bearings(q1, q2, 5)
    return _solve(first, second, None, False, 10, backend)


def solve_4p_st0(q1: Tensor, q2: Tensor, *, backend: Backend = "auto") -> PoseCandidates:
    r"""All relative poses of four point pairs whose screw translation is 0 (4P-ST0, section 6.2).

    For planar motions, whatever the camera's tilt: the plane need not be known.

    Parameters
    ----------
    q1, q2
        Floating, ``(..., 4, 3)``: bearings, of any length but 0.
    backend
        As in :func:`solve_five_point`.

    Returns
    -------
    PoseCandidates
        With K = 10. Of the twisted pair, the rotation whose axis is normal to the translation (both, if
        both are half-turns), with the sign of ``t`` that has the most points in front.

    Raises
    ------
    TypeError, ValueError
        As :func:`solve_five_point`, for four points.

    Notes
    -----
    ``tr E = 0`` (Eq. 21) is one more linear equation on ``E``, so this is :func:`solve_five_point` with
    one row of its null space exchanged. Gradients, samples without parallax, time and memory as there.
    Near the identity the axis is ill-defined under noise; :func:`ransac_relative_pose` lets
    :func:`solve_translation_only` compete.

    Examples
    --------
    >>> X1 = torch.tensor([[0, 0, 5], [1, 0, 6], [0, 1, 7], [-1, 1, 4]]).double()
    >>> R, t = quat_to_rot(torch.tensor([0.96, 0.0, 0.28, 0.0])), torch.tensor([0.6, 0.0, 0.8])
    >>> found = solve_4p_st0(X1, X1 @ R.T + t)
    >>> error = (found.R - R).abs().amax((-1, -2)) + (found.t - t).abs().amax(-1)
    >>> bool(error[found.valid & found.in_front].min() < 1e-6)
    True
    """
    check_one_of(backend, "backend", _BACKENDS)
    first, second = _bearings(q1, q2, 4)
    return _solve(first, second, None, True, 10, backend)


def solve_known_angle(
    q1: Tensor,
    q2: Tensor,
    theta: Tensor | float,
    *,
    planar: bool,
    backend: Backend = "auto",
) -> PoseCandidates:
    r"""All relative poses with a known rotation angle: 4P-RA, or 3P-RA-ST0 if planar too.

    Parameters
    ----------
    q1, q2
        Floating, ``(..., n, 3)``: bearings, of any length but 0; n = 3 if ``planar``, else 4.
    theta
        Rotation angle in radians, in (0, pi]: a number, or a floating tensor whose shape broadcasts to
        the leading dimensions of ``q1``. A gyroscope gives it without being aligned with the camera.
    planar
        Whether the screw translation is 0 besides.
    backend
        As in :func:`solve_five_point`. The reference needs an angle clearly below pi.

    Returns
    -------
    PoseCandidates
        With K = 12 if planar, else 20: each with the given angle, and the sign of ``t`` that has the most
        points in front.

    Raises
    ------
    TypeError
        Not floating-point tensors, ``planar`` not a bool.
    ValueError
        Shapes that do not fit, a wrong number of points, values that are not finite, a bearing of length
        0, an angle outside (0, pi], an unknown backend.

    Notes
    -----
    SIR2+u: quartics (Eq. 16), for planar motions also cubics (section 6.3), in ``u`` on the sphere
    ``|u| = sin(theta / 2)``. The template is the paper's 13 x 25 if planar, else 16 x 36. For a pure
    translation (theta = 0) use :func:`solve_translation_only`. Differentiable in ``q1``, ``q2`` and
    ``theta``; samples without parallax, time and memory as in :func:`solve_five_point`.

    Examples
    --------
    >>> X1 = torch.tensor([[0, 0, 5], [1, 0, 6], [0, 1, 7]]).double()
    >>> R, t = quat_to_rot(torch.tensor([0.96, 0.0, 0.28, 0.0])), torch.tensor([0.6, 0.0, 0.8])
    >>> found = solve_known_angle(X1, X1 @ R.T + t, 2 * math.atan2(0.28, 0.96), planar=True)
    >>> error = (found.R - R).abs().amax((-1, -2)) + (found.t - t).abs().amax(-1)
    >>> bool(error[found.valid & found.in_front].min() < 1e-6)
    True
    """
    check_one_of(backend, "backend", _BACKENDS)
    check_flag(planar, "planar")
    first, second = _bearings(q1, q2, 3 if planar else 4)
    angle = _angle(theta, first.shape[:-2], first)
    return _solve(first, second, angle, planar, 12 if planar else 20, backend)


def solve_translation_only(q1: Tensor, q2: Tensor) -> PoseCandidates:
    r"""The translation of two point pairs if nothing rotates (2P-TO, section 6.3).

    Parameters
    ----------
    q1, q2
        Floating, ``(..., 2, 3)``: bearings, of any length but 0.

    Returns
    -------
    PoseCandidates
        With K = 1: ``R = I`` and ``t`` normal to both ``q1 x q2``, with the sign that has the most points
        in front. Not valid where that direction is undefined: no parallax, or both points and the
        translation in one plane.

    Raises
    ------
    TypeError, ValueError
        As :func:`solve_five_point`, for two points.

    Notes
    -----
    Differentiable. Time and memory ``O(B)``.

    Examples
    --------
    >>> X1 = torch.tensor([[0.0, 0.0, 5.0], [1.0, 0.5, 6.0]])
    >>> solve_translation_only(X1, X1 + torch.tensor([0.0, 0.6, 0.8])).t
    tensor([[0.0000, 0.6000, 0.8000]], dtype=torch.float64)
    """
    first, second = _bearings(q1, q2, 2)
    return _translation_only(first, second)


def _translation_only(q1: Tensor, q2: Tensor) -> PoseCandidates:
    normals = torch.linalg.cross(q1, q2)
    across = torch.linalg.cross(normals[..., 0, :], normals[..., 1, :])
    sizes = normals.detach().norm(dim=-1)
    size = across.detach().norm(dim=-1)
    valid = (sizes.amin(-1) > 1e-12) & (size > 1e-12 * sizes.prod(-1))
    t = _unit(torch.where(valid[..., None], across, torch.ones_like(across)))
    identity = _eye(3, t).expand(*t.shape[:-1], 3, 3)
    _, t, front = _face_forward(identity, t, q1, q2, None)
    t = torch.where(valid[..., None], t, 0.0)
    parts = (identity, t, _hat(t), valid, front & valid)
    k = len(valid.shape)
    return PoseCandidates(*(x.unsqueeze(k) for x in parts))


# --------------------------------------------------------------------------------------------------
# RANSAC
# --------------------------------------------------------------------------------------------------

_POINTS: dict[Solver, int] = {"5p": 5, "4p_st0": 4, "4p_ra": 4, "3p_ra_st0": 3, "2p_to": 2}


def _run(solver: Solver, q1: Tensor, q2: Tensor, theta: Tensor | None) -> PoseCandidates:
    if solver == "2p_to":
        return _translation_only(q1, q2)
    planar = solver in ("4p_st0", "3p_ra_st0")
    own = None if solver in ("5p", "4p_st0") else theta
    count = {"5p": 10, "4p_st0": 10, "4p_ra": 20, "3p_ra_st0": 12}[solver]
    return _solve(q1, q2, own, planar, count, "auto")


def _samples(
    batch: int, points: int, samples: int, size: int, generator: torch.Generator | None
) -> Tensor:
    """Indices (batch, samples, size) without repetition, drawn on the CPU, so that seeds carry over."""
    keys = torch.rand(batch, samples, points, generator=generator, dtype=torch.float64)
    return keys.topk(size, dim=-1).indices


def ransac_relative_pose(
    q1: Tensor,
    q2: Tensor,
    *,
    solver: Solver = "5p",
    theta: Tensor | float | None = None,
    threshold: float = 0.004,
    samples: int = 100,
    fallback_samples: int | None = None,
    spherical: bool = False,
    generator: torch.Generator | None = None,
) -> PoseEstimate:
    r"""Relative pose of point pairs of which some are wrong.

    Minimal samples are drawn and solved all at once; each real root is scored on all pairs by the sum of
    its squared Sampson distances, each at most ``threshold ** 2``; the least sum wins.

    Parameters
    ----------
    q1, q2
        Floating, ``(..., N, 3)``: bearings. Leading dimensions are independent problems.
    solver
        ``"5p"`` (default), ``"4p_st0"``, ``"4p_ra"``, ``"3p_ra_st0"`` or ``"2p_to"``.
    theta
        For ``"4p_ra"`` and ``"3p_ra_st0"`` only: the angle, as in :func:`solve_known_angle`.
    threshold
        Distance up to which a pair is an inlier, in the unit of :func:`sampson_distance`: pixels over
        the focal length, or radians if ``spherical``. Default 0.004 (2 pixels at 500, as in the book's
        experiment).
    samples
        Minimal samples for each problem. Default 100.
    fallback_samples
        Samples of two points for :func:`solve_translation_only`, which compete as equals (section 6.3,
        "Handling Degeneracy"). Default: 20 for solvers that use an invariant, none for ``"5p"`` and
        ``"2p_to"``.
    spherical
        Distances on the unit spheres instead of the image planes. Default ``False``.
    generator
        Source of the samples, on the CPU.

    Returns
    -------
    PoseEstimate
        For the best hypothesis. The sign of ``t`` (and for ``"5p"`` the rotation of the twisted pair)
        is decided by all inliers.

    Raises
    ------
    TypeError
        Not floating-point tensors, ``samples`` or ``fallback_samples`` not integers, ``spherical`` not a
        bool.
    ValueError
        Shapes that do not fit, fewer points than a sample needs, values that are not finite, bearings as
        :func:`sampson_distance` refuses them, an unknown solver, an angle missing or not wanted, a
        threshold that is not positive, no samples.

    Notes
    -----
    The estimate is that of a minimal sample and is not refined on the inliers. Not differentiable.
    Time ``O(B S N)`` for B problems and S samples; memory ``O(B S)`` for the hypotheses, ``O(B S N)`` for
    drawing them, and about 2 ** 18 residuals at a time.

    Examples
    --------
    >>> g = torch.Generator().manual_seed(0)
    >>> X1 = torch.rand(40, 3, generator=g) * 4 + torch.tensor([-2.0, -2.0, 4.0])
    >>> X2 = X1 @ quat_to_rot(torch.tensor([0.96, 0, 0.28, 0])).T.float() + torch.tensor([0.6, 0, 0.8])
    >>> X2[:10] = X2[:10].roll(1, 0)  # wrong pairs
    >>> found = ransac_relative_pose(X1, X2, solver="4p_st0", samples=30, generator=g)
    >>> bool((found.t - torch.tensor([0.6, 0.0, 0.8])).norm() < 1e-3), bool(found.inliers[10:].all())
    (True, True)
    """
    check_one_of(solver, "solver", tuple(_POINTS))
    first, second = _pairs(q1, q2, None)
    check_positive(threshold, "threshold")
    check_flag(spherical, "spherical")
    if fallback_samples is None:
        fallback_samples = 0 if solver in ("5p", "2p_to") else 20
    for count, name, least in ((samples, "samples", 1), (fallback_samples, "fallback_samples", 0)):
        check_integer(count, name, least)
    needed = max(_POINTS[solver], 2 if fallback_samples else 0)
    if first.shape[-2] < needed:
        raise ValueError(f"q1: expected at least {needed} points, got {first.shape[-2]}")
    wanted = solver in ("4p_ra", "3p_ra_st0")
    if (theta is not None) != wanted:
        need = "an angle" if wanted else "None"
        raise ValueError(f"theta: expected {need} for solver {solver!r}, got {theta!r}")
    batch = first.shape[:-2]
    angle = None if theta is None else _angle(theta, batch, first).reshape(-1)
    units = [_checked_unit(q, n) for q, n in ((first, "q1"), (second, "q2"))]
    points = [_on_surface(q, n, spherical) for q, n in ((first, "q1"), (second, "q2"))]
    u1, u2, p1, p2 = (q.reshape(-1, *first.shape[-2:]) for q in (*units, *points))
    with torch.no_grad():
        parts = _ransac(
            u1, u2, p1, p2, solver, angle, threshold**2, samples, fallback_samples, spherical, generator
        )  # fmt: skip
    return PoseEstimate(*(x.reshape((*batch, *x.shape[1:])) for x in parts))


def _truncated_sums(E: Tensor, p1: Tensor, p2: Tensor, limit: float, spherical: bool) -> Tensor:
    """Sums (B, H) over points (B, N, 3) of squared Sampson distances to E (B, H, 3, 3), cut at a limit.

    The same numbers as :func:`_sampson_squared`, as products of matrices with H columns.
    """
    pairs = (p2[..., :, None] * p1[..., None, :]).flatten(-2)
    value = pairs @ E.flatten(-2).mT
    slope = torch.zeros_like(value)
    for k in range(3 if spherical else 2):
        slope += (p1 @ E[:, :, k].mT).square_()  # component k of E p1
        slope += (p2 @ E[..., k].mT).square_()  # and of E^T p2
    square = value.square_()
    if spherical:
        slope -= 2 * square
    return square.div_(slope.clamp_(min=_TINY)).clamp_(max=limit).sum(-2)


@uncompiled
def _ransac(
    q1: Tensor,
    q2: Tensor,
    p1: Tensor,
    p2: Tensor,
    solver: Solver,
    theta: Tensor | None,
    limit: float,
    samples: int,
    fallback_samples: int,
    spherical: bool,
    generator: torch.Generator | None,
) -> tuple[Tensor, ...]:
    B, N = q1.shape[:2]
    rows = torch.arange(B, device=q1.device)[:, None, None]
    hypotheses: list[PoseCandidates] = []
    for name, count in ((solver, samples), ("2p_to", fallback_samples)):
        if count:
            index = _samples(B, N, count, _POINTS[name], generator).to(q1.device)
            own = None if theta is None else theta[:, None].expand(B, count)
            found = _run(name, q1[rows, index], q2[rows, index], own)
            hypotheses.append(PoseCandidates(*(x.flatten(1, 2) for x in found)))
    R, t, E, valid = (
        torch.cat([getattr(h, f) for h in hypotheses], 1) for f in ("R", "t", "E", "valid")
    )
    # Only valid hypotheses are scored: they come first, and the rest is cut off where all have ended.
    order = valid.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    order = order[:, : int(valid.sum(1).max()) if B else 0]
    at = torch.arange(B, device=q1.device)
    cost = torch.full(valid.shape, math.inf, dtype=R.dtype, device=R.device)
    step = max(1, _RESIDUALS // max(1, B * N))
    for low in range(0, order.shape[1], step):
        own = order[:, low : low + step]
        sums = _truncated_sums(E[at[:, None], own], p1, p2, limit, spherical)
        cost[at[:, None], own] = sums.masked_fill(~valid[at[:, None], own], math.inf)
    least, best = cost.min(1)
    any_valid = torch.isfinite(least)
    R, t, E = R[at, best], t[at, best], E[at, best]
    square = _sampson_squared(E, p1, p2, spherical)
    inliers = (square <= limit) & any_valid[:, None]
    fallback = (best >= hypotheses[0].valid.shape[1]) & any_valid
    twins = torch.full_like(any_valid, solver == "5p") & ~fallback
    R, t, _ = _face_forward(R, t, q1, q2, twins, inliers.to(R.dtype))
    least = torch.where(any_valid, least, N * limit)
    return R, t, _hat(t) @ R, inliers, least, any_valid, fallback

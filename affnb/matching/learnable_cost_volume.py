"""Learnable cost volume: every pixel against a window of candidates, under a learned inner product.

Optical flow and stereo networks see two images only through a *cost volume*, the table of inner
products between the feature of a pixel and those of the candidates in a window around it. Here the
inner product is ``f1' W f2`` with a symmetric positive definite ``W`` that is learned without
constraints (Xiao et al., "Learnable Cost Volume Using the Cayley Representation", ECCV 2020; equation
numbers below are that paper's): ``W = P' diag(lambda) P``, where the rotation ``P`` is the Cayley
transform of a skew-symmetric matrix and the eigenvalues are an arctangent map of free numbers.

``backend="reference"`` computes the printed equations, displacement by displacement, and inverts the
matrix that the Cayley transform asks for. It is what the tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affnb import kernels
from affnb.checks import (
    check_finite,
    check_floating,
    check_integer,
    check_one_of,
    check_positive,
    check_same_device,
    check_shape,
    check_square,
    check_tensor,
)
from affnb.kernels import uncompiled
from affnb.precision import wide_dtype

__all__ = [
    "CayleySPD",
    "CayleySPDParametrization",
    "atan_positive",
    "cayley",
    "cost_volume",
    "inverse_atan_positive",
    "inverse_cayley",
    "matching_score",
    "signature_fix",
    "soft_argmax_flow",
]

Backend = Literal["auto", "reference"]
Padding = Literal["zeros", "replicate", "exclude"]
Kind = Literal["inner", "cosine", "wssd"]
Init = Literal["identity", "perturbed"]

_BACKENDS = ("auto", "reference")
_PADDINGS = ("zeros", "replicate", "exclude")

#: How far a matrix may be from symmetric, skew-symmetric or orthogonal, relative to its largest entry.
_TOLERANCE = 1e-5

#: Columns of the first map that one small matrix product takes, beside a window's own width.
_COLUMNS_CPU, _COLUMNS_CUDA = 24, 64

#: Beyond it, float32 could hold neither the slope of the eigenvalue map nor W itself.
_LARGEST_T = 1e15


# --------------------------------------------------------------------------------------------------
# Rotations: the Cayley transform
# --------------------------------------------------------------------------------------------------


def _check_matrix(value: Tensor, name: str) -> None:
    check_floating(value, name)
    check_square(value, name)
    # Looking at values would break the graph while torch.compile traces, so it sees shapes only.
    if not torch.compiler.is_compiling():
        check_finite(value, name)


def _off_by(difference: Tensor, scale: Tensor) -> float:
    """Largest entry of a difference relative to that of a matrix, or to 1 if that is smaller."""
    if difference.numel() == 0:
        return 0.0
    return float(difference.detach().abs().amax() / scale.detach().abs().amax().clamp(min=1.0))


def cayley(skew: Tensor, *, backend: Backend = "auto") -> Tensor:
    r"""Rotation of a skew-symmetric matrix (Theorem 1, Eq. 8).

    .. math:: P = (I - S)(I + S)^{-1}

    Parameters
    ----------
    skew
        Skew-symmetric matrices S, shape ``(..., n, n)``, floating, finite, any size of entries.
    backend
        ``"auto"``: one linear solve (the two factors commute). ``"reference"``: the inverse.

    Returns
    -------
    Tensor
        Shape ``(..., n, n)``: orthogonal, determinant 1, no eigenvalue -1. float64 for float64 input,
        else float32. ``I + S`` is invertible for every skew S, so there is no exception.

    Raises
    ------
    TypeError
        ``skew`` not a floating-point tensor.
    ValueError
        Not square, not finite, not skew-symmetric (to 1e-5 of the largest entry), an unknown backend.

    Notes
    -----
    Time ``O(n^3)``, memory ``O(n^2)`` a matrix. In float32 with n = 128, ``P'P - I`` is about 1e-6 for
    entries around 1 and 1e-4 for entries around 1e4 (near half turns).

    Examples
    --------
    >>> cayley(torch.tensor([[0.0, -1.0], [1.0, 0.0]]))  # a quarter turn: -2 arctan 1
    tensor([[ 0.,  1.],
            [-1.,  0.]])
    """
    _check_matrix(skew, "skew")
    check_one_of(backend, "backend", _BACKENDS)
    if not torch.compiler.is_compiling():
        off = _off_by(skew + skew.mT, skew)
        if off > _TOLERANCE:
            raise ValueError(
                f"skew: expected a skew-symmetric matrix, got one whose transpose differs from its "
                f"negative by {off:.1e} of the largest entry"
            )
    with torch.autocast(skew.device.type, enabled=False):
        s = skew.to(wide_dtype(skew))
        eye = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
        if backend == "reference":
            inverse: Tensor = torch.linalg.inv(eye + s)
            return (eye - s) @ inverse
        rotation: Tensor = torch.linalg.solve(eye + s, eye - s)
        return rotation


def inverse_cayley(rotation: Tensor) -> Tensor:
    r"""Skew-symmetric matrix of a rotation without half turns (Theorem 1).

    .. math:: S = (I - P)(I + P)^{-1}

    Parameters
    ----------
    rotation
        Orthogonal matrices P without the eigenvalue -1 (so with determinant 1), shape ``(..., n, n)``.

    Returns
    -------
    Tensor
        Shape ``(..., n, n)``, exactly skew-symmetric, with ``cayley(S) = P``; float64 for float64
        input, else float32.

    Raises
    ------
    TypeError
        ``rotation`` not a floating-point tensor.
    ValueError
        Not square, not finite, not orthogonal (to 1e-4), or with the eigenvalue -1 to rounding; then
        multiply by the signs of :func:`signature_fix` first.

    Notes
    -----
    Time ``O(n^3)``.

    Examples
    --------
    >>> inverse_cayley(torch.eye(2))
    tensor([[0., 0.],
            [0., 0.]])
    """
    _check_matrix(rotation, "rotation")
    with torch.autocast(rotation.device.type, enabled=False):
        p = rotation.to(wide_dtype(rotation))
        eye = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
        if p.numel() and not torch.compiler.is_compiling():
            _check_orthogonal(p, eye)
            # I + P = 2 (I + S)^-1: its least singular value is 2 cos(angle / 2) of the largest turn.
            least = torch.linalg.svdvals(p.detach() + eye)[..., -1].amin()
            if float(least) < 16 * p.shape[-1] * torch.finfo(p.dtype).eps:
                raise ValueError(
                    "rotation: expected a rotation without the eigenvalue -1, got one with it "
                    "(multiply its rows by signature_fix(rotation))"
                )
        s: Tensor = torch.linalg.solve(eye + p, eye - p)
        return (s - s.mT) / 2


def _check_orthogonal(p: Tensor, eye: Tensor) -> None:
    off = float((p.detach().mT @ p.detach() - eye).abs().amax())
    if off > 1e-4:
        raise ValueError(
            f"rotation: expected an orthogonal matrix, got one with P'P - I of {off:.1e}"
        )


def signature_fix(rotation: Tensor) -> Tensor:
    r"""Signs that take an orthogonal matrix into the reach of the Cayley transform, and near 0 there.

    For every orthogonal P some :math:`D = \operatorname{diag}(\pm1)` makes :math:`DP` a rotation
    without the eigenvalue -1, and can be chosen so that no entry of its skew-symmetric matrix
    exceeds 1 in absolute value. Since :math:`(DP)^\top \Lambda\, DP = P^\top \Lambda P`, the signs
    change no W.

    Parameters
    ----------
    rotation
        One orthogonal matrix, shape ``(n, n)``, of either determinant.

    Returns
    -------
    Tensor
        Shape ``(n,)``, entries 1 or -1, the dtype of ``rotation``: the diagonal of D. Then
        ``inverse_cayley(D[:, None] * rotation)`` exists and has entries of at most 1 (to rounding).

    Raises
    ------
    TypeError
        ``rotation`` not a floating-point tensor.
    ValueError
        Not one square matrix, not finite, not orthogonal (to 1e-4).

    Notes
    -----
    First Gaussian elimination of ``D + P`` that picks each sign so that the pivot is at least 1 in
    absolute value. Then, while an entry ``S_ij`` exceeds 1, the signs i and j are flipped, which
    multiplies ``|det(I + DP)|`` by ``S_ij^2 > 1``; the determinant is at most ``2^n``, so this ends.
    Time ``O(n^3)`` and ``O(n^2)`` for each flip.

    Examples
    --------
    >>> signature_fix(torch.diag(torch.tensor([-1.0, -1.0, 1.0])))
    tensor([-1., -1.,  1.])
    """
    check_tensor(rotation, "rotation", ndim=2)
    _check_matrix(rotation, "rotation")
    p = rotation.detach().double().cpu()
    n = len(p)
    if n:
        _check_orthogonal(p, torch.eye(n, dtype=p.dtype))
    signs = torch.ones(n, dtype=p.dtype)
    rest = p.clone()
    for k in range(n):
        if rest[k, k] < 0:
            signs[k] = -1.0
        column, row = rest[k + 1 :, k].clone(), rest[k, k + 1 :]
        rest[k + 1 :, k + 1 :] -= torch.outer(column, row) / (rest[k, k] + signs[k])
    if n > 1:
        s = inverse_cayley(signs[:, None] * p)
        while float(s.abs().amax()) > 1 + 1e-9:
            worst = int(s.abs().argmax())
            pair = [worst // n, worst % n]
            signs[pair] *= -1
            s = _flip_pair(s, pair)
    return signs.to(rotation)


def _flip_pair(s: Tensor, pair: list[int]) -> Tensor:
    """Skew matrix after the signs of two rows of its rotation are flipped (a principal pivot)."""
    i, j = pair
    turned = 1.0 / s[i, j].item()
    rows = s.new_tensor([[0.0, -turned], [turned, 0.0]]) @ s[pair]  # the two rows, solved for
    out = s - s[:, pair] @ rows
    out[pair] = -rows
    out[:, pair] = rows.mT
    out[i, i] = out[j, j] = 0.0
    out[i, j], out[j, i] = -turned, turned
    return out


# --------------------------------------------------------------------------------------------------
# Eigenvalues, and the whole matrix
# --------------------------------------------------------------------------------------------------


def atan_positive(t: Tensor) -> Tensor:
    r"""Positive number of a free one (Eq. 9).

    .. math:: \lambda(t) = \frac{\pi + 2 \arctan t}{\pi - 2 \arctan t}
              = \frac{\operatorname{atan2}(1, -t)}{\operatorname{atan2}(1, t)}

    The second form is the one computed: it keeps its digits where the first divides by what rounding
    left of a difference (in float32 the first is 7 % off at t = 1e6 and infinite at 1e8).

    Parameters
    ----------
    t
        Any shape, floating. Values beyond 1e15 in absolute value count as 1e15 (with gradient 0).

    Returns
    -------
    Tensor
        The shape of ``t``, positive: 1 at 0, ``lambda(-t) = 1 / lambda(t)``, about ``pi t - 1`` for
        large t and ``1 / (pi |t|)`` for very negative t. float64 for float64 input, else float32.

    Raises
    ------
    TypeError
        ``t`` not a floating-point tensor.
    ValueError
        A NaN or infinite value.

    Notes
    -----
    Time and memory ``O(numel)``. The slope at 0 is ``4 / pi``.

    Examples
    --------
    >>> atan_positive(torch.tensor([0.0, 1.0, -1.0, 1e8]))
    tensor([1.0000e+00, 3.0000e+00, 3.3333e-01, 3.1416e+08])
    """
    check_floating(t, "t")
    if not torch.compiler.is_compiling():
        check_finite(t, "t")
    x = t.to(wide_dtype(t)).clamp(-_LARGEST_T, _LARGEST_T)
    one = torch.ones_like(x)
    return torch.atan2(one, -x) / torch.atan2(one, x)


def inverse_atan_positive(value: Tensor) -> Tensor:
    r"""Free number of a positive one: :math:`t = \tan\big(\frac\pi2 \frac{\lambda-1}{\lambda+1}\big)`.

    Parameters
    ----------
    value
        Any shape, floating, positive and finite.

    Returns
    -------
    Tensor
        The shape of ``value``; ``atan_positive`` of it is ``value``, for values of 1e-15 to 1e15.
        float64 for float64 input, else float32.

    Raises
    ------
    TypeError
        ``value`` not a floating-point tensor.
    ValueError
        A value that is not positive or not finite.

    Notes
    -----
    Time and memory ``O(numel)``.

    Examples
    --------
    >>> inverse_atan_positive(torch.tensor([1.0, 3.0, 1e-3]))
    tensor([   0.0000,    1.0000, -318.6271])
    """
    check_floating(value, "value")
    if not torch.compiler.is_compiling():
        check_finite(value, "value")
        if bool((value <= 0).any()):
            raise ValueError(f"value: expected positive numbers, got {float(value.min()):.3g}")
    x = value.to(wide_dtype(value))
    small = torch.minimum(x, 1 / x)  # t changes its sign, and no more, from lambda to 1 / lambda
    angle = torch.pi * small / (1 + small)
    near = torch.tan(torch.pi / 2 * (1 - small) / (1 + small))
    t = torch.where(small > 0.3, near, 1 / torch.tan(angle))  # each form where it keeps its digits
    return torch.where(x < 1, -t, t)


def _skew(flat: Tensor, n: int) -> Tensor:
    """Skew matrix with ``flat`` below the diagonal, row by row."""
    i, j = torch.tril_indices(n, n, -1, device=flat.device)
    lower = flat.new_zeros(n, n).index_put((i, j), flat)
    return lower - lower.mT


class CayleySPDParametrization(nn.Module):
    r"""Symmetric positive definite matrices from free numbers (section 3.3), for ``parametrize``.

    ``forward(skew, t)`` is the matrix :math:`W = P^\top \Lambda P` of ``n (n - 1) / 2`` numbers
    below the diagonal of S (row by row) and n numbers t of the eigenvalues; ``right_inverse(W)`` gives
    such numbers back. So ``torch.nn.utils.parametrize.register_parametrization(layer, "weight",
    CayleySPDParametrization())`` keeps the square weight of a layer positive definite while any
    optimiser works on the free numbers.

    Notes
    -----
    Time ``O(n^3)``, memory ``O(n^2)``. The matrix is float64 for float64 numbers, else float32.

    Examples
    --------
    >>> from torch.nn.utils import parametrize
    >>> layer = nn.Linear(3, 3, bias=False)
    >>> _ = nn.init.eye_(layer.weight)
    >>> _ = parametrize.register_parametrization(layer, "weight", CayleySPDParametrization())
    >>> [tuple(p.shape) for p in layer.parameters()]
    [(3,), (3,)]
    >>> layer.weight
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 1.]], grad_fn=<MmBackward0>)
    """

    def factor(self, skew: Tensor, t: Tensor) -> Tensor:
        r"""Return :math:`Q = \Lambda^{1/2} P` with ``Q.mT @ Q = W`` (Eq. 10), shape ``(n, n)``."""
        check_tensor(t, "t", ndim=1)
        n = len(t)
        check_floating(skew, "skew", ndim=1)
        if len(skew) != n * (n - 1) // 2:
            raise ValueError(
                f"skew: expected n (n - 1) / 2 = {n * (n - 1) // 2} numbers for n = {n}, got {len(skew)}"
            )
        check_same_device([("skew", skew), ("t", t)])
        with torch.autocast(t.device.type, enabled=False):
            return atan_positive(t).sqrt()[:, None] * cayley(_skew(skew, n))

    def forward(self, skew: Tensor, t: Tensor) -> Tensor:
        """Return W, shape ``(n, n)``, of ``skew`` ``(n (n - 1) / 2,)`` and ``t`` ``(n,)``."""
        q = self.factor(skew, t)
        with torch.autocast(t.device.type, enabled=False):
            return q.mT @ q

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``skew`` (entries of at most 1) and ``t`` of a symmetric positive definite matrix.

        Raises ``ValueError`` if ``weight`` is not symmetric (to 1e-5) or not positive definite.
        """
        check_tensor(weight, "weight", ndim=2)
        _check_weight(weight, len(weight))
        values, vectors = torch.linalg.eigh(weight.detach().double())
        if values.numel() and float(values[0]) <= 0:
            raise ValueError(
                f"weight: expected a positive definite matrix, got the eigenvalue {float(values[0]):.3g}"
            )
        rotation = vectors.mT
        s = inverse_cayley(signature_fix(rotation)[:, None] * rotation)
        i, j = torch.tril_indices(len(s), len(s), -1, device=s.device)
        return s[i, j].to(weight.dtype), inverse_atan_positive(values).to(weight.dtype)


class CayleySPD(nn.Module):
    r"""A symmetric positive definite matrix to learn, :math:`W = P^\top \Lambda P` (Eqs. 3, 8, 9).

    Parameters
    ----------
    channels
        Side c of W, at least 1.
    init
        ``"identity"`` (default, the paper's): S = 0 and t = 0, so W = I exactly, and the gradient of S
        is exactly 0 at first. ``"perturbed"``: t drawn from N(0, 0.01^2), which splits the eigenvalues
        by about 1 % and so wakes S up.

    Attributes
    ----------
    skew : nn.Parameter
        ``(c (c - 1) / 2,)``: S below its diagonal, row by row.
    t : nn.Parameter
        ``(c,)``: of the eigenvalues. Together ``c (c + 1) / 2`` numbers, as many as W has free ones.

    Raises
    ------
    TypeError, ValueError
        ``channels`` not an integer of at least 1, an unknown ``init``.

    Notes
    -----
    Calling it gives W ``(c, c)``, float64 if the parameters are, else float32, in time ``O(c^3)``: once
    a step, not once a pixel. In evaluation call it once and keep the result. ``factor()`` gives
    :math:`Q = \Lambda^{1/2} P` with :math:`W = Q^\top Q`, the map after which the plain inner product
    is the learned one. Weight decay pulls W towards I.

    Examples
    --------
    >>> metric = CayleySPD(3)
    >>> metric()
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 1.]], grad_fn=<MmBackward0>)
    >>> f1, f2 = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    >>> cost_volume(f1, f2, radius=2, weight=metric()).shape
    torch.Size([1, 5, 5, 8, 8])
    """

    def __init__(self, channels: int, init: Init = "identity") -> None:
        super().__init__()
        check_integer(channels, "channels", 1)
        check_one_of(init, "init", ("identity", "perturbed"))
        self.channels = channels
        self.skew = nn.Parameter(torch.zeros(channels * (channels - 1) // 2))
        self.t = nn.Parameter(torch.zeros(channels))
        if init == "perturbed":
            nn.init.normal_(self.t, std=0.01)
        self._map = CayleySPDParametrization()

    @classmethod
    def from_matrix(cls, weight: Tensor) -> CayleySPD:
        """Return a module that gives ``weight``, symmetric (to 1e-5) and positive definite, ``(c, c)``.

        Raises ``TypeError`` or ``ValueError`` for any other matrix.
        """
        skew, t = CayleySPDParametrization().right_inverse(weight)
        made = cls(len(weight)).to(weight)
        with torch.no_grad():
            made.skew.copy_(skew)
            made.t.copy_(t)
        return made

    def forward(self) -> Tensor:
        """Return W, shape ``(c, c)``."""
        weight: Tensor = self._map(self.skew, self.t)
        return weight

    def factor(self) -> Tensor:
        """Return Q, shape ``(c, c)``, with ``Q.mT @ Q = W``."""
        return self._map.factor(self.skew, self.t)

    def extra_repr(self) -> str:
        """Return the size, for ``repr``."""
        return f"channels={self.channels}"


# --------------------------------------------------------------------------------------------------
# The cost volume
# --------------------------------------------------------------------------------------------------


def _check_weight(weight: Tensor, channels: int) -> None:
    check_floating(weight, "weight")
    check_shape(weight, "weight", (channels, channels))
    if torch.compiler.is_compiling():
        return
    check_finite(weight, "weight")
    off = _off_by(weight - weight.mT, weight)
    if off > _TOLERANCE:
        raise ValueError(
            f"weight: expected a symmetric matrix, got one that differs from its transpose by {off:.1e} "
            "of the largest entry"
        )


def _check_radius(radius: Any) -> tuple[int, int]:
    if isinstance(radius, Sequence) and not isinstance(radius, str):
        if len(radius) != 2:
            raise ValueError(f"radius: expected an integer or two (down, right), got {radius!r}")
        down, right = radius
    else:
        down = right = radius
    for length in (down, right):
        check_integer(length, "radius", 0)
    return down, right


def _check_pair(f1: Tensor, f2: Tensor, weight: Tensor | None) -> None:
    for value, name in ((f1, "f1"), (f2, "f2")):
        check_floating(value, name, ndim=4)
    check_shape(f2, "f2", f1.shape)
    if f1.shape[1] == 0:
        raise ValueError(f"f1: expected at least one channel, got shape {tuple(f1.shape)}")
    if weight is not None:
        _check_weight(weight, f1.shape[1])
    check_same_device([("f1", f1), ("f2", f2), ("weight", weight)])
    if not torch.compiler.is_compiling():
        check_finite(f1, "f1")
        check_finite(f2, "f2")


def _pad(x: Tensor, radius: tuple[int, int], padding: str) -> Tensor:
    """A map with a border as wide as the window reaches."""
    down, right = radius
    border = (right, right, down, down)
    if padding == "replicate":
        return F.pad(x, border, mode="replicate")
    return F.pad(x, border)


def _inside(height: int, width: int, radius: tuple[int, int], device: torch.device) -> Tensor:
    """Which candidates lie in the image, bool ``(u, v, h, w)`` (a product of rows and columns)."""
    found = []
    for size, reach in ((height, radius[0]), (width, radius[1])):
        there = (
            torch.arange(size, device=device)
            + torch.arange(-reach, reach + 1, device=device)[:, None]
        )
        found.append((there >= 0) & (there < size))
    return found[0][:, None, :, None] & found[1][None, :, None, :]


class _Correlation(torch.autograd.Function):
    """Inner products of ``a (B, c, h, w)`` with the windows of a padded ``b``: ``(B, u, v, h, w)``.

    For one row displacement and n columns of ``a``, the products of every row with the n + v - 1
    columns of ``b`` that its windows touch are one small matrix product, and the volume is a band of
    it: entry (x, x + l). So each step is a batched matrix product of views, and nothing larger than
    one row's share of the volume is ever made. Backward puts the gradient into such bands and
    multiplies again.
    """

    @staticmethod
    def _tiles(a: Tensor, v: int) -> list[slice]:
        """Groups of columns: wide enough for a matrix product, narrow enough to waste little."""
        step = v + (_COLUMNS_CUDA if a.is_cuda else _COLUMNS_CPU)
        return [slice(x, min(x + step, a.shape[3])) for x in range(0, a.shape[3], step)]

    @staticmethod
    def _band(products: Tensor, v: int) -> Tensor:
        """Entries (x, x + l) of matrices ``(h, n, n + v - 1)``, as a view ``(v, h, n)``."""
        h, n, wide = products.shape
        return products.as_strided((v, h, n), (1, n * wide, wide + 1))

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        batch, _, h, w = a.shape
        u, v = b.shape[2] - h + 1, b.shape[3] - w + 1
        out = a.new_empty(batch, u, v, h, w)
        for i in range(batch):
            rows, windows = (
                a[i].permute(1, 2, 0),
                b[i].transpose(0, 1),
            )  # (h, w, c), (h + u - 1, c, ...)
            for own in _Correlation._tiles(a, v):
                reach = slice(own.start, own.stop + v - 1)
                for k in range(u):
                    products = torch.bmm(rows[:, own], windows[k : k + h, :, reach])
                    out[i, k, :, :, own] = _Correlation._band(products, v)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if torch.is_grad_enabled():
            return _slopes_to_differentiate(ctx, grads[0])
        a, b = ctx.saved_tensors
        batch, c, h, w = a.shape
        u, v = b.shape[2] - h + 1, b.shape[3] - w + 1
        grad_a = torch.zeros_like(a) if ctx.needs_input_grad[0] else None
        grad_b = torch.zeros_like(b) if ctx.needs_input_grad[1] else None
        for i in range(batch):
            rows, windows = a[i].permute(1, 2, 0), b[i].transpose(0, 1)
            for own in _Correlation._tiles(a, v):
                n, reach = own.stop - own.start, slice(own.start, own.stop + v - 1)
                slopes = a.new_zeros(h, n, n + v - 1)
                sums = a.new_zeros(h, n, c)
                for k in range(u):
                    _Correlation._band(slopes, v).copy_(grads[0][i, k, :, :, own])
                    if grad_a is not None:
                        sums.baddbmm_(slopes, windows[k : k + h, :, reach].mT)
                    if grad_b is not None:
                        touched = grad_b[i].transpose(0, 1)[k : k + h, :, reach]
                        touched += torch.bmm(rows[:, own].mT, slopes)
                if grad_a is not None:
                    grad_a[i, :, :, own] = sums.permute(2, 0, 1)
        return grad_a, grad_b


class _CorrelationByKernel(torch.autograd.Function):
    """What `_Correlation` returns, by the GPU's kernel; it keeps the two maps and no more either."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        from affnb.kernels import cost_volume as kernel

        ctx.save_for_backward(a, b)
        return kernel.forward(a.contiguous(), b.contiguous())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        from affnb.kernels import cost_volume as kernel

        if torch.is_grad_enabled():
            return _slopes_to_differentiate(ctx, grads[0])
        a, b, grad = (x.contiguous() for x in (*ctx.saved_tensors, grads[0]))
        of_a, of_b = ctx.needs_input_grad
        return (
            kernel.backward(a, b, grad, to_padded=False) if of_a else None,
            kernel.backward(a, b, grad, to_padded=True) if of_b else None,
        )


def _slopes_to_differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a volume that are to be differentiated again: the same, through autograd."""
    a, b = ctx.saved_tensors
    of_a, of_b = ctx.needs_input_grad
    inputs = [x for x, needed in ((a, of_a), (b, of_b)) if needed]
    volume = _correlation_reference(a, b)
    found = iter(torch.autograd.grad(volume, inputs, grad, create_graph=True))
    return next(found) if of_a else None, next(found) if of_b else None


@uncompiled
def _correlation(a: Tensor, b: Tensor) -> Tensor:
    # A loop that keeps nothing: tracing it would only undo that.
    function = _CorrelationByKernel if kernels.wanted(a) else _Correlation
    result: Tensor = function.apply(a, b)  # type: ignore[no-untyped-call]
    return result


def _by_displacement(score: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Scores ``(B, h, w)`` of a map with each shift of a padded one, stacked to ``(B, u, v, h, w)``."""
    h, w = a.shape[-2:]
    rows = []
    for k in range(b.shape[2] - h + 1):
        columns = range(b.shape[3] - w + 1)
        rows.append(torch.stack([score(a, b[:, :, k : k + h, x : x + w]) for x in columns], 1))
    return torch.stack(rows, 1)


def _correlation_reference(a: Tensor, b: Tensor) -> Tensor:
    """Equation 1, displacement by displacement."""
    return _by_displacement(lambda x, y: (x * y).sum(1), a, b)


def _inner(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Equation 2 at every pixel of two maps."""
    return torch.einsum("bihw,ij,bjhw->bhw", x, weight, y)


def _weighted(weight: Tensor | None, f: Tensor) -> Tensor:
    """``W f`` at every pixel; for a symmetric W it does not matter to which side W goes."""
    if weight is None:
        return f
    return (weight.mT @ f.flatten(2)).view(f.shape)


def cost_volume(
    f1: Tensor,
    f2: Tensor,
    *,
    radius: int | tuple[int, int] = 4,
    weight: Tensor | None = None,
    padding: Padding = "zeros",
    backend: Backend = "auto",
) -> Tensor:
    r"""Inner products of every feature of one map with a window of the other (Eqs. 1 and 2).

    .. math:: C_{k,l,i,j} = f^1(i, j)^\top \, W \, f^2(i + k - r_u,\; j + l - r_v)

    Parameters
    ----------
    f1, f2
        Feature maps ``(B, c, h, w)``, floating, finite; in a pyramid f2 is already warped by the flow
        found so far.
    radius
        Reach of the window in pixels of the maps, at least 0: one integer, or (down, right). The window
        has ``u x v = (2 r_u + 1) x (2 r_v + 1)`` candidates. Default 4, the usual 9 x 9 (the paper does
        not name its own).
    weight
        W, ``(c, c)``, symmetric to 1e-5, as from :class:`CayleySPD`. ``None`` (default): the identity,
        the plain cost volume. W is not checked for being positive definite.
    padding
        What a candidate outside the image scores: ``"zeros"`` (default): 0, as if its feature were 0;
        ``"replicate"``: what the nearest pixel of the border scores; ``"exclude"``: ``-inf``, so that
        no softmax or maximum takes it.
    backend
        ``"auto"``: on a GPU a Triton kernel, elsewhere (and in float64) bands of small matrix products.
        ``"reference"``: the equation, one displacement at a time.

    Returns
    -------
    Tensor
        ``(B, u, v, h, w)``: first the row displacement (from -r_u to r_u), then that of columns; not
        divided by the number of channels. float64 if an input is, else float32.

    Raises
    ------
    TypeError
        Inputs that are not floating-point tensors; a radius that is no integer.
    ValueError
        Shapes or devices that do not fit, no channel, values that are not finite, a weight that is not
        symmetric, a negative radius, an unknown option. (While ``torch.compile`` traces, values are
        not looked at.)

    Notes
    -----
    W is applied to f1 alone: time ``O(B h w (c^2 + u v c))``. Memory beyond the result: a copy of each
    map (f2 with its border, W f1), never the ``u v`` copies of an unfolded map; backward likewise.
    Works under ``torch.autocast`` (float32 inside); under ``torch.compile`` the loop runs uncompiled;
    differentiating twice goes through the reference.

    Examples
    --------
    >>> f1 = torch.eye(3).view(1, 3, 1, 3)  # three pixels in a row, each with a channel of its own
    >>> cost_volume(f1, f1.roll(1, 3), radius=(0, 1))[0, 0]  # all moved one to the right
    tensor([[[0., 0., 0.]],
    <BLANKLINE>
            [[0., 0., 0.]],
    <BLANKLINE>
            [[1., 1., 0.]]])
    """
    reach = _check_options(radius, padding, backend)
    _check_pair(f1, f2, weight)
    with torch.autocast(f1.device.type, enabled=False):
        a, b, w = _same_dtype(f1, f2, weight)
        if backend == "reference":
            w = torch.eye(a.shape[1], dtype=a.dtype, device=a.device) if w is None else w
            volume = _by_displacement(lambda x, y: _inner(w, x, y), a, _pad(b, reach, padding))
        else:
            volume = _correlate(_weighted(w, a), b, reach, padding)
        return _without_outside(volume, reach, padding)


def _check_options(radius: Any, padding: Any, backend: Any) -> tuple[int, int]:
    reach = _check_radius(radius)
    check_one_of(padding, "padding", _PADDINGS)
    check_one_of(backend, "backend", _BACKENDS)
    return reach


def _same_dtype(
    f1: Tensor, f2: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = wide_dtype(f1, f2) if weight is None else wide_dtype(f1, f2, weight)
    return f1.to(dtype), f2.to(dtype), None if weight is None else weight.to(dtype)


def _correlate(a: Tensor, b: Tensor, reach: tuple[int, int], padding: str) -> Tensor:
    if a.numel() == 0:  # nothing to pad; keep the (empty) history for backward
        u, v = 2 * reach[0] + 1, 2 * reach[1] + 1
        return (a * b).sum(1)[:, None, None].expand(-1, u, v, -1, -1)
    return _correlation(a, _pad(b, reach, padding))


def _without_outside(volume: Tensor, reach: tuple[int, int], padding: str) -> Tensor:
    if padding != "exclude":
        return volume
    inside = _inside(volume.shape[-2], volume.shape[-1], reach, volume.device)
    return volume.masked_fill(~inside, -torch.inf)


# --------------------------------------------------------------------------------------------------
# Other scores of a pair, and the read-out
# --------------------------------------------------------------------------------------------------


def _squared_norm(weight: Tensor | None, f: Tensor) -> Tensor:
    return (f * _weighted(weight, f)).sum(1)


def _unit(weight: Tensor | None, f: Tensor) -> Tensor:
    """Features over their W-norm; a feature of norm 0 stays 0 and gets no gradient."""
    squared = _squared_norm(weight, f)
    counts = squared > torch.finfo(f.dtype).tiny
    inverse = torch.where(counts, squared, 1.0).rsqrt() * counts
    return f * inverse[:, None]


def matching_score(
    f1: Tensor,
    f2: Tensor,
    *,
    kind: Kind = "inner",
    radius: int | tuple[int, int] = 4,
    weight: Tensor | None = None,
    padding: Padding = "zeros",
    backend: Backend = "auto",
) -> Tensor:
    r"""How well each candidate of a window matches, larger is better (sections 3.2 and 3.5).

    ============ ===================================================================================
    ``kind``     score of the features f and g
    ============ ===================================================================================
    ``"inner"``  :math:`f^\top W g`, the cost volume (Eq. 2); long features win
    ``"cosine"`` :math:`f^\top W g / (\|f\|_W \|g\|_W)`, in [-1, 1]; 0 where a norm is 0
    ``"wssd"``   :math:`-\|f - g\|_W^2`, minus the weighted sum of squared differences (Eqs. 12, 13)
    ============ ===================================================================================

    Parameters
    ----------
    f1, f2, radius, weight, padding, backend
        As for :func:`cost_volume`. ``"cosine"`` and ``"wssd"`` want a W without negative eigenvalues.

    Returns
    -------
    Tensor
        ``(B, u, v, h, w)``, as for :func:`cost_volume`.

    Raises
    ------
    TypeError, ValueError
        As :func:`cost_volume`; an unknown ``kind``; for ``"cosine"`` and ``"wssd"`` a weight with an
        eigenvalue below -1e-5 of the mean of its diagonal.

    Notes
    -----
    One cost volume and two maps of norms (Eq. 14), so time and memory are those of
    :func:`cost_volume`. The squared distance is a difference of large numbers: in float32 its absolute
    error is about 1e-6 of the squared norms. Centre features that sit far from 0 first.

    Examples
    --------
    >>> f = torch.rand(1, 4, 5, 5)
    >>> matching_score(f, f, kind="wssd", radius=1)[0, 1, 1].abs().max() < 1e-5  # no displacement
    tensor(True)
    """
    check_one_of(kind, "kind", ("inner", "cosine", "wssd"))
    reach = _check_options(radius, padding, backend)
    _check_pair(f1, f2, weight)
    if kind == "inner":
        return cost_volume(f1, f2, radius=radius, weight=weight, padding=padding, backend=backend)
    if weight is not None and not torch.compiler.is_compiling():
        _check_no_negative(weight)
    with torch.autocast(f1.device.type, enabled=False):
        a, b, w = _same_dtype(f1, f2, weight)
        if kind == "cosine":
            a, b = _unit(w, a), _unit(w, b)
            if backend == "reference":
                w = torch.eye(a.shape[1], dtype=a.dtype, device=a.device) if w is None else w
                score = _by_displacement(lambda x, y: _inner(w, x, y), a, _pad(b, reach, padding))
            else:
                score = _correlate(_weighted(w, a), b, reach, padding)
        elif backend == "reference":
            score = _by_displacement(
                lambda x, y: -_squared_norm(w, x - y), a, _pad(b, reach, padding)
            )
        else:
            score = 2 * _correlate(_weighted(w, a), b, reach, padding)
            score = score - _squared_norm(w, a)[:, None, None]
            if a.numel():  # the norms of all candidates are views of one padded map
                norms = _pad(_squared_norm(w, b)[:, None], reach, padding)[:, 0]
                score = score - norms.unfold(1, a.shape[2], 1).unfold(2, a.shape[3], 1)
        return _without_outside(score, reach, padding)


def _check_no_negative(weight: Tensor) -> None:
    w = weight.detach().to(wide_dtype(weight))
    shift = 1e-5 * w.diagonal().mean().abs() + torch.finfo(w.dtype).tiny
    lifted = w + shift * torch.eye(len(w), dtype=w.dtype, device=w.device)
    if int(torch.linalg.cholesky_ex(lifted).info):
        raise ValueError("weight: expected no negative eigenvalue, got a matrix with one")


def soft_argmax_flow(cost: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Expected displacement under a softmax over the window.

    .. math:: \sum_{k,l} \tilde\omega_{kl} \, (l - r_v,\; k - r_u),\qquad
              \tilde\omega = \operatorname{softmax}_{kl}(C_{kl} / \tau)

    Parameters
    ----------
    cost
        Scores ``(B, u, v, h, w)`` with u and v odd, larger is better; ``-inf`` takes no part.
    temperature
        :math:`\tau > 0`, in the unit of the scores. Default 1.

    Returns
    -------
    Tensor
        ``(B, 2, h, w)`` in pixels: channel 0 to the right, channel 1 down, the order of optical flow
        files and of torchvision (and not that of the window's axes). float64 for float64 scores, else
        float32.

    Raises
    ------
    TypeError
        ``cost`` not a floating-point tensor, ``temperature`` not a number.
    ValueError
        Another rank, an even window, NaN, ``inf``, a pixel whose candidates are all ``-inf``, a
        temperature that is not positive.

    Notes
    -----
    Time ``O(numel)``; memory one tensor of the size of ``cost`` besides the scaled scores.

    Examples
    --------
    >>> cost = torch.zeros(1, 3, 3, 1, 1)
    >>> cost[0, 0, 2] = 50.0  # one up, one to the right
    >>> soft_argmax_flow(cost).flatten()
    tensor([ 1., -1.])
    """
    check_floating(cost, "cost", ndim=5)
    check_positive(temperature, "temperature")
    u, v = cost.shape[1:3]
    if u % 2 == 0 or v % 2 == 0:
        raise ValueError(f"cost: expected a window of odd sides, got {u} x {v}")
    if cost.numel() and not torch.compiler.is_compiling():
        check_finite(cost.detach().amax((1, 2)), "cost (largest of each window)")
    with torch.autocast(cost.device.type, enabled=False):
        x = cost.to(wide_dtype(cost)) / temperature
        weights = x.flatten(1, 2).softmax(1).view(x.shape)
        steps = [torch.arange(n, dtype=x.dtype, device=x.device) - n // 2 for n in (v, u)]
        right = (weights.sum(1) * steps[0][:, None, None]).sum(1)
        down = (weights.sum(2) * steps[1][:, None, None]).sum(1)
        return torch.stack([right, down], 1)

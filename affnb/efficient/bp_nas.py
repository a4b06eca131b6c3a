"""Barrier-penalty search for mixed precision: how many bits each layer of a network gets, in a budget.

A supernet runs every candidate pair of (weight, activation) widths of a layer at once, weighted by a
softmax; the weights are learnt on held-out data together with a barrier that keeps the expected cost
inside the budget and a regulariser that drives each softmax to a single candidate (Yu et al., "Search
What You Want: Barrier Penalty NAS for Mixed Precision Quantization", ECCV 2020; equation numbers below
are that paper's). What the paper leaves open and this module adds is said where it is added.

Cost is counted in bit operations, a model of the cost on hardware with kernels for every width. PyTorch
has none: quantised values are floating-point numbers that happen to lie on a grid.

``backend="reference"`` computes the printed equations; the tests compare everything with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affnb.checks import (
    check_finite,
    check_flag,
    check_floating,
    check_integer,
    check_labels,
    check_one_of,
    check_positive,
    check_same_device,
    check_shape,
    check_tensor,
)
from affnb.precision import wide_dtype

__all__ = [
    "MixedPrecisionConv2d",
    "argmax_feasible_bound",
    "average_bits",
    "barrier_penalty",
    "expected_average_bits",
    "feasible_choice",
    "feasible_init",
    "prob1",
    "reshape_clip",
    "uniform_quantize",
]

Gradient = Literal["lsq", "pact"]
Backend = Literal["auto", "reference"]

_GRADIENTS = ("lsq", "pact")
_BACKENDS = ("auto", "reference")

#: How far factors may be from a sum of 1, or below 0: what half precision leaves of a softmax.
_TOLERANCE = 1e-2

#: Numbers that the quantiser takes at a time on a CPU where one clipping level serves all, so that its
#: steps meet them in the cache.
_BLOCK = 2**15


# --------------------------------------------------------------------------------------------------
# The quantiser
# --------------------------------------------------------------------------------------------------


def _levels(bits: Any, signed: bool, name: str = "bits") -> int:
    """Return the largest code: n = 2^(b-1) - 1 for signed values, 2^b - 1 for others."""
    check_integer(bits, name)
    least = 2 if signed else 1
    if bits < least:
        kind = "signed" if signed else "unsigned"
        raise ValueError(f"{name}: expected an integer >= {least} for {kind} values, got {bits}")
    return int(2 ** (bits - 1) - 1 if signed else 2**bits - 1)


def _in_blocks(x: Tensor, alpha: Tensor) -> bool:
    whole = x.is_cuda or alpha.numel() != 1 or x.numel() <= _BLOCK or torch.compiler.is_compiling()
    return not whole and alpha.ndim <= x.ndim and x.is_contiguous()


class _Quantize(torch.autograd.Function):
    """Clamp, round and scale, with a straight-through gradient; `alpha` and `n` broadcast against x.

    The result is kept for backward together with x. A convolution keeps its input anyway, so this
    costs nothing where it is used. Works under ``torch.vmap``, so that networks can be stacked.
    """

    @staticmethod
    def forward(x: Tensor, alpha: Tensor, n: Tensor, signed: bool, lsq: bool) -> Tensor:
        n = n.to(wide_dtype(x))
        step = alpha.to(n.dtype) / n
        low = -n if signed else torch.zeros_like(n)

        def quantize(part: Tensor, out: Tensor | None) -> Tensor:
            codes = part.to(n.dtype) / step
            torch.minimum(codes, n, out=codes)
            torch.maximum(codes, low, out=codes)
            return torch.mul(codes.round_(), step, out=out)

        if not _in_blocks(x, alpha):
            return quantize(x, None).to(x.dtype)
        result = torch.empty_like(x)
        flat = (v.view(-1).split(_BLOCK) for v in (x, result))  # type: ignore[no-untyped-call]
        for part, out in zip(*flat, strict=True):
            quantize(part, out)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, alpha, _, ctx.signed, ctx.lsq = inputs
        ctx.save_for_backward(x, alpha, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha, out = ctx.saved_tensors
        to_x, to_alpha = ctx.needs_input_grad[:2]
        most = torch.finfo(x.dtype).max  # an infinite x must not meet the factor 0

        def pull(x: Tensor, out: Tensor, grad: Tensor, own: Tensor | None) -> tuple[Any, Any]:
            # Numbers, 1 inside and 0 elsewhere: booleans would take several times longer on a CPU.
            inside = (alpha - x.abs() if ctx.signed else torch.minimum(x, alpha - x)).gt_(0)
            grad_x = torch.mul(grad, inside, out=own) if to_x else None
            if not to_alpha:
                return grad_x, None
            # Where x is clipped, Q / alpha is its sign; inside the range the slope is (Q - x) / alpha.
            kept = (x.clamp(-most, most) if ctx.lsq else out) * inside
            return grad_x, (out - kept).to(wide_dtype(x)).mul_(grad)

        if torch.is_grad_enabled() or not _in_blocks(x, alpha):
            grad_x, grad_alpha = pull(x, out, grads[0], None)
        else:
            grad_x, grad_alpha = torch.empty_like(x), torch.zeros_like(alpha, dtype=wide_dtype(x))
            flat = (v.reshape(-1).split(_BLOCK) for v in (x, out, grads[0], grad_x))
            for parts in zip(*flat, strict=True):
                slope = pull(*parts)[1]
                if slope is not None:
                    grad_alpha += slope.sum()
        return (
            grad_x.sum_to_size(x.shape).to(x.dtype) if to_x else None,
            (grad_alpha.sum_to_size(alpha.shape) / alpha).to(alpha.dtype) if to_alpha else None,
            *(None, None, None),
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *inputs: Any
    ) -> tuple[Tensor, int]:  # as elementwise as it is: line the dimensions up, and call it
        named = list(zip(inputs[:3], in_dims, strict=False))
        rank = max(v.ndim - (d is not None) for v, d in named)
        lined = []
        for value, dim in named:
            value = value[None] if dim is None else value.movedim(dim, 0)
            ones = (1,) * (rank + 1 - value.ndim)
            lined.append(value.reshape(value.shape[:1] + ones + value.shape[1:]))
        return _quantize(*lined, *inputs[3:]), 0


def _quantize(x: Tensor, alpha: Tensor, n: Tensor, signed: bool, lsq: bool) -> Tensor:
    quantized: Tensor = _Quantize.apply(x, alpha, n, signed, lsq)  # type: ignore[no-untyped-call]
    return quantized


def _nearest_level(x: Tensor, alpha: Tensor, n: int, signed: bool, lsq: bool) -> Tensor:
    """Quantise by looking for the nearest entry of a table of levels; a tie goes to the even code."""
    wide = wide_dtype(x)
    value, alpha = x.to(wide), alpha.to(wide)
    codes = torch.arange(-n if signed else 0, n + 1, device=x.device, dtype=wide)
    distance = ((value / (alpha / n)).detach()[..., None] - codes).abs()
    nearest = distance == distance.amin(-1, keepdim=True)
    code = codes[(nearest * (2 - codes.remainder(2))).argmax(-1)]
    inside = value.abs() < alpha if signed else (value > 0) & (value < alpha)
    if lsq:  # the step depends on alpha, the rounding passes gradients on
        ratio = value / (alpha / n)
        within = alpha / n * (ratio + (code - ratio).detach())
    else:
        within = value + (code * (alpha / n) - value).detach()
    return torch.where(inside, within, alpha / n * code).to(x.dtype)


def uniform_quantize(
    x: Tensor,
    alpha: Tensor | float,
    bits: int,
    signed: bool,
    grad: Gradient = "lsq",
    *,
    backend: Backend = "auto",
) -> Tensor:
    r"""Round to the nearest of evenly spaced levels in a clipping range, with a gradient (Eq. 1).

    Signed values: :math:`Q = s\,\mathrm{round}(\mathrm{clamp}(x, -\alpha, \alpha) / s)` with
    :math:`s = \alpha / n` and :math:`n = 2^{b-1} - 1`: :math:`2^b - 1` levels, 0 among them. Unsigned
    values (activations after a ReLU): the range is :math:`[0, \alpha]` and :math:`n = 2^b - 1`, so all
    :math:`2^b` codes are used. (The paper says only "in a similar way" for these.)

    Parameters
    ----------
    x
        Real values, any shape, floating point. NaN stays NaN, an infinite value is clipped.
    alpha
        Clipping level, above 0: a number, or a floating-point tensor that broadcasts to the shape of
        ``x`` (a scalar for one level a layer, as in the paper). Receives a gradient.
    bits
        Width ``b``: an integer, at least 2 for signed values and at least 1 for others.
    signed
        Whether values have a sign.
    grad
        Rounding counts as the identity (straight through) in ``x``: slope 1 where
        :math:`|x| < \alpha` (unsigned: :math:`0 < x < \alpha`), 0 elsewhere. In ``alpha`` the slope
        is the sign of ``x`` where it is clipped (unsigned: 1 above, 0 below) and, where it is not,
        :math:`(Q - x) / \alpha` for ``"lsq"`` (default) and 0 for ``"pact"``.
    backend
        ``"auto"`` (default), or ``"reference"``, which looks the nearest level up in a table.

    Returns
    -------
    Tensor
        Shape and dtype of ``x``. Half precision is computed in float32 and rounded at the end. Ties
        go to the even code.

    Raises
    ------
    TypeError
        ``x`` or ``alpha`` not floating point, ``bits`` not an integer, ``signed`` not a bool.
    ValueError
        ``bits`` too small, ``alpha`` not positive and finite or of a shape that does not broadcast to
        that of ``x``, another ``grad`` or ``backend``, devices that differ.

    Notes
    -----
    Time and memory ``O(x.numel())``; the reference takes ``2**bits`` times as much.

    Examples
    --------
    >>> x = torch.tensor([-2.0, -0.4, 0.1, 0.3, 0.7])
    >>> uniform_quantize(x, 1.0, 2, signed=True).tolist()
    [-1.0, -0.0, 0.0, 0.0, 1.0]
    >>> uniform_quantize(x, 1.0, 2, signed=False).mul(3).tolist()
    [0.0, 0.0, 0.0, 1.0, 2.0]
    """
    check_floating(x, "x")
    check_flag(signed, "signed")
    n = _levels(bits, signed)
    check_one_of(grad, "grad", _GRADIENTS)
    check_one_of(backend, "backend", _BACKENDS)
    if isinstance(alpha, Tensor):
        check_floating(alpha, "alpha")
        check_same_device([("x", x), ("alpha", alpha)])
        try:
            alpha.expand(x.shape)
        except RuntimeError:
            raise ValueError(
                f"alpha: expected a shape that broadcasts to {tuple(x.shape)}, "
                f"got {tuple(alpha.shape)}"
            ) from None
        lowest = float(alpha.detach().min()) if alpha.numel() else 1.0
        if not lowest > 0:
            raise ValueError(f"alpha: expected values > 0, got {lowest}")
        check_finite(alpha, "alpha")
    else:
        check_positive(alpha, "alpha")
        alpha = torch.tensor(alpha, dtype=wide_dtype(x), device=x.device)
    if backend == "reference":
        return _nearest_level(x, alpha, n, signed, grad == "lsq")
    top = torch.tensor(float(n), dtype=wide_dtype(x), device=x.device)
    return _quantize(x, alpha, top, signed, grad == "lsq")


def reshape_clip(w: Tensor, k: float = 2.0) -> Tensor:
    r"""Clip weights at ``k`` times their mean magnitude: more uniform values (Eqs. 17, 18).

    Parameters
    ----------
    w
        The weights of one layer, any shape, floating point, finite.
    k
        Default 2 (the paper's): the smallest value which leaves a uniform distribution as it is. A
        Gaussian is clipped at 1.6 standard deviations, 11 % of it.

    Returns
    -------
    Tensor
        Like ``w``; values in ``[-T, T]`` with ``T = k * w.abs().mean()``. ``T`` counts as a constant
        in the gradient. To train with it, copy the result into the weights after each step.

    Raises
    ------
    TypeError
        ``w`` not floating point.
    ValueError
        ``w`` not finite, ``k`` not positive.

    Notes
    -----
    Time and memory ``O(w.numel())``.

    Examples
    --------
    >>> reshape_clip(torch.tensor([-4.0, 0.5, 0.5, 1.0])).tolist()  # T = 2 * 1.5
    [-3.0, 0.5, 0.5, 1.0]
    """
    check_floating(w, "w")
    check_finite(w, "w")
    check_positive(k, "k")
    if not w.numel():
        return w.clone()
    limit = (k * w.detach().abs().to(wide_dtype(w)).mean()).to(w.dtype)
    clipped: Tensor = torch.clamp(w, -limit, limit)
    return clipped


# --------------------------------------------------------------------------------------------------
# Cost
# --------------------------------------------------------------------------------------------------


def _check_flops(value: Any, layers: int | None = None) -> Tensor:
    flops = check_tensor(value, "flops")
    if flops.is_complex() or flops.dtype == torch.bool:
        raise TypeError(f"flops: expected real numbers, got {flops.dtype}")
    if flops.ndim < 1 or not flops.numel():
        raise ValueError(f"flops: expected at least one layer, got shape {tuple(flops.shape)}")
    if layers is not None and flops.shape[-1] != layers:
        raise ValueError(f"flops: expected {layers} layers, got {flops.shape[-1]}")
    check_finite(flops, "flops")
    if float(flops.min()) <= 0:
        raise ValueError(f"flops: expected values > 0, got {float(flops.min())}")
    return flops.double()


def _check_products(value: Any, shape: Sequence[int] | None = None) -> Tensor:
    products = check_tensor(value, "products")
    if products.is_complex() or products.dtype == torch.bool:
        raise TypeError(f"products: expected real numbers, got {products.dtype}")
    if products.ndim < 2 or not products.numel():
        raise ValueError(
            f"products: expected shape (..., N, m), none of them 0, got {tuple(products.shape)}"
        )
    if shape is not None and products.shape[-2:] != torch.Size(shape[-2:]):
        raise ValueError(
            f"products: expected shape (..., {shape[-2]}, {shape[-1]}), got {tuple(products.shape)}"
        )
    check_finite(products, "products")
    if float(products.min()) <= 0:
        raise ValueError(f"products: expected values > 0, got {float(products.min())}")
    return products.double()


def average_bits(flops: Tensor, bits: Tensor) -> Tensor:
    r"""Average bits of a mixed-precision model, the unit of the budget (Eq. 4).

    :math:`B = \big(\sum_i F_i b_i a_i / \sum_i F_i\big)^{1/2}`. The compression of the bit operations
    with respect to 32 bits is :math:`(32 / B)^2`.

    Parameters
    ----------
    flops
        ``(N,)`` or ``(..., N)``, integers or real numbers above 0: operations of each layer, in any
        unit.
    bits
        Integers ``(..., N, 2)``, at least 1: width of weights and of activations of each layer.

    Returns
    -------
    Tensor
        float64 ``(...)``, bits.

    Raises
    ------
    TypeError
        ``bits`` not integers.
    ValueError
        Shapes that do not fit, no layer, values that are not positive.

    Notes
    -----
    Time and memory ``O(N)`` a model. Not differentiable in ``bits``; see `expected_average_bits`.

    Examples
    --------
    >>> average_bits(torch.tensor([100, 300]), torch.tensor([[4, 4], [2, 4]])).item()
    3.1622776601683795
    """
    check_labels(bits, "bits", ndim=None)
    if bits.ndim < 2 or bits.shape[-1] != 2:
        raise ValueError(f"bits: expected shape (..., N, 2), got {tuple(bits.shape)}")
    weight = _check_flops(flops, bits.shape[-2])
    check_same_device([("flops", flops), ("bits", bits)])
    if bits.numel() and int(bits.min()) < 1:
        raise ValueError(f"bits: expected values >= 1, got {int(bits.min())}")
    return ((weight * bits.prod(-1)).sum(-1) / weight.sum(-1)).sqrt()


def _expected_bits(p: Tensor, flops: Tensor, products: Tensor) -> Tensor:
    share = (flops / flops.sum(-1, keepdim=True)).to(p.dtype)
    return (share * (p * products.to(p.dtype)).sum(-1)).sum(-1).sqrt()


def expected_average_bits(theta: Tensor, flops: Tensor, products: Tensor) -> Tensor:
    r"""Average bits of the mixture which a supernet is, in the unit of the budget (for Eq. 10).

    .. math:: E = \Big(\sum_i \bar F_i \sum_j p_{ij}\, b_{ij} a_{ij}\Big)^{1/2},
       \qquad p_i = \operatorname{softmax}(\theta_i),\quad \bar F_i = F_i / \sum_k F_k

    The printed equation leaves the unit open. This reading equals `average_bits` where every ``p_i``
    is one-hot; the mean of the square roots of the products would be smaller elsewhere and accept
    models beyond the budget.

    Parameters
    ----------
    theta
        Architecture parameters ``(..., N, m)``, floating point: N layers, m candidates.
    flops
        ``(N,)`` or ``(..., N)``, above 0.
    products
        ``(N, m)`` or ``(..., N, m)``, above 0: width of the weights times width of the activations.

    Returns
    -------
    Tensor
        ``(...)``, bits; float32 for half precision, else the dtype of ``theta``. Its gradient in
        ``theta[i, j]`` is :math:`\bar F_i p_{ij} (c_{ij} - \bar c_i) / (2 E)` with the products c.

    Raises
    ------
    TypeError
        ``theta`` not floating point.
    ValueError
        Shapes that do not fit, values that are not positive, or not finite.

    Notes
    -----
    Time and memory ``O(N m)``.

    Examples
    --------
    >>> theta = torch.zeros(3, 8)
    >>> products = torch.tensor([6, 8, 9, 12, 16, 24, 24, 32]).expand(3, 8)
    >>> round(expected_average_bits(theta, torch.ones(3), products).item(), 3)
    4.047
    """
    check_floating(theta, "theta")
    if theta.ndim < 2 or not theta.shape[-1] or not theta.shape[-2]:
        raise ValueError(f"theta: expected shape (..., N, m), got {tuple(theta.shape)}")
    check_finite(theta, "theta")
    cost, weight = _check_products(products, theta.shape), _check_flops(flops, theta.shape[-2])
    check_same_device([("theta", theta), ("flops", flops), ("products", products)])
    return _expected_bits(theta.to(wide_dtype(theta)).softmax(-1), weight, cost)


def barrier_penalty(
    E: Tensor, budget: float | Tensor, mu: float, delta0: float = 0.02, extend: bool = True
) -> Tensor:
    r"""Barrier on the expected cost: :math:`-\mu \log\log(1 + \delta)` at the slack ``budget - E``.

    Outside the budget (:math:`\delta \le 0`) the function does not exist. With ``extend`` it goes on
    linearly below ``delta0``, with the same value and slope there, so that a step which overshoots
    comes back; this continuation is not in the paper, which does not say what happens there.

    Parameters
    ----------
    E
        Expected cost, bits, any shape, floating point (see `expected_average_bits`).
    budget
        The limit, bits, above 0: a number, or a tensor that broadcasts with ``E``.
    mu
        Strength, above 0. Small values make the barrier a wall.
    delta0
        Slack at which the continuation begins, above 0, bits. Default 0.02 (ours).
    extend
        ``False``: the printed function alone.

    Returns
    -------
    Tensor
        The penalty, like ``E`` (float32 for half precision). Not a distance: it is 0 at a slack of
        e - 1 and negative beyond. Slope in ``E``: :math:`\mu / ((1 + \delta)\log(1 + \delta))`.

    Raises
    ------
    TypeError
        ``E`` not floating point, numbers that are none.
    ValueError
        ``budget``, ``mu`` or ``delta0`` not positive, ``E`` with a NaN or an infinite value; with
        ``extend=False`` also an ``E`` at or beyond the budget.

    Notes
    -----
    Time and memory ``O(E.numel())``.

    Examples
    --------
    >>> E = torch.tensor([2.0, 2.99, 3.5])
    >>> [round(v, 2) for v in barrier_penalty(E, budget=3.0, mu=0.1).tolist()]
    [0.04, 0.44, 2.97]
    """
    check_floating(E, "E")
    if isinstance(budget, Tensor):
        check_finite(budget, "budget")
        if budget.numel() and float(budget.min()) <= 0:
            raise ValueError(f"budget: expected values > 0, got {float(budget.min())}")
    else:
        check_positive(budget, "budget")
    check_positive(mu, "mu")
    check_positive(delta0, "delta0")
    check_flag(extend, "extend")
    check_finite(E, "E")
    slack = budget - E.to(wide_dtype(E))
    if not extend:
        if slack.numel() and float(slack.detach().min()) <= 0:
            raise ValueError(
                f"E: expected values below the budget, got one {-float(slack.detach().min()):.4g} "
                "bits beyond (extend=True continues the barrier)"
            )
        return -mu * slack.log1p().log()
    kept = slack.clamp(min=delta0)
    slope = -mu / ((1 + delta0) * math.log1p(delta0))
    return -mu * kept.log1p().log() + slope * (slack - kept)


def _check_simplex(p: Any, name: str, dim: int = -1) -> None:
    check_floating(p, name)
    if not p.ndim or not -p.ndim <= dim < p.ndim or not p.shape[dim]:
        raise ValueError(f"{name}: expected candidates in dimension {dim}, got {tuple(p.shape)}")
    if not p.numel():
        return
    value = p.detach().float()
    off = float((value.sum(dim) - 1).abs().max())
    if not off <= _TOLERANCE or float(value.min()) < -_TOLERANCE:
        raise ValueError(
            f"{name}: expected values >= 0 with the sum 1 in dimension {dim}, got sums up to "
            f"{off:.3g} away from 1 and a least value of {float(value.min()):.3g}"
        )


def prob1(p: Tensor, dim: int = -1) -> Tensor:
    r"""Prob-1 function :math:`\prod_j (1 - p_j)`, zero exactly at one-hot factors (Eqs. 12 to 14).

    Parameters
    ----------
    p
        Importance factors, floating point: at least 0, with the sum 1 along ``dim``.
    dim
        The dimension of the candidates. Default the last.

    Returns
    -------
    Tensor
        Shape of ``p`` without ``dim``, in [0, 1/e) (float32 for half precision). The paper's
        regulariser is its sum over the layers, with the weight 1. It bounds the largest factor:
        :math:`p_{\max}(1 - p_{\max}) \le f \le 1 - p_{\max}`. At one-hot factors the gradient is
        finite: -1 in the entry that is 1, and 0 in the others.

    Raises
    ------
    TypeError
        ``p`` not floating point.
    ValueError
        Off the simplex by more than 0.01, or without candidates.

    Notes
    -----
    Time and memory ``O(p.numel())``. A product, not the exponential of a sum of logarithms, whose
    gradient would be NaN at one-hot factors.

    Examples
    --------
    >>> prob1(torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])).tolist()
    [0.0, 0.25]
    """
    _check_simplex(p, "p", dim)
    return (1 - p.to(wide_dtype(p))).prod(dim)


def argmax_feasible_bound(p: Tensor, E: Tensor | float) -> Tensor:
    r"""Largest average bits that the arg max model of a mixture of expected cost ``E`` can have.

    :math:`B(\text{arg max}) \le E / \sqrt{\min_i \max_j p_{ij}}`: if this is within the budget, the
    sampled model is, without looking at it. (Ours; the paper has no such bound.)

    Parameters
    ----------
    p
        Importance factors ``(..., N, m)``, rows on the simplex, N and m at least 1.
    E
        Expected cost of that mixture, bits, above 0: ``(...)`` or a number.

    Returns
    -------
    Tensor
        ``(...)``, bits.

    Raises
    ------
    TypeError
        ``p`` not floating point.
    ValueError
        Off the simplex by more than 0.01, no layer, ``E`` not positive and finite.

    Notes
    -----
    Time and memory ``O(N m)``.

    Examples
    --------
    >>> p = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    >>> round(argmax_feasible_bound(p, 2.5).item(), 3)
    2.795
    """
    check_tensor(p, "p")
    if p.ndim < 2 or not p.shape[-2]:
        raise ValueError(f"p: expected shape (..., N, m), got {tuple(p.shape)}")
    _check_simplex(p, "p")
    least = p.to(wide_dtype(p)).amax(-1).amin(-1)
    if isinstance(E, Tensor):
        check_floating(E, "E")
        check_finite(E, "E")
        if E.numel() and float(E.detach().min()) <= 0:
            raise ValueError(f"E: expected values > 0, got {float(E.detach().min())}")
    else:
        check_positive(E, "E")
    return E / least.sqrt()


def _cheapest(products: Tensor, flops: Tensor, budget: float, strictly: bool) -> float:
    """Return the average bits of the cheapest model; raise if the budget does not reach it."""
    share = flops / flops.sum()
    least = math.sqrt(float((share * products.amin(-1)).sum()))
    if budget < least or (strictly and budget == least):
        raise ValueError(
            f"budget: expected {'more than' if strictly else 'at least'} the cheapest model's "
            f"{least:.4g} bits, got {budget}"
        )
    return least


def feasible_init(products: Tensor, flops: Tensor, budget: float, margin: float = 0.1) -> Tensor:
    r"""Architecture parameters at which a search starts inside the budget.

    Uniform factors are outside most budgets, where the barrier does not exist. So tilt them towards
    cheap candidates, :math:`\theta_{ij} = -\kappa\, c_{ij}` with the products c, and as little as is
    needed. (Ours; the paper starts uniform.)

    Parameters
    ----------
    products
        ``(N, m)``, above 0: width of the weights times width of the activations.
    flops
        ``(N,)``, above 0.
    budget
        The limit, bits, above the cheapest model's.
    margin
        Slack to start with, bits, above 0; at most half of the way from the cheapest model to the
        budget is taken. Default 0.1.

    Returns
    -------
    Tensor
        ``(N, m)``, in the default dtype: zeros where uniform factors leave enough slack.

    Raises
    ------
    ValueError
        Shapes that do not fit, values that are not positive, a budget not above the cheapest model's.

    Notes
    -----
    Bisection, ``O(N m)`` time a step, about 100 steps.

    Examples
    --------
    >>> products = torch.tensor([[6, 8, 9, 12, 16, 24, 24, 32]] * 3)
    >>> theta = feasible_init(products, torch.ones(3), budget=3.0)
    >>> round(expected_average_bits(theta, torch.ones(3), products).item(), 3)
    2.9
    """
    cost = _check_products(products)
    check_shape(products, "products", (None, None))
    check_shape(flops, "flops", (products.shape[0],))
    weight = _check_flops(flops)
    check_positive(budget, "budget")
    check_positive(margin, "margin")
    check_same_device([("products", products), ("flops", flops)])
    least = _cheapest(cost, weight, budget, strictly=True)
    target = max(budget - margin, (budget + least) / 2)

    def tilted(kappa: float) -> Tensor:
        return kappa * (cost.amin(-1, keepdim=True) - cost) + 0.0  # a shift changes no softmax

    def bits(kappa: float) -> float:
        return float(_expected_bits(tilted(kappa).softmax(-1), weight, cost))

    low, high = 0.0, 0.0
    if bits(0.0) > target:
        high = 1 / float(cost.max())
        while bits(high) > target:  # ends: the cost falls to the cheapest model's, which is less
            high *= 2
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if bits(middle) > target else (low, middle)
    return tilted(high).to(torch.get_default_dtype())


def feasible_choice(
    p: Tensor, products: Tensor, flops: Tensor, budget: float
) -> tuple[Tensor, int]:
    r"""Arg max candidate of each layer (Eq. 8), made to fit the budget if it does not.

    While the model is too expensive, one layer moves to a cheaper candidate. If a single move suffices,
    it is the one that gives up the least log-probability; if none does, the one that gives up the least
    for each bit operation saved. (The repair is ours. A mixture inside the budget can have an arg max
    outside, and the paper says nothing about it.)

    Parameters
    ----------
    p
        Importance factors ``(N, m)``, rows on the simplex.
    products
        ``(N, m)``, above 0: width of the weights times width of the activations.
    flops
        ``(N,)``, above 0.
    budget
        The limit, bits, at least the cheapest model's.

    Returns
    -------
    choice : Tensor
        int64 ``(N,)``: index of each layer's candidate. Its average bits are at most ``budget``.
    moves : int
        How many moves that took: 0 if the arg max was inside.

    Raises
    ------
    TypeError
        ``p`` not floating point.
    ValueError
        Shapes that do not fit, off the simplex, values that are not positive, a budget below the
        cheapest model's.

    Notes
    -----
    Every move makes a layer cheaper, so there are at most ``N (m - 1)``, each of ``O(N m)`` time.

    Examples
    --------
    >>> p, products = torch.tensor([[0.2, 0.3, 0.5]]), torch.tensor([[9, 12, 32]])
    >>> feasible_choice(p, products, torch.ones(1), budget=4.5)  # arg max: 5.66 bits
    (tensor([1]), 1)
    """
    check_tensor(p, "p", ndim=2)
    _check_simplex(p, "p")
    cost = _check_products(products, p.shape)
    check_shape(products, "products", tuple(p.shape))
    check_shape(flops, "flops", (p.shape[0],))
    weight = _check_flops(flops)
    check_positive(budget, "budget")
    check_same_device([("p", p), ("products", products), ("flops", flops)])
    _cheapest(cost, weight, budget, strictly=False)
    log_p = p.detach().double().clamp(min=1e-30).log()
    operations = weight[:, None] * cost
    choice = log_p.argmax(-1)
    rows = torch.arange(len(choice), device=choice.device)
    moves = 0

    def bits(spent: Tensor) -> Tensor:
        return (spent / weight.sum()).sqrt()

    while float(bits(operations[rows, choice].sum())) > budget:
        saved = operations[rows, choice, None] - operations
        lost = log_p[rows, choice, None] - log_p
        enough = bits(operations[rows, choice].sum() - saved) <= budget
        price = torch.where(enough, lost, math.inf)
        if not enough.any():
            price = torch.where(saved > 0, lost / saved, math.inf)
        layer, candidate = divmod(int(price.argmin()), p.shape[1])
        choice[layer] = candidate
        moves += 1
    return choice, moves


# --------------------------------------------------------------------------------------------------
# The supernet's layer
# --------------------------------------------------------------------------------------------------


class MixedPrecisionConv2d(nn.Conv2d):
    r"""Convolution that is a mixture of quantised ones: a layer of the supernet (Eqs. 6 and 7).

    .. math:: y = \sum_j p_j\, \mathrm{conv}\big(Q(x; a_j), Q(W; b_j)\big),
       \qquad p = \operatorname{softmax}(\theta)

    All candidates share the weights W (the paper does not say whether they do). Then the sum is
    bilinear, and candidates of one activation width a can share a convolution with the weights
    :math:`\sum_{j: a_j = a} p_j Q(W; b_j)`; the convolutions that remain differ in their input, so
    they are one convolution of the stacked inputs.

    Parameters
    ----------
    in_channels, out_channels, kernel_size
        As in ``torch.nn.Conv2d``. A linear layer is a convolution of size 1 on a 1 x 1 map.
    candidates
        Pairs ``(b, a)`` of widths of weights and activations, integers, each pair once.
    stride, padding, dilation, groups, bias
        As in ``torch.nn.Conv2d``. Padding is with zeros, which every width has.
    signed_input
        Whether the input can be negative (standardised images). Default ``False``: it follows a
        ReLU, is clipped to ``[0, alpha]``, and needs no ReLU of its own before.
    alpha_input
        Clipping level of the input to start with, above 0. Default 3. That of the weights starts at
        their largest magnitude. `set_alpha` sets both.
    grad
        Gradient in the clipping levels, as in `uniform_quantize`.
    backend
        ``"auto"`` (default), or ``"reference"``: one convolution a candidate, as printed.

    Attributes
    ----------
    theta : Parameter
        ``(m,)``, zeros at the start. Layers of a block share one by assignment.
    candidates : tuple of pairs
        As given.
    choice : int, "float" or None
        What `forward` runs, see `fix`.

    Raises
    ------
    TypeError
        Candidates that are not pairs of integers.
    ValueError
        No candidate, one that occurs twice, a width below what `uniform_quantize` takes,
        ``alpha_input`` not positive, another ``grad`` or ``backend``.

    Notes
    -----
    With A activation widths among m candidates a step takes about A / m of the literal time, and keeps A
    quantised copies of the input instead of m, and one output instead of m. Each width has clipping
    levels of its own, learnt through a softplus so that they stay positive.

    Examples
    --------
    >>> layer = MixedPrecisionConv2d(3, 8, 3, [(2, 3), (4, 4), (8, 4)], padding=1)
    >>> layer(torch.rand(2, 3, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    >>> layer.fix(layer.sample())  # run the arg max candidate from now on
    >>> layer.candidates[layer.choice]
    (2, 3)
    """

    raw_alpha_weight: nn.Parameter
    raw_alpha_input: nn.Parameter
    input_index: tuple[int, ...]
    weight_index: tuple[int, ...]
    pairs: Tensor
    input_levels: Tensor
    weight_levels: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        candidates: Sequence[tuple[int, int]],
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        signed_input: bool = False,
        alpha_input: float = 3.0,
        grad: Gradient = "lsq",
        backend: Backend = "auto",
    ) -> None:
        pairs = self._check_candidates(candidates, signed_input)
        check_one_of(grad, "grad", _GRADIENTS)
        check_one_of(backend, "backend", _BACKENDS)
        check_positive(alpha_input, "alpha_input")
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )
        self.candidates, self.signed_input = pairs, signed_input
        self.grad, self.backend = grad, backend
        self.choice: int | Literal["float"] | None = None
        self.theta = nn.Parameter(torch.zeros(len(pairs)))
        for side, column, signed in (("weight", 0, True), ("input", 1, signed_input)):
            widths = sorted({pair[column] for pair in pairs})
            setattr(self, f"{side}_index", tuple(widths.index(pair[column]) for pair in pairs))
            levels = torch.tensor([float(_levels(width, signed)) for width in widths])
            self.register_buffer(f"{side}_levels", levels, persistent=False)
            setattr(self, f"raw_alpha_{side}", nn.Parameter(torch.empty(len(widths))))
        # Which pair of widths (input, weight) each candidate is: adds its factor to theirs.
        n_a, n_b = len(self.input_levels), len(self.weight_levels)
        flat = [n_b * a + b for a, b in zip(self.input_index, self.weight_index, strict=True)]
        self.register_buffer("pairs", torch.eye(n_a * n_b)[flat], persistent=False)
        self.set_alpha(float(self.weight.detach().abs().max()) or 1.0, alpha_input)

    @staticmethod
    def _check_candidates(candidates: Any, signed_input: Any) -> tuple[tuple[int, int], ...]:
        check_flag(signed_input, "signed_input")
        if not isinstance(candidates, Sequence) or isinstance(candidates, str):
            raise TypeError(f"candidates: expected a sequence of pairs, got {candidates!r}")
        pairs = []
        for pair in candidates:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TypeError(f"candidates: expected pairs (b, a), got {pair!r}")
            _levels(pair[0], True, "candidates")
            _levels(pair[1], signed_input, "candidates")
            pairs.append((pair[0], pair[1]))
        if not pairs:
            raise ValueError("candidates: expected at least one, got none")
        if len(set(pairs)) < len(pairs):
            raise ValueError(f"candidates: expected each pair once, got {pairs}")
        return tuple(pairs)

    @property
    def alpha_weight(self) -> Tensor:
        """Clipping levels of the weights, one for each width in ascending order."""
        return F.softplus(self.raw_alpha_weight)

    @property
    def alpha_input(self) -> Tensor:
        """Clipping levels of the input, one for each width in ascending order."""
        return F.softplus(self.raw_alpha_input)

    @torch.no_grad()
    def set_alpha(self, weight: float, input: float) -> None:
        """Set the clipping levels of weights and input, alike for all widths.

        Raises
        ------
        ValueError
            A level that is not positive.
        """
        check_positive(weight, "weight")
        check_positive(input, "input")
        for raw, value in ((self.raw_alpha_weight, weight), (self.raw_alpha_input, input)):
            raw.fill_(value + math.log(-math.expm1(-value)))  # the inverse of softplus

    def probabilities(self) -> Tensor:
        """Importance factors ``softmax(theta)``, shape ``(m,)``."""
        return self.theta.softmax(-1)

    def sample(self, *, greedy: bool = True, generator: torch.Generator | None = None) -> int:
        """Index of the most probable candidate (Eq. 8), or with ``greedy=False`` of a random one.

        Parameters
        ----------
        greedy
            ``False`` draws a candidate with the probability of its factor: path sampling.
        generator
            For the draw. Default: PyTorch's global one.
        """
        check_flag(greedy, "greedy")
        p = self.probabilities().detach()
        if greedy:
            return int(p.argmax())
        return int(torch.multinomial(p, 1, generator=generator))

    def fix(self, choice: int | Literal["float"] | None) -> None:
        """Run a single candidate from now on, or ``"float"`` (clipped input, nothing rounded).

        ``None`` runs the mixture again.

        Raises
        ------
        ValueError
            Not one of these.
        """
        known = isinstance(choice, int) and not isinstance(choice, bool)
        if choice not in (None, "float") and not (
            known and 0 <= int(choice) < len(self.candidates)
        ):
            raise ValueError(
                f"choice: expected an index below {len(self.candidates)}, 'float' or None, "
                f"got {choice!r}"
            )
        self.choice = choice

    def _quantized_input(self, x: Tensor, width: int) -> Tensor:
        alpha, n = self.alpha_input[width], self.input_levels[width]
        return _quantize(x, alpha, n, self.signed_input, self.grad == "lsq")

    def _quantized_weight(self, width: int) -> Tensor:
        alpha, n = self.alpha_weight[width], self.weight_levels[width]
        return _quantize(self.weight, alpha, n, True, self.grad == "lsq")

    def _mixture(self, x: Tensor, p: Tensor) -> Tensor:
        lsq = self.grad == "lsq"
        n_a, n_b = len(self.input_levels), len(self.weight_levels)
        # All widths at once, in new dimensions: (n_b, O, C / g, kh, kw) and (B, g, n_a, C / g, H, W).
        weights = _quantize(
            self.weight[None],
            self.alpha_weight.view(-1, 1, 1, 1, 1),
            self.weight_levels.view(-1, 1, 1, 1, 1),
            True,
            lsq,
        )
        spread = (1, 1, n_a, 1, 1, 1)
        inputs = _quantize(
            x.unflatten(1, (self.groups, 1, -1)),  # type: ignore[no-untyped-call]
            self.alpha_input.view(spread),
            self.input_levels.view(spread),
            self.signed_input,
            lsq,
        )
        shares = (p.to(weights.dtype) @ self.pairs.to(weights.dtype)).view(n_a, n_b)
        mixed = torch.einsum("ab,bockl->oackl", shares, weights)
        return F.conv2d(
            inputs.flatten(1, 3),
            mixed.flatten(1, 2),
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )

    def _single(self, x: Tensor) -> Tensor:
        if self.choice == "float":
            alpha = self.alpha_input[-1]
            low = -alpha if self.signed_input else torch.zeros_like(alpha)
            x, weight = torch.clamp(x, low, alpha), self.weight
        else:
            j = int(self.choice or 0)
            x = self._quantized_input(x, self.input_index[j])
            weight = self._quantized_weight(self.weight_index[j])
        y: Tensor = self._conv_forward(x, weight, self.bias)
        return y

    def forward(self, x: Tensor, p: Tensor | None = None) -> Tensor:
        """Convolve with the mixture, or with what `fix` says.

        Parameters
        ----------
        x
            ``(B, in_channels, H, W)``, floating point.
        p
            Importance factors ``(m,)`` to take instead of ``softmax(theta)``.

        Returns
        -------
        Tensor
            ``(B, out_channels, H', W')``.

        Raises
        ------
        TypeError
            ``x`` not floating point.
        ValueError
            ``x`` of another shape, ``p`` of another shape.
        """
        check_floating(x, "x", ndim=4)
        check_shape(x, "x", (None, self.in_channels, None, None))
        if self.choice is not None:
            return self._single(x)
        if p is None:
            p = self.probabilities()
        else:
            check_tensor(p, "p", ndim=1)
            check_shape(p, "p", (len(self.candidates),))
        if self.backend == "auto":
            return self._mixture(x, p)
        y = sum(
            p[j]
            * self._conv_forward(
                self._quantized_input(x, self.input_index[j]),
                self._quantized_weight(self.weight_index[j]),
                None,
            )
            for j in range(len(self.candidates))
        )
        assert isinstance(y, Tensor)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)

    def extra_repr(self) -> str:
        """Return what `print` shows: the convolution, its candidates and its state."""
        shown = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{shown}, candidates={self.candidates}, choice={self.choice!r}"

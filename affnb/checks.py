"""Input validation shared by the whole package.

Each function raises before any work is done, and the message always has the same three parts: the
argument's name, what was expected, what came. They return nothing (or the checked value where that
saves a line at the call site) and cost at most one pass over the data.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from affnb.precision import wide_dtype

__all__ = [
    "check_at_least",
    "check_between",
    "check_bool",
    "check_differentiated_once",
    "check_finite",
    "check_flag",
    "check_floating",
    "check_integer",
    "check_integers",
    "check_labels",
    "check_no_nan",
    "check_norms",
    "check_one_of",
    "check_positive",
    "check_same_device",
    "check_shape",
    "check_square",
    "check_tensor",
]


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}, on {value.device}"
    return f"{type(value).__name__} {reprlib.repr(value)}"  # a long list is cut short


def check_tensor(value: Any, name: str, *, ndim: int | Sequence[int] | None = None) -> Tensor:
    """Raise unless ``value`` is a tensor with (one of) the given number(s) of dimensions.

    Parameters
    ----------
    value
        What the caller passed.
    name
        The argument's name, for the message.
    ndim
        The allowed rank, a collection of allowed ranks, or ``None`` for any.

    Raises
    ------
    TypeError
        ``value`` is not a ``torch.Tensor``.
    ValueError
        The rank differs.

    Examples
    --------
    >>> check_tensor(torch.zeros(2, 3), "features", ndim=2).shape
    torch.Size([2, 3])
    >>> check_tensor([1.0], "features")
    Traceback (most recent call last):
        ...
    TypeError: features: expected a torch.Tensor, got list [1.0]
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {_describe(value)}")
    if ndim is not None:
        allowed = (ndim,) if isinstance(ndim, int) else tuple(ndim)
        if value.ndim not in allowed:
            ranks = " or ".join(str(n) for n in allowed)
            raise ValueError(f"{name}: expected {ranks} dimensions, got {_describe(value)}")
    return value


def check_floating(value: Any, name: str, *, ndim: int | Sequence[int] | None = None) -> Tensor:
    """Raise as `check_tensor` does, and ``TypeError`` unless the dtype is a real floating-point one.

    Examples
    --------
    >>> check_floating(torch.tensor([1, 2]), "features", ndim=1)
    Traceback (most recent call last):
        ...
    TypeError: features: expected a floating-point dtype, got a tensor of shape (2,), torch.int64, on cpu
    """
    tensor = check_tensor(value, name, ndim=ndim)
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {_describe(tensor)}")
    return tensor


def check_bool(value: Any, name: str, *, ndim: int | Sequence[int] | None = None) -> Tensor:
    """Raise as `check_tensor` does, and ``TypeError`` unless the dtype is ``torch.bool``."""
    tensor = check_tensor(value, name, ndim=ndim)
    if tensor.dtype != torch.bool:
        raise TypeError(f"{name}: expected dtype torch.bool, got {_describe(tensor)}")
    return tensor


def check_shape(value: Tensor, name: str, shape: Sequence[int | None]) -> None:
    """Raise ``ValueError`` unless the shape matches; ``None`` in ``shape`` matches any size.

    Examples
    --------
    >>> check_shape(torch.zeros(5, 4), "boxes", (None, 4))
    >>> check_shape(torch.zeros(5, 3), "boxes", (None, 4))
    Traceback (most recent call last):
        ...
    ValueError: boxes: expected shape (*, 4), got a tensor of shape (5, 3), torch.float32, on cpu
    """
    ok = value.ndim == len(shape) and all(
        want is None or want == got for want, got in zip(shape, value.shape, strict=True)
    )
    if not ok:
        want = ", ".join("*" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: expected shape ({want}), got {_describe(value)}")


def check_square(value: Tensor, name: str) -> None:
    """Raise ``ValueError`` unless the last two dimensions exist and are equal."""
    if value.ndim < 2 or value.shape[-1] != value.shape[-2]:
        raise ValueError(f"{name}: expected shape (..., N, N), got {_describe(value)}")


def check_no_nan(value: Tensor, name: str) -> None:
    """Raise ``ValueError`` when a NaN is present (infinite values pass)."""
    if value.numel() and bool(torch.isnan(value.detach()).any()):
        count = int(torch.isnan(value.detach()).sum())
        raise ValueError(f"{name}: expected no NaN, got {count} in {_describe(value)}")


def check_finite(value: Tensor, name: str) -> None:
    """Raise ``ValueError`` when a NaN or an infinite value is present.

    One reduction of the values, and no mask of them unless something is wrong.
    """
    # A finite sum has finite terms; the full check is needed only where the sum is not.
    if math.isfinite(float(value.detach().sum(dtype=torch.float32))):
        return
    if not bool(torch.isfinite(value.detach()).all()):
        count = int((~torch.isfinite(value.detach())).sum())
        raise ValueError(
            f"{name}: expected finite values, got {count} not finite in {_describe(value)}"
        )


def check_norms(value: Tensor, name: str) -> Tensor:
    """Raise ``ValueError`` unless all vectors (the last dimension) have a finite norm; return the norms.

    One reduction finds NaN, infinite values, and what would overflow in a product.

    Examples
    --------
    >>> check_norms(torch.tensor([[3.0, 4.0]]).half(), "features")
    tensor([5.])
    """
    norms: Tensor = torch.linalg.vector_norm(value.detach(), dim=-1, dtype=wide_dtype(value))
    if norms.numel() and not math.isfinite(float(norms.amax())):  # NaN comes out of it, too
        check_finite(value, name)
        raise ValueError(f"{name}: expected vectors whose norm is finite, got an overflow")
    return norms


def check_labels(
    value: Any,
    name: str,
    *,
    length: int | None = None,
    num_classes: int | None = None,
    ignore_index: int | None = None,
    ndim: int | None = 1,
) -> Tensor:
    """Raise unless ``value`` is an integer tensor of labels.

    Parameters
    ----------
    value, name
        What the caller passed, and the argument's name.
    length
        Required size of the first dimension, or ``None``.
    num_classes
        If given, labels must lie in ``[0, num_classes)``.
    ignore_index
        A value exempt from that range, or ``None``.
    ndim
        Required rank; ``None`` for any.

    Raises
    ------
    TypeError
        Not a tensor, or not an integer dtype.
    ValueError
        Wrong rank or length, or a label out of range.

    Examples
    --------
    >>> check_labels(torch.tensor([0, 2, 255]), "labels", num_classes=3, ignore_index=255).tolist()
    [0, 2, 255]
    >>> check_labels(torch.tensor([0, 3]), "labels", num_classes=3)
    Traceback (most recent call last):
        ...
    ValueError: labels: expected values in [0, 3), got 3
    """
    tensor = check_tensor(value, name, ndim=ndim)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: expected an integer dtype, got {_describe(tensor)}")
    if length is not None and tensor.shape[0] != length:
        raise ValueError(f"{name}: expected length {length}, got {_describe(tensor)}")
    if num_classes is not None and tensor.numel():
        bad = (tensor < 0) | (tensor >= num_classes)
        if ignore_index is not None:
            bad &= tensor != ignore_index
        if bool(bad.any()):
            first = int(tensor[bad][0])
            besides = "" if ignore_index is None else f" or {ignore_index}"
            raise ValueError(f"{name}: expected values in [0, {num_classes}){besides}, got {first}")
    return tensor


def check_same_device(tensors: Iterable[tuple[str, Tensor | None]]) -> None:
    """Raise ``ValueError`` unless all given (name, tensor) pairs lie on one device.

    Pairs whose tensor is ``None`` are passed over, so optional arguments need no special case.
    """
    present = [(name, t) for name, t in tensors if t is not None]
    for name, tensor in present[1:]:
        first_name, first = present[0]
        if tensor.device != first.device:
            raise ValueError(
                f"{name}: expected the device of {first_name} ({first.device}), got {tensor.device}"
            )


def check_one_of(value: Any, name: str, allowed: Sequence[Any]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``allowed``.

    Examples
    --------
    >>> check_one_of("fast", "backend", ("auto", "reference"))
    Traceback (most recent call last):
        ...
    ValueError: backend: expected one of 'auto', 'reference', got 'fast'
    """
    if not any(type(value) is type(option) and value == option for option in allowed):
        names = ", ".join(repr(option) for option in allowed)
        raise ValueError(f"{name}: expected one of {names}, got {value!r}")


def check_integer(value: Any, name: str, minimum: int | None = None) -> None:
    """Raise unless ``value`` is an ``int`` (and no ``bool``), at least ``minimum`` if that is given.

    Examples
    --------
    >>> check_integer(2.0, "size")
    Traceback (most recent call last):
        ...
    TypeError: size: expected an integer, got float 2.0
    >>> check_integer(0, "size", 1)
    Traceback (most recent call last):
        ...
    ValueError: size: expected an integer >= 1, got 0
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {_describe(value)}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name}: expected an integer >= {minimum}, got {value}")


def check_integers(values: Any, name: str, minimum: int) -> None:
    """Raise unless ``values`` is a sequence of ``int`` (and no ``bool``), each at least ``minimum``.

    Examples
    --------
    >>> check_integers([1, 0], "ks", 1)
    Traceback (most recent call last):
        ...
    ValueError: ks: expected integers >= 1, got [1, 0]
    """
    if not isinstance(values, Sequence) or not all(
        isinstance(k, int) and not isinstance(k, bool) for k in values
    ):
        raise TypeError(f"{name}: expected a sequence of integers, got {_describe(values)}")
    if any(k < minimum for k in values):
        raise ValueError(f"{name}: expected integers >= {minimum}, got {list(values)}")


def check_flag(value: Any, name: str) -> None:
    """Raise ``TypeError`` unless ``value`` is ``True`` or ``False``.

    Examples
    --------
    >>> check_flag(1, "include_self")
    Traceback (most recent call last):
        ...
    TypeError: include_self: expected a bool, got int 1
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {_describe(value)}")


def _check_real(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a real number, got {_describe(value)}")
    return float(value)


def check_at_least(value: Any, name: str, minimum: float) -> None:
    """Raise unless ``value`` is a finite real number with ``value >= minimum``.

    Examples
    --------
    >>> check_at_least(-1, "gamma", 0)
    Traceback (most recent call last):
        ...
    ValueError: gamma: expected a finite number >= 0, got -1
    """
    number = _check_real(value, name)
    if not math.isfinite(number) or number < minimum:
        raise ValueError(f"{name}: expected a finite number >= {minimum}, got {value!r}")


def check_between(value: Any, name: str, low: float, high: float) -> None:
    """Raise unless ``value`` is a real number in ``[low, high]`` (shares, probabilities, margins).

    Examples
    --------
    >>> check_between(1.5, "alpha", 0, 1)
    Traceback (most recent call last):
        ...
    ValueError: alpha: expected a number in [0, 1], got 1.5
    """
    if not low <= _check_real(value, name) <= high:  # NaN is in no interval
        raise ValueError(f"{name}: expected a number in [{low}, {high}], got {value!r}")


def check_positive(value: Any, name: str) -> None:
    """Raise unless ``value`` is a finite real number greater than 0 (temperatures, sizes)."""
    number = _check_real(value, name)
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")


def check_differentiated_once(function: str) -> None:
    """Raise if this backward pass is recorded, in order to be differentiated itself.

    For the backward of a custom function that returns what was made without a record: to autograd that
    is a constant, so a second derivative (a gradient penalty, say) would silently lack its share.
    PyTorch's ``once_differentiable`` notices this only where the incoming gradient has a history.

    Parameters
    ----------
    function
        Name of the operation, for the message.

    Raises
    ------
    RuntimeError
        Under ``create_graph=True``.

    Examples
    --------
    >>> with torch.no_grad():  # as in an ordinary backward pass
    ...     check_differentiated_once("f")
    """
    # While a compiler traces, this mode is its own.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{function}: expected to be differentiated once, got create_graph=True; "
            'backend="reference" can be differentiated twice'
        )

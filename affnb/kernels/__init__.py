"""Fused GPU kernels, imported only by what runs them, and how operations meet the compiler.

Importing this package costs nothing: Triton is looked up the first time that it is asked for, so a
machine without it (or without a GPU) uses every operation of ``affnb`` through PyTorch alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["triton_available", "uncompiled", "wanted"]

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function run as it is under ``torch.compile`` (a graph break).

    For loops that follow the data's values, or that keep nothing on purpose, which tracing would undo.
    It does what the decorator ``torch.compiler.disable`` does, which however makes every import of
    ``affnb`` import the whole compiler.

    Examples
    --------
    >>> uncompiled(len)([1, 2])
    2
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            as_it_is: Any = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
            result: R = as_it_is(*args, **kwargs)
            return result
        return function(*args, **kwargs)

    return run


@cache
def triton_available() -> bool:
    """Whether Triton can be imported here (the answer is kept).

    Returns
    -------
    bool
        ``True`` if ``import triton`` succeeds. It says nothing about a device: under
        ``TRITON_INTERPRET=1`` kernels run on the CPU.

    Examples
    --------
    >>> triton_available() in (True, False)
    True
    """
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def _warn_once() -> None:
    warnings.warn(
        "Triton cannot be imported, so affnb's operations run on this GPU through PyTorch alone, which "
        "is slower; install triton to have their kernels.",
        RuntimeWarning,
        stacklevel=4,
    )


def wanted(x: Tensor) -> bool:
    """Whether an operation on this tensor goes to its kernel.

    On a GPU, in single or half precision (the kernels add in float32), where Triton can be imported; a
    GPU without Triton gets one warning.

    Examples
    --------
    >>> wanted(torch.zeros(3))
    False
    """
    if not x.is_cuda or x.dtype == torch.float64:
        return False
    if triton_available():
        return True
    _warn_once()
    return False

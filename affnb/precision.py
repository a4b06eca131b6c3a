"""The precision that the package computes in, whatever precision its input has."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["wide_dtype"]


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float64 if any of the tensors has it, otherwise float32.

    Half precision has too few digits for sums of exponentials, distances and logarithms, so operations
    take their input in this dtype: ``x.to(wide_dtype(x))``, which copies nothing where it is that dtype.

    Parameters
    ----------
    tensors
        What goes into one computation.

    Returns
    -------
    torch.dtype
        ``torch.float64`` or ``torch.float32``.

    Examples
    --------
    >>> half, double = torch.zeros(2).half(), torch.zeros(2).double()
    >>> wide_dtype(half), wide_dtype(half, double)
    (torch.float32, torch.float64)
    """
    double = any(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32

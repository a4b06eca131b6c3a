"""Fused GPU kernels, imported only by what runs them.

Importing this package costs nothing: Triton is looked up the first time that it is asked for, so a
machine without it (or without a GPU) uses every operation of ``affnb`` through PyTorch alone.
"""

from __future__ import annotations

from functools import cache

__all__ = ["triton_available"]


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

"""Collectives that the batch losses need, over shards of unequal size.

A loss "over the global batch" is the loss that one process would compute if it held every rank's
rows. The functions here move what that takes: features and labels (``N x d`` numbers, never an
``N x N`` matrix), two log-sum-exps, and a flag that says whether every rank's input was valid.

All of them are collective: every rank of ``group`` must call them, in the same order. Start the
processes with ``torchrun`` and pass ``group=torch.distributed.group.WORLD`` (or a subgroup).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "all_gather_uneven",
    "all_reduce_logsumexp",
    "check_group",
    "check_together",
    "gather_with_grad",
    "raise_together",
]

# Ranks compare dtypes by position in this list, because a dtype itself cannot be sent.
_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def check_group(group: object, name: str = "group") -> None:
    """Raise unless ``group`` is a process group that this process belongs to.

    Parameters
    ----------
    group
        What the caller passed.
    name
        The argument's name, for the message.

    Raises
    ------
    TypeError
        Not a ``torch.distributed.ProcessGroup``.
    ValueError
        This process is not a member of the group.

    Examples
    --------
    >>> check_group("world")
    Traceback (most recent call last):
        ...
    TypeError: group: expected a torch.distributed.ProcessGroup, got str 'world'
    """
    # What dist.new_group returns to a process outside the new group is a plain marker object.
    if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{name}: expected a group with this process in it, got one without it")
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{name}: expected a torch.distributed.ProcessGroup, "
            f"got {type(group).__name__} {group!r}"
        )
    if dist.get_rank(group) < 0:
        raise ValueError(f"{name}: expected a group with this process in it, got one without it")


def _gather_numbers(numbers: list[int], group: ProcessGroup) -> list[list[int]]:
    """Every rank's list of integers (equal lengths), in rank order."""
    # NCCL moves only CUDA tensors; every other backend takes CPU tensors.
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    return [part.tolist() for part in parts]


def raise_together(error: Exception | None, group: ProcessGroup) -> None:
    """Raise on every rank as soon as one rank has an error.

    A rank that raises alone leaves the others waiting in the next collective until it times out.
    Validate first, catch the error, and hand it to this function before any other collective.

    Parameters
    ----------
    error
        This rank's error, or ``None``.
    group
        The process group.

    Raises
    ------
    Exception
        ``error`` itself on the rank that has one.
    ValueError
        On the other ranks, naming the ranks whose input was invalid.
    """
    flags = _gather_numbers([int(error is not None)], group)
    if error is not None:
        raise error
    bad = [rank for rank, (flag,) in enumerate(flags) if flag]
    if bad:
        raise ValueError(f"group: expected valid input on every rank, got an error on rank {bad}")


def check_together(check: Callable[[], None], group: ProcessGroup | None) -> None:
    """Validate the input of all ranks: run ``check``, and raise on every rank if it fails on one.

    Parameters
    ----------
    check
        Raises a ``TypeError`` or ``ValueError`` when this rank's input is invalid.
    group
        What the caller passed: a process group, or ``None`` for this process alone.

    Raises
    ------
    TypeError, ValueError
        What ``check`` raises, and what `check_group` and `raise_together` do.

    Examples
    --------
    >>> from affnb.checks import check_positive
    >>> check_together(lambda: check_positive(0, "temperature"), None)
    Traceback (most recent call last):
        ...
    ValueError: temperature: expected a finite number > 0, got 0
    """
    if group is None:
        check()
        return
    check_group(group)
    error: Exception | None = None
    try:
        check()
    except (TypeError, ValueError) as caught:
        error = caught
    raise_together(error, group)


def all_gather_uneven(x: Tensor, group: ProcessGroup) -> list[Tensor]:
    """Gather one tensor from every rank; the first dimension may differ.

    Parameters
    ----------
    x
        Tensor of shape ``(n_r, ...)``: any ``n_r >= 0`` on rank ``r``, the same trailing shape and
        dtype on all ranks.
    group
        The process group.

    Returns
    -------
    list of Tensor
        ``R`` tensors of shapes ``(n_0, ...), ..., (n_{R-1}, ...)`` in rank order, without autograd
        history. Shards are padded to the largest on the way.

    Raises
    ------
    ValueError
        On every rank, when trailing shapes or dtypes differ between ranks.

    Notes
    -----
    Memory ``O(R max_r n_r)`` rows; two collectives.
    """
    x = x.detach()
    dtype = _DTYPES.index(x.dtype)
    # Four numbers per rank: enough to tell every mismatch of (rank, trailing size, dtype) early.
    facts = _gather_numbers(
        [x.shape[0], x.ndim, x[:0].flatten(1).shape[1] if x.ndim > 1 else 1, dtype], group
    )
    if any(other[1:] != facts[0][1:] for other in facts):
        raise ValueError(
            "x: expected the same trailing shape and dtype on every rank, got (rows, dimensions, "
            f"numbers per row, dtype) = {[(*f[:3], str(_DTYPES[f[3]])) for f in facts]}"
        )
    sizes = [fact[0] for fact in facts]
    padded = x.new_zeros((max(sizes), *x.shape[1:]))
    padded[: x.shape[0]] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def gather_with_grad(x: Tensor, group: ProcessGroup) -> Tensor:
    """Concatenate every rank's rows; the own rows stay differentiable.

    If every rank then computes the same scalar from the result, ``backward`` leaves on each rank
    the exact gradient of that scalar with respect to the rank's own rows, with no communication in
    the backward pass. ``DistributedDataParallel`` averages parameter gradients over ranks, so
    multiply such a loss by the world size under it.

    Parameters
    ----------
    x
        Tensor of shape ``(n_r, ...)``; shards may be uneven.
    group
        The process group.

    Returns
    -------
    Tensor
        Shape ``(sum_r n_r, ...)``, rows in rank order.

    Raises
    ------
    ValueError
        On every rank, when trailing shapes or dtypes differ between ranks.

    Notes
    -----
    Memory ``O(N)`` rows. A gradient that flows into *another* rank's rows is dropped here, which is
    right when that rank computes the same scalar, and wrong when each rank has a loss of its own.
    """
    parts = all_gather_uneven(x, group)
    parts[dist.get_rank(group)] = x
    return torch.cat(parts)


def all_reduce_logsumexp(x: Tensor, group: ProcessGroup) -> Tensor:
    """Elementwise ``log(sum over ranks of exp(x))``, without autograd.

    Parameters
    ----------
    x
        Floating-point tensor, the same shape on every rank. ``-inf`` stands for an empty sum.
    group
        The process group.

    Returns
    -------
    Tensor
        The shape of ``x``; ``-inf`` where every rank had ``-inf``. Two all-reduces: the largest
        value, then the sum of the shifted exponentials, so nothing overflows.
    """
    top = x.detach().clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    shift = top.masked_fill(top == -torch.inf, 0.0)  # -inf - (-inf) would be NaN
    total = (x.detach() - shift).exp()
    dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
    return total.log() + shift

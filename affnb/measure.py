"""Time and peak memory of a call, measured alike in every chapter and benchmark."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .checks import check_at_least

__all__ = ["peak_bytes", "seconds"]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(
    calls: Mapping[str, Callable[[], Any]], *, repeats: int = 7, min_time: float = 0.02
) -> dict[str, float]:
    """Time several calls against each other, in turns, so that a busy machine slows all alike.

    Parameters
    ----------
    calls
        What to time, by name. Each is called once to warm up.
    repeats
        How many rounds; the median over the rounds is returned. Default 7.
    min_time
        Each round calls a function at least once, and until this many seconds have passed.

    Returns
    -------
    dict of str to float
        Seconds a call, by name. On a GPU the time includes the wait for its work to end.

    Raises
    ------
    ValueError
        ``repeats`` below 1.

    Examples
    --------
    >>> took = seconds({"short": lambda: sum(range(10)), "long": lambda: sum(range(100_000))})
    >>> took["short"] < took["long"]
    True
    """
    check_at_least(repeats, "repeats", 1)
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            _wait()
            count, start = 0, time.perf_counter()
            while count == 0 or time.perf_counter() - start < min_time:
                call()
                _wait()
                count += 1
            rounds[name].append((time.perf_counter() - start) / count)
    return {name: statistics.median(times) for name, times in rounds.items()}


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Swallow what the profiler's C++ side writes to the process's error stream at start and stop."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the most memory that PyTorch's allocator held for a call, beyond what it held before.

    Parameters
    ----------
    call
        Runs once. Its result counts while it lives, as do tensors that it leaves behind.

    Returns
    -------
    int
        Bytes, of the GPU when there is one, else of the CPU. Memory that other libraries take
        (NumPy's, say) does not count; nor, on the CPU, does the release of tensors made before.

    Examples
    --------
    >>> peak_bytes(lambda: torch.zeros(1000, 1000).sum()) >= 4_000_000
    True
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The profiler logs every allocation (positive) and release (negative) in order.
    with (
        _quiet_stderr(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profiler,
    ):
        result = call()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(
        (e for e in events if e.name() == "[memory]"), key=lambda e: int(e.start_ns())
    ):
        # Of tensors made before the call the profiler reports the release at times; it does not count.
        held = max(0, held + event.nbytes())
        peak = max(peak, held)
    del result
    return int(peak)

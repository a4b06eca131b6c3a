"""How every benchmark of the project measures: interleaved medians, and peak memory.

A benchmark module (``benchmarks/<part>/bench_<method>.py``) has one function, ``cases(device)``,
which returns :class:`Case` objects. ``benchmarks/run.py`` runs them all.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch

Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One implementation of one operation at one size.

    ``setup(implementation, shape, device)`` returns the step to measure. It must be a function at
    the top of its module, because on the CPU memory is measured in another process.
    """

    operation: str
    implementation: str
    shape: dict[str, int]
    setup: Callable[[str, dict[str, int], str], Step]
    small: dict[str, int]  # a shape that warms everything up and takes next to no memory

    def step(self, device: str) -> Step:
        """Return the step to measure, its inputs made."""
        return self.setup(self.implementation, self.shape, device)


def _time_once(step: Step, device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def median_seconds(cases: list[Case], device: str, *, budget: float = 4.0) -> list[float]:
    """Median time of one step of each case.

    The cases take turns, so a change of the machine's load meets all of them. Each runs at least 3
    times after a warm-up, and at most 101 times; ``budget`` is about how many seconds all take.
    """
    steps = [case.step(device) for case in cases]
    for step in steps:
        _time_once(step, device)
    once = sum(_time_once(step, device) for step in steps)
    rounds = max(3, min(101, int(budget / once)))
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for step, own in zip(steps, times, strict=True):
            own.append(_time_once(step, device))
    return [statistics.median(own) for own in times]


def _high_water_bytes() -> int:
    """Largest resident memory that this process has had."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024


def _cpu_peak(case: Case, threads: int) -> int:
    torch.set_num_threads(threads)
    case.setup(case.implementation, case.small, "cpu")()
    step = case.step("cpu")  # the inputs exist before counting begins
    gc.collect()
    before = _high_water_bytes()
    step()
    return _high_water_bytes() - before


def peak_bytes(case: Case, device: str) -> int | None:
    """Memory that one step needs beyond its inputs.

    On CUDA the allocator counts. On the CPU it is the rise of the resident high-water mark of a
    fresh process, which only Linux tells in this way; elsewhere ``None``.
    """
    if device == "cuda":
        step = case.step(device)
        step()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_cpu_peak, case, torch.get_num_threads()).result()


def run(cases: list[Case], device: str) -> list[dict[str, Any]]:
    """Measure all cases; those of one operation and shape take turns."""
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.operation, str(case.shape)), []).append(case)
    results = []
    for group in groups.values():
        for case, seconds in zip(group, median_seconds(group, device), strict=True):
            results.append(
                {
                    "operation": case.operation,
                    "implementation": case.implementation,
                    "shape": case.shape,
                    "pass": "forward+backward",
                    "seconds": seconds,
                    "peak_bytes": peak_bytes(case, device),
                }
            )
    return results

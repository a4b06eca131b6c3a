"""How every benchmark of the project measures: interleaved medians, peak memory, and the device's limits.

A benchmark module (``benchmarks/<part>/bench_<method>.py``) has one function, ``cases(device)``,
which returns :class:`Case` objects. ``benchmarks/run.py`` runs them all.

What no implementation can do without is a case's `Work`: each input read and each gradient written
once, and the products of matrices. Over the rates that `limits` measures in the same run, it gives
the least time that the device would take.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import torch

Step = Callable[[], object]

#: How the name of an implementation ends that `as_named` compiles.
COMPILED = ", compiled"


@dataclass(frozen=True)
class Work:
    """What an operation cannot do without: bytes to move, and flops of its matrix products."""

    bytes: int
    flops: int = 0


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
    work: Work | None = None  # None where neither memory nor matrix products bound it

    def step(self, device: str) -> Step:
        """Return the step to measure, its inputs made."""
        return self.setup(self.implementation, self.shape, device)


def as_named(function: Callable[..., Any], implementation: str) -> Callable[..., Any]:
    """Return the function, compiled if the implementation's name says so."""
    return torch.compile(function, dynamic=False) if implementation.endswith(COMPILED) else function


def limits(device: str) -> dict[str, float]:
    """Measure what the device can do: bytes a second of a copy, flops a second of a product.

    The copy counts what it reads and what it writes. Products are of square float32 matrices, as
    PyTorch does them by default.
    """
    numbers, side = (2**26, 8192) if device == "cuda" else (2**25, 2048)
    a, b = torch.zeros(2, numbers, device=device).unbind()
    x, y = torch.randn(2, side, side, device=device).unbind()
    out = torch.empty_like(x)
    steps: list[Step] = [lambda: b.copy_(a), lambda: torch.mm(x, y, out=out)]
    copy, product = (
        min(_time_once(step, device) for _ in range(8)) for step in steps
    )  # the best: a limit is what was reached once
    return {"copy_bytes_per_s": 8 * numbers / copy, "matmul_flops_per_s": 2 * side**3 / product}


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
    fresh process, which only Linux tells in this way; elsewhere ``None``, and also for compiled
    forms, where that rise is the compiler's.
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
    if sys.platform != "linux" or case.implementation.endswith(COMPILED):
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
                    "work": None if case.work is None else asdict(case.work),
                }
            )
    return results

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
from functools import partial
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
    dtype: str = "float32"  # of the numbers that are multiplied


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


def limits(device: str) -> dict[str, Any]:
    """Measure what the device can do: bytes a second of a copy, flops a second of a product.

    The copy counts what it reads and what it writes. Products are of square matrices of each dtype,
    as PyTorch does them by default.
    """
    numbers, side = (2**26, 8192) if device == "cuda" else (2**25, 2048)
    dtypes = [torch.float32, torch.bfloat16] if device == "cuda" else [torch.float32]
    a, b = torch.zeros(2, numbers, device=device).unbind()
    # The best of some: a limit is what was reached once.
    copy = min(_time_once(lambda: b.copy_(a), device) for _ in range(8))
    products = {}
    for dtype in dtypes:
        x, y = torch.randn(2, side, side, device=device, dtype=dtype).unbind()
        step = partial(torch.mm, x, y, out=torch.empty_like(x))
        seconds = min(_time_once(step, device) for _ in range(8))
        products[str(dtype).removeprefix("torch.")] = 2 * side**3 / seconds
    return {"copy_bytes_per_s": 8 * numbers / copy, "matmul_flops_per_s": products}


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


def _step_that_fits(case: Case, device: str) -> Step | None:
    """Return a case's step once it has run; ``None`` if the GPU's memory does not hold it."""
    try:
        step = case.step(device)
        _time_once(step, device)
    except torch.OutOfMemoryError:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        return None
    return step


def median_seconds(cases: list[Case], device: str, *, budget: float = 4.0) -> list[float | None]:
    """Median time of one step of each case; ``None`` where the GPU's memory does not hold it.

    The cases take turns, so a change of the machine's load meets all of them. Each runs at least 3
    times after a warm-up, and at most 101 times; ``budget`` is about how many seconds all take.
    """
    steps = [_step_that_fits(case, device) for case in cases]
    able = [step for step in steps if step is not None]
    if not able:
        return [None] * len(steps)
    once = sum(_time_once(step, device) for step in able)
    rounds = max(3, min(101, int(budget / once)))
    times: dict[Step, list[float]] = {step: [] for step in able}
    for _ in range(rounds):
        for step in able:
            times[step].append(_time_once(step, device))
    return [None if step is None else statistics.median(times[step]) for step in steps]


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
                    "peak_bytes": None if seconds is None else peak_bytes(case, device),
                    "out_of_memory": seconds is None,
                    "work": None if case.work is None else asdict(case.work),
                }
            )
    return results

"""Seeding, devices, the one training loop, and the statistics of a few seeds.

Chapters differ in what they minimise, not in how they loop: every experiment of the book, baselines
included, goes through `fit`.
"""

from __future__ import annotations

import math
import os
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checks import check_at_least, check_one_of, check_positive

__all__ = ["Summary", "fit", "paired_difference", "resolve_device", "seed_everything", "summarise"]

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom; beyond, the normal one is
# within 4 %. A table, because importing SciPy for one number would make the package heavy.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def seed_everything(seed: int) -> torch.Generator:
    """Seed Python, NumPy and PyTorch, and return a CPU generator with the same seed.

    Parameters
    ----------
    seed
        A non-negative integer below 2**32.

    Raises
    ------
    ValueError
        The seed is out of range.

    Examples
    --------
    >>> g = seed_everything(3)
    >>> bool(torch.equal(torch.rand(2, generator=g), torch.rand(2, generator=seed_everything(3))))
    True
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected an integer in [0, 2**32), got {seed}")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (libraries that use NumPy's global generator)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Turn ``"auto"`` into the GPU when there is one, else the CPU; check any other name.

    Raises
    ------
    ValueError
        A name that PyTorch does not know, or a CUDA device that it does not find.

    Examples
    --------
    >>> resolve_device("cpu")
    device(type='cpu')
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f'device: expected "auto" or a PyTorch device, got {device!r}') from error
    count = torch.cuda.device_count()
    if resolved.type == "cuda" and (resolved.index or 0) >= count:
        raise ValueError(f"device: expected one that exists, got {str(device)!r} of {count} GPUs")
    return resolved


def fit(
    step: Callable[[Any], Tensor | dict[str, Tensor]],
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    *,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    scheduler_every: str = "step",
    epochs: int = 1,
    max_grad_norm: float | None = None,
    on_epoch: Callable[[int], Any] | None = None,
    description: str = "training",
) -> dict[str, list[float]]:
    """Run the training loop: one optimiser step a batch, with a progress bar.

    Parameters
    ----------
    step
        Called with each batch; returns the scalar loss, or a dictionary of scalars with the loss to
        minimise under ``"loss"`` (the other entries are only logged).
    batches
        An iterable of batches, gone through once an epoch (a ``DataLoader``, a list, a generator
        when ``epochs`` is 1).
    optimizer
        Any PyTorch optimiser.
    scheduler
        A learning-rate scheduler, or ``None``.
    scheduler_every
        Whether the scheduler steps after each ``"step"`` (default) or each ``"epoch"``.
    epochs
        How often to go through ``batches``. Default 1.
    max_grad_norm
        Clip the global gradient norm at this value, or ``None`` (default).
    on_epoch
        Called with the number of each epoch (from 0) when it is over, to validate, say.
    description
        Text beside the progress bar. The bar needs ``tqdm``; without it the loop runs silently.

    Returns
    -------
    dict of str to list of float
        What ``step`` returned at every step, under its names.

    Raises
    ------
    FloatingPointError
        The loss is NaN or infinite: training stops at once and names the step.
    ValueError
        ``scheduler_every`` is neither ``"step"`` nor ``"epoch"``; ``epochs`` below 1; ``max_grad_norm``
        not positive; or an iterator, which ends after one epoch, for several.
    """
    check_one_of(scheduler_every, "scheduler_every", ("step", "epoch"))
    check_at_least(epochs, "epochs", 1)
    if max_grad_norm is not None:
        check_positive(max_grad_norm, "max_grad_norm")
    if epochs > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"batches: expected something to go through {epochs} times, got an iterator "
            f"({type(batches).__name__}), which is spent after one epoch"
        )
    history: dict[str, list[float]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    done = 0
    for epoch in range(epochs):
        label = description if epochs == 1 else f"{description}, epoch {epoch + 1} of {epochs}"
        for batch in _progress(batches, label):
            result = step(batch)
            values = result if isinstance(result, dict) else {"loss": result}
            loss = values["loss"]
            for name, value in values.items():  # before the update, which may change them in place
                history.setdefault(name, []).append(value.item())
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"{description}: the loss is {loss.item()} at step {done}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            if max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            optimizer.step()
            if scheduler is not None and scheduler_every == "step":
                scheduler.step()
            done += 1
        if scheduler is not None and scheduler_every == "epoch":
            scheduler.step()
        if on_epoch is not None:
            on_epoch(epoch)
    return history


def _progress(batches: Iterable[Any], description: str) -> Iterable[Any]:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return batches
    # Bars have no place in a built page, so whoever builds one sets TQDM_DISABLE (which tqdm itself
    # heeds in a terminal, but not in a notebook).
    disabled = os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    bar: Iterable[Any] = tqdm(batches, desc=description, leave=False, disable=disabled)
    return bar


@dataclass(frozen=True)
class Summary:
    """Mean, spread and 95 % confidence interval of a quantity over seeds.

    Attributes
    ----------
    mean, sd, sem
        Mean, sample standard deviation and standard error of the mean.
    low, high
        Student's 95 % confidence interval of the mean.
    n
        How many values.
    """

    mean: float
    sd: float
    sem: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.sd:.3f} (n = {self.n})"


def summarise(values: Sequence[float]) -> Summary:
    """Summarise a quantity measured under several seeds.

    Parameters
    ----------
    values
        At least two finite numbers, one a seed.

    Raises
    ------
    ValueError
        Fewer than two values, or one that is not finite.

    Examples
    --------
    >>> print(summarise([1.0, 2.0, 3.0]))
    2.000 ± 1.000 (n = 3)
    """
    numbers = [float(v) for v in values]
    if len(numbers) < 2 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"values: expected at least two finite numbers, got {numbers}")
    n, mean, sd = len(numbers), statistics.fmean(numbers), statistics.stdev(numbers)
    sem = sd / math.sqrt(n)
    t = _T95[n - 2] if n - 2 < len(_T95) else 1.96
    return Summary(mean, sd, sem, mean - t * sem, mean + t * sem, n)


def paired_difference(method: Sequence[float], baseline: Sequence[float]) -> Summary:
    """Summarise the differences method - baseline, paired by seed.

    Raises
    ------
    ValueError
        The two have different lengths, or fewer than two values.

    Examples
    --------
    >>> paired_difference([2.0, 3.0, 4.0], [1.0, 2.5, 2.0]).mean
    1.1666666666666667
    """
    if len(method) != len(baseline):
        raise ValueError(
            f"baseline: expected {len(method)} values to pair with method, got {len(baseline)}"
        )
    return summarise([a - b for a, b in zip(method, baseline, strict=True)])

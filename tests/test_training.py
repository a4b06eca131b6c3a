"""The loop does what a loop written by hand does, and the statistics are Student's."""

import math
import random
import sys

import numpy as np
import pytest
import torch

from affnb import training
from affnb.training import fit, paired_difference, resolve_device, seed_everything, summarise


@pytest.fixture(autouse=True)
def _no_bars(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


def problem():
    """Return a least-squares problem: batches, a step, the parameter, its optimiser."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    outputs = inputs @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    batches = list(zip(inputs.split(8), outputs.split(8), strict=True))
    weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def step(batch):
        return ((batch[0] @ weight - batch[1]) ** 2).mean()

    return batches, step, weight, torch.optim.SGD([weight], lr=0.05, momentum=0.5)


def by_hand(epochs, *, clip=None, decay=None, every="step"):
    batches, step, weight, optimizer = problem()
    losses = []
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            loss = step(batch)
            losses.append(loss.item())
            loss.backward()
            if clip is not None and float(weight.grad.norm()) > clip:
                weight.grad *= clip / (weight.grad.norm() + 1e-6)
            optimizer.step()
            if decay is not None and every == "step":
                optimizer.param_groups[0]["lr"] *= decay
        if decay is not None and every == "epoch":
            optimizer.param_groups[0]["lr"] *= decay
    return weight.detach(), losses


def test_fit_equals_a_loop_by_hand_and_converges():
    batches, step, weight, optimizer = problem()
    history = fit(step, batches, optimizer, epochs=40)
    expected, losses = by_hand(40)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)
    assert history == {"loss": pytest.approx(losses, rel=1e-12)}
    assert len(losses) == 200
    truth = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(weight.detach(), truth, atol=1e-3, rtol=0)


@pytest.mark.parametrize("every", ["step", "epoch"])
def test_scheduler_steps_where_told(every):
    batches, step, weight, optimizer = problem()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    fit(step, batches, optimizer, scheduler=scheduler, scheduler_every=every, epochs=3)
    count = {"step": 15, "epoch": 3}[every]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.9**count)
    expected, _ = by_hand(3, decay=0.9, every=every)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-10, atol=1e-12)


def test_gradient_clipping():
    batches, step, weight, optimizer = problem()
    fit(step, batches, optimizer, epochs=2, max_grad_norm=0.5)
    expected, _ = by_hand(2, clip=0.5)
    unclipped, _ = by_hand(2)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(expected, unclipped)


def test_all_entries_are_logged_and_only_the_loss_is_minimised():
    weight = torch.tensor([4.0], requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.25)

    def step(batch):
        return {
            "loss": (weight[0] - 1) ** 2,
            "other": 100 * weight[0],
            "batch": torch.tensor(batch),
        }

    history = fit(step, [5.0, 6.0], optimizer)
    assert history == {"loss": [9.0, 2.25], "other": [400.0, 250.0], "batch": [5.0, 6.0]}


def test_what_is_logged_is_the_value_before_the_update():
    weight = torch.tensor([4.0], requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.25)

    def step(_):
        return {"loss": (weight[0] - 1) ** 2, "weight": weight.detach()[0]}  # a view

    assert fit(step, [0, 1], optimizer)["weight"] == [4.0, 2.5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_stops_at_once(bad):
    weight = torch.tensor(1.0, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    seen = []

    def step(batch):
        seen.append(batch)
        return weight * batch

    with pytest.raises(FloatingPointError, match=r"^toy: the loss is -?(nan|inf) at step 2$"):
        fit(step, [1.0, 1.0, bad, 1.0], optimizer, description="toy")
    assert len(seen) == 3
    assert weight.item() == pytest.approx(0.8)  # two updates, none from the bad batch


def test_parameters_are_checked_first():
    batches, _, _, optimizer = problem()

    def step(_):
        raise AssertionError("ran")

    with pytest.raises(ValueError, match=r"^scheduler_every: expected one of 'step', 'epoch'"):
        fit(step, batches, optimizer, scheduler_every="batch")
    with pytest.raises(ValueError, match=r"^epochs: expected .* >= 1, got 0"):
        fit(step, batches, optimizer, epochs=0)
    with pytest.raises(ValueError, match=r"^max_grad_norm: expected .* > 0, got 0"):
        fit(step, batches, optimizer, max_grad_norm=0)
    with pytest.raises(ValueError, match=r"^batches: .* 2 times, got an iterator \(generator\)"):
        fit(step, (b for b in batches), optimizer, epochs=2)


def test_one_epoch_takes_a_generator():
    batches, step, weight, optimizer = problem()
    history = fit(step, (b for b in batches), optimizer)
    assert len(history["loss"]) == 5
    torch.testing.assert_close(weight.detach(), by_hand(1)[0])


def test_without_tqdm_the_loop_runs_all_the_same(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError):
        import tqdm.auto  # noqa: F401
    batches, step, weight, optimizer = problem()
    fit(step, batches, optimizer, epochs=2)
    torch.testing.assert_close(weight.detach(), by_hand(2)[0])


def test_the_bar_shows_description_and_epoch(monkeypatch):
    import tqdm.auto

    bars = []

    def bar(batches, **options):
        bars.append((options["desc"], options["disable"]))
        return batches

    monkeypatch.setattr(tqdm.auto, "tqdm", bar)
    batches, step, _, optimizer = problem()
    fit(step, batches, optimizer, epochs=2, description="toy")
    monkeypatch.setenv("TQDM_DISABLE", "0")
    fit(step, batches, optimizer, description="toy")
    monkeypatch.delenv("TQDM_DISABLE")
    fit(step, batches, optimizer, description="toy")
    assert bars == [
        ("toy, epoch 1 of 2", True),
        ("toy, epoch 2 of 2", True),
        ("toy", False),
        ("toy", False),
    ]


def test_each_epoch_is_announced_when_it_is_over():
    batches, step, weight, optimizer = problem()
    after = []
    fit(step, batches, optimizer, epochs=3, on_epoch=lambda e: after.append((e, weight.tolist())))
    assert [epoch for epoch, _ in after] == [0, 1, 2]
    for epoch, values in after:
        assert values == pytest.approx(by_hand(epoch + 1)[0].tolist(), rel=1e-10)


def test_seeding_covers_the_three_generators():
    def draw():
        generator = seed_everything(7)
        return (
            random.random(),
            np.random.rand(),  # noqa: NPY002
            torch.rand(1).item(),
            torch.rand(1, generator=generator).item(),
        )

    first = draw()
    assert draw() == first
    seed_everything(8)
    other = (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: NPY002
    assert all(a != b for a, b in zip(first, other, strict=False))
    seed_everything(2**32 - 1)
    for bad in (-1, 2**32):
        with pytest.raises(ValueError, match=r"^seed: "):
            seed_everything(bad)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device() == resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"^device: .*'cuda' of 0 GPUs"):
        resolve_device("cuda")
    with pytest.raises(ValueError, match=r"^device: expected \"auto\" or .*got 'gpu'"):
        resolve_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"^device: .*'cuda:2' of 2 GPUs"):
        resolve_device("cuda:2")


def test_quantiles_are_students():
    from scipy.stats import t

    assert len(training._T95) == 30
    exact = t.ppf(0.975, np.arange(1, 31))
    np.testing.assert_allclose(training._T95, exact, atol=5.1e-4, rtol=0)


@pytest.mark.parametrize("count", [2, 3, 5, 31])
def test_summary_agrees_with_scipy(count):
    from scipy import stats

    values = np.random.default_rng(count).normal(3, 2, count)
    got = summarise(values.tolist())
    sem = stats.sem(values)
    low, high = stats.t.interval(0.95, count - 1, loc=values.mean(), scale=sem)
    assert got.n == count
    assert got.mean == pytest.approx(values.mean())
    assert got.sd == pytest.approx(values.std(ddof=1))
    assert got.sem == pytest.approx(sem)
    assert (got.low, got.high) == pytest.approx((low, high), abs=1e-3 * sem)


def test_summary_beyond_the_table_is_close():
    from scipy.stats import t

    got = summarise([float(i % 2) for i in range(32)])
    exact = t.ppf(0.975, 31) * got.sem
    assert (got.high - got.mean) == pytest.approx(exact, rel=0.04)


def test_paired_difference_subtracts_seed_by_seed():
    got = paired_difference([1.0, 5.0, 3.0], [0.0, 3.0, 3.0])
    assert (got.mean, got.sd, got.n) == (1.0, 1.0, 3)
    assert got.low < 0 < got.high
    with pytest.raises(ValueError, match=r"^baseline: expected 3 values.*got 2"):
        paired_difference([1.0, 2.0, 3.0], [1.0, 2.0])


@pytest.mark.parametrize("bad", [[], [1.0], [1.0, math.nan], [1.0, math.inf]])
def test_summary_needs_two_finite_numbers(bad):
    with pytest.raises(ValueError, match=r"^values: expected at least two finite numbers"):
        summarise(bad)

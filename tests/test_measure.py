"""Peak memory is exact on the CPU for allocations that are known; times are in turns, per call."""

import ast
import os
import re
import time
from pathlib import Path

import pytest
import torch

from affnb.measure import peak_bytes, seconds

cpu_only = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU, its own allocator is what is measured"
)


def one():
    return torch.empty(1000, 250)


def two_then_one():
    a = torch.empty(1000)
    b = torch.empty(3000)
    del a, b
    return torch.empty(2000)


def left_behind(store):
    store.append(torch.empty(500))
    return torch.empty(100)


@cpu_only
@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (one, 1_000_000),
        (lambda: one().view(-1)[:3], 1_000_000),
        (two_then_one, 16_000),
        (lambda: left_behind([]), 2_400),
        (lambda: None, 0),
        (lambda: torch.empty(7, 3, dtype=torch.float64), 168),
        (lambda: torch.empty(5, dtype=torch.bool), 5),
    ],
)
def test_peak_is_exact(call, expected):
    assert peak_bytes(call) == expected


@cpu_only
def test_peak_counts_the_backward_pass():
    x = torch.ones(1000, requires_grad=True)
    forward = peak_bytes(lambda: (x * x).sum())
    assert 4_000 <= forward < 8_000  # the product
    both = peak_bytes(lambda: (x * x).sum().backward())
    assert x.grad is not None
    assert forward + 4_000 <= both <= 21_000  # a gradient of x at least, five vectors at most


@cpu_only
def test_memory_of_before_that_the_call_releases_is_not_subtracted():
    store = [torch.empty(1000)]

    def swap():
        store.clear()
        return torch.empty(600)

    assert peak_bytes(swap) == 2_400


@cpu_only
def test_the_quadratic_way_shows():
    x = torch.ones(300, 2)
    assert peak_bytes(lambda: (x @ x.T).sum()) >= 300 * 300 * 4
    assert peak_bytes(lambda: x.sum(0) @ x.sum(0)) < 1000


def test_peak_lets_errors_through_and_restores_the_error_stream(capfd):
    def fails():
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        peak_bytes(fails)
    os.write(2, b"still here")
    assert capfd.readouterr().err == "still here"


def test_peak_is_quiet(capfd):
    peak_bytes(one)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_seconds_measures_a_call():
    took = seconds({"sleep": lambda: time.sleep(0.01)}, repeats=3, min_time=0.03)
    assert 0.01 <= took["sleep"] < 0.1


def test_seconds_takes_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    assert set(seconds(calls, repeats=3, min_time=0)) == {"a", "b"}
    assert order == ["a", "b"] * 4  # a warm-up, then three rounds of one call each


def test_seconds_takes_the_median_over_rounds():
    delays = iter([0, 0.001, 0.2, 0.001])  # the warm-up, then a round that was disturbed
    took = seconds({"x": lambda: time.sleep(next(delays))}, repeats=3, min_time=0)
    assert took["x"] < 0.05  # the mean is above 0.06


def test_seconds_refuses_no_rounds():
    with pytest.raises(ValueError, match=r"^repeats: expected .* >= 1, got 0"):
        seconds({}, repeats=0)


def test_the_example_of_the_page_on_speed(capsys):
    page = (Path(__file__).parents[1] / "book" / "making_it_fast.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(example, {})
    took, held = (ast.literal_eval(line) for line in capsys.readouterr().out.splitlines())
    assert set(took) == set(held) == {"auto", "reference"}
    assert held["reference"] > 10 * held["auto"], "that is what the page is about"

"""Benchmarks measure what they say: every implementation runs, and the harness reports honestly."""

import importlib
import json
import sys
import time

import pytest
import torch

from benchmarks import harness, run
from benchmarks.harness import COMPILED, Case, Work

# These compute something else, as their benchmark says.
ANOTHER_VALUE = {
    ("MixedPrecisionConv2d", "PyTorch (fake_quantize)"),  # ranges that are not learnt
    ("smooth_ap_loss", "pytorch-metric-learning"),  # the query is among its own relevant items
}


# Where the loss of the small shape is 0, which says nothing.
LARGER = {"entity_class_aware_loss": {"images": 2, "N": 32}}


def step_of(implementation, shape, device):
    """Sleep for as many milliseconds as the name says; or be too large."""
    if implementation == "too large":
        raise torch.OutOfMemoryError("CUDA out of memory")
    held = torch.zeros(shape["N"])

    def step():
        time.sleep(float(implementation) / 1000)
        return held.sum()

    return step


def filling(implementation, shape, device):
    """Fill some memory for a moment."""
    return lambda: torch.ones(shape["MiB"] << 18).sum()


def test_times_are_medians_of_interleaved_steps():
    order = []

    def record(implementation, shape, device):
        return lambda: order.append(implementation)

    cases = [Case("f", name, {"N": 1}, record, {"N": 1}) for name in "ab"]
    seconds = harness.median_seconds(cases, "cpu", budget=1e-9)
    assert len(seconds) == 2
    assert "".join(order[-6:]) == "ababab", "at least three rounds, taking turns"
    slow, fast = (Case("f", name, {"N": 1}, step_of, {"N": 1}) for name in ("30", "2"))
    seconds = harness.median_seconds([slow, fast], "cpu", budget=0.2)
    assert 0.029 < seconds[0] < 0.3
    assert 0.0019 < seconds[1] < seconds[0]


def test_what_does_not_fit_is_told_and_loses_nothing():
    cases = [
        Case("f", name, {"N": 4}, step_of, {"N": 4}, Work(bytes=8)) for name in ("1", "too large")
    ]
    rows = harness.run(cases, "cpu")
    assert [row["out_of_memory"] for row in rows] == [False, True]
    assert rows[0]["seconds"] > 0
    assert rows[1]["seconds"] is None
    assert rows[1]["peak_bytes"] is None
    assert rows[0]["work"] == {"bytes": 8, "flops": 0, "dtype": "float32"}
    assert harness.median_seconds(cases[1:], "cpu") == [None]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's peak memory")
def test_memory_is_that_of_the_step():
    case = Case("f", "fills", {"MiB": 64}, filling, {"MiB": 1})
    assert 60 < harness.peak_bytes(case, "cpu") / 2**20 < 80
    assert harness.peak_bytes(Case("f", "g" + COMPILED, {"MiB": 1}, filling, {}), "cpu") is None


def test_limits_are_what_the_device_reaches():
    limits = harness.limits("cpu")
    assert limits["copy_bytes_per_s"] > 1e8
    assert limits["matmul_flops_per_s"]["float32"] > 1e9


def test_a_run_writes_each_module_and_keeps_the_others(tmp_path, monkeypatch, capsys):
    def fake(name):
        found = importlib.import_module(name)
        cases = [Case("f", "1", {"N": 2}, step_of, {"N": 2})]
        monkeypatch.setattr(found, "cases", lambda device: cases)
        return found

    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(harness, "limits", lambda device: {"copy_bytes_per_s": 1.0})
    (tmp_path / "metric").mkdir()
    for method in ("patch_nce", "smooth_ap"):
        (tmp_path / "metric" / f"bench_{method}.py").touch()
        fake(f"benchmarks.metric.bench_{method}")
    monkeypatch.setattr(sys, "argv", ["run", "--device", "cpu"])
    run.main()
    report = json.loads((tmp_path / "results" / "cpu.json").read_text())
    assert [row["module"] for row in report["results"]] == ["metric/patch_nce", "metric/smooth_ap"]
    assert {"device", "versions", "commit", "date", "limits"} < set(report)
    kept = report["results"][1]
    monkeypatch.setattr(sys, "argv", ["run", "--device", "cpu", "--only", "metric/patch_nce"])
    run.main()
    report = json.loads((tmp_path / "results" / "cpu.json").read_text())
    assert kept in report["results"]
    assert len(report["results"]) == 2
    assert "metric/smooth_ap" not in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit, match="expected one of metric/patch_nce"):
        run.modules("metric/nothing")


@pytest.mark.parametrize("module", run.modules(None))
def test_every_case_of_every_module_runs(module):
    """And computes the same, at the small shape. Compiled forms are left to the benchmark itself."""
    part, method = module.split("/")
    found = importlib.import_module(f"benchmarks.{part}.bench_{method}")
    for device in ("cpu", "cuda"):
        cases = found.cases(device)
        names = [(case.operation, case.implementation, str(case.shape)) for case in cases]
        assert len(set(names)) == len(names)
        ours = {
            (case.operation, str(case.shape)) for case in cases if case.implementation == "affnb"
        }
        assert ours == {(case.operation, str(case.shape)) for case in cases}, "ours at every size"
    losses = {}
    for case in {(c.operation, c.implementation): c for c in found.cases("cpu")}.values():
        assert getattr(found, case.setup.__name__) is case.setup, "another process has to find it"
        if not case.implementation.endswith(COMPILED):
            shape = LARGER.get(case.operation, case.small)
            loss = case.setup(case.implementation, shape, "cpu")()
            if isinstance(loss, torch.Tensor) and loss.ndim == 0:
                losses.setdefault(case.operation, {})[case.implementation] = float(loss.detach())
    for operation, values in losses.items():
        assert all(values.values()), f"{operation}: a loss of 0 says nothing"
        for name, value in values.items():
            if (operation, name) not in ANOTHER_VALUE:
                assert value == pytest.approx(values["affnb"], rel=2e-3), (operation, values)


def test_the_committed_results_are_of_the_cases():
    """Nothing is shown that the benchmarks would not measure today."""
    report = json.loads((run.HERE / "results" / "cpu.json").read_text())
    now = set()
    for module in run.modules(None):
        part, method = module.split("/")
        cases = importlib.import_module(f"benchmarks.{part}.bench_{method}").cases("cpu")
        now |= {(module, c.operation, c.implementation, str(c.shape)) for c in cases}
    shown = {
        (row["module"], row["operation"], row["implementation"], str(row["shape"]))
        for row in report["results"]
    }
    assert shown == now
    assert all(row["seconds"] > 0 for row in report["results"])

"""Run every benchmark and write ``benchmarks/results/<device>.json``.

Run from the repository root as ``python -m benchmarks.run [--device auto|cpu|cuda]
[--only PART/METHOD]``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import harness

HERE = Path(__file__).parent


def modules(only: str | None) -> list[str]:
    """Return ``part/method`` of every benchmark module, sorted."""
    names = [
        f"{path.parent.name}/{path.stem.removeprefix('bench_')}"
        for path in sorted(HERE.glob("*/bench_*.py"))
    ]
    if only is None:
        return names
    if only not in names:
        raise SystemExit(f"--only: expected one of {', '.join(names)}, got {only}")
    return [only]


def device_name(device: str) -> str:
    """Return what the results page calls the device."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        model = found.group(1) if found else model
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"


def commit() -> str:
    """Return the commit that ran, marked when the working tree differs from it."""
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=HERE,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip()


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--only", metavar="PART/METHOD", help="run one module; keep other results")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"

    name = device_name(device)
    slug = "cpu" if device == "cpu" else re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    path = HERE / "results" / f"{slug}.json"
    report: dict[str, Any] = {
        "device": name,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "limits": harness.limits(device),
        "results": [],
    }
    chosen = modules(arguments.only)
    if arguments.only and path.exists():
        kept = json.loads(path.read_text())["results"]
        report["results"] = [row for row in kept if row["module"] not in chosen]
    progress = tqdm(chosen, unit="module")
    for module in progress:
        progress.set_postfix_str(module)
        part, method = module.split("/")
        cases = importlib.import_module(f"benchmarks.{part}.bench_{method}").cases(device)
        report["results"] += [{"module": module, **row} for row in harness.run(cases, device)]
        path.parent.mkdir(exist_ok=True)  # after each module: a run that is stopped keeps them
        path.write_text(json.dumps(report, indent=1) + "\n")
    for row in report["results"]:
        shape = ", ".join(f"{key}={value}" for key, value in row["shape"].items())
        memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:10.1f} MiB"
        print(
            f"{row['operation']:22} {shape:18} {row['implementation']:26} "
            + ("out of memory" if row["seconds"] is None else f"{1000 * row['seconds']:10.2f} ms")
            + memory
        )
    print(f"Written to {path}")


if __name__ == "__main__":
    main()

"""The examples run as their first lines say, and what they promise holds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("loss", "processes"),
    [("smooth_ap", 3), ("batch_affinity", 2), ("patch_nce", 3)],
)
def test_several_processes_train_as_one_does(loss, processes):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    script = [str(EXAMPLES / "several_processes.py"), "--loss", loss, "--steps", "8"]
    run = subprocess.run(
        [sys.executable, *command, *script],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    first, last = re.findall(rf"{processes} process\(es\), step \d+: loss (\S+)", run.stdout)
    assert float(last) < float(first)
    difference = re.search(r"largest difference of the weights: (\S+)", run.stdout)
    assert float(difference.group(1)) < 1e-5

"""A chapter's file alone, in an empty folder and a fresh environment, as Colab, Kaggle or VS Code have it."""

import ast
import json
import os
import subprocess
import sys
import venv
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import pytest
import torch
from builder import chapters
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHAPTERS = chapters.list_chapters()
# Only the full profile, or a comparison that is skipped without them, asks for these.
OPTIONAL = {"torchvision", "pytorch_metric_learning", "torchmetrics"}


def code_of(chapter):
    cells = json.loads(chapter.path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def imports(source):
    """Import statements at the top level of a cell; functions import what they need when called."""
    tree = ast.parse("\n".join(line for line in source.splitlines() if not line.startswith("%")))
    return [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]


def installed_with(name, extras, seen):
    """Distributions that installing ``name[extras]`` brings."""
    for text in metadata.requires(name) or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": e}) for e in extras or {""}):
            continue
        found = canonicalize_name(requirement.name)
        if found not in seen:
            seen.add(found)
            with suppress(metadata.PackageNotFoundError):  # what is for another platform
                installed_with(requirement.name, requirement.extras, seen)
    return seen


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.name)
def test_the_extra_has_what_a_chapter_imports(chapter):
    brought = installed_with("affnb", {"chapters"}, {"affnb"})
    owners = metadata.packages_distributions()
    for source in code_of(chapter):
        for node in imports(source):
            for name in (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            ):
                top = name.split(".")[0]
                if top in sys.stdlib_module_names | OPTIONAL:
                    continue
                assert {canonicalize_name(d) for d in owners[top]} & brought, (
                    f"{top} is in no extra"
                )


def test_the_set_up_cell_gets_an_empty_environment_going(tmp_path):
    if not (chapters.ROOT / ".git").exists():
        pytest.skip("the set-up cell installs from a repository, and this is none")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    ask = [python, "-c", "import site; print(site.getsitepackages()[0])"]
    packages = Path(subprocess.check_output(ask, text=True).strip())
    # Everything but affnb is taken from here: installing PyTorch once more would take minutes.
    (packages / "others.pth").write_text(str(Path(torch.__file__).parents[1]))
    alone = tmp_path / "alone"
    alone.mkdir()
    lines = [ast.unparse(n) for c in CHAPTERS for source in code_of(c)[2:] for n in imports(source)]
    lines = [line for line in dict.fromkeys(lines) if not any(name in line for name in OPTIONAL)]
    check = f"import affnb\nassert {str(tmp_path)!r} in affnb.__file__, affnb.__file__\n"
    script = alone / "cells.py"
    script.write_text("\n".join([code_of(CHAPTERS[0])[0], *lines, check]))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"AFFNB_REPOSITORY": f"file://localhost{chapters.ROOT}", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [python, script], cwd=alone, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr

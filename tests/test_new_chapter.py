"""Beginning a chapter: what is written passes the project's own checks as it stands, or nothing is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from builder import new_chapter
from builder.chapters import ROOT

# The second goes into a part that has no chapter yet, while there is one.
EMPTY = next((p for p in new_chapter.PARTS if not (ROOT / "affnb" / p).exists()), "generation")
NEW = [("metric", "drawn_way"), (EMPTY, "a_method_whose_name_is_long_enough_to_break_lines")]
COPIED = ["affnb", "benchmarks", "book", "chapters", "tests"]
COPIED += ["README.md", "_toc.yml", "pyproject.toml", "constraints.txt"]


def run(root, *command):
    path = os.pathsep.join([str(root), str(root / "book")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Copy the project and begin two chapters in it."""
    root = tmp_path_factory.mktemp("project")
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "node_modules", ".ipynb_checkpoints")
            shutil.copytree(ROOT / name, root / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, root)
    for (part, name), title in zip(NEW, ["A reader's way (AP)", ""], strict=True):
        arguments = ["--part", part, "--name", name, "--title", title]
        said = run(root, "builder.new_chapter", *arguments)
        assert f"chapters/{part}/{name}.ipynb" in said
    return root


@pytest.fixture
def unchanged(copy):
    """Check that a test left the copy as it was."""

    def state():
        files = (f for f in copy.rglob("*") if f.is_file() and f.suffix != ".pyc")
        return {file: file.read_bytes() for file in files}

    before = state()
    yield
    assert state() == before


def test_what_is_written_is_tidy(copy):
    for part, name in NEW:
        files = [f"affnb/{part}/__init__.py", *new_chapter.new_files(part, name)]
        run(copy, "ruff", "check", "--no-cache", *files)
        run(copy, "ruff", "format", "--no-cache", "--check", *files)
        run(copy, "builder.canonical", "--check", f"chapters/{part}/{name}.ipynb")


def test_the_project_s_checks_pass(copy):
    chosen = "toc or openings or four_files or metadata or set_up or citations"
    chosen += f" or somewhere and preface or public_names or doctests and (metric or {EMPTY})"
    tests = "tests/test_project.py", "-k", chosen
    run(copy, "pytest", "-q", "-p", "no:cacheprovider", *tests)
    tests = [f"tests/{part}/test_{name}.py" for part, name in NEW]
    run(copy, "pytest", "-q", "-p", "no:cacheprovider", *tests)


def test_the_notebook_runs_and_has_what_a_chapter_has(copy):
    tests = "tests/test_chapters.py", "-k", f"{NEW[0][1]} and not ledger"
    assert "4 passed" in run(copy, "pytest", "-q", "-p", "no:cacheprovider", *tests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"part": "ranking"}, "^part: expected one of affinity, metric, .*'ranking'"),
        ({"part": ""}, "^part: expected one of"),
        ({"name": "My-method"}, "^name: expected an identifier .*'My-method'"),
        ({"name": "class"}, "^name: expected an identifier"),
        ({"name": "smooth_ap"}, "^metric/smooth_ap: .*chapters/metric/smooth_ap.ipynb exists"),
        ({"name": "recall_at_k"}, "affnb.metric has recall_at_k already"),
        ({"name": "drawn_way_loss"}, "affnb.metric has drawn_way_loss already"),
        ({"title": "A | b"}, "^title: expected one line of plain text, got 'A | b'"),
        ({"paper": "a, b"}, "^paper: expected a key"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(copy, unchanged, change, message):
    with pytest.raises(ValueError, match=message):
        new_chapter.plan(**({"part": "metric", "name": "other"} | change), root=copy)


def test_a_command_that_fails_says_why(capsys):
    assert new_chapter.main(["--part", "metric", "--name", "1st"]) == 1
    assert "name: expected an identifier" in capsys.readouterr().err


def test_an_entry_that_the_bibliography_has_stays_alone(copy):
    assert "book/references.bib" in new_chapter.plan("metric", "other", root=copy)
    assert "book/references.bib" not in new_chapter.plan(
        "metric", "other", paper="brown2020smoothap", root=copy
    )


def test_nothing_is_half_written(copy, unchanged, monkeypatch):
    files = new_chapter.plan("metric", "other", root=copy)
    whole = Path.write_text

    def failing(path, content):
        if path.name == "preface.md":
            raise OSError("disk full")
        return whole(path, content)

    monkeypatch.setattr(Path, "write_text", failing)
    with pytest.raises(OSError, match="disk full"):
        new_chapter.write(files, copy)

"""One form for every notebook, and a set-up cell that finds the package wherever it runs."""

import copy
import hashlib
import json
import os
import subprocess
import sys

import nbformat
import pytest
from builder import canonical

SETUP = canonical.SETUP.read_text().strip()


def chapter():
    """Return a notebook as an editor saves it: outputs, random ids, stray metadata."""
    v4 = nbformat.v4
    cells = [
        v4.new_markdown_cell("# Größe $\\mathcal{M}$", metadata={"editable": True}),
        v4.new_code_cell("old set-up", metadata={"tags": ["hide-input", "setup"]}),
        v4.new_code_cell(canonical.PARAMETERS, metadata={"tags": ["parameters"]}),
        v4.new_code_cell(
            "1 + 1",
            execution_count=7,
            outputs=[v4.new_output("execute_result", {"text/plain": "2"}, execution_count=7)],
            metadata={"collapsed": True, "tags": ["hide-output"], "execution": {"start": "now"}},
        ),
        v4.new_code_cell("1 + 1"),
        v4.new_markdown_cell("![a](attachment:a.png)", attachments={"a.png": {"image/png": ""}}),
    ]
    metadata = {
        "affnb": {"title": "A chapter", "builds_on": []},
        "kernelspec": {"name": "my-env", "display_name": "My env", "language": "python"},
        "widgets": {"state": 1},
    }
    return v4.new_notebook(cells=cells, metadata=metadata)


def test_canonical_form():
    before = chapter()
    original = copy.deepcopy(before)
    got = canonical.canonical(before)
    assert before == original  # the argument is not changed
    nbformat.validate(got)
    assert set(got["metadata"]) == {"affnb", "kernelspec", "language_info"}
    assert got["metadata"]["affnb"] == original["metadata"]["affnb"]
    assert got["metadata"]["kernelspec"]["name"] == "python3"
    assert [dict(cell["metadata"]) for cell in got["cells"]] == [
        {},
        {"tags": ["hide-input", "setup"]},
        {"tags": ["parameters"]},
        {"tags": ["hide-output"]},
        {},
        {},
    ]
    assert got["cells"][1]["source"] == SETUP
    for cell in got["cells"]:
        assert "attachments" not in cell
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    kept = [c["source"] for i, c in enumerate(original["cells"]) if i != 1]
    assert [c["source"] for i, c in enumerate(got["cells"]) if i != 1] == kept


def test_ids_come_from_the_source_alone():
    got = canonical.canonical(chapter())
    digest = hashlib.sha1(b"1 + 1").hexdigest()[:8]
    assert [c["id"] for c in got["cells"]][3:5] == [digest, f"{digest}-2"]
    moved = chapter()
    moved["cells"] = moved["cells"][::-1]
    ids = {c["id"] for c in got["cells"]}
    assert len(ids) == len(got["cells"])
    assert {c["id"] for c in canonical.canonical(moved)["cells"]} == ids


def test_text_is_a_fixed_point_that_diffs_well():
    text = canonical.text(chapter())
    assert canonical.text(nbformat.reads(text, as_version=4)) == text
    assert text.endswith("}\n")
    assert not text.endswith("\n\n")
    assert "Größe" in text  # not as escapes
    data = json.loads(text)
    assert list(data) == sorted(data)
    assert all(list(cell) == sorted(cell) for cell in data["cells"])
    assert (data["nbformat"], data["nbformat_minor"]) == (4, 5)
    assert text.startswith('{\n "cells": [')  # one space of indent, as nbformat writes


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "chapter.ipynb"
    path.write_text(canonical.text(chapter()))
    return path


def test_canonical_file_passes(file):
    assert canonical.check(file) == []


def edit(path, change):
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    path.write_text(nbformat.writes(notebook) + "\n")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda n: n["cells"][3].update(outputs=[nbformat.v4.new_output("stream", text="2")]),
            "outputs are stored",
        ),
        (lambda n: n["cells"].pop(1), "expected one cell tagged 'setup', got 0"),
        (lambda n: n["cells"][0].update(metadata={"tags": ["setup"]}), "tagged 'setup', got 2"),
        (lambda n: n["cells"].pop(2), "expected one cell tagged 'parameters', got 0"),
        (lambda n: n["cells"][2].update(source="seed = 1"), "the parameters cell differs"),
        (lambda n: n["cells"][1].update(source="import affnb"), "not in canonical form"),
        (lambda n: n["cells"][3].update(id="abc"), "not in canonical form"),
        (lambda n: n["cells"][3].update(execution_count=1), "not in canonical form"),
        (lambda n: n["metadata"].update(widgets={}), "not in canonical form"),
    ],
)
def test_check_names_each_problem_and_main_repairs_form(file, change, problem, monkeypatch, capsys):
    edit(file, change)
    before = file.read_text()
    assert any(problem in found for found in canonical.check(file))
    monkeypatch.setattr(sys, "argv", ["canonical", "--check", str(file)])
    assert canonical.main() == 1
    assert f"{file}: " in capsys.readouterr().err
    assert file.read_text() == before  # --check changes nothing
    monkeypatch.setattr(sys, "argv", ["canonical", str(file)])
    repaired = problem in ("outputs are stored", "not in canonical form")
    assert canonical.main() == (0 if repaired else 1)
    assert (canonical.check(file) == []) is repaired


def test_white_space_alone_is_not_canonical(file):
    file.write_text(file.read_text() + "\n")
    assert canonical.check(file) == [
        "not in canonical form (run python -m builder.canonical on it)"
    ]


def test_parameters_are_those_of_every_chapter():
    names = {}
    exec(canonical.PARAMETERS, names)
    del names["__builtins__"]
    assert names == {"profile": "ci", "device": "auto", "seed": 0, "data_root": None}


REPORT = """
import sys
print("pip" if installed else "no pip", *installed)
try:
    import affnb
    print(affnb.WHERE)
except ModuleNotFoundError:
    print("not importable")
"""
NO_INSTALL = "import subprocess\ninstalled = []\nsubprocess.check_call = installed.extend\n"


def run_setup(folder, *, prelude="", environment=None, path=""):
    """Run the set-up cell as a kernel started in a folder would, without any installed package.

    ``-S`` hides site-packages (and with it affnb); calls of pip are noted, not made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keep = {key: os.environ[key] for key in ("PATH", "SYSTEMROOT", "LANG") if key in os.environ}
    return subprocess.run(
        [sys.executable, "-S", "-c", NO_INSTALL + prelude + SETUP + REPORT],
        cwd=folder,
        env={**keep, "PYTHONPATH": str(path), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=60,
    )


def package(folder, where):
    (folder / "affnb").mkdir(parents=True)
    (folder / "affnb" / "__init__.py").write_text(f"WHERE = {where!r}\n")
    return folder


def test_setup_in_an_empty_folder_says_what_to_do(tmp_path):
    ran = run_setup(tmp_path / "empty")
    assert ran.returncode == 1
    assert "ModuleNotFoundError: affnb is not installed" in ran.stderr
    assert "Run it inside a clone, or set AFFNB_REPOSITORY" in ran.stderr
    assert ran.stdout == ""


@pytest.mark.parametrize("below", [".", "chapters", "chapters/affinity"])
def test_setup_finds_the_clone_that_it_is_in(tmp_path, below):
    clone = package(tmp_path / "clone", "clone")
    ran = run_setup(clone / below)
    assert (ran.returncode, ran.stdout.splitlines()) == (0, ["no pip", "clone"])


def test_setup_leaves_an_installed_package_alone(tmp_path):
    installed = package(tmp_path / "site", "installed")
    clone = package(tmp_path / "clone", "clone")
    ran = run_setup(
        clone / "chapters",
        path=installed,
        environment={"AFFNB_REPOSITORY": "https://example.org/book@main"},
    )
    assert (ran.returncode, ran.stdout.splitlines()) == (0, ["no pip", "installed"])


@pytest.mark.parametrize("prefix", ["", "git+"])
def test_setup_installs_from_the_repository_it_is_told(tmp_path, prefix):
    address = "https://example.org/book@v1"
    ran = run_setup(tmp_path / "x", environment={"AFFNB_REPOSITORY": prefix + address})
    first, second = ran.stdout.splitlines()
    assert first.startswith("pip ")
    assert first.endswith(f"-m pip install --quiet affnb[chapters] @ git+{address}")
    assert second == "not importable"  # pip was only noted


def test_published_setup_installs_from_where_it_was_published(tmp_path):
    assert SETUP.count('REPOSITORY = ""') == 1
    published = SETUP.replace('REPOSITORY = ""', 'REPOSITORY = "https://example.org/book@main"')
    ran = subprocess.run(
        [sys.executable, "-S", "-c", NO_INSTALL + published + REPORT],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "git+https://example.org/book@main" in ran.stdout


SESSIONS = """
import io, urllib.request
def urlopen(address):
    assert address == "http://1.2.3.4:9000/api/sessions", address
    return io.BytesIO({answer!r})
urllib.request.urlopen = urlopen
"""


def test_setup_in_colab_asks_which_notebook_is_open(tmp_path):
    answer = b'[{"path": "fileId=https%3A%2F%2Fgithub.com%2Fowner%2Fname%2Fblob%2Fdev%2Fa.ipynb"}]'
    ran = run_setup(
        tmp_path / "content",
        prelude=SESSIONS.format(answer=answer),
        environment={"COLAB_JUPYTER_IP": "1.2.3.4"},
    )
    assert "affnb[chapters] @ git+https://github.com/owner/name@dev" in ran.stdout


def test_setup_in_colab_without_a_repository_says_what_to_do(tmp_path):
    ran = run_setup(
        tmp_path / "content",
        prelude=SESSIONS.format(answer=b'[{"path": "fileId=1aB"}]'),
        environment={"COLAB_JUPYTER_IP": "1.2.3.4"},
    )
    assert ran.returncode == 1
    assert "affnb is not installed" in ran.stderr

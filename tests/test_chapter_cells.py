"""The helper that runs cells of a chapter: which cells run, and what is made small."""

import nbformat
import pytest

from tests import chapter_cells
from tests.chapter_cells import run_cells

CELLS = [
    (["setup"], "raise RuntimeError"),
    (["parameters"], 'profile = "ci"\nseed = 0'),
    ([], 'from affnb.claims import record\nfull = profile == "full"\nran = ["imports"]'),
    ([], "x = 3  # of no use to the others\nran.append('unused')\nraise RuntimeError"),
    ([], "steps, rates = (1000, [8, 16]) if full else (10, [1, 2])\nresults = {}"),
    ([], "def run(name, width=512):\n    workers = 8\n    results[name] = (steps, width, workers)"),
    ([], "for name in 'ab':\n    run(name)"),
    ([], "widest = max(x for x in (288, 960))\nrun('c', width=7)"),
    ([], "total = len(results)\nrecord('a/b:c', 'is so', 'proved', {'method': 'm'})"),
]


@pytest.fixture(autouse=True)
def _chapter(tmp_path, monkeypatch):
    cells = []
    for tags, source in CELLS:
        cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": tags}))
    (tmp_path / "chapters").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "chapters" / "drawn.ipynb")
    monkeypatch.setattr(chapter_cells, "ROOT", tmp_path)


def test_what_is_asked_for_runs_with_all_that_it_needs(monkeypatch):
    names, verdicts = run_cells("drawn", monkeypatch, define=["total"], seed=5)
    assert names["results"] == {"a": (1000, 512, 8), "b": (1000, 512, 8), "c": (1000, 7, 8)}
    assert (names["total"], names["seed"], "x" in names) == (3, 5, False)
    assert verdicts == {"a/b:c": "proved"}
    assert run_cells("drawn", monkeypatch, call=["record"])[1] == verdicts
    assert "total" not in run_cells("drawn", monkeypatch, define=["widest"])[0]
    assert run_cells("drawn", monkeypatch, define=["full"], full=1)[0]["full"] is True
    assert run_cells("drawn", monkeypatch, define=["run"], results={})[0]["results"] == {}


def test_made_small_by_names_arguments_and_expressions(monkeypatch):
    small = {"steps": "2", "run.workers": "0", "run(width=)": "4", "(288, 960)": "(1, 2)"}
    names, _ = run_cells("drawn", monkeypatch, define=["total", "widest"], small=small)
    assert names["results"] == dict.fromkeys("abc", (2, 4, 0))
    assert names["widest"] == 2
    assert names["rates"] == [8, 16]


def test_what_runs_between_cells(monkeypatch):
    after = {"steps": lambda names: names.update(steps=names["steps"] + 1)}
    names, _ = run_cells("drawn", monkeypatch, define=["total"], after=after)
    assert names["results"]["a"] == (1001, 512, 8)


def test_what_the_chapter_lost_is_named(monkeypatch):
    with pytest.raises(AssertionError, match=r"defines these names no more: \['gone'\]"):
        run_cells("drawn", monkeypatch, define=["gone", "total"])
    with pytest.raises(AssertionError, match=r"calls these functions no more: \['settle'\]"):
        run_cells("drawn", monkeypatch, call=["settle"])
    for lost in ("gone", "workers", "run(height=)", "(288, 961)", "other.workers"):
        with pytest.raises(AssertionError, match="not in the cells that ran"):
            run_cells("drawn", monkeypatch, define=["total", "widest"], small={lost: "1"})

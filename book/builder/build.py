"""Build the site: run the chapters that changed, stage every page, and let Jupyter Book make HTML of it.

``python -m builder.build`` ends with the line that says where the book is. When nothing has changed since
the last build it only says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import nbformat
import yaml

from .assets import NOT_SERVED, assets
from .canonical import canonical
from .chapters import ROOT, ChapterError, execute_all, executed, list_chapters
from .pages import LEDGER, MIME, LedgerError, read_ledger, unlisted, write_pages
from .readable import labels, readable
from .reference import closing, write_reference

#: What the book on paper is called, beside the first page of the published site.
PDF_NAME = "affinity-notebook.pdf"

STATE = "application/vnd.jupyter.widget-state+json"
VIEW = "application/vnd.jupyter.widget-view+json"


def address(config: dict[str, Any]) -> tuple[str, str]:
    """Return the repository's address and branch: from the environment, else from ``_config.yml``.

    Raises
    ------
    ValueError
        The address is not of the form ``https://HOST/OWNER/NAME``.
    """
    repository = config["repository"]
    url = (os.environ.get("AFFNB_REPOSITORY") or repository["url"]).rstrip("/")
    url = url.removesuffix(".git")
    branch = os.environ.get("AFFNB_BRANCH") or repository["branch"]
    if not url.startswith("https://") or len(url.removeprefix("https://").split("/")) != 3:
        raise ValueError(
            f"AFFNB_REPOSITORY (or repository.url in _config.yml): expected https://HOST/OWNER/NAME, "
            f"got {url!r}"
        )
    return url, branch


def site_address() -> str:
    """Return where the site is to be published, from AFFNB_SITE; empty where that isn't set.

    Raises
    ------
    ValueError
        The address does not begin with ``https://`` or ``http://``.
    """
    site = os.environ.get("AFFNB_SITE", "").rstrip("/")
    if site and not site.startswith(("https://", "http://")):
        raise ValueError(f"AFFNB_SITE: expected https://HOST/..., got {site!r}")
    return site


def is_neutral(url: str) -> bool:
    """Whether an address is one that nobody can own (the reserved domain ``.invalid``)."""
    return url.removeprefix("https://").split("/")[0].endswith(".invalid")


def stamp(notebook: nbformat.NotebookNode, url: str, branch: str) -> nbformat.NotebookNode:
    """Return a notebook whose set-up cell knows where the notebook came from.

    A neutral address is not written: the cell then says what to do instead.

    Raises
    ------
    ValueError
        The notebook's set-up cell has no line ``REPOSITORY = ""``.
    """
    result = nbformat.from_dict(notebook)
    blank = 'REPOSITORY = ""'
    for cell in result["cells"]:
        if "setup" in cell["metadata"].get("tags", []):
            if blank not in cell["source"]:
                raise ValueError(f"the set-up cell: expected a line {blank}")
            if not is_neutral(url):
                cell["source"] = cell["source"].replace(blank, f'REPOSITORY = "{url}@{branch}"', 1)
    return result


def _models_in(value: Any) -> set[str]:
    """Return the ids of the widget models that a model's state refers to."""
    return set(re.findall(r"IPY_MODEL_([0-9a-f]+)", json.dumps(value)))


def for_page(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return an executed notebook without what no page should show.

    Those are the claims in their machine-readable form (collected by then, and unknown to Sphinx) and
    progress bars, together with the state of the widgets that they were.
    """
    result = nbformat.from_dict(notebook)
    widgets = result["metadata"].get("widgets", {}).get(STATE, {"state": {}})
    models = widgets["state"]
    shown: set[str] = set()
    for cell in result["cells"]:
        kept = []
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            data.pop(MIME, None)
            if VIEW in data:
                model = data[VIEW]["model_id"]
                children = _models_in(models.get(model, {}))
                # A progress bar that was closed has left no model; one that was not, has a bar in it.
                if model not in models or any(
                    "Progress" in models.get(child, {}).get("model_name", "") for child in children
                ):
                    continue
                shown.add(model)
            kept.append(output)
        if "outputs" in cell:
            cell["outputs"] = kept
    if models:
        todo, needed = list(shown), set()
        while todo:
            model = todo.pop()
            if model not in needed and model in models:
                needed.add(model)
                todo += _models_in(models[model])
        # A link belongs to neither of its ends; it is needed where both are.
        needed |= {
            id
            for id, model in models.items()
            if model["model_name"] in ("LinkModel", "DirectionalLinkModel")
            and _models_in([model["state"]["source"], model["state"]["target"]]) <= needed
        }
        widgets["state"] = {id: model for id, model in models.items() if id in needed}
    return result


#: A proof whose code is longer is folded on its page; what it proves is in the card below the code.
PROOF_LINES = 8


def fold_proofs(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return a notebook in which the code of long proofs is folded, under a line that says what it is."""
    result = nbformat.from_dict(notebook)
    for cell in result["cells"]:
        proves = cell["cell_type"] == "code" and re.search(
            r"^prove\(", cell["source"], re.MULTILINE
        )
        tags = cell["metadata"].get("tags", [])
        if proves and "hide-input" not in tags and cell["source"].count("\n") >= PROOF_LINES:
            cell["metadata"]["tags"] = [*tags, "hide-input"]
            cell["metadata"]["mystnb"] = {
                "code_prompt_show": "Show the proof in code",
                "code_prompt_hide": "Hide the proof in code",
            }
    return result


def stage(target: Path, root: Path = ROOT) -> list[str]:
    """Put everything that the site is made of into ``target``, which is emptied first.

    Returns
    -------
    list of str
        Ids of claims whose verdicts are not in the ledger yet.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    config = yaml.safe_load((root / "_config.yml").read_text())
    url, branch = address(config)
    config["repository"] |= {"url": url, "branch": branch}
    if not url.startswith("https://github.com/"):
        # The theme has buttons of three providers only and must be told which they look like.
        options = config["sphinx"]["config"].setdefault("html_theme_options", {})
        if "gitlab" not in url and "bitbucket" not in url:
            options["repository_provider"] = "github"
    site = site_address()
    if site:
        config["html"]["baseurl"] = site  # each page then names its canonical address
    (target / "_config.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    shutil.copytree(
        root / "book",
        target / "book",
        ignore=shutil.ignore_patterns("builder", "__pycache__", "scoreboard.json"),
    )
    link_pdf(target / "book" / "running.md")
    claims = write_pages(target / "book", root)
    chapters = list_chapters(root)
    write_reference(target, chapters, root)
    vendor = target / "book" / "_static" / "vendor"
    shutil.copytree(assets(root / "_build" / "assets"), vendor, ignore=lambda *_: NOT_SERVED)
    names = labels(chapters)
    for chapter in chapters:
        page = target / "chapters" / f"{chapter.name}.ipynb"
        page.parent.mkdir(parents=True, exist_ok=True)
        notebook = fold_proofs(for_page(nbformat.read(executed(chapter, root), as_version=4)))
        last = nbformat.v4.new_markdown_cell(closing(chapter, root), id="in-the-package")
        notebook["cells"].append(last)
        nbformat.write(notebook, page)
        # What the site offers for download: the source, readable anywhere, knowing where it came from.
        download = target / "downloads" / f"{chapter.name}.ipynb"
        download.parent.mkdir(parents=True, exist_ok=True)
        source = canonical(nbformat.read(chapter.path, as_version=4))
        source = readable(source, chapter, names, site, root)
        nbformat.write(stamp(source, url, branch), download)
    with_widget(target / "book" / "preface.md", target / "chapters")
    return unlisted(claims, read_ledger(root))


def link_pdf(page: Path) -> None:
    """Put a link to the book on paper where a page has ``<!-- pdf -->``, if its address is known."""
    site = site_address()
    link = f"[Download the book as a PDF]({site}/{PDF_NAME})." if site else ""
    page.write_text(page.read_text().replace("<!-- pdf -->", link))


def with_widget(page: Path, chapters: Path) -> None:
    """Turn a page of Markdown with a line ``<!-- widget: part/method -->`` into a notebook that shows it.

    What it shows is the first widget of that staged chapter, alive as it is there.

    Raises
    ------
    ValueError
        The page has no such line, or the chapter no widget.
    """
    match = re.search(r"^<!-- widget: (\w+/\w+) -->$", page.read_text(), re.MULTILINE)
    if not match:
        raise ValueError(f"{page}: expected a line '<!-- widget: part/method -->', got none")
    notebook = nbformat.read(chapters / f"{match[1]}.ipynb", as_version=4)
    cells = [
        c for c in notebook["cells"] if any(VIEW in o.get("data", {}) for o in c.get("outputs", []))
    ]
    if not cells:
        raise ValueError(f"{page}: expected {match[1]} to show a widget, got none")
    shown = cells[0]
    shown["metadata"]["tags"] = ["remove-input"]
    shown["outputs"] = [o for o in shown["outputs"] if VIEW in o.get("data", {})]
    notebook["cells"] = [
        nbformat.v4.new_markdown_cell(match.string[: match.start()]),
        shown,
        nbformat.v4.new_markdown_cell(match.string[match.end() :]),
    ]
    del notebook["metadata"]["affnb"]
    nbformat.write(for_page(notebook), page.with_suffix(".ipynb"))
    page.unlink()


def fingerprint(folder: Path) -> str:
    """Return a hash of a folder's files, and of what turns them into a site (docstrings among it)."""
    digest = hashlib.sha256()
    pins = ROOT / "constraints.txt"
    here = [f for f in (ROOT / "book" / "builder").iterdir() if f.is_file()]
    here = sorted([*here, *(ROOT / "affnb").rglob("*.py")]) + ([pins] if pins.exists() else [])
    for file in [*sorted(f for f in folder.rglob("*") if f.is_file()), *here]:
        if "__pycache__" not in file.parts:
            name = file.relative_to(folder if file.is_relative_to(folder) else ROOT)
            digest.update(f"{name}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def make_html(source: Path, out: Path, log: Path) -> None:
    """Let Jupyter Book build a staged folder, every warning an error, no reference left open.

    Raises
    ------
    RuntimeError
        Sphinx warned or failed; the message has what it said, ``log`` has it all.
    """
    from jupyter_book.sphinx import build_sphinx
    from sphinx.util.console import nocolor

    nocolor()
    log.parent.mkdir(parents=True, exist_ok=True)
    stdout, stderr = sys.stdout, sys.stderr
    with log.open("w") as file:
        # Sphinx' own report is long; it is kept in a file and shown when something is wrong.
        sys.stdout = sys.stderr = file
        try:
            failed = build_sphinx(
                source,
                out,
                path_config=source / "_config.yml",
                noconfig=True,
                confoverrides={
                    "external_toc_path": str(source / "_toc.yml"),
                    "latex_individualpages": False,
                    "nitpicky": True,
                },
                doctreedir=out.with_name("doctrees"),
                freshenv=True,
                force_all=True,
                warningiserror=True,
                keep_going=True,
            )
        finally:
            sys.stdout, sys.stderr = stdout, stderr
    if failed:
        said = [
            line
            for line in log.read_text().splitlines()
            if any(word in line for word in ("WARNING", "ERROR", "CRITICAL", "rror:"))
        ]
        raise RuntimeError(
            "\n".join(["The site could not be built.", *said[:40], f"All of it: {log}"])
        )


REDIRECT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<meta http-equiv="refresh" content="0; url={page}">
</head>
<body><main><h1>{title}</h1><p><a href="{page}">Go to the first page</a></p></main></body>
</html>
"""


def build(root: Path = ROOT) -> Path:
    """Build the site where it isn't up to date, and return its first page.

    Raises
    ------
    ChapterError, LedgerError, RuntimeError, ValueError
        A chapter failed; an earlier result no longer holds; the site or its assets could not be made;
        the settings are wrong.
    """
    made = root / "_build"
    site, source, stamp_file = made / "html", made / "src", made / "html.key"
    execute_all(list_chapters(root), root)
    new = stage(source, root)
    if new:
        print(
            f"{len(new)} verdicts are not in {LEDGER} yet (python -m builder.pages --update-ledger)"
        )
    now = fingerprint(source)
    if not (site.exists() and stamp_file.exists() and stamp_file.read_text() == now):
        print("Building the pages ...", flush=True)
        fresh = made / "fresh" / "html"
        shutil.rmtree(fresh.parent, ignore_errors=True)
        make_html(source, fresh, made / "book.log")
        shutil.copytree(source / "downloads", fresh / "_sources" / "chapters", dirs_exist_ok=True)
        toc = yaml.safe_load((source / "_toc.yml").read_text())
        title = yaml.safe_load((source / "_config.yml").read_text())["title"]
        page = REDIRECT.format(title=title, page=f"{toc['root']}.html")
        (fresh / "index.html").write_text(page)
        (fresh / ".nojekyll").touch()  # hosts that run Jekyll would drop folders that begin with _
        shutil.rmtree(site, ignore_errors=True)
        fresh.rename(site)
        shutil.rmtree(fresh.parent)
        stamp_file.write_text(now)
    return site / "index.html"


def main() -> int:
    """Build the book and say where it is."""
    try:
        index = build()
    except (ChapterError, LedgerError, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"The book is at {index}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

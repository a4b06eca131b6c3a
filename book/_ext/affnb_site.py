"""What our site needs of Sphinx beyond its settings: honest buttons, and pages that everybody can use."""

from __future__ import annotations

import ast
import html
import inspect
import re
import sys
import unicodedata
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup
from builder.chapters import Chapter, list_chapters
from builder.plain import add_plain
from docutils import nodes
from sphinx.application import Sphinx

#: Pages that the build writes: there is no source file of theirs to edit.
GENERATED = ("book/map", "book/scoreboard", "book/benchmarks", "book/package/")


def mend_buttons(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any
) -> None:
    """Let the buttons at the top of a page lead somewhere, whatever the repository's address.

    With the neutral address of ``_config.yml`` (its host ends in ``.invalid``) there is no repository to
    lead to: Colab's button and the others lead to the page on running the book, which says what to do.
    """
    theme = app.config.html_theme_options
    neutral = ".invalid/" in theme.get("repository_url", "") + "/"
    running = "" if pagename == "book/running" else context["pathto"]("book/running")
    groups = []
    for group in context.get("header_buttons", []):
        if group["type"] != "group":
            groups.append(group)
            continue
        if pagename == "book/preface" and group.get("label") == "launch-buttons":
            continue  # a notebook only for the sake of its widget
        kept = []
        for button in group["buttons"]:
            label = button.get("label", "")
            if pagename.startswith(GENERATED) and label in {
                "source-edit-button",
                "download-source-button",
            }:
                continue
            if neutral and group.get("label") == "launch-buttons":
                button = button | {"url": f"{running}#colab"}
            elif neutral and label.startswith("source-"):
                button = button | {"url": f"{running}#repository"}
            kept.append(button)
        if kept:
            groups.append(group | {"buttons": kept})
    context["header_buttons"] = groups


@cache
def chapter_of(pagename: str) -> Chapter | None:
    """Return the chapter that a page shows, if it shows one."""
    return next((c for c in list_chapters() if c.page == f"{pagename}.html"), None)


def describe(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any
) -> None:
    """Say in a chapter's head what it is about, for search engines and for links that others share."""
    chapter = chapter_of(pagename)
    if chapter:
        about = {"description": chapter.metadata.get("summary", "")}
        about["keywords"] = ", ".join(chapter.metadata.get("names", []))
        for name, content in about.items():
            if content:
                content = html.escape(content)
                context["metatags"] += f'\n<meta name="{name}" content="{content}" />'


def index_letters(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    r"""Let the search find the Greek letters of a page's formulas as they are seen: τ, beside `\tau`."""
    formulas = doctree.findall(lambda n: isinstance(n, nodes.math | nodes.math_block))
    commands = {c for formula in formulas for c in re.findall(r"\\([A-Za-z]+)", formula.astext())}
    letters = set()
    for command in commands:
        size = "CAPITAL" if command[0].isupper() else "SMALL"
        name = "LAMDA" if command.upper() == "LAMBDA" else command.upper()  # as Unicode spells it
        with suppress(KeyError):
            letters.add(unicodedata.lookup(f"GREEK {size} LETTER {name}"))
    if letters:
        text = f"<span hidden>{' '.join(sorted(letters))}</span>"
        doctree.append(nodes.raw("", text, format="html"))


def know_types(app: Sphinx, thing: Any, bound_method: bool) -> None:
    """Let autodoc read the hints of a module that imports some of their types for type checkers only."""
    name = getattr(thing, "__module__", None) or ""
    if not name.startswith("affnb."):
        return
    module = sys.modules[name]
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            with suppress(ImportError):
                exec(ast.unparse(node.body), vars(module))


def expect_mathematics(app: Sphinx, env: Any) -> None:
    """Load MathJax on the scoreboard, whose tables hold formulas that Sphinx doesn't see."""
    env.get_domain("math").data["has_equations"]["book/scoreboard"] = True


def _mend_page(html: str) -> str:
    """Mend what the theme and myst-nb write in ways that assistive technology stumbles over."""
    soup = BeautifulSoup(html, "html.parser")
    # Buttons and links that show only an icon get their tooltip as a name; the icon is decoration.
    for element in soup.select("button, a.btn, label"):
        if not element.get_text(strip=True) and not element.get("aria-label"):
            name = element.get("title") or element.get("data-bs-title")
            if name:
                element["aria-label"] = name
    for icon in soup.select("i[class*='fa-'], span[class*='fa-']"):
        icon["aria-hidden"] = "true"
    # The theme opens its own buttons' links in a new window; those within the book stay in it.
    for link in soup.select(".article-header-buttons a[target=_blank]"):
        if not link["href"].startswith("http"):
            del link["target"]
        else:
            link["rel"] = "noopener"
    # The copy for printing repeats the title, as a heading that outline readers would meet first.
    for heading in soup.select("#jb-print-docs-body :is(h1, h2)"):
        heading.name = "div"
        heading["class"] = [*heading.get("class", []), "affnb-print-heading"]
    # Wide tables scroll in a box of their own.
    for table in soup.select("article table"):
        if not table.find_parent(class_=["affnb-scroll", "affnb-explore"]):
            table.wrap(soup.new_tag("div", attrs={"class": "affnb-scroll"}))
    # Bibliographies: a role that ARIA has withdrawn, and a list of what aren't its items.
    for entry in soup.select("[role=doc-biblioentry], .citation-list[role=list]"):
        del entry["role"]
    # A name that differs from what is seen misleads whoever speaks it; the text itself is enough.
    for element in soup.select("summary[aria-label], .search-button-field[aria-label]"):
        del element["aria-label"]
    # The arrows of the contents show an icon only.
    for summary in soup.select("nav li > details > summary"):
        above = summary.find_parent("li").find("a")
        summary["aria-label"] = f"Pages below {above.get_text(strip=True)}"
    # A long signature is written as a list of definitions without terms.
    for arguments in soup.select("dt.sig > dl"):
        arguments.name, arguments["class"] = "div", "affnb-arguments"
        for argument in arguments.find_all("dd"):
            argument.name = "div"
    for icon in soup.select(".theme-switch-button .theme-switch"):
        del icon["title"]
    hurry(soup)
    add_plain(soup)
    return str(soup)


def hurry(soup: BeautifulSoup) -> None:
    """Let nothing that only scripts need come before the text, and no page load the index of the search."""
    states = soup.select("head script[type='application/vnd.jupyter.widget-state+json']")
    for state in states:
        soup.body.append(state.extract())
    # The theme asks for them on each page, for a search as you type, which the book doesn't have.
    if not soup.select_one("#search-results"):
        for script in soup.select(
            "script[src$='searchindex.js'], script[src*='searchtools.js'], script[src*='language_data.js']"
        ):
            script.decompose()


def write_mended(app: Sphinx, exception: Exception | None) -> None:
    """Go once over every page that was written."""
    if exception or app.builder.format != "html":
        return
    for page in Path(app.outdir).rglob("*.html"):
        if "_static" not in page.parts:
            page.write_text(_mend_page(page.read_text(encoding="utf8")), encoding="utf8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    # Jupyter Book sets this option of sphinx_comments, which the book does without.
    app.add_config_value("comments_config", {}, "html")
    # After the theme has made its buttons (priority 501).
    app.connect("html-page-context", mend_buttons, priority=900)
    app.connect("html-page-context", describe)
    app.connect("doctree-resolved", index_letters)
    app.connect("autodoc-before-process-signature", know_types)
    app.connect("env-updated", expect_mathematics)
    app.connect("build-finished", write_mended)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}

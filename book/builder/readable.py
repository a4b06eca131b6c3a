"""Chapters for places that don't know MyST: what a reader downloads and opens in Colab, VS Code or JupyterLab.

There a directive would be shown as it is written, and a citation as its key. The text stays the same.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
from pybtex.database import BibliographyData, parse_file
from pybtex.richtext import Text

from .chapters import ROOT, Chapter

_OPENING = re.compile(r"^:::+ *\{([\w:-]+)\} *(.*)\n((?::[\w-]+:.*\n)*)", re.MULTILINE)
_OPTION = re.compile(r"^:([\w-]+): *(.*)$", re.MULTILINE)


def _names(kind: str, title: str) -> str:
    """Name a directive: *Theorem (The limits)*, or by its title alone where its kind says nothing."""
    if kind == "admonition":
        return title
    name = kind.removeprefix("prf:").capitalize()
    return f"{name} ({title})" if title else name


def labels(chapters: Sequence[Chapter]) -> dict[str, str]:
    """Return how the text calls what has a label: definitions, theorems, exercises of all chapters."""
    found = {}
    for chapter in chapters:
        exercises = 0
        for cell in nbformat.read(chapter.path, as_version=4)["cells"]:
            for kind, title, options in _OPENING.findall(cell["source"] + "\n"):
                exercises += kind == "exercise"
                name = f"Exercise {exercises}" if kind == "exercise" else _names(kind, title)
                label = dict(_OPTION.findall(options)).get("label")
                if label:
                    found[label] = name
    return found


def _authors(bibliography: BibliographyData, key: str) -> tuple[str, str]:
    """Return who wrote a reference, in the short form, and its year."""
    entry = bibliography.entries[key]
    last = [str(Text.from_latex(" ".join(p.last_names))) for p in entry.persons["author"]]
    names = (
        last[0] if len(last) == 1 else " and ".join(last) if len(last) == 2 else f"{last[0]} et al."
    )
    return names, entry.fields["year"]


_CITATION = re.compile(r"\{cite:([tp])\}`([^`]+)`")


def _where(fields: Mapping[str, str]) -> str:
    """Return the address of a paper, empty where it has none."""
    if "doi" in fields:
        return f"https://doi.org/{fields['doi']}"
    return (
        f"https://arxiv.org/abs/{fields['eprint']}" if "eprint" in fields else fields.get("url", "")
    )


def references(text: str, bibliography: BibliographyData) -> str:
    """Return a section of Markdown with what a text cites, in the order of the citations."""
    keys = [key.strip() for _, keys in _CITATION.findall(text) for key in keys.split(",")]
    lines = ["## References", ""]
    for key in dict.fromkeys(keys):
        who, year = _authors(bibliography, key)
        fields = bibliography.entries[key].fields
        title = Text.from_latex(fields["title"])
        lines.append(f"- {who} ({year}). *{title}*. {_where(fields)}".rstrip())
    return "\n".join(lines)


def plain_markdown(
    text: str,
    names: Mapping[str, str],
    bibliography: BibliographyData,
    here: str = "",
    site: str = "",
) -> str:
    """Return Markdown that says the same without MyST's directives and roles.

    Parameters
    ----------
    text
        The source of a cell.
    names
        What has a label is called so, see `labels`.
    bibliography
        The references that are cited.
    here
        The page of the text in the site; its links lead on from there.
    site
        The address of the published site. Where it is empty, links within the book are plain text.
    """

    def opening(match: re.Match[str]) -> str:
        kind, title, options = match.groups()
        if kind == "solution-end":
            return ""
        if kind == "solution-start":
            return f"**Solution of {names.get(title, 'the exercise').lower()}.**\n"
        label = dict(_OPTION.findall(options)).get("label", "")
        return f"**{names.get(label) or _names(kind, title)}.**\n"

    def citation(match: re.Match[str]) -> str:
        cited = [_authors(bibliography, key.strip()) for key in match[2].split(",")]
        if match[1] == "t":
            return ", ".join(f"{who} ({year})" for who, year in cited)
        return "(" + "; ".join(f"{who}, {year}" for who, year in cited) + ")"

    def reference(match: re.Match[str]) -> str:
        title, _, label = match[1].rpartition("<")
        return title.strip() or names.get(label.strip("> "), "there")

    def link(match: re.Match[str]) -> str:
        if not site:
            return f"*{match[1]}*"
        page = posixpath.normpath(posixpath.join(posixpath.dirname(here), match[2]))
        return f"[{match[1]}]({site}/{page}.html)"

    text = _OPENING.sub(opening, text + "\n")
    text = re.sub(r"^:::+$", "", text, flags=re.MULTILINE)
    text = _CITATION.sub(citation, text)
    text = re.sub(r"\{(?:prf:)?ref\}`([^`]+)`", reference, text)
    text = re.sub(r"\[([^\]]+)\]\((?!https?:)([^)\s]+)\.(?:ipynb|md)\)", link, text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def readable(
    notebook: nbformat.NotebookNode,
    chapter: Chapter,
    names: Mapping[str, str],
    site: str = "",
    root: Path = ROOT,
) -> nbformat.NotebookNode:
    """Return a chapter's notebook in plain Markdown, with a list of what it cites; no cell is empty."""
    result = nbformat.from_dict(notebook)
    bibliography = parse_file(root / "book" / "references.bib")
    texts = [cell["source"] for cell in result["cells"] if cell["cell_type"] == "markdown"]
    cited = references("\n".join(texts), bibliography)
    for cell in result["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = plain_markdown(cell["source"], names, bibliography, chapter.page, site)
    result["cells"] = [c for c in result["cells"] if c["source"] or c["cell_type"] == "code"]
    result["cells"].append(nbformat.v4.new_markdown_cell(cited, id="references"))
    return result

"""The reference of the package: a page for each part and each shared room of ``affnb``.

Nobody lists anything for it. The names are those of each ``__all__``, the texts are the docstrings (autodoc
brings them in), an operation's chapter is the one that has its module's name, and its benchmark is the
one that has its own.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pybtex.database import parse_file
from pybtex.richtext import Text

from .chapters import ROOT, Chapter

#: The folder of the pages. Its page ``index``, which ``_toc.yml`` names, has the others below it.
FOLDER = "book/package"


@dataclass(frozen=True)
class Public:
    """A public name: where it is imported from, its kind as autodoc has it, the module that defines it."""

    package: str
    name: str
    kind: str
    home: str
    methods: tuple[str, ...]


def public(package: str) -> list[Public]:
    """List the public names of a module or package, those of ``__all__``."""
    module = importlib.import_module(package)
    found = []
    for name in module.__all__:
        thing = getattr(module, name)
        kind = "class" if inspect.isclass(thing) else "function" if callable(thing) else "data"
        methods = tuple(
            method
            for method, value in (vars(thing).items() if kind == "class" else ())
            if method[0] != "_"
            and (inspect.isfunction(value) or isinstance(value, property))
            and value.__doc__
        )
        home = getattr(thing, "__module__", package) if kind != "data" else package
        found.append(Public(package, name, kind, home, methods))
    return found


def rooms(parts: Iterable[str]) -> list[str]:
    """List the modules at the top of the package that are no parts and have public names."""
    import affnb

    names = [f"affnb.{m.name}" for m in pkgutil.iter_modules(affnb.__path__)]
    names = [name for name in names if name.removeprefix("affnb.") not in set(parts)]
    return [name for name in names if hasattr(importlib.import_module(name), "__all__")]


def operations_of(chapter: Chapter) -> list[Public]:
    """List a chapter's operations: what its part makes public of the module of its name."""
    home = "affnb." + chapter.name.replace("/", ".")
    return [entry for entry in public(f"affnb.{chapter.part}") if entry.home == home]


def measured(root: Path = ROOT) -> set[str]:
    """Return the names of what the page of benchmarks has a section on."""
    files = (root / "benchmarks" / "results").glob("*.json")
    return {result["operation"] for f in files for result in json.loads(f.read_text())["results"]}


def links(entries: Sequence[Public], role: str = ":py:obj:") -> str:
    """Return links to the entries of some names, in reStructuredText or with MyST's ``{py:obj}``."""
    return ", ".join(f"{role}`~{entry.package}.{entry.name}`" for entry in entries)


def _title(text: str, line: str) -> list[str]:
    return [text, line * len(text), ""]


def _entry(entry: Public, below: str = "") -> list[str]:
    """Return the directive for a name, with a line below its docstring."""
    lines = [f".. auto{entry.kind}:: {entry.package}.{entry.name}"]
    if entry.methods:
        lines.append(f"   :members: {', '.join(entry.methods)}")
    if entry.kind == "data":
        lines.append("   :no-value:")
    return [*lines, "", *([f"   {below}", ""] if below else [])]


def paper_title(chapter: Chapter, root: Path = ROOT) -> str | None:
    """Return the title of a chapter's paper, as plain text."""
    key = chapter.metadata.get("paper")
    if key is None:
        return None
    entry = parse_file(root / "book" / "references.bib").entries[key]
    return str(Text.from_latex(entry.fields["title"]))


def part_page(part: str, chapters: Sequence[Chapter], root: Path = ROOT) -> str:
    """Write the page of a part: a section for each chapter, an entry for each of its operations.

    Raises
    ------
    ValueError
        A public name of the part belongs to none of its chapters.
    """
    members = [chapter for chapter in chapters if chapter.part == part]
    package, known = f"affnb.{part}", measured(root)
    lines = [*_title(package, "="), f".. automodule:: {package}", ""]
    listed = set()
    for chapter in members:
        lines += _title(chapter.title, "-")
        about = f"Chapter: :doc:`/chapters/{chapter.name}`."
        paper = paper_title(chapter, root)
        if paper:
            about += f" Paper: :cite:t:`{chapter.metadata['paper']}`, *{paper}*."
        if chapter.method in known:
            about += f" Measured: :ref:`Benchmarks <bench-{chapter.method}>`."
        lines += [about, ""]
        for entry in operations_of(chapter):
            below = f"Chapter: :doc:`/chapters/{chapter.name}`."
            if entry.name in known:
                below += f" Measured: :ref:`Benchmarks <bench-{entry.name}>`."
            lines += _entry(entry, below)
            listed.add(entry.name)
    left = [entry.name for entry in public(package) if entry.name not in listed]
    if left:
        raise ValueError(
            f"{package}: expected each public name in the module of a chapter, got {left}"
        )
    return "\n".join(lines)


def room_page(room: str) -> str:
    """Write the page of a shared room."""
    lines = [*_title(room, "="), f".. automodule:: {room}", ""]
    for entry in public(room):
        lines += _entry(entry)
    return "\n".join(lines)


def overview(chapters: Sequence[Chapter]) -> str:
    """Write the page that says what is where."""

    def listing(package: str) -> list[str]:
        first = (importlib.import_module(package).__doc__ or "").strip().splitlines()[0]
        return [f":doc:`{package} <{package.removeprefix('affnb.')}>`", f"   {first}", ""]

    parts = list(dict.fromkeys(chapter.part for chapter in chapters))
    lines = [
        *_title("What is in affnb", "="),
        "What you can import from ``affnb``, with shapes, ranges, defaults, costs and errors, from the "
        "docstrings. A part of the book is a subpackage of the same name, and from it you import the "
        "operations of all its chapters; the shared rooms serve all parts. How to install it is in "
        ":doc:`/book/running`.",
        "",
        *_title("Parts", "-"),
    ]
    for part in parts:
        lines += listing(f"affnb.{part}")
        for chapter in chapters:
            if chapter.part == part:
                lines.append(
                    f"   - :doc:`/chapters/{chapter.name}`: {links(operations_of(chapter))}"
                )
        lines.append("")
    lines += _title("Shared rooms", "-")
    for room in rooms(parts):
        lines += [*listing(room), f"   {links(public(room))}", ""]
    return "\n".join(lines)


def closing(chapter: Chapter, root: Path = ROOT) -> str:
    """Return the section that ends a chapter's page, as MyST Markdown: its operations, and its paper."""
    names = links(operations_of(chapter), "{py:obj}")
    lines = [
        "## In the package",
        "",
        f"{{doc}}`affnb.{chapter.part} </{FOLDER}/{chapter.part}>` has what this chapter built: {names}.",
    ]
    paper = paper_title(chapter, root)
    if paper:
        lines += ["", f"The paper is {{cite:t}}`{chapter.metadata['paper']}`, *{paper}*."]
    return "\n".join(lines)


def contents(chapters: Sequence[Chapter], root: Path = ROOT) -> dict[str, Any]:
    """Return the table of contents of ``_toc.yml`` with the pages of the reference in it."""
    toc: dict[str, Any] = yaml.safe_load((root / "_toc.yml").read_text())
    parts = list(dict.fromkeys(chapter.part for chapter in chapters))
    names = [*parts, *(room.removeprefix("affnb.") for room in rooms(parts))]
    for part in toc["parts"]:
        for entry in part["chapters"]:
            if entry["file"] == f"{FOLDER}/index":
                entry["sections"] = [{"file": f"{FOLDER}/{name}"} for name in names]
    return toc


def write_reference(target: Path, chapters: Sequence[Chapter], root: Path = ROOT) -> None:
    """Write the pages into the staged project ``target``, and its table of contents."""
    folder = target / FOLDER
    folder.mkdir(parents=True)
    parts = list(dict.fromkeys(chapter.part for chapter in chapters))
    (folder / "index.rst").write_text(overview(chapters))
    for part in parts:
        (folder / f"{part}.rst").write_text(part_page(part, chapters, root))
    for room in rooms(parts):
        (folder / f"{room.removeprefix('affnb.')}.rst").write_text(room_page(room))
    (target / "_toc.yml").write_text(yaml.safe_dump(contents(chapters, root), sort_keys=False))

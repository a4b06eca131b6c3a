"""Begin a chapter: ``make chapter part=metric name=my_method [title="My method"] [paper=key]``.

Writes a notebook, a module, tests and a benchmark that work as they stand, from ``templates/``, and the
lines of other files that name a chapter: its place in the contents, in the preface and in the opening
of its part, the export of its part, and a stub of its paper's entry in the bibliography.
"""

from __future__ import annotations

import argparse
import keyword
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat

from .canonical import PARAMETERS, SETUP, text
from .chapters import ROOT

TEMPLATES = Path(__file__).with_name("templates")

#: The parts in reading order, with their titles. A new one also needs its row in ``book/preface.md``.
PARTS = {
    "affinity": "Supervising affinity",
    "metric": "Ranking and contrast",
    "matching": "Matching and cost volumes",
    "graphs": "Attention and graphs",
    "geometry": "Geometry",
    "efficient": "Quantization, search and dynamical networks",
    "adaptation": "Adapting across domains",
    "detection": "Detection and pose",
    "generation": "Generation and restoration",
}

STUB = """
@misc{%s,
  author = {Author, First and Author, Second},
  title  = {Replace this entry by that of the paper},
  year   = {2000}
}
"""


def filled(template: str, names: Mapping[str, str]) -> str:
    """Return the text of a template with the author's names in place of ours."""
    source = (TEMPLATES / template).read_text()
    return re.sub("|".join(names), lambda found: names[found[0]], source)


def notebook(source: str, metadata: Mapping[str, object]) -> nbformat.NotebookNode:
    """Make a notebook of cells that lines ``+++`` part; code stands in a fence, after it the tags."""
    cells = []
    for cell in re.split(r"^\+\+\+\n", source, flags=re.M):
        code = re.fullmatch(r"```\{code-cell\}(.*)\n([^`]*?)\n?```\n", cell)
        if code is None:
            cells.append(nbformat.v4.new_markdown_cell(cell.strip()))
            continue
        tags = code[1].split()
        common = {"setup": SETUP.read_text().strip(), "parameters": PARAMETERS}
        body = next((common[tag] for tag in tags if tag in common), code[2])
        cells.append(nbformat.v4.new_code_cell(body, metadata={"tags": tags}))
    return nbformat.v4.new_notebook(cells=cells, metadata={"affnb": dict(metadata)})


def tidy(source: str, file: str, root: Path) -> str:
    """Return the source code of a file as ``make format`` would leave it."""
    for command in (["check", "--fix", "--quiet"], ["format"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", file, "-"]
        done = subprocess.run(ruff, cwd=root, input=source, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{file}: ruff failed\n{done.stderr}")
        source = done.stdout
    return text(nbformat.reads(source, as_version=4)) if file.endswith(".ipynb") else source


def after(source: str, line: str, added: str, file: str) -> str:
    """Insert text after the last line that begins with a pattern.

    Raises
    ------
    ValueError
        No line of the file does.
    """
    found = list(re.finditer(rf"^{line}.*\n", source, flags=re.M))
    if not found:
        raise ValueError(f"{file}: expected a line like {line!r}, got none")
    return source[: found[-1].end()] + added + source[found[-1].end() :]


def new_files(part: str, name: str) -> dict[str, str]:
    """Name the four files of a chapter, each with its template."""
    return {
        f"chapters/{part}/{name}.ipynb": "chapter.md",
        f"affnb/{part}/{name}.py": "module.py",
        f"tests/{part}/test_{name}.py": "test.py",
        f"benchmarks/{part}/bench_{name}.py": "bench.py",
    }


def check_names(part: str, name: str, title: str, paper: str, root: Path) -> None:
    """Raise unless the four can name a new chapter.

    Raises
    ------
    ValueError
        An unknown part, a name that is no identifier or is taken, a title or a key that would break the
        files that it goes into.
    """
    if part not in PARTS:
        raise ValueError(
            f"part: expected one of {', '.join(PARTS)} (book/builder/new_chapter.py), got {part!r}"
        )
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ValueError(f"name: expected an identifier in lower case, as smooth_ap, got {name!r}")
    if not re.fullmatch(r'[^\W_][^\n|\[\]{}<>$`*_"\\]*', title):
        raise ValueError(f"title: expected one line of plain text, got {title!r}")
    if not re.fullmatch(r"[A-Za-z0-9:-]+", paper):
        raise ValueError(f"paper: expected a key such as brown2020smoothap, got {paper!r}")
    for file in new_files(part, name):
        if (root / file).exists():
            raise ValueError(f"{part}/{name}: expected a new chapter, but {file} exists already")
    exports = root / "affnb" / part / "__init__.py"
    taken = re.findall(r'"(\w+)"', exports.read_text()) if exports.exists() else []
    for public in (name, f"{name}_loss"):
        if public in taken:
            raise ValueError(f"name: expected a new one, but affnb.{part} has {public} already")


def plan(
    part: str, name: str, title: str = "", paper: str = "", root: Path = ROOT
) -> dict[str, str]:
    """Return the files of a new chapter, and those that name it, as they are to be; write nothing.

    Parameters
    ----------
    part, name
        A key of `PARTS`, and a new identifier in lower case.
    title
        Default: made of the name.
    paper
        Key in ``book/references.bib``; without such an entry a stub is added. Default: made of the name.
    root
        The project.

    Raises
    ------
    ValueError
        As `check_names`; or a file lacks the line next to which the chapter's own belongs.
    """
    title = title or name.replace("_", " ").capitalize()
    paper = paper or "author2000" + name.replace("_", "")
    check_names(part, name, title, paper, root)
    names = {
        "my_part": part,
        "my_method": name,
        "my-label": f"{part}-{name}".replace("_", "-"),
        "My Title": title,
        "mypaper": paper,
    }
    about = {
        "title": title,
        "paper": paper,
        "builds_on": [],
        "minutes": 15,
        "summary": "Replace this: the chapter in one sentence.",
        "names": [],
    }
    files = {file: filled(template, names) for file, template in new_files(part, name).items()}
    entry = f"chapters/{part}/{name}"
    files[f"{entry}.ipynb"] = text(notebook(files[f"{entry}.ipynb"], about))

    toc, preface, bib = "_toc.yml", "book/preface.md", "book/references.bib"
    opening, exports = f"book/parts/{part}.md", f"affnb/{part}/__init__.py"
    old = {
        file: (root / file).read_text() if (root / file).exists() else ""
        for file in (toc, preface, bib, opening, exports)
    }
    line, public = f"          - file: {entry}\n", f"from affnb.{part}.{name} import {name}_loss\n"
    if old[opening]:
        files[toc] = after(old[toc], f" +- file: chapters/{part}/", line, toc)
        # An opening may have a table with a row for each of its chapters.
        ruler = re.search(r"^\|(?: -+ \|)+$", old[opening], flags=re.M)
        listed = rf"\| \[.*?\]\(../../chapters/{part}/"
        if ruler and re.search(f"^{listed}", old[opening], flags=re.M):
            rest = " Replace this |" * (ruler[0].count("|") - 2)
            row = f"| [{title}](../../{entry}.ipynb) |{rest}\n"
            files[opening] = after(old[opening], listed, row, opening)
        public += f'\n__all__ = [\n"{name}_loss",'
        files[exports] = old[exports].replace("__all__ = [", public)
    else:
        earlier = "|".join(list(PARTS)[: list(PARTS).index(part)])
        line = f"      - file: book/parts/{part}\n        sections:\n{line}"
        files[toc] = after(old[toc], f" +- file: chapters/(?:{earlier})/", line, toc)
        files[opening] = filled("part.md", names | {"My Title": PARTS[part]})
        files[exports] = f'"""{PARTS[part]}."""\n\n{public}\n__all__ = ["{name}_loss"]\n'

    # The row of the part: first the chapters that there are, then those that are planned.
    row = re.search(rf"^(\| {PARTS[part]} \| )(.*) \|$", old[preface], flags=re.M)
    if row is None:
        raise ValueError(f"{preface}: expected a row of the part {PARTS[part]!r}, got none")
    done, planned, later = row[2].partition("*planned:*")
    link = f"[{title}](../{entry}.ipynb)"
    done = ", ".join([d for d in [done.rstrip("; ")] if d] + [link]) + ("; " if planned else "")
    files[preface] = old[preface].replace(row[0], f"{row[1]}{done}{planned}{later} |")
    if not re.search(rf"^@\w+\{{{paper},", old[bib], flags=re.M):
        files[bib] = old[bib] + STUB % paper
    code = (".py", ".ipynb")
    return {f: tidy(t, f, root) if f.endswith(code) else t for f, t in files.items()}


def write(files: Mapping[str, str], root: Path = ROOT) -> None:
    """Write files, all of them or, when one of them cannot be written, none."""
    before = {file: (root / file).read_bytes() for file in files if (root / file).exists()}
    try:
        for file, content in files.items():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text(content)
    except BaseException:
        for file in files:
            if file in before:
                (root / file).write_bytes(before[file])
            else:
                (root / file).unlink(missing_ok=True)
        raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a new chapter and say which files it is in."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("part", "name", "title", "paper"):
        parser.add_argument(f"--{name}", default="")
    given = parser.parse_args(arguments)
    try:
        files = plan(given.part, given.name, given.title, given.paper)
        write(files)
    except (OSError, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(files))
    print(
        'What is yours to write stands where these files say "Replace this"; see CONTRIBUTING.md.'
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

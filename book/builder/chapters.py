"""The chapters: which there are, running one from top to bottom, and keeping the result.

``python -m builder.chapters`` runs what is not in the cache; with names (``affinity/affinity_mass``) it
runs those only, and ``-p seed 1`` passes parameters (the result then goes to ``_build/runs``).
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[2]

#: What the parameters cell of each chapter says.
DEFAULTS: dict[str, Any] = {"profile": "ci", "device": "auto", "seed": 0, "data_root": None}


@dataclass(frozen=True)
class Chapter:
    """A chapter as the table of contents and its own metadata name it."""

    part: str
    method: str
    path: Path
    part_title: str
    metadata: Mapping[str, Any] = field(hash=False)

    @property
    def name(self) -> str:
        """``part/method``."""
        return f"{self.part}/{self.method}"

    @property
    def title(self) -> str:
        """The chapter's title."""
        return str(self.metadata["title"])

    @property
    def page(self) -> str:
        """The address of the chapter's page, from the root of the site."""
        return f"chapters/{self.name}.html"


@dataclass(frozen=True)
class Result:
    """What running a chapter took: wall-clock seconds, and the kernel's peak memory in MB."""

    notebook: Path
    seconds: float
    peak_mb: float


class ChapterError(RuntimeError):
    """A chapter failed; the message holds the cell, its traceback, and where the notebook is."""


def toc_files(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the files that table-of-contents entries name, sections included, in order."""
    files = []
    for entry in entries:
        if "file" in entry:
            files.append(str(entry["file"]))
        files += toc_files(entry.get("sections", []))
    return files


def first_heading(page: Path) -> str:
    """Return the title of a page of Markdown.

    Raises
    ------
    ValueError
        The page has no heading.
    """
    for line in page.read_text().splitlines():
        if line.startswith("# "):
            return line[2:].strip()
    raise ValueError(f"{page}: expected a heading '# ...', got none")


def list_chapters(root: Path = ROOT) -> list[Chapter]:
    """List the chapters in reading order, from ``_toc.yml``.

    A part is an entry with its chapters as sections; the entry's own page opens the part and names it.

    Raises
    ------
    FileNotFoundError
        The table of contents names a chapter, or an opening, that doesn't exist.
    ValueError
        A chapter's metadata ``affnb`` has no title, or an opening has no heading.
    """
    toc = yaml.safe_load((root / "_toc.yml").read_text())
    chapters = []
    for part in toc.get("parts", []):
        for opening in part["chapters"]:
            files = [file for file in toc_files([opening]) if file.startswith("chapters/")]
            if not files:
                continue
            title = first_heading((root / opening["file"]).with_suffix(".md"))
            for file in files:
                path = (root / file).with_suffix(".ipynb")
                metadata = json.loads(path.read_text())["metadata"].get("affnb", {})
                if "title" not in metadata:
                    raise ValueError(
                        f'{path}: expected metadata "affnb" with a title, got {metadata}'
                    )
                folder, method = file.split("/")[1:]
                chapters.append(Chapter(folder, method, path, title, metadata))
    return chapters


# --- what a chapter depends on ---------------------------------------------------------------------


def _module_file(name: str, root: Path) -> Path | None:
    """Return the file of the module ``affnb.x.y``, or None when there is no such module."""
    base = root.joinpath(*name.split("."))
    for file in (base / "__init__.py", base.with_suffix(".py")):
        if file.is_file():
            return file
    return None


_one_at_a_time = threading.Lock()


def _parse(source: str) -> ast.AST:
    # Chapters run in threads, and CPython 3.11 counts the depth of all its parsers in one place: two at
    # once can end in "AST constructor recursion depth mismatch".
    with _one_at_a_time:
        return ast.parse(source)


def _imported(tree: ast.AST, package: str) -> set[str]:
    """Name everything that a syntax tree may import from affnb, wherever in it.

    Names that turn out not to be modules are dropped by the caller.
    """
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            # importlib.import_module("affnb.x") or (".x", package), as lazy imports have it.
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called == "import_module" and isinstance(node.args[0].value, str):
                name = node.args[0].value
                names.add(f"{package}{name}" if name.startswith(".") else name)
    return {name for name in names if name.split(".")[0] == "affnb"}


def reachable(notebook: Path, root: Path = ROOT) -> list[Path]:
    """List the files of affnb that a notebook can reach by imports: modules and the data beside them.

    A cell that doesn't parse counts as one that can reach everything.
    """
    todo = []
    for cell in nbformat.read(notebook, as_version=4)["cells"]:
        if cell["cell_type"] != "code":
            continue
        # IPython's own lines are no Python.
        lines = [
            line for line in cell["source"].splitlines() if not line.lstrip().startswith(("%", "!"))
        ]
        try:
            todo += _imported(_parse("\n".join(lines)), "")
        except SyntaxError:
            return sorted(
                f
                for f in (root / "affnb").rglob("*")
                if f.is_file() and "__pycache__" not in str(f)
            )
    files: set[Path] = set()
    while todo:
        name = todo.pop()
        if "." in name:  # importing a.b runs a first
            todo.append(name.rpartition(".")[0])
        file = _module_file(name, root)
        if file is None or file in files:
            continue
        files.add(file)
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        todo += _imported(_parse(file.read_text()), package)
        # A module may read what lies beside it.
        files |= {
            f
            for f in file.parent.rglob("*")
            if f.is_file() and f.suffix not in {".py", ".pyc", ".typed"}
        }
    return sorted(files)


def key(chapter: Chapter, parameters: Mapping[str, Any] | None = None, root: Path = ROOT) -> str:
    """Return a hash of all that a chapter's result depends on.

    The notebook, the modules that it can reach, the parameters, the pinned packages, Python and torch.
    """
    digest = hashlib.sha256()
    pins = root / "constraints.txt"
    for file in [chapter.path, *reachable(chapter.path, root), *([pins] if pins.exists() else [])]:
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    facts = {
        "parameters": DEFAULTS | dict(parameters or {}),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
    }
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


# --- running ---------------------------------------------------------------------------------------


def executed(chapter: Chapter, root: Path = ROOT) -> Path:
    """Return where the executed notebook of a chapter is kept."""
    return root / "_build" / "executed" / f"{chapter.name}.ipynb"


def cached(chapter: Chapter, root: Path = ROOT) -> bool:
    """Whether the executed notebook that is kept is what a run would give now."""
    kept = executed(chapter, root)
    stamp = kept.with_suffix(".key")
    return kept.exists() and stamp.exists() and stamp.read_text() == key(chapter, root=root)


def execute(
    chapter: Chapter, parameters: Mapping[str, Any] | None = None, root: Path = ROOT
) -> Result:
    """Run a chapter from top to bottom in a process of its own.

    Parameters
    ----------
    chapter
        Which.
    parameters
        Those that differ from `DEFAULTS`. With none that do, the result goes into the cache that
        the book is built from; else into ``_build/runs``.
    root
        The project.

    Raises
    ------
    ChapterError
        A cell raised an error. The notebook up to there is kept.
    """
    given = {k: v for k, v in (parameters or {}).items() if DEFAULTS.get(k, ...) != v}
    if given:
        label = "-".join(f"{k}_{Path(str(v)).name}" for k, v in sorted(given.items()))
        out = root / "_build" / "runs" / chapter.part / f"{chapter.method}-{label}.ipynb"
    else:
        out = executed(chapter, root)
    before = key(chapter, root=root)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".running.ipynb")
    command = [sys.executable, "-m", "builder.chapters", "--run", str(chapter.path), str(partial)]
    done = subprocess.run(
        [*command, json.dumps(given)],
        cwd=root,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join([str(ROOT / "book"), str(root)]),
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "TQDM_DISABLE": "1",  # no progress bars in the pages
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        failed = out.with_suffix(".failed.ipynb")
        if partial.exists():
            partial.replace(failed)
        raise ChapterError(
            f"{chapter.name} failed.\n{done.stderr.strip()}\nThe notebook up to the error: {failed}"
        )
    # Whole or not at all: an interrupted run leaves the earlier result in place.
    run = json.loads(partial.read_text())["metadata"]["affnb_run"]
    partial.replace(out)
    out.with_suffix(".failed.ipynb").unlink(missing_ok=True)
    if not given:
        out.with_suffix(".key").write_text(before)
    return Result(out, run["seconds"], run["peak_mb"])


def execute_all(chapters: Sequence[Chapter], root: Path = ROOT) -> list[Result]:
    """Run the chapters that are not cached, two at a time where there are two cores.

    Raises
    ------
    ChapterError
        One or more chapters failed; the others were run all the same.
    """
    from tqdm import tqdm

    todo = [chapter for chapter in chapters if not cached(chapter, root)]
    results, errors = [], []
    if not todo:
        return []
    pool = ThreadPoolExecutor(min(2, os.cpu_count() or 1))
    bar = tqdm(total=len(todo), desc="chapters", unit="chapter")
    try:
        futures = {pool.submit(execute, chapter, None, root): chapter for chapter in todo}
        bar.set_postfix_str(", ".join(c.name for c in todo[:2]))
        for future in as_completed(futures):
            try:
                results.append(future.result())
                took = f"{results[-1].seconds:.0f} s, {results[-1].peak_mb:.0f} MB"
                bar.write(f"{futures[future].name}: {took}")
            except ChapterError as error:
                errors.append(str(error))
                bar.write(f"{futures[future].name}: failed")
            running = [c.name for f, c in futures.items() if not f.done()][:2]
            bar.set_postfix_str(", ".join(running))
            bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    if errors:
        raise ChapterError("\n\n".join(errors))
    return results


def _commit(root: Path) -> str:
    """Return the commit that the files are at, marked when they differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _device(wanted: str) -> str:
    """Name the device that ``device=`` stands for on this machine."""
    import torch

    if wanted != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()})"


def _run(source: Path, out: Path, parameters: dict[str, Any]) -> int:
    """Run a notebook in this process, which does nothing else: so the kernel's memory can be told."""
    import resource

    import papermill

    notebook = nbformat.read(source, as_version=4)
    started = time.monotonic()
    error = ""
    try:
        papermill.execute_notebook(
            notebook,
            out,
            parameters=parameters,
            kernel_name="python3",
            cwd=source.parent,
            progress_bar=False,
        )
    except papermill.PapermillExecutionError as failure:
        error = f"Cell {failure.cell_index + 1} raised {failure.ename}:\n" + "\n".join(
            failure.traceback
        )
    seconds = time.monotonic() - started
    # The largest process that this one has waited for. Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    peak_mb = peak / (1e6 if sys.platform == "darwin" else 1e6 / 1024)
    if error:
        print(error, file=sys.stderr)
        return 1
    done = nbformat.read(out, as_version=4)
    done["metadata"].pop("papermill", None)  # paths and times of this machine
    for cell in done["cells"]:
        cell["metadata"].pop("papermill", None)
        cell["metadata"].pop("execution", None)
    values = DEFAULTS | parameters
    done["metadata"]["affnb_run"] = {
        "seconds": round(seconds, 1),
        "peak_mb": round(peak_mb),
        "device": _device(str(values["device"])),
        "commit": _commit(source.parent),
        "profile": values["profile"],
        "seed": values["seed"],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    nbformat.write(done, out)
    return 0


def main() -> int:
    """Run chapters from the command line."""
    if sys.argv[1:2] == ["--run"]:  # how `execute` starts the process of a chapter
        source, out, parameters = sys.argv[2:]
        return _run(Path(source), Path(out), json.loads(parameters))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="part/method; all chapters by default")
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="parameters"
    )
    arguments = parser.parse_args()
    chapters = list_chapters()
    unknown = set(arguments.names) - {c.name for c in chapters}
    if unknown:
        parser.error(f"no such chapter: {', '.join(sorted(unknown))}")
    chosen = [c for c in chapters if not arguments.names or c.name in arguments.names]
    try:
        if arguments.parameters:
            given = {name: yaml.safe_load(value) for name, value in arguments.parameters}
            for chapter in chosen:
                print(execute(chapter, given))
        else:
            execute_all(chosen)
    except ChapterError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

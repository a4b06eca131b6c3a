"""The one form in which notebooks are committed: no outputs, stable cell ids, sorted keys.

``python -m builder.canonical FILE...`` rewrites notebooks (and gives each the current set-up cell);
with ``--check`` it only lists what differs, and fails.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import nbformat

SETUP = Path(__file__).with_name("setup_cell.py")
PARAMETERS = 'profile = "ci"  # or "full": the paper\'s data and settings\n' \
    'device = "auto"  # the GPU when there is one\nseed = 0\ndata_root = None  # folder of real data sets'  # fmt: skip


def canonical(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return the canonical form of a notebook (the argument is not changed)."""
    result = nbformat.from_dict(notebook)
    result["nbformat"], result["nbformat_minor"] = 4, 5
    result["metadata"] = nbformat.from_dict(
        {
            "affnb": notebook["metadata"].get("affnb", {}),
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    seen: dict[str, int] = {}
    for cell in result["cells"]:
        tags = cell["metadata"].get("tags", [])
        cell["metadata"] = nbformat.from_dict({"tags": tags} if tags else {})
        if "setup" in tags:
            cell["source"] = SETUP.read_text().strip()
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
        else:
            cell.pop("outputs", None)
            cell.pop("execution_count", None)
        cell.pop("attachments", None)
        # An id from the content stays the same wherever the cell moves.
        digest = hashlib.sha1(cell["source"].encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, 0) + 1
        cell["id"] = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    return result


def text(notebook: nbformat.NotebookNode) -> str:
    """Return the canonical JSON of a notebook, as committed."""
    return str(nbformat.writes(canonical(notebook), version=4)).rstrip("\n") + "\n"


def check(path: Path) -> list[str]:
    """List what is not canonical in a notebook file; empty when all is well."""
    notebook = nbformat.read(path, as_version=4)
    problems = []
    if any(cell.get("outputs") for cell in notebook["cells"]):
        problems.append("outputs are stored")
    tags = [tag for cell in notebook["cells"] for tag in cell["metadata"].get("tags", [])]
    for tag in ("setup", "parameters"):
        if tags.count(tag) != 1:
            problems.append(f"expected one cell tagged {tag!r}, got {tags.count(tag)}")
    for cell in notebook["cells"]:
        if "parameters" in cell["metadata"].get("tags", []) and cell["source"] != PARAMETERS:
            problems.append("the parameters cell differs from the common one")
    if not problems and path.read_text() != text(notebook):
        problems.append("not in canonical form (run python -m builder.canonical on it)")
    return problems


def main() -> int:
    """Rewrite or check the notebooks named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="list what differs, change nothing")
    arguments = parser.parse_args()
    failed = False
    for path in arguments.files:
        if not arguments.check:
            path.write_text(text(nbformat.read(path, as_version=4)))
        for problem in check(path):
            failed = True
            print(f"{path}: {problem}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

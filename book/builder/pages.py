"""The pages that nobody writes: the map of chapters, the scoreboard, the benchmarks.

``python -m builder.pages --update-ledger`` rewrites ``book/scoreboard.json``, the list of verdicts that
later builds are held to, from the chapters as last executed.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from typing import Any

import nbformat

from .chapters import ROOT, Chapter, executed, list_chapters

MIME = "application/vnd.affnb.claim+json"
LEDGER = "book/scoreboard.json"

#: Verdicts in the order of the page: CSS class, heading, what it means.
VERDICTS = {
    "proved": ("proved", "Proved", "SymPy proved it, for all values of its symbols."),
    "equal": ("equal", "Equal", "Two implementations agree, within the tolerance named."),
    "measured": ("measured", "Measured", "An experiment met the criterion stated before it ran."),
    "not shown at this scale": (
        "not-shown",
        "Not shown at this scale",
        "The experiment is too small to tell; the reason is given.",
    ),
    "refuted here": ("refuted", "Refuted here", "An experiment contradicts it."),
}


@dataclass(frozen=True)
class Claim:
    """A claim as an executed chapter recorded it."""

    id: str
    statement: str
    verdict: str
    evidence: Mapping[str, Any]
    chapter: Chapter
    run: Mapping[str, Any]

    @property
    def link(self) -> str:
        """The claim's place in the site, seen from a page in ``book/``."""
        return f"../{self.chapter.page}#claim-" + re.sub(r"[^a-z0-9]+", "-", self.id)


class LedgerError(RuntimeError):
    """A claim that was proved or equal in the ledger no longer is."""


def claims_of(notebook: Path, chapter: Chapter) -> list[Claim]:
    """List the claims recorded in an executed notebook, in order.

    Raises
    ------
    ValueError
        Two claims have the same id, an id is not of this chapter, or a verdict is unknown.
    """
    source = nbformat.read(notebook, as_version=4)
    run = source["metadata"].get("affnb_run", {})
    claims: list[Claim] = []
    for cell in source["cells"]:
        for output in cell.get("outputs", []):
            found = output.get("data", {}).get(MIME)
            if found is None:
                continue
            claim = Claim(
                found["id"], found["statement"], found["verdict"], found["evidence"], chapter, run
            )
            if not claim.id.startswith(f"{chapter.name}:"):
                raise ValueError(f"{chapter.name} records a claim of another chapter: {claim.id}")
            if claim.id in {c.id for c in claims}:
                raise ValueError(f"{chapter.name} records the claim {claim.id} twice")
            if claim.verdict not in VERDICTS:
                raise ValueError(f"{claim.id}: unknown verdict {claim.verdict!r}")
            claims.append(claim)
    return claims


def all_claims(root: Path = ROOT) -> list[Claim]:
    """List the claims of all chapters, from the notebooks as last executed, in reading order."""
    return [claim for c in list_chapters(root) for claim in claims_of(executed(c, root), c)]


def read_ledger(root: Path = ROOT) -> dict[str, str]:
    """Read the verdicts that the build is held to: ``{claim id: verdict}``."""
    file = root / LEDGER
    return json.loads(file.read_text()) if file.exists() else {}


def check_ledger(claims: Sequence[Claim], ledger: Mapping[str, str]) -> None:
    """Hold the claims to the ledger.

    Raises
    ------
    LedgerError
        Something that was proved or equal is missing or has another verdict; the message names it.
    """
    now = {claim.id: claim.verdict for claim in claims}
    broken = [
        f"  {id}: was {verdict!r}, is {now.get(id, 'missing')!r}"
        for id, verdict in ledger.items()
        if verdict in ("proved", "equal") and now.get(id) != verdict
    ]
    if broken:
        raise LedgerError(
            "Earlier results no longer hold:\n"
            + "\n".join(broken)
            + "\nMend what broke them. Only if "
            "a claim was withdrawn on purpose: python -m builder.pages --update-ledger"
        )


def unlisted(claims: Sequence[Claim], ledger: Mapping[str, str]) -> list[str]:
    """List the claims whose verdict the ledger doesn't have, or has otherwise."""
    return [claim.id for claim in claims if ledger.get(claim.id) != claim.verdict]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_text(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _raw(content: str) -> str:
    """Put HTML into a MyST page."""
    return f"```{{raw}} html\n{content}\n```\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """Make an HTML table; the cells are HTML already, the first one of a row is its heading."""
    cells = "".join(f'<th scope="col">{h}</th>' for h in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{c}</td>" for c in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<table class="table affnb-table"><caption>{caption}</caption>'
        f"<thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"
    )


def scoreboard(claims: Sequence[Claim], chapters: Sequence[Chapter]) -> str:
    """Write the scoreboard, as MyST Markdown."""
    lines = [
        "# Scoreboard",
        "",
        "What this book proves, measures, and could not show. Each line comes from a chapter's own "
        "notebook, as it ran when this site was built; none was written by hand. A build in which "
        "something once *proved* or *equal* no longer holds fails.",
        "",
    ]
    tiles = []
    for verdict, (css, heading, _) in VERDICTS.items():
        count = sum(claim.verdict == verdict for claim in claims)
        tiles.append(
            f'<li class="affnb-tile affnb-{css}"><strong>{count}</strong> '
            f'<a href="#{css}">{heading.lower()}</a></li>'
        )
    lines.append(_raw(f'<ul class="affnb-tiles">{"".join(tiles)}</ul>'))
    for verdict, (css, heading, meaning) in VERDICTS.items():
        group = [claim for claim in claims if claim.verdict == verdict]
        lines += [f"({css})=", f"## {heading}", "", meaning, ""]
        if not group:
            lines += ["No claim has this verdict.", ""]
        for chapter in chapters:
            rows = []
            for claim in group:
                if claim.chapter != chapter:
                    continue
                facts = dict(claim.evidence)
                seeds = _text(facts.pop("seeds")) if "seeds" in facts else "none"
                effect = _text(facts.pop("effect")) if "effect" in facts else ""
                spread = _text(facts.pop("spread")) if "spread" in facts else ""
                evidence = "".join(
                    f"<div><b>{html.escape(k)}</b>: {html.escape(_text(v))}</div>"
                    for k, v in facts.items()
                )
                row = [f'<a href="{claim.link}">{html.escape(claim.statement)}</a>', evidence]
                if verdict in ("measured", "refuted here"):
                    row += [html.escape(effect), html.escape(spread), html.escape(seeds)]
                rows.append(row)
            if rows:
                head = ["Claim", "Evidence"]
                if verdict in ("measured", "refuted here"):
                    head += ["Effect", "Spread", "Seeds"]
                caption = f'<a href="../{chapter.page}">{html.escape(chapter.title)}</a>'
                lines.append(_raw(_table(head, rows, caption)))
    runs = {claim.chapter: claim.run for claim in claims}
    rows = [
        [
            f'<a href="../{chapter.page}">{html.escape(chapter.title)}</a>',
            html.escape(str(run.get("date", "unknown"))),
            f"<code>{html.escape(str(run.get('commit', 'unknown')))}</code>",
            html.escape(str(run.get("device", "unknown"))),
            html.escape(str(run.get("profile", "unknown"))),
            f"{run['seconds']:.0f} s" if "seconds" in run else "unknown",
            f"{run['peak_mb']:.0f} MB" if "peak_mb" in run else "unknown",
        ]
        for chapter, run in runs.items()
    ]
    lines += ["## The runs", "", "Where these results come from.", ""]
    if rows:
        head = ["Chapter", "Date", "Commit", "Device", "Profile", "Time", "Peak memory"]
        lines.append(_raw(_table(head, rows, "One run for each chapter")))
    return "\n".join(lines) + "\n"


# --- the map ---------------------------------------------------------------------------------------

# Three boxes in a row fit into the column of the text.
BOX_W, BOX_H, GAP_X, GAP_Y, LEFT, PER_ROW = 200, 46, 20, 34, 10, 3


def _wrapped(title: str, width: int = 26) -> list[str]:
    """Break a title into at most two lines that fit a box."""
    words, lines = title.split(), [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    if len(lines) > 2:
        lines = [lines[0], lines[1][: width - 1].rstrip() + "…"]
    return lines


def map_svg(chapters: Sequence[Chapter]) -> str:
    """Draw which chapter builds on which: parts from top to bottom, chapters as links.

    Raises
    ------
    ValueError
        A chapter builds on one that is not in the book.
    """
    names = {chapter.name for chapter in chapters}
    place: dict[str, tuple[int, int]] = {}
    shapes: list[str] = []
    y = 0
    for part in dict.fromkeys(chapter.part_title for chapter in chapters):
        y += 26
        shapes.append(f'<text class="affnb-map-part" x="{LEFT}" y="{y}">{html.escape(part)}</text>')
        y += 12
        members = [chapter for chapter in chapters if chapter.part_title == part]
        for index, chapter in enumerate(members):
            row, column = divmod(index, PER_ROW)
            place[chapter.name] = (LEFT + column * (BOX_W + GAP_X), y + row * (BOX_H + GAP_Y))
        y += ((len(members) - 1) // PER_ROW + 1) * (BOX_H + GAP_Y)
    edges = []
    for chapter in chapters:
        for earlier in chapter.metadata.get("builds_on", []):
            if earlier not in names:
                raise ValueError(f"{chapter.name} builds on {earlier}, which is not in the book")
            (x0, y0), (x1, y1) = place[earlier], place[chapter.name]
            if y0 == y1:  # neighbours in a row: from side to side
                direction = 1 if x1 > x0 else -1
                start = (x0 + (BOX_W if direction > 0 else 0), y0 + BOX_H / 2)
                end = (x1 + (0 if direction > 0 else BOX_W) - 7 * direction, y1 + BOX_H / 2)
                bend = 0 if abs(x1 - x0) == BOX_W + GAP_X else BOX_H
                middle = (start[0] + end[0]) / 2
                path = f"M{start[0]:g} {start[1]:g}Q{middle:g} {start[1] + bend:g} {end[0]:g} {end[1]:g}"
            else:
                down = 1 if y1 > y0 else -1
                start = (x0 + BOX_W / 2, y0 + (BOX_H if down > 0 else 0))
                end = (x1 + BOX_W / 2, y1 + (-7 if down > 0 else BOX_H + 7))
                reach = max(24, abs(end[1] - start[1]) / 2) * down
                path = (
                    f"M{start[0]:g} {start[1]:g}C{start[0]:g} {start[1] + reach:g} "
                    f"{end[0]:g} {end[1] - reach:g} {end[0]:g} {end[1]:g}"
                )
            edges.append(
                f'<path class="affnb-map-edge" d="{path}" marker-end="url(#affnb-arrow)"/>'
            )
    boxes = []
    for chapter in chapters:
        x, top = place[chapter.name]
        lines = _wrapped(chapter.title)
        first = top + BOX_H / 2 + 5 - 9 * (len(lines) - 1)
        texts = " ".join(  # a space, so that a title over two lines still reads as its words
            f'<text x="{x + BOX_W / 2:g}" y="{first + 18 * i:g}">{html.escape(line)}</text>'
            for i, line in enumerate(lines)
        )
        boxes.append(
            f'<a class="affnb-map-node" href="../{chapter.page}" '
            f'aria-label="{html.escape(chapter.title)}">'
            f'<rect x="{x}" y="{top}" width="{BOX_W}" height="{BOX_H}" rx="7"/>{texts}</a>'
        )
    widest = max((x for x, _ in place.values()), default=0) + BOX_W + LEFT
    width = max(widest, 320)
    return (
        f'<svg viewBox="0 0 {width} {y}" width="{width}" height="{y}" role="group" '
        'aria-label="Map of the chapters; the same as a list is below">'
        '<defs><marker id="affnb-arrow" viewBox="0 0 8 8" refX="1" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>'
        f"{''.join(shapes)}{''.join(edges)}{''.join(boxes)}</svg>"
    )


#: Where the opening of a part wants the list of its chapters.
CHAPTERS_HERE = "<!-- chapters -->"


def chapter_map(chapters: Sequence[Chapter]) -> str:
    """Write the page with the map, as MyST Markdown."""
    titles = {chapter.name: chapter.title for chapter in chapters}
    lines = [
        "# Map of the chapters",
        "",
        "An arrow leads from a chapter to one that builds on it. Parts follow each other from top to "
        "bottom, in reading order; within a part, read from left to right. A chapter that no arrow "
        "leads to asks for nothing but the [notation](notation.md).",
        "",
        _raw(
            '<div class="affnb-map affnb-scroll" tabindex="0" role="group" '
            f'aria-label="Map, scrolls sideways on small screens">{map_svg(chapters)}</div>'
        ),
        "## The same as a list",
        "",
    ]
    for part in dict.fromkeys(chapter.part_title for chapter in chapters):
        members = [chapter for chapter in chapters if chapter.part_title == part]
        lines += [f"**[{part}](/book/parts/{members[0].part}.md)**", ""]
        lines += [*chapter_list(members, titles), ""]
    return "\n".join(lines) + "\n"


def chapter_list(members: Sequence[Chapter], titles: Mapping[str, str]) -> list[str]:
    """Return an item of Markdown for each chapter: link, summary, minutes, what it builds on."""
    lines = []
    for chapter in members:
        line = f"- [](/chapters/{chapter.name}.ipynb)"
        if chapter.metadata.get("summary"):
            line += f": {chapter.metadata['summary']}"
        if chapter.metadata.get("minutes"):
            line += f" *{chapter.metadata['minutes']} minutes.*"
        earlier = chapter.metadata.get("builds_on", [])
        if earlier:
            links = ", ".join(f"[{titles[e]}](/chapters/{e}.ipynb)" for e in earlier)
            line += f" Builds on {links}."
        lines.append(line)
    return lines


def openings(folder: Path, chapters: Sequence[Chapter]) -> None:
    """Fill the list of chapters into the opening of each part, ``<part>.md`` in ``folder``.

    Raises
    ------
    ValueError
        An opening has no line ``<!-- chapters -->``.
    """
    titles = {chapter.name: chapter.title for chapter in chapters}
    for part in dict.fromkeys(chapter.part for chapter in chapters):
        page = folder / f"{part}.md"
        text = page.read_text()
        if CHAPTERS_HERE not in text:
            raise ValueError(f"{page}: expected a line '{CHAPTERS_HERE}', got none")
        members = [chapter for chapter in chapters if chapter.part == part]
        page.write_text(text.replace(CHAPTERS_HERE, "\n".join(chapter_list(members, titles))))


# --- the benchmarks --------------------------------------------------------------------------------


#: What the benchmarks call the literal form of an operation.
LITERAL = "literal equations"


def _seconds(value: float | None) -> str:
    if value is None:
        return "not measured"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def _bytes(value: float | None) -> str:
    if value is None:
        return "not measured"
    if not value:
        return "too little to measure"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def _shape(shape: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} = {v}" for k, v in shape.items())


def _ratio(theirs: float | None, ours: float | None) -> str:
    """Say in brackets how many times less than the literal form it is; nothing if one is not known."""
    if not theirs or not ours:
        return ""
    ratio = theirs / ours
    return f" ({ratio:.0f}×)" if ratio >= 10 else f" ({ratio:.2g}×)"


def _least(result: Mapping[str, Any], limits: Mapping[str, Any] | None) -> float | None:
    """Return the seconds that the device needs for what no implementation can do without."""
    work = result.get("work")
    if not work or not limits:
        return None
    flops = limits["matmul_flops_per_s"][work["dtype"]]
    return max(work["bytes"] / limits["copy_bytes_per_s"], work["flops"] / flops)


def _chart(results: Sequence[Mapping[str, Any]], limits: Mapping[str, Any] | None) -> str:
    """Draw time and memory of the implementations of one operation, a row for each size."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    from affnb.plotting import CYCLE, figure_html, style

    sizes = list(dict.fromkeys(_shape(r["shape"]) for r in results))
    names = list(dict.fromkeys(r["implementation"] for r in results))
    figures, texts = [], []
    quantities = [("seconds", "time, s"), ("peak_bytes", "memory, bytes")]
    for key, label in quantities:
        known = [r for r in results if r.get(key)]
        if not known:
            continue
        with style():
            figure = Figure(figsize=(5.2, 1.5 + 0.34 * len(sizes) + 0.22 * len(names)))
            axes = figure.add_subplot()
            for name, colour, marker in zip(names, cycle(CYCLE), cycle("osD^vP"), strict=False):
                own = [r for r in known if r["implementation"] == name]
                axes.plot(
                    [r[key] for r in own],
                    [sizes.index(_shape(r["shape"])) for r in own],
                    marker,
                    color=colour,
                    label=name,
                    markersize=7,
                )
            least = {_shape(r["shape"]): _least(r, limits) for r in results}
            marks = [(t, sizes.index(size)) for size, t in least.items() if t]
            if key == "seconds" and marks:
                axes.plot(
                    *zip(*marks, strict=True), "|", color=CYCLE[-1], ms=16, mew=2, label="limit"
                )
            axes.set(xscale="log", xlabel=label, ylim=(len(sizes) - 0.5, -0.5))
            axes.set_yticks(range(len(sizes)), sizes)
            axes.xaxis.set_major_locator(LogLocator(numticks=6))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(axis="x")
            figure.legend(loc="outside upper left", ncols=2, fontsize="small")
        figures.append(figure)
        texts.append(
            f"{label.split(',')[0].capitalize()} of each implementation, sizes from top to bottom; "
            "the table below has the numbers."
        )
    if not figures:
        return ""
    caption = "Further left is better; the axes are logarithmic."
    return figure_html(figures, alt=texts, caption=caption)


#: Where the page on speed wants the rooflines.
ROOFLINE_HERE = "<!-- roofline -->"


def roofline(folder: Path) -> str:
    """Draw the operations with matrix products under the roof of each device, as HTML.

    Of each implementation the largest size that it was measured at is drawn.
    """
    from matplotlib.figure import Figure

    from affnb.plotting import COLOURS, CYCLE, figure_html, style

    pictures = []
    for file in sorted(folder.glob("*.json")):
        data = json.loads(file.read_text())
        limits = data.get("limits")
        points = [r for r in data["results"] if (r.get("work") or {}).get("flops") and r["seconds"]]
        if not limits or not points:
            continue
        with style():
            figure = Figure(figsize=(6.4, 4.2))
            axes = figure.add_subplot()
            looks = product("os", CYCLE)  # a second shape when the colours are used up
            operations = dict.fromkeys(r["operation"] for r in points)
            drawn = []
            for operation, (shape, colour) in zip(operations, looks, strict=False):
                drawn.append(operation)
                largest = {r["implementation"]: r for r in points if r["operation"] == operation}
                for name, r in largest.items():
                    work, ours = r["work"], name == "affnb"
                    axes.plot(
                        work["flops"] / work["bytes"],
                        work["flops"] / r["seconds"],
                        shape if ours else {"o": "x", "s": "+"}[shape],
                        color=colour,
                        label=operation if ours else None,
                    )
            left, right = axes.get_xlim()
            copy, lines = limits["copy_bytes_per_s"], cycle(["-", "--"])
            for dtype, flops in limits["matmul_flops_per_s"].items():
                x = [min(left, flops / copy) / 4, flops / copy, max(right, flops / copy) * 4]
                y = [min(copy * v, flops) for v in x]
                axes.plot(x, y, next(lines), color=COLOURS["grey"], label=f"roof, {dtype}")
            axes.set(xscale="log", yscale="log", xlabel="flops a byte", ylabel="flops a second")
            axes.legend(fontsize="small")
            axes.grid()
        pictures.append(
            figure_html(
                figure,
                alt=f"Roofline of {data['device']}: flops a second over flops a byte, of "
                + ", ".join(drawn)
                + ".",
                caption=f"{html.escape(data['device'])}. Dots and squares are <code>affnb</code>, crosses the "
                "literal equations, plain PyTorch and the peers, each at the largest size it was "
                "measured at. Flops and bytes are those that the operation cannot do without.",
            )
        )
    return "\n".join(pictures)


def benchmarks(folder: Path) -> str:
    """Write the page of benchmarks from ``<device>.json`` files, as MyST Markdown.

    A file holds ``{"device", "versions", "commit", "limits", "results": [{"operation",
    "implementation", "shape", "pass", "seconds", "peak_bytes", "out_of_memory", "work"}]}``; a figure that is null
    was not measured, unless memory ran out. The implementation that `LITERAL` names is what the others are set against.
    """
    lines = [
        "# Benchmarks",
        "",
        "Time and peak memory of the package's operations and of their peers, measured side by side in "
        "one run by `make bench`, forward and backward together. The *literal equations* are the "
        "chapter's, written down as they stand; *compiled* is the form before it under `torch.compile`. "
        "In brackets: how many times less than the literal equations an implementation takes, where they "
        "were measured at that size; above 1× is better. Memory is what a call allocates beyond its "
        "input, at its peak.",
        "",
        "The *limit* is the least time that the device could take: each input read and each gradient "
        "written once, at the speed of a plain copy, and the products of matrices that the operation "
        "cannot do without, at the speed of a large product, whichever is longer. Both speeds were "
        "measured in the same run. Where no limit is given, something else bounds the operation, such "
        "as exponentials.",
        "",
    ]
    files = [(json.loads(f.read_text()), f) for f in sorted(folder.glob("*.json"))]
    cuda = [
        data
        for data, _ in files
        if any(w in data["device"].lower() for w in ("nvidia", "cuda", "gpu", "geforce", "tesla"))
    ]
    if not files:
        lines += ["No benchmark has been run yet; `make bench` runs them.", ""]
    if not cuda:
        lines += [
            ":::{admonition} Owed: figures from a GPU",
            "Nothing on this page was measured on a GPU, so it says nothing about the speed of the "
            "Triton kernels. `make bench` on a machine with a GPU adds a section here.",
            ":::",
            "",
        ]
    labelled: set[str] = set()
    for data, _ in files:
        versions = ", ".join(f"{k} {v}" for k, v in data.get("versions", {}).items())
        limits = data.get("limits")
        speeds = ""
        if limits:
            products = " and ".join(
                f"of {dtype} {flops / 1e9:.3g} Gflop/s"
                for dtype, flops in limits["matmul_flops_per_s"].items()
            )
            speeds = (
                f" A copy moves {limits['copy_bytes_per_s'] / 1e9:.3g} GB/s, a product of matrices "
                f"does {products}."
            )
        lines += [
            f"## {data['device']}",
            "",
            f"{versions}. Commit `{data.get('commit', 'unknown')}`.{speeds}",
            "",
        ]
        results = data["results"]
        for operation in dict.fromkeys(r["operation"] for r in results):
            of_operation = [r for r in results if r["operation"] == operation]
            literal = {
                (_shape(r["shape"]), r["pass"]): r
                for r in of_operation
                if r["implementation"] == LITERAL
            }
            if operation not in labelled:  # the package's reference links here
                lines.append(f"(bench-{operation})=")
                labelled.add(operation)
            lines += [f"### `{operation}`", "", _raw(_chart(of_operation, limits))]
            for kind in dict.fromkeys(r["pass"] for r in of_operation):
                rows = []
                for r in of_operation:
                    if r["pass"] != kind:
                        continue
                    own = literal.get((_shape(r["shape"]), kind))
                    time, memory = _seconds(r.get("seconds")), _bytes(r.get("peak_bytes"))
                    if r.get("out_of_memory"):
                        time = memory = "out of memory"
                    if own and own is not r:
                        time += _ratio(own.get("seconds"), r.get("seconds"))
                        memory += _ratio(own.get("peak_bytes"), r.get("peak_bytes"))
                    least = _least(r, limits)
                    share = f"{least / r['seconds']:.1%}" if least and r.get("seconds") else ""
                    size = f'<span class="affnb-nowrap">{html.escape(_shape(r["shape"]))}</span>'
                    rows.append([html.escape(r["implementation"]), size, time, share, memory])
                head = ["Implementation", "Size", "Time", "Of the limit", "Memory"]
                if not any(row[3] for row in rows):
                    head.pop(3)
                    rows = [row[:3] + row[4:] for row in rows]
                lines.append(_raw(_table(head, rows, html.escape(kind.replace("+", " and ")))))
    return "\n".join(lines) + "\n"


def write_pages(target: Path, root: Path = ROOT) -> list[Claim]:
    """Write the pages into the folder ``target``, complete the openings there, and return the claims.

    Raises
    ------
    LedgerError
        An earlier result no longer holds.
    """
    chapters = list_chapters(root)
    claims = all_claims(root)
    check_ledger(claims, read_ledger(root))
    target.mkdir(parents=True, exist_ok=True)
    (target / "scoreboard.md").write_text(scoreboard(claims, chapters))
    (target / "map.md").write_text(chapter_map(chapters))
    openings(target / "parts", chapters)
    results = root / "benchmarks" / "results"
    (target / "benchmarks.md").write_text(benchmarks(results))
    fast = target / "making_it_fast.md"
    drawn = roofline(results)
    drawn = (
        _raw(drawn) if drawn else "*Not measured yet: `make bench` measures what is drawn here.*"
    )
    fast.write_text(fast.read_text().replace(ROOFLINE_HERE, drawn))
    return claims


def main() -> int:
    """Check or rewrite the ledger."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update-ledger", action="store_true", help="rewrite book/scoreboard.json")
    arguments = parser.parse_args()
    claims = all_claims()
    if arguments.update_ledger:
        ledger = {claim.id: claim.verdict for claim in claims}
        (ROOT / LEDGER).write_text(json.dumps(ledger, indent=2) + "\n")
        print(f"{LEDGER}: {len(ledger)} claims")
        return 0
    try:
        check_ledger(claims, read_ledger())
    except LedgerError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(claims)} claims; every earlier proof and equality holds")
    return 0


if __name__ == "__main__":
    sys.exit(main())

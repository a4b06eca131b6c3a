"""Print the book: ``python -m builder.pdf`` makes one PDF of the built site.

Headless Chromium prints each page, in the order of the contents; pypdf joins what it printed, writes the
outline, and lets links between pages lead to places in the PDF.
"""

from __future__ import annotations

import html
import io
import mimetypes
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import yaml
from bs4 import BeautifulSoup
from pypdf import PdfReader, PdfWriter
from pypdf.generic import ArrayObject, NameObject, NullObject
from tqdm import tqdm

from .build import PDF_NAME, build, site_address
from .chapters import ROOT, ChapterError
from .pages import LedgerError

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Playwright, Route

PDF = ROOT / "_build" / PDF_NAME

#: What the site is called while it is printed. Nobody owns it, and nothing is asked of the network.
HOST = "http://book.invalid/"

#: The width of A4 between its margins, in CSS pixels: what a wide display must fit into.
WIDTH = 657

STYLE = """
@page { size: A4; margin: 18mm; @bottom-center { content: counter(page); font: 9pt sans-serif; } }
html { --pst-font-size-base: 13px; font-size: 13px; }
body { background: white; }
.bd-main .bd-content { margin: 0 !important; }
.bd-main .bd-content .bd-article { overflow: visible; }
.bd-main .bd-content .bd-article h1:first-of-type { display: block; }
.bd-article :is(p, li, dd, td) { line-height: 1.5; }
"""

#: Shrink what is wider than the paper, from the inside outwards. (All is measured before any is changed:
#: the other way round the browser would lay out the page anew for each.)
FIT = """() => {
    for (const selector of ["mjx-container[display=true], pre, .affnb-scroll", ".output, .affnb-card"]) {
        const wide = [...document.querySelectorAll(selector)]
            .map(e => [e, e.clientWidth / e.scrollWidth]).filter(([e, ratio]) => ratio < 0.998);
        for (const [e, ratio] of wide) e.style.zoom = 0.99 * ratio;
    }
}"""


def find_chromium() -> str | None:
    """Return the path of a Chromium, from CHROMIUM or the usual names; None when there is none."""
    wanted = os.environ.get("CHROMIUM")
    names = [wanted] if wanted else ["chromium", "chromium-browser", "google-chrome", "chrome"]
    return next((path for path in map(shutil.which, names) if path), None)


def launch(playwright: Playwright, chromium: str) -> Browser:
    """Start a headless Chromium that asks nothing of other hosts of its own accord."""
    return playwright.chromium.launch(
        executable_path=chromium,
        args=[
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            "--disable-quic",
        ],
    )


def contents(root: Path = ROOT) -> list[tuple[str, int]]:
    """List the pages in the order of ``_toc.yml``, each with its depth: 0, or 1 for a part's chapters."""
    toc = yaml.safe_load((root / "_toc.yml").read_text())
    pages = [(f"{toc['root']}.html", 0)]

    def add(entries: Sequence[Mapping[str, Any]], depth: int) -> None:
        for entry in entries:
            if "file" in entry:
                pages.append((f"{entry['file']}.html", depth))
            add(entry.get("sections", []), depth + 1)

    for part in toc["parts"]:
        add(part["chapters"], 0)
    return pages


def for_paper(text: str, name: str, site: str = "", before: int = 0) -> BeautifulSoup:
    """Return a page of the site without what has no place on paper.

    Only the article is left: folded code is left out, solutions are open, widgets are pictures.

    Parameters
    ----------
    text
        The page's HTML.
    name
        Its path in the site.
    site
        The address of the published site; empty where it is not known.
    before
        How many pages of paper come before.
    """
    soup = BeautifulSoup(text, "html.parser")
    article = soup.select_one("article")
    if article is None or soup.head is None or soup.body is None:
        raise ValueError(f"{name}: expected a page with an article, got none")
    for folded in article.select("details"):
        if folded.select_one(".cell_input, .highlight-ipython3") and not folded.find_parent(
            class_="solution"
        ):
            folded.decompose()
        else:
            folded["open"] = ""
    where = f'at <a href="{site}/{name}">{site}/{name}</a>' if site else "in the book's web version"
    for without in article.select("noscript"):
        picture = without.select_one(".affnb-still")
        if picture:
            note = BeautifulSoup(f'<p class="affnb-caption">Move it {where}.</p>', "html.parser")
            picture.select(".affnb-still-note")[0].replace_with(note)
            without.replace_with(picture)
        else:
            without.decompose()
    for element in article.select("script, .headerlink, .prev-next-area"):
        element.decompose()
    for element in soup.head.select("script, noscript, link:not([rel=stylesheet])"):
        if "mathjax" not in f"{element.get('src')} {element.string}".lower():
            element.decompose()
    # Chromium notes where an anchor is if a link on the same page leads there.
    anchors = "".join(
        f'<a href="#{html.escape(str(element["id"]))}"></a>'
        for element in article.select("[id]:not(svg *)")
    )
    shell = f"""<div hidden>{anchors}</div><main class="bd-main"><div class="bd-content">
        <div class="bd-article-container">{article}</div></div></main>"""
    soup.body.clear()
    soup.body.append(BeautifulSoup(shell, "html.parser"))
    style = f"<style>{STYLE} html {{ counter-reset: page {before}; }}</style>"
    soup.head.append(BeautifulSoup(style, "html.parser"))
    return soup


def titles(soup: BeautifulSoup) -> list[tuple[str, str]]:
    """List the anchor and the title of a page and of its sections."""
    found = []
    for section in soup.select("section[id]"):
        heading = section.find(["h1", "h2"], recursive=False)
        if heading:
            found.append((str(section["id"]), " ".join(heading.get_text().split())))
    return found


def join(printed: Sequence[tuple[str, int, list[tuple[str, str]], bytes]]) -> PdfWriter:
    """Join pages of the site that were printed; each comes with its path, its depth and its titles.

    Returns
    -------
    pypdf.PdfWriter
        One PDF with an outline, in which links between the pages are links within it.
    """
    writer = PdfWriter()
    starts: dict[str, int] = {}
    places: dict[str, tuple[Any, ...]] = {}
    parents: list[Any] = [None]
    for name, depth, headings, data in printed:
        starts[HOST + name] = start = len(writer.pages)
        reader = PdfReader(io.BytesIO(data))
        writer.append(reader, import_outline=False)
        for anchor, place in reader.named_destinations.items():
            number = reader.get_destination_page_number(place) or 0
            key = f"{HOST}{name}#{unquote(anchor.removeprefix('/'))}"
            places[key] = (start + number, place.left, place.top)
        del parents[depth + 1 :]
        for anchor, title in headings:
            page = places.get(f"{HOST}{name}#{anchor}", (start,))[0]
            item = writer.add_outline_item(title=title, page_number=page, parent=parents[-1])
            if len(parents) == depth + 1:  # the page's own title; what follows are its sections
                parents.append(item)
    for name, start in starts.items():
        places[name] = (start, NullObject(), NullObject())
    owners = sorted(starts, key=starts.__getitem__)
    for number, page in enumerate(writer.pages):
        own = [name for name in owners if starts[name] <= number][-1]
        for annotation in page.get("/Annots", []):
            entry = annotation.get_object()
            if "/Dest" in entry:
                address = f"{own}#{str(entry['/Dest']).removeprefix('/')}"
            else:
                address = str(entry.get("/A", {}).get("/URI", ""))
            address = unquote(address)
            target = places.get(address) or places.get(address.partition("#")[0])
            if target:
                where = writer.pages[target[0]].indirect_reference
                entry.pop("/A", None)
                entry[NameObject("/Dest")] = ArrayObject(
                    [where, NameObject("/XYZ"), target[1], target[2], NullObject()]
                )
            elif address.startswith(HOST):  # a page of the site that is not printed
                entry.pop("/A", None)
    return writer


def print_book(
    browser: Browser, folder: Path, out: Path, pages: Sequence[tuple[str, int]], site: str = ""
) -> None:
    """Print pages of the site in ``folder`` into one PDF; ``pages`` are as `contents` gives them."""
    text = ""

    def answer(route: Route) -> None:
        # The site's files without a server; the page that is being printed comes from `for_paper`.
        file = folder / unquote(urlsplit(route.request.url).path).lstrip("/")
        if not route.request.url.startswith(HOST) or not file.is_file():
            route.abort()
        elif file.suffix == ".html":
            route.fulfill(body=text, content_type="text/html; charset=utf-8")
        else:
            kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
            route.fulfill(body=file.read_bytes(), content_type=kind)

    page = browser.new_page(viewport={"width": WIDTH, "height": 1000}, color_scheme="light")
    page.route("**/*", answer)
    page.emulate_media(media="print")
    printed: list[tuple[str, int, list[tuple[str, str]], bytes]] = []
    before = 0
    for name, depth in tqdm(pages, unit="page", disable=None):
        soup = for_paper((folder / name).read_text(encoding="utf8"), name, site, before)
        text = str(soup)
        page.goto(HOST + name, wait_until="load", timeout=120_000)
        page.evaluate("window.MathJax?.startup?.promise")
        page.evaluate("document.fonts.ready.then(() => null)")
        page.evaluate(FIT)
        data = page.pdf(prefer_css_page_size=True, print_background=True)
        printed.append((name, depth, titles(soup), data))
        before += len(PdfReader(io.BytesIO(data)).pages)
    page.close()
    writer = join(printed)
    writer.add_metadata({"/Title": "The Affinity Notebook"})
    writer.page_mode = "/UseOutlines"
    out.parent.mkdir(parents=True, exist_ok=True)
    writer.write(out)


def main() -> int:
    """Build the site where it isn't up to date, print it, and say where the PDF is."""
    chromium = find_chromium()
    if chromium is None:
        print(
            "Printing needs Chromium or Chrome, on the path or named by the variable CHROMIUM; "
            "there is none.",
            file=sys.stderr,
        )
        return 1
    try:
        folder, site = build().parent, site_address()
    except (ChapterError, LedgerError, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    from playwright.sync_api import sync_playwright

    print("Printing the pages ...", flush=True)
    with sync_playwright() as playwright:
        browser = launch(playwright, chromium)
        print_book(browser, folder, PDF, contents(), site)
        browser.close()
    print(f"The PDF is at {PDF}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The built site in a real browser: what a reader meets on a laptop, on a phone, in the dark."""

import functools
import http.server
import os
import threading
import unicodedata
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlencode, urljoin

import pytest
import yaml
from builder import assets, build, chapters, pdf, reference
from pypdf import PdfReader

DESKTOP, PHONE = (1280, 900), (390, 844)
WAYS = {"desktop": (DESKTOP, "light"), "phone": (PHONE, "light"), "dark": (DESKTOP, "dark")}
LEVELS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]


def pages():
    """List the pages of the table of contents, and the search page."""
    toc = reference.contents(chapters.list_chapters())
    files = [toc["root"]]
    for part in toc["parts"]:
        files += chapters.toc_files(part["chapters"])
    return [f"{file}.html" for file in files] + ["search.html"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serve files without a line on the terminal for each."""

    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def site():
    """Build the site where it isn't up to date, serve it on this machine, and return its address."""
    index = build.build()
    handler = functools.partial(Quiet, directory=str(index.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    """Start a headless Chromium; skip when there is none, but fail where CI=true."""
    missing = []
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing.append("the Python package playwright")
    chromium = pdf.find_chromium()
    if chromium is None:
        missing.append("Chromium (on the path, or named by the variable CHROMIUM)")
    if missing:
        message = f"the browser tests need {' and '.join(missing)}"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        started = pdf.launch(playwright, chromium)
        yield started
        started.close()


class Visit:
    """An opened page, and what it asked for and complained about."""

    def __init__(self, page, host):
        self.page, self.host = page, host
        self.elsewhere, self.complaints = [], []

        def route(route):
            # Nothing may leave this machine, not even while a test fails.
            if route.request.url.startswith((host, "data:", "blob:")):
                route.continue_()
            else:
                self.elsewhere.append(route.request.url)
                route.abort()

        page.route("**/*", route)
        page.on(
            "console",
            lambda m: (
                self.complaints.append(f"{m.type}: {m.text} ({m.location.get('url', '')})")
                if m.type == "error"
                else None
            ),
        )
        page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))
        page.on(
            "response",
            lambda r: self.complaints.append(f"{r.status}: {r.url}") if r.status >= 400 else None,
        )

    def open(self, path):
        self.page.goto(f"{self.host}/{path}", wait_until="load")
        self.page.wait_for_load_state("networkidle")
        self.page.evaluate("window.MathJax?.startup?.promise")
        views = "script[type='application/vnd.jupyter.widget-view+json']"
        if self.page.locator(views).count():
            self.page.wait_for_function(
                f"document.querySelectorAll('.widget-subarea > *').length"
                f' >= document.querySelectorAll("{views}").length'
            )
        return self


@pytest.fixture
def visit(browser, site):
    """Return a function that opens a page of the site."""
    contexts = []

    def opener(path, size=DESKTOP, mode="light"):
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]},
            color_scheme=mode,
            reduced_motion="reduce",
            has_touch=size == PHONE,
        )
        contexts.append(context)
        # The reader's choice of light or dark, as the theme keeps it.
        context.add_init_script(
            f"localStorage.setItem('mode', '{mode}'); localStorage.setItem('theme', '{mode}');"
        )
        visited = Visit(context.new_page(), site).open(path)
        assert visited.page.evaluate("document.documentElement.dataset.theme") == mode
        return visited

    yield opener
    for context in contexts:
        context.close()


each_page = pytest.mark.parametrize("path", pages())
each_chapter = pytest.mark.parametrize("path", [c.page for c in chapters.list_chapters()])


def mathematics_not_rendered(page):
    """List the formulas that MathJax left alone or could not read."""
    return page.evaluate(
        r"""[...document.querySelectorAll("article .math, article p, article td, article th, figcaption")]
            .filter(e => e.checkVisibility())
            .filter(e => (e.matches(".math") && !e.querySelector("mjx-container"))
                         || e.querySelector("mjx-merror, [data-mjx-error]")
                         || /\\\(|\\\[|\$[^$]+\$/.test(e.innerText))
            .map(e => e.textContent.slice(0, 120))"""
    )


def pictures_without_alternative_text(page):
    """List the pictures that say nothing to somebody who can't see them."""
    return page.evaluate(
        """[...document.querySelectorAll("img, [role=img], figure svg, .cell_output svg")]
            .filter(e => !e.closest("[aria-hidden=true]") && !e.closest("mjx-container"))
            .filter(e => !(e.getAttribute("alt") ?? e.getAttribute("aria-label")
                           ?? e.querySelector(":scope > title")?.textContent ?? "").trim()
                         && !e.getAttribute("aria-labelledby"))
            .map(e => e.outerHTML.slice(0, 120))"""
    )


def beyond_the_right_edge(page):
    """List what makes the page scroll sideways."""
    return page.evaluate(
        """() => {
            const width = document.documentElement.clientWidth;
            if (document.documentElement.scrollWidth <= width) return [];
            const wide = [...document.querySelectorAll("body *")]
                .filter(e => e.getBoundingClientRect().right > width + 1)
                .slice(0, 5).map(e => e.outerHTML.slice(0, 120));
            return [`${document.documentElement.scrollWidth} px`, ...wide];
        }"""
    )


def headings_out_of_order(page):
    """List what is wrong with the outline: more or fewer titles than one, a level skipped."""
    levels = page.evaluate(
        """[...document.querySelectorAll("h1, h2, h3, h4, h5, h6")]
            .filter(e => e.checkVisibility()).map(e => +e.tagName[1])"""
    )
    skips = [f"h{a} then h{b}" for a, b in pairwise(levels) if b > a + 1]
    return skips + ([] if levels[:1] == [1] and levels.count(1) == 1 else [f"levels {levels}"])


def barriers(page):
    """List what axe-core finds against level A and AA."""
    page.add_script_tag(path=assets.assets() / "tests" / "axe.min.js")
    found = page.evaluate(
        "levels => axe.run(document, {runOnly: {type: 'tag', values: levels}})", LEVELS
    )
    return [
        f"{violation['id']}: {node['target']} {node['html'][:160]} {node['failureSummary']}"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]


def dead_links(page, host):
    """List the links to places in this site that aren't there, anchors included."""
    links = page.evaluate(
        "[...document.querySelectorAll('a[href]')].map(e => e.href.baseVal ?? e.href)"
    )
    root = build.ROOT / "_build" / "html"
    dead = []
    for link in sorted({unquote(urljoin(page.url, link)) for link in links}):
        if not link.startswith(f"{host}/"):
            continue
        address, _, anchor = link.removeprefix(f"{host}/").partition("#")
        file = root / address.split("?")[0]
        if not file.is_file() or (
            anchor and f'id="{anchor}"' not in file.read_text(encoding="utf8")
        ):
            dead.append(link)
    return dead


@each_page
@pytest.mark.parametrize("way", WAYS)
def test_page(visit, path, way):
    """Every page, in each way of reading it: nothing is amiss that a browser can tell."""
    size, mode = WAYS[way]
    visited = visit(path, size, mode)
    page = visited.page
    # Scroll through, so that whatever loads late does.
    page.keyboard.press("End")
    page.wait_for_load_state("networkidle")
    amiss = {
        "asked of other hosts": visited.elsewhere,
        "errors logged": visited.complaints,
        "mathematics": mathematics_not_rendered(page),
        "pictures without text": pictures_without_alternative_text(page),
        "headings": headings_out_of_order(page),
        "dead links": dead_links(page, visited.host) if way == "desktop" else [],
        "accessibility": barriers(page),
        "sideways": beyond_the_right_edge(page),
    }
    if way == "phone":
        page.set_viewport_size({"width": 320, "height": 640})
        amiss["sideways at 320 px"] = beyond_the_right_edge(page)
    assert {what: found for what, found in amiss.items() if found} == {}


def test_the_first_page_is_reached(visit):
    page = visit("book/preface.html").page
    page.goto(page.url.replace("book/preface.html", "index.html"))
    page.wait_for_url("**/book/preface.html")


@each_chapter
def test_every_slider_changes_its_picture(visit, path):
    page = visit(path).page
    explorers = page.locator(".affnb-explore")
    assert explorers.count() >= 1, "a chapter has a widget"
    for i in range(explorers.count()):
        explorer = explorers.nth(i)
        # Of the sliders, the pictures and the caption, the pictures: the only box that is not a column.
        frames = explorer.locator(":scope > .widget-box:not(.widget-vbox)")
        handles = explorer.get_by_role("slider")
        assert handles.count() >= 1
        for j in range(handles.count()):
            handle = handles.nth(j)
            handle.scroll_into_view_if_needed()
            handle.focus()
            # From the end of the scale nothing lies further right, so begin at its start.
            page.keyboard.press("Home")
            page.wait_for_timeout(150)
            says = handle.get_attribute("aria-valuetext")
            before = frames.screenshot()
            page.keyboard.press("ArrowRight")
            page.wait_for_timeout(150)
            after = frames.screenshot()
            assert before != after, f"slider {j + 1} of widget {i + 1} moves nothing"
            assert handle.get_attribute("aria-label"), "a slider says what it is"
            assert handle.get_attribute("aria-valuetext") not in (None, "", says)


@each_chapter
def test_sliders_can_be_moved_by_touch(visit, path):
    page = visit(path, PHONE).page
    track = page.locator(".affnb-explore .noUi-target").first
    track.scroll_into_view_if_needed()
    handle = page.locator(".affnb-explore").first.get_by_role("slider").first
    before = handle.get_attribute("aria-valuetext")
    box = track.bounding_box()
    assert box["width"] >= 150, "there is room to move"
    target = 0.98 if float(handle.get_attribute("aria-valuenow")) == 0 else 0.02
    page.touchscreen.tap(box["x"] + target * box["width"], box["y"] + box["height"] / 2)
    page.wait_for_timeout(400)
    assert handle.get_attribute("aria-valuetext") != before


def found_by(page, host, query):
    """Search the site, and list the pages that are found."""
    page.goto(f"{host}/search.html?{urlencode({'q': query})}")
    page.wait_for_function(
        "/found|did not match/.test(document.querySelector('#search-results').innerText)"
    )
    links = page.locator("#search-results li a").evaluate_all("all => all.map(e => e.pathname)")
    return {link.lstrip("/") for link in links}


@pytest.mark.parametrize("chapter", chapters.list_chapters(), ids=lambda c: c.name)
def test_a_search_finds_the_chapter(visit, chapter):
    """By its title, by the paper's, by what the method is also called, by its operations."""
    visited = visit("search.html")
    queries = [chapter.title, reference.paper_title(chapter), *chapter.metadata.get("names", [])]
    queries += [operation.name for operation in reference.operations_of(chapter)[:2]]
    for query in filter(None, queries):
        assert chapter.page in found_by(visited.page, visited.host, query), query


@each_chapter
def test_the_head_says_what_a_chapter_is_about(visit, path):
    chapter = next(c for c in chapters.list_chapters() if c.page == path)
    page = visit(path).page
    said = page.locator("meta[name=description]").evaluate_all("all => all.map(e => e.content)")
    assert said == [chapter.metadata["summary"]]


@pytest.mark.parametrize("query", ["tau", "τ"])
def test_a_search_finds_a_symbol(visit, query):
    visited = visit("search.html")
    found = found_by(visited.page, visited.host, query)
    assert "book/notation.html" in found
    assert "chapters/metric/smooth_ap.html" in found


def test_links_show_what_they_lead_to(visit):
    """Beside the link, for whoever rests on it or reaches it by keyboard; until Escape."""
    visited = visit("chapters/affinity/dilated_affinity.html")
    page = visited.page
    page.evaluate("document.fonts.ready.then(() => null)")
    shown = page.locator(".affnb-preview")
    for link, expected in [
        ("[href^='#']", "Proposition"),
        ("[href*='bibliography.html#']", "Improving semantic segmentation via dilated affinity"),
        ("[href='affinity_mass.html']", "Target affinity mass"),
        ("[href='affinity_mass.html#prop-laplacian']", "signed graph Laplacian"),
        ("[href*='package/affinity.html#']", "AffinityHead"),
    ]:
        page.locator(f"article a.reference.internal{link}").first.focus()
        shown.wait_for()
        assert expected in shown.inner_text()
        assert shown.locator("mjx-container").count() >= shown.locator(".math").count()
        assert barriers(page) == []
        page.keyboard.press("Escape")
        shown.wait_for(state="detached")
    page.locator("article a.reference.internal").first.hover()
    shown.wait_for()
    assert not visited.elsewhere
    assert not visited.complaints


def test_the_text_does_not_wait_for_scripts(browser, site):
    """It is painted while MathJax and the widgets' runtime are still on their way."""
    page = browser.new_page()
    held = []
    page.route("**/vendor/**", lambda route: held.append(route))
    page.goto(f"{site}/{chapters.list_chapters()[0].page}", wait_until="commit")
    page.wait_for_function(
        "performance.getEntriesByName('first-contentful-paint').length", timeout=10_000
    )
    assert page.locator("h1").is_visible()
    assert page.locator("h2").count() >= 10, "all of the text is there"
    assert len(held) >= 4
    page.close()


@each_chapter
def test_a_chapter_weighs_little(site, path):
    """A page with all that it loads is at most 3 MB as a server sends it (compressed)."""
    import gzip

    root = build.ROOT / "_build" / "html"
    html = (root / path).read_bytes()
    vendor = root / "_static" / "vendor"
    loaded = [
        html,
        (vendor / "mathjax" / "tex-mml-chtml.js").read_bytes(),
        (vendor / "embed-amd.js").read_bytes(),
        (vendor / "require.js").read_bytes(),
        (vendor / "popper.min.js").read_bytes(),
        (vendor / "tippy-bundle.umd.min.js").read_bytes(),
    ]
    # The theme's own scripts, styles and fonts come to about 0.5 MB.
    assert sum(len(gzip.compress(part)) for part in loaded) < 2_500_000


@each_chapter
def test_the_download_is_the_source(site, path):
    """What a reader downloads has no outputs, and a set-up cell that finds the package."""
    import nbformat

    file = build.ROOT / "_build" / "html" / "_sources" / Path(path).with_suffix(".ipynb")
    notebook = nbformat.read(file, as_version=4)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in code)
    setup = [cell for cell in code if "setup" in cell["metadata"].get("tags", [])]
    assert len(setup) == 1
    assert "REPOSITORY = " in setup[0]["source"]


@each_chapter
def test_a_chapter_can_be_launched_and_edited(visit, path):
    page = visit(path).page
    url, branch = build.address(yaml.safe_load((build.ROOT / "_config.yml").read_text()))
    colab = page.locator(".dropdown-launch-buttons a").first.get_attribute("href")
    edit = page.locator("a.btn-source-edit-button").first.get_attribute("href")
    source = path.replace(".html", ".ipynb")
    if url.startswith("https://github.com/"):
        name = url.removeprefix("https://github.com/")
        assert colab == f"https://colab.research.google.com/github/{name}/blob/{branch}/{source}"
        assert edit == f"{url}/edit/{branch}/{source}"
    elif build.is_neutral(url):
        assert colab.endswith("book/running.html#colab")
        assert edit.endswith("book/running.html#repository")


# --- without JavaScript, and on paper ----------------------------------------------------------------


@pytest.fixture
def plain_page(browser):
    """Return a page of a browser whose JavaScript is off."""
    context = browser.new_context(java_script_enabled=False)
    yield context.new_page()
    context.close()


@each_chapter
def test_a_chapter_reads_without_javascript(plain_page, site, path):
    page = plain_page
    page.goto(f"{site}/{path}")
    article = page.locator("article")
    text = article.inner_text()
    formulas = article.locator(".math")
    assert formulas.count() > 10
    assert article.locator("math").count() >= formulas.count()
    assert formulas.locator("math").first.bounding_box()["height"] > 5
    assert article.locator("merror").count() == 0
    assert article.locator(".affnb-tex").first.is_hidden()
    assert "\\(" not in text
    assert "\\[" not in text
    assert article.locator("[type*=widget-view]").count() == article.locator(".affnb-still").count()
    still = article.locator(".affnb-still").first
    assert still.is_visible()
    assert "The sliders need JavaScript" in still.inner_text()
    assert article.locator("summary").first.is_visible()
    # Solutions, which a script folds, are open.
    assert article.locator(".solution p").last.is_visible()


def test_the_pdf_has_an_outline_and_links_and_no_buttons(browser, site, tmp_path):
    chapter = chapters.list_chapters()[0]
    opening = f"book/parts/{chapter.part}.html"
    out = tmp_path / "book.pdf"
    wanted = [page for page in pdf.contents() if page[0] in (opening, chapter.page)]
    pdf.print_book(browser, build.ROOT / "_build" / "html", out, wanted, "https://book.invalid/b")
    reader = PdfReader(out)
    part, (title, sections, *_) = reader.outline[0], reader.outline[1][-2:]
    assert part.title.endswith(chapter.part_title)
    assert title.title.endswith(chapter.title)
    assert "Exercises" in [section.title for section in sections]
    start = reader.get_destination_page_number(title)
    text = [unicodedata.normalize("NFKC", page.extract_text()) for page in reader.pages]
    assert [t.split()[0] for t in text] == [str(n + 1) for n in range(len(text))], "page numbers"
    assert chapter.title in text[start]
    book = "\n".join(text)
    assert f"Move it at https://book.invalid/b/{chapter.page}" in " ".join(book.split())
    assert "Solution to" in book
    assert "Show code cell source" not in book
    assert "REPOSITORY" not in book, "the set-up cell"
    assert "\\(" not in book
    # The opening's link to the chapter leads to its page.
    links = [a.get_object() for page in reader.pages[:start] for a in page.get("/Annots", [])]
    first = reader.pages[start].indirect_reference
    assert first in [link["/Dest"][0] for link in links if "/Dest" in link]
    addresses = [str(link.get("/A", {}).get("/URI", "")) for link in links]
    assert not [address for address in addresses if address.startswith(pdf.HOST)]

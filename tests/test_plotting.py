"""Figures become accessible, self-contained SVG that follows the page's colour."""

import io
import re
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from affnb import plotting

SVG = "{http://www.w3.org/2000/svg}"
HREF = "{http://www.w3.org/1999/xlink}href"
DARK = "#14181e"  # the site's dark background


@pytest.fixture(autouse=True)
def _book_style():
    with plotting.style():
        yield
    plt.close("all")


def curve():
    figure, axes = plt.subplots()
    axes.plot([0, 1, 2], [0.123456, 1.5, -0.7], marker="o", label=r"$\omega_{mn}$")
    axes.set_xlabel(r"mass logit $s$ (1)")
    axes.set_ylabel("loss (1)")
    axes.legend()
    axes.grid()
    return figure


def busy():
    figure, axes = plt.subplots(1, 2)
    axes[0].imshow(np.eye(8), cmap=plotting.heat())
    axes[0].set_title(r"$\tilde{W}$")
    axes[1].bar([1, 2], [3, 4], hatch="/")
    axes[1].boxplot([[1, 2, 3, 9]])
    axes[1].fill_between([1, 2], [1, 2], alpha=0.3)
    axes[1].errorbar([1, 2], [3, 4], yerr=[0.1, 0.2])
    axes[1].text(1, 1, "text", bbox={})
    return figure


FIGURES = {"curve": curve, "busy": busy}


def identifiers(svg):
    return [e.get("id") for e in ET.fromstring(svg).iter() if e.get("id")]


def references(svg):
    pointed = re.findall(r"url\(#([^)]+)\)", svg)
    return pointed + [
        e.get(HREF)[1:] for e in ET.fromstring(svg).iter() if (e.get(HREF) or "").startswith("#")
    ]


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_svg_is_accessible_and_scales(draw):
    alt = 'Loss < 1 & "mass" > 0, it\'s fine'
    svg = plotting.figure_svg(draw(), alt=alt)
    root = ET.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    assert root.get("aria-label") == alt
    assert root.get("width") is None
    assert root.get("height") is None
    assert root.get("viewBox")
    assert "max-width:" in root.get("style")
    assert svg.startswith("<svg")


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_ink_follows_the_page(draw):
    svg = plotting.figure_svg(draw(), alt="A figure")
    assert "currentColor" in svg
    colours = {c.lower() for c in re.findall(r"(?:fill|stroke): (#[0-9a-fA-F]+)", svg)}
    assert colours  # the lines have the palette's
    assert colours <= {c.lower() for c in plotting.COLOURS.values()}
    assert plotting._INK not in svg
    # Matplotlib leaves out a black fill, so text without a fill would stay black on a dark page.
    groups = [g for g in ET.fromstring(svg).iter(f"{SVG}g") if "-text_" in (g.get("id") or "")]
    assert len(groups) > 5
    for group in groups:
        assert any("fill: currentColor" in (e.get("style") or "") for e in group.iter())


def test_grid_is_drawn_in_the_pages_ink_or_grey():
    svg = plotting.figure_svg(curve(), alt="A curve")
    assert "stroke: #808080" in svg


def test_style_sheet_does_not_leak_into_the_page():
    svg = plotting.figure_svg(curve(), alt="A curve")
    assert "<style" not in svg
    assert "stroke-linejoin: round" in ET.fromstring(svg).get("style")


def test_nothing_is_fetched_from_elsewhere():
    svg = plotting.figure_svg(busy(), alt="A figure")
    namespaces = {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}
    assert set(re.findall(r"https?://[^\"\s]+", svg)) <= namespaces


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_identifiers_of_two_figures_differ_and_references_hold(draw):
    first = plotting.figure_svg(draw(), alt="One")
    second = plotting.figure_svg(draw(), alt="Two")
    for svg in (first, second):
        assert len(identifiers(svg)) == len(set(identifiers(svg))) > 5
        assert references(svg)
        assert set(references(svg)) <= set(identifiers(svg))
    assert not set(identifiers(first)) & set(identifiers(second))


def test_a_figure_drawn_twice_is_the_same_to_the_byte():
    assert plotting.figure_svg(busy(), alt="A") == plotting.figure_svg(busy(), alt="A")


def test_the_figure_is_closed():
    figure = curve()
    assert plt.fignum_exists(figure.number)
    plotting.figure_svg(figure, alt="A curve")
    assert not plt.fignum_exists(figure.number)


@pytest.mark.parametrize("alt", ["", "  \n"])
def test_alternative_text_is_required(alt):
    with pytest.raises(ValueError, match=r"^alt: expected a description"):
        plotting.figure_svg(curve(), alt=alt)


def test_images_are_embedded_as_they_are_and_stay_crisp():
    figure, axes = plt.subplots()
    axes.imshow(np.random.default_rng(0).random((6, 9)), cmap=plotting.heat())
    svg = plotting.figure_svg(figure, alt="A matrix")
    [image] = ET.fromstring(svg).iter(f"{SVG}image")
    assert (image.get("width"), image.get("height")) == ("9", "6")
    assert "image-rendering:pixelated" in image.get("style")
    assert image.get(HREF).startswith("data:image/png;base64,")
    assert len(svg) < 20_000


def numbers(text):
    return np.array([float(v) for v in re.findall(r"-?\d+\.?\d*(?:[eE][-+]?\d+)?", text)])


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_compaction_keeps_the_geometry(draw):
    buffer = io.StringIO()
    draw().savefig(buffer, format="svg", metadata={"Date": None})
    original = ET.fromstring(buffer.getvalue())
    compact_text = plotting._compact(buffer.getvalue())
    compact = ET.fromstring(compact_text)
    assert len(compact_text) < len(buffer.getvalue())
    compared = 0
    for tag, keys in (("path", ["d"]), ("use", ["x", "y", HREF]), ("image", ["x", "y", HREF])):
        before, after = list(original.iter(SVG + tag)), list(compact.iter(SVG + tag))
        assert len(before) == len(after)
        for old, new in zip(before, after, strict=True):
            assert old.attrib.keys() == new.attrib.keys()
            for key in set(old.attrib) & set(keys):
                if key == HREF:
                    assert old.get(key).split() == new.get(key).split()
                    continue
                a, b = numbers(old.get(key)), numbers(new.get(key))
                assert re.findall("[A-Za-z]", old.get(key)) == re.findall("[A-Za-z]", new.get(key))
                np.testing.assert_allclose(b, a, atol=0.0051, rtol=0)
                compared += len(a)
    assert compared > 100


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        ("12.3456", 12.35),
        ("-0.00049", 0.0),
        ("1.00051e5", 100051.0),
        ("2.5e-07", 0.0),
        ("-3.123456E+2", -312.35),
        ("7", 7.0),
        ("10.000", 10.0),
    ],
)
def test_compaction_of_numbers(number, expected):
    svg = plotting._compact(f'<?xml?>\n<svg><path d="M {number} 5 L 100 0.25"/></svg>')
    got = numbers(svg.split('d="')[1].split('"')[0])
    assert got.tolist() == [expected, 5.0, 100.0, 0.25]


def luminance(colour):
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("background", ["#ffffff", DARK])
@pytest.mark.parametrize("name", plotting.COLOURS)
def test_palette_is_legible_in_both_modes(name, background):
    pair = sorted((luminance(plotting.COLOURS[name]), luminance(background)))
    assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 3.0


def test_contrast_formula_on_known_values():
    assert luminance("#ffffff") == pytest.approx(1.0)
    assert luminance("#000000") == 0.0
    assert luminance("#777777") == pytest.approx(0.1845, abs=1e-3)


def test_lines_take_the_palettes_colours_in_order():
    _, axes = plt.subplots()
    drawn = [axes.plot([0, 1])[0].get_color() for _ in plotting.CYCLE]
    assert tuple(drawn) == plotting.CYCLE == tuple(plotting.COLOURS.values())


def test_heat_goes_from_transparent_to_the_colour():
    from matplotlib.colors import to_rgba

    for name, colour in plotting.COLOURS.items():
        scale = plotting.heat(name)
        assert scale(0.0)[3] == 0.0
        assert scale(1.0) == pytest.approx(to_rgba(colour))
        assert scale(0.5)[3] == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match=r"^colour: expected one of blue.*got 'red'"):
        plotting.heat("red")


def test_style_leaves_the_readers_own_settings():
    with plt.rc_context({"font.size": 3.0, "text.color": "red"}):
        with plotting.style():
            assert plt.rcParams["text.color"] != "red"
        assert plt.rcParams["text.color"] == "red"
        assert plt.rcParams["font.size"] == 3.0
        plotting.use_style()
        assert plt.rcParams["font.size"] == 11.0


def test_show_displays_figure_and_caption(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda b, raw: shown.append((b, raw)))
    plotting.show(curve(), alt="A curve", caption="See <em>this</em>.")
    plotting.show(curve(), alt="Another")
    [(bundle, raw), (bare, _)] = shown
    assert raw is True
    assert bundle["text/plain"] == "A curve"
    page = bundle["text/html"]
    assert page.startswith('<figure class="affnb-figure"><svg')
    assert re.search(r"</svg>\s*<figcaption>See <em>this</em>\.</figcaption></figure>$", page)
    assert "figcaption" not in bare["text/html"]


def test_several_figures_stand_side_by_side_each_with_its_own_text():
    with plotting.style():
        two = [plt.subplots()[0] for _ in range(2)]
        html = plotting.figure_html(two, alt=["the first", "the second"], caption="Both.")
    assert html.count("<svg") == html.count("</svg>") == 2
    assert html.index('aria-label="the first"') < html.index('aria-label="the second"')
    assert html.count("<figcaption>") == 1


def test_several_figures_need_a_text_each():
    figures = [plt.subplots()[0] for _ in range(2)]
    with pytest.raises(ValueError, match=r"alt: expected 2 texts, one a figure, got 1"):
        plotting.figure_html(figures, alt="one for both")

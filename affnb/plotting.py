"""Figures that are legible in light and dark pages, for every chapter in the same style.

Matplotlib draws them; `show` puts them into the page as inline SVG whose text and axes take the colour
of the surrounding text (CSS ``currentColor``), so one figure serves both colour modes, on the site and
in a notebook. Every figure has alternative text, and may have a caption.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "CYCLE",
    "figure_html",
    "figure_svg",
    "heat",
    "show",
    "side_by_side",
    "style",
    "use_style",
]

#: One colour-blind-safe palette (after Okabe and Ito). Each has a contrast of at least 3 to 1 on white and
#: on the site's dark background, so lines and markers need no second set for dark mode.
COLOURS: dict[str, str] = {
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "green": "#00936B",
    "purple": "#B86A98",
    "ochre": "#A67B00",
    "grey": "#808080",
}
#: The order in which lines of one plot take the palette's colours.
CYCLE: tuple[str, ...] = tuple(COLOURS.values())

# Matplotlib needs a concrete colour for text; this one, used nowhere else, becomes currentColor.
_INK = "#010203"

_STYLE: dict[str, Any] = {
    "figure.figsize": (6.4, 3.6),
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlesize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": "#80808055",
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "font.size": 11.0,
    "svg.fonttype": "path",
    "svg.hashsalt": "affnb",
    "figure.constrained_layout.use": True,
    "image.interpolation": "none",  # embeds the pixels as they are; the browser keeps them crisp
    "patch.edgecolor": _INK,
    "hatch.color": _INK,
    "boxplot.boxprops.color": _INK,
    "boxplot.whiskerprops.color": _INK,
    "boxplot.capprops.color": _INK,
    "boxplot.flierprops.color": _INK,
    "boxplot.flierprops.markeredgecolor": _INK,
}


def _rc() -> Any:  # matplotlib types its keys as one literal each
    from cycler import cycler

    return {**_STYLE, "axes.prop_cycle": cycler(color=list(CYCLE))}


def use_style() -> None:
    """Make the book's style matplotlib's default for this session (each chapter's set-up calls it)."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(_rc())


@contextmanager
def style() -> Iterator[None]:
    """Draw with the book's style inside a ``with`` block, and leave the reader's own untouched."""
    import matplotlib.pyplot as plt

    with plt.rc_context(_rc()):
        yield


def heat(colour: str = "blue") -> Colormap:
    """Return a colour map from transparent (0) to one colour of the palette (1).

    Transparent at 0 lets the page show through, so a matrix reads the same in light and dark mode.

    Parameters
    ----------
    colour
        A key of `COLOURS`.

    Raises
    ------
    ValueError
        The name is not in the palette.
    """
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    if colour not in COLOURS:
        raise ValueError(f"colour: expected one of {', '.join(COLOURS)}, got {colour!r}")
    rgb = to_rgb(COLOURS[colour])
    return LinearSegmentedColormap.from_list(f"affnb-{colour}", [(*rgb, 0.0), (*rgb, 1.0)])


_LONG_NUMBER = re.compile(r"-?\d+\.(?:\d{3,}(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)")
# Matplotlib's only style sheet; inline SVG would apply it to the whole page, so it moves to the root.
_GLOBAL_STYLE = re.compile(r"<defs>\s*<style[^>]*>\*\{([^}]*)\}</style>\s*</defs>")


def _compact(svg: str) -> str:
    """Drop what a browser does not need: the prologue, the metadata, digits beyond 1/100 point."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)

    def rounded(match: re.Match[str]) -> str:
        return f"{float(match.group()):.2f}".rstrip("0").rstrip(".")

    def path(match: re.Match[str]) -> str:
        return match.group(1) + re.sub(_LONG_NUMBER, rounded, match.group(2)) + '"'

    svg = re.sub(r"(\sd=\")([^\"]*)\"", path, svg)
    svg = re.sub(r"(\s(?:x|y)=\")([^\"]*)\"", path, svg)
    return re.sub(r"\s*\n\s*", " ", svg)


def figure_svg(figure: Figure, *, alt: str) -> str:
    """Return a matplotlib figure as one self-contained ``<svg>`` element, and close the figure.

    Parameters
    ----------
    figure
        What was drawn, with the book's style in force (`use_style` or `style`).
    alt
        Alternative text: what a reader who cannot see the figure must know. Not empty.

    Returns
    -------
    str
        SVG with ``role="img"`` and ``aria-label``; text and axes in ``currentColor``; identifiers
        made unique by a hash of the content, so that figures on one page do not share clip paths.

    Raises
    ------
    ValueError
        ``alt`` is empty.
    """
    import matplotlib.pyplot as plt

    if not alt.strip():
        raise ValueError("alt: expected a description of the figure, got an empty text")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = _compact(buffer.getvalue()).replace(_INK, "currentColor")
    unique = "f" + hashlib.sha1((svg + alt).encode()).hexdigest()[:8]
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{unique}-\1"', svg)
    svg = re.sub(r'(xlink:href=")#', rf"\1#{unique}-", svg)
    svg = svg.replace("url(#", f"url(#{unique}-")
    scoped = _GLOBAL_STYLE.search(svg)
    assert scoped is not None  # matplotlib always writes both
    svg = svg.replace(scoped.group(), "", 1)
    size = re.search(r'width="([\d.]+)pt" height="[\d.]+pt"', svg)
    assert size is not None
    width = round(float(size.group(1)) * 4 / 3)  # points to CSS pixels
    attributes = (
        f'role="img" aria-label="{html.escape(alt, quote=True)}" '
        f'style="width:100%;max-width:{width}px;height:auto;{scoped.group(1)}"'
    )
    return svg.replace(size.group(), attributes, 1)


def side_by_side(parts: Sequence[str]) -> str:
    """Lay out pieces of HTML beside each other where there is room, else one below the other.

    Two figures laid out in this way stay legible on a phone; two panels of one figure do not.
    """
    if len(parts) == 1:
        return parts[0]
    items = "".join(f'<div style="flex:1 1 17rem;min-width:0">{part}</div>' for part in parts)
    return (
        '<div style="display:flex;flex-wrap:wrap;gap:1rem;align-items:center;'
        f'justify-content:center">{items}</div>'
    )


def figure_html(
    figures: Figure | Sequence[Figure], *, alt: str | Sequence[str], caption: str | None = None
) -> str:
    """Return the HTML ``<figure>`` that `show` displays; the same arguments."""
    many = figures if isinstance(figures, Sequence) else [figures]
    texts = [alt] if isinstance(alt, str) else list(alt)
    if len(texts) != len(many):
        raise ValueError(f"alt: expected {len(many)} texts, one a figure, got {len(texts)}")
    pictures = [figure_svg(f, alt=text) for f, text in zip(many, texts, strict=True)]
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="affnb-figure">{side_by_side(pictures)}{below}</figure>'


def show(
    figures: Figure | Sequence[Figure], *, alt: str | Sequence[str], caption: str | None = None
) -> None:
    """Display figures in the notebook and on the page, with alternative text and a caption.

    Parameters
    ----------
    figures
        A matplotlib figure, or several to be shown side by side (on a narrow page one below the
        other). They are closed afterwards.
    alt
        Alternative text, as in `figure_svg`; a list of them for several figures.
    caption
        What to see, in one or two sentences (plain text or simple HTML).

    Raises
    ------
    ValueError
        An alternative text is empty, or there is not one for each figure.
    """
    from IPython.display import display

    bundle = {
        "text/html": figure_html(figures, alt=alt, caption=caption),
        "text/plain": alt if isinstance(alt, str) else " ".join(alt),
    }
    display(bundle, raw=True)

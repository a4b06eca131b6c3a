"""Pages for readers without JavaScript: formulas as MathML, widgets as the picture they begin with.

Both are put into ``<noscript>`` elements beside what scripts work on, so that nothing changes for other
readers. The print of the book (`builder.pdf`) takes the widgets' pictures from there.
"""

from __future__ import annotations

import html
import json
import re
import subprocess
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup, Tag

from .assets import assets, node_command

STATE = "script[type='application/vnd.jupyter.widget-state+json']"
VIEW = "script[type='application/vnd.jupyter.widget-view+json']"

#: The classes in which MathJax looks for formulas, as ``mathjax3_config`` of ``_config.yml`` says, and
#: the widgets' (see affnb.js).
WITH_FORMULAS = {
    "math",
    "affnb-card",
    "affnb-caption",
    "affnb-figure",
    "affnb-table",
    "affnb-still",
}
_NO_TEXT = ["script", "style", "code", "pre", "svg"]

_FORMULA = re.compile(r"\\\[(.+?)\\\]|\$\$(.+?)\$\$|\\\((.+?)\\\)|\$(.+?)\$", re.DOTALL)

#: Without scripts: what works by them only is not shown, and the menus at the top open by themselves.
NO_SCRIPT_STYLE = """
.affnb-tex, .sidebar-toggle, .btn-fullscreen-button { display: none !important; }
.dropdown:is(:hover, :focus-within) > .dropdown-menu { display: block; right: 0; }
"""


def _letters(match: re.Match[str]) -> str:
    """Write letters of another alphabet (bold, script, ...) as the characters that Unicode has for them.

    MathML Core, which browsers read, no longer knows the attribute that asks for them.
    """
    style, text = match[1].upper().replace("BOLD-", "BOLD "), html.unescape(match[2])
    result = ""
    for letter in text:
        name = re.sub("LATIN |GREEK |LETTER ", "", unicodedata.name(letter, ""))
        for full in (f"MATHEMATICAL {style} {name}", f"{style} {name}"):
            try:
                letter = unicodedata.lookup(full)
                break
            except KeyError:
                continue
        result += letter
    return f' mathvariant="normal">{result}<'


def mathml(formulas: Sequence[tuple[str, bool]]) -> list[str]:
    """Turn TeX into ``<math>`` elements; each formula comes with whether it is displayed.

    Raises
    ------
    RuntimeError
        Node.js or MathJax failed, or a formula cannot be read.
    """
    if not formulas:
        return []
    folder = assets() / "node"
    done = subprocess.run(
        [
            *node_command(),
            str(Path(__file__).with_name("tex2mml.js")),
            str(folder / "node-main.js"),
        ],
        input=json.dumps(formulas),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"MathJax could not turn TeX into MathML:\n{done.stderr}")
    elements = json.loads(done.stdout)
    for (tex, _), element in zip(formulas, elements, strict=True):
        if "<merror" in element:
            raise RuntimeError(f"a formula cannot be read: {tex}")
    elements = [re.sub(r"\n\s*| data-[\w-]+=\"[^\"]*\"", "", element) for element in elements]
    variant = re.compile(r' mathvariant="(?!normal)-?(?:tex-)?([\w-]+)">([^<]+)<')
    return [variant.sub(_letters, element) for element in elements]


def still(models: Mapping[str, Any], model: str) -> str:
    """Return a widget as it is before anybody moves it, as HTML: its values, its picture, its caption."""
    state = models[model]["state"]
    name = models[model]["model_name"]
    if name == "HTMLModel":
        return str(state["value"])
    if name == "SelectionSliderModel":
        value = state["_options_labels"][state["index"]]
        return f"<p>{html.escape(state['description'])}: <strong>{html.escape(value)}</strong></p>"
    children = [child.removeprefix("IPY_MODEL_") for child in state.get("children", [])]
    if name == "StackModel":
        children = [children[state["selected_index"]]]
    return "".join(still(models, child) for child in children)


def add_stills(soup: BeautifulSoup) -> None:
    """Put beside each widget of a page the picture that it begins with."""
    states = soup.select_one(STATE)
    for view in soup.select(VIEW):
        assert states is not None
        assert view.string is not None
        picture = still(
            json.loads(str(states.string))["state"], json.loads(view.string)["model_id"]
        )
        text = (
            f'<noscript><div class="affnb-explore affnb-still">{picture}<p class="affnb-caption '
            'affnb-still-note">The sliders need JavaScript: this is the picture that they begin with.'
            "</p></div></noscript>"
        )
        view.insert_after(BeautifulSoup(text, "html.parser"))


def _takes_formulas(element: Tag) -> bool:
    return bool(WITH_FORMULAS.intersection(element.get("class") or []))


def _tex(match: re.Match[str]) -> tuple[str, bool]:
    """Return what stands between the delimiters, and whether they display it."""
    number = match.lastindex or 0
    return match[number].strip(), number < 3


def add_mathml(soup: BeautifulSoup) -> None:
    """Put beside each formula of a page the same as MathML, and in place of those in ``<noscript>``."""
    texts = [
        text
        for text in soup.find_all(string=_FORMULA)
        if text.find_parent(_takes_formulas) and not text.find_parent(_NO_TEXT)
    ]
    wanted = list(dict.fromkeys(_tex(m) for text in texts for m in _FORMULA.finditer(text)))
    elements = dict(zip(wanted, mathml(wanted), strict=True))
    for text in texts:
        pieces, end = [], 0
        for match in _FORMULA.finditer(text):
            piece = elements[_tex(match)]
            if not text.find_parent("noscript"):
                tex = f'<span class="affnb-tex">{html.escape(match[0])}</span>'
                piece = f"{tex}<noscript>{piece}</noscript>"
            pieces += [html.escape(text[end : match.start()]), piece]
            end = match.end()
        pieces.append(html.escape(text[end:]))
        text.replace_with(BeautifulSoup("".join(pieces), "html.parser"))


def add_plain(soup: BeautifulSoup) -> None:
    """Make a page readable without JavaScript."""
    add_stills(soup)
    add_mathml(soup)
    style = f"<noscript><style>{NO_SCRIPT_STYLE}</style></noscript>"
    if soup.head is not None:  # the page that only leads to the first one has none
        soup.head.append(BeautifulSoup(style, "html.parser"))

"""Widgets that move in a published page, with no kernel and no server.

`explore` calls a drawing function once for each value of a slider when the notebook runs, and joins the
slider to the stack of ready pictures in the browser (``jslink``). The state is saved with the page, so
the same object works on the web, in JupyterLab, in VS Code and in Colab.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from .plotting import figure_svg, side_by_side

__all__ = ["MAX_BYTES", "explore"]

#: A widget's frames may weigh this much together (bytes, before compression).
MAX_BYTES = 1_000_000


def _label(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _frame(drawn: Any, alt: str | Sequence[str]) -> str:
    """Turn whatever a drawing function returned into HTML: a figure, text, or several of them."""
    if isinstance(drawn, (list, tuple)):
        texts = [alt] * len(drawn) if isinstance(alt, str) else list(alt)
        if len(texts) != len(drawn):
            raise ValueError(f"alt: expected {len(drawn)} texts, one a picture, got {len(texts)}")
        return side_by_side([_frame(part, text) for part, text in zip(drawn, texts, strict=True)])
    if not isinstance(alt, str):
        raise ValueError(f"alt: expected one text for one picture, got {len(alt)}")
    if isinstance(drawn, str):
        return drawn
    if hasattr(drawn, "savefig"):
        return figure_svg(drawn, alt=alt)
    if hasattr(drawn, "_repr_html_"):
        return str(drawn._repr_html_())
    raise TypeError(
        "draw: expected a matplotlib figure, HTML text or a list of them, "
        f"got {type(drawn).__name__}"
    )


def explore(
    draw: Callable[..., Any],
    *,
    alt: str | Sequence[str] | Callable[..., str | Sequence[str]],
    caption: str = "",
    labels: Mapping[str, str] | None = None,
    start: Mapping[str, Any] | None = None,
    **values: Sequence[Any] | Mapping[str, Any],
) -> Any:
    """Let the reader move one or two sliders through pictures drawn beforehand.

    Parameters
    ----------
    draw
        Called with one keyword argument a slider. Returns a matplotlib figure, an HTML string, an object
        with ``_repr_html_``, or a list of those, which stand side by side where there is room.
    alt
        Alternative text of a picture: a format string such as ``"The loss at gamma = {gamma}"``, or a
        function of the same arguments. Where ``draw`` returns several pictures, give a list, one text
        for each (or a function that returns one); a single text is used for all of them.
    caption
        What to do and what to notice, below the picture (simple HTML).
    labels
        What to write beside a slider instead of the argument's name.
    start
        The value at which a slider begins; the first one by default.
    **values
        One or two sliders: the values of each, or a mapping from what the slider shows to the value.

    Returns
    -------
    ipywidgets.VBox
        The sliders, the pictures and the caption. Each slider is an ``ipywidgets.SelectionSlider``,
        moved with the mouse or the arrow keys, showing its value.

    Raises
    ------
    ValueError
        Not one or two sliders; not one alternative text for each picture; a slider with fewer than two values, or with two that read the same; a
        label of no slider; a start that is not among the values; or frames heavier than `MAX_BYTES`
        together.
    TypeError
        ``draw`` returned something that cannot be shown.

    Notes
    -----
    ``draw`` runs once for each combination, so cost and weight are the product of the numbers of values.

    Examples
    --------
    >>> box = explore(lambda n: f"<p>{n * n}</p>", alt="The square of {n}", n=[1, 2, 3])
    >>> slider, frames = box.children[0].children[0], box.children[1]
    >>> slider.options, frames.children[2].value
    (('1', '2', '3'), '<p>9</p>')
    """
    import ipywidgets as ipw

    from .plotting import style

    if len(values) not in (1, 2):
        raise ValueError(f"values: expected one or two sliders, got {len(values)}")
    choices: dict[str, dict[str, Any]] = {}
    for name, given in values.items():
        choices[name] = (
            {str(label): value for label, value in given.items()}
            if isinstance(given, Mapping)
            else {_label(value): value for value in given}
        )
        if len(choices[name]) < 2 or len(choices[name]) != len(given):
            raise ValueError(
                f"{name}: expected at least two values, each with a label of its own, got {given!r}"
            )
    for name in labels or {}:
        if name not in choices:
            raise ValueError(f"labels: expected {' or '.join(choices)}, got {name!r}")
    begin = {name: 0 for name in values}
    for name, value in (start or {}).items():
        if name not in choices or value not in list(choices[name].values()):
            raise ValueError(f"start: expected one of the values of a slider, got {name}={value!r}")
        begin[name] = list(choices[name].values()).index(value)

    wide = ipw.Layout(width="100%")

    def frame(arguments: dict[str, Any]) -> Any:
        text: str | Sequence[str]
        if callable(alt):
            text = alt(**arguments)
        elif isinstance(alt, str):
            text = alt.format(**arguments)
        else:
            text = [each.format(**arguments) for each in alt]
        with style():
            return ipw.HTML(_frame(draw(**arguments), text), layout=wide)

    names = list(choices)
    combinations = product(*(choices[name].values() for name in names))
    frames = [frame(dict(zip(names, point, strict=True))) for point in combinations]
    weight = sum(len(f.value.encode()) for f in frames)
    if weight > MAX_BYTES:
        raise ValueError(
            f"values: expected frames of at most {MAX_BYTES} bytes together, "
            f"got {weight} in {len(frames)} frames"
        )

    sliders = [
        ipw.SelectionSlider(
            options=tuple(choices[name]),
            index=begin[name],
            description=(labels or {}).get(name, name),
            continuous_update=True,
            style={"description_width": "initial"},
            layout=ipw.Layout(width="min(36rem, 100%)"),
        )
        for name in names
    ]

    def stack(children: list[Any], slider: Any) -> Any:
        joined = ipw.Stack(children, selected_index=slider.index, layout=wide)
        ipw.jslink((slider, "index"), (joined, "selected_index"))
        return joined

    if len(names) == 1:
        pictures = stack(frames, sliders[0])
    else:
        inner = len(choices[names[1]])
        rows = [frames[i : i + inner] for i in range(0, len(frames), inner)]
        pictures = stack([stack(row, sliders[1]) for row in rows], sliders[0])
    parts = [ipw.VBox(sliders), pictures]
    if caption:
        parts.append(ipw.HTML(f'<p class="affnb-caption">{caption}</p>'))
    box = ipw.VBox(parts)
    box.add_class("affnb-explore")
    return box

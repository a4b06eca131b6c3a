"""`explore` links sliders to ready pictures, and a notebook carries it all in its widget state."""

import re
from pathlib import Path

import ipywidgets as ipw
import matplotlib
import nbformat
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from ipywidgets.widgets.widget import _instances
from ipywidgets.widgets.widget_link import Link

from affnb import widgets
from affnb.widgets import explore


def links():
    """List the links made since the test began."""
    return [w for w in _instances.values() if isinstance(w, Link)]


@pytest.fixture(autouse=True)
def _fresh():
    ipw.Widget.close_all()
    yield
    ipw.Widget.close_all()
    plt.close("all")


def parts(box):
    sliders, pictures, *rest = box.children
    return list(sliders.children), pictures, rest


def texts(stack):
    return [frame.value for frame in stack.children]


def test_one_slider_one_stack():
    calls = []

    def draw(gamma):
        calls.append(gamma)
        return f"<p>{gamma}</p>"

    box = explore(draw, alt="At {gamma}", gamma=[0, 0.5, 2.0, 5])
    [slider], pictures, rest = parts(box)
    assert calls == [0, 0.5, 2.0, 5]
    assert isinstance(slider, ipw.SelectionSlider)
    assert isinstance(pictures, ipw.Stack)
    assert texts(pictures) == ["<p>0</p>", "<p>0.5</p>", "<p>2.0</p>", "<p>5</p>"]
    assert slider.options == ("0", "0.5", "2", "5")
    assert slider.description == "gamma"
    assert (slider.index, pictures.selected_index) == (0, 0)
    assert rest == []
    [link] = links()
    assert link.source == (slider, "index")
    assert link.target == (pictures, "selected_index")
    assert "affnb-explore" in box._dom_classes


def test_two_sliders_make_a_stack_of_stacks():
    box = explore(lambda a, b: f"{a}{b}", alt="", a=["x", "y", "z"], b=[1, 2])
    [first, second], pictures, _ = parts(box)
    assert [texts(row) for row in pictures.children] == [["x1", "x2"], ["y1", "y2"], ["z1", "z2"]]
    made = {(link.source[0], link.source[1], link.target[0], link.target[1]) for link in links()}
    assert made == {
        (first, "index", pictures, "selected_index"),
        *((second, "index", row, "selected_index") for row in pictures.children),
    }
    assert len(links()) == 4


def test_start_sets_sliders_and_stacks():
    box = explore(
        lambda a, b: f"{a}{b}", alt="", start={"a": "z", "b": 2}, a=["x", "y", "z"], b=[1, 2]
    )
    [first, second], pictures, _ = parts(box)
    assert (first.index, second.index, pictures.selected_index) == (2, 1, 2)
    assert [row.selected_index for row in pictures.children] == [1, 1, 1]
    assert (first.value, second.value) == ("z", "2")


def test_labels_of_sliders_and_of_values():
    box = explore(
        lambda form: f"<b>{form}</b>",
        alt="",
        labels={"form": "form of the loss"},
        caption="Move <em>it</em>.",
        start={"form": 7},
        form={"log": 3, "focal": 7},
    )
    [slider], pictures, [caption] = parts(box)
    assert slider.description == "form of the loss"
    assert slider.options == ("log", "focal")
    assert slider.index == 1
    assert texts(pictures) == ["<b>3</b>", "<b>7</b>"]
    assert caption.value == '<p class="affnb-caption">Move <em>it</em>.</p>'


def plot(n):
    figure, axes = plt.subplots()
    axes.plot([0, n])
    return figure


def test_every_frame_has_its_alternative_text_and_figures_are_closed():
    box = explore(plot, alt="A line up to {n:.1f}", n=[1, 2, 3])
    _, pictures, _ = parts(box)
    found = [re.findall('aria-label="([^"]*)"', text) for text in texts(pictures)]
    assert found == [["A line up to 1.0"], ["A line up to 2.0"], ["A line up to 3.0"]]
    assert plt.get_fignums() == []


def test_alternative_text_from_a_function():
    box = explore(plot, alt=lambda n: "even" if n % 2 == 0 else "odd", n=[1, 2])
    assert [re.search('aria-label="([^"]*)"', t)[1] for t in texts(parts(box)[1])] == [
        "odd",
        "even",
    ]
    with pytest.raises(ValueError, match=r"^alt: "):
        explore(plot, alt="", n=[1, 2])


@pytest.mark.parametrize(
    "alt",
    [["rises to {n}", "falls from {n}"], lambda n: (f"rises to {n}", f"falls from {n}")],
)
def test_each_picture_of_a_frame_has_an_alternative_text_of_its_own(alt):
    box = explore(lambda n: [plot(n), plot(-n)], alt=alt, n=[1, 2])
    for n, frame in zip([1, 2], box.children[1].children, strict=True):
        assert re.findall(r'aria-label="([^"]*)"', frame.value) == [
            f"rises to {n}",
            f"falls from {n}",
        ]


@pytest.mark.parametrize(
    ("draw", "alt"),
    [(lambda n: [plot(n), plot(n)], ["only one"]), (lambda n: plot(n), ["one", "too many"])],
)
def test_as_many_alternative_texts_as_pictures(draw, alt):
    with pytest.raises(ValueError, match=r"^alt: expected .*one"):
        explore(draw, alt=alt, n=[1, 2])


def test_identifiers_of_frames_do_not_meet():
    box = explore(plot, alt="n = {n}", n=[1, 2, 3])
    seen = [set(re.findall(r'\sid="([^"]+)"', text)) for text in texts(parts(box)[1])]
    assert all(seen)
    assert len(set.union(*seen)) == sum(map(len, seen))


def test_figures_use_the_books_style_and_leave_the_readers():
    before = plt.rcParams["text.color"]
    box = explore(plot, alt="n = {n}", n=[1, 2])
    assert "currentColor" in texts(parts(box)[1])[0]
    assert plt.rcParams["text.color"] == before


def test_several_outputs_in_order():
    class Table:
        def _repr_html_(self):
            return "<table></table>"

    box = explore(lambda n: [plot(n), f"<p>{n}</p>", Table()], alt="n = {n}", n=[1, 2])
    for n, text in zip((1, 2), texts(parts(box)[1]), strict=True):
        div = "</div><div[^>]*>"
        assert re.search(rf"<svg.*</svg>\s*{div}<p>{n}</p>{div}<table></table>", text, re.DOTALL)


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        ({}, {}, r"^values: expected one or two sliders, got 0"),
        ({"a": [1, 2], "b": [1, 2], "c": [1, 2]}, {}, r"^values: expected one or two.*got 3"),
        ({"a": [1]}, {}, r"^a: expected at least two"),
        ({"a": []}, {}, r"^a: expected at least two"),
        ({"a": [1, 1]}, {}, r"^a: expected at least two.*label"),
        ({"a": [0.12345671, 0.12345672, 1]}, {}, r"^a: .*label of its own"),
        ({"a": [1, 2]}, {"start": {"a": 3}}, r"^start: .*got a=3"),
        ({"a": [1, 2]}, {"start": {"b": 1}}, r"^start: .*got b=1"),
        ({"a": [1, 2]}, {"labels": {"b": "x"}}, r"^labels: expected a, got 'b'"),
    ],
)
def test_bad_arguments_are_refused_before_drawing(values, options, words):
    def draw(**_):
        raise AssertionError("drew")

    with pytest.raises(ValueError, match=words):
        explore(draw, alt="", **options, **values)


def test_what_cannot_be_shown_is_a_type_error():
    with pytest.raises(TypeError, match=r"^draw: expected a matplotlib figure.*got int"):
        explore(lambda n: n, alt="", n=[1, 2])


def test_weight_is_limited_in_bytes_over_all_frames(monkeypatch):
    monkeypatch.setattr(widgets, "MAX_BYTES", 10)
    explore(lambda n: "x" * 5, alt="", n=[1, 2])
    with pytest.raises(ValueError, match="at most 10 bytes together, got 12 in 2 frames"):
        explore(lambda n: "é" * 3, alt="", n=[1, 2])


def test_the_limit_is_a_megabyte():
    assert widgets.MAX_BYTES == 1_000_000


CELL = """
from affnb.widgets import explore
explore(lambda a, b: f"<p>{a}-{b}</p>", alt="", start={"b": 20}, a=[1, 2], b=[10, 20])
"""


def test_an_executed_notebook_carries_frames_and_links():
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    root = str(Path(__file__).parents[1])
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": root}}
    ).execute()
    view = "application/vnd.jupyter.widget-view+json"
    [shown] = [o["data"][view]["model_id"] for o in notebook.cells[0].outputs if "data" in o]
    states = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    models = {key: (v["model_name"], v["state"]) for key, v in states.items()}

    def children(key):
        return [c.removeprefix("IPY_MODEL_") for c in models[key][1]["children"]]

    assert models[shown][0] == "VBoxModel"
    sliders, pictures = children(shown)
    first, second = children(sliders)
    rows = children(pictures)
    assert [models[row][0] for row in rows] == ["StackModel"] * 2
    assert [models[row][1]["selected_index"] for row in rows] == [1, 1]
    assert [[models[f][1]["value"] for f in children(row)] for row in rows] == [
        ["<p>1-10</p>", "<p>1-20</p>"],
        ["<p>2-10</p>", "<p>2-20</p>"],
    ]
    assert models[first][1]["_options_labels"] == ["1", "2"]
    assert models[second][1]["index"] == 1
    made = {
        (tuple(state["source"]), tuple(state["target"]))
        for name, state in models.values()
        if name == "LinkModel"
    }
    ref = "IPY_MODEL_{}".format
    assert made == {
        ((ref(first), "index"), (ref(pictures), "selected_index")),
        ((ref(second), "index"), (ref(rows[0]), "selected_index")),
        ((ref(second), "index"), (ref(rows[1]), "selected_index")),
    }

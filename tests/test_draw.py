"""The pictures of the lessons: readable on a light and on a dark page, with labels that do not cover each other.

The same picture is the same file in every run.
"""
from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import host_only

from tinyft.learn import draw, lessons

pytestmark = host_only

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
LIGHT = "#ffffff"
DARK = "#131416"                                          # Furo's dark page


def bowl(w: np.ndarray) -> np.ndarray:
    return (w * w).sum(axis=-1)


PICTURES: dict[str, Callable[[], None]] = {
    "curves": lambda: draw.curves({"training": [3, 2, 1.5], "held out": [3.1, 2.4, 2.2]}, levels={"counting": 1.2}),
    "points": lambda: draw.points({"LoRA": (1e3, 70.0), "full": (2e5, 65.0)}, xlabel="size", ylabel="loss", log="x"),
    "bars": lambda: draw.bars({"adapter": {"one": 1, "two": 2}, "LoRA": {"one": 1.2, "two": 1.5}}, ylabel="ms"),
    "heat_map": lambda: draw.heat_map(np.tril(np.ones((4, 4))), rows="abcd", columns="abcd", values=".1f"),
    "contours": lambda: draw.contours({"a path": (bowl, [[1, 1], [0.5, 0.2]])}, levels=[0.5, 1.0]),
    "contours with dots": lambda: draw.contours(
        {"a": (bowl, [[0, 0], [1, 2]]), "b": (bowl, [[0, 0]])}, levels=[0.5, 1.0], dots=[[2, 1], [3, 3]]),
    "number_lines": lambda: draw.number_lines({"two": ([0.2, 1.8], [0, 1, 2, 3]), "one": ([3.3], [0, 1, 2, 3])}),
    "histograms": lambda: draw.histograms({"a": ([1, 1, 2], [0, 1]), "b": ([1, 3], [0, 3])}, region=(0, 3)),
    "diagram": lambda: draw.diagram(
        {"x": (0, 1, "x = 2", "data"), "u": (1, 1, "u = 3x"), "v": (2, 0, "v = u·u"), "y": (3, 1, "y = u + v", "none")},
        [("x", "u", "3"), ("u", "v", "12"), ("u", "y", "1"), ("v", "y", "1")]),
}
each_picture = pytest.mark.parametrize("name", PICTURES)


@pytest.fixture(autouse=True)
def no_open_figures():
    """A figure that a test leaves open would go into the next lesson that runs in this process."""
    import matplotlib.pyplot as plt
    yield
    plt.close("all")


@pytest.fixture
def album(tmp_path, monkeypatch):
    album = lessons.Album("01_small", tmp_path)
    monkeypatch.setattr(lessons, "_album", album)
    return album


def drawn(name: str, monkeypatch) -> Any:
    """The Matplotlib figure of a picture, laid out but not saved."""
    import matplotlib.pyplot as plt
    with monkeypatch.context() as patch:
        patch.setattr(draw, "show", lambda caption="": None)
        PICTURES[name]()
    figure = plt.gcf()
    figure.draw_without_rendering()
    plt.close(figure)
    return figure


def texts(figure: Any) -> list[Any]:
    """The texts of a figure that are seen: of the labels of an axis, those inside its limits."""
    beyond = set()
    for axes in figure.axes:
        for axis, side in ((axes.xaxis, 0), (axes.yaxis, 1)):
            low, high = sorted(axis.get_view_interval())
            for label in axis.get_ticklabels(which="both"):
                if not axes.axison or not low <= label.get_position()[side] <= high:
                    beyond.add(label)
    found = figure.findobj(matplotlib.text.Text)
    return [t for t in found if t.get_text().strip() and t.get_visible() and t not in beyond]


# ── colours ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def luminance(colour: Any) -> float:
    """The relative luminance of a colour (WCAG 2)."""
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055)**2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(a: Any, b: Any) -> float:
    """The contrast of two colours (WCAG 2): 1 to 21."""
    dark, light = sorted([luminance(a), luminance(b)])
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("page", [LIGHT, DARK])
def test_text_has_a_contrast_of_three_and_a_half_and_lines_of_three_to_the_page(page):
    assert contrast(draw.TEXT, page) > 3.5
    for colour in draw.COLOURS:
        assert contrast(colour, page) > 3


@pytest.mark.parametrize("colour", ["black", "white", "#1a3a6b", "yellow"])
def test_colours_that_one_of_the_pages_hides_are_noticed(colour):
    assert min(contrast(colour, LIGHT), contrast(colour, DARK)) < 3.5


@each_picture
def test_a_picture_has_only_colours_of_the_style(name, monkeypatch):
    """Text is grey, or white with an outline on a strongly coloured cell; and the page shows through."""
    figure = drawn(name, monkeypatch)
    colours = {matplotlib.colors.to_hex(text.get_color()) for text in texts(figure)}
    assert colours <= {draw.TEXT, "#ffffff"}
    assert "#ffffff" not in colours or name == "heat_map"


# ── layout ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@each_picture
def test_labels_cover_no_other_label_and_lie_inside_the_picture(name, monkeypatch):
    figure = drawn(name, monkeypatch)
    boxes = [text.get_window_extent() for text in texts(figure)]
    for a, b in itertools.combinations(boxes, 2):
        assert not a.padded(-1).overlaps(b.padded(-1))
    for box in boxes:
        assert figure.bbox.padded(1).contains(box.x0, box.y0)
        assert figure.bbox.padded(1).contains(box.x1, box.y1)


@each_picture
def test_a_picture_is_one_svg_file_and_the_same_in_every_run(name, album):
    PICTURES[name]()
    PICTURES[name]()
    (first, _), (second, _) = album.recent
    assert first.suffix == ".svg"
    assert first.read_bytes() == second.read_bytes()
    assert b"<svg" in first.read_bytes()


def test_the_caption_goes_with_the_picture(album):
    draw.bars({"a": 1.0, "b": 2.0}, caption="Two bars.")
    assert [caption for _, caption in album.recent] == ["Two bars."]


# ── values ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def figure_of(monkeypatch, call: Callable[[], None]) -> Any:
    monkeypatch.setitem(PICTURES, "one", call)
    return drawn("one", monkeypatch)


def test_curves_begin_at_step_0(monkeypatch):
    figure = figure_of(monkeypatch, lambda: draw.curves({"a line": [3.0, 2.0, 1.0]}))
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[0, 3], [1, 2], [2, 1]]


def test_bars_have_the_heights_of_the_values(monkeypatch):
    figure = figure_of(monkeypatch, lambda: draw.bars({"a": {"s": 1, "t": 4}, "b": {"s": 2, "t": 3}}))
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == [1, 2, 4, 3]                       # series by series
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["a", "b"]


def test_a_heat_map_shows_zero_as_nothing_and_both_signs_in_two_colours(monkeypatch):
    figure = figure_of(monkeypatch, lambda: draw.heat_map([[-2.0, 0.0, 2.0]], values=".0f"))
    image = figure.axes[0].images[0]
    negative, zero, positive = image.to_rgba(image.get_array())[0]
    assert zero[3] < 0.1
    assert negative[0] > negative[2] and positive[2] > positive[0]
    assert [text.get_text() for text in figure.axes[0].texts] == ["-2", "0", "2"]


def test_contours_show_the_dots_and_a_cross_at_the_minimum(monkeypatch):
    figure = figure_of(monkeypatch, lambda: draw.contours(
        {"a": (bowl, [[0, 0]])}, levels=[1.0], minimum=[1, 2], dots=[[0, 3], [4, 0]]))
    marks = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    assert [[0, 3], [4, 0]] in marks
    assert [[1, 2]] in marks


def test_an_arrow_leads_from_box_to_box(monkeypatch):
    figure = figure_of(monkeypatch, lambda: draw.diagram({"a": (0, 0, "A"), "b": (1, 1, "B")}, [("a", "b", "why")]))
    found = {text.get_text(): text.get_position() for text in texts(figure)}
    assert found["A"] == (0, 0)
    assert found["B"] == (1.6, -1)
    assert "why" in found
    with pytest.raises(KeyError):
        figure_of(monkeypatch, lambda: draw.diagram({"a": (0, 0, "A")}, [("a", "nowhere")]))

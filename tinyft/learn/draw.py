"""Pictures for the lessons, one call each, in one style that is readable on a light and on a dark page.

    curves      lines over steps, with levels to compare with
    points      labelled points in a plane
    bars        one bar or several for each name
    heat_map    a matrix as coloured cells
    contours    paths of two parameters over the level lines of a loss
    number_lines   numbers above a line, and the marks on it that are nearest to them
    histograms  how many values there are of each size, with marks to compare with
    diagram     boxes and arrows: a graph, a block and its shapes

Each takes `caption`, the sentence that the book prints below the picture, and shows the picture (lessons.show).
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .lessons import show

__all__ = [
    "bars", "contours", "curves", "diagram", "figure", "heat_map", "histograms", "number_lines", "points",
]

TEXT = "#78818c"                                         # contrast of at least 4 to white and to the dark page
COLOURS = ["#3b82f6", "#d97706", "#059669", "#8b5cf6", "#ef4444", "#0891b2"]                # at least 3 to both
NO_COLOUR = (0.5, 0.5, 0.5, 0.07)                        # the cells of a heat map that show zero
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "axes.titlesize": 10,
    "lines.linewidth": 1.8, "font.size": 10, "svg.hashsalt": "tinyft", "savefig.transparent": True,
    "text.color": TEXT, "axes.labelcolor": TEXT, "axes.edgecolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT,
    "axes.titlecolor": TEXT, "legend.labelcolor": TEXT,
}
# Boxes of a diagram: (colour of the edge, colour of the inside with its opacity).
KINDS = {
    "": (TEXT, (0.5, 0.5, 0.5, 0.10)),
    "trained": ("#d97706", (0.85, 0.47, 0.02, 0.18)),
    "data": ("#3b82f6", (0.23, 0.51, 0.96, 0.15)),
    "none": ((0, 0, 0, 0), (0, 0, 0, 0)),                # text without a box
}


def figure(columns: int = 1, height: float = 2.8) -> tuple[Any, Any]:
    """(figure, axes) of Matplotlib, for a picture that the functions below do not draw.

    It is as wide as the page, 640 pixels; height in hundreds of pixels. With several columns, axes is an array.
    """
    import matplotlib
    import matplotlib.pyplot as plt
    plt.rcParams.update(STYLE)
    plt.rcParams["axes.prop_cycle"] = matplotlib.cycler(color=COLOURS)
    return plt.subplots(1, columns, figsize=(6.4, height), layout="constrained")


# ── measured values ──────────────────────────────────────────────────────────────────────────────────────────────────
def curves(
    lines: Mapping[str, Any], *, x: Any = None, levels: Mapping[str, float] | None = None, xlabel: str = "step",
    ylabel: str = "loss", log: str = "", caption: str = "", height: float = 2.8,
) -> None:
    """Lines {label: values (n,)} over x (n,), by default over 0 ... n − 1.

    levels: {label: value} of dashed horizontal lines. log: the axes with a logarithmic scale: "x", "y" or "xy".
    """
    _, axes = figure(height=height)
    for label, values in lines.items():
        values = np.asarray(values)
        axes.plot(np.arange(len(values)) if x is None else x, values, label=label)
    _draw_levels(axes, levels)
    _name_axes(axes, xlabel, ylabel, log)
    if "x" in log and x is not None and len(x) <= 8:     # few points: their own values as labels, not powers of ten
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.minorticks_off()
    low, high = axes.get_ylim()
    if "y" in log and high < 50 * low:                   # hardly a power of ten in sight: 1, 2, 5, 10, ... instead
        from matplotlib import ticker

        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    entries = len(lines) + len(levels or {})
    if entries > 3:                                      # above the lines: so many entries would cover some of them
        axes.figure.legend(loc="outside upper center", ncols=3)
    elif entries > 1:
        axes.legend()
    show(caption)


def points(
    named: Mapping[str, tuple[float, float]], *, xlabel: str, ylabel: str, log: str = "",
    levels: Mapping[str, float] | None = None, lines: Mapping[str, tuple] | None = None, caption: str = "",
    height: float = 3.2,
) -> None:
    """Points {label: (x, y)}, each with its label beside it. log, levels: as in `curves`.

    lines: {label: (x values, y values)} of rising lines behind the points, whose labels then stand below them.
    """
    _, axes = figure(height=height)
    for label, (x, y) in (lines or {}).items():
        axes.plot(x, y, color=TEXT, linewidth=1.2, label=label)
    for i, (label, (x, y)) in enumerate(named.items()):
        axes.plot([x], [y], "o", color=COLOURS[i % len(COLOURS)])
        axes.annotate(label, (x, y), xytext=(8, -13) if lines else (6, 4), textcoords="offset points")
    _draw_levels(axes, levels)
    if levels or lines:
        axes.legend()
    axes.margins(x=0.18, y=0.15)                         # room for the labels
    _name_axes(axes, xlabel, ylabel, log)
    show(caption)


def bars(
    groups: Mapping[str, float | Mapping[str, float]], *, ylabel: str = "", log: str = "", caption: str = "",
    height: float = 2.8,
) -> None:
    """A bar for each {name: value}; or, for {name: {series: value}}, one for each series, side by side."""
    _, axes = figure(height=height)
    first = next(iter(groups.values()))
    series = list(first) if isinstance(first, Mapping) else [""]
    width = 0.8 / len(series)
    for k, label in enumerate(series):
        values = [group[label] if isinstance(group, Mapping) else group for group in groups.values()]
        middles = np.arange(len(groups)) + (k - (len(series) - 1) / 2) * width
        axes.bar(middles, values, width * 0.9, label=label, color=COLOURS[k % len(COLOURS)])
    axes.set_xticks(range(len(groups)), list(groups))
    _name_axes(axes, "", ylabel, log)
    if len(series) > 1:
        axes.figure.legend(loc="outside upper center", ncols=len(series))      # above the bars, not over them
    show(caption)


def heat_map(
    matrix: Any, *, rows: Sequence[str] = (), columns: Sequence[str] = (), xlabel: str = "", ylabel: str = "",
    values: str = "", texts: Any = None, title: str = "", caption: str = "", height: float = 3.2,
) -> None:
    """A matrix (n, m) as coloured cells: blue for positive, red for negative entries, no colour for zero and NaN.

    rows, columns: labels. values: a format such as ".2f", with which each cell shows its entry; "" shows none.
    texts: an array (n, m) of texts, which the cells show instead.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patheffects import withStroke
    matrix = np.asarray(matrix, float)
    _, axes = figure(height=height)
    palette = LinearSegmentedColormap.from_list("tinyft", [COLOURS[4], NO_COLOUR, COLOURS[0]])
    largest = np.nanmax(np.abs(matrix)) or 1.0
    axes.imshow(matrix, cmap=palette, vmin=-largest, vmax=largest, aspect="equal")
    axes.set_xticks(range(matrix.shape[1]) if len(columns) else [], list(columns))
    axes.set_yticks(range(matrix.shape[0]) if len(rows) else [], list(rows))
    cell = min((height - 0.8) / matrix.shape[0], 5 / matrix.shape[1])    # about its size, in hundreds of pixels
    if all(columns) and 0.09 * max(map(len, columns), default=0) > cell:     # labels side by side would overlap
        axes.tick_params(axis="x", rotation=90)
    axes.tick_params(length=0)
    axes.spines[:].set(visible=False)
    if values or texts is not None:
        outline = [withStroke(linewidth=2.4, foreground="#334155")]
        for (i, j), entry in np.ndenumerate(matrix):
            share = abs(entry) / largest
            text = format(entry, values) if texts is None else texts[i, j]
            axes.text(j, i, text, ha="center", va="center", color="white" if share > 0.3 else TEXT,
                      path_effects=outline if 0.3 < share <= 0.6 else None)      # on a pale cell, a light or dark one
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    show(caption)


def contours(
    panels: Mapping[str, tuple[Callable, Any]], *, levels: Sequence[float], xlabel: str = "$w_1$",
    ylabel: str = "$w_2$", minimum: Sequence[float] = (0.0, 0.0), dots: Any = (), caption: str = "",
    height: float = 2.6,
) -> None:
    """One panel for each {title: (loss, path)}: the path (n, 2) over the level lines of the loss, with its minimum.

    loss: a function of points (..., 2) that returns their values (...). A ring marks the first point of the path, a
    cross the minimum, by default at the origin. dots: more points (n, 2), such as those of a grid. All panels show the
    same region.
    """
    _, row = figure(len(panels), height)
    paths = [np.asarray(path, float) for _, path in panels.values()]
    dots = np.reshape(dots, (-1, 2))
    ends = np.concatenate([*paths, [minimum], dots])
    margin = 0.15 * np.ptp(ends, axis=0) + 0.1
    sides = [np.linspace(low, high, 120) for low, high in zip(ends.min(0) - margin, ends.max(0) + margin)]
    grid = np.stack(np.meshgrid(*sides), axis=-1)                                       # (120, 120, 2)
    for axes, (title, (loss, _)), path in zip(np.atleast_1d(row), panels.items(), paths):
        axes.contour(*sides, loss(grid), levels=levels, colors=TEXT, linewidths=0.6, alpha=0.6)
        axes.plot(*path.T, ".-", linewidth=1.0, markersize=4)
        axes.plot(*path[0], "o", color=COLOURS[0], markerfacecolor="none", markersize=8)
        axes.plot(*dots.T, "o", color=COLOURS[1], markersize=6)
        axes.plot(*minimum, "+", color=COLOURS[4], markersize=11, markeredgewidth=2)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel if path is paths[0] else "")
    show(caption)


def number_lines(
    lines: Mapping[str, tuple[Any, Any]], *, labels: Sequence[str] = (), caption: str = "", height: float | None = None,
) -> None:
    """A line for each {title: (numbers (n,), marks (m,))}: the numbers above it, with arrows to the nearest marks.

    labels: a text for each mark, below its value, by default "code 0", "code 1", ... height: in hundreds of pixels.
    """
    _, axes = figure(height=height or 1.4 * len(lines))
    axes.set_axis_off()
    every = np.concatenate([np.concatenate([np.ravel(numbers), np.ravel(marks)]) for numbers, marks in lines.values()])
    low = every.min()
    width = np.ptp(every)
    for row, (title, (numbers, marks)) in enumerate(lines.items()):
        y = -2.6 * row
        marks = np.ravel(marks)
        axes.plot([low - 0.04 * width, low + 1.04 * width], [y, y], color=TEXT, linewidth=1.0)
        axes.text(low - 0.04 * width, y + 1.15, title, ha="left", va="center")
        axes.plot(marks, np.full(len(marks), y), "|", color=COLOURS[0], markersize=16, markeredgewidth=2.2)
        for k, mark in enumerate(marks):
            label = labels[k] if len(labels) else f"code {k}"
            axes.text(mark, y - 0.3, f"{mark:.3g}\n{label}", ha="center", va="top", fontsize=9)
        for number in np.ravel(numbers):
            nearest = marks[np.argmin(np.abs(marks - number))]
            axes.plot([number], [y + 0.7], "o", color=COLOURS[1], markersize=6)
            axes.annotate("", (nearest, y + 0.08), (number, y + 0.64),
                          arrowprops={"arrowstyle": "-|>", "color": COLOURS[1], "linewidth": 1.0})
    axes.set_ylim(-2.6 * (len(lines) - 1) - 1.1, 1.4)
    axes.set_xlim(low - 0.08 * width, low + 1.08 * width)
    show(caption)


def histograms(
    panels: Mapping[str, tuple[Any, Any]], *, region: tuple[float, float], bins: int = 60, xlabel: str = "",
    ylabel: str = "count", caption: str = "", height: float = 2.6,
) -> None:
    """One panel for each {title: (values (n,), marks (m,))}: a histogram, and a vertical line at each mark.

    region: (least, largest) value that the panels show.
    """
    _, row = figure(len(panels), height)
    for k, (axes, (title, (values, marks))) in enumerate(zip(np.atleast_1d(row), panels.items())):
        axes.hist(np.ravel(values), bins=bins, range=region, color=COLOURS[1])
        for mark in np.ravel(marks):
            axes.axvline(mark, color=COLOURS[0], linewidth=1.0)
        axes.set(title=title, xlabel=xlabel, ylabel="" if k else ylabel, xlim=region)
    show(caption)


def _draw_levels(axes: Any, levels: Mapping[str, float] | None) -> None:
    """Dashed horizontal lines {label: value}, to compare with."""
    for i, (label, value) in enumerate((levels or {}).items()):
        axes.axhline(value, color=COLOURS[-1 - i], linestyle="--", linewidth=1.2, label=label)


def _name_axes(axes: Any, xlabel: str, ylabel: str, log: str) -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")


# ── boxes and arrows ─────────────────────────────────────────────────────────────────────────────────────────────────
def diagram(
    boxes: Mapping[str, tuple], arrows: Sequence[tuple] = (), *, caption: str = "", height: float | None = None,
) -> None:
    """Boxes on a grid, joined by arrows.

    boxes: {name: (column, row, text) or (column, row, text, kind)}. Row 0 is at the top; columns and rows may be
    fractions. kind: "" grey, "trained" orange, "data" blue, "none" for text without a box.
    arrows: (from, to) or (from, to, text), with the names of boxes. height: in hundreds of pixels, by default 75 a row.
    """
    columns = [box[0] for box in boxes.values()]
    rows = [box[1] for box in boxes.values()]
    row_count = max(rows) - min(rows) + 1
    _, axes = figure(height=height or 0.75 * row_count)
    axes.set_axis_off()
    drawn = {}
    for name, box in boxes.items():
        column, row, text = box[:3]
        edge, inside = KINDS[box[3] if len(box) > 3 else ""]
        drawn[name] = axes.text(
            1.6 * column, -row, text, ha="center", va="center",
            bbox={"boxstyle": "round,pad=0.45", "edgecolor": edge, "facecolor": inside, "linewidth": 1.3})
    axes.set_xlim(1.6 * min(columns) - 1, 1.6 * max(columns) + 1)
    axes.set_ylim(-max(rows) - 0.6, -min(rows) + 0.6)
    axes.figure.canvas.draw()                            # now the boxes have sizes, to which the arrows reach
    for arrow in arrows:
        _arrow(axes, drawn[arrow[0]], drawn[arrow[1]], arrow[2] if len(arrow) > 2 else "")
    show(caption)


def _arrow(axes: Any, start: Any, end: Any, text: str) -> None:
    """An arrow from the edge of one box to the edge of another, with a text beside its middle."""
    axes.annotate("", end.get_position(), start.get_position(), annotation_clip=False,
                  arrowprops={"arrowstyle": "-|>", "color": TEXT, "linewidth": 1.2, "shrinkA": 2, "shrinkB": 2,
                              "patchA": start.get_bbox_patch(), "patchB": end.get_bbox_patch()})
    if text:
        (x0, y0), (x1, y1) = start.get_position(), end.get_position()
        if abs(x1 - x0) < 0.3:                           # beside a vertical arrow
            offset, ha, va = (6, 0), "left", "center"
        elif abs(y1 - y0) < 0.3:                         # above a horizontal one
            offset, ha, va = (0, 5), "center", "bottom"
        elif (x1 - x0) * (y1 - y0) > 0:                  # on the upper side of a slanted one
            offset, ha, va = (-5, 2), "right", "bottom"
        else:
            offset, ha, va = (5, 2), "left", "bottom"
        axes.annotate(text, ((x0 + x1) / 2, (y0 + y1) / 2), xytext=offset, textcoords="offset points", fontsize=9,
                      ha=ha, va=va)



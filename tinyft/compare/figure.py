"""The figure of a comparison: quality against trained parameters and, for domain, new skill against what was forgotten.

Each contender has one colour, and its family one marker. Its name stands beside its point.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from .report import Summary, deviation, is_lm, summaries

__all__ = ["draw"]

MARKERS = {"selective": "o", "additive": "^", "reparameterized": "s", "": "D"}  # "": from scratch
OTHER_FAMILY = "v"
BASE_MARKER = "*"
FILLS = ("full", "none", "left", "bottom", "right", "top")
# Places of a name beside its point: (offset in points, horizontal and vertical alignment), the best one first.
PLACES = (
    (9, 0, "left", "center"),
    (0, 8, "center", "bottom"),
    (0, -8, "center", "top"),
    (-9, 0, "right", "center"),
    (7, 7, "left", "bottom"),
    (7, -7, "left", "top"),
    (-7, 7, "right", "bottom"),
    (-7, -7, "right", "top"),
    (0, 20, "center", "bottom"),
    (0, -20, "center", "top"),
)
LINES = (":", "--", "-.")  # of simple models


def draw(report: dict) -> bytes:
    """The figure as the content of a PNG file. ImportError if matplotlib is not installed.

    Left: quality over the number of trained parameters; right, for domain alone: perplexity on source over perplexity
    on prose, with the same vertical axis. Error bars are the standard deviation over seeds. Simple models are
    horizontal lines, the untouched base is a star. A contender that diverged or did not run is left out.
    """
    from matplotlib.figure import Figure  # without pyplot: a notebook keeps its own backend

    rows = [r for r in summaries(report) if np.isfinite(r.mean)]
    panels = 2 if is_lm(report) else 1
    fig = Figure(figsize=(5.2 * panels + 0.8, 5.2), dpi=120, layout="constrained")
    axes = fig.subplots(1, panels, sharey=True, squeeze=False)[0]
    for ax in axes:
        ax.grid(visible=True, which="major", color="0.9")
        ax.set_axisbelow(b=True)
    draw_quality(axes[0], rows, report)
    if is_lm(report):
        draw_forgetting(axes[1], rows)
        set_log_ticks(axes[0].yaxis)
    fig.suptitle(title(report), fontsize=10)
    fig.draw_without_rendering()  # now the panels have their sizes
    for ax in axes:
        name_points(ax)
    content = io.BytesIO()
    fig.savefig(content, format="png")
    return content.getvalue()


def title(report: dict) -> str:
    """The title of the figure."""
    s = report["settings"]
    unit = "tokens" if is_lm(report) else "examples"
    seeds = "1 seed" if s["seeds"] == 1 else f"{s['seeds']} seeds (bars: ± 1 deviation)"
    return f"{s['task']}: {s['train']:,} training {unit}, {s['steps']} steps, {seeds}"


# ---------------------------------------------------------------------------------------------------- the panels
def draw_quality(ax: Any, rows: list[Summary], report: dict) -> None:
    """Quality over trained parameters. The base has none, so the axis begins at 0 if there is a base."""
    for r, style in zip((r for r in rows if r.kind == "simple"), LINES):
        ax.axhline(r.mean, ls=style, color="0.45", lw=1.2)
        ax.annotate(
            r.name, (0.99, r.mean), xycoords=ax.get_yaxis_transform(), xytext=(0, 2), textcoords="offset points",
            ha="right", fontsize=8, color="0.35",
        )
    for r, options in zip(points(rows), styles(rows)):
        ax.errorbar(r.trained, r.mean, yerr=deviation(r.quality), label=r.name, **options)
    if is_lm(report):
        ax.set_yscale("log")
        ax.set_ylabel("perplexity on Python source, held out (lower is better)")
    else:
        ax.set_ylabel("held-out accuracy (share of examples, higher is better)")
    ax.set_xlabel("trained parameters (number, head included)")
    ax.set_title("quality against trained parameters", fontsize=10)
    counts = [r.trained for r in rows if r.is_trained]
    if any(r.kind == "base" for r in rows) and counts:
        set_axis_from_zero(ax, min(counts), max(counts))
    else:
        ax.set_xscale("log")


def draw_forgetting(ax: Any, rows: list[Summary]) -> None:
    """Perplexity on source over perplexity on prose; down and left is better.

    Training from scratch never knew prose, so it is left out.
    """
    for r, style in zip((r for r in rows if r.kind == "simple"), LINES):
        ax.axhline(r.mean, ls=style, color="0.45", lw=1.2)
    for r, options in zip(points(rows), styles(rows)):
        knew_prose = r.kind == "base" or r.family
        if knew_prose and np.isfinite(r.second).any():
            x = np.nanmean(r.second)
            ax.errorbar(x, r.mean, xerr=deviation(r.second), yerr=deviation(r.quality), label=r.name, **options)
            if r.kind == "base":
                ax.axvline(x, color="0.7", lw=0.8)  # to the right of it prose was forgotten
    ax.set_xlabel("perplexity on prose, held out (right of the line: forgotten)")
    ax.set_title("new skill against what was forgotten", fontsize=10)


def points(rows: list[Summary]) -> list[Summary]:
    """The rows that are points, not lines."""
    return [r for r in rows if r.kind != "simple"]


def styles(rows: list[Summary]) -> list[dict[str, Any]]:
    """Colour, marker and fill of each point; when all colours were used, they come again with another fill."""
    from matplotlib import colormaps

    colours = colormaps["tab10"].colors
    found = []
    for i, r in enumerate(points(rows)):
        if r.kind == "base":
            found.append({"fmt": BASE_MARKER, "ms": 14, "color": "black"})
            continue
        marker = MARKERS.get(r.family, OTHER_FAMILY)
        turn, which = divmod(i, len(colours))
        fill = FILLS[turn % len(FILLS)]
        found.append({"fmt": marker, "ms": 8, "capsize": 3, "color": colours[which], "fillstyle": fill})
    return found


# ---------------------------------------------------------------------------------------------------- the names
def name_points(ax: Any) -> None:
    """Write the name of each point beside it, in its colour, where it covers no other point and no other name."""
    containers = ax.containers  # of each point with its error bars
    taken = [text.get_window_extent() for text in ax.texts]
    for container in containers:
        taken.append(marker_box(ax, container))
        taken += bar_boxes(ax, container)
    taken += [line.get_window_extent().padded(2) for line in ax.lines if line.get_linestyle() in LINES]
    for container in containers:
        line = container.lines[0]
        best = None
        for place in PLACES:
            text = write_name(ax, container.get_label(), line, place)
            box = text.get_window_extent()
            cost = sum(covered(box, other) for other in taken) + outside(box, ax.get_window_extent())
            if best is None or cost < best[0]:
                best = (cost, place, box)
            text.remove()
        write_name(ax, container.get_label(), line, best[1])
        taken.append(best[2])


def write_name(ax: Any, name: str, line: Any, place: tuple) -> Any:
    """The text of a point's name at one of PLACES."""
    x, y, horizontal, vertical = place
    point = (line.get_xdata()[0], line.get_ydata()[0])
    return ax.annotate(
        name, point, xytext=(x, y), textcoords="offset points", ha=horizontal, va=vertical, fontsize=8,
        color=line.get_color(),
    )


def marker_box(ax: Any, container: Any) -> Any:
    """The box of a point's marker, in pixels."""
    from matplotlib.transforms import Bbox

    line = container.lines[0]
    x, y = ax.transData.transform((line.get_xdata()[0], line.get_ydata()[0]))
    half = line.get_markersize() * ax.figure.dpi / 72 / 2
    return Bbox.from_extents(x - half, y - half, x + half, y + half)


def bar_boxes(ax: Any, container: Any) -> list[Any]:
    """The boxes of a point's error bars, in pixels, with two pixels around them."""
    from matplotlib.transforms import Bbox

    boxes = []
    for bars in container.lines[2]:
        for segment in bars.get_segments():
            ends = ax.transData.transform(segment)
            boxes.append(Bbox([ends.min(axis=0), ends.max(axis=0)]).padded(2))
    return boxes


def covered(box: Any, other: Any) -> float:
    """The area that two boxes share, in square pixels."""
    width = min(box.x1, other.x1) - max(box.x0, other.x0)
    height = min(box.y1, other.y1) - max(box.y0, other.y0)
    return max(width, 0.0) * max(height, 0.0)


def outside(box: Any, panel: Any) -> float:
    """The area of a box that lies outside the panel, in square pixels."""
    return box.width * box.height - covered(box, panel)


# ---------------------------------------------------------------------------------------------------- the axes
def set_axis_from_zero(ax: Any, smallest: int, largest: int) -> None:
    """A horizontal axis that is linear from 0 to the power of ten below `smallest`, and logarithmic from there."""
    first = int(np.floor(np.log10(smallest)))
    last = int(np.ceil(np.log10(largest)))
    ax.set_xscale("symlog", linthresh=10**first, linscale=0.5)
    ax.set_xlim(-0.25 * 10**first, 1.6 * max(largest, 10**first))
    powers = range(first, last + 1)
    ticks = [0] + [10**power for power in powers if 10**power <= 1.6 * largest]
    ax.set_xticks(ticks, [short(tick) for tick in ticks])
    ax.minorticks_off()


def short(count: int) -> str:
    """A round number as a short text: 0, 100, 10 k, 1 M."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count // unit} {name}"
    return str(count)


def set_log_ticks(axis: Any) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_formatter(NullFormatter())


def plain(value: float, position: int | None = None) -> str:
    """The text of a tick, as matplotlib's FuncFormatter asks for it."""
    return f"{value:g}"

"""The figure of `make real`: the learning curve, and the scores before and after."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

COLOURS = {"simple": "0.6", "base": "tab:blue", "tuned": "tab:red"}
WINDOW = 10  # steps of the moving mean


def draw(report: dict) -> bytes:
    """The figure as the content of a PNG file. ImportError if matplotlib is not installed.

    Left: the training loss of every step with its moving mean, and the loss on validation examples. Right: the first
    metric of every row with its 95 % interval.
    """
    from matplotlib.figure import Figure  # without pyplot: a notebook keeps its own backend

    fig = Figure(figsize=(10, 3.8), dpi=100, layout="constrained")
    left, right = fig.subplots(1, 2)
    draw_curve(left, report)
    draw_rows(right, report)
    s = report["settings"]
    title = f"{s['task']}: {Path(s['model']).stem}, LoRA r = {s['r']}, {s['steps']} steps of {s['batch']}"
    fig.suptitle(title, fontsize=10)
    content = io.BytesIO()
    fig.savefig(content, format="png")
    return content.getvalue()


def draw_curve(ax: Any, report: dict) -> None:
    """Losses over steps."""
    loss = np.array(report["curve"]["loss"])
    steps = np.arange(1, len(loss) + 1)
    ax.plot(steps, loss, color="0.8", lw=1, label="training loss of a step")
    window = min(WINDOW, len(loss))
    mean = np.convolve(loss, np.ones(window) / window, mode="valid")
    ax.plot(steps[window - 1 :], mean, color="0.3", label=f"mean of {window} steps")
    points = np.array(report["curve"]["points"]).reshape(-1, 2)  # steps, loss
    ax.plot(points[:, 0], points[:, 1], "o-", color="tab:red", label="validation loss")
    ax.set_xlabel("step")
    ax.set_ylabel("loss (nats per token of the answer)")
    ax.set_ylim(bottom=0)
    ax.set_title("learning curve", fontsize=10)
    ax.legend(fontsize=8)


def draw_rows(ax: Any, report: dict) -> None:
    """A bar for each row, with the interval of its first metric."""
    metric = report["metrics"][0]
    names = list(report["rows"])
    values = np.array([report["rows"][name][metric] for name in names])  # (rows, 3): mean, low, high
    errors = np.abs(values[:, 1:] - values[:, :1]).T
    colours = [COLOURS[report["rows"][name]["kind"]] for name in names]
    ax.barh(names, values[:, 0], xerr=errors, color=colours, height=0.6, capsize=3)
    ax.invert_yaxis()
    ax.set_xlabel(f"{metric} on {len(report['prompts'])} test examples (bars: 95 % intervals)")
    ax.set_title("before and after", fontsize=10)

"""The results of a comparison: table, conclusions, figure.  A report is the dict that `compare` writes as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["table", "verdict", "draw", "interval"]


@dataclass
class Summary:
    """One row of the table: metrics over seeds, and costs ({} for a simple model)."""

    name: str
    quality: np.ndarray  # (seeds,) accuracy, or perplexity for domain
    second: np.ndarray  # (seeds,) macro-F1, or perplexity on prose; NaN if not measured
    costs: dict

    @property
    def mean(self) -> float:
        """The mean quality over seeds."""
        return float(self.quality.mean())

    @property
    def trained(self) -> int:
        """Trained parameters, head included."""
        return self.costs.get("trained", 0) + self.costs.get("head", 0)


def is_lm(report: dict) -> bool:
    """True for the language modelling task, where a lower quality (perplexity) is better."""
    return report["settings"]["task"] == "domain"


def summaries(report: dict) -> list[Summary]:
    """All rows: simple models first, then the contenders by number of trained parameters.

    report["results"] is {name: one dict of metrics for each seed}; report["costs"] has the contenders only.
    """
    first, second = ("perplexity", "prose") if is_lm(report) else ("accuracy", "macro_f1")
    rows = []
    for name, metrics in report["results"].items():
        quality = np.array([m[first] for m in metrics])
        other = np.array([m.get(second, np.nan) for m in metrics])
        rows.append(Summary(name, quality, other, report["costs"].get(name, {})))
    return sorted(rows, key=lambda r: (bool(r.costs), r.trained))


# ---------------------------------------------------------------------------------------------------- the table
NOTE = """trained: parameters, head included.  stored: bytes per task.  memory: peak of training, weights included.
step: time relative to full fine-tuning.  inference: time relative to the base.  ±: standard deviation over seeds."""


def table(report: dict) -> str:
    """The comparison as a table of text, one row for each model. Simple models have no costs, so those stay empty."""
    lm = is_lm(report)
    metrics = ("perplexity", "on prose") if lm else ("accuracy", "macro-F1")
    rows = [("method", "trained", "stored", "memory", "step", *metrics, "inference")]
    digits = 1 if lm else 3
    for r in summaries(report):
        quality = spread(r.quality, digits)
        second = spread(r.second, digits)
        if not r.costs:
            rows.append((r.name, "", "", "", "", quality, second, ""))
            continue
        sizes = (f"{r.trained:,}", size(r.costs["stored"]), size(r.costs["memory"]))
        step = f"{r.costs['step_ratio']:.2f} ×"
        inference = f"{r.costs['inference_ratio']:.2f} ×"
        rows.append((r.name, *sizes, step, quality, second, inference))
    lines = align(rows)
    return "\n".join(["", lines[0], "-" * len(lines[0]), *lines[1:], "", NOTE])


def align(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows as lines: the first column is aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for name, *values in rows:
        parts = [name.ljust(widths[0])]
        parts += [value.rjust(width) for value, width in zip(values, widths[1:])]
        lines.append("  ".join(parts))
    return lines


def spread(values: np.ndarray, digits: int) -> str:
    """The mean ± the standard deviation of values over seeds, as text; with one seed the mean; "" if a value is NaN."""
    if np.isnan(values).any():
        return ""
    text = f"{values.mean():.{digits}f}"
    if len(values) > 1:
        text += f" ± {values.std(ddof=1):.{digits}f}"
    return text


def size(n: float) -> str:
    """Bytes as text."""
    return f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.1f} kB"


# ---------------------------------------------------------------------------------------------------- conclusions
# Student's t, two-sided 95 %, by degrees of freedom; the last entry also serves for more of them
T95 = (0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high): the mean of the paired differences a - b, and its 95 % interval by Student's t.

    a, b: (seeds,) quality of two contenders with the same seeds. The interval is infinite for one pair.
    """
    difference = a - b
    mean = float(difference.mean())
    n = len(difference)
    if n == 1:
        return mean, -np.inf, np.inf
    quantile = T95[min(n - 1, len(T95) - 1)]  # by degrees of freedom, n - 1
    half = float(quantile * difference.std(ddof=1) / n**0.5)
    return mean, mean - half, mean + half


def verdict(report: dict) -> str:
    """The conclusions: differences from full fine-tuning and from scratch, and whether a simple model wins.

    A difference wants an interval over seeds, so with one seed there is none.
    """
    rows = summaries(report)
    lines = []
    if report["settings"]["seeds"] > 1:
        for name in ("full", "from scratch"):
            for reference in rows:
                if reference.name == name:
                    lines += differences(report, rows, reference)
    # The untouched base has no costs either, but it is no simple model.
    simple = [r for r in rows if not r.costs and not r.name.startswith("base")]
    tuned = [r for r in rows if r.costs]
    if simple and tuned:
        lines.append(compare_best(report, simple, tuned))
    return "\n".join(lines)


def differences(report: dict, rows: list[Summary], reference: Summary) -> list[str]:
    """Lines of text: every contender's difference in quality from the contender `reference`, and the conclusion.

    A difference counts only if its interval excludes zero.
    """
    sign = -1 if is_lm(report) else 1  # a lower perplexity is better, a higher accuracy
    seeds = report["settings"]["seeds"]
    lines = [f"against {reference.name} (mean difference, paired 95 % interval over {seeds} seeds):"]
    for r in rows:
        if r.name == reference.name or not r.costs:
            continue
        mean, low, high = interval(r.quality, reference.quality)
        if low <= 0 <= high:
            conclusion = "no difference shown"
        else:
            conclusion = "better" if sign * mean > 0 else "worse"
        lines.append(f"  {r.name:<18} {mean:+.3f}  [{low:+.3f}, {high:+.3f}]  {conclusion}")
    return lines


def compare_best(report: dict, simple: list[Summary], tuned: list[Summary]) -> str:
    """The best simple model against the best fine-tuned model, in one sentence; if they are equal, the simple wins."""
    sign = -1 if is_lm(report) else 1  # a lower perplexity is better, a higher accuracy
    best_simple = max(simple, key=lambda r: sign * r.mean)
    best_tuned = max(tuned, key=lambda r: sign * r.mean)
    outcome = "wins" if sign * best_simple.mean >= sign * best_tuned.mean else "loses"
    return (
        f"{best_simple.name} {outcome} here: {best_simple.mean:.3f} against {best_tuned.mean:.3f} "
        f"of the best fine-tuned model ({best_tuned.name})"
    )


# ---------------------------------------------------------------------------------------------------- the figure
def draw(report: dict, path: Path) -> bool:
    """Save a figure at `path`: quality over the number of trained parameters, simple models as horizontal lines.

    Error bars are the standard deviation over seeds. False, and no figure, if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = summaries(report)
    tuned = [r for r in rows if r.costs]
    simple = [r for r in rows if not r.costs]
    fig, ax = plt.subplots(figsize=(8.4, 5.2), dpi=120)
    colours = plt.get_cmap("tab20")
    for i, r in enumerate(tuned):
        deviation = r.quality.std(ddof=1) if len(r.quality) > 1 else 0
        marker = "s" if r.name == "from scratch" else "o"
        ax.errorbar(
            r.trained, r.mean, yerr=deviation, fmt=marker, ms=7, capsize=3, color=colours(i), label=r.name
        )
    highest = max(r.mean for r in tuned)
    for r, style in zip(simple, (":", "--", "-.")):
        far_off = is_lm(report) and r.mean > 3 * highest  # such a line would flatten all others
        if not far_off:
            ax.axhline(r.mean, ls=style, color="0.45", lw=1.2, label=r.name)
    ax.set_xscale("log")
    ax.set_xlabel("trained parameters (head included)")
    ax.set_ylabel("held-out perplexity on source code (lower is better)" if is_lm(report) else "held-out accuracy")
    ax.set_title(title(report), fontsize=11)
    ax.grid(visible=True, which="major", color="0.9")
    ax.set_axisbelow(b=True)
    ax.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)
    return True


def title(report: dict) -> str:
    """The title of the figure."""
    s = report["settings"]
    unit = "tokens" if is_lm(report) else "examples"
    return f"{s['task']}: {s['train']:,} training {unit}, {s['steps']} steps, {s['seeds']} seeds"

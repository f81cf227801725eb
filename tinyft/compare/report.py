"""The results of a comparison: table and conclusions.  A report is the dict that `compare` writes as JSON."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Summary", "deviation", "finished_runs", "interval", "is_lm", "summaries", "table", "verdict"]


@dataclass
class Summary:
    """One row of the table: metrics over seeds, and costs ({} if none were measured)."""

    name: str
    kind: str  # "trained", "base" (untouched) or "simple" (no network)
    family: str  # of the method; "" for training from scratch, and for a row without a method
    quality: np.ndarray  # (seeds,) accuracy, or perplexity for domain; NaN for a run without a result
    second: np.ndarray  # (seeds,) macro-F1, or perplexity on prose; NaN if not measured
    costs: dict
    diverged: list[int]  # seeds whose training diverged
    missing: list[int]  # seeds whose run did not end

    @property
    def is_trained(self) -> bool:
        """True for a contender, False for the untouched base and for a simple model."""
        return self.kind == "trained"

    @property
    def mean(self) -> float:
        """The mean quality over the finished seeds; NaN if one diverged, or if none finished.

        The mean of the other seeds would flatter a method that diverges.
        """
        if self.diverged or np.isnan(self.quality).all():
            return float("nan")
        return float(np.nanmean(self.quality))

    @property
    def trained(self) -> int:
        """Trained parameters, head included."""
        return self.costs.get("trained", 0) + self.costs.get("head", 0)


def is_lm(report: dict) -> bool:
    """True for the language modelling task, where a lower quality (perplexity) is better."""
    return report["settings"]["task"] == "domain"


def summaries(report: dict) -> list[Summary]:
    """All rows: simple models first, then the base, then the contenders by number of trained parameters.

    `run.new_report` describes the report.
    """
    first, second = ("perplexity", "prose") if is_lm(report) else ("accuracy", "macro_f1")
    rows = []
    for name, runs in report["results"].items():
        metrics = [run or {} for run in runs]
        row = Summary(
            name,
            **report["rows"][name],
            quality=np.array([m.get(first, np.nan) for m in metrics]),
            second=np.array([m.get(second, np.nan) for m in metrics]),
            costs=report["costs"].get(name, {}),
            diverged=[seed for seed, m in enumerate(metrics) if m.get("diverged")],
            missing=[seed for seed, run in enumerate(runs) if run is None],
        )
        rows.append(row)
    kinds = ("simple", "base", "trained")
    return sorted(rows, key=lambda r: (kinds.index(r.kind), r.trained))


def finished_runs(report: dict) -> int:
    """The number of contenders' runs that ended, diverged ones included."""
    return sum(len(r.quality) - len(r.missing) for r in summaries(report) if r.is_trained)


# ---------------------------------------------------------------------------------------------------- the table
NOTE = """trained: parameters, head included.  stored: bytes per task.  memory: peak of training, weights included.
step: time relative to full fine-tuning.  inference: time relative to the base.  ±: standard deviation over seeds."""


def table(report: dict) -> str:
    """The comparison as a table of text, one row for each model. A cost that a row does not have stays empty."""
    lm = is_lm(report)
    metrics = ("perplexity", "on prose") if lm else ("accuracy", "macro-F1")
    rows = [("method", "trained", "stored", "memory", "step", *metrics, "inference")]
    for r in summaries(report):
        rows.append((r.name, *costs_cells(r), *quality_cells(r, lm), ratio(r.costs, "inference_ratio")))
    lines = align(rows)
    return "\n".join(["", lines[0], "-" * len(lines[0]), *lines[1:], "", NOTE, *exceptions(report)])


def costs_cells(r: Summary) -> tuple[str, str, str, str]:
    """The cells of a row before its quality: trained parameters, bytes stored, peak memory, time of a step."""
    if not r.costs:
        return "", "", "", ""
    memory = size(r.costs["memory"]) if "memory" in r.costs else ""
    return f"{r.trained:,}", size(r.costs["stored"]), memory, ratio(r.costs, "step_ratio")


def quality_cells(r: Summary, lm: bool) -> tuple[str, str]:
    """The cells of a row for its quality and for its second metric."""
    if r.diverged:
        return "diverged" if r.is_trained else "not finite", ""
    if len(r.missing) == len(r.quality):
        return "not run", ""
    digits = 1 if lm else 3
    seeds = slice(None) if r.kind != "base" else slice(1)  # the base is the same for every seed: no spread
    return spread(r.quality[seeds], digits), spread(r.second[seeds], digits)


def exceptions(report: dict) -> list[str]:
    """Lines of text: the runs that diverged and those that did not end."""
    lines = []
    for r in summaries(report):
        if r.diverged and r.is_trained:
            seeds = ", ".join(map(str, r.diverged))
            lines.append(f"{r.name}: diverged with seed {seeds}; a lower learning rate may help")
        if r.missing:
            lines.append(f"{r.name}: {len(r.quality) - len(r.missing)} of {len(r.quality)} runs finished")
    return lines


def align(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows as lines: the first column is aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for name, *values in rows:
        parts = [name.ljust(widths[0])]
        parts += [value.rjust(width) for value, width in zip(values, widths[1:])]
        lines.append("  ".join(parts).rstrip())
    return lines


def spread(values: np.ndarray, digits: int) -> str:
    """The mean ± the standard deviation of the values over seeds that are not NaN, as text; "" if all are.

    One value has no deviation.
    """
    values = values[~np.isnan(values)]
    if not len(values):
        return ""
    text = decimal(values.mean(), digits)
    if len(values) > 1:
        text += f" ± {decimal(deviation(values), digits)}"
    return text


def deviation(values: np.ndarray) -> float:
    """The standard deviation over the seeds whose value is not NaN, with n - 1 in the denominator; 0 for one seed."""
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return 0.0
    with np.errstate(over="ignore"):  # the square of a perplexity of 1e300 is infinite
        return float(values.std(ddof=1))


def decimal(value: float, digits: int) -> str:
    """A number with this many digits after the point; a huge perplexity has an exponent, so columns stay narrow."""
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.1e}"


def signed(value: float) -> str:
    """A difference with its sign and three digits after the point, or with an exponent if it is huge."""
    return f"{value:+.3f}" if abs(value) < 1e6 else f"{value:+.1e}"


def ratio(costs: dict, name: str) -> str:
    """A ratio of times as text; "" if it was not measured."""
    return f"{costs[name]:.2f} ×" if name in costs else ""


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
    half = quantile * deviation(difference) / n**0.5
    return mean, mean - half, mean + half


def verdict(report: dict) -> str:
    """The conclusions: differences from full fine-tuning and from scratch, forgetting, and whether a simple model wins.

    A difference wants an interval over seeds, so with one seed there is none.
    """
    rows = summaries(report)
    lines = []
    if report["settings"]["seeds"] > 1:
        for name in ("full", "from scratch"):
            for reference in rows:
                if reference.name == name and reference.is_trained:
                    lines += differences(report, rows, reference)
        for base in rows:
            if base.kind == "base":
                lines += forgotten(rows, base)
    simple = [r for r in rows if r.kind == "simple" and np.isfinite(r.mean)]
    tuned = [r for r in rows if r.is_trained and np.isfinite(r.mean)]
    if simple and tuned:
        lines.append(compare_best(report, simple, tuned))
    return "\n".join(lines)


def differences(report: dict, rows: list[Summary], reference: Summary) -> list[str]:
    """Lines of text: every contender's difference in quality from the contender `reference`, and the conclusion.

    A difference counts only if its interval excludes zero.
    """
    sign = -1 if is_lm(report) else 1  # a lower perplexity is better, a higher accuracy
    title = f"against {reference.name} (mean difference, paired 95 % interval over {len(reference.quality)} seeds):"
    if reference.diverged:
        return [title, f"  {reference.name} diverged: there is nothing to compare with"]
    lines = [title]
    for r in rows:
        if r.is_trained and r.name != reference.name:
            words = ("better", "worse") if sign > 0 else ("worse", "better")
            lines.append(difference(r, r.quality, reference.quality, words))
    return lines


def forgotten(rows: list[Summary], base: Summary) -> list[str]:
    """Lines of text: by how much the perplexity on prose of every fine-tuned model is above the base's.

    Training from scratch never knew prose, so it has nothing to forget.
    """
    prose = f"the base's {base.second[0]:.1f} on prose"
    lines = [f"forgotten: perplexity above {prose} (mean, paired 95 % interval over {len(base.second)} seeds):"]
    for r in rows:
        if r.is_trained and r.family:
            lines.append(difference(r, r.second, base.second, ("forgets", "gains")))
    return lines


def difference(r: Summary, values: np.ndarray, reference: np.ndarray, words: tuple[str, str]) -> str:
    """One line: the row's name, the mean of values - reference with its interval, and the conclusion.

    values, reference   (seeds,), paired; a seed without one of the two is left out
    words               the conclusion for a difference above zero, and for one below
    """
    both = np.isfinite(values) & np.isfinite(reference)
    if r.diverged:
        return f"  {r.name:<18} diverged"
    if both.sum() < 2:
        return f"  {r.name:<18} too few runs finished"
    mean, low, high = interval(values[both], reference[both])
    if low <= 0 <= high:
        conclusion = "no difference shown"
    else:
        conclusion = words[0] if mean > 0 else words[1]
    return f"  {r.name:<18} {signed(mean)}  [{signed(low)}, {signed(high)}]  {conclusion}"


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

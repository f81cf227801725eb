"""What a comparison says: the table, what its numbers support, the figure.  A report is the dict that compare writes as JSON."""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

__all__ = ["table", "verdict", "draw", "interval"]


@dataclass
class Summary:
    "One row's numbers over seeds."
    name: str
    values: np.ndarray
    second: np.ndarray
    cost: dict = field(default_factory=dict)


def summaries(report: dict) -> list[Summary]:
    lm = report["settings"]["task"] == "domain"
    first, second = ("perplexity", "prose") if lm else ("accuracy", "macro_f1")
    rows = [Summary(n, np.array([r[first] for r in rs]), np.array([r.get(second, np.nan) for r in rs]), report["costs"].get(n, {}))
            for n, rs in report["results"].items()]
    return sorted(rows, key=lambda r: (bool(r.cost), r.cost.get("trained", 0) + r.cost.get("head", 0)))


def table(report: dict) -> str:
    "The comparison as text, 110 columns."
    lm = report["settings"]["task"] == "domain"
    heads = ("method", "trained", "stored", "memory", "step", "perplexity" if lm else "accuracy", "on prose" if lm else "macro-F1", "inference")
    rows = [heads]
    for r in summaries(report):
        c, digits = r.cost, 1 if lm else 3
        pm = lambda v: "" if np.isnan(v).any() else f"{v.mean():.{digits}f}" + (f" ± {v.std(ddof=1):.{digits}f}" if len(v) > 1 else "")
        rows.append((r.name, f"{c['trained'] + c['head']:,}" if c else "", size(c["stored"]) if c else "", size(c["memory"]) if c else "",
                     f"{c['step_ratio']:.2f} ×" if c else "", pm(r.values), pm(r.second), f"{c['inference_ratio']:.2f} ×" if c else ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = ["  ".join(v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(row, widths))) for row in rows]
    note = ("trained: numbers, head included.  stored: bytes one task adds.  memory: peak of training, weights included.\n"
            "step: time beside full fine-tuning.  inference: time beside the base.  ± is the standard deviation over seeds.")
    return "\n".join(["", lines[0], "-" * len(lines[0]), *lines[1:], "", note])


def size(n: float) -> str:
    return f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.1f} kB"


T95 = (0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)        # Student's t, two-sided 95 %, by degrees of freedom


def interval(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    "Mean and 95 % interval of the paired differences a − b."
    d = a - b
    half = T95[min(len(d) - 1, 9)] * d.std(ddof=1) / len(d)**0.5 if len(d) > 1 else float("inf")
    return float(d.mean()), float(d.mean() - half), float(d.mean() + half)


def verdict(report: dict) -> str:
    "What the numbers support, and who wins."
    rows, lm = {r.name: r for r in summaries(report)}, report["settings"]["task"] == "domain"
    sign = -1 if lm else 1
    lines = []
    for ref in ("full", "from scratch"):
        if ref in rows and report["settings"]["seeds"] > 1:
            lines.append(f"against {ref} (mean difference, paired 95 % interval over {report['settings']['seeds']} seeds):")
            for r in rows.values():
                if r.name != ref and r.cost:
                    mean, low, high = interval(r.values, rows[ref].values)
                    said = "no difference shown" if low <= 0 <= high else "better" if sign * mean > 0 else "worse"
                    lines.append(f"  {r.name:<18} {mean:+.3f}  [{low:+.3f}, {high:+.3f}]  {said}")
    simple = [r for r in rows.values() if not r.cost and not r.name.startswith("base")]
    tuned = [r for r in rows.values() if r.cost]
    if simple and tuned:
        s, t = (max(rs, key=lambda r: sign * r.values.mean()) for rs in (simple, tuned))
        wins = sign * s.values.mean() >= sign * t.values.mean()
        lines.append(f"{s.name} {'wins' if wins else 'loses'} here: {s.values.mean():.3f} against {t.values.mean():.3f} "
                     f"of the best fine-tuned model ({t.name})")
    return "\n".join(lines)


def draw(report: dict, path: Path) -> bool:
    "Quality against how much trains, on a logarithmic axis, with error bars; what needs no network as lines across."
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    s, rows = report["settings"], summaries(report)
    lm = s["task"] == "domain"
    fig, ax = plt.subplots(figsize=(8.4, 5.2), dpi=120)
    tuned = [r for r in rows if r.cost]
    colours = plt.get_cmap("tab20")
    for i, r in enumerate(tuned):
        x = r.cost["trained"] + r.cost["head"]
        ax.errorbar(x, r.values.mean(), yerr=r.values.std(ddof=1) if len(r.values) > 1 else 0, fmt="s" if r.name == "from scratch" else "o", ms=7,
                    capsize=3, color=colours(i), label=r.name)
    for r, style in zip([r for r in rows if not r.cost], (":", "--", "-.")):
        if not (lm and r.values.mean() > 3 * max(t.values.mean() for t in tuned)):
            ax.axhline(r.values.mean(), ls=style, color="0.45", lw=1.2, label=r.name)
    ax.set_xscale("log")
    ax.set_xlabel("numbers trained (head included)")
    ax.set_ylabel("held-out perplexity on source code (lower is better)" if lm else "held-out accuracy")
    ax.set_title(f"{s['task']}: {s['train']:,} training {'tokens' if lm else 'examples'}, {s['steps']} steps, {s['seeds']} seeds", fontsize=11)
    ax.grid(True, which="major", color="0.9")
    ax.set_axisbelow(True)
    ax.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)
    return True

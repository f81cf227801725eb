"""The results of `make real` as text: the table, sampled answers, memory. A report is the dict of demo.new_report."""

from __future__ import annotations

import textwrap

import numpy as np

from ..compare.report import align
from ..data.scores import bootstrap_interval
from .tasks import chat_task

SAMPLES = 3


def head(report: dict) -> str:
    """The lines before the work: the task, the model, the settings."""
    s = report["settings"]
    weights = "packed" if s["packed"] else "float32"
    examples = f"{report['train']:,} training examples, {len(report['prompts'])} test examples"
    return "\n".join([
        f"{s['task']}: {report['instruction']}",
        f"{s['model']}, {weights} weights; {examples}",
        f"LoRA r = {s['r']} on all linear maps, {s['steps']} steps of {s['batch']}, learning rate {s['lr']:g}, "
        f"{report['machine']['threads']} threads",
        "",
    ])  # fmt: skip


def line(name: str, report: dict) -> str:
    """One line as soon as a row is there."""
    row = report["rows"][name]
    metrics = "   ".join(f"{metric} {row[metric][0]:.3f}" for metric in report["metrics"])
    seconds = report["seconds"].get(name)
    return f"  {name:<16} {metrics}" + (f"   ({seconds[0]:.0f} s)" if seconds else "")


def conclusions(report: dict) -> str:
    """The table, the sampled answers, the difference to the best row that needs no training, and the time."""
    passed, processor = report["seconds"]["all"]
    took = f"{passed:.0f} s in all, {processor:.0f} s of processor time"
    return "\n".join(["", table(report), "", samples(report), "", verdict(report), "", took])


def table(report: dict) -> str:
    """One row for each way to answer: mean and 95 % interval of each metric."""
    rows = [("", *(f"{metric} [95 % interval]" for metric in report["metrics"]))]
    for name, row in report["rows"].items():
        rows.append((name, *(cell(row[metric]) for metric in report["metrics"])))
    lines = align(rows)
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def cell(value: list[float]) -> str:
    """A mean with its interval."""
    mean, low, high = value
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def samples(report: dict, seed: int = 0) -> str:
    """The answers before and after to three test examples, drawn at random with a fixed seed."""
    count = len(report["prompts"])
    chosen = np.random.default_rng(seed).choice(count, min(SAMPLES, count), replace=False)
    shown = [name for name, row in report["rows"].items() if row["kind"] != "simple"]
    lines = []
    for i in sorted(chosen):
        lines += textwrap.wrap(f'"{report["prompts"][i]}"', 100)
        lines.append(f"    {'true':<12} {report['responses'][i]}")
        for name in shown:
            text = " ".join(report["answers"][name][i].split())
            lines.append(f"    {name:<12} {textwrap.shorten(text, 90, placeholder=' ...') or '(nothing)'}")
    return "\n".join(lines)


def verdict(report: dict) -> str:
    """The paired difference between LoRA and the best row without training, in the first metric."""
    metric = report["metrics"][0]
    others = {name: row for name, row in report["rows"].items() if row["kind"] != "tuned"}
    best = max(others, key=lambda name: others[name][metric][0])
    s = report["settings"]
    task = chat_task(s["task"], s["test"], s["seed"])
    difference = task.score(report["answers"]["LoRA"])[metric] - task.score(report["answers"][best])[metric]
    low, high = bootstrap_interval(difference)
    words = "no difference shown" if low <= 0 <= high else "better" if low > 0 else "worse"
    return (
        f"{metric}: LoRA - {best} (the best without training) = {difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]: "
        f"{words}"
    )


def memory(found: list[dict]) -> str:
    """Lines with the peak memory of training and the time of a step, on dense and on packed weights."""
    lines = []
    for measured in found:
        name = "packed" if measured["packed"] else "float32"
        gigabytes = measured["peak_bytes"] / 1e9
        lines.append(f"  base in {name:<8} peak memory {gigabytes:.2f} GB   {measured['step_seconds']:.1f} s a step")
    return "\n".join(lines)

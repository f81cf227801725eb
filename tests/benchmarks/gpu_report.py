"""results/gpu.md, from the measurements of gpu.py: the targets, then one table for each section."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

TITLES = {
    "environment": "The machine",
    "bandwidth": "Bytes per second",
    "agreement": "The CPU and the GPU learn the same",
    "kernels": "Kernels: each is its definition, and its time over the bytes that must move at the rate of a copy "
    "(time on the device alone)",
    "int4": "Four-bit matrix times vector, against the rate of a copy",
    "lesson": "A training step at the lessons' sizes",
    "gpt2": "A training step of GPT-2 small (8 texts of 1,024 tokens)",
    "lora": "A LoRA step, beside PEFT",
    "products": "Matrix products",
    "overhead": "What an operation costs the host",
    "memory": "The most memory in use in three steps",
    "compiled": "torch.compile",
}
HIDDEN = {"what", "reaches", "error"}


@dataclass(frozen=True)
class Target:
    """A target for all rows with `reaches: {key: number}`; the smallest number counts."""

    key: str
    says: str
    least: float
    unit: str = "×"


TARGETS = [
    Target("lesson", "lesson sizes, float32: PyTorch eager's time over that of tinyft's captured step", 3.0),
    Target("gpt2 fp32", "GPT-2 small, float32: PyTorch eager's time over tinyft's best", 1.0),
    Target("gpt2 tf32", "GPT-2 small, TF32: the same", 1.0),
    Target("gpt2 bf16", "GPT-2 small, bfloat16: the same", 0.8),
    Target("int4", "int4 matrix times vector, 8,192² and 16,384²: share of a copy's bytes per second", 0.6, ""),
]


def value(x: Any) -> str:
    """A cell of a table: three digits of a number; a ratio as median [quartiles]."""
    if isinstance(x, dict):
        return f"{value(x['ratio'])} [{value(x['low'])}, {value(x['high'])}]"
    if x is None:
        return ""
    if isinstance(x, bool):
        return "yes" if x else "**no**"
    if isinstance(x, int):
        return f"{x:,}"
    if isinstance(x, float):
        return decimal(x)
    return str(x).replace("|", "/").replace("\n", " ")


def decimal(x: float) -> str:
    """A float with three digits."""
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    if abs(x) < 1e-3:
        return f"{x:.1e}"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def line(row: dict[str, Any]) -> str:
    """A row as it is printed while the script runs."""
    what = row.get("what", "")
    if "error" in row:
        return f"{what}   ERROR {row['error']}"
    cells = [f"{name} {value(x)}" for name, x in row.items() if name not in HIDDEN and x is not None]
    return f"{what}   {'   '.join(cells)}"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One column for each name that occurs in a row, in the order of first appearance."""
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(name for name in row if name not in HIDDEN)
    lines = [f"| {' | '.join(['', *names])} |", "|" + "---|" * (len(names) + 1)]
    for row in rows:
        cells = [str(row.get("what", "")), *(value(row.get(name)) for name in names)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def targets(sections: dict[str, Any]) -> list[str]:
    """Every target beside its measurement."""
    lines = ["| target | wanted | measured | |", "|---|---|---|---|"]
    all_rows = [row for section in sections.values() for row in section["rows"]]
    for t in TARGETS:
        reached = [row["reaches"][t.key] for row in all_rows if t.key in row.get("reaches", {})]
        measured = "not measured"
        outcome = ""
        if reached:
            measured = f"{value(min(reached))}{t.unit}"
            outcome = "reached" if min(reached) >= t.least else "**missed**"
        if len(reached) > 1:
            measured += f" (the worst of {len(reached)})"
        lines.append(f"| {t.says} | ≥ {t.least:g}{t.unit} | {measured} | {outcome} |")
    return lines


NOT_RUN = (
    "**Not yet run on a device.** `make bench-gpu` measures all of this where there is one, and writes this page."
)
EXPLANATION = (
    "Sides of a row took turns in one process; `a / b` is the median of paired rounds of a's time over b's, "
    "[its quartiles]."
)


def report(results: dict[str, Any]) -> str:
    """The whole page; without results, the targets and a sentence that nothing was measured."""
    sections = results.get("sections", {})
    lines = ["# tinyft on a GPU", ""]
    if not sections:
        lines.append(NOT_RUN)
    else:
        environment = sections.get("environment", {"rows": []})
        machine = {row["what"]: row.get("value") for row in environment["rows"]}
        device = machine.get("device", "a device that is not known")
        lines.append(f"{results.get('date', '')}: {device}. `make bench-gpu` writes this page.")
        lines.append(EXPLANATION)
    lines += ["", "## Targets", "", *targets(sections), ""]
    for name, section in sections.items():
        lines += [f"## {TITLES.get(name, name)}", "", *section_lines(section)]
    return "\n".join(lines)


def section_lines(section: dict[str, Any]) -> list[str]:
    """The table of a section, its failures and its duration."""
    lines = []
    good = [row for row in section["rows"] if "error" not in row]
    if good:
        lines += [*table(good), ""]
    failed = [f"{row.get('what', '')}: {row['error']}" for row in section["rows"] if "error" in row]
    if section["error"]:
        failed.append(section["error"])
    if failed:
        lines += [*(f"- **failed**, {value(text)}" for text in failed), ""]
    return [*lines, f"({section['seconds']:g} s)", ""]

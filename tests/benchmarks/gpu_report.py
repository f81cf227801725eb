"""results/gpu.md, from what gpu.py measured: the targets first, then a table for each section, whatever its rows hold."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

TITLES = {
    "environment": "The machine",
    "bandwidth": "Bytes per second",
    "agreement": "The CPU and the GPU learn the same",
    "kernels": "Kernels: each is its definition, and its time over the bytes that must move at the rate of a copy (time on the device alone)",
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
    "What was asked for: rows that say `reaches: {key: number}` are held to it, the worst of them counts."
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
    "A cell: three digits of a number; a ratio as median [quartiles]."
    if isinstance(x, dict):
        return f"{value(x['ratio'])} [{value(x['low'])}, {value(x['high'])}]"
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        return "yes" if x is True else "**no**" if x is False else "" if x is None else str(x).replace("|", "/").replace("\n", " ")
    if isinstance(x, int) or x == 0 or not math.isfinite(x):
        return f"{x:,}" if isinstance(x, int) else f"{x:g}"
    return f"{x:.1e}" if abs(x) < 1e-3 else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def line(row: dict[str, Any]) -> str:
    "A row as it is printed while the script runs."
    cells = "   ".join(f"{k} {value(v)}" for k, v in row.items() if k not in HIDDEN and v is not None)
    return f"{row.get('what', '')}   {'ERROR ' + row['error'] if 'error' in row else cells}"


def table(rows: list[dict[str, Any]]) -> list[str]:
    "One column for each name that any row has, in the order of their first appearance."
    names = list(dict.fromkeys(k for r in rows for k in r if k not in HIDDEN))
    out = [f"| {' | '.join(['', *names])} |", "|" + "---|" * (len(names) + 1)]
    return out + [f"| {' | '.join([str(r.get('what', '')), *(value(r.get(n)) for n in names)])} |" for r in rows]


def targets(sections: dict[str, Any]) -> list[str]:
    "Every target beside what was measured."
    out = ["| target | wanted | measured | |", "|---|---|---|---|"]
    for t in TARGETS:
        got = [r["reaches"][t.key] for s in sections.values() for r in s["rows"] if t.key in r.get("reaches", {})]
        measured = f"{value(min(got))}{t.unit}" + (f" (the worst of {len(got)})" if len(got) > 1 else "") if got else "not measured"
        out.append(f"| {t.says} | ≥ {t.least:g}{t.unit} | {measured} | {'' if not got else 'reached' if min(got) >= t.least else '**missed**'} |")
    return out


def report(results: dict[str, Any]) -> str:
    "The whole page.  Of nothing: what is still to be measured."
    sections = results.get("sections", {})
    machine = {r["what"]: r.get("value") for r in sections.get("environment", {}).get("rows", [])}
    lines = ["# tinyft on a GPU", ""]
    if not sections:
        lines += ["**Not yet run on a device.** `make bench-gpu` measures all of this where there is one, and writes this page.", ""]
    else:
        lines += [f"{results.get('date', '')}: {machine.get('device', 'a device that is not known')}. `make bench-gpu` writes this page.",
                  "Sides of a row took turns in one process; `a / b` is the median of paired rounds of a's time over b's, [its quartiles].", ""]
    lines += ["## Targets", "", *targets(sections), ""]
    for name, s in sections.items():
        lines += [f"## {TITLES.get(name, name)}", ""]
        good = [r for r in s["rows"] if "error" not in r]
        lines += [*table(good), ""] if good else []
        failed = [f"{r.get('what', '')}: {r['error']}" for r in s["rows"] if "error" in r] + ([s["error"]] if s["error"] else [])
        lines += [f"- **failed**, {value(f)}" for f in failed] + [""] * bool(failed)
        lines += [f"({s['seconds']:g} s)", ""]
    return "\n".join(lines)

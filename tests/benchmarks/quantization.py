"""The table bits x method x group x model -> perplexity, bytes, seconds, and its picture.

    python tests/benchmarks/quantization.py [--models base-gpt,SmolLM2-135M] [--only rtn,gptq]

Each model is loaded anew for every row, compressed, and measured on held-out text. Rows that are in
results/quantization.json for the same model and the same protocol are kept unless --again is given; the table
results/quantization.md and the picture results/quantization.png are made from all rows.

Protocol: held-out prose of the snapshot (no module of it was in pretraining or calibration), one text, windows without
overlap, perplexity pooled over all predicted tokens. Calibration: windows of training prose. The dense row of SmolLM2
is its 4-bit file, decompressed: what is lost is measured from there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench import machine

import tinyft as ft
from tinyft.compress import Rule

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / "work/real/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Model:
    """A model of the table, and the protocol of its measurement.

    length       tokens of a window, in the test and in calibration
    test, calibration   the numbers of windows"""

    path: str
    length: int
    test: int
    calibration: int

    def load(self) -> tuple[ft.Module, Any]:
        """(model, tokenizer), dense float32."""
        return ft.load(self.path)


MODELS = {
    "base-gpt-small": Model("base-gpt-small", 128, 512, 256),
    "base-gpt": Model("base-gpt", 128, 512, 256),
    "base-gpt-large": Model("base-gpt-large", 128, 512, 256),
    "SmolLM2-135M": Model(str(SMOLLM2), 512, 24, 32),
}
GROUP = 64
# name of a row -> (bits, rule). The rules of one family are compared at equal bits.
RULES: dict[str, tuple[int, Callable[[], Rule]]] = {
    **{f"rtn-{b}": (b, lambda b=b: ft.RTN(bits=b, group=GROUP)) for b in (8, 4, 3, 2)},
    **{f"rtn-{b}-row": (b, lambda b=b: ft.RTN(bits=b, group=None)) for b in (8, 4, 3)},
    "ternary": (2, lambda: ft.RTN(bits=2, group=GROUP, grid="ternary")),
    "sign": (1, lambda: ft.RTN(bits=1, group=GROUP, grid="sign")),
    **{f"gptq-{b}": (b, lambda b=b: ft.GPTQ(bits=b, group=GROUP)) for b in (4, 3, 2)},
    **{f"gptq-{b}-row": (b, lambda b=b: ft.GPTQ(bits=b, group=None)) for b in (4, 3)},
    "gptq-3-order": (3, lambda: ft.GPTQ(bits=3, group=GROUP, act_order=True)),
}


def text_tokens(split: str, tokenizer: Any) -> np.ndarray:
    """The prose of a split as one sequence of tokens."""
    return ft.data.pretraining("prose", split, tokenizer)


def windows(tokens: np.ndarray, length: int, count: int) -> np.ndarray:
    """`count` windows at equal distances in the text (or all, if it has fewer), (count, length)."""
    rows = ft.data.windows(tokens, length)
    count = min(count, len(rows))
    return rows[np.arange(count) * len(rows) // count]


def measure(model: ft.Module, chosen: Model, tokenizer: Any) -> ft.CorpusPerplexity:
    """The perplexity of the model on the test windows of its protocol."""
    rows = windows(text_tokens("test", tokenizer), chosen.length, chosen.test)
    return ft.corpus_perplexity(model, rows.reshape(-1), chosen.length)


def measure_row(chosen: Model, rule: Rule | None) -> dict[str, Any]:
    """One row: the model, compressed by the rule (None: dense), measured."""
    model, tokenizer = chosen.load()
    row: dict[str, Any] = {"seconds": 0.0}
    if rule is not None:
        batches = None
        if rule.needs_hessian:
            rows = windows(text_tokens("train", tokenizer), chosen.length, chosen.calibration)
            batches = [rows[i:i + 8] for i in range(0, len(rows), 8)]
        start = time.perf_counter()
        reports = ft.compress(model, rule, batches)
        row["seconds"] = time.perf_counter() - start
        row["bytes"] = sum(report.after for report in reports)
        row["bits_per_weight"] = 32 * row["bytes"] / sum(report.before for report in reports)
        row["layer_error"] = float(np.mean([report.error for report in reports]))
        row["rule"] = repr(rule)
    found = measure(model, chosen, tokenizer)
    return {**row, "perplexity": found.perplexity, "loss": found.loss, "tokens": found.tokens}


# ---------------------------------------------------------------------------------------------------- the report
def page(data: dict[str, Any]) -> str:
    """results/quantization.md."""
    lines = ["# Perplexity after compression of all linear maps of the blocks", ""]
    lines += [__doc__.split("Protocol: ")[1].strip(), ""]
    for name, section in data.items():
        m = section["machine"]
        dense = section["rows"].get("dense")
        if dense is None:
            continue
        lines += [f"## {name}", ""]
        lines += [f"Dense: {dense['perplexity']:.3f} ({dense['tokens']:,} tokens predicted, "
                  f"windows of {section['length']}). {m['cpu']}, {m['cores']} cores, {m['date']}, "
                  f"commit {m['commit']}.", ""]
        lines += ["| rule | bits | bits per weight, scales included | perplexity | times dense | mean layer error | "
                  "seconds |", "|---|---|---|---|---|---|---|"]
        for key, row in section["rows"].items():
            if key == "dense":
                continue
            ratio = row["perplexity"] / dense["perplexity"]
            lines.append(f"| {key} | {row['bits']} | {row['bits_per_weight']:.2f} | {row['perplexity']:.2f} | "
                         f"{ratio:.3f} | {row['layer_error']:.4f} | {row['seconds']:.1f} |")
        lines.append("")
    return "\n".join(lines)


def draw(data: dict[str, Any], path: Path) -> None:
    """The perplexity after compression over the dense one, against bits: one line for a family and a model."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    shown = {name: section for name, section in data.items() if "dense" in section["rows"]}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for ax, family, title in zip(axes, ("rtn", "gptq"), ("round-to-nearest", "GPTQ")):
        for name, section in shown.items():
            dense = section["rows"]["dense"]["perplexity"]
            bits = [b for b in (2, 3, 4, 8) if f"{family}-{b}" in section["rows"]]
            ratios = [section["rows"][f"{family}-{b}"]["perplexity"] / dense for b in bits]
            ax.plot(bits, ratios, marker="o", label=name)
        ax.set_title(f"{title}, groups of {GROUP}")
        ax.set_xlabel("bits")
        ax.set_xticks([2, 3, 4, 8])
        ax.set_yscale("log")
    axes[0].set_ylabel("perplexity / dense perplexity")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measure the rows that are asked for and missing, and write the files after each."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--models", default=",".join(MODELS), help="names, with commas between them")
    p.add_argument("--only", default="", help="only rows whose names begin with one of these")
    p.add_argument("--again", action="store_true", help="measure rows that are there already")
    options = p.parse_args()
    file = RESULTS / "quantization.json"
    data = json.loads(file.read_text()) if file.exists() else {}
    for name in options.models.split(","):
        chosen = MODELS[name]
        if chosen.path.endswith(".gguf") and not Path(chosen.path).exists():
            print(f"{name} is not there: make real-assets fetches it")
            continue
        section = data.setdefault(name, {"rows": {}})
        section |= {"length": chosen.length, "calibration": chosen.calibration, "machine": machine()}
        wanted = {"dense": (32, None), **RULES}
        for key, (bits, make) in wanted.items():
            is_wanted = key == "dense" or key.startswith(tuple(options.only.split(",")))
            if not is_wanted or (key in section["rows"] and not options.again):
                continue
            row = {"bits": bits, **measure_row(chosen, None if make is None else make())}
            section["rows"][key] = row
            assert math.isfinite(row["perplexity"])
            print(f"{name:16} {key:14} perplexity {row['perplexity']:9.3f}  {row['seconds']:6.1f} s", flush=True)
            file.write_text(json.dumps(data, indent=1) + "\n")
    (RESULTS / "quantization.md").write_text(page(data))
    draw(data, RESULTS / "quantization.png")


if __name__ == "__main__":
    main()

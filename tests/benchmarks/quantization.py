"""The table bits x method x group x model -> perplexity, bytes, seconds, and its picture.

    python tests/benchmarks/quantization.py [--models base-gpt,SmolLM2-135M] [--only rtn,gptq] [--again]

Each model is loaded anew for every row, compressed, and measured on held-out text. Rows that are in
results/quantization.json are kept unless --again is given. The table results/quantization.md and the picture
results/quantization.png are made from all rows.

Protocol: held-out prose of the snapshot, of modules that neither pretraining nor calibration saw; windows of one
length without overlap; the losses of all predicted tokens are added before the exponential. An interval is that of a
bootstrap over parts of the text (95 %), in which the dense and the compressed model are compared on the same parts.
Calibration: windows of training prose. SmolLM2 comes from a file of 4 bits: its dense row is that file, decompressed,
and what compression costs is counted from there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench import machine

import tinyft as ft
from tinyft.compare.figure import plain
from tinyft.compress import Rule

RESULTS = Path(__file__).parent / "results"
FILE = RESULTS / "quantization.json"
PARTS = 8  # of the test text, for the bootstrap
MEASURED: set[tuple[str, str]] = set()  # (model, rule) of the rows that this process measured
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
    "SmolLM2-135M": Model(str(SMOLLM2), 512, 16, 32),
}
GROUP = 64
# name of a row -> (bits, rule). The rules of one family are compared at equal bits.
RULES: dict[str, tuple[int, Callable[[], Rule]]] = {
    **{f"rtn-{b}": (b, lambda b=b: ft.RTN(bits=b, group=GROUP)) for b in (8, 4, 3, 2)},
    **{f"rtn-{b}-row": (b, lambda b=b: ft.RTN(bits=b, group=None)) for b in (8, 4, 3)},
    "ternary": (2, lambda: ft.RTN(bits=2, group=GROUP, grid="ternary")),
    "sign": (1, lambda: ft.RTN(bits=1, group=GROUP, grid="sign")),
    "nf4": (4, lambda: ft.NF4()),
    **{f"gptq-{b}": (b, lambda b=b: ft.GPTQ(bits=b, group=GROUP)) for b in (4, 3, 2)},
    **{f"gptq-{b}-row": (b, lambda b=b: ft.GPTQ(bits=b, group=None)) for b in (4, 3)},
    "gptq-1-sign": (1, lambda: ft.GPTQ(bits=1, group=GROUP, grid="sign")),
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


def measure(model: ft.Module, chosen: Model, tokenizer: Any) -> list[float]:
    """The mean loss on each part of the test text, in nats per predicted token; all parts are of one size."""
    rows = windows(text_tokens("test", tokenizer), chosen.length, chosen.test)
    parts = np.split(rows, PARTS)
    return [ft.corpus_perplexity(model, part.reshape(-1), chosen.length).loss for part in parts]


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
    row["losses"] = measure(model, chosen, tokenizer)
    row["perplexity"] = math.exp(min(float(np.mean(row["losses"])), 700))
    assert math.isfinite(row["perplexity"])
    return row


def ratio(row: dict[str, Any], dense: dict[str, Any]) -> dict[str, float]:
    """{ratio, low, high}: perplexity over the dense model's, with a 95 % interval of a bootstrap over the parts."""
    difference = np.array(row["losses"]) - np.array(dense["losses"])
    rng = np.random.default_rng(0)
    means = difference[rng.integers(0, len(difference), (2000, len(difference)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"ratio": float(np.exp(difference.mean())), "low": float(np.exp(low)), "high": float(np.exp(high))}


def ratios(rows: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{rule: ratio to the dense row, with its interval} of the rows of one model."""
    return {key: ratio(row, rows["dense"]) for key, row in rows.items() if key != "dense"}


def ratio_table(found: dict[str, dict[str, dict[str, float]]], keys: Iterable[str]) -> list[str]:
    """Lines of Markdown: a line for each rule, a column for each model, perplexity over the dense one (95 %)."""
    lines = ["| perplexity / dense | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for key in keys:
        cells = [f"{r[key]['ratio']:.3f} ({r[key]['low']:.3f}-{r[key]['high']:.3f})" for r in found.values()]
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return lines


def unigram(name: str) -> float:
    """The perplexity of a model that knows only the frequencies of the tokens in training prose."""
    chosen = MODELS[name]
    model, tokenizer = chosen.load()
    test = windows(text_tokens("test", tokenizer), chosen.length, chosen.test)
    return ft.data.baselines.unigram_perplexity(text_tokens("train", tokenizer), test[:, 1:], model.config.vocab)


# ---------------------------------------------------------------------------------------------------- the rows
def available(names: Iterable[str]) -> list[str]:
    """Those of the models that are on this machine."""
    return [name for name in names if Path(MODELS[name].path).exists() or "/" not in MODELS[name].path]


def read_data() -> dict[str, Any]:
    """{model: {"length", "calibration", "machine", "rows": {rule: row}}} of all measurements so far."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def rows_of(names: Iterable[str], keys: Iterable[str], again: bool = False) -> dict[str, dict[str, Any]]:
    """{model: {rule: row}} of models that are available, the dense row among them; missing rows are measured.

    again: rows of earlier processes are measured again, too."""
    data = read_data()
    found = {}
    for name in available(names):
        chosen = MODELS[name]
        section = data.setdefault(name, {"rows": {}})
        section |= {"length": chosen.length, "calibration": chosen.calibration, "machine": machine()}
        for key in ("dense", *keys):
            if key in section["rows"] and (not again or (name, key) in MEASURED):
                continue
            bits, make = (32, None) if key == "dense" else RULES[key]
            row = {"bits": bits, **measure_row(chosen, None if make is None else make())}
            section["rows"][key] = row
            MEASURED.add((name, key))
            print(f"{name:16} {key:14} perplexity {row['perplexity']:9.3f}  {row['seconds']:6.1f} s", flush=True)
            FILE.write_text(json.dumps(data, indent=1) + "\n")
        found[name] = section["rows"]
    return found


# ---------------------------------------------------------------------------------------------------- the report
def page(data: dict[str, Any]) -> str:
    """results/quantization.md."""
    lines = ["# Perplexity after compression of all linear maps of the blocks", ""]
    lines += [__doc__.split("\n\n")[3].replace("\n", " "), ""]
    for name, section in data.items():
        m = section["machine"]
        dense = section["rows"]["dense"]
        lines += [f"## {name}", ""]
        lines += [f"Dense: perplexity {dense['perplexity']:.2f}, windows of {section['length']} tokens. {m['cpu']}, "
                  f"{m['cores']} cores, {m['date']}, commit {m['commit']}.", ""]
        lines += ["| rule | bits | bits per weight, scales included | MB | perplexity | times dense (95 %) | "
                  "mean error of a layer | seconds |", "|---|---|---|---|---|---|---|---|"]
        for key in RULES:
            if key in section["rows"]:
                row = section["rows"][key]
                r = ratio(row, dense)
                lines.append(f"| {key} | {row['bits']} | {row['bits_per_weight']:.2f} | {row['bytes'] / 1e6:.2f} | "
                             f"{row['perplexity']:.2f} | {r['ratio']:.3f} ({r['low']:.3f}-{r['high']:.3f}) | "
                             f"{row['layer_error']:.4f} | {row['seconds']:.1f} |")
        lines.append("")
    return "\n".join(lines)


def draw(data: dict[str, Any], path: Path) -> None:
    """What compression adds to the perplexity, in units of the dense model's, against bits: a line for a model."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter
    shown = {name: section for name, section in data.items() if "dense" in section["rows"]}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True, sharey=True, layout="constrained")
    for ax, family, title in zip(axes, ("rtn", "gptq"), ("round-to-nearest", "GPTQ")):
        for name, section in shown.items():
            dense = section["rows"]["dense"]["perplexity"]
            bits = [b for b in (2, 3, 4) if f"{family}-{b}" in section["rows"]]
            added = [section["rows"][f"{family}-{b}"]["perplexity"] / dense - 1 for b in bits]
            ax.plot(bits, added, marker="o", label=name)
        ax.set_title(f"{title}, groups of {GROUP}")
        ax.set_xlabel("bits")
        ax.set_xticks([2, 3, 4])
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(plain))
    axes[0].set_ylabel("perplexity / dense perplexity − 1")
    axes[1].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report() -> None:
    """Write the table and the picture of all rows."""
    data = read_data()
    (RESULTS / "quantization.md").write_text(page(data))
    draw(data, RESULTS / "quantization.png")


def main() -> None:
    """Measure the rows that are asked for and missing, and write the files after each."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--models", default=",".join(MODELS), help="names, with commas between them")
    p.add_argument("--only", default="", help="only rows whose names begin with one of these")
    p.add_argument("--again", action="store_true", help="measure rows that are there already")
    options = p.parse_args()
    keys = [key for key in RULES if key.startswith(tuple(options.only.split(",")))]
    rows_of(options.models.split(","), keys, options.again)
    report()


if __name__ == "__main__":
    main()

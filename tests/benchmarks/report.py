"""results/cpu.md and results/scaling.png, written from what bench.py measured."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any

NAMES = {"lora_qv": "LoRA (q, v)", "lora_all": "LoRA (all linear maps)", "bitfit": "BitFit", "houlsby": "Houlsby adapters", "prefix": "prefix",
         "head": "head only", "full": "full"}
# what was asked for: of PyTorch's time (anywhere, at tiny), of the floor's, of PEFT's; and of tinyft's own full step
STEP, TINY, FLOOR, PEFT, QV, HEAD = 1.0, 1.2, 1.15, 1.3, 0.72, 0.40


def table(head: list[str], rows: list[list[Any]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(map(str, r)) + " |" for r in rows), ""]


def spread(r: dict[str, float] | None, bound: float | None = None, least: bool = True) -> str:
    "median (quartiles), with a mark where a bound was asked for."
    if r is None:
        return ""
    mark = "" if bound is None else " ✓" if (r["ratio"] >= bound if least else r["ratio"] <= bound) else " ✗"
    return f"{r['ratio']:.2f} ({r['low']:.2f}-{r['high']:.2f}){mark}"


def inverse(r: dict[str, float]) -> dict[str, float]:
    return {"ratio": 1 / r["ratio"], "low": 1 / r["high"], "high": 1 / r["low"], "rounds": r["rounds"]}


def ms(s: float | None) -> str:
    return "" if s is None else f"{s * 1e3:.3g} ms" if s < 1 else f"{s:.2f} s"


def about(section: dict[str, Any]) -> str:
    m = section["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
    return f"*{m['date']}, commit {m['commit']}; {m['cpu']}, {m['cores']} cores, {m['system']}, Python {m['python']}; {versions}.*\n"


def steps(rows: list[dict]) -> list[str]:
    out = []
    for r in rows:
        ours, bound = r["seconds"]["tinyft"], TINY if r["case"] == "tiny" else STEP
        floor = inverse(r["ratios"]["floor"])
        asked = FLOOR if r["threads"] == 1 and r["case"] in ("mid", "wide") else None
        avx2 = r.get("avx2", {})
        out.append([r["case"], r["threads"], ms(ours), spread(r["ratios"].get("torch"), bound), spread(floor, asked, least=False),
                    f"{avx2['torch']:.2f}" if "torch" in avx2 else "", f"{1 / avx2['floor, AVX2']:.2f}" if avx2 else ""])
    return table(["case", "threads", "tinyft", "PyTorch / tinyft", "tinyft / floor", "PyTorch / tinyft, AVX2", "tinyft / floor, AVX2"], out)


def others(rows: list[dict]) -> list[str]:
    return table(["case", "peer", "tinyft", "peer / tinyft"], [[r["case"], k, ms(r["seconds"]["tinyft"]), spread(v)]
                                                                  for r in rows for k, v in r["ratios"].items()])


def methods(rows: list[dict]) -> list[str]:
    out = []
    for r in rows:
        m = r["method"]
        own = inverse(r["ratios"]["full"])
        out.append([r["case"], r["threads"], NAMES[m], ms(r["seconds"]["tinyft"]), spread(r["ratios"].get("torch"), PEFT if "lora" in m else None),
                    spread(own, {"lora_qv": QV, "head": HEAD}.get(m), least=False)])
    return table(["case", "threads", "method", "tinyft", "PyTorch / tinyft", "of tinyft's full step"], out)


def memories(rows: list[dict]) -> list[str]:
    mb = lambda b: "" if b is None else f"{b / 1e6:.0f} MB"
    return table(["case", "method", "tinyft", "PyTorch", ""], [
        [r["case"], NAMES[r["method"]], mb(r["bytes"]["tinyft"]), mb(r["bytes"].get("torch")),
         "" if "torch" not in r["bytes"] else "✓" if r["bytes"]["tinyft"] <= r["bytes"]["torch"] else "✗"] for r in rows])


def small(rows: list[dict]) -> list[str]:
    unit = {"op": ("a recorded op on three numbers", lambda s: f"{s * 1e3:.2f} µs"), "import": ("python -c import", ms),
            "generate": ("a token, KV cache, 6 layers of 256", lambda s: f"{s / 64 * 1e3:.2f} ms ({64 / s:.0f} tokens/s)"),
            "load": ("loading 100 MB", ms)}
    return table(["", "tinyft", "peer", "peer's time", "peer / tinyft"], [
        [unit[r["case"]][0], unit[r["case"]][1](r["seconds"]["tinyft"]), "PyTorch" if r["peer"] == "torch" else "transformers",
         unit[r["case"]][1](r["seconds"][k]), spread(v)] for r in rows for k, v in r["ratios"].items()])


def slopes(rows: list[dict]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    found: dict[str, dict[str, list]] = {}
    for r in rows:
        for what in ("seconds", "bytes"):
            if r[what]:
                found.setdefault(r["case"], {}).setdefault(what, []).append((r["size"], r[what]))
    return found


def power(points: list[tuple[float, float]]) -> float:
    "The slope between the last two sizes but one and the last, on logarithmic axes: the power it grows with."
    (x0, y0), (x1, y1) = points[-3], points[-1]
    return math.log(y1 / y0) / math.log(x1 / x0)


def scaling(rows: list[dict]) -> list[str]:
    expected = {"batch B": "1 and 1", "width C": "1 to 2 (products C², the rest C) and 1 to 2", "depth L": "1 and 1",
                "length T": "1 to 2 (attention T²) and 1: scores are not stored",
                "ops in the graph": "1; with Python's garbage collector off it is 1.2, of which the cache is the rest"}
    out = [[axis, f"{p[0][0]} to {p[-1][0]}", f"{power(p):.2f}", f"{power(d['bytes']):.2f}" if "bytes" in d else "", expected[axis]]
           for axis, d in slopes(rows).items() for p in [d["seconds"]]]
    return [*table(["what grows", "from, to", "power of time", "power of memory", "expected"], out),
            "![time and memory as a size grows](scaling.png)", ""]


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    found = slopes(rows)
    fig, axes = plt.subplots(2, len(found), figsize=(3.2 * len(found), 5.4), sharey="row", layout="constrained")
    for column, (axis, d) in zip(axes.T, found.items()):
        for a, (what, unit, name) in zip(column, (("seconds", 1e3, "ms a step"), ("bytes", 1e-6, "MB above the model"))):
            if what not in d:
                a.axis("off")
                continue
            x, y = zip(*d[what])
            a.loglog(x, [v * unit for v in y], "o-", color="#4477aa", lw=1.5, ms=4)
            a.annotate(f"power {power(d[what]):.2f}", (0.06, 0.9), xycoords="axes fraction")
            a.set(xlabel=axis, ylabel=name if axis == next(iter(found)) else "")
            a.set_xticks(x, [f"{n:,}" for n in x], minor=False, rotation=30 if max(x) > 9999 else 0)
            a.minorticks_off()
            a.grid(alpha=0.25)
    fig.suptitle("A training step of tinyft (GPT, 2 layers of 128, batch 4 × 128 tokens, 1 thread) as one size grows")
    fig.savefig(path, dpi=110)
    plt.close(fig)


TEXT = {
    "steps": ("A whole training step: forward, backward, AdamW", """
PyTorch: a plain model with SDPA, one product for q, k, v, and fused AdamW.  The floor: only the matrix products a step cannot avoid, by
NumPy, into memory that is already there.  Ratios are medians of paired rounds with their quartiles; above 1 tinyft is faster.  Asked for:
at least 1.0 of PyTorch everywhere, 1.2 at tiny; at most 1.15 of the floor at mid and wide on one thread.

Every library runs as its wheels choose: here NumPy's OpenBLAS takes its AVX-512 kernels.  The last two columns hold OpenBLAS to AVX2
(OPENBLAS_CORETYPE=Haswell), tinyft and the floor alike; PyTorch's library is as before.

What is missed, and why.  tiny on two threads: a millisecond of its five is Python between the kernels, which PyTorch has in C++, and its arrays
are too small to be worth handing over to a second thread (tried: slower).  wide against the floor: AdamW alone reads and writes 28 bytes for
each of 18 million numbers, 0.09 of the floor, at the speed of memory; with AVX2's slower products the same step is within 1.15.
"""),
    "others": ("Other autograd libraries", ""),
    "methods": ("Fine-tuning steps", """
PyTorch does the same: LoRA is PEFT's, put into the plain model (q, k, v apart); the others are written by hand.  Asked for: LoRA at least
1.3 of PEFT's; LoRA (q, v) at most 0.72 and head only at most 0.40 of tinyft's own full step.

What is missed, and why: LoRA saves the products that give the gradients of weights, and their update.  At mid these are 0.22 and 0.02 of the
full step, so 0.76 is what is left if the branch cost nothing (PyTorch and PEFT: 0.76); attention and GELU cost what they cost before.
"""),
    "memories": ("Peak memory of a step", """
How far the process grows, at most, during its first three steps, above what it held with the model alone; AdamW's two moments are taken off on
both sides.  PyTorch's figure holds some 90 MB that its libraries take at their first use, whatever the size.
"""),
    "small": ("What does not grow with the model", ""),
    "scaling": ("As a size grows", ""),
}


def write(data: dict[str, Any], out: Path) -> None:
    lines = ["# tinyft on the CPU, beside its peers", "",
             "Written by `make bench`; what was tried and what it gave stands in [LOG.md](../LOG.md).", ""]
    for name, (title, text) in TEXT.items():
        if name in data:
            lines += [f"## {title}", text.strip("\n"), "", *globals()[name](data[name]["rows"]), about(data[name])]
    (out / "cpu.md").write_text("\n".join(lines).rstrip() + "\n")
    if "scaling" in data:
        draw(data["scaling"]["rows"], out / "scaling.png")

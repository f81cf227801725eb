"""results/cpu.md and results/scaling.png, written from the measurements of bench.py."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from machine import place

NAMES = {
    "lora_qv": "LoRA (q, v)",
    "lora_all": "LoRA (all linear maps)",
    "bitfit": "BitFit",
    "houlsby": "Houlsby adapters",
    "prefix": "prefix",
    "head": "head only",
    "full": "full",
}
NUMPY = "tinyft, NumPy"  # the side of tinyft without compiled kernels
# The targets, at every case and number of threads.
STEP = 1.0  # PyTorch's time over tinyft's, at least
COMPILED = 1.0  # torch.compile's time over tinyft's, at least
PLAIN = 0.85  # PyTorch's time over that of tinyft with NumPy's kernels alone, at least
PEFT = 1.15  # PEFT's time over tinyft's, at least
EQUAL = 1.05  # two times are equal if neither is more than this times the other
CORES = (4, 8)  # for which Amdahl's law is worked out


def table(head: list[str], rows: list[list[Any]]) -> list[str]:
    """A Markdown table, as lines."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return [*lines, ""]


def spread(r: dict[str, float] | None, at_least: float | None = None, at_most: float | None = None) -> str:
    """median (quartiles), with a mark if there is a target."""
    if r is None:
        return ""
    text = f"{r['ratio']:.2f} ({r['low']:.2f}-{r['high']:.2f})"
    if at_least is not None:
        text += " ✓" if r["ratio"] >= at_least else " ✗"
    if at_most is not None:
        text += " ✓" if r["ratio"] <= at_most else " ✗"
    return text


def inverse(r: dict[str, float]) -> dict[str, float]:
    """The ratio the other way round."""
    return {"ratio": 1 / r["ratio"], "low": 1 / r["high"], "high": 1 / r["low"], "rounds": r["rounds"]}


def duration(seconds: float) -> str:
    """Seconds as text, in ms below one second."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def about(section: dict[str, Any]) -> str:
    """The machine and the versions of a section's measurements, and the rows that are from an earlier measurement."""
    m = section["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    older = ""
    for measured, count in Counter(row["measured"] for row in section.get("rows", ()) if "measured" in row).items():
        older += f" Earlier, {measured}: {count} row{'s' * (count > 1)}."
    return f"*{m['date']}, commit {m['commit']}; {place(m)}; {versions}.{older}*\n"


# ---------------------------------------------------------------------------------------------------- the sections
def steps(rows: list[dict]) -> list[str]:
    """Training steps beside the peers, the matrix products alone, and Amdahl's law."""
    return [*step_times(rows), *step_products(rows), *more_cores(rows)]


def step_times(rows: list[dict]) -> list[str]:
    """The table of training steps beside PyTorch, torch.compile and JAX."""
    lines = []
    for row in rows:
        seconds = row["seconds"]
        ratios = row["ratios"]
        numpy = duration(seconds[NUMPY]) if NUMPY in seconds else ""
        torch = spread(ratios.get("torch"), at_least=STEP)
        compiled = spread(ratios.get("torch_compile"), at_least=COMPILED)
        jax = spread(ratios.get("jax"))
        plain = spread(row.get("further", {}).get(f"torch / {NUMPY}"), at_least=PLAIN)
        lines.append([row["case"], row["threads"], duration(seconds["tinyft"]), numpy, torch, compiled, jax, plain])
    head = ["case", "threads", "tinyft", NUMPY, "PyTorch / tinyft", "torch.compile / tinyft", "JAX / tinyft"]
    return table([*head, f"PyTorch / {NUMPY}"], lines)


def step_products(rows: list[dict]) -> list[str]:
    """The matrix products of a step: their speed, and ratios without the difference of the two libraries."""
    lines = []
    for row in rows:
        rates = []
        for name in ("floor", "torch_floor"):
            if name in row["seconds"] and "operations" in row:
                rates.append(f"{row['operations'] / row['seconds'][name] / 1e9:.0f}")
        equal = row.get("equal_products", {})
        further = row.get("further", {})
        ratios = [
            inverse(row["ratios"]["floor"]),
            equal.get("tinyft"),
            equal.get(NUMPY),
            further.get("torch, AVX2 / tinyft, AVX2"),
            further.get("tinyft, AVX2 / floor, AVX2"),
        ]
        lines.append([row["case"], row["threads"], " / ".join(rates), *map(spread, ratios)])
    head = [
        "case",
        "threads",
        "products, NumPy / PyTorch, GFLOP/s",
        "tinyft / floor",
        "PyTorch / tinyft, equal products",
        f"PyTorch / {NUMPY}, equal products",
        "PyTorch / tinyft, AVX2",
        "tinyft / floor, AVX2",
    ]
    return [*compare_products(rows), *table(head, lines)]


def compare_products(rows: list[dict]) -> list[str]:
    """Sentences that say whether NumPy's and PyTorch's products of the cases take the same time."""
    faster = {"NumPy": [], "PyTorch": []}
    count = 0
    for row in rows:
        seconds = row["seconds"]
        if "torch_floor" not in seconds:
            continue
        count += 1
        share = seconds["floor"] / seconds["torch_floor"]  # above 1: PyTorch is faster
        if max(share, 1 / share) > EQUAL:
            faster["PyTorch" if share > 1 else "NumPy"].append((max(share, 1 / share), row))
    if count == 0:
        return []
    limit = f"{EQUAL - 1:.0%}".replace("%", " %")
    if not any(faster.values()):
        return [f"On this machine the products of both libraries are within {limit} of each other in all rows.", ""]
    lines = [f"On this machine the products of the two libraries are not within {limit} of each other in all rows."]
    for library, found in faster.items():
        if found:
            factor, row = max(found, key=lambda pair: pair[0])
            threads = "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
            most = f"most at {row['case']} on {threads} ({factor:.2f} times as fast)"
            lines.append(f"{library}'s are faster by more in {len(found)} of {count} rows, {most}.")
    return [*lines, ""]


def serial_share(one: float, two: float) -> float:
    """2 two / one - 1, at least 0: the share s of a step that a second core does not speed up, by Amdahl's law.

    one, two: seconds of the same step on one and on two threads;  two = one (s + (1 - s) / 2).
    """
    return max(0.0, 2 * two / one - 1)


def speedup(share: float, cores: int) -> float:
    """1 / (s + (1 - s) / n): how many times as fast n cores are as one, by Amdahl's law."""
    return 1 / (share + (1 - share) / cores)


def more_cores(rows: list[dict]) -> list[str]:
    """The table of serial shares, and of the speed that more cores would give."""
    times: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        for name in ("tinyft", NUMPY, "torch"):
            if name in row["seconds"]:
                times.setdefault((row["case"], name), {})[row["threads"]] = row["seconds"][name]
    lines = []
    for (case, name), seconds in times.items():
        if {1, 2} <= seconds.keys():
            share = serial_share(seconds[1], seconds[2])
            expected = [f"{speedup(share, n):.2f}" for n in CORES]
            library = "PyTorch" if name == "torch" else name
            lines.append([case, library, f"{seconds[1] / seconds[2]:.2f}", f"{share:.2f}", *expected])
    if not lines:
        return []
    head = ["case", "library", "1 thread / 2 threads", "serial share"]
    return [*AMDAHL_TEXT.strip().splitlines(), "", *table([*head, *(f"on {n} cores" for n in CORES)], lines)]


def others(rows: list[dict]) -> list[str]:
    """Other autograd libraries."""
    lines = []
    for row in rows:
        for peer, r in row["ratios"].items():
            lines.append([row["case"], peer, duration(row["seconds"]["tinyft"]), spread(r)])
    return table(["case", "peer", "tinyft", "peer / tinyft"], lines)


def methods(rows: list[dict]) -> list[str]:
    """Fine-tuning steps beside PyTorch and tinyft's own full step."""
    lines = []
    for row in rows:
        method = row["method"]
        torch = spread(row["ratios"].get("torch"), at_least=PEFT if "lora" in method else None)
        plain = spread(row.get("further", {}).get(f"torch / {NUMPY}"))
        own = spread(inverse(row["ratios"]["full"]))
        seconds = duration(row["seconds"]["tinyft"])
        lines.append([row["case"], row["threads"], NAMES[method], seconds, torch, plain, own])
    head = ["case", "threads", "method", "tinyft", "PyTorch / tinyft", f"PyTorch / {NUMPY}"]
    return table([*head, "of tinyft's full step"], lines)


def megabytes(size: float | None) -> str:
    """Bytes in MB, "" for None."""
    return "" if size is None else f"{size / 1e6:.0f} MB"


def memories(rows: list[dict]) -> list[str]:
    """Peak memory beside PyTorch."""
    lines = []
    for row in rows:
        own = row["bytes"]["tinyft"]
        torch = row["bytes"].get("torch")
        mark = ""
        if torch is not None:
            mark = "✓" if own <= torch else "✗"
        lines.append([row["case"], NAMES[row["method"]], megabytes(own), megabytes(torch), mark])
    return table(["case", "method", "tinyft", "PyTorch", ""], lines)


def per_op(seconds: float) -> str:
    """The time of one of 1,000 ops."""
    return f"{seconds * 1e3:.2f} µs"


def per_token(seconds: float) -> str:
    """The time of one of 64 tokens, and tokens per second."""
    return f"{seconds / 64 * 1e3:.2f} ms ({64 / seconds:.0f} tokens/s)"


def small(rows: list[dict]) -> list[str]:
    """Costs that do not grow with the model."""
    kinds = {
        "op": ("a recorded op on three numbers", per_op),
        "import": ("python -c import", duration),
        "generate": ("a token, KV cache, 6 layers of 256", per_token),
        "load": ("loading 100 MB", duration),
    }
    lines = []
    for row in rows:
        title, unit = kinds[row["case"]]
        peer = "PyTorch" if row["peer"] == "torch" else "transformers"
        for name, r in row["ratios"].items():
            lines.append([title, unit(row["seconds"]["tinyft"]), peer, unit(row["seconds"][name]), spread(r)])
    return table(["", "tinyft", "peer", "peer's time", "peer / tinyft"], lines)


NF4_SPEED = 200e6  # bytes of float32 a second, at least, on two cores


def nf4(rows: list[dict]) -> list[str]:
    """Encoding and decoding in NF4: bytes of float32 a second."""
    lines = []
    for row in rows:
        rate = row["bytes"] / row["seconds"]["tinyft"]
        mark = ""
        if row["threads"] == 2:
            mark = " ✓" if rate >= NF4_SPEED else " ✗"
        speed = f"{rate / 1e6:.0f} MB/s{mark}"
        lines.append([row["case"], row["threads"], speed, spread(row["ratios"].get("bitsandbytes"))])
    return table(["", "threads", "tinyft", "bitsandbytes / tinyft"], lines)


JOBS = {  # of a real checkpoint: title, the target of PyTorch / tinyft by number of threads
    "lora_step": ("LoRA step of SmolLM2, all positions labelled", {1: 1.0}),
    "lora_masked": ("LoRA step of SmolLM2, prompt masked", {1: 1.2}),
    "generate": ("64 tokens of SmolLM2, KV cache", {1: 1.0}),
    "embed": ("32 sentence vectors of MiniLM", {1: 1.0}),
}
PACKED = 0.65  # memory of training on packed weights over PyTorch's, at most


def real(rows: list[dict]) -> list[str]:
    """Real checkpoints: times beside transformers and PEFT, and peak memory."""
    times = []
    memory = []
    for row in rows:
        title, target = JOBS[row["case"]]
        seconds = row["seconds"]
        packed = duration(seconds["packed"]) if "packed" in seconds else ""
        torch = spread(row["ratios"].get("torch"), at_least=target.get(row["threads"]))
        times.append([title, row["threads"], duration(seconds["tinyft"]), packed, torch])
        if "bytes" in row:
            size = row["bytes"]
            marks = {}
            for name, limit in (("tinyft", 1.0), ("packed", PACKED)):
                share = size[name] / size["torch"] if "torch" in size else None
                mark = "" if share is None else f" ({share:.2f} {'✓' if share <= limit else '✗'})"
                marks[name] = megabytes(size[name]) + mark
            memory.append([title, marks["tinyft"], marks["packed"], megabytes(size.get("torch"))])
    head = ["", "threads", "tinyft", "tinyft, packed weights", "PyTorch / tinyft"]
    return [*table(head, times), *table(["peak memory", "tinyft", "packed weights", "PyTorch"], memory)]


LAYER = 1.0  # PyTorch's time of GPTQ over tinyft's, at least


def gptq(rows: list[dict]) -> list[str]:
    """GPTQ of one layer beside PyTorch."""
    lines = []
    for row in rows:
        torch = spread(row["ratios"].get("torch"), at_least=LAYER)
        lines.append([row["case"], row["threads"], duration(row["seconds"]["tinyft"]), torch])
    return table(["weight, out × in", "threads", "tinyft", "PyTorch / tinyft"], lines)


PACKED_SPEED = 0.6  # the float32 product's time over a 4-bit product's, at least; one row of x
PACKED_BYTES = 0.25  # bytes of a 4-bit weight over those of a float32 weight, at most


def packed(rows: list[dict]) -> list[str]:
    """Products with packed weights beside the product in float32: speed, and bytes that a product reads."""
    lines = []
    for row in rows:
        form = row["case"]
        is_target = row["size"] == 1 and form in ("RTN 4, g=64", "RTN 4, g=128", "NF4", "Q4_0", "Q4_1")
        speed = spread(inverse(row["ratios"][form]), at_least=PACKED_SPEED if is_target else None)
        size = row["bytes"]
        share = f"{size[form] / size['float32']:.3f}"
        if is_target:
            share += " ✓" if size[form] <= PACKED_BYTES * size["float32"] else " ✗"
        seconds = row["seconds"]
        rate = f"{size[form] / seconds[form] / 1e9:.1f} GB/s"
        lines.append([row["size"], row["threads"], form, duration(seconds[form]), speed, share, rate])
    return table(["rows of x", "threads", "weight", "a product", "float32's time / its time", "of float32's bytes",
                  "bytes read"], lines)


BEAM = 1.0  # transformers' time of a search with four beams over tinyft's, at least


def beam(rows: list[dict]) -> list[str]:
    """Beam search beside transformers."""
    lines = []
    for row in rows:
        beams = int(row["method"])
        other = spread(row["ratios"].get("torch"), at_least=BEAM if beams > 1 else None)
        lines.append([row["case"], beams, row["threads"], duration(row["seconds"]["tinyft"]), other])
    return table(["model", "beams", "threads", "tinyft", "transformers / tinyft"], lines)


Points = list[tuple[float, float]]


def curves(rows: list[dict]) -> dict[str, dict[str, Points]]:
    """{axis: {"seconds" or "bytes": (size, value) points}}."""
    found: dict[str, dict[str, Points]] = {}
    for row in rows:
        for quantity in ("seconds", "bytes"):
            if row[quantity]:
                points = found.setdefault(row["case"], {}).setdefault(quantity, [])
                points.append((row["size"], row[quantity]))
    return found


def power(points: Points) -> float:
    """The exponent of growth: the slope from the third last to the last point on logarithmic axes."""
    x0, y0 = points[-3]
    x1, y1 = points[-1]
    return math.log(y1 / y0) / math.log(x1 / x0)


EXPECTED = {
    "batch B": "1 and 1",
    "width C": "1 to 2 (products C², the rest C) and 1 to 2",
    "depth L": "1 and 1",
    "length T": "1 to 2 (attention T²) and 1: scores are not stored",
    "ops in the graph": "1; with Python's garbage collector off it is 1.2, of which the cache is the rest",
}


def scaling(rows: list[dict]) -> list[str]:
    """The exponents of growth, and the figure."""
    lines = []
    for axis, curve in curves(rows).items():
        seconds = curve["seconds"]
        sizes = f"{seconds[0][0]} to {seconds[-1][0]}"
        memory = f"{power(curve['bytes']):.2f}" if "bytes" in curve else ""
        lines.append([axis, sizes, f"{power(seconds):.2f}", memory, EXPECTED[axis]])
    head = ["what grows", "from, to", "power of time", "power of memory", "expected"]
    return [*table(head, lines), "![time and memory as a size grows](scaling.png)", ""]


def draw(rows: list[dict], path: Path) -> None:
    """Time and memory over each size, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = curves(rows)
    quantities = (("seconds", 1e3, "ms a step"), ("bytes", 1e-6, "MB above the model"))
    fig, axes = plt.subplots(2, len(found), figsize=(3.2 * len(found), 5.4), sharey="row", layout="constrained")
    for column, (axis, curve) in enumerate(found.items()):
        for row, (quantity, unit, label) in enumerate(quantities):
            ax = axes[row, column]
            if quantity not in curve:
                ax.axis("off")
                continue
            draw_curve(ax, curve[quantity], unit)
            ax.set(xlabel=axis, ylabel=label if column == 0 else "")
    fig.suptitle("A training step of tinyft (GPT, 2 layers of 128, batch 4 × 128 tokens, 1 thread) as one size grows")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def draw_curve(ax: Any, points: Points, unit: float) -> None:
    """One curve in one panel, with its exponent."""
    sizes = [size for size, _ in points]
    values = [value * unit for _, value in points]
    ax.loglog(sizes, values, "o-", color="#4477aa", lw=1.5, ms=4)
    ax.annotate(f"power {power(points):.2f}", (0.06, 0.9), xycoords="axes fraction")
    rotation = 30 if max(sizes) > 9999 else 0
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False, rotation=rotation)
    ax.minorticks_off()
    ax.grid(alpha=0.25)


STEPS_TEXT = """
PyTorch: a plain model with SDPA, one product for q, k, v, and fused AdamW. torch.compile: the same with forward and
backward compiled. JAX: one jitted step of the GPT. tinyft has its compiled kernels if Numba is among the versions
below; "tinyft, NumPy" has only the kernels in NumPy. Ratios are medians of paired rounds with their quartiles; above 1
tinyft is faster. The targets, in every row: at least 1.0 of PyTorch and of torch.compile; "tinyft, NumPy" at least 0.85
of PyTorch.

The floor: only the matrix products that a step needs, by NumPy, into memory allocated beforehand. PyTorch's products
have the same shapes and order. The columns "equal products" take the time of PyTorch's products from its step and add
the time of NumPy's products: (PyTorch - its products + NumPy's products) / tinyft. So they compare all the rest, as on
a machine where the products of both libraries take as long.

Every library runs with its own defaults. In the columns "AVX2" both libraries are held to AVX2:
OPENBLAS_CORETYPE=Haswell for tinyft and the floor, MKL_ENABLE_INSTRUCTIONS, ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY
for PyTorch, and NumPy's and Numba's own variables.
"""
AMDAHL_TEXT = """
Amdahl's law: a step of t1 on one thread and t2 on two has the serial share s = 2 t2 / t1 - 1, at least 0. Then n cores
would be 1 / (s + (1 - s) / n) times as fast as one. The times of 4 and 8 cores are not measured.
"""
METHODS_TEXT = """
PyTorch does the same: LoRA is PEFT's, put into the plain model (q, k, v apart); the others are written by hand.
"tinyft, NumPy" has only the kernels in NumPy. The target: LoRA at least 1.15 of PEFT's.
"""
MEMORIES_TEXT = """
The peak growth of the process during its first three steps, above its size with the model alone; AdamW's two moments
are subtracted on both sides. PyTorch's figure contains some 90 MB that its libraries take at their first use, at every
size.
"""
REAL_TEXT = """
SmolLM2-135M-Instruct from its GGUF file (dense float32, and with its 4-bit weights kept) and all-MiniLM-L6-v2; beside
them transformers with its default attention, and PEFT's LoRA. A step is r = 8 on q and v, batch 4 × 128. tinyft
computes logits only where a label stands, so a masked prompt saves the products of the output layer; PyTorch's side
computes all logits, as its Trainer does. Memory is the peak of the whole process, libraries and weights included.
"""
NF4_TEXT = """
A weight of 4096 × 4096, in bytes of its float32 form a second. The target, on two cores, is 200 MB/s. bitsandbytes is
its CPU backend.
"""
GPTQ_TEXT = """
The Hessian of 4,096 tokens and GPTQ at 4 bits, in groups of 128, with 1 % damping and blocks of 128 columns. PyTorch:
the plain algorithm as the paper's program has it, in float32, with three factorisations; it gives the rounded weight,
tinyft the packed one. The target: at least 1.0.
"""
PACKED_TEXT = """
One weight of 4,096 × 4,096. The product of float32 is NumPy's. The targets, for 4 bits and one row: at least 0.6 of
float32's speed, and at most a quarter of its bytes.
"""
BEAM_TEXT = """
Random encoder-decoders in the layout of Marian, the same weights on both sides, and the same tokens come out. small:
width 128, 3 + 3 layers, 16 sources of 32 tokens; mid: 256, 6 + 6 layers, 8 of 48; wide: 512, 6 + 6, 8 of 48; 24 new
tokens each. The target: at least 1.0 with four beams.
"""
# section: title, text, function that makes its table
SECTIONS = {
    "steps": ("A whole training step: forward, backward, AdamW", STEPS_TEXT, steps),
    "others": ("Other autograd libraries", "", others),
    "methods": ("Fine-tuning steps", METHODS_TEXT, methods),
    "memories": ("Peak memory of a step", MEMORIES_TEXT, memories),
    "small": ("Costs that do not grow with the model", "", small),
    "nf4": ("NF4 with double quantization", NF4_TEXT, nf4),
    "real": ("Real checkpoints", REAL_TEXT, real),
    "gptq": ("GPTQ of one layer", GPTQ_TEXT, gptq),
    "packed": ("Products with packed weights", PACKED_TEXT, packed),
    "beam": ("Beam search", BEAM_TEXT, beam),
    "scaling": ("As a size grows", "", scaling),
}


def write(data: dict[str, Any], out: Path) -> None:
    """Write cpu.md and scaling.png into a folder."""
    lines = ["# tinyft on the CPU, beside its peers", ""]
    lines += ["Written by `make bench`; [LOG.md](../LOG.md) tells what was tried and what it gave.", ""]
    for name, (title, text, make_table) in SECTIONS.items():
        if name in data:
            rows = make_table(data[name]["rows"])
            lines += [f"## {title}", text.strip("\n"), "", *rows, about(data[name])]
    (out / "cpu.md").write_text("\n".join(lines).rstrip() + "\n")
    if "scaling" in data:
        draw(data["scaling"]["rows"], out / "scaling.png")

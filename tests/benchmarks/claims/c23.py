"""C23: the speed of products with packed weights in the generation of text, one row at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import side_packed

import tinyft as ft
from tinyft.tensor import Tensor

from . import subjects
from .claim import HOLDS, IN_PART, WRONG, Claim, Finding, Numbers

LOW, HIGH = 3.2, 4.5
WIDTHS = (768, 2048, 4096)
FORMS = ("RTN 3, g=128", "RTN 4, g=128", "NF4", "Q4_0", "RTN 8")
THREADS = (1, 2)
ROUNDS = 15
SECONDS = 0.05  # of one visit


def seconds_of(run: Callable[[], object], count: int) -> float:
    """Seconds of one of `count` runs, after one that is not counted."""
    run()
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count


def measure_width(width: int, threads: int) -> list[Numbers]:
    """Rows of one width: the sides take turns, and a speed is a ratio of two times of the same round."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal((width, width), np.float32)
    x = rng.standard_normal((1, width), np.float32)
    weights = {form: side_packed.quantize(form, W) for form in FORMS}
    runs: dict[str, Callable[[], object]] = {"float32": partial(np.matmul, x, W.T)}
    for form, weight in weights.items():
        runs[form] = partial(weight.matmul, Tensor(x))
    ft.set_num_threads(threads)
    counts = {name: max(1, round(SECONDS / seconds_of(run, 3))) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(seconds_of(run, counts[name]))
    rows = []
    for form, weight in weights.items():
        speed = subjects.spread([dense / own for dense, own in zip(times["float32"], times[form])])
        share = weight.nbytes / W.nbytes
        row = {"form": form, "width": width, "threads": threads, "bytes": weight.nbytes, "share": share}
        rows.append(row | {"speed": speed})
        what = f"{form}, {width}, {threads} threads"
        print(f"   {what}: {speed['median']:.2f} times, {share:.3f} of the bytes", flush=True)
    return rows


def measure() -> Numbers:
    """{"rows": [{form, width, threads, bytes, share, speed: {median, low, high}}]}"""
    ft.kernels.keep_memory()
    before = ft.get_num_threads()
    rows = []
    try:
        for threads in THREADS:
            for width in WIDTHS:
                rows += measure_width(width, threads)
    finally:
        ft.set_num_threads(before)
    return {"rows": rows}


def judge(numbers: Numbers) -> Finding:
    """The verdict by the fastest of the forms of 3 and 4 bits at the largest width."""
    rows = numbers["rows"]
    few_bits = [row for row in rows if row["form"] != "RTN 8"]
    best = max(few_bits, key=speed_of)
    fastest = speed_of(best)
    verdict = HOLDS if fastest >= LOW else IN_PART if fastest > 1 else WRONG
    measured = (
        f"the fastest packed product of 3 or 4 bits has {fastest:.2f} times the speed of float32's ({best['form']}, "
        f"width {best['width']}, {best['threads']} threads), with {best['share']:.3f} of its bytes. The claim is of "
        "a compiled kernel on a device, where reading the weight takes all the time; in NumPy the codes must first "
        "become numbers in memory"
    )
    return Finding(verdict, measured, tuple(details(rows)))


def speed_of(row: Numbers) -> float:
    """The median speed of a row, in units of the float32 product's."""
    return row["speed"]["median"]


def details(rows: list[Numbers]) -> list[str]:
    """A table of all speeds."""
    lines = ["| weight | width | threads | of float32's bytes | of float32's speed |", "|---|---|---|---|---|"]
    for row in rows:
        speed = row["speed"]
        cells = [row["form"], row["width"], row["threads"], f"{row['share']:.3f}"]
        cells.append(f"{speed['median']:.2f} ({speed['low']:.2f}-{speed['high']:.2f})")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


CLAIM = Claim(
    id="C23",
    claim="Kernels that decompress weights make inference 3.2-4.5 times faster",
    source="003",
    refuted_by=(
        f"no packed product of 3 or 4 bits that is faster than float32's: then the claim is wrong as stated on this "
        f"machine. It holds if one reaches {LOW}, and in part if one is faster at all."
    ),
    setup=(
        f"the product of one row with a square weight of width {', '.join(map(str, WIDTHS))}, packed and in float32 "
        f"(NumPy's, contiguous), on {' and '.join(map(str, THREADS))} threads: the median of {ROUNDS} paired ratios, "
        "with the least and the largest. The bytes are those that a product reads: all of the weight's."
    ),
    measure=measure,
    judge=judge,
)

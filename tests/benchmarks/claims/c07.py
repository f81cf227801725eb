"""C07: the memory of training in units of the weights, by model, precision and batch."""

from __future__ import annotations

import gc

import tinyft as ft

from . import subjects
from .claim import HOLDS, IN_PART, WRONG, Claim, Finding, Numbers

LOW, HIGH = 12, 20
LENGTH = 128
SEEDS = (0, 1, 2)  # of the batches
BATCHES = (1, 2, 4, 8, 16, 32)
LARGE_BATCHES = (1, 2, 4)  # of SmolLM2, with one seed: a run takes a minute
STEPS = 2


def peak_of_fit(name: str, dtype: str, B: int, seed: int) -> tuple[int, int]:
    """(bytes of the weights, largest bytes of all arrays) of a full fine-tuning of two steps with AdamW."""
    model, _ = subjects.load(name)
    model.to(dtype=dtype)
    weights = subjects.weight_bytes(model)
    batch = subjects.token_batch(model.config.vocab, B, LENGTH, seed)
    gc.collect()
    with ft.peak_memory() as memory:
        ft.fit(model, [batch], STEPS, ft.AdamW(lr=1e-5), progress=False)
    return weights, weights + memory["bytes"]


def measure() -> Numbers:
    """{"rows": [{model, dtype, batch, weights, ratio: {median, low, high}}]}"""
    peak_of_fit("base-gpt-small", "float32", 1, 0)  # the first call of a process also builds caches
    settings = [(name, dtype, BATCHES, SEEDS) for name in subjects.BASES for dtype in ("float32", "bfloat16")]
    if subjects.has_smollm2():
        settings.append(("SmolLM2-135M", "float32", LARGE_BATCHES, SEEDS[:1]))
    rows = []
    for name, dtype, batches, seeds in settings:
        for B in batches:
            runs = [peak_of_fit(name, dtype, B, seed) for seed in seeds]
            ratio = subjects.spread([peak / weights for weights, peak in runs])
            rows.append({"model": name, "dtype": dtype, "batch": B, "weights": runs[0][0], "ratio": ratio})
            print(f"   {name}, {dtype}, batch {B}: {ratio['median']:.1f} times", flush=True)
    return {"rows": rows}


def judge(numbers: Numbers) -> Finding:
    """The verdict by the number of settings whose ratio lies in the claimed range."""
    rows = numbers["rows"]
    inside = [row for row in rows if LOW <= ratio_of(row) <= HIGH]
    verdict = HOLDS if len(inside) == len(rows) else IN_PART if inside else WRONG
    least = min(rows, key=ratio_of)
    most = max(rows, key=ratio_of)
    measured = (
        f"{len(inside)} of {len(rows)} settings lie within {LOW} to {HIGH}: the others reach from {in_words(least)} to "
        f"{in_words(most)}"
    )
    return Finding(verdict, measured, tuple(details(rows)))


def ratio_of(row: Numbers) -> float:
    """The median ratio of a row."""
    return row["ratio"]["median"]


def in_words(row: Numbers) -> str:
    """One setting with its ratio."""
    return f"{ratio_of(row):.1f} times ({row['model']}, {row['dtype']}, {row['batch']} × {LENGTH} tokens)"


def details(rows: list[Numbers]) -> list[str]:
    """A table of all ratios: a line for each model and precision, a column for each batch."""
    by_setting: dict[tuple[str, str], dict[int, Numbers]] = {}
    for row in rows:
        by_setting.setdefault((row["model"], row["dtype"]), {})[row["batch"]] = row
    head = ["model", "weights", "MB", *(f"batch {B}" for B in BATCHES)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (name, dtype), cells in by_setting.items():
        megabytes = f"{next(iter(cells.values()))['weights'] / 1e6:.1f}"
        ratios = [f"{ratio_of(cells[B]):.1f}" if B in cells else "" for B in BATCHES]
        lines.append("| " + " | ".join([name, dtype, megabytes, *ratios]) + " |")
    return lines


CLAIM = Claim(
    id="C07",
    claim="Training needs 12-20 times the memory of the weights, depending on the setup",
    source="001",
    refuted_by=(
        f"no setting whose ratio peak / weights lies within {LOW} to {HIGH}: then the claim is wrong as stated. It "
        "holds if all ratios lie there, and in part if some do."
    ),
    setup=(
        f"full fine-tuning with AdamW, {STEPS} steps of `fit` on rows of {LENGTH} tokens; the three shipped GPTs in "
        "float32, and in bfloat16 with float32 master weights; SmolLM2-135M in float32 where it is present. The peak "
        f"of all arrays by the allocator, weights included: the median over the batches of {len(SEEDS)} seeds "
        "(SmolLM2: 1), whose least and largest values are in the JSON file."
    ),
    measure=measure,
    judge=judge,
)

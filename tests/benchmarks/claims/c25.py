"""C25: the memory and the quality of QLoRA, beside those of LoRA on the dense base."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

import tinyft as ft

from . import subjects, training_memory
from .claim import HOLDS, IN_PART, WRONG, Claim, Finding, Numbers

BATCHES = (4, 1)  # rows of a batch; the first is the one of the limits
LIMITS = {"nf4, embedding in 8 bits": 0.75, "nf4, embedding in 8 bits + recompute": 0.5}
LOSS_LIMIT = 1.02  # perplexity of QLoRA over LoRA's
SEEDS = (0, 1, 2)
MODELS = {"base-gpt-large": 150, "SmolLM2-135M": 25}  # steps of 4 × 128 tokens
TARGETS = {"base-gpt-large": ("attn.[qkvo]", "mlp.up", "mlp.down"), "SmolLM2-135M": training_memory.TARGETS}
T = 128
TEST_WINDOWS = 64
RATE = 1e-3


def perplexity_after(name: str, steps: int, seed: int, material: dict[str, Any], *, pack: bool) -> float:
    """Held-out perplexity after LoRA on Python source, on the dense base or on the base in NF4."""
    model, _ = subjects.load(name)
    if pack:
        ft.compress(model, ft.NF4())
    ft.attach(model, ft.LoRA(r=training_memory.RANK, alpha=training_memory.RANK, targets=TARGETS[name]))
    batches = ft.data.lm_batches(material["train"], T, BATCHES[0], seed)
    ft.fit(model, batches, steps, ft.AdamW(RATE), progress=False)
    return ft.corpus_perplexity(model, material["test"], T).perplexity


def quality(name: str) -> Numbers:
    """{"base", "lora", "qlora"} of one model: perplexities of the untouched base, and after training by seed."""
    model, tokenizer = subjects.load(name)
    task = ft.data.task("domain", tokenizer=tokenizer)
    test = ft.data.windows(task.test, T)[:TEST_WINDOWS].reshape(-1)
    material = {"train": task.train, "test": test}
    run = partial(perplexity_after, name, MODELS[name], material=material)
    found = {"base": ft.corpus_perplexity(model, test, T).perplexity}
    found["lora"] = [run(seed=seed, pack=False) for seed in SEEDS]
    found["qlora"] = [run(seed=seed, pack=True) for seed in SEEDS]
    print(f"   {name}: {found}", flush=True)
    return found


def measure() -> Numbers:
    """{"memory": rows of training_memory.measure, "quality": {model: perplexities}}. Wants SmolLM2."""
    if not subjects.has_smollm2():
        raise RuntimeError("C25 is about SmolLM2-135M, which is not here: `make real-assets` fetches it")
    return {
        "quality": {name: quality(name) for name in MODELS},
        "memory": training_memory.measure(BATCHES, T),
    }


def judge(numbers: Numbers) -> Finding:
    """By the peak of the arrays at the larger batch, and by the perplexity of SmolLM2."""
    peaks = training_memory.ratios(numbers["memory"], BATCHES[0], "arrays")
    weights = training_memory.ratios(numbers["memory"], BATCHES[0], "weights")
    costs = {name: paired(found) for name, found in numbers["quality"].items()}
    within = all(peaks[name] <= limit for name, limit in LIMITS.items())
    as_good = all(cost["median"] <= LOSS_LIMIT for cost in costs.values())
    lower = all(peaks[name] < 1 for name in LIMITS)
    verdict = HOLDS if within and as_good else IN_PART if lower else WRONG
    said = ", ".join(f"{name} {peaks[name]:.2f}" for name in LIMITS)
    worse = ", ".join(f"{name} {cost['median']:.3f} times" for name, cost in costs.items())
    packed = next(iter(LIMITS))
    measured = (
        f"peak memory of a step at {BATCHES[0]} × {T} tokens, times that of LoRA on the dense base: {said}; weights "
        f"{weights[packed]:.2f} times; perplexity after the same training: {worse}"
    )
    return Finding(verdict, measured, (*memory_table(numbers["memory"]), "", *quality_table(numbers["quality"])))


def paired(found: Numbers) -> dict[str, float]:
    """QLoRA's perplexity over LoRA's, seed by seed: {median, low, high}."""
    return subjects.spread([packed / dense for packed, dense in zip(found["qlora"], found["lora"])])


def memory_table(rows: list[Numbers]) -> list[str]:
    """Lines of Markdown: every setting, in MB and in units of dense LoRA's."""
    lines = [
        "| base | batch | recompute | weights, MB | arrays at the peak, MB | times dense | process, MB | times dense | "
        "seconds a step |",
        "|---" * 9 + "|",
    ]
    for batch in BATCHES:
        arrays = training_memory.ratios(rows, batch, "arrays")
        process = training_memory.ratios(rows, batch, "process")
        of_batch = [row for row in rows if row["batch"] == batch]
        for row, a, p in zip(of_batch, arrays.values(), process.values()):
            cells = [row["base"], f"{batch} × {row['tokens']}", "yes" if row["recompute"] else "no"]
            cells += [f"{row['weights'] / 1e6:.0f}", f"{row['arrays'] / 1e6:.0f}", f"{a:.2f}"]
            cells += [f"{row['process'] / 1e6:.0f}", f"{p:.2f}", f"{row['seconds']:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def quality_table(found: dict[str, Numbers]) -> list[str]:
    """Lines of Markdown: the perplexities of each model, and the ratio of QLoRA's to LoRA's."""
    lines = ["| held-out Python source | untouched base | LoRA | QLoRA | QLoRA / LoRA, paired |", "|---" * 5 + "|"]
    for name, one in found.items():
        cost = paired(one)
        ratio = f"{cost['median']:.3f} ({cost['low']:.3f}-{cost['high']:.3f})"
        lines.append(f"| {name} | {one['base']:.2f} | {mean(one['lora']):.2f} | {mean(one['qlora']):.2f} | {ratio} |")
    return lines


def mean(perplexities: list[float]) -> float:
    """The mean over the seeds: that of the losses, as a perplexity."""
    return math.exp(float(np.mean(np.log(perplexities))))


CLAIM = Claim(
    id="C25",
    claim="QLoRA makes fine-tuning more memory-efficient still",
    source="000, 004",
    refuted_by=(
        "a training step whose peak is not below that of LoRA on the dense base. It holds if the peak is at most "
        f"{' and '.join(f'{limit} times ({name})' for name, limit in LIMITS.items())} that of dense LoRA, and the "
        f"held-out perplexity at most {LOSS_LIMIT} times; in part if the peak is only lower."
    ),
    setup=(
        f"SmolLM2-135M, LoRA of rank {training_memory.RANK} on all linear maps of the blocks, AdamW, each setting in a "
        "process of its own. Arrays: the weights and what the step allocates at its peak; process: the largest "
        f"resident memory of the process, Python included. Quality: {len(SEEDS)} seeds, steps of {BATCHES[0]} × {T} "
        f"tokens of Python source ({', '.join(f'{name} {steps}' for name, steps in MODELS.items())}), the same batches "
        "for both; perplexity of held-out source."
    ),
    measure=measure,
    judge=judge,
)

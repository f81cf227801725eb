"""Training steps on a device, side by side: the sections lesson, gpt2, lora, compiled and memory of gpu.py."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import cases
import numpy as np
import side_tinyft
from cases import Case
from gpu_clock import Clock, Missing, Row, Work, fresh, ratio
from gpu_sides import (
    PRECISIONS,
    Step,
    compiled,
    flops,
    least_bytes,
    precision,
    tinyft_captured,
    tinyft_step,
    torch_peak,
    torch_step,
)

import tinyft as ft
from tinyft import Tensor

GPT2 = Case("gpt2-small", 50257, 768, 12, 12, 8, 1024)
TINY = Case("smoke", 33, 16, 2, 2, 2, 8)


def number(x: Any) -> float:
    """A loss of any side as a float."""
    return float(x.data if isinstance(x, Tensor) else x)


def goes_on(few: list[float], many: list[float]) -> bool:
    """True if `few` is a consecutive part of `many`: capturing may take some steps of its own first."""
    n = len(few)
    return any(np.allclose(few, many[i : i + n], rtol=1e-3) for i in range(len(many) - n + 1))


def make_sides(c: Clock, case: Case, how: str) -> tuple[dict[str, Step], list[str]]:
    """tinyft's step, the same captured, and PyTorch's eager step; and notes about those that are not available."""
    sides = {"tinyft": tinyft_step(case, how)}
    notes = []
    optional = {
        "captured": lambda: tinyft_captured(case, how),
        "PyTorch": lambda: torch_step(c, case, how),
    }
    for name, make in optional.items():
        try:
            sides[name] = make()
        except Missing as e:
            notes.append(f"{name}: {e}")
    return sides, notes


def milliseconds(times: list[dict[str, float]], name: str) -> float:
    """The median time of a side."""
    return float(np.median([seconds[name] for seconds in times])) * 1e3


def compare_steps(c: Clock, case: Case, how: str, reaches: str = "", capture_counts: bool = False) -> Row:
    """tinyft's step, the same captured, and PyTorch's eager step, in turns.

    reaches          the target of the row's ratio
    capture_counts   the target is for the captured step alone, not for the best step
    """
    row: Row = {"tokens": case.B * case.T}
    with precision(how):
        sides, notes = make_sides(c, case, how)
        own = [name for name in sides if name != "PyTorch"]
        losses = {}
        for name, step in sides.items():
            losses[name] = [number(step()) for _ in range(8)]
        if "captured" in losses:
            row["captured is eager"] = c.check(goes_on(losses["captured"][2:6], losses["tinyft"]))
        times = list(c.turns(sides))
        for name in sides:
            row[f"{name}, ms"] = milliseconds(times, name)
        row["host, ms"] = c.host(sides["tinyft"]) * 1e3
        ratios = {}
        if "PyTorch" in sides:
            ratios = {name: ratio(times, "PyTorch", name) for name in own}
        for name, r in ratios.items():
            row[f"PyTorch / {name}"] = r
        best = min(row[f"{name}, ms"] for name in own)
        row["tokens/s, best"] = case.B * case.T / best * 1e3
        row["loss, step 8"] = losses["tinyft"][-1]
        if case.method == "full":
            row |= floors(c, case, how, best)
    if reaches and "captured" in ratios and capture_counts:
        row["reaches"] = {reaches: ratios["captured"]["ratio"]}
    elif reaches and ratios and not capture_counts:
        row["reaches"] = {reaches: max(r["ratio"] for r in ratios.values())}
    if notes:
        row["note"] = "not available: " + "; ".join(notes)
    return row


def floors(c: Clock, case: Case, how: str, best: float) -> Row:
    """The time of all products at the rate of a large one, of all bytes at the rate of a copy; best (ms) over both."""
    products = flops(case) / c.product_rate(how) * 1e3
    moves = least_bytes(case, how) / c.copy_rate() * 1e3
    return {"floor: products, ms": products, "floor: bytes, ms": moves, "best over floor": best / (products + moves)}


def fitted(c: Clock, case: Case) -> Row:
    """fit as a user calls it: batches from the host, and a loss read after every step.

    With capture the first steps, which make the graph, count.
    """
    n = c.size(300, 6)
    losses = {}
    row: Row = {}
    for name, capture in (("fit", False), ("fit(capture=True)", True)):
        for steps in (3, n):  # the first call compiles
            model = side_tinyft.build(case)
            since = time.perf_counter()
            history = ft.fit(model, [cases.batch(case)], steps, ft.AdamW(1e-3), progress=False, capture=capture)
        losses[name] = history.losses
        row[f"{name}, ms a step"] = (time.perf_counter() - since) / n * 1e3
    eager, captured = losses.values()
    eager_ms, captured_ms = row.values()
    row["captured is eager"] = c.check(bool(np.allclose(eager[:8], captured[:8], rtol=1e-3)))
    row["fit / captured"] = eager_ms / captured_ms
    return row


# ---------------------------------------------------------------------------------------------------- the sections
def lesson(c: Clock) -> Work:
    """The lessons' sizes, where the host limits the speed: here a captured step gains most."""
    for case in c.size(cases.GPT, [TINY]):
        title = f"{case.name} ({case.L} × {case.C}, {case.B} × {case.T})"
        for how in ("fp32", "tf32", "bf16"):
            reaches = "lesson" if how == "fp32" else ""
            yield f"{title}, {how}", partial(compare_steps, c, case, how, reaches, capture_counts=True)
        yield f"{case.name}, fit, fp32", partial(fitted, c, case)


def gpt2(c: Clock) -> Work:
    """GPT-2 small in three precisions."""
    case = c.size(GPT2, replace(TINY, B=1))
    for how in PRECISIONS:
        yield how, partial(compare_steps, c, case, how, f"gpt2 {how}")


def lora(c: Clock) -> Work:
    """LoRA of rank 8 beside PEFT's, on the same models."""
    for case in c.size([cases.GPT[1], cases.GPT[2], GPT2], [TINY]):
        for method in ("lora_qv", "lora_all"):
            for how in ("fp32", "bf16") if case is GPT2 else ("fp32",):
                yield f"{case.name}, {method}, {how}", partial(compare_steps, c, replace(case, method=method), how)


def compilers(c: Clock) -> Work:
    """torch.compile beside tinyft's best step. This is the last section, since compiling takes most of its time."""
    real = [(cases.GPT[1], "fp32"), (GPT2, "bf16"), (GPT2, "tf32"), (cases.GPT[0], "fp32"), (cases.GPT[2], "fp32")]
    for case, how in c.size(real, [(TINY, "fp32")]):
        yield f"{case.name}, {how}", partial(compare_compiled, c, case, how)


def compare_compiled(c: Clock, case: Case, how: str) -> Row:
    """tinyft's best step and PyTorch's compiled step, in turns."""
    with precision(how):
        name = "captured"
        try:
            own = tinyft_captured(case, how)
        except Missing:
            name = "eager"
            own = tinyft_step(case, how)
        sides = {"tinyft": own, "compiled": compiled(c, case, how)}
        for _ in range(3):
            for step in sides.values():
                step()
        times = list(c.turns(sides))
    row: Row = {"tinyft": name}
    for side in sides:
        row[f"{side}, ms"] = milliseconds(times, side)
    return row | {"torch.compile / tinyft": ratio(times, "compiled", "tinyft")}


def memory(c: Clock) -> Work:
    """Peak bytes in use (weights, gradients and moments too), and the bytes that the pool took from the device."""
    for case in c.size([GPT2, cases.GPT[2]], [TINY]):
        for method in ("full", "lora_qv"):
            for how in ("fp32", "bf16"):
                yield f"{case.name}, {method}, {how}", partial(compare_memory, c, replace(case, method=method), how)


def compare_memory(c: Clock, case: Case, how: str) -> Row:
    """The peak memory of three steps of tinyft and PyTorch."""
    with precision(how):
        used, pool = c.peak(tinyft_step(case, how), 3)
        fresh()
        row: Row = {"tinyft, MB": used / 1e6, "tinyft's pool, MB": pool / 1e6}
        try:
            torch_used, torch_pool = torch_peak(c, case, how)
        except Missing as e:
            return row | {"note": f"not available: {e}"}
    row |= {"PyTorch, MB": torch_used / 1e6, "PyTorch's pool, MB": torch_pool / 1e6}
    return row | {"tinyft / PyTorch": used / torch_used}

"""Training steps on a device, side by side: the sections `lesson`, `gpt2`, `lora`, `compiled` and `memory` of gpu.py."""
from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import cases
import numpy as np
import side_tinyft
from cases import Case
from gpu_clock import Clock, Missing, Row, Work, fresh, ratio
from gpu_sides import (
    PRECISIONS,
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
    "A loss on any side."
    return float(x.data if isinstance(x, Tensor) else x)


def goes_on(few: list[float], many: list[float]) -> bool:
    "Are these losses a stretch of those?  Capturing may take some steps of its own first."
    n = len(few)
    return any(np.allclose(few, many[i:i + n], rtol=1e-3) for i in range(len(many) - n + 1))


def compare_steps(c: Clock, case: Case, how: str, reaches: str = "", capture_counts: bool = False) -> Row:
    """tinyft's step, the same captured, PyTorch's eager one, in turns.  Those that are not there are left out, and the row says so.

    reaches: the target its ratio is held to, of the captured step alone or of the best there is."""
    sides, notes, row = {}, [], {"tokens": case.B * case.T}
    with precision(how):
        sides["tinyft"] = tinyft_step(case, how)
        for name, make in (("captured", lambda: tinyft_captured(case, how)), ("PyTorch", lambda: torch_step(c, case, how))):
            try:
                sides[name] = make()
            except Missing as e:
                notes.append(f"{name}: {e}")
        losses = {name: [number(step()) for _ in range(8)] for name, step in sides.items()}
        if "captured" in losses:
            row["captured is eager"] = c.check(goes_on(losses["captured"][2:6], losses["tinyft"]))
        times = list(c.turns(sides))
        row |= {f"{name}, ms": float(np.median([t[name] for t in times])) * 1e3 for name in sides}
        row["host, ms"] = c.host(sides["tinyft"]) * 1e3
        if "PyTorch" in sides:
            row |= {f"PyTorch / {name}": ratio(times, "PyTorch", name) for name in sides if name != "PyTorch"}
        best = min(row[f"{name}, ms"] for name in sides if name != "PyTorch") / 1e3
        row |= {"tokens/s, best": case.B * case.T / best, "loss, step 8": losses["tinyft"][-1]}
        if case.method == "full":
            rate, copy = c.product_rate(how), c.copy_rate()
            row |= {"floor: products, ms": flops(case) / rate * 1e3, "floor: bytes, ms": least_bytes(case, how) / copy * 1e3}
            row["best over floor"] = best * 1e3 / (row["floor: products, ms"] + row["floor: bytes, ms"])
    ratios = {name: row[f"PyTorch / {name}"]["ratio"] for name in ("tinyft", "captured") if f"PyTorch / {name}" in row}
    if reaches and ratios and (not capture_counts or "captured" in ratios):
        row["reaches"] = {reaches: ratios["captured"] if capture_counts else max(ratios.values())}
    return row | ({"note": "not available: " + "; ".join(notes)} if notes else {})


def fitted(c: Clock, case: Case) -> Row:
    "fit as a user calls it: batches from the host, and a loss read after every step.  With capture the first steps, which make the graph, count."
    n, losses, row = c.size(300, 6), {}, {}
    for name, capture in (("fit", False), ("fit(capture=True)", True)):
        for steps in (3, n):                             # the first call compiles
            model, since = side_tinyft.build(case), time.perf_counter()
            losses[name] = ft.fit(model, [cases.batch(case)], steps, ft.AdamW(1e-3), progress=False, capture=capture).losses
        row[f"{name}, ms a step"] = (time.perf_counter() - since) / n * 1e3
    mine, others = losses.values()
    return row | {"captured is eager": c.check(bool(np.allclose(mine[:8], others[:8], rtol=1e-3))), "fit / captured": np.divide(*row.values())}


def lesson(c: Clock) -> Work:
    "Host bound: here a captured step is worth most.  The floor: products at the rate of a large one, bytes at a copy's, nothing overlapping."
    for case in c.size(cases.GPT, [TINY]):
        for how in ("fp32", "tf32", "bf16"):
            yield f"{case.name} ({case.L} × {case.C}, {case.B} × {case.T}), {how}", lambda k=case, h=how: compare_steps(
                c, k, h, "lesson" if h == "fp32" else "", capture_counts=True)
        yield f"{case.name}, fit, fp32", lambda k=case: fitted(c, k)


def gpt2(c: Clock) -> Work:
    for how in PRECISIONS:
        yield how, lambda h=how: compare_steps(c, c.size(GPT2, replace(TINY, B=1)), h, f"gpt2 {h}")


def lora(c: Clock) -> Work:
    "LoRA of rank 8 beside PEFT's, on the same models."
    for case in c.size([cases.GPT[1], cases.GPT[2], GPT2], [TINY]):
        for method in ("lora_qv", "lora_all"):
            for how in ("fp32", "bf16") if case is GPT2 else ("fp32",):
                yield f"{case.name}, {method}, {how}", lambda k=replace(case, method=method), h=how: compare_steps(c, k, h)


def compilers(c: Clock) -> Work:
    "torch.compile beside tinyft's best step: last, since compiling takes most of its time."
    def measure(case: Case, how: str) -> Row:
        with precision(how):
            try:
                name, ours = "captured", tinyft_captured(case, how)
            except Missing:
                name, ours = "eager", tinyft_step(case, how)
            sides = {"tinyft": ours, "compiled": compiled(c, case, how)}
            for _ in range(3):
                for step in sides.values():
                    step()
            times = list(c.turns(sides))
        return {"tinyft": name, **{f"{k}, ms": float(np.median([t[k] for t in times])) * 1e3 for k in sides},
                "torch.compile / tinyft": ratio(times, "compiled", "tinyft")}
    real = [(cases.GPT[1], "fp32"), (GPT2, "bf16"), (GPT2, "tf32"), (cases.GPT[0], "fp32"), (cases.GPT[2], "fp32")]
    for case, how in c.size(real, [(TINY, "fp32")]):
        yield f"{case.name}, {how}", lambda k=case, h=how: measure(k, h)


def memory(c: Clock) -> Work:
    "Bytes in use at most (weights, gradients and moments too), and what the pool took from the device for them."
    def measure(case: Case, how: str) -> Row:
        with precision(how):
            used, held = c.peak(tinyft_step(case, how), 3)
            fresh()
            row = {"tinyft, MB": used / 1e6, "tinyft's pool, MB": held / 1e6}
            try:
                theirs, reserved = torch_peak(c, case, how)
                row |= {"PyTorch, MB": theirs / 1e6, "PyTorch's pool, MB": reserved / 1e6, "tinyft / PyTorch": used / theirs}
            except Missing as e:
                row["note"] = f"not available: {e}"
        return row
    for case in c.size([GPT2, cases.GPT[2]], [TINY]):
        for method in ("full", "lora_qv"):
            for how in ("fp32", "bf16"):
                yield f"{case.name}, {method}, {how}", lambda k=replace(case, method=method), h=how: measure(k, h)

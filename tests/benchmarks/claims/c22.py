"""C22: the time of OBQ, GPTQ and round-to-nearest against the width of a weight."""

from __future__ import annotations

import time

import numpy as np
from report import duration
from threadpoolctl import threadpool_limits

import tinyft as ft
from tinyft.compress.grids import fit_groups
from tinyft.compress.quantize.obq import FACTORS, damped, obq_rows

from . import subjects
from .claim import HOLDS, IN_PART, WRONG, Claim, Finding, Numbers

WIDTHS = {
    "RTN": (128, 256, 512, 768, 1024, 2048),
    "GPTQ": (128, 256, 512, 768, 1024, 2048),
    "OBQ": (64, 128, 256, 512, 768, 1024),
}
EXPECTED = {"RTN": 2, "GPTQ": 3, "OBQ": 4}  # powers of the width, by counting operations
SEEDS = (0, 1, 2)
BITS = 4
PARAMETERS = 100e6
WIDTH = 768  # of the maps of GPT-2 and BERT at about 100 M parameters
HOURS = (2, 8)  # a factor of two around the claimed four
FASTER = 10  # GPTQ, at least


def layer(width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A square weight (width, width) and the Hessian of inputs in which neighbours correlate."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((2 * width, width), np.float32)
    X[:, 1:] += 0.9 * X[:, :-1]
    return rng.standard_normal((width, width), np.float32), (X.T @ X).astype(np.float64) / width


def seconds_of(rule: str, width: int, seed: int) -> float:
    """Processor seconds that a rule takes for one square weight, its Hessian given.

    Of OBQ only some rows are computed: rows do not depend on each other."""
    W, H = layer(width, seed)
    if rule == "OBQ":
        return seconds_of_obq(W, H)
    f = ft.RTN(BITS, None) if rule == "RTN" else ft.GPTQ(BITS, None)
    start = time.process_time()
    f(W, H)
    return time.process_time() - start


def seconds_of_obq(W: np.ndarray, H: np.ndarray) -> float:
    """The seconds of the inverse, and those of a part of the rows times the number of such parts."""
    width = len(W)
    start = time.process_time()
    inverse = np.linalg.inv(damped(H, 0.0))
    once = time.process_time() - start
    together = max(1, min(width, FACTORS // width**2))
    rows = slice(0, min(width, max(together, 4)))
    grid = fit_groups(W[rows], "affine", BITS, width)
    start = time.process_time()
    for first in range(0, rows.stop, together):
        part = slice(first, first + together)
        obq_rows(W[rows][part], inverse, grid[part])
    return once + (time.process_time() - start) * width / rows.stop


def measure() -> Numbers:
    """{"rows": [{rule, width, seconds: {median, low, high}}]}"""
    rows = []
    with threadpool_limits(1):
        for rule, widths in WIDTHS.items():
            seconds_of(rule, 64, 0)  # the first call of a process also loads code
            for width in widths:
                seconds = subjects.spread([seconds_of(rule, width, seed) for seed in SEEDS])
                rows.append({"rule": rule, "width": width, "seconds": seconds})
                print(f"   {rule}, width {width}: {duration(seconds['median'])}", flush=True)
    return {"rows": rows}


# ---------------------------------------------------------------------------------------------------- the law
def law(numbers: Numbers, rule: str) -> tuple[float, float]:
    """(factor, power): seconds = factor · width^power, fitted to the four largest widths on logarithmic axes."""
    points = [(row["width"], row["seconds"]["median"]) for row in numbers["rows"] if row["rule"] == rule]
    width, seconds = np.log(np.array(sorted(points)[-4:])).T
    power, constant = np.polyfit(width, seconds, 1)
    return float(np.exp(constant)), float(power)


def seconds_of_model(numbers: Numbers, rule: str, width: int) -> float:
    """Estimated seconds for 100 M parameters in square maps of this width."""
    factor, power = law(numbers, rule)
    return factor * width**power * PARAMETERS / width**2


def judge(numbers: Numbers) -> Finding:
    """The verdict by OBQ's estimated hours at width 768, and by the ratio to GPTQ's time."""
    by_rule = {rule: seconds_of_model(numbers, rule, WIDTH) for rule in WIDTHS}
    hours = by_rule["OBQ"] / 3600
    faster = by_rule["OBQ"] / by_rule["GPTQ"]
    power = {rule: law(numbers, rule)[1] for rule in WIDTHS}
    verdict = WRONG if faster < FASTER else HOLDS if HOURS[0] <= hours <= HOURS[1] else IN_PART
    measured = (
        f"100 M parameters in maps of {WIDTH} × {WIDTH} take OBQ {hours:.1f} hours on one thread, {faster:.0f} times "
        f"as long as GPTQ ({in_words(by_rule['GPTQ'])}); the time grows with the power {power['OBQ']:.1f} of the width "
        f"for OBQ, {power['GPTQ']:.1f} for GPTQ, {power['RTN']:.1f} for round-to-nearest"
    )
    return Finding(verdict, measured, tuple(details(numbers)))


def in_words(seconds: float) -> str:
    """A duration in the unit that suits it."""
    for unit, size in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def details(numbers: Numbers) -> list[str]:
    """Two tables: the measured seconds, and the estimates for 100 M parameters."""
    cells = {(row["rule"], row["width"]): row["seconds"]["median"] for row in numbers["rows"]}
    widths = sorted({width for _, width in cells})
    lines = ["| one square weight | " + " | ".join(f"{width}" for width in widths) + " | power | by counting |"]
    lines.append("|---" * (len(widths) + 3) + "|")
    for rule, expected in EXPECTED.items():
        times = [duration(cells[rule, width]) if (rule, width) in cells else "" for width in widths]
        lines.append(f"| {rule} | " + " | ".join(times) + f" | {law(numbers, rule)[1]:.2f} | {expected} |")
    lines += ["", "| 100 M parameters in square maps of width | 256 | 768 | 2048 | 10000 |", "|---|---|---|---|---|"]
    for rule in EXPECTED:
        times = [in_words(seconds_of_model(numbers, rule, width)) for width in (256, 768, 2048, 10000)]
        lines.append(f"| {rule} | " + " | ".join(times) + " |")
    return lines


CLAIM = Claim(
    id="C22",
    claim="OBQ takes 4 hours for a model of 100 M parameters; GPTQ far less",
    source="003",
    refuted_by=(
        f"GPTQ less than {FASTER} times as fast as OBQ on the same 100 M parameters. The claim holds if OBQ's estimate "
        f"also lies between {HOURS[0]} and {HOURS[1]} hours, and in part otherwise: hours depend on the processor, "
        "and the source names none."
    ),
    setup=(
        f"square weights of normal numbers, {BITS} bits, a grid for each row; the Hessian of correlated inputs is "
        "given. Processor time on one thread, the median over 3 seeds, whose least and largest values are in the JSON "
        "file. Of OBQ a few rows are measured and counted for all, since rows do not depend on each other. Powers are "
        f"fitted to the four largest widths. 100 M parameters are {PARAMETERS / WIDTH**2:.0f} maps of {WIDTH} × "
        f"{WIDTH}, the width of GPT-2 and BERT at this size."
    ),
    measure=measure,
    judge=judge,
)

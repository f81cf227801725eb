"""The plan of `tinyft compress`: bytes and time of a rule, measured on a few rows of the model's own weights."""
from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .. import array, edit
from ..compress import Rule, compress
from ..nn import Module, Packed

__all__ = ["RulePlan", "plan_rule"]

LONG = 0.2                                               # seconds after which no more rows are measured
LEAST = 1e-6                                             # seconds of a weight, at least


@dataclass(frozen=True)
class RulePlan:
    """The costs of the weights that remain.

    seconds   {path: expected time of the rule and of its share of the calibration}
    entries   of the weights
    before, after   bytes of the dense and of the packed weights
    """

    seconds: Mapping[str, float]
    entries: int
    before: int
    after: int

    @property
    def total_seconds(self) -> float:
        """The expected time of all weights."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Costs:
    """Bytes and seconds of a rule as lines over the rows of a weight: (of no rows, of each row)."""

    nbytes: tuple[float, float]
    seconds: tuple[float, float]


def plan_rule(
    model: Module, rule: Rule, batches: Sequence[Mapping[str, Any]] | None, paths: Sequence[str],
) -> RulePlan:
    """The plan for the weights at these paths. Nothing changes."""
    modules = edit.base_modules(model)
    weights = {path: modules[path].weight for path in paths}
    costs: dict[tuple[int, ...], Costs] = {}
    seconds = {}
    after = 0.0
    calibration = 0.0
    if batches is not None and paths:
        calibration = _calibration_seconds(model, batches, paths) / len(paths)
    for path, weight in weights.items():
        if weight.shape not in costs:
            costs[weight.shape] = _measure(rule, array.asnumpy(weight.data))
        cost = costs[weight.shape]
        rows = weight.shape[0]
        seconds[path] = max(LEAST, cost.seconds[0] + rows * cost.seconds[1]) + calibration
        after += cost.nbytes[0] + rows * cost.nbytes[1]
    before = sum(weight.data.nbytes for weight in weights.values())
    return RulePlan(seconds, sum(weight.size for weight in weights.values()), before, round(after))


def _measure(rule: Rule, W: np.ndarray) -> Costs:
    """The costs of a rule on more and more rows of W, until they take LONG. The inputs are of different sizes."""
    H = np.diag(np.linspace(1, 9, W.shape[1])) if rule.needs_hessian else None
    points: list[tuple[int, int, float]] = []            # (rows, bytes, seconds)
    rows = 1
    while True:
        start = time.perf_counter()
        packed = rule(W[:rows], H)
        points.append((rows, packed.nbytes, time.perf_counter() - start))
        if rows == len(W) or points[-1][2] > LONG and len(points) > 1:
            break
        rows = min(4 * rows, len(W))
    (n, bytes_before, t_before), (m, bytes_after, t_after) = points[-2:] if len(points) > 1 else [(0, 0, 0.0), *points]
    slope = (bytes_after - bytes_before) / (m - n)
    seconds_slope = max(0.0, (t_after - t_before) / (m - n))
    return Costs((bytes_after - m * slope, slope), (t_after - m * seconds_slope, seconds_slope))


# ── calibration ──────────────────────────────────────────────────────────────────────────────────────────────────────
class Untouched(Packed):
    """A weight that is not compressed, in the place of a compressed one."""

    def __init__(self, W: np.ndarray):
        self.shape = W.shape
        self.values = array.asarray(W)

    def dequantize(self) -> array.Array:
        """The weight."""
        return self.values


@dataclass(frozen=True)
class NoChange(Rule):
    """A rule that takes its Hessian and changes nothing: what remains is the cost of the calibration."""

    needs_hessian: ClassVar[bool] = True

    def __call__(self, W: np.ndarray, H: np.ndarray | None = None) -> Packed:
        """W itself."""
        return Untouched(W)


def _calibration_seconds(model: Module, batches: Sequence[Mapping[str, Any]], paths: Sequence[str]) -> float:
    """The expected time of the passes over all batches: of one batch in the first block, times batches and blocks."""
    blocks = [block for stack in edit.stacks(model).values() for block in stack]
    modules = edit.base_modules(model)
    used: dict[str, dict[str, Any]] = {}                 # block -> its weights by path
    for path in paths:
        for block in blocks:
            if edit.inside(path, [block]):
                used.setdefault(block, {})[path] = modules[path].weight
    if not used:
        return 0.0
    weights = next(iter(used.values()))
    start = time.perf_counter()
    try:
        compress(model, NoChange(), batches[:1], targets=list(weights))
    finally:
        for path, weight in weights.items():
            modules[path].weight = weight
    return (time.perf_counter() - start) * len(batches) * len(used)

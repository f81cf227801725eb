"""Several adapters as one: the weighted sum of their changes."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..array import Array
from ..edit import Attached, Edit, Method
from ..nn import Context

__all__ = ["combine"]


class Weighted(Edit):
    "y + Σ cⱼ (eⱼ(x, y) − y): several edits of one module at once, each from the same starting point."

    def __init__(self, inner: list[Edit], weights: list[float]):
        self.inner, self.weights = inner, np.asarray(weights)

    def _sum(self, y: Any, changed: Iterable[Any]) -> Any:
        total = y
        for c, z in zip(self.weights.tolist(), changed):
            total = total + (z - y) * c
        return total

    def after(self, x: Any, y: Any, ctx: Context) -> Any:
        return self._sum(y, [e.after(x, y, ctx) for e in self.inner])

    def fold(self, p: dict[str, Array]) -> dict[str, Array]:
        folded = [e.fold(p) for e in self.inner]
        return {n: self._sum(w, [f[n] for f in folded]) for n, w in p.items()}


@dataclass(frozen=True)
class Combined(Method):
    "What combine gives: the weighted sum of several adapters."


def combine(adapters: list[Attached], weights: list[float] | None = None, name: str = "combined") -> Attached:
    """Several detached adapters as one, ready to attach: each change times its weight, summed, all from the same base.  Exact: for
    LoRA it is ΔW = Σ cⱼ ΔWⱼ, no mixing of factors.  The adapters must change outputs only, and train no base tensor."""
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters) or not adapters:
        raise ValueError(f"combine wants one weight per adapter; got {len(weights)} for {len(adapters)}")
    for a in adapters:
        bad = [p for p, e in a.edits.items() if not e.overrides("after") or e.overrides("before") or e.overrides("tensor") or p.endswith(".kv")]
        if a.base or bad:
            raise ValueError(f"{a.name} {'trains ' + next(iter(a.base)) if a.base else 'edits ' + bad[0]}: only changes of outputs can be summed")
    paths = list(dict.fromkeys(p for a in adapters for p in a.edits))
    have = {p: [(a.edits[p], c) for a, c in zip(adapters, weights) if p in a.edits] for p in paths}
    return Attached(Combined(), name, {p: Weighted([e for e, _ in es], [c for _, c in es]) for p, es in have.items()})

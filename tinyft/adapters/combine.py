"""Several adapters as one: the weighted sum of their changes."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import checks
from ..array import Array
from ..edit import Attached, Edit, Method, check_name, copy_edits
from ..keywords import checked_keywords
from ..nn import Context

__all__ = ["combine"]


class Weighted(Edit):
    """y + Σ cⱼ (eⱼ(x, y) − y): several edits of one module at once, all from the same starting point."""

    def __init__(self, inner: list[Edit], weights: Sequence[float]):
        self.inner = inner
        self.weights = np.asarray(weights)

    def _sum(self, y: Any, changed: Iterable[Any]) -> Any:
        total = y
        for c, z in zip(self.weights.tolist(), changed, strict=True):
            total = total + (z - y) * c
        return total

    def after(self, x: Any, y: Any, ctx: Context) -> Any:
        return self._sum(y, [e.after(x, y, ctx) for e in self.inner])

    def fold(self, p: dict[str, Array]) -> dict[str, Array]:
        folded = [e.fold(p) for e in self.inner]
        summed = {}
        for name, w in p.items():
            summed[name] = self._sum(w, [tensors[name] for tensors in folded])
        return summed


@dataclass(frozen=True)
class Combined(Method):
    """The method of the adapter that `combine` makes: a weighted sum of several adapters."""


@checked_keywords
def combine(adapters: list[Attached], weights: Sequence[float] | None = None, name: str = "combined") -> Attached:
    """Several detached adapters as one, ready to attach: the sum of their changes, each times its weight.

    An adapter here is what edit.detach returned; the base must be the same. weights: 1 for each if None. A module that
    only some adapters edit gets the sum of theirs. The result has copies of their tensors: to train it leaves the
    adapters as they are.
    The sum is exact: for LoRA it is ΔW = Σ cⱼ ΔWⱼ, and no factors are mixed. Raises ValueError unless there is one
    weight for each adapter, and every adapter changes outputs only and trains no tensor of the base; TypeError for
    adapters or weights of another kind."""
    checks.instance("combine", adapters, (list, tuple), "a list of adapters, which detach gave")
    for a in adapters:
        checks.instance("combine", a, Attached, "adapters, which detach gave")
    if weights is None:
        weights = [1.0] * len(adapters)
    if isinstance(weights, np.ndarray):
        weights = weights.tolist()
    checks.instance("combine: weights", weights, (list, tuple), "a list of numbers")
    if len(weights) != len(adapters) or not adapters:
        raise ValueError(f"combine wants one weight per adapter; got {len(weights)} for {len(adapters)}")
    for c in weights:
        checks.number("combine: weights", c)
    check_name("combine: name", name)
    fits: dict[str, str] = {}
    for a in adapters:
        _check_summable(a)
        for path, description in a.fits.items():
            if fits.setdefault(path, description) != description:
                raise ValueError(f"{a.name} belongs to another base: its {path} is {description}, "
                                 f"that of another adapter is {fits[path]}")
    copies = [copy_edits(a.edits) for a in adapters]
    edits: dict[str, Edit] = {}
    for path in dict.fromkeys(path for a in adapters for path in a.edits):      # every path once, in order
        pairs = [(own[path], c) for own, c in zip(copies, weights, strict=True) if path in own]
        edits[path] = Weighted([e for e, _ in pairs], [c for _, c in pairs])
    return Attached(Combined(), name, edits, fits=fits)


def _check_summable(a: Attached) -> None:
    """Raise ValueError unless an adapter changes only outputs, and keeps their shape, and trains no base tensor.

    A sum needs changes that all start from the same output; an edit of an input or a weight has no such change."""
    if a.base_values:
        raise ValueError(f"{a.name} trains {next(iter(a.base_values))}: only changes of outputs can be summed")
    for path, e in a.edits.items():
        changes_output_only = e.overrides("after") and not e.overrides("before") and not e.overrides("tensor")
        if not changes_output_only or not e.keeps_shape:
            raise ValueError(f"{a.name} edits {path}: only changes of outputs can be summed")

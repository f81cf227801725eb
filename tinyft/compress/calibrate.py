"""Calibration: the Hessians of linear maps from the inputs that real text gives them.

    ‖X Wᵀ − X Ŵᵀ‖² summed over n tokens, per token and times 2:   tr (W − Ŵ) H (W − Ŵ)ᵀ,   H = 2/n Xᵀ X      (in, in)

H is the second derivative of the mean squared error of a layer's output, the same for every row of W. Maps that read
the same input, such as q, k and v of an attention, share one H. Positions of padding do not count.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .. import array
from ..array import Array
from ..edit import Edit
from ..nn import Context, Module
from ..tensor import Tensor
from ..train.batch import Endless, Targets, iterate, read_batch

__all__ = ["Hessian", "OutputRecorder", "Recorder", "StopPass", "read_passes", "recording", "run_pass"]

RECORDER = "calibration"                                 # the name of the recording edit while a pass runs


class Hessian:
    """The running mean H = 2/n Σ x xᵀ over the inputs of a map.

    n       the number of inputs so far
    matrix  (in, in) float64 on the host"""

    def __init__(self, width: int):
        """A mean of no inputs yet; width: `in`."""
        self.n = 0
        self.matrix = np.zeros((width, width))

    def add(self, x: Array) -> None:
        """Count the rows of x (N, in). The product of one batch is computed in x's dtype, where x lies."""
        if not len(x):
            return
        total = self.n + len(x)
        batch = array.asnumpy(x.T @ x).astype(np.float64)
        self.matrix *= self.n / total
        self.matrix += batch * (2 / total)
        self.n = total


class StopPass(Exception):
    """Ends a forward pass early. It leaves every module as it was."""


class Recorder(Edit):
    """Shows each input of a module to a function: see(x, ctx)."""

    def __init__(self, see: Any):
        self._see = see

    def before(self, x: Tensor, ctx: Context) -> Tensor:
        """x itself"""
        self._see(x, ctx)
        return x


class OutputRecorder(Edit):
    """Shows each output of a module to a function: see(y, ctx)."""

    def __init__(self, see: Any):
        self._see = see

    def after(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        """y itself"""
        self._see(y, ctx)
        return y


@contextmanager
def recording(modules: dict[str, Module], see: Any, *, recorder: type[Edit] = Recorder) -> Iterator[None]:
    """see(path, x, ctx) is called with every input of these modules, {path: module}, for the length of a `with`.

    recorder   OutputRecorder: with every output instead"""
    before = {path: module.edits for path, module in modules.items()}
    try:
        for path, module in modules.items():
            module.edits = {**module.edits, RECORDER: recorder(_with_path(see, path))}
        yield
    finally:
        for path, module in modules.items():
            module.edits = before[path]


def _with_path(see: Any, path: str) -> Any:
    def see_one(x: Tensor, ctx: Context) -> None:
        see(path, x, ctx)
    return see_one


def token_rows(x: Tensor, ctx: Context) -> Array:
    """The inputs of a map as rows (N, in), without those at positions of padding.

    An input of another shape than (B, T, in), such as the pooled row of a classifier, is taken whole."""
    rows = x.data.reshape(-1, x.shape[-1])
    if ctx.mask is None or x.shape[:-1] != tuple(ctx.mask.shape):
        return rows
    return rows[ctx.mask.reshape(-1)]


def read_passes(caller: str, batches: Iterable) -> list[Targets]:
    """The calibration batches, read once. caller: the function that got them; ValueError if there are none."""
    if isinstance(batches, Endless):
        batches = batches.once()
    passes = [read_batch(batch) for batch in iterate(batches)]
    if not passes:
        raise ValueError(f"{caller} wants calibration batches, got none")
    return passes


def run_pass(model: Module, targets: Targets) -> None:
    """One forward pass over a batch, until its end or until StopPass."""
    try:
        model(targets.ids, targets.context())
    except StopPass:
        pass

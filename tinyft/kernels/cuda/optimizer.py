"""AdamW in a few launches, however many tensors there are: the norm of all gradients, the factor that clips them, the update.

Gradients are used where backward left them, and nobody waits: a norm that is not finite is found by the device, which then moves nothing.
"""
from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from ... import array
from ...array import Array, address, xp
from ...optim.optimizers import AdamW, Group, Optimizer, free
from . import launch
from .launch import blocks, empty
from .layers import THREADS, suits

TENSORS = 150                                                                    # to a launch: as many as adam.cu's table has room for
TABLE = np.dtype([("g", np.uint64, TENSORS), ("start", np.int64, TENSORS), ("size", np.int64, TENSORS)])
ACROSS = 256                                                                     # blocks to a tensor, at most


def adam_rates(lr: float, b1: float, b2: float, decay: float, t: int) -> tuple[float, float, float]:
    """(rate, root, shrink), with which AdamW's update is  w ← shrink w − rate m / (root √v + ε),  m and v being the means as they are.

    All that changes with the step t = 1, 2, ...: a captured step reads them from the device.  lr: η, decay: λ; formulas: optim.AdamW."""
    return lr / (1 - b1**t), (1 - b2**t)**-0.5, 1 - lr * decay


def adam_update(w: Array, g: Array, m: Array, v: Array, lr: float, b1: float, b2: float, eps: float, decay: float, t: int) -> None:
    "One stretch in one launch, one pass."
    if w.dtype != np.float32 or not suits(w, g, m, v):
        return NotImplemented
    rates = adam_rates(lr, b1, b2, decay, t)
    launch.launch("adam.cu", "adam", blocks(w.size), THREADS, w, g, m, v, *rates, *_betas(b1, b2), float(eps), np.int64(w.size), T=w.dtype)


def advance(opt: Optimizer, factor: float, clip: float | None, loss: Array | None, scale: float = 1.0) -> Array:
    "Optimizer.one_by_one for AdamW on float32 arrays."
    every = [(g, p, s) for g in opt.bound for p, s in zip(g.tensors, g.slices) if p.grad is not None]
    if not (type(opt).update is AdamW.update and every and all(g.w.dtype == np.float32 for g in opt.bound)
            and (loss is None or loss.dtype == np.float32)):
        return NotImplemented
    gradients = [_laid_out(p) for _, p, _ in every]
    state = norm_and_scale(gradients, clip, loss, scale)
    every_rate = _rates(opt, factor)
    for g, rates in zip(opt.bound, every_rate):
        rows = [(a, s) for a, (group, _, s) in zip(gradients, every) if group is g]
        held = g.held(gathered=False)
        update(g, rows, state, rates, opt)
        if held:
            g.put_back(held)
            g.show()
    return state[0]


def _rates(opt: AdamW, factor: Any) -> Any:
    "adam_rates of every group at the next step; of a captured step, on the device, and worked out anew at each replay."
    def at(factor: float) -> list[tuple]:
        opt.t += 1
        return [adam_rates(g.lr * factor, *opt.betas, g.decay, opt.t) for g in opt.bound]
    recording = array.recording
    if recording is None:
        return at(factor)
    recording.watch(opt)
    now = recording.now(factor)
    return recording.feed(lambda: np.array(at(now())), (len(opt.bound), 3))


def _laid_out(p: object) -> Array:
    "The gradient, contiguous, in float32; zero where a mask lets nothing move."
    g = free(p)
    g = g if g.flags.c_contiguous else xp(g).ascontiguousarray(g)
    if p.mask is None:
        p.grad = g
    return g


def norm_and_scale(gradients: list[Array], clip: float | None, loss: Array | None = None, scale: float = 1.0) -> Array:
    "(2,): the norm of all gradients together once divided by `scale`, and the factor that brings them to `clip`."
    across, done = min(blocks(max(g.size for g in gradients)), ACROSS), 0
    parts, state = (empty(gradients[0], shape, np.float32) for shape in ((len(gradients), across), (2,)))
    for some in _launches(gradients):
        launch.launch("adam.cu", "squares", (across, len(some)), THREADS, table(some), parts[done:done + len(some)], T=state.dtype)
        done += len(some)
    launch.launch("adam.cu", "norm_and_scale", 1, 1024, parts, parts.size, float(clip or 0), 1 / scale, loss, state, T=state.dtype)
    return state


def _launches(tensors: list) -> list[list]:
    "As many to a launch as its table holds."
    return [tensors[i:i + TENSORS] for i in range(0, len(tensors), TENSORS)]


def update(group: Group, rows: list[tuple[Array, slice]], state: Array, rates: tuple | Array, opt: AdamW) -> None:
    "One group.  rows: gradients, and where in the group they belong."
    by_value, from_device = (rates, None) if isinstance(rates, tuple) else ((0.0, 0.0, 0.0), rates)
    for some in _launches(rows):
        gradients, slices = zip(*some)
        across = min(blocks(max(g.size for g in gradients)), ACROSS)
        where = table(gradients, [s.start for s in slices])
        launch.launch("adam.cu", "adam_tensors", (across, len(gradients)), THREADS, where, group.w, *group.moments, group.shown, state, from_device,
                      *by_value, *_betas(*opt.betas), float(opt.eps), T=group.tensors[0].dtype)


def table(gradients: list[Array], starts: list[int] | None = None) -> np.void:
    "What adam.cu calls a Table."
    out, n = np.zeros((), TABLE), len(gradients)
    out["g"][:n] = [address(g) for g in gradients]
    out["size"][:n] = [g.size for g in gradients]
    if starts is not None:
        out["start"][:n] = starts
    return out[()]


@lru_cache(None)
def _betas(b1: float, b2: float) -> tuple[float, ...]:
    return float(b1), float(1 - b1), float(b2), float(1 - b2)

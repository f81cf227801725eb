"""AdamW in a few launches, however many tensors there are: the norm of all gradients, their scale, the update.

Gradients are used where backward left them.  The host does not wait for the norm: if it is not finite, the device
updates nothing.
"""
from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from ... import array
from ...array import Array, address, xp
from ...optim.buffers import Group, masked_gradient
from ...optim.optimizers import AdamW, Optimizer
from ...tensor import Tensor
from . import launch
from .launch import blocks, empty
from .layers import THREADS, suits

TENSORS = 150                                                      # per launch: the room in adam.cu's table
TABLE = np.dtype([("g", np.uint64, TENSORS), ("start", np.int64, TENSORS), ("size", np.int64, TENSORS)])
ACROSS = 256                                                       # at most so many thread blocks per tensor


def adam_rates(lr: float, b1: float, b2: float, decay: float, t: int) -> tuple[float, float, float]:
    """(rate, root, shrink), with which AdamW's update is  w ← shrink w − rate m / (root √v + ε).

    It is the update of optim.adam_update,  w ← w − η (m̂ / (√v̂ + ε) + λ w),  with m̂ = m / (1 − β₁ᵗ) and
    v̂ = v / (1 − β₂ᵗ); m and v are the moments without bias correction.
    lr: η, b1: β₁, b2: β₂, decay: λ, t: the number of the step, 1, 2, ..."""
    return lr / (1 - b1**t), (1 - b2**t)**-0.5, 1 - lr * decay


def adam_update(w: Array, g: Array, m: Array, v: Array, lr: float, b1: float, b2: float, eps: float, decay: float,
                t: int) -> Any:
    """optim.adam_update in one launch, which reads and writes each array once."""
    if w.dtype != np.float32 or not suits(w, g, m, v):
        return NotImplemented
    rates = adam_rates(lr, b1, b2, decay, t)
    launch.launch("adam.cu", "adam", blocks(w.size), THREADS, w, g, m, v, *rates, *_betas(b1, b2), float(eps),
                  np.int64(w.size), T=w.dtype)
    return None


def update_pieces(opt: Optimizer, factor: float, clip: float | None, loss: Array | None, scale: float = 1.0) -> Array:
    """Optimizer.update_pieces for AdamW on float32 arrays: clip and update.  Returns the norm, on the device.

    If the norm or the loss is not finite, the device updates nothing and the norm is not finite; the host does not wait
    for it.  NotImplemented for another optimiser or dtype, and without any gradient.
    factor: on the learning rate.  clip: the largest norm, None for no limit.  scale: the factor of the loss."""
    taken = type(opt).update is AdamW.update and all(group.w.dtype == np.float32 for group in opt.groups)
    if not taken or (loss is not None and loss.dtype != np.float32):
        return NotImplemented
    rows = []                                                      # for each group: [(gradient, its slice)]
    for group in opt.groups:
        trained = {name: p for name, p in group.tensors.items() if p.grad is not None}
        rows.append([(_contiguous_gradient(p), group.offsets[name]) for name, p in trained.items()])
    gradients = [g for of_group in rows for g, _ in of_group]
    if not gradients:
        return NotImplemented
    state = norm_and_scale(gradients, clip, loss, scale)
    for group, of_group, rates in zip(opt.groups, rows, _rates(opt, factor)):
        frozen = group.frozen_entries(masked_only=True)            # those without a gradient are not updated at all
        update(group, of_group, state, rates, opt)
        if frozen:
            group.restore(frozen)
            group.write_rounded()
    return state[0]


def _rates(opt: AdamW, factor: Any) -> Any:
    """Count the step in opt.t, and return adam_rates of every group for it.

    In a captured step it is a device array, which every replay fills anew, counting the step as well."""
    def rates_at(factor: float) -> list[tuple]:
        opt.t += 1
        return [adam_rates(group.lr * factor, *opt.betas, group.decay, opt.t) for group in opt.groups]

    recording = array.recording
    if recording is None:
        return rates_at(factor)
    recording.watch(opt)
    now = recording.now(factor)                                    # a function: `factor` may be another at each replay
    return recording.feed(lambda: np.array(rates_at(now())), (len(opt.groups), 3))


def _contiguous_gradient(p: Tensor) -> Array:
    """The gradient of p in float32, contiguous, with 0 where a mask is False."""
    g = masked_gradient(p)
    g = g if g.flags.c_contiguous else xp(g).ascontiguousarray(g)
    if p.mask is None:
        p.grad = g
    return g


def norm_and_scale(gradients: list[Array], clip: float | None, loss: Array | None = None, scale: float = 1.0) -> Array:
    """On the device, (2,): n, the norm of all gradients divided by `scale`; and min(clip / (n + 1e-6), 1) / scale.

    The update multiplies the gradients by the second number.  clip=None: it is 1 / scale.  n is not finite if the loss
    is not."""
    across = min(blocks(max(g.size for g in gradients)), ACROSS)   # thread blocks for each tensor
    parts = empty(gradients[0], (len(gradients), across), np.float32)
    state = empty(gradients[0], (2,), np.float32)
    done = 0
    for some in _per_launch(gradients):
        sums = parts[done:done + len(some)]
        launch.launch("adam.cu", "squares", (across, len(some)), THREADS, table(some), sums, T=state.dtype)
        done += len(some)
    launch.launch("adam.cu", "norm_and_scale", 1, 1024, parts, parts.size, float(clip or 0), 1 / scale, loss, state,
                  T=state.dtype)                                   # one block of 1024 threads; a clip of 0 is no limit
    return state


def _per_launch(tensors: list) -> list[list]:
    """Lists of at most TENSORS tensors, one list per launch."""
    return [tensors[i:i + TENSORS] for i in range(0, len(tensors), TENSORS)]


def update(group: Group, rows: list[tuple[Array, slice]], state: Array, rates: tuple | Array, opt: AdamW) -> None:
    """AdamW's update of the tensors of one group, in place; of the 16-bit copies too, if the group has them.

    rows    [(gradient, the tensor's slice of the group's flat arrays)]
    state   the result of norm_and_scale
    rates   adam_rates of this step; in a captured step a device array of them"""
    by_value, from_device = (rates, None) if isinstance(rates, tuple) else ((0.0, 0.0, 0.0), rates)
    for some in _per_launch(rows):
        gradients = [g for g, _ in some]
        starts = [offset.start for _, offset in some]
        across = min(blocks(max(g.size for g in gradients)), ACROSS)           # thread blocks for each tensor
        launch.launch("adam.cu", "adam_tensors", (across, len(gradients)), THREADS, table(gradients, starts),
                      group.w, *group.moments, group.rounded, state, from_device, *by_value, *_betas(*opt.betas),
                      float(opt.eps), T=group.stored.dtype)


def table(gradients: list[Array], starts: list[int] | None = None) -> np.void:
    """The argument `table` of the kernels in adam.cu, a struct Table that is passed by value.

    It holds addresses and sizes of the gradients; starts: the position of each tensor in the group's flat arrays."""
    out = np.zeros((), TABLE)
    n = len(gradients)
    out["g"][:n] = [address(g) for g in gradients]
    out["size"][:n] = [g.size for g in gradients]
    if starts is not None:
        out["start"][:n] = starts
    return out[()]


@lru_cache(None)
def _betas(b1: float, b2: float) -> tuple[float, ...]:
    return float(b1), float(1 - b1), float(b2), float(1 - b2)

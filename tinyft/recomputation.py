"""Activation recomputation, also called gradient checkpointing.      Chen et al. 2016, arXiv:1604.06174

A backward pass needs the activations of the forward pass, and for L blocks they take L times the memory of one block.
Here a block keeps only its input: its records are dropped when it has run, and made again when the backward pass comes
to it. Then L inputs (B, T, C) are kept, and the activations of one block at a time. The price is one more forward pass
of the blocks, about a third of a step's time.

The gradients are the same to the bit. The second run has the input, the parameters, the autocast region and the random
numbers of the first, and its records take the places of the dropped ones in the walk of backward, which goes through
records in the reverse of the order in which they were made.
"""
from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from . import array, checks, precision
from .context import Context
from .keywords import checked_keywords
from .tensor import Tensor, drop_records, is_recording, next_number

__all__ = ["recompute", "run_block"]


class _State(threading.local):
    on = False


_state = _State()


@checked_keywords
@contextlib.contextmanager
def recompute(enabled: bool = True) -> Iterator[None]:
    """with recompute(): loss = ...      every block of a model keeps only its input, and runs again in backward.

    For the forward pass; backward may run outside. The gradients are those without it, to the bit. enabled=False
    switches it off inside a region. The region holds for this thread alone. Where nothing is recorded (no_grad), and
    outside the blocks, it changes nothing. TypeError unless enabled is a bool.
    As torch.utils.checkpoint; Chen et al. 2016"""
    checks.flag("enabled", enabled)
    before = _state.on
    _state.on = enabled
    try:
        yield
    finally:
        _state.on = before


def run_block(block: Any, x: Tensor, ctx: Context) -> Tensor:
    """block(x, ctx). In a recompute region the block's records are dropped, and made again in the backward pass.

    The block's auxiliary losses, and the tensors that its edits leave in ctx.scratch, are computed again with its
    output. ValueError for a pass with a cache, which the second run would lengthen again; CannotCapture while a step is
    captured as a CUDA graph."""
    if not (_state.on and is_recording()):
        return block(x, ctx)
    if ctx.cache is not None:
        raise ValueError("recompute wants a pass without a cache, which a second run of a block would lengthen again: "
                         "generate under no_grad, or without recompute")
    if array.recording is not None:
        raise array.CannotCapture("recompute draws the random numbers of a block again, from a copy of the generator, "
                                  "which a captured step does not have: capture without recompute")
    start = ctx.snapshot()
    dtype = precision.autocast_state.dtype

    def run_again() -> list[Tensor]:
        again = start.snapshot()
        with precision.autocast(dtype or "bfloat16", enabled=dtype is not None):
            y = block(x, again)
        return _outputs(y, again)

    since = next_number()
    y = block(x, ctx)
    drop_records(f"a {type(block).__name__}", run_again, _outputs(y, ctx), since)
    return y


def _outputs(y: Tensor, ctx: Context) -> list[Tensor]:
    """All tensors that a block may hand on: its value, the auxiliary losses, and those that edits keep in scratch."""
    kept = [value for value in ctx.scratch.values() if isinstance(value, Tensor)]
    return [y, *ctx.losses.values(), *kept]

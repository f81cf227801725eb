"""The plan of a run: trained parameters, expected memory, expected time. Both are measured on the first batches.

The measured passes update nothing: the run that follows is bitwise the one without them.
"""
from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import array, edit, precision, recomputation
from ..nn import Module
from ..train import Loss
from ..train.batch import as_loss
from .rows import first_batches

__all__ = ["Plan", "in_words", "make_plan", "peak_of_process", "size", "tokens_of"]

MEASURED = 2                                             # batches on which a step is measured, after the first one
SAMPLED = 12                                             # batches whose mean size stands for all
FORWARD = 0.4                                            # time of a forward pass as a part of forward and backward
MOMENTS = 3                                              # copies of what trains: gradients, and two moments of AdamW


@dataclass(frozen=True)
class Plan:
    """The costs of a run.

    count    sizes of the model and of what trains
    bytes    expected peak of the arrays of the model and of a step
    seconds  expected time of all steps and evaluations
    """

    count: edit.Count
    bytes: int
    seconds: float


def make_plan(
    model: Module, batches: Any, steps: int, accumulate: int, autocast: str | None, evaluated: int = 0, *,
    recompute: bool = False, loss: Loss | None = None,
) -> Plan:
    """The plan of `steps` updates, each on `accumulate` batches, and of evaluations that read `evaluated` tokens.

    loss: of the training; cross-entropy if None."""
    loss = as_loss(loss)
    sample = first_batches(batches, SAMPLED)
    with array.peak_memory() as memory:
        _pass(model, sample[0], autocast, recompute, loss)
    seconds = 0.0
    tokens = 0
    for batch in sample[1:1 + MEASURED]:
        seconds += _pass(model, batch, autocast, recompute, loss)
        tokens += size_of(batch)
    mean_tokens = sum(size_of(batch) for batch in sample) / len(sample)
    count = edit.count(model)
    held = sum(p.data.nbytes for p in model.parameters()) + _packed_bytes(model)
    total = held + memory["bytes"] + MOMENTS * count.nbytes
    read = steps * accumulate * mean_tokens + FORWARD * evaluated
    return Plan(count, total, read * seconds / tokens)


def tokens_of(batches: Any) -> int:
    """The number of tokens of all batches, padding included."""
    return sum(size_of(batch) for batch in batches.once())


def size_of(batch: Mapping[str, Any]) -> int:
    """The number of tokens of a batch, of its source too, padding included."""
    source = batch.get("source_ids")
    return batch["ids"].size + (0 if source is None else source.size)


def _packed_bytes(model: Module) -> int:
    """The bytes of all buffers, which packed weights consist of."""
    return sum(getattr(value, "nbytes", 0) for value in model.named_buffers().values())


def _pass(model: Module, batch: Any, autocast: str | None, recompute: bool, loss: Loss) -> float:
    """The seconds of one forward and backward pass. No parameter changes, and no gradient remains."""
    start = time.perf_counter()
    model.train()
    try:
        region = precision.autocast(autocast or "bfloat16", enabled=autocast is not None)
        with region, recomputation.recompute(recompute), np.errstate(all="ignore"):
            targets = loss.read(batch)
            targets.output_hidden_states = loss.hidden_states
            _, value = loss(model, targets, np.random.default_rng(0))
        value.backward()
    finally:
        model.train(False)
        model.zero_grad()
        if loss.module is not None:
            loss.module.zero_grad()
    return time.perf_counter() - start


def peak_of_process() -> int:
    """The largest memory of this process so far in bytes, with Python and the loading of the model; 0 if unknown."""
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_words(seconds: float) -> str:
    """A time in seconds, minutes or hours."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


def size(n: float) -> str:
    """Bytes as text."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if n >= unit:
            return f"{n / unit:.1f} {name}"
    return f"{n / 1e3:.0f} kB"

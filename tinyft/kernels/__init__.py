"""Faster drop-ins for some ops, each held to its definition in ops.py by a property.  The library is right without them.

    install()     put them in place (done when tinyft is imported, unless TINYFT_KERNELS=off)
    with definitions(): ...     the plain ops, for the length of a `with`
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np

from ..optim import adam_update
from ..tensor import OPS
from .system import keep_memory
from .threads import get_num_threads, set_num_threads

__all__ = ["install", "remove", "definitions", "keep_memory", "set_num_threads", "get_num_threads"]


def install() -> None:
    "Register the NumPy kernels.  A kernel has its definition's signature: arrays -> (value, pullbacks)."
    from . import numpy as fast
    for name in ("linear", "gelu", "gelu_tanh", "layer_norm", "embedding", "attention", "cross_entropy"):
        OPS[name].fast[np.ndarray] = getattr(fast, name)
    adam_update.fast[np.ndarray] = fast.adam_update


def remove() -> None:
    for f in (*OPS.values(), adam_update):
        f.fast.clear()


@contextlib.contextmanager
def definitions() -> Iterator[None]:
    "with definitions(): every op runs as it is written in ops.py."
    kept = [(f, dict(f.fast)) for f in (*OPS.values(), adam_update)]
    remove()
    try:
        yield
    finally:
        for f, fast in kept:
            f.fast.update(fast)

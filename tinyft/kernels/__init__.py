"""Faster drop-ins for some ops, each held to its definition in ops.py by a property.  The library is right without them.

    numpy.py     for NumPy arrays        cuda/        for CuPy arrays: CUDA kernels, and products by cuBLAS

    install()     put them in place (done when tinyft is imported, unless TINYFT_KERNELS=off)
    with definitions(): ...     the plain ops, for the length of a `with`
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType

import numpy as np

from .. import array
from ..optim import adam_update, at_once
from ..tensor import OPS
from .system import keep_memory
from .threads import get_num_threads, set_num_threads

__all__ = ["install", "remove", "definitions", "keep_memory", "set_num_threads", "get_num_threads"]


def install() -> None:
    "Register the kernels; those for CuPy when that backend is first used.  A kernel has its definition's signature: arrays -> (value, pullbacks)."
    from . import numpy as fast
    for name in ("linear", "gelu", "gelu_tanh", "layer_norm", "embedding", "attention", "cross_entropy"):
        OPS[name].fast[np.ndarray] = getattr(fast, name)
    adam_update.fast[np.ndarray] = fast.adam_update
    array.on_open("cupy", _register_cuda)


def _register_cuda(kind: type, module: ModuleType) -> None:
    from . import cuda
    cuda.register(kind, module)


def remove() -> None:
    for fast in _tables():
        fast.clear()


def _tables() -> list[dict]:
    "Where kernels are registered."
    return [*(f.fast for f in OPS.values()), adam_update.fast, at_once]


@contextlib.contextmanager
def definitions() -> Iterator[None]:
    "with definitions(): every op runs as it is written in ops.py."
    kept = [(fast, dict(fast)) for fast in _tables()]
    remove()
    try:
        yield
    finally:
        for fast, was in kept:
            fast.update(was)

"""Faster drop-ins for some ops, each held to its definition in ops.py by a property.  The library is right without them.

    numpy.py     for NumPy arrays        cuda/        for CuPy arrays: CUDA kernels, and products by cuBLAS

    install()     put them in place (done when tinyft is imported, unless TINYFT_KERNELS=off)
    with definitions(): ...     the plain ops, for the length of a `with`
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from types import ModuleType

import numpy as np

from .. import array
from ..optim import adam_update
from ..tensor import OPS


def install() -> None:
    "Register the kernels; those for CuPy when that backend is first used.  A kernel has its definition's signature: arrays -> (value, pullbacks)."
    from . import numpy as fast
    for name in ("gelu", "gelu_tanh", "layer_norm", "embedding"):
        OPS[name].fast[np.ndarray] = getattr(fast, name)
    adam_update.fast[np.ndarray] = fast.adam_update
    array.on_open("cupy", _register_cuda)


def _register_cuda(kind: type, module: ModuleType) -> None:
    from . import cuda
    cuda.register(kind, module)


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


@functools.cache
def keep_memory() -> bool:
    """Let the C library keep freed memory for the next step (glibc only; True if it agreed).  Done by the first fit, once a process.

    By default every large array is a fresh mapping, whose pages the system must find and clear at each use: nearly half of a training
    step's time (tests/benchmarks/LOG.md).  The process then holds on to the most memory it ever needed."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):         # not Linux, or not glibc
        return False
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    return all([mallopt(mmap_max, 0), mallopt(trim_threshold, -1), mallopt(top_pad, 64 << 20)])

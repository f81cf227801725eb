"""Kernels: faster implementations of some ops, each held to its definition in ops.py by a property.

The library is right without them; dispatch.py chooses among them.

    numpy.py     for NumPy arrays        cuda/        for CuPy arrays: CUDA kernels, and products by cuBLAS
    packed.py    for NumPy arrays: products with packed weights

    install()                   register the kernels (done when tinyft is imported, unless TINYFT_KERNELS=off)
    with definitions(): ...     run the definitions alone
"""
from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from .. import array, dispatch
from ..dispatch import definitions_only as definitions
from ..keywords import checked_keywords
from ..optim.optimizers import adam_update
from ..precision import widen_half
from ..tensor import OPS
from .system import keep_memory
from .threads import get_num_threads, set_num_threads

__all__ = ["capture", "install", "remove", "definitions", "keep_memory", "set_num_threads", "get_num_threads"]


def install() -> None:
    """Register the kernels for NumPy now, and the kernels for CuPy when that backend is first used.

    dispatch.py then prefers them to the definitions in ops.py."""
    from . import numpy as fast
    from . import packed
    for name in fast.OPS:
        dispatch.register(OPS[name], np.ndarray, getattr(fast, name))
    dispatch.register(adam_update, np.ndarray, fast.adam_update)
    dispatch.register(OPS["_packed_linear"], np.ndarray, packed.packed_linear)
    dispatch.register(widen_half, np.ndarray, packed.widen_half)
    array.on_open("cupy", _register_cuda)
    array.on_open("sizes", _register_sizes)


def _register_cuda(kind: type, module: ModuleType) -> None:
    from . import cuda
    cuda.register(kind, module)


def _register_sizes(kind: type, module: Any) -> None:
    from .sizes import kernels
    for definition, kernel in kernels().items():
        dispatch.register(definition, kind, kernel)


@checked_keywords
def capture(step: Callable, fallback: Callable | None = None) -> Callable:
    """`step`, captured as one CUDA graph and replayed.  On NumPy, `step` itself: the same lines run on every backend.

        def step(ids, labels, factor, rng):
            loss = ops.cross_entropy(model(ids, rng=rng), labels)
            loss.backward()
            optimizer.step(factor, clip=1.0)
            optimizer.zero_grad()
            return loss
        step = ft.capture(step)
        loss = step(ids, labels, schedule(t, T), rng)

    Everything that changes from call to call is an argument: arrays, a float for the optimiser's factor, a generator
    for dropout.  The first two calls with arguments of the same shapes run eagerly; from the third on the graph is
    replayed, and no Python of the step runs.  The results are copies.  Eight shapes get a graph each; a call with
    another shape goes to `fallback`, or raises without one.  A norm that is not finite updates nothing;
    optimizer.check_norm(float(norm)) raises then.

    CannotCapture, naming the line, if the step waits for the device, transfers host data, or gives kernels other
    numbers at each call.  One change goes unnoticed: a Python number of the step's own that multiplies a whole array
    keeps its value."""
    if array.backend() != "cupy":
        return step
    from .cuda.capture import Captured
    return Captured(step, fallback)


def remove() -> None:
    """Unregister all kernels: every op and every update is its definition."""
    dispatch.KERNELS.clear()

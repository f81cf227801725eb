"""Kernels: faster implementations of some definitions. Property-based tests compare each with its definition.

The library is right without them; dispatch.py chooses among them.

    numpy.py     for NumPy arrays (attention.py: in tiles)          cuda/    for CuPy arrays: CUDA, and cuBLAS products
    packed.py    for NumPy arrays: products with packed weights
    compiled/    for NumPy arrays: loops compiled by Numba, the extra tinyft[fast]

    install()                   register the kernels that TINYFT_KERNELS chooses; done when tinyft is imported
    with definitions(): ...     run the definitions alone
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from .. import array, checks, dispatch
from ..dispatch import definitions_only as definitions
from ..keywords import checked_keywords
from ..optim.optimizers import adam_update, squared_norm
from ..precision import widen_half
from ..tensor import OPS, add_to, sum_of
from .system import keep_memory
from .threads import get_num_threads, set_num_threads

__all__ = ["cache_folder", "capture", "chosen", "definitions", "get_num_threads", "in_use", "install", "keep_memory",
           "numpy_only", "remove", "set_num_threads"]

CHOICES = ("auto", "numba", "numpy", "off")
# The ops that have a compiled kernel; adam_update and widen_half have one too. Numba is imported when the first of them
# runs.
COMPILED = ("_packed_linear", "attention", "cross_entropy", "dropout", "embedding", "gelu", "gelu_tanh", "layer_norm",
            "linear", "project", "rms_norm", "rotary", "swiglu")


def chosen() -> str:
    """The choice of kernels in the environment variable TINYFT_KERNELS.

    auto     the compiled kernels if Numba is installed, and those for NumPy (the default)
    numba    the same; without Numba an error
    numpy    the kernels for NumPy alone
    off      no kernel: every op is its definition

    Kernels for CuPy run with all of them but "off". ValueError for another value.
    """
    return checks.one_of("TINYFT_KERNELS", os.environ.get("TINYFT_KERNELS", "auto"), CHOICES)


def install(choice: str | None = None) -> None:
    """Register the kernels for NumPy now, and the kernels for CuPy when that backend is first used.

    dispatch.py then prefers them to the definitions in ops.py. choice: see `chosen`; None is that of the environment.
    With "off" nothing is registered. ImportError for "numba" without Numba.
    """
    global _choice
    choice = chosen() if choice is None else checks.one_of("install: choice", choice, CHOICES)
    _choice = choice
    if choice == "off":
        return
    if choice == "numba" and not has_numba():
        raise ImportError('TINYFT_KERNELS=numba wants Numba: pip install "tinyft[fast]" installs it')
    from . import numpy as fast
    from . import packed

    for name in fast.OPS:
        dispatch.register(OPS[name], np.ndarray, getattr(fast, name))
    for definition in (adam_update, add_to, squared_norm, sum_of):
        dispatch.register(definition, np.ndarray, getattr(fast, definition.__name__))
    dispatch.register(OPS["_packed_linear"], np.ndarray, packed.packed_linear)
    dispatch.register(widen_half, np.ndarray, packed.widen_half)
    array.on_open("cupy", _register_cuda)
    array.on_open("sizes", _register_sizes)
    if choice != "numpy" and has_numba():
        for definition in _with_compiled_kernel():
            dispatch.register(definition, np.ndarray, _compiled(definition))


_choice = "off"  # of the last `install`


def _with_compiled_kernel() -> list[Callable]:
    """The definitions that have a compiled kernel."""
    return [adam_update, widen_half, *(OPS[name] for name in COMPILED)]


def in_use() -> str:
    """The kernels that are registered for NumPy arrays: "numba" (and those for NumPy), "numpy" or "off".

    "off" inside of `definitions`. "numba" also where Numba is installed and turns out not to run.
    """
    found = dispatch.find(OPS["linear"], np.ndarray)
    if not found:
        return "off"
    return "numba" if found[0] is _late.get(OPS["linear"]) else "numpy"


# ---------------------------------------------------------------------------------------------------- Numba
@cache
def has_numba() -> bool:
    """True if Numba is installed. It is not imported."""
    return importlib.util.find_spec("numba") is not None


_late: dict[Callable, Callable] = {}  # {definition: its kernel of `_compiled`}


def _compiled(definition: Callable) -> Callable:
    """The compiled kernel of a definition. Its first call imports Numba, and compiles what is not on the disk."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        found = compiled_kernel(definition)
        return NotImplemented if found is None else found(*args, **kwargs)

    return _late.setdefault(definition, kernel)


@cache
def compiled_kernel(definition: Callable) -> Callable | None:
    """The compiled kernel of a definition; None, with a line on standard error, if Numba cannot compile it here.

    RuntimeError instead with TINYFT_KERNELS=numba.
    """
    try:
        from .compiled import load
        return load(definition)
    except Exception as error:  # Numba supports not every version of NumPy and Python
        plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # Numba's errors are coloured
        reason = " ".join(plain.split())[:200]
        if _choice == "numba":
            raise RuntimeError(f"TINYFT_KERNELS=numba wants a Numba that runs here: {reason}") from error
        _say_once(f"tinyft: Numba does not run here, the kernels for NumPy do its work: {reason}")
        return None


@cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


def compiled_kernels() -> dict[Callable, Callable]:
    """{definition: its compiled kernel}, all compiled now; without those that Numba cannot compile here."""
    found = {definition: compiled_kernel(definition) for definition in _with_compiled_kernel()}
    return {definition: kernel for definition, kernel in found.items() if kernel}


def cache_folder() -> Path | None:
    """The folder in which the machine code of the compiled kernels is kept; None if no folder can be written.

    The environment variable TINYFT_CACHE names another one. Wants Numba.
    """
    from .compiled import compiler
    return compiler.cache_folder()


def _register_cuda(kind: type, module: ModuleType) -> None:
    from . import cuda
    cuda.register(kind, module)


def _register_sizes(kind: type, module: Any) -> None:
    """The counterparts of the kernels that are in use for NumPy arrays."""
    from . import compiled_sizes, sizes

    for definition, kernel in sizes.kernels().items():
        dispatch.register(definition, kind, kernel)
    if _choice in ("auto", "numba") and has_numba():
        for definition, kernel in compiled_sizes.kernels().items():
            dispatch.register(definition, kind, kernel)


def numpy_only() -> AbstractContextManager[None]:
    """with numpy_only(): no thread of the program runs compiled kernels; those for NumPy run."""
    from . import compiled_sizes

    before = array.backend()
    array.use("sizes")  # its kernels are registered at its first use
    array.use(before)
    compiled = [_compiled(definition) for definition in _with_compiled_kernel()]
    compiled += compiled_sizes.kernels().values()
    return dispatch.only(lambda kernel: kernel not in compiled)


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
    """Unregister all kernels: every op and every update is its definition. A backend that is used for the first time
    later registers its kernels again, but none with compiled ones as their model.
    """
    global _choice
    _choice = "off"
    dispatch.KERNELS.clear()

"""Kernels in plain loops, compiled by Numba: the extra tinyft[fast].

    compiler.py        the decorator, and the folder of the machine code
    shared.py          which arrays they take, their share of the threads, exp and maximum
    elementwise.py     GELU, SwiGLU, dropout              norms.py        layer norm, RMS norm
    attention.py       attention                          rows.py         linear maps, embeddings, rotary positions
    cross_entropy.py   cross-entropy                      update.py       AdamW
    packed.py          products of a few rows with packed weights
    waiting.py         the wait of one thread for another

They stand in front of the NumPy kernels, with the same signatures. What they do not take goes to those.
The modules import Numba; tinyft/kernels/__init__.py imports them at the first call of a kernel. Each kernel is compiled
at its own first call: a program waits for those that it uses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ...optim.optimizers import adam_update
from ...precision import widen_half
from ...tensor import OPS
from ..threads import wait_without_sleep

__all__ = ["load"]


def load(definition: Callable) -> Callable:
    """The compiled kernel of a definition. What it calls is compiled, or read from the disk, now."""
    kernel = _kernels()[definition]
    for function in kernel.functions:
        function.load()
    return kernel


@functools.cache
def _kernels() -> dict[Callable, Any]:
    """{definition: its compiled kernel, with the functions that it calls as its attribute `functions`}"""
    from . import attention, cross_entropy, elementwise, norms, packed, rows, update, waiting

    if waiting.is_available:
        wait_without_sleep(waiting)
    found: dict[Callable, Any] = {
        adam_update: update.adam_update,
        widen_half: packed.widen_half,
        OPS["_packed_linear"]: packed.packed_linear,
    }
    for module in (attention, cross_entropy, elementwise, norms, rows):
        for name in module.__all__:
            found[OPS[name]] = getattr(module, name)
    return found

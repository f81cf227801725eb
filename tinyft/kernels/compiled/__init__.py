"""Kernels in plain loops, compiled by Numba: the extra tinyft[fast].

    compiler.py        the decorator, and the folder of the machine code
    shared.py          which arrays they take, their share of the threads, exp and maximum
    elementwise.py     GELU, SwiGLU, dropout              norms.py        layer norm, RMS norm
    attention.py       attention                          rows.py         linear maps, embeddings, rotary positions
    cross_entropy.py   cross-entropy                      update.py       AdamW
    packed.py          products of a few rows with packed weights

They stand in front of the NumPy kernels, with the same signatures. What they do not take goes to those.
The modules import Numba, and compile what is not on the disk: `kernels` imports them, at the first call of a kernel.
"""

from __future__ import annotations

from collections.abc import Callable

from ...optim.optimizers import adam_update
from ...precision import widen_half
from ...tensor import OPS

__all__ = ["kernels"]


def kernels() -> dict[Callable, Callable]:
    """{definition: its compiled kernel}"""
    from . import attention, cross_entropy, elementwise, norms, packed, rows, update

    found: dict[Callable, Callable] = {
        adam_update: update.adam_update,
        widen_half: packed.widen_half,
        OPS["_packed_linear"]: packed.packed_linear,
    }
    for module in (attention, cross_entropy, elementwise, norms, rows):
        for name in module.__all__:
            found[OPS[name]] = getattr(module, name)
    return found

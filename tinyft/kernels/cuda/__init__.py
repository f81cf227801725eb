"""CUDA kernels: the library's ops on CuPy arrays, each in a readable .cu file, each held to its definition in ops.py.

    layers.py    the drop-ins: linear, matmul, project, layer_norm, gelu, cross_entropy, embedding, dropout
    attention.py attention
    optimizer.py AdamW over all tensors at once
    packed.py    products with packed weights: 1 to 8 bits a number
    gemm.py      matrix products straight through cuBLAS
    launch.py    from a .cu file to a running kernel
    *.cu         the kernels; the same source runs on the CPU, through cpu_kernel.py, where the tests hold it to the
                 definitions

Nothing here imports CuPy by itself: `register` is called when the backend is opened.
"""
from __future__ import annotations

from types import ModuleType

from ... import array, dispatch
from ...optim.optimizers import Optimizer, adam_update
from ...precision import cast_parameter, takes_16_bit
from ...tensor import OPS
from . import casts, gemm, layers, optimizer, packed
from .launch import COMPILERS


def register(kind: type, module: ModuleType) -> None:
    """Put the kernels in place for arrays of this type, CuPy's."""
    COMPILERS[kind] = module.RawKernel
    gemm.LIBRARIES[kind] = gemm.Cublas()
    dispatch.register(array.draw_uniform, kind, layers.uniform_like)
    put_in_place(kind)


def put_in_place(kind: type) -> None:
    """Let the drop-ins answer for arrays of this type."""
    for name in layers.NAMES:
        dispatch.register(OPS[name], kind, takes_16_bit(getattr(layers, name)))
    dispatch.register(OPS["_packed_linear"], kind, takes_16_bit(packed.packed_linear))
    dispatch.register(cast_parameter, kind, casts.cast_parameter)
    dispatch.register(adam_update, kind, optimizer.adam_update)
    dispatch.register(Optimizer.update_pieces, kind, optimizer.update_pieces)

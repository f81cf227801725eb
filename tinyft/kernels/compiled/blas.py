"""sgemm of NumPy's own BLAS, for compiled code: attention computes many small products without a call of NumPy.

The compiled code knows the function by a name. Its address, which differs from process to process, is told to LLVM.
"""

from __future__ import annotations

import ctypes

from numba import types

from .. import system
from .compiler import add_symbol, float32

__all__ = ["NOT_TRANSPOSED", "ROW_MAJOR", "TRANSPOSED", "is_available", "sgemm"]

ROW_MAJOR, NOT_TRANSPOSED, TRANSPOSED = 101, 111, 112  # numbers of cblas.h


def _find() -> tuple[int, bool] | None:
    """(address, True if its sizes have 64 bits) of cblas_sgemm in a BLAS library that is loaded; None without one."""
    for library in system.libraries():
        function, has_64_bits = system.blas_function(library, "cblas_sgemm")
        if function is not None:
            return ctypes.cast(function, ctypes.c_void_p).value, has_64_bits
    return None


@ctypes.CFUNCTYPE(None)
def _nothing() -> None:
    """Stands for sgemm where none is found. Nothing calls it; but LLVM must know the name."""


_found = _find()
is_available = _found is not None
_address, _has_64_bits = _found or (ctypes.cast(_nothing, ctypes.c_void_p).value, False)
NAME = f"tinyft_sgemm_{64 if _has_64_bits else 32}" if is_available else "tinyft_no_sgemm"
add_symbol(NAME, _address)

_size = types.int64 if _has_64_bits else types.int32
_flag = types.int32
_array = types.CPointer(float32)
# C = α op(A) op(B) + β C:  order, op(A), op(B), M, N, K, α, A, its row length, B, its row length, β, C, its row length
sgemm = types.ExternalFunction(NAME, types.void(
    _flag, _flag, _flag, _size, _size, _size, float32, _array, _size, _array, _size, float32, _array, _size,
))

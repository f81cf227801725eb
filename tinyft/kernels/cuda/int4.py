"""Products with a weight of four bits a number.

    y = x Ŵᵀ,  Ŵ[row][k] = scale[row][k // group] (code − zero[row][k // group])

codes (N, ⌈K/8⌉) uint32, eight to a word, the first in the lowest four bits.
scale, zero (N, ⌈K/group⌉), float32 or 16-bit.
"""
from __future__ import annotations

import numpy as np

from ...array import Array, xp
from ...ops import flat
from . import gemm
from .launch import C_TYPES, THREADS, blocks, empty, launch

FEW = 8                                                  # rows of x up to which the codes are read once for each row
ROWS = 32                                                # rows of Ŵ to a block: four to a warp


def dequantized(codes: Array, scale: Array, zero: Array, k: int, group: int) -> Array:
    """Ŵ (N, K), Ŵ[row][k] = scale (code − zero), in scale's dtype: the definition, on any backend.

    codes (N, ⌈K/8⌉) uint32, eight codes to a word; scale, zero (N, ⌈K/group⌉); k: K."""
    m = xp(codes)
    shifts = m.arange(0, 32, 4, dtype=np.uint32)
    digits = ((codes[:, :, None] >> shifts) & 15).reshape(len(codes), -1)[:, :k].astype(scale.dtype)
    column_group = m.arange(k) // group
    return scale[:, column_group] * (digits - zero[:, column_group])


def dequantize(codes: Array, scale: Array, zero: Array, k: int, group: int, dtype: np.dtype) -> Array:
    """Ŵ (N, K) in that dtype, as `dequantized` defines it: by a kernel in one pass, if it takes these arrays."""
    if not _suits(codes, scale, zero, group, np.dtype(dtype)):
        return dequantized(codes, scale, zero, k, group).astype(dtype)
    W = empty(codes, (len(codes), k), dtype)
    launch("int4.cu", "int4_dequantize", blocks(codes.size), THREADS, codes, scale, zero, W, len(codes), k, group,
           T=W.dtype, S=scale.dtype)
    return W


def matmul(x: Array, codes: Array, scale: Array, zero: Array, group: int) -> Array:
    """y = x Ŵᵀ:  x (..., K) -> y (..., N), with Ŵ packed as codes, scale and zero.

    A few rows of x are multiplied straight from the codes, if K and group are multiples of 32.  For many rows, Ŵ is
    dequantized once, for a dense product.
    """
    X = flat(x)                                          # (rows, K)
    k = x.shape[-1]
    aligned = k % 32 == 0 and group % 32 == 0 and X.flags.c_contiguous
    if len(X) <= FEW and x.size and aligned and _suits(codes, scale, zero, group, x.dtype):
        y = empty(x, (len(X), len(codes)))
        grid = (-(-len(codes) // ROWS), len(X))
        launch("int4.cu", "int4_matvec", grid, THREADS, codes, scale, zero, X, y, len(codes), k, group,
               T=x.dtype, S=scale.dtype)
    else:
        W = dequantize(codes, scale, zero, k, group, x.dtype)
        y = gemm.matmul(X, W.T) if type(x) in gemm.LIBRARIES else X @ W.T
    return y.reshape(*x.shape[:-1], len(codes))


def _suits(codes: Array, scale: Array, zero: Array, group: int, dtype: np.dtype) -> bool:
    """True if the kernels take these arrays, for results of this dtype."""
    known_dtypes = codes.dtype == np.uint32 and scale.dtype == zero.dtype
    known_dtypes = known_dtypes and scale.dtype in C_TYPES and dtype in C_TYPES
    contiguous = codes.flags.c_contiguous and scale.flags.c_contiguous and zero.flags.c_contiguous
    return known_dtypes and contiguous and group % 8 == 0 and 0 < codes.size < 2**31

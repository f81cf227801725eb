"""Products with packed weights:  y = x Wᵀ,  w = s (level(q) − z) + m, of every width and form in compress/grouped.py.

A few rows of x are multiplied straight from the codes: the time is that of reading the weight, so a packed model is
fast as well as small. For many rows, and for the gradient of x, a tile of dense rows is made at a time, for a product
of dense matrices.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from ...array import Array
from ...ops import flat
from . import gemm
from .launch import C_TYPES, THREADS, blocks, contiguous, empty, launch

FEW = 8                                                  # rows of x up to which the codes are read once for each row
FILL = 1024                                              # blocks of a matrix-vector product that fill a large device
WARPS = THREADS // 32


def packed_linear(x: Array, packed: Any = None) -> Any:
    """(x Wᵀ, pullbacks). The dense tiles have x's dtype; sums are in float32."""
    suits = packed.in_groups and x.dtype in C_TYPES and x.dtype.itemsize <= packed.unit.dtype.itemsize
    if not suits or packed.unit.dtype not in C_TYPES or not x.size or x.shape[-1] != packed.shape[1]:
        return NotImplemented
    shape = x.shape
    X = contiguous(flat(x))                              # (N, in)
    weight = Weight(packed)
    y = weight.from_codes(X) if len(X) <= FEW else weight.from_tiles(X)

    def back(g: Array) -> Array:
        return weight.input_gradient(contiguous(flat(g))).reshape(shape)
    return y.reshape(*shape[:-1], packed.shape[0]), (back,)


class Weight:
    """The arrays of a packed weight as the kernels take them."""

    def __init__(self, packed: Any):
        self.packed = packed
        self.codes = packed.codes                        # (bytes, out)
        out, width = packed.shape
        self.sizes = (out, width, packed.group)
        self.scale = numbers(packed.scale_bits, packed)
        shift = packed.shift_bits
        self.shift = None if shift is None else numbers(shift, packed).astype(self.scale.dtype, copy=False)
        self.table = packed.table_values()
        self.parts = (self.codes, self.scale, packed.zero_codes, float(packed.zero_point), self.shift, self.table)
        self.constants = {"S": self.scale.dtype, "BITS": packed.bits}

    def from_codes(self, X: Array) -> Array:
        """X Wᵀ for a few rows X (N, in): a block to each part of `in`, and then the sum over the parts."""
        packed = self.packed
        out, width, _ = self.sizes
        if packed.input_scale_bits is not None:
            X = X / packed.input_scale.astype(X.dtype)
        if packed.order is not None:
            X = X[:, packed.order]
        lanes = 1 if out % 4 else 4
        across = -(-out // (32 * lanes))
        octets = -(-width // 8)
        wanted = max(1, min(FILL // (across * len(X)), octets // WARPS))
        each = -(-octets // (WARPS * wanted))            # octets to a warp
        count = -(-octets // (WARPS * each))
        sums = empty(X, (count, len(X), out), np.float32)
        launch("packed.cu", "packed_matvec", (across, len(X), count), THREADS, *self.parts, contiguous(X), sums,
               *self.sizes, each, T=X.dtype, LANES=lanes, **self.constants)
        y = empty(X, (len(X), out))
        launch("packed.cu", "packed_sum", blocks(y.size), THREADS, sums, y, count, y.size, T=X.dtype, LANES=lanes,
               **self.constants)
        return y

    def columns(self, rows: slice, dtype: np.dtype) -> Array:
        """W[rows]ᵀ, (in, n), in this dtype."""
        packed = self.packed
        n = rows.stop - rows.start
        scale = None if packed.input_scale_bits is None else contiguous(packed.input_scale)
        dense = empty(self.codes, (packed.shape[1], n), dtype)
        launch("packed.cu", "packed_columns", blocks(dense.size // 8 + 1), THREADS, *self.parts, packed.order, scale,
               dense, *self.sizes, rows.start, n, T=dense.dtype, **self.constants)
        return dense

    def from_tiles(self, X: Array) -> Array:
        """X Wᵀ for many rows X (N, in)."""
        y = empty(X, (len(X), self.packed.shape[0]))
        for rows in self.packed.blocks():
            gemm.matmul(X, self.columns(rows, X.dtype), out=y[:, rows])
        return y

    def input_gradient(self, g: Array) -> Array:
        """g W, (N, in), for g (N, out)."""
        dx = empty(g, (len(g), self.packed.shape[1]))
        for i, rows in enumerate(self.packed.blocks()):
            gemm.matmul(g[:, rows], self.columns(rows, g.dtype).T, out=dx, add=i > 0)
        return dx


def numbers(bits: Array | None, packed: Any) -> Array:
    """The scales or the shifts (groups, out) as float16 or float32, as they are stored. Scales that are quantized
    themselves have no such bits: they are decompressed."""
    if bits is None:
        return contiguous(packed.scales(slice(None)))
    return bits.view(np.float16 if bits.dtype == np.uint16 else np.float32)

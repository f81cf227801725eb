"""Packed weights of codes and scales: what is alike in Grouped (grouped.py) and in Int8Weight (quantize/int8.py).

In memory the rows of W are the last axis of every array. A NumPy operation on a block of rows then runs through long
contiguous lines.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from .. import array, dispatch
from ..array import Array, xp
from ..nn import Packed
from ..precision import widen_half

__all__ = ["Coded", "as_bits", "from_bits"]

DENSE = 1 << 20                                          # dense weights that a product holds at a time, at most


class Coded(Packed):
    """A weight W (out, in) as codes, whole numbers, and scales. Subclasses write `columns`.

    codes        (..., out)
    scale_bits   (out,) or (groups, out): the scales as bits, see as_bits"""

    codes: Array
    scale_bits: Array

    def __init__(self, codes: np.ndarray, scale: Any, group: int | None = None):
        """The shape of a weight with codes (out, in), and with scales (out,), or (out, groups) for groups of `group`
        neighbours in a row. Subclasses keep both. ValueError for arrays of other shapes."""
        name = type(self).__name__
        if codes.ndim != 2 or not codes.size:
            raise ValueError(f"{name} wants codes of shape (out, in), got {codes.shape}")
        out, width = codes.shape
        wanted = (out,) if group is None else (out, -(-width // group))
        if scale.shape != wanted:
            raise ValueError(f"{name} wants scales of shape {wanted}, got {scale.shape}")
        self.set_shape(codes.shape)

    @classmethod
    def without_codes(cls, shape: tuple[int, int]) -> Any:
        """A weight of this shape before it has codes and scales: the beginning of `restore`."""
        packed = cls.__new__(cls)
        packed.set_shape(shape)
        return packed

    def set_shape(self, shape: tuple[int, int]) -> None:
        """Set the shape (out, in), and float32 as the dtype of dense rows."""
        self.shape = shape
        self.unit = array.asarray(np.empty(0, np.float32))     # empty; `to(dtype)` gives it the dtype of dense rows

    @property
    def rows_per_block(self) -> int:                     # type: ignore[override]
        """The number of dense rows that a product holds at a time."""
        return max(1, DENSE // self.shape[1])

    def columns(self, rows: Any) -> Array:
        """Wᵀ[:, rows], (in, n), in the dtype of dense rows, for a slice or an array (n,) of row numbers."""
        raise NotImplementedError(f"{type(self).__name__} has no columns")

    def dequantize(self) -> Array:
        """The dense weight (out, in), in C order."""
        dense = xp(self.codes).empty(self.shape, self.unit.dtype)
        for rows in self.blocks():
            dense[rows] = self.dequantize_rows(rows)
        return dense

    def dequantize_rows(self, rows: Any) -> Array:
        """W[rows]: (n, in) for a slice, (..., in) for an array of row numbers (...)."""
        if isinstance(rows, slice):
            return self.columns(rows).T
        return self.columns(rows.reshape(-1)).T.reshape(*rows.shape, self.shape[1])


# ── numbers that `to(dtype)` must not round ──────────────────────────────────────────────────────────────────────────
def as_bits(values: np.ndarray, name: str) -> np.ndarray:
    """Real numbers as the bits of float16, uint16, if float16 holds all of them exactly; else of float32, uint32.

    A model's `to(dtype)` casts floating-point buffers, and would round scales. ValueError unless all are finite."""
    single = values.astype(np.float32)
    if not np.isfinite(single).all():
        raise ValueError(f"{name} wants finite scales, got inf or NaN")
    with np.errstate(over="ignore"):
        half = single.astype(np.float16)
    if (half.astype(np.float32) == single).all():
        return half.view(np.uint16)
    return single.view(np.uint32)


def from_bits(bits: Array) -> Array:
    """The numbers, float32, of the bits that as_bits gave."""
    if bits.dtype == np.uint16:
        return dispatch.run(widen_half, type(bits), bits)
    return bits.view(np.float32)

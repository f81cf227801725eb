"""The 16-bit copies of parameters under autocast.

An optimiser keeps its parameters as views of one flat array.  Casting that array takes one launch; casting each
parameter takes one launch each.  So the whole flat array is cast at the first use, and the copy is kept for the
autocast region until a leaf is written to.  The cast parameters lie next to each other as the parameters do,
which joins three products to one (layers.project).
"""
from __future__ import annotations

from typing import Any

import numpy as np

from ... import precision
from ...array import Array, address
from ...precision import autocast_state, rounded


class Casts:
    """The flat arrays that were cast in one autocast region, as of a count of writes to leaves."""

    def __init__(self) -> None:
        self.writes = precision.writes
        self.by_address: dict[int, tuple[Array, Array]] = {}   # address of a flat array -> (it, its 16-bit copy)

    def get(self, flat: Array, dtype: np.dtype) -> Array:
        """The 16-bit copy of a flat array."""
        key = address(flat)
        if key not in self.by_address:
            self.by_address[key] = flat, rounded(flat, dtype)  # keeping `flat` keeps its address from another array
        return self.by_address[key][1]


def cast_parameter(a: Array, dtype: np.dtype) -> Any:
    """The parameter `a` in 16 bits: a view of the 16-bit copy of its optimiser's flat array.

    NotImplemented if the parameter is not a contiguous view of a flat array, both float32."""
    flat = a.base
    if a.dtype != np.float32 or flat is None or flat.ndim != 1 or flat.dtype != a.dtype or not a.flags.c_contiguous:
        return NotImplemented
    casts = autocast_state.cache                             # None at the start of a region
    if casts is None or casts.writes != precision.writes:
        casts = autocast_state.cache = Casts()               # a parameter was written to since: cast again
    start = (address(a) - address(flat)) // a.itemsize
    return casts.get(flat, dtype)[start:start + a.size].reshape(a.shape)


def forget() -> None:
    """Drop the copies of this autocast region: a captured step casts its parameters anew at each replay."""
    autocast_state.cache = None

"""The dynamic 8-bit data type: 256 values from 10⁻⁷ to 1, denser where a decade is larger.

    decade i = 0 ... 6, from 10^(i−7) to 10^(i−6)      the middles of n equal intervals, and the values 0 and 1
    signed       n = 2^i, with both signs              for numbers of both signs, such as a first moment
    unsigned     n = 2^(i+1)                           for numbers >= 0, such as a second moment

The relative error is small over seven decades, where 256 equal steps would lose all that is below 1/256 of the largest.
compress/codebooks.py and optim/eight_bit.py use it.

8-Bit Approximations for Parallelism in Deep Learning.  Dettmers 2016.  arXiv:1511.04561.   8-bit Optimizers via
Block-wise Quantization.  Dettmers et al. 2021, §2.1.  arXiv:2110.02861
"""
from __future__ import annotations

from functools import cache

import numpy as np

from . import array
from .array import Array, xp

__all__ = ["decode", "dynamic_values", "encode"]


def dynamic_values(*, signed: bool = True) -> np.ndarray:
    """The 256 values, float32, upwards. 1 is among them, −1 is not: the lowest signed one is −0.99296875."""
    values = [0.0, 1.0]
    for i in range(7):
        ends = np.linspace(0.1, 1, 2**(i if signed else i + 1) + 1)
        middles = (ends[:-1] + ends[1:]) / 2 * 10.0**(i - 6)
        values += [*middles, *-middles] if signed else [*middles]
    return np.sort(values).astype(np.float32)


def encode(u: Array, *, signed: bool) -> Array:
    """The code of the value nearest to each number of u, float32 within −1 ... 1; of two equally near, the lower.

    It is the number of midpoints between neighbouring values that lie below u."""
    return xp(u).searchsorted(_on(array.name_of(u), signed)[1], u).astype(np.uint8)


def decode(codes: Array, *, signed: bool) -> Array:
    """The values of codes, float32."""
    return _on(array.name_of(codes), signed)[0][codes]


@cache
def _on(backend: str, signed: bool) -> tuple[Array, Array]:
    """(values, midpoints) on a backend. A float32 number is above a rounded midpoint if it is above the midpoint."""
    values = dynamic_values(signed=signed)
    midpoints = (values[1:].astype(np.float64) + values[:-1]) / 2
    rounded = midpoints.astype(np.float32)
    rounded = np.where(rounded > midpoints, np.nextafter(rounded, np.float32(-np.inf)), rounded)
    return array.to(values, backend), array.to(rounded, backend)

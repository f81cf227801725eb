"""Functions that the compiled kernels share: the test of their arrays, the parts of the threads, exp and maximum.

A compiled function is called as function(first, last, ...) and computes the rows (or the entries) first ... last − 1
in plain loops. `run` calls it for parts of the rows, on several threads. The kernel of an op, such as `layer_norm`,
calls one compiled function in the forward pass and one in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..threads import each, shares
from . import waiting
from .compiler import Vector, float32, inlined

__all__ = ["exp", "is_plain", "largest", "row_parts", "run", "run_parts"]

# Elements from which the threads share the work (tests/benchmarks/LOG.md): fewer if they wait without a sleep.
SHARED = 1 << 17 if waiting.is_available else 1 << 19


def is_plain(*arrays: np.ndarray) -> bool:
    """True if all arrays are as the kernels want them: float32, contiguous, aligned, writable and not empty."""
    return all(a.dtype == np.float32 and a.flags.carray and a.size > 0 for a in arrays)


def run(function: Callable, rows: int, width: int, *arguments: Any) -> None:
    """A call of function(first, last, *arguments) for parts that cover the rows, on the threads.

    width    elements of a row
    """
    parts = row_parts(rows, width)
    if len(parts) == 1:
        function(0, rows, *arguments)
    else:
        each(parts, lambda part: function(part.start, part.stop, *arguments))


def row_parts(rows: int, width: int) -> list[slice]:
    """The parts of the rows that `run_parts` wants: one for each thread, or one for all rows."""
    return shares(rows, width, SHARED)


def run_parts(function: Callable, parts: list[slice], *arguments: Any) -> None:
    """function(i, first, last, *arguments) for the parts i = 0, 1, ... of `row_parts`.

    The sums over part i go to row i of an array.
    """
    if len(parts) == 1:
        function(0, 0, parts[0].stop, *arguments)
    else:
        each(range(len(parts)), lambda i: function(i, parts[i].start, parts[i].stop, *arguments))


# ---------------------------------------------------------------------------------------------------- numbers
LOG2_E = np.float32(1.44269504)
# ln 2 in two parts: n LN2_HIGH is exact for a whole number n up to 2^9.
LN2_HIGH = np.float32(0.693359375)
LN2_LOW = np.float32(-2.12194440e-4)
# e^r = 1 + r + r² (C0 + C1 r + ... + C5 r⁵) for |r| <= ln 2 / 2, within 1 ulp: coefficients of Cephes' expf
C0 = np.float32(5.0000001201e-1)
C1 = np.float32(1.6666665459e-1)
C2 = np.float32(4.1665795894e-2)
C3 = np.float32(8.3334519073e-3)
C4 = np.float32(1.3981999507e-3)
C5 = np.float32(1.9875691500e-4)
LOW, HIGH = np.float32(-87), np.float32(88)
INFINITY = np.float32(np.inf)
ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)
BIAS = np.int32(127)  # of a float32's exponent
FRACTION_BITS = np.int32(23)


@inlined
def exp(x: float32) -> float32:
    """eˣ = 2ⁿ eʳ,  n = round(x / ln 2),  r = x − n ln 2.    0 for x < −87, ∞ for x > 88, NaN for NaN

    2ⁿ is made by writing n into the bits of the exponent. There is no branch and no call, so that LLVM makes a
    vector loop of the loop around it.
    """
    y = min(max(x, LOW), HIGH)
    n = np.floor(y * LOG2_E + HALF)
    r = y - n * LN2_HIGH
    r = r - n * LN2_LOW
    p = ((((C5 * r + C4) * r + C3) * r + C2) * r + C1) * r + C0
    power = np.int32((np.int32(n) + BIAS) << FRACTION_BITS).view(np.float32)
    value = (p * (r * r) + r + ONE) * power
    value = ZERO if x < LOW else value
    value = INFINITY if x > HIGH else value
    return value if x == x else x  # NaN stays NaN


SMALLEST = np.int32(-(2**31))
MAGNITUDE = np.int32(2**31 - 1)
SIGN_BIT = np.int32(31)


@inlined
def largest(x: Vector) -> float32:
    """max x, found among whole numbers in the same order: LLVM makes vectors of an integer maximum, not of a float's.

    The bits of a float32, read as an int32, are in order for positive numbers, and in reverse order for negative ones.
    A NaN with a sign bit counts as smaller than all numbers.
    """
    found = SMALLEST
    for j in range(len(x)):
        bits = np.float32(x[j]).view(np.int32)
        ordered = np.int32(bits ^ ((bits >> SIGN_BIT) & MAGNITUDE))
        found = max(found, ordered)
    return np.int32(found ^ ((found >> SIGN_BIT) & MAGNITUDE)).view(np.float32)

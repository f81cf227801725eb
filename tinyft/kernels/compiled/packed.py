"""Compiled kernels of products of a few rows x with a packed weight W, straight from the codes.

    y = x Wᵀ,   w = s level(q) + c        s, c: numbers of each group of neighbours in a row of W (compress/grouped.py)
    y = Σ_b s_b (x_b · level(q_b)) + c_b Σ_j x_bj        for the groups b

The sums over the codes come first, so that s and c act on one number for each group. Neighbours in memory are the codes
of neighbouring rows of W, so the inner loops run over the rows of W.

If level(q) = q, a byte is not taken apart by shifts. A code that occupies the bits f ... f + b − 1 of a byte is
(byte & mask) / 2^f, and a code that ends in the next byte is the sum of two such terms. The powers of 2 go into x:

    x · q = Σ_t z_t (byte_t & mask_t)

Otherwise the levels are those of a table, such as NF4. All rows of W multiply the same numbers x with the codes in a
byte, of which there are 256 values. Their products are computed once, and then looked up:

    x · level(q) = Σ_t product_t[byte_t],    product_t[v] = x_2t level(v & 15) + x_(2t+1) level(v >> 4)    (4 bits)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numba import types

from ... import ops
from ..packed import FEW
from ..threads import each
from .compiler import Matrix, Vector, calls, compiled, int64
from .shared import ZERO, row_parts, run

__all__ = ["packed_linear", "widen_half"]

TILE = 4096  # rows of W that a thread takes at a time: 16 kB of sums for each row of x
TERMS = 8  # of a sum over codes that are added to `total` together: the terms of a group are a multiple
LOOKED_UP = 4  # the same of products; a divisor of TERMS
BYTES = 256  # values of a byte

Codes = types.Array(types.uint8, 2, "C", readonly=True)  # (bytes, out)
Integers = types.int64[::1]
Rows = types.uint64[::1]
Masks = types.uint8[::1]
Cube = types.float32[:, :, ::1]


# ---------------------------------------------------------------------------------------------------- the products
@compiled
def add_digits(
    first: int64, last: int64, codes: Codes, rows: Rows, masks: Masks, starts: Integers, Z: Matrix, scale: Matrix,
    Y: Matrix,
) -> None:
    """y += Σ_b s_b Σ_t z_t (byte_t & mask_t), in the columns first ... last − 1, for each row z of Z (N, terms)

    The terms of group b are starts[b] ... starts[b + 1] − 1, a multiple of eight; term t is in row rows[t] of the
    codes. scale: (groups, last − first).
    """
    C = codes[:, first:last]
    total = np.empty(last - first, np.float32)
    for b in range(len(scale)):
        s = scale[b]
        for i in range(len(Z)):
            z, y = Z[i], Y[i, first:last]
            for r in range(len(total)):
                total[r] = ZERO
            for t in range(starts[b], starts[b + 1], TERMS):
                b0, b1, b2, b3 = rows[t], rows[t + 1], rows[t + 2], rows[t + 3]
                b4, b5, b6, b7 = rows[t + 4], rows[t + 5], rows[t + 6], rows[t + 7]
                m0, m1, m2, m3 = masks[t], masks[t + 1], masks[t + 2], masks[t + 3]
                m4, m5, m6, m7 = masks[t + 4], masks[t + 5], masks[t + 6], masks[t + 7]
                z0, z1, z2, z3 = z[t], z[t + 1], z[t + 2], z[t + 3]
                z4, z5, z6, z7 = z[t + 4], z[t + 5], z[t + 6], z[t + 7]
                for r in range(len(total)):
                    total[r] += (
                        z0 * np.float32(np.int32(C[b0, r] & m0)) + z1 * np.float32(np.int32(C[b1, r] & m1))
                        + z2 * np.float32(np.int32(C[b2, r] & m2)) + z3 * np.float32(np.int32(C[b3, r] & m3))
                        + z4 * np.float32(np.int32(C[b4, r] & m4)) + z5 * np.float32(np.int32(C[b5, r] & m5))
                        + z6 * np.float32(np.int32(C[b6, r] & m6)) + z7 * np.float32(np.int32(C[b7, r] & m7))
                    )
            for r in range(len(total)):
                y[r] += s[r] * total[r]


@compiled
def add_products(
    first: int64, last: int64, codes: Codes, rows: Rows, low: Vector, high: Vector, starts: Integers, Z: Cube,
    scale: Matrix, Y: Matrix,
) -> None:
    """y += Σ_b s_b Σ_t product_t[byte_t],  product_t[v] = z_t0 low[v] + z_t1 high[v], for each row z of Z (N, terms, 2)

    low[v], high[v]: the levels of the two codes in a byte v. A term is a byte; the rest is as in add_digits.
    """
    C = codes[:, first:last]
    total = np.empty(last - first, np.float32)
    products = np.empty((LOOKED_UP, BYTES), np.float32)
    for b in range(len(scale)):
        s = scale[b]
        for i in range(len(Z)):
            y = Y[i, first:last]
            for r in range(len(total)):
                total[r] = ZERO
            for t in range(starts[b], starts[b + 1], LOOKED_UP):
                for a in range(LOOKED_UP):
                    p, z0, z1 = products[a], Z[i, t + a, 0], Z[i, t + a, 1]
                    for v in range(BYTES):
                        p[v] = z0 * low[v] + z1 * high[v]
                p0, p1, p2, p3 = products[0], products[1], products[2], products[3]
                b0, b1, b2, b3 = rows[t], rows[t + 1], rows[t + 2], rows[t + 3]
                for r in range(len(total)):
                    total[r] += (p0[C[b0, r]] + p1[C[b1, r]]) + (p2[C[b2, r]] + p3[C[b3, r]])
            for r in range(len(total)):
                y[r] += s[r] * total[r]


# ---------------------------------------------------------------------------------------------------- their terms
@lru_cache(32)
def find_terms(bits: int, width: int, group: int) -> tuple[np.ndarray, ...]:
    """(rows, masks, places, factors, starts) of the terms of a row of `width` codes in groups of `group` codes.

    Term t is factors[t] · (byte & masks[t]), of the byte in row rows[t] of the codes, and belongs to the code
    places[t]. The terms of group b are starts[b] ... starts[b + 1] − 1, a multiple of eight: at the end of a group
    there may be terms with mask and factor 0.
    """
    # Each code may have two terms, of its first byte and of the next: (width, 2). Those with mask 0 are left out.
    code = np.arange(width)
    byte, shift = np.divmod(bits * code, 8)
    low = np.minimum(bits, 8 - shift)  # bits of the code in its first byte; the rest is in the next byte
    power = 2.0 ** np.stack([-shift, low], axis=1)
    row = np.stack([byte, byte + 1], axis=1)
    mask = np.stack([((1 << low) - 1) << shift, (1 << (bits - low)) - 1], axis=1)
    used = np.flatnonzero(mask)
    place = used // 2
    count = np.bincount(place // group)  # terms of each group
    padded = -(-count // TERMS) * TERMS
    starts = np.concatenate([[0], padded.cumsum()])
    added = starts[:-1] - (count.cumsum() - count)  # terms with mask 0 before each group
    target = np.arange(len(used)) + added[place // group]

    def spread(values: np.ndarray, dtype: Any) -> np.ndarray:
        found = np.zeros(starts[-1], dtype)
        found[target] = values
        return found

    return (spread(row.flat[used], np.uint64), spread(mask.flat[used], np.uint8), spread(place, np.int64),
            spread(power.flat[used], np.float32), starts.astype(np.int64))


def digits(X: np.ndarray, packed: Any) -> Callable:
    """add_digits for these rows X (N, in), as a function of first, last, scale, Y."""
    rows, masks, places, factors, starts = find_terms(packed.bits, packed.shape[1], packed.group)
    Z = X.take(places, axis=1) * factors

    def add(first: int, last: int, scale: np.ndarray, Y: np.ndarray) -> None:
        add_digits(first, last, packed.codes, rows, masks, starts, Z, scale, Y)

    return add


def look_ups(X: np.ndarray, packed: Any, values: np.ndarray) -> Callable:
    """add_products for these rows X (N, in) and the levels `values`, as a function of first, last, scale, Y."""
    size = len(packed.codes)
    codes_in_byte = 8 // packed.bits
    rows, _, places, factors, starts = find_terms(8, size, min(size, packed.group // codes_in_byte))
    x = np.zeros((len(X), size * codes_in_byte), np.float32)  # the last byte may have one code
    x[:, : X.shape[1]] = X
    Z = np.zeros((len(X), len(places), 2), np.float32)
    Z[..., :codes_in_byte] = x.reshape(-1, size, codes_in_byte).take(places, axis=1) * factors[:, None]
    byte = np.arange(BYTES)
    low, high = values[byte & len(values) - 1], values[byte >> 4]  # of 8 bits: `high` is multiplied by 0

    def add(first: int, last: int, scale: np.ndarray, Y: np.ndarray) -> None:
        add_products(first, last, packed.codes, rows, low, high, starts, Z, scale, Y)

    return add


# ---------------------------------------------------------------------------------------------------- the op
@calls(add_digits, add_products)
def packed_linear(x: np.ndarray, packed: Any = None) -> Any:
    """(x Wᵀ, pullbacks) for at most FEW rows x. The gradient is that of the definition.

    With a table, a code has 4 or 8 bits, and a group fills whole bytes.
    """
    width = packed.shape[1]
    if not packed.in_groups or not x.dtype == packed.unit.dtype == np.float32 or x.shape[-1] != width:
        return NotImplemented
    X = ops.flat(x)
    values = packed.table_values()
    if not 0 < len(X) <= FEW or not packed.codes.flags.c_contiguous:
        return NotImplemented
    if values is not None and not has_whole_bytes(packed):
        return NotImplemented
    shape = x.shape
    y = from_codes(X, packed, values)

    def back(g: np.ndarray) -> np.ndarray:
        return packed.input_gradient(ops.flat(g)).reshape(shape)

    return y.reshape(*shape[:-1], -1), (back,)


def has_whole_bytes(packed: Any) -> bool:
    """True if a byte has one or two codes, and no byte is in two groups."""
    return packed.bits in (4, 8) and (packed.groups == 1 or packed.group * packed.bits % 8 == 0)


def from_codes(X: np.ndarray, packed: Any, values: np.ndarray | None) -> np.ndarray:
    """X Wᵀ, (N, in) -> (N, out). The threads share the rows of W."""
    if packed.input_scale is not None:
        X = X / packed.input_scale
    if packed.order is not None:
        X = X[:, packed.order]
    sums = np.add.reduceat(X, np.arange(0, X.shape[1], packed.group), axis=1)  # (N, groups)
    add = digits(X, packed) if values is None else look_ups(X, packed, values)
    Y = np.empty((len(X), packed.shape[0]), np.float32)

    def tile(rows: slice) -> None:
        """Y[:, rows]"""
        scale, constant = packed.factors(rows)  # (groups, n) each
        Y[:, rows] = 0 if constant is None else sums @ constant
        add(rows.start, rows.stop, np.require(scale, np.float32, "CAW"), Y)

    each(tiles(packed), tile)
    return Y


def tiles(packed: Any) -> list[slice]:
    """The rows of W that a thread takes at a time."""
    size, out = packed.codes.shape
    n = min(TILE, -(-out // len(row_parts(out, size))))
    return [slice(start, min(start + n, out)) for start in range(0, out, n)]


# ---------------------------------------------------------------------------------------------------- float16
Halves = types.int16[::1]
FRACTION = np.int32(13)  # bits of fraction that a float32 has more
NO_SIGNS = np.int32(~0x70000000)
POWER = np.float32(2.0**112)


@compiled
def widen(first: int64, last: int64, X: Halves, Y: Vector) -> None:
    """y = the float16 number with the bits x, which must be finite

    The bits of fraction and exponent go to their places in a float32; the sign was copied to three bits more. The
    exponents of the two formats count from different numbers: a factor of 2^112.
    """
    X, Y = X[first:last], Y[first:last]
    for i in range(len(X)):
        bits = np.int32((np.int32(X[i]) << FRACTION) & NO_SIGNS)
        Y[i] = bits.view(np.float32) * POWER


@calls(widen)
def widen_half(bits: np.ndarray) -> np.ndarray:
    """float16 numbers, given as their bits (uint16), as float32."""
    y = np.empty(bits.shape, np.float32)
    X = np.require(bits, requirements="CAW").view(np.int16)
    run(widen, y.size, 1, X.reshape(-1), y.reshape(-1))
    return y

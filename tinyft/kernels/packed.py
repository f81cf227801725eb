"""Products of a few rows with a packed weight on NumPy, straight from the codes, as in the generation of text.

    y = x Wᵀ,   w = s level(q) + c        s, c: numbers of each group of neighbours in a row of W (compress/grouped.py)
    y = Σ_b s_b (x_b · level(q_b)) + c_b Σ_j x_bj        for the groups b

The sums over the codes come first, so that s and c act on one number for each group. The dense weight is never made;
for many rows of x it is faster to make it, block by block, as the definition does.

Where a code is its own level, the bytes are not taken apart either. A byte is a number with the digits q_0, q_1 ... in
base β = 2^b. Let M_k be its remainder modulo β^(k+1), one AND. Then q_k = (M_k − M_(k−1)) / β^k, and so

    Σ_k x_k q_k = Σ_k M_k (x_k / β^k − x_(k+1) / β^(k+1))        with x_(k+1) = 0 for the last digit
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..ops import flat
from .threads import each, get_num_threads

FEW = 8                                      # rows of x up to which the codes are multiplied
TILE = 1 << 18                               # levels that a thread holds at a time: 1 MB
DEPTH = 64                                   # of them, those of one row


def packed_linear(x: np.ndarray, packed: Any = None) -> Any:
    """(x Wᵀ, pullbacks) for at most FEW rows x and codes of 1, 2, 4 or 8 bits, of which a group fills whole bytes.

    The gradient is that of the definition."""
    width = packed.shape[1]
    if not packed.in_groups or not x.dtype == packed.unit.dtype == np.float32 or x.shape[-1] != width:
        return NotImplemented
    X = flat(x)                                          # (N, in)
    if not 0 < len(X) <= FEW or not whole_bytes(packed):
        return NotImplemented
    shape = x.shape
    y = from_codes(X, packed)

    def back(g: np.ndarray) -> np.ndarray:
        return packed.input_gradient(flat(g)).reshape(shape)
    return y.reshape(*shape[:-1], -1), (back,)


def whole_bytes(packed: Any) -> bool:
    """True if no code is in two bytes, no byte in two groups, and a table has one or two codes in a byte."""
    split = 8 % packed.bits or (packed.groups > 1 and packed.group * packed.bits % 8)
    return not split and (packed.bits >= 4 or packed.table_values() is None)


def from_codes(X: np.ndarray, packed: Any) -> np.ndarray:
    """X Wᵀ, (N, in) -> (N, out). The threads share the rows of W."""
    X = grouped_inputs(X, packed)                        # (N, groups, g)
    sums = X.sum(axis=-1)                                # (N, groups)
    values = packed.table_values()
    if values is None:
        factors = digit_factors(X, packed.bits)
        read = read_digits
    else:
        factors = value_factors(X, packed.bits)
        values = byte_values(values, packed.bits)
        read = read_values
    y = np.empty((len(X), packed.shape[0]), np.float32)

    def tile(rows: slice) -> None:
        """y[:, rows]"""
        scale, constant = packed.factors(rows)           # (groups, n) each
        total = np.zeros((len(X), scale.shape[1]), np.float32) if constant is None else sums @ constant
        for part, group in read(packed.codes[:, rows], factors, values):
            part *= scale[group]
            total += part
        y[:, rows] = total
    each(tiles(packed), tile)
    return y


def tiles(packed: Any) -> list[slice]:
    """The rows of W that a thread takes at a time."""
    out = packed.shape[0]
    n = min(TILE // DEPTH, -(-out // get_num_threads()))
    return [slice(i, min(i + n, out)) for i in range(0, out, n)]


def grouped_inputs(X: np.ndarray, packed: Any) -> np.ndarray:
    """X (N, in) as the codes want it: divided by the input scale, in their order, in groups: (N, groups, g).

    The last group has zeros at its end if it has fewer weights."""
    if packed.input_scale is not None:
        X = X / packed.input_scale
    if packed.order is not None:
        X = X[:, packed.order]
    codes = 8 // packed.bits
    g = -(-packed.group // codes) * codes                # one group for all need not fill its last byte
    missing = packed.groups * g - X.shape[1]
    if missing:
        X = np.pad(X, ((0, 0), (0, missing)))
    return X.reshape(len(X), packed.groups, g)


def slabs(codes: np.ndarray, per_group: int, most: int) -> Iterator[tuple[int, slice, np.ndarray]]:
    """(group, its bytes, the codes of these bytes): at most so many bytes of one group at a time.

    per_group: the bytes of a group."""
    for first in range(0, len(codes), per_group):
        last = min(first + per_group, len(codes))
        for start in range(first, last, most):
            stop = min(start + most, last)
            yield first // per_group, slice(start - first, stop - first), codes[start:stop]


# ── a code is its own level ──────────────────────────────────────────────────────────────────────────────────────────
def digit_factors(X: np.ndarray, bits: int) -> np.ndarray:
    """x_k / β^k − x_(k+1) / β^(k+1) for each digit k of a byte: (N, groups, g) -> (groups, N, digits, bytes)."""
    x = _by_byte(X, bits)
    x *= np.float32(2.0)**(-bits * np.arange(x.shape[2], dtype=np.float32))[:, None]
    x[:, :, :-1] -= x[:, :, 1:]
    return x


def read_digits(codes: np.ndarray, factors: np.ndarray, _: None) -> Iterator[tuple[np.ndarray, int]]:
    """(Σ x q over the codes of a slab, (N, n); its group), for the slabs of codes (bytes, n)."""
    groups, N, digits, per_group = factors.shape
    n = codes.shape[1]
    most = min(per_group, DEPTH // digits)
    remainder = np.empty((most, n), np.uint8)
    levels = np.empty(digits * most * n, np.float32)
    part = np.empty((N, n), np.float32)
    for group, taken, some in slabs(codes, per_group, most):
        M = levels[:digits * some.size].reshape(digits, len(some), n)
        for k in range(digits - 1):
            np.bitwise_and(some, (1 << 8 // digits * (k + 1)) - 1, out=remainder[:len(some)])
            M[k] = remainder[:len(some)]
        M[-1] = some                                     # the whole byte
        np.dot(factors[group, :, :, taken].reshape(N, -1), M.reshape(-1, n), out=part)
        yield part, group


# ── a code is the number of a level in a table ───────────────────────────────────────────────────────────────────────
def byte_values(values: np.ndarray, bits: int) -> np.ndarray:
    """The levels of the codes in every byte, (256,): of two codes as a complex number, so that one look-up gives both.
    """
    if bits == 8:
        return values
    byte = np.arange(256)
    pairs = values[byte & 15] + 1j * values[byte >> 4]
    return pairs.astype(np.complex64)


def value_factors(X: np.ndarray, bits: int) -> np.ndarray:
    """The x of each byte, (groups, N, bytes). Of two codes: x_0 − i x_1, since then the product of this number with
    the level of a byte has the real part x_0 level_0 + x_1 level_1."""
    x = _by_byte(X, bits)
    if bits == 8:
        return x[:, :, 0]
    return x[:, :, 0] - np.complex64(1j) * x[:, :, 1]


def read_values(codes: np.ndarray, factors: np.ndarray, values: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """(Σ x level over the codes of a slab, (N, n); its group), for the slabs of codes (bytes, n)."""
    groups, N, per_group = factors.shape
    n = codes.shape[1]
    most = min(per_group, DEPTH // 4)                    # 16 bytes of memory a code: its number and its level
    numbers = np.empty((most, n), np.intp)
    levels = np.empty((most, n), values.dtype)
    part = np.empty((N, n), values.dtype)
    for group, taken, some in slabs(codes, per_group, most):
        numbers[:len(some)] = some
        level = levels[:len(some)]
        values.take(numbers[:len(some)], out=level, mode="wrap")             # the other modes are slower
        np.dot(factors[group, :, taken], level, out=part)
        yield part.real, group


def _by_byte(X: np.ndarray, bits: int) -> np.ndarray:
    """A copy of X (N, groups, g) by the place of its code in a byte: (groups, N, codes in a byte, bytes)."""
    N, groups, g = X.shape
    digits = 8 // bits
    return X.reshape(N, groups, g // digits, digits).transpose(1, 0, 3, 2).copy()


def widen_half(bits: np.ndarray) -> np.ndarray:
    """float16 numbers, given as their bits (uint16), as float32.  A fifth of the time of astype, for finite numbers.

    Their 10 bits of fraction and 5 of exponent go to the place that these have in a float32. The exponents of the two
    formats count from different numbers: a factor of 2^112."""
    wide = bits.view(np.int16).astype(np.int32)
    wide <<= 13
    wide &= np.int32(~0x70000000)                        # the sign was copied to these three bits
    number = wide.view(np.float32)
    number *= np.float32(2.0**112)
    return number

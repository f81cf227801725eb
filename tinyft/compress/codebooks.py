"""Codebooks: data types of few values that are not equally spaced, for blocks of weights with one scale each.

    a = max |w| of the block        code = argmin_k |w/a − value_k|        ŵ = value[code] · a

    name     bits   values, all within −1 ... 1
    nf4      4      quantiles of the normal distribution: 7 below 0, the 0, and 8 above 0
    e2m1     4      sign, 2 bits of exponent, 1 of mantissa: 0, 1/2, 1, 3/2, 2, 3, 4, 6, divided by 6
    fp4      4      what bitsandbytes calls FP4: as e2m1, but its smallest magnitude is 1/192 instead of 1/12
    dynamic  8      sign, a decimal exponent, and a fraction of 0 to 6 bits; 1 is a value, −1 is not

A weight halfway between two values takes the lower one. In nf4, e2m1 and fp4 the values 0, a and −a are exact.

Double quantization: the scales are numbers too, 32 bits for each 64 weights. They are all positive, so their mean is
subtracted first; what remains is quantized with the dynamic data type, in blocks of 256 scales:

    â = value[code₂] · a₂ + mean a          4 + 8/64 + 32/(64·256) = 4.127 bits a weight, instead of 4 + 32/64 = 4.5

Sources: Dettmers et al. 2023, QLoRA, arXiv:2305.14314 (nf4, double quantization). Dettmers et al. 2021,
arXiv:2110.02861 (dynamic). OCP Microscaling Formats 1.0, 2023 (e2m1). bitsandbytes (the table of nf4; fp4).

Departures: the paper describes nf4 with averages of neighbouring quantiles; its code, and we, take the quantiles. A
doubly quantized scale is kept within 0 ... the largest float32: a scale far below the mean of its block of 256 could
come out negative otherwise, and turn the signs of its weights.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np

from .. import array, checks
from ..array import Array, xp
from ..dynamic import dynamic_values
from .checked import Stored
from .coded import as_bits, from_bits
from .grouped import Grouped

__all__ = ["TABLES", "Codebook", "DoubleScale", "Table", "get_table", "quantize_blocks"]

SCALE_BLOCK = 256                                        # scales that share a second scale
FEW = 16                                                 # midpoints up to which comparing with each is the fastest
CACHE = 1 << 15                                          # weights encoded at a time
LARGEST = np.finfo(np.float32).max


# ── the values ───────────────────────────────────────────────────────────────────────────────────────────────────────
def nf4_values() -> np.ndarray:
    """The 16 values of nf4, float32, upwards: 7 below 0, the 0, and 8 above it. Equal to bitsandbytes' in every bit.

        δ = ½ ((1 − 1/30) + (1 − 1/32)) = 0.9677083

    The middle of the last of 15 equal intervals of probability is 1 − 1/30, of 16 it is 1 − 1/32."""
    return normal_values(below=7, above=8, largest=0.9677083)


def normal_values(below: int, above: int, largest: float) -> np.ndarray:
    """Values for normal weights, float32, upwards: `below` of them below 0, the 0, and `above` of them above 0.

        above 0:   Φ⁻¹(p), for the first `above` of above + 1 equally spaced p from `largest` to 1/2
        below 0:  −Φ⁻¹(p), for the first `below` of below + 1 equally spaced p from `largest` to 1/2

    All are divided by Φ⁻¹(largest), so −1, 0 and 1 are among them. Φ⁻¹ maps a probability p to its quantile: the number
    that a normal variable stays below with the probability p. largest: below 1, where the quantile is infinite."""
    quantile = NormalDist().inv_cdf
    middle = np.float32(0.5)
    positive = [quantile(float(p)) for p in _line(np.float32(largest), middle, above + 1)[:-1]]
    negative = [-quantile(float(p)) for p in _line(np.float32(largest), middle, below + 1)[:-1]]
    values = np.array([*negative, 0.0, *reversed(positive)], np.float32)
    return values / values[-1]


def _line(first: np.float32, last: np.float32, n: int) -> np.ndarray:
    """n equally spaced float32 numbers. Each is rounded as PyTorch's linspace, which computes from the nearer end."""
    step = (last - first) / np.float32(n - 1)
    i = np.arange(n, dtype=np.float32)
    return np.where(i < n // 2, first + step * i, last - step * (n - 1 - i))


def e2m1_values() -> np.ndarray:
    """The 16 values of e2m1 by code, float32. Code s e e m: (−1)^s · 2^(e−1) (1 + m/2) / 6, and m/2 / 6 for e = 0."""
    magnitude = []
    for code in range(8):
        exponent, mantissa = divmod(code, 2)
        magnitude.append(2.0**(exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2)
    return _with_signs(magnitude, 6)


def fp4_values() -> np.ndarray:
    """The 16 values of fp4 by code, float32, in the order of bitsandbytes' codes."""
    return _with_signs([0, 1 / 16, 8, 12, 4, 6, 2, 3], 12)


def _with_signs(magnitude: list[float], largest: float) -> np.ndarray:
    """The values of the codes 0 ... 7, divided by the largest, and of 8 ... 15, which are those of 0 ... 7 negated."""
    positive = np.array(magnitude) / largest
    return np.concatenate([positive, -positive]).astype(np.float32)


class Table:
    """A data type: the value of every code, and the code of the nearest value.

    values      (2^bits,) float32, by code
    ranked      the distinct values, upwards;  codes: the code of each. A code of −0 is never given
    midpoints   the middles of neighbouring distinct values, float64, which are exact"""

    def __init__(self, name: str, values: np.ndarray):
        self.name = name
        self.values = values
        self.bits = (len(values) - 1).bit_length()
        self.ranked, first = np.unique(values, return_index=True)
        self.codes = first.astype(np.uint8)
        self.midpoints = (self.ranked[1:].astype(np.float64) + self.ranked[:-1]) / 2
        self._in_order = np.array_equal(self.codes, np.arange(len(values)))

    def nearest(self, u: np.ndarray) -> np.ndarray:
        """The code of the value nearest to each number of u, uint8; of two that are equally near, that of the lower.

        It is the number of midpoints below u, if the codes are in the order of their values."""
        thresholds = self.thresholds(u.dtype)
        if len(thresholds) > FEW:
            rank = np.searchsorted(thresholds, u).astype(np.uint8)
        else:
            rank = np.zeros(u.shape, np.uint8)
            above = np.empty(u.shape, bool)
            for threshold in thresholds:
                np.greater(u, threshold, out=above)
                rank += above.view(np.uint8)
        return rank if self._in_order else self.codes[rank]

    def thresholds(self, dtype: Any) -> np.ndarray:
        """The midpoints rounded downwards to a dtype. A number of that dtype is above one if and only if it is above
        the midpoint itself."""
        rounded = self.midpoints.astype(dtype)
        return np.where(rounded > self.midpoints, np.nextafter(rounded, dtype.type(-np.inf)), rounded)


TABLES: dict[str, Callable[[], np.ndarray]] = {
    "nf4": nf4_values, "fp4": fp4_values, "e2m1": e2m1_values, "dynamic": dynamic_values,
}


@cache
def get_table(name: str) -> Table:
    """The data type of this name. ValueError for a name that TABLES does not have."""
    checks.one_of("get_table: name", name, tuple(TABLES))
    return Table(name, TABLES[name]())


@cache
def _values_on(name: str, backend: str) -> Array:
    """The values of a data type, on a backend."""
    return array.to(get_table(name).values, backend)


def values_like(name: str, codes: Array) -> Array:
    """The values of a data type, where the codes are."""
    return _values_on(name, array.name_of(codes))


# ── blocks ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def quantize_blocks(W: np.ndarray, table: Table, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(codes (out, in) uint8, scales (out, blocks) float32) of W (out, in), finite, in blocks along its rows.

    The scale of a block is max |w|. A block of zeros has the scale 0 and the codes of the value 0."""
    out, width = W.shape
    blocks = -(-width // block)
    columns = np.empty((width, out), np.uint8)           # as Grouped keeps them: turned while they are in the cache
    scale = np.empty((out, blocks), np.float32)
    step = max(1, CACHE // width)
    for start in range(0, out, step):
        rows = slice(start, start + step)
        w = W[rows]
        if width % block:
            w = np.pad(w, ((0, 0), (0, blocks * block - width)))
        w = w.reshape(len(w), blocks, block)
        with np.errstate(over="ignore"):                 # a float64 beyond float32 gives inf, which nobody accepts
            a = np.abs(w).max(axis=-1).astype(np.float32)
        u = w / np.where(a == 0, np.float32(1), a)[..., None]
        scale[rows] = a
        columns[:, rows] = table.nearest(u).reshape(len(w), -1)[:, :width].T
    return columns.T, scale


@dataclass(frozen=True)
class DoubleScale:
    """Scales that are quantized themselves:  a ≈ value[code] · second[block] + mean, in the dynamic data type.

    codes    (out, groups) uint8. A block is 256 of them in C order, whichever rows they are in
    second   (blocks,) float32, the largest |a − mean| of each block
    mean     of all scales, float32"""

    codes: np.ndarray
    second: np.ndarray
    mean: np.float32

    @property
    def shape(self) -> tuple:
        """That of the scales, (out, groups)."""
        return self.codes.shape

    @classmethod
    def quantize(cls, scale: np.ndarray) -> DoubleScale:
        """The scales (out, groups) float32, finite, with 8 bits each. The error of a scale is at most 0.00703125 of
        its block's second scale. ValueError for scales that are not finite."""
        if not np.isfinite(scale).all():
            raise ValueError("DoubleScale wants finite scales, got inf or NaN")
        return cls(*quantize_scales(scale, SCALE_BLOCK))


def quantize_scales(scale: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """(codes, second, mean) of scales (out, groups) float32:  scale ≈ value[code] · second[block] + mean.

    mean     of all scales, float32. It is subtracted first, since scales are all positive, and half of the values of
             the dynamic data type are negative
    codes    (out, groups) uint8, of what remains
    second   (blocks,) float32. A block is `block` scales in C order, whichever rows they are in"""
    mean = scale.mean(dtype=np.float64).astype(np.float32)
    remainder = (scale - mean).reshape(1, -1)
    codes, second = quantize_blocks(remainder, get_table("dynamic"), block)
    return codes.reshape(scale.shape), second[0], mean


def decode_scales(codes: Array, block: Array, second: Array, mean: Array) -> Array:
    """â = value[code] · second[block] + mean, within 0 ... the largest float32: the inverse of quantize_scales.

    codes, block   (groups, n): the code of each scale, in the dynamic data type, and the number of its block
    second, mean   (blocks,) and (1,) float32

    The true scales are positive. An â below 0 would turn the signs of its weights."""
    a = values_like("dynamic", codes).take(codes)        # NumPy's take is twice as fast as values[codes]
    a *= second.take(block)
    a += mean
    return a.clip(0, LARGEST, out=a)


# ── the packed weight ────────────────────────────────────────────────────────────────────────────────────────────────
class Codebook(Grouped):
    """w = value[code] · a: a weight (out, in) in one of the data types of this file.

    table   the name of the data type
    double  True: the scales are doubly quantized

    A group is `group` neighbours in a row. Where the group divides `in`, groups are the same as blocks of the
    flattened weight, as in bitsandbytes. Where it does not, the last group of each row is shorter: no group has
    weights of two rows, so a row can be read alone, and the weight has one scale more for each row."""

    def __init__(self, codes: np.ndarray, scale: np.ndarray | DoubleScale, *, table: str = "nf4", group: int = 64):
        """As Grouped. scale: (out, groups) float32, or a DoubleScale of that shape."""
        self.table = checks.one_of("Codebook: table", table, tuple(TABLES))
        super().__init__(codes, scale, bits=get_table(table).bits, group=group)

    def keep_scale(self, scale: Any) -> None:
        """Store the scales as bits, or in the three arrays of a DoubleScale."""
        self.scale_codes = self.second_bits = self.mean_bits = self.scale_bits = None
        self.double = isinstance(scale, DoubleScale)
        if not self.double:
            super().keep_scale(scale)
            return
        self.scale_codes = array.asarray(np.ascontiguousarray(scale.codes.T))                # (groups, out)
        self.second_bits = array.asarray(as_bits(scale.second, "DoubleScale"))               # (blocks,)
        self.mean_bits = array.asarray(as_bits(np.array([scale.mean]), "DoubleScale"))

    def settings(self) -> dict[str, Any]:
        """As Grouped, with the data type, and whether the scales are doubly quantized."""
        return {"table": self.table, **super().settings(), "double": self.double}

    @classmethod
    def restore(cls, shape: tuple[int, int], stored: Stored) -> Codebook:
        """As Packed."""
        packed = super().restore(shape, stored)
        packed.table = checks.one_of("Codebook: table", stored.setting("table"), tuple(TABLES))
        if packed.bits != get_table(packed.table).bits:
            raise ValueError(f"Codebook: {packed.table} has codes of {get_table(packed.table).bits} bits, "
                             f"got bits={packed.bits}")
        return packed

    def restore_scale(self, stored: Stored) -> None:
        """Take the scales from a file: what keep_scale stores."""
        self.scale_codes = self.second_bits = self.mean_bits = self.scale_bits = None
        self.double = checks.flag("Codebook: double", stored.setting("double"))
        if not self.double:
            super().restore_scale(stored)
            return
        size = self.groups, self.shape[0]
        blocks = -(-size[0] * size[1] // SCALE_BLOCK)
        self.scale_codes = stored.array("scale_codes", size, "uint8")
        self.second_bits = stored.numbers("second_bits", (blocks,), "uint16", "uint32")
        self.mean_bits = stored.numbers("mean_bits", (1,), "uint16", "uint32")

    def scales(self, rows: Any) -> Array:
        """The scales of some rows, a slice or an array (n,) of row numbers: (groups, n) float32."""
        if not self.double:
            return super().scales(rows)
        codes = self.scale_codes[:, rows]
        m = xp(codes)
        row = m.arange(*rows.indices(self.shape[0])) if isinstance(rows, slice) else rows
        block = (row * self.groups + m.arange(self.groups)[:, None]) // SCALE_BLOCK
        return decode_scales(codes, block, from_bits(self.second_bits), from_bits(self.mean_bits))

    def table_values(self) -> Array:
        """value[code]"""
        return values_like(self.table, self.codes)

    def extra_repr(self) -> str:
        return f"{self.table}{', doubly quantized' if self.double else ''} {super().extra_repr()}"

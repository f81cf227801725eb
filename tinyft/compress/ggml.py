"""Weights in the block formats of GGUF files: 4 or 8 bits a weight. A block is 32 neighbours in a row of W (out, in).

    Q4_0    x = d (q − 8)     q in 0 ... 15       18 bytes a block: d, then 16 bytes of two codes q each
    Q4_1    x = d q + m       q in 0 ... 15       20 bytes: d, m, then 16 bytes of two codes each
    Q8_0    x = d q           q in −127 ... 127   34 bytes: d, then 32 bytes of one code each

d and m are float16. Byte j of a 4-bit block holds the code of weight j in its low half, of weight j + 16 in its high
half. Each class is an nn.Packed: linear maps, embeddings and tied heads work with it as with a dense weight.

    packed = Q4_1.quantize(W);   packed.matmul(x);   packed.dequantize();   packed.nbytes

In memory, the codes are (blocks, bytes, out) and the scales (blocks, out): the rows of W are the last axis. A NumPy
operation on a block of rows then runs through long contiguous lines, which is twice as fast as the order of the file.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from .. import array, checks
from ..array import Array, xp
from ..nn import Packed

__all__ = ["BLOCK", "FORMATS", "Blocks", "Q4_0", "Q4_1", "Q8_0"]

BLOCK = 32                                               # weights in a block
DENSE = 1 << 20                                          # dense weights that a product holds at a time, at most
FEW = 8                                                  # rows of x up to which a product multiplies with the codes
INFINITE = np.uint16(0x7C00)                             # the exponent bits of a float16 that is infinite or NaN


class Blocks(Packed):
    """A weight W (out, in) in blocks of 32 along its rows, each with its own scales. `in` is a multiple of 32.

    numbers     the float16 numbers at the beginning of a block: 1 (d) or 2 (d and m)
    code_bytes  the bytes of its codes: 16 or 32"""

    numbers: int
    code_bytes: int

    def __init__(self, blocks: Any):
        """The weight from its blocks in the order of a file: (out, in/32, bytes of a block) uint8.

        TypeError for another dtype, ValueError for another shape and for a scale that is not finite."""
        name = type(self).__name__
        size = self.block_bytes()
        if not array.is_array(blocks) or blocks.dtype != np.uint8:
            raise TypeError(f"{name} wants an array of uint8, got {checks.brief(blocks)}")
        if blocks.ndim != 3 or blocks.shape[-1] != size or not blocks.size:
            raise ValueError(f"{name} wants blocks of shape (out, in/{BLOCK}, {size}), got {blocks.shape}")
        blocks = array.asnumpy(blocks)
        head = 2 * self.numbers
        scales = np.ascontiguousarray(blocks[..., :head]).view("<u2")            # (out, blocks, numbers)
        if ((scales & INFINITE) == INFINITE).any():
            raise ValueError(f"{name} wants finite scales, got one that is infinite or no number")
        self.shape = (blocks.shape[0], blocks.shape[1] * BLOCK)
        self.codes = array.asarray(np.ascontiguousarray(blocks[..., head:].transpose(1, 2, 0)))
        # float16 numbers are kept as their bits: `to(dtype)` casts floating-point buffers, and would round them.
        self.scales = array.asarray(np.ascontiguousarray(scales.transpose(2, 1, 0)))       # (numbers, blocks, out)
        self.unit = array.asarray(np.empty(0, np.float32))     # empty; `to(dtype)` gives it the dtype of dense rows

    @classmethod
    def block_bytes(cls) -> int:
        """The bytes of one block in a file."""
        return 2 * cls.numbers + cls.code_bytes

    @classmethod
    def quantize(cls, W: Any) -> Blocks:
        """The packed weight nearest to W (out, in), with the rounding of llama.cpp's reference.

        TypeError unless W is an array of real numbers. ValueError unless it has two axes, rows of a multiple of 32
        weights, and values that are finite and within the range of float16."""
        name = f"{cls.__name__}.quantize"
        if not array.is_array(W) or W.dtype.kind not in "iufV":                  # bfloat16 is of kind V
            raise TypeError(f"{name} wants an array of real numbers, got {checks.brief(W)}")
        if W.ndim != 2 or not W.size or W.shape[1] % BLOCK:
            raise ValueError(f"{name} wants a matrix whose rows hold a multiple of {BLOCK} weights, got {W.shape}")
        values = array.asnumpy(W).astype(np.float32).reshape(W.shape[0], -1, BLOCK)
        if not (abs(values) <= np.finfo(np.float16).max).all():
            raise ValueError(f"{name} wants finite values within the range of float16")
        return cls(cls.encode(values))

    @classmethod
    def encode(cls, values: np.ndarray) -> np.ndarray:
        """The blocks of a file, (..., bytes) uint8, for values (..., 32) float32."""
        raise NotImplementedError(f"{cls.__name__} has no encode")

    def file_blocks(self) -> np.ndarray:
        """The blocks in the order of a file, on the host: (out, in/32, bytes) uint8."""
        codes = array.asnumpy(self.codes).transpose(2, 0, 1)
        scales = np.ascontiguousarray(array.asnumpy(self.scales).transpose(2, 1, 0)).view(np.uint8)
        return np.concatenate([scales, codes], axis=-1)

    def take_rows(self, rows: np.ndarray) -> Blocks:
        """The weight W[rows], packed, for an array of row numbers on the host."""
        return type(self)(self.file_blocks()[rows])

    @property
    def rows_per_block(self) -> int:                     # type: ignore[override]
        """The number of dense rows that a product holds at a time."""
        return max(1, DENSE // self.shape[1])

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
        ids = rows.reshape(-1)
        return self.columns(ids).T.reshape(*rows.shape, self.shape[1])

    def columns(self, rows: Any) -> Array:
        """Wᵀ[:, rows], (in, n), for a slice or an array (n,) of row numbers. Computed in float32."""
        codes, scales = self.take(rows)
        columns = self.decode(codes, scales).reshape(self.shape[1], -1)
        return columns if self.unit.dtype == np.float32 else columns.astype(self.unit.dtype)

    def product(self, x: Array, rows: slice) -> Array:
        """x W[rows]ᵀ, for x (N, in).    y = Σ_b d_b (x_b · q_b) + m_b Σ_j x_bj, for the blocks b

        For a few rows of x, as in generation, the sums over the codes come first: then the scales act on 1/32 as many
        numbers. For many rows it is faster to decompress W."""
        if x.shape[0] > FEW or not x.dtype == self.unit.dtype == np.float32:
            return super().product(x, rows)
        codes, scales = self.take(rows)
        x = x.reshape(x.shape[0], -1, BLOCK).transpose(1, 0, 2)                  # (blocks, N, 32)
        sums = x @ self.unpack(codes)                                            # (blocks, N, n)
        sums *= scales[0]
        y = sums.sum(axis=0)
        offset = self.offset(scales)
        return y if offset is None else y + x.sum(axis=-1).T @ offset

    def take(self, rows: Any) -> tuple[Array, Array]:
        """The codes (blocks, bytes, n) and the scales (numbers, blocks, 1, n), as float32, of some rows."""
        scales = self.scales[:, :, rows].view(np.float16).astype(np.float32)
        return self.codes[:, :, rows], scales[:, :, None]

    def unpack(self, codes: Array) -> Array:
        """The codes q as float32, (blocks, 32, n)."""
        return unpack_halves(codes)

    def offset(self, scales: Array) -> Array | None:
        """The number m of each block in x = d q + m, (blocks, n); None if it is 0."""
        return None

    def decode(self, codes: Array, scales: Array) -> Array:
        """The weights (blocks, 32, n) of codes and scales, as `take` gives them."""
        raise NotImplementedError(f"{type(self).__name__} has no decode")


def unpack_halves(codes: Array) -> Array:
    """The codes of bytes (blocks, 16, n), each of two 4-bit codes, as float32 (blocks, 32, n)."""
    blocks, _, n = codes.shape
    q = xp(codes).empty((blocks, BLOCK, n), np.float32)
    q[:, :16] = codes & 15
    q[:, 16:] = codes >> 4
    return q


def _pack_halves(q: np.ndarray) -> np.ndarray:
    """The bytes (..., 16) of codes (..., 32) in 0 ... 15: the inverse of unpack_halves, with the block last."""
    q = q.astype(np.uint8)
    return q[..., :16] | (q[..., 16:] << 4)


def half_bytes(numbers: np.ndarray) -> np.ndarray:
    """The bytes (..., 2) of numbers (..., 1) in float16."""
    return numbers.astype("<f2").view(np.uint8)


def reciprocal(d: np.ndarray) -> np.ndarray:
    """1/d, and 0 where d is 0."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(d == 0, np.float32(0), 1 / d)


class Q4_0(Blocks):
    """x = d (q − 8).    d: the value of largest magnitude in the block, sign included, divided by −8"""

    numbers = 1
    code_bytes = 16

    @classmethod
    def encode(cls, values: np.ndarray) -> np.ndarray:
        """As Blocks.encode. Code 8 stands for 0."""
        largest = np.take_along_axis(values, abs(values).argmax(axis=-1)[..., None], axis=-1)
        d = largest / np.float32(-8)
        q = np.trunc(values * reciprocal(d) + np.float32(8.5)).clip(0, 15)
        return np.concatenate([half_bytes(d), _pack_halves(q)], axis=-1)

    def decode(self, codes: Array, scales: Array) -> Array:
        """d (q − 8)"""
        x = self.unpack(codes)
        x -= 8
        x *= scales[0]
        return x

    def offset(self, scales: Array) -> Array:
        """−8 d"""
        return scales[0, :, 0] * -8


def encode_q4_1(values: np.ndarray) -> np.ndarray:
    """Blocks of Q4_1, as they stand in a file, of blocks of 32 weights: (..., 32) float32 -> (..., 20) uint8.

    m is the least weight of a block, and d = (its largest weight − m)/15. The code of a weight x is (x − m)/d, rounded
    to the nearest whole number, a half upwards; 0 if d is 0. Codes come from d and m before these are rounded.
    The bytes of a block are d and m in float16, two bytes each, the lower byte first; then 16 bytes of two codes each:
    byte j holds the code of weight j in its low half, and that of weight j + 16 in its high half."""
    m = values.min(axis=-1, keepdims=True)
    d = (values.max(axis=-1, keepdims=True) - m) / np.float32(15)
    q = np.trunc((values - m) * reciprocal(d) + np.float32(0.5)).clip(0, 15)
    return np.concatenate([half_bytes(d), half_bytes(m), _pack_halves(q)], axis=-1)


class Q4_1(Blocks):
    """x = d q + m.    m: the least value of the block;  d: its range divided by 15"""

    numbers = 2
    code_bytes = 16

    @classmethod
    def encode(cls, values: np.ndarray) -> np.ndarray:
        """As Blocks.encode. Code 0 stands for the least value."""
        return encode_q4_1(values)

    def decode(self, codes: Array, scales: Array) -> Array:
        """d q + m"""
        x = self.unpack(codes)
        x *= scales[0]
        x += scales[1]
        return x

    def offset(self, scales: Array) -> Array:
        """m"""
        return scales[1, :, 0]


class Q8_0(Blocks):
    """x = d q.    d: the largest magnitude in the block divided by 127"""

    numbers = 1
    code_bytes = 32

    @classmethod
    def encode(cls, values: np.ndarray) -> np.ndarray:
        """As Blocks.encode. A code is an int8."""
        d = abs(values).max(axis=-1, keepdims=True) / np.float32(127)
        scaled = values * reciprocal(d)
        magnitude = abs(scaled)
        whole = np.floor(magnitude)
        q = np.sign(scaled) * (whole + np.floor(2 * (magnitude - whole)))        # a half is rounded away from zero
        return np.concatenate([half_bytes(d), q.astype(np.int8).view(np.uint8)], axis=-1)

    def decode(self, codes: Array, scales: Array) -> Array:
        """d q"""
        x = self.unpack(codes)
        x *= scales[0]
        return x

    def unpack(self, codes: Array) -> Array:
        """The codes q as float32, (blocks, 32, n)."""
        return codes.view(np.int8).astype(np.float32)


FORMATS: dict[str, type[Blocks]] = {cls.__name__: cls for cls in (Q4_0, Q4_1, Q8_0)}

"""Weights in the block formats of GGUF files: 4 or 8 bits a weight. A block is 32 neighbours in a row of W (out, in).

    Q4_0    x = d (q − 8)     q in 0 ... 15       18 bytes a block: d, then 16 bytes of two codes q each
    Q4_1    x = d q + m       q in 0 ... 15       20 bytes: d, m, then 16 bytes of two codes each
    Q8_0    x = d q           q in −127 ... 127   34 bytes: d, then 32 bytes of one code each

d and m are float16. Byte j of a 4-bit block holds the code of weight j in its low half, of weight j + 16 in its high
half. Each class is an nn.Packed: linear maps, embeddings and tied heads work with it as with a dense weight.

    packed = Q4_1.quantize(W);   packed.matmul(x);   packed.dequantize();   packed.nbytes

In memory, a weight is like every other in groups (grouped.py): the codes of a row follow each other in one stream of
bits, and the rows of W are the last axis. `file_blocks` gives the bytes of the file again.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from .. import array, checks
from .checked import Stored
from .grouped import Grouped

__all__ = ["BLOCK", "FORMATS", "Blocks", "Q4_0", "Q4_1", "Q8_0"]

BLOCK = 32                                               # weights in a block
INFINITE = np.uint16(0x7C00)                             # the exponent bits of a float16 that is infinite or NaN


class Blocks(Grouped):
    """A weight W (out, in) in blocks of 32 along its rows, each with its own scales. `in` is a multiple of 32.

    bits      of a code: 4 or 8
    numbers   the float16 numbers at the beginning of a block: 1 (d) or 2 (d and m)"""

    numbers: int
    group = BLOCK

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
        numbers = np.ascontiguousarray(blocks[..., :head]).view("<u2")           # (out, blocks, numbers)
        if ((numbers & INFINITE) == INFINITE).any():
            raise ValueError(f"{name} wants finite scales, got one that is infinite or no number")
        self.set_shape((blocks.shape[0], blocks.shape[1] * BLOCK))
        codes = self.to_stream(np.ascontiguousarray(blocks[..., head:].transpose(1, 2, 0)))
        self.codes = array.asarray(codes.reshape(-1, len(blocks)))               # (bytes, out)
        # float16 numbers are kept as their bits: `to(dtype)` casts floating-point buffers, and would round them.
        d, *m = np.ascontiguousarray(numbers.transpose(2, 1, 0))                 # (blocks, out) each
        self.scale_bits = array.asarray(d)
        if m:
            self.shift_bits = array.asarray(m[0])

    def settings(self) -> dict[str, Any]:
        """None: the class says all."""
        return {}

    @classmethod
    def restore(cls, shape: tuple[int, int], stored: Stored) -> Blocks:
        """As Packed."""
        out, width = shape
        if width % BLOCK:
            raise ValueError(f"{cls.__name__} wants rows of a multiple of {BLOCK} weights, got {width}")
        packed = cls.without_codes(shape)
        packed.codes = stored.array("codes", (width * cls.bits // 8, out), "uint8")
        packed.scale_bits = stored.numbers("scale_bits", (width // BLOCK, out), "uint16")
        if cls.numbers == 2:
            packed.shift_bits = stored.numbers("shift_bits", (width // BLOCK, out), "uint16")
        return packed

    @classmethod
    def block_bytes(cls) -> int:
        """The bytes of one block in a file."""
        return 2 * cls.numbers + BLOCK * cls.bits // 8

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
        codes = array.asnumpy(self.codes).reshape(self.groups, -1, self.shape[0])
        parts = [array.asnumpy(self.scale_bits)]
        if self.shift_bits is not None:
            parts.append(array.asnumpy(self.shift_bits))
        numbers = np.ascontiguousarray(np.stack(parts).transpose(2, 1, 0))       # (out, blocks, numbers)
        return np.concatenate([numbers.view(np.uint8), self.from_stream(codes).transpose(2, 0, 1)], axis=-1)

    def take_rows(self, rows: np.ndarray) -> Blocks:
        """The weight W[rows], packed, for an array of row numbers on the host."""
        return type(self)(self.file_blocks()[rows])

    @staticmethod
    def to_stream(codes: np.ndarray) -> np.ndarray:
        """The codes (blocks, bytes, out) of a file, as the bytes of a stream. Here: of two 4-bit codes in a byte."""
        even, odd = codes[:, 0::2], codes[:, 1::2]           # the bytes of weights 0 and 16, 1 and 17; 2 and 18 ...
        return np.concatenate([(even & 15) | (odd << 4), (even >> 4) | (odd & 240)], axis=1)

    @staticmethod
    def from_stream(codes: np.ndarray) -> np.ndarray:
        """The inverse of to_stream."""
        first, second = np.split(codes, 2, axis=1)           # the bytes of weights 0 and 1 ..., of 16 and 17 ...
        pairs = np.stack([(first & 15) | (second << 4), (first >> 4) | (second & 240)], axis=2)
        return pairs.reshape(codes.shape)

    def extra_repr(self) -> str:
        return f"packed {tuple(self.shape)}, {self.nbytes:,} bytes"


def _pack_halves(q: np.ndarray) -> np.ndarray:
    """The bytes (..., 16) of codes (..., 32) in 0 ... 15, in the order of a file."""
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

    bits = 4
    numbers = 1
    zero_point = 8.0

    @classmethod
    def encode(cls, values: np.ndarray) -> np.ndarray:
        """As Blocks.encode. Code 8 stands for 0."""
        largest = np.take_along_axis(values, abs(values).argmax(axis=-1)[..., None], axis=-1)
        d = largest / np.float32(-8)
        q = np.trunc(values * reciprocal(d) + np.float32(8.5)).clip(0, 15)
        return np.concatenate([half_bytes(d), _pack_halves(q)], axis=-1)


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

    bits = 4
    numbers = 2

    @classmethod
    def encode(cls, values: np.ndarray) -> np.ndarray:
        """As Blocks.encode. Code 0 stands for the least value."""
        return encode_q4_1(values)


class Q8_0(Blocks):
    """x = d q.    d: the largest magnitude in the block divided by 127"""

    bits = 8
    numbers = 1
    zero_point = 128.0                                       # the code of the value 0 in the stream

    @classmethod
    def encode(cls, values: np.ndarray) -> np.ndarray:
        """As Blocks.encode. A code is an int8."""
        d = abs(values).max(axis=-1, keepdims=True) / np.float32(127)
        scaled = values * reciprocal(d)
        magnitude = abs(scaled)
        whole = np.floor(magnitude)
        q = np.sign(scaled) * (whole + np.floor(2 * (magnitude - whole)))        # a half is rounded away from zero
        return np.concatenate([half_bytes(d), q.astype(np.int8).view(np.uint8)], axis=-1)

    @staticmethod
    def to_stream(codes: np.ndarray) -> np.ndarray:
        """q + 128, which is not negative, for the codes q of a file, the bytes of int8."""
        return codes ^ 128

    from_stream = to_stream


FORMATS: dict[str, type[Blocks]] = {cls.__name__: cls for cls in (Q4_0, Q4_1, Q8_0)}

"""Codes of 1 to 8 bits in a stream of bytes, the least significant bit first.

    code k occupies the bits b k ... b k + b − 1 of the stream;  bit i of the stream is bit i mod 8 of byte i // 8

With 4 bits a byte holds two codes, the first in its low half. With 3 bits, 8 codes take 3 bytes: a code may begin in
one byte and end in the next. The stream runs along the first axis; the other axes hold independent streams.
"""
from __future__ import annotations

from math import gcd

import numpy as np

from .. import array, checks
from ..array import Array, xp

__all__ = ["check_codes", "check_stream", "pack", "packed_length", "unpack"]


def packed_length(n: int, bits: int) -> int:
    """The bytes of a stream of n codes:  ⌈n b / 8⌉."""
    return -(-n * bits // 8)


def pack(codes: Array, bits: int) -> Array:
    """The stream (⌈n b / 8⌉, ...) uint8 of codes (n, ...), whole numbers in 0 ... 2^b − 1. Unused bits are 0.

    TypeError for codes that are no array of integers, ValueError for codes out of range and bits outside 1 ... 8."""
    check_codes(codes, bits)
    codes = codes.astype(np.uint8, copy=False)
    stream = xp(codes).zeros((packed_length(len(codes), bits), *codes.shape[1:]), np.uint8)
    period, step = _period(bits)
    for k in range(period):
        q = codes[k::period]
        byte, shift = divmod(bits * k, 8)
        if not len(q):
            break
        low = stream[byte::step][:len(q)]                    # a view: the byte in which these codes begin
        low |= q << shift
        if shift + bits > 8:
            high = stream[byte + 1::step][:len(q)]           # the byte in which they end
            high |= q >> (8 - shift)
    return stream


def unpack(stream: Array, bits: int, n: int) -> Array:
    """The first n codes of a stream (bytes, ...) uint8, as uint8 (n, ...): the inverse of pack.

    TypeError for another dtype, ValueError for a stream that is too short and bits outside 1 ... 8."""
    check_stream(stream, bits, n)
    if bits == 8:
        return stream[:n].copy()
    codes = xp(stream).empty((n, *stream.shape[1:]), np.uint8)
    mask = (1 << bits) - 1
    period, step = _period(bits)
    for k in range(min(period, n)):
        count = -(-(n - k) // period)                        # of the codes k, k + period, k + 2 period ...
        byte, shift = divmod(bits * k, 8)
        q = stream[byte::step][:count] >> shift
        if shift + bits > 8:
            q |= stream[byte + 1::step][:count] << (8 - shift)
        q &= mask
        codes[k::period] = q
    return codes


def check_codes(codes: Array, bits: int) -> None:
    """TypeError or ValueError unless pack can pack these codes."""
    checks.whole("pack: bits", bits, 1, 8)
    if not array.is_array(codes) or codes.dtype.kind not in "iu" or codes.ndim == 0:
        raise TypeError(f"pack wants an array of integer codes, got {checks.brief(codes)}")
    if not codes.size:
        return
    smallest = int(codes.min())
    largest = int(codes.max())
    if smallest < 0 or largest >= 1 << bits:
        found = f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
        raise ValueError(f"pack wants codes from 0 to {(1 << bits) - 1} for {bits} bits, got {found}")


def check_stream(stream: Array, bits: int, n: int) -> None:
    """TypeError or ValueError unless unpack can read n codes from this stream."""
    checks.whole("unpack: bits", bits, 1, 8)
    checks.whole("unpack: n", n, least=0)
    if not array.is_array(stream) or stream.dtype != np.uint8 or stream.ndim == 0:
        raise TypeError(f"unpack wants an array of uint8, got {checks.brief(stream)}")
    if len(stream) < packed_length(n, bits):
        raise ValueError(f"unpack wants {packed_length(n, bits)} bytes for {n} codes of {bits} bits, "
                         f"got {len(stream)}")


def _period(bits: int) -> tuple[int, int]:
    """The least number of codes that fill whole bytes, and the number of these bytes."""
    period = 8 // gcd(8, bits)
    return period, period * bits // 8

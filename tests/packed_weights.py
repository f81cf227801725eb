"""Packed weights of every form in compress/grouped.py, small, with their dense values in float64 by the definition.

    FORMS[name](rng, out) -> (packed, W)        W (out, in) float64, computed here from the codes, one weight at a time
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tinyft import array
from tinyft.compress import FORMATS, Uniform
from tinyft.compress.codebooks import Codebook, DoubleScale, get_table
from tinyft.compress.grouped import Grouped

Form = Callable[[np.random.Generator, int], tuple[Grouped, np.ndarray]]


def uniform(rng: np.random.Generator, out: int, bits: int, width: int, group: int, *, half: bool = True,
            zeros: bool = True, moved: bool = False) -> tuple[Uniform, np.ndarray]:
    """w = s (q − z). half: scales of float16; zeros: a zero point for each group; moved: an order and input scales."""
    groups = -(-width // group)
    codes = rng.integers(0, 1 << bits, (out, width)).astype(np.uint8)
    scale = rng.uniform(0.01, 0.1, (out, groups)).astype(np.float32)
    scale = scale.astype(np.float16).astype(np.float32) if half else scale
    zero = rng.integers(0, 1 << bits, (out, groups)).astype(np.float32) if zeros else None
    more = {}
    if moved:
        more = {"order": rng.permutation(width), "input_scale": rng.uniform(0.5, 2, width).astype(np.float32)}
    kind = "affine" if zeros else "symmetric"
    packed = Uniform(codes, scale, zero, kind=kind, bits=bits, group=group, **more)
    W = np.empty((out, width))
    for k in range(width):
        z = 2**(bits - 1) if zero is None else zero[:, k // group].astype(np.float64)
        column = scale[:, k // group].astype(np.float64) * (codes[:, k].astype(np.float64) - z)
        j = more["order"][k] if moved else k
        W[:, j] = column / more["input_scale"][j] if moved else column
    return packed, W


def codebook(rng: np.random.Generator, out: int, table: str, width: int, group: int, *, double: bool = False,
             ) -> tuple[Codebook, np.ndarray]:
    """w = value[q] · a. double: a is doubly quantized."""
    values = get_table(table).values
    groups = -(-width // group)
    codes = rng.integers(0, len(values), (out, width)).astype(np.uint8)
    scale = rng.uniform(0.5, 2, (out, groups)).astype(np.float32)
    packed = Codebook(codes, DoubleScale.quantize(scale) if double else scale, table=table, group=group)
    if double:
        scale = array.asnumpy(packed.scale).T
    return packed, np.repeat(scale.astype(np.float64), group, 1)[:, :width] * values[codes].astype(np.float64)


def blocks(rng: np.random.Generator, out: int, kind: str, width: int) -> tuple[Grouped, np.ndarray]:
    """A GGUF format, from random bytes."""
    cls = FORMATS[kind]
    data = rng.integers(0, 256, (out, width // 32, cls.block_bytes())).astype(np.uint8)
    head = 2 * cls.numbers
    numbers = rng.uniform(-0.1, 0.1, (out, width // 32, cls.numbers)).astype(np.float16)
    data[..., :head] = numbers.view(np.uint8)
    d = numbers[..., :1].astype(np.float64)
    byte = data[..., head:]
    if kind == "Q8_0":
        W = d * byte.view(np.int8)
    else:
        q = np.concatenate([byte & 15, byte >> 4], axis=-1).astype(np.float64)
        W = d * (q - 8) if kind == "Q4_0" else d * q + numbers[..., 1:].astype(np.float64)
    return cls(data), W.reshape(out, width)


def _form(make: Callable, *args: object, **options: object) -> Form:
    def form(rng: np.random.Generator, out: int) -> tuple[Grouped, np.ndarray]:
        return make(rng, out, *args, **options)
    return form


FORMS: dict[str, Form] = {
    **{f"affine, {bits} bits": _form(uniform, bits, 51, 16) for bits in range(1, 9)},
    "affine, 4 bits, groups of 7": _form(uniform, 4, 50, 7),
    "affine, 3 bits, groups of 7": _form(uniform, 3, 50, 7),
    "affine, 4 bits, one group": _form(uniform, 4, 43, 43, half=False),
    "affine, 4 bits, groups of 8": _form(uniform, 4, 96, 8),
    "affine, 4 bits, long": _form(uniform, 4, 700, 64),
    "symmetric, 4 bits": _form(uniform, 4, 96, 32, zeros=False),
    "moved, 4 bits": _form(uniform, 4, 44, 16, moved=True),
    "moved, 5 bits": _form(uniform, 5, 44, 12, half=False, moved=True),
    "nf4": _form(codebook, "nf4", 80, 32),
    "nf4, doubly": _form(codebook, "nf4", 80, 32, double=True),
    "nf4, short group": _form(codebook, "nf4", 45, 32),
    "dynamic": _form(codebook, "dynamic", 70, 32),
    **{kind: _form(blocks, kind, 96) for kind in FORMATS},
}

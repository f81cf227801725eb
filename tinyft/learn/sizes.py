"""Inputs that a person can check by hand: sizes that grow from 1 to 2 to 4, small whole numbers as floats.

A law names the shapes of its inputs with letters, f(a="n k", b="k m"); each letter is one size, drawn anew for every
input.  Values are whole numbers: with any float, a correct answer fails at 5e-324, and nobody learns from that.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

GROWING = ((1, 6), (2, 24), (4, 10))                     # (largest size, number of examples)
WHOLE = (0, 1, -1, 2, -2, 3, -3)                         # the simplest first: failing inputs shrink towards these
_limit = [4]


def limit(n: int) -> None:
    """Let no size be larger than n from now on."""
    _limit[0] = n


@st.composite
def sizes(draw: Callable) -> int:
    """A size from 1 to the current limit, for strategies written by hand."""
    return draw(st.integers(1, _limit[0]))


@st.composite
def array(draw: Callable, shape: tuple, values: Sequence = WHOLE, dtype: Any = np.float64) -> np.ndarray:
    """A random array of this shape, each entry one of `values`.

    Drawn as one string of bytes, a byte for each entry: ten times faster than entry by entry.  Hypothesis makes bytes
    smaller when it simplifies a failing input, so the first of `values` should be the simplest.
    """
    n = int(np.prod(shape))
    indices = np.frombuffer(draw(st.binary(min_size=n, max_size=n)), np.uint8)
    return np.array(values, dtype)[indices % len(values)].reshape(shape)


class Shaped:
    """An input whose shape is given by the law's letters, with other values than small whole numbers."""

    def __init__(self, shape: str, values: Sequence, dtype: Any = np.float64):
        self.letters = shape.split()
        self.values = values
        self.dtype = dtype


def integers(shape: str, low: int, high: int) -> Shaped:
    """int64 values from low to high."""
    return Shaped(shape, range(low, high + 1), np.int64)


def booleans(shape: str) -> Shaped:
    """False and True."""
    return Shaped(shape, (False, True), bool)


def positive(shape: str) -> Shaped:
    """1.0 to 4.0."""
    return Shaped(shape, range(1, 5))


@st.composite
def draws(draw: Callable, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """(the drawn inputs of a law, {letter: size}), for inputs = {argument of the law: what to draw}.

    An input is a shape string such as "n k", whose letters are sizes from 1 to the limit; a Shaped, the same with other
    values; or a Hypothesis strategy.  An argument n="size" gets the size of the letter n itself.
    """
    specs = {}
    letters = set()
    for name, given in inputs.items():
        is_shape = isinstance(given, str) and given != "size"
        specs[name] = Shaped(given, WHOLE) if is_shape else given
        if isinstance(specs[name], Shaped):
            letters |= set(specs[name].letters)
        elif isinstance(given, str):
            letters.add(name)
    size = {letter: draw(st.integers(1, _limit[0])) for letter in sorted(letters)}
    drawn = {}
    for name, spec in specs.items():
        if isinstance(spec, Shaped):
            shape = tuple(size[letter] for letter in spec.letters)
            drawn[name] = draw(array(shape, spec.values, spec.dtype))
        else:
            drawn[name] = size[name] if isinstance(spec, str) else draw(spec)
    return drawn, size

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
    """An array of this shape and of these values.  Drawn as one string of bytes: ten times faster than entry by entry.
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
    """(the drawn inputs of a law, the size of each letter).

    Each input is a shape string, a Shaped, or a strategy.  A letter as a name (n="size") gives the size of that letter.
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

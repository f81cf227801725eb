"""Inputs that a person can check by hand: sizes that grow from 1 to 2 to 4, small whole numbers as floats.

A law names the shapes of its inputs with letters, f(a="n k", b="k m"); each letter is one size, drawn anew for every input.  Numbers
are drawn as whole ones: with any float, a right answer fails at 5e-324, and nobody learns from it.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

GROWING = ((1, 6), (2, 24), (4, 10))                                             # (largest size, examples of it)
_limit = [4]


def limit(n: int) -> None:
    "From now on no size is larger than n."
    _limit[0] = n


whole = (0, 1, -1, 2, -2, 3, -3)                                                 # the simplest first: failing inputs come down to these


@st.composite
def sizes(draw: Callable) -> int:
    "1 to the limit of now: for strategies written by hand."
    return draw(st.integers(1, _limit[0]))


@st.composite
def array(draw: Callable, shape: tuple, values: Sequence = whole, dtype: Any = np.float64) -> np.ndarray:
    "An array of this shape, of these values.  It is drawn as one string of bytes: ten times as fast as entry by entry."
    n = int(np.prod(shape))
    places = np.frombuffer(draw(st.binary(min_size=n, max_size=n)), np.uint8)
    return np.array(values, dtype)[places % len(values)].reshape(shape)


class Shaped:
    "An input whose sizes are the law's letters, with other values than small whole numbers."

    def __init__(self, shape: str, values: Sequence, dtype: Any = np.float64):
        self.shape, self.values, self.dtype = shape, values, dtype


def integers(shape: str, low: int, high: int) -> Shaped:
    return Shaped(shape, range(low, high + 1), np.int64)


def booleans(shape: str) -> Shaped:
    return Shaped(shape, (False, True), bool)


def positive(shape: str) -> Shaped:
    return Shaped(shape, range(1, 5))


@st.composite
def draws(draw: Callable, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """The drawn inputs of a law, and the size of each letter.

    Each is a shape string, a Shaped, or a strategy; a letter alone as the name (n="size") gives its size."""
    specs = {k: Shaped(v, whole) if isinstance(v, str) and v != "size" else v for k, v in inputs.items()}
    letters = sorted({d for s in specs.values() if isinstance(s, Shaped) for d in s.shape.split()} | {k for k, v in specs.items() if v == "size"})
    size = {d: draw(st.integers(1, _limit[0])) for d in letters}
    return {k: draw(array(tuple(size[d] for d in s.shape.split()), s.values, s.dtype)) if isinstance(s, Shaped) else
            size[k] if isinstance(s, str) else draw(s) for k, s in specs.items()}, size

"""Inputs that a person can check by hand: sizes that grow from 1 to 2 to 4 to 7, small whole numbers as floats.

A law names the shapes of its inputs with letters, f(a="n k", b="k m"); each letter is one size, drawn anew for every
input.  "..." stands for up to two axes in front, the same for all inputs of the law.  Values are whole numbers: with
any float, a correct answer fails at 5e-324, and nobody learns from that.  At the largest size, simple fractions are
among them, since an answer that rounds is right for whole numbers.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from .exercise import Named

GROWING = ((1, 4), (2, 24), (4, 8), (7, 6))             # (largest size, number of examples)
QUICK = ((2, 12),)                                       # the same, to learn only if a law holds
WITH_FRACTIONS = 7                                       # the largest size at which fractions are drawn
IN_FRONT = 2                                             # the most axes that "..." stands for
LARGEST_IN_FRONT = 3                                     # the largest size of such an axis
# The first ones are the simplest, towards which failing inputs shrink: not 0, with which little is seen to go wrong.
WHOLE = (1, 2, -1, 3, -2, 0, -3)
FRACTIONS = (1, 2, 0.5, -0.5, 1.25, -2, 0, 0.75, -1.5, 3)
POSITIVE = (1, 2, 3, 4)
POSITIVE_FRACTIONS = (1, 2, 0.5, 1.25, 0.75, 3)
_limit = [4]


def limit(n: int) -> None:
    """Let no size be larger than n from now on."""
    _limit[0] = n


@st.composite
def sizes(draw: Callable) -> int:
    """A size from 1 to the current limit, for strategies written by hand."""
    return draw(st.integers(1, _limit[0]))


@st.composite
def array(draw: Callable, shape: tuple, values: Sequence | None = None, dtype: Any = np.float64) -> np.ndarray:
    """A random array of this shape, each entry one of `values`; None: small whole numbers, or fractions among them."""
    return draw_array(draw, shape, values, dtype)


def draw_array(draw: Callable, shape: tuple, values: Sequence | None, dtype: Any) -> np.ndarray:
    """Draw an array, as the strategy `array` does.

    Drawn as one string of bytes, a byte for each entry: ten times faster than entry by entry.  Hypothesis makes bytes
    smaller when it simplifies a failing input, so the first of `values` should be the simplest.
    """
    if values is None:
        values = FRACTIONS if _limit[0] >= WITH_FRACTIONS else WHOLE
    n = math.prod(shape)
    indices = np.frombuffer(draw(st.binary(min_size=n, max_size=n)), np.uint8).astype(np.intp)
    return np.array(values, dtype)[indices % len(values)].reshape(shape)


def named(**values: Any) -> Named:
    """The values as a Named, in the order of the keywords."""
    made = Named(values.values())
    made.names = tuple(values)
    return made


class Shaped:
    """An input whose shape is given by the law's letters.

    values: None for those of `array`.  fractions: the values at the largest size, if they are others there.
    """

    def __init__(self, shape: str, values: Sequence | None = None, dtype: Any = np.float64,
                 fractions: Sequence | None = None):
        self.letters = shape.split()
        self.values = values
        self.dtype = dtype
        self.fractions = fractions

    def drawn_values(self) -> Sequence | None:
        """The values at the size that is drawn now."""
        return self.fractions if self.fractions and _limit[0] >= WITH_FRACTIONS else self.values


def integers(shape: str, low: int, high: int) -> Shaped:
    """int64 values from low to high."""
    return Shaped(shape, range(low, high + 1), np.int64)


def booleans(shape: str) -> Shaped:
    """False and True."""
    return Shaped(shape, (False, True), bool)


def positive(shape: str) -> Shaped:
    """1.0 to 4.0, or positive fractions among them."""
    return Shaped(shape, POSITIVE, fractions=POSITIVE_FRACTIONS)


@st.composite
def draws(draw: Callable, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """(the drawn inputs of a law, {letter: size}), for inputs = {argument of the law: what to draw}.

    An input is a shape string such as "n k", whose letters are sizes from 1 to the limit; a Shaped, the same with other
    values; or a Hypothesis strategy.  An argument n="size" gets the size of the letter n itself.
    "..." in a shape string stands for 0 to IN_FRONT axes, the same in all inputs.
    """
    specs = {}
    letters = set()
    for name, given in inputs.items():
        is_shape = isinstance(given, str) and given != "size"
        specs[name] = Shaped(given) if is_shape else given
        if isinstance(specs[name], Shaped):
            letters |= set(specs[name].letters)
        elif isinstance(given, str):
            letters.add(name)
    has_front = "..." in letters
    size = {letter: draw(st.integers(1, _limit[0])) for letter in sorted(letters - {"..."})}
    axes_in_front = draw(st.integers(0, IN_FRONT)) if has_front else 0
    front = tuple(draw(st.integers(1, min(_limit[0], LARGEST_IN_FRONT))) for _ in range(axes_in_front))
    drawn = {}
    for name, spec in specs.items():
        if isinstance(spec, Shaped):
            own = [letter for letter in spec.letters if letter != "..."]
            shape = (front if "..." in spec.letters else ()) + tuple(size[letter] for letter in own)
            drawn[name] = draw_array(draw, shape, spec.drawn_values(), spec.dtype)
        else:
            drawn[name] = size[name] if isinstance(spec, str) else draw(spec)
    return drawn, size

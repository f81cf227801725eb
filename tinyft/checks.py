"""Checks of arguments. Each gives the value back, or raises one sentence: "steps wants a whole number >= 0, got 2.5".

The first argument of each check is the name that the sentence begins with: of a parameter ("steps"), or of a function
and its parameter ("generate: top_k"). TypeError for a value of a wrong kind, ValueError for a value out of range.
"""
from __future__ import annotations

import math
import operator
from collections.abc import Collection
from typing import Any

import numpy as np

__all__ = ["brief", "flag", "function", "instance", "number", "one_of", "random_generator", "whole"]

LONGEST = 60                                             # characters of a value in a message


def brief(value: Any) -> str:
    """A value as a short text without line breaks, for an error message.

    A class, a function and an array are named, since their repr tells a reader little."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape:
        return f"{type(value).__name__} of shape {shape}"
    if callable(value) and getattr(value, "__qualname__", None):
        return f"the function {value.__qualname__}"
    try:
        text = " ".join(repr(value).split())
    except Exception:                                    # a repr of the user's that fails must not hide the sentence
        text = object.__repr__(value)
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}..."
    return text


def whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """The value as an int, if it is a whole number in least ... most (None: no limit on that side).

    NumPy integers are whole numbers. A bool is none, and a float is none, also 2.0: TypeError."""
    wanted = f"{name} wants a whole number{_limits(least, most)}"
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{wanted}, got {value}")
    try:
        result = operator.index(value)
    except TypeError:
        raise TypeError(f"{wanted}, got {brief(value)}") from None
    if (least is not None and result < least) or (most is not None and result > most):
        raise ValueError(f"{wanted}, got {brief(result)}")
    return result


def _limits(least: int | None, most: int | None) -> str:
    """The range of a whole number in words, with a space before it."""
    if least is not None and most is not None:
        return f" from {least} to {most}"
    if least is not None:
        return f" >= {least}"
    return f" <= {most}" if most is not None else ""


def number(
    name: str, value: Any, low: float | None = None, high: float | None = None, *,
    above: float | None = None, below: float | None = None,
) -> float:
    """The value as a Python number, if it is finite and in its range; an int stays an int.

    low <= value <= high and above < value < below, as far as these are given. ValueError for inf, NaN or a value out of
    range; TypeError for a bool, a string, None, or an array with axes."""
    bounds = {">=": low, ">": above, "<=": high, "<": below}
    limits = " and ".join(f"{sign} {bound}" for sign, bound in bounds.items() if bound is not None)
    wanted = f"{name} wants a finite number {limits}".rstrip()
    result = _as_number(value)
    if result is None:
        raise TypeError(f"{wanted}, got {brief(value)}")
    is_inside = (
        math.isfinite(result)
        and (low is None or result >= low)
        and (above is None or result > above)
        and (high is None or result <= high)
        and (below is None or result < below)
    )
    if not is_inside:
        raise ValueError(f"{wanted}, got {brief(value)}")
    return result


def _as_number(value: Any) -> float | None:
    """The value as an int or a float; None if it is no single real number."""
    if isinstance(value, (bool, np.bool_, str, bytes, bytearray, complex, np.complexfloating)):
        return None
    if getattr(value, "shape", ()) != () or getattr(value, "dtype", None) == np.dtype(bool):
        return None
    try:
        as_float = float(value)
    except (TypeError, ValueError):
        return None
    except OverflowError:                                # an int or a fraction too large for a float
        return math.inf
    try:
        return operator.index(value)                     # an int stays an int
    except TypeError:
        return as_float


def flag(name: str, value: Any) -> bool:
    """The value, if it is True or False. TypeError else: 1 and "no" are none."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} wants True or False, got {brief(value)}")
    return bool(value)


def instance(name: str, value: Any, kinds: type | tuple[type, ...], wanted: str) -> Any:
    """The value, if it is an instance of one of the classes. TypeError else.

    wanted: the kinds in words, with an article: "a Module"."""
    if not isinstance(value, kinds):
        raise TypeError(f"{name} wants {wanted}, got {brief(value)}")
    return value


def function(name: str, value: Any, wanted: str) -> Any:
    """The value, if it can be called and is no class. TypeError else.

    wanted: the function in words: "a function (t, T) -> factor"."""
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{name} wants {wanted}, got {brief(value)}")
    return value


def one_of(name: str, value: Any, choices: Collection) -> Any:
    """The value, if it is one of the choices. ValueError else, with all choices; a value of another kind is none."""
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    wanted = ", ".join(map(repr, choices))
    raise ValueError(f"{name} wants one of {wanted}, got {brief(value)}")


def random_generator(name: str, value: Any) -> np.random.Generator:
    """The value, if it is a NumPy Generator. TypeError else."""
    wanted = "a random generator, numpy.random.default_rng(seed)"
    return instance(name, value, np.random.Generator, wanted)

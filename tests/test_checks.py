"""The checks of arguments: what they give back, and the sentence and the kind of error for all else."""
from __future__ import annotations

from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import case_id

from tinyft import checks

WHOLE_NUMBERS = [0, 3, np.int64(3), np.uint8(3), np.array(3)]
NO_WHOLE_NUMBERS = [2.5, 2.0, np.float32(2), True, np.True_, "3", None, [3], np.array([3]), float("nan"), int]
NUMBERS = [0, 0.5, np.float32(0.5), np.float64(0.5), np.int32(1), np.array(0.5), Fraction(1, 2), ml_dtypes.bfloat16(1)]
NO_NUMBERS = [True, np.True_, "0.5", b"1", None, [0.5], (), {}, np.ones(1), 1j, np.complex64(1), float, object()]


class Broken:
    """An object whose repr fails."""

    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize("value", WHOLE_NUMBERS, ids=repr)
def test_whole_numbers_become_ints(value):
    result = checks.whole("steps", value, 0)
    assert type(result) is int
    assert result == value


@pytest.mark.parametrize("value", NO_WHOLE_NUMBERS, ids=case_id)
def test_all_else_is_no_whole_number(value):
    with pytest.raises(TypeError, match="steps wants a whole number >= 0, got "):
        checks.whole("steps", value, 0)


@pytest.mark.parametrize("value, limits, words", [
    (-1, (0, None), "steps wants a whole number >= 0, got -1"),
    (np.int8(-1), (0, None), "steps wants a whole number >= 0, got -1"),
    (6, (1, 5), "steps wants a whole number from 1 to 5, got 6"),
    (0, (1, 5), "steps wants a whole number from 1 to 5, got 0"),
    (6, (None, 5), "steps wants a whole number <= 5, got 6"),
])
def test_a_whole_number_outside_its_limits_is_a_value_error(value, limits, words):
    with pytest.raises(ValueError) as error:
        checks.whole("steps", value, *limits)
    assert str(error.value) == words


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_numbers_become_python_numbers(value):
    result = checks.number("lr", value, 0, 1)
    assert type(result) in (int, float)
    assert result == value


def test_an_int_stays_an_int():
    """A checkpoint holds the repr of an optimiser, in which 1 and 1.0 differ."""
    assert type(checks.number("lr", 1)) is int
    assert type(checks.number("lr", 1.0)) is float


@pytest.mark.parametrize("value", NO_NUMBERS, ids=case_id)
def test_all_else_is_no_number(value):
    with pytest.raises(TypeError, match="lr wants a finite number > 0, got "):
        checks.number("lr", value, above=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float32("nan"), Fraction(10**400)])
def test_no_range_holds_nan_or_infinity(value):
    with pytest.raises(ValueError, match="lr wants a finite number, got "):
        checks.number("lr", value)


@pytest.mark.parametrize("limits, inside, outside", [
    (dict(low=0), [0, 1], [-1e-9]),
    (dict(above=0), [1e-9], [0, -1]),
    (dict(high=1), [1, -5], [1.1]),
    (dict(below=1), [0.9], [1, 2]),
    (dict(low=0, below=1), [0, 0.9], [-0.1, 1]),
    (dict(above=0, high=1), [0.1, 1], [0, 1.1]),
])
def test_the_ends_of_a_range_belong_to_it_or_not(limits, inside, outside):
    for value in inside:
        assert checks.number("p", value, **limits) == value
    for value in outside:
        with pytest.raises(ValueError, match="p wants a finite number "):
            checks.number("p", value, **limits)


def test_the_sentence_names_both_ends():
    with pytest.raises(ValueError) as error:
        checks.number("p", 1, 0, below=1)
    assert str(error.value) == "p wants a finite number >= 0 and < 1, got 1"


def test_flags_are_true_or_false():
    assert checks.flag("resume", np.True_) is True
    assert checks.flag("resume", value=False) is False
    for value in (1, 0, None, "no", [], np.array([True])):
        with pytest.raises(TypeError, match="resume wants True or False, got "):
            checks.flag("resume", value)


def test_instances_functions_generators_and_choices():
    assert checks.instance("text", "a", str, "a string") == "a"
    assert checks.function("loss", len, "a function") is len
    assert checks.one_of("form", "gpt", ("bert", "gpt")) == "gpt"
    rng = np.random.default_rng(0)
    assert checks.random_generator("rng", rng) is rng
    refused = [
        (checks.instance, ("text", str, str, "a string"), TypeError, "text wants a string, got the class str"),
        (checks.function, ("loss", 5, "a function"), TypeError, "loss wants a function, got 5"),
        (checks.function, ("loss", int, "a function"), TypeError, "loss wants a function, got the class int"),
        (checks.one_of, ("bits", True, (1, 2)), ValueError, "bits wants one of 1, 2, got True"),
        (checks.one_of, ("bits", [1], (1, 2)), ValueError, "bits wants one of 1, 2, got [1]"),
        (checks.random_generator, ("rng", 3), TypeError,
         "rng wants a random generator, numpy.random.default_rng(seed), got 3"),
    ]
    for check, arguments, kind, words in refused:
        with pytest.raises(kind) as error:
            check(*arguments)
        assert str(error.value) == words


@pytest.mark.parametrize("value, words", [
    ("a\n  b", "'a\\n b'"),
    ("x" * 500, f"'{'x' * 59}..."),
    (np.zeros((2, 3)), "ndarray of shape (2, 3)"),
    (dict, "the class dict"),
    (checks.whole, "the function whole"),
    ({1: np.zeros(3)}, "{1: array([0., 0., 0.])}"),
])
def test_a_value_is_shown_briefly(value: Any, words: str):
    assert checks.brief(value) == words


def test_a_repr_that_fails_does_not_hide_the_sentence():
    with pytest.raises(TypeError, match="steps wants a whole number, got <.*Broken object"):
        checks.whole("steps", Broken())


def test_numbers_too_large_for_a_float_get_our_sentence():
    with pytest.raises(ValueError, match="lr wants a finite number > 0, got 1000"):
        checks.number("lr", 10**400, above=0)
    with pytest.raises(ValueError, match="steps wants a whole number <= 5") as error:
        checks.whole("steps", 10**400, most=5)
    assert len(str(error.value)) < 150
    with pytest.raises(TypeError, match="lr wants a finite number"):
        checks.number("lr", np.array(object=True))

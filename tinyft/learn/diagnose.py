"""A diagnosis of two arrays that should be equal and are not.

`close` compares the result of the learner's function with the expected one.  `diagnose` looks at many failures at once,
because one says little: if a result for n = 2 is half of the expected one, the missing factor may be 1/2 or 1/n, and
failures with another n decide.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import array
from ..tensor import Tensor, sum_to

# In the exercise on sum_to, tinyft's own sum_to raises for the learner's code. The exercise's own code uses this name.
undo_broadcasting = sum_to


class Unusable(AssertionError):
    """The function returned something that is no answer: a list, None, an array of another kind."""


@dataclass
class Mismatch(AssertionError):
    """A result that differs from the expected one.

    got, want    the result and the expected one, NumPy arrays
    what         the name of the result in words, such as "the gradient of x"
    guesses      {sentence: the result that this known error would give}
    sizes        {letter: size} of the input, such as {"n": 3}
    """
    got: np.ndarray
    want: np.ndarray
    what: str
    guesses: dict[str, np.ndarray] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


def host(a: Any, what: str = "the result", want: Any = None) -> np.ndarray:
    """A Tensor, a device array or a number as a NumPy array; a number only if `want`, the expected result, is not
    given or has no axes.

    Unusable for anything else; `what` and the shape of `want` stand in its message."""
    if isinstance(a, Tensor):
        a = a.data
    numeric = array.is_array(a) and np.dtype(a.dtype).kind in "biufV"    # bool, integers, floats; bfloat16 is V
    scalar = isinstance(a, (bool, int, float, np.generic)) and (want is None or np.ndim(want) == 0)
    if numeric or scalar:
        return array.asnumpy(a)
    shape = "" if want is None else f" of shape {np.shape(want)}"
    raise Unusable(f"{what} should be an array{shape}; yours is {described(a)}")


def described(a: Any) -> str:
    """A wrong result, any object, in a few words for a message: "a list, [1, 2]"."""
    if a is None:
        return "None: is a `return` missing?"
    if array.is_array(a):
        return f"an array of dtype {a.dtype}"
    text = repr(a)
    if len(text) >= 60:
        text = text[:57] + "..."
    kind = type(a).__name__
    article = "an" if kind[0] in "aeiou" else "a"
    return f"{article} {kind}, {text}"


def close(got: Any, want: Any, what: str = "the result", guesses: dict[str, Any] | None = None, rtol: float = 1e-9,
          atol: float = 1e-12, dtype: bool = False) -> None:
    """Raise Mismatch unless got equals want up to rounding (np.allclose).  Unusable if got is no array or number.

    Booleans equal only booleans, integers only integers, and floats only floats of the same width: an answer that
    rounds, or that computes in float32, is wrong.  A number of Python may be an integer or a float.  With dtype=True
    the dtypes must be the same.  guesses: {"a known error in words": the result that it gives}.
    """
    want = np.asarray(want)
    g = host(got, what, want)
    is_number = isinstance(got, (int, float)) and not isinstance(got, (bool, np.generic))
    if dtype:
        same_kind = g.dtype == want.dtype
    elif is_number:
        same_kind = want.dtype != bool
    else:
        same_kind = _kind(g.dtype) == _kind(want.dtype)
    if g.shape != want.shape or not same_kind or not equal(g, want, rtol, atol):
        raise Mismatch(g.copy(), want, what, {k: np.asarray(v) for k, v in (guesses or {}).items()})


def _kind(dtype: np.dtype) -> str:
    """"integer" for all integers; of another dtype its name."""
    return "integer" if dtype.kind in "iu" else dtype.name


def equal(a: np.ndarray, b: np.ndarray, rtol: float = 1e-6, atol: float = 1e-9) -> bool:
    """True if two arrays have one shape and are equal up to rounding."""
    with np.errstate(all="ignore"):
        return a.shape == b.shape and bool(np.allclose(a, b, rtol=rtol, atol=atol))


# ── the rules: each gets the failures of one result, and returns a sentence, or "" if it does not fit them ───────────
TRANSPOSED = "it is the expected result transposed: swap the factors, or add a transpose"


def diagnose(failures: list[Mismatch]) -> str:
    """The diagnosis of the last failure, the one that the learner sees, in one sentence.

    Each rule gets all failures of this result (such as "the gradient of x"), since one alone may fit it by accident.
    It returns its sentence, or "" if it does not fit.  The first sentence counts; without one, `_worst` gives it."""
    last = failures[-1]
    same_result = [f for f in failures if f.what == last.what]
    for rule in (_guessed, _not_finite, _shape, _dtype, _digits, _rounded, _opposite, _transposed, _factor, _offset,
                 _triangle, _axis):
        sentence = rule(same_result)
        if sentence:
            return sentence
    return _worst(last)


def _guessed(failures: list[Mismatch]) -> str:
    """A guess of the law, an error in words, whose result every failure has."""
    for guess in failures[-1].guesses:
        if all(guess in f.guesses and equal(f.got, f.guesses[guess]) for f in failures):
            return guess
    return ""


def _not_finite(failures: list[Mismatch]) -> str:
    """A sentence if the last result has nan or inf, and the expected one has none."""
    last = failures[-1]
    if last.got.dtype.kind != "f" or not np.isfinite(last.want).all():
        return ""
    bad = int((~np.isfinite(last.got)).sum())
    return f"{bad} of {last.got.size} entries are nan or inf" if bad else ""


def _shape(failures: list[Mismatch]) -> str:
    """A sentence if a result has another shape than expected, with the reason where it can be told."""
    wrong_shape = [f for f in failures if f.got.shape != f.want.shape]
    if not wrong_shape:
        return ""
    if all(f.got.ndim > 1 and equal(f.got.swapaxes(-1, -2), f.want) for f in failures):
        return TRANSPOSED
    if all(_not_summed(f.got, f.want) for f in wrong_shape):
        return "the axes along which it was repeated are not summed: broadcasting is not undone"
    g = wrong_shape[-1].got
    w = wrong_shape[-1].want
    same_numbers = g.size == w.size and equal(g.ravel(), w.ravel())
    sentence = f"its shape is {g.shape}, expected {w.shape}"
    return f"the right numbers, but {sentence}" if same_numbers else sentence


def _not_summed(g: np.ndarray, w: np.ndarray) -> bool:
    """True if undoing the broadcasting of g gives w."""
    if g.ndim < w.ndim:
        return False
    fits = all(n in (1, m) for n, m in zip(w.shape[::-1], g.shape[::-1]))
    return fits and equal(undo_broadcasting(g, w.shape), w)


def _dtype(failures: list[Mismatch]) -> str:
    """A sentence if all numbers are right, and only the dtype is another."""
    last = failures[-1]
    if last.got.dtype == last.want.dtype:
        return ""
    if all(equal(f.got.astype(float), f.want.astype(float), 1e-4, 1e-5) for f in failures):
        is_wider = last.got.dtype == np.float64 and last.want.dtype == np.float32
        cause = " (np.sqrt(2) is a float64 and makes float64 of a float32 array; 2**0.5 does not)" if is_wider else ""
        return f"the numbers are right, the dtype is {last.got.dtype}, expected {last.want.dtype}{cause}"
    return ""


def _digits(failures: list[Mismatch]) -> str:
    """A sentence if all numbers are nearly right."""
    if _all_right_to_six_digits(failures):
        return ("only the first six digits are right: was something computed in float32, was a constant rounded, or is "
                "a small number such as ε missing, or too much?")
    return ""


def _all_right_to_six_digits(failures: list[Mismatch]) -> bool:
    return all(equal(f.got.astype(float), f.want.astype(float)) for f in failures)


def _rounded(failures: list[Mismatch]) -> str:
    """A sentence if every result is the expected one, rounded up, down or to the nearest whole number."""
    sentence = "it is rounded to whole numbers: is it kept in an array of integers?"
    if not any(f.got.any() for f in failures):
        sentence = "it is zero everywhere: it was never computed, or it was rounded to whole numbers"
    for rounding in (np.trunc, np.rint, np.floor, np.ceil):
        rounded = [rounding(f.want.astype(float)) for f in failures]
        if all(equal(f.got.astype(float), r) for f, r in zip(failures, rounded)):
            return sentence
    return ""


def _opposite(failures: list[Mismatch]) -> str:
    """A sentence if every boolean is the opposite of the expected one."""
    boolean = all(f.got.dtype == f.want.dtype == bool for f in failures)
    if boolean and all((f.got != f.want).all() for f in failures):
        return "it is True where False is expected, and the other way round"
    return ""


def _transposed(failures: list[Mismatch]) -> str:
    return TRANSPOSED if all(f.want.ndim > 1 and equal(f.got.swapaxes(-1, -2), f.want) for f in failures) else ""


def ratio(f: Mismatch) -> float | None:
    """The number r with got = r · want in every entry; None if there is none; NaN if both are zero everywhere."""
    g = f.got.astype(float)
    w = f.want.astype(float)
    if not w.any():
        return None if g.any() else np.nan
    with np.errstate(all="ignore"):                      # numbers such as e⁷⁰⁰ overflow
        r = float((g * w).sum() / (w * w).sum())         # least squares
        return r if equal(g, r * w) else None


def _factor(failures: list[Mismatch]) -> str:
    """A sentence if every result is a multiple of the expected one; the factors of the failures may differ."""
    ratios = [ratio(f) for f in failures]
    if any(r is None for r in ratios):
        return ""
    last = ratios[-1]
    if np.allclose(ratios, last, rtol=1e-5):
        if abs(last) < 1e-12:
            return "it is zero everywhere"
        if np.isclose(last, -1):
            return "it is the expected result with the opposite sign"
        return (f"it is {last:.4g} x the expected result everywhere, in all {len(ratios)} inputs that fail: "
                "a missing or doubled factor?")
    by_size = _factor_of_a_size(failures, ratios)
    if by_size:
        return by_size
    if max(f.want.size for f in failures) == 1:          # any number is a multiple of any other
        return ""
    return ("it is a multiple of the expected result, another one for each input: is a factor computed from the wrong "
            "number, such as the size of another axis?")


def _factor_of_a_size(failures: list[Mismatch], ratios: list[float]) -> str:
    """A sentence if the ratio of every failure is n, 1/n, √n or 1/√n, for a size n of its input.

    ratios: result / expected result, one for each failure.  sizes, of a failure: {letter of the law's shapes: size}.
    """
    for letter in failures[-1].sizes:
        n = np.array([f.sizes.get(letter, 0) for f in failures], float)
        for power, text in ((-1, f"1/{letter}"), (1, letter), (-0.5, f"1/√{letter}"), (0.5, f"√{letter}")):
            if n.all() and np.allclose(ratios, n**power, rtol=1e-5):
                return (f"it is {text} x the expected result ({letter} = {int(n[-1])} here): "
                        "a mean for a sum, or a sum for a mean?")
    return ""


def _offset(failures: list[Mismatch]) -> str:
    """A sentence if the result differs from the expected one by the same amount everywhere."""
    gaps = [f.got.astype(float) - f.want.astype(float) for f in failures]
    constant = all(np.allclose(d, d.flat[0]) for d in gaps)
    if not constant or max(d.size for d in gaps) == 1:
        return ""
    last = gaps[-1].flat[0]
    same_for_all = np.allclose([d.flat[0] for d in gaps], last)
    amount = f"{last:+.4g}" if same_for_all else "the same amount"
    return f"it is off by {amount} everywhere: a missing or doubled term?"


def _triangle(failures: list[Mismatch]) -> str:
    """A sentence if the matrices differ only above the diagonal, or only on it: a mistake in a causal mask?"""
    if any(f.want.ndim < 2 for f in failures) or max(min(f.want.shape[-2:]) for f in failures) < 2:
        return ""
    below = on = above = False                           # whether entries below, on, above the diagonal differ
    for f in failures:
        different = ~np.isclose(f.got.astype(float), f.want.astype(float))
        row, column = np.nonzero(different)[-2:]
        rows, columns = f.want.shape[-2:]
        diagonal = row + columns - rows                  # of a causal mask: the last column that this row may see
        below = below or bool((column < diagonal).any())
        on = on or bool((column == diagonal).any())
        above = above or bool((column > diagonal).any())
    if above and not (on or below):
        return "only entries above the diagonal differ: may a position see the positions after it?"
    if on and not (above or below):
        return "only the diagonal differs: may a position see itself?"
    return ""


def _axis(failures: list[Mismatch]) -> str:
    """A sentence if all rows of `want` have the same sum (1 after softmax, 0 after centring), and `got` has this sum
    along another axis."""
    found = None
    for f in failures:
        total = f.want.astype(float).sum(-1) if f.want.ndim > 1 else np.array([])
        if not total.size or not np.allclose(total, total.flat[0]):
            return ""
        got = f.got.astype(float)
        axes = {a for a in range(f.want.ndim - 1) if np.allclose(got.sum(a), total.flat[0])}
        found = axes if found is None else found & axes
    return f"it adds up along axis {min(found)}, expected along the last: the wrong axis?" if found else ""


def _worst(f: Mismatch) -> str:
    """The number of entries that differ, and the one that differs most: the sentence if no rule fits."""
    g = f.got.astype(float)
    w = f.want.astype(float)
    if g.ndim == 0:
        return f"it is {g - w:+.6g} off"
    i = np.unravel_index(np.argmax(np.abs(g - w)), g.shape)
    different = int((~np.isclose(g, w, rtol=1e-9, atol=1e-12)).sum())
    return (f"{different} of {g.size} entries differ; the worst, at {[int(k) for k in i]}, "
            f"is {g[i]:.6g}, expected {w[i]:.6g}")

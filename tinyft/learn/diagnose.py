"""Two arrays that should be equal and are not: what is the error behind it?

`close` compares what the learner's function gave with what is expected.  `diagnose` looks at many failures at once, since a 1×1 result
says little: a factor that is 1/2 in one input may be 1/n, and shows as that only beside inputs of other sizes.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import array
from ..tensor import Tensor, sum_to

undo_broadcasting = sum_to                                                       # kept from before any exercise closes it


class Unusable(AssertionError):
    "The function gave back something that is no answer: a list, None, an array of another kind."


@dataclass
class Mismatch(AssertionError):
    "got and want: host arrays;  what: their name in words;  guesses: {diagnosis: the array a known error gives};  sizes: {letter: size}."
    got: np.ndarray
    want: np.ndarray
    what: str
    guesses: dict[str, np.ndarray] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


def host(a: Any, what: str = "the result", want: Any = None) -> np.ndarray:
    "A Tensor, a device array or a number as a NumPy array.  Unusable if it is anything else."
    if isinstance(a, Tensor):
        a = a.data
    number = isinstance(a, (bool, int, float, np.generic)) and (want is None or np.ndim(want) == 0)
    if (array.is_array(a) and np.dtype(a.dtype).kind in "biufV") or number:      # V: bfloat16
        return array.asnumpy(a)
    raise Unusable(f"{what} should be an array{'' if want is None else f' of shape {np.shape(want)}'}; yours is {described(a)}")


def described(a: Any) -> str:
    "A thing in a few words."
    if a is None:
        return "None: is a `return` missing?"
    if array.is_array(a):
        return f"an array of dtype {a.dtype}"
    text = repr(a)
    kind = type(a).__name__
    return f"a{'n' * (kind[0] in 'aeiou')} {kind}, {text if len(text) < 60 else text[:57] + '...'}"


def close(got: Any, want: Any, what: str = "the result", guesses: dict[str, Any] | None = None, rtol: float = 1e-6, atol: float = 1e-9,
          dtype: bool = False) -> None:
    """Raise Mismatch unless got is want, to rounding; with dtype=True in dtype too.  Booleans and numbers are never the same.

    guesses: {"what was done instead": the result of doing that}."""
    want = np.asarray(want)
    g = host(got, what, want)
    alike = (g.dtype == want.dtype) if dtype else (g.dtype == bool) == (want.dtype == bool)
    if g.shape != want.shape or not alike or not equal(g, want, rtol, atol):
        raise Mismatch(g.copy(), want, what, {k: np.asarray(v) for k, v in (guesses or {}).items()})


def equal(a: np.ndarray, b: np.ndarray, rtol: float = 1e-6, atol: float = 1e-9) -> bool:
    with np.errstate(all="ignore"):
        return a.shape == b.shape and bool(np.allclose(a, b, rtol=rtol, atol=atol))


# ── what it may be ───────────────────────────────────────────────────────────────────────────────────────────────────
def diagnose(failures: list[Mismatch]) -> str:
    "One sentence that is true of all the failures; the last one is the one that is shown."
    last = failures[-1]
    alike = [f for f in failures if f.what == last.what]
    for rule in (_guessed, _not_finite, _shape, _dtype, _opposite, _transposed, _factor, _offset, _triangle, _axis):
        if said := rule(alike):
            return said
    return _worst(last)


def _guessed(failures: list[Mismatch]) -> str:
    fits = lambda f, guess: guess in f.guesses and equal(f.got, f.guesses[guess])
    return next((guess for guess in failures[-1].guesses if all(fits(f, guess) for f in failures)), "")


def _not_finite(failures: list[Mismatch]) -> str:
    got = failures[-1].got
    bad = int((~np.isfinite(got)).sum()) if got.dtype.kind == "f" else 0
    return f"{bad} of {got.size} entries are nan or inf" if bad and np.isfinite(failures[-1].want).all() else ""


def _shape(failures: list[Mismatch]) -> str:
    other = [f for f in failures if f.got.shape != f.want.shape]
    if not other:
        return ""
    g, w = other[-1].got, other[-1].want
    if all(f.got.ndim > 1 and equal(f.got.swapaxes(-1, -2), f.want) for f in failures):
        return "it is the expected result transposed: swap the factors, or add a transpose"
    if all(_repeated(f.got, f.want) for f in other):
        return "the axes along which it was repeated are not summed: broadcasting is not undone"
    same = "the right numbers, but " if g.size == w.size and equal(g.ravel(), w.ravel()) else ""
    return f"{same}its shape is {g.shape}, expected {w.shape}"


def _repeated(g: np.ndarray, w: np.ndarray) -> bool:
    "Is w what comes of g when broadcasting is undone?"
    return g.ndim >= w.ndim and all(n in (1, m) for n, m in zip(w.shape[::-1], g.shape[::-1])) and equal(undo_broadcasting(g, w.shape), w)


def _dtype(failures: list[Mismatch]) -> str:
    right = all(equal(f.got.astype(float), f.want.astype(float)) for f in failures)
    return f"the numbers are right, the dtype is {failures[-1].got.dtype}, expected {failures[-1].want.dtype}" if right else ""


def _opposite(failures: list[Mismatch]) -> str:
    both = [f for f in failures if f.got.dtype == f.want.dtype == bool]
    return "it is True where False is expected, and the other way round" if both == failures and all((f.got != f.want).all() for f in both) else ""


def _transposed(failures: list[Mismatch]) -> str:
    turned = all(f.want.ndim > 1 and equal(f.got.swapaxes(-1, -2), f.want) for f in failures)
    return "it is the expected result transposed: swap the factors, or add a transpose" if turned else ""


def ratio(f: Mismatch) -> float | None:
    "r if got = r want everywhere, else None.  NaN if want is zero everywhere."
    g, w = f.got.astype(float), f.want.astype(float)
    if not w.any():
        return None if g.any() else np.nan
    r = float((g * w).sum() / (w * w).sum())
    return r if equal(g, r * w) else None


def _factor(failures: list[Mismatch]) -> str:
    ratios = [ratio(f) for f in failures]
    if any(r is None for r in ratios):
        return ""
    first = ratios[-1]
    if np.allclose(ratios, first, rtol=1e-5):
        if abs(first) < 1e-12:
            return "it is zero everywhere"
        if np.isclose(first, -1):
            return "it is the expected result with the sign turned round"
        return f"it is {first:.4g} x the expected result everywhere, in all {len(ratios)} inputs that fail: a missing or doubled factor?"
    for letter in failures[-1].sizes:
        n = np.array([f.sizes.get(letter, 0) for f in failures], float)
        for power, said in ((-1, f"1/{letter}"), (1, letter), (-0.5, f"1/√{letter}"), (0.5, f"√{letter}")):
            if n.all() and np.allclose(ratios, n**power, rtol=1e-5):
                return f"it is {said} x the expected result ({letter} = {int(n[-1])} here): a mean for a sum, or a sum for a mean?"
    if max(f.want.size for f in failures) == 1:                                  # any number is a multiple of any other
        return ""
    return "it is a multiple of the expected result, another one for each input: a factor that depends on the input?"


def _offset(failures: list[Mismatch]) -> str:
    gaps = [f.got.astype(float) - f.want.astype(float) for f in failures]
    if not all(np.allclose(d, d.flat[0]) for d in gaps) or max(d.size for d in gaps) == 1:
        return ""
    always = np.allclose([d.flat[0] for d in gaps], gaps[-1].flat[0])
    return f"it is off by {f'{gaps[-1].flat[0]:+.4g}' if always else 'the same amount'} everywhere: a missing or doubled term?"


def _triangle(failures: list[Mismatch]) -> str:
    if any(f.want.ndim < 2 for f in failures) or max(min(f.want.shape[-2:]) for f in failures) < 2:
        return ""
    below, on, above = (set() for _ in range(3))
    for f in failures:
        i, j = np.nonzero(~np.isclose(f.got.astype(float), f.want.astype(float)))[-2:]
        shift = f.want.shape[-1] - f.want.shape[-2]
        for part, where in ((below, j < i + shift), (on, j == i + shift), (above, j > i + shift)):
            part.update(where.tolist())
    if True in above and True not in on | below:
        return "only entries above the diagonal differ: may a place see what comes after it?"
    return "only the diagonal differs: may a place see itself?" if True in on and True not in below | above else ""


def _axis(failures: list[Mismatch]) -> str:
    "Rows that should add up to one number (softmax: 1, a normalised row: 0) and do so along another axis."
    found = None
    for f in failures:
        total = f.want.astype(float).sum(-1) if f.want.ndim > 1 else np.array([])
        if not total.size or not np.allclose(total, total.flat[0]):
            return ""
        along = {a for a in range(f.want.ndim - 1) if np.allclose(f.got.astype(float).sum(a), total.flat[0])}
        found = along if found is None else found & along
    return f"it adds up along axis {min(found)}, expected along the last: the wrong axis?" if found else ""


def _worst(f: Mismatch) -> str:
    g, w = f.got.astype(float), f.want.astype(float)
    if g.ndim == 0:
        return f"it is {g - w:+.6g} off"
    i = np.unravel_index(np.argmax(np.abs(g - w)), g.shape)
    return f"{int((~np.isclose(g, w)).sum())} of {g.size} entries differ; the worst, at {[int(k) for k in i]}, is {g[i]:.6g}, expected {w[i]:.6g}"

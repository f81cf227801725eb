"""Scores of names that were written for examples, and the 95 % intervals of their means.

    exact_match, token_f1       one score per example
    wilson_interval             of a share, such as a mean exact match
    bootstrap_interval          of a mean, such as a mean token F1
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import checks
from .batches import read_array


def name_words(name: str) -> list[str]:
    """The words of a name, at underscores and spaces: get_archive_files -> ["get", "archive", "files"]."""
    checks.instance("name_words: name", name, str, "a string")
    return name.lower().replace("_", " ").split()


def exact_match(names: Sequence[str], predicted: Sequence[str]) -> np.ndarray:
    """1 where a predicted name has the words of the true name in their order, else 0: (N,) float64."""
    names, predicted = _check_names("exact_match", names, predicted)
    return np.array([name_words(a) == name_words(b) for a, b in zip(names, predicted)], np.float64)


def token_f1(names: Sequence[str], predicted: Sequence[str]) -> np.ndarray:
    """F1 = 2 · common / (words of the name + words of the prediction), for each of N names: (N,) float64.

    The words of a name stand between underscores or spaces. A word counts as often as it occurs; the order does not
    matter.
    """
    names, predicted = _check_names("token_f1", names, predicted)
    scores = []
    for name, other in zip(names, predicted):
        words, others = Counter(name_words(name)), Counter(name_words(other))
        total = words.total() + others.total()
        scores.append(2 * (words & others).total() / total if total else 0.0)
    return np.array(scores, np.float64)


def _check_names(score: str, names: Any, predicted: Any) -> tuple[list[str], list[str]]:
    """Both as lists. TypeError for other kinds; ValueError unless both have the same length, at least 1."""
    for argument, value in (("names", names), ("predicted", predicted)):
        checks.instance(f"{score}: {argument}", value, (list, tuple), "a list of names")
        for name in value:
            checks.instance(f"{score}: each of the {argument}", name, str, "a string")
    if len(names) != len(predicted) or not names:
        raise ValueError(
            f"{score} wants as many predictions as names and at least one, got {len(predicted)} and {len(names)}"
        )
    return list(names), list(predicted)


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share p = successes / n, at 95 % for z = 1.96.  Wilson, 1927.

        (p + z²/2n ± z √(p (1 − p)/n + z²/4n²)) / (1 + z²/n)

    Unlike p ± z √(p (1 − p)/n) it is no point where p is 0 or 1. ValueError unless 0 <= successes <= n and n >= 1.
    """
    n = checks.whole("wilson_interval: n", n, 1)
    successes = checks.whole("wilson_interval: successes", successes, 0, n)
    z = checks.number("wilson_interval: z", z, above=0)
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = max((centre - half) / scale, 0.0)
    return float(low), float(min((centre + half) / scale, 1.0))


def bootstrap_interval(values: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of values (N,): the 2.5th and 97.5th percentile of the means of `draws` samples.

    A sample draws N values with replacement.  Efron, 1979. For paired differences, give the differences.
    ValueError without a value, or if a value is not finite.
    """
    values = read_array("bootstrap_interval: values", values)
    draws = checks.whole("bootstrap_interval: draws", draws, 1, 100_000)
    seed = checks.whole("bootstrap_interval: seed", seed, 0)
    if values.ndim != 1 or not len(values) or values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise ValueError(f"bootstrap_interval wants finite numbers (N,), at least one, got {checks.brief(values)}")
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)

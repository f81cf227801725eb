"""WordChoice: the regression, the features that leave a pair out, and the choice of the words."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from helpers import host_only
from hypothesis import given
from hypothesis import strategies as st

from tinyft import data
from tinyft.data import Pairs, word_choice
from tinyft.data.name_baselines import simple_names, summary_words
from tinyft.data.scores import name_words, token_f1
from tinyft.data.word_choice import Counts, WordChoice, best_words, logistic_regression, simple_forms, word_features

pytestmark = host_only

SUMMARIES = ("Return the list of archive files.", "Close the file.", "Return the file of a parsed text.", "Close it.",
             "Parse the text files.", "The text of the archive.")
NAMES = ("get_archive_files", "close", "get_parsed_file", "close", "parse_text_files", "archive_text")
PAIRS = Pairs(SUMMARIES, NAMES)


# ---------------------------------------------------------------------------------------------------- the regression
def check_regression(solve: Callable) -> None:
    """At the minimum the gradient Σ (p − y) x + λ w is zero; a larger λ gives smaller weights."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((400, 5)) * [1, 1, 1, 3, 1]
    y = (rng.random(400) < 1 / (1 + np.exp(-X @ [1.0, -2, 0, 0.5, 3]))).astype(float)
    found = [solve(X, y, ridge) for ridge in (0.1, 1.0, 10.0)]
    for ridge, w in zip((0.1, 1.0, 10.0), found):
        gradient = X.T @ (1 / (1 + np.exp(-X @ w)) - y) + ridge * w
        assert np.abs(gradient).max() < 1e-8
    norms = [np.linalg.norm(w) for w in found]
    assert norms == sorted(norms, reverse=True)


def one_step(X: np.ndarray, y: np.ndarray, ridge: float) -> np.ndarray:
    return logistic_regression(X, y, ridge, steps=1)


def without_ridge(X: np.ndarray, y: np.ndarray, ridge: float) -> np.ndarray:
    return logistic_regression(X, y, 1e-9)


def least_squares(X: np.ndarray, y: np.ndarray, ridge: float) -> np.ndarray:
    return np.linalg.solve(X.T @ X + ridge * np.eye(X.shape[1]), X.T @ y)


def test_the_weights_are_at_the_minimum():
    check_regression(logistic_regression)
    for wrong in (one_step, without_ridge, least_squares):
        with pytest.raises(AssertionError):
            check_regression(wrong)


# ---------------------------------------------------------------------------------------------------- the features
def parts(pairs: Pairs) -> tuple[list[list[str]], list[set[str]]]:
    return [summary_words(s) for s in pairs.prompts], [set(name_words(n)) for n in pairs.responses]


def check_left_out(features: Callable) -> None:
    """The features of a training pair are those that the other pairs alone would give."""
    summaries, names = parts(PAIRS)
    model = WordChoice(3).fit(PAIRS)
    for i, (words, name) in enumerate(zip(summaries, names)):
        candidates = model.candidates(words)
        others = Counts(summaries[:i] + summaries[i + 1:], names[:i] + names[i + 1:])
        expected = word_features(others, words, candidates)
        np.testing.assert_allclose(features(model.counts, words, candidates, name), expected, atol=1e-12)


def test_a_training_pair_is_left_out_of_its_own_counts():
    check_left_out(word_features)


def nothing_left_out(counts: Counts, words: list, candidates: list, name: set) -> np.ndarray:
    return word_features(counts, words, candidates)


def summary_left_out(counts: Counts, words: list, candidates: list, name: set) -> np.ndarray:
    """The pair's name stays in the counts."""
    return word_features(counts, words, candidates, set())


@pytest.mark.parametrize("wrong", [nothing_left_out, summary_left_out])
def test_counts_that_contain_the_answer_are_caught(wrong):
    with pytest.raises(AssertionError):
        check_left_out(wrong)


def test_counts_are_numbers_of_pairs():
    counts = Counts(*parts(PAIRS))
    [the, file, unknown] = counts.rows(["the", "file", "planet"])
    [close, get] = counts.columns(["close", "get"])
    assert counts.in_summaries[the] == 5 and counts.in_names[close] == counts.in_names[get] == 2
    assert counts.copied[file] == 1 and counts.together[file, close] == 1 and counts.first_together[file, close] == 0
    assert counts.in_summaries[unknown] == 0 and not counts.together[unknown].any()


# ---------------------------------------------------------------------------------------------------- the choice
def check_best(choose: Callable, p: dict[str, float]) -> None:
    """No other number of the likeliest words has a higher expected F1, 2 Σ p_i / (k + Σ p)."""
    order = sorted(p.values(), reverse=True)
    chosen = choose(p)
    assert sorted((p[word] for word in chosen), reverse=True) == order[: len(chosen)]

    def f1(k: int) -> float:
        return 2 * sum(order[:k]) / (k + sum(order))

    assert f1(len(chosen)) >= max(f1(k) for k in range(1, min(len(order), word_choice.LONGEST) + 1)) - 1e-12


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=9))
def test_the_number_of_words_is_the_best_for_f1(values):
    check_best(best_words, {f"w{i}": value for i, value in enumerate(values)})


def by_probability(p: dict[str, float]) -> list[str]:
    return sorted(p, key=p.__getitem__, reverse=True)


def one_word(p: dict[str, float]) -> list[str]:
    return by_probability(p)[:1]


def likely_words(p: dict[str, float]) -> list[str]:
    return [word for word in by_probability(p) if p[word] > 0.5]


def unlikely_words(p: dict[str, float]) -> list[str]:
    return by_probability(p)[-2:]


@pytest.mark.parametrize("wrong", [one_word, likely_words, unlikely_words])
def test_a_wrong_number_of_words_is_caught(wrong):
    with pytest.raises((AssertionError, ZeroDivisionError)):
        for p in ({"a": 0.9, "b": 0.45, "c": 0.4}, {"a": 0.3, "b": 0.25, "c": 0.05}):
            check_best(wrong, p)


def test_forms_and_candidates():
    assert simple_forms("files") == ["fil", "file"] and simple_forms("parsed") == ["pars", "parse"]
    assert simple_forms("entries") == ["entry", "entri", "entrie"] and simple_forms("is") == []
    model = WordChoice(1).fit(PAIRS)
    candidates = model.candidates(["list", "texts"])
    assert [c.word for c in candidates] == ["list", "texts", "text", model.usual_words[0]]
    assert [(c.origin, c.is_form) for c in candidates] == [(0, False), (1, False), (1, True), (-1, False)]


def test_names_of_odd_summaries():
    model = WordChoice(2).fit(PAIRS)
    assert model.predict(["...", ""]) == ["", ""] and model.probabilities("!") == {}
    assert all(0 < p < 1 for p in model.probabilities("Quite unknown things").values())
    assert model.predict(["Close the archive."]) == WordChoice(2).fit(PAIRS).predict(["Close the archive."])
    with pytest.raises(ValueError, match="a summary with words"):
        WordChoice().fit(Pairs(("...",), ("name",)))


def test_it_beats_copying_words():
    task = data.task("names")
    names = WordChoice().fit(task.train).predict(task.test.prompts)
    copied = simple_names(task.train, task.valid, task.test.prompts)["copy words"]
    chosen, simple = (token_f1(task.test.responses, found) for found in (names, copied))
    low, _ = data.scores.bootstrap_interval(chosen - simple)
    assert low > 0.02

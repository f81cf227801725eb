"""Sentence BLEU beside a second writing of its rule, its properties, and wrong ones that both must reject."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import wrong_answers

from tinyft import sentence_bleu

Bleu = Callable[[list, list], float]


def plain(hyp: list, ref: list, wrong: str = "") -> float:
    """The rule of the specification, from counts of all orders at once; `wrong` names a fault to commit."""
    logs, j = [], 0
    for n in range(1, 5):
        if wrong == "three orders" and n == 4:
            break
        h = Counter(tuple(hyp[i:i + n]) for i in range(len(hyp) - n + 1))
        r = Counter(tuple(ref[i:i + n]) for i in range(len(ref) - n + 1))
        total = max(0, len(hyp) - n + 1)
        if total == 0 and wrong != "every order counts":
            continue
        matches = sum(min(count, r[gram]) for gram, count in h.items())
        if wrong == "unclipped":
            matches = sum(count for gram, count in h.items() if gram in r)
        if wrong == "recall":
            total = max(0, len(ref) - n + 1)
        if n == 1 and matches == 0 and wrong != "smoothed to 50":
            return 0.0
        if matches == 0 and wrong == "unsmoothed":
            return 0.0
        if matches == 0:
            j = n if wrong == "j is the order" else j + 1
            factor = 2 if wrong == "always 2" else 2**j
            factor = 1 if wrong == "add one" else factor
            logs.append(math.log(1 / (factor * max(total, 1))))
        else:
            logs.append(math.log(matches / max(total, matches)))
    if not logs:
        return 0.0
    lengths = len(ref) / len(hyp)
    if wrong == "brevity upside down":
        lengths = 1 / max(lengths, 1e-9)
    bp = 1.0 if wrong == "without brevity" else min(1.0, math.exp(1 - lengths))
    if wrong == "arithmetic mean":
        return bp * sum(map(math.exp, logs)) / len(logs)
    orders = 4 if wrong == "exponent 1/4" else len(logs)
    return bp * math.exp(sum(logs) / orders)


def wrong_bleu(name: str) -> Bleu:
    def bleu(hyp: list, ref: list) -> float:
        return plain(hyp, ref, wrong=name)
    return bleu


def draw(seed: int) -> tuple[list[int], list[int], np.random.Generator]:
    """Two sentences over few tokens, so that n-grams repeat; many of the second are the first with an edit."""
    rng = np.random.default_rng(seed)
    V = int(rng.integers(1, 7))
    hyp = rng.integers(0, V, int(rng.integers(1, 10))).tolist()
    ref = rng.integers(0, V, int(rng.integers(1, 10))).tolist()
    if rng.random() < 0.4:
        ref = hyp.copy()
        ref[int(rng.integers(len(ref)))] = int(rng.integers(0, V + 1))
    return hyp, ref, rng


# ── properties ───────────────────────────────────────────────────────────────────────────────────────────────────────
def check_rule(bleu: Bleu) -> None:
    for seed in range(400):
        hyp, ref, _ = draw(seed)
        assert bleu(hyp, ref) == pytest.approx(plain(hyp, ref), rel=1e-13)


def check_worked(bleu: Bleu) -> None:
    """By hand: BP 1, p = 5/6, 3/5, 1/4, and 1/(2 · 3) for the order without a match; and short ones."""
    hyp, ref = "the cat is on the mat".split(), "the cat sat on the mat".split()
    assert bleu(hyp, ref) == pytest.approx((5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25, rel=1e-13)
    assert bleu([1, 2, 9, 9, 9], [1, 2, 3, 4]) == pytest.approx((2 / 5 * 1 / 4 / (2 * 3) / (4 * 2)) ** 0.25, rel=1e-13)
    assert bleu([1, 1, 1], [1, 2]) == pytest.approx((1 / 3 / (2 * 2) / (4 * 1)) ** (1 / 3), rel=1e-13)
    assert bleu([1], [1, 2, 3]) == pytest.approx(math.exp(-2), rel=1e-13)
    assert bleu(["yes"], ["no"]) == 0


def check_one(bleu: Bleu) -> None:
    """1 for the reference itself, and less for others of up to nine tokens; what a token is called does not count."""
    for seed in range(200):
        hyp, ref, rng = draw(seed)
        value = bleu(hyp, ref)
        assert 0 <= value <= 1
        assert bleu(ref, ref) == 1
        if hyp != ref:
            assert value < 1
        names = rng.permutation(100).tolist()
        assert bleu([names[token] for token in hyp], [names[token] for token in ref]) == value
        assert bleu([f"w{token}" for token in hyp], [f"w{token}" for token in ref]) == value
        assert bleu([token + 50 for token in hyp], ref) == 0


CHECKS = [check_rule, check_worked, check_one]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_sentence_bleu(check):
    check(sentence_bleu)


WRONG = {
    "Without smoothing, one empty order makes it 0.": "unsmoothed",
    "Smoothing lifts two sentences without a common word, too.": "smoothed to 50",
    "Every empty order is halved once.": "always 2",
    "An empty order counts as one match.": "add one",
    "The exponent of the smoothing is the order.": "j is the order",
    "A repeated word counts each time.": "unclipped",
    "The precision is over the reference's n-grams.": "recall",
    "A short sentence has all four orders.": "every order counts",
    "The mean is over four orders, whatever their number.": "exponent 1/4",
    "Trigrams are the longest n-grams.": "three orders",
    "A precision pays for brevity by itself.": "without brevity",
    "A long hypothesis pays for its length.": "brevity upside down",
    "The orders have an arithmetic mean.": "arithmetic mean",
}


@wrong_answers
@pytest.mark.parametrize("belief", WRONG)
def test_a_wrong_bleu_is_caught(belief):
    caught = []
    for check in CHECKS:
        try:
            check(wrong_bleu(WRONG[belief]))
        except (AssertionError, ArithmeticError, ValueError):
            caught.append(check.__name__)
    assert "check_rule" in caught and len(caught) > 1


@wrong_answers
def test_each_property_rejects_something():
    for check, fault in ((check_rule, "always 2"), (check_worked, "smoothed to 50"), (check_one, "unclipped")):
        with pytest.raises(AssertionError):
            check(wrong_bleu(fault))


def test_sequences_of_any_kind():
    assert sentence_bleu(np.array([1, 2, 3]), (1, 2, 3)) == 1
    assert sentence_bleu([], [1]) == sentence_bleu([1], []) == sentence_bleu([], []) == 0


@pytest.mark.parametrize("hypothesis", ["a text", 3, None, [[1], [2]], np.ones((2, 2), int), {"a": 1}])
def test_anything_else_is_refused(hypothesis: Any):
    with pytest.raises(TypeError, match="sentence_bleu: hypothesis wants a list of token ids or of words, got"):
        sentence_bleu(hypothesis, [1, 2])

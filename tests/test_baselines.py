"""The simple models: small known cases, gradients against differences, probabilities that sum to one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from helpers import host_only

from tinyft.data.baselines import (
    LogisticRegression,
    Sparse,
    TfIdf,
    accuracy,
    bigram_mlm_accuracy,
    bigram_perplexity,
    lbfgs,
    macro_f1,
    majority,
    simple,
    unigram_mlm_accuracy,
    unigram_perplexity,
)

pytestmark = host_only


def sparse(X: np.ndarray) -> Sparse:
    rows, columns = np.nonzero(X)
    return Sparse(rows, columns, X[rows, columns], X.shape)


def test_accuracy_and_macro_f1_by_hand():
    labels, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]
    assert accuracy(labels, predicted) == 4 / 6
    # 2 TP / (2 TP + FP + FN) of the classes 0, 1, 2
    assert macro_f1(labels, predicted) == pytest.approx((4 / 5 + 2 / 4 + 2 / 3) / 3)
    assert macro_f1([0, 0, 0, 1], [0, 0, 0, 0]) == pytest.approx((6 / 7 + 0) / 2)  # a class never predicted counts 0
    assert macro_f1([1, 2], [1, 2]) == 1.0


@pytest.mark.parametrize("lists", [([0, 1], [0]), ([], [])])
def test_scores_refuse_lists_that_do_not_match(lists):
    for score in (accuracy, macro_f1):
        with pytest.raises(ValueError, match="wants .* got"):
            score(*lists)


X = sparse(np.ones((2, 3)))
TOKENS = np.arange(5)


@pytest.mark.parametrize("call, message", [
    (lambda: majority(np.array([]), 3), "labels"),
    (lambda: majority([0.5], 3), "labels"),
    (lambda: majority([-1], 3), "labels"),
    (lambda: majority([1], "3"), "count"),
    (lambda: TfIdf(least=0), "least"),
    (lambda: TfIdf().fit([]), "at least one text"),
    (lambda: TfIdf().fit("a text"), "a sequence"),
    (lambda: TfIdf().fit(["a", None]), "a string, got None"),
    (lambda: LogisticRegression(0), "classes"),
    (lambda: LogisticRegression(2, C=0), "C wants a finite number > 0, got 0"),
    (lambda: LogisticRegression(2).fit(X, [0, 2]), "from 0 to 1"),
    (lambda: LogisticRegression(2).fit(X, [0]), "wants 2 labels"),
    (lambda: LogisticRegression(2).fit(X, [0.0, 1.0]), "whole numbers"),
    (lambda: unigram_perplexity(TOKENS, TOKENS, 4), "below the vocab of 4, got 4"),
    (lambda: unigram_perplexity([], TOKENS, 5), "at least 1 tokens, got 0"),
    (lambda: bigram_perplexity(TOKENS, TOKENS, TOKENS[:1], 5), "at least 2 tokens, got 1"),
    (lambda: bigram_perplexity(TOKENS, TOKENS * 1.0, TOKENS, 5), "whole numbers"),
    (lambda: bigram_perplexity("some text", TOKENS, TOKENS, 5), "whole numbers"),
    (lambda: bigram_mlm_accuracy(TOKENS, TOKENS, 5.0), "vocab wants a whole number .*, got 5.0"),
])
def test_wrong_arguments_get_one_sentence(call, message):
    with pytest.raises((TypeError, ValueError), match=message) as error:
        call()
    assert " wants " in str(error.value) and " got " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_tokens_of_any_integer_dtype(dtype):
    """Pairs of ids are counted without overflow: 200 · 250 does not fit into 8 bits."""
    tokens = np.random.default_rng(0).integers(0, 250, 2000)
    train, valid, test = np.split(tokens, [1200, 1600])
    narrow = [part.astype(dtype) for part in (train, valid, test)]
    assert bigram_perplexity(*narrow, 250) == bigram_perplexity(train, valid, test, 250)
    assert bigram_mlm_accuracy(narrow[0], narrow[2], 250) == bigram_mlm_accuracy(train, test, 250)


def test_a_large_vocabulary_takes_no_table_of_pairs():
    """GPT-2's would take 20 GB. Unseen tokens change the smoothed probabilities, not the counts of pairs."""
    cycle = np.tile(np.arange(5), 100)
    assert bigram_perplexity(cycle, cycle, cycle, 50_257) < 1.1


def test_majority():
    assert majority(np.array([2, 1, 1, 2, 2]), 3).tolist() == [2, 2, 2]


def test_sparse_products_are_the_dense_ones():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(6, 5)) * (rng.random((6, 5)) < 0.4)
    X[2] = 0  # a row and a column of zeros
    X[:, 3] = 0
    W, G = rng.normal(size=(5, 3)), rng.normal(size=(6, 3))
    np.testing.assert_allclose(sparse(X).dot(W), X @ W, atol=1e-12)
    np.testing.assert_allclose(sparse(X).transposed_dot(G), X.T @ G, atol=1e-12)


def test_tfidf_by_hand():
    texts = ["red red cat", "red dog", "red dog", "blue"]
    features = TfIdf().fit(texts)
    assert list(features.columns) == ["dog", "red", "red dog"]  # "cat", "blue", "red cat" occur in one text only
    X = features.transform([*texts, "unknown words"])
    idf = {"dog": 1 + np.log(5 / 3), "red": 1 + np.log(5 / 4)}
    dense = np.zeros(X.shape)
    dense[X.rows, X.columns] = X.values
    assert dense[0].tolist() == [0, 1, 0]
    raw = np.array([idf["dog"], idf["red"], idf["dog"]])
    np.testing.assert_allclose(dense[1], raw / np.linalg.norm(raw))
    assert not dense[3:].any()
    both = TfIdf().fit(["aa bb", "aa bb"]).transform(["aa aa aa bb"])  # aa 3 times, bb once, the pair once
    np.testing.assert_allclose(both.values[0] / both.values[1], 1 + np.log(3))


def test_the_loss_and_its_gradient_agree():
    """A central difference along a random direction; a gradient that penalises the bias is rejected."""
    rng = np.random.default_rng(0)
    X = sparse(rng.normal(size=(8, 4)))
    labels = rng.integers(0, 3, 8)
    model = LogisticRegression(3, C=0.7)
    theta = rng.normal(size=15)
    direction = rng.normal(size=15)
    _, gradient = model.loss(theta, X, labels)
    ahead, behind = (model.loss(theta + h * direction, X, labels)[0] for h in (1e-5, -1e-5))
    assert (ahead - behind) / 2e-5 == pytest.approx(gradient @ direction, rel=1e-7)
    wrong = gradient.copy()
    wrong[-3:] += theta[-3:] / (0.7 * 8)
    assert (ahead - behind) / 2e-5 != pytest.approx(wrong @ direction, rel=1e-7)


def test_lbfgs_finds_a_minimum_that_is_known():
    rng = np.random.default_rng(0)
    A = rng.normal(size=(20, 20))
    H, b = A @ A.T + np.eye(20), rng.normal(size=20)
    x = lbfgs(lambda x: (x @ H @ x / 2 - b @ x, H @ x - b), np.zeros(20), 500, tolerance=1e-9)
    np.testing.assert_allclose(x, np.linalg.solve(H, b), rtol=1e-4, atol=1e-6)


def test_logistic_regression_reaches_the_minimum_and_separates():
    rng = np.random.default_rng(0)
    centres = np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 4.0]])
    labels = np.arange(60) % 3
    X = sparse(centres[labels] + 0.3 * rng.normal(size=(60, 2)))
    model = LogisticRegression(3).fit(X, labels)
    assert accuracy(labels, model.predict(X)) == 1.0
    theta = np.concatenate([model.W, model.b]).ravel()
    _, gradient = model.loss(theta, X, labels)
    assert np.abs(gradient).max() < 1e-5
    noise = rng.permutation(labels)
    assert accuracy(noise, LogisticRegression(3).fit(X, noise).predict(X)) < 0.6  # random labels cannot be learned


def test_simple_on_texts():
    texts = ("the red cat sleeps", "a red cat runs", "my red cat eats")
    texts += ("the blue dog sleeps", "a blue dog runs", "my blue dog eats", "a blue dog")
    examples = SimpleNamespace(texts=texts, labels=np.array([0, 0, 0, 1, 1, 1, 1]))
    held_out = SimpleNamespace(texts=("one red cat", "one blue dog"), labels=np.array([0, 1]))
    found = simple(examples, held_out, held_out, 2)
    assert found["tfidf"].tolist() == [0, 1] and found["majority"].tolist() == [1, 1]


def test_words_in_another_order_look_alike_to_a_bag_of_words():
    """Two orders of the same words give the same features of single words, so *intact* is hard for simple models."""
    features = TfIdf(least=1)
    features.terms = lambda text: text.split()
    X = features.fit(["list a of names"]).transform(["a list of names", "names of list a"])
    dense = np.zeros(X.shape)
    dense[X.rows, X.columns] = X.values
    assert np.array_equal(dense[0], dense[1]) and np.count_nonzero(dense[0]) == 4


def test_language_models_are_distributions():
    """The probabilities of all next tokens of one context sum to 1."""
    V = 5
    rng = np.random.default_rng(0)
    train, valid = rng.integers(0, V, 200), rng.integers(0, V, 50)
    singles = [1 / unigram_perplexity(train, np.array([token]), V) for token in range(V)]
    assert sum(singles) == pytest.approx(1)
    for context in range(V):
        pairs = [1 / bigram_perplexity(train, valid, np.array([context, token]), V) for token in range(V)]
        assert sum(pairs) == pytest.approx(1)
    short = np.array([0, 0, 1])  # token 4 was never seen
    assert unigram_perplexity(short, np.array([4]), V) == pytest.approx(8)  # (0 + 1) / (3 + 5)


def test_bigrams_find_order_where_unigrams_cannot():
    cycle = np.tile(np.arange(5), 100)
    assert unigram_perplexity(cycle, cycle, 5) == pytest.approx(5, rel=1e-3)
    assert bigram_perplexity(cycle, cycle, cycle, 5) < 1.1
    assert unigram_mlm_accuracy(cycle, cycle) == pytest.approx(0.2)
    assert bigram_mlm_accuracy(cycle, cycle, 5) == 1.0
    noise = np.random.default_rng(0).integers(0, 5, 5000)
    assert bigram_perplexity(noise[:2000], noise[2000:3000], noise[3000:], 5) == pytest.approx(5, rel=0.02)
    assert bigram_mlm_accuracy(noise[:2000], noise[3000:], 5) < 0.25

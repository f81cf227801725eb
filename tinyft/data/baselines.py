"""Simple models every table is measured against: a method is worth its cost only beside them.  NumPy only.

    classification     majority,  TfIdf + LogisticRegression (`simple` runs both),  accuracy, macro_f1
    language models    unigram_perplexity, bigram_perplexity,  unigram_mlm_accuracy, bigram_mlm_accuracy
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


def accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Share of predictions (N,) that equal the labels (N,). Raises ValueError for other shapes or no labels."""
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    if labels.shape != predicted.shape or labels.size == 0:
        raise ValueError(f"wanted as many predictions as labels and at least one, got {predicted.shape} and {labels.shape}")
    return float(np.mean(labels == predicted))


def macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean of F1 = 2 TP / (2 TP + FP + FN) over the classes that occur in labels or predictions: rare classes count as much as others."""
    accuracy(labels, predicted)                                        # the same demands on the shapes
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    hits = [(2 * np.sum((labels == c) & (predicted == c)), np.sum(labels == c) + np.sum(predicted == c)) for c in {*labels, *predicted}]
    return float(np.mean([hit / total for hit, total in hits]))


def majority(train_labels: np.ndarray, count: int) -> np.ndarray:
    """The most frequent training label (the smallest of several), `count` times: (count,)."""
    return np.full(count, np.bincount(train_labels).argmax())


class Sparse(NamedTuple):
    """A matrix X (n, d) as its non-zero entries."""

    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    shape: tuple[int, int]

    def dot(self, W: np.ndarray) -> np.ndarray:                        # X W: (n, d) (d, K) -> (n, K)
        return np.stack([np.bincount(self.rows, self.values * w[self.columns], self.shape[0]) for w in W.T], 1)

    def transposed_dot(self, G: np.ndarray) -> np.ndarray:             # Xᵀ G: (d, n) (n, K) -> (d, K)
        return np.stack([np.bincount(self.columns, self.values * g[self.rows], self.shape[1]) for g in G.T], 1)


class TfIdf:
    """Words and pairs of neighbouring words -> (1 + log count) (1 + log((1 + n) / (1 + texts with it))), rows of length 1.

    A term must be in at least `least` training texts; what is in one text only teaches little and takes most of the room.
    """

    def __init__(self, least: int = 2) -> None:
        self.least = least

    def fit(self, texts: Sequence[str]) -> TfIdf:
        counts = Counter(term for text in texts for term in set(self.terms(text)))
        kept = sorted(term for term, count in counts.items() if count >= self.least)
        self.columns = {term: i for i, term in enumerate(kept)}
        self.idf = 1 + np.log((1 + len(texts)) / (1 + np.array([counts[term] for term in kept], float)))
        return self

    def transform(self, texts: Sequence[str]) -> Sparse:
        """n texts -> (n, d). Terms that `fit` did not keep are left out."""
        entries: tuple[list[int], list[int], list[int]] = ([], [], [])
        for row, text in enumerate(texts):
            counts = Counter(self.columns[term] for term in self.terms(text) if term in self.columns)
            for part, more in zip(entries, ([row] * len(counts), counts.keys(), counts.values()), strict=True):
                part.extend(more)
        rows, columns, count = (np.array(part, int) for part in entries)
        values = (1 + np.log(count)) * self.idf[columns]
        lengths = np.sqrt(np.bincount(rows, values**2, len(texts)))
        return Sparse(rows, columns, values / lengths[rows], (len(texts), len(self.columns)))

    @staticmethod
    def terms(text: str) -> list[str]:
        words = re.findall(r"\w\w+", text.lower())
        return words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]


class LogisticRegression:
    """p(k | x) = softmax(x W + b)_k, by L-BFGS on the mean cross-entropy + |W|² / (2 C n); b is not penalised. C as in scikit-learn."""

    def __init__(self, classes: int, C: float = 10.0) -> None:
        self.classes, self.C = classes, C

    def loss(self, theta: np.ndarray, X: Sparse, labels: np.ndarray) -> tuple[float, np.ndarray]:
        """Loss and gradient at theta = [W; b] flattened, ((d + 1) K,)."""
        W, b = np.split(theta.reshape(-1, self.classes), [-1])
        n, z = X.shape[0], X.dot(W) + b                                # (n, K)
        log_p = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
        error = (np.exp(log_p) - np.eye(self.classes)[labels]) / n     # d loss / d z
        value = -log_p[np.arange(n), labels].mean() + (W**2).sum() / (2 * self.C * n)
        return value, np.concatenate([X.transposed_dot(error) + W / (self.C * n), error.sum(0, keepdims=True)]).ravel()

    def fit(self, X: Sparse, labels: np.ndarray, steps: int = 100) -> LogisticRegression:
        theta = lbfgs(lambda theta: self.loss(theta, X, labels), np.zeros((X.shape[1] + 1) * self.classes), steps)
        self.W, self.b = np.split(theta.reshape(-1, self.classes), [-1])
        return self

    def predict(self, X: Sparse) -> np.ndarray:                        # the most probable class of each row: (n,)
        return (X.dot(self.W) + self.b).argmax(1)


def inner(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum())                                        # not a @ b: BLAS starts threads for it, slower where cores are busy


def lbfgs(f: Callable, x: np.ndarray, steps: int, memory: int = 6, tolerance: float = 1e-5) -> np.ndarray:
    """Minimise a smooth convex f: x -> (value, gradient).   Nocedal & Wright, Numerical Optimization, 2006, algorithm 7.4"""
    (value, gradient), pairs = f(x), []                                # pairs: (change of x, change of the gradient), oldest first
    for _ in range(steps):
        if np.abs(gradient).max() < tolerance:
            break
        direction, alphas = -gradient, []
        for s, y in reversed(pairs):
            alphas.append(inner(s, direction) / inner(s, y))
            direction = direction - alphas[-1] * y
        direction = direction * (inner(*pairs[-1]) / inner(pairs[-1][1], pairs[-1][1]) if pairs else 1)
        for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
            direction = direction + (alpha - inner(y, direction) / inner(s, y)) * s
        rate, slope = 1.0, inner(gradient, direction)
        while (new := f(x + rate * direction))[0] > value + 1e-4 * rate * slope and rate > 1e-10:
            rate /= 2
        s, y = rate * direction, new[1] - gradient
        pairs = ([*pairs, (s, y)] if inner(s, y) > 1e-12 else pairs)[-memory:]
        x, (value, gradient) = x + s, new
    return x


def simple(train, valid, test, classes: int) -> dict[str, np.ndarray]:
    """Test predictions of majority and tfidf. Splits have .texts and .labels; C is the best of 1, 10, 100 on the validation split."""
    features = TfIdf().fit(train.texts)
    X, X_valid, X_test = (features.transform(split.texts) for split in (train, valid, test))
    models = [LogisticRegression(classes, C).fit(X, train.labels) for C in (1.0, 10.0, 100.0)]
    best = max(models, key=lambda model: macro_f1(valid.labels, model.predict(X_valid)))
    return {"majority": majority(train.labels, len(test.labels)), "tfidf": best.predict(X_test)}


def _counts(tokens: np.ndarray, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """p(a) = (count(a) + 1) / (tokens + V), (V,), and the counts of neighbours ab, (V, V)."""
    pairs = np.bincount(tokens[:-1] * vocab + tokens[1:], minlength=vocab**2).reshape(vocab, vocab)
    return (np.bincount(tokens, minlength=vocab) + 1) / (len(tokens) + vocab), pairs


def unigram_perplexity(train: np.ndarray, test: np.ndarray, vocab: int) -> float:
    """exp of the mean -log p(token) over test tokens (N,), p as counted in train with one added to every token's count."""
    return float(np.exp(-np.log(_counts(train, vocab)[0][test]).mean()))


def bigram_perplexity(train: np.ndarray, valid: np.ndarray, test: np.ndarray, vocab: int) -> float:
    """p(b | a) = (count(ab) + m p(b)) / (count(a) + m) over test tokens but the first; m is the best of seven on the validation tokens."""
    unigram, pairs = _counts(train, vocab)
    before = pairs.sum(1)

    def cost(tokens: np.ndarray, m: float) -> float:
        a, b = tokens[:-1], tokens[1:]
        return -np.log((pairs[a, b] + m * unigram[b]) / (before[a] + m)).mean()

    m = min((1, 4, 16, 64, 256, 1024, 4096), key=lambda m: cost(valid, m))
    return float(np.exp(cost(test, m)))


def unigram_mlm_accuracy(train: np.ndarray, test: np.ndarray) -> float:
    """Accuracy on test tokens (N,) of always answering the most frequent training token."""
    return accuracy(test, majority(train, len(test)))


def bigram_mlm_accuracy(train: np.ndarray, test: np.ndarray, vocab: int, limit: int = 10_000) -> float:
    """Accuracy of argmax_b p(b | left) p(right | b), m = 16, on `limit` test tokens. Both neighbours are seen: kinder than masking 15 %."""
    unigram, pairs = _counts(train, vocab)
    log_p = np.log((pairs + 16 * unigram) / (pairs.sum(1, keepdims=True) + 16))            # (V, V): log p(b | a)
    log_into = np.ascontiguousarray(log_p.T)                                               # row c: log p(c | b) over b
    left, middle, right = test[:-2][:limit], test[1:-1][:limit], test[2:][:limit]
    return accuracy(middle, np.array([(log_p[a] + log_into[c]).argmax() for a, c in zip(left, right, strict=True)]))

"""Simple models every table is measured against: a method is worth its cost only beside them.  NumPy only.

    classification     majority,  TfIdf + LogisticRegression (`simple` runs both),  accuracy, macro_f1
    language models    unigram_perplexity, bigram_perplexity,  unigram_mlm_accuracy, bigram_mlm_accuracy
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Share of predictions (N,) that equal the labels (N,)."""
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    if labels.shape != predicted.shape or labels.size == 0:
        raise ValueError(f"wanted as many predictions as labels and at least one, got {predicted.shape} and {labels.shape}")
    return float(np.mean(labels == predicted))


def macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over classes of F1 = 2 TP / (2 TP + FP + FN): every class counts the same, however rare. Classes that neither list has are left out."""
    accuracy(labels, predicted)                                        # the same demands on the shapes
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    classes = np.union1d(labels, predicted)
    hits = [np.sum((labels == c) & (predicted == c)) for c in classes]
    sizes = [np.sum(labels == c) + np.sum(predicted == c) for c in classes]                # 2 TP + FP + FN
    return float(np.mean([2 * hit / size for hit, size in zip(hits, sizes, strict=True)]))


def majority(train_labels: np.ndarray, count: int) -> np.ndarray:
    """The most frequent training label, the smallest of several, `count` times: (count,)."""
    return np.full(count, np.bincount(train_labels).argmax())


class Sparse(NamedTuple):
    """A matrix (n, d) as its non-zero entries; the two products below are all that is needed of one."""

    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    shape: tuple[int, int]

    def dot(self, W: np.ndarray) -> np.ndarray:
        """X W:  (n, d) (d, K) -> (n, K)"""
        return np.stack([np.bincount(self.rows, self.values * w[self.columns], self.shape[0]) for w in W.T], 1)

    def transposed_dot(self, G: np.ndarray) -> np.ndarray:
        """X^T G:  (d, n) (n, K) -> (d, K)"""
        return np.stack([np.bincount(self.columns, self.values * g[self.rows], self.shape[1]) for g in G.T], 1)


class TfIdf:
    """Words and pairs of neighbouring words -> (1 + log count) (1 + log((1 + n) / (1 + documents with it))), each row of length 1."""

    def fit(self, texts: Sequence[str]) -> TfIdf:
        found = Counter(term for text in texts for term in set(self.terms(text)))
        self.columns = {term: i for i, term in enumerate(sorted(found))}
        self.idf = 1 + np.log((1 + len(texts)) / (1 + np.array([found[term] for term in self.columns], float)))
        return self

    def transform(self, texts: Sequence[str]) -> Sparse:
        """Texts (n) -> (n, d). Terms that `fit` did not see are left out."""
        entries = [(i, self.columns[t], c) for i, text in enumerate(texts) for t, c in Counter(self.terms(text)).items() if t in self.columns]
        rows, columns, counts = np.array(entries, int).reshape(-1, 3).T
        values = (1 + np.log(counts)) * self.idf[columns]
        lengths = np.sqrt(np.bincount(rows, values**2, len(texts)))
        return Sparse(rows, columns, values / lengths[rows], (len(texts), len(self.columns)))

    @staticmethod
    def terms(text: str) -> list[str]:
        words = re.findall(r"\w\w+", text.lower())
        return words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]


class LogisticRegression:
    """p(k | x) = softmax(x W + b)_k, fitted by L-BFGS to the mean cross-entropy + |W|^2 / (2 C n); b is not penalised. C as in scikit-learn."""

    def __init__(self, classes: int, C: float = 10.0) -> None:
        self.classes, self.C = classes, C

    def loss(self, theta: np.ndarray, X: Sparse, labels: np.ndarray) -> tuple[float, np.ndarray]:
        """Loss and gradient at theta = [W; b] flattened, ((d + 1) K,)."""
        n = X.shape[0]
        theta = theta.reshape(-1, self.classes)
        W, b = theta[:-1], theta[-1]
        z = X.dot(W) + b                                               # (n, K)
        z -= z.max(1, keepdims=True)
        log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
        error = (np.exp(log_p) - np.eye(self.classes)[labels]) / n     # d loss / d z
        value = -log_p[np.arange(n), labels].mean() + (W**2).sum() / (2 * self.C * n)
        return value, np.concatenate([X.transposed_dot(error) + W / (self.C * n), error.sum(0, keepdims=True)]).ravel()

    def fit(self, X: Sparse, labels: np.ndarray, steps: int = 200) -> LogisticRegression:
        theta = lbfgs(lambda theta: self.loss(theta, X, labels), np.zeros((X.shape[1] + 1) * self.classes), steps)
        self.W, self.b = np.split(theta.reshape(-1, self.classes), [-1])
        return self

    def predict(self, X: Sparse) -> np.ndarray:
        """The most probable class of each row: (n,)"""
        return (X.dot(self.W) + self.b).argmax(1)


def lbfgs(f, x: np.ndarray, steps: int, memory: int = 10, tolerance: float = 1e-6) -> np.ndarray:
    """Minimise a smooth convex f: x -> (value, gradient).   Nocedal & Wright, Numerical Optimization, 2006, algorithm 7.4"""
    value, gradient = f(x)
    pairs: list[tuple[np.ndarray, np.ndarray]] = []                    # (change of x, change of the gradient), oldest first
    for _ in range(steps):
        if np.abs(gradient).max() < tolerance:
            break
        direction, coefficients = -gradient, []
        for s, y in reversed(pairs):
            coefficients.append(s @ direction / (s @ y))
            direction = direction - coefficients[-1] * y
        if pairs:
            s, y = pairs[-1]
            direction = direction * (s @ y) / (y @ y)
        for (s, y), coefficient in zip(pairs, reversed(coefficients), strict=True):
            direction = direction + (coefficient - y @ direction / (s @ y)) * s
        rate = 1.0
        while (new := f(x + rate * direction))[0] > value + 1e-4 * rate * (gradient @ direction) and rate > 1e-10:
            rate /= 2
        s, y = rate * direction, new[1] - gradient
        pairs = ([*pairs, (s, y)] if s @ y > 1e-12 else pairs)[-memory:]
        x, (value, gradient) = x + s, new
    return x


def simple(train, valid, test, classes: int) -> dict[str, np.ndarray]:
    """Test predictions of the simple classifiers. Splits have .texts and .labels; C is the best of 1, 10, 100 on the validation split."""
    features = TfIdf().fit(train.texts)
    X, X_valid, X_test = (features.transform(split.texts) for split in (train, valid, test))
    models = [LogisticRegression(classes, C).fit(X, train.labels) for C in (1.0, 10.0, 100.0)]
    best = max(models, key=lambda model: macro_f1(valid.labels, model.predict(X_valid)))
    return {"majority": majority(train.labels, len(test.labels)), "tfidf": best.predict(X_test)}


def _unigram(train: np.ndarray, vocab: int) -> np.ndarray:
    return (np.bincount(train, minlength=vocab) + 1) / (len(train) + vocab)


def _pairs(tokens: np.ndarray, vocab: int) -> np.ndarray:
    return np.bincount(tokens[:-1] * vocab + tokens[1:], minlength=vocab**2).reshape(vocab, vocab)


def unigram_perplexity(train: np.ndarray, test: np.ndarray, vocab: int) -> float:
    """exp of the mean -log p(token) over test tokens (N,), p(a) = (count(a) + 1) / (tokens + V)."""
    return float(np.exp(-np.log(_unigram(train, vocab)[test]).mean()))


def bigram_perplexity(train: np.ndarray, valid: np.ndarray, test: np.ndarray, vocab: int) -> float:
    """p(b | a) = (count(ab) + m p(b)) / (count(a) + m) over test tokens but the first; m is the best of seven on the validation tokens."""
    unigram, pairs = _unigram(train, vocab), _pairs(train, vocab)
    before = pairs.sum(1)

    def cost(tokens: np.ndarray, m: float) -> float:
        a, b = tokens[:-1], tokens[1:]
        return -np.log((pairs[a, b] + m * unigram[b]) / (before[a] + m)).mean()

    m = min((1, 4, 16, 64, 256, 1024, 4096), key=lambda m: cost(valid, m))
    return float(np.exp(cost(test, m)))


def unigram_mlm_accuracy(train: np.ndarray, test: np.ndarray, vocab: int) -> float:
    """Accuracy on test tokens of always answering the most frequent training token."""
    return accuracy(test, majority(np.asarray(train), len(test)))


def bigram_mlm_accuracy(train: np.ndarray, test: np.ndarray, vocab: int, limit: int = 10_000) -> float:
    """Accuracy of argmax_b p(b | left) p(right | b) on the first `limit` inner test tokens. Both neighbours are seen: kinder than masking."""
    unigram, pairs = _unigram(train, vocab), _pairs(train, vocab)
    log_p = np.log((pairs + 16 * unigram) / (pairs.sum(1, keepdims=True) + 16))            # (V, V): log p(b | a)
    left, middle, right = test[:-2][:limit], test[1:-1][:limit], test[2:][:limit]
    into = np.ascontiguousarray(log_p.T)                                                   # rows again: log p(right | b) over b
    guesses = [(log_p[a] + into[c]).argmax() for a, c in zip(left, right, strict=True)]
    return accuracy(middle, np.array(guesses))

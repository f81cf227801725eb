"""Simple models beside which every table is read: a method is worth its cost only if it beats them.  NumPy only.

    classification     majority,  TfIdf + LogisticRegression (`simple` runs both),  accuracy, macro_f1
    language models    unigram_perplexity, bigram_perplexity,  unigram_mlm_accuracy, bigram_mlm_accuracy
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .. import checks
from .batches import LARGEST_ID, Examples, check_sequence, check_tokens, read_array, read_examples


def accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Share of predictions (N,) that equal the labels (N,). Raises ValueError for different shapes or no labels."""
    labels = read_array("a score: labels", labels)
    predicted = read_array("a score: predictions", predicted)
    if labels.shape != predicted.shape or labels.size == 0:
        raise ValueError(
            f"a score wants as many predictions as labels and at least one, got {predicted.shape} and {labels.shape}"
        )
    return float(np.mean(labels == predicted))


def macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean of F1 = 2 TP / (2 TP + FP + FN) over the classes that occur in labels or predictions.

    Rare classes count as much as frequent ones. Raises ValueError for different shapes or no labels.
    """
    accuracy(labels, predicted)  # raises if the shapes are wrong
    labels = np.asarray(labels)
    predicted = np.asarray(predicted)
    scores = []
    for c in {*labels, *predicted}:
        true_positives = np.sum((labels == c) & (predicted == c))
        total = np.sum(labels == c) + np.sum(predicted == c)  # 2 TP + FP + FN
        scores.append(2 * true_positives / total)
    return float(np.mean(scores))


def majority(train_labels: np.ndarray, count: int) -> np.ndarray:
    """The most frequent training label (the smallest at a tie), `count` times: (count,).

    Labels are (N,) whole numbers of at least 0; ValueError for no label.
    """
    labels = read_array("majority: labels", train_labels)
    if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in "iub" or labels.min() < 0:
        raise ValueError(f"majority wants labels (N,), whole numbers of at least 0, got {checks.brief(train_labels)}")
    return np.full(checks.whole("majority: count", count, 0, LARGEST_ID), np.bincount(labels).argmax())


# ---------------------------------------------------------------------------------------------------- classification
class Sparse(NamedTuple):
    """A matrix X (n, d) as its non-zero entries."""

    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    shape: tuple[int, int]

    def dot(self, W: np.ndarray) -> np.ndarray:
        """X W: (n, d) (d, K) -> (n, K)."""
        products = [np.bincount(self.rows, self.values * w[self.columns], self.shape[0]) for w in W.T]
        return np.stack(products, axis=1)

    def transposed_dot(self, G: np.ndarray) -> np.ndarray:
        """Xᵀ G: (d, n) (n, K) -> (d, K)."""
        products = [np.bincount(self.columns, self.values * g[self.rows], self.shape[1]) for g in G.T]
        return np.stack(products, axis=1)


def check_texts(name: str, texts: Sequence[str]) -> list[str]:
    """The texts as a list. TypeError for one that is no string, ValueError for none at all."""
    check_sequence(f"{name}: texts", texts)
    if not len(texts):
        raise ValueError(f"{name} wants at least one text, got none")
    return [checks.instance(f"{name}: a text", text, str, "a string") for text in texts]


class TfIdf:
    """(1 + log count) (1 + log((1 + n) / (1 + document frequency))) of words and word pairs; each row has norm 1.

    n is the number of training texts. A term (a word, or a pair of neighbouring words) must occur in at least `least`
    training texts: a term of a single text teaches little, and most terms are such.
    """

    def __init__(self, least: int = 2) -> None:
        self.least = checks.whole("TfIdf: least", least, 1)

    def fit(self, texts: Sequence[str]) -> TfIdf:
        """Choose the terms, and compute their inverse document frequencies 1 + log((1 + n) / (1 + frequency)).

        A term is a word or a pair of neighbouring words. n is the number of texts, frequency the number of texts that
        contain the term. A term is chosen if its frequency is at least `least`.
        """
        texts = check_texts("TfIdf.fit", texts)
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(set(self.terms(text)))
        vocabulary = sorted(term for term, count in counts.items() if count >= self.least)
        self.columns = {term: i for i, term in enumerate(vocabulary)}
        frequencies = np.array([counts[term] for term in vocabulary], float)
        self.idf = 1 + np.log((1 + len(texts)) / (1 + frequencies))
        return self

    def transform(self, texts: Sequence[str]) -> Sparse:
        """n texts -> (n, d): row i holds (1 + log count) idf of every term in text i, divided by the row's norm.

        d is the number of terms that `fit` chose. Other terms are left out.
        """
        texts = check_texts("TfIdf.transform", texts)
        rows: list[int] = []
        columns: list[int] = []
        counts: list[int] = []
        for row, text in enumerate(texts):
            in_text = Counter(self.columns[term] for term in self.terms(text) if term in self.columns)
            rows.extend([row] * len(in_text))
            columns.extend(in_text.keys())
            counts.extend(in_text.values())
        row_indices = np.array(rows, int)
        column_indices = np.array(columns, int)
        values = (1 + np.log(np.array(counts, int))) * self.idf[column_indices]
        norms = np.sqrt(np.bincount(row_indices, values**2, len(texts)))
        shape = (len(texts), len(self.columns))
        return Sparse(row_indices, column_indices, values / norms[row_indices], shape)

    @staticmethod
    def terms(text: str) -> list[str]:
        """The words of a text in lower case, then the pairs of neighbouring words."""
        words = re.findall(r"\w\w+", text.lower())
        pairs = [f"{first} {second}" for first, second in zip(words, words[1:], strict=False)]
        return words + pairs


class LogisticRegression:
    """p(k | x) = softmax(x W + b)_k,   fitted by L-BFGS on the mean cross-entropy + |W|² / (2 C n).

    W (d, K); b (K,) is not penalised. C is scikit-learn's inverse strength of the penalty.
    """

    def __init__(self, classes: int, C: float = 10.0) -> None:
        self.classes = checks.whole("LogisticRegression: classes", classes, 1, LARGEST_ID)
        self.C = checks.number("LogisticRegression: C", C, above=0)

    def loss(self, theta: np.ndarray, X: Sparse, labels: np.ndarray) -> tuple[float, np.ndarray]:
        """Mean cross-entropy + |W|² / (2 C n), and its gradient, at theta = [W; b] flattened, ((d + 1) K,).

        X (n, d); labels (n,) in 0 .. K − 1. C is the inverse strength of the penalty, as in scikit-learn.
        """
        W, b = self._split(theta)
        n = X.shape[0]
        z = X.dot(W) + b  # (n, K)
        log_p = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
        dz = (np.exp(log_p) - np.eye(self.classes)[labels]) / n
        loss = -log_p[np.arange(n), labels].mean() + (W**2).sum() / (2 * self.C * n)
        dW = X.transposed_dot(dz) + W / (self.C * n)
        db = dz.sum(0, keepdims=True)
        return loss, np.concatenate([dW, db]).ravel()

    def fit(self, X: Sparse, labels: np.ndarray, steps: int = 100) -> LogisticRegression:
        """Minimise the loss from zero. ValueError unless there is one label per row of X, each in 0 .. classes − 1."""
        checks.instance("LogisticRegression: X", X, Sparse, "features as TfIdf.transform gives them, a Sparse")
        checks.whole("LogisticRegression: steps", steps, 0)
        labels = read_array("LogisticRegression: labels", labels)
        is_whole = labels.dtype.kind in "iub"
        if labels.shape != X.shape[:1] or not is_whole or labels.min() < 0 or labels.max() >= self.classes:
            raise ValueError(f"LogisticRegression wants {X.shape[0]} labels, whole numbers from 0 to "
                             f"{self.classes - 1}, got {checks.brief(labels)}")
        start = np.zeros((X.shape[1] + 1) * self.classes)
        theta = lbfgs(lambda theta: self.loss(theta, X, labels), start, steps)
        self.W, self.b = self._split(theta)
        return self

    def predict(self, X: Sparse) -> np.ndarray:
        """The most probable class of each row: (n,)."""
        return (X.dot(self.W) + self.b).argmax(1)

    def _split(self, theta: np.ndarray) -> list[np.ndarray]:
        return np.split(theta.reshape(-1, self.classes), [-1])


def inner(a: np.ndarray, b: np.ndarray) -> float:
    """Σ a b. Not a @ b: BLAS would start threads for it, which is slower where the cores are busy."""
    return float((a * b).sum())


def lbfgs(f: Callable, x: np.ndarray, steps: int, memory: int = 6, tolerance: float = 1e-5) -> np.ndarray:
    """Minimise a smooth convex f: x -> (value, gradient).   Nocedal & Wright, Numerical Optimization, 2006, alg. 7.4

    Starts at x (n,) and returns the last x.

    memory      number of pairs (change of x, change of the gradient) that approximate the curvature
    tolerance   stop when no entry of the gradient is larger
    """
    value, gradient = f(x)
    pairs: list[tuple[np.ndarray, np.ndarray]] = []  # oldest first
    for _ in range(steps):
        if np.abs(gradient).max() < tolerance:
            break
        direction = _lbfgs_direction(gradient, pairs)
        slope = inner(gradient, direction)
        step_size = 1.0
        new_value, new_gradient = f(x + step_size * direction)
        # Armijo's condition: halve the step until the value falls by a small part, 1e-4, of what the slope promises.
        while new_value > value + 1e-4 * step_size * slope and step_size > 1e-10:
            step_size /= 2
            new_value, new_gradient = f(x + step_size * direction)
        s = step_size * direction
        y = new_gradient - gradient
        if inner(s, y) > 1e-12:  # positive curvature: keeps the approximation positive definite
            pairs.append((s, y))
        pairs = pairs[-memory:]
        x = x + s
        value, gradient = new_value, new_gradient
    return x


def _lbfgs_direction(gradient: np.ndarray, pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """-H⁻¹ gradient, with the inverse Hessian H⁻¹ approximated from the pairs by the two-loop recursion of L-BFGS.

    pairs   (s, y) = (change of x, change of the gradient) of the last steps, oldest first; without pairs H⁻¹ = 1
    """
    direction = -gradient
    alphas = []
    for s, y in reversed(pairs):
        alpha = inner(s, direction) / inner(s, y)
        alphas.append(alpha)
        direction = direction - alpha * y
    if pairs:  # between the loops: H⁻¹ ≈ (s·y / y·y) times the identity, from the latest pair
        s, y = pairs[-1]
        direction = direction * (inner(s, y) / inner(y, y))
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        beta = inner(y, direction) / inner(s, y)
        direction = direction + (alpha - beta) * s
    return direction


def simple(train: Examples, valid: Examples, test: Examples, classes: int) -> dict[str, np.ndarray]:
    """Test predictions of the majority class and of TF-IDF with logistic regression: {"majority", "tfidf": (N,)}.

    A fine-tuned model is worth its cost only if it beats both. classes: the number of classes. C, the inverse strength
    of the penalty, is the best of 1, 10, 100 on the validation split, by macro-F1.
    """
    train, valid, test = (read_examples("simple", examples) for examples in (train, valid, test))
    features = TfIdf().fit(train.texts)
    X, X_valid, X_test = (features.transform(split.texts) for split in (train, valid, test))
    models = [LogisticRegression(classes, C).fit(X, train.labels) for C in (1.0, 10.0, 100.0)]
    best = max(models, key=lambda model: macro_f1(valid.labels, model.predict(X_valid)))
    return {"majority": majority(train.labels, len(test.labels)), "tfidf": best.predict(X_test)}


# ---------------------------------------------------------------------------------------------------- language models
def _unigram_probabilities(tokens: np.ndarray, vocab: int) -> np.ndarray:
    """p(a) = (count(a) + 1) / (tokens + V), (V,)."""
    return (np.bincount(tokens, minlength=vocab) + 1) / (len(tokens) + vocab)


def _read_tokens(name: str, arrays: Sequence[np.ndarray], vocab: int, least: int) -> list[np.ndarray]:
    """Token arrays (N,), or windows of them (n, T), as int64, so that products of ids do not overflow.

    ValueError for an id outside the vocab, or an array of fewer than `least` tokens.
    """
    checks.whole(f"{name}: vocab", vocab, 1, LARGEST_ID + 1)
    read = []
    for tokens in arrays:
        tokens = read_array(f"{name}: tokens", tokens)
        flat = check_tokens(name, tokens if tokens.ndim == 0 else tokens.ravel()).astype(np.int64)
        if len(flat) < least:
            raise ValueError(f"{name} wants at least {least} tokens, got {len(flat)}")
        if flat.max() >= vocab:
            raise ValueError(f"{name} wants tokens below the vocab of {vocab}, got {flat.max()}")
        read.append(flat.reshape(tokens.shape))
    return read


class PairCounts:
    """Counts of neighbouring tokens a, b, as sparse as text: a table (V, V) of GPT-2's vocabulary would take 20 GB."""

    def __init__(self, tokens: np.ndarray, vocab: int) -> None:
        self.vocab = vocab
        self.keys, self.counts = np.unique(tokens[:-1] * vocab + tokens[1:], return_counts=True)

    def of(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The counts of the pairs of a and b, arrays of one shape; the result has it too."""
        wanted = a * self.vocab + b
        found = np.searchsorted(self.keys, wanted)
        found[found == len(self.keys)] = 0
        return np.where(self.keys[found] == wanted, self.counts[found], 0)


def _pair_counts(tokens: np.ndarray, vocab: int) -> np.ndarray:
    """Counts of neighbouring tokens a, b at [a, b], (V, V)."""
    return np.bincount(tokens[:-1] * vocab + tokens[1:], minlength=vocab**2).reshape(vocab, vocab)


def unigram_perplexity(train: np.ndarray, test: np.ndarray, vocab: int) -> float:
    """exp of the mean -log p(token) over test tokens, with p counted in train (N,) and one added to every count.

    test is (N,), or (n, T) for n windows.
    """
    train, test = _read_tokens("unigram_perplexity", [train, test], vocab, least=1)
    p = _unigram_probabilities(train, vocab)
    return float(np.exp(-np.log(p[test]).mean()))


def bigram_perplexity(train: np.ndarray, valid: np.ndarray, test: np.ndarray, vocab: int) -> float:
    """Perplexity of p(b | a) = (count(ab) + m p(b)) / (count(a) + m) over all test tokens but the first.

    The counts, and p(b) with one added to every count, are of the training tokens; b follows a. m is the best of seven
    values on the validation tokens. Token arrays are (N,), of ids below vocab. test may be (n, T), n windows: then the
    first token of each window is not predicted, as by a language model.
    """
    train, valid, test = _read_tokens("bigram_perplexity", [train, valid, test], vocab, least=2)
    unigram = _unigram_probabilities(train, vocab)
    pairs = PairCounts(train, vocab)
    counts = np.bincount(train[:-1], minlength=vocab)

    def cross_entropy(tokens: np.ndarray, m: float) -> float:
        a = tokens[..., :-1]
        b = tokens[..., 1:]
        return -np.log((pairs.of(a, b) + m * unigram[b]) / (counts[a] + m)).mean()

    best = min((1, 4, 16, 64, 256, 1024, 4096), key=lambda m: cross_entropy(valid, m))
    return float(np.exp(cross_entropy(test, best)))


def unigram_mlm_accuracy(train: np.ndarray, test: np.ndarray) -> float:
    """Accuracy on test tokens (N,) of always predicting the most frequent training token."""
    test = check_tokens("unigram_mlm_accuracy", test)
    return accuracy(test, majority(train, len(test)))


def bigram_mlm_accuracy(train: np.ndarray, test: np.ndarray, vocab: int, limit: int = 10_000) -> float:
    """Accuracy of argmax_b p(b | left) p(right | b), on the first `limit` test tokens that have two neighbours.

    p(b | a) = (count(ab) + m p(b)) / (count(a) + m) with m = 16; counts are of the training tokens. Both neighbours are
    visible, so the task is easier than for a model that sees 15 % of the tokens masked. It takes 24 V² bytes.
    """
    limit = checks.whole("bigram_mlm_accuracy: limit", limit, 1)
    train, test = _read_tokens("bigram_mlm_accuracy", [train, test], vocab, least=3)
    unigram = _unigram_probabilities(train, vocab)
    pairs = _pair_counts(train, vocab)
    log_p = np.log((pairs + 16 * unigram) / (pairs.sum(1, keepdims=True) + 16))  # (V, V): log p(b | a) at [a, b]
    log_p_right = np.ascontiguousarray(log_p.T)  # log p(c | b) at [c, b]
    left = test[:-2][:limit]
    middle = test[1:-1][:limit]
    right = test[2:][:limit]
    predicted = [(log_p[a] + log_p_right[c]).argmax() for a, c in zip(left, right, strict=True)]
    return accuracy(middle, np.array(predicted))

"""WordChoice: logistic regression chooses the words of a function's name, the strongest simple model for this task.

    summary         "Return the list of archive files."
    candidates      return  the  list  of  archive  files  file  get  set  is  ...
    P(in the name)  0.05    0.0  0.2   0.0 0.4      0.4    0.1   0.5  0.0  0.1          logistic regression
    name            get_archive_files                                           the words with the highest expected F1

Each candidate is decided by itself, from counts over the training pairs. The model knows nothing of grammar.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .. import checks
from .baselines import check_texts
from .name_baselines import check_pairs, summary_words
from .names import Pairs
from .scores import name_words

LONGEST = 8  # words of a name
RIDGE = 1.0  # λ of the loss, see logistic_regression
ENDINGS = (("ies", "y"), ("es", ""), ("s", ""), ("ed", ""), ("ed", "e"), ("ing", ""), ("ing", "e"))


class Candidate(NamedTuple):
    """A word that the name of a summary may have.

    origin      the place, among the summary's words, of the word that it is or is a form of; -1 for a word that is a
                candidate because names often have it
    is_form     True for "file" from "files"
    """

    word: str
    origin: int
    is_form: bool = False


class WordChoice:
    """P(a word is in the name | the summary), by logistic regression on counts.

    The candidates of a summary are its own words, the forms of these words without an ending that training names have
    (files -> file), and the `usual` words that names have most often. From probabilities p, in falling order,
    the name takes the first k, where k is the best for the expected token F1:

        F1 ~ 2 Σ_{i<=k} p_i / (k + Σ_i p_i)
    """

    def __init__(self, usual: int = 150) -> None:
        self.usual = checks.whole("WordChoice: usual", usual, 0)

    def fit(self, pairs: Pairs) -> WordChoice:
        """Count the words of the pairs, then fit the weights."""
        pairs = check_pairs("WordChoice.fit", pairs)
        summaries = [summary_words(summary) for summary in pairs.prompts]
        names = [set(name_words(name)) for name in pairs.responses]
        self.counts = Counts(summaries, names)
        in_names = Counter(word for name in names for word in sorted(name))
        self.usual_words = [word for word, _ in in_names.most_common(self.usual)]
        self.starts = start_rates(pairs.responses)
        features, targets = [], []
        for words, name in zip(summaries, names, strict=True):
            if words:
                candidates = self.candidates(words)
                features.append(word_features(self.counts, words, candidates, name))
                targets += [candidate.word in name for candidate in candidates]
        if not features:
            raise ValueError("WordChoice.fit wants a summary with words, got none")
        self.weights = logistic_regression(np.concatenate(features), np.array(targets, np.float64))
        return self

    def candidates(self, words: Sequence[str]) -> list[Candidate]:
        """The candidates of a summary with these words, each word once."""
        found = {word: Candidate(word, i) for i, word in enumerate(words)}
        for i, word in enumerate(words):
            for form in simple_forms(word):
                if form in self.counts.name_words:
                    found.setdefault(form, Candidate(form, i, is_form=True))
        for word in self.usual_words:
            found.setdefault(word, Candidate(word, -1))
        return list(found.values())

    def probabilities(self, summary: str) -> dict[str, float]:
        """{candidate: probability that the name has it}; {} for a summary without words."""
        words = summary_words(summary)
        if not words:
            return {}
        candidates = self.candidates(words)
        p = sigmoid(word_features(self.counts, words, candidates) @ self.weights)
        return {candidate.word: float(value) for candidate, value in zip(candidates, p, strict=True)}

    def predict(self, summaries: Sequence[str]) -> list[str]:
        """The names of N summaries; "" for a summary without words.

        Words that stand first in at least half of their names of several words come first. Within both groups, words
        that the summary does not have come first, then the others in the order of the summary.
        """
        return [self._name(summary) for summary in check_texts("WordChoice.predict", summaries)]

    def _name(self, summary: str) -> str:
        chosen = best_words(self.probabilities(summary))
        origins = {candidate.word: candidate.origin for candidate in self.candidates(summary_words(summary))}

        def place(word: str) -> tuple[bool, int]:
            return self.starts.get(word, 0.0) < 0.5, origins[word]

        return "_".join(sorted(chosen, key=place))


def best_words(p: dict[str, float]) -> list[str]:
    """The words with the highest probabilities: as many as give the highest expected token F1, at most LONGEST."""
    order = sorted(p, key=lambda word: -p[word])[:LONGEST]
    if not order:
        return []
    common = np.cumsum([p[word] for word in order])  # expected number of common words, for k = 1, 2, ...
    f1 = 2 * common / (np.arange(1, len(order) + 1) + sum(p.values()))
    return order[: int(f1.argmax()) + 1]


def simple_forms(word: str) -> list[str]:
    """A word with its ending removed in each way that leaves at least three letters: "parsed" -> ["pars", "parse"]."""
    return [word[: -len(old)] + new for old, new in ENDINGS if word.endswith(old) and len(word) >= len(old) + 3]


def start_rates(names: Iterable[str]) -> dict[str, float]:
    """{word: occurrences as the first word / all occurrences}, in names of several words."""
    occurs: Counter[str] = Counter()
    first: Counter[str] = Counter()
    for words in map(name_words, names):
        if len(words) > 1:
            occurs.update(words)
            first[words[0]] += 1
    return {word: first[word] / n for word, n in occurs.items()}


# ---------------------------------------------------------------------------------------------------- the features
class Counts:
    """The numbers of training pairs in which words occur, for S words of summaries and N words of names.

    The last row and column of each array stand for all other words, and hold 0.

    in_summaries    (S + 1,) summaries with the word
    first           (S + 1,) summaries that begin with it
    copied          (S + 1,) pairs with the word in both summary and name
    in_names        (N + 1,) names with the word
    together        (S + 1, N + 1) pairs with one word in the summary, the other in the name
    first_together  (S + 1, N + 1) of these, where the first word is the summary's first
    """

    def __init__(self, summaries: Sequence[Sequence[str]], names: Sequence[set[str]]) -> None:
        self.examples = len(names)
        self.summary_words = numbered(summaries)
        self.name_words = numbered(map(sorted, names))
        S, N = len(self.summary_words), len(self.name_words)
        self.in_summaries = np.zeros(S + 1)
        self.first = np.zeros(S + 1)
        self.copied = np.zeros(S + 1)
        self.in_names = np.zeros(N + 1)
        self.together = np.zeros((S + 1, N + 1), np.float32)
        self.first_together = np.zeros((S + 1, N + 1), np.float32)
        for words, name in zip(summaries, names, strict=True):
            rows, columns = self.rows(words), self.columns(sorted(name))
            self.in_summaries[rows] += 1
            self.first[rows[:1]] += 1
            self.copied[self.rows([word for word in words if word in name])] += 1
            self.in_names[columns] += 1
            self.together[np.ix_(rows, columns)] += 1
            self.first_together[np.ix_(rows[:1], columns)] += 1

    def rows(self, words: Iterable[str]) -> np.ndarray:
        """The rows of words of a summary."""
        return np.array([self.summary_words.get(word, -1) for word in words], np.int64)

    def columns(self, words: Iterable[str]) -> np.ndarray:
        """The columns of words of a name."""
        return np.array([self.name_words.get(word, -1) for word in words], np.int64)


def numbered(lists: Iterable[Iterable[str]]) -> dict[str, int]:
    """{word: 0, 1, 2, ... by first occurrence}"""
    found = dict.fromkeys(itertools.chain.from_iterable(lists))
    return {word: i for i, word in enumerate(found)}


def word_features(
    counts: Counts, words: Sequence[str], candidates: Sequence[Candidate], name: set[str] | None = None,
) -> np.ndarray:
    """The features (C, F) of the C candidates of a summary with W words.

    name    the words of the summary's name, if it is a training pair. The pair is then left out of all counts: it
            contains the answer, and the regression would trust the counts too much.

    Three kinds of candidates have weights of their own (blocks of columns): those outside the summary, its words, and
    their forms.
    """
    left_out = 0 if name is None else 1
    in_own_name = np.array([left_out and candidate.word in name for candidate in candidates], np.float64)  # (C,)
    rows, columns = counts.rows(words), counts.columns(candidate.word for candidate in candidates)
    # (C,) P(candidate in a name)
    base_rate = (counts.in_names[columns] - in_own_name + 0.1) / (counts.examples - left_out + 1)

    # P(candidate in the name | a word in the summary), (W, C), and given the first word, (C,)
    seen = counts.in_summaries[rows] - left_out
    given = (counts.together[np.ix_(rows, columns)] - in_own_name + 3 * base_rate) / (seen[:, None] + 3)
    given_first = counts.first_together[rows[0], columns] - in_own_name + 3 * base_rate
    given_first /= counts.first[rows[0]] - left_out + 3
    lift = -np.sort(-np.log(given / base_rate), axis=0)  # (W, C), each column in falling order
    constant = np.ones(len(candidates))
    association = np.stack([
        constant,
        logit(given.max(axis=0)),
        logit(given_first),
        lift.mean(axis=0),
        lift[0],
        lift[:3].sum(axis=0),
        np.log(base_rate),
        np.log(len(words) + constant),
    ], axis=1)

    by_word = summary_features(counts, words, name)
    origin = np.array([candidate.origin for candidate in candidates])
    is_form = np.array([candidate.is_form for candidate in candidates])
    kinds = [origin < 0, (origin >= 0) & ~is_form, is_form]
    blocks = [association * kind[:, None] for kind in kinds]
    never_in_names = (counts.in_names[columns] == in_own_name) & (origin >= 0)
    return np.concatenate([*blocks, by_word[origin] * (origin >= 0)[:, None], never_in_names[:, None]], axis=1)


def summary_features(counts: Counts, words: Sequence[str], name: set[str] | None) -> np.ndarray:
    """The features (W, 13) of the words of a summary: how often names copy each, rank, place and length.

    name: as in word_features.
    """
    left_out = 0 if name is None else 1
    rows = counts.rows(words)
    seen = counts.in_summaries[rows] - left_out
    is_copied = np.array([left_out and word in name for word in words], np.float64)
    mean_rate = (counts.copied.sum() - is_copied.sum()) / max(counts.in_summaries.sum() - left_out * len(words), 1)
    rate = (counts.copied[rows] - is_copied + 2 * mean_rate) / (seen + 2)
    rank = np.argsort(np.argsort(-rate, kind="stable"))  # 0 for the word that is copied most often
    place = np.arange(len(words))
    return np.stack([
        logit(rate),
        np.log(rank + 1),
        rank == 0,
        rank == 1,
        rank / len(words),
        np.log(place + 1),
        place == 0,
        place == 1,
        place == len(words) - 1,
        place / len(words),
        np.log([len(word) for word in words]),
        np.log(seen + 1),
        seen == 0,
    ], axis=1)


# ---------------------------------------------------------------------------------------------------- the regression
def logistic_regression(X: np.ndarray, y: np.ndarray, ridge: float = RIDGE, steps: int = 12) -> np.ndarray:
    """The weights w (F,) that minimise Σ_i -log P(y_i | x_i) + ridge/2 |w|², with P(1 | x) = sigmoid(x w).

    X (n, F), y (n,) of 0 and 1. Newton's method, from w = 0; 12 steps are enough for the shipped pairs.
    """
    w = np.zeros(X.shape[1])
    for _ in range(steps):
        p = sigmoid(X @ w)
        gradient = X.T @ (p - y) + ridge * w
        curvature = (X.T * (p * (1 - p))) @ X + ridge * np.eye(len(w))
        w -= np.linalg.solve(curvature, gradient)
    return w


def sigmoid(z: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-z)"""
    return 1 / (1 + np.exp(-np.clip(z, -500, 500)))


def logit(p: np.ndarray) -> np.ndarray:
    """log (p / (1 - p)), for p limited to 1e-6 ... 1 - 1e-6"""
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return np.log(p) - np.log1p(-p)

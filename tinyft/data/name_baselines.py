"""Simple models of the task *names*, beside which a tuned model is read: they write a name without a network.

    CopyWords           words of the summary
    NearestSummary      the name of the most similar training summary
    simple_names        runs them
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import checks
from .baselines import TfIdf, check_texts
from .names import Pairs
from .scores import name_words, token_f1


def check_pairs(name: str, pairs: Any) -> Pairs:
    """The pairs of a training or validation split, checked. `name` is the function that wants them.

    TypeError unless they are two sequences of strings; ValueError unless there are as many of both, at least one.
    """
    if not isinstance(pairs, (list, tuple)) or len(pairs) != 2:
        raise TypeError(f"{name} wants pairs, (summaries, names), got {checks.brief(pairs)}")
    summaries, names = (check_texts(name, part) for part in pairs)
    if len(summaries) != len(names):
        raise ValueError(f"{name} wants one name for each summary, got {len(summaries)} and {len(names)}")
    return Pairs(tuple(summaries), tuple(names))


def summary_words(summary: str) -> list[str]:
    """The words of a summary in lower case, each once, in the order of their first occurrence."""
    return list(dict.fromkeys(re.findall(r"[a-z0-9]+", summary.lower())))


class CopyWords:
    """A name from at most `count` words of the summary: those that names copy most often, in the summary's order.

        rate(w) = (names with w + 2 q) / (summaries with w + 2)            over the training pairs whose summary has w

    q is the rate over all words. Of each summary, the words with the highest rates are copied; a further word is copied
    only if its rate is above `least`.
    """

    def __init__(self, count: int = 2, least: float = 0.0) -> None:
        self.count = checks.whole("CopyWords: count", count, 1)
        self.least = checks.number("CopyWords: least", least, 0)

    def fit(self, pairs: Pairs) -> CopyWords:
        """Count, for each word of the training summaries, how often the name has it too."""
        pairs = check_pairs("CopyWords.fit", pairs)
        occurs: Counter[str] = Counter()
        copied: Counter[str] = Counter()
        for summary, name in zip(*pairs, strict=True):
            words = summary_words(summary)
            occurs.update(words)
            copied.update(set(words) & set(name_words(name)))
        self.mean_rate = copied.total() / max(occurs.total(), 1)
        self.rates = {word: (copied[word] + 2 * self.mean_rate) / (n + 2) for word, n in occurs.items()}
        return self

    def predict(self, summaries: Sequence[str]) -> list[str]:
        """The names of N summaries; "" for a summary without words."""
        return [self._copy(summary) for summary in check_texts("CopyWords.predict", summaries)]

    def _copy(self, summary: str) -> str:
        words = summary_words(summary)
        best = sorted(words, key=lambda word: -self.rates.get(word, self.mean_rate))[: self.count]
        chosen = best[:1] + [word for word in best[1:] if self.rates.get(word, self.mean_rate) > self.least]
        return "_".join(word for word in words if word in chosen)


class NearestSummary:
    """The name of the training pair whose summary is most similar: the largest cosine of TF-IDF vectors."""

    def fit(self, pairs: Pairs) -> NearestSummary:
        """Compute the vectors of the training summaries."""
        pairs = check_pairs("NearestSummary.fit", pairs)
        self.names = pairs.responses
        self.features = TfIdf(least=1).fit(pairs.prompts)
        self.matrix = self._dense(pairs.prompts)  # (n, d), each row of norm 1
        return self

    def predict(self, summaries: Sequence[str]) -> list[str]:
        """The names of N summaries. If no training summary shares a word, the name is that of the first pair."""
        similar = self._dense(summaries) @ self.matrix.T  # (N, n)
        return [self.names[i] for i in similar.argmax(1)]

    def _dense(self, texts: Sequence[str]) -> np.ndarray:
        """The TF-IDF vectors of texts, (n, d) float32; zeros for a text without a known term."""
        X = self.features.transform(texts)
        matrix = np.zeros(X.shape, np.float32)
        matrix[X.rows, X.columns] = X.values
        return matrix


def simple_names(train: Pairs, valid: Pairs, summaries: Sequence[str]) -> dict[str, list[str]]:
    """The names that the baselines give to N summaries: {"copy one word", "copy words", "nearest summary": (N,)}.

    The settings of "copy words" are the best of eight on the validation split, by token F1.
    """
    train, valid = check_pairs("simple_names", train), check_pairs("simple_names", valid)
    candidates = [CopyWords(count, least).fit(train) for count in (1, 2, 3, 4) for least in (0.0, 0.15)]
    best = max(candidates, key=lambda model: token_f1(valid.responses, model.predict(valid.prompts)).mean())
    return {
        "copy one word": CopyWords(1).fit(train).predict(summaries),
        "copy words": best.predict(summaries),
        "nearest summary": NearestSummary().fit(train).predict(summaries),
    }

"""The perplexity of a long text, in windows of a fixed length.

    perplexity = exp(Σ −log p(token | the tokens before it in its window) / number of predicted tokens)

    stride = length    windows without overlap: the first tokens of a window are predicted from little context
    stride < length    every window begins `stride` tokens later, and only its last `stride` tokens are predicted:
                       each from at least length − stride tokens. Slower by the factor length / stride

A perplexity depends on the length, on the stride and on the tokenizer: it means little without them. The sums of all
windows are added before the exponential: the mean of the windows' perplexities is another number, and a larger one.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import checks
from ..data.batches import check_tokens
from ..keywords import checked_keywords
from ..nn import Module
from .batch import IGNORE
from .evaluate import evaluate

__all__ = ["CorpusPerplexity", "corpus_perplexity"]


@checked_keywords
@dataclass(frozen=True)
class CorpusPerplexity:
    """The perplexity of a text, and the protocol of its measurement.

    perplexity     exp(loss)
    loss           nats per predicted token
    tokens         the number of predicted tokens
    length, stride of the windows"""

    perplexity: float
    loss: float
    tokens: int
    length: int
    stride: int

    def __str__(self) -> str:
        return (f"{self.perplexity:.3f} ({self.tokens:,} tokens predicted, in windows of {self.length} "
                f"with stride {self.stride})")


@checked_keywords
def corpus_perplexity(
    model: Module, tokens: Any, length: int, stride: int | None = None, batch_size: int = 8,
) -> CorpusPerplexity:
    """The perplexity of a causal language model on the tokens of a text (N,).

    length      tokens of a window
    stride      tokens between the beginnings of two windows; None: `length`, windows without overlap
    batch_size  windows in a batch; the result does not depend on it

    Tokens after the last whole window are left out. TypeError for tokens that are no whole numbers; ValueError for a
    text shorter than one window, a length below 2, and a stride outside 1 ... length."""
    checks.instance("corpus_perplexity", model, Module, "a model")
    tokens = check_tokens("corpus_perplexity", tokens)
    length = checks.whole("corpus_perplexity: length", length, least=2)
    stride = length if stride is None else checks.whole("corpus_perplexity: stride", stride, 1, length)
    batch_size = checks.whole("corpus_perplexity: batch_size", batch_size, least=1)
    if len(tokens) < length:
        raise ValueError(f"corpus_perplexity wants at least one window of {length} tokens, got {len(tokens)}")
    starts = range(0, len(tokens) - length + 1, stride)
    new = min(stride, length - 1)                                       # predicted tokens of every window but the first
    count = length - 1 + (len(starts) - 1) * new
    loss = evaluate(model, window_batches(tokens, starts, length, new, batch_size))["loss"]
    return CorpusPerplexity(math.exp(min(loss, 700)), loss, count, length, stride)


def window_batches(
    tokens: np.ndarray, starts: range, length: int, new: int, batch_size: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches {"ids", "labels"} (B, length − 1) of the windows that begin at `starts`.

    The label of a position is the token after it. Of every window but the first, only the last `new` labels count."""
    for first in range(0, len(starts), batch_size):
        rows = np.stack([tokens[start:start + length] for start in starts[first:first + batch_size]])
        labels = rows[:, 1:].astype(np.int64)
        is_first = first == 0
        labels[is_first:, :-new] = IGNORE
        yield {"ids": rows[:, :-1], "labels": labels}

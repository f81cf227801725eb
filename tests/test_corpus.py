"""The perplexity of a long text in windows: protocols, pooling, and what wrong answers would give."""
from __future__ import annotations

import math

import numpy as np
import pytest
from helpers import host

import tinyft as ft

V = 11


class Table(ft.Module):
    """A language model whose logits follow from the last two tokens: table[ids[t − 1], ids[t]]; 0 stands before a row.
    """

    def __init__(self, table: np.ndarray):
        self.table = ft.Parameter(table)

    def forward(self, ids, ctx):
        ctx.begin(ids, self.table.data)
        before = np.concatenate([np.zeros((len(ids), 1), int), host(ids)[:, :-1]], axis=1)
        rows = self.table.reshape((V * V, V))[before * V + host(ids)]
        rows = rows.reshape((-1, V))
        if ctx.logit_positions is not None:
            rows = rows[host(ctx.logit_positions)]
        ctx.output = rows
        return rows


@pytest.fixture
def text(rng):
    return rng.integers(0, V, 57)


@pytest.fixture
def model(rng):
    return Table(rng.standard_normal((V, V, V)).astype(np.float32))


def losses_of_window(model: Table, window: np.ndarray) -> np.ndarray:
    """−log p of each token of a window but the first, by the definition."""
    table = host(model.table).astype(np.float64)
    found = []
    for t in range(1, len(window)):
        before = window[t - 2] if t > 1 else 0
        logits = table[before, window[t - 1]]
        found.append(np.log(np.exp(logits).sum()) - logits[window[t]])
    return np.array(found)


def by_definition(model: Table, text: np.ndarray, length: int, stride: int) -> np.ndarray:
    """The losses of all predicted tokens."""
    starts = range(0, len(text) - length + 1, stride)
    losses = [losses_of_window(model, text[start:start + length]) for start in starts]
    return np.concatenate([losses[0], *(window[-stride:] for window in losses[1:])])


@pytest.mark.parametrize("length, stride", [(8, 8), (8, 7), (8, 3), (8, 1), (57, 57), (2, 1), (2, 2)])
def test_perplexity_is_the_definition_and_every_token_counts_once(model, text, length, stride):
    expected = by_definition(model, text, length, stride)
    for batch_size in (1, 3, 100):
        got = ft.corpus_perplexity(model, text, length, stride, batch_size)
        assert got.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-5)
        assert got.tokens == len(expected)
        assert (got.length, got.stride) == (length, stride)
    if stride == 1:
        assert len(expected) == len(text) - 1


def test_without_overlap_it_is_the_perplexity_of_the_windows(text, rng):
    gpt = ft.GPT(ft.GPTConfig(vocab=V, positions=16, width=8, layers=1, heads=2), seed=1)
    whole = ft.corpus_perplexity(gpt, text, 8)
    assert whole.perplexity == pytest.approx(ft.perplexity(gpt, [ft.data.batches.windows(text, 8)]), rel=1e-6)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(text):
    model = Table(np.zeros((V, V, V), np.float32))
    assert ft.corpus_perplexity(model, text, 8, 3).perplexity == pytest.approx(V, rel=1e-6)


def test_the_mean_of_the_windows_perplexities_is_larger(model, text):
    """Jensen's inequality. And stride 1 of a model with two tokens of context needs no more than windows of 3."""
    pooled = by_definition(model, text, 8, 8).reshape(-1, 7)
    mean = np.exp(pooled.mean(axis=1)).mean()
    assert mean > 1.01 * ft.corpus_perplexity(model, text, 8).perplexity
    short = by_definition(model, text, 4, 1)
    long = by_definition(model, text, 20, 1)
    np.testing.assert_allclose(short[2:], long[2:])


def test_a_wrong_stride_or_text_is_refused(model, text):
    for arguments, message in [((text, 1), "length"), ((text, 8, 9), "stride"), ((text[:5], 8), "one window of 8"),
                               ((text * 0.5, 8), "whole numbers")]:
        with pytest.raises((TypeError, ValueError), match=message):
            ft.corpus_perplexity(model, *arguments)
    assert "windows of 8 with stride 8" in str(ft.corpus_perplexity(model, text, 8))

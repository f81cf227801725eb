"""Quantization-aware training of the shipped small GPT, beside round-to-nearest, on held-out prose.

The recipe: the grid of each row from its smallest to its largest weight (group=None), 40 steps of 8 windows of 64
tokens of the prose of pretraining, AdamW with a learning rate of 1e-3 that falls to 0. The weights of the linear maps
train.
"""
from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

import tinyft as ft
from tinyft import array

pytestmark = pytest.mark.skipif(array.backend() != "numpy", reason="perplexities of one backend are enough")
STEPS = 40
LENGTH = 64


@lru_cache(None)
def prose() -> tuple[np.ndarray, np.ndarray]:
    """(windows of training prose, tokens of 60 windows of the prose of modules that training never saw)."""
    _, tokenizer = ft.load("base-gpt-small")
    training = ft.data.windows(ft.data.pretraining("prose", "train", tokenizer), LENGTH)
    test = ft.data.windows(ft.data.pretraining("prose", "test", tokenizer), LENGTH)
    return training, test[::36].reshape(-1)


def perplexity(model: ft.Module) -> float:
    return ft.corpus_perplexity(model, prose()[1], LENGTH).perplexity


def train(model: ft.Module) -> None:
    """The steps of the recipe: the same batches for every model."""
    rng = np.random.default_rng(1)
    training = prose()[0]
    batches = [training[rng.integers(0, len(training), 8)] for _ in range(STEPS)]
    ft.fit(model, batches, STEPS, ft.AdamW(1e-3), schedule=ft.linear_schedule(), progress=False)


@pytest.mark.parametrize("bits, part", [(3, 0.94), (2, 0.6)])
def test_training_through_the_grid_beats_round_to_nearest(bits, part):
    """Both of the dense weights as they are, and of weights that trained for as many steps without the grid."""
    rule = ft.RTN(bits, group=None)
    rounded, _ = ft.load("base-gpt-small")
    dense = perplexity(rounded)
    ft.compress(rounded, rule)

    without_grid, _ = ft.load("base-gpt-small")
    trained = ft.QAT().trains(without_grid)
    for name, p in without_grid.named_parameters().items():
        p.requires_grad = name in trained
    train(without_grid)
    ft.compress(without_grid, rule)

    aware, _ = ft.load("base-gpt-small")
    ft.attach(aware, ft.QAT(bits=bits, group=None))
    train(aware)
    ft.pack(aware)

    nearest, afterwards, mine = perplexity(rounded), perplexity(without_grid), perplexity(aware)
    assert dense < mine < part * min(nearest, afterwards), (dense, mine, nearest, afterwards)

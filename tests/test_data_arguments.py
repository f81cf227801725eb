"""Every public function of `data` called with each argument replaced by nonsense: a sentence of ours, or a result.

A result is right for nonsense that is none: True and False are labels, and an empty text is a text.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import host_only

from tinyft import data
from tinyft.data import baselines, name_baselines, scores

pytestmark = host_only

TOKENIZER = data.shipped_tokenizer()
EXAMPLES = data.Examples(("a text", "two words here"), np.array([0, 1]))
TOKENS = np.arange(50) + 10
FEATURES = baselines.TfIdf(least=1).fit(["a text aa bb", "bb aa"]).transform(["aa bb", "bb cc"])
IDS = np.full((2, 3), 9)
PAIRS = data.Pairs(("return the lines", "close it"), ("get_lines", "close"))


def first_batch(make: Callable) -> Callable:
    """A function that makes batches, and takes the first."""
    return lambda **arguments: next(make(**arguments))


def tf_idf(least: Any, texts: Any, others: Any) -> Any:
    """The features of texts."""
    return baselines.TfIdf(least).fit(texts).transform(others)


def regression(classes: Any, C: Any, X: Any, labels: Any, steps: Any) -> Any:
    """A fitted logistic regression."""
    return baselines.LogisticRegression(classes, C).fit(X, labels, steps)


def simple(train: Any, classes: Any) -> Any:
    """The simple baselines, with the same examples in every split."""
    return baselines.simple(train, train, EXAMPLES, classes)


def copy_words(count: Any, least: Any, pairs: Any, summaries: Any) -> Any:
    """The names that a fitted CopyWords gives."""
    return name_baselines.CopyWords(count, least).fit(pairs).predict(summaries)


STREAM = {"batch_size": 2, "seed": 0, "shuffle": True, "drop_last": False}
TASK = {"name": "package", "seed": 0, "train_size": 3, "tokenizer": None}
TEXTS = {"examples": EXAMPLES, "tokenizer": TOKENIZER, "max_len": 8, "form": "bert", "group_by_length": False}
CALLS: dict[str, tuple[Callable, dict[str, Any]]] = {
    "Batches": (first_batch(data.Batches), {"examples": [[1, 2], [3, 4]], "lengths": None, **STREAM}),
    "text_batches": (first_batch(data.text_batches), {**TEXTS, **STREAM}),
    "source_batches": (first_batch(data.source_batches), {
        "pairs": [("a b", "c"), ("b", "d")], "tokenizer": TOKENIZER, "max_source": 8, "max_target": 8, "start": 0,
        "end": 1, **STREAM,
    }),
    "lm_batches": (first_batch(data.lm_batches), {"tokens": TOKENS, "T": 4, **STREAM}),
    "mlm_batches": (
        first_batch(data.mlm_batches), {"tokens": TOKENS, "T": 6, "vocab": None, "p": 0.15, "tokenizer": None, **STREAM}
    ),
    "mlm": (data.mlm, {
        "ids": IDS, "mask": IDS > 0, "rng": np.random.default_rng(0), "vocab": 20, "special": data.SPECIAL, "p": 0.5,
    }),
    "encode": (data.encode, {"tokenizer": TOKENIZER, "text": "a b", "max_len": 8, "form": "gpt"}),
    "pad": (data.pad, {"rows": [[1], [2, 3]], "max_len": 8, "multiple": 4, "pad_id": 0}),
    "windows": (data.windows, {"tokens": TOKENS, "T": 3}),
    "key": (data.key, {"text": "a"}),
    "sentences": (data.sentences, {"text": "a"}),
    "mask_names": (data.mask_names, {"text": "a"}),
    "swap_two": (data.swap_two, {"sentence": "The cat sat on a mat.", "rng": np.random.default_rng(0)}),
    "task": (data.task, TASK),
    "pretraining": (data.pretraining, {"kind": "source", "split": "valid", "tokenizer": None}),
    "held_out_batches": (data.held_out_batches, {"tokens": TOKENS, "T": 4, "count": 3, "batch_size": 2}),
    "read_name": (data.read_name, {"answer": "get_lines"}),
    "stretch": (data.stretch, {"tokens": TOKENS, "seed": 0, "size": 3}),
    "accuracy": (baselines.accuracy, {"labels": [0, 1], "predicted": [0, 1]}),
    "macro_f1": (baselines.macro_f1, {"labels": [0, 1], "predicted": [0, 1]}),
    "majority": (baselines.majority, {"train_labels": [0, 1], "count": 3}),
    "unigram_perplexity": (baselines.unigram_perplexity, {"train": TOKENS, "test": TOKENS, "vocab": 100}),
    "bigram_perplexity": (
        baselines.bigram_perplexity, {"train": TOKENS, "valid": TOKENS, "test": TOKENS, "vocab": 100}
    ),
    "unigram_mlm_accuracy": (baselines.unigram_mlm_accuracy, {"train": TOKENS, "test": TOKENS}),
    "bigram_mlm_accuracy": (
        baselines.bigram_mlm_accuracy, {"train": TOKENS, "test": TOKENS, "vocab": 100, "limit": 10}
    ),
    "TfIdf": (tf_idf, {"least": 1, "texts": ["aa bb"], "others": ["aa"]}),
    "LogisticRegression": (regression, {"classes": 2, "C": 1.0, "X": FEATURES, "labels": [0, 1], "steps": 3}),
    "simple": (simple, {"train": EXAMPLES, "classes": 2}),
    "simple_names": (name_baselines.simple_names, {"train": PAIRS, "valid": PAIRS, "summaries": ["a text"]}),
    "CopyWords": (copy_words, {"count": 2, "least": 0.0, "pairs": PAIRS, "summaries": ["a text"]}),
    "name_words": (scores.name_words, {"name": "a_b"}),
    "exact_match": (scores.exact_match, {"names": ["a"], "predicted": ["b"]}),
    "token_f1": (scores.token_f1, {"names": ["a"], "predicted": ["b"]}),
    "wilson_interval": (scores.wilson_interval, {"successes": 1, "n": 2, "z": 1.96}),
    "bootstrap_interval": (scores.bootstrap_interval, {"values": [1.0, 2.0], "draws": 3, "seed": 0}),
}
NONSENSE = [
    None, True, 0, -1, 2.5, float("nan"), float("inf"), 10**30, "x", "", b"x", [], [None], [[1], [2, 3]], ["a"], {},
    {"a": 1}, (), object(), int, np.array(3), np.zeros((2, 2)), np.array(["a"]), np.array([1 + 2j]), iter([1]),
    range(3), TOKENIZER,
]
# Names that are not called: constants, classes without a check, and functions without arguments.
NOT_CALLED = {
    "IGNORE", "PACKAGES", "SPECIAL", "SPLITS", "Examples", "NamePair", "Pairs", "Record", "Task", "name_pairs",
    "shipped_tokenizer", "snapshot",
}


def test_the_table_has_every_public_function():
    assert set(data.__all__) - NOT_CALLED <= CALLS.keys()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", CALLS)
def test_nonsense_gets_one_sentence_or_a_result(name):
    """Never a message of NumPy or Python, a warning, or an exception of another kind."""
    call, arguments = CALLS[name]
    call(**arguments)
    for key in arguments:
        for value in NONSENSE:
            try:
                call(**{**arguments, key: value})
            except (TypeError, ValueError) as error:
                message = str(error)
                assert " want" in message and " got " in message, (key, value, message)
                assert "\n" not in message and len(message) < 320, (key, value, message)

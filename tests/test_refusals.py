"""Values without sense, and arguments of a wrong kind: one sentence that names them, and an unchanged model.

Methods, configurations, layers, calls of a model, and the functions that change a model.
"""
from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from contract import build
from helpers import case_id, host
from test_half_done import check_unchanged, snapshot

import tinyft as ft
from tinyft import BERT, GPT, BERTConfig, GPTConfig, attach, combine, count, detach, eject, merge, unpack, without
from tinyft.methods import ALL, Houlsby, LoRA, Partial, PrefixTuning, PromptTuning
from tinyft.models.attention import Attention
from tinyft.nn import Context, Dropout, Embedding, LayerNorm, Linear, RMSNorm

NAN = float("nan")
INF = float("inf")


def check_sentence(call: Callable[[], Any], error: Any, words: str) -> None:
    """The call raises this error with one sentence of ours, which holds the words."""
    with pytest.raises(error, match=words) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400


# ── fields of methods and of configurations ──────────────────────────────────────────────────────────────────────────
WRONG_FIELDS: list[tuple[Any, dict[str, list[Any]]]] = [
    (LoRA, {"r": [0, -1, 2.5, True, "8", None, NAN], "alpha": [NAN, INF, "16", None, True],
            "dropout": [1, 1.0, -0.1, NAN, "0", None]}),
    (Houlsby, {"m": [0, -3, 2.5, True, None], "std": [-1, NAN, INF, "1"], "norms": [3, "no", None]}),
    (PrefixTuning, {"p": [-1, 1.5, True, None], "mlp": [0, -2, 2.5, True], "std": [-1, NAN], "shift": [1, None]}),
    (PromptTuning, {"p": [-1, 1.5, True, None], "init": ["random", 3, None, ["uniform"]]}),
    (Partial, {"k": [-1, 1.5, True, None, "all"]}),
    (GPTConfig, {size: [0, -1, 1.5, True, "9", None] for size in ("vocab", "positions", "width", "layers", "heads")}),
    (BERTConfig, {size: [0, -1, 1.5, True, "9", None] for size in ("vocab", "positions", "width")}),
    (BERTConfig, {"token_types": [-1, 1.5, True, "9", None]}),
    (GPTConfig, {"hidden": [0, -1, 2.5], "dropout": [1, -0.1, NAN, "0"], "eps": [-1, NAN, INF], "std": [-1, NAN]}),
    (BERTConfig, {"hidden": [0, -1, 2.5], "dropout": [1, -0.1, NAN, "0"], "eps": [-1, NAN, INF], "std": [-1, NAN]}),
    (Dropout, {"p": [1, 1.0, 2, -0.1, NAN, INF, "0", None, True]}),
]
FIELD_CASES = [
    (cls, field, value) for cls, fields in WRONG_FIELDS for field, values in fields.items() for value in values]


@pytest.mark.parametrize("cls, field, value", FIELD_CASES)
def test_a_field_without_sense_is_refused_when_the_object_is_made(cls, field, value):
    named = "dropout" if cls is Dropout else field
    check_sentence(lambda: cls(**{field: value}), (TypeError, ValueError), rf"\b{named}\b|rank r\b")


def test_the_edges_of_the_fields_are_accepted():
    assert LoRA(r=1, alpha=-1, dropout=0).dropout == 0 and LoRA(r=np.int64(3)).r == 3
    assert Partial(k=0).k == 0 and PrefixTuning(p=1, mlp=1, std=0).mlp == 1 and Houlsby(m=1, std=0).m == 1
    assert GPT(GPTConfig(1, 1, 1, 1, 1, 1, 0.99)).config.layers == 1
    assert BERT(BERTConfig(1, 1, 1, 1, 1, 1)).config.heads == 1


def test_sizes_that_do_not_fit_each_other_and_names_of_other_libraries():
    for config in (GPTConfig, BERTConfig):
        check_sentence(lambda: config(width=10, heads=3), ValueError, "3 heads do not divide a width of 10")
        for foreign, ours in {"n_layer": "layers", "num_attention_heads": "heads", "hidden_size": "width",
                              "vocab_size": "vocab", "n_positions": "positions"}.items():
            check_sentence(lambda: config(**{foreign: 4}), TypeError, f"unknown keyword '{foreign}': .*'{ours}'")
    check_sentence(lambda: GPT(BERTConfig()), TypeError, "GPT wants a GPTConfig, got BERTConfig")
    check_sentence(lambda: BERT({"width": 4}), TypeError, "BERT wants a BERTConfig")
    small = BERTConfig(9, 9, 2, 4, 1, 2)
    check_sentence(lambda: BERT(small, head="classes"), ValueError, "head wants one of 'mlm', None")
    for seed in (-1, 1.5, "a", None):
        check_sentence(lambda: BERT(small, seed), (TypeError, ValueError), "seed wants a whole number")


def test_more_blocks_than_the_model_has():
    model = build("gpt")
    check_unchanged(model, lambda: attach(model, Partial(k=99)), ValueError, "0 <= k <= 2")


# ── targets ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("cls", [LoRA, Houlsby, PrefixTuning])
@pytest.mark.parametrize("targets", [5, None, b"attn", {"attn.q": 1}, ["attn.q", 3], "", ["attn.q", ""], [], "attn.[qv",
                                     "attn.qv]", "attn.[]", "a" * 2000, (t for t in "ab"), LoRA], ids=case_id)
def test_targets_that_are_no_patterns_are_refused_when_the_method_is_made(cls, targets):
    check_sentence(lambda: cls(targets=targets), (TypeError, ValueError), f"{cls.__name__}: targets wants a pattern")


def test_a_pattern_that_names_nothing_lists_the_linear_maps_of_the_model():
    model = build("gpt")
    maps = ["embed", "pos", *(f"blocks.*.attn.{x}" for x in "qkvo"), "blocks.*.mlp.up", "blocks.*.mlp.down"]
    for targets in ("q_proj", "c_attn", "query", ["attn.q", "all-linear"]):
        words = re.escape("names no module of this model; it has " + ", ".join(maps))
        check_unchanged(model, lambda: attach(model, LoRA(targets=targets)), LookupError, words)
    norm = LayerNorm(3)
    check_unchanged(norm, lambda: attach(norm, LoRA()), LookupError, "it has no module that could be named")


@pytest.mark.parametrize("method, words", [
    (LoRA(targets="mlp"), "blocks.0.mlp is a MLP and has none: name its maps up, down"),
    (LoRA(targets="norm1"), "LayerNorm and has none"), (LoRA(targets="head"), "TiedHead and has none"),
    (LoRA(targets="kv"), "KV and has none"), (Houlsby(targets="kv"), "KV and has none"),
    (Houlsby(targets="drop"), "Dropout and has none"), (PrefixTuning(targets="attn"), "attn is a Attention"),
    (PrefixTuning(targets="mlp"), "mlp is a MLP")], ids=str)
def test_a_method_on_a_module_of_a_wrong_kind(method, words):
    model = build("gpt")
    check_unchanged(model, lambda: attach(model, method), TypeError, words)


# ── the functions that change a model ────────────────────────────────────────────────────────────────────────────────
NO_MODEL = [5, None, "gpt", LoRA(), GPT, (1, 2), np.zeros(2)]
ON_A_MODEL = {
    "attach": lambda m: attach(m, LoRA()), "detach": detach, "eject": eject, "merge": merge, "count": count,
    "trained": ft.trained, "unpack": unpack, "without": lambda m: without(m).__enter__(),
    "combine": lambda m: combine([m]), "classifier": lambda m: ft.classifier(m, 2), "save_adapter":
    lambda m: ft.save_adapter(m, "nowhere"),
}


@pytest.mark.parametrize("name", ON_A_MODEL)
@pytest.mark.parametrize("thing", NO_MODEL, ids=str)
def test_a_thing_that_is_no_model(name, thing):
    check_sentence(lambda: ON_A_MODEL[name](thing), TypeError, "wants|takes no new head")


def test_the_pair_that_load_gives_is_no_model():
    model = build("gpt")
    check_sentence(lambda: attach((model, None), LoRA()), TypeError, "load gives two values")


@pytest.mark.parametrize("cls", ALL)
def test_a_class_in_place_of_a_method(cls):
    model = build("gpt")
    words = rf"got the class {cls.__name__}: write {cls.__name__}\(\)"
    check_unchanged(model, lambda: attach(model, cls), TypeError, words)


ARGUMENTS = {
    "method": [(x, TypeError) for x in (None, "lora", 5, {}, [LoRA()], build)],
    "name": [(5, TypeError), (True, TypeError), (LoRA(), TypeError), ("", ValueError)],
    "seed": [(-1, ValueError), (1.5, TypeError), (None, TypeError), ("a", TypeError), (True, TypeError)],
    "train_head": [("no", TypeError), (None, TypeError), (1, TypeError)],
}


@pytest.mark.parametrize("argument, value, error", [(a, *case) for a, cases in ARGUMENTS.items() for case in cases])
def test_arguments_of_attach(argument, value, error):
    model = build("gpt")
    arguments = {"method": LoRA(), argument: value}
    check_unchanged(model, lambda: attach(model, **arguments), error, "attach")


def test_methods_are_called_by_their_names():
    model = build("gpt")
    for call in (detach, eject, ft.save_adapter):
        more = ["nowhere"] if call is ft.save_adapter else []
        check_unchanged(model, lambda: call(model, *more), LookupError, "no method is attached to this model")
    a = attach(model, LoRA())
    for call in (detach, eject, merge, lambda m, x: without(m, x).__enter__()):
        check_unchanged(model, lambda: call(model, "nope"), LookupError, "'nope' is not attached; there is lora")
        check_unchanged(model, lambda: call(model, a), TypeError, "by its name.*its name is 'lora'")
        check_unchanged(model, lambda: call(model, 5), TypeError, "by its name")


@pytest.mark.parametrize("adapters, weights, error", [
    (5, None, TypeError), ("ab", None, TypeError), ([], None, ValueError), ([LoRA()], None, TypeError),
    ("one", [1.0, 2.0], ValueError), ("one", [NAN], ValueError), ("one", ["1"], TypeError), ("one", 5, TypeError),
    ("one", [True], TypeError)])
def test_arguments_of_combine(adapters, weights, error):
    model = build("gpt")
    attach(model, LoRA())
    a = detach(model)
    check_sentence(lambda: combine([a] if adapters == "one" else adapters, weights), error, "combine")
    check_sentence(lambda: combine([a], name=5), TypeError, "combine: name")


def test_training_mode_is_a_flag():
    model = build("gpt")
    for wrong in ("no", None, 0, 3):
        check_unchanged(model, lambda: model.train(wrong), TypeError, "train wants True or False")


# ── calls of a model ─────────────────────────────────────────────────────────────────────────────────────────────────
IDS = np.array([[1, 2, 3], [4, 5, 6]])
WRONG_IDS: list[tuple[Any, Any, str]] = [
    ([[1, 2], [3]], ValueError, "rows of different lengths: pad them"),
    ("text", TypeError, "tokenizer.encode"),
    (None, TypeError, "got None"),
    ([["a", "b"]], TypeError, "token ids are integers"),
    ({"ids": IDS}, TypeError, "B, T"),
    ([[1.0, 2.0]], TypeError, "integers; got float64"),
    ([1, 2], ValueError, r"got shape \(2,\)"),
    ([], ValueError, "B, T"),
    (5, ValueError, "B, T"),
    (IDS[None], ValueError, r"got shape \(1, 2, 3\)"),
    (np.zeros((2, 0), int), ValueError, "at least one token"),
    (IDS - 5, IndexError, "token id -4 is outside"),
    (IDS + 100, IndexError, "token id 106 is outside"),
    (((1, 100),), IndexError, "token id 100 is outside"),
    (np.array([[1, None]]), TypeError, "integers"),
    (np.zeros((1, 99), int), ValueError, "99 tokens is longer"),
    (ft.Tensor(IDS), ValueError, r"got a Tensor of shape \(2, 3\)"),
    (IDS > 2, TypeError, "integers; got bool"),
    (ft.Tensor(np.zeros((2, 3, 5), np.float32)), ValueError, r"with C = 12, got a Tensor of shape \(2, 3, 5\)"),
]
WRONG_FACTS: list[tuple[str, Any, Any, str]] = [
    ("mask", np.ones((2, 4)), ValueError, "one entry per token"),
    ("mask", np.ones(3), ValueError, "one entry per token"),
    ("mask", True, ValueError, "one entry per token"),
    ("mask", "x", TypeError, "mask wants True or 1"),
    ("mask", np.full((2, 3), 0.5), ValueError, "got 0.5"),
    ("mask", np.full((2, 3), 2), ValueError, "got 2"),
    ("mask", np.array([[0, 0, -INF]] * 2), ValueError, "got -inf"),
    ("mask", np.full((2, 3), NAN), ValueError, "got nan"),
    ("mask", [[1], [1, 1, 1]], ValueError, "rows of different lengths"),
    ("mask", [["1"] * 3] * 2, TypeError, "mask wants"),
    ("mask", ft.Tensor(np.ones((2, 3))), TypeError, "mask wants"),
    ("token_type_ids", IDS * 0 - 1, IndexError, "token type -1 is outside the 2 types"),
    ("token_type_ids", IDS * 0 + 2, IndexError, "token type 2 is outside"),
    ("token_type_ids", IDS * 0.0, TypeError, "wants integers"),
    ("token_type_ids", IDS > 9, TypeError, "wants integers"),
    ("token_type_ids", [[0]], ValueError, "one entry per token"),
    ("token_type_ids", "a", TypeError, "wants integers"),
    ("logit_positions", [99], IndexError, "logit position 99 is outside the 6 positions"),
    ("logit_positions", [-1], IndexError, "logit position -1"),
    ("logit_positions", [1.5], TypeError, "wants integers"),
    ("logit_positions", np.ones(6, bool), TypeError, "wants integers"),
    ("task", "x", TypeError, "task wants integers"),
    ("cache", True, TypeError, r"cache wants a Cache\(\), got True"),
    ("source", 5, TypeError, "source wants the Context"),
    ("rng", 5, TypeError, "rng wants a random generator"),
    ("output_hidden_states", "yes", TypeError, "True or False"),
    ("max_new_tokens", 3, TypeError, "generate"),
    ("temperature", 1.0, TypeError, "generate"),
    ("labels", IDS, TypeError, "the loss comes from fit"),
    ("attention_mask", IDS, TypeError, "did you mean 'mask'"),
    ("position_ids", IDS, TypeError, "positions follow from the mask"),
    ("return_dict", True, TypeError, "one Tensor"),
]


@pytest.mark.parametrize("kind", ["gpt", "bert"])
@pytest.mark.parametrize("ids, error, words", WRONG_IDS)
def test_ids_that_a_model_cannot_read(kind, ids, error, words):
    model = build(kind)
    check_unchanged(model, lambda: model(ids), error, words)


@pytest.mark.parametrize("fact, value, error, words", WRONG_FACTS)
def test_facts_that_a_model_cannot_read(fact, value, error, words):
    model = build("bert")
    check_unchanged(model, lambda: model(IDS, **{fact: value}), error, words)


def test_a_call_without_an_input_says_so():
    model = build("gpt")
    check_sentence(lambda: model(), TypeError, "GPT wants its input as the first argument.*got nothing")
    check_sentence(lambda: model(input_ids=IDS), TypeError, "got only the keywords input_ids")
    check_sentence(lambda: model(IDS, IDS), TypeError, "second argument of a module is a Context, got ndarray")


def test_a_failed_call_leaves_the_cache_as_it_was():
    model = build("gpt")
    cache = ft.Cache()
    model(IDS, cache=cache)
    for wrong in (IDS + 100, np.zeros((2, 99), int)):
        with pytest.raises((IndexError, ValueError)):
            model(wrong, cache=cache)
    y = host(model(IDS[:, :1], cache=cache))
    again = ft.Cache()
    model(IDS, cache=again)
    assert np.array_equal(y, host(model(IDS[:, :1], cache=again)))


def test_the_snapshot_of_an_untouched_model_is_stable():
    model = build("bert")
    before = snapshot(model)
    model(IDS, Context(mask=np.ones((2, 3), bool)))
    assert snapshot(model) == before


# ── layers ───────────────────────────────────────────────────────────────────────────────────────────────────────────
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("make, words", [
    (lambda: Linear(-1, 2, rng=RNG), "in_features wants a whole number"),
    (lambda: Linear(2, 2.5, rng=RNG), "out_features wants a whole number"),
    (lambda: Linear(2, 2, rng=5), "rng wants a random generator"),
    (lambda: Embedding(-2, 3, rng=RNG), "num_embeddings wants a whole number"),
    (lambda: Embedding(2, "3", rng=RNG), "embedding_dim wants a whole number"),
    (lambda: LayerNorm(0), "width wants a whole number"), (lambda: RMSNorm(2.5), "width wants a whole number"),
    (lambda: LayerNorm(2, eps=NAN), "eps wants a finite number"),
    (lambda: Attention(4, 0, rng=RNG), "heads wants a whole number"),
    (lambda: Attention(4, 2, rng=RNG, key_value_heads=0), "key_value_heads wants a whole number"),
    (lambda: Context().add_loss("z", 3.0), "wants a scalar Tensor"),
    (lambda: build("gpt").to(device="cuda"), "unknown keyword 'device': did you mean 'backend'"),
])
def test_a_layer_of_a_size_without_sense(make, words):
    check_sentence(make, (TypeError, ValueError), words)


def test_numpy_numbers_in_fields_keep_the_model_in_float32():
    """NumPy would compute the product of a float32 array and an np.float64 in float64."""
    half = np.float64(0.5)
    config = GPTConfig(np.int64(23), np.int32(24), 12, 2, 3, eps=np.float64(1e-5), dropout=half, std=half)
    model = GPT(config)
    for method in (LoRA(r=np.int64(2), alpha=half, dropout=half), Houlsby(m=2, std=half), PrefixTuning(p=2, std=half)):
        attach(model, method)
        assert model.train()(IDS, rng=np.random.default_rng(0)).dtype == np.float32
        assert {p.dtype for p in model.parameters()} == {np.dtype(np.float32)}
        detach(model)

"""config.json, key by key: what changes the mathematics reaches the model or is refused, by the table in config_keys.

The properties take a reader, so that readers with a planted fault can be shown to them.
"""
from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from config_keys import ALIASES, CONFIG, FAMILIES, HARMLESS, READ, READ_BY_A_CLASSIFIER, REFUSED
from safetensors.numpy import load_file, save_file

from tinyft.formats import huggingface, load, save
from tinyft.formats.config import check_kept
from tinyft.formats.layout import Plan
from tinyft.models import BERT, GPT, BERTConfig, GPTConfig

Reader = Callable[[dict], Plan]
LANGUAGE_MODEL = {"gpt2": "GPT2LMHeadModel", "bert": "BertForMaskedLM"}
CLASSIFIER = {"gpt2": "GPT2ForSequenceClassification", "bert": "BertForSequenceClassification"}


def read(config: dict) -> Plan:
    """The plan of a language model, through JSON as from a file."""
    family = next(family for family in huggingface.FAMILIES if family.model_type == config["model_type"])
    config = json.loads(json.dumps({"architectures": [LANGUAGE_MODEL[family.model_type]], **config}))
    check_kept(config)
    return family.read_config(config, ())


def rows(table: dict[str, dict]) -> list[tuple[str, str]]:
    """(family, key) of every row of a table."""
    return [(family, key) for family in FAMILIES for key in table[family]]


def refuses(reader: Reader, config: dict, key: str) -> None:
    """The reader raises one sentence that names the key."""
    with pytest.raises(ValueError, match=rf"config.json: .*\b{re.escape(key)}\b.* got ") as error:
        reader(config)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def check_read(reader: Reader, family: str, key: str) -> None:
    """Another value gives another model."""
    base = CONFIG[family]
    assert reader({**base, key: READ[family][key]}) != reader(base)


def check_refused(reader: Reader, family: str, key: str) -> None:
    """The values of our model, and no value, give the same model; any other value is refused."""
    base = CONFIG[family]
    allowed, others = REFUSED[family][key]
    for value in allowed:
        assert reader({**base, key: value}) == reader(base)
    for value in others:
        refuses(reader, {**base, key: value}, key)


def check_harmless(reader: Reader, family: str, key: str) -> None:
    """Any value gives the same model."""
    base = CONFIG[family]
    assert reader({**base, key: HARMLESS[family][key]}) == reader(base)


@pytest.mark.parametrize("family, key", rows(READ))
def test_a_setting_reaches_the_model(family, key):
    check_read(read, family, key)


@pytest.mark.parametrize("family, key", rows(REFUSED))
def test_a_setting_that_our_model_does_not_have_is_refused(family, key):
    check_refused(read, family, key)


@pytest.mark.parametrize("family, key", rows(HARMLESS))
def test_other_settings_change_nothing(family, key):
    check_harmless(read, family, key)


@pytest.mark.parametrize("family, key", rows(READ))
@pytest.mark.parametrize("value", ["24", [24], {}, True, -1, float("nan"), float("inf"), 10**400, "", 1e301])
def test_nonsense_in_a_size_or_a_rate_is_refused(family, key, value):
    refuses(read, {**CONFIG[family], key: value}, key)


@pytest.mark.parametrize("family, key", rows(ALIASES))
def test_a_setting_under_its_other_name(family, key):
    """The other name is read, also beside the own name with the same value; two values are refused."""
    own = ALIASES[family][key]
    value = READ[family][own]
    wanted = read({**CONFIG[family], own: value})
    without = {name: v for name, v in CONFIG[family].items() if name != own}
    assert read({**without, key: value}) == wanted
    assert read({**without, own: value, key: value}) == wanted
    refuses(read, {**CONFIG[family], key: value}, key)
    refuses(read, {**without, key: "24"}, own)


# ── planted faults ───────────────────────────────────────────────────────────────────────────────────────────────────
def without(key: str) -> Reader:
    """A reader that ignores a key."""
    def wrong(config: dict) -> Plan:
        return read({name: value for name, value in config.items() if name != key})
    return wrong


def strict_about(key: str) -> Reader:
    """A reader that refuses a key whatever its value."""
    def wrong(config: dict) -> Plan:
        if key in config and config != CONFIG[config["model_type"]]:
            raise ValueError(f"config.json: {key} wants nothing, got {config[key]}")
        return read(config)
    return wrong


@pytest.mark.parametrize("check, family, key, wrong", [
    (check_read, "gpt2", "layer_norm_epsilon", without),
    (check_read, "bert", "type_vocab_size", without),
    (check_refused, "gpt2", "scale_attn_weights", without),
    (check_refused, "gpt2", "activation_function", without),
    (check_refused, "bert", "position_embedding_type", without),
    (check_refused, "bert", "tie_word_embeddings", without),
    (check_refused, "bert", "hidden_act", strict_about),
    (check_harmless, "gpt2", "use_cache", strict_about),
])
def test_a_reader_with_a_fault_is_found(check, family, key, wrong):
    check(read, family, key)
    with pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
        check(wrong(key), family, key)


# ── classifiers, names of classes, ids of tokens ─────────────────────────────────────────────────────────────────────
def read_classifier(config: dict) -> Plan:
    """The plan of a classifier."""
    return read({"architectures": [CLASSIFIER[config["model_type"]]], **config})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_number_of_classes(family):
    """By num_labels, by id2label or by both if they agree; 2 if neither is there. Ties do not matter without an output
    layer for the vocabulary."""
    base = CONFIG[family]
    for key, value in READ_BY_A_CLASSIFIER.items():
        assert read_classifier({**base, key: value}).classes == 4
    assert read_classifier({**base, **READ_BY_A_CLASSIFIER}).classes == 4
    assert read_classifier({**base, "num_labels": None}).classes == 2
    refuses(read_classifier, {**base, **READ_BY_A_CLASSIFIER, "num_labels": 3}, "num_labels")
    assert read_classifier({**base, "tie_word_embeddings": False}) == read_classifier(base)


@pytest.mark.parametrize("key, value", [
    ("num_labels", "3"), ("num_labels", 0), ("num_labels", 2.0), ("id2label", ["a", "b"]), ("id2label", 3),
    ("id2label", {"a": 0}), ("label2id", ["a"]), ("problem_type", "nonsense"), ("problem_type", 3),
    ("pad_token_id", "0"), ("pad_token_id", [0]), ("bos_token_id", 1.5), ("eos_token_id", ["a"]),
    ("eos_token_id", True), ("architectures", [3]), ("architectures", {"a": 1}),
])
@pytest.mark.parametrize("family", FAMILIES)
def test_nonsense_in_what_is_kept_for_saving_is_refused(family, key, value):
    refuses(read_classifier, {**CONFIG[family], key: value}, key)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_ends_of_text(family):
    assert read({**CONFIG[family], "eos_token_id": [3, 4]}) == read(CONFIG[family])


MODELS: dict[str, Any] = {
    "gpt2": GPT(GPTConfig(vocab=20, positions=8, width=8, layers=1, heads=2)),
    "bert": BERT(BERTConfig(vocab=20, positions=8, width=8, layers=1, heads=2)),
}
OUTPUT_LAYER = {
    "gpt2": ("transformer.wte.weight", "lm_head.weight"),
    "bert": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_output_layer_that_is_not_tied_is_refused_also_with_equal_values(family, tmp_path):
    """The two would have the same values at the start and train apart. A file with the tied weight twice loads."""
    save(MODELS[family], tmp_path)
    embedding, output = OUTPUT_LAYER[family]
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, output: tensors[embedding].copy()}, tmp_path / "model.safetensors")
    load(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": False}))
    with pytest.raises(ValueError, match="wants tie_word_embeddings True, got False"):
        load(tmp_path)

"""config.json, key by key: what changes the mathematics reaches the model or is refused, by the table in config_keys.

The properties take a reader, so that readers with a planted fault can be shown to them.
"""
from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from config_keys import (
    ALIASES,
    CONFIG,
    FAMILIES,
    HARMLESS,
    NEWER,
    OF_CLASSIFIERS,
    READ,
    READ_BY_A_CLASSIFIER,
    REFUSED,
    WITH_CLASSIFIER,
)
from helpers import host, wrong_answers
from safetensors.numpy import load_file, save_file

from tinyft.formats import huggingface, load, save
from tinyft.formats.config import check_kept
from tinyft.formats.layout import Plan
from tinyft.models import (
    BERT,
    GPT,
    T5,
    BERTConfig,
    GPTConfig,
    Llama,
    LlamaConfig,
    RotaryScaling,
    Seq2Seq,
    Seq2SeqConfig,
    T5Config,
)

Reader = Callable[[dict], Plan]
LANGUAGE_MODEL = {
    "gpt2": "GPT2LMHeadModel", "bert": "BertForMaskedLM", "distilbert": "DistilBertForMaskedLM",
    "roberta": "RobertaForMaskedLM",
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "marian": "MarianMTModel", "t5": "T5ForConditionalGeneration",
}
CLASSIFIER = {
    "gpt2": "GPT2ForSequenceClassification", "bert": "BertForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification", "roberta": "RobertaForSequenceClassification",
    "llama": "LlamaForSequenceClassification", "mistral": "MistralForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
}
LLAMAS = ("llama", "mistral", "qwen2")


def read(config: dict) -> Plan:
    """The plan of a language model, through JSON as from a file."""
    family = next(family for family in huggingface.FAMILIES if family.model_type == config["model_type"])
    config = json.loads(json.dumps({"architectures": [LANGUAGE_MODEL[family.model_type]], **config}))
    check_kept(config)
    return family.read_config(config, ())


def rows(table: dict[str, dict]) -> list[tuple[str, str]]:
    """(family, key) of every row of a table."""
    return [(family, key) for family in FAMILIES for key in table.get(family, {})]


def other_value(family: str, key: str) -> Any:
    """Another valid value of a key that is read."""
    return {**READ[family], **NEWER.get(family, {})}[key]


def refuses(reader: Reader, config: dict, key: str) -> None:
    """The reader raises one sentence that names the key."""
    with pytest.raises(ValueError, match=rf"config.json: .*\b{re.escape(key)}\b.* got ") as error:
        reader(config)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def check_read(reader: Reader, family: str, key: str) -> None:
    """Another value gives another model."""
    base = CONFIG[family]
    assert reader({**base, key: other_value(family, key)}) != reader(base)


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


@pytest.mark.parametrize("family, key", rows(READ) + rows(NEWER))
def test_a_setting_reaches_the_model(family, key):
    check_read(read, family, key)


@pytest.mark.parametrize("family, key", rows(REFUSED))
def test_a_setting_that_our_model_does_not_have_is_refused(family, key):
    check_refused(read, family, key)


@pytest.mark.parametrize("family, key", rows(HARMLESS))
def test_other_settings_change_nothing(family, key):
    check_harmless(read, family, key)


NONSENSE = ["24", [24], {}, True, -1, float("nan"), float("inf"), 10**400, "", 1e301]


@pytest.mark.parametrize("family, key", rows(READ) + rows(NEWER))
def test_nonsense_in_a_size_or_a_rate_is_refused(family, key):
    for value in NONSENSE:
        is_flag = other_value(family, key) is True
        is_default = value == {} and key == "rope_parameters"                    # every entry of it has a default
        if is_default or (is_flag and value is True):
            continue
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


@wrong_answers
@pytest.mark.parametrize("check, family, key, wrong", [
    (check_read, "gpt2", "layer_norm_epsilon", without),
    (check_read, "bert", "type_vocab_size", without),
    (check_refused, "gpt2", "scale_attn_weights", without),
    (check_refused, "gpt2", "activation_function", without),
    (check_refused, "bert", "position_embedding_type", without),
    (check_refused, "bert", "tie_word_embeddings", without),
    (check_refused, "bert", "hidden_act", strict_about),
    (check_harmless, "gpt2", "use_cache", strict_about),
    (check_read, "llama", "rope_scaling", without),
    (check_read, "qwen2", "rope_parameters", without),
    (check_read, "mistral", "head_dim", without),
    (check_refused, "mistral", "sliding_window", without),
    (check_refused, "qwen2", "use_sliding_window", without),
    (check_refused, "llama", "sliding_window", strict_about),
    (check_harmless, "qwen2", "attention_bias", strict_about),
    (check_read, "roberta", "pad_token_id", without),
    (check_read, "distilbert", "hidden_dim", without),
    (check_refused, "distilbert", "activation", without),
    (check_read, "marian", "scale_embedding", without),
    (check_read, "marian", "activation_function", without),
    (check_refused, "marian", "share_encoder_decoder_embeddings", without),
    (check_read, "t5", "relative_attention_max_distance", without),
    (check_refused, "t5", "dense_act_fn", without),
])
def test_a_reader_with_a_fault_is_found(check, family, key, wrong):
    check(read, family, key)
    with pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
        check(wrong(key), family, key)


# ── classifiers, names of classes, ids of tokens ─────────────────────────────────────────────────────────────────────
def read_classifier(config: dict) -> Plan:
    """The plan of a classifier."""
    return read({"architectures": [CLASSIFIER[config["model_type"]]], **config})


@pytest.mark.parametrize("family", WITH_CLASSIFIER)
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


@pytest.mark.parametrize("family, key", rows({family: OF_CLASSIFIERS.get(family, {}) for family in FAMILIES}))
def test_a_setting_that_only_a_classifier_reads(family, key):
    """Another value gives another classifier, and the same language model; nonsense is refused."""
    base = CONFIG[family]
    value = OF_CLASSIFIERS[family][key]
    assert read_classifier({**base, key: value}) != read_classifier(base)
    assert read({**base, key: value}) == read(base)
    refuses(read_classifier, {**base, key: "24"}, key)


@pytest.mark.parametrize("value", [30, 31, 10**70])
def test_roberta_leaves_a_position_for_the_first_token(value):
    """The positions begin after pad_token_id; the 32 rows of the table end at 31."""
    refuses(read, {**CONFIG["roberta"], "pad_token_id": value + 1}, "pad_token_id")
    assert read({**CONFIG["roberta"], "pad_token_id": 30}).config.positions == 1


@pytest.mark.parametrize("key, value", [
    ("num_labels", "3"), ("num_labels", 0), ("num_labels", 2.0), ("id2label", ["a", "b"]), ("id2label", 3),
    ("id2label", {"a": 0}), ("label2id", ["a"]), ("problem_type", "nonsense"), ("problem_type", 3),
    ("pad_token_id", "0"), ("pad_token_id", [0]), ("bos_token_id", 1.5), ("eos_token_id", ["a"]),
    ("eos_token_id", True), ("architectures", [3]), ("architectures", {"a": 1}),
])
@pytest.mark.parametrize("family", WITH_CLASSIFIER)
def test_nonsense_in_what_is_kept_for_saving_is_refused(family, key, value):
    refuses(read_classifier, {**CONFIG[family], key: value}, key)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_ends_of_text(family):
    assert read({**CONFIG[family], "eos_token_id": [3, 4]}) == read(CONFIG[family])


SIZES = {"vocab": 20, "positions": 8, "width": 8, "layers": 1, "heads": 2}
MODELS: dict[str, Any] = {
    "gpt2": GPT(GPTConfig(**SIZES)),
    "bert": BERT(BERTConfig(**SIZES)),
    "distilbert": BERT(BERTConfig(**SIZES, token_types=0, pooler_activation="relu")),
    "roberta": BERT(BERTConfig(**SIZES, first_position=2, keep_pooler=False)),
    "llama": Llama(LlamaConfig(**SIZES, tied=True)),
    "mistral": Llama(LlamaConfig(**SIZES, tied=True)),
    "qwen2": Llama(LlamaConfig(**SIZES, tied=True, qkv_bias=True)),
    "marian": Seq2Seq(Seq2SeqConfig(**SIZES)),
    "t5": T5(T5Config(**SIZES, head_width=4)),
}
OUTPUT_LAYER = {
    "gpt2": ("transformer.wte.weight", "lm_head.weight"),
    "bert": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    **dict.fromkeys(LLAMAS, ("model.embed_tokens.weight", "lm_head.weight")),
    "distilbert": ("distilbert.embeddings.word_embeddings.weight", "vocab_projector.weight"),
    "roberta": ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
    "marian": ("model.shared.weight", "lm_head.weight"),
    "t5": ("shared.weight", "lm_head.weight"),
}


def change_config(folder: Path, **changes: Any) -> None:
    """Other values in the config.json of a directory."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("family", [family for family in FAMILIES if "tie_word_embeddings" in REFUSED[family]])
def test_an_output_layer_that_is_not_tied_is_refused_also_with_equal_values(family, tmp_path):
    """The two would have the same values at the start and train apart. A file with the tied weight twice loads."""
    save(MODELS[family], tmp_path)
    embedding, output = OUTPUT_LAYER[family]
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, output: tensors[embedding].copy()}, tmp_path / "model.safetensors")
    load(tmp_path)
    change_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="wants tie_word_embeddings True, got False"):
        load(tmp_path)


@pytest.mark.parametrize("family", [family for family in FAMILIES if "tie_word_embeddings" in READ[family]])
def test_config_json_decides_whether_the_output_layer_is_tied(family, tmp_path):
    """Tied: one tensor, also if the file has it twice; two values are refused. Not tied: two that train apart, also
    with equal values."""
    save(MODELS[family], tmp_path)
    change_config(tmp_path, model_type=family, architectures=[LANGUAGE_MODEL[family]], sliding_window=None)
    embedding, output = OUTPUT_LAYER[family]
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert output not in tensors
    for tied in (tensors, {**tensors, output: tensors[embedding].copy()}):
        save_file(tied, file)
        model, _ = load(tmp_path)
        assert model.config.tied and "head.weight" not in model.named_parameters()
    change_config(tmp_path, tie_word_embeddings=False)
    model, _ = load(tmp_path)
    assert not model.config.tied and model.head.weight is not model.embed.weight
    assert (host(model.head.weight) == host(model.embed.weight)).all()
    change_config(tmp_path, tie_word_embeddings=True)
    save_file({**tensors, output: tensors[embedding] + 1}, file)
    with pytest.raises(ValueError, match="lm_head.weight differs from"):
        load(tmp_path)


# ── rotary positions and windows ─────────────────────────────────────────────────────────────────────────────────────
LLAMA3 = {"factor": 8, "low_freq_factor": 1.5, "high_freq_factor": 3.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("family", LLAMAS)
@pytest.mark.parametrize("entry, scaling", [
    (None, None),
    ({"rope_type": "default"}, None),
    ({"type": "linear", "factor": 2}, RotaryScaling("linear", 2.0)),
    ({"type": "linear", "rope_type": "linear", "factor": 0.5}, RotaryScaling("linear", 0.5)),
    ({"rope_type": "llama3", **LLAMA3}, RotaryScaling("llama3", 8.0, low=1.5, high=3.0, original=16)),
])
def test_the_scaling_of_rotary_positions_is_read_from_both_places(family, entry, scaling):
    """rope_scaling beside rope_theta, and rope_parameters, which holds both; both places, if they agree."""
    older = {**CONFIG[family], "rope_theta": 50.0, "rope_scaling": entry}
    newer = {"rope_parameters": {**(entry or {}), "rope_theta": 50.0}}
    plan = read(older)
    assert (plan.config.rope_base, plan.config.rope_scaling) == (50.0, scaling)
    assert read({**CONFIG[family], **newer}) == plan == read({**older, **newer})
    assert read({**CONFIG[family], "rope_parameters": {}}) == read(CONFIG[family])


@pytest.mark.parametrize("change", [
    {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "yarn", "factor": 2.0}, {"type": "longrope"},
    {"factor": 2.0},
    {"type": "linear", "rope_type": "llama3", **LLAMA3}, {"rope_type": ["linear"], "factor": 2.0},
    {"rope_type": "linear"}, {"rope_type": "linear", "factor": 0}, {"rope_type": "linear", "factor": "2"},
    {"rope_type": "linear", "factor": float("nan")}, {"rope_type": "linear", "factor": True},
    {"rope_type": "llama3", **LLAMA3, "low_freq_factor": None}, {"rope_type": "llama3", **LLAMA3, "factor": -1},
    {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 3.0},
    {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 0},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
])
def test_a_scaling_that_is_not_ours_is_refused(change):
    refuses(read, {**CONFIG["llama"], "rope_scaling": change}, "rope_scaling")
    has_kind = "rope_type" in change or "type" in change
    if has_kind:
        refuses(read, {**CONFIG["llama"], "rope_parameters": change}, "rope_parameters")


ANYTHING = [None, True, 0, -3, 10**400, 0.5, float("nan"), "", "x" * 1000, [], [None], [[1]], {}, {"a": {}}, "default"]


@pytest.mark.parametrize("family", LLAMAS)
def test_any_value_of_any_key_is_read_or_refused_in_a_sentence(family):
    """Also of an entry of rope_scaling and rope_parameters, and of two keys at once."""
    rng = np.random.default_rng(0)
    keys = [*READ[family], *REFUSED[family], *NEWER[family], *HARMLESS[family], "max_window_layers", "layer_types"]
    inner = ["rope_type", "type", "partial_rotary_factor", *LLAMA3]

    def change(key: str) -> Any:
        if key.startswith("rope_") and key != "rope_theta" and rng.random() < 0.8:
            entry = {"rope_type": "llama3", **LLAMA3, "rope_theta": 30.0}
            return {**entry, inner[rng.integers(len(inner))]: ANYTHING[rng.integers(len(ANYTHING))]}
        return ANYTHING[rng.integers(len(ANYTHING))]

    refused = 0
    for _ in range(1500):
        two = {keys[i]: change(keys[i]) for i in rng.integers(len(keys), size=2)}
        try:
            read({**CONFIG[family], **two})
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 700
            refused += 1
    assert 500 < refused < 1500


@pytest.mark.parametrize("key, value", [("rope_theta", 3.0), ("rope_scaling", {"type": "linear", "factor": 3.0})])
def test_two_places_that_contradict_each_other_are_refused(key, value):
    newer = {"rope_type": "linear", "factor": 2.0, "rope_theta": 2.0}
    refuses(read, {**CONFIG["llama"], "rope_parameters": newer, key: value}, "rope_parameters")
    refuses(read, {**CONFIG["llama"], "rope_parameters": newer, key: value}, key)


@pytest.mark.parametrize("settings", [
    {"max_window_layers": 2}, {"max_window_layers": 28}, {"sliding_window": None}, {"sliding_window": 32},
    {"layer_types": ["full_attention"] * 2}, {"layer_types": ["sliding_attention"] * 2, "sliding_window": 32},
])
def test_a_window_of_qwen2_that_hides_nothing_is_allowed(settings):
    assert read({**CONFIG["qwen2"], "use_sliding_window": True, **settings}) == read(CONFIG["qwen2"])


@pytest.mark.parametrize("settings", [
    {}, {"max_window_layers": 1}, {"sliding_window": 31}, {"layer_types": ["full_attention", "sliding_attention"]},
    {"layer_types": ["sliding_attention"] * 2, "sliding_window": None},
])
def test_a_window_of_qwen2_that_hides_a_key_is_refused(settings):
    refuses(read, {**CONFIG["qwen2"], "use_sliding_window": True, **settings}, "sliding_window")


def test_without_the_key_a_mistral_has_a_window():
    """Of 4,096 positions: transformers' default."""
    without_window = {key: value for key, value in CONFIG["mistral"].items() if key != "sliding_window"}
    refuses(read, {**without_window, "max_position_embeddings": 4097}, "sliding_window")
    assert read(without_window) == read(CONFIG["mistral"])


@pytest.mark.parametrize("family", LLAMAS)
def test_a_class_without_a_head_has_an_output_layer_only_if_the_file_has_one(family):
    """A tied one is the embedding, which every file has."""
    name = LANGUAGE_MODEL[family].replace("ForCausalLM", "Model")
    untied = {**CONFIG[family], "architectures": [name]}
    reader = next(f for f in huggingface.FAMILIES if f.model_type == family)
    assert reader.read_config(untied, ()).head is None
    assert reader.read_config(untied, ("lm_head.weight",)).head == "lm"
    assert reader.read_config({**untied, "tie_word_embeddings": True}, ()).head == "lm"
    assert reader.read_config(CONFIG[family], ()).head is None
    assert reader.read_config(CONFIG[family], ("score.weight",)).head == "classes"

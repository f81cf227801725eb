"""transformers beside formats/config.py: the table of keys in config_keys.py covers its configurations, and is true.

A key that is read gives the same logits in both libraries; a key that is harmless leaves theirs as they were; a key
that is refused changes theirs. And tokenizer_config.json: both libraries give the same ids.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from config_keys import (
    ALIASES,
    CONFIG,
    ENCODER_DECODERS,
    FAMILIES,
    HARMLESS,
    OF_CLASSIFIERS,
    READ,
    READ_BY_A_CLASSIFIER,
    REFUSED,
    WITH_CLASSIFIER,
)
from helpers import host
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import tinyft
from tinyft.formats import load, save
from tinyft.formats.huggingface import _read_tokenizer

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'tinyft[peers]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'tinyft[peers]'")
from transformers import (  # noqa: E402
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MarianConfig,
    MarianMTModel,
    MistralConfig,
    MistralForCausalLM,
    MistralForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

CONFIGS = {
    "gpt2": GPT2Config, "bert": BertConfig, "distilbert": DistilBertConfig, "roberta": RobertaConfig,
    "llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "marian": MarianConfig,
    "t5": T5Config,
}
MODELS = {
    "gpt2": GPT2LMHeadModel, "bert": BertForMaskedLM, "distilbert": DistilBertForMaskedLM,
    "roberta": RobertaForMaskedLM, "llama": LlamaForCausalLM, "mistral": MistralForCausalLM, "qwen2": Qwen2ForCausalLM,
    "marian": MarianMTModel, "t5": T5ForConditionalGeneration,
}
CLASSIFIERS = {
    "gpt2": GPT2ForSequenceClassification, "bert": BertForSequenceClassification,
    "distilbert": DistilBertForSequenceClassification, "roberta": RobertaForSequenceClassification,
    "llama": LlamaForSequenceClassification, "mistral": MistralForSequenceClassification,
    "qwen2": Qwen2ForSequenceClassification,
}
IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2]])


def keys(config: Any) -> set[str]:
    """The keys that a configuration of transformers writes."""
    return set(config().to_dict()) - {"model_type", "architectures"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_has_every_key_once(family):
    """Also every other name of a key; a key that transformers does not write is there because old files have it."""
    parts = [set(READ[family]), set(REFUSED[family]), set(HARMLESS[family]), set(READ_BY_A_CLASSIFIER),
             set(OF_CLASSIFIERS.get(family, ()))]
    table = set().union(*parts)
    assert sum(map(len, parts)) == len(table)
    assert keys(CONFIGS[family]) <= table
    assert CONFIGS[family].attribute_map == ALIASES.get(family, {})


def theirs(kind: Any, config: dict) -> Any:
    """A random model of transformers. Its weights are not small, so that a wrong setting shows."""
    torch.manual_seed(0)
    config_class = CONFIGS[config["model_type"]]
    # The attention written out: their fused one ignores scale_attn_weights.
    model = kind(config_class.from_dict({"pad_token_id": 0, **config}, attn_implementation="eager")).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:                            # Marian's sinusoids are fixed
                p.add_(torch.randn_like(p) * 0.2)
    return model


def logits(model: Any) -> np.ndarray:
    """Their logits on IDS; a setting may make the call return a tuple."""
    source = {"decoder_input_ids": torch.tensor(IDS)} if model.config.model_type in ENCODER_DECODERS else {}
    with torch.no_grad():
        return model(torch.tensor(IDS), **source, return_dict=True).logits.numpy()


def agree(model: Any, config: dict, folder: Path) -> None:
    """Their model and ours, from its directory with this config.json, compute the same."""
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": written["architectures"]}))
    want = logits(model)
    source = {"source_ids": IDS} if config["model_type"] in ENCODER_DECODERS else {}
    got = host(load(folder)[0](IDS, **source))
    assert np.abs(got - want).max() <= 1e-5 * max(np.abs(want).max(), 1)


@pytest.mark.parametrize("family, key", [(family, key) for family in FAMILIES for key in READ[family]])
def test_a_key_that_is_read_gives_their_logits(family, key, tmp_path):
    config = {**CONFIG[family], key: READ[family][key]}
    agree(theirs(MODELS[family], config), config, tmp_path)


@pytest.mark.parametrize("family, key", [(family, key) for family in FAMILIES for key in ALIASES.get(family, {})])
def test_another_name_gives_their_logits(family, key, tmp_path):
    """They read the other name too."""
    own = ALIASES[family][key]
    config = {name: value for name, value in CONFIG[family].items() if name != own}
    config[key] = READ[family][own]
    model = theirs(MODELS[family], config)
    assert getattr(model.config, own) == READ[family][own]
    agree(model, config, tmp_path)


ALLOWED = [(family, key, value) for family in FAMILIES for key, (allowed, _) in REFUSED[family].items()
           for value in allowed]


@pytest.mark.parametrize("family, key, value", ALLOWED)
def test_the_values_of_our_model_give_their_logits(family, key, value, tmp_path):
    """Also those that are spelled in another way, such as gelu_fast."""
    config = {**CONFIG[family], key: value}
    given = {} if value is None else {key: value}          # they cannot be made from null, and read it from a file
    agree(theirs(MODELS[family], {**CONFIG[family], **given}), config, tmp_path)


@pytest.mark.parametrize("family", WITH_CLASSIFIER)
@pytest.mark.parametrize("key", READ_BY_A_CLASSIFIER)
def test_the_number_of_classes_gives_their_logits(family, key, tmp_path):
    config = {**CONFIG[family], key: READ_BY_A_CLASSIFIER[key], "pad_token_id": 0}
    agree(theirs(CLASSIFIERS[family], config), config, tmp_path)


def changes(family: str, settings: dict) -> bool:
    """True if their logits, with the same weights, are others with these settings."""
    before = theirs(MODELS[family], CONFIG[family])
    after = theirs(MODELS[family], {**CONFIG[family], **settings})
    after.load_state_dict(before.state_dict())
    return np.abs(logits(after) - logits(before)).max() > 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_harmless_keys_leave_their_logits(family):
    """All of them at once, with another value each. dtype is that of the weights in memory: `load` has an argument.

    Their own Llama fails if its configuration asks for a tuple in the place of a record."""
    not_tried = {"dtype", "torch_dtype"}
    if family in ("llama", "mistral", "qwen2"):
        not_tried.add("return_dict")
    values = {key: value for key, value in HARMLESS[family].items() if key not in not_tried}
    assert not changes(family, values)


MATTERS = [
    ("gpt2", "activation_function", "gelu"), ("gpt2", "activation_function", "relu"),
    ("gpt2", "scale_attn_weights", False), ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("bert", "hidden_act", "gelu_new"), ("bert", "hidden_act", "silu"),
    ("bert", "position_embedding_type", None), ("bert", "is_decoder", True),
    ("llama", "hidden_act", "gelu"), ("mistral", "hidden_act", "relu"), ("qwen2", "hidden_act", "sigmoid"),
    ("mistral", "sliding_window", 8), ("qwen2", "use_sliding_window", True),
    ("distilbert", "activation", "gelu_new"), ("distilbert", "activation", "relu"),
    ("roberta", "hidden_act", "gelu_new"), ("roberta", "position_embedding_type", None),
    ("roberta", "is_decoder", True),
]


@pytest.mark.parametrize("family, key, value", MATTERS)
def test_a_refused_key_changes_their_logits(family, key, value):
    assert value in REFUSED[family][key][1]
    assert changes(family, {key: value})


@pytest.mark.parametrize("family", FAMILIES)
def test_without_ties_the_output_layer_is_another_tensor(family):
    """So equal values at the start train apart. With ties it is the embedding."""
    for tied in (False, True):
        model = theirs(MODELS[family], {**CONFIG[family], "tie_word_embeddings": tied})
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


# ── tokenizers ───────────────────────────────────────────────────────────────────────────────────────────────────────
TEXTS = ["hello world", " Hello  wörld, HELLO", "[MASK] hello [CLS]", "世界 hello", "new hello newer", "<s>hello</s>"]
SPECIAL = ["[UNK]", "[PAD]", "[MASK]", "[SEP]", "[CLS]"]


def word_piece(*, names: bool = True, **settings: Any) -> Tokenizer:
    """BERT's kind, with [CLS] and [SEP] at 7 and 6. names: the names of special tokens in a text are these tokens."""
    words = ["hello", "Hello", "world", "wörld", "HELLO", ",", "世", "界", "##界", "w", "##o", "new", "##er", "<s>"]
    ids = {token: i for i, token in enumerate(["x", "y", "z", *SPECIAL, *words])}
    out = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    out.normalizer = normalizers.BertNormalizer(**settings)
    out.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pairs = [(token, ids[token]) for token in ("[CLS]", "[SEP]")]
    out.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=pairs)
    if names:
        out.add_special_tokens(SPECIAL)
    return out


def byte_pairs(*, add_prefix_space: bool) -> Tokenizer:
    """GPT-2's kind, without merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*letters, "<|endoftext|>"]
    out = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    return out


def padded(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with padding and truncation, as sentence models ship it."""
    tokenizer.enable_padding(length=20, pad_id=4, pad_token="[PAD]")
    tokenizer.enable_truncation(3)
    return tokenizer


BERT_CLASS = {"tokenizer_class": "BertTokenizer"}
CASED = {**BERT_CLASS, "do_lower_case": False}
GPT2_CLASS = {"tokenizer_class": "GPT2Tokenizer"}
FAST_CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}
NEW = {"content": "new", "special": False}
END = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False, "rstrip": False,
       "single_word": False, "special": True}
TOKENIZERS = {
    "padding and truncation": (padded(word_piece()), {**BERT_CLASS, "do_lower_case": True}),
    "lower case": (word_piece(lowercase=False), {**BERT_CLASS, "do_lower_case": True}),
    "not lower case": (word_piece(lowercase=True), CASED),
    "accents": (word_piece(lowercase=False), {**CASED, "strip_accents": True}),
    "no accents": (word_piece(strip_accents=True), {**BERT_CLASS, "do_lower_case": True, "strip_accents": False}),
    "accents by case": (word_piece(lowercase=False, strip_accents=True), {**CASED, "strip_accents": None}),
    "characters": (word_piece(handle_chinese_chars=True), {**CASED, "tokenize_chinese_chars": False}),
    "a prefix space": (byte_pairs(add_prefix_space=False), {**GPT2_CLASS, "add_prefix_space": True}),
    "no prefix space": (byte_pairs(add_prefix_space=True), {**GPT2_CLASS, "add_prefix_space": False}),
    "of any class": (byte_pairs(add_prefix_space=True), {**FAST_CLASS, "add_prefix_space": False}),
    "special names": (word_piece(names=False), {**FAST_CLASS, "mask_token": "[MASK]", "cls_token": "[CLS]"}),
    "names as text": (word_piece(), {**FAST_CLASS, "mask_token": "[MASK]", "split_special_tokens": True}),
    "more special": (word_piece(), {**FAST_CLASS, "additional_special_tokens": ["hello"]}),
    "another one": (word_piece(), {**FAST_CLASS, "bos_token": "<s>", "eos_token": END}),
    "an added token": (word_piece(), {**FAST_CLASS, "added_tokens_decoder": {"22": {**NEW, "content": "wörld,"}}}),
    "a single word": (word_piece(), {**FAST_CLASS, "added_tokens_decoder": {"19": {**NEW, "single_word": True}}}),
    "stripped": (word_piece(), {**FAST_CLASS, "added_tokens_decoder": {"19": {**NEW, "lstrip": True}}}),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_gives_their_ids(name, tmp_path):
    """Also after our `save`, and for the names of special tokens."""
    tokenizer, settings = TOKENIZERS[name]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = CONFIG["gpt2" if settings == GPT2_CLASS else "bert"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = _read_tokenizer(tmp_path)
    them = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert ours.encode(text).ids == them(text)["input_ids"], text
    for kind, token in ours.special_tokens.items():
        assert getattr(them, f"{kind}_token") == token
        assert getattr(them, f"{kind}_token_id") == ours.token_to_id(token)
    model = tinyft.GPT(tinyft.GPTConfig(vocab=300, positions=8, width=8, layers=1, heads=2))
    save(model, tmp_path / "saved", ours)
    again = load(tmp_path / "saved")[1]
    them = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TEXTS:
        assert again.encode(text).ids == them(text)["input_ids"], text

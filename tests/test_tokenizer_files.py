"""tokenizer_config.json beside tokenizer.json: what it says goes, and both are written so that they are read again.

peers/test_configurations.py compares the ids with those of transformers.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import host_only
from test_tokens import SPECIAL, TEXT, byte_pairs, unigram, with_padding, word_piece
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from tinyft import GPT, GPTConfig, data, load, save
from tinyft.formats.huggingface import _read_tokenizer

pytestmark = host_only

SETTINGS = "tokenizer_config.json"


def read(folder: Path, tokenizer: Tokenizer, settings: Any) -> Tokenizer:
    """The tokenizer of a directory with these two files."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / SETTINGS).write_text(json.dumps(settings))
    return _read_tokenizer(folder)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text, without special tokens."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_padding_and_truncation_are_off(tmp_path):
    """The ids are those of the same tokenizer without them."""
    tokenizer = read(tmp_path, with_padding(word_piece(SPECIAL)), {})
    assert tokenizer.padding is None and tokenizer.truncation is None
    assert tokenizer.encode(TEXT).ids == word_piece(SPECIAL).encode(TEXT).ids


def cased(**settings: Any) -> Tokenizer:
    """A tokenizer that keeps case and accents."""
    out = word_piece(SPECIAL)
    out.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False, **settings)
    return out


def in_sequence(tokenizer: Tokenizer) -> Tokenizer:
    """The same normalizer and pre-tokenizer, as parts of sequences."""
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), tokenizer.normalizer or normalizers.NFC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([tokenizer.pre_tokenizer])
    return tokenizer


def same(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer as it is."""
    return tokenizer


@pytest.mark.parametrize("wrap", [same, in_sequence])
def test_case_accents_and_spaces_are_those_of_the_settings(wrap, tmp_path):
    """Also where normalizer and pre-tokenizer are parts of sequences. Without a setting tokenizer.json decides."""
    one = word_piece(SPECIAL).token_to_id("one")
    assert ids(read(tmp_path, wrap(cased()), {}), "One") != [one]
    assert ids(read(tmp_path, wrap(cased()), {"do_lower_case": True}), "One") == [one]
    assert ids(read(tmp_path, wrap(word_piece(SPECIAL)), {"do_lower_case": False}), "One") != [one]
    assert ids(read(tmp_path, wrap(cased()), {"strip_accents": True}), "öne") == [one]
    assert ids(read(tmp_path, wrap(word_piece(SPECIAL)), {"strip_accents": False}), "öne") != [one]
    with_space = ids(byte_pairs(SPECIAL), " one")
    assert ids(read(tmp_path, wrap(byte_pairs(SPECIAL)), {"add_prefix_space": True}), "one") == with_space
    spaced = byte_pairs(SPECIAL)
    spaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert ids(read(tmp_path, wrap(spaced), {"add_prefix_space": False}), "one") == with_space[1:]


def test_lower_case_without_a_normalizer_of_bert(tmp_path):
    """It is added; a tokenizer that lowers the case in another way cannot be told not to, and is refused."""
    plain = ids(byte_pairs(SPECIAL), "one")
    assert ids(read(tmp_path, byte_pairs(SPECIAL), {"do_lower_case": True}), "ONE") == plain
    assert ids(read(tmp_path, unigram(SPECIAL), {"do_lower_case": False}), "one") == ids(unigram(SPECIAL), "one")
    lowered = byte_pairs(SPECIAL)
    lowered.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="do_lower_case wants a tokenizer.json that keeps the case, got false"):
        read(tmp_path, lowered, {"do_lower_case": False})


def test_special_tokens_have_the_names_of_the_settings(tmp_path):
    """special_tokens_map.json is read too, and goes behind. `data` takes the names from the loaded tokenizer."""
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"sep_token": "[MASK]", "cls_token": "[PAD]"}))
    tokenizer = read(tmp_path, word_piece(SPECIAL), {"cls_token": {"content": "[UNK]"}, "mask_token": None})
    assert tokenizer.special_tokens == {"sep": "[MASK]", "cls": "[UNK]"}
    first, *_, last = data.encode(tokenizer, TEXT, 20)
    assert [first, last] == [tokenizer.token_to_id("[UNK]"), tokenizer.token_to_id("[MASK]")]


def test_special_tokens_that_no_setting_names(tmp_path):
    """The class of the tokenizer has some, and stored padding names its token. A setting goes before both."""
    stored = with_padding(word_piece(SPECIAL))
    assert read(tmp_path, stored, {}).special_tokens == {"pad": "[PAD]"}
    found = read(tmp_path, stored, {"tokenizer_class": "BertTokenizerFast", "pad_token": "[UNK]"}).special_tokens
    assert found == {"unk": "[UNK]", "sep": "[SEP]", "pad": "[UNK]", "cls": "[CLS]", "mask": "[MASK]"}
    found = read(tmp_path, byte_pairs(["<|endoftext|>"]), {"tokenizer_class": "GPT2Tokenizer"}).special_tokens
    assert found == dict.fromkeys(["bos", "eos", "unk"], "<|endoftext|>")
    assert read(tmp_path, word_piece(["[UNK]"]), {"tokenizer_class": "GPT2Tokenizer"}).special_tokens == {}


def test_tokens_beside_the_vocabulary(tmp_path):
    """They get the ids of the settings, and are found in texts; a special token is not there yet comes last."""
    size = word_piece(SPECIAL).get_vocab_size()
    added = {str(size + 1): {"content": "ten"}, str(size): {"content": "eleven", "special": True}}
    tokenizer = read(tmp_path, word_piece(SPECIAL), {"added_tokens_decoder": added, "bos_token": "<start>"})
    assert ids(tokenizer, "one eleven ten") == [tokenizer.token_to_id("one"), size, size + 1]
    assert tokenizer.token_to_id("<start>") == size + 2
    with pytest.raises(ValueError, match=f"wants ten at id 90, got a tokenizer.json that has it at {size}"):
        read(tmp_path, word_piece(SPECIAL), {"added_tokens_decoder": {"90": {"content": "ten"}}})


@pytest.mark.parametrize("settings, message", [
    ({"do_lower_case": "yes"}, "do_lower_case wants True or False, got 'yes'"),
    ({"strip_accents": 1}, "strip_accents"),
    ({"add_prefix_space": [True]}, "add_prefix_space"),
    ({"split_special_tokens": "no"}, "split_special_tokens"),
    ({"cls_token": 3}, "cls_token wants a token, .*got 3"),
    ({"cls_token": {"text": "a"}}, "cls_token wants a token"),
    ({"mask_token": {"content": "[MASK]", "lstrip": "no"}}, "lstrip wants True or False"),
    ({"additional_special_tokens": "<a>"}, "additional_special_tokens wants a list of tokens, got '<a>'"),
    ({"additional_special_tokens": [None]}, "additional_special_tokens wants a token"),
    ({"added_tokens_decoder": ["<a>"]}, "added_tokens_decoder wants an object from ids to tokens"),
    ({"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder wants an object from ids"),
    ({"added_tokens_decoder": {"3": "a"}}, "wants a at id 3, got"),
    ([], "is damaged"),
])
def test_nonsense_in_the_settings_is_refused_in_one_sentence(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, word_piece(SPECIAL), settings)
    assert SETTINGS in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [
    {"model_max_length": 10**30, "clean_up_tokenization_spaces": True, "padding_side": "left", "tokenizer_class": "X"},
    {"do_lower_case": None, "add_prefix_space": None, "cls_token": None, "added_tokens_decoder": None},
])
def test_other_settings_change_no_ids(settings, tmp_path):
    """Length and side of padding are arguments here; null stands for no setting."""
    tokenizer = read(tmp_path, word_piece(SPECIAL), settings)
    assert tokenizer.encode(TEXT).ids == word_piece(SPECIAL).encode(TEXT).ids


@pytest.mark.parametrize("add_prefix_space", [True, False])
@pytest.mark.parametrize("encode_special_tokens", [True, False])
def test_a_saved_tokenizer_gives_the_same_ids(add_prefix_space, encode_special_tokens, tmp_path):
    """Also what tokenizer.json has no place for: whether "[MASK]" in a text is text."""
    tokenizer = byte_pairs(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.encode_special_tokens = encode_special_tokens
    tokenizer.special_tokens = {"cls": "[UNK]"}
    save(GPT(GPTConfig(vocab=300, positions=8, width=8, layers=1, heads=2)), tmp_path, tokenizer)
    again = load(tmp_path)[1]
    for text in (TEXT, "a [MASK] b"):
        assert again.encode(text).ids == tokenizer.encode(text).ids
    assert again.special_tokens["cls"] == "[UNK]"
    assert json.loads((tmp_path / SETTINGS).read_text())["add_prefix_space"] == add_prefix_space

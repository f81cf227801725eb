"""The settings of a tokenizer_config.json that change the ids of a tokenizer: applied on loading, written on saving.

The rules are those of transformers: a setting that stands in tokenizer_config.json goes before tokenizer.json.
Padding and truncation stored in tokenizer.json are switched off: a call decides on them, not the file.

    do_lower_case strip_accents tokenize_chinese_chars       settings of the normalizer
    add_prefix_space                                         a space before the first word, in byte-level tokenizers
    split_special_tokens                                     True: "[MASK]" in a text is text
    added_tokens_decoder additional_special_tokens           tokens beside the vocabulary
    cls_token sep_token mask_token pad_token ...             the tokens for each purpose
    chat_template                                            the format of conversations (tinyft/chat.py)
"""
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from .. import checks
from ..files import LARGEST_JSON, check_ordinary
from ..tokens import SPELLINGS, special_token
from .directory import read_json

__all__ = ["configure", "tokenizer_config"]

SETTINGS = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"                                     # of older files; SETTINGS goes before it
TEMPLATE = "chat_template.jinja"                                            # of newer files; it goes before SETTINGS
# Settings of a BertNormalizer: their names in tokenizer_config.json and in the tokenizers library.
NORMALIZER = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
# The kinds of special tokens, in the order in which transformers adds the tokens that are not there yet.
KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# The special tokens of a class of transformers whose settings name none.
OF_BERT = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
OF_CLASS = {
    "BertTokenizer": OF_BERT,
    "DistilBertTokenizer": OF_BERT,
    "RobertaTokenizer": {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": "</s>", "pad": "<pad>", "cls": "<s>",
                         "mask": "<mask>"},
    "GPT2Tokenizer": {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"},
}
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")                   # of an added token


def configure(tokenizer: Tokenizer, folder: Path) -> None:
    """Apply the settings of a directory to the tokenizer that was read from it, in place. Padding and truncation go.

    Its attribute `special_tokens` becomes {kind: token}, {"cls": "[CLS]", ...}, as the directory's files name them, and
    `chat_template` the text of the chat template, or None.
    ValueError if a file is damaged, or contradicts tokenizer.json."""
    padding = tokenizer.padding or {}
    tokenizer.no_padding()
    tokenizer.no_truncation()
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    named = read_json(folder / SPECIAL_MAP) if (folder / SPECIAL_MAP).is_file() else {}
    try:
        _set_normalizer(tokenizer, settings)
        _set_prefix_space(tokenizer, settings)
        _add_tokens(tokenizer, settings.get("added_tokens_decoder"))
        named = {"pad_token": padding.get("pad_token"), **_of_class(tokenizer, settings), **named}
        tokenizer.special_tokens = _add_special_tokens(tokenizer, {**named, **settings})
        if _flag(settings, "split_special_tokens"):
            tokenizer.encode_special_tokens = True
        tokenizer.chat_template = _chat_template(folder, settings.get("chat_template"))
    except (TypeError, ValueError) as e:
        raise ValueError(f"{folder / SETTINGS}: {e}") from e


def _flag(settings: dict, key: str) -> bool | None:
    """A setting that is true or false; None if it is absent or null. TypeError for any other value."""
    value = settings.get(key)
    return None if value is None else checks.flag(key, value)


def _chat_template(folder: Path, entry: Any) -> str | None:
    """The text of a directory's chat template, or None. It has a file of its own, or is an entry of the settings.

    An entry may be a list of named templates: then the one with the name "default" counts. TypeError for any other
    entry."""
    file = folder / TEMPLATE
    if os.path.lexists(file):
        check_ordinary(file)
        if file.stat().st_size > LARGEST_JSON:
            raise ValueError(f"{TEMPLATE} wants at most {LARGEST_JSON:,} bytes, got {file.stat().st_size:,}")
        return file.read_text(encoding="utf-8")          # UnicodeDecodeError is a ValueError
    if isinstance(entry, list):
        texts = {named.get("name"): named.get("template") for named in entry if isinstance(named, dict)}
        entry = texts.get("default")
    if entry is not None:
        checks.instance("chat_template", entry, str, "a text, or a list of named texts")
    return entry


# ── normalizer and pre-tokenizer ─────────────────────────────────────────────────────────────────────────────────────
def _parts(component: Any) -> Iterator[Any]:
    """A normalizer or pre-tokenizer, or the parts of a sequence of them. Nothing for None.

    A sequence inside a sequence is left out: the library gives the inner one again as its own first part."""
    sequences = (normalizers.Sequence, pre_tokenizers.Sequence)
    parts = component if isinstance(component, sequences) else [component]
    for part in parts:
        if part is not None and not isinstance(part, sequences):
            yield part


def _set_normalizer(tokenizer: Tokenizer, settings: dict) -> None:
    """Set what tokenizer_config.json says of the normalizer, in place.

    ValueError if it lowers the case, or does not, where the tokenizer's own normalizer cannot be told so."""
    given = {key: _flag(settings, key) for key in NORMALIZER if key in settings}
    bert = [part for part in _parts(tokenizer.normalizer) if isinstance(part, normalizers.BertNormalizer)]
    for part in bert:
        for key, value in given.items():
            if value is not None or key == "strip_accents":                # null: accents go if the case is lowered
                setattr(part, NORMALIZER[key], value)
    lower_case = given.get("do_lower_case")
    if bert or lower_case is None:
        return
    normalizer = tokenizer.normalizer
    lowers = normalizer is not None and normalizer.normalize_str("A") == "a"
    if lower_case and not lowers:
        before = [] if normalizer is None else [normalizer]
        tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Lowercase()])
    elif lowers and not lower_case:
        raise ValueError("do_lower_case wants a tokenizer.json that keeps the case, got false beside "
                         f"a {type(normalizer).__name__} that lowers it")


def _set_prefix_space(tokenizer: Tokenizer, settings: dict) -> None:
    """Set add_prefix_space of the byte-level pre-tokenizer, in place; other pre-tokenizers have no such space."""
    value = _flag(settings, "add_prefix_space")
    if value is None:
        return
    for part in _parts(tokenizer.pre_tokenizer):
        if isinstance(part, pre_tokenizers.ByteLevel):
            part.add_prefix_space = value


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def _added_token(value: Any, name: str, special: bool) -> AddedToken:
    """An added token from its entry in a file: its text, or an object with its text as `content`, and its flags."""
    if isinstance(value, str):
        value = {"content": value}
    if not isinstance(value, dict) or not isinstance(value.get("content"), str) or not value["content"]:
        raise TypeError(f"{name} wants a token, or an object with its text as content, got {checks.brief(value)}")
    flags = {flag: _flag(value, flag) for flag in FLAGS}
    given = {flag: is_set for flag, is_set in flags.items() if is_set is not None}
    return AddedToken(value["content"], special=special or bool(_flag(value, "special")), **given)


def _add_tokens(tokenizer: Tokenizer, tokens: Any) -> None:
    """Add the tokens of added_tokens_decoder, {id: token}, in place. ValueError if a token has another id already."""
    if tokens is None:
        return
    if not isinstance(tokens, dict) or not all(key.isdecimal() for key in tokens):
        raise TypeError(f"added_tokens_decoder wants an object from ids to tokens, got {checks.brief(tokens)}")
    known = tokenizer.get_added_tokens_decoder()
    for key in sorted(tokens, key=int):
        number = int(key)
        token = _added_token(tokens[key], f"added_tokens_decoder: {key}", special=False)
        if repr(known.get(number)) != repr(token):                         # repr shows the flags, == compares texts
            tokenizer.add_tokens([token])
        got = tokenizer.token_to_id(token.content)
        if got != number:
            raise ValueError(f"added_tokens_decoder wants {token.content} at id {number}, "
                             f"got a tokenizer.json that has it at {got}")


def _of_class(tokenizer: Tokenizer, settings: dict) -> dict[str, str]:
    """The special tokens of the settings' tokenizer_class, as settings, if the tokenizer has them."""
    name = settings.get("tokenizer_class")
    tokens = OF_CLASS.get(name.removesuffix("Fast"), {}) if isinstance(name, str) else {}
    return {f"{kind}_token": token for kind, token in tokens.items() if tokenizer.token_to_id(token) is not None}


def _add_special_tokens(tokenizer: Tokenizer, settings: dict) -> dict[str, str]:
    """{kind: token} of the special tokens that the settings name. A token that is not there yet is added, in place."""
    named = {kind: settings.get(f"{kind}_token") for kind in KINDS}
    others = settings.get("additional_special_tokens")
    if others is not None and not isinstance(others, list):
        raise TypeError(f"additional_special_tokens wants a list of tokens, got {checks.brief(others)}")
    tokens = {kind: _added_token(value, f"{kind}_token", special=True) for kind, value in named.items() if value}
    more = [_added_token(value, "additional_special_tokens", special=True) for value in others or ()]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token in [*tokens.values(), *more]:
        if token.content not in known:
            tokenizer.add_special_tokens([token])
    return {kind: token.content for kind, token in tokens.items()}


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def tokenizer_config(tokenizer: Tokenizer, longest: int) -> dict[str, Any]:
    """The tokenizer_config.json that transformers reads: the longest input, and the special tokens.

    A special token is written if the tokenizer has one of its kind, the chat template if it has one. add_prefix_space
    is written for byte-level tokenizers, since transformers takes it from here.

    longest: the model's number of positions."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": longest}
    for part in _parts(tokenizer.pre_tokenizer):
        if isinstance(part, pre_tokenizers.ByteLevel):
            config["add_prefix_space"] = part.add_prefix_space
    if tokenizer.encode_special_tokens:                    # tokenizer.json has no place for it
        config["split_special_tokens"] = True
    for kind in SPELLINGS:
        token = special_token(tokenizer, kind)
        if token is not None:
            config[f"{kind}_token"] = token
    if getattr(tokenizer, "chat_template", None) is not None:
        config["chat_template"] = tokenizer.chat_template
    return config

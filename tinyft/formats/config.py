"""Values of a config.json, read with checks. A ValueError names the key, the wanted value and the value found.

Each family has three lists of keys: sizes and rates that it reads; names of the same settings in other versions of
transformers (ALIASES); and settings of which its model has one value (FIXED). All other keys change no output of the
classes that the family reads. tests/config_keys.py has the table of every key.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

# The settings of every class of transformers that change its mathematics, with the values that our models have.
FIXED = {
    "is_encoder_decoder": (False,),
    "tie_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "torchscript": (False,),                               # True: the output layer is a copy of the embedding
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}
PROBLEM_TYPES = (None, "single_label_classification", "multi_label_classification", "regression")


def size(config: dict, key: str, default: int | None = None, *, least: int = 1) -> int:
    """A size: a whole number of at least `least`. JSON holds whole numbers below 2^53 exactly."""
    value = config.get(key, default)
    if type(value) is not int or not least <= value < 2**53:
        raise ValueError(f"config.json: {key} wants a whole number of at least {least}, got {short(value)}")
    return value


def token(config: dict, key: str, vocab: int, default: int | None = None) -> int:
    """A token of a vocabulary of `vocab` tokens: a whole number from 0 to vocab − 1."""
    value = size(config, key, default, least=0)
    if value >= vocab:
        raise ValueError(f"config.json: {key} wants a token of the vocabulary of {vocab}, got {value}")
    return value


def number(config: dict, key: str, default: float, below: float = math.inf) -> float:
    """A number of at least 0 and smaller than `below`. null stands for the default."""
    value = config.get(key)
    if value is None:
        value = default
    if type(value) not in (int, float) or not 0 <= value < min(below, 1e300):
        limit = "" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"config.json: {key} wants a number of at least 0{limit}, got {short(value)}")
    return float(value)


def flag(config: dict, key: str, *, default: bool) -> bool:
    """true or false; `default` if the key is missing."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {key} wants true or false, got {short(value)}")
    return value


def short(value: Any) -> str:
    """A value of a config.json as a short text, for an error message."""
    if type(value) is int and abs(value) >= 10**60:        # Python writes no number of more than 4,300 digits
        return "a number of more than 60 digits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def with_one_name(config: dict, aliases: Mapping[str, str]) -> dict:
    """The config with every setting under its own name. `aliases`: {other name: own name}.

    ValueError if the two names of a setting have different values."""
    out = dict(config)
    for alias, key in aliases.items():
        if alias not in config:
            continue
        if key in config and config[key] != config[alias]:
            raise ValueError(f"config.json: {key} and {alias} are two names of one setting; wanted one value, "
                             f"got {short(config[key])} and {short(config[alias])}")
        out[key] = config[alias]
    return out


def check_settings(config: dict, fixed: Mapping[str, Iterable[Any]], model: str) -> None:
    """Refuse settings that this library's model does not have. The first supported value of each is its default."""
    for key, supported in {**FIXED, **fixed}.items():
        supported = list(supported)
        value = config.get(key, supported[0])
        if value not in supported:
            wanted = " or ".join(map(repr, supported))
            raise ValueError(f"config.json: this library's {model} wants {key} {wanted}, got {short(value)}")


def check_tied(config: dict, model: str) -> None:
    """Refuse a language model whose output layer is not the embedding: the two would train apart."""
    value = config.get("tie_word_embeddings", True)
    if value is not True:
        raise ValueError(f"config.json: this library's {model} wants tie_word_embeddings True, got {short(value)}: "
                         "its output layer is not the embedding")


def check_kept(config: dict) -> None:
    """Refuse nonsense in the entries that are kept for saving: transformers would refuse them later."""
    _check_labels(config)
    _check_token_ids(config)


def _check_labels(config: dict) -> None:
    """Refuse class names that are none, and an unknown kind of problem."""
    for key in ("id2label", "label2id"):
        value = config.get(key)
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"config.json: {key} wants an object, got {short(value)}")
    numbers = list(config.get("id2label") or ())
    if not all(key.isdecimal() for key in numbers):
        raise ValueError(f"config.json: id2label wants the numbers of classes as its keys, got {short(numbers)}")
    if config.get("problem_type") not in PROBLEM_TYPES:
        wanted = ", ".join(str(kind) for kind in PROBLEM_TYPES[1:])
        raise ValueError(f"config.json: problem_type wants one of {wanted}, got {short(config['problem_type'])}")


def _check_token_ids(config: dict) -> None:
    """Refuse ids of special tokens that are no whole numbers. A model may have several ids for the end of text."""
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = config.get(key)
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if any(type(number) is not int for number in ids if number is not None):
            raise ValueError(f"config.json: {key} wants a whole number, got {short(value)}")


def architecture(config: dict, known: Mapping[str, Any]) -> str | None:
    """The class that config.json names first, or None if it names none. `known`: the classes that the family reads."""
    named = config.get("architectures")
    if not named:
        return None
    first = named[0] if isinstance(named, list) else named
    if not isinstance(first, str) or first not in known:
        raise ValueError(f"config.json: architectures wants one of {', '.join(known)}, got {short(first)}")
    return first


def class_count(config: dict) -> int:
    """The number of classes of a classifier: num_labels, or the number of names in id2label, or 2.

    ValueError if both are there and disagree."""
    names = config.get("id2label")
    if config.get("num_labels") is None:
        return len(names) if names else 2
    count = size(config, "num_labels")
    if names and len(names) != count:
        raise ValueError(f"config.json: num_labels and id2label want one number of classes, "
                         f"got {count} and {len(names)} names")
    return count

"""The two files of an adapter, read with every check that needs no model: kinds, lengths, one saving."""
from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import brief, whole
from ..files import FLOATS, check_ordinary, read_json, read_tensors
from ..identity import LONG

__all__ = ["ROUNDED", "check_finite", "digest", "read_adapter"]

# The kinds of the facts in adapter.json, and of those about its base model. OPTIONAL: version 0.1 wrote none.
FACTS = {"name": str, "head": list, "base": dict}
BASE = {"family": str, "shapes": str, "numbers": int, "tensors": int, "head": list, "weights": str}
OPTIONAL = {"dtype": str, "rounded": dict}
ROUNDED = ("bfloat16", "float16")                        # the dtypes to which weights are rounded for comparison
LARGEST_SEED = 1 << 128
LARGEST_NUMBER = 1 << 60
LONGEST_TEXT = 10_000                                    # characters of a field of the method
LONGEST_NAME = 300                                       # characters of any other text


def read_adapter(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(the facts in adapter.json, the arrays in adapter.safetensors by their names there) of the folder `path`.

    FileNotFoundError if a file is missing. ValueError if a file is damaged, if an array holds NaN or infinite numbers,
    or if the files were not written together, which the checksum of the facts shows."""
    for file in ("adapter.json", "adapter.safetensors"):
        if not os.path.lexists(path / file):
            raise FileNotFoundError(f"{path} is no adapter: it has no {file}")
        check_ordinary(path / file)
    facts = read_json(path / "adapter.json", allow_nan=False)
    try:
        check_facts(facts)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{path / 'adapter.json'} is damaged: {e}") from e
    arrays, header = read_tensors(path / "adapter.safetensors")
    if header.get("sum") != digest(facts):
        raise ValueError(f"{path}: adapter.json and adapter.safetensors are not of one saving")
    try:
        for name in arrays:
            _check_texts("tensors", name, LONGEST_NAME)
        check_finite(arrays)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    return {"seed": 0, **facts}, arrays                  # version 0.1 wrote no seed


def check_finite(arrays: dict[str, np.ndarray]) -> None:
    """ValueError, naming the first, for an array with NaN or infinite numbers."""
    for name, a in arrays.items():
        if a.dtype in FLOATS.values() and not np.isfinite(a).all():
            raise ValueError(f"an adapter wants finite numbers, got others in {brief(name)}")


def check_facts(facts: dict[str, Any]) -> None:
    """ValueError or TypeError unless the facts of adapter.json are of the right kinds and of a moderate size."""
    missing = {"method", *FACTS} - facts.keys()
    if missing:
        raise ValueError(f"it has no {min(missing)}")
    _check_kinds(facts, FACTS)
    base = facts["base"]
    _check_kinds(base, BASE | {key: kind for key, kind in OPTIONAL.items() if key in base})
    if "rounded" in base:
        _check_kinds(base["rounded"], dict.fromkeys(ROUNDED, str))
    for key in ("numbers", "tensors"):
        whole(key, base[key], 0, LARGEST_NUMBER)
    for shape in base["head"]:
        if not isinstance(shape, list) or not shape:
            raise ValueError(f"head wants a list of shapes, got {brief(base['head'])}")
        for n in shape:
            whole("head", n, 0, LARGEST_NUMBER)
    whole("seed", facts.get("seed", 0), 0, LARGEST_SEED)
    _check_texts("base", base, LONGEST_NAME)
    _check_texts("head", facts["head"], LONGEST_NAME)
    _check_texts("name", facts["name"], LONGEST_NAME)
    if not facts["name"]:
        raise ValueError("name wants a text, got an empty one")
    _check_method(facts)


def _check_method(facts: dict[str, Any]) -> None:
    """ValueError unless the facts name a class and its fields, as this version writes them or as version 0.1 did."""
    described = facts["method"] if isinstance(facts["method"], dict) else {**facts, "class": facts["method"]}
    name = described.get("class")
    fields = described.get("fields")
    if not isinstance(name, str) or not isinstance(fields, dict):
        raise ValueError("it does not name a method and its fields")
    _check_texts("class", name, LONGEST_NAME)
    _check_texts("method", list(fields), LONGEST_NAME)
    _check_texts("method", list(fields.values()), LONGEST_TEXT)


def _check_kinds(facts: dict[str, Any], kinds: dict[str, type]) -> None:
    """ValueError unless each of these keys has a value of its kind."""
    for key, kind in kinds.items():
        value = facts.get(key)
        if type(value) is not kind:
            raise ValueError(f"{key} wants a value of the type {kind.__name__}, got {brief(value)}")


def _check_texts(key: str, value: Any, longest: int) -> None:
    """ValueError for long texts, lists and dicts, at any depth: save_adapter writes a fingerprint of long lists.

    Texts of at most LONGEST_NAME characters may stand in messages, so they hold no line breaks."""
    if isinstance(value, str):
        is_plain = longest > LONGEST_NAME or value.isprintable()
        if len(value) > longest or not is_plain:
            raise ValueError(f"{key} wants texts of at most {longest:,} printable characters, got {brief(value)}")
    elif isinstance(value, (list, dict)):
        if len(value) > LONG:
            raise ValueError(f"{key} wants at most {LONG} entries, got {len(value):,}")
        for entry in value:
            _check_texts(key, entry, longest)
        if isinstance(value, dict):
            _check_texts(key, list(value.values()), longest)


def digest(facts: dict[str, Any]) -> str:
    """A checksum of the facts in adapter.json. The header of adapter.safetensors holds it, to show that both files were
    written together."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()

"""Values of a config.json, read with checks. A ValueError names the key, the wanted value and the value found."""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any


def size(config: dict, key: str, default: int | None = None) -> int:
    """A size: a whole number of at least 1."""
    value = config.get(key, default)
    if type(value) is not int or value < 1:
        raise ValueError(f"config.json: {key} wants a whole number of at least 1, got {value!r}")
    return value


def number(config: dict, key: str, default: float, below: float = math.inf) -> float:
    """A number of at least 0 and smaller than `below`. null stands for the default."""
    value = config.get(key)
    if value is None:
        value = default
    if type(value) not in (int, float) or not 0 <= value < below:
        limit = "" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"config.json: {key} wants a number of at least 0{limit}, got {value!r}")
    return float(value)


def check_setting(config: dict, key: str, supported: Iterable[Any], model: str) -> None:
    """Refuse a setting that this library's model does not have. The first supported value is the default."""
    supported = list(supported)
    value = config.get(key, supported[0])
    if value not in supported:
        wanted = " or ".join(map(repr, supported))
        raise ValueError(f"config.json: this library's {model} wants {key} {wanted}, got {value!r}")


def architecture(config: dict, known: Mapping[str, Any]) -> str | None:
    """The class that config.json names first, or None if it names none. `known`: the classes that the family reads."""
    named = config.get("architectures")
    if not named:
        return None
    first = named[0] if isinstance(named, list) else named
    if not isinstance(first, str) or first not in known:
        raise ValueError(f"config.json: architectures wants one of {', '.join(known)}, got {first!r}")
    return first


def class_count(config: dict) -> int:
    """The number of classes of a classifier: num_labels, or the number of names in id2label, or 2."""
    names = config.get("id2label")
    default = len(names) if isinstance(names, dict) and names else 2
    return size(config, "num_labels", default)

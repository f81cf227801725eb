"""The rotary positions of a config.json: rope_theta and rope_scaling, or rope_parameters, which holds both.

transformers writes rope_theta and rope_scaling up to version 4, and rope_parameters from version 5 on.
"""
from __future__ import annotations

from typing import Any

from ..models import RotaryScaling
from .config import number, short, size

DEFAULT_BASE = 10000.0
KINDS = "the rope_type default, linear or llama3"


def rotary_settings(config: dict) -> tuple[float, RotaryScaling | None]:
    """(base, scaling) of the rotary positions.

    ValueError for values out of range, for a scaling that RotaryScaling does not have, and for rope_parameters beside
    a rope_theta or a rope_scaling that says something else.
    """
    base = positive(config, "rope_theta", DEFAULT_BASE)
    scaling = rotary_scaling(config, "rope_scaling")
    if config.get("rope_parameters") is None:
        return base, scaling
    newer = rotary_scaling(config, "rope_parameters")
    newer_base = positive(config["rope_parameters"], "rope_theta", DEFAULT_BASE)
    if config.get("rope_theta") is not None and base != newer_base:
        raise ValueError("config.json: rope_parameters and rope_theta are two names of one setting; wanted one value, "
                         f"got {newer_base} and {base}")
    if config.get("rope_scaling") is not None and scaling != newer:
        raise ValueError("config.json: rope_parameters and rope_scaling are two names of one setting; wanted one "
                         f"value, got {short(config['rope_parameters'])} and {short(config['rope_scaling'])}")
    return newer_base, newer


def rotary_scaling(config: dict, key: str) -> RotaryScaling | None:
    """The scaling in config[key]: null, or an object with a rope_type (`type` in old files) that is known here.

    ValueError for kinds that depend on the length of the text (dynamic, yarn, longrope), and for values out of range.
    """
    entry = config.get(key)
    if entry is None:
        return None
    if not isinstance(entry, dict):
        raise ValueError(f"config.json: {key} wants null or an object, got {short(entry)}")
    entry = {f"{key}.{name}": value for name, value in entry.items()}           # the name of a value in a message
    kind = scaling_kind(entry, key)
    share = number(entry, f"{key}.partial_rotary_factor", 1.0)
    if share != 1:
        raise ValueError(f"config.json: {key} wants a partial_rotary_factor of 1, got {share:g}")
    if kind == "default":
        return None
    factor = required(entry, f"{key}.factor")
    if kind == "linear":
        return RotaryScaling("linear", factor)
    low = required(entry, f"{key}.low_freq_factor")
    high = required(entry, f"{key}.high_freq_factor")
    if low >= high:
        raise ValueError(f"config.json: {key} wants a low_freq_factor below the high_freq_factor, "
                         f"got {low:g} and {high:g}")
    original = size(entry, f"{key}.original_max_position_embeddings")
    return RotaryScaling("llama3", factor, low=low, high=high, original=original)


def scaling_kind(entry: dict, key: str) -> str:
    """The rope_type of an entry; "default" if rope_parameters names none. ValueError for a kind that is not here."""
    kinds = [entry[name] for name in (f"{key}.rope_type", f"{key}.type") if name in entry]
    if not kinds and key == "rope_parameters":
        return "default"
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise ValueError(f"config.json: {key} wants one kind, got the rope_type {short(kinds[0])} and the type "
                         f"{short(kinds[1])}")
    kind = kinds[0] if kinds else None
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"config.json: this library's Llama wants a {key} of {KINDS}, got {short(kind)}")
    return kind


def positive(config: dict, key: str, default: float) -> float:
    """A number above 0. null stands for the default."""
    value = number(config, key, default)
    if value == 0:
        raise ValueError(f"config.json: {key} wants a number above 0, got {short(config[key])}")
    return value


def required(entry: dict, key: str) -> float:
    """A number above 0 that must be there."""
    if entry.get(key) is None:
        raise ValueError(f"config.json: {key} wants a number above 0, got none")
    return positive(entry, key, 0.0)


def written_scaling(scaling: RotaryScaling | None) -> dict[str, Any] | None:
    """The rope_scaling entry of a config.json: the inverse of rotary_scaling."""
    if scaling is None:
        return None
    entry: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        entry |= {
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.original}
    return entry

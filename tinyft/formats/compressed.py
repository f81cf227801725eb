"""Packed weights in a model's directory, beside the dense tensors.

    config.json           "quantization_config": {"library": "tinyft", "form": 1, "weights": [
                              {"class": "Uniform", "kind": "affine", "bits": 4, "group": 64, "names": [...]}, ...]}
    model.safetensors     blocks.0.attn.q.weight.codes, blocks.0.attn.q.weight.scale_bits ...

Packed weights have the names of the model, not those of transformers: GPT-2 keeps q, k and v in one dense tensor, and
here each is packed by itself. If one of them stays dense, it has its own name too.

transformers cannot read such a directory, and refuses it: a quantization_config without a quant_method is an error
there, where an unknown quant_method is a warning, after which the model computes nonsense. For programs that read the
weights alone, the header of model.safetensors names the format "tinyft" instead of "pt".
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..compress import stored
from ..nn import Embedding, Linear, Module, Packed
from .config import short
from .directory import first_names
from .layout import Table

__all__ = [
    "KEY", "METADATA", "dense_table", "describe", "packed_weights", "put", "restore", "stored_arrays", "take_arrays",
    "take_description",
]

KEY = "quantization_config"
LIBRARY = "tinyft"
FORM = 1                                                 # of the description in config.json
METADATA = {"format": LIBRARY}                           # of model.safetensors
NAMES = "names"                                          # the key of the names of the weights with the same settings


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def packed_weights(model: Module) -> dict[str, Packed]:
    """{name: packed weight} of a model, under the names that its dense parameters had."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Packed)}


def describe(weights: Mapping[str, Packed]) -> dict[str, Any]:
    """The entry of config.json: classes and settings, with the names of the weights that have them."""
    entries: list[dict[str, Any]] = []
    for name, packed in weights.items():
        try:
            described = stored.description(packed)
        except ValueError as e:
            raise ValueError(f"{name} is packed: {e}") from e
        for entry in entries:
            if {**entry, NAMES: None} == {**described, NAMES: None}:
                entry[NAMES].append(name)
                break
        else:
            entries.append({**described, NAMES: [name]})
    return {"library": LIBRARY, "form": FORM, "weights": entries}


def stored_arrays(weights: Mapping[str, Packed]) -> dict[str, np.ndarray]:
    """{name in the file: array} of packed weights."""
    found = {}
    for name, packed in weights.items():
        for key, a in stored.arrays(packed).items():
            found[f"{name}.{key}"] = np.ascontiguousarray(a)
    return found


def dense_table(table: Table, packed: Mapping[str, Any]) -> Table:
    """The places of the dense tensors beside packed ones.

    A tensor of the file that has a packed part is not written: its dense parts get the names of the model."""
    split = {table[name].name for name in packed}
    dense = {}
    for name, place in table.items():
        if name in packed:
            continue
        is_part = place.name in split
        dense[name] = replace(place, name=name, transposed=False, third=None) if is_part else place
    return dense


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def take_description(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{name: class and settings} of the packed weights in a config.json, from which the entry is removed.

    Empty if the entry is missing, or of another library: then it stays. ValueError if it is damaged."""
    entry = config.get(KEY)
    if not isinstance(entry, dict) or entry.get("library") != LIBRARY:
        return {}
    if type(entry.get("form")) is not int or entry["form"] != FORM:
        raise ValueError(f"config.json: {KEY} wants the form {FORM}, got {short(entry.get('form'))}: another version "
                         "of tinyft wrote it")
    found: dict[str, dict[str, Any]] = {}
    groups = entry.get("weights")
    if not isinstance(groups, list):
        raise ValueError(f"config.json: {KEY} wants a list of weights, got {short(groups)}")
    for group in groups:
        names = group.get(NAMES) if isinstance(group, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"config.json: {KEY} wants settings with the names of weights, got {short(group)}")
        for name in names:
            if name in found:
                raise ValueError(f"config.json: {KEY} names {first_names([name])} twice")
            found[name] = {key: value for key, value in group.items() if key != NAMES}
    del config[KEY]
    return found


def take_arrays(
    names: Mapping[str, Any], tensors: Mapping[str, np.ndarray],
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """({name of a packed weight: {its array: view}}, the other tensors) of a file."""
    of_weights: dict[str, dict[str, np.ndarray]] = {name: {} for name in names}
    others = {}
    for name, tensor in tensors.items():
        weight, _, key = name.partition(".weight.")
        weight = f"{weight}.weight"
        if key and weight in of_weights:
            of_weights[weight][key] = tensor
        else:
            others[name] = tensor
    return of_weights, others


def restore(
    described: Mapping[str, dict[str, Any]], arrays: Mapping[str, dict[str, np.ndarray]], table: Table,
) -> dict[str, Packed]:
    """{name: packed weight}, with every check. table: of all tensors of the dense model."""
    unknown = [name for name in described if name not in table]
    if unknown:
        raise ValueError(f"config.json: {KEY} names {first_names(unknown)}, which the model does not have")
    weights = {}
    for name, settings in described.items():
        try:
            weights[name] = stored.restore(settings, arrays[name], table[name].shape)
        except ValueError as e:
            raise ValueError(f"the packed weight {first_names([name])} is damaged: {e}") from e
    return weights


def put(model: Module, weights: Mapping[str, Packed]) -> None:
    """Put packed weights in the places of the parameters with their names. ValueError for what is no weight of a linear
    map or an embedding."""
    parts = dict(model.named_modules())
    for name in weights:
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or not isinstance(parts[path], (Linear, Embedding)):
            raise ValueError(f"config.json: {KEY} names {first_names([name])}, which is no weight of a linear map or "
                             "an embedding")
    for name, packed in weights.items():
        parts[name.removesuffix(".weight")].weight = packed

"""Where a model's tensors stand in a file of another library.

A family (gpt2.py, bert.py) is a table {our name: Place}; reading and writing follow the same table, so they cannot disagree.
"""
from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..nn import Module


@dataclass(frozen=True)
class Place:
    """Where one tensor of ours stands in a file.

    name        the tensor in the file
    shape       ours; a weight is (out, in)
    transposed  stored as (in, out): GPT-2's Conv1D.  On a square matrix a forgotten transpose changes no shape, only the model
    third       0, 1, 2: which third of a fused tensor's outputs; GPT-2 keeps q, k and v side by side in one c_attn
    """
    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    third: int | None = None

    @property
    def stored(self) -> tuple[int, ...]:
        "The shape of the tensor in the file."
        shape = self.shape if self.third is None else (3 * self.shape[0], *self.shape[1:])
        return shape[::-1] if self.transposed else shape

    def take(self, a: np.ndarray) -> np.ndarray:
        "Our tensor, as a view of the one in the file."
        a = a.T if self.transposed else a
        return a if self.third is None else a[self.third * self.shape[0]:(self.third + 1) * self.shape[0]]


@dataclass(frozen=True)
class Plan:
    "What is to be built: a GPTConfig or BERTConfig, the head ('lm', 'mlm', 'classes' or None), its classes, whether a pooler is there."
    config: Any
    head: str | None
    classes: int = 0
    pooler: bool = False


def put(places: dict[str, Place], ours: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    "The tensors of a file, made of ours: what `take` undoes.  Fused tensors are joined again, in the order of their thirds."
    together: dict[str, list[tuple[Place, np.ndarray]]] = {}
    for name, place in places.items():
        together.setdefault(place.name, []).append((place, ours[name]))
    out = {}
    for name, parts in together.items():
        parts.sort(key=lambda part: part[0].third or 0)
        a = np.concatenate([a for _, a in parts]) if len(parts) > 1 else parts[0][1]
        out[name] = np.ascontiguousarray(a.T if parts[0][0].transposed else a)
    return out


class Blank(np.random.Generator):
    "A generator of zeros: a model that is about to be loaded need not pay for random numbers."

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))

    def standard_normal(self, size: Any = None, *_: Any, **__: Any) -> np.ndarray:
        return np.broadcast_to(np.float32(0), size)


def build(model: Module, arrays: dict[str, Any]) -> Module:
    "Give a blank model these arrays, by our names: they take the place of its own, nothing is copied."
    params = model.named_parameters()
    if params.keys() != arrays.keys() or any(p.shape != arrays[n].shape for n, p in params.items()):
        raise AssertionError("the layout of this family is not that of its model")       # a fault of ours, not of the file
    for name, p in params.items():
        p.data = arrays[name]
    return model


# ── what a config.json says ──────────────────────────────────────────────────────────────────────────────────────────
def size(config: dict, key: str, default: int | None = None) -> int:
    "A size: a whole number, at least 1."
    value = config.get(key, default)
    if type(value) is not int or value < 1:
        raise ValueError(f"config.json: {key} is a whole number of at least 1; got {value!r}")
    return value


def number(config: dict, key: str, default: float, below: float = math.inf) -> float:
    "A number of at least 0 and smaller than `below`.  null is the default."
    value = config.get(key)
    value = default if value is None else value
    if type(value) not in (int, float) or not 0 <= value < below:
        limit = "" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"config.json: {key} is a number of at least 0{limit}; got {value!r}")
    return float(value)


def must_be(config: dict, key: str, allowed: Iterable[Any], what: str) -> None:
    "Refuse a setting that this library's model does not have.  The first of `allowed` is the default."
    allowed = list(allowed)
    value = config.get(key, allowed[0])
    if value not in allowed:
        has = " or ".join(map(repr, allowed))
        raise ValueError(f"config.json: {key} is {value!r}, which this library's {what} does not have; it has {has}")


def head_of(config: dict, known: dict[str, str | None]) -> Any:
    "The head that the class named in config.json has; ... if none is named, so that the tensors must tell."
    named = config.get("architectures")
    if not named:
        return ...
    first = named[0] if isinstance(named, list) else named
    if not isinstance(first, str) or first not in known:
        raise ValueError(f"config.json: the architecture {first!r} is not one of those read here: {', '.join(known)}")
    return known[first]


def classes_of(config: dict) -> int:
    "How many classes a classifier has: num_labels, or the number of names in id2label, or 2."
    names = config.get("id2label")
    return size(config, "num_labels", len(names) if isinstance(names, dict) and names else 2)

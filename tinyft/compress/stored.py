"""Packed weights in files: settings for JSON, and arrays by name. Nothing is unpickled, no class is imported by name.

    description(packed)                          {"class": "Uniform", "kind": "affine", "bits": 4, "group": 64}
    arrays(packed)                               {"codes": ..., "scale_bits": ..., "zero_codes": ...} on the host
    restore(description, arrays, shape)          the same packed weight

A class that can be in a file stands in `classes`. It writes `settings`, and `restore`, which takes its arrays from a
Stored (checked.py) one by one: each with the shape and the dtypes that the class expects.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import array, checks
from ..nn import Packed
from .checked import Stored
from .codebooks import Codebook
from .ggml import FORMATS
from .grouped import Uniform
from .quantize.int8 import Int8Weight

__all__ = ["arrays", "classes", "description", "restore"]

CLASS = "class"                                          # the key of the class's name among the settings


def classes() -> dict[str, type[Packed]]:
    """{name: class} of all packed weights that a file can hold. A new class is one more entry."""
    return {cls.__name__: cls for cls in (Uniform, Codebook, Int8Weight, *FORMATS.values())}


def description(packed: Packed) -> dict[str, Any]:
    """The class and the settings of a packed weight, for JSON. ValueError for a class that no file can hold."""
    name = type(packed).__name__
    if classes().get(name) is not type(packed):
        raise ValueError(f"a file holds packed weights of the classes {', '.join(classes())}, got a {name}: "
                         "unpack the model first (tinyft.unpack)")
    return {CLASS: name, **packed.settings()}


def arrays(packed: Packed) -> dict[str, np.ndarray]:
    """{name: array} of the saved buffers of a packed weight, on the host."""
    buffers = packed.named_buffers(persistent_only=True)
    return {name: array.asnumpy(buffer) for name, buffer in buffers.items()}


def restore(described: Any, stored: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> Packed:
    """The packed weight (out, in) of a description and its arrays, on the backend in use.

    An array is taken as it lies where that is possible, such as a view into a mapped file. ValueError, in one sentence,
    for an unknown class, settings that it does not have, and arrays of other names, shapes, dtypes or values."""
    if not isinstance(described, Mapping):
        raise ValueError(f"a packed weight wants its class and its settings, got {checks.brief(described)}")
    name = described.get(CLASS)
    known = classes()
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"a packed weight wants one of the classes {', '.join(known)}, got {checks.brief(name)}")
    if len(shape) != 2:
        raise ValueError(f"only a weight of shape (out, in) can be packed, got shape {shape}")
    settings = {key: value for key, value in described.items() if key != CLASS}
    source = Stored(name, settings, stored)
    try:
        packed = known[name].restore(shape, source)
    except TypeError as e:                               # a check of a setting of the wrong kind
        raise ValueError(str(e)) from e
    source.refuse_rest()
    return packed

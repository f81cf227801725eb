"""The identity of a method or a loss: its class and its fields, as JSON-able facts.

Adapter files and checkpoints hold these facts, and compare them when they are read. Arrays, tensors, models and data
are described by a fingerprint of their content, so they are never stored.
"""
from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np

from . import array
from .nn import Module
from .tensor import Tensor

POSITION = ("epoch", "batch", "count")                   # attributes that say where a stream of data stands


def qualified_name(cls: type) -> str:
    """`module.QualName` of a class; a module that was run as a script is called by its file's name."""
    return f"{cls.__module__}.{cls.__qualname__}"


def describe(obj: Any) -> Any:
    """Facts that identify an object: equal for equal objects, and unchanged by training or by reading data.

    A plain value describes itself. A frozen dataclass becomes {"class": "module.QualName", "fields": {...}}. An array,
    a tensor, a model or any other object becomes {"fingerprint": hex of its content}."""
    if obj is None or isinstance(obj, (bool, int, float, str)):
        return obj
    if isinstance(obj, (list, tuple)) and not _is_data(obj):
        return [describe(v) for v in obj]
    if isinstance(obj, Mapping) and all(isinstance(k, str) for k in obj) and not _is_data(list(obj.values())):
        return {k: describe(v) for k, v in obj.items()}
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        fields = {f.name: describe(getattr(obj, f.name)) for f in dataclasses.fields(obj) if f.init}
        return {"class": qualified_name(type(obj)), "fields": fields}
    return {"fingerprint": fingerprint(obj)}


def describe_method(obj: Any) -> dict[str, Any]:
    """`describe` for a method or a loss; one that is no dataclass is identified by its class alone."""
    if dataclasses.is_dataclass(obj):
        return describe(obj)
    return {"class": qualified_name(type(obj)), "fields": {}}


def _is_data(values: Any) -> bool:
    """True if a list holds arrays, tensors, models or batches at any depth: too much to write down."""
    for v in values:
        inner = list(v.values()) if isinstance(v, Mapping) else v if isinstance(v, (list, tuple)) else None
        if inner is None and not isinstance(v, (bool, int, float, str, type(None))) and not dataclasses.is_dataclass(v):
            return True
        if inner is not None and _is_data(inner):
            return True
    return False


def fingerprint(obj: Any) -> str:
    """A digest of an object's content, in hexadecimal.

    Data that is read in turn is identified by its class, its settings and its arrays, never by its position."""
    digest = hashlib.blake2b(digest_size=16)
    _update(digest, obj, [])
    return digest.hexdigest()


def _update(digest: Any, obj: Any, above: list[int]) -> None:
    """Add an object to a digest. `above` holds the ids of the objects that contain it, so that a cycle ends."""
    if id(obj) in above:
        digest.update(b"cycle;")
        return
    above = [*above, id(obj)]
    if isinstance(obj, Tensor):
        obj = obj.data
    if array.is_array(obj) or isinstance(obj, (np.ndarray, np.generic)):
        _update_array(digest, np.asarray(array.asnumpy(obj)), above)
    elif isinstance(obj, Module):
        digest.update(f"{qualified_name(type(obj))};".encode())
        _update(digest, {**obj.named_parameters(), **obj.named_buffers()}, above)
    elif isinstance(obj, Enum) or obj is None or isinstance(obj, (bool, int, float, complex, str, bytes)):
        digest.update(f"{type(obj).__name__} {obj!r};".encode())
    elif isinstance(obj, Mapping):
        digest.update(f"mapping of {len(obj)};".encode())
        for key in sorted(obj, key=repr):
            _update(digest, key, above)
            _update(digest, obj[key], above)
    elif isinstance(obj, (set, frozenset)):
        _update(digest, sorted(obj, key=repr), above)
    elif isinstance(obj, (list, tuple, range)):
        digest.update(f"sequence of {len(obj)};".encode())
        for v in obj:
            _update(digest, v, above)
    elif isinstance(obj, type) or hasattr(obj, "__code__"):
        _update_function(digest, obj, above)
    elif isinstance(obj, np.random.Generator):
        digest.update(b"generator;")                     # its state is a position
    else:
        _update_object(digest, obj, above)


def _update_array(digest: Any, a: np.ndarray, above: list[int]) -> None:
    digest.update(f"array {a.dtype} {a.shape};".encode())
    if a.dtype.hasobject:
        _update(digest, a.tolist(), above)
    else:
        digest.update(np.ascontiguousarray(a).tobytes())


def _update_function(digest: Any, f: Any, above: list[int]) -> None:
    """A function counts by its name and the values that it closes over, a class by its name."""
    digest.update(f"{f.__module__}.{f.__qualname__};".encode())
    for cell in getattr(f, "__closure__", None) or ():
        _update(digest, cell.cell_contents, above)


def _update_object(digest: Any, obj: Any, above: list[int]) -> None:
    """Any other object counts by its class and its public attributes, those of its position left out."""
    digest.update(f"{qualified_name(type(obj))};".encode())
    attributes = getattr(obj, "__dict__", None)
    if attributes is None:
        raise TypeError(f"a {type(obj).__name__} cannot be identified by its content: it has no attributes to read; "
                        "give a list of batches, or an object with its data in attributes")
    _update(digest, {k: v for k, v in attributes.items() if k[0] != "_" and k not in POSITION}, above)

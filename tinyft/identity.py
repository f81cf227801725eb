"""The identity of a method or a loss: its class and its fields, as JSON-able facts.

Adapter files and checkpoints hold these facts, and compare them when they are read. Arrays, tensors, models and data
are described by a fingerprint of their content, so they are never stored.
"""
from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
import types
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from . import array
from .nn import Module
from .tensor import Tensor

POSITION = ("epoch", "batch", "count")                   # attributes that hold the position in a stream of data
FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType)
LONG = 100                                               # a list with more entries counts as data


def qualified_name(cls: type) -> str:
    """`module.ClassName` of a class.

    A class of the script that is run has the module `__main__`. It gets the module name of the script's file instead,
    so that its adapters also load where the file is imported. The name of a script's package is not known here.
    """
    module = cls.__module__
    if module == "__main__":
        main = sys.modules["__main__"]
        spec = getattr(main, "__spec__", None)
        file = getattr(main, "__file__", None)
        if spec:                                         # python -m package.module
            module = spec.name
        elif file:                                       # python file.py; a notebook has no file
            module = Path(file).stem
    return f"{module}.{cls.__qualname__}"


def describe(obj: Any) -> Any:
    """Facts that identify a method or a loss: equal for equal objects, unchanged by training and by reading data.

    A frozen dataclass becomes {"class": "module.QualName", "fields": {...}}. A field that is a plain value, a short
    list of these or another dataclass is described as it is; an array, a tensor, a model or data becomes
    {"fingerprint": hex of its content}. An object that is not a dataclass is identified by its class alone.

    A later version of a class may have more fields: compare what a file holds only after `complete`."""
    if _is_plain(obj) or isinstance(obj, (list, tuple, Mapping, Tensor, Module)) or array.is_array(obj):
        return _describe_value(obj)
    fields = {}
    if dataclasses.is_dataclass(obj):
        fields = {f.name: _describe_value(getattr(obj, f.name)) for f in dataclasses.fields(obj) if f.init}
    return {"class": qualified_name(type(obj)), "fields": fields}


def complete(description: Any, obj: Any) -> Any:
    """A description from a file, with the default of each field that it lacks: one that its class got later.

    obj: the object of today with which it will be compared. What is of another class or form stays as it is."""
    obj = _as_json_value(obj)
    if isinstance(obj, (list, tuple)) and isinstance(description, list) and len(obj) == len(description):
        return [complete(one, value) for one, value in zip(description, obj)]
    if isinstance(obj, Mapping) and isinstance(description, dict):
        return {key: complete(one, obj.get(key)) for key, one in description.items()}
    if not _is_description_of(description, obj):
        return description
    fields = {name: complete(one, getattr(obj, name, None)) for name, one in description["fields"].items()}
    return {**description, "fields": default_fields(type(obj)) | fields}


def _is_description_of(description: Any, obj: Any) -> bool:
    """True if `describe` made this of a dataclass of the same class."""
    if not dataclasses.is_dataclass(obj) or isinstance(obj, type) or not isinstance(description, dict):
        return False
    return description.get("class") == qualified_name(type(obj)) and isinstance(description.get("fields"), dict)


def describe_changed(obj: Any) -> Any:
    """`describe` of a dataclass without the fields that have their default value: a new field does not change it.

    Fields with compare=False are left out as well. It serves where the facts are hashed, so that `complete` cannot
    help."""
    description = describe(obj)
    defaults = default_fields(type(obj))
    compared = {f.name for f in dataclasses.fields(obj) if f.compare}
    changed = {}
    for name, value in description["fields"].items():
        if name in compared and (name not in defaults or value != defaults[name]):
            changed[name] = value
    return {**description, "fields": changed}


def default_fields(cls: type) -> dict[str, Any]:
    """{name: description of the default} of the fields of a dataclass that have one."""
    defaults = {}
    for f in dataclasses.fields(cls):
        if f.init and f.default is not dataclasses.MISSING:
            defaults[f.name] = _describe_value(f.default)
        elif f.init and f.default_factory is not dataclasses.MISSING:
            defaults[f.name] = _describe_value(f.default_factory())
    return defaults


def _describe_value(value: Any) -> Any:
    """The JSON-able description of one field: the value itself, or a fingerprint if it is data or a long list.

    A dataclass is described by its class and fields. A tuple becomes a list, as JSON has no tuples; a set becomes a
    sorted list, a NumPy number a Python number."""
    value = _as_json_value(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return describe(value)
    if not _is_short(value):
        return {"fingerprint": fingerprint(value)}
    if isinstance(value, (list, tuple)):
        return [_describe_value(v) for v in value]
    if isinstance(value, Mapping):
        return {key: _describe_value(v) for key, v in value.items()}
    return value


def _as_json_value(value: Any) -> Any:
    """A NumPy number as a Python number, a set as a sorted list; every other value as it is."""
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return value.item()
    return sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _is_short(value: Any) -> bool:
    """True for a plain value, a dataclass, and a list or dict of few of these, at any depth."""
    value = _as_json_value(value)
    if isinstance(value, Mapping):
        return all(isinstance(key, str) for key in value) and _is_short(list(value.values()))
    if isinstance(value, (list, tuple)):
        return len(value) <= LONG and all(_is_short(v) for v in value)
    return _is_plain(value) or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def fingerprint(obj: Any) -> str:
    """A digest of an object's content, in hexadecimal.

    Data that is read in turn is identified by its class, its settings and its arrays, never by its position."""
    digest = hashlib.blake2b(digest_size=16)
    _update(digest, obj, [])
    return digest.hexdigest()


def earlier_fingerprints(obj: Any) -> list[str]:
    """The fingerprint of an object, and those that earlier versions of its class gave to the same settings.

    An earlier version of a dataclass lacked its last fields. A field with another value than its default, and all
    fields before it, count in each of the digests. Compare what a file holds with all of them."""
    found = [fingerprint(obj)]
    if not dataclasses.is_dataclass(obj) or isinstance(obj, type):
        return found
    defaults = default_fields(type(obj))
    attributes = dict(vars(obj))
    for f in reversed(dataclasses.fields(obj)):
        value = attributes.pop(f.name)
        if f.name not in defaults or _describe_value(value) != defaults[f.name]:
            break
        digest = hashlib.blake2b(digest_size=16)
        _update_attributes(digest, type(obj), attributes, [id(obj)])
        found.append(digest.hexdigest())
    return found


def rows_as_arrays(value: Any) -> Any:
    """The same data with each list of whole numbers as an array: the fingerprint of an array is much faster."""
    if isinstance(value, (list, tuple)):
        if value and all(type(entry) is int for entry in value):
            return np.asarray(value)
        return [rows_as_arrays(entry) for entry in value]
    if isinstance(value, Mapping):
        return {key: rows_as_arrays(entry) for key, entry in value.items()}
    return value


def _update(digest: Any, obj: Any, above: list[int]) -> None:
    """Add an object's content to a hashlib digest, in place; equal contents give equal digests.

    The order of a mapping's keys and of a set's members does not count. Type names and lengths are added too: without
    them, different contents could give the same bytes. `above` holds the ids of the objects that contain this one: a
    cycle ends there."""
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
    elif isinstance(obj, functools.partial):
        _update(digest, [obj.func, obj.args, obj.keywords], above)
    elif isinstance(obj, (type, *FUNCTIONS)):
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
    """A class counts by its name. A function counts by its name, its closure's values and the object it is bound to."""
    digest.update(f"{f.__module__}.{f.__qualname__};".encode())
    for cell in getattr(f, "__closure__", None) or ():
        _update(digest, cell.cell_contents, above)
    if isinstance(f, types.MethodType):
        _update(digest, f.__self__, above)


def _update_object(digest: Any, obj: Any, above: list[int]) -> None:
    """Add the class and the public attributes of any other object to a digest.

    TypeError for an object without attributes."""
    attributes = getattr(obj, "__dict__", None)
    if attributes is None:
        raise TypeError(f"a {type(obj).__name__} cannot be identified by its content: it has no attributes to read; "
                        "give a list of batches, or an object with its data in attributes")
    _update_attributes(digest, type(obj), attributes, above)


def _update_attributes(digest: Any, cls: type, attributes: Mapping[str, Any], above: list[int]) -> None:
    """Add a class and the public ones of an object's attributes to a digest.

    POSITION names attributes that change while data is read, such as the epoch: they are left out."""
    digest.update(f"{qualified_name(cls)};".encode())
    _update(digest, {k: v for k, v in attributes.items() if k[0] != "_" and k not in POSITION}, above)

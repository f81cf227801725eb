"""An adapter on disk: a folder with two files.

    adapter.safetensors   the trained tensors and the buffers of one attached method
    adapter.json          the method's class and fields, its name and seed, and the identity of the base model

Both are written together. A class name in a file is only compared with known classes; no class is imported by name.
"""
from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from .. import array, edit
from ..edit import Attached, Method
from ..files import pack_tensors, read_tensors, write_atomically
from ..identity import describe, qualified_name
from ..nn import Module
from ..tensor import Tensor

__all__ = ["save_adapter", "load_adapter"]

# Fields that methods of version 0.1 had: {class: {old field: its name now, or None if it is gone}}.
FIELDS_OF_0_1: dict[str, dict[str, str | None]] = {
    "Partial": {"depth": None},
    "PromptTuning": {"targets": None},
    "PrefixTuning": {"kv": "targets", "pos": None},
}


# ── save ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def save_adapter(model: Module, path: str | os.PathLike, name: str | None = None) -> Path:
    """Write one attached method (the last one, or `name`) to the folder `path`, which is made if it is missing.

    A new task head that the method trains is written too. Tensors are stored without the adapter's name, so that it
    can be loaded under another name. Both files are written before either takes its place: a full disk leaves the old
    adapter as it was. LookupError if nothing is attached under `name`; ValueError if load_adapter could not make the
    method again."""
    a = edit.get_attached(model, name)
    cls = type(a.method)
    # An adapter made by `combine` has edits that its class cannot make.
    if a.edits and cls.edit is Method.edit and cls.edits is Method.edits:
        raise ValueError(f"{cls.__name__} is not a method that load_adapter could make again: it has no `edit`")
    facts = {
        "method": describe(a.method),
        "name": a.name,
        "seed": a.seed,
        "head": [n for n in a.base_values if edit.is_head(model, n)],
        "base": identify_base(model),
    }
    tensors = {_name_in_file(a, n): v for n, v in edit.state_dict(model, a).items()}
    path = Path(path)
    write_atomically({
        path / "adapter.safetensors": pack_tensors(tensors, {"sum": digest(facts)}),
        path / "adapter.json": (json.dumps(facts, indent=1) + "\n").encode(),
    })
    return path


def _name_in_file(a: Attached, name: str) -> str:
    """`blocks.0.attn.q:A` for `blocks.0.attn.q.edits.lora.A`: an adapter may be loaded under another name."""
    return name.replace(f".edits.{a.name}.", ":", 1)


def _name_in_model(a: Attached, name: str) -> str:
    return name.replace(":", f".edits.{a.name}.", 1)


# ── load ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def load_adapter(model: Module, path: str | os.PathLike, name: str | None = None,
                 method: type[Method] | Method | None = None) -> Attached:
    """Attach the method that save_adapter wrote.

    method   the class of a method defined outside the library, or, for a method with data among its fields, the
             method itself; with one of the library's methods, it must be the one in the file

    Raises FileNotFoundError, or ValueError naming the difference, if the folder is damaged, or if the base, the
    method or the shapes differ; then the model is unchanged."""
    path = Path(path)
    facts, arrays = _read(path)
    class_name, fields = _class_and_fields(path, facts)
    made = _make_method(path, class_name, fields, method)
    check_base(facts["base"], identify_base(model))
    # The adapter trains a new task head exactly if its file holds one.
    a = edit.attach(model, made, name or facts["name"], facts.get("seed", 0), train_head=bool(facts["head"]))
    try:
        edit.load_state_dict(model, a, {_name_in_model(a, n): v for n, v in arrays.items()})
    except ValueError:
        edit.detach(model, a.name)
        raise
    return a


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(the facts in adapter.json, the arrays in adapter.safetensors by their names there) of the folder `path`.

    ValueError if the files are damaged or were not written together, which the checksum of the facts shows."""
    for file in ("adapter.json", "adapter.safetensors"):
        if not (path / file).exists():
            raise FileNotFoundError(f"{path} is no adapter: it has no {file}")
    try:
        facts = json.loads((path / "adapter.json").read_text())
        missing = {"method", "name", "head", "base"} - facts.keys()
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as e:     # AttributeError: no JSON object
        raise ValueError(f"{path / 'adapter.json'} is damaged: {e}") from e
    if missing:
        raise ValueError(f"{path / 'adapter.json'} is damaged: it has no {min(missing)}")
    arrays, header = read_tensors(path / "adapter.safetensors")
    if header.get("sum") != digest(facts):
        raise ValueError(f"{path}: adapter.json and adapter.safetensors are not of one saving")
    return facts, arrays


def _class_and_fields(path: Path, facts: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The qualified class name of the method in a file, and its fields {name: value} under this version's names.

    facts: the content of adapter.json. Files of version 0.1 hold older names. ValueError if no method is named."""
    try:
        if isinstance(facts["method"], dict):
            return facts["method"]["class"], dict(facts["method"]["fields"])
        cls = facts["method"]                            # version 0.1: the class's own name
        renamed = FIELDS_OF_0_1.get(cls, {})
        fields = {renamed.get(field, field): v for field, v in facts["fields"].items()}
        fields.pop(None, None)                           # a field that is gone was renamed to None
        return f"tinyft.{cls}", fields
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ValueError(f"{path / 'adapter.json'} is damaged: it does not name a method ({e})") from e


def _make_method(path: Path, class_name: str, fields: dict[str, Any], given: type[Method] | Method | None) -> Method:
    """The method of a file: made from its fields, or the method `given` to load_adapter, if it agrees with the file.

    class_name and fields are those in the file; given may also be the class alone. A class of the library is found by
    its short name. ValueError if the class is unknown or another, or if a field differs or cannot be made again."""
    short = class_name.split(".")[-1]
    cls = type(given) if isinstance(given, Method) else given
    known = find_method(short) if class_name.startswith("tinyft.") else None
    if cls is not None and cls is not known and qualified_name(cls) != class_name:
        raise ValueError(f"{path} holds a {short}, not a {cls.__name__}")
    if cls is None and known is None:
        raise ValueError(f"{path} is of the method {short!r}, which this tinyft does not know; "
                         "if it is your own, pass its class: load_adapter(..., method=...)")
    if isinstance(given, Method):
        ours = describe(given)["fields"]
        for field in fields.keys() | ours.keys():
            if fields.get(field) != ours.get(field):
                raise ValueError(f"{path} was made by a {short} with another {field}")
        return given
    data_fields = [field for field, v in fields.items() if _is_data(v)]
    if data_fields:
        raise ValueError(f"{path}: the {data_fields[0]} of its {short} is data, which is not saved; "
                         f"pass the method itself: load_adapter(..., method={short}(...))")
    try:
        return (cls or known)(**{field: _tuples(v) for field, v in fields.items()})
    except TypeError as e:
        raise ValueError(f"{path} was saved by another version of {short}: {e}") from e


def _is_data(value: Any) -> bool:
    """True if a field holds a fingerprint or another object, from which no value can be made again (identity.py)."""
    return isinstance(value, dict) and ("fingerprint" in value or "class" in value)


def _tuples(value: Any) -> Any:
    """The value with tuples for lists, at any depth: JSON has lists only, the fields of a method are tuples."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def find_method(name: str) -> type[Method] | None:
    """The library's method class of this name, or None."""
    for cls in Method.__subclasses__():
        if cls.__name__ == name and cls.__module__.startswith("tinyft.methods."):
            return cls
    return None


# ── the base model ───────────────────────────────────────────────────────────────────────────────────────────────────
def identify_base(model: Module) -> dict[str, Any]:
    """The family and the sizes of a model, and a digest of its original weights, without any adapter.

    An adapter file holds it, so that load_adapter can refuse another base. Only the shapes of a new head are included:
    its weights are part of the adapter. float16 and float64 weights are compared as float32."""
    # {name: values from before any method trained it}. The first method that trains a tensor keeps them.
    original: dict[str, Any] = {}
    for a in reversed(edit.attached(model)):
        original.update(a.base_values)
    parameters = edit.base_parameters(model)
    buffers = {n: v for n, v in model.named_buffers(persistent_only=True).items() if not edit.is_in_edit(n)}
    shapes = {}
    weights = hashlib.blake2b(digest_size=16)
    for name, v in {**parameters, **buffers}.items():
        if not edit.is_head(model, name):
            a = array.asnumpy(original.get(name, v.data if isinstance(v, Tensor) else v))
            shapes[name] = list(a.shape)
            dtype = np.float32 if a.dtype.kind == "f" else None
            weights.update(name.encode() + np.ascontiguousarray(a, dtype).tobytes())
    return {
        "family": type(model).__name__,
        "shapes": hashlib.blake2b(json.dumps(shapes).encode(), digest_size=8).hexdigest(),
        "numbers": int(sum(np.prod(s) for s in shapes.values())),
        "tensors": len(shapes),
        "head": [list(p.shape) for name, p in parameters.items() if edit.is_head(model, name)],
        "weights": weights.hexdigest(),
    }


def check_base(wanted: dict[str, Any], got: dict[str, Any]) -> None:
    """Raise ValueError, naming the first difference, unless an adapter's base is this one.

    wanted: from the adapter's file; got: of this model. Both are as identify_base gives them. They are compared in the
    order below: a model of another family has other weights too, but its family explains more."""
    descriptions = {
        "family": "a model of the family {}",
        "numbers": "a base of {:,} parameters",
        "tensors": "a base of {} tensors",
        "shapes": "a base with other shapes ({})",
        "head": "a model whose new head has shapes {}",
        "weights": "a base with other weights ({})",
    }
    for key, text in descriptions.items():
        if wanted.get(key) != got[key]:
            trained_on = text.format(wanted.get(key))
            raise ValueError(f"this adapter was trained on {trained_on}; this is {text.format(got[key])}")


def digest(facts: dict[str, Any]) -> str:
    """A checksum of the facts in adapter.json. The header of adapter.safetensors holds it, to show that both files were
    written together."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()

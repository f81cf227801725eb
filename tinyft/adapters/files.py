"""An adapter on disk: a folder with adapter.safetensors (what trained) and adapter.json (the method's fields, and which base it is for)."""
from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from .. import array, edit
from ..edit import Attached, Method
from ..files import pack_tensors, read_tensors, write_atomically
from ..nn import Module
from ..tensor import Tensor

__all__ = ["save_adapter", "load_adapter"]


def save_adapter(model: Module, path: str | os.PathLike, name: str | None = None) -> Path:
    """Write what one attached method trained (the last one, or `name`), with a new head if it carries one, to the folder `path`.

    Both files are written before either takes its place: a full disk leaves the old adapter as it was."""
    a = edit.get_attached(model, name)
    if known(type(a.method).__name__) is not type(a.method):
        raise ValueError(f"{type(a.method).__name__} is not a method that load_adapter could find by its name again")
    facts = {"method": type(a.method).__name__, "fields": dataclasses.asdict(a.method), "name": a.name,
             "head": [n for n in a.base if edit.is_head(model, n)], "base": fingerprint(model)}
    path = Path(path)
    write_atomically({path / "adapter.safetensors": pack_tensors(_to_file(a, edit.state_dict(model, a)), {"sum": digest(facts)}),
                      path / "adapter.json": (json.dumps(facts, indent=1) + "\n").encode()})
    return path


def load_adapter(model: Module, path: str | os.PathLike, name: str | None = None, method: type[Method] | None = None) -> Attached:
    """Attach what save_adapter wrote.  FileNotFoundError, or ValueError naming the difference, if the folder is damaged, the base is
    another, the method is not `method`, or the shapes differ; then the model is unchanged."""
    path = Path(path)
    for file in ("adapter.json", "adapter.safetensors"):
        if not (path / file).exists():
            raise FileNotFoundError(f"{path} is no adapter: it has no {file}")
    try:
        facts = json.loads((path / "adapter.json").read_text())
        kind, fields = facts["method"], {k: tuple(v) if isinstance(v, list) else v for k, v in facts["fields"].items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as e:
        raise ValueError(f"{path / 'adapter.json'} is damaged: {e}") from e
    arrays, check = read_tensors(path / "adapter.safetensors")
    if check.get("sum") != digest(facts):
        raise ValueError(f"{path}: adapter.json and adapter.safetensors are not of one saving")
    cls = known(kind)
    if cls is None:
        raise ValueError(f"{path} is of the method {kind!r}, which this tinyft does not know")
    if method is not None and cls is not method:
        raise ValueError(f"{path} holds a {kind}, not a {method.__name__}")
    differ(facts["base"], fingerprint(model))
    try:
        made = cls(**fields)
    except TypeError as e:
        raise ValueError(f"{path} was saved by another version of tinyft: {e}") from e
    a = edit.attach(model, made, name or facts["name"], train_head=bool(facts["head"]))
    try:
        edit.load_state_dict(model, a, _from_file(a, arrays))
    except ValueError:
        edit.detach(model, a.name)
        raise
    return a


def _to_file(a: Attached, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays under the names of a file: `blocks.0.attn.q:A` for `blocks.0.attn.q.edits.lora.A`."""
    return {name.replace(f".edits.{a.name}.", ":"): v for name, v in arrays.items()}


def _from_file(a: Attached, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays under the names that they have in the model."""
    return {name.replace(":", f".edits.{a.name}."): v for name, v in arrays.items()}


def known(name: str) -> type[Method] | None:
    "The library's method class of this name."
    return next((c for c in Method.__subclasses__() if c.__name__ == name and c.__module__.startswith("tinyft.methods.")), None)


def fingerprint(model: Module) -> dict[str, Any]:
    "Which base this is: its family, its sizes, and a digest of its weights as they were before anything was attached; a new head aside."
    before = {n: v for a in reversed(edit.attached(model)) for n, v in a.base.items()}
    h, shapes = hashlib.blake2b(digest_size=16), {}
    for n, v in {**edit.base_parameters(model), **{n: b for n, b in model.named_buffers().items() if "edits" not in n.split(".")}}.items():
        if not edit.is_head(model, n):
            a = array.asnumpy(before.get(n, v.data if isinstance(v, Tensor) else v))
            shapes[n] = list(a.shape)
            h.update(n.encode() + np.ascontiguousarray(a, np.float32 if a.dtype.kind == "f" else None).tobytes())
    head = [list(p.shape) for n, p in edit.base_parameters(model).items() if edit.is_head(model, n)]
    return {"family": type(model).__name__, "shapes": hashlib.blake2b(json.dumps(shapes).encode(), digest_size=8).hexdigest(),
            "numbers": int(sum(np.prod(s) for s in shapes.values())), "tensors": len(shapes), "head": head, "weights": h.hexdigest()}


def differ(wanted: dict[str, Any], got: dict[str, Any]) -> None:
    "Raise ValueError if an adapter's base is not this one, naming the first difference."
    words = {"family": "a model of the family {}", "numbers": "a base of {:,} numbers", "tensors": "a base of {} tensors",
             "shapes": "a base with other shapes ({})", "head": "a model whose new head has shapes {}", "weights": "a base with other weights ({})"}
    for key, text in words.items():
        if wanted.get(key) != got[key]:
            raise ValueError(f"this adapter was trained on {text.format(wanted.get(key))}; this is {text.format(got[key])}")


def digest(facts: dict[str, Any]) -> str:
    "What tells one saving from another."
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()

"""An adapter on disk: a folder with two files.

    adapter.safetensors   the trained tensors and the buffers of one attached method
    adapter.json          the method's class and fields, its name and seed, and the identity of the base model

Both are written together. A class name in a file is only compared with known classes; no class is imported by name.
"""
from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from .. import array, edit
from ..checks import brief, instance
from ..edit import Attached, Method
from ..files import FLOATS, pack_tensors, python_number, read_together, write_atomically
from ..identity import complete, describe, qualified_name
from ..keywords import checked_keywords
from ..nn import Module, Packed, dense
from ..tensor import Tensor
from .reading import ROUNDED, check_finite, digest, read_adapter

__all__ = ["save_adapter", "load_adapter"]

# Fields that methods of version 0.1 had: {class: {old field: its name now, or None if it is gone}}.
FIELDS_OF_0_1: dict[str, dict[str, str | None]] = {
    "Partial": {"depth": None},
    "PromptTuning": {"targets": None},
    "PrefixTuning": {"kv": "targets", "pos": None},
}
# An adapter is made from at most so many random numbers: per number in its file, and beside them.
DRAWS_PER_NUMBER = 4
MORE_DRAWS = 1024


# ── save ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
@checked_keywords
def save_adapter(model: Module, path: str | os.PathLike, name: str | None = None) -> Path:
    """Write one attached method (the last one, or `name`) to the folder `path`, which is made if it is missing.

    A new task head that the method trains is written too. Tensors are stored without the adapter's name, so that it
    can be loaded under another name. Both files take their places together: a full disk, or a kill at any moment,
    leaves the old adapter as it was. LookupError if nothing is attached under `name`; ValueError if load_adapter could
    not make the method again; OSError if the files cannot be written."""
    instance("save_adapter", path, (str, os.PathLike), "a path")
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; save_adapter wants a directory")
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
    try:
        text = json.dumps(facts, indent=1, default=python_number, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise ValueError(f"the fields of {brief(a.method)} cannot be written: {e}") from e
    tensors = {_name_in_file(a, n): v for n, v in edit.state_dict(model, a).items()}
    check_finite(tensors)
    write_atomically({
        path / "adapter.safetensors": pack_tensors(tensors, {"sum": digest(json.loads(text))}),
        path / "adapter.json": f"{text}\n".encode(),     # last: see write_atomically
    })
    return path


def _name_in_file(a: Attached, name: str) -> str:
    """`blocks.0.attn.q:A` for `blocks.0.attn.q.edits.lora.A`: an adapter may be loaded under another name."""
    return name.replace(f".edits.{a.name}.", ":", 1)


def _name_in_model(a: Attached, name: str) -> str:
    return name.replace(":", f".edits.{a.name}.", 1)


# ── load ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
@checked_keywords
def load_adapter(model: Module, path: str | os.PathLike, name: str | None = None,
                 method: type[Method] | Method | None = None) -> Attached:
    """Attach the method that save_adapter wrote.

    method   the class of a method defined outside the library, or, for a method with data among its fields, the
             method itself; with one of the library's methods, it must be the one in the file

    Raises FileNotFoundError if there is no adapter, LookupError if no module matches its targets, and ValueError,
    naming the difference, if the folder is damaged, or if the base, the method or the shapes differ. After any
    exception the model is unchanged. A damaged or forged folder costs little time and memory before it is refused."""
    instance("load_adapter", model, Module, "a model")
    instance("load_adapter", path, (str, os.PathLike), "a path")
    if method is not None and not (isinstance(method, type) and issubclass(method, Method)):
        instance("load_adapter", method, Method, "a Method or its class as the method")
    if name is not None:
        instance("load_adapter", name, str, "a text as the name")
    path = Path(path)
    facts, arrays = read_together(path, "adapter.json", lambda: read_adapter(path))
    class_name, fields = _class_and_fields(facts)
    made = _make_method(path, class_name, fields, method)
    check_base(facts["base"], identify_base(model))
    _check_fit(path, model, made, arrays, facts["seed"])
    # The adapter trains a new task head exactly if its file holds one.
    a = edit.attach(model, made, name or facts["name"], facts["seed"], train_head=bool(facts["head"]))
    try:
        named = {_name_in_model(a, n): v for n, v in arrays.items()}
        for n, v in edit.named_state(model, a).items():
            if n in named:
                named[n] = as_dtype(n, named[n], v.dtype)
        edit.load_state_dict(model, a, named)
    except BaseException:
        edit.detach(model, a.name)
        raise
    return a


def as_dtype(name: str, stored: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """An array of a file in the dtype of its place in the model.

    ValueError for whole numbers in place of floating-point ones or the reverse, or for a value too large for dtype."""
    floats = FLOATS.values()
    if (stored.dtype in floats) != (dtype in floats):
        raise ValueError(f"{name} wants the dtype {dtype}, got {stored.dtype}")
    with np.errstate(over="ignore"):
        cast = stored.astype(dtype)
    if dtype in floats and dtype.itemsize <= stored.dtype.itemsize and not np.isfinite(cast).all():
        raise ValueError(f"{name} holds a value too large for {dtype}")
    return cast


def _class_and_fields(facts: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The qualified class name of the method in a file, and its fields {name: value} under this version's names.

    facts: the content of adapter.json. Files of version 0.1 hold older names."""
    method = facts["method"]
    if isinstance(method, dict):
        return method["class"], method["fields"]
    renamed = FIELDS_OF_0_1.get(method, {})              # version 0.1: the class's own name
    fields = {renamed.get(field, field): v for field, v in facts["fields"].items()}
    fields.pop(None, None)                               # a field that is gone was renamed to None
    return f"tinyft.{method}", fields


def _make_method(path: Path, class_name: str, fields: dict[str, Any], given: type[Method] | Method | None) -> Method:
    """The method of a file: made from its fields, or the method `given` to load_adapter, if it agrees with the file.

    class_name and fields are those in the file; given may also be the class alone. A class of the library is found by
    its short name. ValueError if the class is unknown or another, or if a field differs or cannot be made again."""
    short = class_name[-200:].split(".")[-1]
    cls = type(given) if isinstance(given, Method) else given
    known = find_method(short) if class_name.startswith("tinyft.") else None
    if cls is not None and cls is not known and qualified_name(cls) != class_name:
        raise ValueError(f"{path} holds a {short}, not a {cls.__name__}")
    if cls is None and known is None:
        raise ValueError(f"{path} is of the method {brief(short)}, which this tinyft does not know; "
                         "if it is your own, pass its class: load_adapter(..., method=...)")
    if isinstance(given, Method):
        ours = describe(given)["fields"]
        fields = complete({"class": qualified_name(cls), "fields": fields}, given)["fields"]
        for field in fields.keys() | ours.keys():
            if fields.get(field) != ours.get(field):
                raise ValueError(f"{path} was made by a {short} with another {_short(field)}")
        return given
    data_fields = [field for field, v in fields.items() if _is_data(v)]
    if data_fields:
        raise ValueError(f"{path}: the {_short(data_fields[0])} of its {short} is data, which is not saved; "
                         f"pass the method itself: load_adapter(..., method={short}(...))")
    try:
        return (cls or known)(**{field: _tuples(v) for field, v in fields.items()})
    except Exception as e:                               # a check of the method's own may raise anything
        raise ValueError(f"{path} was saved by another version of {short}: {explain(e)}") from e


def _check_fit(path: Path, model: Module, method: Method, arrays: dict[str, np.ndarray], seed: int) -> None:
    """ValueError if the method of a file cannot be made on this model, or not from as much as its file holds.

    Its edits are made once on trial. A file of a few bytes may claim a rank of a billion: a generator that draws no
    more than a few times as many random numbers as the file holds stops before the memory is taken. The class of a
    user is trusted. LookupError if no module matches its targets."""
    rng = np.random.default_rng(seed)
    if type(method).__module__.startswith("tinyft."):
        stored = sum(a.size for a in arrays.values())
        rng = LimitedGenerator(seed, DRAWS_PER_NUMBER * stored + MORE_DRAWS)
    try:
        method.trains(model)
        method.edits(method.find(model), rng)
    except Exception as e:
        if type(e) is LookupError:
            raise
        raise ValueError(f"{path} does not fit this model: {explain(e)}") from e


def explain(e: Any) -> str:
    """The message of an exception, or another value from a file, in one line of moderate length."""
    return " ".join(str(e).split())[:300] or type(e).__name__


def _short(name: str) -> str:
    """A name from a file, for an error message: quoted and cut if it is not a plain name."""
    return name if name.isidentifier() and len(name) <= 60 else brief(name)


class LimitedGenerator(np.random.Generator):
    """A random generator that raises ValueError, before it takes the memory, once it has drawn `limit` numbers."""

    # The position of the argument `size` of each method. A method that is not here is not limited.
    SIZES = {"random": 0, "standard_normal": 0, "normal": 2, "uniform": 2, "integers": 2, "choice": 1}

    def __init__(self, seed: int, limit: int):
        super().__init__(np.random.PCG64(seed))
        self.left = limit

    def draw(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Draw by a method of Generator, if the limit allows it."""
        position = self.SIZES[method]
        size = named.get("size", arguments[position] if len(arguments) > position else None)
        self.left -= 1 if size is None else math.prod(np.atleast_1d(np.array(size, object)))
        if self.left < 0:
            raise ValueError("its fields ask for more parameters than the file holds")
        return getattr(super(), method)(*arguments, **named)

    random = functools.partialmethod(draw, "random")
    standard_normal = functools.partialmethod(draw, "standard_normal")
    normal = functools.partialmethod(draw, "normal")
    uniform = functools.partialmethod(draw, "uniform")
    integers = functools.partialmethod(draw, "integers")
    choice = functools.partialmethod(draw, "choice")


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
    its weights are part of the adapter. "weights" is exact, float16 and float64 taken as float32; "rounded" are digests
    of the same weights rounded to 16 bits, with which a base is compared that was loaded in another dtype. A packed
    weight counts as its dense values: an adapter trained beside packed weights fits the unpacked base."""
    # {name: values from before any method trained it}. The first method that trains a tensor keeps them.
    original: dict[str, Any] = {}
    for a in reversed(edit.attached(model)):
        original.update(a.base_values)
    parameters = edit.base_parameters(model)
    shapes = {}
    dtypes = set()
    weights = hashlib.blake2b(digest_size=16)
    rounded = {dtype: hashlib.blake2b(digest_size=16) for dtype in ROUNDED}
    for name, v in base_values(model, parameters).items():
        if not edit.is_head(model, name):
            a = array.asnumpy(original[name] if name in original else dense_array(v))
            shapes[name] = list(a.shape)
            dtype = np.float32 if a.dtype.kind == "f" else None
            weights.update(name.encode() + np.ascontiguousarray(a, dtype).tobytes())
            is_float = a.dtype.kind == "f" or a.dtype == array.bfloat16
            if is_float:
                dtypes.add("float32" if a.dtype.itemsize > 2 else str(a.dtype))
            for to, digest_of_rounded in rounded.items():
                digest_of_rounded.update(name.encode() + _rounded(a, to if is_float else None).tobytes())
    return {
        "family": type(model).__name__,
        "shapes": hashlib.blake2b(json.dumps(shapes).encode(), digest_size=8).hexdigest(),
        "numbers": int(sum(np.prod(s) for s in shapes.values())),
        "tensors": len(shapes),
        "head": [list(p.shape) for name, p in parameters.items() if edit.is_head(model, name)],
        "weights": weights.hexdigest(),
        "dtype": " ".join(sorted(dtypes)),
        "rounded": {dtype: d.hexdigest() for dtype, d in rounded.items()},
    }


def base_values(model: Module, parameters: dict[str, Tensor]) -> dict[str, Any]:
    """{name: Tensor, Packed or buffer} of the base: the weights in the order of the dense model, then saved buffers.

    parameters: the base's own tensors."""
    packed = {path: m for path, m in model.named_modules() if isinstance(m, Packed) and not edit.is_in_edit(path)}
    weights = {}
    for path, module in model.named_modules():
        for leaf, value in module.own((Tensor, Packed)).items():
            name = f"{path}.{leaf}" if path else leaf
            if name in parameters or name in packed:       # a shared tensor stands there once
                weights[name] = value
    buffers = model.named_buffers(persistent_only=True)
    own = {n: v for n, v in buffers.items() if not edit.is_in_edit(n) and not edit.inside(n, packed)}
    return {**weights, **own}


def dense_array(value: Any) -> Any:
    """The array of a tensor, of a packed weight, or of a buffer."""
    return dense(value) if isinstance(value, (Tensor, Packed)) else value


def _rounded(a: np.ndarray, dtype: str | None) -> np.ndarray:
    """The values in C order, rounded to a dtype if one is given."""
    with np.errstate(over="ignore"):                       # too large for float16: infinite, as in model.to
        return np.ascontiguousarray(a, None if dtype is None else np.dtype(dtype))


def _same_weights(wanted: dict[str, Any], got: dict[str, Any]) -> bool:
    """True if two bases have the same weights, as far as their dtypes show it.

    Bases of one dtype are compared exactly. The same file may also be loaded in 16 bits: then both are compared as
    rounded to the 16-bit dtype. A float16 and a bfloat16 base are not comparable, and count as the same."""
    if wanted.get("weights") == got["weights"]:
        return True
    dtypes = {wanted.get("dtype"), got["dtype"]}
    rounded_to = dtypes & set(ROUNDED)
    if len(dtypes) == 1 or not rounded_to or "rounded" not in wanted:
        return False
    if len(rounded_to) == 2:
        return True
    (dtype,) = rounded_to
    return wanted["rounded"][dtype] == got["rounded"][dtype]


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
    if wanted.get("head") and not got["head"] and wanted.get("family") == got["family"]:
        classes = wanted["head"][-1][0]                    # the last tensor of a head: (classes,) or (classes, width)
        raise ValueError(f"this adapter was trained with a new head of {classes} classes, which this model lacks: "
                         f"call tinyft.classifier(model, {classes}) first")
    for key, text in descriptions.items():
        differs = not _same_weights(wanted, got) if key == "weights" else wanted.get(key) != got[key]
        if differs:
            trained_on = text.format(wanted.get(key))
            raise ValueError(f"this adapter was trained on {trained_on}; this is {text.format(got[key])}")

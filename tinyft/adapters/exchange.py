"""Adapter folders of other libraries: a JSON and a safetensors file, read strictly, and attached all or nothing."""
from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from .. import array, edit
from ..checks import brief, instance
from ..edit import Attached, Method
from ..files import FLOATS, check_ordinary, read_json, read_safetensors, write_atomically
from ..formats.directory import first_names
from ..nn import Module
from .files import DRAWS_PER_NUMBER, MORE_DRAWS, LimitedGenerator, as_dtype, explain
from .reading import check_finite

__all__ = [
    "Values", "attach_values", "check_arguments", "check_settings", "compact_targets", "read_folder", "write_folder",
]

Values = dict[str, dict[str, np.ndarray]]                # {path of an edited module: {name of a tensor: its values}}
EMPTY = (None, False, 0, "", [], {})


def check_arguments(caller: str, model: Any, path: Any, name: Any) -> Path:
    """The path. TypeError or ValueError for an argument of a wrong kind."""
    edit.check_model(caller, model)
    instance(caller, path, (str, os.PathLike), "a path")
    edit.check_name(f"{caller}: name", name)
    return Path(path)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def read_folder(path: Path, config: str, weights: str, pickle: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(the JSON object in the file `config`, {name: array} of the file `weights`) of a folder.

    pickle: the name of the file that the other library may have written in place of `weights`; it is never opened.
    FileNotFoundError if a file is missing; ValueError if one is damaged, or if an array holds no finite numbers."""
    for file in (config, weights):
        if os.path.lexists(path / file):
            continue
        if file == weights and os.path.lexists(path / pickle):
            raise FileNotFoundError(f"{path} has no {weights}, only {pickle}: a pickle can run any program, so it is "
                                    "not opened here; save the adapter again, as safetensors")
        raise FileNotFoundError(f"{path} is no adapter: it has no {file}")
    for file in (config, weights):
        check_ordinary(path / file)
    settings = read_json(path / config, allow_nan=False)
    arrays, _ = read_safetensors(path / weights)
    wrong = [name for name, a in arrays.items() if a.dtype not in FLOATS.values()]
    if wrong:
        raise ValueError(f"{path}: an adapter wants floating-point numbers, got others in {first_names(wrong)}")
    try:
        check_finite(arrays)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    return settings, arrays


def write_folder(path: Path, files: Mapping[str, dict[str, Any]], caller: str) -> Path:
    """Write files of a folder, all or none; the folder is made if it is missing. Returns the path.

    files: {name: values}. A file with the ending json holds the values as JSON, the others hold arrays. The file that
    other programs read first stands last: see write_atomically.
    ValueError for numbers that are not finite; FileExistsError if the path is a file."""
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; {caller} wants a directory")
    content = {}
    for name, values in files.items():
        if name.endswith(".json"):
            content[path / name] = f"{json.dumps(values, indent=2, allow_nan=False)}\n".encode()
        else:
            check_finite(values)
            arrays = {tensor: np.ascontiguousarray(a) for tensor, a in values.items()}
            content[path / name] = safetensors.numpy.save(arrays, metadata={"format": "pt"})
    write_atomically(content)
    return path


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def check_settings(file: str, settings: Mapping[str, Any], fixed: Mapping[str, tuple], known: Collection[str]) -> None:
    """ValueError, by its key, for a setting that changes the outputs and that this library does not have.

    fixed: {key: the supported values}; an absent key has the first. known: the keys that are read elsewhere, and those
    that have no effect. A key in neither is ignored if its value switches nothing on."""
    for key, supported in fixed.items():
        value = settings.get(key, supported[0])
        if value not in supported:
            wanted = " or ".join(repr(choice) for choice in supported)
            raise ValueError(f"{file}: {key} wants {wanted}, which is all that this library has, got {brief(value)}")
    for key, value in settings.items():
        if key not in known and key not in fixed and value not in EMPTY:
            raise ValueError(f"{file}: the key {brief(key)} is unknown here, and may change the outputs: it wants an "
                             f"empty value, got {brief(value)}")


# ── attaching ────────────────────────────────────────────────────────────────────────────────────────────────────────
def attach_values(model: Module, path: Path, method: Method, name: str | None, values: Values,
                  base_values: Mapping[str, np.ndarray]) -> Attached:
    """Attach a method whose edits, and whose tensors of the base, have these values.

    path: of the folder, for messages;  base_values: {name of a tensor of the base: its values}, of a new head.
    ValueError, naming what is missing, unexpected or of another shape; then the model was not changed."""
    stored = sum(a.size for tensors in values.values() for a in tensors.values())
    rng = LimitedGenerator(0, DRAWS_PER_NUMBER * stored + MORE_DRAWS)
    try:
        edits = method.edits(method.find(model), rng)
    except (TypeError, ValueError, LookupError) as e:
        raise ValueError(f"{path} does not fit this model: {explain(e)}") from e
    targets = {f"{module}:{n}": p for module, e in edits.items() for n, p in e.named_parameters().items()}
    arrays = {f"{module}:{n}": a for module, tensors in values.items() for n, a in tensors.items()}
    parameters = edit.base_parameters(model)
    targets |= {n: parameters[n] for n in base_values}
    arrays |= base_values
    faults = []
    for n in sorted(targets.keys() | arrays.keys()):
        if n not in arrays or n not in targets:
            faults.append(f"{n} is {'missing' if n in targets else 'unexpected'}")
        elif tuple(arrays[n].shape) != tuple(targets[n].shape):
            faults.append(f"{n} wants the shape {tuple(targets[n].shape)}, got {tuple(arrays[n].shape)}")
    if faults:
        raise ValueError(f"{path} does not fit this model: {'; '.join(faults[:4])}")
    cast = {n: as_dtype(n, a, targets[n].dtype) for n, a in arrays.items()}
    for n, p in targets.items():
        if n not in base_values:
            p.copy_(array.asarray(cast[n]))
    trained = {n: array.put_like(cast[n], parameters[n].data, parameters[n].dtype) for n in base_values}
    name = name or type(method).__name__.lower()
    return edit.attach(model, Attached(method, name, edits, trained), name)


def compact_targets(model: Module, paths: list[str]) -> tuple[str, ...]:
    """Few patterns that match these modules and no others.

    "attn.q" if that of every block is among them; else "blocks.1[0123].attn.q" for blocks 10 to 13."""
    every = list(edit.base_modules(model))
    chosen = set(paths)
    patterns: dict[str, list[str]] = {}                  # {pattern, with [] for the last digit: the digits}
    for path in paths:
        end = ".".join(path.split(".")[-2:])
        same_end = {other for other in every if f".{other}".endswith(f".{end}")}
        number = re.search(r"\.(\d*)(\d)\.", path)
        if same_end <= chosen:
            patterns[end] = []
        elif number is None:
            patterns[path] = []
        else:
            pattern = f"{path[:number.start(2)]}[]{path[number.end(2):]}"
            patterns.setdefault(pattern, []).append(number[2])
    out = []
    for pattern, digits in patterns.items():
        chosen_digits = f"[{''.join(digits)}]" if len(digits) > 1 else "".join(digits)
        out.append(pattern.replace("[]", chosen_digits))
    return tuple(out)

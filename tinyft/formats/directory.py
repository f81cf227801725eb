"""A directory of safetensors and JSON files, read with every check. Nothing here knows a model."""
from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..files import FLOATS, is_file_name, read_json, read_safetensors

__all__ = ["FLOATS", "check_tensors", "read_json", "read_all", "read_file", "first_names"]

LONGEST_NAME = 200                                       # characters of a name in an error message


def first_names(names: list[str]) -> str:
    """The first four names, and the number of the others. A name of a file may hold anything: it is cut, and shown
    with its line breaks as \\n."""
    shown = [name if name.isprintable() else repr(name) for name in names[:4]]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(name[:LONGEST_NAME] for name in shown) + more


def check_tensors(shapes: dict[str, tuple[int, ...]], stored: Mapping[str, Any], source: str,
                  wrong: Iterable[str] = ()) -> None:
    """ValueError unless the file's tensors are exactly those of the model, with its shapes.

    The message names the missing, the unexpected and the wrong tensors, four of each.

    shapes  {name: shape} of the model's tensors
    stored  {name: tensor with a shape} of the file
    source  what says which tensors are wanted, for the message
    wrong   sentences about further faults of single tensors
    """
    missing = [name for name in shapes if name not in stored]
    unexpected = [name for name in stored if name not in shapes]
    wrong_shapes = [f"{name} wants shape {shape}, got {stored[name].shape}"
                    for name, shape in shapes.items() if name in stored and stored[name].shape != shape]
    wrong = [*wrong_shapes, *wrong]
    faults = []
    if missing:
        faults.append(f"missing {first_names(missing)}")
    if unexpected:
        faults.append(f"unexpected {first_names(unexpected)}")
    if wrong:
        faults.append(first_names(wrong))
    if faults:
        raise ValueError(f"the tensors are not those that {source} asks for: {'; '.join(faults)}")


def read_all(folder: Path) -> dict[str, np.ndarray]:
    """{name: view into its file} of model.safetensors, or of the shards that model.safetensors.index.json names.

    FileNotFoundError if a file is missing, ValueError if a file is damaged or index and shards disagree.
    """
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if os.path.lexists(single):                            # anything but an ordinary file is refused
        return read_file(single)
    if os.path.lexists(index):
        return _read_shards(folder, index)
    pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
    if pickles:
        raise FileNotFoundError(
            f"{folder} has no model.safetensors, only {pickles[0].name}: a pickle can run any program, "
            "so it is not opened here; convert it once with transformers: "
            "from_pretrained(...).save_pretrained(..., safe_serialization=True)")
    raise FileNotFoundError(f"{folder} has no model.safetensors")


def _read_shards(folder: Path, index: Path) -> dict[str, np.ndarray]:
    """{name: view into its shard} of all tensors. index: the JSON file whose weight_map is {tensor: shard's file name}.

    ValueError unless each tensor stands in exactly one shard, FileNotFoundError if a shard is missing.
    """
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(map(_is_shard_name, shard_of.values())):
        raise ValueError(f"{index} is damaged: wanted a weight_map from tensors to files beside it")
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(shard_of.values())):
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder} has no {shard}, which {index.name} names")
        found = read_file(folder / shard)
        if twice := tensors.keys() & found.keys():
            raise ValueError(f"{folder}: {first_names([min(twice)])} stands in two shards")
        tensors.update(found)
    if missing := [name for name in shard_of if name not in tensors]:
        raise ValueError(f"{folder}: {first_names(missing)} stands in {index.name} and in no shard")
    return tensors


def _is_shard_name(name: Any) -> bool:
    """True for the bare name of a safetensors file: no path that leads to another directory."""
    return is_file_name(name) and name.endswith(".safetensors")


def read_file(file: Path) -> dict[str, np.ndarray]:
    """{name: view into the mapped file} of one safetensors file. ValueError if it is damaged."""
    tensors, _ = read_safetensors(file)
    return tensors

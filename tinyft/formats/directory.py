"""A directory of safetensors and JSON files, read with every check. Nothing here knows a model."""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from .. import array

__all__ = ["FLOATS", "read_json", "read_all", "read_file", "first_names"]

FLOATS = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": array.bfloat16}
# Dtypes that no weight has. Files hold masks and positions in them, which the families skip.
OTHERS = {
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def first_names(names: list[str]) -> str:
    """The first four names, and the number of the others."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def read_json(file: Path) -> dict:
    """The JSON object in a file. FileNotFoundError if the file is missing, ValueError if it is damaged."""
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:              # not UTF-8, not JSON, or nested too deeply
        raise ValueError(f"{file} is damaged: {e}") from e
    if not isinstance(values, dict):
        raise ValueError(f"{file} is damaged: wanted a JSON object, got {type(values).__name__}")
    return values


def read_all(folder: Path) -> dict[str, np.ndarray]:
    """{name: view into its file} of model.safetensors, or of the shards that model.safetensors.index.json names.

    FileNotFoundError if a file is missing, ValueError if a file is damaged or index and shards disagree.
    """
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.is_file():
        return read_file(single)
    if index.is_file():
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
    if not isinstance(shard_of, dict) or not all(map(_is_file_name, shard_of.values())):
        raise ValueError(f"{index} is damaged: wanted a weight_map from tensors to files beside it")
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(shard_of.values())):
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder} has no {shard}, which {index.name} names")
        found = read_file(folder / shard)
        if twice := tensors.keys() & found.keys():
            raise ValueError(f"{folder}: {min(twice)} stands in two shards")
        tensors.update(found)
    if missing := [name for name in shard_of if name not in tensors]:
        raise ValueError(f"{folder}: {first_names(missing)} stands in {index.name} and in no shard")
    return tensors


def _is_file_name(name: Any) -> bool:
    """True for the bare name of a safetensors file: no path that leads to another directory."""
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def read_file(file: Path) -> dict[str, np.ndarray]:
    """{name: view into the mapped file} of one safetensors file. ValueError if it is damaged.

    The file is 8 bytes with the length of the header, the JSON header, and the data.
    The safetensors library checks the header: its JSON, and that shapes, dtypes and offsets cover the file
    exactly. The views are made here, since not every version of the library gives bfloat16 to NumPy.
    """
    try:
        with safe_open(os.fspath(file), framework="numpy"):
            pass
    except (SafetensorError, ValueError, OverflowError) as e:
        raise ValueError(f"{file} is damaged: {e}") from e
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    start_of_data = 8 + length
    if file.stat().st_size > start_of_data:
        data = np.memmap(file, np.uint8, "r", offset=start_of_data)
    else:
        data = np.empty(0, np.uint8)                       # an empty file cannot be mapped
    tensors = {}
    for name, entry in header.items():
        # OTHERS are the dtypes of masks and positions: the families skip such tensors, or refuse them as weights.
        dtype = FLOATS.get(entry["dtype"]) or OTHERS.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"{file}: {name} wants one of the dtypes {', '.join(FLOATS)}, got {entry['dtype']}")
        start, end = entry["data_offsets"]
        tensors[name] = data[start:end].view(dtype).reshape(entry["shape"])
    return tensors

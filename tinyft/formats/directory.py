"""A directory of safetensors and JSON files, read with every check.  Nothing here knows a model."""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from .. import array

__all__ = ["FLOATS", "read_json", "read_all", "read_file", "few"]

FLOATS = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": array.bfloat16}
# kinds that no weight has: masks and positions, which are skipped
OTHERS = {"I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"), "U64": np.dtype("<u8"),
          "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"), "BOOL": np.dtype("?")}


def few(names: list[str]) -> str:
    "The first four, and how many more there are."
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# ── reading ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def read_json(file: Path) -> dict:
    "The JSON object in a file.  FileNotFoundError if it is not there, ValueError if it is damaged."
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}")
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:                                    # not UTF-8, not JSON, or nested to exhaust the parser
        raise ValueError(f"{file} is damaged: {e}") from e
    if not isinstance(facts, dict):
        raise ValueError(f"{file} is damaged: wanted a JSON object, got {type(facts).__name__}")
    return facts


def read_all(folder: Path) -> dict[str, np.ndarray]:
    "{name: view into its file} of model.safetensors, or of the shards its index names."
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return read_file(single)
    if not index.is_file():
        pickled = [p.name for p in sorted(folder.glob("*.bin"))] + [p.name for p in sorted(folder.glob("*.pt"))]
        raise FileNotFoundError(f"{folder} has no model.safetensors" + (
            f", only {pickled[0]}: a pickle can run any program, so it is not opened here; convert it once with transformers: "
            "from_pretrained(...).save_pretrained(..., safe_serialization=True)" if pickled else ""))
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(map(_beside, where.values())):
        raise ValueError(f"{index} is damaged: wanted a weight_map from tensors to files beside it")
    out: dict[str, np.ndarray] = {}
    for shard in sorted(set(where.values())):
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder} has no {shard}, which {index.name} names")
        held = read_file(folder / shard)
        if twice := out.keys() & held.keys():
            raise ValueError(f"{folder}: {min(twice)} stands in two shards")
        out.update(held)
    if lost := [n for n in where if n not in out]:
        raise ValueError(f"{folder}: {few(lost)} stands in {index.name} and in no shard")
    return out


def _beside(name: Any) -> bool:
    "Whether this names a safetensors file in the same directory, and leads nowhere else."
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def read_file(file: Path) -> dict[str, np.ndarray]:
    """{name: view} of one safetensors file.  The library checks the header: its JSON, and that shapes, kinds and offsets cover the file
    exactly.  The views are taken here, since not every version of the library gives bfloat16 to NumPy."""
    try:
        with safe_open(os.fspath(file), framework="numpy"):
            pass
    except (SafetensorError, ValueError, OverflowError) as e:
        raise ValueError(f"{file} is damaged: {e}") from e
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    raw = np.memmap(file, np.uint8, "r", offset=8 + length) if file.stat().st_size > 8 + length else np.empty(0, np.uint8)
    out = {}
    for name, t in header.items():
        kind = {**FLOATS, **OTHERS}.get(t["dtype"])
        if kind is None:
            raise ValueError(f"{file}: {name} holds {t['dtype']} numbers; those read here are {', '.join(FLOATS)}")
        start, end = t["data_offsets"]
        out[name] = raw[start:end].view(kind).reshape(t["shape"])
    return out

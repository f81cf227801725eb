"""A directory of safetensors and JSON files: read with every check, written so that what was good before is never damaged.

Nothing here knows a model.  What is written comes into its place only when all of it is on the disk.
"""
from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .. import array

__all__ = ["FLOATS", "read_json", "read_all", "read_file", "write_json", "write_file", "publish", "few"]

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


# ── writing ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def write_json(file: Path, facts: dict) -> None:
    "A JSON object, flushed to the disk."
    with open(file, "wb") as f:
        f.write((json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode())
        f.flush()
        os.fsync(f.fileno())


def write_file(file: Path, tensors: dict[str, np.ndarray]) -> None:
    "One safetensors file, flushed to the disk.  OSError if it does not fit there."
    try:
        save_file(tensors, file, metadata={"format": "pt"})                      # transformers wants to know whose layout it is
    except SafetensorError as e:
        raise OSError(str(e)) from e
    with open(file, "rb+") as f:
        os.fsync(f.fileno())
    mask = os.umask(0)                                                           # some versions of the library give the file to its owner alone
    os.umask(mask)
    os.chmod(file, 0o666 & ~mask)


def publish(files: dict[str, Callable[[Path], None]], path: Path) -> None:
    "Write all files beside their place, then put them there.  If anything is raised on the way, the directory is what it was."
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; a model is saved as a directory")
    home = path if path.is_dir() else path.absolute().parent                     # on the same disk as the place itself
    home.mkdir(parents=True, exist_ok=True)
    stage = home / f".saving-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        stage.mkdir()
        for name, write in files.items():
            write(stage / name)
        if path.is_dir():
            _exchange(stage, path, list(files))
        else:
            os.rename(stage, path)
    except OSError as e:
        sentence = f"could not write {path} ({e.strerror or e}); what was there before is untouched"
        raise (OSError(sentence) if e.errno is None else OSError(e.errno, sentence)) from e
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _exchange(stage: Path, path: Path, names: list[str]) -> None:
    "Move the files in, one at a time; on any exception, Ctrl-C too, move the old ones back."
    before = {n: stage / f"{n}.before" for n in names if (path / n).exists()}
    for n, kept in before.items():
        try:
            os.link(path / n, kept)
        except OSError:                                                          # a file system without links
            shutil.copy2(path / n, kept)
    try:
        for n in names:
            os.replace(stage / n, path / n)
    except BaseException:
        for n in names:
            if not (stage / n).exists():                                         # this one had moved
                os.replace(before[n], path / n) if n in before else (path / n).unlink(missing_ok=True)
        raise

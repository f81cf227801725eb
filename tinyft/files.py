"""JSON and safetensors files, read with every check, and safetensors files with facts in their header. No pickle.

A reader raises a ValueError of one line for every damaged file. It opens ordinary files only, and takes no more memory
than a few times the size of the file.

The tensors of a large file are views into the file, which the system reads page by page when they are used. A write to
a view changes no file: the written pages become the process's own. A file that is replaced by a rename, as this library
does, stays readable; another program must not write into it while a model from it is in use.
"""
from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from ml_dtypes import bfloat16
from safetensors import safe_open
from safetensors.numpy import save

from .atomic import is_file_name, read_together, sweep, write_atomically

__all__ = [
    "DTYPES", "FLOATS", "check_ordinary", "drop_pages", "is_file_name", "is_mapped", "pack_tensors", "python_number",
    "read_json", "read_json_list", "read_safetensors", "read_tensors", "read_together", "refuse_damage", "sweep",
    "write_atomically", "write_tensors",
]

FLOATS = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(bfloat16)}
# The other dtypes are those of masks and positions.
DTYPES = FLOATS | {
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
LARGEST_JSON = 1 << 22                                   # bytes
DEEPEST_JSON = 40                                        # lists and objects, one inside the other
MAPPED_FROM = 1 << 20                                    # bytes; a smaller file of tensors is read at once


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def read_json(file: Path, *, allow_nan: bool = True) -> dict[str, Any]:
    """The JSON object in a file. FileNotFoundError if the file is missing or no ordinary file.

    ValueError if the file is damaged, larger than LARGEST_JSON or deeper than DEEPEST_JSON, or if a key stands twice in
    an object; without allow_nan also for NaN and infinite numbers."""
    values = _read_json(file, allow_nan)
    if not isinstance(values, dict):
        raise ValueError(f"{file} is damaged: wanted a JSON object, got {type(values).__name__}")
    return values


def read_json_list(file: Path) -> list[Any]:
    """The JSON list in a file, with the checks of read_json."""
    values = _read_json(file, allow_nan=False)
    if not isinstance(values, list):
        raise ValueError(f"{file} is damaged: wanted a JSON list, got {type(values).__name__}")
    return values


def _read_json(file: Path, allow_nan: bool) -> Any:
    """The JSON value in a file; see read_json."""
    check_ordinary(file)
    size = file.stat().st_size
    if size > LARGEST_JSON:
        raise ValueError(f"{file} is damaged: wanted at most {LARGEST_JSON:,} bytes, got {size:,}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_object)
        _check_json(values, allow_nan)
    except (ValueError, RecursionError) as e:              # not UTF-8, not JSON, or nested too deeply
        raise ValueError(f"{file} is damaged: {e}") from e
    return values


def check_ordinary(file: Path) -> None:
    """FileNotFoundError unless this is an ordinary file: opening a pipe waits, and a device has no end."""
    if file.is_file():
        return
    if os.path.lexists(file):
        raise FileNotFoundError(f"{file} is no ordinary file")
    raise FileNotFoundError(f"{file.parent} has no {file.name}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. ValueError if a key stands twice in it: readers differ in which value they take."""
    values = dict(pairs)
    if len(values) < len(pairs):
        for name, _ in pairs:                            # remove each key once: the first that is gone stood twice
            if name not in values:
                raise ValueError(f"the key {name[:60]!r} stands twice")
            del values[name]
    return values


def _check_json(values: Any, allow_nan: bool) -> None:
    """ValueError for values inside too many others, for half a character of UTF-16, which no file can hold as text, and
    without allow_nan for numbers that are not finite."""
    level = [values]
    for _ in range(DEEPEST_JSON):
        below = []
        for value in level:
            if isinstance(value, dict):
                below += value
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str):
                value.encode()                           # UnicodeEncodeError is a ValueError
            elif isinstance(value, float) and not allow_nan and not math.isfinite(value):
                raise ValueError(f"wanted finite numbers, got {value}")
        level = below
    if level:
        raise ValueError(f"wanted at most {DEEPEST_JSON} lists and objects inside each other")


@contextlib.contextmanager
def refuse_damage(file: str | os.PathLike) -> Iterator[None]:
    """Turn every failure of a library on the content of a file into a ValueError of one line.

    A panic of a library in Rust is a BaseException and no Exception."""
    try:
        yield
    except OSError:
        raise
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise ValueError(f"{file} is damaged: {reason}") from e


def read_safetensors(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """({name: array}, the texts of the header) of one safetensors file; the arrays are views into the mapped file.

    ValueError if it is damaged, FileNotFoundError if it is missing or no ordinary file. The arrays may be written to:
    that changes no file. They need not be aligned.

    The file is 8 bytes with the length of the header, the JSON header, and the data. The safetensors library checks the
    header: its JSON, and that shapes, dtypes and offsets cover the file exactly. The views are made here, since not
    every version of the library gives bfloat16 to NumPy.
    """
    check_ordinary(file)
    with refuse_damage(file):
        with safe_open(os.fspath(file), framework="numpy"):
            pass
        with open(file, "rb") as f:
            content = _content(f)
        length = int.from_bytes(content[:8], "little")
        start_of_data = 8 + length
        header = json.loads(content[8:start_of_data])
        texts = header.pop("__metadata__", None) or {}
        tensors = {}
        for name, entry in header.items():
            dtype = DTYPES.get(entry["dtype"])
            if dtype is None:
                raise ValueError(f"{name[:60]!r} wants one of the dtypes {', '.join(FLOATS)}, got {entry['dtype']}")
            start = start_of_data + entry["data_offsets"][0]
            shape = entry["shape"]
            # Each array is made from the content, not from one array of the whole: `base` tells the arrays apart.
            tensors[name] = np.frombuffer(content, dtype, math.prod(shape), start).reshape(shape)
        return tensors, texts


def _content(f: BinaryIO) -> mmap.mmap | bytearray:
    """The content of an open file: mapped if it is large. A write to it changes no file."""
    size = os.fstat(f.fileno()).st_size
    if size < MAPPED_FROM:
        return bytearray(f.read())
    return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)


def _mapping_of(a: np.ndarray) -> mmap.mmap | None:
    """The mapped file into which an array is a view, or None."""
    owner = a
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    return owner if isinstance(owner, mmap.mmap) else None


def is_mapped(a: np.ndarray) -> bool:
    """True for a view into a mapped file."""
    return _mapping_of(a) is not None


def drop_pages(a: np.ndarray) -> None:
    """Give back the memory that the mapped file of a view takes; the next use of any of its views reads the file again.

    For a file of which no view has been written to: what was written would be lost."""
    mapping = _mapping_of(a)
    advice = getattr(mmap, "MADV_DONTNEED", None)        # not on every system
    if mapping is not None and advice is not None:
        mapping.madvise(advice)


# ── one file with arrays and facts ───────────────────────────────────────────────────────────────────────────────────
def pack_tensors(arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> bytes:
    """The bytes of one file: arrays by name, facts that JSON can hold (NumPy numbers included), and a checksum."""
    arrays = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in arrays.items()}
    text = json.dumps(facts, default=python_number)
    return save(arrays, metadata={"facts": text, "sum": checksum(arrays, text)})


def python_number(value: Any) -> Any:
    """A NumPy number as a Python number, for json.dumps. TypeError for anything else that JSON cannot hold."""
    if not isinstance(value, np.generic):
        raise TypeError(f"a file holds numbers, texts, lists and dicts, got a {type(value).__name__}")
    return value.item()


def write_tensors(path: str | os.PathLike, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """Write arrays by name, and facts that JSON can hold, to one file, atomically."""
    write_atomically({path: pack_tensors(arrays, facts)})


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """({name: array}, facts) of a safetensors file that write_tensors wrote; the facts are JSON in its header.

    FileNotFoundError if there is no ordinary file; ValueError if it is damaged or of another kind.
    """
    file = Path(path)
    views, header = read_safetensors(file)
    if "facts" not in header:
        raise ValueError(f"{file} is damaged or not one of ours: its header holds no facts")
    with refuse_damage(file):
        facts = json.loads(header["facts"])
        if not isinstance(facts, dict):
            raise ValueError("its facts are no JSON object")
        if "sum" in header and header["sum"] != checksum(views, header["facts"]):
            raise ValueError("its content does not fit its checksum")
        return {name: np.array(view) for name, view in views.items()}, facts


def checksum(arrays: dict[str, np.ndarray], text: str) -> str:
    """CRC-32 of a text and of arrays with their names, dtypes and shapes, in hexadecimal: to detect a damaged file."""
    crc = zlib.crc32(text.encode())
    for name in sorted(arrays):
        a = arrays[name]
        crc = zlib.crc32(f"{name} {a.dtype} {a.shape}".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(a).reshape(-1).view(np.uint8), crc)
    return f"{crc:08x}"

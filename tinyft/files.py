"""One safetensors file with facts in its header, written so that an earlier good file is never damaged.  No pickle."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

__all__ = ["pack_tensors", "write_tensors", "read_tensors", "write_atomically", "sweep"]


def write_atomically(files: Mapping[str | os.PathLike, bytes]) -> None:
    """Write each file beside its path and flush it to the disk; when all are written, move each to its path.

    If anything is raised on the way, also by Ctrl-C, every file is as it was before. OSError (a full disk) says so.
    """
    content = {Path(path): data for path, data in files.items()}
    new = {path: _temporary(path) for path in content}  # names for the new content
    old = {path: _temporary(path) for path in content}  # second names of the files that exist, to move back if needed
    try:
        for path, data in content.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(new[path], "xb") as f:  # x: raises if the name exists
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
        for path in content:
            if path.exists():
                _keep(path, old[path])
        _move(new, old)
    except OSError as e:
        raise OSError(e.errno, f"could not write {path} ({e.strerror}); what was there before is untouched") from e
    finally:
        for leftover in (*new.values(), *old.values()):
            leftover.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A new hidden name beside a file."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}")


def _keep(path: Path, beside: Path) -> None:
    """Give the file a second name, or copy it."""
    try:
        os.link(path, beside)
    except OSError:  # a file system without links
        shutil.copy2(path, beside)


def _move(new: dict[Path, Path], old: dict[Path, Path]) -> None:
    """Move the new files to their paths, one at a time; on any exception move the old ones back.

    new, old   {path: temporary file} with the new content, and with the content before, if the path existed."""
    try:
        for path in new:
            os.replace(new[path], path)
    except BaseException:
        for path in new:
            if new[path].exists():  # not moved yet
                continue
            if old[path].exists():
                os.replace(old[path], path)
            else:  # nothing was at this path before
                path.unlink(missing_ok=True)
        raise


def sweep(path: str | os.PathLike) -> None:
    """Remove the temporary files that a killed process left beside this file."""
    path = Path(path)
    for leftover in path.parent.glob(f".{path.name}.{'[0-9a-f]' * 8}"):
        leftover.unlink(missing_ok=True)


def pack_tensors(arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> bytes:
    """The bytes of one file: arrays by name, facts that JSON can hold (NumPy numbers included), and a checksum."""
    arrays = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in arrays.items()}
    text = json.dumps(facts, default=_python_number)
    return save(arrays, metadata={"facts": text, "sum": checksum(arrays, text)})


def _python_number(value: Any) -> Any:
    """A NumPy number as a Python number."""
    return value.item()


def write_tensors(path: str | os.PathLike, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """Write arrays by name, and facts that JSON can hold, to one file, atomically."""
    write_atomically({path: pack_tensors(arrays, facts)})


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """({name: array}, facts) of a safetensors file that write_tensors wrote; the facts are JSON in its header.

    FileNotFoundError if there is no file; ValueError if it is damaged or of another kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(os.fspath(path), framework="numpy") as f:
            header = f.metadata() or {}
            facts = json.loads(header["facts"])
            arrays = {name: f.get_tensor(name) for name in f.keys()}
    except (SafetensorError, KeyError, ValueError, OSError) as e:
        raise ValueError(f"{path} is damaged or not one of ours: {e}") from e
    if "sum" in header and header["sum"] != checksum(arrays, header["facts"]):
        raise ValueError(f"{path} is damaged: its content does not fit its checksum")
    return arrays, facts


def checksum(arrays: dict[str, np.ndarray], text: str) -> str:
    """CRC-32 of a text and of arrays with their names, dtypes and shapes, in hexadecimal: to detect a damaged file."""
    crc = zlib.crc32(text.encode())
    for name in sorted(arrays):
        a = arrays[name]
        crc = zlib.crc32(f"{name} {a.dtype} {a.shape}".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(a).reshape(-1).view(np.uint8), crc)
    return f"{crc:08x}"

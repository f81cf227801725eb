"""One safetensors file with facts in its header, written so that a file that was good before is never damaged.  Nothing is unpickled."""
from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

__all__ = ["pack_tensors", "write_tensors", "read_tensors", "write_atomically", "sweep"]


def write_atomically(files: Mapping[str | os.PathLike, bytes]) -> None:
    """Write each file beside its place and flush it to the disk; when all are there, move each into its place.

    Whatever is raised on the way, Ctrl-C too, every file is what it was before; OSError (a full disk) says so."""
    todo = {Path(p): data for p, data in files.items()}
    new, old = ({p: p.with_name(f".{p.name}.{os.urandom(4).hex()}") for p in todo} for _ in range(2))
    try:
        for path, data in todo.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(new[path], "xb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
        for path in todo:
            if path.exists():
                _keep(path, old[path])
        _move(new, old)
    except OSError as e:
        raise OSError(e.errno, f"could not write {path} ({e.strerror}); what was there before is untouched") from e
    finally:
        for left in (*new.values(), *old.values()):
            left.unlink(missing_ok=True)


def _keep(path: Path, beside: Path) -> None:
    "The same file under a second name, or a copy."
    try:
        os.link(path, beside)
    except OSError:                                                              # a file system without links
        shutil.copy2(path, beside)


def _move(new: dict[Path, Path], old: dict[Path, Path]) -> None:
    "Move the new files in, one at a time; on any exception move the old ones back."
    try:
        for path in new:
            os.replace(new[path], path)
    except BaseException:
        for path in new:
            if not new[path].exists():                                           # this one had moved
                os.replace(old[path], path) if old[path].exists() else path.unlink(missing_ok=True)
        raise


def sweep(path: str | os.PathLike) -> None:
    "Remove what a killed process left half written beside this file."
    path = Path(path)
    for left in path.parent.glob(f".{path.name}.{'[0-9a-f]' * 8}"):
        left.unlink(missing_ok=True)


def pack_tensors(arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> bytes:
    "Arrays by name, and facts that JSON can hold, as one file's bytes, with a checksum."
    arrays = {k: np.ascontiguousarray(v).reshape(v.shape) for k, v in arrays.items()}
    number: Callable[[Any], Any] = lambda v: v.item()
    text = json.dumps(facts, default=number)
    return save(arrays, metadata={"facts": text, "sum": checksum(arrays, text)})


def write_tensors(path: str | os.PathLike, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    "Arrays by name, and facts that JSON can hold, in one file, atomically."
    write_atomically({path: pack_tensors(arrays, facts)})


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    "What write_tensors wrote.  ValueError if the file is damaged or of another kind."
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(os.fspath(path), framework="numpy") as f:
            header = f.metadata() or {}
            facts, arrays = json.loads(header["facts"]), {k: f.get_tensor(k) for k in f.keys()}
    except (SafetensorError, KeyError, ValueError, OSError) as e:
        raise ValueError(f"{path} is damaged or not one of ours: {e}") from e
    if "sum" in header and header["sum"] != checksum(arrays, header["facts"]):
        raise ValueError(f"{path} is damaged: its content does not fit its checksum")
    return arrays, facts


def checksum(arrays: dict[str, np.ndarray], text: str) -> str:
    "CRC-32 of a text, and of the arrays with their names, types and shapes."
    out = zlib.crc32(text.encode())
    for name in sorted(arrays):
        a = arrays[name]
        out = zlib.crc32(f"{name} {a.dtype} {a.shape}".encode(), out)
        out = zlib.crc32(np.ascontiguousarray(a).reshape(-1).view(np.uint8), out)
    return f"{out:08x}"

"""One safetensors file with facts in its header, written so that a file that was good before is never damaged.  Nothing is unpickled."""
from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

__all__ = ["write_tensors", "read_tensors", "write_atomically"]


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    "Write a file beside its place, flush it to the disk, and put it there in one move.  OSError (a full disk) leaves what was there."
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException as e:
        Path(tmp).unlink(missing_ok=True)
        if isinstance(e, OSError):
            raise OSError(e.errno, f"could not write {path} ({e.strerror}); what was there before is untouched") from e
        raise


def write_tensors(path: str | os.PathLike, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    "Arrays by name, and facts that JSON can hold, in one file."
    write_atomically(path, save({k: np.ascontiguousarray(v).reshape(v.shape) for k, v in arrays.items()}, metadata={"facts": json.dumps(facts)}))


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    "What write_tensors wrote.  ValueError if the file is damaged or of another kind."
    try:
        with safe_open(os.fspath(path), framework="numpy") as f:
            facts = json.loads((f.metadata() or {})["facts"])
            return {k: f.get_tensor(k) for k in f.keys()}, facts
    except (SafetensorError, KeyError, json.JSONDecodeError) as e:
        raise ValueError(f"{path} is damaged or not one of ours: {e}") from e

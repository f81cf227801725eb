"""Files of rows in a folder: rows-000000.safetensors, rows-000001.safetensors ... Each is written at once, whole, and
never changed. So a process that is killed leaves complete files, and the next one goes on behind them.
"""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...files import read_tensors, sweep, write_tensors


def read_row_files(folder: Path) -> Iterator[tuple[Path, dict[str, np.ndarray], dict[str, Any]]]:
    """(file, arrays, facts) of each file of a folder, in order. ValueError for a damaged file.

    Nothing if the folder is not there."""
    for file in sorted(folder.glob("rows-*.safetensors")):
        arrays, facts = read_tensors(file)
        yield file, arrays, facts


def write_row_file(folder: Path, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """Write one more file. A reader sees the whole file or none."""
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob("rows-*.safetensors")))
    file = folder / f"rows-{number:06d}.safetensors"
    while file.exists():                                 # another process fills the same folder, or a file was removed
        number += 1
        file = folder / f"rows-{number:06d}.safetensors"
    sweep(file)
    write_tensors(file, arrays, facts)

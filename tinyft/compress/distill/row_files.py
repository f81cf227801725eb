"""Files of rows in a folder: rows-000000.safetensors, rows-000001.safetensors ... Each is written at once, whole, and
never changed. So a process that is killed leaves complete files, and the next one goes on behind them.

Each row has a key and a number of entries. `keys` (rows, bytes of a key) and `counts` (rows,) say which; the entries of
all rows lie one behind the other in the other arrays of the file.
"""
from __future__ import annotations

from collections.abc import Collection, Iterator
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


def find_rows(
    file: Path, arrays: dict[str, np.ndarray], per_entry: Collection[str], others: Collection[str] = (),
) -> list[tuple[bytes, slice]]:
    """(key, its entries) of each row of a file.

    per_entry: the arrays with one place for each entry; others: those of other lengths. ValueError for a file with
    other arrays, and for one whose counts are not those of its keys and entries."""
    if arrays.keys() != {"keys", "counts", *per_entry, *others}:
        raise ValueError(f"{file} is damaged or not one of ours: it holds {', '.join(sorted(arrays)) or 'nothing'}")
    keys, counts = arrays["keys"], arrays["counts"]
    fits = keys.ndim == 2 and counts.shape == keys.shape[:1]
    if not fits or {arrays[name].shape[:1] for name in per_entry} != {(counts.sum(),)}:
        raise ValueError(f"{file} is damaged: its keys, counts and entries do not fit")
    rows = []
    end = 0
    for key, count in zip(keys, counts.tolist(), strict=True):
        start, end = end, end + count
        rows.append((key.tobytes(), slice(start, end)))
    return rows


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

"""The folder of a run of `tinyft compress`, from which it goes on after a stop, weight by weight.

    compress.json       the options of the run, and what identifies its model and its calibration data
    log.jsonl           a line for each compressed weight: {"path", "error", "before", "after", "seconds"}
    layers/             a file for each compressed weight, until the model is written
    config.json ...     the compressed model, at the end

A weight's line is written before its file: a weight with a file has its line.
"""
from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import asdict, fields
from pathlib import Path

from .. import checks
from ..compress import LayerReport, stored
from ..files import read_tensors, write_atomically, write_tensors
from ..nn import Packed
from .opening import as_json

__all__ = ["CONFIG", "Layers", "Reports", "remove_layers"]

CONFIG = "compress.json"
LAYERS = "layers"
LOG = "log.jsonl"


class Layers(MutableMapping):
    """{path of a module: its packed weight}, each weight in a file of its own. A weight is read when it is asked for.

    A file appears when it is complete and on the disk. ValueError for a damaged file, and for one of another weight."""

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]]):
        """folder: of the run. shapes: of the dense weights by path; no others can be kept."""
        self.folder = folder / LAYERS
        self.shapes = shapes

    def file(self, path: str) -> Path:
        """The file of one weight."""
        return self.folder / f"{path}.safetensors"

    def __contains__(self, path: object) -> bool:
        return path in self.shapes and self.file(str(path)).is_file()

    def __getitem__(self, path: str) -> Packed:
        if path not in self:
            raise KeyError(path)
        file = self.file(path)
        arrays, facts = read_tensors(file)
        try:
            if facts.get("path") != path:
                raise ValueError(f"it is of the weight {checks.brief(facts.get('path'))}")
            return stored.restore(facts.get("weight"), arrays, self.shapes[path])
        except ValueError as e:
            raise ValueError(f"{file} does not hold the weight of {path}: {e}; without this file the weight is "
                             "compressed again") from e

    def __setitem__(self, path: str, packed: Packed) -> None:
        write_tensors(self.file(path), stored.arrays(packed), {"path": path, "weight": stored.description(packed)})

    def __delitem__(self, path: str) -> None:
        if path not in self:
            raise KeyError(path)
        self.file(path).unlink()

    def __iter__(self) -> Iterator[str]:
        return (path for path in self.shapes if path in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Reports:
    """log.jsonl: the report of every weight, written when it is compressed."""

    def __init__(self, folder: Path, done: Layers):
        """Go on with the log of a folder. Lines of weights without a file are removed."""
        self.path = folder / LOG
        self.reports = {path: report for path, report in _read(self.path).items() if path in done}
        text = "".join(as_json(asdict(report)) + "\n" for report in self.reports.values())
        write_atomically({self.path: text.encode()})

    def add(self, report: LayerReport) -> bool:
        """Write the report of a weight. False if there is one: the weight was compressed before the run was stopped."""
        if report.path in self.reports:
            return False
        self.reports[report.path] = report
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(as_json(asdict(report)) + "\n")
        return True


def _read(path: Path) -> dict[str, LayerReport]:
    """{path of a weight: its report} of a log, up to the first damaged line: a killed process may have written half of
    one."""
    reports: dict[str, LayerReport] = {}
    if not path.is_file():
        return reports
    kinds = {field.name: str if field.name == "path" else (int, float) for field in fields(LayerReport)}
    for line in path.read_bytes().split(b"\n"):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict) or entry.keys() != kinds.keys():
            break
        if not all(isinstance(entry[name], kind) for name, kind in kinds.items()):
            break
        reports[entry["path"]] = LayerReport(**entry)
    return reports


def remove_layers(folder: Path) -> None:
    """Remove the files of the single weights: the model holds them."""
    layers = folder / LAYERS
    for file in layers.glob("*.safetensors"):
        file.unlink()
    with contextlib.suppress(OSError):                   # there is none, or it holds something else
        layers.rmdir()

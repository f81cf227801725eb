"""Rows of a study in a JSON file: a study that was killed goes on where it was. Means and intervals over seeds.

A row is the result of one run with one seed, under the key "name/seed". Training runs write checkpoints below
work/studies, so that the row in which a study was killed continues, too, and a teacher is there for its students.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from report import about
from threadpoolctl import threadpool_limits

import tinyft as ft
from tinyft.compare.report import interval
from tinyft.files import write_atomically

WORK = Path(__file__).parents[2] / "work" / "studies"  # checkpoints
RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]  # what JSON can hold


@dataclass(frozen=True)
class Study:
    """The rows of one study.

    file      of the rows, JSON
    settings  of all runs, what JSON can hold: rows of other settings are refused
    work      folder of the checkpoints"""

    file: Path
    settings: dict[str, Any]
    work: Path

    def read(self) -> dict[str, Any]:
        """{"settings", "machine", "rows": {key: row}}, the content of the file. ValueError for other settings."""
        if not self.file.exists():
            return {"settings": self.settings, "machine": machine(), "rows": {}}
        data = json.loads(self.file.read_text(encoding="utf-8"))
        if data["settings"] != self.settings:
            raise ValueError(f"{self.file} holds rows of other settings, {data['settings']}, than {self.settings}: "
                             "--again starts anew")
        return data

    def run(self, jobs: Mapping[str, Callable[[], Row]]) -> dict[str, Row]:
        """The rows of all jobs, {key: () -> row}: those that are missing are computed, and written one by one."""
        data = self.read()
        for key, job in jobs.items():
            if key in data["rows"]:
                continue
            start = time.process_time()
            with threadpool_limits(1):
                row = job()
            row["seconds"] = round(time.process_time() - start, 1)
            data["rows"][key] = row
            data["machine"] = machine()
            write_json(self.file, data)
            print(f"  {key:34} {row['seconds']:6.1f} s", flush=True)
        return {key: data["rows"][key] for key in jobs}

    def folder(self, key: str) -> Path:
        """The folder of the checkpoints of one run. Its name depends on the settings, too."""
        fingerprint = zlib.crc32(json.dumps([key, self.settings], sort_keys=True).encode())
        return self.work / f"{key.replace('/', '-').replace(' ', '_')}-{fingerprint:08x}"

    def forget(self) -> None:
        """Remove the rows and the checkpoints."""
        self.file.unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file atomically. ValueError for NaN and infinity."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically({path: (text + "\n").encode()})


@cache
def prose(split: str) -> np.ndarray:
    """The tokens of the shipped prose of a split, (N,); the text is tokenised once."""
    return ft.data.pretraining("prose", split)


# ---------------------------------------------------------------------------------------------------- over seeds
def values_of(rows: Mapping[str, Row], name: str, field: str, seeds: int) -> np.ndarray:
    """A field of the rows "name/0", "name/1" ..., (seeds,) or (seeds, points)."""
    return np.array([rows[f"{name}/{seed}"][field] for seed in range(seeds)])


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float | None]:
    """{mean, low, high}: the mean over seeds and its 95 % interval by Student's t; None, None for one seed.

    Of paired differences or ratios, one for each seed, the interval is the paired one."""
    values = np.asarray(values, float)
    mean, low, high = interval(values, np.zeros_like(values))
    if len(values) == 1:
        return {"mean": mean, "low": None, "high": None}
    return {"mean": mean, "low": low, "high": high}


def text(r: Mapping[str, float | None], form: str = ".3f", factor: float = 1) -> str:
    """mean (low to high) of `spread`, each times a factor."""
    mean = f"{r['mean'] * factor:{form}}"
    if r["low"] is None:
        return f"{mean} (one seed)"
    return f"{mean} ({r['low'] * factor:{form}} to {r['high'] * factor:{form}})"


# ---------------------------------------------------------------------------------------------------- times
def time_ratios(f: Callable[[], float], g: Callable[[], float], rounds: int) -> list[float]:
    """The seconds that f returns over those of g, `rounds` times. Each of them begins every second round."""
    f()
    g()  # the first calls are slower
    ratios = []
    for i in range(rounds):
        if i % 2:
            of_g = g()
            of_f = f()
        else:
            of_f = f()
            of_g = g()
        ratios.append(of_f / of_g)
    return ratios


def inference_seconds(model: ft.Module, ids: np.ndarray) -> float:
    """Processor seconds of one forward pass. ids (B, T)"""
    with ft.no_grad():
        start = time.process_time()
        model(ids)
        return time.process_time() - start


def step_seconds(model: ft.Module, batch: Any, loss: ft.Loss | None = None, steps: int = 2) -> float:
    """Processor seconds of a training step on this batch: the mean of `steps`, after one that is not counted."""
    marks = []

    def mark(done: int, terms: dict[str, float]) -> None:
        marks.append(time.process_time())

    ft.fit(model, [batch], steps + 1, ft.AdamW(1e-5), loss=loss, progress=False, on_step=mark)
    return (marks[-1] - marks[0]) / steps


def quartiles(ratios: Sequence[float]) -> dict[str, float]:
    """{mean: the median, low and high: the quartiles} of the ratios of paired rounds."""
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return {"mean": float(middle), "low": float(low), "high": float(high)}


# ---------------------------------------------------------------------------------------------------- curves
def curve(history: ft.History) -> Row:
    """{"steps", "curve"}: the steps of a run at which it was evaluated, and the held-out losses."""
    return {
        "steps": [step for step, _ in history.evaluations],
        "curve": [round(metrics["loss"], 5) for _, metrics in history.evaluations],
    }


def steps_to(steps: Sequence[int], losses: Sequence[float], level: float) -> float | None:
    """The first step at which a held-out loss is at most `level`, interpolated between evaluations; None: never.

    steps, losses: those of a curve. A level that the first evaluation has reached counts as reached there."""
    for i, loss in enumerate(losses):
        if loss > level:
            continue
        if i == 0:
            return float(steps[0])
        share = (losses[i - 1] - level) / (losses[i - 1] - loss)
        return steps[i - 1] + share * (steps[i] - steps[i - 1])
    return None


# ---------------------------------------------------------------------------------------------------- the program
@dataclass(frozen=True)
class Program:
    """A study with its command line. `main` measures and writes the page; `measure` gives the numbers for the claims.

    name, doc          of the files; the docstring of the module
    settings, smoke    dataclasses: of the study, and of a few steps that only show that it runs
    rows_of            (settings, study) -> rows; those that are missing are measured
    summary            (settings, rows) -> the numbers of the page and of the claims
    page, draw         (data of the file, numbers) -> Markdown; (numbers, path) writes the picture"""

    name: str
    doc: str
    settings: Any
    smoke: Any
    rows_of: Callable[[Any, Study], dict[str, Row]]
    summary: Callable[[Any, dict[str, Row]], dict[str, Any]]
    page: Callable[[dict[str, Any], dict[str, Any]], str]
    draw: Callable[[dict[str, Any], Path], None]

    def open(self, s: Any, out: Path, work: Path) -> Study:
        """The study with these settings. out: folder of the results; work: of the checkpoints."""
        return Study(out / f"{self.name}.json", json.loads(json.dumps(asdict(s))), work)  # as the file gives them back

    def report(self, s: Any, study: Study, rows: dict[str, Row]) -> None:
        """Write the page and the picture."""
        numbers = self.summary(s, rows)
        page = self.page(study.read(), numbers)
        study.file.with_suffix(".md").write_text(page, encoding="utf-8")
        self.draw(numbers, study.file.with_suffix(".png"))

    def measure(self) -> dict[str, Any]:
        """The numbers for the claims: the summary of all rows; those that are missing are measured."""
        study = self.open(self.settings, RESULTS, WORK / self.name)
        return self.summary(self.settings, self.rows_of(self.settings, study))

    def main(self, arguments: list[str] | None = None) -> None:
        """Measure the rows that are missing, and write the page and the picture. --smoke keeps nothing."""
        options = parse(self.doc.splitlines()[0], arguments)
        if options.smoke:
            with tempfile.TemporaryDirectory() as folder:
                study = self.open(self.smoke, Path(folder), Path(folder) / "work")
                self.report(self.smoke, study, self.rows_of(self.smoke, study))
            return
        study = self.open(self.settings, options.out, WORK / self.name)
        if options.again:
            study.forget()
        rows = study.read()["rows"] if options.page else self.rows_of(self.settings, study)
        self.report(self.settings, study, rows)


def parse(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of a study's command line."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--smoke", action="store_true", help="a few steps with one seed; nothing is kept")
    p.add_argument("--page", action="store_true", help="measure nothing: the page and the picture from the stored rows")
    p.add_argument("--again", action="store_true", help="remove the stored rows, and measure all")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return p.parse_args(arguments)


def heading(data: Mapping[str, Any], command: str) -> list[str]:
    """Lines of Markdown: the command, the time of all rows, the machine, and the settings."""
    seconds = sum(row["seconds"] for row in data["rows"].values())
    settings = ", ".join(f"{name} {value}" for name, value in data["settings"].items())
    where = about({"machine": data["machine"], "seconds": seconds})
    return [f"    {command}", "", where, "", f"Processor time of all runs, one thread: {seconds / 60:.1f} minutes. "
            f"Settings: {settings}.", ""]

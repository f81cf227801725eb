"""The comparison: methods on one real task, beside the untouched base, training from scratch, and simple models.

Users choose by five measures: bytes stored per task, peak memory of a training step, time of a step, held-out
quality with its spread over seeds, and the cost of inference relative to the base. All contenders train on the same
examples in the same order. A difference counts only if its paired 95 % interval over seeds excludes zero.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import array, checks
from ..files import write_atomically
from . import cells
from .figure import draw
from .report import finished_runs, table, verdict
from .settings import Contender, Settings
from .workers import call, finished, one_interrupt, workers

__all__ = ["compare"]

QUESTIONS = {
    "intact": "is a sentence of Python's documentation intact, or were two of its words swapped?",
    "package": "which of {classes} packages does a docstring come from? (their names are masked)",
    "domain": "a language model of English prose learns Python source; what does it forget?",
}
FILES = ("compare.json", "compare.png")
Say = Callable[[str], None]


def compare(s: Settings, out: str | os.PathLike, jobs: int | None = None, say: Say | None = None) -> dict[str, Any]:
    """Run the comparison and print it; write out/compare.json and out/compare.png.

    Returns the content of the JSON file. `jobs` contenders train at a time (default: 2 on NumPy, 1 on a device).
    `say` prints a text.

    Settings, model, data and folder are checked before anything starts: ValueError, TypeError or OSError. If the
    comparison ends early, the finished runs are printed; after an error, also of a killed worker (RuntimeError), they
    are written too. If a file cannot be written, the table is printed all the same, and OSError names what is missing.
    """
    if say is None:
        say = partial(print, flush=True)  # a pipe shows each line at once
    checks.function("compare: say", say, "a function of one text")
    out = Path(checks.instance("compare: out", out, (str, os.PathLike), "the path of a folder"))
    with one_interrupt():
        s, jobs = check(s, jobs)
        check_folder(out)
        report = run(s, out, jobs, say)
        try:
            say(conclusions(report))
        finally:  # the files are written also if nobody reads the output any more
            written = write(report, out)
        say(f"\n{report['seconds']:.0f} s.  Written: {written}")
    return report


# ---------------------------------------------------------------------------------------------------- before the start
def check(s: Settings, jobs: int | None) -> tuple[Settings, int]:
    """The settings with T lowered to fit the model, and the number of jobs. An error, in one sentence, for bad ones."""
    checks.instance("compare: s", s, Settings, "Settings")
    s.check()
    if jobs is None:
        jobs = min(2, os.cpu_count() or 1) if array.backend() == "numpy" else 1
    checks.whole("jobs", jobs, least=1)
    cells.check_base(s)
    s = cells.limit_text_length(s)
    cells.load_material(s, 0)  # an error in the data comes now, not from a worker
    return s, min(jobs, len(s.chosen()) * s.seeds)


def check_folder(out: Path) -> None:
    """Make the folder of the results. OSError, in one sentence, if its files cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as f:
            f.write(bytes(300_000))  # as large as the files will be: a full disk takes an empty file
    except OSError as e:
        raise OSError(f"compare cannot write to the folder {out} ({e.strerror}); nothing was started") from e
    for name in FILES:
        if (out / name).is_dir():
            raise OSError(f"compare writes a file {out / name}, but a folder has that name; nothing was started")


def headline(s: Settings) -> str:
    """The task and the settings in two lines."""
    question = QUESTIONS[s.task].format(classes=s.classes)
    unit = "tokens" if s.lm else "examples"
    seeds = "1 seed" if s.seeds == 1 else f"{s.seeds} seeds"
    sizes = f"{s.train:,} training {unit}, {seeds}, {s.steps} steps of {s.batch}"
    return f"{s.task}: {question}\n{sizes}; test modules are in no training text, pretraining included"


# ---------------------------------------------------------------------------------------------------- the runs
def run(s: Settings, out: Path, jobs: int, say: Say) -> dict[str, Any]:
    """The report of all runs. If an error ends them early, those that finished are printed and written first."""
    start = time.time()
    rows = s.chosen()
    report = new_report(s, rows)
    say(headline(s))
    try:
        with workers(jobs) as pool:
            fill(report, s, rows, pool, jobs, say)
    except BaseException as error:
        report["seconds"] = round(time.time() - start, 1)
        keep_finished(report, out, say, error)
        if isinstance(error, BrokenProcessPool):
            raise RuntimeError(explain_killed(report, s, rows)) from error
        raise
    report["seconds"] = round(time.time() - start, 1)
    return report


def new_report(s: Settings, rows: list[Contender]) -> dict[str, Any]:
    """A report without results. JSON-able.

    rows      {name: its kind and family}; the kind is "trained", "base" (untouched) or "simple" (no network)
    results   {name: one entry per seed}: the metrics, {"diverged": True}, or None for a run that did not end
    costs     {name: costs} of the contenders and of the base
    """
    return {
        "settings": asdict(s),
        "rows": {c.name: {"kind": "trained", "family": c.family} for c in rows},
        "results": {c.name: [None] * s.seeds for c in rows},
        "costs": {},
        "seconds": 0.0,
        "machine": machine(),
        "rates": {c.name: c.lr for c in rows},
    }


def machine() -> dict[str, Any]:
    """The machine, the backend, and the versions of Python, NumPy and tinyft, for the report. JSON-able."""
    from .. import __version__

    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "tinyft": __version__,
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "backend": array.backend(),
    }


def fill(
    report: dict, s: Settings, rows: list[Contender], pool: ProcessPoolExecutor | None, jobs: int, say: Say
) -> None:
    """Run everything, and enter each result in the report as soon as it is there."""
    seconds = cells.forecast(s, call(pool, cells.measure_pace, s), len(rows), jobs)
    say(f"about {seconds / 60:.1f} minutes on this machine ({len(rows)} contenders, {jobs} at a time)")
    add_untrained(report, s, pool)
    for c in tqdm(rows, "costs", disable=not sys.stderr.isatty(), leave=False):
        report["costs"][c.name] = call(pool, cells.measure_costs, s, c)
    for c, seed, metrics in train_all(s, rows, pool):
        report["results"][c.name][seed] = metrics


def add_untrained(report: dict, s: Settings, pool: ProcessPoolExecutor | None) -> None:
    """Enter the untouched base and the simple models in the report."""
    base = call(pool, cells.evaluate_base, s)
    if base:
        report["rows"][cells.BASE] = {"kind": "base", "family": ""}
        report["results"][cells.BASE] = [base] * s.seeds
        report["costs"][cells.BASE] = {"trained": 0, "head": 0, "stored": 0, "inference_ratio": 1.0}
    calls = {seed: partial(cells.run_simple, s, seed) for seed in range(s.seeds)}
    for seed, models in finished(pool, calls):
        for name, metrics in models.items():
            report["rows"][name] = {"kind": "simple", "family": ""}
            report["results"].setdefault(name, [None] * s.seeds)[seed] = metrics


def train_all(
    s: Settings, rows: list[Contender], pool: ProcessPoolExecutor | None
) -> Iterator[tuple[Contender, int, dict]]:
    """Train every contender with every seed; yield (contender, seed, metrics) and print a line as each run ends."""
    contenders = {c.name: c for c in rows}
    calls = {(c.name, seed): partial(cells.train_one, s, c, seed) for seed in range(s.seeds) for c in rows}
    with tqdm(total=len(calls), unit="run", disable=not sys.stderr.isatty(), leave=False) as bar:
        for (name, seed), metrics in finished(pool, calls):
            bar.update()
            quality = "diverged" if "diverged" in metrics else f"{s.quality} {metrics[s.quality]:.3f}"
            yield contenders[name], seed, metrics  # before the line: a run that is shown as finished is kept
            bar.write(f"  {name:<18} seed {seed}   {quality}   ({metrics['seconds']:.0f} s)", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------- at the end
def conclusions(report: dict) -> str:
    """The table and the verdict."""
    return f"{table(report)}\n\n{verdict(report)}"


def write(report: dict, out: Path) -> str:
    """Write compare.json and compare.png; their names, for the last line. OSError says what is missing."""
    files = {}
    note = ""
    try:
        files[out / "compare.png"] = draw(report)
    except ImportError:
        note = " (no figure: matplotlib is missing)"
    except Exception as e:  # a fault of the drawing library must not take the results with it
        note = f" (no figure: {type(e).__name__}, {e})"
    if note and (out / "compare.png").exists():
        note += f"; the {out / 'compare.png'} that is there belongs to an earlier run"
    files[out / "compare.json"] = json.dumps(report, indent=1, allow_nan=False).encode()  # last: see write_atomically
    try:
        write_atomically(files)
    except OSError as e:
        missing = " and ".join(sorted(path.name for path in files))
        raise OSError(f"the table above is complete, but {missing} of this run are missing: {e}") from e
    return ", ".join(str(path) for path in sorted(files)) + note


def keep_finished(report: dict, out: Path, say: Say, error: BaseException) -> None:
    """Print the runs that ended before the error, and write them, unless the user stopped the comparison.

    Then an earlier result in the folder is worth more than a part of this one.
    """
    if not finished_runs(report):
        return
    try:
        say(conclusions(report))
        if isinstance(error, Exception):
            say(f"\nWritten, as far as it went: {write(report, out)}")
    except OSError as e:  # the error before it is the one to report
        print(e, file=sys.stderr)


def explain_killed(report: dict, s: Settings, rows: list[Contender]) -> str:
    """The message after a worker process was killed."""
    total = len(rows) * s.seeds
    return (
        f"a worker process was killed, perhaps because memory ran out; {finished_runs(report)} of {total} runs were "
        "finished and are kept (--jobs 1 needs less memory)"
    )

"""The comparison: every method on one real task, beside training from scratch, the head alone, and simple models.

Users choose by five measures: bytes stored per task, peak memory of a training step, time of a step, held-out
quality with its spread over seeds, and the cost of inference relative to the base. All contenders train on the same
examples in the same order. A difference counts only if its paired 95 % interval over seeds excludes zero.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import array, kernels
from ..files import write_atomically
from . import cells
from .report import draw, table, verdict
from .settings import Contender, Settings

__all__ = ["compare"]

QUESTIONS = {
    "intact": "is a sentence of Python's documentation intact, or were two of its words swapped?",
    "package": "which of {classes} packages does a docstring come from? (their names are masked)",
    "domain": "a language model of English prose learns Python source; what does it forget?",
}


def compare(s: Settings, out: Path, jobs: int | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the comparison and print it; write out/compare.json and out/compare.png.

    Returns the content of the JSON file. `jobs` contenders train at a time (default: 2 on NumPy, 1 on a device).
    """
    start = time.time()
    s = cells.limit_text_length(s)
    rows = s.chosen()
    if jobs is None:
        jobs = min(2, os.cpu_count() or 1) if array.backend() == "numpy" else 1
    say(headline(s))
    with workers(jobs) as pool:
        seconds = cells.forecast(s, call(pool, cells.measure_pace, s), len(rows), jobs)
        say(f"about {seconds / 60:.1f} minutes on this machine ({len(rows)} contenders, {jobs} at a time)")
        bar = tqdm(rows, "costs", disable=not sys.stderr.isatty(), leave=False)
        costs = {c.name: call(pool, cells.measure_costs, s, c) for c in bar}
        results = {c.name: [None] * s.seeds for c in rows}  # runs end in any order
        for c, seed, metrics in train_all(s, rows, pool):
            results[c.name][seed] = metrics
    for seed in range(s.seeds):
        for name, metrics in cells.run_simple(s, seed).items():
            results.setdefault(name, []).append(metrics)
    report = {
        "settings": asdict(s),
        "results": results,
        "costs": costs,
        "seconds": round(time.time() - start, 1),
        "machine": machine(),
        "rates": {c.name: c.lr for c in rows},
    }
    write_atomically({out / "compare.json": json.dumps(report, indent=1).encode()})
    say(f"{table(report)}\n\n{verdict(report)}")
    drawn = draw(report, out / "compare.png")
    figure = f", {out / 'compare.png'}" if drawn else " (no figure: matplotlib is missing)"
    say(f"\n{time.time() - start:.0f} s.  Written: {out / 'compare.json'}{figure}")
    return report


def headline(s: Settings) -> str:
    """The task and the settings in two lines."""
    question = QUESTIONS[s.task].format(classes=s.classes)
    unit = "tokens" if s.lm else "examples"
    sizes = f"{s.train:,} training {unit}, {s.seeds} seeds, {s.steps} steps of {s.batch}"
    return f"{s.task}: {question}\n{sizes}; test modules are in no training text, pretraining included"


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


# ---------------------------------------------------------------------------------------------------- worker processes
def call(pool: ProcessPoolExecutor | None, f: Callable, *arguments: Any) -> Any:
    """f(*arguments) in a worker, or here if there is no pool."""
    if pool is None:
        return f(*arguments)
    return pool.submit(f, *arguments).result()


def train_all(
    s: Settings, rows: list[Contender], pool: ProcessPoolExecutor | None
) -> Iterator[tuple[Contender, int, dict]]:
    """Train every contender with every seed; yield (contender, seed, metrics) and print a line as each run ends."""
    runs = [(c, seed) for seed in range(s.seeds) for c in rows]
    with tqdm(total=len(runs), unit="run", disable=not sys.stderr.isatty(), leave=False) as bar:
        for c, seed, metrics in finished(s, runs, pool):
            bar.update()
            quality = f"{s.quality} {metrics[s.quality]:.3f}"
            bar.write(f"  {c.name:<18} seed {seed}   {quality}   ({metrics['seconds']:.0f} s)", file=sys.stderr)
            yield c, seed, metrics


def finished(
    s: Settings, runs: list[tuple[Contender, int]], pool: ProcessPoolExecutor | None
) -> Iterator[tuple[Contender, int, dict]]:
    """Train each (contender, seed) of `runs`; yield (contender, seed, metrics) in the order in which they end.

    They run in the workers of the pool, or one after another in this process if there is none.
    """
    if pool is None:
        for c, seed in runs:
            yield c, seed, cells.train_one(s, c, seed)
        return
    futures = {pool.submit(cells.train_one, s, c, seed): (c, seed) for c, seed in runs}
    for future in as_completed(futures):
        c, seed = futures[future]
        yield c, seed, future.result()


@contextmanager
def workers(jobs: int) -> Iterator[ProcessPoolExecutor | None]:
    """A pool of `jobs` processes with one thread each, so that they do not wait for each other; None for one job.

    If the `with` ends with an exception, the processes are terminated.
    """
    if jobs == 1:
        kernels.keep_memory()  # as in a worker: freed memory is kept for the next step, which is faster
        yield None
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=start_worker) as pool:
        try:
            with interrupts_blocked():  # the processes start here, so Ctrl-C never reaches them
                for _ in range(jobs):
                    pool.submit(int)  # a call that does nothing; it starts a process
            yield pool
        except BaseException:  # also Ctrl-C: do not wait for the runs that have begun
            for process in multiprocessing.active_children():
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def start_worker() -> None:
    """The first call in a worker process."""
    tqdm.set_lock(threading.RLock())  # tqdm's own lock is shared between processes: a terminated worker leaks it
    kernels.set_num_threads(1)
    kernels.keep_memory()


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Ctrl-C waits until the end of the `with`. A process that starts inside never receives it.

    A terminal sends Ctrl-C to every process; only the parent shall act on it. Windows has no such mask.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

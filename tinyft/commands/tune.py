"""`tinyft tune`: fine-tune a model on a data file, in a folder from which the run can go on.

    options        from the command line; with --resume, those that are not given are the run's
    prepare        model, data, method: everything is checked before the folder is made
    plan           measured on the first batches, printed before the training
    fit            with log, evaluations and checkpoints; then the adapter and the curve
"""
from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .. import edit
from ..adapters import save_adapter
from ..formats.huggingface import classifier
from ..models.blocks import Classifier
from ..nn import Module
from . import training
from .arguments import UsageError
from .opening import as_json, claimed_folder, open_model, set_class_names, write_class_names
from .plan import Plan, in_words, make_plan, peak_of_process, size
from .rows import check_kind, find_labels, room_for
from .running import ADAPTER, Log, check_data, check_out, draw_curve, flag, merge_options, write_config
from .settings import make_method

__all__ = ["run"]

DEFAULTS: dict[str, Any] = {"model": None, "packed": False, "method": "lora", "set": [], **training.DEFAULTS}
# The kinds of the options, to check a config.json.
KINDS: dict[str, tuple[type, ...]] = {
    "model": (str,), "packed": (bool,), "method": (str,), "set": (list,), **training.KINDS,
}


@dataclass
class Job(training.Job):
    """Everything that a run needs, checked.

    labels   the names of the classes, or None
    """

    labels: list[str] | None = None


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns the exit status, 0.

    Ctrl-C raises KeyboardInterrupt, and SIGTERM SystemExit(143), after the checkpoint is written."""
    check_out(args.out, resume=args.resume)
    options = read_options(args)
    say = partial(print, file=sys.stderr if args.json else sys.stdout, flush=True)
    with claimed_folder(args.out) as folder:
        job = prepare(options)
        if args.resume:
            check_data(folder, job.train.batches)
        else:
            write_config(folder, options)
        result = train(job, folder, say, resume=args.resume)
    if args.json:
        print(as_json(result))
    return 0


# ── options ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def read_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the run: given ones, else those of the run to resume, else the defaults.

    UsageError if --model or --data is missing; ValueError for an option that differs from the run to resume."""
    options = merge_options(args, DEFAULTS, KINDS, ("model", "data", "test"))
    for name in ("model", "data"):
        if options[name] is None:
            raise UsageError(f"tune wants {flag(name)}")
    return options


# ── preparing ────────────────────────────────────────────────────────────────────────────────────────────────────────
def prepare(options: dict[str, Any]) -> Job:
    """Model, method and data of a run. The errors of all of them come from here, before the training."""
    method = make_method(options["method"], options["set"])
    rows, test_rows = training.read_rows(options)
    model, tokenizer = open_model(options["model"], packed=options["packed"], command="tune")
    check_kind(rows, model, chat=options["chat"])
    labels = None
    if rows.kind == "labelled":
        labels = _put_head_on(model, rows, options["seed"])
    edit.attach(model, method, seed=options["seed"])
    max_len = room_for(model, options["max_len"], training.LONGEST_ROW)
    train = training.prepare(rows, model, tokenizer, options, max_len)
    test = None if test_rows is None else training.prepare(test_rows, model, tokenizer, options, max_len)
    return Job(options, model, tokenizer, train, test, labels)


def _put_head_on(model: Module, rows: Any, seed: int) -> list[str] | None:
    """Put a new head for the labels of the rows on a model without a classifier. The names of its classes.

    None for a model that is a classifier already: its own classes are the classes."""
    if isinstance(model.head, Classifier):
        return None
    names = find_labels(rows)
    classifier(model, len(names), seed)
    set_class_names(model, names)
    return names


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def train(job: Job, folder: Path, say: Callable[[str], None], *, resume: bool) -> dict[str, Any]:
    """Print the plan, train, write the adapter and the curve. Returns the result; JSON-able."""
    options = job.options
    log = Log(folder)
    steps = options["steps"] - log.step
    plan = make_plan(job.model, job.train.batches, steps, options["accumulate"], options["autocast"],
                     training.evaluated_tokens(job, steps), recompute=options["recompute"])
    say_plan(job, plan, say, log.step)
    start = time.perf_counter()
    training.fit_job(job, folder, log, command="tune", resume=resume)
    save_adapter(job.model, folder / ADAPTER)
    if job.labels is not None:
        write_class_names(folder / ADAPTER, job.labels)
    curve = draw_curve(folder, log, f"{options['method']} on {Path(options['model']).name}")
    result = {
        "out": os.fspath(folder), "adapter": os.fspath(folder / ADAPTER), "steps": log.step,
        "trained": plan.count.trained, "head": plan.count.head, "total": plan.count.total,
        "loss": [entry["loss"] for entry in log.entries if "loss" in entry][-1],
        "before": training.metrics_of(log, 0), "test": training.metrics_of(log, -1),
        "seconds": round(time.perf_counter() - start, 2), "labels": job.labels,
    }
    say_result(result, curve, say)
    return result


# ── printing ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def say_plan(job: Job, plan: Plan, say: Callable[[str], None], done: int) -> None:
    """Print the plan: data, parameters, memory and time."""
    options = job.options
    rows = f"{job.train.rows:,} rows in {len(job.train.batches):,} batches"
    test = f", {job.test.rows:,} test rows" if job.test is not None else ""
    note = f"; {job.train.note}" if job.train.note else ""
    say(f"data     {rows}{test}{note}")
    say(f"method   {edit.attached(job.model)[-1].method!r}")
    say(f"         {plan.count}")
    process = peak_of_process()
    so_far = f"; this process has taken {size(process)} so far, the loading included" if process else ""
    say(f"memory   about {size(plan.bytes)} for the arrays of the model and a step{so_far}")
    begun = f" after step {done}" if done else ""
    say(f"time     about {in_words(plan.seconds)} for {options['steps'] - done} steps{begun}")


def say_result(result: dict[str, Any], curve: str, say: Callable[[str], None]) -> None:
    """Print the result: losses, metrics before and after, the files."""
    say(f"loss     {result['loss']:.4f} after {result['steps']} steps")
    for name, value in (result["test"] or {}).items():
        before = (result["before"] or {}).get(name)
        compared = f"  (before: {before:.4f})" if before is not None else ""
        say(f"test     {name} {value:.4f}{compared}")
    say(f"written  {result['adapter']}, {curve}")

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

from tokenizers import Tokenizer

from .. import checks, edit
from ..adapters import save_adapter
from ..data.files import read_rows
from ..formats.huggingface import classifier
from ..models.blocks import Classifier
from ..nn import Module
from ..optim import AdamW, constant_schedule, cosine_schedule, linear_schedule
from ..train import evaluate, fit
from .arguments import UsageError
from .opening import as_json, claimed_folder, open_model, set_class_names, write_class_names
from .plan import Plan, in_words, make_plan, peak_of_process, size, tokens_of
from .rows import Prepared, check_kind, find_labels, make_batches, room_for
from .running import ADAPTER, Log, check_data, check_out, draw_curve, flag, merge_options, write_config
from .settings import make_method

__all__ = ["run"]

DEFAULTS: dict[str, Any] = {
    "model": None, "packed": False, "data": None, "test": None, "chat": False, "template": None,
    "method": "lora", "set": [],
    "steps": 200, "lr": 1e-3, "batch": 16, "accumulate": 1, "max_len": None, "seed": 0, "schedule": "cosine",
    "warmup": 0.05, "weight_decay": 0.0, "clip": 1.0, "autocast": None, "recompute": False,
    "evaluate_every": None, "save_every": 50,
}
NUMBER = (int, float)
TEXT_OR_NONE = (str, type(None))
WHOLE_OR_NONE = (int, type(None))
# The kinds of the options, to check a config.json.
KINDS: dict[str, tuple[type, ...]] = {
    "model": (str,), "packed": (bool,), "data": (str,), "test": TEXT_OR_NONE, "chat": (bool,),
    "template": TEXT_OR_NONE, "method": (str,), "set": (list,), "steps": (int,), "lr": NUMBER, "batch": (int,),
    "accumulate": (int,), "max_len": WHOLE_OR_NONE, "seed": (int,), "schedule": (str,), "warmup": NUMBER,
    "weight_decay": NUMBER, "clip": NUMBER, "autocast": TEXT_OR_NONE, "recompute": (bool,),
    "evaluate_every": WHOLE_OR_NONE, "save_every": (int,),
}
FILES = ("data", "test")                                 # options that are paths of files
SCHEDULES = {"constant": constant_schedule, "linear": linear_schedule, "cosine": cosine_schedule}
LONGEST_ROW = 256                                        # tokens, unless --max-len says more


@dataclass
class Job:
    """Everything that a run needs, checked.

    labels   the names of the classes, or None
    """

    options: dict[str, Any]
    model: Module
    tokenizer: Tokenizer
    train: Prepared
    test: Prepared | None
    labels: list[str] | None


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
    options = merge_options(args, DEFAULTS, KINDS, FILES)
    for name in ("model", "data"):
        if options[name] is None:
            raise UsageError(f"tune wants {flag(name)}")
    return options


# ── preparing ────────────────────────────────────────────────────────────────────────────────────────────────────────
def prepare(options: dict[str, Any]) -> Job:
    """Model, method and data of a run. The errors of all of them come from here, before the training."""
    method = make_method(options["method"], options["set"])
    rows = read_rows(options["data"])
    test_rows = None if options["test"] is None else read_rows(options["test"])
    if test_rows is not None and test_rows.kind != rows.kind:
        raise ValueError(f"--test wants rows of the kind of --data ({rows.kind}), got {test_rows.path} with "
                         f"{test_rows.kind}")
    model, tokenizer = open_model(options["model"], packed=options["packed"], command="tune")
    check_kind(rows, model, chat=options["chat"])
    labels = None
    if rows.kind == "labelled":
        labels = _put_head_on(model, rows, options["seed"])
    edit.attach(model, method, seed=options["seed"])
    max_len = room_for(model, options["max_len"], LONGEST_ROW)
    made = []
    for one in (rows, test_rows):
        if one is not None:
            made.append(make_batches(one, model, tokenizer, options["batch"], max_len, options["seed"],
                                     chat=options["chat"], template=options["template"]))
    test = made[1] if test_rows is not None else None
    return Job(options, model, tokenizer, made[0], test, labels)


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
    evaluated = 0
    if job.test is not None:
        evaluated = (1 + steps // evaluation_steps(options)) * tokens_of(job.test.batches)
    plan = make_plan(job.model, job.train.batches, steps, options["accumulate"], options["autocast"], evaluated,
                     recompute=options["recompute"])
    say_plan(job, plan, say, log.step)
    start = time.perf_counter()
    if job.test is not None and not log.entries:
        _evaluate(job, log)                              # before the training: the line to compare with
    _fit(job, folder, log, resume=resume)
    if job.test is not None and (not log.evaluations or log.evaluations[-1]["step"] < log.step):
        _evaluate(job, log)
    save_adapter(job.model, folder / ADAPTER)
    if job.labels is not None:
        write_class_names(folder / ADAPTER, job.labels)
    curve = draw_curve(folder, log, f"{options['method']} on {Path(options['model']).name}")
    result = {
        "out": os.fspath(folder), "adapter": os.fspath(folder / ADAPTER), "steps": log.step,
        "trained": plan.count.trained, "head": plan.count.head, "total": plan.count.total,
        "loss": [entry["loss"] for entry in log.entries if "loss" in entry][-1],
        "before": _metrics(log, 0), "test": _metrics(log, -1), "seconds": round(time.perf_counter() - start, 2),
        "labels": job.labels,
    }
    say_result(result, curve, say)
    return result


def _fit(job: Job, folder: Path, log: Log, *, resume: bool) -> None:
    """The training itself. If it is stopped, the message names the command that goes on."""
    options = job.options
    name = checks.one_of("--schedule", options["schedule"], tuple(SCHEDULES))
    schedule = SCHEDULES[name](options["warmup"])
    evaluations = {}
    if job.test is not None:
        evaluations = {"evaluate": partial(_evaluate, job, log), "evaluate_every": evaluation_steps(options)}
    try:
        fit(
            job.model, job.train.batches, options["steps"], AdamW(options["lr"], weight_decay=options["weight_decay"]),
            schedule, clip=options["clip"], accumulate=options["accumulate"], seed=options["seed"], out=folder,
            resume=resume, save_every=options["save_every"], autocast=options["autocast"],
            recompute=options["recompute"], on_step=log.add_step, **evaluations,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_advice(log, options, folder)) from None
    except SystemExit:
        print(f"tinyft: stopped {_advice(log, options, folder)}", file=sys.stderr)
        raise


def evaluation_steps(options: dict[str, Any]) -> int:
    """The steps between two evaluations."""
    return options["evaluate_every"] or max(1, options["steps"] // 5)


def _advice(log: Log, options: dict[str, Any], folder: Path) -> str:
    """The state of a stopped run, and the command that goes on."""
    return f"after step {log.step} of {options['steps']}; tinyft tune --resume --out {folder} goes on"


def _evaluate(job: Job, log: Log) -> dict[str, float]:
    """The metrics on the test data, which are logged too."""
    metrics = evaluate(job.model, job.test.batches)
    log.add_evaluation(metrics)
    return metrics


def _metrics(log: Log, index: int) -> dict[str, float] | None:
    """The metrics of one evaluation in the log; None without test data."""
    if not log.evaluations:
        return None
    entry = log.evaluations[index]
    return {name.removeprefix("test_"): value for name, value in entry.items() if name != "step"}


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

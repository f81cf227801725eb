"""The training of `tinyft tune` and `tinyft distill`: options, data, and `fit` with log, evaluation and checkpoint."""
from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .. import checks
from ..data.files import Rows
from ..nn import Module
from ..optim import AdamW, constant_schedule, cosine_schedule, linear_schedule
from ..train import Loss, evaluate, fit
from .plan import tokens_of
from .rows import Prepared, make_batches
from .running import Log
from .shipped import SHIPPED, read_data

__all__ = ["DEFAULTS", "KINDS", "Job", "evaluate_test", "evaluated_tokens", "fit_job", "metrics_of", "prepare",
           "read_rows"]

# The options of a training. A command's parser has no defaults: with --resume, what is not given is that of the run.
DEFAULTS: dict[str, Any] = {
    "data": None, "test": None, "chat": False, "template": None,
    "steps": 200, "lr": 1e-3, "batch": 16, "accumulate": 1, "max_len": None, "seed": 0, "schedule": "cosine",
    "warmup": 0.05, "weight_decay": 0.0, "clip": 1.0, "autocast": None, "recompute": False,
    "evaluate_every": None, "save_every": 50,
}
NUMBER = (int, float)
TEXT_OR_NONE = (str, type(None))
WHOLE_OR_NONE = (int, type(None))
# The kinds of the options, to check the file with the options of a run.
KINDS: dict[str, tuple[type, ...]] = {
    "data": (str,), "test": TEXT_OR_NONE, "chat": (bool,), "template": TEXT_OR_NONE,
    "steps": (int,), "lr": NUMBER, "batch": (int,), "accumulate": (int,), "max_len": WHOLE_OR_NONE, "seed": (int,),
    "schedule": (str,), "warmup": NUMBER, "weight_decay": NUMBER, "clip": NUMBER, "autocast": TEXT_OR_NONE,
    "recompute": (bool,), "evaluate_every": WHOLE_OR_NONE, "save_every": (int,),
}
SCHEDULES = {"constant": constant_schedule, "linear": linear_schedule, "cosine": cosine_schedule}
LONGEST_ROW = 256                                        # tokens, unless --max-len says more


@dataclass
class Job:
    """Everything that a training needs, checked.

    options  by name, those of DEFAULTS among them
    model    trains on `train`, and is evaluated on `test`, which may be None
    """

    options: dict[str, Any]
    model: Module
    tokenizer: Tokenizer
    train: Prepared
    test: Prepared | None


# ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def read_rows(options: dict[str, Any]) -> tuple[Rows, Rows | None]:
    """(the rows to train on, those to test on or None) of a run. Of a text that ships, the test is its own by default.

    ValueError unless both are of one kind."""
    rows = read_data(options["data"])
    test = options["test"]
    if test is None and options["data"] in SHIPPED:
        test = options["data"]
    if test is None:
        return rows, None
    test_rows = read_data(test, "test")
    if test_rows.kind != rows.kind:
        raise ValueError(f"--test wants rows of the kind of --data ({rows.kind}), got {test_rows.path} with "
                         f"{test_rows.kind}")
    return rows, test_rows


def prepare(
    rows: Rows, model: Module, tokenizer: Tokenizer, options: dict[str, Any], max_len: int,
) -> Prepared:
    """The batches of rows for a model, as the options of a run want them."""
    return make_batches(rows, model, tokenizer, options["batch"], max_len, options["seed"], chat=options["chat"],
                        template=options["template"])


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def fit_job(
    job: Job, folder: Path, log: Log, *, command: str, resume: bool, loss: Loss | None = None,
) -> None:
    """The training, with an evaluation before it, during it and at its end if there is held-out data.

    If it is stopped, the message names the command that goes on."""
    options = job.options
    name = checks.one_of("--schedule", options["schedule"], tuple(SCHEDULES))
    schedule = SCHEDULES[name](options["warmup"])
    evaluations = {}
    if job.test is not None:
        evaluations = {"evaluate": partial(evaluate_test, job, log), "evaluate_every": evaluation_steps(options)}
        if not log.entries:
            evaluate_test(job, log)                      # before the training: the line to compare with
    try:
        fit(
            job.model, job.train.batches, options["steps"], AdamW(options["lr"], weight_decay=options["weight_decay"]),
            schedule, loss=loss, clip=options["clip"], accumulate=options["accumulate"], seed=options["seed"],
            out=folder, resume=resume, save_every=options["save_every"], autocast=options["autocast"],
            recompute=options["recompute"], on_step=log.add_step, **evaluations,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_advice(log, options, folder, command)) from None
    except SystemExit:
        print(f"tinyft: stopped {_advice(log, options, folder, command)}", file=sys.stderr)
        raise
    if job.test is not None and (not log.evaluations or log.evaluations[-1]["step"] < log.step):
        evaluate_test(job, log)


def evaluation_steps(options: dict[str, Any]) -> int:
    """The steps between two evaluations."""
    return options["evaluate_every"] or max(1, options["steps"] // 5)


def _advice(log: Log, options: dict[str, Any], folder: Path, command: str) -> str:
    """The state of a stopped run, and the command that goes on."""
    return f"after step {log.step} of {options['steps']}; tinyft {command} --resume --out {folder} goes on"


# ── evaluation ───────────────────────────────────────────────────────────────────────────────────────────────────────
def evaluated_tokens(job: Job, steps: int) -> int:
    """The tokens that the evaluations of `steps` steps read."""
    if job.test is None:
        return 0
    return (1 + steps // evaluation_steps(job.options)) * tokens_of(job.test.batches)


def evaluate_test(job: Job, log: Log) -> dict[str, float]:
    """The metrics on the test data, which are logged too."""
    metrics = evaluate(job.model, job.test.batches)
    log.add_evaluation(metrics)
    return metrics


def metrics_of(log: Log, index: int) -> dict[str, float] | None:
    """The metrics of one evaluation in the log; None without test data."""
    if not log.evaluations:
        return None
    entry = log.evaluations[index]
    return {name.removeprefix("test_"): value for name, value in entry.items() if name != "step"}

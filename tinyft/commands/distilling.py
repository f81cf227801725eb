"""`tinyft distill`: a student learns from a teacher, in a folder from which the run can go on.

    options        from the command line; with --resume, those that are not given are the run's
    prepare        teacher, student (students.py), loss (objectives.py), data: everything is checked before the work
    plan           measured on the first batches, printed before the training
    teach          the teacher's outputs on disk, if they are kept; then the training, and the student's directory
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .. import edit
from ..compress import TeacherBeams, TeacherCache
from ..data.files import Rows
from ..formats.huggingface import save
from ..identity import fingerprint
from ..models import EncoderDecoder
from ..models.blocks import Classifier
from ..nn import Module
from ..predict import predict
from ..train import evaluate
from ..train.settings import CHECKPOINT
from . import training
from .arguments import UsageError
from .objectives import NO_TEACHER, Objective, StoreCosts, fill_store, make_objective, measure_store
from .opening import as_json, claimed_folder, open_model
from .plan import Plan, in_words, make_plan, peak_of_process, size
from .rows import check_kind, longest_row, room_for
from .running import (
    Log,
    check_content,
    check_data,
    check_out,
    draw_curve,
    flag,
    is_finished,
    merge_options,
    write_config,
)
from .scores import score_texts
from .students import kind_of, make_student

__all__ = ["run"]

CONFIG = "distill.json"
DEFAULTS: dict[str, Any] = {
    "teacher": None, "student": None, "layers_from": None, "loss": "hinton", "set": [], "cache": None, "logits": None,
    **training.DEFAULTS,
}
# The kinds of the options, to check a distill.json.
KINDS: dict[str, tuple[type, ...]] = {
    "teacher": (str,), "student": (str,), "layers_from": training.TEXT_OR_NONE, "loss": (str,), "set": (list,),
    "cache": training.TEXT_OR_NONE, "logits": training.WHOLE_OR_NONE, **training.KINDS,
}
PATHS = ("teacher", "student", "data", "test")
# What a folder holds if the teacher, or the student before its training, has changed since.
CHANGED = {
    "teacher_fingerprint": "the distillation of another teacher",
    "student_fingerprint": "the distillation into another student",
}
TEACHER = "teacher"                                      # the folder of the teacher's texts, in that of the run
WRITTEN = 200                                            # held-out sources for which a target is written at the end


@dataclasses.dataclass
class Job(training.Job):
    """Everything that a run needs, checked. `model` is the student.

    objective  the loss, and the teacher's outputs
    tests      the held-out rows, or None
    content    fingerprints of the teacher and of the student before its training
    """

    teacher: Module
    objective: Objective
    tests: Rows | None
    content: dict[str, str]


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns the exit status, 0. After Ctrl-C, or a kill at any moment, --resume goes on."""
    check_out(args.out, resume=args.resume, config=CONFIG)
    options = read_options(args)
    say = partial(print, file=sys.stderr if args.json else sys.stdout, flush=True)
    with claimed_folder(args.out) as folder:
        if args.resume and is_finished(folder):
            remove_state(folder)
            say(f"nothing to do: {folder} holds the trained student")
            result: dict[str, Any] = {"out": os.fspath(folder)}
        else:
            job = prepare(options, folder)
            if args.resume:
                check_content(folder, job.content, CHANGED, CONFIG)
                check_data(folder, job.train.batches)
            else:
                write_config(folder, {**options, **job.content}, CONFIG)
            result = teach(job, folder, say, resume=args.resume)
    if args.json:
        print(as_json(result))
    return 0


def read_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the run: given ones, else those of the run to resume, else the defaults.

    UsageError if the teacher, the student or the data are missing; ValueError for an option that differs from the run
    to resume."""
    if args.cache is not None:
        args.cache = os.path.abspath(args.cache)
    options = merge_options(args, DEFAULTS, KINDS, PATHS, CONFIG)
    for name in ("teacher", "student", "data"):
        if options[name] is None:
            raise UsageError(f"distill wants {flag(name)}")
    if options["logits"] is not None and options["cache"] is None:
        raise UsageError("--logits wants --cache, the folder that holds them")
    return options


# ── preparing ────────────────────────────────────────────────────────────────────────────────────────────────────────
def prepare(options: dict[str, Any], folder: Path) -> Job:
    """Teacher, student, loss and data of a run. The errors of all of them come from here, before the training."""
    rows, test_rows = training.read_rows(options)
    teacher, tokenizer = open_model(options["teacher"], command="distill")
    check_rows(rows, teacher, chat=options["chat"])
    student = make_student(options["student"], options["layers_from"], teacher, tokenizer, options["seed"])
    max_len = min(room_for(model, options["max_len"], training.LONGEST_ROW) for model in (student, teacher))
    train = training.prepare(rows, student, tokenizer, options, max_len)
    test = None if test_rows is None else training.prepare(test_rows, student, tokenizer, options, max_len)
    targets = [row[-1] for row in rows.rows]
    objective = make_objective(options, folder / TEACHER, student, teacher, tokenizer, targets, max_len)
    content = {"teacher_fingerprint": fingerprint(teacher), "student_fingerprint": fingerprint(student)}
    return Job(options, student, tokenizer, train, test, teacher, objective, test_rows, content)


def check_rows(rows: Rows, teacher: Module, *, chat: bool) -> None:
    """ValueError if the teacher cannot teach with rows of this kind."""
    kind_of(teacher)
    if rows.kind == "labelled" and not isinstance(teacher.head, Classifier):
        raise ValueError(f"{rows.path} has labels, and the teacher has no classifier: train it on them first")
    check_kind(rows, teacher, chat=chat)


# ── plan ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def plan_run(job: Job, steps: int) -> tuple[Plan, StoreCosts | None]:
    """The costs of `steps` further updates, and of the teacher's outputs before them if they are kept."""
    options = job.options
    plan = make_plan(job.model, job.train.batches, steps, options["accumulate"], options["autocast"],
                     training.evaluated_tokens(job, steps), recompute=options["recompute"],
                     loss=job.objective.planned_loss)
    held = sum(p.data.nbytes for p in job.teacher.parameters())
    plan = dataclasses.replace(plan, bytes=plan.bytes + held)
    store = job.objective.store
    return plan, None if store is None else measure_store(store, job.teacher, job.train)


# ── teaching ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def teach(job: Job, folder: Path, say: Callable[[str], None], *, resume: bool) -> dict[str, Any]:
    """Print the plan, train the student, write its directory. Returns the result; JSON-able."""
    log = Log(folder)
    say_plan(job, *plan_run(job, job.options["steps"] - log.step), say, log.step)
    start = time.perf_counter()
    if job.objective.store is not None:
        kept = Path(job.options["cache"] or folder / TEACHER)
        fill_store(job.objective.store, kept, job.train.batches, folder, say)
    train = dataclasses.replace(job.train, batches=job.objective.batches(job.train.batches))
    taught = dataclasses.replace(job, train=train)
    training.fit_job(taught, folder, log, command="distill", loss=job.objective.loss, resume=resume)
    save(job.model, folder, job.tokenizer)
    remove_state(folder)
    curve = draw_curve(folder, log, f"{job.options['loss']} of {Path(job.options['teacher']).name}")
    ours, theirs = parameters_of(job.model), parameters_of(job.teacher)
    result = {
        "out": os.fspath(folder), "steps": log.step, "loss": [e["loss"] for e in log.entries if "loss" in e][-1],
        "parameters": ours, "teacher_parameters": theirs, "ratio": ours / theirs,
        "file_bytes": (folder / "model.safetensors").stat().st_size, "before": training.metrics_of(log, 0),
        "test": None, "teacher": None, "seconds": round(time.perf_counter() - start, 2),
    }
    if job.test is not None:
        result["test"] = training.metrics_of(log, -1) | written_scores(job, job.model)
        result["teacher"] = evaluate(job.teacher, job.test.batches) | written_scores(job, job.teacher)
    say_result(result, curve, say)
    return result


def remove_state(folder: Path) -> None:
    """Remove what only a resumed run needs: the student is whole."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
    for file in (folder / TEACHER).glob("rows-*.safetensors"):
        file.unlink()
    with contextlib.suppress(OSError):                   # there is none, or it holds something else
        (folder / TEACHER).rmdir()


def parameters_of(model: Module) -> int:
    """The number of parameters, a new head included."""
    count = edit.count(model)
    return count.total + count.head


def written_scores(job: Job, model: Module) -> dict[str, float]:
    """Scores of the targets that an encoder-decoder writes, greedily, for the first held-out sources; else none."""
    if not isinstance(model, EncoderDecoder):
        return {}
    sources, targets = zip(*job.tests.rows[:WRITTEN])
    longest = longest_row(targets, job.tokenizer)
    written = predict(model, job.tokenizer, list(sources), max_new_tokens=longest)
    return score_texts(job.tests, targets, written)


# ── printing ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def say_plan(job: Job, plan: Plan, store: StoreCosts | None, say: Callable[[str], None], done: int) -> None:
    """Print the plan: data, models, loss, memory and time."""
    options = job.options
    tests = f", {job.test.rows:,} test rows" if job.test is not None else ""
    note = f"; {job.train.note}" if job.train.note else ""
    say(f"data     {job.train.rows:,} rows in {len(job.train.batches):,} batches{tests}{note}")
    ours, theirs = parameters_of(job.model), parameters_of(job.teacher)
    say(f"teacher  {type(job.teacher).__name__} of {theirs:,} parameters in {options['teacher']}")
    say(f"student  {type(job.model).__name__} of {ours:,} parameters, {ours / theirs:.1%} of the teacher's: "
        f"{options['student']}")
    say(f"loss     {describe_loss(job.objective, options['loss'])}")
    process = peak_of_process()
    so_far = f"; this process has taken {size(process)} so far, the loading included" if process else ""
    say(f"memory   about {size(plan.bytes)} for the arrays of both models and a step{so_far}")
    begun = f" after step {done}" if done else ""
    first = "" if store is None else f", after {in_words(store.seconds)} of the teacher's work"
    say(f"time     about {in_words(plan.seconds)} for {options['steps'] - done} steps{begun}{first}")
    if store is not None:
        where = options["cache"] or f"the folder {TEACHER} of the run, until its end"
        say(f"kept     about {size(store.nbytes)} of the teacher's outputs in {where}")


def describe_loss(objective: Objective, name: str) -> str:
    """The loss with its numbers, and the work of the teacher. name: the option --loss."""
    fields = [f"{field.name}={getattr(objective.loss, field.name)!r}"
              for field in dataclasses.fields(objective.loss) if field.name != "teacher"]
    loss = f"{type(objective.loss).__name__}({', '.join(fields)})"
    if name == NO_TEACHER:
        return f"{loss}, without the teacher"
    store = objective.store
    if isinstance(store, TeacherBeams):
        return (f"{loss} of the targets of {type(objective.method).__name__}, from {store.beams} beams of at most "
                f"{store.max_new_tokens} tokens")
    if isinstance(store, TeacherCache):
        return f"{loss}; the teacher runs once, its {store.k} largest logits are kept"
    return f"{loss}; the teacher runs in every step"


def say_result(result: Mapping[str, Any], curve: str, say: Callable[[str], None]) -> None:
    """Print the result: the loss, a table of the student beside its teacher, the files."""
    say(f"loss     {result['loss']:.4f} after {result['steps']} steps")
    if result["test"]:
        say(f"test     {'':<12}{'before':>12}{'student':>12}{'teacher':>12}")
    for name, value in (result["test"] or {}).items():
        before = result["before"].get(name)
        shown = "" if before is None else f"{before:.4f}"
        say(f"         {name:<12}{shown:>12}{value:>12.4f}{result['teacher'][name]:>12.4f}")
    say(f"size     {result['parameters']:,} of {result['teacher_parameters']:,} parameters ({result['ratio']:.1%}), "
        f"{size(result['file_bytes'])} on disk")
    say(f"written  {result['out']}, {curve}")

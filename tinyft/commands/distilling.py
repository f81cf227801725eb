"""`tinyft distill`: a student learns from a teacher, in a folder from which the run can go on.

    options        from the command line; with --resume, those that are not given are the run's
    prepare        teacher, student (students.py), loss and data: everything is checked before the folder is made
    plan           measured on the first batches, printed before the training
    teach          the cache of the teacher's outputs, if there is one; then the training, and the student's directory
"""
from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .. import edit
from ..compress import DistilBERTLoss, Hinton, TeacherCache, WordLevel
from ..compress.distill.soft import run_teacher
from ..data.files import Rows
from ..data.scores import token_f1
from ..formats.huggingface import save
from ..identity import fingerprint
from ..models import EncoderDecoder
from ..models.blocks import Classifier
from ..nn import Module
from ..predict import predict
from ..train import CrossEntropy, Loss, evaluate, read_batch
from ..train.settings import CHECKPOINT
from . import training
from .arguments import UsageError
from .opening import as_json, claimed_folder, open_model
from .plan import SAMPLED, Plan, in_words, make_plan, peak_of_process, size, size_of, tokens_of
from .rows import check_kind, first_batches, longest_row, room_for
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
from .settings import make_loss
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
NO_TEACHER = "none"                                      # the --loss of a student that learns alone
LOGITS = 64                                              # of a position, in the cache
ENTRY = 8                                                # bytes of a logit and its class in the cache
WRITTEN = 200                                            # held-out sources for which a target is written at the end
SECONDS = 5.0                                            # between two lines of progress


@dataclasses.dataclass
class Job(training.Job):
    """Everything that a run needs, checked. `model` is the student.

    loss     of the training; its teacher is a TeacherCache with --cache
    tests    the held-out rows, or None
    content  fingerprints of the teacher and of the student before its training
    """

    teacher: Module
    loss: Loss
    tests: Rows | None
    content: dict[str, str]

    @property
    def cache(self) -> TeacherCache | None:
        """The teacher's outputs on disk; None if the teacher runs in every step."""
        teacher = getattr(self.loss, "teacher", None)
        return teacher if isinstance(teacher, TeacherCache) else None


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns the exit status, 0. After Ctrl-C, or a kill at any moment, --resume goes on."""
    check_out(args.out, resume=args.resume, config=CONFIG)
    options = read_options(args)
    say = partial(print, file=sys.stderr if args.json else sys.stdout, flush=True)
    with claimed_folder(args.out) as folder:
        if args.resume and is_finished(folder):
            (folder / CHECKPOINT).unlink(missing_ok=True)
            say(f"nothing to do: {folder} holds the trained student")
            result: dict[str, Any] = {"out": os.fspath(folder)}
        else:
            job = prepare(options)
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
def prepare(options: dict[str, Any]) -> Job:
    """Teacher, student, loss and data of a run. The errors of all of them come from here, before the training."""
    rows, test_rows = training.read_rows(options)
    teacher, tokenizer = open_model(options["teacher"], command="distill")
    check_rows(rows, teacher, chat=options["chat"])
    student = make_student(options["student"], options["layers_from"], teacher, tokenizer, options["seed"])
    loss = make_objective(options, student, teacher, rows)
    max_len = min(room_for(model, options["max_len"], training.LONGEST_ROW) for model in (student, teacher))
    train = training.prepare(rows, student, tokenizer, options, max_len)
    test = None if test_rows is None else training.prepare(test_rows, student, tokenizer, options, max_len)
    content = {"teacher_fingerprint": fingerprint(teacher), "student_fingerprint": fingerprint(student)}
    return Job(options, student, tokenizer, train, test, teacher, loss, test_rows, content)


def check_rows(rows: Rows, teacher: Module, *, chat: bool) -> None:
    """ValueError if the teacher cannot teach with rows of this kind."""
    kind_of(teacher)
    if rows.kind == "labelled" and not isinstance(teacher.head, Classifier):
        raise ValueError(f"{rows.path} has labels, and the teacher has no classifier: train it on them first")
    check_kind(rows, teacher, chat=chat)


def make_objective(options: Mapping[str, Any], student: Module, teacher: Module, rows: Rows) -> Loss:
    """The loss that --loss, --set and --cache describe.

    UsageError for options that do not go together; ValueError for a loss that does not fit the models."""
    name = options["loss"]
    if name == NO_TEACHER:
        if options["set"] or options["cache"]:
            raise UsageError("--loss none has no teacher and no settings: leave --set and --cache out")
        return CrossEntropy()
    loss = make_loss(name, options["set"], teacher)
    check_loss(loss, student, teacher)
    if options["cache"] is None:
        return loss
    if not isinstance(loss, (Hinton, WordLevel)):
        raise UsageError(f"--cache wants --loss hinton or word-level, got {name}: a cache holds logits and no hidden "
                         "states")
    if kind_of(teacher) == "a masked language model":
        raise ValueError(f"--cache wants rows that come again, got {rows.path}: masks are drawn anew in every epoch")
    return dataclasses.replace(loss, teacher=TeacherCache(options["cache"], teacher, options["logits"] or LOGITS))


def check_loss(loss: Loss, student: Module, teacher: Module) -> None:
    """ValueError unless the loss is one for models of this kind and size."""
    kind = kind_of(teacher)
    is_text = kind in ("a causal language model", "a masked language model")
    if isinstance(loss, WordLevel) and kind not in ("a causal language model", "an encoder-decoder"):
        raise ValueError(f"--loss word-level wants a model that predicts the next token, got {kind}: take hinton")
    if isinstance(loss, DistilBERTLoss) and not is_text:
        raise ValueError(f"--loss distilbert wants a masked or a causal language model, got {kind}: take hinton")
    ours, theirs = student.config.width, teacher.config.width
    if isinstance(loss, DistilBERTLoss) and loss.cosine and ours != theirs:
        raise ValueError(f"--loss distilbert compares hidden states and wants a student with the teacher's width of "
                         f"{theirs}, got {ours}: --set cosine=0 leaves the comparison out")


# ── the teacher's outputs ────────────────────────────────────────────────────────────────────────────────────────────
def fill_cache(job: Job, cache: TeacherCache, folder: Path, say: Callable[[str], None]) -> None:
    """Write the teacher's outputs for all rows, with a line of progress now and then.

    Rows that an earlier run has written are read. After Ctrl-C, the message names the command that goes on."""
    total = len(job.train.batches)
    start = last = time.perf_counter()
    try:
        for i, batch in enumerate(job.train.batches.once(), 1):
            cache.look_up(read_batch(batch))
            now = time.perf_counter()
            if now - last > SECONDS:
                last = now
                say(f"teacher  {i} of {total} batches, about {in_words((now - start) * (total / i - 1))} left")
        cache.flush()
    except KeyboardInterrupt:
        cache.flush()
        raise KeyboardInterrupt(f"while the teacher ran; tinyft distill --resume --out {folder} goes on") from None
    held = size(folder_bytes(job.options["cache"]))
    say(f"teacher  ran on {cache.passes:,} rows; its outputs for {len(cache):,} are in {held} on disk")


def folder_bytes(folder: str) -> int:
    """The bytes of the files in a folder."""
    return sum(file.stat().st_size for file in Path(folder).iterdir() if file.is_file())


# ── plan ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclasses.dataclass(frozen=True)
class Costs:
    """The costs of a run: of the training, and of the cache that the teacher fills before it.

    cache_seconds, cache_bytes   0 without a cache
    """

    training: Plan
    cache_seconds: float
    cache_bytes: int


def plan_run(job: Job, steps: int) -> Costs:
    """The costs of `steps` further updates."""
    options = job.options
    loss = job.loss if job.cache is None else CrossEntropy()                     # the cache is filled before
    plan = make_plan(job.model, job.train.batches, steps, options["accumulate"], options["autocast"],
                     training.evaluated_tokens(job, steps), recompute=options["recompute"], loss=loss)
    held = sum(p.data.nbytes for p in job.teacher.parameters())
    plan = dataclasses.replace(plan, bytes=plan.bytes + held)
    if job.cache is None:
        return Costs(plan, 0.0, 0)
    seconds, positions = measure_teacher(job)
    share = max(0.0, 1 - len(job.cache) / job.train.rows)                        # of the rows that are still missing
    logits = min(job.cache.k, job.teacher.head.out_features)
    return Costs(plan, share * seconds, round(positions * logits * ENTRY))


def measure_teacher(job: Job) -> tuple[float, float]:
    """(seconds of the teacher's pass over all rows, positions with a label in them), from the first batches."""
    sample = first_batches(job.train.batches, SAMPLED)
    run_teacher(job.teacher, read_batch(sample[0]))
    start = time.perf_counter()
    run_teacher(job.teacher, read_batch(sample[1]))
    seconds = (time.perf_counter() - start) / size_of(sample[1])
    positions = sum(len(read_batch(batch).labels) for batch in sample) / len(sample)
    return seconds * tokens_of(job.train.batches), positions * len(job.train.batches)


# ── teaching ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def teach(job: Job, folder: Path, say: Callable[[str], None], *, resume: bool) -> dict[str, Any]:
    """Print the plan, train the student, write its directory. Returns the result; JSON-able."""
    log = Log(folder)
    say_plan(job, plan_run(job, job.options["steps"] - log.step), say, log.step)
    start = time.perf_counter()
    if job.cache is not None:
        fill_cache(job, job.cache, folder, say)
    training.fit_job(job, folder, log, command="distill", loss=job.loss, resume=resume)
    save(job.model, folder, job.tokenizer)
    (folder / CHECKPOINT).unlink(missing_ok=True)        # the student is whole: nothing is left to resume
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
    written = [text.strip() for text in written]
    targets = [text.strip() for text in targets]
    scores = {"exact_match": sum(map(str.__eq__, targets, written)) / len(targets)}
    if job.tests.path == "names":
        scores["token_f1"] = float(token_f1(targets, written).mean())
    return scores


# ── printing ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def say_plan(job: Job, costs: Costs, say: Callable[[str], None], done: int) -> None:
    """Print the plan: data, models, loss, memory and time."""
    options = job.options
    tests = f", {job.test.rows:,} test rows" if job.test is not None else ""
    note = f"; {job.train.note}" if job.train.note else ""
    say(f"data     {job.train.rows:,} rows in {len(job.train.batches):,} batches{tests}{note}")
    ours, theirs = parameters_of(job.model), parameters_of(job.teacher)
    say(f"teacher  {type(job.teacher).__name__} of {theirs:,} parameters in {options['teacher']}")
    say(f"student  {type(job.model).__name__} of {ours:,} parameters, {ours / theirs:.1%} of the teacher's: "
        f"{options['student']}")
    say(f"loss     {describe_loss(job)}")
    process = peak_of_process()
    so_far = f"; this process has taken {size(process)} so far, the loading included" if process else ""
    say(f"memory   about {size(costs.training.bytes)} for the arrays of both models and a step{so_far}")
    begun = f" after step {done}" if done else ""
    first = f", after {in_words(costs.cache_seconds)} of the teacher's pass" if costs.cache_bytes else ""
    say(f"time     about {in_words(costs.training.seconds)} for {options['steps'] - done} steps{begun}{first}")
    if costs.cache_bytes:
        say(f"cache    about {size(costs.cache_bytes)} of teacher outputs in {options['cache']}")


def describe_loss(job: Job) -> str:
    """The loss with its numbers, and where the teacher's outputs come from."""
    if job.options["loss"] == NO_TEACHER:
        return "CrossEntropy(), without the teacher"
    fields = [f"{field.name}={getattr(job.loss, field.name)!r}"
              for field in dataclasses.fields(job.loss) if field.name != "teacher"]
    teacher = "the teacher runs in every step"
    if job.cache is not None:
        teacher = f"the teacher runs once, its {job.cache.k} largest logits are kept"
    return f"{type(job.loss).__name__}({', '.join(fields)}); {teacher}"


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

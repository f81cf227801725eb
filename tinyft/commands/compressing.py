"""`tinyft compress`: a model with packed weights, in a folder from which the run can go on weight by weight.

    options        from the command line; with --resume, those that are not given are the run's
    prepare        model, rule, calibration data: everything is checked before the folder is made
    plan           bytes of the rule's codes and expected time, measured on a few rows of the weights
    compress       a line and a file for each weight (layers.py); then the model's directory
"""
from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..compress import LayerReport, Rule, compress
from ..compress.layerwise import find_targets
from ..formats.huggingface import save
from ..identity import fingerprint
from ..nn import Module
from .arguments import UsageError
from .calibration import calibration_batches
from .layers import CONFIG, Layers, Reports, remove_layers
from .opening import as_json, claimed_folder, open_model
from .plan import in_words, peak_of_process, size
from .rows import room_for
from .rule_plan import RulePlan, plan_rule
from .running import check_content, check_out, flag, is_finished, merge_options, write_config
from .settings import make_rule

__all__ = ["run"]

DEFAULTS: dict[str, Any] = {
    "model": None, "method": "gptq", "bits": None, "group": None, "set": [], "targets": [],
    "data": None, "sequences": None, "length": None, "seed": None, "dtype": None,
}
TEXT_OR_NONE = (str, type(None))
WHOLE_OR_NONE = (int, type(None))
# The kinds of the options, to check a compress.json.
KINDS: dict[str, tuple[type, ...]] = {
    "model": (str,), "method": (str,), "bits": WHOLE_OR_NONE, "group": TEXT_OR_NONE, "set": (list,),
    "targets": (list,), "data": TEXT_OR_NONE, "sequences": WHOLE_OR_NONE, "length": WHOLE_OR_NONE,
    "seed": WHOLE_OR_NONE, "dtype": TEXT_OR_NONE,
}
PATHS = ("model", "data")
CALIBRATION = ("data", "sequences", "length", "seed")    # options that a rule without data does not have
# What a folder holds if the model, or the calibration data, has changed since.
CHANGED = {
    "model_fingerprint": "the compression of another model",
    "data_fingerprint": "the compression of other calibration data",
}
SEQUENCES = 32
LENGTH = 512                                             # tokens of a calibration sequence, or the model's positions


@dataclass
class Job:
    """Everything that a run needs, checked.

    batches   the calibration data; None for a rule that needs none
    shapes    {path: shape} of the weights to compress
    content   fingerprints of the model and of the calibration data, to compare them when a run goes on
    """

    options: dict[str, Any]
    model: Module
    tokenizer: Tokenizer
    rule: Rule
    batches: list[dict[str, Any]] | None
    shapes: dict[str, tuple[int, ...]]
    content: dict[str, str]


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns the exit status, 0. After Ctrl-C, or a kill at any moment, --resume goes on."""
    check_out(args.out, resume=args.resume, config=CONFIG)
    options = merge_options(args, DEFAULTS, KINDS, PATHS, CONFIG)
    if options["model"] is None:
        raise UsageError("compress wants --model")
    say = partial(print, file=sys.stderr if args.json else sys.stdout, flush=True)
    with claimed_folder(args.out) as folder:
        if args.resume and is_finished(folder):
            remove_layers(folder)
            say(f"nothing to do: {folder} holds the whole model")
            result = {"out": os.fspath(folder)}
        else:
            job = prepare(options)
            if args.resume:
                check_content(folder, job.content, CHANGED, CONFIG)
                check_layers(folder, job)
            else:
                write_config(folder, {**options, **job.content}, CONFIG)
            result = compress_all(job, folder, say)
    if args.json:
        print(as_json(result))
    return 0


# ── preparing ────────────────────────────────────────────────────────────────────────────────────────────────────────
def prepare(options: dict[str, Any]) -> Job:
    """Model, rule and data of a run. The errors of all of them come from here, before the first weight."""
    rule = rule_of(options)
    model, tokenizer = open_model(options["model"], command="compress")
    found = find_targets(model, rule, options["targets"] or None)
    batches = None
    if rule.needs_hessian:
        length = room_for(model, options["length"], LENGTH, flag("length"))
        batches = calibration_batches(model, tokenizer, options["data"], options["sequences"] or SEQUENCES, length,
                                      options["seed"] or 0)
    content = {"model_fingerprint": fingerprint(model), "data_fingerprint": fingerprint(batches)}
    return Job(options, model, tokenizer, rule, batches, {path: m.weight.shape for path, m in found.items()}, content)


def rule_of(options: Mapping[str, Any]) -> Rule:
    """The rule that --method, --bits, --group and --set name.

    UsageError for a setting that it does not have, and for calibration data that it does not need."""
    shortcuts = [f"{name}={options[name]}" for name in ("bits", "group") if options[name] is not None]
    rule = make_rule(options["method"], [*shortcuts, *options["set"]])
    given = [flag(name) for name in CALIBRATION if options[name] is not None]
    if given and not rule.needs_hessian:
        raise UsageError(f"{type(rule).__name__} needs no calibration data: leave {given[0]} out")
    return rule


def check_layers(folder: Path, job: Job) -> None:
    """ValueError if one of the weights that are compressed already cannot be read."""
    done = Layers(folder, job.shapes)
    for path in done:
        done[path]


# ── compressing ──────────────────────────────────────────────────────────────────────────────────────────────────────
def compress_all(job: Job, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Print the plan, compress every weight, write the model. Returns the result; JSON-able."""
    done = Layers(folder, job.shapes)
    reports = Reports(folder, done)
    plan = plan_rule(job.model, job.rule, job.batches, [path for path in job.shapes if path not in done])
    say_plan(job, plan, len(done), say)
    start = time.perf_counter()
    progress = Progress(job, reports, plan, say)
    try:
        compress(job.model, job.rule, job.batches, targets=job.options["targets"] or None, done=done,
                 on_layer=progress.add)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"after {len(done)} of {len(job.shapes)} weights; tinyft compress --resume --out "
                                f"{folder} goes on") from None
    save(job.model, folder, job.tokenizer, job.options["dtype"])
    remove_layers(folder)
    before = sum(report.before for report in reports.reports.values())
    after = sum(report.after for report in reports.reports.values())
    entries = sum(rows * columns for rows, columns in job.shapes.values())
    file = (folder / "model.safetensors").stat().st_size
    result = {
        "out": os.fspath(folder), "rule": repr(job.rule), "weights": len(job.shapes), "bytes_before": before,
        "bytes_after": after, "bits_per_weight": 8 * after / entries, "file_bytes": file,
        "seconds": round(time.perf_counter() - start, 2),
        "error": sum(report.error for report in reports.reports.values()) / len(reports.reports),
        "peak_bytes": peak_of_process(),
    }
    say_result(result, "weights" if job.batches is None else "maps' outputs", say)
    return result


class Progress:
    """A line for each weight: its error, its bytes, the time, and the time that is left."""

    def __init__(self, job: Job, reports: Reports, plan: RulePlan, say: Callable[[str], None]):
        self.reports = reports
        self.say = say
        self.total = len(job.shapes)
        self.count = 0
        self.start = time.perf_counter()
        self.plan = plan
        self.planned = 0.0                               # seconds of the plan for the weights so far

    def add(self, report: LayerReport) -> None:
        """Log and print one weight, unless an earlier run did."""
        self.count += 1
        if not self.reports.add(report):
            return
        self.planned += self.plan.seconds[report.path]
        spent = time.perf_counter() - self.start
        left = spent * (self.plan.total_seconds / self.planned - 1)
        after = f"{size(report.before)} -> {size(report.after)}"
        remaining = f", about {in_words(left)} left" if self.count < self.total else ""
        self.say(f"{self.count:>4}/{self.total}  {report.path:<28} error {report.error:.2e}  {after}  "
                 f"{in_words(report.seconds)}{remaining}")


# ── printing ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def say_plan(job: Job, plan: RulePlan, done: int, say: Callable[[str], None]) -> None:
    """Print the plan: rule, calibration data, bytes, time."""
    say(f"rule     {job.rule!r}")
    if job.batches is not None:
        say(f"data     {data_in_words(job.batches)} of {job.options['data'] or 'the text that ships with tinyft'}")
    if done:
        say(f"resumed  {done} of {len(job.shapes)} weights are compressed already")
    left = len(plan.seconds)
    say(f"weights  {left} with {plan.entries:,} entries, {size(plan.before)} -> about {size(plan.after)}, "
        f"{8 * plan.after / max(plan.entries, 1):.2f} bits a weight")
    process = peak_of_process()
    so_far = f"; this process has taken {size(process)} so far" if process else ""
    say(f"time     about {in_words(plan.total_seconds)}{so_far}")


def data_in_words(batches: list[dict[str, Any]]) -> str:
    """The calibration data: their number, and their lengths in tokens."""
    count = sum(len(batch["ids"]) for batch in batches)
    if "source_ids" not in batches[0]:
        return f"{count} sequences of {batches[0]['ids'].shape[1]} tokens"
    source = max(int(batch["source_mask"].sum(axis=1).max()) for batch in batches)
    target = max(int(batch["mask"].sum(axis=1).max()) for batch in batches)
    return f"{count} sources of up to {source} tokens with targets of up to {target}"


def say_result(result: Mapping[str, Any], of_what: str, say: Callable[[str], None]) -> None:
    """Print the result: error, bytes, time, the directory. of_what: the things that have the errors."""
    say(f"error    {result['error']:.2e}, the mean of the relative squared errors of {result['weights']} {of_what}")
    say(f"bytes    {size(result['bytes_before'])} -> {size(result['bytes_after'])}, "
        f"{result['bits_per_weight']:.2f} bits a weight; {size(result['file_bytes'])} with what stays dense")
    say(f"time     {in_words(result['seconds'])}; this process has taken {size(result['peak_bytes'])}")
    say(f"written  {result['out']}")

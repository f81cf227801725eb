"""The settings, the base and the data that a resumed run must share with the run that wrote the checkpoint.

describe_run of checkpoint.py puts them together; the facts are JSON-able. A method, a loss, a schedule and an optimiser
may get a new setting in a later version of the library: a checkpoint without it is read as one with its default.
"""
from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from ..identity import complete, describe, fingerprint, qualified_name, rows_as_arrays
from ..nn import Module
from ..optim import Schedule, schedules
from ..optim.schedules import WarmUp
from .batch import Loss

LONGEST = 500                                            # characters of a text from a file in a message
LONGEST_CALL = 2000                                      # characters of a text that is parsed


def describe_loss(loss: Loss) -> dict[str, Any]:
    """The class and fields of a loss, as JSON-able facts, to recognise it when a run is resumed.

    Its trainable module is described by shapes alone: training changes the values, and the checkpoint holds them.
    """
    description = describe(loss.original)
    if loss.module is not None and is_dataclass(loss.original):
        shapes = {name: list(p.shape) for name, p in loss.module.named_parameters().items()}
        for field in fields(loss.original):
            if getattr(loss.original, field.name) is loss.module:
                description["fields"][field.name] = {"shapes": shapes}
    return description


def describe_schedule(schedule: Schedule) -> Any:
    """A schedule as JSON-able facts: the library's own and dataclasses with their settings, others by their names."""
    if isinstance(schedule, WarmUp):
        return repr(schedule)
    if isinstance(schedule, functools.partial):
        arguments = describe([*schedule.args, schedule.keywords])
        return {"function": describe_schedule(schedule.func), "arguments": arguments}
    if is_dataclass(schedule):
        return describe(schedule)
    named: Any = schedule if isinstance(getattr(schedule, "__qualname__", None), str) else type(schedule)
    return qualified_name(named)


def complete_schedule(saved: Any, schedule: Schedule) -> Any:
    """What a checkpoint holds of a schedule, with the defaults of the settings that it lacks.

    schedule: that of today's run, with which it will be compared."""
    if isinstance(schedule, WarmUp):
        return complete_call(saved, repr(schedule), getattr(schedules, schedule.maker, None))
    if not isinstance(schedule, functools.partial):
        return complete(saved, schedule)
    if not isinstance(saved, dict) or saved.keys() != {"function", "arguments"}:
        return saved
    arguments = complete(saved["arguments"], [*schedule.args, schedule.keywords])
    return {"function": complete_schedule(saved["function"], schedule.func), "arguments": arguments}


def complete_call(saved: Any, ours: str, maker: Callable | None) -> Any:
    """A text from a checkpoint, such as "SGD(lr=0.1, momentum=0.0)", with the default of each setting that it lacks.

    ours: the text of today's run; maker: the class or function that it calls, whose signature has the defaults.
    What is no call of the same name stays as it is."""
    theirs, today = read_call(saved), read_call(ours)
    if theirs is None or today is None or maker is None or theirs[0] != today[0]:
        return saved
    settings = {}
    parameters = inspect.signature(maker).parameters
    for name in today[1]:
        if name in theirs[1]:
            settings[name] = theirs[1][name]
        elif name in parameters and parameters[name].default is not inspect.Parameter.empty:
            settings[name] = repr(parameters[name].default)
    settings |= theirs[1]                                               # those that are unknown today come last
    return f"{theirs[0]}({', '.join(f'{name}={value}' for name, value in settings.items())})"


def read_call(text: Any) -> tuple[str, dict[str, str]] | None:
    """(name, {keyword: text of its value}) of a text such as "SGD(lr=0.1, momentum=0.0)"; None for any other.

    A long text is not parsed: that takes memory and stack."""
    if not isinstance(text, str) or len(text) > LONGEST_CALL:
        return None
    try:
        call = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
        return None
    values = {str(keyword.arg): ast.get_source_segment(text, keyword.value) or "" for keyword in call.keywords}
    return ast.unparse(call.func), values


def describe_base(model: Module, changing: set[str]) -> dict[str, str]:
    """{name: fingerprint} of the tensors and buffers that the run does not change: those of the base.

    changing: the names of all others."""
    values = {name: p.data for name, p in model.named_parameters().items()}
    values |= model.named_buffers(persistent_only=True)
    return {name: fingerprint(value) for name, value in values.items() if name not in changing}


def describe_data(batches: Any) -> dict[str, Any] | None:
    """The number and the fingerprint of the batches in a list.

    None for all others: to read them once would use them up. data.Batches compares its examples itself."""
    if not isinstance(batches, (list, tuple, np.ndarray)):
        return None
    try:
        return {"count": len(batches), "fingerprint": fingerprint(rows_as_arrays(batches))}
    except TypeError:                                                   # an object without a content to read
        return None


def check_identity(identity: dict[str, Any], saved: dict[str, Any]) -> None:
    """ValueError, naming the first difference, if a checkpoint is of another run.

    identity: describe_run of this run; saved: the facts of the checkpoint, which include those of its run.
    """
    for key, value in identity.items():
        if key not in saved or saved[key] == value:                     # version 0.1 saved fewer settings
            continue
        if key == "trained" and isinstance(saved[key], list):
            names = sorted(set(value) ^ set(map(str, saved[key])))
            shown = one_line(", ".join(names[:3]))
            raise ValueError(f"this checkpoint is of another run: {shown} trains in one of the two only")
        theirs = to_text(saved[key])
        ours = to_text(value)
        if theirs == ours:                                              # two classes of one name: show the full names
            theirs = str(saved[key])
            ours = str(value)
        raise ValueError(f"this checkpoint is of another run: its {key}: {one_line(theirs)}; here: {ours}")


def check_base(ours: dict[str, str] | None, saved: dict[str, str] | None, held: set[str]) -> None:
    """ValueError if a frozen tensor of the model has other values than in the run that wrote the checkpoint.

    ours, saved: as describe_base gives them; earlier versions saved none. held: the names that the checkpoint holds,
    which do not count: they are overwritten."""
    if ours is None or not isinstance(saved, dict):
        return
    different = []
    for name in ours.keys() | saved.keys():
        if name not in held and ours.get(name) != saved.get(name):
            different.append(name)
    if different:
        names = one_line(", ".join(sorted(different)[:3])) + (" ..." if len(different) > 3 else "")
        raise ValueError(f"this checkpoint is of a run on another base: the frozen {names} had other values")


def one_line(text: str, longest: int = LONGEST) -> str:
    """A text that a file holds, which may be any text, as at most `longest` characters without line breaks."""
    return " ".join(text.split())[:longest]


def to_text(value: Any) -> str:
    """A setting as one readable line, for an error message.

    The description of a method or a loss, {"class": ..., "fields": ...}, becomes LoRA(r=2, alpha=16.0).
    """
    if isinstance(value, dict) and value.keys() == {"class", "fields"} and isinstance(value["fields"], dict):
        name = str(value["class"]).rpartition(".")[2]
        inside = ", ".join(f"{field}={to_text(entry)}" for field, entry in value["fields"].items())
        return f"{name}({inside})"
    if isinstance(value, dict):
        return "; ".join(f"{name}: {to_text(entry)}" for name, entry in value.items()) or "none"
    return "none" if value in (None, "") else str(value)

"""The folder of a run of `tinyft tune`, and of `tinyft distill`.

    config.json              the options of the run; distill.json, since a model's directory has a config.json
    log.jsonl                a line for each step {"step", "loss", "seconds"} and evaluation {"step", "test_loss", ...}
    curve.svg                the losses over the steps; only where matplotlib is installed
    checkpoint.safetensors   the state of the training, from which --resume goes on; distill removes it at the end
    adapter/                 the trained method, at the end; or the files of the student
"""
from __future__ import annotations

import argparse
import copy
import io
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import checks
from ..atomic import recover
from ..data import Batches
from ..files import read_json, read_tensors, write_atomically
from ..train.settings import CHECKPOINT
from .opening import as_json, check_new_folder
from .shipped import SHIPPED

__all__ = [
    "ADAPTER", "Log", "check_content", "check_data", "check_out", "draw_curve", "flag", "is_finished", "merge_options",
    "read_config", "write_config",
]

CONFIG = "config.json"
MODEL = "config.json"                                    # the file of a saved model that is written last
LOG = "log.jsonl"
CURVE = "curve.svg"
ADAPTER = "adapter"
VERSION = 1                                              # of the form of config.json
ADDED = {"recompute": False}                             # options that older files of this form lack, with their value


# ── config ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def check_out(out: str, *, resume: bool, config: str = CONFIG) -> None:
    """ValueError for a folder that holds another run, and, with resume, for one that holds none.

    config: the name of the file with the options of a run."""
    has_config = os.path.isfile(os.path.join(out, config))
    if resume:
        if not has_config:
            raise ValueError(f"--resume wants the folder of a run, and {out} has no {config}")
        return
    if has_config and os.path.isfile(os.path.join(out, LOG)):
        raise ValueError(f"--out wants a new or an empty folder, and {out} holds a run: --resume goes on with it, "
                         "or choose another folder")
    check_new_folder(out)


def write_config(folder: Path, options: Mapping[str, Any], config: str = CONFIG) -> None:
    """Write the options of a run, and an empty log.jsonl beside them."""
    from .. import __version__

    facts = {"form": VERSION, "tinyft": __version__, **options}
    text = json.dumps(facts, indent=1) + "\n"
    write_atomically({folder / LOG: b"", folder / config: text.encode()})


def read_config(folder: Path, kinds: Mapping[str, tuple[type, ...]], config: str = CONFIG) -> dict[str, Any]:
    """The options of a run. ValueError if their file is damaged, or if a later version of tinyft wrote it.

    kinds: {option: the types that it may have}. A list holds texts."""
    facts = read_json(folder / config)
    if facts.get("form") != VERSION:
        raise ValueError(f"{folder / config} wants the form {VERSION} of a run, "
                         f"got {checks.brief(facts.get('form'))}")
    facts = ADDED | facts
    for name, kind in kinds.items():
        value = facts.get(name)
        parts = value if isinstance(value, list) else []
        if name not in facts or type(value) not in kind or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{folder / config} is damaged: got {checks.brief(value)} as the option {name}")
    return facts


def merge_options(
    args: argparse.Namespace, defaults: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]],
    paths: Sequence[str], config: str = CONFIG,
) -> dict[str, Any]:
    """The options of a run: given ones, else those of the run to resume, else the defaults.

    kinds   as read_config takes them
    paths   the options that are paths, or names of something that ships. Paths of files and folders that are there
            become absolute, since a run may be resumed from elsewhere
    config  the name of the file with the options of a run

    ValueError for an option that differs from the run to resume."""
    given = {name: getattr(args, name) for name in defaults if getattr(args, name) is not None}
    for name in paths:
        value = given.get(name, "")
        is_shipped = name in ("data", "test") and value in SHIPPED
        if os.path.exists(value) and not is_shipped:
            given[name] = os.path.abspath(value)
    if not args.resume:
        return {**defaults, **given}
    stored = read_config(Path(args.out), kinds, config)
    for name, value in given.items():
        if stored.get(name) != value:
            raise ValueError(f"--resume goes on with the options of the run, and its {flag(name)} is "
                             f"{stored.get(name)}, not {value}")
    return {name: stored[name] for name in defaults}


def flag(name: str) -> str:
    """The flag of an option: max_len is --max-len."""
    return f"--{name.replace('_', '-')}"


def check_content(folder: Path, content: Mapping[str, str], words: Mapping[str, str], config: str) -> None:
    """ValueError if something is no longer that of the run in the folder.

    content  {name of an entry of the file with the options: fingerprint now}
    words    {name: what the folder holds if its fingerprint was another one}"""
    stored = read_config(folder, dict.fromkeys(content, (str,)), config)
    for name, value in content.items():
        if stored[name] != value:
            raise ValueError(f"{folder} holds {words[name]} than its files hold now: choose another --out")


def is_finished(folder: Path) -> bool:
    """True if the folder holds a whole model. A saving that a kill has cut in two is undone first."""
    recover(folder)
    return (folder / MODEL).is_file()


# ── log ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
def check_data(folder: Path, batches: Batches) -> None:
    """ValueError if the batches are not those of the checkpoint in the folder. Nothing changes."""
    if not (folder / CHECKPOINT).exists():
        return
    _, facts = read_tensors(folder / CHECKPOINT)
    state = facts.get("batches", {}).get("own", {})
    try:
        copy.copy(batches).load_state_dict(state)        # the position of the copy alone moves
    except ValueError as e:
        raise ValueError(f"{folder} holds a run on other data than its files hold now: {e}") from e


class Log:
    """log.jsonl, written line by line while the run goes on."""

    def __init__(self, folder: Path) -> None:
        """Go on with the log of a folder: lines after its checkpoint, which a killed process wrote, are removed."""
        self.path = folder / LOG
        self.step = _checkpointed_step(folder)           # steps taken so far
        self.entries = [entry for entry in _read_entries(self.path) if entry["step"] <= self.step]
        text = "".join(as_json(entry) + "\n" for entry in self.entries)
        write_atomically({self.path: text.encode()})
        self.last_time = time.perf_counter()

    def add_step(self, step: int, terms: Mapping[str, float]) -> None:
        """Write the terms of the loss of one step, and its seconds."""
        now = time.perf_counter()
        self.step = step
        self._write({"step": step, **terms, "seconds": round(now - self.last_time, 4)})
        self.last_time = now

    def add_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Write the metrics of an evaluation on the test data after the steps so far."""
        self._write({"step": self.step, **{f"test_{name}": value for name, value in metrics.items()}})
        self.last_time = time.perf_counter()

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The entries of evaluations."""
        return [entry for entry in self.entries if "test_loss" in entry]

    def _write(self, entry: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(as_json(entry) + "\n")
        self.entries.append(entry)


def _checkpointed_step(folder: Path) -> int:
    """The steps of the checkpoint of a run; 0 without one."""
    if not (folder / CHECKPOINT).exists():
        return 0
    _, facts = read_tensors(folder / CHECKPOINT)
    return checks.whole("the steps of a checkpoint", facts.get("done"), 0)


def _read_entries(path: Path) -> list[dict[str, Any]]:
    """The lines of a log up to the first that is damaged: a killed process may have written half a line."""
    entries = []
    if not path.is_file():
        return entries
    for line in path.read_bytes().split(b"\n"):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict) or type(entry.get("step")) is not int:
            break
        numbers = {name: math.nan if value is None else value for name, value in entry.items()}
        if not all(type(value) in (int, float) for value in numbers.values()):
            break
        entries.append(numbers)
    return entries


# ── curve ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def draw_curve(folder: Path, log: Log, title: str) -> str:
    """Draw the losses of a run over its steps into curve.svg. Returns a sentence about the file, also if it fails."""
    try:
        from matplotlib.figure import Figure  # without pyplot: a notebook keeps its own backend
    except ImportError:
        return f"no {CURVE}: matplotlib is missing; it comes with the extra tinyft[lessons]"
    steps = [entry for entry in log.entries if "loss" in entry]
    if not steps:
        return f"no {CURVE}: no step was taken"
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    ax = figure.subplots()
    x = [entry["step"] for entry in steps]
    losses = [entry["loss"] for entry in steps]
    ax.plot(x, losses, color="0.75", lw=0.8, label="training, each step")
    ax.plot(x, _smooth(losses), color="C0", lw=1.6, label="training, mean of the last steps")
    tests = log.evaluations
    if tests:
        ax.plot([entry["step"] for entry in tests], [entry["test_loss"] for entry in tests], "o-", color="C1",
                label="test")
    ax.set_xlabel("steps")
    ax.set_ylabel("loss (nats per label)")
    ax.set_title(title, fontsize=10)
    ax.grid(visible=True, color="0.92")
    ax.legend(frameon=False, fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    write_atomically({folder / CURVE: content.getvalue()})
    return os.fspath(folder / CURVE)


def _smooth(values: list[float], share: float = 0.05) -> list[float]:
    """For each value, the mean of the last values up to it: of a share of all of them, at least one."""
    width = max(1, round(share * len(values)))
    means = []
    for i in range(1, len(values) + 1):
        last = values[max(0, i - width):i]
        means.append(sum(last) / len(last))
    return means

"""The arguments of `fit`, checked before anything changes."""
from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import array, checks, precision
from ..nn import Module
from ..optim import Optimizer, constant_schedule, cosine_schedule, linear_schedule

CHECKPOINT = "checkpoint.safetensors"                                   # the file in the folder `out`


@dataclass(frozen=True)
class Settings:
    """The arguments of `fit` that do not change during a run; `fit` describes them. capture: True on CuPy only."""
    steps: int
    clip: float | None
    accumulate: int
    evaluate: Callable[[], dict[str, float]] | None
    patience: int
    monitor: str
    autocast: str | None
    capture: bool
    recompute: bool = False
    seed: int = 0
    save_every: int = 100
    evaluate_every: int = 0
    on_step: Callable[[int, dict[str, float]], None] | None = None

    def __post_init__(self) -> None:
        """Check every value. A NumPy number becomes a Python number, since a checkpoint holds it as JSON."""
        least = {"steps": 0, "accumulate": 1, "seed": 0, "save_every": 0, "evaluate_every": 0, "patience": 0}
        checked: dict[str, Any] = {name: checks.whole(name, getattr(self, name), n) for name, n in least.items()}
        if self.clip is not None:
            checked["clip"] = checks.number("clip", self.clip, above=0)
        if self.autocast is not None:
            checked["autocast"] = str(precision.half(self.autocast))
        checked["recompute"] = checks.flag("recompute", self.recompute)
        checked["capture"] = checks.flag("capture", self.capture) and array.backend() == "cupy"
        checks.instance("monitor", self.monitor, str, "the name of a metric")
        if self.on_step is not None:
            checks.function("on_step", self.on_step, "a function of the steps taken and the terms of a loss")
        if self.evaluate is not None:
            checks.function("evaluate", self.evaluate, "a function that returns metrics, {name: number}")
        elif self.evaluate_every or self.patience:
            raise ValueError("evaluate_every and patience want evaluate, a function that returns metrics; got None")
        if self.patience and not self.evaluate_every:
            raise ValueError("patience wants evaluate_every > 0, the steps between two evaluations; got 0")
        for name, value in checked.items():
            object.__setattr__(self, name, value)                       # the dataclass is frozen


def check_arguments(model: Any, optimizer: Any, schedule: Any, out: Any, *, resume: Any, progress: Any) -> None:
    """TypeError or ValueError for arguments of `fit` that make no sense, before anything changes.

    Settings checks the numbers, as_loss the loss, BatchStream the batches."""
    checks.instance("fit", model, Module, "a model")
    checks.instance("optimizer", optimizer, Optimizer, "an optimiser, such as AdamW(1e-3)")
    checks.function("schedule", schedule, "a function (t, T) -> factor, such as cosine_schedule()")
    if any(schedule is maker for maker in (constant_schedule, linear_schedule, cosine_schedule)):
        raise TypeError(f"schedule wants a function (t, T) -> factor, got {schedule.__name__} itself: "
                        f"call it, {schedule.__name__}()")
    checks.flag("resume", resume)
    checks.flag("progress", progress)
    if out is not None:
        check_folder(out, resume)


def check_folder(out: Any, resume: bool) -> None:
    """Raise for an `out` in which a run cannot write its checkpoint, and for one with a run that is not resumed.

    The folder need not exist, nor its parents: make_folder makes them. TypeError for no path, ValueError for a file or
    a run that is there, PermissionError for a folder that cannot be written to."""
    checks.instance("out", out, (str, os.PathLike), "the path of a folder")
    if not os.fspath(out):
        raise ValueError("out wants the path of a folder, got an empty path")
    folder = Path(out)
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not os.path.isdir(nearest) or os.path.isdir(folder / CHECKPOINT):
        raise ValueError(f"out wants a folder for {CHECKPOINT}, got {out}: something else is in the way")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"out wants a folder that can be written to, got {out}")
    if os.path.lexists(folder / CHECKPOINT) and not resume:
        raise ValueError(f"out holds a run, {folder / CHECKPOINT}: resume=True goes on from it, "
                         "or choose another folder")


def make_folder(folder: Path) -> None:
    """Make the folder and its parents. OSError or ValueError, which names `out`, if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OSError(e.errno, f"out wants a folder that can be made, got {checks.brief(str(folder))} "
                               f"({e.strerror})") from e
    except ValueError as e:                                             # a null byte in the name
        raise ValueError(f"out wants the path of a folder, got {checks.brief(str(folder))} ({e})") from e

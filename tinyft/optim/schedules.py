"""Learning-rate schedules: (t, T) -> the factor on the learning rate at step t = 0 ... T − 1."""
from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import checks
from ..keywords import checked_keywords

__all__ = ["Schedule", "constant_schedule", "linear_schedule", "cosine_schedule"]

Schedule = Callable[[int, int], float]


@checked_keywords
def constant_schedule(warmup: float = 0) -> Schedule:
    """1 after the warm-up.

    warmup: the number of steps in which the factor rises linearly to 1; a number below 1 is a fraction of all steps.
    ValueError if it is negative, or a number of steps that is not whole."""
    def constant(fraction: float) -> float:
        return 1.0
    return with_warmup(warmup, constant)


@checked_keywords
def linear_schedule(warmup: float = 0) -> Schedule:
    """1 − s after the warm-up, where s = 0 ... 1 is the fraction of the remaining steps that is done.

    warmup: as for constant_schedule."""
    def linear(fraction: float) -> float:
        return 1 - fraction
    return with_warmup(warmup, linear)


@checked_keywords
def cosine_schedule(warmup: float = 0, floor: float = 0.0) -> Schedule:
    """A function (t, T) -> factor:  (t + 1) / w for t < w;  after it floor + (1 − floor) (1 + cos π s) / 2

    with s = (t − w) / (T − w), the fraction of the remaining steps that is done.  t = 0 ... T − 1: the step, T: the
    number of steps.  The factor rises linearly to 1 in the w steps of the warm-up; then it falls towards `floor`.

    warmup: w; or, if it is below 1, the fraction of T that w is, rounded to a whole number.
    ValueError if warmup is negative or a number of steps that is not whole, and unless 0 <= floor <= 1.
    Loshchilov & Hutter 2017, without restarts"""
    checks.number("floor", floor, 0, 1)

    def cosine(fraction: float) -> float:
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * fraction))
    return with_warmup(warmup, cosine)


def with_warmup(warmup: float, decay: Callable[[float], float]) -> Schedule:
    """A schedule, (t, T) -> factor, that rises linearly to 1 during the warm-up, and then is decay(s).

    warmup: as for constant_schedule.  s: the fraction of the steps after the warm-up that is done."""
    checks.number("warmup", warmup, 0)
    if warmup > 1 and warmup != int(warmup):
        raise ValueError(f"warmup wants a whole number of steps, or a fraction below 1 of all steps, got {warmup}")
    return WarmUp(warmup, decay)


@dataclass(frozen=True, repr=False)
class WarmUp:
    """The schedule that with_warmup makes.  A checkpoint holds its repr, to recognise another schedule."""
    warmup: float
    decay: Callable[[float], float]

    def __call__(self, t: int, T: int) -> float:
        """The factor at step t of T.  ValueError unless 0 <= t <= T."""
        T = checks.whole("T", T, 1)
        t = checks.whole("t", t, 0, T)
        steps = round(self.warmup * T) if 0 < self.warmup < 1 else int(self.warmup)
        if t < steps:
            return (t + 1) / steps
        if t == T:
            return self.decay(1.0)
        return self.decay((t - steps) / (T - steps))

    @property
    def maker(self) -> str:
        """The name of the function that made the schedule."""
        return self.decay.__qualname__.partition(".")[0]             # decay is a function inside of cosine_schedule

    def __repr__(self) -> str:
        """The call that made the schedule, such as cosine_schedule(warmup=20, floor=0.1)."""
        settings: dict[str, Any] = {"warmup": self.warmup, **inspect.getclosurevars(self.decay).nonlocals}
        return f"{self.maker}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"

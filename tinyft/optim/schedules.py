"""Learning-rate schedules: (t, T) -> the factor on the learning rate at step t = 0 ... T − 1."""
from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["Schedule", "constant_schedule", "linear_schedule", "cosine_schedule"]

Schedule = Callable[[int, int], float]


def constant_schedule(warmup: float = 0) -> Schedule:
    """1 after the warm-up.

    warmup: the number of steps in which the factor rises linearly to 1; a number below 1 is a fraction of all steps."""
    def constant(fraction: float) -> float:
        return 1.0
    return with_warmup(warmup, constant)


def linear_schedule(warmup: float = 0) -> Schedule:
    """1 − s after the warm-up, where s = 0 ... 1 is the fraction of the remaining steps that is done.

    warmup: as for constant_schedule."""
    def linear(fraction: float) -> float:
        return 1 - fraction
    return with_warmup(warmup, linear)


def cosine_schedule(warmup: float = 0, floor: float = 0.0) -> Schedule:
    """floor + (1 − floor) (1 + cos π s) / 2 after the warm-up, where s = 0 ... 1 is the fraction that is done.

    warmup: as for constant_schedule.      Loshchilov & Hutter 2017, without restarts"""
    def cosine(fraction: float) -> float:
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * fraction))
    return with_warmup(warmup, cosine)


def with_warmup(warmup: float, decay: Callable[[float], float]) -> Schedule:
    """A schedule, (t, T) -> factor, that rises linearly to 1 during the warm-up, and then is decay(s).

    warmup: as for constant_schedule.  s: the fraction of the steps after the warm-up that is done."""
    def factor(t: int, T: int) -> float:
        steps = round(warmup * T) if 0 < warmup < 1 else int(warmup)
        if t < steps:
            return (t + 1) / steps
        return decay((t - steps) / (T - steps))
    return factor

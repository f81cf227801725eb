"""The stages of a run, from the phases of all attached methods.

A method has phases: each has an optional setup, and a share of the training steps (edit.Phase). A run has stages, which
follow one another: each is one setup, or one stretch of training steps, in which all methods train together.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..edit import Attached


@dataclass
class Stage:
    """A part of a run: either the setup of one method, or `steps` training steps with a fresh optimiser.

    is_final: True for the setups after the last training steps, which run after an early stop too.
    """
    steps: int = 0
    attached: Attached | None = None
    setup: Callable | None = None
    is_final: bool = False


def make_stages(attached: Sequence[Attached], steps: int) -> list[Stage]:
    """The stages of a run of `steps` training steps, in order. attached: its methods, each with its edits.

    The run has the training phases of the method that has several; all other methods train in all of them. Setups of
    different methods at one point of the run are in the order in which the methods were attached. A method with one
    training phase has the setups that precede this phase at the start of the run, and the setups that follow it at the
    end.

    ValueError if the shares of a method do not sum to 1, or if two methods have several training phases.
    """
    shares = [1.0]                                                      # of the training phases of the run
    several = []                                                        # methods with several training phases
    for a in attached:
        own_shares = training_shares(a)
        if len(own_shares) > 1:
            several.append(a.name)
            shares = own_shares
    if len(several) > 1:
        raise ValueError(f"fit wants at most one method with several training phases, got {', '.join(several)}")

    # setups[i]: the setups before training phase i of the run; the last list: those after all training
    setups: list[list[Stage]] = [[] for _ in range(len(shares) + 1)]
    for a in attached:
        own_count = len(training_shares(a))
        own_index = 0                                                   # training phases of this method so far
        for phase in a.method.phases():
            if phase.setup is not None:
                is_final = own_index == own_count                       # no training phase of this method follows
                index = len(shares) if is_final else own_index
                setups[index].append(Stage(0, a, phase.setup, is_final))
            if phase.share > 0:
                own_index += 1

    stages = []
    total_share = 0.0
    steps_before = 0
    for share, setups_before in zip(shares, setups):
        total_share += share
        steps_after = round(total_share * steps)                        # rounding the sum: the stages add up to `steps`
        stages += [*setups_before, Stage(steps_after - steps_before)]
        steps_before = steps_after
    return stages + setups[-1]


def training_shares(a: Attached) -> list[float]:
    """The shares of a method's training phases, without phases of share 0, which only run a setup.

    ValueError if the shares are negative or do not sum to 1.
    """
    shares = [phase.share for phase in a.method.phases()]
    if any(share < 0 for share in shares) or not math.isclose(sum(shares), 1.0, abs_tol=1e-9):
        text = " + ".join(map(str, shares)) or "none"
        raise ValueError(f"the phases of {a.name} want shares of the steps that sum to 1, got {text}")
    return [share for share in shares if share > 0]

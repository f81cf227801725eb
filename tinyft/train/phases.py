"""The stages of a run, from the phases of all attached methods."""
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
    method: Attached | None = None
    setup: Callable | None = None
    is_final: bool = False


def make_stages(attached: Sequence[Attached], steps: int) -> list[Stage]:
    """The stages of a run, in order. Before each training phase come the setups of all methods, as they were attached.

    A method with one training phase has its first setups before the first training phase of the run, and its last
    ones at the end.
    ValueError if the shares of a method do not sum to 1, or if two methods have several training phases.
    """
    shares = [1.0]
    several = []
    for a in attached:
        own = training_shares(a)
        if len(own) > 1:
            several.append(a.name)
            shares = own
    if len(several) > 1:
        raise ValueError(f"fit wants at most one method with several training phases, got {', '.join(several)}")

    setups: list[list[Stage]] = [[] for _ in range(len(shares) + 1)]    # before each training phase, and after the last
    for a in attached:
        count = len(training_shares(a))
        done = 0                                                        # training phases of this method so far
        for phase in a.method.phases():
            if phase.setup is not None:
                is_final = done == count
                place = len(shares) if is_final else done
                setups[place].append(Stage(0, a, phase.setup, is_final))
            if phase.share > 0:
                done += 1

    stages = []
    total_share = 0.0
    steps_before = 0
    for share, before in zip(shares, setups):
        total_share += share
        steps_after = round(total_share * steps)
        stages += [*before, Stage(steps_after - steps_before)]
        steps_before = steps_after
    return stages + setups[-1]


def training_shares(a: Attached) -> list[float]:
    """The shares of a method's training phases. ValueError if they do not sum to 1."""
    shares = [phase.share for phase in a.method.phases()]
    if any(share < 0 for share in shares) or not math.isclose(sum(shares), 1.0, abs_tol=1e-9):
        text = " + ".join(map(str, shares)) or "none"
        raise ValueError(f"the phases of {a.name} want shares of the steps that sum to 1, got {text}")
    return [share for share in shares if share > 0]

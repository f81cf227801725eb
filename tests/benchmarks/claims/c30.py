"""C30: the share of a Switch model's gain that a dense student keeps."""

from __future__ import annotations

import switch

from .c29 import falls
from .claim import HOLDS, IN_PART, NOT_AT_THIS_SIZE, WRONG, Claim, Finding, Numbers

SHARE = 0.3
COMPRESSION = 0.8


def measure() -> Numbers:
    """The summary of the study: switch.summary."""
    return switch.PROGRAM.measure()


def judge(numbers: Numbers) -> Finding:
    """By the share of the student with both, and by the dense model that trained as long as teacher and student."""
    shares = {name: row["share"] for name, row in numbers["shares"].items()}
    both = shares[switch.BOTH]
    gains = numbers["gain"]["low"] > 0
    keeps = gains and numbers["compression"] >= COMPRESSION and both >= SHARE
    beyond = numbers["beyond_longer"]["mean"] > 0
    trend = numbers["speed"][switch.teacher_name(switch.Settings())]["by_length"]
    if gains:
        verdict = HOLDS if keeps and beyond else IN_PART if both > 0 else WRONG
    else:
        verdict = NOT_AT_THIS_SIZE if falls(trend) else WRONG
    kept = {name: switch.percent(numbers, name) for name in shares}
    measured = (
        f"at {100 * numbers['compression']:.0f} % compression the student keeps {kept[switch.BOTH]} of a gain of "
        f"{numbers['gain']['mean']:.3f} nats (distillation alone {kept[switch.DISTILLED]}, start alone "
        f"{kept[switch.START]}); the dense model that trained as long as both together has {kept[switch.LONGER]}"
    )
    if numbers["gain"]["mean"] <= 0:
        measured = (
            f"no gain to keep: the Switch model's loss is {-numbers['gain']['mean']:.3f} nats above the dense model's "
            f"after as many steps; the student with both, {100 * numbers['compression']:.0f} % smaller, is "
            f"{numbers['shares'][switch.BOTH]['kept']['mean']:.3f} below the dense model, and "
            f"{-numbers['beyond_longer']['mean']:+.3f} beside one that trained as long as both together"
        )
    return Finding(verdict, measured, tuple(switch.student_table(numbers)))


CLAIM = Claim(
    id="C30",
    claim="Distilled into a dense model at 80-99 % compression, a Switch model keeps 30 % of its gain",
    source="003",
    refuted_by=(
        f"a student, smaller by {100 * COMPRESSION:g} % or more, that keeps nothing of the gain; or a Switch model "
        "without a gain: then the claim is wrong, or not at this size if its loss, minus the dense model's, falls over "
        f"three lengths of the training. It holds if the student keeps {100 * SHARE:g} % or more and is better than a "
        "dense model that trained as long as teacher and student together; in part if it keeps less, or if the longer "
        "training explains it."
    ),
    setup=(
        f"the protocol of results/switch.md: the Switch model with {max(switch.Settings().experts)} experts, its "
        "losses 0.75 / 0.25, the start from its other parameters; the share is that of the mean losses over "
        f"{switch.Settings().seeds} seeds."
    ),
    measure=measure,
    judge=judge,
)

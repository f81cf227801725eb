"""C29: how much faster a Switch model reaches the dense model's loss, by steps (equal FLOPs) and by time."""

from __future__ import annotations

import switch

from .claim import HOLDS, IN_PART, NOT_AT_THIS_SIZE, WRONG, Claim, Finding, Numbers

FASTER = 7


def measure() -> Numbers:
    """The summary of the study: switch.summary."""
    return switch.PROGRAM.measure()


def judge(numbers: Numbers) -> Finding:
    """By the best Switch model: the factor by steps, and by time."""
    speed = numbers["speed"]
    steps = [row["by_steps"]["mean"] for row in speed.values()]
    time = max(row["by_time"]["mean"] for row in speed.values())
    falling = all(falls(row["by_length"]) for row in speed.values())
    if max(steps) >= FASTER and time >= FASTER:
        verdict = HOLDS
    elif any(row["by_steps"]["low"] > 1 for row in speed.values()):
        verdict = IN_PART
    else:
        verdict = NOT_AT_THIS_SIZE if falling else WRONG
    said = ", ".join(f"{name.removeprefix('Switch, ')} {row['by_steps']['mean']:.2f}" for name, row in speed.items())
    measured = f"times as fast to the dense model's loss, by steps: {said}; by time at most {time:.2f}"
    return Finding(verdict, measured, tuple(switch.speed_table(numbers)))


def falls(values: list[float]) -> bool:
    """True if every value is below the one before it."""
    return all(a > b for a, b in zip(values, values[1:]))


CLAIM = Claim(
    id="C29",
    claim="Switch Transformers pretrain 7 times faster than the dense model",
    source="003",
    refuted_by=(
        f"a Switch model that reaches the dense model's final loss less than {FASTER} times as fast, by steps and by "
        "time. It holds in part if one is faster by steps at all, its interval above 1. If none is, it is wrong; or "
        "not at this size, if the loss of every Switch model, minus the dense model's, falls over three lengths of the "
        "training."
    ),
    setup=(
        "the protocol of results/switch.md: small GPTs on the shipped prose, "
        f"{', '.join(map(str, switch.Settings().experts))} experts in every block, "
        f"{switch.Settings().seeds} seeds; paired 95 % intervals over them. The paper's factor is that of 64 experts "
        "on accelerators."
    ),
    measure=measure,
    judge=judge,
)

"""C27: the steps, and the time, after which a student with a teacher is as good as one without at its end."""

from __future__ import annotations

import statistics

import distilbert

from .claim import HOLDS, IN_PART, WRONG, Claim, Finding, Numbers


def measure() -> Numbers:
    """The summary of the study: distilbert.summary."""
    return distilbert.PROGRAM.measure()


def judge(numbers: Numbers) -> Finding:
    """Faster by steps if every seed is, from both starts; by time, if the steps saved pay for the teacher's passes."""
    ratio = numbers["cost"]["teacher_step"]["mean"]
    shares = distilbert.head_starts(numbers)
    by_steps = [faster(found, 1) for found in shares.values()]
    by_time = [faster(found, ratio) for found in shares.values()]
    verdict = HOLDS if all(by_steps + by_time) else IN_PART if any(by_steps) else WRONG
    said = "; ".join(f"from the start '{start}', {in_words(found)}" for start, found in shares.items())
    measured = (
        f"held-out loss of the student without a teacher, reached with one: {said}. A step with the teacher takes "
        f"{ratio:.1f} times as long"
    )
    return Finding(verdict, measured, tuple(table_of(numbers)))


def faster(shares: list[float | None], ratio: float) -> bool:
    """True if in every seed the share of the steps, times the ratio of their times, is below 1."""
    return all(share is not None and share * ratio < 1 for share in shares)


def in_words(shares: list[float | None]) -> str:
    """The share of the steps, over seeds."""
    reached = [share for share in shares if share is not None]
    if len(reached) < len(shares):
        return f"in {len(reached)} of {len(shares)} seeds"
    return f"after {100 * statistics.mean(reached):.0f} % of the steps"


def table_of(numbers: Numbers) -> list[str]:
    """Lines of Markdown: the mean held-out loss at every evaluation."""
    names = (distilbert.FULL, distilbert.START, distilbert.RANDOM, distilbert.ALONE)
    lines = ["| steps | " + " | ".join(map(str, numbers["steps"])) + " |", "|---" * (len(numbers["steps"]) + 1) + "|"]
    for name in names:
        means = [statistics.mean(column) for column in zip(*numbers["curves"][name])]
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in means) + " |")
    return lines


CLAIM = Claim(
    id="C27",
    claim="Distillation speeds training up: soft labels tell more than hard ones",
    source="003",
    refuted_by=(
        "a student that, from either start, does not reach with a teacher the final held-out loss of the same student "
        "without one in fewer steps, in every seed. It holds if it also does so in less time, the teacher's passes "
        "counted; in part if by steps only, or from one start only."
    ),
    setup=(
        "the learning curves of results/distilbert.md: the loss at masked tokens of held-out prose, the same batches "
        "with and without a teacher, a start from the teacher's layers and a random one. The learning rate falls over "
        "all steps, so a student that gets there early has not yet had its small steps: the measure favours the one "
        "without a teacher."
    ),
    measure=measure,
    judge=judge,
)

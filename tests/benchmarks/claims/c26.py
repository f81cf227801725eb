"""C26: the quality, the size and the speed of a student of half the depth."""

from __future__ import annotations

import distilbert

from .claim import HOLDS, IN_PART, WRONG, Claim, Finding, Numbers

KEPT = 0.97
SMALLER = 0.35  # "40 %" with a tenth of slack: the embeddings stay, and their share depends on the model
FASTER = 1.5  # "60 % faster" is 1.6 times; with the same slack


def measure() -> Numbers:
    """The summary of the study: distilbert.summary."""
    return distilbert.PROGRAM.measure()


def judge(numbers: Numbers) -> Finding:
    """Three parts: both accuracies kept, fewer parameters, less time for one text."""
    on_task = numbers["task"][distilbert.FULL]["kept"]["mean"]
    at_masks = numbers["mlm"][distilbert.FULL]["kept"]["mean"]
    parameters = numbers["cost"]["parameters"]
    smaller = 1 - parameters["student"] / parameters["teacher"]
    speed = {texts: ratio["mean"] for texts, ratio in numbers["cost"]["speed"].items()}
    parts = [min(on_task, at_masks) >= KEPT, smaller >= SMALLER, speed["1"] >= FASTER]
    verdict = HOLDS if all(parts) else IN_PART if any(parts) else WRONG
    again = numbers["task"][distilbert.AGAIN]["kept"]["mean"]
    times = ", ".join(f"{value:.2f} times with {texts} in a batch" for texts, value in speed.items())
    measured = (
        f"kept {100 * on_task:.1f} % of the teacher's accuracy on a task ({100 * again:.1f} % if it is distilled again "
        f"there) and {100 * at_masks:.1f} % of that at masked tokens; {100 * smaller:.0f} % fewer parameters; {times}"
    )
    return Finding(verdict, measured, tuple(distilbert.headline_table(numbers) + distilbert.mlm_table(numbers)))


CLAIM = Claim(
    id="C26",
    claim="DistilBERT keeps 97 % of BERT's quality, is 40 % smaller and 60 % faster",
    source="003",
    refuted_by=(
        f"an accuracy, on the task or at masked tokens, below {KEPT:g} times the teacher's; less than "
        f"{100 * SMALLER:g} % fewer parameters; inference of one text less than {FASTER:g} times as fast. It holds in "
        "part if one or two of the three parts stand."
    ),
    setup=(
        "the protocol of results/distilbert.md: a student with half the layers of base-bert, by DistilBERT's recipe, "
        f"{distilbert.Settings().seeds} seeds; paired 95 % intervals over them. It trains on about a hundredth of its "
        "teacher's tokens."
    ),
    measure=measure,
    judge=judge,
)

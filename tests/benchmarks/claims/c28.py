"""C28: which of the three forms of sequence-level knowledge distillation helps a small encoder-decoder most."""

from __future__ import annotations

import sequences

from .claim import HOLDS, IN_PART, WRONG, Claim, Finding, Numbers


def measure() -> Numbers:
    """The summary of the study: sequences.summary."""
    return sequences.PROGRAM.measure()


def judge(numbers: Numbers) -> Finding:
    """By the gains in token F1 over the student without a teacher, greedy decoding."""
    gains = {method: numbers["students"][method]["gain"] for method in sequences.THREE}
    best = max(gains, key=lambda method: gains[method]["mean"])
    helps = gains[sequences.SEQUENCE]["low"] is not None and gains[sequences.SEQUENCE]["low"] > 0
    if best == sequences.SEQUENCE and helps:
        verdict = HOLDS
    elif helps:
        verdict = IN_PART
    else:
        verdict = WRONG
    said = ", ".join(f"{method} {gain['mean']:+.3f}" for method, gain in gains.items())
    measured = f"token F1 beside the student without a teacher: {said}"
    return Finding(verdict, measured, tuple(sequences.quality_table(numbers)))


CLAIM = Claim(
    id="C28",
    claim="Of word-level, sequence-level and interpolation, sequence-level distillation helps most",
    source="000",
    refuted_by=(
        "a sequence-level student whose token F1 is not clearly above that of the student without a teacher (95 % "
        "interval over the seeds). It holds if its mean gain is also the largest of the three; in part if another "
        "form gains more."
    ),
    setup=(
        "the protocol of results/sequences.md: names of functions from summaries, greedy decoding, the same sources "
        f"for all, {sequences.Settings().seeds} seeds, paired. Interpolation chooses among "
        f"{sequences.Settings().k} texts (the paper: 35) and starts from random weights (the paper: from the "
        "sequence-level student)."
    ),
    measure=measure,
    judge=judge,
)

"""C20: the bits down to which round-to-nearest and GPTQ keep the perplexity."""

from __future__ import annotations

import quantization

from .claim import HOLDS, IN_PART, WRONG, Claim, Finding, Numbers

LIMIT = 1.05  # perplexity over the dense model's, up to which a rule "works"
RTN = ("rtn-8-row", "rtn-4-row", "rtn-3-row")
GPTQ = ("gptq-4-row", "gptq-3-row")
GROUPED = ("rtn-4", "rtn-3", "gptq-4", "gptq-3")


def measure() -> Numbers:
    """{"ratios": {model: {rule: {ratio, low, high}}}}"""
    rows = quantization.rows_of(quantization.MODELS, (*RTN, *GPTQ, *GROUPED), again=True)
    return {"ratios": {name: quantization.ratios(found) for name, found in rows.items()}}


def judge(numbers: Numbers) -> Finding:
    """Two parts: rounding works at 8 bits and not below; GPTQ works at 4 and at 3."""
    ratios = numbers["ratios"]
    rounding_at_8 = all(works(found["rtn-8-row"]) for found in ratios.values())
    rounding_at_4 = [name for name, found in ratios.items() if works(found["rtn-4-row"])]
    gptq_at_4 = [name for name, found in ratios.items() if works(found["gptq-4-row"])]
    gptq_at_3 = [name for name, found in ratios.items() if works(found["gptq-3-row"])]
    parts = [rounding_at_8 and not rounding_at_4, len(gptq_at_4) == len(ratios), len(gptq_at_3) == len(ratios)]
    verdict = HOLDS if all(parts) else IN_PART if any(parts) or gptq_at_4 else WRONG
    count = len(ratios)
    measured = (
        f"At most {LIMIT:g} times the dense perplexity: rounding at 8 bits on {'all' if rounding_at_8 else 'not all'} "
        f"of {count} models, at 4 bits on {len(rounding_at_4)}; GPTQ at 4 bits on {len(gptq_at_4)}, "
        f"at 3 bits on {len(gptq_at_3)}. One scale a row"
    )
    return Finding(verdict, measured, tuple(quantization.ratio_table(ratios, (*RTN, *GPTQ, *GROUPED))))


def works(r: dict[str, float]) -> bool:
    """True if the ratio is at most LIMIT."""
    return r["ratio"] <= LIMIT


CLAIM = Claim(
    id="C20",
    claim="Round-to-nearest works well only down to 8 bits; GPTQ works at 4 and 3 bits",
    source="003",
    refuted_by=(
        f"'works' means at most {LIMIT:g} times the dense perplexity. The first part is refuted by a model on which "
        "rounding to 4 bits works, the second by a model on which GPTQ does not work at 4 or at 3 bits."
    ),
    setup=(
        "the protocol of results/quantization.md on three shipped GPTs and SmolLM2-135M where it is present; one scale "
        f"a row, as in the paper, and groups of {quantization.GROUP} beside it; 95 % bootstrap intervals"
    ),
    measure=measure,
    judge=judge,
)

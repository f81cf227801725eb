"""C21: the perplexity points that GPTQ loses, by the size of the model."""

from __future__ import annotations

import quantization

from .claim import HOLDS, IN_PART, NOT_AT_THIS_SIZE, Claim, Finding, Numbers
from .subjects import BASES

RULES = ("gptq-4-row", "gptq-3-row", "gptq-4", "gptq-3")
POINTS = 2.0


def measure() -> Numbers:
    """{"dense": {model: perplexity}, "perplexities": {model: {rule: perplexity}}, "ratios": ...}"""
    rows = quantization.rows_of(quantization.MODELS, RULES, again=True)
    return {
        "dense": {name: found["dense"]["perplexity"] for name, found in rows.items()},
        "perplexities": {name: perplexities(found) for name, found in rows.items()},
        "ratios": {name: quantization.ratios(found) for name, found in rows.items()},
    }


def perplexities(rows: dict[str, Numbers]) -> dict[str, float]:
    """{rule: perplexity} of one model."""
    return {key: rows[key]["perplexity"] for key in RULES}


def judge(numbers: Numbers) -> Finding:
    """Two parts: at most POINTS points at the largest model; a loss that falls with the size of the shipped GPTs."""
    dense = numbers["dense"]
    largest = list(dense)[-1]
    points = {key: numbers["perplexities"][largest][key] - dense[largest] for key in RULES}
    falls = {key: falls_with_size(numbers["ratios"], key) for key in RULES}
    is_near = {key: points[key] <= POINTS for key in RULES}
    held = [is_near[key] and falls[key] for key in RULES]
    verdict = HOLDS if all(held) else IN_PART if any(held) else NOT_AT_THIS_SIZE
    said = ", ".join(f"{key} +{points[key]:.2f}" for key in RULES)
    named = ", ".join(key for key in RULES if falls[key]) or "none"
    measured = (
        f"Points lost by {largest} (dense {dense[largest]:.2f}): {said}. From the smallest to the largest shipped GPT "
        f"the ratio to dense falls at every step with: {named}"
    )
    return Finding(verdict, measured, tuple(quantization.ratio_table(numbers["ratios"], RULES)))


def falls_with_size(ratios: dict[str, Numbers], key: str) -> bool:
    """True if the ratio of a rule falls from each shipped GPT to the next larger one."""
    values = [ratios[name][key]["ratio"] for name in BASES]
    return all(later < earlier for earlier, later in zip(values, values[1:]))


CLAIM = Claim(
    id="C21",
    claim="GPTQ is within 1-2 perplexity points of 16 bits on the largest model; smaller models suffer more",
    source="003",
    refuted_by=(
        f"at the largest model, a loss of more than {POINTS:g} points; among the three shipped GPTs, which share data, "
        "text and tokenizer, a ratio to the dense perplexity that does not fall with their size."
    ),
    setup=(
        "the protocol of results/quantization.md; GPTQ at 4 and 3 bits, one scale a row and groups of "
        f"{quantization.GROUP}. The largest model is SmolLM2-135M where it is present; its text and tokenizer differ "
        "from the GPTs', so its ratio is not part of the trend"
    ),
    measure=measure,
    judge=judge,
)

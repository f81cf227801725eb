"""C24: what is left of a model at 8, 4, 2 and 1 bits."""

from __future__ import annotations

import quantization

from .claim import HOLDS, IN_PART, WRONG, Claim, Finding, Numbers

BY_BITS = {8: ("rtn-8",), 4: ("rtn-4", "gptq-4", "nf4"), 2: ("rtn-2", "ternary", "gptq-2"), 1: ("sign", "gptq-1-sign")}
RULES = tuple(key for keys in BY_BITS.values() for key in keys)


def measure() -> Numbers:
    """{"ratios": {model: {rule: {ratio, low, high}}}, "unigram": {model: ratio of a unigram model}}"""
    rows = quantization.rows_of(quantization.MODELS, RULES, again=True)
    ratios = {name: quantization.ratios(found) for name, found in rows.items()}
    unigram = {name: quantization.unigram(name) / found["dense"]["perplexity"] for name, found in rows.items()}
    return {"ratios": ratios, "unigram": unigram}


def judge(numbers: Numbers) -> Finding:
    """A width is possible on a model if some rule stays below a model that knows only the frequencies of tokens."""
    ratios = numbers["ratios"]
    possible = {}
    for bits, keys in BY_BITS.items():
        possible[bits] = [name for name in ratios if best(ratios[name], keys) < numbers["unigram"][name]]
    counts = [len(names) for names in possible.values()]
    verdict = HOLDS if min(counts) == len(ratios) else IN_PART if max(counts) else WRONG
    said = ", ".join(f"{bits} bits {len(names)} of {len(ratios)}" for bits, names in possible.items())
    measured = f"Models with a rule that stays better than a unigram model, without training: {said}"
    table = quantization.ratio_table(ratios, RULES)
    unigram = ", ".join(f"{name} {value:.2f}" for name, value in numbers["unigram"].items())
    return Finding(verdict, measured, (*table, "", f"A unigram model, times dense: {unigram}."))


def best(ratios: Numbers, keys: tuple[str, ...]) -> float:
    """The least ratio of these rules on one model."""
    return min(ratios[key]["ratio"] for key in keys)


CLAIM = Claim(
    id="C24",
    claim="Parameters may be represented with 8, 4, 2 and even 1 bit",
    source="000",
    refuted_by=(
        "a model that no rule of this width, without training after it, keeps below the perplexity of a unigram model: "
        "a model of that width has lost everything but the frequencies of tokens."
    ),
    setup=(
        "the protocol of results/quantization.md; all linear maps of the blocks; embeddings and norms stay float32; "
        f"groups of {quantization.GROUP}; three shipped GPTs and SmolLM2-135M where it is present"
    ),
    measure=measure,
    judge=judge,
)

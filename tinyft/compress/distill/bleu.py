"""The BLEU of one sentence, smoothed.  Papineni et al. 2002;  Chen and Cherry 2014, method 3 ("NIST").

    BLEU = BP exp(mean_n log p_n),      BP = min(1, exp(1 − |reference| / |hypothesis|))

p_n is the share of the hypothesis' n-grams that the reference has too, for n = 1 ... 4. An n-gram counts at most as
often as it stands in the reference. Three rules make it usable for one short sentence:

    smoothing         the j-th order without a common n-gram gets p_n = 1 / (2^j h_n), h_n the number of n-grams
    effective order   orders that are longer than the hypothesis do not count
    zero              without a common token BLEU is 0, whatever the smoothing would give

It is `sentence_bleu(smooth_method="exp", use_effective_order=True, tokenize="none")` of sacrebleu, divided by 100.
"""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from ... import checks
from ...keywords import checked_keywords

ORDERS = 4


@checked_keywords
def sentence_bleu(hypothesis: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """BLEU = BP exp(mean_n log p_n) of two sequences of tokens: from 0 to 1, and 1 if they are equal.

    hypothesis   the text to be judged: ids or words, without special tokens such as the end
    reference    the text that it is compared with
    p_n          matches / h_n, for n = 1 ... 4. h_n is the number of the hypothesis' n-grams. matches counts those that
                 the reference has, too; an n-gram counts at most as often as it stands in the reference
                 For the j-th n with matches = 0:  p_n = 1 / (2^j h_n)
    mean_n       over the n with h_n > 0 only
    BP           min(1, exp(1 − |reference| / |hypothesis|))

    The result is 0 if the two have no common token, and if one of them is empty. TypeError for a string: split it into
    words."""
    hypothesis = read_tokens("hypothesis", hypothesis)
    reference = read_tokens("reference", reference)
    logs = []                                            # log p_n of each order
    orders_without_match = 0                             # j
    for n in range(1, ORDERS + 1):
        ours = ngrams(hypothesis, n)
        total = ours.total()                             # h_n
        if total == 0:                                   # n is longer than the hypothesis
            break
        common = ours & ngrams(reference, n)             # the smaller count of each n-gram
        matches = common.total()
        if n == 1 and matches == 0:
            return 0.0
        if matches == 0:
            orders_without_match += 1
            p = 1 / (2**orders_without_match * total)
        else:
            p = matches / total
        logs.append(math.log(p))
    if not logs:
        return 0.0
    brevity = min(1.0, math.exp(1 - len(reference) / len(hypothesis)))           # BP
    return brevity * math.exp(sum(logs) / len(logs))


def ngrams(tokens: Sequence[Hashable], n: int) -> Counter:
    """The number of times that each n-gram, a tuple of n tokens, stands in a sequence."""
    return Counter(tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1))


def read_tokens(name: str, tokens: Any) -> list:
    """A sequence of ids or words as a list. TypeError for a text, and for anything else."""
    wanted = f"sentence_bleu: {name} wants a list of token ids or of words"
    if isinstance(tokens, np.ndarray) and tokens.ndim == 1:
        tokens = tokens.tolist()
    if not isinstance(tokens, (list, tuple)):
        raise TypeError(f"{wanted}, got {checks.brief(tokens)}")
    for token in tokens:
        if not isinstance(token, (str, int, np.integer)):
            raise TypeError(f"{wanted}, got {checks.brief(token)} among them")
    return list(tokens)

"""sacrebleu beside sentence_bleu: the same number for sentences of few words, of which many n-grams repeat."""
from __future__ import annotations

import numpy as np
import pytest

from tinyft import sentence_bleu

sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is not installed: pip install 'tinyft[peers]'")


def theirs(hypothesis: list[str], reference: list[str]) -> float:
    score = sacrebleu.sentence_bleu(" ".join(hypothesis), [" ".join(reference)], smooth_method="exp",
                                    use_effective_order=True, tokenize="none")
    return score.score / 100


def test_the_same_as_sacrebleu():
    rng = np.random.default_rng(0)
    values = []
    for _ in range(2000):
        words = [f"w{i}" for i in range(rng.integers(1, 8))]
        hypothesis = rng.choice(words, rng.integers(1, 14)).tolist()
        reference = rng.choice([*words, "other"], rng.integers(1, 14)).tolist()
        values.append(sentence_bleu(hypothesis, reference))
        assert values[-1] == pytest.approx(theirs(hypothesis, reference), rel=1e-12, abs=1e-15)
    assert min(values) == 0 and max(values) > 0.9 and len(set(values)) > 500

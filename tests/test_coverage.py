"""The coverage penalty of beam search beside enumeration of all texts, and beside wrong penalties.

The attention of a step comes from the queries and keys that reach `ops.attention`, one text at a time."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import host, wrong_answers
from test_beam import Table, every_text, plain, same
from wrong import replaced

import tinyft as ft
from tinyft import GNMTPenalty, Seq2Seq, Seq2SeqConfig, T5Config, beam_search
from tinyft.beam import last_cross_attention, source_attention
from tinyft.tensor import Tensor

V = 3
END = 2
KINDS = ("seq2seq", "t5", "prefix", "prompt")
SOURCES = ([1, 0, 2, 1], [2], [0, 1], [1, 1, 2])
WIDTH = 6                                                # of the padded sources
PENALTIES = [GNMTPenalty(alpha) for alpha in (-1.0, 0.0, 0.6)]


def make(kind: str, seed: int) -> Any:
    """A model in float64 with sharp attention, two decoder blocks and two heads."""
    if kind == "t5":
        model = ft.T5(T5Config(V, width=8, layers=2, heads=2, head_width=4, hidden=8, buckets=8, max_distance=6), seed)
    else:
        model = Seq2Seq(Seq2SeqConfig(V, 16, 8, 2, 2, 8), seed)
    if kind in ("prefix", "prompt"):
        ft.attach(model, ft.PrefixTuning(p=2) if kind == "prefix" else ft.PromptTuning(p=2))
    rng = np.random.default_rng(seed)
    for p in model.parameters():
        p.copy_(host(p) + rng.standard_normal(p.shape) * 0.5)
    return model.to(dtype=np.float64).eval()


def padded(sources: tuple[list[int], ...]) -> dict[str, np.ndarray]:
    """source_ids and source_mask (B, 6), with the padding on the right."""
    ids = np.zeros((len(sources), WIDTH), int)
    mask = np.zeros((len(sources), WIDTH), bool)
    for b, row in enumerate(sources):
        ids[b, :len(row)] = row
        mask[b, :len(row)] = True
    return {"source_ids": ids, "source_mask": mask}


class Covered(Table):
    """The texts of an encoder-decoder for one padded source, in the place of a table.

    wrong: a fault of the penalty to commit."""

    def __init__(self, kind: str, seed: int, beta: float, wrong: str = ""):
        super().__init__(V, seed)
        self.model = make(kind, seed)
        self.facts = padded((SOURCES[seed % 4],))
        self.beta = beta
        self.wrong = wrong
        self._attention: dict[tuple[int, ...], np.ndarray] = {}

    def logits(self, prefix: tuple[int, ...]) -> np.ndarray:
        """Those of the next token; the attention of this step is kept."""
        calls = []
        right = ft.ops.attention

        def recorded(q: Tensor, k: Tensor, *others: Tensor, **settings: Any) -> Tensor:
            calls.append((host(q), host(k), settings))
            return right(q, k, *others, **settings)
        source = self.model.encode(self.facts["source_ids"], self.facts["source_mask"])
        with replaced(ft.ops, "attention", recorded):
            z = host(self.model([list(prefix)], source=source))[0, -1]
        q, k, settings = calls[1 if self.wrong == "the first block" else -1]     # of self, cross, self and cross
        scale = settings["scale"] or q.shape[-1]**-0.5
        e = np.exp(np.einsum("hd,hkd->hk", q[0, :, -1], k[0]) * scale)
        if self.wrong != "padding gets attention":
            e = e * host(settings["key_mask"])[0, 0]
        p = e / e.sum(axis=1, keepdims=True)                                     # (H, Tk)
        p = p.sum(axis=0) if self.wrong == "the sum of the heads" else p.mean(axis=0)
        if self.wrong == "one head alone":
            p = (e / e.sum(axis=1, keepdims=True))[0]
        if self.wrong != "learned keys count":
            p = p[-WIDTH:]
            p = p if self.wrong == "padding counts" else p[self.facts["source_mask"][0]]
        self._attention[prefix] = p
        return z

    def cp(self, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> float:
        steps = [(*prompt, *tokens[:j]) for j in range(len(tokens))]
        if self.wrong == "without the last step":
            steps = steps[:-1]
        total = sum((self._attention[step] for step in steps), start=np.zeros(1))
        with np.errstate(divide="ignore"):
            if self.wrong == "the log of the least":
                return self.beta * math.log(min(total.min(), 1))
            total = total if self.wrong == "no minimum" else np.minimum(total, 1)
            return (-1 if self.wrong == "the sign of beta" else 1) * self.beta * float(np.log(total).sum())


def ours(covered: Covered, prompt: tuple[int, ...], n: int, **options: Any) -> list:
    """The library's search."""
    found = beam_search(covered.model, [list(prompt)], n, coverage=covered.beta, **covered.facts, **options)
    return found[0]


# ── exactness ────────────────────────────────────────────────────────────────────────────────────────────────────────
Search = Callable[..., list]


def check_exact(search: Search, kinds: tuple[str, ...] = KINDS) -> None:
    """With B ≥ V^n the best text of all is found, and the best ten in their order."""
    for i, kind in enumerate(kinds):
        for seed in (4 * i, 4 * i + 1):
            covered = Covered(kind, seed, beta=(0.2, 1.5)[seed % 2])
            lp = PENALTIES[seed % 3]
            every = every_text(covered, (0,), 3, END, lp)
            for n_best in (1, 10):
                same(search(covered, (0,), 3, beams=V**3, end=END, lp=lp, n_best=n_best), every[:n_best])


def check_rules(search: Search) -> None:
    """Narrow beams follow the rules step by step, and stop only when nothing better can come."""
    for seed in range(8):
        covered = Covered("seq2seq", seed, beta=(0.2, 2.0)[seed % 2])
        for n_best in (1, 2):
            options = {"beams": 1 + seed % 3, "end": END, "lp": PENALTIES[seed % 3], "n_best": n_best}
            same(search(covered, (0,), 4, **options), plain(covered, (0,), 4, **options))


CHECKS = {"exact": check_exact, "rules": check_rules}


@pytest.mark.parametrize("name", CHECKS)
def test_a_covered_search_keeps_its_properties(name):
    CHECKS[name](ours)


def wrong_search(name: str) -> Search:
    """A search in plain Python that commits the fault, of the penalty or of the search."""
    def search(covered: Covered, prompt: tuple, n: int, **options: Any) -> list:
        faulty = Covered.__new__(Covered)
        vars(faulty).update(vars(covered), wrong=name, _known={}, _attention={})
        return plain(faulty, prompt, n, **options, wrong=name)
    return search


@wrong_answers
@pytest.mark.parametrize("name", [
    "the sum of the heads", "one head alone", "the first block", "no minimum", "padding counts",
    "padding gets attention", "the sign of beta", "without the last step", "the log of the least",
])
def test_a_wrong_penalty_is_caught(name):
    check_exact(wrong_search(""), ("seq2seq",))
    with pytest.raises(AssertionError):
        check_exact(wrong_search(name), ("seq2seq",))


@wrong_answers
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_a_penalty_of_learned_keys_is_caught(kind):
    with pytest.raises(AssertionError):
        check_exact(wrong_search("learned keys count"), (kind,))


@wrong_answers
def test_a_stop_that_trusts_the_coverage_so_far_is_caught():
    """The coverage of a live text still grows: only cp ≤ 0 bounds it."""
    with pytest.raises(AssertionError):
        check_rules(wrong_search("the coverage so far is a bound"))


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind, seed", [("seq2seq", 4), ("t5", 9), ("prefix", 9), ("prompt", 9)])
def test_a_batch_gets_what_its_rows_get_alone_with_and_without_a_cache(kind, seed):
    """Sources of different lengths, whose rows end at different times. The penalty chooses other texts."""
    model = make(kind, seed)
    options = {"beams": 3, "end": END, "n_best": 3}
    plain_best = [found[0].tokens for found in beam_search(model, None, 5, **options, **padded(SOURCES))]
    options["coverage"] = 0.7
    together = beam_search(model, None, 5, **options, **padded(SOURCES))
    uncached = beam_search(model, None, 5, **options, **padded(SOURCES), cache=False)
    for i, source in enumerate(SOURCES):
        (alone,) = beam_search(model, None, 5, **options, source_ids=[source])
        for found in (together[i], uncached[i]):
            assert [h.tokens for h in found] == [h.tokens for h in alone]
            np.testing.assert_allclose([h.score for h in found], [h.score for h in alone], rtol=0, atol=1e-10)
    best = [found[0].tokens for found in together]
    assert len(set(best)) > 1 and len({len(tokens) for tokens in best}) > 1 and best != plain_best


def test_the_attention_of_a_model_in_16_bits_does_not_round_to_zero():
    """float16 has no number between 0 and 2⁻²⁴, and the log of 0 is −∞."""
    model = make("seq2seq", 4)
    cross = model.decoder[-1].cross_attn
    cross.q.weight.copy_(host(cross.q.weight) * 300)
    model.to(dtype="float16")
    ctx = ft.Context(**padded(SOURCES[:1]), output_attention_scores=True)
    model([[0]], ctx)
    (attention,) = source_attention(ctx, cross)
    assert 0 < attention.min() < 2**-24 and attention.sum() == pytest.approx(1, rel=1e-12)


def test_the_last_of_three_blocks_gives_the_attention():
    model = ft.Seq2Seq(ft.Seq2SeqConfig(V, 8, 12, 3, 3))
    assert last_cross_attention(model) is model.decoder[2].cross_attn


@pytest.mark.parametrize("coverage, message", [
    (-0.1, "coverage wants a finite number >= 0, got -0.1"), (math.inf, "coverage wants a finite number >= 0, got inf"),
    ("0.2", "coverage wants a finite number >= 0, got '0.2'"),
])
def test_a_bad_weight_of_the_penalty_gets_one_sentence(coverage, message):
    with pytest.raises((ValueError, TypeError), match=message):
        beam_search(make("seq2seq", 0), None, 3, coverage=coverage, source_ids=[[1]])


def test_a_model_without_a_source_has_no_coverage():
    model = ft.GPT(ft.GPTConfig(5, 8, 8, 1, 2))
    with pytest.raises(ValueError, match="coverage wants an encoder-decoder, which attends to a source, got a GPT"):
        beam_search(model, [[1]], 3, coverage=0.2)
    assert beam_search(model, [[1]], 3, coverage=0) == beam_search(model, [[1]], 3)

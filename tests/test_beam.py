"""Beam search beside enumeration of all texts, beside a search written out in plain Python, and beside wrong ones."""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from contract import build, noise
from helpers import host, wrong_answers
from wrong import replaced

import tinyft as ft
from tinyft import GNMTPenalty, PowerPenalty, PrefixTuning, PromptTuning, Seq2Seq, Seq2SeqConfig, beam_search, no_grad
from tinyft.beam import Hypothesis, longest_reach, top_tokens
from tinyft.nn import Context, Module
from tinyft.tensor import Tensor

ALPHAS = (-1.0, -0.5, 0.0, 0.6, 1.0)
PENALTIES = [*map(GNMTPenalty, ALPHAS), *map(PowerPenalty, ALPHAS)]
Search = Callable[..., list[Hypothesis]]


class Table(Module):
    """A language model whose distributions are drawn for every prefix by itself: nothing is more irregular.

    Logits of `scale` times a normal number; with ties, they are rounded to whole numbers."""

    def __init__(self, V: int, seed: int, scale: float = 2.0, *, ties: bool = False):
        self.V = V
        self.seed = seed
        self.scale = scale
        self.ties = ties
        self._known: dict[tuple[int, ...], np.ndarray] = {}

    def logits(self, prefix: tuple[int, ...]) -> np.ndarray:
        z = np.random.default_rng([self.seed, *prefix]).standard_normal(self.V) * self.scale
        return z.round() if self.ties else z

    def forward(self, ids: Any, ctx: Context) -> Tensor:
        return Tensor(np.array([self.logits(tuple(row)) for row in np.asarray(ids).tolist()]))

    def log_probs(self, prefix: tuple[int, ...]) -> np.ndarray:
        if prefix not in self._known:
            z = self.logits(prefix)
            self._known[prefix] = z - np.log(np.exp(z - z.max()).sum()) - z.max()
        return self._known[prefix]

    def cp(self, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> float:
        """The coverage penalty of a continuation: a table has no source."""
        return 0.0


def ours(model: Table, prompt: tuple[int, ...], n: int, **options: Any) -> list[Hypothesis]:
    """The library's search for one prompt. A table has no cache."""
    return beam_search(model, [list(prompt)], n, cache=False, **options)[0]


# ── oracles ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def every_text(model: Table, prompt: tuple[int, ...], n: int, end: int | None, lp: Callable) -> list[Hypothesis]:
    """All texts that end or have n tokens, best first, by enumeration."""
    found = []
    for length in range(1, n + 1):
        for tokens in itertools.product(range(model.V), repeat=length):
            ended = tokens[-1] == end
            if end in tokens[:-1] or not (ended or length == n):
                continue
            log_p = sum(model.log_probs((*prompt, *tokens[:i]))[token] for i, token in enumerate(tokens))
            found.append(Hypothesis(tokens, log_p / lp(length) + model.cp(prompt, tokens), log_p, ended))
    return sorted(found, key=lambda h: -h.score)


def plain(model: Table, prompt: tuple[int, ...], n: int, *, beams: int, end: int | None, lp: Callable, n_best: int = 1,
          wrong: str = "") -> list[Hypothesis]:
    """The rules of the search in plain Python, sentence by sentence; `wrong` names a fault to commit."""
    live = [((), 0.0)] * (beams if wrong == "B equal prefixes" else 1)
    finished: list[Hypothesis] = []

    def add(tokens: tuple, log_p: float, step: int) -> None:
        length = len(tokens)
        if wrong == "the end is not counted" and tokens[-1] == end:
            length = max(length - 1, 1)
        if wrong == "the penalty of the last step":
            length = n
        score = log_p / lp(length) + model.cp(prompt, tokens)
        finished.append(Hypothesis(tokens, score, log_p, tokens[-1] == end))
    for step in range(1, n + 1):
        candidates = []
        for tokens, log_p in live:
            for token, gain in enumerate(model.log_probs((*prompt, *tokens))):
                candidates.append(((*tokens, token), log_p + gain))
        if wrong == "by score":
            candidates.sort(key=lambda c: -c[1] / lp(len(c[0]) - (c[0][-1] == end)))
        elif wrong == "ties by the higher token":
            candidates = candidates[::-1]
        candidates.sort(key=lambda c: -c[1])
        live = []
        for rank, (tokens, log_p) in enumerate(candidates):
            if tokens[-1] == end:
                if rank < beams or wrong == "every end counts":
                    add(tokens, log_p, step)
            elif len(live) < beams:
                live.append((tokens, log_p))
        if step == n or wrong == "never stops":
            continue
        scores = sorted((h.score for h in finished), reverse=True)
        if wrong == "stops at B":
            if len(finished) >= beams:
                live = []
        elif live and len(scores) >= n_best:
            reach = max(lp(m) for m in range(step + 1, n + 1))
            if wrong == "the next length is reached":
                reach = lp(step + 1)
            if wrong == "the last length is reached":
                reach = lp(n)
            bound = live[0][1] / reach
            if wrong == "the coverage so far is a bound":
                bound += model.cp(prompt, live[0][0])
            if scores[n_best - 1] >= bound:
                live = []
        if not live:
            break
    if wrong != "what is cut off is lost":
        for tokens, log_p in live:
            add(tokens, log_p, n)
    return sorted(finished, key=lambda h: -h.score)[:n_best]


def wrong_search(name: str) -> Search:
    def search(model: Table, prompt: tuple, n: int, **options: Any) -> list[Hypothesis]:
        return plain(model, prompt, n, **{"beams": 4, "lp": GNMTPenalty(), **options}, wrong=name)
    return search


def same(one: list[Hypothesis], other: list[Hypothesis]) -> None:
    """The same texts with the same scores; texts of equal scores may change places."""
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert abs(a.score - b.score) <= 1e-12 * max(abs(b.score), 1)
    assert {h.tokens for h in one} == {h.tokens for h in other}
    assert {h.tokens: (h.ended, round(h.log_prob, 9)) for h in one} == {
        h.tokens: (h.ended, round(h.log_prob, 9)) for h in other}


# ── exactness ────────────────────────────────────────────────────────────────────────────────────────────────────────
def check_exact(search: Search) -> None:
    """With B ≥ V^n the best text of all is found, and the best ten in their order, for every penalty."""
    for seed in range(30):
        V, n = [(2, 4), (3, 3), (4, 2), (5, 2), (3, 1), (2, 5)][seed % 6]
        model = Table(V, seed)
        lp = PENALTIES[seed % len(PENALTIES)]
        every = every_text(model, (0,), n, 0, lp)
        for n_best in (1, 10):
            got = search(model, (0,), n, beams=V**n, end=0, lp=lp, n_best=n_best)
            same(got, every[:n_best])


def check_rules(search: Search) -> None:
    """Narrow beams follow the rules step by step."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        V, n, beams = int(rng.integers(2, 7)), int(rng.integers(1, 7)), int(rng.integers(1, 5))
        model = Table(V, seed, scale=float(rng.choice([0.5, 2.0])))
        lp = PENALTIES[seed % len(PENALTIES)]
        for n_best in (1, 3):
            want = plain(model, (1, 2), n, beams=beams, end=1, lp=lp, n_best=n_best)
            same(search(model, (1, 2), n, beams=beams, end=1, lp=lp, n_best=n_best), want)


def check_stop(search: Search) -> None:
    """The early stop loses nothing: the best text is that of a search that goes on to the last length."""
    for seed in range(120):
        rng = np.random.default_rng(seed)
        V, beams = int(rng.integers(2, 5)), int(rng.integers(1, 4))
        model = Table(V, seed, scale=float(rng.choice([1.0, 3.0])))
        lp = (GNMTPenalty(1.0), PowerPenalty(1.0), PowerPenalty(-1.0), GNMTPenalty(-3.0))[seed % 4]
        want = plain(model, (1,), 6, beams=beams, end=0, lp=lp, wrong="never stops")
        same(search(model, (1,), 6, beams=beams, end=0, lp=lp), want)


def check_ties(search: Search) -> None:
    """Of equal candidates the lower parent comes first, then the lower token."""
    for seed in range(30):
        model = Table(6, seed, scale=0.7, ties=True)
        want = plain(model, (1,), 4, beams=3, end=5, lp=GNMTPenalty(), n_best=3)
        got = search(model, (1,), 4, beams=3, end=5, lp=GNMTPenalty(), n_best=3)
        assert [h.tokens for h in got] == [h.tokens for h in want]


def check_greedy(search: Search) -> None:
    """One beam without a penalty is greedy decoding, token for token."""
    for seed in range(60):
        model = Table(5, seed, scale=1.0)
        got = search(model, (3,), 6, beams=1, end=0, lp=GNMTPenalty(0.0))[0]
        text = ft.generate(model, [[3]], 6, end=0, cache=False)[0, 1:].tolist()
        text = text[:text.index(0) + 1] if 0 in text else text
        assert list(got.tokens) == text


def check_scores(search: Search) -> None:
    """A score is that of the tokens under the model; the list does not increase; a text that ended has one end."""
    for seed in range(20):
        model = Table(5, seed)
        lp = PENALTIES[seed % len(PENALTIES)]
        found = search(model, (2,), 5, beams=4, end=0, lp=lp, n_best=6)
        assert found and [h.score for h in found] == sorted((h.score for h in found), reverse=True)
        assert len({h.tokens for h in found}) == len(found)
        for h in found:
            log_p = sum(model.log_probs((2, *h.tokens[:i]))[token] for i, token in enumerate(h.tokens))
            assert abs(h.log_prob - log_p) < 1e-12 and abs(h.score - log_p / lp(len(h.tokens))) < 1e-12
            assert h.tokens.count(0) == h.ended == (h.tokens[-1] == 0)
            assert h.ended or len(h.tokens) == 5


CHECKS = {"exact": check_exact, "rules": check_rules, "stop": check_stop, "ties": check_ties, "greedy": check_greedy,
          "scores": check_scores}


@pytest.mark.parametrize("name", CHECKS)
def test_beam_search_keeps_its_properties(name):
    CHECKS[name](ours)


@pytest.mark.parametrize("name", CHECKS)
def test_the_plain_search_keeps_them_too(name):
    CHECKS[name](wrong_search(""))


# ── wrong answers ────────────────────────────────────────────────────────────────────────────────────────────────────
WRONG = {
    "stops at B": ("rules", "stop"),
    "the end is not counted": ("exact", "rules", "scores"),
    "the penalty of the last step": ("exact", "rules", "scores"),
    "B equal prefixes": ("rules", "scores"),
    "every end counts": ("rules",),
    "what is cut off is lost": ("exact", "rules", "greedy"),
    "the next length is reached": ("stop",),
    "the last length is reached": ("stop",),
    "ties by the higher token": ("ties",),
}


@wrong_answers
@pytest.mark.parametrize("name, check", [(name, check) for name, checks in WRONG.items() for check in checks])
def test_a_wrong_search_is_caught(name, check):
    with pytest.raises((AssertionError, IndexError)):
        CHECKS[check](wrong_search(name))


def test_a_larger_beam_can_end_worse():
    """The specification's counterexample: not a property."""
    class Tree(Table):
        def logits(self, prefix: tuple[int, ...]) -> np.ndarray:
            p = np.full(11, 1e-30)
            path = prefix[1:]
            if path == ():
                p[1:3] = 0.6, 0.4
            elif path[0] == 1 and len(path) == 1:
                p[1:11] = 0.1
            elif path[0] == 1:
                p[1] = 1.0
            elif len(path) == 1:
                p[1:3] = 0.5
            else:
                p[1:11] = 0.1
            return np.log(p)
    model = Tree(11, 0)
    ends = [math.exp(ours(model, (0,), 4, beams=beams, lp=GNMTPenalty(0.0))[0].log_prob) for beams in (1, 2, 3)]
    np.testing.assert_allclose(ends, [0.06, 0.002, 0.06], rtol=1e-9)


# ── models with a cache ──────────────────────────────────────────────────────────────────────────────────────────────
V = 23
ON_GPT = {"none": None, "prefix": PrefixTuning(p=3), "prompt": PromptTuning(p=3)}


def model_of(kind: str) -> Any:
    """A model in float64."""
    if kind == "seq2seq":
        model = Seq2Seq(Seq2SeqConfig(V, 24, 12, 2, 3, 20, start=1))
        rng = np.random.default_rng(4)
        for p in model.parameters():
            p.copy_(host(p) + rng.standard_normal(p.shape) * 0.3)
    elif kind == "llama":
        model = build("llama")
    else:
        model = build("gpt")
        if ON_GPT[kind] is not None:
            ft.attach(model, ON_GPT[kind])
            noise(model, 0.5)
    return model.to(dtype=np.float64).eval()


KINDS = ("seq2seq", "llama", *ON_GPT)
LENGTHS = (5, 2, 4, 1)


def request(kind: str, rows: list[int]) -> tuple[Any, dict]:
    """ids and facts of some of four rows of different lengths."""
    rng = np.random.default_rng(3)
    texts = [rng.integers(1, V, n).tolist() for n in LENGTHS]
    chosen = [texts[i] for i in rows]
    ids, mask = ft.decode.pad_left(chosen)
    if kind != "seq2seq":
        return ids, {"mask": mask}
    return None, {"source_ids": ids[:, ::-1].copy(), "source_mask": mask[:, ::-1].copy()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gets_what_its_rows_get_alone_with_and_without_a_cache(kind):
    model = model_of(kind)
    options = {"beams": 3, "end": 0, "n_best": 3}
    ids, facts = request(kind, [0, 1, 2, 3])
    together = beam_search(model, ids, 6, **options, **facts)
    uncached = beam_search(model, ids, 6, **options, **facts, cache=False)
    for i in range(4):
        ids, facts = request(kind, [i])
        (alone,) = beam_search(model, ids, 6, **options, **facts)
        for found in (together[i], uncached[i]):
            assert [h.tokens for h in found] == [h.tokens for h in alone]
            np.testing.assert_allclose([h.score for h in found], [h.score for h in alone], rtol=0, atol=1e-10)
    assert len({tuple(found[0].tokens) for found in together}) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_is_that_of_teacher_forcing(kind):
    model = model_of(kind)
    for row in range(4):
        ids, facts = request(kind, [row])
        (found,) = beam_search(model, ids, 5, beams=3, end=0, n_best=3, **facts)
        for h in found:
            text = model.start_ids(1) if ids is None else ids
            given = np.concatenate([text, [h.tokens[:-1]]], axis=1).astype(int)
            with no_grad():
                logits = host(model(given, **{k: v for k, v in facts.items() if k != "mask"}))[0]
            z = logits[-len(h.tokens):]
            log_p = z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
            want = sum(log_p[t, token] for t, token in enumerate(h.tokens))
            assert abs(h.log_prob - want) < 1e-10
            assert abs(h.score - want / GNMTPenalty()(len(h.tokens))) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_one_beam_writes_the_greedy_text(kind):
    model = model_of(kind)
    ids, facts = request(kind, [0, 1, 2, 3])
    greedy = ft.generate(model, ids, 6, end=0, **facts)[:, -6:].tolist()
    found = beam_search(model, ids, 6, beams=1, end=0, lp=GNMTPenalty(0.0), **facts)
    for text, (h,) in zip(greedy, found, strict=True):
        assert list(h.tokens) == text[:len(h.tokens)] and set(text[len(h.tokens):]) <= {0}


def test_the_facts_of_a_row_follow_its_beams():
    """Rows end at different times, so rows of the batch go and others take their places."""
    model = model_of("seq2seq")
    ids, facts = request("seq2seq", [0, 1, 2, 3])
    seen = []
    forward = model.forward

    def watch(ids: Any, ctx: Context) -> Tensor:
        seen.append((len(ids), list(ctx.task), ctx.source.last_hidden_state.shape[0]))
        return forward(ids, ctx)
    model.forward = watch
    beam_search(model, ids, 6, beams=3, end=0, task=[0, 1, 2, 3], **facts)
    assert seen[0][1] == [0, 1, 2, 3]
    for rows, task, sources in seen:
        assert rows == len(task) == sources and task == sorted(task)


def test_the_mode_of_the_model_is_kept_and_a_source_that_was_encoded_serves():
    model = model_of("seq2seq").train()
    _, facts = request("seq2seq", [0, 2])
    want = beam_search(model, None, 4, end=0, **facts)
    assert model.training
    source = model.eval().encode(facts["source_ids"], facts["source_mask"])
    assert beam_search(model, None, 4, end=0, source=source) == want
    assert ft.generate(model, None, 4, source=source).shape == (2, 5)
    start = model.start_ids(2)
    assert beam_search(model, start, 4, end=0, source=source) == want


# ── parts ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_top_tokens_are_those_of_a_stable_sort():
    rng = np.random.default_rng(0)
    for _ in range(200):
        R, width, k = rng.integers(1, 5), int(rng.integers(1, 12)), int(rng.integers(1, 14))
        z = rng.integers(-3, 3, (R, width)).astype(rng.choice([np.float32, np.float64]))
        z[rng.random(z.shape) < 0.1] = -np.inf
        want = np.sort(np.argsort(-z, axis=1, kind="stable")[:, :k], axis=1)
        assert np.array_equal(top_tokens(z, k), want)


def test_the_reach_of_a_penalty_that_is_not_monotone():
    """Any positive function of the length is a penalty."""
    table = [0.0, 2.0, 5.0, 1.0, 3.0]
    assert longest_reach(lambda n: table[n], 4) == [5.0, 5.0, 3.0, 3.0]
    assert longest_reach(PowerPenalty(-1.0), 4) == [1.0, 1 / 2, 1 / 3, 1 / 4], "less than 1"
    for seed in range(5):
        model = Table(2, seed)
        every = every_text(model, (0,), 4, 0, lambda n: table[n])
        same(ours(model, (0,), 4, beams=16, end=0, lp=lambda n: table[n]), every[:1])


def test_the_two_penalties():
    assert GNMTPenalty(0.6)(1) == 1 and abs(GNMTPenalty(0.6)(7) - 2**0.6) < 1e-15
    assert PowerPenalty(1.0)(7) == 7 and PowerPenalty(0.0)(7) == 1 == GNMTPenalty(0.0)(7)


def test_tokens_of_probability_zero_are_never_written():
    class Half(Table):
        def logits(self, prefix: tuple[int, ...]) -> np.ndarray:
            z = super().logits(prefix)
            z[2:] = -np.inf
            return z
    found = ours(Half(6, 0), (1,), 3, beams=5, end=0, n_best=50)
    assert found and {token for h in found for token in h.tokens} <= {0, 1}
    with pytest.raises(ValueError, match="logits that are numbers, got NaN"):
        class Broken(Table):
            def logits(self, prefix: tuple[int, ...]) -> np.ndarray:
                return np.full(self.V, np.nan)
        ours(Broken(4, 0), (1,), 2)


class Narrow(Table):
    """A table whose logits are float16, and whose log-probabilities are computed in float32."""

    def forward(self, ids: Any, ctx: Context) -> Tensor:
        return Tensor(super().forward(ids, ctx).data.astype(np.float16))

    def log_probs(self, prefix: tuple[int, ...]) -> np.ndarray:
        z = self.logits(prefix).astype(np.float16).astype(np.float32)
        z = z - z.max()
        return (z - np.log(np.exp(z).sum())).astype(np.float64)


def test_logits_in_16_bits_and_large_ones_give_exact_sums():
    """log p of 16-bit logits is computed in float32 and added up in float64. No size of the logits overflows."""
    for model in (Narrow(6, 0), Table(6, 1, scale=2000.0)):
        want = plain(model, (1,), 5, beams=3, end=0, lp=GNMTPenalty(0.6), n_best=3)
        assert all(math.isfinite(h.score) for h in want)
        same(ours(model, (1,), 5, beams=3, end=0, n_best=3), want)


def passes_of(model: Module, *args: Any, **options: Any) -> list[tuple[int, int]]:
    """The shapes of the ids of each pass of a search."""
    shapes = []
    forward = type(model).forward

    def counted(self: Module, ids: Any, ctx: Context) -> Tensor:
        shapes.append(np.shape(ids))
        return forward(self, ids, ctx)
    with replaced(type(model), "forward", counted):
        beam_search(model, *args, **options)
    return shapes


def test_the_defaults_are_four_beams_and_a_cache():
    ids = np.array([[1, 2, 3]])
    shapes = passes_of(model_of("none"), ids, 3)
    assert shapes == [(1, 3), (4, 1), (4, 1)]
    assert passes_of(model_of("none"), ids, 3, cache=False, beams=2) == [(1, 3), (2, 4), (2, 5)]


def test_a_search_ends_as_soon_as_its_result_is_certain():
    """The end has nearly all of the probability: no pass follows the first."""
    class Certain(Table):
        def logits(self, prefix: tuple[int, ...]) -> np.ndarray:
            return np.array([20.0, 0.0, 0.0])
    assert len(passes_of(Certain(3, 0), [[1]], 5, beams=2, end=0, cache=False)) == 1


def test_one_live_prefix_of_a_padded_row():
    ids = np.array([[0, 0, 1, 2, 3]])
    (padded,) = beam_search(model_of("none"), ids, 4, beams=1, mask=ids > 0, cache=False)
    (alone,) = beam_search(model_of("none"), ids[:, 2:], 4, beams=1, cache=False)
    assert padded[0].tokens == alone[0].tokens


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("options, message", [
    ({"beams": 0}, "beams wants a whole number >= 1, got 0"),
    ({"max_new_tokens": 0}, "max_new_tokens wants a whole number >= 1, got 0"),
    ({"n_best": 0}, "n_best wants a whole number >= 1, got 0"),
    ({"end": V}, f"end wants a whole number from 0 to {V - 1}, got {V}"),
    ({"lp": 0.6}, "lp wants a function of a length"),
    ({"lp": GNMTPenalty}, "lp wants a function of a length"),
    ({"lp": lambda n: n - 1}, "length penalty of 1 tokens wants a finite number > 0, got 0"),
    ({"num_beams": 4}, "did you mean 'beams'"),
    ({"length_penalty": 1.0}, "did you mean 'lp'"),
    ({"eos_token_id": 4}, "did you mean 'end'"),
    ({"ids": None}, r"beam_search wants ids of shape \(B, T\), got None"),
    ({"source_ids": [[1]]}, "source_ids are for an encoder-decoder, got a GPT"),
    ({"mask": [[True, False]]}, "beam_search continues after the last column"),
    ({"cache": None}, "cache wants True or False"),
    ({"ids": np.ones((1, 24), int)}, "longer than the model's 24 positions"),
])
def test_bad_arguments_get_one_clear_sentence(options, message):
    call = {"model": model_of("none"), "ids": [[1, 2]], "max_new_tokens": 3, **options}
    with pytest.raises((ValueError, TypeError), match=message) as error:
        beam_search(**call)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("facts, message", [
    ({}, r"ids of shape \(B, T\), got None"),
    ({"source_ids": np.zeros((1, 0), int)}, "one token or more in each row"),
    ({"source_ids": [[1, 2]], "source_mask": [[0, 0]]}, "an empty one in row 0"),
    ({"source_ids": [[1, 2]], "source_mask": [[1]]}, "source_mask has shape"),
    ({"source_ids": [[1] * 25]}, "25 tokens is longer than the model's 24 positions"),
])
@pytest.mark.parametrize("function", [beam_search, ft.generate])
def test_a_bad_source_is_refused_in_one_sentence(function, facts, message):
    with pytest.raises((ValueError, TypeError), match=message):
        function(model_of("seq2seq"), None, 3, **facts)

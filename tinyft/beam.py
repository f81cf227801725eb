"""Beam search: the most probable continuations of a text, or targets of a source.

    beam_search(model, ids, 20, beams=4, end=0)                          a causal language model: ids are prompts
    beam_search(model, None, 20, beams=4, end=0, source_ids=source)      an encoder-decoder

    score(Y) = log P(Y | X) / lp(|Y|)        |Y| counts the new tokens, the end included

A length penalty lp is any function of a length with positive values:

    GNMTPenalty(0.6)     ((5 + n) / 6)^α      Wu et al. 2016, arXiv:1609.08144, eq. 14
    PowerPenalty(1.0)    n^α                  `length_penalty` of transformers

α > 0 favours long texts, α < 0 short ones, and α = 0 compares the probabilities themselves.

An encoder-decoder may leave a part of its source untranslated. The coverage penalty is added to a score and lowers it:

    cp(Y) = β Σᵢ log min(Σⱼ pᵢⱼ, 1)          pᵢⱼ: the attention of step j to token i of the source;  eq. 14 as well

The paper's model has one attention. Here pᵢⱼ is that of the last decoder block, the mean of its heads.

S sentences (rows of ids), B beams of a sentence, R live prefixes of all sentences, V vocabulary.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from . import array, checks
from .context import read_integers, read_mask
from .decode import check_model, check_request, first_ids, refuse_unknown, with_source
from .keywords import checked_keywords
from .models.attention import Attention
from .nn import Cache, Context, Module, evaluation_mode

__all__ = ["GNMTPenalty", "Hypothesis", "PowerPenalty", "beam_search"]


@checked_keywords
@dataclass(frozen=True)
class GNMTPenalty:
    """lp(n) = ((5 + n) / 6)^α      Wu et al. 2016, eq. 14.    lp(1) = 1; n counts the new tokens, the end included"""

    alpha: float = 0.6

    def __post_init__(self) -> None:
        checks.number("GNMTPenalty: alpha", self.alpha)

    def __call__(self, n: int) -> float:
        return ((5 + n) / 6)**self.alpha


@checked_keywords
@dataclass(frozen=True)
class PowerPenalty:
    """lp(n) = n^α.    With α = 1 a score is the mean log-probability of a token, the end included."""

    alpha: float = 1.0

    def __post_init__(self) -> None:
        checks.number("PowerPenalty: alpha", self.alpha)

    def __call__(self, n: int) -> float:
        return float(n)**self.alpha


@checked_keywords
class Hypothesis(NamedTuple):
    """One continuation.

    tokens    its new tokens, with `end` as the last one if it has ended
    score     log_prob / lp(number of tokens) + cp
    log_prob  log P(tokens | prompt, source)
    ended     False: it was cut off at max_new_tokens"""

    tokens: tuple[int, ...]
    score: float
    log_prob: float
    ended: bool


def beam_search(
    model: Module,
    ids: Any,
    max_new_tokens: int,
    *,
    beams: int = 4,
    end: int | None = None,
    lp: Callable[[int], float] = GNMTPenalty(),
    coverage: float = 0.0,
    n_best: int = 1,
    mask: Any = None,
    cache: bool = True,
    **facts: Any,
) -> list[list[Hypothesis]]:
    """The n_best continuations of each row of ids (S, T), best first: a list for each row.

    At each length, every live prefix with every next token is a candidate. Candidates are sorted by log P, equal ones
    by prefix and token. A candidate that ends is finished if it is among the first B. Of those that do not end, the
    first B live on. A row stops when none of its live prefixes can become one of its n_best. At max_new_tokens the
    live prefixes are continuations without an end. A row can have fewer than n_best. No row changes another's result.

    beams   B, the number of live prefixes of a row
    end     the token that ends a continuation; None: every one has max_new_tokens tokens
    lp      the length penalty, such as GNMTPenalty(0.6) or PowerPenalty(1.0)
    coverage   β ≥ 0, the weight of the coverage penalty; for an encoder-decoder
    mask, cache, facts   as in `generate`; rows of different lengths are padded on the left

    ValueError and TypeError as in `generate`, for a length penalty that is not positive, and for coverage without a
    source."""
    refuse_unknown(facts, beam_search)
    check_model(model, end, caller="beam_search")
    checks.whole("max_new_tokens", max_new_tokens, 1)
    checks.whole("beams", beams, 1)
    checks.whole("n_best", n_best, 1)
    checks.flag("cache", cache)
    checks.number("coverage", coverage, low=0)
    cross = last_cross_attention(model) if coverage else None
    reach = longest_reach(lp, max_new_tokens)
    ids = first_ids(model, ids, facts)
    ids = array.asnumpy(read_integers("ids", ids, "beam_search wants ids of shape (B, T)"))
    mask = None if mask is None else array.asnumpy(read_mask("mask", mask))
    check_request(ids, mask, temperature=0.0, top_k=None, top_p=None, rng=None, caller="beam_search")
    searches = [Search(beams, end, lp, n_best, coverage) for _ in ids]
    with evaluation_mode(model):
        steps = Steps(model, ids, mask, with_source(model, facts), cross, cached=cache)  # the encoder runs once
        for length in range(1, max_new_tokens + 1):
            candidates = best_candidates(steps.log_probs(), [s.live for s in searches], 2 * beams)
            parents: list[int] = []                      # a row of this step, for each live prefix of the next one
            for search, found in zip(searches, candidates, strict=True):
                parents += search.extend(found, steps.attention)
                if length < max_new_tokens and search.is_done(reach[length]):
                    parents = parents[:len(parents) - len(search.live)]      # without the rows of this sentence
                    search.live = []
            if not parents:
                break
            if length < max_new_tokens:
                tokens = [prefix.tokens for search in searches for prefix in search.live]
                steps.go_on(np.array(parents), tokens)
    return [search.best() for search in searches]


def longest_reach(lp: Callable[[int], float], max_len: int) -> list[float]:
    """reach[n]: the largest penalty lp of the lengths n + 1 ... max_len, for n = 0 ... max_len − 1.

    log P ≤ 0, and it can only fall. So a prefix of n tokens reaches at most the score log P / reach[n]."""
    checks.function("lp", lp, "a function of a length, such as GNMTPenalty(0.6)")
    reach = [0.0] * max_len
    largest = 0.0
    for n in range(max_len, 0, -1):
        try:
            penalty = lp(n)
        except TypeError as e:
            raise TypeError(f"lp wants a function of a length, such as GNMTPenalty(0.6), got {checks.brief(lp)}") from e
        except OverflowError:
            penalty = math.inf
        value = checks.number(f"the length penalty of {n} tokens", penalty, above=0)
        largest = max(largest, value)
        reach[n - 1] = largest
    return reach


def last_cross_attention(model: Module) -> Attention:
    """The attention of the last decoder block to the source. ValueError for a model without one."""
    found = [m for m in model.modules() if isinstance(m, Attention) and m.cross]
    if not found:
        raise ValueError(f"coverage wants an encoder-decoder, which attends to a source, got a {type(model).__name__}")
    return found[-1]


# ── one sentence ─────────────────────────────────────────────────────────────────────────────────────────────────────
class Prefix(NamedTuple):
    """A live prefix: its tokens, log P, and the attention that each token of the source got so far, (Ts,)."""

    tokens: tuple[int, ...]
    log_prob: float
    attention: np.ndarray | float = 0.0


class Candidate(NamedTuple):
    """A live prefix with one more token.

    log_prob  log P of the prefix and the token together
    parent    the number of the prefix among the live ones of its sentence, from 0
    token     the token
    row       the number of the prefix among the live ones of all sentences: its row in the model's pass"""

    log_prob: float
    parent: int
    token: int
    row: int


@dataclass
class Search:
    """The search for one sentence.

    beams, end, lp, n_best, coverage   as in beam_search
    live       its live prefixes, best first. At the start there is one, without tokens
    finished   its finished hypotheses, in the order in which they finished"""

    beams: int
    end: int | None
    lp: Callable[[int], float]
    n_best: int
    coverage: float = 0.0
    live: list[Prefix] = field(default_factory=lambda: [Prefix((), 0.0)])
    finished: list[Hypothesis] = field(default_factory=list)

    def extend(self, candidates: list[Candidate], attention: Sequence[np.ndarray] = ()) -> list[int]:
        """The rows of the new live prefixes' parents; self.live and self.finished change.

        candidates come best first, with ranks 0, 1, 2, ... B = self.beams. Three cases:

        it ends, rank < B      self.finish keeps it
        it ends, rank >= B     it is dropped
        it does not end        it becomes a live prefix, until there are B

        The new live prefixes replace the old ones. The result has candidate.row of each, in the same order.

        attention   of this step, for self.attended, which gives the attention of a new prefix"""
        rows = []
        live: list[Prefix] = []
        for rank, candidate in enumerate(candidates):
            if len(live) == self.beams and rank >= self.beams:
                break                                    # all further candidates are dropped
            tokens = (*self.live[candidate.parent].tokens, candidate.token)
            prefix = Prefix(tokens, candidate.log_prob, self.attended(candidate, attention))
            if candidate.token == self.end:
                if rank < self.beams:
                    self.finish(prefix, ended=True)
            elif len(live) < self.beams:
                live.append(prefix)
                rows.append(candidate.row)
        self.live = live
        return rows

    def attended(self, candidate: Candidate, attention: Sequence[np.ndarray]) -> np.ndarray | float:
        """The attention of the source's tokens, (Ts,): that of the candidate's prefix, and that of this step.

        attention   of this step, (Ts,) for each row; empty without a coverage penalty, and the result is 0.0"""
        if not attention:
            return 0.0
        return self.live[candidate.parent].attention + attention[candidate.row]

    def finish(self, prefix: Prefix, *, ended: bool) -> None:
        """Append a hypothesis to self.finished.

        Its score is log P / lp(n) + cp. n is the number of its tokens, the end included. cp is self.penalty(prefix),
        which is 0 without a coverage penalty.

        ended   True: the last token is the end. False: the text was cut off"""
        score = prefix.log_prob / self.lp(len(prefix.tokens)) + self.penalty(prefix)
        self.finished.append(Hypothesis(prefix.tokens, score, prefix.log_prob, ended))

    def penalty(self, prefix: Prefix) -> float:
        """The coverage penalty cp = β Σᵢ log min(aᵢ, 1), where a is prefix.attention. 0.0 for β = 0."""
        if not self.coverage:
            return 0.0
        with np.errstate(divide="ignore"):               # a token without any attention: −∞
            return self.coverage * float(np.log(np.minimum(prefix.attention, 1)).sum())

    def is_done(self, reach: float) -> bool:
        """True if no live prefix can become one of the n_best.

        The score of a live prefix can reach log P / reach, not more, since cp ≤ 0. So the search is done when n_best
        finished scores are at least that high for every live prefix. It is also done without a live prefix."""
        if not self.live:
            return True
        if len(self.finished) < self.n_best:
            return False
        scores = sorted((h.score for h in self.finished), reverse=True)
        return scores[self.n_best - 1] >= self.live[0].log_prob / reach

    def best(self) -> list[Hypothesis]:
        """The n_best hypotheses, best first. Prefixes that are still live are among them, as cut off."""
        for prefix in self.live:
            self.finish(prefix, ended=False)
        self.live = []
        return sorted(self.finished, key=lambda h: -h.score)[:self.n_best]       # stable sort


# ── all sentences ────────────────────────────────────────────────────────────────────────────────────────────────────
class Steps:
    """The passes of the model: one row for each live prefix. The prefixes of a sentence are consecutive rows."""

    def __init__(
        self, model: Module, ids: np.ndarray, mask: np.ndarray | None, facts: dict[str, Any], cross: Attention | None,
        *, cached: bool,
    ):
        """cross: the module whose attention each step keeps; None: none."""
        self.model = model
        self.cross = cross
        self.attention: list[np.ndarray] = []            # of the last step, to the source: (Ts,) for each row
        self.prompts = ids
        self.mask = mask
        self.facts = facts
        self.cache = Cache() if cached else None
        self.sentences = np.arange(len(ids))             # (R,) the sentence of each row
        self.ids = ids                                   # the tokens of the next pass, their mask, and the rows' facts
        self.step_mask = mask
        self.step_facts = facts

    def log_probs(self) -> np.ndarray:
        """log p of each token after each live prefix, (R, V), in the dtype of the logits."""
        rows, T = self.ids.shape
        last = np.arange(1, rows + 1) * T - 1            # each row's last position, in the flattened (R T) positions
        ctx = Context(mask=self.step_mask, cache=self.cache, logit_positions=last,
                      output_attention_scores=self.cross is not None, **self.step_facts)
        z = array.asnumpy(self.model(self.ids, ctx).data)                        # (R, V)
        if z.dtype.itemsize < 4:
            z = z.astype(np.float32)                     # 16 bits are too few for the sum of exponentials
        z = z - z.max(axis=-1, keepdims=True)
        log_sum = np.log(np.exp(z).sum(axis=-1, keepdims=True))
        if np.isnan(log_sum).any():
            raise ValueError("beam_search wants logits that are numbers, got NaN")
        if self.cross is not None:
            self.attention = source_attention(ctx, self.cross)
        return z - log_sum

    def go_on(self, parents: np.ndarray, tokens: list[tuple[int, ...]]) -> None:
        """Prepare the next pass. Its row i continues row parents[i] of this one, and has the new tokens tokens[i]."""
        before = self.sentences
        self.sentences = before[parents]
        has_same_sentences = np.array_equal(self.sentences, before)              # then each row keeps its source
        if not has_same_sentences:
            self.step_facts = {name: rows_of(value, self.sentences) for name, value in self.facts.items()}
        if self.cache is None:
            self.ids = np.concatenate([self.prompts[self.sentences], np.array(tokens)], axis=1)
            if self.mask is not None:
                real = np.ones((len(tokens), len(tokens[0])), bool)
                self.step_mask = np.concatenate([self.mask[self.sentences], real], axis=1)
            return
        self.ids = np.array([new[-1:] for new in tokens])
        if self.mask is not None:
            self.step_mask = np.ones((len(tokens), 1), bool)
        if not np.array_equal(parents, np.arange(len(before))):
            index = array.asarray(parents)
            if has_same_sentences:
                self.cache = self.cache.reordered(index)                         # without copying the sources' keys
            else:
                self.cache = self.cache.rows(index)


def source_attention(ctx: Context, cross: Attention) -> list[np.ndarray]:
    """The attention of the newest token to the real tokens of its source, the mean over heads: (Ts,) for each row.

    A prefix and a soft prompt stand before the source, and are no part of it."""
    source = ctx.source
    Ts = array.shape_of(source.inputs["ids"])[1]
    scores = array.asnumpy(ctx.attention_scores(cross).data)[:, :, -1].astype(np.float64)        # (R, H, Tk)
    visible = ctx.attention_mask(cross)
    if visible is not None:
        scores = np.where(array.asnumpy(visible)[:, :, 0], scores, -math.inf)
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))                      # 16 bits would lose small ones
    mean = (e / e.sum(axis=-1, keepdims=True)).mean(axis=1)[:, -Ts:]
    if source.mask is None:
        return list(mean)
    real = array.asnumpy(source.mask)[:, -Ts:]
    return [row[is_real] for row, is_real in zip(mean, real, strict=True)]


def rows_of(value: Any, index: np.ndarray) -> Any:
    """Rows of a fact: of a source's Context, of an array, or of a list with an entry for each row."""
    if value is None:
        return None
    if isinstance(value, Context):
        return value.rows(array.asarray(index))
    if array.is_array(value):
        return value[array.put_like(index, value)]
    return [value[i] for i in index]


def best_candidates(log_probs: np.ndarray, live: list[list[Prefix]], count: int) -> Iterator[list[Candidate]]:
    """The `count` best candidates of each sentence, best first: a list for each sentence.

    live       the live prefixes of each sentence, R in all
    log_probs  (R, V) log p of each next token after each prefix: first the prefixes of the first sentence, then those
               of the second, ...
    count      at most so many candidates of a sentence

    A candidate's log P is that of the prefix plus that of the token. A token of probability 0, whose log p is −inf, is
    no candidate. Of equal candidates the lower parent comes first, then the lower token. With B live prefixes,
    count = 2 B is enough: at most B of these candidates end, since each prefix has one end, so B others remain."""
    tokens = top_tokens(log_probs, count)                                        # (R, k), in the order of the tokens
    gains = np.take_along_axis(log_probs, tokens, axis=1).astype(np.float64)
    start = 0
    for prefixes in live:
        rows = range(start, start + len(prefixes))
        start += len(prefixes)
        found = []
        for parent, row in enumerate(rows):
            before = prefixes[parent].log_prob
            for token, gain in zip(tokens[row].tolist(), gains[row].tolist(), strict=True):
                if gain > -math.inf:
                    found.append(Candidate(before + gain, parent, token, row))
        found.sort(key=lambda candidate: -candidate.log_prob)                    # stable: the order of equal ones stays
        yield found[:count]


def top_tokens(log_probs: np.ndarray, count: int) -> np.ndarray:
    """The tokens of the `count` largest entries of each row, in ascending order: (R, k), k = min(count, V).

    Of equal entries the lowest tokens are taken."""
    R, V = log_probs.shape
    if count >= V:
        return np.broadcast_to(np.arange(V), (R, V))
    largest = np.argpartition(log_probs, V - count, axis=1)[:, V - count:]       # (R, k)
    least = np.take_along_axis(log_probs, largest, axis=1).min(axis=1, keepdims=True)
    is_tied = (log_probs >= least).sum(axis=1) > count
    for row in np.flatnonzero(is_tied):                  # argpartition chose any of the equal entries
        largest[row] = np.argsort(-log_probs[row], kind="stable")[:count]
    return np.sort(largest, axis=1)

"""Generate text, one token at a time, with a cache of keys and values: greedy or sampled."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import array, checks
from .context import read_integers, read_mask
from .keywords import keyword_names, refuse_keywords
from .models import EncoderDecoder
from .nn import Cache, Context, Module, evaluation_mode

__all__ = ["generate", "pad_left"]

# Keywords of Context that are passed on at every step. The encoder runs once: source_ids become a source.
FACTS = ("task", "route", "source", "source_ids", "source_mask")


def generate(
    model: Module,
    ids: Any,
    max_new_tokens: int,
    *,
    mask: Any = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    end: int | None = None,
    rng: np.random.Generator | None = None,
    cache: bool = True,
    **facts: Any,
) -> np.ndarray:
    """Continue each row of ids (B, T) by up to max_new_tokens tokens -> (B, T + n).

    Rows of different lengths are padded on the left, with mask (B, T) True at real tokens; pad_left makes both. An
    encoder-decoder wants source_ids=; its ids are the decoder's text, and None stands for the start token.

    temperature   0: the most probable token (greedy). Above 0: logits are divided by it, and `rng` draws a token
    top_k, top_p  draw from the k most probable tokens, or from the smallest set of tokens with probability p
    end           a token that ends a row. The rest of the row is filled with it
    cache         True: a step runs the newest token only, with the keys and values of the others from a cache.
                  False: every step runs the whole text
    facts         task=, route=; source_ids= and source_mask= (B, Ts), or source=, the Context that model.encode gives

    ValueError if the text outgrows the model's positions, if the model is a classifier, or if an option is out of
    range; TypeError, naming the near keyword, for an unknown one. The model is not changed."""
    refuse_unknown(facts, generate)
    check_model(model, end)
    checks.whole("max_new_tokens", max_new_tokens, 0)
    checks.flag("cache", cache)
    ids = array.asnumpy(read_integers("ids", first_ids(model, ids, facts), "generate wants ids of shape (B, T)"))
    mask = None if mask is None else array.asnumpy(read_mask("mask", mask))
    check_request(ids, mask, temperature, top_k, top_p, rng)
    past = Cache() if cache else None
    ended = np.zeros(len(ids), bool)                                             # rows that have given `end`
    new = ids                                                                    # the tokens that this step runs
    with evaluation_mode(model):
        facts = with_source(model, facts)
        for _ in range(max_new_tokens):
            last = np.arange(1, len(ids) + 1) * new.shape[1] - 1                 # last position of each row, in (B·T,)
            ctx = Context(mask=mask, cache=past, logit_positions=last, **facts)
            logits = array.asnumpy(model(new, ctx).data).astype(np.float64)      # (B, V)
            token = choose_token(logits, temperature, top_k, top_p, rng)         # (B,)
            if end is not None:
                token = np.where(ended, end, token)
                ended |= token == end
            ids = np.concatenate([ids, token[:, None]], axis=1)
            new = token[:, None] if cache else ids
            if mask is not None:                                                 # of the tokens of one pass
                real = np.ones((len(ids), 1), bool)
                mask = real if cache else np.concatenate([mask, real], axis=1)
            if ended.all():
                break
    return ids


def check_model(model: Any, end: int | None, caller: str = "generate") -> None:
    """TypeError unless the model is a Module; ValueError if its head does not score every token of the vocabulary.

    Also for a token `end` that is not in the vocabulary."""
    checks.instance(caller, model, Module, "a model")
    embed = getattr(model, "embed", None)
    if end is not None:
        checks.whole("end", end, 0, None if embed is None else embed.in_features - 1)
    if embed is None:                                                            # a model of the user's
        return
    scores = getattr(getattr(model, "head", None), "out_features", 0)
    if scores != embed.in_features:
        raise ValueError(f"{caller} wants a language model, with a score for each of {embed.in_features} tokens; "
                         f"got a model whose head gives {scores} scores")


def check_request(
    ids: np.ndarray,
    mask: np.ndarray | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    rng: np.random.Generator | None,
    caller: str = "generate",
) -> None:
    """ValueError for arguments of `generate` that are out of range or do not go together. caller: for the message."""
    if ids.ndim != 2 or ids.shape[1] < 1:
        raise ValueError(f"{caller} wants ids of shape (B, T) with T >= 1, got {ids.shape}")
    checks.number("temperature", temperature)
    if rng is not None:
        checks.random_generator("rng", rng)
    if temperature < 0 or (temperature > 0 and rng is None):
        raise ValueError("sampling wants a temperature > 0 and a generator: rng=numpy.random.default_rng(seed)")
    if top_k is not None:
        checks.whole("top_k", top_k, 1)
    if top_p is not None:
        checks.number("top_p", top_p, above=0, high=1)
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"mask has shape {mask.shape}, the ids {ids.shape}: both want one entry per token")
    if mask is not None and not mask[:, -1].all():
        raise ValueError(f"{caller} continues after the last column and wants the padding on the left: use pad_left")


def first_ids(model: Module, ids: Any, facts: dict[str, Any]) -> Any:
    """The ids that were given; for None and an encoder-decoder, the start token for each row of its source."""
    if ids is not None or not isinstance(model, EncoderDecoder):
        return ids
    source = facts.get("source_ids")
    if source is None and facts.get("source") is not None:
        source = facts["source"].ids
    shape = () if source is None else array.shape_of(source)
    return model.start_ids(shape[0]) if shape else None


def with_source(model: Module, facts: dict[str, Any]) -> dict[str, Any]:
    """The facts of every step: source_ids and source_mask become a source, on which the encoder has run.

    TypeError for source_ids and a model without an encoder."""
    own = {name: value for name, value in facts.items() if name not in ("source_ids", "source_mask")}
    ids = facts.get("source_ids")
    if not isinstance(model, EncoderDecoder):
        if ids is not None or facts.get("source_mask") is not None:
            raise TypeError(f"source_ids are for an encoder-decoder, got a {type(model).__name__}")
        return own
    if ids is not None:
        if facts.get("source") is not None:
            raise TypeError("a forward pass wants source= or source_ids=, got both")
        own["source"] = model.encode(ids, facts.get("source_mask"), task=facts.get("task"), route=facts.get("route"))
    return own


def refuse_unknown(facts: dict[str, Any], *functions: Callable) -> None:
    """TypeError, naming the near keyword, for a keyword that is neither a parameter of the functions nor a fact.

    functions: the one that was called, and those to which it passes its keywords on."""
    known = [name for function in functions for name in keyword_names(function)]
    known += FACTS
    refuse_keywords(functions[0].__name__, [name for name in facts if name not in known], known)


def choose_token(
    logits: np.ndarray,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    rng: np.random.Generator | None,
) -> np.ndarray:
    """One token for each row of logits (B, V) -> (B,): the most probable at temperature 0, else drawn with `rng`.

    top_k, top_p: draw from the k most probable tokens, or from the smallest set of tokens with probability p."""
    if temperature == 0:
        return logits.argmax(-1)
    order = np.argsort(-logits, axis=-1, kind="stable")                          # most probable first
    z = np.take_along_axis(logits, order, -1)
    with np.errstate(over="ignore"):                     # a tiny temperature: exp(−∞) = 0 for all but the best
        p = np.exp((z - z[:, :1]) / temperature)
    p /= p.sum(-1, keepdims=True)
    allowed = np.ones_like(p, bool)
    if top_k is not None:
        allowed[:, top_k:] = False
    if top_p is not None:
        allowed &= p.cumsum(-1) - p < top_p              # the sum before a token: the one that crosses top_p stays
    p = np.where(allowed, p, 0)
    u = rng.random((len(p), 1)) * p.sum(-1, keepdims=True)                       # p no longer sums to 1
    drawn = (p.cumsum(-1) <= u).sum(-1)                                          # inverse transform sampling
    drawn = np.minimum(drawn, allowed.sum(-1) - 1)       # rounding may draw one token too far
    return np.take_along_axis(order, drawn[:, None], -1)[:, 0]


def pad_left(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids, of different lengths -> ids (B, T) and mask (B, T), True at real tokens.

    The padding, the id `pad`, is on the left, so that every row ends in the last column, where `generate` continues.
    TypeError unless rows holds lists of whole numbers; ValueError if a row, or `rows`, is empty.
    """
    pad = checks.whole("pad", pad, 0)
    checks.instance("pad_left", rows, (list, tuple, np.ndarray), "a list of rows of token ids")
    for row in rows:
        checks.instance("pad_left", row, (list, tuple, np.ndarray), "rows, each a list of token ids")
        for token in row:
            checks.whole("each token id of pad_left", token, 0)
    if len(rows) == 0 or min(map(len, rows)) == 0:
        raise ValueError("pad_left wants rows with at least one token each")
    T = max(len(row) for row in rows)
    ids = np.array([[pad] * (T - len(row)) + list(row) for row in rows])
    mask = np.array([[False] * (T - len(row)) + [True] * len(row) for row in rows])
    return ids, mask

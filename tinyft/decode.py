"""Text from a model, one token at a time, with a KV cache: greedy or sampled."""
from __future__ import annotations

from typing import Any

import numpy as np

from . import array
from .nn import Cache, Context, Module, no_grad

__all__ = ["generate", "pad_left"]


def generate(model: Module, ids: Any, max_new_tokens: int, *, mask: Any = None, temperature: float = 0.0, top_k: int | None = None,
             top_p: float | None = None, end: int | None = None, rng: np.random.Generator | None = None, cache: bool = True,
             **facts: Any) -> np.ndarray:
    """Continue each row of ids (B, T) by up to max_new_tokens tokens -> (B, T + n).  Rows of different lengths are padded on the left,
    with mask (B, T) True where real (pad_left makes both).

    temperature 0 takes the likeliest token; above, it divides the logits and `rng` draws, from the top_k likeliest tokens or the
    smallest set with probability top_p.  A row that gave `end` is filled with it.  Without cache every step runs the whole text.
    Raises ValueError when the text would outgrow the model's positions."""
    ids = np.asarray(ids)
    if ids.ndim != 2 or ids.shape[1] < 1:
        raise ValueError(f"generate wants ids of shape (B, T) with T >= 1, got {ids.shape}")
    if temperature < 0 or (temperature > 0 and rng is None):
        raise ValueError("sampling wants a temperature > 0 and a generator: rng=numpy.random.default_rng(seed)")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"sampling wants top_k >= 1 and 0 < top_p <= 1; got top_k={top_k}, top_p={top_p}")
    seen = None if mask is None else np.asarray(mask, bool)
    if seen is not None and seen.shape != ids.shape:
        raise ValueError(f"mask has shape {seen.shape}, the ids {ids.shape}: they go together, one for one")
    if seen is not None and not seen[:, -1].all():
        raise ValueError("generate goes on from the last column, so it wants the padding on the left: pad_left puts it there")
    was, model_cache, done = model.training, Cache() if cache else None, np.zeros(len(ids), bool)
    model.eval()
    try:
        with no_grad():
            new = ids
            for _ in range(max_new_tokens):
                T = new.shape[1]
                ctx = Context(mask=seen, cache=model_cache, logit_positions=np.arange(1, len(ids) + 1) * T - 1, **facts)
                logits = array.asnumpy(model(new, ctx).data).astype(np.float64)  # (B, V), at the last place
                token = choose(logits, temperature, top_k, top_p, rng)
                if end is not None:
                    token = np.where(done, end, token)
                    done |= token == end
                ids = np.concatenate([ids, token[:, None]], axis=1)
                new = token[:, None] if cache else ids
                if seen is not None:                                             # what comes next is real
                    seen = np.ones((len(ids), 1), bool) if cache else np.concatenate([seen, np.ones((len(ids), 1), bool)], axis=1)
                if done.all():
                    break
    finally:
        model.train(was)
    return ids


def choose(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None, rng: np.random.Generator | None) -> np.ndarray:
    """One token per row of logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1)
    order = np.argsort(-logits, axis=-1, kind="stable")
    z = np.take_along_axis(logits, order, -1)                                    # likeliest first
    with np.errstate(over="ignore"):                                             # a tiny temperature: −∞ for all but the likeliest
        p = np.exp((z - z[:, :1]) / temperature)
    p /= p.sum(-1, keepdims=True)
    keep = np.ones_like(p, bool)
    if top_k is not None:
        keep[:, top_k:] = False
    if top_p is not None:
        keep &= p.cumsum(-1) - p < top_p                                         # the token that crosses the line stays in
    p = np.where(keep, p, 0)
    u = rng.random((len(p), 1)) * p.sum(-1, keepdims=True)
    place = np.minimum((p.cumsum(-1) <= u).sum(-1), keep.sum(-1) - 1)
    return np.take_along_axis(order, place[:, None], -1)[:, 0]


def pad_left(rows: list[list[int]], pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids -> ids (B, T) and mask (B, T), the padding on the left, where generation wants it."""
    if not rows or not all(rows):
        raise ValueError("pad_left wants rows with at least one token each")
    T = max(map(len, rows))
    ids = np.array([[pad] * (T - len(r)) + list(r) for r in rows])
    return ids, np.array([[False] * (T - len(r)) + [True] * len(r) for r in rows])

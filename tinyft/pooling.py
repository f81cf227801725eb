"""Sentence embeddings from hidden states: the pooling settings of a model, and the pooling.

    mean   e = Σ mₜ hₜ / Σ mₜ          over the real tokens, m (T,) 1 at real tokens, 0 at padding
    cls    e = h₁                      of the first token
    max    eᵢ = max hₜᵢ                over the real tokens
    then, if asked for,  e ← e / max(‖e‖, 1e-12)

h (B, T, C) hidden states of texts that are padded on the right, e (B, C) float32.     Reimers & Gurevych 2019, §3
"""
from __future__ import annotations

from dataclasses import dataclass

from .array import Array, xp

__all__ = ["MODES", "Pooling", "pool"]

MODES = ("mean", "cls", "max")


@dataclass(frozen=True)
class Pooling:
    """The settings by which a model makes embeddings of texts.

    mode        "mean", "cls" or "max"
    normalize   True: embeddings have the length 1
    max_tokens  longer texts are cut, special tokens included. None: as many as the model has positions for
    lower_case  True: the text is put in lower case before the tokenizer reads it
    """
    mode: str = "mean"
    normalize: bool = False
    max_tokens: int | None = None
    lower_case: bool = False


def pool(hidden: Array, mask: Array, mode: str, normalize: bool) -> Array:
    """The embeddings (B, C), float32, of hidden states (B, T, C) and their mask (B, T), True at real tokens."""
    m = xp(hidden)
    x = hidden.astype("float32")
    if mode == "cls":
        e = x[:, 0]
    elif mode == "max":
        e = m.where(mask[:, :, None], x, -m.inf).max(axis=1)
    else:
        real = mask[:, None, :].astype("float32")                               # (B, 1, T)
        e = (real @ x)[:, 0] / real.sum(axis=2)
    if normalize:
        e = e / m.maximum(m.sqrt((e * e).sum(axis=1, keepdims=True)), 1e-12)
    return e

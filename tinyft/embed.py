"""Embeddings of texts: one vector for each text, whose directions compare their meanings.

    model, tokenizer = load("work/real/all-MiniLM-L6-v2")
    e = embed(model, tokenizer, ["A man eats.", "Someone has a meal."])
    e @ e.T                                              the cosines, as this model's vectors have the length 1

The hidden states of the last block are pooled as the model's directory asks (pooling.py).
"""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from . import array, checks
from .data import encode, pad
from .kernels import keep_memory
from .keywords import checked_keywords
from .models.blocks import Attention
from .nn import Context, Module, evaluation_mode
from .pooling import MODES, Pooling, pool
from .predict import batches_by_length, positions_of_prompts
from .tokens import encode_text, padding_id, plain, special_ids

__all__ = ["embed"]


@checked_keywords
def embed(
    model: Module,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    pooling: str | None = None,
    normalize: bool | None = None,
    max_len: int | None = None,
) -> np.ndarray:
    """The embeddings of N texts, in their order: (N, C) float32, C the model's width.

    White space around a text is removed. A BERT reads [CLS] text [SEP], a causal model the text. Texts of similar
    length share a batch; the result is that of one text at a time. Dropout is inactive; the mode of every module stays
    as it was. A head of the model is not used.

    batch_size  texts in one batch
    pooling     "mean" of the hidden states of the real tokens, their "max", or "cls": that of the first token. None: as
                the model's directory asks, else "mean"
    normalize   True: every embedding has the length 1. None: as the model's directory asks, else False
    max_len     tokens of a text, special tokens included; longer texts are cut. None: as the model's directory asks,
                else as many as the model has positions for

    TypeError for arguments of another kind. ValueError for a value out of range, a tokenizer without the special tokens
    of a BERT, and for an empty text where the model has no special token to read in its place."""
    settings = _settings(model, texts, batch_size, pooling, normalize, max_len)
    tokenizer = plain("embed", tokenizer)                # without the padding and truncation that its file may ask for
    keep_memory()                                        # for the next batch
    with evaluation_mode(model):
        room = model.config.positions - positions_of_prompts(model)
        longest = room if settings.max_tokens is None else min(room, settings.max_tokens)
        rows = _read(model, tokenizer, texts, longest, lower_case=settings.lower_case)
        out = np.zeros((len(rows), model.config.width), np.float32)
        for chosen in batches_by_length(rows, batch_size):
            ids, mask = pad([rows[i] for i in chosen], longest, pad_id=padding_id(tokenizer))
            # Without padding no mask: attention is faster. A language-model head computes one position.
            ctx = Context(mask=None if mask.all() else mask, logit_positions=[0])
            model(ids, ctx)
            hidden = ctx.last_hidden_state.data                 # (B, T, C)
            on_device = array.put_like(mask, hidden)
            out[chosen] = array.asnumpy(pool(hidden, on_device, settings.mode, normalize=settings.normalize))
    return out


def _settings(model: Any, texts: Any, batch_size: Any, pooling: Any, normalize: Any, max_len: Any) -> Pooling:
    """The pooling settings of a call: the model's own, changed by the arguments that are not None; all are checked."""
    checks.instance("embed", model, Module, "a model, a Module, as its first argument")
    if not isinstance(getattr(model, "embed", None), Module) or getattr(model, "config", None) is None:
        raise TypeError(f"embed wants a transformer that reads token ids, got a {type(model).__name__}")
    checks.instance("embed", texts, (list, tuple), "a list of texts")
    for text in texts:
        checks.instance("embed", text, str, "a list of texts")
    checks.whole("embed: batch_size", batch_size, least=1)
    changes: dict[str, Any] = {}
    if pooling is not None:
        changes["mode"] = checks.one_of("embed: pooling", pooling, MODES)
    if normalize is not None:
        changes["normalize"] = checks.flag("embed: normalize", normalize)
    if max_len is not None:
        changes["max_tokens"] = checks.whole("embed: max_len", max_len, least=1)
    return dataclasses.replace(getattr(model, "_pooling", None) or Pooling(), **changes)


def _read(model: Module, tokenizer: Tokenizer, texts: Sequence[str], longest: int, *, lower_case: bool) -> list:
    """The ids of each text, at most `longest`: [CLS] text [SEP] for a model that looks both ways, else the text."""
    is_causal = any(isinstance(module, Attention) and module.causal for module in model.modules())
    rows = []
    for text in texts:
        text = text.strip()
        if lower_case:
            text = text.lower()
        if is_causal:
            ids = encode_text("embed", tokenizer, text)[:longest]
            rows.append(ids or special_ids("embed of an empty text", tokenizer, "eos"))
        else:
            rows.append(encode(tokenizer, text, longest, "bert"))
    return rows

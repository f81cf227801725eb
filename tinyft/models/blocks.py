"""The parts of every transformer here, under the same leaf names in every model:

    attn.q  attn.k  attn.v  attn.o  attn.kv       mlp.up  mlp.down       norm1  norm2

B batch, T time, C width, H heads, D = C/H head width, F feed-forward width, V vocabulary, L layers.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import dispatch, ops
from ..array import Array, xp
from ..nn import Context, Dropout, Embedding, LayerNorm, Linear, Module, Parameter
from ..tensor import Tensor


class KV(Module):
    """(k, v, key_mask) -> the keys and values that the queries look at.    k, v (B, H, Tk, D);  key_mask (B, Tk) bool, None if all keys are real

    The cache joins here.  A prefix is an edit of this part: it comes after the cache, so it is never cached twice."""

    def __init__(self, heads: int, head_width: int):
        self.heads = heads
        self.head_width = head_width

    def forward(self, kv: tuple, ctx: Context) -> tuple:
        k, v, key_mask = kv
        if ctx.cache is not None:
            k, v = ctx.cache.join(self, k, v)
        return k, v, key_mask


class Attention(Module):
    """softmax(q kᵀ / √D) v over H heads, then o.    (B, T, C) -> (B, T, C)

    std: standard deviation of the initial maps; out_std: of the map o, if it is another."""

    def __init__(self, width: int, heads: int, *, rng: np.random.Generator, causal: bool, dropout: float = 0.0, std: float = 0.02,
                 out_std: float | None = None):
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        self.h, self.causal = heads, causal
        self.in_features = self.out_features = width
        self.q = Linear(width, width, rng=rng, std=std)
        self.k = Linear(width, width, rng=rng, std=std)
        self.v = Linear(width, width, rng=rng, std=std)
        self.kv = KV(heads, width // heads)
        self.o = Linear(width, width, rng=rng, std=out_std or std)
        self.drop_p = Dropout(dropout)
        self.drop = Dropout(dropout)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        q, k, v = self.project(x, ctx)                                           # (B, H, T, D)
        k, v, key_mask = self.kv((k, v, ctx.key_mask()), ctx)                    # (B, H, Tk, D)
        if key_mask is not None:
            key_mask = key_mask[:, None, None, :]                                # (B, 1, 1, Tk)
        key = self.drop_p.key(ctx)
        dropout_mask = None if key is None else self.dropout_mask(q, k, key)
        y = ops.attention(q, k, v, key_mask=key_mask, causal=self.causal, dropout_mask=dropout_mask)     # (B, H, T, D)
        return self.drop(self.o(y.permute(0, 2, 1, 3).reshape(x.shape), ctx), ctx)

    def project(self, x: Tensor, ctx: Context) -> Sequence[Tensor]:
        "Queries, keys and values, by heads.  Where nothing is attached to the three maps, and a kernel can, they are one product."
        maps = self.q, self.k, self.v
        plain = lambda f: type(f) is Linear and not f.edits and type(f.weight) is Parameter and f.bias is not None
        if dispatch.find(ops.project, type(x.data)) and all(map(plain, maps)):
            return ops.project(x, *(p for f in maps for p in (f.weight, f.bias)), heads=self.h)
        return [self.split(f(x, ctx)) for f in maps]

    def split(self, x: Tensor) -> Tensor:
        "(B, T, C) -> (B, H, T, D): head h owns the features h D : (h + 1) D"
        B, T, C = x.shape
        return x.reshape(B, T, self.h, C // self.h).permute(0, 2, 1, 3)

    def dropout_mask(self, q: Tensor, k: Tensor, key: int) -> Array:
        "Factors of the probabilities, (B, H, T, Tk): the dropout of ones."
        return ops.dropout(Tensor(xp(q.data).ones((*q.shape[:-1], k.shape[-2]), q.dtype)), self.drop_p.p, key).data


class MLP(Module):
    "down(act(up(x))).    (..., C) -> (..., F) -> (..., C)"

    def __init__(self, width: int, hidden: int, *, activation: Callable, rng: np.random.Generator, dropout: float = 0.0, std: float = 0.02,
                 out_std: float | None = None):
        self.in_features = self.out_features = width
        self.up = Linear(width, hidden, rng=rng, std=std)
        self.down = Linear(hidden, width, rng=rng, std=out_std or std)
        self.drop = Dropout(dropout)
        self._activation = activation

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.drop(self.down(self._activation(self.up(x, ctx)), ctx), ctx)


class PreNormBlock(Module):
    "x ← x + attn(norm1 x);  x ← x + mlp(norm2 x)      (GPT-2)"
    sublayers = [("attn", "norm1"), ("mlp", "norm2")]    # (module, its norm), in the order in which they run

    def __init__(self, attn: Attention, mlp: MLP, *, eps: float):
        width = attn.in_features
        self.in_features = self.out_features = width
        self.norm1 = LayerNorm(width, eps=eps)
        self.attn = attn
        self.norm2 = LayerNorm(width, eps=eps)
        self.mlp = mlp

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x = x + self.attn(self.norm1(x, ctx), ctx)
        return x + self.mlp(self.norm2(x, ctx), ctx)


class PostNormBlock(Module):
    "x ← norm1(x + attn x);  x ← norm2(x + mlp x)      (BERT, and the transformer of 2017)"
    sublayers = [("attn", "norm1"), ("mlp", "norm2")]

    def __init__(self, attn: Attention, mlp: MLP, *, eps: float):
        width = attn.in_features
        self.in_features = self.out_features = width
        self.attn = attn
        self.norm1 = LayerNorm(width, eps=eps)
        self.mlp = mlp
        self.norm2 = LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x = self.norm1(x + self.attn(x, ctx), ctx)
        return self.norm2(x + self.mlp(x, ctx), ctx)


def run_blocks(blocks: Sequence[Module], x: Tensor, ctx: Context) -> Tensor:
    "x (B, T, C) through a stack of blocks, bottom to top -> (B, T, C).  If asked, ctx keeps the input of every block."
    for block in blocks:
        if ctx.output_hidden_states:
            ctx.hidden_states.append(x)
        x = block(x, ctx)
    return x


def embed_tokens(embed: Embedding, ids: Any, ctx: Context, positions: int) -> Tensor:
    """ids (B, T), or embeddings (B, T, C) in their place, -> (B, T, C).  The first line of a model's forward pass.

    An edit of `embed` may lengthen the sequence (a soft prompt); ctx then knows.  IndexError for an id outside the vocabulary,
    ValueError for a sequence that is longer than the model's number of positions."""
    check_ids(ids, embed.in_features)
    weight = embed.weight
    on_device = weight.data if isinstance(weight, Tensor) else next(iter(weight.own(Array).values()))
    ctx.begin(ids, on_device)
    T = ctx.ids.shape[1]
    x = embed(ids if isinstance(ids, Tensor) else ctx.ids, ctx)                  # (B, T, C)
    check_length(x, ctx, T, positions)
    return x


def apply_head(head: Module | None, hidden: Tensor, ctx: Context, pooler: Module | None = None) -> Tensor:
    """The output of a model from its last hidden states (B, T, C).  Both are kept in ctx.

    A classifier reads one position of each sequence, through the pooler if there is one -> (B, classes).  Another head reads
    every position, or those of ctx.logit_positions -> (..., V).  Without a head the hidden states are the output."""
    ctx.last_hidden_state = hidden
    if ctx.output_hidden_states:
        ctx.hidden_states.append(hidden)
    if isinstance(head, Classifier):
        pooled = head.row(hidden, ctx)                                           # (B, C)
        if pooler is not None:
            pooled = pooler(pooled, ctx)
        ctx.output = head(pooled, ctx)
    elif head is None:
        ctx.output = hidden
    else:
        ctx.output = head(ctx.select_positions(hidden), ctx)
    return ctx.output


def sinusoids(T: int, c: int) -> np.ndarray:
    "(T, C): sin(p wᵢ) in the first half, cos(p wᵢ) in the second, wᵢ = 10000^(−2i/C).  A shift is a rotation of it.  Vaswani et al. 2017, §3.5"
    angle = np.arange(T)[:, None] * 10000.0**(-np.arange(0, c, 2) / c)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


class Classifier(Module):
    """Scores of a row's class.    (B, T, C) -> (B, classes)

    Which row speaks: the first (BERT's [CLS]) or the last real one (GPT).  Drawn from N(0, 1/C), so that a narrow model hears its task
    from the first step as a wide one does; with the 0.02 that suits C = 768, one of 128 hears a quarter of it at the start."""

    def __init__(self, width: int, classes: int, *, rng: np.random.Generator, last: bool, bias: bool = True, dropout: float = 0.0):
        self.last = last
        self.drop = Dropout(dropout)
        self.out = Linear(width, classes, rng=rng, bias=bias, std=width**-0.5)

    in_features, out_features = property(lambda self: self.out.in_features), property(lambda self: self.out.out_features)

    def row(self, x: Tensor, ctx: Context) -> Tensor:
        "(B, T, C) -> (B, C)"
        if not self.last:
            return x[:, 0]
        if ctx.mask is None:
            return x[:, -1]
        m, (B, T) = xp(x.data), x.shape[:2]
        return x[m.arange(B), T - 1 - m.argmax(m.flip(ctx.mask[:, -T:], axis=1), axis=1)]      # a soft prompt's rows are gone from x

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.out(self.drop(x, ctx), ctx)


def check_ids(ids: object, rows: int) -> None:
    "One clear sentence for what would otherwise be a wrong row.  Host arrays only: a device is not waited for."
    if isinstance(ids, (np.ndarray, list)):
        a = np.asarray(ids)
        if a.size and a.dtype.kind not in "iu":
            raise TypeError(f"token ids are integers; got {a.dtype}")
        if a.size and (a.min() < 0 or a.max() >= rows):
            raise IndexError(f"token id {a.min() if a.min() < 0 else a.max()} is outside the vocabulary of {rows}")


def check_length(x: Tensor, ctx: Context, T: int, positions: int) -> None:
    "x (B, T + prompt, C) after the cached rows must fit the positions."
    total = ctx.past_length + ctx.position_shift + x.shape[1]
    if total > positions:
        parts = {"cached": ctx.past_length, "a prefix": ctx.position_shift, "a soft prompt": x.shape[1] - T}
        named = ", ".join(f"{n} of them {kind}" for kind, n in parts.items() if n)
        hint = f" ({named})" if named else ""
        raise ValueError(f"a sequence of {total} tokens{hint} is longer than the model's {positions} positions")

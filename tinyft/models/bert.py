"""BERT: a bidirectional, post-norm encoder with token types.  Devlin et al. 2018.

    x = norm0(E[ids] + P[pos] + S[types]);   L × (x ← norm1(x + attn x);  x ← norm2(x + mlp x))

Heads: masked language model  logits = norm(gelu(W x + b)) Eᵀ + b';  classifier  Wc tanh(Wp x_[CLS] + bp) + bc;  or none.
Linear maps N(0, std²), embeddings N(0, 0.02²); GELU in its exact form; ε = 1e-12 everywhere.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import ops
from ..array import xp
from ..nn import Context, Dropout, Embedding, LayerNorm, Linear, Module, TiedHead
from ..tensor import Tensor
from .blocks import MLP, Attention, Classifier, PostNormBlock, check_ids, check_length


@dataclass(frozen=True)
class BERTConfig:
    "Sizes: vocabulary V, positions T, token types S, width C, layers L, heads H, feed-forward width F (4 C if None)."
    vocab: int = 30522
    positions: int = 512
    token_types: int = 2
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int | None = None
    dropout: float = 0.0
    eps: float = 1e-12
    std: float = 0.02                                    # of the initial linear maps; 0.02 suits a width of 768


class MaskedHead(Module):
    "logits = norm(gelu(W x + b)) Eᵀ + b'.    (..., C) -> (..., V)"

    def __init__(self, embed: Embedding, eps: float, rng: np.random.Generator):
        c = embed.out_features
        self.dense, self.norm, self.decoder = Linear(c, c, rng), LayerNorm(c, eps), TiedHead(embed, bias=True)

    in_features, out_features = property(lambda self: self.dense.in_features), property(lambda self: self.decoder.out_features)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.decoder(self.norm(ops.gelu(self.dense(x, ctx)), ctx), ctx)


class Pooler(Module):
    "tanh(W x_[CLS] + b).    (B, C) -> (B, C)"

    def __init__(self, c: int, rng: np.random.Generator):
        self.dense = Linear(c, c, rng, std=c**-0.5)                              # a new one keeps the size of what it is given, as Classifier

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return ops.tanh(self.dense(x, ctx))


class BERT(Module):
    "model(ids (B, T), mask=, token_type_ids=) -> what its head gives: MLM logits (B, T, V), class scores, or hidden states (B, T, C) without one."

    def __init__(self, config: BERTConfig = BERTConfig(), seed: int = 0, head: str | None = "mlm", pooler: bool = False):
        c, rng = config, np.random.default_rng(seed)
        self._config, self.out_features = c, c.width
        self.embed, self.pos, self.type = (Embedding(n, c.width, rng) for n in (c.vocab, c.positions, c.token_types))
        self.norm0, self.drop = LayerNorm(c.width, c.eps), Dropout(c.dropout)
        self.blocks = [PostNormBlock(Attention(c.width, c.heads, rng, False, c.dropout, c.std),
                                     MLP(c.width, c.hidden or 4 * c.width, ops.gelu, rng, c.dropout, c.std), c.eps)
                       for _ in range(c.layers)]
        self.pooler = Pooler(c.width, rng) if pooler else None
        self.head = MaskedHead(self.embed, c.eps, rng) if head == "mlm" else None

    config = property(lambda self: self._config)
    head_modules: tuple = ()                                    # names of the parts that are a new task head

    def forward(self, ids: Any, ctx: Context) -> Tensor:
        check_ids(ids, self.embed.in_features)
        if ctx.cache is not None:
            raise ValueError("BERT looks both ways: its keys and values cannot be cached; call it without cache=")
        ctx.begin(ids, self.pos.weight.data)
        T = ctx.ids.shape[1]
        x = self.embed(ids if isinstance(ids, Tensor) else ctx.ids, ctx)         # (B, T, C); a soft prompt may lengthen it: ctx knows
        check_length(x, ctx, T, self.pos.in_features)
        types = xp(ctx.ids).zeros_like(ctx.ids) if ctx.token_type_ids is None else ctx.token_type_ids
        x = self.drop(self.norm0(x + self.pos(ctx.positions(), ctx) + self.type(types, ctx), ctx), ctx)
        for block in self.blocks:
            if ctx.output_hidden_states:
                ctx.hidden_states.append(x)
            x = block(x, ctx)
        ctx.last_hidden_state = x                                                           # (B, T, C)
        if ctx.output_hidden_states:
            ctx.hidden_states.append(x)
        if isinstance(self.head, Classifier):
            ctx.output = self.head(self.pooler(self.head.row(x, ctx), ctx), ctx)
        else:
            ctx.output = x if self.head is None else self.head(ctx.select_positions(x), ctx)
        return ctx.output

    def new_head(self, classes: int, rng: np.random.Generator) -> None:
        "A classifier on the pooled [CLS] in the place of the masked-language-model head.  A pooler that was never trained is part of it."
        self.head_modules = ("head",) if self.pooler is not None else ("head", "pooler")
        if self.pooler is None:
            self.pooler = Pooler(self.config.width, rng)
        self.head, self.embed.tied = Classifier(self.config.width, classes, rng, last=False, dropout=self.config.dropout), False



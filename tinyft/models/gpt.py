"""GPT-2: a causal, pre-norm decoder with learned positions and a tied head.  Radford et al. 2019.

    x = E[ids] + P[pos];   L × (x ← x + attn(norm1 x);  x ← x + mlp(norm2 x));   logits = norm(x) Eᵀ

Linear maps N(0, std²), those that write into the residual stream N(0, std²/2L); embeddings N(0, 0.02²); GELU in its tanh form; ε = 1e-5.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import ops
from ..nn import Context, Dropout, Embedding, LayerNorm, Module, TiedHead
from ..tensor import Tensor
from .blocks import MLP, Attention, Classifier, PreNormBlock, check_ids, check_length


@dataclass(frozen=True)
class GPTConfig:
    "Sizes: vocabulary V, positions T, width C, layers L, heads H, feed-forward width F (4 C if None)."
    vocab: int = 50257
    positions: int = 1024
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int | None = None
    dropout: float = 0.0
    eps: float = 1e-5
    std: float = 0.02                                    # of the initial linear maps


class GPT(Module):
    "model(ids (B, T)) -> logits (B, T, V).  With a new head (tinyft.classifier): (B, classes), from the last real token."

    def __init__(self, config: GPTConfig = GPTConfig(), seed: int = 0):
        c, rng, thin = config, np.random.default_rng(seed), config.std * (2 * config.layers)**-0.5
        self._config, self.out_features = c, c.width
        self.embed, self.pos, self.drop = Embedding(c.vocab, c.width, rng), Embedding(c.positions, c.width, rng), Dropout(c.dropout)
        self.blocks = [PreNormBlock(Attention(c.width, c.heads, rng, True, c.dropout, c.std, thin),
                                    MLP(c.width, c.hidden or 4 * c.width, ops.gelu_tanh, rng, c.dropout, c.std, thin), c.eps)
                       for _ in range(c.layers)]
        self.norm, self.head = LayerNorm(c.width, c.eps), TiedHead(self.embed)

    config = property(lambda self: self._config)
    head_modules: tuple = ()                                    # names of the parts that are a new task head

    def forward(self, ids: Any, ctx: Context) -> Tensor:
        check_ids(ids, self.embed.in_features)
        ctx.begin(ids, self.pos.weight.data)
        T = ctx.ids.shape[1]
        x = self.embed(ids if isinstance(ids, Tensor) else ctx.ids, ctx)         # (B, T, C); a soft prompt may lengthen it: ctx knows
        check_length(x, ctx, T, self.pos.in_features)
        x = self.drop(x + self.pos(ctx.positions(), ctx), ctx)
        for block in self.blocks:
            if ctx.output_hidden_states:
                ctx.hidden_states.append(x)
            x = block(x, ctx)
        ctx.last_hidden_state = self.norm(x, ctx)                                           # (B, T, C)
        if ctx.output_hidden_states:
            ctx.hidden_states.append(ctx.last_hidden_state)
        if ctx.cache is not None:
            ctx.cache.advance(ctx)
        rows = self.head.row(ctx.last_hidden_state, ctx) if isinstance(self.head, Classifier) else ctx.select_positions(ctx.last_hidden_state)
        ctx.output = self.head(rows, ctx)
        return ctx.output

    def new_head(self, classes: int, rng: np.random.Generator) -> None:
        "A classifier in the place of the language-model head."
        self.head, self.embed.tied = Classifier(self.config.width, classes, rng, last=True, bias=False), False
        self.head_modules = ("head",)

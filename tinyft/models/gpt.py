"""GPT-2: a causal, pre-norm decoder with learned positions and a tied head.  Radford et al. 2019.

    x = E[ids] + P[pos];   L × (x ← x + attn(norm1 x);  x ← x + mlp(norm2 x));   logits = norm(x) Eᵀ

Linear maps N(0, std²), those that write into the residual stream N(0, std²/2L); embeddings N(0, 0.02²); GELU in its
tanh form; ε = 1e-5.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .. import ops
from ..keywords import checked_keywords
from ..nn import Context, Dropout, Embedding, LayerNorm, Module, TiedHead
from ..tensor import Tensor
from .attention import Attention
from .blocks import (
    MLP,
    Classifier,
    PreNormBlock,
    apply_head,
    check_model_arguments,
    embed_tokens,
    run_blocks,
)
from .config import Config, check_config
from .moe import SwitchConfig, check_switch, feed_forward


@dataclass(frozen=True)
class GPTConfig(Config):
    """Sizes: vocabulary V, positions T, width C, layers L, heads H, feed-forward width F (4 C if None).

    switch: a SwitchConfig for Switch layers, mixtures of experts, in the place of some of the feed-forwards; or None.

    TypeError or ValueError, naming the field, for values from which no model can be built."""
    vocab: int = 50257
    positions: int = 1024
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int | None = None
    dropout: float = 0.0
    eps: float = 1e-5
    std: float = 0.02                                    # of the initial linear maps
    switch: SwitchConfig | None = None

    def __post_init__(self) -> None:
        check_config(self, ("vocab", "positions", "width", "layers", "heads"))
        check_switch("GPTConfig", self.switch, self.layers)


@checked_keywords
class GPT(Module):
    """model(ids (B, T)) -> logits (B, T, V).

    With a new head (tinyft.classifier): class scores (B, classes), from the last real token."""

    def __init__(self, config: GPTConfig = GPTConfig(), seed: int = 0):
        """The parts, with random values from `seed`. Linear maps N(0, std²), those with out_std N(0, std²/2L).

        TypeError unless config is a GPTConfig; TypeError or ValueError for a seed that is no whole number >= 0."""
        check_model_arguments("GPT", config, GPTConfig, seed)
        c = config
        rng = np.random.default_rng(seed)
        hidden = c.hidden or 4 * c.width
        out_std = c.std * (2 * c.layers)**-0.5           # of the maps that write into the residual stream
        self._config = config
        self.out_features = c.width
        self.embed = Embedding(c.vocab, c.width, rng=rng)
        self.pos = Embedding(c.positions, c.width, rng=rng)
        self.drop = Dropout(c.dropout)
        make_mlp = partial(MLP, c.width, hidden, activation=ops.gelu_tanh, rng=rng, dropout=c.dropout, std=c.std,
                           out_std=out_std)
        self.blocks = []
        for i in range(c.layers):
            attn = Attention(c.width, c.heads, causal=True, rng=rng, dropout=c.dropout, std=c.std, out_std=out_std)
            mlp = feed_forward(i, c.switch, make_mlp, rng=rng, std=c.std)
            self.blocks.append(PreNormBlock(attn, mlp, eps=c.eps))
        self.norm = LayerNorm(c.width, eps=c.eps)
        self.head = TiedHead(self.embed)

    config = property(lambda self: self._config)
    head_modules: tuple = ()                             # names of the parts of a new task head
    top_modules = ("norm", "head")

    @property
    def stacks(self) -> dict[str, list[str]]:
        """The paths of the blocks of each stack, bottom to top."""
        return {"decoder": [f"blocks.{i}" for i in range(len(self.blocks))]}

    def forward(self, ids: Any, ctx: Context) -> Tensor:
        x = embed_tokens(self.embed, ids, ctx, positions=self.pos.in_features)   # (B, T, C)
        x = self.drop(x + self.pos(ctx.positions(), ctx), ctx)
        hidden = self.norm(run_blocks(self.blocks, x, ctx), ctx)
        if ctx.cache is not None:
            ctx.cache.advance(ctx)
        return apply_head(self.head, hidden, ctx)

    def new_head(self, classes: int, rng: np.random.Generator) -> None:
        """Put a classifier of the last real token in the place of the language-model head."""
        self.head = Classifier(self.config.width, classes, rng=rng, last=True, bias=False)
        self.embed.tied = False
        self.head_modules = ("head",)

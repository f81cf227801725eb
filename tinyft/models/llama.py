"""Llama: a causal, pre-norm decoder with rotary positions, RMS norms and a gated feed-forward.  Touvron et al. 2023.

    x = E[ids];   L × (x ← x + attn(norm1 x);  x ← x + mlp(norm2 x));   logits = norm(x) Wᵀ

There may be fewer key and value heads than query heads (grouped-query attention). Mistral, Qwen2 and SmolLM2 have this
architecture, too; Qwen2 has biases on q, k and v. In small models the output layer W is the embedding E (tied weights).
In large models it is a linear map of its own. All linear maps start from N(0, std²). The ε of the RMS norms is 1e-5 or
1e-6.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import checks
from ..keywords import checked_keywords
from ..nn import Context, Embedding, Linear, Module, RMSNorm, TiedHead
from ..tensor import Tensor
from .attention import Attention
from .blocks import (
    Classifier,
    GatedMLP,
    PreNormBlock,
    apply_head,
    check_model_arguments,
    embed_tokens,
    run_blocks,
)
from .config import Config, check_config
from .rotary import Rotary, RotaryScaling


@dataclass(frozen=True)
class LlamaConfig(Config):
    """Sizes: vocab V, positions (the largest T), width C, layers L, heads H, hidden F of the feed-forward (None: 4 C).

    key_value_heads  a divisor of H (None: H);  head_width  D (None: C / H)
    rope_base        the base of the rotary angles;  rope_scaling  a change of their frequencies, or None
    tied             True: the output layer is the embedding
    qkv_bias, out_bias, mlp_bias  biases of the maps q, k and v; of o; of the feed-forward
    dropout          of the attention probabilities, the only dropout of a Llama
    eps              the ε of the RMS norms
    std              the standard deviation of the initial weights

    TypeError or ValueError, naming the field, for values from which no model can be built."""
    vocab: int = 32000
    positions: int = 2048
    width: int = 768
    layers: int = 12
    heads: int = 12
    key_value_heads: int | None = None
    head_width: int | None = None
    hidden: int | None = None
    rope_base: float = 10000.0
    rope_scaling: RotaryScaling | None = None
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    dropout: float = 0.0
    eps: float = 1e-6
    std: float = 0.02

    def __post_init__(self) -> None:
        check_config(self, ("vocab", "positions", "width", "layers", "heads"), self.head_width)
        for name in ("key_value_heads", "head_width"):
            if getattr(self, name) is not None:
                checks.whole(f"LlamaConfig: {name}", getattr(self, name), least=1)
        for name in ("tied", "qkv_bias", "out_bias", "mlp_bias"):
            checks.flag(f"LlamaConfig: {name}", getattr(self, name))
        checks.number("LlamaConfig: rope_base", self.rope_base, above=0)
        if self.rope_scaling is not None:
            checks.instance("LlamaConfig: rope_scaling", self.rope_scaling, RotaryScaling, "a RotaryScaling or None")
        if self.heads % (self.key_value_heads or self.heads):
            raise ValueError(f"LlamaConfig: {self.key_value_heads} key/value heads do not divide {self.heads} heads")
        if self.width_of_heads % 2:
            raise ValueError(f"LlamaConfig: rotary positions want heads of an even width, got {self.width_of_heads}")

    @property
    def width_of_heads(self) -> int:
        """The width D of a head."""
        return self.head_width or self.width // self.heads


@checked_keywords
class Llama(Module):
    """model(ids (B, T)) -> logits (B, T, V).

    A model that was loaded from a file without an output layer returns hidden states (B, T, C). With a new head
    (tinyft.classifier) it returns class scores (B, classes), computed from the last real token."""

    def __init__(self, config: LlamaConfig = LlamaConfig(), seed: int = 0):
        """The parts, with random values from `seed`: linear maps N(0, std²).

        TypeError unless config is a LlamaConfig; TypeError or ValueError for a seed that is no whole number >= 0."""
        check_model_arguments("Llama", config, LlamaConfig, seed)
        c = config
        rng = np.random.default_rng(seed)
        rotary = Rotary(c.width_of_heads, base=c.rope_base, scaling=c.rope_scaling)
        self._config = config
        self.out_features = c.width
        self.embed = Embedding(c.vocab, c.width, rng=rng, std=c.std)
        self.blocks = []
        for _ in range(c.layers):
            attn = Attention(c.width, c.heads, causal=True, rng=rng, key_value_heads=c.key_value_heads,
                             head_width=c.head_width, bias=c.qkv_bias, out_bias=c.out_bias, rotary=rotary,
                             dropout=c.dropout, out_dropout=0.0, std=c.std)
            mlp = GatedMLP(c.width, c.hidden or 4 * c.width, rng=rng, bias=c.mlp_bias, std=c.std)
            self.blocks.append(PreNormBlock(attn, mlp, eps=c.eps, norm=RMSNorm))
        self.norm = RMSNorm(c.width, eps=c.eps)
        self.head = TiedHead(self.embed) if c.tied else Linear(c.width, c.vocab, rng=rng, bias=False, std=c.std)

    config = property(lambda self: self._config)         # read-only
    head_modules: tuple = ()                             # names of the parts of a new task head

    @property
    def stacks(self) -> dict[str, list[str]]:
        """The paths of the blocks of each stack, bottom to top."""
        return {"decoder": [f"blocks.{i}" for i in range(len(self.blocks))]}

    @property
    def top_modules(self) -> tuple[str, ...]:
        """The paths of the modules above the blocks."""
        return ("norm",) if self.head is None else ("norm", "head")

    def forward(self, ids: Any, ctx: Context) -> Tensor:
        """The head's output for ids (B, T), or for embeddings (B, T, C) in their place; see apply_head."""
        x = embed_tokens(self.embed, ids, ctx, positions=self.config.positions)  # (B, T, C)
        hidden = self.norm(run_blocks(self.blocks, x, ctx), ctx)
        if ctx.cache is not None:
            ctx.cache.advance(ctx)                       # the new tokens are now part of the cache
        return apply_head(self.head, hidden, ctx)

    def new_head(self, classes: int, rng: np.random.Generator) -> None:
        """Put a classifier of the last real token in the place of the language-model head."""
        self.head = Classifier(self.config.width, classes, rng=rng, last=True, bias=False)
        self.embed.tied = False                          # no output layer shares its weight any more
        self.head_modules = ("head",)

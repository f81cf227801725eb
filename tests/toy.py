"""A small encoder-decoder for tests of methods: two stacks, a third norm, and cross-attention with grouped heads.

    encoder block   x ← x + attn(norm1 x);  x ← x + mlp(norm2 x)
    decoder block   x ← x + attn(norm1 x);  x ← x + cross_attn(norm2 x, source);  x ← x + mlp(norm3 x)

The library's own encoder-decoders come later. A method must work on this one without knowing it.
"""
from __future__ import annotations

from typing import Any

import numpy as np
from contract import Sizes
from helpers import host

from tinyft import ops
from tinyft.models.attention import KV, Attention
from tinyft.models.blocks import MLP, PreNormBlock, run_blocks
from tinyft.nn import Context, Embedding, LayerNorm, Linear, Module
from tinyft.tensor import Tensor

LAYERS = 2
HEADS = 3
QUERY_HEADS = 6                                          # two query heads for each key/value head
KV_HEADS = 3


class CrossAttention(Module):
    """Each group of two query heads looks at one key/value head.    (B, T, C) -> (B, T, C)"""

    def __init__(self, width: int, rng: np.random.Generator):
        self.in_features = self.out_features = width
        self.head_width = width // QUERY_HEADS
        self.q = Linear(width, width, rng=rng)
        self.k = Linear(width, KV_HEADS * self.head_width, rng=rng)
        self.v = Linear(width, KV_HEADS * self.head_width, rng=rng)
        self.kv = KV(KV_HEADS, self.head_width)
        self.o = Linear(width, width, rng=rng)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        B, T, C = x.shape
        group = QUERY_HEADS // KV_HEADS
        source = ctx.scratch["source"]
        q = self.q(x, ctx).reshape(B, T, KV_HEADS, group, self.head_width)
        q = q.permute(0, 2, 3, 1, 4)                                             # (B, H, G, T, D)
        k = self.split(self.k(source, ctx))                                      # (B, H, Tk, D)
        v = self.split(self.v(source, ctx))
        k, v, key_mask = self.kv((k, v, ctx.mask), ctx)
        Tk = k.shape[2]
        k = k.reshape(B, KV_HEADS, 1, Tk, self.head_width)
        v = v.reshape(B, KV_HEADS, 1, Tk, self.head_width)
        scores = (q @ k.permute(0, 1, 2, 4, 3)) * self.head_width**-0.5          # (B, H, G, T, Tk)
        if key_mask is not None:
            hidden = ~key_mask[:, None, None, None, :]                           # (B, 1, 1, 1, Tk)
            scores = scores + hidden.astype(scores.dtype) * -1e9
        y = ops.softmax(scores) @ v                                              # (B, H, G, T, D)
        return self.o(y.permute(0, 3, 1, 2, 4).reshape(B, T, C), ctx)

    def split(self, x: Tensor) -> Tensor:
        """(B, Tk, H D) -> (B, H, Tk, D)"""
        B, Tk, _ = x.shape
        return x.reshape(B, Tk, KV_HEADS, self.head_width).permute(0, 2, 1, 3)


class DecoderBlock(Module):
    """A block with three sublayers."""

    sublayers = [("attn", "norm1"), ("cross_attn", "norm2"), ("mlp", "norm3")]

    def __init__(self, width: int, hidden: int, rng: np.random.Generator):
        self.in_features = self.out_features = width
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, HEADS, causal=True, rng=rng)
        self.norm2 = LayerNorm(width)
        self.cross_attn = CrossAttention(width, rng)
        self.norm3 = LayerNorm(width)
        self.mlp = MLP(width, hidden, activation=ops.gelu, rng=rng)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x = x + self.attn(self.norm1(x, ctx), ctx)
        x = x + self.cross_attn(self.norm2(x, ctx), ctx)
        return x + self.mlp(self.norm3(x, ctx), ctx)


class EncoderDecoder(Module):
    """model(ids (B, T)) -> logits (B, T, V). The encoder reads the same ids as the decoder."""

    top_modules = ("encoder_norm", "norm", "head")
    head_modules: tuple = ()

    def __init__(self, seed: int = 0):
        s = Sizes("gpt")
        rng = np.random.default_rng(seed)
        self.embed = Embedding(s.V, s.C, rng=rng)
        self.pos = Embedding(s.P, s.C, rng=rng)
        self.encoder = []
        self.decoder = []
        for _ in range(LAYERS):
            attn = Attention(s.C, HEADS, causal=False, rng=rng)
            self.encoder.append(PreNormBlock(attn, MLP(s.C, s.F, activation=ops.gelu, rng=rng), eps=1e-5))
            self.decoder.append(DecoderBlock(s.C, s.F, rng))
        self.encoder_norm = LayerNorm(s.C)
        self.norm = LayerNorm(s.C)
        self.bias_table = Embedding(s.P, s.C, rng=rng)   # a name with "bias" in it, and no bias
        self.head = Linear(s.C, s.V, rng=rng)

    @property
    def stacks(self) -> dict[str, list[str]]:
        encoder = [f"encoder.{i}" for i in range(LAYERS)]
        decoder = [f"decoder.{i}" for i in range(LAYERS)]
        return {"encoder": encoder, "decoder": decoder}

    def forward(self, ids: Any, ctx: Context) -> Tensor:
        ctx.begin(ids, self.embed.weight.data)
        x = self.embed(ctx.ids, ctx) + self.pos(ctx.positions(), ctx) + self.bias_table(ctx.positions(), ctx)
        ctx.scratch["source"] = self.encoder_norm(run_blocks(self.encoder, x, ctx), ctx)
        x = run_blocks(self.decoder, x, ctx)
        ctx.last_hidden_state = self.norm(x, ctx)
        ctx.output = self.head(ctx.select_positions(ctx.last_hidden_state), ctx)
        return ctx.output


def build_toy(kind: str = "gpt", seed: int = 0) -> EncoderDecoder:
    """The toy model in eval mode, all tensors at generic points. `kind` is ignored: it fits contract.build."""
    model = EncoderDecoder(seed)
    rng = np.random.default_rng(seed + 100)
    for p in model.parameters():
        p.copy_(host(p) + rng.standard_normal(p.shape) * (0.3 if p.ndim > 1 else 0.1))
    return model.eval()

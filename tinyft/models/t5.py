"""T5: an encoder-decoder with relative positions, v1.0 and v1.1.  Raffel et al. 2019, arXiv:1910.10683.

    x = E[ids]
    encoder:  Le × (x ← x + attn(norm1 x);  x ← x + mlp(norm2 x)),   then a norm
    decoder:  Ld × (x ← x + attn(norm1 x);  x ← x + cross_attn(norm2 x, source);  x ← x + mlp(norm3 x)),   then a norm
    attention scores  q·k + R[bucket(position of the key − position of the query)]

RMS norms and no biases. Scores are not divided by √D. The initial q maps are smaller by this factor instead. All blocks
of a stack share one table R (buckets, H), which the first block owns. Cross-attention has no R. Source and text share
one embedding E, and in v1.0 the output layer shares it, too.

v1.0: mlp = down(relu(up x)),                     logits = C^(−1/2) x Eᵀ
v1.1: mlp = down(gelu(gate x) ⊙ up x),            logits = x Wᵀ, W a map of its own

Departure: no dropout inside the feed-forward, between its two maps. All other dropout has one probability.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import array, checks, ops
from ..keywords import checked_keywords
from ..nn import Context, Dropout, Embedding, Linear, Module, Parameter, RMSNorm, TiedHead
from ..tensor import Tensor
from .attention import Attention
from .blocks import (
    MLP,
    GatedMLP,
    PreNormBlock,
    PreNormDecoderBlock,
    apply_head,
    check_model_arguments,
    embed_tokens,
    geglu,
    run_blocks,
)
from .config import Config, check_config
from .encoder_decoder import EncoderDecoder

FEED_FORWARDS = ("relu", "gated-gelu", "gated-silu")


@dataclass(frozen=True)
class T5Config(Config):
    """Sizes: vocabulary V, width C, layers Le, heads H of width D, feed-forward width F (None: 4 C).

    decoder_layers   the number of the decoder's layers; None: that of the encoder
    buckets          the number of buckets of relative positions, the rows of R
    max_distance     from this distance on, all share the last bucket
    feed_forward     "relu" (v1.0), "gated-gelu" (v1.1) or "gated-silu"
    tied             True (v1.0): the output layer is the embedding, and its input is divided by √C
    start            the token with which the decoder's text begins. In T5 it is the padding token, 0
    positions        the usual length of a text. The model takes longer ones
    std              a factor on the initial values' standard deviations. 1 gives those of the paper's code

    TypeError or ValueError, naming the field, for values from which no model can be built."""
    vocab: int = 32128
    positions: int = 512
    width: int = 512
    layers: int = 6
    heads: int = 8
    head_width: int = 64
    hidden: int | None = None
    decoder_layers: int | None = None
    buckets: int = 32
    max_distance: int = 128
    feed_forward: str = "relu"
    tied: bool = True
    start: int = 0
    dropout: float = 0.0
    eps: float = 1e-6
    std: float = 1.0

    def __post_init__(self) -> None:
        check_config(self, ("vocab", "positions", "width", "layers", "heads", "head_width"), self.head_width)
        if self.decoder_layers is not None:
            checks.whole("T5Config: decoder_layers", self.decoder_layers, least=1)
        checks.whole("T5Config: buckets", self.buckets, least=4)
        checks.whole("T5Config: max_distance", self.max_distance, least=1)
        if self.buckets % 2 or self.max_distance <= self.buckets // 2:
            raise ValueError("T5Config wants an even number of buckets and a max_distance above half of it, got "
                             f"{self.buckets} and {self.max_distance}")
        checks.one_of("T5Config: feed_forward", self.feed_forward, FEED_FORWARDS)
        checks.flag("T5Config: tied", self.tied)
        checks.whole("T5Config: start", self.start, least=0, most=self.vocab - 1)


# ── relative positions ───────────────────────────────────────────────────────────────────────────────────────────────
def relative_buckets(distance: np.ndarray, buckets: int, max_distance: int, *, both_sides: bool) -> np.ndarray:
    """The bucket of each distance, position of the key − position of the query: integers of the same shape.

    Half of the buckets hold one distance each: 0, 1, 2, ... The others are wider and wider, each by the same factor, up
    to max_distance. All larger distances are in the last bucket. With 8 buckets, max_distance = 16 and keys before the
    query:

        distance  0   1   2   3   4 5   6 7   8 ... 11   12 ...
        bucket    0   1   2   3   4     5     6          7

    both_sides   True, in the encoder: the first half of the buckets is for keys up to the query, the second half for
                 later keys, each as above. False, in the decoder: a later key gets bucket 0. It does not matter,
                 because causal attention hides it

    The logarithm is rounded to float32, as in T5's code: some distances lie on the boundary of two buckets."""
    first = np.zeros_like(distance)                      # the first bucket of the key's side
    if both_sides:
        buckets //= 2
        first = np.where(distance > 0, buckets, 0)
        n = np.abs(distance)
    else:
        n = np.maximum(-distance, 0)
    exact = buckets // 2                                 # the distances 0 ... exact − 1 have a bucket each
    position = np.log(np.maximum(n, 1).astype(np.float32) / np.float32(exact))
    position = position / np.float32(math.log(max_distance / exact))             # 0 at exact, 1 at max_distance
    large = exact + (position * np.float32(buckets - exact)).astype(np.int64)
    return first + np.where(n < exact, n, np.minimum(large, buckets - 1))


class RelativeBias(Module):
    """bias[h, i, j] = R[bucket(j − i), h].    R (buckets, H);  (Tq, Tk) -> (1, H, Tq, Tk)

    The queries are the last Tq positions: with a cache, there are more keys than queries. All layers of a pass share
    the result, which ctx.scratch keeps."""

    def __init__(self, c: T5Config, rng: np.random.Generator, *, both_sides: bool):
        self.weight = Parameter(array.normal(rng, (c.buckets, c.heads), c.std * c.width**-0.5))
        self.max_distance = c.max_distance
        self.both_sides = both_sides

    def extra_repr(self) -> str:
        """The settings that `print` shows."""
        return f"max_distance={self.max_distance}" + (", both sides" if self.both_sides else "")

    def forward(self, lengths: tuple[int, int], ctx: Context) -> Tensor:
        """The bias (1, H, Tq, Tk) for lengths Tq and Tk."""
        key = ("relative bias", id(self), lengths)
        if key not in ctx.scratch:
            queries, keys = lengths
            buckets, heads = self.weight.shape
            i = np.arange(keys - queries, keys)[:, None]                         # positions of the queries
            distance = np.arange(keys)[None] - i                                 # (Tq, Tk)
            found = relative_buckets(distance, buckets, self.max_distance, both_sides=self.both_sides)
            weight = self.read("weight")
            rows = ops.embedding(weight, array.put_like(found.reshape(-1), weight.data))
            ctx.scratch[key] = rows.permute(1, 0).reshape(1, heads, queries, keys)
        return ctx.scratch[key]


class FirstLayersBias(Module):
    """The relative bias of the other layers: that of the stack's first layer, which owns the table R."""

    def __init__(self, owner: RelativeBias):
        self._owner = owner                              # the underscore: a reference, not a part of this module

    def forward(self, lengths: tuple[int, int], ctx: Context) -> Tensor:
        """The bias (1, H, Tq, Tk) for lengths Tq and Tk."""
        return self._owner(lengths, ctx)


class ScaledTiedHead(TiedHead):
    """logits = C^(−1/2) x Eᵀ.    (..., C) -> (..., V)"""

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """x divided by √C, times Eᵀ"""
        return super().forward(x * self.in_features**-0.5, ctx)


# ── the model ────────────────────────────────────────────────────────────────────────────────────────────────────────
@checked_keywords
class T5(EncoderDecoder):
    """model(ids (B, T), source_ids=(B, Ts), source_mask=...) -> logits (B, T, V).

    ids: the decoder's text, from the start token on. Without a head, the decoder's hidden states (B, T, C)."""

    def __init__(self, config: T5Config = T5Config(), seed: int = 0):
        """The parts, with random values from `seed`.

        TypeError unless config is a T5Config; TypeError or ValueError for a seed that is no whole number >= 0."""
        check_model_arguments("T5", config, T5Config, seed)
        c = config
        rng = np.random.default_rng(seed)
        self._config = config
        self.out_features = c.width
        self.embed = Embedding(c.vocab, c.width, rng=rng, std=c.std)
        self.drop = Dropout(c.dropout)
        self.encoder = []
        bias: Module = RelativeBias(c, rng, both_sides=True)
        for _ in range(c.layers):
            attn = attention(c, rng, relative_bias=bias)
            self.encoder.append(PreNormBlock(attn, feed_forward(c, rng), eps=c.eps, norm=RMSNorm))
            bias = FirstLayersBias(self.encoder[0].attn.relative_bias)           # of the next layer
        self.encoder_norm = RMSNorm(c.width, eps=c.eps)
        self.decoder = []
        bias = RelativeBias(c, rng, both_sides=False)
        for _ in range(c.decoder_layers or c.layers):
            attn = attention(c, rng, causal=True, relative_bias=bias)
            cross_attn = attention(c, rng, cross=True)
            mlp = feed_forward(c, rng)
            self.decoder.append(PreNormDecoderBlock(attn, cross_attn, mlp, eps=c.eps, norm=RMSNorm))
            bias = FirstLayersBias(self.decoder[0].attn.relative_bias)           # of the next layer
        self.norm = RMSNorm(c.width, eps=c.eps)
        if c.tied:
            self.head: Any = ScaledTiedHead(self.embed)
        else:
            self.head = Linear(c.width, c.vocab, rng=rng, bias=False, std=c.std)

    config = property(lambda self: self._config)

    @property
    def top_modules(self) -> tuple[str, ...]:
        """The paths of the modules above the blocks of a stack."""
        norms = ("encoder_norm", "norm")
        return norms if self.head is None else (*norms, "head")

    def forward(self, ids: Any, ctx: Context) -> Tensor:
        """The head's output for ids (B, T), or for embeddings (B, T, C) in their place; see apply_head.

        ctx has source_ids (B, Ts), or source, the result of `encode`. ValueError without a source."""
        self.find_source(ctx)                            # runs the encoder, unless its output is there
        x = self.drop(embed_tokens(self.embed, ids, ctx, positions=None), ctx)   # (B, T, C)
        self.check_rows(ctx)                             # a row of source for each row of ids
        hidden = self.drop(self.norm(run_blocks(self.decoder, x, ctx), ctx), ctx)
        if ctx.cache is not None:
            ctx.cache.advance(ctx)                       # the next pass continues after these positions
        return apply_head(self.head, hidden, ctx)

    def encoder_pass(self, ids: Any, ctx: Context) -> Tensor:
        """The encoder's hidden states (B, Ts, C) for source ids (B, Ts)."""
        x = self.drop(embed_tokens(self.embed, ids, ctx, positions=None), ctx)
        return self.drop(self.encoder_norm(run_blocks(self.encoder, x, ctx), ctx), ctx)


def attention(c: T5Config, rng: np.random.Generator, **kind: Any) -> Attention:
    """An attention of T5, with random values from rng. kind: causal, cross, relative_bias.

    Scores are not divided by √D; the initial map q is smaller by that factor instead. Standard deviations, as in the
    paper's code: (C D)^(−1/2) for q, C^(−1/2) for k and v, (H D)^(−1/2) for the output map."""
    attn = Attention(c.width, c.heads, rng=rng, head_width=c.head_width, scale=1.0, bias=False, dropout=c.dropout,
                     std=c.std * c.width**-0.5, out_std=c.std * (c.heads * c.head_width)**-0.5, **kind)
    attn.q.weight.data = attn.q.weight.data * np.float32(c.head_width**-0.5)
    return attn


def feed_forward(c: T5Config, rng: np.random.Generator) -> Module:
    """A feed-forward of T5, with random values from rng.

    Standard deviations, as in the paper's code: C^(−1/2) for the maps to the hidden layer, F^(−1/2) for that back."""
    hidden = c.hidden or 4 * c.width
    std = {"std": c.std * c.width**-0.5, "out_std": c.std * hidden**-0.5}
    if c.feed_forward == "relu":
        return MLP(c.width, hidden, activation=ops.relu, rng=rng, bias=False, dropout=c.dropout, **std)
    product = geglu if c.feed_forward == "gated-gelu" else ops.swiglu
    return GatedMLP(c.width, hidden, rng=rng, product=product, dropout=c.dropout, **std)

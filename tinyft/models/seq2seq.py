"""The encoder-decoder of 2017, with the layout of Marian's checkpoints.  Vaswani et al. 2017, arXiv:1706.03762;
Junczys-Dowmunt et al. 2018, arXiv:1804.00344.

    x = √C E[ids] + S[pos],   S fixed sinusoids
    encoder:  Le × (x ← norm1(x + attn x);  x ← norm2(x + mlp x))
    decoder:  Ld × (x ← norm1(x + attn x);  x ← norm2(x + cross_attn(x, source));  x ← norm3(x + mlp x))
    logits = x Eᵀ + b

Source, text and output layer share one embedding E.

Initial values: linear maps from N(0, std²). E from N(0, 1/C), so that the entries of √C E have standard deviation 1.
Without the factor √C (scaled=False), E from N(0, std²) too. ε = 1e-5 in the norms.

Departures: the bias b of the output layer trains; in transformers it is a buffer. Positions count real tokens only, so
padding on the left gives the outputs of the text alone.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .. import array, checks, ops
from ..keywords import checked_keywords
from ..nn import Context, Dropout, Embedding, Module, TiedHead
from ..tensor import Tensor
from .attention import Attention
from .blocks import (
    MLP,
    PostNormBlock,
    PostNormDecoderBlock,
    apply_head,
    check_model_arguments,
    embed_tokens,
    run_blocks,
    sinusoids,
)
from .config import Config, check_config
from .encoder_decoder import EncoderDecoder
from .moe import SwitchConfig, check_switch, feed_forward

# The activations of the feed-forward, by the name of the setting.
ACTIVATIONS = {"relu": ops.relu, "gelu": ops.gelu, "silu": ops.silu}


@dataclass(frozen=True)
class Seq2SeqConfig(Config):
    """Sizes: vocabulary V, positions T, width C, layers Le, heads H, feed-forward width F (None: 4 C).

    decoder_layers, decoder_heads, decoder_hidden   the decoder's sizes; None: those of the encoder
    activation   of the feed-forward: "relu" (Vaswani et al.), "gelu" or "silu" (Marian calls it swish)
    scaled       True: embeddings are multiplied by √C
    switch       a SwitchConfig for Switch layers, mixtures of experts, in both stacks; or None
    start        the token with which the decoder's text begins. In Marian's checkpoints it is the padding token
    positions    T, the longest text
    std          standard deviation of the initial linear maps

    TypeError or ValueError, naming the field, for values from which no model can be built."""
    vocab: int = 58101
    positions: int = 512
    width: int = 512
    layers: int = 6
    heads: int = 8
    hidden: int | None = None
    decoder_layers: int | None = None
    decoder_heads: int | None = None
    decoder_hidden: int | None = None
    activation: str = "relu"
    scaled: bool = True
    start: int = 0
    dropout: float = 0.0
    eps: float = 1e-5
    std: float = 0.02
    switch: SwitchConfig | None = None

    def __post_init__(self) -> None:
        check_config(self, ("vocab", "positions", "width", "layers", "heads"))
        for depth in (self.layers, self.decoder_layers or self.layers):
            check_switch("Seq2SeqConfig", self.switch, depth)
        for name in ("decoder_layers", "decoder_heads", "decoder_hidden"):
            if getattr(self, name) is not None:
                checks.whole(f"Seq2SeqConfig: {name}", getattr(self, name), least=1)
        if self.width % (self.decoder_heads or self.heads):
            raise ValueError(f"Seq2SeqConfig: {self.decoder_heads} heads do not divide a width of {self.width}")
        if self.width % 2:
            raise ValueError(f"Seq2SeqConfig: sinusoidal positions want an even width, got {self.width}")
        checks.one_of("Seq2SeqConfig: activation", self.activation, ACTIVATIONS)
        checks.flag("Seq2SeqConfig: scaled", self.scaled)
        checks.whole("Seq2SeqConfig: start", self.start, least=0, most=self.vocab - 1)


class SinusoidalPositions(Module):
    """y = x + S[pos].    S (P, C) fixed sinusoids of P positions, (B, T, C) -> (B, T, C)"""

    def __init__(self, positions: int, width: int):
        self.register_buffer("table", array.asarray(sinusoids(positions, width)), persistent=False)

    in_features = property(lambda self: self.table.shape[0])
    out_features = property(lambda self: self.table.shape[1])

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """x plus the row of S for each of its positions, in the dtype of x."""
        return x + Tensor(self.table[ctx.positions()].astype(x.dtype))


@checked_keywords
class Seq2Seq(EncoderDecoder):
    """model(ids (B, T), source_ids=(B, Ts), source_mask=...) -> logits (B, T, V).

    ids: the decoder's text, from the start token on. Without a head, the decoder's hidden states (B, T, C)."""

    top_modules: tuple[str, ...] = ("head",)             # the paths of the modules above the blocks

    def __init__(self, config: Seq2SeqConfig = Seq2SeqConfig(), seed: int = 0):
        """The parts, with random values from `seed`.

        TypeError unless config is a Seq2SeqConfig; TypeError or ValueError for a seed that is no whole number >= 0."""
        check_model_arguments("Seq2Seq", config, Seq2SeqConfig, seed)
        c = config
        rng = np.random.default_rng(seed)
        self._config = config
        self.out_features = c.width
        self.embed = Embedding(c.vocab, c.width, rng=rng, std=c.width**-0.5 if c.scaled else c.std)
        self.pos = SinusoidalPositions(c.positions, c.width)
        self.drop = Dropout(c.dropout)
        self.encoder = [encoder_block(c, i, rng) for i in range(c.layers)]
        self.decoder = [decoder_block(c, i, rng) for i in range(c.decoder_layers or c.layers)]
        self.head = TiedHead(self.embed, bias=True)

    config = property(lambda self: self._config)

    def forward(self, ids: Any, ctx: Context) -> Tensor:
        """The head's output for ids (B, T), or for embeddings (B, T, C) in their place; see apply_head.

        ctx has source_ids (B, Ts), or source, the result of `encode`. ValueError without a source."""
        self.find_source(ctx)                            # runs the encoder, unless its output is there
        x = self.embed_text(ids, ctx)                                            # (B, T, C)
        self.check_rows(ctx)                             # a row of source for each row of ids
        hidden = run_blocks(self.decoder, x, ctx)
        if ctx.cache is not None:
            ctx.cache.advance(ctx)                       # the next pass continues after these positions
        return apply_head(self.head, hidden, ctx)

    def encoder_pass(self, ids: Any, ctx: Context) -> Tensor:
        """The encoder's hidden states (B, Ts, C) for source ids (B, Ts)."""
        return run_blocks(self.encoder, self.embed_text(ids, ctx), ctx)

    def embed_text(self, ids: Any, ctx: Context) -> Tensor:
        """√C E[ids] + S[pos], for the source and for the decoder's text: (B, T) -> (B, T, C)"""
        x = embed_tokens(self.embed, ids, ctx, positions=self.config.positions)
        if self.config.scaled:
            x = x * self.config.width**0.5
        return self.drop(self.pos(x, ctx), ctx)


def encoder_block(c: Seq2SeqConfig, layer: int, rng: np.random.Generator) -> PostNormBlock:
    """Block `layer` of the encoder, counted from 0, with random values from rng."""
    attn = Attention(c.width, c.heads, rng=rng, dropout=c.dropout, std=c.std)
    make_mlp = partial(MLP, c.width, c.hidden or 4 * c.width, activation=ACTIVATIONS[c.activation], rng=rng,
                       dropout=c.dropout, std=c.std)
    mlp = feed_forward(layer, c.switch, make_mlp, rng=rng, std=c.std)
    return PostNormBlock(attn, mlp, eps=c.eps)


def decoder_block(c: Seq2SeqConfig, layer: int, rng: np.random.Generator) -> PostNormDecoderBlock:
    """Block `layer` of the decoder, counted from 0, with random values from rng."""
    heads = c.decoder_heads or c.heads
    hidden = c.decoder_hidden or c.hidden or 4 * c.width
    attn = Attention(c.width, heads, causal=True, rng=rng, dropout=c.dropout, std=c.std)
    cross_attn = Attention(c.width, heads, cross=True, rng=rng, dropout=c.dropout, std=c.std)
    make_mlp = partial(MLP, c.width, hidden, activation=ACTIVATIONS[c.activation], rng=rng, dropout=c.dropout,
                       std=c.std)
    mlp = feed_forward(layer, c.switch, make_mlp, rng=rng, std=c.std)
    return PostNormDecoderBlock(attn, cross_attn, mlp, eps=c.eps)

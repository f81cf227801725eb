"""BERT: a bidirectional, post-norm encoder with token types.  Devlin et al. 2018.

    x = norm0(E[ids] + P[pos] + S[types]);   L × (x ← norm1(x + attn x);  x ← norm2(x + mlp x))

Heads: masked language model  logits = norm(gelu(W x + b)) Eᵀ + b';  classifier  Wc tanh(Wp x_[CLS] + bp) + bc;  none.
Linear maps N(0, std²), embeddings N(0, 0.02²); GELU in its exact form; ε = 1e-12 everywhere.

Two later models are this one with other settings:
DistilBERT (Sanh et al. 2019) has no token types, and a ReLU in the place of the classifier's tanh.
RoBERTa (Liu et al. 2019) starts its positions at a later row of P, and its classifier has a tanh layer of its own.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .. import checks, ops
from ..array import xp
from ..context import WANTED_TYPES, check_range, read_integers
from ..keywords import checked_keywords
from ..nn import Context, Dropout, Embedding, LayerNorm, Linear, Module, TiedHead
from ..tensor import Tensor
from .attention import Attention
from .blocks import (
    MLP,
    Classifier,
    PostNormBlock,
    apply_head,
    check_model_arguments,
    embed_tokens,
    run_blocks,
)
from .config import Config, check_config
from .moe import SwitchConfig, check_switch, feed_forward

# The activations of the pooler, by the name of the setting.
POOLER_ACTIVATIONS = {"tanh": ops.tanh, "relu": ops.relu}


@dataclass(frozen=True)
class BERTConfig(Config):
    """Sizes: vocabulary V, positions T, token types S, width C, layers L, heads H, feed-forward width F (None: 4 C).

    token_types        0: the model has none (DistilBERT)
    first_position     the row of P for the first token; the rows before it are not used (RoBERTa: 2 or another)
    pooler_activation  of the layer below a classifier: "tanh" or "relu" (DistilBERT)
    switch             a SwitchConfig for Switch layers, mixtures of experts, in the place of some of the feed-forwards
    keep_pooler        True: a new classifier reads the pooler of the model, which pretraining has trained.
                       False: a new classifier gets a new pooler (RoBERTa)

    TypeError or ValueError, naming the field, for values from which no model can be built."""
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
    first_position: int = 0
    pooler_activation: str = "tanh"
    keep_pooler: bool = True
    switch: SwitchConfig | None = None

    def __post_init__(self) -> None:
        check_config(self, ("vocab", "positions", "width", "layers", "heads"))
        check_switch("BERTConfig", self.switch, self.layers)
        checks.whole("BERTConfig: token_types", self.token_types, least=0)
        checks.whole("BERTConfig: first_position", self.first_position, least=0)
        checks.one_of("BERTConfig: pooler_activation", self.pooler_activation, POOLER_ACTIVATIONS)
        checks.flag("BERTConfig: keep_pooler", self.keep_pooler)


class MaskedHead(Module):
    """logits = norm(gelu(W x + b)) Eᵀ + b'.    (..., C) -> (..., V)"""

    def __init__(self, embed: Embedding, *, eps: float, rng: np.random.Generator):
        width = embed.out_features
        self.dense = Linear(width, width, rng=rng)
        self.norm = LayerNorm(width, eps=eps)
        self.decoder = TiedHead(embed, bias=True)

    in_features = property(lambda self: self.dense.in_features)
    out_features = property(lambda self: self.decoder.out_features)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.decoder(self.norm(ops.gelu(self.dense(x, ctx)), ctx), ctx)


class Pooler(Module):
    """tanh(W x_[CLS] + b), or relu(W x_[CLS] + b).    (B, C) -> (B, C)

    activation: "tanh" or "relu"."""

    def __init__(self, width: int, *, rng: np.random.Generator, activation: str = "tanh"):
        self.dense = Linear(width, width, rng=rng, std=width**-0.5)     # so W x is about as large as x
        self._activation = POOLER_ACTIVATIONS[activation]

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self._activation(self.dense(x, ctx))


@checked_keywords
class BERT(Module):
    """model(ids (B, T), mask=..., token_type_ids=...) -> the output of its head.

    head="mlm": logits (B, T, V) of the masked-language-model head.  head=None: hidden states (B, T, C).  With a new
    head (tinyft.classifier): class scores (B, classes)."""

    def __init__(
        self,
        config: BERTConfig = BERTConfig(),
        seed: int = 0,
        head: str | None = "mlm",
        pooler: bool = False,
    ):
        """The parts, with random values from `seed`. head: "mlm" or None. pooler: a layer for a classifier.

        TypeError or ValueError for an argument of another kind or value."""
        check_model_arguments("BERT", config, BERTConfig, seed)
        checks.one_of("BERT: head", head, ("mlm", None))
        checks.flag("BERT: pooler", pooler)
        c = config
        rng = np.random.default_rng(seed)
        hidden = c.hidden or 4 * c.width
        self._config = config
        self.out_features = c.width
        self.embed = Embedding(c.vocab, c.width, rng=rng)
        self.pos = Embedding(c.first_position + c.positions, c.width, rng=rng)
        self.type = Embedding(c.token_types, c.width, rng=rng) if c.token_types else None
        self.norm0 = LayerNorm(c.width, eps=c.eps)
        self.drop = Dropout(c.dropout)
        make_mlp = partial(MLP, c.width, hidden, activation=ops.gelu, rng=rng, dropout=c.dropout, std=c.std)
        self.blocks = []
        for i in range(c.layers):
            attn = Attention(c.width, c.heads, causal=False, rng=rng, dropout=c.dropout, std=c.std)
            mlp = feed_forward(i, c.switch, make_mlp, rng=rng, std=c.std)
            self.blocks.append(PostNormBlock(attn, mlp, eps=c.eps))
        self.pooler = Pooler(c.width, rng=rng, activation=c.pooler_activation) if pooler else None
        self.head = MaskedHead(self.embed, eps=c.eps, rng=rng) if head == "mlm" else None

    config = property(lambda self: self._config)
    head_modules: tuple = ()                             # names of the parts of a new task head

    @property
    def stacks(self) -> dict[str, list[str]]:
        """The paths of the blocks of each stack, bottom to top."""
        return {"encoder": [f"blocks.{i}" for i in range(len(self.blocks))]}

    @property
    def top_modules(self) -> tuple[str, ...]:
        """The paths of the modules above the blocks."""
        return tuple(name for name in ("pooler", "head") if getattr(self, name) is not None)

    def forward(self, ids: Any, ctx: Context) -> Tensor:
        """The head's output for ids (B, T), or for embeddings (B, T, C) in their place; see apply_head.

        ctx holds mask and token types; without token types, all are 0. ValueError if ctx has a cache, or token types
        for a model without them; IndexError for a token type that the model does not have."""
        if ctx.cache is not None:
            raise ValueError("BERT looks both ways: its keys and values cannot be cached; call it without cache=")
        check_token_types(ctx.token_type_ids, self.config.token_types)
        x = embed_tokens(self.embed, ids, ctx, positions=self.config.positions)  # (B, T, C)
        x = x + self.pos(ctx.positions(first=self.config.first_position), ctx)
        if self.type is not None:
            token_type_ids = ctx.token_type_ids
            if token_type_ids is None:
                token_type_ids = xp(ctx.ids).zeros_like(ctx.ids)
            x = x + self.type(token_type_ids, ctx)
        x = self.drop(self.norm0(x, ctx), ctx)
        x = run_blocks(self.blocks, x, ctx)
        return apply_head(self.head, x, ctx, self.pooler)

    def new_head(self, classes: int, rng: np.random.Generator) -> None:
        """Put a classifier of the pooled [CLS] in the place of the present head, with values from rng.

        A model without a pooler gets one, and so does a model whose pooler is not kept (RoBERTa): the pooler is then
        part of the new head. `head_modules` names the new parts: the first method that is attached trains them too, and
        its adapter file holds them."""
        c = self.config
        needs_pooler = self.pooler is None or not c.keep_pooler
        pooler = Pooler(c.width, rng=rng, activation=c.pooler_activation) if needs_pooler else self.pooler
        head = Classifier(c.width, classes, rng=rng, last=False, dropout=c.dropout)
        self.pooler = pooler                             # both parts were made: nothing fails from here on
        self.head = head
        self.head_modules = ("head", "pooler") if needs_pooler else ("head",)
        self.embed.tied = False                          # the masked-language-model head shared the embedding's weight


def check_token_types(token_type_ids: Any, types: int) -> None:
    """TypeError for token types that are no integers, IndexError for one outside 0 ... types − 1.

    ValueError for any token types if the model has none (types = 0). Only the values of host arrays and lists are
    checked: reading a device array would wait for the device."""
    if types == 0 and token_type_ids is not None:
        raise ValueError("this model has no token types: call it without token_type_ids=")
    if isinstance(token_type_ids, (np.ndarray, list, tuple)):
        values = read_integers("token_type_ids", token_type_ids, WANTED_TYPES)
        check_range("token type", values, types, f"the {types} types of the model")

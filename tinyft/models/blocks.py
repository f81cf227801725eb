"""The parts of every transformer here, under the same leaf names in every model:

    attn.q  attn.k  attn.v  attn.o  attn.kv       mlp.up  mlp.down  mlp.gate       norm1  norm2

Attention is in attention.py. B batch, T time, C width, F feed-forward width, V vocabulary.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import checks, ops
from ..array import Array, is_array, xp
from ..context import WANTED_IDS, check_range, read_integers
from ..nn import Context, Dropout, Embedding, LayerNorm, Linear, Module
from ..recomputation import run_block
from ..tensor import Tensor
from .attention import Attention


class MLP(Module):
    """down(act(up(x))).    (..., C) -> (..., F) -> (..., C)"""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: Callable,
        rng: np.random.Generator,
        bias: bool = True,
        dropout: float = 0.0,
        std: float = 0.02,
        out_std: float | None = None,
    ):
        """width C, hidden F. std: standard deviation of the initial maps;  out_std: of `down`, if it is another."""
        self.in_features = self.out_features = width
        self.up = Linear(width, hidden, rng=rng, bias=bias, std=std)
        self.down = Linear(hidden, width, rng=rng, bias=bias, std=out_std or std)
        self.drop = Dropout(dropout)
        self._activation = activation

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.drop(self.down(self._activation(self.up(x, ctx)), ctx), ctx)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) ⊙ up, with GELU in its tanh form.    (..., F), (..., F) -> (..., F)      (T5 v1.1; Shazeer 2020)"""
    return ops.gelu_tanh(gate) * up


class GatedMLP(Module):
    """down(silu(gate x) ⊙ up x).    (..., C) -> (..., F) -> (..., C)      (Llama; Shazeer 2020)

    product: another function of (gate x, up x) than silu(gate x) ⊙ up x, such as geglu."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        rng: np.random.Generator,
        product: Callable = ops.swiglu,
        bias: bool = False,
        dropout: float = 0.0,
        std: float = 0.02,
        out_std: float | None = None,
    ):
        """width C, hidden F. std: standard deviation of the initial maps;  out_std: of `down`, if it is another."""
        self.in_features = self.out_features = width
        self.gate = Linear(width, hidden, rng=rng, bias=bias, std=std)
        self.up = Linear(width, hidden, rng=rng, bias=bias, std=std)
        self.down = Linear(hidden, width, rng=rng, bias=bias, std=out_std or std)
        self.drop = Dropout(dropout)
        self._product = product

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        hidden = self._product(self.gate(x, ctx), self.up(x, ctx))               # (..., F)
        return self.drop(self.down(hidden, ctx), ctx)


class PreNormBlock(Module):
    """x ← x + attn(norm1 x);  x ← x + mlp(norm2 x)      (GPT-2; Llama with norm=RMSNorm)"""
    sublayers = [("attn", "norm1"), ("mlp", "norm2")]    # (module, its norm), in the order in which they run

    def __init__(self, attn: Attention, mlp: Module, *, eps: float, norm: type[Module] = LayerNorm):
        width = attn.in_features
        self.in_features = self.out_features = width
        self.norm1 = norm(width, eps=eps)
        self.attn = attn
        self.norm2 = norm(width, eps=eps)
        self.mlp = mlp

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x = x + self.attn(self.norm1(x, ctx), ctx)
        return x + self.mlp(self.norm2(x, ctx), ctx)


class PostNormBlock(Module):
    """x ← norm1(x + attn x);  x ← norm2(x + mlp x)      (BERT, and the transformer of 2017)"""
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


class PreNormDecoderBlock(Module):
    """x ← x + attn(norm1 x);  x ← x + cross_attn(norm2 x);  x ← x + mlp(norm3 x)      (T5, with norm=RMSNorm)"""
    sublayers = [("attn", "norm1"), ("cross_attn", "norm2"), ("mlp", "norm3")]

    def __init__(self, attn: Attention, cross_attn: Attention, mlp: Module, *, eps: float,
                 norm: type[Module] = LayerNorm):
        width = attn.in_features
        self.in_features = self.out_features = width
        self.norm1 = norm(width, eps=eps)
        self.attn = attn
        self.norm2 = norm(width, eps=eps)
        self.cross_attn = cross_attn
        self.norm3 = norm(width, eps=eps)
        self.mlp = mlp

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """x (B, T, C) -> (B, T, C); ctx.source is the encoder's Context."""
        x = x + self.attn(self.norm1(x, ctx), ctx)
        x = x + self.cross_attn(self.norm2(x, ctx), ctx)
        return x + self.mlp(self.norm3(x, ctx), ctx)


class PostNormDecoderBlock(Module):
    """x ← norm1(x + attn x);  x ← norm2(x + cross_attn x);  x ← norm3(x + mlp x)      (the transformer of 2017)"""
    sublayers = [("attn", "norm1"), ("cross_attn", "norm2"), ("mlp", "norm3")]

    def __init__(self, attn: Attention, cross_attn: Attention, mlp: Module, *, eps: float):
        width = attn.in_features
        self.in_features = self.out_features = width
        self.attn = attn
        self.norm1 = LayerNorm(width, eps=eps)
        self.cross_attn = cross_attn
        self.norm2 = LayerNorm(width, eps=eps)
        self.mlp = mlp
        self.norm3 = LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """x (B, T, C) -> (B, T, C); ctx.source is the encoder's Context."""
        x = self.norm1(x + self.attn(x, ctx), ctx)
        x = self.norm2(x + self.cross_attn(x, ctx), ctx)
        return self.norm3(x + self.mlp(x, ctx), ctx)


def check_model_arguments(name: str, config: Any, kind: type, seed: Any) -> None:
    """TypeError or ValueError unless config is of its class and seed is a whole number, or a random generator."""
    checks.instance(name, config, kind, f"a {kind.__name__}")
    if not isinstance(seed, np.random.Generator):
        checks.whole(f"{name}: seed", seed, least=0)


def run_blocks(blocks: Sequence[Module], x: Tensor, ctx: Context) -> Tensor:
    """x (B, T, C) through a stack of blocks, bottom to top -> (B, T, C).

    If output_hidden_states is set, ctx.hidden_states collects every block's input; apply_head adds the last output.
    In a recompute region a block keeps only its input for the backward pass (recomputation.py)."""
    for block in blocks:
        ctx.add_hidden_state(x)
        x = run_block(block, x, ctx)
    return x


def embed_tokens(embed: Embedding, ids: Any, ctx: Context, positions: int | None) -> Tensor:
    """ids (B, T), or embeddings (B, T, C) in their place, -> (B, T, C).  The first line of a model's forward pass.

    An edit of `embed` may lengthen the sequence (a soft prompt), and records it with ctx.prepend. IndexError for an
    id outside the vocabulary; ValueError for embeddings of another width, for a sequence that is longer than the
    model's number of positions, and for a source that no encoder has read. positions: None for a model that takes any
    length."""
    if ctx.source is None and ctx.source_ids is not None:                        # an encoder-decoder has read it by now
        raise ValueError("this model has no encoder for source_ids: put the source before the text, into ids")
    if isinstance(ids, Tensor):
        check_embeddings(ids, embed.out_features)
    elif not is_array(ids):
        ids = read_integers("ids", ids, WANTED_IDS)
    check_ids(ids, embed.in_features)
    weight = embed.weight
    if isinstance(weight, Tensor):
        on_device = weight.data
    else:                                                # a packed weight: any of its arrays shows the device
        on_device = next(iter(weight.own(Array).values()))
    ctx.begin(ids, on_device)
    T = ctx.ids.shape[1]
    x = embed(ids if isinstance(ids, Tensor) else ctx.ids, ctx)                  # (B, T, C)
    if positions is not None:
        check_length(x, ctx, T, positions)
    return x


def apply_head(head: Module | None, hidden: Tensor, ctx: Context, pooler: Module | None = None) -> Tensor:
    """The output of a model from its last hidden states (B, T, C).  ctx keeps the hidden states and the output.

    A classifier reads one position of each sequence, through the pooler if there is one -> (B, classes). Another head
    reads every position, or those of ctx.logit_positions -> (..., V). Without a head: the hidden states."""
    ctx.last_hidden_state = hidden
    ctx.add_hidden_state(hidden)
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
    """(T, C): sin(p wᵢ) in the first half, cos(p wᵢ) in the second, wᵢ = 10000^(−2i/C).    Vaswani et al. 2017, §3.5

    A shift of the positions rotates each pair (sin, cos)."""
    angle = np.arange(T)[:, None] * 10000.0**(-np.arange(0, c, 2) / c)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


class Classifier(Module):
    """Class scores of a sequence, from one of its positions.    (B, C) -> (B, classes)

    last: read the last real position (GPT); otherwise the first real one (BERT's [CLS]).

    The weight is N(0, 1/C), so that the scores of a narrow model are as large at the start as those of a wide one. With
    the usual 0.02, which suits C = 768, the scores of a model with C = 128 would start at a quarter of that size."""

    def __init__(
        self,
        width: int,
        classes: int,
        *,
        rng: np.random.Generator,
        last: bool,
        bias: bool = True,
        dropout: float = 0.0,
    ):
        """width C. last: classify the last real position, else the first real one.

        With the standard deviation width^(−1/2), the first scores of a narrow model are as large as a wide one's."""
        self.last = last
        self.drop = Dropout(dropout)
        self.out = Linear(width, classes, rng=rng, bias=bias, std=width**-0.5)

    in_features = property(lambda self: self.out.in_features)
    out_features = property(lambda self: self.out.out_features)

    def row(self, x: Tensor, ctx: Context) -> Tensor:
        """The hidden state of the position that is classified, for each sequence: (B, T, C) -> (B, C).

        The first real token; with `last`, the last one. ctx.mask is True at real tokens."""
        if ctx.mask is None:
            return x[:, -1] if self.last else x[:, 0]
        m = xp(x.data)
        B, T = x.shape[:2]
        real = ctx.mask[:, -T:]          # the rows of a soft prompt are gone from x
        if self.last:
            chosen = T - 1 - m.argmax(m.flip(real, axis=1), axis=1)     # argmax: the first True of the reversed row
        else:
            chosen = m.argmax(real, axis=1)
        return x[m.arange(B), chosen]

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.out(self.drop(x, ctx), ctx)


def check_ids(ids: object, rows: int) -> None:
    """Raise TypeError for ids that are not integers, IndexError for ids outside the vocabulary of `rows` tokens.

    Only host arrays and lists are checked: reading a device array would wait for the device."""
    if isinstance(ids, (np.ndarray, list, tuple)):
        check_range("token id", read_integers("ids", ids, WANTED_IDS), rows, f"the vocabulary of {rows}")


def check_embeddings(x: Tensor, width: int) -> None:
    """ValueError unless x is (B, T, C) with the model's width C."""
    if x.ndim != 3 or x.shape[-1] != width:
        raise ValueError(f"{WANTED_IDS} with C = {width}, got a Tensor of shape {tuple(x.shape)}")


def check_length(x: Tensor, ctx: Context, T: int, positions: int) -> None:
    """Raise ValueError if a sequence is longer than the model's number of positions.

    x: the embeddings (B, prompt + T, C) of T tokens, with the rows of a soft prompt before them. Cached tokens and a
    prefix that takes positions (position_shift) count too."""
    total = ctx.past_length + ctx.position_shift + x.shape[1]
    if total > positions:
        parts = {"cached": ctx.past_length, "a prefix": ctx.position_shift, "a soft prompt": x.shape[1] - T}
        named = ", ".join(f"{n} of them {kind}" for kind, n in parts.items() if n)
        hint = f" ({named})" if named else ""
        raise ValueError(f"a sequence of {total} tokens{hint} is longer than the model's {positions} positions")

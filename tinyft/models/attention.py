"""Multi-head attention, of every model here: to the text itself or to a source; with fewer heads of keys and values.

The parts have these names in every model:    attn.q  attn.k  attn.v  attn.o  attn.kv

B batch, T time, C width, H heads, D = C/H head width.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import checks, dispatch, ops
from ..array import Array, xp
from ..nn import Context, Dropout, Linear, Module, Parameter
from ..tensor import Tensor
from .rotary import Rotary


class KV(Module):
    """(k, v, key_mask) -> the keys and values that the queries attend to.

    k, v (B, H, Tk, D), H the number of key/value heads; key_mask (B, Tk) bool, None if all keys are real. Cached
    keys and values are joined here. A prefix is an edit of this part: it runs after the join, so it is never cached.

    cached: False for cross-attention, whose keys and values do not grow with the text."""

    def __init__(self, heads: int, head_width: int, *, cached: bool = True):
        self.heads = heads
        self.head_width = head_width
        self.cached = cached

    def extra_repr(self) -> str:
        return f"heads={self.heads}, head_width={self.head_width}"

    def forward(self, kv: tuple, ctx: Context) -> tuple:
        k, v, key_mask = kv
        if self.cached and ctx.cache is not None:
            k, v = ctx.cache.join(self, k, v)
        return k, v, key_mask


class Attention(Module):
    """softmax(α q kᵀ + bias) v over H heads, then o.    (B, T, C) -> (B, T, C)

    Self-attention; with cross=True the keys and values come from `ctx.source`, the encoder's Context: its last hidden
    state (B, Ts, C) and its mask. In order: project, rotate, `kv` (cache, prefix), bias, attention, o.

    heads H; key_value_heads, a divisor of H: fewer heads of keys and values (None: H); head_width D (None: C / H)
    causal: no query attends to a later key;  scale α (None: 1/√D)
    bias: of the maps q, k, v and o;  out_bias: of o, if it differs
    rotary: a Rotary, which rotates queries and keys
    relative_bias: a module, (Tq, Tk) -> bias (1, H, Tq, Tk), with the last query at the position of the last key
    dropout: of the probabilities;  out_dropout: of the result, if it differs
    std: standard deviation of the initial maps;  out_std: of the map o, if it is another"""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        rng: np.random.Generator,
        causal: bool = False,
        cross: bool = False,
        key_value_heads: int | None = None,
        head_width: int | None = None,
        scale: float | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        rotary: Rotary | None = None,
        relative_bias: Module | None = None,
        dropout: float = 0.0,
        out_dropout: float | None = None,
        std: float = 0.02,
        out_std: float | None = None,
    ):
        """Make the maps q, k, v and o, each with random values, and the other parts. ValueError if they do not fit.

        cross: keys and values come from an encoder. heads, key_value_heads: of the queries; of the keys and values.
        std, out_std: standard deviation of the initial maps; of o, if it is another. The class describes the rest."""
        checks.whole("Attention: width", width, least=1)
        checks.whole("Attention: heads", heads, least=1)
        if key_value_heads is not None:
            checks.whole("Attention: key_value_heads", key_value_heads, least=1)
        if head_width is None:
            if width % heads:
                raise ValueError(f"{heads} heads do not divide a width of {width}")
            head_width = width // heads
        key_value_heads = heads if key_value_heads is None else key_value_heads
        if heads % key_value_heads:
            raise ValueError(f"{key_value_heads} key/value heads do not divide {heads} heads")
        if cross and (causal or rotary is not None):
            raise ValueError("cross-attention wants neither causal nor rotary: source and text do not share positions")
        if rotary is not None and rotary.width != head_width:
            raise ValueError(f"rotary positions of width {rotary.width} do not fit heads of width {head_width}")
        self.heads = heads
        self.key_value_heads = key_value_heads
        self.head_width = head_width
        self.causal = causal
        self.cross = cross
        self.scale = scale
        self.in_features = self.out_features = width
        self.q = Linear(width, heads * head_width, rng=rng, bias=bias, std=std)
        self.k = Linear(width, key_value_heads * head_width, rng=rng, bias=bias, std=std)
        self.v = Linear(width, key_value_heads * head_width, rng=rng, bias=bias, std=std)
        self.kv = KV(key_value_heads, head_width, cached=not cross)
        out_bias = bias if out_bias is None else out_bias
        self.o = Linear(heads * head_width, width, rng=rng, bias=out_bias, std=out_std or std)
        self.drop_p = Dropout(dropout)
        self.drop = Dropout(dropout if out_dropout is None else out_dropout)
        self.relative_bias = relative_bias
        self._rotary = rotary

    def extra_repr(self) -> str:
        heads = [f"heads={self.heads}"]
        if self.key_value_heads != self.heads:
            heads.append(f"key_value_heads={self.key_value_heads}")
        kinds = {"causal": self.causal, "cross": self.cross, "rotary": self._rotary is not None}
        return ", ".join([*heads, *(kind for kind, holds in kinds.items() if holds)])

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """x (B, Tq, C) -> (B, Tq, C). The queries come from x; keys and values too, or from ctx.source if cross.

        The steps: project, rotate, `kv` (joins the cache; a prefix is its edit), bias, attention, the map o, dropout.
        D is the width of a head, Hkv the number of key/value heads."""
        if self.cross:
            q = split_heads(self.q(x, ctx), self.heads)                          # (B, H, Tq, D)
            k, v, key_mask = self.read_source(ctx)                               # (B, Hkv, Tk, D)
        else:
            q, k, v = self.project(x, ctx)
            key_mask = ctx.key_mask()                                            # (B, Tk)
        if self._rotary is not None:
            q = self._rotary(q, ctx)
            k = self._rotary(k, ctx)
        k, v, key_mask = self.kv((k, v, key_mask), ctx)
        if key_mask is not None:
            key_mask = key_mask[:, None, None, :]                                # (B, 1, 1, Tk)
        bias = None if self.relative_bias is None else self.read_bias(q, k, ctx)
        if ctx.output_attention_scores:
            ctx.add_attention_scores(self, self.scores(q, k, bias), key_mask)
        key = self.drop_p.key(ctx)                                               # a random key; None: no dropout
        dropout_mask = None if key is None else self.dropout_mask(q, k, key)
        inputs = (q, k, v) if bias is None else (q, k, v, bias)
        y = ops.attention(*inputs, key_mask=key_mask, causal=self.causal, scale=self.scale, dropout_mask=dropout_mask)
        B, H, T, D = y.shape
        return self.drop(self.o(y.permute(0, 2, 1, 3).reshape((B, T, H * D)), ctx), ctx)

    def project(self, x: Tensor, ctx: Context) -> Sequence[Tensor]:
        """Queries, keys and values of x, by heads: (B, T, C) -> (B, H, T, D) and two of (B, Hkv, T, D).

        If there is a joint kernel for the device, it computes all three. It reads the weights directly, so the three
        maps must be plain (is_plain): without edits, which would be skipped."""
        maps = (self.q, self.k, self.v)
        same_heads = self.heads == self.key_value_heads
        is_joint = same_heads and dispatch.find(ops.project, type(x.data))       # a kernel for this type of array
        if is_joint and all(is_plain(linear) for linear in maps):
            weights = [p for linear in maps for p in (linear.weight, linear.bias)]
            return ops.project(x, *weights, heads=self.heads)
        q = split_heads(self.q(x, ctx), self.heads)
        k = split_heads(self.k(x, ctx), self.key_value_heads)
        v = split_heads(self.v(x, ctx), self.key_value_heads)
        return q, k, v

    def read_source(self, ctx: Context) -> tuple[Tensor, Tensor, Array | None]:
        """Keys and values for cross-attention, (B, Hkv, Ts, D), and their mask (B, Ts), None if all are real.

        They are computed from ctx.source, the encoder's Context. Generation passes the same cache to every pass: then
        they are computed in the first pass only. ValueError if the encoder has not run."""
        source = ctx.need("source")
        if source.last_hidden_state is None:
            raise ValueError("cross-attention wants a source on which the encoder has run, got no hidden states")

        def compute() -> tuple[Tensor, Tensor]:
            x = source.last_hidden_state                                         # (B, Ts, C)
            k = split_heads(self.k(x, source), self.key_value_heads)
            return k, split_heads(self.v(x, source), self.key_value_heads)
        k, v = compute() if ctx.cache is None else ctx.cache.once(self, compute)
        return k, v, source.key_mask()

    def read_bias(self, q: Tensor, k: Tensor, ctx: Context) -> Tensor:
        """The relative-position bias (1, H, Tq, Tk), which attention adds to its scores, for q and k (B, H, T, D).

        A prefix, learned keys before all others, has no positions: its keys get the bias 0."""
        queries = q.shape[2]
        keys = ctx.source.last_hidden_state.shape[1] if self.cross else ctx.past_length + queries
        bias = self.relative_bias((queries, keys), ctx)                          # (1, H, Tq, Tk without prefix)
        prefix = k.shape[2] - keys                                               # the number of its keys
        if prefix == 0:
            return bias
        zeros = xp(bias.data).zeros((*bias.shape[:-1], prefix), bias.dtype)
        return ops.concatenate(Tensor(zeros), bias, axis=-1)

    def scores(self, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
        """α q kᵀ + bias, before mask and softmax: q (B, H, Tq, D), k (B, Hkv, Tk, D) -> (B, H, Tq, Tk).

        `ops.attention` keeps no scores; a loss that compares them asks for these."""
        B, H, T, D = q.shape
        grouped = q.reshape(B, k.shape[1], H // k.shape[1], T, D)                # queries that share keys
        keys = k.reshape(B, k.shape[1], 1, *k.shape[2:])
        scores = ops.matmul(grouped, ops.transpose(keys)).reshape(B, H, T, k.shape[2])
        scores = scores * (D**-0.5 if self.scale is None else self.scale)
        return scores if bias is None else scores + bias

    def dropout_mask(self, q: Tensor, k: Tensor, key: int) -> Array:
        """0 or 1/(1 − p) for each attention probability, (B, H, Tq, Tk): the dropout of an array of ones."""
        ones = xp(q.data).ones((*q.shape[:-1], k.shape[-2]), q.dtype)
        return ops.dropout(Tensor(ones), self.drop_p.p, key).data


def is_plain(linear: Module) -> bool:
    """True for a dense Linear with a bias and without edits."""
    return type(linear) is Linear and not linear.edits and type(linear.weight) is Parameter and linear.bias is not None


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, H D) -> (B, H, T, D), for H = heads: head h owns the features h D : (h + 1) D of each position."""
    B, T, width = x.shape
    return x.reshape(B, T, heads, width // heads).permute(0, 2, 1, 3)

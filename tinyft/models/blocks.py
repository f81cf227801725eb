"""The parts of every transformer here, under the same leaf names in every model:

    attn.q  attn.k  attn.v  attn.o  attn.kv       mlp.up  mlp.down  mlp.gate       norm1  norm2

B batch, T time, C width, H heads, D = C/H head width, F feed-forward width, V vocabulary, L layers.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import array, checks, dispatch, ops
from ..array import Array, is_array, xp
from ..context import WANTED_IDS, check_range, read_integers
from ..nn import Context, Dropout, Embedding, LayerNorm, Linear, Module, Parameter
from ..tensor import Tensor


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


@dataclass(frozen=True)
class RotaryScaling:
    """How the frequencies of rotary positions were changed for longer texts than those of pretraining.

    kind "linear": every frequency is divided by `factor`.
    kind "llama3": frequencies of waves longer than `original / low` positions are divided by `factor`; those of waves
    shorter than `original / high` stay; between the two a mean of both is taken (Llama 3.1).

    original: the number of positions in pretraining"""
    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def __post_init__(self) -> None:
        checks.one_of("RotaryScaling: kind", self.kind, ("linear", "llama3"))
        checks.number("RotaryScaling: factor", self.factor, above=0)
        checks.whole("RotaryScaling: original", self.original, least=1)
        checks.number("RotaryScaling: low", self.low, above=0)
        checks.number("RotaryScaling: high", self.high, above=0)
        if self.low >= self.high:
            raise ValueError(f"RotaryScaling wants low < high, got low {self.low} and high {self.high}")

    def apply(self, frequencies: np.ndarray) -> np.ndarray:
        """The changed frequencies (D/2,), in radians per position."""
        slow = frequencies / self.factor
        if self.kind == "linear":
            return slow
        waves = self.original * frequencies / (2 * math.pi)       # waves in a text of pretraining's length
        share = np.clip((waves - self.low) / (self.high - self.low), 0, 1)       # of the unchanged frequency
        return share * frequencies + (1 - share) * slow


class Rotary:
    """Rotary positions: the pair (xᵢ, xᵢ₊D⸝₂) of a head is rotated by the angle position · base^(−2i/D).

    q · k then depends on the distance of their positions alone. The pairs are Llama's: the two halves of a head, not
    neighbours.  Su et al. 2021, §3.2

    width: the width D of a head, an even number. scaling: a change of the frequencies, for long texts."""

    def __init__(self, width: int, *, base: float = 10000.0, scaling: RotaryScaling | None = None):
        if width % 2:
            raise ValueError(f"rotary positions want heads of an even width, got {width}")
        self.width = width
        self.base = base
        self.scaling = scaling

    def __call__(self, x: Tensor, ctx: Context) -> Tensor:
        """x (B, H, T, D), rotated by the positions of ctx."""
        cos, sin = self.factors(x, ctx)
        return ops.rotary(x, cos, sin)

    def frequencies(self) -> np.ndarray:
        """base^(−2i/D) for i = 0 ... D/2 − 1, scaled: (D/2,) float64, in radians per position."""
        frequencies = self.base ** (-np.arange(0, self.width, 2) / self.width)
        return frequencies if self.scaling is None else self.scaling.apply(frequencies)

    def factors(self, x: Tensor, ctx: Context) -> tuple[Array, Array]:
        """cos and sin of the angles position · frequency for x (B, H, T, D): two arrays (B or 1, 1, T, D).

        The two halves of a head's width are rotated together, so both halves hold the same angles. All layers of a pass
        share the result, which ctx.scratch keeps."""
        key = ("rotary", self.width, self.base, self.scaling, x.shape[2])
        if key not in ctx.scratch:
            positions = ctx.positions()                                          # (B or 1, T)
            m = xp(positions)
            dtype = np.promote_types(x.dtype, np.float32)                        # 16 bits hold no large positions
            frequencies = array.put_like(self.frequencies(), positions, dtype)
            angles = positions[:, None, :, None].astype(dtype) * frequencies     # (B or 1, 1, T, D/2)
            angles = m.concatenate([angles, angles], axis=-1)
            ctx.scratch[key] = m.cos(angles).astype(x.dtype), m.sin(angles).astype(x.dtype)
        return ctx.scratch[key]


class Attention(Module):
    """softmax(α q kᵀ + bias) v over H heads, then o.    (B, T, C) -> (B, T, C)

    Self-attention; with cross=True the keys and values come from `ctx.source`, the encoder's Context: its last hidden
    state (B, Ts, C) and its mask. In order: project, rotate, `kv` (cache, prefix), bias, attention, o.

    heads H; key_value_heads, a divisor of H: fewer heads of keys and values (None: H); head_width D (None: C / H)
    causal: no query attends to a later key;  scale α (None: 1/√D)
    bias: of the maps q, k, v and o;  out_bias: of o, if it differs
    rotary: a Rotary, which rotates queries and keys
    relative_bias: a module, (Tq, Tk) -> bias (1, H, Tq, Tk), with the last query at the position of the last key
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
        self.drop = Dropout(dropout)
        self.relative_bias = relative_bias
        self._rotary = rotary

    def extra_repr(self) -> str:
        kinds = {"causal": self.causal, "cross": self.cross}
        return ", ".join([f"heads={self.heads}", *(kind for kind, holds in kinds.items() if holds)])

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


class MLP(Module):
    """down(act(up(x))).    (..., C) -> (..., F) -> (..., C)"""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: Callable,
        rng: np.random.Generator,
        dropout: float = 0.0,
        std: float = 0.02,
        out_std: float | None = None,
    ):
        """width C, hidden F. std: standard deviation of the initial maps;  out_std: of `down`, if it is another."""
        self.in_features = self.out_features = width
        self.up = Linear(width, hidden, rng=rng, std=std)
        self.down = Linear(hidden, width, rng=rng, std=out_std or std)
        self.drop = Dropout(dropout)
        self._activation = activation

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.drop(self.down(self._activation(self.up(x, ctx)), ctx), ctx)


class GatedMLP(Module):
    """down(silu(gate x) ⊙ up x).    (..., C) -> (..., F) -> (..., C)      (Llama; Shazeer 2020)"""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        rng: np.random.Generator,
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

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        hidden = ops.swiglu(self.gate(x, ctx), self.up(x, ctx))                  # (..., F)
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


# Sizes under the names of other libraries, and their names here.
SIZE_SYNONYMS = {
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "num_hidden_layers", "depth"), "layers"),
    **dict.fromkeys(("n_head", "n_heads", "num_heads", "num_attention_heads"), "heads"),
    **dict.fromkeys(("n_embd", "d_model", "dim", "hidden_size", "embed_dim"), "width"),
    **dict.fromkeys(("n_positions", "n_ctx", "block_size", "max_position_embeddings", "context_length"), "positions"),
    **dict.fromkeys(("n_inner", "d_ff", "intermediate_size", "ffn_dim"), "hidden"),
    "vocab_size": "vocab", "type_vocab_size": "token_types", "layer_norm_eps": "eps", "layer_norm_epsilon": "eps",
    "initializer_range": "std",
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads", "num_kv_heads"), "key_value_heads"),
    "head_dim": "head_width", "rms_norm_eps": "eps", "rope_theta": "rope_base", "tie_word_embeddings": "tied",
}


def check_config(config: Any, sizes: Sequence[str]) -> None:
    """Raise TypeError or ValueError, naming the field, unless a configuration describes a model that can be built.

    sizes: the names of the fields that are whole numbers of at least 1, width and heads among them."""
    name = type(config).__name__
    for size in sizes:
        checks.whole(f"{name}: {size}", getattr(config, size), least=1)
    if config.hidden is not None:
        checks.whole(f"{name}: hidden", config.hidden, least=1)
    if getattr(config, "head_width", None) is None and config.width % config.heads:
        raise ValueError(f"{name}: {config.heads} heads do not divide a width of {config.width}")
    checks.number(f"{name}: dropout", config.dropout, low=0, below=1)
    checks.number(f"{name}: eps", config.eps, low=0)
    checks.number(f"{name}: std", config.std, low=0)


def check_model_arguments(name: str, config: Any, kind: type, seed: Any) -> None:
    """TypeError or ValueError unless config is of its class and seed is a whole number, or a random generator."""
    checks.instance(name, config, kind, f"a {kind.__name__}")
    if not isinstance(seed, np.random.Generator):
        checks.whole(f"{name}: seed", seed, least=0)


def run_blocks(blocks: Sequence[Module], x: Tensor, ctx: Context) -> Tensor:
    """x (B, T, C) through a stack of blocks, bottom to top -> (B, T, C).

    If output_hidden_states is set, ctx.hidden_states collects every block's input; apply_head adds the last output."""
    for block in blocks:
        ctx.add_hidden_state(x)
        x = block(x, ctx)
    return x


def embed_tokens(embed: Embedding, ids: Any, ctx: Context, positions: int) -> Tensor:
    """ids (B, T), or embeddings (B, T, C) in their place, -> (B, T, C).  The first line of a model's forward pass.

    An edit of `embed` may lengthen the sequence (a soft prompt), and records it with ctx.prepend. IndexError for an
    id outside the vocabulary; ValueError for embeddings of another width, and for a sequence that is longer than the
    model's number of positions."""
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

    last: read the last real position (GPT); otherwise the first (BERT's [CLS]).

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
        """width C. last: classify the last real position, else the first.

        With the standard deviation width^(−1/2), the first scores of a narrow model are as large as a wide one's."""
        self.last = last
        self.drop = Dropout(dropout)
        self.out = Linear(width, classes, rng=rng, bias=bias, std=width**-0.5)

    in_features = property(lambda self: self.out.in_features)
    out_features = property(lambda self: self.out.out_features)

    def row(self, x: Tensor, ctx: Context) -> Tensor:
        """The hidden state of the position that is classified, for each sequence: (B, T, C) -> (B, C).

        The first position; with `last`, the last real token. ctx.mask is True at real tokens."""
        if not self.last:
            return x[:, 0]
        if ctx.mask is None:
            return x[:, -1]
        m = xp(x.data)
        B, T = x.shape[:2]
        real = ctx.mask[:, -T:]          # the rows of a soft prompt are gone from x
        last = T - 1 - m.argmax(m.flip(real, axis=1), axis=1)     # argmax: the first True of the reversed row
        return x[m.arange(B), last]

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

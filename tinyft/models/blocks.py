"""The parts of every transformer here, under the same leaf names in every model:

    attn.q  attn.k  attn.v  attn.o  attn.kv       mlp.up  mlp.down       norm1  norm2

B batch, T time, C width, H heads, D = C/H head width, F feed-forward width, V vocabulary, L layers.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .. import ops
from ..array import Array, xp
from ..nn import Context, Dropout, LayerNorm, Linear, Module, Parameter
from ..tensor import Tensor


class KV(Module):
    """(k, v, seen) -> what the queries look at.    k, v (B, H, Tk, D);  seen (B, Tk) bool, or None if all keys are real

    The cache joins here.  A prefix is an edit of this part: it comes after the cache, so it is never cached twice."""

    def __init__(self, h: int, d: int):
        self.h, self.d = h, d

    def forward(self, kv: tuple, ctx: Context) -> tuple:
        k, v, seen = kv
        return (k, v, seen) if ctx.cache is None else (*ctx.cache.join(self, k, v), seen)


class Attention(Module):
    "softmax(q kᵀ / √D) v over H heads, then o.    (B, T, C) -> (B, T, C)"

    def __init__(self, c: int, h: int, rng: np.random.Generator, causal: bool, dropout: float = 0.0, std: float = 0.02,
                 std_o: float | None = None):
        if c % h:
            raise ValueError(f"{h} heads do not divide a width of {c}")
        self.h, self.causal, self.in_features, self.out_features = h, causal, c, c
        self.q, self.k, self.v = (Linear(c, c, rng, std=std) for _ in "qkv")
        self.kv, self.o = KV(h, c // h), Linear(c, c, rng, std=std_o or std)
        self.drop_p, self.drop = Dropout(dropout), Dropout(dropout)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        q, k, v = self.project(x, ctx)                                                                    # (B, H, T, D)
        k, v, seen = self.kv((k, v, ctx.key_mask()), ctx)                                                     # (B, H, Tk, D)
        seen = None if seen is None else seen[:, None, None, :]                                           # (B, 1, 1, Tk)
        key = self.drop_p.key(ctx)
        keep = None if key is None else self.noise(q, k, key)
        y = ops.attention(q, k, v, seen, causal=self.causal, keep=keep)                                   # (B, H, T, D)
        return self.drop(self.o(y.permute(0, 2, 1, 3).reshape(x.shape), ctx), ctx)

    def project(self, x: Tensor, ctx: Context) -> Sequence[Tensor]:
        "Queries, keys and values, by heads.  Where nothing is attached to the three maps, and a kernel can, they are one product."
        maps = self.q, self.k, self.v
        plain = lambda f: type(f) is Linear and not f.edits and type(f.weight) is Parameter and f.bias is not None
        if type(x.data) in ops.project.fast and all(map(plain, maps)):
            return ops.project(x, *(p for f in maps for p in (f.weight, f.bias)), heads=self.h)
        return [self.split(f(x, ctx)) for f in maps]

    def split(self, x: Tensor) -> Tensor:
        "(B, T, C) -> (B, H, T, D): head h owns the features h D : (h + 1) D"
        B, T, C = x.shape
        return x.reshape(B, T, self.h, C // self.h).permute(0, 2, 1, 3)

    def noise(self, q: Tensor, k: Tensor, key: int) -> Array:
        "Dropout's factors on the probabilities, (B, H, T, Tk): what it makes of ones"
        return ops.dropout(Tensor(xp(q.data).ones((*q.shape[:-1], k.shape[-2]), q.dtype)), self.drop_p.p, key).data


class MLP(Module):
    "down(act(up(x))).    (..., C) -> (..., F) -> (..., C)"

    def __init__(self, c: int, f: int, act: Callable, rng: np.random.Generator, dropout: float = 0.0, std: float = 0.02,
                 std_down: float | None = None):
        self.in_features = self.out_features = c
        self.up, self.down = Linear(c, f, rng, std=std), Linear(f, c, rng, std=std_down or std)
        self.drop, self._act = Dropout(dropout), act

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.drop(self.down(self._act(self.up(x, ctx)), ctx), ctx)


class PreNormBlock(Module):
    "x ← x + attn(norm1 x);  x ← x + mlp(norm2 x)      (GPT-2)"

    def __init__(self, attn: Attention, mlp: MLP, eps: float):
        self.in_features = self.out_features = attn.in_features
        self.norm1, self.attn, self.norm2, self.mlp = LayerNorm(attn.in_features, eps), attn, LayerNorm(attn.in_features, eps), mlp

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x = x + self.attn(self.norm1(x, ctx), ctx)
        return x + self.mlp(self.norm2(x, ctx), ctx)


class PostNormBlock(Module):
    "x ← norm1(x + attn x);  x ← norm2(x + mlp x)      (BERT, and the transformer of 2017)"

    def __init__(self, attn: Attention, mlp: MLP, eps: float):
        self.in_features = self.out_features = attn.in_features
        self.attn, self.norm1, self.mlp, self.norm2 = attn, LayerNorm(attn.in_features, eps), mlp, LayerNorm(attn.in_features, eps)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x = self.norm1(x + self.attn(x, ctx), ctx)
        return self.norm2(x + self.mlp(x, ctx), ctx)


def sinusoids(T: int, c: int) -> np.ndarray:
    "(T, C): sin(p wᵢ) in the first half, cos(p wᵢ) in the second, wᵢ = 10000^(−2i/C).  A shift is a rotation of it.  Vaswani et al. 2017, §3.5"
    angle = np.arange(T)[:, None] * 10000.0**(-np.arange(0, c, 2) / c)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


class Classifier(Module):
    """Scores of a row's class.    (B, T, C) -> (B, classes)

    Which row speaks: the first (BERT's [CLS]) or the last real one (GPT).  Drawn from N(0, 1/C), so that a narrow model hears its task
    from the first step as a wide one does; with the 0.02 that suits C = 768, one of 128 hears a quarter of it at the start."""

    def __init__(self, c: int, classes: int, rng: np.random.Generator, last: bool, bias: bool = True, dropout: float = 0.0):
        self.last, self.drop, self.out = last, Dropout(dropout), Linear(c, classes, rng, bias=bias, std=c**-0.5)

    in_features, out_features = property(lambda self: self.out.in_features), property(lambda self: self.out.out_features)

    def row(self, x: Tensor, ctx: Context) -> Tensor:
        "(B, T, C) -> (B, C)"
        if not self.last:
            return x[:, 0]
        if ctx.mask is None:
            return x[:, -1]
        m, (B, T) = xp(x.data), x.shape[:2]
        return x[m.arange(B), T - 1 - m.argmax(m.flip(ctx.mask[:, -T:], axis=1), axis=1)]      # a soft prompt's rows are gone from x

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.out(self.drop(x, ctx), ctx)


def check_ids(ids: object, rows: int) -> None:
    "One clear sentence for what would otherwise be a wrong row.  Host arrays only: a device is not waited for."
    if isinstance(ids, (np.ndarray, list)):
        a = np.asarray(ids)
        if a.size and a.dtype.kind not in "iu":
            raise TypeError(f"token ids are integers; got {a.dtype}")
        if a.size and (a.min() < 0 or a.max() >= rows):
            raise IndexError(f"token id {a.min() if a.min() < 0 else a.max()} is outside the vocabulary of {rows}")


def check_length(x: Tensor, ctx: Context, T: int, positions: int) -> None:
    "x (B, T + prompt, C) after the cached rows must fit the positions."
    if ctx.past_length + x.shape[1] > positions:
        of = [f"{n} of them {what}" for n, what in ((ctx.past_length, "cached"), (x.shape[1] - T, "a soft prompt")) if n]
        said = f" ({', '.join(of)})" if of else ""
        raise ValueError(f"a sequence of {ctx.past_length + x.shape[1]} tokens{said} is longer than the model's {positions} positions")

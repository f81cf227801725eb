"""Prefix-Tuning: Optimizing Continuous Prompts for Generation.  Li & Liang, ACL 2021.  arXiv:2101.00190

    K ← [P_K; K],  V ← [P_V; V]  in every layer          P_K, P_V (p, C) per layer                                       §4.2
    while training, with `mlp`:  [P_K P_V]_ℓ = W₂ℓ tanh(W₁ E + b₁) + b₂ℓ        E (p, C), W₁ (k, C), W₂ (2 L C, k)        §4.3

A prefix is a KV cache nobody typed.  It is no no-op, not even all zero: zero keys still draw weight away from the text.

Departures: without the MLP the prefix starts at N(0, std²), PEFT's at N(0, 1); the paper's first rows are activations of real words.
`shift` puts real tokens at positions p, p + 1, ... as implementations with past_key_values do; the paper's mathematics has no positions.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ... import array, ops
from ...array import Array, xp
from ...edit import Edit, Method
from ...nn import Context, Embedding, Linear, Module, Parameter
from ...tensor import Tensor, no_grad


@dataclass(frozen=True)
class PrefixTuning(Method):
    "p: prefix length;  mlp: width k of the reparameterisation, None for none;  std: of the initial prefix;  shift: text starts at position p."
    p: int = 10
    mlp: int | None = None
    std: float = 0.02
    shift: bool = False
    kv: str = "attn.kv"
    pos: str = "pos"

    targets = property(lambda self: (self.kv, self.pos) if self.shift else (self.kv,))

    def edits(self, found: dict[str, Module], rng: np.random.Generator) -> dict[str, Edit]:
        shared = None
        out: dict[str, Edit] = {}
        for path, m in found.items():
            if path.endswith(self.pos) and self.shift:
                out[path] = Shift(self.p, m.in_features)
            elif self.mlp is None:
                out[path] = Prefix(*(array.normal(rng, (m.heads, self.p, m.head_width), self.std) for _ in "KV"))
            else:
                shared = shared or Hidden(self.p, m.heads * m.head_width, self.mlp, rng)
                out[path] = Reparameterized(m.heads, m.head_width, shared, rng)
        return out

    def eject(self, edits: dict[str, Edit]) -> tuple[Method, dict[str, Edit]]:
        """The prefixes without the MLP that made them, bitwise."""
        with no_grad():
            out = {path: e.ejected() if isinstance(e, Reparameterized) else e for path, e in edits.items()}
        return replace(self, mlp=None), out


class Prefix(Edit):
    "P_K and P_V in front of what the queries look at.  They come after the cache, and bring their own columns of the mask."

    def __init__(self, K: Array, V: Array):
        self.K, self.V = Parameter(K, decay=False), Parameter(V, decay=False)    # (H, p, D)

    def prefix(self, ctx: Context) -> tuple[Tensor, Tensor]:
        "P_K, P_V (H, p, D)"
        return self.K, self.V

    def after(self, x: tuple, y: tuple, ctx: Context) -> tuple:
        k, v, seen = y
        P_K, P_V = self.prefix(ctx)
        B, (H, p, D), m = k.shape[0], P_K.shape, xp(k.data)
        grow = lambda P, a: ops.concatenate(ops.broadcast_to(P, (B, H, p, D)), a, axis=2)
        seen = None if seen is None else m.concatenate([m.ones((B, p), dtype=bool), seen], axis=1)
        return grow(P_K, k), grow(P_V, v), seen


class Hidden(Edit):
    "tanh(W₁ E + b₁): the part of the reparameterisation that all layers share.    (p, k)"

    def __init__(self, p: int, c: int, k: int, rng: np.random.Generator):
        self.E, self.W1 = Embedding(p, c, rng=rng, std=1.0), Linear(c, k, rng=rng, std=c**-0.5)

    def forward(self, _: Any, ctx: Context) -> Tensor:
        return ops.tanh(self.W1(self.E.weight, ctx))


class Reparameterized(Prefix):
    "P_K, P_V of one layer from the shared hidden rows."

    def __init__(self, h: int, d: int, shared: Hidden, rng: np.random.Generator):
        self.hidden, self.W2, self._heads = shared, Linear(shared.W1.out_features, 2 * h * d, rng=rng, std=shared.W1.out_features**-0.5), (h, d)

    def prefix(self, ctx: Context) -> tuple[Tensor, Tensor]:
        h, d = self._heads
        both = self.W2(self.hidden(None, ctx), ctx)                              # (p, 2 H D)
        K, V = (both[:, i * h * d:(i + 1) * h * d].reshape(-1, h, d).permute(1, 0, 2) for i in (0, 1))
        return K, V

    def ejected(self) -> Prefix:
        """The prefix of this layer as plain tensors."""
        K, V = self.prefix(Context())                                            # (H, p, D)
        return Prefix(K.data.copy(), V.data.copy())


class Shift(Edit):
    "Real tokens start at position p."

    def __init__(self, p: int, rows: int):
        self._p, self._rows = p, rows

    def before(self, positions: Any, ctx: Context) -> Any:
        if self._p + ctx.past_length + ctx.ids.shape[1] > self._rows:
            raise ValueError(f"{ctx.past_length + ctx.ids.shape[1]} tokens after a prefix of {self._p} go beyond the model's {self._rows} positions")
        return positions + self._p

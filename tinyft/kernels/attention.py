"""Attention on NumPy without its scores: tile by tile they are made, used and thrown away, and made again for the gradient.

With S = α Q Kᵀ, E = e^(S − top) and z the row sums of E, the probabilities P = E/z are never written:

    O = E V / z,        Ĝ = G / z,   dV = Eᵀ Ĝ,   dS = E ⊙ (Ĝ Vᵀ − Σ Ĝ O),   dQ = α dS K,   dK = dSᵀ (α Q)

so memory grows with the length of the text, not with its square; of a causal square only the tiles that can be seen are made; and the
seven passes over a tile stay in the cache.  (Dao et al. 2022, FlashAttention, with the tile a block of queries by all their keys.)
"""
from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import ops
from .threads import each, get_num_threads

TILE = 1 << 17                                           # scores in a tile: 512 kB
ROWS = 64                                                # queries in a tile of causal attention, at least
SAFE = 40                                                # e⁴⁰ and e⁻⁴⁰, summed and multiplied, stay far inside float32


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray | None = None, causal: bool = False, scale: float | None = None,
              keep: np.ndarray | None = None) -> Any:
    "Saves the (B, H, t, s) scores.  For q (B, H, t, d), k and v (B, H, s, d) in float32, with s >= t where causal; else the definition."
    if not (q.ndim == 4 and q.size and k.shape[2] and k.shape == v.shape == (*q.shape[:2], k.shape[2], q.shape[3])
            and q.dtype == k.dtype == v.dtype == np.float32 and (k.shape[2] >= q.shape[2] or not causal)):
        return NotImplemented
    a = _Attention(q, k, v, seen, causal, q.shape[-1]**-0.5 if scale is None else scale, keep)
    each(a.groups, a.forward)

    def back(g: np.ndarray, needed: list[bool]) -> tuple:
        d = [np.empty_like(x) if n else None for x, n in zip((q, k, v), needed)]
        each(a.groups, lambda tiles: a.backward(tiles, g, *d))
        return tuple(d)
    return a.y, back


class _Attention:
    "What the tiles of one call share.  y: the output (as q lies in memory), z: the row sums, top: what was taken off the scores, None for nothing."

    def __init__(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray | None, causal: bool, alpha: float, keep: np.ndarray | None):
        (B, H, t, _), s, one = q.shape, k.shape[2], np.float32
        self.q, self.k, self.v, self.alpha, self.keep = q, k, v, one(alpha), keep
        self.hide = None if seen is None else np.where(seen, one(0), one(-math.inf))
        self.future = np.triu(np.full((queries(t),) * 2, -math.inf, np.float32), 1) if causal else None
        self.y, self.z, self.ones = np.empty_like(q), np.empty((B, H, t, 1), np.float32), np.ones(s, np.float32)
        longest = lambda a: np.einsum("bhtd,bhtd->bht", a, a).max()**0.5
        bound = abs(alpha) * longest(q) * longest(k)                             # no score is larger: |q·k| <= |q| |k|
        self.top = None if bound <= SAFE else np.empty_like(self.z)
        self.groups = tiles(B, H, t, s, causal)
        self.kept: dict | None = {} if B * H * t * s <= TILE else None           # what fits the cache need not be made again

    def scores(self, at: tuple, rows: slice, cols: slice) -> np.ndarray:
        "α Q Kᵀ, −∞ where nothing may be seen"
        x = (self.q[at][:, :, rows] * self.alpha) @ ops.t(self.k[at][:, :, cols])
        if self.future is not None:
            n = rows.stop - rows.start
            x[..., -n:] += self.future[:n, :n]
        if self.hide is not None:
            x += part(self.hide, at, rows, cols)
        return x

    def forward(self, group: list) -> None:
        for tile in group:
            at, rows, cols = tile
            e, z = self.scores(*tile), self.z[at][:, :, rows]
            if self.top is not None:
                top = e.max(axis=-1, keepdims=True, out=self.top[at][:, :, rows])
                top[top == -math.inf] = 0
                e -= top
            np.exp(e, out=e)
            z[..., 0] = e @ self.ones[cols]
            z += z == 0                                                          # a query that may look nowhere gives zeros
            if self.kept is not None:
                self.kept[_key(*tile)] = e
            if self.keep is not None:
                e = e * part(self.keep, at, rows, cols)
            o = np.matmul(e, self.v[at][:, :, cols], out=self.y[at][:, :, rows])
            o /= z

    def backward(self, group: list, g: np.ndarray, dq: np.ndarray | None, dk: np.ndarray | None, dv: np.ndarray | None) -> None:
        for tile in group:
            at, rows, cols = tile
            e = self.kept[_key(*tile)] if self.kept is not None else self.again(*tile)
            G, noise = g[at][:, :, rows] / self.z[at][:, :, rows], None if self.keep is None else part(self.keep, at, rows, cols)
            if dv is not None:
                self.add(dv[at], ops.t(e if noise is None else e * noise), G, rows, cols)
            if dq is None and dk is None:
                continue
            ds = G @ ops.t(self.v[at][:, :, cols])
            if noise is not None:
                ds *= noise
            ds -= np.einsum("bhtd,bhtd->bht", G, self.y[at][:, :, rows])[..., None]
            ds *= e
            if dk is not None:
                self.add(dk[at], ops.t(ds), self.q[at][:, :, rows] * self.alpha, rows, cols)
            if dq is not None:
                o = np.matmul(ds, self.k[at][:, :, cols], out=dq[at][:, :, rows])
                o *= self.alpha

    def again(self, at: tuple, rows: slice, cols: slice) -> np.ndarray:
        e = self.scores(at, rows, cols)
        if self.top is not None:
            e -= self.top[at][:, :, rows]
        return np.exp(e, out=e)

    def add(self, d: np.ndarray, a: np.ndarray, b: np.ndarray, rows: slice, cols: slice) -> None:
        "d ← a b for the last queries, who come first and see every key; d += a b for the others."
        if rows.stop == self.q.shape[2]:
            np.matmul(a, b, out=d)
        else:
            d[:, :, cols] += a @ b


def queries(t: int) -> int:
    "How many queries of t a tile of causal attention has: few leave out more of what cannot be seen, many make better products."
    return min(t, max(ROWS, t // 8))


def tiles(B: int, H: int, t: int, s: int, causal: bool) -> list[list[tuple]]:
    "For each group of heads its tiles, the last queries first: (batch rows and heads, queries, the keys they may see).  Groups are independent."
    r = queries(t) if causal else min(t, max(ROWS, TILE // s))
    shared = get_num_threads() if B * H * t * s >= 4 * TILE else 1               # less is not worth the handing over
    size = min(TILE, -(-B * H * r * s // shared))                                # at least a group for each thread
    h = min(H, max(1, size // (r * s)))
    b = max(1, size // (r * s * H)) if h == H else 1
    ends = [(i, min(i + r, t)) for i in reversed(range(0, t, r))]
    return [[((slice(i, i + b), slice(j, j + h)), slice(m, n), slice(0, n + s - t if causal else s)) for m, n in ends]
            for i in range(0, B, b) for j in range(0, H, h)]


def part(a: np.ndarray, at: tuple, rows: slice, cols: slice) -> np.ndarray:
    "A tile of what broadcasts to (B, H, t, s)."
    a = a.reshape((1,) * (4 - a.ndim) + a.shape)
    return a[tuple(slice(None) if n == 1 else i for n, i in zip(a.shape, (*at, rows, cols)))]


def _key(at: tuple, rows: slice, cols: slice) -> tuple[int, ...]:
    return at[0].start, at[1].start, rows.start

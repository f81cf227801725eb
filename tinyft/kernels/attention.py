"""Attention on NumPy that keeps no scores: they are computed tile by tile, and computed again for the gradient.

With S = α Q Kᵀ + B, E = e^(S − top) and z the row sums of E, the probabilities P = E/z are never written:

    O = E V / z,        Ĝ = G / z,   dV = Eᵀ Ĝ,   dB = E ⊙ (Ĝ Vᵀ − Σ Ĝ O),   dQ = α dB K,   dK = dBᵀ (α Q)

So memory grows with the length of the sequence, not with its square; of a causal square only the tiles below the
diagonal are computed; and the seven passes over a tile stay in the cache.  (FlashAttention, Dao et al. 2022; here a
tile has some queries and all their keys.)
"""
from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import ops
from ..tensor import sum_to
from .threads import each, get_num_threads

TILE = 1 << 17                                           # scores in a tile: 512 kB
ROWS = 64                                                # queries in a tile of causal attention, at least
SAFE = 40                                                # e⁴⁰ and e⁻⁴⁰, summed and multiplied, stay far inside float32


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    key_mask: np.ndarray | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_mask: np.ndarray | None = None,
) -> Any:
    """Saves the (B, H, Tq, Tk) scores, and the copies of key/value heads that several query heads share.

    For q (B, H, Tq, D), k and v (B, Hkv, Tk, D) in float32, with Tk >= Tq where causal."""
    ops.attention_shape(q, k, v, bias, key_mask, dropout_mask)
    arrays = [q, k, v] if bias is None else [q, k, v, bias]
    if not (q.ndim == 4 and q.size and k.size and k.shape == v.shape and all(a.dtype == np.float32 for a in arrays)
            and (k.shape[2] >= q.shape[2] or not causal)):
        return NotImplemented
    alpha = q.shape[-1]**-0.5 if scale is None else scale
    y = np.empty_like(q)                                                         # in the memory layout of q
    tiled = _Attention(q, k, v, y, bias, key_mask, causal, alpha, dropout_mask)
    each(tiled.groups, tiled.forward)

    def back(g: np.ndarray, needed: list[bool]) -> tuple:
        gradients = [np.empty_like(a) if n else None for a, n in zip((q, k, v), needed)]
        db = np.zeros_like(bias) if any(needed[3:]) else None
        tiled.gradients(g, *gradients, db)
        return (*gradients, db)[:len(needed)]
    return y, back


class _Attention:
    """The arrays and the tiles of one call.

    All arrays have the leading axes (B, H), or (B, Hkv, H/Hkv) where query heads share key/value heads; k and v then
    have length 1 on the third. y: the output;  z: the row sums;  top: the maximum subtracted from each row of scores,
    None for no subtraction."""

    def __init__(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        y: np.ndarray,
        bias: np.ndarray | None,
        key_mask: np.ndarray | None,
        causal: bool,
        alpha: float,
        dropout_mask: np.ndarray | None,
    ):
        B, H, t, _ = q.shape
        s = k.shape[2]
        self.heads = H
        self.kv_heads = k.shape[1]
        self.q = self.grouped(q)
        self.k = self.grouped(k)
        self.v = self.grouped(v)
        self.y = self.grouped(y)
        self.alpha = np.float32(alpha)
        self.bias = None if bias is None else self.grouped(bias)
        self.dropout_mask = None if dropout_mask is None else self.grouped(dropout_mask)
        self.hide = None
        if key_mask is not None:
            self.hide = self.grouped(np.where(key_mask, np.float32(0), np.float32(-math.inf)))
        self.future = None
        if causal:
            rows = queries(t)
            self.future = np.triu(np.full((rows, rows), -math.inf, np.float32), 1)
        self.z = np.empty((*self.q.shape[:-1], 1), np.float32)
        self.ones = np.ones(s, np.float32)
        bound = abs(alpha) * longest(q) * longest(k)                             # no score is larger: |q·k| <= |q| |k|
        if bias is not None:
            bound += np.abs(bias).max()
        self.top = None if bound <= SAFE else np.empty_like(self.z)
        self.groups = tiles(B, H, self.kv_heads, t, s, causal)
        self.saved: dict | None = {} if B * H * t * s <= TILE else None          # scores that fit the cache are kept

    def grouped(self, a: np.ndarray) -> np.ndarray:
        """A view with the leading axes of the tiles.

        a broadcasts to (B, H, Tq, Tk), or has one head for each key/value head."""
        a = a.reshape((1,) * (4 - a.ndim) + a.shape)
        if self.heads == self.kv_heads:
            return a
        B, H, *matrix = a.shape
        return a.reshape(B, self.kv_heads, -1, *matrix) if H > 1 else a.reshape(B, 1, 1, *matrix)

    def scores(self, at: tuple, rows: slice, cols: slice) -> np.ndarray:
        """α Q Kᵀ + B of a tile, −∞ where a query may not look."""
        x = (self.q[at][..., rows, :] * self.alpha) @ ops.t(self.k[at][..., cols, :])
        if self.bias is not None:
            x += part(self.bias, at, rows, cols)
        if self.future is not None:
            n = rows.stop - rows.start
            x[..., -n:] += self.future[:n, :n]
        if self.hide is not None:
            x += part(self.hide, at, rows, cols)
        return x

    def forward(self, group: list) -> None:
        """The output and the row sums of a group of tiles."""
        for tile in group:
            at, rows, cols = tile
            e = self.scores(*tile)
            z = self.z[at][..., rows, :]
            if self.top is not None:
                top = e.max(axis=-1, keepdims=True, out=self.top[at][..., rows, :])
                top[top == -math.inf] = 0
                e -= top
            np.exp(e, out=e)
            z[..., 0] = e @ self.ones[cols]
            z += z == 0                                  # a query that may look at no key gives zeros
            if self.saved is not None:
                self.saved[_key(*tile)] = e
            if self.dropout_mask is not None:
                e = e * part(self.dropout_mask, at, rows, cols)
            o = np.matmul(e, self.v[at][..., cols, :], out=self.y[at][..., rows, :])
            o /= z

    def gradients(
        self,
        g: np.ndarray,
        dq: np.ndarray | None,
        dk: np.ndarray | None,
        dv: np.ndarray | None,
        db: np.ndarray | None,
    ) -> None:
        """Fill dq, dk and dv, and add to db; None for a gradient that is not wanted."""
        wanted = [None if a is None else self.grouped(a) for a in (dq, dk, dv, db)]
        groups = self.groups if db is None else merged(self.groups, wanted[3])
        g = self.grouped(g)
        each(groups, lambda group: self.backward(group, g, *wanted))

    def backward(
        self,
        group: list,
        g: np.ndarray,
        dq: np.ndarray | None,
        dk: np.ndarray | None,
        dv: np.ndarray | None,
        db: np.ndarray | None,
    ) -> None:
        """The gradients that come from a group of tiles."""
        for tile in group:
            at, rows, cols = tile
            e = self.saved[_key(*tile)] if self.saved is not None else self.again(*tile)
            G = g[at][..., rows, :] / self.z[at][..., rows, :]
            mask = None if self.dropout_mask is None else part(self.dropout_mask, at, rows, cols)
            if dv is not None:
                self.add(dv[at], ops.t(e if mask is None else e * mask), G, rows, cols)
            if dq is None and dk is None and db is None:
                continue
            ds = G @ ops.t(self.v[at][..., cols, :])
            if mask is not None:
                ds *= mask
            ds -= np.einsum("...td,...td->...t", G, self.y[at][..., rows, :])[..., None]
            ds *= e
            if db is not None:
                there = part(db, at, rows, cols)
                there += sum_to(ds, there.shape)
            if dk is not None:
                self.add(dk[at], ops.t(ds), self.q[at][..., rows, :] * self.alpha, rows, cols)
            if dq is not None:
                o = np.matmul(ds, self.k[at][..., cols, :], out=dq[at][..., rows, :])
                o *= self.alpha

    def again(self, at: tuple, rows: slice, cols: slice) -> np.ndarray:
        """E of a tile, computed a second time."""
        e = self.scores(at, rows, cols)
        if self.top is not None:
            e -= self.top[at][..., rows, :]
        return np.exp(e, out=e)

    def add(self, d: np.ndarray, a: np.ndarray, b: np.ndarray, rows: slice, cols: slice) -> None:
        """d ← a b for the last queries, which come first and look at every key; d += a b for the others.

        Where query heads share a key/value head, their products are summed."""
        first = rows.stop == self.q.shape[-2]
        if self.heads != self.kv_heads:
            product = (a @ b).sum(axis=2, keepdims=True)
        elif first:
            product = np.matmul(a, b, out=d)
        else:
            product = a @ b
        if not first:
            d[..., cols, :] += product
        elif product is not d:
            d[...] = product


def longest(a: np.ndarray) -> float:
    """The largest norm of a row of a (B, H, T, D)."""
    return np.einsum("bhtd,bhtd->bht", a, a).max()**0.5


def queries(t: int) -> int:
    """The number of queries, of t, in a tile of causal attention.

    With few, more of the upper triangle is left out; with many, products are faster."""
    return min(t, max(ROWS, t // 8))


def tiles(B: int, H: int, kv_heads: int, t: int, s: int, causal: bool) -> list[list[tuple]]:
    """For each group of heads its tiles, the last queries first: (slices of the leading axes, queries, their keys).

    Groups are independent. Query heads that share a key/value head are in one tile."""
    shared = H // kv_heads
    r = queries(t) if causal else min(t, max(ROWS, TILE // (s * shared)))
    threads = get_num_threads() if B * H * t * s >= 4 * TILE else 1              # less is not worth the handing over
    size = min(TILE, -(-B * H * r * s // threads))                               # at least a group for each thread
    scores = r * s * shared                                                      # of one key/value head
    h = min(kv_heads, max(1, size // scores))
    b = max(1, size // (scores * kv_heads)) if h == kv_heads else 1
    together = () if shared == 1 else (slice(None),)
    rows = []
    for start in reversed(range(0, t, r)):
        end = min(start + r, t)
        keys = end + s - t if causal else s
        rows.append((slice(start, end), slice(0, keys)))
    groups = []
    for i in range(0, B, b):
        for j in range(0, kv_heads, h):
            at = (slice(i, i + b), slice(j, j + h), *together)
            groups.append([(at, queries_of_tile, keys) for queries_of_tile, keys in rows])
    return groups


def merged(groups: list[list[tuple]], db: np.ndarray) -> list[list[tuple]]:
    """The groups of tiles; those that add to the same part of db are made one. Independent, and in a fixed order."""
    found: dict[tuple, list[tuple]] = {}
    for group in groups:
        batch, heads = group[0][0][:2]
        part_of_db = (batch.start if db.shape[0] > 1 else 0, heads.start if db.shape[1] > 1 else 0)
        found.setdefault(part_of_db, []).extend(group)
    return list(found.values())


def part(a: np.ndarray, at: tuple, rows: slice, cols: slice) -> np.ndarray:
    """A tile of an array that broadcasts to the scores, a view."""
    return a[tuple(slice(None) if n == 1 else i for n, i in zip(a.shape, (*at, rows, cols)))]


def _key(at: tuple, rows: slice, cols: slice) -> tuple[int, ...]:
    return at[0].start, at[1].start, rows.start

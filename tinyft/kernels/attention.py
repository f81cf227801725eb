"""Attention on NumPy without an array of all scores: they are computed tile by tile, and again for the gradient.

A tile is a rectangle of the scores: some queries of some heads, and all keys that these queries may look at.

With S = α Q Kᵀ + B, `top` the maximum of each row of S, E = e^(S − top) and z the row sums of E, the probabilities are
P = E/z. They are never stored. G is the gradient of the output O:

    O = E V / z,        Ĝ = G / z,   dV = Eᵀ Ĝ,   dB = E ⊙ (Ĝ Vᵀ − Σ Ĝ O),   dQ = α dB K,   dK = dBᵀ (α Q)

Where no score can be large, top is 0 (see SAFE). Memory grows with the length of the sequence, not with its square.
Causal attention computes only the tiles that reach below the diagonal. The seven passes over a tile stay in the cache.
FlashAttention, Dao et al. 2022
"""
from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import operands, ops
from ..tensor import sum_to
from .threads import each, get_num_threads

TILE = 1 << 17                                           # scores in a tile: 512 kB
ROWS = 64                                                # queries in a tile, at least
SAFE = 40                                                # if all |scores| <= 40, exp needs no maximum subtracted:
                                                         # sums and products of e⁴⁰ and e⁻⁴⁰ stay far inside float32


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
    """ops.attention without an array of all scores (B, H, Tq, Tk), and without copies of shared key/value heads.

    Returns (y, joint pullback) for q (B, H, Tq, D), k and v (B, Hkv, Tk, D) in float32, with Tk >= Tq if causal; else
    NotImplemented."""
    masks = read_operands(q, k, v, bias, key_mask, dropout_mask, causal=causal)
    if masks is None:
        return NotImplemented
    bias, key_mask, dropout_mask = masks
    alpha = q.shape[-1]**-0.5 if scale is None else scale
    y = np.empty_like(q)                                                         # in the memory layout of q
    tiled = _Attention(q, k, v, y, bias, key_mask, causal, alpha, dropout_mask)
    each(tiled.groups, tiled.forward)

    def back(g: np.ndarray, needed: list[bool]) -> tuple:
        """The gradients of q, k, v and bias, None where needed[i] is False."""
        gradients = [np.empty_like(a) if is_needed else None for a, is_needed in zip((q, k, v), needed)]
        db = np.zeros_like(bias) if any(needed[3:]) else None
        tiled.gradients(g, *gradients, db)
        return (*gradients, db)[:len(needed)]
    return y, back


def read_operands(
    q: Any, k: Any, v: Any, bias: Any, key_mask: Any, dropout_mask: Any, *, causal: bool,
) -> tuple | None:
    """(bias, key_mask, dropout_mask) as arrays, None where there is none; None for operands that no kernel takes.

    The kernels take float32 q (B, H, Tq, D), k and v (B, Hkv, Tk, D) that are not empty, with Tk >= Tq if causal."""
    masks = operands.attention_masks(q, bias, key_mask, dropout_mask)
    operands.attention_shape(q, k, v, *masks)
    arrays = [q, k, v] if masks[0] is None else [q, k, v, masks[0]]
    shapes_fit = q.ndim == 4 and q.size > 0 and k.size > 0 and k.shape == v.shape
    if not shapes_fit or any(a.dtype != np.float32 for a in arrays) or (causal and k.shape[2] < q.shape[2]):
        return None
    return masks


class _Attention:
    """The arrays and the tiles of one call.

    All arrays have the leading axes (B, H), or (B, Hkv, H/Hkv) where query heads share key/value heads. In the second
    case the third axis of k and v has length 1.

    y             the output
    z             (..., Tq, 1) the row sums of E
    top           (..., Tq, 1) the maximum that is subtracted from each row of scores; None: nothing is subtracted
    hidden_keys   0 where key_mask is True, −∞ where it is False; None without a key_mask
    future        (n, n) −∞ above the diagonal, for the n queries of a tile; None if not causal
    groups        lists of tiles; see `tiles`. A tile is (at, rows, cols): `at` indexes the leading axes, the slice
                  `rows` the queries, the slice `cols` their keys
    saved         {tile: E}, if all scores fit the cache; None: E is computed again for the gradient"""

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
        """Group the heads of all arrays and cut the scores into tiles. Computes no scores.

        y: the array that `forward` fills.  alpha: the factor on Q Kᵀ."""
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
        self.hidden_keys = None                                                  # 0 or −∞, added to the scores
        if key_mask is not None:
            self.hidden_keys = self.grouped(np.where(key_mask, np.float32(0), np.float32(-math.inf)))
        self.future = None                                                       # the same, above the diagonal
        if causal:
            n = causal_tile_rows(t)
            self.future = np.triu(np.full((n, n), -math.inf, np.float32), 1)
        self.z = np.empty((*self.q.shape[:-1], 1), np.float32)
        self.ones = np.ones(s, np.float32)                                       # e @ ones is a fast sum over rows
        bound = abs(alpha) * largest_norm(q) * largest_norm(k)                   # of |score|, since |q·k| <= |q| |k|
        if bias is not None:
            bound += np.abs(bias).max()
        self.top = None if bound <= SAFE else np.empty_like(self.z)
        self.groups = tiles(B, H, self.kv_heads, t, s, causal)
        self.saved: dict | None = {} if B * H * t * s <= TILE else None

    def grouped(self, a: np.ndarray) -> np.ndarray:
        """A view of `a` with the leading axes (B, H), or (B, Hkv, H/Hkv) where query heads share key/value heads.

        a: an array that broadcasts to (B, H, Tq, Tk); or q, k, v or a gradient, with H or Hkv heads."""
        a = a.reshape((1,) * (4 - a.ndim) + a.shape)
        if self.heads == self.kv_heads:
            return a
        B, H, *matrix = a.shape
        if H == 1:                                                               # `a` is broadcast over all heads
            return a.reshape(B, 1, 1, *matrix)
        return a.reshape(B, self.kv_heads, -1, *matrix)

    def scores(self, at: tuple, rows: slice, cols: slice) -> np.ndarray:
        """α Q Kᵀ + B of the tile (at, rows, cols), −∞ where a query may not look.

        at: an index of the leading axes;  rows: a slice of the queries;  cols: the slice of their keys."""
        x = (self.q[at][..., rows, :] * self.alpha) @ ops.t(self.k[at][..., cols, :])
        if self.bias is not None:
            x += part(self.bias, at, rows, cols)
        if self.future is not None:
            n = rows.stop - rows.start
            x[..., -n:] += self.future[:n, :n]           # the last n keys are at the positions of the n queries
        if self.hidden_keys is not None:
            x += part(self.hidden_keys, at, rows, cols)
        return x

    def forward(self, group: list) -> None:
        """Write the output y and the row sums z of a group of tiles (at, rows, cols).

            top = max S,   E = e^(S − top),   z = Σ E,   O = (E ⊙ M) V / z,      M: dropout_mask

        E is saved for the gradient only if all scores fit the cache."""
        for tile in group:
            at, rows, cols = tile
            e = self.scores(*tile)                       # S, and in its memory E
            z = self.z[at][..., rows, :]
            if self.top is not None:
                top = e.max(axis=-1, keepdims=True, out=self.top[at][..., rows, :])
                top[top == -math.inf] = 0                # a query that may look at no key: −∞ − (−∞) would be NaN
                e -= top
            np.exp(e, out=e)
            z[..., 0] = e @ self.ones[cols]
            z += z == 0                                  # such a query has z = 0 and gives zeros: divide by 1
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
        """Fill dq, dk and dv, and add to db, from the gradient g of the output. None: that gradient is not wanted."""
        wanted = [None if a is None else self.grouped(a) for a in (dq, dk, dv, db)]
        groups = self.groups if db is None else merge_groups(self.groups, wanted[3])
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
        """Write or add the parts of dq, dk, dv and db that come from a group of tiles. None: not wanted.

            Ĝ = g / z,   dV = (E ⊙ M)ᵀ Ĝ,   dB = E ⊙ (Ĝ Vᵀ ⊙ M − Σ Ĝ O),   dQ = α dB K,   dK = dBᵀ (α Q)

        O is the output, M the dropout mask, and z the row sums of E."""
        for tile in group:
            at, rows, cols = tile
            e = self.saved[_key(*tile)] if self.saved is not None else self.recompute(*tile)
            g_over_z = g[at][..., rows, :] / self.z[at][..., rows, :]
            mask = None if self.dropout_mask is None else part(self.dropout_mask, at, rows, cols)
            if dv is not None:
                self.add_product(dv[at], ops.t(e if mask is None else e * mask), g_over_z, rows, cols)
            if dq is None and dk is None and db is None:
                continue
            ds = g_over_z @ ops.t(self.v[at][..., cols, :])                      # becomes dB, the gradient of S
            if mask is not None:
                ds *= mask
            ds -= np.einsum("...td,...td->...t", g_over_z, self.y[at][..., rows, :])[..., None]
            ds *= e
            if db is not None:
                db_of_tile = part(db, at, rows, cols)
                db_of_tile += sum_to(ds, db_of_tile.shape)
            if dk is not None:
                self.add_product(dk[at], ops.t(ds), self.q[at][..., rows, :] * self.alpha, rows, cols)
            if dq is not None:
                dq_of_tile = np.matmul(ds, self.k[at][..., cols, :], out=dq[at][..., rows, :])
                dq_of_tile *= self.alpha

    def recompute(self, at: tuple, rows: slice, cols: slice) -> np.ndarray:
        """E of a tile, computed a second time."""
        e = self.scores(at, rows, cols)
        if self.top is not None:
            e -= self.top[at][..., rows, :]
        return np.exp(e, out=e)

    def add_product(self, d: np.ndarray, a: np.ndarray, b: np.ndarray, rows: slice, cols: slice) -> None:
        """Add the product a b to d[..., cols, :], where d is the part of dk or dv that a group of tiles computes.

        d is not initialised. The first tile of the group has the last queries (`rows`), which look at every key: it
        writes all of d, and the others add. Where query heads share a key/value head, their products are summed."""
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


def largest_norm(a: np.ndarray) -> float:
    """The largest Euclidean norm of a row of a (B, H, T, D)."""
    return np.einsum("bhtd,bhtd->bht", a, a).max()**0.5


def causal_tile_rows(t: int) -> int:
    """The number of queries in a tile of causal attention over t queries.

    Lower tiles leave out more of the upper triangle; higher tiles make faster products."""
    return min(t, max(ROWS, t // 8))


def tiles(B: int, H: int, kv_heads: int, t: int, s: int, causal: bool) -> list[list[tuple]]:
    """The tiles (at, rows, cols) in groups: one group for each block of sequences and heads, the last queries first.

    at: slices of the leading axes;  rows: a slice of the t queries;  cols: the slice of the s keys that they look at.
    Groups are independent: each may run on a thread of its own. Query heads that share a key/value head are in one
    tile. A tile has about TILE scores, or fewer, so that every thread gets some."""
    shared = H // kv_heads                                                       # query heads for a key/value head
    n_rows = causal_tile_rows(t) if causal else min(t, max(ROWS, TILE // (s * shared)))
    threads = get_num_threads() if B * H * t * s >= 4 * TILE else 1              # less is not worth more threads
    scores_per_thread = -(-B * H * n_rows * s // threads)                        # rounded up
    tile_size = min(TILE, scores_per_thread)
    scores_per_head = n_rows * s * shared                                        # of one key/value head
    n_heads = min(kv_heads, max(1, tile_size // scores_per_head))
    n_sequences = 1
    if n_heads == kv_heads:
        n_sequences = max(1, tile_size // (scores_per_head * kv_heads))
    query_head_axis = () if shared == 1 else (slice(None),)
    stripes = []                                                                 # (queries, their keys)
    for start in reversed(range(0, t, n_rows)):
        end = min(start + n_rows, t)
        keys = end + s - t if causal else s
        stripes.append((slice(start, end), slice(0, keys)))
    groups = []
    for i in range(0, B, n_sequences):
        for j in range(0, kv_heads, n_heads):
            at = (slice(i, i + n_sequences), slice(j, j + n_heads), *query_head_axis)
            groups.append([(at, rows, cols) for rows, cols in stripes])
    return groups


def merge_groups(groups: list[list[tuple]], db: np.ndarray) -> list[list[tuple]]:
    """The groups, with all groups that add to the same part of db joined, so that no two threads write to one part.

    A bias that is broadcast over the batch or the heads has one part for all of them. The order is fixed."""
    found: dict[tuple, list[tuple]] = {}
    for group in groups:
        batch, heads = group[0][0][:2]                   # of `at`, which all tiles of a group share
        part_of_db = (batch.start if db.shape[0] > 1 else 0, heads.start if db.shape[1] > 1 else 0)
        found.setdefault(part_of_db, []).extend(group)
    return list(found.values())


def part(a: np.ndarray, at: tuple, rows: slice, cols: slice) -> np.ndarray:
    """The part of `a` that belongs to a tile, as a view. `a` broadcasts to the scores: an axis of length 1 is kept."""
    return a[tuple(slice(None) if n == 1 else i for n, i in zip(a.shape, (*at, rows, cols)))]


def _key(at: tuple, rows: slice, cols: slice) -> tuple[int, ...]:
    """The key of a tile in `saved`; slices cannot be keys."""
    return at[0].start, at[1].start, rows.start

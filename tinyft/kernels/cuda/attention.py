"""Attention on CUDA: products by cuBLAS, and between them one kernel over the scores (attention.cu).

The products read heads where they lie. Query heads that share a key/value head are one matrix in a product, their rows
one below the other: keys and values are not copied, and the product sums their gradients over the group.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from ... import operands
from ...array import Array, xp
from ...ops import t
from ...precision import rounded
from ...tensor import sum_to
from . import gemm
from .launch import C_TYPES, THREADS, contiguous, empty, launch, warp_blocks

PART_QUERIES = 256                                       # queries of a part, where causal attention is cut into parts


def attention(q: Array, k: Array, v: Array, bias: Array | None = None, *, key_mask: Array | None = None,
              causal: bool = False, scale: float | None = None, dropout_mask: Array | None = None) -> Any:
    """(y, joint pullback) of ops.attention: products by cuBLAS, one kernel for bias, masks, softmax and dropout.

    Makes no array of the causal mask and no copies of shared key/value heads. A long causal sequence is processed in
    parts of its queries, each with the keys up to its end: later scores are not computed. The P of every part is kept.
    NotImplemented unless all floats are of one dtype, float32 or 16-bit, not empty, with at most 4 axes."""
    bias, key_mask, dropout_mask = operands.attention_masks(q, bias, key_mask, dropout_mask)
    shape = operands.attention_shape(q, k, v, bias, key_mask, dropout_mask)      # (..., H, Tq, Tk)
    floats = [a for a in (q, k, v, bias, dropout_mask) if a is not None]
    if not (q.ndim <= 4 and q.dtype in C_TYPES and all(a.dtype == q.dtype and a.size for a in floats)):
        return NotImplemented
    group = q.shape[-3] // k.shape[-3] if q.ndim > 2 else 1       # query heads that share a key/value head
    q, k, v = (gemm.readable(a) for a in (q, k, v))      # a copy only if cuBLAS cannot read it; backward uses it too
    alpha = float(q.shape[-1]**-0.5 if scale is None else scale)
    bias_shape = None if bias is None else bias.shape
    bias = _all_axes(bias, shape)
    key_mask = _all_axes(key_mask, shape)
    dropout_mask = None if dropout_mask is None else xp(q).broadcast_to(dropout_mask, shape)
    y = empty(q, (*shape[:-1], v.shape[-1]))
    parts = []
    for rows, keys in _parts(*shape[-2:], causal):
        masks = [_cut(a, rows, keys) for a in (bias, key_mask, dropout_mask)]
        part = _Scores(_rows(q, rows), _rows(k, keys), *masks, causal, alpha, group)
        _multiply_into(_rows(y, rows), part.dropped, _rows(v, keys), group)
        part.dropped = None                              # back computes it again
        parts.append((rows, keys, part))

    def back(g: Array, needed: list[bool]) -> tuple:
        """The gradients of q, k, v and bias, None where needed[i] is False. g: the gradient of y."""
        g = gemm.readable(g)
        sum_dtype = np.float32 if len(parts) > 1 else q.dtype           # a sum of several parts is rounded last
        dq = empty(q, q.shape) if needed[0] else None
        dk = empty(q, k.shape, sum_dtype) if needed[1] else None
        dv = empty(q, v.shape, sum_dtype) if needed[2] else None
        db = xp(q).zeros(bias.shape, np.float32) if any(needed[3:]) else None
        # The last part has all keys: it comes first and writes. The others add.
        for i, (rows, keys, part) in enumerate(reversed(parts)):
            g_rows = _fold(_rows(g, rows), group)
            if dv is not None:
                gemm.matmul(t(_fold(part.after_dropout(), group)), g_rows, out=_rows(dv, keys), add=i > 0)
            if dq is None and dk is None and db is None:
                continue
            ds, db_part = part.back(gemm.matmul_float32(g_rows, t(_rows(v, keys))), db is not None)
            if db is not None:
                db_view = _view(db, rows, keys)
                db_view += sum_to(db_part, db_view.shape)               # undoes the broadcasting of the bias
            if dq is not None:
                _multiply_into(_rows(dq, rows), ds, _rows(k, keys), group)
            if dk is not None:
                gemm.matmul(t(_fold(ds, group)), _fold(_rows(q, rows), group), out=_rows(dk, keys), add=i > 0)
        dk, dv = (d if d is None else rounded(d, q.dtype) for d in (dk, dv))
        if db is not None:
            db = db.reshape(bias_shape)
        return (dq, dk, dv, db)[:len(needed)]
    return y, back


class _Scores:
    """The probabilities P (..., H, t, n) of some queries over some keys, and `dropped`, P ⊙ M, the same after dropout.

        S = α Q Kᵀ + B,    P = softmax(S) over the keys that the masks allow,    dropped = P ⊙ M

    q (..., H, t, D) and k (..., Hkv, n, D); the other arrays broadcast to P, with as many axes."""

    def __init__(self, q: Array, k: Array, bias: Array | None, key_mask: Array | None, dropout_mask: Array | None,
                 causal: bool, alpha: float, group: int):
        """Compute P = softmax(α Q Kᵀ + B), and `dropped`, P after dropout. `back` needs only P and the dropout mask.

        group: the number of query heads that share a key/value head."""
        queries, n = q.shape[-2], k.shape[-2]
        s = gemm.matmul_float32(_fold(q, group), t(k))
        if group > 1:
            s = s.reshape(*q.shape[:-1], n)                             # undoes _fold
        rows = s.size // n                                              # over all leading axes
        heads = s.shape[-3] if s.ndim > 2 else 1
        self.dropout_mask = dropout_mask
        self.alpha = alpha
        self.sizes = np.int64(rows), n                                  # the kernel's `rows` is a long long
        self.p = s if s.dtype == q.dtype else empty(q, s.shape)         # over the scores, if they have its dtype
        self.dropped = self.p if dropout_mask is None else empty(q, s.shape)
        launch("attention.cu", "masked_softmax", warp_blocks(rows), THREADS,
               s, bias, key_mask, dropout_mask, self.p, self.dropped, *self.sizes, queries, heads, causal, alpha,
               *_strides(bias), *_strides(key_mask), T=q.dtype)

    def after_dropout(self) -> Array:
        return self.p if self.dropout_mask is None else self.p * self.dropout_mask

    def back(self, dp: Array, bias_needed: bool) -> tuple[Array, Array | None]:
        """The gradient of `dropped` (float32) -> those of Q Kᵀ and, if needed, of S (float32), both (..., H, t, n).

            dP = d(dropped) ⊙ M,    dS = P (dP − Σ dP P),    d(Q Kᵀ) = α dS

        dP and dS are 0 at keys that are masked, since P is.  The memory of the argument may be written over."""
        p, (rows, n) = self.p, self.sizes
        dp = dp.reshape(p.shape)                                        # undoes _fold
        ds = dp if dp.dtype == p.dtype else empty(p, p.shape)           # becomes α dS
        db = empty(p, p.shape, np.float32) if bias_needed else None     # becomes dS
        launch("attention.cu", "masked_softmax_back", warp_blocks(int(rows)), THREADS,
               p, self.dropout_mask, dp, ds, db, rows, n, self.alpha, T=p.dtype)
        return ds, db


def _parts(queries: int, keys: int, causal: bool) -> list[tuple[slice, slice]]:
    """Pairs (a slice of the queries, the slice of the keys that they may look at), in order.

    Causal attention over at least 2 PART_QUERIES queries has several parts. Its queries stand at the last positions of
    the keys, so the part that ends with query `end` looks at the first keys − queries + end keys. Else there is one
    part."""
    if not causal or queries < 2 * PART_QUERIES or keys < queries:
        return [(slice(0, queries), slice(0, keys))]
    ends = [(start, min(start + PART_QUERIES, queries)) for start in range(0, queries, PART_QUERIES)]
    return [(slice(start, end), slice(0, keys - queries + end)) for start, end in ends]


def _rows(a: Array, rows: slice) -> Array:
    """These rows of each matrix; all of them: a itself, since a view costs the host as much as a launch."""
    return a if rows.stop - rows.start == a.shape[-2] else a[..., rows, :]


def _fold(a: Array, group: int) -> Array:
    """(..., H, m, n) -> (..., H/group, group m, n): the matrices of a group of heads, one below the other.

    A copy if a is not contiguous."""
    return a if group == 1 else a.reshape(*a.shape[:-3], a.shape[-3] // group, group * a.shape[-2], a.shape[-1])


def _multiply_into(out: Array, a: Array, b: Array, group: int) -> None:
    """out ← a b, each head of a with its key/value head of b.

    a (..., H, m, n) contiguous, b (..., Hkv, n, k), out (..., H, m, k); group = H / Hkv. The heads of a group are
    multiplied as one matrix (_fold)."""
    if group == 1:
        gemm.matmul(a, b, out=out)
    elif out.flags.c_contiguous:
        gemm.matmul(_fold(a, group), b, out=_fold(out, group))
    else:
        out[...] = gemm.matmul(_fold(a, group), b).reshape(out.shape)


def _all_axes(a: Array | None, shape: tuple) -> Array | None:
    """a with as many axes as the scores, contiguous."""
    return None if a is None else contiguous(a.reshape((1,) * (len(shape) - a.ndim) + a.shape))


def _view(a: Array, rows: slice, keys: slice) -> Array:
    """These rows and keys of an array that has one of each, or all."""
    every = slice(None)
    return a[..., rows if a.shape[-2] > 1 else every, keys if a.shape[-1] > 1 else every]


def _cut(a: Array | None, rows: slice, keys: slice) -> Array | None:
    return None if a is None else contiguous(_view(a, rows, keys))


def _strides(a: Array | None) -> tuple[np.int64, ...]:
    """The strides, in entries, along the axes (batch, head, query, key) of the scores, for the kernel.

    Zero along axes of length one and along missing leading axes: the kernel broadcasts so. All zero for None."""
    if a is None:
        return (np.int64(0),) * 4
    steps = [0 if n == 1 else step // a.itemsize for n, step in zip(a.shape, a.strides)]
    return tuple(np.int64(step) for step in (*(0,) * (4 - a.ndim), *steps))

"""The compiled kernel of attention: tiles of the scores, as in kernels/attention.py, in one call from Python.

    S = α Q Kᵀ + B,   top = max of each row of S,   E = e^(S − top),   z = row sums of E
    O = (E ⊙ M) V / z                                                                      M: dropout mask, or 1

    Ĝ = G / z,   dV = (E ⊙ M)ᵀ Ĝ,   dS = E ⊙ (Ĝ Vᵀ ⊙ M − Σ Ĝ O),   dB = dS,   dQ = α dS K,   dK = α dSᵀ Q

A tile has some queries of one head, and all keys that they may look at. E is computed again for the gradient, from the
kept `top` and z. A query that may look at no key has z = 0, and gives zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from ...tensor import sum_to
from ..attention import read_operands
from ..threads import one_blas_thread_from
from ..tile_sizes import queries_of_tile
from .blas import NOT_TRANSPOSED, ROW_MAJOR, TRANSPOSED, is_available, sgemm
from .compiler import Matrix, Vector, boolean, calls, compiled_sum, float32, inlined, int64, pasted
from .shared import ONE, ZERO, exp, largest, row_parts, run, run_parts

__all__ = ["attention"]

Heads = types.float32[:, :, :, :]  # (B, H, T, D); the numbers of a row are neighbours in memory
Rows = types.float32[:, :, ::1]  # (B, H, T), one number for each query
Head = types.float32[:, :]  # (T, D): queries, keys or values of one head
Masks = types.float32[:, :, :, ::1]  # (B or 1, H or 1, Tq or 1, Tk), a bias or a mask
Sums = types.float32[:, :, :, :, ::1]  # (threads, ...): a gradient of the bias for each thread
ABSENT = np.zeros((1, 1, 1, 0), np.float32)  # stands for a missing bias or mask
MINUS_INFINITY = np.float32(-np.inf)
SCORE = 4  # A score takes as much time as four elements of a GELU, in which `shares` counts the work


# ---------------------------------------------------------------------------------------------------- products
@inlined
def multiply(alpha: float32, A: Head, B: Head, beta: float32, C: Head) -> None:
    """C ← α A B + β C"""
    sgemm(ROW_MAJOR, NOT_TRANSPOSED, NOT_TRANSPOSED, C.shape[0], C.shape[1], A.shape[1], alpha, A.ctypes, row_step(A),
          B.ctypes, row_step(B), beta, C.ctypes, row_step(C))


@inlined
def multiply_by_transposed(alpha: float32, A: Head, B: Head, beta: float32, C: Head) -> None:
    """C ← α A Bᵀ + β C"""
    sgemm(ROW_MAJOR, NOT_TRANSPOSED, TRANSPOSED, C.shape[0], C.shape[1], A.shape[1], alpha, A.ctypes, row_step(A),
          B.ctypes, row_step(B), beta, C.ctypes, row_step(C))


@inlined
def multiply_transposed(alpha: float32, A: Head, B: Head, beta: float32, C: Head) -> None:
    """C ← α Aᵀ B + β C"""
    sgemm(ROW_MAJOR, TRANSPOSED, NOT_TRANSPOSED, C.shape[0], C.shape[1], A.shape[0], alpha, A.ctypes, row_step(A),
          B.ctypes, row_step(B), beta, C.ctypes, row_step(C))


@inlined
def row_step(A: Head) -> int64:
    """The distance between two rows of A, in elements. That of a single row may be anything; BLAS wants its length."""
    return max(A.strides[0] // 4, A.shape[1])


# ---------------------------------------------------------------------------------------------------- one head
@inlined
def add_rows(E: Matrix, terms: Matrix, first_query: int64) -> None:
    """Add to the scores E of a tile a bias, or the terms of a mask (0 or −∞). terms (Tq or 1, Tk)"""
    for i in range(E.shape[0]):
        scores = E[i]
        row_of_terms = terms[min(first_query + i, terms.shape[0] - 1), : len(scores)]
        for j in range(len(scores)):
            scores[j] += row_of_terms[j]


@inlined
def add_to_rows(terms: Matrix, dS: Matrix, first_query: int64) -> None:
    """Add the gradient dS of a tile's scores to `terms`, the gradient of a bias (Tq or 1, Tk)."""
    for i in range(dS.shape[0]):
        gradients = dS[i]
        row_of_terms = terms[min(first_query + i, terms.shape[0] - 1), : len(gradients)]
        for j in range(len(gradients)):
            row_of_terms[j] += gradients[j]


@inlined
def scores_of(E: Matrix, q: Head, k: Head, bias: Matrix, hidden: Matrix, alpha: float32, first_query: int64) -> None:
    """E ← S of a tile, −∞ for hidden keys. `bias` or `hidden` is empty if there is none."""
    multiply_by_transposed(alpha, q, k, ZERO, E)
    if bias.size:
        add_rows(E, bias, first_query)
    if hidden.size:
        add_rows(E, hidden, first_query)


@inlined
def seen_keys(query: int64, queries: int64, keys: int64, causal: boolean) -> int64:
    """The number of keys that this query may look at, where no mask hides one."""
    return query + keys - queries + 1 if causal else keys


@inlined
def exponentials(E: Matrix, first_query: int64, queries: int64, keys: int64, causal: boolean, top: Vector) -> None:
    """E ← e^(E − top) for the keys that each query may look at, 0 for the others"""
    for i in range(E.shape[0]):
        seen = seen_keys(first_query + i, queries, keys, causal)
        scores, later, t = E[i, :seen], E[i, seen:], top[i]
        for j in range(len(scores)):
            scores[j] = exp(scores[j] - t)
        for j in range(len(later)):
            later[j] = ZERO


@inlined
def drop(E: Matrix, keep: Matrix, first_query: int64) -> None:
    """E ← E ⊙ M for the queries of a tile. keep (Tq, Tk): M"""
    for i in range(E.shape[0]):
        scores = E[i]
        factors = keep[first_query + i, : len(scores)]
        for j in range(len(scores)):
            scores[j] *= factors[j]


@inlined
def inverse_of(z: float32) -> float32:
    """1 / z; 0 for a query that sees no key, whose z is 0; NaN for NaN"""
    return ONE / z if z > ZERO else ZERO if z == ZERO else z


@pasted
def head_forward(
    q: Head, k: Head, v: Head, bias: Matrix, hidden: Matrix, keep: Matrix, causal: boolean, alpha: float32,
    n_rows: int64, memory: Vector, y: Head, top: Vector, z: Vector,
) -> None:
    """O, top and z of one head, tile by tile."""
    queries, keys = len(q), len(k)
    for first in range(0, queries, n_rows):
        last = min(first + n_rows, queries)
        n = seen_keys(last - 1, queries, keys, causal)
        E = memory[: (last - first) * n].reshape(last - first, n)
        scores_of(E, q[first:last], k[:n], bias, hidden, alpha, first)
        for i in range(len(E)):
            t = largest(E[i, : seen_keys(first + i, queries, keys, causal)])
            top[first + i] = ZERO if t == MINUS_INFINITY else t
        exponentials(E, first, queries, keys, causal, top[first:last])
        for i in range(len(E)):
            total = ZERO
            scores = E[i]
            for j in range(n):
                total += scores[j]
            z[first + i] = total
        if keep.size:
            drop(E, keep, first)
        multiply(ONE, E, v[:n], ZERO, y[first:last])
        for i in range(first, last):
            inverse = inverse_of(z[i])
            for j in range(y.shape[1]):
                y[i, j] *= inverse


@pasted
def head_backward(
    q: Head, k: Head, v: Head, bias: Matrix, hidden: Matrix, keep: Matrix, causal: boolean, alpha: float32,
    n_rows: int64, memory: Vector, memory_ds: Vector, memory_g: Matrix, y: Head, top: Vector, z: Vector, g: Head,
    is_first: boolean, dq: Head, dk: Head, dv: Head, db: Matrix,
) -> None:
    """The gradients of one head. dK and dV are written if is_first, else added to those of the earlier heads.

    The gradient of the bias is added to db, which may be empty. The last tile comes first: it reaches all keys, and so
    writes all of dK and dV.
    """
    queries, keys = len(q), len(k)
    last_start = (queries - 1) // n_rows * n_rows
    for first in range(last_start, -1, -n_rows):
        last = min(first + n_rows, queries)
        n = seen_keys(last - 1, queries, keys, causal)
        beta = ZERO if is_first and first == last_start else ONE
        size = (last - first) * n
        E, dS = memory[:size].reshape(last - first, n), memory_ds[:size].reshape(last - first, n)
        scores_of(E, q[first:last], k[:n], bias, hidden, alpha, first)
        exponentials(E, first, queries, keys, causal, top[first:last])
        G = memory_g[: last - first]  # Ĝ
        for i in range(first, last):
            inverse = inverse_of(z[i])
            for j in range(G.shape[1]):
                G[i - first, j] = g[i, j] * inverse
        multiply_by_transposed(ONE, G, v[:n], ZERO, dS)
        if keep.size:
            drop(dS, keep, first)
        for i in range(last - first):
            total = ZERO
            for j in range(G.shape[1]):
                total += G[i, j] * y[first + i, j]
            e, d = E[i], dS[i]
            for j in range(n):
                d[j] = (d[j] - total) * e[j]
        if db.size:
            add_to_rows(db, dS, first)
        if keep.size:
            drop(E, keep, first)
        multiply_transposed(ONE, E, G, beta, dv[:n])
        multiply(alpha, dS, k[:n], ZERO, dq[first:last])
        multiply_transposed(alpha, dS, q[first:last], beta, dk[:n])


# ---------------------------------------------------------------------------------------------------- all heads
@inlined
def of_head(mask: Masks, b: int64, h: int64) -> Matrix:
    """The matrix of one head, from a mask (B or 1, H or 1, ...)."""
    return mask[min(b, mask.shape[0] - 1), min(h, mask.shape[1] - 1)]


@compiled_sum
def heads_forward(
    first: int64, last: int64, q: Heads, k: Heads, v: Heads, bias: Masks, hidden: Masks, keep: Masks, causal: boolean,
    alpha: float32, n_rows: int64, y: Heads, top: Rows, z: Rows,
) -> None:
    """O, top and z for the key/value heads first ... last − 1, counted over the batch, and the query heads of each."""
    kv_heads = k.shape[1]
    group = q.shape[1] // kv_heads
    memory = np.empty(n_rows * k.shape[2], np.float32)
    for i in range(first, last):
        b, kv = i // kv_heads, i % kv_heads
        for h in range(kv * group, (kv + 1) * group):
            head_forward(
                q[b, h], k[b, kv], v[b, kv], of_head(bias, b, h), of_head(hidden, b, h), of_head(keep, b, h), causal,
                alpha, n_rows, memory, y[b, h], top[b, h], z[b, h],
            )


@compiled_sum
def heads_backward(
    number: int64, first: int64, last: int64, q: Heads, k: Heads, v: Heads, bias: Masks, hidden: Masks, keep: Masks,
    causal: boolean, alpha: float32, n_rows: int64, y: Heads, top: Rows, z: Rows, g: Heads, dq: Heads, dk: Heads,
    dv: Heads, db: Sums,
) -> None:
    """The gradients for these heads. That of the bias is added to db[number], the sums of one thread."""
    kv_heads = k.shape[1]
    group = q.shape[1] // kv_heads
    memory, memory_ds = np.empty(n_rows * k.shape[2], np.float32), np.empty(n_rows * k.shape[2], np.float32)
    memory_g = np.empty((n_rows, q.shape[3]), np.float32)
    for i in range(first, last):
        b, kv = i // kv_heads, i % kv_heads
        for h in range(kv * group, (kv + 1) * group):
            head_backward(
                q[b, h], k[b, kv], v[b, kv], of_head(bias, b, h), of_head(hidden, b, h), of_head(keep, b, h), causal,
                alpha, n_rows, memory, memory_ds, memory_g, y[b, h], top[b, h], z[b, h], g[b, h], h == kv * group,
                dq[b, h], dk[b, kv], dv[b, kv], of_head(db[number], b, h),
            )


# ---------------------------------------------------------------------------------------------------- the op
@calls(heads_forward, heads_backward)
def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: np.ndarray | None = None, *, key_mask: np.ndarray | None = None,
    causal: bool = False, scale: float | None = None, dropout_mask: np.ndarray | None = None,
) -> Any:
    """(y, joint pullback) of ops.attention, for float32 q (B, H, Tq, D), k and v (B, Hkv, Tk, D)"""
    if not is_available:
        return NotImplemented
    masks = read_operands(q, k, v, bias, key_mask, dropout_mask, causal=causal)
    if masks is None:
        return NotImplemented
    bias, key_mask, dropout_mask = masks
    B, H, queries, D = q.shape
    kv_heads, keys = k.shape[1:3]
    alpha = np.float32(D**-0.5 if scale is None else scale)
    q, k, v = map(with_rows, (q, k, v))
    terms, hidden, keep = ABSENT, ABSENT, ABSENT
    if bias is not None:
        terms = with_keys(bias, keys)
    if key_mask is not None:
        hidden = with_keys(np.where(key_mask, ZERO, MINUS_INFINITY), keys)
    if dropout_mask is not None:
        keep = as_four_axes(dropout_mask, (B, H, queries, keys))
    n_rows = queries_of_tile(queries, causal=causal)
    y = np.empty((B, queries, H, D), np.float32).swapaxes(1, 2)
    top, z = np.empty((B, H, queries), np.float32), np.empty((B, H, queries), np.float32)
    inputs = (q, k, v, terms, hidden, keep, bool(causal), alpha, n_rows, y, top, z)
    heads = B * kv_heads
    work = SCORE * (H // kv_heads) * queries * keys  # of one key/value head
    products = n_rows * keys * D  # multiplications of a product of a tile
    with one_blas_thread_from(products):
        run(heads_forward, heads, work, *inputs)

    def back(g: np.ndarray, needed: list[bool]) -> tuple:
        """The gradients of q, k, v and bias, None where needed[i] is False."""
        dq, dk, dv = empty_gradients(q, k)
        parts = row_parts(heads, work)
        wants_bias = any(needed[3:])
        db = np.zeros((len(parts), *(terms if wants_bias else ABSENT).shape), np.float32)
        with one_blas_thread_from(products):
            run_parts(heads_backward, parts, *inputs, with_rows(g), dq, dk, dv, db)
        gradients = [a if is_needed else None for a, is_needed in zip((dq, dk, dv), needed)]
        if len(needed) > 3:
            gradients.append(sum_to(db.sum(axis=0), bias.shape) if wants_bias else None)
        return tuple(gradients)

    return y, back


def as_four_axes(a: np.ndarray, shape: tuple) -> np.ndarray:
    """a with this shape of four axes, contiguous; a copy only if it must be."""
    return np.require(a if a.shape == shape else np.broadcast_to(a, shape), np.float32, "CAW")


def with_rows(a: np.ndarray) -> np.ndarray:
    """a, or a copy of it, whose rows have neighbours in memory, as BLAS wants them."""
    step = a.strides[-2] // 4
    fits = a.strides[-1] == 4 and a.flags.aligned and a.flags.writeable and (step >= a.shape[-1] or a.shape[-2] == 1)
    return a if fits else np.array(a, order="C")


def with_keys(terms: np.ndarray, keys: int) -> np.ndarray:
    """Terms of the scores with four axes, the last of length `keys`."""
    terms = terms.reshape((1,) * (4 - terms.ndim) + terms.shape)
    return as_four_axes(terms, (*terms.shape[:3], keys))


def empty_gradients(q: np.ndarray, k: np.ndarray) -> list[np.ndarray]:
    """Memory for dq, dk and dv, side by side if q and k have one shape, as rows.project wants them."""
    B, H, queries, D = q.shape
    if q.shape == k.shape:
        together = np.empty((B * queries, 3 * H * D), np.float32)
        return [together.reshape(B, queries, 3, H, D)[:, :, i].swapaxes(1, 2) for i in range(3)]
    shapes = (q.shape, k.shape, k.shape)
    return [np.empty((B, T, heads, D), np.float32).swapaxes(1, 2) for _, heads, T, _ in shapes]

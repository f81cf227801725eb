"""Compiled kernels of linear maps (their biases and sums), embeddings and rotary positions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from ... import operands, ops
from ..numpy import linear_by, split_gradients
from ..threads import product
from .compiler import Matrix, Vector, calls, compiled, int64
from .shared import ZERO, is_plain, row_parts, run, run_parts

__all__ = ["embedding", "linear", "project", "rotary"]

AT_ONCE = 4  # rows that are added to a sum together, so that the sum is read and written less often


# ---------------------------------------------------------------------------------------------------- linear
@compiled
def add_bias(first: int64, last: int64, Y: Matrix, b: Vector) -> None:
    """y += b, in each row"""
    for i in range(first, last):
        y = Y[i]
        for j in range(len(y)):
            y[j] += b[j]


@compiled
def column_sums(part: int64, first: int64, last: int64, G: Matrix, D: Matrix) -> None:
    """d = Σ g over these rows, in row `part` of D"""
    d = D[part]
    for j in range(len(d)):
        d[j] = ZERO
    i = first
    while i + AT_ONCE <= last:
        g0, g1, g2, g3 = G[i], G[i + 1], G[i + 2], G[i + 3]
        for j in range(len(d)):
            d[j] += (g0[j] + g1[j]) + (g2[j] + g3[j])
        i += AT_ONCE
    while i < last:
        g0 = G[i]
        for j in range(len(d)):
            d[j] += g0[j]
        i += 1


def sum_rows(g: np.ndarray) -> np.ndarray:
    """g (..., n) -> Σ g over all rows (n,)"""
    G = ops.flat(g)
    if not is_plain(G):
        return G.sum(axis=0)
    parts = row_parts(*G.shape)
    D = np.empty((len(parts), G.shape[1]), np.float32)
    run_parts(column_sums, parts, G, D)
    return D[0] if len(D) == 1 else D.sum(axis=0)


@calls(add_bias, column_sums)
def linear(x: np.ndarray, W: np.ndarray, b: np.ndarray | None = None) -> Any:
    """(x Wᵀ + b, pullbacks) of ops.linear"""
    return linear_by(add_bias_to_rows, sum_rows, x, W, b)


def add_bias_to_rows(y: np.ndarray, b: np.ndarray) -> None:
    """y += b, in each row of y (N, n)"""
    if is_plain(y, b):
        run(add_bias, *y.shape, y, b)
    else:
        y += b


# ---------------------------------------------------------------------------------------------------- q, k, v
@calls(add_bias, column_sums)
def project(
    x: np.ndarray, Wq: np.ndarray, bq: np.ndarray, Wk: np.ndarray, bk: np.ndarray, Wv: np.ndarray, bv: np.ndarray,
    heads: int = 1,
) -> Any:
    """(q, k, v and a joint pullback) of ops.project, by one product with the three weights side by side.

    q, k and v are views of its result (B, T, 3, H, D). The gradients that `attention` computes lie side by side in the
    same way, so that the backward pass is one product for dx and one for the three dW.
    """
    operands.check_project(x, (Wq, Wk, Wv), (bq, bk, bv), heads)
    if not is_plain(x, Wq, bq, Wk, bk, Wv, bv):
        return NotImplemented
    X, n = ops.flat(x), len(Wq)
    W = np.concatenate([Wq, Wk, Wv])
    Y = product(X, W.T)
    add_bias_to_rows(Y, np.concatenate([bq, bk, bv]))
    by_head = (*x.shape[:-1], 3, heads, n // heads)
    shape = Y.shape  # `back` does not keep Y

    def split_heads(a: np.ndarray) -> list[np.ndarray]:
        """Three of (..., H, T, D), views of a (N, 3 n)."""
        return [a.reshape(by_head)[..., i, :, :].swapaxes(-2, -3) for i in range(3)]

    def back(g: list, needed: list[bool]) -> tuple:
        """The gradients of x, Wq, bq, Wk, bk, Wv, bv from g = [dq, dk, dv], in which None stands for zeros.

        None where needed[i] is False.
        """
        G = side_by_side(g, shape)
        if G is None or [a.strides for a in g] != [view.strides for view in split_heads(G)]:
            G = np.zeros(shape, np.float32)
            for place, a in zip(split_heads(G), g, strict=True):
                if a is not None:
                    place[...] = a
        dx = product(G, W).reshape(x.shape) if needed[0] else None
        dW = product(G.T, X) if any(needed[1::2]) else None
        db = sum_rows(G) if any(needed[2::2]) else None
        return (dx, *split_gradients(dW, db, needed[1:]))

    return tuple(split_heads(Y)), back


def side_by_side(g: list, shape: tuple) -> np.ndarray | None:
    """The base of g, if it has this shape and the three gradients start where those of `split_heads` do; else None."""
    if any(a is None for a in g):
        return None
    G = g[0].base
    if G is None or any(a.base is not G for a in g) or G.shape != shape or not G.flags.c_contiguous:
        return None
    step = shape[1] // 3 * G.itemsize
    starts = [a.__array_interface__["data"][0] - G.__array_interface__["data"][0] for a in g]
    return G if starts == [0, step, 2 * step] else None


# ---------------------------------------------------------------------------------------------------- embedding
Ids = types.int64[::1]


@compiled
def scatter_add(first: int64, last: int64, ids: Ids, G: Matrix, D: Matrix) -> None:
    """D[id_i] += g_i for every row i, in the columns first ... last − 1. D is filled with zeros before."""
    for v in range(len(D)):
        d = D[v, first:last]
        for j in range(len(d)):
            d[j] = ZERO
    for i in range(len(ids)):
        d = D[ids[i], first:last]
        g = G[i, first:last]
        for j in range(len(d)):
            d[j] += g[j]


@calls(scatter_add)
def embedding(W: np.ndarray, ids: np.ndarray) -> Any:
    """(W[ids], pullbacks) of ops.embedding. The threads share the columns of the gradient: two ids may be equal."""
    ids = operands.check_embedding(W, ids)
    if not is_plain(W) or not ids.size:
        return NotImplemented
    shape = W.shape

    def back(g: np.ndarray) -> np.ndarray:
        G = np.require(g, np.float32, "CAW").reshape(ids.size, shape[1])
        rows = np.ascontiguousarray(ids.reshape(-1) % shape[0], np.int64)  # −1 is the last row
        d = np.empty(shape, np.float32)
        run(scatter_add, shape[1], shape[0] + len(rows), rows, G, d)  # the parts are of columns
        return d

    return operands.rows_of(W, ids), (back, None)


# ---------------------------------------------------------------------------------------------------- rotary positions
HeadsOfPositions = types.float32[:, :, :, ::1]  # (B, T, H, D)


@compiled
def rotate(first: int64, last: int64, X: HeadsOfPositions, cos: Matrix, sin: Matrix, Y: HeadsOfPositions) -> None:
    """y₁ = x₁ cos₁ − x₂ sin₁,  y₂ = x₂ cos₂ + x₁ sin₂,  for the halves of each head of X (B, T, H, D)

    Row t of cos and sin (T, D) is for position t.
    """
    half = X.shape[3] // 2
    for b in range(first, last):
        for t in range(X.shape[1]):
            c1, c2, s1, s2 = cos[t, :half], cos[t, half:], sin[t, :half], sin[t, half:]
            for h in range(X.shape[2]):
                x1, x2, y1, y2 = X[b, t, h, :half], X[b, t, h, half:], Y[b, t, h, :half], Y[b, t, h, half:]
                for j in range(half):
                    a = x1[j]
                    y1[j] = a * c1[j] - x2[j] * s1[j]
                    y2[j] = x2[j] * c2[j] + a * s2[j]


@calls(rotate)
def rotary(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> Any:
    """(y, pullbacks) of ops.rotary for x (B, H, T, D) that lies in memory as (B, T, H, D), as models make it

    cos and sin (T, D), or with leading axes of length 1. The gradient is a rotation with −sin₂, −sin₁ for sin₁, sin₂.
    """
    if x.ndim != 4 or not is_plain(x.swapaxes(1, 2)):
        return NotImplemented
    cos, sin = operands.rotary_factors(x, cos, sin)
    if any(a.shape[-2:] != x.shape[2:] or a.size != x.shape[2] * x.shape[3] for a in (cos, sin)):
        return NotImplemented
    cos, sin = (np.require(a, requirements="CAW").reshape(x.shape[2:]) for a in (cos, sin))
    half = x.shape[3] // 2

    def turn(a: np.ndarray, sin: np.ndarray) -> np.ndarray:
        """The heads of a, turned; they lie in memory as those of x."""
        A = np.require(a.swapaxes(1, 2), requirements="CAW")
        Y = np.empty_like(A)
        run(rotate, len(A), A[0].size, A, cos, sin, Y)
        return Y.swapaxes(1, 2)

    def back(g: np.ndarray) -> np.ndarray:
        return turn(g, -np.concatenate([sin[:, half:], sin[:, :half]], axis=1))

    return turn(x, sin), (back, None, None)

"""NumPy kernels: the same functions, working through blocks that stay in the cache, with no temporaries of full size.

Each falls back on its definition for what it was not written for (another dtype, an array that is not contiguous).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from .. import ops

BLOCK = 1 << 15                                          # numbers in a block: 128 kB of float32, half of a small L2 cache


def _blocks(n: int) -> Iterator[slice]:
    return (slice(i, i + BLOCK) for i in range(0, n, BLOCK))


def _plain(x: np.ndarray) -> bool:
    return x.dtype == np.float32 and x.flags.c_contiguous and x.size > 0


@lru_cache(None)
def _erfc_horner() -> list[float]:
    return np.polynomial.chebyshev.cheb2poly(ops._erfc_polynomial(10))[::-1].tolist()


def gelu(x: np.ndarray) -> Any:
    "Saves the twenty full passes of erf's polynomial.  Φ(x) = 1 − h for x > 0 and h below, h = erfc(|x|/√2)/2."
    if not _plain(x):
        return ops.gelu.definition(x)
    X, cdf, y = x.reshape(-1), np.empty(x.size, np.float32), np.empty(x.size, np.float32)
    first, *rest = _erfc_horner()
    for i in _blocks(x.size):
        a, p = X[i], np.full(X[i].shape, np.float32(first))
        z = np.abs(a)
        z *= np.float32(0.5**0.5)
        u = 1 / (1 + np.float32(0.5) * z)
        s = 2 * u - 1
        for c in rest:
            p *= s
            p += np.float32(c)
        z *= z
        p -= z
        np.exp(p, out=p)
        p *= u
        p *= np.float32(-0.5)
        p += np.float32(0.5)
        c = np.copysign(p, a, out=cdf[i])                                        # ± (1/2 − h)
        c += np.float32(0.5)
        np.multiply(a, c, out=y[i])

    def back(g: np.ndarray) -> np.ndarray:
        G, d = np.ascontiguousarray(g).reshape(-1), np.empty(x.size, np.float32)
        for i in _blocks(x.size):
            a, e = X[i], d[i]
            np.multiply(a, a, out=e)
            e *= np.float32(-0.5)
            np.exp(e, out=e)
            e *= a
            e *= np.float32((2 * math.pi)**-0.5)
            e += cdf[i]
            e *= G[i]
        return d.reshape(x.shape)
    return y.reshape(x.shape), (back,)


def gelu_tanh(x: np.ndarray) -> Any:
    "Saves the temporaries of the cubic and of its derivative."
    if not _plain(x):
        return ops.gelu_tanh.definition(x)
    c = (2 / math.pi)**0.5
    X, h, y = x.reshape(-1), np.empty(x.size, np.float32), np.empty(x.size, np.float32)
    for i in _blocks(x.size):
        a, t, o = X[i], h[i], y[i]
        np.multiply(a, a, out=t)
        t *= np.float32(0.044715 * c)
        t += np.float32(c)
        t *= a
        np.tanh(t, out=t)
        np.add(t, 1, out=o)
        o *= a
        o *= np.float32(0.5)

    def back(g: np.ndarray) -> np.ndarray:
        G, d = np.ascontiguousarray(g).reshape(-1), np.empty(x.size, np.float32)
        for i in _blocks(x.size):
            a, t, e = X[i], h[i], d[i]
            np.multiply(a, a, out=e)
            e *= np.float32(3 * 0.044715 * c)
            e += np.float32(c)
            e *= a
            e *= 1 - t * t
            e += t
            e += 1
            e *= np.float32(0.5)
            e *= G[i]
        return d.reshape(x.shape)
    return y.reshape(x.shape), (back,)


def layer_norm(x: np.ndarray, w: np.ndarray, b: np.ndarray, eps: float = 1e-5) -> Any:
    "Saves five full temporaries; the sums over rows are matrix products with ones."
    if not (_plain(x) and w.dtype == b.dtype == np.float32):
        return ops.layer_norm.definition(x, w, b, eps=eps)
    shape, n = x.shape, x.shape[-1]
    X, ones = x.reshape(-1, n), np.ones(n, np.float32)
    h, y, r = np.empty_like(X), np.empty_like(X), np.empty((len(X), 1), np.float32)
    rows = [slice(i, i + max(BLOCK // n, 1)) for i in range(0, len(X), max(BLOCK // n, 1))]
    for s in rows:
        np.subtract(X[s], (X[s] @ ones)[:, None] / np.float32(n), out=h[s])
        r[s, 0] = 1 / np.sqrt(np.einsum("ij,ij->i", h[s], h[s]) / np.float32(n) + np.float32(eps))
        h[s] *= r[s]
        np.multiply(h[s], w, out=y[s])
        y[s] += b

    def dx(g: np.ndarray) -> np.ndarray:
        G, d = np.ascontiguousarray(g).reshape(-1, n), np.empty_like(h)
        for s in rows:
            e = np.multiply(G[s], w, out=d[s])
            shift, scale = e @ ones / np.float32(n), np.einsum("ij,ij->i", e, h[s]) / np.float32(n)
            e -= shift[:, None]
            e -= h[s] * scale[:, None]
            e *= r[s]
        return d.reshape(shape)
    return y.reshape(shape), (dx, lambda g: np.einsum("ij,ij->j", g.reshape(-1, n), h), _column_sum(n))


def _column_sum(n: int) -> Callable:
    "Σ over rows as a product with ones: BLAS is faster than a reduction."
    return lambda g: np.ones(g.size // n, g.dtype) @ g.reshape(-1, n)


def embedding(W: np.ndarray, ids: np.ndarray) -> Any:
    "Saves add.at's one-by-one additions: sort the ids, sum each run of equal ones at once."
    def back(g: np.ndarray) -> np.ndarray:
        d, flat = np.zeros_like(W), ids.reshape(-1) % len(W)                     # −1 is the last row
        if flat.size:
            order = np.argsort(flat, kind="stable")
            run = flat[order]
            starts = np.flatnonzero(np.r_[True, run[1:] != run[:-1]])
            d[run[starts]] = np.add.reduceat(g.reshape(-1, W.shape[1])[order], starts, axis=0)
        return d
    return W[ids], (back, None)


def adam_update(w: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, lr: float, b1: float, b2: float, eps: float, decay: float,
                t: int) -> None:
    "Saves eight passes over arrays as long as the model."
    one = w.dtype.type
    rate, root, tmp = one(lr / (1 - b1**t)), one((1 - b2**t)**-0.5), np.empty(min(BLOCK, w.size), w.dtype)
    for i in _blocks(w.size):
        a, d, p, q = w[i], g[i], m[i], v[i]
        e = tmp[:a.size]
        p *= one(b1)
        p += np.multiply(d, one(1 - b1), out=e)
        q *= one(b2)
        np.multiply(d, d, out=e)
        e *= one(1 - b2)
        q += e
        if decay:
            a *= one(1 - lr * decay)
        np.sqrt(q, out=e)
        e *= root
        e += one(eps)
        np.divide(p, e, out=e)
        e *= rate
        a -= e

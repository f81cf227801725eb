"""NumPy kernels: the same functions, working through blocks that stay in the cache, with no temporaries of full size.

Each falls back on its definition for what it was not written for (another dtype, an array that is not contiguous).  The blocks go to
threads where there are some to spare (threads.py).
"""
from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from .. import ops
from ..array import random_words
from .attention import SAFE, attention
from .threads import blocks

__all__ = ["linear", "gelu", "gelu_tanh", "layer_norm", "embedding", "attention", "cross_entropy", "dropout", "adam_update"]
SMALL = 1 << 17                                          # numbers that are kept rather than computed again


def _plain(x: np.ndarray) -> bool:
    return x.dtype == np.float32 and x.flags.c_contiguous and x.size > 0


def linear(x: np.ndarray, W: np.ndarray, b: np.ndarray | None = None) -> Any:
    "Saves a copy of the output for the bias, and a slow reduction for the bias's gradient."
    y = ops.flat(x) @ W.T
    if b is not None:
        y += b
    shape = x.shape
    return y.reshape(*shape[:-1], len(W)), (lambda g: (ops.flat(g) @ W).reshape(shape), lambda g: ops.flat(g).T @ ops.flat(x), _column_sum(len(W)))


def _column_sum(n: int) -> Callable:
    "Σ over rows as a product with ones: BLAS is faster than a reduction."
    return lambda g: np.ones(g.size // n, g.dtype) @ g.reshape(-1, n)


def _cdf(a: np.ndarray, z: np.ndarray, P: list[float], out: np.ndarray) -> np.ndarray:
    "Φ = (1 + tanh(a P(z))) / 2, by Horner's rule."
    np.multiply(z, np.float32(P[-1]), out=out)
    for p in P[-2:0:-1]:
        out += np.float32(p)
        out *= z
    out += np.float32(P[0])
    out *= a
    np.tanh(out, out=out)
    out *= np.float32(0.5)
    out += np.float32(0.5)
    return out


TANH_FORM = [(2 / math.pi)**0.5, 0.044715 * (2 / math.pi)**0.5]


@lru_cache(None)
def _normal_form() -> list[float]:
    "P with tanh(x P(x²)) = erf(x/√2): interpolated, of degree 7 in x² up to 25.  Then x Φ(x) is off by 4e-7 at most."
    def at(z: float) -> float:
        x = max(z, 1e-8)**0.5
        return math.log((1 + math.erf(x * 0.5**0.5)) / math.erfc(x * 0.5**0.5)) / (2 * x)        # artanh(erf(x/√2)) / x
    P = np.polynomial.Chebyshev(np.polynomial.chebyshev.chebinterpolate(lambda u: np.array([at(v) for v in (u + 1) * 12.5]), 7), [0, 25])
    return P.convert(kind=np.polynomial.Polynomial).coef.tolist()


def gelu(x: np.ndarray) -> Any:
    "Saves the thirty full passes of erf: a tanh is one."
    if not _plain(x):
        return NotImplemented
    X, cdf, y = x.reshape(-1), np.empty(x.size, np.float32), np.empty(x.size, np.float32)

    def block(i: slice) -> None:
        z = np.multiply(X[i], X[i], out=y[i])
        np.minimum(z, np.float32(25), out=z)                                     # the tanh is 1 from there on
        np.multiply(X[i], _cdf(X[i], z, _normal_form(), cdf[i]), out=y[i])
    blocks(x.size, block)

    def back(g: np.ndarray) -> np.ndarray:
        G, d = np.ascontiguousarray(g).reshape(-1), np.empty(x.size, np.float32)

        def block(i: slice) -> None:
            a, e = X[i], d[i]
            np.multiply(a, a, out=e)
            e *= np.float32(-0.5)
            np.exp(e, out=e)
            e *= a
            e *= np.float32((2 * math.pi)**-0.5)
            e += cdf[i]
            e *= G[i]
        blocks(x.size, block)
        return d.reshape(x.shape)
    return y.reshape(x.shape), (back,)


def gelu_tanh(x: np.ndarray) -> Any:
    "Saves the temporaries, and where x is large keeps nothing but x: a tanh in the cache costs less than memory."
    if not _plain(x):
        return NotImplemented
    X, y, kept = x.reshape(-1), np.empty(x.size, np.float32), np.empty(x.size, np.float32) if x.size <= SMALL else None

    def cdf(i: slice, z: np.ndarray) -> np.ndarray:
        return _cdf(X[i], z, TANH_FORM, np.empty_like(X[i]) if kept is None else kept[i])

    def block(i: slice) -> None:
        z = np.multiply(X[i], X[i], out=y[i])
        np.multiply(X[i], cdf(i, z), out=z)
    blocks(x.size, block)

    def back(g: np.ndarray) -> np.ndarray:
        G, d = np.ascontiguousarray(g).reshape(-1), np.empty(x.size, np.float32)

        def block(i: slice) -> None:                                             # Φ (1 + 2 x (1 − Φ) (x P(x²))')
            a, e = X[i], np.multiply(X[i], X[i], out=d[i])
            p = cdf(i, e) if kept is None else kept[i]
            e *= np.float32(6 * TANH_FORM[1])
            e += np.float32(2 * TANH_FORM[0])
            e *= a
            e *= 1 - p
            e += 1
            e *= p
            e *= G[i]
        blocks(x.size, block)
        return d.reshape(x.shape)
    return y.reshape(x.shape), (back,)


def layer_norm(x: np.ndarray, w: np.ndarray, b: np.ndarray, eps: float = 1e-5) -> Any:
    "Saves five full temporaries; the sums over rows are matrix products with ones."
    if not (_plain(x) and w.dtype == b.dtype == np.float32):
        return NotImplemented
    shape, n = x.shape, x.shape[-1]
    X, ones = x.reshape(-1, n), np.ones(n, np.float32)
    h, y, r = np.empty_like(X), np.empty_like(X), np.empty((len(X), 1), np.float32)

    def block(s: slice) -> None:
        np.subtract(X[s], (X[s] @ ones)[:, None] / np.float32(n), out=h[s])
        r[s, 0] = 1 / np.sqrt(np.einsum("ij,ij->i", h[s], h[s]) / np.float32(n) + np.float32(eps))
        h[s] *= r[s]
        np.multiply(h[s], w, out=y[s])
        y[s] += b
    blocks(len(X), block, n)

    def dx(g: np.ndarray) -> np.ndarray:
        G, d = np.ascontiguousarray(g).reshape(-1, n), np.empty_like(h)

        def block(s: slice) -> None:
            e = np.multiply(G[s], w, out=d[s])
            shift, scale = e @ ones / np.float32(n), np.einsum("ij,ij->i", e, h[s]) / np.float32(n)
            e -= shift[:, None]
            e -= h[s] * scale[:, None]
            e *= r[s]
        blocks(len(X), block, n)
        return d.reshape(shape)
    return y.reshape(shape), (dx, lambda g: np.einsum("ij,ij->j", g.reshape(-1, n), h), _column_sum(n))


def embedding(W: np.ndarray, ids: np.ndarray) -> Any:
    "Saves add.at's one-by-one additions: sort the ids, sum each run of equal ones at once.  Positions are sorted, and each there once."
    def back(g: np.ndarray) -> np.ndarray:
        d, flat = np.zeros(W.shape, g.dtype), ids.reshape(-1) % len(W)           # −1 is the last row
        if (flat[1:] > flat[:-1]).all():
            d[flat] = g.reshape(-1, W.shape[1])
        else:
            order = np.argsort(flat, kind="stable")
            run = flat[order]
            starts = np.flatnonzero(np.r_[True, run[1:] != run[:-1]])
            d[run[starts]] = np.add.reduceat(g.reshape(-1, W.shape[1])[order], starts, axis=0)
        return d
    return W[ids], (back, None)


def cross_entropy(z: np.ndarray, y: np.ndarray, weight: np.ndarray | None = None, ignore_index: int = -100, label_smoothing: float = 0.0) -> Any:
    "Saves three arrays as large as the logits: of them only the sums of their exponentials are kept."
    if not _plain(z) or weight is not None or label_smoothing:
        return NotImplemented
    Z, labels, one = ops.flat(z), y.reshape(-1), np.float32
    real = labels != ignore_index
    labels, w = np.where(real, labels, 0), real.astype(np.float32)
    n, top, ones = len(Z), np.zeros((len(Z), 1), np.float32), np.ones(Z.shape[1], np.float32)
    sums, safe, total = np.empty(n, np.float32), max(Z.max(), -Z.min()) <= SAFE, w.sum()

    def block(s: slice) -> None:
        x = Z[s]
        if not safe:
            x = x - x.max(axis=-1, keepdims=True, out=top[s])
        sums[s] = np.exp(x) @ ones
    blocks(n, block, Z.shape[1])
    value = (w * (np.log(sums) + top[:, 0] - Z[np.arange(n), labels])).sum() / total

    def back(g: np.ndarray) -> np.ndarray:
        d, share = np.empty_like(Z), w * (one(g) / total)

        def block(s: slice) -> None:
            p = np.exp(Z[s] if safe else Z[s] - top[s], out=d[s])
            p *= (share[s] / sums[s])[:, None]
            p[np.arange(len(p)), labels[s]] -= share[s]
        blocks(n, block, Z.shape[1])
        return d.reshape(z.shape)
    return one(value), (back, None, None)


def dropout(x: np.ndarray, p: float, key: int) -> Any:
    "Saves the numbers in [0, 1) that p is compared with: random bits are, and the factors are written over them."
    least = math.ceil(np.float32(p) * 2.0**24) << 8                              # the word from which on u, of its upper 24 bits, is p or more
    if not (_plain(x) and 0 <= least < 2**32):
        return NotImplemented
    X, y, words, scale = x.reshape(-1), np.empty(x.size, np.float32), random_words(x.size, key), np.float32(1) / np.float32(1 - p)
    keep = words.view(np.float32)

    def block(i: slice) -> None:
        np.multiply(words[i] >= np.uint32(least), scale, out=keep[i])
        np.multiply(X[i], keep[i], out=y[i])
    blocks(x.size, block)
    keep = keep.reshape(x.shape)
    return y.reshape(x.shape), (lambda g: g * keep, None, None)


def adam_update(w: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, lr: float, b1: float, b2: float, eps: float, decay: float,
                t: int) -> None:
    "Saves eight passes over arrays as long as the model."
    one = w.dtype.type
    rate, root = one(lr / (1 - b1**t)), one((1 - b2**t)**-0.5)

    def block(i: slice) -> None:
        a, d, p, q = w[i], g[i], m[i], v[i]
        e = d * one(1 - b1)
        p *= one(b1)
        p += e
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
    blocks(w.size, block)

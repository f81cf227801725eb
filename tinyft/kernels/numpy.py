"""NumPy kernels: the same functions, in blocks that stay in the cache, without temporaries of full size.

A kernel returns NotImplemented for another dtype and for an array that is not contiguous.  The blocks are shared among
threads (threads.py).
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

__all__ = ["linear", "gelu", "gelu_tanh", "layer_norm", "embedding", "attention", "cross_entropy", "dropout",
           "adam_update"]
SMALL = 1 << 17                                          # up to this size, a result is kept rather than computed again


def _plain(x: np.ndarray) -> bool:
    """True for a contiguous float32 array that is not empty."""
    return x.dtype == np.float32 and x.flags.c_contiguous and x.size > 0


def linear(x: np.ndarray, W: np.ndarray, b: np.ndarray | None = None) -> Any:
    """linear, without a copy of the output for the bias, and without a slow reduction for the gradient of the bias."""
    y = ops.flat(x) @ W.T
    if b is not None:
        y += b
    shape = x.shape

    def dx(g: np.ndarray) -> np.ndarray:
        return (ops.flat(g) @ W).reshape(shape)

    def dW(g: np.ndarray) -> np.ndarray:
        return ops.flat(g).T @ ops.flat(x)
    return y.reshape(*shape[:-1], len(W)), (dx, dW, _column_sum(len(W)))


def _column_sum(n: int) -> Callable:
    """The pullback g -> Σ over rows, as a matrix product with ones: BLAS is faster than a reduction."""
    return lambda g: np.ones(g.size // n, g.dtype) @ g.reshape(-1, n)


def _cdf(a: np.ndarray, z: np.ndarray, P: list[float], out: np.ndarray) -> np.ndarray:
    """Φ = (1 + tanh(a P(z))) / 2, by Horner's rule."""
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
    """Coefficients of P with tanh(x P(x²)) = erf(x/√2), interpolated with degree 7 in x² on [0, 25].

    x Φ(x) is then off by 4e-7 at most."""
    def at(z: float) -> float:                               # artanh(erf(x/√2)) / x  for z = x²
        x = max(z, 1e-8)**0.5
        return math.log((1 + math.erf(x * 0.5**0.5)) / math.erfc(x * 0.5**0.5)) / (2 * x)

    def at_nodes(u: np.ndarray) -> np.ndarray:               # Chebyshev nodes in [−1, 1]
        return np.array([at(v) for v in (u + 1) * 12.5])
    coefficients = np.polynomial.chebyshev.chebinterpolate(at_nodes, 7)
    P = np.polynomial.Chebyshev(coefficients, [0, 25])
    return P.convert(kind=np.polynomial.Polynomial).coef.tolist()


def gelu(x: np.ndarray) -> Any:
    """gelu with one tanh in place of the thirty full passes of erf."""
    if not _plain(x):
        return NotImplemented
    X = x.reshape(-1)
    cdf = np.empty(x.size, np.float32)
    y = np.empty(x.size, np.float32)

    def block(i: slice) -> None:
        z = np.multiply(X[i], X[i], out=y[i])
        np.minimum(z, np.float32(25), out=z)                 # beyond, the tanh is 1
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
    """gelu_tanh without temporaries.

    For a large x it keeps only x: a tanh in the cache costs less than memory traffic."""
    if not _plain(x):
        return NotImplemented
    X = x.reshape(-1)
    y = np.empty(x.size, np.float32)
    kept = np.empty(x.size, np.float32) if x.size <= SMALL else None        # Φ

    def cdf(i: slice, z: np.ndarray) -> np.ndarray:
        return _cdf(X[i], z, TANH_FORM, np.empty_like(X[i]) if kept is None else kept[i])

    def block(i: slice) -> None:
        z = np.multiply(X[i], X[i], out=y[i])
        np.multiply(X[i], cdf(i, z), out=z)
    blocks(x.size, block)

    def back(g: np.ndarray) -> np.ndarray:
        G, d = np.ascontiguousarray(g).reshape(-1), np.empty(x.size, np.float32)

        def block(i: slice) -> None:                         # g Φ (1 + 2 x (1 − Φ) (x P(x²))')
            a = X[i]
            e = np.multiply(a, a, out=d[i])
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
    """layer_norm without five full temporaries; the sums over rows are matrix products with ones."""
    if not (_plain(x) and w.dtype == b.dtype == np.float32):
        return NotImplemented
    shape, n = x.shape, x.shape[-1]
    X, ones = x.reshape(-1, n), np.ones(n, np.float32)
    h = np.empty_like(X)                                     # x̂
    y = np.empty_like(X)
    r = np.empty((len(X), 1), np.float32)                    # 1/σ

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
            shift = e @ ones / np.float32(n)
            scale = np.einsum("ij,ij->i", e, h[s]) / np.float32(n)
            e -= shift[:, None]
            e -= h[s] * scale[:, None]
            e *= r[s]
        blocks(len(X), block, n)
        return d.reshape(shape)
    return y.reshape(shape), (dx, lambda g: np.einsum("ij,ij->j", g.reshape(-1, n), h), _column_sum(n))


def embedding(W: np.ndarray, ids: np.ndarray) -> Any:
    """embedding without the single additions of add.at: the ids are sorted, and each run of equal ids is summed at
    once.

    Position ids are sorted and different already."""
    def back(g: np.ndarray) -> np.ndarray:
        d = np.zeros(W.shape, g.dtype)
        flat = ids.reshape(-1) % len(W)                      # −1 is the last row
        if (flat[1:] > flat[:-1]).all():
            d[flat] = g.reshape(-1, W.shape[1])
        else:
            order = np.argsort(flat, kind="stable")
            run = flat[order]
            starts = np.flatnonzero(np.r_[True, run[1:] != run[:-1]])
            d[run[starts]] = np.add.reduceat(g.reshape(-1, W.shape[1])[order], starts, axis=0)
        return d
    return W[ids], (back, None)


def cross_entropy(z: np.ndarray, y: np.ndarray, weight: np.ndarray | None = None, ignore_index: int = -100,
                  label_smoothing: float = 0.0) -> Any:
    """cross_entropy without three arrays as large as the logits: only the sums of exponentials are kept."""
    if not _plain(z) or weight is not None or label_smoothing:
        return NotImplemented
    Z = ops.flat(z)                                          # (N, V)
    n = len(Z)
    real = y.reshape(-1) != ignore_index
    labels = np.where(real, y.reshape(-1), 0)
    w = real.astype(np.float32)
    total = w.sum()
    ones = np.ones(Z.shape[1], np.float32)
    sums = np.empty(n, np.float32)                           # Σ e^(z − top)
    top = np.zeros((n, 1), np.float32)
    safe = max(Z.max(), -Z.min()) <= SAFE                    # then top is 0

    def block(s: slice) -> None:
        x = Z[s]
        if not safe:
            x = x - x.max(axis=-1, keepdims=True, out=top[s])
        sums[s] = np.exp(x) @ ones
    blocks(n, block, Z.shape[1])
    value = (w * (np.log(sums) + top[:, 0] - Z[np.arange(n), labels])).sum() / total

    def back(g: np.ndarray) -> np.ndarray:
        d = np.empty_like(Z)
        share = w * (np.float32(g) / total)

        def block(s: slice) -> None:
            p = np.exp(Z[s] if safe else Z[s] - top[s], out=d[s])
            p *= (share[s] / sums[s])[:, None]
            p[np.arange(len(p)), labels[s]] -= share[s]
        blocks(n, block, Z.shape[1])
        return d.reshape(z.shape)
    return np.float32(value), (back, None, None)


def dropout(x: np.ndarray, p: float, key: int) -> Any:
    """dropout that compares random words with p, without making uniform numbers of them.

    The factors overwrite the words."""
    least = math.ceil(np.float32(p) * 2.0**24) << 8      # the smallest word whose upper 24 bits give u >= p
    if not (_plain(x) and 0 <= least < 2**32):
        return NotImplemented
    X = x.reshape(-1)
    y = np.empty(x.size, np.float32)
    words = random_words(x.size, key)
    scale = np.float32(1) / np.float32(1 - p)
    keep = words.view(np.float32)

    def block(i: slice) -> None:
        np.multiply(words[i] >= np.uint32(least), scale, out=keep[i])
        np.multiply(X[i], keep[i], out=y[i])
    blocks(x.size, block)
    keep = keep.reshape(x.shape)
    return y.reshape(x.shape), (lambda g: g * keep, None, None)


def adam_update(w: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, lr: float, b1: float, b2: float, eps: float,
                decay: float, t: int) -> None:
    """AdamW's update without eight passes over arrays as long as the model."""
    one = w.dtype.type
    rate = one(lr / (1 - b1**t))
    root = one((1 - b2**t)**-0.5)

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

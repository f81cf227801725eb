"""The NumPy kernels: the ops of ops.py and the update of AdamW, without temporary arrays of full size.

A kernel has its definition's signature and results.  Most kernels work in blocks that stay in the cache, and the
threads share the blocks (threads.py).  Most return NotImplemented for other dtypes and for arrays that are not
contiguous.

In a function block(i), the slice i is the part of the flat arrays (or of the rows) that one call computes.  Its local
names are views of that part, and `out=` reuses them for intermediate results.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from .. import checks, operands, ops
from ..array import random_words
from ..tensor import is_recording
from .attention import SAFE, attention
from .threads import blocks, each, one_blas_thread, product, shares

__all__ = ["adam_update", "add", "add_to", "attention", "cross_entropy", "dropout", "embedding", "gelu", "gelu_tanh",
           "layer_norm", "linear", "rms_norm", "rotary", "squared_norm", "sum_of", "swiglu"]
UPDATES = ("adam_update", "add_to", "squared_norm", "sum_of")                # kernels of functions that are no ops
OPS = tuple(name for name in __all__ if name not in UPDATES)
FLAT = np.float32(1 / 32)                                # layer_norm centres a row with σ <= FLAT · |mean| twice
SHARED_SUM = 1 << 20                                     # elements from which the threads share a sum
SMALL = 1 << 17                                          # elements; up to this size, gelu_tanh keeps Φ for its gradient


def _is_plain(x: np.ndarray) -> bool:
    """True for a contiguous float32 array that is not empty."""
    return x.dtype == np.float32 and x.flags.c_contiguous and x.size > 0


# ── sums ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _are_large(a: np.ndarray, b: np.ndarray) -> bool:
    """True for two contiguous float32 arrays of one shape that are worth more than one thread."""
    return a.size >= SHARED_SUM and a.shape == b.shape and _is_plain(a) and _is_plain(b)


def sum_of(a: np.ndarray, b: np.ndarray) -> Any:
    """tensor.sum_of, a + b: the threads share large arrays."""
    return _shared_sum(a, b, np.empty_like(a)) if _are_large(a, b) else NotImplemented


def add_to(a: np.ndarray, b: np.ndarray) -> Any:
    """tensor.add_to, a ← a + b: the threads share large arrays."""
    return _shared_sum(a, b, a) if _are_large(a, b) else NotImplemented


def _shared_sum(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> np.ndarray:
    """a + b, written to `out` and returned."""
    A, B, Y = a.reshape(-1), b.reshape(-1), out.reshape(-1)

    def part(i: slice) -> None:
        np.add(A[i], B[i], out=Y[i])
    each(shares(a.size, 1, SHARED_SUM), part)
    return out


def add(a: np.ndarray, b: np.ndarray) -> Any:
    """(a + b, pullbacks) of ops.add: the threads share large arrays."""
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
        return NotImplemented
    y = sum_of(a, b)
    return NotImplemented if y is NotImplemented else (y, (ops.same, ops.same))


def squared_norm(g: np.ndarray) -> Any:
    """optimizers.squared_norm, Σ g²: the threads share large arrays."""
    if not _is_plain(g):
        return NotImplemented
    G = g.reshape(-1)
    found = shares(g.size, 1, SHARED_SUM)
    sums = np.empty(len(found), np.float32)

    def part(i: int) -> None:
        sums[i] = np.dot(G[found[i]], G[found[i]])
    each(range(len(found)), part)
    return sums.sum()


# ── linear maps and activations ──────────────────────────────────────────────────────────────────────────────────────
def linear(x: np.ndarray, W: np.ndarray, b: np.ndarray | None = None) -> Any:
    """(x Wᵀ + b, pullbacks), without a copy of the output for the bias, and with a fast sum for its gradient."""
    return linear_by(np.ndarray.__iadd__, _column_sum, x, W, b)


def linear_by(
    add_bias: Callable, sum_rows: Callable, x: np.ndarray, W: np.ndarray, b: np.ndarray | None,
) -> tuple[np.ndarray, tuple]:
    """(x Wᵀ + b, pullbacks) of ops.linear.

    add_bias    y (N, out), b -> y + b, written to y
    sum_rows    g (..., out) -> Σ g over all rows (out,)
    """
    operands.check_linear(x, W, b)
    y = product(ops.flat(x), W.T)
    if b is not None:
        add_bias(y, b)
    shape = x.shape

    def dx(g: np.ndarray) -> np.ndarray:
        return product(ops.flat(g), W).reshape(shape)

    def dW(g: np.ndarray) -> np.ndarray:
        return product(ops.flat(g).T, ops.flat(x))
    return y.reshape(*shape[:-1], len(W)), (dx, dW, sum_rows)


def split_gradients(dW: Any, db: Any, needed: list[bool]) -> list:
    """The gradients of W, b of several maps, from those of all maps side by side, (maps n, in) and (maps n,).

    needed    of W, b, W, b, ... of the maps: None where it is False. dW or db is None if it is needed by no map."""
    maps = len(needed) // 2
    gradients = []
    for i in range(maps):
        for d, is_needed in zip((dW, db), needed[2 * i:2 * i + 2], strict=True):
            n = len(d) // maps if is_needed else 0
            gradients.append(d[i * n:(i + 1) * n] if is_needed else None)
    return gradients


def _column_sum(g: np.ndarray) -> np.ndarray:
    """g (..., n) -> Σ g over all rows (n,), as a matrix product with ones: BLAS is faster than np.sum."""
    rows = ops.flat(g)
    with one_blas_thread():
        return np.ones(len(rows), g.dtype) @ rows


def _cdf(a: np.ndarray, z: np.ndarray, P: list[float], out: np.ndarray) -> np.ndarray:
    """Φ = (1 + tanh(a P(z))) / 2, written to `out` and returned.

    P: the coefficients of the polynomial, constant term first; evaluated by Horner's rule."""
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


TANH_FORM = [(2 / math.pi)**0.5, 0.044715 * (2 / math.pi)**0.5]   # P of gelu_tanh: x P(x²) = √(2/π) (x + 0.044715 x³)


@lru_cache(None)
def normal_form() -> list[float]:
    """R of gelu, a polynomial in w = |x|/2 with R(w)^−8 = 1 − erf(|x|/√2).  Constant term first.

    A fit of degree 8 to (1 − erf)^(−1/8) on [0, 3].  Its weights make it exact where an error would show in x Φ(x)
    and in Φ(x).  In float32 the error of x Φ(x) is at most 5e-7."""
    w = np.linspace(0, 3, 2000)
    tail = np.array([math.erfc(v * 2**0.5) for v in w.tolist()])             # 1 − erf(|x|/√2)
    values = tail**-0.125
    weights = tail / values * (w + 0.15)
    fit = np.polynomial.Chebyshev.fit(w, values, 8, w=weights)
    return fit.convert(kind=np.polynomial.Polynomial).coef.tolist()


def _erf(w: np.ndarray, out: np.ndarray) -> np.ndarray:
    """erf(|x|/√2) for w = |x|/2, written to `out` and returned.  Only products: exp and tanh take ten times as long."""
    R = normal_form()
    with np.errstate(over="ignore"):                         # R^8 is infinite for large w: the result is 1
        np.multiply(w, np.float32(R[-1]), out=out)
        for r in R[-2:0:-1]:
            out += np.float32(r)
            out *= w
        out += np.float32(R[0])
        for _ in range(3):
            out *= out
    np.reciprocal(out, out=out)
    return np.subtract(np.float32(1), out, out=out)


def _with_sign(a: np.ndarray, x: np.ndarray) -> None:
    """Give a, whose entries are not negative, the signs of x, in place.  np.copysign takes five times as long."""
    bits = a.view(np.uint32)
    bits |= x.view(np.uint32) & np.uint32(1 << 31)


def gelu(x: np.ndarray) -> Any:
    """(y, pullbacks) of ops.gelu with one polynomial in place of the thirty passes of erf: y = x Φ, dx = g (Φ + x φ).

    y = x/2 + |x|/2 erf(|x|/√2), Φ = (1 + erf(x/√2)) / 2 and φ = e^(−x²/2) / √(2π).  For an x of more than SMALL
    elements erf is not kept, but computed again for the gradient: that costs less than memory traffic."""
    if not _is_plain(x):
        return NotImplemented
    X = x.reshape(-1)
    y = np.empty(x.size, np.float32)
    kept = np.empty(x.size, np.float32) if x.size <= SMALL else None         # erf(|x|/√2)

    def block(i: slice) -> None:                             # y[i] and kept[i]; blocks() calls it with slices of X
        half = np.multiply(X[i], np.float32(0.5), out=y[i])
        w = np.abs(half)
        w *= _erf(w, np.empty_like(w) if kept is None else kept[i])
        half += w
    blocks(x.size, block)

    def back(g: np.ndarray) -> np.ndarray:
        """dx = g (Φ + x φ) = g (1/2 + sign(x) (erf(|x|/√2)/2 + |x| φ)), block by block."""
        G = np.ascontiguousarray(g).reshape(-1)
        d = np.empty(x.size, np.float32)                     # dx

        def block(i: slice) -> None:
            """d[i] for the entries i of flat x and g (X, G)."""
            w = np.abs(X[i])
            w *= np.float32(0.5)
            half_erf = (_erf(w, np.empty_like(w)) if kept is None else kept[i]) * np.float32(0.5)
            e = np.multiply(w, w, out=d[i])
            e *= np.float32(-2)
            np.exp(e, out=e)                                 # e^(−x²/2)
            e *= w
            e *= np.float32((2 / math.pi)**0.5)              # |x| φ
            e += half_erf
            _with_sign(e, X[i])
            e += np.float32(0.5)
            e *= G[i]
        blocks(x.size, block)
        return d.reshape(x.shape)
    return y.reshape(x.shape), (back,)


def gelu_tanh(x: np.ndarray) -> Any:
    """(y, pullbacks) of ops.gelu_tanh without temporary arrays: y = x Φ,  Φ = (1 + tanh(x P(x²))) / 2.

    P: the polynomial TANH_FORM.  For an x of more than SMALL elements Φ is not kept, but computed again for the
    gradient: a tanh in the cache costs less than memory traffic."""
    if not _is_plain(x):
        return NotImplemented
    X = x.reshape(-1)
    y = np.empty(x.size, np.float32)
    kept = np.empty(x.size, np.float32) if x.size <= SMALL else None        # Φ

    def cdf(i: slice, z: np.ndarray) -> np.ndarray:
        return _cdf(X[i], z, TANH_FORM, np.empty_like(X[i]) if kept is None else kept[i])

    def block(i: slice) -> None:
        z = np.multiply(X[i], X[i], out=y[i])                # x², for now in the place of the result
        np.multiply(X[i], cdf(i, z), out=z)
    blocks(x.size, block)

    def back(g: np.ndarray) -> np.ndarray:
        """dx = g Φ (1 + 2 x (1 − Φ) (x P(x²))'), block by block; Φ is kept or computed again."""
        G = np.ascontiguousarray(g).reshape(-1)
        d = np.empty(x.size, np.float32)                     # dx

        def block(i: slice) -> None:
            """d[i] = g Φ (1 + 2 x (1 − Φ) (x P(x²))') for the entries i of flat x and g (X, G)."""
            a = X[i]
            e = np.multiply(a, a, out=d[i])
            p = cdf(i, e) if kept is None else kept[i]       # Φ
            e *= np.float32(6 * TANH_FORM[1])
            e += np.float32(2 * TANH_FORM[0])                # 2 (x P(x²))', where P(z) = TANH_FORM[0] + TANH_FORM[1] z
            e *= a
            e *= 1 - p
            e += 1
            e *= p
            e *= G[i]
        blocks(x.size, block)
        return d.reshape(x.shape)
    return y.reshape(x.shape), (back,)


def swiglu(gate: np.ndarray, up: np.ndarray) -> Any:
    """(y, pullback) of ops.swiglu without temporary arrays: y = gate σ(gate) up.  The gradient computes σ again."""
    if not (_is_plain(gate) and _is_plain(up)):
        return NotImplemented
    operands.check_same_shape(gate, up)
    A = gate.reshape(-1)
    U = up.reshape(-1)
    y = np.empty(gate.size, np.float32)

    def sigmoid(a: np.ndarray, out: np.ndarray) -> np.ndarray:
        """1 / (1 + e^−a), written to `out` and returned.  e^−a is infinite for a < −88: the result is 0."""
        np.negative(a, out=out)
        with np.errstate(over="ignore"):
            np.exp(out, out=out)
        out += 1
        return np.reciprocal(out, out=out)

    def block(i: slice) -> None:
        z = sigmoid(A[i], y[i])
        z *= A[i]
        z *= U[i]
    blocks(gate.size, block)

    def back(g: np.ndarray, needed: list[bool]) -> tuple:
        """dgate = g up σ (1 + gate (1 − σ)) and dup = g gate σ, block by block."""
        G = np.ascontiguousarray(g).reshape(-1)
        dgate = np.empty(gate.size, np.float32)
        dup = np.empty(gate.size, np.float32)

        def block(i: slice) -> None:
            a = A[i]
            s = sigmoid(a, dup[i])
            e = np.subtract(1, s, out=dgate[i])
            e *= a
            e += 1                                           # 1 + gate (1 − σ)
            s *= G[i]                                        # g σ
            e *= s
            e *= U[i]
            s *= a
        blocks(gate.size, block)
        return dgate.reshape(gate.shape), dup.reshape(gate.shape)
    return y.reshape(gate.shape), back


def rms_norm(x: np.ndarray, w: np.ndarray, eps: float = 1e-6) -> Any:
    """(y, pullbacks) of ops.rms_norm, which keep x and one number per row, 1/σ, instead of x̂ = x/σ.

        y = w x r,   r = 1/σ;      dx = r e − x r³ mean(e x)   with e = g w"""
    if not (_is_plain(x) and w.dtype == np.float32):
        return NotImplemented
    operands.check_norm(x, eps, w)
    n = x.shape[-1]
    X = x.reshape(-1, n)
    y = np.empty_like(X)
    r = np.empty((len(X), 1), np.float32)

    def block(s: slice) -> None:
        rows = X[s]
        square = np.einsum("ij,ij->i", rows, rows)
        square /= np.float32(n)
        square += np.float32(eps)
        r[s, 0] = 1 / np.sqrt(square)
        np.multiply(rows, r[s], out=y[s])
        y[s] *= w
    blocks(len(X), block, n)

    def dx(g: np.ndarray) -> np.ndarray:
        G = np.ascontiguousarray(g).reshape(-1, n)
        d = np.empty_like(X)

        def block(s: slice) -> None:
            e = np.multiply(G[s], w, out=d[s])
            share = np.einsum("ij,ij->i", e, X[s])[:, None]
            share *= r[s]**3 / np.float32(n)                 # r³ mean(e x)
            e *= r[s]
            e -= X[s] * share
        blocks(len(X), block, n)
        return d.reshape(x.shape)
    return y.reshape(x.shape), (dx, lambda g: np.einsum("ij,ij,i->j", g.reshape(-1, n), X, r[:, 0]))


def rotary(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> Any:
    """(y, pullbacks) of ops.rotary without a copy of the turned halves.  y lies in memory as x does."""
    if x.dtype != np.float32 or x.size == 0:
        return NotImplemented
    cos, sin = operands.rotary_factors(x, cos, sin)
    half = x.shape[-1] // 2
    sin1 = sin[..., :half]
    sin2 = sin[..., half:]
    y = x * cos
    y[..., :half] -= x[..., half:] * sin1
    y[..., half:] += x[..., :half] * sin2

    def dx(g: np.ndarray) -> np.ndarray:
        d = g * cos
        d[..., :half] += g[..., half:] * sin2
        d[..., half:] -= g[..., :half] * sin1
        return d
    return y, (dx, None, None)


def layer_norm(x: np.ndarray, w: np.ndarray, b: np.ndarray, eps: float = 1e-5) -> Any:
    """(y, pullbacks) of ops.layer_norm without five temporary arrays.  Sums along a row are matrix products with ones.

        y = x̂ w + b,   x̂ = (x − mean) / σ;      dx = (e − mean(e) − x̂ mean(e x̂)) / σ   with e = g w

    Where a mean is large beside σ, its rounding error is too.  Such a row is centred from the differences to its first
    entry, as in the definition: a row of equal numbers gives x̂ = 0.  Where no op is recorded, x̂ is not kept."""
    if not (_is_plain(x) and w.dtype == b.dtype == np.float32):
        return NotImplemented
    operands.check_norm(x, eps, w, b)
    shape = x.shape
    n = shape[-1]
    X = x.reshape(-1, n)
    length = np.float32(n)
    ones = np.ones(n, np.float32)
    y = np.empty_like(X)
    h = np.empty_like(X) if is_recording() else y            # x̂
    r = np.empty((len(X), 1), np.float32)                    # 1/σ

    def block(s: slice) -> None:
        rows = X[s]
        mean = rows @ ones
        mean /= length
        centred = np.subtract(rows, mean[:, None], out=h[s])
        variance = np.einsum("ij,ij->i", centred, centred)
        variance /= length
        mean *= FLAT
        is_flat = variance <= mean * mean
        if np.count_nonzero(is_flat):                        # any() takes ten times as long
            flat = rows[is_flat] - rows[is_flat, :1]
            flat -= (flat @ ones)[:, None] / length
            centred[is_flat] = flat
            variance[is_flat] = np.einsum("ij,ij->i", flat, flat) / length
        variance += np.float32(eps)
        r[s, 0] = 1 / np.sqrt(variance)
        centred *= r[s]
        np.add(np.multiply(centred, w, out=y[s]), b, out=y[s])
    blocks(len(X), block, n)
    if h is y:
        return y.reshape(shape), (None, None, None)

    def dx(g: np.ndarray) -> np.ndarray:
        """(e − mean(e) − x̂ mean(e x̂)) / σ with e = g w, block by block of rows.  h holds x̂, and r 1/σ."""
        G = np.ascontiguousarray(g).reshape(-1, n)
        d = np.empty_like(h)

        def block(s: slice) -> None:
            e = np.multiply(G[s], w, out=d[s])
            mean_e = e @ ones / np.float32(n)
            mean_eh = np.einsum("ij,ij->i", e, h[s]) / np.float32(n)
            e -= mean_e[:, None]
            e -= h[s] * mean_eh[:, None]
            e *= r[s]
        blocks(len(h), block, n)                         # not len(X): that would keep x until backward
        return d.reshape(shape)
    return y.reshape(shape), (dx, lambda g: np.einsum("ij,ij->j", g.reshape(-1, n), h), _column_sum)


def embedding(W: np.ndarray, ids: np.ndarray) -> Any:
    """(W[ids], pullbacks) of ops.embedding without np.add.at, which adds row by row.

    The gradient: sort the ids, then sum the rows of g in each run of equal ids at once.  Ids that increase strictly,
    such as positions, need neither: no id comes twice, and the rows of g are assigned."""
    ids = operands.check_embedding(W, ids)

    def back(g: np.ndarray) -> np.ndarray:
        d = np.zeros(W.shape, g.dtype)
        flat = ids.reshape(-1) % len(W)                      # −1 is the last row
        if (flat[1:] > flat[:-1]).all():
            d[flat] = g.reshape(len(flat), W.shape[1])
        else:
            order = np.argsort(flat, kind="stable")
            run = flat[order]
            starts = np.flatnonzero(np.r_[True, run[1:] != run[:-1]])        # of the runs of equal ids
            d[run[starts]] = np.add.reduceat(g.reshape(len(flat), W.shape[1])[order], starts, axis=0)
        return d
    return operands.rows_of(W, ids), (back, None)


def cross_entropy(z: np.ndarray, y: np.ndarray, weight: np.ndarray | None = None, ignore_index: int = -100,
                  label_smoothing: float = 0.0) -> Any:
    """(mean loss, pullbacks) without three arrays as large as the logits z: keeps one sum of exponentials per row.

    `top` is the maximum of each row of logits, subtracted so that exp does not overflow; 0 if no logit is large (SAFE).
    NotImplemented with class weights or label smoothing."""
    if not _is_plain(z) or weight is not None or label_smoothing:
        return NotImplemented
    y, _ = operands.check_cross_entropy(z, y, None, ignore_index, 0.0)
    Z = ops.flat(z)                                          # (N, V)
    n = len(Z)
    has_label = y != ignore_index
    operands.check_labels(y, has_label, Z.shape[1])
    labels = np.where(has_label, y, 0)
    w = has_label.astype(np.float32)                         # 1 for a row with a label, else 0
    total = w.sum() or np.float32(1)
    ones = np.ones(Z.shape[1], np.float32)
    sums = np.empty(n, np.float32)                           # Σ e^(z − top)
    top = np.zeros((n, 1), np.float32)
    is_safe = max(Z.max(), -Z.min()) <= SAFE                 # then top stays 0

    def logits(s: slice) -> np.ndarray:
        """Z[s], with zeros in place of ignored rows if these may hold anything, such as −∞."""
        return Z[s] if is_safe or has_label[s].all() else np.where(has_label[s, None], Z[s], np.float32(0))

    def block(s: slice) -> None:
        x = logits(s)
        if not is_safe:
            x = x - x.max(axis=-1, keepdims=True, out=top[s])
        sums[s] = np.exp(x) @ ones
    blocks(n, block, Z.shape[1])
    picked = np.where(has_label, Z[np.arange(n), labels], np.float32(0))         # the logits of the labels
    value = (w * (np.log(sums) + top[:, 0] - picked)).sum() / total
    if not has_label.any():
        value = np.float32(math.nan)                         # the mean of no terms

    def back(g: np.ndarray) -> np.ndarray:
        """dz = share (softmax(z) − one-hot(y)), block by block of rows; share is 0 for an ignored row.

        softmax(z) is computed again, as e^(z − top) / sums."""
        d = np.empty_like(Z)
        share = w * (np.float32(g) / total)                  # of each row in the mean

        def block(s: slice) -> None:
            p = np.exp(logits(s) if is_safe else logits(s) - top[s], out=d[s])
            p *= (share[s] / sums[s])[:, None]               # share · softmax(z)
            p[np.arange(len(p)), labels[s]] -= share[s]
        blocks(n, block, Z.shape[1])
        return d.reshape(z.shape)
    return np.float32(value), (back, None, None)


def dropout(x: np.ndarray, p: float, key: int) -> Any:
    """(y, pullbacks) of ops.dropout.  Compares random 32-bit words with p and makes no uniform numbers u of them.

    An entry is kept if u >= p.  The factors, 0 or 1 / (1 − p), overwrite the words: they are as long in memory.  They
    are kept for the gradient."""
    p = checks.number("p", p, 0, below=1)
    key = checks.whole("key", key, 0)
    least = math.ceil(np.float32(p) * 2.0**24) << 8          # the smallest word whose upper 24 bits give u >= p
    if not (_is_plain(x) and 0 <= least < 2**32):
        return NotImplemented
    X = x.reshape(-1)
    y = np.empty(x.size, np.float32)
    words = random_words(x.size, key)
    scale = np.float32(1) / np.float32(1 - p)
    factors = words.view(np.float32)                         # the memory of the words

    def block(i: slice) -> None:
        np.multiply(words[i] >= np.uint32(least), scale, out=factors[i])
        np.multiply(X[i], factors[i], out=y[i])
    blocks(x.size, block)
    factors = factors.reshape(x.shape)
    return y.reshape(x.shape), (lambda g: g * factors, None, None)


def adam_update(w: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, lr: float, b1: float, b2: float, eps: float,
                decay: float, t: int) -> None:
    """optim.adam_update (AdamW's equations, in place) without eight passes over arrays as long as the model."""
    to_dtype = w.dtype.type                                  # so that no product is computed in float64
    step_size = to_dtype(lr / (1 - b1**t))
    root_factor = to_dtype((1 - b2**t)**-0.5)                # √v̂ = root_factor √v

    def block(i: slice) -> None:
        """The whole update of the entries i; they stay in the cache meanwhile."""
        wi, gi, mi, vi = w[i], g[i], m[i], v[i]
        e = gi * to_dtype(1 - b1)                            # e: each intermediate result, in one array
        mi *= to_dtype(b1)
        mi += e
        vi *= to_dtype(b2)
        np.multiply(gi, gi, out=e)
        e *= to_dtype(1 - b2)
        vi += e
        if decay:
            wi *= to_dtype(1 - lr * decay)
        np.sqrt(vi, out=e)
        e *= root_factor
        e += to_dtype(eps)
        np.divide(mi, e, out=e)                              # m / (√v̂ + ε)
        e *= step_size
        wi -= e
    blocks(w.size, block)

"""The CUDA kernels of the ops.  Each has its definition's signature, arrays -> (value, pullbacks), and returns NotImplemented for other dtypes and shapes.

They take float32, float16 and bfloat16, C-contiguous, and sum in float32; what is summed over a batch they leave in float32.  Every sum is
added up in a fixed order: the same inputs give the same bits.  What CuPy does in one launch already (adding a residual, gathering the
rows of an embedding) stays with CuPy.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...array import Array, address, is_array, xp
from ...ops import flat, t
from ...precision import rounded
from . import gemm
from .launch import C_TYPES, blocks, empty, launch

NAMES = ("linear", "matmul", "project", "gelu", "gelu_tanh", "layer_norm", "embedding", "attention", "cross_entropy", "dropout")
THREADS, ROWS = 256, 8                                                           # per block; rows of a warp each
SAME_ORDER = 16384                                                               # positions up to which an embedding's gradient is summed in order


def suits(*arrays: Array) -> bool:
    "Of one dtype the kernels know, none empty, numbers one after another."
    return arrays[0].dtype in C_TYPES and all(a.dtype == arrays[0].dtype and a.size and a.flags.c_contiguous for a in arrays)


def _dense(g: Array) -> Array:
    return g if g.flags.c_contiguous else xp(g).ascontiguousarray(g)


def _rows(n: int) -> int:
    "Blocks for n rows, a warp to a row."
    return -(-n // ROWS)


# ── products ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _multiplies(a: Array, b: Array) -> bool:
    return (a.dtype == b.dtype and a.dtype in gemm.TYPES and min(a.ndim, b.ndim) >= 2 and a.size > 0 and b.size > 0
            and (a.ndim == 2 or b.ndim == 2 or a.shape[:-2] == b.shape[:-2]))


def matmul(a: Array, b: Array) -> Any:
    "Saves the copies of what is transposed."
    if not _multiplies(a, b) or a.shape[-1] != b.shape[-2]:
        return NotImplemented
    return gemm.matmul(a, b), (lambda g: gemm.matmul(g, t(b)), lambda g: gemm.matmul(t(a), g))


def _summed(a: Array, b: Array) -> Array:
    "a b, left in float32 as it was summed: scores, and the gradient of a weight, which is float32 itself where training is mixed."
    return gemm.matmul(a, b, out=empty(a, (*a.shape[:-1], b.shape[-1]), np.float32))


def linear(x: Array, W: Array, b: Array | None = None) -> Any:
    "Saves a pass for the bias, and the many small launches of a product of three axes by two.  x need not be contiguous: one row of each text, say."
    known = x.size > 0 and x.dtype == W.dtype and suits(W) and (b is None or suits(W, b))
    if not (known and W.ndim == 2 and x.shape[-1] == W.shape[1] and (b is None or b.shape == W.shape[:1])):
        return NotImplemented
    X, n = flat(x), W.shape[0]
    y = gemm.matmul(X, W.T)
    if b is not None:
        launch("bias.cu", "add_bias", blocks(y.size), THREADS, y, b, np.int64(y.size), n, T=y.dtype)
    shape, rows = x.shape, _remembered(lambda g: flat(_dense(g)))                # dx must not hold x: where W is frozen nothing else does
    dx, dW, db = lambda g: gemm.matmul(rows(g), W).reshape(shape), lambda g: _summed(rows(g).T, X), lambda g: sum_rows(rows(g))
    return y.reshape(*shape[:-1], n), (dx, dW, db)


def project(x: Array, Wq: Array, bq: Array, Wk: Array, bk: Array, Wv: Array, bv: Array, heads: int = 1) -> Any:
    "Saves two products of three, where the weights lie one after another in memory; and the copies that bring heads together."
    weights, biases, n = (Wq, Wk, Wv), (bq, bk, bv), Wq.shape[0]
    if not (x.ndim == 3 and suits(x, *weights, *biases) and all(W.shape == (n, x.shape[-1]) for W in weights) and n % heads == 0):
        return NotImplemented
    (B, T, c), X, W = x.shape, flat(x), one_after_another(weights)
    if W is not None:
        y, by_part, by_row = gemm.matmul(X, W.T), n, 3 * n                       # (N, 3 n)
    else:
        y, by_part, by_row = empty(x, (3, len(X), n)), len(X) * n, n
        for i in range(3):
            gemm.matmul(X, weights[i].T, out=y[i])
    qkv = empty(x, (3, B, heads, T, n // heads))
    sizes, grid = (B, T, heads, n // heads), (3 * B * heads, -(-T // 8))
    launch("heads.cu", "cut_heads", grid, (32, 8), y, *biases, qkv, *sizes, np.int64(by_part), np.int64(by_row), T=x.dtype)

    def back(g: list, needed: list[bool]) -> tuple:
        G, dx = empty(x, (len(X), 3 * n)), None
        launch("heads.cu", "join_heads", grid, (32, 8), *(a if a is None else _dense(a) for a in g), G, *sizes, T=x.dtype)
        parts = [G[:, i * n:(i + 1) * n] for i in range(3)]
        if needed[0]:
            dx = gemm.matmul(G, W) if W is not None else gemm.matmul(parts[0], Wq)
            for i in (1, 2) if W is None else ():
                gemm.matmul(parts[i], weights[i], out=dx, add=True)
        if all(needed[1::2]):
            dW = _summed(G.T, X).reshape(3, n, c)
        else:
            dW = [_summed(part.T, X) if wanted else None for part, wanted in zip(parts, needed[1::2])]
        db = sum_rows(G).reshape(3, n) if any(needed[2::2]) else (None,) * 3
        return dx if dx is None else dx.reshape(x.shape), dW[0], db[0], dW[1], db[1], dW[2], db[2]
    return (qkv[0], qkv[1], qkv[2]), back


def one_after_another(matrices: tuple[Array, ...]) -> Array | None:
    "Matrices of one shape as one, one below the other, if that is how they lie: an optimiser lays out what trains so.  No copy; None if not."
    first, base, at = matrices[0], matrices[0].base, [address(a) for a in matrices]
    apart = any(a.base is not base for a in matrices) or any(b - a != first.nbytes for a, b in zip(at, at[1:]))
    if apart or base is None or not base.flags.c_contiguous:
        return None
    start = (at[0] - address(base)) // first.itemsize
    return base.reshape(-1)[start:start + len(matrices) * first.size].reshape(-1, first.shape[1])


def _remembered(f: Callable[[Array], Array]) -> Callable[[Array], Array]:
    "f, worked out once for the pullbacks that are given the same g one after another."
    last: list = [None, None]

    def call(g: Array) -> Array:
        if last[0] is not g:
            last[:] = g, f(g)
        return last[1]
    return call


def sum_rows(g: Array) -> Array:
    "(N, n) -> (n,): the gradient of a bias, in float32."
    (rows, n), (stretches, each) = g.shape, _stretches(len(g))
    parts = empty(g, (1, stretches, n), np.float32)
    launch("bias.cu", "sum_rows", (-(-n // 32), stretches), (32, 8), g, parts, rows, n, each, T=g.dtype)
    return _sum_parts(parts)[0]


def _stretches(rows: int) -> tuple[int, int]:
    "How many stretches to cut the rows into, and the rows of each."
    each = max(64, -(-rows // 256))
    return -(-rows // each), each


def _sum_parts(parts: Array) -> Array:
    "(sums, stretches, n) -> (sums, n)"
    sums, stretches, n = parts.shape
    y = empty(parts, (sums, n))
    launch("bias.cu", "sum_parts", (-(-n // THREADS), sums), THREADS, parts, y, stretches, n, T=parts.dtype)
    return y


# ── elementwise, and along rows ──────────────────────────────────────────────────────────────────────────────────────
def _gelu(name: str) -> Any:
    def kernel(x: Array) -> Any:
        "Saves all but one of the passes."
        if not suits(x):
            return NotImplemented
        y, size, grid = empty(x, x.shape), np.int64(x.size), blocks(x.size)
        launch("gelu.cu", name, grid, THREADS, x, y, size, T=x.dtype)

        def back(g: Array) -> Array:
            d = empty(x, x.shape)
            launch("gelu.cu", f"{name}_back", grid, THREADS, x, _dense(g), d, size, T=x.dtype)
            return d
        return y, (back,)
    return kernel


gelu, gelu_tanh = _gelu("gelu"), _gelu("gelu_tanh")


def layer_norm(x: Array, w: Array, b: Array, eps: float = 1e-5) -> Any:
    "Saves nine passes of eleven, and keeps two numbers per row in place of a copy of x."
    if not (suits(x, w, b) and w.shape == b.shape == x.shape[-1:]):
        return NotImplemented
    n, rows = x.shape[-1], x.size // x.shape[-1]
    y, mean, r = empty(x, x.shape), empty(x, (rows,), np.float32), empty(x, (rows,), np.float32)
    launch("layer_norm.cu", "layer_norm", _rows(rows), THREADS, x, w, b, y, mean, r, rows, n, float(eps), T=x.dtype)

    def back(g: Array, needed: list[bool]) -> tuple:
        g, dx, dw, db = _dense(g), None, None, None
        if needed[0]:
            dx = empty(x, x.shape)
            launch("layer_norm.cu", "layer_norm_back", _rows(rows), THREADS, x, w, g, mean, r, dx, rows, n, T=x.dtype)
        if needed[1] or needed[2]:
            stretches, each = _stretches(rows)
            parts = empty(x, (2, stretches, n), np.float32)
            grid = (-(-n // 32), stretches)
            launch("layer_norm.cu", "layer_norm_back_weights", grid, (32, 8), x, g, mean, r, parts, rows, n, each, T=x.dtype)
            dw, db = (d if wanted else None for d, wanted in zip(_sum_parts(parts), needed[1:]))
        return dx, dw, db
    return y, back


def embedding(W: Array, ids: Array) -> Any:
    "Saves the atomic additions, and sums in order: for up to SAME_ORDER positions, since it compares each with each."
    if not (W.ndim == 2 and suits(W) and 0 < ids.size <= SAME_ORDER):
        return NotImplemented
    rows, width = W.shape

    def back(g: Array) -> Array:
        d, flat_ids = xp(W).zeros(W.shape, np.float32), (ids.reshape(-1) % rows).astype(np.int32)                  # −1 is the last row
        grid = (_rows(ids.size), -(-width // 128))
        launch("embedding.cu", "embedding_back", grid, THREADS, flat_ids, _dense(g), d, ids.size, width, T=W.dtype)
        return d
    return W[ids], (back, None)


# ── attention and the loss ───────────────────────────────────────────────────────────────────────────────────────────
def attention(q: Array, k: Array, v: Array, seen: Array | None = None, causal: bool = False, scale: float | None = None,
              keep: Array | None = None) -> Any:
    """Saves the masks and all passes but one over the scores, between products that read heads where they lie.

    Of a long causal text, the scores that no one sees as well: its queries go part by part, each beside the keys up to its end."""
    arrays, lead = [q, k, v] + ([] if keep is None else [keep]), q.shape[:-2]
    shape = (*lead, q.shape[-2], k.shape[-2]) if q.ndim >= 2 <= k.ndim else ()
    if not (2 <= q.ndim <= 4 and k.shape[:-2] == v.shape[:-2] == lead and q.dtype in C_TYPES
            and all(a.dtype == q.dtype and a.size for a in arrays) and q.shape[-1] == k.shape[-1] and k.shape[-2] == v.shape[-2]
            and (seen is None or (seen.ndim <= q.ndim and seen.dtype == bool))):
        return NotImplemented
    q, k, v = (gemm.readable(a) for a in (q, k, v))                              # copied at most once, for both ways
    alpha, y, parts = float(q.shape[-1]**-0.5 if scale is None else scale), empty(q, (*shape[:-1], v.shape[-1])), []
    seen, keep = _mask(seen, shape), None if keep is None else xp(q).broadcast_to(keep, shape)
    for rows, keys in _parts(*shape[-2:], causal):
        part = _Scores(_some(q, rows), _some(k, keys), _cut(seen, rows, keys), causal, alpha, _cut(keep, rows, keys))
        gemm.matmul(part.kept, _some(v, keys), out=_some(y, rows))
        part.kept = None
        parts.append((rows, keys, part))

    def back(g: Array, needed: list[bool]) -> tuple:
        g, wide = gemm.readable(g), np.float32 if len(parts) > 1 else q.dtype    # what several parts add to is rounded at the end
        dq, dk, dv = (empty(q, a.shape, dtype) if n else None for a, n, dtype in zip((q, k, v), needed, (q.dtype, wide, wide)))
        for i, (rows, keys, part) in enumerate(reversed(parts)):                 # the last one sees all keys, and writes; the others add
            G = _some(g, rows)
            if dv is not None:
                gemm.matmul(t(part.thinned()), G, out=_some(dv, keys), add=i > 0)
            if dq is not None or dk is not None:
                ds = part.back(_summed(G, t(_some(v, keys))))
                if dq is not None:
                    gemm.matmul(ds, _some(k, keys), out=_some(dq, rows))
                if dk is not None:
                    gemm.matmul(t(ds), _some(q, rows), out=_some(dk, keys), add=i > 0)
        return dq, *(d if d is None else rounded(d, q.dtype) for d in (dk, dv))
    return y, back


LONG = 256                                                                       # queries of a part


def _parts(t: int, n: int, causal: bool) -> list[tuple[slice, slice]]:
    "Queries, and the keys they may see among them: of a causal text of several times LONG, in several parts."
    if not causal or t < 2 * LONG or n < t:
        return [(slice(0, t), slice(0, n))]
    return [(slice(a, min(a + LONG, t)), slice(0, n - t + min(a + LONG, t))) for a in range(0, t, LONG)]


def _some(a: Array, rows: slice) -> Array:
    "These rows of each matrix; where that is all of them a itself, since a view costs the host as much as a launch."
    return a if rows.stop - rows.start == a.shape[-2] else a[..., rows, :]


class _Scores:
    "Probabilities of queries over keys: p, and for the products `kept`, thinned by dropout."

    def __init__(self, q: Array, k: Array, seen: Array | None, causal: bool, alpha: float, keep: Array | None):
        s = _summed(q, t(k))                                                     # (..., t, n)
        (queries, n), rows, heads = s.shape[-2:], s.size // s.shape[-1], s.shape[-3] if s.ndim > 2 else 1
        strides = (0,) * 4 if seen is None else (0,) * (4 - seen.ndim) + tuple(0 if m == 1 else by for m, by in zip(seen.shape, seen.strides))
        self.keep, self.alpha, self.sizes = keep, alpha, (np.int64(rows), n)
        self.p = s if s.dtype == q.dtype else empty(q, s.shape)                  # the scores' own memory
        self.kept = self.p if keep is None else empty(q, s.shape)
        launch("attention.cu", "masked_softmax", _rows(rows), THREADS, s, seen, keep, self.p, self.kept, *self.sizes, queries, heads, causal, alpha,
               *map(np.int64, strides), T=q.dtype)

    def thinned(self) -> Array:
        return self.p if self.keep is None else self.p * self.keep

    def back(self, dp: Array) -> Array:
        "dP (float32), over which it may write -> dS"
        p, (rows, n) = self.p, self.sizes
        ds = dp if dp.dtype == p.dtype else empty(p, dp.shape)
        launch("attention.cu", "masked_softmax_back", _rows(int(rows)), THREADS, p, self.keep, dp, ds, rows, n, self.alpha, T=p.dtype)
        return ds


def _mask(seen: Array | None, shape: tuple) -> Array | None:
    "A mask with as many axes as the scores, each as long as theirs or one."
    if seen is None:
        return None
    have = (1,) * (len(shape) - seen.ndim) + seen.shape
    if any(a not in (1, b) for a, b in zip(have, shape)):
        raise ValueError(f"attention: `seen` of shape {seen.shape} does not broadcast to {shape}")
    return seen.reshape(have)


def _cut(a: Array | None, rows: slice, keys: slice) -> Array | None:
    "These rows and keys of what has one of each, or all."
    whole = slice(None)
    return a if a is None else _dense(a[..., rows if a.shape[-2] > 1 else whole, keys if a.shape[-1] > 1 else whole])


def cross_entropy(z: Array, y: Array, weight: Array | None = None, ignore_index: int = -100, label_smoothing: float = 0.0) -> Any:
    "Saves all passes over the logits but three, and keeps three numbers per row in place of them."
    if not (suits(z) and z.ndim >= 2 and y.size * z.shape[-1] == z.size and y.dtype.kind in "iu"
            and (weight is None or (weight.shape == z.shape[-1:] and not label_smoothing))):
        return NotImplemented
    n, rows, labels = z.shape[-1], z.size // z.shape[-1], _dense(y.astype(np.int64))
    weight = None if weight is None else _dense(weight.astype(np.float32))
    losses, stats, value, total = (empty(z, shape, np.float32) for shape in ((rows,), (3, rows), (), ()))
    options = (n, np.int64(ignore_index), float(label_smoothing))
    launch("cross_entropy.cu", "cross_entropy", rows, THREADS, z, labels, weight, losses, stats, *options, T=z.dtype)
    launch("cross_entropy.cu", "cross_entropy_mean", 1, 1024, losses, stats[2], value, total, rows, T=losses.dtype)

    def back(g: Array) -> Array:
        d, g = empty(z, z.shape), xp(z).asarray(g, dtype=np.float32)             # a sum is a number without axes: NumPy makes a scalar of it
        launch("cross_entropy.cu", "cross_entropy_back", rows, THREADS, z, labels, stats, total, g, d, n, float(label_smoothing), T=z.dtype)
        return d
    return value, (back, None, None)


# ── noise ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _key(key: Any) -> tuple:
    "A key as a kernel takes it: where it lies on the device, or its two halves."
    return (key, np.uint64(0), np.uint64(0)) if is_array(key) else (None, np.uint64(int(key) % 2**64), np.uint64(int(key) >> 64))


def uniform_like(x: Array, key: int) -> Array:
    "The numbers of array.uniform_like, made where they are wanted."
    u = empty(x, x.shape, np.float32)
    if u.size:
        launch("random.cu", "uniform", blocks(-(-u.size // 8)), THREADS, u, *_key(key), np.int64(u.size), T=u.dtype)
    return u


def dropout(x: Array, p: float, key: int) -> Any:
    "Saves the mask: the way back draws it anew."
    if not (suits(x) and 0 <= p < 1):
        return NotImplemented

    def drop(a: Array) -> Array:
        y, a = empty(a, a.shape), _dense(a)
        launch("random.cu", "dropout", blocks(-(-a.size // 8)), THREADS, a, y, float(p), 1 / (1 - p), *_key(key), np.int64(a.size), T=a.dtype)
        return y
    return drop(x), (drop, None, None)

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
from . import gemm
from .attention import attention
from .launch import C_TYPES, THREADS, blocks, contiguous, empty, launch, warp_blocks

__all__ = ["linear", "matmul", "project", "gelu", "gelu_tanh", "layer_norm", "embedding", "attention", "cross_entropy", "dropout"]
NAMES = tuple(__all__)                                                           # of the ops that have a kernel
SAME_ORDER = 16384                                                               # positions up to which an embedding's gradient is summed in order


def suits(*arrays: Array) -> bool:
    "Of one dtype the kernels know, none empty, numbers one after another."
    return arrays[0].dtype in C_TYPES and all(a.dtype == arrays[0].dtype and a.size and a.flags.c_contiguous for a in arrays)


# ── products ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _multiplies(a: Array, b: Array) -> bool:
    return (a.dtype == b.dtype and a.dtype in gemm.TYPES and min(a.ndim, b.ndim) >= 2 and a.size > 0 and b.size > 0
            and (a.ndim == 2 or b.ndim == 2 or a.shape[:-2] == b.shape[:-2]))


def matmul(a: Array, b: Array) -> Any:
    "Saves the copies of what is transposed."
    if not _multiplies(a, b) or a.shape[-1] != b.shape[-2]:
        return NotImplemented
    return gemm.matmul(a, b), (lambda g: gemm.matmul(g, t(b)), lambda g: gemm.matmul(t(a), g))


def linear(x: Array, W: Array, b: Array | None = None) -> Any:
    "Saves a pass for the bias, and the many small launches of a product of three axes by two.  x need not be contiguous: one row of each text, say."
    known = x.size > 0 and x.dtype == W.dtype and suits(W) and (b is None or suits(W, b))
    if not (known and W.ndim == 2 and x.shape[-1] == W.shape[1] and (b is None or b.shape == W.shape[:1])):
        return NotImplemented
    X, n = flat(x), W.shape[0]
    y = gemm.matmul(X, W.T)
    if b is not None:
        launch("bias.cu", "add_bias", blocks(y.size), THREADS, y, b, np.int64(y.size), n, T=y.dtype)
    shape, rows = x.shape, _remembered(lambda g: flat(contiguous(g)))                # dx must not hold x: where W is frozen nothing else does
    dx, dW, db = lambda g: gemm.matmul(rows(g), W).reshape(shape), lambda g: gemm.matmul_float32(rows(g).T, X), lambda g: sum_rows(rows(g))
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
        launch("heads.cu", "join_heads", grid, (32, 8), *(a if a is None else contiguous(a) for a in g), G, *sizes, T=x.dtype)
        parts = [G[:, i * n:(i + 1) * n] for i in range(3)]
        if needed[0]:
            dx = gemm.matmul(G, W) if W is not None else gemm.matmul(parts[0], Wq)
            for i in (1, 2) if W is None else ():
                gemm.matmul(parts[i], weights[i], out=dx, add=True)
        if all(needed[1::2]):
            dW = gemm.matmul_float32(G.T, X).reshape(3, n, c)
        else:
            dW = [gemm.matmul_float32(part.T, X) if wanted else None for part, wanted in zip(parts, needed[1::2])]
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
            launch("gelu.cu", f"{name}_back", grid, THREADS, x, contiguous(g), d, size, T=x.dtype)
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
    launch("layer_norm.cu", "layer_norm", warp_blocks(rows), THREADS, x, w, b, y, mean, r, rows, n, float(eps), T=x.dtype)

    def back(g: Array, needed: list[bool]) -> tuple:
        g, dx, dw, db = contiguous(g), None, None, None
        if needed[0]:
            dx = empty(x, x.shape)
            launch("layer_norm.cu", "layer_norm_back", warp_blocks(rows), THREADS, x, w, g, mean, r, dx, rows, n, T=x.dtype)
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
        grid = (warp_blocks(ids.size), -(-width // 128))
        launch("embedding.cu", "embedding_back", grid, THREADS, flat_ids, contiguous(g), d, ids.size, width, T=W.dtype)
        return d
    return W[ids], (back, None)


# ── the loss ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def cross_entropy(z: Array, y: Array, weight: Array | None = None, ignore_index: int = -100, label_smoothing: float = 0.0) -> Any:
    "Saves all passes over the logits but three, and keeps three numbers per row in place of them."
    if not (suits(z) and z.ndim >= 2 and y.size * z.shape[-1] == z.size and y.dtype.kind in "iu"
            and (weight is None or (weight.shape == z.shape[-1:] and not label_smoothing))):
        return NotImplemented
    n, rows, labels = z.shape[-1], z.size // z.shape[-1], contiguous(y.astype(np.int64))
    weight = None if weight is None else contiguous(weight.astype(np.float32))
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
        y, a = empty(a, a.shape), contiguous(a)
        launch("random.cu", "dropout", blocks(-(-a.size // 8)), THREADS, a, y, float(p), 1 / (1 - p), *_key(key), np.int64(a.size), T=a.dtype)
        return y
    return drop(x), (drop, None, None)

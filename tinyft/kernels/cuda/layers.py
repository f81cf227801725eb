"""The CUDA kernels of the ops.

Each has its definition's signature, arrays -> (value, pullbacks), and returns NotImplemented for other dtypes and
shapes. They take float32, float16 and bfloat16 arrays, C-contiguous, and sum in float32.  The gradients that are sums
over a batch stay in float32.  Every sum is computed in a fixed order: the same inputs give the same bits. An operation
that CuPy does in one launch already (adding a residual, gathering the rows of an embedding) stays with CuPy.

X and G are x (B, T, C) and g as matrices of rows (B T, C).
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ... import checks
from ...array import Array, address, is_array, xp
from ...operands import check_cross_entropy, check_embedding
from ...ops import flat, t
from . import gemm
from .attention import attention
from .launch import C_TYPES, THREADS, blocks, contiguous, empty, launch, warp_blocks

__all__ = ["linear", "matmul", "project", "gelu", "gelu_tanh", "layer_norm", "embedding", "attention", "cross_entropy",
           "dropout"]
NAMES = tuple(__all__)                       # of the ops that have a kernel
SAME_ORDER = 16384                           # positions up to which an embedding's gradient is summed in order


def suits(*arrays: Array) -> bool:
    """True if all arrays have one dtype that the kernels know, and none is empty or has gaps in memory."""
    dtype = arrays[0].dtype
    return dtype in C_TYPES and all(a.dtype == dtype and a.size and a.flags.c_contiguous for a in arrays)


# ── products ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def matmul(a: Array, b: Array) -> Any:
    """(a @ b, pullbacks) without copies of transposed factors; NotImplemented leaves the call to ops.matmul.

    For two arrays of one dtype that cuBLAS knows, with the same leading axes, or one of them a plain matrix."""
    known = is_array(b) and a.dtype == b.dtype and a.dtype in gemm.TYPES and a.size > 0 and b.size > 0
    if not known or a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        return NotImplemented
    if a.ndim > 2 and b.ndim > 2 and a.shape[:-2] != b.shape[:-2]:
        return NotImplemented
    return gemm.matmul(a, b), (lambda g: gemm.matmul(g, t(b)), lambda g: gemm.matmul(t(a), g))


def linear(x: Array, W: Array, b: Array | None = None) -> Any:
    """(x Wᵀ + b, pullbacks) as one product of matrices: CuPy would launch many small products for an x of three axes.

    x need not be contiguous: it may hold one position of each sequence.  NotImplemented leaves the call to ops.linear.
    """
    known = x.size > 0 and x.dtype == W.dtype and suits(W) and (b is None or suits(W, b))
    if not (known and W.ndim == 2 and x.shape[-1] == W.shape[1] and (b is None or b.shape == W.shape[:1])):
        return NotImplemented
    X = flat(x)                                          # (N, in)
    n = W.shape[0]
    y = gemm.matmul(X, W.T)
    if b is not None:
        launch("bias.cu", "add_bias", blocks(y.size), THREADS, y, b, np.int64(y.size), n, T=y.dtype)
    shape = x.shape                                      # dx must not keep x alive: if W is frozen, nothing else does
    rows = _cache_last(lambda g: flat(contiguous(g)))    # g (..., out) -> (N, out), once for the three pullbacks

    def dx(g: Array) -> Array:
        return gemm.matmul(rows(g), W).reshape(shape)

    def dW(g: Array) -> Array:
        return gemm.matmul_float32(rows(g).T, X)

    def db(g: Array) -> Array:
        return sum_rows(rows(g))

    return y.reshape(*shape[:-1], n), (dx, dW, db)


def project(x: Array, Wq: Array, bq: Array, Wk: Array, bk: Array, Wv: Array, bv: Array, heads: int = 1) -> Any:
    """ops.project: the three linear maps of attention -> q, k, v, each (B, heads, T, n / heads).

    If the weights are adjacent in memory, one product replaces three. One launch adds the biases and splits the heads.
    Returns ((q, k, v), their joint pullback); NotImplemented leaves the call to ops.project.
    """
    weights = (Wq, Wk, Wv)
    biases = (bq, bk, bv)
    n = Wq.shape[0]
    if x.ndim != 3 or n % heads or not suits(x, *weights, *biases):
        return NotImplemented
    B, T, C = x.shape
    if any(W.shape != (n, C) for W in weights):
        return NotImplemented
    X = flat(x)                                          # (B T, C)
    W = as_one_matrix(weights)                           # (3 n, C) or None
    # part_step, row_step: the distance in memory from q to k to v, and from one row to the next
    if W is not None:
        y = gemm.matmul(X, W.T)                          # (B T, 3 n)
        part_step = n
        row_step = 3 * n
    else:
        y = empty(x, (3, len(X), n))
        for i in range(3):
            gemm.matmul(X, weights[i].T, out=y[i])
        part_step = len(X) * n
        row_step = n
    qkv = empty(x, (3, B, heads, T, n // heads))
    sizes = (B, T, heads, n // heads)
    grid = (3 * B * heads, -(-T // 8))                   # a block of (32, 8) threads copies 8 positions of one head
    launch("heads.cu", "cut_heads", grid, (32, 8), y, *biases, qkv, *sizes, np.int64(part_step), np.int64(row_step),
           T=x.dtype)

    def back(g: list, needed: list[bool]) -> tuple:
        """The gradients of x, Wq, bq, Wk, bk, Wv, bv from g = [dq, dk, dv], in which None stands for zeros."""
        G = empty(x, (len(X), 3 * n))                    # the gradients of q, k and v, side by side
        gradients = [None if a is None else contiguous(a) for a in g]
        launch("heads.cu", "join_heads", grid, (32, 8), *gradients, G, *sizes, T=x.dtype)
        parts = [G[:, i * n:(i + 1) * n] for i in range(3)]
        dx = None
        if needed[0]:
            dx = _project_dx(G, parts, W, weights).reshape(x.shape)
        needs_W = needed[1::2]                           # of Wq, Wk, Wv
        needs_b = needed[2::2]
        if all(needs_W):
            dW = gemm.matmul_float32(G.T, X).reshape(3, n, C)
        else:
            dW = [gemm.matmul_float32(part.T, X) if is_needed else None for part, is_needed in zip(parts, needs_W)]
        # Of all three biases at once; the engine drops a gradient that is not needed.
        db = sum_rows(G).reshape(3, n) if any(needs_b) else (None,) * 3
        return dx, dW[0], db[0], dW[1], db[1], dW[2], db[2]

    return (qkv[0], qkv[1], qkv[2]), back


def _project_dx(G: Array, parts: list[Array], W: Array | None, weights: tuple[Array, ...]) -> Array:
    """The gradient of x in `project`: G W with the joined weight W, or the sum of three products if W is None.

    G (B T, 3 n): the gradients of q, k and v side by side;  parts: its three blocks of columns."""
    if W is not None:
        return gemm.matmul(G, W)
    dx = gemm.matmul(parts[0], weights[0])
    for part, weight in zip(parts[1:], weights[1:]):
        gemm.matmul(part, weight, out=dx, add=True)
    return dx


def as_one_matrix(matrices: tuple[Array, ...]) -> Array | None:
    """A view of k matrices (n, C) as one matrix (k n, C), one below the other. None if they are not adjacent in memory.

    They are adjacent where an optimiser has moved them into one flat array (optim/buffers.py).
    """
    first = matrices[0]
    base = first.base
    addresses = [address(a) for a in matrices]
    has_gaps = any(b - a != first.nbytes for a, b in zip(addresses, addresses[1:]))
    if has_gaps or base is None or not base.flags.c_contiguous or any(a.base is not base for a in matrices):
        return None
    start = (addresses[0] - address(base)) // first.itemsize
    return base.reshape(-1)[start:start + len(matrices) * first.size].reshape(-1, first.shape[1])


def _cache_last(f: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """f with its last result cached: pullbacks that are called with the same array g one after another share f(g)."""
    last: list = [None, None]                            # g, f(g)

    def call(g: Array) -> Array:
        if last[0] is not g:
            last[:] = g, f(g)
        return last[1]
    return call


def sum_rows(g: Array) -> Array:
    """g (N, n) -> Σ g over the rows (n,), in float32: the gradient of a bias."""
    rows, n = g.shape
    stretches, rows_of_each = _stretches(rows)
    parts = empty(g, (1, stretches, n), np.float32)      # a partial sum for each stretch of rows, in parallel
    launch("bias.cu", "sum_rows", (-(-n // 32), stretches), (32, 8), g, parts, rows, n, rows_of_each, T=g.dtype)
    return _sum_parts(parts)[0]


def _stretches(rows: int) -> tuple[int, int]:
    """(number of stretches of rows that are summed in parallel, rows of each).

    At most 256 stretches, of 64 rows or more.
    """
    rows_of_each = max(64, -(-rows // 256))
    return -(-rows // rows_of_each), rows_of_each


def _sum_parts(parts: Array) -> Array:
    """Add the partial sums of all stretches: (sums, stretches, n) -> (sums, n)."""
    sums, stretches, n = parts.shape
    y = empty(parts, (sums, n))
    launch("bias.cu", "sum_parts", (-(-n // THREADS), sums), THREADS, parts, y, stretches, n, T=parts.dtype)
    return y


# ── elementwise, and along rows ──────────────────────────────────────────────────────────────────────────────────────
def _gelu(name: str) -> Any:
    """The kernel of ops.gelu or ops.gelu_tanh, by the name of its function in gelu.cu."""
    def kernel(x: Array) -> Any:
        """(y, pullbacks) of the op; each direction is one pass, where the definition takes several."""
        if not suits(x):
            return NotImplemented
        y = empty(x, x.shape)
        size = np.int64(x.size)
        grid = blocks(x.size)
        launch("gelu.cu", name, grid, THREADS, x, y, size, T=x.dtype)

        def back(g: Array) -> Array:
            d = empty(x, x.shape)
            launch("gelu.cu", f"{name}_back", grid, THREADS, x, contiguous(g), d, size, T=x.dtype)
            return d
        return y, (back,)
    return kernel


gelu = _gelu("gelu")
gelu_tanh = _gelu("gelu_tanh")


def layer_norm(x: Array, w: Array, b: Array, eps: float = 1e-5) -> Any:
    """(y, joint pullback) of y = w (x − mean) / σ + b, in two passes instead of eleven.

    Keeps mean and 1/σ of each row for the gradient instead of a normalised copy of x. NotImplemented leaves the call to
    ops.layer_norm."""
    if not (suits(x, w, b) and w.shape == b.shape == x.shape[-1:]):
        return NotImplemented
    n = x.shape[-1]
    rows = x.size // n
    y = empty(x, x.shape)
    mean = empty(x, (rows,), np.float32)                 # less the first entry of the row
    r = empty(x, (rows,), np.float32)                    # 1/σ
    launch("layer_norm.cu", "layer_norm", warp_blocks(rows), THREADS, x, w, b, y, mean, r, rows, n, float(eps),
           T=x.dtype)

    def back(g: Array, needed: list[bool]) -> tuple:
        """The gradients of x, w and b, None where needed[i] is False; dw and db in float32."""
        g = contiguous(g)
        dx = dw = db = None
        if needed[0]:
            dx = empty(x, x.shape)
            launch("layer_norm.cu", "layer_norm_back", warp_blocks(rows), THREADS, x, w, g, mean, r, dx, rows, n,
                   T=x.dtype)
        if needed[1] or needed[2]:
            stretches, rows_of_each = _stretches(rows)
            parts = empty(x, (2, stretches, n), np.float32)      # of dw and db
            grid = (-(-n // 32), stretches)                      # a block sums 32 columns of one stretch of rows
            launch("layer_norm.cu", "layer_norm_back_weights", grid, (32, 8), x, g, mean, r, parts, rows, n,
                   rows_of_each, T=x.dtype)
            sums = _sum_parts(parts)
            dw = sums[0] if needed[1] else None
            db = sums[1] if needed[2] else None
        return dx, dw, db
    return y, back


def embedding(W: Array, ids: Array) -> Any:
    """W[ids], and a kernel for its gradient: summed in a fixed order, without atomic additions, so bits are repeatable.

    The kernel compares every position of ids with every other, so NotImplemented for more than SAME_ORDER positions.
    """
    ids = check_embedding(W, ids)
    if not (suits(W) and 0 < ids.size <= SAME_ORDER):
        return NotImplemented
    rows, width = W.shape

    def back(g: Array) -> Array:                                 # d[ids] += g
        d = xp(W).zeros(W.shape, np.float32)
        flat_ids = (ids.reshape(-1) % rows).astype(np.int32)     # −1 is the last row
        grid = (warp_blocks(ids.size), -(-width // 128))         # a warp to a position and to 128 columns
        launch("embedding.cu", "embedding_back", grid, THREADS, flat_ids, contiguous(g), d, ids.size, width, T=W.dtype)
        return d
    return W[ids], (back, None)


# ── the loss ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def cross_entropy(z: Array, y: Array, weight: Array | None = None, ignore_index: int = -100,
                  label_smoothing: float = 0.0) -> Any:
    """(mean loss, pullbacks) in three passes over the logits z: two forward, one backward.

    Keeps three numbers per row instead of the softmax. y: the labels; weight: of each class, or None. A label outside
    the classes gives NaN. Returns NotImplemented, which leaves the call to ops.cross_entropy, for other dtypes and
    layouts, and for weight together with label_smoothing."""
    y, weight = check_cross_entropy(z, y, weight, ignore_index, label_smoothing)
    if not suits(z) or z.ndim < 2 or (weight is not None and label_smoothing):
        return NotImplemented
    n = z.shape[-1]
    rows = z.size // n
    labels = contiguous(y.astype(np.int64))
    weight = None if weight is None else contiguous(weight.astype(np.float32))
    losses = empty(z, (rows,), np.float32)               # of each row, times its weight
    stats = empty(z, (3, rows), np.float32)              # maximum of a row, ln Σ e^(z − maximum), weight of its label
    value = empty(z, (), np.float32)
    total = empty(z, (), np.float32)                     # the sum of the rows' weights
    smoothing = float(label_smoothing)
    launch("cross_entropy.cu", "cross_entropy", rows, THREADS, z, labels, weight, losses, stats, n,
           np.int64(ignore_index), smoothing, T=z.dtype)
    launch("cross_entropy.cu", "cross_entropy_mean", 1, 1024, losses, stats[2], value, total, rows, T=losses.dtype)

    def back(g: Array) -> Array:                         # the gradient of z;  g: of the loss, a scalar
        d = empty(z, z.shape)
        g = xp(z).asarray(g, dtype=np.float32)           # NumPy makes a scalar of an array without axes
        launch("cross_entropy.cu", "cross_entropy_back", rows, THREADS, z, labels, stats, total, g, d, n, smoothing,
               T=z.dtype)
        return d
    return value, (back, None, None)


# ── dropout ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def _key(key: Any) -> tuple:
    """A random key as a kernel takes it: (array on the device, 0, 0), or (None, its low half, its high half).

    It is an array only while a step is captured: each replay finds another key there."""
    if is_array(key):
        return key, np.uint64(0), np.uint64(0)
    return None, np.uint64(int(key) % 2**64), np.uint64(int(key) >> 64)


def uniform_like(x: Array, key: int) -> Array:
    """The numbers of array.uniform_like, computed on the device."""
    u = empty(x, x.shape, np.float32)
    if u.size:
        launch("random.cu", "uniform", blocks(-(-u.size // 8)), THREADS, u, *_key(key), np.int64(u.size), T=u.dtype)
    return u


def dropout(x: Array, p: float, key: int) -> Any:
    """(x keep / (1 − p), pullbacks) without a stored mask: the pullback draws the mask anew from the key.

    NotImplemented leaves the call to ops.dropout."""
    p = checks.number("p", p, 0, below=1)
    if not suits(x):
        return NotImplemented

    def drop(a: Array) -> Array:                         # x, or in the pullback g: the same mask and scale
        y = empty(a, a.shape)
        a = contiguous(a)
        # A thread draws eight numbers.
        launch("random.cu", "dropout", blocks(-(-a.size // 8)), THREADS, a, y, float(p), 1 / (1 - p), *_key(key),
               np.int64(a.size), T=a.dtype)
        return y
    return drop(x), (drop, None, None)

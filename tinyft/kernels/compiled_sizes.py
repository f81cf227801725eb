"""The memory of the compiled kernels, as code: their counterparts for arrays with a shape and without numbers.

Where the compiled kernels run, training keeps this in place of what kernels/sizes.py lists; the rest is as there. The
docstring of a function names its kernel in compiled/.

    layer_norm          x, and three numbers of each row
    gelu, gelu_tanh     x alone
    project             x, and the three weights side by side
    attention           q, k, v, y, the maximum and the sum of each row of scores: never the scores
    cross_entropy       the logits, the labels, and one number for each row
    embedding           the ids, if W trains

Each thread has its own sums for the gradients of weights and of a bias; those of one thread are counted. The working
memory of a thread, one tile of attention, is not. This module does not import Numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import operands, ops
from ..sizes import Sizes, new, xp
from ..tensor import OPS, sum_to
from .attention import read_operands
from .numpy import split_gradients
from .sizes import F32, Pullback, count, hold, is_plain
from .tile_sizes import queries_of_tile

__all__ = ["kernels"]

def kernels() -> dict[Any, Any]:
    """{definition: counterpart of its compiled kernel}, of those that differ from the NumPy kernels"""
    found = (attention, cross_entropy, embedding, gelu, gelu_tanh, layer_norm, project)
    return {OPS[f.__name__]: f for f in found}


def gelu(x: Sizes) -> Any:
    """elementwise.gelu"""
    return (new(x.shape, F32), (Pullback(x.shape, x),)) if is_plain(x) else NotImplemented


def gelu_tanh(x: Sizes) -> Any:
    """elementwise.gelu_tanh"""
    return gelu(x)


def layer_norm(x: Sizes, w: Sizes, b: Sizes, eps: float = 1e-5) -> Any:
    """norms.layer_norm"""
    if not (is_plain(x) and w.dtype == b.dtype == F32):
        return NotImplemented
    operands.check_norm(x, eps, w, b)
    rows = x.size // x.shape[-1]
    held = (x, w, new((3, rows), F32))

    def back(g: Sizes, needed: list[bool], held: tuple = held) -> tuple:
        d = Pullback(x.shape)(g)
        hold(new(w.shape, F32), new(b.shape, F32))  # the sums of one thread
        return d, new(w.shape, F32), new(b.shape, F32)

    return new(x.shape, F32), back


def project(
    x: Sizes, Wq: Sizes, bq: Sizes, Wk: Sizes, bk: Sizes, Wv: Sizes, bv: Sizes, heads: int = 1,
) -> Any:
    """rows.project"""
    operands.check_project(x, (Wq, Wk, Wv), (bq, bk, bv), heads)
    if not all(map(is_plain, (x, Wq, bq, Wk, bk, Wv, bv))):
        return NotImplemented
    X, n = ops.flat(x), len(Wq)
    W = new((3 * n, x.shape[-1]), F32)
    Y = X @ W.T
    hold(new(3 * n, F32))
    by_head = (*x.shape[:-1], 3, heads, n // heads)

    def back(g: list, needed: list[bool]) -> tuple:
        is_whole = all(a is not None and a.base is not None and a.base is g[0].base for a in g)
        G = ops.flat(g[0].base) if is_whole and g[0].base.size == Y_size else new((len(X), 3 * n), F32)
        dx = (G @ W).reshape(x.shape) if needed[0] else None
        dW = G.T @ X if any(needed[1::2]) else None
        db = new(3 * n, F32) if any(needed[2::2]) else None
        return (dx, *split_gradients(dW, db, needed[1:]))

    Y_size = Y.size
    return tuple(Y.reshape(by_head)[..., i, :, :].swapaxes(-2, -3) for i in range(3)), back


def embedding(W: Sizes, ids: Sizes) -> Any:
    """rows.embedding"""
    ids = operands.check_embedding(W, ids)
    if not is_plain(W) or not ids.size:
        return NotImplemented

    def back(g: Sizes) -> Sizes:
        hold(xp.ascontiguousarray(g), new(ids.size, np.int64))
        return new(W.shape, F32)

    return operands.rows_of(W, ids), (back, None)


def cross_entropy(z: Sizes, y: Any, weight: Any = None, ignore_index: int = -100, label_smoothing: float = 0.0) -> Any:
    """cross_entropy.cross_entropy"""
    if not is_plain(z) or weight is not None or label_smoothing:
        return NotImplemented
    y, _ = operands.check_cross_entropy(z, y, None, ignore_index, 0.0)
    Z = ops.flat(z)
    labels, log_sums = new(len(Z), np.int64), new(len(Z), F32)
    hold(new(len(Z), F32))  # the losses
    return new((), F32), (Pullback(z.shape, Z, labels, log_sums), None, None)


def attention(q: Sizes, k: Sizes, v: Sizes, bias: Any = None, *, key_mask: Any = None, causal: bool = False,
              scale: float | None = None, dropout_mask: Any = None) -> Any:
    """attention.attention"""
    masks = read_operands(q, k, v, bias, key_mask, dropout_mask, causal=causal)
    if masks is None:
        return NotImplemented
    bias, key_mask, dropout_mask = masks
    B, H, queries, D = q.shape
    keys = k.shape[2]
    n_rows = queries_of_tile(queries, causal=causal)
    scores = B * H * scores_of_head(queries, keys, n_rows, causal=causal)
    y = new((B, queries, H, D), F32).swapaxes(1, 2)
    held = [q, k, v, y, bias, new((B, H, queries), F32), new((B, H, queries), F32)]
    if key_mask is not None:
        held.append(new(key_mask.shape, F32))
    if dropout_mask is not None:
        held.append(dropout_mask if dropout_mask.shape == (B, H, queries, keys) else new((B, H, queries, keys), F32))
    count(2 * scores * D)

    def back(g: Sizes, needed: list[bool], held: list = held) -> tuple:
        """dq, dk and dv, in one array if q and k have one shape."""
        if q.shape == k.shape:
            together = new((B * queries, 3 * H * D), F32).reshape(B, queries, 3, H, D)
            gradients = [together[:, :, i].swapaxes(1, 2) for i in range(3)]
        else:
            gradients = [new((B, a.shape[2], a.shape[1], D), F32).swapaxes(1, 2) for a in (q, k, k)]
        count(5 * scores * D)
        found = [a if is_needed else None for a, is_needed in zip(gradients, needed)]
        if len(needed) > 3:
            found.append(sum_to(new(bias.shape, F32), bias.shape) if needed[3] else None)
        return tuple(found)

    return y, back


def scores_of_head(queries: int, keys: int, n_rows: int, *, causal: bool) -> int:
    """The number of scores that the tiles of one head compute."""
    if not causal:
        return queries * keys
    total = 0
    for start in range(0, queries, n_rows):
        end = min(start + n_rows, queries)
        total += (end - start) * (end + keys - queries)
    return total

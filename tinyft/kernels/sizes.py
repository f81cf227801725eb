"""The counterparts of the NumPy kernels for arrays without numbers (sizes.py): the memory of each kernel as code.

Each function returns (value, pullbacks) as its kernel in numpy.py does. A pullback holds an array if, and only if, the
pullback of the kernel does. This is the list of what training keeps:

    linear              x, if W trains                    its gradient for x needs W alone
    layer_norm          x̂ and 1/σ                         rms_norm: x and 1/σ
    gelu, gelu_tanh     x; and erf or tanh, if x is small
    swiglu              gate and up
    rotary              nothing but cos and sin           shared by all layers
    attention           q, k, v, y, the row sums          never the scores, unless all of them fit the cache
    dropout             the factors, 4 bytes an entry
    cross_entropy       the logits, and their row sums
    embedding           the ids, if W trains
    packed linear       nothing: W is decompressed again

`rotary` of numpy.py is used as it is. Arrays of one block of a kernel (128 kB) are left out. compiled_sizes.py has the
counterparts of the compiled kernels that differ.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from .. import checks, operands, ops
from ..array import Array
from ..optim.optimizers import Optimizer
from ..sizes import Sizes, current_ledger, new, xp
from ..tensor import OPS, is_recording
from . import attention as tiled
from .numpy import SMALL, rotary

__all__ = ["attention", "cross_entropy", "dropout", "embedding", "gelu", "gelu_tanh", "layer_norm", "linear",
           "packed_linear", "rms_norm", "rotary", "swiglu", "update_pieces"]
F32 = np.float32


def kernels() -> dict[Any, Any]:
    """{definition: counterpart of its kernel}"""
    same_name = (attention, cross_entropy, dropout, embedding, gelu, gelu_tanh, layer_norm, linear, rms_norm, rotary,
                 swiglu)
    found: dict[Any, Any] = {OPS[f.__name__]: f for f in same_name}
    return found | {OPS["_packed_linear"]: packed_linear, Optimizer.update_pieces: update_pieces}


def is_plain(x: Sizes) -> bool:
    """True for a contiguous float32 array that is not empty."""
    return x.dtype == F32 and x.flags.c_contiguous and x.size > 0


class Pullback:
    """A pullback of one input: it holds arrays, and gives a new one of a shape."""

    def __init__(self, shape: tuple, *held: Any):
        self.shape = shape
        self.held = held

    def __call__(self, g: Sizes) -> Sizes:
        G = xp.ascontiguousarray(g)                      # a copy, which lives meanwhile, if g is not contiguous
        return new(self.shape, G.dtype)


def linear(x: Sizes, W: Sizes, b: Sizes | None = None) -> Any:
    """numpy.linear"""
    operands.check_linear(x, W, b)
    shape = x.shape
    n = len(W)

    def dx(g: Sizes) -> Sizes:
        return (ops.flat(g) @ W).reshape(shape)

    def dW(g: Sizes) -> Sizes:
        return ops.flat(g).T @ ops.flat(x)

    def db(g: Sizes) -> Sizes:
        return new(n, g.dtype)
    return (ops.flat(x) @ W.T).reshape(*shape[:-1], n), (dx, dW, db)


def _activation(x: Sizes) -> Any:
    """y, and for the gradient x; for a small x also erf or tanh."""
    if not is_plain(x):
        return NotImplemented
    kept = new(x.shape, F32) if x.size <= SMALL else None
    return new(x.shape, F32), (Pullback(x.shape, x, kept),)


def gelu(x: Sizes) -> Any:
    """numpy.gelu"""
    return _activation(x)


def gelu_tanh(x: Sizes) -> Any:
    """numpy.gelu_tanh"""
    return _activation(x)


def swiglu(gate: Sizes, up: Sizes) -> Any:
    """numpy.swiglu"""
    if not (is_plain(gate) and is_plain(up)):
        return NotImplemented
    operands.check_same_shape(gate, up)

    def back(g: Sizes, needed: list[bool]) -> tuple:
        return Pullback(gate.shape, gate)(g), Pullback(up.shape, up)(g)
    return new(gate.shape, F32), back


def rms_norm(x: Sizes, w: Sizes, eps: float = 1e-6) -> Any:
    """numpy.rms_norm"""
    if not (is_plain(x) and w.dtype == F32):
        return NotImplemented
    operands.check_norm(x, eps, w)
    r = new((x.size // x.shape[-1], 1), F32)
    return new(x.shape, F32), (Pullback(x.shape, x, w, r), Pullback(w.shape, x, r))


def layer_norm(x: Sizes, w: Sizes, b: Sizes, eps: float = 1e-5) -> Any:
    """numpy.layer_norm"""
    if not (is_plain(x) and w.dtype == b.dtype == F32):
        return NotImplemented
    operands.check_norm(x, eps, w, b)
    y = new(x.shape, F32)
    if not is_recording():
        return y, (None, None, None)
    h = new(x.shape, F32)                                # x̂
    r = new((x.size // x.shape[-1], 1), F32)
    ones = new(w.shape, F32)                             # for sums along a row
    return y, (Pullback(x.shape, h, w, r, ones), Pullback(w.shape, h), Pullback(b.shape))


def embedding(W: Sizes, ids: Sizes) -> Any:
    """numpy.embedding"""
    ids = operands.check_embedding(W, ids)

    def back(g: Sizes) -> Sizes:
        d = new(W.shape, g.dtype)
        if ids.ndim > 1 and len(ids) > 1:                # ids of one row are taken for positions, which increase
            order = new(ids.size, np.int64)
            hold(ids.reshape(-1)[order], g.reshape(ids.size, W.shape[1])[order], new(g.shape, g.dtype))
        return d
    return operands.rows_of(W, ids), (back, None)


def cross_entropy(z: Sizes, y: Any, weight: Any = None, ignore_index: int = -100, label_smoothing: float = 0.0) -> Any:
    """numpy.cross_entropy"""
    if not is_plain(z) or weight is not None or label_smoothing:
        return NotImplemented
    y, _ = operands.check_cross_entropy(z, y, None, ignore_index, 0.0)
    Z = ops.flat(z)
    n = len(Z)
    has_label = y != ignore_index
    rows = [has_label, new(n, np.int64), new(n, F32), new(n, F32), new((n, 1), F32)]     # labels, w, sums, top
    return new((), F32), (Pullback(z.shape, Z, *rows), None, None)


def dropout(x: Sizes, p: float, key: Any) -> Any:
    """numpy.dropout"""
    p = checks.number("p", p, 0, below=1)
    if not is_plain(x):
        return NotImplemented
    y = new(x.shape, F32)
    words = new(x.size // 2 + 1, np.uint64)
    factors = words.view(F32)[:x.size].reshape(x.shape)
    return y, (lambda g: g * factors, None, None)


def attention(q: Sizes, k: Sizes, v: Sizes, bias: Any = None, *, key_mask: Any = None, causal: bool = False,
              scale: float | None = None, dropout_mask: Any = None) -> Any:
    """attention.attention"""
    masks = tiled.read_operands(q, k, v, bias, key_mask, dropout_mask, causal=causal)
    if masks is None:
        return NotImplemented
    bias, key_mask, dropout_mask = masks
    B, H, t, D = q.shape
    s = k.shape[2]
    y = xp.empty_like(q)
    held = [q, k, v, y, bias, dropout_mask, new((B, H, t, 1), F32), new(s, F32)]      # the row sums, ones
    if key_mask is not None:
        held.append(new(key_mask.shape, F32))
    rows = tiled.causal_tile_rows(t) if causal else t
    if causal:
        held.append(new((rows, rows), F32))
    groups = tiled.tiles(B, H, k.shape[1], t, s, causal)
    sizes = [_scores(tile, q.shape, k.shape[1]) for group in groups for tile in group]
    fits = B * H * t * s <= tiled.TILE
    if fits:
        held.append(new(sum(sizes), F32))                # E of all tiles
    largest = max(sizes)
    count(2 * sum(sizes) * D)
    hold(new(largest, F32))

    def back(g: Sizes, needed: list[bool], held: list = held) -> tuple:
        gradients = [xp.empty_like(a) if is_needed else None for a, is_needed in zip((q, k, v), needed)]
        db = xp.zeros_like(bias) if any(needed[3:]) else None
        gives_scores = needed[0] or needed[1] or db is not None
        products = sum(needed[:3]) + gives_scores + (not fits)
        count(products * sum(sizes) * D)
        hold(new(largest, F32), new(largest, F32))      # E again, and the gradient of the scores
        return (*gradients, db)[:len(needed)]
    return y, back


def _scores(tile: tuple, q_shape: tuple, kv_heads: int) -> int:
    """The number of scores of a tile (at, rows, cols)."""
    at, rows, cols = tile
    B, H, t, _ = q_shape
    sequences = len(range(*at[0].indices(B)))
    heads = len(range(*at[1].indices(kv_heads))) * (H // kv_heads)
    return sequences * heads * len(range(*rows.indices(t))) * (cols.stop - cols.start)


def hold(*arrays: Sizes) -> None:
    """Arrays that live for the length of this call: the working memory of a kernel."""


def count(multiplications: int) -> None:
    """Count the products that a kernel computes."""
    current_ledger().multiply(multiplications)


def packed_linear(x: Sizes, packed: Any = None) -> Any:
    """nn._packed_linear: a product with a block of dense rows at a time."""
    shape = x.shape
    n, width = packed.shape
    rows = min(n, packed.rows_per_block or n)
    multiplications = x.size * n

    def back(g: Sizes) -> Sizes:
        count(multiplications)
        hold(new((rows, width), F32), new((rows, width), F32), new((*shape[:-1], width), x_dtype))
        return new(shape, x_dtype)
    x_dtype = x.dtype
    count(multiplications)
    hold(new((rows, width), F32), new((rows, width), F32))
    return new((*shape[:-1], n), x_dtype), (back,)


def update_pieces(optimizer: Optimizer, factor: float, clip: float | None, loss: Array | None, scale: float) -> Sizes:
    """Optimizer.update_pieces, whose update needs no memory beyond one block: small gradients are copied end to end."""
    pieces = [group.pieces() for group in optimizer.groups]
    optimizer.t += 1
    for group in optimizer.groups:
        group.restore(group.frozen_entries())
        group.write_rounded()
    assert len(pieces) == len(optimizer.groups)
    return new((), F32)

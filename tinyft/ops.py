"""The primitives.  Each op is one function on plain arrays that returns its value and its pullbacks.

g is the gradient of the loss with respect to the op's value.  A pullback may leave out the sum over broadcast axes
(Σ in the equations): the engine does it.  Everything else is composed from these (functional.py).
Ops ask the array for its module, `xp(x)`, so they run on every backend.  kernels/ holds faster drop-ins for some of
them; these definitions are what the drop-ins are held to.
"""
from __future__ import annotations

import math
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np

from . import array, checks, precision
from .array import Array, xp
from .operands import (
    as_float_dtype,
    as_indices,
    as_mask,
    as_operand,
    as_shape,
    attention_masks,
    attention_shape,
    check_cross_entropy,
    check_embedding,
    check_labels,
    check_last_axis,
    check_linear,
    check_norm,
    check_project,
    check_same_shape,
    index_part,
    match_dtypes,
    one_axis,
    rotary_factors,
    rows_of,
    some_axes,
    split_ends,
)
from .tensor import Tensor, op


def t(a: Array) -> Array:
    """The last two axes swapped."""
    return a.swapaxes(-1, -2)


def flat(a: Array) -> Array:
    """(..., n) -> (N, n)"""
    rows = -1 if a.size else math.prod(a.shape[:-1])          # of an empty array −1 could be any number
    return a.reshape(rows, a.shape[-1])


def same(g: Array) -> Array:
    """The pullback of an input whose gradient is g."""
    return g


# ── arithmetic ───────────────────────────────────────────────────────────────────────────────────────────────────────
@op("..., ... -> ...")
def add(a, b):
    """y = a + b.    da = g,  db = g"""
    a, b = match_dtypes(a, b)
    return a + b, (same, same)


@op("..., ... -> ...")
def sub(a, b):
    """y = a − b.    da = g,  db = −g"""
    a, b = match_dtypes(a, b)
    return a - b, (same, lambda g: -g)


@op("..., ... -> ...")
def mul(a, b):
    """y = a b.    da = g b,  db = g a"""
    a, b = match_dtypes(a, b)
    return a * b, (lambda g: g * b, lambda g: g * a)


@op("..., ... -> ...")
def div(a, b):
    """y = a / b.    da = g / b,  db = −g a / b²"""
    a, b = match_dtypes(a, b)
    y = a / b
    return y, (lambda g: g / b, lambda g: -g * y / b)


@op("... -> ...")
def neg(x):
    """y = −x.    dx = −g"""
    return -x, (lambda g: -g,)


@op("..., ... -> ...")
def power(x, p):
    """y = xᵖ.    dx = g p xᵖ⁻¹, 0 where p = 0;  dp = g y ln x, 0 where x = 0 and p ≥ 0"""
    x, p = match_dtypes(x, p)
    y = x**p

    def dx(g):
        m = xp(g)
        if not array.is_array(p):
            return g * (p * x**(p - 1)) if p else m.zeros_like(g)
        return g * m.where(p == 0, 0, p * x**m.where(p == 0, 1, p - 1))       # for p = 0 there is no 0⁻¹

    def dp(g):
        m = xp(g)
        is_zero = (x == 0) & (p >= 0)
        return g * m.where(is_zero, 0, y * m.log(m.where(is_zero, 1, x)))     # 0 ln 0 = 0
    return y, (dx, dp)


@op("... n k, ... k m -> ... n m")
def matmul(a, b):
    """C = A B.    dA = G Bᵀ,  dB = Aᵀ G

    A vector (k,) is a row on the left and a column on the right, and C lacks the axis of length 1, as in NumPy."""
    a, b = match_dtypes(a, b)
    if getattr(a, "ndim", 0) < 2 or getattr(b, "ndim", 0) < 2:
        return _vector_product(a, b)
    return a @ b, (lambda g: g @ t(b), lambda g: t(a) @ g)


def _vector_product(a: Array, b: Array) -> tuple:
    """(value, pullbacks) of matmul where an input is a vector.

    A row A (1, k) or a column B (k, 1) stands in its place, and G has the axes (..., n, m) again."""
    for x in (a, b):
        if not getattr(x, "ndim", 0):
            if array.is_array(x) or isinstance(x, (int, float)):
                raise ValueError("each factor wants one axis or more: a number is multiplied with *")
            raise TypeError("a factor is no array")                              # the engine says which
    A = a[None] if a.ndim == 1 else a
    B = b[:, None] if b.ndim == 1 else b
    y = a @ b
    lead = y.shape[:y.ndim - (a.ndim > 1) - (b.ndim > 1)]
    matrix = (*lead, A.shape[-2], B.shape[-1])
    a_shape = (*lead, *a.shape[-2:])
    b_shape = (*lead, *b.shape[-2:])
    return y, (lambda g: (g.reshape(matrix) @ t(B)).reshape(a_shape),
               lambda g: (t(A) @ g.reshape(matrix)).reshape(b_shape))


@op("... k, n k, n -> ... n")
def linear(x, W, b=None):
    """y = x Wᵀ + b.    dx = g W,  dW = gᵀ x,  db = Σ g

    x (..., in) or (in,), W (out, in), b (out,) or None. ShapeError for other shapes."""
    check_linear(x, W, b)
    y = (flat(x) @ W.T).reshape(*x.shape[:-1], W.shape[0])
    if b is not None:
        y = y + b
    def dx(g):                                                # holds no x
        return (flat(g) @ W).reshape(*g.shape[:-1], W.shape[1])
    return y, (dx, lambda g: flat(g).T @ flat(x), same)


@op("... t c, n c, n, n c, n, n c, n -> ... h t d")
def project(x, Wq, bq, Wk, bk, Wv, bv, heads=1):
    """q, k, v = x Wᵀ + b for three W, each cut into heads: (..., T, C) -> three of (..., H, T, D).

    Head h has the features h D to (h + 1) D − 1.

        dx = Σ g W,   dW = gᵀ x,   db = Σ g,      g with its heads joined again"""
    m = xp(x)
    n = Wq.shape[0]                                           # H D
    check_project(x, (Wq, Wk, Wv), (bq, bk, bv), heads)
    X = flat(x)                                               # (N, C)

    def split_heads(y):
        return y.reshape(*x.shape[:-1], heads, n // heads).swapaxes(-2, -3)

    def join_heads(a):
        if a is None:                                         # no gradient came to this value
            return m.zeros((len(X), n), x.dtype)
        return a.swapaxes(-2, -3).reshape(-1, n)              # (N, H D)

    def back(g, needed):
        """The gradients of x, Wq, bq, Wk, bk, Wv, bv from g = [dq, dk, dv], in which None stands for zeros."""
        gq, gk, gv = (join_heads(a) for a in g)
        dx = (gq @ Wq + gk @ Wk + gv @ Wv).reshape(x.shape) if needed[0] else None
        gradients = [dx]
        for i, a in enumerate((gq, gk, gv)):
            gradients.append(a.T @ X if needed[1 + 2 * i] else None)          # dW
            gradients.append(a.sum(axis=0))                                   # db
        return gradients
    return tuple(split_heads(X @ W.T + b) for W, b in ((Wq, bq), (Wk, bk), (Wv, bv))), back


# ── elementwise functions ────────────────────────────────────────────────────────────────────────────────────────────
@op("... -> ...")
def exp(x):
    """y = eˣ.    dx = g y"""
    y = xp(x).exp(x)
    return y, (lambda g: g * y,)


@op("... -> ...")
def log(x):
    """y = ln x.    dx = g / x"""
    return xp(x).log(x), (lambda g: g / x,)


@op("... -> ...")
def sqrt(x):
    """y = √x.    dx = g / 2y"""
    y = xp(x).sqrt(x)
    return y, (lambda g: g / (2 * y),)


@op("... -> ...")
def tanh(x):
    """y = tanh x.    dx = g (1 − y²)"""
    y = xp(x).tanh(x)
    return y, (lambda g: g * (1 - y * y),)


@op("... -> ...")
def sigmoid(x):
    """y = σ(x) = 1/(1 + e^−x) = e^min(x, 0) / (1 + e),  e = e^−|x|.    dx = g σ',  σ' = e/(1 + e)²

    Nothing overflows. A small y and a small σ' have all their digits, which tanh and 1 − y would lose."""
    y, slope = _sigmoid(x)
    return y, (lambda g: g * slope(),)


def _sigmoid(x: Array) -> tuple:
    """(σ(x), a function that computes its derivative)."""
    m = xp(x)
    e = m.exp(-abs(x))

    def slope() -> Array:
        return e / ((1 + e) * (1 + e))
    return m.exp(m.minimum(x, 0)) / (1 + e), slope


@op("... -> ...")
def absolute(x):
    """y = |x|.    dx = g sign x"""
    return abs(x), (lambda g: g * xp(x).sign(x),)


@op("... -> ...")
def relu(x):
    """y = max(x, 0).    dx = g [x > 0]"""
    return xp(x).maximum(x, 0), (lambda g: g * (x > 0),)


@op("... -> ...")
def silu(x):
    """y = x σ(x).    dx = g (σ + x σ')"""
    s, slope = _sigmoid(x)
    return x * s, (lambda g: g * (s + x * slope()),)


@op("..., ... -> ...")
def swiglu(gate, up):
    """y = silu(gate) ⊙ up.    dgate = g ⊙ up ⊙ silu'(gate);  dup = g ⊙ silu(gate).    Llama's feed-forward unit

    silu(x) = x σ(x),  silu' = σ + x σ'.    Shazeer 2020, arXiv:2002.05202. ShapeError for two shapes"""
    check_same_shape(gate, up)
    s, slope = _sigmoid(gate)

    def back(g, needed):
        dgate = g * up * (s + gate * slope()) if needed[0] else None
        return dgate, g * (gate * s) if needed[1] else None
    return gate * s * up, back


@op("... -> ...")
def gelu(x):
    """y = x Φ(x),  Φ(x) = (1 + erf(x/√2)) / 2.    dx = g (Φ + x φ),  φ = e^(−x²/2) / √2π      (BERT)"""
    cdf = _normal_cdf(x)
    return x * cdf, (lambda g: g * (cdf + x * xp(x).exp(-0.5 * x * x) * (2 * math.pi)**-0.5),)


@op("... -> ...")
def gelu_tanh(x):
    """y = x (1 + h)/2,  h = tanh(c (x + 0.044715 x³)),  c = √(2/π).      (GPT-2)

    dx = g ((1 + h)/2 + x (1 − h²)/2 c (1 + 0.134145 x²)).    y and dx keep the dtype of x"""
    c = (2 / math.pi)**0.5
    h = xp(x).tanh(c * (x + 0.044715 * (x * x * x)))
    return 0.5 * x * (1 + h), (lambda g: g * (0.5 * (1 + h) + 0.5 * x * (1 - h * h) * c * (1 + 0.134145 * (x * x))),)


def _normal_cdf(x: Array) -> Array:
    """Φ(x) = erfc(−x/√2) / 2. A small Φ, of an x far below 0, has all its digits; 1 + erf would lose them."""
    tail = 0.5 * _erfc_of_size(x, 0.5**0.5)                   # Φ(−|x|)
    return (tail + (x > 0) * (1 - 2 * tail)).astype(x.dtype)


def erf(x: Array) -> Array:
    """erf(x) = sign x (1 − erfc |x|)"""
    return (xp(x).sign(x) * (1 - _erfc_of_size(x))).astype(x.dtype)


def _erfc_of_size(x: Array, factor: float = 1.0) -> Array:
    """erfc(z) = u e^(P(u) − z²) of z = factor · |x|, in double precision,  u = 1 / (1 + z/2),  P a polynomial.

    P interpolates the complementary error function of the standard library at Chebyshev nodes, of degree 10 for single
    precision and 22 for double: the relative error is below 1e-7 and 1e-13.  Evaluated in double, since a rounded P
    costs 3e-7, and a rounded z² all digits of a small result."""
    m = xp(x)
    c = _erfc_polynomial(22 if x.dtype == np.float64 else 10)
    z = abs(x).astype(np.float64) * factor
    u = 1 / (1 + 0.5 * z)
    # P(u) = Σ cⱼ Tⱼ(2u − 1) by Clenshaw's recurrence; s is twice the argument of the Chebyshev polynomials Tⱼ.
    s = 4 * u - 2
    a, b = c[-1], 0
    for cj in c[-2:0:-1]:
        a, b = s * a - b + cj, a
    return u * m.exp(0.5 * s * a - b + c[0] - z * z)                                           # P = s a/2 − b + c₀


@lru_cache(None)
def _erfc_polynomial(degree: int) -> list[float]:
    """Chebyshev coefficients of ln(erfc(z) e^(z²) / u) as a function of 2u − 1, u = 1 / (1 + z/2)."""
    def log_ratio(s: float) -> float:                         # s = 2u − 1
        z = 2 / ((s + 1) / 2) - 2
        if z < 20:
            return math.log(math.erfc(z)) + z * z + math.log(1 + z / 2)
        # For larger z erfc(z) is near the smallest double; this is its asymptotic series.
        series = 1 - 1 / (2 * z * z) + 3 / (4 * z**4) - 15 / (8 * z**6)      # erfc(z) e^(z²) z √π
        return math.log(series * (1 + z / 2) / (z * math.pi**0.5))

    def log_ratios(s: np.ndarray) -> np.ndarray:
        return np.array([log_ratio(v) for v in s])            # host
    return np.polynomial.chebyshev.chebinterpolate(log_ratios, degree).tolist()                             # host


# ── reductions ───────────────────────────────────────────────────────────────────────────────────────────────────────
def _restore_axes(g: Array, shape: tuple, axis: Any, keepdims: bool) -> Array:
    """g, the gradient of a reduced value, with the reduced axes put back as axes of length one, to broadcast with x.

    shape: of x, the array before the reduction. axis: the reduced axes, counted from 0, or None. keepdims: of the
    reduction. With axis=None g is a single number and broadcasts as it is."""
    if axis is None or keepdims:
        return g
    return g.reshape(tuple(1 if i in axis else n for i, n in enumerate(shape)))


def _spread(g: Array, shape: tuple) -> Array:
    """g repeated to this shape, without a copy.

    If nothing is repeated, the result is an ordinary view: a view that NumPy broadcasts is read-only."""
    if g.size == math.prod(shape):
        return g.reshape(shape)
    return xp(g).broadcast_to(g, shape)


@op("... -> ...")
def sum(x, axis=None, keepdims=False):
    """y = Σ x.    dx = g along the summed axes"""
    shape = x.shape
    axis = some_axes(axis, x, keepdims)
    return x.sum(axis=axis, keepdims=keepdims), (lambda g: _spread(_restore_axes(g, shape, axis, keepdims), shape),)


@op("... -> ...")
def mean(x, axis=None, keepdims=False):
    """y = Σ x / n.    dx = g / n.    The mean of no entries is NaN, as in PyTorch."""
    shape = x.shape
    axis = some_axes(axis, x, keepdims)
    if x.size:
        y = x.mean(axis=axis, keepdims=keepdims)
    else:
        y = x.sum(axis=axis, keepdims=keepdims) * math.nan
    n = max(x.size // (y.size or 1), 1)
    return y, (lambda g: _spread(_restore_axes(g, shape, axis, keepdims) / n, shape),)


@op("... -> ...")
def amax(x, axis=None, keepdims=False):
    """y = max x.    dx = g where x is the maximum, shared equally among ties

    ShapeError for an axis without entries."""
    axis = some_axes(axis, x, keepdims)
    if 0 in (x.shape if axis is None else [x.shape[a] for a in axis]):
        raise ValueError("a maximum wants one entry or more along each axis that is reduced")
    y = x.max(axis=axis, keepdims=keepdims)

    def back(g):
        is_max = x == _restore_axes(y, x.shape, axis, keepdims)
        ties = is_max.sum(axis=axis, keepdims=True)
        return _restore_axes(g, x.shape, axis, keepdims) * is_max / ties
    return y, (back,)


@op("... n -> ... n")
def cumsum(x, axis=-1):
    """yᵢ = Σ_{j≤i} xⱼ.    dxⱼ = Σ_{i≥j} gᵢ"""
    m = xp(x)
    axis = one_axis(axis, x)
    return m.cumsum(x, axis=axis), (lambda g: m.flip(m.cumsum(m.flip(g, axis=axis), axis=axis), axis=axis),)


# ── choosing ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@op("..., ..., ... -> ...")
def where(c, a, b):
    """y = a where c, else b.    da = g [c],  db = g [not c]

    c: True and False, or 1 and 0 of any dtype."""
    a, b = match_dtypes(a, b)
    c = as_mask(c, a if array.is_array(a) else b, "the condition")
    return xp(c).where(c, a, b), (None, lambda g: g * c, lambda g: g * ~c)


@op("..., ... -> ...")
def maximum(a, b):
    """y = max(a, b).    da = g [a > b] + g [a = b] / 2"""
    a, b = match_dtypes(a, b)

    def share(p, q):                                          # the part of g that goes to p
        return (p > q) + 0.5 * (p == q)
    return xp(a, b).maximum(a, b), (lambda g: g * share(a, b), lambda g: g * share(b, a))


@op("..., ..., ... -> ...")
def clip(x, low=None, high=None):
    """y = min(max(x, low), high).    A bound that is None does not limit.      As torch.clamp

    dx = g [low ≤ x ≤ high],  dlow = g [x < low < high],  dhigh = g [x > high or low > high]"""
    x, low = match_dtypes(x, low)
    x, high = match_dtypes(x, high)
    least = -math.inf if low is None else low
    most = math.inf if high is None else high
    y = x if low is high is None else xp(x, low, high).clip(x, low, high)

    def dx(g):
        return g * ((x >= least) & (x <= most))

    def dlow(g):
        return g * ((x < least) & (least < most))

    def dhigh(g):
        return g * ((x > most) | (least > most))
    return y, (dx, dlow, dhigh)


@op("..., ... -> ...", stops=("hard",))
def straight_through(hard, soft):
    """y = hard; the gradient goes to soft as if it had been the value.    d soft = g      (Bengio et al. 2013)

    y has the dtype of soft; hard may hold whole numbers or booleans, and the two shapes broadcast."""
    hard = as_operand(hard, soft, "hard")
    if hard.dtype.kind in "biu":
        hard = hard.astype(soft.dtype)
    if hard.shape != soft.shape:
        hard = xp(hard).broadcast_to(hard, np.broadcast_shapes(hard.shape, soft.shape))
    return hard, (None, same)


@op("... n, ... k -> ... k")
def gather(x, i, axis=-1):
    """yⱼ = x[iⱼ] along one axis, the indices different in each row.    dx[iⱼ] += gⱼ

    i: whole numbers of any dtype; −1 is the last entry. Its shape is that of x, except along `axis`; else ShapeError.
    """
    m = xp(x)
    shape = x.shape
    axis = one_axis(axis, x)
    i = as_indices(i, x)
    if i.ndim != x.ndim or any(n != size for a, (n, size) in enumerate(zip(i.shape, shape)) if a != axis):
        raise ValueError(f"indices wants the shape of x except along axis {axis}")

    def along(k, n):                                          # 0 ... n − 1 along axis k, to broadcast with i
        return m.arange(n).reshape([-1 if a == k else 1 for a in range(i.ndim)])

    def back(g):
        d = m.zeros(shape, g.dtype)
        index = [along(k, n) for k, n in enumerate(i.shape)]
        index[axis] = i
        m.add.at(d, tuple(index), g)
        return d
    try:
        return m.take_along_axis(x, i, axis=axis), (back, None)
    except IndexError:
        raise IndexError(f"indices wants entries along axis {axis}, 0 to {shape[axis] - 1}") from None


@op("v c, ... -> ... c")
def embedding(W, ids):
    """y = W[ids], rows of W.    dW[ids] += g

    W (V, C); ids (...) whole numbers of any dtype; −1 is the last row."""
    m = xp(W)
    shape = W.shape
    ids = check_embedding(W, ids)

    def back(g):
        d = m.zeros(shape, g.dtype)
        m.add.at(d, ids, g)
        return d
    return rows_of(W, ids), (back, None)


@op("... -> ...")
def getitem(x, index):
    """y = x[index] for slices, integers and arrays of integers or booleans.    dx[index] += g"""
    parts = tuple([index_part(p, x) for p in (index if isinstance(index, tuple) else (index,))])
    m = xp(x, *parts)
    shape = x.shape
    # Without integer arrays every entry is selected at most once, so g is assigned, not added.
    plain = all(not array.is_array(p) or p.dtype == bool for p in parts)

    def back(g):
        d = m.zeros(shape, g.dtype)
        if plain:
            d[parts] = g
        else:
            m.add.at(d, parts, g)
        return d
    try:
        return x[parts], (back, None)
    except IndexError:
        raise IndexError(f"an index wants to fit the shape {x.shape}, got {checks.brief(index)}") from None


# ── shape ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@op("... -> ...")
def reshape(x, shape):
    """The same numbers in another shape.    dx = g, reshaped back"""
    shape = shape if type(shape) is tuple else as_shape(shape)
    old = x.shape
    y = x.reshape(shape)
    if y.shape != shape and min(shape) < -1:
        raise ValueError("shape wants lengths of 0 or more, and −1 for one to be computed")      # NumPy takes −2 for −1
    return y, (lambda g: g.reshape(old), None)


@op("... -> ...")
def permute(x, axes):
    """The axes in another order.    dx = g with the order undone"""
    axes = axes if type(axes) is tuple else as_shape(axes, "axes")
    back = tuple(sorted(range(len(axes)), key=lambda i: axes[i] % len(axes)))
    try:
        y = x.transpose(axes)
    except ValueError:
        raise ValueError("axes wants each axis of x once") from None
    return y, (lambda g: g.transpose(back), None)


@op("... n m -> ... m n")
def transpose(x):
    """The last two axes swapped."""
    return t(x), (t,)


@op("... -> ...")
def broadcast_to(x, shape):
    """x repeated along axes of length one, without copies.    dx = Σ g, which the engine does"""
    shape = as_shape(shape)
    return xp(x).broadcast_to(x, shape), (same, None)


@op("... -> ...")
def concatenate(*xs, axis=0):
    """The arrays end to end along an axis.    dxᵢ = the slice of g at the place of xᵢ

    ShapeError unless the arrays have the same lengths along all other axes."""
    axis = one_axis(axis, xs[0])
    if any(x.ndim != xs[0].ndim for x in xs):
        raise ValueError("each array wants the same number of axes")
    ends = [0]
    for x in xs:
        ends.append(ends[-1] + x.shape[axis])

    def pullback(i):
        def back(g):
            before = (slice(None),) * axis
            return g[(*before, slice(ends[i], ends[i + 1]))]
        return back
    return xp(*xs).concatenate(xs, axis=axis), tuple(pullback(i) for i in range(len(xs)))


@op("n ... -> ...")
def split(x, counts):
    """x cut along its first axis into parts of these lengths.    dx = the gradients of the parts end to end

    x (N, ...); counts: whole numbers >= 0 with the sum N. A part of length 0 is empty. Returns a tuple of parts."""
    m = xp(x)
    ends = split_ends(x, counts)
    parts = tuple(x[start:end] for start, end in zip(ends, ends[1:]))

    def back(g):                                              # None for a part to which no gradient came
        filled = [m.zeros(part.shape, part.dtype) if d is None else d for part, d in zip(parts, g)]
        return m.concatenate(filled, axis=0)
    return parts, (back, None)


@op("... -> ...")
def cast(x, dtype):
    """y = x in another floating-point dtype.    dx = g in the dtype of x

    Of all ops only this one is asked for a dtype. dtype: float64, float32, float16 or bfloat16, or its name."""
    return precision.rounded(x, as_float_dtype(dtype)), (same, None)


# ── layers ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def _softmax(x: Array) -> Array:
    m = xp(x)
    e = m.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@op("... n -> ... n")
def softmax(x):
    """p = eˣ / Σ eˣ,  Σ along the last axis.    dx = p (g − Σ g p).    A large x does not overflow."""
    check_last_axis(x)
    p = _softmax(x)
    return p, (lambda g: p * (g - (g * p).sum(axis=-1, keepdims=True)),)


@op("... n -> ... n")
def log_softmax(x):
    """y = x − ln Σ eˣ.    dx = g − eʸ Σ g"""
    m = xp(x)
    check_last_axis(x)
    y = x - x.max(axis=-1, keepdims=True)
    y = y - m.log(m.exp(y).sum(axis=-1, keepdims=True))
    return y, (lambda g: g - m.exp(y) * g.sum(axis=-1, keepdims=True),)


@op("... c, c, c -> ... c")
def layer_norm(x, w, b, eps=1e-5):
    """y = w x̂ + b,  x̂ = (x − μ)/σ,  μ = mean x,  σ² = mean (x − μ)² + ε.    A mean is along the last axis.

    dx = (ĝ − mean ĝ − x̂ mean(ĝ x̂))/σ,  ĝ = w g;   dw = Σ g x̂;   db = Σ g,  Σ over the rows

    w and b (c,), the length of a row; else ShapeError. A row of equal numbers gives x̂ = 0 exactly: the first entry of
    each row is subtracted from it before the mean, which may be rounded."""
    check_norm(x, eps, w, b)
    centred = x - x[..., :1]
    centred = centred - centred.mean(axis=-1, keepdims=True)
    s = xp(x).sqrt((centred * centred).mean(axis=-1, keepdims=True) + eps)    # σ
    h = centred / s                                           # x̂

    def dx(g):
        gh = w * g
        return (gh - gh.mean(axis=-1, keepdims=True) - h * (gh * h).mean(axis=-1, keepdims=True)) / s
    return w * h + b, (dx, lambda g: g * h, same)


@op("... c, c -> ... c")
def rms_norm(x, w, eps=1e-6):
    """y = w x̂,  x̂ = x/σ,  σ² = mean x² + ε.    The norm of T5 and Llama.

    dx = (ĝ − x̂ mean(ĝ x̂))/σ,  ĝ = w g;   dw = Σ g x̂.    ShapeError unless w has the length of a row."""
    check_norm(x, eps, w)
    s = xp(x).sqrt((x * x).mean(axis=-1, keepdims=True) + eps)                # σ
    h = x / s                                                 # x̂

    def dx(g):
        gh = w * g
        return (gh - h * (gh * h).mean(axis=-1, keepdims=True)) / s
    return w * h, (dx, lambda g: g * h)


@op("... d, ... d, ... d -> ... d")
def rotary(x, cos, sin):
    """y = x ⊙ cos + turn(x) ⊙ sin,  turn(x₁, x₂) = (−x₂, x₁) for the two halves x₁, x₂ of the last axis.

    dx = g ⊙ cos − turn(g ⊙ sin).    Each pair (x₁ᵢ, x₂ᵢ) is rotated by one angle; Su et al. 2021, arXiv:2104.09864

    x (..., D). cos, sin: arrays that broadcast to x, of the angles, the same in both halves. They get no gradient.
    ValueError for an odd D."""
    cos, sin = rotary_factors(x, cos, sin)
    return x * cos + _turn(x) * sin, (lambda g: g * cos - _turn(g * sin), None, None)


def _turn(x: Array) -> Array:
    """(x₁, x₂) -> (−x₂, x₁), the two halves of the last axis: a quarter of a turn in the plane of each pair."""
    half = x.shape[-1] // 2
    return xp(x).concatenate([-x[..., half:], x[..., :half]], axis=-1)


def causal_mask(queries: int, keys: int, m: ModuleType = np) -> Array:
    """(queries, keys) bool: True where query i may look at key j, that is where j ≤ i + keys − queries.

    With as many keys as queries, a query may look at its own key and at earlier ones. With more, the first
    keys − queries of them come before all queries: they are from a cache or a prefix.
    m: the module that makes the array, NumPy or CuPy."""
    return m.tril(m.ones((queries, keys), dtype=bool), keys - queries)


def repeat_heads(a: Array, group: int) -> Array:
    """Every head `group` times, one copy after another: (..., Hkv, T, D) -> (..., Hkv group, T, D).

    Two heads a, b and group = 2: a, a, b, b."""
    return a if group == 1 else xp(a).repeat(a, group, axis=-3)


def sum_heads(g: Array, group: int) -> Array:
    """The sum over the `group` copies of each head: (..., Hkv group, T, D) -> (..., Hkv, T, D).

    This is the adjoint of repeat_heads: from the gradient of the copies it makes the gradient of the heads."""
    if group == 1:
        return g
    return g.reshape(*g.shape[:-3], g.shape[-3] // group, group, *g.shape[-2:]).sum(axis=-3)


@op("... t d, ... s d, ... s e, ... t s -> ... t e")
def attention(q, k, v, bias=None, *, key_mask=None, causal=False, scale=None, dropout_mask=None):
    """O = (P ⊙ M) V,  P = softmax(α Q Kᵀ + B).    α = 1/√D unless `scale` is given

    q (..., H, Tq, D), k (..., Hkv, Tk, D), v (..., Hkv, Tk, E) -> (..., H, Tq, E). Hkv divides H: each key/value head
    serves a group of H/Hkv neighbouring query heads (grouped-query attention, Ainslie et al. 2023).
    Three arrays broadcast to the scores (..., H, Tq, Tk): the bias B; key_mask, True (or 1) where a query may look at a
    key, False (or 0) elsewhere; dropout_mask M, the factors of P. causal: query i may look at keys j ≤ i + Tk − Tq, so
    cached keys and prefix keys come before all queries. A query that may look at no key gives zeros, with zero
    gradients.

        dV = (P ⊙ M)ᵀ G,   dP = G Vᵀ ⊙ M,   dB = P (dP − Σ dP P),   dQ = α dB K,   dK = α dBᵀ Q

    dK and dV are summed over a group. ShapeError for heads, lengths or widths that do not fit, and for a bias or mask
    that does not broadcast to the scores."""
    bias, key_mask, dropout_mask = attention_masks(q, bias, key_mask, dropout_mask)
    attention_shape(q, k, v, bias, key_mask, dropout_mask)
    m = xp(q)
    alpha = q.shape[-1]**-0.5 if scale is None else scale
    group = q.shape[-3] // k.shape[-3] if q.ndim > 2 and k.shape[-3] else 1
    k = repeat_heads(k, group)
    v = repeat_heads(v, group)
    s = (q @ t(k)) * alpha                                                       # (..., H, Tq, Tk)
    if bias is not None:
        s = s + bias
    visible = key_mask
    if causal:
        past = causal_mask(*s.shape[-2:], m)
        visible = past if visible is None else visible & past
    if visible is not None:
        s = m.where(visible, s, -math.inf)
    # The maximum of no keys is that of a query that may look at none.
    top = s.max(axis=-1, keepdims=True) if s.shape[-1] else m.zeros((*s.shape[:-1], 1), s.dtype)
    e = m.exp(s - m.where(top == -math.inf, 0, top))      # a query without keys: all zeros, not NaN
    p = e / m.maximum(e.sum(axis=-1, keepdims=True), 1)       # a row with a key sums to 1 or more
    pm = p if dropout_mask is None else p * dropout_mask      # P ⊙ M

    def back(g, needed):                                      # needed[3] only if the caller gave a bias
        """The gradients of q, k, v and bias from the gradient g of O = (P ⊙ M) V; None where needed[i] is False."""
        dq = dk = db = None
        dv = sum_heads(t(pm) @ g, group) if needed[2] else None
        if needed[0] or needed[1] or any(needed[3:]):
            dp = g @ t(v) if dropout_mask is None else (g @ t(v)) * dropout_mask
            ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))
            db = ds if any(needed[3:]) else None
            ds = ds * alpha
            dq = ds @ k if needed[0] else None
            dk = sum_heads(t(ds) @ q, group) if needed[1] else None
        return (dq, dk, dv, db)[:len(needed)]
    return pm @ v, back


@op("... v, ..., v ->")
def cross_entropy(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):
    """ℓ = Σₙ w_{yₙ} (−ln p_{yₙ}) / Σₙ w_{yₙ},  p = softmax z.    dz = (w_y p − q) / Σ w,  q = w_y in column y, else 0

    z (..., V): logits, N rows.  y: labels, of shape (...), or (N,) for all rows in order; integers of any dtype.
    weight (V,): the weight w of each class; None: 1.  Rows with y = ignore_index are left out of both sums, even if
    their logits are inf or NaN.  With label smoothing ε the target of a row is (1 − ε) at its label plus ε/V at every
    class, each class with its own weight.  If no row counts, the loss is NaN and its gradient 0.
    IndexError for a label outside 0 .. V − 1; ShapeError, a ValueError, for labels or weights of other shapes.
    As torch.nn.CrossEntropyLoss."""
    m = xp(z)
    shape = z.shape
    dtype = z.dtype
    labels, weight = check_cross_entropy(z, y, weight, ignore_index, label_smoothing)      # (N,), (V,)
    real = labels != ignore_index                                              # the rows that count
    check_labels(labels, real, shape[-1])
    labels = m.where(real, labels, 0)
    rows = m.where(real[:, None], flat(z), 0)                                  # (N, V)
    w = real.astype(dtype) if weight is None else weight[labels] * real        # (N,)
    shifted = rows - rows.max(axis=-1, keepdims=True)
    lse = m.log(m.exp(shifted).sum(axis=-1, keepdims=True))                    # −ln p = lse − shifted
    total = w.sum()
    n = m.arange(rows.shape[0])                                                # shifted[n, labels]: one a row
    value = (w * (lse[:, 0] - shifted[n, labels])).sum()
    if label_smoothing:
        class_weight = m.ones(rows.shape[-1], dtype) if weight is None else weight
        spread = label_smoothing / rows.shape[-1] * (real[:, None] * class_weight)      # (N, V)
        value = (1 - label_smoothing) * value + (spread * (lse - shifted)).sum()
    value = m.where(total == 0, math.nan, value)
    total = m.where(total == 0, 1, total)

    def back(g):
        """dz = g (p Σ target − target) / Σ w,  p = softmax(z).

        The target of a row is q = w (1 − ε) in its label's column, plus `spread` in every column."""
        p = m.exp(shifted - lse)
        q = w * (1 - label_smoothing)
        if label_smoothing:
            d = p * (q[:, None] + spread.sum(axis=-1, keepdims=True)) - spread
        else:
            d = p * q[:, None]
        d[n, labels] -= q
        return (d * (g / total)).reshape(shape)
    return (value / total).astype(dtype), (back, None, None)


@op("... -> ...")
def dropout(x, p, key):
    """y = x keep / (1 − p),  keep ~ Bernoulli(1 − p).    dx = g keep / (1 − p)

    The mask is determined by `key` alone, and the same on every backend. ShapeError unless 0 <= p < 1."""
    p = checks.number("p", p, 0, below=1)
    key = key if array.is_array(key) else checks.whole("key", key, 0)           # an array while a step is captured
    keep = (array.uniform_like(x, key) >= p).astype(x.dtype) / (1 - p)
    return x * keep, (lambda g: g * keep, None, None)


# ── operators ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _reflected(f):
    """The op f with its operands exchanged, for an array or a number on the left of a tensor."""
    def operator(b, a):
        return f(a, b)
    return operator


def _axes(args: tuple) -> tuple:
    """The arguments of x.reshape(2, 3), or of x.reshape((2, 3)), as one tuple."""
    return args if len(args) != 1 or isinstance(args[0], int) else args[0]


def _reshape(x, *shape):
    """x in another shape: x.reshape(2, 3) or x.reshape((2, 3)).    dx = g, reshaped back"""
    return reshape(x, _axes(shape))


def _permute(x, *axes):
    """The axes of x in another order: x.permute(1, 0) or x.permute((1, 0)).    dx = g with the order undone"""
    return permute(x, _axes(axes))


Tensor.__add__ = add
Tensor.__radd__ = add
Tensor.__mul__ = mul
Tensor.__rmul__ = mul
Tensor.__sub__ = sub
Tensor.__rsub__ = _reflected(sub)
Tensor.__truediv__ = div
Tensor.__rtruediv__ = _reflected(div)
Tensor.__matmul__ = matmul
Tensor.__rmatmul__ = _reflected(matmul)
Tensor.__neg__ = neg
Tensor.__pow__ = power
Tensor.__rpow__ = _reflected(power)
Tensor.__abs__ = absolute
Tensor.__getitem__ = getitem
Tensor.__array_ufunc__ = None                                # NumPy leaves array + tensor to the tensor
Tensor.sum = sum
Tensor.mean = mean
Tensor.amax = amax
Tensor.exp = exp
Tensor.log = log
Tensor.sqrt = sqrt
Tensor.tanh = tanh
Tensor.T = property(transpose)
Tensor.transpose = transpose
Tensor.reshape = _reshape
Tensor.permute = _permute

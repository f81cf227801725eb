"""Every op against plain NumPy (value), central differences (gradient), its own shape string, and its dtype.

CASES holds, for each op, functions that draw inputs and the expected value.  Every op must pass `check_value`,
`check_gradient` and `check_dtype`; the wrong ops of tests/wrong.py must fail one of them.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from helpers import dev, gradcheck, host, leaf, seeds, shapes_of, wrong_answers
from hypothesis import given
from hypothesis import strategies as st

from tinyft import array, nn, ops, tensor
from tinyft import functional as F
from tinyft.array import bfloat16
from tinyft.precision import HALVES, LOSSES
from tinyft.precision import autocast as ft_autocast
from tinyft.tensor import OPS, ShapeError, Tensor

pytestmark = pytest.mark.usefixtures("definitions")
# _packed_linear takes a module: test_nn.py tests it.  project and split give several values, and cast gives another
# dtype: they have their own tests below.  The examples of split and cast are for test_wrong.py.
OWN_TESTS = {"split", "cast"}
EVERY_OP = sorted(set(OPS) - {"_packed_linear", "project"} - OWN_TESTS)


@dataclass
class Example:
    """One call of an op.

    inputs      float64 arrays
    call        call(f, *tensors) -> Tensor
    expected    expected(*arrays) -> the value in plain NumPy
    """
    inputs: list[np.ndarray]
    call: Callable[..., Tensor]
    expected: Callable[..., Any]


CASES: dict[str, list[Callable[..., Example]]] = {}


def plain(f, *tensors):
    return f(*tensors)


def case(name: str) -> Callable:
    """Decorator: register make(rng, shapes of the inputs) -> Example for an op or a function of functional.py."""
    def register(make: Callable[..., Example]) -> Callable[..., Example]:
        CASES.setdefault(name, []).append(make)
        return make
    return register


# ── distributions of the inputs ──────────────────────────────────────────────────────────────────────────────────────
def normal(rng, shape):
    return np.asarray(rng.standard_normal(shape))


def positive(rng, shape):
    return np.asarray(rng.uniform(0.4, 2.5, shape))


def off_zero(rng, shape):
    return positive(rng, shape) * rng.choice([-1.0, 1.0], shape)


def apart(rng, shape, shift=0.0):
    """Numbers at least 0.2 from each other, and from the numbers of another shift (0 or 1/2)."""
    n = math.prod(shape)
    whole = (rng.permutation(n) - n // 2 + shift).reshape(shape)
    return (whole * 0.9 + rng.uniform(-0.1, 0.1, shape)).astype(float)


def an_axis(rng, ndim):
    """None, one axis counted from either end, or several axes."""
    kind = rng.integers(4) if ndim else 0
    if kind == 0:
        return None
    if kind == 3:
        axes = rng.permutation(ndim)[:rng.integers(1, ndim + 1)]
        return tuple(int(a) - ndim * int(rng.integers(2)) for a in axes)
    return int(rng.integers(ndim)) - ndim * (kind == 2)


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────
def elementwise(name, draw, expected):
    """Register an op whose inputs are all drawn by draw(rng, shape)."""
    CASES[name] = [lambda rng, shapes: Example([draw(rng, s) for s in shapes], plain, expected)]


def phi(x):
    """Φ(x), the normal distribution function."""
    return np.vectorize(lambda v: 0.5 * math.erfc(-v / math.sqrt(2)), otypes=[float])(x)


elementwise("add", normal, lambda a, b: np.add(a, b))
elementwise("sub", normal, lambda a, b: np.subtract(a, b))
elementwise("mul", normal, lambda a, b: np.multiply(a, b))
elementwise("div", off_zero, lambda a, b: np.divide(a, b))
elementwise("neg", normal, lambda x: 0 - x)
elementwise("exp", normal, np.exp)
elementwise("log", positive, np.log)
elementwise("sqrt", positive, np.sqrt)
elementwise("tanh", normal, lambda x: (np.exp(x) - np.exp(-x)) / (np.exp(x) + np.exp(-x)))
elementwise("sigmoid", normal, lambda x: 1 / (1 + np.exp(-x)))
elementwise("absolute", off_zero, np.abs)
elementwise("relu", off_zero, lambda x: np.where(x > 0, x, 0))
elementwise("silu", normal, lambda x: x / (1 + np.exp(-x)))
elementwise("gelu", normal, lambda x: x * phi(x))
elementwise("gelu_tanh", normal, lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
elementwise("matmul", normal, lambda a, b: np.einsum("...nk,...km->...nm", a, b))
elementwise("transpose", normal, lambda x: np.moveaxis(x, -1, -2))


@case("power")
def _(rng, shapes):
    p = float(rng.choice([2.0, 3.0, 0.5, -1.0, 1.7]))
    x = positive(rng, np.broadcast_shapes(*shapes))
    return Example([x], lambda f, x: f(x, p), lambda x: np.exp(p * np.log(x)))


@case("power")
def _(rng, shapes):
    inputs = [positive(rng, shapes[0]), off_zero(rng, shapes[1])]
    return Example(inputs, plain, lambda x, p: np.exp(p * np.log(x)))


@case("power")
def _(rng, shapes):
    base = float(rng.choice([2.0, 0.5]))
    p = normal(rng, np.broadcast_shapes(*shapes))
    return Example([p], lambda f, p: f(base, p), lambda p: np.exp(p * np.log(base)))


@case("linear")
def _(rng, shapes):
    def expected(x, W, b):
        return np.einsum("...k,nk->...n", x, W) + b
    return Example([normal(rng, s) for s in shapes], plain, expected)


@case("linear")
def _(rng, shapes):
    def expected(x, W):
        return np.einsum("...k,nk->...n", x, W)
    return Example([normal(rng, s) for s in shapes[:2]], plain, expected)


def reduction(name, draw, expected):
    """Register an op with the arguments axis and keepdims."""
    def make(rng, shapes):
        x = draw(rng, (2, *shapes[0]) if rng.integers(2) else shapes[0])
        kw = dict(axis=an_axis(rng, x.ndim), keepdims=bool(rng.integers(2)))
        return Example([x], lambda f, x: f(x, **kw), lambda x: expected(x, **kw))
    CASES[name] = [make]


def mean(x, axis, keepdims):
    total = np.sum(x, axis=axis, keepdims=keepdims)
    return total * (total.size / x.size)


def maximum_of(x, axis, keepdims):
    return -np.min(-x, axis=axis, keepdims=keepdims)


reduction("sum", normal, np.sum)
reduction("mean", normal, mean)
reduction("amax", apart, maximum_of)


@case("cumsum")
def _(rng, shapes):
    x = normal(rng, shapes[0])
    axis = int(rng.integers(-x.ndim, x.ndim))
    return Example([x], lambda f, x: f(x, axis=axis), lambda x: np.cumsum(x, axis=axis))


@case("cumsum")
def _(rng, shapes):
    def expected(x):
        return np.stack([x[..., :i + 1].sum(-1) for i in range(x.shape[-1])], -1)
    return Example([normal(rng, shapes[0])], plain, expected)


@case("where")
def _(rng, shapes):
    c = np.asarray(rng.random(shapes[0]) < 0.5)

    def expected(a, b):
        return c * a + (1 - c) * b
    return Example([normal(rng, s) for s in shapes[1:]], lambda f, a, b: f(dev(c), a, b), expected)


@case("maximum")
def _(rng, shapes):
    inputs = [apart(rng, shapes[0]), apart(rng, shapes[1], 0.5)]
    return Example(inputs, plain, lambda a, b: (a + b + abs(a - b)) / 2)


@case("clip")
def _(rng, shapes):
    shape = np.broadcast_shapes(*shapes)
    x = np.asarray(rng.choice([-2.0, -0.8, 0.1, 0.9, 2.0], shape) + rng.uniform(-0.05, 0.05, shape))
    low, high = [(-0.5, 0.5), (0.5, 1.5), (-1.5, 1.5)][rng.integers(3)]

    def expected(x):
        return np.where(x < low, low, np.where(x > high, high, x))
    return Example([x], lambda f, x: f(x, low, high), expected)


@case("clip")
def _(rng, shapes):
    """Bounds that are tensors, in some entries the lower one above the upper one."""
    inputs = [apart(rng, shapes[0]), apart(rng, shapes[1], 0.35), apart(rng, shapes[2], 0.7)]
    return Example(inputs, plain, lambda x, low, high: np.minimum(np.maximum(x, low), high))


@case("straight_through")
def _(rng, shapes):
    return Example([normal(rng, shapes[1])], lambda f, x: f(x.detach(), x), lambda x: x)


@case("gather")
def _(rng, shapes):
    (*lead, n), (*_, k) = shapes
    i = np.asarray(rng.integers(0, n, (*lead, k)))
    return Example([normal(rng, shapes[0])], lambda f, x: f(x, dev(i)), lambda x: np.take_along_axis(x, i, -1))


@case("gather")
def _(rng, shapes):
    x = normal(rng, (3, *shapes[0]))
    i = np.asarray(rng.integers(0, 3, (5, *shapes[0])))
    return Example([x], lambda f, x: f(x, dev(i), axis=0), lambda x: np.take_along_axis(x, i, 0))


@case("embedding")
def _(rng, shapes):
    ids = np.asarray(rng.integers(0, shapes[0][0], shapes[1]))
    return Example([normal(rng, shapes[0])], lambda f, W: f(W, dev(ids)), lambda W: np.take(W, ids, axis=0))


@case("getitem")
def _(rng, shapes):
    x = normal(rng, (3, 4, *shapes[0]))
    i = rng.integers(-3, 3, 5)
    j = rng.integers(0, 4, (2, 5))
    indices = [
        1, -1, slice(1, None), slice(None, None, -1), (slice(None), slice(0, 3, 2)), (Ellipsis, None), None, (2, 0),
        (slice(1, 1),), i, (i, j), (slice(None), j), (1, j), (Ellipsis, slice(0, 1)),
    ]
    index = indices[rng.integers(len(indices))]

    def on_device(part):
        return dev(part) if isinstance(part, np.ndarray) else part

    device_index = tuple(map(on_device, index)) if isinstance(index, tuple) else on_device(index)
    return Example([x], lambda f, x: f(x, device_index), lambda x: x[index])


@case("reshape")
def _(rng, shapes):
    x = normal(rng, shapes[0])
    shape = [(-1,), (x.size, 1), (1, -1), x.shape[::-1]][rng.integers(4)]
    return Example([x], lambda f, x: f(x, shape), lambda x: np.ravel(x).reshape(shape))


@case("permute")
def _(rng, shapes):
    # A wrong order keeps the shape only among equal sizes: (2, 2, 2) shows it in the values.
    x = normal(rng, (2, *shapes[0], 3) if rng.integers(2) else (2, 2, 2))
    axes = tuple(int(a) - x.ndim * int(rng.integers(2)) for a in rng.permutation(x.ndim))
    return Example([x], lambda f, x: f(x, axes), lambda x: np.moveaxis(x, axes, range(x.ndim)))


@case("broadcast_to")
def _(rng, shapes):
    x = normal(rng, shapes[0])
    leading = rng.integers(1, 4, rng.integers(3)).tolist()
    repeated = [n if n != 1 else int(rng.integers(1, 4)) for n in x.shape]
    shape = (*leading, *repeated)
    return Example([x], lambda f, x: f(x, shape), lambda x: x + np.zeros(shape))


@case("concatenate")
def _(rng, shapes):
    shape = list(shapes[0]) or [2]
    axis = int(rng.integers(-len(shape), len(shape)))
    xs = []
    for n in rng.integers(1, 4, rng.integers(1, 4)):
        shape[axis] = int(n)
        xs.append(normal(rng, shape))

    def expected(*xs):
        rows = [row for x in xs for row in np.moveaxis(x, axis, 0)]
        return np.moveaxis(np.array(rows), 0, axis)
    return Example(xs, lambda f, *xs: f(*xs, axis=axis), expected)


def softmax(x):
    e = np.exp(x)
    return e / np.sum(e, -1)[..., None]


elementwise("softmax", normal, softmax)
elementwise("log_softmax", normal, lambda x: np.log(softmax(x)))


@case("layer_norm")
def _(rng, shapes):
    eps = float(rng.choice([1e-5, 0.3]))

    def expected(x, w, b):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(x.var(-1, keepdims=True) + eps) * w + b
    return Example([normal(rng, s) * 2 + 1 for s in shapes], lambda f, x, w, b: f(x, w, b, eps=eps), expected)


@case("rms_norm")
def _(rng, shapes):
    eps = float(rng.choice([1e-6, 0.3]))

    def expected(x, w):
        mean_square = np.square(x).sum(-1, keepdims=True) / x.shape[-1]
        return w * x * (mean_square + eps)**-0.5
    return Example([normal(rng, s) * 2 + 1 for s in shapes], lambda f, x, w: f(x, w, eps=eps), expected)


@case("swiglu")
def _(rng, shapes):
    shape = np.broadcast_shapes(*shapes)
    return Example([normal(rng, shape), normal(rng, shape)], plain, lambda a, b: a / (1 + np.exp(-a)) * b)


@case("rotary")
def _(rng, shapes):
    """One angle for each pair (i, i + D/2) and position; the expected rotation is a product of complex numbers."""
    *lead, d = shapes[0]
    half = d // 2 + 1
    x = normal(rng, (*lead, 2 * half))
    angles = rng.uniform(-3, 3, (*lead[-1:], half))
    both = np.concatenate([angles, angles], axis=-1)

    def expected(x):
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], axis=-1)
    return Example([x], lambda f, x: f(x, dev(np.cos(both), x.dtype), dev(np.sin(both), x.dtype)), expected)


def attend(q, k, v, bias=None, key_mask=None, causal=False, scale=None, dropout_mask=None):
    """Attention one query at a time: softmax over the keys that the query may attend to, and no other keys."""
    *lead, t, d = q.shape
    s = k.shape[-2]
    group = q.shape[-3] // k.shape[-3] if lead else 1
    scale = 1 / math.sqrt(d) if scale is None else scale
    shape = (*lead, t, s)                                # of the scores
    bias = np.broadcast_to(0.0 if bias is None else bias, shape)
    key_mask = np.broadcast_to(True if key_mask is None else key_mask, shape)
    factors = np.broadcast_to(1.0 if dropout_mask is None else dropout_mask, shape)
    out = np.zeros((*lead, t, v.shape[-1]))
    for query in np.ndindex(*lead, t):
        *row, i = query
        head = (*row[:-1], row[-1] // group) if lead else ()                     # key/value head of this query head
        weights = {}
        for j in range(s):
            if key_mask[(*query, j)] and (not causal or j <= i + s - t):
                score = scale * float(np.dot(q[query], k[(*head, j)])) + bias[(*query, j)]
                weights[j] = math.exp(score)
        for j, w in weights.items():
            out[query] += w / sum(weights.values()) * factors[(*query, j)] * v[(*head, j)]
    return out


def a_key_mask(rng, lead, t, s):
    """One of: no mask; a mask of the keys of each row; a mask of all pairs; a prefix of the keys."""
    kind = rng.integers(4)
    if kind == 0:
        return None
    if kind == 3:
        return np.arange(s) < rng.integers(1, s + 1)
    return rng.random((*lead, t, s) if kind == 2 else (*lead, 1, s)) < 0.6


def an_attention(rng, shapes, with_bias):
    """An Example of attention with all kinds of masks; the heads may share key/value heads."""
    q, k, v = (normal(rng, s) for s in shapes[:3])
    *lead, t, _ = q.shape
    s = k.shape[-2]
    if lead:
        kv_heads = int(rng.choice([n for n in range(1, lead[-1] + 1) if lead[-1] % n == 0]))
        k, v = (a[..., :kv_heads, :, :] for a in (k, v))
    kw: dict[str, Any] = dict(causal=bool(rng.integers(2)), scale=None if rng.integers(2) else 0.7)
    key_mask = a_key_mask(rng, lead, t, s)
    if key_mask is not None:
        kw["key_mask"] = np.asarray(key_mask)
    if rng.integers(2):
        kw["dropout_mask"] = np.asarray((rng.random((*lead, t, s)) < 0.7) / 0.7)
    inputs = [q, k, v]
    if with_bias:
        shape = tuple(n if rng.random() < 0.6 else 1 for n in (*lead, t, s))
        inputs.append(normal(rng, shape[rng.integers(len(lead) + 1):]))

    def call(f, *tensors):
        on_device = dict(kw)
        if "key_mask" in kw:
            on_device["key_mask"] = dev(kw["key_mask"])
        if "dropout_mask" in kw:
            on_device["dropout_mask"] = dev(kw["dropout_mask"], tensors[0].dtype)
        return f(*tensors, **on_device)
    return Example(inputs, call, lambda *arrays: attend(*arrays, **kw))


@case("attention")
def _(rng, shapes):
    return an_attention(rng, shapes, with_bias=False)


@case("attention")
def _(rng, shapes):
    return an_attention(rng, shapes, with_bias=True)


def loss(z, y, weight=None, ignore_index=-100, eps=0.0):
    """−Σ w ln p / Σ w, row by row. With label smoothing the target is 1 − ε of the label and ε/V of every class."""
    V = z.shape[-1]
    total = 0.0
    total_weight = 0.0
    w = np.ones(V) if weight is None else weight
    for row, label in zip(z.reshape(-1, V), y.reshape(-1)):
        if label != ignore_index:
            log_p = [v - math.log(sum(map(math.exp, row))) for v in row]
            total -= (1 - eps) * w[label] * log_p[label] + eps / V * sum(w[c] * log_p[c] for c in range(V))
            total_weight += w[label]
    return np.array(total / total_weight)


@case("cross_entropy")
def _(rng, shapes):
    z = normal(rng, shapes[0])
    ignore = int(rng.choice([-100, 0]))
    y = np.asarray(rng.integers(0, z.shape[-1], z.shape[:-1]))
    y = np.asarray(np.where(rng.random(y.shape) < 0.3, ignore, y))
    if (y == ignore).all():                              # a batch without labels has no loss
        ignore = -100
        y = np.zeros_like(y)
    weight = positive(rng, shapes[2]) if rng.integers(2) else None
    eps = float(rng.choice([0.0, 0.1]))

    def call(f, z):
        return f(z, dev(y), None if weight is None else dev(weight, z.dtype), ignore_index=ignore, label_smoothing=eps)
    return Example([z], call, lambda z: loss(z, y, weight, ignore, eps))


@case("dropout")
def _(rng, shapes):
    p = float(rng.choice([0.1, 0.5, 0.0]))
    key = int(rng.integers(2**63))
    drawn = host(array.uniform_like(dev(np.zeros(shapes[0])), key))

    def expected(x):
        return np.where(drawn < p, 0, x / (1 - p))
    return Example([off_zero(rng, shapes[0])], lambda f, x: f(x, p, key), expected)


# ── functional.py: the same table, the same checks ───────────────────────────────────────────────────────────────────
COMPOSED = {
    "softmax_attention": "... t d, ... s d, ... s d -> ... t d",
    "mse_loss": "... n, ... n ->",
    "kl_divergence": "... v, ... v ->",
    "soft_cross_entropy": "... v, ... v ->",
    "normalize": "... n -> ... n",
    "topk": "... n -> ... n",
    "stack": "... n -> ... n",
}


@case("softmax_attention")
def _(rng, shapes):
    q, k, v = (normal(rng, s) for s in shapes)
    t, s = q.shape[-2], k.shape[-2]
    causal = bool(rng.integers(2)) and t <= s
    key_mask = None
    if not rng.integers(2):                              # every query may attend to key 0
        key_mask = np.asarray((rng.random((t, s)) < 0.6) | (np.arange(s) == 0))

    def call(f, q, k, v):
        return f(q, k, v, None if key_mask is None else dev(key_mask), causal)

    def expected(q, k, v):
        lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
        q, k, v = (np.broadcast_to(a, lead + a.shape[-2:]) for a in (q, k, v))
        return attend(q, k, v, key_mask=key_mask, causal=causal)
    return Example([q, k, v], call, expected)


@case("mse_loss")
def _(rng, shapes):
    def expected(a, b):
        return np.array(np.linalg.norm((a - b).ravel())**2 / a.size)
    return Example([normal(rng, shapes[0]), normal(rng, shapes[0])], plain, expected)


@case("kl_divergence")
def _(rng, shapes):
    T = float(rng.choice([1.0, 2.0]))

    def expected(a, b):
        p = softmax(a / T)
        q = softmax(b / T)
        return np.array(T * T * np.mean(np.sum(p * np.log(p / q), -1)))
    return Example([normal(rng, shapes[0]), normal(rng, shapes[0])], lambda f, a, b: f(a, b, T), expected)


@case("soft_cross_entropy")
def _(rng, shapes):
    def expected(z, target):
        return np.array(-np.mean(np.sum(target * np.log(softmax(z)), -1)))
    return Example([normal(rng, shapes[0]), softmax(normal(rng, shapes[0]))], plain, expected)


@case("normalize")
def _(rng, shapes):
    x = off_zero(rng, (2, *shapes[0]))
    axis = int(rng.integers(-x.ndim, x.ndim))
    return Example([x], lambda f, x: f(x, axis=axis), lambda x: x / np.linalg.norm(x, axis=axis, keepdims=True))


@case("topk")
def _(rng, shapes):
    x = apart(rng, shapes[0])
    k = int(rng.integers(1, x.shape[-1] + 1))
    return Example([x], lambda f, x: f(x, k)[0], lambda x: np.sort(x, -1)[..., ::-1][..., :k])


@case("stack")
def _(rng, shapes):
    n = int(rng.integers(1, 4))
    ndim = len(shapes[0])
    axis = int(rng.integers(-ndim - 1, ndim + 1))
    xs = [normal(rng, shapes[0]) for _ in range(n)]
    return Example(xs, lambda f, *xs: f(list(xs), axis=axis), lambda *xs: np.stack(xs, axis))


@case("split")
def _(rng, shapes):
    """Three parts, each with a factor; one of them may not be used."""
    x = normal(rng, shapes[0])
    counts = rng.multinomial(len(x), [1 / 3] * 3).tolist()
    factors = rng.uniform(1, 2, 3)
    used = [0, 1, 2]
    if max(counts) < len(x) and rng.random() < 0.7:
        used.pop(rng.integers(3))                        # the others are not empty, both together

    def call(f, x):
        parts = f(x, counts)
        return ops.concatenate(*(parts[i] * float(factors[i]) for i in used))

    def expected(x):
        parts = np.split(x, np.cumsum(counts)[:-1])
        return np.concatenate([parts[i] * factors[i] for i in used])
    return Example([x], call, expected)


@case("cast")
def _(rng, shapes):
    """To float64 and back."""
    def call(f, x):
        wide = f(x, "float64")
        assert wide.dtype == np.float64
        return f(wide, x.dtype)
    return Example([normal(rng, shapes[0])], call, lambda x: x)


# ── the checks ───────────────────────────────────────────────────────────────────────────────────────────────────────
def check_value(f, e: Example) -> None:
    """Value and shape equal those of plain NumPy."""
    got = host(e.call(f, *map(Tensor, map(dev, e.inputs))))
    expected = np.asarray(e.expected(*e.inputs))
    assert got.shape == expected.shape, f"shape {got.shape}, not {expected.shape}"
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-12)


def check_gradient(f, e: Example, rng) -> None:
    """The gradients equal central differences."""
    gradcheck(lambda *ts: e.call(f, *ts), e.inputs, rng)


def check_dtype(f, e: Example, dtype) -> None:
    """The value has the dtype of the inputs, the gradients have its grad_dtype, and float32 values are right."""
    leaves = [leaf(a, dtype) for a in e.inputs]
    y = e.call(f, *leaves)
    is_16_bit_loss = f.__name__ in LOSSES and np.dtype(dtype) in HALVES
    assert y.dtype == (np.float32 if is_16_bit_loss else dtype), f"{dtype} in, {y.dtype} out"
    y.backward(dev(np.ones(y.shape), y.dtype))
    grad_dtype = np.promote_types(dtype, np.float32)
    for t in leaves:
        assert t.grad is None or t.grad.dtype == grad_dtype, f"{dtype} in, {t.grad.dtype} back"
    if dtype == np.float32:
        np.testing.assert_allclose(host(y), e.expected(*e.inputs), rtol=1e-3, atol=1e-4)


def function(name):
    """The op, or the function of functional.py, of this name."""
    return OPS[name] if name in OPS else getattr(F, name)


def shape_string(name):
    return OPS[name].shapes if name in OPS else COMPOSED[name]


# Ops whose inputs have the same leading sizes "...": they do not broadcast.
SAME_LEADING_SIZES = {"attention", "cross_entropy", "gather", "mse_loss", "kl_divergence", "soft_cross_entropy"}


def examples(name: str) -> st.SearchStrategy:
    """Draws (Example, the generator that drew it, output shape) for one op."""
    def build(make, shapes, rng):
        inputs, output = shapes
        return make(rng, inputs), rng, output

    shapes = shapes_of(shape_string(name), broadcast=name not in SAME_LEADING_SIZES)
    return st.builds(build, st.sampled_from(CASES[name]), shapes, seeds())


def check(f, name: str, e: Example, rng: np.random.Generator) -> None:
    """All checks of an op at once, for test_wrong.py."""
    check_value(f, e)
    check_gradient(f, e, rng)
    check_dtype(f, e, np.float32)


ALL = [*EVERY_OP, *COMPOSED]


def test_the_table_is_complete():
    assert set(CASES) == set(EVERY_OP) | set(COMPOSED) | OWN_TESTS
    assert set(F.__all__) == set(COMPOSED)


@pytest.mark.parametrize("name", ALL)
@given(st.data())
def test_value(name, data):
    e, _, _ = data.draw(examples(name))
    check_value(function(name), e)


@pytest.mark.parametrize("name", ALL)
@given(st.data())
def test_gradient(name, data):
    e, rng, _ = data.draw(examples(name))
    check_gradient(function(name), e, rng)


@pytest.mark.parametrize("name", ALL)
@given(st.data())
def test_a_dtype_is_kept(name, data):
    e, _, _ = data.draw(examples(name))
    for dtype in (np.float32, np.float16, bfloat16):
        check_dtype(function(name), e, dtype)


# Ops whose output shape also depends on arguments, so that the shape string alone does not give it.
SHAPED_BY_ARGUMENTS = {
    "sum", "mean", "amax", "reshape", "permute", "broadcast_to", "concatenate", "getitem", "gather", "straight_through",
    "rotary",                                            # its rows have an even length
}


@pytest.mark.parametrize("name", [n for n in EVERY_OP if n not in SHAPED_BY_ARGUMENTS])
@given(st.data())
def test_the_output_has_the_shape_of_the_shape_string(name, data):
    e, _, shape = data.draw(examples(name))
    y = e.call(function(name), *map(Tensor, map(dev, e.inputs)))
    assert y.shape == shape


def test_every_op_has_a_shape_string_and_a_docstring():
    for name, f in OPS.items():
        assert "->" in f.shapes and f.__doc__, name


def test_the_error_names_the_sizes_that_clash():
    message = r"matmul wants '\.\.\. n k, \.\.\. k m -> \.\.\. n m'; got \(2, 3\), \(4, 5\); k is 3 and 4"
    with pytest.raises(ShapeError, match=message):
        leaf(np.ones((2, 3))) @ leaf(np.ones((4, 5)))
    with pytest.raises(ShapeError, match=r"linear wants .* k is 3 and 4"):
        ops.linear(leaf(np.ones((2, 3))), leaf(np.ones((5, 4))))
    with pytest.raises(ShapeError, match=r"add wants .* got \(2,\), \(3,\)"):
        leaf(np.ones(2)) + leaf(np.ones(3))
    with pytest.raises(ShapeError, match=r"attention wants .* d is 2 and 3"):
        ops.attention(leaf(np.ones((4, 2))), leaf(np.ones((4, 3))), leaf(np.ones((4, 3))))
    if array.backend() != "cupy":                        # CuPy wraps indices around without an error
        with pytest.raises(IndexError, match="embedding"):
            ops.embedding(leaf(np.ones((2, 3))), dev([2]))
    with pytest.raises(TypeError, match="add"):
        leaf(np.ones(2)) + "two"


# ── scalars, integers, operators ─────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_python_numbers_do_not_widen(dtype):
    x = leaf([1.0, 2.0], dtype)
    results = [
        x + 2.0, 2.0 + x, x - 1, 1 - x, x * 3.0, 3 * x, x / 2.0, 2.0 / x, x**2.0, -x, x * 0.1 + 1.0,
        ops.maximum(x, 1.5), ops.clip(x, 0.5, 1.5), ops.where(dev([True, False]), x, 0.0),
    ]
    for y in results:
        assert y.dtype == dtype
        y.sum().backward()
    assert x.grad.dtype == np.float32


def test_operators_and_methods():
    a = np.array([[1.0, 2.0], [3.0, 4.0]])
    b = np.array([[5.0, -6.0], [7.0, 8.0]])
    x = Tensor(dev(a))
    y = Tensor(dev(b))
    cases = [
        (x + y, a + b), (x - y, a - b), (x * y, a * b), (x / y, a / b), (x @ y, a @ b),
        (-x, -a), (x**2, a * a), (abs(y), abs(b)), (2 - x, 2 - a), (2 / x, 2 / a),
        (dev(a) + y, a + b), (dev(a) - y, a - b), (dev(a) / y, a / b), (dev(a) @ y, a @ b),
        (x.T, a.T), (x.transpose(), a.T), (x.permute(1, 0), a.T), (x.permute((1, 0)), a.T),
        (x[0].permute(0), a[0]), (x[0, 0].reshape(), a[0, 0]),
        (x.reshape(4), a.ravel()), (x.reshape(1, 4), a.reshape(1, 4)), (x.reshape((4, 1)), a.reshape(4, 1)),
        (x[1, 0], a[1, 0]), (x.sum(axis=0), a.sum(0)), (x.mean(), a.mean()), (x.amax(axis=1), a.max(1)),
        (x.exp(), np.exp(a)), (x.log(), np.log(a)), (x.sqrt(), np.sqrt(a)), (x.tanh(), np.tanh(a)),
    ]
    for got, expected in cases:
        assert isinstance(got, Tensor)
        np.testing.assert_allclose(host(got), expected, rtol=1e-12)


def test_integers_get_no_gradient():
    i = Tensor(dev([1, 2]))
    x = leaf([1.0, 2.0])
    assert not i.requires_grad
    assert not (i + i).requires_grad
    (x * i).sum().backward()
    assert i.grad is None
    assert host(x.grad).tolist() == [1, 2]
    ids = Tensor(dev([0, 1]))
    y = ops.embedding(leaf(np.ones((2, 3))), ids)
    y.sum().backward()
    assert ids.grad is None
    with pytest.raises(TypeError, match="floating-point.*int64"):
        i.train(True)


def test_a_number_has_no_pullback():
    x = leaf([1.0, 2.0])
    for y in (x**2, ops.clip(x, 0, 1), ops.dropout(x, 0.5, 1), x.reshape(2, 1), x[0]):
        assert len(y.record.pulls) == 1


# ── values ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_erf():
    special = [0.0, -0.0, 2.0, -2.0, 1e-300, 1e-8, 30.0, -30.0, 1e6, np.inf, -np.inf]
    x = np.concatenate([np.linspace(-6, 6, 4001), special])
    expected = np.array([math.erf(v) for v in x])
    assert np.abs(host(ops.erf(dev(x))) - expected).max() < 1e-13
    single = host(ops.erf(dev(x, np.float32)))
    expected = [math.erf(v) for v in x.astype(np.float32)]
    assert single.dtype == np.float32
    assert np.abs(single - expected).max() < 1e-7
    assert host(ops.erf(dev(x, np.float16))).dtype == np.float16


@pytest.mark.parametrize("name, f", [
    ("sigmoid", lambda v: 1 / (1 + math.exp(-v)) if v > -700 else 0.0),
    ("silu", lambda v: v / (1 + math.exp(-v)) if v > -700 else 0.0),
    ("gelu", lambda v: v * 0.5 * math.erfc(-v / 2**0.5)),
    ("gelu_tanh", lambda v: v * (v > 0)),
    ("tanh", math.tanh),
])
def test_large_inputs_do_not_overflow(name, f):
    x = np.array([-1e4, -1000.0, -50.0, 50.0, 1000.0, 1e4])
    t = leaf(x)
    y = OPS[name](t)
    y.backward(dev(np.ones(6)))
    np.testing.assert_allclose(host(y), [f(v) for v in x], atol=1e-9)
    assert np.isfinite(host(t.grad)).all()


@given(st.data())
def test_softmax_rows_sum_to_one_and_a_shift_changes_nothing(data):
    (shape,), _ = data.draw(shapes_of("... n -> ... n"))
    rng = data.draw(seeds())
    x = normal(rng, shape) * 10
    shift = 1e3 * normal(rng, (*shape[:-1], 1))
    p, q = (host(ops.softmax(Tensor(dev(a)))) for a in (x, x + shift))
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-12)
    np.testing.assert_allclose(p, q, rtol=1e-9, atol=1e-12)
    lp, lq = (host(ops.log_softmax(Tensor(dev(a)))) for a in (x, x + shift))
    np.testing.assert_allclose(np.exp(lp).sum(-1), 1, rtol=1e-12)
    np.testing.assert_allclose(lp, lq, rtol=1e-9, atol=1e-9)


def test_the_largest_logits_do_not_overflow():
    big = leaf(np.array([[1e4, 0.0, -1e4], [700.0, 800.0, 900.0]]), np.float32)
    results = [
        ops.softmax(big), ops.log_softmax(big), ops.cross_entropy(big, dev([0, 2])), ops.attention(big, big, big),
    ]
    for y in results:
        y.backward(dev(np.ones(y.shape), np.float32))
        assert np.isfinite(host(y)).all()
        assert np.isfinite(host(big.grad)).all()


def test_layer_norm_makes_mean_zero_and_deviation_one():
    x = Tensor(dev(np.random.default_rng(3).normal(5, 3, (4, 50))))
    w = Tensor(dev(np.ones(50)))
    b = Tensor(dev(np.zeros(50)))
    y = host(ops.layer_norm(x, w, b, eps=0.0))
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-12)
    np.testing.assert_allclose(y.std(-1), 1, rtol=1e-12)
    scaled_and_shifted = host(ops.layer_norm(x * 7 + 3, w, b, eps=0.0))
    np.testing.assert_allclose(scaled_and_shifted, y, atol=1e-10)


def test_the_default_eps_is_pytorchs_and_llamas():
    tiny = Tensor(dev(np.array([[1e-3, -1e-3]])))        # mean square 1e-6
    w = Tensor(dev(np.ones(2)))
    b = Tensor(dev(np.zeros(2)))
    assert host(ops.layer_norm(tiny, w, b))[0, 0] == pytest.approx(1e-3 / math.sqrt(1e-6 + 1e-5), rel=1e-9)
    assert host(ops.rms_norm(tiny, w))[0, 0] == pytest.approx(1e-3 / math.sqrt(1e-6 + 1e-6), rel=1e-9)


# ── cross-entropy ────────────────────────────────────────────────────────────────────────────────────────────────────
def test_cross_entropy_by_hand():
    z = leaf(np.log([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]]))
    y = dev([0, 2, -100])
    w = dev(np.array([1.0, 5.0, 3.0]))
    mean = -(math.log(0.5) + math.log(0.7)) / 2
    assert ops.cross_entropy(z, y).item() == pytest.approx(mean)
    assert ops.cross_entropy(z, y, w).item() == pytest.approx(-(1 * math.log(0.5) + 3 * math.log(0.7)) / 4)
    smooth = -0.9 * math.log(0.5) - 0.1 / 3 * (math.log(0.5) + 2 * math.log(0.25))
    assert ops.cross_entropy(z[:1], y[:1], label_smoothing=0.1).item() == pytest.approx(smooth)
    weighted = -0.9 * 1 * math.log(0.5) - 0.1 / 3 * (1 * math.log(0.5) + 5 * math.log(0.25) + 3 * math.log(0.25))
    assert ops.cross_entropy(z[:1], y[:1], w, label_smoothing=0.1).item() == pytest.approx(weighted)
    assert ops.cross_entropy(z, dev([0, 2, 1]), ignore_index=1).item() == pytest.approx(mean)
    ops.cross_entropy(z, y).backward()
    probabilities = np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0, 0, 0]])
    targets = np.array([[1, 0, 0], [0, 0, 1], [0, 0, 0]])
    np.testing.assert_allclose(host(z.grad), (probabilities - targets) / 2, atol=1e-12)


@given(st.data())
def test_a_scale_of_all_class_weights_changes_nothing(data):
    rng = data.draw(seeds())
    eps = data.draw(st.sampled_from([0.0, 0.2]))
    z = rng.standard_normal((5, 3))
    y = dev(rng.integers(0, 3, 5))
    w = rng.uniform(0.5, 2, 3)
    results = []
    for c in (1.0, 17.0):
        t = leaf(z)
        loss = ops.cross_entropy(t, y, dev(c * w), label_smoothing=eps)
        loss.backward()
        results.append((loss.item(), host(t.grad)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-10, atol=1e-14)


# ── the rest ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_dropout_keeps_the_mean_and_its_bits():
    x = leaf(np.ones(100_000), np.float32)
    y = ops.dropout(x, 0.3, key=7)
    kept = host(y) != 0
    assert abs(kept.mean() - 0.7) < 0.01
    assert abs(host(y).mean() - 1) < 0.01
    np.testing.assert_allclose(host(y)[kept], 1 / 0.7, rtol=1e-6)
    assert np.array_equal(host(ops.dropout(x, 0.3, key=7)), host(y))
    assert not np.array_equal(host(ops.dropout(x, 0.3, key=8)), host(y))
    y.sum().backward()
    np.testing.assert_array_equal(host(x.grad) != 0, kept)
    small = host(ops.dropout(leaf(np.ones(24), np.float32), 0.5, key=3)) != 0
    bits = "".join("01"[int(k)] for k in small)
    assert bits == BITS_OF_KEY_3, "the bits of a key must never change: saved runs would not resume"


BITS_OF_KEY_3 = "110010010110100000010010"


def test_dropout_has_the_same_bits_on_every_backend():
    bits = []
    for name in {"numpy", "strict", array.backend()}:
        array.use(name)
        bits.append(host(ops.dropout(Tensor(dev(np.ones((3, 5)), np.float32)), 0.5, key=11)))
    assert all(np.array_equal(b, bits[0]) for b in bits)


def test_ties_share_a_maximum():
    x = leaf([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]], np.float64)
    x.amax(axis=-1).backward(dev([1.0, 3.0], np.float64))
    np.testing.assert_allclose(host(x.grad), [[0, 0.5, 0.5], [1, 1, 1]])
    x.grad = None
    x.amax().backward()
    np.testing.assert_allclose(host(x.grad), [[0, 0.5, 0.5], [0, 0, 0]])
    a = leaf([1.0, 2.0, 3.0], np.float64)
    b = leaf([1.0, 5.0, 0.0], np.float64)
    ops.maximum(a, b).sum().backward()
    assert host(a.grad).tolist() == [0.5, 0, 1]
    assert host(b.grad).tolist() == [0.5, 1, 0]


def test_gradients_at_the_kinks():
    x = leaf([-1.0, 0.0, 1.0])
    ops.relu(x).sum().backward()
    assert host(x.grad).tolist() == [0, 0, 1]
    x.grad = None
    abs(x).sum().backward()
    assert host(x.grad).tolist() == [-1, 0, 1]
    x.grad = None
    ops.clip(x, 0.0, 1.0).sum().backward()
    assert host(x.grad).tolist() == [0, 1, 1]


def test_topk_takes_the_first_of_equals():
    x = leaf([[1.0, 3.0, 3.0, 3.0], [5.0, 5.0, 4.0, 5.0]])
    values, indices = F.topk(x, 2)
    assert host(values).tolist() == [[3, 3], [5, 5]]
    assert host(indices).tolist() == [[1, 2], [0, 1]]
    values.sum().backward()
    assert host(x.grad).tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]
    many = np.zeros(100)
    assert host(F.topk(leaf(many), 60)[1]).tolist() == list(range(60))
    for k in (0, 5, -1):
        with pytest.raises(ValueError, match="topk wants 0 < k <= 4"):
            F.topk(x, k)
    assert F.topk(x, 4)[0].shape == (2, 4)


def test_straight_through():
    hard = leaf([1.0, -1.0])
    soft = leaf([0.3, -0.2])
    y = ops.straight_through(hard, soft)
    assert host(y).tolist() == [1, -1]
    y.backward(dev([2.0, 5.0], np.float32))
    assert host(soft.grad).tolist() == [2, 5]
    assert hard.grad is None


def test_repeated_indices_add_up():
    W = leaf(np.zeros((3, 2)))
    ops.embedding(W, dev([[1, 1], [1, 2]])).sum().backward()
    assert host(W.grad).tolist() == [[0, 0], [3, 3], [1, 1]]
    x = leaf(np.zeros((1, 3)))
    ops.gather(x, dev([[2, 2, 0, 2]])).sum().backward()
    assert host(x.grad).tolist() == [[1, 0, 3]]
    z = leaf(np.zeros(3))
    z[dev([0, 0, 2])].sum().backward()
    assert host(z.grad).tolist() == [2, 0, 1]


def test_kl_is_zero_for_equals_and_its_gradient_is_the_known_one():
    rng = np.random.default_rng(4)
    p, q = rng.standard_normal((2, 5, 3))
    assert F.kl_divergence(leaf(p), leaf(p), 3.0).item() == pytest.approx(0, abs=1e-12)
    for T in (1.0, 4.0):
        t = leaf(q)
        F.kl_divergence(Tensor(dev(p)), t, T).backward()
        np.testing.assert_allclose(host(t.grad), T * (softmax(q / T) - softmax(p / T)) / 5, atol=1e-12)


def test_defaults():
    rng = np.random.default_rng(5)
    p = leaf(rng.standard_normal((2, 3)))
    q = leaf(rng.standard_normal((2, 3)))
    assert F.kl_divergence(p, q).item() == pytest.approx(F.kl_divergence(p, q, 1.0).item())
    np.testing.assert_allclose(np.linalg.norm(host(F.normalize(p)), axis=1), 1)
    assert host(F.normalize(leaf(np.zeros(3)))).tolist() == [0, 0, 0]
    assert host(F.normalize(leaf(np.full(4, 1e-13)))) == pytest.approx(np.full(4, 0.1))
    assert F.stack([p, q, q]).shape == (3, 2, 3)
    assert ops.concatenate(p, q).shape == (4, 3)
    np.testing.assert_allclose(host(F.softmax_attention(p, q, q)), attend(host(p), host(q), host(q)))
    first_row = ops.cross_entropy(p[:1], dev([0]))
    assert host(ops.cross_entropy(p, dev([0, -100]))) == pytest.approx(host(first_row))


def test_cross_entropy_of_one_class_and_of_other_dtypes():
    assert ops.cross_entropy(leaf([[3.0], [2.0]]), dev([0, -100])).item() == 0
    z = leaf([[1.0, 2.0], [0.0, 1.0]], np.float32)
    for w in (dev([1.0, 2.0], np.float64), None):
        loss = ops.cross_entropy(z, dev([0, 1]), w, label_smoothing=0.1)
        loss.backward()
        assert loss.dtype == z.grad.dtype == np.float32


def test_dropout_keeps_an_entry_whose_drawn_number_is_p(monkeypatch):
    """P(u >= p) is 1 - p for u in [0, 1) with 24 bits, exactly; P(u > p) is not."""
    monkeypatch.setattr(array, "uniform_like", lambda x, key: dev([0.0, 0.25, 0.5, 0.75], np.float32))
    assert host(ops.dropout(leaf(np.ones(4)), 0.5, 1)).tolist() == [0, 0, 2, 2]
    assert host(ops.dropout(leaf(np.ones(4)), 0.0, 1)).tolist() == [1, 1, 1, 1]


def test_broadcasting_both_ways():
    rng = np.random.default_rng(6)
    pairs = [
        ((3, 1, 4), (2, 1)), ((2, 1), (3, 1, 4)), ((), (2, 3)), ((2, 3), ()), ((1,), (2, 3)), ((1, 1), (1,)),
    ]
    for f in (ops.add, ops.sub, ops.mul, ops.div, ops.maximum):
        for a, b in pairs:
            gradcheck(f, [positive(rng, a), positive(rng, b) * 10], rng)
    gradcheck(ops.matmul, [normal(rng, (3, 1, 2, 4)), normal(rng, (5, 4, 2))], rng)

    def where_all(a, b):
        everywhere = dev(np.ones((2, 3), bool))
        return ops.where(everywhere, a, b) + b
    gradcheck(where_all, [normal(rng, (3,)), normal(rng, (2, 1))], rng)


def test_some_examples_of_attention_have_a_query_without_keys():
    rng = np.random.default_rng(0)
    shapes = [(2, 3, 4), (2, 3, 4), (2, 3, 4)]
    found = set()
    for _ in range(100):
        e = CASES["attention"][0](rng, shapes)
        rows_of_zeros = (e.expected(*e.inputs) == 0).all(-1)
        found.add(bool(rows_of_zeros.any()))
    assert found == {True, False}


def test_packed_linear_is_in_the_table_of_test_nn():
    assert "_packed_linear" in OPS and nn._packed_linear is OPS["_packed_linear"]


# ── project: an op with several values ───────────────────────────────────────────────────────────────────────────────
def split_heads(y, heads):
    """(..., T, H D) -> (..., H, T, D), by a loop over heads."""
    d = y.shape[-1] // heads
    return F.stack([y[..., h * d:(h + 1) * d] for h in range(heads)], axis=-3)


def three_linear_maps(x, Wq, bq, Wk, bk, Wv, bv, heads):
    """The values of project, by three linear ops."""
    return tuple(split_heads(ops.linear(x, W, b), heads) for W, b in ((Wq, bq), (Wk, bk), (Wv, bv)))


def inputs_of_project(rng, lead, t, c, heads, d):
    n = heads * d
    return [normal(rng, s) for s in ((*lead, t, c), (n, c), (n,), (n, c), (n,), (n, c), (n,))]


SIZE = st.integers(1, 3)


@given(seeds(), st.sampled_from([(), (2,), (2, 3)]), SIZE, SIZE, SIZE, SIZE)
def test_project_is_three_linear_maps_split_into_heads(rng, lead, t, c, heads, d):
    arrays = inputs_of_project(rng, lead, t, c, heads, d)
    got = ops.project(*map(leaf, arrays), heads=heads)
    expected = three_linear_maps(*map(leaf, arrays), heads=heads)
    for a, b in zip(got, expected):
        assert a.shape == (*lead, heads, t, d)
        assert np.allclose(host(a), host(b), rtol=1e-12, atol=1e-12)

    def mixed(*tensors):
        """A function in which q, k and v have different gradients."""
        q, k, v = ops.project(*tensors, heads=heads)
        return q * 2 + ops.tanh(k) * v
    gradcheck(mixed, arrays, rng)
    gradcheck(lambda *tensors: ops.concatenate(*ops.project(*tensors, heads=heads)), arrays, rng)


def test_project_computes_only_the_products_that_are_needed(rng):
    """project has one head by default. A gradient that is needed alone is the same as beside all others."""
    arrays = list(map(dev, inputs_of_project(rng, (2,), 3, 2, 1, 4)))
    y, back = ops.project.definition(*arrays)
    g = [dev(normal(rng, (2, 1, 3, 4))) for _ in range(3)]
    full = back(list(g), [True] * 7)
    assert [a.shape for a in y] == [(2, 1, 3, 4)] * 3
    assert [d.shape for d in full] == [a.shape for a in arrays]
    for i in range(7):
        alone = back(list(g), [j == i for j in range(7)])
        assert np.array_equal(host(alone[i]), host(full[i]))
        for j in (0, 1, 3, 5):                           # x and the three W: their gradients are matrix products
            assert (alone[j] is not None) == (j == i)


@pytest.mark.parametrize("use", [lambda q, k, v: k, lambda q, k, v: v * v + v, lambda q, k, v: q + q + k])
def test_gradients_through_one_value_alone_and_through_values_used_twice(use, rng):
    arrays = inputs_of_project(rng, (2,), 3, 2, 2, 2)
    leaves = list(map(leaf, arrays))
    expected = list(map(leaf, arrays))
    use(*ops.project(*leaves, heads=2)).sum().backward()
    use(*three_linear_maps(*expected, heads=2)).sum().backward()
    for a, b in zip(leaves, expected):
        assert np.allclose(host(a.grad), 0 if b.grad is None else host(b.grad), atol=1e-12)


@wrong_answers
@pytest.mark.parametrize("order", [(1, 0, 2), (1, 2, 0), (0, 0, 2)], ids=str)
def test_a_gradient_that_reaches_another_value_is_caught(order, rng, monkeypatch):
    right = tensor.Part.__init__

    def wrong(self, whole, i, of, value):
        right(self, whole, order[i], of, value)
    monkeypatch.setattr(tensor.Part, "__init__", wrong)

    def f(*tensors):
        q, k, v = ops.project(*tensors, heads=2)
        return ops.concatenate(q, k * 2, v * 3)
    with pytest.raises(AssertionError, match="by differences|got no gradient"):
        gradcheck(f, inputs_of_project(rng, (2,), 3, 2, 2, 2), rng)


# ── split and cast ───────────────────────────────────────────────────────────────────────────────────────────────────
@given(seeds(), st.lists(st.integers(0, 3), min_size=1, max_size=4), st.lists(st.integers(1, 3), max_size=2))
def test_split_cuts_the_first_axis(rng, counts, rest):
    x = normal(rng, (sum(counts), *rest))
    parts = ops.split(leaf(x), counts)
    assert [len(part) for part in parts] == counts
    assert np.array_equal(np.concatenate([host(part) for part in parts]), x)
    weights = rng.standard_normal(len(counts))

    def weighted(x):
        return ops.concatenate(*(part * w for part, w in zip(ops.split(x, counts), weights)))
    if x.size:
        gradcheck(weighted, [x], rng)


def test_a_part_without_a_gradient_gets_zeros(rng):
    x = leaf(normal(rng, (5, 2)))
    _, middle, _ = ops.split(x, (1, 3, 1))
    (middle * 2).sum().backward()
    assert np.array_equal(host(x.grad)[:, 0], [0, 2, 2, 2, 0])


@pytest.mark.parametrize("counts", [(2, 2), (3, 3), (6, -1), ()])
def test_split_refuses_counts_with_another_sum(counts):
    with pytest.raises(ShapeError, match="split wants|counts wants"):
        ops.split(leaf(np.ones((5, 2))), counts)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("of", ["float64", "float32", "float16", "bfloat16"])
def test_cast_rounds_once_and_its_gradient_comes_back(of, dtype, rng):
    x = leaf(normal(rng, (3, 4)), np.dtype(of) if of != "bfloat16" else bfloat16)
    wanted = np.dtype(dtype) if dtype != "bfloat16" else bfloat16
    for dtype_of in (dtype, wanted):
        y = ops.cast(x, dtype_of)
        assert y.dtype == wanted
        assert np.array_equal(host(y), host(x).astype(wanted))
    covector = normal(rng, (3, 4)).astype(wanted)
    y.backward(dev(covector))
    assert x.grad.dtype == np.promote_types(x.dtype, np.float32)
    assert np.array_equal(host(x.grad), covector.astype(x.grad.dtype))


def test_autocast_leaves_a_cast_alone():
    x = leaf(np.ones(2), np.float32)
    with ft_autocast("bfloat16"):
        assert ops.cast(x, "float32").dtype == np.float32
        assert ops.cast(x, "float16").dtype == np.float16

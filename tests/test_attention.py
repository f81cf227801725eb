"""Attention: the op with bias and grouped heads; the module with rotary positions, cross-attention, a relative bias.

The op's value and gradients against plain NumPy and against differences are in test_ops.py, its kernels in
test_kernels.py and test_cuda.py. Here: the named properties of the op, the tiled kernel against the definition over
drawn shapes, and the module.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import accepted, dev, gradcheck, host, leaf, seeds, shapes_of, wrong_answers
from hypothesis import given
from hypothesis import strategies as st
from wrong import replaced

from tinyft import Cache, Context, PrefixTuning, Tensor, array, attach, no_grad, ops
from tinyft import functional as F
from tinyft.kernels import attention as tiled
from tinyft.models import attention as attention_module
from tinyft.models.attention import KV, Attention
from tinyft.models.rotary import Rotary
from tinyft.nn import Module, Parameter
from tinyft.tensor import OPS, ShapeError, sum_to

definition = OPS["attention"].definition


def normal(rng: np.random.Generator, shape: tuple) -> np.ndarray:
    return np.asarray(rng.standard_normal(shape))


# ── the op ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@given(st.data())
def test_attention_is_softmax_attention(data):
    shapes, _ = data.draw(shapes_of(OPS["attention"].shapes, broadcast=False))
    rng = data.draw(seeds())
    q, k, v = (normal(rng, s) for s in shapes[:3])
    t, s = q.shape[-2], k.shape[-2]
    causal = data.draw(st.booleans()) and t <= s
    key_mask = dev((rng.random((t, s)) < 0.5) | (np.arange(s) == 0)) if data.draw(st.booleans()) else None
    grads = []
    for f in (ops.attention, F.softmax_attention):
        a, b, c = leaf(q), leaf(k), leaf(v)
        y = f(a, b, c, key_mask=key_mask, causal=causal)
        y.backward(dev(np.cos(np.arange(y.size)).reshape(y.shape)))
        grads.append([host(y), *(host(p.grad) for p in (a, b, c))])
    for one, two in zip(*grads):
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-12)


def test_a_query_that_sees_nothing_gives_zero_and_harms_nobody():
    rng = np.random.default_rng(1)
    q, k, v = (leaf(rng.standard_normal((2, 3, 4)), np.float32) for _ in range(3))
    key_mask = np.ones((2, 3, 3), bool)
    key_mask[0, 1] = False
    y = ops.attention(q, k, v, key_mask=dev(key_mask))
    y.backward(dev(rng.standard_normal((2, 3, 4)), np.float32))
    assert (host(y)[0, 1] == 0).all() and (host(y)[0, 0] != 0).all()
    assert (host(q.grad)[0, 1] == 0).all() and (host(q.grad)[0, 0] != 0).any()
    assert all(np.isfinite(host(p.grad)).all() for p in (q, k, v))


def test_causal_with_cached_keys_is_the_end_of_the_whole():
    rng = np.random.default_rng(2)
    q, k, v = (Tensor(dev(rng.standard_normal((1, 5, 4)))) for _ in range(3))
    whole = host(ops.attention(q, k, v, causal=True))
    np.testing.assert_allclose(host(ops.attention(q[:, 3:], k, v, causal=True)), whole[:, 3:], rtol=1e-12)
    np.testing.assert_allclose(whole[:, 0], host(v)[:, 0], rtol=1e-12)           # the first query sees itself alone
    later = host(k) + np.array([0, 0, 0, 0, 9.0])[:, None]
    np.testing.assert_array_equal(host(ops.attention(q, Tensor(dev(later)), v, causal=True))[:, :4], whole[:, :4])


@pytest.mark.parametrize("causal", [False, True])
def test_the_key_mask_and_the_causal_mask_act_together(rng, causal):
    """Of softmax attention and of the op: a key that either mask hides has no influence."""
    q, k, v = (rng.standard_normal((3, 4)) for _ in range(3))
    key_mask = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 0]], bool)
    may = key_mask & np.tri(3, dtype=bool) if causal else key_mask
    weights = np.where(may, np.exp(q @ k.T / 2), 0)
    want = weights / weights.sum(-1, keepdims=True) @ v
    for f in (ops.attention, F.softmax_attention):
        y = f(*(Tensor(dev(a)) for a in (q, k, v)), key_mask=dev(key_mask), causal=causal)
        np.testing.assert_allclose(host(y), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("inputs", [3, 4], ids=["", "bias"])
def test_attention_makes_only_what_is_needed(inputs):
    rng = np.random.default_rng(2)
    shapes = [(3, 4), (3, 4), (3, 4), (3, 3)]
    arrays = [dev(rng.standard_normal(shape)) for shape in shapes[:inputs]]
    full = [Tensor(a, requires_grad=True) for a in arrays]
    ops.attention(*full, causal=True).sum().backward()
    for mask in range(1, 2**inputs):
        ts = [Tensor(a, requires_grad=bool(mask >> i & 1)) for i, a in enumerate(arrays)]
        y = ops.attention(*ts, causal=True)
        needed = [t.requires_grad for t in ts]
        _, back = definition(*arrays, causal=True)
        assert [d is not None for d in back(dev(np.ones((3, 4))), needed)] == needed
        y.sum().backward()
        for t, f in zip(ts, full):
            assert (t.grad is None) == (not t.requires_grad)
            if t.requires_grad:
                np.testing.assert_array_equal(host(t.grad), host(f.grad))


MISFITS: list[tuple[dict, str]] = [
    (dict(k=(2, 3, 7, 4), v=(2, 3, 7, 4)), "number of query heads"),
    (dict(k=(2, 2, 7, 5)), "d is 4 and 5"),
    (dict(v=(2, 2, 6, 4)), "s is 6 and 7"),
    (dict(v=(2, 1, 7, 4)), "wants q"),
    (dict(k=(1, 2, 7, 4), v=(1, 2, 7, 4)), "wants q"),
    (dict(q=(4, 5, 4)), "wants q"),
    (dict(key_mask=(3, 1, 1, 7)), "a key_mask that broadcasts"),
    (dict(key_mask=(2, 1, 1, 6)), "a key_mask that broadcasts"),
    (dict(key_mask=(1, 2, 4, 5, 7)), "a key_mask that broadcasts"),
    (dict(bias=(3, 4, 5, 7)), "a bias that broadcasts"),
    (dict(bias=(1, 2, 5, 7)), "a bias that broadcasts"),
    (dict(dropout_mask=(2, 4, 5, 1, 7)), "a dropout_mask that broadcasts"),
]


@pytest.mark.parametrize("wrong, words", MISFITS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["kernel", "definition"])
def test_arrays_that_do_not_fit_are_refused_by_kernel_and_definition_alike(wrong, words, dtype):
    shapes = dict(q=(2, 4, 5, 4), k=(2, 2, 7, 4), v=(2, 2, 7, 4)) | wrong
    arrays = {name: dev(np.ones(shape), bool if name == "key_mask" else dtype) for name, shape in shapes.items()}
    inputs = [arrays[name] for name in ("q", "k", "v", "bias") if name in arrays]
    masks = {name: arrays[name] for name in ("key_mask", "dropout_mask") if name in arrays}
    with pytest.raises(ShapeError, match=words):
        ops.attention(*inputs, **masks)


def test_a_mask_in_the_place_of_a_bias_is_refused():
    x = dev(np.ones((1, 2, 3, 4)))
    with pytest.raises(TypeError, match="key_mask="):
        ops.attention(x, x, x, dev(np.ones((3, 3), bool)))


def grouped_inputs(
    rng: np.random.Generator, B: int, kv_heads: int, group: int, t: int, s: int, d: int
) -> list[np.ndarray]:
    """q, k, v and a bias for all rows of the batch."""
    shapes = (B, kv_heads * group, t, d), (B, kv_heads, s, d), (B, kv_heads, s, d), (1, kv_heads * group, t, s)
    return [normal(rng, shape) for shape in shapes]


SMALL = st.integers(1, 4)


@given(seeds(), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), SMALL, SMALL, st.booleans())
def test_grouped_heads_are_repeated_heads_and_a_bias_is_added_to_the_scores(rng, B, kv_heads, group, t, s, causal):
    """Against softmax_attention of one head at a time; gradients of q, k, v and bias against differences."""
    arrays = grouped_inputs(rng, B, kv_heads, group, t, s, 3)
    causal = causal and t <= s
    q, k, v, bias = map(dev, arrays)
    y = host(ops.attention(q, k, v, bias, causal=causal))
    past = np.tril(np.ones((t, s), bool), s - t) if causal else np.ones((t, s), bool)
    for b, h in np.ndindex(B, kv_heads * group):
        scores = arrays[0][b, h] @ arrays[1][b, h // group].T / math.sqrt(3) + arrays[3][0, h]
        weights = np.exp(scores) * past
        weights /= weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(y[b, h], weights @ arrays[2][b, h // group], rtol=1e-9, atol=1e-12)
    gradcheck(lambda *x: ops.attention(*x, causal=causal), arrays, rng)


def test_a_query_without_keys_has_no_gradient_with_a_bias_and_grouped_heads_either():
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        tensors = [leaf(a, dtype) for a in grouped_inputs(rng, 2, 2, 2, 3, 4, 5)]
        key_mask = np.ones((2, 1, 3, 4), bool)
        key_mask[1, :, 2] = False
        y = ops.attention(*tensors, key_mask=dev(key_mask))
        y.backward(dev(rng.standard_normal(y.shape), dtype))
        q, k, v, bias = (host(t.grad) for t in tensors)
        assert (host(y)[1, :, 2] == 0).all() and (host(y)[0] != 0).all()
        assert (q[1, :, 2] == 0).all() and (q[0] != 0).all() and bias.shape == (1, 4, 3, 4)
        alone = ops.attention(*(leaf(host(t)[:1], dtype) for t in tensors), key_mask=dev(key_mask[:1]))
        np.testing.assert_allclose(host(alone)[0], host(y)[0], rtol=1e-5)
        assert all(np.isfinite(a).all() for a in (q, k, v, bias))


@pytest.mark.skipif(array.backend() != "numpy", reason="the tiled kernel is for NumPy arrays")
@given(st.data())
def test_the_tiled_kernel_is_the_definition(data):
    """Value and every pullback, over lengths, heads, broadcast biases and masks, and layouts."""
    rng = data.draw(seeds())
    B, kv_heads, group = (data.draw(st.integers(1, 3)) for _ in range(3))
    t = data.draw(st.sampled_from([1, 2, 5, 70, 130]))
    s = max(1, t + data.draw(st.integers(-3, 40)))
    H, d = kv_heads * group, data.draw(st.integers(1, 9))

    def some(*shape: int) -> tuple:
        return tuple(n if data.draw(st.booleans()) else 1 for n in shape)

    def heads(time: int, count: int) -> np.ndarray:
        return normal(rng, (B, time, count, d)).astype(np.float32).transpose(0, 2, 1, 3)
    arrays = [heads(t, H), heads(s, kv_heads), heads(s, kv_heads)]
    if data.draw(st.booleans()):
        arrays.append((normal(rng, some(B, H, t, s)) * data.draw(st.sampled_from([1, 30]))).astype(np.float32))
    kw = {"causal": data.draw(st.booleans()), "scale": data.draw(st.sampled_from([None, 0.3]))}
    if data.draw(st.booleans()):
        kw["key_mask"] = rng.random(some(B, H, t, s)) < 0.6
    if data.draw(st.booleans()):
        kw["dropout_mask"] = ((rng.random(some(B, H, t, s)) < 0.8) / 0.8).astype(np.float32)
    with replaced(tiled, "TILE", data.draw(st.sampled_from([1 << 17, 1 << 12]))):
        result = tiled.attention(*arrays, **kw)
        assert (result is NotImplemented) == (kw["causal"] and s < t)
        y, back = accepted(tiled.attention, definition, *arrays, **kw)
        g = normal(rng, y.shape).astype(np.float32)
        got = back(g, [True] * len(arrays))
    wide = {name: a.astype(np.float64) if name == "dropout_mask" else a for name, a in kw.items()}
    want, defined = definition(*(a.astype(np.float64) for a in arrays), **wide)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))
    for a, d, right in zip(arrays, got, defined(g.astype(np.float64), [True] * len(arrays)), strict=True):
        size = max(1, np.abs(right).max())
        assert d.dtype == np.float32
        np.testing.assert_allclose(sum_to(d, a.shape), sum_to(right, a.shape), rtol=0, atol=1e-4 * size)


# ── the module ───────────────────────────────────────────────────────────────────────────────────────────────────────
C, H, KV_HEADS, D = 12, 4, 2, 6                          # width, heads, key/value heads, head width: here not C / H


class Distances(Module):
    """A relative-position bias: one number for each head and distance."""

    def __init__(self, heads: int, rng: np.random.Generator, most: int = 20):
        self.table = Parameter(dev(rng.standard_normal((2 * most, heads))))
        self._most = most

    def forward(self, lengths: tuple, ctx: Context) -> Tensor:
        queries, keys = lengths
        distance = np.arange(keys)[None] - (np.arange(queries) + keys - queries)[:, None]       # (Tq, Tk)
        rows = ops.embedding(self.table, dev(distance + self._most))                            # (Tq, Tk, H)
        return rows.permute(2, 0, 1).reshape(1, -1, queries, keys)


def make(**options: Any) -> Attention:
    """In float64, with generic weights."""
    rng = np.random.default_rng(0)
    options = dict(head_width=D, key_value_heads=KV_HEADS) | options
    if options.pop("distances", False):
        options["relative_bias"] = Distances(H, rng)
    attention = Attention(C, H, rng=rng, **options).to(dtype=np.float64)
    for p in attention.parameters():
        p.copy_(rng.standard_normal(p.shape) * 0.6)
    return attention.eval()


def context(B: int, T: int, mask: Any = None, **facts: Any) -> Context:
    ctx = Context(mask=mask, **facts)
    ctx.begin(np.zeros((B, T), int), dev(np.zeros(1)))
    return ctx


def rotated(x: np.ndarray, positions: np.ndarray, base: float = 10000.0) -> np.ndarray:
    """Rotary positions by complex numbers: x (B, H, T, D), positions (B, T)."""
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    angle = positions[:, None, :, None] * base**(-np.arange(half) / half)
    z = z * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)


def by_formula(
    attention: Attention,
    x: np.ndarray,
    real: np.ndarray,
    source: np.ndarray | None = None,
    base: float | None = None,
    prefix: tuple | None = None,
) -> np.ndarray:
    """The module in plain NumPy, query by query. real (B, Tk): the keys that are no padding; prefix: P_K, P_V."""
    w = {name: host(p) for name, p in attention.named_parameters().items()}

    def heads(name: str, x: np.ndarray) -> np.ndarray:
        y = x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        return y.reshape(*x.shape[:2], -1, D).transpose(0, 2, 1, 3)
    read = x if source is None else source
    q, k, v = heads("q", x), heads("k", read), heads("v", read)
    if base is not None:
        positions = np.maximum(np.cumsum(real, 1) - 1, 0)
        q, k = rotated(q, positions, base), rotated(k, positions, base)
    p = 0
    if prefix is not None:
        p = prefix[0].shape[1]
        k, v = (np.concatenate([np.broadcast_to(P, (len(x), *P.shape)), a], 2) for P, a in zip(prefix, (k, v)))
        real = np.concatenate([np.ones((len(x), p), bool), real], 1)
    B, _, T, _ = q.shape
    before = k.shape[2] - p - T                          # keys before the first query: the last two are at one position
    y = np.zeros((B, T, H * D))
    for b, h, i in np.ndindex(B, H, T):
        may = [j for j in range(k.shape[2]) if real[b, j] and (not attention.causal or j <= i + k.shape[2] - T)]
        shared = h // (H // k.shape[1])
        scores = [q[b, h, i] @ k[b, shared, j] / math.sqrt(D) for j in may]
        if attention.relative_bias is not None:
            table, most = w["relative_bias.table"], attention.relative_bias._most
            scores = [s + (table[j - p - i - before + most, h] if j >= p else 0) for s, j in zip(scores, may)]
        if may:
            weights = np.exp(scores) / np.exp(scores).sum()
            y[b, i, h * D:(h + 1) * D] = sum(n * v[b, shared, j] for n, j in zip(weights, may))
    return y @ w["o.weight"].T + w["o.bias"]


RIGHT = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], bool)
LEFT = RIGHT[:, ::-1]
HOLES = np.array([[1, 0, 1, 1, 1], [1, 1, 1, 0, 1]], bool)       # a shift alone changes no rotary score; a hole does
SELF: dict[str, dict] = {
    "grouped": dict(causal=True),
    "one key/value head": dict(key_value_heads=1),
    "rotary": dict(causal=True, rotary=Rotary(D)),
    "another base": dict(rotary=Rotary(D, base=100.0)),
    "relative bias": dict(distances=True),
    "relative bias, causal": dict(distances=True, causal=True),
}


def check_self(attention: Attention, wrong: Callable | None = None) -> None:
    """The module is its formula at every real position, without padding, padded on the right and on the left."""
    x = np.random.default_rng(1).standard_normal((2, 5, C))
    base = None if attention._rotary is None else attention._rotary.base
    for mask in (None, RIGHT, LEFT, HOLES):
        real = np.ones((2, 5), bool) if mask is None else mask
        want = by_formula(attention, x, real, base=base)
        got = host(attention(Tensor(dev(x)), context(2, 5, mask)))
        np.testing.assert_allclose(got[real], want[real], rtol=0, atol=1e-10 * np.abs(want).max())


@pytest.mark.parametrize("name", SELF)
def test_self_attention_is_its_formula(name):
    check_self(make(**SELF[name]))


def _neighbours(x: Any, cos: Any, sin: Any) -> Any:
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return ops.concatenate(-pairs[..., 1:], pairs[..., :1], axis=-1).reshape(x.shape) * sin + x * cos


def _rotates_neighbours(self: Rotary, x: Any, ctx: Context) -> Any:
    return _neighbours(x, *self.factors(x, ctx))


def _rotates_backwards(self: Rotary, x: Any, ctx: Context) -> Any:
    cos, sin = self.factors(x, ctx)
    half = self.width // 2
    return x * cos + ops.concatenate(x[..., half:], x[..., :half], axis=-1) * sin


def _columns(self: Context) -> Any:
    return dev(np.arange(self.ids.shape[1]))[None]


def _one_frequency(self: Rotary, x: Any, ctx: Context, right: Callable = Rotary.__call__) -> Any:
    return right(Rotary(self.width, base=1.0), x, ctx)


def _keys_unrotated(self: Rotary, x: Any, ctx: Context, right: Callable = Rotary.__call__) -> Any:
    return right(self, x, ctx) if x.shape[1] == H else x


WRONG_ROTARY = {
    "The pairs are neighbours, as in the paper.": (Rotary, "__call__", _rotates_neighbours),
    "A rotation has no minus.": (Rotary, "__call__", _rotates_backwards),
    "All pairs turn alike.": (Rotary, "__call__", _one_frequency),
    "Only queries have positions.": (Rotary, "__call__", _keys_unrotated),
    "A position is a column of the batch.": (Context, "positions", _columns),
    "Heads take turns among the features.": (attention_module, "split_heads", lambda x, heads: x.reshape(
        *x.shape[:2], x.shape[2] // heads, heads).permute(0, 3, 1, 2)),
}


@wrong_answers
@pytest.mark.parametrize("belief", WRONG_ROTARY)
def test_wrong_rotary_positions_are_caught(belief):
    with replaced(*WRONG_ROTARY[belief]), pytest.raises(AssertionError):
        check_self(make(**SELF["rotary"]))


@given(seeds(), st.integers(0, 50), st.sampled_from([2, 4, 6]))
def test_rotary_scores_depend_on_distances_alone(rng, shift, width):
    """A shift of all positions changes no q · k; position 0 is no rotation; lengths are kept."""
    rotary = Rotary(width, base=50.0)
    q, k = (Tensor(dev(rng.standard_normal((1, 2, 5, width)))) for _ in "qk")
    scores = []
    for start in (0, shift):
        ctx = context(1, 5)
        ctx.position_shift = start
        turned = rotary(q, ctx)
        np.testing.assert_allclose(host((turned * turned).sum(axis=-1)), host((q * q).sum(axis=-1)), rtol=1e-9)
        scores.append(host(turned @ rotary(k, ctx).T))
    np.testing.assert_allclose(*scores, rtol=0, atol=1e-9 * (1 + np.abs(scores[0]).max()))
    np.testing.assert_allclose(host(rotary(q, context(1, 5)))[:, :, 0], host(q)[:, :, 0], rtol=1e-12)
    gradcheck(lambda x: rotary(x, context(1, 5)), [rng.standard_normal((1, 2, 5, width))], rng)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rotary_positions_keep_the_dtype(rng, dtype):
    """The result has the dtype of x, and is as exact as this dtype can show."""
    rotary = Rotary(4)
    assert rotary.base == 10000.0
    x = rng.standard_normal((1, 2, 5, 4)).astype(dtype)
    got = rotary(Tensor(dev(x, dtype)), context(1, 5))
    assert got.dtype == dtype
    want = rotated(x.astype(np.float64), np.arange(5)[None])
    np.testing.assert_allclose(host(got), want, rtol=0, atol=20 * np.finfo(dtype).eps)


@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "padded"])
@pytest.mark.parametrize("name", ["grouped", "rotary", "relative bias, causal"])
@pytest.mark.parametrize("prefix", [False, True], ids=["", "prefix"])
def test_a_cached_pass_is_the_whole_pass(name, mask, prefix):
    """In pieces of two, one and two tokens; grouped heads are cached, not repeated; the prefix is not cached."""
    attention = make(**SELF[name])
    if prefix:
        attach(attention, PrefixTuning(p=3, std=1.0))
        attention.to(dtype=np.float64)
        attention.eval()
    x = np.random.default_rng(1).standard_normal((2, 5, C))
    real = np.ones((2, 5), bool) if mask is None else mask
    whole = host(attention(Tensor(dev(x)), context(2, 5, mask)))
    cache, pieces = Cache(), []
    with no_grad():
        for start, end in ((0, 2), (2, 3), (3, 5)):
            ctx = context(2, end - start, None if mask is None else mask[:, start:end], cache=cache)
            pieces.append(host(attention(Tensor(dev(x[:, start:end])), ctx)))
            cache.advance(ctx)
    np.testing.assert_allclose(np.concatenate(pieces, 1)[real], whole[real], rtol=0, atol=1e-10)
    assert [k.shape for k, _ in cache.kv.values()] == [(2, KV_HEADS, 5, D)]


@pytest.mark.parametrize("p", [1, 3])
@pytest.mark.parametrize("name", SELF)
def test_a_prefix_has_no_position_no_bias_and_the_heads_of_the_keys(name, p):
    attention = make(**SELF[name])
    attach(attention, PrefixTuning(p=p, std=1.0))
    attention.to(dtype=np.float64)
    edit = attention.kv.edits["prefixtuning"]
    assert edit.K.shape == (attention.kv.heads, p, attention.kv.head_width)
    x = np.random.default_rng(1).standard_normal((2, 5, C))
    base = None if attention._rotary is None else attention._rotary.base
    want = by_formula(attention, x, RIGHT, base=base, prefix=(host(edit.K), host(edit.V)))
    got = host(attention(Tensor(dev(x)), context(2, 5, RIGHT)))
    np.testing.assert_allclose(got[RIGHT], want[RIGHT], rtol=0, atol=1e-9)


def source_context(x: np.ndarray, mask: Any) -> Context:
    """The Context of an encoder that has run: x (B, Ts, C) are its last hidden states."""
    ctx = context(*x.shape[:2], mask)
    ctx.last_hidden_state = Tensor(dev(x))
    return ctx


@pytest.mark.parametrize("mask", [None, RIGHT, LEFT], ids=["whole", "right", "left"])
@pytest.mark.parametrize("prefix", [False, True], ids=["", "prefix"])
@pytest.mark.parametrize("distances", [False, True], ids=["", "relative bias"])
def test_cross_attention_reads_the_source(mask, prefix, distances):
    """Its keys, values and mask; a prefix comes before the source; a relative bias is for the keys of the source."""
    attention = make(cross=True, distances=distances)
    rng = np.random.default_rng(2)
    P = None
    if prefix:
        attach(attention, PrefixTuning(p=2, std=1.0))
        attention.to(dtype=np.float64)
        P = tuple(host(p) for p in (attention.kv.edits["prefixtuning"].K, attention.kv.edits["prefixtuning"].V))
    x, source = rng.standard_normal((2, 3, C)), rng.standard_normal((2, 5, C))
    ctx = context(2, 3, np.array([[0, 1, 1], [1, 1, 1]], bool), source=source_context(source, mask))
    want = by_formula(attention, x, np.ones((2, 5), bool) if mask is None else mask, source, prefix=P)
    np.testing.assert_allclose(host(attention(Tensor(dev(x)), ctx)), want, rtol=0, atol=1e-10 * np.abs(want).max())


def test_cross_attention_computes_the_sources_keys_once_for_all_passes_of_a_cache(monkeypatch):
    """Two products for the source at the first pass, none later; the cache neither appends nor counts them."""
    attention, rng = make(cross=True), np.random.default_rng(2)
    source = source_context(rng.standard_normal((2, 5, C)), RIGHT)
    calls, cache = [], Cache()
    linear = ops.linear
    monkeypatch.setattr(ops, "linear", lambda x, W, b=None: (calls.append(x.shape), linear(x, W, b))[1])
    for step in range(3):
        x = Tensor(dev(rng.standard_normal((2, 1, C))))
        cached = host(attention(x, context(2, 1, source=source, cache=cache)))
        assert len(calls) == (4 if step == 0 else 2) and cache.kv == {} and cache.length == 0
        assert [k.shape for k, _ in cache.source.values()] == [(2, KV_HEADS, 5, D)]
        np.testing.assert_allclose(host(attention(x, context(2, 1, source=source))), cached, rtol=1e-12)
        calls.clear()
    chosen = cache.rows(dev(np.array([1, 1, 0])))
    assert next(iter(chosen.source.values()))[0].shape == (3, KV_HEADS, 5, D)


def test_gradients_reach_the_source_and_all_that_the_module_is_made_of():
    for attention, cross in ((make(cross=True), True), (make(rotary=Rotary(D), distances=True), False)):
        rng = np.random.default_rng(3)
        x, source = leaf(rng.standard_normal((2, 3, C))), leaf(rng.standard_normal((2, 5, C)))
        ctx = context(2, 3)
        if cross:
            ctx.source = context(2, 5)
            ctx.source.last_hidden_state = source
        attention(x, ctx).sum().backward()
        leaves = [x, *attention.parameters(), *([source] if cross else [])]
        assert all(p.grad is not None for p in leaves)


def test_attention_refuses_options_that_do_not_go_together():
    rng = np.random.default_rng(0)
    refused: list[tuple[dict, str]] = [
        (dict(key_value_heads=3), "3 key/value heads do not divide 4 heads"),
        (dict(cross=True, causal=True), "neither causal"),
        (dict(cross=True, rotary=Rotary(4)), "neither causal nor rotary"),
        (dict(rotary=Rotary(8)), "width 8 do not fit heads of width 3"),
    ]
    for options, words in refused:
        with pytest.raises(ValueError, match=words):
            Attention(C, H, rng=rng, **options)
    with pytest.raises(ValueError, match="even width"):
        Rotary(5)
    attention = make(cross=True)
    with pytest.raises(AttributeError, match="'source'"):
        attention(Tensor(dev(np.zeros((1, 2, C)))), context(1, 2))
    with pytest.raises(ValueError, match="on which the encoder has run"):
        attention(Tensor(dev(np.zeros((1, 2, C)))), context(1, 2, source=context(1, 2)))
    plain = Attention(C, H, rng=rng, bias=False)
    assert all(linear.bias is None for linear in (plain.q, plain.k, plain.v, plain.o))
    assert (plain.kv.heads, plain.kv.head_width, plain.key_value_heads) == (H, C // H, H) and isinstance(plain.kv, KV)


def test_a_scale_and_unscaled_scores():
    x = Tensor(dev(np.random.default_rng(1).standard_normal((1, 3, C))))
    one, other = make(scale=1.0), make()
    other.q.weight.copy_(host(other.q.weight) * math.sqrt(D))
    other.q.bias.copy_(host(other.q.bias) * math.sqrt(D))
    np.testing.assert_allclose(host(one(x, context(1, 3))), host(other(x, context(1, 3))), rtol=1e-9)

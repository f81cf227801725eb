"""A kernel equals its definition in value and in every pullback; training is the same with and without kernels."""
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import accepted, lora_curve
from hypothesis import given
from hypothesis import strategies as st

import tinyft
from tinyft import array, dispatch, get_num_threads, kernels, set_num_threads
from tinyft.kernels import attention as tiled
from tinyft.kernels import numpy as fast
from tinyft.kernels import threads
from tinyft.tensor import OPS, sum_to

pytestmark = pytest.mark.skipif(array.backend() != "numpy", reason="these kernels are for NumPy arrays")
NAMES = fast.OPS
BLOCK = threads.BLOCK


def inputs(name: str, shape: tuple, dtype: Any, rng: np.random.Generator) -> tuple[list, dict]:
    """Arrays and keyword arguments for an op, x of this shape."""
    x = (rng.standard_normal(shape) * 3).astype(dtype)
    if name == "layer_norm":
        c = shape[-1]
        x = x + dtype(rng.standard_normal())
        w = rng.standard_normal(c).astype(dtype)
        b = rng.standard_normal(c).astype(dtype)
        return [x, w, b], {"eps": 1e-5}
    if name in ("swiglu", "add"):
        return [x, rng.standard_normal(shape).astype(dtype)], {}
    if name == "rms_norm":
        return [x, rng.standard_normal(shape[-1]).astype(dtype)], {"eps": 1e-5}
    if name == "rotary":
        x = np.concatenate([x, x + dtype(1)], axis=-1)        # rows of an even length
        angles = rng.uniform(-9, 9, x.shape[-2:])
        return [x, np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)], {}
    if name == "embedding":
        return [rng.standard_normal((5, 3)).astype(dtype), rng.integers(-5, 5, shape)], {}
    if name == "linear":
        n = int(rng.integers(1, 5))
        W = rng.standard_normal((n, shape[-1])).astype(dtype)
        b = rng.standard_normal(n).astype(dtype)
        return [x, W, b][:rng.integers(2, 4)], {}             # with or without a bias
    if name == "cross_entropy":
        rows = tuple(max(n, 1) for n in shape[:-1]) or (1,)
        y = rng.integers(0, shape[-1], rows)
        y[rng.random(rows) < 0.3] = -100
        y.reshape(-1)[0] = 0                                  # at least one label, since the mean of no terms is NaN
        z = rng.standard_normal((*rows, shape[-1])) * rng.choice([1, 30])
        return [z.astype(dtype), y], {}
    if name == "dropout":
        return [x], {"p": float(rng.choice([0.0, 0.1, 0.7])), "key": int(rng.integers(2**63))}
    if name == "attention":
        *lead, t, d = (int(rng.integers(1, 3)),) * (4 - len(shape)) + shape[-4:]
        return attention_inputs((*lead, t, t + int(rng.integers(0, 4)), d), dtype, rng)
    return [x], {}


def attention_inputs(sizes: tuple, dtype: Any, rng: np.random.Generator, group: int | None = None) -> tuple[list, dict]:
    """Arrays and keyword arguments of attention, of sizes (B, H, Tq, Tk, D).

    q, k, v are views of (B, T, H, D), as models make them, with scores from small to enormous.  A bias, masks of all
    kinds and a scale are drawn.  group: query heads per key/value head; None: drawn."""
    B, H, t, s, d = sizes
    divisors = [n for n in range(1, H + 1) if H % n == 0] or [1]
    group = int(rng.choice(divisors)) if group is None else group

    def heads(time: int, count: int) -> np.ndarray:
        return rng.standard_normal((B, time, count, d)).astype(dtype).transpose(0, 2, 1, 3)

    def random_mask(*shape: int) -> np.ndarray:
        return rng.random(shape) < 0.7

    q = heads(t, H) * dtype(rng.choice([0.1, 1, 10]) * min(1, 8 / d))
    arrays = [q, heads(s, H // group), heads(s, H // group)]
    if rng.random() < 0.5:
        shape = tuple(n if rng.random() < 0.6 else 1 for n in (B, H, t, s))
        arrays.append((rng.standard_normal(shape) * rng.choice([1, 30])).astype(dtype))
    key_masks = [
        None,
        random_mask(B, 1, 1, s),
        random_mask(B, 1, t, s),
        random_mask(t, s),
        np.zeros((B, 1, 1, s), bool),
    ]
    key_mask = key_masks[rng.integers(5)]
    dropout_mask = None if rng.random() < 0.6 else (random_mask(B, H, t, s) / 0.7).astype(dtype)
    causal = bool(rng.integers(2))
    scale = [None, 0.7][rng.integers(2)]
    return arrays, {"key_mask": key_mask, "causal": causal, "scale": scale, "dropout_mask": dropout_mask}


def largest(a: np.ndarray) -> float:
    """The largest magnitude of the array; 0 if it is empty."""
    return np.abs(a).max(initial=0)


def near(a: np.ndarray, b: np.ndarray, tol: float) -> bool:
    """True if shape and dtype are the same, and no entry differs by more than tol times the largest entry of b."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(largest(a - b) <= tol * max(largest(b), 1))


def must_take(name: str, arrays: list, kw: dict) -> bool:
    """True for arguments that the kernel must not decline.

    These are contiguous float32 arrays with elements; for causal attention, with as many keys as queries or more."""
    floats = [a for a in arrays if a.dtype.kind == "f"]
    if any(a.dtype != np.float32 for a in floats) or not arrays[0].size:
        return False
    if name == "add":
        return arrays[0].size >= fast.SHARED_SUM and all(a.flags.c_contiguous for a in arrays)
    if name == "attention":
        q, k, *_ = arrays
        return q.ndim == 4 and (k.shape[2] >= q.shape[2] or not kw.get("causal"))
    if name == "cross_entropy":
        return arrays[0].flags.c_contiguous and kw.get("weight") is None and not kw.get("label_smoothing")
    return name in ("linear", "embedding") or arrays[0].flags.c_contiguous


def agree(name: str, kernel: Callable, arrays: list, kw: dict, rng: np.random.Generator) -> None:
    """Assert that value and every pullback equal the definition's, and that no input is written to."""
    tol = 1e-12 if arrays[0].dtype == np.float64 else 4e-6
    copies = [a.copy() for a in arrays]
    result = kernel(*arrays, **kw)
    if result is NotImplemented:
        assert not must_take(name, arrays, kw), "the kernel declines arguments that it was written for"
        return
    y, pulls = result
    expected, right = OPS[name].definition(*arrays, **kw)
    if name == "attention":                                   # the rounding error of a score grows with the score
        q, k = arrays[:2]
        tol *= 1 + largest(q) * largest(k) * q.shape[-1]**0.5
    assert near(y, expected, tol), "value"
    g = rng.standard_normal(expected.shape).astype(expected.dtype)
    if callable(pulls):
        joint_pullbacks_agree(pulls, as_joint(right), arrays, g, tol)
    else:
        pullbacks_agree(pulls, right, arrays, g, tol)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, copies)), "an input was written to"


def pullbacks_agree(pulls: tuple, right: tuple, arrays: list, g: np.ndarray, tol: float) -> None:
    """One pullback per input, for g in several layouts: contiguous, broadcast, and in Fortran's order."""
    assert len(pulls) == len(right)
    layouts = [g]
    if g.ndim:
        layouts += [np.broadcast_to(g[..., :1], g.shape), np.asfortranarray(g)]
    for gradient in layouts:
        for i, (pull, right_pull, a) in enumerate(zip(pulls, right, arrays)):
            assert (pull is None) == (right_pull is None)
            if pull is not None:
                got = sum_to(pull(gradient), a.shape)
                expected = sum_to(right_pull(gradient), a.shape)
                terms = max(1, gradient.size / max(expected.size, 1))              # of each sum
                assert near(got, expected, tol * terms**0.5), f"pullback {i}"


def as_joint(pulls: Any) -> Callable:
    """One pullback for all inputs, from one for each."""
    if callable(pulls):
        return pulls
    return lambda g, needed: [None if pull is None or not wanted else pull(g) for pull, wanted in zip(pulls, needed)]


def joint_pullbacks_agree(pull: Callable, right_pull: Callable, arrays: list, g: np.ndarray, tol: float) -> None:
    """One pullback for all inputs: each needed gradient is right, alone and with the others, and in a second call."""
    every = [True] * len(arrays)
    full = right_pull(g, every)
    alone = np.eye(len(arrays), dtype=bool).tolist()
    for needed in (every, *alone, every):
        gradients = pull(g, needed)
        for i, (got, is_needed, right, a) in enumerate(zip(gradients, needed, full, arrays)):
            if not is_needed or right is None:
                continue
            # sum_to adds up the terms of `right`: the error is relative to the terms, not to their sum.
            terms = largest(right) if right.shape != a.shape else 0
            size = max(1, largest(full[0]), terms)
            assert got is not None, f"pullback {i}"
            assert near(sum_to(got, a.shape), sum_to(right, a.shape), 4 * tol * size), f"pullback {i}"


SHAPES = [(7,), (3, 5), (2, 3, 4), (1, 1), (4, 1), (2, 0, 3), (BLOCK // 64 + 1, 64), (2, BLOCK + 5)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_equals_its_definition(name, shape, dtype, rng):
    arrays, kw = inputs(name, shape, dtype, rng)
    agree(name, getattr(fast, name), arrays, kw, rng)


@given(
    st.sampled_from(NAMES),
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_a_kernel_equals_its_definition_for_any_shape_and_layout(name, shape, double, seed):
    rng = np.random.default_rng(seed)
    shape = (*shape[:-1], shape[-1] + 1)                      # an empty row has no mean
    arrays, kw = inputs(name, shape, np.float64 if double else np.float32, rng)
    layouts = [
        arrays,
        [np.asfortranarray(a) for a in arrays],
        [np.repeat(a, 2, axis=-1)[..., ::2] for a in arrays],
        [a[..., ::-1] for a in arrays],
    ]
    agree(name, getattr(fast, name), layouts[rng.integers(4)], kw, rng)


def check_large_sums(add: Callable, add_to: Callable, sum_of: Callable, squared_norm: Callable, n: int) -> None:
    """The functions on arrays that n threads share: value, gradients, and nothing else written to."""
    rng = np.random.default_rng(0)
    set_num_threads(n)
    a, b = (rng.standard_normal((3, fast.SHARED_SUM // 2 + 1)).astype(np.float32) for _ in range(2))
    before = a.copy(), b.copy()
    agree("add", add, [a, b], {}, rng)
    assert np.array_equal(sum_of(a, b), a + b)
    assert near(np.float32(squared_norm(a)), (a.astype(np.float64)**2).sum().astype(np.float32), 4e-6)
    assert all(map(np.array_equal, (a, b), before))
    assert add_to(a, b) is a
    assert np.array_equal(a, before[0] + before[1]) and np.array_equal(b, before[1])


def first_part_only(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    y = a + b
    y.reshape(-1)[fast.SHARED_SUM:] = 0
    return y


def into_the_second(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    b += a
    return a


def first_half_of_the_norm(g: np.ndarray) -> Any:
    return np.vdot(g[:1], g[:1])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_large_sums(n):
    right = (fast.add, fast.add_to, fast.sum_of, fast.squared_norm)
    before = get_num_threads()
    try:
        check_large_sums(*right, n)
        for i, wrong in ((1, into_the_second), (2, first_part_only), (2, np.subtract), (3, first_half_of_the_norm)):
            with pytest.raises(AssertionError):
                check_large_sums(*right[:i], wrong, *right[i + 1:], n)
    finally:
        set_num_threads(before)


@pytest.mark.parametrize("x", [0.0, -0.0, 1e-30, 5.0, -5.0, 13.0, -13.0, 100.0, -100.0, 1e4, -1e4])
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "swiglu"])
def test_an_activation_of_extreme_numbers(name, x, rng):
    arrays = [np.full((2, 3), x, np.float32)]
    if name == "swiglu":
        arrays.append(rng.standard_normal((2, 3)).astype(np.float32))
    agree(name, getattr(fast, name), arrays, {}, rng)


def check_dropout(kernel: Callable) -> None:
    """Equal to the bit, for many p: some equal to a drawn number or next to it, some at the ends of the range."""
    x = np.arange(1, BLOCK + 8, dtype=np.float32)
    for key in (0, 1, 2**63 - 1):
        drawn = array.uniform_like(x, key)
        probabilities = [*map(float, drawn[:40]), *map(float, np.nextafter(drawn[:5], 2))]
        probabilities += [0.0, 1e-9, 2.0**-24, 0.1, 0.3, 0.999, 1 - 2.0**-24, 1 - 2.0**-30]
        for p in probabilities:
            expected, (right_back, *_) = OPS["dropout"].definition(x, p, key)
            result = kernel(x, p, key)
            if result is NotImplemented:
                assert np.float32(p) == 1
                continue
            y, (back, *_) = result
            assert np.array_equal(y, expected), (p, key)
            assert np.array_equal(back(2 * x), right_back(2 * x)), (p, key)


def test_dropout_equals_its_definition_to_the_bit():
    check_dropout(fast.dropout)


def dropout_with(keeps: Callable = np.greater_equal, shift: int = 0, scaled: bool = True, redrawn: int = 0) -> Callable:
    """A dropout kernel. Each argument but its default makes the kernel wrong."""
    def kernel(x: np.ndarray, p: float, key: int) -> Any:
        scale = np.float32(1) / np.float32(1 - p) if scaled else np.float32(1)

        def factor(key: int) -> np.ndarray:
            return np.roll(keeps(array.uniform_like(x, key), np.float32(p)) * scale, shift)

        backward_factor = factor(key + redrawn)
        return x * factor(key), (lambda g: g * backward_factor, None, None)
    return kernel


@pytest.mark.parametrize("wrong", [
    dict(keeps=np.greater), dict(keeps=np.less), dict(shift=1), dict(scaled=False), dict(redrawn=1),
], ids=str)
def test_wrong_dropout_is_caught(wrong):
    check_dropout(dropout_with())
    with pytest.raises(AssertionError):
        check_dropout(dropout_with(**wrong))


@pytest.mark.parametrize("eps", [1e-12, 1e-5])
@pytest.mark.parametrize("x", [0.0, 3.0, -0.5])
def test_layer_norm_of_a_row_of_equal_numbers_is_zero(x, eps, rng):
    arrays = [np.full((2, 12), x, np.float32), np.ones(12, np.float32), np.zeros(12, np.float32)]
    for layer_norm in (fast.layer_norm, OPS["layer_norm"].definition):
        y, _ = layer_norm(*arrays, eps=eps)
        assert not y.any()


@pytest.mark.parametrize("factor", [0.01, 6], ids=["small scores", "scores that need their maximum"])
@pytest.mark.parametrize("sizes", [
    (2, 3, 70, 70, 4), (3, 2, 130, 150, 8), (1, 5, 257, 257, 16), (9, 4, 64, 64, 8), (2, 2, 1, 300, 4),
], ids=str)
def test_attention_in_many_tiles(sizes, factor, rng, monkeypatch):
    """Tiles that do not divide the text, several per group of heads, several groups; also with a small tile."""
    for tile in (1 << 17, 1 << 12):
        monkeypatch.setattr(tiled, "TILE", tile)
        for _ in range(4):
            (q, *others), kw = attention_inputs(sizes, np.float32, rng)
            agree("attention", fast.attention, [q * np.float32(factor), *others], kw, rng)


def test_attention_keeps_no_scores():
    """The memory that the pullback holds grows with the length of the text, not with its square."""
    q = np.ones((1, 2, 600, 8), np.float32)
    _, back = fast.attention(q, q, q, causal=True)
    a = next(c.cell_contents for c in back.__closure__ if isinstance(c.cell_contents, tiled._Attention))
    held = sum(x.size for x in vars(a).values() if isinstance(x, np.ndarray))
    assert held <= 5 * q.size + 64 * 64 + 600
    assert a.saved is None


@pytest.mark.parametrize("sizes", [(1, 2, 5, 3, 4), (0, 2, 3, 3, 4)], ids=["fewer keys than queries", "no rows"])
def test_attention_of_rare_sizes_agrees_or_is_declined(sizes, rng):
    arrays, _ = attention_inputs(sizes, np.float32, rng)
    for causal in (False, True):
        agree("attention", fast.attention, arrays, {"causal": causal}, rng)


@pytest.mark.parametrize("kw", [
    {"weight": np.arange(1, 5, dtype=np.float32)}, {"label_smoothing": 0.1}, {"ignore_index": 2},
], ids=str)
def test_cross_entropy_with_weights_smoothing_and_another_ignored_label(kw, rng):
    z = rng.standard_normal((6, 4)).astype(np.float32)
    y = np.array([0, 1, 2, 3, kw.get("ignore_index", -100), 1])
    agree("cross_entropy", fast.cross_entropy, [z, y], kw, rng)


# ── wrong kernels ────────────────────────────────────────────────────────────────────────────────────────────────────
VALUE = -1


def scaled(name: str, part: int, by: float = 1.01) -> Callable:
    """The kernel with its value (part VALUE), or its pullback of this number, off by a factor."""
    def kernel(*arrays: np.ndarray, **kw: Any) -> Any:
        y, pulls = getattr(fast, name)(*arrays, **kw)
        if part == VALUE:
            return y * np.float32(by), pulls
        right = pulls[part]

        def wrong(g: np.ndarray) -> np.ndarray:
            return right(g) * np.float32(by)

        return y, (*pulls[:part], None if right is None else wrong, *pulls[part + 1:])
    return kernel


def last_only(W: np.ndarray, ids: np.ndarray) -> Any:
    """Assigns with = in place of +=."""
    def back(g: np.ndarray) -> np.ndarray:
        d = np.zeros_like(W)
        d[ids] = g
        return d
    return W[ids], (back, None)


def unaware_of_the_end(W: np.ndarray, ids: np.ndarray) -> Any:
    """Takes −1 and the last row for two different rows."""
    def back(g: np.ndarray) -> np.ndarray:
        d = np.zeros_like(W)
        flat = ids.reshape(-1)
        for row in np.unique(flat):
            d[row] = g.reshape(-1, W.shape[1])[flat == row].sum(0)
        return d
    return W[ids], (back, None)


def in_place(x: np.ndarray) -> Any:
    y, pulls = OPS["gelu"].definition(x)
    x *= 1.5
    return y, pulls


def first_block_only(x: np.ndarray) -> Any:
    y, pulls = OPS["gelu"].definition(x)
    y.reshape(-1)[BLOCK:] = 0
    return y, pulls


def biased(x: np.ndarray, w: np.ndarray, b: np.ndarray, eps: float = 1e-5) -> Any:
    """Divides by n − 1 in the variance."""
    n = x.shape[-1]
    y, pulls = OPS["layer_norm"].definition(x, w, b, eps=eps)
    return (y - b) * np.float32(((n - 1) / n)**0.5) + b, pulls


def tiled_attention(*arrays: np.ndarray, **kw: Any) -> Any:
    return accepted(fast.attention, OPS["attention"].definition, *arrays, **kw)


def attention_but(**wrong: Any) -> Callable:
    """The kernel with one of its settings overridden."""
    return lambda *arrays, **kw: tiled_attention(*arrays, **(kw | wrong))


def causal_from(shift: Callable) -> Callable:
    """The kernel with its causal mask at another diagonal, shift(Tq, Tk)."""
    def kernel(q: np.ndarray, k: np.ndarray, v: np.ndarray, *bias: np.ndarray, causal: bool = False,
               key_mask: np.ndarray | None = None, **kw: Any) -> Any:
        if causal:
            t, s = q.shape[-2], k.shape[-2]
            past = np.tril(np.ones((t, s), bool), shift(t, s))
            key_mask = past if key_mask is None else past & key_mask
        return tiled_attention(q, k, v, *bias, key_mask=key_mask, **kw)
    return kernel


def groups_in_turn(q: np.ndarray, k: np.ndarray, v: np.ndarray, *bias: np.ndarray, **kw: Any) -> Any:
    """Key/value heads repeated one after the other, a b a b in place of a a b b."""
    group = q.shape[1] // k.shape[1]
    y, back = tiled_attention(q, np.tile(k, (1, group, 1, 1)), np.tile(v, (1, group, 1, 1)), *bias, **kw)

    def sum_copies(d: np.ndarray | None) -> np.ndarray | None:
        return d if d is None else d.reshape(len(d), group, -1, *d.shape[2:]).sum(1)

    def wrong(g: np.ndarray, needed: list) -> tuple:
        dq, dk, dv, *db = back(g, needed)
        return dq, sum_copies(dk), sum_copies(dv), *db
    return y, wrong


def first_of_the_group(q: np.ndarray, k: np.ndarray, v: np.ndarray, *bias: np.ndarray, **kw: Any) -> Any:
    """The gradients of shared heads are those of the first query head of the group."""
    group = q.shape[1] // k.shape[1]
    y, back = tiled_attention(q, np.repeat(k, group, 1), np.repeat(v, group, 1), *bias, **kw)

    def wrong(g: np.ndarray, needed: list) -> tuple:
        dq, dk, dv, *db = back(g, needed)
        dk = dk if dk is None else dk[:, ::group]
        dv = dv if dv is None else dv[:, ::group]
        return dq, dk, dv, *db
    return y, wrong


def bias_forgotten(q: np.ndarray, k: np.ndarray, v: np.ndarray, *bias: np.ndarray, **kw: Any) -> Any:
    y, back = tiled_attention(q, k, v, **kw)

    def wrong(g: np.ndarray, needed: list) -> tuple:
        return *back(g, needed[:3]), *(np.zeros_like(b) for b in bias)
    return y, wrong


def bias_scaled(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *bias: np.ndarray, scale: float | None = None, **kw: Any,
) -> Any:
    """Adds the bias before the scale: α (Q Kᵀ + B)."""
    alpha = np.float32(q.shape[-1]**-0.5 if scale is None else scale)
    return tiled_attention(q, k, v, *(b * alpha for b in bias), scale=scale, **kw)


def first_bias_only(back: Callable) -> Callable:
    """The gradient of a bias that all rows of a batch share is that of the first row."""
    def wrong(g: np.ndarray, needed: list) -> tuple:
        first = np.zeros_like(g)
        first[:1] = g[:1]
        return *back(g, needed)[:3], *back(first, needed)[3:]
    return wrong


def with_pullback(wrong: Callable) -> Callable:
    """The kernel with wrong(back) in place of its pullback `back`."""
    def kernel(*arrays: np.ndarray, **kw: Any) -> Any:
        y, back = tiled_attention(*arrays, **kw)
        return y, wrong(back)
    return kernel


def keys_and_values_swapped(back: Callable) -> Callable:
    def wrong(g: np.ndarray, needed: list) -> tuple:
        dq, dk, dv, *db = back(g, [True] * len(needed))
        return dq, dv, dk, *db
    return wrong


def once_only(back: Callable) -> Callable:
    """Right in the first call; zeros in later calls."""
    calls: list[int] = []

    def wrong(g: np.ndarray, needed: list) -> tuple:
        calls.append(1)
        is_first = np.float32(len(calls) == 1)
        return tuple(d * is_first if d is not None else d for d in back(g, needed))
    return wrong


def nothing_ignored(z: np.ndarray, y: np.ndarray) -> Any:
    return fast.cross_entropy(z, np.where(y == -100, 0, y))


def divided_by_all(z: np.ndarray, y: np.ndarray) -> Any:
    """The mean over all rows, with the rows that have no label."""
    value, pulls = fast.cross_entropy(z, y)
    share = np.float32((y != -100).mean())
    return value * share, (lambda g: pulls[0](g) * share, None, None)


def gate_as_a_constant(gate: np.ndarray, up: np.ndarray) -> Any:
    """The pullback of the gate forgets that its σ depends on the gate."""
    y, back = fast.swiglu(gate, up)

    def wrong(g: np.ndarray, needed: list[bool]) -> tuple:
        return g * up / (1 + np.exp(-gate)), back(g, needed)[1]
    return y, wrong


PULLBACKS = {
    "gelu": 1, "gelu_tanh": 1, "layer_norm": 3, "rms_norm": 2, "rotary": 1, "embedding": 1, "linear": 3,
    "cross_entropy": 1,
}
WRONG = [
    *((name, scaled(name, part)) for name, count in PULLBACKS.items() for part in (VALUE, *range(count))),
    ("swiglu", lambda gate, up: fast.swiglu(up, gate)),
    ("swiglu", gate_as_a_constant),
    ("rms_norm", lambda x, w, eps: fast.rms_norm(x, w, eps=1e-2)),
    ("rotary", lambda x, cos, sin: fast.rotary(x, cos, -sin)),
    ("linear", lambda x, W, b=None: fast.linear(x, W)),
    ("attention", attention_but(key_mask=None)),
    ("attention", attention_but(causal=False)),
    ("attention", attention_but(dropout_mask=None)),
    ("attention", attention_but(scale=None)),
    ("attention", causal_from(lambda t, s: s - t + 1)),
    ("attention", causal_from(lambda t, s: 0)),
    ("attention", groups_in_turn),
    ("attention", first_of_the_group),
    ("attention", bias_scaled),
    ("attention", bias_forgotten),
    ("attention", with_pullback(first_bias_only)),
    ("attention", with_pullback(keys_and_values_swapped)),
    ("attention", with_pullback(once_only)),
    ("cross_entropy", nothing_ignored),
    ("cross_entropy", divided_by_all),
    ("gelu", fast.gelu_tanh),
    ("gelu_tanh", fast.gelu),
    ("gelu", in_place),
    ("gelu", first_block_only),
    ("layer_norm", biased),
    ("layer_norm", lambda x, w, b, eps: fast.layer_norm(x, w, b, eps=1e-2)),
    ("embedding", last_only),
    ("embedding", unaware_of_the_end),
]


@pytest.mark.parametrize("i", range(len(WRONG)))
def test_a_wrong_kernel_is_caught(i, rng):
    name, kernel = WRONG[i]
    with pytest.raises(AssertionError):
        for shape in SHAPES * 4:                              # some errors show only under some masks
            arrays, kw = inputs(name, shape, np.float32, rng)
            agree(name, kernel, arrays, kw, rng)


def test_training_is_the_same_with_and_without_kernels(monkeypatch):
    kernels.install()
    losses, weights = lora_curve(30, 6)
    with kernels.definitions():
        plain, plain_weights = lora_curve(30, 6)
        assert not any(dispatch.find(OPS[n], np.ndarray) for n in NAMES)
    assert np.allclose(losses, plain, rtol=2e-5)
    assert np.allclose(weights, plain_weights, rtol=1e-2, atol=1e-4)
    assert losses[-3:].mean() < losses[:3].mean() - 0.05
    assert not np.array_equal(losses, plain), "the kernels were not used"
    monkeypatch.setitem(dispatch.KERNELS, (OPS["gelu_tanh"], np.ndarray), [scaled("gelu_tanh", 0, by=1.1)])
    assert not np.allclose(lora_curve(30, 6)[0], plain, rtol=2e-5)


def test_the_definitions_context_ends_after_an_error_too_and_nests():
    kernels.install()
    before = {key: list(found) for key, found in dispatch.KERNELS.items()}
    with pytest.raises(KeyError), kernels.definitions():
        with kernels.definitions():
            pass
        assert not dispatch.find(OPS["gelu"], np.ndarray)
        raise KeyError
    assert dispatch.KERNELS == before and all(before.values())
    assert all(dispatch.find(OPS[n], np.ndarray)[-1] == getattr(fast, n) for n in NAMES)


@pytest.mark.parametrize("switch, there", [("off", False), ("numpy", True), ("auto", True), (None, True)])
def test_an_environment_variable_leaves_the_kernels_out(switch, there):
    env = dict(os.environ, PYTHONPATH=str(Path(tinyft.__file__).parents[1]))
    env.pop("TINYFT_KERNELS", None)
    if switch is not None:
        env["TINYFT_KERNELS"] = switch
    code = f"""if True:
        import numpy
        import tinyft
        from tinyft import dispatch, optim, tensor
        definitions = [*map(tensor.OPS.get, {NAMES}), optim.optimizers.adam_update]
        print([bool(dispatch.find(f, numpy.ndarray)) for f in definitions])"""
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert out.stdout.strip() == str([there] * (len(NAMES) + 1)), out.stderr


# ── the registry ─────────────────────────────────────────────────────────────────────────────────────────────────────
def double(x: Any) -> Any:
    return 2 * x


def declines(x: Any) -> Any:
    return NotImplemented


def check_registry(run: Callable) -> None:
    """The newest kernel that takes the arguments runs, else the definition; never a kernel of another array type."""
    def on_floats(x: Any) -> Any:
        return "float" if isinstance(x, float) else NotImplemented

    def on_all(x: Any) -> Any:
        return "any"

    key = (double, int)
    try:
        assert run(double, int, 3) == 6
        dispatch.register(double, int, on_floats)
        assert run(double, int, 3) == 6
        assert run(double, int, 0.5) == "float"
        dispatch.register(double, int, on_all)
        assert run(double, int, 0.5) == "any"
        dispatch.register(double, int, on_floats)             # moves to the front
        assert dispatch.find(double, int) == [on_floats, on_all]
        assert run(double, int, 0.5) == "float"
        assert run(double, int, 3) == "any"
        assert run(double, str, 3) == 6
        with dispatch.only(lambda kernel: kernel is on_floats):
            assert run(double, int, 0.5) == "float"
            assert run(double, int, 3) == 6
            with dispatch.definitions_only():
                assert run(double, int, 0.5) == 1
                dispatch.register(double, int, on_all)        # registered inside: runs until the context ends
                assert run(double, int, 0.5) == "any"
            assert run(double, int, 0.5) == "float"
        assert dispatch.find(double, int) == [on_floats, on_all]
    finally:
        dispatch.KERNELS.pop(key, None)


def test_the_first_kernel_that_takes_the_arguments_runs():
    check_registry(dispatch.run)


def first_only(definition: Callable, array_type: type, *args: Any) -> Any:
    for kernel in dispatch.find(definition, array_type)[:1]:
        result = kernel(*args)
        if result is not NotImplemented:
            return result
    return definition(*args)


def slowest_first(definition: Callable, array_type: type, *args: Any) -> Any:
    for kernel in reversed(dispatch.find(definition, array_type)):
        result = kernel(*args)
        if result is not NotImplemented:
            return result
    return definition(*args)


def returns_the_refusal(definition: Callable, array_type: type, *args: Any) -> Any:
    for kernel in dispatch.find(definition, array_type):
        return kernel(*args)
    return definition(*args)


def any_array_type(definition: Callable, array_type: type, *args: Any) -> Any:
    return dispatch.run(definition, int, *args)


@pytest.mark.parametrize("wrong", [first_only, slowest_first, returns_the_refusal, any_array_type])
def test_a_wrong_registry_is_caught(wrong):
    with pytest.raises(AssertionError):
        check_registry(wrong)


def test_an_op_whose_kernels_all_decline_runs_its_definition(monkeypatch, rng):
    x = rng.standard_normal((3, 4)).astype(np.float32)
    monkeypatch.setitem(dispatch.KERNELS, (OPS["gelu"], np.ndarray), [declines, declines])
    assert np.array_equal(OPS["gelu"](x).data, OPS["gelu"].definition(x)[0])
    y = OPS["gelu"](x.astype(np.float16))
    assert y.dtype == np.float16


def test_layer_norm_keeps_nothing_where_no_op_is_recorded(rng):
    """The value is that of a recorded call, in less memory; there is no pullback, as nobody can call it."""
    X = rng.standard_normal((9000, 40)).astype(np.float32)
    X[3] = 7.0                                               # a row of equal numbers
    w = rng.standard_normal(40).astype(np.float32)
    recorded, _ = fast.layer_norm(X, w, w)
    with tinyft.no_grad(), tinyft.peak_memory() as memory:
        y, pullbacks = fast.layer_norm(X, w, w)
    assert np.array_equal(y, recorded) and pullbacks == (None, None, None)
    assert memory["bytes"] < 1.5 * X.nbytes

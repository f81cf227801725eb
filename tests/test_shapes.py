"""Shapes that could mean something else, and sizes of 0 and 1: the value of NumPy and PyTorch, or one sentence.

An op must not broadcast by chance: a bias of length 1, labels with their axes exchanged, or a mask for another batch
would give a number that looks like a result. The tests run the definitions and the kernels.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import dev, gradcheck, host, leaf, wrong_answers
from test_ops import CASES, EVERY_OP

from tinyft import array, ops, tensor
from tinyft import functional as F
from tinyft.tensor import OPS, ShapeError, Tensor

pytestmark = pytest.mark.usefixtures("with_and_without_kernels")


def ones(*shape: int) -> Tensor:
    return leaf(np.ones(shape), np.float32)


def zeros(*shape: int) -> array.Array:
    return dev(np.zeros(shape, np.int64))


# ── vectors ──────────────────────────────────────────────────────────────────────────────────────────────────────────
VECTORS = [
    ((3,), (3,)), ((3,), (3, 4)), ((2, 3), (3,)), ((3,), (5, 3, 4)), ((5, 2, 3), (3,)), ((2, 5, 2, 3), (3,)),
    ((3,), (1, 5, 3, 4)), ((1,), (1,)), ((1,), (1, 4)), ((2, 1), (1,)), ((3,), (2, 3, 3)), ((3, 3), (3,)),
]


@pytest.mark.parametrize("a, b", VECTORS, ids=str)
def test_a_vector_is_a_row_on_the_left_and_a_column_on_the_right(a, b, rng):
    x = rng.standard_normal(a)
    y = rng.standard_normal(b)
    np.testing.assert_allclose(host(Tensor(dev(x)) @ Tensor(dev(y))), x @ y, rtol=1e-12)
    gradcheck(ops.matmul, [x, y], rng)


def swapped(a: Any, b: Any) -> Any:
    """The gradients that matmul had for vectors: those of matrices, summed to the shape of the input."""
    y, _ = ops.matmul.definition(a, b)
    return y, (lambda g: g @ b.T if a.ndim > 1 else g * b, lambda g: a.T @ g if b.ndim > 1 else g * a)


@wrong_answers
def test_wrong_gradients_of_vectors_are_caught(rng):
    wrong = tensor.op("... n k, ... k m -> ... n m")(swapped)
    OPS.pop("swapped")
    caught = 0
    for a, b in VECTORS:
        try:
            gradcheck(wrong, [rng.standard_normal(a), rng.standard_normal(b)], rng)
        except (AssertionError, ShapeError, ValueError):
            caught += 1
    assert caught >= 5


def test_linear_of_a_vector(rng):
    x, W, b = rng.standard_normal(3), rng.standard_normal((4, 3)), rng.standard_normal(4)
    np.testing.assert_allclose(host(ops.linear(*map(Tensor, map(dev, (x, W, b))))), W @ x + b, rtol=1e-12)
    gradcheck(ops.linear, [x, W, b], rng)


# ── refused ──────────────────────────────────────────────────────────────────────────────────────────────────────────
Z = ones(4, 3)
Q = ones(2, 2, 3, 4)
REFUSED: list[tuple[Callable, str]] = [
    (lambda: ones(2, 3) @ Tensor(dev(2.0)), "matmul wants .* a number is multiplied with"),
    (lambda: ones(2, 3) @ 2.0, "matmul wants .* a number is multiplied with"),
    (lambda: ones(3) @ ones(4), "matmul wants"),
    (lambda: ones(3) @ ones(2, 4, 3), "matmul wants"),
    # a bias or a weight that would only broadcast
    (lambda: ops.linear(ones(2, 3), ones(4, 3), ones(1)), "n is 1 and 4"),
    (lambda: ops.linear(ones(2, 3), ones(4, 3), ones(4, 1)), "linear wants .* n is 1 and 4"),
    (lambda: ops.linear(ones(4, 3), ones(4, 3), ones(4, 4)), "linear wants .* b wants the shape"),
    (lambda: ops.linear(ones(2, 3), ones(4, 3), Tensor(dev(1.0))), "b wants the shape"),
    (lambda: ops.linear(ones(2, 3), ones(5, 4, 3)), "W wants two axes"),
    (lambda: ops.linear(ones(2, 3), ones(3)), "W wants two axes"),
    (lambda: ops.linear(Tensor(dev(1.0)), ones(4, 3)), "linear wants"),
    (lambda: ops.layer_norm(ones(2, 3), ones(1), ones(3)), "c is 1 and 3"),
    (lambda: ops.layer_norm(ones(2, 3), ones(3), ones(3, 1)), "c is 1 and 3"),
    (lambda: ops.layer_norm(ones(2, 3), Tensor(dev(1.0)), ones(3)), "weight and bias wants"),
    (lambda: ops.layer_norm(ones(2, 3), ones(2, 3), ones(3)), "weight and bias wants"),
    (lambda: ops.layer_norm(ones(2, 0), ones(0), ones(0)), "one entry or more"),
    (lambda: ops.rms_norm(ones(2, 3), ones(1)), "c is 1 and 3"),
    (lambda: ops.rms_norm(ones(3, 3), ones(3, 3)), "weight and bias wants"),
    (lambda: ops.project(ones(2, 3), ones(4, 3), ones(1), ones(4, 3), ones(4), ones(4, 3), ones(4)), "n is 1 and 4"),
    (lambda: ops.project(ones(2, 3), ones(4, 3), ones(4), ones(2, 3), ones(2), ones(4, 3), ones(4)), "n is 2 and 4"),
    (lambda: ops.project(ones(2, 3), *[ones(4, 3), ones(4)] * 3, heads=3), "divides the width 4"),
    (lambda: ops.project(ones(2, 3), *[ones(4, 3), ones(4)] * 3, heads=0), "heads wants a whole number >= 1"),
    (lambda: ops.embedding(ones(5), zeros(2)), "W wants two axes"),
    (lambda: ops.embedding(ones(5, 2, 2), zeros(2)), "W wants two axes"),
    (lambda: ops.gather(ones(2, 3), zeros(3)), "indices wants the shape of x"),
    (lambda: ops.gather(ones(2, 3), zeros(1, 3)), "indices wants the shape of x"),
    (lambda: ops.gather(ones(1, 3), zeros(2, 3)), "indices wants the shape of x"),
    (lambda: ops.gather(ones(2, 3), zeros(2, 3), axis=None), "axis wants a whole number"),
    # labels
    (lambda: ops.cross_entropy(Z, zeros(1)), "labels wants the shape"),
    (lambda: ops.cross_entropy(Z, zeros(4, 1)), "labels wants the shape"),
    (lambda: ops.cross_entropy(Z, zeros(4, 3)), "labels wants the shape"),
    (lambda: ops.cross_entropy(ones(2, 4, 3), zeros(4, 2)), "labels wants the shape"),
    (lambda: ops.cross_entropy(ones(3), zeros(3)), "labels wants the shape"),
    (lambda: ops.cross_entropy(Tensor(dev(1.0)), zeros()), "one entry or more"),
    (lambda: ops.cross_entropy(ones(4, 0), zeros(4)), "one entry or more"),
    (lambda: ops.cross_entropy(Z, zeros(4), dev(np.ones(1))), "v is 1 and 3"),
    (lambda: ops.cross_entropy(Z, zeros(4), dev(np.ones(4))), "v is 3 and 4"),
    (lambda: ops.cross_entropy(Z, zeros(4), dev(np.ones((4, 3)))), "weight wants the shape"),
    (lambda: ops.cross_entropy(Z, zeros(4), label_smoothing=1.5), "label_smoothing wants .* >= 0 and <= 1"),
    (lambda: ops.cross_entropy(Z, zeros(4), label_smoothing=-0.1), "label_smoothing wants .* >= 0 and <= 1"),
    (lambda: ops.cross_entropy(Z, zeros(4), label_smoothing=float("nan")), "label_smoothing wants a finite number"),
    # masks for another batch
    (lambda: ops.attention(Q, Q, Q, key_mask=dev(np.ones((3, 1, 1, 3), bool))), "a key_mask that broadcasts"),
    (lambda: ops.attention(ones(1, 2, 3, 4), *[ones(1, 2, 3, 4)] * 2, key_mask=dev(np.ones((2, 1, 1, 3), bool))),
     "a key_mask that broadcasts"),
    (lambda: ops.attention(Q, Q, Q, dropout_mask=dev(np.ones((4, 1, 1, 3), np.float32))), "a dropout_mask that"),
    (lambda: ops.attention(Q, Q, Q, ones(4, 1, 3, 3)), "a bias that broadcasts"),
    (lambda: F.softmax_attention(ones(1, 3, 4), ones(1, 3, 4), ones(1, 3, 4), dev(np.ones((2, 3, 3), bool))),
     "a key_mask that broadcasts"),
    (lambda: F.softmax_attention(ones(3, 4), ones(3, 4), ones(3, 4), dev(np.ones((1, 3, 3), bool))),
     "a key_mask that broadcasts"),
    # axes
    (lambda: ones(2, 3).sum(axis=2), "axis wants one of the 2 axes"),
    (lambda: ones(2, 3).sum(axis=(0, -2)), "each axis once"),
    (lambda: ones(2, 3).mean(axis=-3), "axis wants one of the 2 axes"),
    (lambda: ones(2, 3).amax(axis=1.0), "axis wants a whole number"),
    (lambda: ones(2, 0).amax(axis=1), "one entry or more"),
    (lambda: ones(0).amax(), "one entry or more"),
    (lambda: ops.cumsum(ones(2, 3), axis=None), "axis wants a whole number"),
    (lambda: ops.cumsum(Tensor(dev(1.0))), "axis wants one of the 0 axes"),
    (lambda: ops.concatenate(ones(2, 3), ones(2, 3), axis=2), "axis wants one of the 2 axes"),
    (lambda: ops.concatenate(ones(2, 3), ones(3)), "the same number of axes"),
    (lambda: ops.concatenate(ones(2, 3), ones(2, 4)), "concatenate wants"),
    (lambda: ones(2, 3).permute(0, 0), "each axis of x once"),
    (lambda: ones(2, 3).permute(0, -2), "each axis of x once"),
    (lambda: ones(2, 3).permute(0), "each axis of x once"),
    (lambda: ones(2, 3).permute(0, 1, 2), "each axis of x once"),
    (lambda: ones(2, 3).reshape(-1, -1), "reshape wants"),
    (lambda: ones(2, 3).reshape(-2), "lengths of 0 or more"),
    (lambda: ones(2, 3).reshape(4), "reshape wants"),
    (lambda: ops.broadcast_to(ones(2, 3), (3,)), "broadcast_to wants"),
    (lambda: ops.softmax(Tensor(dev(1.0))), "one entry or more"),
    (lambda: ops.softmax(ones(2, 0)), "one entry or more"),
    (lambda: ops.log_softmax(ones(2, 0)), "one entry or more"),
    (lambda: ops.dropout(ones(2), 1.0, 3), "p wants a finite number >= 0 and < 1"),
    (lambda: ops.dropout(ones(2), -0.1, 3), "p wants a finite number >= 0 and < 1"),
    # functional.py
    (lambda: F.mse_loss(ones(4, 1), ones(4)), "mse_loss wants tensors of one shape"),
    (lambda: F.kl_divergence(ones(4, 3), ones(3)), "kl_divergence wants tensors of one shape"),
    (lambda: F.kl_divergence(ones(3), ones(3), 0.0), "temperature wants a finite number > 0"),
    (lambda: F.soft_cross_entropy(ones(4, 3), ones(1, 3)), "soft_cross_entropy wants tensors of one shape"),
    (lambda: F.stack([ones(2, 3), ones(3, 2)]), "stack wants tensors of one shape"),
    (lambda: F.stack([ones(2)], axis=2), "stack: axis wants a whole number from -2 to 1"),
    (lambda: F.stack([]), "one tensor or more"),
]


@pytest.mark.parametrize("i", range(len(REFUSED)))
def test_what_does_not_fit_is_refused_in_one_sentence(i):
    call, words = REFUSED[i]
    with pytest.raises((ShapeError, ValueError, TypeError), match=words):
        call()


@pytest.mark.parametrize("label", [-1, 3, -101, 1000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["kernel", "definition"])
@pytest.mark.skipif(array.backend() == "cupy", reason="to look into a device array is to wait for the device")
def test_a_label_outside_the_classes_is_refused(label, dtype):
    """−1 is no last class here: it is the mark of padding in other libraries."""
    if array.backend() == "strict":
        pytest.skip("to look into a device array is to wait for the device")
    with pytest.raises(IndexError, match=f"one of the classes 0 to 2, got {label}"):
        ops.cross_entropy(leaf(np.ones((4, 3)), dtype), [0, 1, label, -100])
    assert ops.cross_entropy(leaf(np.ones((4, 3)), dtype), [0, 1, label, 2], ignore_index=label).item() > 0


def test_flat_labels_are_those_of_all_rows_in_order(rng):
    z = leaf(rng.standard_normal((2, 4, 3)), np.float32)
    y = rng.integers(0, 3, (2, 4))
    losses = [ops.cross_entropy(z, dev(labels)).item() for labels in (y, y.reshape(-1))]
    assert losses[0] == losses[1]


def test_straight_through_broadcasts():
    soft = leaf(np.zeros((2, 3)))
    y = ops.straight_through(dev(np.array([1, 0, 1])), soft)
    y.sum().backward()
    assert host(y).tolist() == [[1, 0, 1]] * 2
    assert host(soft.grad).tolist() == [[1, 1, 1]] * 2
    row = leaf(np.zeros(3))
    ops.straight_through(dev(np.ones((2, 3))), row).sum().backward()
    assert host(row.grad).tolist() == [2, 2, 2]


# ── rows that do not count ───────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("junk", [-np.inf, np.inf, np.nan, 3e38], ids=str)
@pytest.mark.parametrize("kw", [{}, {"label_smoothing": 0.1}, {"weight": [1.0, 2.0, 3.0]}], ids=str)
def test_an_ignored_row_counts_nowhere_whatever_it_holds(junk, kw, rng):
    rows = rng.standard_normal((4, 3)) * 30
    y = [2, -100, 0, -100]
    dirty = rows.copy()
    dirty[1] = junk
    dirty[3, 1] = junk
    results = []
    for z in (rows, dirty):
        t = leaf(z, np.float32)
        loss = ops.cross_entropy(t, y, **kw)
        loss.backward()
        results.append((loss.item(), host(t.grad)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)
    assert not results[1][1][[1, 3]].any()


@pytest.mark.parametrize("z, y, kw", [
    (np.ones((2, 3)), [-100, -100], {}),
    (np.ones((0, 3)), [], {}),
    (np.ones((2, 3)), [1, 1], {"weight": [1.0, 0.0, 1.0]}),
], ids=["all ignored", "no rows", "weights that sum to 0"])
def test_the_loss_of_no_rows_is_nan_and_its_gradient_zero(z, y, kw):
    """As in PyTorch."""
    t = leaf(z, np.float32)
    loss = ops.cross_entropy(t, y, **kw)
    loss.backward()
    assert np.isnan(loss.item())
    assert t.grad.shape == z.shape and not host(t.grad).any()


# ── empty arrays, and axes of length one ─────────────────────────────────────────────────────────────────────────────
def test_attention_without_keys_gives_zeros():
    for dtype in (np.float32, np.float64):
        q, k, v = (leaf(np.ones(s), dtype) for s in ((2, 2, 3, 4), (2, 1, 0, 4), (2, 1, 0, 5)))
        y = ops.attention(q, k, v, causal=True)
        y.sum().backward()
        assert y.shape == (2, 2, 3, 5) and not host(y).any()
        assert not host(q.grad).any() and k.grad.shape == k.shape and v.grad.shape == v.shape


def test_the_mean_of_no_entries_is_nan():
    x = ones(2, 0)
    y = x.mean(axis=1)
    y.sum().backward()
    assert y.shape == (2,) and np.isnan(host(y)).all() and x.grad.shape == (2, 0)
    assert np.isnan(ones(0, 3).mean().item())
    assert ones(0, 3).mean(axis=1).shape == (0,)
    assert ones(2, 0).sum(axis=1).shape == (2,)


def test_attention_of_no_rows(rng):
    for dtype in (np.float32, np.float64):
        q, k, v = (leaf(np.zeros((0, heads, time, 4)), dtype) for heads, time in ((2, 3), (1, 5), (1, 5)))
        y = ops.attention(q, k, v, key_mask=dev(np.ones((0, 1, 1, 5), bool)), causal=True)
        y.sum().backward()
        assert y.shape == q.grad.shape == (0, 2, 3, 4)
        assert k.grad.shape == v.grad.shape == (0, 1, 5, 4)


def small_sizes(spec: str, leading: int) -> list[tuple]:
    """The shapes of the inputs of a shape string: "..." is one axis, of this length, and each letter is 1."""
    shapes = []
    for letters in spec.split("->")[0].split(","):
        shapes.append(tuple(leading if letter == "..." else 1 for letter in letters.split()))
    return shapes


HAS_ITS_OWN_TEST = {"attention", "cross_entropy", "mean"}                        # of no rows


@pytest.mark.parametrize("leading", [0, 1])
@pytest.mark.parametrize("name", EVERY_OP)
def test_every_op_takes_no_rows_and_axes_of_length_one(name, leading, rng):
    """Value and gradients have the shape and the dtype of the arrays; nothing warns."""
    calls = 0
    for make in CASES[name] * 8:
        try:
            example = make(rng, small_sizes(OPS[name].shapes, leading))
            example.expected(*example.inputs)
        except (ValueError, IndexError, ZeroDivisionError):          # this example needs an entry, as a maximum does
            continue
        for dtype in (np.float32, np.float64):
            leaves = [leaf(a, dtype) for a in example.inputs]
            y = example.call(OPS[name], *leaves)
            y.backward(dev(np.ones(y.shape), y.dtype))
            calls += 1
            assert y.dtype == dtype
            for t in leaves:
                assert t.grad is None or (t.grad.shape == t.shape and t.grad.dtype == dtype)
    assert calls or name in HAS_ITS_OWN_TEST

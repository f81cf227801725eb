"""Masks and indices of every dtype: values and gradients are those of Booleans and of int64, or the call is refused.

Masks of Hugging Face are int64, labels of images uint8, ids in a file uint16. The tests run the definitions and the
kernels.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import dev, host, leaf

from tinyft import GPT, GPTConfig, PromptTuning, Tensor, array, attach, ops
from tinyft import functional as F

pytestmark = pytest.mark.usefixtures("with_and_without_kernels")
RNG = np.random.default_rng(0)
A = RNG.standard_normal((2, 3)).astype(np.float32)
B = RNG.standard_normal((2, 3)).astype(np.float32)
W = RNG.standard_normal((300, 4)).astype(np.float32)
QKV = RNG.standard_normal((3, 2, 2, 3, 4)).astype(np.float32)                    # three of (B, H, T, D)
LOGITS = RNG.standard_normal((2, 3, 5)).astype(np.float32)
MASK = np.array([[True, False, True], [False, True, True]])
IDS = np.array([[2, 0, 250], [1, 1, 0]])                 # 250 + 6 overflows uint8, and so does −1
SMALL_IDS = np.array([[2, 0, 1], [1, 1, 0]])


def tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [leaf(a) for a in arrays]


def model_with_a_prompt() -> Any:
    model = GPT(GPTConfig(300, 8, 8, 1, 2), seed=0)
    attach(model, PromptTuning(p=2))
    return model


# ── the calls: f(mask) or f(ids) -> (the value, the tensors that get gradients) ──────────────────────────────────────
def where(mask: Any) -> tuple:
    a, b = tensors(A, B)
    return ops.where(mask, a, b), [a, b]


def where_of_numbers(mask: Any) -> tuple:
    a, = tensors(A)
    return ops.where(mask, 0.0, a), [a]


def key_mask(mask: Any) -> tuple:
    q, k, v = tensors(*QKV)
    return ops.attention(q, k, v, key_mask=reshaped(mask, (2, 1, 1, 3))), [q, k, v]


def key_mask_and_causal(mask: Any) -> tuple:
    q, k, v = tensors(*QKV)
    return ops.attention(q, k, v, key_mask=reshaped(mask, (2, 1, 1, 3)), causal=True), [q, k, v]


def dropout_mask(mask: Any) -> tuple:
    q, k, v = tensors(*QKV)
    return ops.attention(q, k, v, dropout_mask=reshaped(mask, (2, 1, 1, 3))), [q, k, v]


def key_mask_of_softmax_attention(mask: Any) -> tuple:
    q, k, v = tensors(*QKV)
    return F.softmax_attention(q, k, v, key_mask=reshaped(mask, (2, 1, 1, 3)), causal=False), [q, k, v]


def mask_of_a_model(mask: Any) -> tuple:
    model = model_with_a_prompt()
    return model(dev(SMALL_IDS), mask=mask), list(model.parameters())


def times(mask: Any) -> tuple:
    a, = tensors(A)
    return a * as_operand(mask, a), [a]


def minus(mask: Any) -> tuple:
    a, = tensors(A)
    return as_operand(mask, a) - a, [a]


def greater(mask: Any) -> tuple:
    a, = tensors(A)
    return ops.maximum(a, as_operand(mask, a)), [a]


def product(mask: Any) -> tuple:
    w = leaf(W[:3])
    return as_operand(mask, w) @ w, [w]                      # (2, 3) @ (3, 4)


def straight_through(mask: Any) -> tuple:
    a, = tensors(A)
    return ops.straight_through(mask, a), [a]


def embedding(ids: Any) -> tuple:
    w, = tensors(W)
    return ops.embedding(w, ids), [w]


def rows(ids: Any) -> tuple:
    w, = tensors(W)
    return w[ids], [w]


def entries(ids: Any) -> tuple:
    x = leaf(np.tile(W, (1, 1, 1)))
    return x[0, ids], [x]


def gather(ids: Any) -> tuple:
    x = leaf(np.arange(600, dtype=np.float32).reshape(2, 300))
    return ops.gather(x, ids), [x]


def labels(ids: Any) -> tuple:
    z, = tensors(LOGITS)
    return ops.cross_entropy(z, small(ids)), [z]


def labels_with_weights(ids: Any) -> tuple:
    z, = tensors(LOGITS)
    return ops.cross_entropy(z, small(ids), dev(np.arange(1, 6)), label_smoothing=0.1), [z]


def labels_and_an_ignored_one(ids: Any) -> tuple:
    z, = tensors(LOGITS)
    return ops.cross_entropy(z, small(ids), ignore_index=1), [z]


def ids_under_a_prompt(ids: Any) -> tuple:
    model = model_with_a_prompt()
    return model(ids), list(model.parameters())


def token_type_ids(ids: Any) -> tuple:
    model = model_with_a_prompt()
    return model(dev(SMALL_IDS), token_type_ids=ids), list(model.parameters())


TAKE_MASKS = [where, where_of_numbers, key_mask, key_mask_and_causal, dropout_mask, key_mask_of_softmax_attention,
              mask_of_a_model, times, minus, greater, product, straight_through]
TAKE_INDICES = [embedding, rows, entries, gather, labels, labels_with_weights, labels_and_an_ignored_one,
                ids_under_a_prompt, token_type_ids]
WHOLE = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


def reshaped(mask: Any, shape: tuple) -> Any:
    """A list, a tensor or an array in this shape."""
    if isinstance(mask, list):
        return np.reshape(mask, shape).tolist()
    return Tensor(mask.data.reshape(shape)) if isinstance(mask, Tensor) else mask.reshape(shape)


def as_operand(mask: Any, a: Tensor) -> Any:
    """The mask; Booleans, which have no difference and no maximum with numbers, as numbers."""
    is_bool = array.is_array(mask) and mask.dtype == bool
    return mask.astype(a.dtype) if is_bool else mask


def small(ids: Any) -> Any:
    """Labels below 5: 250 is 0 modulo 5."""
    if isinstance(ids, list):
        return (np.array(ids) % 5).tolist()
    return Tensor(ids.data % 5) if isinstance(ids, Tensor) else ids % 5


def results(f: Callable, argument: Any) -> list[np.ndarray]:
    """The value of the call, and its gradients for a gradient that differs in each entry."""
    y, leaves = f(argument)
    y.backward(dev(np.cos(np.arange(y.size)).reshape(y.shape), y.dtype))
    return [host(y), *(host(t.grad) for t in leaves if t.grad is not None)]


def same(f: Callable, argument: Any, reference: Any) -> None:
    for got, want in zip(results(f, argument), results(f, reference), strict=True):
        assert got.dtype == want.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [*WHOLE, "float16", "float32", "float64", "list", "tensor"])
@pytest.mark.parametrize("f", TAKE_MASKS, ids=lambda f: f.__name__)
def test_a_mask_of_any_dtype_is_the_mask_of_booleans(f, dtype):
    if f is mask_of_a_model and dtype == "tensor":
        pytest.skip("a model takes arrays and lists")
    masks = {"list": MASK.astype(int).tolist(), "tensor": Tensor(dev(MASK.astype(np.int64)))}
    mask = masks[dtype] if dtype in masks else dev(MASK.astype(dtype))
    if f in (times, minus, greater, product, straight_through) and dtype == "float64":
        pytest.skip("a float64 array makes the result float64, as in NumPy and PyTorch")
    same(f, mask, dev(MASK))


@pytest.mark.parametrize("dtype", [*WHOLE, "list", "tensor"])
@pytest.mark.parametrize("f", TAKE_INDICES, ids=lambda f: f.__name__)
def test_indices_of_any_dtype_are_those_of_int64(f, dtype):
    if f in (ids_under_a_prompt, token_type_ids) and dtype == "tensor":
        pytest.skip("a model takes arrays and lists; a tensor in the place of ids holds embeddings")
    ids = SMALL_IDS if dtype == "int8" else IDS          # 250 is no int8
    others = {"list": ids.tolist(), "tensor": Tensor(dev(ids))}
    same(f, others[dtype] if dtype in others else dev(ids.astype(dtype)), dev(ids))


def test_by_hand():
    """The example of a user, and a row that an 8-bit −1 would miss."""
    a = leaf([1.0, 2.0], np.float32)
    b = leaf([3.0, 4.0], np.float32)
    ops.where(dev(np.array([1, 0])), a, b).sum().backward()
    assert host(a.grad).tolist() == [1, 0]
    assert host(b.grad).tolist() == [0, 1]
    w = leaf(W)
    ops.embedding(w, dev(np.array([-1, 299, -300], np.int16))).sum().backward()
    assert host(w.grad)[299, 0] == 2
    assert host(w.grad)[0, 0] == 1
    assert host(w.grad).sum() == 12


@pytest.mark.parametrize("scalar", [np.float64(2), np.float32(2), np.int64(2), np.uint8(2)], ids=lambda s: s.dtype.name)
def test_a_number_of_numpys_does_not_widen(scalar):
    """As in PyTorch: np.sqrt(2) is a float64, and would make the product with a float32 array float64."""
    for y in (leaf(A) * scalar, scalar + leaf(A), leaf(A) / scalar, ops.maximum(leaf(A), scalar)):
        assert y.dtype == np.float32


def test_a_list_of_floats_takes_the_dtype_beside_it():
    """As a single Python float does; [0.5, 2.0] alone would be float64."""
    q = leaf(np.ones((1, 2, 2), np.float32))
    results = [
        leaf(A) * [0.5, 2.0, 1.0], [0.5, 2.0, 1.0] + leaf(A), ops.attention(q, q, q, [[0.0, -1.0], [0.5, 0.0]]),
        ops.cross_entropy(leaf(A), dev([0, 1]), weight=[1.0, 2.0, 0.5]),
    ]
    assert [y.dtype for y in results] == [np.float32] * 4


def test_booleans_select():
    x = leaf(A)
    y = x[dev(MASK)]
    y.backward(dev(np.arange(1, 5), np.float32))
    assert host(y).tolist() == A[MASK].tolist()
    assert host(x.grad).tolist() == [[1, 0, 2], [0, 3, 4]]


def test_a_batch_of_no_ids():
    w = leaf(W)
    y = ops.embedding(w, [])
    assert y.shape == (0, 4)
    y.sum().backward()
    assert not host(w.grad).any()


@pytest.mark.parametrize("f", [where, key_mask, key_mask_of_softmax_attention, mask_of_a_model],
                         ids=lambda f: f.__name__)
@pytest.mark.parametrize("wrong", [2, -1, -np.inf, np.nan, 0.5], ids=str)
def test_numbers_that_are_no_mask_are_refused(f, wrong):
    """A mask of 0 and −∞ is a bias: read as Booleans it would hide what it is to show."""
    if array.backend() == "cupy":
        pytest.skip("to look into a device array is to wait for the device")
    mask = MASK.astype(np.float32)
    mask[0, 1] = wrong
    with pytest.raises(ValueError, match=r"wants True .*, (or 1 and 0; )?got"):
        f(mask.tolist())


@pytest.mark.parametrize("f", TAKE_INDICES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bool"])
def test_numbers_that_are_no_indices_are_refused(f, dtype):
    if f in (rows, entries) and dtype == "bool":
        pytest.skip("Booleans select entries")
    wrong = SMALL_IDS > 0 if dtype == "bool" else SMALL_IDS.astype(dtype)
    if f in (labels, labels_with_weights, labels_and_an_ignored_one) and dtype == "bool":
        with pytest.raises(TypeError, match="labels wants whole numbers, got bool"):
            ops.cross_entropy(leaf(LOGITS), dev(wrong))
        return
    with pytest.raises(TypeError, match=r"whole numbers|integers"):
        f(dev(wrong))


@pytest.mark.parametrize("call, words", [
    (lambda: ops.embedding(leaf(W), [[1], [1, 2]]), "ids wants rows of one length"),
    (lambda: ops.where([[1], [1, 0]], leaf(A), leaf(B)), "the condition wants rows of one length"),
    (lambda: ops.where(["yes", "no", "no"], leaf(A), leaf(B)), "the condition wants True and False"),
    (lambda: leaf(A)[1.5], "an index wants integers, slices"),
    (lambda: leaf(A)["a"], "an index wants integers, slices"),
    (lambda: ops.attention(*tensors(*QKV), dev(np.ones((3, 3), bool))), "key_mask="),
], ids=range(6))
def test_one_sentence_says_what_is_wanted(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call()

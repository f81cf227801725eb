"""Mixed precision: an op on 16-bit inputs computes in float32 and rounds once; autocast follows its tables; training in
16 bits follows training in float32.

Each `check_*` must accept the library and reject the wrong answers that stand beside it.
"""
from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import dev, host, leaf, quality, wrong_answers
from hypothesis import given
from hypothesis import strategies as st
from test_ops import EVERY_OP, Example, examples
from test_wrong import draws

import tinyft as ft
from tinyft import (
    GPT,
    AdamW,
    CannotCapture,
    GPTConfig,
    GradScaler,
    Tensor,
    array,
    autocast,
    dispatch,
    fit,
    ops,
    optim,
    precision,
    tensor,
    train,
)
from tinyft.array import bfloat16
from tinyft.kernels.cuda import casts
from tinyft.optim import scaler as scaler_module
from tinyft.optim.optimizers import Optimizer, clip_norm
from tinyft.precision import HALVES, LOSSES, MIXING, PICKS, PRODUCTS, SUMS, VIEWS, has_16_bit, rounded, to_float32
from tinyft.tensor import OPS

F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)
ULP = {F16: 2.0**-10, bfloat16: 2.0**-7}
both_dtypes = pytest.mark.parametrize("dtype", [F16, bfloat16], ids=str)
# On a device, products add in another order, and attention rounds its probabilities to 16 bits.
EXACT = array.backend() != "cupy"
slow_when_emulated = pytest.mark.skipif(
    "emulate" in sys.modules, reason="minutes on the emulated GPU; emulated/test_on_cupy.py trains in 16 bits",
)


def is_same(a: Any, b: Any, dtype: np.dtype, name: str = "") -> bool:
    """True for equal dtypes, shapes and values.

    On a device, values may differ by 4 ulp of the largest one. For attention, by 4 ulp of at least 1: its rounded
    probabilities are factors of sums that cancel.
    """
    a = host(a)
    b = host(b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a = to_float32(a)
    b = to_float32(b)
    if EXACT:
        return np.array_equal(a, b, equal_nan=True)
    largest = np.abs(b).max(initial=name == "attention")
    return bool(np.abs(a - b).max(initial=0) <= 4 * ULP[dtype] * largest + 1e-6)


def on_rounded(name: str, dtype: np.dtype) -> Callable[..., Tensor]:
    """The op, with its arrays (weights, dropout factors) rounded to `dtype` and widened to float32."""
    def rounded_in_float32(a: Any) -> Any:
        return to_float32(rounded(a, dtype)) if array.is_array(a) and a.dtype.kind == "f" else a

    def call(*args: Any, **kwargs: Any) -> Tensor:
        return OPS[name](*map(rounded_in_float32, args), **{k: rounded_in_float32(a) for k, a in kwargs.items()})
    return call


def make_covector(shape: tuple, dtype: np.dtype, seed: int) -> np.ndarray:
    """Random numbers that float16, and so float32, hold exactly."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16).astype(dtype)


def run_op(op: Callable[..., Tensor], e: Example, leaves: list[Tensor], seed: int) -> list[Any]:
    """The value of an op and the gradients of its inputs, for a covector of the value's dtype."""
    y = e.call(op, *leaves)
    y.backward(dev(make_covector(y.shape, y.dtype, seed)))
    return [y, *(p.grad for p in leaves)]


# ── an op ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def check_rounds_once(name: str, e: Example, dtype: np.dtype) -> None:
    """The value on 16-bit inputs is the float32 value, rounded once. The value of a loss is not rounded."""
    narrow_leaves = [leaf(a, dtype) for a in e.inputs]
    wide_leaves = [leaf(to_float32(host(p))) for p in narrow_leaves]
    y, *gradients = run_op(OPS[name], e, narrow_leaves, 1)
    assert y.dtype == (F32 if name in LOSSES else dtype), f"the value is {y.dtype}"
    z = e.call(on_rounded(name, dtype), *wide_leaves)
    z.backward(dev(to_float32(make_covector(y.shape, y.dtype, 1))))
    want = host(z) if name in LOSSES else rounded(host(z), dtype)
    assert is_same(y, want, dtype, name), "value"
    for i, (g, p) in enumerate(zip(gradients, wide_leaves, strict=True)):
        assert (g is None) == (p.grad is None), f"gradient {i}"
        assert g is None or is_same(g, host(p.grad), dtype, name), f"gradient {i}"


@pytest.mark.parametrize("name", EVERY_OP)
@given(st.data())
def test_an_op_sums_in_float32_and_rounds_once(name, data):
    e, _, _ = data.draw(examples(name))
    for dtype in (F16, bfloat16):
        check_rounds_once(name, e, dtype)


# mistake: (op that shows it, attribute of precision.py, its wrong value)
WRONG_OPS = {
    "the definitions compute in 16 bits": ("layer_norm", "has_16_bit", lambda arrays: False),
    "the value stays in float32": ("tanh", "rounded", lambda a, dtype: a),
    "a loss is rounded like any value": ("cross_entropy", "LOSSES", set()),
    "the gradient of picked entries is not a sum": ("embedding", "VIEWS", VIEWS | PICKS),
}


@pytest.mark.skipif(array.backend() != "numpy", reason="the mistakes are made in the NumPy backend")
@pytest.mark.parametrize("mistake", WRONG_OPS)
def test_a_wrong_treatment_of_16_bits_is_rejected(mistake, monkeypatch):
    name, attribute, wrong = WRONG_OPS[mistake]
    with ft.kernels.definitions():
        monkeypatch.setattr(precision, attribute, wrong)
        assert is_rejected(check_rounds_once, name)


def is_rejected(check: Callable[[str, Example, np.dtype], None], name: str) -> bool:
    """True if the check fails for one of the op's examples."""
    for e, _, _ in draws(name):
        try:
            check(name, e, bfloat16)
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("gradient", [None, [0.1]])
@both_dtypes
def test_the_gradient_of_a_16_bit_leaf_is_float32_where_backward_starts_at_it(dtype, gradient):
    x = Tensor(dev(np.ones(1).astype(dtype)), requires_grad=True)
    x.backward(gradient)
    assert x.grad.dtype == np.float32
    assert host(x.grad)[0] == np.float32(1 if gradient is None else 0.1)


def test_256_plus_1_in_bfloat16():
    """bfloat16 has no 257. Sums of the library are right all the same, a running sum in bfloat16 is not."""
    ones = Tensor(dev(np.ones(1000), bfloat16))
    total = Tensor(dev([256.0], bfloat16)) + Tensor(dev([1.0], bfloat16))
    assert float(total.data[0]) == 256
    assert float(ones.sum().data) == 1000
    assert ones.sum().dtype == bfloat16
    assert float(ops.cumsum(ones).data[-1]) == 1000
    of_bias = tensor.sum_to(dev(np.ones((1000, 2)), bfloat16), (2,))             # over a batch
    assert host(of_bias).tolist() == [1000, 1000]
    running = np.ones(2, bfloat16)
    for row in np.ones((999, 2), bfloat16):
        running += row
    assert running.tolist() == [256, 256]


# ── autocast ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_every_name_in_the_tables_is_an_op_and_stands_in_one_table():
    tables = [PRODUCTS, SUMS, LOSSES, VIEWS, PICKS, MIXING]
    names = set().union(*tables)
    assert names <= OPS.keys()
    assert len(names) == sum(map(len, tables))
    assert {n for n in OPS if "matmul" in n or "linear" in n} <= PRODUCTS        # a new product is not forgotten


def check_policy(name: str, e: Example, dtype: np.dtype) -> None:
    """Autocast rounds the float32 inputs of products and widens the 16-bit inputs of sums. Other ops do not change."""
    def run(leaf_dtype: np.dtype, *, rounds: bool = False) -> list:
        """Value and gradients for leaves of this dtype; with `rounds`, their values are rounded to `dtype` before."""
        leaves = [leaf(a.astype(dtype) if rounds else a, leaf_dtype) for a in e.inputs]
        return run_op(OPS[name], e, leaves, 2)

    with autocast(dtype):
        of_float32 = run(F32)
        of_16 = run(dtype)
    if name in PRODUCTS:
        want = run(dtype)
        assert of_float32[0].dtype == dtype, "product"
        assert is_same(of_float32[0], want[0], dtype, name), "product"
        for a, b in zip(of_float32[1:], want[1:]):                               # gradients are not rounded
            assert a.dtype == F32, "gradient of a factor"
            assert is_same(a, b, dtype, name), "gradient of a factor"
    else:
        assert all(is_same(a, b, dtype) for a, b in zip(of_float32, run(F32))), "not a product"
    want = run(F32, rounds=True) if name in SUMS else run(dtype)
    assert is_same(of_16[0], want[0], dtype, name), "of 16 bits"
    for a, b in zip(of_16[1:], want[1:]):
        assert a.dtype == F32, "gradient of 16 bits"
        assert is_same(a, b, dtype, name), "gradient of 16 bits"


@pytest.mark.parametrize("name", EVERY_OP)
@given(st.data())
def test_autocast_follows_its_tables(name, data):
    e, _, _ = data.draw(examples(name))
    for dtype in (F16, bfloat16):
        check_policy(name, e, dtype)


def round_all(name: str, arrays: list, kwargs: dict) -> tuple[list, dict]:
    """Wrong: every op gets 16-bit inputs."""
    return [rounded(a, bfloat16) for a in arrays], kwargs


def round_none(name: str, arrays: list, kwargs: dict) -> tuple[list, dict]:
    """Wrong: no op gets other inputs."""
    return arrays, kwargs


WRONG_POLICIES = {
    "softmax in 16 bits": ("softmax", "cast_inputs", round_all),
    "products in float32": ("matmul", "cast_inputs", round_none),
    "sums of 16-bit inputs in 16 bits": ("sum", "SUMS", set()),
    "the input of an activation is cast": ("tanh", "PRODUCTS", PRODUCTS | {"tanh"}),
}


@wrong_answers
@pytest.mark.parametrize("mistake", WRONG_POLICIES)
def test_another_policy_is_rejected(mistake, monkeypatch):
    name, attribute, wrong = WRONG_POLICIES[mistake]
    monkeypatch.setattr(precision, attribute, wrong)
    assert is_rejected(check_policy, name)


def test_autocast_leaves_float64_and_integers_alone():
    a = leaf(np.ones((2, 3)))
    b = leaf(np.ones((3, 2)))
    with autocast():
        assert (a @ b).dtype == np.float64
        assert a.sum().dtype == np.float64
        assert Tensor(dev([1, 2])).sum().dtype.kind == "i"


def test_autocast_holds_for_one_thread_nests_and_ends():
    x = Tensor(dev(np.ones((2, 2)), F32))
    in_thread = []

    def product() -> np.dtype:
        """The dtype of a product here."""
        return (x @ x).dtype

    with autocast("float16"):
        thread = threading.Thread(target=lambda: in_thread.append(product()))
        thread.start()
        thread.join()
        with autocast("bfloat16"):
            assert product() == bfloat16
            with autocast(enabled=False):
                assert product() == F32
            assert product() == bfloat16
        assert product() == F16
        with contextlib.suppress(KeyError), autocast():
            raise KeyError
        assert product() == F16
    assert product() == F32
    assert in_thread == [F32]

    @autocast("bfloat16")
    def step() -> Any:
        return product()
    assert step() == step() == bfloat16
    assert product() == F32


def test_autocast_refuses_other_dtypes():
    for wrong in ("float32", "int8", np.float64, "fp16", None, {}, [], 16, True):
        with pytest.raises(TypeError, match="autocast computes in float16 or bfloat16, got"), autocast(wrong):
            pass
    with pytest.raises(TypeError, match="float16 or bfloat16, got 'fp16'"):
        fit(small(), [TOKENS], 1, autocast="fp16")
    with pytest.raises(TypeError, match="enabled wants True or False, got 'no'"), autocast(enabled="no"):
        pass


@both_dtypes
def test_under_autocast_weights_and_their_gradients_stay_in_float32(dtype):
    model = small()
    with autocast(dtype):
        logits = model(TOKENS[:, :-1])
        loss = ops.cross_entropy(logits, dev(TOKENS[:, 1:]))
    assert logits.dtype == dtype
    assert loss.dtype == F32
    loss.backward()
    assert all(p.dtype == p.grad.dtype == F32 for p in model.parameters())
    gradient = host(model.blocks[0].mlp.up.weight.grad)
    assert not np.array_equal(gradient, to_float32(rounded(gradient, dtype))), "the sum was rounded on the way"


def check_casts_follow_updates(dtype: np.dtype) -> None:
    """Two weights of one optimiser: a pass under autocast uses their present values, rounded."""
    p = leaf(np.linspace(-1, 1, 12).reshape(4, 3), F32)
    q = leaf(np.linspace(2, 3, 12).reshape(4, 3), F32)
    x = Tensor(dev(np.eye(3), F32))
    sevens = np.full((3, 4), 7.0, dtype)
    optimizer = ft.SGD(0.5).start({"p": p, "q": q})
    with autocast(dtype):
        for step in range(3):
            for w in (q, p):
                assert is_same(ops.linear(x, w), rounded(host(w).T, dtype), dtype), step
            p.grad = dev(np.ones((4, 3)), F32)
            q.grad = dev(-np.ones((4, 3)), F32)
            optimizer.step()
        with autocast(dtype):
            q.copy_(np.full((4, 3), 7.0))
            assert is_same(ops.linear(x, q), sevens, dtype)
        assert is_same(ops.linear(x, q), sevens, dtype), "written to in an inner region that has ended"
    assert precision.autocast_state.cache is None


def cast_flat_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cast parameters as on a device: all parameters of an optimiser together."""
    monkeypatch.setitem(dispatch.KERNELS, (precision.cast_parameter, type(dev([0.0]))), [casts.cast_parameter])


@both_dtypes
def test_a_cast_weight_is_cast_again_after_a_write(dtype, monkeypatch):
    check_casts_follow_updates(dtype)
    cast_flat_arrays(monkeypatch)
    check_casts_follow_updates(dtype)
    monkeypatch.setattr(Tensor, "mark_written", lambda self: None)               # wrong: writes are not recorded
    with pytest.raises(AssertionError):
        check_casts_follow_updates(dtype)


def test_the_weights_of_an_optimiser_are_cast_together():
    """The 16-bit copies lie end to end in one array: 2·3 numbers of two bytes each."""
    weights = {n: leaf(np.ones((2, 3)), F32) for n in "abc"}
    x = Tensor(dev(np.ones((1, 3)), F32))
    optimizer = AdamW(0.1).start(weights)
    cast = []

    @precision.takes_16_bit
    def record(x, W, b=None):
        cast.append(W)
        return NotImplemented

    with pytest.MonkeyPatch.context() as m, autocast():
        cast_flat_arrays(m)
        m.setitem(dispatch.KERNELS, (ops.linear, type(x.data)), [record])
        for p in weights.values():
            ops.linear(x, p)
    assert [array.address(w) - array.address(cast[0]) for w in cast] == [0, 12, 24]
    assert cast[0].base.size == optimizer.groups[0].w.size


@both_dtypes
def test_detect_anomaly_names_ops_in_16_bits(dtype):
    x = Tensor(dev([60000.0, 1.0], F32), requires_grad=True)
    with ft.detect_anomaly(), pytest.raises(FloatingPointError, match="reshape|mul"):
        ops.reshape(Tensor(dev([np.inf], dtype)), (1, 1))
    with ft.detect_anomaly():
        (x * 2.0).sum().backward()


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────
TOKENS = np.random.default_rng(5).integers(0, 19, (6, 13))


def small(seed: int = 1) -> GPT:
    """A GPT of two layers."""
    return GPT(GPTConfig(19, 12, 16, 2, 2), seed=seed)


@functools.cache
def loss_curve(autocast: Any = None, dtype: Any = None) -> np.ndarray:
    """The losses of 120 steps, under autocast or with a model of this dtype. The caller leaves them as they are."""
    model = small()
    if dtype is not None:
        model.to(dtype=dtype)
    return np.array(fit(model, [TOKENS], 120, AdamW(0.003), autocast=autocast, progress=False).losses)


def check_follows_float32(losses: np.ndarray, reference: np.ndarray) -> None:
    """The loss differs from float32's by 1 % of the first loss in 20 steps, then by 5 %: small differences grow."""
    assert reference[-1] < reference[0] / 4, "the reference must learn something"
    difference = np.abs(losses - reference)
    assert difference[:20].max() < 0.01 * reference[0]
    assert difference.max() < 0.05 * reference[0]


@quality
@slow_when_emulated
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", np.float16])
def test_training_under_autocast_follows_float32(dtype):
    check_follows_float32(loss_curve(autocast=dtype), loss_curve())


@quality
@slow_when_emulated
@both_dtypes
def test_training_a_model_in_16_bits_follows_float32(dtype):
    check_follows_float32(loss_curve(dtype=dtype), loss_curve())


@quality
@slow_when_emulated
def test_without_master_weights_small_steps_are_lost(monkeypatch):
    """Steps of 0.00003 on weights of about 0.1: there, bfloat16 numbers are 0.0005 apart."""
    ids = np.random.default_rng(0).integers(0, 2048, (4, 17))

    def gain(dtype: Any) -> float:
        model, _ = ft.load("base-gpt-small")
        losses = fit(model.to(dtype=dtype), [ids], 40, AdamW(3e-5), progress=False).losses
        return losses[0] - losses[-1]

    reference = gain(F32)
    assert reference > 2
    assert gain(bfloat16) > 0.9 * reference
    monkeypatch.setattr(optim.optimizers, "HALVES", set())                       # wrong: no master weights
    assert gain(bfloat16) < 0.2 * reference


# ── weights in 16 bits and their master weights ──────────────────────────────────────────────────────────────────────
def take_steps(optimizer: Optimizer, p: Tensor, n: int) -> None:
    """n steps in which every entry of the gradient is 1."""
    for _ in range(n):
        p.grad = dev(np.ones(p.shape), p.dtype)
        optimizer.step()


@both_dtypes
def test_a_thousand_steps_too_small_for_16_bits_add_up(dtype):
    p = leaf(np.ones((2, 3)), dtype)
    optimizer = ft.SGD(2.0**-15).start({"p": p})
    take_steps(optimizer, p, 1000)
    group, = optimizer.groups
    assert p.dtype == dtype
    assert group.w.dtype == group.moments[0].dtype == F32
    assert np.allclose(host(group.w), 1 - 1000 * 2.0**-15, rtol=1e-6)
    assert np.array_equal(host(p), rounded(host(group.w), dtype).reshape(2, 3))


@both_dtypes
def test_the_master_weights_follow_a_write_to_the_tensor(dtype):
    fives = np.full((2, 3), 5.0)

    def copy_values(p: Tensor) -> None:
        p.copy_(fives)

    def replace_data(p: Tensor) -> None:
        p.data = dev(fives, dtype)

    for write in (copy_values, replace_data):
        p = leaf(np.ones((2, 3)), dtype)
        optimizer = ft.SGD(2.0**-15).start({"p": p})
        take_steps(optimizer, p, 3)
        write(p)
        take_steps(optimizer, p, 1)
        assert np.allclose(host(optimizer.groups[0].w), 5 - 2.0**-15, rtol=1e-7)


@both_dtypes
def test_a_mask_freezes_the_rounded_and_the_master_value(dtype):
    p = leaf(np.full((2, 3), 1.5), dtype)
    trainable = np.array([[True, False, True]] * 2)
    p.mask = dev(trainable)
    optimizer = AdamW(0.1).start({"p": p})
    take_steps(optimizer, p, 3)
    group, = optimizer.groups
    assert np.array_equal(host(p).astype(np.float32) != 1.5, trainable)
    assert np.array_equal(host(group.w).reshape(2, 3) != 1.5, trainable)
    for moment in group.moments:
        assert np.array_equal(host(moment).reshape(2, 3) != 0, trainable)


@both_dtypes
def test_an_optimiser_resumes_with_the_exact_master_weights(dtype):
    def run(steps: int, restart_at: int | None) -> tuple[np.ndarray, np.ndarray]:
        """The weights and master weights; the optimiser is started again, from its state, before one step."""
        p = leaf(np.linspace(-1, 1, 40000).reshape(200, 200), dtype)             # a large tensor
        q = leaf(np.ones(3), dtype)                                              # a small one
        tensors = {"p": p, "q": q}
        optimizer = AdamW(1e-4, weight_decay=0.1).start(tensors)
        for i in range(steps):
            if i == restart_at:
                state = optimizer.state_dict()
                values = {n: np.array(host(x)) for n, x in tensors.items()}
                for x in tensors.values():
                    x.copy_(np.zeros(x.shape))
                optimizer = AdamW(1e-4, weight_decay=0.1).start(tensors)
                for n, x in tensors.items():
                    x.copy_(values[n])
                optimizer.load_state_dict({k: np.array(a) for k, a in state.items()})
            for x in tensors.values():
                x.grad = dev(np.cos(np.arange(x.size) + i).reshape(x.shape), dtype)
            optimizer.step(clip=1.0)
        return np.array(host(p)), np.concatenate([host(g.w) for g in optimizer.groups])

    for a, b in zip(run(8, None), run(8, 4)):
        assert np.array_equal(a, b)


@both_dtypes
def test_gradients_accumulate_in_float32(dtype):
    """300 uses of a weight in one pass, and 300 passes.

    A bfloat16 sum would stay at 256; in float16, the sum of three of these gradients overflows.
    """
    size = 1.0 if dtype == bfloat16 else 30000.0
    p = leaf(np.ones(1), dtype)
    q = leaf(np.ones(1), dtype)
    total = Tensor(dev([0.0], F32))
    for _ in range(300):
        total = total + p
        (q * 1.0).backward(dev([size], dtype))
    total.backward(dev([size], F32))
    assert p.grad.dtype == q.grad.dtype == F32
    assert float(p.grad[0]) == float(q.grad[0]) == 300 * size


def sum_with_pullback(pullback: Callable) -> Callable[..., Tensor]:
    """The op a + b with this joint pullback. It does not stay in the table of ops."""
    @tensor.op("... , ... -> ...")
    def pair(a, b):
        return a + b, pullback
    del OPS["pair"]
    return pair


@both_dtypes
def test_a_gradient_that_two_inputs_share_is_not_added_to_in_place(dtype):
    """The pullback returns one array for two inputs, of which one has another use: earlier or later in backward."""
    for pullback in (lambda g, needed: (g, g), lambda g, needed: (g, g.reshape(g.shape)), lambda g, needed: (g, None)):
        pair = sum_with_pullback(pullback)
        for shape in ((3,), ()):
            for pair_is_first in (True, False):
                a = leaf(np.ones(shape), dtype)
                b = leaf(np.ones(shape), dtype)
                total = pair(a, b) + a * 4.0 if pair_is_first else a * 4.0 + pair(a, b)
                total.sum().backward()
                assert (host(a.grad) == 5).all()
                assert b.grad is None or (host(b.grad) == 1).all()


@pytest.mark.parametrize("name", [n for n in EVERY_OP if n not in MIXING])
@given(st.data())
def test_with_a_float32_input_nothing_is_rounded(name, data):
    """The first input in 16 bits, all others in float32: the value and the gradients are those of float32."""
    e, _, _ = data.draw(examples(name))
    first, *rest = e.inputs
    if not rest:
        return
    float32_leaves = [leaf(a, F32) for a in rest]
    op = on_rounded(name, bfloat16)
    y, *got = run_op(op, e, [leaf(first, bfloat16), *float32_leaves], 3)
    float32_leaves = [leaf(a, F32) for a in rest]
    z, *want = run_op(op, e, [leaf(to_float32(first.astype(bfloat16))), *float32_leaves], 3)
    assert y.dtype == F32
    for a, b in zip([y, *got], [z, *want], strict=True):
        assert (a is None and b is None) or is_same(a, b, bfloat16)


def test_views_and_mixed_sums_make_no_float32_copy(monkeypatch):
    x = Tensor(dev(np.ones((4, 3)), bfloat16))
    y = Tensor(dev(np.ones((4, 3)), F32))
    widened = []

    def record(a: Any) -> Any:
        widened.append(a)
        return to_float32(a)

    monkeypatch.setattr(precision, "to_float32", record)
    m = array.xp(x.data)
    assert m.may_share_memory(x[1:3].data, x.data)
    assert m.may_share_memory(x.T.data, x.data)
    assert (x + y).dtype == (x * y).dtype == (y - x).dtype == F32
    assert not widened
    assert (x + x).dtype == bfloat16
    assert widened


@both_dtypes
def test_an_op_with_several_values_rounds_each(dtype, rng):
    """q, k, v together are three linear maps, in values and gradients. An unused value sends no gradient back."""
    shapes = [(2, 5, 6), (4, 6), (4,), (4, 6), (4,), (4, 6), (4,)]
    narrow = [leaf(rng.standard_normal(shape), dtype) for shape in shapes]
    wide = [leaf(to_float32(host(p))) for p in narrow]
    G = rng.standard_normal((2, 2, 5, 2)).astype(dtype)
    for used in ((0, 1, 2), (1,)):
        ys = ops.project(*narrow, heads=2)
        zs = ops.project(*wide, heads=2)
        for i in used:
            ys[i].backward(dev(G), retain_graph=True)
            zs[i].backward(dev(to_float32(G)), retain_graph=True)
        assert all(is_same(y, rounded(host(z), dtype), dtype) for y, z in zip(ys, zs, strict=True))
        for p, q in zip(narrow, wide, strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or is_same(p.grad, host(q.grad), dtype)
            p.grad = None
            q.grad = None
    q, k, v = ops.project(*narrow, heads=2)
    (q.sum() + v.sum()).backward()
    assert narrow[0].grad.dtype == F32
    of_k = narrow[3].grad
    assert of_k is None or not host(of_k).any()


def test_a_weight_with_another_layout_is_cast_alone():
    """Views of a flat array whose entries are not in the array's order, or not all of them."""
    flat = dev(np.arange(12) / 8, F32)
    x = Tensor(dev(np.eye(4), F32))
    views = [
        flat.reshape(3, 4).T,
        flat.reshape(4, 3)[::-1],
        flat.reshape(4, 3)[:, :2],
        flat.reshape(2, 6)[:, 1:5].reshape(4, 2),
    ]
    for view in views:
        with autocast():
            assert is_same(x @ Tensor(view), host(view).astype(bfloat16), bfloat16)


@pytest.mark.skipif(array.backend() != "numpy", reason="moves from NumPy to the strict backend and back")
@both_dtypes
def test_an_optimiser_follows_a_model_in_16_bits_to_another_device(dtype):
    def run(*route: str) -> tuple[np.ndarray, np.ndarray]:
        """Weights and master weights after one step on each of these backends."""
        p = leaf(np.linspace(1, 2, 6), dtype)
        optimizer = AdamW(1e-4).start({"p": p})
        for backend in route:
            p.data = array.to(p.data, backend)
            p.grad = array.to(np.cos(np.arange(6)).astype(np.float32), backend)
            optimizer.step()
            group, = optimizer.groups
            assert p.device == backend
            assert p.dtype == dtype
            assert p.data is group.views["p"]
            assert np.array_equal(host(p), rounded(host(group.w), dtype))
        return np.array(host(p)), np.array(host(group.w))

    for a, b in zip(run("numpy", "strict", "strict", "numpy"), run(*["numpy"] * 4)):
        assert np.allclose(to_float32(a), to_float32(b), rtol=1e-6)


def test_an_optimiser_refuses_tensors_of_another_dtype():
    model = small().to(dtype=bfloat16)
    optimizer = AdamW(0.01).start(ft.trained(model))
    model.to(dtype="float32")
    with pytest.raises(TypeError, match="were bfloat16 when it was started, and are float32 now"):
        optimizer.step()


def test_tensors_of_several_dtypes_have_one_norm():
    values = {"a": np.full((3, 2), 2.0), "b": np.full((4, 4), 1.0), "c": np.full((5,), 3.0)}
    dtypes = {"a": bfloat16, "b": F32, "c": F16}
    tensors = {n: leaf(v, dtypes[n]) for n, v in values.items()}
    optimizer = AdamW(0.01).start(tensors)
    for n, p in tensors.items():
        p.grad = dev(values[n], dtypes[n])
    norm = float(optimizer.step(clip=0.5))
    assert norm == pytest.approx((6 * 4 + 16 + 5 * 9)**0.5, rel=1e-6)
    for n, p in tensors.items():
        assert np.allclose(to_float32(host(p.grad)), values[n] * 0.5 / norm, rtol=0.01)


# ── the scale of the loss ────────────────────────────────────────────────────────────────────────────────────────────
def optimizer_arrays(optimizer: Optimizer) -> list[np.ndarray]:
    """Copies of the weights and moments of an optimiser."""
    return [np.array(host(a)) for group in optimizer.groups for a in (group.w, *group.moments)]


def train_with(scaler: GradScaler | None, clip: float | None) -> list[np.ndarray]:
    """Norms and gradients of four steps of a float32 model, and the weights and moments after them."""
    model = small()
    found = []
    optimizer = AdamW(0.01).start(ft.trained(model))
    for _ in range(4):
        loss = ops.cross_entropy(model(TOKENS[:, :-1]), dev(TOKENS[:, 1:]))
        if scaler is None:
            loss.backward()
            norm = optimizer.step(0.5, clip)
        else:
            scaler.scale(loss).backward()
            norm = scaler.step(optimizer, 0.5, clip)
        found.append(np.array(float(norm)))
        found += [np.array(host(p.grad)) for p in model.parameters()]
        if scaler is not None:
            scaler.update()
        optimizer.zero_grad()
    return found + optimizer_arrays(optimizer)


def check_scale_is_exact(make_scaler: Callable[..., GradScaler]) -> None:
    """A scale that is a power of two changes no bit of float32 training, with clipping and without."""
    for clip in (None, 0.05, 1e6):
        want = train_with(None, clip)
        scalers = [
            make_scaler(init_scale=2.0**12, growth_interval=2),
            make_scaler(init_scale=2.0**-3),
            make_scaler(init_scale=2.0),
        ]
        for scaler in scalers:
            got = train_with(scaler, clip)
            assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True)), clip


def check_overflow(make_scaler: Callable[..., GradScaler]) -> None:
    """After an overflow, no array has changed, no step is counted, S is halved, and the count of good steps is 0."""
    for bad in (np.inf, -np.inf, np.nan):
        p = leaf(np.ones((2, 3)), F32)
        q = leaf(np.ones(4), F32)
        optimizer = AdamW(0.1).start({"p": p, "q": q})
        scaler = make_scaler(init_scale=8.0, growth_interval=5)
        for value in (1.0, 1.0, 1.0, bad):
            p.grad = dev(np.full((2, 3), 8.0), F32)
            q.grad = dev(np.array([8.0, 8.0, value, 8.0]), F32)
            before = optimizer_arrays(optimizer)
            scaler.step(optimizer, clip=1.0)
            scaler.update()
        after = optimizer_arrays(optimizer)
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)), "an array has changed"
        assert optimizer.t == 3, "the step was counted"
        assert scaler.get_scale() == 4
        assert scaler.state_dict() == {"scale": 4.0, "good": 0}


def check_growth(make_scaler: Callable[..., GradScaler]) -> None:
    """S doubles after three good steps in a row, and the count begins again."""
    p = leaf(np.ones(2), F32)
    optimizer = AdamW(0.1).start({"p": p})
    scaler = make_scaler(init_scale=4.0, growth_interval=3)
    scales = []
    for overflow in (0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0):
        p.grad = dev(np.array([np.inf if overflow else 1.0, 1.0]), F32)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales == [4, 4, 8, 8, 4, 4, 4, 2, 1, 1, 1, 2, 2, 2, 4]
    assert optimizer.t == 12


SCALER_CHECKS = [check_scale_is_exact, check_overflow, check_growth]


@pytest.mark.parametrize("check", SCALER_CHECKS, ids=lambda f: f.__name__)
def test_the_scaler(check):
    check(GradScaler)


class NeverDivides(GradScaler):
    """Wrong: the gradients keep the scale, since it cancels in Adam's update."""
    def step(self, optimizer, factor=1.0, clip=None):
        return optimizer.step(factor, clip)


class ClipsFirst(GradScaler):
    """Wrong: clips the scaled gradients, then divides."""
    def step(self, optimizer, factor=1.0, clip=None):
        norm = clip_norm([p.grad for g in optimizer.groups for p in g.tensors.values()], clip)
        optimizer.step(factor, None, self.current_scale)
        return norm / self.current_scale


class ReturnsTheScaledNorm(GradScaler):
    """Wrong: returns the norm of the scaled gradients."""
    def step(self, optimizer, factor=1.0, clip=None):
        return super().step(optimizer, factor, clip) * self.current_scale


class ZeroesTheOverflow(GradScaler):
    """Wrong: sets the entries that are not finite to 0 and updates with the others."""
    def step(self, optimizer, factor=1.0, clip=None):
        for g in optimizer.groups:
            for p in g.tensors.values():
                m = array.xp(p.grad)
                p.grad = m.where(m.isfinite(p.grad), p.grad, 0)
        return super().step(optimizer, factor, clip)


class CountsTheStep(GradScaler):
    """Wrong: a skipped step counts for the optimiser."""
    def step(self, optimizer, factor=1.0, clip=None):
        norm = super().step(optimizer, factor, clip)
        optimizer.t += not self.finite
        return norm


class NeverBacksOff(GradScaler):
    """Wrong: S stays after an overflow."""
    def update(self):
        self.finite = True
        super().update()


class NeverGrows(GradScaler):
    """Wrong: S never doubles."""
    def update(self):
        super().update()
        self.good_steps = 0


class CountsAllGoodSteps(GradScaler):
    """Wrong: an overflow does not reset the count of good steps."""
    def update(self):
        good = self.good_steps
        super().update()
        if not self.finite:
            self.good_steps = good


class GrowsAtEveryStep(GradScaler):
    """Wrong: after the first doubling, S doubles at every good step."""
    def update(self):
        good = self.good_steps
        super().update()
        if self.good_steps < good and self.finite:
            self.good_steps = self.growth_interval - 1


WRONG_SCALERS = [
    NeverDivides, ClipsFirst, ReturnsTheScaledNorm, ZeroesTheOverflow, CountsTheStep, NeverBacksOff, NeverGrows,
    CountsAllGoodSteps, GrowsAtEveryStep,
]


@wrong_answers
@pytest.mark.parametrize("wrong", WRONG_SCALERS)
def test_a_wrong_scaler_is_rejected(wrong):
    with pytest.raises((AssertionError, FloatingPointError)):
        for check in SCALER_CHECKS:
            check(wrong)


def test_the_scaler_keeps_gradients_that_float16_would_lose():
    """y = (a x) w has a gradient of 1e-9 at a x. It is 0 in float16, and right to a thousandth with a scale."""
    x = np.full((4, 3), 0.5, np.float32)
    w = np.full((2, 3), 1e-4, np.float32)
    want = 2 * 1e-9

    def gradient(dtype: str | None, scaler: GradScaler | None = None) -> np.ndarray:
        a = leaf(x, F32)
        with autocast(dtype or "float16", enabled=dtype is not None):
            loss = ops.linear(ops.linear(a, dev(np.eye(3), F32)), dev(w)).sum() * 1e-5
        if scaler is None:
            loss.backward()
            return host(a.grad)
        scaler.scale(loss).backward()
        return host(a.grad) / scaler.get_scale()

    assert np.allclose(gradient(None), want, rtol=1e-5, atol=0)
    assert not gradient("float16").any()
    assert np.allclose(gradient("float16", GradScaler()), want, rtol=2e-3, atol=0)
    assert np.allclose(gradient("bfloat16"), want, rtol=2e-2, atol=0)


def test_a_scaler_raises_if_a_smaller_scale_cannot_help():
    p = leaf(np.ones(2), F32)
    optimizer = AdamW(0.1).start({"p": p})
    for scaler in (GradScaler(init_scale=1.0), GradScaler(enabled=False)):
        p.grad = dev([np.nan, 1.0], F32)
        with pytest.raises(FloatingPointError, match="the gradient's norm is nan"):
            scaler.step(optimizer)
    assert optimizer.t == 0
    assert np.array_equal(host(p), [1, 1])


def test_a_scaler_that_is_not_enabled_has_the_scale_1():
    scaler = GradScaler(init_scale=2.0**10, enabled=False)
    loss = leaf(np.array(2.0))
    assert scaler.get_scale() == 1
    assert scaler.scale(loss) is loss
    scaler.update()
    assert scaler.get_scale() == 1


def test_a_scaler_has_the_defaults_of_torch_and_refuses_wrong_options():
    scaler = GradScaler()
    options = (scaler.get_scale(), scaler.growth_factor, scaler.backoff_factor, scaler.growth_interval)
    assert options == (65536, 2, 0.5, 2000)
    refused = [
        {"init_scale": 0},
        {"growth_factor": 1.0},
        {"backoff_factor": 1.0},
        {"backoff_factor": 0},
        {"growth_interval": 0},
    ]
    message = "a GradScaler wants init_scale > 0, growth_factor > 1 > backoff_factor > 0"
    for wrong in refused:
        with pytest.raises(ValueError, match=message):
            GradScaler(**wrong)


def test_a_scaler_resumes_from_its_state():
    first = GradScaler(init_scale=4.0, growth_interval=3)
    second = GradScaler(growth_interval=3)
    first.update()
    first.update()
    second.load_state_dict(first.state_dict())
    second.update()
    assert second.state_dict() == {"scale": 8.0, "good": 0}


def test_the_factor_of_a_scaled_step_is_1_by_default():
    def weights_after(*factor: float) -> list[float]:
        p = leaf(np.ones(2), F32)
        optimizer = ft.SGD(0.25).start({"p": p})
        p.grad = dev([8.0, 8.0], F32)
        GradScaler(init_scale=8.0).step(optimizer, *factor)
        return host(p).tolist()

    assert weights_after() == [0.75, 0.75]
    assert weights_after(0.5) == [0.875, 0.875]


def test_the_square_of_the_scale_stays_finite_in_float32():
    scaler = GradScaler(init_scale=2.0**60, growth_interval=1)
    for _ in range(100):
        scaler.update()
    assert scaler.get_scale() == scaler_module.LARGEST < np.finfo(np.float32).max**0.5


def test_a_captured_step_refuses_a_changing_scale(monkeypatch):
    monkeypatch.setattr(array, "recording", object())
    with pytest.raises(CannotCapture, match="capture a step in bfloat16"):
        GradScaler().scale(leaf(np.array(1.0)))


# ── fit ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
class LargeScaler(GradScaler):
    """A scaler that begins with a scale at which every step overflows."""
    def __init__(self, **options: Any):
        super().__init__(init_scale=2.0**22, growth_interval=4, **options)


@slow_when_emulated
def test_fit_skips_overflowing_steps_and_then_trains(monkeypatch):
    monkeypatch.setattr(train.loop, "GradScaler", LargeScaler)
    history = fit(small(), [TOKENS], 120, AdamW(0.003), autocast="float16", progress=False)
    losses = np.array(history.losses)
    reference = loss_curve()
    # While nothing moves, the same batch has the same loss; the first step that is taken still has it.
    skipped = int((losses[:30] == losses[0]).sum()) - 1
    assert 1 <= skipped <= 10
    assert history.skipped[:skipped] == list(range(skipped))
    assert np.abs(losses[skipped:skipped + 3] - reference[:3]).max() < 1e-3
    assert losses[-1] < reference[0] / 4


def test_the_step_of_a_method_is_not_called_for_a_skipped_step(monkeypatch):
    monkeypatch.setattr(train.loop, "GradScaler", LargeScaler)
    calls = []                                                                   # (step, all gradients are finite)

    def record(self, edits, t, T):
        gradients = [p.grad for e in edits.values() for p in e.own().values() if p.grad is not None]
        calls.append((t, all(np.isfinite(host(g)).all() for g in gradients)))

    monkeypatch.setattr(ft.LoRA, "step", record)
    model = small()
    ft.attach(model, ft.LoRA(r=2))
    losses = fit(model, [TOKENS], 30, AdamW(0.01), autocast="float16", progress=False).losses
    assert len(losses) == 30
    assert 0 < len(calls) < 30
    first_step, _ = calls[0]
    assert first_step > 0
    assert all(is_finite for _, is_finite in calls)


def test_a_loss_that_is_not_finite_raises_and_is_not_skipped():
    model = small()
    p = next(iter(model.parameters()))
    p.copy_(np.full(p.shape, np.nan))
    with pytest.raises(ft.Diverged, match="the loss is nan at step 1"):
        fit(model, [TOKENS], 3, AdamW(0.01), autocast="float16", progress=False)


@pytest.mark.parametrize(
    "autocast, dtype", [("float16", None), ("bfloat16", None), (None, bfloat16), ("float16", F16)], ids=str,
)
def test_a_run_in_16_bits_resumes_bitwise(autocast, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(train.loop, "GradScaler", LargeScaler)

    def run(out: Path, *stops: int) -> tuple[list, list]:
        """The history and the values of the first attempt that is not stopped; attempt i stops at batch stops[i]."""
        for stop in stops:
            model = small()
            if dtype is not None:
                model.to(dtype=dtype)
            batches = StoppingBatches([TOKENS, TOKENS[::-1].copy()], stop)
            with contextlib.suppress(Stop):
                history = fit(
                    model, batches, 24, AdamW(0.003),
                    autocast=autocast, out=out, resume=True, save_every=1, progress=False,
                )
                return [history.losses, history.skipped], [np.array(host(p)) for p in model.parameters()]
        raise AssertionError("every attempt was stopped")

    history, values = run(tmp_path / "whole", 99)
    resumed_history, resumed_values = run(tmp_path / "resumed", 13, 20, 99)
    assert history == resumed_history
    assert all(np.array_equal(a, b) for a, b in zip(values, resumed_values, strict=True))
    _, skipped = history
    assert bool(skipped) == (autocast == "float16")
    another = "bfloat16" if autocast != "bfloat16" else None
    with pytest.raises(ValueError, match="its autocast"):
        fit(small(), [TOKENS], 24, AdamW(0.003), autocast=another, out=tmp_path / "whole", resume=True, progress=False)


class Stop(Exception):
    """Raised in place of a batch."""


class StoppingBatches:
    """Batches that raise Stop after `stop` batches. Their state is the number of batches so far."""

    def __init__(self, batches: list, stop: int):
        self.batches = batches
        self.stop = stop
        self.n = 0

    def __iter__(self) -> Iterator:
        while True:
            if self.n == self.stop:
                raise Stop
            self.n += 1
            yield self.batches[(self.n - 1) % len(self.batches)]

    def state_dict(self) -> int:
        return self.n

    def load_state_dict(self, state: int) -> None:
        self.n = state


def test_class_weights_are_not_rounded():
    model = ft.classifier(small(), 3)
    labels = np.array([0, 1, 2, 0, 1, 2])
    weights = np.array([0.1, 1.0, 2.7])
    batch = {"ids": TOKENS[:, :12], "labels": labels, "class_weight": weights}
    with autocast():
        _, loss = train.batch.compute_loss(model, train.read_batch(batch))
    ctx, _ = train.batch.compute_loss(model, train.read_batch(batch))
    logits = Tensor(dev(to_float32(host(ctx.output))))
    want = ops.cross_entropy(logits, dev(labels), dev(weights, F32))
    assert loss.dtype == F32
    assert float(loss.data) == pytest.approx(float(want.data), rel=0.01)


# ── products of float32 ──────────────────────────────────────────────────────────────────────────────────────────────
def test_the_precision_of_float32_products_is_highest_or_high():
    assert ft.get_float32_matmul_precision() == "highest"
    try:
        ft.set_float32_matmul_precision("high")
        assert ft.get_float32_matmul_precision() == "high"
        assert precision.tf32
    finally:
        ft.set_float32_matmul_precision("highest")
    for wrong in ("medium", "tf32", True):
        with pytest.raises(ValueError, match="'highest' or 'high'"):
            ft.set_float32_matmul_precision(wrong)
    assert ft.get_float32_matmul_precision() == "highest"
    assert not precision.tf32


def test_a_16_bit_array_is_recognised_by_its_dtype():
    """int16 has the same size, and is not a floating-point dtype."""
    assert has_16_bit([1, None, dev([1.0], bfloat16)])
    assert has_16_bit([dev([1.0], F16)])
    assert HALVES == {F16, bfloat16}
    assert not has_16_bit([dev([1.0], F32), dev(np.array([1], np.int16)), (2, 3), "two"])

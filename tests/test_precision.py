"""16 bits: every op computes in float32 and rounds once; autocast does what its tables say; training in 16 bits goes the way of float32's.

Each `agrees_*` is a check that must also refuse the wrong answers beside it.
"""
from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import dev, host, leaf
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

F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
both = pytest.mark.parametrize("dtype", [F16, bfloat16], ids=str)
EXACT = array.backend() != "cupy"                        # there products are added up in another order, and attention keeps its scores in 16 bits
slow_there = pytest.mark.skipif("emulate" in sys.modules, reason="minutes on the emulated GPU; emulated/test_on_cupy.py trains in 16 bits")
ULP = {F16: 2.0**-10, bfloat16: 2.0**-7}


def same(a: Any, b: Any, dtype: np.dtype, name: str = "") -> bool:
    """The same numbers in the same dtype, to the bit.  On a device, but for some last places of the largest; of attention's factors, which
    are rounded there and cancel, of 1."""
    a, b = host(a), host(b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = to_float32(a), to_float32(b)
    if EXACT:
        return np.array_equal(a, b, equal_nan=True)
    return bool(np.abs(a - b).max(initial=0) <= 4 * ULP[dtype] * np.abs(b).max(initial=name == "attention") + 1e-6)


def of_rounded(name: str, dtype: np.dtype) -> Callable[..., Tensor]:
    """The op, given in float32 what of its arrays (weights, factors of dropout) an op in 16 bits would be given in those."""
    seen = lambda a: to_float32(rounded(a, dtype)) if array.is_array(a) and a.dtype.kind == "f" else a
    return lambda *args, **kw: OPS[name](*map(seen, args), **{k: seen(v) for k, v in kw.items()})


def walked(op: Callable[..., Tensor], e: Example, leaves: list[Tensor], seed: int) -> list[Any]:
    """An op's value and the gradients of its inputs, for a covector of the value's dtype."""
    y = e.call(op, *leaves)
    covector = np.random.default_rng(seed).standard_normal(y.shape).astype(np.float16).astype(y.dtype)       # exact in every dtype here but bfloat16
    y.backward(dev(covector))
    return [y, *(p.grad for p in leaves)]


# ── an op ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def agrees_with_rounding_once(name: str, e: Example, dtype: np.dtype) -> None:
    """In 16 bits: what float32 gives of the same numbers, rounded once; a loss is not rounded."""
    narrow_ones = [leaf(a, dtype) for a in e.inputs]
    wide = [leaf(to_float32(host(p))) for p in narrow_ones]
    y, *got = walked(OPS[name], e, narrow_ones, 1)
    assert y.dtype == (F32 if name in LOSSES else dtype), f"the value is {y.dtype}"
    z = e.call(of_rounded(name, dtype), *wide)
    z.backward(dev(to_float32(np.random.default_rng(1).standard_normal(y.shape).astype(np.float16).astype(y.dtype))))
    for what, a, b in [("value", y, host(z)), *((f"gradient {i}", a, host(p.grad)) for i, (a, p) in enumerate(zip(got, wide)))]:
        assert (a is None) == (b is None), what
        assert a is None or same(a, rounded(b, dtype) if what == "value" and name not in LOSSES else b, dtype, name), what


@pytest.mark.parametrize("name", EVERY_OP)
@given(st.data())
def test_an_op_adds_up_in_float32_and_rounds_once(name, data):
    e, _, _ = data.draw(examples(name))
    for dtype in (F16, bfloat16):
        agrees_with_rounding_once(name, e, dtype)


WRONG_OPS = {
    "16 bits go through the definitions as they are": ("layer_norm", lambda m: m.setattr(precision, "has_16_bit", lambda arrays: False)),
    "the value stays in float32": ("tanh", lambda m: m.setattr(precision, "rounded", lambda a, dtype: a)),
    "a loss is rounded like all else": ("cross_entropy", lambda m: m.setattr(precision, "LOSSES", set())),
    "picking entries adds nothing up, so neither does its gradient": ("embedding", lambda m: m.setattr(precision, "VIEWS", VIEWS | PICKS))}


@pytest.mark.skipif(array.backend() != "numpy", reason="the mistakes are made in what NumPy runs")
@pytest.mark.parametrize("what", WRONG_OPS)
def test_another_way_with_16_bits_is_refused(what, monkeypatch):
    name, plant = WRONG_OPS[what]
    with ft.kernels.definitions():
        plant(monkeypatch)
        assert refused(agrees_with_rounding_once, name)


def refused(agrees: Callable[[str, Example, np.dtype], None], name: str) -> bool:
    """Whether one of the op's examples does not agree."""
    for e, _, _ in draws(name):
        try:
            agrees(name, e, bfloat16)
        except AssertionError:
            return True
    return False


def test_256_and_1_in_bfloat16():
    ones = Tensor(dev(np.ones(1000), bfloat16))
    assert float((Tensor(dev([256.0], bfloat16)) + Tensor(dev([1.0], bfloat16))).data[0]) == 256       # there is no 257
    assert float(ones.sum().data) == 1000 and ones.sum().dtype == bfloat16
    assert float(ops.cumsum(ones).data[-1]) == 1000
    assert host(tensor.sum_to(dev(np.ones((1000, 2)), bfloat16), (2,))).tolist() == [1000, 1000]      # of a bias, over a batch
    total = np.ones(2, bfloat16)
    for row in np.ones((999, 2), bfloat16):
        total += row
    assert total.tolist() == [256, 256]                                          # what came of it otherwise


# ── autocast ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_tables_name_ops_and_each_once():
    tables = [PRODUCTS, SUMS, LOSSES, VIEWS, PICKS, MIXING]
    assert set().union(*tables) <= OPS.keys() and len(set().union(*tables)) == sum(map(len, tables))
    assert {n for n in OPS if "matmul" in n or "linear" in n} <= PRODUCTS        # a new product does not stay out by oversight


def agrees_with_the_policy(name: str, e: Example, dtype: np.dtype) -> None:
    """Of float32: products are those of the rounded factors, all else is as it was.  Of 16 bits: sums are float32's, all else as it was."""
    def op(dtype_in: np.dtype, cast: bool) -> list:
        """Value and gradients, of inputs rounded to `dtype` if `cast`."""
        leaves = [leaf(a.astype(dtype) if cast else a, dtype_in) for a in e.inputs]
        return walked(OPS[name], e, leaves, 2)
    with autocast(dtype):
        of_float32, of_16 = op(F32, False), op(dtype, False)
    if name in PRODUCTS:
        want = op(dtype, False)                                                  # gradients of the float32 factors are not rounded
        assert of_float32[0].dtype == dtype and same(of_float32[0], want[0], dtype, name), "product"
        for a, b in zip(of_float32[1:], want[1:]):
            assert a.dtype == F32 and same(a, b, dtype, name), "gradient of a factor"
    else:
        assert all(same(a, b, dtype) for a, b in zip(of_float32, op(F32, False))), "what is no product"
    want = op(F32, True) if name in SUMS else op(dtype, False)
    assert same(of_16[0], want[0], dtype, name), "of 16 bits"
    assert all(a.dtype == F32 and same(a, b, dtype, name) for a, b in zip(of_16[1:], want[1:])), "gradient of 16 bits"


@pytest.mark.parametrize("name", EVERY_OP)
@given(st.data())
def test_autocast_does_what_its_tables_say(name, data):
    e, _, _ = data.draw(examples(name))
    for dtype in (F16, bfloat16):
        agrees_with_the_policy(name, e, dtype)


WRONG_POLICIES = {
    "softmax in 16 bits": ("softmax", "cast_inputs", lambda name, arrays, kw: ([rounded(a, bfloat16) for a in arrays], kw)),
    "products in float32": ("matmul", "cast_inputs", lambda name, arrays, kw: (arrays, kw)),
    "sums in 16 bits stay so": ("sum", "SUMS", set()),
    "an activation is cast": ("tanh", "PRODUCTS", PRODUCTS | {"tanh"})}


@pytest.mark.parametrize("what", WRONG_POLICIES)
def test_another_policy_is_refused(what, monkeypatch):
    name, target, wrong = WRONG_POLICIES[what]
    monkeypatch.setattr(precision, target, wrong)
    assert refused(agrees_with_the_policy, name)


def test_float64_is_left_alone_and_so_are_integers():
    a, b = leaf(np.ones((2, 3))), leaf(np.ones((3, 2)))
    with autocast():
        assert (a @ b).dtype == np.float64 and a.sum().dtype == np.float64 and Tensor(dev([1, 2])).sum().dtype.kind == "i"


def test_autocast_is_of_this_thread_nests_and_ends():
    x, seen = Tensor(dev(np.ones((2, 2)), F32)), []
    product = lambda: (x @ x).dtype
    with autocast("float16"):
        there = threading.Thread(target=lambda: seen.append(product()))
        there.start()
        there.join()
        with autocast("bfloat16"):
            assert product() == bfloat16
            with autocast(enabled=False):
                assert product() == F32
            assert product() == bfloat16
        assert product() == F16
        with contextlib.suppress(KeyError), autocast():
            raise KeyError
        assert product() == F16
    assert product() == F32 and seen == [F32]
    for wrong in ("float32", "int8", np.float64, "fp16", None):
        with pytest.raises(TypeError, match="autocast computes in float16 or bfloat16, got"), autocast(wrong):
            pass
    with pytest.raises(TypeError, match="float16 or bfloat16, got 'fp16'"):
        fit(small(), [TOKENS], 1, autocast="fp16")

    @autocast("bfloat16")
    def step() -> Any:
        return product()
    assert step() == step() == bfloat16 and product() == F32


@both
def test_a_pass_under_autocast_keeps_weights_and_their_gradients_in_float32(dtype):
    model = small()
    with autocast(dtype):
        logits = model(TOKENS[:, :-1])
        loss = ops.cross_entropy(logits, dev(TOKENS[:, 1:]))
    assert logits.dtype == dtype and loss.dtype == F32
    loss.backward()
    assert all(p.dtype == p.grad.dtype == F32 for p in model.parameters())
    W = model.blocks[0].mlp.up.weight
    assert not np.array_equal(host(W.grad), to_float32(rounded(host(W.grad), dtype)))          # as it was summed: not rounded on the way


def agrees_after_an_update(dtype: np.dtype) -> None:
    """Two weights that an optimiser laid out: what a pass under autocast sees of them is what they are now, rounded."""
    p, q, x = leaf(np.linspace(-1, 1, 12).reshape(4, 3), F32), leaf(np.linspace(2, 3, 12).reshape(4, 3), F32), Tensor(dev(np.eye(3), F32))
    optimizer = ft.SGD(0.5).start({"p": p, "q": q})
    with autocast(dtype):
        for step in range(3):
            for w in (q, p):
                assert same(ops.linear(x, w), rounded(host(w).T, dtype), dtype), step
            p.grad, q.grad = dev(np.ones((4, 3)), F32), dev(-np.ones((4, 3)), F32)
            optimizer.step()
        with autocast(dtype):
            q.copy_(np.full((4, 3), 7.0))
            assert same(ops.linear(x, q), np.full((3, 4), 7.0, dtype), dtype)
        assert same(ops.linear(x, q), np.full((3, 4), 7.0, dtype), dtype), "written to in a part that is over"
    assert precision.autocast_state.cache is None


def cast_flat_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters are cast as on a device, all of an optimiser's together."""
    monkeypatch.setitem(dispatch.KERNELS, (precision.cast_parameter, type(dev([0.0]))), [casts.cast_parameter])


@both
def test_weights_that_were_cast_are_cast_anew_when_written_to(dtype, monkeypatch):
    agrees_after_an_update(dtype)
    cast_flat_arrays(monkeypatch)
    agrees_after_an_update(dtype)
    monkeypatch.setattr(Tensor, "mark_written", lambda self: None)                      # nobody is told
    with pytest.raises(AssertionError):
        agrees_after_an_update(dtype)


def test_weights_that_lie_end_to_end_are_cast_at_once():
    ps, x, seen = {n: leaf(np.ones((2, 3)), F32) for n in "abc"}, Tensor(dev(np.ones((1, 3)), F32)), []
    optimizer = AdamW(0.1).start(ps)
    with pytest.MonkeyPatch.context() as m, autocast():
        cast_flat_arrays(m)

        @precision.takes_16_bit
        def recorder(x, W, b=None):
            seen.append(W)
            return NotImplemented
        m.setitem(dispatch.KERNELS, (ops.linear, type(x.data)), [recorder])
        for p in ps.values():
            ops.linear(x, p)
    assert [array.address(w) - array.address(seen[0]) for w in seen] == [0, 12, 24]
    assert seen[0].base.size == optimizer.groups[0].w.size


@both
def test_anomalies_are_named_in_16_bits_too(dtype):
    x = Tensor(dev([60000.0, 1.0], F32), requires_grad=True)
    with ft.detect_anomaly(), pytest.raises(FloatingPointError, match="reshape|mul"):
        ops.reshape(Tensor(dev([np.inf], dtype)), (1, 1))
    with ft.detect_anomaly():
        (x * 2.0).sum().backward()


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────
TOKENS = np.random.default_rng(5).integers(0, 19, (6, 13))


def small(seed: int = 1) -> GPT:
    return GPT(GPTConfig(19, 12, 16, 2, 2), seed=seed)


def curve(how: Any = None, dtype: Any = None, steps: int = 120, lr: float = 0.003, **more: Any) -> np.ndarray:
    model = small()
    if dtype is not None:
        model.to(dtype=dtype)
    return np.array(fit(model, [TOKENS], steps, AdamW(lr), autocast=how, progress=False, **more).losses)


def agrees_with_float32(losses: np.ndarray, reference: np.ndarray) -> None:
    """It learns, and the loss is float32's at every step: but for 1 % of the first at the beginning, then 5 %, since small differences grow."""
    assert reference[-1] < reference[0] / 4, "the reference must learn something"
    assert np.abs(losses - reference)[:20].max() < 0.01 * reference[0] and np.abs(losses - reference).max() < 0.05 * reference[0]


@slow_there
@pytest.mark.parametrize("how", ["bfloat16", "float16", np.float16])
def test_under_autocast_training_goes_as_in_float32(how):
    agrees_with_float32(curve(how), curve())


@slow_there
@both
def test_a_model_in_16_bits_trains_as_in_float32(dtype):
    agrees_with_float32(curve(dtype=dtype), curve())


@slow_there
def test_without_master_weights_small_steps_are_lost(monkeypatch):
    """Steps of 0.00003 on weights of 0.1, near which bfloat16 has its numbers 0.0005 apart."""
    ids = np.random.default_rng(0).integers(0, 2048, (4, 17))

    def gained(dtype: Any) -> float:
        model, _ = ft.load("base-gpt-small")
        losses = fit(model.to(dtype=dtype), [ids], 40, AdamW(3e-5), progress=False).losses
        return losses[0] - losses[-1]
    reference = gained(F32)
    assert reference > 2 and gained(bfloat16) > 0.9 * reference
    monkeypatch.setattr(optim.optimizers, "HALVES", set())
    assert gained(bfloat16) < 0.2 * reference


# ── weights in 16 bits, and what the optimiser keeps of them ─────────────────────────────────────────────────────────
def quarter(optimizer: Optimizer, p: Tensor, g: float, n: int) -> None:
    """n steps with the gradient g everywhere."""
    for _ in range(n):
        p.grad = dev(np.full(p.shape, g), p.dtype)
        optimizer.step()


@both
def test_a_thousand_steps_too_small_for_16_bits_are_all_there(dtype):
    p = leaf(np.ones((2, 3)), dtype)
    optimizer = ft.SGD(2.0**-15).start({"p": p})
    quarter(optimizer, p, 1.0, 1000)
    group, = optimizer.groups
    assert p.dtype == dtype and group.w.dtype == group.moments[0].dtype == F32
    assert np.allclose(host(group.w), 1 - 1000 * 2.0**-15, rtol=1e-6)
    assert np.array_equal(host(p), rounded(host(group.w), dtype).reshape(2, 3))


@both
def test_what_others_write_into_a_tensor_is_seen(dtype):
    for write in (lambda p: p.copy_(np.full((2, 3), 5.0)), lambda p: setattr(p, "data", dev(np.full((2, 3), 5.0), dtype))):
        p = leaf(np.ones((2, 3)), dtype)
        optimizer = ft.SGD(2.0**-15).start({"p": p})
        quarter(optimizer, p, 1.0, 3)
        write(p)
        quarter(optimizer, p, 1.0, 1)
        assert np.allclose(host(optimizer.groups[0].w), 5 - 2.0**-15, rtol=1e-7)


@both
def test_a_mask_holds_the_rounded_value_and_the_exact_one(dtype):
    p, free = leaf(np.full((2, 3), 1.5), dtype), np.array([[True, False, True]] * 2)
    p.mask = dev(free)
    optimizer = AdamW(0.1).start({"p": p})
    quarter(optimizer, p, 1.0, 3)
    group, = optimizer.groups
    moved = host(p).astype(np.float32) != 1.5
    assert np.array_equal(moved, free) and np.array_equal(host(group.w).reshape(2, 3) != 1.5, free)
    assert all(np.array_equal(host(m).reshape(2, 3) != 0, free) for m in group.moments)


@both
def test_state_holds_the_exact_values_and_a_resumed_optimiser_goes_on_bitwise(dtype):
    def run(n: int, split: int | None) -> tuple[np.ndarray, np.ndarray]:
        p = leaf(np.linspace(-1, 1, 40000).reshape(200, 200), dtype)             # a large tensor and, below, a small one
        q = leaf(np.ones(3), dtype)
        make = lambda: AdamW(1e-4, weight_decay=0.1).start({"p": p, "q": q})
        optimizer = make()
        for i in range(n):
            if i == split:
                state, values = optimizer.state_dict(), [np.array(host(x)) for x in (p, q)]
                for x in (p, q):
                    x.copy_(np.zeros(x.shape))
                optimizer = make()
                for x, v in zip((p, q), values):
                    x.copy_(v)
                optimizer.load_state_dict({k: np.array(v) for k, v in state.items()})
            for x in (p, q):
                x.grad = dev(np.cos(np.arange(x.size) + i).reshape(x.shape), dtype)
            optimizer.step(clip=1.0)
        return np.array(host(p)), np.concatenate([host(g.w) for g in optimizer.groups])
    for a, b in zip(run(8, None), run(8, 4)):
        assert np.array_equal(a, b)


@both
def test_gradients_are_added_up_in_float32(dtype):
    """300 uses of a weight in one pass, and 300 passes: in bfloat16 the sum would stay at 256, in float16 four of these overflow."""
    size = 1.0 if dtype == bfloat16 else 30000.0
    p, q = leaf(np.ones(1), dtype), leaf(np.ones(1), dtype)
    total = Tensor(dev([0.0], F32))
    for _ in range(300):
        total = total + p
        (q * 1.0).backward(dev([size], dtype))
    total.backward(dev([size], F32))
    assert p.grad.dtype == q.grad.dtype == F32 and float(p.grad[0]) == float(q.grad[0]) == 300 * size


@both
def test_what_two_inputs_share_is_not_added_to_twice(dtype):
    """A pullback that gives the same g to two inputs, of which one has another use."""
    for same_g in (lambda g, needed: (g, g), lambda g, needed: (g, g.reshape(g.shape)), lambda g, needed: (g, None)):
        pair = tensor.op("... , ... -> ...")(lambda a, b: (a + b, same_g))
        del OPS["<lambda>"]
        for shape in ((3,), ()):
            for total in (lambda a, b: pair(a, b) + a * 4.0, lambda a, b: a * 4.0 + pair(a, b)):     # one of the two goes back first
                a, b = leaf(np.ones(shape), dtype), leaf(np.ones(shape), dtype)
                total(a, b).sum().backward()
                assert (host(a.grad) == 5).all() and (b.grad is None or (host(b.grad) == 1).all())


@pytest.mark.parametrize("name", [n for n in EVERY_OP if n not in MIXING])
@given(st.data())
def test_beside_float32_nothing_is_rounded(name, data):
    """The first input in 16 bits, all others in float32: float32's value and gradients of the same numbers."""
    e, _, _ = data.draw(examples(name))
    first, *rest = e.inputs
    mixed, wide = [leaf(first, bfloat16), *(leaf(a, F32) for a in rest)], [leaf(to_float32(first.astype(bfloat16))), *(leaf(a, F32) for a in rest)]
    if rest:
        f = of_rounded(name, bfloat16)
        (y, *got), (z, *want) = walked(f, e, mixed, 3), walked(f, e, wide, 3)
        assert y.dtype == F32 and all((a is None and b is None) or same(a, b, bfloat16) for a, b in zip([y, *got], [z, *want]))


def test_what_needs_no_copy_in_float32_gets_none(monkeypatch):
    x, y, seen = Tensor(dev(np.ones((4, 3)), bfloat16)), Tensor(dev(np.ones((4, 3)), F32)), []
    monkeypatch.setattr(precision, "to_float32", lambda a: (seen.append(a), to_float32(a))[1])
    m = array.xp(x.data)
    assert m.may_share_memory(x[1:3].data, x.data) and m.may_share_memory(x.T.data, x.data)
    assert (x + y).dtype == (x * y).dtype == (y - x).dtype == F32 and not seen
    assert (x + x).dtype == bfloat16 and seen


@both
def test_an_op_of_several_values_rounds_each(dtype, rng):
    """q, k, v at once are three linear maps, in values and gradients; a value that nobody uses sends nothing back."""
    x, *ws = (leaf(rng.standard_normal(s), dtype) for s in ((2, 5, 6), (4, 6), (4,), (4, 6), (4,), (4, 6), (4,)))
    wide = [leaf(to_float32(host(p))) for p in (x, *ws)]
    G = rng.standard_normal((2, 2, 5, 2)).astype(dtype)
    for used in ((0, 1, 2), (1,)):
        ys, zs = ops.project(x, *ws, heads=2), ops.project(*wide, heads=2)
        for i in used:
            ys[i].backward(dev(G), retain_graph=True)
            zs[i].backward(dev(to_float32(G)), retain_graph=True)
        assert all(same(y, rounded(host(z), dtype), dtype) for y, z in zip(ys, zs))
        for p, q in zip((x, *ws), wide):
            assert (p.grad is None) == (q.grad is None) and (p.grad is None or same(p.grad, host(q.grad), dtype))
            p.grad = q.grad = None
    both_used = ops.project(x, *ws, heads=2)
    (both_used[0].sum() + both_used[2].sum()).backward()
    assert x.grad.dtype == F32 and ws[2].grad is None or not host(ws[2].grad).any()


def test_a_weight_that_lies_otherwise_in_a_flat_array_is_cast_by_itself():
    flat = dev(np.arange(12) / 8, F32)
    x = Tensor(dev(np.eye(4), F32))
    for view in (flat.reshape(3, 4).T, flat.reshape(4, 3)[::-1], flat.reshape(4, 3)[:, :2], flat.reshape(2, 6)[:, 1:5].reshape(4, 2)):
        with autocast():
            assert same(x @ Tensor(view), host(view).astype(bfloat16), bfloat16)


@pytest.mark.skipif(array.backend() != "numpy", reason="moves from NumPy to the strict double and back")
@both
def test_an_optimiser_follows_a_model_in_16_bits(dtype):
    def run(*route: str) -> tuple[np.ndarray, np.ndarray]:
        p = leaf(np.linspace(1, 2, 6), dtype)
        optimizer = AdamW(1e-4).start({"p": p})
        for backend in route:
            p.data = array.to(p.data, backend)
            p.grad = array.to(np.cos(np.arange(6)).astype(np.float32), backend)
            optimizer.step()
            group, = optimizer.groups
            assert p.device == backend and p.dtype == dtype and p.data is group.views["p"]
            assert np.array_equal(host(p), rounded(host(group.w), dtype))
        return np.array(host(p)), np.array(host(group.w))
    for a, b in zip(run("numpy", "strict", "strict", "numpy"), run(*["numpy"] * 4)):
        assert np.allclose(to_float32(a), to_float32(b), rtol=1e-6)


def test_a_model_that_changes_its_dtype_says_to_start_again():
    model = small().to(dtype=bfloat16)
    optimizer = AdamW(0.01).start(ft.trained(model))
    model.to(dtype="float32")
    with pytest.raises(TypeError, match="were bfloat16 when it was started, and are float32 now"):
        optimizer.step()


def test_tensors_of_both_widths_have_one_norm():
    values = {"a": np.full((3, 2), 2.0), "b": np.full((4, 4), 1.0), "c": np.full((5,), 3.0)}
    dtypes = {"a": bfloat16, "b": F32, "c": F16}
    ps = {n: leaf(v, dtypes[n]) for n, v in values.items()}
    optimizer = AdamW(0.01).start(ps)
    for n, p in ps.items():
        p.grad = dev(values[n], dtypes[n])
    norm = float(optimizer.step(clip=0.5))
    assert norm == pytest.approx((6 * 4 + 16 + 5 * 9)**0.5, rel=1e-6)
    assert all(np.allclose(to_float32(host(p.grad)), values[n] * 0.5 / norm, rtol=0.01) for n, p in ps.items())


# ── the scale of the loss ────────────────────────────────────────────────────────────────────────────────────────────
def stepped(scaler: Any, clip: float | None, steps: int = 4) -> list[np.ndarray]:
    """Weights, moments, norms and gradients of some steps of a float32 model; without a scaler if None."""
    model, out = small(), []
    optimizer = AdamW(0.01).start(ft.trained(model))
    for _ in range(steps):
        loss = ops.cross_entropy(model(TOKENS[:, :-1]), dev(TOKENS[:, 1:]))
        (loss if scaler is None else scaler.scale(loss)).backward()
        out.append(np.array(float(optimizer.step(0.5, clip) if scaler is None else scaler.step(optimizer, 0.5, clip))))
        out += [np.array(host(p.grad)) for p in model.parameters()]
        if scaler is not None:
            scaler.update()
        optimizer.zero_grad()
    return out + [np.array(host(a)) for g in optimizer.groups for a in (g.w, *g.moments)]


def agrees_with_no_scaler(make: Callable[..., GradScaler]) -> None:
    """A power of two costs no digit: float32 training is the same to the bit, whatever S is, clipped or not."""
    for clip in (None, 0.05, 1e6):
        for scaler in (make(init_scale=2.0**12, growth_interval=2), make(init_scale=2.0**-3), make(init_scale=2.0)):
            got = stepped(scaler, clip)
            assert all(np.array_equal(a, b) for a, b in zip(got, stepped(None, clip), strict=True)), clip


def overflowed(make: Callable[..., GradScaler], bad: float) -> tuple[GradScaler, Optimizer, list[np.ndarray], list[np.ndarray]]:
    """Three good steps and one that overflows, with what there was before and after it."""
    p, q = leaf(np.ones((2, 3)), F32), leaf(np.ones(4), F32)
    optimizer, scaler = AdamW(0.1).start({"p": p, "q": q}), make(init_scale=8.0, growth_interval=5)
    held = lambda: [np.array(host(a)) for g in optimizer.groups for a in (g.w, *g.moments)]
    for values in (1.0, 1.0, 1.0, bad):
        p.grad, q.grad = dev(np.full((2, 3), 8.0), F32), dev(np.array([8.0, 8.0, values, 8.0]), F32)
        before = held()
        scaler.step(optimizer, clip=1.0)
        scaler.update()
    return scaler, optimizer, before, held()


def agrees_on_overflow(make: Callable[..., GradScaler]) -> None:
    """Nothing moves and no step is counted; S is halved; the count of good steps begins anew."""
    for bad in (np.inf, -np.inf, np.nan):
        scaler, optimizer, before, after = overflowed(make, bad)
        assert all(np.array_equal(a, b) for a, b in zip(before, after)), "something moved"
        assert optimizer.t == 3, "the step was counted"
        assert scaler.get_scale() == 4 and scaler.state_dict() == {"scale": 4.0, "good": 0}


def agrees_on_growth(make: Callable[..., GradScaler]) -> None:
    """S doubles after so many good steps in a row, and then the count begins anew."""
    p = leaf(np.ones(2), F32)
    optimizer, scaler, seen = AdamW(0.1).start({"p": p}), make(init_scale=4.0, growth_interval=3), []
    for bad in (0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0):
        p.grad = dev(np.array([np.inf if bad else 1.0, 1.0]), F32)
        scaler.step(optimizer)
        scaler.update()
        seen.append(scaler.get_scale())
    assert seen == [4, 4, 8, 8, 4, 4, 4, 2, 1, 1, 1, 2, 2, 2, 4] and optimizer.t == 12


SCALER_CHECKS = [agrees_with_no_scaler, agrees_on_overflow, agrees_on_growth]


@pytest.mark.parametrize("agrees", SCALER_CHECKS, ids=lambda f: f.__name__)
def test_the_scaler(agrees):
    agrees(GradScaler)


class NeverDivides(GradScaler):
    """Adam divides by √v, so a factor on all gradients cancels."""
    def step(self, optimizer, factor=1.0, clip=None):
        return optimizer.step(factor, clip)


class ClipsFirst(GradScaler):
    """Clipping is scaling as well, so the order does not matter."""
    def step(self, optimizer, factor=1.0, clip=None):
        norm = clip_norm([p.grad for g in optimizer.groups for p in g.tensors.values()], clip)
        optimizer.step(factor, None, self.current_scale)
        return norm / self.current_scale


class ReportsTheScaled(GradScaler):
    """The norm is what the optimiser saw."""
    def step(self, optimizer, factor=1.0, clip=None):
        return super().step(optimizer, factor, clip) * self.current_scale


class TakesTheRest(GradScaler):
    """What is not finite counts as nothing; the rest of the gradient is good."""
    def step(self, optimizer, factor=1.0, clip=None):
        for g in optimizer.groups:
            for p in g.tensors.values():
                m = array.xp(p.grad)
                p.grad = m.where(m.isfinite(p.grad), p.grad, 0)
        return super().step(optimizer, factor, clip)


class CountsTheStep(GradScaler):
    """A step is a step."""
    def step(self, optimizer, factor=1.0, clip=None):
        norm = super().step(optimizer, factor, clip)
        optimizer.t += not self.finite
        return norm


class NeverBacksOff(GradScaler):
    """The next batch will not overflow."""
    def update(self):
        self.finite = True
        super().update()


class NeverGrows(GradScaler):
    """It fitted once."""
    def update(self):
        super().update()
        self.good_steps = 0


class CountsAllGoodSteps(GradScaler):
    """Good steps are good steps, in a row or not."""
    def update(self):
        good = self.good_steps
        super().update()
        if not self.finite:
            self.good_steps = good


class GrowsForEver(GradScaler):
    """Once there were so many good steps, every further one doubles."""
    def update(self):
        good = self.good_steps
        super().update()
        if self.good_steps < good and self.finite:
            self.good_steps = self.growth_interval - 1


WRONG_SCALERS = [NeverDivides, ClipsFirst, ReportsTheScaled, TakesTheRest, CountsTheStep, NeverBacksOff, NeverGrows, CountsAllGoodSteps, GrowsForEver]


@pytest.mark.parametrize("wrong", WRONG_SCALERS)
def test_a_wrong_scaler_is_refused(wrong):
    with pytest.raises((AssertionError, FloatingPointError)):
        for agrees in SCALER_CHECKS:
            agrees(wrong)


def test_what_float16_would_lose_is_there_once_scaled():
    """y = (a x) w with a gradient of 1e-9 at a x: nothing in float16, a thousandth off with S."""
    x, w, want = np.full((4, 3), 0.5, np.float32), np.full((2, 3), 1e-4, np.float32), 1e-9

    def gradient(how: Any, scaler: GradScaler | None) -> np.ndarray:
        a = leaf(x, F32)
        with autocast(how) if how else contextlib.nullcontext():
            loss = ops.linear(ops.linear(a, dev(np.eye(3), F32)), dev(w)).sum() * 1e-5
        (scaler.scale(loss) if scaler else loss).backward()
        return host(a.grad) / (scaler.get_scale() if scaler else 1)
    assert np.allclose(gradient(None, None), 2 * want, rtol=1e-5)
    assert not gradient("float16", None).any()
    assert np.allclose(gradient("float16", GradScaler()), 2 * want, rtol=2e-3)
    assert np.allclose(gradient("bfloat16", None), 2 * want, rtol=2e-2)


def test_a_scaler_gives_up_where_it_was_not_the_scale():
    p = leaf(np.ones(2), F32)
    optimizer = AdamW(0.1).start({"p": p})
    for scaler in (GradScaler(init_scale=1.0), GradScaler(enabled=False)):
        p.grad = dev([np.nan, 1.0], F32)
        with pytest.raises(FloatingPointError, match="the gradient's norm is nan"):
            scaler.step(optimizer)
    assert optimizer.t == 0 and np.array_equal(host(p), [1, 1])
    off = GradScaler(init_scale=2.0**10, enabled=False)
    loss = leaf(np.array(2.0))
    assert off.get_scale() == 1 and off.scale(loss) is loss
    off.update()
    assert off.get_scale() == 1


def test_a_scaler_wants_sensible_numbers_and_remembers_where_it_stood():
    for wrong in ({"init_scale": 0}, {"growth_factor": 1.0}, {"backoff_factor": 1.0}, {"backoff_factor": 0}, {"growth_interval": 0}):
        with pytest.raises(ValueError, match="a GradScaler wants init_scale > 0, growth_factor > 1 > backoff_factor > 0"):
            GradScaler(**wrong)
    usual = GradScaler()
    assert (usual.get_scale(), usual.growth_factor, usual.backoff_factor, usual.growth_interval) == (65536, 2, 0.5, 2000)      # as PyTorch's
    one, two = GradScaler(init_scale=4.0, growth_interval=3), GradScaler(growth_interval=3)
    one.update()
    one.update()
    two.load_state_dict(one.state_dict())
    two.update()
    assert two.state_dict() == {"scale": 8.0, "good": 0}


def test_a_step_is_at_the_full_rate_unless_told():
    def moved(*how: float) -> np.ndarray:
        p = leaf(np.ones(2), F32)
        optimizer = ft.SGD(0.25).start({"p": p})
        p.grad = dev([8.0, 8.0], F32)
        GradScaler(init_scale=8.0).step(optimizer, *how)
        return host(p)
    assert moved().tolist() == [0.75, 0.75] and moved(0.5).tolist() == [0.875, 0.875]


def test_the_scale_does_not_grow_out_of_float32():
    scaler = GradScaler(init_scale=2.0**60, growth_interval=1)
    for _ in range(100):
        scaler.update()
    assert scaler.get_scale() == scaler_module.LARGEST < np.finfo(np.float32).max**0.5


def test_a_captured_step_has_no_changing_scale(monkeypatch):
    monkeypatch.setattr(array, "recording", object())
    with pytest.raises(CannotCapture, match="capture a step in bfloat16"):
        GradScaler().scale(leaf(np.array(1.0)))


# ── fit ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
class Wild(GradScaler):
    """Begins where everything overflows."""
    def __init__(self, **more: Any):
        super().__init__(init_scale=2.0**22, growth_interval=4, **more)


@slow_there
def test_fit_skips_what_overflows_and_then_goes_on(monkeypatch):
    monkeypatch.setattr(train.loop, "GradScaler", Wild)
    history = fit(small(), [TOKENS], 120, AdamW(0.003), autocast="float16", progress=False)
    losses, reference = np.array(history.losses), curve()
    skipped = int((losses[:30] == losses[0]).sum()) - 1
    assert 1 <= skipped <= 10 and history.skipped[:skipped] == list(range(skipped))       # nothing moved: the same batch, the same loss
    assert np.abs(losses[skipped:skipped + 3] - reference[:3]).max() < 1e-3 and losses[-1] < reference[0] / 4


def test_a_method_looks_at_no_gradients_of_a_skipped_step(monkeypatch):
    monkeypatch.setattr(train.loop, "GradScaler", Wild)
    looks = []
    monkeypatch.setattr(ft.LoRA, "step", lambda self, edits, t, T: looks.append(
        (t, all(np.isfinite(host(p.grad)).all() for e in edits.values() for p in e.own().values() if p.grad is not None))))
    model = small()
    ft.attach(model, ft.LoRA(r=2))
    losses = fit(model, [TOKENS], 30, AdamW(0.01), autocast="float16", progress=False).losses
    assert len(losses) == 30 and 0 < len(looks) < 30 and looks[0][0] > 0 and all(finite for _, finite in looks)


def test_a_loss_that_is_not_finite_is_no_matter_of_scale():
    model = small()
    p = next(iter(model.parameters()))
    p.copy_(np.full(p.shape, np.nan))
    with pytest.raises(ft.Diverged, match="the loss is nan at step 1"):
        fit(model, [TOKENS], 3, AdamW(0.01), autocast="float16", progress=False)


@pytest.mark.parametrize("how, dtype", [("float16", None), ("bfloat16", None), (None, bfloat16), ("float16", F16)], ids=str)
def test_a_run_in_16_bits_resumes_bitwise(how, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(train.loop, "GradScaler", Wild)

    def run(out: Path, *stops: int) -> tuple[list, list]:
        for n in stops:
            model = small()
            if dtype is not None:
                model.to(dtype=dtype)
            batches = Stops([TOKENS, TOKENS[::-1].copy()], n)
            try:
                history = fit(model, batches, 24, AdamW(0.003), autocast=how, out=out, resume=True, save_every=1, progress=False)
            except Stop:
                continue
        return [history.losses, history.skipped], [np.array(host(p)) for p in model.parameters()]
    (a, values), (b, others) = run(tmp_path / "one", 99), run(tmp_path / "two", 13, 20, 99)
    assert a == b and all(np.array_equal(x, y) for x, y in zip(values, others)) and bool(a[1]) == (how == "float16")
    another = "bfloat16" if how != "bfloat16" else None
    with pytest.raises(ValueError, match="its autocast"):
        fit(small(), [TOKENS], 24, AdamW(0.003), autocast=another, out=tmp_path / "one", resume=True, progress=False)


class Stop(Exception):
    pass


class Stops:
    """Batches that raise after so many."""

    def __init__(self, batches: list, n: int):
        self.batches, self.n, self.at = batches, n, 0

    def __iter__(self) -> Iterator:
        while True:
            if self.at == self.n:
                raise Stop
            self.at += 1
            yield self.batches[(self.at - 1) % len(self.batches)]

    def state_dict(self) -> int:
        return self.at

    def load_state_dict(self, state: int) -> None:
        self.at = state


def test_class_weights_are_not_rounded():
    model = ft.classifier(small(), 3)
    batch = {"ids": TOKENS[:, :12], "labels": np.array([0, 1, 2, 0, 1, 2]), "class_weight": np.array([0.1, 1.0, 2.7])}
    with autocast():
        a = train.batch.compute_loss(model, train.read_batch(batch))[1]
    z = to_float32(host(train.batch.compute_loss(model, train.read_batch(batch))[0].output))
    assert a.dtype == F32 and float(a.data) == pytest.approx(float(ops.cross_entropy(Tensor(dev(z)), dev(batch["labels"]), dev(
        batch["class_weight"], F32)).data), rel=0.01)


# ── products of float32 ──────────────────────────────────────────────────────────────────────────────────────────────
def test_the_precision_of_float32_products_is_set_by_its_word():
    assert ft.get_float32_matmul_precision() == "highest"
    try:
        ft.set_float32_matmul_precision("high")
        assert ft.get_float32_matmul_precision() == "high" and precision.tf32
    finally:
        ft.set_float32_matmul_precision("highest")
    for wrong in ("medium", "tf32", True):
        with pytest.raises(ValueError, match="'highest' or 'high'"):
            ft.set_float32_matmul_precision(wrong)
    assert ft.get_float32_matmul_precision() == "highest" and not precision.tf32


def test_16_bits_are_known_by_their_dtype_and_not_by_their_size():
    assert has_16_bit([1, None, dev([1.0], bfloat16)]) and has_16_bit([dev([1.0], F16)]) and HALVES == {F16, bfloat16}
    assert not has_16_bit([dev([1.0], F32), dev(np.array([1], np.int16)), (2, 3), "two"])

"""Adam with 8-bit moments: the data type, the rounding of moments, the bytes of a state, and training."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import dev, host, leaf, wrong_answers

import tinyft as ft
from tinyft import array
from tinyft.dynamic import decode, dynamic_values, encode
from tinyft.optim import Adam, Adam8bit, AdamW, AdamW8bit, Optimizer, eight_bit
from tinyft.optim.eight_bit import Moment8
from tinyft.tensor import Tensor

BLOCK = 16
SIGNED = pytest.mark.parametrize("signed", [True, False])


@pytest.fixture(autouse=True)
def _small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of 40 elements have 8-bit moments; two blocks of 16 are in float32 at a time."""
    monkeypatch.setattr(eight_bit, "SMALL", 40)
    monkeypatch.setattr(eight_bit, "AT_ONCE", 2 * BLOCK)


# ── the data type ────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_values_by_their_definition():
    """Signed: 2^i values of each sign in decade i; unsigned: twice as many of one sign. 0 and 1."""
    signed, unsigned = dynamic_values(), dynamic_values(signed=False)
    for values, count, lowest in ((signed, 127, np.float32(-0.99296875)), (unsigned, 254, np.float32(0))):
        assert values.dtype == np.float32
        assert len(np.unique(values)) == 256
        assert (np.diff(values) > 0).all()
        assert values[-1] == 1
        assert values[0] == lowest
        assert ((values > 0) & (values < 1)).sum() == count
        assert (values == 0).sum() == 1
    for i in range(7):
        inside = (unsigned > 10.0**(i - 7)) & (unsigned < 10.0**(i - 6))
        assert inside.sum() == 2**(i + 1)
        steps = np.diff(unsigned[inside].astype(np.float64))
        np.testing.assert_allclose(steps, 0.9 * 10.0**(i - 6) / 2**(i + 1), rtol=1e-4)


@SIGNED
def test_a_code_is_that_of_the_nearest_value_and_of_two_the_lower(signed, rng):
    values = dynamic_values(signed=signed).astype(np.float64)
    middles = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    u = np.concatenate([rng.uniform(-1 if signed else 0, 1, 500), 10.0**rng.uniform(-9, 0, 300), values, middles,
                        np.nextafter(middles, np.float32(2)), np.nextafter(middles, np.float32(-2))])
    u = u.astype(np.float32)
    distance = abs(u.astype(np.float64)[:, None] - values)
    np.testing.assert_array_equal(host(encode(dev(u), signed=signed)), distance.argmin(axis=1))
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(host(encode(decode(dev(codes), signed=signed), signed=signed)), codes)


# ── one moment ───────────────────────────────────────────────────────────────────────────────────────────────────────
def stored(x: np.ndarray, *, signed: bool) -> np.ndarray:
    """The numbers after a round through 8 bits."""
    moment = Moment8(len(x), BLOCK, signed=signed, like=dev(x))
    moment.write(slice(0, len(x)), dev(x.copy()))
    return host(moment.read(slice(0, len(x))))


def by_definition(x: np.ndarray, *, signed: bool) -> np.ndarray:
    """Block by block and number by number, in float32."""
    values = dynamic_values(signed=signed)
    y = np.empty_like(x)
    for start in range(0, len(x), BLOCK):
        block = x[start:start + BLOCK]
        a = abs(block).max()
        for i, number in enumerate(block):
            u = number / a if a else number
            k = abs(u.astype(np.float64) - values.astype(np.float64)).argmin()
            if not signed and number > 0:
                k = max(k, 1)
            y[start + i] = values[k] * a
    return y


def numbers(rng: np.random.Generator, n: int, kind: str) -> np.ndarray:
    x = rng.standard_normal(n).astype(np.float32)
    if kind == "zero":
        x[:] = 0
    elif kind == "outlier":
        x[n // 2] = 1e6
    elif kind == "negative":
        x = -abs(x)
    elif kind == "decades":
        x *= (10.0**rng.uniform(-12, 3, n)).astype(np.float32)
    elif kind == "largest":
        x *= np.float32(1e38)
    elif kind == "constant":
        x[:] = 0.1
    return x


@SIGNED
@pytest.mark.parametrize("n", [1, BLOCK, BLOCK + 1, 5 * BLOCK - 3])
@pytest.mark.parametrize("kind", ["normal", "zero", "outlier", "negative", "decades", "largest", "constant"])
def test_a_moment_in_8_bits_is_the_definition(n, kind, signed, rng):
    x = numbers(rng, n, kind)
    with np.errstate(over="ignore"):
        x = x if signed else x * x * np.float32(1e-3)
    x = np.minimum(x, np.finfo(np.float32).max)
    y = stored(x, signed=signed)
    np.testing.assert_array_equal(y, by_definition(x, signed=signed))
    largest = np.repeat([abs(x[s:s + BLOCK]).max() for s in range(0, n, BLOCK)], BLOCK)[:n]
    assert (abs(y - x) <= 0.007032 * largest).all()
    if not signed:
        np.testing.assert_array_equal(y > 0, (x > 0) & (largest * np.float32(3.25e-7) > 0))


def test_blocks_are_independent_of_the_stretches_in_which_they_are_written(rng):
    x = numbers(rng, 5 * BLOCK - 3, "decades")
    whole = stored(x, signed=True)
    moment = Moment8(len(x), BLOCK, signed=True, like=dev(x))
    for start in (0, 2 * BLOCK, 4 * BLOCK):
        part = slice(start, min(start + 2 * BLOCK, len(x)))
        moment.write(part, dev(x[part].copy()))
    np.testing.assert_array_equal(host(moment.read(slice(0, len(x)))), whole)


def test_a_new_moment_is_zero():
    for signed in (True, False):
        moment = Moment8(BLOCK + 3, BLOCK, signed=signed, like=dev(np.zeros(1, np.float32)))
        assert (host(moment.read(slice(0, BLOCK + 3))) == 0).all()


# ── a step ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def tensors(dtype: Any = np.float32) -> dict[str, Tensor]:
    """Two tensors with 8-bit moments, which are no multiples of a block, and a small one."""
    rng = np.random.default_rng(0)
    return {"a": leaf(rng.standard_normal((7, 11)), dtype), "b": leaf(rng.standard_normal(50), dtype),
            "c": leaf(rng.standard_normal((3, 3)), dtype)}


def steps(optimizer: Optimizer, named: dict[str, Tensor], count: int, seed: int = 1) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        for p in named.values():
            p.grad = dev(rng.standard_normal(p.shape), p.grad_dtype)
        optimizer.step(clip=1.0)


def by_hand(dtype: Any, count: int, **how: Any) -> dict[str, np.ndarray]:
    """The values after some steps: AdamW whose moments go through by_definition after every step."""
    named = tensors(dtype)
    optimizer = AdamW(0.05, weight_decay=0.1, **how).start(named)
    rng = np.random.default_rng(1)
    for _ in range(count):
        for p in named.values():
            p.grad = dev(rng.standard_normal(p.shape), p.grad_dtype)
        optimizer.step(clip=1.0)
        for key, view in optimizer.named_state().items():
            kind, _, name = key.partition(".")
            if name in ("a", "b"):
                x = host(view).reshape(-1).astype(np.float32)
                view[...] = dev(by_definition(x, signed=kind == "exp_avg").reshape(view.shape), view.dtype)
    return {name: host(p) for name, p in named.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_steps_are_those_of_adamw_with_rounded_moments(dtype, monkeypatch):
    monkeypatch.setattr(ft.optim.buffers, "LARGE", 2)    # the norm is a sum over the same pieces
    named = tensors(dtype)
    optimizer = AdamW8bit(0.05, weight_decay=0.1, block=BLOCK).start(named)
    steps(optimizer, named, 6)
    for name, values in by_hand(dtype, 6).items():
        np.testing.assert_allclose(host(named[name]), values, rtol=1e-5, atol=1e-6, err_msg=name)
    assert not np.allclose(host(named["a"]), host(tensors()["a"]), atol=0.01)


def test_adam_has_the_decay_inside_the_gradient():
    found = {}
    for make in (Adam, Adam8bit, AdamW8bit):
        named = tensors()
        steps(make(0.05, weight_decay=5.0).start(named), named, 5)
        found[make] = host(named["a"]).copy()
    assert abs(found[Adam8bit] - found[Adam]).max() < 0.02
    assert abs(found[AdamW8bit] - found[Adam]).max() > 0.2
    assert Adam8bit(0.1).weight_decay == 0
    assert AdamW8bit(0.1).weight_decay == 0.01


def test_a_second_moment_of_small_gradients_keeps_the_step_small():
    """Beside a gradient of 1, those of 1e-4 have v/a = 1e-8, which would round to 0: the step would be lr · m / ε."""
    p = leaf(np.zeros(64), np.float32)
    optimizer = AdamW8bit(0.1, weight_decay=0.0).start({"w": p})
    g = np.full(64, 1e-4)
    g[0] = 1
    for i in range(30):
        p.grad = dev(g * (1 if i < 20 else 0), np.float32)
        before = host(p).copy()
        optimizer.step()
        assert abs(host(p) - before).max() <= 0.11


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_16_bits_keep_float32_master_weights(dtype):
    named = tensors(array.bfloat16 if dtype == "bfloat16" else dtype)
    optimizer = AdamW8bit(0.05, block=BLOCK).start(named)
    steps(optimizer, named, 5)
    state = optimizer.state_dict()
    assert state["master.a"].dtype == np.float32
    assert state["exp_avg_8bit.a"].dtype == np.uint8
    plain = tensors(named["a"].dtype)
    steps(AdamW(0.05).start(plain), plain, 5)
    assert abs(host(plain["a"]).astype(np.float32) - host(named["a"]).astype(np.float32)).max() < 0.03


def test_masked_values_and_tensors_without_a_gradient_stay():
    named = tensors()
    mask = np.random.default_rng(3).random((7, 11)) < 0.5
    named["a"].mask = dev(mask)
    optimizer = AdamW8bit(0.05, block=BLOCK).start(named)
    steps(optimizer, named, 3)
    assert (host(named["a"])[~mask] == host(tensors()["a"])[~mask]).all()
    assert (host(named["a"])[mask] != host(tensors()["a"])[mask]).all()
    state = {key: np.array(a) for key, a in optimizer.state_dict().items()}
    zero = host(encode(dev(np.zeros(1, np.float32)), signed=True))[0]
    assert (state["exp_avg_8bit.a"][~mask] == zero).all()
    before = host(named["b"]).copy()
    named["b"].grad = named["c"].grad = None
    named["a"].grad = dev(np.ones((7, 11)), np.float32)
    optimizer.step()
    np.testing.assert_array_equal(host(named["b"]), before)
    np.testing.assert_array_equal(optimizer.state_dict()["exp_avg_sq_8bit.b"], state["exp_avg_sq_8bit.b"])


# ── state ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_two_bytes_of_state_for_a_parameter(monkeypatch):
    monkeypatch.undo()
    n = 1 << 20
    p = leaf(np.zeros((1 << 10, 1 << 10)), np.float32)
    sizes = []
    for make in (AdamW8bit, AdamW):
        optimizer = make(0.1).start({"w": p})
        sizes.append(sum(a.nbytes for key, a in optimizer.state_dict().items() if key != "step"))
    assert sizes == [2 * n + 2 * 4 * n // 2048, 8 * n]


@pytest.mark.skipif(array.backend() != "numpy", reason="counts host memory")
def test_an_optimiser_takes_no_more_memory_than_its_state(monkeypatch):
    monkeypatch.undo()
    p = leaf(np.zeros((1 << 10, 1 << 10)), np.float32)
    p.grad = np.ones((1 << 10, 1 << 10), np.float32)
    with ft.peak_memory() as memory:
        AdamW8bit(0.1).start({"w": p}).step()
    weights, state, at_once = 4 << 20, 2.01 * (1 << 20), 16 * (1 << 17)
    assert memory["bytes"] < 1.3 * weights + state + at_once


def test_a_loaded_state_goes_on_to_the_bit():
    straight = tensors()
    optimizer = AdamW8bit(0.05, block=BLOCK).start(straight)
    steps(optimizer, straight, 3, seed=1)
    steps(optimizer, straight, 3, seed=2)
    named = tensors()
    first = AdamW8bit(0.05, block=BLOCK).start(named)
    steps(first, named, 3, seed=1)
    state = {key: np.array(a) for key, a in first.state_dict().items()}
    second = AdamW8bit(0.05, block=BLOCK).start(named)
    second.load_state_dict(state)
    steps(second, named, 3, seed=2)
    for name, p in named.items():
        np.testing.assert_array_equal(host(p), host(straight[name]))


def test_the_state_of_32_bits_or_of_another_block_is_refused():
    named = tensors()
    optimizer = AdamW8bit(0.05, block=BLOCK).start(named)
    steps(optimizer, named, 1)
    before = {key: np.array(a) for key, a in optimizer.state_dict().items()}
    for other in (AdamW(0.05), AdamW8bit(0.05, block=BLOCK // 2)):
        elsewhere = tensors()
        with pytest.raises(ValueError, match="belongs to other tensors"):
            optimizer.load_state_dict(other.start(elsewhere).state_dict())
        with pytest.raises(ValueError, match="belongs to other tensors"):
            AdamW(0.05).start(elsewhere).load_state_dict(before)
    for key, a in optimizer.state_dict().items():
        np.testing.assert_array_equal(a, before[key])


def test_the_moments_follow_a_moved_model():
    elsewhere = "strict" if array.backend() == "numpy" else "numpy"
    found = []
    for moves in (False, True):
        named = tensors()
        optimizer = AdamW8bit(0.05, block=BLOCK).start(named)
        steps(optimizer, named, 2)
        rng = np.random.default_rng(5)
        for p in named.values():
            g = dev(rng.standard_normal(p.shape), np.float32)
            p.data = array.to(p.data, elsewhere) if moves else p.data
            p.grad = array.to(g, elsewhere) if moves else g
        optimizer.step()
        found.append({name: np.array(host(p)) for name, p in named.items()})
    for name, values in found[0].items():
        np.testing.assert_allclose(found[1][name], values, rtol=1e-5, atol=1e-6)


def test_bad_input_gets_one_clear_sentence():
    with pytest.raises(ValueError, match="AdamW8bit: block wants"):
        AdamW8bit(0.1, block=0)
    with pytest.raises(TypeError, match="Adam8bit: block wants"):
        Adam8bit(0.1, block=1.5)
    assert "block=2048" in repr(Adam8bit(0.1))


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def final_losses(make: Any) -> list[float]:
    """The losses on held-out rows of a GPT that learns that every second token is the first one, for three seeds."""
    losses = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        rows = rng.integers(0, 24, (96, 12))
        rows[:, 2::2] = rows[:, :1]
        model = ft.GPT(ft.GPTConfig(vocab=24, positions=12, width=48, layers=2, heads=4), seed=seed)
        ft.fit(model, [rows[i:i + 16] for i in range(0, 80, 16)], 90, make(3e-3), progress=False)
        losses.append(ft.evaluate(model, [rows[80:]])["loss"])
    return losses


@pytest.mark.skipif(array.backend() == "strict", reason="ninety seconds there; what it learns is the same")
def test_training_is_as_good_as_with_32_bits(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(eight_bit, "SMALL", 1)           # every tensor
    wide, narrow = final_losses(AdamW), final_losses(AdamW8bit)
    assert np.mean(wide) < 2.6, "it has learned"
    assert abs(np.mean(narrow) - np.mean(wide)) < 0.03


# ── wrong answers ────────────────────────────────────────────────────────────────────────────────────────────────────
def equal_steps(*, signed: bool = True) -> np.ndarray:
    """256 equal steps."""
    return np.linspace(-1 if signed else 0, 1, 256).astype(np.float32)


def one_scale(self: Moment8, part: slice, x: Any) -> Any:
    """One scale for the tensor, that of the last stretch."""
    yield x[None], self.scale[:1, None]


def second_moment_to_zero(self: Moment8, part: slice, x: Any) -> None:
    """The nearest value, 0 too."""
    m = array.xp(x)
    for in_blocks, scale in self.by_block(part, x):
        scale[...] = abs(in_blocks).max(axis=1, keepdims=True)
        in_blocks /= m.where(scale == 0, np.float32(1), scale)
    self.codes[part] = encode(x, signed=self.signed)


def rounded_before_the_step(self: AdamW8bit, piece: Any, lr: float) -> None:
    """The moments that were read are not written back."""
    if not isinstance(piece.moments[0], Moment8):
        AdamW.update(self, piece, lr)
        return
    n = len(piece.w)
    moments = [moment.read(slice(0, n)) for moment in piece.moments]
    AdamW.update(self, ft.optim.buffers.Piece(piece.w, piece.g, moments, piece.decay), lr)


def check_values() -> None:
    test_the_values_by_their_definition()


def check_moment() -> None:
    rng = np.random.default_rng(7)
    for kind in ("outlier", "decades"):
        x = numbers(rng, 5 * BLOCK - 3, kind)
        np.testing.assert_array_equal(stored(x, signed=True), by_definition(x, signed=True))
        moment = Moment8(len(x), BLOCK, signed=True, like=dev(x))
        for start in (0, 2 * BLOCK, 4 * BLOCK):
            part = slice(start, min(start + 2 * BLOCK, len(x)))
            moment.write(part, dev(x[part].copy()))
        np.testing.assert_array_equal(host(moment.read(slice(0, len(x)))), by_definition(x, signed=True))


def check_steps() -> None:
    named = tensors()
    steps(AdamW8bit(0.05, weight_decay=0.1, block=BLOCK).start(named), named, 6)
    plain = tensors()
    steps(AdamW(0.05, weight_decay=0.1).start(plain), plain, 6)
    assert abs(host(named["a"]) - host(plain["a"])).max() < 0.02


WRONG = {
    "equal steps": (globals(), "dynamic_values", equal_steps, check_values),
    "one scale": (Moment8, "by_block", one_scale, check_moment),
    "zero": (Moment8, "write", second_moment_to_zero, test_a_second_moment_of_small_gradients_keeps_the_step_small),
    "not written": (AdamW8bit, "update", rounded_before_the_step, check_steps),
}


@wrong_answers
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_rejected(name, monkeypatch):
    where, attribute, wrong, check = WRONG[name]
    check()
    if isinstance(where, dict):
        monkeypatch.setitem(where, attribute, wrong)
    else:
        monkeypatch.setattr(where, attribute, wrong)
    with pytest.raises((AssertionError, ValueError)):
        check()

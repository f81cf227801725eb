"""The library on CuPy is the library on NumPy: ops, noise, models, methods, training, text, files.  The GPU is
emulated, CuPy is not.
"""
from __future__ import annotations

import contextlib
from functools import partial

import cupy as cp
import numpy as np
import pytest
import test_ops
from contract import KINDS, Sizes, batch, build, noise, tokens, values
from helpers import dev, host, leaf, shapes_of
from hypothesis import given, settings
from hypothesis import strategies as st

import tinyft as ft
from tinyft import GPT, AdamW, BackendError, GPTConfig, LoRA, Tensor, array, kernels, ops, optim
from tinyft.array import bfloat16
from tinyft.nn import Linear, Packed
from tinyft.train import loop as train_loop
from tinyft.train.batch import compute_loss, read_batch


def on(backend, f, *args, fast=False, **more):
    """f's result with everything made on this backend: by the definitions, or with the kernels there are for it."""
    array.use(backend)
    try:
        with contextlib.nullcontext() if fast else kernels.definitions():
            return f(*args, **more)
    finally:
        array.use("cupy")


def both(f, *args):
    return on("numpy", f, *args), on("cupy", f, *args)


def apart(a, b):
    """The largest difference, relative to the largest number, or to 1 if that is more.

    Infinite if shape or dtype differ.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return np.inf
    return float(np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1))


# ── ops ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
def value_and_gradients(f, make, shapes, seed, dtype):
    """An op's value on a drawn example, and its gradients along a drawn covector, brought to the host."""
    rng = np.random.default_rng(seed)
    e = make(rng, shapes)
    ts = [leaf(a, dtype) for a in e.inputs]
    y = e.call(f, *ts)
    y.backward(dev(rng.standard_normal(y.shape), dtype))
    return [host(y), *(host(t.grad) for t in ts)]


@pytest.mark.parametrize("name", test_ops.ALL)
@settings(max_examples=8)
@given(st.data())
def test_every_op_is_numpys_forward_and_backward(name, data):
    shapes, _ = data.draw(shapes_of(test_ops.shape_string(name), broadcast=name not in test_ops.SAME_LEADING_SIZES))
    make, seed = data.draw(st.sampled_from(test_ops.CASES[name])), data.draw(st.integers(0, 2**32 - 1))
    f, drawn = test_ops.function(name), (make, shapes, seed, np.float32)
    want = on("numpy", value_and_gradients, f, *drawn)
    for fast in (False, True):
        got = on("cupy", value_and_gradients, f, *drawn, fast=fast)
        assert len(got) == len(want) and all(apart(a, b) < 4e-6 for a, b in zip(got, want)), "with kernels" * fast


def test_a_wrong_gradient_on_one_side_is_noticed():
    make, right = test_ops.CASES["tanh"][0], test_ops.function("tanh")

    def slightly_off(x):
        return right(x) + (x * 1e-4 if array.backend() == "cupy" else 0.0)
    want, got = both(value_and_gradients, slightly_off, make, [(2, 3)], 1, np.float32)
    assert apart(got[0], want[0]) > 4e-6 and apart(got[1], want[1]) > 4e-6


# ── chance ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1,), (0, 3)])
def test_the_noise_is_the_same_bit_for_bit(shape):
    for key in (0, 12345, 2**63 - 1):
        want, got = both(lambda: host(array.uniform_like(dev(np.zeros(shape, np.float32)), key)))
        assert np.array_equal(want, got) and got.dtype == np.float32
    want, got = both(lambda: host(ops.dropout(Tensor(dev(np.ones(shape), np.float32)), 0.3, 7)))
    assert np.array_equal(want, got)


@pytest.mark.parametrize("method", [LoRA(r=2), ft.Houlsby(), ft.PrefixTuning(p=2), ft.PromptTuning(p=2)],
                         ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights_are_the_same_bit_for_bit(kind, method):
    def start(seed=0):
        model = build(kind)
        ft.attach(model, method, seed=seed)
        return values(model)
    want, got = both(start)
    assert want.keys() == got.keys() and all(np.array_equal(want[n], got[n]) for n in want)
    other = on("cupy", start, 1)
    assert any(not np.array_equal(other[n], got[n]) for n in got)  # the seed is what they come from


@pytest.mark.parametrize("keep", [True, False], ids=["kernel", "definition"])
def test_dropout_draws_the_same_bits_in_every_layer_of_a_pass(keep):
    def drawn(seed):
        """The outputs of the dropouts of a training pass, in order."""
        model, out, right = GPT(GPTConfig(40, 16, 24, 2, 4, dropout=0.3)).train(), [], array.uniform_like

        def noted(x, key):
            out.append(np.array(array.asnumpy(right(x, key))))
            return right(x, key)
        with pytest.MonkeyPatch.context() as m:
            m.setattr(array, "uniform_like", noted)
            with kernels.definitions():
                model(tokens() % 40, rng=np.random.default_rng(seed))
        return out
    want, got = on("numpy", drawn, 0), on("cupy", drawn, 0, fast=keep)
    assert len(want) == len(got) >= 5 and all(np.array_equal(a, b) for a, b in zip(want, got))
    assert not all(np.array_equal(a, b) for a, b in zip(on("cupy", drawn, 1), want))


def test_the_order_of_the_data_is_the_same():
    def order(seed=3):
        source = iter(ft.data.lm_batches(np.arange(400), 8, 4, seed=seed))
        return [np.asarray(next(source)["ids"]) for _ in range(15)]
    want, got = both(order)
    assert all(np.array_equal(a, b) for a, b in zip(want, got))
    assert not all(np.array_equal(a, b) for a, b in zip(on("cupy", order, 4), want))


# ── moving ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_run_goes_on_where_the_model_moved_to():
    """Three steps of AdamW on NumPy and three on CuPy, one optimiser: what six on NumPy give."""
    def steps(route):
        model, out = on("numpy", build, "gpt"), []
        on("numpy", ft.attach, model, LoRA(r=2, targets=("attn.[qv]", "mlp.up")))
        optimizer = AdamW(0.01, weight_decay=0.1).start(ft.trained(model))
        for backend in route:
            model.to(backend)
            _, loss = compute_loss(model, read_batch(batch("gpt", 0)))
            loss.backward()
            optimizer.step(clip=1.0)
            optimizer.zero_grad()
            out.append(float(loss.data))
        return np.array(out), {n: host(p) for n, p in ft.trained(model).items()}, optimizer.state_dict()
    want, values_, state = steps(["numpy"] * 6)
    got, there, moments = steps(["numpy"] * 3 + ["cupy"] * 3)
    assert np.abs(got / want - 1).max() < 4e-6 and want[-1] < want[0] - 1e-3
    assert all(apart(there[n], values_[n]) < 2e-4 for n in there)
    assert all(apart(moments[k], state[k]) < 2e-4 for k in state)


def test_tensors_move_only_when_told_to():
    x = Tensor(np.arange(6, dtype=np.float32).reshape(2, 3), requires_grad=True)
    y = x.to("cupy")
    assert y.device == "cupy"
    assert y.requires_grad
    assert x.device == "numpy"
    assert y.to("cupy").data is y.data
    assert np.array_equal(host(y.to("numpy")), host(x)) and y.to("numpy").device == "numpy"
    with pytest.raises(BackendError, match="add: arrays on cupy and numpy"):
        x + y


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────
STEPS = 5


def train(kind, method, **more):
    """The losses of some steps of AdamW, and what the model then says, in float32."""
    model = build(kind)
    if method is not None:
        ft.attach(model, method)
    history = ft.fit(model, [batch(kind, 0), batch(kind, 1)], STEPS, AdamW(0.01), progress=False, **more)
    with ft.no_grad():
        return np.array(history.losses), host(model(tokens()))


METHODS = {"everything": None, "lora": LoRA(r=2, targets=("attn.[qv]", "mlp.up")),
           "lora, dropout": LoRA(r=2, dropout=0.3), "bitfit": ft.BitFit(),
           "houlsby": ft.Houlsby(), "prefix": ft.PrefixTuning(p=2), "prompt": ft.PromptTuning(p=2),
           "partial": ft.Partial()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_numpys(kind, method):
    want, y = on("numpy", train, kind, METHODS[method])
    for fast in (False, True):
        got, z = on("cupy", train, kind, METHODS[method], fast=fast)
        # Adam divides by the size of a gradient: a last bit of a sum grows from step to step
        assert np.abs(got / want - 1).max() < (4e-6 if fast else 2e-6) and len(want) == STEPS
        # Adam blows up the rounding of what has no gradient, as a key's bias
        assert apart(z, y) < 2e-4
    # something was learned: had it stood still, all would agree
    assert np.abs(np.diff(want)).min() > 1e-4


@pytest.mark.parametrize("method", ["everything", "lora, dropout"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["bfloat16", "float16"])
def test_training_in_16_bits_is_numpys(how, kind, method, monkeypatch):
    """But for what rounds the other way, since it was added up in another order; the kernels also round probabilities
    and the gradients of scores, which are factors of products there.  Adam makes much of little where a gradient is
    almost nothing.  S is small enough for all.
    """
    monkeypatch.setattr(train_loop, "GradScaler", partial(ft.GradScaler, 2.0**8))
    first = {"bfloat16": 3e-3, "float16": 4e-4}[how]
    first_of_definitions = {"bfloat16": 1e-6, "float16": 1e-4}[how]  # in float16 a few sums round the other way
    want, y = on("numpy", train, kind, METHODS[method], autocast=how)
    exact, _ = on("numpy", train, kind, METHODS[method])
    for fast in (False, True):
        got, z = on("cupy", train, kind, METHODS[method], fast=fast, autocast=how)
        off = np.abs(got - want) / want[0]
        assert off[0] < (first if fast else first_of_definitions)
        assert off.max() < (2e-2 if fast else 2e-3)
        assert apart(z, y) < 0.1
    assert np.abs(want / exact - 1).max() > 1e-6  # it was rounded


@pytest.mark.parametrize("dtype", [bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_training_a_model_in_16_bits_is_numpys(dtype):
    def life():
        model = build("gpt").to(dtype=dtype)
        losses = ft.fit(model, [batch("gpt", 0), batch("gpt", 1)], STEPS, AdamW(1e-3), progress=False).losses
        return np.array(losses), {str(p.dtype) for p in model.parameters()}
    want, dtypes = on("numpy", life)
    for fast in (False, True):
        got, same = on("cupy", life, fast=fast)
        assert np.abs(got / want - 1).max() < 2e-3 and same == dtypes == {np.dtype(dtype).name}


def test_accumulating_is_numpys():
    (want, _), (got, _) = both(lambda: train("gpt", None, accumulate=3))
    assert np.abs(got / want - 1).max() < 1e-6


def test_an_optimiser_that_does_almost_the_same_is_noticed(monkeypatch):
    want, _ = on("numpy", train, "gpt", None)
    right = optim.optimizers.adam_update

    def without_correction(w, g, m, v, lr, b1, b2, eps, decay, t):
        right(w, g, m, v, lr, b1, b2, eps * 1e4, decay, t)
    monkeypatch.setattr(optim.optimizers, "adam_update", without_correction)
    got, _ = on("cupy", train, "gpt", None)
    assert np.abs(got / want - 1).max() > 1e-5


def test_evaluation_and_resuming(tmp_path):
    def run(folder):
        model = build("bert")
        ft.attach(model, LoRA(r=2))

        def run_evaluation():
            return ft.evaluate(model, [batch("bert", 2)])

        pair = [batch("bert", 0), batch("bert", 1)]
        history = ft.fit(model, pair, 4, AdamW(0.01), progress=False, out=folder, resume=True, evaluate=run_evaluation,
                         evaluate_every=2)
        return np.array(history.losses), run_evaluation()
    (want, judged), (got, also) = both(lambda: run(tmp_path / array.backend()))
    assert np.abs(got / want - 1).max() < 1e-6 and judged.keys() == also.keys()
    assert all(abs(judged[k] - also[k]) <= 1e-5 * abs(judged[k]) for k in judged)
    (tmp_path / "moved").mkdir()  # begun on NumPy, ended on CuPy: the state is host arrays
    (tmp_path / "moved"
     / "checkpoint.safetensors").write_bytes((tmp_path / "numpy" / "checkpoint.safetensors").read_bytes())
    again, same = on("cupy", run, tmp_path / "moved")
    assert np.array_equal(again, want) and abs(same["loss"] - judged["loss"]) < 1e-6


# ── edits, files, text ───────────────────────────────────────────────────────────────────────────────────────────────
def tuned(kind="gpt"):
    model = build(kind)
    ft.attach(model, LoRA(r=2, targets=("attn.[qv]", "mlp.up")))
    return noise(model)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_detaching_and_coming_back(kind):
    def life():
        model, base = tuned(kind), host(build(kind)(tokens()))
        edited = host(model(tokens()))
        adapter = ft.detach(model)
        plain = host(model(tokens()))
        ft.attach(model, adapter)
        back = host(model(tokens()))
        merged = host(ft.merge(model)(tokens()))
        assert np.array_equal(plain, base)
        assert np.array_equal(back, edited)
        assert apart(merged, edited) < 1e-5
        assert apart(edited, base) > 1e-2
        return edited, merged
    for want, got in zip(*both(life)):
        assert apart(got, want) < 1e-5


def test_adapters_and_models_go_from_one_backend_to_the_other(tmp_path):
    model = on("numpy", tuned)
    want = host(model(tokens()))
    ft.save_adapter(model, tmp_path / "adapter")
    other = build("gpt")
    ft.load_adapter(other, tmp_path / "adapter")
    assert other.embed.weight.device == "cupy" and apart(host(other(tokens())), want) < 1e-5
    there = other.to("numpy")
    assert there.embed.weight.device == "numpy" and apart(host(there(tokens())), want) < 1e-5
    ft.save(ft.merge(build("gpt")), tmp_path / "model")
    base = host(build("gpt")(tokens()))
    for backend in ("numpy", "cupy"):
        loaded = on(backend, ft.load, tmp_path / "model")
        loaded = loaded[0] if isinstance(loaded, tuple) else loaded
        assert loaded.embed.weight.device == backend and apart(host(loaded(tokens())), base) < 1e-5


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("sampling", [dict(), dict(temperature=0.8, top_k=5), dict(temperature=1.2, top_p=0.7)],
                         ids=str)
def test_text_is_the_same(cache, sampling):
    def write():
        model = tuned().to(dtype=np.float64)  # so that no rounding decides between two tokens
        mask = np.ones((4, 7), bool)
        mask[1, :2] = False
        return ft.generate(model, tokens(), 6, mask=mask, cache=cache, rng=np.random.default_rng(1), **sampling)
    want, got = both(write)
    assert isinstance(got, np.ndarray) and np.array_equal(got, want) and want.shape == (4, 13)


class Int8(Packed):
    """W = s C, C int8, one s per row."""

    def __init__(self, W):
        m = array.xp(W)
        self.scale = m.abs(W).max(axis=1, keepdims=True) / 127
        self.codes, self.shape = m.rint(W / self.scale).astype(np.int8), W.shape

    def dequantize(self):
        return self.scale * self.codes.astype(self.scale.dtype)


def test_a_step_over_a_packed_base():
    def packed_then_trained():
        model = build("gpt")
        for m in model.modules():
            if isinstance(m, Linear):
                m.weight = Int8(m.weight.data)
        assert model.blocks[0].attn.q.weight.codes.dtype == np.int8
        ft.attach(model, LoRA(r=2))
        return np.array(ft.fit(model, [batch("gpt", 0)], STEPS, AdamW(0.02), progress=False).losses)
    want, got = both(packed_then_trained)
    assert np.abs(got / want - 1).max() < 1e-6 and want[-1] < want[0] - 1e-3


# ── two places ───────────────────────────────────────────────────────────────────────────────────────────────────────
H, D = np.ones((2, 3), np.float32), cp.ones((2, 3), np.float32)
MIXED = {
    "add": lambda: Tensor(D) + Tensor(H), "add, the other way": lambda: Tensor(H) + Tensor(D),
    "add an array": lambda: Tensor(D) + H,
    "mul": lambda: Tensor(D) * Tensor(H), "sub": lambda: H - Tensor(D), "div": lambda: Tensor(H) / Tensor(D),
    "matmul": lambda: Tensor(D) @ Tensor(H.T), "maximum": lambda: ops.maximum(Tensor(D), Tensor(H)),
    "concatenate": lambda: ops.concatenate(Tensor(D), Tensor(H)),
    "linear": lambda: ops.linear(Tensor(D), Tensor(np.ones((4, 3), np.float32))),
    "linear, host bias": lambda: ops.linear(Tensor(D), Tensor(cp.ones((4, 3), np.float32)),
                                            Tensor(np.ones(4, np.float32))),
    "layer_norm, host weights": lambda: ops.layer_norm(Tensor(D), Tensor(np.ones(3, np.float32)),
                                                       Tensor(np.zeros(3, np.float32))),
    "embedding, host ids": lambda: ops.embedding(Tensor(D), np.array([0, 1])),
    "embedding, host rows": lambda: ops.embedding(Tensor(H), cp.array([0, 1])),
    "getitem, host index": lambda: Tensor(D)[np.array([0, 1])],
    "getitem, in a tuple": lambda: Tensor(D)[:, np.array([0, 1])],
    "where, host mask": lambda: ops.where(H > 0, Tensor(D), 0.0),
    "where, host value": lambda: ops.where(D > 0, Tensor(D), Tensor(H)),
    "gather, host indices": lambda: ops.gather(Tensor(D), np.zeros((2, 1), int)),
    "attention, host keys": lambda: ops.attention(Tensor(D), Tensor(H), Tensor(D)),
    "attention, host mask": lambda: ops.attention(Tensor(D), Tensor(D), Tensor(D), key_mask=np.ones((2, 2), bool)),
    "attention, host noise": lambda: ops.attention(Tensor(D), Tensor(D), Tensor(D),
                                                   dropout_mask=np.ones((2, 2), np.float32)),
    "cross_entropy, host labels": lambda: ops.cross_entropy(Tensor(D), np.array([0, 1])),
    "cross_entropy, host weights": lambda: ops.cross_entropy(Tensor(D), cp.array([0, 1]), np.ones(3, np.float32)),
}


@pytest.mark.parametrize("what", MIXED)
def test_arrays_of_two_places_are_refused_and_both_are_named(what):
    with pytest.raises(BackendError, match=r"\w+: arrays on cupy and numpy in one operation: move one"):
        MIXED[what]()


def test_a_model_and_an_input_of_two_places():
    model = build("gpt")
    assert host(model(tokens())).shape == (4, 7, Sizes.V)  # host ids are put beside the weights
    assert host(on("numpy", build, "gpt")(dev(tokens()))).shape == (4, 7, Sizes.V)
    model.blocks[1].mlp.up.weight.data = cp.asnumpy(model.blocks[1].mlp.up.weight.data)
    with pytest.raises(BackendError, match="linear: arrays on cupy and numpy"):
        model(tokens())

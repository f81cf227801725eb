"""Modules as trees of names, their state, what a forward pass knows, and the layers."""
from __future__ import annotations

import math

import numpy as np
import pytest
from helpers import dev, gradcheck, host, leaf, seeds
from hypothesis import given
from hypothesis import strategies as st

from tinyft import array, nn, ops
from tinyft.nn import Cache, Context, Dropout, Embedding, LayerNorm, Linear, Module, Packed, Parameter, TiedHead
from tinyft.tensor import Tensor


class Tree(Module):
    "One of everything a module may own."

    def __init__(self, rng):
        self.embed = Embedding(5, 4, rng)
        self.layers = [Linear(4, 4, rng), Linear(4, 4, rng, bias=False)]
        self.by_name = {"a": LayerNorm(4), "b": Parameter(array.normal(rng, (2,)))}
        self.head, self._embed = TiedHead(self.embed, bias=True), self.embed
        self.table, self.p, self.note = dev(np.arange(3)), 0.1, "text"
        self.scales = {"one": dev(np.ones(2), np.float32)}

    def forward(self, ids, ctx):
        x = self.embed(ids, ctx)
        for m in self.layers:
            x = m(x, ctx)
        return self.head(self.by_name["a"](x, ctx), ctx)


NAMES = ["embed.weight", "layers.0.weight", "layers.0.bias", "layers.1.weight", "by_name.b", "by_name.a.weight", "by_name.a.bias",
         "head.bias"]


@pytest.fixture
def tree(rng):
    return Tree(rng)


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_names(tree):
    assert set(tree.named_parameters()) == set(NAMES) and len(tree.parameters()) == len(NAMES)
    assert [n for n, _ in tree.named_modules()] == ["", "embed", "layers.0", "layers.1", "by_name.a", "head"]
    assert list(tree.named_buffers()) == ["table", "scales.one"]
    assert list(tree.own()) == ["by_name.b"] and tree.named_parameters()["layers.0.weight"] is tree.layers[0].weight
    assert set(tree.state_dict()) == {*NAMES, "table", "scales.one"} and tree.state_dict()["layers.0.weight"] is tree.layers[0].weight.data
    assert len(list(tree.modules())) == 6


def test_names_of_parts_of_parts(rng):
    class Nest(Module):
        def __init__(self, inner):
            self.inner = inner
    assert [n for n, _ in Nest(Nest(Nest(LayerNorm(2)))).named_modules()] == ["", "inner", "inner.inner", "inner.inner.inner"]
    assert list(Nest(Nest(LayerNorm(2))).named_parameters()) == ["inner.inner.weight", "inner.inner.bias"]


def test_what_is_not_there_is_not_read(rng):
    read = []

    class Listening(Module):
        def before(self, x, ctx):
            return x

        def after(self, x, y, ctx):
            return y

        def tensor(self, name, p):
            read.append(name)
            return p
    for bias in (False, True):
        m = Linear(2, 2, rng, bias=bias)
        m.edits = {"l": Listening()}
        m(leaf([[1.0, 2.0]]))
        head = TiedHead(Embedding(3, 2, rng), bias=bias)
        head.edits = {"l": Listening()}
        head(leaf([[1.0, 2.0]]))
    assert read == ["weight", "weight", "bias", "bias"]


def test_shared_tensors_appear_once(rng):
    class Twice(Module):
        def __init__(self):
            self.one, self.two = Linear(3, 3, rng), Linear(3, 3, rng)
            self.two.weight = self.one.weight
            self.again = self.one
    m = Twice()
    assert list(m.named_parameters()) == ["one.weight", "one.bias", "two.bias"]
    m.one.weight.grad = dev(np.ones((3, 3)))
    m.zero_grad()
    assert m.two.weight.grad is None


def test_train_and_eval_reach_every_part(tree):
    assert not tree.training
    assert tree.train() is tree and all(m.training for m in tree.modules())
    assert tree.eval() is tree and not any(m.training for m in tree.modules())


def test_a_module_without_a_forward_says_so():
    with pytest.raises(NotImplementedError, match="Module has no forward"):
        Module()(1)
    with pytest.raises(NotImplementedError):
        Packed().dequantize()


# ── state ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def copies(m):
    return {n: host(a).copy() for n, a in m.state_dict().items()}


def test_load_state_dict_copies_into_place(tree):
    other = Tree(np.random.default_rng(9))
    memory = {n: p.data for n, p in tree.named_parameters().items()}
    other.table += 1
    tree.load_state_dict(copies(other))
    for n, p in tree.named_parameters().items():
        assert p.data is memory[n]
        np.testing.assert_array_equal(host(p), host(other.named_parameters()[n]))
    assert host(tree.table).tolist() == [1, 2, 3]
    assert host(tree(dev([[1, 2]]))).tolist() == host(other(dev([[1, 2]]))).tolist()


@pytest.mark.parametrize("spoil, error, words", [
    (lambda s: s.pop("head.bias"), KeyError, "missing.*head.bias"),
    (lambda s: s.update(extra=np.ones(2)), KeyError, "unexpected.*extra"),
    (lambda s: s.update({"layers.0.weight": np.ones((4, 5))}), ValueError, r"layers.0.weight: \(4, 5\) for \(4, 4\)"),
    (lambda s: s.update({"table": np.ones(4)}), ValueError, r"table: \(4,\) for \(3,\)")])
def test_a_state_that_does_not_fit_changes_nothing(tree, spoil, error, words):
    before, state = copies(tree), copies(Tree(np.random.default_rng(9)))
    spoil(state)
    with pytest.raises(error, match=words):
        tree.load_state_dict(state)
    for n, a in copies(tree).items():
        np.testing.assert_array_equal(a, before[n])


def test_load_state_dict_not_strict(tree):
    before = copies(tree)
    tree.load_state_dict({"head.bias": np.ones(5), "stranger": np.ones(1)}, strict=False)
    assert host(tree.head.bias).tolist() == [1] * 5
    np.testing.assert_array_equal(host(tree.layers[0].weight), before["layers.0.weight"])
    with pytest.raises(ValueError, match="head.bias"):
        tree.load_state_dict({"head.bias": np.ones(6)}, strict=False)


def test_a_load_between_forward_and_backward_is_noticed(tree):
    loss = tree(dev([[1, 2]])).sum()
    tree.load_state_dict(copies(tree))
    with pytest.raises(RuntimeError, match="written in place"):
        loss.backward()


def test_to_dtype_moves_floats_and_keeps_tying(tree):
    tied = tree.embed.weight
    tied.grad = dev(np.ones((5, 4)))
    assert tree.to(dtype=np.float64) is tree
    assert tree.embed.weight is tied is tree.head._embed.weight and tied.grad is None
    assert {p.dtype for p in tree.parameters()} == {np.dtype(np.float64)} and tree.scales["one"].dtype == np.float64
    assert host(tree.table).dtype.kind == "i"
    assert tree(dev([[0, 1]])).dtype == np.float64
    tree.to(dtype=np.float32)


def test_to_backend_moves_everything(tree):
    ids, here = dev([[1, 2]]), array.backend()
    want = host(tree(ids))
    for name in ("strict", "numpy"):
        tree.to(name)
        assert {array.name_of(a) for a in tree.state_dict().values()} == {name} and tree.head._embed.weight is tree.embed.weight
        got = tree(array.to(ids, name))
        assert got.device == name
        np.testing.assert_allclose(host(got), want, rtol=1e-5)
    assert here == array.backend()


# ── what a forward pass knows ────────────────────────────────────────────────────────────────────────────────────────
def begun(**facts) -> Context:
    ids = facts.pop("ids")
    ctx = Context(ids, **facts)
    ctx.begin(np.asarray(ids), dev(np.zeros(1), np.float32))
    return ctx


def test_a_fact_that_was_not_given():
    ctx = Context(ids=[[1]])
    with pytest.raises(AttributeError, match=r"was not told its 'colour': call model\(ids, colour=\.\.\.\)"):
        _ = ctx.colour
    with pytest.raises(AttributeError, match="not told its 'task'"):
        ctx.need("task")
    assert Context().output_hidden_states is False and ctx.need("ids") == [[1]] and ctx.mask is None and ctx.scratch == {} and Context(colour=3).colour == 3


def test_again_is_the_same_batch_without_the_noise():
    source = Context(ids=[[5]], rng=np.random.default_rng(0))
    ctx = begun(ids=[[1, 2]], mask=[[True, False]], rng=np.random.default_rng(0), source=source, output_hidden_states=True, colour=3)
    ctx.prepend(2)
    ctx.scratch["x"] = 1
    again = ctx.again(task=[7])
    assert np.array_equal(again.inputs["ids"], [[1, 2]]) and again.mask == [[True, False]] and again.rng is None and again.scratch == {}
    assert again.colour == 3
    assert again.task == [7] and again.source is not source and again.source.rng is None and again.source.ids == [[5]] and again.output_hidden_states
    assert Context(ids=[[1]]).again().source is None


def test_begin_puts_facts_beside_the_weights():
    ctx = begun(ids=[[1, 2]], mask=[[1, 0]], token_type_ids=[[0, 1]], logit_positions=[1], task=[3])
    for a in (ctx.ids, ctx.mask, ctx.token_type_ids, ctx.logit_positions, ctx.task):
        assert array.name_of(a) == array.backend()
    assert host(ctx.mask).dtype == bool
    ctx = Context()
    ctx.begin(Tensor(dev(np.zeros((2, 3, 4)), np.float32)), dev([0.0]))
    assert host(ctx.ids).tolist() == [[-1] * 3] * 2
    with pytest.raises(ValueError, match=r"mask has shape \(1, 3\), the ids \(1, 2\)"):
        begun(ids=[[1, 2]], mask=[[1, 0, 1]])
    with pytest.raises(ValueError, match=r"\(B, T\).*got shape \(2,\)"):
        begun(ids=[1, 2])


def test_prepend_keeps_facts_aligned():
    ctx = begun(ids=[[4, 5], [6, 0]], mask=[[True, True], [True, False]], token_type_ids=[[0, 1], [1, 1]])
    ctx.prepend(2)
    assert host(ctx.ids).tolist() == [[-1, -1, 4, 5], [-1, -1, 6, 0]]
    assert host(ctx.mask).tolist() == [[True, True, True, True], [True, True, True, False]]
    assert host(ctx.token_type_ids).tolist() == [[0, 0, 0, 1], [0, 0, 1, 1]]
    ctx = begun(ids=[[4, 5]])
    ctx.prepend(1)
    assert ctx.mask is None and ctx.token_type_ids is None and ctx.ids.shape == (1, 3)


def test_positions_by_hand():
    assert host(begun(ids=[[7, 7, 7]]).positions()).tolist() == [[0, 1, 2]]
    left = begun(ids=[[7] * 4] * 2, mask=[[0, 0, 1, 1], [1, 1, 1, 1]])
    assert host(left.positions())[0, 2:].tolist() == [0, 1] and host(left.positions())[1].tolist() == [0, 1, 2, 3]
    right = begun(ids=[[7] * 4], mask=[[1, 1, 0, 0]])
    assert host(right.positions())[0, :2].tolist() == [0, 1]
    assert host(left.positions()).min() == 0


@given(seeds(), st.booleans(), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_positions_count_real_tokens_and_the_cache_goes_on(rng, padded, B, T1, T2):
    "Every real token stands after the real ones before it, whether the row came in one piece or in two."
    T, cache = T1 + T2, Cache()
    mask = rng.random((B, T)) < 0.6 if padded else None
    ids = np.ones((B, T), int)
    part = lambda s: begun(ids=ids[:, s], mask=None if mask is None else mask[:, s], cache=cache)
    got = []
    for s in (slice(0, T1), slice(T1, T)):
        ctx = part(s)
        assert ctx.past_length == s.start
        got.append(np.broadcast_to(host(ctx.positions()), (B, s.stop - s.start)))
        cache.advance(ctx)
    got, whole = np.concatenate(got, 1), begun(ids=ids, mask=mask)
    real = np.ones((B, T), bool) if mask is None else mask
    for b in range(B):
        assert got[b][real[b]].tolist() == list(range(real[b].sum()))
    np.testing.assert_array_equal(got, np.broadcast_to(host(whole.positions()), (B, T)))
    assert cache.length == T and (mask is None) == (cache.mask is None)
    if mask is not None:
        np.testing.assert_array_equal(host(cache.mask), mask)


def test_keys_when_only_one_part_has_a_mask():
    for first, second in ((None, [[True, False]]), ([[True, False]], None)):
        cache = Cache()
        cache.advance(begun(ids=[[1, 1]], mask=first, cache=cache))
        keys = begun(ids=[[1, 1]], mask=second, cache=cache).key_mask()
        assert host(keys).tolist() == [(first or [[True, True]])[0] + (second or [[True, True]])[0]]
    assert begun(ids=[[1]]).key_mask() is None


def test_the_cache_joins_and_chooses_rows():
    cache, a, b = Cache(), leaf(np.zeros((2, 1, 1, 3))), leaf(np.ones((2, 1, 2, 3)))
    assert cache.join("x", a, a) == (a, a)
    k, v = cache.join("x", b, b * 2)
    assert k.shape == (2, 1, 3, 3) and host(k)[0, 0, :, 0].tolist() == [0, 1, 1] and host(v)[0, 0, :, 0].tolist() == [0, 2, 2]
    cache.length, cache.mask = 3, dev(np.array([[True] * 3, [False] * 3]))
    one = cache.rows(dev([1, 1]))
    assert one.kv["x"][0].shape == (2, 1, 3, 3) and one.length == 3 and host(one.mask).tolist() == [[False] * 3] * 2
    assert cache.kv["x"][0] is k
    cache.mask = None
    assert cache.rows(dev([0])).mask is None


def test_pick_takes_the_places_the_head_is_wanted_at():
    x = leaf(np.arange(12.0).reshape(2, 3, 2))
    assert Context().select_positions(x) is x
    assert host(begun(ids=[[1] * 3] * 2, logit_positions=[1, 5]).select_positions(x)).tolist() == [[2, 3], [10, 11]]


def test_the_outermost_call_makes_the_context():
    class Echo(Module):
        def forward(self, x, ctx):
            return ctx
    ctx = Echo()(1, task=5)
    assert ctx.task == 5 and Echo()(1, ctx) is ctx


# ── layers ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def double(m: Module) -> Module:
    return m.to(dtype=np.float64)


def through(m: Module, x: np.ndarray, rng) -> None:
    "Gradients with respect to the input and every parameter of m, checked."
    params = m.parameters()

    def f(x, *values):
        for p, v in zip(params, values):
            kept[id(p)] = v
        return m(x, Context())
    kept: dict[int, Tensor] = {}
    reads = type(m).read
    try:
        Module.read = lambda self, name: kept.get(id(getattr(self, name)), getattr(self, name))
        gradcheck(f, [x, *(host(p) + rng.standard_normal(p.shape) for p in params)], rng)
    finally:
        Module.read = reads


def test_linear(rng):
    m = double(Linear(3, 5, rng))
    assert (host(m.bias) == 0).all()
    m.bias.copy_(rng.standard_normal(5))
    x = rng.standard_normal((2, 4, 3))
    np.testing.assert_allclose(host(m(Tensor(dev(x)))), np.einsum("btk,nk->btn", x, host(m.weight)) + host(m.bias), rtol=1e-12)
    assert (m.in_features, m.out_features) == (3, 5) and m.weight.shape == (5, 3)
    through(m, x, rng)
    through(double(Linear(3, 2, rng, bias=False)), x, rng)
    assert Linear(3, 2, rng, bias=False).bias is None


def test_initial_values_have_the_deviation_they_say(rng):
    for m in (Linear(100, 100, rng), Embedding(100, 100, rng), Linear(100, 100, rng, std=0.5), Embedding(100, 100, rng, std=0.5)):
        std = 0.5 if host(m.weight).std() > 0.1 else 0.02
        assert abs(host(m.weight).std() / std - 1) < 0.05 and abs(host(m.weight).mean()) < std / 20 and m.weight.dtype == np.float32
    assert host(Linear(100, 100, rng, std=0.5).weight).std() > 0.1 < host(Embedding(100, 100, rng, std=0.5).weight).std()
    drawn = (np.random.default_rng(1).standard_normal((3, 3)) * 0.02).astype(np.float32)      # a seed's own numbers, on every machine
    for make in (Linear, Embedding):
        assert np.array_equal(host(make(3, 3, np.random.default_rng(1)).weight), drawn)
        assert not np.array_equal(host(make(3, 3, np.random.default_rng(2)).weight), drawn)


def test_embedding_and_tied_head(rng):
    e = double(Embedding(5, 3, rng))
    assert (e.in_features, e.out_features, e.tied) == (5, 3, False)
    np.testing.assert_array_equal(host(e(dev([[4, 0]]))), host(e.weight)[[[4, 0]]])
    given = leaf(np.ones((1, 2, 3)))
    assert e(given) is given
    assert TiedHead(e).bias is None and (host(TiedHead(e, bias=True).bias) == 0).all()
    head = double(TiedHead(e, bias=True))
    assert e.tied and (head.in_features, head.out_features) == (3, 5) and list(head.named_parameters()) == ["bias"]
    head.bias.copy_(np.arange(5.0))
    np.testing.assert_allclose(host(head(given)), host(given) @ host(e.weight).T + np.arange(5))
    np.testing.assert_allclose(host(TiedHead(e)(given)), host(given) @ host(e.weight).T)
    head(e(dev([[1, 1]]))).sum().backward()
    w = host(e.weight)
    want = np.tile(w[1] * 2, (5, 1))
    want[1] += 2 * w.sum(0)
    np.testing.assert_allclose(host(e.weight.grad), want)                        # both uses of the one weight


def test_layer_norm(rng):
    m = double(LayerNorm(4, eps=0.1))
    x = rng.standard_normal((2, 4)) * 3 + 1
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.1)
    np.testing.assert_allclose(host(m(Tensor(dev(x)))), want)
    assert m.weight.decay is False and m.bias.decay is False and (m.in_features, m.out_features) == (4, 4) and LayerNorm(4).eps == 1e-5
    through(m, x, rng)


def test_dropout_acts_in_training_with_a_generator_only(rng):
    m, x = Dropout(0.5), leaf(np.ones(1000), np.float32)
    assert m(x, Context(rng=rng)) is x
    m.train()
    assert m(x, Context()) is x and m(x) is x
    y = host(m(x, Context(rng=rng)))
    assert set(y.tolist()) == {0.0, 2.0} and abs(y.mean() - 1) < 0.15
    assert not np.array_equal(y, host(m(x, Context(rng=rng))))                   # another call, other noise
    a, b = (host(m(x, Context(rng=np.random.default_rng(5)))) for _ in range(2))
    assert np.array_equal(a, b)
    state = rng.bit_generator.state
    assert Dropout(0.0).train()(x, Context(rng=rng)) is x and rng.bit_generator.state == state      # no noise, none drawn
    for p in (-0.1, 1.0, 2.0):
        with pytest.raises(ValueError, match="0 <= p < 1"):
            Dropout(p)


# ── packed weights ───────────────────────────────────────────────────────────────────────────────────────────────────
class Int8(Packed):
    "W ≈ s c, c int8 codes, one scale s for each row."

    def __init__(self, W: np.ndarray):
        self.shape, scale = W.shape, np.abs(W).max(1, keepdims=True) / 127
        self.codes, self.scale = dev(np.round(W / scale), np.int8), dev(scale, W.dtype)

    def dequantize(self):
        return self.codes.astype(self.scale.dtype) * self.scale


def test_a_packed_weight_in_a_parameters_place(rng):
    m = double(Linear(3, 5, rng))
    dense = host(m.weight).copy()
    m.weight = Int8(dense)
    double(m)
    x = rng.standard_normal((2, 4, 3))
    y = m(Tensor(dev(x)))
    assert y.shape == (2, 4, 5) and list(m.named_parameters()) == ["bias"] and list(m.named_buffers()) == ["weight.codes", "weight.scale"]
    assert m.weight.nbytes == 15 + 5 * 8 and (m.in_features, m.out_features) == (3, 5) and m.weight.codes.dtype == np.int8
    np.testing.assert_allclose(host(y), x @ host(m.weight.dequantize()).T, rtol=1e-12, atol=1e-15)
    assert np.abs(host(m.weight.dequantize()) - dense).max() < np.abs(dense).max() / 200
    m.bias.copy_(np.arange(5.0))
    np.testing.assert_allclose(host(m(Tensor(dev(x)))), x @ host(m.weight.dequantize()).T + np.arange(5), rtol=1e-12)
    through(m, x, rng)
    gradcheck(lambda x: m.weight.matmul(x), [rng.standard_normal(3)], rng)
    m.bias = None
    gradcheck(lambda x: m(x), [x], rng)
    state = copies(m)
    m.load_state_dict({**state, "weight.codes": state["weight.codes"] * 0})
    assert (host(m.weight.dequantize()) == 0).all()


def test_a_packed_weight_is_made_anew_and_not_kept(rng):
    made = []

    class Counted(Int8):
        def dequantize(self):
            made.append(1)
            return super().dequantize()
    W = Counted(rng.standard_normal((5, 3)))
    y = W.matmul(leaf(rng.standard_normal((2, 3))))
    assert len(made) == 1
    held = [c.cell_contents for _, back in y.record.pulls for c in back.__closure__]
    inner = [c.cell_contents for f in held for c in f.__closure__]
    assert not any(array.is_array(a) for a in inner)
    y.sum().backward()
    assert len(made) == 2


def test_the_names_a_user_imports():
    assert set(nn.__all__) == {"Context", "Cache", "Parameter", "Module", "Packed", "Linear", "Embedding", "TiedHead", "LayerNorm",
                               "Dropout", "no_grad"}
    assert Parameter([1.0]).requires_grad and Parameter([1.0]).decay is None and math.isclose(ops.exp(Parameter([0.0])).item(), 1)

"""Modules as trees of names, their state, the Context of a forward pass, and the layers."""
from __future__ import annotations

import math
import weakref

import numpy as np
import pytest
from helpers import dev, gradcheck, host, leaf, seeds
from hypothesis import given
from hypothesis import strategies as st

from tinyft import array, nn, ops
from tinyft.nn import (
    Cache,
    Context,
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    Module,
    Packed,
    Parameter,
    RMSNorm,
    TiedHead,
    dense,
)
from tinyft.tensor import Tensor


class Tree(Module):
    """One of everything that a module may own."""

    def __init__(self, rng):
        self.embed = Embedding(5, 4, rng=rng)
        self.layers = [Linear(4, 4, rng=rng), Linear(4, 4, rng=rng, bias=False)]
        self.by_name = {"a": LayerNorm(4), "b": Parameter(array.normal(rng, (2,)))}
        self.head = TiedHead(self.embed, bias=True)
        self._embed = self.embed
        self.table = dev(np.arange(3))
        self.p = 0.1
        self.note = "text"
        self.scales = {"one": dev(np.ones(2), np.float32)}

    def forward(self, ids, ctx):
        x = self.embed(ids, ctx)
        for layer in self.layers:
            x = layer(x, ctx)
        return self.head(self.by_name["a"](x, ctx), ctx)


NAMES = ["embed.weight", "layers.0.weight", "layers.0.bias", "layers.1.weight", "by_name.b", "by_name.a.weight",
         "by_name.a.bias", "head.bias"]


@pytest.fixture
def tree(rng):
    return Tree(rng)


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_names(tree):
    parameters = tree.named_parameters()
    assert set(parameters) == set(NAMES)
    assert len(tree.parameters()) == len(NAMES)
    assert parameters["layers.0.weight"] is tree.layers[0].weight
    assert [path for path, _ in tree.named_modules()] == ["", "embed", "layers.0", "layers.1", "by_name.a", "head"]
    assert len(list(tree.modules())) == 6
    assert list(tree.named_buffers()) == ["table", "scales.one"]
    assert list(tree.own()) == ["by_name.b"]
    state = tree.state_dict()
    assert set(state) == {*NAMES, "table", "scales.one"}
    assert state["layers.0.weight"] is tree.layers[0].weight.data


def test_names_of_nested_modules():
    class Nest(Module):
        def __init__(self, inner):
            self.inner = inner

    three_deep = Nest(Nest(Nest(LayerNorm(2))))
    assert [path for path, _ in three_deep.named_modules()] == ["", "inner", "inner.inner", "inner.inner.inner"]
    assert list(Nest(Nest(LayerNorm(2))).named_parameters()) == ["inner.inner.weight", "inner.inner.bias"]


def test_an_absent_bias_is_not_read(rng):
    read = []

    class Recorder(Module):
        def before(self, x, ctx):
            return x

        def after(self, x, y, ctx):
            return y

        def tensor(self, name, p):
            read.append(name)
            return p

    for bias in (False, True):
        linear = Linear(2, 2, rng=rng, bias=bias)
        linear.edits = {"recorder": Recorder()}
        linear(leaf([[1.0, 2.0]]))
        head = TiedHead(Embedding(3, 2, rng=rng), bias=bias)
        head.edits = {"recorder": Recorder()}
        head(leaf([[1.0, 2.0]]))
    assert sorted(read[:1]) == ["weight"]
    assert sorted(read[1:]) == ["bias", "bias", "weight"]


def test_a_shared_tensor_appears_once(rng):
    class Twice(Module):
        def __init__(self):
            self.one = Linear(3, 3, rng=rng)
            self.two = Linear(3, 3, rng=rng)
            self.two.weight = self.one.weight
            self.again = self.one

    module = Twice()
    assert list(module.named_parameters()) == ["one.weight", "one.bias", "two.bias"]
    module.one.weight.grad = dev(np.ones((3, 3)))
    module.zero_grad()
    assert module.two.weight.grad is None


def test_train_and_eval_reach_every_module(tree):
    assert not tree.training
    assert tree.train() is tree
    assert all(module.training for module in tree.modules())
    assert tree.eval() is tree
    assert not any(module.training for module in tree.modules())


def test_a_module_without_a_forward_says_so():
    with pytest.raises(NotImplementedError, match="Module has no forward"):
        Module()(1)
    with pytest.raises(NotImplementedError, match="Packed has no dequantize"):
        Packed().dequantize()


# ── state ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def copies(module):
    return {name: host(a).copy() for name, a in module.state_dict().items()}


def test_load_state_dict_copies_into_place(tree):
    other = Tree(np.random.default_rng(9))
    memory = {name: p.data for name, p in tree.named_parameters().items()}
    other.table += 1
    tree.load_state_dict(copies(other))
    for name, p in tree.named_parameters().items():
        assert p.data is memory[name]
        np.testing.assert_array_equal(host(p), host(other.named_parameters()[name]))
    assert host(tree.table).tolist() == [1, 2, 3]
    assert host(tree(dev([[1, 2]]))).tolist() == host(other(dev([[1, 2]]))).tolist()


@pytest.mark.parametrize("spoil, error, words", [
    (lambda s: s.pop("head.bias"), KeyError, "missing.*head.bias"),
    (lambda s: s.update(extra=np.ones(2)), KeyError, "unexpected.*extra"),
    (lambda s: s.update({"layers.0.weight": np.ones((4, 5))}), ValueError, r"layers.0.weight: \(4, 5\) for \(4, 4\)"),
    (lambda s: s.update({"table": np.ones(4)}), ValueError, r"table: \(4,\) for \(3,\)"),
])
def test_a_state_that_does_not_fit_changes_nothing(tree, spoil, error, words):
    before = copies(tree)
    state = copies(Tree(np.random.default_rng(9)))
    spoil(state)
    with pytest.raises(error, match=words):
        tree.load_state_dict(state)
    for name, a in copies(tree).items():
        np.testing.assert_array_equal(a, before[name])


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


def test_a_non_persistent_buffer_moves_and_is_not_saved(rng):
    class Projection(Module):
        def __init__(self):
            self.weight = Parameter(array.normal(rng, (2,)))
            self.register_buffer("kept", dev(np.ones(2), np.float32))
            self.register_buffer("made_again", dev(np.ones(3), np.float32), persistent=False)

    module = Projection()
    assert set(module.state_dict()) == {"weight", "kept"}
    assert list(module.named_buffers()) == ["kept", "made_again"]
    assert list(module.named_buffers(persistent_only=True)) == ["kept"]
    module.load_state_dict({"weight": np.zeros(2), "kept": np.zeros(2)})
    assert host(module.made_again).tolist() == [1, 1, 1]
    with pytest.raises(KeyError, match="unexpected.*made_again"):
        module.load_state_dict({"weight": np.zeros(2), "kept": np.zeros(2), "made_again": np.zeros(3)})
    assert module.to(dtype=np.float64).made_again.dtype == np.float64
    assert set(Projection().state_dict()) == {"weight", "kept"}
    assert Module._non_persistent == frozenset()


def test_to_dtype_moves_floats_and_keeps_tying(tree):
    tied = tree.embed.weight
    tied.grad = dev(np.ones((5, 4)))
    assert tree.to(dtype=np.float64) is tree
    assert tree.embed.weight is tied is tree.head._embed.weight
    assert tied.grad is None
    assert {p.dtype for p in tree.parameters()} == {np.dtype(np.float64)}
    assert tree.scales["one"].dtype == np.float64
    assert host(tree.table).dtype.kind == "i"
    assert tree(dev([[0, 1]])).dtype == np.float64
    tree.to(dtype=np.float32)


def test_to_backend_moves_everything(tree):
    ids = dev([[1, 2]])
    here = array.backend()
    want = host(tree(ids))
    for name in ("strict", "numpy"):
        tree.to(name)
        assert {array.name_of(a) for a in tree.state_dict().values()} == {name}
        assert tree.head._embed.weight is tree.embed.weight
        got = tree(array.to(ids, name))
        assert got.device == name
        np.testing.assert_allclose(host(got), want, rtol=1e-5)
    assert here == array.backend()


# ── the Context of a forward pass ────────────────────────────────────────────────────────────────────────────────────
def begun(**facts) -> Context:
    """A Context as a model's forward has it after its first line."""
    ids = facts.pop("ids")
    ctx = Context(ids, **facts)
    ctx.begin(np.asarray(ids), dev(np.zeros(1), np.float32))
    return ctx


def test_a_fact_that_was_not_given():
    ctx = Context(ids=[[1]])
    with pytest.raises(AttributeError, match="has no 'colour': it knows ids, mask"):
        _ = ctx.colour
    with pytest.raises(AttributeError, match=r"needs 'task': call model\(ids, task=\.\.\.\)"):
        ctx.need("task")
    assert ctx.need("ids") == [[1]]
    assert ctx.mask is None
    assert ctx.scratch == {}
    assert Context().output_hidden_states is False


@pytest.mark.parametrize("keyword, words", [
    ("attention_mask", "did you mean 'mask'"), ("input_ids", "did you mean 'ids'"), ("maks", "did you mean 'mask'"),
    ("token_type_id", "did you mean 'token_type_ids'"), ("past_key_values", "did you mean 'cache'"),
    ("colour", "it takes cache, ids, logit_positions, mask"),
])
def test_an_unknown_keyword_is_refused_and_the_near_one_named(tree, keyword, words):
    for call in (lambda: Context(**{keyword: 1}), lambda: tree(dev([[1]]), **{keyword: 1}),
                 lambda: Context().again(**{keyword: 1})):
        with pytest.raises(TypeError, match=f"unknown keyword '{keyword}': {words}"):
            call()


def test_a_context_and_keywords_together_are_refused(tree):
    with pytest.raises(TypeError, match="a Context or keywords, got both: put mask into the Context"):
        tree(dev([[1]]), Context(), mask=dev([[True]]))
    with pytest.raises(TypeError, match="the second argument of a module is a Context, got ndarray|Array"):
        tree(dev([[1]]), np.ones((1, 1), bool))


def test_again_is_the_same_batch_without_dropout():
    source = Context(ids=[[5]], rng=np.random.default_rng(0))
    ctx = begun(ids=[[1, 2]], mask=[[True, False]], rng=np.random.default_rng(0), source=source,
                output_hidden_states=True)
    ctx.prepend(2)
    ctx.scratch["x"] = 1
    ctx.add_loss("balance", leaf(1.0))
    again = ctx.again(task=[7])
    assert np.array_equal(again.inputs["ids"], [[1, 2]])
    assert again.mask == [[True, False]]
    assert again.task == [7]
    assert again.rng is None
    assert again.scratch == {}
    assert again.losses == {}
    assert again.output_hidden_states
    assert again.source is not source
    assert again.source.rng is None
    assert again.source.ids == [[5]]
    assert Context(ids=[[1]]).again().source is None
    other = Context(ids=[[6]])
    assert ctx.again(source=other).source is other


def test_auxiliary_losses_of_one_name_are_summed_and_shared_with_the_source():
    source = Context(ids=[[5]])
    ctx = Context(ids=[[1]], source=source)
    source.add_loss("balance", leaf(1.0))
    ctx.add_loss("balance", leaf(2.0))
    ctx.add_loss("z", leaf(5.0))
    assert {name: value.item() for name, value in ctx.losses.items()} == {"balance": 3.0, "z": 5.0}
    assert source.losses is ctx.losses
    assert Context(ids=[[1]]).losses == {}
    with pytest.raises(ValueError, match=r"add_loss\('z'\) wants a scalar, got shape \(2,\)"):
        ctx.add_loss("z", leaf([1.0, 2.0]))


def test_hidden_states_are_kept_only_on_request():
    for wanted in (False, True):
        ctx = Context(output_hidden_states=wanted)
        ctx.add_hidden_state(leaf(1.0))
        assert len(ctx.hidden_states) == wanted


def test_begin_moves_facts_to_the_device_of_the_weights():
    ctx = begun(ids=[[1, 2]], mask=[[1, 0]], token_type_ids=[[0, 1]], logit_positions=[1], task=[3])
    for a in (ctx.ids, ctx.mask, ctx.token_type_ids, ctx.logit_positions, ctx.task):
        assert array.is_array(a)
        assert array.name_of(a) == array.backend()
    assert host(ctx.mask).dtype == bool
    without = begun(ids=[[1, 2]])
    for a in (without.mask, without.token_type_ids, without.logit_positions, without.task):
        assert a is None
    ctx = Context()
    ctx.begin(Tensor(dev(np.zeros((2, 3, 4)), np.float32)), dev([0.0]))
    assert host(ctx.ids).tolist() == [[-1] * 3] * 2
    with pytest.raises(ValueError, match=r"mask has shape \(1, 3\), the ids \(1, 2\)"):
        begun(ids=[[1, 2]], mask=[[1, 0, 1]])
    with pytest.raises(ValueError, match=r"token_type_ids has shape \(1, 1\), the ids \(1, 2\)"):
        begun(ids=[[1, 2]], token_type_ids=[[1]])
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
    assert ctx.mask is None
    assert ctx.token_type_ids is None
    assert ctx.ids.shape == (1, 3)


def test_positions_by_hand():
    assert host(begun(ids=[[7, 7, 7]]).positions()).tolist() == [[0, 1, 2]]
    left = begun(ids=[[7] * 4] * 2, mask=[[0, 0, 1, 1], [1, 1, 1, 1]])
    assert host(left.positions())[0, 2:].tolist() == [0, 1]
    assert host(left.positions())[1].tolist() == [0, 1, 2, 3]
    assert host(left.positions()).min() == 0
    right = begun(ids=[[7] * 4], mask=[[1, 1, 0, 0]])
    assert host(right.positions())[0, :2].tolist() == [0, 1]
    for ctx in (left, begun(ids=[[7] * 4])):
        before = host(ctx.positions())
        assert (host(ctx.positions(first=2)) == before + 2).all()
        ctx.position_shift = 5
        assert (host(ctx.positions()) == before + 5).all()
        assert (host(ctx.positions(first=2)) == before + 7).all()


@given(seeds(), st.booleans(), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_positions_count_real_tokens_and_continue_after_the_cache(rng, padded, B, T1, T2):
    """The position of a real token is the number of real tokens before it, for a row in one part or in two."""
    T = T1 + T2
    cache = Cache()
    mask = rng.random((B, T)) < 0.6 if padded else None
    ids = np.ones((B, T), int)
    got = []
    for part in (slice(0, T1), slice(T1, T)):
        ctx = begun(ids=ids[:, part], mask=None if mask is None else mask[:, part], cache=cache)
        assert ctx.past_length == part.start
        got.append(np.broadcast_to(host(ctx.positions()), (B, part.stop - part.start)))
        cache.advance(ctx)
    got = np.concatenate(got, 1)
    whole = begun(ids=ids, mask=mask)
    real = np.ones((B, T), bool) if mask is None else mask
    for b in range(B):
        assert got[b][real[b]].tolist() == list(range(real[b].sum()))
    np.testing.assert_array_equal(got, np.broadcast_to(host(whole.positions()), (B, T)))
    assert cache.length == T
    assert (mask is None) == (cache.mask is None)
    if mask is not None:
        np.testing.assert_array_equal(host(cache.mask), mask)


@pytest.mark.parametrize("cached", [[True], [False], [True, False]])
def test_the_key_mask_if_only_one_part_has_a_mask(cached):
    """The key mask covers the cache, of one position or more, and the new positions: True where no mask was given."""
    new = [True, False]
    real = [True] * len(cached)
    for first, second in ((None, new), (cached, None), (cached, new)):
        cache = Cache()
        cache.advance(begun(ids=[[1] * len(cached)], mask=first and [first], cache=cache))
        key_mask = begun(ids=[[1, 1]], mask=second and [second], cache=cache).key_mask()
        assert host(key_mask).tolist() == [(first or real) + (second or [True, True])]
    assert begun(ids=[[1]]).key_mask() is None


def test_the_cache_joins_and_selects_rows():
    cache = Cache()
    a = leaf(np.zeros((2, 1, 1, 3)))
    b = leaf(np.ones((2, 1, 2, 3)))
    assert cache.join("x", a, a) == (a, a)
    k, v = cache.join("x", b, b * 2)
    assert k.shape == (2, 1, 3, 3)
    assert host(k)[0, 0, :, 0].tolist() == [0, 1, 1]
    assert host(v)[0, 0, :, 0].tolist() == [0, 2, 2]
    calls = []

    def compute():
        calls.append(1)
        return leaf(np.arange(2.0).reshape(2, 1, 1, 1)), leaf(np.zeros((2, 1, 1, 1)))

    assert cache.once("cross", compute) is cache.once("cross", compute)
    assert calls == [1]
    cache.length = 3
    cache.mask = dev(np.array([[True] * 3, [False] * 3]))
    chosen = cache.rows(dev([1, 1]))
    assert chosen.kv["x"][0].shape == (2, 1, 3, 3)
    assert host(chosen.source["cross"][0]).ravel().tolist() == [1, 1]
    assert chosen.length == 3
    assert host(chosen.mask).tolist() == [[False] * 3] * 2
    assert cache.kv["x"][0] is k
    cache.mask = None
    assert cache.rows(dev([0])).mask is None


def test_select_positions():
    x = leaf(np.arange(12.0).reshape(2, 3, 2))
    assert Context().select_positions(x) is x
    ctx = begun(ids=[[1] * 3] * 2, logit_positions=[1, 5])
    assert host(ctx.select_positions(x)).tolist() == [[2, 3], [10, 11]]


def test_the_outermost_call_makes_the_context():
    class Echo(Module):
        def forward(self, x, ctx):
            return ctx

    ctx = Echo()(1, task=5)
    assert ctx.task == 5
    assert Echo()(1, ctx) is ctx


# ── layers ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def double(module: Module) -> Module:
    return module.to(dtype=np.float64)


def check_gradients(module: Module, x: np.ndarray, rng) -> None:
    """Check the gradients of the input and of every parameter by differences."""
    parameters = module.parameters()
    replaced: dict[int, Tensor] = {}

    def f(x, *values):
        for p, value in zip(parameters, values):
            replaced[id(p)] = value
        return module(x, Context())

    def read(self, name):
        return replaced.get(id(getattr(self, name)), getattr(self, name))

    original = Module.read
    Module.read = read
    try:
        gradcheck(f, [x, *(host(p) + rng.standard_normal(p.shape) for p in parameters)], rng)
    finally:
        Module.read = original


def test_linear(rng):
    module = double(Linear(3, 5, rng=rng))
    assert (host(module.bias) == 0).all()
    module.bias.copy_(rng.standard_normal(5))
    x = rng.standard_normal((2, 4, 3))
    want = np.einsum("btk,nk->btn", x, host(module.weight)) + host(module.bias)
    np.testing.assert_allclose(host(module(Tensor(dev(x)))), want, rtol=1e-12)
    assert (module.in_features, module.out_features) == (3, 5)
    assert module.weight.shape == (5, 3)
    check_gradients(module, x, rng)
    check_gradients(double(Linear(3, 2, rng=rng, bias=False)), x, rng)
    assert Linear(3, 2, rng=rng, bias=False).bias is None


def test_initial_values_have_the_stated_standard_deviation(rng):
    for make in (Linear, Embedding):
        for std, module in ((0.02, make(100, 100, rng=rng)), (0.5, make(100, 100, rng=rng, std=0.5))):
            weight = host(module.weight)
            assert abs(weight.std() / std - 1) < 0.05
            assert abs(weight.mean()) < std / 20
            assert weight.dtype == np.float32
        # A seed gives the same values on every machine.
        drawn = (np.random.default_rng(1).standard_normal((3, 3)) * 0.02).astype(np.float32)
        assert np.array_equal(host(make(3, 3, rng=np.random.default_rng(1)).weight), drawn)
        assert not np.array_equal(host(make(3, 3, rng=np.random.default_rng(2)).weight), drawn)


def test_embedding_and_tied_head(rng):
    embed = double(Embedding(5, 3, rng=rng))
    assert (embed.in_features, embed.out_features, embed.tied) == (5, 3, False)
    np.testing.assert_array_equal(host(embed(dev([[4, 0]]))), host(embed.weight)[[[4, 0]]])
    x = leaf(np.ones((1, 2, 3)))
    assert embed(x) is x
    assert TiedHead(embed).bias is None
    assert (host(TiedHead(embed, bias=True).bias) == 0).all()
    head = double(TiedHead(embed, bias=True))
    assert embed.tied
    assert (head.in_features, head.out_features) == (3, 5)
    assert list(head.named_parameters()) == ["bias"]
    head.bias.copy_(np.arange(5.0))
    np.testing.assert_allclose(host(head(x)), host(x) @ host(embed.weight).T + np.arange(5))
    np.testing.assert_allclose(host(TiedHead(embed)(x)), host(x) @ host(embed.weight).T)
    head(embed(dev([[1, 1]]))).sum().backward()
    w = host(embed.weight)
    want = np.tile(w[1] * 2, (5, 1))                                             # from the head
    want[1] += 2 * w.sum(0)                                                      # from the lookup
    np.testing.assert_allclose(host(embed.weight.grad), want)


def test_layer_norm(rng):
    module = double(LayerNorm(4, eps=0.1))
    x = rng.standard_normal((2, 4)) * 3 + 1
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.1)
    np.testing.assert_allclose(host(module(Tensor(dev(x)))), want)
    assert module.weight.decay is False
    assert module.bias.decay is False
    assert (module.in_features, module.out_features) == (4, 4)
    assert LayerNorm(4).eps == 1e-5
    check_gradients(module, x, rng)


def test_rms_norm(rng):
    module = double(RMSNorm(4, eps=0.1))
    x = rng.standard_normal((2, 4)) * 3 + 1
    want = x / np.sqrt((x * x).mean(-1, keepdims=True) + 0.1)
    np.testing.assert_allclose(host(module(Tensor(dev(x)))), want)
    assert module.weight.decay is False
    assert (module.in_features, module.out_features) == (4, 4)
    assert list(module.named_parameters()) == ["weight"]
    assert RMSNorm(4).eps == 1e-6
    check_gradients(module, x, rng)


def test_dropout_acts_only_in_training_mode_and_with_a_generator(rng):
    module = Dropout(0.5)
    x = leaf(np.ones(1000), np.float32)
    assert module(x, Context(rng=rng)) is x
    module.train()
    assert module(x, Context()) is x
    assert module(x) is x
    y = host(module(x, Context(rng=rng)))
    assert set(y.tolist()) == {0.0, 2.0}
    assert abs(y.mean() - 1) < 0.15
    assert not np.array_equal(y, host(module(x, Context(rng=rng))))              # each call draws a new mask
    first = host(module(x, Context(rng=np.random.default_rng(5))))
    second = host(module(x, Context(rng=np.random.default_rng(5))))
    assert np.array_equal(first, second)
    state = rng.bit_generator.state
    assert Dropout(0.0).train()(x, Context(rng=rng)) is x
    assert rng.bit_generator.state == state                                      # no mask, nothing drawn
    for p in (-0.1, 1.0, 2.0):
        with pytest.raises(ValueError, match="0 <= p < 1"):
            Dropout(p)


# ── packed weights ───────────────────────────────────────────────────────────────────────────────────────────────────
class Int8(Packed):
    """W ≈ s c: int8 codes c, one scale s for each row."""

    def __init__(self, W: np.ndarray):
        self.shape = W.shape
        scale = np.abs(W).max(1, keepdims=True) / 127
        self.codes = dev(np.round(W / scale), np.int8)
        self.scale = dev(scale, W.dtype)

    def dequantize(self):
        return self.codes.astype(self.scale.dtype) * self.scale


class Int8Blocks(Int8):
    """The same, decompressed two rows at a time."""

    rows_per_block = 2
    largest = 0

    def dequantize(self):
        raise AssertionError("a forward or backward pass made the whole dense weight")

    def dequantize_rows(self, rows):
        block = self.codes[rows].astype(self.scale.dtype) * self.scale[rows]
        Int8Blocks.largest = max(self.largest, block.size)
        return block


@pytest.mark.parametrize("kind", [Int8, Int8Blocks])
def test_a_packed_weight_in_a_parameters_place(rng, kind):
    module = double(Linear(3, 5, rng=rng))
    original = host(module.weight).copy()
    module.weight = kind(original)
    double(module)
    w = host(Int8.dequantize(module.weight))
    assert np.abs(w - original).max() < np.abs(original).max() / 200
    x = rng.standard_normal((2, 4, 3))
    y = module(Tensor(dev(x)))
    assert y.shape == (2, 4, 5)
    assert list(module.named_parameters()) == ["bias"]
    assert list(module.named_buffers()) == ["weight.codes", "weight.scale"]
    assert module.weight.nbytes == 15 + 5 * 8
    assert (module.in_features, module.out_features) == (3, 5)
    assert module.weight.codes.dtype == np.int8
    np.testing.assert_allclose(host(y), x @ w.T, rtol=1e-12, atol=1e-15)
    module.bias.copy_(np.arange(5.0))
    np.testing.assert_allclose(host(module(Tensor(dev(x)))), x @ w.T + np.arange(5), rtol=1e-12)
    check_gradients(module, x, rng)
    gradcheck(lambda x: module.weight.matmul(x), [rng.standard_normal(3)], rng)
    module.bias = None
    gradcheck(lambda x: module(x), [x], rng)
    state = copies(module)
    module.load_state_dict({**state, "weight.codes": state["weight.codes"] * 0})
    assert (host(Int8.dequantize(module.weight)) == 0).all()


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_a_product_in_blocks_is_the_product(rng, rows):
    """One block, two blocks and three, the last one whole or not."""
    packed = double(Int8Blocks(rng.standard_normal((rows, 3))))
    x = rng.standard_normal((2, 3))
    y = packed.matmul(Tensor(dev(x)))
    np.testing.assert_allclose(host(y), x @ host(Int8.dequantize(packed)).T, rtol=1e-12, atol=1e-15)
    gradcheck(lambda x: packed.matmul(x), [x], rng)


def test_a_packed_embedding_and_its_tied_head(rng):
    embed = double(Embedding(5, 3, rng=rng))
    embed.weight = Int8Blocks(host(embed.weight))
    head = double(TiedHead(embed, bias=True))
    w = host(Int8.dequantize(embed.weight))
    np.testing.assert_array_equal(host(embed(dev([[4, 0]]))), w[[[4, 0]]])
    assert (embed.in_features, embed.out_features) == (5, 3)
    x = rng.standard_normal((2, 3))
    np.testing.assert_allclose(host(head(Tensor(dev(x)))), x @ w.T, rtol=1e-12)
    gradcheck(lambda x: head(x), [x], rng)
    assert Int8Blocks.largest == 6, "two rows of three numbers at most were decompressed at once"
    assert list(head.named_parameters()) == ["bias"]


def test_dense_gives_the_array_of_either_kind(rng):
    module = Linear(3, 5, rng=rng)
    assert dense(module.weight) is module.weight.data
    packed = Int8(host(module.weight))
    np.testing.assert_array_equal(host(dense(packed)), host(packed.dequantize()))


def test_an_edit_of_a_packed_weight_is_refused_unless_it_takes_one(rng):
    class Shift(Module):
        takes_packed = False

        def overrides(self, hook):
            return hook == "tensor"

        def tensor(self, name, p):
            return p

    module = Linear(3, 5, rng=rng)
    module.edits = {"shift": Shift()}
    module.read("weight")
    module.weight = Int8(host(module.weight))
    with pytest.raises(TypeError, match="Shift changes the weight itself, and this weight is packed"):
        module.read("weight")
    Shift.takes_packed = True
    assert module.read("weight") is module.weight


def test_a_packed_weight_is_decompressed_again_and_not_kept(rng):
    made = []

    class Counted(Int8):
        def dequantize(self):
            weight = super().dequantize()
            made.append(weakref.ref(weight))
            return weight

    W = Counted(rng.standard_normal((5, 3)))
    y = W.matmul(leaf(rng.standard_normal((2, 3))))
    assert len(made) == 1
    assert made[0]() is None, "the graph keeps the dense weight"
    y.sum().backward()
    assert len(made) == 2


def test_the_names_a_user_imports():
    assert set(nn.__all__) == {"Context", "Cache", "Parameter", "Module", "Packed", "Linear", "Embedding", "TiedHead",
                               "LayerNorm", "RMSNorm", "Dropout", "dense", "no_grad"}
    assert Parameter([1.0]).requires_grad
    assert Parameter([1.0]).decay is None
    assert math.isclose(ops.exp(Parameter([0.0])).item(), 1)

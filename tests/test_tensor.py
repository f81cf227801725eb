"""The engine: sums of gradients, ownership of arrays, no work for frozen tensors, released memory, errors."""
from __future__ import annotations

import contextlib
import copy
import gc
import threading
import weakref
from types import CellType

import numpy as np
import pytest
from helpers import dev, gradcheck, host, leaf, seeds, shapes_of, wrong_answers
from hypothesis import given
from hypothesis import strategies as st

from tinyft import AdamW, array, dispatch, kernels, ops, tensor
from tinyft.nn import no_grad
from tinyft.tensor import OPS, ShapeError, Tensor, detect_anomaly, op, sum_to, topological


def values(t: Tensor) -> list:
    return host(t.grad).tolist()


@pytest.fixture
def new_op():
    """The decorator `op`. The table of all ops is restored after the test."""
    known = dict(OPS)
    yield op
    OPS.clear()
    OPS.update(known)


# ── sums of gradients ────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
def test_a_computed_tensor_used_four_times_counts_four_times(shape):
    """NumPy gives numbers, not arrays, for values without axes: nothing can be added to them in place."""
    x = Tensor(array.asarray(np.full(shape, 2, np.float32)), requires_grad=True)
    y = x * x
    (y + y * 2 + y * 3 + y * 4).sum().backward()
    assert (array.asnumpy(x.grad) == 10 * 2 * 2).all()


def test_a_tensor_used_twice_counts_twice():
    a = leaf([1.0, 2.0])
    b = a + a
    c = b + b
    c.sum().backward()
    assert values(a) == [4, 4]
    a.grad = None
    (a * a * a).sum().backward()
    assert values(a) == [3, 12]


def test_diamonds(rng):
    """Each input reaches the result on several paths."""
    def f(a, b):
        return (a * b + ops.exp(a)) * (a - b / (a * a + 1))
    gradcheck(f, [rng.standard_normal((2, 3)), rng.standard_normal((3,))], rng)


@given(st.data())
def test_random_graphs(data):
    """Any graph of a few ops on earlier results: a walk in the wrong order would lose a part of a gradient."""
    rng = data.draw(seeds())
    steps = data.draw(st.integers(1, 12))
    kinds = [lambda x, y: x + y, lambda x, y: x * y, lambda x, y: ops.tanh(x) - y, lambda x, y: x]
    plan = []
    for n in range(steps):
        kind = kinds[rng.integers(4)]
        i, j = rng.integers(0, 2 + n, 2)
        plan.append((kind, i, j))

    def f(a, b):
        made = [a, b]
        for kind, i, j in plan:
            made.append(kind(made[i], made[j]))
        return made[-1] + made[len(made) // 2] + a * 0.5 + b
    gradcheck(f, [rng.uniform(-0.7, 0.7, (2, 2)), rng.uniform(-0.7, 0.7, 2)], rng)


def record_calls(monkeypatch, method: str) -> list[str]:
    """The list to which every call of this method of Record will append the op's name."""
    calls = []
    original = getattr(tensor.Record, method)

    def recording(self, *args):
        calls.append(self.name)
        return original(self, *args)
    monkeypatch.setattr(tensor.Record, method, recording)
    return calls


def test_a_deep_graph_neither_recurses_nor_repeats(monkeypatch):
    x = leaf([1.0])
    n = 20_000
    y = x
    for _ in range(n):
        y = y + 0.0
    pulls = record_calls(monkeypatch, "pull")
    y.backward()
    assert values(x) == [1]
    assert len(pulls) == n


def test_a_ladder_of_diamonds_is_walked_once(monkeypatch):
    """2^50 paths lead from the loss to x; each of the 50 sums is visited once."""
    x = leaf([1.0])
    y = x
    for _ in range(50):
        y = y + y
    pulls = record_calls(monkeypatch, "pull")
    visits = record_calls(monkeypatch, "parents")
    y.backward()
    assert values(x) == [2.0**50]
    assert len(pulls) == len(visits) == 50


def test_inputs_come_before_outputs():
    a = leaf([1.0])
    b = leaf([2.0])
    c = a * b
    d = c + a
    e = d * c
    order = [id(n) for n in topological(e)]
    assert len(order) == 5
    at_a, at_b, at_c, at_d, at_e = (order.index(id(t.node)) for t in (a, b, c, d, e))
    assert at_a < at_c < at_d < at_e
    assert at_b < at_c


def test_gradients_accumulate_over_two_walks():
    a = leaf([1.0, 3.0])
    for n in (1, 2, 3):
        (a * a).sum().backward()
        assert values(a) == [2 * n, 6 * n]


def test_a_given_gradient_and_its_shape():
    a = leaf([[1.0, 2.0], [3.0, 4.0]])
    (a * 2).backward(dev([[1.0, 0.0], [0.5, 2.0]]))
    assert values(a) == [[2, 0], [1, 4]]
    (a * 1).backward(Tensor([[1.0, 1.0], [1.0, 1.0]]))
    assert values(a) == [[3, 1], [2, 5]]
    with pytest.raises(ShapeError, match=r"gradient of shape \(2, 2\), got \(2,\)"):
        (a * 2).backward(dev([1.0, 2.0]))
    with pytest.raises(RuntimeError, match=r"shape \(2, 2\) wants a gradient"):
        (a * 2).backward()
    b = leaf([[7.0]])
    b.backward()
    assert values(b) == [[1]]


@given(shapes_of("..., ... -> ..."), seeds())
def test_sum_to_is_the_adjoint_of_broadcasting(shapes, rng):
    (a, b), out = shapes
    for shape in (a, b):
        x, g = rng.standard_normal(shape), rng.standard_normal(out)
        back = host(sum_to(dev(g), shape))
        assert back.shape == shape
        assert (np.broadcast_to(x, out) * g).sum() == pytest.approx((x * back).sum())


# ── ownership of arrays ──────────────────────────────────────────────────────────────────────────────────────────────
def test_interior_tensors_keep_no_gradient():
    a = leaf([1.0, 2.0])
    b = a * 2
    c = b.sum()
    c.backward()
    assert b.grad is None
    assert c.grad is None
    assert a.grad is not None
    assert a.is_leaf
    assert not b.is_leaf


@pytest.mark.parametrize("join", [
    lambda a, b: a + b,
    lambda a, b: ops.concatenate(a, b),
    lambda a, b: ops.concatenate(a.reshape(4), b.reshape(4)),
    lambda a, b: a.T + b.T,
    lambda a, b: a.reshape(4) + b.reshape(4),
    lambda a, b: (a + b) + (a + b),
    lambda a, b: a[0] + b[1],
    lambda a, b: ops.broadcast_to(a, (3, 2, 2)) + b,
    lambda a, b: a + b + a,
])
def test_gradients_are_not_shared(join):
    """The `.grad` of a, the `.grad` of b and the gradient handed to backward share no memory."""
    a = leaf(np.ones((2, 2)))
    b = leaf(np.ones((2, 2)))
    y = join(a, b)
    seed = dev(np.ones(y.shape))
    y.backward(seed)
    before = host(b.grad).copy()
    a.grad += 100
    assert np.array_equal(host(b.grad), before)
    assert (host(seed) == 1).all()
    b.grad += 7
    assert np.array_equal(host(b.grad), before + 7)
    assert (host(seed) == 1).all()
    assert (host(a.grad) >= 100).all()


def test_a_gradient_of_one_element_is_an_array():
    x = leaf(np.array(2.0))
    for _ in range(2):
        (x * x).backward()
    assert array.is_array(x.grad)
    assert x.grad.shape == ()
    assert float(host(x.grad)) == 8
    y = leaf(np.array(2.0))
    ops.exp(ops.mean(y * y)).backward()
    assert array.is_array(y.grad)


@pytest.mark.parametrize("f", [
    lambda x: x.mean() + (x * x).mean(),
    lambda x: (x * x).mean() + x.mean(),
    lambda x: x.sum() + (x * x).sum(),
    lambda x: x.mean(axis=0).sum() + (x * x).sum(),
])
def test_a_broadcast_gradient_of_one_element_is_not_written_to(f):
    """The pullbacks of mean and sum return a view of one element; NumPy makes such views read-only."""
    x = leaf(np.ones(1, np.float32))
    f(x).backward()
    assert values(x) == [3]
    x.grad += 1
    assert values(x) == [4]


@pytest.mark.parametrize("f", [
    lambda p: p.mean(axis=1).sum(),
    lambda p: p.sum(axis=-1).sum(),
    lambda p: p.sum(),
    lambda p: p.mean(axis=1, keepdims=True).sum(),
])
def test_the_gradient_of_a_leaf_is_a_writable_array_of_its_own(f):
    p = leaf(np.ones((400, 1), np.float32))
    f(p).backward()
    p.grad += 1
    assert (host(p.grad) == 2).all()
    assert p.grad.flags.c_contiguous
    q = leaf(np.ones((3, 4), np.float32))
    q.sum(axis=0).sum().backward()
    q.grad[0] += 1                                       # the rows share no memory
    assert host(q.grad).tolist() == [[2] * 4, [1] * 4, [1] * 4]


def test_a_pullback_may_return_any_view(new_op):
    """Read-only views, broadcast views, views of its argument: no view is written to, and the sum is right."""
    broadcast = [lambda g: np.broadcast_to(g, (1, 2)), lambda g: np.broadcast_to(g[:, :1] + 0, (1, 2))]
    views = [lambda g: g[::-1], lambda g: (g + 0)[:]]
    if array.backend() == "numpy":
        views = broadcast + views
    for view in views:
        @new_op("... -> ...")
        def returns_view(x, view=view):
            return x + 0, (view,)

        x = leaf(np.ones((1, 2)))
        seed = dev(np.ones((1, 2)))
        (returns_view(x) + x + returns_view(x)).backward(seed)
        assert values(x) == [[3, 3]]
        assert (host(seed) == 1).all()
        x.grad += 1
        assert values(x) == [[4, 4]]
        assert (host(seed) == 1).all()


# Ops of one or two arrays (2, 2).
def returns_views(new_op):
    """Ops whose pullbacks return their argument, views of it, or views of one new array."""
    def unary(view):
        @new_op("... -> ...")
        def viewing(x):
            return x + 0, (view,)
        return viewing

    def joint(back):
        @new_op("..., ... -> ...")
        def pair(a, b):
            return a + b, lambda g, needed: back(g)
        return pair

    def halves(g):
        both = array.xp(g).concatenate([g * 2, g * 3])
        return both[:2], both[2:]

    def overlapping(g):
        both = array.xp(g).concatenate([g * 2, g * 3])
        return both[:2], both[1:3]

    def twice(g):
        d = g * 2
        return d, d
    ones = [unary(lambda g: g), unary(lambda g: g[:]), unary(lambda g: g[::-1]), unary(lambda g: (g * 2)[:])]
    spread = unary(lambda g: array.xp(g).broadcast_to(g[:, :1] + 0, (2, 2)))
    return [*ones, spread], [joint(lambda g: (g, g)), joint(halves), joint(overlapping), joint(twice)]


LIBRARY_UNARY = [
    lambda x: x.T, lambda x: x.reshape(4).reshape(2, 2), lambda x: x[::-1], lambda x: ops.tanh(x), lambda x: x * 0.5,
    lambda x: x.sum(axis=0, keepdims=True), lambda x: x.mean(axis=1), lambda x: x.sum(),
    lambda x: ops.broadcast_to(x[:1], (2, 2)), lambda x: ops.concatenate(x[:1], x[1:]), lambda x: x.permute(1, 0),
]
LIBRARY_BINARY = [
    lambda x, y: x + y, lambda x, y: x * y, lambda x, y: x - y, lambda x, y: x @ y, ops.maximum,
    lambda x, y: ops.where(dev([[True], [False]]), x, y), lambda x, y: ops.concatenate(x[:1], y[:1]),
]


def walk_with_copies(root, seed) -> dict[int, np.ndarray]:
    """{id of a leaf: its gradient}: a walk that copies every array, so that nothing can be shared."""
    found = {}
    gradients = {id(root.node): seed.copy()}
    for node in reversed(topological(root)):
        g = gradients.pop(id(node), None)
        if isinstance(node, Tensor):
            found[id(node)] = g
        elif g is not None:
            for parent, d in node.pull(g):
                d = sum_to(d.copy(), parent.shape).copy()
                gradients[id(parent)] = gradients[id(parent)] + d if id(parent) in gradients else d
    return found


def check_gradients_are_owned(new_op, rng) -> None:
    """Of a random graph: every `.grad` equals the reference's, is writable, and shares memory with nothing."""
    unary, binary = returns_views(new_op)
    unary = [*unary, *LIBRARY_UNARY]
    binary = [*binary, *LIBRARY_BINARY]
    leaves = [leaf(rng.uniform(-1, 1, (2, 2))) for _ in range(3)]
    made = list(leaves)
    for _ in range(rng.integers(1, 9)):
        x, y = (made[i] for i in rng.integers(0, len(made), 2))
        if rng.integers(2):
            z = unary[rng.integers(len(unary))](x)
        else:
            z = binary[rng.integers(len(binary))](x, y)
        made.append(z if z.shape == (2, 2) else ops.broadcast_to(z, (2, 2)))
    root = made[-1]
    seed = dev(rng.uniform(-1, 1, (2, 2)))
    seed_before = host(seed).copy()
    want = walk_with_copies(root, seed)
    for walks in (1, 2):
        root.backward(seed, retain_graph=True)
        reached = [x for x in leaves if want.get(id(x)) is not None]
        for x in reached:
            np.testing.assert_allclose(host(x.grad), walks * host(want[id(x)]))
            assert x.grad.flags.c_contiguous
            others = [seed, *(p.data for p in leaves), *(p.grad for p in reached if p is not x)]
            assert not any(array.xp(seed).may_share_memory(x.grad, a) for a in others)
    for x in reached:
        x.grad += 1
    assert np.array_equal(host(seed), seed_before)
    if reached:
        AdamW(0.1).start({str(i): x for i, x in enumerate(reached)}).step(clip=1.0)


@given(seeds())
def test_gradients_share_memory_with_nothing(rng):
    known = dict(OPS)
    try:
        check_gradients_are_owned(op, rng)
    finally:
        OPS.clear()
        OPS.update(known)


@wrong_answers
@pytest.mark.parametrize("name, wrong", [
    ("_apart", lambda gradients, i: gradients[i]),
    ("_is_own", lambda d, given: True),
    ("_is_own", lambda d, given: d is not given),
])
def test_a_walk_that_shares_arrays_is_rejected(name, wrong, monkeypatch, new_op):
    monkeypatch.setattr(tensor, name, wrong)
    with pytest.raises((AssertionError, ValueError)):
        for n in range(300):
            check_gradients_are_owned(new_op, np.random.default_rng(n))


def test_one_array_for_three_inputs_is_three_gradients(new_op):
    """A joint pullback that returns one array three times, for f(x, x, y): the walk adds to x's in place."""
    @new_op("..., ..., ... -> ...")
    def three(a, b, c):
        def back(g, needed):
            d = g * 2
            return d, d, d
        return a + b + c, back

    x, y = leaf(np.ones((2, 2))), leaf(np.ones((2, 2)))
    three(x, x, y).sum().backward()
    assert np.array_equal(host(x.grad), np.full((2, 2), 4.0))
    assert np.array_equal(host(y.grad), np.full((2, 2), 2.0))


def test_a_gradient_of_another_shape_and_the_same_size_is_refused(new_op):
    """A transpose that was forgotten: its numbers are not put into the shape of the input."""
    @new_op("... n m -> ... m n")
    def forgets(x):
        return x.swapaxes(-1, -2), (lambda g: g,)

    for shape in ((2, 3), (1, 1, 3)):
        with pytest.raises(ShapeError, match="a pullback wants to return a gradient that broadcasting from"):
            forgets(leaf(np.ones(shape))).sum().backward()


def test_a_step_with_clipping_follows_a_broadcast_gradient():
    """Of a tensor that is large enough to be updated where it lies."""
    for f in (lambda p: p.mean(axis=1).sum(), lambda p: p.sum(), lambda p: ops.broadcast_to(p, (2, 40_000, 1)).sum()):
        p = leaf(np.ones((40_000, 1), np.float32))
        optimizer = AdamW(0.1).start({"p": p})
        f(p).backward()
        optimizer.step(clip=1.0)
        assert np.allclose(host(p), 0.9, atol=1e-3)


def test_a_step_takes_a_read_only_gradient_of_the_user():
    for size in (3, 40_000):
        p = leaf(np.ones((size, 1), np.float32))
        optimizer = AdamW(0.1).start({"p": p})
        p.grad = dev(np.ones((size, 1), np.float32))
        if array.backend() == "numpy":                   # no other backend has read-only arrays
            p.grad.flags.writeable = False
        optimizer.step(clip=1.0)
        assert np.allclose(host(p), 0.9, atol=1e-3)


def test_a_deep_copy_is_another_leaf():
    x = leaf([1.0, 2.0])
    (x * x).sum().backward()
    y = copy.deepcopy(x)
    y.copy_(5.0)
    y.grad += 1
    assert (host(x).tolist(), values(x), values(y), y.requires_grad) == ([1, 2], [2, 4], [3, 5], True)


def test_a_new_gradient_is_not_copied(monkeypatch, new_op):
    """A gradient that a pullback has just made becomes `.grad` itself, also as a view."""
    made = []
    for view in (lambda a: a, lambda a: a.reshape(2, 2), lambda a: a[:]):
        @new_op("... -> ...")
        def makes(x, view=view):
            def back(g):
                d = g * 2
                made.append(array.address(d))
                return view(d)
            return x + 0, (back,)
        x = leaf(np.ones((2, 2)))
        makes(x).sum().backward()
        assert array.address(x.grad) == made[-1]


def always_owned(monkeypatch):
    monkeypatch.setattr(tensor, "_is_own", lambda d, given: True)


def owned_unless_it_is_the_argument(monkeypatch):
    monkeypatch.setattr(tensor, "_is_own", lambda d, given: d is not given)


def never_summed(monkeypatch):
    def add(self, node, g, owned=False):
        self.arrays[id(node)] = g
    monkeypatch.setattr(tensor.Gradients, "add", add)


def always_in_place(monkeypatch):
    def add(self, node, g, owned=False):
        if id(node) in self.arrays:
            self.arrays[id(node)] += g
        else:
            self.arrays[id(node)] = g
    monkeypatch.setattr(tensor.Gradients, "add", add)


@wrong_answers
@pytest.mark.parametrize("wrong", [always_owned, owned_unless_it_is_the_argument, never_summed, always_in_place])
def test_wrong_ownership_is_caught(wrong, monkeypatch):
    wrong(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        for join in (lambda a, b: a + b, lambda a, b: a.reshape(4) + b.reshape(4), lambda a, b: a + b + a):
            test_gradients_are_not_shared(join)
        test_a_broadcast_gradient_of_one_element_is_not_written_to(lambda x: ops.broadcast_to(x, (1,)) + (x * x).mean())
        test_a_tensor_used_twice_counts_twice()


def test_the_seed_of_the_walk_is_not_kept():
    a = leaf([1.0])
    seed = dev([3.0], np.float32)
    a.backward(seed)
    a.grad += 1
    assert host(seed).tolist() == [3]


def test_a_second_walk_does_not_change_the_gradients_of_the_first():
    a = leaf([1.0, 1.0])
    b = leaf([1.0, 1.0])
    (a + b).sum().backward()
    first = a.grad
    (a * 3).sum().backward()
    assert host(first).tolist() == [1, 1]
    assert values(a) == [4, 4]
    assert values(b) == [1, 1]


# ── no work for frozen tensors ───────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def products(monkeypatch):
    """[number of matrix products], in the definitions of linear and matmul and in their pullbacks."""
    count = [0]

    def counted_pullback(back):
        if back is None or back is ops.same:             # no product
            return back

        def run(g):
            count[0] += 1
            return back(g)
        return run

    def counted(definition):
        def product(*args, **kw):
            count[0] += 1
            y, pulls = definition(*args, **kw)
            return y, tuple(map(counted_pullback, pulls))
        return product

    array_type = type(dev([0.0]))
    for name in ("linear", "matmul"):
        monkeypatch.setitem(dispatch.KERNELS, (OPS[name], array_type), [counted(OPS[name].definition)])
    return count


def test_frozen_inputs_cost_no_products(products):
    x, W1, W2, W3 = (Tensor(dev(np.ones((3, 3)))) for _ in range(4))

    def backward_products(*trainable):
        """The number of products in backward through three linear layers."""
        for t in (x, W1, W2, W3):
            t.train(t in trainable)
            t.grad = None
        products[0] = 0
        y = ops.linear(ops.linear(ops.linear(x, W1), W2), W3).sum()
        assert products[0] == 3
        if trainable:
            y.backward()
        return products[0] - 3

    assert backward_products() == 0
    assert backward_products(W3) == 1                    # dW3 alone
    assert backward_products(W2) == 2                    # dx through W3, dW2
    assert backward_products(W1) == 3
    assert backward_products(x) == 3                     # only dx, in every layer
    assert backward_products(W1, W2, W3) == 5            # no dx in the first layer
    assert backward_products(x, W1, W2, W3) == 6


def test_the_arrays_count_the_products_too():
    """The same count, at the @ of the arrays themselves."""
    class Counting(np.ndarray):
        n = 0

        def __array_ufunc__(self, ufunc, method, *args, **kw):
            Counting.n += ufunc is np.matmul
            plain = [a.view(np.ndarray) if isinstance(a, Counting) else a for a in args]
            out = getattr(ufunc, method)(*plain, **kw)
            return out.view(Counting) if isinstance(out, np.ndarray) else out

    array._modules[Counting] = np
    array._names[Counting] = "numpy"
    try:
        x, W1, W2 = (Tensor(np.ones((2, 2)).view(Counting)) for _ in range(3))
        W2.train(True)
        ops.linear(ops.linear(x, W1), W2).sum().backward()
        assert Counting.n == 3                           # two forward, dW2
        Counting.n = 0
        q = Tensor(np.ones((2, 2)).view(Counting), requires_grad=True)
        ops.attention(q, W1, W1).sum().backward()
        assert Counting.n == 4                           # q kᵀ, p v; g vᵀ, ds k
    finally:
        del array._modules[Counting], array._names[Counting]


def arrays_of_the_graph(y: Tensor) -> list[int]:
    """The ids of all arrays that can be reached from y's record: through pullbacks, closures, lists and views."""
    found = []
    visited = set()
    todo = [y.record]
    while todo:
        thing = todo.pop()
        if id(thing) in visited:
            continue
        visited.add(id(thing))
        if array.is_array(thing):
            found.append(id(thing))
            todo.append(thing.base)                      # a view keeps its whole base alive
        elif isinstance(thing, tensor.Record):
            todo += [thing.pulls]
        elif isinstance(thing, (list, tuple)):
            todo += thing
        elif isinstance(thing, CellType):
            with contextlib.suppress(ValueError):        # an empty cell
                todo.append(thing.cell_contents)
        elif callable(thing) and getattr(thing, "__closure__", None):
            todo += thing.__closure__
    return found


def test_a_dropped_pullback_drops_its_arrays():
    x = dev(np.ones((2, 3)))
    W = dev(np.ones((2, 3)))
    for f in (ops.linear, ops.mul):
        arrays = arrays_of_the_graph(f(Tensor(x, requires_grad=True), Tensor(W)))
        assert id(W) in arrays
        assert id(x) not in arrays
        arrays = arrays_of_the_graph(f(Tensor(x), Tensor(W, requires_grad=True)))
        assert id(x) in arrays
        assert id(W) not in arrays
    assert ops.linear(Tensor(x), Tensor(W)).record is None
    with no_grad():
        assert ops.linear(Tensor(x, requires_grad=True), Tensor(W)).record is None


# Ops whose pullbacks do not need their input, so that the graph must not hold it.
INPUT_NOT_HELD = {
    "add": lambda x: x + x,
    "sub": lambda x: x - 1,
    "neg": lambda x: -x,
    "sum": lambda x: x.sum(),
    "mean": lambda x: x.mean(axis=0),
    "reshape": lambda x: x.reshape(-1),
    "permute": lambda x: x.permute(1, 0),
    "transpose": lambda x: x.T,
    "getitem": lambda x: x[0],
    "broadcast_to": lambda x: ops.broadcast_to(x, (2, 2, 3)),
    "concatenate": lambda x: ops.concatenate(x, x),
    "cumsum": ops.cumsum,
    "exp": ops.exp,
    "sqrt": ops.sqrt,
    "tanh": ops.tanh,
    "sigmoid": ops.sigmoid,
    "softmax": ops.softmax,
    "log_softmax": ops.log_softmax,
    "embedding": lambda x: ops.embedding(x, dev([0, 1])),
    "gather": lambda x: ops.gather(x, dev([[0], [1]])),
    "dropout": lambda x: ops.dropout(x, 0.5, 1),
    "layer_norm": lambda x: ops.layer_norm(x, Tensor(dev(np.ones(3))), Tensor(dev(np.ones(3)))),
    "rms_norm": lambda x: ops.rms_norm(x, Tensor(dev(np.ones(3)))),
    "cross_entropy": lambda x: ops.cross_entropy(x, dev([0, 1])),
    "straight_through": lambda x: ops.straight_through(x.detach(), x),
    "where": lambda x: ops.where(dev([True, False, True]), x, x),
}


@pytest.mark.parametrize("name", INPUT_NOT_HELD)
def test_the_graph_holds_no_input_that_no_pullback_reads(name, definitions):
    x = leaf(np.ones((2, 3)))
    y = INPUT_NOT_HELD[name](x)
    assert id(x.data) not in arrays_of_the_graph(y)


def test_a_graph_without_trainable_leaves_is_not_recorded():
    x = Tensor([1.0, 2.0])
    y = ops.exp(x * 2 + 1).sum()
    assert y.record is None
    assert not y.requires_grad
    with pytest.raises(RuntimeError, match="depends on no tensor that trains"):
        y.backward()


def test_the_walk_never_enters_a_frozen_part(monkeypatch):
    W = Tensor([[1.0]])
    a = leaf([[1.0]])
    below = ops.exp(ops.tanh(W))
    loss = (below * a).sum()
    names = record_calls(monkeypatch, "pull")
    loss.backward()
    assert names == ["sum", "mul"]


def test_memory_is_released_as_the_walk_passes(new_op):
    alive = []
    refs = []

    class Saved:
        """An object that a pullback holds."""

    @new_op("... -> ...")
    def holding(x):
        saved = Saved()
        refs.append(weakref.ref(saved))

        def back(g, _=saved):
            alive.append(sum(r() is not None for r in refs))
            return g
        return x + 0, (back,)

    y = leaf([1.0])
    for _ in range(5):
        y = holding(y)
    gc.disable()
    try:
        y.backward()
        assert alive == [5, 4, 3, 2, 1]
        assert not any(r() for r in refs)
    finally:
        gc.enable()


def test_the_graph_keeps_no_value_that_no_pullback_needs():
    a = leaf([1.0, 2.0])
    b = ops.exp(a)
    c = (b + 1.0).sum()                                  # exp keeps its value, add keeps nothing
    tensor_b = weakref.ref(b)
    tensor_c = weakref.ref(b + 1.0)
    del b
    assert tensor_b() is None                            # without the garbage collector: there is no cycle
    assert tensor_c() is None
    c.backward()
    np.testing.assert_allclose(host(a.grad), np.exp([1.0, 2.0]), rtol=1e-6)


# ── switches ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_no_grad_is_for_this_thread_only():
    a = leaf([1.0])
    inside = threading.Event()
    out = []
    backend = array.backend()

    def other():
        inside.wait(10)
        array.use(backend)
        out.append((a * 2).requires_grad)

    thread = threading.Thread(target=other)
    thread.start()
    with no_grad():
        inside.set()
        thread.join()
        assert not (a * 2).requires_grad
        with no_grad():
            pass
        assert not (a * 2).requires_grad
    assert out == [True]
    assert (a * 2).requires_grad
    with pytest.raises(ZeroDivisionError), no_grad():
        raise ZeroDivisionError
    assert (a * 2).requires_grad


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_detect_anomaly_names_the_op_and_the_shapes(new_op):
    x = leaf([[1.0, -1.0, 0.0]])
    with detect_anomaly():
        with pytest.raises(FloatingPointError, match=r"log gave a value that is not finite; inputs \(1, 3\)"):
            ops.log(x)
        with pytest.raises(FloatingPointError, match=r"sqrt gave back a gradient that is not finite; shape \(1, 1\)"):
            ops.sqrt(x[:, 2:]).sum().backward()
        (x * 2).sum().backward()
    assert not np.isfinite(host(ops.log(x))).all()       # no error outside the context


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_backward_refuses_after_a_write_to_an_array_that_it_needs():
    W = leaf([[2.0]])
    x = leaf([[3.0]])
    loss = (W * x).sum()
    W.copy_([[5.0]])
    assert host(W).tolist() == [[5]]
    with pytest.raises(RuntimeError, match="input of 'mul' was written in place"):
        loss.backward()
    loss = (W * x).sum()
    loss.backward()
    assert values(x) == [[5]]
    W.mark_written()
    (W * x).sum().backward()                             # a new graph records the new version
    b = x * 2
    with pytest.raises(RuntimeError, match="only a leaf"):
        b.copy_([[1.0]])
    with pytest.raises(TypeError, match="not written in place"):
        x[0] = 1.0


# name: a tensor that shares memory with the leaf x (2, 3)
SHARED = {
    "the leaf": lambda x: x,
    "detach": lambda x: x.detach(),
    "a slice": lambda x: x[:, 1:],
    "a row": lambda x: x[0],
    "reversed": lambda x: x[:, ::-1],
    "reshape": lambda x: x.reshape(3, 2),
    "transpose": lambda x: x.T,
    "permute": lambda x: x.permute(1, 0),
    "broadcast_to": lambda x: ops.broadcast_to(x, (4, 2, 3)),
    "a view of a view": lambda x: x.T[1:].reshape(2, 2, 1)[0],
    "to its own backend": lambda x: x.to(x.device),
    "a detached slice": lambda x: x[:1].detach(),
    "an op that returns its input": lambda x: ops.clip(x),
}
# name: a write to the memory of x, which an optimiser may hold
WRITES = {
    "copy_": lambda x, optimizer: x.copy_(5.0),
    "mark_written": lambda x, optimizer: x.mark_written(),
    "copy_ of its detached tensor": lambda x, optimizer: x.detach().copy_(5.0),
    "an update": lambda x, optimizer: optimizer.step(clip=1.0),
}


right_record = tensor._record


def forgets_versions(call, args, result, pullbacks) -> None:
    """Wrong: a record without the versions of the op's inputs."""
    right_record(call, args, result, pullbacks)
    if isinstance(result.record, tensor.Record):
        result.record.versions = []


def check_write_is_noticed(view, write, *, trains: bool, started: bool) -> None:
    """backward refuses after a write to x, where a product needs the values of a tensor that shares memory with x.

    started: x belongs to an optimiser, together with another tensor."""
    x = leaf(np.ones((2, 3)))
    other = leaf(np.ones(5))
    optimizer = AdamW(0.1).start({"other": other, "x": x}) if started else None
    if not trains:
        x.train(False)
    shared = view(x)
    w = leaf(np.ones(shared.shape))
    y = (shared * w).sum()
    y.backward(retain_graph=True)                        # nothing was written yet
    other.grad = dev(np.ones(5))
    write(x, optimizer)
    with pytest.raises(RuntimeError, match="input of 'mul' was written in place"):
        y.backward()


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("view", SHARED)
def test_a_write_is_noticed_in_all_that_shares_its_memory(view, write):
    for trains in (True, False):
        for started in (True, False):
            if started or write != "an update":
                check_write_is_noticed(SHARED[view], WRITES[write], trains=trains, started=started)


def test_a_write_through_a_view_is_noticed():
    for view in (lambda x: x[:1], lambda x: x.T, lambda x: x.reshape(6)[2:4], lambda x: x.detach()[1:, 1:]):
        x = Tensor(dev(np.ones((2, 3))))
        w = leaf(np.ones((2, 3)))
        y = (x * w).sum()
        view(x).copy_(7.0)                               # the view is gone after the write
        with pytest.raises(RuntimeError, match="written in place"):
            y.backward()


def test_a_write_to_the_value_of_an_op_is_noticed():
    x = leaf([1.0, 2.0])
    for f in (ops.exp, ops.tanh, ops.softmax):
        y = f(x)
        y.detach().copy_(0.0)
        with pytest.raises(RuntimeError, match="written in place"):
            y.sum().backward()


def test_a_write_elsewhere_is_no_reason_to_refuse():
    """Another part of the same array, another tensor of the same optimiser, memory that was freed, and a new graph."""
    whole = dev(np.ones((4, 3)))
    upper, lower = Tensor(whole[:2]), Tensor(whole[2:])
    w = leaf(np.ones((2, 3)))
    y = (upper * w).sum()
    lower.copy_(5.0)
    y.backward()
    p, q = leaf(np.ones((2, 3))), leaf(np.ones((2, 3)))
    AdamW(0.1).start({"p": p, "q": q})                   # both are views of one flat array now
    y = (p * w).sum()
    q.copy_(5.0)
    y.backward()
    y = ((w + Tensor(dev(np.ones((2, 3))))) * 2.0).sum()
    for _ in range(20):
        Tensor(dev(np.ones((2, 3)))).copy_(1.0)          # perhaps in the memory of the operand, which is freed
    y.backward()
    assert np.array_equal(host(w.grad), np.full((2, 3), 4.0))
    x = Tensor(dev(np.ones((2, 3))))
    x.copy_(3.0)
    (x * w).sum().backward()


@wrong_answers
@pytest.mark.parametrize("name, wrong", [
    ("_as_tensor", lambda value, args: Tensor(value)),
    ("_record", lambda call, args, result, pullbacks: forgets_versions(call, args, result, pullbacks)),
])
def test_a_backward_that_notices_no_alias_is_rejected(name, wrong, monkeypatch):
    monkeypatch.setattr(tensor, name, wrong)
    with pytest.raises(BaseException, match="DID NOT RAISE"):
        for view in SHARED.values():
            check_write_is_noticed(view, WRITES["copy_"], trains=False, started=False)


# ── tensors to which an op has no gradient ───────────────────────────────────────────────────────────────────────────
def test_a_tensor_given_by_keyword_gets_its_gradient():
    """At every parameter of every call the gradients are those of a call by position."""
    a, b, c = (leaf(np.random.default_rng(i).uniform(0.5, 1.5, (2, 2))) for i in range(3))
    v = leaf([0.5, 2.0])
    u = leaf([1.0, 3.0])
    q = a.reshape(1, 1, 2, 2)
    calls = [
        (ops.linear, {"x": a, "W": b, "b": v}),
        (ops.add, {"a": a, "b": b}),
        (ops.matmul, {"a": a, "b": b}),
        (ops.power, {"x": a, "p": b}),
        (ops.clip, {"x": a, "low": b, "high": c}),
        (ops.where, {"c": dev([True, False]), "a": a, "b": b}),
        (ops.layer_norm, {"x": a, "w": v, "b": u, "eps": 0.1}),
        (ops.rms_norm, {"x": a, "w": v, "eps": 0.1}),
        (ops.attention, {"q": q, "k": q * 2, "v": q * 3, "bias": b}),
        (ops.gather, {"x": a, "i": dev([[1, 0]]), "axis": 0}),
        (ops.cross_entropy, {"z": a, "y": dev([0, 1]), "weight": dev([1.0, 2.0])}),
        (ops.sum, {"x": a, "axis": 0}),
        (ops.sum, {"x": a, "keepdims": True}),
    ]

    def gradients(y):
        for t in (a, b, c, v, u):
            t.grad = None
        y.backward(dev(np.arange(1.0, y.size + 1).reshape(y.shape)), retain_graph=True)
        return [host(t.grad) for t in (a, b, c, v, u)]

    for f, arguments in calls:
        names = list(arguments)
        want = gradients(f(**arguments))
        for t in (a, b, c, v, u):
            assert t.grad is not None or id(t) not in map(id, arguments.values())
        for n in range(1, len(names) + ("keepdims" not in names)):       # n by position, the others by keyword
            by_keyword = {name: arguments[name] for name in names[n:]}
            got = gradients(f(*[arguments[name] for name in names[:n]], **by_keyword))
            assert all(np.array_equal(x, y) for x, y in zip(want, got, strict=True)), f.__name__


# What an op has no gradient for: (call of a trainable tensor t, op and input that the message names).
DROPPED = [
    (lambda x, t: ops.cross_entropy(x, dev([0, 1]), t[0]), "cross_entropy", "weight"),
    (lambda x, t: ops.cross_entropy(x, dev([0, 1]), weight=t[0]), "cross_entropy", "weight"),
    (lambda x, t: ops.dropout(x, t[0, 0], 1), "dropout", "p"),
    (lambda x, t: ops.dropout(x, p=t[0, 0], key=1), "dropout", "p"),
    (lambda x, t: ops.where(t * 2, x, x), "where", "c"),
    (lambda x, t: ops.attention(x, x, x, key_mask=t), "attention", "key_mask"),
    (lambda x, t: ops.attention(x, x, x, dropout_mask=t), "attention", "dropout_mask"),
    (lambda x, t: ops.attention(x, x, x, scale=t[0, 0]), "attention", "scale"),
    (lambda x, t: ops.layer_norm(x, x[0], x[0], t[0, 0]), "layer_norm", "eps"),
    (lambda x, t: ops.layer_norm(x, x[0], x[0], eps=t[0, 0]), "layer_norm", "eps"),
    (lambda x, t: ops.gather(x, (t,)), "gather", "i"),
    (lambda x, t: ops.concatenate([x, t]), "concatenate", "xs"),
    (lambda x, t: ops.concatenate(x, x, axis=t[0, 0]), "concatenate", "axis"),
    (lambda x, t: x[(t,)], "getitem", "index"),
    (lambda x, t: x[0, [t]], "getitem", "index"),
    (lambda x, t: x.sum(axis=(t,)), "sum", "axis"),
    (lambda x, t: x.reshape((t, t)), "reshape", "shape"),
]


@pytest.mark.parametrize("call, name, parameter", DROPPED)
def test_a_gradient_is_not_dropped_in_silence(call, name, parameter):
    t = leaf(np.full((2, 2), 0.5))
    message = f"^{name} has no gradient for its input '{parameter}', and a tensor given there trains: "
    for x in (leaf(np.ones((2, 2))), Tensor(dev(np.ones((2, 2))))):
        with pytest.raises(TypeError, match=message):
            call(x, t)


def test_an_index_that_trains_is_refused():
    x = leaf(np.ones((2, 2)))
    for index in (leaf([1.0]), (leaf([1.0]), 0), slice(leaf(1.0), None)):
        with pytest.raises((TypeError, IndexError), match="getitem"):
            x[index]


def test_frozen_tensors_inside_arguments_are_arrays():
    """Indices, masks, shapes and factors that are tensors of numbers, alone, in tuples, in slices and by keyword."""
    x = leaf(np.arange(6.0).reshape(2, 3))
    i = Tensor(dev([1, 0]))
    one = Tensor(dev(1))
    pairs = [(x[i], x.data[i.data]), (x[i, one], x.data[i.data, 1]), (x[one:], x.data[1:]), (x[:, :one], x.data[:, :1])]
    for got, want in pairs:
        assert np.array_equal(host(got), host(want))
    assert x.reshape(Tensor(dev([3, 2]))).shape == (3, 2)
    with_arrays = ops.attention(x, x, x, key_mask=dev([True, False]), dropout_mask=dev([2.0, 1.0]))
    with_tensors = ops.attention(x, x, x, key_mask=Tensor(dev([True, False])), dropout_mask=Tensor(dev([2.0, 1.0])))
    assert np.array_equal(host(with_arrays), host(with_tensors))


def test_the_gradient_may_stop_where_the_op_says_so(new_op):
    assert {name: f.stops for name, f in OPS.items() if f.stops} == {"straight_through": ("hard",)}
    hard, soft = leaf([1.0, 0.0]), leaf([0.7, 0.3])
    ops.straight_through(hard, soft).sum().backward()
    assert hard.grad is None
    assert values(soft) == [1, 1]

    @new_op("..., ... -> ...", stops=("a",))
    def second(a, b):
        return a + b, (None, lambda g: g)

    @new_op("..., ... -> ...")
    def forgets(a, b):
        return a + b, (lambda g: g,)
    assert not second(hard, soft.detach()).requires_grad
    assert forgets(hard, soft.detach()).requires_grad
    with pytest.raises(TypeError, match="forgets has no gradient for its input 'b'"):
        forgets(hard, soft)
    with no_grad():
        forgets(hard, soft)


def test_a_pullback_that_returns_nothing_is_refused(new_op):
    @new_op("... -> ...")
    def no_return(x):
        def back(g):
            g * 2
        return x + 0, (back,)

    @new_op("..., ... -> ...")
    def too_short(a, b):
        return a + b, lambda g, needed: [g]

    x = leaf([1.0])
    with pytest.raises(TypeError, match="a pullback of no_return wants to return an array, got None"):
        no_return(x).backward()
    with pytest.raises(TypeError, match="too_short has no gradient for its input 'b'"):
        too_short(x, x).backward()


def test_exponents_and_bounds_get_gradients():
    """Ties as torch: a tie of clip goes to x, and 0 ln 0 = 0."""
    x, p = leaf([2.0, 0.0, 4.0]), leaf([3.0, 2.0, 0.5])
    (x**p).sum().backward()
    np.testing.assert_allclose(host(p.grad), [8 * np.log(2), 0, 2 * np.log(4)])
    np.testing.assert_allclose(host(x.grad), [12, 0, 0.25])
    p.grad = None
    (2.0**p).sum().backward()
    np.testing.assert_allclose(host(p.grad), np.log(2) * 2**np.array([3.0, 2.0, 0.5]))
    zero, exponent = leaf([0.0, 3.0]), leaf([0.0, 0.0])
    (zero**exponent).sum().backward()
    np.testing.assert_allclose(host(zero.grad), [0, 0])
    np.testing.assert_allclose(host(exponent.grad), [0, np.log(3)])
    zero.grad = None
    (zero**0).sum().backward()
    assert values(zero) == [0, 0]
    x, low, high = leaf([-2.0, -1.0, 0.0, 1.0, 2.0]), leaf([-1.0]), leaf([1.0])
    ops.clip(x, low, high).sum().backward()
    assert (values(x), values(low), values(high)) == ([0, 1, 1, 1, 0], [1], [1])
    x, low, high = leaf([0.0]), leaf([2.0]), leaf([1.0])
    y = ops.clip(x, low, high)                           # the upper bound wins
    y.sum().backward()
    assert (host(y).tolist(), values(x), values(low), values(high)) == ([1], [0], [0], [1])
    x = leaf([-2.0, 2.0])
    assert host(ops.clip(x, low=0.0)).tolist() == [0, 2]
    assert host(ops.clip(x, high=0.0)).tolist() == [-2, 0]
    ops.clip(x, None, 0.0).sum().backward()
    assert values(x) == [1, 0]


# ── arguments without sense ──────────────────────────────────────────────────────────────────────────────────────────
def two(x=None) -> Tensor:
    """A trainable tensor of two elements."""
    return leaf([1.0, 2.0])


REFUSED = [
    (lambda: Tensor(None), TypeError, "an array wants numbers, got None"),
    (lambda: Tensor("a"), TypeError, "an array wants numbers, got 'a'"),
    (lambda: Tensor(b"a"), TypeError, "an array wants numbers, got b'a'"),
    (lambda: Tensor({"a": 1}), TypeError, r"an array wants numbers, got \{'a': 1\}"),
    (lambda: Tensor(["a", 1]), TypeError, r"an array wants numbers, got \['a', 1\]"),
    (lambda: Tensor(x for x in [1.0]), TypeError, "an array wants numbers, got "),
    (lambda: Tensor([[1, 2], [3]]), ValueError, r"an array wants lists of equal lengths, got \[\[1, 2\], \[3\]\]"),
    (lambda: Tensor(np.array(["a"])), TypeError, "Tensor wants real numbers, got an array of dtype <U1"),
    (lambda: Tensor(np.array([None])), TypeError, "Tensor wants real numbers, got an array of dtype object"),
    (lambda: Tensor(np.zeros(2, "f,f")), TypeError, "Tensor wants real numbers, got an array of dtype"),
    (lambda: Tensor([1j]), TypeError, "Tensor wants real numbers, got an array of dtype complex128"),
    (lambda: Tensor(two()), TypeError, r"Tensor wants an array or numbers, got a Tensor: its detach\(\)"),
    (lambda: Tensor([two(), two()]), TypeError, r"does not become a NumPy array by itself: use \.numpy\(\)"),
    (lambda: Tensor([1, 2], requires_grad=True), TypeError, "only floating-point tensors train; this one is int64"),
    (lambda: Tensor([1.0], requires_grad="yes"), TypeError, "requires_grad wants True or False, got 'yes'"),
    (lambda: Tensor([1.0], requires_grad=None), TypeError, "requires_grad wants True or False, got None"),
    (lambda: Tensor([1.0], decay="no"), TypeError, "decay wants True or False, got 'no'"),
    (lambda: two().train("yes"), TypeError, "requires_grad wants True or False, got 'yes'"),
    (lambda: two().copy_([1.0, 2.0, 3.0]), ShapeError, r"copy_ .* to the shape \(2,\), got the shape \(3,\)"),
    (lambda: two().copy_([[1.0, 2.0]]), ShapeError, r"copy_ .* to the shape \(2,\), got the shape \(1, 2\)"),
    (lambda: two().copy_("a"), TypeError, "an array wants numbers, got 'a'"),
    (lambda: two().copy_(None), TypeError, "an array wants numbers, got None"),
    (lambda: two().copy_([1j, 1]), TypeError, "copy_ wants real numbers"),
    (lambda: two().copy_(np.array(["a", "b"])), TypeError, "an array wants numbers, got one of dtype <U1"),
    (lambda: two().backward([1.0]), ShapeError, r"backward wants a gradient of shape \(2,\), got \(1,\)"),
    (lambda: two().backward(1.0), ShapeError, r"backward wants a gradient of shape \(2,\), got \(\)"),
    (lambda: two().backward("a"), TypeError, "an array wants numbers, got 'a'"),
    (lambda: two().backward([1j, 1]), TypeError, "backward wants real numbers"),
    (lambda: two().backward(), RuntimeError, r"shape \(2,\) wants a gradient"),
    (lambda: two().item(), ValueError, r"a Python number wants a tensor of one element, got one of shape \(2,\)"),
    (lambda: float(two()), ValueError, "a Python number wants a tensor of one element"),
    (lambda: int(two()), ValueError, "a Python number wants a tensor of one element"),
    (lambda: bool(two()), ValueError, "a Python number wants a tensor of one element"),
    (lambda: [5, 6][two()], TypeError, r"an index wants a tensor of one integer, got float64 of shape \(2,\)"),
    (lambda: [5, 6][Tensor([0, 1])], TypeError, r"an index wants a tensor of one integer, got int64 of shape \(2,\)"),
    (lambda: len(two()[0]), TypeError, r"len wants a tensor with axes, got one of shape \(\)"),
    (lambda: list(two()[0]), TypeError, r"len wants a tensor with axes, got one of shape \(\)"),
    (lambda: 1.0 in two(), TypeError, "`in` does not search a tensor"),
    (lambda: two().__setitem__(0, 1.0), TypeError, "tensors are not written in place"),
    (lambda: np.asarray(two()), TypeError, r"does not become a NumPy array by itself: use \.numpy\(\)"),
    (lambda: two().backward([1.0, 1.0], retain_graph="no"), TypeError, "retain_graph wants True or False, got 'no'"),
    (lambda: two().sum().backward(gradient=True), TypeError, "backward wants a gradient of numbers, got True"),
    (lambda: copy.deepcopy(two() * 2), RuntimeError, r"only a leaf is copied; this tensor was computed"),
    (lambda: f"{two():.3f}", ValueError, "a Python number wants a tensor of one element"),
    (lambda: two() + "a", TypeError, "add wants a tensor, an array or a number as 'b', got 'a'"),
    (lambda: two() * None, TypeError, "mul wants a tensor, an array or a number as 'b', got None"),
    (lambda: None - two(), TypeError, "sub wants a tensor, an array or a number as 'a', got None"),
    (lambda: two()**None, TypeError, "power wants a tensor, an array or a number as 'p', got None"),
    (lambda: two() @ {}, TypeError, r"matmul wants a tensor, an array or a number as 'b', got \{\}"),
    (lambda: two() + object(), TypeError, "add wants a tensor, an array or a number as 'b', got <object"),
    (lambda: ops.exp(None), TypeError, "exp wants a tensor, an array or a number as 'x', got None"),
    (lambda: ops.softmax("a"), TypeError, "softmax wants a tensor, an array or a number as 'x', got 'a'"),
    (lambda: ops.softmax([1.0, 2.0]), TypeError, r"softmax wants a tensor, .* as 'x', got \[1.0, 2.0\]"),
    (lambda: ops.softmax(3.0), TypeError, r"softmax wants a tensor, .* as 'x', got 3.0"),
    (lambda: ops.linear(two(), None), TypeError, r"linear wants a tensor, .* as 'W', got None"),
    (lambda: ops.concatenate(), TypeError, "concatenate wants one tensor or more, got none"),
    (lambda: ops.softmax(), TypeError, "softmax: missing a required argument: 'x'"),
    (lambda: ops.linear(two(), b=two()), TypeError, "linear: missing a required argument: 'W'"),
]


@pytest.mark.parametrize("call, kind, message", REFUSED)
def test_an_argument_without_sense_is_refused_in_one_sentence(call, kind, message):
    with pytest.raises(kind, match=message) as error:
        call()
    assert type(error.value) is kind
    assert "\n" not in str(error.value)


def test_a_refused_copy_changes_nothing():
    x = leaf([1.0, 2.0])
    y = (x * x).sum()
    for values_ in ([1.0, 2.0, 3.0], "a", None, [1j, 1]):
        with pytest.raises((TypeError, ValueError)):
            x.copy_(values_)
    y.backward()                                         # nothing was written
    assert host(x).tolist() == [1, 2]
    if array.backend() == "numpy":
        fixed = Tensor(np.broadcast_to(np.ones(1), 3))
        with pytest.raises(ValueError, match="copy_ wants memory that can be written"):
            fixed.copy_(2.0)


def test_a_copy_broadcasts_and_casts_as_in_torch():
    x = leaf(np.zeros((2, 3)), np.float32)
    assert host(x.copy_(5)).tolist() == [[5] * 3] * 2
    assert host(x.copy_([1, 2, 3])).tolist() == [[1, 2, 3]] * 2
    assert host(x.copy_(Tensor(dev([[7.0], [8.0]])))).tolist() == [[7] * 3, [8] * 3]
    assert x.dtype == np.float32


def test_a_gradient_may_be_a_list_or_of_another_dtype():
    for gradient in ([1, 2], (1.0, 2.0), dev([1, 2]), dev([1.0, 2.0], np.float64), Tensor([1.0, 2.0])):
        x = leaf([1.0, 1.0], np.float32)
        (x * 3).backward(gradient)
        assert values(x) == [3, 6]
        assert x.grad.dtype == np.float32


def test_a_tensor_of_one_element_is_a_number():
    for a in (2.0, [2.0], [[2.0]]):
        for dtype in (np.float32, np.float64, np.float16, array.bfloat16):
            x = leaf(a, dtype)
            assert (x.item(), float(x), int(x), bool(x)) == (2, 2, 2, True)
            assert type(x.item()) is float
    assert not leaf(0.0)
    assert f"{leaf(2.0):.3f} {leaf([2.0])}".startswith("2.000 Tensor(")
    assert [5, 6, 7][Tensor(dev(2))] == 7
    assert type(Tensor(dev(2)).item()) is int


def test_rows_identity_and_operators():
    """Iteration gives rows that train; == and `hash` are of the object; += makes a new tensor."""
    x = leaf([[1.0, 2.0], [3.0, 4.0]])
    first, second = x
    (first * second).sum().backward()
    assert values(x) == [[3, 4], [1, 2]]
    assert len(list(leaf(np.ones((0, 3))))) == 0
    same = Tensor(x.data)
    assert x == x
    assert x != same
    assert {x: 1, same: 2}[x] == 1
    y = x
    y += 1.0
    assert y is not x
    assert host(x).tolist() == [[1, 2], [3, 4]]
    assert np.array_equal(np.asarray(same), host(x))
    if array.backend() == "numpy":
        same.numpy()[0] = 9.0                            # numpy() is the tensor's own array
        assert host(x).tolist() == [[9, 9], [3, 4]]


def test_only_floats_train():
    for a in ([1, 2], [True, False]):
        with pytest.raises(TypeError, match="only floating-point tensors train"):
            Tensor(dev(a), requires_grad=True)
    for dtype in (np.float16, np.float32, np.float64, array.bfloat16):
        assert Tensor(dev([1.0], dtype), requires_grad=True).requires_grad


def test_a_leaf_frozen_between_forward_and_backward_keeps_no_gradient():
    a = leaf([1.0])
    b = leaf([2.0])
    y = a * b
    a.train(False)
    y.backward()
    assert a.grad is None
    assert values(b) == [1]


# ── the tensor ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_attributes_and_repr_of_a_tensor():
    x = Tensor([[1.0, 2.0, 3.0]])
    assert (x.shape, x.ndim, x.size, x.dtype, len(x)) == ((1, 3), 2, 3, np.float32, 1)
    assert x.device == array.backend()
    assert "1., 2., 3." in repr(x)
    assert "requires_grad" not in repr(x)
    assert "requires_grad" in repr(leaf([1.0]))
    assert x[0, 1].item() == 2
    assert x.numpy().tolist() == [[1, 2, 3]]
    assert Tensor(dev([1.0], np.float64)).dtype == np.float64
    assert Tensor(3).shape == ()


def test_detach_shares_the_array_and_no_history():
    a = leaf([1.0, 2.0])
    b = (a * a).detach()
    assert b.record is None
    assert not b.requires_grad
    (b * a).sum().backward()
    assert values(a) == [1, 4]
    assert a.detach().data is a.data


def test_to_makes_a_leaf_on_another_backend():
    a = Tensor([1.0], requires_grad=True, decay=False)
    b = a.to("strict").to("numpy")
    assert b.requires_grad
    assert b.decay is False
    assert b.device == "numpy"
    assert host(b).tolist() == [1]
    with pytest.raises(RuntimeError, match="only a leaf moves with its gradient; this tensor was computed"):
        (a * 2).to("strict")
    assert host((a * 2).detach().to("strict")).tolist() == [2]


@pytest.mark.parametrize("call", [
    lambda x: ops.add(x, x, alpha=2),
    lambda x: ops.gelu(x, approximate="tanh"),
    lambda x: ops.softmax(x, dim=-1),
    lambda x: ops.linear(x, x, bias=None),
    lambda x: ops.dropout(x, 0.5, 1, training=True),
    lambda x: ops.embedding(x, dev([0]), padding_idx=0),
    lambda x: ops.layer_norm(x, x[0], x[0], epsilon=1e-5),
    lambda x: x.sum(dim=0),
    lambda x: x.mean(dim=0),
    lambda x: x.reshape(4, order="C"),
    lambda x: x.permute(0, 1, copy=True),
    lambda x: x.sum().backward(create_graph=True),
    lambda x: x.to("numpy", copy=True),
    lambda x: x.detach(copy=True),
    lambda x: x.numpy(force=True),
    lambda x: Tensor(x.data, dtype=np.float32),
])
def test_an_unknown_keyword_is_a_type_error(call):
    with pytest.raises(TypeError, match="keyword|takes no"):
        call(leaf(np.ones((2, 2), np.float32)))
    with kernels.definitions(), pytest.raises(TypeError, match="keyword|takes no"):
        call(leaf(np.ones((2, 2), np.float32)))

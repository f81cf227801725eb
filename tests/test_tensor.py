"""The engine: sums of gradients, ownership of arrays, no work for frozen tensors, released memory, errors."""
from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from types import CellType

import numpy as np
import pytest
from helpers import dev, gradcheck, host, leaf, seeds, shapes_of
from hypothesis import given
from hypothesis import strategies as st

from tinyft import array, dispatch, kernels, ops, tensor
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


def test_copy_keeps_the_memory_and_the_dtype():
    x = leaf([1.0, 2.0], np.float32)
    memory = x.data
    assert x.copy_(np.array([5, 6])) is x
    assert x.data is memory
    assert x.dtype == np.float32
    assert host(x).tolist() == [5, 6]
    x.copy_(Tensor([7.0, 8.0]))
    assert host(x).tolist() == [7, 8]


def test_a_second_walk_needs_the_graph():
    a = leaf([2.0])
    y = a * a
    y.backward()
    with pytest.raises(RuntimeError, match="released at 'mul'.*retain_graph=True"):
        y.backward()
    b = leaf([2.0])
    y = b * b
    y.backward(retain_graph=True)
    y.backward()
    assert values(b) == [8]
    with pytest.raises(RuntimeError, match="released"):
        (y + b).backward()


def test_two_backends_in_one_op():
    with pytest.raises(array.BackendError, match=r"add: arrays on numpy and strict.*\.to\("):
        Tensor([1.0]).to("numpy") + Tensor([1.0]).to("strict")
    with pytest.raises(array.BackendError, match="numpy and strict"):
        array.xp(Tensor([1.0]).to("numpy").data, Tensor([1.0]).to("strict").data)
    with pytest.raises(array.BackendError, match="unknown backend 'tpu'"):
        array.use("tpu")


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

"""The strict backend refuses code that fails, is undefined or is needlessly slow on a GPU. It runs right code
as NumPy does and counts the cost.

The static check (tests/tools/xpcheck.py) finds planted faults, and the library has none.
"""
from __future__ import annotations

import copy
import importlib.util
import operator
import pickle
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from tinyft import strict
from tinyft.strict import Array, StrictError, counts, xp

TOOLS = Path(__file__).parent / "tools"
PACKAGE = Path(strict.__file__).parent
xpcheck = SimpleNamespace(**runpy.run_path(str(TOOLS / "xpcheck.py")))

HOST = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
X = xp.asarray(HOST)
BF = X.astype(ml_dtypes.bfloat16)


class Stranger:
    """An object that is no array, such as a tensor passed to xp by mistake."""


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def write(index, value, onto=X):
    onto.copy()[index] = value


def grow(target, value):
    target += value


def grow_at(target, index, value):
    target[index] += value


MISTAKES = {
    # NumPy called on device arrays
    "np.exp(dev)": lambda: np.exp(X),
    "np.add(host, dev)": lambda: np.add(HOST, X),
    "np.add.at(host, dev)": lambda: np.add.at(HOST.copy(), xp.asarray([0]), 1.0),
    "np.sum(dev)": lambda: np.sum(X),
    "np.concatenate([dev])": lambda: np.concatenate([X, X]),
    "np.zeros_like(dev)": lambda: np.zeros_like(X),
    "np.where(dev)": lambda: np.where(X > 0, X, 0),
    "np.linalg.norm(dev)": lambda: np.linalg.norm(X),
    # silent conversion to the host
    "np.asarray(dev)": lambda: np.asarray(X),
    "np.array([dev 0-d])": lambda: np.array([X.sum()]),
    "np.float32(dev 0-d)": lambda: np.float32(X.sum()),
    "host[...] = dev": lambda: HOST.copy().__setitem__(0, X[0]),
    "host[dev index]": lambda: HOST[xp.asarray([0, 1])],
    "range(dev 0-d)": lambda: range(xp.asarray(3)),
    "list[dev 0-d]": lambda: [1, 2][xp.asarray(1)],
    "x[:dev 0-d]": lambda: X[:xp.asarray(2)],
    "round(dev 0-d)": lambda: round(X.sum()),
    "dict key": lambda: {X: 1},
    "memoryview(dev)": lambda: memoryview(X),
    # operands on host and device
    "dev + host": lambda: X + HOST,
    "host + dev": lambda: HOST + X,
    "dev @ host": lambda: X @ HOST.T,
    "host @ dev": lambda: HOST.T @ X,
    "dev < host": lambda: X < HOST,
    "dev + list": lambda: X + [1, 2, 3, 4, 5, 6],
    "dev == None": lambda: operator.eq(X, None),
    "dev + stranger": lambda: X + Stranger(),
    "host += dev": lambda: grow(HOST.copy(), X),
    "dev += host": lambda: grow(X.copy(), HOST),
    "x[i] = host": lambda: write(0, HOST[0]),
    "x[i] = list": lambda: write(0, [1, 2, 3, 4, 5, 6]),
    "xp.exp(host)": lambda: xp.exp(HOST),
    "xp.exp(list)": lambda: xp.exp([1.0, 2.0]),
    "xp.exp(stranger)": lambda: xp.exp(Stranger()),
    "xp.sum(host)": lambda: xp.sum(HOST),
    "xp.sum(list)": lambda: xp.sum([1.0, 2.0]),
    "xp.zeros_like(host)": lambda: xp.zeros_like(HOST),
    "xp.empty_like(host)": lambda: xp.empty_like(HOST),
    "xp.where(host mask)": lambda: xp.where(HOST > 0, X, 0),
    "xp.concatenate([dev, host])": lambda: xp.concatenate([X, HOST]),
    "xp.asarray([dev, host])": lambda: xp.asarray([X, HOST]),
    "xp.full(shape, host)": lambda: xp.full((4, 6), HOST),
    "xp.exp(out=host)": lambda: xp.exp(X, out=HOST),
    "Array(list)": lambda: Array([1, 2]),
    # device values where the host must know them
    "xp.zeros(dev 0-d)": lambda: xp.zeros(xp.asarray(3)),
    "xp.arange(dev 0-d)": lambda: xp.arange(xp.asarray(3)),
    "reshape(dev 0-d)": lambda: X.reshape(xp.asarray(24)),
    "sum(axis=dev 0-d)": lambda: X.sum(axis=xp.asarray(0)),
    "repeat(dev counts)": lambda: xp.repeat(X, xp.asarray([1, 2, 1, 1]), axis=0),
    # indices
    "dev[host index]": lambda: X[np.array([0, 1])],
    "dev[host mask]": lambda: X[HOST > 0],
    "dev[out of range]": lambda: X[xp.asarray([0, 9])],
    "take(out of range)": lambda: xp.take(X, xp.asarray([9]), axis=0),
    "take(list)": lambda: xp.take(X, [0, 1], axis=0),
    "x[repeated] = v": lambda: write(xp.asarray([0, 0]), X[:2]),
    "x[repeated pairs] = v": lambda: write((xp.asarray([0, 1, 0]), xp.asarray([2, 2, 2])), X[0, :3]),
    "x[repeated] += v": lambda: grow_at(X.copy(), xp.asarray([1, 1]), X[:2]),
    "x[host index] = v": lambda: write(np.array([0, 1]), 1.0),
    "add.at(host index)": lambda: xp.add.at(X.copy(), np.array([0]), 1.0),
    "add.at(host value)": lambda: xp.add.at(X.copy(), xp.asarray([0]), HOST[:1]),
    "add.at(host array)": lambda: xp.add.at(HOST, xp.asarray([0]), 1.0),
    # functions and keywords that CuPy lacks
    "no function: vecdot": lambda: xp.vecdot(X, X),
    "no function: errstate": lambda: xp.errstate(all="ignore"),
    "no function: linalg.vector_norm": lambda: xp.linalg.vector_norm(X),
    "no module: random": lambda: xp.random.standard_normal(3),
    "no keyword: sum(where=)": lambda: xp.sum(X, where=X > 0),
    "no keyword: x.max(initial=)": lambda: X.max(initial=0),
    "no keyword: einsum(out=)": lambda: xp.einsum("ij->i", X, out=X),
    "no keyword: exp(where=)": lambda: xp.exp(X, where=X > 0),
    "no keyword: matmul(where=)": lambda: xp.matmul(X, X.T, where=True),
    "no keyword: take(mode=)": lambda: xp.take(X, xp.asarray([0]), mode="clip"),
    "no keyword: clip(min=)": lambda: xp.clip(X, min=0),
    "no keyword: sort(stable=)": lambda: xp.sort(X, stable=True),
    "no keyword: reshape(shape=)": lambda: xp.reshape(X, shape=(24,)),
    "no keyword: packbits(axis=)": lambda: xp.packbits(X > 0, axis=0),
    "too many positionals": lambda: xp.take(X, xp.asarray([0]), 0, None, "clip"),
    "item(i)": lambda: X.item(0),
    "maximum.reduce": lambda: xp.maximum.reduce(X),
    "subtract.accumulate": lambda: xp.subtract.accumulate(X),
    "multiply.at": lambda: xp.multiply.at(X.copy(), xp.asarray([0]), 2.0),
    "subtract.at(float)": lambda: xp.subtract.at(X.copy(), xp.asarray([0]), 2.0),
    "add.at(int8)": lambda: xp.add.at(X.astype(np.int8), xp.asarray([0]), 1),
    "add.at(bfloat16)": lambda: xp.add.at(BF.copy(), xp.asarray([0]), 1),
    "maximum.at(float16)": lambda: xp.maximum.at(X.astype(np.float16), xp.asarray([0]), 1),
    "x.setflags": lambda: X.setflags(write=False),
    "x.flags.writeable": lambda: X.flags.writeable,
    "x.foo = 1": lambda: setattr(X, "foo", 1),
    "dtype object": lambda: xp.asarray([None]),
    "dtype str": lambda: xp.asarray(["a"]),
    "dtype float8": lambda: X.astype(ml_dtypes.float8_e4m3fn),
    # bfloat16
    "bfloat16 batched product": lambda: BF.reshape(2, 2, 6) @ BF.reshape(2, 6, 2),
    "bfloat16 einsum": lambda: xp.einsum("ij,kj->ik", BF, BF),
    "bfloat16 where": lambda: xp.where(X > 0, BF, BF),
    "bfloat16 var": lambda: BF.var(),
    "bfloat16 cumsum": lambda: xp.cumsum(BF, axis=0),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused(name):
    with pytest.raises((TypeError, AttributeError, IndexError)) as e:
        MISTAKES[name]()
    assert len(str(e.value)) > 5


def test_numpy_itself_accepts_such_mistakes():
    """The list above is of use because NumPy raises nothing for the same code."""
    HOST.copy()[np.array([0, 0])] = HOST[:2]
    assert np.sum(HOST, where=HOST > 0) > 0
    assert np.take(HOST, [9], mode="clip").shape == (1,)
    assert np.maximum.reduce(HOST).shape == (6,)
    assert range(np.asarray(3)) == range(3)


def test_errors_say_what_to_do():
    with pytest.raises(StrictError, match=r"wants a device array, got a ndarray; .* move once, with xp\.asarray"):
        xp.exp(HOST)
    message = r"xp\.sum\(\) has no argument 'where' in CuPy .* knows: a axis dtype out keepdims"
    with pytest.raises(StrictError, match=message):
        xp.sum(X, where=X > 0)
    with pytest.raises(AttributeError, match="cupy has no vecdot"):
        _ = xp.vecdot
    with pytest.raises(AttributeError, match="RawKernel exists, but its strict double"):
        _ = xp.RawKernel


# ── right code ───────────────────────────────────────────────────────────────────────────────────────────────────────
def softmax(m, x):
    e = m.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def shapes(m, x):
    y = m.expand_dims(x.reshape(2, 2, 6).transpose(2, 0, 1), 1)
    return m.swapaxes(y, 0, 1).squeeze(0).ravel()[::-1].copy()


def gathering(m, x):
    sorted_by_index = m.take_along_axis(x, m.argsort(x, axis=1), axis=1)
    return sorted_by_index - m.sort(x, axis=1) + x[:, m.argmax(x, axis=1)[:1]]


def creation(m, x):
    triangles = m.tril(m.full((3, 3), 2.0)) + m.zeros_like(m.triu(m.ones((3, 3))))
    return m.ones((3, 3)) + m.eye(3) + m.tri(3) + triangles


# Computed with NumPy and with the strict backend: the values, dtypes and shapes must be the same.
SAME = {
    "operators": lambda m, x: (2 - x) * x / 3 + x**2 - (-x) @ x.T @ x,
    "comparisons": lambda m, x: (x > 0) & ~(x == 1) | (x <= -1),
    "integers": lambda m, x: (m.arange(6) // 2 % 3) << 1 ^ 1,
    "reductions": lambda m, x: m.stack([x.sum(), x.mean(), x.max(), x.std(), x.var(), m.sqrt(m.square(x).sum())]),
    "softmax": softmax,
    "shapes": shapes,
    "T and mT": lambda m, x: x.T.mT @ x.swapaxes(0, 1),
    "joining": lambda m, x: m.concatenate([m.stack([x, x]), m.broadcast_to(x, (2, 4, 6))], axis=1),
    "splitting": lambda m, x: m.split(x, [1, 3], axis=1)[1] + m.split(x, 3, axis=1)[0],
    "gathering": gathering,
    "creation": creation,
    "ranges": lambda m, x: m.linspace(0, 1, 5, dtype=m.float32) + m.arange(5, dtype=m.float32),
    "choosing": lambda m, x: m.clip(m.where(x > 0, x, m.nan_to_num(m.float32(0) * x)), None, 0.5),
    "padding": lambda m, x: m.pad(m.cumsum(x, axis=1), ((0, 0), (1, 1)), constant_values=-1),
    "linear algebra": lambda m, x: m.linalg.norm(m.linalg.inv(x @ x.T), axis=1),
    "einsum": lambda m, x: m.einsum("ij,kj->ik", x, x),
    "windows": lambda m, x: m.lib.stride_tricks.sliding_window_view(x, 3, axis=1).sum(-1),
    "a scalar keeps the dtype": lambda m, x: x * 2.0 + 1,
    "a float64 scalar does not": lambda m, x: x * m.float64(2.0),
    "integers and infinities": lambda m, x: m.where(m.isfinite(x / 0), m.inf, m.finfo(m.float32).max).astype(m.float64),
    "bits": lambda m, x: m.unpackbits(m.packbits(x > 0)),
    "views": lambda m, x: x.view(m.int32).astype(m.int64, copy=False),
    "two results": lambda m, x: m.divmod(x, 2.0)[1] + m.modf(x)[0],
    "reduce": lambda m, x: m.add.reduce(x, axis=0) * m.multiply.accumulate(x[0]),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", SAME)
def test_right_code_gives_numpys_values(name):
    host = np.random.default_rng(1).standard_normal((4, 6)).astype(np.float32)
    want = SAME[name](np, host)
    got = SAME[name](xp, xp.asarray(host))
    assert isinstance(got, Array)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert np.array_equal(xp.asnumpy(got), want, equal_nan=True)


def test_an_array_has_the_attributes_of_cupys_ndarray():
    assert xp.ndarray is Array
    assert not isinstance(X, np.ndarray)
    assert (X.shape, X.ndim, X.size, X.nbytes, X.itemsize, X.strides) == ((4, 6), 2, 24, 96, 4, (24, 4))
    assert X.dtype == xp.float32 == np.float32
    assert X.flags.c_contiguous and not X.T.flags.c_contiguous
    assert X.copy().base is None and isinstance(X[1:].base, Array)
    assert len(X) == 4 and [row.shape for row in X] == [(6,)] * 4
    assert xp.newaxis is None and X[:, xp.newaxis].shape == (4, 1, 6)
    with pytest.raises(TypeError):
        iter(X.sum())


def test_results_are_0d_arrays():
    results = [X.sum(), X[0, 0], xp.argmax(X), xp.allclose(X, X), xp.count_nonzero(X), X.sum() * 2, X.min() < 0]
    for result in results:
        assert isinstance(result, Array) and result.shape == ()


def test_copies_and_pickles():
    for twin in (copy.copy(X), copy.deepcopy(X), pickle.loads(pickle.dumps(X)), X.copy(), xp.asarray(X.get())):
        assert isinstance(twin, Array) and twin is not X
        twin += 1
        assert np.array_equal(X.get(), HOST)


def test_data_are_copied_between_host_and_device():
    host = HOST.copy()
    device = xp.asarray(host)
    host[0] = 99
    assert xp.asnumpy(device).max() < 99
    device.get()[...] = 99
    assert xp.asnumpy(device).max() < 99


def test_in_place_operations_and_out_keep_the_object():
    y = before = X.copy()
    y += X
    y *= 2.0
    y -= 1
    y /= xp.asarray(np.float32(4))
    assert y is before and np.allclose(y.get(), (HOST * 4 - 1) / 4)
    assert X.astype(np.float32, copy=False) is X and X.astype(np.float32) is not X
    assert xp.asarray(X) is X and xp.ascontiguousarray(X) is X
    out = xp.zeros_like(X)
    assert xp.exp(X, out=out) is out and np.array_equal(out.get(), np.exp(HOST))
    total = total_before = xp.zeros(())
    total += X.sum()
    assert total is total_before and total.get() == pytest.approx(HOST.sum())


def test_inplace_matmul_makes_a_new_array_as_in_cupy():
    y = before = X.copy()
    y @= xp.eye(6, dtype=xp.float32)
    assert y is not before


def test_basic_indices_give_views_even_of_one_number():
    y = X.copy()
    first = y[0, 0]
    first += 100
    y[1:, 1] = 7
    assert y.get()[0, 0] > 90 and (y.get()[1:, 1] == 7).all()


def test_writing_at_indices():
    y = xp.zeros(5)
    y[xp.asarray([3, 1])] = xp.asarray([3.0, 1.0])
    y[xp.asarray([4, 4])] = 4.0                            # repeated, but one value: defined on a GPU too
    xp.add.at(y, xp.asarray([0, 0, 0]), xp.asarray([1.0, 2.0, 3.0]))
    assert y.tolist() == [6, 1, 0, 3, 4]


def test_empty_memory_is_poisoned():
    assert np.isnan(xp.empty((2, 2), dtype=xp.float32).get()).all()
    assert np.isnan(xp.empty_like(X).get()).all() and xp.empty_like(X).dtype == X.dtype
    assert np.isnan(xp.empty(3, ml_dtypes.bfloat16).get().astype(np.float32)).all()
    with pytest.raises(IndexError):
        X[xp.empty(2, dtype=xp.int64)]


def test_bfloat16_products_keep_their_dtype():
    assert (BF @ BF.T).dtype == xp.tensordot(BF, BF, ((1,), (1,))).dtype == strict.BFLOAT16
    assert (BF * 2 + BF.sum()).dtype == strict.BFLOAT16
    assert (BF @ X.T).dtype == np.float32


def test_a_class_that_asks_for_it_gets_its_own_operator_called():
    class Tensor:
        __array_ufunc__ = None

        def __radd__(self, other):
            return "tensor"

    assert X + Tensor() == "tensor"
    assert np.float32(2) * X is not NotImplemented and (np.float32(2) * X).dtype == np.float32
    assert (np.float64(2) * X).dtype == np.float64         # NEP 50, in CuPy too


# ── the cost ─────────────────────────────────────────────────────────────────────────────────────────────────────────
INTS = xp.asarray([0, 1, 1])
# The number of times the host waits for the device.
WAITS = {
    "float": (1, lambda: float(X.sum())),
    "int": (1, lambda: int(X.sum())),
    "bool": (1, lambda: bool((X > 0).all())),
    "if": (1, lambda: 1 if X.sum() > 0 else 0),
    "max of two": (1, lambda: max(X.sum(), X.min())),
    "item": (1, lambda: X.sum().item()),
    "tolist": (1, lambda: X.tolist()),
    "format": (1, lambda: f"{X.sum():.3f}"),
    "print": (1, lambda: str(X)),
    "get": (1, lambda: X.get()),
    "asnumpy": (1, lambda: xp.asnumpy(X)),
    "mask": (1, lambda: X[X > 0]),
    "mask written": (1, lambda: write(X > 0, 0)),
    "nonzero": (1, lambda: xp.nonzero(X)),
    "where of one": (1, lambda: xp.where(X > 0)),
    "unique": (1, lambda: xp.unique(X)),
    "argpartition": (2, lambda: xp.argpartition(X, 2, axis=1)),
    "bincount": (2, lambda: xp.bincount(INTS)),
    "tril_indices": (2, lambda: xp.tril_indices(3)),
    "where of three": (0, lambda: xp.where(X > 0, X, 0)),
    "gather": (0, lambda: X[INTS]),
    "add.at": (0, lambda: xp.add.at(X.copy(), INTS, 1.0)),
    "copyto(where=)": (0, lambda: xp.copyto(X.copy(), 0.0, where=X > 0)),
    "iteration": (0, lambda: list(X)),
    "sort": (0, lambda: xp.sort(xp.argsort(X))),
    "shape and dtype": (0, lambda: (X.shape, X.dtype, len(X), X.nbytes)),
    "asarray": (0, lambda: xp.asarray(HOST)),
}


@pytest.mark.parametrize("name", WAITS)
def test_waiting_is_counted(name):
    times, f = WAITS[name]
    counts.clear()
    f()
    assert counts["sync"] == times
    assert sum(n for what, n in counts.items() if what.startswith("sync ")) == times


# The number of copies from host to device.
COPIES = {
    "array": (1, lambda: xp.asarray(HOST)),
    "list": (1, lambda: xp.array([1, 2])),
    "number": (1, lambda: xp.asarray(2.0)),
    "list index": (1, lambda: X[[0, 1]]),
    "two lists": (2, lambda: X[[0, 1], [0, 1]]),
    "device": (0, lambda: xp.asarray(X)),
    "device list": (0, lambda: xp.asarray([X.sum(), X.max()])),
    "zeros": (0, lambda: xp.zeros(3) + 1.0),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_to_the_device_are_counted(name):
    times, f = COPIES[name]
    counts.clear()
    f()
    assert counts["h2d"] == times


@pytest.mark.parametrize("launches, passes, f", [
    (1, 2, lambda x: x * 2.0),
    (1, 2, lambda x: x * x),
    (1, 2, lambda x: xp.exp(x)),
    (1, 2, lambda x: xp.array(x)),
    (1, 1.25, lambda x: x.sum(axis=0)),
    (1, 2, lambda x: operator.imul(x, 2.0)),
    (1, 2, lambda x: x.__setitem__(..., xp.asarray(x))),
    (1, 2, lambda x: x.T.reshape(-1)),
    (0, 0, lambda x: x.T),
    (0, 0, lambda x: x[1:]),
    (0, 0, lambda x: x.reshape(-1)),
    (0, 0, lambda x: xp.asarray(x)),
    (0, 0, lambda x: xp.ascontiguousarray(x)),
    (0, 0, lambda x: xp.split(x, 2)),
])
def test_launches_and_the_bytes_they_move_are_counted(launches, passes, f):
    """`passes`: the bytes moved, in sizes of x."""
    x = xp.asarray(np.ones((4, 4), np.float32))
    counts.clear()
    f(x)
    assert counts["launch"] == launches and counts["bytes"] == passes * x.nbytes


def test_a_training_step_waits_for_nothing_and_copies_its_batch():
    W = xp.zeros((6, 3), dtype=xp.float32)
    rows = HOST.shape[0]
    counts.clear()
    x = xp.asarray(HOST)
    y = xp.asarray([0, 2, 1, 2])
    z = x @ W
    p = xp.exp(z - z.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    loss = -xp.log(p[xp.arange(rows), y]).mean()
    xp.add.at(p, (xp.arange(rows), y), -1.0)
    W -= 0.1 * (x.T @ p) / rows
    assert counts["sync"] == 0 and counts["h2d"] == 2 and counts["call"] > 10
    assert float(loss) == pytest.approx(np.log(3)) and counts["sync float"] == 1


# ── the list of CuPy's names, and the static check ───────────────────────────────────────────────────────────────────
def test_the_list_is_small_and_the_strict_backend_offers_most_of_it():
    assert (PACKAGE / "cupy_api.json").stat().st_size < 45_000
    assert re.fullmatch(r"1[4-9]\.\d+\.\d+", strict.API["version"])
    missing = [name for name in strict.API["functions"] if hasattr(np, name) and not hasattr(xp, name)]
    assert missing == []
    attributes = [*strict.API["methods"], *strict.API["properties"]]
    not_offered = {name for name in attributes if not hasattr(Array, name)}
    assert not_offered <= {"set", "dump", "dumps", "tofile", "choose", "flat"}


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
def test_the_list_is_what_the_installed_cupy_offers():
    command = [sys.executable, TOOLS / "cupy_api.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    version = re.search(r'\+ "version": "([\d.]+)"', done.stdout)
    if version:
        pytest.skip(f"the installed CuPy is {version[1]}, the list is of {strict.API['version']}")
    assert done.returncode == 0, done.stdout + done.stderr


# A line of a function with an array x -> the message of the check.
BAD = {
    "y = xp(x).vecdot(x, x)": "no vecdot",
    "y = m.exp(x, where=x > 0)": "exp has no argument 'where'",
    "y = m.max(x, axis=-1, initial=0.0)": "max has no argument 'initial'",
    "y = m.sum(x, where=x > 0)": "sum has no argument 'where'",
    "y = m.einsum('ij->i', x, out=x)": "einsum has no argument 'out'",
    "y = m.take(x, 0, axis=1, mode='clip')": "take has no argument 'mode'",
    "y = m.take(x, 0, 1, None, 'clip')": "takes 4 positional arguments, not 5",
    "y = m.clip(x, min=0)": "clip has no argument 'min'",
    "y = m.reshape(x, shape=(3,))": "reshape has no argument 'shape'",
    "y = m.linalg.vector_norm(x)": "no linalg.vector_norm",
    "m.multiply.at(x, 0, 1.0)": "multiply.at is not implemented",
    "y = m.maximum.reduce(x)": "maximum.reduce is not implemented",
    "y = m.random.normal(size=3)": "drawn on the host",
    "y = (lambda g: g * m.matvec(x, g))": "no matvec",
    "y = [m.spacing(t) for t in x]": "no spacing",
    "n = xp(x) if x.ndim else np; y = n.block(x)": "no block",
    "with m.errstate(all='ignore'): y = x": "no errstate",
    "f = m.frompyfunc": "no frompyfunc",
    "y = cupy.insert(x, 0, 1)": "no insert",
    "y = np.exp(x)": "np.exp is wrong",
    "y = np.linalg.norm(x)": "np.linalg is wrong",
    "y = x + np.random.randn(3)": "generator that was passed in",
    "y = map(np.sqrt, x)": "np.sqrt is wrong",
    "y = array.asarray(np.exp(x))": "np.exp is wrong",
}
GOOD = '''
import numpy as np
from .array import xp

def softmax(x: np.ndarray, rng: np.random.Generator, axis: int = -1):
    m, n = xp(x), 3
    z = m.exp(x - x.max(axis=axis, keepdims=True), out=None)
    w = m.zeros(x.shape, dtype=np.float32) + m.linalg.norm(x, axis=-1, keepdims=True) + np.pi
    m.add.at(w, m.arange(3), 1.0)
    noise = m.asarray(rng.standard_normal(n), dtype=m.float32)
    table = np.arange(3)    # host
    A, B = array.asarray(np.zeros((3, 3), np.float32)), array.asarray(np.arange(3).astype(np.int64))
    def pullback(g, *args):
        return g * z + m.add.reduce(*args, axis=0) + m.pad(g, 1, constant_values=0) + xp(g).where(g > 0, g, 0)
    def other(m):
        return m.vecdot(m), (lambda m: m.errstate)
    if x.dtype == np.bool_ or np.issubdtype(x.dtype, np.integer) or isinstance(x, (m.ndarray, np.generic)):
        return m.einsum("ij,jk->ik", x, x, x, optimize=True), m.float32(2), m.inf
    return z / z.sum(axis, keepdims=True), pullback, other, noise, table, module(x).anything(where=1)
'''


@pytest.mark.parametrize("line", BAD)
def test_the_check_finds_a_planted_fault(line):
    source = f"import numpy as np\nfrom .array import xp\ndef f(x):\n    m = xp(x)\n    {line}\n"
    faults = xpcheck.check(source)
    assert [n for n, _ in faults] == [5]
    assert BAD[line] in faults[0][1]
    assert xpcheck.check(source.replace(line, line + "    # host")) == []


def test_the_check_finds_all_faults_of_one_file():
    body = "".join(f"    {line}\n" for line in BAD)
    faults = xpcheck.check(f"import numpy as np\ndef f(xp, x, m):\n    m = xp(x)\n{body}")
    assert sorted(n for n, _ in faults) == list(range(4, 4 + len(BAD)))


def test_the_check_passes_right_code():
    assert xpcheck.check(GOOD) == []


def test_the_library_uses_only_names_that_cupy_has():
    assert xpcheck.check_tree(PACKAGE) == []

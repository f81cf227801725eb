"""The CUDA kernels, without a GPU: NVRTC compiles them, and the same source, launched by the same lines, runs on the
CPU and is its definition. On the backend cupy the first tests run there.

Products go to a stand-in of cuBLAS that is given the very arguments and reads memory column by column, as cuBLAS does.
What the kernels fill is NaN before; shared memory and the surroundings of arrays are poisoned; every launch runs twice,
with the threads in the reverse order and another poison the second time, and must give the same bits.
"""
from __future__ import annotations

import ctypes
import math
import runpy
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import packed_weights
import pytest
from helpers import accepted, lora_curve
from hypothesis import given
from hypothesis import strategies as st
from packed_weights import FORMS

from tinyft import array, dispatch, kernels, optim, precision
from tinyft.array import bfloat16
from tinyft.kernels import cuda
from tinyft.kernels.cuda import gemm, launch, layers, optimizer, packed
from tinyft.kernels.cuda.cpu_kernel import CpuKernel, KernelError
from tinyft.precision import LOSSES
from tinyft.tensor import OPS, sum_to

nvrtc = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "tools" / "nvrtc.py")))
no_compiler = not any(shutil.which(c) for c in ("g++", "c++", "clang++"))
pytestmark = [pytest.mark.skipif(array.backend() == "strict",
                                 reason="kernels work on memory, which the strict double does not give away"),
              pytest.mark.skipif(no_compiler and array.backend() == "numpy", reason="no C++ compiler: install g++")]
no_device = pytest.mark.skipif(array.backend() != "numpy", reason="of the CPU's stand-ins for a device")
FILES = sorted(p.name for p in launch.HERE.glob("*.cu"))
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), bfloat16]


# ── they compile for a device ────────────────────────────────────────────────────────────────────────────────────────
@no_device
@pytest.mark.skipif(bool(nvrtc.missing()), reason=str(nvrtc.missing()))
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("file", FILES)
def test_every_kernel_compiles_for_a_device_and_keeps_its_numbers_in_registers(file, arch):
    for t, s in [(DTYPES[0], DTYPES[1])] + [(DTYPES[1], DTYPES[1]), (DTYPES[2], DTYPES[0])] * (arch == "sm_90"):
        binary, log = nvrtc.compile_cuda(launch.source(file, (("T", t), ("S", s))), arch)
        assert binary[:4] == b"\x7fELF" and "entry function" in log
        assert "0 bytes spill stores, 0 bytes spill loads" in log
        assert all(
            line.split("frame, ")[1].startswith("0 bytes spill stores, 0") for line in log.splitlines()
            if "stack frame" in line)
    with pytest.raises(RuntimeError, match="error"):
        nvrtc.compile_cuda(launch.source(file, (("T", t), ("S", s))).replace("blockIdx", "blockIndex"), arch)


# ── the stand-ins ────────────────────────────────────────────────────────────────────────────────────────────────────
class FakeCublas:
    """cublasGemmStridedBatchedEx on host memory.

    `change` may spoil the arguments; reading or writing outside an array is an error.
    """

    def __init__(self, change: Callable[[list], Any] | None = None):
        self.change = change
        self.calls = 0

    def gemm(self, a: np.ndarray, la: Any, b: np.ndarray, lb: Any, out: np.ndarray, add: bool) -> None:
        given = list(gemm.arguments(a, la, b, lb, out, add, lambda x: x.ctypes.data, lambda double, x: float(x)))
        assert [type(x) for x in given] == [int] * 5 + [float] + [int] * 8 + [float] + [int] * 7
        if self.change:
            self.change(given)
        self.calls += 1
        self.run((a, b, out), *given)

    def run(self, known: tuple, transa: int, transb: int, m: int, n: int, k: int, alpha: float, A: int, ta: int,
            lda: int, sa: int, B: int, tb: int,
            ldb: int, sb: int, beta: float, C: int, tc: int, ldc: int, sc: int, count: int, compute: int,
            algorithm: int) -> None:
        double = ta == gemm.TYPES[np.dtype(np.float64)]
        assert ta == tb
        assert (tc == ta or tc == 0)
        assert compute in ((70,) if double else (68, 77))
        assert algorithm == -1
        wide = np.float64 if double else np.float32
        for i in range(count):
            x = column_major(known, A, ta, i * sa, (k, m) if transa else (m, k), lda).astype(wide)
            y = column_major(known, B, tb, i * sb, (n, k) if transb else (k, n), ldb).astype(wide)
            z = column_major(known, C, tc, i * sc, (m, n), ldc)
            product = alpha * (x.T if transa else x) @ (y.T if transb else y)
            z[...] = (product + beta * z if beta else product).astype(z.dtype)


def column_major(known: tuple, address: int, kind: int, offset: int, shape: tuple, leading: int) -> np.ndarray:
    """The matrix at this address. Its columns start `leading` numbers apart."""
    dtype = next(d for d, number in gemm.TYPES.items() if number == kind)
    rows, columns = shape
    size = dtype.itemsize
    if leading < max(rows, 1):
        raise ValueError("cuBLAS status 7: a leading dimension below the number of rows")
    first = address + offset * size
    extent = (leading * (columns - 1) + rows) * size
    spans = [np.lib.array_utils.byte_bounds(a) for a in known]
    assert any(low <= first and first + extent <= high for low, high in spans), "cuBLAS reads outside its operands"
    memory = np.frombuffer((ctypes.c_char * extent).from_address(first), dtype)
    return np.lib.stride_tricks.as_strided(memory, shape, (size, leading * size))


class Poisoned:
    """NumPy, but `empty` fills the array with NaN."""
    @staticmethod
    def empty(shape: tuple, dtype: Any) -> np.ndarray:
        return np.full(shape, np.nan, dtype)

    ascontiguousarray = staticmethod(np.ascontiguousarray)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """NumPy arrays in the place of CuPy's."""
    if array.backend() != "numpy":
        yield
        return
    monkeypatch.setattr(launch, "xp", lambda like: Poisoned)
    # so that every thread computes more than one element
    monkeypatch.setattr(launch, "BLOCKS", 2)
    monkeypatch.setitem(gemm.LIBRARIES, np.ndarray, FakeCublas())
    monkeypatch.setitem(launch.COMPILERS, np.ndarray, CpuKernel)
    launch._kernel.cache_clear()
    yield
    launch._kernel.cache_clear()


def both_ways(run: Callable[[], list]) -> list:
    """The result of `run` with the threads in order.  The reverse order and another poison must give the same bits."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv("EMU_REVERSE", "0")
        first = run()
        m.setenv("EMU_REVERSE", "1")
        m.setenv("EMU_POISON", "127")
        again = run()
    same = all(a is b is None or a.tobytes() == b.tobytes() for a, b in zip(first, again))
    assert same, "the result depends on the order of the threads, or on poison"
    return first


# ── a kernel is its definition ───────────────────────────────────────────────────────────────────────────────────────
def inputs(name: str, shape: tuple, dtype: Any, rng: np.random.Generator) -> tuple[list, dict]:
    """Arrays of the right kinds for an op, x of this shape."""
    def make(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 2).astype(dtype)

    n = shape[-1]
    if name == "layer_norm":
        return [make(*shape), make(n), make(n)], {"eps": 1e-5}
    if name == "linear":
        return [make(*shape), make(5, n)] + ([make(5)] if rng.random() < 0.7 else []), {}
    if name == "matmul":
        return [make(*shape), make(*shape[:-2], n, 3)], {}
    if name == "embedding":
        return [make(7, n), rng.integers(-7, 7, shape)], {}
    if name == "cross_entropy":
        labels = np.asarray(rng.integers(0, n, shape[:-1]))
        kw = [{}, {"ignore_index": 1}, {"label_smoothing": 0.1, "ignore_index": 0},
              {"weight": abs(make(n))}][rng.integers(4)]
        labels[rng.random(labels.shape) < 0.2] = kw.get("ignore_index", -100)
        return [make(*shape), labels.astype(rng.choice([np.int32, np.int64]))], kw
    if name == "attention":
        return attention_inputs(shape, dtype, make, rng)
    if name == "dropout":
        return [make(*shape), [0.0, 0.1, 0.5][rng.integers(3)],
                int(rng.integers(2**63)) << int(rng.integers(2) * 60)], {}
    return [make(*shape)], {}


def attention_inputs(shape: tuple, dtype: Any, make: Callable, rng: np.random.Generator) -> tuple[list, dict]:
    """q, k, v and perhaps a bias for scores of this shape (..., H, Tq, Tk); masks of every kind; perhaps fewer
    key/value heads.
    """
    *lead, t, keys = shape
    kv_lead = list(lead)
    if lead and rng.random() < 0.5:
        kv_lead[-1] = int(rng.choice([h for h in range(1, lead[-1] + 1) if lead[-1] % h == 0]))
    masks = [None, rng.random(shape) < 0.6, rng.random((*(1,) * len(lead), 1, keys)) < 0.5, np.zeros((t, 1), bool),
             rng.random(keys) < 0.5]
    dropout_mask = (rng.random(shape) < 0.7).astype(dtype) / dtype.type(0.7) if rng.random() < 0.5 else None
    kw = {"key_mask": masks[rng.integers(5)], "causal": bool(rng.random() < 0.5), "scale": [None, 0.3][rng.integers(2)],
          "dropout_mask": dropout_mask}
    arrays = [make(*lead, t, 6), make(*kv_lead, keys, 6), make(*kv_lead, keys, 4)]
    if rng.random() < 0.5:
        some = tuple(size if rng.random() < 0.6 else 1 for size in shape)
        arrays.append(make(*some[int(rng.integers(len(lead) + 1)):]))
    return arrays, kw


def wide(a: Any) -> Any:
    """16-bit numbers as float32: what the definition computes with, since a kernel rounds only at its ends."""
    return a.astype(np.float32) if isinstance(a, np.ndarray) and a.dtype in DTYPES else a


def near(a: np.ndarray, b: np.ndarray, tol: float) -> bool:
    """True if a equals b up to tol times the largest value of b; where b is not finite, if a has the same NaNs."""
    a = a.astype(np.float64)
    if a.shape != b.shape:
        return False
    if not np.isfinite(b).all():
        return np.array_equal(np.isnan(a), np.isnan(b))
    bound = tol * max(np.abs(b).max(initial=0), 1)
    return bool((np.abs(a - b) <= bound).all())


def on_device(a: Any) -> Any:
    return array.asarray(a) if isinstance(a, np.ndarray) else a


def gradients(pullbacks: Any, g: Any, inputs: int) -> list:
    """The gradient of every input, from one shared pullback or from one for each input."""
    if callable(pullbacks):
        return list(pullbacks(g, [True] * inputs))
    return [None if back is None else back(g) for back in pullbacks[:inputs]]


def agree(name: str, shape: tuple, dtype: Any, rng: np.random.Generator) -> None:
    """Value and every pullback, both ways; no input is written to.  On a device, if the suite runs on one."""
    host, options = inputs(name, shape, np.dtype(dtype), rng)
    arrays = [on_device(a) for a in host]
    kw = {k: on_device(v) for k, v in options.items()}
    m = array.xp(arrays[0])
    tol = {"float32": 5e-6, "float16": 3e-3, "bfloat16": 2e-2, "float64": 1e-12}
    wider = np.promote_types(dtype, np.float32)
    # Gradients that are sums over the batch stay in float32.
    summed = {"embedding": [0], "linear": [1, 2], "layer_norm": [1, 2], "attention": [3]}.get(name, [])
    with np.errstate(all="ignore"):
        want, defined = OPS[name].definition(*map(wide, host), **{k: wide(v) for k, v in options.items()})
    want = np.asarray(want)
    g = on_device(np.asarray(rng.standard_normal(want.shape)).astype(wider if name in LOSSES else dtype))
    layouts = [g]  # any g that backward may hand over
    if g.ndim > 1:
        layouts += [m.broadcast_to(g[..., :1], g.shape), m.ascontiguousarray(g.swapaxes(-1, -2)).swapaxes(-1, -2)]

    def run() -> list:
        kernel = getattr(layers, name)
        if dtype == np.float64:
            y, pulls = accepted(kernel, OPS[name].definition, *arrays, **kw)
        else:
            y, pulls = kernel(*arrays, **kw)
        out = [y]
        for h in layouts:
            out += gradients(pulls, h, len(arrays))
        return [a if a is None else np.asarray(array.asnumpy(a)) for a in out]
    with np.errstate(all="ignore"):
        y, *got = both_ways(run)
        assert y.dtype == (wider if name in LOSSES else dtype) and near(y, want, tol[y.dtype.name]), "value"
        rows = max(1, math.prod(shape[:-1]))
        for h in layouts:
            h = wide(array.asnumpy(h))
            right = gradients(defined, h, len(arrays))
            for i, (a, r) in enumerate(zip(arrays, right)):
                d = got.pop(0)
                assert (d is None) == (r is None)
                if r is not None and d is not None:
                    # The probabilities of attention are rounded.
                    exact = tol[np.dtype(dtype).name if name == "attention" else d.dtype.name]
                    assert d.dtype == (wider if i in summed else dtype), "pullback"
                    assert near(sum_to(d, a.shape), sum_to(r, a.shape), exact * rows**0.5), "pullback"
    for a, b in zip(arrays, host):
        assert isinstance(b, (int, float)) or np.array_equal(array.asnumpy(a), b), "an input was written to"


ONE_VALUE = [n for n in layers.NAMES if n != "project"]  # project gives three values
SHAPES = [(1, 1), (3, 5), (2, 3, 33), (9, 64), (70, 40), (1, 300), (2, 2, 5, 37), (130, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ONE_VALUE)
def test_a_kernel_equals_its_definition(name, shape, rng):
    # more draws for the ops with more options
    for _ in range(4 if name in ("attention", "cross_entropy") else 1):
        agree(name, shape, np.float32, rng)


@pytest.mark.parametrize("dtype", [np.float16, bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", ONE_VALUE)
def test_a_kernel_equals_its_definition_in_sixteen_bits(name, dtype, rng):
    for shape in SHAPES[:4]:
        agree(name, shape, dtype, rng)


@given(st.sampled_from(ONE_VALUE), st.lists(st.integers(1, 40), min_size=2, max_size=3), st.integers(0, 2**32 - 1))
def test_a_kernel_equals_its_definition_for_any_shape(name, shape, seed):
    agree(name, tuple(shape), np.float32, np.random.default_rng(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lie", ["together", "apart", "in another order"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 5, 3, 4, 7), (3, 20, 2, 37, 16)], ids=str)
def test_queries_keys_and_values_are_three_linear_maps_by_heads(sizes, lie, dtype, rng):
    by_heads(*sizes, lie, dtype, rng)


def by_heads(B: int, T: int, heads: int, width: int, c: int, lie: str, dtype: Any, rng: np.random.Generator) -> None:
    """`project` is its definition for every layout of the weights, and for wanted and missing gradients."""
    n = heads * width
    dtype = np.dtype(dtype)
    shapes = ((B, T, c), (3, n, c), (n,), (n,), (n,))
    x, weights, *biases = (on_device(rng.standard_normal(s).astype(dtype)) for s in shapes)
    order = [1, 0, 2] if lie == "in another order" else [0, 1, 2]
    Ws = [weights[i].copy() if lie == "apart" else weights[i] for i in order]
    args = (x, Ws[0], biases[0], Ws[1], biases[1], Ws[2], biases[2])
    assert (layers.as_one_matrix(tuple(Ws)) is not None) == (lie == "together")
    host = [wide(array.asnumpy(a)) for a in args]
    expected, right_back = OPS["project"].definition(*host, heads=heads)
    tol = {"float32": 5e-6, "float16": 6e-3, "bfloat16": 4e-2}[dtype.name]
    G = [rng.standard_normal((B, heads, T, width)).astype(dtype) for _ in range(3)]
    every = [True] * 7
    only_x = [True] + [False] * 6
    some = [False, True, False, False, True, True, True]
    for missing, needed in ((None, every), (1, every), (None, only_x), (None, some)):
        g = [None if i == missing else a for i, a in enumerate(G)]

        def run() -> list:
            values, back = layers.project(*args, heads=heads)
            found = back([on_device(a) for a in g], needed)
            return [*map(array.asnumpy, values), *(a if a is None else array.asnumpy(a) for a in found)]

        q, k, v, *found = both_ways(run)
        for a, b in zip((q, k, v), expected):
            assert a.dtype == dtype
            assert near(a, b, tol)
        right = right_back([wide(a) for a in g], every)
        assert len(found) == len(right) == len(needed)
        for d, right_d, is_needed in zip(found, right, needed):
            if is_needed:
                assert d is not None
                assert near(d, right_d, tol * (B * T)**0.5)


def test_project_declines_weights_of_two_dtypes(rng):
    x, W, b = (on_device(rng.standard_normal(s).astype(np.float32)) for s in ((2, 3, 4), (6, 4), (6,)))
    half = W.astype(np.float16)
    assert layers.project(x, W, b, half, b, W, b, heads=2) is NotImplemented
    q, _, v = OPS["project"](x, W, b, half, b, W, b, heads=2)
    assert q.shape == (2, 2, 3, 3)
    assert near(q.numpy(), v.numpy(), 0)


@no_device
def test_a_kernel_declines_arguments_that_it_was_not_written_for(rng):
    for name in ONE_VALUE:
        agree(name, (3, 5), np.float64, rng)

    def compiler(source: str, name: str) -> None:
        pytest.fail("a kernel was launched")

    launch.COMPILERS[np.ndarray] = compiler
    x = rng.standard_normal((4, 6)).astype(np.float32)
    W = rng.standard_normal((5, 6)).astype(np.float32)
    many = np.zeros((layers.SAME_ORDER + 1,), np.int64)
    qkv = tuple(a.astype(np.float64) for a in (x, W, W[:, :2]))
    cases = [
        ("gelu", (x[:, ::2],), {}),
        ("gelu_tanh", (x[:0],), {}),
        ("layer_norm", (x, W[0].astype(np.float64), W[1]), {}),
        ("linear", (x[:0], W), {}),
        ("embedding", (W, many), {}),
        ("embedding", (W, many[:0]), {}),
        ("matmul", (x[None, None], W.T[None]), {}),
        ("attention", qkv, {"key_mask": np.zeros((4, 5), bool), "dropout_mask": None, "scale": None}),
        ("cross_entropy", (x, np.array([0, 1, 2, 3])), {"weight": x[0], "label_smoothing": 0.1}),
    ]
    for name, args, kw in cases:
        with np.errstate(all="ignore"):
            assert getattr(layers, name)(*args, **kw) is NotImplemented
            OPS[name].definition(*args, **kw)  # the definition takes them


def strided(rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
    """Slices of an array, as models make them. None is contiguous."""
    x = array.asarray(rng.standard_normal((4, 5, 6)).astype(dtype))
    return {
        "first row of each text": x[:, 0],
        "last": x[:, -1],
        "behind a prompt": x[:, 2:],
        "every other column": x[..., ::2],
        "transposed": x[0].T,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", strided(np.random.default_rng(0), np.float32))
def test_linear_takes_an_input_that_is_not_contiguous(how, dtype, rng):
    """One product for any strides. CuPy's own product, the alternative, cannot be captured in a CUDA graph."""
    x = strided(rng, dtype)[how]
    before = gemm.LIBRARIES[np.ndarray].calls if array.backend() == "numpy" else 0
    W, b, g = (array.asarray(rng.standard_normal(s).astype(dtype)) for s in ((3, x.shape[-1]), 3, (*x.shape[:-1], 3)))
    y, pulls = layers.linear(x, W, b)
    expected, right_pulls = layers.linear(array.xp(x).ascontiguousarray(x), W, b)
    assert not x.flags.c_contiguous
    pairs = [(y, expected)]
    pairs += [(back(g), right_back(g)) for back, right_back in zip(pulls, right_pulls)]
    for a, right in pairs:
        a = array.asnumpy(a)
        right = array.asnumpy(right)
        assert a.dtype == right.dtype
        assert near(a, wide(right), {"float32": 5e-6, "float16": 3e-3, "bfloat16": 2e-2}[a.dtype.name])
    assert array.backend() != "numpy" or gemm.LIBRARIES[np.ndarray].calls - before == 6


def in_parts(rng: np.random.Generator, dtype: Any = np.float32, parts: Callable | None = None) -> None:
    """Check attention that takes the queries of a causal text in parts of three."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(cuda.attention, "PART_QUERIES", 3)
        if parts:
            m.setattr(cuda.attention, "_parts", parts)
        for shape in [(2, 2, 10, 13), (1, 6, 6), (3, 17, 17), (8, 9)] * 4:
            agree("attention", shape, dtype, rng)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_a_long_causal_text_goes_in_parts(dtype, rng, monkeypatch):
    in_parts(rng, dtype)
    monkeypatch.setattr(cuda.attention, "PART_QUERIES", 16)
    sizes = []
    make_scores = cuda.attention._Scores.__init__

    def recording(self, *args):
        make_scores(self, *args)
        sizes.append(self.p.size)
    monkeypatch.setattr(cuda.attention._Scores, "__init__", recording)
    q = array.asarray(rng.standard_normal((2, 64, 4)).astype(dtype))
    for causal, share in ((True, 10 / 16), (False, 1)):
        sizes.clear()
        layers.attention(q, q, q, causal=causal)
        # the scores of keys after the last query of a part are not computed
        assert sum(sizes) == share * 2 * 64 * 64


@no_device
@pytest.mark.parametrize("name, wrong", {
    "keys end where the queries do, cached ones or not": lambda rows, keys, t, n: (rows, slice(0, rows.stop)),
    "a key too few": lambda rows, keys, t, n: (rows, slice(0, keys.stop - 1)),
    "a part too few": lambda rows, keys, t, n: (rows, keys) if rows.start else (slice(0, 1), slice(0, n - t + 1)),
    "the causal mask counts from the first key": lambda rows, keys, t, n: (rows, slice(0, n))}.items())
def test_wrong_parts_are_caught(name, wrong, rng):
    right = cuda.attention._parts

    def wrong_parts(t: int, n: int, causal: bool) -> list:
        parts = right(t, n, causal)
        return [wrong(*part, t, n) for part in parts] if len(parts) > 1 else parts

    with pytest.raises((AssertionError, KernelError)), np.errstate(all="ignore"):
        in_parts(rng, parts=wrong_parts)


@no_device
def test_parts_that_do_not_add_up_are_caught(rng, monkeypatch):
    matmul = gemm.matmul
    monkeypatch.setattr(gemm, "matmul", lambda a, b, out=None, add=False: matmul(a, b, out=out))
    with pytest.raises(AssertionError):
        in_parts(rng)


@no_device
def test_large_scores_and_queries_without_keys(rng):
    q, k, v = (rng.standard_normal((2, 3, 40, 8)).astype(np.float32) for _ in range(3))
    for kw in ({"key_mask": np.zeros((1, 1, 40), bool)}, {"scale": 500.0},
               {"causal": True, "key_mask": np.arange(40) > 20}):
        y, back = layers.attention(q, k, v, **kw)
        want, right = OPS["attention"].definition(q, k, v, **kw)
        assert near(y, want, 2e-4)
        assert all(near(a, b, 1e-3) for a, b in zip(back(v, [True] * 3), right(v, [True] * 3)))
        assert np.isfinite(y).all()
    hidden, _ = layers.attention(q, k, v, key_mask=np.zeros((1, 1, 40), bool))
    assert not hidden.any()
    z = (rng.standard_normal((3, 50)) + [[0], [1e4], [-1e4]]).astype(np.float32)
    value, back = layers.cross_entropy(z, np.array([3, 4, 5]))
    want, right = OPS["cross_entropy"].definition(z, np.array([3, 4, 5]))
    assert near(value, want, 1e-6)
    assert near(back[0](np.float32(1)[None].reshape(())), right[0](np.float32(1)), 1e-6)
    # a label is outside the classes: a kernel cannot raise
    for labels in ([0, 50, 1], [0, -1, 1], [0, -51, 1]):
        value, (back, *_) = layers.cross_entropy(z, np.array(labels))
        assert np.isnan(value) and np.isnan(back(np.ones((), np.float32))).any()


def check_ignored_rows() -> None:
    """An ignored row counts nowhere, whatever its logits are; the loss of no rows is NaN, and its gradient 0."""
    z = np.linspace(-2, 2, 12, dtype=np.float32).reshape(4, 3)
    labels = np.array([2, -100, 0, -100])
    dirty = z.copy()
    dirty[1] = -np.inf
    dirty[3] = np.nan
    one = np.ones((), np.float32)
    value, (back, *_) = layers.cross_entropy(dirty, labels)
    want, (right, *_) = OPS["cross_entropy"].definition(z, labels)
    assert near(value, want, 1e-6)
    assert near(back(one), right(one), 1e-6)
    value, (back, *_) = layers.cross_entropy(z, np.full(4, -100))
    assert np.isnan(value) and not back(one).any()


@no_device
def test_an_ignored_row_counts_nowhere():
    check_ignored_rows()


def check_rows_of_equal_numbers() -> None:
    """Layer norm of a row of equal numbers is 0, and a large mean does not shift a row."""
    x = np.full((3, 37), 1000.1, np.float32)
    x[1] += np.linspace(-1, 1, 37, dtype=np.float32)
    w, b, g = np.ones(37, np.float32), np.zeros(37, np.float32), np.cos(x)
    y, back = layers.layer_norm(x, w, b, eps=1e-12)
    want, right = OPS["layer_norm"].definition(x, w, b, eps=1e-12)
    assert not y[[0, 2]].any()
    assert near(y, want, 1e-5)
    assert near(back(g, [True] * 3)[1], right[1](g).sum(0), 1e-5)
    assert near(back(g, [True] * 3)[0][1], right[0](g)[1], 1e-4)


@no_device
def test_layer_norm_of_equal_numbers_is_zero():
    check_rows_of_equal_numbers()


def check_scores_of_minus_infinity() -> None:
    """A query whose scores are all −∞ gives zeros."""
    q = np.ones((2, 1), np.float32)
    k = np.full((3, 1), -np.inf, np.float32)
    v = np.ones((3, 2), np.float32)
    assert not layers.attention(q, k, v)[0].any()
    assert not OPS["attention"].definition(q, k, v)[0].any()


@no_device
def test_scores_of_minus_infinity_have_no_weight():
    check_scores_of_minus_infinity()


def test_uniform_numbers_are_numpys_bit_for_bit():
    for n, key in ((1, 0), (7, 1), (8, 2**64 - 1), (1001, 2**100 + 12345)):
        raw = np.random.Philox(key=key).random_raw(n // 2 + 1).view(np.uint32)[:n]

        def draw(n: int = n, key: int = key) -> list:
            x = array.asarray(np.zeros(n, np.float32))
            return [array.asnumpy(layers.uniform_like(x, key))]

        got, = both_ways(draw)
        assert np.array_equal(got, (raw >> np.uint32(8)) * np.float32(2.0**-24))


@no_device
def test_only_the_gradients_that_are_needed_are_computed(rng):
    x, w = rng.standard_normal((5, 8)).astype(np.float32), np.ones(8, np.float32)
    for needed in ([True, False, False], [False, True, False], [False, False, True], [True] * 3):
        assert [d is not None for d in layers.layer_norm(x, w, w)[1](x, needed)] == needed
    back, products = layers.attention(x, x, x)[1], gemm.LIBRARIES[np.ndarray]
    for needed, count in (([True] * 3, 4), ([False, False, True], 1), ([True, False, False], 2)):
        before = products.calls
        assert [d is not None for d in back(x, needed)] == needed
        assert products.calls - before == count


@no_device
def test_a_pullback_holds_nothing_but_what_it_needs(rng):
    """The way back through a frozen matrix needs no input: LoRA's memory."""
    x, W = rng.standard_normal((4, 6)).astype(np.float32), np.ones((5, 6), np.float32)
    for name, i, held in (("linear", 0, False), ("linear", 1, True), ("linear", 2, False), ("matmul", 0, False),
                          ("matmul", 1, True)):
        mine = x.copy()
        seen = weakref.ref(mine)
        back = getattr(layers, name)(mine, W if name == "linear" else W.T.copy())[1][i]
        del mine
        assert (seen() is not None) == held and back(np.ones((4, 5), np.float32)).size


# ── the optimiser, and packed weights ────────────────────────────────────────────────────────────────────────────────
def check_adam(rng: np.random.Generator, n: int = 1000) -> None:
    """Three steps as the definition takes them."""
    start = [rng.standard_normal(n).astype(np.float32) for _ in range(3)] + [rng.random(n).astype(np.float32)]
    for decay in (0.0, 0.1):
        def run(decay: float = decay) -> list:
            w, g, m, v = (a.copy() for a in start)
            for t in (1, 2, 3):
                optimizer.adam_update(w, g, m, v, 0.01 * t, 0.9, 0.99, 1e-8, decay, t)
            return [w, g, m, v]
        want = [a.astype(np.float64) for a in start]
        for t in (1, 2, 3):
            optim.optimizers.adam_update(*want, 0.01 * t, 0.9, 0.99, 1e-8, decay, t)
        assert all(near(a, b, 1e-6) for a, b in zip(both_ways(run), want))


@no_device
def test_adam_is_its_definition(rng):
    for n in (1, 255, 1000, 5000):
        check_adam(rng, n)
    w, g, m, v = (rng.standard_normal(6) for _ in range(4))
    v, expected = abs(v), [a.copy() for a in (w, g, m, abs(v))]
    # float64: declined, nothing written
    assert optimizer.adam_update(w, g, m, v, 0.1, 0.9, 0.99, 1e-8, 0.0, 1) is NotImplemented
    assert all(map(np.array_equal, (w, g, m, v), expected))


def check_packed(rng: np.random.Generator, name: str, out: int = 12, dtype: Any = np.float32) -> None:
    """Few rows, many rows in tiles of five rows of W, and the gradient of x, against the dense weight in float64."""
    weight, W = FORMS[name](rng, out)
    weight.to(dtype=np.dtype(dtype))
    width = W.shape[1]
    tol = 3e-6 if dtype == np.float32 else 2e-2
    with pytest.MonkeyPatch.context() as m:
        m.setattr(type(weight), "rows_per_block", 5)
        for shape in ((1, width), (2, 1, width), (packed.FEW + 1, width)):
            x = rng.standard_normal(shape).astype(dtype)
            g = rng.standard_normal((*shape[:-1], out)).astype(dtype)

            def product(x: Any = x, g: Any = g) -> list:
                y, (back,) = packed.packed_linear(x, weight)
                return [y, back(g)]
            y, dx = both_ways(product)
            assert y.dtype == dx.dtype == dtype
            assert near(y, x.astype(np.float64) @ W.T, tol)
            assert near(dx, g.astype(np.float64) @ W, tol)


@no_device
@pytest.mark.parametrize("name", FORMS)
def test_products_with_a_packed_weight_are_those_of_its_dense_one(name, rng):
    check_packed(rng, name)


@no_device
@pytest.mark.parametrize("name, out, dtype", [
    ("affine, 3 bits", 7, np.float32), ("affine, 4 bits", 133, bfloat16), ("nf4, doubly", 132, np.float16),
    ("Q4_1", 1, bfloat16),
])
def test_products_with_packed_weights_of_other_sizes_and_dtypes(name, out, dtype, rng):
    check_packed(rng, name, out, dtype)


@no_device
def test_a_long_row_is_shared_by_warps_and_blocks(rng, monkeypatch):
    """And by how many does not change the sums by more than rounding."""
    weight, W = packed_weights.uniform(rng, 8, 4, 2000, 128)
    x = rng.standard_normal((2, 2000)).astype(np.float32)
    results = []
    for blocks in (1, 6, 1024):
        monkeypatch.setattr(packed, "FILL", blocks)
        results.append(both_ways(lambda: [packed.packed_linear(x, weight)[0]])[0])
        assert near(results[-1], x.astype(np.float64) @ W.T, 3e-6)
    assert not np.array_equal(results[0], results[2]), "the sums are in another order"


@no_device
def test_packed_products_that_the_kernels_decline(rng):
    weight, W = FORMS["affine, 4 bits"](rng, 4)
    x = rng.standard_normal((2, W.shape[1]))
    for other in (x, x[:, :-1].astype(np.float32), x[:0].astype(np.float32)):
        assert packed.packed_linear(other, weight) is NotImplemented
    weight.to(dtype="bfloat16")
    assert packed.packed_linear(x.astype(np.float32), weight) is NotImplemented, "dense rows are rounded to bfloat16"


@no_device
def test_the_sum_of_an_embedding_has_the_same_bits_in_any_order_of_blocks(rng):
    ids = rng.integers(0, 3, 500)
    g = rng.standard_normal((500, 4)).astype(np.float32)
    d = layers.embedding(np.zeros((3, 4), np.float32), ids)[1][0](g)
    in_order = np.zeros((3, 4), np.float32)
    for i, row in zip(ids, g):
        in_order[i] += row
    assert np.array_equal(d, in_order)


# ── planted faults ───────────────────────────────────────────────────────────────────────────────────────────────────
def several(name: str, shapes: list = SHAPES, times: int = 6) -> Callable:
    if name == "project":
        return lambda rng: [by_heads(2, 11, 3, 40, 5, lie, np.float32, rng) for lie in ("together", "apart")]
    often = times if name in ("attention", "cross_entropy") else 1
    return lambda rng: [agree(name, shape, np.float32, rng) for shape in shapes for _ in range(often)]


def packed_form(name: str) -> Callable:
    return lambda rng: check_packed(rng, name)


FAULTS = [  # what, file, right, wrong, who must notice
    ("missing barrier before columns meet", "layer_norm.cu", "  __syncthreads();\n", "", several("layer_norm")),
    ("a number's column goes on from its number", "bias.cu", "column += on;", "column += threads;", several("linear")),
    ("the row's end is passed over", "bias.cu", "if (column >= n) column -= n;", "", several("linear")),
    ("heads of the text before", "heads.cu", "b = blockIdx.x / H % B", "b = blockIdx.x / H % B / 2",
     several("project")),
    ("a head's bias is the first one's", "heads.cu", ": bv) + h * D", ": bv)", several("project")),
    ("only the first 32 of a head", "heads.cu", "d < D; d += 32) head", "d < 32; d += 32) head", several("project")),
    ("parts apart by rows", "heads.cu", "part * by_part", "part * by_row", several("project")),
    ("gradients of q, k and v one after another", "heads.cu", "* 3 + part) * H + h) * D",
     "+ part * B * time) * H + h) * D", several("project")),
    ("missing barrier before rows meet", "bias.cu", "  __syncthreads();\n", "", several("linear")),
    ("a second sum begins before the first is read", "rows.cuh",
     "  __syncthreads();                                       // other", "  // other",
     several("cross_entropy", [(2, 300)])),
    ("read before the warps have written", "rows.cuh",
     "part[threadIdx.x >> 5] = v;\n  __syncthreads();\n  float sum", "part[threadIdx.x >> 5] = v;\n  float sum",
     several("cross_entropy", [(2, 300)])),
    ("threads return before a barrier", "cross_entropy.cu",
     "  float log_sum", "  if (threadIdx.x >= n) return;\n  float log_sum", several("cross_entropy")),
    ("barrier in a branch", "cross_entropy.cu", "if (smoothing) all", "if (threadIdx.x < n) all",
     several("cross_entropy")),
    ("shuffle in divergent lanes", "layer_norm.cu",
     "float mu = warp_sum(sum) / n", "float mu = lane < n ? warp_sum(sum) / n : 0", several("layer_norm")),
    ("missing tail of rows", "layer_norm.cu", "if (row >= rows) return;                               // a", "// a",
     several("layer_norm")),
    ("missing tail of columns", "bias.cu", "if (k > 0 || column >= n) return", "if (k > 0) return", several("linear")),
    ("one number too many", "gelu.cu", "blockDim.x + threadIdx.x; i < n;", "blockDim.x + threadIdx.x; i <= n;",
     several("gelu")),
    ("wrong stride of the grid", "gelu.cu", "i += gridDim.x * (long long)blockDim.x",
     "i += gridDim.x * 2ll * blockDim.x", several("gelu")),
    ("x scaled twice", "gelu.cu", "a * 0.39894228f", "0.39894228f", several("gelu")),
    ("factor of the cubic", "gelu.cu", "0.134145f", "0.044715f", several("gelu_tanh")),
    ("variance about zero", "layer_norm.cu", "float c = (float)xs[i] - first - mu", "float c = (float)xs[i]",
     several("layer_norm")),
    ("the mean of large numbers", "layer_norm.cu", "first = (float)xs[0], sum", "first = 0, sum",
     lambda rng: check_rows_of_equal_numbers()),
    ("the first entry forgotten for dw", "layer_norm.cu", "- (float)x[(size_t)row * n] - mean[row]", "- mean[row]",
     several("layer_norm")),
    ("gradient without its mean", "layer_norm.cu", "- shift - xhat", "- xhat", several("layer_norm")),
    ("only the first stretch is summed", "bias.cu", "s < stretches", "s < 1", several("linear")),
    ("wrong stride of a stretch", "layer_norm.cu", "parts[((size_t)k * gridDim.y", "parts[((size_t)k * gridDim.x",
     several("layer_norm")),
    ("= for += in the scatter", "embedding.cu", "sum[k] += ", "sum[k] = ", several("embedding")),
    ("every position writes its row", "embedding.cu", "start + lane < i && ids", "start + lane < 0 && ids",
     several("embedding")),
    ("a race: all add where they meet", "embedding.cu", "int id = ids[i];", "int id = ids[i];\n"
     "  for (int c = first; c < min(width, first + 1); c += 32)\n"
     "    d[(size_t)id * width + c] += g[(size_t)i * width + c];\n"
     "  return;",
     several("embedding")),
    ("width of the scatter", "embedding.cu", "if (first + 32 * k < width) d[", "d[", several("embedding")),
    ("the present is the future", "attention.cu", "i + n - t + 1", "i + n - t", several("attention")),
    ("without the keys that came before", "attention.cu", "i + n - t + 1", "i + 1", several("attention")),
    ("stride of the mask", "attention.cu", "may[j * mask_key]", "may[j]", several("attention")),
    ("mask of another row", "attention.cu", "row % t * by.query", "row * by.query", several("attention")),
    ("mask of another head", "attention.cu", "row / t % heads * by.head", "row / t * by.head",
     several("attention", [(2, 2, 5, 37)], 12)),
    ("a row that sees nothing", "attention.cu", "sum == 0 ? 0 : 1 / sum", "1 / sum",
     lambda rng: check_scores_of_minus_infinity()),
    ("minus infinity less itself", "attention.cu", "if (top == NEVER) top = 0;", "",
     lambda rng: check_scores_of_minus_infinity()),
    ("dropout forgotten on the way back", "attention.cu",
     "dp[j] * (dropout_mask ? (float)dropout_mask[j] : 1) - along", "dp[j] - along", several("attention")),
    ("scale forgotten on the way back", "attention.cu", "(T)(alpha * d)", "(T)d", several("attention")),
    ("stride of the bias", "attention.cu", "add[j * bias_key]", "add[j]", several("attention")),
    ("bias before the scale", "attention.cu", "alpha * s[j] + (add ? (float)add[j * bias_key] : 0.0f)",
     "alpha * (s[j] + (add ? (float)add[j * bias_key] : 0.0f))", several("attention")),
    ("bias forgotten in the sum", "attention.cu", "sum += expf(score(j) - top)", "sum += expf(alpha * s[j] - top)",
     several("attention")),
    ("bias's gradient with the scale", "attention.cu", "db[j] = d", "db[j] = alpha * d", several("attention")),
    ("what is ignored counts", "cross_entropy.cu", "if (y != ignored)", "if (true)", several("cross_entropy")),
    ("mean without weights", "cross_entropy.cu", "w = there ? (weight ? weight[y] : 1)", "w = there ? (1)",
     several("cross_entropy")),
    ("smoothing over n − 1", "cross_entropy.cu", "+ smoothing / n", "+ smoothing / (n - 1)", several("cross_entropy")),
    ("what is ignored reaches the gradient", "cross_entropy.cu", "w == 0 ? 0.0f : scale", "scale",
     lambda rng: check_ignored_rows()),
    ("nibble order", "packed.cu", "in_byte = BITS * j % 8;", "in_byte = (8 - BITS) - BITS * j % 8;",
     packed_form("affine, 4 bits")),
    ("a code's high bits forgotten", "packed.cu", "return (low | high << 8) >> in_byte & CODE;",
     "return low >> in_byte & CODE;", packed_form("affine, 3 bits")),
    ("a code keeps its neighbour's bits", "packed.cu", ">> in_byte & CODE;\n}\n\n__device__ unsigned stream",
     ">> in_byte & 255;\n}\n\n__device__ unsigned stream", packed_form("affine, 3 bits")),
    ("a shift that copies the sign", "packed.cu", "unsigned low = some.byte[at] >> 8 * lane & 255, high",
     "unsigned low = (signed char)(some.byte[at] >> 8 * lane), high", packed_form("affine, 3 bits")),
    ("the column beside", "packed.cu", "some.byte[at + 1] >> 8 * lane", "some.byte[at + 1] >> 8 * (lane ^ 1)",
     packed_form("affine, 3 bits")),
    ("zero point forgotten", "packed.cu", "(dot[l] - z * plain)", "dot[l]", packed_form("affine, 4 bits")),
    ("zero point of the group before", "packed.cu", "zero_point(zero_codes, zero, b, column + l, out)",
     "zero_point(zero_codes, zero, b ? b - 1 : 0, column + l, out)", packed_form("affine, 4 bits")),
    ("the code of a zero point cut off", "packed.cu", "if (in_byte + BITS > 8) both", "if (0) both",
     packed_form("affine, 3 bits, groups of 7")),
    ("shift forgotten", "packed.cu", "+ m * plain", "", packed_form("Q4_1")),
    ("Σ x goes on in the next group", "packed.cu", "        plain = 0;\n", "",
     packed_form("affine, 4 bits, groups of 8")),
    ("the last group's scale", "packed.cu", "int b = min(k, K - 1) / group;", "int b = (K - 1) / group;",
     packed_form("affine, 4 bits")),
    ("groups begin at a byte", "packed.cu", "next = 8 * first / group * group + group;", "next = 8 * first + group;",
     packed_form("affine, 4 bits, groups of 7")),
    ("the last octet is not added", "packed.cu", "k + 1 == next || (j == 7 && at + 1 == last)", "k + 1 == next",
     packed_form("affine, 4 bits")),
    ("past the end of a row", "packed.cu", "      if (k < K) {\n", "      {\n", packed_form("nf4, short group")),
    ("table not read", "packed.cu", "return table ? table[q] : whole(q);", "return whole(q);", packed_form("nf4")),
    ("missing barrier after the table", "packed.cu",
     "levels[q] = table[q];\n  __syncthreads();\n", "levels[q] = table[q];\n", packed_form("dynamic")),
    ("missing barrier before the sum", "packed.cu", "= total[l];\n  __syncthreads();\n", "= total[l];\n",
     packed_form("affine, 4 bits")),
    ("columns past the last are written", "packed.cu", "if (c < out) y", "y", packed_form("affine, 4 bits")),
    ("the first part alone", "packed.cu", "p < count", "p < 1", packed_form("affine, 4 bits, long")),
    ("dense: order not gathered", "packed.cu", "int input = order ? order[k] : k;", "int input = k;",
     packed_form("moved, 4 bits")),
    ("dense: input scale of the code's place", "packed.cu", "w / input_scale[input]", "w / input_scale[k]",
     packed_form("moved, 4 bits")),
    ("dense: held through groups", "packed.cu", "if (k / group != held)", "if (held < 0)",
     packed_form("affine, 4 bits, groups of 7")),
    ("dense: the first rows in every tile", "packed.cu", "column = first + i % n", "column = i % n",
     packed_form("affine, 4 bits")),
    ("dense: zero point forgotten", "packed.cu", "(level(q, table) - z) + m", "level(q, table) + m",
     packed_form("symmetric, 4 bits")),
    ("nine rounds", "random.cu", "round < 10", "round < 9", several("dropout")),
    ("counted after drawing", "random.cu", "philox(i + 1,", "philox(i,", several("dropout")),
    ("halves of a word swapped", "random.cu", "j % 2 * 32", "(1 - j % 2) * 32", several("dropout")),
    ("the key's upper half", "random.cu", "c[3] ^ key_high", "c[3]", several("dropout")),
    ("kept where it was dropped", "random.cu", ">= p &&", "< p &&", several("dropout")),
    ("eight at a time, past the end too", "rows.cuh", "there >= 8", "there > 0", several("dropout")),
    ("what is left of eight is left out", "rows.cuh", "else for", "else if (there < 0) for", several("dropout")),
    ("decay forgotten", "adam.cu", "shrink * w[i]", "w[i]", check_adam),
    ("g for g²", "adam.cu", "c2 * d * d", "c2 * d", check_adam),
    ("root inside out", "adam.cu", "root * sqrtf(q)", "sqrtf(root * q)", check_adam)]


@no_device
@pytest.mark.parametrize("what, file, right, wrong, notices", FAULTS, ids=[f[0] for f in FAULTS])
def test_a_planted_fault_is_caught(what, file, right, wrong, notices, rng):
    changed = []

    def spoilt(source: str, name: str) -> CpuKernel:
        assert right in (launch.HERE / file).read_text(encoding="utf-8")
        changed.append(right in source)
        return CpuKernel(source.replace(right, wrong), name)
    launch.COMPILERS[np.ndarray] = spoilt
    with pytest.raises((AssertionError, KernelError)):
        notices(rng)
    assert any(changed), "the fault was not in what ran"


# ── products ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def heads(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 1, 3)


R = np.random.default_rng(1).standard_normal
PRODUCTS = {  # a, b, how many of them cuBLAS cannot read where they lie
    "plain": (R((5, 7)), R((7, 3)), 0), "three axes by two": (R((2, 5, 7)), R((7, 3)), 0),
            "two by three": (R((5, 7)), R((2, 7, 3)), 0),
    "batched": (R((2, 4, 5, 7)), R((2, 4, 7, 3)), 0),
            "b transposed": (R((2, 4, 5, 7)), R((2, 4, 3, 7)).swapaxes(-1, -2), 0),
    "a transposed": (R((2, 4, 7, 5)).swapaxes(-1, -2), R((2, 4, 7, 3)), 0), "both": (R((7, 5)).T, R((3, 7)).T, 0),
    "square, a transposed": (R((4, 4)).T, R((4, 4)), 0),
            "square, b transposed": (R((2, 4, 4)), R((2, 4, 4)).swapaxes(-1, -2), 0),
    "heads of one text": (heads(R((1, 5, 4, 7))), heads(R((1, 6, 4, 7))).swapaxes(-1, -2), 0),
    "heads of three": (heads(R((3, 5, 4, 7))), heads(R((3, 6, 4, 7))).swapaxes(-1, -2), 2),
    "columns": (R((5, 20))[:, 3:10], R((7, 9))[:, 2:5], 0), "every other column": (R((5, 14))[:, ::2], R((7, 3)), 1),
    "backwards": (R((5, 7))[::-1], R((7, 3)), 1),
    "rows 1": (R((1, 7)), R((7, 1)), 0), "inner 1": (R((5, 1)), R((1, 4)), 0), "one number": (R((1, 1)), R((1, 1)), 0),
    "a row of columns": (R((20, 1)).T, R((20, 3)), 0),
            "repeated": (np.broadcast_to(R((1, 5, 7)), (4, 5, 7)), R((4, 7, 3)), 0),
    "repeated rows": (np.broadcast_to(R((1, 7)), (5, 7)), R((7, 3)), 1),
            "one of a batch": (R((6, 5, 7))[2:3], R((1, 7, 3)), 0),
    "every other of a batch": (R((6, 5, 7))[::2], R((3, 7, 3)), 0), "nothing to sum": (R((5, 0)), R((0, 3)), 0),
            "no rows": (R((0, 5)), R((5, 3)), 0)}


def like(x: np.ndarray, dtype: Any) -> np.ndarray:
    """The same numbers as another dtype, with the same layout."""
    base = x
    while base.base is not None:
        base = base.base
    wide = base.astype(dtype)
    offset = (x.ctypes.data - base.ctypes.data) // base.itemsize * wide.itemsize
    return np.ndarray(x.shape, dtype, wide, offset, tuple(s // x.itemsize * wide.itemsize for s in x.strides))


def multiplies(case: str, dtype: Any) -> None:
    a, b, copies = PRODUCTS[case]
    a, b = like(a, dtype), like(b, dtype)
    tol = {"float32": 2e-6, "float64": 1e-13, "float16": 2e-3, "bfloat16": 1e-2}[np.dtype(dtype).name]
    y = gemm.matmul(a, b)
    want = a.astype(np.float64) @ b.astype(np.float64)
    assert y.dtype == dtype and y.flags.c_contiguous and near(y, want, tol)
    assert sum(gemm.readable(x) is not x for x in (a, b)) == copies or not (a.size and b.size)
    kind = [dtype] + [np.float32] * (np.dtype(dtype).itemsize == 2)
    for out in (np.ones(want.shape, k) for k in kind):
        assert gemm.matmul(a, b, out=out, add=True) is out or a.ndim > b.ndim
        assert near(out, 1 + want, tol)
        gemm.matmul(a, b, out=out)
        assert near(out, want, tol)
        # into some rows and columns of each matrix of a larger array
        *lead, rows, columns = want.shape
        around = np.ones((*lead, rows + 2, columns + 3), out.dtype)
        gemm.matmul(a, b, out=around[..., 1:-1, :columns])
        gemm.matmul(a, b, out=around[..., 1:-1, :columns], add=True)
        assert near(around[..., 1:-1, :columns], 2 * want, 2 * tol)
        around[..., 1:-1, :columns] = 1
        assert (around == 1).all()


@no_device
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, bfloat16],
                         ids=["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("case", PRODUCTS)
def test_cublas_is_given_arguments_that_mean_the_product(case, dtype):
    multiplies(case, dtype)


def swap(i: int, j: int) -> Callable:
    def change(given: list) -> None:
        given[i], given[j] = given[j], given[i]
    return change


def put(i: int, value: Any) -> Callable:
    """A function that sets argument i to the value, or to value(arguments)."""
    def change(given: list) -> None:
        given[i] = value(given) if callable(value) else value
    return change


WRONG_ARGUMENTS = {
    "a not transposed": put(1, 0),
    "b not transposed": put(0, 0),
    "always transposed": put(0, 1),
    "m and n": swap(2, 3),
    "n and k": swap(2, 4),
    "operands in order": swap(6, 10),
    "leading dimensions": swap(8, 12),
    "leading dimension is k": put(8, lambda g: g[4]),
    "one step for all": put(9, 0),
    "steps": swap(9, 13),
    "beta forgotten": put(14, 0.0),
    "beta always": put(14, 1.0),
    "alpha": put(5, 2.0),
    "leading dimension of the result": put(17, lambda g: g[3]),
    "step of the result": put(18, 0),
    "one product": put(19, 1),
    "compute as double": put(20, 70),
    "dtype": put(7, 1),
    "dtype of the result": put(16, lambda g: g[7]),
}


@no_device
@pytest.mark.parametrize("fault", WRONG_ARGUMENTS)
def test_a_wrong_argument_is_caught(fault):
    gemm.LIBRARIES[np.ndarray] = FakeCublas(WRONG_ARGUMENTS[fault])
    with np.errstate(all="ignore"), pytest.raises((AssertionError, ValueError)):
        for case in PRODUCTS:
            for dtype in (np.float32, np.float16):
                multiplies(case, dtype)


@no_device
def test_tf32_is_a_switch_that_touches_float32_alone(monkeypatch):
    seen = []
    gemm.LIBRARIES[np.ndarray] = FakeCublas(lambda given: seen.append(given[20]))
    monkeypatch.setattr(precision, "tf32", False)
    for on in (True, False):
        precision.set_float32_matmul_precision("high" if on else "highest")
        for dtype in (np.float32, np.float64, np.float16, bfloat16):
            gemm.matmul(np.ones((2, 2), dtype), np.ones((2, 2), dtype))
    assert seen == [77, 70, 68, 68, 68, 70, 68, 68]


@no_device
def test_products_that_do_not_fit_say_so():
    x = np.ones((2, 3), np.float32)
    for a, b, error in ((x, x, ValueError), (x, x.T.astype(np.float64), TypeError),
                        (x.astype(int), x.T.astype(int), TypeError),
                        (x[0], x.T, ValueError),
                        (np.ones((2, 2, 3), np.float32), np.ones((3, 3, 2), np.float32), ValueError)):
        with pytest.raises(error, match="matmul"):
            gemm.matmul(a, b)
    with pytest.raises(ValueError, match="out must be of shape"):
        gemm.matmul(x, x.T, out=np.ones((3, 2), np.float32))
    with pytest.raises(ValueError, match="each row contiguous"):
        gemm.matmul(x, x.T, out=np.ones((4, 4), np.float32)[::2, ::2])


# ── in the library ───────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def no_cupy() -> Iterator[None]:
    """Restore the registered kernels afterwards."""
    tables = (array._modules, array._names, array._when_opened, launch.COMPILERS, gemm.LIBRARIES)
    kept = [dict(t) for t in tables]
    with kernels.definitions():
        yield
        kernels.remove()
    for table, was in zip(tables, kept):
        table.clear()
        table.update(was)


@no_device
def test_kernels_are_put_in_place_when_the_backend_is_opened(no_cupy):
    class Array:
        pass
    cupy = SimpleNamespace(RawKernel=CpuKernel)
    kernels.install()
    assert not any(dispatch.find(OPS[n], Array) for n in layers.NAMES)
    array._register("cupy", Array, cupy)
    assert all(dispatch.find(OPS[n], Array) == [getattr(layers, n)] for n in layers.NAMES)
    assert dispatch.find(optim.optimizers.adam_update, Array) == [optimizer.adam_update]
    assert launch.COMPILERS[Array] is CpuKernel and array._open("cupy") is cupy
    kernels.remove()
    kernels.install()  # it is open already
    assert all(dispatch.find(OPS[n], Array) for n in layers.NAMES)


@no_device
def test_training_goes_the_same_way_on_the_cuda_kernels():
    with kernels.definitions():
        plain, plain_weights = lora_curve(4, 4)
        cuda.put_in_place(np.ndarray)
        losses, weights = lora_curve(4, 4)
        kernels.remove()
    assert np.allclose(losses, plain, rtol=2e-5)
    assert np.allclose(weights, plain_weights, rtol=1e-2, atol=1e-4)
    assert gemm.LIBRARIES[np.ndarray].calls > 50 and not np.array_equal(losses, plain), "the kernels were not used"

"""The fake GPU itself: CuPy on it computes what NumPy computes, counts what happens, and says what it cannot do."""
from __future__ import annotations

import ctypes
import importlib.metadata
from pathlib import Path

import cupy as cp
import emulate
import fake_gpu
import ml_dtypes
import numpy as np
import pytest
from cpu_module import CpuModule

from tinyft import array

X = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)


def dev(a):
    return cp.asarray(a)


def test_this_is_cupy_and_the_library_takes_it():
    assert cp.__version__ == fake_gpu.VERSION
    assert cp.is_available()
    assert cp.cuda.Device().compute_capability == "90"
    assert array.why_no_cupy() is None and array.backend() == "cupy"
    assert isinstance(array.asarray([1.0]), cp.ndarray)


@pytest.mark.parametrize("f", [
    lambda m, x: m.exp(x), lambda m, x: x + x[::-1] * 2, lambda m, x: x.sum(axis=0), lambda m, x: x.T.copy(), lambda m,
    x: m.where(x > 0, x, -1),
    lambda m, x: x.max(axis=-1, keepdims=True), lambda m, x: x.mean(), lambda m, x: m.argmax(x, axis=1), lambda m,
    x: m.cumsum(x, axis=1),
    lambda m, x: m.sort(x, axis=1), lambda m, x: m.argsort(x, axis=1), lambda m, x: m.concatenate([x, x[:2]]), lambda m,
    x: x.astype(np.float64) / 3,
    lambda m, x: m.tril(m.ones((4, 4), bool), 1), lambda m, x: x[m.arange(3), m.arange(3)], lambda m,
    x: (x > 0).any(axis=1),
    lambda m, x: x.var(axis=1), lambda m, x: m.take_along_axis(x, m.argsort(x, axis=1)[:, :2], axis=1)])
def test_it_computes_what_numpy_computes(f):
    got, want = cp.asnumpy(f(cp, dev(X))), f(np, X)
    assert got.dtype == want.dtype and np.allclose(got, want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype, tol",
                         [(np.float64, 1e-14), (np.float32, 1e-6), (np.float16, 2e-3), (ml_dtypes.bfloat16, 1e-2)])
@pytest.mark.parametrize("layout", ["a b", "at b", "a bt", "at bt"])
def test_products_in_every_dtype_and_layout(dtype, tol, layout, rng):
    a, b = (rng.standard_normal(s).astype(dtype) for s in ((3, 5), (5, 4)))
    left, right = (dev(np.ascontiguousarray(m.T)).T if "t" in w else dev(m) for m, w in zip((a, b), layout.split()))
    got, want = cp.asnumpy(left @ right).astype(float), a.astype(float) @ b.astype(float)
    assert np.abs(got - want).max() <= tol * np.abs(want).max()


def test_batched_products(rng):
    a, b = rng.standard_normal((2, 3, 4, 5)), rng.standard_normal((2, 3, 5, 2))
    for dtype in (np.float32, np.float64):
        x, y = a.astype(dtype), b.astype(dtype)
        assert np.allclose(cp.asnumpy(dev(x) @ dev(y)), x @ y, rtol=1e-5, atol=1e-6)
        assert np.allclose(cp.asnumpy(dev(x).swapaxes(-1, -2).copy().swapaxes(-1, -2) @ dev(y)), x @ y, rtol=1e-5,
                           atol=1e-6)
        assert np.allclose(cp.asnumpy(dev(x) @ dev(y[0, 0])), x @ y[0, 0], rtol=1e-5, atol=1e-6)
    # CuPy's own limit, and what the library must go round
    with pytest.raises(TypeError, match="not understood"):
        dev(a.astype(ml_dtypes.bfloat16)) @ dev(b.astype(ml_dtypes.bfloat16))


# what is done with a float32 array x on the device: launches, products, waits, h2d, d2h, d2d
COUNTED = {
    "x + 1": (lambda x: x + 1, (1, 0, 0, 0, 0, 0)),
    "x.sum()": (lambda x: x.sum(), (1, 0, 0, 0, 0, 0)),
    "float(x[0, 0])": (lambda x: float(x[0, 0]), (0, 0, 1, 0, 1, 0)),
    "asnumpy(x)": (lambda x: cp.asnumpy(x), (0, 0, 1, 0, 1, 0)),
    "asarray(host)": (lambda x: cp.asarray(X), (0, 0, 0, 1, 0, 0)),
    "x[host indices]": (lambda x: x[np.array([0, 1])], (1, 0, 0, 1, 0, 0)),
    "x @ x.T": (lambda x: x @ x.T, (0, 1, 0, 0, 0, 0)),
    "x.copy()": (lambda x: x.copy(), (1, 0, 0, 0, 0, 0)),
    "x[...] = 1": (lambda x: x.__setitem__(..., 1), (1, 0, 0, 0, 0, 0)),
    "copyto": (lambda x: cp.copyto(x, x.copy()), (1, 0, 0, 0, 0, 1)),
    "x[mask]": (lambda x: x[x > 0], (3, 0, 1, 0, 1, 0)),
    "where": (lambda x: cp.where(x > 0, x, 0.0), (2, 0, 0, 0, 0, 0)),
    "synchronize": (lambda x: cp.cuda.Device().synchronize(), (0, 0, 1, 0, 0, 0)),
}


@pytest.mark.parametrize("what", COUNTED)
def test_what_happens_is_counted(what):
    f, want = COUNTED[what]
    x = dev(X)
    f(x)
    fake_gpu.reset()
    f(x)
    assert tuple(fake_gpu.counts())[:6] == want, fake_gpu.counts()
    assert sum(fake_gpu.launched.values()) == want[0]


def test_bytes_are_counted():
    fake_gpu.reset()
    x = dev(X)
    assert fake_gpu.counts().h2d_bytes == X.nbytes and fake_gpu.counts().d2h_bytes == 0
    cp.asnumpy(x)
    assert fake_gpu.counts().d2h_bytes == X.nbytes


def test_memory_never_written_shows():
    old = cp.ones(1000, np.float32)
    del old  # its block goes back to the pool, ones and all
    assert bool(cp.isnan(cp.empty(1000, np.float32)).all()) and int(cp.empty(3, np.int32)[0]) == -1


SOURCE = r"""
extern "C" __global__ void sums(const float *x, float *y, int n) {              // each block sums 64 numbers
    __shared__ float part[64];
    int i = blockIdx.x * 64 + threadIdx.x;
    part[threadIdx.x] = i < n ? x[i] : 0.0f;
    for (int k = 32; k; k /= 2) {
        __syncthreads();
        if (threadIdx.x < k) part[threadIdx.x] += part[threadIdx.x + k];
    }
    if (threadIdx.x == 0) y[blockIdx.x] = part[0];
}
// blocks of 40: a warp, and a quarter of one
extern "C" __global__ void votes(const float *x, int *y) {
    int i = threadIdx.x;
    int n = __syncthreads_count(x[i] > 0), any = __syncthreads_or(x[i] > 38), all = __syncthreads_and(x[i] > 0);
    if (i < 36) {
        int b = __any_sync(~0u, x[i] == 33.0f), a = __all_sync(~0u, x[i] >= 0.0f);
        int c = __popc(__ballot_sync(~0u, x[i] > 3.0f));
        y[i] = n + 100 * any + 200 * all + 1000 * b + 2000 * a + 10000 * c;
    }
}
extern "C" __global__ void half_a_barrier(float *y) {
    if (threadIdx.x < 16) __syncthreads(); else __syncwarp();
    y[threadIdx.x] = 1;
}
"""


def test_a_hand_written_kernel_runs():
    f, x, y = cp.RawKernel(SOURCE, "sums"), cp.arange(100, dtype=np.float32), cp.empty(2, np.float32)
    f((2,), (64,), (x, y, np.int32(100)))
    assert cp.asnumpy(y).tolist() == [sum(range(64)), sum(range(64, 100))]
    votes = cp.empty(36, np.int32)
    cp.RawKernel(SOURCE, "votes")((1,), (40,), (cp.arange(40, dtype=np.float32), votes))
    assert set(cp.asnumpy(votes)[:32].tolist()) == {39 + 100 + 2000 + 280000}
    assert set(cp.asnumpy(votes)[32:].tolist()) == {39 + 100 + 3000 + 40000}
    template = cp.RawModule(code="template <class T> __global__ void twice(T *x) { x[threadIdx.x] *= 2; }",
                            name_expressions=["twice<float>"])
    template.get_function("twice<float>")((1,), (100,), (x,))
    assert cp.asnumpy(x).tolist() == [2.0 * i for i in range(100)]


def test_what_cannot_run_raises_where_it_was_launched():
    y = cp.empty(2048, np.float32)
    with pytest.raises(RuntimeError, match="half_a_barrier: deadlock"):
        cp.RawKernel(SOURCE, "half_a_barrier")((1,), (32,), (y,))
    with pytest.raises(RuntimeError, match="invalid launch: grid .1, 1, 1., block .2048"):
        cp.RawKernel(SOURCE, "sums")((1,), (2048,), (y, y, np.int32(1)))
    with pytest.raises(RuntimeError, match="invalid launch"):
        cp.RawKernel(SOURCE, "sums")((1, 70000), (32,), (y, y, np.int32(1)))
    with pytest.raises(cp.cuda.compiler.CompileException, match="identifier"):
        cp.RawKernel('extern "C" __global__ void f(float *x) { x[0] = y; }', "f")((1,), (1,), (y,))
    bad = CpuModule("void f(int *x) { x = y; }", {"f": "f"}, emulate.FOLDER)
    for _ in range(2):  # the second launch of a bad kernel says it as well
        with pytest.raises(RuntimeError, match="g\\+\\+ does not compile .*\n.*was not declared|not declared"):
            bad.load()


def test_no_random_numbers_of_cupys_own():
    with pytest.raises(Exception, match="libcurand"):
        cp.random.standard_normal(3)


def test_the_version_installed_is_the_one_refused_otherwise():
    wanted = (Path(fake_gpu.__file__).parent / "requirements.txt").read_text()
    assert f"{fake_gpu.PACKAGE}=={fake_gpu.VERSION}\n" in wanted


def test_another_cupy_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "14.1.0")
    with pytest.raises(fake_gpu.Unsupported, match="written for cupy-cuda13x 14.2.0; 14.1.0 is installed"):
        fake_gpu.check_version()

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(fake_gpu.Unsupported, match="not installed"):
        fake_gpu.check_version()
    with pytest.raises(RuntimeError, match="before cupy is imported"):
        monkeypatch.undo()
        fake_gpu.install(emulate.FOLDER)


@pytest.mark.parametrize("name, signature, says", [
    ("malloc", "intptr_t (size_t, int, int)", "changed malloc"), ("malloc", "intptr_t (int, int)", "changed malloc"),
    ("free", "int (intptr_t, int)", "changed free"),
    ("mallocQuickly", "intptr_t (size_t, int)", "has no mallocQuickly")])
def test_an_entry_point_of_another_type_is_refused(name, signature, says):
    from cupy_backends.cuda.api import driver, runtime
    kept = dict(runtime.__pyx_capi__)
    with pytest.raises(fake_gpu.Unsupported, match=says):
        fake_gpu.replace(runtime, driver, {name: signature})
    assert runtime.__pyx_capi__ == kept


def test_types_are_read_off_a_signature():
    signature = "PyObject *(intptr_t, unsigned int, int __pyx_skip_dispatch, struct a_b *__pyx_optional_args)"
    assert fake_gpu._types(signature) == ("PyObject *", ("intptr_t", "unsigned int", "int", "void *"))
    assert fake_gpu._types("PyObject *(void)") == ("PyObject *", ())
    assert fake_gpu._types("float (int s)") == ("float", ("int",))
    assert ctypes.sizeof(fake_gpu._Fake) == 8 * len(fake_gpu.FIELDS)


# ── capture ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_graph_does_again_what_was_noted_on_what_lies_there_then():
    stream, x, y = cp.cuda.Stream(non_blocking=True), cp.arange(6, dtype=np.float32), cp.zeros(6, np.float32)
    with stream:
        x * 2
        stream.begin_capture()
        y += x * 2
        other = cp.zeros(6, np.float32) + y
        graph = stream.end_capture()
    assert not cp.asnumpy(y).any(), "noted, not done"
    for n in (1, 2):
        fake_gpu.reset()
        graph.launch(stream)
        assert fake_gpu.counts().graphs == 1
        assert np.array_equal(cp.asnumpy(y), n * 2 * np.arange(6))
        assert np.array_equal(cp.asnumpy(other), cp.asnumpy(y))
    x[...] = 1
    graph.launch(stream)
    assert np.array_equal(cp.asnumpy(y), 4 * np.arange(6) + 2)


def test_a_wait_while_a_stream_is_captured_is_refused_and_spoils_it():
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        with pytest.raises(cp.cuda.runtime.CUDARuntimeError, match="cudaErrorStreamCaptureUnsupported"):
            stream.synchronize()
        with pytest.raises(cp.cuda.runtime.CUDARuntimeError, match="cudaErrorStreamCaptureInvalidated"):
            stream.end_capture()
        stream.synchronize()

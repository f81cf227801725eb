"""The CUDA kernels, without a GPU: NVRTC compiles them, and the same source, launched by the same lines, runs on the CPU and is its definition.

Products go to a stand-in of cuBLAS that is given the very arguments and reads memory column by column, as cuBLAS does.  What the
kernels fill is NaN before; shared memory and the surroundings of arrays are poisoned; every launch runs twice, with the threads in the
reverse order and another poison the second time, and must give the same bits.
"""
from __future__ import annotations

import ctypes
import math
import runpy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyft import GPT, AdamW, GPTConfig, LoRA, array, attach, fit, kernels, optim
from tinyft.array import bfloat16
from tinyft.kernels import cuda
from tinyft.kernels.cuda import gemm, int4, launch, layers
from tinyft.learn.cuda import CpuKernel, KernelError
from tinyft.tensor import OPS, sum_to

nvrtc = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "tools" / "nvrtc.py")))
no_compiler = not any(shutil.which(c) for c in ("g++", "c++", "clang++"))
pytestmark = [pytest.mark.skipif(array.backend() != "numpy", reason="these run on NumPy arrays, whatever the suite's backend"),
              pytest.mark.skipif(no_compiler, reason="no C++ compiler: install g++")]
FILES = sorted(p.name for p in launch.HERE.glob("*.cu"))
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), bfloat16]


# ── they compile for a device ────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.skipif(bool(nvrtc.missing()), reason=str(nvrtc.missing()))
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("file", FILES)
def test_every_kernel_compiles_for_a_device_and_keeps_its_numbers_in_registers(file, arch):
    for t, s in zip(DTYPES, (DTYPES[1], DTYPES[1], DTYPES[0])):
        binary, log = nvrtc.compile_cuda(launch.source(file, (("T", t), ("S", s))), arch)
        assert binary[:4] == b"\x7fELF" and "entry function" in log
        assert "0 bytes spill stores, 0 bytes spill loads" in log and all(
            line.split("frame, ")[1].startswith("0 bytes spill stores, 0") for line in log.splitlines() if "stack frame" in line)
    with pytest.raises(RuntimeError, match="error"):
        nvrtc.compile_cuda(launch.source(file, (("T", t), ("S", s))).replace("blockIdx", "blockIndex"), arch)


# ── the stand-ins ────────────────────────────────────────────────────────────────────────────────────────────────────
class FakeCublas:
    "cublasGemmStridedBatchedEx on host memory.  `change` may spoil the arguments; reading or writing outside an array is an error."

    def __init__(self, change: Callable[[list], Any] | None = None):
        self.change, self.calls = change, 0

    def gemm(self, a: np.ndarray, la: Any, b: np.ndarray, lb: Any, out: np.ndarray, add: bool) -> None:
        given = list(gemm.arguments(a, la, b, lb, out, add, lambda x: x.ctypes.data, lambda double, x: float(x)))
        assert [type(x) for x in given] == [int] * 5 + [float] + [int] * 8 + [float] + [int] * 7
        if self.change:
            self.change(given)
        self.calls += 1
        self.run((a, b, out), *given)

    def run(self, known: tuple, transa: int, transb: int, m: int, n: int, k: int, alpha: float, A: int, ta: int, lda: int, sa: int, B: int, tb: int,
            ldb: int, sb: int, beta: float, C: int, tc: int, ldc: int, sc: int, count: int, compute: int, algorithm: int) -> None:
        double = ta == gemm.TYPES[np.dtype(np.float64)]
        assert ta == tb and (tc == ta or tc == 0) and compute in ((70,) if double else (68, 77)) and algorithm == -1
        wide = np.float64 if double else np.float32
        for i in range(count):
            x = column_major(known, A, ta, i * sa, (k, m) if transa else (m, k), lda).astype(wide)
            y = column_major(known, B, tb, i * sb, (n, k) if transb else (k, n), ldb).astype(wide)
            z = column_major(known, C, tc, i * sc, (m, n), ldc)
            product = alpha * (x.T if transa else x) @ (y.T if transb else y)
            z[...] = (product + beta * z if beta else product).astype(z.dtype)


def column_major(known: tuple, address: int, kind: int, offset: int, shape: tuple, leading: int) -> np.ndarray:
    "The matrix that lies there, column after column `leading` numbers apart."
    dtype = next(d for d, number in gemm.TYPES.items() if number == kind)
    (rows, columns), size = shape, dtype.itemsize
    if leading < max(rows, 1):
        raise ValueError("cuBLAS status 7: a leading dimension below the number of rows")
    first, extent = address + offset * size, (leading * (columns - 1) + rows) * size
    spans = [np.lib.array_utils.byte_bounds(a) for a in known]
    assert any(low <= first and first + extent <= high for low, high in spans), "cuBLAS reads outside its operands"
    memory = np.frombuffer((ctypes.c_char * extent).from_address(first), dtype)
    return np.lib.stride_tricks.as_strided(memory, shape, (size, leading * size))


class Poisoned:
    "NumPy, whose empty arrays are full of NaN."
    @staticmethod
    def empty(shape: tuple, dtype: Any) -> np.ndarray:
        return np.full(shape, np.nan, dtype)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    "NumPy arrays in the place of CuPy's."
    monkeypatch.setattr(launch, "xp", lambda like: Poisoned)
    monkeypatch.setitem(gemm.LIBRARIES, np.ndarray, FakeCublas())
    monkeypatch.setitem(launch.COMPILERS, np.ndarray, CpuKernel)
    launch._kernel.cache_clear()
    yield
    launch._kernel.cache_clear()


def both_ways(run: Callable[[], list]) -> list:
    "What `run` gives with the threads in order; the same bits in the reverse order, among another poison."
    with pytest.MonkeyPatch.context() as m:
        m.setenv("EMU_REVERSE", "0")
        first = run()
        m.setenv("EMU_REVERSE", "1")
        m.setenv("EMU_POISON", "127")
        again = run()
    assert all(a is b is None or a.tobytes() == b.tobytes() for a, b in zip(first, again)), "the result depends on the order of the threads, or on poison"
    return first


# ── a kernel is its definition ───────────────────────────────────────────────────────────────────────────────────────
def inputs(name: str, shape: tuple, dtype: Any, rng: np.random.Generator) -> tuple[list, dict]:
    "Arrays of the right kinds for an op, x of this shape."
    make = lambda *s: (rng.standard_normal(s) * 2).astype(dtype)
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
        labels = rng.integers(-n, n, shape[:-1])
        kw = [{}, {"ignore_index": 1}, {"label_smoothing": 0.1, "ignore_index": 0}, {"weight": abs(make(n))}][rng.integers(4)]
        return [make(*shape), labels.astype(rng.choice([np.int32, np.int64]))], kw
    if name == "attention":
        t, keys = shape[-2], n
        wide = (*shape[:-2], t, keys)
        masks = [None, rng.random(wide) < 0.6, rng.random((*(1,) * (len(shape) - 2), 1, keys)) < 0.5, np.zeros((t, 1), bool), rng.random(keys) < 0.5]
        keep = (rng.random(wide) < 0.7).astype(dtype) / dtype.type(0.7) if rng.random() < 0.5 else None
        kw = {"seen": masks[rng.integers(5)], "causal": bool(rng.random() < 0.5), "scale": [None, 0.3][rng.integers(2)], "keep": keep}
        return [make(*shape[:-2], t, 6), make(*shape[:-2], keys, 6), make(*shape[:-2], keys, 4)], kw
    return [make(*shape)], {}


def wide(a: Any) -> Any:
    "16-bit numbers as float32: what the definition computes with, since a kernel rounds only at its ends."
    return a.astype(np.float32) if isinstance(a, np.ndarray) and a.dtype in DTYPES else a


def near(a: np.ndarray, b: np.ndarray, tol: float) -> bool:
    a, bound = a.astype(np.float64), tol * max(np.abs(b).max(initial=0), 1)
    return a.shape == b.shape and bool((np.abs(a - b) <= bound).all() if np.isfinite(b).all() else np.array_equal(np.isnan(a), np.isnan(b)))


def agree(name: str, shape: tuple, dtype: Any, rng: np.random.Generator, kernel: Callable | None = None) -> None:
    "Value and every pullback, both ways; no input is written to."
    arrays, kw = inputs(name, shape, np.dtype(dtype), rng)
    tol = {"float32": 5e-6, "float16": 3e-3, "bfloat16": 2e-2, "float64": 1e-12}[np.dtype(dtype).name]
    kept = [a.copy() for a in arrays]
    with np.errstate(all="ignore"):
        want, defined = OPS[name].definition(*map(wide, arrays), **{k: wide(v) for k, v in kw.items()})
    want = np.asarray(want)
    g = np.asarray(rng.standard_normal(want.shape)).astype(dtype)
    layouts = [g] + ([np.broadcast_to(g[..., :1], g.shape), np.asfortranarray(g)] if g.ndim else [])              # any g that backward may hand over

    def run() -> list:
        y, pulls = (kernel or getattr(layers, name))(*arrays, **kw)
        out = [np.asarray(y)]
        for h in layouts:
            out += pulls(h, [True] * len(arrays)) if callable(pulls) else [back and back(h) for back, _ in zip(pulls, arrays)]
        return out
    with np.errstate(all="ignore"):
        y, *got = both_ways(run)
        assert y.dtype == dtype and near(y, want, tol), "value"
        rows = max(1, math.prod(shape[:-1]))
        for h in layouts:
            right = defined(wide(h), [True] * len(arrays)) if callable(defined) else [back and back(wide(h)) for back, _ in zip(defined, arrays)]
            for a, r in zip(arrays, right):
                d = got.pop(0)
                assert (d is None) == (r is None)
                if r is not None:
                    assert d.dtype == dtype and near(sum_to(d, a.shape), sum_to(r, a.shape), tol * rows**0.5), "pullback"
    assert all(np.array_equal(a, b) for a, b in zip(arrays, kept)), "an input was written to"


SHAPES = [(1, 1), (3, 5), (2, 3, 33), (9, 64), (70, 40), (1, 300), (2, 2, 5, 37), (130, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", layers.NAMES)
def test_a_kernel_is_its_definition(name, shape, rng):
    for _ in range(4 if name in ("attention", "cross_entropy") else 1):          # these have more to choose from
        agree(name, shape, np.float32, rng)


@pytest.mark.parametrize("dtype", [np.float16, bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", layers.NAMES)
def test_a_kernel_is_its_definition_in_sixteen_bits(name, dtype, rng):
    for shape in SHAPES[:4]:
        agree(name, shape, dtype, rng)


@given(st.sampled_from(layers.NAMES), st.lists(st.integers(1, 40), min_size=2, max_size=3), st.integers(0, 2**32 - 1))
def test_a_kernel_is_its_definition_for_any_shape(name, shape, seed):
    agree(name, tuple(shape), np.float32, np.random.default_rng(seed))

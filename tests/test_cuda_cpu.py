"""CUDA C on the CPU does what a GPU does, and what a GPU passes over in silence it reports."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyft
from tinyft import array
from tinyft.array import bfloat16
from tinyft.kernels.cuda import cpu_kernel
from tinyft.kernels.cuda.cpu_kernel import CpuKernel, KernelError

pytestmark = [pytest.mark.skipif(array.backend() != "numpy", reason="CpuKernel works on NumPy arrays"),
              pytest.mark.skipif(not any(shutil.which(c) for c in ("g++", "c++", "clang++")),
                                 reason="no C++ compiler: install g++")]
F, I = np.float32, np.int32


def run(body: str, *args: Any, grid: tuple = (1,), block: tuple = (64,), parameters: str = "float* x, float* y",
        before: str = "",
        options: tuple = (), shared_mem: int = 0) -> None:
    """One kernel of these parameters with this body."""
    CpuKernel(f'{before}\nextern "C" __global__ void k({parameters}) {{\n{body}\n}}', "k",
              options)(grid, block, args, shared_mem=shared_mem)


TOTAL = """__shared__ float part[32];
float s = 0;
for (int i = threadIdx.x; i < n; i += blockDim.x) s += x[i];
for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(0xffffffffu, s, o);
if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
__syncthreads();
if (threadIdx.x == 0) {
  float sum = 0;
  for (int w = 0; w < blockDim.x / 32; w++) sum += part[w];
  y[blockIdx.x] = sum;
}"""


def total(body: str = TOTAL, n: int = 1000, options: tuple = (), grid: int = 3) -> np.ndarray:
    y = np.full(grid, np.nan, F)
    run(body, np.arange(1000, dtype=F), y, I(n), grid=(grid,), block=(256,),
        parameters="const float* x, float* y, int n", options=options)
    return y


@pytest.mark.parametrize("options", [(), ("-DEMU_THREADS",)], ids=["fibres", "threads"])
@pytest.mark.parametrize("reverse", ["0", "1"])
def test_a_block_adds_up_its_numbers(options, reverse, monkeypatch):
    monkeypatch.setenv("EMU_REVERSE", reverse)
    assert (total(options=options) == 499500).all()
    with pytest.raises(KernelError, match="deadlock"):
        total(TOTAL.replace("__syncthreads();", "if (threadIdx.x < 40) __syncthreads();"), options=options)
    assert (total(options=options) == 499500).all()  # nothing is left of what went wrong


@pytest.mark.parametrize("compiler", ["g++", "clang++", "c++"])
def test_any_compiler_will_do(compiler, monkeypatch, tmp_path):
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler} here")
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_kernel._library.cache_clear()
    assert (total() == 499500).all() and len(list(tmp_path.rglob("*.so"))) == 1


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    cpu_kernel._library.cache_clear()
    with pytest.raises(KernelError, match=r"no C\+\+ compiler found.*apt install g\+\+"):
        total()


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cpu_kernel._library.cache_clear()
    assert (total() == 499500).all()


def test_a_full_or_read_only_cache_is_done_without(monkeypatch, cache):
    def full(files):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(cpu_kernel, "write_atomically", full)
    for _ in range(2):
        assert doubled() == 2
    assert not list(cache.rglob("*.so*"))


def test_a_user_without_a_home_and_a_relative_cache(monkeypatch, tmp_path):
    """XDG_CACHE_HOME counts only if it is absolute; Path.home raises where there is no home."""
    def no_home():
        raise RuntimeError("Could not determine home directory.")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", no_home)
    assert cpu_kernel._cache() is None
    cpu_kernel._library.cache_clear()
    assert doubled() == 2
    assert not list(tmp_path.iterdir())


DOUBLE = 'extern "C" __global__ void k(float* x) { x[threadIdx.x] *= 2; }'


def doubled() -> float:
    """1, doubled by a kernel that is loaded anew."""
    cpu_kernel._library.cache_clear()
    x = np.ones(1, F)
    CpuKernel(DOUBLE, "k")((1,), (1,), (x,))
    return x[0]


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def damaged(content: bytes) -> dict[str, bytes]:
    middle = len(content) // 2
    return {"empty": b"", "cut off": content[:middle], "without its last byte": content[:-1],
            "zeros from the middle on": content[:middle] + bytes(len(content) - middle),
            "one bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:],
            "something else": b"#!/bin/sh\n", "twice": content * 2}


def test_a_damaged_library_in_the_cache_is_built_again(cache):
    """The file name holds a checksum of the content, so that a damaged library is never loaded: it could crash."""
    assert doubled() == 2
    kept, = cache.rglob("*.so")
    content = kept.read_bytes()
    for name, bad in damaged(content).items():
        kept.unlink()
        kept.write_bytes(bad)
        assert doubled() == 2, name
        kept, = cache.rglob("*.so")
        assert kept.read_bytes() == content, name
    assert [path.name for path in kept.parent.iterdir()] == [kept.name], "nothing is left over"


def test_an_intact_library_is_not_built_again(cache, monkeypatch):
    assert doubled() == 2
    monkeypatch.setattr(cpu_kernel, "_compile", lambda *args: pytest.fail("compiled again"))
    assert doubled() == 2


def test_a_library_that_the_system_does_not_load_is_one_sentence(cache, monkeypatch):
    def refuse(path):
        raise OSError("failed to map segment from shared object")
    monkeypatch.setattr(cpu_kernel.ctypes, "CDLL", refuse)
    with pytest.raises(KernelError, match="^the system does not load the compiled kernel: failed to map segment"):
        doubled()


def test_a_folder_from_which_no_code_may_run_is_avoided(cache, monkeypatch):
    """Of the temporary folder and the cache, either may be mounted noexec."""
    load = cpu_kernel.ctypes.CDLL
    for forbidden in ("kernel.so", "-"):
        def guarded(path, forbidden=forbidden):
            if forbidden in Path(path).name:
                raise OSError("failed to map segment from shared object")
            return load(path)
        monkeypatch.setattr(cpu_kernel.ctypes, "CDLL", guarded)
        assert doubled() == 2


@pytest.mark.parametrize("script, said", [
    ("garbage", r"^the C\+\+ compiler .* cannot be run: Exec format error"),
    ("#!/bin/sh\nexit 0\n", "wants to write a shared library, and wrote none"),
    ("#!/bin/sh\necho broken >&2\nexit 1\n", "does not take this kernel:\nbroken")])
def test_a_broken_compiler_is_one_sentence(cache, monkeypatch, script, said):
    broken = cache / "cxx"
    broken.write_text(script)
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(KernelError, match=said):
        doubled()


def test_processes_that_compile_at_once_share_one_library(cache):
    code = f"""
import numpy as np
from tinyft.kernels.cuda.cpu_kernel import CpuKernel
x = np.ones(1, np.float32)
CpuKernel({DOUBLE!r}, "k")((1,), (1,), (x,))
print(x[0])
"""
    env = {**os.environ, "PYTHONPATH": str(Path(tinyft.__file__).parents[1]), "XDG_CACHE_HOME": str(cache)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=env, text=True, stdout=subprocess.PIPE)
                 for _ in range(3)]
    assert [p.communicate()[0] for p in processes] == ["2.0\n"] * 3
    kept, = (path for path in cache.rglob("*") if path.is_file())
    assert kept.suffix == ".so"


def test_an_error_in_the_source_is_told_with_its_line():
    with pytest.raises(KernelError, match=r"kernel.cu:3:.*flot"):
        run("flot a = 0;", np.zeros(1, F), np.zeros(1, F))
    for source in ("__global__ void k(float* x) {}", 'extern "C" __global__ void other(float* x) {}',
                   '// extern "C" __global__ void k(float* x) {}',
                   'extern "C" template <class A> __global__ void k(A* x) {}'):
        with pytest.raises(KernelError, match=r'no extern "C" __global__ void k\('):
            CpuKernel(source, "k")
    CpuKernel('extern "C" __global__ void __launch_bounds__(128, 2) k(float* x) {}', "k")
    CpuKernel('extern "C" {\n__global__ __launch_bounds__(128) void k(float* x) {} }', "k")


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("right, wrong, said", [
    ("__syncthreads();", "if (threadIdx.x < 40) __syncthreads();",
     "thread 0 waits at the barrier in line 8 for threads that never come"),
    ("__syncthreads();", "if (threadIdx.x < 40) __syncthreads();\nelse __syncthreads();",
     "thread 0 waits at the barrier in line 8, thread 40 at .* in line 9"),
    ("s += __shfl", "if (threadIdx.x != 3) s += __shfl",
     "thread 0 waits at the warp intrinsic in line 6, thread 3 at the barrier in line 8"),
    ("float s = 0;", "float s = 0; if (threadIdx.x >= n - 900) return;", "never come"),
    ("0xffffffffu", "0x0000fffeu", "a mask that leaves it out"),
    ("y[blockIdx.x] =", "y[blockIdx.x + 1] =", r"argument 1, float32 of shape \(3,\), and wrote past the end"),
    ("y[blockIdx.x] =", "y[blockIdx.x - 1.f < 0 ? -1 : 0] =", "wrote before the start")])
def test_what_a_device_would_not_tell_is_an_error(right, wrong, said):
    assert right in TOTAL
    with pytest.raises(KernelError, match=said):
        total(TOTAL.replace(right, wrong))


def test_a_missing_barrier_or_an_unwritten_number_is_poison():
    assert np.isnan(total(TOTAL.replace("__syncthreads();", ""))).all()
    assert np.isnan(total(n=1001)).all()  # reading past the end
    y = np.zeros(2, F)
    run("__shared__ float a[2]; if (blockIdx.x == 0) a[0] = 7; y[blockIdx.x] = a[0];", y, y, grid=(2,), block=(1,))
    assert y[0] == 7 and np.isnan(y[1])  # no block inherits another's memory


def test_a_warp_that_runs_ahead_shows_a_race_between_two_sums():
    """Without the second barrier warp 0 may write again before warp 1 has read: a shuffle holds up nobody but its own
    warp.
    """
    body = """__shared__ float part[2];
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = 1;
    __syncthreads();
    float sum = part[0] + part[1];
    __syncthreads();   // all have read
    float again = __shfl_sync(0xffffffffu, 2 * sum, 0);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = again;
    y[threadIdx.x] = sum;"""
    y = np.zeros(64, F)
    run(body, y, parameters="float* y")
    assert (y == 2).all()
    run(body.replace("__syncthreads();   // all", "// all"), y, parameters="float* y")
    assert (y[:32] == 2).all() and (y[32:] == 5).all()


def test_a_race_shows_when_the_threads_run_in_reverse(monkeypatch):
    last = []
    for reverse in "01":
        monkeypatch.setenv("EMU_REVERSE", reverse)
        y = np.zeros(1, F)
        run("y[0] = threadIdx.x;", y, y)
        last.append(y[0])
    assert last == [63, 0]


@pytest.mark.parametrize("args, said", [
    ((np.zeros(4, F), np.zeros(4, F), 3), "argument 2 of k is int32; got a int: pass a NumPy scalar"),
    ((np.zeros(4, F), np.zeros(4, F), np.int64(3)), "argument 2 of k is int32; got int64"),
    ((np.zeros(4, F), np.zeros(4, F), F(3)), "argument 2 of k is int32; got float32"),
    ((np.zeros(4), np.zeros(4, F), I(3)), "argument 0 of k is a pointer to float32; got float64"),
    ((np.zeros(4, I), np.zeros(4, F), I(3)), "argument 0 of k is a pointer to float32; got int32"),
    ((np.zeros(4, F), F(3), I(3)), "argument 1 of k is a pointer to float32; got a float32"),
    ((np.zeros(4, F), np.zeros(4, F), np.zeros(1, I)), "argument 2 of k is int32; got an array"),
    ((np.zeros(8, F)[::2], np.zeros(4, F), I(3)), "carries no strides"),
    ((np.zeros(4, F), np.zeros(4, F)), "k takes 3 arguments; got 2")])
def test_arguments_that_a_device_would_misread_are_refused(args, said):
    with pytest.raises(KernelError, match=said):
        run("y[0] = x[n];", *args, parameters="const float* x, float* y, int n")


def test_what_cannot_be_launched_is_refused():
    x = np.zeros(4, F)
    for grid, block, shared, said in (((1,), (1025,), 0, "1 to 1024 threads"),
                                      ((1,), (1, 1, 65), 0, "1 to 1024 threads"),
                                      ((0,), (1,), 0, "at least one block"), ((1, 65536), (1,), 0, "at most 65535"),
                                      ((1,), (1,), 50000, "49152 unless it asks")):
        with pytest.raises(KernelError, match=said):
            run("y[0] = 1;", x, x, grid=grid, block=block, shared_mem=shared)
    both = np.zeros(8, F)
    with pytest.raises(KernelError, match="overlap"):
        run("y[0] = 1;", both[:5], both[3:])
    fixed = np.zeros(4, F)
    fixed.flags.writeable = False
    with pytest.raises(KernelError, match="read-only"):
        run("x[0] = 1;", fixed, x)
    with pytest.raises(KernelError, match="past the end of its 252 bytes of dynamic shared memory"):
        run("extern __shared__ float s[]; s[threadIdx.x] = 1; y[0] = s[0];", x, x, shared_mem=4 * 63)
    run("extern __shared__ float s[]; s[threadIdx.x] = 1; y[0] = s[0];", x, x, shared_mem=4 * 64)


# ── what goes right ──────────────────────────────────────────────────────────────────────────────────────────────────
def lanes(expression: str, n: int = 64) -> np.ndarray:
    """The expression, of `l` (the lane) and `t` (the thread), for every thread of a block."""
    y = np.zeros(n, I)
    run(f"int t = threadIdx.x, l = t % 32; (void)l; y[t] = {expression};", y, block=(n,), parameters="int* y")
    return y


def test_warp_intrinsics_mean_what_they_mean_on_a_device():
    t = np.arange(64)
    l, warp = t % 32, t // 32 * 32
    for expression, want in [
            ("__shfl_sync(~0u, t, 5)", warp + 5), ("__shfl_sync(~0u, t, l + 1)", warp + (l + 1) % 32),
            ("__shfl_sync(~0u, t, 3, 8)", t // 8 * 8 + 3),
            ("__shfl_xor_sync(~0u, t, 6)", warp + (l ^ 6)), ("__shfl_down_sync(~0u, t, 3)", np.where(l < 29, t + 3, t)),
            ("__shfl_up_sync(~0u, t, 3)", np.where(l >= 3, t - 3, t)),
            ("__shfl_down_sync(~0u, t, 3, 8)", np.where(l % 8 < 5, t + 3, t)),
            ("__popc(__ballot_sync(~0u, t % 3 == 0))", np.where(t < 32, 11, 11)),
            ("__any_sync(~0u, t == 40)", (t >= 32)),
            ("__all_sync(~0u, t != 40)", (t < 32)), ("__ffs(__ballot_sync(~0u, l > 4))", 6), ("__clz(1 << l)", 31 - l),
            # each half its own mask
            ("l < 16 ? __shfl_sync(0xffffu, t, 2) : __shfl_sync(0xffff0000u, t, 20)", warp + np.where(l < 16, 2, 20)),
            ("__syncthreads_or(t == 3)", 1), ("__syncthreads_and(t != 3)", 0), ("__syncthreads_count(t % 2)", 32),
            ("(int)__umulhi(1u << 31, 2u * t)", t), ("__float_as_int(__int_as_float(t))", t),
            ("min(t, 5) + max(t, 50)", np.minimum(t, 5) + np.maximum(t, 50))]:
        assert np.array_equal(lanes(expression), np.broadcast_to(want, 64)), expression
    # a block that fills no warp
    assert np.array_equal(lanes("__shfl_down_sync(~0u, t, 1)", 20)[:19], np.arange(1, 20))


def test_a_lane_that_returned_is_not_waited_for_and_gives_nothing():
    y = np.zeros(32, I)
    run("int t = threadIdx.x; if (t >= 16) return; y[t] = __shfl_xor_sync(~0u, t, 16);", y, block=(32,),
        parameters="int* y")
    assert (y[:16] == 0x7f7f7f7f).all() and not y[16:].any()


def test_blocks_threads_and_vectors_have_their_axes():
    y = np.zeros((2, 3, 2, 5, 4), I)
    body = """int block = blockIdx.y * gridDim.x + blockIdx.x;
              int at = ((block * blockDim.z + threadIdx.z) * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
              atomicAdd(&y[at], 10 * at + 1);"""
    run(body, y, grid=(3, 2), block=(4, 5, 2), parameters="int* y")
    assert np.array_equal(y.reshape(-1), 10 * np.arange(240) + 1)
    x = np.arange(16, dtype=F)
    run("float4 a = ((float4*)x)[threadIdx.x]; ((float4*)x)[threadIdx.x] = make_float4(a.w, a.z, a.y, a.x);", x,
        block=(4,), parameters="float* x")
    assert np.array_equal(x.reshape(4, 4), np.arange(16).reshape(4, 4)[:, ::-1])


def test_atomics_give_back_what_was_there():
    y, f = np.array([0, 5, 5, -1, 0, 0], I), np.zeros(1, F)
    body = """int t = threadIdx.x;
              atomicAdd(&y[0], 1); atomicMax(&y[1], t); atomicMin(&y[2], t); atomicAnd(&y[3], ~t);
              if (atomicCAS(&y[4], 0, 9) == 0) atomicExch(&y[5], 3);
              atomicAdd(f, 0.5f);"""
    run(body, y, f, parameters="int* y, float* f")
    assert y.tolist() == [64, 63, 0, ~63, 9, 3] and f == 32


def test_half_precision_is_that_of_numpy():
    every = np.arange(65536, dtype=np.uint16)
    rng = np.random.default_rng(0)
    edges = F([0, -0.0, 65519.9, 65520, 1e-8, 2**-25, 3e-8])
    floats = np.r_[rng.integers(0, 2**32, 200000, dtype=np.uint32).view(F), rng.standard_normal(50000).astype(F), edges]
    for name, dtype in (("__half", np.dtype(np.float16)), ("__nv_bfloat16", bfloat16)):
        h, wide, narrow = every.view(dtype), np.zeros(65536, F), np.zeros(len(floats), dtype)
        body = f"int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) y[i] = ({'{}'})x[i];"
        run(body.format("float"), h, wide, I(65536), grid=(512,), block=(128,),
            parameters=f"const {name}* x, float* y, int n")
        run(body.format(name), floats, narrow, I(len(floats)), grid=(2048,), block=(128,),
            parameters=f"const float* x, {name}* y, int n")
        with np.errstate(all="ignore"):
            assert np.array_equal(wide, h.astype(F), equal_nan=True)
            assert np.array_equal(narrow.astype(F), floats.astype(dtype).astype(F), equal_nan=True)
            assert np.array_equal(np.signbit(narrow), np.signbit(floats.astype(dtype)))
            sums = np.zeros(65536, dtype)
            run("int i = blockIdx.x * blockDim.x + threadIdx.x; y[i] = x[i] + x[i] * x[65535 - i];", h, sums,
                grid=(512,), block=(128,),
                parameters=f"const {name}* x, {name}* y")
            assert np.array_equal(sums.astype(F), (h + h * h[::-1]).astype(F), equal_nan=True)


def test_fortran_order_scalars_and_arrays_without_axes_arrive():
    x, y = np.asfortranarray(np.arange(6, dtype=F).reshape(2, 3)), np.zeros((), F)
    run("y[0] = x[1];", x, y)
    assert y == 3  # the second number in memory
    run("y[0] = d + (float)b + c + (z ? 1 : 0);", np.float64(0.5), np.bool_(True), np.int8(-3), y, np.uintp(0),
        parameters="double d, bool b, char c, float* y, float* z")
    assert y == -1.5


def test_the_library_alone_does_not_open_it():
    env = {**os.environ, "PYTHONPATH": str(Path(tinyft.__file__).parents[1])}
    out = subprocess.run([sys.executable, "-c",
                          "import tinyft, sys; print([m for m in sys.modules if 'tinyft' in m and 'cuda' in m])"],
                         env=env,
                         capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr

"""The backends of arrays: NumPy, CuPy, and "strict", a NumPy array that takes only the calls that CuPy takes.

The library computes on plain arrays and asks an array for its own module: `xp(a)` is `numpy` or `cupy`, so one
definition of an op serves every backend.  A move between backends is always explicit: `asarray`, `to`, `asnumpy`.
Only this file and kernels/cuda* import CuPy.
"""
from __future__ import annotations

import contextlib
import os
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from . import dispatch
from .checks import brief
from .keywords import checked_keywords

__all__ = ["BackendError", "CannotCapture", "use", "backend", "xp", "name_of", "is_array", "asarray", "asnumpy", "to",
           "put_like", "normal", "uniform_like", "peak_memory", "bfloat16"]

Array = Any                                             # numpy.ndarray, cupy.ndarray or strict.Array
bfloat16 = np.dtype(ml_dtypes.bfloat16)
NAMES = ("numpy", "cupy", "strict")
NUMERIC = "biufcV"                                      # the kinds of dtypes that hold numbers; bfloat16 is of kind V
EXTRA = "tinyft[gpu"                                    # the start of tinyft[gpu12] and tinyft[gpu13]
_modules: dict[type, Any] = {np.ndarray: np}            # array type -> its module
_names: dict[type, str] = {np.ndarray: "numpy"}
_local = threading.local()                              # each thread may use another backend
_when_opened: dict[str, Callable[[type, Any], None]] = {}      # backend -> function that registers its kernels
recording: Any = None                                   # the active CUDA-graph capture, or None


class CannotCapture(RuntimeError):
    """Raised when a training step cannot be captured as a CUDA graph; the message names the cause."""


class BackendError(RuntimeError):
    """Raised for a backend that cannot be used, and for arrays of two backends in one operation."""


@checked_keywords
def use(name: str) -> None:
    """Create arrays on the backend `name` from now on, in this thread.

    name: 'numpy', 'cupy', 'strict', or 'auto' (CuPy if it works, else NumPy).
    BackendError with the reason if CuPy cannot be used; TypeError unless the name is a string."""
    if not isinstance(name, str):
        raise TypeError(f"use wants the name of a backend, got {brief(name)}")
    if name == "auto":
        name = "numpy" if why_no_cupy() else "cupy"
    _open(name)
    _local.name = name


def backend() -> str:
    """The name of the backend in use: of the last `use`, else of TINYFT_BACKEND, else 'numpy'."""
    if not hasattr(_local, "name"):
        use(os.environ.get("TINYFT_BACKEND", "numpy"))
    return _local.name


def _open(name: str) -> Any:
    """The array module of a backend: numpy, cupy or strict.xp.  Imported, and its kernels registered, at its first use.

    BackendError if there is no such backend, or if CuPy cannot be used."""
    if name in _names.values():
        return next(_modules[kind] for kind, n in _names.items() if n == name)
    if name == "strict":
        from . import strict
        return _register(name, strict.Array, strict.xp)
    if name == "sizes":
        from . import sizes
        return _register(name, sizes.Sizes, sizes.xp)
    if name == "cupy":
        if reason := why_no_cupy():
            raise BackendError(f"cannot use the backend 'cupy': {reason}")
        import cupy
        return _register(name, cupy.ndarray, cupy)
    raise BackendError(f"unknown backend {name!r}; wanted one of {', '.join(NAMES)} or auto")


def _register(name: str, kind: type, module: Any) -> Any:
    _modules[kind], _names[kind] = module, name
    if name in _when_opened:
        _when_opened[name](kind, module)
    return module


def on_open(name: str, f: Callable[[type, Any], None]) -> None:
    """Call f(array type, module) when the backend `name` is first used; now if it is in use already."""
    _when_opened[name] = f
    for kind in [k for k, n in _names.items() if n == name]:
        f(kind, _modules[kind])


def why_no_cupy() -> str | None:
    """None if CuPy compiles a kernel and multiplies two matrices here.  Otherwise one sentence: the reason and the
    remedy.

    cupy.is_available() asks only for a driver and a device; the first matrix product may still fail for want of
    cuBLAS."""
    try:
        import cupy
    except ImportError as e:
        if e.name == "cupy":
            return f'CuPy is not installed: pip install "{EXTRA}13]" for a driver of CUDA 13, "{EXTRA}12]" for CUDA 12'
        return f"CuPy cannot be imported ({e}): pip install --force-reinstall cupy-cuda13x, or cupy-cuda12x"
    try:
        if cupy.cuda.runtime.getDeviceCount() == 0:
            return _no_device()
        a = cupy.arange(6, dtype=np.float32).reshape(2, 3) * 2 + 1               # [[1, 3, 5], [7, 9, 11]]
        if float((a @ a.T)[0, 1]) != 1 * 7 + 3 * 9 + 5 * 11:
            return "the GPU computed a wrong product: tinyft doctor says which driver and CuPy these are"
        return None
    except Exception as e:                              # the driver, NVRTC and cuBLAS each raise types of their own
        return _missing(cupy.cuda.runtime, e)


def _missing(runtime: Any, e: Exception) -> str:
    """One sentence for an error of CuPy's: the part that is missing, and the remedy.

    runtime: the module cupy.cuda.runtime."""
    message = str(e)
    cupy_cuda = runtime.runtimeGetVersion() // 1000           # major version of the CUDA that this CuPy is built for
    if "cudaErrorNoDevice" in message:
        return _no_device()
    if "cudaErrorInsufficientDriver" in message:
        driver_cuda = runtime.driverGetVersion() // 1000      # 0 without a driver
        if driver_cuda:
            return (f"the NVIDIA driver knows CUDA {driver_cuda} and this CuPy wants {cupy_cuda}: "
                    f'pip uninstall -y cupy-cuda{cupy_cuda}x && pip install "{EXTRA}{driver_cuda}]"')
        return ("there is no NVIDIA driver: sudo ubuntu-drivers install (on Ubuntu), "
                "or docker run --gpus all ... where the host has one")
    for name, what in (("nvrtc", "NVRTC, which compiles kernels"), ("cublas", "cuBLAS, which multiplies matrices")):
        if f'Failure finding "lib{name}' in message:
            return f'{what}, is not installed: pip install "{EXTRA}{cupy_cuda}]"'
    return f"{type(e).__name__}: {(message.splitlines() or [''])[0][:160]}"


def _no_device() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return "the NVIDIA driver shows no device: nvidia-smi -L lists those there are"
    return f"the NVIDIA driver shows no device: CUDA_VISIBLE_DEVICES is {visible!r}, so unset CUDA_VISIBLE_DEVICES"


def about_device() -> dict[str, Any]:
    """The device that CuPy uses: name, compute capability, multiprocessors, CUDA versions, bytes of memory free and
    total."""
    runtime = _open("cupy").cuda.runtime
    properties = runtime.getDeviceProperties(runtime.getDevice())
    free, total = runtime.memGetInfo()

    def version(n: int) -> str:                               # 12040 -> "12.4"
        return f"{n // 1000}.{n % 1000 // 10}"
    return {
        "name": properties["name"].decode(),
        "capability": f"{properties['major']}.{properties['minor']}",
        "multiprocessors": properties["multiProcessorCount"],
        "driver": version(runtime.driverGetVersion()),
        "runtime": version(runtime.runtimeGetVersion()),
        "free": free,
        "total": total,
    }


def is_array(a: object) -> bool:
    """True if a is an array of a backend that was opened."""
    return type(a) in _modules


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of an array of any backend, or of a number or nested lists."""
    shape = getattr(value, "shape", None)
    return np.shape(value) if shape is None else tuple(shape)


def xp(*arrays: Array) -> ModuleType:
    """The array module of these arrays: numpy, cupy or strict.xp; numpy if there is none but scalars.

    BackendError for arrays of two backends: nothing is moved silently."""
    found = None
    for a in arrays:
        m = _modules.get(type(a))
        if m is not None and found is not None and m is not found:
            raise BackendError("arrays on " + " and ".join(sorted({name_of(b) for b in arrays if is_array(b)}))
                               + " in one operation: move one with .to(...)")
        found = m if m is not None else found
    return np if found is None else found


def name_of(a: Array) -> str:
    """The backend an array is on."""
    return _names.get(type(a), "numpy")


def asarray(a: Any, dtype: Any = None, like: Array = None) -> Array:
    """`a` (an array, a number, or lists of numbers) as an array on the backend in use, or on that of `like`.

    dtype: by default that of an array; float32 for Python floats, as in PyTorch.
    TypeError for anything that holds no numbers, such as None or a string; ValueError for lists of unequal lengths."""
    if not is_array(a):
        is_plain = isinstance(a, (list, tuple, int, float)) and not isinstance(a, np.generic)    # np.float64 is a float
        a = as_host_array(a)
        if is_plain and dtype is None and a.dtype == np.float64:
            dtype = np.float32
    elif a.dtype.kind not in NUMERIC:
        raise TypeError(f"an array wants numbers, got one of dtype {a.dtype}")
    a = to(a, name_of(like) if like is not None else backend())
    return a if dtype is None or a.dtype == dtype else a.astype(dtype)


def as_host_array(a: Any) -> np.ndarray:
    """Numbers, lists of numbers, or an array of another library, as a NumPy array.

    TypeError for anything that holds no numbers; ValueError for lists of unequal lengths."""
    try:
        host = np.asarray(a)
    except ValueError:                                  # NumPy raises it for lists of unequal lengths
        raise ValueError(f"an array wants lists of equal lengths, got {brief(a)}") from None
    if host.dtype.kind not in NUMERIC:
        raise TypeError(f"an array wants numbers, got {brief(a)}")
    return host


def to(a: Array, name: str) -> Array:
    """`a` on the backend `name`; the same array if it is there already."""
    if name_of(a) == name:
        return a
    host = asnumpy(a)
    return host if name == "numpy" else _open(name).asarray(host)


def asnumpy(a: Array) -> np.ndarray:
    """`a` as a NumPy array.  Only here does the host wait for a device."""
    return a if isinstance(a, np.ndarray) else np.asarray(a) if not is_array(a) else xp(a).asnumpy(a)


def address(a: Array) -> int:
    """The address of an array's first number."""
    return a.__array_interface__["data"][0] if isinstance(a, np.ndarray) else a.data.ptr


def numbers(*scalars: Any) -> tuple[float, ...]:
    """Arrays of one number each as Python floats, in one transfer."""
    m = xp(*scalars)
    if m is np:
        return tuple(map(float, scalars))
    together = m.stack([m.asarray(a, dtype=np.float64).reshape(()) for a in scalars])
    return tuple(asnumpy(together).tolist())


def put_like(a: Any, like: Array, dtype: Any = None) -> Array:
    """Host data `a` on the backend of `like`, such as ids, masks and labels for a model.

    TypeError and ValueError as asarray, of which this differs in one thing: Python floats become float64."""
    return asarray(a if is_array(a) else as_host_array(a), dtype, like)


def normal(rng: np.random.Generator, shape: tuple, std: float = 1.0, dtype: Any = np.float32) -> Array:
    """Normal numbers of standard deviation `std`.

    Drawn on the host, so that every backend starts from the same bits."""
    return asarray(rng.normal(0.0, std, shape).astype(dtype, copy=False))


def uniform_like(x: Array, key: int) -> Array:
    """Uniform float32 numbers in [0, 1) of x's shape, determined by `key` alone: the same bits on every backend.

    Philox, of whose words the upper 24 bits are used."""
    return dispatch.run(draw_uniform, type(x), x, key)


def draw_uniform(x: Array, key: int) -> Array:
    """The definition of uniform_like: drawn on the host.  A device has a kernel for it."""
    words = random_words(int(np.prod(x.shape)), key)
    return asarray(((words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)).reshape(x.shape), like=x)


def random_words(n: int, key: int) -> np.ndarray:
    """n words of 32 random bits on the host; word i is determined by `key` and i alone."""
    return np.random.Philox(key=key).random_raw(n // 2 + 1).view(np.uint32)[:n]


@contextlib.contextmanager
def peak_memory() -> Iterator[dict]:
    """with peak_memory() as m: ...     then m["bytes"] is the largest rise of array memory above the start, in bytes.

    NumPy reports every allocation to Python's tracemalloc, also that of other objects.  On CuPy the figure is the rise
    of the memory pool, from the bytes in use at the start."""
    out = {"bytes": 0}
    if backend() == "cupy":
        pool = _open("cupy").get_default_memory_pool()
        pool.free_all_blocks()
        start = pool.used_bytes()
        yield out
        out["bytes"] = pool.total_bytes() - start       # blocks are kept until freed: the total is the high-water mark
        return
    running = tracemalloc.is_tracing()
    if not running:
        tracemalloc.start()
    tracemalloc.reset_peak()
    start = tracemalloc.get_traced_memory()[0]
    try:
        yield out
        out["bytes"] = tracemalloc.get_traced_memory()[1] - start
    finally:
        if not running:
            tracemalloc.stop()

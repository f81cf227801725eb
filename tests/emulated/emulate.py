"""Let the fake GPU compute: each kernel that CuPy launches runs on the CPU.

    emulate.install()          before anything imports cupy; then `import cupy` is the real one, and computes

CuPy hands NVRTC the CUDA source of every kernel, its own and ours.  Here NVRTC compiles it for sm_90, which proves that
it compiles, and g++ compiles it for this machine.  A launch calls the latter, on the same parameter block that the
driver would get.  The results of both compilers are kept in a folder, so a second run starts at once.

Fresh memory is filled with NaN bits at each allocation, also when CuPy's pool hands out a used block.
"""
from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import fake_gpu
import numpy as np
from cpu_module import CpuModule, digest

FOLDER = Path(os.environ.get("TINYFT_EMULATED_CACHE") or Path(sys.prefix) / "emulated")
# what CuPy's own kernels start with
HEADERS = tuple(f"cupy/{h}" for h in ("complex.cuh", "carray.cuh", "atomics.cuh", "math_constants.h"))
# what a compilation gave CuPy in place of a cubin -> the kernels
modules: dict[bytes, CpuModule] = {}


def install() -> None:
    """Real CuPy on an emulated GPU from here on.  Once a process; fake_gpu.Unsupported if this is another CuPy."""
    if fake_gpu.execute is not None:
        return
    fake_gpu.install(FOLDER)
    import cupy
    _take_sources(cupy)
    _replace_thrust()
    _poison(cupy)
    fake_gpu.execute = _execute
    fake_gpu.parameters = _parameters


def _parameters(name: str, module: bytes) -> Any:
    return modules[module].parameters(name)


def _execute(name: str, module: bytes, sizes: int, shared: int, params: int) -> None:
    if module not in modules:
        raise RuntimeError("it came compiled for a GPU, and cannot be emulated")
    modules[module].launch(name, sizes, shared, params)


def _take_sources(cupy: Any) -> None:
    """Compile each source twice: by NVRTC (unless it accepted this one before) and by g++."""
    from cupy.cuda import compiler
    nvrtc, own = compiler._compile_using_nvrtc_no_warning, Path(cupy.__file__).parent / "_core" / "include"
    include = (str(own), str(own / "cupy" / "_cccl" / "libcudacxx"))

    def compile_(source: str, options: tuple = (), arch: Any = None, filename: str = "kern.cu",
                 name_expressions: Any = None,
                 *more: Any, **kw: Any) -> tuple[bytes, dict | None]:
        key = digest("nvrtc", fake_gpu.VERSION, compiler._get_nvrtc_version(), source, options, arch, name_expressions)
        defines, accepted = tuple(o for o in options if o.startswith("-D")), FOLDER / f"{key}.json"
        names = {n: n
                 for n in re.findall(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(',
                                     source)}
        # NVRTC's own; the shim has included the host's
        text = re.sub(r"#include <type_traits>", "", source)
        # g++ works while NVRTC does
        ours = CpuModule(text, names, FOLDER, HEADERS, include, defines) if not name_expressions else None
        if accepted.exists():
            mapping = json.loads(accepted.read_text())
        else:
            _, mapping = nvrtc(source, options, arch, filename, name_expressions, *more, **kw)
            accepted.write_text(json.dumps(mapping))
        if ours is None:  # templates: NVRTC tells the names they are launched by
            ours = CpuModule(text, {v: k for k, v in mapping.items()}, FOLDER, HEADERS, include, defines)
        modules[key.encode()] = ours
        return key.encode(), mapping
    compiler._compile_using_nvrtc_no_warning = compiler.compile_using_nvrtc = compile_


def _replace_thrust() -> None:
    """sort and argsort come compiled, but are reached by way of Python: NumPy does them."""
    from cupy.cuda import thrust

    def host(address: int, dtype: Any, shape: Any) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)

    def sort(dtype: Any, data: int, keys: int, shape: Any) -> None:
        host(data, dtype, shape).sort(axis=-1, kind="stable")

    def argsort(dtype: Any, order: int, data: int, keys: int, shape: Any) -> None:
        host(order, np.intp, shape)[...] = np.argsort(host(data, dtype, shape), axis=-1, kind="stable")
    thrust.sort, thrust.argsort = sort, argsort


def _poison(cupy: Any) -> None:
    """Fill new memory with NaN, or −1: a used block of the pool would often hold the right numbers."""
    pool = cupy.get_default_memory_pool()

    def malloc(size: int) -> Any:
        p = pool.malloc(size)
        ctypes.memset(p.ptr, 0xFF, size)
        return p
    cupy.cuda.set_allocator(malloc)

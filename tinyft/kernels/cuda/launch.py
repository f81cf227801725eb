"""From a .cu file to a running kernel.

    launch("gelu.cu", "gelu", blocks(n), 256, x, y, n, T=x.dtype)

COMPILERS says what compiles CUDA C for arrays of a type: cupy.RawKernel on a device.  Whatever has its call will do, so the same
lines launch a kernel on the CPU (cpu_kernel.CpuKernel), which is how they are tested.
"""
from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ... import array
from ...array import Array, bfloat16, is_array, xp

HERE = Path(__file__).parent
COMPILERS: dict[type, Callable[[str, str], Callable]] = {}                       # array type -> (source, name) -> a kernel
C_TYPES = {np.dtype(np.float32): ("float", ""), np.dtype(np.float16): ("__half", "cuda_fp16.h"), bfloat16: ("__nv_bfloat16", "cuda_bf16.h")}
THREADS = 256                                                                    # in a block
BLOCKS = 4096                                                                    # enough to fill a large device several times over


def launch(file: str, name: str, grid: int | tuple, block: int | tuple, *args: Any, **types: Any) -> None:
    """Run the kernel `name` of a file on arrays and numbers.  types: the dtype behind each type name in the source, T=x.dtype.

    A Python int goes as int32, a float as float32, None as a null pointer, NumPy scalars as they are; arrays must be C-contiguous."""
    kind = next(type(a) for a in args if is_array(a))
    size = lambda n: n if isinstance(n, tuple) else (n,)
    if array.recording is not None:
        array.recording.note(f"the kernel {name}", (grid, block, *(a for a in args if isinstance(a, (int, float, np.number)))))
    _kernel(kind, file, name, tuple(types.items()))(size(grid), size(block), tuple(_argument(a) for a in args))


def blocks(n: int, per: int = 256) -> int:
    "How many blocks for n numbers: not more than keep a device busy, each thread then takes several."
    return min(-(-n // per), BLOCKS)


def warp_blocks(rows: int) -> int:
    "The number of blocks of THREADS threads for this many rows, a warp of 32 threads to a row."
    return -(-rows // (THREADS // 32))


def contiguous(a: Array) -> Array:
    "a, or a C-contiguous copy."
    return a if a.flags.c_contiguous else xp(a).ascontiguousarray(a)


def empty(like: Array, shape: tuple, dtype: Any = None) -> Array:
    "Memory beside `like`, for a kernel to fill."
    return xp(like).empty(shape, like.dtype if dtype is None else dtype)


@lru_cache(None)
def source(file: str, types: tuple = ()) -> str:
    "The text of a kernel file with the headers of ours in their places, and its type names defined before it."
    read = lambda name: (HERE / name).read_text(encoding="utf-8")
    text = re.sub(r'^#include "(\w+\.cuh)"$', lambda m: read(m[1]), read(file), flags=re.MULTILINE)
    return preamble(types) + text


def preamble(types: tuple) -> str:
    "What goes before a kernel's text: its type names, ((name, dtype), ...), with the headers they need."
    named = [(name, *C_TYPES[np.dtype(dtype)]) for name, dtype in types]
    headers = sorted({header for _, _, header in named if header})
    return "".join(f"#include <{h}>\n" for h in headers) + "".join(f"typedef {c} {name};\n" for name, c, _ in named)


@lru_cache(None)
def _kernel(kind: type, file: str, name: str, types: tuple) -> Callable:
    return COMPILERS[kind](source(file, types), name)


def _argument(a: Any) -> Any:
    if isinstance(a, (bool, int)):
        return np.int32(a)
    return np.float32(a) if isinstance(a, float) else np.uintp(0) if a is None else a

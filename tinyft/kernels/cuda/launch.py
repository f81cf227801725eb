"""From a .cu file to a running kernel.

    launch("gelu.cu", "gelu", blocks(n), THREADS, x, y, n, T=x.dtype)

COMPILERS holds the compiler of CUDA C for each array type: cupy.RawKernel on a device.  Anything with its call will do,
so the same lines launch a kernel on the CPU (cpu_kernel.CpuKernel), which is how the kernels are tested.
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
COMPILERS: dict[type, Callable[[str, str], Callable]] = {}  # array type -> (source, name) -> a kernel
C_TYPES = {                                                 # dtype -> (its name in C, the header that defines it)
    np.dtype(np.float32): ("float", ""),
    np.dtype(np.float16): ("__half", "cuda_fp16.h"),
    bfloat16: ("__nv_bfloat16", "cuda_bf16.h"),
}
THREADS = 256                                               # in a block
BLOCKS = 4096                                               # enough to fill a large device several times over


def launch(file: str, name: str, grid: int | tuple, block: int | tuple, *args: Any, **types: Any) -> None:
    """Run the kernel `name` of a file on arrays and numbers.

    types: the dtype behind each type name in the source, T=x.dtype, or a constant of the source, BITS=4.
    A Python int goes as int32, a float as float32, None as a null pointer, NumPy scalars as they are.
    Arrays must be C-contiguous. A step that is recorded for capture notes the numbers, which must not change.
    """
    kind = next(type(a) for a in args if is_array(a))
    if array.recording is not None:
        numbers = [a for a in args if isinstance(a, (int, float, np.number))]
        array.recording.note(f"the kernel {name}", (grid, block, *numbers))
    kernel = _kernel(kind, file, name, tuple(types.items()))
    kernel(_sizes(grid), _sizes(block), tuple(_argument(a) for a in args))


def blocks(n: int, per: int = 256) -> int:
    """The number of blocks for n elements, at most BLOCKS: then each thread takes several elements."""
    return min(-(-n // per), BLOCKS)


def warp_blocks(rows: int) -> int:
    """The number of blocks of THREADS threads for this many rows, a warp of 32 threads to a row."""
    return -(-rows // (THREADS // 32))


def contiguous(a: Array) -> Array:
    """a, or a C-contiguous copy."""
    return a if a.flags.c_contiguous else xp(a).ascontiguousarray(a)


def empty(like: Array, shape: tuple, dtype: Any = None) -> Array:
    """An uninitialised array on the device of `like`, for a kernel to fill."""
    return xp(like).empty(shape, like.dtype if dtype is None else dtype)


@lru_cache(None)
def source(file: str, types: tuple = ()) -> str:
    """The text of a kernel file with its type names defined, and our own headers inserted at their #include."""
    def header(include: re.Match) -> str:
        return (HERE / include[1]).read_text(encoding="utf-8")

    text = (HERE / file).read_text(encoding="utf-8")
    return preamble(types) + re.sub(r'^#include "(\w+\.cuh)"$', header, text, flags=re.MULTILINE)


def preamble(types: tuple) -> str:
    """The lines that define type names, ((name, dtype), ...), with the headers they need; and constants, whole numbers.
    """
    headers = set()
    typedefs = ""
    for name, dtype in types:
        if isinstance(dtype, int):
            typedefs += f"#define {name} {dtype}\n"
            continue
        c_name, header = C_TYPES[np.dtype(dtype)]
        if header:
            headers.add(header)
        typedefs += f"typedef {c_name} {name};\n"
    return "".join(f"#include <{header}>\n" for header in sorted(headers)) + typedefs


@lru_cache(None)
def _kernel(kind: type, file: str, name: str, types: tuple) -> Callable:
    return COMPILERS[kind](source(file, types), name)


def _sizes(n: int | tuple) -> tuple:
    return n if isinstance(n, tuple) else (n,)


def _argument(a: Any) -> Any:
    """A Python number or None as a NumPy scalar of the type that kernels take."""
    if isinstance(a, (bool, int)):
        return np.int32(a)
    if isinstance(a, float):
        return np.float32(a)
    return np.uintp(0) if a is None else a

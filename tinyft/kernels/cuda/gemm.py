"""Matrix products straight through cuBLAS: C = A B, or C += A B, for any number of axes.

CuPy's own product (14.2) copies transposed operands of batched products, computes float16 there as float32, refuses bfloat16 there, knows no
C += A B, and no cuBLAS call of its own may be captured in a graph.  This layer is one call of cublasGemmStridedBatchedEx for all of it.

cuBLAS counts its matrices column by column.  Read so, a row-major matrix is its transpose: so C = A B is asked for as Cᵀ = Bᵀ Aᵀ, with
the operands in the other order and nothing moved.  A matrix is then told by its leading dimension (how many numbers from one row to
the next) and whether it is to be transposed, which covers A.T, slices of columns, and the heads of an attention.
"""
from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ... import precision
from ...array import Array, bfloat16, xp
from .launch import empty

LIBRARIES: dict[type, Any] = {}                                                  # array type -> what multiplies its arrays
TYPES = {np.dtype(np.float32): 0, np.dtype(np.float64): 1, np.dtype(np.float16): 2, bfloat16: 14}        # cudaDataType
COMPUTE_32F, COMPUTE_64F, COMPUTE_32F_FAST_TF32 = 68, 70, 77                     # cublasComputeType
DEFAULT_ALGORITHM = -1
WORKSPACE = 32 << 20                                                             # bytes; what NVIDIA names for Hopper


def matmul(a: Array, b: Array, out: Array | None = None, add: bool = False) -> Array:
    """a (..., M, K) @ b (..., K, N); leading axes equal, or one of the two a plain matrix.  out: where it goes, some rows of each matrix of a larger
    array, say; add: onto what is there.

    16-bit factors are multiplied exactly and summed in float32; `out` may then be float32 too.  No factor is copied whose matrices cuBLAS
    can read where they are: any of whose last two axes one has stride 1, and whose leading axes step evenly.
    ValueError for shapes that do not fit, TypeError for dtypes it does not take."""
    if a.dtype != b.dtype or a.dtype not in TYPES:
        raise TypeError(f"matmul multiplies two arrays of one floating-point dtype; got {a.dtype} and {b.dtype}")
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2] or (a.ndim > 2 and b.ndim > 2 and a.shape[:-2] != b.shape[:-2]):
        raise ValueError(f"matmul wants (..., m, k) and (..., k, n); got {a.shape} and {b.shape}")
    if b.ndim == 2 and a.ndim > 2 and a.flags.c_contiguous and (out is None or out.flags.c_contiguous):          # one tall product
        wide = matmul(a.reshape(-1, a.shape[-1]), b, out if out is None else out.reshape(-1, b.shape[-1]), add)
        return wide.reshape(*a.shape[:-1], b.shape[-1])
    shape = (*(a if a.ndim > b.ndim else b).shape[:-2], a.shape[-2], b.shape[-1])
    if out is None:
        out, add = empty(a, shape), False
    elif out.shape != shape or not writable(out):
        raise ValueError(f"matmul: out must be of shape {shape}, each row contiguous, the matrices evenly apart; got {out.shape}")
    if not (out.size and a.shape[-1]):
        if not add:
            out.fill(0)
        return out
    (a, la), (b, lb) = placed(a), placed(b)
    LIBRARIES[type(a)].gemm(a, la, b, lb, out, add)
    return out


def matmul_float32(a: Array, b: Array) -> Array:
    "a @ b in float32, as it was summed: scores, and the gradient of a weight, which is float32 itself where training is mixed."
    return matmul(a, b, out=empty(a, (*a.shape[:-1], b.shape[-1]), np.float32))


class Layout(NamedTuple):
    "How cuBLAS is to read an array: transposed?, numbers from one row (of the memory) to the next, numbers from one matrix to the next."
    transposed: bool
    leading: int
    step: int


def layout(x: Array) -> Layout | None:
    "The layout of a (..., rows, columns) array, or None if cuBLAS cannot read it in place."
    return _layout(x.shape, x.strides, x.itemsize)


@lru_cache(4096)
def _layout(shape: tuple, strides: tuple, itemsize: int) -> Layout | None:
    s = [n // itemsize for n in strides]
    count, step = 1, 0
    for n, along in zip(shape[-3::-1], s[-3::-1]):                               # do all leading axes step evenly?  The last ones first
        if n > 1 and count > 1 and along != count * step:
            return None
        count, step = count * n, along if n > 1 and count == 1 else step
    (rows, columns), (by_row, by_column) = shape[-2:], s[-2:]
    if (by_column == 1 or columns == 1) and (by_row >= columns or rows == 1):
        return Layout(False, max(by_row, columns) if rows > 1 else columns, step)
    if (by_row == 1 or rows == 1) and (by_column >= rows or columns == 1):
        return Layout(True, max(by_column, rows) if columns > 1 else rows, step)
    return None


def writable(x: Array) -> bool:
    "Whether cuBLAS can write its result there: each row in one piece, the matrices evenly apart."
    there = layout(x)
    return not x.size or (there is not None and not there.transposed)


def placed(x: Array) -> tuple[Array, Layout]:
    "x, or a copy that cuBLAS can read, and its layout."
    there = layout(x)
    if there is None:
        x = xp(x).ascontiguousarray(x)
        there = layout(x)
    return x, there


def readable(x: Array) -> Array:
    return placed(x)[0]


def arguments(a: Array, la: Layout, b: Array, lb: Layout, out: Array, add: bool, address: Any, scalars: Any) -> tuple:
    "What cublasGemmStridedBatchedEx is given after its handle: Cᵀ = Bᵀ Aᵀ."
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    lo, count = layout(out), math.prod(out.shape[:-2])
    double = a.dtype == np.float64
    compute = COMPUTE_64F if double else COMPUTE_32F_FAST_TF32 if precision.tf32 and a.dtype == np.float32 else COMPUTE_32F
    return (int(lb.transposed), int(la.transposed), n, m, k, scalars(double, 1), address(b), TYPES[b.dtype], lb.leading, lb.step,
            address(a), TYPES[a.dtype], la.leading, la.step, scalars(double, int(add)), address(out), TYPES[out.dtype], lo.leading, lo.step,
            count, compute, DEFAULT_ALGORITHM)


class Cublas:
    "NVIDIA's library by ctypes.  Opened at its first product; one handle, for the thread that computes."

    def __init__(self) -> None:
        self.library, self.stream = None, None
        self.numbers = {(double, x): np.array(x, np.float64 if double else np.float32) for double in (False, True) for x in (0, 1)}

    def open(self) -> None:
        import cupy
        from cuda import pathfinder  # comes with CuPy
        pathfinder.load_nvidia_dynamic_lib("cublas")
        library = ctypes.CDLL(f"libcublas.so.{cupy.cuda.runtime.runtimeGetVersion() // 1000}")
        p, i, l = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong
        library.cublasGemmStridedBatchedEx.argtypes = [p, i, i, i, i, i, p, p, i, i, l, p, i, i, l, p, p, i, i, l, i, i, i]
        library.cublasSetStream_v2.argtypes, library.cublasSetWorkspace_v2.argtypes = [p, p], [p, p, ctypes.c_size_t]
        self.handle = p()
        self.check("cublasCreate", library.cublasCreate_v2(ctypes.byref(self.handle)))
        self.workspace, self.library = cupy.empty(WORKSPACE, np.uint8), library

    def gemm(self, a: Array, la: Layout, b: Array, lb: Layout, out: Array, add: bool) -> None:
        self.follow_stream()
        what = arguments(a, la, b, lb, out, add, lambda x: x.data.ptr, lambda double, x: self.numbers[double, x].ctypes.data)
        self.check("cublasGemmStridedBatchedEx", self.library.cublasGemmStridedBatchedEx(self.handle, *what))

    def follow_stream(self) -> None:
        "Work on CuPy's stream.  Changing it takes the workspace away, which is given anew: else cuBLAS allocates, as no capture allows."
        import cupy
        if self.library is None:
            self.open()
        stream = cupy.cuda.get_current_stream().ptr
        if stream != self.stream:
            self.check("cublasSetStream", self.library.cublasSetStream_v2(self.handle, stream))
            self.check("cublasSetWorkspace", self.library.cublasSetWorkspace_v2(self.handle, self.workspace.data.ptr, WORKSPACE))
            self.stream = stream

    def check(self, what: str, status: int) -> None:
        if status:
            raise RuntimeError(f"{what} failed with cuBLAS status {status}")

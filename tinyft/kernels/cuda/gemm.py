"""Matrix products straight through cuBLAS: C = A B, or C += A B, for any number of axes.

Reasons for a layer of our own: CuPy's product (14.2) copies transposed operands of batched products, computes batched
float16 as float32, refuses batched bfloat16, has no C += A B, and makes cuBLAS calls that cannot be captured in a
graph. This layer is one call of cublasGemmStridedBatchedEx for all of it.

cuBLAS stores matrices column by column.  Read so, a row-major matrix is its transpose: C = A B is computed as Cᵀ = Bᵀ
Aᵀ, with the operands in the other order and nothing moved.  A matrix is described by its leading dimension (the number
of elements from one row to the next) and by whether it is transposed, which covers A.T, slices of columns, and the
heads of an attention.
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

LIBRARIES: dict[type, Any] = {}                          # array type -> the library that multiplies its arrays
# NVIDIA's numbers: cudaDataType, then cublasComputeType.
TYPES = {np.dtype(np.float32): 0, np.dtype(np.float64): 1, np.dtype(np.float16): 2, bfloat16: 14}
COMPUTE_32F = 68
COMPUTE_64F = 70
COMPUTE_32F_FAST_TF32 = 77
DEFAULT_ALGORITHM = -1
WORKSPACE = 32 << 20                                     # bytes; NVIDIA's recommendation for Hopper


def matmul(a: Array, b: Array, out: Array | None = None, add: bool = False) -> Array:
    """a (..., M, K) @ b (..., K, N).  The leading axes are equal, or one of the two is a plain matrix.

    out: the array for the result; it may be a part of each row of a larger array.  add: add the result to `out`.
    16-bit factors are multiplied exactly and summed in float32; `out` may then be float32 too.
    No factor is copied that cuBLAS can read in place: one of the last two axes has stride 1, and the leading axes have
    even steps.
    ValueError for shapes that do not fit, TypeError for other dtypes.
    """
    if a.dtype != b.dtype or a.dtype not in TYPES:
        raise TypeError(f"matmul multiplies two arrays of one floating-point dtype; got {a.dtype} and {b.dtype}")
    same_batch = a.ndim <= 2 or b.ndim <= 2 or a.shape[:-2] == b.shape[:-2]
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2] or not same_batch:
        raise ValueError(f"matmul wants (..., m, k) and (..., k, n); got {a.shape} and {b.shape}")
    contiguous = a.flags.c_contiguous and (out is None or out.flags.c_contiguous)
    if b.ndim == 2 and a.ndim > 2 and contiguous:        # one tall product instead of a batch
        tall_out = None if out is None else out.reshape(-1, b.shape[-1])
        tall = matmul(a.reshape(-1, a.shape[-1]), b, tall_out, add)
        return tall.reshape(*a.shape[:-1], b.shape[-1])
    batch = a.shape[:-2] if a.ndim > b.ndim else b.shape[:-2]
    shape = (*batch, a.shape[-2], b.shape[-1])
    if out is None:
        out = empty(a, shape)
        add = False
    elif out.shape != shape or not writable(out):
        raise ValueError(f"matmul: out must be of shape {shape}, each row contiguous, the matrices evenly apart; "
                         f"got {out.shape}")
    if not (out.size and a.shape[-1]):                   # a sum of no products is 0
        if not add:
            out.fill(0)
        return out
    a, a_layout = placed(a)
    b, b_layout = placed(b)
    LIBRARIES[type(a)].gemm(a, a_layout, b, b_layout, out, add)
    return out


def matmul_float32(a: Array, b: Array) -> Array:
    """a @ b with the float32 sums not rounded: for scores, and for the gradient of a weight in mixed precision."""
    return matmul(a, b, out=empty(a, (*a.shape[:-1], b.shape[-1]), np.float32))


# ── the layout of a matrix in memory ─────────────────────────────────────────────────────────────────────────────────
class Layout(NamedTuple):
    """The way cuBLAS reads an array.

    leading: elements from one row (of the memory) to the next.  step: elements from one matrix to the next.
    """
    transposed: bool
    leading: int
    step: int


def layout(x: Array) -> Layout | None:
    """The layout of a (..., rows, columns) array, or None if cuBLAS cannot read it in place."""
    return _layout(x.shape, x.strides, x.itemsize)


@lru_cache(4096)
def _layout(shape: tuple, strides: tuple, itemsize: int) -> Layout | None:
    """`layout` for an array of this shape and these strides in bytes; cached, since a training step repeats them.

    One of the last two axes must have stride 1, and the leading axes must have even steps.  The stride of an axis of
    length one does not count."""
    strides = tuple(n // itemsize for n in strides)
    step = _even_step(shape[:-2], strides[:-2])
    if step is None:
        return None
    rows, columns = shape[-2:]
    by_row, by_column = strides[-2:]
    if (by_column == 1 or columns == 1) and (by_row >= columns or rows == 1):
        return Layout(transposed=False, leading=max(by_row, columns) if rows > 1 else columns, step=step)
    if (by_row == 1 or rows == 1) and (by_column >= rows or columns == 1):
        return Layout(transposed=True, leading=max(by_column, rows) if columns > 1 else rows, step=step)
    return None


def _even_step(shape: tuple, strides: tuple) -> int | None:
    """Elements from each matrix to the next; None if they are not evenly apart, 0 for one matrix.

    shape, strides: of the leading axes, which count the matrices; strides in elements."""
    count = 1                                            # matrices in the axes so far, the last axis first
    step = 0
    for n, stride in zip(reversed(shape), reversed(strides)):
        if n > 1 and count == 1:
            step = stride
        elif n > 1 and count > 1 and stride != count * step:
            return None
        count *= n
    return step


def writable(x: Array) -> bool:
    """True if cuBLAS can write its result there: each row in one piece, the matrices evenly apart."""
    found = layout(x)
    return not x.size or (found is not None and not found.transposed)


def placed(x: Array) -> tuple[Array, Layout]:
    """(x, or a copy that cuBLAS can read; its layout)."""
    found = layout(x)
    if found is None:
        x = xp(x).ascontiguousarray(x)
        found = layout(x)
    return x, found


def readable(x: Array) -> Array:
    """x, or a copy that cuBLAS can read."""
    return placed(x)[0]


# ── the call ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def arguments(a: Array, a_layout: Layout, b: Array, b_layout: Layout, out: Array, add: bool, address: Any,
              scalars: Any) -> tuple:
    """The arguments of cublasGemmStridedBatchedEx after its handle, for out = a @ b, or out += a @ b if `add`.

    cuBLAS reads an array by columns, as its transpose, so the call is Cᵀ = Bᵀ Aᵀ: b comes first.
    address(array): its address.  scalars(double, 0 or 1): the address of that number, in float64 or float32: the
    factors of the product and of the old `out`.
    """
    m, k = a.shape[-2:]
    n = b.shape[-1]
    out_layout = layout(out)
    count = math.prod(out.shape[:-2])
    double = a.dtype == np.float64
    if double:
        compute = COMPUTE_64F
    elif precision.tf32 and a.dtype == np.float32:
        compute = COMPUTE_32F_FAST_TF32
    else:
        compute = COMPUTE_32F
    return (int(b_layout.transposed), int(a_layout.transposed), n, m, k, scalars(double, 1),
            address(b), TYPES[b.dtype], b_layout.leading, b_layout.step,
            address(a), TYPES[a.dtype], a_layout.leading, a_layout.step, scalars(double, int(add)),
            address(out), TYPES[out.dtype], out_layout.leading, out_layout.step,
            count, compute, DEFAULT_ALGORITHM)


def _device_address(x: Array) -> int:
    return x.data.ptr


class Cublas:
    """NVIDIA's library through ctypes.  Opened at its first product, with one handle for the thread that computes."""

    def __init__(self) -> None:
        self.library: Any = None
        self.stream: int | None = None
        self.numbers = {}                                # (double, 0 or 1): that number in host memory
        for x in (0, 1):
            self.numbers[False, x] = np.array(x, np.float32)
            self.numbers[True, x] = np.array(x, np.float64)

    def open(self) -> None:
        """Load the library that comes with CuPy and create the handle and the workspace."""
        import cupy
        from cuda import pathfinder
        pathfinder.load_nvidia_dynamic_lib("cublas")
        library = ctypes.CDLL(f"libcublas.so.{cupy.cuda.runtime.runtimeGetVersion() // 1000}")
        p = ctypes.c_void_p                              # one letter each, for the list of 23 parameter types below
        i = ctypes.c_int
        l = ctypes.c_longlong
        library.cublasGemmStridedBatchedEx.argtypes = [
            p, i, i, i, i, i, p, p, i, i, l, p, i, i, l, p, p, i, i, l, i, i, i]
        library.cublasSetStream_v2.argtypes = [p, p]
        library.cublasSetWorkspace_v2.argtypes = [p, p, ctypes.c_size_t]
        self.handle = p()
        self._check("cublasCreate", library.cublasCreate_v2(ctypes.byref(self.handle)))
        self.workspace = cupy.empty(WORKSPACE, np.uint8)
        self.library = library

    def gemm(self, a: Array, a_layout: Layout, b: Array, b_layout: Layout, out: Array, add: bool) -> None:
        """out = a @ b, or out += a @ b, for arrays that fit."""
        self.follow_stream()
        given = arguments(a, a_layout, b, b_layout, out, add, _device_address, self._scalar)
        self._check("cublasGemmStridedBatchedEx", self.library.cublasGemmStridedBatchedEx(self.handle, *given))

    def _scalar(self, double: bool, x: int) -> int:
        return self.numbers[double, x].ctypes.data

    def follow_stream(self) -> None:
        """Work on CuPy's current stream.

        cublasSetStream resets the workspace, so it is set again: else cuBLAS allocates, which no graph capture allows.
        """
        import cupy
        if self.library is None:
            self.open()
        stream = cupy.cuda.get_current_stream().ptr
        if stream != self.stream:
            self._check("cublasSetStream", self.library.cublasSetStream_v2(self.handle, stream))
            status = self.library.cublasSetWorkspace_v2(self.handle, self.workspace.data.ptr, WORKSPACE)
            self._check("cublasSetWorkspace", status)
            self.stream = stream

    @staticmethod
    def _check(call: str, status: int) -> None:
        if status:
            raise RuntimeError(f"{call} failed with cuBLAS status {status}")

"""The system below NumPy: the matrix library (BLAS), its threads, and the memory of the process."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

from threadpoolctl import ThreadpoolController

__all__ = ["keep_memory", "libraries", "limit", "threads"]


@functools.cache
def libraries() -> list[Any]:
    """threadpoolctl's controllers of the BLAS libraries that are loaded; [] if the system's BLAS cannot be controlled.
    """
    return [lib for lib in ThreadpoolController().lib_controllers if lib.user_api == "blas"]


def blas_function(library: Any, name: str) -> tuple[Any, bool]:
    """(a function of a BLAS library, as ctypes has it; True if its sizes have 64 bits). (None, False) without it.

    name    without the prefix and the suffix with which NumPy's and SciPy's wheels rename the functions
    """
    for prefix in ("scipy_", ""):
        for suffix in ("64_", "_64", ""):
            found = getattr(library.dynlib, f"{prefix}{name}{suffix}", None)
            if found is not None:
                return found, bool(suffix)
    return None, False


@functools.cache
def _thread_calls() -> list[tuple[Callable[[], int], Callable[[int], Any]]]:
    """(get, set) of the number of threads, for each BLAS library.

    OpenBLAS with threads of its own has one number for the process. Its functions are called directly: threadpoolctl
    changes the number from one thread of the program only, and takes ten times as long.
    """
    calls = []
    for library in libraries():
        get, set_ = library.get_num_threads, library.set_num_threads
        if library.internal_api == "openblas" and library.threading_layer == "pthreads":
            get = blas_function(library, "openblas_get_num_threads")[0] or get
            set_ = blas_function(library, "openblas_set_num_threads")[0] or set_
        calls.append((get, set_))
    return calls


def threads() -> int:
    """The number of threads of a matrix product now; 1 where it is not known."""
    return max((get() for get, _ in _thread_calls()), default=1)


def limit(n: int) -> None:
    """Let a matrix product use n threads."""
    for _, set_threads in _thread_calls():
        set_threads(n)


@functools.cache
def keep_memory() -> bool:
    """Let the C library keep freed memory for the next step (glibc only). True if it agreed.

    The first fit of a process calls it. By default every large array is a fresh mapping, whose pages the system must
    find and clear at each use: nearly half of a training step's time (tests/benchmarks/LOG.md). The process then holds
    on to the most memory it ever needed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not Linux, or not glibc
        return False
    trim_threshold = -1  # the parameters' numbers in glibc's malloc.h
    top_pad = -2
    mmap_max = -4
    # No array gets a mapping of its own; no memory is given back; the system is asked for 64 MB more than needed.
    return all([mallopt(mmap_max, 0), mallopt(trim_threshold, -1), mallopt(top_pad, 64 << 20)])

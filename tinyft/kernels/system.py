"""The system below NumPy: the matrix library, its threads, and the memory of the process."""
from __future__ import annotations

import ctypes
import functools
from typing import Any

from threadpoolctl import ThreadpoolController


@functools.cache
def libraries() -> list[Any]:
    """threadpoolctl's controllers of the BLAS libraries that are loaded; [] if the system's BLAS cannot be controlled.
    """
    return [lib for lib in ThreadpoolController().lib_controllers if lib.user_api == "blas"]


def threads() -> int:
    """The number of threads of a matrix product now; 1 where it is not known."""
    return max((lib.get_num_threads() for lib in libraries()), default=1)


def limit(n: int) -> None:
    """Let a matrix product use n threads."""
    for lib in libraries():
        lib.set_num_threads(n)


@functools.cache
def keep_memory() -> bool:
    """Let the C library keep freed memory for the next step (glibc only).  True if it agreed.

    The first fit of a process calls it.  By default every large array is a fresh mapping, whose pages the system must
    find and clear at each use: nearly half of a training step's time (tests/benchmarks/LOG.md).  The process then holds
    on to the most memory it ever needed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):         # not Linux, or not glibc
        return False
    trim_threshold = -1                                  # the parameters' numbers in glibc's malloc.h
    top_pad = -2
    mmap_max = -4
    # No array gets a mapping of its own; no memory is given back; the system is asked for 64 MB more than needed.
    return all([mallopt(mmap_max, 0), mallopt(trim_threshold, -1), mallopt(top_pad, 64 << 20)])

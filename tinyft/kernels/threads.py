"""Threads: their number, and the blocks of a kernel distributed over them.

NumPy's own loops run on one thread, but release the interpreter's lock.  Its matrix products run on the threads of its
BLAS.  `each` calls a Python function on several threads, and limits BLAS to one thread meanwhile: the two kinds of
threads never compete for the cores.  The calls are independent of each other.  Results therefore depend on the number
of threads only by the rounding of BLAS.
"""
from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from .. import checks
from ..keywords import checked_keywords
from . import system

BLOCK = 1 << 15                              # elements in a block on one thread: 128 kB of float32, half an L2 cache
SHARED_BLOCK = 1 << 17                       # elements in a block where threads share the work; smaller ones do not pay
MOST_THREADS = 1024                          # more is a mistake; BLAS has a limit of its own
_busy = threading.Lock()                     # held while `each` runs on several threads
_threads = 0                                 # 0: the number of BLAS's threads
_pool: tuple[int, int, ThreadPoolExecutor | None] = (0, 0, None)  # process, threads, the pool


@checked_keywords
def set_num_threads(n: int) -> None:
    """Use n threads, for matrix products and for everything else that is distributed.

    The default is the number of BLAS's threads (OPENBLAS_NUM_THREADS).  Results depend on it only by rounding.
    ValueError unless 1 <= n <= MOST_THREADS, TypeError unless n is a whole number.
    """
    global _threads
    n = checks.whole("set_num_threads: n", n, 1, MOST_THREADS)
    system.limit(n)
    _threads = n


def get_num_threads() -> int:
    """The number of threads in use."""
    global _threads
    _threads = _threads or system.threads()
    return _threads


def each(items: Iterable, f: Callable[[Any], None]) -> None:
    """Call f(item) for every item, on up to get_num_threads() threads.  The first exception of a call is raised.

    Meanwhile BLAS runs on one thread, so that the two kinds of threads do not compete for the cores."""
    items = list(items)
    blas_threads = system.threads()          # 1 inside `each`, and where threadpoolctl's limits say so
    n = min(get_num_threads(), blas_threads, len(items))                 # so `each` inside `each` runs on one thread
    # If another thread of the program is in `each`, run here, so that no more threads are used than asked for.
    if n < 2 or not _busy.acquire(blocking=False):
        for i in items:
            f(i)
        return
    rest = iter(items)                       # a list's iterator gives each item to one thread only

    def run() -> None:
        for i in rest:
            f(i)

    try:
        system.limit(1)
        others = [_workers(n - 1).submit(contextvars.copy_context().run, run) for _ in range(n - 1)]
        try:
            run()
        finally:
            wait(others)
        for o in others:
            o.result()                       # raises the exception of that thread
    finally:
        system.limit(blas_threads)
        _busy.release()


def blocks(n: int, f: Callable[[slice], None], width: int = 1) -> None:
    """Call f(slice) for slices that cover n rows of `width` elements.  f must not depend on their order.

    On one thread a block fits the cache.  On several threads a block is larger, to be worth handing to a thread; work
    of fewer than four such blocks stays on one thread.
    """
    is_shared = get_num_threads() > 1 and n * width >= 4 * SHARED_BLOCK
    elements = SHARED_BLOCK if is_shared else BLOCK
    step = max(elements // max(width, 1), 1)
    slices = [slice(i, min(i + step, n)) for i in range(0, n, step)]
    if is_shared:
        each(slices, f)
    else:
        for s in slices:
            f(s)


def _workers(n: int) -> ThreadPoolExecutor:
    """A pool of at least n threads in this process: a fork inherits the object, but not its threads."""
    global _pool
    pid, size, pool = _pool
    if pool is None or pid != os.getpid() or size < n:
        pool = ThreadPoolExecutor(n, "tinyft")
        _pool = (os.getpid(), n, pool)
    return pool

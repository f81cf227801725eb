"""Threads: how many, and the blocks of a kernel shared out between them.

NumPy's own loops run on one thread, but let go of the interpreter's lock; its matrix products run on as many threads as
its BLAS was told.  `each` uses the first fact where the second leaves cores idle, and never both at once: while work is
shared out, BLAS is held to one thread.  No item depends on another, so results do not depend on the number of threads
but by BLAS's rounding.
"""
from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from . import system

BLOCK = 1 << 15  # numbers in a block: 128 kB of float32, half of a small L2 cache
SHARE = 1 << 17  # numbers in a block that a thread is given: less, and they wait for each other
_busy = threading.Lock()
_threads = 0  # 0: what BLAS was told
_pool: tuple[int, int, ThreadPoolExecutor | None] = (0, 0, None)  # process, threads, the pool


def set_num_threads(n: int) -> None:
    """Use n threads, for matrix products and for what else is shared out.  At the start it is what BLAS was told
    (OPENBLAS_NUM_THREADS).

    Results depend on it only by rounding.  ValueError if n < 1.
    """
    global _threads
    if n < 1:
        raise ValueError(f"set_num_threads wants n >= 1, got {n}")
    system.limit(n)
    _threads = n


def get_num_threads() -> int:
    """How many threads are used."""
    global _threads
    _threads = _threads or system.threads()
    return _threads


def each(items: Iterable, f: Callable[[Any], None]) -> None:
    """f(item) for every item, on as many threads as there are to use."""
    # 1 inside `each`, and where threadpoolctl's limits say so
    items, told = list(items), system.threads()
    n = min(get_num_threads(), told, len(items))
    # another thread of the program shares out its work: no more threads than asked for
    if n < 2 or not _busy.acquire(blocking=False):
        for i in items:
            f(i)
        return
    rest = iter(items)  # a list's iterator gives each item to one thread only

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
            o.result()  # raises what was raised there
    finally:
        system.limit(told)
        _busy.release()


def blocks(n: int, f: Callable[[slice], None], width: int = 1) -> None:
    """f(slice) for n rows of `width` numbers, in blocks: on one thread as many as stay in the cache, on more as many as
    are worth the handing over.
    """
    shared = get_num_threads() > 1 and n * width >= 4 * SHARE
    step = max((SHARE if shared else BLOCK) // max(width, 1), 1)
    slices = [slice(i, min(i + step, n)) for i in range(0, n, step)]
    if shared:
        each(slices, f)
    else:
        for s in slices:
            f(s)


def _workers(n: int) -> ThreadPoolExecutor:
    """A pool of at least n threads, of this process: a fork has the object, but not the threads."""
    global _pool
    pid, size, pool = _pool
    if pool is None or pid != os.getpid() or size < n:
        pool = ThreadPoolExecutor(n, "tinyft")
        _pool = os.getpid(), n, pool
    return pool

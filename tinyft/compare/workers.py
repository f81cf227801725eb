"""Worker processes for the comparison: they end with their parent, and Ctrl-C reaches the parent alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from .. import array, kernels

__all__ = ["call", "finished", "one_interrupt", "workers"]


def call(pool: ProcessPoolExecutor | None, f: Callable, *arguments: Any) -> Any:
    """f(*arguments) in a worker, or here if there is no pool."""
    if pool is None:
        return f(*arguments)
    return pool.submit(f, *arguments).result()


def finished(pool: ProcessPoolExecutor | None, calls: Mapping[Hashable, Callable]) -> Iterator[tuple[Any, Any]]:
    """Run the calls {key: function without arguments}; yield (key, result) in the order in which they end.

    They run in the workers of the pool, or one after another in this process if there is none. If a worker is killed,
    the results that are there are yielded before BrokenProcessPool is raised.
    """
    if pool is None:
        for key, f in calls.items():
            yield key, f()
        return
    killed = None
    futures = {pool.submit(f): key for key, f in calls.items()}
    for future in as_completed(futures):
        try:
            result = future.result()
        except BrokenProcessPool as e:
            killed = e
            continue
        yield futures[future], result
    if killed is not None:
        raise killed


@contextmanager
def workers(jobs: int) -> Iterator[ProcessPoolExecutor | None]:
    """A pool of `jobs` processes with one thread each, so that they do not wait for each other; None for one job.

    If the `with` ends with an exception, the processes are killed at once: Ctrl-C does not wait for their runs.
    """
    if jobs == 1:
        kernels.keep_memory()  # as in a worker: freed memory is kept for the next step, which is faster
        yield None
        return
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, initializer=start_worker, initargs=(array.backend(),))
    try:
        with interrupts_delayed():  # the processes start here, so Ctrl-C never reaches them
            for _ in range(jobs):
                pool.submit(int)  # a call that does nothing; it starts a process
        yield pool
        pool.shutdown()
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        pool.shutdown(cancel_futures=True)
        raise


def start_worker(backend: str) -> None:
    """The first call in a worker process."""
    end_with_parent()
    array.use(backend)  # that of the parent, which may differ from TINYFT_BACKEND
    tqdm.set_lock(threading.RLock())  # tqdm's own lock is shared between processes: a killed worker leaks it
    kernels.set_num_threads(1)
    kernels.keep_memory()


def end_with_parent() -> None:
    """End this process when its parent is gone, however the parent ended.

    A parent that is killed cannot end its workers. They would train on, and hold the pipe that the parent printed to.
    """

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # the other threads may be in the middle of a step

    threading.Thread(target=wait, name="end with parent", daemon=True).start()


@contextmanager
def interrupts_delayed() -> Iterator[None]:
    """Ctrl-C has its effect at the end of the `with`. A process that starts inside never receives it.

    A terminal sends Ctrl-C to every process; only the parent shall act on it. Windows has no such mask.

    A process inherits the mask of the thread that starts it. But the mask does not protect this thread itself: the
    system gives the signal to another thread, one of the BLAS for example, and Python runs the handler in the main
    thread all the same. So the handler is replaced, too.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    came = []
    if is_main and handler is not None:
        signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if is_main and handler is not None:
            signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def one_interrupt() -> Iterator[None]:
    """The first Ctrl-C inside the `with` raises KeyboardInterrupt; later ones have no effect.

    So a second Ctrl-C cannot stop the work of ending the workers. Where Ctrl-C is ignored already (`nohup`), it stays
    so. Python can set this in the main thread only; in another thread nothing changes.
    """
    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or before is None or before == signal.SIG_IGN:
        yield
        return
    interrupted = False

    def interrupt(number: int, frame: Any) -> None:
        nonlocal interrupted
        if not interrupted:
            interrupted = True
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

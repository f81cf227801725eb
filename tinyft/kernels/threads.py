"""Threads: their number, and the work of a kernel or of a matrix product distributed over them.

    each(items, f)           f(item) for every item
    blocks(n, f, width)      f(slice) for slices that cover n rows
    product(a, b)            the matrix product a b; the threads share its rows or its columns
    shares(rows, ...)        the parts of an array that the threads compute

NumPy's loops run on one thread, but release the interpreter's lock, so that several Python threads run several of them
at once. The threads wait in a pool of this module.

NumPy's matrix products have threads of their own, those of its BLAS. OpenBLAS's idle threads spin for some time after
each product, on the core that our threads want. Therefore BLAS has one thread while our threads work
(`one_blas_thread`). Afterwards it has its former number again.

Other threads of the program do not change a result. If one of them is using the pool, the same parts are computed one
after another.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import threading
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from .. import checks
from ..keywords import checked_keywords
from . import system

__all__ = ["blocks", "each", "get_num_threads", "one_blas_thread", "parts", "product", "set_num_threads", "shares",
           "usable_threads"]

BLOCK = 1 << 15  # elements in a block on one thread: 128 kB of float32, half of a 256 kB L2 cache
SHARED_BLOCK = 1 << 17  # elements in a block where threads share the work: worth handing to a thread
SHARED_PRODUCT = 1 << 23  # multiplications from which the threads share a product (tests/benchmarks/LOG.md)
THREADED_PRODUCT = 1 << 18  # multiplications from which OpenBLAS would use its threads
MOST_THREADS = 1024  # a larger number is taken for a mistake; BLAS may use fewer
_threads = 0  # 0: the number of BLAS's threads


@checked_keywords
def set_num_threads(n: int) -> None:
    """Use n threads, for matrix products and for everything else that is distributed.

    The default is the number of BLAS's threads (OPENBLAS_NUM_THREADS). The number changes a result only by rounding.
    ValueError unless 1 <= n <= MOST_THREADS, TypeError unless n is a whole number.
    """
    global _threads
    n = checks.whole("set_num_threads: n", n, 1, MOST_THREADS)
    _blas.set_threads(n)
    _threads = n


def get_num_threads() -> int:
    """The number of threads in use."""
    global _threads
    _threads = _threads or _blas.threads()
    return _threads


def usable_threads() -> int:
    """The number of threads that a call may use here.

    It is 1 inside a call of `each`, whose threads are in use already. Outside it is at most the number that
    threadpoolctl allows BLAS.
    """
    if _here.inside:
        return 1
    if not system.libraries():
        return get_num_threads()
    return min(get_num_threads(), _blas.threads())


# ---------------------------------------------------------------------------------------------------- BLAS's threads
class _BLASThreads:
    """The number of BLAS's threads, and the holders: the calls that need this number to be 1.

    Several threads of the program may be holders at the same time. The first one saves the number; the last one gives
    it back. Whatever Ctrl-C interrupts here can be done again: each step leaves a state from which `give_back` goes on.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.holders: set[object] = set()
        self.saved = 1

    def threads(self) -> int:
        """The number that holds outside of the calls of this module."""
        with self.lock:
            return self.saved if self.holders else system.threads()

    def set_threads(self, n: int) -> None:
        """Let the number be n: at once, or when the last holder gives it back."""
        with self.lock:
            if self.holders:
                self.saved = n
            else:
                system.limit(n)

    def hold(self, holder: object) -> None:
        """One thread from now on."""
        with self.lock:
            is_first = not self.holders
            if is_first:
                self.saved = system.threads()
            self.holders.add(holder)
            if is_first and self.saved > 1:
                system.limit(1)

    def give_back(self, holder: object) -> None:
        """The end of `hold`; nothing for one that holds nothing."""
        with self.lock:
            if self.holders == {holder} and self.saved > 1:
                system.limit(self.saved)
            self.holders.discard(holder)


class _OneThread:
    """with _OneThread(): BLAS has one thread."""

    def __enter__(self) -> None:
        try:
            _blas.hold(self)
        except BaseException:
            _blas.give_back(self)
            raise

    def __exit__(self, *_: object) -> None:
        try:
            _blas.give_back(self)
        except BaseException:  # Ctrl-C
            _blas.give_back(self)
            raise


class _Here(threading.local):
    """The state of one thread. inside: it runs a part of a call of `each`."""

    inside = False


_blas = _BLASThreads()
_here = _Here()


def one_blas_thread() -> contextlib.AbstractContextManager[None]:
    """with one_blas_thread(): a matrix product uses one thread, in all threads of the program."""
    return _OneThread()


def one_blas_thread_from(multiplications: int) -> contextlib.AbstractContextManager[None]:
    """one_blas_thread(), for products of so many multiplications. Nothing if BLAS has one thread for them anyway."""
    if multiplications < THREADED_PRODUCT or usable_threads() == 1:
        return contextlib.nullcontext()
    return _OneThread()


# ---------------------------------------------------------------------------------------------------- the pool
POSTED, DONE = 1, 2  # the rows of a thread's `state`, which is explained in kernels/compiled/waiting.py


class _Thread:
    """A thread that waits for jobs: a number, and the arguments of `do`.

    state    its numbers of posted and of finished jobs
    """

    def __init__(self) -> None:
        self.queue: SimpleQueue = SimpleQueue()
        self.state = np.zeros((4, 16), np.int64)
        self.jobs = 0  # the number of the last job
        threading.Thread(target=self.serve, name="tinyft", daemon=True).start()

    def give(self, *job: Any) -> None:
        """Let the thread do a job."""
        self.jobs += 1
        self.queue.put((self.jobs, job))
        self.state[POSTED, 0] = self.jobs

    def serve(self) -> None:
        """Do the jobs, without end."""
        _here.inside = True
        while True:
            number, job = self.queue.get()
            self.do(*job)
            del job  # it holds arrays
            if _waiting is not None:
                _waiting.wait_for_job(self.state, number)

    @staticmethod
    def do(context: contextvars.Context, work: Callable, errors: list, ended: SimpleQueue) -> None:
        """work(), with these context variables. None, or the exception, is added to `errors`."""
        error = None
        try:
            context.run(work)
        except BaseException as caught:
            error = caught
        errors.append(error)
        ended.put(None)  # wakes the thread that waits


_waiting: Any = None  # the module kernels/compiled/waiting.py, where Numba runs


def wait_without_sleep(module: Any) -> None:
    """From now on threads wait a millisecond for one another before they sleep, by the functions of this module.

    Work is handed over in a fourth of the time, so that smaller products are worth it.
    """
    global _waiting, SHARED_PRODUCT
    _waiting = module
    SHARED_PRODUCT = 1 << 22


class _Pool:
    """Threads that wait for work.

    users    the call of `each` that uses the threads, under the key 0
    """

    def __init__(self) -> None:
        self.users: dict[int, object] = {}
        self.threads: list[_Thread] = []

    def take(self, call: object) -> bool:
        """True if the threads now belong to this call; False if they belong to another one."""
        return self.users.setdefault(0, call) is call

    def leave(self, call: object) -> None:
        """The end of `take`; nothing for a call that has no threads."""
        if self.users.get(0) is call:
            del self.users[0]

    def run(self, n: int, work: Callable[[], None]) -> None:
        """work() on n threads at once, of which this thread is one.

        An exception is raised when all have ended, that of this thread first. Ctrl-C does not end the wait: the threads
        write into arrays of this call. There are fewer threads if the system refuses to start more. They have this
        thread's context variables, such as np.errstate.
        """
        self.start(n - 1)
        ended: SimpleQueue = SimpleQueue()
        errors: list[BaseException | None] = []  # one for each thread that has ended
        begun: list[_Thread] = []
        try:
            for thread in self.threads[: n - 1]:
                thread.give(contextvars.copy_context(), work, errors, ended)
                begun.append(thread)
            work()
        finally:
            _wait(begun, errors, ended)
        for error in errors:
            if error is not None:
                raise error

    def start(self, n: int) -> None:
        """Start threads until there are n."""
        while len(self.threads) < n:
            try:
                self.threads.append(_Thread())
            except RuntimeError:  # a limit of the system, or the interpreter ends
                return


def _wait(begun: list[_Thread], errors: list, ended: SimpleQueue) -> None:
    """Return when these threads have ended. Ctrl-C is raised then."""
    interrupt = None
    while True:
        try:
            if _waiting is not None:
                for thread in begun:
                    _waiting.wait_until_done(thread.state, thread.jobs)
            while len(errors) < len(begun):
                with contextlib.suppress(Empty):
                    ended.get(timeout=1)  # Ctrl-C may have taken what woke this thread
            break
        except KeyboardInterrupt as caught:
            interrupt = caught
    if interrupt is not None:
        raise interrupt


_pool = _Pool()


def _after_fork() -> None:
    """Begin anew in the child of a fork: it has none of the threads, and nobody there gives BLAS's threads back."""
    global _blas, _pool
    if _blas.holders:
        system.limit(_blas.saved)
    _blas = _BLASThreads()
    _pool = _Pool()
    _here.inside = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# ---------------------------------------------------------------------------------------------------- shared work
def each(items: Iterable, f: Callable[[Any], None], most: int = MOST_THREADS) -> None:
    """Call f(item) for every item, on up to usable_threads() threads and at most `most`.

    Meanwhile BLAS has one thread. The calls must not depend on their order. An exception of a call is raised at the
    end, after the other threads have finished the items.
    """
    items = list(items)
    usable = usable_threads()
    if usable == 1:
        for item in items:
            f(item)
        return
    rest = iter(items)  # a list's iterator gives each item to one thread only

    def work() -> None:
        before, _here.inside = _here.inside, True
        try:
            for item in rest:
                f(item)
        finally:
            _here.inside = before

    n = min(usable, len(items), most)
    pool = _pool
    call = object()
    with one_blas_thread():
        try:
            if n > 1 and pool.take(call):
                pool.run(n, work)
            else:  # one item, or another thread of the program uses the pool
                work()
        finally:
            pool.leave(call)


def blocks(n: int, f: Callable[[slice], None], width: int = 1) -> None:
    """Call f(slice) for slices that cover n rows of `width` elements. f must not depend on their order.

    On one thread a block fits the cache. On several threads a block is larger, to be worth handing to a thread; work
    of fewer than four such blocks stays on one thread.
    """
    is_shared = usable_threads() > 1 and n * width >= 4 * SHARED_BLOCK
    elements = SHARED_BLOCK if is_shared else BLOCK
    step = max(elements // max(width, 1), 1)
    each([slice(i, min(i + step, n)) for i in range(0, n, step)], f, MOST_THREADS if is_shared else 1)


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The matrix product a b, (M, K) and (K, N) -> (M, N).

    The threads share the rows of the result, or its columns if it has more columns. Each part is a product by BLAS on
    one thread. Products of fewer than SHARED_PRODUCT multiplications are not shared.
    """
    M, K = a.shape
    N = b.shape[1]
    multiplications = M * K * N
    n = usable_threads()
    if n == 1 or multiplications < THREADED_PRODUCT:
        return a @ b
    if multiplications < SHARED_PRODUCT or max(M, N) < n:
        with one_blas_thread():
            return a @ b
    out = np.empty((M, N), np.result_type(a, b))

    def rows(part: slice) -> None:
        np.matmul(a[part], b, out=out[part])

    def columns(part: slice) -> None:
        np.matmul(a, b[:, part], out=out[:, part])

    each(parts(max(M, N), n), rows if M >= N else columns)
    return out


def shares(rows: int, width: int, least: int) -> list[slice]:
    """The parts of `rows` rows of `width` elements that the threads compute: one for each thread, or one for all rows.

    Fewer than `least` elements stay on one thread. The parts depend on the sizes and on the number of threads, not on
    what other threads of the program do.
    """
    n = usable_threads() if rows * width >= least else 1
    return parts(rows, min(n, max(rows, 1)))


def parts(length: int, n: int) -> list[slice]:
    """n slices that cover `length`, as equal as they can be."""
    ends = [length * i // n for i in range(n + 1)]
    return [slice(start, stop) for start, stop in zip(ends, ends[1:])]

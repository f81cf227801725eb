"""Short waits of the threads in kernels/threads.py for one another, without a sleep.

A thread that sleeps needs some 50 µs to go on: its core sleeps, too. These functions ask again and again instead. They
are compiled since they must not hold the interpreter's lock: the other thread wants it.

    state    (4, 16) int64, of one thread of the pool. state[POSTED, 0] counts the jobs that it got, state[DONE, 0]
             those that it has finished. A processor moves memory between cores in pieces of 64 or 128 bytes, a row.
             The first and the last row keep other data away: a thread that writes near a number which another asks for
             is slowed down
"""

from __future__ import annotations

import ctypes

from numba import types

from ..threads import DONE, POSTED
from .compiler import add_symbol, boolean, compiled, int64

__all__ = ["is_available", "wait_for_job", "wait_until_done"]

State = types.int64[:, ::1]
ASKS = 4000  # most questions of one wait: one or two milliseconds
DELAY = 16  # further ones after a job was posted: about 7 µs (tests/benchmarks/LOG.md)

try:
    _sched_yield = ctypes.CDLL(None).sched_yield
    add_symbol("tinyft_sched_yield", ctypes.cast(_sched_yield, ctypes.c_void_p).value)
except (AttributeError, OSError, TypeError):  # Windows
    is_available = False
else:
    is_available = True
# It lets other processes have the core. LLVM must assume that it changes memory, and so reads `state` again.
sched_yield = types.ExternalFunction("tinyft_sched_yield", types.int32())


@compiled
def wait_for_job(state: State, jobs: int64) -> None:
    """Say that this thread has finished its job number `jobs`. Then wait for the next one, about a millisecond at most.

    The thread that posts a job holds the interpreter's lock, until its own part of the work has begun. DELAY is the
    time for this. Who asks for a lock that is held is sent to sleep.
    """
    state[DONE, 0] = jobs
    asks = 0
    while state[POSTED, 0] == jobs and asks < ASKS:
        sched_yield()
        asks += 1
    if state[POSTED, 0] != jobs:
        for _ in range(DELAY):
            sched_yield()


@compiled
def wait_until_done(state: State, jobs: int64) -> boolean:
    """Wait until a thread has finished its job number `jobs`: True; False after about a millisecond."""
    for _ in range(ASKS):
        if state[DONE, 0] == jobs:
            return True
        sched_yield()
    return False

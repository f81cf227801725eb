"""Threads wait for one another without a sleep: a wait ends at once when it should, and also when nothing comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from helpers import rejects, wrong_answers

import tinyft
from tinyft import array, kernels
from tinyft.kernels import threads

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(array.backend() != "numpy", reason="these kernels are for NumPy arrays")

from tinyft.kernels.compiled import waiting  # noqa: E402  # it imports Numba

if not waiting.is_available:
    pytest.skip("this system has no sched_yield", allow_module_level=True)
POSTED, DONE = threads.POSTED, threads.DONE


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = tinyft.get_num_threads()
    kernels.compiled_kernels()
    tinyft.set_num_threads(2)
    yield
    tinyft.set_num_threads(before)


def new_state() -> np.ndarray:
    return np.zeros_like(threads._Thread().state)


def test_no_other_data_lie_near_the_counters():
    """128 bytes before and after them are theirs."""
    state = new_state()
    assert state.strides == (128, 8) and sorted([0, POSTED, DONE, len(state) - 1]) == [0, 1, 2, 3]


def check_waits(wait_for_job: Callable, wait_until_done: Callable) -> None:
    """Both waits end by themselves, at once if there is nothing to wait for, and when another thread writes."""
    state = new_state()
    assert wait_until_done(state, 1) is False, "nobody finished"
    wait_for_job(state, 1)  # it returns, though no job comes
    assert state[DONE, 0] == 1 and state[POSTED, 0] == 0
    assert wait_until_done(state, 1) is True
    found: list[bool] = []
    state = new_state()
    thread = threading.Thread(target=lambda: found.append(until(partial(wait_until_done, state, 5))))
    thread.start()
    time.sleep(0.005)
    state[DONE, 0] = 5
    thread.join(20)
    assert found == [True]


def until(ask: Callable[[], bool], seconds: float = 2.0) -> bool:
    """True as soon as ask() is; False after some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if ask():
            return True
    return False


def test_both_waits():
    check_waits(waiting.wait_for_job, waiting.wait_until_done)


def says_nothing(state: np.ndarray, jobs: int) -> None:
    """A thread that does not say that it has finished."""


def never_done(state: np.ndarray, jobs: int) -> bool:
    return False


def always_done(state: np.ndarray, jobs: int) -> bool:
    return True


def reads_once(state: np.ndarray, jobs: int, seen: dict = {}) -> bool:  # noqa: B006
    """The wait of a compiler that moves the read out of the loop."""
    return seen.setdefault(id(state), int(state[DONE, 0])) == jobs


@wrong_answers
@pytest.mark.parametrize("wrong", [never_done, always_done, reads_once])
def test_wrong_waits_are_noticed(wrong):
    assert rejects(lambda: check_waits(waiting.wait_for_job, wrong))


@wrong_answers
def test_a_thread_that_says_nothing_is_noticed():
    assert rejects(lambda: check_waits(says_nothing, waiting.wait_until_done))


def counts_while(call: Callable[[], Any]) -> int:
    """How far another Python thread counts while call() runs."""
    count, is_over = 0, False

    def run() -> None:
        nonlocal is_over
        for _ in range(20):
            call()
        is_over = True

    thread = threading.Thread(target=run)
    thread.start()
    while not is_over:
        count += 1
    thread.join(20)
    return count


def test_who_waits_does_not_hold_the_lock_of_the_interpreter():
    state = new_state()
    assert counts_while(lambda: waiting.wait_until_done(state, 1)) > 1000


def test_an_idle_thread_goes_to_sleep():
    """After a millisecond or two. A thread that waited on would take all the time of a core."""
    threads.each(range(4), lambda i: time.sleep(0.001))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


def test_a_thread_that_slept_does_the_next_job():
    for pause in (0.0, 0.0005, 0.002, 0.02):
        who: set[int] = set()
        barrier = threading.Barrier(2, timeout=20)
        time.sleep(pause)
        threads.each(range(2), lambda i, barrier=barrier, who=who: (barrier.wait(), who.add(threading.get_ident())))
        assert len(who) == 2


def test_a_job_of_any_length_is_waited_for():
    """Also if it takes longer than a wait does, and if this thread takes longer."""
    for mine, theirs in ((0.0, 0.0), (0.0, 0.02), (0.02, 0.0), (0.0, 0.0015)):
        done: list[int] = []
        barrier = threading.Barrier(2, timeout=20)

        def part(i: int, barrier: Any = barrier, done: list = done, mine: float = mine, theirs: float = theirs) -> None:
            barrier.wait()
            time.sleep(mine if threading.current_thread() is threading.main_thread() else theirs)
            done.append(i)

        threads.each(range(2), part)
        assert sorted(done) == [0, 1]


def test_a_number_of_jobs_that_ctrl_c_made_wrong_is_right_again():
    threads.each(range(2), lambda i: None)
    [thread, *_] = threads._pool.threads
    thread.jobs += 3  # Ctrl-C before the job was in the queue
    for _ in range(3):
        done: list[int] = []
        threads.each(range(4), done.append)
        assert sorted(done) == list(range(4))
    assert until(lambda: thread.state[DONE, 0] == thread.jobs)

"""Work shared out between threads: all of it once, no more threads than asked for, and the same results."""
from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl
from helpers import rejects, wrong_answers

import tinyft
from tinyft import GPT, AdamW, GPTConfig, array, dispatch, fit, get_num_threads, kernels, set_num_threads
from tinyft.compare import workers as compare_workers
from tinyft.kernels import attention as tiled
from tinyft.kernels import numpy as fast
from tinyft.kernels import system, threads

pytestmark = pytest.mark.skipif(array.backend() != "numpy", reason="threads are for NumPy arrays")


@pytest.fixture(autouse=True)
def as_before():
    n = get_num_threads()
    yield
    set_num_threads(n)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("items", [0, 1, 2, 7, 100])
def test_every_item_is_done_once_on_at_most_n_threads(n, items):
    set_num_threads(n)
    done, at_once, most, lock = [], 0, 0, threading.Lock()

    def work(i: int) -> None:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        np.ones(1000).sum()
        with lock:
            done.append(i)
            at_once -= 1
    threads.each(range(items), work)
    assert sorted(done) == list(range(items)) and at_once == 0 and most <= n


def test_both_threads_work_and_blas_has_one_meanwhile():
    set_num_threads(2)
    barrier, seen = threading.Barrier(2, timeout=20), []

    def work(i: int) -> None:
        barrier.wait()  # passes only if two threads are here
        seen.append((threading.get_ident(), system.threads()))
    threads.each([0, 1], work)
    assert len({who for who, _ in seen}) == 2
    if system.libraries():
        assert {n for _, n in seen} == {1} and system.threads() == 2


def test_limits_set_by_others_hold():
    if not system.libraries():
        pytest.skip("this BLAS cannot be asked for its threads")
    set_num_threads(2)
    who: set[int] = set()
    with threadpoolctl.threadpool_limits(1):
        threads.each(range(8), lambda i: who.add(threading.get_ident()))
        assert system.threads() == 1
    assert who == {threading.get_ident()} and system.threads() == 2


@pytest.mark.parametrize("where", range(4))
def test_an_error_comes_out_and_the_threads_are_given_back(where):
    set_num_threads(2)

    def work(i: int) -> None:
        if i == where:
            raise ZeroDivisionError(i)
    with pytest.raises(ZeroDivisionError):
        threads.each(range(4), work)
    assert not threads._pool.users and (system.threads() == 2 or not system.libraries())
    threads.each(range(4), lambda i: None)


def test_sharing_inside_sharing_and_from_two_threads_at_once_is_no_deadlock():
    set_num_threads(2)
    done: list = []

    def inner(i):
        threads.each(range(3), lambda j: done.append((i, j)))

    others = [threading.Thread(target=threads.each, args=(range(10 * k, 10 * k + 4), inner)) for k in range(3)]
    for t in others:
        t.start()
    for t in others:
        t.join(20)
    assert len(done) == len(set(done)) == 36 and not threads._pool.users


@pytest.mark.parametrize("n, width",
                         [(0, 1), (1, 1), (10, 0), (threads.BLOCK * 3 + 1, 1), (4 * threads.SHARED_BLOCK + 7, 1),
                          (5000, 300), (3, threads.SHARED_BLOCK * 2)])
@pytest.mark.parametrize("many", [1, 2])
def test_blocks_cover_the_rows(n, width, many):
    set_num_threads(many)
    got: list[slice] = []
    threads.blocks(n, got.append, width)
    rows = sorted((s.start, s.stop) for s in got)
    assert [r for a, b in rows for r in range(a, b)] == list(range(n))


def test_warnings_are_told_apart_as_in_the_caller():
    """np.errstate of the caller holds in the workers too."""
    set_num_threads(2)
    barrier = threading.Barrier(2, timeout=20)

    def work(i: int) -> None:
        barrier.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.float32(1) / np.zeros(1, np.float32)
    with np.errstate(divide="ignore"):
        threads.each([0, 1], work)
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        threads.each([0, 1], work)


@pytest.mark.parametrize("n", [0, -1])
def test_no_threads_is_no_number_of_threads(n):
    with pytest.raises(ValueError, match="n wants a whole number from 1"):
        set_num_threads(n)


def curve(n: int) -> np.ndarray:
    set_num_threads(n)
    model, rng = GPT(GPTConfig(50, 40, 32, 2, 4), seed=0), np.random.default_rng(0)
    return np.array(fit(model, list(rng.integers(0, 50, (3, 8, 33))), 12, AdamW(1e-2), progress=False).losses)


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch):
    for name, size in (("BLOCK", 64), ("SHARED_BLOCK", 200)):
        monkeypatch.setattr(threads, name, size)
    monkeypatch.setattr(tiled, "TILE", 1 << 11)
    one, two, three = curve(1), curve(2), curve(3)
    assert np.allclose(one, two, rtol=1e-5)
    assert np.allclose(one, three, rtol=1e-5)
    assert one[-1] < one[0] - 0.3


def test_sharing_is_used_where_it_pays(monkeypatch):
    used: list[int] = []

    def each(items: list, f: Callable, most: int) -> None:
        used.extend([len(items)] if most > 1 else [])
        for i in items:
            f(i)

    monkeypatch.setattr(threads, "each", each)
    x = np.ones((1024, 1024), np.float32)
    for n, there in ((1, False), (2, True)):
        set_num_threads(n)
        used.clear()
        fast.gelu_tanh(x)
        assert bool(used) == there
        fast.gelu_tanh(x[:100])
        assert len(used) == there


def test_at_the_start_it_is_what_blas_was_told():
    if not system.libraries():
        pytest.skip("this BLAS cannot be asked for its threads")
    code = ("import tinyft as t; print(t.get_num_threads()); t.set_num_threads(3); "
            "print(t.get_num_threads(), t.kernels.system.threads())")
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(Path(tinyft.__file__).parents[1])}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True,
                         check=True).stdout.split()
    assert out[:2] == ["1", "3"] and int(out[2]) <= 3


FORK = """
import os, tinyft
from tinyft.kernels import threads
tinyft.set_num_threads(2)
threads.each(range(4), lambda i: None)
pid = os.fork()
done = []
threads.each(range(4), done.append)
if not pid:
    os._exit(sorted(done) != [0, 1, 2, 3])
print(os.waitpid(pid, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_finds_threads_of_its_own():
    env = os.environ | {"PYTHONPATH": str(Path(tinyft.__file__).parents[1])}
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], env=env, capture_output=True, text=True,
                         timeout=60)
    assert out.stdout.strip() == "0", out.stderr


# ---------------------------------------------------------------------------------------------------- training
KERNELS = ["numpy", "numba"] if kernels.has_numba() else ["numpy"]


@pytest.fixture(params=KERNELS)
def both_kernels(request):
    """With the kernels for NumPy alone, and with the compiled ones in front of them."""
    before = {key: list(found) for key, found in dispatch.KERNELS.items()}
    kernels.remove()
    kernels.install(request.param)
    yield request.param
    dispatch.KERNELS.clear()
    dispatch.KERNELS.update(before)


def sizes_that_are_shared(seed: int = 0) -> GPT:
    """A model whose products, norms, activations and updates are shared between threads."""
    return GPT(GPTConfig(vocab=500, positions=64, width=128, layers=1, heads=4), seed=seed)


def train(seed: int, steps: int = 3) -> list:
    """The losses, and the weights at the end."""
    rng = np.random.default_rng(seed)
    model = sizes_that_are_shared(seed)
    history = fit(model, list(rng.integers(0, 500, (3, 8, 65))), steps, AdamW(1e-2), progress=False)
    return [history.losses, *(p.numpy().copy() for p in model.parameters())]


def at_once(calls: list[Callable[[], list]]) -> list[list]:
    """The results of the calls, each in a thread of its own."""
    results: list = [None] * len(calls)
    begin = threading.Barrier(len(calls), timeout=60)

    def call(i: int) -> None:
        begin.wait()
        results[i] = calls[i]()

    others = [threading.Thread(target=call, args=(i,)) for i in range(len(calls))]
    for t in others:
        t.start()
    for t in others:
        t.join(120)
    return results


def check_runs_at_once() -> None:
    calls = [functools.partial(train, seed) for seed in range(3)]
    alone = [call() for call in calls]
    for got, right in zip(at_once(calls), alone):
        assert got is not None and len(got) == len(right)
        assert all(np.array_equal(a, b) for a, b in zip(got, right))


def test_three_runs_at_once_have_the_bits_of_one_after_another(both_kernels):
    set_num_threads(2)
    check_runs_at_once()
    assert not threads._pool.users and not threads._blas.holders
    assert system.threads() == 2 or not system.libraries()


@wrong_answers
def test_results_that_depend_on_other_threads_are_caught(monkeypatch):
    """A sum that is rounded in another way while another thread computes one, too."""
    set_num_threads(2)
    in_use = threading.Lock()
    right = threads.product

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if not in_use.acquire(blocking=False):
            return right(a, b) * np.float32(1 + 1e-6)
        try:
            return right(a, b)
        finally:
            in_use.release()

    monkeypatch.setattr(fast, "product", product)
    with dispatch.only(lambda kernel: kernel.__module__ == fast.__name__):
        assert rejects(check_runs_at_once)


# ---------------------------------------------------------------------------------------------------- BLAS's threads
class Stop(Exception):
    """An error of the user's."""


def raising(error: BaseException) -> Callable:
    def f(*_: Any, **__: Any) -> None:
        raise error

    return f


def calls_of_users(model: GPT) -> dict[str, Callable]:
    """Public calls, and some that a user's error or Ctrl-C ends in the middle."""
    ids = np.random.default_rng(0).integers(0, 500, (8, 65))

    def broken_batches(error: BaseException) -> Any:
        yield ids
        raise error

    def broken_part(error: BaseException) -> None:
        threads.each(range(4), raising(error))

    return {
        "fit": lambda: fit(model, [ids], 2, progress=False),
        "evaluate": lambda: tinyft.evaluate(model, [ids]),
        "generate": lambda: tinyft.generate(model, ids[:2, :5], 3),
        "set_num_threads": lambda: set_num_threads(2),
        "an error of a batch": lambda: fit(model, broken_batches(Stop()), 3, progress=False),
        "Ctrl-C in a batch": lambda: fit(model, broken_batches(KeyboardInterrupt()), 3, progress=False),
        "an error of a part": lambda: broken_part(Stop()),
        "Ctrl-C in a part": lambda: broken_part(KeyboardInterrupt()),
        "an error of a shape": lambda: model(ids[:, :, None]),
    }


def check_given_back(call: Callable) -> None:
    """BLAS has two threads after the call, as before, also for a product of the user's own."""
    set_num_threads(2)
    with contextlib.suppress(Stop, KeyboardInterrupt, ValueError, TypeError):
        call()
    assert system.threads() == 2 and not threads._blas.holders and not threads._pool.users
    who: set[int] = set()
    barrier = threading.Barrier(2, timeout=20)
    threads.each([0, 1], lambda i: (barrier.wait(), who.add(threading.get_ident())))
    assert len(who) == 2 and system.threads() == 2


@pytest.mark.skipif(not system.libraries(), reason="this BLAS cannot be asked for its threads")
def test_blas_has_its_threads_again_after_every_call(both_kernels):
    for call in calls_of_users(sizes_that_are_shared()).values():
        check_given_back(call)


@pytest.mark.skipif(not system.libraries(), reason="this BLAS cannot be asked for its threads")
def test_blas_has_its_threads_in_a_loss_of_the_users_own():
    set_num_threads(2)
    seen = []

    class Own(tinyft.CrossEntropy):
        def __call__(self, *arguments: Any, **keywords: Any) -> Any:
            seen.append(system.threads())
            return super().__call__(*arguments, **keywords)

    fit(sizes_that_are_shared(), [np.ones((2, 9), int)], 2, loss=Own(), progress=False)
    assert seen == [2, 2]


def interrupted(f: Callable, when: str, at: int) -> Callable:
    """f, with a KeyboardInterrupt before or after its call number `at`. when: "before" or "after"."""
    calls = []

    def call(*arguments: Any) -> Any:
        calls.append(arguments)
        if when == "before" and len(calls) == at:
            raise KeyboardInterrupt
        result = f(*arguments)
        if when == "after" and len(calls) == at:
            raise KeyboardInterrupt
        return result

    return call


PLACES = [(name, when, at) for name, at in (("threads", 1), ("limit", 1), ("limit", 2)) for when in ("before", "after")]


def check_interrupt(name: str, when: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(system, name, interrupted(getattr(system, name), when, at))
        with pytest.raises(KeyboardInterrupt), threads.one_blas_thread():
            pass
    check_given_back(lambda: None)
    assert system.threads() == 2


@pytest.mark.skipif(not system.libraries(), reason="this BLAS cannot be asked for its threads")
@pytest.mark.parametrize("name, when, at", PLACES)
def test_ctrl_c_while_the_number_of_threads_is_changed(name, when, at, monkeypatch):
    set_num_threads(2)
    check_interrupt(name, when, at, monkeypatch)


class Unguarded:
    """A wrong way: Ctrl-C in the middle leaves BLAS with one thread."""

    def __enter__(self) -> None:
        threads._blas.hold(self)

    def __exit__(self, *_: object) -> None:
        threads._blas.give_back(self)


@wrong_answers
@pytest.mark.skipif(not system.libraries(), reason="this BLAS cannot be asked for its threads")
def test_threads_that_ctrl_c_takes_away_are_noticed(monkeypatch):
    set_num_threads(2)
    monkeypatch.setattr(threads, "_OneThread", Unguarded)
    assert rejects(lambda: check_interrupt("limit", "after", 1, monkeypatch))
    threads._blas.holders.clear()
    set_num_threads(2)


@pytest.mark.skipif(not system.libraries(), reason="this BLAS cannot be asked for its threads")
def test_a_number_set_while_another_thread_holds_blas_comes_into_force_afterwards():
    set_num_threads(2)
    with threads.one_blas_thread():
        other = threading.Thread(target=set_num_threads, args=(1,))
        other.start()
        other.join(20)
        assert system.threads() == 1 and get_num_threads() == 1
    assert system.threads() == 1
    with threads.one_blas_thread():
        set_num_threads(2)
        assert system.threads() == 1
    assert system.threads() == 2


def test_a_system_that_starts_no_more_threads(monkeypatch):
    monkeypatch.setattr(threads, "_pool", threads._Pool())
    monkeypatch.setattr(threading.Thread, "start", raising(RuntimeError("can't start new thread")))
    set_num_threads(3)
    done: list[int] = []
    threads.each(range(7), done.append)
    assert sorted(done) == list(range(7)) and not threads._pool.threads


CTRL_C = """
import os, signal, threading, time
import tinyft
from tinyft.kernels import system, threads
tinyft.set_num_threads(2)
signal.signal(signal.SIGINT, signal.default_int_handler)
barrier = threading.Barrier(2, timeout=60)

def part(i):
    barrier.wait()
    if threading.current_thread() is threading.main_thread():
        while True:
            time.sleep(0.01)  # until the signal comes
    else:
        os.kill(os.getpid(), signal.SIGINT)

for _ in range(3):
    try:
        threads.each(range(2), part)
    except KeyboardInterrupt:
        print("interrupted")
    done = []
    threads.each(range(2), lambda i: (barrier.wait(), done.append(i)))  # passes only on two threads
    print(sorted(done), len(threads._pool.threads), system.threads() if system.libraries() else 2)
"""


CTRL_C_IN_THE_WAIT = """
import os, signal, threading, time
import tinyft
from tinyft.kernels import threads
tinyft.set_num_threads(2)
signal.signal(signal.SIGINT, signal.default_int_handler)
barrier = threading.Barrier(2, timeout=60)
written = []

def part(i):
    barrier.wait()
    if threading.current_thread() is not threading.main_thread():
        for _ in range(3):
            time.sleep(0.1)  # the main thread waits now
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        written.append(i)

try:
    threads.each(range(2), part)
except KeyboardInterrupt:
    print("interrupted", len(written), len(threads._pool.users))
"""
LOSES_THE_WAIT = """
from tinyft.kernels import threads
threads._wait = lambda begun, errors, ended: [ended.get() for _ in begun]
"""


def run_python(code: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(Path(tinyft.__file__).parents[1])}
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True,
                          timeout=120)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="another Ctrl-C on this system")
def test_ctrl_c_in_a_part_leaves_the_threads_as_they_were():
    done = run_python(CTRL_C)
    assert done.stdout == "interrupted\n[0, 1] 1 2\n" * 3, done


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="another Ctrl-C on this system")
def test_ctrl_c_while_threads_still_write_waits_for_them():
    assert run_python(CTRL_C_IN_THE_WAIT).stdout == "interrupted 1 0\n"
    assert run_python(LOSES_THE_WAIT + CTRL_C_IN_THE_WAIT).stdout == "interrupted 0 0\n", "a wrong way is noticed"


FORK_AND_TRAIN = """
import os, sys
sys.path.insert(0, {tests!r})
import numpy as np
import tinyft
from test_threads import train
from tinyft.kernels import system, threads
tinyft.set_num_threads(2)
first = train(0)
if {held}:
    import threading
    held, end = threading.Event(), threading.Event()
    def hold():
        with threads.one_blas_thread():
            held.set()
            end.wait()
    other = threading.Thread(target=hold)
    other.start()
    held.wait()
pid = os.fork()
if pid and {held}:
    end.set()
    other.join()
again = train(0)
same = all(np.array_equal(a, b) for a, b in zip(first, again))
given_back = not system.libraries() or system.threads() == 2
if not pid:
    os._exit(0 if same and given_back else 1)
print(same, given_back, os.waitpid(pid, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("held", [False, True], ids=["after training", "while another thread holds BLAS"])
def test_both_processes_of_a_fork_train(held):
    done = run_python(FORK_AND_TRAIN.format(tests=str(Path(__file__).parent), held=held))
    assert done.stdout.strip() == "True True 0", done


# ---------------------------------------------------------------------------------------------------- workers
def report_worker() -> tuple:
    """(threads, BLAS's threads, kernels, losses and weights) in a worker process."""
    return get_num_threads(), system.threads(), kernels.in_use(), train(1, 2)


def test_a_worker_of_compare_uses_one_thread_and_the_same_kernels():
    set_num_threads(1)
    right = train(1, 2)
    set_num_threads(2)
    with compare_workers.workers(2) as pool:
        found = [pool.submit(report_worker) for _ in range(2)]
        results = [future.result(timeout=120) for future in found]
    for n, of_blas, in_use, trained in results:
        assert (n, of_blas, in_use) == (1, 1, kernels.in_use())
        assert all(np.array_equal(a, b) for a, b in zip(trained, right))

"""Work shared out between threads: all of it once, no more threads than asked for, and the same results."""
from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl

import tinyft
from tinyft import GPT, AdamW, GPTConfig, array, fit, get_num_threads, set_num_threads
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
    assert not threads._pool.busy.locked() and (system.threads() == 2 or not system.libraries())
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
    assert len(done) == len(set(done)) == 36 and not threads._pool.busy.locked()


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

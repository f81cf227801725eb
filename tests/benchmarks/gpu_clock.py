"""Time on a device: work is queued, so a clock read means nothing until the device is waited for.

Mostly it is wall-clock time around calls enough to fill some hundredths of a second, with a wait at each end: the same for CuPy and PyTorch.
`device` alone leaves the host out, for kernels that take less time than their launch.
In a smoke run (no GPU) everything runs once or twice, and what is checked must be right.
"""
from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import cupy as cp
import numpy as np
from paired import ratio

__all__ = ["Clock", "Missing", "Row", "Work", "fresh", "ratio"]
Row = dict[str, Any]
Work = Iterator[tuple[str, Callable[[], Row]]]           # of a section: (what, how to measure it), one for each row
CACHE = 256 << 20                                        # bytes: several times an H200's second-level cache


class Missing(Exception):
    "What would be measured is not installed, or not written yet."


def fresh() -> None:
    "Give the memory of what is gone back to the device."
    gc.collect()
    cp.get_default_memory_pool().free_all_blocks()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.empty_cache()


class Clock:
    "smoke: no GPU, tiny sizes."

    def __init__(self, smoke: bool):
        self.smoke, self.rates = smoke, {}

    def size(self, real: Any, smoke: Any) -> Any:
        return smoke if self.smoke else real

    def check(self, right: bool) -> bool:
        "A check: written into the row; in a smoke run an error."
        if self.smoke and not right:
            raise AssertionError("what was computed is wrong")
        return bool(right)

    def copies(self, nbytes: int) -> int:
        "How many copies of something to take in turns, so that none is in the cache when its turn comes."
        return 2 if self.smoke else max(1, min(64, CACHE // max(nbytes, 1)))

    def run(self, f: Callable[[], Any], n: int) -> tuple[float, float]:
        "Seconds of a call, n of them together: until the device is done, and until the host is."
        wait = cp.cuda.Device().synchronize
        wait()
        since = time.perf_counter()
        for _ in range(n):
            f()
        host = time.perf_counter()
        wait()
        return (time.perf_counter() - since) / n, (host - since) / n

    def calls(self, f: Callable[[], Any], seconds: float) -> int:
        "How many calls fill that time, once it is warm."
        if self.smoke:
            return 1
        for _ in range(3):
            f()
        return max(1, min(1000, round(seconds / self.run(f, 3)[0])))

    def best(self, f: Callable[[], Any]) -> float:
        "The median of seven visits of a fiftieth of a second: seconds of a call."
        n = self.calls(f, 0.02)
        return statistics.median(self.run(f, n)[0] for _ in range(self.size(7, 1)))

    def device(self, f: Callable[[], Any]) -> float:
        """Seconds of a call on the device alone: calls are queued behind long copies, so that the host is ahead all the time, and timed
        between two events.  The median of seven."""
        n = min(20, self.calls(f, 0.005))
        ahead = self.run(f, n)[1] * n
        a, times = cp.zeros(self.size(1 << 28, 1000), np.float32), []
        b = cp.empty_like(a)
        for _ in range(self.size(7, 1)):
            first, last, since = cp.cuda.Event(), cp.cuda.Event(), time.perf_counter()
            for _ in range(2 + int(2 * ahead * self.copy_rate() / (2 * a.nbytes))):
                cp.copyto(b, a)
            first.record()
            for _ in range(n):
                f()
            last.record()
            last.synchronize()
            times.append((time.perf_counter() - since if self.smoke else cp.cuda.get_elapsed_time(first, last) / 1e3) / n)
        return statistics.median(times)

    def host(self, f: Callable[[], Any]) -> float:
        "Seconds until a call returns, though the device may not be done: the median of five visits of at most 200 calls."
        n = min(200, self.calls(f, 0.02))
        return statistics.median(self.run(f, n)[1] for _ in range(self.size(5, 1)))

    def turns(self, sides: dict[str, Callable[[], Any]], rounds: int = 9, seconds: float = 0.1) -> Iterator[dict[str, float]]:
        "Rounds of {side: seconds of a call}.  The order turns from round to round, and a side's first call does not count."
        n = {name: self.calls(f, seconds) for name, f in sides.items()}
        names = list(sides)
        for i in range(self.size(rounds, 2)):
            times = {}
            for name in names[i % len(names):] + names[:i % len(names)]:
                sides[name]()
                times[name] = self.run(sides[name], n[name])[0]
            yield times

    def copy_rate(self) -> float:
        "Bytes per second of a copy, read and written ones counted."
        if "copy" not in self.rates:                     # of a large one, whose launch costs nothing beside it
            a = cp.zeros(self.size(1 << 28, 1000), np.float32)
            b = cp.empty_like(a)
            self.rates["copy"] = 2 * a.nbytes / self.best(lambda: cp.copyto(b, a))
        return self.rates["copy"]

    def product_rate(self, how: str) -> float:
        "Multiplications and additions per second of a large product in this precision, which must be in force."
        if how not in self.rates:
            from tinyft.array import bfloat16
            from tinyft.kernels.cuda import gemm
            n = self.size(8192, 16)
            a = cp.asarray(np.random.default_rng(0).standard_normal((n, n), np.float32)).astype(bfloat16 if how == "bf16" else np.float32)
            self.rates[how] = 2 * n**3 / self.best(lambda: gemm.matmul(a, a))
        return self.rates[how]

    def peak(self, f: Callable[[], Any], n: int) -> tuple[int, int]:
        "(the most bytes in use at once during n calls, what CuPy's pool held from the device for them), what was there before included."
        pool = cp.get_default_memory_pool()
        pool.free_all_blocks()

        class Watch(cp.cuda.MemoryHook):
            name, most = "peak", pool.used_bytes()

            def malloc_postprocess(self, **about: Any) -> None:
                self.most = max(self.most, pool.used_bytes())
        with Watch() as watch:
            for _ in range(n):
                f()
        return watch.most, pool.total_bytes()

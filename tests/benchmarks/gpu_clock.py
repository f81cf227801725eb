"""Time on a device: work is queued, so a clock says nothing until the program waits for the device.

Most durations are wall-clock time around enough calls to fill some hundredths of a second, with a wait at each end;
CuPy and PyTorch are measured in the same way. `device` leaves out the host, for kernels shorter than their launch.
In a smoke run (no GPU) everything runs once or twice, and its checks must hold.
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
Work = Iterator[tuple[str, Callable[[], Row]]]  # a section's rows: (name, function that measures it)
CACHE = 256 << 20  # bytes: several times an H200's second-level cache


class Missing(Exception):
    """The library to be measured is not installed."""


def fresh() -> None:
    """Return unused memory to the device."""
    gc.collect()
    cp.get_default_memory_pool().free_all_blocks()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.empty_cache()


class Clock:
    """Durations and rates on the device.  smoke: no GPU, tiny sizes."""

    def __init__(self, smoke: bool):
        self.smoke = smoke
        self.rates: dict[str, float] = {}

    def size(self, real: Any, smoke: Any) -> Any:
        """The first on a device, the second in a smoke run."""
        return smoke if self.smoke else real

    def check(self, right: bool) -> bool:
        """The result of a check, for the row. AssertionError in a smoke run if it is False."""
        if self.smoke and not right:
            raise AssertionError("the computed result is wrong")
        return bool(right)

    def copies(self, nbytes: int) -> int:
        """The number of copies of an array to use in turn, so that none is in the cache when its turn comes."""
        return 2 if self.smoke else max(1, min(64, CACHE // max(nbytes, 1)))

    def run(self, f: Callable[[], Any], n: int) -> tuple[float, float]:
        """Seconds per call of n calls: until the device is done, and until the host is."""
        wait = cp.cuda.Device().synchronize
        wait()
        since = time.perf_counter()
        for _ in range(n):
            f()
        host = time.perf_counter()
        wait()
        return (time.perf_counter() - since) / n, (host - since) / n

    def calls(self, f: Callable[[], Any], seconds: float) -> int:
        """The number of calls that fill this time, after warming up."""
        if self.smoke:
            return 1
        for _ in range(3):
            f()
        return max(1, min(1000, round(seconds / self.run(f, 3)[0])))

    def best(self, f: Callable[[], Any]) -> float:
        """Seconds of a call: the median of seven visits of a fiftieth of a second."""
        n = self.calls(f, 0.02)
        return statistics.median(self.run(f, n)[0] for _ in range(self.size(7, 1)))

    def device(self, f: Callable[[], Any]) -> float:
        """Seconds of a call on the device alone: the median of seven.

        Calls are queued behind long copies, so that the host is always ahead, and timed between two events.
        """
        n = min(20, self.calls(f, 0.005))
        _, host_seconds = self.run(f, n)
        a = cp.zeros(self.size(1 << 28, 1000), np.float32)
        b = cp.empty_like(a)
        copies = 2 + int(2 * host_seconds * n * self.copy_rate() / (2 * a.nbytes))
        times = []
        for _ in range(self.size(7, 1)):
            first = cp.cuda.Event()
            last = cp.cuda.Event()
            since = time.perf_counter()
            for _ in range(copies):
                cp.copyto(b, a)
            first.record()
            for _ in range(n):
                f()
            last.record()
            last.synchronize()
            if self.smoke:
                seconds = time.perf_counter() - since
            else:
                seconds = cp.cuda.get_elapsed_time(first, last) / 1e3
            times.append(seconds / n)
        return statistics.median(times)

    def host(self, f: Callable[[], Any]) -> float:
        """Seconds until a call returns, whether or not the device is done: the median of five visits."""
        n = min(200, self.calls(f, 0.02))
        return statistics.median(self.run(f, n)[1] for _ in range(self.size(5, 1)))

    def turns(
        self, sides: dict[str, Callable[[], Any]], rounds: int = 9, seconds: float = 0.1
    ) -> Iterator[dict[str, float]]:
        """Rounds of {side: seconds of a call}.  The order rotates; a side's first call does not count."""
        n = {name: self.calls(f, seconds) for name, f in sides.items()}
        names = list(sides)
        for i in range(self.size(rounds, 2)):
            times = {}
            for name in names[i % len(names):] + names[:i % len(names)]:
                sides[name]()
                times[name] = self.run(sides[name], n[name])[0]
            yield times

    def copy_rate(self) -> float:
        """Bytes per second of a large copy; read and written bytes both count."""
        if "copy" not in self.rates:
            a = cp.zeros(self.size(1 << 28, 1000), np.float32)
            b = cp.empty_like(a)
            self.rates["copy"] = 2 * a.nbytes / self.best(lambda: cp.copyto(b, a))
        return self.rates["copy"]

    def product_rate(self, how: str) -> float:
        """Multiplications and additions per second of a large product. The precision must be in force."""
        if how not in self.rates:
            from tinyft.array import bfloat16
            from tinyft.kernels.cuda import gemm
            n = self.size(8192, 16)
            dtype = bfloat16 if how == "bf16" else np.float32
            a = cp.asarray(np.random.default_rng(0).standard_normal((n, n), np.float32)).astype(dtype)
            self.rates[how] = 2 * n**3 / self.best(lambda: gemm.matmul(a, a))
        return self.rates[how]

    def peak(self, f: Callable[[], Any], n: int) -> tuple[int, int]:
        """(most bytes in use during n calls, bytes that CuPy's pool held for them); earlier arrays count as well."""
        pool = cp.get_default_memory_pool()
        pool.free_all_blocks()

        class Watch(cp.cuda.MemoryHook):
            name = "peak"
            most = pool.used_bytes()

            def malloc_postprocess(self, **about: Any) -> None:
                self.most = max(self.most, pool.used_bytes())

        with Watch() as watch:
            for _ in range(n):
                f()
        return watch.most, pool.total_bytes()

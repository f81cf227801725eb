"""Sides of one case, each in its own process, measured in rounds. A ratio is always of two times of the same round."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cases import Case

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
LIBRARY_VARIABLES = (
    *("TINYFT_", "OPENBLAS_", "NPY_", "NUMBA_"),
    *("ATEN_", "MKL_", "OMP_", "KMP_", "DNNL_", "ONEDNN_"),
    *("JAX_", "XLA_"),
)


class Side:
    """A worker process.  `run(n)` gives the median seconds of n steps.

    Every library runs with its own defaults: variables that configure it are removed from the environment, except the
    number of threads. `tree` is the working tree whose tinyft is imported.
    """

    def __init__(
        self,
        kind: str,
        case: Case,
        threads: int,
        label: str = "",
        env: dict[str, str] | None = None,
        arguments: Sequence[str] = (),
        tree: Path = ROOT,
    ):
        self.name = label or kind
        environment = {k: v for k, v in os.environ.items() if not k.startswith(LIBRARY_VARIABLES)}
        environment |= dict.fromkeys(THREAD_VARIABLES, str(threads))
        environment |= {"CPU_COUNT": str(threads), "PYTHONPATH": str(tree)}
        environment |= env or {}
        command = [sys.executable, str(HERE / "worker.py"), kind, json.dumps(case.as_dict()), str(threads), *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=tree
        )
        self.about = self.read()

    def read(self) -> Any:
        """The next line of the worker. RuntimeError if the worker ended."""
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self.process.wait()}")
        return json.loads(line)

    def run(self, n: int) -> float:
        """Median seconds of n steps."""
        self.process.stdin.write(f"{n}\n")
        self.process.stdin.flush()
        return statistics.median(self.read())

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def rounds(sides: Sequence[Side], n: int, seconds: float = 0.25, pause: float = 0.05) -> Iterator[dict[str, float]]:
    """n rounds of {side: seconds of a step}.  The order rotates from round to round.

    seconds   time of one visit to a side: it takes as many steps as fit, 2 to 200
    pause     before each visit, since idle BLAS threads of the previous side spin for a while
    """
    steps = {side.name: max(2, min(200, round(seconds / side.run(2)))) for side in sides}
    for i in range(n):
        first = i % len(sides)
        times = {}
        for side in [*sides[first:], *sides[:first]]:
            time.sleep(pause)
            times[side.name] = side.run(steps[side.name])
        yield times


def memory(name: str, case: Case, threads: int = 1) -> dict[str, int]:
    """The growth of a new process while it takes three steps (worker.growth)."""
    with Side(name, case, threads, arguments=["memory"]) as side:
        return side.about


def peak(name: str, case: Case, threads: int = 1) -> dict[str, int]:
    """The largest memory of a new process while it takes three steps (worker.peak)."""
    with Side(name, case, threads, arguments=["peak"]) as side:
        return side.about


def ratio(rows: list[dict[str, float]], of: str, to: str) -> dict[str, float]:
    """The median over rounds of time(of) / time(to), with its quartiles.  Above 1: `to` is faster."""
    return summary([row[of] / row[to] for row in rows])


def equal_products(torch: float, torch_products: float, numpy_products: float, tinyft: float) -> float:
    """(torch - torch_products + numpy_products) / tinyft: PyTorch's time over tinyft's with the products of NumPy.

    All are seconds of one round. torch and tinyft: a step of the library. torch_products and numpy_products: only the
    matrix products of the step.
    """
    return (torch - torch_products + numpy_products) / tinyft


def summary(ratios: Sequence[float]) -> dict[str, float]:
    """{ratio: median, low and high: quartiles, rounds: count} of ratios."""
    if len(ratios) == 1:
        low = middle = high = ratios[0]
    else:
        low, middle, high = statistics.quantiles(ratios, n=4)
    return {"ratio": middle, "low": low, "high": high, "rounds": len(ratios)}

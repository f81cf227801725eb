"""Taking turns: sides of one case, each in its own process, measured in rounds; ratios are of one round, never of two."""
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
LIMITS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


class Side:
    """A worker process.  `run(n)` gives the median seconds of n steps.

    Each library runs as its wheels choose: variables that steer it are taken out of the environment, but for the number of threads."""

    def __init__(self, kind: str, case: Case, threads: int, label: str = "", env: dict[str, str] | None = None, more: Sequence[str] = ()):
        self.name = label or kind
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("OPENBLAS_", "MKL_", "OMP_", "KMP_", "DNNL_", "TINYFT_"))}
        clean |= dict.fromkeys(LIMITS, str(threads)) | {"CPU_COUNT": str(threads), "PYTHONPATH": str(HERE.parents[1])} | (env or {})
        self.process = subprocess.Popen([sys.executable, str(HERE / "worker.py"), kind, json.dumps(case.as_dict()), str(threads), *more],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean)
        self.about = self.read()

    def read(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self.process.wait()}")
        return json.loads(line)

    def run(self, n: int) -> float:
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
    "n rounds of {side: seconds of a step}.  The order turns from round to round; each visit takes some `seconds`."
    steps = {s.name: max(2, min(200, round(seconds / s.run(2)))) for s in sides}
    for i in range(n):
        times = {}
        for s in [*sides[i % len(sides):], *sides[:i % len(sides)]]:
            time.sleep(pause)                            # idle BLAS threads of the last side spin for a while
            times[s.name] = s.run(steps[s.name])
        yield times


def memory(name: str, case: Case, threads: int = 1) -> dict[str, int]:
    "How far a process of its own grows while it takes three steps (worker.growth)."
    with Side(name, case, threads, more=["memory"]) as side:
        return side.about


def ratio(rows: list[dict[str, float]], of: str, to: str) -> dict[str, float]:
    "The median over rounds of time(of) / time(to), with its quartiles.  Above 1: `to` is the faster."
    r = sorted(row[of] / row[to] for row in rows)
    low, mid, high = statistics.quantiles(r, n=4) if len(r) > 1 else (r[0],) * 3
    return {"ratio": mid, "low": low, "high": high, "rounds": len(r)}

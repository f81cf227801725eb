"""One side of one case in its own process:  python worker.py SIDE CASE THREADS [memory | peak]

It builds, takes three steps and prints a line of JSON about them. Then it reads numbers from standard input: for each
number n it takes n steps and prints their seconds. Between two numbers it is idle. So sides can take turns on one
machine without sharing threads, memory or caches.

With the argument "memory" it prints the growth of the process during three steps, and ends. With "peak" it prints the
largest memory of the whole process during three steps, weights and libraries included.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType

from cases import Case


def resident(field: str) -> int:
    """VmRSS (resident memory) or VmHWM (its maximum), in bytes. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


def growth(side: ModuleType, model: object, case: Case) -> dict[str, int]:
    """Peak bytes above the model alone during the first three steps.

    The optimiser's two moments, 8 bytes for each trained parameter, are subtracted: every side has them, but some
    libraries create them before the first step and some in it.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    step, trained = side.start(model, case)
    for _ in range(3):
        step()
    return {"bytes": resident("VmHWM") - before - 8 * trained, "trained": trained}


def peak(side: ModuleType, model: object, case: Case) -> dict[str, int]:
    """Peak bytes of the whole process during the first three steps. Loading the model, before, does not count."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    step, trained = side.start(model, case)
    for _ in range(3):
        step()
    return {"bytes": resident("VmHWM"), "trained": trained}


def time_steps(step, count: int) -> list[float]:
    """Seconds of each of `count` steps, after one step that is not counted: another process used caches and cores."""
    step()
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    name, case_json, threads, *mode = sys.argv[1:]
    side = importlib.import_module(f"side_{name}")
    case = Case(**json.loads(case_json))
    if hasattr(side, "threads"):
        side.threads(int(threads))
    model = side.build(case)
    if mode == ["memory"]:
        print(json.dumps(growth(side, model, case)), flush=True)
        return
    if mode == ["peak"]:
        print(json.dumps(peak(side, model, case)), flush=True)
        return
    step, trained = side.start(model, case)
    losses = [step() for _ in range(3)]
    package = getattr(sys.modules.get("tinyft"), "__file__", None)
    print(json.dumps({"losses": losses, "trained": trained, "package": package}), flush=True)
    for line in sys.stdin:
        print(json.dumps(time_steps(step, int(line))), flush=True)


if __name__ == "__main__":
    main()

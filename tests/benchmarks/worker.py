"""One side of one case in a process of its own:  python worker.py SIDE CASE THREADS

It builds, warms up and says so; then, for every line with a number n on its standard input, it runs n steps and answers with
their seconds.  Between the lines it does nothing, so sides can take turns on one machine without sharing threads, memory or caches.

With a fourth argument "memory" it says how far the process grew above the model alone while it took three steps, and ends.
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


def resident(what: str) -> int:
    "VmRSS or VmHWM (the most there was), in bytes.  Linux only."
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))


def growth(side: ModuleType, model: object, case: Case) -> dict[str, int]:
    """Bytes above the model alone, at most, during the first three steps.  The optimiser's two moments, 8 bytes a trained number, are
    taken off: every side has them, but one makes them before the first step and another in it."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")        # VmHWM starts again
    before = resident("VmRSS")
    step, trained = side.start(model, case)
    for _ in range(3):
        step()
    return {"bytes": resident("VmHWM") - before - 8 * trained, "trained": trained}


def main() -> None:
    side, case, threads = importlib.import_module(f"side_{sys.argv[1]}"), Case(**json.loads(sys.argv[2])), int(sys.argv[3])
    if hasattr(side, "threads"):
        side.threads(threads)
    model = side.build(case)
    if sys.argv[4:] == ["memory"]:
        return print(json.dumps(growth(side, model, case)), flush=True)
    step, trained = side.start(model, case)
    losses = [step() for _ in range(3)]
    print(json.dumps({"losses": losses, "trained": trained}), flush=True)
    for line in sys.stdin:
        step()                                           # the caches and the cores belonged to somebody else
        times = []
        for _ in range(int(line)):
            since = time.perf_counter()
            step()
            times.append(time.perf_counter() - since)
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main()

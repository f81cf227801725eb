"""Peak memory and seconds of LoRA steps, in a process of their own: the peak of a process never falls.

    python -m tinyft.real.memory '{"settings": ...}'      prints one line of JSON
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, replace
from typing import Any

from .demo import Settings, open_model, prepare, train

STEPS = 3


def measure(s: Settings, packed: bool) -> dict[str, Any]:
    """{"peak_bytes", "step_seconds", "packed"} of loading and training in a new process. RuntimeError if it fails."""
    settings = asdict(replace(s, packed=packed, steps=STEPS, evaluate_every=0))
    command = [sys.executable, "-m", "tinyft.real.memory", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the measurement of memory failed with exit status {done.returncode}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(argument: str) -> None:
    """Train for some steps with the given settings, and print the peak memory of this process in bytes."""
    s = Settings(**json.loads(argument))
    model, tokenizer = open_model(s)
    task, batches, _ = prepare(s, model, tokenizer)
    start = time.perf_counter()
    train(s, model, batches, evaluate=None, progress=False)
    seconds = (time.perf_counter() - start) / s.steps
    print(json.dumps({"packed": s.packed, "peak_bytes": peak_memory(), "step_seconds": round(seconds, 2)}))


def peak_memory() -> int:
    """The peak of this process's resident memory in bytes.

    Linux counts the memory of the process that started this one in `ru_maxrss`, so its own record is read there."""
    try:
        with open("/proc/self/status", encoding="ascii") as f:
            [line] = [line for line in f if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024  # kB
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


if __name__ == "__main__":
    main(sys.argv[1])

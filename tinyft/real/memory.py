"""Peak memory and seconds of LoRA steps, in a process of their own: the peak of a process never falls.

    python -m tinyft.real.memory tune --model ...      runs `tinyft tune`, and prints one line of JSON
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..cli import parser
from .demo import TUNE, Settings, tune_arguments

STEPS = 3


def measure(s: Settings, out: Path, packed: bool) -> dict[str, Any]:
    """{"packed", "peak_bytes", "step_seconds"} of `tinyft tune` in a new process, with the examples in `out`.

    The seconds are those of the fastest step. RuntimeError if the process fails.
    """
    short = replace(s, packed=packed, steps=STEPS, evaluate_every=0)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        arguments = tune_arguments(short, out)
        arguments[arguments.index("--out") + 1] = f"{folder}/{TUNE}"
        command = [sys.executable, "-m", "tinyft.real.memory", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"the measurement of memory failed with exit status {done.returncode}: {last}")
        log = (Path(folder) / TUNE / "log.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = min(json.loads(line)["seconds"] for line in log)
    return {"packed": packed, "peak_bytes": json.loads(done.stdout)["peak_bytes"], "step_seconds": seconds}


def main(arguments: list[str]) -> None:
    """Run a command of `tinyft`, and print the peak memory of this process."""
    args = parser().parse_args(arguments)
    with contextlib.redirect_stdout(sys.stderr):
        args.run(args)
    print(json.dumps({"peak_bytes": peak_memory()}))


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
    main(sys.argv[1:])

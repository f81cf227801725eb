"""make bench-gpu: tinyft on a GPU, beside CuPy and PyTorch in the same run.  One script, one call, under ten minutes on an H200.

    python tests/benchmarks/gpu.py [--out FOLDER] [--only kernels,int4] [--minutes 9.5]
    python tests/benchmarks/gpu.py --smoke          no GPU: emulated CuPy (tests/emulated), tiny sizes, every check on, results in a temporary folder

It writes gpu.md and gpu.json (default: tests/benchmarks/results), again after each row, so that a call that is cut short leaves what it had.
What is measured is in gpu_sections.py and gpu_steps.py.  Each section is a process of its own, with a limit: a kernel that goes wrong
spoils the whole process it runs in, and no other.  What fails is written down, and the rest goes on; the exit status is 1 if anything failed.

It needs CuPy; torch, and peft for LoRA beside it, where they are installed.  Nothing is fetched.  On a machine whose own python3 has all that:

    PYTHONPATH=. python3 tests/benchmarks/gpu.py --out "$OUT"                        the first call: this
    PYTHONPATH=. TINYFT_BACKEND=cupy python3 -m pytest tests --ignore=tests/peers -rs         the second: make test-gpu
    and, for reads and writes out of bounds, and races between threads, which no test on a CPU sees:
    export PYTHONPATH=. TINYFT_BACKEND=cupy CUPY_CACHE_DIR=/tmp/cupy; for tool in memcheck racecheck initcheck; do
      compute-sanitizer --tool $tool --error-exitcode 9 python3 -m pytest tests/test_cuda.py -k "definition and not any_shape" -rs; done
    CUPY_ACCELERATORS= against the default (cub) tells what CuPy's reductions gain; ncu --clock-control none looks into one kernel.

What it decides: captured steps that are not eager's are dropped; elementwise kernels below 3 TB/s are vectorised; 16-bit activations are
worth their trouble if bf16 products pass 600 TFLOP/s; CuPy's row sums are replaced where `overhead` shows them slow.
"""
from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_report

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
LIMITS = {"environment": 60, "bandwidth": 60, "agreement": 90, "kernels": 120, "int4": 60, "lesson": 120, "gpt2": 150, "lora": 120, "products": 90,
          "overhead": 60, "memory": 90, "compiled": 240}                         # seconds; in the order of what matters most


def child(name: str, smoke: bool) -> list[str]:
    return [sys.executable, str(HERE / "gpu.py"), "--section", name, *["--smoke"] * smoke]


def run_section(command: list[str], limit: float, log: Path, new_row: Callable[[dict], None]) -> str | None:
    "Run it and hand on each row it prints, a line of JSON.  None if it came to its end, else what went wrong.  What it says besides goes to `log`."
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]), "PYTHONUNBUFFERED": "1"}
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=env, start_new_session=True)
        late, done = threading.Event(), False

        def stop() -> None:
            late.set()
            end(process)
        timer = threading.Timer(max(limit, 1), stop)
        timer.start()
        try:
            for line in process.stdout:
                if line.startswith('{"done"'):
                    done = True
                    break                                # what it started, such as compilers, may hold the pipe open
                if line.startswith("{"):
                    new_row(json.loads(line))
        finally:
            timer.cancel()
            if not done:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
            end(process)
            process.stdout.close()
    if done:
        return None
    last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"stopped after {limit:.0f} s" if late.is_set() else f"ended with {process.returncode}: {last[-1][:300] if last else 'and said nothing'}"


def end(process: subprocess.Popen) -> None:
    "The process and all that it started."
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Results:
    "What was measured so far, written to gpu.json and gpu.md whenever it changes."

    def __init__(self, out: Path):
        self.out, self.all = out, {"date": datetime.date.today().isoformat(), "sections": {}}
        out.mkdir(parents=True, exist_ok=True)

    def write(self) -> None:
        for name, text in (("gpu.json", json.dumps(self.all, indent=1) + "\n"), ("gpu.md", gpu_report.report(self.all))):
            part = self.out / f"{name}.part"
            part.write_text(text, encoding="utf-8")
            os.replace(part, self.out / name)

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[dict]:
        since, s = time.perf_counter(), {"rows": [], "error": None, "seconds": 0.0}
        self.all["sections"][name] = s
        yield s
        s["seconds"] = round(time.perf_counter() - since, 1)
        self.write()

    def failures(self) -> list[str]:
        out = [f"{n}: {s['error']}" for n, s in self.all["sections"].items() if s["error"]]
        return out + [f"{n}, {r.get('what', '')}: {r['error']}" for n, s in self.all["sections"].items() for r in s["rows"] if "error" in r]


def measure(names: list[str], out: Path, smoke: bool, minutes: float, command: Callable[[str, bool], list[str]] = child) -> list[str]:
    "Every section in turn.  Returns what failed."
    results, until = Results(out), time.monotonic() + 60 * minutes
    for name in names:
        with results.section(name) as s:
            def new_row(row: dict, s: dict = s, name: str = name) -> None:
                s["rows"].append(row)
                print(f"{name:12}", gpu_report.line(row), flush=True)
                results.write()
            left = until - time.monotonic()
            s["error"] = "not begun: no time was left" if left < 5 else run_section(
                command(name, smoke), min(left, LIMITS.get(name, 60) * (5 if smoke else 1)), out / f"gpu-{name}.log", new_row)
            print(f"{name:12} {s['error'] or 'done'}", flush=True)
    return results.failures()


def one_section(name: str, smoke: bool) -> None:
    "In the child: the section's rows, one line each."
    rows_to, sys.stdout = sys.stdout, sys.stderr         # whatever prints by itself goes to the log
    if smoke:
        sys.path.insert(0, str(HERE.parent / "emulated"))
        import emulate
        emulate.install()
    import gpu_sections
    for row in gpu_sections.rows(name, smoke):
        print(json.dumps(row, default=float), file=rows_to, flush=True)
    print('{"done": true}', file=rows_to, flush=True)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path)
    p.add_argument("--only", help=f"some sections, separated by commas: {', '.join(LIMITS)}")
    p.add_argument("--minutes", type=float, default=9.5, help="what is not begun by then is left out")
    p.add_argument("--smoke", action="store_true", help="emulated CuPy and tiny sizes")
    p.add_argument("--section", choices=LIMITS, help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    if a.section:
        one_section(a.section, a.smoke)
        return 0
    names = a.only.split(",") if a.only else list(LIMITS)
    if wrong := [n for n in names if n not in LIMITS]:
        p.error(f"there is no section {wrong[0]!r}; there are {', '.join(LIMITS)}")
    out: Any = a.out or (Path(tempfile.mkdtemp(prefix="gpu-smoke-")) if a.smoke else RESULTS)
    if a.smoke and out.resolve() == RESULTS:
        p.error("a smoke run measures nothing: it does not write to the results")
    if not a.smoke:
        from tinyft import array
        if reason := array.why_no_cupy():
            print(f"no benchmark without a device: {reason}", file=sys.stderr)
            return 1
    failed = measure(names, out, a.smoke, a.minutes * (5 if a.smoke else 1))
    print(f"{out / 'gpu.md'}\n" + "".join(f"FAILED {f}\n" for f in failed), end="")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

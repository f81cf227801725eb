"""make bench-gpu: tinyft on a GPU, beside CuPy and PyTorch in the same run. One call, under ten minutes on an H200.

    python tests/benchmarks/gpu.py [--out FOLDER] [--only kernels,int4] [--minutes 9.5]
    python tests/benchmarks/gpu.py --smoke          no GPU: emulated CuPy (tests/emulated), tiny sizes, every check on,
                                                    results in a temporary folder

It writes gpu.md and gpu.json (default: tests/benchmarks/results) after each row, so that an interrupted call leaves its
rows. gpu_sections.py and gpu_steps.py hold the measurements. Each section is a process of its own with a time limit: a
wrong kernel can spoil only the process in which it runs. Failures are written down, and the next section runs; the exit
status is 1 if anything failed.

It needs CuPy, and uses torch, and peft for LoRA, where they are installed. Nothing is downloaded. On a machine whose
python3 has these packages:

    PYTHONPATH=. python3 tests/benchmarks/gpu.py --out "$OUT"                               first: this script
    PYTHONPATH=. TINYFT_BACKEND=cupy python3 -m pytest tests --ignore=tests/peers -rs       second: make test-gpu
    and, for reads and writes out of bounds and for races between threads, which no test on a CPU can find:
    export PYTHONPATH=. TINYFT_BACKEND=cupy CUPY_CACHE_DIR=/tmp/cupy; for tool in memcheck racecheck initcheck; do
      compute-sanitizer --tool $tool --error-exitcode 9 \\
        python3 -m pytest tests/test_cuda.py -k "definition and not any_shape" -rs; done
    CUPY_ACCELERATORS= against the default (cub) shows the gain in CuPy's reductions; ncu --clock-control none
    profiles one kernel.

Its results decide: captured steps that differ from eager steps are dropped; elementwise kernels below 3 TB/s are
vectorised; 16-bit activations are worth their trouble if bf16 products pass 600 TFLOP/s; CuPy's row sums are replaced
where `overhead` shows them slow.
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

import gpu_report

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
# seconds for each section; the most important section first
LIMITS = {
    "environment": 60,
    "bandwidth": 60,
    "agreement": 90,
    "kernels": 120,
    "int4": 60,
    "lesson": 120,
    "gpt2": 150,
    "lora": 120,
    "products": 90,
    "overhead": 60,
    "memory": 90,
    "compiled": 240,
}


def child(name: str, smoke: bool) -> list[str]:
    """The command of a section's process."""
    command = [sys.executable, str(HERE / "gpu.py"), "--section", name]
    return [*command, "--smoke"] if smoke else command


def run_section(command: list[str], limit: float, log: Path, new_row: Callable[[dict], None]) -> str | None:
    """Run a section's process and pass each row that it prints (a line of JSON) to `new_row`.

    Returns None if it completed, else a description of the failure. Standard error goes to `log`.
    """
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env, start_new_session=True
        )
        late = threading.Event()
        done = False

        def stop() -> None:
            late.set()
            end(process)

        timer = threading.Timer(max(limit, 1), stop)
        timer.start()
        try:
            for line in process.stdout:
                if line.startswith('{"done"'):
                    done = True
                    break  # child processes, such as compilers, may hold the pipe open
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
    if late.is_set():
        return f"stopped after {limit:.0f} s"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1][:300] if lines else "and said nothing"
    return f"ended with {process.returncode}: {last}"


def end(process: subprocess.Popen) -> None:
    """Kill the process and all its children."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Results:
    """The results so far, written to gpu.json and gpu.md whenever they change."""

    def __init__(self, out: Path):
        self.out = out
        self.all = {"date": datetime.date.today().isoformat(), "sections": {}}
        out.mkdir(parents=True, exist_ok=True)

    def write(self) -> None:
        """Write both files, each in one step."""
        files = {"gpu.json": json.dumps(self.all, indent=1) + "\n", "gpu.md": gpu_report.report(self.all)}
        for name, text in files.items():
            part = self.out / f"{name}.part"
            part.write_text(text, encoding="utf-8")
            os.replace(part, self.out / name)

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[dict]:
        """A new section, to be filled inside the `with`."""
        start = time.perf_counter()
        section = {"rows": [], "error": None, "seconds": 0.0}
        self.all["sections"][name] = section
        yield section
        section["seconds"] = round(time.perf_counter() - start, 1)
        self.write()

    def failures(self) -> list[str]:
        """The failed sections, then the failed rows."""
        sections = self.all["sections"]
        failed = [f"{name}: {section['error']}" for name, section in sections.items() if section["error"]]
        for name, section in sections.items():
            for row in section["rows"]:
                if "error" in row:
                    failed.append(f"{name}, {row.get('what', '')}: {row['error']}")
        return failed


def measure(
    names: list[str],
    out: Path,
    smoke: bool,
    minutes: float,
    command: Callable[[str, bool], list[str]] = child,
) -> list[str]:
    """Run the sections one after another. Returns the failures."""
    results = Results(out)
    until = time.monotonic() + 60 * minutes
    for name in names:
        with results.section(name) as section:

            def new_row(row: dict, section: dict = section, name: str = name) -> None:
                section["rows"].append(row)
                print(f"{name:12}", gpu_report.line(row), flush=True)
                results.write()

            left = until - time.monotonic()
            if left < 5:
                section["error"] = "not begun: no time was left"
            else:
                limit = LIMITS.get(name, 60) * (5 if smoke else 1)
                log = out / f"gpu-{name}.log"
                section["error"] = run_section(command(name, smoke), min(left, limit), log, new_row)
            print(f"{name:12} {section['error'] or 'done'}", flush=True)
    return results.failures()


def one_section(name: str, smoke: bool) -> None:
    """In a section's process: print its rows, one line each."""
    rows_to = sys.stdout
    sys.stdout = sys.stderr  # other output goes to the log
    if smoke:
        sys.path.insert(0, str(HERE.parent / "emulated"))
        import emulate

        emulate.install()
    import gpu_sections

    for row in gpu_sections.rows(name, smoke):
        print(json.dumps(row, default=float), file=rows_to, flush=True)
    print('{"done": true}', file=rows_to, flush=True)


def output_folder(options: argparse.Namespace) -> Path:
    """The folder of the results."""
    if options.out is not None:
        return options.out
    return Path(tempfile.mkdtemp(prefix="gpu-smoke-")) if options.smoke else RESULTS


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path)
    p.add_argument("--only", help=f"some sections, separated by commas: {', '.join(LIMITS)}")
    p.add_argument("--minutes", type=float, default=9.5, help="sections not begun by then are left out")
    p.add_argument("--smoke", action="store_true", help="emulated CuPy and tiny sizes")
    p.add_argument("--section", choices=LIMITS, help=argparse.SUPPRESS)
    options = p.parse_args(argv)
    if options.section:
        one_section(options.section, options.smoke)
        return 0
    names = options.only.split(",") if options.only else list(LIMITS)
    for name in names:
        if name not in LIMITS:
            p.error(f"there is no section {name!r}; there are {', '.join(LIMITS)}")
    out = output_folder(options)
    if options.smoke and out.resolve() == RESULTS:
        p.error("a smoke run measures nothing: it does not write to the results")
    if not options.smoke:
        from tinyft import array

        reason = array.why_no_cupy()
        if reason is not None:
            print(f"no benchmark without a device: {reason}", file=sys.stderr)
            return 1
    failed = measure(names, out, options.smoke, options.minutes * (5 if options.smoke else 1))
    print(out / "gpu.md")
    for failure in failed:
        print(f"FAILED {failure}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

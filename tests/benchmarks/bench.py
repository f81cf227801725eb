"""make bench: tinyft and its peers side by side on the CPU, and what comes out written to results/cpu.md, cpu.json and scaling.png.

    python tests/benchmarks/bench.py [--only steps,methods,...] [--threads 1,2] [--rounds 9] [--quick] [--out FOLDER]

Rows that were not measured this time keep what the JSON already holds.  Peers that are not installed are left out, and the results say so:
pip install torch==2.13.0 "peft>=0.21" "transformers>=4.57,<4.58" autograd tinygrad     (tinygrad's CPU device needs clang)
"""
from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cases
from cases import BERT, GPT, Case
from paired import HERE, Side, memory, ratio, rounds

BY_NAME = {c.name: c for c in GPT + BERT}
AVX2 = {"OPENBLAS_CORETYPE": "Haswell"}                  # products without AVX-512, as on most laptops; a library without that choice ignores it


def there(*names: str) -> list[str]:
    "Those of these peers that can run here."
    needs = {"tinygrad": ["clang"]}
    return [n for n in names if importlib.util.find_spec(n) and all(map(shutil.which, needs.get(n, [])))]


def measure(sides: list[Callable[[], Side]], n: int) -> dict[str, Any]:
    "Rounds of these sides.  Times in seconds, and every other side's time over the first's."
    with contextlib.ExitStack() as stack:
        open_ = [stack.enter_context(make()) for make in sides]
        rows = list(rounds(open_, n))
        first = open_[0].name
        return {"seconds": {s.name: statistics.median(r[s.name] for r in rows) for s in open_},
                "ratios": {s.name: ratio(rows, s.name, first) for s in open_[1:]}}


# ── the sections: each yields a row at a time ────────────────────────────────────────────────────────────────────────
Rows = Iterator[dict[str, Any]]


def steps(a: argparse.Namespace) -> Rows:
    "A whole training step: tinyft, PyTorch, the floor; all as their wheels choose, and once more with AVX2 products for tinyft and the floor."
    for threads in a.threads:
        for c in GPT + BERT:
            sides = [lambda k=k, c=c: Side(k, c, threads) for k in ("tinyft", *there("torch"), "floor")]
            if threads == 1:
                sides += [lambda k=k, c=c: Side(k, c, 1, f"{k}, AVX2", AVX2) for k in ("tinyft", "floor")]
            row = measure(sides, a.rounds)
            if threads == 1:
                s = row["seconds"]
                row["avx2"] = {k: s[k] / s["tinyft, AVX2"] for k in ("torch", "floor, AVX2") if k in s}
            yield {"case": c.name, "threads": threads, **row}


def others(a: argparse.Namespace) -> Rows:
    "HIPS autograd and tinygrad, in fewer rounds: they take long."
    for c in GPT[:2]:
        for peer in there("autograd", "tinygrad"):
            sides = [lambda k=k, c=c: Side(k, c, 1) for k in ("tinyft", peer)]
            yield {"case": c.name, "peer": peer, "threads": 1, **measure(sides, max(3, a.rounds // 3))}


def methods(a: argparse.Namespace) -> Rows:
    "Fine-tuning steps: tinyft, the same in PyTorch (LoRA by PEFT), and tinyft's own full step."
    for threads, name in [(t, n) for t in a.threads for n in (("small", "mid", "bert-mid") if t == 1 else ("mid",))]:
        for method in cases.METHODS:
            c = replace(BY_NAME[name], method=method)
            sides = [lambda c=c: Side("tinyft", c, threads)]
            if there("torch") and (not method.startswith("lora") or there("peft")):
                sides.append(lambda c=c: Side("torch", c, threads))
            sides.append(lambda c=c: Side("tinyft", replace(c, method="full"), threads, "full"))
            yield {"case": name, "method": method, "threads": threads, **measure(sides, a.rounds)}


def memories(a: argparse.Namespace) -> Rows:
    "How far a process grows during three steps, above the model alone and without the optimiser's moments."
    for c in [*GPT, *BERT, *(replace(BY_NAME["mid"], method=m) for m in cases.METHODS)]:
        yield {"case": c.name, "method": c.method, "bytes": {k: memory(k, c)["bytes"] for k in ("tinyft", *there("torch"))}}


def small(a: argparse.Namespace) -> Rows:
    "What does not grow with the model: a recorded op, the import, tokens generated one at a time, a checkpoint of 100 MB."
    for kind in ("op", "import", "generate", "load"):
        for peer in there("torch") if kind in ("op", "import") else there("torch", "transformers")[1:]:
            sides = [lambda k=k: Side("small", Case(kind, 0, 0, 0, 0, 0, 0, k, kind), 1, k) for k in ("tinyft", "torch")]
            yield {"case": kind, "peer": peer, **measure(sides, a.rounds)}


def scaling(a: argparse.Namespace) -> Rows:
    "tinyft's own step as one size grows, everything else fixed: seconds and bytes."
    base = Case("base", 512, 128, 2, 4, 4, 128)
    grow = {"batch B": [replace(base, B=n) for n in (1, 2, 4, 8, 16, 32)], "width C": [replace(base, C=n) for n in (64, 128, 256, 512, 1024)],
            "depth L": [replace(base, L=n) for n in (1, 2, 4, 8, 16)], "length T": [replace(base, T=n) for n in (64, 128, 256, 512, 1024, 2048)]}
    for axis, some in grow.items():
        for c in some:
            with Side("tinyft", c, 1) as s:
                seconds = statistics.median(r["tinyft"] for r in rounds([s], 3))
            yield {"case": axis, "size": getattr(c, axis[-1]), "seconds": seconds, "bytes": memory("tinyft", c)["bytes"]}
    for n in (1250, 2500, 5000, 10000, 20000):
        with Side("small", Case("graph", 0, 0, 0, 0, 0, n, "tinyft", "graph"), 1) as s:
            yield {"case": "ops in the graph", "size": n, "seconds": statistics.median(r["small"] for r in rounds([s], 3)), "bytes": None}


SECTIONS: dict[str, Callable[[argparse.Namespace], Rows]] = {
    "steps": steps, "others": others, "methods": methods, "memories": memories, "small": small, "scaling": scaling}


def machine() -> dict[str, Any]:
    "What it was measured on: processor, cores, system, versions."
    cpu = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line for line in lines if line.startswith("flags")).split()
        cpu += next((f", {n}" for f, n in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if f in flags), "")
    versions = {}
    for name in ("numpy", "torch", "transformers", "peft", "autograd", "tinygrad"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    commit = subprocess.run(["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {"cpu": cpu, "cores": os.cpu_count(), "system": f"{platform.system()} {platform.release().split('-')[0]}",
            "python": platform.python_version(), "versions": versions, "commit": commit, "date": datetime.date.today().isoformat()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--only", default=",".join(SECTIONS))
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--threads", type=lambda s: [int(t) for t in s.split(",")], default=[1, 2])
    p.add_argument("--quick", action="store_true", help="three rounds, small sizes: to see that it runs")
    p.add_argument("--out", type=Path, default=HERE / "results")
    a = p.parse_args()
    if a.quick:
        a.rounds = min(a.rounds, 3)
        GPT[2:], BERT[1:] = [], []
    a.out.mkdir(parents=True, exist_ok=True)
    path, key = a.out / "cpu.json", ("case", "method", "peer", "threads", "size")           # what tells rows apart
    data = json.loads(path.read_text()) if path.exists() else {}
    for name in a.only.split(","):
        print(f"── {name}: {SECTIONS[name].__doc__}", flush=True)
        rows, since = [], machine()
        for row in SECTIONS[name](a):
            rows.append(row)
            ratios = (f"{k} {r['ratio']:.2f} ({r['low']:.2f}-{r['high']:.2f})" for k, r in row.get("ratios", {}).items())
            print("  ", *(row[k] for k in key if k in row), *ratios, flush=True)
        kept = data.get(name, {"rows": []})["rows"]
        new = {tuple(r.get(k) for k in key): r for r in rows}
        old = {tuple(r.get(k) for k in key): r for r in kept}
        data[name] = {"rows": list((old | new).values()), "machine": since}
        path.write_text(json.dumps(data, indent=1) + "\n")
    from report import write
    write(data, a.out)


if __name__ == "__main__":
    sys.exit(main())

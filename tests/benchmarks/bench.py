"""make bench: tinyft and its peers side by side on the CPU; the results are results/cpu.md, cpu.json and scaling.png.

    python tests/benchmarks/bench.py [--only steps,methods,...] [--cases tiny,mid,...] [--threads 1,2] [--rounds 9]
                                     [--quick] [--out FOLDER]
    python tests/benchmarks/bench.py --against COMMIT [--pairs 20] [--only "tiny, full",op] [--write]

Rows that are not measured keep the values in the JSON file. Peers that are not installed are left out; the results list
the versions of those that are (tinygrad's CPU device needs clang, torch.compile a C++ compiler):

    pip install torch==2.13.0 "peft>=0.21" "transformers>=4.57,<4.58" jax autograd tinygrad

With --against, tinyft runs against itself at an earlier commit (against.py); --write writes results/against.md.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import against
import cases
import side_floor
import side_nf4
import side_packed
import side_real
from cases import BERT, GPT, Case, layer_case, small_case
from machine import machine
from paired import HERE, ROOT, Side, equal_products, memory, peak, ratio, rounds, summary
from report import write

BY_NAME = {c.name: c for c in GPT + BERT}
NUMPY = "tinyft, NumPy"  # the side of tinyft without compiled kernels
NUMPY_KERNELS = {"TINYFT_KERNELS": "numpy"}
# Both libraries without AVX-512, as on most laptops: products and the other kernels. A library ignores the variables
# that it does not know.
AVX2_NUMPY = {
    "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR X86_V4",
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+avx2,+fma",
}
AVX2_TORCH = {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
# The ratios of `steps` that are not over tinyft's own time.
FURTHER_RATIOS = [("torch", NUMPY), ("torch, AVX2", "tinyft, AVX2"), ("tinyft, AVX2", "floor, AVX2")]
VISIT = 0.25  # seconds of one visit to a side
QUICK_VISIT = 0.02
REAL_PEERS = ["torch", "transformers", "peft", "gguf"]
MODULES = {"torch_compile": "torch"}  # the module of a peer that has another name
EXECUTABLES = {"tinygrad": ["clang"], "torch_compile": [os.environ.get("CXX", "g++")]}  # that a peer needs


def available(*names: str) -> list[str]:
    """The peers, among these names, that can run here."""
    found = []
    for name in names:
        installed = importlib.util.find_spec(MODULES.get(name, name)) is not None
        if installed and all(shutil.which(needed) for needed in EXECUTABLES.get(name, [])):
            found.append(name)
    return found


def collect(sides: list[Callable[[], Side]], options: argparse.Namespace, n: int | None = None) -> list[dict]:
    """n rounds of these sides, each {side: seconds of a step}.  n is options.rounds unless given."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(make()) for make in sides]
        return list(rounds(opened, n or options.rounds, options.visit))


def summarise(rows: list[dict]) -> dict[str, Any]:
    """seconds: {side: median};  ratios: {other side: its time over the first side's}."""
    first, *others = rows[0]
    seconds = {}
    for name in rows[0]:
        seconds[name] = statistics.median(row[name] for row in rows)
    ratios = {name: ratio(rows, name, first) for name in others}
    return {"seconds": seconds, "ratios": ratios}


def measure(sides: list[Callable[[], Side]], options: argparse.Namespace, n: int | None = None) -> dict[str, Any]:
    """The summary of n rounds of these sides; ratios are over the time of the first side."""
    return summarise(collect(sides, options, n))


def chosen(cases_of_section: list[Case], options: argparse.Namespace) -> list[Case]:
    """The cases of a section: those of --cases, else one of the smallest with --quick, else all."""
    if options.cases:
        return [BY_NAME[name] for name in options.cases]
    return [BY_NAME["tiny"]] if options.quick else cases_of_section


# ---------------------------------------------------------------------------------------------------- the sections
# Each section yields its rows, one at a time.
Rows = Iterator[dict[str, Any]]


def side(*arguments: Any) -> Callable[[], Side]:
    """A function that starts the worker Side(*arguments)."""
    return functools.partial(Side, *arguments)


def step_sides(c: Case, threads: int, options: argparse.Namespace) -> list[Callable[[], Side]]:
    """The sides of `steps`. --quick leaves out torch.compile, whose compiler takes a minute, and AVX2."""
    sides = [side("tinyft", c, threads), side("tinyft", c, threads, NUMPY, NUMPY_KERNELS)]
    torch = available("torch")
    compiled = [] if options.quick else available("torch_compile")
    jax = available("jax") if c.model == "gpt" else []
    floors = ["floor", *("torch_floor" for _ in torch)]
    sides += [side(kind, c, threads) for kind in (*torch, *compiled, *jax, *floors)]
    if not options.quick:
        for kind in ("tinyft", "floor", *torch):
            limit = AVX2_TORCH if kind == "torch" else AVX2_NUMPY
            sides.append(side(kind, c, threads, f"{kind}, AVX2", limit))
    return sides


def step_ratios(times: list[dict]) -> dict[str, Any]:
    """Ratios of `steps`, from the seconds of all rounds.

    further         those of FURTHER_RATIOS, which are not over tinyft's own time
    equal_products  PyTorch's time over that of both sides of tinyft, if the products took as long
    """
    further = {}
    for of, to in FURTHER_RATIOS:
        if {of, to} <= times[0].keys():
            further[f"{of} / {to}"] = ratio(times, of, to)
    equal = {}
    if "torch" in times[0]:
        for own in ("tinyft", NUMPY):
            equal[own] = summary([equal_products(t["torch"], t["torch_floor"], t["floor"], t[own]) for t in times])
    return {"further": further, "equal_products": equal}


def steps(options: argparse.Namespace) -> Rows:
    """Whole training steps: tinyft, PyTorch, torch.compile, JAX; the matrix products alone; both held to AVX2."""
    for threads in options.threads:
        for c in chosen(GPT + BERT, options):
            times = collect(step_sides(c, threads, options), options)
            row = {"case": c.name, "threads": threads, "operations": side_floor.operations(c)}
            yield {**row, **summarise(times), **step_ratios(times)}


def others(options: argparse.Namespace) -> Rows:
    """HIPS autograd and tinygrad, in fewer rounds, since their steps take long."""
    for c in chosen(GPT[:2], options):
        for peer in available("autograd", "tinygrad") if c.model == "gpt" else []:
            sides = [side(kind, c, 1) for kind in ("tinyft", peer)]
            yield {"case": c.name, "peer": peer, "threads": 1, **measure(sides, options, max(3, options.rounds // 3))}


def methods(options: argparse.Namespace) -> Rows:
    """Fine-tuning steps: tinyft, the same in PyTorch (LoRA by PEFT), and tinyft's own full step."""
    for threads in options.threads:
        names = ("small", "mid", "bert-mid") if threads == 1 else ("mid",)
        for base in chosen([BY_NAME[name] for name in names], options):
            for method in cases.METHODS[:1] if options.quick else cases.METHODS:
                c = replace(base, method=method)
                needed = ["torch", "peft"] if method.startswith("lora") else ["torch"]
                sides = [side("tinyft", c, threads), side("tinyft", c, threads, NUMPY, NUMPY_KERNELS)]
                if available(*needed) == needed:
                    sides.append(side("torch", c, threads))
                sides.append(side("tinyft", base, threads, "full"))
                times = collect(sides, options)
                row = {"case": base.name, "method": method, "threads": threads, **summarise(times)}
                if "torch" in times[0]:
                    row["further"] = {f"torch / {NUMPY}": ratio(times, "torch", NUMPY)}
                yield row


def memories(options: argparse.Namespace) -> Rows:
    """The growth of a process during three steps, above the model alone and without the optimiser's moments."""
    fine_tuning = [replace(BY_NAME["mid"], method=method) for method in cases.METHODS]
    for c in chosen([*GPT, *BERT, *fine_tuning], options):
        sizes = {kind: memory(kind, c)["bytes"] for kind in ("tinyft", *available("torch"))}
        yield {"case": c.name, "method": c.method, "bytes": sizes}


def small(options: argparse.Namespace) -> Rows:
    """Costs that do not grow with the model: a recorded op, the import, generating a token, loading 100 MB."""
    for name in ("op",) if options.quick else ("op", "import", "generate", "load"):
        by_torch = name in ("op", "import")
        if not available("torch") or (not by_torch and not available("transformers")):
            continue
        sides = [side("small", small_case(name, library), 1, library) for library in ("tinyft", "torch")]
        peer = "torch" if by_torch else "transformers"
        yield {"case": name, "peer": peer, **measure(sides, options)}


def nf4(options: argparse.Namespace) -> Rows:
    """Encoding and decoding a weight in NF4 with double quantization, beside bitsandbytes."""
    width = 512 if options.quick else 4096
    libraries = ["tinyft", *available("bitsandbytes")]
    for threads in options.threads:
        for job in ("encode", "decode"):
            sides = []
            for library in libraries:
                c = Case("nf4", 0, width, 0, 0, 0, 0, library, method=job)
                sides.append(side("nf4", c, threads, library))
            yield {"case": job, "threads": threads, "bytes": side_nf4.weight_bytes(c), **measure(sides, options)}


def real(options: argparse.Namespace) -> Rows:
    """Real checkpoints: tinyft, and transformers with PEFT. Peak memory of the whole process, for training."""
    peers = ["torch"] if available("torch", "transformers", "peft", "gguf") == REAL_PEERS else []
    for threads in options.threads:
        for job in ("embed",) if options.quick else ("lora_step", "lora_masked", "generate", "embed"):
            if not (side_real.MINILM if job == "embed" else side_real.GGUF).exists():
                print("   work/real has no model for it: make real-assets", flush=True)
                continue
            libraries = ["tinyft", *(["packed"] if job != "embed" else []), *peers]
            sides = [side("real", small_case(job, library), threads, library) for library in libraries]
            row = {"case": job, "threads": threads, **measure(sides, options)}
            if threads == 1 and job.startswith("lora"):
                row["bytes"] = {name: peak("real", small_case(job, name))["bytes"] for name in libraries}
            yield row


def gptq(options: argparse.Namespace) -> Rows:
    """GPTQ of one layer with 4,096 tokens, Hessian included: tinyft, and the plain algorithm in PyTorch."""
    for threads in options.threads:
        for out, width in ((64, 256),) if options.quick else ((768, 3072), (3072, 768)):
            libraries = ["tinyft", *available("torch")]
            tokens = 512 if options.quick else 4096
            sides = [side("gptq", layer_case(out, width, tokens, library), threads, library) for library in libraries]
            row = measure(sides, options, max(3, options.rounds // 3))
            yield {"case": f"{out} × {width}", "threads": threads, **row}


def beam(options: argparse.Namespace) -> Rows:
    """Beam search and greedy decoding of a random Marian: tinyft, and transformers' generate."""
    libraries = ["tinyft", *(["torch"] if available("torch", "transformers") == ["torch", "transformers"] else [])]
    for threads in options.threads:
        for c in cases.beam_cases()[:1] if options.quick else cases.beam_cases():
            sides = [side("beam", replace(c, model=library), threads, library) for library in libraries]
            row = measure(sides, options, max(3, options.rounds // 2))
            yield {"case": c.name, "method": c.method, "threads": threads, **row}


def packed(options: argparse.Namespace) -> Rows:
    """Products with a 4,096 × 4,096 weight in every packed form, beside the same product in float32."""
    width = 256 if options.quick else 4096
    for threads in options.threads:
        for B in (1,) if options.quick else (1, 8, 512):
            for form in list(side_packed.FORMS)[:2] if options.quick else side_packed.FORMS:
                sides = []
                for name in ("float32", form):
                    c = Case("packed", 0, width, 0, 0, B, 0, method=name)
                    sides.append(side("packed", c, threads, name))
                row = measure(sides, options, 3 if B == 512 else None)
                bytes_read = {name: side_packed.weight_bytes(name, width) for name in ("float32", form)}
                yield {"case": form, "size": B, "threads": threads, "bytes": bytes_read, **row}


def scaling(options: argparse.Namespace) -> Rows:
    """tinyft's own step as one size grows and the others stay: seconds and bytes."""
    base = Case("base", 512, 128, 2, 4, 4, 128)
    grow = {
        "batch B": [replace(base, B=n) for n in (1, 2, 4, 8, 16, 32)],
        "width C": [replace(base, C=n) for n in (64, 128, 256, 512, 1024)],
        "depth L": [replace(base, L=n) for n in (1, 2, 4, 8, 16)],
        "length T": [replace(base, T=n) for n in (64, 128, 256, 512, 1024, 2048)],
    }
    for axis, sizes in list(grow.items())[2:3] if options.quick else grow.items():
        for c in sizes[:3] if options.quick else sizes:
            seconds = measure([side("tinyft", c, 1)], options, 3)["seconds"]["tinyft"]
            size = getattr(c, axis[-1])
            yield {"case": axis, "size": size, "seconds": seconds, "bytes": memory("tinyft", c)["bytes"]}
    for n in (1250, 2500, 5000) if options.quick else (1250, 2500, 5000, 10000, 20000):
        seconds = measure([side("small", small_case("graph", T=n), 1)], options, 3)["seconds"]["small"]
        yield {"case": "ops in the graph", "size": n, "seconds": seconds, "bytes": None}


SECTIONS: dict[str, Callable[[argparse.Namespace], Rows]] = {
    "steps": steps,
    "others": others,
    "methods": methods,
    "memories": memories,
    "small": small,
    "nf4": nf4,
    "real": real,
    "gptq": gptq,
    "packed": packed,
    "beam": beam,
    "scaling": scaling,
}
TRAINING = ("steps", "others", "methods", "memories")  # the sections of the cases in cases.py
KEY = ("case", "method", "peer", "threads", "size")  # the columns that identify a row


# ---------------------------------------------------------------------------------------------------- the program
def merge(old: list[dict], new: list[dict]) -> list[dict]:
    """The rows of both; a new row replaces the old row of the same key."""
    rows = {}
    for row in [*old, *new]:
        key = tuple(row.get(column) for column in KEY)
        rows[key] = row
    return list(rows.values())


def dated(section: dict) -> list[dict]:
    """The rows of a section; each has the date, commit and processor of its measurement under `measured`."""
    about = section["machine"]
    measured = f"{about['date']}, commit {about['commit']}, {about['cpu']}"
    return [{"measured": measured, **row} for row in section["rows"]]


def run_section(name: str, options: argparse.Namespace) -> list[dict]:
    """The rows of a section, printed one by one."""
    print(f"-- {name}: {SECTIONS[name].__doc__}", flush=True)
    rows = []
    for row in SECTIONS[name](options):
        rows.append(row)
        key = [row[column] for column in KEY if column in row]
        ratios = [f"{k} {r['ratio']:.2f} ({r['low']:.2f}-{r['high']:.2f})" for k, r in row.get("ratios", {}).items()]
        print("  ", *key, *ratios, flush=True)
    return rows


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--only", help=f"some of {', '.join(SECTIONS)}; with --against, the start of cases' names")
    p.add_argument("--cases", help=f"some of {', '.join(BY_NAME)}, in the sections {', '.join(TRAINING)}")
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--threads", type=lambda s: [int(t) for t in s.split(",")], help="default: 1,2; 1 with --quick")
    p.add_argument("--quick", action="store_true", help="short rounds of few sides and sizes, to see that it runs")
    p.add_argument("--out", type=Path, help="default: results; work/bench with --quick")
    p.add_argument("--against", metavar="COMMIT", help="this working tree against an earlier commit, and nothing else")
    p.add_argument("--pairs", type=int, default=20, help="pairs per case with --against")
    p.add_argument("--write", action="store_true", help="with --against: write against.md")
    options = p.parse_args()
    options.only = options.only and options.only.split(",")
    options.cases = options.cases and options.cases.split(",")
    options.out = options.out or (ROOT / "work" / "bench" if options.quick else HERE / "results")
    options.threads = options.threads or ([1] if options.quick else [1, 2])
    options.visit = VISIT
    if options.quick:
        options.rounds = min(options.rounds, 3)
        options.visit = QUICK_VISIT
    unknown = set(options.only or ()) - SECTIONS.keys()
    if unknown and not options.against:
        p.error(f"--only wants some of {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    unknown = set(options.cases or ()) - BY_NAME.keys()
    if unknown:
        p.error(f"--cases wants some of {', '.join(BY_NAME)}, got {', '.join(sorted(unknown))}")
    if options.cases and options.against:
        p.error("--against has no --cases: --only chooses them by the start of their names")
    if options.cases and options.only is None:
        options.only = list(TRAINING)
    elif options.cases and not set(options.only) <= set(TRAINING):
        p.error(f"--cases belongs to the sections {', '.join(TRAINING)}, got --only {','.join(options.only)}")
    if options.pairs < 1:
        p.error(f"--pairs wants a number of at least 1, got {options.pairs}")
    return options


def main() -> None:
    options = parse()
    if options.against:
        results = against.run(options.against, options.pairs, options.threads, options.only)
        if options.write:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "against.md").write_text(against.page(results, options.against, machine()))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "cpu.json"
    data = json.loads(path.read_text()) if path.exists() else {}
    for name in options.only or SECTIONS:
        about = machine()
        rows = run_section(name, options)
        old = dated(data[name]) if name in data else []
        data[name] = {"rows": merge(old, rows), "machine": about}
        path.write_text(json.dumps(data, indent=1) + "\n")
    write(data, options.out)


if __name__ == "__main__":
    sys.exit(main())

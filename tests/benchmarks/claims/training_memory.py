"""Peak memory and seconds of LoRA steps on SmolLM2, dense and packed, each setting in a process of its own.

    python -m claims.training_memory MODEL B T RECOMPUTE        one setting, as a line of JSON

MODEL is the path of a model; B rows of T tokens are a batch; RECOMPUTE is 0 or 1.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tinyft as ft
from tinyft.real.memory import peak_memory

from . import subjects

TARGETS = ("attn.[qkvo]", "mlp.gate", "mlp.up", "mlp.down")
RANK = 16
STEPS = 2
SEED = 0
BASES = ("dense", "nf4", "nf4, embedding in 8 bits")


def make_base(name: str, folder: Path) -> Path:
    """The path of SmolLM2 as one of BASES. The packed ones are compressed here, not in the process that is measured."""
    if name == "dense":
        return subjects.SMOLLM2
    path = folder / name.replace(",", "").replace(" ", "-")
    model, tokenizer = subjects.load("SmolLM2-135M")
    ft.compress(model, ft.NF4())
    if name.endswith("8 bits"):
        ft.compress(model, ft.RTN(bits=8, group=64), targets="embed")
    ft.save(model, path, tokenizer)
    return path


def forget_peak() -> None:
    """Start the system's record of the largest memory of this process anew, after loading."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:  # not on Linux: the peak counts the loading
        return


def one_setting(folder: Path, B: int, T: int, recompute: bool) -> dict[str, Any]:
    """{"weights", "process", "arrays", "seconds"}: bytes of the weights, both peaks in bytes, the fastest step."""
    model, _ = ft.load(folder)
    weights = subjects.weight_bytes(model)
    ft.attach(model, ft.LoRA(r=RANK, alpha=RANK, targets=TARGETS))
    batch = subjects.token_batch(model.config.vocab, B, T + 1, SEED)
    forget_peak()
    seconds = []
    before = time.perf_counter()

    def step_done(done: int, terms: dict[str, float]) -> None:
        nonlocal before
        now = time.perf_counter()
        seconds.append(now - before)
        before = now

    how = {"progress": False, "recompute": recompute}
    ft.fit(model, [batch], STEPS, ft.AdamW(2e-4), on_step=step_done, **how)
    process = peak_memory()
    with ft.peak_memory() as memory:
        ft.fit(model, [batch], 1, ft.AdamW(2e-4), **how)
    return {"weights": weights, "process": process, "arrays": weights + memory["bytes"], "seconds": min(seconds)}


def measure(batches: tuple[int, ...] = (4, 1), T: int = 128) -> list[dict[str, Any]]:
    """A row for each base, batch, and with and without recompute. RuntimeError if a process fails."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for base in BASES:
            path = make_base(base, Path(folder))
            for B in batches:
                for recompute in (False, True):
                    row = {"base": base, "batch": B, "tokens": T, "recompute": recompute}
                    row |= in_own_process(path, B, T, recompute)
                    rows.append(row)
                    print("   " + in_words(row), flush=True)
    return rows


def in_own_process(path: Path, B: int, T: int, recompute: bool) -> dict[str, Any]:
    """one_setting in a new process."""
    command = [sys.executable, "-m", "claims.training_memory", str(path), str(B), str(T), str(int(recompute))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the measurement of memory failed with exit status {done.returncode}: {last}")
    return json.loads(done.stdout)


def in_words(row: dict[str, Any]) -> str:
    """One setting with its figures."""
    with_it = " with recompute" if row["recompute"] else ""
    return (
        f"{row['base']}, {row['batch']} × {row['tokens']}{with_it}: weights {row['weights'] / 1e6:.0f} MB, process "
        f"{row['process'] / 1e6:.0f} MB, arrays {row['arrays'] / 1e6:.0f} MB, {row['seconds']:.1f} s a step"
    )


def ratios(rows: list[dict[str, Any]], batch: int, key: str) -> dict[str, float]:
    """{base, with "+ recompute" where it is on: peak of arrays or of the process, in units of dense LoRA's}."""
    of_batch = [row for row in rows if row["batch"] == batch]
    dense = next(row[key] for row in of_batch if row["base"] == "dense" and not row["recompute"])
    names = [row["base"] + (" + recompute" if row["recompute"] else "") for row in of_batch]
    return {name: row[key] / dense for name, row in zip(names, of_batch)}


if __name__ == "__main__":
    model_folder, rows_in_batch, length, again = sys.argv[1:]
    print(json.dumps(one_setting(Path(model_folder), int(rows_in_batch), int(length), again == "1")))

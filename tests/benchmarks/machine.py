"""The machine and the versions of a measurement."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def processor() -> str:
    """The processor's name and its widest vector instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = {}
    for line in lines:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    name = facts.get("model name", platform.processor())
    flags = facts.get("flags", "").split()
    for flag, text in (("avx512f", "AVX-512"), ("avx2", "AVX2")):
        if flag in flags:
            return f"{name}, {text}"
    return name


def usable_cores() -> int:
    """The cores that this process may use: fewer than the machine has if it is pinned to some of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def place(about: dict[str, Any]) -> str:
    """The machine of a measurement in words: processor, cores, system, Python. about: what `machine` gave."""
    cores = "1 core" if about["cores"] == 1 else f"{about['cores']} cores"
    return f"{about['cpu']}, {cores}, {about['system']}, Python {about['python']}"


def machine() -> dict[str, Any]:
    """The machine and the versions: processor, cores, system, Python, libraries, commit, date."""
    versions = {}
    for name in ("numpy", "numba", "torch", "transformers", "peft", "jax", "autograd", "tinygrad"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    return {
        "cpu": processor(),
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "versions": versions,
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }

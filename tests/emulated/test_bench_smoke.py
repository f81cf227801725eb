"""make bench-gpu from end to end on emulated CuPy: every section runs, what it computes is right, and a kernel that is
wrong is noticed.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cupy as cp
import emulate
import numpy as np
import pytest

from tinyft import dispatch
from tinyft.kernels.cuda import gemm, layers, packed
from tinyft.tensor import OPS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import gpu  # noqa: E402
import gpu_sections  # noqa: E402
import gpu_sides  # noqa: E402
import gpu_steps  # noqa: E402
from cases import GPT, PREFIX  # noqa: E402


def test_the_whole_script_runs(tmp_path):
    env = os.environ | {"TINYFT_EMULATED_CACHE": str(emulate.FOLDER), "TINYFT_BACKEND": "numpy"}
    run = subprocess.run([sys.executable, str(BENCHMARKS / "gpu.py"), "--smoke", "--out", str(tmp_path)], env=env,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert list(found) == list(gpu.LIMITS) and set(found) == set(gpu_sections.SECTIONS)
    rows = [(name, r) for name, s in found.items() for r in s["rows"]]
    assert not [r for _, r in rows if "error" in r or r.get("right") is False or r.get("captured is eager") is False]
    assert len(rows) > 60
    # which is PyTorch's alone, where there is one
    assert {name for name, r in rows if set(r) - {"what", "note"}} >= set(found) - {"compiled"}
    kinds = {r["what"].split(",")[0] for n, r in rows if n == "kernels"}
    assert kinds == {*layers.NAMES, "adam", "uniform"}
    page = (tmp_path / "gpu.md").read_text()
    assert "fake GPU" in page and "**failed**" not in page


def spoiled(name, right):
    """The kernel, its value or its gradients too large by half: sixteen bits and a sum over many rows are allowed a
    lot.
    """
    def wrong(*args, **kw):
        y, pulls = right(*args, **kw)
        if name == "value":
            return (*y[:-1], y[-1] * y[-1].dtype.type(1.5)) if isinstance(y, tuple) else y * y.dtype.type(1.5), pulls
        if callable(pulls):
            return y, lambda g, needed: [None if d is None else d * d.dtype.type(1.5) for d in pulls(g, needed)]
        return y, [p and (lambda g, p=p: p(g) * g.dtype.type(1.5)) for p in pulls]
    return wrong


@pytest.mark.parametrize("where", ["value", "gradients"])
@pytest.mark.parametrize("op", ["gelu", "layer_norm", "attention", "cross_entropy", "project"])
def test_a_kernel_that_is_wrong_is_an_error_and_the_others_are_measured(op, where, monkeypatch):
    monkeypatch.setattr(layers, op, spoiled(where, getattr(layers, op)))
    monkeypatch.setattr(layers, "NAMES", [op, "linear"])
    rows = list(gpu_sections.rows("kernels", smoke=True))
    assert {r["what"] for r in rows if "error" in r} == {f"{op}, fp32", f"{op}, bf16"}
    assert len(rows) == 6
    assert all("the computed result is wrong" in r["error"] for r in rows if "error" in r)


def test_wrong_products_codes_noise_and_training_are_errors(monkeypatch):
    right, noise = gemm.matmul, layers.uniform_like
    monkeypatch.setattr(packed, "packed_linear", spoiled("value", packed.packed_linear))
    assert all("error" in r for r in gpu_sections.rows("int4", smoke=True))
    monkeypatch.setattr(gemm, "matmul", lambda *a, **kw: right(*a, **kw) * 1.05)
    assert all("error" in r for r in gpu_sections.rows("products", smoke=True))
    monkeypatch.undo()
    monkeypatch.setattr(layers, "uniform_like", lambda x, key: noise(x, key + 1))
    monkeypatch.setattr(layers, "NAMES", [])
    assert [r["what"] for r in gpu_sections.rows("kernels", smoke=True) if "error" in r] == ["uniform"]
    monkeypatch.undo()
    monkeypatch.setitem(dispatch.KERNELS, (OPS["gelu_tanh"], cp.ndarray), [spoiled("value", layers.gelu_tanh)])
    assert all("error" in r for r in gpu_sections.rows("agreement", smoke=True))


def test_a_captured_step_must_go_on_as_the_eager_one():
    many = [3.0, 2.9, 2.8, 2.75, 2.7]
    assert gpu_steps.goes_on([3.0, 2.9, 2.8], many) and gpu_steps.goes_on([2.8, 2.75, 2.7], many)
    for wrong in ([3.0, 3.0, 3.0], [2.9, 2.8, 2.7], [np.nan] * 3, [2.7, 2.6, 2.5]):
        assert not gpu_steps.goes_on(wrong, many)


def test_the_floor_counts_the_models_own_products_and_numbers():
    case = GPT[0]
    model = gpu_sides.side_tinyft.build(case)
    assert sum(p.size for p in model.parameters()) - PREFIX * case.C == gpu_sides.numbers(case)
    import side_floor
    assert sum(2 * a.size * b.shape[-1] for a, b, _ in side_floor.build(case)) == gpu_sides.flops(case)

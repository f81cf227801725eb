"""The benchmark's own arithmetic, and that its sides do the same work.  Nothing here looks at how long anything took."""
from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tinyft import array

HERE = Path(__file__).parent / "benchmarks"
pytestmark = pytest.mark.skipif(array.backend() != "numpy", reason="it measures NumPy")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    import cases
    import paired
    import report
    yield cases, paired, report
    for name in ("cases", "paired", "report", "side_tinyft", "side_floor", "side_small"):
        sys.modules.pop(name, None)


def test_a_ratio_is_of_one_round_and_its_median_is_told_with_quartiles(bench):
    rows = [{"a": 1.0, "b": 2.0}, {"a": 10.0, "b": 30.0}, {"a": 1.0, "b": 4.0}]  # the second round was ten times as slow for everybody
    assert bench[1].ratio(rows, "b", "a") == {"ratio": 3.0, "low": 2.0, "high": 4.0, "rounds": 3}
    assert bench[1].ratio(rows, "a", "b")["ratio"] == 1 / 3


def test_sides_take_turns_and_the_order_turns(bench):
    log = []

    class Side:
        def __init__(self, name: str):
            self.name = name

        def run(self, n: int) -> float:
            log.append(self.name)
            return 0.5
    rows = list(bench[1].rounds([Side("a"), Side("b"), Side("c")], 3, pause=0))
    assert log == [*"abc", *"abc", *"bca", *"cab"] and rows == [dict.fromkeys("abc", 0.5)] * 3     # the first three find out how many steps


@pytest.mark.parametrize("kind, model", [("tinyft", "gpt"), ("tinyft", "bert"), ("floor", "gpt"), ("floor", "bert")])
def test_a_worker_builds_steps_and_answers(bench, kind, model):
    cases, paired, _ = bench
    with paired.Side(kind, cases.Case("x", 20, 8, 1, 2, 2, 6, model), 1) as s:
        assert len(s.about["losses"]) == 3 and s.run(2) > 0 and s.run(1) > 0
        assert kind == "floor" or s.about["losses"][2] < s.about["losses"][0]


def test_a_worker_that_falls_over_is_an_error(bench):
    with pytest.raises(RuntimeError, match="tinyft ended with 1"):
        bench[1].Side("tinyft", bench[0].Case("x", 20, 9, 1, 2, 2, 6), 1)        # two heads do not divide nine


@pytest.mark.parametrize("method", ["full", "lora_qv", "lora_all", "bitfit", "houlsby", "prefix", "head"])
@pytest.mark.parametrize("model", ["gpt", "bert"])
def test_every_method_trains(bench, method, model):
    import side_tinyft as side
    c = bench[0].Case("x", 20, 8, 2, 2, 3, 6, model, method)
    step, trained = side.start(side.build(c), c)
    losses = [step() for _ in range(8)]
    assert losses[-1] < losses[0] and trained > 0 and np.isfinite(losses).all()


def test_the_floor_has_the_products_of_a_step(bench):
    import side_floor
    c = bench[0].Case("x", 30, 8, 2, 2, 3, 5)
    N, D, flops = 15, 4, sum(2 * out.size * a.shape[-1] for a, _, out in side_floor.build(c))
    assert flops == 6 * N * (c.L * 12 * c.C**2 + c.C * c.V) + c.L * 6 * 2 * c.B * c.H * c.T * c.T * D


def test_powers_are_read_off(bench):
    assert abs(bench[2].power([(n, 3.0 * n**1.5) for n in (2, 4, 8, 16)]) - 1.5) < 1e-9


def test_what_misses_its_mark_is_marked(bench, tmp_path):
    r = lambda x: {"ratio": x, "low": x, "high": x, "rounds": 3}
    row = {"case": "mid", "threads": 1, "seconds": {"tinyft": 0.5}, "ratios": {"torch": r(0.9), "floor": r(0.9)}, "avx2": {}}
    where = {"versions": {}, **dict.fromkeys(("date", "commit", "cpu", "cores", "system", "python"), "x")}
    bench[2].write({"steps": {"rows": [row], "machine": where}}, tmp_path)
    line = next(s for s in (tmp_path / "cpu.md").read_text().splitlines() if s.startswith("| mid"))
    assert "0.90 (0.90-0.90) ✗" in line and "1.11 (1.11-1.11) ✓" in line


def test_the_committed_results_are_what_the_report_makes_of_its_numbers(bench, tmp_path):
    data = json.loads((HERE / "results" / "cpu.json").read_text())
    bench[2].write(data, tmp_path)
    assert (tmp_path / "cpu.md").read_text() == (HERE / "results" / "cpu.md").read_text()

"""The arithmetic of the benchmarks, and that their sides do the same work. No test looks at a duration."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tinyft import array

HERE = Path(__file__).parent / "benchmarks"
ROOT = HERE.parents[1]
MODULES = ("against", "cases", "compat", "paired", "report", "side_tinyft", "side_floor", "side_small",
           "side_gptq", "side_nf4", "side_beam")
pytestmark = pytest.mark.skipif(array.backend() != "numpy", reason="the benchmarks measure NumPy")


@pytest.fixture
def bench(monkeypatch):
    """The modules of tests/benchmarks, importable for the length of a test."""
    monkeypatch.syspath_prepend(str(HERE))
    import against
    import cases
    import paired
    import report

    yield SimpleNamespace(against=against, cases=cases, paired=paired, report=report)
    for name in MODULES:
        sys.modules.pop(name, None)


# ---------------------------------------------------------------------------------------------------- rounds
def test_a_ratio_is_of_one_round_and_has_a_median_and_quartiles(bench):
    """The second round was ten times as slow for both sides; its ratio counts like the others."""
    rows = [{"a": 1.0, "b": 2.0}, {"a": 10.0, "b": 30.0}, {"a": 1.0, "b": 4.0}]
    assert bench.paired.ratio(rows, "b", "a") == {"ratio": 3.0, "low": 2.0, "high": 4.0, "rounds": 3}
    assert bench.paired.ratio(rows, "a", "b")["ratio"] == 1 / 3


class FakeSide:
    """A side that logs its visits and always takes half a second per step."""

    def __init__(self, name: str, log: list[str], **about):
        self.name = name
        self.log = log
        self.about = {"losses": [1.0, 0.5], "trained": 3, "package": None} | about

    def run(self, n: int) -> float:
        self.log.append(self.name)
        return 0.5

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_sides_take_turns_and_the_order_rotates(bench):
    """The first three visits measure how many steps fit into a visit."""
    log = []
    rows = list(bench.paired.rounds([FakeSide(name, log) for name in "abc"], 3, pause=0))
    assert log == [*"abc", *"abc", *"bca", *"cab"]
    assert rows == [dict.fromkeys("abc", 0.5)] * 3


# ---------------------------------------------------------------------------------------------------- workers
@pytest.mark.parametrize("kind, model", [("tinyft", "gpt"), ("tinyft", "bert"), ("floor", "gpt"), ("floor", "bert")])
def test_a_worker_builds_steps_and_answers(bench, kind, model):
    """Three losses at the start, which fall for tinyft; then positive durations."""
    case = bench.cases.Case("x", 20, 8, 1, 2, 2, 6, model)
    with bench.paired.Side(kind, case, 1) as side:
        losses = side.about["losses"]
        assert len(losses) == 3 and side.run(2) > 0 and side.run(1) > 0
        assert kind == "floor" or losses[2] < losses[0]


def test_a_worker_that_fails_is_an_error(bench):
    """A width of nine cannot be divided into two heads."""
    with pytest.raises(RuntimeError, match="tinyft ended with 1"):
        bench.paired.Side("tinyft", bench.cases.Case("x", 20, 9, 1, 2, 2, 6), 1)


@pytest.mark.parametrize("method", ["full", "lora_qv", "lora_all", "bitfit", "houlsby", "prefix", "head"])
@pytest.mark.parametrize("model", ["gpt", "bert"])
def test_every_method_trains(bench, method, model):
    """The loss of tinyft's side falls."""
    import side_tinyft

    case = bench.cases.Case("x", 20, 8, 2, 2, 3, 6, model, method)
    step, trained = side_tinyft.start(side_tinyft.build(case), case)
    losses = [step() for _ in range(8)]
    assert losses[-1] < losses[0] and trained > 0 and np.isfinite(losses).all()


@pytest.mark.parametrize("name", ["op", "attention", "optimizer", "fit"])
def test_every_small_case_runs(bench, name):
    """The cases that need neither a subprocess nor a large model."""
    import side_small

    case = bench.cases.small_case(name)
    step, _ = side_small.start(side_small.build(case), case)
    assert step() == step() == 0.0


def test_both_sides_of_gptq_do_the_same_work(bench):
    """Their weights are rounded to the same grids and equally good. Some codes differ by float32's rounding."""
    pytest.importorskip("torch")
    import side_gptq

    case = bench.cases.layer_case(24, 256, 600)
    W, X = side_gptq.layer(case)
    mine = np.asarray(side_gptq.with_tinyft(W, X)().dequantize())
    other = side_gptq.with_torch(W, X)()[0].numpy()
    losses = [float((((W - Q) @ X.T) ** 2).sum()) for Q in (mine, other)]
    assert 0.97 < losses[0] / losses[1] < 1.03
    step, _ = side_gptq.start(side_gptq.build(case), case)
    assert step() == 0.0


@pytest.mark.parametrize("beams", ["4", "1"])
def test_both_sides_of_beam_search_write_the_same_tokens(bench, beams):
    pytest.importorskip("transformers")
    import side_beam

    sides = []
    for library in ("tinyft", "torch"):
        case = bench.cases.Case("x", 60, 16, 2, 2, 3, 5, library, beams)
        run = side_beam.build(case)
        sides.append(run())
        assert side_beam.start(run, case)[0]() == 0.0
    assert sides[0].shape == (3, side_beam.NEW) and (sides[0] == sides[1]).all()


@pytest.mark.parametrize("job, shape", [("encode", None), ("decode", (4096, 64))])
def test_the_sides_of_nf4_run(bench, job, shape):
    import side_nf4

    case = bench.cases.Case("nf4", 0, 64, 0, 0, 0, 0, method=job)
    result = side_nf4.of_tinyft(job, np.zeros((4096, 64), np.float32))()
    assert shape is None or result.shape == shape
    assert side_nf4.weight_bytes(case) == 4096 * 64 * 4
    row = {"case": job, "threads": 2, "bytes": 400e6, "seconds": {"tinyft": 1.9}, "ratios": {}}
    assert "211 MB/s ✓" in "".join(bench.report.nf4([row]))
    row["seconds"] = {"tinyft": 2.1}
    assert "190 MB/s ✗" in "".join(bench.report.nf4([row]))


def test_the_floor_has_the_matrix_products_of_a_step(bench):
    """Their operations are 6 N per parameter of the linear maps, and attention's products."""
    import side_floor

    c = bench.cases.Case("x", 30, 8, 2, 2, 3, 5)
    products = side_floor.build(c)
    flops = sum(2 * out.size * a.shape[-1] for a, _, out in products)
    N = c.B * c.T
    D = c.C // c.H
    linear = 6 * N * (c.L * 12 * c.C**2 + c.C * c.V)
    attention = c.L * 6 * 2 * c.B * c.H * c.T * c.T * D
    assert flops == linear + attention


# ---------------------------------------------------------------------------------------------------- the report
def test_powers_are_exponents_of_growth(bench):
    assert abs(bench.report.power([(n, 3.0 * n**1.5) for n in (2, 4, 8, 16)]) - 1.5) < 1e-9


def test_a_missed_target_is_marked(bench, tmp_path):
    def r(x: float) -> dict:
        return {"ratio": x, "low": x, "high": x, "rounds": 3}

    ratios = {"torch": r(0.9), "floor": r(0.9)}
    row = {"case": "mid", "threads": 1, "seconds": {"tinyft": 0.5}, "ratios": ratios, "avx2": {}}
    machine = {"versions": {}, **dict.fromkeys(("date", "commit", "cpu", "cores", "system", "python"), "x")}
    bench.report.write({"steps": {"rows": [row], "machine": machine}}, tmp_path)
    line = next(line for line in (tmp_path / "cpu.md").read_text().splitlines() if line.startswith("| mid"))
    assert "0.90 (0.90-0.90) ✗" in line and "1.11 (1.11-1.11) ✓" in line


def test_the_committed_page_is_the_report_of_the_committed_numbers(bench, tmp_path):
    data = json.loads((HERE / "results" / "cpu.json").read_text())
    bench.report.write(data, tmp_path)
    assert (tmp_path / "cpu.md").read_text() == (HERE / "results" / "cpu.md").read_text()


# ---------------------------------------------------------------------------------------------------- against a commit
def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="wants git")
def test_a_checkout_has_the_files_of_its_commit_and_is_removed(bench, tmp_path):
    """The working tree keeps its own files, also if the measurement raises."""
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("old")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "x")
    (tmp_path / "file").write_text("new")
    with pytest.raises(KeyError), bench.against.checkout("HEAD", tmp_path) as tree:
        assert (tree / "file").read_text() == "old" and (tmp_path / "file").read_text() == "new"
        raise KeyError
    listed = subprocess.run(["git", "-C", str(tmp_path), "worktree", "list"], capture_output=True, text=True).stdout
    assert not tree.exists() and len(listed.splitlines()) == 1
    with pytest.raises(ValueError, match="--against wants a commit .* got 'nonsense'"):
        bench.against.checkout("nonsense", tmp_path).__enter__()


def test_a_worker_imports_the_tinyft_of_its_tree(bench, tmp_path, monkeypatch):
    """A tree whose tinyft is not imported is an error."""
    (tmp_path / "tinyft").mkdir()
    (tmp_path / "tinyft" / "__init__.py").write_text("def Tensor(x, requires_grad):\n    return x\n")
    op = bench.against.Measurement("small", bench.cases.small_case("op"), 1)
    with bench.against.start(op, "old", tmp_path) as old, bench.against.start(op, "new", ROOT) as new:
        assert Path(old.about["package"]).is_relative_to(tmp_path)
        assert Path(new.about["package"]).is_relative_to(ROOT)
    (tmp_path / "link").symlink_to(ROOT)
    with bench.against.start(op, "new", tmp_path / "link"):
        pass
    monkeypatch.setattr(bench.against, "Side", lambda *arguments, tree: FakeSide("x", [], package=str(ROOT / "tinyft")))
    with pytest.raises(RuntimeError, match="the old side wants the tinyft of"):
        bench.against.start(op, "old", tmp_path / "other")


def test_pairs_alternate_and_processes_are_started_anew(bench, monkeypatch):
    """Seven pairs are five of one pair of processes and two of another, which begins with the other side."""
    log = []
    monkeypatch.setattr(bench.against, "start", lambda measurement, label, tree: FakeSide(label, log))
    monkeypatch.setattr(bench.paired.time, "sleep", lambda seconds: None)
    op = bench.against.Measurement("small", bench.cases.small_case("op"), 1)
    assert bench.against.measure(op, Path("old"), 7) == [1.0] * 7
    first = ["new", "old"]
    second = ["old", "new"]
    started_with = [first, second]  # the visits that measure how many steps fit
    pairs = [first, second, first, second, first], [second, first]
    wanted = [*started_with[0], *sum(pairs[0], []), *started_with[1], *sum(pairs[1], [])]
    assert log == wanted


@pytest.mark.parametrize("change", [{"losses": [1.0, 0.51]}, {"trained": 4}])
def test_sides_that_do_different_work_are_refused(bench, change):
    """The same losses and numbers of parameters pass."""
    op = bench.against.Measurement("small", bench.cases.small_case("op"), 1)
    bench.against.check_same_work(op, [FakeSide("new", []), FakeSide("old", [])])
    with pytest.raises(RuntimeError, match="op: the sides do different work"):
        bench.against.check_same_work(op, [FakeSide("new", []), FakeSide("old", [], **change)])


def test_the_conclusion_has_the_median_of_all_ratios_and_the_worst_case(bench):
    """The worst case is the one with the largest median, not the one with the largest ratio."""
    results = {"a": [1.0, 1.0, 9.0], "b": [1.1, 1.2, 1.3]}
    assert bench.against.conclusion(results) == ["median of all ratios 1.150", "worst 1.200 (b)"]
    machine = {"versions": {"numpy": "2"}, **dict.fromkeys(("date", "commit", "cpu", "cores", "system", "python"), "x")}
    page = bench.against.page(results, "505fa3f", machine)
    assert "| b | 1.200 | 1.100-1.300 | 3 |" in page and "- worst 1.200 (b)" in page


def test_both_trees_are_measured_on_all_cases(bench):
    """Training steps of four models, full and LoRA, on one and two threads; then the small cases."""
    names = [m.name for m in bench.against.measurements([1, 2])]
    for model in ("tiny", "small", "mid", "bert-mid"):
        for method in ("full", "lora_qv"):
            assert {f"{model}, {method}, 1 thread", f"{model}, {method}, 2 threads"} <= set(names)
    assert {"op", "attention", "optimizer", "fit", "generate", "load", "import"} <= set(names)
    assert len(names) == len(set(names)) == 23


def test_the_names_of_an_earlier_commit_are_found(bench, monkeypatch):
    """compat takes `objective` where the package has it, and the names of today elsewhere."""
    import compat

    from tinyft.train import batch

    assert compat.compute_loss is batch.compute_loss and compat.read_batch is batch.read_batch
    old = SimpleNamespace(objective="compute_loss of then", question="read_batch of then")
    monkeypatch.setattr(compat.ft, "objective", old, raising=False)
    monkeypatch.setitem(sys.modules, "tinyft.objective", old)
    del sys.modules["compat"]
    import compat

    assert (compat.compute_loss, compat.read_batch) == (old.objective, old.question)

"""The arithmetic of the benchmarks, and that their sides do the same work. No test looks at a duration."""

from __future__ import annotations

import functools
import io
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
MODULES = ("against", "bench", "cases", "compat", "machine", "paired", "report", "side_tinyft", "side_floor",
           "side_small", "side_gptq", "side_nf4", "side_beam", "side_packed", "side_real", "side_jax", "side_torch",
           "side_torch_compile", "side_torch_floor")
pytestmark = pytest.mark.skipif(array.backend() != "numpy", reason="the benchmarks measure NumPy")


@pytest.fixture
def bench(monkeypatch):
    """The modules of tests/benchmarks, importable for the length of a test."""
    monkeypatch.syspath_prepend(str(HERE))
    import against
    import bench as program
    import cases
    import paired
    import report

    yield SimpleNamespace(against=against, cases=cases, paired=paired, program=program, report=report)
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


def check_equal_products(formula) -> None:
    """A step of 10 s has 4 s of products, which take 6 s by NumPy: 12 s, of which tinyft takes 8."""
    assert formula(10.0, 4.0, 6.0, 8.0) == 1.5
    assert formula(10.0, 4.0, 4.0, 8.0) == 1.25  # equal products change nothing


WRONG_EQUAL_PRODUCTS = {
    "the other way round": lambda torch, own, numpy, tinyft: (torch + own - numpy) / tinyft,
    "on tinyft's side": lambda torch, own, numpy, tinyft: torch / (tinyft - numpy + own),
    "as a factor": lambda torch, own, numpy, tinyft: torch / tinyft * numpy / own,
    "without products": lambda torch, own, numpy, tinyft: (torch - own) / (tinyft - numpy),
    "not at all": lambda torch, own, numpy, tinyft: torch / tinyft,
}


def test_pytorch_s_step_with_the_products_of_numpy(bench):
    check_equal_products(bench.paired.equal_products)


@pytest.mark.parametrize("name", WRONG_EQUAL_PRODUCTS)
def test_another_formula_for_equal_products_is_rejected(name):
    with pytest.raises(AssertionError):
        check_equal_products(WRONG_EQUAL_PRODUCTS[name])


# ---------------------------------------------------------------------------------------------------- workers
def test_a_worker_has_no_settings_but_its_own(bench, monkeypatch):
    """Settings of libraries in the environment are removed; those of the side and the number of threads are set."""
    given = {"TINYFT_KERNELS": "off", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ATEN_CPU_CAPABILITY": "default"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    started = []

    def popen(command, env, **_):
        started.append(env)
        return SimpleNamespace(stdout=io.StringIO("{}\n"))

    monkeypatch.setattr(bench.paired.subprocess, "Popen", popen)
    case = bench.cases.GPT[0]
    bench.paired.Side("tinyft", case, 2)
    bench.paired.Side("tinyft", case, 2, "tinyft, NumPy", bench.program.NUMPY_KERNELS)
    bench.paired.Side("torch", case, 2, "torch, AVX2", bench.program.AVX2_TORCH)
    assert not given.keys() & started[0].keys()
    assert {started[0][name] for name in bench.paired.THREAD_VARIABLES} == {"2"}
    assert started[1]["TINYFT_KERNELS"] == "numpy"
    assert started[2]["MKL_ENABLE_INSTRUCTIONS"] == "AVX2" and started[2]["ATEN_CPU_CAPABILITY"] == "avx2"


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


@pytest.mark.parametrize("model", ["gpt", "bert"])
def test_the_operations_of_a_case_are_those_of_its_products(bench, model):
    """2 m k n of each product of the floor. A count without the backward pass, or of attention's half, differs."""
    import side_floor

    c = bench.cases.Case("x", 30, 8, 2, 2, 3, 5, model)
    wanted = sum(2 * out.size * a.shape[-1] for a, _, out in side_floor.build(c))
    attention = c.L * 6 * 2 * c.B * c.T * c.T * c.C
    assert side_floor.operations(c) == wanted
    assert wanted not in (side_floor.operations(c) / 3, side_floor.operations(c) - attention / 2)


def test_the_products_of_pytorch_are_those_of_numpy(bench):
    """The same results in the same order, attention's included."""
    pytest.importorskip("torch")
    import side_floor
    import side_torch_floor

    c = bench.cases.Case("x", 30, 8, 2, 2, 3, 5)
    of_numpy = side_floor.build(c)
    of_torch = side_torch_floor.build(c)
    assert side_floor.start(of_numpy, c)[0]() == side_torch_floor.start(of_torch, c)[0]() == 0.0
    for (_, _, wanted), (_, _, found) in zip(of_numpy, of_torch, strict=True):
        np.testing.assert_allclose(found.numpy().reshape(wanted.shape), wanted, atol=1e-5)


def losses_of(side, case, model) -> list[float]:
    """The losses of three steps of a side."""
    step, _ = side.start(model, case)
    return [step() for _ in range(3)]


def jax_parameters(model) -> dict:
    """The parameters of side_torch's model, as side_jax has them."""
    import jax.numpy as jnp

    def array(x):
        return jnp.asarray(x.detach().numpy().copy())

    def linear(layer):
        return array(layer.weight.T), array(layer.bias)

    def norm(layer):
        return array(layer.weight), array(layer.bias)

    blocks = []
    for b in model.blocks:
        block = {"norm1": norm(b.norm1), "qkv": linear(b.attn.qkv), "o": linear(b.attn.o)}
        block |= {"norm2": norm(b.norm2), "up": linear(b.mlp[0]), "down": linear(b.mlp[2])}
        blocks.append(block)
    return {"embed": array(model.embed.weight), "pos": array(model.pos.weight), "blocks": blocks,
            "norm": norm(model.norm)}


def test_the_side_of_jax_trains_as_that_of_pytorch(bench, monkeypatch):
    """From the same parameters the losses of three steps are equal; not so with another rate of PyTorch's AdamW."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("jax")
    import side_jax
    import side_torch

    case = bench.cases.Case("x", 20, 8, 1, 2, 3, 6)
    found = losses_of(side_jax, case, jax_parameters(side_torch.build(case)))
    assert losses_of(side_torch, case, side_torch.build(case)) == pytest.approx(found, rel=2e-6)
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda trained, lr, fused: adamw(trained, lr=1.1 * lr, fused=fused))
    assert losses_of(side_torch, case, side_torch.build(case)) != pytest.approx(found, rel=2e-6)


@pytest.mark.parametrize("model", ["gpt", "bert"])
def test_the_side_of_torch_compile_compiles_the_whole_forward_pass(bench, monkeypatch, model):
    """One graph without breaks, here run as it is. Its losses are those of the plain side."""
    torch = pytest.importorskip("torch")
    import side_torch
    import side_torch_compile

    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend, fullgraph=True))
    case = bench.cases.Case("x", 20, 8, 1, 2, 2, 6, model)
    losses = [losses_of(side, case, side.build(case)) for side in (side_torch, side_torch_compile)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(traced) == 1


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

    ratios = {"torch": r(0.99), "torch_compile": r(1.0), "floor": r(0.8)}
    seconds = {"tinyft": 0.5, "tinyft, NumPy": 0.6}
    row = {"case": "mid", "threads": 1, "seconds": seconds, "ratios": ratios}
    row["further"] = {"torch / tinyft, NumPy": r(0.86)}
    method = {"case": "mid", "method": "lora_qv", "threads": 1, "seconds": {"tinyft": 0.5}}
    method["ratios"] = {"torch": r(1.14), "full": r(2.0)}
    sections = {"steps": {"rows": [row], "machine": MACHINE}, "methods": {"rows": [method], "machine": MACHINE}}
    bench.report.write(sections, tmp_path)
    lines = [line for line in (tmp_path / "cpu.md").read_text().splitlines() if line.startswith("| mid")]
    assert lines[0] == ("| mid | 1 | 500 ms | 600 ms | 0.99 (0.99-0.99) ✗ | 1.00 (1.00-1.00) ✓ |  "
                        "| 0.86 (0.86-0.86) ✓ |")
    assert lines[1] == "| mid | 1 |  | 1.25 (1.25-1.25) |  |  |  |  |"
    assert lines[2] == "| mid | 1 | LoRA (q, v) | 500 ms | 1.14 (1.14-1.14) ✗ |  | 0.50 (0.50-0.50) |"


MACHINE = {"versions": {}, **dict.fromkeys(("date", "commit", "cpu", "cores", "system", "python"), "x")}


def products(*pairs: tuple[float, float]) -> list[dict]:
    """Rows with these seconds of NumPy's and PyTorch's products."""
    rows = []
    for i, (of_numpy, of_torch) in enumerate(pairs):
        rows.append({"case": f"c{i}", "threads": 1, "seconds": {"floor": of_numpy, "torch_floor": of_torch}})
    return rows


def test_the_page_says_whether_the_products_are_equally_fast(bench):
    """Within 5 % in both directions; beyond that the library that is faster, and where most."""
    say = bench.report.compare_products
    assert say([{"case": "x", "threads": 1, "seconds": {"floor": 1.0}}]) == []
    within = " ".join(say(products((1.05, 1.0), (1.0, 1.05), (1.0, 1.0))))
    assert "are within 5 % of each other in all rows" in within
    beyond = say(products((1.06, 1.0), (1.0, 1.0), (1.5, 1.0)))
    assert "are not within 5 %" in beyond[0] and beyond[2:] == [""]
    assert beyond[1] == "PyTorch's are faster by more in 2 of 3 rows, most at c2 on 1 thread (1.50 times as fast)."
    other = say(products((1.0, 1.06), (1.0, 1.0)))
    assert "are not within 5 %" in other[0] and other[1].startswith("NumPy's are faster by more in 1 of 2 rows")
    both = say(products((1.0, 1.2), (1.2, 1.0)))
    assert both[1].startswith("NumPy's") and both[2].startswith("PyTorch's")


def test_the_speed_of_products_is_in_operations_a_second(bench):
    """6e9 operations in 0.5 s by NumPy and 0.25 s by PyTorch."""
    row = {"case": "mid", "threads": 1, "operations": 6e9, "ratios": {"floor": {k: 1.0 for k in SPREAD}}}
    row["seconds"] = {"tinyft": 1.0, "floor": 0.5, "torch_floor": 0.25}
    assert "| mid | 1 | 12 / 24 | 1.00 (1.00-1.00) |" in "\n".join(bench.report.step_products([row]))


SPREAD = ("ratio", "low", "high", "rounds")


def check_serial_share(share) -> None:
    """10 s on one thread and 6 s on two: 2 s are serial, 8 s are not. Twice as fast or more: nothing is serial."""
    assert share(10.0, 6.0) == pytest.approx(0.2)
    assert share(10.0, 5.0) == share(10.0, 4.0) == 0
    assert share(10.0, 10.0) == 1


WRONG_SHARES = {
    "the parallel share": lambda one, two: 2 - 2 * two / one,
    "no limit": lambda one, two: 2 * two / one - 1,
    "one over the speed": lambda one, two: max(0.0, two / one - 0.5),
}


def test_amdahl_s_law(bench):
    """A fifth is serial: four cores are 1 / (0.2 + 0.8 / 4) times as fast, two as fast as measured."""
    check_serial_share(bench.report.serial_share)
    speedup = bench.report.speedup
    assert speedup(0.2, 2) == pytest.approx(10 / 6)
    assert speedup(0.2, 4) == pytest.approx(2.5) and speedup(0.2, 8) == pytest.approx(10 / 3)
    assert speedup(0.0, 8) == 8 and speedup(1.0, 8) == 1 and speedup(0.3, 1) == 1
    rows = [{"case": "mid", "threads": t, "seconds": {"tinyft": s, "floor": s}} for t, s in ((1, 10.0), (2, 6.0))]
    table = bench.report.more_cores(rows)
    assert "| mid | tinyft | 1.67 | 0.20 | 2.50 | 3.33 |" in table and len(table) == 7
    assert bench.report.more_cores(rows[:1]) == []


@pytest.mark.parametrize("name", WRONG_SHARES)
def test_another_serial_share_is_rejected(name):
    with pytest.raises(AssertionError):
        check_serial_share(WRONG_SHARES[name])


def test_rows_of_an_earlier_measurement_are_told_apart(bench):
    """A row that is not measured again keeps the date, commit and processor of its own measurement."""
    first = {"rows": [{"case": "tiny"}, {"case": "mid"}], "machine": MACHINE | {"commit": "old"}}
    rows = bench.program.merge(bench.program.dated(first), [{"case": "mid"}])
    section = {"rows": rows, "machine": MACHINE | {"commit": "new"}}
    assert "Earlier, x, commit old, x: 1 row.*" in bench.report.about(section)
    assert "Earlier" not in bench.report.about(first)
    again = bench.program.dated(section)
    assert [row["measured"] for row in again] == ["x, commit old, x", "x, commit new, x"]


@pytest.mark.xfail(strict=True, reason="the committed numbers are from before the present columns of the page")
def test_the_committed_page_is_the_report_of_the_committed_numbers(bench, tmp_path, monkeypatch):
    """The figure is not drawn."""
    monkeypatch.setattr(bench.report, "draw", lambda rows, path: None)
    data = json.loads((HERE / "results" / "cpu.json").read_text())
    bench.report.write(data, tmp_path)
    assert (tmp_path / "cpu.md").read_text() == (HERE / "results" / "cpu.md").read_text()


# ---------------------------------------------------------------------------------------------------- the program
def parse(bench, monkeypatch, *arguments: str):
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    return bench.program.parse()


def test_the_cases_can_be_chosen(bench, monkeypatch):
    """In the sections of training steps, which are then the only ones."""
    every = bench.cases.GPT
    options = parse(bench, monkeypatch, "--cases", "mid,bert-mid")
    assert options.only == ["steps", "others", "methods", "memories"] and options.threads == [1, 2]
    assert [c.name for c in bench.program.chosen(every, options)] == ["mid", "bert-mid"]
    options = parse(bench, monkeypatch, "--quick", "--only", "steps")
    assert [c.name for c in bench.program.chosen(every, options)] == ["tiny"] and options.threads == [1]
    assert options.out != parse(bench, monkeypatch).out == HERE / "results"  # not beside the true numbers
    options = parse(bench, monkeypatch)
    assert bench.program.chosen(every, options) == every and options.only is None
    refused = [("nonsense",), ("tiny", "--only", "packed"), ("tiny", "--against", "HEAD")]
    for arguments in refused:
        with pytest.raises(SystemExit):
            parse(bench, monkeypatch, "--cases", *arguments)


def test_a_peer_without_its_compiler_is_left_out(bench, monkeypatch):
    monkeypatch.setattr(bench.program.importlib.util, "find_spec", lambda name: name != "absent" or None)
    compilers = {"clang", *bench.program.EXECUTABLES["torch_compile"]}
    monkeypatch.setattr(bench.program.shutil, "which", lambda name: name in compilers or None)
    names = ("torch", "torch_compile", "tinygrad", "absent")
    assert bench.program.available(*names) == ["torch", "torch_compile", "tinygrad"]
    compilers.clear()
    assert bench.program.available(*names) == ["torch"]


def test_the_sides_of_a_step(bench, monkeypatch):
    """JAX has only the GPT; --quick has few sides; a missing peer takes its products and its AVX2 side along."""
    gpt, bert = bench.cases.GPT[0], bench.cases.BERT[0]
    options = SimpleNamespace(quick=False)
    installed = {"torch", "torch_compile", "jax"}
    monkeypatch.setattr(bench.program, "available", lambda *names: [name for name in names if name in installed])

    def names(case):
        return [name or kind for kind, _, _, name, *_ in map(arguments, bench.program.step_sides(case, 2, options))]

    def arguments(side):
        return (*side.args, "") if len(side.args) == 3 else side.args

    avx2 = ["tinyft, AVX2", "floor, AVX2", "torch, AVX2"]
    own = ["tinyft", "tinyft, NumPy"]
    assert names(gpt) == [*own, "torch", "torch_compile", "jax", "floor", "torch_floor", *avx2]
    assert names(bert) == [*own, "torch", "torch_compile", "floor", "torch_floor", *avx2]
    options.quick = True
    assert names(gpt) == [*own, "torch", "jax", "floor", "torch_floor"]
    installed.clear()
    assert names(gpt) == [*own, "floor"]


def test_the_ratios_of_a_step_are_of_one_round(bench):
    """Two rounds, of which the second is twice as slow for all sides."""
    times = {"tinyft": 8.0, "tinyft, NumPy": 16.0, "torch": 10.0, "floor": 6.0, "torch_floor": 4.0}
    rows = [times, {name: 2 * t for name, t in times.items()}]
    found = bench.program.step_ratios(rows)
    assert found["equal_products"]["tinyft"]["ratio"] == 1.5
    assert found["equal_products"]["tinyft, NumPy"]["ratio"] == 0.75
    assert found["further"] == {"torch / tinyft, NumPy": {"ratio": 0.625, "low": 0.625, "high": 0.625, "rounds": 2}}
    assert bench.program.step_ratios([{"tinyft": 1.0}]) == {"further": {}, "equal_products": {}}


def test_the_program_measures_and_writes_the_page(bench, monkeypatch, tmp_path):
    """Without peers, which take seconds to import."""
    monkeypatch.setattr(bench.program, "available", lambda *names: [])
    monkeypatch.setattr(sys, "argv", ["bench.py", "--quick", "--only", "steps", "--out", str(tmp_path)])
    bench.program.main()
    page = (tmp_path / "cpu.md").read_text()
    assert "| tiny | 1 |" in page and "bert" not in page
    row = json.loads((tmp_path / "cpu.json").read_text())["steps"]["rows"][0]
    assert row["seconds"].keys() == {"tinyft", "tinyft, NumPy", "floor"}


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

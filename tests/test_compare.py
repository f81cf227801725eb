"""The comparison: its statistics, its conclusions, and a small one from end to end."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyft as ft
from tinyft import array, cli, compare, data
from tinyft.compare import PRESETS, Settings, cells, figure, settings, split_names
from tinyft.compare.figure import draw
from tinyft.compare.report import finished_runs, interval, table, verdict
from tinyft.compare.settings import METHODS, contenders, learning_rates
from tinyft.compare.workers import interrupts_delayed

pytestmark = pytest.mark.skipif(array.backend() != "numpy", reason="its parts are tested on every backend")


ROOT = Path(ft.__file__).resolve().parents[1]


def report(
    values: dict[str, list[float]], trained: dict[str, int], task: str = "intact", base: tuple[str, ...] = ()
) -> dict:
    """A report with these qualities and these numbers of trained parameters; NaN is a run that diverged.

    A row without trained parameters is a simple model, or an untouched base if `base` has its name.
    """
    first, second = ("perplexity", "prose") if task == "domain" else ("accuracy", "macro_f1")
    results = {}
    rows = {}
    for name, qualities in values.items():
        runs = [{first: quality, second: quality / 2} for quality in qualities]
        results[name] = [{"diverged": True} if np.isnan(run[first]) else run for run in runs]
        kind = "trained" if name in trained else "simple"
        rows[name] = {"kind": "base" if name in base else kind, "family": "selective"}
    costs = {}
    for name, count in trained.items():
        sizes = {"trained": count, "head": 2, "stored": 4 * count, "memory": 10**6}
        costs[name] = sizes | {"step_ratio": 0.5, "inference_ratio": 1.1}
    seeds = len(next(iter(values.values())))
    made = {"task": task, "seeds": seeds, "train": 100, "steps": 5}
    return {"settings": made, "rows": rows, "costs": costs, "results": results}


def line_of(text: str, name: str) -> str:
    """The first line of a text that contains a name."""
    return next(line for line in text.splitlines() if name in line)


# ---------------------------------------------------------------------------------------------------- statistics
def coverage(interval_of) -> float:
    """The share of 5,000 draws of five paired seeds in which the interval contains the true difference 1."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(5000):
        seed = rng.normal(0, 5, 5)  # the effect of a seed on both contenders
        a = seed + 1 + rng.normal(0, 1, 5)
        b = seed + rng.normal(0, 1, 5)
        _, low, high = interval_of(a, b)
        hits += low <= 1 <= high
    return hits / 5000


def around(mean: float, half: float) -> tuple[float, float, float]:
    return mean, mean - half, mean + half


def unpaired(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    half = 2.306 * ((a.var(ddof=1) + b.var(ddof=1)) / len(a)) ** 0.5
    return around(a.mean() - b.mean(), half)


def normal(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    difference = a - b
    return around(difference.mean(), 1.96 * difference.std(ddof=1) / len(difference) ** 0.5)


def population(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    difference = a - b
    return around(difference.mean(), 2.776 * difference.std() / len(difference) ** 0.5)


def test_the_paired_interval_contains_the_truth_95_times_in_100():
    assert abs(coverage(interval) - 0.95) < 0.009


@pytest.mark.parametrize("wrong", [unpaired, normal, population], ids=lambda f: f.__name__)
def test_wrong_intervals_are_rejected(wrong):
    assert not abs(coverage(wrong) - 0.95) < 0.009


def test_one_seed_supports_no_conclusion():
    _, low, high = interval(np.array([0.9]), np.array([0.1]))
    assert low == -np.inf and high == np.inf


# ---------------------------------------------------------------------------------------------------- conclusions
def test_the_verdict_is_better_worse_or_no_difference_shown():
    values = {
        "from scratch": [0.5, 0.51, 0.52],
        "LoRA": [0.6, 0.61, 0.62],
        "BitFit": [0.5, 0.62, 0.45],
        "full": [0.7, 0.71, 0.72],
    }
    text = verdict(report(values, {"from scratch": 100, "LoRA": 10, "BitFit": 5, "full": 100}))
    against_full, against_scratch = text.split("against from scratch")
    assert "worse" in line_of(against_full, "LoRA")
    assert "better" in line_of(against_scratch, "LoRA")
    assert "no difference shown" in line_of(against_scratch, "BitFit")


def test_a_lower_perplexity_is_better():
    values = {"LoRA": [50.0, 51, 52], "full": [40.0, 41, 42]}
    text = verdict(report(values, {"LoRA": 10, "full": 100}, "domain"))
    assert "worse" in line_of(text, "LoRA")


@pytest.mark.parametrize("simple, word", [(0.9, "wins"), (0.3, "loses")])
def test_the_verdict_compares_the_best_simple_model(simple, word):
    text = verdict(report({"tfidf": [simple] * 2, "full": [0.6, 0.6]}, {"full": 100}))
    assert f"tfidf {word} here" in text


def test_the_table_has_one_row_for_each_in_order_of_trained_parameters():
    made = report({"full": [0.7, 0.7], "tfidf": [0.6, 0.6], "LoRA": [0.65, 0.66]}, {"full": 100, "LoRA": 10})
    rows = [line.split("  ")[0] for line in table(made).splitlines()]
    assert [row for row in rows if row in ("full", "tfidf", "LoRA")] == ["tfidf", "LoRA", "full"]


def test_the_base_is_told_by_its_kind_and_not_by_its_name():
    """A simple model called "base rate" competes as one; an untouched base of any name does not, though it is best."""
    values = {"base rate": [70.0, 70], "untouched": [10.0, 10], "full": [50.0, 50]}
    made = report(values, {"full": 100}, "domain", base=("untouched",))
    assert "base rate loses here: 70.000 against 50.000" in verdict(made)
    rows = [line.split("  ")[0] for line in table(made).splitlines()]
    assert [row for row in rows if row in values] == ["base rate", "untouched", "full"]


def test_forgetting_is_a_difference_from_the_base_on_prose():
    """`report` makes the perplexity on prose half of that on source: 45 and 46 against the base's 20."""
    values = {"base": [40.0, 40, 40], "LoRA": [90.0, 91, 92], "full": [39.0, 40, 41]}
    text = verdict(report(values, {"LoRA": 10, "full": 100}, "domain", base=("base",)))
    _, forgotten = text.split("forgotten: perplexity above the base's 20.0 on prose")
    assert "+25.500" in line_of(forgotten, "LoRA") and line_of(forgotten, "LoRA").endswith("forgets")
    assert "no difference shown" in line_of(forgotten, "full")


def test_a_contender_that_diverged_is_a_marked_row():
    """One seed of three is enough: the mean of the others would flatter it. The rest of the table is as without it."""
    values = {"BitFit": [50.0, np.nan, 50], "LoRA": [60.0, 61, 62], "full": [70.0, 71, 72], "bigrams": [90.0] * 3}
    made = report(values, {"BitFit": 5, "LoRA": 10, "full": 100}, "domain")
    row = line_of(table(made), "BitFit")
    assert "diverged" in row and "50.0" not in row and "BitFit: diverged with seed 1" in table(made)
    text = verdict(made)
    assert line_of(text, "BitFit").endswith("diverged") and "better" in line_of(text, "LoRA")
    assert "bigrams loses here: 90.000 against 61.000 of the best fine-tuned model (LoRA)" in text
    values["full"] = [np.nan] * 3
    assert "full diverged" in verdict(report(values, {"BitFit": 5, "LoRA": 10, "full": 100}, "domain"))


def test_runs_that_did_not_end_are_counted_and_left_out():
    values = {"BitFit": [50.0, 51, 52], "LoRA": [60.0, 61, 62], "full": [70.0, 71, 75]}
    made = report(values, {"BitFit": 5, "LoRA": 10, "full": 100}, "domain")
    made["results"]["LoRA"][2] = None
    made["results"]["BitFit"] = [None, None, None]
    assert finished_runs(made) == 5
    assert "60.5 ± 0.7" in line_of(table(made), "LoRA") and "not run" in line_of(table(made), "BitFit")
    assert "LoRA: 2 of 3 runs finished" in table(made) and "BitFit: 0 of 3 runs finished" in table(made)
    assert "-10.000" in line_of(verdict(made), "LoRA") and "too few runs" in line_of(verdict(made), "BitFit")


def test_a_huge_perplexity_keeps_the_columns_narrow():
    made = report({"LoRA": [1e304, 1e303], "full": [40.0, 41]}, {"LoRA": 10, "full": 100}, "domain")
    assert max(map(len, table(made).splitlines())) < 120 and max(map(len, verdict(made).splitlines())) < 120


# ---------------------------------------------------------------------------------------------------- figure
def panels(made: dict) -> list:
    """The axes of the figure of a report."""
    matplotlib_figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    subplots = matplotlib_figure.Figure.subplots

    def spy(fig, *arguments, **options):
        axes = subplots(fig, *arguments, **options)
        drawn.append(fig)
        return axes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib_figure.Figure, "subplots", spy)
        assert draw(made).startswith(b"\x89PNG")
    return drawn[0].axes


def test_domain_has_two_panels_of_one_height_with_the_base_as_a_point_in_both():
    values = {"base": [400.0] * 2, "bigrams": [115.0] * 2, "LoRA": [90.0, 91], "full": [55.0, 54]}
    made = report(values, {"LoRA": 10_000, "full": 10**6}, "domain", base=("base",))
    made["costs"]["base"] = {"trained": 0, "head": 0, "stored": 0, "inference_ratio": 1.0}
    left, right = panels(made)
    assert left.get_position().height == right.get_position().height
    assert left.get_ylim() == right.get_ylim()
    for ax, x in ((left, 0), (right, 200)):
        assert (x, 400) in [tuple(line.get_xydata()[0]) for line in ax.lines if line.get_marker() == "*"]
        assert ax.get_xlim()[0] < x and "perplexity" in ax.get_xlabel() + left.get_ylabel()
    assert len(panels(report({"full": [0.5, 0.6]}, {"full": 100}))) == 1


def named_boxes(ax) -> dict[str, Any]:
    """{text: its box in pixels} of the names beside the points."""
    return {text.get_text(): text.get_window_extent() for text in ax.texts}


@pytest.mark.parametrize("task", ["domain", "intact", "package"])
def test_every_point_has_its_name_beside_it_and_no_name_covers_another(task):
    made = json.loads((ROOT / f"tests/benchmarks/results/{task}.json").read_text())
    for ax in panels(made):
        boxes = named_boxes(ax)
        for container in ax.containers:
            x, y = ax.transData.transform(container.lines[0].get_xydata()[0])
            box = boxes[container.get_label()]
            assert max(box.x0 - x, x - box.x1) < 30
            assert max(box.y0 - y, y - box.y1) < 50
        for a, b in itertools.combinations(boxes.values(), 2):
            assert figure.covered(a, b) < 0.1 * min(a.width * a.height, b.width * b.height)
        for box in boxes.values():
            assert figure.outside(box, ax.get_window_extent()) < 0.1 * box.width * box.height


def test_names_of_equal_points_do_not_cover_each_other():
    values = {f"method {i}": [50.0, 51.0] for i in range(4)}
    ax = panels(report({"other": [80.0, 81.0], **values}, {name: 1000 for name in ["other", *values]}, "domain"))[0]
    boxes = list(named_boxes(ax).values())
    assert all(figure.covered(a, b) == 0 for a, b in itertools.combinations(boxes, 2))


def test_no_two_contenders_look_the_same():
    values = {f"m{i}": [50.0 + i] * 2 for i in range(40)}
    axes = panels(report(values, {name: 10 + i for i, name in enumerate(values)}, "domain"))
    points = [line for line in axes[0].lines if line.get_marker() == "o"]
    looks = {(line.get_color(), line.get_fillstyle()) for line in points}
    assert len(points) == len(looks) == 40


def test_a_contender_without_a_quality_is_left_out_of_the_figure():
    made = report({"LoRA": [np.nan, 50], "full": [40.0, 41]}, {"LoRA": 10, "full": 100}, "domain")
    assert len([line for line in panels(made)[0].lines if line.get_marker() == "o"]) == 1


@pytest.mark.parametrize("task", ["domain", "intact", "package"])
def test_the_stored_results_can_be_shown(task):
    made = json.loads((ROOT / f"tests/benchmarks/results/{task}.json").read_text())
    assert "full" in table(made) and "against full" in verdict(made)


# ---------------------------------------------------------------------------------------------------- one number
def test_the_base_has_one_perplexity_wherever_it_is_quoted():
    """In the fifteen lines, the table and the sentences of the README, and in the stored results."""
    model, _ = ft.load("base-gpt")
    code = cells.whole_domain("base-gpt")
    source = ft.perplexity(model, data.held_out_batches(code.test))
    prose = ft.perplexity(model, data.held_out_batches(code.kept))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"# {source:.0f}: it has never seen code" in readme
    row = re.search(r"^base, untouched +0 +0.0 kB +(\S+) +(\S+) ", readme, re.MULTILINE)
    assert row.groups() == (f"{source:.1f}", f"{prose:.1f}")
    assert f"falls from {source:.1f} to" in readme and f"above the base's {prose:.1f}" in readme
    stored = json.loads((ROOT / "tests/benchmarks/results/domain.json").read_text())
    for metrics in stored["results"][cells.BASE]:
        assert metrics["perplexity"] == pytest.approx(source, rel=1e-4)
        assert metrics["prose"] == pytest.approx(prose, rel=1e-4)
    lesson = (ROOT / "lessons/04_pretraining/lesson.py").read_text(encoding="utf-8")
    assert "ft.data.held_out_batches(" in lesson
    assert f'on_prose["base-gpt"] - {prose:.1f}) < 0.05' in lesson
    assert f'on_code["base-gpt"] - {source:.0f}) < 0.5' in lesson


def test_the_comparison_measures_by_the_protocol():
    """The same windows as held_out_batches with its defaults, in both presets."""
    for preset in ("quick", "full"):
        s = PRESETS[preset, "domain"]
        material = cells.load_material(cells.limit_text_length(s), 0)
        for batches, split in ((material.test, material.task.test), (material.prose, material.task.kept)):
            expected = data.held_out_batches(split)
            assert len(batches) == len(expected) == 8
            assert all(np.array_equal(a["ids"], b["ids"]) for a, b in zip(batches, expected))
    assert np.array_equal(material.task.train, data.task("domain", 0, s.train).train)


def test_held_out_windows_are_spread_over_the_whole_split():
    tokens = np.arange(1000)
    first = [batch["ids"][:, 0] for batch in data.held_out_batches(tokens, T=10, count=7, batch_size=3)]
    assert [len(rows) for rows in first] == [3, 3, 1]
    assert list(np.concatenate(first)) == [0, 140, 280, 420, 570, 710, 850]
    whole = data.held_out_batches(tokens, T=10, count=1000)
    assert np.array_equal(np.concatenate([batch["ids"] for batch in whole]).ravel(), tokens)


# ---------------------------------------------------------------------------------------------------- settings
def test_methods_are_chosen_by_short_or_full_name():
    rows = replace(PRESETS["quick", "intact"], names=("bitfit", "FULL", "LoRA (r=8; q, v)")).chosen()
    assert [row.name for row in rows] == ["BitFit", "LoRA (r=8; q, v)", "full"]
    with pytest.raises(ValueError, match="no method 'lroa'.*BitFit"):
        Settings(names=("lroa",)).chosen()


def test_one_short_name_may_choose_several_rows():
    rows = Settings(names=("lora",)).chosen()
    assert [row.name for row in rows] == ["LoRA (r=8; q, v)", "LoRA (r=8; all)"]


@pytest.mark.parametrize("text, names", [
    ("all", ()),
    ("LoRA, full", ("LoRA", "full")),
    ("LoRA (r=8; q, v)", ("LoRA (r=8; q, v)",)),
    ("prefix, MLP,bitfit", ("prefix, MLP", "bitfit")),
    ("prefix,bitfit", ("prefix", "bitfit")),
])  # fmt: skip
def test_names_are_separated_by_commas_and_may_hold_commas(text, names):
    assert split_names(text, "domain") == names


@pytest.mark.parametrize("text", ["", ",", "lora,", "lora,,full", "lora;full", "head only", "all,lora", "MLP"])
def test_a_name_that_does_not_exist_is_refused(text):
    with pytest.raises(ValueError, match="there is no method .* to compare on domain; there are from scratch, BitFit"):
        split_names(text, "domain")


def test_every_contender_has_a_learning_rate_for_each_task():
    """Only the head alone is missing in domain: a language model's tied head is its embedding."""
    rates = learning_rates()
    assert rates["intact"].keys() == rates["package"].keys() == METHODS.keys()
    assert METHODS.keys() - rates["domain"].keys() == {"head only"} and rates["domain"].keys() < METHODS.keys()


def test_presets_have_one_or_two_contenders_of_each_family():
    """Full fine-tuning, with which all are compared, and the head alone are no further methods of a family."""
    for s in PRESETS.values():
        rows = [c for c in s.chosen() if c.name not in ("full", "head only")]
        families = [c.family for c in rows]
        assert set(families) == {c.family for c in contenders(s.task)}, "each family of methods is in each preset"
        assert all(families.count(family) <= 2 for family in families)
        assert "full" in s.names and "from scratch" in s.names


def test_a_preset_does_not_grow_with_the_methods(monkeypatch):
    before = {key: s.chosen() for key, s in PRESETS.items()}
    more = {f"LoRA (r={r}; all)": ft.LoRA(r=r) for r in (1, 2, 4)}
    monkeypatch.setattr(settings, "METHODS", METHODS | more)
    rates = {task: learning_rates()[task] | dict.fromkeys(more, 1e-3) for task in ("domain", "intact", "package")}
    monkeypatch.setattr(settings, "learning_rates", lambda: rates)
    assert {key: s.chosen() for key, s in PRESETS.items()} == before
    assert len(Settings("domain").chosen()) == len(before["quick", "domain"]) + 6


def test_domain_is_the_default(capsys):
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    assert "--task {domain,intact,package}" in capsys.readouterr().out
    assert cli.parser().parse_args(["compare"]).task == "domain" and Settings() == replace(
        PRESETS["quick", "domain"], names=()
    )


def refused(arguments: list[str], capsys, tmp_path: Path) -> str:
    """The one sentence with which the command refuses these arguments, before it prints or writes anything."""
    out = tmp_path / "out"
    assert cli.main(["compare", "--out", str(out), *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and not out.exists()
    assert printed.err.startswith("tinyft: ") and printed.err.count("\n") == 1 and "Traceback" not in printed.err
    return printed.err


NO_COUNTS = [("0", "0"), ("-1", "-1"), ("2.5", "'2.5'"), ("nonsense", "'nonsense'"), ("", "''"), ("nan", "'nan'")]


@pytest.mark.parametrize("option", ["--jobs", "--seeds", "--steps", "--train"])
@pytest.mark.parametrize("value, shown", NO_COUNTS)
def test_counts_are_whole_numbers_of_at_least_one(option, value, shown, capsys, tmp_path):
    sentence = refused([option, value], capsys, tmp_path)
    assert sentence == f"tinyft: {option} wants a whole number >= 1, got {shown}\n"


@pytest.mark.parametrize("arguments, words", [
    (["--seeds", "1000"], "seeds wants a whole number from 1 to 100, got 1000"),
    (["--methods", "nothing"], "there is no method 'nothing' to compare on domain"),
    (["--methods", ""], "there is no method ''"),
    (["--model", "no/such/directory"], "no/such/directory"),
    (["--train", "111"], "train wants at least 112 tokens for domain, one window, got 111"),
    (["--train", "100000000"], "100000000"),
    (["--task", "intact", "--train", "100000000"], "100000000"),
    (["--model", "base-bert"], "the task domain wants a language model such as GPT-2, got a BERT in base-bert"),
])  # fmt: skip
def test_settings_without_sense_are_refused(arguments, words, capsys, tmp_path):
    assert words in refused(arguments, capsys, tmp_path)


@pytest.mark.parametrize("make, words", [
    (lambda folder: tiny(folder, lm=True, positions=20), "at least 24 positions; this one has 20"),
    (lambda folder: without_tokenizer(folder), "wants a model with its tokenizer, got no tokenizer.json in"),
    (lambda folder: with_nan(folder), "wants a model of finite weights, got NaN or infinity in blocks.0."),
    (lambda folder: tiny(folder, lm=True, vocab=2000), "got 2048 tokens in the tokenizer of"),
    (lambda folder: str(folder), "config.json"),
], ids=["positions", "tokenizer", "NaN", "vocabulary", "empty"])  # fmt: skip
def test_a_model_that_cannot_take_part_is_refused(make, words, capsys, tmp_path):
    assert words in refused(["--model", make(tmp_path)], capsys, tmp_path)


def without_tokenizer(folder: Path) -> str:
    model = tiny(folder, lm=True)
    (Path(model) / "tokenizer.json").unlink()
    return model


def with_nan(folder: Path) -> str:
    directory = tiny(folder, lm=True)
    model, tokenizer = ft.load(directory)
    next(p for name, p in model.named_parameters().items() if name.startswith("blocks.0.")).data[:] = np.nan
    return str(ft.save(model, directory, tokenizer))


def test_a_folder_that_cannot_be_written_is_refused_before_the_training(capsys, tmp_path):
    """Below a file, and where a folder has the name of a result: one sentence, and nothing is printed or made."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder" / "compare.json").mkdir(parents=True)
    for out in ("file", "file/below", "folder"):
        assert cli.main(["compare", "--task", "package", "--out", str(tmp_path / out)]) == 1
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1
        assert printed.err.startswith("tinyft: compare ") and printed.err.endswith("nothing was started\n")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("arguments, words", [
    ((None, "out"), "compare: s wants Settings, got None"),
    ((Settings(), None), "compare: out wants the path of a folder, got None"),
    ((Settings(), "out", 2.5), "jobs wants a whole number >= 1, got 2.5"),
    ((Settings(), "out", True), "jobs wants a whole number >= 1, got True"),
    ((Settings(), "out", 1, "print"), "compare: say wants a function of one text, got 'print'"),
    ((Settings(steps=2.5), "out"), "steps wants a whole number >= 1, got 2.5"),
    ((Settings(T=1), "out"), "T wants a whole number >= 2, got 1"),
])  # fmt: skip
def test_a_call_with_a_wrong_argument_is_refused(arguments, words):
    with pytest.raises((TypeError, ValueError)) as error:
        compare.compare(*arguments)
    assert str(error.value) == words


def test_the_command_lists_methods_and_the_machine(capsys):
    assert cli.main(["methods"]) == 0 and cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(method.cls.__name__ in out for method in ft.methods()) and "NumPy" in out and "CuPy" in out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
@pytest.mark.parametrize("redirection, status, error", [
    (">&-", 0, ""),
    ("> /dev/full", 1, "tinyft: [Errno 28] No space left on device\n"),
])  # fmt: skip
def test_output_that_cannot_be_written_is_no_traceback(redirection, status, error):
    """Standard output is closed, or on a full disk."""
    command = f"{sys.executable} -m tinyft.cli methods {redirection}"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env)
    assert (run.returncode, run.stderr) == (status, error)


# ---------------------------------------------------------------------------------------------------- end to end
def tiny(folder: Path, lm: bool = False, positions: int = 64, vocab: int = 2048) -> str:
    """The directory of a very small model."""
    sizes = {"vocab": vocab, "positions": positions, "width": 16, "layers": 1, "heads": 2}
    model = ft.GPT(ft.GPTConfig(**sizes)) if lm else ft.BERT(ft.BERTConfig(**sizes))
    return str(ft.save(model, folder / "model", data.shipped_tokenizer()))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The directory of a very small language model, one for all tests: the text is tokenised once."""
    return tiny(tmp_path_factory.mktemp("lm"), lm=True)


@pytest.mark.parametrize("task", ["intact", "package", "domain"])
def test_a_small_comparison_from_end_to_end(task, model, tmp_path):
    """The file, every contender and every simple model, the forecast before the training, and the figure."""
    lm = task == "domain"
    train = 2000 if lm else 120
    directory = model if lm else tiny(tmp_path / "bert")
    s = Settings(task, model=directory, steps=2, seeds=2, train=train, test=8, batch=8, T=24)
    lines: list[str] = []
    out = tmp_path / "out"
    made = compare.compare(s, out, jobs=1, say=lines.append)
    assert made == json.loads((out / "compare.json").read_text()) | {"settings": made["settings"]}
    names = {c.name for c in s.chosen()}
    base = {cells.BASE} if lm else set()
    assert names | base == set(made["costs"]) and names | base < set(made["results"]) == set(made["rows"])
    for metrics in made["results"].values():
        assert len(metrics) == 2 and all(np.isfinite(m[s.quality]) for m in metrics)
    assert "minutes on this machine" in lines[1]
    assert made["costs"]["full"]["trained"] > made["costs"]["BitFit"]["trained"]
    pytest.importorskip("matplotlib")
    assert (out / "compare.png").stat().st_size > 10_000
    assert sorted(path.name for path in out.iterdir()) == ["compare.json", "compare.png"]


def strict_json(path: Path) -> dict:
    """The content of a JSON file; ValueError for NaN and Infinity, which JSON does not have."""

    def refuse(name: str) -> None:
        raise ValueError(f"{path} holds {name}, which is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_contender_that_diverges_does_not_end_the_comparison(model, tmp_path, monkeypatch):
    rates = {"domain": {"BitFit": 1e-3, "full": 1e30}}
    monkeypatch.setattr(settings, "learning_rates", lambda: rates)
    s = Settings(model=model, steps=4, seeds=2, train=2000, test=8, batch=8, T=24)
    lines: list[str] = []
    compare.compare(s, tmp_path, jobs=1, say=lines.append)
    made = strict_json(tmp_path / "compare.json")
    assert all(run["diverged"] and run.keys() == {"diverged", "seconds"} for run in made["results"]["full"])
    text = "\n".join(lines)
    assert "diverged" in line_of(text, "full  ") and "full: diverged with seed 0, 1" in text
    assert all(np.isfinite(run["perplexity"]) for run in made["results"]["BitFit"])


def test_an_error_in_one_run_keeps_the_runs_before_it(model, tmp_path, monkeypatch):
    train_one = cells.train_one

    def fail_late(s, c, seed):
        if seed == 1:
            raise MemoryError
        return train_one(s, c, seed)

    monkeypatch.setattr(cells, "train_one", fail_late)
    s = Settings(model=model, steps=1, seeds=2, train=2000, test=8, names=("bitfit", "full"), T=24)
    lines: list[str] = []
    with pytest.raises(MemoryError):
        compare.compare(s, tmp_path, jobs=1, say=lines.append)
    assert "full: 1 of 2 runs finished" in "\n".join(lines)
    runs = strict_json(tmp_path / "compare.json")["results"]["full"]
    assert np.isfinite(runs[0]["perplexity"]) and runs[1] is None


def test_no_figure_is_no_reason_to_lose_the_results(model, tmp_path, monkeypatch):
    def broken(report):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(compare.run, "draw", broken)
    s = Settings(model=model, steps=1, seeds=1, train=2000, test=8, names=("bitfit",), T=24)
    lines: list[str] = []
    compare.compare(s, tmp_path, jobs=1, say=lines.append)
    assert (tmp_path / "compare.json").exists() and "(no figure: RuntimeError, no fonts)" in lines[-1]
    assert "earlier run" not in lines[-1]
    (tmp_path / "compare.png").write_bytes(b"old")
    compare.compare(s, tmp_path, jobs=1, say=lines.append)
    assert "belongs to an earlier run" in lines[-1] and (tmp_path / "compare.png").read_bytes() == b"old"


def test_texts_leave_room_for_the_prompt(tmp_path):
    """A model of 64 positions holds texts of 48 tokens and a prompt of 16."""
    model = tiny(tmp_path)
    assert cells.limit_text_length(Settings(model=model)).T == 48
    assert cells.limit_text_length(Settings(model=model, T=20)).T == 20
    short = tiny(tmp_path / "short", positions=20)
    with pytest.raises(ValueError, match="at least 24 positions; this one has 20"):
        cells.limit_text_length(Settings(model=short))


# ---------------------------------------------------------------------------------------------------- real processes
LONG = ("--steps", "100000")  # no run ends
ENOUGH = ("--seeds", "3", "--steps", "200")  # the first run ends long before the last


def start(folder: Path, *arguments: str, largest_file: int | None = None) -> subprocess.Popen:
    """The command in a process of its own, on a very small model; its output comes through pipes.

    largest_file: bytes; a longer file is an error, as on a full disk.
    """

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the test runner may ignore it
        if largest_file is not None:
            import resource  # Unix only, as this function is

            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    command = [sys.executable, "-m", "tinyft.cli", "compare", "--task", "intact", "--train", "60"]
    return subprocess.Popen(
        [*command, "--model", tiny(folder), *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=prepare,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def wait_for(run: subprocess.Popen, stream, words: str) -> None:
    """Read the lines of a stream up to the first that contains the words."""
    while words not in (line := stream.readline()):
        assert line, f"the command ended with {run.poll()}: {run.stderr.read()}"


def worker_ids(run: subprocess.Popen) -> list[int]:
    """The process ids of the command's workers."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            command = (status.parent / "cmdline").read_text()
        except OSError:  # the process has ended
            continue
        if parent == run.pid and "spawn_main" in command:
            found.append(int(status.parent.name))
    return found


def alive(run: subprocess.Popen) -> list[int]:
    """The living processes of the command's group; one that has ended may still be in the table."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == run.pid and fields[0] not in "ZX":
            found.append(int(status.parent.name))
    return found


def no_process_left(run: subprocess.Popen) -> bool:
    """True if all processes of the command's group end; they close their pipes a moment before."""
    deadline = time.monotonic() + 20
    while alive(run) and time.monotonic() < deadline:
        pass
    return not alive(run)


@pytest.mark.parametrize("stream, words", [("stdout", "intact:"), ("stdout", "about"), ("stderr", "seed 0")])
def test_ctrl_c_stops_the_workers_and_says_so(stream, words, tmp_path):
    """As in a terminal, every process gets the signal: before the workers start, after it, and in training.

    It comes again and again until the command ends. All the same the command says "stopped" once, and no more.
    """
    length = LONG if stream == "stdout" else ENOUGH
    run = start(tmp_path, "--methods", "bitfit,full", "--jobs", "2", *length)
    wait_for(run, getattr(run, stream), words)
    while run.returncode is None:
        os.killpg(run.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            run.wait(0.1)
    out, error = run.communicate(timeout=60)
    last_lines = [line for line in error.splitlines() if "seed" not in line and line]
    assert (run.returncode, last_lines) == (130, ["stopped"]) and no_process_left(run)
    assert ("runs finished" in out) == (stream == "stderr")
    assert not (tmp_path / "work" / "compare.json").exists()


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows has no mask of signals")
def test_ctrl_c_does_not_stop_the_start_of_a_worker():
    """The signal may reach another thread, which does not block it. Python then runs the handler in the main thread."""
    ends = threading.Event()
    other = threading.Thread(target=ends.wait)
    other.start()
    steps = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), interrupts_delayed():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            steps.append("the worker has started")
    finally:
        signal.signal(signal.SIGINT, before)
        ends.set()
        other.join()
    assert steps == ["the worker has started"]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_workers_end_with_a_parent_that_is_killed(number, tmp_path):
    """They hold its pipes, so the pipes close only when they have ended."""
    run = start(tmp_path, *LONG, "--jobs", "2", "--methods", "bitfit,full")
    wait_for(run, run.stdout, "about")
    assert worker_ids(run)
    run.send_signal(number)
    run.communicate(timeout=60)
    assert run.returncode == -number and no_process_left(run)


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the workers in /proc")
def test_a_killed_worker_costs_no_finished_run(tmp_path):
    run = start(tmp_path, "--methods", "bitfit,full", "--jobs", "2", *ENOUGH)
    wait_for(run, run.stderr, "seed 0")
    os.kill(worker_ids(run)[0], signal.SIGKILL)
    out, error = run.communicate(timeout=60)
    sentence = error.splitlines()[-1]
    assert run.returncode == 1 and "Traceback" not in error and no_process_left(run)
    assert sentence.startswith("tinyft: a worker process was killed, perhaps because memory ran out; ")
    finished = int(re.search(r"(\d+) of 6 runs were finished and are kept", sentence)[1])
    made = strict_json(tmp_path / "work" / "compare.json")
    assert 0 < finished == finished_runs(made) < 6
    assert "runs finished" in out and "accuracy" in out


def test_a_full_disk_is_met_before_the_training(tmp_path):
    run = start(tmp_path, *LONG, largest_file=100_000)
    out, error = run.communicate(timeout=60)
    assert (run.returncode, out) == (1, "") and error.count("\n") == 1
    assert error.startswith("tinyft: compare cannot write to the folder work (File too large)")


def test_a_folder_that_is_lost_on_the_way_costs_the_files_alone(tmp_path):
    """The table is printed first, and one sentence says what is missing."""
    run = start(tmp_path, "--methods", "bitfit", "--seeds", "1", "--steps", "1", "--jobs", "1")
    wait_for(run, run.stdout, "intact:")
    (tmp_path / "work").rmdir()
    (tmp_path / "work").write_text("in the way")
    out, error = run.communicate(timeout=60)
    sentence = error.splitlines()[-1]
    assert run.returncode == 1 and "BitFit" in out and "Traceback" not in error
    assert sentence.startswith("tinyft: the table above is complete, but compare.json and compare.png of this run are")
    assert (tmp_path / "work").read_text() == "in the way"


def test_a_reader_that_is_gone_costs_no_files(tmp_path):
    """`tinyft compare | head -2`: the table has no reader, and the files are written all the same."""
    run = start(tmp_path, "--methods", "bitfit", "--seeds", "1", "--steps", "1", "--jobs", "1")
    wait_for(run, run.stdout, "about")
    run.stdout.close()
    error = run.stderr.read()
    assert run.wait(60) == 141 and "Traceback" not in error and "Exception" not in error
    assert strict_json(tmp_path / "work" / "compare.json")["results"]["BitFit"][0]["accuracy"] > 0

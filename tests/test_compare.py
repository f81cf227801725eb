"""The comparison: its statistics, its conclusions, and a small one from end to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tinyft as ft
from tinyft import array, cli, compare, data
from tinyft.compare import PRESETS, Settings, cells
from tinyft.compare.report import draw, interval, table, verdict
from tinyft.compare.settings import METHODS, learning_rates

pytestmark = pytest.mark.skipif(array.backend() != "numpy", reason="its parts are tested on every backend")


def report(values: dict[str, list[float]], trained: dict[str, int], task: str = "intact") -> dict:
    """A report with these qualities and these numbers of trained parameters."""
    first, second = ("perplexity", "prose") if task == "domain" else ("accuracy", "macro_f1")
    results = {}
    for name, qualities in values.items():
        results[name] = [{first: quality, second: quality / 2} for quality in qualities]
    costs = {}
    for name, count in trained.items():
        sizes = {"trained": count, "head": 2, "stored": 4 * count, "memory": 10**6}
        costs[name] = sizes | {"step_ratio": 0.5, "inference_ratio": 1.1}
    seeds = len(next(iter(values.values())))
    settings = {"task": task, "seeds": seeds, "train": 100, "steps": 5}
    return {"settings": settings, "costs": costs, "results": results}


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


# ---------------------------------------------------------------------------------------------------- settings
def test_methods_are_chosen_by_short_or_full_name():
    rows = replace(PRESETS["quick", "intact"], names=("bitfit", "FULL", "LoRA (r=8; q, v)")).chosen()
    assert [row.name for row in rows] == ["BitFit", "LoRA (r=8; q, v)", "full"]
    with pytest.raises(ValueError, match="no method 'lroa'.*BitFit"):
        Settings(names=("lroa",)).chosen()


def test_one_short_name_may_choose_several_rows():
    rows = Settings(names=("lora",)).chosen()
    assert [row.name for row in rows] == ["LoRA (r=8; q, v)", "LoRA (r=8; all)"]


def test_every_contender_has_a_learning_rate_for_each_task():
    """Only the head alone is missing in domain: a language model's tied head is its embedding."""
    rates = learning_rates()
    assert rates["intact"].keys() == rates["package"].keys() == METHODS.keys()
    assert METHODS.keys() - rates["domain"].keys() == {"head only"} and rates["domain"].keys() < METHODS.keys()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["compare", "--seeds", "0"], "--seeds"),
        (["compare", "--methods", "nothing"], "no method"),
        (["compare", "--model", "no/such/directory"], "no/such/directory"),
    ],
)
def test_bad_arguments_get_one_sentence(arguments, words, capsys, tmp_path):
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("tinyft: ") and words in error and "Traceback" not in error and error.count("\n") == 1


def test_the_command_lists_methods_and_the_machine(capsys):
    assert cli.main(["methods"]) == 0 and cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(method.cls.__name__ in out for method in ft.methods()) and "NumPy" in out and "CuPy" in out


# ---------------------------------------------------------------------------------------------------- end to end
def tiny(folder: Path, lm: bool = False, positions: int = 64) -> str:
    """The directory of a very small model."""
    sizes = {"vocab": 2048, "positions": positions, "width": 16, "layers": 1, "heads": 2}
    model = ft.GPT(ft.GPTConfig(**sizes)) if lm else ft.BERT(ft.BERTConfig(**sizes))
    return str(ft.save(model, folder / "model", data.shipped_tokenizer()))


@pytest.mark.parametrize("task", ["intact", "package", "domain"])
def test_a_small_comparison_from_end_to_end(task, tmp_path):
    """The file, every contender and every simple model, the forecast before the training, and the figure."""
    lm = task == "domain"
    train = 2000 if lm else 120
    s = Settings(task, model=tiny(tmp_path, lm), steps=2, seeds=2, train=train, test=8, batch=8, T=24)
    lines: list[str] = []
    made = compare.compare(s, tmp_path, jobs=1, say=lines.append)
    assert made == json.loads((tmp_path / "compare.json").read_text()) | {"settings": made["settings"]}
    names = {c.name for c in s.chosen()}
    assert names == set(made["costs"]) and names < set(made["results"])
    for metrics in made["results"].values():
        assert len(metrics) == 2 and all(np.isfinite(m[s.quality]) for m in metrics)
    assert "minutes on this machine" in lines[1]
    assert made["costs"]["full"]["trained"] > made["costs"]["BitFit"]["trained"]
    pytest.importorskip("matplotlib")
    assert (tmp_path / "compare.png").stat().st_size > 10_000 and draw(made, tmp_path / "again.png")


def test_texts_leave_room_for_the_prompt(tmp_path):
    """A model of 64 positions holds texts of 48 tokens and a prompt of 16."""
    model = tiny(tmp_path)
    assert cells.limit_text_length(Settings(model=model)).T == 48
    assert cells.limit_text_length(Settings(model=model, T=20)).T == 20
    short = tiny(tmp_path / "short", positions=20)
    with pytest.raises(ValueError, match="at least 24 positions; this one has 20"):
        cells.limit_text_length(Settings(model=short))


@pytest.mark.parametrize("line, after", [("intact", 0.0), ("intact", 0.3), ("about", 2.0)])
def test_ctrl_c_stops_the_workers_and_says_so(line, after, tmp_path):
    """As in a terminal, every process gets the signal: while workers start, just after, and in training."""
    command = [sys.executable, "-u", "-m", "tinyft.cli", "compare", "--model", tiny(tmp_path)]
    command += ["--methods", "lora", "--steps", "100000", "--jobs", "2"]
    run = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # the test runner may ignore it
        env={**os.environ, "PYTHONPATH": str(Path(ft.__file__).parent.parent)},
    )
    while not run.stdout.readline().startswith(line):
        assert run.poll() is None
    time.sleep(after)
    os.killpg(run.pid, signal.SIGINT)
    _, error = run.communicate(timeout=60)
    assert (run.returncode, error.strip()) == (130, "stopped")
    with pytest.raises(ProcessLookupError):  # none of its processes is left
        for _ in range(50):
            os.killpg(run.pid, 0)
            time.sleep(0.1)

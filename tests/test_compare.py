"""The comparison: its statistics, what it says, and a small one from end to end."""
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
from tinyft.compare import PRESETS, Settings
from tinyft.compare.report import draw, interval, table, verdict

pytestmark = pytest.mark.skipif(array.backend() != "numpy", reason="one comparison is enough: what it calls is tested on every backend")


def report(values: dict[str, list[float]], costs: dict[str, int], task: str = "intact") -> dict:
    "A report with these qualities and numbers trained."
    first, second = ("perplexity", "prose") if task == "domain" else ("accuracy", "macro_f1")
    price = {n: {"trained": k, "head": 2, "stored": 4 * k, "memory": 10**6, "step_ratio": 0.5, "inference_ratio": 1.1} for n, k in costs.items()}
    seeds = len(next(iter(values.values())))
    return {"settings": {"task": task, "seeds": seeds, "train": 100, "steps": 5}, "costs": price,
            "results": {n: [{first: v, second: v / 2} for v in vs] for n, vs in values.items()}}


# ── statistics ──
def covers(how) -> float:
    "How often the interval holds the true difference, over 5,000 draws of five paired seeds."
    rng, hits = np.random.default_rng(0), 0
    for _ in range(5000):
        seed = rng.normal(0, 5, 5)                                               # what a seed does to both
        _, low, high = how(seed + 1 + rng.normal(0, 1, 5), seed + rng.normal(0, 1, 5))
        hits += low <= 1 <= high
    return hits / 5000


def unpaired(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    half = 2.306 * ((a.var(ddof=1) + b.var(ddof=1)) / len(a))**0.5
    return a.mean() - b.mean(), a.mean() - b.mean() - half, a.mean() - b.mean() + half


def normal(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    d = a - b
    half = 1.96 * d.std(ddof=1) / len(d)**0.5
    return d.mean(), d.mean() - half, d.mean() + half


def population(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    d = a - b
    half = 2.776 * d.std() / len(d)**0.5
    return d.mean(), d.mean() - half, d.mean() + half


def test_the_paired_interval_holds_the_truth_95_times_in_100():
    assert abs(covers(interval) - 0.95) < 0.009


@pytest.mark.parametrize("wrong", [unpaired, normal, population], ids=lambda f: f.__name__)
def test_that_check_rejects_wrong_intervals(wrong):
    assert not abs(covers(wrong) - 0.95) < 0.009


def test_one_seed_supports_nothing():
    _, low, high = interval(np.array([0.9]), np.array([0.1]))
    assert low == -np.inf and high == np.inf


# ── what it says ──
def test_the_verdict_says_better_worse_or_nothing_shown():
    said = verdict(report({"from scratch": [.5, .51, .52], "LoRA": [.6, .61, .62], "BitFit": [.5, .62, .45], "full": [.7, .71, .72]},
                          {"from scratch": 100, "LoRA": 10, "BitFit": 5, "full": 100}))
    by_full, by_scratch = said.split("against from scratch")
    assert "worse" in next(x for x in by_full.splitlines() if "LoRA" in x)
    assert "better" in next(x for x in by_scratch.splitlines() if "LoRA" in x)
    assert "no difference shown" in next(x for x in by_scratch.splitlines() if "BitFit" in x)


def test_a_lower_perplexity_is_better():
    said = verdict(report({"LoRA": [50., 51, 52], "full": [40., 41, 42]}, {"LoRA": 10, "full": 100}, "domain"))
    assert "worse" in next(x for x in said.splitlines() if "LoRA" in x)


@pytest.mark.parametrize("simple, word", [(0.9, "wins"), (0.3, "loses")])
def test_the_verdict_says_whether_a_simple_model_wins(simple, word):
    said = verdict(report({"tfidf": [simple] * 2, "full": [.6, .6]}, {"full": 100}))
    assert f"tfidf {word} here" in said


def test_the_table_has_a_row_for_each_in_order_of_what_trains():
    made = report({"full": [.7, .7], "tfidf": [.6, .6], "LoRA": [.65, .66]}, {"full": 100, "LoRA": 10})
    rows = [line.split("  ")[0] for line in table(made).splitlines()]
    assert [r for r in rows if r in ("full", "tfidf", "LoRA")] == ["tfidf", "LoRA", "full"]


# ── what is asked ──
def test_methods_are_chosen_by_short_or_full_name():
    rows = replace(PRESETS["quick", "intact"], names=("bitfit", "FULL", "LoRA (r=8; q, v)")).chosen()
    assert [r.name for r in rows] == ["BitFit", "LoRA (r=8; q, v)", "full"]
    with pytest.raises(ValueError, match="no method 'lroa'.*BitFit"):
        Settings(names=("lroa",)).chosen()


def test_one_name_may_mean_several_rows():
    assert [r.name for r in Settings(names=("lora",)).chosen()] == ["LoRA (r=8; q, v)", "LoRA (r=8; all)"]


@pytest.mark.parametrize("args, says", [(["compare", "--seeds", "0"], "--seeds"), (["compare", "--methods", "nothing"], "no method"),
                                        (["compare", "--model", "no/such/directory"], "no/such/directory")])
def test_bad_arguments_get_one_sentence(args, says, capsys, tmp_path):
    assert cli.main([*args, "--out", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("tinyft: ") and says in err and "Traceback" not in err and err.count("\n") == 1


def test_the_command_lists_methods_and_the_machine(capsys):
    assert cli.main(["methods"]) == 0 and cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(m.cls.__name__ in out for m in ft.methods()) and "NumPy" in out and "CuPy" in out


# ── end to end ──
def tiny(folder: Path, lm: bool) -> str:
    sizes = dict(vocab=2048, positions=64, width=16, layers=1, heads=2)
    model = ft.GPT(ft.GPTConfig(**sizes)) if lm else ft.BERT(ft.BERTConfig(**sizes))
    return str(ft.save(model, folder / "model", data.shipped_tokenizer()))


@pytest.mark.parametrize("task", ["intact", "package", "domain"])
def test_a_small_comparison_from_end_to_end(task, tmp_path):
    s = Settings(task, model=tiny(tmp_path, task == "domain"), steps=2, seeds=2, train=2000 if task == "domain" else 120, test=8, batch=8, T=24)
    said: list[str] = []
    got = compare.compare(s, tmp_path, jobs=1, say=said.append)
    assert got == json.loads((tmp_path / "compare.json").read_text()) | {"settings": got["settings"]}
    names = {c.name for c in s.chosen()}
    assert names == set(got["costs"]) and names < set(got["results"])
    assert all(len(rs) == 2 and all(np.isfinite(r[s.quality]) for r in rs) for rs in got["results"].values())
    assert "minutes on this machine" in said[1]                                  # said before anything is trained
    assert got["costs"]["full"]["trained"] > got["costs"]["BitFit"]["trained"]
    pytest.importorskip("matplotlib")
    assert (tmp_path / "compare.png").stat().st_size > 10_000 and draw(got, tmp_path / "again.png")


def test_texts_leave_room_for_the_prompt(tmp_path):
    model = tiny(tmp_path, False)                                                # 64 positions
    assert compare.run.fitting(Settings(model=model)).T == 48 and compare.run.fitting(Settings(model=model, T=20)).T == 20
    ft.save(ft.BERT(ft.BERTConfig(vocab=2048, positions=20, width=16, layers=1, heads=2)), tmp_path / "short", data.shipped_tokenizer())
    with pytest.raises(ValueError, match="at least 24 positions; this one has 20"):
        compare.run.fitting(Settings(model=str(tmp_path / "short")))


@pytest.mark.parametrize("after", [0.0, 0.3, 2.0])
def test_ctrl_c_stops_the_workers_and_says_so(after, tmp_path):
    "As a terminal does: every process gets the signal, also one that is about to start."
    command = ["-m", "tinyft.cli", "compare", "--model", tiny(tmp_path, False), "--methods", "lora", "--steps", "100000", "--jobs", "2"]
    run = subprocess.Popen([sys.executable, "-u", *command], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),      # what runs us may ignore it
                           env={**os.environ, "PYTHONPATH": str(Path(ft.__file__).parent.parent)})
    assert run.stdout.readline().startswith("intact")                            # the workers come next
    time.sleep(after)
    os.killpg(run.pid, signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert (run.returncode, said.strip()) == (130, "stopped")
    with pytest.raises(ProcessLookupError):                                      # none of its processes is left
        for _ in range(50):
            os.killpg(run.pid, 0)
            time.sleep(0.1)

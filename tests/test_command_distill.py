"""`tinyft distill`: teachers and students of every kind, the folder, stopping and going on, a table of bad input."""
from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_tools import files_below, labelled, pairs, refusal, result_of, small_model, start, succeed, write_rows
from helpers import host, of_the_host, wrong_answers

import tinyft as ft
from tinyft import array, cli, data
from tinyft.commands import distilling, objectives, shipped, training
from tinyft.compress.distill import beams, soft
from tinyft.compress.distill import cache as caches
from tinyft.data.rows import segment_batches
from tinyft.files import read_tensors

pytestmark = pytest.mark.skipif(array.backend() == "cupy", reason="commands and files are of the host")

TEXTS = [{"text": f"Return the list of all files in folder {i}. " * 4} for i in range(8)]
SIZES = {"vocab": 2048, "positions": 96, "width": 16, "layers": 2, "heads": 2}
SWITCH = ft.SwitchConfig(experts=2)


def sources(count: int) -> list[dict[str, str]]:
    return [{"source": row["prompt"], "target": row["response"]} for row in pairs(count)]


def make_teacher(folder: Path, kind: str) -> str:
    """The directory of a teacher of one kind, with the shipped tokenizer. Its values are far from each other."""
    made = {
        "gpt": lambda: ft.GPT(ft.GPTConfig(**SIZES, dropout=0.3), 5),
        "bert": lambda: ft.BERT(ft.BERTConfig(**SIZES), 5),
        "classifier": lambda: ft.classifier(ft.BERT(ft.BERTConfig(**SIZES), 5), 2, 5),
        "marian": lambda: ft.Seq2Seq(ft.Seq2SeqConfig(**SIZES), 5),
        "t5": lambda: ft.T5(ft.T5Config(**SIZES, head_width=8), 5),
        "switch": lambda: ft.GPT(ft.GPTConfig(**SIZES, switch=SWITCH), 5),
    }[kind]()
    if kind == "classifier":
        made._kept_config = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    for name, p in made.named_parameters().items():
        if name.endswith(("q.weight", "k.weight", "v.weight", "up.weight", "down.weight")):
            p.copy_(host(p) * 5)
    return str(ft.save(made, folder / kind, data.shipped_tokenizer()))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("teachers")
    return {kind: make_teacher(folder, kind) for kind in ("gpt", "bert", "classifier", "marian", "t5", "switch")}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    rows = {"pairs": pairs(24), "sources": sources(24), "text": TEXTS, "labels": labelled(24)}
    return {name: write_rows(folder / f"{name}.jsonl", found) for name, found in rows.items()}


def values(folder: str | Path) -> dict[str, np.ndarray]:
    """The parameters of the model in a folder."""
    model, _ = ft.load(folder)
    return {name: host(p) for name, p in model.named_parameters().items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def log_of(out: Path) -> list[dict[str, Any]]:
    """The lines of a log without their times."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for entry in entries:
        entry.pop("seconds", None)
    return entries


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
RUNS = {
    "a GPT by Hinton": ("gpt", "pairs", ["--student", "layers=1", "--loss", "hinton", "--set", "temperature=4"]),
    "a GPT by words": ("gpt", "text", ["--student", "layers=1", "--loss", "word-level"]),
    "a GPT by DistilBERT's loss": ("gpt", "text", ["--student", "layers=1", "--loss", "distilbert"]),
    "a smaller GPT": ("gpt", "pairs", ["--student", "new,width=8,layers=1", "--cache", "CACHE"]),
    "a BERT": ("bert", "text", ["--student", "layers=1,token_types=false", "--loss", "distilbert"]),
    "a BERT layer by layer": ("bert", "text", ["--student", "new,layers=1,width=8", "--loss", "tinybert"]),
    "a classifier": ("classifier", "labels", ["--student", "layers=1", "--layers-from", "1", "--cache", "CACHE"]),
    "a new classifier": ("classifier", "labels", ["--student", "new,layers=1"]),
    "a Marian by words": ("marian", "sources", ["--student", "layers=2,decoder_layers=1", "--loss", "word-level"]),
    "a Marian with a cache": ("marian", "pairs", ["--student", "new,width=8", "--cache", "CACHE", "--logits", "9"]),
    "a T5": ("t5", "sources", ["--student", "layers=1", "--layers-from", "every_other"]),
    "a dense GPT": ("switch", "pairs", ["--student", "dense,start=mean", "--set", "soft=0.25"]),
    "a Marian by texts": ("marian", "sources", ["--student", "layers=1", "--loss", "sequence-level"]),
    "a T5 by its best texts": ("t5", "pairs", ["--student", "new,layers=1", "--loss", "interpolation", "--set",
                                               "beams=3", "--set", "alpha=0.5", "--cache", "CACHE"]),
    "without a teacher": ("gpt", "pairs", ["--student", "layers=1", "--loss", "none"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_teacher_and_student(name, teachers, files, capsys, tmp_path):
    """The student is an ordinary checkpoint of its size, it has changed, and the teacher has not."""
    kind, rows, options = RUNS[name]
    before = values(teachers[kind])
    out = tmp_path / "new" / "student"
    options = [str(tmp_path / "cache") if option == "CACHE" else option for option in options]
    result = result_of(
        capsys, "distill", "--teacher", teachers[kind], "--data", files[rows], "--test", files[rows], "--out", str(out),
        "--steps", "12", "--lr", "1e-2", "--batch", "8", *options,
    )
    model, tokenizer = ft.load(out)
    assert result["parameters"] == ft.count(model).total <= result["teacher_parameters"]
    assert result["ratio"] == pytest.approx(result["parameters"] / result["teacher_parameters"])
    assert result["test"].keys() == result["teacher"].keys()
    assert "texts" in name or "layer by layer" in name or result["test"]["loss"] < result["before"]["loss"]
    assert tokenizer.get_vocab() == data.shipped_tokenizer().get_vocab()
    assert same(values(teachers[kind]), before) and not same(values(out), before)
    assert {path.name for path in out.iterdir()} >= {"distill.json", "log.jsonl", "config.json", "model.safetensors"}
    assert not (out / "checkpoint.safetensors").exists()
    if kind == "classifier":
        assert ft.predict(model, tokenizer, ["Function 1 works."]).labels[0] in ("bad", "good")


@of_the_host
def test_a_run_in_a_process_of_its_own(teachers, files, tmp_path):
    """The main path, as a user types it: a plan, the result beside the teacher's, and a student that writes."""
    run = start(tmp_path, "distill", "--teacher", teachers["marian"], "--student", "layers=1", "--data",
                files["sources"], "--test", files["sources"], "--steps", "4", "--batch", "8", "--cache", "cache",
                "--set", "soft=0.7", "--out", "student")
    out, error = run.communicate(timeout=120)
    assert run.returncode == 0, error
    ours, theirs = (ft.count(ft.load(folder)[0]).total for folder in (tmp_path / "student", teachers["marian"]))
    for line in (
        "data     24 rows in 3 batches, 24 test rows",
        f"teacher  Seq2Seq of {theirs:,} parameters in {teachers['marian']}",
        f"student  Seq2Seq of {ours:,} parameters, {ours / theirs:.1%} of the teacher's: layers=1",
        "loss     Hinton(temperature=2.0, soft=0.7); the teacher runs once, its 64 largest logits are kept",
        "memory   about", "time     about", "of the teacher's outputs in", "teacher  ran on 24 rows and knows 24",
        "test                       before     student     teacher", "exact_match", "perplexity",
        f"size     {ours:,} of {theirs:,} parameters",
    ):
        assert line in out, (line, out)
    written = start(tmp_path, "generate", "--model", "student", "--prompt", "Return the sum", "--max-new-tokens", "5")
    assert written.communicate(timeout=60)[0].count("\n") == 1 and written.returncode == 0


@pytest.fixture(scope="module")
def by_hand(teachers, files) -> dict[str, np.ndarray]:
    """The student's parameters after the calls of the library that the command stands for."""
    teacher, tokenizer = ft.load(teachers["gpt"])
    student = ft.student(teacher, layers=1)
    segments = [[(row["prompt"], False), (row["response"], True)] for row in pairs(24)]
    batches, _ = segment_batches(segments, tokenizer, 8, 96)
    loss = ft.Hinton(teacher, temperature=3.0, soft=0.8)
    ft.fit(student, batches, 6, ft.AdamW(1e-2, weight_decay=0), ft.cosine_schedule(0.05), loss=loss, progress=False)
    return {name: host(p) for name, p in student.named_parameters().items()}


def check_library(
    expected: dict[str, np.ndarray], teachers: dict[str, str], files: dict[str, str], folder: Path,
) -> None:
    """The command is fit with its loss, and nothing else: the same bits. The teacher's dropout is inactive."""
    status = cli.main(["distill", "--teacher", teachers["gpt"], "--student", "layers=1", "--set", "temperature=3",
                       "--set", "soft=0.8", "--data", files["pairs"], "--steps", "6", "--lr", "1e-2", "--batch", "8",
                       "--out", str(folder)])
    assert status == 0
    assert same(values(folder), expected)


def test_the_library_gives_the_same_student(by_hand, teachers, files, tmp_path):
    check_library(by_hand, teachers, files, tmp_path / "student")


def trained_teacher(model: ft.Module, targets: ft.Targets) -> ft.Context:
    """The teacher drops units at random, as in its own training."""
    ctx = targets.context(np.random.default_rng(0))
    model.train()
    model(targets.ids, ctx)
    return ctx


def fit_without(name: str, **others: Any) -> Callable:
    """fit_job that leaves one of its arguments out."""
    right = training.fit_job

    def wrong(*arguments: Any, **options: Any) -> None:
        right(*arguments, **(options | {name: None} | others))
    return wrong


WRONG = {
    "the teacher is in training mode": (soft, "run_teacher", trained_teacher),
    "the loss is not handed to fit": (training, "fit_job", fit_without("loss")),
    "the student is the teacher itself": (distilling, "make_student", lambda spec, layers, teacher, *_: teacher),
    "the copied layer is the last one": (distilling, "make_student",
                                         lambda spec, layers, teacher, *_: ft.student(teacher, 1, [1])),
    "the settings of the loss are lost": (objectives, "make_loss",
                                          lambda name, settings, teacher: ft.Hinton(teacher)),
}


@of_the_host
def test_the_plan_changes_no_projection(teachers, files, capsys, tmp_path, monkeypatch):
    """TinyBERT's projections train with the student: with a plan and without one, both are the same bits."""
    options = ["distill", "--teacher", teachers["bert"], "--student", "new,width=8,layers=1", "--loss", "tinybert",
               "--data", files["text"], "--steps", "3", "--lr", "1e-2"]
    succeed(capsys, *options, "--out", str(tmp_path / "a"))
    monkeypatch.setattr(distilling, "plan_run", lambda *_: ())
    monkeypatch.setattr(distilling, "say_plan", lambda *_: None)
    succeed(capsys, *options, "--out", str(tmp_path / "b"))
    assert same(values(tmp_path / "a"), values(tmp_path / "b")) and log_of(tmp_path / "a") == log_of(tmp_path / "b")


@wrong_answers
@pytest.mark.parametrize("belief", WRONG)
def test_another_student_is_noticed(belief, by_hand, teachers, files, monkeypatch, tmp_path):
    place, name, wrong = WRONG[belief]
    monkeypatch.setattr(place, name, wrong)
    with pytest.raises(AssertionError):
        check_library(by_hand, teachers, files, tmp_path / "student")


@of_the_host
def test_the_plan_changes_nothing(teachers, files, capsys, tmp_path, monkeypatch):
    """The run with a plan is bitwise the run without one, dropout included."""
    options = ["distill", "--teacher", teachers["gpt"], "--student", "layers=1", "--data", files["pairs"],
               "--steps", "4", "--lr", "1e-2"]
    succeed(capsys, *options, "--out", str(tmp_path / "a"))
    monkeypatch.setattr(distilling, "plan_run", lambda *_: ())
    monkeypatch.setattr(distilling, "say_plan", lambda *_: None)
    succeed(capsys, *options, "--out", str(tmp_path / "b"))
    assert same(values(tmp_path / "a"), values(tmp_path / "b")) and log_of(tmp_path / "a") == log_of(tmp_path / "b")
    succeed(capsys, *options, "--seed", "1", "--out", str(tmp_path / "c"))
    assert not same(values(tmp_path / "a"), values(tmp_path / "c"))


# ── the cache ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_teacher_runs_once_for_each_row(teachers, files, capsys, tmp_path, monkeypatch):
    """Three epochs, and a second student: 24 rows in all. The plan knows the size. All logits give the same student."""
    seen = []
    planned = []

    def count_rows(teacher: ft.Module, targets: ft.Targets) -> ft.Context:
        seen.append(len(targets.ids))
        return soft.run_teacher(teacher, targets)

    def measure(*arguments: Any) -> objectives.StoreCosts:
        planned.append(objectives.measure_store(*arguments))
        return planned[-1]

    monkeypatch.setattr(caches, "run_teacher", count_rows)
    monkeypatch.setattr(distilling, "measure_store", measure)
    options = ["distill", "--teacher", teachers["marian"], "--data", files["sources"], "--steps", "9", "--batch", "8"]
    cache = ["--cache", str(tmp_path / "cache"), "--logits", "2048"]
    succeed(capsys, *options, "--student", "layers=1", *cache, "--out", str(tmp_path / "a"))
    assert sum(seen) == 24
    taken = sum(file.stat().st_size for file in (tmp_path / "cache").iterdir())
    assert planned[0].nbytes == pytest.approx(taken, rel=0.1) and planned[0].seconds > 0
    succeed(capsys, *options, "--student", "new,width=8", *cache, "--out", str(tmp_path / "b"))
    assert sum(seen) == 24 and planned[1].seconds == 0
    succeed(capsys, *options, "--student", "layers=1", "--out", str(tmp_path / "c"))
    ours, theirs = values(tmp_path / "a"), values(tmp_path / "c")
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], atol=2e-4)
    few = ["--cache", str(tmp_path / "few"), "--logits", "3", "--set", "temperature=3"]
    succeed(capsys, *options, "--student", "layers=1", *few, "--out", str(tmp_path / "d"))
    assert sum(seen) == 48, "the tails of this temperature come with the logits"


def test_the_teachers_texts_are_the_targets(teachers, files, capsys, tmp_path, monkeypatch):
    """The student of sequence-level distillation is that of the texts as data: bitwise. Each source is decoded once,
    and a second run with the same folder decodes none. Without --cache the folder is gone at the end."""
    options = ["distill", "--teacher", teachers["marian"], "--student", "layers=1", "--steps", "6", "--batch", "8"]
    cache = ["--cache", str(tmp_path / "cache")]
    search = ["--loss", "sequence-level", "--set", "beams=2", "--set", "max_new_tokens=6"]
    out = succeed(capsys, *options, "--data", files["sources"], *search, *cache, "--out", str(tmp_path / "a"))
    assert "loss     CrossEntropy(" in out and ") of the targets of SequenceLevel, from 2 beams of at most 6" in out
    assert "decoded 24 sources and knows 24" in out
    out = succeed(capsys, *options, "--data", files["sources"], *search, *cache, "--out", str(tmp_path / "b"))
    assert "decoded 0 sources and knows 24" in out and same(values(tmp_path / "a"), values(tmp_path / "b"))
    out = succeed(capsys, *options, "--data", files["sources"], *search, "--out", str(tmp_path / "c"))
    assert "in the folder teacher of the run, until its end" in out and not (tmp_path / "c" / "teacher").exists()
    assert same(values(tmp_path / "a"), values(tmp_path / "c"))
    succeed(capsys, *options, "--data", files["sources"], "--loss", "none", "--out", str(tmp_path / "d"))
    assert not same(values(tmp_path / "a"), values(tmp_path / "d"))


# ── stopping and going on ────────────────────────────────────────────────────────────────────────────────────────────
def long_run(teachers: dict[str, str], files: dict[str, str], out: str, cache: str) -> list[str]:
    return ["distill", "--teacher", teachers["gpt"], "--student", "layers=1", "--data", files["pairs"],
            "--test", files["pairs"], "--out", out, "--steps", "120", "--lr", "1e-2", "--batch", "4",
            "--evaluate-every", "50", "--save-every", "10", "--cache", cache]


@pytest.fixture(scope="module")
def whole_run(teachers, files, tmp_path_factory) -> Path:
    """The folder of the run that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    assert cli.main(long_run(teachers, files, str(folder / "run"), str(folder / "cache"))) == 0
    return folder / "run"


@of_the_host
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGKILL, -9)], ids=["SIGINT", "SIGKILL"])
def test_a_run_that_is_stopped_goes_on_to_the_same_end(number, status, teachers, files, whole_run, capsys, tmp_path):
    """Student and log are bitwise those of the run that nothing stopped, also after a kill between two checkpoints."""
    def restore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)     # the test runner may ignore it
    out = tmp_path / "run"
    run = start(tmp_path, *long_run(teachers, files, "run", "cache"), preexec_fn=restore)
    deadline = time.monotonic() + 120
    while not (out / "log.jsonl").exists() or (out / "log.jsonl").read_bytes().count(b"\n") < 25:
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
    run.send_signal(number)
    _, error = run.communicate(timeout=60)
    assert run.returncode == status
    if number != signal.SIGKILL:
        assert "of 120; tinyft distill --resume --out run goes on" in error and "Traceback" not in error
    assert not (out / "config.json").exists()
    done = read_tensors(out / "checkpoint.safetensors")[1]["done"]
    assert 10 <= done < 120
    result = result_of(capsys, "distill", "--resume", "--out", str(out))
    assert (out / "model.safetensors").read_bytes() == (whole_run / "model.safetensors").read_bytes()
    assert log_of(out) == log_of(whole_run) and result["steps"] == 120


# loss: (the module and the name of the teacher's work on the rows of a batch, the works for the plan)
TEACHING = {"hinton": (caches, "run_teacher", 0), "sequence-level": (beams, "beam_search", 1)}


@pytest.mark.parametrize("loss", TEACHING)
def test_a_run_that_is_stopped_while_the_teacher_runs(loss, teachers, files, capsys, tmp_path, monkeypatch):
    """It goes on where it stood: rows that are on the disk are not computed again, and the student is the same."""
    place, name, planned = TEACHING[loss]
    right = getattr(place, name)
    calls = []
    limit = planned + 3

    def work(*arguments: Any, **options: Any) -> Any:
        if len(calls) == limit:
            raise KeyboardInterrupt
        calls.append(name)
        return right(*arguments, **options)

    monkeypatch.setattr(place, name, work)
    options = ["distill", "--teacher", teachers["marian"], "--student", "layers=1", "--data", files["sources"],
               "--steps", "4", "--batch", "4", "--loss", loss]
    cache = str(tmp_path / "cache")
    assert cli.main([*options, "--cache", cache, "--out", str(tmp_path / "a")]) == 130
    assert "while the teacher ran; tinyft distill --resume --out" in capsys.readouterr().err
    limit = 100
    succeed(capsys, "distill", "--resume", "--out", str(tmp_path / "a"))
    assert len(calls) == 6 + 2 * planned
    succeed(capsys, *options, "--cache", str(tmp_path / "other"), "--out", str(tmp_path / "b"))
    assert same(values(tmp_path / "a"), values(tmp_path / "b"))


def stopped_run(monkeypatch: pytest.MonkeyPatch, options: list[str], after: int = 3) -> None:
    """A run that ends after some steps, as by Ctrl-C."""
    add = training.Log.add_step

    def stop(self: Any, step: int, terms: Any) -> None:
        add(self, step, terms)
        if step == after:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as m:
        m.setattr(training.Log, "add_step", stop)
        assert cli.main(options) == 130


@wrong_answers
def test_a_resume_that_repeats_its_data_is_noticed(teachers, files, capsys, tmp_path, monkeypatch):
    """Without the position of the batches in the checkpoint, the student is another one."""
    def options(name: str) -> list[str]:
        return ["distill", "--teacher", teachers["gpt"], "--student", "layers=1", "--data", files["pairs"],
                "--steps", "6", "--batch", "4", "--lr", "1e-2", "--out", str(tmp_path / name)]
    assert cli.main(options("whole")) == 0
    for name in ("right", "wrong"):
        stopped_run(monkeypatch, options(name))
    succeed(capsys, "distill", "--resume", "--out", str(tmp_path / "right"))
    monkeypatch.setattr(data.Batches, "load_state_dict", lambda self, state: None)
    succeed(capsys, "distill", "--resume", "--out", str(tmp_path / "wrong"))
    whole = values(tmp_path / "whole")
    assert same(values(tmp_path / "right"), whole) and not same(values(tmp_path / "wrong"), whole)


@of_the_host
def test_only_the_same_run_is_resumed(teachers, files, capsys, tmp_path, monkeypatch):
    teacher = shutil.copytree(teachers["gpt"], tmp_path / "teacher")
    file = str(shutil.copy(files["pairs"], tmp_path / "pairs.jsonl"))
    out = tmp_path / "run"
    options = ["distill", "--teacher", str(teacher), "--student", "layers=1", "--data", file, "--steps", "5",
               "--out", str(out)]
    stopped_run(monkeypatch, options)
    capsys.readouterr()
    before = files_below(out)
    resume = ["distill", "--resume", "--out", str(out)]
    assert "holds a run: --resume goes on with it" in refusal(capsys, *options)
    assert "its --loss is hinton, not none" in refusal(capsys, *resume, "--loss", "none")
    assert "its --student is layers=1, not layers=2" in refusal(capsys, *resume, "--student", "layers=2")
    other = make_teacher(tmp_path, "gpt")
    model, tokenizer = ft.load(other)
    model.blocks[1].mlp.up.bias.data += 1                # a layer that the student has not copied
    ft.save(model, teacher, tokenizer)
    assert "the distillation of another teacher than its files hold now" in refusal(capsys, *resume)
    shutil.copytree(teachers["gpt"], teacher, dirs_exist_ok=True)
    write_rows(Path(file), pairs(24)[::-1])
    assert "other examples" in refusal(capsys, *resume)
    write_rows(Path(file), pairs(24))
    assert files_below(out) == before
    assert result_of(capsys, *resume)["steps"] == 5
    assert result_of(capsys, *resume) == {"out": str(out)}
    assert "nothing to do" in succeed(capsys, *resume)


# ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
@of_the_host
@pytest.mark.parametrize("name, kind", [("names", "pairs"), ("package", "labelled"), ("prose", "text")])
def test_texts_that_ship(name, kind):
    """Training and held-out rows are of different modules; the held-out ones are few, and the same each time."""
    train, test = shipped.read_data(name), shipped.read_data(name, "test")
    assert train.kind == test.kind == kind and len(train.rows) > len(test.rows) > 100
    assert len(test.rows) <= shipped.HELD_OUT and all(len(row[0]) <= shipped.LONGEST for row in test.rows)
    assert not {row[0] for row in train.rows} & {row[0] for row in test.rows}
    assert shipped.read_data(name, "test") == test and train.line(2) == f"line 3 of {name}"


@of_the_host
def test_a_shipped_text_is_its_own_test(teachers, capsys, tmp_path):
    """Token F1 of names beside the teacher's. A folder of the same name does not count."""
    os.mkdir(tmp_path / "names")
    run = start(tmp_path, "distill", "--teacher", teachers["marian"], "--student", "layers=1", "--data", "names",
                "--steps", "2", "--out", "run", "--json")
    out, error = run.communicate(timeout=120)
    assert run.returncode == 0, error
    result = json.loads(out)
    assert 0 <= result["test"]["token_f1"] <= 1 and result["teacher"].keys() == result["test"].keys()
    assert json.loads((tmp_path / "run" / "distill.json").read_text())["data"] == "names"


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────
BAD: dict[str, tuple[list[str], int, str]] = {
    "no teacher": (["--student", "layers=1", "--data", "PAIRS"], 2, "distill wants --teacher"),
    "no student": (["--teacher", "GPT", "--data", "PAIRS"], 2, "distill wants --student"),
    "no data": (["--teacher", "GPT", "--student", "layers=1"], 2, "distill wants --data"),
    "no such teacher": (["--teacher", "base-gtp", "--student", "layers=1", "--data", "PAIRS"], 1, "mean base-gpt?"),
    "no such student": (["--teacher", "GPT", "--student", "studnet", "--data", "PAIRS"], 1, "no model of this name"),
    "too many layers": (["--teacher", "GPT", "--student", "layers=3", "--data", "PAIRS"], 2,
                        "--student wants at most 2 layers, as many as the teacher has, got 3"),
    "no layers": (["--teacher", "GPT", "--student", "layers=0", "--data", "PAIRS"], 1, "wants a whole number"),
    "layers in words": (["--teacher", "GPT", "--student", "layers=two", "--data", "PAIRS"], 2,
                        "--student layers wants a whole number, got 'two'"),
    "a decoder of a GPT": (["--teacher", "GPT", "--student", "layers=1,decoder_layers=1", "--data", "PAIRS"], 1,
                           "decoder_layers wants an encoder-decoder"),
    "a field that is none": (["--teacher", "GPT", "--student", "layer=1", "--data", "PAIRS"], 2,
                             "did you mean 'layers'?"),
    "a width of a copy": (["--teacher", "GPT", "--student", "width=8", "--data", "PAIRS"], 2, "'width'"),
    "a field of other libraries": (["--teacher", "GPT", "--student", "new,n_embd=8", "--data", "PAIRS"], 2,
                                   "did you mean 'width'?"),
    "heads that do not divide": (["--teacher", "GPT", "--student", "new,heads=3", "--data", "PAIRS"], 2,
                                 "3 heads do not divide a width of 16"),
    "a map that is none": (["--teacher", "GPT", "--student", "layers=1", "--layers-from", "last", "--data", "PAIRS"], 2,
                           "--layers-from wants spread, every_other, or layers such as 0,2,5, got 'last'"),
    "a map of a new student": (["--teacher", "GPT", "--student", "new,layers=1", "--layers-from", "spread", "--data",
                                "PAIRS"], 2, "--layers-from wants a student of the teacher's layers"),
    "dense of a dense teacher": (["--teacher", "GPT", "--student", "dense", "--data", "PAIRS"], 1,
                                 "wants a model with Switch layers"),
    "a start that is none": (["--teacher", "SWITCH", "--student", "dense,start=best", "--data", "PAIRS"], 2,
                             "wants start=new or start=mean, got 'start=best'"),
    "another vocabulary": (["--teacher", "GPT", "--student", "WORDS", "--data", "PAIRS"], 1,
                           "a student with the teacher's vocabulary of 2048 tokens, got 2100"),
    "another tokenizer": (["--teacher", "GPT", "--student", "TOKENS", "--data", "PAIRS"], 1,
                          "distillation wants a teacher with the student's tokenizer, got another one"),
    "a student of another kind": (["--teacher", "GPT", "--student", "BERT", "--data", "PAIRS"], 1,
                                  "a student of the teacher's kind, a causal language model, got a masked language"),
    "other classes": (["--teacher", "CLASSIFIER", "--student", "CLASSES", "--data", "LABELS"], 1,
                      "a classifier of bad, good, got a classifier of 0, 1, 2"),
    "a config.json that is none": (["--teacher", "GPT", "--student", "BROKEN", "--data", "PAIRS"], 1, "is damaged"),
    "another width": (["--teacher", "GPT", "--student", "new,width=8", "--loss", "distilbert", "--data", "TEXT"], 1,
                      "a student with the teacher's width of 16, got 8: --set cosine=0 leaves the comparison out"),
    "other heads": (["--teacher", "BERT", "--student", "new,heads=1", "--loss", "tinybert", "--data", "TEXT"], 1,
                    "a student with the teacher's 2 heads, got 1: --set attention=0 leaves the comparison out"),
    "layers of two stacks": (["--teacher", "MARIAN", "--student", "layers=1", "--loss", "tinybert", "--data",
                              "SOURCES"], 2, "wants a model with one stack of blocks, got a Seq2Seq"),
    "DistilBERT's loss of an encoder-decoder": (
        ["--teacher", "MARIAN", "--student", "layers=1", "--loss", "distilbert", "--data", "SOURCES"], 1,
        "--loss distilbert wants a masked or a causal language model, got an encoder-decoder"),
    "DistilBERT's loss of a classifier": (
        ["--teacher", "CLASSIFIER", "--student", "layers=1", "--loss", "distilbert", "--data", "LABELS"], 1,
        "got a classifier of bad, good: take hinton"),
    "words of a BERT": (["--teacher", "BERT", "--student", "layers=1", "--loss", "word-level", "--data", "TEXT"], 1,
                        "--loss word-level wants a model that predicts the next token, got a masked language model"),
    "no such loss": (["--teacher", "GPT", "--student", "layers=1", "--loss", "hintn", "--data", "PAIRS"], 2,
                     "--loss wants the name of a distillation loss, got 'hintn': did you mean Hinton?"),
    "a setting that is none": (["--teacher", "GPT", "--student", "layers=1", "--set", "temprature=2", "--data",
                                "PAIRS"], 2, "did you mean 'temperature'?"),
    "a teacher as a setting": (["--teacher", "GPT", "--student", "layers=1", "--set", "teacher=x", "--data", "PAIRS"],
                               2, "unknown keyword 'teacher'"),
    "no temperature": (["--teacher", "GPT", "--student", "layers=1", "--set", "temperature=0", "--data", "PAIRS"], 2,
                       "temperature wants a finite number > 0"),
    "a setting of no loss": (["--teacher", "GPT", "--student", "layers=1", "--loss", "none", "--set", "soft=1",
                              "--data", "PAIRS"], 2, "--loss none has no teacher and no settings"),
    "a cache of hidden states": (["--teacher", "GPT", "--student", "layers=1", "--loss", "distilbert", "--cache", "C",
                                  "--data", "TEXT"], 2, "a cache holds logits and no hidden states"),
    "a cache of masks": (["--teacher", "BERT", "--student", "layers=1", "--cache", "C", "--data", "TEXT"], 1,
                         "--cache wants rows that come again"),
    "logits without a cache": (["--teacher", "GPT", "--student", "layers=1", "--logits", "4", "--data", "PAIRS"], 2,
                               "--logits wants --cache"),
    "a text for an encoder-decoder": (["--teacher", "MARIAN", "--student", "layers=1", "--data", "TEXT"], 1,
                                      "the encoder-decoder Seq2Seq wants rows of source and target"),
    "sources for a GPT": (["--teacher", "GPT", "--student", "layers=1", "--data", "SOURCES"], 1,
                          "(source and target) want an encoder-decoder, got a GPT"),
    "labels without a classifier": (["--teacher", "BERT", "--student", "layers=1", "--data", "LABELS"], 1,
                                    "has labels, and the teacher has no classifier"),
    "data without tokens": (["--teacher", "GPT", "--student", "layers=1", "--data", "BLANK"], 1,
                            "a text wants at least two tokens, got 0"),
    "an empty source": (["--teacher", "MARIAN", "--student", "layers=1", "--data", "NO_SOURCE"], 1,
                        "line 2 of {NO_SOURCE}: a source wants at least one token, got an empty text"),
    "texts of a GPT": (["--teacher", "GPT", "--student", "layers=1", "--loss", "sequence-level", "--data", "PAIRS"], 1,
                       "--loss sequence-level wants an encoder-decoder, got a causal language model: take word-level"),
    "logits of texts": (["--teacher", "MARIAN", "--student", "layers=1", "--loss", "interpolation", "--cache", "C",
                         "--logits", "4", "--data", "SOURCES"], 2, "--logits wants a loss of logits"),
    "no beams": (["--teacher", "MARIAN", "--student", "layers=1", "--loss", "sequence-level", "--set", "beams=0",
                  "--data", "SOURCES"], 1, "beams wants a whole number >= 1, got 0"),
    "texts that are too long": (["--teacher", "MARIAN", "--student", "layers=1", "--loss", "sequence-level", "--set",
                                 "max_new_tokens=97", "--data", "SOURCES"], 1, "wants at most 96 tokens"),
    "no such data": (["--teacher", "GPT", "--student", "layers=1", "--data", "no.jsonl"], 1, "no.jsonl"),
    "a length of 0": (["--teacher", "GPT", "--student", "layers=1", "--max-len", "0", "--data", "PAIRS"], 2,
                      "--max-len: wants a whole number >= 2, got '0'"),
    "a long row": (["--teacher", "GPT", "--student", "layers=1", "--max-len", "97", "--data", "PAIRS"], 1,
                   "--max-len wants at most 96 tokens"),
    "a full folder": (["--teacher", "GPT", "--student", "layers=1", "--data", "PAIRS", "--out", "FULL"], 1,
                      "wants a new or an empty folder"),
    "nothing to resume": (["--resume", "--out", "FULL"], 1, "has no distill.json"),
    "an option with a letter wrong": (["--teacher", "GPT", "--studnet", "layers=1", "--data", "PAIRS"], 2,
                                      "did you mean --student"),
}


@pytest.fixture(scope="module")
def places(teachers, files, tmp_path_factory) -> dict[str, str]:
    """{word of BAD: path}"""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("mine")
    (folder / "config.json").write_text("{")
    model, tokenizer = ft.load(teachers["gpt"])
    other = tokenizer.from_str(tokenizer.to_str().replace('"<|endoftext|>"', '"<|endoftexu|>"'))
    classes = ft.classifier(ft.BERT(ft.BERTConfig(**SIZES)), 3)
    found = {
        "FULL": folder / "full", "BROKEN": folder / "config.json", "WORDS": small_model(folder, vocab=2100),
        "TOKENS": ft.save(model, folder / "tokens", other), "CLASSES": ft.save(classes, folder / "classes", tokenizer),
        "BLANK": write_rows(folder / "blank.jsonl", [{"text": ""}, {"text": ""}]),
        "NO_SOURCE": write_rows(folder / "no.jsonl", [*sources(1), {"source": "", "target": "x"}]),
    }
    found |= {kind.upper(): path for kind, path in (teachers | files).items()}
    return {name: str(path) for name, path in found.items()}


@of_the_host
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_nothing_is_written(name, places, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, status, message = BAD[name]
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "new" / "student")]
    error = refusal(capsys, "distill", *[places.get(a, a) for a in arguments], *out, status=status)
    assert message.format(**places) in error, error
    assert files_below(tmp_path) == []


@of_the_host
@pytest.mark.parametrize("facts, message", [
    ({"form": 2}, "wants the form 1"), ({"student": None}, "as the option student"), ({"set": [1]}, "the option set"),
    ({"cache": 3}, "the option cache"), ({"teacher_fingerprint": 3}, "the option teacher_fingerprint"),
])
def test_a_damaged_file_of_options_is_refused(facts, message, teachers, files, capsys, tmp_path, monkeypatch):
    out = tmp_path / "run"
    stopped_run(monkeypatch, ["distill", "--teacher", teachers["gpt"], "--student", "layers=1", "--data",
                              files["pairs"], "--steps", "5", "--out", str(out)])
    capsys.readouterr()
    config = json.loads((out / "distill.json").read_text())
    (out / "distill.json").write_text(json.dumps(config | facts))
    assert message in refusal(capsys, "distill", "--resume", "--out", str(out))

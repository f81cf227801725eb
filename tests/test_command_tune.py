"""`tinyft tune`: data of every kind, the folder of a run, stopping and going on, and a table of bad input."""
from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_tools import (
    ROOT,
    chats,
    files_below,
    labelled,
    pairs,
    refusal,
    result_of,
    small_model,
    start,
    succeed,
    write_rows,
)
from helpers import of_the_host

import tinyft as ft
from tinyft import array, cli
from tinyft.commands.arguments import UsageError
from tinyft.commands.plan import Plan, make_plan
from tinyft.commands.settings import make_method, read_value
from tinyft.data.files import read_rows
from tinyft.data.rows import segment_batches
from tinyft.files import read_tensors

pytestmark = pytest.mark.skipif(array.backend() == "cupy", reason="commands and files are of the host")


@pytest.fixture(scope="module")
def gpt(tmp_path_factory) -> str:
    return small_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    return small_model(tmp_path_factory.mktemp("models"), "bert")


@pytest.fixture(scope="module")
def train_file(tmp_path_factory) -> str:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", pairs(24))


def log_of(out: Path) -> list[dict[str, Any]]:
    """The lines of a log without their times."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for entry in entries:
        entry.pop("seconds", None)
    return entries


def same_adapter(a: Path, b: Path) -> bool:
    """True if the adapters of two runs hold bitwise the same arrays."""
    ours, _ = read_tensors(a / "adapter" / "adapter.safetensors")
    theirs, _ = read_tensors(b / "adapter" / "adapter.safetensors")
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
KINDS = {
    "pairs": ("gpt", pairs(24), []),
    "pairs as a chat": ("gpt", pairs(24), ["--chat"]),
    "chat": ("gpt", chats(12), ["--template", "chatml"]),
    "text": ("gpt", [{"text": "Return the list of all files in a folder. " * 3}] * 8, []),
    "masked text": ("bert", [{"text": "Return the list of all files in a folder. " * 3}] * 8, []),
    "labels of a GPT": ("gpt", labelled(24), []),
    "labels of a BERT": ("bert", labelled(24), []),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_data_trains_and_lowers_the_loss(name, gpt, bert, capsys, tmp_path):
    kind, rows, options = KINDS[name]
    file = write_rows(tmp_path / "train.jsonl", rows)
    out = tmp_path / "new" / "run"
    result = result_of(
        capsys, "tune", "--model", gpt if kind == "gpt" else bert, "--data", file, "--test", file, "--out", str(out),
        "--method", "full", "--steps", "30", "--lr", "1e-2", "--batch", "8", *options,
    )
    assert result["test"]["loss"] < result["before"]["loss"] - 0.1
    assert result["steps"] == 30 and result["adapter"] == str(out / "adapter")
    assert {path.name for path in out.iterdir()} >= {"config.json", "log.jsonl", "checkpoint.safetensors", "adapter"}


@of_the_host
def test_a_text_file_trains_a_shipped_base_in_a_process_of_its_own(tmp_path):
    """The main path, as a user types it: a plan before the training, the result after it, and the files."""
    (tmp_path / "text.txt").write_text("Return the number of bytes that were written.\n" * 40)
    run = start(tmp_path, "tune", "--model", "base-gpt", "--data", "text.txt", "--method", "lora", "--set", "r=2",
                "--set", "targets=attn.[qv],mlp.up", "--steps", "4", "--batch", "4", "--max-len", "32", "--out", "run")
    out, error = run.communicate(timeout=60)
    assert run.returncode == 0, error
    assert "LoRA(r=2, alpha=16.0, dropout=0.0, targets=('attn.[qv]', 'mlp.up'))" in out
    assert "trained (" in out and "memory   about" in out and "time     about" in out and "loss " in out
    assert "4 steps in" in error
    model, _ = ft.load("base-gpt")
    assert ft.load_adapter(model, tmp_path / "run" / "adapter").method == ft.LoRA(r=2, targets=("attn.[qv]", "mlp.up"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["set"] == ["r=2", "targets=attn.[qv],mlp.up"] and config["steps"] == 4
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == [1, 2, 3, 4]


@of_the_host
def test_the_curve_is_drawn_and_without_matplotlib_a_sentence_says_so(gpt, train_file, capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    options = ["tune", "--model", gpt, "--data", train_file, "--test", train_file, "--steps", "3", "--method", "full"]
    assert "curve.svg" in succeed(capsys, *options, "--out", str(tmp_path / "a"))
    assert "<svg" in (tmp_path / "a" / "curve.svg").read_text()
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "no curve.svg: matplotlib is missing" in succeed(capsys, *options, "--out", str(tmp_path / "b"))
    assert not (tmp_path / "b" / "curve.svg").exists() and (tmp_path / "b" / "adapter" / "adapter.json").exists()


def test_a_table_trains_as_its_lines_do_and_micro_batches_as_one_batch(gpt, train_file, capsys, tmp_path):
    """A .csv file gives the run of the .jsonl file; two batches of 4 for an update that of one batch of 8."""
    with open(tmp_path / "train.csv", "w", newline="") as f:
        csv.writer(f).writerows([("prompt", "response"), *((row["prompt"], row["response"]) for row in pairs(24))])
    options = ["tune", "--model", gpt, "--steps", "4", "--autocast", "bfloat16"]
    succeed(capsys, *options, "--data", train_file, "--out", str(tmp_path / "a"))
    succeed(capsys, *options, "--data", str(tmp_path / "train.csv"), "--out", str(tmp_path / "b"))
    assert same_adapter(tmp_path / "a", tmp_path / "b")
    file = write_rows(tmp_path / "eight.jsonl", pairs(8))
    losses = []
    for batch, accumulate in (("8", "1"), ("4", "2")):
        sizes = ["--batch", batch, "--accumulate", accumulate, "--out", str(tmp_path / batch)]
        losses.append(result_of(capsys, *options[:-2], "--data", file, *sizes)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_recompute_gives_the_same_adapter_and_plans_less_memory(gpt, train_file, capsys, tmp_path, monkeypatch):
    """A folder of a version without the option goes on without it."""
    planned = []

    def plan(*args, **more):
        planned.append(make_plan(*args, **more))
        return planned[-1]

    monkeypatch.setattr("tinyft.commands.tune.make_plan", plan)
    options = ["tune", "--model", gpt, "--data", train_file, "--steps", "3", "--set", "dropout=0.5"]
    succeed(capsys, *options, "--out", str(tmp_path / "a"))
    succeed(capsys, *options, "--out", str(tmp_path / "b"), "--recompute")
    assert same_adapter(tmp_path / "a", tmp_path / "b")
    assert planned[1].bytes < 0.95 * planned[0].bytes
    config = tmp_path / "a" / "config.json"
    facts = json.loads(config.read_text())
    assert facts.pop("recompute") is False
    config.write_text(json.dumps(facts))
    succeed(capsys, "tune", "--resume", "--out", str(tmp_path / "a"))


@of_the_host
def test_the_parser_imports_no_command():
    """`tinyft --help` is as fast as before: each command imports its module when it runs."""
    code = "import sys; from tinyft import cli; cli.parser(); print(*sys.modules)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    shown = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    ours = {name for name in shown.split() if name.startswith("tinyft.commands")}
    assert ours == {"tinyft.commands", "tinyft.commands.arguments"} and "matplotlib" not in shown


@of_the_host
def test_the_plan_changes_nothing(gpt, train_file, capsys, tmp_path, monkeypatch):
    """The run with a plan is bitwise the run without one, dropout included."""
    options = ["tune", "--model", gpt, "--data", train_file, "--steps", "5", "--set", "dropout=0.5", "--lr", "0.1"]
    succeed(capsys, *options, "--out", str(tmp_path / "a"))

    monkeypatch.setattr("tinyft.commands.tune.make_plan", lambda model, *_, **__: Plan(ft.count(model), 0, 0.0))
    succeed(capsys, *options, "--out", str(tmp_path / "b"))
    assert same_adapter(tmp_path / "a", tmp_path / "b") and log_of(tmp_path / "a") == log_of(tmp_path / "b")
    succeed(capsys, *options, "--seed", "1", "--out", str(tmp_path / "c"))
    assert not same_adapter(tmp_path / "a", tmp_path / "c")


@of_the_host
def test_the_plan_expects_the_memory_that_the_training_takes(gpt, train_file):
    """Within a tenth. A plan without the step, or without the moments of AdamW, is far off."""
    model, tokenizer = ft.load("base-gpt")
    ft.attach(model, ft.Full())
    rows = [[(prompt, False), (response, True)] for prompt, response in read_rows(train_file).rows]
    batches, _ = segment_batches(rows, tokenizer, 8, 64)
    plan = make_plan(model, batches, 3, 1, None)
    held = sum(p.data.nbytes for p in model.parameters())
    with array.peak_memory() as memory:
        ft.fit(model, batches, 3, progress=False)
    taken = held + memory["bytes"]
    assert abs(plan.bytes - taken) < 0.1 * taken
    assert abs(plan.bytes - 2 * plan.count.nbytes - taken) > 0.1 * taken and abs(held - taken) > 0.5 * taken
    assert plan.count == ft.count(model)


# ── stopping and going on ────────────────────────────────────────────────────────────────────────────────────────────
def long_run(gpt: str, file: str, out: str) -> list[str]:
    return ["tune", "--model", gpt, "--data", file, "--test", file, "--out", out, "--steps", "300", "--lr", "1e-2",
            "--batch", "4", "--set", "r=2", "--set", "dropout=0.1", "--evaluate-every", "100", "--save-every", "20"]


@pytest.fixture(scope="module")
def whole_run(gpt, train_file, tmp_path_factory) -> Path:
    """The folder of the run that nothing stops."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert cli.main(long_run(gpt, train_file, str(out))) == 0
    return out


@of_the_host
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)],
                         ids=["SIGTERM", "SIGINT", "SIGKILL"])
def test_a_run_that_is_stopped_goes_on_to_the_same_end(number, status, gpt, train_file, whole_run, capsys, tmp_path):
    """Adapter and log are bitwise those of the run that nothing stopped, also after a kill between two checkpoints."""
    def restore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)     # the test runner may ignore it
    out = tmp_path / "run"
    run = start(tmp_path, *long_run(gpt, train_file, "run"), preexec_fn=restore)
    deadline = time.monotonic() + 60
    while not (out / "log.jsonl").exists() or (out / "log.jsonl").read_bytes().count(b"\n") < 35:
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
    run.send_signal(number)
    _, error = run.communicate(timeout=60)
    assert run.returncode == status
    if number != signal.SIGKILL:
        assert "of 300; tinyft tune --resume --out run goes on" in error and "Traceback" not in error
    assert not (out / "adapter").exists()
    done = read_tensors(out / "checkpoint.safetensors")[1]["done"]
    assert 20 <= done < 300
    result = result_of(capsys, "tune", "--resume", "--out", str(out))
    assert same_adapter(out, whole_run)
    assert log_of(out) == log_of(whole_run) and result["steps"] == 300


@of_the_host
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(gpt, train_file, capsys, tmp_path):
    options = ["tune", "--model", gpt, "--data", train_file, "--test", train_file, "--steps", "4"]
    succeed(capsys, *options, "--out", str(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "adapter")
    (tmp_path / "b" / "checkpoint.safetensors").unlink()
    with open(tmp_path / "b" / "log.jsonl", "a") as f:
        f.write('{"step": 5, "lo')                       # half a line
    succeed(capsys, "tune", "--resume", "--out", str(tmp_path / "b"))
    assert same_adapter(tmp_path / "a", tmp_path / "b") and log_of(tmp_path / "a") == log_of(tmp_path / "b")


def test_resuming_a_run_that_has_ended_changes_nothing(gpt, train_file, capsys, tmp_path):
    options = ["tune", "--model", gpt, "--data", train_file, "--steps", "3", "--out", str(tmp_path / "run")]
    first = result_of(capsys, *options)
    (tmp_path / "run" / "adapter").rename(tmp_path / "adapter")
    second = result_of(capsys, *options, "--resume")
    assert same_adapter(tmp_path, tmp_path / "run")
    assert first["loss"] == second["loss"]


@of_the_host
def test_only_the_same_run_is_resumed(gpt, train_file, capsys, tmp_path):
    out = str(tmp_path / "run")
    options = ["tune", "--model", gpt, "--data", train_file, "--steps", "3", "--out", out]
    succeed(capsys, *options)
    assert f"{out} holds a run: --resume goes on with it" in refusal(capsys, *options)
    sentence = refusal(capsys, "tune", "--resume", "--out", out, "--lr", "0.5")
    assert sentence == "tinyft: --resume goes on with the options of the run, and its --lr is 0.001, not 0.5\n"
    other = write_rows(tmp_path / "data.jsonl", pairs(24))
    succeed(capsys, *options[:-1], str(tmp_path / "moved"), "--data", other)
    write_rows(tmp_path / "data.jsonl", pairs(24)[::-1])
    sentence = refusal(capsys, "tune", "--resume", "--out", str(tmp_path / "moved"))
    assert "other examples" in sentence
    assert "has no config.json" in refusal(capsys, "tune", "--resume", "--out", str(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()


@of_the_host
@pytest.mark.parametrize("changes, words", [
    ({"form": 2}, "wants the form 1 of a run, got 2"),
    ({"steps": "many"}, "is damaged: got 'many' as the option steps"),
    ({"steps": True}, "is damaged: got True as the option steps"),
    ({"steps": None}, "is damaged: got None as the option steps"),
    ({"data": ["a"]}, "is damaged: got ['a'] as the option data"),
    ({"set": [3]}, "is damaged: got [3] as the option set"),
    ({"schedule": "cubic"}, "--schedule wants one of"),
    ({"lr": -1}, "lr wants a finite number"),
    ({"method": "lroa"}, "did you mean LoRA?"),
])
def test_a_damaged_config_is_refused(changes, words, gpt, train_file, capsys, tmp_path):
    """Also one that was written by hand: nothing of it is believed."""
    out = tmp_path / "run"
    succeed(capsys, "tune", "--model", gpt, "--data", train_file, "--steps", "2", "--out", str(out))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | changes))
    assert cli.main(["tune", "--resume", "--out", str(out)]) in (1, 2)
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    (out / "config.json").write_text("{")
    assert "is damaged" in refusal(capsys, "tune", "--resume", "--out", str(out))


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────
LONG = "word " * 200
USER = {"role": "user", "content": "Hello"}
BAD_DATA: list[tuple[list, list[str], str]] = [
    ([], [], "is empty"),
    ([{"prompt": "a", "response": "b"}, {"text": "a"}], [], "line 2 of {file}: wanted the columns of line 1, prompt"),
    ([{"prompt": "a"}], [], "line 1 of {file} has a prompt and no response: there is nothing to learn"),
    (pairs(2) + [{"prompt": "a", "response": LONG}], [], "line 3 of {file}: the response and what follows it have"),
    ([{"prompt": LONG, "response": "b"}] * 2, [], "line 1 of {file}: its prompt is cut to fit into 96 tokens, and so"),
    ([{"text": "a b c"}, {"text": ""}], [], "line 2 of {file}: a text wants at least two tokens, got 0"),
    ([{"text": "a", "label": "x"}] * 3, [], "wants labels of at least two classes, got only x"),
    ([{"messages": [USER]}], [], "line 1 of {file}: a chat wants an assistant turn to learn, got none"),
    ([{"messages": [{"role": "assistant", "content": "a"}]}], [], "line 1 of {file}: a chat wants a user turn"),
    ([{"messages": [USER, {"role": "assistant", "content": LONG}]}], [], "line 1 of {file}: the response and what"),
    ([{"text": "a b c"}], ["--chat"], "--chat wants rows of prompt and response, got {file} with rows of text"),
    (pairs(4), ["--max-len", "97"], "--max-len wants at most 96 tokens, the positions of this model, got 97"),
    (pairs(4), ["--max-len", "90", "--method", "prompt", "--set", "p=10"], "--max-len wants at most 86 tokens"),
    (pairs(4), ["--set", "targets=attn.x"], "'attn.x' names no module of this model"),
    (pairs(4), ["--packed"], "--packed wants a .gguf file"),
]


@of_the_host
@pytest.mark.parametrize("rows, options, words", BAD_DATA, ids=range(len(BAD_DATA)))
def test_bad_data_is_refused_before_anything_is_made(rows, options, words, gpt, capsys, tmp_path):
    file = write_rows(tmp_path / "bad.jsonl", rows)
    before = files_below(tmp_path)
    sentence = refusal(capsys, "tune", "--model", gpt, "--data", file, "--out", str(tmp_path / "a" / "b"), *options)
    assert words.format(file=file) in sentence
    assert files_below(tmp_path) == before


def test_labels_that_the_head_lacks_are_named_with_their_line(bert, capsys, tmp_path):
    train = write_rows(tmp_path / "train.jsonl", labelled(8))
    test = write_rows(tmp_path / "test.jsonl", labelled(4) + [{"text": "a", "label": "godo"}])
    out = ["--out", str(tmp_path / "run")]
    sentence = refusal(capsys, "tune", "--model", bert, "--data", train, "--test", test, *out)
    assert f"line 5 of {test}: the model's head has no class 'godo'; its 2 classes are bad, good" in sentence
    assert sentence.endswith("did you mean 'good'?\n")
    model, tokenizer = ft.load(bert)
    three = str(ft.save(ft.classifier(model, 3), tmp_path / "three", tokenizer))
    numbers = write_rows(tmp_path / "numbers.jsonl", [{"text": "a", "label": i} for i in range(4)])
    sentence = refusal(capsys, "tune", "--model", three, "--data", numbers, *out)
    assert f"line 4 of {numbers}: the model's head has no class '3'; its 3 classes are 0, 1, 2" in sentence
    assert not (tmp_path / "run").exists()


def test_models_that_cannot_learn_the_rows_are_refused(gpt, bert, capsys, tmp_path):
    file = write_rows(tmp_path / "train.jsonl", pairs(4))
    out = ["--out", str(tmp_path / "run")]
    sentence = refusal(capsys, "tune", "--model", bert, "--data", file, *out)
    assert "want a causal language model, got a BERT with the head MaskedHead" in sentence
    (tmp_path / "gpt").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "gpt" / name).write_bytes(Path(gpt, name).read_bytes())
    sentence = refusal(capsys, "tune", "--model", str(tmp_path / "gpt"), "--data", file, *out)
    assert "tune wants a model with its tokenizer, got no tokenizer.json in" in sentence
    small = small_model(tmp_path, "gpt", vocab=2048)
    (tmp_path / "small").mkdir()
    model = ft.GPT(ft.GPTConfig(vocab=100, positions=32, width=16, layers=1, heads=2))
    ft.save(model, tmp_path / "small", ft.load(small)[1])
    assert "2048 tokens in the tokenizer" in refusal(capsys, "tune", "--model", str(tmp_path / "small"), "--data", file,
                                                     *out)


@of_the_host
@pytest.mark.parametrize("arguments, words", [
    (["--model", "base-gtp"], "did you mean base-gpt?"),
    (["--model", "{folder}/modle"], "did you mean {folder}/model?"),
    (["--data", "{folder}/trian.jsonl"], "did you mean {folder}/train.jsonl?"),
    (["--data", "{folder}/train.json"], "wants the ending .txt, .jsonl, .csv, got {folder}/train.json: did you mean"),
    (["--data", "{folder}"], "wants the ending"),
    (["--out", "{folder}/train.jsonl"], "--out wants a new or an empty folder, got {folder}/train.jsonl, which is no"),
    (["--out", "{folder}/train.jsonl/run"], "--out wants a folder that can be written to"),
    (["--out", "{folder}"], "--out wants a new or an empty folder, got {folder}, which holds"),
    (["--out", ""], "--out wants the path of a folder, got an empty path"),
    (["--out", "{folder}/" + "x" * 300], "--out wants a folder that can be written to"),
])
def test_wrong_paths_name_the_near_one(arguments, words, gpt, capsys, tmp_path):
    write_rows(tmp_path / "train.jsonl", pairs(4))
    (tmp_path / "model").symlink_to(gpt)
    given = {"--model": gpt, "--data": str(tmp_path / "train.jsonl"), "--out": str(tmp_path / "run")}
    given[arguments[0]] = arguments[1].format(folder=tmp_path)
    before = files_below(tmp_path)
    sentence = refusal(capsys, "tune", *(word for pair in given.items() for word in pair))
    assert words.format(folder=tmp_path) in sentence
    assert files_below(tmp_path) == before


@of_the_host
@pytest.mark.parametrize("arguments, words", [
    (["--method", "lroa"], "--method wants the name of a method, got 'lroa': did you mean LoRA?"),
    (["--method", "quantum"], "--method wants the name of a method, got 'quantum': there are Full, "),
    (["--set", "rr=8"], "--set with LoRA got an unknown keyword 'rr': did you mean 'r'?"),
    (["--set", "lora_alpha=8"], "--set with LoRA got an unknown keyword 'lora_alpha': did you mean 'alpha'?"),
    (["--set", "r"], "--set wants FIELD=VALUE, such as r=8, got 'r'"),
    (["--set", "r=8", "--set", "r=4"], "--set gives r twice"),
    (["--set", "r=2.5"], "--set r wants a whole number, got '2.5'"),
    (["--set", "alpha=x"], "--set alpha wants a number, got 'x'"),
    (["--set", "r=0"], "LoRA wants a rank r >= 1, got 0"),
    (["--stpes", "3"], "did you mean --steps instead of --stpes?"),
    (["--steps", "0"], "argument --steps: wants a whole number >= 1, got '0'"),
    (["--lr", "-1"], "argument --lr: wants a finite number > 0, got '-1'"),
    (["--lr", "nan"], "argument --lr: wants a finite number > 0, got 'nan'"),
    (["--schedule", "cosin"], "did you mean 'cosine'?"),
    (["--template", "chatlm", "--chat"], "--template wants one of chatml, "),
])
def test_a_wrong_command_line_names_the_near_word(arguments, words, gpt, train_file, capsys, tmp_path):
    options = ["--model", gpt, "--data", train_file, "--out", str(tmp_path / "run")]
    assert words in refusal(capsys, "tune", *options, *arguments, status=2)
    assert files_below(tmp_path) == []


@of_the_host
def test_missing_options_and_commands_have_the_status_2(capsys, tmp_path):
    assert "wants --data" in refusal(capsys, "tune", "--model", "base-gpt", "--out", str(tmp_path / "x"), status=2)
    assert "--out" in refusal(capsys, "tune", "--model", "base-gpt", status=2)
    assert "did you mean 'tune'?" in refusal(capsys, "tnue", status=2)
    sentence = refusal(capsys, "eval", "--modle", "x", "--data", "y", status=2)
    assert "did you mean --model instead of --modle?" in sentence


@of_the_host
def test_every_command_has_a_line_of_help_and_an_example_that_is_understood(capsys):
    import shlex

    parser = cli.parser()
    names = ["tune", "eval", "generate", "chat", "merge", "embed", "convert", "compress", "distill", "memory"]
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    overview = capsys.readouterr().out
    for name in names:
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0 and name in overview
        _, _, example = text.partition("example:\n")
        words = shlex.split(example)
        assert words[:2] == ["tinyft", name] and parser.parse_args(words[1:]).command == name


# ── --set ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_every_field_of_every_method_can_be_set_to_its_default():
    """The text of a default gives the default again, for every field whose value a command line can give."""
    for cls in ft.methods():
        made = cls.cls()
        settings = []
        for name, value in vars(made).items():
            if isinstance(value, (tuple, list)):
                value = ",".join(map(str, value))
            if value != "" and (value is None or isinstance(value, (bool, int, float, str))):
                settings.append(f"{name}={value}")
        again = make_method(cls.cls.__name__.lower(), settings)
        assert again == made and make_method(cls.cls.__module__.rpartition(".")[2], []) == made


@pytest.mark.parametrize("text, kind, value", [
    ("8", int, 8), ("-3", int, -3), ("8", float, 8.0), ("1e-3", float, 1e-3), ("True", bool, True), ("no", bool, False),
    ("none", int | None, None), ("3", int | None, 3), ("a", str, "a"), ("none", str | None, None),
    ("a", Any, "a"), ("a, b", Any, ("a", "b")), ("1,2", tuple[int, ...], (1, 2)), ("1,2", tuple[int, int], (1, 2)),
    ("0.5,2", tuple[float, int], (0.5, 2)), ("a,b", tuple, ("a", "b")), ("a,b", list[str], ["a", "b"]),
])
def test_values_are_read_by_the_type_of_the_field(text, kind, value):
    got = read_value("--set x", text, kind)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("text, kind", [
    ("8.0", int), ("", int), ("maybe", bool), ("1,x", tuple[int, ...]), ("1,2,3", tuple[int, int]), ("1", dict),
])
def test_other_values_are_refused(text, kind):
    with pytest.raises(UsageError, match="--set x wants "):
        read_value("--set x", text, kind)


# ── fit ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_on_step_gets_every_step_and_its_loss():
    model = ft.GPT(ft.GPTConfig(vocab=20, positions=8, width=8, layers=1, heads=2))
    seen = []
    history = ft.fit(model, [{"ids": np.arange(12).reshape(2, 6)}], steps=3, progress=False,
                     on_step=lambda step, terms: seen.append((step, terms)))
    assert seen == [(i + 1, {"loss": loss}) for i, loss in enumerate(history.losses)]
    with pytest.raises(TypeError, match="on_step wants a function"):
        ft.fit(model, [], steps=1, on_step=3)

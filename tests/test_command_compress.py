"""`tinyft compress`: its folder, stopping and going on, the other commands on its result, and a table of bad input."""
from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_tools import files_below, labelled, pairs, refusal, result_of, small_model, start, succeed, write_rows
from helpers import host, of_the_host

import tinyft as ft
from tinyft import array, cli, nn
from tinyft.commands import rule_plan
from tinyft.commands.calibration import calibration_batches
from tinyft.commands.layers import Layers, Reports
from tinyft.commands.settings import make_rule
from tinyft.compress import LayerReport, Uniform

pytestmark = pytest.mark.skipif(array.backend() == "cupy", reason="commands and files are of the host")

FEW = ("--sequences", "6", "--length", "24")


@pytest.fixture(scope="module")
def gpt(tmp_path_factory) -> str:
    return small_model(tmp_path_factory.mktemp("models"), layers=2, width=32)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text("Return the number of bytes that were written to the file.\n" * 20)
    return str(file)


@pytest.fixture(scope="module")
def compressed(gpt, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("compressed") / "small"
    assert cli.main(["compress", "--model", gpt, "--method", "rtn", "--group", "16", "--out", str(out)]) == 0
    return str(out)


def packed_of(folder: str | Path) -> dict[str, nn.Packed]:
    model, _ = ft.load(folder)
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Packed)}


def without_times(folder: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for entry in entries:
        del entry["seconds"]
    return entries


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_shipped_base_in_a_process_of_its_own(tmp_path):
    """The main path, as a user types it: a plan, a line for each weight, the result, and a model that writes."""
    run = start(tmp_path, "compress", "--model", "base-gpt-small", *FEW, "--bits", "3", "--group", "32",
                "--set", "act_order=true", "--out", "small")
    out, error = run.communicate(timeout=120)
    assert run.returncode == 0, error
    assert "GPTQ(bits=3, group=32" in out and "act_order=True" in out
    assert "6 sequences of 24 tokens of the text that ships" in out
    assert "bits a weight" in out and "12/12  blocks.1.mlp.down" in out and "time     about" in out
    assert sorted(os.listdir(tmp_path / "small")) == [
        "compress.json", "config.json", "log.jsonl", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    weights = packed_of(tmp_path / "small")
    assert len(weights) == 12 and all(w.bits == 3 and w.order is not None for w in weights.values())
    written = start(tmp_path, "generate", "--model", "small", "--prompt", "Return the", "--max-new-tokens", "5")
    assert written.communicate(timeout=60)[0].startswith("Return the")


@pytest.mark.parametrize("method, settings", [
    ("rtn", ["--bits", "3", "--group", "none"]), ("RTN", ["--set", "grid=ternary", "--bits", "2"]),
    ("gptq", ["--bits", "2", "--group", "8"]), ("nf4", ["--set", "double=false"]), ("awq", ["--bits", "4"]),
    ("llm-int8", []), ("obq", ["--bits", "4"]),
])
def test_every_rule_has_its_result_and_its_plan_is_true(method, settings, gpt, capsys, tmp_path):
    data = FEW if make_rule(method, []).needs_hessian else []
    arguments = ("compress", "--model", gpt, "--method", method, *settings, *data, "--out", str(tmp_path / "m"))
    result = result_of(capsys, *arguments)
    weights = packed_of(tmp_path / "m")
    assert result["weights"] == len(weights) == 12
    assert result["bytes_after"] == sum(w.nbytes for w in weights.values())
    assert result["bits_per_weight"] == pytest.approx(8 * result["bytes_after"] / sum(np.prod(w.shape) for w in
                                                                                      weights.values()))
    assert 0 < result["error"] < 0.5
    model, _ = ft.load(gpt)
    pairs_of = zip(settings[::2], settings[1::2])
    rule = make_rule(method, [value if flag == "--set" else f"{flag[2:]}={value}" for flag, value in pairs_of])
    batches = [{"ids": np.zeros((1, 8), int)}] if data else None
    plan = rule_plan.plan_rule(model, rule, batches, list(_paths(weights)))
    assert plan.after == pytest.approx(result["bytes_after"], rel=0.15) and plan.total_seconds > 0
    assert not any(isinstance(m, nn.Packed) for m in model.modules())


def _paths(weights: dict[str, nn.Packed]) -> list[str]:
    return [name.removesuffix(".weight") for name in weights]


def test_the_library_gives_the_same_weights(gpt, text_file, capsys, tmp_path):
    """The command is compress with its batches, and nothing else."""
    arguments = ("compress", "--model", gpt, "--data", text_file, *FEW, "--seed", "3", "--targets", "mlp.up",
                 "--targets", "mlp.down")
    result_of(capsys, *arguments, "--out", str(tmp_path / "m"))
    model, tokenizer = ft.load(gpt)
    ft.compress(model, ft.GPTQ(), calibration_batches(model, tokenizer, text_file, 6, 24, 3),
                targets=("mlp.up", "mlp.down"))
    ours = {path: m for path, m in model.named_modules() if isinstance(m, nn.Packed)}
    theirs = packed_of(tmp_path / "m")
    assert ours.keys() == theirs.keys() and len(ours) == 4
    for path, weight in ours.items():
        np.testing.assert_array_equal(host(weight.dequantize()), host(theirs[path].dequantize()))


@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_calibration_sequences(kind, gpt, text_file, tmp_path):
    model, tokenizer = ft.load(small_model(tmp_path, kind) if kind == "bert" else gpt)
    batches = calibration_batches(model, tokenizer, None, 10, 24, 0)
    assert [len(batch["ids"]) for batch in batches] == [4, 4, 2]
    ids = np.concatenate([batch["ids"] for batch in batches])
    assert ids.shape == (10, 24) and len(np.unique(ids, axis=0)) == 10
    if kind == "bert":
        assert (ids[:, 0] == ft.data.SPECIAL["[CLS]"]).all() and (ids[:, -1] == ft.data.SPECIAL["[SEP]"]).all()
    again = calibration_batches(model, tokenizer, None, 10, 24, 0)
    np.testing.assert_array_equal(ids, np.concatenate([batch["ids"] for batch in again]))
    other = calibration_batches(model, tokenizer, None, 10, 24, 1)
    assert (ids != np.concatenate([batch["ids"] for batch in other])).any()
    whole = np.concatenate([batch["ids"] for batch in calibration_batches(model, tokenizer, text_file, 1000, 24, 0)])
    assert 5 < len(whole) < 20                           # all that the file has, each window once
    for rows, name in ((pairs(3), "pairs"), (labelled(2), "labels"), ([{"text": "a"}], "texts")):
        file = write_rows(tmp_path / f"{name}.jsonl", rows)
        assert calibration_batches(model, tokenizer, file, 2, 24, 0)[0]["ids"].shape[1] <= 24


# ── stopping and going on ────────────────────────────────────────────────────────────────────────────────────────────
def wait_for(condition: Any, run: Any, seconds: float = 120) -> None:
    """Wait until the condition holds, while the process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)


def lines(folder: Path) -> int:
    log = folder / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


@of_the_host
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_goes_on_and_ends_in_the_same_files(stop, tmp_path):
    """Killed with no warning in the middle, twice; then the result is bitwise that of a run without a stop."""
    model = small_model(tmp_path, layers=6, width=48)
    arguments = ("compress", "--model", model, "--set", "block=1", "--group", "8", *FEW)
    whole = start(tmp_path, *arguments, "--out", "whole")
    assert whole.wait(timeout=200) == 0
    first = start(tmp_path, *arguments, "--out", "stopped")
    wait_for(lambda: lines(tmp_path / "stopped") >= 4, first)
    first.send_signal(stop)
    _, error = first.communicate(timeout=60)
    done = len(list((tmp_path / "stopped" / "layers").glob("*.safetensors")))
    assert 3 <= done < 36 and not (tmp_path / "stopped" / "config.json").exists()
    if stop == signal.SIGINT:
        assert first.returncode == 130 and f"after {done} of 36 weights; tinyft compress --resume" in error
    second = start(tmp_path, "compress", "--resume", "--out", "stopped")
    wait_for(lambda: lines(tmp_path / "stopped") >= done + 5, second)
    second.kill()
    second.communicate(timeout=60)
    third = start(tmp_path, "compress", "--resume", "--out", "stopped", "--json")
    out, error = third.communicate(timeout=200)
    assert third.returncode == 0, error
    assert "weights are compressed already" in error and json.loads(out)["weights"] == 36
    assert sorted(os.listdir(tmp_path / "stopped")) == sorted(os.listdir(tmp_path / "whole"))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert without_times(tmp_path / "stopped") == without_times(tmp_path / "whole")


def stopped_run(gpt: str, folder: Path, monkeypatch: pytest.MonkeyPatch, after: int = 5) -> None:
    """A run that ended after some weights, as by Ctrl-C."""
    add = Reports.add

    def stop(self: Reports, report: LayerReport) -> bool:
        if len(self.reports) == after:
            raise KeyboardInterrupt
        return add(self, report)

    with monkeypatch.context() as m:
        m.setattr(Reports, "add", stop)
        assert cli.main(["compress", "--model", gpt, *FEW, "--out", str(folder)]) == 130


def test_resume_refuses_another_run(gpt, text_file, capsys, tmp_path, monkeypatch):
    out = tmp_path / "m"
    stopped_run(gpt, out, monkeypatch)
    before = files_below(out)
    capsys.readouterr()
    resume = ("compress", "--resume", "--out", str(out))
    assert "its --bits is None, not 3" in refusal(capsys, *resume, "--bits", "3")
    assert "its --data is None, not" in refusal(capsys, *resume, "--data", text_file)
    assert "holds a run: --resume goes on" in refusal(capsys, "compress", "--model", gpt, "--out", str(out))
    weights = Path(gpt) / "model.safetensors"
    good = weights.read_bytes()
    other, tokenizer = ft.load(gpt)
    other.blocks[1].mlp.up.bias.data += 1
    ft.save(other, gpt, tokenizer)
    assert "the compression of another model" in refusal(capsys, *resume)
    weights.write_bytes(good)
    file = out / "layers" / "blocks.0.attn.k.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "blocks.0.attn.k.safetensors is damaged" in refusal(capsys, *resume)
    file.write_bytes((out / "layers" / "blocks.0.attn.q.safetensors").read_bytes())
    assert "without this file the weight is compressed again" in refusal(capsys, *resume)
    file.unlink()
    assert files_below(out) == [name for name in before if "attn.k" not in name]
    assert result_of(capsys, *resume)["weights"] == 12
    assert result_of(capsys, *resume) == {"out": str(out)}
    assert "nothing to do" in succeed(capsys, *resume)


def test_a_run_that_ended_while_it_removed_its_layers(gpt, capsys, tmp_path):
    out = tmp_path / "m"
    result_of(capsys, "compress", "--model", gpt, "--method", "rtn", "--out", str(out))
    (out / "layers").mkdir()
    (out / "layers" / "blocks.0.attn.q.safetensors").write_bytes(b"")
    assert "nothing to do" in succeed(capsys, "compress", "--resume", "--out", str(out))
    assert not (out / "layers").exists()


def test_layers_are_a_mapping_on_the_disk(tmp_path):
    W = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    layers = Layers(tmp_path, {"a.b": (4, 32), "c": (4, 16)})
    assert len(layers) == 0 and "a.b" not in layers and "x" not in layers
    layers["a.b"] = ft.NF4()(W)
    assert list(layers) == ["a.b"] and "a.b" in Layers(tmp_path, {"a.b": (4, 32)})
    np.testing.assert_array_equal(host(layers["a.b"].dequantize()), host(ft.NF4()(W).dequantize()))
    for missing in ("c", "x"):
        with pytest.raises(KeyError):
            layers[missing]
        with pytest.raises(KeyError):
            del layers[missing]
    layers.shapes["a.b"] = (5, 32)
    with pytest.raises(ValueError, match=r"a.b.safetensors does not hold the weight of a.b: Codebook: codes wants"):
        layers["a.b"]
    del layers["a.b"]
    assert "a.b" not in layers


@of_the_host
def test_half_a_line_of_a_log_is_left_out(tmp_path):
    W = np.ones((4, 8), np.float32)
    layers = Layers(tmp_path, {name: (4, 8) for name in "abc"})
    layers["a"] = ft.RTN()(W)
    layers["b"] = ft.RTN()(W)
    report = {"path": "a", "error": 0.5, "before": 8, "after": 4, "seconds": 0.1}
    for damage in ('{"path": "b", "err', '[1]', '{"path": "b"}', json.dumps(report | {"path": 3}), '"x"', "\xff"):
        (tmp_path / "log.jsonl").write_text(json.dumps(report) + "\n" + damage + "\n")
        log = Reports(tmp_path, layers)
        assert list(log.reports) == ["a"] and not log.add(LayerReport(**report))
        assert log.add(LayerReport("b", 0.1, 8, 4, 0.1))
        assert len(Reports(tmp_path, layers).reports) == 2


# ── the other commands ───────────────────────────────────────────────────────────────────────────────────────────────
def test_every_other_command_opens_the_result(compressed, gpt, text_file, capsys, monkeypatch, tmp_path):
    whole = result_of(capsys, "eval", "--model", gpt, "--data", text_file)
    small = result_of(capsys, "eval", "--model", compressed, "--data", text_file)
    assert small["loss"] == pytest.approx(whole["loss"], rel=0.05) and small["loss"] != whole["loss"]
    result_of(capsys, "embed", "--model", compressed, "--texts", text_file, "--out", str(tmp_path / "v.npy"))
    assert np.isfinite(np.load(tmp_path / "v.npy")).all()

    train = write_rows(tmp_path / "train.jsonl", pairs(24))
    run = str(tmp_path / "run")
    tuned = result_of(capsys, "tune", "--model", compressed, "--data", train, "--test", train, "--method", "lora",
                      "--set", "r=8", "--set", "targets=attn.[qkvo],mlp.up,mlp.down", "--steps", "30", "--lr", "1e-2",
                      "--out", run)
    assert tuned["test"]["loss"] < tuned["before"]["loss"] - 0.1
    adapted = result_of(capsys, "eval", "--model", compressed, "--adapter", run, "--data", train)
    assert adapted["loss"] == pytest.approx(tuned["test"]["loss"], rel=1e-5)
    assert "other weights" in refusal(capsys, "eval", "--model", gpt, "--adapter", run, "--data", train)

    message = refusal(capsys, "merge", "--model", compressed, "--adapter", run, "--out", str(tmp_path / "merged"))
    assert "is packed: keep the adapter beside it, or unpack the base first" in message
    assert not (tmp_path / "merged").exists()

    result_of(capsys, "convert", "--model", compressed, "--out", str(tmp_path / "dense"))
    assert packed_of(tmp_path / "dense") == {} and isinstance(packed_of(compressed).popitem()[1], Uniform)
    dense = result_of(capsys, "eval", "--model", str(tmp_path / "dense"), "--adapter", run, "--data", train)
    assert dense["loss"] == pytest.approx(adapted["loss"], rel=1e-4)
    result_of(capsys, "merge", "--model", str(tmp_path / "dense"), "--adapter", run, "--out", str(tmp_path / "merged"))

    result_of(capsys, "convert", "--model", compressed, "--adapter", run, "--out", str(tmp_path / "peft"))
    peft = result_of(capsys, "eval", "--model", compressed, "--adapter", str(tmp_path / "peft"), "--data", train)
    assert peft["loss"] == pytest.approx(adapted["loss"], rel=1e-5)


@of_the_host
def test_a_chat_with_the_result(compressed, tmp_path):
    run = start(tmp_path, "chat", "--model", compressed, "--max-new-tokens", "4")
    out, error = run.communicate("Hello\n/quit\n", timeout=60)
    assert run.returncode == 0 and out.count("\n") == 1, error


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────
BAD = {
    "no model": (["--out", "OUT"], 2, "compress wants --model"),
    "no such model": (["--model", "base-gtp", "--out", "OUT"], 1, "did you mean base-gpt"),
    "no such rule": (["--model", "GPT", "--method", "gpqt", "--out", "OUT"], 2, "did you mean GPTQ?"),
    "a method": (["--model", "GPT", "--method", "lora", "--out", "OUT"], 2, "wants the name of a compression rule"),
    "nine bits": (["--model", "GPT", "--bits", "9", "--out", "OUT"], 2, "bits wants a whole number from 1 to 8, got 9"),
    "no bits": (["--model", "GPT", "--bits", "0", "--out", "OUT"], 2, "wants a whole number >= 1, got '0'"),
    "half a bit": (["--model", "GPT", "--bits", "1.5", "--out", "OUT"], 2, "wants a whole number >= 1, got '1.5'"),
    "no group": (["--model", "GPT", "--group", "0", "--out", "OUT"], 2, "group wants a whole number >= 1, got 0"),
    "a group in words": (["--model", "GPT", "--group", "few", "--out", "OUT"], 2, "wants a whole number or none"),
    "bits of NF4": (["--model", "GPT", "--method", "nf4", "--bits", "4", "--out", "OUT"], 2, "NF4"),
    "bits twice": (["--model", "GPT", "--bits", "4", "--set", "bits=3", "--out", "OUT"], 2, "gives bits twice"),
    "a setting that is none": (["--model", "GPT", "--set", "act_odrer=1", "--out", "OUT"], 2, "act_order"),
    "a grid that is none": (["--model", "GPT", "--set", "grid=cubic", "--out", "OUT"], 2, "wants one of 'affine'"),
    "data for RTN": (["--model", "GPT", "--method", "rtn", "--data", "TEXT", "--out", "OUT"], 2,
                     "RTN needs no calibration data: leave --data out"),
    "no such data": (["--model", "GPT", "--data", "no.txt", "--out", "OUT"], 1, "no.txt"),
    "empty data": (["--model", "GPT", "--data", "EMPTY", "--out", "OUT"], 1, "is empty"),
    "data without tokens": (["--model", "GPT", "--data", "BLANK", "--out", "OUT"], 1, "at least one"),
    "a long sequence": (["--model", "GPT", "--length", "97", "--out", "OUT"], 1, "--length wants at most 96 tokens"),
    "no sequences": (["--model", "GPT", "--sequences", "0", "--out", "OUT"], 2, "wants a whole number >= 1"),
    "targets without a map": (["--model", "GPT", "--targets", "norm1", "--out", "OUT"], 1, "linear maps or embeddings"),
    "no such target": (["--model", "GPT", "--targets", "attn.x", "--out", "OUT"], 1, "names no module"),
    "an embedding by GPTQ": (["--model", "GPT", "--targets", "embed", "--out", "OUT"], 1, "which has no inputs"),
    "a packed model": (["--model", "PACKED", "--method", "rtn", "--out", "OUT"], 1, "is packed already"),
    "a full folder": (["--model", "GPT", "--out", "FULL"], 1, "wants a new or an empty folder"),
    "a file": (["--model", "GPT", "--out", "TEXT"], 1, "which is no folder"),
    "nothing to resume": (["--resume", "--out", "FULL"], 1, "has no compress.json"),
    "a run of tune": (["--resume", "--out", "TUNED"], 1, "has no compress.json"),
    "an option with a letter wrong": (["--model", "GPT", "--bist", "4", "--out", "OUT"], 2, "did you mean --bits"),
}


@of_the_host
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_nothing_is_written(name, gpt, compressed, text_file, capsys, tmp_path):
    arguments, status, message = BAD[name]
    for folder in ("full", "tuned"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "tuned" / "config.json").write_text("{}")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.jsonl").write_text(json.dumps({"text": ""}) + "\n")
    places = {"GPT": gpt, "PACKED": compressed, "TEXT": text_file, "EMPTY": str(tmp_path / "empty.txt"),
              "BLANK": str(tmp_path / "blank.jsonl"), "OUT": str(tmp_path / "new" / "m"),
              "FULL": str(tmp_path / "full"), "TUNED": str(tmp_path / "tuned")}
    before = files_below(tmp_path)
    error = refusal(capsys, "compress", *[places.get(a, a) for a in arguments], status=status)
    assert message in error, error
    assert files_below(tmp_path) == before


@of_the_host
@pytest.mark.parametrize("facts, message", [
    ({"form": 2}, "wants the form 1"), ({"bits": "4"}, "as the option bits"), ({"model": None}, "the option model"),
    ({"model_fingerprint": 3}, "the option model_fingerprint"), ({"set": [1]}, "the option set"),
])
def test_a_damaged_config_is_refused(facts, message, gpt, capsys, tmp_path, monkeypatch):
    out = tmp_path / "m"
    stopped_run(gpt, out, monkeypatch)
    capsys.readouterr()
    config = json.loads((out / "compress.json").read_text())
    (out / "compress.json").write_text(json.dumps(config | facts))
    assert message in refusal(capsys, "compress", "--resume", "--out", str(out))


def test_a_full_disk_is_a_sentence_and_the_run_goes_on(gpt, capsys, tmp_path, monkeypatch):
    out = tmp_path / "m"

    def full(self: Layers, path: str, packed: nn.Packed) -> None:
        raise OSError(28, f"could not write {self.file(path)} (No space left on device)")

    with monkeypatch.context() as m:
        m.setattr(Layers, "__setitem__", full)
        assert cli.main(["compress", "--model", gpt, *FEW, "--out", str(out)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert result_of(capsys, "compress", "--resume", "--out", str(out))["weights"] == 12

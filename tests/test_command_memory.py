"""`tinyft memory`: the table, the JSON object, the budget, and wrong options."""
from __future__ import annotations

import json

import pytest

import tinyft as ft
from tinyft import array
from tinyft.cli import main
from tinyft.commands.accounting import read_bytes
from tinyft.commands.arguments import UsageError
from tinyft.memory import CONFIGS

pytestmark = pytest.mark.skipif(array.backend() != "numpy", reason="the account is that of NumPy's kernels")
SMALL = ("--config", "gpt2", "--length", "32")


def run(capsys, *arguments: str) -> str:
    """What the command prints."""
    assert main(["memory", *arguments]) == 0
    return capsys.readouterr().out


def test_the_table_names_the_parts_and_the_formula(capsys):
    text = run(capsys, *SMALL, "--method", "lora", "--set", "r=4", "--batch", "2")
    assert text.startswith("GPT, LoRA; 2 × 32 tokens, float32 weights, AdamW")
    for word in ("weights", "optimiser states", "activations, at the peak", "peak", "Korthikanti"):
        assert word in text


def test_json_holds_the_report(capsys):
    result = json.loads(run(capsys, *SMALL, "--json", "--weights", "nf4", "--method", "lora", "--budget", "1GB"))
    report = ft.memory(CONFIGS["gpt2"], ft.LoRA(), length=32, weights="nf4")
    assert result["peak"] == report.peak and result["weights"] == report.weights
    assert result["budget"] == 10**9
    assert result["largest_batch"] == ft.largest_batch(CONFIGS["gpt2"], 1e9, ft.LoRA(), length=32, weights="nf4")


def test_a_shipped_model_and_recomputation(capsys):
    plain = json.loads(run(capsys, "--model", "base-gpt-small", "--batch", "8", "--json"))
    again = json.loads(run(capsys, "--model", "base-gpt-small", "--batch", "8", "--json", "--recompute"))
    assert again["peak"] < plain["peak"]
    assert again["flops"]["backward"] > plain["flops"]["backward"]


def test_an_encoder_decoder_is_counted_with_its_source(capsys):
    """The formula of a stack without cross-attention is left out."""
    options = ("--config", "t5-small", "--length", "8", "--source-length", "24", "--method", "lora")
    text = run(capsys, *options)
    assert text.startswith("T5, LoRA; 1 × (24 + 8) tokens") and "Korthikanti" not in text
    result = json.loads(run(capsys, *options, "--json"))
    assert result["peak"] == ft.memory(CONFIGS["t5-small"], ft.LoRA(), length=8, source_length=24).peak
    assert result["formula"] is None and result["tokens"] == 32


@pytest.mark.parametrize("text, value", [("8GB", 8e9), ("8 GiB", 8 * 2**30), ("1.5mb", 1.5e6), ("100", 100.0)])
def test_a_budget_in_gb_is_not_one_in_gib(text, value):
    assert read_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GB", "8 apples", "-1GB", "0"])
def test_another_budget_is_refused(text):
    with pytest.raises(UsageError, match="--budget wants bytes, such as 8GB or 8GiB"):
        read_bytes(text)


@pytest.mark.parametrize("arguments, message", [
    ((), "wants --model MODEL or --config NAME"),
    (("--model", "base-gpt", "--config", "gpt2"), "wants --model MODEL or --config NAME"),
    (("--config", "bert-larg"), "did you mean bert-large?"),
    (("--config", "gpt2", "--set", "r=3"), "add --method"),
    (("--config", "gpt2", "--weights", "nf5"), "weights wants one of 'float32'"),
    (("--config", "gpt2", "--source-length", "9"), "source_length is for an encoder-decoder, got a GPT"),
    (("--config", "gpt2", "--length", "9999"), "longer than the model's 1024 positions"),
])
def test_wrong_options_are_one_sentence(capsys, arguments, message):
    assert main(["memory", *arguments]) != 0
    assert message in capsys.readouterr().err

"""Helpers for the tests of the commands: small models, data files, and calls of `tinyft`."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tinyft as ft
from tinyft import cli, data

ROOT = Path(ft.__file__).resolve().parents[1]
SIZES = {"vocab": 2048, "positions": 96, "width": 16, "layers": 1, "heads": 2}


def small_model(folder: Path, kind: str = "gpt", seed: int = 0, **sizes: int) -> str:
    """The directory of a very small GPT or BERT with the shipped tokenizer."""
    sizes = SIZES | sizes
    model = ft.BERT(ft.BERTConfig(**sizes), seed) if kind == "bert" else ft.GPT(ft.GPTConfig(**sizes), seed)
    return str(ft.save(model, folder / kind, data.shipped_tokenizer()))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """A .jsonl file of these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"Return the sum of {i} and one:", "response": f" {i + 1}"} for i in range(count)]


def labelled(count: int) -> list[dict[str, str]]:
    words = {"good": "works and returns", "bad": "fails and raises"}
    rows = []
    for i in range(count):
        label = "good" if i % 2 else "bad"
        rows.append({"text": f"Function {i} {words[label]}.", "label": label})
    return rows


def chats(count: int) -> list[dict[str, Any]]:
    rows = []
    for i in range(count):
        turns = [("user", f"Open {i}"), ("assistant", "Done."), ("user", f"Close {i}"), ("assistant", f"Closed {i}.")]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return rows


def succeed(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """What a command prints on standard output; its exit status is 0."""
    status = cli.main(list(arguments))
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return printed.out


def result_of(capsys: pytest.CaptureFixture, *arguments: str) -> dict[str, Any]:
    """The JSON object that a command prints with --json; standard output holds nothing else."""
    return json.loads(succeed(capsys, *arguments, "--json"))


def refusal(capsys: pytest.CaptureFixture, *arguments: str, status: int = 1) -> str:
    """The sentence with which a command refuses its arguments."""
    try:
        got = cli.main(list(arguments))
    except SystemExit as e:                              # argparse
        got = e.code
    printed = capsys.readouterr()
    assert got == status and printed.out == "", printed
    assert printed.err.startswith("tinyft") and printed.err.count("\n") == 1 and "Traceback" not in printed.err
    return printed.err


def start(folder: Path, *arguments: str, **options: Any) -> subprocess.Popen:
    """The command in a process of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "tinyft.cli", *arguments], cwd=folder, env=env, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **options,
    )


def files_below(folder: Path) -> list[str]:
    """Everything in a folder, to see that nothing was made."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))

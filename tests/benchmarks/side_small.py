"""Things that are not a training step.  case.method: op | import | generate | load | graph;  case.model: tinyft | torch (with transformers).

    op        1,000 additions of three numbers, recorded              import    python -c "import tinyft"
    generate  64 tokens, greedy, one text, with the KV cache           load      a checkpoint of 100 MB in GPT-2's format
    graph     case.T additions in a row, and their backward
"""
from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cases import Case

TOKENS = 64


def build(c: Case) -> Callable[[], object]:
    return globals()[f"{c.method}_{c.model}"](c)


def start(run: Callable[[], object], c: Case) -> tuple[Callable[[], float], int]:
    return lambda: (run(), 0.0)[1], 0


def op_tinyft(c: Case) -> Callable[[], object]:
    import tinyft as ft
    x, y = (ft.Tensor(np.ones(3, np.float32), requires_grad=True) for _ in range(2))
    return lambda: [x + y for _ in range(1000)]


def op_torch(c: Case) -> Callable[[], object]:
    import torch
    x, y = (torch.ones(3, requires_grad=True) for _ in range(2))
    return lambda: [x + y for _ in range(1000)]


def graph_tinyft(c: Case) -> Callable[[], object]:
    import tinyft as ft
    x = ft.Tensor(np.ones(3, np.float32), requires_grad=True)

    def run() -> None:
        y = x
        for _ in range(c.T):
            y = y + x
        y.backward(np.ones(3, np.float32))
        x.grad = None
    return run


def import_tinyft(c: Case) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, "-c", f"import {c.model}"], check=True)


import_torch = import_tinyft


def generate_tinyft(c: Case) -> Callable[[], object]:
    import tinyft as ft
    model, ids = ft.GPT(ft.GPTConfig(5000, 256, 256, 6, 8)), np.arange(16)[None]
    return lambda: ft.generate(model, ids, TOKENS)


def generate_torch(c: Case) -> Callable[[], object]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(5000, 256, 256, 6, 8, bos_token_id=None, eos_token_id=None, pad_token_id=0)).eval()
    ids = torch.arange(16)[None]
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)


def checkpoint() -> Path:
    import tinyft as ft
    folder = Path(tempfile.mkdtemp(prefix="tinyft-bench-"))
    ft.save(ft.GPT(ft.GPTConfig(12000, 256, 512, 6, 8)), folder)
    return folder


def load_tinyft(c: Case) -> Callable[[], object]:
    import tinyft as ft
    folder = checkpoint()
    return lambda: ft.load(folder)[0].parameters()[0].data.sum()


def load_torch(c: Case) -> Callable[[], object]:
    from transformers import GPT2LMHeadModel
    folder = checkpoint()
    return lambda: GPT2LMHeadModel.from_pretrained(folder).transformer.wte.weight.sum().item()

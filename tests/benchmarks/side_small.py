"""Everything that is not one training step.  case.method names it;  case.model: tinyft | torch (with transformers).

    op          1,000 additions of three numbers, recorded
    graph       case.T additions in a row, and their backward pass
    attention   forward and backward of causal attention, (8, 8, 128, 32)
    optimizer   an AdamW step with clipping, 1.2 million parameters in 60 tensors
    fit         ten steps of a small model with ft.fit: the trainer's own work
    generate    64 tokens, greedy, one text, with the KV cache
    load        a checkpoint of 100 MB in GPT-2's format
    import      python -c "import tinyft", with the bytecode of an earlier import, as after an installation
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cases import Case

TOKENS = 64
Run = Callable[[], object]


def build(c: Case) -> Run:
    """The function to measure."""
    return globals()[f"{c.method}_{c.model}"](c)


def start(run: Run, c: Case) -> tuple[Callable[[], float], int]:
    """The same as a step; its loss is 0."""

    def step() -> float:
        run()
        return 0.0

    return step, 0


def op_tinyft(c: Case) -> Run:
    import tinyft as ft

    x = ft.Tensor(np.ones(3, np.float32), requires_grad=True)
    y = ft.Tensor(np.ones(3, np.float32), requires_grad=True)
    return lambda: [x + y for _ in range(1000)]


def op_torch(c: Case) -> Run:
    import torch

    x = torch.ones(3, requires_grad=True)
    y = torch.ones(3, requires_grad=True)
    return lambda: [x + y for _ in range(1000)]


def graph_tinyft(c: Case) -> Run:
    import tinyft as ft

    x = ft.Tensor(np.ones(3, np.float32), requires_grad=True)

    def run() -> None:
        y = x
        for _ in range(c.T):
            y = y + x
        y.backward(np.ones(3, np.float32))
        x.grad = None

    return run


def attention_tinyft(c: Case) -> Run:
    import tinyft as ft

    rng = np.random.default_rng(0)
    shape = (8, 8, 128, 32)  # (B, H, T, D)
    q, k, v = (ft.Tensor(rng.standard_normal(shape, np.float32), requires_grad=True) for _ in range(3))
    g = rng.standard_normal(shape, np.float32)

    def run() -> None:
        ft.ops.attention(q, k, v, causal=True).backward(g)
        for x in (q, k, v):
            x.grad = None

    return run


def optimizer_tinyft(c: Case) -> Run:
    import tinyft as ft

    rng = np.random.default_rng(0)
    parameters = {}
    for i in range(20):
        for name, shape in (("weight", (160, 360)), ("bias", (360,)), ("scale", (2000,))):
            parameters[f"{i}.{name}"] = ft.Tensor(rng.standard_normal(shape, np.float32), requires_grad=True)
    optimizer = ft.AdamW(1e-6).start(parameters)
    loss = sum((p * p).sum() for p in parameters.values())
    loss.backward()
    return lambda: optimizer.step(clip=1.0)


def fit_tinyft(c: Case) -> Run:
    import tinyft as ft

    model = ft.GPT(ft.GPTConfig(vocab=65, positions=32, width=32, layers=2, heads=2))
    tokens = np.random.default_rng(0).integers(0, 65, 4096)
    batches = ft.data.lm_batches(tokens, T=32, batch_size=4)
    return lambda: ft.fit(model, batches, 10, ft.AdamW(1e-4), progress=False)


def generate_tinyft(c: Case) -> Run:
    import tinyft as ft

    model = ft.GPT(ft.GPTConfig(vocab=5000, positions=256, width=256, layers=6, heads=8))
    ids = np.arange(16)[None]
    return lambda: ft.generate(model, ids, TOKENS)


def generate_torch(c: Case) -> Run:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(5000, 256, 256, 6, 8, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    ).eval()
    ids = torch.arange(16)[None]
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def save_checkpoint() -> Path:
    """A checkpoint of 100 MB in a new folder. The folder stays until the system empties its temporary folder."""
    import tinyft as ft

    folder = Path(tempfile.mkdtemp(prefix="tinyft-bench-"))
    ft.save(ft.GPT(ft.GPTConfig(vocab=12000, positions=256, width=512, layers=6, heads=8)), folder)
    return folder


def load_tinyft(c: Case) -> Run:
    import tinyft as ft

    folder = save_checkpoint()

    def run() -> object:
        model, _ = ft.load(folder)
        return model.parameters()[0].data.sum()

    return run


def load_torch(c: Case) -> Run:
    from transformers import GPT2LMHeadModel

    folder = save_checkpoint()
    return lambda: GPT2LMHeadModel.from_pretrained(folder).transformer.wte.weight.sum().item()


def import_tinyft(c: Case) -> Run:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", f"import {c.model}"]
    subprocess.run(command, check=True, env=environment)  # writes the bytecode
    return lambda: subprocess.run(command, check=True, env=environment)


import_torch = import_tinyft

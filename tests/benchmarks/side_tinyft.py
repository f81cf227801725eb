"""tinyft's side: the step that `fit` runs, without its bookkeeping."""
from __future__ import annotations

from collections.abc import Callable

from cases import ALPHA, BOTTLENECK, CLASSES, PREFIX, RANK, Case, batch

import tinyft as ft
from tinyft import kernels
from tinyft.train.batch import compute_loss, read_batch

METHODS = {"lora_qv": lambda: ft.LoRA(r=RANK, alpha=ALPHA, targets="attn.[qv]"), "bitfit": ft.BitFit,
           "lora_all": lambda: ft.LoRA(r=RANK, alpha=ALPHA, targets=("attn.[qkvo]", "mlp.up", "mlp.down")),
           "houlsby": lambda: ft.Houlsby(m=BOTTLENECK), "prefix": lambda: ft.PrefixTuning(p=PREFIX),
           "head": lambda: ft.Partial(k=0)}


def build(c: Case) -> ft.Module:
    kernels.keep_memory()
    if c.model == "gpt":
        model = ft.GPT(ft.GPTConfig(c.V, c.T + PREFIX, c.C, c.L, c.H))
    else:
        model = ft.BERT(ft.BERTConfig(c.V, c.T + PREFIX, 2, c.C, c.L, c.H))
    if c.method == "head":
        ft.classifier(model, classes=CLASSES)
    if c.method in METHODS:
        ft.attach(model, METHODS[c.method]())
    return model.train()


def start(model: ft.Module, c: Case) -> tuple[Callable[[], float], int]:
    "(a training step that returns its loss, how many numbers train)"
    optimizer, asked = ft.AdamW(1e-3).start(ft.trained(model)), read_batch(batch(c))

    def step() -> float:
        _, loss = compute_loss(model, asked)
        loss.backward()
        optimizer.step()
        (optimizer if hasattr(optimizer, "zero_grad") else model).zero_grad()
        return loss.item()
    return step, sum(p.size for p in ft.trained(model).values())

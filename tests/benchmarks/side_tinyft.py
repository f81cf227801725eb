"""tinyft's side: the step that `fit` runs, without its bookkeeping."""

from __future__ import annotations

from collections.abc import Callable

from cases import ALPHA, BOTTLENECK, CLASSES, PREFIX, RANK, Case, batch
from compat import loss_function

import tinyft as ft
from tinyft import kernels

ALL_LINEAR = ("attn.[qkvo]", "mlp.up", "mlp.down")
METHODS = {
    "lora_qv": lambda: ft.LoRA(r=RANK, alpha=ALPHA, targets="attn.[qv]"),
    "lora_all": lambda: ft.LoRA(r=RANK, alpha=ALPHA, targets=ALL_LINEAR),
    "bitfit": ft.BitFit,
    "houlsby": lambda: ft.Houlsby(m=BOTTLENECK),
    "prefix": lambda: ft.PrefixTuning(p=PREFIX),
    "head": lambda: ft.Partial(k=0),
}


def build(c: Case) -> ft.Module:
    """The model of a case, with its method attached, in training mode."""
    kernels.keep_memory()
    sizes = {"vocab": c.V, "positions": c.T + PREFIX, "width": c.C, "layers": c.L, "heads": c.H}
    model = ft.GPT(ft.GPTConfig(**sizes)) if c.model == "gpt" else ft.BERT(ft.BERTConfig(**sizes))
    if c.method == "head":
        ft.classifier(model, classes=CLASSES)
    if c.method in METHODS:
        ft.attach(model, METHODS[c.method]())
    return model.train()


def start(model: ft.Module, c: Case) -> tuple[Callable[[], float], int]:
    """A training step that returns its loss, and the number of trainable parameters."""
    trained = ft.trained(model)
    optimizer = ft.AdamW(1e-3).start(trained)
    compute_loss = loss_function(batch(c))

    def step() -> float:
        loss = compute_loss(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, sum(p.size for p in trained.values())

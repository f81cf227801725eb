"""The sides of a training step on a device: tinyft, tinyft captured, PyTorch, PyTorch compiled.

A side is a function that takes one step and returns the loss. A step is: forward, backward, AdamW, clearing of
gradients. The batch is on the device, and the loss stays there.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import cupy as cp
import side_tinyft
from cases import Case, batch
from gpu_clock import Clock, Missing, fresh

import tinyft as ft
from tinyft import ops

PRECISIONS = ("fp32", "tf32", "bf16")
Step = Callable[[], Any]


@contextlib.contextmanager
def precision(how: str) -> Iterator[None]:
    """Products of float32 on tensor cores or not, on both sides.  bf16 is for `mixed` and torch.autocast."""
    fast = how != "fp32"
    torch = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
    ft.set_float32_matmul_precision("high" if fast else "highest")
    if torch:
        torch.set_float32_matmul_precision("high" if fast else "highest")
    try:
        yield
    finally:
        ft.set_float32_matmul_precision("highest")
        if torch:
            torch.set_float32_matmul_precision("highest")


# ---------------------------------------------------------------------------------------------------- tinyft
def mixed(how: str) -> contextlib.AbstractContextManager:
    """The autocast around the forward pass."""
    return ft.autocast("bfloat16", enabled=how == "bf16")


def tinyft_step(case: Case, how: str, capture: bool = False) -> Step:
    """tinyft's step.  capture: captured as one CUDA graph at its third call, then replayed."""
    model = side_tinyft.build(case)
    b = {name: cp.asarray(array) for name, array in batch(case).items()}
    optimizer = ft.AdamW(1e-3).start(ft.trained(model))

    def step(ids: Any, labels: Any) -> Any:
        with mixed(how):
            loss = ops.cross_entropy(model(ids), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    run = ft.capture(step) if capture else step
    return lambda: run(b["ids"], b["labels"])


def tinyft_captured(case: Case, how: str) -> Step:
    """tinyft's captured step."""
    if not hasattr(ft, "capture"):
        raise Missing("tinyft has no captured step (tinyft.capture)")
    return tinyft_step(case, how, capture=True)


# ---------------------------------------------------------------------------------------------------- PyTorch
def torch_there(c: Clock) -> tuple[Any, str]:
    """(torch, its device). Missing without torch, or without a GPU except in a smoke run."""
    try:
        import torch
    except ImportError:
        raise Missing("PyTorch is not installed") from None
    if not torch.cuda.is_available() and not c.smoke:
        raise Missing("this PyTorch sees no GPU")
    return torch, "cpu" if c.smoke else "cuda"


def torch_step(c: Clock, case: Case, how: str, compiler: Callable | None = None) -> Step:
    """PyTorch's step; `compiler` is applied to the model."""
    torch, where = torch_there(c)
    if case.method.startswith("lora"):
        try:
            import peft  # noqa: F401
        except ImportError:
            raise Missing("PEFT is not installed") from None
    import side_torch
    model = side_torch.build(case).to(where)
    b = {k: torch.from_numpy(v).to(where) for k, v in batch(case).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    forward = compiler(model) if compiler else model
    labels = b["labels"].flatten()

    def step() -> Any:
        optimizer.zero_grad()
        with torch.autocast(where, torch.bfloat16, enabled=how == "bf16"):
            loss = torch.nn.functional.cross_entropy(forward(b["ids"], None, None).flatten(0, -2), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def compiled(c: Clock, case: Case, how: str) -> Step:
    """PyTorch's step with torch.compile."""
    torch, _ = torch_there(c)
    backend = "eager" if c.smoke else "inductor"
    return torch_step(c, case, how, lambda model: torch.compile(model, backend=backend))


def torch_peak(c: Clock, case: Case, how: str) -> tuple[int, int]:
    """(most bytes in use during three steps, bytes that PyTorch's pool held for them)."""
    torch, where = torch_there(c)
    if where == "cpu":
        raise Missing("PyTorch on the CPU does not count its memory")
    fresh()
    torch.cuda.reset_peak_memory_stats()
    step = torch_step(c, case, how)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


# ---------------------------------------------------------------------------------------------------- the floor
def flops(k: Case) -> float:
    """Multiplications and additions of a full step's products, three times those of the forward pass.

    Forward, with N = B T: 2 N·12 C² per layer, 4 N·T·C for attention as full squares, 2 N·C·V for the head.
    """
    n = k.B * k.T
    layer = 2 * n * 12 * k.C**2 + 4 * n * k.T * k.C
    head = 2 * n * k.C * k.V
    return 3.0 * (k.L * layer + head)


def numbers(k: Case) -> int:
    """Parameters of a case's GPT."""
    return k.V * k.C + k.T * k.C + k.L * (12 * k.C**2 + 13 * k.C) + 2 * k.C


def least_bytes(k: Case, how: str) -> float:
    """Bytes that a full step must move if every product and elementwise op is one pass, and attention keeps no scores.

    A parameter: read forward and backward, its gradient written, and 28 bytes for AdamW (float32). An activation (16 C
    per token and layer, and the logits): written and read forward, read backward, its gradient written and read.
    """
    size = 2 if how == "bf16" else 4
    activations = k.B * k.T * (16 * k.C * k.L + k.V)
    return numbers(k) * (3 * size + 28) + 5.0 * size * activations

"""Models, batches and quantities that several claims use."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tinyft as ft

SMOLLM2 = Path(__file__).parents[3] / "work" / "real" / "SmolLM2-135M-Instruct.Q4_1.gguf"
BASES = ("base-gpt-small", "base-gpt", "base-gpt-large")  # the shipped GPTs, by size


def load(name: str, *, packed: bool = False) -> tuple[ft.Module, Any]:
    """(model, tokenizer) of a shipped base, or of "SmolLM2-135M", whose weights are dense float32 unless `packed`."""
    if name == "SmolLM2-135M":
        return ft.load(SMOLLM2, packed=packed)
    return ft.load(name)


def has_smollm2() -> bool:
    """True if SmolLM2 was fetched by `make real-assets`."""
    return SMOLLM2.exists()


def token_batch(vocab: int, B: int, T: int, seed: int) -> dict[str, np.ndarray]:
    """One batch of B rows of T random token ids, for measurements in which the text does not matter."""
    return {"ids": np.random.default_rng(seed).integers(0, vocab, (B, T))}


def weight_bytes(model: ft.Module) -> int:
    """The bytes of all parameters, a tied one once, and of all buffers."""
    parameters = sum(p.data.nbytes for p in model.parameters())
    return parameters + sum(getattr(value, "nbytes", 0) for value in model.named_buffers().values())


def spread(values: Sequence[float]) -> dict[str, float]:
    """{median, low, high} of repeated measurements; low and high are the least and the largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}

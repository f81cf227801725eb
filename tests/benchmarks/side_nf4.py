"""NF4 of one weight (4096, C), with double quantization.

case.method: encode | decode;  case.model: tinyft | bitsandbytes, which on the CPU encodes with PyTorch, and decodes
with a kernel in C++.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from cases import Case

OUT = 4096
Run = Callable[[], object]


def weight_bytes(c: Case) -> int:
    """The bytes of the weight in float32, by which speeds are measured."""
    return OUT * c.C * 4


def build(c: Case) -> Run:
    """The function to measure."""
    W = np.random.default_rng(0).standard_normal((OUT, c.C), np.float32) * np.float32(0.02)
    return (of_tinyft if c.model == "tinyft" else of_bitsandbytes)(c.method, W)


def of_tinyft(job: str, W: np.ndarray) -> Run:
    import tinyft as ft

    rule = ft.NF4()
    packed = rule(W)
    return packed.dequantize if job == "decode" else lambda: rule(W)


def of_bitsandbytes(job: str, W: np.ndarray) -> Run:
    import torch
    from bitsandbytes import functional

    dense = torch.from_numpy(W)
    options = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": True}
    stored, state = functional.quantize_4bit(dense, **options)
    if job == "decode":
        return lambda: functional.dequantize_4bit(stored, state)
    return lambda: functional.quantize_4bit(dense, **options)


def start(run: Run, c: Case) -> tuple[Callable[[], float], int]:
    """The same as a step; its loss is 0."""

    def step() -> float:
        run()
        return 0.0

    return step, 0

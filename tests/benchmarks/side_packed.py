"""Products y = x Wᵀ with one weight W (C, C), for B rows x.  case.method names the form of W, one of FORMS.

    float32   the dense weight: the product of BLAS that all others are compared with
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from cases import Case

import tinyft as ft
from tinyft.compress import FORMATS


def quantize(name: str, W: np.ndarray) -> Any:
    """W packed in the form of this name."""
    rules = {
        "RTN 4, g=64": ft.RTN(4, 64),
        "RTN 4, g=128": ft.RTN(4, 128),
        "RTN 3, g=128": ft.RTN(3, 128),
        "RTN 2, g=64": ft.RTN(2, 64),
        "RTN 8": ft.RTN(8, None),
        "NF4": ft.NF4(),
    }
    return FORMATS[name].quantize(W) if name in FORMATS else rules[name](W)


FORMS = ("RTN 4, g=64", "RTN 4, g=128", "RTN 3, g=128", "RTN 2, g=64", "RTN 8", "NF4", *FORMATS)


def weight_bytes(name: str, C: int) -> int:
    """The bytes of W in this form, all of which a product reads."""
    W = np.random.default_rng(0).standard_normal((C, C), np.float32)
    return W.nbytes if name == "float32" else quantize(name, W).nbytes


def build(c: Case) -> Callable[[], object]:
    """The product."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal((c.C, c.C), np.float32)
    x = rng.standard_normal((c.B, c.C), np.float32)
    if c.method == "float32":
        return lambda: x @ W.T
    packed = quantize(c.method, W)
    X = ft.Tensor(x)
    return lambda: packed.matmul(X)


def threads(n: int) -> None:
    """The library and BLAS take their number of threads from the environment."""
    ft.set_num_threads(n)
    ft.kernels.keep_memory()


def start(run: Callable[[], object], c: Case) -> tuple[Callable[[], float], int]:
    """A product as a step; its loss is 0."""

    def step() -> float:
        run()
        return 0.0

    return step, 0

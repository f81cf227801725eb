"""The matrix products of side_floor.py by PyTorch: the same shapes in the same order, into the same memory."""

from __future__ import annotations

from collections.abc import Callable

import side_floor
import torch
from cases import Case
from torch import Tensor

Products = list[tuple[Tensor, Tensor, Tensor]]


def build(c: Case) -> Products:
    """(a, b, memory for a @ b), in the order of a step; attention's products are (B·H, ., .)."""
    products: Products = []
    for arrays in side_floor.build(c):
        a, b, out = (torch.from_numpy(array) for array in arrays)
        if out.ndim == 4:
            a, b, out = (x.view(-1, *x.shape[-2:]) for x in (a, b, out))
        products.append((a, b, out))
    return products


def start(products: Products, c: Case) -> tuple[Callable[[], float], int]:
    """All products as a step; its loss is 0."""

    def step() -> float:
        for a, b, out in products:
            if out.ndim == 2:
                torch.mm(a, b, out=out)
            else:
                torch.bmm(a, b, out=out)
        return 0.0

    return step, 0


def threads(n: int) -> None:
    """Let PyTorch use n threads."""
    torch.set_num_threads(n)

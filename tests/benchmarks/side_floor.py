"""The floor: only the matrix products that a full step needs, by NumPy, repeated into the same memory.

Attention's products are counted as full squares, as one product of the whole computes them; `triangle` in the results
has the lower half alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from cases import Case, batch

Products = list[tuple[np.ndarray, np.ndarray, np.ndarray]]


def build(c: Case) -> Products:
    """(a, b, memory for a @ b), in the order of a step."""
    rng = np.random.default_rng(0)
    N = c.B * c.T
    D = c.C // c.H
    products: Products = []

    def make(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    def product(a: np.ndarray, b: np.ndarray) -> None:
        products.append((a, b, np.empty((*a.shape[:-1], b.shape[-1]), np.float32)))

    def linear(rows: int, in_features: int, out_features: int) -> None:
        X = make(rows, in_features)
        W = make(out_features, in_features)
        G = make(rows, out_features)
        product(X, W.T)
        product(G, W)
        product(G.T, X)

    for _ in range(c.L):
        linear(N, c.C, 3 * c.C)
        linear(N, c.C, c.C)
        linear(N, c.C, 4 * c.C)
        linear(N, 4 * c.C, c.C)
        q = make(c.B, c.H, c.T, D)
        p = make(c.B, c.H, c.T, c.T)
        for _ in range(2):
            product(q, q.swapaxes(-1, -2))
            product(p, q)
            product(p.swapaxes(-1, -2), q)
    if c.model == "gpt":
        linear(N, c.C, c.V)
    else:
        labelled = int((batch(c)["labels"] != -100).sum())
        linear(labelled, c.C, c.C)
        linear(labelled, c.C, c.V)
    return products


def operations(c: Case) -> int:
    """Floating-point operations of all products: 2 m k n for (m, k) by (k, n)."""
    N = c.B * c.T
    linear_maps = c.L * 12 * c.C**2 * N  # rows times parameters
    if c.model == "gpt":
        linear_maps += c.C * c.V * N
    else:
        labelled = int((batch(c)["labels"] != -100).sum())
        linear_maps += (c.C**2 + c.C * c.V) * labelled
    attention = c.L * N * c.T * c.C  # one product of all heads
    return 3 * 2 * linear_maps + 6 * 2 * attention


def start(products: Products, c: Case) -> tuple[Callable[[], float], int]:
    """All products as a step; its loss is 0."""

    def step() -> float:
        for a, b, out in products:
            np.matmul(a, b, out=out)
        return 0.0

    return step, 0

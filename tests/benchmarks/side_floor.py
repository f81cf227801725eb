"""The floor: only the matrix products that a full step cannot avoid, done by NumPy, over and over into the same memory.

Attention's are counted as full squares, as a product of the whole makes them; see `triangle` in the results for the lower half alone."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from cases import Case, batch


def build(c: Case) -> list[tuple[np.ndarray, ...]]:
    "(a, b, room for a @ b), in the order of a step."
    rng, N, D, products = np.random.default_rng(0), c.B * c.T, c.C // c.H, []
    make = lambda *shape: rng.standard_normal(shape, dtype=np.float32)

    def product(a: np.ndarray, b: np.ndarray) -> None:
        products.append((a, b, np.empty((*a.shape[:-1], b.shape[-1]), np.float32)))

    def linear(rows: int, in_features: int, out_features: int) -> None:
        X, W, G = make(rows, in_features), make(out_features, in_features), make(rows, out_features)
        product(X, W.T), product(G, W), product(G.T, X)
    for _ in range(c.L):
        linear(N, c.C, 3 * c.C), linear(N, c.C, c.C), linear(N, c.C, 4 * c.C), linear(N, 4 * c.C, c.C)
        q, p = make(c.B, c.H, c.T, D), make(c.B, c.H, c.T, c.T)
        for _ in range(2):
            product(q, q.swapaxes(-1, -2)), product(p, q), product(p.swapaxes(-1, -2), q)
    if c.model == "gpt":
        linear(N, c.C, c.V)
    else:
        asked = int((batch(c)["labels"] != -100).sum())
        linear(asked, c.C, c.C), linear(asked, c.C, c.V)
    return products


def start(products: list, c: Case) -> tuple[Callable[[], float], int]:
    def step() -> float:
        for a, b, out in products:
            np.matmul(a, b, out=out)
        return 0.0
    return step, 0

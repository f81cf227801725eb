"""The compiled kernel of AdamW's update: one pass over parameters, gradient and moments."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from .compiler import Vector, calls, compiled, float32, int64
from .shared import is_plain, run

__all__ = ["adam_update"]


@partial(compiled, fastmath=set())  # rounded as the definition is, operation by operation
def adam(
    first: int64, last: int64, W: Vector, G: Vector, M: Vector, V: Vector, b1: float32, b2: float32, rest1: float32,
    rest2: float32, keep: float32, step_size: float32, root_factor: float32, eps: float32,
) -> None:
    """m ← β₁ m + (1 − β₁) g;  v ← β₂ v + (1 − β₂) g²;  θ ← keep θ − step_size m / (root_factor √v + ε)

    rest = 1 − β,  keep = 1 − lr decay,  step_size = lr / (1 − β₁ᵗ),  root_factor = 1 / √(1 − β₂ᵗ)
    """
    W, G, M, V = W[first:last], G[first:last], M[first:last], V[first:last]
    for i in range(len(W)):
        g = G[i]
        m = b1 * M[i] + rest1 * g
        v = b2 * V[i] + rest2 * (g * g)
        M[i] = m
        V[i] = v
        W[i] = keep * W[i] - step_size * (m / (root_factor * math.sqrt(v) + eps))


@calls(adam)
def adam_update(
    w: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, lr: float, b1: float, b2: float, eps: float,
    decay: float, t: int,
) -> Any:
    """AdamW's update in place; its definition is optim.adam_update"""
    if not is_plain(w, g, m, v):
        return NotImplemented
    bias1, bias2 = 1 - b1**t, 1 - b2**t
    factors = (b1, b2, 1 - b1, 1 - b2, 1 - lr * decay, lr / bias1, bias2**-0.5, eps)
    vectors = (a.reshape(-1) for a in (w, g, m, v))
    run(adam, w.size, 1, *vectors, *map(np.float32, factors))
    return None

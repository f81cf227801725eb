"""Layer norm in plain loops of Python, one number at a time: exercises of lesson 23, and what the lesson times.

The compiled kernels in kernels/compiled/norms.py compute the same. These functions need no Numba; numba.njit compiles
them as they are.
"""
from __future__ import annotations

import math

import numpy as np

__all__ = ["layer_norm_rows", "layer_norm_rows_backward"]


def layer_norm_rows(
    x: np.ndarray, w: np.ndarray, b: np.ndarray, eps: float = 1e-5,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y = x̂ w + b,  x̂ = (x − mean) / σ,  σ² = mean of (x − mean)² + ε,  for each row, in plain loops.

    x (N, n), w and b (n,). Returns (y, means, inverses): y (N, n), the mean of each row (N,) and 1/σ of each row (N,),
    all in the dtype of x.

    A row of equal numbers gives y = b exactly. Only single numbers such as x[i, j] are computed with: no row and no
    array as a whole. Then a compiler can translate the loops.
    """
    rows, n = x.shape
    y = np.empty_like(x)
    means = np.empty(rows, x.dtype)
    inverses = np.empty(rows, x.dtype)
    for i in range(rows):
        first = x[i, 0]
        total = 0.0
        for j in range(n):
            total += x[i, j] - first
        mean = first + total / n
        squares = 0.0
        for j in range(n):
            centred = x[i, j] - mean
            squares += centred * centred
        inverse = 1 / math.sqrt(squares / n + eps)
        for j in range(n):
            y[i, j] = (x[i, j] - mean) * inverse * w[j] + b[j]
        means[i] = mean
        inverses[i] = inverse
    return y, means, inverses


def layer_norm_rows_backward(
    g: np.ndarray, x: np.ndarray, w: np.ndarray, means: np.ndarray, inverses: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dx = (e − mean(e) − x̂ mean(e x̂)) / σ,  e = g w;    dw = Σ g x̂,  db = Σ g over the rows.    In plain loops.

    g (N, n): the gradient of y. x (N, n) and w (n,): as in layer_norm_rows. means, inverses (N,): its second and third
    result, the mean and 1/σ of each row; they give x̂ again. Returns (dx, dw, db): (N, n), (n,) and (n,), in the dtype
    of x.

    The two means are along a row. Only single numbers such as x[i, j] are computed with.
    """
    rows, n = x.shape
    dx = np.empty_like(x)
    dw = np.zeros(n, x.dtype)
    db = np.zeros(n, x.dtype)
    for i in range(rows):
        sum_e = 0.0
        sum_ex = 0.0
        for j in range(n):
            normal = (x[i, j] - means[i]) * inverses[i]  # x̂
            e = g[i, j] * w[j]
            sum_e += e
            sum_ex += e * normal
            dw[j] += g[i, j] * normal
            db[j] += g[i, j]
        for j in range(n):
            normal = (x[i, j] - means[i]) * inverses[i]
            dx[i, j] = (g[i, j] * w[j] - sum_e / n - normal * sum_ex / n) * inverses[i]
    return dx, dw, db

"""Compiled kernels of layer norm and RMS norm. A row is read several times while it is in the cache."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ... import operands
from ..numpy import FLAT
from .compiler import Matrix, Vector, boolean, calls, compiled_sum, float32, inlined, inlined_sum, int64
from .shared import ONE, ZERO, is_plain, row_parts, run, run_parts

__all__ = ["layer_norm", "rms_norm"]


# ---------------------------------------------------------------------------------------------------- layer norm
@inlined
def centred(x: float32, origin: float32, mean: float32) -> float32:
    """x − origin − mean, in this order: x − origin is exact for numbers that are near each other.

    `inlined` keeps the order; `inlined_sum` would not.
    """
    return (x - origin) - mean


@inlined_sum
def mean_of(x: Vector, origin: float32) -> float32:
    """Σ (x − origin) / n"""
    total = ZERO
    for j in range(len(x)):
        total += centred(x[j], origin, ZERO)
    return total / float32(len(x))


@inlined_sum
def variance_of(x: Vector, origin: float32, mean: float32) -> float32:
    """Σ (x − origin − mean)² / n"""
    total = ZERO
    for j in range(len(x)):
        difference = centred(x[j], origin, mean)
        total += difference * difference
    return total / float32(len(x))


@compiled_sum
def layer_norm_forward(
    first: int64, last: int64, X: Matrix, w: Vector, b: Vector, eps: float32, Y: Matrix, origins: Vector, means: Vector,
    inverses: Vector,
) -> None:
    """y = x̂ w + b,  x̂ = (x − origin − mean) / σ,  σ² = variance + ε.    Keeps origin, mean and 1/σ of each row.

    The origin is 0, unless the mean is large beside σ: then the rounding error of the mean is also large. In such a row
    the origin is the first entry, as in the definition, and the mean is that of x − origin. A row of equal numbers
    gives x̂ = 0.
    """
    for i in range(first, last):
        x, y = X[i], Y[i]
        origin = ZERO
        mean = mean_of(x, origin)
        variance = variance_of(x, origin, mean)
        if variance <= (FLAT * mean) * (FLAT * mean):
            origin = x[0]
            mean = mean_of(x, origin)
            variance = variance_of(x, origin, mean)
        inverse = ONE / math.sqrt(variance + eps)
        origins[i], means[i], inverses[i] = origin, mean, inverse
        for j in range(len(x)):
            y[j] = centred(x[j], origin, mean) * inverse * w[j] + b[j]


@compiled_sum
def layer_norm_backward(
    part: int64, first: int64, last: int64, X: Matrix, w: Vector, origins: Vector, means: Vector, inverses: Vector,
    G: Matrix, DX: Matrix, DW: Matrix, DB: Matrix, wants_sums: boolean,
) -> None:
    """dx = (e − mean(e) − x̂ mean(e x̂)) / σ  with e = g w;    dw = Σ g x̂,  db = Σ g over these rows, in row `part`

    wants_sums: True if dw or db is wanted.
    """
    dw, db = DW[part], DB[part]
    for j in range(len(w)):
        dw[j] = ZERO
        db[j] = ZERO
    for i in range(first, last):
        x, g, d, origin, mean, inverse = X[i], G[i], DX[i], origins[i], means[i], inverses[i]
        sum_e = ZERO
        sum_ex = ZERO
        for j in range(len(x)):
            e = g[j] * w[j]
            sum_e += e
            sum_ex += e * (centred(x[j], origin, mean) * inverse)
        mean_e = sum_e / float32(len(x))
        mean_ex = sum_ex / float32(len(x))
        for j in range(len(x)):
            normal = centred(x[j], origin, mean) * inverse  # x̂
            d[j] = (g[j] * w[j] - mean_e - normal * mean_ex) * inverse
        if wants_sums:
            for j in range(len(x)):
                dw[j] += g[j] * (centred(x[j], origin, mean) * inverse)
                db[j] += g[j]


@calls(layer_norm_forward, layer_norm_backward)
def layer_norm(x: np.ndarray, w: np.ndarray, b: np.ndarray, eps: float = 1e-5) -> Any:
    """(y, pullback) of ops.layer_norm"""
    if not is_plain(x, w, b):
        return NotImplemented
    operands.check_norm(x, eps, w, b)
    n = x.shape[-1]
    X, y = x.reshape(-1, n), np.empty_like(x)
    rows = np.empty((3, len(X)), np.float32)  # origin, mean and 1/σ
    run(layer_norm_forward, len(X), n, X, w, b, np.float32(eps), y.reshape(-1, n), *rows)

    def back(g: np.ndarray, needed: list[bool]) -> tuple:
        d = np.empty_like(x)
        parts = row_parts(len(X), n)
        DW, DB = np.empty((len(parts), n), np.float32), np.empty((len(parts), n), np.float32)
        G = np.require(g, requirements="CAW").reshape(-1, n)
        wants_sums = needed[1] or needed[2]
        run_parts(layer_norm_backward, parts, X, w, *rows, G, d.reshape(-1, n), DW, DB, wants_sums)
        return d, DW.sum(axis=0), DB.sum(axis=0)

    return y, back


# ---------------------------------------------------------------------------------------------------- RMS norm
@compiled_sum
def rms_norm_forward(
    first: int64, last: int64, X: Matrix, w: Vector, eps: float32, Y: Matrix, inverses: Vector,
) -> None:
    """y = w x / σ,  σ² = mean(x²) + ε.    Keeps 1/σ of each row."""
    for i in range(first, last):
        x, y = X[i], Y[i]
        inverse = ONE / math.sqrt(variance_of(x, ZERO, ZERO) + eps)
        inverses[i] = inverse
        for j in range(len(x)):
            y[j] = x[j] * inverse * w[j]


@compiled_sum
def rms_norm_backward(
    part: int64, first: int64, last: int64, X: Matrix, w: Vector, inverses: Vector, G: Matrix, DX: Matrix, DW: Matrix,
    wants_sums: boolean,
) -> None:
    """dx = (e − x̂ mean(e x̂)) / σ  with e = g w and x̂ = x / σ;    dw = Σ g x̂ over these rows, in row `part`

    wants_sums: True if dw is wanted.
    """
    dw = DW[part]
    for j in range(len(w)):
        dw[j] = ZERO
    for i in range(first, last):
        x, g, d, inverse = X[i], G[i], DX[i], inverses[i]
        sum_ex = ZERO
        for j in range(len(x)):
            sum_ex += g[j] * w[j] * (x[j] * inverse)
        mean_ex = sum_ex / float32(len(x))
        for j in range(len(x)):
            normal = x[j] * inverse  # x̂
            d[j] = (g[j] * w[j] - normal * mean_ex) * inverse
        if wants_sums:
            for j in range(len(x)):
                dw[j] += g[j] * (x[j] * inverse)


@calls(rms_norm_forward, rms_norm_backward)
def rms_norm(x: np.ndarray, w: np.ndarray, eps: float = 1e-6) -> Any:
    """(y, pullback) of ops.rms_norm"""
    if not is_plain(x, w):
        return NotImplemented
    operands.check_norm(x, eps, w)
    n = x.shape[-1]
    X, y = x.reshape(-1, n), np.empty_like(x)
    inverses = np.empty(len(X), np.float32)
    run(rms_norm_forward, len(X), n, X, w, np.float32(eps), y.reshape(-1, n), inverses)

    def back(g: np.ndarray, needed: list[bool]) -> tuple:
        d = np.empty_like(x)
        parts = row_parts(len(X), n)
        DW = np.empty((len(parts), n), np.float32)
        G = np.require(g, requirements="CAW").reshape(-1, n)
        run_parts(rms_norm_backward, parts, X, w, inverses, G, d.reshape(-1, n), DW, needed[1])
        return d, DW.sum(axis=0)

    return y, back

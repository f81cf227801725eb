"""Compiled kernels that compute each entry by itself: GELU, SwiGLU and dropout."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types

from ... import checks, operands
from ...array import random_words
from ..numpy import normal_form
from .compiler import Vector, calls, compiled, float32, inlined, int64
from .shared import HALF, ONE, ZERO, exp, is_plain, run

__all__ = ["dropout", "gelu", "gelu_tanh", "swiglu"]


def entrywise(kernel: Any, *arrays: np.ndarray) -> None:
    """A call of kernel(first, last, *arrays as vectors) for parts of the entries, on the threads."""
    run(kernel, arrays[0].size, 1, *(a.reshape(-1) for a in arrays))


# ---------------------------------------------------------------------------------------------------- GELU of GPT-2
# x (1 + tanh(u))/2 = x / (1 + e^(−2u)),  2u = x (A1 + A3 x²)
A1 = np.float32(2 * (2 / math.pi) ** 0.5)
A3 = np.float32(2 * 0.044715 * (2 / math.pi) ** 0.5)
THREE_A3 = np.float32(3) * A3
FAR = np.float32(100)  # |x| is limited to 100: p is 0 or 1 beyond, and x² cannot overflow


@inlined
def limited(x: float32) -> float32:
    """x, limited to −100 ... 100"""
    return min(max(x, -FAR), FAR)


@compiled
def gelu_tanh_forward(first: int64, last: int64, X: Vector, Y: Vector) -> None:
    """y = x p,  p = 1 / (1 + e^(−x (A1 + A3 x²)))"""
    X, Y = X[first:last], Y[first:last]
    for i in range(len(X)):
        x = limited(X[i])
        Y[i] = X[i] * (ONE / (ONE + exp(-x * (A1 + A3 * (x * x)))))


@compiled
def gelu_tanh_backward(first: int64, last: int64, X: Vector, G: Vector, D: Vector) -> None:
    """dx = g p (1 + x (1 − p) (A1 + 3 A3 x²))"""
    X, G, D = X[first:last], G[first:last], D[first:last]
    for i in range(len(X)):
        x = limited(X[i])
        square = x * x
        p = ONE / (ONE + exp(-x * (A1 + A3 * square)))
        D[i] = G[i] * p * (ONE + x * (ONE - p) * (A1 + THREE_A3 * square))


@calls(gelu_tanh_forward, gelu_tanh_backward)
def gelu_tanh(x: np.ndarray) -> Any:
    """(y, pullbacks) of ops.gelu_tanh"""
    return activation(x, gelu_tanh_forward, gelu_tanh_backward)


def activation(x: np.ndarray, forward: Any, backward: Any) -> Any:
    """(y, pullbacks) of an activation, from its two kernels; NotImplemented for an array that they do not take."""
    if not is_plain(x):
        return NotImplemented
    y = np.empty_like(x)
    entrywise(forward, x, y)

    def back(g: np.ndarray) -> np.ndarray:
        d = np.empty_like(x)
        entrywise(backward, x, np.require(g, requirements="CAW"), d)
        return d

    return y, (back,)


# ---------------------------------------------------------------------------------------------------- GELU of BERT
R0, R1, R2, R3, R4, R5, R6, R7, R8 = map(np.float32, normal_form())
DENSITY = np.float32((2 / math.pi) ** 0.5)  # |x| φ(x) = DENSITY w e^(−2 w²),  w = |x|/2


@inlined
def erf_from_half(w: float32) -> float32:
    """erf(√2 w) ≈ 1 − R(w)⁻⁸ for w = |x|/2 >= 0; see normal_form in kernels/numpy.py"""
    r = (((((((R8 * w + R7) * w + R6) * w + R5) * w + R4) * w + R3) * w + R2) * w + R1) * w + R0
    r = r * r
    r = r * r
    return ONE - ONE / (r * r)


@compiled
def gelu_forward(first: int64, last: int64, X: Vector, Y: Vector) -> None:
    """y = x Φ(x) = x/2 + |x|/2 erf(|x|/√2)"""
    X, Y = X[first:last], Y[first:last]
    for i in range(len(X)):
        half = HALF * X[i]
        w = abs(half)
        Y[i] = half + w * erf_from_half(w)


@compiled
def gelu_backward(first: int64, last: int64, X: Vector, G: Vector, D: Vector) -> None:
    """dx = g (Φ + x φ) = g (1/2 + sign(x) (erf(|x|/√2)/2 + |x| φ(x)))"""
    X, G, D = X[first:last], G[first:last], D[first:last]
    for i in range(len(X)):
        w = abs(HALF * X[i])
        odd = HALF * erf_from_half(w) + DENSITY * w * exp(-(w + w) * w)
        D[i] = G[i] * (HALF + math.copysign(odd, X[i]))


@calls(gelu_forward, gelu_backward)
def gelu(x: np.ndarray) -> Any:
    """(y, pullbacks) of ops.gelu"""
    return activation(x, gelu_forward, gelu_backward)


# ---------------------------------------------------------------------------------------------------- SwiGLU
@compiled
def swiglu_forward(first: int64, last: int64, A: Vector, U: Vector, Y: Vector) -> None:
    """y = a σ(a) u,  σ(a) = 1 / (1 + e^−a)"""
    A, U, Y = A[first:last], U[first:last], Y[first:last]
    for i in range(len(A)):
        Y[i] = A[i] * (ONE / (ONE + exp(-A[i]))) * U[i]


@compiled
def swiglu_backward(first: int64, last: int64, A: Vector, U: Vector, G: Vector, DA: Vector, DU: Vector) -> None:
    """da = g u σ (1 + a (1 − σ)),  du = g a σ"""
    A, U, G, DA, DU = A[first:last], U[first:last], G[first:last], DA[first:last], DU[first:last]
    for i in range(len(A)):
        a = limited(A[i])
        s = ONE / (ONE + exp(-a))
        DU[i] = G[i] * A[i] * s
        DA[i] = G[i] * U[i] * s * (ONE + a * (ONE - s))


@calls(swiglu_forward, swiglu_backward)
def swiglu(gate: np.ndarray, up: np.ndarray) -> Any:
    """(y, pullback) of ops.swiglu"""
    if not is_plain(gate, up):
        return NotImplemented
    operands.check_same_shape(gate, up)
    y = np.empty_like(gate)
    entrywise(swiglu_forward, gate, up, y)

    def back(g: np.ndarray, needed: list[bool]) -> tuple:
        dgate, dup = np.empty_like(gate), np.empty_like(up)
        entrywise(swiglu_backward, gate, up, np.require(g, requirements="CAW"), dgate, dup)
        return dgate, dup

    return y, back


# ---------------------------------------------------------------------------------------------------- dropout
Words = types.uint32[::1]


@compiled
def dropout_forward(
    first: int64, last: int64, X: Vector, words: Words, least: types.uint32, scale: float32, Y: Vector, factors: Vector,
) -> None:
    """y = x f,  f = 1 / (1 − p) if the random word is at least `least`, else 0. `factors` and `words` share memory."""
    X, words, Y, factors = X[first:last], words[first:last], Y[first:last], factors[first:last]
    for i in range(len(X)):
        factor = scale if words[i] >= least else ZERO
        factors[i] = factor
        Y[i] = X[i] * factor


@compiled
def multiply(first: int64, last: int64, A: Vector, B: Vector, Y: Vector) -> None:
    """y = a b"""
    A, B, Y = A[first:last], B[first:last], Y[first:last]
    for i in range(len(A)):
        Y[i] = A[i] * B[i]


@calls(dropout_forward, multiply)
def dropout(x: np.ndarray, p: float, key: int) -> Any:
    """(y, pullbacks) of ops.dropout, from the same random words as in kernels/numpy.py"""
    p = checks.number("p", p, 0, below=1)
    key = checks.whole("key", key, 0)
    least = math.ceil(np.float32(p) * 2.0**24) << 8  # the smallest word whose upper 24 bits give u >= p
    if not is_plain(x) or least >= 2**32:
        return NotImplemented
    y = np.empty_like(x)
    words = random_words(x.size, key)
    factors = words.view(np.float32)
    scale = np.float32(1) / np.float32(1 - p)
    run(dropout_forward, x.size, 1, x.reshape(-1), words, np.uint32(least), scale, y.reshape(-1), factors)
    shape = x.shape  # `back` does not keep x

    def back(g: np.ndarray) -> np.ndarray:
        d = np.empty(shape, np.float32)
        entrywise(multiply, np.require(g, requirements="CAW"), factors, d)
        return d

    return y, (back, None, None)

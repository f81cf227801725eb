"""Reference mathematics that the laws of several lessons use, written as plainly as possible on NumPy arrays."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np


def probabilities(x: np.ndarray) -> np.ndarray:
    """The softmax along the last axis: eˣ / Σ eˣ, with the maximum of each row subtracted first."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def numerical_gradient(f: Callable[[np.ndarray], np.ndarray], x: np.ndarray, g: np.ndarray,
                       h: float = 1e-5) -> np.ndarray:
    """d Σ g f(x) / dx by central differences, one entry of x at a time.  The result has the shape of x."""
    gradient = np.zeros(x.shape)
    step = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        step[i] = h
        gradient[i] = (g * (f(x + step) - f(x - step))).sum() / (2 * h)
        step[i] = 0
    return gradient

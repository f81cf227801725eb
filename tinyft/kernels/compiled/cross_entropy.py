"""The compiled kernel of cross-entropy: two passes over each row of logits, and one more for the gradient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types

from ... import operands, ops
from .compiler import Matrix, Vector, calls, compiled, compiled_sum, float32, inlined, int64
from .shared import ZERO, exp, is_plain, largest, run

__all__ = ["cross_entropy"]

Labels = types.int64[::1]
IGNORED = -1


@inlined
def loss_of(top: float32, logit: float32, log_total: float32) -> float32:
    """(top − logit) + log_total, in this order: a small loss of large logits keeps its digits."""
    return (top - logit) + log_total


@compiled_sum
def losses_forward(first: int64, last: int64, Z: Matrix, labels: Labels, log_sums: Vector, losses: Vector) -> None:
    """loss = log Σ_j e^(z_j) − z_label,  log Σ_j e^(z_j) = log Σ_j e^(z_j − top) + top,  top = max z

    An ignored row has the loss 0; its entry of log_sums is not written.
    """
    for i in range(first, last):
        if labels[i] == IGNORED:
            losses[i] = ZERO
            continue
        z = Z[i]
        top = largest(z)
        total = ZERO
        for j in range(len(z)):
            total += exp(z[j] - top)
        log_total = math.log(total)
        log_sums[i] = top + log_total
        losses[i] = loss_of(top, z[labels[i]], log_total)


@compiled
def losses_backward(
    first: int64, last: int64, Z: Matrix, labels: Labels, log_sums: Vector, share: float32, D: Matrix,
) -> None:
    """dz = share (softmax(z) − one-hot(label)),  softmax(z)_j = e^(z_j − log Σ e^z).    0 for an ignored row"""
    for i in range(first, last):
        z, d, log_sum = Z[i], D[i], log_sums[i]
        if labels[i] == IGNORED:
            for j in range(len(z)):
                d[j] = ZERO
            continue
        for j in range(len(z)):
            d[j] = exp(z[j] - log_sum) * share
        d[labels[i]] -= share


@calls(losses_forward, losses_backward)
def cross_entropy(
    z: np.ndarray, y: np.ndarray, weight: np.ndarray | None = None, ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Any:
    """(mean loss, pullbacks) of ops.cross_entropy; NotImplemented with class weights or label smoothing"""
    if not is_plain(z) or weight is not None or label_smoothing:
        return NotImplemented
    y, _ = operands.check_cross_entropy(z, y, None, ignore_index, 0.0)
    Z = ops.flat(z)
    has_label = y != ignore_index
    operands.check_labels(y, has_label, Z.shape[1])
    labels = np.where(has_label, y, IGNORED).astype(np.int64)
    count = np.count_nonzero(has_label)
    log_sums, losses = np.empty(len(Z), np.float32), np.empty(len(Z), np.float32)
    run(losses_forward, len(Z), Z.shape[1], Z, labels, log_sums, losses)
    value = losses.sum(dtype=np.float64) / count if count else math.nan  # no row has a label

    def back(g: np.ndarray) -> np.ndarray:
        d = np.empty_like(Z)
        share = np.float32(g) / np.float32(max(count, 1))
        run(losses_backward, len(Z), Z.shape[1], Z, labels, log_sums, share, d)
        return d.reshape(z.shape)

    return np.float32(value), (back, None, None)

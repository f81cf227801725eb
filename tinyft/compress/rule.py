"""Rule: a way to compress one weight,  (W, H) -> Packed.

    W   (out, in), the dense weight on the host
    H   (in, in), the Hessian of the layer's squared error, 2/n Σ x xᵀ over the calibration tokens x (calibrate.py)
"""
from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from .. import array, checks
from ..keywords import checked_keywords
from ..nn import Packed

__all__ = ["Rule", "add_damping", "check_hessian", "check_weight", "without_dead_inputs"]

ASYMMETRY = 0.01                                         # of the largest H[j, j]: more than any rounding to 16 bits


@checked_keywords
class Rule:
    """A frozen dataclass of settings that is called with a weight, and with its Hessian if `needs_hessian`."""

    needs_hessian: ClassVar[bool] = False

    def __call__(self, W: np.ndarray, H: np.ndarray | None = None) -> Packed:
        """The compressed weight in place of W (out, in)."""
        raise NotImplementedError(f"{type(self).__name__} has no __call__")


def check_weight(name: str, W: Any) -> np.ndarray:
    """W (out, in) on the host as float32 or float64, a copy unless it is one already.

    TypeError for what is no array of real numbers, and for a weight that is packed already. ValueError for another
    shape, for an empty weight, and for one that holds inf or NaN."""
    if isinstance(W, Packed):
        raise TypeError(f"{name} wants a dense weight, got one that is packed already: unpack the model first "
                        "(tinyft.unpack)")
    if not array.is_array(W) or W.dtype.kind not in "iufV":          # bfloat16 is of kind V
        raise TypeError(f"{name} wants a weight, an array of real numbers, got {checks.brief(W)}")
    if W.ndim != 2 or not W.size:
        raise ValueError(f"{name} wants a weight of shape (out, in), got {W.shape}")
    host = array.asnumpy(W)
    host = host if host.dtype == np.float64 else host.astype(np.float32, copy=False)
    if not np.isfinite(host).all():
        raise ValueError(f"{name} wants finite weights, got inf or NaN")
    return host


def check_hessian(name: str, H: Any, width: int) -> np.ndarray:
    """H as float64 on the host. ValueError unless it is (width, width), finite, symmetric except for rounding, and its
    diagonal is not negative; TypeError if there is none."""
    if H is None:
        raise TypeError(f"{name} wants the Hessian of the layer's inputs: tinyft.compress computes it from "
                        "calibration batches")
    if not array.is_array(H) or H.dtype.kind not in "iuf":
        raise TypeError(f"{name} wants a Hessian, an array of real numbers, got {checks.brief(H)}")
    host = array.asnumpy(H).astype(np.float64)
    if host.shape != (width, width):
        raise ValueError(f"{name} wants a Hessian of shape {(width, width)}, got {host.shape}")
    if not np.isfinite(host).all() or (np.diagonal(host) < 0).any():
        raise ValueError(f"{name} wants a finite Hessian without negative entries on its diagonal")
    with np.errstate(over="ignore"):
        difference = np.abs(host - host.T).max()
    if difference > ASYMMETRY * np.diagonal(host).max():
        raise ValueError(f"{name} wants a symmetric Hessian, got one in which H[i, j] and H[j, i] differ by "
                         f"{difference:.3g}")
    return host


def without_dead_inputs(W: np.ndarray, H: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """W without the weights of dead inputs, and H/m, where m is the mean of the living inputs' H[j, j].

    An input is dead if it was 0 for every token, H[j, j] = 0: then nothing says what its weights should be. They
    become 0, and H gets 1 on its diagonal there, so that it can be inverted. H in the unit m is neither too small nor
    too large for float32; a factor of H changes nothing in what is least."""
    d = np.diagonal(H)
    dead = d == 0
    if dead.all():
        return np.zeros_like(W), np.eye(len(H))
    largest = d.max()
    H = H / (largest * (d[~dead] / largest).mean())                  # the sum of d itself may overflow
    if dead.any():
        H[dead] = 0
        H[:, dead] = 0
        H[dead, dead] = 1
        W = np.where(dead, 0, W).astype(W.dtype)
    return W, H


def add_damping(H: np.ndarray, damp: float) -> np.ndarray:
    """H + λ I,  λ = damp · mean diag H: a Hessian (in, in) whose eigenvalues are at least λ."""
    damped = H.copy()
    np.fill_diagonal(damped, np.diagonal(H) + damp * np.diagonal(H).mean())
    return damped

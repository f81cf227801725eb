"""Uniform grids: the values that a weight of b bits may take, and the code of the nearest one.

    w ≈ s (q − z)        q = clip(rint(w/s) + z, 0, top)

s is the scale (the distance of two neighbouring values) and z the zero point (the code of the value 0). A group of
weights shares one s and one z. The kinds of grids differ in how s and z follow from the weights of a group:

    kind        s                        z               codes            values
    affine      (hi − lo)/(2^b − 1)      rint(−lo/s)     0 ... 2^b − 1    from about lo to about hi; 0 is one of them
    symmetric   2a/(2^b − 1)             2^(b−1)         0 ... 2^b − 1    −2^(b−1) s ... (2^(b−1) − 1) s
    absmax      a/(2^(b−1) − 1)          2^(b−1) − 1     0 ... 2^b − 2    −a ... a, both exact; b >= 2
    ternary     mean |w|                 1               0, 1, 2          −s, 0, s
    sign        2 mean |w|               1/2             0, 1             −s/2, s/2

with lo = min(0, min w), hi = max(0, max w), a = max |w|. Because lo <= 0 <= hi, z lies in 0 ... top, and the error of a
weight is at most s/2 (affine, symmetric, absmax), for every scale that is at least as large as the one in the table.

Sources: Jacob et al. 2017, arXiv:1712.05877 (affine). Frantar et al. 2022, arXiv:2210.17323 and its code (symmetric).
Dettmers et al. 2022, arXiv:2208.07339 (absmax). Ma et al. 2024, arXiv:2402.17764 (ternary). Rastegari et al. 2016,
arXiv:1603.05279 (sign).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import checks

__all__ = [
    "KINDS", "Grid", "SignGrid", "affine_scale", "affine_zero", "check_kind", "code_bits", "fit_grid", "fit_groups",
    "fixed_zero", "join_grids",
]

KINDS = ("affine", "symmetric", "absmax", "ternary", "sign")
SMALLEST = float(np.finfo(np.float16).tiny)              # below it, float16 has fewer than 11 significant bits
LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Grid:
    """The values s (q − z), q = 0 ... top, for each group of weights.

    scale, zero   arrays that broadcast against the weights, one entry for each group; zero may be a number
    top           the largest code"""

    scale: np.ndarray
    zero: Any
    top: int

    def encode(self, w: np.ndarray) -> np.ndarray:
        """The code of the nearest value, as a whole number in w's dtype. Ties go to the even number of steps."""
        return np.clip(np.rint(w / self.scale) + self.zero, 0, self.top)

    def decode(self, q: np.ndarray) -> np.ndarray:
        """The values s (q − z) of codes."""
        return self.scale * (q - self.zero)

    def round(self, w: np.ndarray) -> np.ndarray:
        """The nearest value of the grid for each weight."""
        return self.decode(self.encode(w))

    def __getitem__(self, index: Any) -> Grid:
        """The grid of a part of the groups."""
        zero = self.zero[index] if isinstance(self.zero, np.ndarray) else self.zero
        return type(self)(self.scale[index], zero, self.top)


class SignGrid(Grid):
    """The values −s/2 and s/2. The code is 1 for w >= 0, whatever the scale, which may be 0."""

    def encode(self, w: np.ndarray) -> np.ndarray:
        """1 for w >= 0, else 0."""
        return (w >= 0).astype(w.dtype)


def check_kind(name: str, kind: str, bits: int) -> None:
    """ValueError unless there is such a grid with so many bits. name: the function or class, for the message."""
    checks.one_of(f"{name}: grid", kind, KINDS)
    checks.whole(f"{name}: bits", bits, 1, 8)
    if kind == "absmax" and bits < 2:
        raise ValueError(f"{name}: the absmax grid wants at least 2 bits, got {bits}; the sign grid has 1")
    if kind == "ternary" and bits != 2:
        raise ValueError(f"{name}: the ternary grid has three values, which take 2 bits, got bits={bits}")
    if kind == "sign" and bits != 1:
        raise ValueError(f"{name}: the sign grid has two values, which take 1 bit, got bits={bits}")


def fixed_zero(kind: str, bits: int) -> float | None:
    """The zero point that all groups of a grid of this kind share; None if each group has its own (affine)."""
    return {"affine": None, "symmetric": 2.0**(bits - 1), "absmax": 2.0**(bits - 1) - 1, "ternary": 1.0,
            "sign": 0.5}[kind]


def top_code(kind: str, bits: int) -> int:
    """The largest code of a grid of this kind."""
    return {"absmax": 2**bits - 2, "ternary": 2, "sign": 1}.get(kind, 2**bits - 1)


def fit_grid(W: np.ndarray, kind: str, bits: int, *, half_scales: bool = False) -> Grid:
    """The grid of every group of weights. A group is the last axis of W (..., g); scale and zero are (..., 1).

    half_scales   True: the scales are numbers of float16, rounded upwards so that the error stays at most s/2. The
                  scales of the whole array keep their dtype if one of them is outside of float16's normal range

    A group of zeros has s = 1, z = 0 in the affine grid and the code of the value 0. ValueError for unknown kinds,
    bits that the kind does not have, an empty group, and weights that are not finite."""
    check_kind("fit_grid", kind, bits)
    if W.ndim == 0 or W.shape[-1] == 0:
        raise ValueError(f"fit_grid wants groups of at least one weight, got shape {W.shape}")
    if not np.isfinite(W).all():
        raise ValueError("fit_grid wants finite weights, got inf or NaN")
    scale = _scale(W, kind, bits)
    if half_scales:
        scale = _round_up(scale)
    top = top_code(kind, bits)
    if kind == "sign":
        return SignGrid(scale, 0.5, top)
    zero: Any = fixed_zero(kind, bits)
    if zero is None:
        zero = affine_zero(W, scale)
    return Grid(scale, zero, top)


def affine_scale(W: np.ndarray, bits: int) -> np.ndarray:
    """s = (hi − lo)/(2^b − 1), with lo = min(0, min w) and hi = max(0, max w): the scale of an affine grid.

    A group is the last axis of W (..., g). The scales are (..., 1), in W's dtype; a group of zeros has s = 1."""
    hi = np.maximum(W.max(axis=-1, keepdims=True), 0)
    lo = np.minimum(W.min(axis=-1, keepdims=True), 0)
    steps = W.dtype.type(2**bits - 1)
    scale = hi / steps - lo / steps                          # hi − lo alone may overflow
    return np.where(scale == 0, W.dtype.type(1), scale)


def affine_zero(W: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """z = rint(−lo/s), with lo = min(0, min w): the zero point of an affine grid, the code of the value 0.

    W (..., g) and its scales (..., 1) give the zero points (..., 1), whole numbers in W's dtype."""
    lo = np.minimum(W.min(axis=-1, keepdims=True), 0)
    return np.rint(np.abs(lo) / scale)                       # |lo| = −lo, but 0 for lo = 0, and not −0


def fit_groups(W: np.ndarray, kind: str, bits: int, group: int, *, half_scales: bool = False) -> Grid:
    """The grids of all groups of g neighbours in the rows of W (out, in): scale and zero are (out, groups).

    The last group of a row has fewer weights if g does not divide `in`. The rest is as for fit_grid."""
    out, width = W.shape
    whole = width // group * group                                   # the inputs in full groups
    found = []
    if whole:
        found.append(fit_grid(W[:, :whole].reshape(out, -1, group), kind, bits, half_scales=half_scales)[..., 0])
    if whole < width:
        found.append(fit_grid(W[:, whole:], kind, bits, half_scales=half_scales))
    return join_grids(found)


def join_grids(grids: Sequence[Grid]) -> Grid:
    """The grids of parts of the groups, side by side: scale and zero are (out, groups)."""
    first = grids[0]
    scale = np.concatenate([grid.scale for grid in grids], axis=1)
    zero = first.zero
    if isinstance(zero, np.ndarray):
        zero = np.concatenate([grid.zero for grid in grids], axis=1)
    return type(first)(scale, zero, first.top)


def _scale(W: np.ndarray, kind: str, bits: int) -> np.ndarray:
    """The scales (..., 1) of the table above; 1 for a group of zeros, but 0 in the sign grid."""
    if kind == "affine":
        return affine_scale(W, bits)
    if kind in ("ternary", "sign"):
        scale = np.abs(W).mean(axis=-1, keepdims=True, dtype=np.float64).astype(W.dtype)
    else:
        steps = (2**bits - 1) / 2 if kind == "symmetric" else 2**(bits - 1) - 1
        scale = np.abs(W).max(axis=-1, keepdims=True) / W.dtype.type(steps)
    if kind == "sign":
        return 2 * scale
    # A scale may also underflow to 0 for weights near the smallest number: they count as zeros.
    return np.where(scale == 0, W.dtype.type(1), scale)


def _round_up(scale: np.ndarray) -> np.ndarray:
    """The least numbers of float16 that are at least as large as the scales; the scales if float16 cannot hold them."""
    positive = scale[scale > 0]
    if positive.size and not (SMALLEST <= positive.min() and positive.max() <= LARGEST):
        return scale
    half = scale.astype(np.float16)
    short = half.astype(scale.dtype) < scale
    half = np.where(short, np.nextafter(half, np.float16(np.inf)), half)
    return half.astype(scale.dtype)


def code_bits(kind: str, bits: int, group: int) -> float:
    """The bits that a weight takes on average, with float16 scales:  b + (16 + bits of z)/g."""
    zero_bits = bits if fixed_zero(kind, bits) is None else 0
    return bits + (16 + zero_bits) / group

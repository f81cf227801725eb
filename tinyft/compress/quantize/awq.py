"""AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration.  Lin et al., 2023.
arXiv:2306.00978

    Ŵ = Q(W diag s) diag(1/s)      minimises  tr (W − Ŵ) H (W − Ŵ)ᵀ                                        §3.2, eq. 4
    s_j = m_j^r,  m_j the size of input j,  r one of 0, 0.05 ... 0.95                                              eq. 5
    W (out, in) given,  Q rounds to the nearest value of each group's grid (rtn.py),  H (in, in) of calibrate.py

A few inputs of a linear map are much larger than the others, and errors of their weights matter most. Scaled by s > 1,
such a weight has a relative error that is smaller by 1/s, as long as the largest weight of its group stays the same.
With r = 0 every s is 1: round-to-nearest. All s together are divided by √(max s · min s).

Clipping: a group whose grid ends before its largest weight has smaller steps. Each group takes the end (1 − i/20) max
|w|, i = 0 ... 9, with the least error of its own part of the output, d H_gg dᵀ.

Departures. m_j is the root mean square of input j, √(H_jj / 2), not its mean magnitude: then H is all that the rule
needs. The error is that of the layer's output, not of its block's, so q, k and v have an s each; s is kept with the
packed weight, not folded into the norm before it. m is held above 10⁻⁴ of its largest entry, where the paper's code
holds s above 10⁻⁴: the result does not depend on the unit of x. All tokens count in the search for clips, not 512.
Clips that make the error of the whole layer larger are given up. The paper's code does not clip q and k: leave them to
a call of compress with clip=False.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ... import array, checks
from ..grids import check_kind, fit_grid
from ..grouped import Uniform
from ..rule import Rule, check_hessian, check_weight
from .rtn import round_to_nearest

__all__ = ["AWQ", "clip_groups", "input_scales"]

POWERS = np.arange(20) / 20                              # r, of which 0 comes first
SHRINKS = 1 - np.arange(10) / 20                         # the ends of a grid, as parts of max |w|
SMALLEST = 1e-4                                          # of m, as a part of its largest entry


@dataclass(frozen=True)
class AWQ(Rule):
    """Round-to-nearest of weights that are scaled by the sizes of their inputs. Needs calibration data.

    bits    1 ... 8
    group   inputs that share a scale; None: the whole row
    grid    as RTN's
    clip    True: each group may end its grid before its largest weight"""

    needs_hessian: ClassVar[bool] = True

    bits: int = 4
    group: int | None = 64
    grid: str = "affine"
    clip: bool = True

    def __post_init__(self) -> None:
        check_kind("AWQ", self.grid, self.bits)
        if self.group is not None:
            checks.whole("AWQ: group", self.group, least=1)
        checks.flag("AWQ: clip", self.clip)

    def __call__(self, W: np.ndarray, H: np.ndarray | None = None) -> Uniform:
        """The packed weight of W (out, in) for inputs with the Hessian H (in, in)."""
        W = check_weight("AWQ", W)
        H = check_hessian("AWQ", H, W.shape[1])
        H = (H / (np.diagonal(H).max() or 1)).astype(W.dtype)                    # its unit does not matter
        best, least, s = None, np.inf, None
        with np.errstate(over="ignore", invalid="ignore"):                       # an error that overflows is not less
            for scales in input_scales(H):
                scaled = W * scales
                if not np.isfinite(scaled).all():
                    continue
                packed = self.round(scaled, scales)
                error = squared_error(W, packed, H)
                if best is None or error < least:
                    best, least, s = packed, error, scales
            if self.clip:
                group = W.shape[1] if self.group is None else self.group
                clipped = clip_groups(W * s, H / np.outer(s, s), self.grid, self.bits, group)
                packed = self.round(clipped, s)
                if squared_error(W, packed, H) < least:
                    best = packed
        return best

    def round(self, scaled: np.ndarray, s: np.ndarray) -> Uniform:
        """Q(W diag s) diag(1/s) for W diag s (out, in). Without s in memory if all of its entries are 1."""
        is_plain = (s == 1).all()
        return round_to_nearest(scaled, self.grid, self.bits, self.group, caller="AWQ",
                                input_scale=None if is_plain else s)


def input_scales(H: np.ndarray) -> Iterator[np.ndarray]:
    """s (in,), numbers of float16, for each power r. The first, of r = 0, is 1."""
    m = np.sqrt(np.diagonal(H) / 2)
    m = np.maximum(m, SMALLEST * m.max())
    if not m.any():                                      # no input was ever different from 0
        m = np.ones_like(m)
    for r in POWERS:
        s = m**r
        yield (s / np.sqrt(s.max() * s.min())).astype(np.float16).astype(H.dtype)


def clip_groups(W: np.ndarray, H: np.ndarray, kind: str, bits: int, group: int) -> np.ndarray:
    """W (out, in) with the weights of each group held within ±c, the c of SHRINKS with the least error of its group.

    The error of a group is d H_gg dᵀ, with d = w − Q(clip(w)) and H_gg the group's block of H on the diagonal. Of equal
    errors the largest c counts."""
    clipped = W.copy()
    for start in range(0, W.shape[1], group):
        columns = slice(start, start + group)
        w = W[:, columns]                                                        # (out, g)
        ends = np.abs(w).max(axis=1, keepdims=True)
        least = np.full((len(w), 1), np.inf, w.dtype)
        for shrink in SHRINKS:
            inside = np.clip(w, -shrink * ends, shrink * ends)
            d = w - fit_grid(inside, kind, bits, half_scales=True).round(inside)
            error = ((d @ H[columns, columns]) * d).sum(axis=1, keepdims=True)
            better = error < least
            clipped[:, columns] = np.where(better, inside, clipped[:, columns])
            least = np.where(better, error, least)
    return clipped


def squared_error(W: np.ndarray, packed: Uniform, H: np.ndarray) -> float:
    """tr (W − Ŵ) H (W − Ŵ)ᵀ, in the dtype of W."""
    D = W - array.asnumpy(packed.dequantize()).astype(W.dtype)
    return float(np.vdot(D @ H, D))

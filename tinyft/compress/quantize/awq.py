"""AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration.  Lin et al., 2023.
arXiv:2306.00978

    Ŵ = Q(W diag s) diag(1/s)      minimises  tr (W − Ŵ) H (W − Ŵ)ᵀ                                        §3.2, eq. 4
    s_j = m_j^r,  m_j the size of input j,  r one of 0, 0.05 ... 0.95                                              eq. 5
    W (out, in) given,  Q rounds to the nearest value of each group's grid (rtn.py)
    H = 2/n Xᵀ X  (in, in), the Hessian,  X (n, in) the inputs of the layer for n calibration tokens

Scaling: a few inputs of a linear map are much larger than the others. An error of a weight is multiplied by its input,
so the errors of the weights of large inputs matter most. Such a weight is multiplied by s > 1 before rounding, and
divided by s afterwards. The division makes its rounding error s times smaller. This holds as long as the largest weight
of the group stays the same, since it decides the step of the grid. All s are divided by √(max s · min s): then the
largest s is 1 over the smallest, and the scaled weights are about as large as before. With r = 0 every s is 1, which is
round-to-nearest. The rule takes the r whose Ŵ has the least error.

Clipping: if the weights of a group are clipped to ±c before the grid is fitted, the steps of the grid are smaller. Each
group takes the c among (1 − i/20) max |w|, i = 0 ... 9, that makes d H_gg dᵀ least: d is the error of the group's
weights, and H_gg is the block of H for its inputs.

Departures:
- m_j is √(H_jj / 2), the root mean square of input j, and not its mean magnitude: so H is all that the rule needs.
- The error is that of the linear map, where the paper takes that of its block. So q, k and v have an s each.
- s is stored with the packed weight, not folded into the norm before it.
- m is at least 10⁻⁴ of its largest entry, so that the result does not depend on the unit of x. In the paper's code s is
  at least 10⁻⁴.
- The search for c uses all tokens, not 512. The clipped weight is kept only if the error of the whole map is smaller.
- The paper's code does not clip q and k. Here you can compress them in a call with clip=False, and name all other maps
  as the targets of a second call.
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

# The values that the paper's code tries.
POWERS = np.arange(20) / 20                              # of r; 0 comes first
SHRINKS = 1 - np.arange(10) / 20                         # of c / max |w|; 1 comes first

SMALLEST = 1e-4                                          # the least m_j / max m


@dataclass(frozen=True)
class AWQ(Rule):
    """Round-to-nearest of weights that are scaled by the sizes of their inputs. Needs calibration data.

    bits    1 ... 8
    group   neighbours in a row that share a scale of the grid; None: the whole row
    grid    "affine", "symmetric", "absmax" (at least 2 bits), "ternary" (2 bits), "sign" (1 bit)
    clip    True: the weights of a group may be clipped before its grid is fitted

    TypeError or ValueError for a setting out of its range."""

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
        """The packed weight of W (out, in) for inputs with the Hessian H (in, in).

        TypeError without H, for a weight that is packed already and for arrays that are not of real numbers. ValueError
        for other shapes, for inf and NaN, and for an H that is not symmetric or has a negative entry on its
        diagonal."""
        W = check_weight("AWQ", W)
        H = check_hessian("AWQ", H, W.shape[1])
        largest = np.diagonal(H).max() or 1                                      # 1 if all inputs were 0
        H = (H / largest).astype(W.dtype)                                        # a factor changes no choice
        best = None                                                              # the packed weight of least error
        best_scales = None                                                       # its s (in,)
        least_error = np.inf
        with np.errstate(over="ignore", invalid="ignore"):                       # an error that overflows is not less
            for scales in input_scales(H):
                scaled = W * scales
                if not np.isfinite(scaled).all():                                # beyond float32: no candidate
                    continue
                packed = self.round(scaled, scales)
                error = squared_error(W, packed, H)
                if best is None or error < least_error:                          # the first error may be inf or NaN
                    best = packed
                    best_scales = scales
                    least_error = error
            if self.clip:
                group = W.shape[1] if self.group is None else self.group
                scaled_H = H / np.outer(best_scales, best_scales)                # the Hessian of the inputs x / s
                clipped = clip_groups(W * best_scales, scaled_H, self.grid, self.bits, group)
                packed = self.round(clipped, best_scales)
                if squared_error(W, packed, H) < least_error:
                    best = packed
        return best

    def round(self, scaled: np.ndarray, s: np.ndarray) -> Uniform:
        """The packed Ŵ = Q(W diag s) diag(1/s), from scaled = W diag s (out, in) and s (in,).

        If every s is 1, no s is stored."""
        is_plain = (s == 1).all()
        return round_to_nearest(scaled, self.grid, self.bits, self.group, caller="AWQ",
                                input_scale=None if is_plain else s)


def input_scales(H: np.ndarray) -> Iterator[np.ndarray]:
    """The scales s (in,) for each r of POWERS, from H (in, in). The first s, for r = 0, is 1 everywhere.

    A factor of H changes no s. They are rounded to float16, in which the packed weight stores them, and have the dtype
    of H."""
    m = np.sqrt(np.diagonal(H) / 2)                      # the root mean square of each input, up to a factor
    m = np.maximum(m, SMALLEST * m.max())
    if not m.any():                                      # no input was ever different from 0
        m = np.ones_like(m)
    for r in POWERS:
        s = m**r
        yield (s / np.sqrt(s.max() * s.min())).astype(np.float16).astype(H.dtype)


def clip_groups(W: np.ndarray, H: np.ndarray, kind: str, bits: int, group: int) -> np.ndarray:
    """W (out, in) with each group of weights clipped to ±c. Each group of each row has its own c: the one of
    SHRINKS · max |w| with the least error.

    The error of a group w is d H_gg dᵀ, with d = w − Q(clip(w)) and H_gg the block of H (in, in) for its inputs. If
    errors are equal, the largest c is taken. kind, bits: of the grid (grids.py). group: neighbours in a row."""
    clipped = W.copy()
    for start in range(0, W.shape[1], group):
        columns = slice(start, start + group)
        w = W[:, columns]                                                        # (out, g)
        largest = np.abs(w).max(axis=1, keepdims=True)                           # (out, 1)
        least = np.full((len(w), 1), np.inf, w.dtype)                            # the least error so far
        for shrink in SHRINKS:
            inside = np.clip(w, -shrink * largest, shrink * largest)
            grid = fit_grid(inside, kind, bits, half_scales=True)                # scales that float16 holds
            d = w - grid.round(inside)                                           # (out, g)
            error = ((d @ H[columns, columns]) * d).sum(axis=1, keepdims=True)   # (out, 1)
            better = error < least                                               # (out, 1)
            clipped[:, columns] = np.where(better, inside, clipped[:, columns])
            least = np.where(better, error, least)
    return clipped


def squared_error(W: np.ndarray, packed: Uniform, H: np.ndarray) -> float:
    """tr (W − Ŵ) H (W − Ŵ)ᵀ, computed in the dtype of W. W and Ŵ (out, in), H (in, in)."""
    D = W - array.asnumpy(packed.dequantize()).astype(W.dtype)
    return float(np.vdot(D @ H, D))

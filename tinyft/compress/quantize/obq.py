"""OBQ, Optimal Brain Quantization: Optimal Brain Compression.  Frantar, Alistarh, 2022.  arXiv:2208.11580

    minimise  ½ (w − ŵ) H (w − ŵ)ᵀ  for each row w (in,) of W,  ŵ on a grid,  H (in, in) of calibrate.py            §3

F is the set of the weights that are not rounded yet, and G = (H_F)⁻¹ the inverse of H in the rows and columns of F.
While F is not empty:

    j = argmin over F of  (quant(w_j) − w_j)² / G_jj         the weight whose rounding costs least                   §5
    δ = −(w_j − quant(w_j)) / G_jj · G_:,j                   what the weights of F do about it: w ← w + δ            §5
    G ← G − G_:,j G_j,: / G_jj,  without j                   the inverse for F without j                   §4, Lemma 1

One step adds ½ (quant(w_j) − w_j)² / G_jj to the loss. A weight that the updates have pushed off its grid, more than
half a step from the nearest value, is rounded before all others, the farthest first: later updates would only push it
farther (§5). Each row has its own order and its own G, so that W (out, in) costs O(out · in³) operations. GPTQ
(gptq.py) takes one order for all rows, which makes it faster by a factor of about `out`.

Departures: `obq_rows` does not write G anew in each step. It keeps the vectors u = G_j,: / √G_jj of the steps so far,
and computes the row of G that a step needs: G_j,: = H⁻¹_j,: − Σ u_j u. These are the same numbers, for many rows at a
time, and memory is read where the equations write it. (In the order of its steps, the vectors u of a row are the rows
of GPTQ's factor U.) H is damped only if it is close to singular.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ... import checks
from ..grids import Grid, check_kind, fit_groups
from ..grouped import Uniform
from ..rule import Rule, add_damping, check_hessian, check_weight, without_dead_inputs

__all__ = ["OBQ", "cheapest", "eliminate", "obq_row", "obq_rows", "obq_step"]

DAMP = 0.01                                              # λ as a part of the mean of H's diagonal, where H needs it
SINGULAR = 1e-10                                         # smallest over largest eigenvalue of an H that needs it
FACTORS = 1 << 20                                        # numbers in the factors of the rows that are computed together


@dataclass(frozen=True)
class OBQ(Rule):
    """Rounds the weights of a row one by one, the cheapest first; the rest make up for each error. Needs calibration
    data, and time: for small models and for lessons.

    bits, group, grid   as RTN's; the grids are fitted to the original weights
    damp                λ as a part of the mean of H's diagonal. An H that is close to singular gets at least 0.01"""

    needs_hessian: ClassVar[bool] = True

    bits: int = 4
    group: int | None = 64
    grid: str = "affine"
    damp: float = 0.0

    def __post_init__(self) -> None:
        check_kind("OBQ", self.grid, self.bits)
        if self.group is not None:
            checks.whole("OBQ: group", self.group, least=1)
        checks.number("OBQ: damp", self.damp, low=0)

    def __call__(self, W: np.ndarray, H: np.ndarray | None = None) -> Uniform:
        """The packed weight of W (out, in) for inputs with the Hessian H (in, in)."""
        W = check_weight("OBQ", W)
        H = check_hessian("OBQ", H, W.shape[1])
        W, H = without_dead_inputs(W, H)
        out, width = W.shape
        group = width if self.group is None else min(self.group, width)
        grids = fit_groups(W, self.grid, self.bits, group, half_scales=True)             # (out, groups)
        grid = grids[:, np.arange(width) // group]                                       # (out, in)
        inverse = np.linalg.inv(damped(H, self.damp))
        codes = np.empty((out, width), np.uint8)
        together = max(1, FACTORS // width**2)
        for start in range(0, out, together):
            rows = slice(start, start + together)
            codes[rows] = grid[rows].encode(obq_rows(W[rows], inverse, grid[rows]))
        return Uniform.from_grid(codes, grids, kind=self.grid, bits=self.bits, group=group)


# ── one row, as in the paper ─────────────────────────────────────────────────────────────────────────────────────────
def obq_row(
    w: np.ndarray, H: np.ndarray, grid: Grid, order: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One row w (in,) on its grid: its values (in,), the order in which they were rounded (in,), and what each step
    added to the loss (in,); their sum is ½ (w − ŵ) H (w − ŵ)ᵀ.

    H       (in, in), invertible: it is not damped here
    grid    its scale broadcasts against w
    order   None: the paper's; else the order to take"""
    w = np.array(w, np.float64)
    G = np.linalg.inv(H)
    free = np.ones(len(w), bool)                                     # F
    taken = np.empty(len(w), int)
    losses = np.empty(len(w))
    for t in range(len(w)):
        q = grid.round(w)
        j = cheapest(w - q, np.diagonal(G), free, grid.scale) if order is None else order[t]
        losses[t] = obq_step(w, G, free, j, q[j])
        taken[t] = j
    return w, taken, losses


def obq_step(w: np.ndarray, G: np.ndarray, free: np.ndarray, j: int, q: float) -> float:
    """Give the weight j the value q, and let the free weights k make up for it:  w_k ← w_k − (w_j − q)/G_jj · G_jk.

    w (in,), G (in, in) and free (in,), the set F as True and False, change in place: j is not free any more, and G is
    the inverse for F without j. Only the rows and columns of G that are in F have a meaning. Returns what the step adds
    to the loss, ½ (w_j − q)²/G_jj."""
    error = w[j] - q
    loss = error**2 / (2 * G[j, j])
    w[free] -= error / G[j, j] * G[j, free]
    w[j] = q
    G[:] = eliminate(G, j)
    free[j] = False
    return loss


def eliminate(G: np.ndarray, j: int) -> np.ndarray:
    """G − G_:,j G_j,: / G_jj: the inverse of H without row j and column j, from G = H⁻¹ (n, n).

    The result is (n, n), too. Its row j and its column j are 0, up to rounding. Its other entries are the inverse."""
    return G - np.outer(G[:, j], G[j]) / G[j, j]


def cheapest(error: np.ndarray, d: np.ndarray, free: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The index of the weight to round next, one for each row (...): the free weight with the least error²/d. But if
    free weights are off their grid, |error| > scale/2, it is the one of them with the largest |error|.

    error (..., in)   w − quant(w) of each weight
    d     (..., in)   the diagonal of G; it has no meaning for weights that are not free
    free  (..., in)   True for the weights that are not rounded yet, at least one in each row
    scale             the steps of the grids, an array that broadcasts against error"""
    size = np.where(free, np.abs(error), 0)
    off = np.where(size > scale / 2 * (1 + 1e-9), size, 0)
    cost = np.where(free, error**2 / np.where(free, d, 1), np.inf)
    return np.where(off.any(axis=-1), off.argmax(axis=-1), cost.argmin(axis=-1))


# ── many rows at a time ──────────────────────────────────────────────────────────────────────────────────────────────
def obq_rows(W: np.ndarray, inverse: np.ndarray, grid: Grid) -> np.ndarray:
    """The values (rows, in) float64 of the rows of W on their grid, each in its own order; inverse: H⁻¹ (in, in)."""
    w = W.astype(np.float64)
    count, width = w.shape
    row = np.arange(count)
    free = np.ones(w.shape, bool)
    d = np.tile(np.diagonal(inverse), (count, 1))                    # the diagonals of G
    factor = np.empty((count, width, width))                         # [r, t] is the vector u of step t in row r
    for t in range(width):
        q = grid.round(w)
        j = cheapest(w - q, d, free, grid.scale)                     # (rows,)
        before = factor[:, :t]
        u = inverse[j] - (before[row, :, j][:, None] @ before)[:, 0]             # G_j,:
        u = np.where(free, u, 0) / np.sqrt(u[row, j])[:, None]
        e = (w - q)[row, j] / u[row, j]
        w -= e[:, None] * u
        w[row, j] = q[row, j]
        d -= u**2
        free[row, j] = False
        factor[:, t] = u
    return w


# ── the Hessian ──────────────────────────────────────────────────────────────────────────────────────────────────────
def damped(H: np.ndarray, damp: float) -> np.ndarray:
    """H + λ I,  λ = damp · mean diag H; with at least DAMP if H + λ I would be close to singular otherwise.

    ValueError if H is no Hessian: one with negative eigenvalues."""
    mean = np.diagonal(H).mean()
    eigenvalues = np.linalg.eigvalsh(H) / mean                       # in ascending order
    if eigenvalues[0] + damp < SINGULAR * eigenvalues[-1]:
        damp = max(damp, DAMP)
    if eigenvalues[0] + damp <= 0:
        raise ValueError("OBQ wants a positive semi-definite Hessian, got one with negative eigenvalues")
    return add_damping(H, damp)

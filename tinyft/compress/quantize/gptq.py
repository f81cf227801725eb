"""GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers.  Frantar, Ashkboos, Hoefler,
Alistarh, 2022.  arXiv:2210.17323

    minimise  tr (W − Ŵ) H (W − Ŵ)ᵀ      W (out, in) given,  Ŵ on a grid,  H (in, in) of calibrate.py       §3, eq. 1

    H + λ I = (Uᵀ U)⁻¹,  U upper triangular,  λ = damp · mean diag H                                         step 3
    for each column i:    q = the nearest value of the grid to W[:, i]
                          e = (W[:, i] − q) / U[i, i]                                                        eq. 2
                          W[:, j] ← W[:, j] − e U[i, j]      for all columns j > i                           eq. 3

Every column is rounded to nearest; the columns after it, which are not rounded yet, then make up for its error. All
rows take the columns in the same order, so that one factor U serves all of them: that is what OBQ (obq.py) lacks.
Lazy batches (step 2): inside a block of columns only the block is updated; the columns after it get all the block's
updates in one matrix product.

Departures: U is the inverse of an upper factor R, H + λ I = R Rᵀ, which is the same matrix as the paper's Cholesky
factor of the inverse, with half of its work. The grid of a group is fitted to weights with all updates, where the
paper's code reads weights without those of the block at hand.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ... import checks
from ..grids import Grid, check_kind, fit_grid
from ..grouped import Uniform
from ..rule import Rule, check_hessian, check_weight, without_dead_inputs

__all__ = ["GPTQ", "gptq_columns", "inverse_factor"]


@dataclass(frozen=True)
class GPTQ(Rule):
    """Rounds column by column; the columns that follow make up for each error. Needs calibration data.

    bits           1 ... 8
    group          inputs that share a scale; None: the whole row
    grid           as RTN's
    damp           λ as a part of the mean of H's diagonal
    block          columns in a lazy batch; made a multiple of the group
    act_order      True: columns with a large H[j, j] first
    static_groups  True: the grids are fitted to the original weights, before the columns are ordered"""

    needs_hessian: ClassVar[bool] = True

    bits: int = 4
    group: int | None = 64
    grid: str = "affine"
    damp: float = 0.01
    block: int = 128
    act_order: bool = False
    static_groups: bool = False

    def __post_init__(self) -> None:
        check_kind("GPTQ", self.grid, self.bits)
        if self.group is not None:
            checks.whole("GPTQ: group", self.group, least=1)
        checks.number("GPTQ: damp", self.damp, low=0)
        checks.whole("GPTQ: block", self.block, least=1)
        checks.flag("GPTQ: act_order", self.act_order)
        checks.flag("GPTQ: static_groups", self.static_groups)

    def __call__(self, W: np.ndarray, H: np.ndarray | None = None) -> Uniform:
        """The packed weight of W (out, in) for inputs with the Hessian H (in, in)."""
        W = check_weight("GPTQ", W)
        H = check_hessian("GPTQ", H, W.shape[1])
        W, H = without_dead_inputs(W, H)
        width = W.shape[1]
        group = width if self.group is None else min(self.group, width)
        order = np.argsort(-np.diagonal(H), kind="stable") if self.act_order else np.arange(width)
        static = self.fit_all(W, group) if self.static_groups else None
        U = inverse_factor(H[np.ix_(order, order)], self.damp).astype(W.dtype)
        codes, grids = gptq_columns(W[:, order], U, self.fit, group, self.block, static, order)
        keeps_order = self.act_order and static is None
        if not keeps_order:
            codes = codes[:, np.argsort(order)]
        scale = np.concatenate([grid.scale for grid in grids], axis=1)                   # (out, groups)
        zero = np.concatenate([grid.zero for grid in grids], axis=1) if self.grid == "affine" else None
        return Uniform(codes, scale, zero, kind=self.grid, bits=self.bits, group=group,
                       order=order if keeps_order else None)

    def fit(self, W: np.ndarray) -> Grid:
        """The grid of one group of columns, W (out, g)."""
        return fit_grid(W, self.grid, self.bits, half_scales=True)

    def fit_all(self, W: np.ndarray, group: int) -> list[Grid]:
        """The grids of all groups of W (out, in)."""
        return [self.fit(W[:, start:start + group]) for start in range(0, W.shape[1], group)]


def gptq_columns(
    W: np.ndarray, U: np.ndarray, fit: Callable[[np.ndarray], Grid], group: int, block: int = 128,
    static: list[Grid] | None = None, order: np.ndarray | None = None,
) -> tuple[np.ndarray, list[Grid]]:
    """The codes (out, in) uint8 of W (out, in), column after column, and the grid of each group.

    U       (in, in), the upper factor of the inverse Hessian
    fit     gives the grid of a group of columns (out, g), when the first of them is reached
    static  the grids of all groups, if they are known before; column j then belongs to group order[j] // group
    block   columns in a lazy batch, made a multiple of the group or the group itself"""
    out, width = W.shape
    rest = np.ascontiguousarray(W.T)                                 # (in, out): a column of W is a contiguous row
    codes = np.empty((width, out), np.uint8)
    grids = [] if static is None else static
    if static is None and group < width:
        block = max(block // group, 1) * group                       # a group has all its updates when it begins
    for first in range(0, width, block):
        last = min(first + block, width)
        errors = np.empty((last - first, out), W.dtype)
        for i in range(first, last):
            if static is not None:
                grid = static[order[i] // group]
            elif i % group == 0:
                grid = fit(rest[i:i + group].T)
                grids.append(grid)
            w = rest[i][:, None]                                     # (out, 1), as the scales of a grid
            q = grid.encode(w)
            codes[i] = q[:, 0]
            e = ((w - grid.decode(q)) / U[i, i])[:, 0]
            rest[i + 1:last] -= U[i, i + 1:last, None] * e
            errors[i - first] = e
        rest[last:] -= U[first:last, last:].T @ errors
    return codes.T, grids


def inverse_factor(H: np.ndarray, damp: float) -> np.ndarray:
    """U (in, in), upper triangular, with (H + λ I)⁻¹ = Uᵀ U,  λ = damp · mean diag H.

    H + λ I = R Rᵀ with R upper triangular, and U = R⁻¹. R is a Cholesky factor of H with rows and columns reversed.
    A matrix that is not positive definite in floating-point numbers gets ten times the damping, until it is.
    ValueError if H is no Hessian: far from positive semi-definite."""
    mean = np.diagonal(H).mean()
    while True:
        damped = H + damp * mean * np.eye(len(H))
        try:
            R = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
        except np.linalg.LinAlgError:
            if damp > 1:
                raise ValueError("GPTQ wants a positive semi-definite Hessian, got one with negative eigenvalues") \
                    from None
            damp = max(10 * damp, 1e-6)
            continue
        return inverse_upper(R)


def inverse_upper(R: np.ndarray, smallest: int = 64) -> np.ndarray:
    """R⁻¹ of an upper triangular R, by halves:  [[A, B], [0, C]]⁻¹ = [[A⁻¹, −A⁻¹ B C⁻¹], [0, C⁻¹]]."""
    n = len(R)
    if n <= smallest:
        return np.triu(np.linalg.inv(R))
    half = n // 2
    inverse = np.zeros_like(R)
    A = inverse_upper(R[:half, :half], smallest)
    C = inverse_upper(R[half:, half:], smallest)
    inverse[:half, :half] = A
    inverse[half:, half:] = C
    inverse[:half, half:] = -(A @ R[:half, half:]) @ C
    return inverse

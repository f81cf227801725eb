"""GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers.  Frantar, Ashkboos, Hoefler,
Alistarh, 2022.  arXiv:2210.17323

    minimise  tr (W − Ŵ) H (W − Ŵ)ᵀ      W (out, in) given,  Ŵ on a grid,  H (in, in) of calibrate.py         §3, eq. 1

    (H + λ I)⁻¹ = Uᵀ U,  U upper triangular,  λ = damp · mean diag H                                         §4, step 3
    for each column i:    q = the nearest value of the grid to W[:, i]                                      Algorithm 1
                          e = (W[:, i] − q) / U[i, i]
                          W[:, j] ← W[:, j] − e U[i, j]      for all columns j > i

Every column is rounded to nearest; the columns after it, which are not rounded yet, then make up for its error, as in
OBQ (obq.py). But all rows take the columns in one order (step 1). Then all rows share OBQ's matrix G, and row i of U is
its row G_i,: / √G_ii at step i: one factor serves everyone. Lazy batches (step 2): inside a block of columns only the
block is updated; the columns after it get all updates of the block in one matrix product.

The errors e are the columns of a matrix E (out, in), and  W − Ŵ = E U.  So the loss is ‖E‖², for the damped H.

Departures: U is the inverse of R, where H + λ I = R Rᵀ with R upper triangular. That is the paper's U, the Cholesky
factor of the inverse, with fewer operations. λ grows if the factorisation fails. The grid of a group is fitted to
weights with all updates; the paper's program reads them without the updates of the block at hand. The mean of diag H
leaves out dead inputs.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ... import checks
from ..grids import Grid, check_kind, fit_grid, fit_groups, join_grids
from ..grouped import Uniform
from ..rule import Rule, add_damping, check_hessian, check_weight, without_dead_inputs

__all__ = ["GPTQ", "gptq_block", "gptq_columns", "inverse_factor", "upper_factor"]

LARGE = 1e30                                             # float32 weights that are larger are computed in float64
LEAST_DAMP = 1e-6                                        # tried after 0, if the factorisation fails; then ten times it
MOST_DAMP = 0.1


@dataclass(frozen=True)
class GPTQ(Rule):
    """Rounds column by column; the columns that follow make up for each error. Needs calibration data.

    bits, group, grid   as RTN's
    damp           λ as a part of the mean of H's diagonal
    block          columns in a lazy batch, about; it changes the time, not the result
    act_order      True: columns with a large H[j, j] first. The packed weight then keeps the order of its columns
    static_groups  True: the grids are fitted to the original weights, before the columns are ordered. With act_order,
                   the packed weight keeps its columns in their own order"""

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
        if np.abs(W).max() > LARGE:
            W = W.astype(np.float64)
        width = W.shape[1]
        group = width if self.group is None else min(self.group, width)
        order = np.arange(width)
        if self.act_order:
            order = np.argsort(-np.diagonal(H), kind="stable")
        if self.static_groups:
            grids: Grids = StaticGrids(fit_groups(W, self.grid, self.bits, group, half_scales=True), order // group)
        else:
            grids = GroupGrids(self.grid, self.bits, group)
        if self.act_order:
            W = W[:, order]
            H = H[np.ix_(order, order)]
        U = inverse_factor(H, self.damp).astype(W.dtype)
        codes, _ = gptq_columns(W, U, grids.of_column, whole_groups(self.block, group))
        scattered = self.act_order and not self.static_groups and group < width
        if not scattered:
            codes = in_own_order(codes, order)
        return Uniform.from_grid(codes, grids.all(), kind=self.grid, bits=self.bits, group=group,
                                 order=order if scattered else None)


# ── the algorithm ────────────────────────────────────────────────────────────────────────────────────────────────────
def gptq_columns(
    W: np.ndarray, U: np.ndarray, grid_of: Callable[[int, np.ndarray], Grid], block: int = 128,
) -> tuple[np.ndarray, np.ndarray]:
    """The codes (out, in) uint8 of W (out, in), column after column, and the errors E (out, in) with W − Ŵ = E U.

    U        (in, in), the upper factor of the inverse Hessian
    grid_of  grid_of(i, rest) is the grid of column i: its scale and zero are (out,). rest (in, out) are the columns as
             rows, updated up to column i inside the block, without the updates of the block after it
    block    columns in a lazy batch"""
    width = W.shape[1]
    rest = np.array(W.T, order="C")                                  # (in, out): a column of W is a contiguous row
    codes = np.empty(rest.shape, np.uint8)
    errors = np.empty_like(rest)
    for first in range(0, width, block):
        last = min(first + block, width)
        gptq_block(rest, codes, errors, U, grid_of, first, last)
        rest[last:] -= U[first:last, last:].T @ errors[first:last]
    return codes.T, errors.T


def gptq_block(
    rest: np.ndarray, codes: np.ndarray, errors: np.ndarray, U: np.ndarray, grid_of: Callable[[int, np.ndarray], Grid],
    first: int, last: int,
) -> None:
    """Round the columns i = first ... last − 1 one by one. Column i has the error e = (w − ŵ)/U_ii, where w has all
    updates so far, and the columns j after it lose U_ij e, but only up to last − 1.

    rest, codes and errors (in, out) change in place; row i belongs to column i of the weight. grid_of(i, rest) is asked
    once for each column, when it is its turn. At the end the columns from `last` on still lack the updates of this
    block."""
    for i in range(first, last):
        grid = grid_of(i, rest)
        w = rest[i]
        q = grid.encode(w)
        codes[i] = q
        errors[i] = (w - grid.decode(q)) / U[i, i]
        rest[i + 1:last] -= U[i, i + 1:last, None] * errors[i]


def inverse_factor(H: np.ndarray, damp: float) -> np.ndarray:
    """U (in, in), upper triangular, with (H + λ I)⁻¹ = Uᵀ U,  λ = damp · mean diag H.

    A matrix that is not positive definite in floating-point numbers gets ten times the damping, until it is.
    ValueError if H is no Hessian: it has negative eigenvalues."""
    while True:
        try:
            return upper_factor(add_damping(H, damp))
        except np.linalg.LinAlgError:
            damp = max(10 * damp, LEAST_DAMP)
            if damp > MOST_DAMP:
                raise ValueError("GPTQ wants a positive semi-definite Hessian, got one with negative eigenvalues") \
                    from None


def upper_factor(H: np.ndarray) -> np.ndarray:
    """U (in, in), upper triangular with a positive diagonal, with H⁻¹ = Uᵀ U. LinAlgError for an H that is not
    positive definite.

    U = R⁻¹ for an upper triangular R with H = R Rᵀ: a Cholesky factor whose rows and columns count backwards."""
    R = np.linalg.cholesky(H[::-1, ::-1])[::-1, ::-1]
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


# ── the grids of the columns ─────────────────────────────────────────────────────────────────────────────────────────
class Grids:
    """Which grid a column has."""

    def of_column(self, i: int, rest: np.ndarray) -> Grid:
        """The grid of column i; rest (in, out): the columns as rows, with their updates."""
        raise NotImplementedError

    def all(self) -> Grid:
        """The grids of all groups: scale and zero are (out, groups)."""
        raise NotImplementedError


class GroupGrids(Grids):
    """A group is `group` neighbours in the order of the columns. Its grid is fitted when the first of them is reached,
    to their weights with all updates."""

    def __init__(self, kind: str, bits: int, group: int):
        self.kind = kind
        self.bits = bits
        self.group = group
        self.found: list[Grid] = []

    def of_column(self, i: int, rest: np.ndarray) -> Grid:
        """The grid of the group that column i is in."""
        if i % self.group == 0:
            weights = rest[i:i + self.group].T                                           # (out, g)
            self.found.append(fit_grid(weights, self.kind, self.bits, half_scales=True))
        return self.found[-1][:, 0]

    def all(self) -> Grid:
        """The grids in the order of the groups."""
        return join_grids(self.found)


class StaticGrids(Grids):
    """Grids that are known before: column i belongs to the group group_of[i]."""

    def __init__(self, grids: Grid, group_of: np.ndarray):
        self.grids = grids
        self.group_of = group_of

    def of_column(self, i: int, rest: np.ndarray) -> Grid:
        """The grid of the group that column i is in."""
        return self.grids[:, self.group_of[i]]

    def all(self) -> Grid:
        """The grids as they were given."""
        return self.grids


def in_own_order(codes: np.ndarray, order: np.ndarray) -> np.ndarray:
    """codes (out, in), whose column k belongs to the input order[k], with the columns in the order of the inputs."""
    own = np.empty_like(codes)
    own[:, order] = codes
    return own


def whole_groups(block: int, group: int) -> int:
    """The columns of a lazy batch, such that no group lies across its end while part of its updates is missing: a
    multiple of the group, or a divisor."""
    if group < block:
        return block // group * group
    return block if group % block == 0 else group

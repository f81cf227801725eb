"""GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers.  Frantar, Ashkboos, Hoefler,
Alistarh, 2022.  arXiv:2210.17323

    minimise  tr (W − Ŵ) H (W − Ŵ)ᵀ      W (out, in) given,  Ŵ on a grid                                     §3, eq. 1
    H = 2/n Xᵀ X  (in, in), the Hessian,  X (n, in) the inputs of the layer for n calibration tokens

    (H + λ I)⁻¹ = Uᵀ U,  U upper triangular,  λ = damp · mean diag H                                         §4, step 3
    for each column i:    q = the nearest value of the grid to W[:, i]                                      Algorithm 1
                          e = (W[:, i] − q) / U[i, i]
                          W[:, j] ← W[:, j] − e U[i, j]      for all columns j > i

Each column is rounded to nearest. The columns that are not rounded yet then change, so that they make up for its error,
as in OBQ (obq.py). OBQ chooses an order for each row. GPTQ rounds the columns of all rows in one order (step 1).

Before column i is rounded, leave the columns that are rounded already out of H + λ I (rows and columns). Let G be the
inverse of what is left. In OBQ each row of W has its own G. Here all rows share one. The step of column i needs only
row i of G. U stores it: row i of U is row i of G, divided by √G_ii.

Lazy batches (step 2): while a block of columns is rounded, only the columns of this block are updated. The columns
after the block then get all updates of the block in one matrix product.

The errors e are the columns of a matrix E (out, in). Then W − Ŵ = E U, where W is the weight before all updates. Since
U (H + λ I) Uᵀ = I, the minimised quantity is ‖E‖² with H + λ I in place of H.

Departures:
- The paper computes (H + λ I)⁻¹ and takes its Cholesky factor U. We factor H + λ I = R Rᵀ, R upper triangular, and take
  U = R⁻¹. This is the same U, with fewer operations.
- λ grows if the factorisation fails.
- The grid of a group is fitted to weights that have all updates. The paper's program fits it to weights that lack the
  updates of the current block.
- The mean of diag H leaves out dead inputs, those that were 0 for every token.
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

# The rule computes in float64 if a weight is larger than LARGE: updates can make it larger still, and float32 ends at
# 3.4e38.
LARGE = 1e30
LEAST_DAMP = 1e-6                                        # the smallest `damp` after a failed factorisation
MOST_DAMP = 0.1                                          # the largest: if it fails too, inverse_factor gives up
LEAF = 64                                                # rows of a triangular matrix that NumPy inverts in one call


@dataclass(frozen=True)
class GPTQ(Rule):
    """Rounds column by column; the columns that follow make up for each error. Needs calibration data.

    bits           1 ... 8
    group          neighbours in a row that share a scale of the grid; None: the whole row
    grid           "affine", "symmetric", "absmax" (at least 2 bits), "ternary" (2 bits), "sign" (1 bit)
    damp           λ divided by the mean of diag H, at least 0
    block          the number of columns in a lazy batch. If it does not fit the groups, a near number is taken. It
                   changes the time. It does not change the result, but for rounding errors
    act_order      True: the columns are rounded in the order of falling H[j, j]. A group is then `group` neighbours in
                   this order. If there are several groups, the packed weight stores the order
    static_groups  True: the grids are fitted to the original weights. A group is then always `group` neighbours in a
                   row of W, even with act_order, and the packed weight stores no order

    TypeError or ValueError for a setting out of its range."""

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
        """The packed weight of W (out, in) for inputs with the Hessian H (in, in).

        TypeError without H, for a weight that is packed already and for arrays that are not of real numbers. ValueError
        for other shapes, for inf and NaN, and for an H that is not symmetric and positive semi-definite."""
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
            fitted = fit_groups(W, self.grid, self.bits, group, half_scales=True)        # scales that float16 holds
            group_of = order // group                                # (in,): the group of the column of each step
            grids: Grids = StaticGrids(fitted, group_of)
        else:
            grids = GroupGrids(self.grid, self.bits, group)
        if self.act_order:
            W = W[:, order]
            H = H[np.ix_(order, order)]
        U = inverse_factor(H, self.damp).astype(W.dtype)
        codes, _ = gptq_columns(W, U, grids.of_column, whole_groups(self.block, group))
        # Without static groups, the inputs of a group are neighbours only in `order`. So the codes stay in this order.
        # If one group is the whole row, the order does not matter.
        keeps_order = self.act_order and not self.static_groups and group < width
        if not keeps_order:
            codes = in_input_order(codes, order)
        return Uniform.from_grid(codes, grids.all(), kind=self.grid, bits=self.bits, group=group,
                                 order=order if keeps_order else None)


# ── the algorithm ────────────────────────────────────────────────────────────────────────────────────────────────────
def gptq_columns(
    W: np.ndarray, U: np.ndarray, grid_of: Callable[[int, np.ndarray], Grid], block: int = 128,
) -> tuple[np.ndarray, np.ndarray]:
    """The codes (out, in) uint8 of W (out, in), and the errors E (out, in), with W − Ŵ = E U. W is not changed.

    U        (in, in), the upper triangular factor of the inverse Hessian
    grid_of  grid_of(i, rest) returns the grid of column i, whose scale and zero are (out,). It is called once for each
             column, in order. Row j of rest (in, out) is column j of the weight with its updates so far. The columns of
             the current block have the updates of all columns before i. The columns after the current block have
             those of the earlier blocks
    block    the number of columns in a lazy batch"""
    width = W.shape[1]
    rest = np.array(W.T, order="C")                                  # (in, out): a column of W is a contiguous row
    codes = np.empty(rest.shape, np.uint8)
    errors = np.empty_like(rest)
    for first in range(0, width, block):
        last = min(first + block, width)
        gptq_block(rest, codes, errors, U, grid_of, first, last)
        rest[last:] -= U[first:last, last:].T @ errors[first:last]   # (after, block) @ (block, out)
    return codes.T, errors.T


def gptq_block(
    rest: np.ndarray, codes: np.ndarray, errors: np.ndarray, U: np.ndarray, grid_of: Callable[[int, np.ndarray], Grid],
    first: int, last: int,
) -> None:
    """Round the columns i = first ... last − 1 one by one. Column i has the error e = (w − ŵ)/U_ii, where w has all
    updates so far. Then the columns j = i + 1 ... last − 1 lose U_ij e.

    rest     (in, out), changed in place: row i is column i of the weight. On return, the columns from `last` on lack
             the updates of this block
    codes    (in, out) uint8, changed in place: rows first ... last − 1 are written
    errors   (in, out), changed in place: the same rows are written
    U        (in, in), the upper triangular factor of the inverse Hessian
    grid_of  grid_of(i, rest) returns the grid of column i. Call it once for each column, just before you round it"""
    for i in range(first, last):
        grid = grid_of(i, rest)
        w = rest[i]
        q = grid.encode(w)
        codes[i] = q
        errors[i] = (w - grid.decode(q)) / U[i, i]
        rest[i + 1:last] -= U[i, i + 1:last, None] * errors[i]       # (later, 1) · (out,)


def inverse_factor(H: np.ndarray, damp: float) -> np.ndarray:
    """U (in, in), upper triangular, with (H + λ I)⁻¹ = Uᵀ U,  λ = damp · mean diag H, for a Hessian H (in, in).

    If rounding errors make H + λ I indefinite, the factorisation is repeated with ten times the damping, at least
    LEAST_DAMP, until it succeeds. ValueError if that would take more than MOST_DAMP: H has negative eigenvalues."""
    while True:
        try:
            return upper_factor(add_damping(H, damp))
        except np.linalg.LinAlgError:
            damp = max(10 * damp, LEAST_DAMP)
            if damp > MOST_DAMP:
                raise ValueError("GPTQ wants a positive semi-definite Hessian, got one with negative eigenvalues") \
                    from None


def upper_factor(H: np.ndarray) -> np.ndarray:
    """U (in, in), upper triangular with a positive diagonal, with H⁻¹ = Uᵀ U for a positive definite H (in, in).

    If H = R Rᵀ with R upper triangular, then H⁻¹ = R⁻ᵀ R⁻¹, and U = R⁻¹. LinAlgError if H is not positive definite."""
    # NumPy's factor is lower triangular. So we reverse the rows and columns of H, factor, and reverse those of the
    # factor: this turns a lower triangular matrix into an upper triangular one.
    R = np.linalg.cholesky(H[::-1, ::-1])[::-1, ::-1]
    return inverse_upper(R)


def inverse_upper(R: np.ndarray, leaf: int = LEAF) -> np.ndarray:
    """R⁻¹ of an upper triangular R (n, n), by halves:  [[A, B], [0, C]]⁻¹ = [[A⁻¹, −A⁻¹ B C⁻¹], [0, C⁻¹]].

    A matrix of at most `leaf` rows is not divided: NumPy inverts it."""
    n = len(R)
    if n <= leaf:
        return np.triu(np.linalg.inv(R))                             # rounding errors below the diagonal become 0
    half = n // 2
    inverse = np.zeros_like(R)
    A = inverse_upper(R[:half, :half], leaf)
    C = inverse_upper(R[half:, half:], leaf)
    inverse[:half, :half] = A
    inverse[half:, half:] = C
    inverse[:half, half:] = -(A @ R[:half, half:]) @ C
    return inverse


# ── the grids of the columns ─────────────────────────────────────────────────────────────────────────────────────────
class Grids:
    """The grids of one weight; gptq_columns asks for that of one column at a time. Subclasses form the groups."""

    def of_column(self, i: int, rest: np.ndarray) -> Grid:
        """The grid of column i, counted in the order of rounding: scale and zero are (out,).

        Row j of rest (in, out) is column j of the weight with its updates so far."""
        raise NotImplementedError

    def all(self) -> Grid:
        """The grids of all groups: scale and zero are (out, groups)."""
        raise NotImplementedError


class GroupGrids(Grids):
    """Grids that are fitted during the rounding. A group is `group` neighbours in the order of rounding. Its grid is
    fitted when its first column has its turn. With the blocks of whole_groups, all columns of the group then have all
    updates so far.

    of_column is called with i = 0, 1, 2 ... in turn."""

    def __init__(self, kind: str, bits: int, group: int):
        self.kind = kind
        self.bits = bits
        self.group = group
        self.fitted: list[Grid] = []                                 # one for each group so far: scale (out, 1)

    def of_column(self, i: int, rest: np.ndarray) -> Grid:
        """The grid of the group of column i, which is the last one that was fitted."""
        if i % self.group == 0:
            weights = rest[i:i + self.group].T                                           # (out, g)
            self.fitted.append(fit_grid(weights, self.kind, self.bits, half_scales=True))
        return self.fitted[-1][:, 0]                                 # scale (out,)

    def all(self) -> Grid:
        """The grids in the order of the groups."""
        return join_grids(self.fitted)


class StaticGrids(Grids):
    """Grids that were fitted before the rounding; scale and zero are (out, groups).

    group_of (in,): the group of each column, in the order of rounding."""

    def __init__(self, grids: Grid, group_of: np.ndarray):
        self.grids = grids
        self.group_of = group_of

    def of_column(self, i: int, rest: np.ndarray) -> Grid:
        """The grid of the group of column i."""
        return self.grids[:, self.group_of[i]]

    def all(self) -> Grid:
        """The grids as they were given."""
        return self.grids


def in_input_order(codes: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The codes (out, in) with column j for input j, from codes (out, in) with column k for input order[k]."""
    sorted_codes = np.empty_like(codes)
    sorted_codes[:, order] = codes
    return sorted_codes


def whole_groups(block: int, group: int) -> int:
    """The number of columns in a lazy batch: `block`, or near it.

    The number is a multiple of `group`, or divides it. So a group begins with the first column of a batch, or it lies
    within one batch. In both cases all columns of the group have all updates so far when its grid is fitted. If a group
    began inside of a batch and ended after it, its last columns would lack the updates of this batch."""
    if group < block:
        return block // group * group
    return block if group % block == 0 else group

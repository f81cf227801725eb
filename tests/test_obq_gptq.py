"""OBQ and GPTQ against the mathematics of their papers: independent oracles, exact properties, wrong answers.

Oracles: the exact minimiser of the loss with some weights fixed, by solving a linear system (`refitted`); every next
choice of OBQ by trying all of them (`obq_by_trying`); Babai's nearest plane (arXiv:2507.18553). None of them knows a
factor U or an eliminated inverse G.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from helpers import host, wrong_answers

import tinyft as ft
from tinyft.compress.grids import Grid, fit_grid, fit_groups
from tinyft.compress.grouped import Uniform
from tinyft.compress.quantize import gptq, obq

GRIDS = [("affine", 4), ("affine", 2), ("symmetric", 3), ("absmax", 3), ("ternary", 2), ("sign", 1), ("affine", 8)]
CASES = list(range(48))


# ── cases ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def weights(rng: np.random.Generator, out: int, width: int) -> np.ndarray:
    """Rows of several sizes; the first is often awkward: zero, constant, of one sign, with an outlier, on a grid."""
    W = rng.standard_normal((out, width)) * rng.choice([0.1, 1, 10], (out, 1))
    kind = rng.integers(0, 10)
    if kind == 0:
        W[0] = 0
    elif kind == 1:
        W[0] = 3.5
    elif kind == 2:
        W[0] = abs(W[0]) + 10
    elif kind == 3:
        W[0, rng.integers(width)] = 1e4
    elif kind == 4:
        W[0] = rng.integers(-6, 7, width) / 2
    return W


def hessian(rng: np.random.Generator, width: int, tokens: int | None = None, rho: float = 0.7) -> np.ndarray:
    """2/n Σ x xᵀ of inputs whose neighbours correlate by rho, of several sizes."""
    tokens = 4 * width if tokens is None else tokens
    X = rng.standard_normal((width, tokens))
    for i in range(1, width):
        X[i] = rho * X[i - 1] + np.sqrt(1 - rho**2) * X[i]
    X *= rng.choice([0.3, 1, 3], (width, 1))
    return 2 / tokens * X @ X.T


def case(seed: int, width: int | None = None) -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
    """A generator, W (out, in) and H (in, in)."""
    rng = np.random.default_rng(seed)
    width = int(rng.integers(1, 20)) if width is None else width
    return rng, weights(rng, int(rng.integers(1, 6)), width), hessian(rng, width)


def losses(W: np.ndarray, Q: np.ndarray, H: np.ndarray) -> np.ndarray:
    """½ (w − q) H (w − q)ᵀ of each row."""
    D = W - Q
    return 0.5 * np.einsum("ij,jk,ik->i", D, H, D)


def dense(rule: ft.compress.Rule, W: np.ndarray, H: np.ndarray) -> np.ndarray:
    """The dense weight that a rule gives, float64. A code times a scale of float16 is exact in float32."""
    return host(rule(W, H).dequantize()).astype(np.float64)


# ── oracles ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def refitted(W: np.ndarray, Q: np.ndarray, H: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """W (out, in) with the columns `fixed` (in,) as in Q, and the others where the loss is least."""
    free = ~fixed
    best = Q.copy()
    D = (W - Q)[:, fixed]
    best[:, free] = W[:, free] + np.linalg.solve(H[np.ix_(free, free)], H[np.ix_(free, fixed)] @ D.T).T
    return best


def gptq_by_refitting(
    W: np.ndarray, H: np.ndarray, kind: str, bits: int, group: int, static: bool = False,
    order: np.ndarray | None = None,
) -> np.ndarray:
    """GPTQ without a factor: the columns that are left are fitted again, exactly, before each is rounded."""
    width = W.shape[1]
    order = np.arange(width) if order is None else order
    Q = np.zeros_like(W)
    fixed = np.zeros(width, bool)
    grids: dict[int, Grid] = {}
    if static:
        for k in range(-(-width // group)):
            grids[k] = fit_grid(W[:, k * group:(k + 1) * group], kind, bits, half_scales=True)
    for position, j in enumerate(order):
        now = refitted(W, Q, H, fixed)
        k = j // group if static else position // group
        if k not in grids:
            grids[k] = fit_grid(now[:, order[position:position + group]], kind, bits, half_scales=True)
        Q[:, j] = grids[k].round(now[:, j:j + 1])[:, 0]
        fixed[j] = True
    return Q


def obq_by_trying(w: np.ndarray, H: np.ndarray, grid: Grid) -> tuple[np.ndarray, list[int], list[float]]:
    """OBQ without an inverse: each free weight is rounded in turn, the others fitted again, and the best kept."""
    W = w[None]
    Q = np.zeros_like(W)
    fixed = np.zeros(len(w), bool)
    order: list[int] = []
    steps: list[float] = []
    spent = 0.0
    scale = np.broadcast_to(grid.scale, w.shape)
    for _ in w:
        now = refitted(W, Q, H, fixed)[0]
        rounded = grid.round(now)
        off = np.where(fixed, 0, abs(now - rounded))
        far = off > scale / 2 * (1 + 1e-9)
        tried = {}
        for j in np.flatnonzero(~fixed):
            with_j = Q.copy()
            with_j[0, j] = rounded[j]
            also = fixed.copy()
            also[j] = True
            tried[int(j)] = losses(W, refitted(W, with_j, H, also), H)[0]
        j = int(np.where(far, off, 0).argmax()) if far.any() else min(tried, key=lambda j: tried[j])
        order.append(j)
        steps.append(tried[j] - spent)
        spent = tried[j]
        Q[0, j] = rounded[j]
        fixed[j] = True
    return Q[0], order, steps


def babai(W: np.ndarray, H: np.ndarray, grid: Grid) -> np.ndarray:
    """The nearest-plane algorithm in the basis R, H = R Rᵀ with R upper triangular."""
    R = np.linalg.inv(np.linalg.cholesky(np.linalg.inv(H)).T)
    Q = np.zeros_like(W)
    for i in range(W.shape[1]):
        target = W[:, i] + (W[:, :i] - Q[:, :i]) @ R[:i, i] / R[i, i]
        Q[:, i] = grid.round(target[:, None])[:, 0]
    return Q


# ── GPTQ: the algorithm ──────────────────────────────────────────────────────────────────────────────────────────────
def check_gptq(seed: int) -> None:
    """GPTQ in blocks, groups and orders of all kinds is GPTQ by refitting, for the damped H without dead inputs."""
    rng, W, H = case(seed)
    width = W.shape[1]
    dead = rng.random(width) < 0.15
    H[dead] = H[:, dead] = 0
    living = np.where(dead, 0, W)
    damp = rng.choice([0.0, 0.01, 0.1])
    unit = np.diagonal(H)[~dead].mean() if not dead.all() else 1.0
    full = H + damp * unit * np.eye(width)
    full[dead, dead] = unit
    kind, bits = GRIDS[seed % len(GRIDS)]
    group = int(rng.integers(1, width + 2))
    block = int(rng.integers(1, width + 2))
    for act_order in (False, True):
        for static in (False, True):
            rule = ft.GPTQ(bits, group, kind, float(damp), block, act_order, static)
            order = np.arange(width)
            if act_order:
                order = np.argsort(-np.where(dead, unit, np.diagonal(H)), kind="stable")
            expected = gptq_by_refitting(living, full, kind, bits, min(group, width), static, order)
            np.testing.assert_allclose(dense(rule, W, H), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", CASES)
def test_gptq_is_the_sequence_of_exact_refits(seed):
    check_gptq(seed)


@pytest.mark.parametrize("seed", CASES[:16])
def test_gptq_is_babai_s_nearest_plane_and_obq_in_a_forced_order(seed):
    _, W, H = case(seed)
    width = W.shape[1]
    grid = fit_groups(W, "affine", 3, width, half_scales=True)
    mine = dense(ft.GPTQ(3, None, damp=0.0), W, H)
    np.testing.assert_array_equal(mine, babai(W, H, grid))
    for i, w in enumerate(W):
        q, order, _ = obq.obq_row(w, H, grid[i], order=range(width))
        np.testing.assert_array_equal(order, range(width))
        np.testing.assert_array_equal(mine[i], q)


def check_errors(seed: int) -> None:
    """W − Ŵ = E U, so the loss is ½ ‖E‖², in blocks of any width."""
    rng, W, H = case(seed)
    width = W.shape[1]
    U = gptq.inverse_factor(H, 0.01)
    full = H + 0.01 * np.diagonal(H).mean() * np.eye(width)
    grid = fit_groups(W, "affine", 3, width)

    def of_column(i: int, rest: np.ndarray) -> Grid:
        return grid[:, 0]
    first = None
    for block in (1, 2, 3, width, 128):
        codes, E = gptq.gptq_columns(W, U, of_column, block)
        Q = grid.decode(codes.astype(float))
        np.testing.assert_allclose(E @ U, W - Q, rtol=1e-9, atol=1e-9 * abs(W).max())
        np.testing.assert_allclose(0.5 * (E**2).sum(axis=1), losses(W, Q, full), rtol=1e-9, atol=1e-15)
        first = codes if first is None else first
        np.testing.assert_array_equal(codes, first)
    assert W.dtype == np.float64 and codes.dtype == np.uint8


@pytest.mark.parametrize("seed", CASES[:16])
def test_the_errors_times_the_factor_are_what_rounding_changed(seed):
    check_errors(seed)


@pytest.mark.parametrize("least, damp", [(-3e-7, 1e-6), (-3e-6, 1e-5), (-3e-5, 1e-4), (-3e-4, 1e-3), (-3e-3, 1e-2)])
@pytest.mark.parametrize("unit", [1.0, 2.0**20])
def test_the_damping_grows_tenfold_until_the_factor_exists(least, damp, unit):
    H = unit * np.diag([1.0, 1.0, 1.0, least])
    U = gptq.inverse_factor(H, 0.0)
    np.testing.assert_allclose(1 / np.diagonal(U)**2, np.diagonal(H) + damp * np.diagonal(H).mean(), rtol=1e-12)


@pytest.mark.parametrize("block, group, columns", [
    (128, 1, 128), (128, 64, 128), (128, 3, 126), (128, 128, 128), (128, 100, 100), (100, 64, 64),
    (128, 256, 128), (128, 192, 192), (1, 64, 1), (128, 129, 129),
])
def test_a_lazy_batch_has_whole_groups_or_divides_one(block, group, columns):
    assert gptq.whole_groups(block, group) == columns


@pytest.mark.parametrize("W, dtype", [
    (np.full((2, 3), 1e30, np.float32), np.float32), (np.full((2, 3), 1.0, np.float32), np.float32),
    (np.full((2, 3), -1e31, np.float32), np.float64), (np.array([[1e31, 1, 1]], np.float32), np.float64),
    (np.full((2, 3), 1.0), np.float64),
])
def test_weights_of_32_bits_are_computed_in_32_bits_unless_they_are_large(W, dtype, monkeypatch):
    seen = []
    whole = gptq.gptq_columns

    def watched(W, U, *more):
        seen.append((W.dtype, U.dtype))
        return whole(W, U, *more)
    monkeypatch.setattr(gptq, "gptq_columns", watched)
    ft.GPTQ(4)(W, np.eye(3))
    assert seen == [(dtype, dtype)]


@pytest.mark.parametrize("width", [1, 2, 3, 64, 65, 150])
@pytest.mark.parametrize("damp", [0.0, 0.01, 1.0])
def test_the_factor_is_the_cholesky_factor_of_the_inverse(width, damp, rng):
    H = hessian(rng, width)
    U = gptq.inverse_factor(H, damp)
    full = H + damp * np.diagonal(H).mean() * np.eye(width)
    np.testing.assert_array_equal(U, np.triu(U))
    np.testing.assert_allclose(U, np.linalg.cholesky(np.linalg.inv(full)).T, rtol=1e-7, atol=1e-9)


def test_the_weight_is_not_changed(rng):
    _, W, H = case(3, width=9)
    H[2] = H[:, 2] = 0
    kept = W.copy(), H.copy()
    for rule in (ft.GPTQ(group=4, act_order=True), ft.OBQ(group=4)):
        rule(W, H)
        np.testing.assert_array_equal(W, kept[0])
        np.testing.assert_array_equal(H, kept[1])


def test_the_packed_weight_keeps_an_order_only_if_groups_are_scattered(rng):
    W, H = rng.standard_normal((3, 10)), hessian(rng, 10)
    assert ft.GPTQ(group=4)(W, H).order is None
    assert ft.GPTQ(group=4, act_order=True, static_groups=True)(W, H).order is None
    assert ft.GPTQ(group=None, act_order=True)(W, H).order is None
    order = host(ft.GPTQ(group=4, act_order=True)(W, H).order)
    assert (np.diff(np.diagonal(H)[order]) <= 0).all()


# ── properties of both ───────────────────────────────────────────────────────────────────────────────────────────────
def rules(kind: str, bits: int, group: int | None, **more: Any) -> list[ft.compress.Rule]:
    return [ft.OBQ(bits, group, kind), ft.GPTQ(bits, group, kind, **more),
            ft.GPTQ(bits, group, kind, act_order=True, static_groups=True, **more)]


@pytest.mark.parametrize("kind, bits", GRIDS)
@pytest.mark.parametrize("group", [None, 8, 7])
def test_independent_inputs_are_rounded_to_nearest(kind, bits, group, rng):
    W = weights(rng, 6, 20)
    if bits == 8:
        W = W.astype(np.float32)
    nearest = ft.RTN(bits, group, kind)(W)
    for H in (5 * np.eye(20), np.diag(rng.uniform(0.1, 10, 20))):
        for rule in rules(kind, bits, group):
            mine = rule(W, H)
            np.testing.assert_array_equal(mine.code_matrix(), nearest.code_matrix())
            np.testing.assert_array_equal(host(mine.dequantize()), host(nearest.dequantize()))


def test_weights_on_the_grid_stay(rng):
    for seed in range(10):
        _, W, H = case(seed, width=12)
        once = dense(ft.RTN(4, 5, "absmax"), W, None)            # its grid, fitted again, is the same
        for rule in rules("absmax", 4, 5):
            np.testing.assert_array_equal(dense(rule, once, H), once)


def test_the_unit_of_the_hessian_does_not_matter():
    for seed in range(8):
        _, W, H = case(seed, width=12)
        H[3] = H[:, 3] = 0
        for rule in rules("affine", 3, 5):
            expected = dense(rule, W, H)
            for unit in (2.0**-3, 2.0**40, 2.0**-900, 2.0**900):
                np.testing.assert_array_equal(dense(rule, W, H * unit), expected)
            np.testing.assert_array_equal(dense(rule, W.astype(np.float32), H * 2.0**900),
                                          dense(rule, W.astype(np.float32), H))


def test_rows_do_not_know_each_other():
    for seed in range(8):
        _, W, H = case(seed, width=12)
        for rule in rules("affine", 3, 5):
            together = dense(rule, W, H)
            for i in range(len(W)):
                np.testing.assert_array_equal(dense(rule, W[i:i + 1], H)[0], together[i])


def test_the_last_code_is_the_best_given_the_others():
    """The last column of GPTQ: no other value of its grid has a smaller loss."""
    for seed in range(20):
        _, W, H = case(seed)
        grid = fit_groups(W, "affine", 3, W.shape[1], half_scales=True)
        Q = dense(ft.GPTQ(3, None, damp=0.0), W, H)
        least = losses(W, Q, H)
        for code in range(8):
            other = Q.copy()
            other[:, -1] = grid.decode(np.full((len(W), 1), float(code)))[:, 0]
            assert (losses(W, other, H) >= least * (1 - 1e-9) - 1e-15).all()


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("kind, bits", GRIDS)
def test_with_two_inputs_no_row_is_worse_than_rounded_to_nearest(width, kind, bits):
    """The first column is the same, and the second is then the best there is."""
    for seed in range(40):
        _, W, H = case(seed, width=width)
        nearest = losses(W, dense(ft.RTN(bits, None, kind), W, None), H)
        mine = losses(W, dense(ft.GPTQ(bits, None, kind, damp=0.0), W, H), H)
        assert (mine <= nearest * (1 + 1e-9) + 1e-15).all()


def test_the_published_counterexample():
    """GPTQ does not always win: a row of three weights on whole numbers."""
    H = np.array([[0.71, 0.48, -0.54], [0.48, 1.74, -1.92], [-0.54, -1.92, 2.94]])
    w = np.array([[0.6, -2.4, 2.7]])
    grid = Grid(np.ones(1), 8.0, 15)
    codes, E = gptq.gptq_columns(w, gptq.inverse_factor(H, 0.0), lambda i, rest: grid)
    by_gptq = grid.decode(codes.astype(float))
    np.testing.assert_array_equal(by_gptq, [[1, -3, 2]])
    nearest = grid.round(w)
    np.testing.assert_array_equal(nearest, [[1, -2, 3]])
    np.testing.assert_allclose([losses(w, by_gptq, H)[0], losses(w, nearest, H)[0]], [0.3199, 0.1099], atol=5e-5)
    np.testing.assert_allclose(0.5 * (E**2).sum(), 0.3199, atol=5e-5)


# ── statistics over fixed seeds ──────────────────────────────────────────────────────────────────────────────────────
def ar_layer(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """W (8, 24) and the Hessian of 96 inputs, each 0.9 of its neighbour."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((24, 96))
    for i in range(1, 24):
        X[i] = 0.9 * X[i - 1] + np.sqrt(1 - 0.81) * X[i]
    return rng.standard_normal((8, 24)), 2 / 96 * X @ X.T


def share_of_wins(rule: Callable[[int], ft.compress.Rule], bits: int, count: int) -> tuple[float, float]:
    """The share of AR(1) layers whose loss is at most that of rounding to nearest, and the median ratio of the two."""
    ratios = []
    for seed in range(count):
        W, H = ar_layer(seed)
        nearest = losses(W, dense(ft.RTN(bits, None), W, None), H).sum()
        ratios.append(losses(W, dense(rule(bits), W, H), H).sum() / nearest)
    return float(np.mean(np.array(ratios) <= 1)), float(np.median(ratios))


def by_gptq(bits: int) -> ft.GPTQ:
    return ft.GPTQ(bits, None)


def by_obq(bits: int) -> ft.OBQ:
    return ft.OBQ(bits, None)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_beats_rounding_to_nearest_on_correlated_inputs(bits):
    share, ratio = share_of_wins(by_gptq, bits, 75)
    assert share >= 0.95
    assert ratio < 0.6


@pytest.mark.parametrize("bits", [3, 4])
def test_obq_beats_rounding_to_nearest_on_correlated_inputs(bits):
    share, ratio = share_of_wins(by_obq, bits, 30)
    assert share >= 0.95
    assert ratio < 0.6


# ── OBQ ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
def check_obq(seed: int) -> None:
    """The order, the increments and the values of OBQ are those of trying every weight in every step."""
    rng, W, H = case(seed, width=1 + seed % 11)
    width = W.shape[1]
    kind, bits = GRIDS[seed % len(GRIDS)]
    group = int(rng.integers(1, width + 1))
    grid = fit_groups(W, kind, bits, group, half_scales=True)[:, np.arange(width) // group]
    expected = []
    for i, w in enumerate(W):
        q, order, steps = obq_by_trying(w, H, grid[i])
        expected.append(q)
        mine = obq.obq_row(w, H, grid[i])
        np.testing.assert_array_equal(mine[1], order)
        np.testing.assert_array_equal(mine[0], q)
        np.testing.assert_allclose(mine[2], steps, rtol=1e-7, atol=1e-10 * max(steps))
        np.testing.assert_allclose(mine[2].sum(), losses(w[None], q[None], H)[0], rtol=1e-9, atol=1e-15)
    np.testing.assert_array_equal(obq.obq_rows(W, np.linalg.inv(H), grid), np.stack(expected))
    np.testing.assert_array_equal(dense(ft.OBQ(bits, group, kind), W, H), np.stack(expected))


@pytest.mark.parametrize("seed", CASES)
def test_obq_takes_the_cheapest_weight_and_refits_the_rest(seed):
    check_obq(seed)


def test_a_weight_that_was_pushed_off_its_grid_comes_first():
    """The first update moves weight 2 from 3.4 to 3.67, off a grid that ends at 3. It costs more than weight 1."""
    H = np.array([[1.0, 0.0, 0.9], [0.0, 1.0, 0.0], [0.9, 0.0, 1.0]])
    w = np.array([0.3, 0.499, 3.4])
    grid = Grid(np.ones(1), 4.0, 7)                                  # −4 ... 3
    q, order, _ = obq.obq_row(w, H, grid)
    np.testing.assert_array_equal(order[:2], [0, 2])
    assert q[2] == 3


def test_a_row_has_its_own_order(rng):
    """Two rows whose cheapest weights differ."""
    H = np.eye(3) + 0.5
    W = np.array([[0.01, 0.4, 0.3], [0.4, 0.3, 0.01]])
    orders = [list(obq.obq_row(w, H, Grid(np.ones(1), 8.0, 15))[1]) for w in W]
    assert orders[0][0] == 0
    assert orders[1][0] == 2


def test_more_rows_than_are_computed_together(rng, monkeypatch):
    """At most FACTORS numbers are in the factors of the rows that are computed together, or those of one row."""
    W, H = rng.standard_normal((7, 6)), hessian(rng, 6)
    expected = dense(ft.OBQ(3, 4), W, H)
    rows: list[int] = []
    whole = obq.obq_rows
    monkeypatch.setattr(obq, "obq_rows", lambda W, *more: rows.append(len(W)) or whole(W, *more))
    for numbers, together in ((1, [1] * 7), (2 * 36 + 1, [2, 2, 2, 1]), (3 * 36, [3, 3, 1]), (999, [7])):
        rows.clear()
        monkeypatch.setattr(obq, "FACTORS", numbers)
        np.testing.assert_array_equal(dense(ft.OBQ(3, 4), W, H), expected)
        assert rows == together


@pytest.mark.parametrize("part, is_off", [(1, False), (1 + 1e-9, False), (1 + 1.5e-9, True), (1.1, True)])
def test_a_weight_off_its_grid_is_farther_away_than_half_a_step_and_rounding(part, is_off):
    """The weight 1 costs less, and the weight 0 comes first only if it is off its grid."""
    scale = np.array([4.0])
    error = np.array([part * 2.0, 0.001])
    assert obq.cheapest(error, np.ones(2), np.ones(2, bool), scale) == (0 if is_off else 1)
    assert obq.cheapest(-error, np.ones(2), np.ones(2, bool), scale) == (0 if is_off else 1)
    assert obq.cheapest(error, np.ones(2), np.array([False, True]), scale) == 1


@pytest.mark.parametrize("unit", [1.0, 2.0**20, 2.0**-20])
@pytest.mark.parametrize("diagonal, damp, expected", [
    ([1, 2, 3], 0.0, 0.0), ([1, 2, 3], 0.5, 0.5), ([1, 2, 3], 0.001, 0.001),
    ([0, 2], 0.0, 0.01),                                             # singular
    ([0, 2], 1e-12, 0.01), ([0, 2], 0.001, 0.001), ([0, 2], 0.02, 0.02),
    ([0, 2], 2e-10, 2e-10),                                          # at the limit: 1e-10 of the largest
    ([5e-10, *[1e-8] * 8, 10], 0.0, 0.01), ([2e-9, *[1e-8] * 8, 10], 0.0, 0.0),        # beside it
])
def test_obq_is_damped_only_close_to_singular(diagonal, damp, expected, unit):
    """λ as a part of the mean of H's diagonal, in every unit."""
    H = unit * np.diag(np.array(diagonal, float))
    mean = H.trace() / len(H)
    wanted = H + expected * mean * np.eye(len(H))
    np.testing.assert_allclose(obq.damped(H, damp), wanted, rtol=1e-14, atol=0)


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind, bits", GRIDS)
def test_dead_inputs_get_zero_and_do_not_touch_the_grid(kind, bits, rng):
    W, H = rng.standard_normal((4, 12)), hessian(rng, 12)
    H[3] = H[:, 3] = H[10] = H[:, 10] = 0
    W[:, 3] = 1e4
    without = np.where(np.isin(np.arange(12), (3, 10)), 0, W)
    for rule in rules(kind, bits, 5):
        Q = dense(rule, W, H)
        np.testing.assert_array_equal(Q, dense(rule, without, H))
        if kind != "sign":
            assert (Q[:, [3, 10]] == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_finite_input_gives_finite_weights(dtype, rng):
    sizes = (1, 1e-30, 1e20, 3e37) if dtype == np.float32 else (1, 1e-30, 1e20, 1e37)
    singular = hessian(rng, 12, tokens=5)
    one_token = hessian(rng, 12, tokens=1)
    twice = np.kron(np.ones((2, 2)), hessian(rng, 6))                # every input occurs twice
    spread = np.diag(10.0**np.arange(-12, 12, 2))
    for size in sizes:
        W = (weights(rng, 4, 12) / 1e4 * size).astype(dtype)
        for H in (singular, one_token, twice, spread, np.zeros((12, 12)), np.full((12, 12), 1e-320)):
            for rule in (*rules("affine", 3, 5), ft.GPTQ(4, None, damp=0.0), ft.GPTQ(2, 5, damp=0.0, act_order=True)):
                assert np.isfinite(dense(rule, W, H)).all()


@pytest.mark.parametrize("rule", [ft.OBQ(4), ft.GPTQ(4), ft.GPTQ(4, damp=0.0)])
def test_what_is_no_hessian_is_refused(rule, rng):
    W = rng.standard_normal((2, 6))
    bad = np.eye(6) - 2 * np.eye(6, k=1) - 2 * np.eye(6, k=-1)
    with pytest.raises(ValueError, match="negative eigenvalues"):
        rule(W, bad)
    with pytest.raises(ValueError, match="diagonal"):
        rule(W, -np.eye(6))
    with pytest.raises(ValueError, match="finite"):
        rule(W, np.full((6, 6), np.nan))
    with pytest.raises(ValueError, match=r"\(6, 6\)"):
        rule(W, np.eye(5))
    for unit in (1e-200, 1, 1e200):
        for other in (np.triu(np.ones((6, 6))), np.eye(6) + 0.1 * np.eye(6, k=2)):
            with pytest.raises(ValueError, match=r"symmetric Hessian, got one in which H\[i, j\] and H\[j, i\] differ"):
                rule(W, unit * other)
    with pytest.raises(TypeError, match="calibration"):
        rule(W)
    with pytest.raises(TypeError, match="packed already"):
        rule(ft.RTN()(W), np.eye(6))


def test_rounding_errors_below_zero_are_no_negative_eigenvalues(rng):
    """A product in float32 of few tokens: its smallest eigenvalues are about −1e-7 of the largest."""
    X = rng.standard_normal((5, 40)).astype(np.float32)
    H = (X.T @ X).astype(np.float64)
    assert np.linalg.eigvalsh(H)[0] < 0
    W = rng.standard_normal((3, 40))
    for rule in (ft.OBQ(4), ft.GPTQ(4), ft.GPTQ(4, damp=0.0)):
        assert np.isfinite(dense(rule, W, H)).all()


def test_rounding_to_16_bits_is_no_asymmetry(rng):
    """The two halves of H, as a product that rounds each entry by itself gives them."""
    H = hessian(rng, 12)
    H /= np.diagonal(H).max()
    rounded = H + rng.uniform(-1, 1, H.shape) * 2.0**-8 * np.diagonal(H).min()
    W = rng.standard_normal((3, 12))
    for rule in (ft.OBQ(4), ft.GPTQ(4), ft.AWQ(4)):
        assert np.isfinite(dense(rule, W, rounded)).all()


def test_weights_of_32_bits_lose_nothing_that_matters():
    """Some codes differ where float32 rounds another way; the loss does not."""
    ratios = []
    for seed in range(20):
        W, H = ar_layer(seed)
        W = W.astype(np.float32)
        exact = losses(W, dense(ft.GPTQ(3, 8), W.astype(np.float64), H), H).sum()
        ratios.append(losses(W, dense(ft.GPTQ(3, 8), W, H), H).sum() / exact)
    np.testing.assert_allclose(np.median(ratios), 1, rtol=1e-6)
    np.testing.assert_allclose(ratios, 1, rtol=0.05)


# ── wrong answers ────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass
class Wrong:
    """A wrong part of OBQ or GPTQ, and the false belief that makes it look right."""

    module: ModuleType
    name: str
    belief: str
    f: Any


WRONG: dict[str, Wrong] = {}


def instead_of(module: ModuleType, name: str, belief: str) -> Callable:
    """Decorator: register what stands in the place of module.name."""
    def register(f: Any) -> Any:
        WRONG[f.__name__] = Wrong(module, name, belief, f)
        return f
    return register


right_columns = gptq.gptq_columns
right_block = gptq.gptq_block
right_step = obq.obq_step
right_row = obq.obq_row


@instead_of(gptq, "gptq_block", "The error of a column concerns this column only.")
def no_feedback(rest, codes, errors, U, grid_of, first, last):
    for i in range(first, last):
        grid = grid_of(i, rest)
        codes[i] = grid.encode(rest[i])
        errors[i] = 0


@instead_of(gptq, "gptq_block", "e is the error of the column: nothing to divide it by.")
def without_the_diagonal(rest, codes, errors, U, grid_of, first, last):
    for i in range(first, last):
        grid = grid_of(i, rest)
        codes[i] = grid.encode(rest[i])
        errors[i] = rest[i] - grid.decode(grid.encode(rest[i]))
        rest[i + 1:last] -= U[i, i + 1:last, None] * errors[i]


@instead_of(gptq, "gptq_block", "Inside a block, the rows and columns of U count from the start of the block.")
def with_the_first_corner_of_the_factor(rest, codes, errors, U, grid_of, first, last):
    own = slice(0, last - first)
    right_block(rest[first:last], codes[first:last], errors[first:last], U[own, own],
                lambda i, part: grid_of(first + i, rest), 0, last - first)


@instead_of(gptq, "gptq_block", "A group's grid may be read from the weights as the last block left them.")
def with_stale_grids(rest, codes, errors, U, grid_of, first, last):
    stale = rest.copy()
    right_block(rest, codes, errors, U, lambda i, _: grid_of(i, stale), first, last)


@instead_of(gptq, "gptq_block", "The updates show where the weights should go; the codes are those of the weights.")
def with_codes_of_the_weights_before(rest, codes, errors, U, grid_of, first, last):
    before = rest.copy()
    grids = {}

    def of_column(i, part):
        grids[i] = grid_of(i, part)
        return grids[i]
    right_block(rest, codes, errors, U, of_column, first, last)
    for i in range(first, last):
        codes[i] = grids[i].encode(before[i])


@instead_of(gptq, "gptq_columns", "A lazy batch makes up for its own errors: the blocks are independent.")
def blocks_apart(W, U, grid_of, block=128):
    parts = []
    for first in range(0, W.shape[1], block):
        own = slice(first, first + block)
        parts.append(right_columns(W[:, own], U[own, own], lambda i, rest, first=first: grid_of(first + i, W.T), block))
    return tuple(np.concatenate(found, axis=1) for found in zip(*parts, strict=True))


@instead_of(gptq, "whole_groups", "The width of a lazy batch is free: it changes the time, not the result.")
def blocks_across_groups(block, group):
    return block


@instead_of(gptq, "inverse_factor", "Damping is for singular matrices.")
def undamped(H, damp):
    return np.linalg.cholesky(np.linalg.inv(H)).T


@instead_of(gptq, "inverse_factor", "NumPy's Cholesky factor is the paper's: H⁻¹ = L Lᵀ, and L is triangular.")
def lower_factor(H, damp):
    return np.linalg.cholesky(np.linalg.inv(H + damp * np.diagonal(H).mean() * np.eye(len(H))))


@instead_of(gptq, "inverse_factor", "The inverse of H's factor is the factor of H's inverse.")
def the_other_root(H, damp):
    return np.linalg.inv(np.linalg.cholesky(H + damp * np.diagonal(H).mean() * np.eye(len(H)))).T


@instead_of(gptq, "inverse_factor", "The factor of H tells how inputs correlate: no inverse is needed.")
def factor_of_h(H, damp):
    return np.linalg.cholesky(H + damp * np.diagonal(H).mean() * np.eye(len(H))).T


@instead_of(gptq, "inverse_factor", "One inverse serves all steps: columns that are done need not be eliminated.")
def nothing_eliminated(H, damp):
    G = np.linalg.inv(H + damp * np.diagonal(H).mean() * np.eye(len(H)))
    return np.triu(G / np.sqrt(np.diagonal(G))[:, None])


@instead_of(gptq, "inverse_factor", "λ is the damping: 0.01 in any unit.")
def damped_in_no_unit(H, damp):
    return np.linalg.cholesky(np.linalg.inv(H + damp * np.eye(len(H)))).T


@instead_of(gptq, "in_input_order", "The order is undone by applying it again.")
def ordered_twice(codes, order):
    return codes[:, order]


@instead_of(gptq, "in_input_order", "Columns of a quantized weight lie where they were quantized.")
def order_not_undone(codes, order):
    return codes


@instead_of(gptq, "Uniform", "A group is g neighbours of the weight, whatever the order was.")
class OrderForgotten(Uniform):
    @classmethod
    def from_grid(cls, codes, grid, *, order=None, **more):
        if order is not None:
            codes = gptq.in_input_order(codes, order)
        return Uniform.from_grid(codes, grid, **more)


def dead_weights_kept(W, H):
    dead = np.diagonal(H) == 0
    unit = np.diagonal(H)[~dead].mean() if not dead.all() else 1.0
    return W, np.where(np.diag(dead), 1, H / unit)


BELIEF = "H[j, j] = 1 makes a dead input harmless: its weight may stay, and count for the grid."
WRONG["dead_weights_kept in GPTQ"] = Wrong(gptq, "without_dead_inputs", BELIEF, dead_weights_kept)
WRONG["dead_weights_kept in OBQ"] = Wrong(obq, "without_dead_inputs", BELIEF, dead_weights_kept)


@instead_of(obq, "cheapest", "The weight with the smallest rounding error costs least.")
def least_error(error, d, free, scale):
    return np.where(free, abs(error), np.inf).argmin(axis=-1)


@instead_of(obq, "cheapest", "The cost decides alone, also for weights off their grid.")
def no_outliers(error, d, free, scale):
    return np.where(free, error**2 / np.where(free, d, 1), np.inf).argmin(axis=-1)


@instead_of(obq, "cheapest", "Large errors first, while many weights can still make up for them.")
def dearest(error, d, free, scale):
    return np.where(free, error**2 / np.where(free, d, 1), -1).argmax(axis=-1)


@instead_of(obq, "cheapest", "The left-most weight will do: the order hardly matters.")
def from_left_to_right(error, d, free, scale):
    return free.argmax(axis=-1)


@instead_of(obq, "obq_step", "The inverse of H serves all steps.")
def without_elimination(w, G, free, j, q):
    return right_step(w, G.copy(), free, j, q)


@instead_of(obq, "obq_step", "G_jj only matters for the choice, not for the update.")
def update_without_the_diagonal(w, G, free, j, q):
    move = (w[j] - q) * G[j, free] * (1 / G[j, j] - 1)
    loss = right_step(w, G, free.copy(), j, q)
    w[free] += move
    w[j] = q
    free[j] = False
    return loss


@instead_of(obq, "obq_step", "A step adds ½ (w_j − q)² to the loss.")
def loss_without_the_diagonal(w, G, free, j, q):
    loss = 0.5 * (w[j] - q)**2
    right_step(w, G, free, j, q)
    return loss


@instead_of(obq, "obq_rows", "Rows share H, so they share its best order.")
def the_order_of_the_first_row(W, inverse, grid):
    H = np.linalg.inv(inverse)
    order = right_row(W[0], H, grid[0])[1]
    return np.stack([right_row(w, H, grid[r], order)[0] for r, w in enumerate(W)])


@instead_of(obq, "obq_rows", "The costs in the first step are the costs of all steps.")
def the_order_of_the_first_costs(W, inverse, grid):
    H = np.linalg.inv(inverse)
    orders = ((W - grid.round(W))**2 / np.diagonal(inverse)).argsort(axis=1)
    return np.stack([right_row(w, H, grid[r], orders[r])[0] for r, w in enumerate(W)])


@instead_of(obq, "damped", "A little damping never hurts.")
def always_damped(H, damp):
    return H + 0.01 * np.diagonal(H).mean() * np.eye(len(H))


def check_dead(seed: int) -> None:
    """The weight of a dead input has no effect, and becomes 0."""
    _, W, H = case(seed, width=8)
    H[3] = H[:, 3] = 0
    other = W.copy()
    other[:, 3] = 50
    for rule in rules("affine", 3, 4):
        Q = dense(rule, other, H)
        np.testing.assert_array_equal(Q, dense(rule, W, H))
        assert (Q[:, 3] == 0).all()


CHECKS = {gptq: (check_gptq, check_errors, check_dead), obq: (check_obq, check_dead)}


@wrong_answers
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_rejected(name, monkeypatch):
    wrong = WRONG[name]
    assert wrong.belief.endswith(".")
    monkeypatch.setattr(wrong.module, wrong.name, wrong.f)
    for seed in CASES:
        for check in CHECKS[wrong.module]:
            try:
                check(seed)
            except AssertionError:
                return
            except np.linalg.LinAlgError:            # a factor that does not exist is an answer too
                return
    pytest.fail(f"{name} passes")


def test_the_wrong_answers_have_different_beliefs():
    assert len(WRONG) >= 25
    assert len({wrong.belief for wrong in WRONG.values()}) == len(WRONG) - 1

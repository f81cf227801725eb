"""OBQ and GPTQ against the mathematics of their papers: independent oracles, exact properties, wrong answers."""
from __future__ import annotations

import numpy as np
import pytest
from helpers import host

import tinyft as ft
from tinyft.compress.grids import Grid, fit_grid
from tinyft.compress.quantize.obq import obq_row, obq_rows, part_of


# ── cases ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def weights(rng: np.random.Generator, out: int, width: int) -> np.ndarray:
    """Rows of many sizes, some of them awkward: zero, constant, of one sign, with a huge outlier, with ties."""
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


def hessian(rng: np.random.Generator, width: int, tokens: int | None = None, rho: float = 0.6) -> np.ndarray:
    """2/n X Xᵀ of correlated inputs: neighbours by rho, and a common part."""
    tokens = 4 * width if tokens is None else tokens
    X = rng.standard_normal((width, tokens)) * rng.choice([0.3, 1, 3], (width, 1))
    for i in range(1, width):
        X[i] = rho * X[i - 1] + np.sqrt(1 - rho**2) * X[i]
    return 2 / tokens * X @ X.T


def losses(W: np.ndarray, Q: np.ndarray, H: np.ndarray) -> np.ndarray:
    """½ (w − q) H (w − q)ᵀ of each row."""
    D = W - Q
    return 0.5 * np.einsum("ij,jk,ik->i", D, H, D)


CASES = list(range(60))


def case(seed: int) -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    width = int(rng.integers(1, 20))
    return rng, weights(rng, int(rng.integers(1, 6)), width), hessian(rng, width)


# ── OBQ ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("seed", CASES)
def test_the_increments_of_obq_sum_to_the_loss(seed):
    _, W, H = case(seed)
    for w in W:
        grid = fit_grid(w, "affine", 3)
        q, order, steps = obq_row(w, H, grid)
        assert sorted(order) == list(range(len(w)))
        np.testing.assert_allclose(q, grid.round(q), rtol=1e-12)
        np.testing.assert_allclose(steps.sum(), losses(w[None], q[None], H)[0], rtol=1e-8, atol=1e-12)
        assert (steps >= 0).all()


@pytest.mark.parametrize("seed", CASES)
def test_many_rows_at_a_time_are_the_rows_one_by_one(seed):
    _, W, H = case(seed)
    grid = fit_grid(W, "affine", 3)
    together = obq_rows(W, np.linalg.inv(H), grid)
    for i, w in enumerate(W):
        np.testing.assert_allclose(together[i], obq_row(w, H, part_of(grid, i))[0], rtol=1e-12)


def test_obq_of_independent_inputs_rounds_to_nearest(rng):
    W = rng.standard_normal((6, 20))
    for group in (None, 8, 7):
        for kind, bits in (("affine", 3), ("symmetric", 4), ("absmax", 2), ("ternary", 2), ("sign", 1)):
            mine = ft.OBQ(bits, group, kind)(W, 5 * np.eye(20))
            nearest = ft.RTN(bits, group, kind)(W)
            np.testing.assert_array_equal(mine.code_matrix(), nearest.code_matrix())
            np.testing.assert_array_equal(host(mine.dequantize()), host(nearest.dequantize()))


def test_a_dead_input_gets_a_weight_of_zero_and_a_singular_hessian_is_damped(rng):
    W = rng.standard_normal((4, 12))
    H = hessian(rng, 12, tokens=5)
    H[3] = H[:, 3] = 0
    dense = host(ft.OBQ(4, None)(W, H).dequantize())
    assert np.isfinite(dense).all()
    assert (dense[:, 3] == 0).all()
    assert (host(ft.OBQ(4)(W, np.zeros((12, 12))).dequantize()) == 0).all()
    with pytest.raises(ValueError, match="negative eigenvalues"):
        ft.OBQ(4)(W, np.eye(12) - 2 * np.eye(12, k=1) - 2 * np.eye(12, k=-1))


def test_the_published_counterexample():
    """GPTQ does not always win: a row of three weights on whole numbers."""
    H = np.array([[0.71, 0.48, -0.54], [0.48, 1.74, -1.92], [-0.54, -1.92, 2.94]])
    w = np.array([0.6, -2.4, 2.7])
    grid = Grid(np.ones(1), 8.0, 15)
    by_gptq = obq_row(w, H, grid, order=[0, 1, 2])[0]
    np.testing.assert_array_equal(by_gptq, [1, -3, 2])
    nearest = grid.round(w)
    np.testing.assert_array_equal(nearest, [1, -2, 3])
    np.testing.assert_allclose(losses(np.stack([w, w]), np.stack([by_gptq, nearest]), H), [0.3199, 0.1099], atol=5e-5)

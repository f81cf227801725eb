"""Numbers in single precision: small results keep their digits, and nothing overflows, also where x is extreme.

The truth is a formula in double precision that is exact there. tests/peers/test_torch_numbers.py has PyTorch beside
every function of one variable.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from helpers import dev, gradcheck, host, leaf, wrong_answers

from tinyft import functional as F
from tinyft import kernels, ops
from tinyft.kernels import numpy as fast
from tinyft.tensor import OPS, Tensor

pytestmark = pytest.mark.usefixtures("with_and_without_kernels")
MAGNITUDES = np.concatenate([np.logspace(-30, -3, 28), np.linspace(0.01, 20, 400), np.linspace(21, 85, 65)])
X = np.concatenate([-MAGNITUDES[::-1], [0.0], MAGNITUDES]).astype(np.float32)


def small_sigmoid(x: np.ndarray) -> np.ndarray:
    """e^x / (1 + e^x) for x <= 0, in which nothing cancels."""
    return np.exp(x) / (1 + np.exp(x))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, 1 - small_sigmoid(-abs(x)), small_sigmoid(-abs(x)))


def slope(x: np.ndarray) -> np.ndarray:
    """The derivative of the sigmoid: e / (1 + e)², e = e^−|x|."""
    return np.exp(-abs(x)) / (1 + np.exp(-abs(x)))**2


VALUES_AND_SLOPES: dict[str, tuple[Callable, Callable]] = {
    "exp": (np.exp, np.exp),
    "sigmoid": (sigmoid, slope),
    "silu": (lambda x: x * sigmoid(x), lambda x: sigmoid(x) + x * slope(x)),
    "tanh": (np.tanh, lambda x: 1 / np.cosh(x)**2),
    "absolute": (abs, np.sign),
}


def check_digits(f: Callable, value: Callable, derivative: Callable, x: np.ndarray) -> None:
    """Value and derivative to 1e-6 of their own size."""
    t = leaf(x)
    y = f(t)
    y.backward(dev(np.ones(x.shape), np.float32))
    wide = x.astype(np.float64)
    np.testing.assert_allclose(host(y), value(wide), rtol=1e-6, atol=1e-38)
    np.testing.assert_allclose(host(t.grad), derivative(wide), rtol=1e-6, atol=1e-38)


def usual_range(name: str) -> np.ndarray:
    """X without the zero of the derivative of silu, around which its terms cancel, and tanh without its far tail, where
    the value is ±1 in single precision and the derivative 1 − y² therefore 0, as in PyTorch."""
    if name == "silu":
        return X[abs(X + 1.278) > 0.1]
    return X[abs(X) < 0.5] if name == "tanh" else X


@pytest.mark.parametrize("name", VALUES_AND_SLOPES)
def test_small_results_keep_their_digits(name):
    check_digits(OPS[name], *VALUES_AND_SLOPES[name], usual_range(name))


def by_tanh(x: Tensor) -> Tensor:
    """The sigmoid as (1 + tanh(x/2)) / 2: nothing overflows, but small values are multiples of 6e-8."""
    return (ops.tanh(x * 0.5) + 1) * 0.5


@wrong_answers
def test_a_sigmoid_without_digits_is_caught():
    with pytest.raises(AssertionError):
        check_digits(by_tanh, *VALUES_AND_SLOPES["sigmoid"], X)


def test_the_sigmoid_far_out():
    x = leaf([-20.0, -88.0, -1e4, -np.inf, 1e4, np.inf], np.float32)
    y = ops.sigmoid(x)
    y.backward(dev(np.ones(6), np.float32))
    assert host(y)[0] == pytest.approx(2.0611537e-09, rel=1e-6)
    assert 0 < host(y)[1] < 1e-38
    assert host(y)[2:].tolist() == [0, 0, 1, 1]
    assert host(x.grad)[2:].tolist() == [0, 0, 0, 0]


def test_gelu_far_below_zero():
    """x Φ(x) to 1e-6 of its size in the definition; the kernel for NumPy gives it up to 1e-6."""
    x = np.array([-12.0, -8.0, -5.0, -3.0], np.float32)
    with kernels.definitions():
        exact = host(ops.gelu(leaf(x)))
    np.testing.assert_allclose(exact, [-2.1317782e-32, -4.9767692e-15, -1.4332579e-06, -0.0040496940], rtol=1e-6)
    np.testing.assert_allclose(host(ops.gelu(leaf(x))), exact, atol=1e-6)


# ── layer norm ───────────────────────────────────────────────────────────────────────────────────────────────────────
def parameters(n: int) -> tuple[Tensor, Tensor]:
    return leaf(np.ones(n), np.float32), leaf(np.zeros(n), np.float32)


@pytest.mark.parametrize("n", [1, 3, 7, 12, 100, 768])
@pytest.mark.parametrize("x", [0.0, 0.1, 1.1, -0.7, 1000.1, 1e-30, 123456.7])
def test_layer_norm_of_equal_numbers_is_zero(n, x):
    row = leaf(np.full((2, n), x), np.float32)
    y = ops.layer_norm(row, *parameters(n), eps=1e-12)
    y.sum().backward()
    assert not host(y).any()
    assert np.isfinite(host(row.grad)).all()


@pytest.mark.parametrize("mean", [0, 1, 30, 1000, 1e5])
def test_layer_norm_of_rows_with_a_large_mean(mean, rng):
    """The rounding of the mean does not shift the row."""
    x = (rng.standard_normal((5, 300)) + mean).astype(np.float32)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(host(ops.layer_norm(leaf(x), *parameters(300))), want, atol=2e-5)


def test_the_kernel_centres_flat_rows_among_others(rng, monkeypatch):
    x = rng.standard_normal((6, 37)).astype(np.float32)
    x[1] = 3.3
    x[4] += 5000
    w, b = (host(t) for t in parameters(37))
    g = rng.standard_normal(x.shape).astype(np.float32)
    y, (dx, dw, _) = fast.layer_norm(x, w, b)
    want, (right_dx, right_dw, _) = OPS["layer_norm"].definition(x, w, b)
    np.testing.assert_allclose(y, want, atol=1e-5)
    assert not y[1].any()
    np.testing.assert_allclose(dx(g), right_dx(g), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dw(g), right_dw(g).sum(0), atol=1e-4)
    monkeypatch.setattr(fast, "FLAT", np.float32(0))
    assert abs(fast.layer_norm(x, w, b)[0] - want).max() > 1e-5, "the row far from 0 is no test"


# ── at zero ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_normalize_of_a_zero_row():
    """As in PyTorch: the norm is below eps, so the row is divided by eps, a constant."""
    x = leaf([[0.0, 0.0], [3.0, 4.0], [1e-20, 0.0]], np.float32)
    y = F.normalize(x)
    y.backward(dev([[1.0, 2.0], [1.0, 0.0], [1.0, 1.0]], np.float32))
    np.testing.assert_allclose(host(y), [[0, 0], [0.6, 0.8], [1e-8, 0]], rtol=1e-6)
    np.testing.assert_allclose(host(x.grad), [[1e12, 2e12], [0.128, -0.096], [1e12, 1e12]], rtol=1e-5)


def test_normalize_of_a_row_that_is_not_zero(rng):
    gradcheck(F.normalize, [rng.standard_normal((3, 4))], rng)
    gradcheck(lambda x: F.normalize(x, axis=0, eps=10.0), [rng.standard_normal((3, 4))], rng)


def test_log_softmax_and_softmax_far_out():
    x = leaf([[0.0, -80.0, -200.0], [1e4, 0.0, -1e4]], np.float32)
    np.testing.assert_allclose(host(ops.log_softmax(x)), [[0, -80, -200], [0, -1e4, -2e4]], rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(host(ops.softmax(x))[0], [1, np.exp(-80), 0], rtol=1e-6)
    masked = leaf([[0.0, -np.inf, 1.0]], np.float32)
    ops.log_softmax(masked)[:, 0].sum().backward()
    assert np.isfinite(host(masked.grad)).all()

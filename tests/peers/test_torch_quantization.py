"""Fake quantization, learned steps and products of whole numbers beside PyTorch on the CPU.

PyTorch multiplies by 1/s where we divide by s. The scales here are powers of two, or the weights lie away from the
middles between two codes, so that both round to the same code. Codes are compared with PyTorch's own, not with ours.
"""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import host

import tinyft as ft
from tinyft.compress.grids import Grid, fixed_zero, top_code
from tinyft.compress.quantize import int8
from tinyft.compress.quantize.qat import FakeQuantize, LearnedStep, round_weights, straight_through
from tinyft.tensor import Tensor

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'tinyft[peers]'")

GRIDS = [("affine", 2), ("affine", 4), ("affine", 8), ("symmetric", 2), ("symmetric", 3), ("symmetric", 8),
         ("absmax", 2), ("absmax", 4), ("absmax", 8)]


def leaf(values: np.ndarray) -> Any:
    return torch.tensor(values, requires_grad=True)


def away_from_ties(v: np.ndarray) -> np.ndarray:
    """w/s, moved away from the middles between whole numbers by a hundredth and more."""
    part = v - np.floor(v)
    return np.where(abs(part - 0.5) < 0.01, v + 0.02, v)


def draw(seed: int, s: np.ndarray, kind: str, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(W (out, in) for the scales s (out, 1), G, zero points (out, 1), the top code). Part of W is off the grid."""
    rng = np.random.default_rng(seed)
    top = top_code(kind, bits)
    zero = fixed_zero(kind, bits)
    zero = rng.integers(0, top + 1, s.shape).astype(np.float32) if zero is None else np.full_like(s, zero)
    codes = rng.uniform(-0.25 * top - 1, 1.25 * top + 1, (len(s), 40))
    W = (s * away_from_ties(codes - zero)).astype(np.float32)
    return W, rng.standard_normal(W.shape).astype(np.float32), zero, top


def ours(W: np.ndarray, s: np.ndarray, zero: np.ndarray, kind: str, bits: int,
         G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ŵ and dL/dw of our straight-through rounding on a given grid."""
    w = Tensor(W, requires_grad=True)
    y = straight_through(w, *round_weights(w.data, Grid(s, zero, top_code(kind, bits)), kind))
    y.backward(G)
    return host(y), host(w.grad)


@pytest.mark.parametrize("kind, bits", GRIDS)
@pytest.mark.parametrize("seed", range(4))
def test_fake_quantize_per_tensor(kind, bits, seed):
    s = np.full((1, 1), 2.0**(seed - 3), np.float32)
    W, G, zero, top = draw(seed, s, kind, bits)
    w = leaf(W)
    y = torch.fake_quantize_per_tensor_affine(w, float(s[0, 0]), int(zero[0, 0]), 0, top)
    y.backward(torch.from_numpy(G))
    mine, gradient = ours(W, s, zero, kind, bits, G)
    np.testing.assert_array_equal(mine, y.detach().numpy())
    np.testing.assert_array_equal(gradient, w.grad.numpy())
    assert 0 < (gradient == 0).mean() < 0.9


@pytest.mark.parametrize("kind, bits", GRIDS)
@pytest.mark.parametrize("seed", range(4))
def test_fake_quantize_per_channel(kind, bits, seed):
    """A channel is a row of W. Scales of any size."""
    s = np.random.default_rng(seed + 50).uniform(0.01, 3, (6, 1)).astype(np.float32)
    W, G, zero, top = draw(seed, s, kind, bits)
    w = leaf(W)
    their_zero = torch.from_numpy(zero[:, 0].astype(np.int32))
    y = torch.fake_quantize_per_channel_affine(w, torch.from_numpy(s[:, 0]), their_zero, 0, 0, top)
    y.backward(torch.from_numpy(G))
    mine, gradient = ours(W, s, zero, kind, bits, G)
    np.testing.assert_allclose(mine, y.detach().numpy(), rtol=1e-6, atol=0)
    np.testing.assert_array_equal(gradient, w.grad.numpy())
    assert 0 < (gradient == 0).mean() < 0.9


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_whole_step_of_qat_with_the_grid_of_round_to_nearest(bits, rng):
    """Scales and zero points are those that our packed weight holds; PyTorch rounds with them."""
    W = rng.standard_normal((5, 24)).astype(np.float32)
    packed = ft.RTN(bits, None)(W)
    s, zero = host(packed.scale)[0], host(packed.zero)[0]
    W = (s[:, None] * away_from_ties(W / s[:, None])).clip(W.min(axis=1, keepdims=True), W.max(axis=1, keepdims=True))
    G = rng.standard_normal(W.shape).astype(np.float32)
    w, theirs = Tensor(W, requires_grad=True), leaf(W)
    y = FakeQuantize("affine", bits, None).tensor("weight", w)
    y.backward(G)
    wanted = torch.fake_quantize_per_channel_affine(theirs, torch.from_numpy(s.copy()),
                                                    torch.from_numpy(zero.astype(np.int32)), 0, 0, 2**bits - 1)
    wanted.backward(torch.from_numpy(G))
    close = abs(W / s[:, None] - np.floor(W / s[:, None]) - 0.5) > 1e-3
    assert close.mean() > 0.9
    np.testing.assert_allclose(host(y)[close], wanted.detach().numpy()[close], rtol=1e-6, atol=0)
    np.testing.assert_array_equal(host(w.grad), theirs.grad.numpy())


# ── learned steps ────────────────────────────────────────────────────────────────────────────────────────────────────
def lsq_by_autograd(w: Any, s: Any, bits: int, n: int) -> Any:
    """The program of the paper's appendix with PyTorch's autograd, which knows no formula for ds: the gradient of s is
    scaled, and the gradient of round is that of the identity."""
    most = 2**(bits - 1) - 1
    g = 1 / np.sqrt(n * most)
    step = (s - s * g).detach() + s * g
    v = w / step
    clipped = v.clamp(-most - 1, most)
    rounded = (clipped.round() - clipped).detach() + clipped
    return rounded * step


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 8, 7])
def test_the_gradient_of_learned_steps(bits, group):
    """The weights lie away from the last half step of the grid, where the paper and PyTorch differ."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        W = rng.standard_normal((3, 20))
        e = LearnedStep(W, bits, group).to(dtype=np.float64)
        e.s.copy_(host(e.s) * rng.uniform(0.3, 1.2, e.s.shape))
        s = host(e.s).copy()
        most = 2**(bits - 1) - 1
        each = np.arange(20) // (group or 20)
        v = away_from_ties(W / s[:, each])
        last = ((v > most) & (v < most + 0.5)) | ((v < -most - 1) & (v > -most - 1.5))
        W = s[:, each] * np.where(last, 0.7 * np.sign(v), v)
        G = rng.standard_normal(W.shape)
        w = Tensor(W, requires_grad=True)
        y = e.tensor("weight", w)
        y.backward(G)
        for k in range(each[-1] + 1):
            part = each == k
            theirs, step = leaf(W[:, part]), leaf(s[:, k:k + 1])
            wanted = lsq_by_autograd(theirs, step, bits, int(part.sum()))
            wanted.backward(torch.from_numpy(G[:, part]))
            np.testing.assert_allclose(host(y)[:, part], wanted.detach().numpy(), rtol=1e-12)
            np.testing.assert_allclose(host(w.grad)[:, part], theirs.grad.numpy(), rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(host(e.s.grad)[:, k], step.grad.numpy()[:, 0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_gradient_of_learned_steps_in_the_last_half_step_is_pytorchs(bits):
    """PyTorch's own learnable fake quantization counts by the code, as we do: all weights, the last half step too."""
    most = 2**(bits - 1) - 1
    for seed in range(6):
        rng = np.random.default_rng(seed)
        s = rng.uniform(0.1, 1, (4, 1)).astype(np.float32)
        v = away_from_ties(rng.uniform(-1.5 * most - 2, 1.5 * most + 2, (4, 30)))
        v[:, 0], v[:, 1] = most + 0.3, -most - 1.3
        W = (s * v).astype(np.float32)
        G = rng.standard_normal(W.shape).astype(np.float32)
        e = LearnedStep(W, bits, None)
        e.s.copy_(s)
        w = Tensor(W, requires_grad=True)
        y = e.tensor("weight", w)
        y.backward(G)
        theirs, step, zero = leaf(W), leaf(s[:, 0].copy()), leaf(np.zeros(4, np.float32))
        factor = 1 / np.sqrt(30 * most)
        wanted = torch._fake_quantize_learnable_per_channel_affine(theirs, step, zero, 0, -most - 1, most, factor)
        wanted.backward(torch.from_numpy(G))
        np.testing.assert_allclose(host(y), wanted.detach().numpy(), rtol=1e-6)
        np.testing.assert_allclose(host(w.grad), theirs.grad.numpy(), rtol=1e-6)
        np.testing.assert_allclose(host(e.s.grad)[:, 0], step.grad.numpy(), rtol=1e-4, atol=1e-5)


# ── products of whole numbers ────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("k", [1, 40, 1032, 1033, 5000])
def test_the_sums_are_those_of_integer_products(k, rng):
    q = rng.integers(-128, 128, (6, k)).astype(np.int8)
    w = rng.integers(-127, 128, (7, k)).astype(np.int8)
    q[0], w[0] = -128, 127
    wanted = q.astype(np.int64) @ w.T.astype(np.int64)
    got = int8.integer_product(q.astype(np.float32), np.ascontiguousarray(w.T))
    np.testing.assert_array_equal(got.astype(np.int64), wanted)
    if k > 1:                                            # of one column PyTorch's result is wrong on some processors
        theirs = torch._int_mm(torch.from_numpy(q), torch.from_numpy(w).T).numpy()
        np.testing.assert_array_equal(theirs, wanted)


def per_row(x: np.ndarray, s: Any, zero: Any, low: int) -> Any:
    """The int8 codes of rows with scales s and zero points, by PyTorch."""
    return (torch.round(torch.from_numpy(x) / s[:, None]) + zero[:, None]).clamp(low, 127).to(torch.int8)


@pytest.mark.parametrize("activations", ["absmax", "affine"])
@pytest.mark.parametrize("width", [16, 300, 1500])
def test_a_product_with_scales_of_rows_and_tokens(activations, width, rng):
    """y = s_x s_w (Q_x Q_wᵀ), Q and the sum of PyTorch in int8 and int32; only beside a tie may a code differ."""
    X = rng.standard_normal((9, width)).astype(np.float32) + np.float32(0.5)
    W = rng.standard_normal((11, width)).astype(np.float32)
    s_w = torch.from_numpy(abs(W).max(axis=1) / np.float32(127))
    if activations == "absmax":
        s_x, zero, low = torch.from_numpy(abs(X).max(axis=1) / np.float32(127)), torch.zeros(9), -127
    else:
        lo, hi = X.min(axis=1).clip(max=0), X.max(axis=1).clip(min=0)
        s_x = torch.from_numpy((hi - lo) / np.float32(255))
        zero, low = torch.round(-torch.from_numpy(lo) / s_x) - 128, -128
    q_x, q_w = per_row(X, s_x, zero, low), per_row(W, s_w, torch.zeros(11), -127)
    total = torch._int_mm(q_x, q_w.T).double() - zero.double()[:, None] * q_w.sum(dim=1)
    wanted = (total * s_x.double()[:, None] * s_w.double()).numpy()
    packed = ft.Int8(activations)(W)
    rounded = int8.quantize_rows(X, activations)
    differ = (host(rounded.codes) != q_x.numpy()).mean() + (host(packed.codes).T != q_w.numpy()).mean()
    assert differ < 0.002
    with ft.no_grad():
        got = host(packed.matmul(Tensor(X)))
    assert differ == 0 or activations == "affine"
    if differ == 0:
        np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=1e-6 * abs(wanted).max())
    np.testing.assert_allclose(got, wanted, atol=0.02 * abs(wanted).max())


# ── wrong answers ────────────────────────────────────────────────────────────────────────────────────────────────────
def test_what_pytorch_does_not_do_is_seen(rng):
    """A gradient that passes outside of the grid, and a zero point inside the rounding, differ from PyTorch's."""
    s = np.full((1, 1), 0.5, np.float32)
    W, G, zero, top = draw(0, s, "affine", 3)
    w = leaf(W)
    torch.fake_quantize_per_tensor_affine(w, 0.5, int(zero[0, 0]), 0, top).backward(torch.from_numpy(G))
    assert (G != w.grad.numpy()).any()
    half = np.array([[0.25, 0.75, 1.25, 1.75]], np.float32)          # ties: rint(w/s) + z, not rint(w/s + z)
    theirs = torch.fake_quantize_per_tensor_affine(torch.from_numpy(half), 0.5, 1, 0, 7).numpy()
    mine, _ = ours(half, s, np.ones((1, 1), np.float32), "affine", 3, half)
    np.testing.assert_array_equal(mine, theirs)
    assert (s * (np.rint(half / s + 1) - 1) != theirs).any()

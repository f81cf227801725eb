"""Products with packed weights: the kernel for a few rows of x, the dense tiles for many, and the gradient of x.

The dense weights come from packed_weights.py, computed from the codes one at a time. test_cuda.py has the CUDA kernels.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import packed_weights
import pytest
from helpers import dev, host
from packed_weights import FORMS

from tinyft import array, kernels, set_num_threads
from tinyft.compress import coded, grouped
from tinyft.compress.packing import unpack
from tinyft.kernels import packed as kernel
from tinyft.nn import Packed
from tinyft.precision import widen_half
from tinyft.tensor import Tensor

EVERY = pytest.mark.parametrize("name", FORMS)
on_numpy = pytest.mark.skipif(array.backend() != "numpy", reason="of the NumPy kernel")
# Codes that cross bytes, and groups that begin inside a byte, are left to the dense tiles.
DECLINED = {"affine, 3 bits", "affine, 5 bits", "affine, 6 bits", "affine, 7 bits", "affine, 4 bits, groups of 7",
            "affine, 3 bits, groups of 7", "moved, 5 bits"}


def make(name: str, rng: np.random.Generator, out: int = 21) -> tuple[Packed, np.ndarray]:
    packed, W = FORMS[name](rng, out)
    return packed.to(array.backend()), W


def near(a: Any, b: np.ndarray, tol: float = 1e-5) -> None:
    """a equals b up to tol times the largest value of b."""
    a = host(a).astype(np.float64)
    assert a.shape == b.shape
    assert abs(a - b).max() <= tol * abs(b).max()


def check(packed: Packed, W: np.ndarray, rng: np.random.Generator, counts: tuple = (1, 3, 8, 9, 40)) -> None:
    """Product and gradient for some numbers of rows of x."""
    for N in counts:
        x = rng.standard_normal((N, W.shape[1])).astype(np.float32)
        g = rng.standard_normal((N, W.shape[0])).astype(np.float32)
        leaf = Tensor(dev(x), requires_grad=True)
        y = packed.matmul(leaf)
        (y * Tensor(dev(g))).sum().backward()
        near(y, x.astype(np.float64) @ W.T)
        near(leaf.grad, g.astype(np.float64) @ W)


# ── each is its definition ───────────────────────────────────────────────────────────────────────────────────────────
@EVERY
def test_a_product_is_that_with_the_dense_weight(name, rng):
    packed, W = make(name, rng)
    near(packed.dequantize(), W, 1e-6)
    check(packed, W, rng)
    with kernels.definitions():
        check(packed, W, rng, counts=(3,))


@EVERY
@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 2, 2), (3, 5)])
def test_inputs_of_any_number_of_axes(name, shape, rng):
    packed, W = make(name, rng, 5)
    x = rng.standard_normal((*shape, W.shape[1])).astype(np.float32)
    near(packed.matmul(Tensor(dev(x))), x.astype(np.float64) @ W.T)


@on_numpy
@EVERY
def test_the_kernel_takes_a_few_rows(name, rng):
    packed, W = make(name, rng)
    x = rng.standard_normal((kernel.FEW + 1, W.shape[1])).astype(np.float32)
    assert kernel.packed_linear(x, packed) is NotImplemented, "many rows"
    assert kernel.packed_linear(x[:0], packed) is NotImplemented
    assert kernel.packed_linear(x[:2].astype(np.float64), packed) is NotImplemented
    assert kernel.packed_linear(x[:2, 1:], packed) is NotImplemented, "an input too short"
    result = kernel.packed_linear(x[:-1], packed)
    assert (result is NotImplemented) == (name in DECLINED)
    packed.to(dtype="bfloat16")
    assert kernel.packed_linear(x[:2], packed) is NotImplemented, "dense rows are rounded"


@pytest.mark.skipif(array.backend() != "cupy", reason="of the CUDA kernels")
@EVERY
def test_the_cuda_kernels_take_every_form(name, rng):
    from tinyft.kernels.cuda.packed import packed_linear
    packed, W = make(name, rng)
    for N in (2, 20):
        x = dev(rng.standard_normal((N, W.shape[1])), np.float32)
        assert packed_linear(x, packed) is not NotImplemented


@EVERY
def test_a_product_is_linear_in_x(name, rng):
    packed, W = make(name, rng)
    for N in (2, 20):
        a, b = (rng.standard_normal((N, W.shape[1])).astype(np.float32) for _ in "ab")
        together = packed.matmul(Tensor(dev(2 * a - 3 * b)))
        apart = 2 * host(packed.matmul(Tensor(dev(a)))) - 3 * host(packed.matmul(Tensor(dev(b))))
        near(together, apart.astype(np.float64), 2e-5)
        zero = host(packed.matmul(Tensor(dev(0 * a))))
        assert (zero == 0).all()


def test_codes_that_are_all_the_same_see_the_sums_of_groups(rng):
    """y_o = Σ_b s_b (q − z_b) Σ_(i in b) x_i"""
    scale = rng.uniform(0.1, 1, (6, 4)).astype(np.float16).astype(np.float32)
    zero = rng.integers(0, 16, (6, 4)).astype(np.float32)
    x = rng.standard_normal((3, 60)).astype(np.float32)
    sums = np.add.reduceat(x.astype(np.float64), [0, 16, 32, 48], axis=1)                  # (3, 4)
    for q in (0, 9, 15):
        codes = np.full((6, 60), q, np.uint8)
        packed = grouped.Uniform(codes, scale, zero, kind="affine", bits=4, group=16)
        near(packed.matmul(Tensor(dev(x))), sums @ (scale * (q - zero.astype(np.float64))).T)


# ── tiles, threads, memory ───────────────────────────────────────────────────────────────────────────────────────────
@EVERY
def test_the_size_of_a_tile_does_not_matter(name, rng, monkeypatch):
    packed, W = make(name, rng, 37)
    for tile in (1, 8, 64, 1 << 18):
        monkeypatch.setattr(coded, "DENSE", tile * W.shape[1])
        monkeypatch.setattr(kernel, "TILE", tile * kernel.DEPTH)
        check(packed, W, rng, counts=(2, 11))


@on_numpy
@pytest.mark.parametrize("depth", [8, 16, 64])
def test_the_depth_of_a_slab_does_not_matter(depth, rng, monkeypatch):
    monkeypatch.setattr(kernel, "DEPTH", depth)
    for name in set(FORMS) - DECLINED:
        packed, W = make(name, rng)
        check(packed, W, rng, counts=(1, 5))


@on_numpy
def test_threads_share_the_rows(rng):
    before = kernels.get_num_threads()
    try:
        for n in (1, 2, 3):
            set_num_threads(n)
            for name in ("affine, 4 bits", "nf4", "Q4_1"):
                packed, W = make(name, rng, 50)
                check(packed, W, rng, counts=(1, 8))
    finally:
        set_num_threads(before)


@on_numpy
@pytest.mark.parametrize("name", ["affine, 4 bits", "affine, 3 bits", "nf4, doubly", "Q8_0", "moved, 4 bits",
                                  "nf4, short group"])
def test_a_product_holds_a_tile_and_never_the_weight(name, rng, monkeypatch):
    """For a few rows, for many, and for the gradient: one tile of dense rows, and about as much again for their codes,
    scales and sums."""
    packed, W = make(name, rng, 6000)
    monkeypatch.setattr(coded, "DENSE", 1 << 15)
    monkeypatch.setattr(kernel, "TILE", 1 << 14)
    tile = 4 << 15
    assert W.size * 4 > 8 * tile
    for N in (1, 16):
        x = np.ones((N, W.shape[1]), np.float32)
        packed.matmul(Tensor(x))                                     # whatever is kept for good
        with array.peak_memory() as memory:
            y = packed.matmul(Tensor(x))
        assert memory["bytes"] <= y.data.nbytes + 2.25 * tile
        leaf = Tensor(x, requires_grad=True)
        y = packed.matmul(leaf).sum()
        with array.peak_memory() as memory:
            y.backward()
        assert memory["bytes"] <= N * W.shape[0] * 4 + 2 * x.nbytes + 2.25 * tile


# ── numbers of 16 bits ───────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("N", [1, 20])
def test_sums_are_not_in_16_bits(dtype, N, rng):
    """2,048 products of 64 have the sum 131,072, and as many of −64 follow: float16 would be infinite in between, and
    bfloat16 would stop at 256 · 64."""
    codes = np.ones((4, 4096), np.uint8)
    codes[:, 2048:] = 0                                              # the weights 1/2 and −1/2
    codes[0, -1] = 1
    packed = grouped.Uniform(codes, np.ones((4, 1), np.float32), kind="sign", bits=1, group=4096)
    packed.to(array.backend(), dtype=dtype)
    x = array.asarray(np.full((N, 4096), 128, np.float32)).astype(packed.unit.dtype)
    y = host(packed.matmul(Tensor(x))).astype(np.float64)
    np.testing.assert_array_equal(y, np.tile([128.0, 0, 0, 0], (N, 1)))


def test_half_numbers_are_widened_exactly():
    bits = np.arange(65536, dtype=np.uint16)
    bits = bits[np.isfinite(bits.view(np.float16))]
    wanted = bits.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(kernel.widen_half(bits).view(np.uint32), wanted.view(np.uint32))
    np.testing.assert_array_equal(widen_half(bits).view(np.uint32), wanted.view(np.uint32))


# ── wrong kernels are caught ─────────────────────────────────────────────────────────────────────────────────────────
def forget_zero_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped.Grouped, "factors", lambda self, rows: (self.scales(rows), self.shifts(rows)))


def forget_shifts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped.Grouped, "shifts", lambda self, rows: None)


def use_the_last_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    right = grouped.Grouped.factors

    def wrong(self, rows):
        scale, constant = right(self, rows)
        scale[:] = scale[-1]
        return scale, constant
    monkeypatch.setattr(grouped.Grouped, "factors", wrong)


def extend_the_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel.read_digits

    def wrong(codes, factors, values):
        """As if the last digit of a byte were that of an int8: 256 less where the highest bit is set."""
        size = factors.shape[-1]
        for part, group in right(codes, factors, values):
            negative = (codes[group * size:(group + 1) * size] >= 128).astype(np.float32)
            part -= 256 * factors[group, :, -1, :len(negative)] @ negative
            yield part, group
    monkeypatch.setattr(kernel, "read_digits", wrong)


def swap_the_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel._by_byte
    monkeypatch.setattr(kernel, "_by_byte", lambda X, bits: right(X, bits)[:, :, ::-1].copy())


def forget_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel.grouped_inputs

    def wrong(X, packed):
        back = np.empty_like(X)
        back[:, packed.order] = X                                    # undoes the gather that follows
        return right(back, packed)
    monkeypatch.setattr(kernel, "grouped_inputs", wrong)


def forget_the_input_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped.Grouped, "input_scale", None)


def add_the_imaginary_part(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel.value_factors
    monkeypatch.setattr(kernel, "value_factors", lambda X, bits: right(X, bits).conj())


def drop_the_last_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel.slabs
    monkeypatch.setattr(kernel, "slabs", lambda codes, per_group, most: right(
        codes[:len(codes) // per_group * per_group], per_group, most))


WRONG: dict[str, tuple[Callable, str]] = {
    "zero points forgotten": (forget_zero_points, "affine, 4 bits"),
    "one zero point for all forgotten": (forget_zero_points, "symmetric, 4 bits"),
    "the shift of Q4_1 forgotten": (forget_shifts, "Q4_1"),
    "the scale of the last group": (use_the_last_scale, "affine, 8 bits"),
    "a code extended by its sign": (extend_the_sign, "affine, 4 bits"),
    "the halves of a byte swapped": (swap_the_halves, "affine, 4 bits"),
    "the halves of a byte swapped, with a table": (swap_the_halves, "nf4"),
    "the order not gathered": (forget_the_order, "moved, 4 bits"),
    "the input scale forgotten": (forget_the_input_scale, "moved, 4 bits"),
    "x_0 level_0 − x_1 level_1": (add_the_imaginary_part, "nf4"),
    "a short group left out": (drop_the_last_bytes, "nf4, short group"),
}


@on_numpy
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_is_caught(wrong, rng, monkeypatch):
    plant, name = WRONG[wrong]
    packed, W = make(name, rng)
    check(packed, W, rng, counts=(3,))
    plant(monkeypatch)
    x = rng.standard_normal((3, W.shape[1])).astype(np.float32)
    y, _ = kernel.packed_linear(x, packed)
    with pytest.raises(AssertionError):
        near(y, x.astype(np.float64) @ W.T)


def test_the_dense_values_of_these_tests_are_those_of_the_codes(rng):
    """The forms are right, independently of dequantize: unpacked by hand for one of them."""
    packed, W = packed_weights.uniform(rng, 3, 4, 10, 5)
    codes = unpack(array.asnumpy(packed.codes), 4, 10).T.astype(np.float64)
    scale = array.asnumpy(packed.scale).T.repeat(5, axis=1)
    zero = array.asnumpy(packed.zero).T.repeat(5, axis=1)
    np.testing.assert_allclose(W, scale * (codes - zero), rtol=1e-6)

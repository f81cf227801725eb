"""Products with packed weights: the kernels for a few rows of x, the dense tiles for many, and the gradient of x.

Every test runs with the NumPy kernel and with the compiled one. The dense weights come from packed_weights.py, computed
from the codes one at a time. test_cuda.py has the CUDA kernels.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import packed_weights
import pytest
from helpers import dev, host
from packed_weights import FORMS

from tinyft import array, dispatch, kernels, set_num_threads
from tinyft.compress import codebooks, coded, grouped
from tinyft.compress.packing import pack, unpack
from tinyft.kernels import packed as by_numpy
from tinyft.nn import Packed
from tinyft.precision import widen_half
from tinyft.tensor import OPS, Tensor

EVERY = pytest.mark.parametrize("name", FORMS)
on_numpy = pytest.mark.skipif(array.backend() != "numpy", reason="of the kernels for NumPy arrays")
KERNELS: dict[str, Any] = {"numpy": by_numpy}
if array.backend() == "numpy" and kernels.has_numba() and kernels.compiled_kernels():
    from tinyft.kernels.compiled import packed as compiled
    from tinyft.kernels.compiled import shared
    KERNELS["numba"] = compiled
# Codes that cross bytes, and groups that begin inside a byte, are left to the dense tiles by the NumPy kernel.
DECLINED = {"affine, 3 bits", "affine, 5 bits", "affine, 6 bits", "affine, 7 bits", "affine, 4 bits, groups of 7",
            "affine, 3 bits, groups of 7", "moved, 5 bits"}


@pytest.fixture(autouse=True, params=KERNELS)
def kernel(request):
    """The module with the kernel that runs. No other kernel does."""
    module = KERNELS[request.param]
    with dispatch.only(lambda other: array.backend() != "numpy"):
        dispatch.register(OPS["_packed_linear"], np.ndarray, module.packed_linear)
        dispatch.register(widen_half, np.ndarray, module.widen_half)
        yield module


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
def test_the_kernel_takes_a_few_rows(name, rng, kernel):
    packed, W = make(name, rng)
    x = rng.standard_normal((by_numpy.FEW + 1, W.shape[1])).astype(np.float32)
    assert kernel.packed_linear(x, packed) is NotImplemented, "many rows"
    assert kernel.packed_linear(x[:0], packed) is NotImplemented
    assert kernel.packed_linear(x[:2].astype(np.float64), packed) is NotImplemented
    assert kernel.packed_linear(x[:2, 1:], packed) is NotImplemented, "an input too short"
    result = kernel.packed_linear(x[:-1], packed)
    assert (result is NotImplemented) == (kernel is by_numpy and name in DECLINED)
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


def set_tile(monkeypatch: pytest.MonkeyPatch, kernel: Any, rows: int) -> None:
    """A tile has so many rows of W."""
    monkeypatch.setattr(kernel, "TILE", rows * by_numpy.DEPTH if kernel is by_numpy else rows)


@on_numpy
@pytest.mark.parametrize("name", ["affine, 4 bits, one group", "nf4", "moved, 4 bits"])
def test_codes_that_are_read_only_and_inputs_in_another_layout(name, rng, kernel):
    packed, W = make(name, rng)
    packed.codes.flags.writeable = False
    if packed.scale_bits is not None:
        packed.scale_bits.flags.writeable = False
    x = np.asfortranarray(rng.standard_normal((3, W.shape[1])).astype(np.float32))
    for inputs in (x, np.repeat(x, 2, axis=1)[:, ::2]):
        y, _ = kernel.packed_linear(inputs, packed)
        near(y, x.astype(np.float64) @ W.T)


# ── tiles, threads, memory ───────────────────────────────────────────────────────────────────────────────────────────
@EVERY
def test_the_size_of_a_tile_does_not_matter(name, rng, monkeypatch, kernel):
    packed, W = make(name, rng, 37)
    for tile in (1, 8, 64, 1 << 18):
        monkeypatch.setattr(coded, "DENSE", tile * W.shape[1])
        set_tile(monkeypatch, kernel, tile)
        check(packed, W, rng, counts=(2, 11))


@on_numpy
@pytest.mark.parametrize("kernel", ["numpy"], indirect=True)
@pytest.mark.parametrize("depth", [8, 16, 64])
def test_the_depth_of_a_slab_does_not_matter(depth, rng, monkeypatch, kernel):
    monkeypatch.setattr(kernel, "DEPTH", depth)
    for name in set(FORMS) - DECLINED:
        packed, W = make(name, rng)
        check(packed, W, rng, counts=(1, 5))


@on_numpy
def test_threads_share_the_rows(rng, monkeypatch, kernel):
    before = kernels.get_num_threads()
    if kernel is not by_numpy:
        monkeypatch.setattr(shared, "SHARED", 1)
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
def test_a_product_holds_a_tile_and_never_the_weight(name, rng, monkeypatch, kernel):
    """For a few rows, for many, and for the gradient: one tile of dense rows, and about as much again for their codes,
    scales and sums."""
    packed, W = make(name, rng, 6000)
    monkeypatch.setattr(coded, "DENSE", 1 << 15)
    set_tile(monkeypatch, kernel, 256)
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


def test_half_numbers_are_widened_exactly(kernel):
    bits = np.arange(65536, dtype=np.uint16)
    bits = bits[np.isfinite(bits.view(np.float16))]
    wanted = bits.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(kernel.widen_half(bits).view(np.uint32), wanted.view(np.uint32))
    np.testing.assert_array_equal(widen_half(bits).view(np.uint32), wanted.view(np.uint32))


# ── the terms of the compiled kernel ─────────────────────────────────────────────────────────────────────────────────
TERMS = pytest.mark.parametrize("bits, width, group", [
    *((bits, 51, 16) for bits in range(1, 9)), (3, 50, 7), (4, 50, 7), (5, 9, 9), (8, 1, 1), (4, 64, 8),
])


def check_terms(terms: tuple, bits: int, width: int, group: int, rng: np.random.Generator) -> None:
    """The terms of a code add up to it, lie in its group, and a group has a multiple of eight."""
    rows, masks, places, factors, starts = terms
    codes = rng.integers(0, 1 << bits, width)
    byte = pack(codes, bits)[rows].astype(np.float64)
    term = factors * (byte.astype(np.uint8) & masks)
    np.testing.assert_array_equal(np.bincount(places, term, minlength=width), codes)
    assert len(starts) == -(-width // group) + 1
    assert starts[0] == 0 and starts[-1] == len(rows) and (starts % 8 == 0).all()
    for b in range(len(starts) - 1):
        own = slice(starts[b], starts[b + 1])
        assert (places[own] // group == b)[masks[own] > 0].all()


@pytest.mark.skipif("numba" not in KERNELS, reason="of the compiled kernel")
@pytest.mark.parametrize("kernel", ["numba"], indirect=True)
@TERMS
def test_terms_add_up_to_the_codes(bits, width, group, rng, kernel):
    check_terms(kernel.find_terms(bits, width, group), bits, width, group, rng)


# ── wrong kernels are caught ─────────────────────────────────────────────────────────────────────────────────────────
# plant(monkeypatch, packed) makes the kernel wrong for this weight.
def replace_factors(monkeypatch: pytest.MonkeyPatch, change: Callable) -> None:
    right = grouped.Grouped.factors

    def wrong(self, rows):
        scale, constant = right(self, rows)
        return change(scale), constant
    monkeypatch.setattr(grouped.Grouped, "factors", wrong)


def forget_zero_points(monkeypatch: pytest.MonkeyPatch, packed: Packed) -> None:
    monkeypatch.setattr(grouped.Grouped, "factors", lambda self, rows: (self.scales(rows), self.shifts(rows)))


def forget_shifts(monkeypatch: pytest.MonkeyPatch, packed: Packed) -> None:
    monkeypatch.setattr(grouped.Grouped, "shifts", lambda self, rows: None)


def use_the_last_scale(monkeypatch: pytest.MonkeyPatch, packed: Packed) -> None:
    replace_factors(monkeypatch, lambda scale: np.repeat(scale[-1:], len(scale), axis=0))


def use_the_next_scale(monkeypatch: pytest.MonkeyPatch, packed: Packed) -> None:
    replace_factors(monkeypatch, lambda scale: np.roll(scale, -1, axis=0))


def forget_the_order(monkeypatch: pytest.MonkeyPatch, packed: Packed) -> None:
    monkeypatch.setattr(packed, "order", None)


def forget_the_input_scale(monkeypatch: pytest.MonkeyPatch, packed: Packed) -> None:
    monkeypatch.setattr(grouped.Grouped, "input_scale", None)


def shift_the_table(monkeypatch: pytest.MonkeyPatch, packed: Packed) -> None:
    right = codebooks.Codebook.table_values
    monkeypatch.setattr(codebooks.Codebook, "table_values", lambda self: np.roll(right(self), 1))


def extend_the_sign(monkeypatch: pytest.MonkeyPatch, packed: Packed) -> None:
    right = by_numpy.read_digits

    def wrong(codes, factors, values):
        """As if the last digit of a byte were that of an int8: 256 less where the highest bit is set."""
        size = factors.shape[-1]
        for part, group in right(codes, factors, values):
            negative = (codes[group * size:(group + 1) * size] >= 128).astype(np.float32)
            part -= 256 * factors[group, :, -1, :len(negative)] @ negative
            yield part, group
    monkeypatch.setattr(by_numpy, "read_digits", wrong)


def swap_the_halves(monkeypatch: pytest.MonkeyPatch, packed: Packed) -> None:
    right = by_numpy._by_byte
    monkeypatch.setattr(by_numpy, "_by_byte", lambda X, bits: right(X, bits)[:, :, ::-1].copy())


def add_the_imaginary_part(monkeypatch: pytest.MonkeyPatch, packed: Packed) -> None:
    right = by_numpy.value_factors
    monkeypatch.setattr(by_numpy, "value_factors", lambda X, bits: right(X, bits).conj())


def drop_the_last_bytes(monkeypatch: pytest.MonkeyPatch, packed: Packed) -> None:
    right = by_numpy.slabs
    monkeypatch.setattr(by_numpy, "slabs", lambda codes, per_group, most: right(
        codes[:len(codes) // per_group * per_group], per_group, most))


BY_BOTH: dict[str, tuple[Callable, str]] = {
    "zero points forgotten": (forget_zero_points, "affine, 4 bits"),
    "one zero point for all forgotten": (forget_zero_points, "symmetric, 4 bits"),
    "the shift of Q4_1 forgotten": (forget_shifts, "Q4_1"),
    "the scale of the last group": (use_the_last_scale, "affine, 8 bits"),
    "the scale of the next group": (use_the_next_scale, "affine, 4 bits"),
    "the scale of the next group, with a table": (use_the_next_scale, "nf4"),
    "the order not gathered": (forget_the_order, "moved, 4 bits"),
    "the input scale forgotten": (forget_the_input_scale, "moved, 4 bits"),
    "a table shifted by one": (shift_the_table, "nf4"),
    "a table of 256 levels shifted by one": (shift_the_table, "dynamic"),
}
WRONG: dict[tuple[str, str], tuple[Callable, str]] = {
    **{(kernel, wrong): BY_BOTH[wrong] for kernel in KERNELS for wrong in BY_BOTH},
    ("numpy", "a code extended by its sign"): (extend_the_sign, "affine, 4 bits"),
    ("numpy", "the halves of a byte swapped"): (swap_the_halves, "affine, 4 bits"),
    ("numpy", "the halves of a byte swapped, with a table"): (swap_the_halves, "nf4"),
    ("numpy", "x_0 level_0 − x_1 level_1"): (add_the_imaginary_part, "nf4"),
    ("numpy", "a short group left out"): (drop_the_last_bytes, "nf4, short group"),
}


def change_terms(change: Callable[..., dict]) -> Callable:
    """A plant: find_terms with other values; `change` gets them by name, and gives those that differ."""
    def plant(monkeypatch, packed):
        right = compiled.find_terms

        def wrong(*sizes):
            names = ("rows", "masks", "places", "factors", "starts")
            terms = dict(zip(names, (a.copy() for a in right(*sizes))))
            return tuple((terms | change(**terms)).values())
        monkeypatch.setattr(compiled, "find_terms", wrong)
    return plant


def swap_levels(monkeypatch: pytest.MonkeyPatch, packed: Packed) -> None:
    right = compiled.add_products

    def wrong(first, last, codes, rows, low, high, *more):
        right(first, last, codes, rows, high, low, *more)
    monkeypatch.setattr(compiled, "add_products", wrong)


if "numba" in KERNELS:
    swapped = change_terms(lambda places, **_: {"places": places ^ 1})
    unmasked = change_terms(lambda masks, **_: {"masks": masks | 255})
    unscaled = change_terms(lambda factors, **_: {"factors": np.minimum(factors * 256, 1)})
    cut = change_terms(lambda factors, **_: {"factors": np.where(factors > 1, np.float32(0), factors)})
    short = change_terms(lambda starts, **_: {"starts": np.append(starts[:-1], starts[-2])})
    late = change_terms(lambda rows, **_: {"rows": np.roll(rows, 1)})
    WRONG |= {
        ("numba", "the halves of a byte swapped"): (swapped, "affine, 4 bits, long"),
        ("numba", "the halves of a byte swapped, with a table"): (swap_levels, "nf4"),
        ("numba", "both halves of a byte in a term"): (unmasked, "affine, 4 bits"),
        ("numba", "no power of 2"): (unscaled, "affine, 4 bits"),
        ("numba", "the bits in the next byte left out"): (cut, "affine, 3 bits"),
        ("numba", "a short group left out"): (short, "affine, 4 bits"),
        ("numba", "a short group left out, with a table"): (short, "nf4, short group"),
        ("numba", "the bytes shifted by one"): (late, "affine, 8 bits"),
    }


@on_numpy
@pytest.mark.parametrize("kernel, wrong", WRONG, indirect=["kernel"])
def test_a_wrong_kernel_is_caught(kernel, wrong, rng, monkeypatch):
    name = next(key for key, module in KERNELS.items() if module is kernel)
    plant, form = WRONG[name, wrong]
    packed, W = make(form, rng)
    check(packed, W, rng, counts=(3,))
    plant(monkeypatch, packed)
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

"""A compiled kernel equals its definition, as the NumPy kernels do; its machine code is kept, checked and made anew."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_kernels as properties
from hypothesis import given
from hypothesis import strategies as st

import tinyft
from tinyft import array, kernels, set_num_threads
from tinyft.kernels import system, threads
from tinyft.optim.optimizers import adam_update
from tinyft.tensor import OPS

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(array.backend() != "numpy", reason="these kernels are for NumPy arrays")
shared = importlib.import_module("tinyft.kernels.compiled.shared")  # it imports Numba
COMPILED = {definition.__name__: kernel for definition, kernel in kernels.compiled_kernels().items()}
NAMES = [name for name in properties.NAMES if name in COMPILED]
LARGE = [(700, 130), (2, 3, 65, 8), (3, 4, 130, 16)]  # several threads share them
HERE = Path(tinyft.__file__).parent


@pytest.fixture(autouse=True, params=[1, 2], ids=["one thread", "two threads"])
def number_of_threads(request, monkeypatch):
    """One thread, and two that share even small arrays."""
    monkeypatch.setattr(shared, "SHARED", 1 << 12)
    monkeypatch.setattr(threads, "SHARED_PRODUCT", 1 << 12)
    monkeypatch.setattr(threads, "THREADED_PRODUCT", 1 << 10)
    before = tinyft.get_num_threads()
    set_num_threads(request.param)
    yield
    set_num_threads(before)


def test_the_list_of_compiled_kernels_is_complete():
    assert set(COMPILED) == {*kernels.COMPILED, "adam_update", "widen_half"}
    assert set(NAMES) == set(kernels.COMPILED) - {"project", "_packed_linear"}, "these have tests of their own"


# ---------------------------------------------------------------------------------------------------- the properties
def compiled_must_take(name: str, arrays: list, kw: dict) -> bool:
    """True for arguments that a compiled kernel must not decline, if the NumPy kernel must not."""
    if name == "attention":
        return True
    if name == "embedding":
        return arrays[0].flags.carray and arrays[1].size > 0
    if name == "rotary":
        x = arrays[0]
        return x.ndim == 4 and x.swapaxes(1, 2).flags.c_contiguous
    return name == "linear" or all(a.flags.carray for a in arrays)


@pytest.fixture(autouse=True)
def declines_nothing_else(monkeypatch):
    """The properties of the NumPy kernels, with this file's `must_take`."""
    numpy_must_take = properties.must_take
    monkeypatch.setattr(properties, "must_take", lambda *a: numpy_must_take(*a) and compiled_must_take(*a))


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", [*properties.SHAPES, *LARGE], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_kernel_equals_its_definition(name, shape, dtype, rng):
    for _ in range(3 if name == "attention" else 1):
        arrays, kw = properties.inputs(name, shape, dtype, rng)
        properties.agree(name, COMPILED[name], arrays, kw, rng)


@given(
    st.sampled_from(NAMES),
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 3),
    st.integers(0, 2**32 - 1),
)
def test_a_compiled_kernel_equals_its_definition_for_any_shape_and_layout(name, shape, double, layout, seed):
    rng = np.random.default_rng(seed)
    shape = (*shape[:-1], shape[-1] + 1)  # an empty row has no mean
    arrays, kw = properties.inputs(name, shape, np.float64 if double else np.float32, rng)
    layouts = [
        arrays,
        [np.asfortranarray(a) for a in arrays],
        [np.repeat(a, 2, axis=-1)[..., ::2] for a in arrays],
        [a[..., ::-1] for a in arrays],
    ]
    properties.agree(name, COMPILED[name], layouts[layout], kw, rng)


def read_only(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.flags.writeable = False
    return a


def unaligned(a: np.ndarray) -> np.ndarray:
    """A copy of the array that begins one byte behind a multiple of four."""
    memory = np.empty(a.nbytes + 8, np.uint8)
    start = -memory.ctypes.data % 4 + 1
    copy = memory[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    copy[...] = a
    return copy


@pytest.mark.parametrize("changed", [read_only, unaligned])
@pytest.mark.parametrize("name", NAMES)
def test_arrays_that_compiled_code_cannot_read_are_taken_right_or_declined(name, changed, rng):
    arrays, kw = properties.inputs(name, (2, 3, 5, 8), np.float32, rng)
    properties.agree(name, COMPILED[name], [changed(a) for a in arrays], kw, rng)


EXTREME = [0.0, -0.0, 1e-38, 5.0, -5.0, 13.0, -13.0, 100.0, -100.0, 1e4, -1e4]


@pytest.mark.parametrize("x", EXTREME)
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "swiglu"])
def test_an_activation_of_extreme_numbers(name, x, rng):
    arrays = [np.full((2, 3), x, np.float32)]
    if name == "swiglu":
        arrays.append(rng.standard_normal((2, 3)).astype(np.float32))
    properties.agree(name, COMPILED[name], arrays, {}, rng)


@pytest.mark.parametrize("x", [1e30, -1e30, np.inf, np.nan])
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "swiglu"])
def test_an_activation_of_numbers_whose_square_overflows(name, x):
    arrays = [np.full(5, x, np.float32)] * (2 if name == "swiglu" else 1)
    with np.errstate(all="ignore"):
        y, pull = COMPILED[name](arrays[0], *arrays[1:])
        expected, _ = OPS[name].definition(*(a.astype(np.float64) for a in arrays))
        expected = expected.astype(np.float32)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-7)
    if np.isfinite(x):
        [slope, *_] = properties.as_joint(pull)(np.ones(5, np.float32), [True] * len(arrays))
        assert np.isfinite(slope).all() or name == "swiglu", "1e30 · 1e30 is infinite"


@pytest.mark.parametrize("eps", [1e-12, 1e-5])
@pytest.mark.parametrize("x", [0.0, 3.0, -0.5, 1e10])
def test_layer_norm_of_a_row_of_equal_numbers_is_zero(x, eps):
    y, _ = COMPILED["layer_norm"](np.full((2, 12), x, np.float32), np.ones(12, np.float32), np.zeros(12, np.float32),
                                  eps=eps)
    assert not y.any()


def test_dropout_equals_its_definition_to_the_bit():
    properties.check_dropout(COMPILED["dropout"])


@pytest.mark.parametrize("factor", [0.01, 6], ids=["small scores", "large scores"])
@pytest.mark.parametrize("sizes", [
    (2, 3, 70, 70, 4), (3, 2, 130, 150, 8), (1, 6, 257, 257, 16), (9, 4, 64, 64, 8), (2, 2, 1, 300, 4),
    (1, 2, 129, 400, 5),
], ids=str)
def test_attention_in_many_tiles(sizes, factor, rng):
    for _ in range(6):
        arrays, kw = properties.attention_inputs(sizes, np.float32, rng)
        q, *others = arrays
        properties.agree("attention", COMPILED["attention"], [q * np.float32(factor), *others], kw, rng)


@pytest.mark.parametrize("sizes", [(1, 2, 5, 3, 4), (0, 2, 3, 3, 4)], ids=["fewer keys than queries", "no rows"])
def test_attention_of_rare_sizes_agrees_or_is_declined(sizes, rng):
    arrays, _ = properties.attention_inputs(sizes, np.float32, rng)
    for causal in (False, True):
        properties.agree("attention", COMPILED["attention"], arrays[:3], {"causal": causal}, rng)


@pytest.mark.parametrize("large", [1e15, 1e30])
def test_scores_too_large_for_exp_need_their_maximum(large):
    """Two keys with equal scores share the attention, whatever the scores are; a third one gets none."""
    q = np.full((1, 1, 1, 1), large, np.float32)
    k = np.array([1, 1, -1], np.float32).reshape(1, 1, 3, 1)
    v = np.array([2, 4, 100], np.float32).reshape(1, 1, 3, 1)
    y, _ = COMPILED["attention"](q, k, v, scale=1.0)
    assert y.item() == 3.0


def test_a_joint_projection_equals_three_maps(rng):
    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    for B, T, C, heads, D in ((2, 5, 6, 2, 4), (3, 70, 64, 4, 16)):
        arrays = [normal(B, T, C)]
        for _ in range(3):
            arrays += [normal(heads * D, C) / np.float32(C**0.5), normal(heads * D)]
        values, back = COMPILED["project"](*arrays, heads=heads)
        expected, right_back = OPS["project"].definition(*arrays, heads=heads)
        for got, right in zip(values, expected):
            assert properties.near(got, right, 4e-6)
        g = [normal(*a.shape) for a in expected]
        apart = [g, [g[0], None, g[2]], [None, g[1], None]]
        together = np.concatenate([a.swapaxes(1, 2).reshape(B * T, -1) for a in g], axis=1)
        views = [together.reshape(B, T, 3, heads, D)[:, :, i].swapaxes(1, 2) for i in range(3)]
        for gradients in (*apart, views, views[::-1], [views[0], views[2], views[1]]):
            found, right = back(gradients, [True] * 7), right_back(gradients, [True] * 7)
            for got, expected_gradient in zip(found, right):
                assert properties.near(got, expected_gradient, 2e-5)


def test_a_projection_computes_no_gradient_of_frozen_weights(rng, monkeypatch):
    """A product with the weights gives dx; one with the inputs gives the three dW, if one of them is wanted."""
    rows = importlib.import_module("tinyft.kernels.compiled.rows")
    x = rng.standard_normal((2, 5, 8)).astype(np.float32)
    maps = [rng.standard_normal(shape).astype(np.float32) for shape in ((8, 8), (8,)) * 3]
    values, back = COMPILED["project"](x, *maps, heads=2)
    _, right_back = OPS["project"].definition(x, *maps, heads=2)
    g = [np.ones_like(a) for a in values]
    right = right_back(g, [True] * 7)
    products: list[tuple] = []
    product = threads.product
    monkeypatch.setattr(rows, "product", lambda a, b: (products.append(a.shape), product(a, b))[1])
    for needed, count in [([True] + [False] * 6, 1), ([True] + [False, True] * 3, 1),
                          ([False] * 5 + [True, False], 1), ([True] * 7, 2)]:
        products.clear()
        found = back(g, needed)
        assert len(products) == count, needed
        for got, expected, is_needed in zip(found, right, needed, strict=True):
            assert properties.near(got, expected, 2e-5) if is_needed else got is None


def blas_threads_in_attention(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, queries: int) -> set[int]:
    """The numbers of BLAS's threads while attention of one head runs, forward and backward."""
    attention = importlib.import_module("tinyft.kernels.compiled.attention")
    seen = set()
    for name in ("run", "run_parts"):
        def watched(*arguments: Any, call: Callable = getattr(shared, name)) -> None:
            seen.add(system.threads())
            call(*arguments)

        monkeypatch.setattr(attention, name, watched)
    q, k, v = (rng.standard_normal((1, 1, queries, 16)).astype(np.float32) for _ in range(3))
    y, back = COMPILED["attention"](q, k, v)
    back(y, [True] * 3)
    return seen


@pytest.mark.skipif(not system.libraries(), reason="this BLAS cannot be asked for its threads")
def test_blas_has_one_thread_in_attention_of_one_head(rng, monkeypatch):
    """One head is one part. Threads of BLAS would spin after its products."""
    outside = system.threads()
    assert blas_threads_in_attention(rng, monkeypatch, 40) == {1}, "16 * 40 * 40 multiplications"
    assert blas_threads_in_attention(rng, monkeypatch, 2) == {outside}, "so few that BLAS uses one thread anyway"
    assert system.threads() == outside == tinyft.get_num_threads()


def test_the_update_equals_the_equations(rng):
    for size in (1, 7, 40_000):
        for decay, t in ((0.0, 1), (0.1, 3)):
            arrays = [rng.standard_normal(size).astype(np.float32) for _ in range(3)]
            arrays.append(np.abs(rng.standard_normal(size)).astype(np.float32))
            found, right = [a.copy() for a in arrays], [a.astype(np.float64) for a in arrays]
            settings = (1e-2, 0.9, 0.999, 1e-8, decay, t)
            assert COMPILED["adam_update"](*found, *settings) is None
            adam_update(*right, *settings)
            for a, b in zip(found, right):
                assert np.abs(a - b).max() <= 1e-6 * max(1, np.abs(b).max())
    double = [a.astype(np.float64) for a in arrays]
    assert COMPILED["adam_update"](*double, *settings) is NotImplemented


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_epsilon_left_out_is_that_of_the_definition(name, rng):
    arrays, _ = properties.inputs(name, (7, 12), np.float32, rng)
    arrays[0] *= np.float32(1e-3)  # σ² is about as large
    properties.agree(name, COMPILED[name], arrays, {}, rng)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint16])
def test_labels_of_any_whole_type(dtype, rng):
    z = rng.standard_normal((6, 5)).astype(np.float32)
    y = np.array([0, 4, 2, 3, 1, 0], dtype)
    properties.agree("cross_entropy", COMPILED["cross_entropy"], [z], {"y": y}, rng)


# ---------------------------------------------------------------------------------------------------- wrong kernels
def scaled(name: str, part: int, by: float = 1.01) -> Callable:
    """The kernel with its value (part −1), or its gradient of this input, off by a factor."""
    def kernel(*arrays: np.ndarray, **kw: Any) -> Any:
        y, pulls = COMPILED[name](*arrays, **kw)
        if part < 0:
            return y * np.float32(by), pulls

        def wrong(g: np.ndarray, needed: list[bool]) -> list:
            gradients = list(properties.as_joint(pulls)(g, needed))
            if gradients[part] is not None:
                gradients[part] = gradients[part] * np.float32(by)
            return gradients

        return y, wrong

    return kernel


def attention_but(**wrong: Any) -> Callable:
    """The kernel with one of its settings overridden."""
    return lambda *arrays, **kw: COMPILED["attention"](*arrays, **(kw | wrong))


def with_scaled_bias_gradient(*arrays: np.ndarray, **kw: Any) -> Any:
    y, back = COMPILED["attention"](*arrays, **kw)

    def wrong(g: np.ndarray, needed: list[bool]) -> tuple:
        *others, last = back(g, needed)
        return (*others, last) if len(arrays) == 3 or last is None else (*others, last / 2)

    return y, wrong


INPUTS = {"gelu": 1, "gelu_tanh": 1, "swiglu": 2, "layer_norm": 3, "rms_norm": 2, "linear": 3, "cross_entropy": 1,
          "embedding": 1, "attention": 3}
WRONG = [
    *((name, scaled(name, part)) for name, count in INPUTS.items() for part in (-1, *range(count))),
    ("attention", attention_but(key_mask=None)),
    ("attention", attention_but(causal=False)),
    ("attention", attention_but(dropout_mask=None)),
    ("attention", attention_but(scale=None)),
    ("attention", lambda q, k, v, *bias, **kw: COMPILED["attention"](q, k, v, *(b * 2 for b in bias), **kw)),
    ("attention", with_scaled_bias_gradient),
    ("layer_norm", lambda x, w, b, eps: COMPILED["layer_norm"](x, w, b, eps=1e-2)),
    ("gelu", COMPILED["gelu_tanh"]),
]


@pytest.mark.parametrize("i", range(len(WRONG)))
def test_a_wrong_compiled_kernel_is_caught(i, rng):
    name, kernel = WRONG[i]
    with pytest.raises(AssertionError):
        for shape in [*properties.SHAPES, *LARGE] * 4:  # some errors show only under some masks
            arrays, kw = properties.inputs(name, shape, np.float32, rng)
            properties.agree(name, kernel, arrays, kw, rng)


# ---------------------------------------------------------------------------------------------------- odd arguments
def test_gradients_that_only_begin_like_side_by_side_ones_are_put_in_order(rng):
    """Permuted views of one array, with as many heads as positions: the starts fit, the strides do not."""
    B, T, C, heads, D = 2, 4, 6, 4, 3
    arrays = [rng.standard_normal((B, T, C)).astype(np.float32)]
    for _ in range(3):
        arrays += [rng.standard_normal(s).astype(np.float32) for s in ((heads * D, C), (heads * D,))]
    _, back = COMPILED["project"](*arrays, heads=heads)
    _, right_back = OPS["project"].definition(*arrays, heads=heads)
    together = rng.standard_normal((B * T, 3 * heads * D)).astype(np.float32)
    g = [together.reshape(B, T, 3, heads, D)[:, :, i] for i in range(3)]  # (B, T, heads, D), and T = heads
    for got, right in zip(back(g, [True] * 7), right_back(g, [True] * 7)):
        assert properties.near(got, right, 2e-5)


def test_rotary_factors_of_texts_are_not_taken_for_those_of_positions(rng):
    B = T = 3
    x = rng.standard_normal((B, T, 2, 4)).astype(np.float32).swapaxes(1, 2)
    cos, sin = (rng.standard_normal((B, 1, 1, 4)).astype(np.float32) for _ in range(2))
    found = COMPILED["rotary"](x, cos, sin)
    assert found is NotImplemented or properties.near(found[0], OPS["rotary"].definition(x, cos, sin)[0], 4e-6)


def test_a_small_loss_of_large_logits_keeps_its_digits():
    z = np.array([[50, 37, 36, 30]], np.float32)
    loss, _ = COMPILED["cross_entropy"](z, np.array([0]))
    expected, _ = OPS["cross_entropy"].definition(z.astype(np.float64), np.array([0]))
    assert loss == pytest.approx(float(expected), rel=0.03), "1 + 3e-6 has six bits of its fraction in float32"


def test_the_pullbacks_of_dropout_and_project_keep_no_array_that_they_do_not_read():
    x = np.ones((4, 8), np.float32)
    _, (back, *_) = COMPILED["dropout"](x, 0.5, 1)
    assert not any(cell.cell_contents is x for cell in back.__closure__)


def test_no_rows_are_one_part():
    assert threads.shares(0, 5, 1) == [slice(0, 0)]

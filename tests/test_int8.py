"""Products of 8-bit weights with 8-bit activations: exact sums, bounds, outliers, gradients; and wrong answers."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from helpers import dev, host, wrong_answers

import tinyft as ft
from tinyft import array
from tinyft.compress import coded
from tinyft.compress.quantize import int8
from tinyft.compress.quantize.int8 import Int8Weight
from tinyft.tensor import Tensor

SEEDS = range(30)


def draw(seed: int, dtype: type = np.float64) -> tuple[np.ndarray, np.ndarray]:
    """X (N, in) and W (out, in): ordinary, with zeros, constant, one-sided, with one huge entry, of any size."""
    rng = np.random.default_rng(seed)
    N, width, out = int(rng.integers(1, 9)), int(rng.integers(1, 33)), int(rng.integers(1, 9))
    X = rng.standard_normal((N, width)) * 10.0**rng.integers(-3, 4)
    W = rng.standard_normal((out, width)) * 10.0**rng.integers(-3, 4)
    kind = seed % 6
    if kind == 1:
        X[rng.integers(N)] = 0
        W[rng.integers(out)] = 0
    elif kind == 2:
        X[:] = X[0, 0]
    elif kind == 3:
        X, W = abs(X), -abs(W)
    elif kind == 4:
        X[rng.integers(N), rng.integers(width)] *= 1e4
    elif kind == 5:
        X = (rng.integers(-20, 21, X.shape) + 0.5) / 127                         # ties, and their neighbours
    return X.astype(dtype), W.astype(dtype)


def double(packed: Int8Weight) -> Int8Weight:
    return packed.to(dtype=np.float64)


def multiply(packed: Int8Weight, X: np.ndarray) -> np.ndarray:
    with ft.no_grad():
        return host(packed.matmul(Tensor(dev(X))))


def dequantized(packed: Int8Weight) -> np.ndarray:
    return host(packed.dequantize()).astype(np.float64)


# ── independent answers ──────────────────────────────────────────────────────────────────────────────────────────────
def int8_by_definition(X: np.ndarray, W: np.ndarray, outliers: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """Y of LLM.int8() for given columns of outliers, token by token and row by row, with Python's whole numbers."""
    Y = np.zeros((len(X), len(W)))
    inside = [i for i in range(X.shape[1]) if i not in outliers]
    for t in range(len(X)):
        s_x = max([abs(X[t, i]) for i in inside], default=0) / 127 or 1
        for o in range(len(W)):
            s_w = float(np.float32(abs(W[o]).max() / 127)) or 1
            total = sum(int(np.rint(X[t, i] / s_x)) * int(np.rint(W[o, i] / s_w)) for i in inside)
            Y[t, o] = s_x * s_w * total + sum(X[t, i] * dense[o, i] for i in outliers)
    return Y


def outlier_columns(X: np.ndarray, threshold: float) -> np.ndarray:
    return np.array([i for i in range(X.shape[1]) if max(abs(X[:, i])) >= threshold], int)


def rounding_bound(X: np.ndarray, W: np.ndarray, s_x: np.ndarray, s_w: np.ndarray) -> np.ndarray:
    """Σ_i (½ s_x |W| + ½ s_w |X| + ¼ s_x s_w): the error of a product of two rounded factors."""
    of_x = s_x * abs(W).sum(axis=1) / 2
    of_w = np.outer(abs(X).sum(axis=1), s_w) / 2
    return of_x + of_w + X.shape[1] * s_x * s_w / 4


# ── the properties ───────────────────────────────────────────────────────────────────────────────────────────────────
def check_sums_of_whole_numbers_are_exact():
    rng = np.random.default_rng(0)
    for k in (1, 7, 1031, 1032, 1033, 1041, 2500, 5000):
        cases = [rng.integers(-128, 128, (3, k)), np.full((3, k), -128), np.full((3, k), 127)]
        for q in cases:
            for w in (rng.integers(-127, 128, (k, 4)), np.full((k, 4), 127), np.full((k, 4), -127)):
                exact = q.astype(np.int64) @ w.astype(np.int64)
                got = int8.integer_product(dev(q, np.float32), dev(w, np.int8))
                np.testing.assert_array_equal(host(got).astype(np.int64), exact)


def check_zero_points():
    """Σ (q − z) w, for zero points at both ends as well."""
    rng = np.random.default_rng(1)
    for k in (1, 40, 1500, 5000):
        q = rng.integers(-128, 128, (4, k))
        w = rng.integers(-127, 128, (k, 3))
        w[:, 0] = 127
        zero = np.array([[-128], [127], [0], [5]])
        total = int8.integer_product(dev(q, np.float32), dev(w, np.int8))
        got = int8.zero_point_product(total, dev(zero, np.float32), dev(w, np.int8))
        np.testing.assert_array_equal(host(got).astype(np.int64), (q - zero) @ w)


def check_activations_are_rounded_to_half_a_step():
    for seed in SEEDS:
        X, _ = draw(seed)
        for activations in ("absmax", "affine"):
            r = int8.quantize_rows(dev(X), activations)
            codes, scale = host(r.codes), host(r.scale)
            zero = 0 if r.zero is None else host(r.zero)
            assert codes.dtype == np.float32 and (codes == np.rint(codes)).all()
            assert r.zero is None or zero.dtype == np.float32
            assert -128 <= codes.min() and codes.max() <= 127
            assert (abs(scale * (codes - zero) - X) <= scale / 2 * (1 + 1e-6)).all(), (seed, activations)
            reach = np.maximum(X.max(axis=1), 0) - np.minimum(X.min(axis=1), 0)
            steps = abs(X).max(axis=1) / 127 if activations == "absmax" else reach / 255
            np.testing.assert_allclose(scale[:, 0], np.where(steps == 0, 1, steps), rtol=1e-12)


def check_int8_is_its_definition():
    for seed in SEEDS:
        X, W = draw(seed)
        got = multiply(double(ft.Int8()(W)), X)
        wanted = int8_by_definition(X, W, np.zeros(0, int), W)
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12 * abs(wanted).max())


def check_the_error_of_int8_has_its_bound():
    for seed in SEEDS:
        X, W = draw(seed)
        for activations in ("absmax", "affine"):
            packed = ft.Int8(activations)(W)
            s_x = host(int8.quantize_rows(dev(X), activations).scale)
            s_w = host(packed.scale).astype(np.float64)
            error = abs(multiply(double(packed), X) - X @ W.T)
            assert (error <= rounding_bound(X, W, s_x, s_w) * (1 + 1e-5) + 1e-300).all(), (seed, activations)


def check_outliers_are_multiplied_in_floating_point():
    for seed in SEEDS:
        X, W = draw(seed)
        threshold = float(np.quantile(abs(X), 0.9))
        O = outlier_columns(X, threshold)
        for kept in ("codes", "dense"):
            packed = double(ft.LLMInt8(threshold, kept)(W))
            dense = W if kept == "dense" else dequantized(double(ft.Int8()(W)))
            wanted = int8_by_definition(X, W, O, dense)
            np.testing.assert_allclose(multiply(packed, X), wanted, rtol=1e-9, atol=1e-9 * abs(wanted).max())


def check_when_all_columns_are_outliers_nothing_is_rounded():
    for seed in SEEDS:
        X, W = draw(seed)
        X += (X == 0) * 1e-3
        exact = multiply(double(ft.LLMInt8(1e-12, "dense")(W)), X)
        np.testing.assert_allclose(exact, X @ W.T, rtol=1e-12, atol=1e-12 * abs(exact).max())


def check_without_outliers_it_is_int8():
    for seed in SEEDS:
        X, W = draw(seed, np.float32)
        packed = ft.LLMInt8(2 * float(abs(X).max()) + 1)(W)
        np.testing.assert_array_equal(multiply(packed, X), multiply(ft.Int8()(W), X))


def check_tokens_do_not_see_each_other():
    """Int8 treats each token alone. LLM.int8() does as well, once the columns of outliers are the same."""
    for seed in SEEDS:
        X, W = draw(seed, np.float32)
        X = np.concatenate([X, X[::-1], X[:1]])
        width = X.shape[1]
        for rule in (ft.Int8(), ft.Int8("affine"), ft.LLMInt8(9.0)):
            packed = rule(W)
            if isinstance(rule, ft.LLMInt8):
                X = X / abs(X).max()
                X[:, rng_column(seed, width)] = 10           # an outlier in every token
            one_by_one = np.concatenate([multiply(packed, X[t:t + 1]) for t in range(len(X))])
            together = multiply(packed, X)
            np.testing.assert_allclose(one_by_one, together, rtol=1e-6, atol=1e-6 * abs(together).max())


def rng_column(seed: int, width: int) -> int:
    return int(np.random.default_rng(seed + 1000).integers(width))


def check_the_gradient_is_that_of_the_rounded_weight():
    """dX = G Ŵ for every column: straight through the rounding of X, with W itself where it is kept."""
    for seed in SEEDS:
        X, W = draw(seed)
        threshold = float(np.quantile(abs(X), 0.9)) or 1.0
        G = np.random.default_rng(seed).standard_normal((len(X), len(W)))
        weight = dequantized(double(ft.Int8()(W)))
        for rule, dense in ((ft.Int8(), weight), (ft.Int8("affine"), weight), (ft.LLMInt8(threshold), weight),
                            (ft.LLMInt8(threshold, "dense"), W)):
            x = Tensor(dev(X), requires_grad=True)
            (double(rule(W)).matmul(x) * Tensor(dev(G))).sum().backward()
            np.testing.assert_allclose(host(x.grad), G @ dense, rtol=1e-10, atol=1e-12 * abs(W).max())


def check_the_weight_is_its_rounding():
    for seed in SEEDS:
        _, W = draw(seed)
        packed = double(ft.Int8()(W))
        dense, s = dequantized(packed), host(packed.scale).astype(np.float64)[:, None]
        assert (abs(dense - W) <= s / 2 * (1 + 1e-5)).all()
        assert (dense[W == 0] == 0).all()
        np.testing.assert_array_equal(host(packed.rows(dev(np.array([[0], [len(W) - 1]]))))[:, 0], dense[[0, -1]])
        np.testing.assert_array_equal(dequantized(double(ft.LLMInt8(outlier_weights="dense")(W))), W)


CHECKS = [check for name, check in sorted(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS)
def test_int8(check):
    check()


# ── single facts ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_published_codes():
    """The example of the blog post that introduced LLM.int8() in transformers."""
    x = np.array([[1.2, -0.5, -4.3, 1.2, -3.1, 0.8, 2.4, 5.4]])
    assert host(int8.quantize_rows(dev(x)).codes)[0].tolist() == [28, -12, -101, 28, -73, 19, 56, 127]


def test_a_product_in_many_blocks_is_the_product(rng, monkeypatch):
    X, W = rng.standard_normal((5, 12)), rng.standard_normal((11, 12))
    X[2, 3] = 9
    for rule in (ft.Int8(), ft.Int8("affine"), ft.LLMInt8(5.0), ft.LLMInt8(5.0, "dense")):
        packed = double(rule(W))
        whole = multiply(packed, X)
        with monkeypatch.context() as patch:
            patch.setattr(coded, "DENSE", 24)
            assert len(packed.blocks()) == 6
            np.testing.assert_allclose(multiply(packed, X), whole, rtol=1e-12)


def test_activations_of_one_sign_have_half_the_error_with_a_zero_point():
    ratios = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        X, W = abs(rng.standard_normal((64, 128))), rng.standard_normal((32, 128))
        errors = []
        for activations in ("absmax", "affine"):
            packed = double(ft.Int8(activations)(W))
            errors.append(np.linalg.norm(multiply(packed, X) - X @ dequantized(packed).T))
        ratios.append(errors[1] / errors[0])
    assert 0.4 < np.median(ratios) < 0.6


def test_outliers_ruin_int8_and_not_llm_int8():
    """One input that is 60 times as large as the others: their rounding has hardly a step left in Int8."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        X, W = rng.standard_normal((32, 256)), rng.standard_normal((64, 256))
        X[:, 7] *= 60
        others = np.delete(np.arange(256), 7)
        wanted = X[:, others] @ W[:, others].T
        errors = []
        for rule in (ft.Int8(), ft.LLMInt8(6.0, "dense")):
            # The large input itself is the same in both: the error of all other inputs is compared.
            got = multiply(double(rule(W)), X) - np.outer(X[:, 7], W[:, 7])
            errors.append(np.linalg.norm(got - wanted))
        assert errors[1] < errors[0] / 4


def test_numbers_that_are_not_finite_stay_visible():
    W = np.ones((3, 2000), np.float32)
    X = np.ones((3, 2000), np.float32)
    X[0, 0] = np.nan
    X[1, 5] = np.inf
    for rule in (ft.Int8(), ft.Int8("affine"), ft.LLMInt8()):
        with np.errstate(invalid="ignore"):
            y = multiply(rule(W), X)
        assert np.isnan(y[0]).all()
        assert not np.isfinite(y[1]).any()
        np.testing.assert_allclose(y[2], 2000, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("width", [4, 1100])
def test_products_have_the_dtype_of_their_inputs_and_rows_that_of_the_model(dtype, width, rng):
    """Sums are float32 or float64 inside."""
    W = rng.standard_normal((3, width)).astype(np.float32)
    X = rng.standard_normal((2, width)).astype(dtype)
    for rule in (ft.Int8(), ft.Int8("affine"), ft.LLMInt8(1.0), ft.LLMInt8(1.0, "dense")):
        packed = rule(W)
        assert multiply(packed, X).dtype == dtype
        packed.to(dtype=dtype)
        assert multiply(packed, X).dtype == dtype
        assert packed.dequantize().dtype == dtype
        assert packed.dequantize_rows(slice(0, 2)).dtype == dtype
        assert packed.rows(dev(np.array([2, 0]))).dtype == dtype


def test_it_is_printed_with_its_settings():
    W = np.ones((2, 8), np.float32)
    assert ft.Int8("affine")(W).extra_repr() == "int8 (2, 8), affine activations, 24 bytes"
    assert ft.LLMInt8(5.5)(W).extra_repr() == "int8 (2, 8), absmax activations, outliers from 5.5, 24 bytes"


def test_the_largest_number_stays_finite():
    """max |w| / 127 times 127 may be beyond float32; then the scale is smaller by 2⁻²²."""
    top = np.finfo(np.float32).max
    for dtype in (np.float32, np.float64):
        W = np.array([[top, 0, -top], [1, 0.5, -1]], dtype)
        packed = ft.Int8()(W)
        np.testing.assert_allclose(host(packed.scale), [top / 127, np.float32(1 / 127)], rtol=3e-7)
        np.testing.assert_allclose(host(packed.dequantize())[0], W[0], rtol=1e-6)
        np.testing.assert_array_equal(host(packed.scale)[1], np.float32(1 / 127))


def test_an_empty_batch_and_more_axes(rng):
    W = rng.standard_normal((3, 4)).astype(np.float32)
    for rule in (ft.Int8(), ft.Int8("affine"), ft.LLMInt8()):
        assert multiply(rule(W), np.zeros((0, 4), np.float32)).shape == (0, 3)
        X = rng.standard_normal((2, 5, 4)).astype(np.float32)
        np.testing.assert_array_equal(multiply(rule(W), X), multiply(rule(W), X.reshape(10, 4)).reshape(2, 5, 3))


def test_the_dense_weight_is_never_made(rng, monkeypatch):
    monkeypatch.setattr(coded, "DENSE", 64)
    packed = ft.Int8()(rng.standard_normal((40, 16)).astype(np.float32))
    largest = []
    take = Int8Weight.dequantize_rows
    monkeypatch.setattr(Int8Weight, "dequantize", None)
    monkeypatch.setattr(Int8Weight, "dequantize_rows", lambda self, rows: largest.append(rows) or take(self, rows))
    x = Tensor(dev(rng.standard_normal((3, 16)), np.float32), requires_grad=True)
    packed.matmul(x).sum().backward()
    assert len(largest) == 10
    assert max(rows.stop - rows.start for rows in largest) == 4


@pytest.mark.parametrize("rule", [ft.Int8(), ft.Int8("affine"), ft.LLMInt8(2.0), ft.LLMInt8(2.0, "dense")],
                         ids=lambda rule: str(rule)[:40])
def test_a_model_with_int8_weights_computes_trains_and_moves(rule, rng):
    config = ft.GPTConfig(vocab=30, positions=16, width=16, layers=2, heads=2)
    ids = rng.integers(0, 30, (4, 12))
    base, model = ft.GPT(config, seed=1), ft.GPT(config, seed=1)
    ft.compress(model, rule)
    wanted, got = host(base(ids)), host(model(ids))
    assert np.abs(got - wanted).max() < 0.05 * np.abs(wanted).max()
    assert type(model.blocks[0].attn.q.weight) is Int8Weight
    bytes_of_codes = 16 * 16 + 16 * 4
    dense = 16 * 16 * 4 if "dense" in str(rule) else 0
    assert model.blocks[0].attn.q.weight.nbytes == bytes_of_codes + dense
    for dtype in ("float16", "bfloat16", "float32"):
        half = host(model.to(dtype=dtype)(ids)).astype(np.float32)
        assert np.abs(half - got).max() < 0.1 * np.abs(got).max()
    ft.attach(model, ft.LoRA(r=2))
    history = ft.fit(model, [ids], steps=20, optimizer=ft.AdamW(lr=0.02), progress=False)
    assert history.losses[-1] < history.losses[0]
    with pytest.raises(ft.CannotMerge, match="unpack"):
        ft.merge(model)


def test_decoding_through_the_cache_gives_the_same_tokens(rng):
    """Each token has its own scale, so that it does not matter which tokens a pass computes."""
    model = ft.GPT(ft.GPTConfig(vocab=30, positions=16, width=16, layers=2, heads=2), seed=1)
    ft.compress(model, ft.Int8())
    ids = rng.integers(0, 30, (2, 5))
    with_cache = ft.generate(model, ids, max_new_tokens=6, temperature=0, cache=True)
    without = ft.generate(model, ids, max_new_tokens=6, temperature=0, cache=False)
    np.testing.assert_array_equal(host(with_cache), host(without))


def test_a_captured_step_refuses_llm_int8(rng, monkeypatch):
    packed = ft.LLMInt8()(rng.standard_normal((3, 4)).astype(np.float32))
    monkeypatch.setattr(array, "recording", object())
    with pytest.raises(array.CannotCapture, match="Int8, which has no outliers"):
        packed.prepare(dev(np.ones((2, 4), np.float32)))


@pytest.mark.parametrize("make, message", [
    (lambda: ft.Int8("minmax"), "absmax"),
    (lambda: ft.LLMInt8(0), "> 0"),
    (lambda: ft.LLMInt8(outlier_weights="both"), "codes"),
    (lambda: ft.Int8()(np.array([[np.inf]], np.float32)), "finite"),
    (lambda: Int8Weight(np.zeros((2, 3), np.uint8), np.ones(2)), "int8"),
    (lambda: Int8Weight(np.full((2, 3), -128, np.int8), np.ones(2)), "-127"),
    (lambda: Int8Weight(np.zeros((2, 3), np.int8), np.ones(3)), "shape"),
    (lambda: Int8Weight(np.zeros((2, 3), np.int8), np.array([1, np.nan])), "finite"),
])
def test_what_makes_no_sense_is_refused(make: Callable, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


# ── wrong answers ────────────────────────────────────────────────────────────────────────────────────────────────────
right_prepare, right_product, right_quantize = Int8Weight.prepare, Int8Weight.product, int8.quantize_rows
right_weight = int8.quantize_weight


def sum_in_float32(q, codes):
    return q @ codes.astype(np.float32)


def chunks_added_in_float32(q, codes):
    total = 0
    for start in range(0, len(codes), 1032):
        total = total + q[:, start:start + 1032] @ codes[start:start + 1032].astype(np.float32)
    return total


def chunks_of_2048(q, codes):
    total = 0
    for start in range(0, len(codes), 2048):
        total = total + (q[:, start:start + 2048] @ codes[start:start + 2048].astype(np.float32)).astype(np.float64)
    return total


def zero_point_with_the_wrong_sign(total, zero, codes):
    return total + zero.astype(np.float64) * codes.sum(axis=0, dtype=np.int64)


def zero_point_in_float32(total, zero, codes):
    return total.astype(np.float32) - zero * codes.astype(np.float32).sum(axis=0)


def zero_point_forgotten(total, zero, codes):
    return total


def outliers_stay_in_the_codes(self, x):
    """The columns O are multiplied twice."""
    r = right_prepare(self, x)
    if r.columns is None:
        return r
    return right_quantize(x)._replace(columns=r.columns, outliers=r.outliers)


def scale_counts_outliers(self, x):
    """The columns O are zero in the codes, and still stretch the scale of their token."""
    r = right_prepare(self, x)
    if r.columns is None:
        return r
    whole = right_quantize(x)
    codes = whole.codes.copy()
    codes[:, r.columns] = 0
    return r._replace(codes=codes, scale=whole.scale)


def outliers_of_single_values(self, x):
    """Only the large values leave the codes; their columns stay for the other tokens."""
    r = right_prepare(self, x)
    if r.columns is None:
        return r
    large = abs(x) >= self.threshold
    inside = right_quantize(array.xp(x).where(large, array.xp(x).zeros_like(x), x))
    return inside._replace(columns=r.columns, outliers=r.outliers)


def outliers_of_the_first_token(self, x):
    """The first token decides."""
    columns = right_prepare(self, x[:1]).columns
    if columns is None:
        return right_quantize(x, self.activations)
    inside = x.copy()
    inside[:, columns] = 0
    return right_quantize(inside, self.activations)._replace(columns=columns, outliers=x[:, columns])


def no_outlier_product(self, x, rows):
    return right_product(self, x._replace(columns=None), rows)


def scale_divided_by_127_twice(x, activations="absmax"):
    r = right_quantize(x, activations)
    return r._replace(scale=r.scale / 127)


def one_scale_for_all_tokens(x, activations="absmax"):
    r = right_quantize(x, activations)
    s = array.xp(x).full_like(r.scale, r.scale.max())
    return r._replace(scale=s, codes=array.xp(x).rint(x / s).astype(np.float32))


def rounded_towards_zero(x, activations="absmax"):
    r = right_quantize(x, activations)
    zero = 0 if r.zero is None else r.zero
    return r._replace(codes=(array.xp(x).trunc(x / r.scale) + zero).clip(-128, 127).astype(np.float32))


def codes_of_128(x, activations="absmax"):
    """The scale is max |x| / 128, and the largest code does not fit."""
    r = right_quantize(x, activations)
    if r.zero is not None:
        return r
    s = r.scale * (127 / 128)
    return r._replace(scale=s, codes=array.xp(x).rint(x / s).clip(-128, 127).astype(np.float32))


def one_scale_for_the_weight(W):
    codes, s = right_weight(W)
    return np.rint(W / s.max()).astype(np.int8), np.full_like(s, s.max())


def weight_scale_of_128(W):
    codes, s = right_weight(W)
    return codes, s * (127 / 128)


def gradient_of_the_codes(self, rows):
    """The gradient forgets the scales."""
    return self.codes[:, rows].T.astype(self.unit.dtype)


def gradient_without_kept_weights(self, rows):
    """The gradient uses the rounded weight where the product used W."""
    if isinstance(rows, slice):
        return self.columns(rows).T
    return self.columns(rows.reshape(-1)).T.reshape(*rows.shape, self.shape[1])


class NoGradient(Int8Weight):
    """The rounding has the derivative 0."""

    def matmul(self, x):
        return super().matmul(x.detach()) + (x * 0).sum()


WRONG = [
    ("integer_product", sum_in_float32), ("integer_product", chunks_added_in_float32),
    ("integer_product", chunks_of_2048), ("zero_point_product", zero_point_with_the_wrong_sign),
    ("zero_point_product", zero_point_in_float32), ("zero_point_product", zero_point_forgotten),
    ("Int8Weight.prepare", outliers_stay_in_the_codes), ("Int8Weight.prepare", scale_counts_outliers),
    ("Int8Weight.prepare", outliers_of_single_values), ("Int8Weight.prepare", outliers_of_the_first_token),
    ("Int8Weight.product", no_outlier_product), ("quantize_rows", scale_divided_by_127_twice),
    ("quantize_rows", one_scale_for_all_tokens), ("quantize_rows", rounded_towards_zero),
    ("quantize_rows", codes_of_128), ("quantize_weight", one_scale_for_the_weight),
    ("quantize_weight", weight_scale_of_128), ("Int8Weight.dequantize_rows", gradient_of_the_codes),
    ("Int8Weight.dequantize_rows", gradient_without_kept_weights), ("Int8Weight", NoGradient),
]


@wrong_answers
@pytest.mark.parametrize("target, f", WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_answer_is_rejected(target, f, monkeypatch):
    owner, _, name = target.rpartition(".")
    monkeypatch.setattr(getattr(int8, owner) if owner else int8, name, f)
    for check in CHECKS:
        try:
            with np.errstate(all="ignore"):
                check()
        except (AssertionError, ValueError):
            return
    pytest.fail(f"nothing rejects {f.__name__}")

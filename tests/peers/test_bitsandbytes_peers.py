"""Codebooks and 8-bit rows beside bitsandbytes on the CPU: packed bytes, scales, dense values, outliers.

bitsandbytes multiplies by 1/a where we divide by a. A weight within rounding of a midpoint may therefore get the next
code; every other code is the same. On the CPU, its table of FP4 has four decimals, its dynamic map is computed in
float32, and its 8-bit kernel rounds w/a to 16 bits before it looks for the code.
"""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import host

import tinyft as ft
from tinyft.compress import Codebook
from tinyft.compress.codebooks import get_table
from tinyft.compress.quantize import int8

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'tinyft[peers]'")
bnb = pytest.importorskip("bitsandbytes.functional", exc_type=ImportError,
                          reason="bitsandbytes is not installed: pip install 'tinyft[peers]'")

ROUNDING = 3e-7                                          # of w/a, by the product with 1/a
DECIMALS = 5e-5                                          # of their FP4
BUCKET = 2.0**-16                                        # the width of the buckets in which their 8-bit kernel looks


def weights(rng: np.random.Generator, shape: tuple) -> np.ndarray:
    W = rng.standard_normal(shape) * rng.choice([1e-6, 1e-3, 1, 50], (shape[0], 1))
    W[0] = 0
    W[1, :64] = 0.25
    W[2] = -abs(W[2]) - 1
    W[3, 7] = 1e5
    return W.astype(np.float32)


def their_bytes(packed: Codebook) -> np.ndarray:
    """The codes in the layout of bitsandbytes: row after row, the first of two codes in the high half of a byte."""
    codes = packed.code_matrix().ravel()
    codes = np.pad(codes, (0, codes.size % 2))
    return codes[::2] << 4 | codes[1::2]


def their_codes(stored: Any, n: int) -> np.ndarray:
    stored = stored.numpy().ravel()
    return np.stack([stored >> 4, stored & 15], axis=1).ravel()[:n]


def assert_same_codes(ours: np.ndarray, theirs: np.ndarray, u: np.ndarray, name: str, tolerance: float) -> None:
    """The codes are the same, except beside a midpoint; there, they are those of neighbouring values."""
    table = get_table(name)
    rank = np.zeros(len(table.values), int)
    rank[table.codes] = np.arange(len(table.codes))
    ours, theirs = rank[ours], rank[theirs]
    to_midpoint = abs(u[:, None].astype(np.float64) - table.midpoints).min(axis=1)
    clear = to_midpoint > tolerance
    np.testing.assert_array_equal(ours[clear], theirs[clear])
    assert abs(ours - theirs).max() <= 1
    assert (~clear).mean() < 0.01


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(40, 192), (5, 64), (33, 320)])
def test_four_bits(name, shape, rng):
    W = weights(rng, shape)
    stored, state = bnb.quantize_4bit(torch.from_numpy(W), blocksize=64, quant_type=name)
    packed = {"nf4": ft.NF4, "fp4": ft.FP4}[name](block=64, double=False)(W)
    a = host(packed.scale).T.ravel()
    # They give a block of zeros the scale 1e-38.
    np.testing.assert_allclose(state.absmax.numpy(), a, rtol=0, atol=2e-38)
    u = (W.reshape(-1, 64) / np.where(a == 0, 1, a)[:, None]).ravel()
    codes = their_codes(stored, W.size)
    codes[codes == 8] *= name != "fp4"                   # their -0
    tolerance = ROUNDING if name == "nf4" else DECIMALS
    assert_same_codes(packed.code_matrix().ravel(), codes, u, name, tolerance)
    if name == "nf4" and (packed.code_matrix().ravel() == codes).all():
        np.testing.assert_array_equal(their_bytes(packed), stored.numpy().ravel())
    theirs = bnb.dequantize_4bit(stored, state).numpy()
    mine = Codebook(codes.reshape(shape), host(packed.scale).T, table=name)
    allowed = 0 if name == "nf4" else DECIMALS * np.repeat(a, 64).reshape(shape)
    assert (abs(host(mine.dequantize()) - theirs) <= allowed).all()


def test_the_bytes_of_nf4_are_the_same(rng):
    """Normal weights, none of which is beside a midpoint."""
    W = rng.standard_normal((64, 256)).astype(np.float32)
    stored, _ = bnb.quantize_4bit(torch.from_numpy(W), blocksize=64, quant_type="nf4")
    np.testing.assert_array_equal(their_bytes(ft.NF4(double=False)(W)), stored.numpy().ravel())


def test_a_last_block_that_is_short(rng):
    """One row: then the blocks of a row are those of the flattened weight, whatever its length."""
    W = rng.standard_normal((1, 151)).astype(np.float32)
    stored, state = bnb.quantize_4bit(torch.from_numpy(W), blocksize=64, quant_type="nf4")
    packed = ft.NF4(double=False)(W)
    np.testing.assert_array_equal(packed.code_matrix()[0], their_codes(stored, 151))
    np.testing.assert_array_equal(host(packed.scale).ravel(), state.absmax.numpy())


@pytest.mark.parametrize("shape", [(40, 192), (64, 1024), (3, 64)])
def test_double_quantization(shape, rng):
    W = rng.standard_normal(shape).astype(np.float32)
    stored, state = bnb.quantize_4bit(torch.from_numpy(W), blocksize=64, quant_type="nf4", compress_statistics=True)
    packed = ft.NF4()(W)
    np.testing.assert_array_equal(their_bytes(packed), stored.numpy().ravel())
    mean = np.frombuffer(host(packed.mean_bits).astype(np.uint32).tobytes(), np.float32)
    assert mean == pytest.approx(float(state.offset), rel=1e-6)
    second = host(packed.second_bits).view(np.float32)
    np.testing.assert_allclose(second, state.state2.absmax.numpy(), rtol=1e-6)
    ours, theirs = host(packed.scale_codes).T.ravel(), state.absmax.numpy()
    assert (ours != theirs).mean() < 0.02, "a mean that differs in its last bit moves few codes"
    assert abs(ours.astype(int) - theirs).max() <= 1
    np.testing.assert_allclose(get_table("dynamic").values, state.state2.code.numpy(), rtol=2e-7, atol=0)
    dense, wanted = host(packed.dequantize()), bnb.dequantize_4bit(stored, state).numpy()
    same = np.repeat((ours == theirs).reshape(shape[0], -1), 64, axis=1)
    np.testing.assert_allclose(dense[same], wanted[same], rtol=2e-6, atol=0)
    assert abs(dense - wanted).max() <= 0.0141 * second.max()


def test_eight_bits(rng):
    W = rng.standard_normal((33, 512)).astype(np.float32)
    codes, state = bnb.quantize_blockwise(torch.from_numpy(W), blocksize=256)
    packed = ft.Dynamic8(block=256)(W)
    a = host(packed.scale).T.ravel()
    np.testing.assert_array_equal(state.absmax.numpy(), a)
    np.testing.assert_allclose(get_table("dynamic").values, state.code.numpy(), rtol=2e-7, atol=0)
    u = (W.reshape(-1, 256) / np.where(a == 0, 1, a)[:, None]).ravel()
    assert_same_codes(packed.code_matrix().ravel(), codes.numpy().ravel(), u, "dynamic", BUCKET)
    mine = Codebook(codes.numpy(), host(packed.scale).T, table="dynamic", group=256)
    theirs = bnb.dequantize_blockwise(codes, state).numpy()
    np.testing.assert_allclose(host(mine.dequantize()), theirs, rtol=4e-7, atol=0)


# ── 8-bit rows and outliers ──────────────────────────────────────────────────────────────────────────────────────────
def half(a: np.ndarray) -> np.ndarray:
    """Numbers of float16 in float32: bitsandbytes quantizes rows of float16."""
    return a.astype(np.float16).astype(np.float32)


def their_rows(a: np.ndarray, threshold: float = 0.0) -> tuple[np.ndarray, np.ndarray, Any]:
    """(codes, the largest magnitude of each row, the columns of outliers) of bitsandbytes."""
    codes, largest, columns = bnb.int8_vectorwise_quant(torch.from_numpy(a.astype(np.float16)), threshold=threshold)
    return codes.numpy(), largest.numpy(), columns


def test_rows_of_8_bits(rng):
    """A weight of the model and the activations of a batch: a scale for each row."""
    W = half(rng.standard_normal((40, 192)) * rng.choice([0.01, 1, 50], (40, 1)))
    codes, largest, _ = their_rows(W)
    packed = ft.Int8()(W)
    np.testing.assert_allclose(host(packed.scale) * 127, largest, rtol=2e-7)
    away = abs(W * (127 / largest)[:, None] % 1 - 0.5) > 1e-4
    assert away.mean() > 0.99
    np.testing.assert_array_equal(host(packed.codes).T[away], codes[away])
    np.testing.assert_array_equal(host(int8.quantize_rows(W).codes)[away], codes[away])


def test_columns_of_outliers(rng):
    """The columns, and the codes and scales of the others.

    Where an outlier's column holds a small value, bitsandbytes counts it for the scale of its token; the paper, and we,
    do not. So all values of these columns are large here, and one small value shows the difference below."""
    X = half(rng.standard_normal((12, 64)).clip(-5, 5))
    outliers = [3, 17, 40]
    X[:, outliers] = half(rng.uniform(6, 60, (12, 3)) * rng.choice([-1, 1], (12, 3)))
    codes, largest, columns = their_rows(X, 6.0)
    ours = ft.LLMInt8(6.0)(np.ones((2, 64), np.float32)).prepare(X)
    np.testing.assert_array_equal(host(ours.columns), columns.numpy())
    np.testing.assert_array_equal(host(ours.columns), outliers)
    np.testing.assert_allclose(host(ours.scale)[:, 0] * 127, largest, rtol=2e-7)
    away = abs(X * (127 / largest)[:, None] % 1 - 0.5) > 1e-4
    np.testing.assert_array_equal(host(ours.codes)[away], codes[away])
    assert (host(ours.codes)[:, outliers] == 0).all()
    np.testing.assert_array_equal(host(ours.outliers), X[:, outliers])
    X[0, 3] = 5.75
    _, largest, columns = their_rows(X, 6.0)
    ours = ft.LLMInt8(6.0)(np.ones((2, 64), np.float32)).prepare(X)
    np.testing.assert_array_equal(host(ours.columns), columns.numpy())
    assert largest[0] == 5.75 > 127 * host(ours.scale)[0, 0]


def test_the_layout_of_ours_would_not_do(rng):
    """The bytes of a row-major weight with the first code in the low half are not theirs."""
    W = rng.standard_normal((8, 64)).astype(np.float32)
    stored, _ = bnb.quantize_4bit(torch.from_numpy(W), blocksize=64, quant_type="nf4")
    packed = ft.NF4(double=False)(W)
    swapped = host(packed.codes).T.ravel()
    assert (swapped != stored.numpy().ravel()).any()
    np.testing.assert_array_equal(swapped << 4 | swapped >> 4, stored.numpy().ravel())

"""Packed weights in the block formats of GGUF files: compression, decompression, products, dtypes.

tests/peers/test_gguf_peers.py compares the bytes with the package gguf.
"""
from __future__ import annotations

import numpy as np
import pytest
from helpers import dev, gradcheck, host

from tinyft import array, kernels
from tinyft.compress import FORMATS, Q4_1, coded
from tinyft.tensor import Tensor

PACKED = pytest.mark.parametrize("kind", FORMATS)
CODES_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


# ── blocks ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def weights(rng: np.random.Generator, rows: int = 70, columns: int = 96) -> np.ndarray:
    """Rows of very different sizes, with a block of zeros and a constant block."""
    W = rng.standard_normal((rows, columns)) * rng.choice([0.05, 1, 40], (rows, 1))
    W[1, :32] = 0
    W[2, 32:64] = 0.25
    return W.astype(np.float32)


def by_definition(blocks: np.ndarray, kind: str) -> np.ndarray:
    """The weights of blocks (out, in/32, bytes), one at a time, as the specification has it."""
    out = np.empty((len(blocks), blocks.shape[1] * 32), np.float32)
    for i, row in enumerate(blocks):
        for b, block in enumerate(row):
            data = block.tobytes()
            d = np.float32(np.frombuffer(data[:2], np.float16)[0])
            m = np.float32(np.frombuffer(data[2:4], np.float16)[0])
            for j in range(32):
                if kind == "Q8_0":
                    x = d * np.float32(np.frombuffer(data[2:], np.int8)[j])
                else:
                    byte = data[(4 if kind == "Q4_1" else 2) + j % 16]
                    q = np.float32(byte & 15 if j < 16 else byte >> 4)
                    x = d * q + m if kind == "Q4_1" else d * (q - np.float32(8))
                out[i, 32 * b + j] = x
    return out


@PACKED
def test_decompression_is_the_definition_bit_for_bit(kind, rng):
    packed = FORMATS[kind].quantize(weights(rng, 7, 64))
    expected = by_definition(packed.file_blocks(), kind)
    np.testing.assert_array_equal(host(packed.dequantize()), expected)
    np.testing.assert_array_equal(host(packed.dequantize_rows(slice(2, 5))), expected[2:5])
    ids = np.array([[6, 0, 6], [1, 2, 3]])
    np.testing.assert_array_equal(host(packed.dequantize_rows(dev(ids))), expected[ids])
    np.testing.assert_array_equal(host(packed.rows(dev(ids))), expected[ids])
    flipped = packed.file_blocks()
    flipped[0, 0, -1] = (flipped[0, 0, -1] >> 4) | (flipped[0, 0, -1] << 4) + 1
    assert not np.array_equal(host(FORMATS[kind](flipped).dequantize()), expected), "another byte, other weights"


# The bytes that llama.cpp's reference makes of one block, from the package gguf.
BLOCK = ((np.arange(32) * 7) % 32 - 10).astype(np.float32) / 4
BYTES = {
    "Q4_0": "40b96c3906a4715b28b593603a17a4825b28",
    "Q4_1": "223800c180b3f72a6e91d5084c7fb3e62a5d91c4",
    "Q8_0": "4b29c4ee18436dd6002a557fe8123c67d0fa244f79e20c3661caf41e4973dc06305b",
}


@PACKED
def test_the_bytes_of_a_block_are_those_of_the_reference(kind, rng):
    assert FORMATS[kind].quantize(BLOCK[None]).file_blocks().tobytes().hex() == BYTES[kind]
    W = rng.standard_normal((3, 64)) * 3
    expected = FORMATS[kind].quantize(W.astype(np.float32)).file_blocks()
    np.testing.assert_array_equal(FORMATS[kind].quantize(dev(W)).file_blocks(), expected)
    short = W.astype(array.bfloat16)
    np.testing.assert_array_equal(FORMATS[kind].quantize(dev(short)).file_blocks(),
                                  FORMATS[kind].quantize(short.astype(np.float32)).file_blocks())
    whole = np.round(W * 10).astype(np.int64)
    np.testing.assert_array_equal(FORMATS[kind].quantize(dev(whole)).file_blocks(),
                                  FORMATS[kind].quantize(whole.astype(np.float32)).file_blocks())


@PACKED
def test_the_error_of_a_weight_is_at_most_half_a_step(kind, rng):
    """And 1/2048 of the scales, which are rounded to float16. A step is d; Q4_0 has no 16th code, so one side may miss
    a whole step."""
    W = weights(rng)
    packed = FORMATS[kind].quantize(W)
    blocks = W.reshape(len(W), -1, 32)
    span = {"Q4_0": abs(blocks).max(-1) / 8, "Q4_1": np.ptp(blocks, axis=-1) / 15, "Q8_0": abs(blocks).max(-1) / 127}
    steps = {"Q4_0": 1.0, "Q4_1": 0.5, "Q8_0": 0.5}[kind]
    error = abs(host(packed.dequantize()).reshape(blocks.shape) - blocks).max(-1)
    assert (error <= span[kind] * steps + abs(blocks).max(-1) / 1000 + 1e-7).all()
    assert error.max() > span[kind].max() / 10


@PACKED
def test_blocks_come_out_as_they_went_in(kind, rng):
    blocks = FORMATS[kind].quantize(weights(rng)).file_blocks()
    np.testing.assert_array_equal(FORMATS[kind](blocks).file_blocks(), blocks)
    assert FORMATS[kind](blocks).nbytes == blocks.nbytes == blocks.shape[0] * blocks.shape[1] * CODES_BYTES[kind]
    order = rng.permutation(len(blocks))
    np.testing.assert_array_equal(FORMATS[kind](blocks).take_rows(order).file_blocks(), blocks[order])


@PACKED
def test_a_product_with_a_packed_weight_is_that_with_the_dense_one(kind, rng, monkeypatch):
    """Value and gradient; in one block of rows, and in blocks of 8 of which the last is smaller."""
    packed = FORMATS[kind].quantize(weights(rng, 21, 64))
    W = host(packed.dequantize()).astype(np.float64)
    x, g = rng.standard_normal((3, 5, 64)), rng.standard_normal((3, 5, 21))
    for limit in (1 << 20, 8 * 64):
        monkeypatch.setattr(coded, "DENSE", limit)
        leaf = Tensor(dev(x, np.float32), requires_grad=True)
        y = packed.matmul(leaf)
        (y * Tensor(dev(g, np.float32))).sum().backward()
        scale = abs(W).max()
        np.testing.assert_allclose(host(y), x @ W.T, atol=2e-5 * scale)
        np.testing.assert_allclose(host(leaf.grad), g @ W, atol=2e-5 * scale)
    packed.to(dtype="float64")
    gradcheck(lambda x: packed.matmul(x), [x[0]], rng, tol=1e-5)


def test_a_product_never_holds_more_than_a_block_of_dense_rows(rng, monkeypatch):
    monkeypatch.setattr(coded, "DENSE", 640)
    packed = Q4_1.quantize(weights(rng, 37, 64))
    sizes = []
    columns = Q4_1.columns

    def counted(self, rows):
        out = columns(self, rows)
        sizes.append(out.size)
        return out

    monkeypatch.setattr(Q4_1, "columns", counted)
    x = Tensor(dev(rng.standard_normal((20, 64)), np.float32), requires_grad=True)
    with kernels.definitions():
        packed.matmul(x).sum().backward()
    assert max(sizes) == 640
    assert sum(sizes) == 2 * 37 * 64, "once forward, once backward"
    monkeypatch.setattr(coded, "DENSE", 10)
    assert packed.rows_per_block == 1, "a row longer than the limit"


@PACKED
def test_a_packed_weight_moves_to_a_dtype_without_losing_a_bit(kind, rng):
    packed = FORMATS[kind].quantize(weights(rng, 9, 64))
    exact = host(packed.dequantize())
    assert packed.to(dtype="bfloat16").dequantize().dtype == array.bfloat16
    assert packed.dequantize_rows(slice(0, 2)).dtype == array.bfloat16
    assert packed.to(dtype="float64").dequantize().dtype == np.float64
    np.testing.assert_array_equal(host(packed.to(dtype="float32").dequantize()), exact)
    state = {name: host(a) for name, a in packed.state_dict().items()}
    other = FORMATS[kind].quantize(np.ones((9, 64), np.float32))
    other.load_state_dict(state)
    np.testing.assert_array_equal(host(other.dequantize()), exact)


@pytest.mark.parametrize("bad, error, words", [
    (np.ones((4, 40), np.float32), ValueError, "a multiple of 32 weights, got \\(4, 40\\)"),
    (np.ones(64, np.float32), ValueError, "a matrix"),
    (np.ones((0, 64), np.float32), ValueError, "a matrix"),
    (np.full((1, 32), np.nan), ValueError, "finite values"),
    (np.full((1, 32), 1e6), ValueError, "the range of float16"),
    (np.full((1, 32), "x"), TypeError, "real numbers"),
    ([[1.0] * 32], TypeError, "an array"),
    (None, TypeError, "an array"),
])
def test_quantize_refuses(bad, error, words):
    for cls in FORMATS.values():
        with pytest.raises(error, match=words):
            cls.quantize(bad)


@pytest.mark.parametrize("bad, error", [
    (np.zeros((2, 1, 19), np.uint8), ValueError), (np.zeros((2, 20), np.uint8), ValueError),
    (np.zeros((0, 1, 20), np.uint8), ValueError), (np.zeros((2, 1, 20), np.int8), TypeError), (None, TypeError),
    (np.full((2, 1, 20), 0x3C, np.uint8), None),
    (np.full((2, 1, 20), 0x7C, np.uint8), ValueError), (np.full((2, 1, 20), 0xFF, np.uint8), ValueError),
])
def test_blocks_of_another_shape_or_with_infinite_scales_are_refused(bad, error):
    if error is None:
        Q4_1(bad)
        return
    with pytest.raises(error, match="Q4_1 wants"):
        Q4_1(bad)

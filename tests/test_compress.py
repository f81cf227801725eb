"""Grids, packing, packed weights and the layer-by-layer driver."""
from __future__ import annotations

import numpy as np
import pytest
from helpers import dev, host
from packed_weights import FORMS

import tinyft as ft
from tinyft import nn
from tinyft.compress import Uniform, layerwise
from tinyft.compress.grids import KINDS, fit_grid
from tinyft.compress.grouped import parts
from tinyft.compress.packing import pack, unpack
from tinyft.tensor import Tensor

GRIDS = [("affine", bits) for bits in range(1, 9)] + [("symmetric", bits) for bits in range(1, 9)]
GRIDS += [("absmax", bits) for bits in range(2, 9)] + [("ternary", 2), ("sign", 1)]


def gpt() -> ft.GPT:
    return ft.GPT(ft.GPTConfig(vocab=30, positions=16, width=8, layers=2, heads=2), seed=1)


def batches(rng: np.random.Generator, count: int = 3) -> list:
    return [rng.integers(0, 30, (4, 12)) for _ in range(count)]


# ── packing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def by_big_integer(codes: list[int], bits: int) -> bytes:
    """The stream as one large whole number: code k times 2^(bits k)."""
    number = sum(code << (bits * k) for k, code in enumerate(codes))
    return number.to_bytes(-(-len(codes) * bits // 8), "little")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 8, 9, 32, 33])
def test_codes_come_back_from_the_stream_of_the_definition(bits, n, rng):
    codes = rng.integers(0, 1 << bits, (n, 3)).astype(np.uint8)
    stream = host(pack(dev(codes), bits))
    assert stream.shape == (-(-n * bits // 8), 3)
    for column in range(3):
        assert stream[:, column].tobytes() == by_big_integer(codes[:, column].tolist(), bits)
    np.testing.assert_array_equal(host(unpack(dev(stream), bits, n)), codes)


def test_the_published_streams():
    assert pack(np.array([1, 2, 3, 4]), 4).tobytes().hex() == "2143"
    assert pack(np.arange(8), 4).view("<u4")[0] == 0x76543210
    assert pack(np.array([1, 0, 1, 1, 0, 0, 1, 0]), 1).tobytes() == b"\x4d"
    for codes, got in ([8], "8"), ([9, 9], "9"), ([-1], "-1"), ([2, 9], "2 to 9"):
        with pytest.raises(ValueError, match=f"codes from 0 to 7 for 3 bits, got {got}$"):
            pack(np.array(codes), 3)
    with pytest.raises(ValueError, match="wants 2 bytes"):
        unpack(np.zeros(1, np.uint8), 3, 4)


# ── grids ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind, bits", GRIDS)
def test_the_error_of_a_weight_is_at_most_half_a_step(kind, bits, rng):
    W = rng.standard_normal((60, 16)) * rng.choice([1e-3, 1, 1e3], (60, 1))
    W[0] = 0
    W[1] = 3.5
    W[2] = abs(W[2]) + 10
    W[3] = -abs(W[3]) - 10
    W[4, 5] = 1e4
    for half in (False, True):
        grid = fit_grid(W, kind, bits, half_scales=half)
        error = abs(grid.round(W) - W)
        if kind in ("affine", "symmetric", "absmax"):
            assert (error <= grid.scale / 2 * (1 + 1e-9)).all()
        assert (grid.round(W)[0] == 0).all()
        codes = grid.encode(W)
        assert codes.min() >= 0 and codes.max() <= grid.top < 2**bits
        np.testing.assert_array_equal(grid.encode(grid.decode(codes)), codes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_grid_without_numbers_is_refused(kind):
    bits = {"ternary": 2, "sign": 1}.get(kind, 4)
    with pytest.raises(ValueError, match="finite"):
        fit_grid(np.array([[1.0, np.inf]]), kind, bits)
    with pytest.raises(ValueError, match="bits"):
        fit_grid(np.ones((1, 2)), kind, 9)


# ── packed weights ───────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind, bits", GRIDS)
@pytest.mark.parametrize("group", [None, 8, 7])
def test_a_product_with_a_packed_weight_is_that_with_its_dense_one(kind, bits, group, rng):
    W = rng.standard_normal((9, 24)).astype(np.float32)
    order = rng.permutation(24)
    scales = rng.uniform(0.5, 2, 24).astype(np.float32)
    packed = ft.RTN(bits, group, kind)(W)
    other = Uniform(packed.code_matrix(), host(packed.scale).T, _zero(packed), kind=kind, bits=bits,
                    group=packed.group, order=order, input_scale=scales)
    plain = host(packed.dequantize())
    mixed = np.empty_like(plain)
    mixed[:, order] = plain
    np.testing.assert_allclose(host(other.dequantize()), mixed / scales, rtol=1e-6)
    for weight in (packed, other):
        dense = host(weight.dequantize()).astype(np.float64)
        for rows in (2, 20):
            x = rng.standard_normal((rows, 24)).astype(np.float32)
            leaf = Tensor(dev(x), requires_grad=True)
            y = weight.matmul(leaf)
            np.testing.assert_allclose(host(y), x @ dense.T, atol=1e-4)
            g = rng.standard_normal(y.shape).astype(np.float32)
            (y * Tensor(dev(g))).sum().backward()
            np.testing.assert_allclose(host(leaf.grad), g @ dense, atol=1e-4)


@pytest.mark.parametrize("name", FORMS)
def test_rows_are_those_of_the_dense_weight(name, rng):
    """For slices and for row numbers of any shape, which an embedding looks up."""
    packed, W = FORMS[name](rng, 5)
    tolerance = {"rtol": 1e-5, "atol": 1e-6 * abs(W).max()}
    np.testing.assert_allclose(host(packed.dequantize()), W, **tolerance)
    np.testing.assert_allclose(host(packed.dequantize_rows(slice(1, 4))), W[1:4], **tolerance)
    for ids in (np.array([3]), np.array([4, 0, 4]), np.array([[1, 2, 3], [0, 3, 3]])):
        np.testing.assert_allclose(host(packed.rows(dev(ids))), W[ids], **tolerance)


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 16, 17, 100])
def test_parts_cover_everything_in_eight_steps_or_fewer(n):
    found = parts(n)
    assert [i for part in found for i in range(n)[part]] == list(range(n))
    assert len(found) <= 8


def _zero(packed: Uniform) -> np.ndarray | None:
    return None if packed.zero_codes is None else host(packed.zero).T


# ── the driver ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_rule_without_data_replaces_every_linear_map_of_the_blocks(rng):
    model = gpt()
    reports = ft.compress(model, ft.RTN(bits=8, group=None))
    assert len(reports) == 12
    assert isinstance(model.blocks[0].attn.q.weight, Uniform)
    assert reports[0].after < reports[0].before / 2
    assert max(report.error for report in reports) < 1e-4
    with pytest.raises(ValueError, match="packed already"):
        ft.compress(model, ft.RTN())


def test_every_map_is_calibrated_with_what_the_compressed_maps_before_it_give(rng):
    """Against a driver that runs the whole model for every map."""
    data = batches(rng)
    model = gpt()
    ft.compress(model, ft.GPTQ(bits=3, group=4), data)

    other = gpt()
    for group in _dataflow(other):
        seen: list[np.ndarray] = []

        def see(path, x, ctx, seen=seen):
            seen.append(host(x).reshape(-1, x.shape[-1]).astype(np.float64))
        modules = dict(other.named_modules())
        with layerwise.recording({"": modules[group[0]]}, see), ft.no_grad():
            for ids in data:
                other(ids[:, :-1])
        X = np.concatenate(seen)
        for path in group:
            W = host(modules[path].weight)
            modules[path].weight = ft.GPTQ(bits=3, group=4)(W, 2 / len(X) * X.T @ X)
    for path, module in other.named_modules():
        if isinstance(module, nn.Linear):
            mine = dict(model.named_modules())[path].weight
            np.testing.assert_allclose(host(mine.dequantize()), host(module.weight.dequantize()), atol=1e-6)


def _dataflow(model: ft.GPT) -> list[list[str]]:
    groups = []
    for i in range(len(model.blocks)):
        groups += [[f"blocks.{i}.attn.{name}" for name in "qkv"], [f"blocks.{i}.attn.o"]]
        groups += [[f"blocks.{i}.mlp.up"], [f"blocks.{i}.mlp.down"]]
    return groups


def test_what_is_done_is_not_computed_again(rng):
    data = batches(rng)
    done: dict = {}
    whole = gpt()
    ft.compress(whole, ft.GPTQ(bits=4, group=4), data, done=done)
    assert len(done) == 12
    part = {path: done[path] for path in list(done)[:5]}
    resumed = gpt()
    ft.compress(resumed, ft.GPTQ(bits=4, group=4), data, done=part)
    for path, module in whole.named_modules():
        if path in done:
            other = dict(resumed.named_modules())[path]
            np.testing.assert_array_equal(host(module.weight.dequantize()), host(other.weight.dequantize()))


def test_padding_does_not_count(rng):
    ids = rng.integers(0, 30, (4, 9))                     # read_batch cuts the last one off: it predicts nothing
    longer = np.concatenate([ids[:, :8], np.zeros((4, 5), int)], axis=1)
    mask = np.arange(13) < 8
    one, other = gpt(), gpt()
    ft.compress(one, ft.GPTQ(bits=3, group=4), [{"ids": ids}])
    ft.compress(other, ft.GPTQ(bits=3, group=4), [{"ids": longer, "mask": np.tile(mask, (4, 1))}])
    q = [host(m.blocks[1].mlp.down.weight.dequantize()) for m in (one, other)]
    np.testing.assert_allclose(q[0], q[1], atol=1e-6)


@pytest.mark.parametrize("kind, zero, message", [
    ("affine", -1.0, "whole numbers from 0 to 7, got -1"), ("affine", 8, "whole numbers from 0 to 7, got 8"),
    ("affine", 1.5, "whole numbers from 0 to 7, got 1.5"), ("affine", np.nan, "whole numbers from 0 to 7, got nan"),
    ("affine", None, "wants zero points"), ("symmetric", 4.0, "wants no zero points"),
])
def test_zero_points_that_a_grid_cannot_have_are_refused(kind, zero, message):
    codes = np.ones((2, 6), np.uint8)
    zeros = None
    if zero is not None:
        zeros = np.ones((2, 2))
        zeros[1, 0] = zero
    with pytest.raises(ValueError, match=message):
        Uniform(codes, np.ones((2, 2)), zeros, kind=kind, bits=3, group=3)


@pytest.mark.parametrize("wrong, message", [
    ({"batches": None}, "calibration batches"),
    ({"batches": []}, "calibration batches"),
    ({"targets": "embed"}, "embedding"),
    ({"targets": "norm1"}, "linear maps"),
    ({"rule": "gptq"}, "a rule such as"),
])
def test_what_cannot_be_compressed_is_refused_and_nothing_changes(wrong, message, rng):
    model = gpt()
    before = {name: p.data.copy() for name, p in model.named_parameters().items()}
    arguments = {"rule": ft.GPTQ(bits=4), "batches": batches(rng)} | wrong
    with pytest.raises((TypeError, ValueError), match=message):
        ft.compress(model, **arguments)
    for name, p in model.named_parameters().items():
        np.testing.assert_array_equal(host(p), host(before[name]))

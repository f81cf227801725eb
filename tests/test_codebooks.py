"""Codebooks: the data types, the nearest code, blocks, double quantization, packed weights.

Every property is a function `check_...`. The library passes all of them, and each wrong answer below is rejected by the
check that it names.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from helpers import dev, host, wrong_answers

import tinyft as ft
from tinyft.compress import Codebook, codebooks, coded, grouped
from tinyft.compress.codebooks import DoubleScale, Table, get_table, quantize_blocks
from tinyft.compress.quantize import nf4
from tinyft.tensor import Tensor

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]
FP4 = [0, 0.0052083, 0.6666667, 1, 0.3333333, 0.5, 0.1666667, 0.25]              # the codes 0 ... 7; 8 ... 15: negated
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]                                              # times 1/6; the same
WITH_BOTH_ENDS = ["nf4", "fp4", "e2m1"]                                          # -1 and 1 are among the values
ALL = [*WITH_BOTH_ENDS, "dynamic"]
RULES = {"nf4": ft.NF4, "fp4": ft.FP4, "e2m1": ft.E2M1, "dynamic": ft.Dynamic8}
# Half of the largest distance of two neighbouring values, and for dynamic from -1 to the lowest.
LARGEST_ERROR = {"nf4": 0.1519036, "fp4": 1 / 6, "e2m1": 1 / 6, "dynamic": 0.00703125}


# ── oracles: slow and obvious ────────────────────────────────────────────────────────────────────────────────────────
def dynamic_oracle() -> np.ndarray:
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0**(i - 6)
        values += [*middles, *-middles]
    return np.sort(values)


def flat_oracle(x: np.ndarray, values: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(indices into the sorted values, scales, dequantized) of flat numbers, a multiple of the block."""
    x = x.reshape(-1, block)
    a = abs(x).max(axis=1)
    u = x / np.where(a == 0, x.dtype.type(1), a)[:, None]
    middles = (values[:-1].astype(np.float64) + values[1:]) / 2
    index = np.searchsorted(middles, u.astype(np.float64))
    return index, a, values[index] * a[:, None]


def stream_oracle(codes: np.ndarray, bits: int) -> np.ndarray:
    """One stream of codes (n,), the least significant bit first."""
    bit = (codes.astype(np.uint16)[:, None] >> np.arange(bits)) & 1
    return np.packbits(bit.astype(np.uint8).ravel(), bitorder="little")


def weights(rng: np.random.Generator, shape: tuple, dtype: Any = np.float32) -> np.ndarray:
    """Normal weights of very different sizes, with the rows that break careless code: zeros, one number, only positive
    or negative numbers, one huge number, the midpoints of nf4."""
    W = rng.standard_normal(shape) * rng.choice([1e-4, 1, 50], (shape[0], 1))
    W[0] = 0
    W[1] = 3.5
    W[2] = abs(W[2]) + 1
    W[3] = -abs(W[3]) - 1
    W[4, 5 % shape[1]] = 1e6
    middles = (np.array(NF4[1:]) + NF4[:-1]) / 2
    W[5] = np.resize([1.0, *middles], shape[1])
    return W.astype(dtype)


# ── the data types ───────────────────────────────────────────────────────────────────────────────────────────────────
def check_the_published_tables():
    np.testing.assert_array_equal(get_table("nf4").values, np.float32(NF4))
    for name, magnitudes in (("fp4", np.array(FP4)), ("e2m1", np.array(E2M1) / 6)):
        values = get_table(name).values
        np.testing.assert_allclose(values[:8], magnitudes, rtol=0, atol=1e-7)
        np.testing.assert_array_equal(values[8:], -values[:8])
    dynamic = get_table("dynamic").values
    np.testing.assert_array_equal(dynamic, dynamic_oracle().astype(np.float32))
    assert len(dynamic) == 256
    assert dynamic[0] == np.float32(-0.99296875)


def check_the_values_increase_and_their_codes_come_back():
    for name in ALL:
        table = get_table(name)
        assert (np.diff(table.ranked) > 0).all()
        codes = np.arange(len(table.values))
        if name in ("fp4", "e2m1"):
            codes = np.delete(codes, 8)                  # the code of -0 is never given
            assert len(table.ranked) == 15
        np.testing.assert_array_equal(table.nearest(table.values[codes]), codes)
        assert table.nearest(np.zeros(1, np.float32)) == table.nearest(-np.zeros(1)) == list(table.values).index(0)


def check_the_code_is_that_of_the_nearest_value(rng):
    for name in ALL:
        table = get_table(name)
        middles = table.midpoints.astype(np.float32)
        beside = [np.nextafter(middles, np.float32(side)) for side in (-2, 2)]
        single = np.concatenate([rng.uniform(-1, 1, 500), middles, *beside, [-1, 1]]).astype(np.float32)
        for u in (single, single.astype(np.float64), rng.uniform(-1, 1, 500)):
            distance = abs(u.astype(np.float64)[:, None] - table.values)
            chosen = distance[np.arange(len(u)), table.nearest(u)]
            np.testing.assert_array_equal(chosen, distance.min(axis=1))


def check_ties_go_to_the_lower_value():
    for name in ALL:
        table = get_table(name)
        middles = (table.ranked[1:].astype(np.float64) + table.ranked[:-1]) / 2
        lower = table.values[table.nearest(middles)]
        np.testing.assert_array_equal(lower, table.ranked[:-1])
        exact = middles.astype(np.float32) == middles                            # ties in float32
        assert name not in ("fp4", "e2m1") or exact.sum() >= 2
        single = middles[exact].astype(np.float32)
        np.testing.assert_array_equal(table.values[table.nearest(single)], table.ranked[:-1][exact])


# ── blocks ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def check_blocks_are_those_of_the_flattened_weight(rng):
    for name in ALL:
        table = get_table(name)
        for dtype in (np.float32, np.float64):
            W = weights(rng, (8, 192), dtype)
            if dtype == np.float64:
                W = W.astype(np.float32).astype(dtype)   # the scales are float32
            index, a, dense = flat_oracle(W.ravel(), table.ranked, 64)
            packed = RULES[name](block=64, double=False)(W)
            np.testing.assert_array_equal(packed.code_matrix().ravel(), table.codes[index].ravel())
            np.testing.assert_array_equal(host(packed.scale).T.ravel(), a)
            np.testing.assert_array_equal(host(packed.dequantize()).ravel(), dense.ravel().astype(np.float32))


def check_a_short_last_block_belongs_to_its_row(rng):
    W = weights(rng, (7, 150))
    packed = ft.NF4(block=64, double=False)(W)
    for row in range(7):
        padded = np.pad(W[row], (0, 42))                 # 192 = 3 · 64
        index, a, dense = flat_oracle(padded, get_table("nf4").ranked, 64)
        np.testing.assert_array_equal(packed.code_matrix()[row], index.ravel()[:150])
        np.testing.assert_array_equal(host(packed.scale)[:, row], a)
        np.testing.assert_array_equal(host(packed.dequantize())[row], dense.ravel()[:150])
        alone = ft.NF4(block=64, double=False)(W[row:row + 1])
        np.testing.assert_array_equal(host(alone.dequantize())[0], host(packed.dequantize())[row])


def check_the_error_is_at_most_half_the_largest_distance_times_the_scale(rng):
    for name in ALL:
        for dtype in (np.float32, np.float64):
            for width, block in ((128, 64), (100, 64), (40, 7), (30, 1000)):
                W = weights(rng, (9, width), dtype)
                packed = RULES[name](block=block, double=False)(W)
                a = np.repeat(host(packed.scale).T, packed.group, axis=1)[:, :width]
                error = abs(host(packed.dequantize()).astype(np.float64) - W)
                assert (error <= LARGEST_ERROR[name] * a + 1.3e-7 * a).all()     # and the rounding of a float32


def check_zero_and_the_largest_magnitude_are_exact(rng):
    for name in WITH_BOTH_ENDS:
        W = weights(rng, (8, 128))
        W[6, ::3] = 0
        dense = host(RULES[name](block=32, double=False)(W).dequantize())
        assert (dense[W == 0] == 0).all()
        blocks = W.reshape(8, -1, 32)
        is_largest = abs(blocks) == abs(blocks).max(axis=-1, keepdims=True)
        np.testing.assert_array_equal(dense.reshape(blocks.shape)[is_largest], blocks[is_largest])


def check_quantizing_again_changes_nothing(rng):
    for name in WITH_BOTH_ENDS:
        rule = RULES[name](block=64, double=False)
        for dtype in (np.float32, np.float64):
            once = host(rule(weights(rng, (8, 150), dtype)).dequantize())
            np.testing.assert_array_equal(host(rule(once).dequantize()), once)


def check_a_power_of_two_scales_the_result(rng):
    for name in ALL:
        W = weights(rng, (8, 128))
        rule = RULES[name](block=64, double=False)
        dense = host(rule(W).dequantize())
        for k in (-20, -1, 3, 30):
            np.testing.assert_array_equal(host(rule(W * np.float32(2.0**k)).dequantize()), dense * np.float32(2.0**k))


def check_the_stream_of_a_row_begins_with_the_lowest_bit(rng):
    for name in ALL:
        packed = RULES[name](block=64)(weights(rng, (6, 67)))
        codes = packed.code_matrix()
        stream = host(packed.codes)
        for row in range(6):
            np.testing.assert_array_equal(stream[:, row], stream_oracle(codes[row], packed.bits))
            values = get_table(name).values[codes[row]]
            scale = np.repeat(host(packed.scale)[:, row], 64)[:67]
            np.testing.assert_array_equal(host(packed.dequantize())[row], values * scale)


# ── double quantization ──────────────────────────────────────────────────────────────────────────────────────────────
def check_doubly_quantized_scales(rng):
    for shape in ((5, 3), (40, 16), (100, 7), (1, 256), (1, 257), (3, 1)):
        scale = rng.uniform(0.5, 4, shape).astype(np.float32)
        double = DoubleScale.quantize(scale)
        mean = np.float32(scale.mean(dtype=np.float64))
        assert double.mean == mean
        rest = (scale - mean).ravel()
        second = [abs(rest[i:i + 256]).max() for i in range(0, rest.size, 256)]
        np.testing.assert_array_equal(double.second, np.float32(second))
        packed = Codebook(np.zeros((shape[0], shape[1] * 4), np.uint8), double, group=4)
        found = host(packed.scale).T
        padded = np.pad(rest, (0, -rest.size % 256))
        wanted = flat_oracle(padded, dynamic_oracle().astype(np.float32), 256)[2].ravel()[:rest.size] + mean
        np.testing.assert_allclose(found.ravel(), wanted, rtol=1e-6, atol=0)
        bound = 0.00703125 * np.repeat(np.float32(second), 256)[:rest.size].reshape(shape)
        assert (abs(found.astype(np.float64) - scale) <= bound * (1 + 1e-5) + 1e-7 * scale).all()


def check_some_rows_have_the_scales_of_the_whole(rng):
    for double in (False, True):
        packed = ft.NF4(block=8, double=double)(weights(rng, (50, 100)))
        whole = host(packed.scale)
        assert whole.shape == (13, 50)
        ids = rng.integers(0, 50, 9)
        np.testing.assert_array_equal(host(packed.scales(slice(20, 37))), whole[:, 20:37])
        np.testing.assert_array_equal(host(packed.scales(dev(ids))), whole[:, ids])
        np.testing.assert_array_equal(host(packed.dequantize_rows(dev(ids))), host(packed.dequantize())[ids])


def check_the_codes_are_the_same_with_double_quantization(rng):
    W = weights(rng, (12, 128))
    plain, double = (ft.NF4(double=flag)(W) for flag in (False, True))
    np.testing.assert_array_equal(plain.code_matrix(), double.code_matrix())
    second = np.abs(host(plain.scale) - host(plain.scale).mean(dtype=np.float64)).max()
    a = np.repeat(host(plain.scale).T, 64, axis=1)
    error = abs(host(double.dequantize()).astype(np.float64) - W)
    assert (error <= LARGEST_ERROR["nf4"] * a + 0.00703126 * second + 1e-6 * a).all()


def check_a_scale_is_never_negative_nor_infinite(rng):
    """One huge block among 256 makes the second scale huge; the scales of the others would come out negative."""
    scale = np.ones((1, 256), np.float32)
    for huge in (1e4, 3.4e38):
        scale[0, 7] = huge
        scale[0, 9] = huge * np.float32(0.999)
        packed = Codebook(np.zeros((1, 256), np.uint8), DoubleScale.quantize(scale), group=1)
        found = host(packed.scale)
        assert np.isfinite(found).all()
        assert (found >= 0).all()
        assert abs(found[7, 0] - scale[0, 7]) <= 1e-6 * huge


CHECKS: dict[str, Callable] = {name: f for name, f in globals().items() if name.startswith("check_")}


def run_check(name: str, seed: int) -> None:
    f = CHECKS[name]
    f(np.random.default_rng(seed)) if f.__code__.co_argcount else f()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", CHECKS)
def test_the_library_passes(name, seed):
    run_check(name, seed)


# ── wrong answers ────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Wrong:
    """A wrong answer.

    belief   the false belief that makes it look right
    check    the check that must reject it
    where    (object, name) of what it replaces
    f        what stands there instead"""
    belief: str
    check: str
    where: tuple[Any, str]
    f: Any


@contextlib.contextmanager
def planted(wrong: Wrong) -> Iterator[None]:
    """The library with a wrong answer in it."""
    patch = pytest.MonkeyPatch()
    owner, name = wrong.where
    if isinstance(owner, dict):
        patch.setitem(owner, name, wrong.f)
    else:
        patch.setattr(owner, name, wrong.f)
    get_table.cache_clear()
    codebooks._values_on.cache_clear()
    try:
        yield
    finally:
        patch.undo()
        get_table.cache_clear()
        codebooks._values_on.cache_clear()


def nf4_with_eight_negatives() -> np.ndarray:
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    below = [-quantile(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    return (np.sort([*above, 0, *below]) / max(above)).astype(np.float32)


def nf4_without_zero() -> np.ndarray:
    values = np.array([NormalDist().inv_cdf(p) for p in np.linspace(1 - 0.9677083, 0.9677083, 16)])
    return (values / values[-1]).astype(np.float32)


def nf4_of_averages() -> np.ndarray:
    quantile = [NormalDist().inv_cdf(i / 17) for i in range(1, 17)]
    return (np.array(quantile) / quantile[-1]).astype(np.float32)


def fp4_from_the_map_of_fp8() -> np.ndarray:
    values = codebooks.fp4_values()
    values[[1, 9]] *= 4                                  # 0.0208 instead of 0.0052
    return values


def fp4_in_order() -> np.ndarray:
    positive = np.array([0, 1 / 16, 2, 3, 4, 6, 8, 12]) / 12
    return np.concatenate([positive, -positive]).astype(np.float32)


def dynamic_with_minus_one() -> np.ndarray:
    values = dynamic_oracle().astype(np.float32)
    values[0] = -1
    return values


def nearest_below(self: Table, u: np.ndarray) -> np.ndarray:
    rank = np.searchsorted(self.ranked, u, side="right") - 1
    return self.codes[np.clip(rank, 0, None)]


def nearest_with_ties_upwards(self: Table, u: np.ndarray) -> np.ndarray:
    return self.codes[np.searchsorted(self.midpoints, u.astype(np.float64), side="right")]


def nearest_by_rank(self: Table, u: np.ndarray) -> np.ndarray:
    return np.searchsorted(self.midpoints, u.astype(np.float64)).astype(np.uint8)


def nearest_with_rounded_midpoints(self: Table, dtype: Any) -> np.ndarray:
    return self.midpoints.astype(np.float16).astype(dtype)


def thresholds_rounded_to_nearest(self: Table, dtype: Any) -> np.ndarray:
    return self.midpoints.astype(dtype)


def blocks_of_the_transpose(W: np.ndarray, table: Table, block: int) -> tuple[np.ndarray, np.ndarray]:
    codes, scale = quantize_blocks(np.ascontiguousarray(W.T).reshape(W.shape), table, block)
    return codes.reshape(W.T.shape).T, scale


def one_scale_for_all(W: np.ndarray, table: Table, block: int) -> tuple[np.ndarray, np.ndarray]:
    codes, scale = quantize_blocks(W.reshape(1, -1), table, W.size)
    return codes.reshape(W.shape), np.broadcast_to(scale, (len(W), -(-W.shape[1] // block)))


def scale_of_the_largest(W: np.ndarray, table: Table, block: int) -> tuple[np.ndarray, np.ndarray]:
    _, scale = quantize_blocks(np.maximum(W, 0), table, block)
    a = np.repeat(scale, block, axis=1)[:, :W.shape[1]]
    return table.nearest(W / np.where(a == 0, np.float32(1), a)), scale


def times_the_reciprocal_of_zero(W: np.ndarray, table: Table, block: int) -> tuple[np.ndarray, np.ndarray]:
    _, scale = quantize_blocks(W, table, block)
    a = np.repeat(scale, block, axis=1)[:, :W.shape[1]]
    with np.errstate(divide="ignore", invalid="ignore"):
        return table.nearest((W * (1 / a)).astype(W.dtype)), scale


def last_blocks_in_a_row(W: np.ndarray, table: Table, block: int) -> tuple[np.ndarray, np.ndarray]:
    if W.shape[1] % block == 0:
        return quantize_blocks(W, table, block)
    flat = np.pad(W.ravel(), (0, -W.size % block))
    codes, scale = quantize_blocks(flat.reshape(1, -1), table, block)
    blocks = -(-W.shape[1] // block)
    return codes.ravel()[:W.size].reshape(W.shape), np.resize(scale, (len(W), blocks))


def high_half_first(codes: np.ndarray, bits: int) -> np.ndarray:
    stream = grouped_pack(codes, bits)
    return stream << 4 | stream >> 4 if bits == 4 else stream


grouped_pack = grouped.pack


def without_the_mean(cls: type, scale: np.ndarray) -> DoubleScale:
    codes, second = quantize_blocks(scale.reshape(1, -1), get_table("dynamic"), 256)
    return cls(codes.reshape(scale.shape), second[0], np.float32(0))


def the_mean_is_lost(cls: type, scale: np.ndarray) -> DoubleScale:
    mean = scale.mean(dtype=np.float64).astype(np.float32)
    codes, second = quantize_blocks((scale - mean).reshape(1, -1), get_table("dynamic"), 256)
    return cls(codes.reshape(scale.shape), second[0], np.float32(0))


def one_second_scale(cls: type, scale: np.ndarray) -> DoubleScale:
    mean = scale.mean(dtype=np.float64).astype(np.float32)
    codes, second = quantize_blocks((scale - mean).reshape(1, -1), get_table("dynamic"), scale.size)
    return cls(codes.reshape(scale.shape), np.resize(second, -(-scale.size // 256)), mean)


def blocks_in_the_order_of_memory(self: Codebook, rows: Any) -> np.ndarray:
    if not self.double:
        return grouped.Grouped.scales(self, rows)
    codes = host(self.scale_codes)
    block = np.arange(codes.size).reshape(codes.shape) // 256
    a = get_table("dynamic").values[codes] * host(coded.from_bits(self.second_bits))[block]
    rows = rows if isinstance(rows, slice) else host(rows)
    return dev((a + host(coded.from_bits(self.mean_bits)))[:, rows])


def scales_without_limits(self: Codebook, rows: Any) -> np.ndarray:
    if not self.double:
        return grouped.Grouped.scales(self, rows)
    codes = host(self.scale_codes)
    row = np.arange(codes.shape[1])
    block = (row * len(codes) + np.arange(len(codes))[:, None]) // 256
    a = get_table("dynamic").values[codes] * host(coded.from_bits(self.second_bits))[block]
    rows = rows if isinstance(rows, slice) else host(rows)
    with np.errstate(over="ignore"):
        return dev((a + host(coded.from_bits(self.mean_bits)))[:, rows])


TABLES, BLOCKS = codebooks.TABLES, (nf4, "quantize_blocks")
WRONG = [
    Wrong("NF4 has 8 values below 0, as an int4 has.", "check_the_published_tables", (TABLES, "nf4"),
          nf4_with_eight_negatives),
    Wrong("NF4 is 16 equally likely quantiles; 0 need not be one.", "check_zero_and_the_largest_magnitude_are_exact",
          (TABLES, "nf4"), nf4_without_zero),
    Wrong("NF4 is the table of the paper's eq. 4.", "check_the_published_tables", (TABLES, "nf4"), nf4_of_averages),
    Wrong("FP4 is the map that create_fp8_map gives.", "check_the_published_tables", (TABLES, "fp4"),
          fp4_from_the_map_of_fp8),
    Wrong("The codes of FP4 are in the order of its magnitudes.", "check_the_published_tables", (TABLES, "fp4"),
          fp4_in_order),
    Wrong("FP4 is E2M1.", "check_the_published_tables", (TABLES, "fp4"), codebooks.e2m1_values),
    Wrong("The dynamic map has both ends, -1 and 1.", "check_the_published_tables", (TABLES, "dynamic"),
          dynamic_with_minus_one),
    Wrong("The nearest value is the last one that is not above.", "check_the_code_is_that_of_the_nearest_value",
          (Table, "nearest"), nearest_below),
    Wrong("A tie is rounded upwards.", "check_ties_go_to_the_lower_value", (Table, "nearest"),
          nearest_with_ties_upwards),
    Wrong("The rank of a value is its code.", "check_the_values_increase_and_their_codes_come_back",
          (Table, "nearest"), nearest_by_rank),
    Wrong("Midpoints may be kept in float16.", "check_the_code_is_that_of_the_nearest_value", (Table, "thresholds"),
          nearest_with_rounded_midpoints),
    Wrong("Midpoints may be rounded to nearest.", "check_the_code_is_that_of_the_nearest_value",
          (Table, "thresholds"), thresholds_rounded_to_nearest),
    Wrong("Blocks may run along the other axis.", "check_blocks_are_those_of_the_flattened_weight", BLOCKS,
          blocks_of_the_transpose),
    Wrong("One scale serves the whole weight.", "check_blocks_are_those_of_the_flattened_weight", BLOCKS,
          one_scale_for_all),
    Wrong("The scale is the largest weight.",
          "check_the_error_is_at_most_half_the_largest_distance_times_the_scale", BLOCKS, scale_of_the_largest),
    Wrong("1/a is finite.", "check_blocks_are_those_of_the_flattened_weight", BLOCKS, times_the_reciprocal_of_zero),
    Wrong("The last block of a row goes on in the next row.", "check_a_short_last_block_belongs_to_its_row", BLOCKS,
          last_blocks_in_a_row),
    Wrong("The first code is in the high half of a byte.", "check_the_stream_of_a_row_begins_with_the_lowest_bit",
          (grouped, "pack"), high_half_first),
    Wrong("Scales are quantized without their mean.", "check_doubly_quantized_scales", (DoubleScale, "quantize"),
          classmethod(without_the_mean)),
    Wrong("The mean need not be kept.", "check_doubly_quantized_scales", (DoubleScale, "quantize"),
          classmethod(the_mean_is_lost)),
    Wrong("All scales share one second scale.", "check_doubly_quantized_scales", (DoubleScale, "quantize"),
          classmethod(one_second_scale)),
    Wrong("Blocks of scales follow the order in memory.", "check_doubly_quantized_scales", (Codebook, "scales"),
          blocks_in_the_order_of_memory),
    Wrong("A quantized scale stays positive and finite by itself.", "check_a_scale_is_never_negative_nor_infinite",
          (Codebook, "scales"), scales_without_limits),
]


@wrong_answers
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.belief[:40])
def test_a_wrong_answer_is_rejected(wrong):
    with planted(wrong):
        for seed in range(5):
            try:
                run_check(wrong.check, seed)
            except AssertionError:
                return
    pytest.fail(f"{wrong.check} accepts: {wrong.belief}")


# ── sizes and averages ───────────────────────────────────────────────────────────────────────────────────────────────
def test_bits_of_a_weight(rng):
    W = rng.standard_normal((64, 4096)).astype(np.float32)
    bits = {double: ft.NF4(double=double)(W).nbytes * 8 / W.size for double in (False, True)}
    assert bits[False] == 4.5
    assert round(bits[True], 3) == 4.127
    assert ft.Dynamic8()(W).nbytes * 8 / W.size == 8 + 32 / 256


def test_normal_weights_lose_least_with_nf4():
    """The mean squared error of normal weights in blocks of 64, divided by their variance."""
    W = np.random.default_rng(3).standard_normal((1000, 640)).astype(np.float32)
    rules = {"nf4": ft.NF4(double=False), "e2m1": ft.E2M1(double=False), "int4": ft.RTN(4, 64, "absmax"),
             "fp4": ft.FP4(double=False)}
    errors = {name: float(np.mean((host(rule(W).dequantize()) - W)**2)) for name, rule in rules.items()}
    assert errors["nf4"] < errors["e2m1"] < errors["int4"] < errors["fp4"]
    for name, wanted in (("nf4", 0.00846), ("e2m1", 0.01118), ("int4", 0.01161), ("fp4", 0.01489)):
        assert errors[name] == pytest.approx(wanted, rel=0.01)
    doubled = host(ft.NF4()(W).dequantize())
    assert np.mean((doubled - W)**2) == pytest.approx(errors["nf4"], rel=0.01)


# ── packed weights ───────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("double", [False, True])
def test_a_product_is_that_with_the_dense_weight(name, double, rng):
    packed = RULES[name](block=16, double=double)(rng.standard_normal((9, 40)).astype(np.float32))
    for dtype in (np.float32, np.float64):
        packed.to(ft.backend(), dtype=dtype)
        dense = host(packed.dequantize())
        assert dense.dtype == dtype
        for rows in (2, 20):
            x = rng.standard_normal((rows, 40)).astype(dtype)
            leaf = Tensor(dev(x), requires_grad=True)
            y = packed.matmul(leaf)
            np.testing.assert_allclose(host(y), x @ dense.T, atol=1e-4)
            g = rng.standard_normal(y.shape).astype(dtype)
            (y * Tensor(dev(g))).sum().backward()
            np.testing.assert_allclose(host(leaf.grad), g @ dense, atol=1e-4)


def test_a_dtype_does_not_round_the_scales(rng):
    W = rng.standard_normal((6, 128)).astype(np.float32)
    packed = ft.NF4()(W)
    before = host(packed.dequantize())
    packed.to(dtype="float16").to(dtype="float32")
    np.testing.assert_array_equal(host(packed.dequantize()), before)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e30, 3.3e38])
def test_numbers_near_the_ends_of_float32_stay_finite(double, size, rng):
    W = np.clip(rng.standard_normal((5, 70)), -1, 1).astype(np.float32)
    W[1:3] *= np.float32(size)
    dense = host(ft.NF4(block=32, double=double)(W).dequantize())
    assert np.isfinite(dense).all()
    if not double:
        a = np.repeat(abs(np.pad(W, ((0, 0), (0, 26))).reshape(5, 3, 32)).max(axis=-1), 32, axis=1)[:, :70]
        assert (abs(dense.astype(np.float64) - W) <= 0.152 * a + 1e-45).all()


@pytest.mark.parametrize("cache", [1, 49, 50, 120])
def test_rows_that_are_encoded_at_a_time_change_nothing(cache, monkeypatch, rng):
    """At least one row at a time, however long it is."""
    W = rng.standard_normal((7, 50)).astype(np.float32)
    expected = quantize_blocks(W, get_table("nf4"), 16)
    monkeypatch.setattr(codebooks, "CACHE", cache)
    for mine, wanted in zip(quantize_blocks(W, get_table("nf4"), 16), expected, strict=True):
        np.testing.assert_array_equal(mine, wanted)


def test_what_cannot_be_quantized_is_refused(rng):
    W = rng.standard_normal((4, 8)).astype(np.float32)
    packed = ft.NF4()(W)
    with pytest.raises(TypeError, match="packed already"):
        ft.NF4()(packed)
    with pytest.raises(ValueError, match="finite"):
        ft.NF4()(np.where(W == W.max(), np.inf, W))
    with pytest.raises(ValueError, match="finite scales"):
        ft.NF4(double=False)(W.astype(np.float64) * 1e300)
    with pytest.raises(ValueError, match="one of"):
        Codebook(np.zeros((2, 4), np.uint8), np.ones((2, 1), np.float32), table="nf5")
    with pytest.raises(ValueError, match="codes from 0 to 15"):
        Codebook(np.full((2, 4), 16, np.uint8), np.ones((2, 1), np.float32))
    with pytest.raises(ValueError, match="scales of shape"):
        Codebook(np.zeros((2, 4), np.uint8), DoubleScale.quantize(np.ones((2, 3), np.float32)))


def test_float64_weights_beyond_float32_are_refused_with_double_quantization_too(rng):
    W = rng.standard_normal((4, 8)) * 1e300
    with pytest.raises(ValueError, match="finite"):
        ft.NF4()(W)

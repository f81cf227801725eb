"""AWQ: the properties of the paper, and wrong implementations that break them."""
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pytest
from helpers import host, wrong_answers

import tinyft as ft
from tinyft.compress import Uniform
from tinyft.compress.quantize import awq
from tinyft.compress.quantize.rtn import round_to_nearest

CASES = range(8)


def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """W (out, in), and the Hessian of inputs that are correlated and of very different sizes."""
    rng = np.random.default_rng(seed)
    out, width = int(rng.integers(1, 9)), int(rng.integers(1, 33))
    W = rng.standard_normal((out, width))
    X = rng.standard_normal((3 * width, width)) @ rng.standard_normal((width, width))
    X *= 10**rng.uniform(-1, 1, width)
    if seed % 4 == 1:
        X[:, rng.integers(width)] = 0                    # an input that is always 0
    if seed % 4 == 2:
        W[:, rng.integers(width)] = 0
        W[rng.integers(out)] = 0
    if seed % 4 == 3:
        W = abs(W) + 3                                   # one-sided
        X[:, rng.integers(width)] *= 1000
    return W.astype(np.float32 if seed % 2 else np.float64), 2 / len(X) * X.T @ X


def loss(W: np.ndarray, packed: Uniform, H: np.ndarray) -> float:
    D = W - host(packed.dequantize()).astype(np.float64)
    return float(np.vdot(D @ H, D))


# ── an independent answer: loops over the equations ──────────────────────────────────────────────────────────────────
def step(w: np.ndarray, bits: int) -> np.floating:
    """The scale of one group on its affine grid."""
    lo, hi = min(w.min(), 0), max(w.max(), 0)
    return w.dtype.type((hi - lo) / (2**bits - 1)) if hi > lo else w.dtype.type(1)


def half_step(s: np.floating) -> np.floating:
    """The least number of float16 that is no smaller."""
    half = np.float16(s)
    if half < s:
        half = np.nextafter(half, np.float16(np.inf))
    return type(s)(half)


def fake_affine(w: np.ndarray, bits: int, *, half: bool = True) -> np.ndarray:
    """One group rounded to its affine grid."""
    s = half_step(step(w, bits)) if half else step(w, bits)
    z = np.rint(max(-w.min(), 0) / s)
    return s * (np.clip(np.rint(w / s) + z, 0, 2**bits - 1) - z)


def fake_rows(W: np.ndarray, bits: int, group: int) -> np.ndarray:
    """All groups. The scales are numbers of float16 if they are in its normal range; the last group has its own."""
    whole = W.shape[1] // group * group
    result = np.empty_like(W)
    for starts in (range(0, whole, group), range(whole, W.shape[1], group)):
        half = all(step(row[start:start + group], bits) >= 2.0**-14 for row in W for start in starts)
        for row in range(len(W)):
            for start in starts:
                result[row, start:start + group] = fake_affine(W[row, start:start + group], bits, half=half)
    return result


@lru_cache(None)
def losses_by_definition(seed: int, bits: int, group: int) -> list[float]:
    """The loss of every power r, without clips."""
    W, H = draw(seed)
    found = []
    for i in range(20):
        magnitude = np.sqrt(H.diagonal() / 2)
        magnitude = np.maximum(magnitude / magnitude.max(), 1e-4)
        s = magnitude**(i / 20)
        s = (s / np.sqrt(s.max() * s.min())).astype(np.float16).astype(W.dtype)
        D = (W - fake_rows(W * s, bits, group) / s).astype(np.float64)
        found.append(float(np.vdot(D @ H, D)))
    return found


# ── the properties: each takes a rule class ──────────────────────────────────────────────────────────────────────────
def check_the_loss_is_the_least_of_all_powers(rule):
    for seed in CASES:
        W, H = draw(seed)
        group = 2 + seed % 9
        chosen = loss(W, rule(bits=3, group=group, clip=False)(W, H), H)
        losses = losses_by_definition(seed, 3, group)
        assert chosen <= min(losses) * (1 + 1e-3), (seed, chosen, losses)
        # Only the search ends with it: no other power gives a loss as small.
        assert chosen >= min(losses) * (1 - 1e-3)


def check_it_is_never_worse_than_rounding_to_nearest(rule):
    for seed in CASES:
        W, H = draw(seed)
        for clip in (False, True):
            mine = loss(W, rule(bits=2, group=4, clip=clip)(W, H), H)
            assert mine <= loss(W, ft.RTN(bits=2, group=4)(W), H) * (1 + 1e-5), (seed, clip)


def check_inputs_of_one_size_give_rounding_to_nearest(rule):
    rng = np.random.default_rng(0)
    for width in (1, 5, 16):
        W = rng.standard_normal((4, width)).astype(np.float32)
        packed = rule(bits=3, group=4, clip=False)(W, 7 * np.eye(width))
        np.testing.assert_array_equal(host(packed.dequantize()), host(ft.RTN(bits=3, group=4)(W).dequantize()))
        assert packed.input_scale is None


def check_the_unit_of_the_inputs_does_not_matter(rule):
    for seed in CASES:
        W, H = draw(seed)
        first = rule(bits=3, group=4)(W, H)
        for unit in (2.0**-100, 2.0**80):
            again = rule(bits=3, group=4)(W, H * unit)
            np.testing.assert_array_equal(host(first.dequantize()), host(again.dequantize()))


def check_it_is_exact_before_rounding(rule):
    """With 8 bits and a scale for each weight, hardly anything is left of the rounding."""
    for seed in CASES:
        W, H = draw(seed)
        dense = host(rule(bits=8, group=1, clip=False)(W, H).dequantize())
        np.testing.assert_allclose(dense, W, rtol=1e-2, atol=0)


def check_inputs_that_are_always_zero(rule):
    rng = np.random.default_rng(3)
    W = rng.standard_normal((4, 8)).astype(np.float32)
    X = rng.standard_normal((20, 8))
    X[:, [2, 5]] = 0
    for H in (X.T @ X, np.zeros((8, 8))):
        dense = host(rule(bits=4, group=4)(W, H).dequantize())
        assert np.isfinite(dense).all()
    assert (host(rule(bits=4, group=4)(np.zeros_like(W), X.T @ X).dequantize()) == 0).all()


def check_large_inputs_gain(rule):
    """Inputs of which a few are thirty times as large as the others: the median loss falls by a third and more."""
    ratios = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        W = rng.standard_normal((16, 64)).astype(np.float32)
        X = rng.standard_normal((256, 64))
        X[:, rng.choice(64, 3, replace=False)] *= 30
        H = 2 / 256 * X.T @ X
        ratios.append(loss(W, rule(bits=3, group=32)(W, H), H) / loss(W, ft.RTN(bits=3, group=32)(W), H))
    assert max(ratios) <= 1 + 1e-5
    assert np.median(ratios) < 0.65, np.median(ratios)


def clips_are_the_best_of_each_group(clip_groups):
    for seed in CASES:
        W, H = draw(seed)
        group = 1 + seed % 7
        clipped = clip_groups(W, H.astype(W.dtype), "affine", 2, group)
        for row in range(len(W)):
            for start in range(0, W.shape[1], group):
                part = slice(start, start + group)
                w = W[row, part]
                errors = []
                for i in range(10):
                    end = abs(w).max() * W.dtype.type(1 - i / 20)
                    d = (w - fake_affine(np.clip(w, -end, end), 2)).astype(np.float64)
                    errors.append(d @ H[part, part] @ d)
                d = (w - fake_affine(clipped[row, part], 2)).astype(np.float64)
                assert d @ H[part, part] @ d <= min(errors) * (1 + 1e-3) + 1e-9 * H.max()


CHECKS = [check for name, check in sorted(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS)
def test_awq(check):
    check(ft.AWQ)


def test_clips():
    clips_are_the_best_of_each_group(awq.clip_groups)


# ── wrong answers ────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class ScaleStays(ft.AWQ):
    """The weights are scaled and never divided by s again."""

    def round(self, scaled, s):
        return round_to_nearest(scaled, self.grid, self.bits, self.group)


@dataclass(frozen=True)
class ScaleUpsideDown(ft.AWQ):
    """Large inputs get small weights, as in SmoothQuant's activations."""

    def round(self, scaled, s):
        return super().round(scaled / s / s, 1 / s)


@dataclass(frozen=True)
class OtherSearch(ft.AWQ):
    """AWQ with other functions of its file."""

    replaced = {}

    def __call__(self, W, H=None):
        with pytest.MonkeyPatch.context() as patch:
            for name, f in self.replaced.items():
                patch.setattr(awq, name, f)
            return super().__call__(W, H)


def weight_error(W, packed, H):
    D = W - host(packed.dequantize())
    return float(np.vdot(D, D))


def scales_of(magnitude, powers=awq.POWERS, *, least=0.0, normalised=True):
    def input_scales(H):
        m = np.maximum(magnitude(H), least)
        for r in powers:
            with np.errstate(divide="ignore", invalid="ignore"):
                s = m**r
                s = s / np.sqrt(s.max() * s.min()) if normalised else s
            yield s.astype(np.float16).astype(H.dtype)
    return input_scales


def root(H):
    return np.sqrt(np.diagonal(H) / 2)


def wrong(replaced, doc):
    return type("Wrong", (OtherSearch,), {"replaced": replaced, "__doc__": doc})


WRONG = [
    ScaleStays,
    ScaleUpsideDown,
    wrong({"squared_error": weight_error}, "The search weighs all inputs the same."),
    wrong({"squared_error": lambda W, packed, H: -awq_error(W, packed, H)}, "The search takes the largest loss."),
    wrong({"squared_error": lambda W, packed, H: awq_error(W, packed, np.diag(np.diagonal(H)))},
          "The search forgets that inputs are correlated."),
    wrong({"input_scales": scales_of(lambda H: np.diagonal(H) / 2, least=1e-8)}, "The size of an input is its square."),
    wrong({"input_scales": scales_of(root)}, "An input that is always 0 gives s = 0."),
    wrong({"input_scales": scales_of(lambda H: root(H) * 1e-3, least=1e-4)}, "s is held above an absolute number."),
    wrong({"input_scales": scales_of(root, awq.POWERS[1:], least=1e-4)}, "Round-to-nearest is not among the powers."),
    wrong({"input_scales": scales_of(root, awq.POWERS[:10], least=1e-4)}, "The powers end at 0.45."),
]
awq_error = awq.squared_error


@wrong_answers
@pytest.mark.parametrize("rule", WRONG, ids=lambda rule: rule.__doc__.split(",")[0][:40])
def test_a_wrong_answer_is_rejected(rule):
    for check in CHECKS:
        try:
            with np.errstate(all="ignore"):
                check(rule)
        except (AssertionError, ValueError):
            return
    pytest.fail(f"nothing rejects: {rule.__doc__}")


def clip_all(W, H, kind, bits, group):
    """Every row ends at 0.55 of its largest weight."""
    ends = np.abs(W).max(axis=1, keepdims=True) * 0.55
    return np.clip(W, -ends, ends)


def clip_unweighted(W, H, kind, bits, group):
    """A group's error is that of its weights, not of its output."""
    return awq.clip_groups(W, np.eye(len(H), dtype=W.dtype), kind, bits, group)


def clip_diagonal(W, H, kind, bits, group):
    """A group's error forgets that its inputs are correlated."""
    return awq.clip_groups(W, np.diag(np.diagonal(H)), kind, bits, group)


def clip_nothing(W, H, kind, bits, group):
    """No clip is ever better."""
    return W


@wrong_answers
@pytest.mark.parametrize("clip", [clip_all, clip_unweighted, clip_diagonal, clip_nothing], ids=lambda f: f.__name__)
def test_wrong_clips_are_rejected(clip):
    with pytest.raises(AssertionError):
        clips_are_the_best_of_each_group(clip)


def test_clips_that_hurt_the_layer_are_given_up():
    """A group that looks at its own part of the output alone can make the whole layer worse."""
    rng = np.random.default_rng(0)
    hurt = 0
    for _ in range(20):
        W = rng.standard_normal((2, 8))
        X = rng.standard_normal((20, 1)) + 0.1 * rng.standard_normal((20, 8))    # all inputs say the same
        H = X.T @ X
        plain = ft.AWQ(bits=2, group=2, clip=False)(W, H)
        s = 1.0 if plain.input_scale is None else host(plain.input_scale)
        clipped = awq.clip_groups(W * s, H / (s * np.ones((8, 1))) / (s * np.ones(8)), "affine", 2, 2)
        forced = round_to_nearest(clipped, "affine", 2, 2, input_scale=None if plain.input_scale is None else s)
        before = loss(W, plain, H)
        hurt += loss(W, forced, H) > before * (1 + 1e-6)
        assert loss(W, ft.AWQ(bits=2, group=2)(W, H), H) <= before * (1 + 1e-6)
    assert hurt > 2


# ── in a model ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_awq_is_a_rule_for_compress(rng):
    model = ft.GPT(ft.GPTConfig(vocab=30, positions=16, width=16, layers=2, heads=2), seed=1)
    for block in model.blocks:
        gamma = host(block.norm1.weight).copy()
        gamma[3] = 25                                    # one large channel, as real models have
        block.norm1.weight.copy_(gamma)
    data = [rng.integers(0, 30, (4, 12)) for _ in range(3)]
    reports = {}
    for rule in (ft.RTN(bits=3, group=8), ft.AWQ(bits=3, group=8)):
        other = ft.GPT(model.config, seed=1)
        other.load_state_dict(model.state_dict())
        if rule.needs_hessian:
            reports[rule] = ft.compress(other, rule, data)
        else:
            reports[rule] = ft.compress(other, rule)
        logits = host(other(data[0]))
        assert np.isfinite(logits).all()
    assert isinstance(other.blocks[0].attn.q.weight, Uniform)
    assert other.blocks[0].attn.q.weight.input_scale is not None


def test_weights_near_the_largest_number_are_scaled_by_what_fits():
    """A power whose scaled weights would be infinite is left out."""
    W = np.full((2, 4), 3e37, np.float32)
    W[:, 1:] *= np.array([0.3, -0.7, 0.5], np.float32)
    H = np.diag([1e4, 1, 1, 1e-2])
    packed = ft.AWQ(bits=8, group=2)(W, H)
    np.testing.assert_allclose(host(packed.dequantize()), W, rtol=0.05)


@pytest.mark.parametrize("unit", [2.0**-100, 2.0**100])
def test_the_scales_of_inputs_do_not_depend_on_the_unit_in_float32(unit):
    """A factor of all m_j is no factor of s: it is divided by the root of its largest times its smallest entry."""
    H = np.diag([1, 4, 0.25, 1e-3]).astype(np.float32)
    np.testing.assert_array_equal(list(awq.input_scales(H * np.float32(unit))), list(awq.input_scales(H)))


def test_messages_name_the_rule_that_was_called():
    for rule in (ft.AWQ(), ft.RTN(), ft.GPTQ(), ft.OBQ()):
        with pytest.raises(ValueError, match=f"^{type(rule).__name__} wants finite weights"):
            rule(np.full((2, 2), np.inf, np.float32), np.eye(2))
        with pytest.raises(ValueError, match=rf"^{type(rule).__name__} wants a weight of shape \(out, in\)"):
            rule(np.ones(2, np.float32), np.eye(2))
    with pytest.raises(ValueError, match="^AWQ wants a symmetric Hessian"):
        ft.AWQ()(np.ones((2, 2), np.float32), np.triu(np.ones((2, 2))))


def test_settings_without_sense_are_refused():
    with pytest.raises(ValueError, match="bits"):
        ft.AWQ(bits=9)
    with pytest.raises(TypeError, match="clip"):
        ft.AWQ(clip=1)
    with pytest.raises(TypeError, match="calibration"):
        ft.AWQ()(np.ones((2, 2), np.float32))

"""Bad and extreme input of every compression rule: a finite result or one sentence; never NaN out of finite input.

Every rule of tinyft.compress.quantize is here by itself. A variant of a rule is one more line of RULES.
"""
from __future__ import annotations

import numpy as np
import pytest
from helpers import dev, host, wrong_answers

import tinyft as ft
from tinyft import nn
from tinyft.compress import Rule, quantize
from tinyft.compress.rule import check_weight

RULES: dict[str, Rule] = {}
for name in quantize.__all__:
    if isinstance(getattr(quantize, name), type) and issubclass(getattr(quantize, name), Rule):
        RULES[name] = getattr(quantize, name)()
RULES |= {
    "RTN, short group": ft.RTN(3, 7), "RTN, rows": ft.RTN(2, None), "RTN, symmetric": ft.RTN(4, 8, "symmetric"),
    "RTN, absmax": ft.RTN(4, 8, "absmax"), "RTN, ternary": ft.RTN(2, 8, "ternary"), "RTN, sign": ft.RTN(1, 8, "sign"),
    "RTN, 8 bits": ft.RTN(8, 8), "RTN, 1 bit": ft.RTN(1, 8),
    "GPTQ, short group": ft.GPTQ(3, 7), "GPTQ, act-order": ft.GPTQ(4, 8, act_order=True),
    "GPTQ, static": ft.GPTQ(4, 8, act_order=True, static_groups=True), "GPTQ, absmax": ft.GPTQ(2, None, "absmax"),
    "GPTQ, ternary": ft.GPTQ(2, 8, "ternary"), "GPTQ, sign": ft.GPTQ(1, 8, "sign"),
    "GPTQ, no damping": ft.GPTQ(4, 8, damp=0.0),
    "NF4, single": ft.NF4(double=False), "NF4, short block": ft.NF4(block=7),
}
OUT, IN = 5, 20
MAX = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).smallest_subnormal)


def normal(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((OUT, IN)).astype(np.float32)


def changed(place: object, value: float) -> np.ndarray:
    """Normal weights, some of which have another value."""
    W = normal()
    W[place] = value
    return W


WEIGHTS: dict[str, np.ndarray] = {
    "normal": normal(),
    "zeros": np.zeros((OUT, IN), np.float32),
    "minus zeros": np.full((OUT, IN), -0.0, np.float32),
    "a zero row": changed(1, 0),
    "a zero column": changed((slice(None), 3), 0),
    "constant rows": np.repeat(normal()[:, :1], IN, axis=1),
    "all ones": np.ones((OUT, IN), np.float32),
    "positive": abs(normal()) + 1,
    "negative": -abs(normal()) - 1,
    "one weight": changed((slice(None), slice(1, None)), 0),
    "an outlier": changed((2, 3), 1e30),
    "the largest number": changed((2, 3), MAX),
    "both largest numbers": np.where(normal() > 0, MAX, -MAX).astype(np.float32),
    "large": normal() * 1e37,
    "small": normal() * 1e-37,
    "subnormal": np.rint(normal() * 3).astype(np.float32) * np.float32(TINY),
    "the smallest number": changed(slice(None), TINY),
    "large and small": np.where(np.arange(IN) % 2, normal() * 1e37, normal() * 1e-37).astype(np.float32),
    "ties": (np.arange(OUT * IN).reshape(OUT, IN) % 7 - 3).astype(np.float32) / 2,
    "one row": normal()[:1],
    "one column": normal()[:, :1],
    "one number": normal()[:1, :1],
    "float64": normal().astype(np.float64),
    "float16": normal().astype(np.float16),
    "bfloat16": normal().astype("bfloat16"),
    "integers": np.rint(normal() * 3).astype(np.int64),
    "not in C order": np.asfortranarray(normal()),
}


# The values of a grid around these may be too large for float32: then a rule says so.
NEAR_LARGEST = ("the largest number", "both largest numbers")


def inputs(width: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((4 * width, width))


def hessian(width: int) -> np.ndarray:
    X = inputs(width)
    return 2 / len(X) * X.T @ X


def with_dead_inputs(width: int) -> np.ndarray:
    H = hessian(width)
    H[::3] = 0
    H[:, ::3] = 0
    return H


def rank_one(width: int) -> np.ndarray:
    x = inputs(width)[0]
    return np.outer(x, x)


HESSIANS = {
    "of normal inputs": hessian,
    "of no input": lambda width: np.zeros((width, width)),
    "with dead inputs": with_dead_inputs,
    "of one input": rank_one,
    "of equal inputs": lambda width: np.ones((width, width)),
    "diagonal": lambda width: np.diag(np.arange(1.0, width + 1)),
    "large": lambda width: hessian(width) * 1e30,
    "small": lambda width: hessian(width) * 1e-30,
    "of an outlier": lambda width: np.diag(np.r_[1e12, np.ones(width - 1)]),
    "float32": lambda width: hessian(width).astype(np.float32),
}


def check_result(rule: Rule, W: np.ndarray, H: np.ndarray | None) -> nn.Packed:
    """The packed weight of finite input, which is finite and not larger than what it stands for allows."""
    before = W.copy()
    with np.errstate(over="ignore", invalid="raise", divide="raise"):
        packed = rule(W, H)
    np.testing.assert_array_equal(W, before)             # the caller's array is as it was
    dense = host(packed.dequantize())
    assert isinstance(packed, nn.Packed) and packed.shape == W.shape == dense.shape
    assert np.isfinite(dense).all()
    assert packed.nbytes > 0
    return packed


@pytest.mark.parametrize("name", RULES)
def test_finite_weights_give_finite_weights(name):
    rule = RULES[name]
    for case, W in WEIGHTS.items():
        H = hessian(W.shape[1]) if rule.needs_hessian else None
        try:
            dense = host(check_result(rule, W, H).dequantize())
        except ValueError as e:
            assert case in NEAR_LARGEST and " wants " in str(e), (case, str(e))
            continue
        except Exception as e:
            raise AssertionError(f"{name} on {case}: {type(e).__name__}: {e}") from e
        if not W.any():
            assert not dense.any(), case


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.needs_hessian])
def test_every_hessian_gives_finite_weights(name):
    rule = RULES[name]
    for case, make in HESSIANS.items():
        for W in (normal(), normal()[:, :1], np.zeros((OUT, IN), np.float32), changed((2, 3), 1e30)):
            try:
                check_result(rule, W, make(W.shape[1]))
            except Exception as e:
                raise AssertionError(f"{name} with the Hessian {case}: {type(e).__name__}: {e}") from e


BAD_WEIGHTS = {
    "NaN": (changed((2, 3), np.nan), ValueError, "wants finite weights, got inf or NaN"),
    "inf": (changed((2, 3), np.inf), ValueError, "wants finite weights, got inf or NaN"),
    "minus inf": (changed((2, 3), -np.inf), ValueError, "wants finite weights, got inf or NaN"),
    "a vector": (normal()[0], ValueError, "wants a weight of shape"),
    "three axes": (normal()[None], ValueError, "wants a weight of shape"),
    "no rows": (normal()[:0], ValueError, "wants a weight of shape"),
    "no columns": (normal()[:, :0], ValueError, "wants a weight of shape"),
    "complex": (normal() * 1j, TypeError, "an array of real numbers"),
    "Booleans": (normal() > 0, TypeError, "an array of real numbers"),
    "texts": (np.array([["a"]]), TypeError, "an array of real numbers"),
    "a list": ([[1.0]], TypeError, "an array of real numbers"),
    "None": (None, TypeError, "an array of real numbers"),
    "packed": (ft.RTN()(normal()), TypeError, "packed already"),
}


@pytest.mark.parametrize("name", RULES)
def test_bad_weights_are_refused(name):
    rule = RULES[name]
    for case, (W, kind, message) in BAD_WEIGHTS.items():
        with pytest.raises(kind, match=message) as caught:
            rule(W, hessian(IN) if rule.needs_hessian else None)
        assert str(caught.value).startswith(type(rule).__name__) and "\n" not in str(caught.value), case


@pytest.mark.parametrize("name", RULES)
def test_float64_beyond_float32_is_a_sentence_or_finite(name):
    rule = RULES[name]
    W = normal().astype(np.float64)
    W[2, 3] = 1e300
    try:
        check_result(rule, W, hessian(IN) if rule.needs_hessian else None)
    except ValueError as e:
        assert "finite" in str(e)


def indefinite(width: int) -> np.ndarray:
    H = hessian(width)
    H[0, 1] = H[1, 0] = 1e6
    return H


def put(value: float) -> np.ndarray:
    H = hessian(IN)
    H[2, 2] = value
    return H


BAD_HESSIANS = {
    "none": (None, TypeError, "calibration batches"),
    "NaN": (put(np.nan), ValueError, "wants a finite Hessian"),
    "inf": (put(np.inf), ValueError, "wants a finite Hessian"),
    "negative": (put(-1.0), ValueError, "without negative entries"),
    "of another width": (hessian(IN + 1), ValueError, "wants a Hessian of shape"),
    "no matrix": (hessian(IN)[0], ValueError, "wants a Hessian of shape"),
    "complex": (hessian(IN) * 1j, TypeError, "an array of real numbers"),
    "a list": ([[1.0]], TypeError, "an array of real numbers"),
}


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.needs_hessian])
def test_bad_hessians_are_refused(name):
    rule = RULES[name]
    for case, (H, kind, message) in BAD_HESSIANS.items():
        with pytest.raises(kind, match=message) as caught:
            rule(normal(), H)
        assert str(caught.value).startswith(type(rule).__name__) and "\n" not in str(caught.value), case
    try:
        check_result(rule, normal(), indefinite(IN))
    except ValueError as e:
        assert "positive semi-definite" in str(e)


@pytest.mark.parametrize("bits", [0, 9, -1, 1 << 70, 4.0, "4", None, True])
@pytest.mark.parametrize("rule", [ft.RTN, ft.GPTQ, ft.AWQ, ft.OBQ])
def test_bits_outside_1_to_8_are_refused(rule, bits):
    with pytest.raises((TypeError, ValueError), match="bits wants a whole number from 1 to 8, got"):
        rule(bits=bits)


@pytest.mark.parametrize("group", [0, -1, 2.0, "x", True])
@pytest.mark.parametrize("rule", [ft.RTN, ft.GPTQ, ft.AWQ, ft.OBQ])
def test_groups_that_are_none_are_refused(rule, group):
    with pytest.raises((TypeError, ValueError), match="group wants a whole number >= 1, got"):
        rule(group=group)


# ── the driver ───────────────────────────────────────────────────────────────────────────────────────────────────────
def gpt() -> ft.GPT:
    return ft.GPT(ft.GPTConfig(vocab=30, positions=16, width=8, layers=2, heads=2), seed=1)


def with_nan() -> ft.GPT:
    model = gpt()
    weight = host(model.blocks[1].mlp.up.weight).copy()
    weight[1, 1] = np.nan
    model.blocks[1].mlp.up.weight.data = dev(weight)
    return model


def packed() -> ft.GPT:
    model = gpt()
    model.blocks[1].mlp.up.weight = ft.RTN()(host(model.blocks[1].mlp.up.weight))
    return model


def attached() -> ft.GPT:
    model = gpt()
    ft.attach(model, ft.LoRA(r=2))
    return model


IDS = np.random.default_rng(0).integers(0, 30, (4, 12))
BAD_CALLS = {
    "no batches": (gpt, None, TypeError, "wants calibration batches for GPTQ, got none"),
    "empty batches": (gpt, [], ValueError, "wants calibration batches, got none"),
    "no rows": (gpt, [{"ids": IDS[:0]}], ValueError, "nothing to predict"),
    "no tokens": (gpt, [{"ids": IDS[:, :0]}], ValueError, "nothing to predict"),
    "only padding": (gpt, [{"ids": IDS, "mask": np.zeros(IDS.shape, bool)}], ValueError, "nothing to predict|padding"),
    "only padding beside labels": (
        gpt, [{"ids": IDS, "labels": IDS, "mask": np.zeros(IDS.shape, bool)}], ValueError, "only padding"),
    "ids beyond the vocabulary": (gpt, [IDS + 30], IndexError, "30"),
    "a packed weight": (packed, [IDS], ValueError, "blocks.1.mlp.up is packed already: unpack the model first"),
    "NaN among the weights": (with_nan, [IDS], ValueError, "blocks.1.mlp.up wants finite weights"),
    "a method": (attached, [IDS], ValueError, "wants a base without methods, got 'lora' attached"),
    "no model": (lambda: 3, [IDS], TypeError, "wants a model"),
    "a model without stacks": (
        lambda: nn.Linear(4, 4, rng=np.random.default_rng(0)), [IDS], TypeError, "names its blocks in `stacks`"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_refused_and_change_nothing(case):
    make, batches, kind, message = BAD_CALLS[case]
    model = make()
    before = {} if model == 3 else {name: host(a).tobytes() for name, a in model.state_dict().items()}
    with pytest.raises(kind, match=message):
        ft.compress(model, ft.GPTQ(bits=4, group=4), batches)
    if before:
        assert {name: host(a).tobytes() for name, a in model.state_dict().items()} == before


def test_a_rule_without_data_refuses_nan_too():
    model = with_nan()
    with pytest.raises(ValueError, match="blocks.1.mlp.up wants finite weights"):
        ft.compress(model, ft.RTN())
    assert not any(isinstance(m, nn.Packed) for m in model.modules())


# ── the tests can fail ───────────────────────────────────────────────────────────────────────────────────────────────
class Careless(Rule):
    """A wrong rule: it divides by the range of each row."""

    def __call__(self, W: np.ndarray, H: np.ndarray | None = None) -> nn.Packed:
        W = check_weight("Careless", W)
        with np.errstate(all="ignore"):
            scale = (W.max(axis=1, keepdims=True) - W.min(axis=1, keepdims=True)) / 15
            rounded = np.rint(W / scale) * scale
        return Kept(rounded)


class Kept(nn.Packed):
    """A weight whose values are kept."""

    def __init__(self, values: np.ndarray):
        self.values = values
        self.shape = values.shape

    def dequantize(self) -> np.ndarray:
        return self.values


@wrong_answers
@pytest.mark.parametrize("case", ["zeros", "constant rows", "both largest numbers", "one column", "a zero row"])
def test_a_careless_rule_is_caught(case):
    with pytest.raises(AssertionError):
        check_result(Careless(), WEIGHTS[case], None)

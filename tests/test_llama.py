"""Llama against the same formula in plain NumPy: head by head, query by query, in float64.

Every weight is a generic number. Rotations are products of complex numbers here, and the frequencies of llama3 go by
wavelengths. Wrong models (WRONG, WRONG_IN_CHUNKS) go through the same checks, which must reject them.
"""
from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import dev, host
from test_models import LEFT, RIGHT, WIDE, deviations, near, weights
from wrong import WRONG as WRONG_OPS
from wrong import replaced

from tinyft import (
    BitFit,
    Cache,
    Context,
    Llama,
    LlamaConfig,
    LoRA,
    PrefixTuning,
    RotaryScaling,
    Tensor,
    array,
    attach,
    generate,
    no_grad,
    ops,
)
from tinyft import autocast as autocast_to
from tinyft.edit import attached
from tinyft.models.attention import KV, Attention
from tinyft.models.blocks import Classifier, GatedMLP
from tinyft.models.rotary import Rotary
from tinyft.nn import Dropout, RMSNorm

V, P, C, L, F = 11, 12, 12, 2, 10                        # vocabulary, positions, width, layers, feed-forward width
H, HKV, D = 4, 2, 6                                      # heads, of keys and values, their width: not C / H
K = 3                                                    # classes
SIZES = {"vocab": V, "positions": P, "width": C, "layers": L, "heads": H, "hidden": F, "rope_base": 20.0, "eps": 0.1}
LLAMA3 = RotaryScaling("llama3", 4.0, low=0.5, high=1.6, original=12)            # one frequency of each kind
CASES: dict[str, dict[str, Any]] = {
    "grouped heads, wide": {"key_value_heads": HKV, "head_width": D, "qkv_bias": True},
    "one head of keys": {"key_value_heads": 1, "head_width": 2},
    "as many heads of keys": {"heads": 3, "tied": True},
    "every bias": {"key_value_heads": HKV, "head_width": D, "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "joint projection": {"heads": 3, "head_width": 6, "qkv_bias": True},
    "linear": {"heads": 2, "rope_scaling": RotaryScaling("linear", 3.0)},
    "llama3": {"key_value_heads": HKV, "head_width": D, "rope_scaling": LLAMA3},
}
every_case = pytest.mark.parametrize("case", CASES)
IDS = np.random.default_rng(3).integers(0, V, (3, 6))


def new(case: str = "grouped heads, wide", seed: int = 0, **more: Any) -> Llama:
    """As it is made."""
    return Llama(LlamaConfig(**{**SIZES, **CASES[case], **more}), seed)


def generic(case: str = "grouped heads, wide", *, classes: bool = False, **more: Any) -> Llama:
    """In float64, every number of it drawn anew."""
    model = new(case, **more)
    if classes:
        model.new_head(K, np.random.default_rng(1))
    model.to(dtype=np.float64)
    rng = np.random.default_rng(7)
    for p in model.parameters():
        p.copy_(rng.standard_normal(p.shape) * (0.6 if p.ndim > 1 else 1.0))
    return model.eval()


# ── the mathematics ──────────────────────────────────────────────────────────────────────────────────────────────────
def frequency(c: LlamaConfig, i: int) -> float:
    """The angle of the pair i for one position."""
    w = c.rope_base ** (-2 * i / c.width_of_heads)
    s = c.rope_scaling
    if s is None:
        return w
    if s.kind == "linear":
        return w / s.factor
    wavelength = 2 * math.pi / w
    if wavelength < s.original / s.high:
        return w
    if wavelength > s.original / s.low:
        return w / s.factor
    smooth = (s.original / wavelength - s.low) / (s.high - s.low)
    return (1 - smooth) * w / s.factor + smooth * w


def rotated(c: LlamaConfig, x: np.ndarray, position: int) -> np.ndarray:
    """One head's vector (D,) at a position: the numbers i and i + D/2 are one complex number, turned by its angle."""
    half = len(x) // 2
    turned = [complex(x[i], x[i + half]) * cmath.exp(1j * position * frequency(c, i)) for i in range(half)]
    return np.array([z.real for z in turned] + [z.imag for z in turned])


def linear(w: dict, at: str, x: np.ndarray) -> np.ndarray:
    return x @ w[f"{at}.weight"].T + w.get(f"{at}.bias", 0.0)


def norm(w: dict, at: str, x: np.ndarray) -> np.ndarray:
    return w[f"{at}.weight"] * x / np.sqrt((x**2).mean(-1, keepdims=True) + SIZES["eps"])


def attention(c: LlamaConfig, w: dict, at: str, x: np.ndarray, real: np.ndarray) -> np.ndarray:
    """x (T, C) of one text; real (T,) True at its tokens. Positions count the real tokens."""
    width = c.width_of_heads
    group = c.heads // (c.key_value_heads or c.heads)
    q, k, v = (linear(w, f"{at}.{name}", x) for name in "qkv")
    positions = np.maximum(np.cumsum(real) - 1, 0)
    y = np.zeros((len(x), c.heads * width))
    for h, i in np.ndindex(c.heads, len(x)):
        own = slice(h * width, (h + 1) * width)
        shared = slice(h // group * width, (h // group + 1) * width)             # the keys of the group of head h
        query = rotated(c, q[i, own], positions[i])
        seen = [j for j in range(i + 1) if real[j]]
        if seen:
            scores = [query @ rotated(c, k[j, shared], positions[j]) / math.sqrt(width) for j in seen]
            p = np.exp(scores)
            y[i, own] = sum(share * v[j, shared] for share, j in zip(p / p.sum(), seen))
    return linear(w, f"{at}.o", y)


def mlp(w: dict, at: str, x: np.ndarray) -> np.ndarray:
    gate = linear(w, f"{at}.gate", x)
    return linear(w, f"{at}.down", gate / (1 + np.exp(-gate)) * linear(w, f"{at}.up", x))


def reference(c: LlamaConfig, w: dict, ids: np.ndarray, mask: np.ndarray | None = None) -> dict[str, Any]:
    """layers: the input of each block and the last hidden states (B, T, C);  out: logits or class scores."""
    real = np.ones(ids.shape, bool) if mask is None else mask
    x = w["embed.weight"][ids]
    layers = []
    for i in range(c.layers):
        layers.append(x)
        b = f"blocks.{i}"
        normed = norm(w, f"{b}.norm1", x)
        x = x + np.stack([attention(c, w, f"{b}.attn", row, r) for row, r in zip(normed, real)])
        x = x + mlp(w, f"{b}.mlp", norm(w, f"{b}.norm2", x))
    hidden = norm(w, "norm", x)
    if "head.out.weight" in w:
        last = np.stack([row[np.flatnonzero(r)[-1]] for row, r in zip(hidden, real)])
        return {"layers": [*layers, hidden], "out": last @ w["head.out.weight"].T}
    return {"layers": [*layers, hidden], "out": hidden @ w.get("head.weight", w["embed.weight"]).T}


Wrong = Callable[[Llama], AbstractContextManager]


def check_model(case: str, wrong: Wrong = nullcontext, *, classes: bool = False) -> None:
    """Outputs and hidden states are the formula's, with and without padding, and with a hole in a text.

    wrong: a context manager in which the model has an error."""
    model = generic(case, classes=classes)
    w = {name: value.copy() for name, value in weights(model).items()}          # an error may be in the weights
    with wrong(model):
        for mask in (None, RIGHT, LEFT):
            want = reference(model.config, w, IDS, mask)
            ctx = Context(mask=mask, output_hidden_states=True)
            out = model(IDS, ctx)
            real = np.ones(IDS.shape, bool) if mask is None else mask
            for got, layer in zip(ctx.hidden_states, want["layers"], strict=True):
                near(host(got)[real], layer[real])
            if classes:
                near(out, want["out"])
            else:
                near(host(out)[real], want["out"][real])


def check_chunks(case: str, wrong: Wrong = nullcontext) -> None:
    """Through the cache, in chunks, a model is its formula: without padding, with padding in front, and with a hole."""
    model = generic(case)
    w = {name: value.copy() for name, value in weights(model).items()}          # an error may be in the weights
    with wrong(model):
        for mask in (None, RIGHT, LEFT):
            cache = Cache()
            chunks = []
            for start, end in ((0, 2), (2, 3), (3, 6)):
                part = None if mask is None else mask[:, start:end]
                chunks.append(host(model(IDS[:, start:end], mask=part, cache=cache)))
            real = np.ones(IDS.shape, bool) if mask is None else mask
            near(np.concatenate(chunks, axis=1)[real], reference(model.config, w, IDS, mask)["out"][real])


@every_case
def test_a_model_is_its_formula(case):
    check_model(case)


def test_class_scores_are_their_formula():
    check_model("grouped heads, wide", classes=True)


@every_case
def test_a_model_through_its_cache_is_its_formula(case):
    check_chunks(case)


# ── planted errors ───────────────────────────────────────────────────────────────────────────────────────────────────
def heads_in_turn(a: Any, group: int) -> Any:
    """Copies of the heads in the order a b a b."""
    return array.xp(a).concatenate([a] * group, axis=-3)


def without_last_norm(self: Any, x: Tensor, ctx: Context) -> Tensor:
    """A norm that leaves a model's last hidden states as they are."""
    return x


def centred_norm(self: Any, x: Tensor, ctx: Context) -> Tensor:
    """RMSNorm of centred numbers."""
    return ops.rms_norm(x - x.mean(axis=-1, keepdims=True), self.weight, eps=self.eps)


def gate_and_up_exchanged(self: Any, x: Tensor, ctx: Context) -> Tensor:
    return self.down(ops.swiglu(self.up(x, ctx), self.gate(x, ctx)), ctx)


def columns(self: Any) -> Any:
    """Positions that count padding."""
    start = self.past_length
    return dev(np.arange(start, start + self.ids.shape[1]))[None]


def positions_of_this_call(self: Any) -> Any:
    """Positions that do not count the cached tokens."""
    return dev(np.arange(self.ids.shape[1]))[None]


def as_in_gguf(model: Llama) -> AbstractContextManager:
    """Rows of q and k in the order of llama.cpp: the two numbers of a pair are neighbours."""
    for block in model.blocks:
        for part, heads in ((block.attn.q, H), (block.attn.k, HKV)):
            for p in part.parameters():
                rows = host(p).reshape(heads, 2, D // 2, -1).swapaxes(1, 2)
                p.copy_(np.ascontiguousarray(rows.reshape(p.shape)))
    return nullcontext()


def scaled_by_the_models_width(model: Llama) -> AbstractContextManager:
    for block in model.blocks:
        block.attn.scale = (C // H)**-0.5
    return nullcontext()


def unscaled(self: RotaryScaling, frequencies: np.ndarray) -> np.ndarray:
    return frequencies


def frequencies_of_the_whole_width(self: Rotary, m: Any) -> Any:
    return self.base ** (-m.arange(0, self.width, 2) / C)


def values_rotated_too(self: KV, kv: tuple, ctx: Context) -> tuple:
    k, v, key_mask = kv
    return k, Rotary(D, base=SIZES["rope_base"])(v, ctx), key_mask


def last_column(self: Any, x: Any, ctx: Any) -> Any:
    return x[:, -1]


def residual_of_the_norm(self: Any, x: Tensor, ctx: Context) -> Tensor:
    x = self.norm1(x, ctx)
    x = x + self.attn(x, ctx)
    return x + self.mlp(self.norm2(x, ctx), ctx)


def instead(owner: Any, name: str, f: Any) -> Wrong:
    """f in the place of owner.name, for any model."""
    return lambda model: replaced(owner, name, f)


def norm_skipped(model: Llama) -> AbstractContextManager:
    model.norm.forward = without_last_norm.__get__(model.norm)
    return nullcontext()


WRONG: dict[str, Wrong] = {
    "The pairs are neighbours, as in the paper.": instead(ops, "rotary", WRONG_OPS["rotary_of_neighbours"].f),
    "The rows of a GGUF file are in Llama's order.": as_in_gguf,
    "The query heads take the heads of keys in turn.": instead(ops, "repeat_heads", heads_in_turn),
    "Padding has positions as well.": instead(Context, "positions", columns),
    "The last hidden states need no norm.": norm_skipped,
    "RMS norm is layer norm without a bias.": instead(RMSNorm, "forward", centred_norm),
    "Gate and up are two maps of the same shape.": instead(GatedMLP, "forward", gate_and_up_exchanged),
    "The scores are divided by √(C/H).": scaled_by_the_models_width,
    "The frequencies go by the model's width.": instead(Rotary, "frequencies", frequencies_of_the_whole_width),
    "Values are rotated, too.": instead(KV, "forward", values_rotated_too),
    "The sum goes on from what the norm gave.": lambda model: replaced(
        type(model.blocks[0]), "forward", residual_of_the_norm),
}
every_wrong = pytest.mark.usefixtures("definitions")     # a kernel would do what the wrong part does not


@pytest.mark.parametrize("belief", WRONG)
@every_wrong
def test_a_wrong_model_is_caught(belief):
    check_model("grouped heads, wide")
    with pytest.raises(AssertionError):
        check_model("grouped heads, wide", WRONG[belief])


@every_wrong
def test_a_scaling_that_is_forgotten_is_caught():
    for case in ("linear", "llama3"):
        with pytest.raises(AssertionError):
            check_model(case, instead(RotaryScaling, "apply", unscaled))


@every_wrong
def test_a_class_read_off_the_last_column_is_caught():
    with pytest.raises(AssertionError):
        check_model("grouped heads, wide", instead(Classifier, "row", last_column), classes=True)


class KeysRotatedWhenRead(KV):
    """Keys are cached as they come, and all are rotated when they are read, by their columns."""

    def forward(self, kv: tuple, ctx: Context) -> tuple:
        k, v, key_mask = super().forward(kv, ctx)
        columns_of_all = np.arange(k.shape[2])[None, None, :, None]
        angles = columns_of_all * Rotary(D, base=SIZES["rope_base"]).frequencies()
        angles = np.concatenate([angles, angles], axis=-1)
        return ops.rotary(k, dev(np.cos(angles)), dev(np.sin(angles))), v, key_mask


def keys_rotated_when_read(model: Llama) -> AbstractContextManager:
    """The rotation before the cache acts on queries alone: they come first, with H heads."""
    for block in model.blocks:
        block.attn.kv.forward = KeysRotatedWhenRead.forward.__get__(block.attn.kv, KeysRotatedWhenRead)
        block.attn.kv.__class__ = KeysRotatedWhenRead
    rotate = Rotary.__call__

    def queries_only(self: Rotary, x: Tensor, ctx: Context) -> Tensor:
        return rotate(self, x, ctx) if x.shape[1] == H else x
    return replaced(Rotary, "__call__", queries_only)


def cached_keys_are_rotated_again(model: Llama) -> AbstractContextManager:
    """The rotation comes after the cache, and the cache keeps its result."""
    join = Cache.join
    rotary = Rotary(D, base=SIZES["rope_base"])

    def wrong(self: Cache, module: Any, k: Tensor, v: Tensor) -> tuple:
        if module in self.kv:
            old, old_v = self.kv[module]
            ctx = Context()
            ctx.begin(np.zeros((1, old.shape[2]), int), old.data)
            self.kv[module] = rotary(old, ctx), old_v
        return join(self, module, k, v)
    return replaced(Cache, "join", wrong)


WRONG_IN_CHUNKS: dict[str, Wrong] = {
    "Every call starts at position 0.": instead(Context, "positions", positions_of_this_call),
    "Keys may be rotated when they are read, by their columns.": keys_rotated_when_read,
    "Keys in the cache are rotated with the new ones.": cached_keys_are_rotated_again,
}


@pytest.mark.parametrize("belief", WRONG_IN_CHUNKS)
@every_wrong
def test_a_wrong_cache_is_caught(belief):
    with pytest.raises(AssertionError):
        check_chunks("grouped heads, wide", WRONG_IN_CHUNKS[belief])


# ── inputs and outputs ───────────────────────────────────────────────────────────────────────────────────────────────
@every_case
def test_embeddings_may_stand_in_place_of_ids_and_logits_where_they_are_wanted(case):
    model = generic(case)
    y = host(model(IDS))
    rows = Tensor(dev(host(model.embed.weight)[IDS]), requires_grad=True)
    given = model(rows)
    near(given, y)
    given.sum().backward()
    assert rows.grad.shape == rows.shape
    at = np.array([0, 5, 13])
    near(model(IDS, logit_positions=at), y.reshape(-1, V)[at])


def test_without_a_head_the_output_is_the_last_hidden_states():
    model = generic()
    model.head = None
    ctx = Context()
    near(model(IDS, ctx), reference(model.config, weights(model), IDS)["layers"][-1])
    assert ctx.output is ctx.last_hidden_state
    assert model.top_modules == ("norm",)


@pytest.mark.parametrize("cache", [True, False])
def test_greedy_generation_is_the_argmax_of_the_formula_also_with_padding(cache):
    model = generic()
    mask = np.array([[0, 0, 1], [1, 1, 1], [0, 1, 1]], bool)
    prompt = IDS[:, :3]
    got = np.asarray(host(generate(model, prompt, 5, mask=mask, cache=cache)))
    ids = prompt
    for _ in range(5):
        real = np.concatenate([mask, np.ones((3, ids.shape[1] - 3), bool)], axis=1)
        logits = reference(model.config, weights(model), ids, real)["out"][:, -1]
        ids = np.concatenate([ids, logits.argmax(-1)[:, None]], axis=1)
    assert np.array_equal(got, ids)
    assert len(np.unique(got[:, 3:])) > 2                # not one token again and again


def test_dropout_acts_on_the_attention_probabilities_only():
    model = generic(dropout=0.4)
    rates = {name: m.p for name, m in model.named_modules() if isinstance(m, Dropout)}
    assert {name.rpartition(".")[2] for name, p in rates.items() if p} == {"drop_p"}
    assert sum(p == 0.4 for p in rates.values()) == L
    with no_grad():
        y = host(model.eval()(IDS, rng=np.random.default_rng(0)))
        near(y, reference(model.config, weights(model), IDS)["out"])
        model.train()
        one, again, other = (host(model(IDS, rng=np.random.default_rng(seed))) for seed in (0, 0, 1))
    assert np.array_equal(one, again) and not np.allclose(one, y) and not np.allclose(one, other)


@pytest.mark.skipif(array.backend() != "numpy", reason="puts arrays beside the weights of another backend")
def test_ids_and_masks_are_put_beside_the_weights():
    array.use("strict")
    try:
        assert new()(IDS, mask=RIGHT).device == "strict"
    finally:
        array.use("numpy")


# ── 16 bits ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def check_positions_in_16_bits(dtype: Any) -> None:
    """A rotation in 16 bits at positions of up to 1,000 is off by its own rounding only."""
    x = np.random.default_rng(0).standard_normal((1, 1, 1000, 8))
    ctx = Context()
    ctx.begin(np.zeros((1, 1000), int), dev(x))
    rotary = Rotary(8, base=100.0)
    exact = host(rotary(Tensor(dev(x)), ctx))
    rounded = host(rotary(Tensor(dev(x, dtype)), ctx)).astype(np.float64)
    assert np.abs(rounded - exact).max() < 12 * float(ml_dtypes.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_positions_are_not_rounded_to_16_bits(dtype, monkeypatch):
    check_positions_in_16_bits(dtype)
    monkeypatch.setattr(np, "promote_types", lambda a, b: a)                     # angles in the dtype of x
    with pytest.raises(AssertionError):
        check_positions_in_16_bits(dtype)


def test_angles_are_float32_as_in_transformers():
    """A product of float32 numbers, rounded once: at large positions it differs from the exact angle."""
    ctx = Context()
    x = np.zeros((1, 1, 3000, 8), np.float32)
    ctx.begin(np.zeros((1, 3000), int), dev(x))
    rotary = Rotary(8, base=100.0)
    cos, _ = rotary.factors(Tensor(dev(x)), ctx)
    frequencies = rotary.frequencies()
    angles = np.arange(3000, dtype=np.float32)[:, None] * frequencies.astype(np.float32)
    assert angles.dtype == np.float32
    assert np.abs(host(cos)[0, 0, :, :4] - np.cos(angles)).max() < 1e-6
    exact = np.cos(np.arange(3000)[:, None] * frequencies)
    assert np.abs(host(cos)[0, 0, :, :4] - exact).max() > 2e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_in_16_bits_and_under_autocast_is_near_the_model_in_32(dtype):
    """Logits, and the direction of every gradient."""
    def run(*, to: str = "float32", autocast: bool = False) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        model = new(std=0.3, eps=1e-5).to(dtype=np.dtype(to))
        with autocast_to(dtype, enabled=autocast):
            logits = model(IDS, mask=LEFT)
            loss = ops.cross_entropy(logits[:, :-1], dev(IDS[:, 1:]))
        loss.backward()
        gradients = {name: host(p.grad).astype(np.float64).ravel() for name, p in model.named_parameters().items()}
        return host(logits).astype(np.float64), gradients
    exact, exact_gradients = run()
    for logits, gradients in (run(to=dtype), run(autocast=True)):
        assert 0 < np.abs(logits - exact)[LEFT].max() < 0.02 * np.abs(exact).max()
        for name, want in exact_gradients.items():
            got = gradients[name]
            assert got @ want > 0.98 * np.linalg.norm(got) * np.linalg.norm(want) > 0, name


# ── how it is made ───────────────────────────────────────────────────────────────────────────────────────────────────
def test_initial_values_have_the_deviation_of_the_config():
    wide = {**SIZES, "vocab": 60, "width": WIDE, "hidden": 300, "std": 0.05}
    config = LlamaConfig(**wide, key_value_heads=2, qkv_bias=True, out_bias=True, mlp_bias=True)
    model = Llama(config, 1)
    deviations(model, {"": 0.05})
    model.new_head(30, np.random.default_rng(0))
    deviations(model, {"head.out": WIDE**-0.5, "": 0.05})
    assert model.head.out.bias is None and model.head_modules == ("head",)
    assert model.head.out_features == 30 and model.head.in_features == model.out_features == WIDE
    assert Llama(LlamaConfig(**{**wide, "hidden": None})).blocks[0].mlp.up.out_features == 4 * WIDE


def test_a_seed_is_the_same_numbers_and_another_seed_is_others():
    """Without one it is seed 0."""
    one, two, other = (weights(new(seed=seed)) for seed in (0, 0, 1))
    default = weights(Llama(new().config))
    assert all(np.array_equal(v, two[name]) and np.array_equal(v, default[name]) for name, v in one.items())
    assert not any(np.array_equal(v, other[name]) for name, v in one.items() if v.ndim > 1)


def test_a_tied_head_has_no_tensor_and_a_new_head_unties_it():
    model = new("as many heads of keys")
    assert model.embed.tied and "head.weight" not in model.named_parameters()
    model.new_head(K, np.random.default_rng(0))
    assert not model.embed.tied
    untied = new()
    assert not untied.embed.tied and untied.named_parameters()["head.weight"].shape == (V, C)


def test_a_printed_model_says_how_its_attention_differs():
    assert "heads=4, key_value_heads=2, causal, rotary" in repr(new())
    assert "heads=3, causal, rotary" in repr(new("as many heads of keys"))


def test_a_model_names_its_stacks_its_top_modules_and_the_sublayers_of_its_blocks():
    """The embedding, the blocks and the top modules together own every parameter."""
    model = new()
    modules = dict(model.named_modules())
    assert model.stacks == {"decoder": ["blocks.0", "blocks.1"]}
    assert model.top_modules == ("norm", "head")
    for path in model.stacks["decoder"]:
        assert modules[path].sublayers == [("attn", "norm1"), ("mlp", "norm2")]
        for module, norm_path in modules[path].sublayers:
            assert modules[f"{path}.{module}"].in_features == modules[f"{path}.{module}"].out_features == C
            assert isinstance(modules[f"{path}.{norm_path}"], RMSNorm)
            assert modules[f"{path}.{norm_path}"].eps == SIZES["eps"]
    owners = tuple(f"{owner}." for owner in ("embed", *model.stacks["decoder"], *model.top_modules))
    assert all(name.startswith(owners) for name in model.named_parameters())


@pytest.mark.parametrize("fields, error, words", [
    ({"key_value_heads": 3}, ValueError, "3 key/value heads do not divide 4 heads"),
    ({"key_value_heads": 8}, ValueError, "8 key/value heads do not divide 4 heads"),
    ({"key_value_heads": 0}, ValueError, "key_value_heads wants a whole number >= 1, got 0"),
    ({"key_value_heads": 2.0}, TypeError, "key_value_heads wants a whole number"),
    ({"head_width": 5}, ValueError, "heads of an even width, got 5"),
    ({"width": 20}, ValueError, "heads of an even width, got 5"),
    ({"heads": 5}, ValueError, "5 heads do not divide a width of 12"),
    ({"rope_base": 0.0}, ValueError, "rope_base"),
    ({"rope_scaling": {"factor": 2.0}}, TypeError, "rope_scaling wants a RotaryScaling or None"),
    ({"tied": 1}, TypeError, "tied wants True or False"),
    ({"num_key_value_heads": 2}, TypeError, "did you mean 'key_value_heads'"),
    ({"rope_theta": 2.0}, TypeError, "did you mean 'rope_base'"),
])
def test_a_config_from_which_no_model_can_be_built_is_refused(fields, error, words):
    with pytest.raises(error, match=words):
        LlamaConfig(**{**SIZES, **fields})


@pytest.mark.parametrize("ids, error, words", [
    ([[1.0, 2.0]], TypeError, "token ids are integers; got float64"),
    ([[1, V]], IndexError, f"token id {V} is outside the vocabulary of {V}"),
    (np.zeros((1, P + 1), int), ValueError, rf"a sequence of {P + 1} tokens is longer than the model's {P} positions"),
    (np.zeros(3, int), ValueError, r"\(B, T\)"),
])
def test_bad_ids_get_one_clear_sentence(ids, error, words):
    with pytest.raises(error, match=words):
        new()(ids)


# ── methods ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_lora_on_grouped_heads_has_the_shapes_of_the_maps():
    model = new()
    a = attach(model, LoRA(r=3))
    shapes = {path: (e.A.shape, e.B.shape) for path, e in a.edits.items()}
    assert shapes == {f"blocks.{i}.attn.{name}": ((3, C), (heads * D, 3))
                      for i in range(L) for name, heads in (("q", H), ("v", HKV))}


def test_a_prefix_has_the_heads_of_the_keys():
    model = new()
    a = attach(model, PrefixTuning(p=3))
    assert {e.K.shape for e in a.edits.values()} == {e.V.shape for e in a.edits.values()} == {(HKV, 3, D)}


def test_bitfit_on_a_llama_without_biases_says_so_and_changes_nothing():
    model = new("llama3")
    model.new_head(K, np.random.default_rng(0))
    with pytest.raises(ValueError, match="BitFit would train nothing on this model: it has no biases"):
        attach(model, BitFit())
    assert not attached(model) and all(p.requires_grad for p in model.parameters())
    assert model.head_modules == ("head",)


def test_the_maps_of_attention_have_the_width_of_its_heads():
    """The heads may be wider than C / H."""
    attn = new().blocks[0].attn
    assert isinstance(attn, Attention)
    assert (attn.q.out_features, attn.k.out_features, attn.v.out_features) == (H * D, HKV * D, HKV * D)
    assert (attn.o.in_features, attn.o.out_features) == (H * D, C)


def test_the_initial_maps_of_a_gated_feed_forward_have_a_standard_deviation_of_2_percent():
    """Also without out_std; with it, `down` alone has another one."""
    mlp = GatedMLP(64, 256, rng=np.random.default_rng(0))
    for linear in (mlp.gate, mlp.up, mlp.down):
        assert host(linear.weight).std() == pytest.approx(0.02, rel=0.03)
    mlp = GatedMLP(64, 256, rng=np.random.default_rng(0), out_std=0.1)
    assert host(mlp.up.weight).std() == pytest.approx(0.02, rel=0.03)
    assert host(mlp.down.weight).std() == pytest.approx(0.1, rel=0.03)

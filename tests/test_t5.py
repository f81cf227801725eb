"""T5, v1.0 and v1.1, beside its formula for one row at a time; relative positions, its cache, its training."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from encoder_decoders import V, check_formula, in_chunks, pad, pairs, run
from helpers import dev, host, wrong_answers

import tinyft as ft
from tinyft import T5, T5Config, ops
from tinyft.models import t5
from tinyft.models.t5 import RelativeBias, relative_buckets
from tinyft.nn import TiedHead
from tinyft.train.batch import compute_loss, read_batch

C, H, D, F, BUCKETS, LONGEST = 12, 3, 5, 20, 8, 6
SIZES: dict[str, Any] = {"vocab": V, "width": C, "layers": 2, "heads": H, "head_width": D, "hidden": F, "start": 1,
                         "buckets": BUCKETS, "max_distance": LONGEST}
CONFIGS = {
    "v1.0": T5Config(**SIZES),
    "v1.1": T5Config(**SIZES, feed_forward="gated-gelu", tied=False),
    "silu": T5Config(**SIZES, feed_forward="gated-silu", decoder_layers=1),
}
every_config = pytest.mark.parametrize("name", CONFIGS)


def build(name: str = "v1.0", seed: int = 0) -> T5:
    """A model in float64 at a generic point."""
    model = T5(CONFIGS[name], seed)
    rng = np.random.default_rng(seed + 50)
    for p in model.parameters():
        p.copy_(host(p) + rng.standard_normal(p.shape) * (0.3 if p.ndim > 1 else 0.1))
    return model.to(dtype=np.float64).eval()


# ── the formula, for one row ─────────────────────────────────────────────────────────────────────────────────────────
def norm(x: np.ndarray, w: dict, name: str) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w[f"{name}.weight"]


def bucket(distance: int, *, both_sides: bool) -> int:
    """The bucket of one distance, by the specification."""
    n_buckets = BUCKETS
    first = 0
    if both_sides:
        n_buckets //= 2
        first = n_buckets if distance > 0 else 0
        n = abs(distance)
    else:
        n = max(-distance, 0)
    exact = n_buckets // 2
    if n < exact:
        return first + n
    large = exact + math.floor(math.log(n / exact) / math.log(LONGEST / exact) * (n_buckets - exact))
    return first + min(n_buckets - 1, large)


def attend(x: np.ndarray, source: np.ndarray, w: dict, name: str, table: np.ndarray | None, *,
           causal: bool) -> np.ndarray:
    """Attention of the rows x (T, C) to the rows source (Ts, C), score by score."""
    q, k, v = (a @ w[f"{name}.{part}.weight"].T for a, part in ((x, "q"), (source, "k"), (source, "v")))
    out = []
    for h in range(H):
        part = slice(h * D, (h + 1) * D)
        s = q[:, part] @ k[:, part].T
        for i in range(len(x)):
            for j in range(len(source)):
                if causal and j > i:
                    s[i, j] = -np.inf
                elif table is not None:
                    s[i, j] += table[bucket(j - i, both_sides=not causal), h]
        p = np.exp(s - s.max(-1, keepdims=True))
        out.append(p / p.sum(-1, keepdims=True) @ v[:, part])
    return np.concatenate(out, -1) @ w[f"{name}.o.weight"].T


def feed_forward(x: np.ndarray, w: dict, name: str, kind: str) -> np.ndarray:
    up = x @ w[f"{name}.up.weight"].T
    if kind == "relu":
        return np.maximum(up, 0) @ w[f"{name}.down.weight"].T
    gate = x @ w[f"{name}.gate.weight"].T
    if kind == "gated-gelu":
        gate = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    else:
        gate = gate / (1 + np.exp(-gate))
    return (gate * up) @ w[f"{name}.down.weight"].T


def reference(model: T5, source: list[int], text: list[int]) -> np.ndarray:
    """The logits (T, V) of one source and one text."""
    c = model.config
    w = {name: host(p) for name, p in model.named_parameters().items()}
    x = w["embed.weight"][source]
    table = w["encoder.0.attn.relative_bias.weight"]
    for i in range(c.layers):
        block = f"encoder.{i}"
        y = norm(x, w, f"{block}.norm1")
        x = x + attend(y, y, w, f"{block}.attn", table, causal=False)
        x = x + feed_forward(norm(x, w, f"{block}.norm2"), w, f"{block}.mlp", c.feed_forward)
    seen = norm(x, w, "encoder_norm")
    x = w["embed.weight"][text]
    table = w["decoder.0.attn.relative_bias.weight"]
    for i in range(c.decoder_layers or c.layers):
        block = f"decoder.{i}"
        y = norm(x, w, f"{block}.norm1")
        x = x + attend(y, y, w, f"{block}.attn", table, causal=True)
        x = x + attend(norm(x, w, f"{block}.norm2"), seen, w, f"{block}.cross_attn", None, causal=False)
        x = x + feed_forward(norm(x, w, f"{block}.norm3"), w, f"{block}.mlp", c.feed_forward)
    x = norm(x, w, "norm")
    return x @ w["embed.weight"].T / math.sqrt(C) if c.tied else x @ w["head.weight"].T


@every_config
def test_the_model_computes_the_formula(name):
    check_formula(build(name), build(name), reference)


# ── wrong models ─────────────────────────────────────────────────────────────────────────────────────────────────────
def divided_scores(model: T5) -> None:
    for block in model.decoder:
        block.cross_attn.scale = None


def unscaled_head(model: T5) -> None:
    model.head = TiedHead(model.embed)


def bias_in_the_first_layer_alone(model: T5) -> None:
    for block in model.decoder[1:]:
        block.attn.relative_bias = None


def bias_in_cross_attention(model: T5) -> None:
    model.decoder[0].cross_attn.relative_bias = model.decoder[0].attn.relative_bias


def one_table_for_both_stacks(model: T5) -> None:
    model.decoder[0].attn.relative_bias.weight = model.encoder[0].attn.relative_bias.weight


def causal_buckets_in_the_encoder(model: T5) -> None:
    model.encoder[0].attn.relative_bias.both_sides = False


def no_encoder_norm(model: T5) -> None:
    model.encoder_norm.forward = lambda x, ctx: x


def mirrored(model: T5) -> None:
    """Position of the query − position of the key."""
    bias = model.encoder[0].attn.relative_bias
    forward = bias.forward
    bias.forward = lambda lengths, ctx: forward(lengths, ctx).permute(0, 1, 3, 2)


WRONG = (divided_scores, unscaled_head, bias_in_the_first_layer_alone, bias_in_cross_attention,
         one_table_for_both_stacks, causal_buckets_in_the_encoder, no_encoder_norm, mirrored)


@wrong_answers
@pytest.mark.parametrize("spoil", WRONG, ids=lambda f: f.__name__)
def test_a_wrong_model_is_caught(spoil: Callable):
    model = build()
    spoil(model)
    with pytest.raises(AssertionError):
        check_formula(model, build(), reference)


# ── relative positions ───────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("both_sides", [True, False])
def test_the_buckets_follow_the_specification(both_sides):
    distance = np.arange(-40, 41)
    got = relative_buckets(distance, BUCKETS, LONGEST, both_sides=both_sides)
    assert got.tolist() == [bucket(int(d), both_sides=both_sides) for d in distance]
    assert got.min() == 0 and got.max() == BUCKETS - 1


def test_t5s_own_buckets():
    """32 buckets: 8 small distances on each side, and the last bucket from 128 on."""
    got = relative_buckets(np.array([0, -1, -7, -8, -127, -128, -1000, 1, 128]), 32, 128, both_sides=True)
    assert got.tolist() == [0, 1, 7, 8, 15, 15, 15, 17, 31]
    causal = relative_buckets(np.array([5, 0, -15, -16, -128]), 32, 128, both_sides=False)
    assert causal.tolist() == [0, 0, 15, 16, 31]


def test_texts_may_be_longer_than_the_usual_length():
    model = T5(T5Config(**{**SIZES, "positions": 4}))
    assert run(model, [[1] * 9], source_ids=[[2] * 11]).shape == (1, 9, V)


def test_the_table_belongs_to_the_first_layer_and_is_used_once_a_pass():
    model = build()
    names = [name for name in model.named_parameters() if "relative_bias" in name]
    assert names == ["encoder.0.attn.relative_bias.weight", "decoder.0.attn.relative_bias.weight"]
    looked_up = []
    for stack in (model.encoder, model.decoder):
        bias = stack[0].attn.relative_bias
        assert isinstance(bias, RelativeBias)
    embedding = ops.embedding

    def counted(W: Any, ids: Any) -> Any:
        looked_up.append(W.shape)
        return embedding(W, ids)
    t5.ops, real = type("Ops", (), {"embedding": staticmethod(counted)}), t5.ops
    try:
        run(model, [[1, 2]], source_ids=[[3, 4]])
    finally:
        t5.ops = real
    assert looked_up == [(BUCKETS, H)] * 2


# ── the cache, training ──────────────────────────────────────────────────────────────────────────────────────────────
@every_config
@pytest.mark.parametrize("ends", [(6,), (1, 2, 3, 4, 5, 6), (2, 5, 6)], ids=str)
def test_decoding_through_the_cache_equals_one_pass(name, ends):
    model = build(name)
    source_ids, source_mask = pad([source for source, _ in pairs()], left=False)
    ids, mask = pad([text for _, text in pairs()], left=True)
    source = model.encode(source_ids, source_mask)
    for m in (None, mask):
        whole = run(model, ids, mask=m, source=source)
        got = in_chunks(model, ids, m, source, ends)
        real = np.ones_like(mask) if m is None else m
        np.testing.assert_allclose(got[real], whole[real], rtol=0, atol=1e-12)


@every_config
def test_gradients_agree_with_differences_and_recompute_changes_none(name):
    model = build(name)
    source_ids, source_mask = pad([source for source, _ in pairs()], left=False)
    ids, mask = pad([[1, *text] for _, text in pairs()], left=False)
    targets = read_batch({"ids": ids, "mask": mask, "source_ids": source_ids, "source_mask": source_mask})
    gradients = []
    for on in (False, True):
        model.zero_grad()
        with ft.recompute(on):
            loss = compute_loss(model, targets)[1]
        loss.backward()
        gradients.append({n: np.array(host(p.grad)) for n, p in model.named_parameters().items()})
    plain, recomputed = gradients
    assert all(np.array_equal(plain[n], recomputed[n]) for n in plain)
    rng = np.random.default_rng(5)
    for n, p in model.named_parameters().items():
        center, direction = np.array(host(p)), rng.standard_normal(p.shape)
        direction /= np.sqrt((direction * direction).sum())
        h = 1e-5
        losses = []
        for step in (h, -h):
            p.copy_(center + step * direction)
            losses.append(float(host(compute_loss(model, targets)[1])))
        p.copy_(center)
        exact = float((plain[n] * direction).sum())
        assert abs((losses[0] - losses[1]) / (2 * h) - exact) <= 1e-6 * max(abs(exact), 1e-2), n
        assert np.abs(plain[n]).max() > 0


def test_fit_learns_to_copy():
    rng = np.random.default_rng(0)
    source = rng.integers(2, V, (32, 4))
    ids = np.concatenate([np.ones((32, 1), int), source], axis=1)
    batches = [{"ids": ids[i:i + 8], "source_ids": source[i:i + 8]} for i in range(0, 32, 8)]
    model = T5(T5Config(V, width=16, layers=1, heads=2, head_width=8, hidden=32, start=1))
    ft.fit(model, batches, 150, ft.AdamW(1e-2), progress=False)
    assert ft.evaluate(model, batches)["accuracy"] > 0.9


def test_the_initial_values_have_the_sizes_of_the_papers_code():
    model = T5(T5Config(V, width=64, layers=1, heads=4, head_width=32, hidden=128))
    block = model.decoder[0]
    wanted = {block.attn.q: (64 * 32)**-0.5, block.attn.k: 64**-0.5, block.attn.v: 64**-0.5, block.attn.o: 128**-0.5,
              block.mlp.up: 64**-0.5, block.mlp.down: 128**-0.5, model.embed: 1.0}
    for module, std in wanted.items():
        assert abs(host(module.weight).std() / std - 1) < 0.05


@pytest.mark.parametrize("settings, message", [
    ({"buckets": 7}, "even number of buckets"),
    ({"max_distance": 4}, "max_distance above half of it, got 8 and 4"),
    ({"feed_forward": "gelu"}, "feed_forward wants one of"),
    ({"tied": 1}, "tied wants True or False"),
    ({"start": 23}, "start wants a whole number from 0 to 22"),
    ({"head_width": 0}, "head_width wants a whole number >= 1"),
    ({"d_model": 5}, "did you mean 'width'"),
    ({"d_kv": 5}, "did you mean 'head_width'"),
])
def test_a_configuration_of_no_model_is_refused(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        T5Config(**{**SIZES, **settings})


def test_labels_on_the_device():
    model = build()
    loss = ops.cross_entropy(model([[1, 2]], source_ids=[[3]]), dev(np.array([2, 3])))
    assert np.isfinite(float(host(loss)))

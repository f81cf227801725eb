"""The encoder-decoder of 2017, beside its formula written out for one row at a time; its cache, masks and training."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from encoder_decoders import V, check_formula, in_chunks, pad, pairs, run
from helpers import dev, gradcheck, host, wrong_answers

import tinyft as ft
from tinyft import Cache, Context, Seq2Seq, Seq2SeqConfig, ops
from tinyft.models.attention import Attention
from tinyft.models.seq2seq import SinusoidalPositions
from tinyft.nn import TiedHead
from tinyft.tensor import Tensor
from tinyft.train.batch import compute_loss, is_causal, read_batch

P, C, H, F = 16, 12, 3, 20
CONFIGS = {
    "relu": Seq2SeqConfig(V, P, C, 2, H, F, start=1),
    "marian": Seq2SeqConfig(V, P, C, 2, H, F, decoder_layers=1, decoder_heads=2, decoder_hidden=10, activation="silu"),
    "unscaled": Seq2SeqConfig(V, P, C, 1, H, F, decoder_layers=3, activation="gelu", scaled=False),
}
every_config = pytest.mark.parametrize("name", CONFIGS)


def build(name: str = "relu", seed: int = 0) -> Seq2Seq:
    """A model in float64 at a generic point."""
    model = Seq2Seq(CONFIGS[name], seed)
    rng = np.random.default_rng(seed + 50)
    for p in model.parameters():
        p.copy_(host(p) + rng.standard_normal(p.shape) * (0.3 if p.ndim > 1 else 0.1))
    return model.to(dtype=np.float64).eval()


# ── the formula, for one row ─────────────────────────────────────────────────────────────────────────────────────────
def norm(x: np.ndarray, w: dict, name: str) -> np.ndarray:
    z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return z * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: np.ndarray, w: dict, name: str) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def attend(x: np.ndarray, source: np.ndarray, w: dict, name: str, heads: int, *, causal: bool) -> np.ndarray:
    """Attention of the rows x (T, C) to the rows source (Ts, C), head by head."""
    q, k, v = linear(x, w, f"{name}.q"), linear(source, w, f"{name}.k"), linear(source, w, f"{name}.v")
    D = C // heads
    out = []
    for h in range(heads):
        part = slice(h * D, (h + 1) * D)
        s = q[:, part] @ k[:, part].T / math.sqrt(D)
        if causal:
            s = np.where(np.tri(len(x), len(source), dtype=bool), s, -np.inf)
        p = np.exp(s - s.max(-1, keepdims=True))
        out.append(p / p.sum(-1, keepdims=True) @ v[:, part])
    return linear(np.concatenate(out, -1), w, f"{name}.o")


def feed_forward(x: np.ndarray, w: dict, name: str, activation: str) -> np.ndarray:
    up = linear(x, w, f"{name}.up")
    phi = np.vectorize(lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2))))
    hidden = {"relu": lambda u: np.maximum(u, 0), "silu": lambda u: u / (1 + np.exp(-u)), "gelu": lambda u: u * phi(u)}
    return linear(hidden[activation](up), w, f"{name}.down")


def embed(ids: list[int], w: dict, c: Seq2SeqConfig) -> np.ndarray:
    x = w["embed.weight"][ids] * (math.sqrt(C) if c.scaled else 1)
    for p in range(len(ids)):
        for i in range(C // 2):
            angle = p / 10000 ** (2 * i / C)
            x[p, i] += np.float32(math.sin(angle))
            x[p, i + C // 2] += np.float32(math.cos(angle))
    return x


def reference(model: Seq2Seq, source: list[int], text: list[int]) -> np.ndarray:
    """The logits (T, V) of one source and one text."""
    c = model.config
    w = {name: host(p) for name, p in model.named_parameters().items()}
    x = embed(source, w, c)
    for i in range(c.layers):
        block = f"encoder.{i}"
        x = norm(x + attend(x, x, w, f"{block}.attn", c.heads, causal=False), w, f"{block}.norm1")
        x = norm(x + feed_forward(x, w, f"{block}.mlp", c.activation), w, f"{block}.norm2")
    seen = x
    x = embed(text, w, c)
    heads = c.decoder_heads or c.heads
    for i in range(c.decoder_layers or c.layers):
        block = f"decoder.{i}"
        x = norm(x + attend(x, x, w, f"{block}.attn", heads, causal=True), w, f"{block}.norm1")
        x = norm(x + attend(x, seen, w, f"{block}.cross_attn", heads, causal=False), w, f"{block}.norm2")
        x = norm(x + feed_forward(x, w, f"{block}.mlp", c.activation), w, f"{block}.norm3")
    return x @ w["embed.weight"].T + w["head.bias"]


@every_config
def test_the_model_computes_the_formula(name):
    check_formula(build(name), build(name), reference)


# ── wrong models ─────────────────────────────────────────────────────────────────────────────────────────────────────
def no_source_mask(model: Seq2Seq) -> None:
    def run_encoder(ids: Any, ctx: Context) -> None:
        Seq2Seq.run_encoder(model, ids, ctx)
        ctx.mask = None
    model.run_encoder = run_encoder


def positions_by_column(model: Seq2Seq) -> None:
    class Columns(SinusoidalPositions):
        def forward(self, x: Tensor, ctx: Context) -> Tensor:
            return x + Tensor(self.table[:x.shape[1]])
    model.pos = Columns(P, C)


def unscaled(model: Seq2Seq) -> None:
    c = vars(model.config) | {"scaled": False}
    model._config = Seq2SeqConfig(**c)


def interleaved(model: Seq2Seq) -> None:
    """sin and cos in turn, as the paper writes them; Marian's files have two halves."""
    table = host(model.pos.table)
    model.pos.table = dev(np.stack([table[:, :C // 2], table[:, C // 2:]], -1).reshape(P, C))


def causal_encoder(model: Seq2Seq) -> None:
    for block in model.encoder:
        block.attn.causal = True


def sees_the_future(model: Seq2Seq) -> None:
    for block in model.decoder:
        block.attn.causal = False


def cross_before_self(model: Seq2Seq) -> None:
    for block in model.decoder:
        block.attn, block.cross_attn = block.cross_attn, block.attn


def no_head_bias(model: Seq2Seq) -> None:
    model.head = TiedHead(model.embed)


def skips_a_norm(model: Seq2Seq) -> None:
    for block in model.decoder:
        block.norm3 = block.norm2


WRONG = (no_source_mask, positions_by_column, unscaled, interleaved, causal_encoder, sees_the_future,
         cross_before_self, no_head_bias, skips_a_norm)


@wrong_answers
@pytest.mark.parametrize("spoil", WRONG, ids=lambda f: f.__name__)
def test_a_wrong_model_is_caught(spoil: Callable):
    model = build()
    spoil(model)
    with pytest.raises(AssertionError):
        check_formula(model, build(), reference)


# ── the cache ────────────────────────────────────────────────────────────────────────────────────────────────────────
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


def test_the_keys_of_the_source_are_computed_once():
    model = build()
    counts = {"k": 0, "encoder": 0}

    def counted(name: str, forward: Callable) -> Callable:
        def call(x: Any, ctx: Context) -> Any:
            counts[name] += 1
            return forward(x, ctx)
        return call
    for block in model.decoder:
        block.cross_attn.k.forward = counted("k", block.cross_attn.k.forward)
    model.encoder[0].forward = counted("encoder", model.encoder[0].forward)
    source = model.encode(np.array([[3, 4, 5]]))
    ids = np.array([[1, 2, 3, 4]])
    in_chunks(model, ids, None, source, (1, 2, 3, 4))
    assert counts == {"k": len(model.decoder), "encoder": 1}


def test_a_cache_whose_rows_change_places_gives_the_rows_of_the_new_order():
    model = build()
    source_ids, source_mask = pad([source for source, _ in pairs()], left=False)
    ids = np.arange(16).reshape(4, 4)
    source = model.encode(source_ids, source_mask)
    cache = Cache()
    run(model, ids[:, :2], source=source, cache=cache)
    index = np.array([2, 2, 0, 3, 1])
    got = run(model, ids[index, 2:], source=source.rows(dev(index)), cache=cache.rows(dev(index)))
    whole = run(model, ids, source=source)[index, 2:]
    np.testing.assert_allclose(got, whole, rtol=0, atol=1e-12)
    swapped = np.array([1, 0, 2, 3])
    wrong = run(model, ids[swapped, 2:], source=source.rows(dev(swapped)), cache=cache.reordered(dev(swapped)))
    assert np.abs(wrong - run(model, ids, source=source)[swapped, 2:]).max() > 1e-3    # its sources stay in place


# ── what depends on what ─────────────────────────────────────────────────────────────────────────────────────────────
def test_later_tokens_change_no_logits_and_every_source_token_changes_all():
    model = build()
    ids, source = np.array([[1, 5, 6, 7, 8]]), np.array([[3, 4, 5]])
    base = run(model, ids, source_ids=source)
    for t in range(5):
        other = ids.copy()
        other[0, t] = 20
        assert np.array_equal(run(model, other, source_ids=source)[0, :t], base[0, :t])
        assert np.abs(run(model, other, source_ids=source)[0, t:] - base[0, t:]).min(axis=1).max() > 0
    for t in range(3):
        other = source.copy()
        other[0, t] = 20
        assert (np.abs(run(model, ids, source_ids=other) - base).max(axis=-1) > 1e-6).all()


def test_padding_of_source_and_text_changes_nothing_bitwise():
    model = build()
    source_ids, source_mask = pad([source for source, _ in pairs()], left=False)
    ids, mask = pad([text for _, text in pairs()], left=False)
    one = run(model, ids, mask=mask, source_ids=source_ids, source_mask=source_mask)
    other = run(model, np.where(mask, ids, 20), mask=mask, source_ids=np.where(source_mask, source_ids, 0),
                source_mask=source_mask)
    assert np.array_equal(one[mask], other[mask])


def test_the_same_source_in_three_forms():
    model = build()
    source_ids, source_mask = pad([source for source, _ in pairs()], left=False)
    ids = np.arange(8).reshape(4, 2)
    want = run(model, ids, source_ids=source_ids, source_mask=source_mask)
    assert np.array_equal(run(model, ids, source=model.encode(source_ids, source_mask)), want)
    assert np.array_equal(run(model, ids, source=Context(source_ids, source_mask)), want)
    embedded = Tensor(model.embed.weight.data[dev(source_ids)])
    np.testing.assert_allclose(run(model, ids, source=model.encode(embedded, source_mask)), want, atol=1e-12)


def test_the_context_of_a_pass_has_the_encoders_and_again_runs_both():
    model = build()
    ctx = Context(source_ids=[[3, 4, 5]], output_hidden_states=True)
    y = host(model([[1, 2]], ctx))
    assert [h.shape for h in ctx.hidden_states] == [(1, 2, C)] * 3
    assert [h.shape for h in ctx.source.hidden_states] == [(1, 3, C)] * 3
    assert ctx.losses is ctx.source.losses
    other = build(seed=1)
    again = ctx.again()
    assert again.source is None
    assert np.array_equal(host(other([[1, 2]], again)), run(other, [[1, 2]], source_ids=[[3, 4, 5]]))
    kept = Context(source=model.encode([[3, 4, 5]]))
    assert np.array_equal(host(model([[1, 2]], kept)), y)
    assert np.array_equal(host(other([[1, 2]], kept.again())), run(other, [[1, 2]], source_ids=[[3, 4, 5]]))


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def batch(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    source_ids, source_mask = pad([source for source, _ in pairs(seed)], left=False)
    ids, mask = pad([[1, *text] for _, text in pairs(seed)], left=False)
    return {"ids": ids, "mask": mask, "source_ids": source_ids, "source_mask": source_mask,
            "task": rng.integers(0, 2, 4)}


def test_the_loss_is_that_of_teacher_forcing():
    """The mean of − log p(yₜ | start y₁ … yₜ₋₁, source) over all real targets."""
    model = build()
    _, loss = compute_loss(model, read_batch(batch()))
    terms = []
    for source, text in pairs(0):
        logits = reference(model, source, [1, *text][:-1])
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        terms += [-log_p[t, y] for t, y in enumerate(text)]
    assert abs(float(host(loss)) - np.mean(terms)) < 1e-12
    labelled = batch()
    labels = np.where(labelled["mask"][:, 1:], labelled["ids"][:, 1:], -100)
    labelled |= {"ids": labelled["ids"][:, :-1], "mask": labelled["mask"][:, :-1], "labels": labels}
    assert float(host(compute_loss(model, read_batch(labelled))[1])) == float(host(loss))


def test_gradients_reach_every_parameter_and_agree_with_differences():
    model = build()
    names = list(model.named_parameters())
    rng = np.random.default_rng(8)
    targets = read_batch(batch())

    def loss(*values: Tensor) -> Tensor:
        for p, value in zip(model.parameters(), before, strict=True):
            p.copy_(value)
        for (path, name), value in zip(places, values, strict=True):
            setattr(path, name, value)
        return compute_loss(model, targets)[1]
    before = [np.array(host(p)) for p in model.parameters()]
    places = []
    for name in names:
        path, _, last = name.rpartition(".")
        places.append((dict(model.named_modules())[path], last))
    originals = [getattr(module, name) for module, name in places]
    gradcheck(loss, before, rng, tol=1e-6)
    for (module, name), p in zip(places, originals, strict=True):
        setattr(module, name, p)
    model.zero_grad()
    compute_loss(model, targets)[1].backward()
    assert all(np.abs(host(p.grad)).max() > 0 for name, p in model.named_parameters().items() if "attn.k.b" not in name)


def test_the_gradient_of_the_shared_embedding_is_the_sum_of_its_three_uses():
    model = build()
    ids, source = np.array([[1, 2, 3]]), np.array([[4, 5]])
    labels = dev(np.array([2, 3, 4]))

    def gradient(uses: tuple[str, ...]) -> np.ndarray:
        """That of the embedding if only these uses are recorded."""
        model.zero_grad()
        E = model.embed.weight
        frozen = Tensor(E.data)

        def part(name: str) -> Tensor:
            return E if name in uses else frozen
        source_ctx = Context(mask=None)
        model.run_encoder(ops.embedding(part("source"), dev(source)), source_ctx)
        ctx = Context(source=source_ctx)
        model.head = None
        hidden = model(ops.embedding(part("text"), dev(ids)), ctx)
        logits = ops.linear(hidden, part("head"), Tensor(head.bias.data))
        ops.cross_entropy(logits, labels).backward()
        model.head = head
        return host(E.grad)
    head = model.head
    parts = sum(gradient((name,)) for name in ("source", "text", "head"))
    model.zero_grad()
    ops.cross_entropy(model(ids, source_ids=source), labels).backward()
    np.testing.assert_allclose(host(model.embed.weight.grad), parts, rtol=0, atol=1e-13)


def test_fit_learns_to_copy_and_accumulation_and_recompute_change_nothing():
    rng = np.random.default_rng(0)
    source = rng.integers(2, V, (32, 5))
    ids = np.concatenate([np.ones((32, 1), int), source], axis=1)
    batches = [{"ids": ids[i:i + 8], "source_ids": source[i:i + 8]} for i in range(0, 32, 8)]
    ends = {}
    for settings in ({}, {"accumulate": 2}, {"recompute": True}):
        model = Seq2Seq(Seq2SeqConfig(V, P, 16, 1, 2, 32, start=1, std=0.1))
        ft.fit(model, batches, 4, ft.AdamW(3e-3), progress=False, **settings)
        ends[str(settings)] = host(model.embed.weight)
    plain, accumulated, recomputed = ends.values()
    assert np.array_equal(plain, recomputed) and not np.array_equal(plain, accumulated)
    ft.fit(model, batches, 150, ft.AdamW(1e-2), progress=False)
    assert ft.evaluate(model, batches)["accuracy"] > 0.9
    assert is_causal(model)


def test_labels_that_are_the_ids_themselves_are_refused():
    model = build()
    b = batch()
    with pytest.raises(ValueError, match="the id that follows"):
        ft.evaluate(model, [b | {"labels": np.where(b["mask"], b["ids"], -100)}])


def test_dropout_acts_in_both_stacks_only_while_training():
    model = Seq2Seq(Seq2SeqConfig(V, P, C, 1, H, F, dropout=0.5))
    ids, source = [[1, 2, 3]], [[4, 5, 6]]
    y = run(model, ids, source_ids=source)
    assert np.array_equal(run(model, ids, source_ids=source, rng=np.random.default_rng(0)), y)
    model.train()
    ctx = Context(source_ids=source, rng=np.random.default_rng(0))
    assert not np.array_equal(host(model(ids, ctx)), y)
    assert not np.array_equal(host(ctx.source.output), host(model.eval().encode(source).output))


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────
IDS = np.array([[1, 2], [3, 4]])
SOURCE = np.array([[1, 2, 3], [3, 4, 5]])
BAD: dict[str, tuple[dict, str]] = {
    "no source": ({}, "wants a source with one token or more in each row, got none"),
    "no columns": ({"source_ids": np.zeros((2, 0), int)}, r"one token or more in each row, got shape \(2, 0\)"),
    "an empty row": ({"source_ids": SOURCE, "source_mask": [[1, 1, 0], [0, 0, 0]]}, "got an empty one in row 1"),
    "a mask of another shape": ({"source_ids": SOURCE, "source_mask": [[1, 1], [1, 1]]},
                                r"source_mask has shape \(2, 2\), source_ids \(2, 3\)"),
    "too long": ({"source_ids": np.zeros((2, P + 1), int)}, "17 tokens is longer than the model's 16 positions"),
    "other rows": ({"source_ids": SOURCE[:1]}, "one row of source for each row of ids, got 1 and 2"),
    "outside": ({"source_ids": SOURCE + 20}, "outside the vocabulary of 23"),
    "floats": ({"source_ids": SOURCE + 0.5}, "token ids are integers"),
    "two forms": ({"source_ids": SOURCE, "source": Context()}, "got both"),
    "a context without ids": ({"source": Context()}, "got a Context without ids"),
    "a mask of the text": ({"source_ids": SOURCE, "mask": [[1, 1, 1], [1, 1, 1]]}, "mask has shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_source_is_refused_in_one_sentence(name):
    facts, message = BAD[name]
    with pytest.raises((ValueError, TypeError, IndexError), match=message) as error:
        build()(IDS, **facts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keyword", ["encoder_outputs", "attention_mask", "decoder_input_ids", "encoder_input_ids"])
def test_keywords_of_other_libraries_are_refused_with_the_near_one(keyword):
    with pytest.raises(TypeError, match="source|mask"):
        build()(IDS, **{keyword: SOURCE})


@pytest.mark.parametrize("b, message", [
    ({"ids": IDS, "source_ids": SOURCE[:1]}, "one row for each of its 2 rows, got"),
    ({"ids": IDS, "source_mask": SOURCE > 0}, "source_ids of shape .* beside source_mask, got none"),
    ({"ids": IDS, "source_ids": SOURCE, "source_mask": SOURCE > 3}, "empty one in row 0"),
    ({"ids": IDS, "source_ids": SOURCE, "source_mask": IDS > 0}, "both want one entry per token"),
    ({"decoder_input_ids": IDS}, "wants the key 'ids', got 'decoder_input_ids'"),
])
def test_a_bad_batch_is_refused_in_one_sentence(b, message):
    with pytest.raises(ValueError, match=message):
        read_batch(b)


@pytest.mark.parametrize("settings, message", [
    ({"width": 13, "heads": 13}, "even width, got 13"),
    ({"decoder_heads": 5}, "5 heads do not divide a width of 12"),
    ({"start": 23}, "start wants a whole number from 0 to 22, got 23"),
    ({"activation": "tanh"}, "activation wants one of"),
    ({"decoder_layers": 0}, "decoder_layers wants a whole number >= 1, got 0"),
    ({"num_decoder_layers": 2}, "did you mean 'decoder_layers'"),
])
def test_a_configuration_of_no_model_is_refused(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Seq2SeqConfig(**{"vocab": V, "positions": P, "width": C, "layers": 1, "heads": H} | settings)


def test_without_its_size_the_feed_forward_has_four_times_the_width():
    for settings, expected in (({}, (48, 48)), ({"hidden": 10}, (10, 10)), ({"decoder_hidden": 10}, (48, 10))):
        model = ft.Seq2Seq(Seq2SeqConfig(V, P, 12, 1, 3, **settings))
        sizes = tuple(block.mlp.up.weight.shape[0] for block in (model.encoder[0], model.decoder[0]))
        assert sizes == expected


def test_the_sinusoids_follow_the_model_and_are_not_saved():
    model = Seq2Seq(CONFIGS["relu"])
    assert "pos.table" not in model.state_dict() and "pos.table" in model.named_buffers()
    assert model.to(dtype="float64").pos.table.dtype == np.float64
    half = Seq2Seq(CONFIGS["relu"])
    for p in half.parameters():
        p.data = p.data.astype(np.float16)
    assert half([[1]], source_ids=[[2]]).dtype == np.float16
    assert sum(isinstance(m, Attention) for m in model.modules()) == 6

"""GPT and BERT, and their blocks, against the same formulas in plain NumPy: head by head, query by query, in float64.

Every weight is a generic number, gains, shifts and biases too, so that every term of a formula shows in the result. The
checks take the function that they check, so that wrong models (WRONG, WRONG_NOISE, WRONG_ROWS) can be given to them.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from helpers import dev, host, wrong_answers
from wrong import replaced

from tinyft import (
    BERT,
    GPT,
    BERTConfig,
    Cache,
    Context,
    GPTConfig,
    LoRA,
    Tensor,
    array,
    attach,
    detach,
    dispatch,
    no_grad,
    ops,
)
from tinyft.models import attention, blocks
from tinyft.models.attention import KV, Attention
from tinyft.models.blocks import MLP, Classifier, PostNormBlock, PreNormBlock, sinusoids
from tinyft.nn import Dropout, LayerNorm

KINDS = ("gpt", "bert", "gpt-classes", "bert-classes", "bert-bare")
V, P, S = 11, 9, 3                                       # vocabulary, positions, token types
C, L, H, F = 12, 2, 3, 10                                # width, layers, heads, feed-forward width
K = 4                                                    # classes
EPS = 0.1                                                                        # large, so that it is seen
every = pytest.mark.parametrize("kind", KINDS)


def new(kind: str, seed: int = 0, **more: Any) -> Any:
    """As it is made."""
    if kind.startswith("gpt"):
        model = GPT(GPTConfig(V, P, C, L, H, F, eps=EPS, **more), seed)
    else:
        head = None if kind == "bert-bare" else "mlm"
        model = BERT(BERTConfig(V, P, S, C, L, H, F, eps=EPS, **more), seed, head=head)
    if kind.endswith("classes"):
        model.new_head(K, np.random.default_rng(seed + 1))
    return model


def generic(kind: str, **more: Any) -> Any:
    """In float64, every number of it drawn anew."""
    model, rng = new(kind, **more).to(dtype=np.float64), np.random.default_rng(7)
    for p in model.parameters():
        p.copy_(rng.standard_normal(p.shape) * (0.6 if p.ndim > 1 else 1.0))
    return model.eval()


def batch(seed: int = 3, B: int = 3, T: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, V, (B, T)), rng.integers(0, S, (B, T))


RIGHT = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0]], bool)      # a hole in the last row
LEFT = RIGHT[:, ::-1]


# ── the mathematics ──────────────────────────────────────────────────────────────────────────────────────────────────
def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


class Reference:
    """w: the weights by name;  drop: dropout's factors, in the order in which they act."""

    def __init__(self, kind: str, w: dict[str, np.ndarray], drop: Iterator = itertools.repeat(1.0)):
        self.gpt = kind.startswith("gpt")
        self.classes = kind.endswith("classes")
        self.bare = kind.endswith("bare")
        self.w = w
        self.drop = drop

    def linear(self, at: str, x: np.ndarray) -> np.ndarray:
        return x @ self.w[f"{at}.weight"].T + self.w.get(f"{at}.bias", 0.0)

    def norm(self, at: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + EPS)
        return self.w[f"{at}.weight"] * centred / deviation + self.w[f"{at}.bias"]

    def attend(self, at: str, x: np.ndarray, real: np.ndarray) -> np.ndarray:
        q, k, v = (self.linear(f"{at}.{n}", x) for n in "qkv")
        B, T, D = *x.shape[:2], C // H
        y, keep = np.zeros_like(x), np.broadcast_to(next(self.drop), (B, H, T, T))
        for b, h, i in np.ndindex(B, H, T):
            own = slice(h * D, (h + 1) * D)
            seen = [j for j in range(i + 1 if self.gpt else T) if real[b, j]]
            if seen:
                p = np.exp([q[b, i, own] @ k[b, j, own] / math.sqrt(D) for j in seen])
                y[b, i, own] = sum(n * keep[b, h, i, j] * v[b, j, own] for n, j in zip(p / p.sum(), seen))
        return self.linear(f"{at}.o", y) * next(self.drop)

    def mlp(self, at: str, x: np.ndarray) -> np.ndarray:
        activation = gelu_tanh if self.gpt else gelu
        return self.linear(f"{at}.down", activation(self.linear(f"{at}.up", x))) * next(self.drop)

    def __call__(
        self, ids: np.ndarray, types: np.ndarray | None = None, mask: np.ndarray | None = None
    ) -> dict[str, Any]:
        w, real = self.w, np.ones(ids.shape, bool) if mask is None else mask
        places = np.maximum(np.cumsum(real, 1) - 1, 0)
        x = w["embed.weight"][ids] + w["pos.weight"][places]
        if not self.gpt:
            x = self.norm("norm0", x + w["type.weight"][ids * 0 if types is None else types])
        x, layers = x * next(self.drop), []
        for i in range(L):
            layers.append(x)
            b = f"blocks.{i}"
            if self.gpt:
                x = x + self.attend(f"{b}.attn", self.norm(f"{b}.norm1", x), real)
                x = x + self.mlp(f"{b}.mlp", self.norm(f"{b}.norm2", x))
            else:
                x = self.norm(f"{b}.norm1", x + self.attend(f"{b}.attn", x, real))
                x = self.norm(f"{b}.norm2", x + self.mlp(f"{b}.mlp", x))
        hidden = self.norm("norm", x) if self.gpt else x
        return {"hidden": hidden, "layers": [*layers, hidden], "out": self.head(hidden, real)}

    def head(self, x: np.ndarray, real: np.ndarray) -> np.ndarray:
        E = self.w["embed.weight"]
        if self.bare:
            return x
        if self.classes and self.gpt:
            return self.linear("head.out", np.stack([row[np.flatnonzero(r)[-1]] for row, r in zip(x, real)]))
        if self.classes:
            return self.linear("head.out", np.tanh(self.linear("pooler.dense", x[:, 0])) * next(self.drop))
        if self.gpt:
            return x @ E.T
        return self.norm("head.norm", gelu(self.linear("head.dense", x))) @ E.T + self.w["head.decoder.bias"]


def weights(model: Any) -> dict[str, np.ndarray]:
    return {n: host(p) for n, p in model.named_parameters().items()}


def near(got: Any, want: np.ndarray) -> None:
    assert host(got).shape == want.shape
    np.testing.assert_allclose(host(got), want, rtol=0, atol=1e-11 * np.abs(want).max())


def check_model(kind: str, wrong: Callable | None = None) -> None:
    """Logits, class scores and all hidden states, with and without padding.

    wrong: a context manager in which the model is wrong."""
    model, (ids, types) = generic(kind), batch()
    with wrong(model) if wrong else contextmanager(lambda: (yield))():
        for mask in (None, RIGHT, *([LEFT] if model.blocks[0].attn.causal or not kind.endswith("classes") else [])):
            for t in (None, types) if kind.startswith("bert") else (None,):
                ctx = Context(mask=mask, token_type_ids=t, output_hidden_states=True)
                out, want = model(ids, ctx), Reference(kind, weights(model))(ids, t, mask)
                real = np.ones(ids.shape, bool) if mask is None else mask
                near(host(ctx.last_hidden_state)[real], want["hidden"][real])
                assert ctx.output is out and len(ctx.hidden_states) == L + 1
                for got, layer in zip(ctx.hidden_states, want["layers"]):
                    near(host(got)[real], layer[real])
                near(*((host(out), want["out"]) if kind.endswith("classes") else (host(out)[real], want["out"][real])))


@every
def test_a_model_is_its_formula(kind):
    check_model(kind)


def _other_norm(self: Any, x: Any, ctx: Any) -> Any:
    x = self.norm1(x, ctx)
    x = self.norm2(x + self.attn(x, ctx), ctx)
    return x + self.mlp(x, ctx)


def _interleaved(x: Any, heads: int) -> Any:
    B, T, width = x.shape
    return x.reshape(B, T, width // heads, heads).permute(0, 3, 1, 2)


def _without_types(self: Any, ids: Any, like: Any, begin: Callable = Context.begin) -> None:
    begin(self, ids, like)
    self.token_type_ids = None


def _places_in_the_row(self: Any) -> Any:
    return dev(np.arange(self.ids.shape[1]))[None]


def _same_keys_and_values(self: Any, kv: Any, ctx: Any) -> Any:
    k, _, key_mask = kv
    return k, k, key_mask


def _last_column(self: Any, x: Any, ctx: Any) -> Any:
    return x[:, -1]


def _mean_of_the_row(self: Any, x: Any, ctx: Any) -> Any:
    return x.mean(axis=1)


def _identity(self: Any, x: Any, ctx: Any) -> Any:
    return x


def _no_mask(self: Any) -> None:
    return None


def _one_block_looks_both_ways(model: Any) -> Any:
    return replaced(model.blocks[1].attn, "causal", f=False)


def _one_block_looks_back(model: Any) -> Any:
    return replaced(model.blocks[1].attn, "causal", f=True)


WRONG = {
    "Where the norm stands makes no difference.":
        ("bert", lambda m: replaced(PostNormBlock, "forward", PreNormBlock.forward)),
    "Where it stands makes none in a GPT either.":
        ("gpt", lambda m: replaced(PreNormBlock, "forward", PostNormBlock.forward)),
    "The sum goes on from what the norm gave.": ("gpt", lambda m: replaced(PreNormBlock, "forward", _other_norm)),
    "Heads take turns among the features.": ("bert", lambda m: replaced(attention, "split_heads", _interleaved)),
    "GELU is GELU.": ("gpt", lambda m: replaced(m.blocks[1].mlp, "_activation", ops.gelu)),
    "GELU is GELU in BERT as well.": ("bert", lambda m: replaced(m.blocks[0].mlp, "_activation", ops.gelu_tanh)),
    "A position is a column, padded or not.": ("gpt", lambda m: replaced(Context, "positions", _places_in_the_row)),
    "Padding is a token like any other.": ("bert", lambda m: replaced(Context, "key_mask", _no_mask)),
    "Token types are for pairs; leave them out.": ("bert", lambda m: replaced(Context, "begin", _without_types)),
    "ε is too small to matter.": ("gpt", lambda m: replaced(m.norm, "eps", 1e-5)),
    "One block may look both ways.": ("gpt", _one_block_looks_both_ways),
    "BERT reads from the left.": ("bert", _one_block_looks_back),
    "Keys and values are the same thing.": ("gpt", lambda m: replaced(KV, "forward", _same_keys_and_values)),
    "The class is read off the last column.": ("gpt-classes", lambda m: replaced(Classifier, "row", _last_column)),
    "The class is read off the mean.": ("bert-classes", lambda m: replaced(Classifier, "row", _mean_of_the_row)),
    "BERT's classifier needs no pooler.": ("bert-classes", lambda m: replaced(type(m.pooler), "forward", _identity)),
    "The tied head needs no bias of its own.": ("bert", lambda m: replaced(m.head.decoder, "bias", None)),
}


@wrong_answers
@pytest.mark.parametrize("belief", WRONG)
@pytest.mark.usefixtures("definitions")                  # a kernel would do what the wrong part does not
def test_a_wrong_model_is_caught(belief):
    kind, wrong = WRONG[belief]
    reference = Reference.__call__
    right = weights(generic(kind))

    def of_the_right_weights(self: Reference, *facts: Any) -> dict[str, Any]:
        return reference(Reference(kind, right), *facts)
    with replaced(Reference, "__call__", of_the_right_weights), pytest.raises(AssertionError):
        check_model(kind, wrong)


# ── dropout ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@every
def test_dropout_acts_on_the_embeddings_the_probabilities_and_what_enters_the_residual_stream(kind):
    """Each factor is written down as it acts; the formula with these factors is the model."""
    model, (ids, types), factors, where = generic(kind, dropout=0.4).train(), batch(), [], []
    with no_grad():                                                              # no generator, or not training: none
        near(model.eval()(ids, rng=np.random.default_rng(0)), host(model.train()(ids)))
    paths, types = {id(m): n for n, m in model.named_modules()}, types if kind.startswith("bert") else None
    forward, draw = Dropout.forward, Attention.dropout_mask

    def noted(self: Any, x: Any, ctx: Any) -> Any:
        y = forward(self, x, ctx)
        factors.append(host(y) / host(x))
        where.append(paths[id(self)])
        return y

    def noted_noise(self: Any, *a: Any) -> Any:
        keep = draw(self, *a)
        factors.append(host(keep))
        where.append(paths[id(self)])
        return keep
    with replaced(Dropout, "forward", noted), replaced(Attention, "dropout_mask", noted_noise):
        out = model(ids, token_type_ids=types, mask=RIGHT, rng=np.random.default_rng(0))
    in_block = [f"blocks.{i}.{n}" for i in range(L) for n in ("attn", "attn.drop", "mlp.drop")]
    assert where == ["drop", *in_block, *(["head.drop"] if kind.endswith("classes") else [])]
    used = [f for f, n in zip(factors, where) if (kind, n) != ("gpt-classes", "head.drop")]     # GPT's classifier: none
    assert all((f == 0).any() and np.allclose(f[f != 0], 1 / 0.6) for f in used)
    assert all((f == 1).all() for f in factors[len(used):])
    want = Reference(kind, weights(model), iter(used))(ids, types, RIGHT)["out"]
    near(*((host(out), want) if kind.endswith("classes") else (host(out)[RIGHT], want[RIGHT])))


def check_noise(noise: Callable) -> None:
    """Factors 0 and 1/(1 − p), 0 with probability p, drawn independently, of the probabilities' shape and dtype."""
    attn = Attention(C, H, rng=np.random.default_rng(0), causal=True, dropout=0.25)
    for dtype in (np.float32, np.float64):
        q, k = (Tensor(dev(np.zeros((5, H, t, 4)), dtype)) for t in (30, 40))
        f = host(noise(attn, q, k, 11))
        assert f.shape == (5, H, 30, 40) and f.dtype == dtype
        assert set(np.unique(f)) == {0, dtype(1) / dtype(0.75)}
        for axes in ((1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):    # every row, head, query and key loses its share
            share, n = (f == 0).mean(axes), f.size / f.shape[({0, 1, 2, 3} - set(axes)).pop()]
            assert np.abs(share - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / n)
        for axis in range(4):
            assert not np.array_equal(np.take(f, 0, axis), np.take(f, 1, axis))
    assert np.array_equal(f, host(noise(attn, q, k, 11))) and not np.array_equal(f, host(noise(attn, q, k, 12)))


def uniform(q: Any, k: Any, key: int, *cut: Any) -> np.ndarray:
    return host(array.uniform_like(np.zeros((*q.shape[:-1], k.shape[-2]))[cut], key))


def no_factor(attention, q, k, key):
    return (uniform(q, k, key) >= 0.25).astype(q.dtype)


def keeps_the_share_to_drop(attention, q, k, key):
    return (uniform(q, k, key) < 0.25).astype(q.dtype) / q.dtype.type(0.75)


def same_for_all_heads(attention, q, k, key):
    kept = uniform(q, k, key, slice(None), slice(0, 1)) >= 0.25
    return np.repeat(kept.astype(q.dtype), H, 1) / q.dtype.type(0.75)


def whole_rows(attention, q, k, key):
    kept = uniform(q, k, key, ..., slice(0, 1)) >= 0.25
    return np.repeat(kept.astype(q.dtype), 40, 3) / q.dtype.type(0.75)


def any_dtype(attention, q, k, key):
    return (uniform(q, k, key) >= 0.25) / 0.75


def one_key(attention, q, k, key):
    return (uniform(q, k, 0) >= 0.25).astype(q.dtype) / q.dtype.type(0.75)


WRONG_NOISE = {
    "Dropout sets probabilities to zero. That is all.": no_factor,
    "p is the share that is kept.": keeps_the_share_to_drop,
    "A key is dropped for all heads at once.": same_for_all_heads,
    "A query's row is dropped whole.": whole_rows,
    "The dtype takes care of itself.": any_dtype,
    "Noise is noise, whatever the key.": one_key,
}


def test_attentions_noise_thins_the_probabilities_and_keeps_their_mean():
    check_noise(Attention.dropout_mask)


@wrong_answers
@pytest.mark.parametrize("belief", WRONG_NOISE)
def test_wrong_noise_is_caught(belief):
    with pytest.raises(AssertionError):
        check_noise(WRONG_NOISE[belief])


def test_noise_keeps_what_lies_on_the_line(monkeypatch):
    """u >= p is kept, as in ops.dropout: u = p has probability 2^−24, but the two must be one."""
    monkeypatch.setattr(array, "uniform_like", lambda like, key: dev(np.full(like.shape, 0.25, np.float32)))
    q = Tensor(dev(np.zeros((1, H, 2, 4))))
    attention = Attention(C, H, rng=np.random.default_rng(0), causal=True, dropout=0.25)
    assert (host(attention.dropout_mask(q, q, 0)) == 1 / 0.75).all()


# ── parts ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def check_rows(row: Callable) -> None:
    x = Tensor(dev(np.arange(40.0).reshape(2, 5, 4)))
    def read(mask: Any, *, last: bool) -> list[float]:
        classifier = Classifier(4, 2, rng=np.random.default_rng(0), last=last)
        ctx = Context(mask=None if mask is None else dev(np.array(mask, bool)))
        return (host(row(classifier, x, ctx))[:, 0] / 4).tolist()
    cases = [
        (None, [0, 5], [4, 9]),
        ([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0]], [0, 5], [2, 8]),
        ([[0, 0, 1, 1, 1], [1, 0, 0, 0, 0]], [2, 5], [4, 5]),
        ([[1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 0, 1, 0]], [0, 6], [2, 8]),       # two rows of a soft prompt, gone from x
    ]
    for mask, first, last in cases:
        assert read(mask, last=True) == last and read(mask, last=False) == first


def at(x: Tensor, rows: Any) -> Tensor:
    return x[dev([0, 1]), dev(rows)]


def first_real(x: Tensor, ctx: Context) -> Tensor:
    return at(x, [0, 0] if ctx.mask is None else host(ctx.mask)[:, -5:].argmax(1))


WRONG_ROWS = {
    "The last row is the last.": lambda c, x, ctx: x[:, -1] if c.last else first_real(x, ctx),
    "The last row is the number of real ones.": lambda c, x, ctx: first_real(x, ctx) if not c.last else
        at(x, [4, 4] if ctx.mask is None else host(ctx.mask).sum(1) - 1),
    "The mask is as long as x.": lambda c, x, ctx: Classifier.row(
        c, x, Context(mask=None if ctx.mask is None else ctx.mask[:, :5])),
    "The first row is a real token.": lambda c, x, ctx: Classifier.row(c, x, ctx) if c.last else x[:, 0],
}


def test_the_class_is_read_off_the_first_or_the_last_real_token():
    check_rows(Classifier.row)
    for wrong in WRONG_ROWS.values():
        with pytest.raises(AssertionError):
            check_rows(wrong)


@pytest.mark.parametrize("T, c", [(1, 2), (7, 6), (5, 10)])
def test_sinusoids_are_their_formula(T, c):
    got = sinusoids(T, c)
    assert got.shape == (T, c) and got.dtype == np.float32
    for p, i in np.ndindex(T, c // 2):
        angle = p / 10000**(2 * i / c)
        assert abs(got[p, i] - math.sin(angle)) < 1e-6 > abs(got[p, c // 2 + i] - math.cos(angle))


def test_gradients_reach_all_that_attention_is_made_of():
    rng = np.random.default_rng(0)
    attn = Attention(C, H, rng=rng, causal=True).to(dtype=np.float64)
    for p in attn.parameters():
        p.copy_(rng.standard_normal(p.shape))
    x, ctx = Tensor(dev(rng.standard_normal((2, 5, C))), requires_grad=True), Context()
    attn(x, ctx).sum().backward()
    assert all(p.grad is not None for p in (x, *attn.parameters()))
    assert attn.in_features == attn.out_features == attn.kv.heads * attn.kv.head_width == C


@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "padded"])
def test_a_gpt_through_its_cache_is_one_pass(mask):
    model, (ids, _) = generic("gpt"), batch()
    real, cache, got = np.ones(ids.shape, bool) if mask is None else mask, Cache(), []
    for i, j in ((0, 2), (2, 3), (3, 6)):
        assert cache.length == i
        got.append(host(model(ids[:, i:j], mask=None if mask is None else mask[:, i:j], cache=cache)))
    near(np.concatenate(got, 1)[real], Reference("gpt", weights(model))(ids, None, mask)["out"][real])


@every
def test_embeddings_may_stand_in_place_of_ids_and_the_head_where_it_is_wanted(kind):
    model, (ids, _) = generic(kind), batch()
    y, rows = host(model(ids)), Tensor(dev(host(model.embed.weight)[ids]), requires_grad=True)
    given = model(rows)
    near(given, y)
    given.sum().backward()
    assert rows.grad.shape == rows.shape
    if kind in ("gpt", "bert"):
        at = np.array([0, 5, 13])
        near(model(ids, logit_positions=at), y.reshape(-1, V)[at])
    ctx = Context()
    assert model(ids, ctx).shape == y.shape and ctx.hidden_states == []          # none unless asked for


@every
def test_ids_and_masks_are_put_beside_the_weights(kind):
    array.use("strict")
    assert new(kind)(batch()[0], mask=RIGHT).device == "strict"


# ── how it starts ────────────────────────────────────────────────────────────────────────────────────────────────────
WIDE = 96


def deviations(model: Any, bound: dict[str, float]) -> None:
    """Every matrix normal with the deviation of its name's end, every bias 0, every gain 1."""
    for n, p in model.named_parameters().items():
        a = host(p)
        assert a.dtype == np.float32
        if a.ndim == 1:
            assert (a == (0 if n.endswith("bias") else 1)).all(), n
        else:
            std = next(v for k, v in bound.items() if n.endswith(f"{k}.weight"))
            assert abs(a.std() / std - 1) < 5 / math.sqrt(2 * a.size) and abs(a.mean()) < 5 * std / math.sqrt(a.size), n


@pytest.mark.parametrize("seed", [0, 1])
def test_initial_values_have_the_deviations_of_the_paper(seed):
    thin = 0.05 / math.sqrt(2 * 3)                       # maps that write into the residual stream, three layers
    gpt = GPT(GPTConfig(60, 50, WIDE, 3, 4, std=0.05), seed)
    same = dict(embed=0.02, pos=0.02, type=0.02, q=0.05, k=0.05, v=0.05, up=0.05)
    deviations(gpt, {**same, "o": thin, "down": thin})
    assert gpt.blocks[0].mlp.up.out_features == 4 * WIDE == gpt.blocks[0].mlp.down.in_features and gpt.embed.tied
    bert = BERT(BERTConfig(60, 50, 40, WIDE, 3, 4, std=0.05), seed)
    deviations(bert, {**same, "o": 0.05, "down": 0.05, "head.dense": 0.02})
    assert bert.blocks[0].mlp.up.out_features == 4 * WIDE and bert.embed.tied and bert.pooler is None
    for model in (gpt, bert):
        model.new_head(30, np.random.default_rng(seed))
        deviations(model, {**same, "o": thin if model is gpt else 0.05, "down": thin if model is gpt else 0.05,
                           "head.out": WIDE**-0.5, "pooler.dense": WIDE**-0.5})
        assert not model.embed.tied and model.head.out_features == 30
        assert model.head.in_features == model.out_features == WIDE
    assert gpt.head_modules == ("head",) and bert.head_modules == ("head", "pooler")
    assert gpt.head.out.bias is None and bert.head.out.bias is not None


# ── DistilBERT and RoBERTa: BERT with other settings ─────────────────────────────────────────────────────────────────
def variant(head: str | None = "mlm", classes: int = 0, **settings: Any) -> BERT:
    """A BERT with these settings in float64, every number of it drawn anew."""
    model = BERT(BERTConfig(**{**SIZES_OF_BERT, **settings}), head=head)
    if classes:
        model.new_head(classes, np.random.default_rng(1))
    rng = np.random.default_rng(7)
    for p in model.to(dtype=np.float64).parameters():
        p.copy_(rng.standard_normal(p.shape) * 0.6)
    return model


SIZES_OF_BERT = {"vocab": V, "positions": P, "token_types": S, "width": C, "layers": L, "heads": H, "hidden": F}


def copied(model: BERT, **changed: np.ndarray) -> dict[str, np.ndarray]:
    """The weights of a model, some of them changed."""
    return {**weights(model), **changed}


@pytest.mark.parametrize("mask", [None, RIGHT, LEFT], ids=["none", "right", "left"])
def test_positions_may_begin_at_a_later_row(mask):
    """The rows before the first are not used and get no gradient; as many positions as without them fit."""
    model = variant(first_position=3)
    assert model.pos.in_features == P + 3
    plain = variant()
    plain.load_state_dict(copied(model, **{"pos.weight": weights(model)["pos.weight"][3:]}))
    ids, types = batch()
    y = model(ids, mask=mask, token_type_ids=types)
    np.testing.assert_array_equal(host(y), host(plain(ids, mask=mask, token_type_ids=types)))
    y.sum().backward()
    used = np.abs(host(model.pos.weight.grad)).max(axis=1) > 0
    assert not used[:3].any() and used[3:7].all()
    model(np.zeros((1, P), int))
    with pytest.raises(ValueError, match=f"a sequence of {P + 1} tokens is longer than the model's {P} positions"):
        model(np.zeros((1, P + 1), int))


def test_a_model_without_token_types_is_one_whose_types_are_zero():
    model = variant(token_types=0)
    assert model.type is None and not [name for name in weights(model) if name.startswith("type")]
    plain = variant()
    plain.load_state_dict(copied(model, **{"type.weight": np.zeros((S, C))}))
    ids, types = batch()
    near(model(ids, mask=RIGHT), host(plain(ids, mask=RIGHT)))
    for given in (types, types * 0, types.tolist()):
        with pytest.raises(ValueError, match="has no token types: call it without token_type_ids="):
            model(ids, token_type_ids=given)


@pytest.mark.parametrize("activation, f", [("tanh", np.tanh), ("relu", lambda z: np.maximum(z, 0))])
def test_the_activation_below_a_classifier(activation, f):
    model = variant(classes=K, pooler_activation=activation)
    ids, _ = batch()
    ctx = Context()
    y = model(ids, ctx)
    w = weights(model)
    z = f(host(ctx.last_hidden_state)[:, 0] @ w["pooler.dense.weight"].T + w["pooler.dense.bias"])
    assert (z == 0).any() == (activation == "relu")
    near(y, z @ w["head.out.weight"].T + w["head.out.bias"])


@pytest.mark.parametrize("keep", [True, False])
def test_a_pooler_that_pretraining_left_alone_is_made_anew(keep):
    """RoBERTa's pooler is not kept: its classifier has a layer of its own, with the activation of the settings."""
    model = BERT(BERTConfig(**SIZES_OF_BERT, keep_pooler=keep, pooler_activation="relu"), head=None, pooler=True)
    pooler = model.pooler
    model.new_head(2, np.random.default_rng(0))
    assert (model.pooler is pooler) == keep
    assert model.head_modules == (("head",) if keep else ("head", "pooler"))
    x = Tensor(dev(np.full((1, C), -5.0, np.float32)))
    assert (host(model.pooler(x, Context())) == 0).any()         # of a ReLU


@pytest.mark.parametrize("settings, message", [
    ({"token_types": -1}, "token_types wants a whole number >= 0, got -1"),
    ({"first_position": -1}, "first_position wants a whole number >= 0, got -1"),
    ({"first_position": 1.0}, "first_position wants a whole number >= 0, got 1.0"),
    ({"pooler_activation": "gelu"}, "pooler_activation wants one of 'tanh', 'relu', got 'gelu'"),
    ({"keep_pooler": 1}, "keep_pooler wants True or False, got 1"),
])
def test_settings_of_no_bert_are_refused(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        BERTConfig(**settings)


def test_a_pooler_that_was_trained_is_no_part_of_a_new_head():
    model = BERT(BERTConfig(V, P, S, C, L, H, F), head=None, pooler=True)
    pooler = model.pooler
    model.new_head(2, np.random.default_rng(0))
    assert model.pooler is pooler and model.head_modules == ("head",) and GPT.head_modules == BERT.head_modules == ()


def test_parts_have_the_defaults_they_say():
    rng = np.random.default_rng(0)
    attn = Attention(WIDE, 4, rng=rng)
    mlp = MLP(WIDE, 300, activation=ops.gelu, rng=rng)
    head = Classifier(WIDE, 50, rng=rng, last=False)
    deviations(attn, dict.fromkeys("qkvo", 0.02))
    deviations(mlp, dict(up=0.02, down=0.02))
    deviations(head, dict(out=WIDE**-0.5))
    drawn = (np.random.default_rng(5).standard_normal((C, C)) * 0.02).astype(np.float32)
    assert np.array_equal(host(Attention(C, H, rng=np.random.default_rng(5)).q.weight), drawn)
    assert np.array_equal(host(MLP(C, C, activation=ops.gelu, rng=np.random.default_rng(5)).up.weight), drawn)
    assert not attn.causal
    assert KV(2, 3).cached
    assert attn.drop.p == attn.drop_p.p == mlp.drop.p == head.drop.p == 0 and head.out.bias is not None
    deviations(Attention(WIDE, 4, rng=rng, causal=True, out_std=0.1), {**dict.fromkeys("qkv", 0.02), "o": 0.1})
    deviations(MLP(WIDE, 300, activation=ops.gelu, rng=rng, out_std=0.1), dict(up=0.02, down=0.1))
    for model, eps in ((GPT(GPTConfig(V, P, C, L, H)), 1e-5), (BERT(BERTConfig(V, P, S, C, L, H)), 1e-12)):
        assert {m.eps for m in model.modules() if isinstance(m, LayerNorm)} == {eps}
        assert {m.p for m in model.modules() if isinstance(m, Dropout)} == {0.0}
        block = model.blocks[0]
        assert block.in_features == block.out_features == block.mlp.in_features == block.mlp.out_features == C
        assert model.config.width == model.out_features


@every
def test_a_seed_is_the_same_numbers_and_another_seed_is_others(kind):
    one, two, other = (weights(new(kind, **s)) for s in ({}, {"seed": 0}, {"seed": 1}))
    assert all(np.array_equal(v, two[n]) for n, v in one.items())
    assert not any(np.array_equal(v, other[n]) for n, v in one.items() if v.ndim > 1)
    defaults = {"gpt": lambda: GPT(GPTConfig(V, P, C, L, H, F)), "bert": lambda: BERT(BERTConfig(V, P, S, C, L, H, F))}
    if kind in defaults:                                 # the default is seed 0, and BERT's own head
        assert all(np.array_equal(v, one[n]) for n, v in weights(defaults[kind]()).items())
    a, b = (host(m.attn.q.weight) for m in new(kind).blocks)
    assert not np.array_equal(a, b)


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", ["gpt", "bert"])
@pytest.mark.parametrize("ids, error, words", [
    ([[1.0, 2.0]], TypeError, "token ids are integers; got float64"), (np.array([[True]]), TypeError, "got bool"),
    ([[1, V]], IndexError, f"token id {V} is outside the vocabulary of {V}"),
    (np.array([[-1, V]]), IndexError, "token id -1 is outside"),
    (np.zeros((1, P + 1), int), ValueError, rf"a sequence of {P + 1} tokens is longer than the model's {P} positions"),
    (np.zeros(3, int), ValueError, r"\(B, T\)")])
def test_bad_ids_get_one_clear_sentence(kind, ids, error, words):
    with pytest.raises(error, match=words):
        new(kind)(ids)


def test_what_is_just_allowed_is_allowed_and_the_rest_says_why_not():
    model, full = new("gpt"), [[0, V - 1, 0, 0, 0, 0, 0, 0, 0]]
    with no_grad():
        assert model(full).shape == (1, P, V) == new("bert")(np.array(full, np.uint8)).shape
        cache = Cache()
        model(np.array(full)[:, :7], cache=cache)
        with pytest.raises(ValueError, match=r"a sequence of 10 tokens \(7 of them cached\) is longer"):
            model(np.array(full)[:, :3], cache=cache)
        prefixed, too_long = Context(), Context()
        prefixed.position_shift = too_long.position_shift = 2
        assert model(np.array(full)[:, :7], prefixed).shape == (1, 7, V)
        with pytest.raises(ValueError, match=r"a sequence of 10 tokens \(2 of them a prefix\) is longer"):
            model(np.array(full)[:, :8], too_long)
    with pytest.raises(ValueError, match="5 heads do not divide a width of 12"):
        Attention(12, 5, rng=np.random.default_rng(0), causal=True)
    with pytest.raises(ValueError, match="BERT looks both ways"):
        new("bert")(np.array(full), cache=Cache())
    on_device = dev([[V + 5]]) if array.backend() != "numpy" else None   # not read: that would wait for the device
    assert blocks.check_ids([], V) is None and blocks.check_ids(on_device, V) is None


@pytest.mark.skipif(array.backend() != "numpy", reason="the others have a kernel, or none")
def test_one_product_for_queries_keys_and_values_is_taken_only_where_nothing_is_attached(rng, monkeypatch):
    """With its definition as the kernel: the same logits; and with edits on the three maps, theirs."""
    calls: list[int] = []

    def kernel(*args: Any, **kw: Any) -> Any:
        calls.append(1)
        return ops.project.definition(*args, **kw)
    model, ids = GPT(GPTConfig(11, 8, 8, 2, 2)), rng.integers(0, 11, (2, 5))
    tables = [model(ids).numpy()]
    attach(model, LoRA(r=2, targets="attn.[qkv]"))
    for e in (m.edits["lora"] for m in model.modules() if m.edits):
        e.B.copy_(rng.standard_normal(e.B.shape))
    tables.append(model(ids).numpy())
    monkeypatch.setitem(dispatch.KERNELS, (ops.project, np.ndarray), [kernel])
    assert np.allclose(model(ids).numpy(), tables[1], atol=1e-5) and not calls
    detach(model)
    assert np.allclose(model(ids).numpy(), tables[0], atol=1e-5) and len(calls) == 2
    assert not np.allclose(*tables, atol=1e-3)


@every
def test_a_model_names_its_stacks_its_top_modules_and_the_sublayers_of_its_blocks(kind):
    """Every path names a module; the embeddings, the blocks and the top modules together own every parameter."""
    model = new(kind)
    modules = dict(model.named_modules())
    assert model.stacks == {"decoder" if kind.startswith("gpt") else "encoder": ["blocks.0", "blocks.1"]}
    assert model.top_modules == {"gpt": ("norm", "head"), "gpt-classes": ("norm", "head"), "bert": ("head",),
                                 "bert-classes": ("pooler", "head"), "bert-bare": ()}[kind]
    paths = [path for stack in model.stacks.values() for path in stack]
    assert [modules[path] for path in paths] == model.blocks
    for path in paths:
        assert modules[path].sublayers == [("attn", "norm1"), ("mlp", "norm2")]
        for module, norm in modules[path].sublayers:
            assert modules[f"{path}.{module}"].in_features == C and isinstance(modules[f"{path}.{norm}"], LayerNorm)
    below = ("embed", "pos", "type", "norm0")
    owners = tuple(f"{owner}." for owner in (*below, *paths, *model.top_modules))
    assert all(name.startswith(owners) for name in model.named_parameters())

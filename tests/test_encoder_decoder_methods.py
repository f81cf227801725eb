"""Every method on the two encoder-decoders: the contract of contract.py, and what is special to two stacks.

The contract's checks call a model with ids alone. The models here have a source for such calls, the same for all rows.
"""
from __future__ import annotations

from typing import Any

import contract
import numpy as np
import pytest
from contract import CHECKS, Row, Sizes, noise, run, same, values
from helpers import host, wrong_answers

import tinyft as ft
from tinyft import T5, Context, PromptTuning, Seq2Seq, Seq2SeqConfig, T5Config, array
from tinyft.edit import attach, detach
from tinyft.methods import ALL, BitFit, Full, Houlsby, LoRA, Partial, PrefixTuning
from tinyft.tensor import Tensor

S = Sizes("gpt")
V, P, C, F, L, H = S.V, S.P, S.C, S.F, S.L, S.H
D = 5                                                    # head width of the T5: H D is not C
BUCKETS = 8
SOURCE = np.array([[5, 9, 2, 14]])
KINDS = ("seq2seq", "t5")


class OneSource(Seq2Seq):
    """A Seq2Seq that has a source without being given one."""

    def forward(self, ids: Any, ctx: Context) -> Tensor:
        give_source(ids, ctx)
        return super().forward(ids, ctx)


class OneSourceT5(T5):
    """The same for a T5."""

    def forward(self, ids: Any, ctx: Context) -> Tensor:
        give_source(ids, ctx)
        return super().forward(ids, ctx)


def give_source(ids: Any, ctx: Context) -> None:
    if ctx.source is None and ctx.source_ids is None:
        ctx.source_ids = np.tile(SOURCE, (len(ids), 1))


def build(kind: str, seed: int = 0) -> Any:
    """A small model in eval mode, all tensors at generic points."""
    if kind == "seq2seq":
        model: Any = OneSource(Seq2SeqConfig(V, P, C, L, H, F, activation="silu"), seed)     # a ReLU has kinks
    else:
        model = OneSourceT5(T5Config(V, P, C, L, H, D, F, buckets=BUCKETS, max_distance=10, tied=False,
                                     feed_forward="gated-gelu", std=0.1), seed)
    rng = np.random.default_rng(seed + 100)
    for p in model.parameters():
        p.copy_(host(p) + rng.standard_normal(p.shape) * (0.3 if p.ndim > 1 else 0.1))
    return model.eval()


def batch(kind: str, seed: int, n: int = 4, T: int = 7) -> dict:
    """A batch for fit: next tokens, with a source for each row and padding in both."""
    rng = np.random.default_rng(seed + 7)
    mask = np.ones((n, T), bool)
    mask[-1, T - 2:] = False
    source_mask = np.ones((n, 5), bool)
    source_mask[0, 3:] = False
    return {"ids": contract.tokens(n, T, seed + 50), "mask": mask, "source_ids": rng.integers(0, V, (n, 5)),
            "source_mask": source_mask}


@pytest.fixture
def encoder_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract's checks build these models; both predict the next token."""
    monkeypatch.setattr(contract, "build", build)
    monkeypatch.setattr(contract, "batch", batch)
    monkeypatch.setattr(contract, "NEXT_TOKEN", KINDS)
    monkeypatch.setattr(Sizes, "total", property(lambda s: total(s.kind)))


# ── numbers of parameters, in closed form ────────────────────────────────────────────────────────────────────────────
NORM = {"seq2seq": 2 * C, "t5": C}
ATTENTION = {"seq2seq": 4 * (C * C + C), "t5": 4 * C * H * D}
MLP = {"seq2seq": 2 * C * F + F + C, "t5": 3 * C * F}
TABLES = {"seq2seq": 0, "t5": 2 * BUCKETS * H}           # of relative positions
HEAD = {"seq2seq": V, "t5": V * C}                       # the bias; the map
FINAL_NORMS = {"seq2seq": 0, "t5": 2 * C}
KEYS = {"seq2seq": C, "t5": H * D}                       # the width of all heads together


def encoder_block(kind: str) -> int:
    return ATTENTION[kind] + MLP[kind] + 2 * NORM[kind]


def decoder_block(kind: str) -> int:
    return 2 * ATTENTION[kind] + MLP[kind] + 3 * NORM[kind]


def total(kind: str) -> int:
    blocks = L * (encoder_block(kind) + decoder_block(kind))
    return V * C + blocks + TABLES[kind] + HEAD[kind] + FINAL_NORMS[kind]


def count_partial(s: Sizes) -> int:
    """The top block of both stacks, the norms above them and the head. The tables are in the first blocks."""
    return encoder_block(s.kind) + decoder_block(s.kind) + HEAD[s.kind] + FINAL_NORMS[s.kind]


def count_biases(s: Sizes) -> int:
    """Four maps of an attention, three attentions; two feed-forwards; five norms; the head."""
    return L * (3 * 4 * C + 2 * (F + C) + 5 * C) + V


def count_adapters(s: Sizes) -> int:
    """One of bottleneck width 4 for each of the five sublayers of two blocks."""
    return L * 5 * (2 * 4 * C + C + 4)


def count_norms(s: Sizes) -> int:
    return L * 5 * NORM[s.kind] + FINAL_NORMS[s.kind]


def count_adapters_and_norms(s: Sizes) -> int:
    return count_adapters(s) + count_norms(s)


def count_lora(s: Sizes) -> int:
    """Rank 2 on q and v of three attentions, and on the embedding."""
    return L * 3 * 2 * 2 * (C + KEYS[s.kind]) + 2 * (V + C)


def count_prefix(s: Sizes) -> int:
    """Three rows of keys and of values for three attentions of two blocks."""
    return L * 3 * 2 * 3 * KEYS[s.kind]


def count_prefix_mlp(s: Sizes) -> int:
    k = KEYS[s.kind]
    return 3 * k + 5 * k + 5 + L * 3 * 2 * (5 * k + k)


def is_norm(name: str) -> bool:
    return "norm" in name


def is_in_top(name: str) -> bool:
    return name.startswith(("encoder_norm.", "norm.", "head.", "encoder.1.", "decoder.1."))


ROWS = {
    "full": Row(Full(), "same", merges=True, count=lambda s: total(s.kind), base=lambda name: True),
    "partial": Row(Partial(k=1), "same", merges=True, count=count_partial, base=is_in_top),
    "head": Row(Partial(k=0), "same", merges=True, count=lambda s: HEAD[s.kind],
                base=lambda name: name.startswith("head.")),
    "bitfit": Row(BitFit(), "same", merges=True, count=count_biases, base=lambda name: name.endswith(".bias"),
                  on=("seq2seq",)),
    "lora": Row(LoRA(r=2, targets=("attn.[qv]", "cross_attn.[qv]", "embed")), "same", merges=True, count=count_lora),
    "lora-dropout": Row(LoRA(r=2, targets=("cross_attn.[qv]", "attn.[qv]", "embed"), dropout=0.3), "same", merges=True,
                        count=count_lora, drops=True),
    "houlsby": Row(Houlsby(m=4), "near", merges=False, count=count_adapters_and_norms, base=is_norm),
    "houlsby-frozen-norms": Row(Houlsby(m=4, norms=False), "near", merges=False, count=count_adapters),
    "prefix": Row(PrefixTuning(p=3), "other", merges=False, count=count_prefix),
    "prefix-mlp": Row(PrefixTuning(p=3, mlp=5), "other", merges=False, count=count_prefix_mlp),
    "prefix-shift": Row(PrefixTuning(p=3, shift=True), "other", merges=False, count=count_prefix),
    "prompt": Row(PromptTuning(p=3), "other", merges=False, count=lambda s: 3 * C),
    "prompt-uniform": Row(PromptTuning(p=3, init="uniform"), "other", merges=False, count=lambda s: 3 * C),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind, name", [(kind, name) for name, row in ROWS.items() for kind in KINDS
                                        if name != "bitfit" or kind == "seq2seq"])
def test_a_method_keeps_the_contract(name, kind, check, encoder_decoders):
    if check == "gradients" and array.backend() == "strict":
        pytest.skip("differences of many losses take minutes there; other models have this check on the double")
    CHECKS[check](ROWS[name], kind)


def test_every_method_has_its_row():
    assert {type(row.method) for row in ROWS.values()} >= set(ALL) - {ft.QAT, ft.LSQ}


def test_bitfit_says_that_a_t5_has_no_biases():
    with pytest.raises(ValueError, match="BitFit would train nothing on this model: it has no biases"):
        attach(build("t5"), BitFit())


# ── where the parts are ──────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", KINDS)
def test_houlsby_has_an_adapter_after_every_sublayer(kind):
    sublayers = [f"encoder.{i}.{part}" for i in range(L) for part in ("attn", "mlp")]
    sublayers += [f"decoder.{i}.{part}" for i in range(L) for part in ("attn", "cross_attn", "mlp")]
    assert sorted(attach(build(kind), Houlsby(m=2)).edits) == sorted(sublayers)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_stands_in_all_three_attentions_and_each_alone_changes_the_output(kind):
    y = run(build(kind))
    for stack in ("encoder.*.attn.kv", "decoder.*.attn.kv", "cross_attn.kv"):
        model = build(kind)
        a = attach(model, PrefixTuning(p=3, targets=stack))
        assert len(a.edits) == L
        assert np.abs(run(model) - y).max() > 1e-4
    assert len(attach(build(kind), PrefixTuning(p=3)).edits) == 3 * L


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_stands_before_the_source_alone(kind):
    """Its rows are rows of a source of real tokens: the same as a source that begins with these tokens."""
    model = build(kind)
    a = attach(model, PromptTuning(p=3))
    assert list(a.edits) == ["embed"]
    tokens = [7, 3, 11]
    e = a.edits["embed"]
    e.P.copy_(host(model.embed.weight)[tokens])
    ids, source = np.array([[1, 2, 3, 4]]), np.array([[5, 6]])
    mask = np.array([[True, False]])
    ctx = Context(source_ids=source, source_mask=mask)
    y = host(model(ids, ctx))
    assert ctx.ids.shape == (1, 4) and ctx.source.ids.tolist() == [[-1, -1, -1, 5, 6]]
    assert host(ctx.source.mask).tolist() == [[True, True, True, True, False]]
    detach(model)
    given = np.array([[*tokens, 5, 6]])
    want = run(model, ids, source_ids=given, source_mask=np.array([[True, True, True, True, False]]))
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["prefix", "prefix-shift", "prompt", "houlsby", "lora"])
def test_beams_of_an_adapted_model_have_the_scores_of_teacher_forcing(kind, name):
    model = build(kind)
    attach(model, ROWS[name].method)
    noise(model)
    model.to(dtype=np.float64).eval()
    source = np.random.default_rng(1).integers(0, V, (3, 4))
    for row, (h,) in enumerate(ft.beam_search(model, None, 4, beams=3, end=0, source_ids=source)):
        z = run(model, np.array([[model.config.start, *h.tokens[:-1]]]), source_ids=source[row:row + 1])[0]
        log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
        assert abs(h.log_prob - sum(log_p[t, token] for t, token in enumerate(h.tokens))) < 1e-9


# ── planted faults ───────────────────────────────────────────────────────────────────────────────────────────────────
def in_both(e: Any) -> Any:
    """The edit of a prompt that does not see which stack it is in."""
    after = type(e).after

    def wrong(x: Any, y: Tensor, ctx: Context) -> Tensor:
        source, ctx.source = ctx.source, None
        try:
            return after(e, x, y, ctx)
        finally:
            ctx.source = source
    return wrong


@wrong_answers
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_in_both_stacks_is_caught(kind, encoder_decoders, monkeypatch):
    model = build(kind)
    a = attach(model, PromptTuning(p=3))
    e = a.edits["embed"]
    e.after = in_both(e)
    assert run(model).shape[1] != contract.tokens().shape[1]


# ── compression, accounts, files ─────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", [ft.RTN(bits=8, group=4), ft.GPTQ(bits=8, group=4)], ids=["rtn", "gptq"])
def test_compression_takes_the_maps_of_both_stacks(kind, rule):
    model = build(kind)
    y = run(model)
    reports = ft.compress(model, rule, [batch(kind, 0), batch(kind, 1)])
    maps = 6 if kind == "seq2seq" else 7                 # of a block of the encoder: one more in a gated feed-forward
    assert len(reports) == L * (maps + maps + 4)
    assert 0 < np.abs(run(model) - y).max() < 0.2 * np.abs(y).max()
    assert all(report.error < 1e-3 for report in reports)


@pytest.mark.parametrize("kind", KINDS)
def test_the_account_of_memory_counts_both_stacks(kind):
    model = build(kind)
    account = ft.memory(model, LoRA(r=2, targets="attn.q"), batch=2, length=5)
    assert account.parameters == total(kind) + account.trained
    assert ft.memory(model.config, batch=2, length=5).parameters == total(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_decoder_takes_no_classifier(kind):
    with pytest.raises(TypeError, match="takes no new head"):
        ft.classifier(build(kind), 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_saved_and_loaded_bitwise(kind, tmp_path):
    model = build(kind)
    plain: Any = (Seq2Seq if kind == "seq2seq" else T5)(model.config)
    plain.load_state_dict(model.state_dict())
    ft.save(plain, tmp_path)
    again, _ = ft.load(tmp_path)
    assert repr(again) == repr(plain)
    got, want = values(again), values(plain)
    assert got.keys() == want.keys() and all(same(got[name], want[name]) for name in want)


def test_a_model_without_an_encoder_refuses_a_source():
    """It would ignore it, and the user would not notice."""
    sizes = {"vocab": 9, "positions": 8, "width": 8, "layers": 1, "heads": 2}
    ids = np.ones((1, 3), int)
    for model in (ft.GPT(ft.GPTConfig(**sizes)), ft.BERT(ft.BERTConfig(**sizes)), ft.Llama(ft.LlamaConfig(**sizes))):
        with pytest.raises(ValueError, match="no encoder for source_ids"):
            model(ids, source_ids=ids)
        with pytest.raises(ValueError, match="no encoder for source_ids"):
            ft.fit(model, [{"ids": ids, "source_ids": ids}], 1, progress=False)

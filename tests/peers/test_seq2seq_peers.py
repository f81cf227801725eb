"""transformers beside Seq2Seq and T5: the same logits, gradients, texts and beams from the same files.

Tiny random models. Differences are relative to the largest number of the array.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import dev, host
from safetensors.numpy import load_file, save_file

import tinyft as ft
from tinyft import PowerPenalty, ops
from tinyft.models.blocks import sinusoids
from tinyft.models.t5 import relative_buckets

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'tinyft[peers]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'tinyft[peers]'")
from transformers import (  # noqa: E402
    MarianConfig,
    MarianModel,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
    T5Model,
)
from transformers.models.t5.modeling_t5 import T5Attention  # noqa: E402

V, PAD, END = 30, 29, 0
TOLERANCE = 1e-5
MARIAN = {
    "vocab_size": V, "d_model": 12, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 3,
    "decoder_attention_heads": 3, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "max_position_embeddings": 24,
    "pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD, "forced_eos_token_id": None,
}
T5 = {
    "vocab_size": V, "d_model": 12, "d_kv": 5, "d_ff": 20, "num_layers": 2, "num_heads": 3, "pad_token_id": PAD,
    "eos_token_id": END, "decoder_start_token_id": PAD, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
CASES: dict[str, tuple[Any, Any, dict]] = {
    "marian": (MarianConfig, MarianMTModel, MARIAN),
    "marian, scaled, swish": (MarianConfig, MarianMTModel,
                              {**MARIAN, "scale_embedding": True, "activation_function": "swish"}),
    "marian, another decoder": (MarianConfig, MarianMTModel,
                                {**MARIAN, "decoder_layers": 3, "decoder_attention_heads": 2, "decoder_ffn_dim": 8}),
    "t5 v1.0": (T5Config, T5ForConditionalGeneration, T5),
    "t5 v1.1": (T5Config, T5ForConditionalGeneration,
                {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5, gated silu, tied": (T5Config, T5ForConditionalGeneration, {**T5, "feed_forward_proj": "gated-silu"}),
    "t5, another decoder": (T5Config, T5ForConditionalGeneration, {**T5, "num_decoder_layers": 1}),
}
every_case = pytest.mark.parametrize("case", CASES)
few_cases = pytest.mark.parametrize("case", ["marian, scaled, swish", "t5 v1.0", "t5 v1.1"])
SOURCE = np.array([[3, 4, 5, 6, 7, 8, 9, 3], [7, 8, 9, 2, 4, PAD, PAD, PAD], [1] + [PAD] * 7])
MASK = SOURCE != PAD
TEXT = np.array([[PAD, 3, 2, 5, 6, 1], [PAD, 4, 4, 1, 2, 9], [PAD, 9, 8, 7, 6, 5]])


def theirs(case: str) -> Any:
    """A random model of transformers. Its weights are not small, so that a wrong norm or a missing bias shows."""
    config, kind, settings = CASES[case]
    torch.manual_seed(0)
    model = kind(config(**settings, attn_implementation="eager")).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
        if case.startswith("marian"):
            model.final_logits_bias.normal_()
    return model


def ours(model: Any, folder: Path, dtype: str = "float32") -> Any:
    model.save_pretrained(folder)
    return ft.load(folder, dtype=dtype)[0]


def near(got: np.ndarray, want: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def their_output(model: Any) -> Any:
    return model(input_ids=torch.tensor(SOURCE), attention_mask=torch.tensor(MASK).long(),
                 decoder_input_ids=torch.tensor(TEXT))


@every_case
def test_the_logits(case, tmp_path):
    they = theirs(case)
    got = host(ours(they, tmp_path)(TEXT, source_ids=SOURCE, source_mask=MASK))
    near(got, their_output(they).logits.detach().numpy())


@every_case
def test_the_gradients(case, tmp_path):
    """Of every parameter that both train; theirs, read through a directory that holds them."""
    they = theirs(case).double()
    we = ours(they, tmp_path, "float64")
    logits = their_output(they).logits
    labels = np.random.default_rng(0).integers(0, V, TEXT.shape)
    torch.nn.functional.cross_entropy(logits.flatten(0, -2), torch.tensor(labels).flatten()).backward()
    ops.cross_entropy(we(TEXT, source_ids=SOURCE, source_mask=MASK), dev(labels)).backward()
    with torch.no_grad():
        for p in they.parameters():
            if p.requires_grad:
                p.copy_(p.grad if p.grad is not None else torch.zeros_like(p))
    want = ours(they, tmp_path / "gradients", "float64").named_parameters()
    for name, p in we.named_parameters().items():
        if name == "head.bias":                          # a buffer there
            continue
        got, wanted = host(p.grad), host(want[name])
        if name == "embed.weight" and case.startswith("marian"):                 # their look-ups do not train its row
            got, wanted = np.delete(got, PAD, 0), np.delete(wanted, PAD, 0)
        # T5's norms compute in float32 there.
        tolerance = 1e-9 if case.startswith("marian") else 1e-4
        assert np.abs(got - wanted).max() <= tolerance * max(np.abs(wanted).max(), 1e-2), name


@few_cases
def test_greedy_text(case, tmp_path):
    they = theirs(case).double()
    we = ours(they, tmp_path, "float64")
    source = torch.tensor(SOURCE)
    want = they.generate(source, attention_mask=torch.tensor(MASK).long(), max_new_tokens=8, num_beams=1,
                         do_sample=False).numpy()
    got = ft.generate(we, None, 8, end=END, source_ids=SOURCE, source_mask=MASK)
    for row, text in zip(got.tolist(), want.tolist(), strict=True):
        stop = text.index(END) + 1 if END in text else len(text)
        assert row[:stop] == text[:stop]


@few_cases
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("beams", [2, 4])
def test_the_best_text_of_a_beam_search(case, alpha, beams, tmp_path):
    """Their stop with early_stopping="never" is ours: no live beam can become better. They count the end, too."""
    they = theirs(case).double()
    we = ours(they, tmp_path, "float64")
    rng = np.random.default_rng(beams)
    source = rng.integers(1, PAD, (12, 5))
    mask = torch.ones(source.shape, dtype=torch.long)
    out = they.generate(torch.tensor(source), attention_mask=mask, num_beams=beams, max_new_tokens=7,
                        length_penalty=alpha, early_stopping="never", do_sample=False, return_dict_in_generate=True,
                        output_scores=True)
    found = ft.beam_search(we, None, 7, beams=beams, end=END, lp=PowerPenalty(alpha), source_ids=source)
    for (h,), text, score in zip(found, out.sequences.numpy().tolist(), out.sequences_scores.numpy(), strict=True):
        assert text[1:len(h.tokens) + 1] == list(h.tokens)
        assert abs(score - h.score) <= 1e-5 * max(abs(h.score), 1)               # theirs is float32
    assert len({h.tokens for (h,) in found}) > 2


@every_case
def test_transformers_reads_what_we_write(case, tmp_path):
    they = theirs(case)
    we = ours(they, tmp_path / "theirs")
    ft.save(we, tmp_path / "ours")
    again = type(they).from_pretrained(tmp_path / "ours").eval()
    near(their_output(again).logits.detach().numpy(), their_output(they).logits.detach().numpy())
    wanted = {n: t for n, t in they.state_dict().items() if "embed_positions" not in n}
    for name, tensor in again.state_dict().items():
        if "embed_positions" not in name:
            assert torch.equal(tensor, wanted[name]), name
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == load_file(tmp_path / "theirs" / "model.safetensors").keys()


@few_cases
def test_a_new_model_of_ours_opens_there(case, tmp_path):
    """One that was never loaded: config.json has every entry that their classes need."""
    kind = CASES[case][1]
    if kind is MarianMTModel:
        model: Any = ft.Seq2Seq(ft.Seq2SeqConfig(V, 24, 12, 2, 3, start=PAD))
    else:
        model = ft.T5(ft.T5Config(V, width=12, layers=2, heads=3, head_width=5, start=PAD, tied=case == "t5 v1.0"))
    ft.save(model, tmp_path)
    they = kind.from_pretrained(tmp_path).eval()
    near(host(model(TEXT, source_ids=SOURCE, source_mask=MASK)), their_output(they).logits.detach().numpy())


@pytest.mark.parametrize("config, kind, settings", [(MarianConfig, MarianModel, MARIAN), (T5Config, T5Model, T5)])
def test_a_model_without_a_head(config, kind, settings, tmp_path):
    torch.manual_seed(0)
    they = kind(config(**settings)).eval()
    we = ours(they, tmp_path)
    assert we.head is None
    near(host(we(TEXT, source_ids=SOURCE, source_mask=MASK)), their_output(they).last_hidden_state.detach().numpy())
    ft.save(we, tmp_path / "again")
    again = kind.from_pretrained(tmp_path / "again").eval()
    near(their_output(again).last_hidden_state.detach().numpy(), their_output(they).last_hidden_state.detach().numpy())


@few_cases
def test_second_names_of_one_tensor_are_read_and_must_agree(case, tmp_path):
    they = theirs(case)
    want = host(ours(they, tmp_path)(TEXT, source_ids=SOURCE))
    prefix = "model." if case.startswith("marian") else ""
    tensors = dict(load_file(tmp_path / "model.safetensors"))
    alias = f"{prefix}decoder.embed_tokens.weight"
    shared = tensors[f"{prefix}shared.weight"]
    save_file({**tensors, alias: shared}, tmp_path / "model.safetensors")
    assert np.array_equal(host(ft.load(tmp_path)[0](TEXT, source_ids=SOURCE)), want)
    save_file({**tensors, alias: shared + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="decoder.embed_tokens.weight differs from shared.weight"):
        ft.load(tmp_path)


@pytest.mark.parametrize("key, value", [("feed_forward_proj", "gelu"), ("feed_forward_proj", "gated-relu"),
                                        ("decoder_start_token_id", V), ("relative_attention_num_buckets", 7)])
def test_a_t5_of_another_kind_is_refused(key, value, tmp_path):
    theirs("t5 v1.0").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("dense_act_fn", "is_gated_act")}
    file.write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=f"config.json: .*{key}.*, got "):
        ft.load(tmp_path)


@pytest.mark.parametrize("key, value", [("activation_function", "gelu_new"), ("decoder_start_token_id", V)])
def test_a_marian_of_another_kind_is_refused(key, value, tmp_path):
    theirs("marian").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ValueError, match=f"config.json: .*{key}.*, got "):
        ft.load(tmp_path)


@pytest.mark.parametrize("both_sides", [True, False])
@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (8, 12), (64, 256), (16, 100), (32, 64), (4, 3), (6, 20)])
def test_the_buckets_are_theirs_at_every_distance(buckets, max_distance, both_sides):
    distance = np.arange(-3000, 3001)
    want = T5Attention._relative_position_bucket(torch.tensor(distance), bidirectional=both_sides, num_buckets=buckets,
                                                 max_distance=max_distance).numpy()
    assert np.array_equal(relative_buckets(distance, buckets, max_distance, both_sides=both_sides), want)


def test_a_trained_table_of_positions_is_refused(tmp_path):
    """A table of sinusoids may stand in a file. One of other numbers would be ignored, so it is refused."""
    theirs("marian").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    table = sinusoids(config["max_position_embeddings"], config["d_model"])
    name = "model.encoder.embed_positions.weight"
    want = host(ft.load(tmp_path)[0].embed.weight)
    save_file(tensors | {name: table.astype(np.float16)}, tmp_path / "model.safetensors")
    assert np.array_equal(host(ft.load(tmp_path)[0].embed.weight), want)
    wrong = {
        "a trained table": table + 0.02 * np.random.default_rng(0).standard_normal(table.shape).astype(np.float32),
        "interleaved sinusoids": table.reshape(len(table), 2, -1).swapaxes(1, 2).reshape(table.shape),
        "not numbers": np.full_like(table, np.nan),
        "another width": table[:, :-2],
    }
    for belief, other in wrong.items():
        save_file(tensors | {name: np.ascontiguousarray(other)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="embed_positions"):
            ft.load(tmp_path)
            raise AssertionError(belief)

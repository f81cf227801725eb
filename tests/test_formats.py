"""Directories in and out, without torch.  Two references written from the files' own layout, x W + b with W stored (in, out) for GPT-2,
say what a file computes; `computes` holds a loader to them, and a test requires it to refuse loaders with a planted error."""
from __future__ import annotations

import errno
import json
import math
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import dev, host
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tinyft import edit
from tinyft.formats import classifier, huggingface, layout, load, save
from tinyft.formats.bert import BERTFamily
from tinyft.formats.gpt2 import GPT2Family
from tinyft.methods import BitFit, LoRA
from tinyft.models import BERT, GPT, BERTConfig, GPTConfig
from tinyft.nn import Linear, Packed

V, T, C, L, H, F = 50, 12, 16, 2, 2, 16                  # F = C: every matrix of a block is square, and a wrong transpose fits
IDS = np.array([[3, 1, 4, 1, 5, 9], [2, 6, 49, 3, 5, 8]])
TYPES = np.array([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
Tensors = dict[str, np.ndarray]


# ── files as others write them ───────────────────────────────────────────────────────────────────────────────────────
def gpt2_file(rng: np.random.Generator, head: str = "lm") -> tuple[dict, Tensors]:
    "config.json and tensors, named as the hub names them: no prefix."
    n = lambda *shape: (rng.standard_normal(shape) * 0.4).astype(np.float32)
    out = {"wte.weight": n(V, C), "wpe.weight": n(T, C), "ln_f.weight": n(C), "ln_f.bias": n(C)}
    for i in range(L):
        for name, in_features, out_features in (("attn.c_attn", C, 3 * C), ("attn.c_proj", C, C), ("mlp.c_fc", C, F), ("mlp.c_proj", F, C)):
            out |= {f"h.{i}.{name}.weight": n(in_features, out_features), f"h.{i}.{name}.bias": n(out_features)}
        out |= {f"h.{i}.ln_{j}.{k}": n(C) for j in (1, 2) for k in ("weight", "bias")}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": V, "n_positions": T, "n_ctx": T, "n_embd": C,
              "n_layer": L, "n_head": H, "n_inner": F, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.1,
              "embd_pdrop": 0.0, "attn_pdrop": 0.2}
    if head == "classes":
        out |= {"score.weight": n(3, C)}
        config |= {"architectures": ["GPT2ForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}}
    return config, out


def bert_file(rng: np.random.Generator, head: str | None = "mlm") -> tuple[dict, Tensors]:
    n = lambda *shape: (rng.standard_normal(shape) * 0.4).astype(np.float32)
    out = {f"bert.embeddings.{k}_embeddings.weight": n(m, C) for k, m in (("word", V), ("position", T), ("token_type", 2))}

    def linear(name: str, in_features: int, out_features: int) -> None:
        out.update({f"{name}.weight": n(out_features, in_features), f"{name}.bias": n(out_features)})

    def norm(name: str) -> None:
        out.update({f"{name}.weight": n(C), f"{name}.bias": n(C)})
    norm("bert.embeddings.LayerNorm")
    for i in range(L):
        at = f"bert.encoder.layer.{i}"
        for k in ("query", "key", "value"):
            linear(f"{at}.attention.self.{k}", C, C)
        linear(f"{at}.attention.output.dense", C, C)
        linear(f"{at}.intermediate.dense", C, F)
        linear(f"{at}.output.dense", F, C)
        norm(f"{at}.attention.output.LayerNorm")
        norm(f"{at}.output.LayerNorm")
    architecture = {"mlm": "BertForMaskedLM", "classes": "BertForSequenceClassification", None: "BertModel"}[head]
    config = {"model_type": "bert", "architectures": [architecture], "vocab_size": V, "max_position_embeddings": T, "type_vocab_size": 2,
              "hidden_size": C, "num_hidden_layers": L, "intermediate_size": F, "num_attention_heads": H,
              "hidden_act": "gelu", "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1}
    if head == "mlm":
        linear("cls.predictions.transform.dense", C, C)
        norm("cls.predictions.transform.LayerNorm")
        out["cls.predictions.bias"] = n(V)
    else:
        linear("bert.pooler.dense", C, C)
    if head == "classes":
        linear("classifier", C, 3)
        config |= {"id2label": {"0": "a", "1": "b", "2": "c"}}
    return config, out


def normed(x: np.ndarray, t: Tensors, name: str, eps: float) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * t[f"{name}.weight"] + t[f"{name}.bias"]


def heads(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> np.ndarray:
    "Attention, one row of the batch and one head at a time."
    out, D = np.zeros_like(q), C // H
    for b in range(len(q)):
        for j in range(0, C, D):
            s = q[b, :, j:j + D] @ k[b, :, j:j + D].T / math.sqrt(D)
            s = np.where(np.tri(len(s)) > 0, s, -np.inf) if causal else s
            p = np.exp(s - s.max(-1, keepdims=True))
            out[b, :, j:j + D] = p / p.sum(-1, keepdims=True) @ v[b, :, j:j + D]
    return out


def run_gpt2(tensors: Tensors) -> np.ndarray:
    "What a GPT-2 file computes on IDS, in float64."
    t = {k: v.astype(np.float64) for k, v in tensors.items()}
    linear = lambda x, name: x @ t[f"{name}.weight"] + t[f"{name}.bias"]
    x = t["wte.weight"][IDS] + t["wpe.weight"][:IDS.shape[1]]
    for i in range(L):
        q, k, v = np.split(linear(normed(x, t, f"h.{i}.ln_1", 1e-5), f"h.{i}.attn.c_attn"), 3, axis=-1)
        x = x + linear(heads(q, k, v, True), f"h.{i}.attn.c_proj")
        up = linear(normed(x, t, f"h.{i}.ln_2", 1e-5), f"h.{i}.mlp.c_fc")
        x = x + linear(0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3))), f"h.{i}.mlp.c_proj")
    x = normed(x, t, "ln_f", 1e-5)
    return x[:, -1] @ t["score.weight"].T if "score.weight" in t else x @ t["wte.weight"].T


def run_bert(tensors: Tensors) -> np.ndarray:
    "What a BERT file computes on IDS and TYPES, in float64."
    t = {k.removeprefix("bert."): v.astype(np.float64) for k, v in tensors.items()}
    linear = lambda x, name: x @ t[f"{name}.weight"].T + t[f"{name}.bias"]
    gelu = lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    at = lambda k: t[f"embeddings.{k}_embeddings.weight"]
    x = normed(at("word")[IDS] + at("position")[:IDS.shape[1]] + at("token_type")[TYPES], t, "embeddings.LayerNorm", 1e-12)
    for i in range(L):
        n = f"encoder.layer.{i}"
        a = heads(*(linear(x, f"{n}.attention.self.{k}") for k in ("query", "key", "value")), False)
        x = normed(x + linear(a, f"{n}.attention.output.dense"), t, f"{n}.attention.output.LayerNorm", 1e-12)
        x = normed(x + linear(gelu(linear(x, f"{n}.intermediate.dense")), f"{n}.output.dense"), t, f"{n}.output.LayerNorm", 1e-12)
    if "classifier.weight" in t:
        return linear(np.tanh(linear(x[:, 0], "pooler.dense")), "classifier")
    if "cls.predictions.bias" not in t:
        return x
    x = normed(gelu(linear(x, "cls.predictions.transform.dense")), t, "cls.predictions.transform.LayerNorm", 1e-12)
    return x @ at("word").T + t["cls.predictions.bias"]


CASES: dict[str, tuple[Callable, Any, Callable]] = {
    "gpt2": (gpt2_file, "lm", run_gpt2), "gpt2-classes": (gpt2_file, "classes", run_gpt2), "bert": (bert_file, "mlm", run_bert),
    "bert-classes": (bert_file, "classes", run_bert), "bert-hidden": (bert_file, None, run_bert)}
EVERY = pytest.mark.parametrize("case", CASES)


def made(case: str, seed: int = 0) -> tuple[dict, Tensors]:
    make, head, _ = CASES[case]
    return make(np.random.default_rng(seed), head)


def write(folder: Path, config: dict, tensors: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def outputs(model: Any) -> np.ndarray:
    return host(model(dev(IDS), **({"token_type_ids": dev(TYPES)} if isinstance(model, BERT) else {})))


def computes(folder: Path, case: str, tensors: Tensors, tol: float = 1e-9) -> None:
    "The model that load makes of this directory computes what the file says."
    model, _ = load(folder, np.float64)
    want = CASES[case][2](tensors)
    np.testing.assert_allclose(outputs(model), want, rtol=0, atol=tol * np.abs(want).max())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def parameters(model: Any) -> Tensors:
    return {n: host(p) for n, p in model.named_parameters().items()}


def identical(a: Tensors, b: Tensors) -> None:
    assert a.keys() == b.keys()
    for n in a:
        assert a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes(), n


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@EVERY
def test_the_model_computes_what_the_file_says(case, tmp_path):
    config, tensors = made(case)
    computes(write(tmp_path / "m", config, tensors), case, tensors)


@EVERY
def test_with_and_without_the_prefix(case, tmp_path):
    config, tensors = made(case)
    own = ("cls.", "classifier.", "score.")
    other = {k.removeprefix("bert.") if "bert" in case else k if k.startswith(own) else f"transformer.{k}": a for k, a in tensors.items()}
    computes(write(tmp_path / "m", config, other), case, tensors)
    with pytest.raises(ValueError, match="two spellings"):
        load(write(tmp_path / "both", config, {**tensors, **other, "wte.weight": tensors.get("wte.weight", np.ones(1))}))


@EVERY
def test_without_architectures_the_tensors_tell(case, tmp_path):
    config, tensors = made(case)
    del config["architectures"]
    computes(write(tmp_path / "m", config, tensors), case, tensors)


def swap(a: str, b: str) -> Callable[[dict], dict]:
    "Exchange two tensors of the table."
    def wrong(places: dict) -> dict:
        out = dict(places)
        for i in range(L):
            for end in ("weight", "bias"):
                p, q = f"{a}.{end}".replace("#", str(i)), f"{b}.{end}".replace("#", str(i))
                if p in out and q in out:
                    out[p], out[q] = places[q], places[p]
        return out
    return wrong


def edited(pattern: str, **fields: Any) -> Callable[[dict], dict]:
    "Places whose names match, with other fields."
    def wrong(places: dict) -> dict:
        hit = {n for n in places if re.fullmatch(pattern, n)}
        assert hit
        return {n: layout.FileTensor(**{**vars(p), **fields}) if n in hit else p for n, p in places.items()}
    return wrong


class Interleaved(layout.FileTensor):
    "q, k, v taken head by head, as other checkpoints have them: the shapes fit, the model is another."

    def read(self, a):
        a = a.T if self.transposed else a
        return a if self.third is None else a.reshape(H, 3, C // H, *a.shape[1:])[:, self.third].reshape(self.shape)


def reversed_blocks(places: dict) -> dict:
    return {re.sub(r"^blocks\.(\d)", lambda m: f"blocks.{L - 1 - int(m[1])}", n): p for n, p in places.items()}


WRONG = {
    "gpt2": {
        "attn.o not transposed": edited(r".*attn\.o\.weight", transposed=False),
        "mlp.up not transposed": edited(r".*mlp\.up\.weight", transposed=False),
        "mlp.down not transposed": edited(r".*mlp\.down\.weight", transposed=False),
        "q and k exchanged": swap("blocks.#.attn.q", "blocks.#.attn.k"),
        "k and v exchanged": swap("blocks.#.attn.k", "blocks.#.attn.v"),
        "the bias of v is that of k": edited(r".*attn\.v\.bias", third=1),
        "interleaved heads": lambda places: {n: Interleaved(**vars(p)) for n, p in places.items()},
        "norms exchanged": swap("blocks.#.norm1", "blocks.#.norm2"),
        "up and down exchanged": swap("blocks.#.mlp.up", "blocks.#.mlp.down"),
        "the last norm is a block's": edited(r"norm\.weight", name="h.1.ln_2.weight"),
        "blocks in reverse": reversed_blocks},
    "bert": {
        "attn.o transposed": edited(r".*attn\.o\.weight", transposed=True),
        "attn.q transposed": edited(r".*attn\.q\.weight", transposed=True),
        "the head transposed": edited(r"head\.dense\.weight", transposed=True),
        "q and k exchanged": swap("blocks.#.attn.q", "blocks.#.attn.k"),
        "k and v exchanged": swap("blocks.#.attn.k", "blocks.#.attn.v"),
        "norms exchanged": swap("blocks.#.norm1", "blocks.#.norm2"),
        "the head's norm exchanged": swap("norm0", "head.norm"),
        "up and down exchanged": swap("blocks.#.mlp.up", "blocks.#.mlp.down"),
        "blocks in reverse": reversed_blocks}}


@pytest.mark.parametrize("family,error", [(f, e) for f in WRONG for e in WRONG[f]])
def test_planted_errors_are_caught(family, error, tmp_path, monkeypatch):
    config, tensors = made(family)
    folder = write(tmp_path / "m", config, tensors)
    computes(folder, family, tensors)
    cls = {"gpt2": GPT2Family, "bert": BERTFamily}[family]
    right = cls.table
    monkeypatch.setattr(cls, "table", lambda self, plan: WRONG[family][error](right(self, plan)))
    with pytest.raises((AssertionError, ValueError)) as caught:                # by name if a tensor is left over, else by what it computes
        computes(folder, family, tensors)
    assert caught.type is AssertionError or "unexpected" in str(caught.value)


@pytest.mark.parametrize("key,value", [("layer_norm_epsilon", 1e-3), ("n_head", 4)])
def test_settings_of_gpt2_reach_the_model(key, value, tmp_path):
    config, tensors = made("gpt2")
    with pytest.raises(AssertionError, match="Not equal"):
        computes(write(tmp_path / "m", {**config, key: value}, tensors), "gpt2", tensors)


@pytest.mark.parametrize("key,value", [("layer_norm_eps", 1e-5), ("num_attention_heads", 8)])
def test_settings_of_bert_reach_the_model(key, value, tmp_path):
    config, tensors = made("bert")
    with pytest.raises(AssertionError, match="Not equal"):
        computes(write(tmp_path / "m", {**config, key: value}, tensors), "bert", tensors)


def test_gamma_and_beta(tmp_path):
    config, tensors = made("bert")
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): a for k, a in tensors.items()}
    assert sum(k.endswith("gamma") for k in old) == 2 * L + 2
    computes(write(tmp_path / "m", config, old), "bert", tensors)
    both = {**tensors, "bert.embeddings.LayerNorm.gamma": np.ones(C, np.float32)}
    with pytest.raises(ValueError, match="LayerNorm.gamma are two spellings|LayerNorm.weight are two spellings"):
        load(write(tmp_path / "both", config, both))
    with pytest.raises(ValueError, match="unexpected other.gamma"):              # renamed only after `LayerNorm.`
        load(write(tmp_path / "other", config, {**tensors, "other.gamma": np.ones(C, np.float32)}))


def test_what_is_no_weight_is_skipped(tmp_path):
    config, tensors = made("gpt2")
    masks = {f"h.{i}.attn.bias": np.tril(np.ones((1, 1, T, T), np.uint8)) for i in range(L)} | {"h.0.attn.masked_bias": np.array(-1e4)}
    computes(write(tmp_path / "gpt2", config, tensors | masks), "gpt2", tensors)
    del tensors["h.0.attn.c_attn.bias"]
    with pytest.raises(ValueError, match="missing h.0.attn.c_attn.bias"):        # not one of the masks
        load(write(tmp_path / "less", config, tensors | masks))
    config, tensors = made("bert")
    more = {"bert.embeddings.position_ids": np.arange(T)[None], "cls.seq_relationship.weight": np.ones((2, C), np.float32),
            "cls.seq_relationship.bias": np.ones(2, np.float32)}
    for i, architecture in enumerate(("BertForMaskedLM", "BertForPreTraining")):
        computes(write(tmp_path / f"bert{i}", {**config, "architectures": [architecture]}, tensors | more), "bert", tensors)


def test_the_tied_output_layer(tmp_path):
    for case, alias, name in (("gpt2", "lm_head.weight", "wte.weight"),
                              ("bert", "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
                              ("bert", "cls.predictions.decoder.bias", "cls.predictions.bias")):
        config, tensors = made(case)
        computes(write(tmp_path / f"{alias}.same", config, {**tensors, alias: tensors[name].copy()}), case, tensors)
        with pytest.raises(ValueError, match=f"{re.escape(alias)} differs from .*an output layer of its own"):
            load(write(tmp_path / f"{alias}.other", config, {**tensors, alias: tensors[name] + np.float32(1e-3)}))
        under = {alias if k == name else k: a for k, a in tensors.items()}
        computes(write(tmp_path / f"{alias}.only", config, under), case, tensors)
        if alias.endswith("weight"):
            with pytest.raises(ValueError, match="output layer is not the embedding"):
                load(write(tmp_path / f"{alias}.untied", {**config, "tie_word_embeddings": False}, tensors))


def test_a_pooler_is_optional(tmp_path):
    config, tensors = made("bert-hidden")
    assert load(write(tmp_path / "with", config, tensors))[0].pooler is not None
    less = {k: a for k, a in tensors.items() if "pooler" not in k}
    assert load(write(tmp_path / "without", config, less))[0].pooler is None
    computes(tmp_path / "without", "bert-hidden", tensors)
    config, tensors = made("bert-classes")
    with pytest.raises(ValueError, match="missing pooler.dense.weight"):
        load(write(tmp_path / "classes", config, {k: a for k, a in tensors.items() if "pooler" not in k}))


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float64])
@EVERY
def test_half_precision_files(case, kind, tmp_path):
    config, tensors = made(case)
    stored = {k: a.astype(kind) for k, a in tensors.items()}
    folder = write(tmp_path / "m", config, stored)
    computes(folder, case, stored)
    assert {a.dtype for a in parameters(load(folder)[0]).values()} == {np.dtype(np.float32)}
    assert {a.dtype for a in parameters(load(folder, "bfloat16")[0]).values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_what_is_loaded_belongs_to_the_model(tmp_path):
    config, tensors = made("gpt2")
    folder = write(tmp_path / "m", config, tensors)
    model = load(folder)[0]
    before = (folder / "model.safetensors").read_bytes()
    for p in model.parameters():
        p.copy_(np.zeros(p.shape))
    assert (folder / "model.safetensors").read_bytes() == before


def test_only_floating_point_weights(tmp_path):
    config, tensors = made("gpt2")
    tensors["h.0.mlp.c_fc.weight"] = tensors["h.0.mlp.c_fc.weight"].astype(np.int8)
    with pytest.raises(ValueError, match="h.0.mlp.c_fc.weight wants one of .* got int8"):
        load(write(tmp_path / "m", config, tensors))
    with pytest.raises(TypeError, match="got int32"):
        load(tmp_path / "m", np.int32)


# ── shards ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def shards(folder: Path, config: dict, tensors: Tensors) -> dict:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names = [f"model-0000{i + 1}-of-00003.safetensors" for i in range(3)]
    where = {k: names[i % 3] for i, k in enumerate(tensors)}
    for name in names:
        save_file({k: tensors[k] for k in tensors if where[k] == name}, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_shards(tmp_path):
    config, tensors = made("bert")
    index, folder = shards(tmp_path / "m", config, tensors), tmp_path / "m"
    computes(folder, "bert", tensors)
    name = next(iter(tensors))
    for change, message in (({name: "../m/model-00001-of-00003.safetensors"}, "files beside it"), ({name: 3}, "files beside it"),
                            ({name: "model-00009-of-00003.safetensors"}, "has no model-00009"),
                            ({"new": index["weight_map"][name]}, "new stands in")):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**index["weight_map"], **change}}))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({name: tensors[name]}, folder / sorted(set(index["weight_map"].values()) - {index["weight_map"][name]})[0])
    with pytest.raises(ValueError, match="in two shards"):
        load(folder)


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("change,message", [
    ({"model_type": "llama"}, "type 'llama'; wanted one of gpt2, bert"),
    ({"architectures": ["GPT2DoubleHeadsModel"]}, "GPT2DoubleHeadsModel"),
    ({"architectures": 3}, "architectures wants .*got 3"),
    ({"n_head": 3}, "3 heads do not divide a width of 16"),
    ({"n_layer": 3}, "missing h.2.ln_1.weight"),
    ({"n_layer": 1}, "unexpected h.1"),
    ({"n_layer": 10**12}, "asks for 1000000000000 layers"),
    ({"n_layer": 0}, "n_layer wants a whole number"),
    ({"n_layer": True}, "n_layer wants a whole number"),
    ({"vocab_size": 10**12}, r"wte.weight wants shape \(1000000000000, 16\), got \(50, 16\)"),
    ({"n_inner": 64}, "c_fc.weight wants shape"),
    ({"n_inner": None}, "c_fc.weight wants shape"),
    ({"activation_function": "relu"}, "'relu'"),
    ({"activation_function": "gelu"}, "wants activation_function 'gelu_new'"),
    ({"scale_attn_weights": False}, "scale_attn_weights True, got False"),
    ({"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx False, got True"),
    ({"resid_pdrop": 1.0}, "resid_pdrop"),
    ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon"),
    ({"add_cross_attention": True}, "add_cross_attention")])
def test_a_config_that_does_not_fit_is_refused_in_one_sentence(change, message, tmp_path):
    config, tensors = made("gpt2")
    with pytest.raises(ValueError, match=message) as e:
        load(write(tmp_path / "m", {**config, **change}, tensors))
    assert str(tmp_path / "m") in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("change,message", [
    ({"hidden_act": "gelu_new"}, "this library's BERT wants hidden_act 'gelu', got 'gelu_new'"),
    ({"position_embedding_type": "relative_key"}, "relative_key"),
    ({"is_decoder": True}, "is_decoder"),
    ({"architectures": ["BertForQuestionAnswering"]}, "BertForQuestionAnswering"),
    ({"architectures": ["BertModel"]}, "unexpected cls.predictions"),
    ({"type_vocab_size": 3}, "token_type_embeddings.weight wants shape")])
def test_a_config_of_bert_that_does_not_fit(change, message, tmp_path):
    config, tensors = made("bert")
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "m", {**config, **change}, tensors))


def test_dropout_is_the_largest_rate(tmp_path):
    assert load(write(tmp_path / "gpt2", *made("gpt2")))[0].config.dropout == 0.2
    assert load(write(tmp_path / "bert", *made("bert")))[0].config.dropout == 0.1


def test_missing_and_damaged_files(tmp_path):
    config, tensors = made("gpt2")
    with pytest.raises(FileNotFoundError, match="wanted a directory"):
        load(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="is a file"):
        load(str(tmp_path / "file"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
        load(tmp_path / "empty")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(FileNotFoundError, match="only pytorch_model.bin.*pickle.*convert it"):
        load(tmp_path / "empty")
    folder = write(tmp_path / "m", config, tensors)
    for text in ("", "{", "[]", "[" * 10**5, "\udcff"):
        (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match="config.json is damaged"):
            load(folder)


HOSTILE = {
    "offsets beyond the file": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 40]}},
    "offsets that run back": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
    "a shape of another size": {"a": {"dtype": "F32", "shape": [1 << 60, 1 << 60], "data_offsets": [0, 16]}},
    "overlap": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},
    "a gap": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}},
    "a negative size": {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
    "another kind": {"a": {"dtype": "F31", "shape": [4], "data_offsets": [0, 16]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [4]}},
    "a list": []}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused(name, tmp_path):
    head = json.dumps(HOSTILE[name]).encode()
    (tmp_path / "config.json").write_text(json.dumps(made("gpt2")[0]))
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(16))
    with pytest.raises(ValueError, match="is damaged"):
        load(tmp_path)


@given(st.data())
def test_a_damaged_file_never_does_more_than_raise(tmp_path_factory, data):
    folder = write(tmp_path_factory.mktemp("m"), *made("gpt2"))
    whole = (folder / "model.safetensors").read_bytes()
    if data.draw(st.booleans()):
        (folder / "model.safetensors").write_bytes(whole[:data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(ValueError, match="is damaged"):
            load(folder)
        return
    end = 8 + int.from_bytes(whole[:8], "little")                                # one byte of the header
    at, byte = data.draw(st.integers(0, end - 1)), data.draw(st.integers(0, 255))
    (folder / "model.safetensors").write_bytes(whole[:at] + bytes([byte]) + whole[at + 1:])
    try:
        model, _ = load(folder)
    except ValueError as e:
        assert str(folder) in str(e)
    else:
        assert outputs(model).shape == (2, 6, V)


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", [None, np.float16, ml_dtypes.bfloat16, np.float64])
@EVERY
def test_round_trip(case, kind, tmp_path):
    model, _ = load(write(tmp_path / "a", *made(case)))
    if kind is not None:
        model.to(dtype=kind)
    save(model, tmp_path / "b")
    again, _ = load(tmp_path / "b", kind)
    identical(parameters(model), parameters(again))
    assert again.config == model.config and type(again.head) is type(model.head) and (getattr(again, "pooler", None) is None) == (
        getattr(model, "pooler", None) is None)
    if kind is None:
        np.testing.assert_array_equal(outputs(model), outputs(again))
        computes(tmp_path / "b", case, made(case)[1])
    save(again, tmp_path / "c")                                                  # what was written once is written the same again
    assert snapshot(tmp_path / "b") == snapshot(tmp_path / "c")


@EVERY
def test_the_file_written_is_the_file_read(case, tmp_path):
    config, tensors = made(case)
    save(load(write(tmp_path / "a", config, tensors))[0], tmp_path / "b")
    strip = lambda d: {k.removeprefix("transformer.").removeprefix("bert."): a for k, a in d.items()}
    identical(strip(load_file(tmp_path / "b" / "model.safetensors")), strip(tensors))
    wrote = json.loads((tmp_path / "b" / "config.json").read_text())
    dropouts = {"resid_pdrop", "embd_pdrop", "attn_pdrop", "n_ctx"}
    assert {k: v for k, v in wrote.items() if k in config and k not in dropouts} == {k: v for k, v in config.items() if k not in dropouts}


def test_new_models_are_written_and_read(tmp_path):
    sizes = BERTConfig(V, T, 2, C, L, H, dropout=0.3)
    gpt = GPT(GPTConfig(V, T, C, L, H), seed=1)
    for i, model in enumerate((gpt, BERT(sizes, seed=1), BERT(sizes, head=None), BERT(sizes, pooler=True))):
        save(model, tmp_path / str(i))
        again, tokenizer = load(tmp_path / str(i))
        identical(parameters(model), parameters(again))
        assert tokenizer is None and again.config.dropout == model.config.dropout


def test_numbers_too_large_for_the_file_are_refused(tmp_path):
    model = GPT(GPTConfig(V, T, C, L, H))
    save(model, tmp_path / "m")
    before = snapshot(tmp_path / "m")
    model.blocks[1].mlp.up.weight.data[0, 0] = 1e6
    with pytest.raises(OverflowError, match="blocks.1.mlp.up.weight .* float16"):
        save(model, tmp_path / "m", dtype=np.float16)
    assert snapshot(tmp_path / "m") == before
    save(model, tmp_path / "m", dtype="bfloat16")
    with pytest.raises(OverflowError, match="float16"):
        load(tmp_path / "m", np.float16)


@pytest.mark.parametrize("nth", range(4))
@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("there", [True, False])
def test_an_interrupted_save_leaves_what_was_there(fault, nth, there, tmp_path, monkeypatch):
    path = tmp_path / "models" / "m"
    if there:
        save(GPT(GPTConfig(V, T, C, L, H)), path, tokenizer())
        (path / "README.md").write_text("mine")
    before, real, calls = snapshot(tmp_path), os.fsync, []

    def flush(f: int) -> None:
        calls.append(f)
        if len(calls) == nth + 1:
            raise fault
        real(f)
    monkeypatch.setattr(os, "fsync", flush)
    with pytest.raises(type(fault)) as e:
        save(BERT(BERTConfig(V, T, 2, C, 1, H)), path, tokenizer())
    assert snapshot(tmp_path) == before and len(calls) == nth + 1
    if isinstance(fault, OSError):
        assert e.value.errno == errno.ENOSPC and "what was there before is untouched" in str(e.value)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("fault", [OSError(errno.EACCES, "Permission denied"), KeyboardInterrupt()])
@pytest.mark.parametrize("nth", range(4))
def test_a_save_that_fails_between_two_moves_is_undone(nth, fault, links, tmp_path, monkeypatch):
    path = tmp_path / "m"
    save(GPT(GPTConfig(V, T, C, L, H)), path)                                    # no tokenizer: its files are new
    (path / "README.md").write_text("mine")
    before, real, calls = snapshot(tmp_path), os.replace, []

    def replace(a: Any, b: Any) -> None:
        calls.append(b)
        if len(calls) == nth + 1:
            raise fault
        real(a, b)

    def no_link(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links here")
    monkeypatch.setattr(os, "replace", replace)
    if not links:
        monkeypatch.setattr(os, "link", no_link)
    with pytest.raises(type(fault)):
        save(BERT(BERTConfig(V, T, 2, C, 1, H)), path, tokenizer())
    assert snapshot(tmp_path) == before
    monkeypatch.setattr(os, "replace", real)
    save(BERT(BERTConfig(V, T, 2, C, 1, H)), path, tokenizer())
    assert isinstance(load(path)[0], BERT) and (path / "README.md").read_text() == "mine"


def test_save_refuses_what_a_directory_cannot_hold(tmp_path):
    model = GPT(GPTConfig(V, T, C, L, H))
    edit.attach(model, LoRA(r=2))
    with pytest.raises(ValueError, match="lora is attached: .*merge.*save_adapter"):
        save(model, tmp_path / "m")
    edit.merge(model)
    save(model, tmp_path / "merged")
    edit.attach(model, BitFit())                                                 # trains the base itself: nothing stands beside it
    save(model, tmp_path / "bitfit")
    edit.detach(model)

    class Codes(Packed):
        shape = (C, C)
    model.blocks[0].attn.q.weight = Codes()
    with pytest.raises(ValueError, match="blocks.0.attn.q.weight is packed"):
        save(model, tmp_path / "m")
    model = GPT(GPTConfig(V, T, C, L, H))
    del model.blocks[1]
    with pytest.raises(ValueError, match="no longer what its config says"):
        save(model, tmp_path / "m")
    with pytest.raises(ValueError, match="wants a GPT or BERT, got a Linear"):
        save(Linear(2, 2, rng=np.random.default_rng(0)), tmp_path / "m")
    assert not (tmp_path / "m").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        save(GPT(GPTConfig(V, T, C, L, H)), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# ── tokenizers, heads, names ─────────────────────────────────────────────────────────────────────────────────────────
def tokenizer() -> Tokenizer:
    out = Tokenizer(models.BPE())
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.train_from_iterator(["one two three, two three four"] * 3, trainers.BpeTrainer(
        vocab_size=V, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<|endoftext|>"], show_progress=False))
    return out


def test_tokenizer_round_trip(tmp_path):
    kept = tokenizer()
    save(GPT(GPTConfig(V, T, C, L, H)), tmp_path / "m", kept)
    _, again = load(tmp_path / "m")
    assert json.loads(again.to_str()) == json.loads(kept.to_str())
    text = "two three one, four <|endoftext|>"
    assert again.encode(text).ids == kept.encode(text).ids
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["pad_token_id"], config["eos_token_id"]) == (0, 5)
    (tmp_path / "m" / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match="tokenizer.json is damaged"):
        load(tmp_path / "m")


def test_names_of_classes_pass_through_and_go_with_the_head(tmp_path):
    model, _ = load(write(tmp_path / "a", *made("bert-classes")))
    save(model, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["id2label"] == {"0": "a", "1": "b", "2": "c"}
    save(classifier(model, 5), tmp_path / "b")
    assert len(json.loads((tmp_path / "b" / "config.json").read_text())["id2label"]) == 5


@pytest.mark.parametrize("case", ["gpt2", "bert", "bert-hidden", "bert-classes"])
def test_a_new_head(case, tmp_path):
    folder = write(tmp_path / "a", *made(case))
    model = classifier(load(folder, np.float64)[0], classes=20, seed=3)
    assert outputs(model).shape == (2, 20) and {a.dtype for a in parameters(model).values()} == {np.dtype(np.float64)}
    identical(parameters(model), parameters(classifier(load(folder, np.float64)[0], 20, seed=3)))
    other = parameters(classifier(load(folder, np.float64)[0], 20, seed=4))
    assert (other["head.out.weight"] != parameters(model)["head.out.weight"]).any()
    assert edit.is_head(model, "head.out.weight")
    save(model, tmp_path / "b")
    again, _ = load(tmp_path / "b", np.float64)
    identical(parameters(model), parameters(again))
    assert not edit.is_head(again, "head.out.weight")                            # read from a file, it is part of the model
    np.testing.assert_array_equal(outputs(model), outputs(again))


def test_a_new_head_comes_before_what_is_attached():
    model = GPT(GPTConfig(V, T, C, L, H))
    edit.attach(model, LoRA(r=2))
    with pytest.raises(ValueError, match="put the head on first"):
        classifier(model, 3)
    for bad in (0, -1, 2.0, "2"):
        with pytest.raises(ValueError, match="at least one class"):
            classifier(GPT(GPTConfig(V, T, C, L, H)), bad)
    with pytest.raises(TypeError, match="takes no new head"):
        classifier(Linear(2, 2, rng=np.random.default_rng(0)), 3)


def test_models_that_ship_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "ASSETS", tmp_path / "assets")
    save(GPT(GPTConfig(V, T, C, L, H)), tmp_path / "assets" / "base-gpt", tokenizer())
    save(BERT(BERTConfig(V, T, 2, C, L, H)), tmp_path / "assets" / "base-bert")
    (tmp_path / "assets" / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    assert isinstance(load("base-gpt")[0], GPT) and isinstance(load("base-bert")[0], BERT)
    assert load("base-gpt")[1].encode("[MASK]").ids != [4]                       # in a text it is text, as in data.shipped_tokenizer
    for name in ("base-llama", "other"):
        with pytest.raises(FileNotFoundError, match=f"'{name}'.*models that ship: base-bert, base-gpt"):
            load(name)
    with pytest.raises(FileNotFoundError, match="wanted a directory"):
        load("./base-gpt")
    save(BERT(BERTConfig(V, T, 2, C, 1, H)), "base-gpt")                         # a directory here goes first
    assert isinstance(load("base-gpt")[0], BERT)


def test_the_layout_is_the_models(tmp_path):
    "Every tensor has one place, every place one tensor, and the parts of a fused tensor cover it."
    small, masked = GPTConfig(V, T, C, L, H), BERTConfig(V, T, 2, C, L, H)
    for family, plan in ((GPT2Family(), layout.Plan(small, "lm")), (GPT2Family(), layout.Plan(small, "classes", 3)),
                         (BERTFamily(), layout.Plan(masked, "mlm", pooler=True)), (BERTFamily(), layout.Plan(masked, None))):
        model, places = family.build(plan), family.table(plan)
        assert {n: p.shape for n, p in model.named_parameters().items()} == {n: p.shape for n, p in places.items()}
        assert sum(int(np.prod(s)) for s in {p.name: p.file_shape for p in places.values()}.values()) == sum(p.size for p in model.parameters())
        assert family.plan_of(model) == plan
        rng = np.random.default_rng(0)
        ours = {n: rng.standard_normal(p.shape) for n, p in places.items()}
        stored = layout.file_tensors(places, ours)
        identical({n: np.ascontiguousarray(p.read(stored[p.name])) for n, p in places.items()}, ours)
    assert not any(a.any() for n, a in parameters(GPT2Family().build(layout.Plan(small, "lm"))).items() if "norm" not in n)

"""Directories in and out, without torch.

Two references compute what a file says, from the file's own layout: x W + b with W stored (in, out) for GPT-2,
x Wᵀ + b for BERT. `computes` holds a loader to them. A test plants errors in the loader, and `computes` must
reject each of them.
"""
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
from helpers import dev, host, wrong_answers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tinyft import edit
from tinyft.formats import classifier, huggingface, load, save
from tinyft.formats.bert import BERTFamily
from tinyft.formats.distilbert import DistilBERTFamily
from tinyft.formats.gpt2 import GPT2Family
from tinyft.formats.layout import FileTensor, Plan, Table, file_tensors
from tinyft.formats.roberta import RoBERTaFamily
from tinyft.methods import BitFit, LoRA
from tinyft.models import BERT, GPT, BERTConfig, GPTConfig, Llama, LlamaConfig
from tinyft.nn import Linear, Packed

# Vocabulary, positions, width, layers, heads, feed-forward width. F = C makes every matrix of a block square, so that a
# wrong transpose has the right shape.
V, T, C, L, H, F = 50, 12, 16, 2, 2, 16
IDS = np.array([[3, 1, 4, 1, 5, 9], [2, 6, 49, 3, 5, 8]])
TYPES = np.array([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
SMALL_GPT = GPTConfig(V, T, C, L, H)
SMALL_BERT = BERTConfig(V, T, 2, C, L, H)
SMALL_DISTILBERT = BERTConfig(V, T, 0, C, L, H, pooler_activation="relu")
SMALL_ROBERTA = BERTConfig(V, T, 1, C, L, H, first_position=2, keep_pooler=False)
ONE_LAYER = BERTConfig(V, T, 2, C, 1, H)
Tensors = dict[str, np.ndarray]


# ── files as other libraries write them ──────────────────────────────────────────────────────────────────────────────
class Draw:
    """Draws the float32 tensors of a file: d(3, 4) is a matrix of standard deviation 0.4."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def __call__(self, *shape: int) -> np.ndarray:
        return (self.rng.standard_normal(shape) * 0.4).astype(np.float32)


def gpt2_file(rng: np.random.Generator, head: str = "lm") -> tuple[dict, Tensors]:
    """config.json and tensors, named as the hub names them: no prefix."""
    draw = Draw(rng)
    out = {"wte.weight": draw(V, C), "wpe.weight": draw(T, C), "ln_f.weight": draw(C), "ln_f.bias": draw(C)}
    linear_maps = {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, F), "mlp.c_proj": (F, C)}
    for i in range(L):
        for name, (in_features, out_features) in linear_maps.items():
            out[f"h.{i}.{name}.weight"] = draw(in_features, out_features)
            out[f"h.{i}.{name}.bias"] = draw(out_features)
        for j in (1, 2):
            for end in ("weight", "bias"):
                out[f"h.{i}.ln_{j}.{end}"] = draw(C)
    config = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"],
        "vocab_size": V, "n_positions": T, "n_ctx": T, "n_embd": C, "n_layer": L, "n_head": H, "n_inner": F,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.1, "embd_pdrop": 0.0, "attn_pdrop": 0.2}
    if head == "classes":
        out["score.weight"] = draw(3, C)
        config["architectures"] = ["GPT2ForSequenceClassification"]
        config["id2label"] = {"0": "a", "1": "b", "2": "c"}
    return config, out


def bert_file(rng: np.random.Generator, head: str | None = "mlm") -> tuple[dict, Tensors]:
    """config.json and tensors, named as transformers names them: with the prefix `bert.`."""
    draw = Draw(rng)
    rows = {"word": V, "position": T, "token_type": 2}
    out = {f"bert.embeddings.{kind}_embeddings.weight": draw(n, C) for kind, n in rows.items()}

    def linear(name: str, in_features: int, out_features: int) -> None:
        out[f"{name}.weight"] = draw(out_features, in_features)
        out[f"{name}.bias"] = draw(out_features)

    def norm(name: str) -> None:
        out[f"{name}.weight"] = draw(C)
        out[f"{name}.bias"] = draw(C)

    norm("bert.embeddings.LayerNorm")
    for i in range(L):
        layer = f"bert.encoder.layer.{i}"
        for kind in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{kind}", C, C)
        linear(f"{layer}.attention.output.dense", C, C)
        linear(f"{layer}.intermediate.dense", C, F)
        linear(f"{layer}.output.dense", F, C)
        norm(f"{layer}.attention.output.LayerNorm")
        norm(f"{layer}.output.LayerNorm")
    architecture = {"mlm": "BertForMaskedLM", "classes": "BertForSequenceClassification", None: "BertModel"}[head]
    config = {
        "model_type": "bert", "architectures": [architecture],
        "vocab_size": V, "max_position_embeddings": T, "type_vocab_size": 2, "hidden_size": C, "num_hidden_layers": L,
        "intermediate_size": F, "num_attention_heads": H,
        "hidden_act": "gelu", "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1}
    if head == "mlm":
        linear("cls.predictions.transform.dense", C, C)
        norm("cls.predictions.transform.LayerNorm")
        out["cls.predictions.bias"] = draw(V)
    else:
        linear("bert.pooler.dense", C, C)
    if head == "classes":
        linear("classifier", C, 3)
        config["id2label"] = {"0": "a", "1": "b", "2": "c"}
    return config, out


# ── what a file computes, in float64 ─────────────────────────────────────────────────────────────────────────────────
class Reference:
    """The parts of a forward pass, on the tensors of a file."""

    def __init__(self, tensors: Tensors, eps: float, transposed: bool):
        self.t = {name: a.astype(np.float64) for name, a in tensors.items()}
        self.eps = eps
        self.transposed = transposed                       # True if linear weights are stored (in, out)

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        """x Wᵀ + b"""
        W = self.t[f"{name}.weight"]
        return x @ (W if self.transposed else W.T) + self.t[f"{name}.bias"]

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        """(x - mean) / √(var + ε) · w + b"""
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt(x.var(-1, keepdims=True) + self.eps)
        return scaled * self.t[f"{name}.weight"] + self.t[f"{name}.bias"]


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> np.ndarray:
    """Attention, one row of the batch and one head at a time."""
    out = np.zeros_like(q)
    D = C // H
    for b in range(len(q)):
        for j in range(0, C, D):
            scores = q[b, :, j:j + D] @ k[b, :, j:j + D].T / math.sqrt(D)
            if causal:
                scores = np.where(np.tri(len(scores)) > 0, scores, -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out[b, :, j:j + D] = p / p.sum(-1, keepdims=True) @ v[b, :, j:j + D]
    return out


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """GPT-2's GELU."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu(x: np.ndarray) -> np.ndarray:
    """BERT's GELU."""
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def run_gpt2(tensors: Tensors) -> np.ndarray:
    """The output of a GPT-2 file on IDS."""
    f = Reference(tensors, eps=1e-5, transposed=True)
    x = f.t["wte.weight"][IDS] + f.t["wpe.weight"][:IDS.shape[1]]
    for i in range(L):
        fused = f.linear(f.norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
        q, k, v = np.split(fused, 3, axis=-1)
        x = x + f.linear(attention(q, k, v, causal=True), f"h.{i}.attn.c_proj")
        up = f.linear(f.norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        x = x + f.linear(gelu_tanh(up), f"h.{i}.mlp.c_proj")
    x = f.norm(x, "ln_f")
    if "score.weight" in f.t:
        return x[:, -1] @ f.t["score.weight"].T
    return x @ f.t["wte.weight"].T


def run_bert(tensors: Tensors) -> np.ndarray:
    """The output of a BERT file on IDS and TYPES."""
    f = Reference({name.removeprefix("bert."): a for name, a in tensors.items()}, eps=1e-12, transposed=False)
    word = f.t["embeddings.word_embeddings.weight"]
    position = f.t["embeddings.position_embeddings.weight"]
    token_type = f.t["embeddings.token_type_embeddings.weight"]
    x = f.norm(word[IDS] + position[:IDS.shape[1]] + token_type[TYPES], "embeddings.LayerNorm")
    for i in range(L):
        layer = f"encoder.layer.{i}"
        q, k, v = [f.linear(x, f"{layer}.attention.self.{kind}") for kind in ("query", "key", "value")]
        attended = f.linear(attention(q, k, v, causal=False), f"{layer}.attention.output.dense")
        x = f.norm(x + attended, f"{layer}.attention.output.LayerNorm")
        up = gelu(f.linear(x, f"{layer}.intermediate.dense"))
        x = f.norm(x + f.linear(up, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    if "classifier.weight" in f.t:
        return f.linear(np.tanh(f.linear(x[:, 0], "pooler.dense")), "classifier")
    if "cls.predictions.bias" not in f.t:
        return x
    x = gelu(f.linear(x, "cls.predictions.transform.dense"))
    return f.norm(x, "cls.predictions.transform.LayerNorm") @ word.T + f.t["cls.predictions.bias"]


# Name -> (makes the file, its head, computes its output).
CASES: dict[str, tuple[Callable, Any, Callable]] = {
    "gpt2": (gpt2_file, "lm", run_gpt2),
    "gpt2-classes": (gpt2_file, "classes", run_gpt2),
    "bert": (bert_file, "mlm", run_bert),
    "bert-classes": (bert_file, "classes", run_bert),
    "bert-hidden": (bert_file, None, run_bert),
}
EVERY = pytest.mark.parametrize("case", CASES)


def made(case: str, seed: int = 0) -> tuple[dict, Tensors]:
    """config.json and tensors of a case."""
    make, head, _ = CASES[case]
    return make(np.random.default_rng(seed), head)


def write(folder: Path, config: dict, tensors: Tensors) -> Path:
    """Write a directory without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def outputs(model: Any) -> np.ndarray:
    """The model's output on IDS, for a BERT with TYPES."""
    if isinstance(model, BERT):
        return host(model(dev(IDS), token_type_ids=dev(TYPES)))
    return host(model(dev(IDS)))


def computes(folder: Path, case: str, tensors: Tensors, tolerance: float = 1e-9) -> None:
    """The model that load makes of this directory computes what the file says."""
    model, _ = load(folder, np.float64)
    reference = CASES[case][2]
    want = reference(tensors)
    np.testing.assert_allclose(outputs(model), want, rtol=0, atol=tolerance * np.abs(want).max())


def snapshot(folder: Path) -> dict[str, bytes]:
    """{path: content} of every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def parameters(model: Any) -> Tensors:
    """{name: host array} of a model's parameters."""
    return {name: host(p) for name, p in model.named_parameters().items()}


def identical(a: Tensors, b: Tensors) -> None:
    """Same names, dtypes, shapes and bytes."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@EVERY
def test_the_model_computes_what_the_file_says(case, tmp_path):
    config, tensors = made(case)
    computes(write(tmp_path / "m", config, tensors), case, tensors)


def with_other_prefix(case: str, name: str) -> str:
    """The name without `bert.`, or with `transformer.` where GPT-2's classes write it."""
    if "bert" in case:
        return name.removeprefix("bert.")
    return name if name.startswith("score.") else f"transformer.{name}"


@EVERY
def test_a_file_may_have_the_prefix_or_not(case, tmp_path):
    """Both spellings load. A file with both spellings of one tensor is refused."""
    config, tensors = made(case)
    other = {with_other_prefix(case, name): a for name, a in tensors.items()}
    computes(write(tmp_path / "m", config, other), case, tensors)
    both = {**tensors, **other, "wte.weight": tensors.get("wte.weight", np.ones(1))}
    with pytest.raises(ValueError, match="two spellings"):
        load(write(tmp_path / "both", config, both))


@EVERY
def test_without_architectures_the_tensors_decide_on_the_head(case, tmp_path):
    config, tensors = made(case)
    del config["architectures"]
    computes(write(tmp_path / "m", config, tensors), case, tensors)


# ── planted errors ───────────────────────────────────────────────────────────────────────────────────────────────────
def swap(first: str, second: str) -> Callable[[Table], Table]:
    """An error: two tensors of the table are exchanged. # stands for the number of the block."""
    def wrong(table: Table) -> Table:
        out = dict(table)
        for i in range(L):
            for end in ("weight", "bias"):
                a = f"{first}.{end}".replace("#", str(i))
                b = f"{second}.{end}".replace("#", str(i))
                if a in out and b in out:
                    out[a], out[b] = table[b], table[a]
        return out
    return wrong


def changed(pattern: str, **fields: Any) -> Callable[[Table], Table]:
    """An error: the entries whose names match have other fields."""
    def wrong(table: Table) -> Table:
        matching = {name for name in table if re.fullmatch(pattern, name)}
        assert matching
        out = dict(table)
        for name in matching:
            out[name] = FileTensor(**{**vars(table[name]), **fields})
        return out
    return wrong


class Interleaved(FileTensor):
    """q, k and v fused head by head, as other checkpoints have them. The shapes fit; the model is another."""

    def read(self, stored):
        whole = stored.T if self.transposed else stored
        if self.third is None:
            return whole
        by_head = whole.reshape(H, 3, C // H, *whole.shape[1:])
        return by_head[:, self.third].reshape(self.shape)


def interleaved(table: Table) -> Table:
    """An error: fused tensors are read as interleaved."""
    return {name: Interleaved(**vars(entry)) for name, entry in table.items()}


def reversed_blocks(table: Table) -> Table:
    """An error: the first block is read as the last."""
    def other_block(name: str) -> str:
        return re.sub(r"^blocks\.(\d)", lambda match: f"blocks.{L - 1 - int(match[1])}", name)
    return {other_block(name): entry for name, entry in table.items()}


WRONG: dict[str, dict[str, Callable[[Table], Table]]] = {
    "gpt2": {
        "attn.o not transposed": changed(r".*attn\.o\.weight", transposed=False),
        "mlp.up not transposed": changed(r".*mlp\.up\.weight", transposed=False),
        "mlp.down not transposed": changed(r".*mlp\.down\.weight", transposed=False),
        "q and k exchanged": swap("blocks.#.attn.q", "blocks.#.attn.k"),
        "k and v exchanged": swap("blocks.#.attn.k", "blocks.#.attn.v"),
        "the bias of v is that of k": changed(r".*attn\.v\.bias", third=1),
        "interleaved heads": interleaved,
        "norms exchanged": swap("blocks.#.norm1", "blocks.#.norm2"),
        "up and down exchanged": swap("blocks.#.mlp.up", "blocks.#.mlp.down"),
        "the last norm is a block's": changed(r"norm\.weight", name="h.1.ln_2.weight"),
        "blocks in reverse": reversed_blocks,
    },
    "bert": {
        "attn.o transposed": changed(r".*attn\.o\.weight", transposed=True),
        "attn.q transposed": changed(r".*attn\.q\.weight", transposed=True),
        "the head transposed": changed(r"head\.dense\.weight", transposed=True),
        "q and k exchanged": swap("blocks.#.attn.q", "blocks.#.attn.k"),
        "k and v exchanged": swap("blocks.#.attn.k", "blocks.#.attn.v"),
        "norms exchanged": swap("blocks.#.norm1", "blocks.#.norm2"),
        "the head's norm exchanged": swap("norm0", "head.norm"),
        "up and down exchanged": swap("blocks.#.mlp.up", "blocks.#.mlp.down"),
        "blocks in reverse": reversed_blocks,
    },
}


@wrong_answers
@pytest.mark.parametrize("family, error", [(family, error) for family, errors in WRONG.items() for error in errors])
def test_planted_errors_are_caught(family, error, tmp_path, monkeypatch):
    """By the name of a tensor that is left over, or by the output."""
    config, tensors = made(family)
    folder = write(tmp_path / "m", config, tensors)
    computes(folder, family, tensors)
    cls = {"gpt2": GPT2Family, "bert": BERTFamily}[family]
    right = cls.table

    def wrong_table(self: Any, plan: Plan) -> Table:
        return WRONG[family][error](right(self, plan))

    monkeypatch.setattr(cls, "table", wrong_table)
    with pytest.raises((AssertionError, ValueError)) as caught:
        computes(folder, family, tensors)
    assert caught.type is AssertionError or "unexpected" in str(caught.value)


@pytest.mark.parametrize("case, key, value", [
    ("gpt2", "layer_norm_epsilon", 1e-3),
    ("gpt2", "n_head", 4),
    ("bert", "layer_norm_eps", 1e-5),
    ("bert", "num_attention_heads", 8),
])
def test_settings_reach_the_model(case, key, value, tmp_path):
    """A model with another setting computes another output."""
    config, tensors = made(case)
    with pytest.raises(AssertionError, match="Not equal"):
        computes(write(tmp_path / "m", {**config, key: value}, tensors), case, tensors)


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def with_old_names(name: str) -> str:
    """gamma and beta for the weight and the bias of a layer norm."""
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def test_gamma_and_beta_are_weight_and_bias_of_a_layer_norm(tmp_path):
    """Only after `LayerNorm.`, and not beside a weight of the same norm."""
    config, tensors = made("bert")
    old = {with_old_names(name): a for name, a in tensors.items()}
    assert sum(name.endswith("gamma") for name in old) == 2 * L + 2
    computes(write(tmp_path / "m", config, old), "bert", tensors)
    both = {**tensors, "bert.embeddings.LayerNorm.gamma": np.ones(C, np.float32)}
    with pytest.raises(ValueError, match="LayerNorm.gamma are two spellings|LayerNorm.weight are two spellings"):
        load(write(tmp_path / "both", config, both))
    with pytest.raises(ValueError, match="unexpected other.gamma"):
        load(write(tmp_path / "other", config, {**tensors, "other.gamma": np.ones(C, np.float32)}))


def test_causal_masks_are_skipped(tmp_path):
    """`attn.bias` is a mask; `attn.c_attn.bias` is a parameter and must be there."""
    config, tensors = made("gpt2")
    masks = {f"h.{i}.attn.bias": np.tril(np.ones((1, 1, T, T), np.uint8)) for i in range(L)}
    masks["h.0.attn.masked_bias"] = np.array(-1e4)
    computes(write(tmp_path / "gpt2", config, tensors | masks), "gpt2", tensors)
    del tensors["h.0.attn.c_attn.bias"]
    with pytest.raises(ValueError, match="missing h.0.attn.c_attn.bias"):
        load(write(tmp_path / "less", config, tensors | masks))


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "BertForPreTraining"])
def test_positions_and_the_next_sentence_head_are_skipped(architecture, tmp_path):
    config, tensors = made("bert")
    config["architectures"] = [architecture]
    more = {
        "bert.embeddings.position_ids": np.arange(T)[None],
        "cls.seq_relationship.weight": np.ones((2, C), np.float32),
        "cls.seq_relationship.bias": np.ones(2, np.float32)}
    computes(write(tmp_path / "m", config, tensors | more), "bert", tensors)


@pytest.mark.parametrize("case, alias, name", [
    ("gpt2", "lm_head.weight", "wte.weight"),
    ("bert", "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    ("bert", "cls.predictions.decoder.bias", "cls.predictions.bias"),
])
def test_a_tied_tensor_may_have_either_name_or_both(case, alias, name, tmp_path):
    """Both names must hold the same values, and an output layer of its own is refused."""
    config, tensors = made(case)
    computes(write(tmp_path / "same", config, {**tensors, alias: tensors[name].copy()}), case, tensors)
    with pytest.raises(ValueError, match=f"{re.escape(alias)} differs from .*an output layer of its own"):
        load(write(tmp_path / "other", config, {**tensors, alias: tensors[name] + np.float32(1e-3)}))
    renamed = {alias if key == name else key: a for key, a in tensors.items()}
    computes(write(tmp_path / "only", config, renamed), case, tensors)
    if alias.endswith("weight"):
        with pytest.raises(ValueError, match="output layer is not the embedding"):
            load(write(tmp_path / "untied", {**config, "tie_word_embeddings": False}, tensors))


def test_a_pooler_is_optional_except_for_a_classifier(tmp_path):
    config, tensors = made("bert-hidden")
    assert load(write(tmp_path / "with", config, tensors))[0].pooler is not None
    without = {name: a for name, a in tensors.items() if "pooler" not in name}
    assert load(write(tmp_path / "without", config, without))[0].pooler is None
    computes(tmp_path / "without", "bert-hidden", tensors)
    config, tensors = made("bert-classes")
    without = {name: a for name, a in tensors.items() if "pooler" not in name}
    with pytest.raises(ValueError, match="missing pooler.dense.weight"):
        load(write(tmp_path / "classes", config, without))


# ── dtypes ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
@EVERY
def test_files_of_other_dtypes(case, dtype, tmp_path):
    """Read without rounding; the model has float32 unless another dtype is asked for."""
    config, tensors = made(case)
    stored = {name: a.astype(dtype) for name, a in tensors.items()}
    folder = write(tmp_path / "m", config, stored)
    computes(folder, case, stored)
    default = parameters(load(folder)[0])
    half = parameters(load(folder, "bfloat16")[0])
    assert {a.dtype for a in default.values()} == {np.dtype(np.float32)}
    assert {a.dtype for a in half.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_writing_to_a_loaded_model_leaves_the_file_alone(tmp_path):
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
INDEX = "model.safetensors.index.json"


def write_shards(folder: Path, config: dict, tensors: Tensors) -> dict[str, str]:
    """Write a directory with three shards. Returns {tensor: file}."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    files = [f"model-0000{i + 1}-of-00003.safetensors" for i in range(3)]
    file_of = {name: files[i % 3] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name in tensors if file_of[name] == file}, folder / file)
    write_index(folder, file_of)
    return file_of


def write_index(folder: Path, file_of: dict) -> None:
    """Write the index of a directory with shards."""
    index = {"metadata": {"total_size": 1}, "weight_map": file_of}
    (folder / INDEX).write_text(json.dumps(index))


def test_shards(tmp_path):
    """Read as one file would be. An index that disagrees with the shards, or leads outside, is refused."""
    config, tensors = made("bert")
    folder = tmp_path / "m"
    file_of = write_shards(folder, config, tensors)
    computes(folder, "bert", tensors)
    name = next(iter(tensors))
    faults = [
        ({name: "../m/model-00001-of-00003.safetensors"}, "files beside it"),
        ({name: 3}, "files beside it"),
        ({name: "model-00009-of-00003.safetensors"}, "has no model-00009"),
        ({"new": file_of[name]}, "new stands in"),
    ]
    absurd = ["", ".", "..", "/dev/zero", "a/b.safetensors", "a\\b.safetensors", "a\0b.safetensors", "a\nb.safetensors",
              "é" * 300 + ".safetensors", ".safetensors/", [], {}, None, True]
    faults += [({name: shard}, "files beside it|has no ") for shard in absurd]
    for change, message in faults:
        write_index(folder, {**file_of, **change})
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            load(folder)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
    write_index(folder, file_of)
    os.mkfifo(folder / "pipe.safetensors")                  # opening it would wait
    (folder / "endless.safetensors").symlink_to("/dev/zero")
    for shard in ("pipe.safetensors", "endless.safetensors"):
        write_index(folder, {**file_of, name: shard})
        with pytest.raises(FileNotFoundError, match=f"has no {shard}"):
            load(folder)
    write_index(folder, file_of)
    other_file = min(set(file_of.values()) - {file_of[name]})
    save_file({name: tensors[name]}, folder / other_file)
    with pytest.raises(ValueError, match="in two shards"):
        load(folder)


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("change, message", [
    ({"model_type": "gpt_neo"}, "type 'gpt_neo'; wanted one of gpt2, bert"),
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
    ({"add_cross_attention": True}, "add_cross_attention"),
])
def test_a_config_that_does_not_fit_is_refused_in_one_sentence(change, message, tmp_path):
    config, tensors = made("gpt2")
    with pytest.raises(ValueError, match=message) as e:
        load(write(tmp_path / "m", {**config, **change}, tensors))
    assert str(tmp_path / "m") in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("change, message", [
    ({"hidden_act": "gelu_new"}, "this library's BERT wants hidden_act 'gelu' or 'gelu_python', got 'gelu_new'"),
    ({"position_embedding_type": "relative_key"}, "relative_key"),
    ({"is_decoder": True}, "is_decoder"),
    ({"architectures": ["BertForQuestionAnswering"]}, "BertForQuestionAnswering"),
    ({"architectures": ["BertModel"]}, "unexpected cls.predictions"),
    ({"type_vocab_size": 3}, "token_type_embeddings.weight wants shape"),
])
def test_a_config_of_bert_that_does_not_fit_is_refused(change, message, tmp_path):
    config, tensors = made("bert")
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "m", {**config, **change}, tensors))


def test_dropout_is_the_largest_rate(tmp_path):
    assert load(write(tmp_path / "gpt2", *made("gpt2")))[0].config.dropout == 0.2
    assert load(write(tmp_path / "bert", *made("bert")))[0].config.dropout == 0.1


def test_missing_files_are_named(tmp_path):
    config, _ = made("gpt2")
    with pytest.raises(FileNotFoundError, match="wanted a directory"):
        load(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="is a file"):
        load(str(tmp_path / "file"))
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load(folder)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(FileNotFoundError, match="only pytorch_model.bin.*pickle.*convert it"):
        load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 10**5, "\udcff"], ids=["empty", "open", "list", "deep", "bytes"])
def test_a_damaged_config_is_refused(text, tmp_path):
    folder = write(tmp_path / "m", *made("gpt2"))
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="config.json is damaged"):
        load(folder)


def entry(dtype: str = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict:
    """One tensor of a safetensors header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE = {
    "offsets beyond the file": {"a": entry(offsets=(0, 1 << 40))},
    "offsets that run back": {"a": entry(offsets=(16, 0))},
    "a shape of another size": {"a": entry(shape=(1 << 60, 1 << 60))},
    "overlap": {"a": entry(), "b": entry()},
    "a gap": {"a": entry(shape=(2,), offsets=(8, 16))},
    "a negative size": {"a": entry(shape=(-4,))},
    "another dtype": {"a": entry(dtype="F31")},
    "no offsets": {"a": {"dtype": "F32", "shape": [4]}},
    "a list": [],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused(name, tmp_path):
    header = json.dumps(HOSTILE[name]).encode()
    (tmp_path / "config.json").write_text(json.dumps(made("gpt2")[0]))
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(ValueError, match="is damaged"):
        load(tmp_path)


@given(st.data())
def test_a_truncated_file_is_refused(tmp_path_factory, data):
    folder = write(tmp_path_factory.mktemp("m"), *made("gpt2"))
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match="is damaged"):
        load(folder)


@given(st.data())
def test_a_changed_byte_of_the_header_never_does_more_than_raise(tmp_path_factory, data):
    folder = write(tmp_path_factory.mktemp("m"), *made("gpt2"))
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    end_of_header = 8 + int.from_bytes(content[:8], "little")
    position = data.draw(st.integers(0, end_of_header - 1))
    content[position] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        model, _ = load(folder)
    except ValueError as e:
        assert str(folder) in str(e)
    else:
        assert outputs(model).shape == (2, 6, V)


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("dtype", [None, np.float16, ml_dtypes.bfloat16, np.float64])
@EVERY
def test_round_trip(case, dtype, tmp_path):
    """A saved model is loaded bitwise; saving it again writes the same bytes."""
    model, _ = load(write(tmp_path / "a", *made(case)))
    if dtype is not None:
        model.to(dtype=dtype)
    save(model, tmp_path / "b")
    again, _ = load(tmp_path / "b", dtype)
    identical(parameters(model), parameters(again))
    assert again.config == model.config
    assert type(again.head) is type(model.head)
    if isinstance(model, BERT):
        assert (again.pooler is None) == (model.pooler is None)
    if dtype is None:
        np.testing.assert_array_equal(outputs(model), outputs(again))
        computes(tmp_path / "b", case, made(case)[1])
    save(again, tmp_path / "c")
    assert snapshot(tmp_path / "b") == snapshot(tmp_path / "c")


def without_prefix(tensors: Tensors) -> Tensors:
    """The tensors without the prefixes of both families."""
    return {name.removeprefix("transformer.").removeprefix("bert."): a for name, a in tensors.items()}


@EVERY
def test_the_file_written_is_the_file_read(case, tmp_path):
    """Except for dropout: the model has one rate, the file has three."""
    config, tensors = made(case)
    save(load(write(tmp_path / "a", config, tensors))[0], tmp_path / "b")
    stored = load_file(tmp_path / "b" / "model.safetensors")
    identical(without_prefix(stored), without_prefix(tensors))
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    others = config.keys() - {"resid_pdrop", "embd_pdrop", "attn_pdrop", "n_ctx"}
    assert {key: written.get(key) for key in others} == {key: config[key] for key in others}


def test_new_models_are_written_and_read(tmp_path):
    sizes = BERTConfig(V, T, 2, C, L, H, dropout=0.3)
    new = [GPT(SMALL_GPT, seed=1), BERT(sizes, seed=1), BERT(sizes, head=None), BERT(sizes, pooler=True)]
    for i, model in enumerate(new):
        save(model, tmp_path / str(i))
        again, tokenizer = load(tmp_path / str(i))
        identical(parameters(model), parameters(again))
        assert tokenizer is None
        assert again.config.dropout == model.config.dropout


def test_values_too_large_for_the_file_are_refused(tmp_path):
    """The error names the tensor, and the directory keeps its files."""
    model = GPT(SMALL_GPT)
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
@pytest.mark.parametrize("exists", [True, False])
def test_an_interrupted_save_leaves_the_directory_as_it_was(fault, nth, exists, tmp_path, monkeypatch):
    """The fault strikes while the nth file is flushed to the disk."""
    path = tmp_path / "models" / "m"
    if exists:
        save(GPT(SMALL_GPT), path, tokenizer())
        (path / "README.md").write_text("mine")
    before = snapshot(tmp_path)
    real = os.fsync
    calls = []

    def flush(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == nth + 1:
            raise fault
        real(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    with pytest.raises(type(fault)) as e:
        save(BERT(ONE_LAYER), path, tokenizer())
    assert snapshot(tmp_path) == before
    assert len(calls) == nth + 1
    if isinstance(fault, OSError):
        assert e.value.errno == errno.ENOSPC
        assert "what was there before is untouched" in str(e.value)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("fault", [OSError(errno.EACCES, "Permission denied"), KeyboardInterrupt()])
@pytest.mark.parametrize("nth", range(4))
def test_a_save_that_fails_between_two_moves_is_undone(nth, fault, links, tmp_path, monkeypatch):
    """The fault strikes while the nth file is moved; also on a file system without hard links."""
    path = tmp_path / "m"
    save(GPT(SMALL_GPT), path)                             # without a tokenizer: its files are new
    (path / "README.md").write_text("mine")
    before = snapshot(tmp_path)
    real = os.replace
    calls = []

    def replace(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == nth + 1:
            raise fault
        real(source, target)

    def no_link(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "replace", replace)
    if not links:
        monkeypatch.setattr(os, "link", no_link)
    with pytest.raises(type(fault)):
        save(BERT(ONE_LAYER), path, tokenizer())
    assert snapshot(tmp_path) == before
    monkeypatch.setattr(os, "replace", real)
    save(BERT(ONE_LAYER), path, tokenizer())
    assert isinstance(load(path)[0], BERT)
    assert (path / "README.md").read_text() == "mine"


class Codes(Packed):
    """A packed weight without values."""
    shape = (C, C)


def test_save_refuses_a_model_with_edits(tmp_path):
    """Merged, or with a method that trains the base itself, it is an ordinary model."""
    model = GPT(SMALL_GPT)
    edit.attach(model, LoRA(r=2))
    with pytest.raises(ValueError, match="lora is attached: .*merge.*save_adapter"):
        save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    edit.merge(model)
    save(model, tmp_path / "merged")
    edit.attach(model, BitFit())
    save(model, tmp_path / "bitfit")


def test_save_refuses_other_models(tmp_path):
    """Packed weights, a model without one of its blocks, settings of no family, a model of no family."""
    packed = GPT(SMALL_GPT)
    packed.blocks[0].attn.q.weight = Codes()
    mixture = BERT(BERTConfig(V, T, 0, C, L, H))
    known = "bert or distilbert or roberta or tinyft-switch-bert"
    with pytest.raises(ValueError, match=f"the settings of {known}, got others: .*token_types=0"):
        save(mixture, tmp_path / "m")
    with pytest.raises(ValueError, match="blocks.0.attn.q.weight is packed"):
        save(packed, tmp_path / "m")
    shorter = GPT(SMALL_GPT)
    del shorter.blocks[1]
    with pytest.raises(ValueError, match="no longer what its config says"):
        save(shorter, tmp_path / "m")
    with pytest.raises(ValueError, match="save wants one of GPT, BERT, .*got a Linear"):
        save(Linear(2, 2, rng=np.random.default_rng(0)), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_save_refuses_the_path_of_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        save(GPT(SMALL_GPT), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# ── tokenizers, heads, shipped models ────────────────────────────────────────────────────────────────────────────────
def tokenizer() -> Tokenizer:
    """A byte-level tokenizer with every special token."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=V, special_tokens=special, show_progress=False)
    out = Tokenizer(models.BPE())
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.train_from_iterator(["one two three, two three four"] * 3, trainer)
    return out


def test_tokenizer_round_trip(tmp_path):
    saved = tokenizer()
    save(GPT(SMALL_GPT), tmp_path / "m", saved)
    _, loaded = load(tmp_path / "m")
    assert json.loads(loaded.to_str()) == json.loads(saved.to_str())
    text = "two three one, four <|endoftext|>"
    assert loaded.encode(text).ids == saved.encode(text).ids
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["pad_token_id"] == 0
    assert config["eos_token_id"] == 5
    (tmp_path / "m" / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match="tokenizer.json is damaged"):
        load(tmp_path / "m")


def saved_labels(model: Any, folder: Path) -> dict[str, str]:
    """The class names in config.json after saving."""
    save(model, folder)
    return json.loads((folder / "config.json").read_text())["id2label"]


def test_class_names_are_kept_until_the_head_is_replaced(tmp_path):
    model, _ = load(write(tmp_path / "a", *made("bert-classes")))
    assert saved_labels(model, tmp_path / "b") == {"0": "a", "1": "b", "2": "c"}
    assert len(saved_labels(classifier(model, 5), tmp_path / "b")) == 5


@pytest.mark.parametrize("case", ["gpt2", "bert", "bert-hidden", "bert-classes"])
def test_a_new_head(case, tmp_path):
    """Drawn from the seed, in the model's dtype; saved and loaded it is part of the model and no new head."""
    folder = write(tmp_path / "a", *made(case))
    model = classifier(load(folder, np.float64)[0], classes=20, seed=3)
    assert outputs(model).shape == (2, 20)
    assert {a.dtype for a in parameters(model).values()} == {np.dtype(np.float64)}
    same_seed = parameters(classifier(load(folder, np.float64)[0], 20, seed=3))
    identical(parameters(model), same_seed)
    other_seed = parameters(classifier(load(folder, np.float64)[0], 20, seed=4))
    assert (other_seed["head.out.weight"] != parameters(model)["head.out.weight"]).any()
    assert edit.is_head(model, "head.out.weight")
    save(model, tmp_path / "b")
    again, _ = load(tmp_path / "b", np.float64)
    identical(parameters(model), parameters(again))
    assert not edit.is_head(again, "head.out.weight")
    np.testing.assert_array_equal(outputs(model), outputs(again))


def test_classifier_refuses_attached_methods_bad_sizes_and_other_models():
    model = GPT(SMALL_GPT)
    edit.attach(model, LoRA(r=2))
    with pytest.raises(ValueError, match="put the head on first"):
        classifier(model, 3)
    for bad in (0, -1, 2.0, "2"):
        with pytest.raises(ValueError, match="at least one class"):
            classifier(GPT(SMALL_GPT), bad)
    with pytest.raises(TypeError, match="takes no new head"):
        classifier(Linear(2, 2, rng=np.random.default_rng(0)), 3)


def test_models_that_ship_are_found_by_name(tmp_path, monkeypatch):
    """A directory of the same name goes first; a path with a separator is never the name of a shipped model."""
    monkeypatch.setattr(huggingface, "ASSETS", tmp_path / "assets")
    save(GPT(SMALL_GPT), tmp_path / "assets" / "base-gpt", tokenizer())
    save(BERT(SMALL_BERT), tmp_path / "assets" / "base-bert")
    (tmp_path / "assets" / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    assert isinstance(load("base-gpt")[0], GPT)
    assert isinstance(load("base-bert")[0], BERT)
    assert load("base-gpt")[1].encode("[MASK]").ids != [4], "in a text it is text, as in data.shipped_tokenizer"
    for name in ("base-llama", "other"):
        with pytest.raises(FileNotFoundError, match=f"'{name}'.*models that ship: base-bert, base-gpt"):
            load(name)
    with pytest.raises(FileNotFoundError, match="wanted a directory"):
        load("./base-gpt")
    save(BERT(ONE_LAYER), "base-gpt")
    assert isinstance(load("base-gpt")[0], BERT)


@pytest.mark.parametrize("family, plan", [
    (GPT2Family(), Plan(SMALL_GPT, "lm")),
    (GPT2Family(), Plan(SMALL_GPT, "classes", 3)),
    (BERTFamily(), Plan(SMALL_BERT, "mlm", pooler=True)),
    (BERTFamily(), Plan(SMALL_BERT, None)),
    (DistilBERTFamily(), Plan(SMALL_DISTILBERT, "mlm")),
    (DistilBERTFamily(), Plan(SMALL_DISTILBERT, "classes", 3, pooler=True)),
    (RoBERTaFamily(), Plan(SMALL_ROBERTA, "mlm", pooler=True)),
    (RoBERTaFamily(), Plan(SMALL_ROBERTA, "classes", 3, pooler=True)),
])
def test_the_table_describes_the_model(family, plan):
    """One entry for every tensor; the thirds of a fused tensor cover it; `file_tensors` is the inverse of `read`."""
    model = family.build(plan)
    table = family.table(plan)
    assert {name: p.shape for name, p in model.named_parameters().items()} == {n: e.shape for n, e in table.items()}
    file_shapes = {e.name: e.file_shape for e in table.values()}
    assert sum(math.prod(shape) for shape in file_shapes.values()) == sum(p.size for p in model.parameters())
    assert family.plan_of(model) == plan
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(e.shape) for name, e in table.items()}
    stored = file_tensors(table, arrays)
    read = {name: np.ascontiguousarray(e.read(stored[e.name])) for name, e in table.items()}
    identical(read, arrays)


def test_a_built_model_has_zeros_in_its_matrices():
    built = parameters(GPT2Family().build(Plan(SMALL_GPT, "lm")))
    assert not any(a.any() for name, a in built.items() if "norm" not in name)


def test_every_family_is_found_by_its_type_and_its_model():
    """Several families may have one class, such as Llama and Qwen2: exactly one of them writes a model."""
    types = [family.model_type for family in huggingface.FAMILIES]
    assert len(set(types)) == len(types)
    sizes = {"vocab": V, "positions": T, "width": C, "layers": 1, "heads": H}
    llamas = {
        "llama": Llama(LlamaConfig(**sizes, qkv_bias=True, out_bias=True)),
        "qwen2": Llama(LlamaConfig(**sizes, qkv_bias=True)),
    }
    berts = {"bert": BERT(SMALL_BERT), "distilbert": BERT(SMALL_DISTILBERT), "roberta": BERT(SMALL_ROBERTA)}
    written = {"gpt2": GPT(SMALL_GPT), **berts, **llamas}
    for wanted, model in written.items():
        assert [family.model_type for family in huggingface.FAMILIES if family.holds(model)] == [wanted]


class OtherGPT(GPT):
    """A model of another family."""


class OtherFamily(GPT2Family):
    """A family with another type, another model and another name for the embedding."""
    model_type = "other"
    model = OtherGPT

    def table_name(self, name: str) -> str | None:
        """The embedding is called `tokens` in the file."""
        return super().table_name(name.replace("tokens.", "wte."))

    def file_name(self, name: str, plan: Plan) -> str:
        """The inverse of table_name."""
        return super().file_name(name, plan).replace("wte.", "tokens.")

    def build(self, plan: Plan) -> OtherGPT:
        """The model, with random values that loading must replace."""
        return OtherGPT(plan.config, seed=5)


def test_a_new_family_is_one_class_and_one_entry(tmp_path, monkeypatch):
    """Nothing else of the package knows a family."""
    model = OtherGPT(SMALL_GPT, seed=1)
    with pytest.raises(ValueError, match="save wants one of GPT, BERT, .*got a OtherGPT"):
        save(model, tmp_path / "m")
    monkeypatch.setattr(huggingface, "FAMILIES", (*huggingface.FAMILIES, OtherFamily()))
    save(model, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "other"
    assert "transformer.tokens.weight" in load_file(tmp_path / "m" / "model.safetensors")
    again, _ = load(tmp_path / "m")
    assert type(again) is OtherGPT
    identical(parameters(again), parameters(model))

"""Llama, Mistral and Qwen2 directories in and out, without torch: files beside the formula of test_llama.py.

A test plants errors in the table of names, and the comparison must reject each of them.
"""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import dev, host, wrong_answers
from safetensors.numpy import load_file, save_file
from test_llama import reference

from tinyft import Llama, LlamaConfig, RotaryScaling, classifier, load, save
from tinyft.formats import layout
from tinyft.formats.llama import LlamaFamily
from tinyft.nn import Linear, TiedHead

V, P, C, L, F = 20, 12, 8, 2, 8                          # F = C: a wrong order of maps has the right shapes
H, HKV, D, CLASSES = 4, 2, 4, 3
IDS = np.array([[3, 1, 4, 1, 5], [2, 6, 19, 3, 5]])
# The names of a file, by ours. The formula of test_llama wants ours.
NAMES = {
    "self_attn.q_proj": "attn.q", "self_attn.k_proj": "attn.k", "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o", "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down",
    "input_layernorm": "norm1", "post_attention_layernorm": "norm2",
}
CLASS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
TYPES = tuple(CLASS)
every_type = pytest.mark.parametrize("model_type", TYPES)
Tensors = dict[str, np.ndarray]


def a_file(model_type: str, head: str = "ForCausalLM", **settings: Any) -> tuple[dict, Tensors]:
    """config.json and tensors, named as transformers names them."""
    config = {
        "model_type": model_type, "architectures": [CLASS[model_type] + head], "vocab_size": V,
        "max_position_embeddings": P, "hidden_size": C, "intermediate_size": F, "num_hidden_layers": L,
        "num_attention_heads": H, "num_key_value_heads": HKV, "head_dim": D, "rms_norm_eps": 0.1, "rope_theta": 20.0,
        "tie_word_embeddings": False, "sliding_window": None, **settings}
    rng = np.random.default_rng(5)
    prefix = "" if head == "Model" else "model."
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (H * D, C), "self_attn.k_proj": (HKV * D, C), "self_attn.v_proj": (HKV * D, C),
        "self_attn.o_proj": (C, H * D), "mlp.gate_proj": (F, C), "mlp.up_proj": (F, C), "mlp.down_proj": (C, F),
        "input_layernorm": (C,), "post_attention_layernorm": (C,)}
    biases = [name for name in shapes if name[10:11] in ("q", "k", "v")] if model_type == "qwen2" else []
    if config.get("attention_bias"):
        biases += [name for name in shapes if name.startswith("self_attn")]
    if config.get("mlp_bias"):
        biases += [name for name in shapes if name.startswith("mlp")]
    wanted = {f"{prefix}embed_tokens.weight": (V, C), f"{prefix}norm.weight": (C,)}
    for i in range(L):
        wanted |= {f"{prefix}layers.{i}.{name}.weight": shape for name, shape in shapes.items()}
        wanted |= {f"{prefix}layers.{i}.{name}.bias": shapes[name][:1] for name in biases}
    if head == "ForSequenceClassification":
        wanted["score.weight"] = (CLASSES, C)
        config["num_labels"] = CLASSES
    elif head == "ForCausalLM" and not config["tie_word_embeddings"]:
        wanted["lm_head.weight"] = (V, C)
    return config, {name: (rng.standard_normal(s) * 0.7).astype(np.float32) for name, s in wanted.items()}


def write(folder: Path, config: dict, tensors: Tensors) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def our_name(name: str) -> str:
    """The model's name of a tensor of a file."""
    name = name.removeprefix("model.").replace("embed_tokens.", "embed.").replace("layers.", "blocks.")
    name = name.replace("lm_head.", "head.").replace("score.", "head.out.")
    for stored, ours in NAMES.items():
        name = name.replace(f".{stored}.", f".{ours}.")
    return name


def check(folder: Path, config: dict, tensors: Tensors, scaling: RotaryScaling | None = None) -> Llama:
    """The model of this file computes what the file says."""
    write(folder, config, tensors)
    model, _ = load(folder, dtype="float64")
    sizes = LlamaConfig(vocab=V, positions=P, width=C, layers=L, heads=H, key_value_heads=HKV, head_width=D, hidden=F,
                        rope_base=config["rope_theta"], rope_scaling=scaling, eps=0.1)
    w = {our_name(name): tensor.astype(np.float64) for name, tensor in tensors.items()}
    found = reference(sizes, w, IDS)
    want = found["layers"][-1] if model.head is None else found["out"]
    got = host(model(IDS))
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 1e-9 * np.abs(want).max(), "apart"
    return model


LINEAR = {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}
OF_EVERY_TYPE: tuple[dict, ...] = ({}, {"tie_word_embeddings": True}, LINEAR)
SETTINGS = [(model_type, settings) for model_type in TYPES for settings in OF_EVERY_TYPE]
SETTINGS += [("llama", {"attention_bias": True}), ("llama", {"mlp_bias": True})]


@pytest.mark.parametrize("model_type, settings", SETTINGS, ids=str)
def test_a_file_is_computed_as_it_says(model_type, settings, tmp_path):
    scaling = RotaryScaling("linear", 3.0) if "rope_scaling" in settings else None
    check(tmp_path, *a_file(model_type, **settings), scaling)


@every_type
@pytest.mark.parametrize("head", ["ForSequenceClassification", "Model"])
def test_a_classifier_and_a_model_without_a_head(model_type, head, tmp_path):
    model = check(tmp_path, *a_file(model_type, head))
    assert (model.head is None) == (head == "Model")


def test_frequencies_in_an_old_file_are_no_weights(tmp_path):
    config, tensors = a_file("llama")
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32) for i in range(L)}
    write(tmp_path / "a", config, {**tensors, **extra})
    write(tmp_path / "b", config, tensors)
    one, other = load(tmp_path / "a")[0], load(tmp_path / "b")[0]
    assert (host(one(IDS)) == host(other(IDS))).all()


@every_type
@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True}], ids=str)
@pytest.mark.parametrize("head", ["ForCausalLM", "ForSequenceClassification", "Model"])
def test_save_writes_the_file_back(model_type, settings, head, tmp_path):
    """The same tensors under the same names, bitwise; a Mistral as a Llama. A tied file has no output layer."""
    config, tensors = a_file(model_type, head, **settings)
    model, _ = load(write(tmp_path / "in", config, tensors))
    save(model, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    if head == "Model" and model.head is not None:       # a tied head: written as the class with the head
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    assert written.keys() == tensors.keys()
    assert all((written[name] == tensors[name]).all() for name in tensors)
    kind = "llama" if model_type == "mistral" else model_type
    again = json.loads((tmp_path / "out" / "config.json").read_text())
    has_head = head != "Model" or model.head is None
    assert again["model_type"] == kind
    assert again["architectures"] == [CLASS[kind] + (head if has_head else "ForCausalLM")]
    for key in ("head_dim", "num_key_value_heads", "rope_theta", "rms_norm_eps", "tie_word_embeddings"):
        assert again[key] == config[key], key
    model_again, _ = load(tmp_path / "out")
    assert model_again.config == model.config
    assert (host(model_again(IDS)) == host(model(IDS))).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_read_exactly_and_written(dtype, tmp_path):
    config, tensors = a_file("qwen2")
    half = {name: tensor.astype(np.dtype(dtype)) for name, tensor in tensors.items()}
    model = check(tmp_path / "in", config, half)
    save(load(tmp_path / "in")[0], tmp_path / "out", dtype=dtype)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(written[name].dtype == np.dtype(dtype) and (written[name] == half[name]).all() for name in half)
    assert host(model.embed.weight).dtype == np.float64


def test_shards(tmp_path):
    config, tensors = a_file("llama")
    names = list(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    write(tmp_path, config, tensors)
    whole = host(load(tmp_path)[0](IDS))
    (tmp_path / "model.safetensors").unlink()
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {name: file for file, part in parts.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert (host(load(tmp_path)[0](IDS)) == whole).all()


# ── planted errors ───────────────────────────────────────────────────────────────────────────────────────────────────
def exchanged(one: str, other: str) -> Any:
    """A table in which two tensors of every block have each other's place."""
    def wrong(table: layout.Table) -> layout.Table:
        partner = {}
        for name in table:
            if f".{one}." in name:
                partner[name] = name.replace(f".{one}.", f".{other}.")
                partner[partner[name]] = name
        return {name: table[partner.get(name, name)] for name in table}
    return wrong


def forgotten_transpose(table: layout.Table) -> layout.Table:
    """GPT-2's way of storing a map."""
    turned = [name for name in table if name.endswith("mlp.up.weight")]
    return {**table, **{name: dataclasses.replace(table[name], transposed=True) for name in turned}}


@wrong_answers
@pytest.mark.parametrize("wrong", [
    exchanged("mlp.gate", "mlp.up"), exchanged("attn.k", "attn.v"), exchanged("norm1", "norm2"), forgotten_transpose,
], ids=["gate and up", "keys and values", "norms", "transpose"])
def test_a_wrong_table_is_caught(wrong, tmp_path, monkeypatch):
    right = LlamaFamily.table
    check(tmp_path, *a_file("llama"))
    monkeypatch.setattr(LlamaFamily, "table", lambda self, plan: wrong(right(self, plan)))
    with pytest.raises(AssertionError, match="apart"):
        check(tmp_path, *a_file("llama"))


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("model_type, settings, drop, message", [
    ("llama", {"attention_bias": True}, "bias", "missing layers.0.self_attn.q_proj.bias"),
    ("qwen2", {}, "bias", "missing layers.0.self_attn.q_proj.bias"),
    ("llama", {}, "lm_head", "missing lm_head.weight"),
    ("llama", {"num_key_value_heads": 1}, "", r"k_proj.weight wants shape \(4, 8\), got \(8, 8\)"),
    ("llama", {"head_dim": 8}, "", r"q_proj.weight wants shape \(32, 8\), got \(16, 8\)"),
    ("llama", {"head_dim": 3}, "", "heads of an even width, got 3"),
    ("llama", {"num_key_value_heads": 3}, "", "3 key/value heads do not divide 4 heads"),
    ("mistral", {"sliding_window": 4}, "", "this library's Mistral has no sliding window"),
    ("llama", {"model_type": "llama4"}, "", "wanted one of .*llama, mistral, qwen2"),
    ("llama", {"architectures": ["MistralForCausalLM"]}, "", "architectures wants one of LlamaForCausalLM"),
])
def test_a_file_that_does_not_fit_its_config_is_refused(model_type, settings, drop, message, tmp_path):
    sizes_of_the_file = {key: value for key, value in settings.items() if key in ("attention_bias", "mlp_bias")}
    config, tensors = a_file(model_type, **sizes_of_the_file)
    if drop:
        tensors = {name: tensor for name, tensor in tensors.items() if drop not in name}
    write(tmp_path, {**config, **settings}, tensors)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_biases_that_config_json_does_not_mention_are_refused(tmp_path):
    config, tensors = a_file("llama", attention_bias=True)
    write(tmp_path, {**config, "attention_bias": False}, tensors)
    with pytest.raises(ValueError, match="unexpected layers.0.self_attn"):
        load(tmp_path)


SIZES = {"vocab": V, "positions": P, "width": C, "layers": 1, "heads": H}


@pytest.mark.parametrize("biases", [{"out_bias": True}, {"qkv_bias": True, "mlp_bias": True}], ids=str)
def test_save_refuses_biases_that_no_class_has(biases, tmp_path):
    with pytest.raises(ValueError, match="biases on q, k, v and o together, or on q, k and v alone"):
        save(Llama(LlamaConfig(**SIZES, **biases)), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_save_refuses_a_head_that_no_class_has(tmp_path):
    rng = np.random.default_rng(0)
    model = Llama(LlamaConfig(**SIZES))
    for head in (Linear(C, V, rng=rng), TiedHead(model.embed)):
        model.head = head
        with pytest.raises(ValueError, match="a Llama directory wants"):
            save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_new_classifier_is_saved_and_comes_back(tmp_path):
    model = classifier(Llama(LlamaConfig(**SIZES, tied=True)), CLASSES)
    save(model, tmp_path)
    again, _ = load(tmp_path)
    assert (host(again(dev(IDS))) == host(model(dev(IDS)))).all()

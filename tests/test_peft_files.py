"""The folders of PEFT and AdapterHub, without those libraries: names, keys, settings, damage, all or nothing.

peers/test_interchange.py compares outputs with the libraries themselves.
"""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import peft_keys
import pytest
from helpers import host
from safetensors.numpy import load_file, save_file

import tinyft as ft
from tinyft import edit, nn
from tinyft.adapters.exchange import compact_targets
from tinyft.adapters.names import ModuleNames
from tinyft.adapters.peft_config import chosen_modules, compile_simple
from tinyft.adapters.peft_lora import Factors, as_one_lora, fuse, split_fused
from tinyft.compress import Q8_0

C, L, V = 12, 2, 23
IDS = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def gpt(classes: int = 0) -> Any:
    model = ft.GPT(ft.GPTConfig(V, 16, C, L, 3, 20), seed=1).eval()
    return ft.classifier(model, classes) if classes else model


def bert(classes: int = 0, pooler: bool = True) -> Any:
    model = ft.BERT(ft.BERTConfig(V, 16, 2, C, L, 3, 20), seed=1, head=None, pooler=pooler).eval()
    return ft.classifier(model, classes) if classes else model


def llama(**fields: Any) -> Any:
    return ft.Llama(ft.LlamaConfig(V, 16, C, L, 3, 1, hidden=20, **fields), seed=1).eval()


METHODS = {
    "LORA": ft.LoRA(r=2, targets=("attn.[qv]", "mlp.up")),
    "PROMPT_TUNING": ft.PromptTuning(p=2),
    "PREFIX_TUNING": ft.PrefixTuning(p=2, shift=True),
    "ADAPTERHUB": ft.Houlsby(m=4, norms=False),
}


def attach(model: Any, method: Any, name: str | None = None) -> Any:
    """Attach a method at a generic point."""
    a = ft.attach(model, method, name)
    rng = np.random.default_rng(2)
    for e in a.edits.values():
        for p in e.parameters():
            p.copy_(host(p) + rng.standard_normal(p.shape) * 0.3)
    return a


def saved(kind: str, folder: Path, model: Any = None) -> Path:
    """The folder of an adapter of this kind."""
    model = gpt() if model is None else model
    attach(model, METHODS[kind])
    save = ft.save_adapterhub if kind == "ADAPTERHUB" else ft.save_peft
    return save(model, folder)


def loader(kind: str) -> Any:
    return ft.load_adapterhub if kind == "ADAPTERHUB" else ft.load_peft


def change(folder: Path, **entries: Any) -> Path:
    """Write other entries into the config; for AdapterHub those of its "config"."""
    config = json.loads((folder / CONFIG).read_text())
    (config["config"] if "config" in config else config).update(entries)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def change_tensors(folder: Path, **arrays: Any) -> Path:
    """Replace, or with None remove, tensors."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file) | arrays
    save_file({n: a for n, a in tensors.items() if a is not None}, file)
    return folder


def state(model: Any) -> Any:
    values = {n: host(p).tobytes() for n, p in model.named_parameters().items()}
    trains = {n: p.requires_grad for n, p in model.named_parameters().items()}
    return values, trains, [a.name for a in edit.attached(model)]


def check_refused(kind: str, folder: Path, match: str, model: Any = None, error: type = ValueError) -> None:
    """One sentence, and the model is unchanged."""
    model = gpt() if model is None else model
    before = state(model)
    with pytest.raises(error, match=match) as caught:
        loader(kind)(model, folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    assert state(model) == before


# ── names and tensors of the files ───────────────────────────────────────────────────────────────────────────────────
def test_the_names_are_those_of_transformers():
    names = ModuleNames(gpt(), "a test")
    assert names.of_path("blocks.1.attn.v").name == "transformer.h.1.attn.c_attn"
    assert names.of_name("h.0.attn.c_attn").paths == ("blocks.0.attn.q", "blocks.0.attn.k", "blocks.0.attn.v")
    assert names.of_name("transformer.h.0.attn.c_attn") is names.of_name("h.0.attn.c_attn")
    assert names.of_name("transformer.h.7.attn.c_attn") is None and names.of_path("head") is None
    assert names.tied_head(gpt()) == ("lm_head", "embed")
    assert ModuleNames(bert(), "a test").of_path("blocks.0.mlp.down").name == "encoder.layer.0.output.dense"
    assert ModuleNames(bert(3), "a test").of_path("blocks.0.attn.q").name == "bert.encoder.layer.0.attention.self.query"
    assert ModuleNames(llama(), "a test").of_path("head").name == "lm_head"
    assert ModuleNames(llama(), "a test").tied_head(llama()) is None
    assert ModuleNames(llama(tied=True), "a test").tied_head(llama(tied=True)) == ("lm_head", "embed")
    assert ModuleNames(bert(3), "a test").new_head(bert(3)).keys() == {"head.out.weight", "head.out.bias"}
    assert "pooler.dense.bias" in ModuleNames(bert(3), "a test").new_head(bert(3, pooler=False))


def test_a_lora_on_q_and_v_is_one_block_diagonal_lora_on_c_attn(tmp_path):
    model = gpt()
    a = attach(model, ft.LoRA(r=2, alpha=6, targets="attn.[qv]"))
    ft.save_peft(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 12, ["c_attn"])
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM" and config["fan_in_fan_out"] is True
    tensors = load_file(tmp_path / WEIGHTS)
    assert len(tensors) == 2 * L
    A = tensors["base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"]
    B = tensors["base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"]
    q, v = a.edits["blocks.1.attn.q"], a.edits["blocks.1.attn.v"]
    assert np.array_equal(A, np.concatenate([host(q.A), host(v.A)]))
    expected = np.zeros((3 * C, 4), np.float32)
    expected[:C, :2] = host(q.B)
    expected[2 * C:, 2:] = host(v.B)
    assert np.array_equal(B, expected)
    assert np.allclose(12 / 4 * B[:C] @ A, host(q.delta()), atol=1e-6)


def test_pefts_c_attn_becomes_three_loras_with_one_A_and_goes_back_as_it_came(tmp_path):
    rng = np.random.default_rng(0)
    start = "base_model.model.transformer.h.1.attn.c_attn"
    tensors = {f"{start}.lora_A.weight": rng.standard_normal((3, C)).astype(np.float32),
               f"{start}.lora_B.weight": rng.standard_normal((3 * C, 3)).astype(np.float32)}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 5, "target_modules": ["c_attn"],
              "layers_to_transform": 1}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / CONFIG).write_text(json.dumps(config))
    save_file(tensors, tmp_path / "theirs" / WEIGHTS)
    model = gpt()
    a = ft.load_peft(model, tmp_path / "theirs")
    assert a.name == "lora" and a.method.r == 3 and a.method.alpha == 5
    assert a.method.targets == ("blocks.1.attn.q", "blocks.1.attn.k", "blocks.1.attn.v")
    for i, part in enumerate("qkv"):
        e = a.edits[f"blocks.1.attn.{part}"]
        assert np.array_equal(host(e.A), tensors[f"{start}.lora_A.weight"])
        assert np.array_equal(host(e.B), tensors[f"{start}.lora_B.weight"][i * C:(i + 1) * C])
    ft.save_peft(model, tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert again.keys() == tensors.keys() and all(np.array_equal(again[n], tensors[n]) for n in tensors)


def test_a_part_of_c_attn_without_a_block_gets_no_lora():
    rng = np.random.default_rng(1)
    module = ModuleNames(gpt(), "a test").of_path("blocks.0.attn.q")
    for present in (("k",), ("q", "v"), ("q", "k", "v")):
        own = {f"blocks.0.attn.{part}": Factors(rng.standard_normal((2, C)), rng.standard_normal((C, 2)), 3.0)
               for part in present}
        whole = fuse(module, own)
        assert whole.r == 2 * len(present) and whole.alpha == 3.0 * len(present)
        again = split_fused("c_attn", whole, module.paths)
        assert again.keys() == own.keys()
        for path, f in own.items():
            assert np.array_equal(f.A, again[path].A) and np.array_equal(f.B, again[path].B)
            assert again[path].alpha == 3.0
    full = Factors(rng.standard_normal((2, C)), rng.standard_normal((3 * C, 2)), 1.0)
    assert split_fused("c_attn", full, module.paths).keys() == set(module.paths)


def test_a_prefix_is_a_table_of_keys_and_values_head_after_head(tmp_path):
    model = llama()
    a = attach(model, ft.PrefixTuning(p=3, shift=True))
    ft.save_peft(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["num_attention_heads"], config["token_dim"], config["num_layers"]) == (1, 4, L)
    table = load_file(tmp_path / WEIGHTS)["prompt_embeddings"]
    assert table.shape == (3, 2 * L * 4)
    K, V_ = host(a.edits["blocks.1.attn.kv"].K), host(a.edits["blocks.1.attn.kv"].V)        # (1, 3, 4)
    assert np.array_equal(table[:, 8:12], K[0]) and np.array_equal(table[:, 12:], V_[0])
    model = gpt()
    a = attach(model, ft.PrefixTuning(p=3, shift=True))
    ft.save_peft(model, tmp_path)
    K = host(a.edits["blocks.0.attn.kv"].K)                                                 # (3, 3, 4)
    assert np.array_equal(load_file(tmp_path / WEIGHTS)["prompt_embeddings"][:, 4:8], K[1])


def test_an_unshifted_prefix_goes_to_rotary_models_only(tmp_path):
    model = gpt()
    attach(model, ft.PrefixTuning(p=3))
    with pytest.raises(ValueError, match=r"train it with PrefixTuning\(shift=True\)"):
        ft.save_peft(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    model = ft.Llama(ft.LlamaConfig(V, 16, 24, L, 6, 3, hidden=20), seed=1).eval()
    attach(model, ft.PrefixTuning(p=3))
    y = host(model(IDS))
    ft.save_peft(model, tmp_path / "a")
    assert load_file(tmp_path / "a" / WEIGHTS)["prompt_embeddings"].dtype == np.float32
    ft.detach(model)
    a = ft.load_peft(model, tmp_path / "a")
    assert a.method.shift and np.abs(host(model(IDS)) - y).max() < 1e-5
    for e in a.edits.values():                           # without the rotation the outputs differ
        for p in e.parameters():
            p.copy_(-host(p))
    assert np.abs(host(model(IDS)) - y).max() > 1e-3


COMMON = {"task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True}
SIZES = {"num_virtual_tokens": 2, "token_dim": C, "num_transformer_submodules": 1, "num_attention_heads": 3,
         "num_layers": L}
CONFIGS = {
    "LORA": {
        "peft_type": "LORA", "r": 4, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": ["c_attn", "c_fc"],
        "bias": "none", "fan_in_fan_out": True, **COMMON,
        "rank_pattern": {"transformer.h.0.mlp.c_fc": 2, "transformer.h.1.mlp.c_fc": 2},
        "alpha_pattern": {"transformer.h.0.mlp.c_fc": 16, "transformer.h.1.mlp.c_fc": 16},
    },
    "PROMPT_TUNING": {"peft_type": "PROMPT_TUNING", **SIZES, **COMMON},
    "PREFIX_TUNING": {"peft_type": "PREFIX_TUNING", **SIZES, **COMMON, "encoder_hidden_size": C,
                      "prefix_projection": False},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_config_has_these_entries_and_no_others(kind, tmp_path):
    """Older versions of PEFT refuse keys that they do not know."""
    assert json.loads((saved(kind, tmp_path) / CONFIG).read_text()) == CONFIGS[kind]


@pytest.mark.parametrize("kind", METHODS)
def test_an_adapter_comes_back_bitwise(kind, tmp_path):
    model = gpt()
    folder = saved(kind, tmp_path / "a", model)
    y = host(model(IDS))
    ft.detach(model)
    a = loader(kind)(model, folder, name="again")
    assert a.name == "again" and np.array_equal(host(model(IDS)), y)
    ft.save_adapter(model, tmp_path / "own")             # and our own format takes it
    ft.detach(model)
    ft.load_adapter(model, tmp_path / "own")
    assert np.array_equal(host(model(IDS)), y)


@pytest.mark.parametrize("pooler", [True, False])
@pytest.mark.parametrize("kind", ["LORA", "PREFIX_TUNING", "ADAPTERHUB"])
def test_a_new_head_goes_with_the_adapter(kind, pooler, tmp_path):
    model = bert(3, pooler)
    if kind == "ADAPTERHUB" and not pooler:
        attach(model, METHODS[kind])
        with pytest.raises(ValueError, match="no place for pooler.dense.weight, which is new"):
            ft.save_adapterhub(model, tmp_path / "a")
        return
    model.head.out.bias.copy_(np.arange(3.0))
    folder = saved(kind, tmp_path / "a", model)
    y = host(model(IDS))
    other = bert(3, pooler)
    if not pooler:
        other.pooler.dense.weight.copy_(host(other.pooler.dense.weight) + 1)
    before = host(other(IDS))
    a = loader(kind)(other, folder)
    assert np.array_equal(host(other(IDS)), y) and "head.out.bias" in a.base_values
    ft.detach(other)
    assert np.array_equal(host(other(IDS)), before)
    check_refused(kind, folder, r"call tinyft.classifier", bert())
    check_refused(kind, folder, "shape", bert(4, pooler))
    if kind != "ADAPTERHUB":
        config = json.loads((folder / CONFIG).read_text())
        assert config["modules_to_save"] == ["classifier", "score"] + ([] if pooler else ["pooler"])
        start = "base_model.model." if kind == "LORA" else "base_model."
        assert f"{start}classifier.weight" in load_file(folder / WEIGHTS)
        if pooler:
            check_refused(kind, folder, "missing bert.pooler", bert(3, pooler=False))
    else:
        check_refused(kind, folder, "no place for pooler.dense.weight, which is new", bert(3, pooler=False))


def test_a_head_of_the_base_stays_and_another_one_is_refused(tmp_path):
    """After load, a classifier is part of the model: a LoRA does not train it."""
    ft.save(bert(3), tmp_path / "base")
    model = ft.load(tmp_path / "base")[0].eval()
    folder = saved("LORA", tmp_path / "a", model)
    y = host(model(IDS))
    other = ft.load(tmp_path / "base")[0].eval()
    a = ft.load_peft(other, folder)
    assert not a.base_values and np.array_equal(host(other(IDS)), y)
    ft.save_adapter(other, tmp_path / "own")
    ft.detach(other)
    ft.load_adapter(other, tmp_path / "own")
    change_tensors(folder, **{"base_model.model.classifier.bias": np.ones(3, np.float32)})
    check_refused("LORA", folder, "a part of its base: call tinyft.classifier first",
                  ft.load(tmp_path / "base")[0].eval())


def test_several_adapters_are_told_apart_by_their_names(tmp_path):
    model = gpt()
    attach(model, ft.LoRA(r=2), "first")
    attach(model, ft.LoRA(r=5), "second")
    ft.save_peft(model, tmp_path / "a", name="first")
    assert ft.load_peft(gpt(), tmp_path / "a").method.r == 2
    ft.save_peft(model, tmp_path / "a")                  # the last one
    assert ft.load_peft(gpt(), tmp_path / "a").method.r == 5
    with pytest.raises(LookupError, match="'third' is not attached; there is first, second"):
        ft.save_peft(model, tmp_path / "a", name="third")
    with pytest.raises(ValueError, match="'first' is attached already"):
        ft.load_peft(model, tmp_path / "a", name="first")


@pytest.mark.parametrize("method", [
    ft.LoRA(r=2, targets=("attn.[qkvo]", "mlp.gate", "embed")), ft.PromptTuning(p=2), ft.PrefixTuning(p=2),
    ft.Houlsby(m=4, norms=False),
], ids=["lora", "prompt", "prefix", "houlsby"])
def test_an_adapter_on_a_packed_base_is_one_on_the_dense_base(method, tmp_path):
    """Both ways: the files know nothing of packing."""
    packed = ft.Llama(ft.LlamaConfig(V, 16, 32, L, 2, 1, hidden=32, tied=True), seed=1).eval()
    dense = ft.Llama(packed.config, seed=1).eval()
    for path, module in edit.base_modules(packed).items():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight = Q8_0.quantize(host(module.weight))
            edit.base_modules(dense)[path].weight.copy_(module.weight.dequantize())
    save, load = (ft.save_peft, ft.load_peft)
    if isinstance(method, ft.Houlsby):
        save, load = (ft.save_adapterhub, ft.load_adapterhub)
    attach(packed, method)
    y = host(packed(IDS))
    load(dense, save(packed, tmp_path / "a"))
    assert np.abs(host(dense(IDS)) - y).max() < 1e-5 * np.abs(y).max()
    save(dense, tmp_path / "b")
    ft.detach(packed)
    load(packed, tmp_path / "b")
    assert np.abs(host(packed(IDS)) - y).max() < 1e-5 * np.abs(y).max()


# ── what the formats lack ────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("method, match", [
    (ft.BitFit(), r"PEFT has no BitFit: keep it with tinyft.save_adapter, or write the whole model with tinyft.save"),
    (ft.Full(), "PEFT has no Full: .*tinyft.save_adapter"),
    (ft.Partial(k=1), "PEFT has no Partial: .*tinyft.save"),
    (ft.Houlsby(m=2), "PEFT has no Houlsby: .*tinyft.save_adapterhub"),
    (ft.PromptTuning(p=0), "at least one virtual token"),
    (ft.PrefixTuning(p=2, shift=True, targets="blocks.0.attn.kv"), "in every layer, and blocks.1.attn.kv has none"),
])
def test_peft_refuses_what_it_has_no_place_for(method, match, tmp_path):
    model = gpt()
    ft.attach(model, method)
    before = state(model)
    with pytest.raises(ValueError, match=match):
        ft.save_peft(model, tmp_path / "a")
    assert state(model) == before and not (tmp_path / "a").exists()


def test_a_combined_adapter_has_no_place_in_peft(tmp_path):
    model = gpt()
    a = attach(model, ft.LoRA(r=2))
    ft.detach(model)
    ft.attach(model, ft.combine([a, a]))
    with pytest.raises(ValueError, match="PEFT has no Combined"):
        ft.save_peft(model, tmp_path / "a")


def test_adapterhub_refuses_trained_norms_and_other_places(tmp_path):
    model = gpt()
    attach(model, ft.Houlsby(m=2))
    ft.save_adapterhub(model, tmp_path / "a")            # the norms are those of the base still
    model.norm.bias.copy_(np.ones(C))
    with pytest.raises(ValueError, match=r"no place for norm.bias, .*Houlsby\(norms=False\)"):
        ft.save_adapterhub(model, tmp_path / "b")
    ft.detach(model)
    attach(model, ft.Houlsby(m=2, norms=False, targets="attn.o"))
    with pytest.raises(ValueError, match="none on blocks.0.attn.o"):
        ft.save_adapterhub(model, tmp_path / "b")
    ft.detach(model)
    attach(model, ft.Houlsby(m=2, norms=False, targets=("blocks.0.attn", "blocks.1.mlp")))
    with pytest.raises(ValueError, match="same places of all layers; blocks.0.mlp has none"):
        ft.save_adapterhub(model, tmp_path / "b")
    ft.detach(model)
    attach(model, ft.LoRA(r=2))
    with pytest.raises(ValueError, match="writes Houlsby, got LoRA"):
        ft.save_adapterhub(model, tmp_path / "b")
    ft.detach(model)
    attach(model, ft.Houlsby(m=2, norms=False), "a.b")
    with pytest.raises(ValueError, match="no dots"):
        ft.save_adapterhub(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    with pytest.raises(ValueError, match="save_peft wants one of"):
        other = ft.GPT(ft.GPTConfig(V, 16, C, L, 3, 20))
        other.__class__ = type("Other", (ft.GPT,), {})
        ft.attach(other, ft.LoRA(r=2))
        ft.save_peft(other, tmp_path / "b")


def test_a_folder_of_another_format_is_not_overwritten(tmp_path):
    model = gpt()
    attach(model, METHODS["ADAPTERHUB"])
    ft.save_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match="another format"):
        ft.save_adapterhub(model, tmp_path / "a")
    ft.save_adapterhub(model, tmp_path / "b")
    ft.save_adapterhub(model, tmp_path / "b")            # its own folder is
    attach(model, ft.LoRA(r=2), "lora")
    with pytest.raises(ValueError, match="another format"):
        ft.save_peft(model, tmp_path / "b", name="lora")


def test_a_lora_on_a_tied_embedding_is_two_in_the_file(tmp_path):
    model = gpt()
    attach(model, ft.LoRA(r=2, targets="embed"))
    ft.save_peft(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert set(json.loads((tmp_path / CONFIG).read_text())["target_modules"]) == {"wte", "lm_head"}
    start = "base_model.model."
    A = tensors[f"{start}transformer.wte.lora_embedding_A"]
    assert A.shape == (2, V) and np.array_equal(tensors[f"{start}lm_head.lora_B.weight"], A.T)
    change_tensors(tmp_path, **{f"{start}lm_head.lora_A.weight": np.ones((2, C), np.float32)})
    check_refused("LORA", tmp_path, "output layer lm_head is its embedding.*on each")
    change_tensors(tmp_path, **{f"{start}lm_head.lora_{m}.weight": None for m in "AB"})
    check_refused("LORA", tmp_path, "lm_head, which has no tensors")
    check_refused("LORA", change(tmp_path, target_modules=["wte"]), "on one of them")


def test_an_embedding_that_peft_saved_must_be_the_models(tmp_path):
    model = gpt()
    folder = saved("LORA", tmp_path / "a", model)
    ft.detach(model)
    attach(model, ft.LoRA(r=2, targets="pos"))
    ft.save_peft(model, folder)
    weight = host(model.pos.weight)
    name = "base_model.model.transformer.wpe.base_layer.weight"
    ft.load_peft(gpt(), change_tensors(folder, **{name: weight.astype(np.float16)}))
    check_refused("LORA", change_tensors(folder, **{name: weight + 1}), "trained on another base")
    check_refused("LORA", change_tensors(folder, **{name: weight[1:]}), "trained on another base")


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def table(name: str) -> list:
    return [(kind, key) for kind in peft_keys.TYPES for key in getattr(peft_keys, name)[kind]]


@pytest.mark.parametrize("kind, key", table("READ"))
def test_a_key_that_is_read_changes_the_adapter_or_contradicts_its_tensors(kind, key, tmp_path):
    model = gpt()
    folder = saved(kind, tmp_path, model)
    y = host(model(IDS))
    change(folder, **{key: peft_keys.READ[kind][key]})
    other = gpt()
    try:
        a = ft.load_peft(other, folder)
    except ValueError as e:
        assert str(folder) in str(e)
        return
    assert key in ("use_rslora", "alpha_pattern", "lora_alpha", "lora_dropout")
    assert a.method.dropout == 0.5 if key == "lora_dropout" else np.abs(host(other(IDS)) - y).max() > 1e-3


@pytest.mark.parametrize("kind, key", table("REFUSED"))
def test_a_key_with_one_value_here_is_refused_by_its_name(kind, key, tmp_path):
    model = gpt()
    folder = saved(kind, tmp_path, model)
    y = host(model(IDS))
    good, bad = peft_keys.REFUSED[kind][key]
    for value in good:
        other = gpt()
        ft.load_peft(other, change(folder, **{key: value}))
        assert np.array_equal(host(other(IDS)), y)
    for value in bad:
        check_refused(kind, change(folder, **{key: value}), f"{key}.*got" if value is not None else key)


@pytest.mark.parametrize("kind, key", table("HARMLESS"))
def test_a_harmless_key_is_ignored(kind, key, tmp_path):
    model = gpt()
    folder = saved(kind, tmp_path, model)
    y = host(model(IDS))
    other = gpt()
    ft.load_peft(other, change(folder, **{key: peft_keys.HARMLESS[kind][key]}))
    assert np.array_equal(host(other(IDS)), y)


@pytest.mark.parametrize("kind", METHODS)
def test_an_unknown_key_is_ignored_if_it_switches_nothing_on(kind, tmp_path):
    folder = saved(kind, tmp_path)
    for value in (None, False, [], {}, ""):
        loader(kind)(gpt(), change(folder, use_something_new=value))
    check_refused(kind, change(folder, use_something_new=True), "use_something_new.* unknown here")


@pytest.mark.parametrize("key", peft_keys.HUB_READ)
def test_adapterhubs_keys_that_are_read(key, tmp_path):
    folder = saved("ADAPTERHUB", tmp_path)
    check_refused("ADAPTERHUB", change(folder, **{key: peft_keys.HUB_READ[key]}), "tensors are not|reduction_factor")


@pytest.mark.parametrize("key", peft_keys.HUB_REFUSED)
def test_adapterhubs_keys_with_one_value_here(key, tmp_path):
    folder = saved("ADAPTERHUB", tmp_path)
    good, bad = peft_keys.HUB_REFUSED[key]
    for value in good:
        ft.load_adapterhub(gpt(), change(folder, **{key: value}))
    for value in bad:
        check_refused("ADAPTERHUB", change(folder, **{key: value}), f"{key} wants")


def test_adapterhubs_harmless_keys_are_ignored(tmp_path):
    model = gpt()
    folder = saved("ADAPTERHUB", tmp_path, model)
    y = host(model(IDS))
    for key, value in peft_keys.HUB_HARMLESS.items():
        other = gpt()
        ft.load_adapterhub(other, change(folder, **{key: value}))
        assert np.array_equal(host(other(IDS)), y)


# ── modules ──────────────────────────────────────────────────────────────────────────────────────────────────────────
NAMES = [f"transformer.h.{i}.{part}" for i in (0, 1, 11) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")]


@pytest.mark.parametrize("settings, count", [
    ({"target_modules": ["c_attn"]}, 3),
    ({"target_modules": ["c_proj"]}, 6),
    ({"target_modules": ["attn.c_proj", "c_attn"]}, 6),
    ({"target_modules": ["proj"]}, 0),                   # no whole name
    ({"target_modules": ["1.attn.c_attn"]}, 1),          # not block 11
    ({"target_modules": ["transformer.h.0.mlp.c_proj"]}, 1),
    ({"target_modules": r".*\.1+\..*c_attn"}, 2),
    ({"target_modules": "c_attn"}, 0),                   # a pattern is for the whole name
    ({"target_modules": "all-linear"}, 3),
    ({"target_modules": ["c_proj"], "exclude_modules": ["mlp.c_proj"]}, 3),
    ({"target_modules": ["c_proj"], "exclude_modules": r".*attn.*"}, 3),
    ({"target_modules": ["c_proj"], "layers_to_transform": 11}, 2),
    ({"target_modules": ["c_proj"], "layers_to_transform": [0, 1], "layers_pattern": "h"}, 4),
    ({"target_modules": ["c_proj"], "layers_to_transform": [0, 1], "layers_pattern": ["layers"]}, 0),
    ({"target_modules": ["c_proj"], "modules_to_save": ["mlp"]}, 3),
])
def test_modules_are_chosen_as_peft_chooses_them(settings, count):
    assert len(chosen_modules(settings, NAMES, set(NAMES[:3]))) == count


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*", ".*.*.*.*", "|".join("abcdefghijklmno"), "a{2}", "(?=a)", "(",
                                     "[a", "a" * 301, "\\1", "é(", "*"])
def test_patterns_that_may_take_long_are_refused(pattern):
    with pytest.raises(ValueError, match="target_modules wants module names or a simple pattern"):
        compile_simple(pattern, "target_modules")


def test_ranks_and_scales_of_modules_become_one(tmp_path):
    """The outputs stay, with the largest rank; and the columns that fill up a smaller rank can train."""
    model = gpt()
    folder = saved("LORA", tmp_path, model)
    y = host(model(IDS))
    file = folder / WEIGHTS
    tensors = load_file(file)
    name = "base_model.model.transformer.h.0.mlp.c_fc.lora_{}.weight"
    A, B = tensors[name.format("A")], tensors[name.format("B")]
    zeros = np.zeros((3, C), np.float32)
    change_tensors(folder, **{name.format("A"): np.concatenate([A, zeros]),
                              name.format("B"): np.concatenate([B / 2, np.zeros((20, 3), np.float32)], axis=1)})
    config = json.loads((folder / CONFIG).read_text())
    change(folder, rank_pattern={"h.0.mlp.c_fc": 5, **config["rank_pattern"]},
           alpha_pattern={"h.0.mlp.c_fc": 5 * 16 / 2 * 2, **config["alpha_pattern"]})
    other = gpt()
    a = ft.load_peft(other, folder)
    assert a.method.r == 5 and np.abs(host(other(IDS)) - y).max() < 1e-5
    assert all(host(e.A).any(axis=1).all() for path, e in a.edits.items() if path != "blocks.0.mlp.up")


def write_lora(folder: Path, modules: dict[str, tuple[int, int]], rank: int, **config: Any) -> Path:
    """A file of PEFT, as from another program: {module: (in, out)} with random factors."""
    rng = np.random.default_rng(5)
    tensors = {}
    for name, (in_features, out_features) in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = rng.standard_normal((rank, in_features)).astype(np.float32)
        tensors[f"base_model.model.{name}.lora_B.weight"] = rng.standard_normal((out_features, rank)).astype(np.float32)
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", **config}))
    save_file(tensors, folder / WEIGHTS)
    return folder


def test_absent_keys_have_pefts_defaults_and_names_may_lack_the_prefix(tmp_path):
    """r and lora_alpha are 8; h.0.mlp.c_fc is a name of GPT2Model."""
    for prefix in ("", "transformer."):
        modules = {f"{prefix}h.{i}.mlp.c_fc": (C, 20) for i in range(L)}
        a = ft.load_peft(gpt(), write_lora(tmp_path, modules, 8, target_modules=["c_fc"]))
        assert (a.method.r, a.method.alpha, a.method.targets) == (8, 8, ("mlp.up",))
    mixed = {"h.0.mlp.c_fc": (C, 20), "transformer.h.1.mlp.c_fc": (C, 20)}
    check_refused("LORA", write_lora(tmp_path, mixed, 8, target_modules=["c_fc"]), "no h.0.mlp.c_fc")


def test_rslora_scales_by_the_root_of_the_rank(tmp_path):
    modules = {"transformer.h.0.mlp.c_fc": (C, 20)}
    folder = write_lora(tmp_path, modules, 4, r=4, lora_alpha=6, use_rslora=True, target_modules=list(modules))
    a = ft.load_peft(gpt(), folder)
    assert a.edits["blocks.0.mlp.up"].s == 6 / 2


def test_all_linear_leaves_out_the_output_layer_and_a_pooler_that_is_not_run(tmp_path):
    block = {"self_attn.q_proj": (C, C), "self_attn.k_proj": (C, 4), "self_attn.v_proj": (C, 4),
             "self_attn.o_proj": (C, C), "mlp.gate_proj": (C, 20), "mlp.up_proj": (C, 20), "mlp.down_proj": (20, C)}
    modules = {f"model.layers.{i}.{name}": sizes for i in range(L) for name, sizes in block.items()}
    assert len(ft.load_peft(llama(), write_lora(tmp_path, modules, 2, r=2, target_modules="all-linear")).edits) == 14
    with_head = {**modules, "lm_head": (C, V)}
    check_refused("LORA", write_lora(tmp_path, with_head, 2, r=2, target_modules="all-linear"), "not choose lm_head",
                  llama())
    masked = ft.BERT(ft.BERTConfig(V, 16, 2, C, 1, 3, 20), seed=1, head="mlm", pooler=True)
    layer = "bert.encoder.layer.0"
    modules = {f"{layer}.attention.output.dense": (C, C), f"{layer}.intermediate.dense": (C, 20),
               f"{layer}.output.dense": (20, C), "cls.predictions.transform.dense": (C, C)}
    a = ft.load_peft(masked, write_lora(tmp_path, modules, 2, r=2, target_modules=["dense"]))
    assert a.edits.keys() == {"blocks.0.attn.o", "blocks.0.mlp.up", "blocks.0.mlp.down", "head.dense"}


def test_a_fused_lora_whose_blocks_overlap_stays_whole():
    paths = ("q", "k", "v")
    for columns in ({"q": [0, 1], "v": [1, 3]}, {"q": [0, 2], "v": [3]}, {"q": [1], "v": [0]}):
        B = np.zeros((6, 4))
        for part, used in columns.items():
            i = paths.index(part)
            B[2 * i:2 * i + 2, used] = 1.0
        f = Factors(np.ones((4, C)), B, 2.0)
        assert all(part.r == 4 and part.alpha == 2.0 for part in split_fused("c_attn", f, paths).values())
        assert split_fused("c_attn", f, paths).keys() == set(paths)


def test_the_most_frequent_scale_stays_and_the_others_go_into_B():
    rng = np.random.default_rng(3)
    common = {f"blocks.{i}.attn.q": Factors(rng.standard_normal((2, C)), rng.standard_normal((C, 2)), 3.0)
              for i in range(L)}
    other = {"blocks.0.attn.k": Factors(rng.standard_normal((4, C)), rng.standard_normal((C, 4)), 8.0)}
    method, values = as_one_lora(gpt(), {}, common | other)
    assert (method.r, method.alpha) == (4, 6.0)
    for path, f in (common | other).items():
        A, B = values[path]["A"], values[path]["B"]
        assert np.allclose(method.alpha / method.r * B @ A, f.s * f.B @ f.A, atol=1e-12)
        assert np.array_equal(A[:f.r], f.A)
    assert np.array_equal(values["blocks.0.attn.q"]["B"][:, :2], common["blocks.0.attn.q"].B)
    zero = {path: Factors(f.A, f.B, 0.0) for path, f in common.items()}
    method, values = as_one_lora(gpt(), {}, zero)
    assert (method.r, method.alpha) == (2, 0.0) and values["blocks.0.attn.q"]["B"] is zero["blocks.0.attn.q"].B


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_few_patterns_match_the_adapted_modules_and_no_others(share):
    """So few that save_adapter can write them: it takes lists of up to 100."""
    model = ft.GPT(ft.GPTConfig(V, 16, 4, 23, 2, 4))
    maps = [path for path in edit.base_modules(model) if path.split(".")[-1] in ("q", "k", "v", "o", "up", "down")]
    maps += ["embed", "pos"]
    rng = np.random.default_rng(0)
    for _ in range(5):
        paths = [path for path in maps if rng.random() < share]
        targets = compact_targets(model, paths)
        assert len(targets) <= 26
        assert (set(edit.select(model, targets)) if targets else set()) == set(paths)
    assert compact_targets(model, maps)[0] == "attn.q"


def test_ranks_that_differ_too_much_are_refused_before_memory_is_taken():
    small = {f"blocks.{i}.attn.q": Factors(np.ones((1, 8)), np.ones((8, 1)), 1.0) for i in range(40)}
    large = {"blocks.0.attn.k": Factors(np.ones((10_000, 8)), np.ones((8, 10_000)), 1.0)}
    with pytest.raises(ValueError, match="rank_pattern gives ranks up to 10000"):
        as_one_lora(gpt(), {}, small | large)


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", METHODS)
def test_missing_unexpected_and_wrong_tensors(kind, tmp_path):
    folder = saved(kind, tmp_path)
    (file,) = folder.glob("*.safetensors")
    good = load_file(file)
    name = sorted(good)[0]
    for tensors, match in [
        ({n: a for n, a in good.items() if n != name}, "wants|missing|wanted|which has no"),
        (good | {"extra": good[name]}, "extra"),
        (good | {name: good[name][..., :1]}, "shape"),
        (good | {name: good[name].astype(np.int32)}, "floating-point numbers, got others"),
        (good | {name: good[name] * np.nan}, "finite"),
    ]:
        save_file({n: np.ascontiguousarray(a) for n, a in tensors.items()}, file)
        check_refused(kind, folder, match)
    save_file(good, file)
    loader(kind)(gpt(), folder)
    check_refused(kind, folder, ".", ft.GPT(ft.GPTConfig(V, 16, C + 3, L, 3, 20)))       # another width
    check_refused(kind, folder, ".", ft.GPT(ft.GPTConfig(V, 16, C, L + 1, 3, 20)))       # another depth
    if kind != "PROMPT_TUNING":                          # which depends on the width and the depth alone
        check_refused(kind, folder, ".", llama())


@pytest.mark.parametrize("kind", METHODS)
def test_pickles_and_special_files_are_not_opened(kind, tmp_path):
    folder = saved(kind, tmp_path / "a")
    (file,) = folder.glob("*.safetensors")
    content = file.read_bytes()
    file.unlink()
    check_refused(kind, folder, "is no adapter: it has no", error=FileNotFoundError)
    pickle = folder / ("pytorch_adapter.bin" if kind == "ADAPTERHUB" else "adapter_model.bin")
    pickle.write_bytes(b"x")
    check_refused(kind, folder, r"only .*\.bin: a pickle can run any program", error=FileNotFoundError)
    os.mkfifo(file)
    check_refused(kind, folder, "no ordinary file", error=FileNotFoundError)
    file.unlink()
    file.write_bytes(content[:-1])
    check_refused(kind, folder, "is damaged")
    file.write_bytes(content)
    (folder / CONFIG).write_text("[]")
    check_refused(kind, folder, "wanted a JSON object")
    check_refused(kind, tmp_path / "nothing", "it has no adapter_config.json", error=FileNotFoundError)


@pytest.mark.parametrize("kind", METHODS)
def test_saving_is_all_or_nothing(kind, tmp_path, monkeypatch):
    folder = saved(kind, tmp_path / "a")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = gpt()
    a = attach(model, METHODS[kind])
    for e in a.edits.values():
        for p in e.parameters():
            p.copy_(host(p) + np.inf)
    with pytest.raises(ValueError, match="finite numbers"):
        (ft.save_adapterhub if kind == "ADAPTERHUB" else ft.save_peft)(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "file").write_text("x")
    ft.detach(model)
    with pytest.raises(FileExistsError, match="wants a directory"):
        saved(kind, tmp_path / "file", model)

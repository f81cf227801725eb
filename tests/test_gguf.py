"""The model of a GGUF file, dense and packed: its weights, each key of the metadata, and methods beside packed weights.

The files are written by gguf_files.py. test_gguf_reader.py has the bytes and the tokenizer, test_ggml.py the packed
weights; tests/peers/test_gguf_peers.py compares with the package gguf and with transformers.
"""
from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from gguf_files import (
    TEMPLATE,
    gguf_bytes,
    model_metadata,
    model_tensors,
    small_llama,
    to_file_order,
    write_model,
)
from helpers import host

import tinyft as ft
from tinyft import array, chat
from tinyft.compress import FORMATS
from tinyft.formats import gguf_model
from tinyft.formats.gguf import read_gguf
from tinyft.tokens import special_token

IDS = np.array([[1, 9, 200, 30, 4], [2, 77, 5, 260, 11]])
KINDS = pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
PACKED = pytest.mark.parametrize("kind", FORMATS)


def rounded(model: ft.Llama, kind: str) -> ft.Llama:
    """The model whose matrices hold the values that a file of this type holds, in place."""
    for p in model.parameters():
        if len(p.shape) == 2:
            a = host(p)
            exact = {"F32": np.float32, "F16": np.float16, "BF16": array.bfloat16}
            p.copy_(a.astype(exact[kind]) if kind in exact else host(FORMATS[kind].quantize(a).dequantize()))
    return model


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@KINDS
def test_a_dense_model_holds_the_values_of_the_file(kind, tmp_path):
    original = small_llama()
    file = write_model(tmp_path / "m.gguf", original, kind)
    model, tokenizer = ft.load(file)
    assert model.config == original.config.__class__(**{**vars(original.config), "std": model.config.std})
    expected = rounded(original, kind).named_parameters()
    assert model.named_parameters().keys() == expected.keys()
    for name, p in model.named_parameters().items():
        np.testing.assert_array_equal(host(p), host(expected[name]), err_msg=name)
        assert p.dtype == np.float32
        assert host(p).flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(host(model(IDS)), host(original(IDS)), rtol=1e-5, atol=1e-5)
    assert tokenizer.get_vocab_size() == 266


@PACKED
@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_model_gives_the_logits_of_the_dense_one(kind, tied, tmp_path):
    file = write_model(tmp_path / "m.gguf", small_llama(tied=tied), kind)
    dense, _ = ft.load(file)
    model, _ = ft.load(file, packed=True)
    packed = {path: m for path, m in model.named_modules() if isinstance(m, ft.Packed)}
    assert len(packed) == 2 * 7 + 1 + (not tied)
    assert all(type(m) is FORMATS[kind] for m in packed.values())
    assert sum(m.nbytes for m in packed.values()) == sum(
        t.data.nbytes for t in read_gguf(file).tensors.values() if t.is_packed)
    expected = host(dense(IDS))
    np.testing.assert_allclose(host(model(IDS)), expected, atol=2e-5 * abs(expected).max())
    np.testing.assert_array_equal(ft.generate(model, IDS, 4), ft.generate(dense, IDS, 4))
    assert ft.count(model).total == ft.count(dense).total
    ft.unpack(model)
    np.testing.assert_array_equal(host(model.blocks[1].attn.k.weight), host(dense.blocks[1].attn.k.weight))


def test_the_order_of_the_rows_of_q_and_k_matters(tmp_path, monkeypatch):
    """Wrong answers: rows left as they are in the file; k in the order of q's heads."""
    original = small_llama()
    file = write_model(tmp_path / "m.gguf", original, "F32")
    expected = host(original(IDS))
    right = gguf_model.row_order

    def k_as_q(name, config):
        order = right(name.replace(".k.", ".q."), config)
        return order if order is None or ".k." not in name else order[:32] // 2

    for wrong in (lambda name, config: None, k_as_q):
        monkeypatch.setattr(gguf_model, "row_order", wrong)
        assert abs(host(ft.load(file)[0](IDS)) - expected).max() > 1e-2
    monkeypatch.setattr(gguf_model, "row_order", right)
    np.testing.assert_array_equal(host(ft.load(file)[0](IDS)), expected)
    a = np.arange(64)
    np.testing.assert_array_equal(to_file_order(a, 4)[right("x.attn.q.weight", original.config)], a)


@pytest.mark.parametrize("packed", [False, True])
def test_qwen2_has_biases_and_rows_in_our_order(packed, tmp_path):
    original = small_llama(qkv_bias=True, tied=False)
    rng = np.random.default_rng(1)
    for name, p in original.named_parameters().items():
        if name.endswith("bias"):
            p.copy_(rng.standard_normal(p.shape))
    file = write_model(tmp_path / "m.gguf", original, "Q8_0", "qwen2", {"tokenizer.ggml.pre": "qwen2"})
    model, _ = ft.load(file, packed=packed)
    expected = host(rounded(original, "Q8_0")(IDS))
    np.testing.assert_allclose(host(model(IDS)), expected, atol=2e-5 * abs(expected).max())


def test_the_biases_of_a_llama_are_read_in_the_order_of_the_rows(tmp_path):
    original = small_llama(qkv_bias=True, out_bias=True, mlp_bias=True)
    rng = np.random.default_rng(1)
    for name, p in original.named_parameters().items():
        if name.endswith("bias"):
            p.copy_(rng.standard_normal(p.shape))
    model, _ = ft.load(write_model(tmp_path / "m.gguf", original, "F32"))
    np.testing.assert_array_equal(host(model(IDS)), host(original(IDS)))


@pytest.mark.parametrize("kind, packed", [("F32", False), ("F16", False), ("Q4_1", False), ("Q4_1", True)])
def test_loading_takes_little_more_memory_than_the_model(kind, packed, tmp_path):
    """The file is mapped, and no weight is made that the file replaces. A wrong answer: a model with its own weights
    first would take twice the memory, and a packed one six times."""
    file = write_model(tmp_path / "m.gguf", small_llama(width=256, hidden=512, layers=8), kind)
    ft.load(file, packed=packed)                           # whatever is made once
    tracemalloc.start()
    model, _ = ft.load(file, packed=packed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = sum(a.nbytes for a in model.state_dict().values())
    assert peak < 1.2 * size


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_a_dtype_of_the_callers_choice(dtype, tmp_path):
    file = write_model(tmp_path / "m.gguf", small_llama(), "Q4_1")
    for packed in (False, True):
        model, _ = ft.load(file, dtype, packed=packed)
        assert {str(p.dtype) for p in model.parameters()} == {dtype}
        assert str(host(model(IDS)).dtype) == dtype
    assert host(model.embed.weight.dequantize_rows(slice(0, 1))).dtype == dtype


def test_values_too_large_for_the_dtype_are_refused(tmp_path):
    original = small_llama()
    original.norm.weight.copy_(np.full(64, 1e30))
    with pytest.raises(OverflowError, match="output_norm.weight holds a value too large for float16"):
        ft.load(write_model(tmp_path / "m.gguf", original, "F32"), "float16")


def test_loading_keeps_the_special_tokens_and_the_chat_template_through_save(tmp_path):
    model, tokenizer = ft.load(write_model(tmp_path / "m.gguf", small_llama(), "F32"))
    assert tokenizer.special_tokens == {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>",
                                        "unk": "<|endoftext|>"}
    assert special_token(tokenizer, "eos") == "<|im_end|>"
    assert tokenizer.chat_template == TEMPLATE
    assert chat.chat_end(tokenizer) == "<|im_end|>"
    ft.save(model, tmp_path / "m", tokenizer)
    again, tokenizer_again = ft.load(tmp_path / "m")
    assert tokenizer_again.chat_template == TEMPLATE
    assert special_token(tokenizer_again, "eos") == "<|im_end|>"
    assert again._kept_config == {"pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    np.testing.assert_array_equal(host(again(IDS)), host(model(IDS)))
    line = "the 12 thes<|im_end|>  \n\tin"
    assert tokenizer_again.encode(line).ids == tokenizer.encode(line).ids


def test_packed_wants_a_gguf_file(tmp_path):
    ft.save(small_llama(), tmp_path / "m")
    with pytest.raises(ValueError, match="packed=True wants a GGUF file"):
        ft.load(tmp_path / "m", packed=True)
    with pytest.raises(TypeError, match="load: packed wants True or False"):
        ft.load(write_model(tmp_path / "m.gguf", small_llama()), packed=1)


# ── the keys of the metadata ─────────────────────────────────────────────────────────────────────────────────────────
# Keys that are read: another value gives another config, or is refused with these words.
READ_KEYS: dict[str, tuple[Any, Any]] = {
    "block_count": (3, "missing blk.2"),
    "context_length": (32, {"positions": 32}),
    "embedding_length": (32, "wants llama.rope.dimension_count 8"),
    "feed_forward_length": (64, "wants shape"),
    "vocab_size": (10, "vocab_size wants 272"),
    "attention.head_count": (2, "wants llama.rope.dimension_count 32"),
    "attention.head_count_kv": (4, "wants shape"),
    "attention.key_length": (32, "wants llama.rope.dimension_count 32"),
    "attention.value_length": (32, "wants llama.attention.value_length 16"),
    "attention.layer_norm_rms_epsilon": (1e-3, {"eps": 1e-3}),
    "attention.sliding_window": (16, "has no sliding window"),
    "rope.dimension_count": (8, "wants llama.rope.dimension_count 16"),
    "rope.freq_base": (100.0, {"rope_base": 100.0}),
    "rope.scaling.type": ("yarn", "rope.scaling.type wants none or linear, got 'yarn'"),
    "rope.scaling.factor": (4.0, {"rope_scaling": ft.RotaryScaling("linear", 4.0)}),
    "rope.scale_linear": (2.0, {"rope_scaling": ft.RotaryScaling("linear", 2.0)}),
}
# Keys with one value that our model has, and a value that it does not have.
FIXED_KEYS = {
    "attention.causal": (True, False), "attention.clamp_kqv": (0.0, 8.0), "attention.max_alibi_bias": (0.0, 8.0),
    "attn_logit_softcapping": (0.0, 50.0), "expert_count": (0, 8), "expert_used_count": (0, 2),
    "final_logit_softcapping": (0.0, 30.0), "pooling_type": (0, 1), "rope.scaling.attn_factor": (1.0, 0.5),
    "tensor_data_layout": ("Meta AI original pth", "x"), "use_parallel_residual": (False, True),
}
# Keys of other models of llama.cpp, all refused by name.
REFUSED_KEYS = {
    "attention.scale": 0.1, "attention.output_scale": 2.0, "attention.layer_norm_epsilon": 1e-5, "logit_scale": 0.5,
    "residual_scale": 0.2, "embedding_scale": 12.0, "expert_feed_forward_length": 10, "expert_weights_scale": 2.0,
    "expert_gating_func": 1, "attention.q_lora_rank": 8, "attention.sliding_window_pattern": 2,
    "rope.freq_base_swa": 1.0,
    "rope.dimension_sections": np.array([1, 2], np.int32), "rope.scaling.yarn_log_multiplier": 0.1,
    "rope.scaling.yarn_beta_fast": 32.0, "attention.temperature_length": 10, "interleave_moe_layer_step": 2,
    "ssm.state_size": 16, "swiglu_clamp_exp": np.array([1.0], np.float32), "a\nnew key": 1,
}


def test_the_table_names_every_key():
    assert READ_KEYS.keys() == set(gguf_model.READ)
    assert FIXED_KEYS.keys() == gguf_model.FIXED.keys()


@pytest.mark.parametrize("key", READ_KEYS)
def test_a_key_that_is_read_changes_the_model(key, tmp_path):
    changed, effect = READ_KEYS[key]
    file = write_model(tmp_path / "m.gguf", small_llama(), "F32", changes={f"llama.{key}": changed})
    if isinstance(effect, str):
        with pytest.raises(ValueError, match=effect):
            ft.load(file)
    else:
        config = ft.load(file)[0].config
        assert {name: getattr(config, name) for name in effect} == effect
    for nonsense in ("x", -1.5, float("nan"), np.array([4, 4], np.uint32), ["a"], False):
        write_model(file, small_llama(), "F32", changes={f"llama.{key}": nonsense})
        with pytest.raises(ValueError, match=f"llama.{key} wants"):
            ft.load(file)


@pytest.mark.parametrize("key", FIXED_KEYS)
def test_a_key_with_one_value(key, tmp_path):
    ours, other = FIXED_KEYS[key]
    file = write_model(tmp_path / "m.gguf", small_llama(), "F32", changes={f"llama.{key}": ours})
    ft.load(file)
    for value_of_another in (other, [], "y", np.array([0, 0], np.int32)):
        write_model(file, small_llama(), "F32", changes={f"llama.{key}": value_of_another})
        with pytest.raises(ValueError, match=f"wants llama.{key}"):
            ft.load(file)


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_a_key_of_another_model_is_refused_by_name(key, tmp_path):
    changes = {f"llama.{key}": REFUSED_KEYS[key]}
    with pytest.raises(ValueError, match="which this library does not know") as caught:
        ft.load(write_model(tmp_path / "m.gguf", small_llama(), "F32", changes=changes))
    assert "\n" not in str(caught.value)
    assert key.split("\n")[0] in str(caught.value)


@pytest.mark.parametrize("changes, drop, words", [
    ({"general.architecture": "gemma2"}, (), "general.architecture wants llama or qwen2, got 'gemma2'"),
    ({}, ("general.architecture",), "got None"),
    ({"general.architecture": ["llama"]}, (), "got \\['llama'\\]"),
    ({"general.type": "adapter"}, (), "general.type model, got 'adapter'"),
    ({"split.count": 3}, (), "split.count 0 or 1, got 3"),
    ({"general.quantization_version": 1}, (), "general.quantization_version 2, got 1"),
    ({}, ("llama.block_count",), "llama.block_count wants a whole number of at least 1, got None"),
    ({}, ("llama.attention.layer_norm_rms_epsilon",), "rms_epsilon wants a number above 0, got None"),
    ({"llama.block_count": 10**9}, (), "asks for 1,000,000,000 layers"),
    ({"llama.attention.head_count": 7}, (), "do not divide"),
    ({"llama.attention.head_count": 10**9, "llama.attention.head_count_kv": 10**9}, (), "do not divide"),
])
def test_other_metadata_is_refused(changes, drop, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        ft.load(write_model(tmp_path / "m.gguf", small_llama(), "F32", changes=changes, drop=drop))


def test_harmless_keys_and_defaults(tmp_path):
    changes = {f"llama.{key}": 64 for key in gguf_model.HARMLESS} | {"llama.rope.scaling.type": "none", "other.key": 1}
    drop = ("llama.vocab_size", "llama.rope.dimension_count", "llama.rope.freq_base", "general.type")
    model, _ = ft.load(write_model(tmp_path / "m.gguf", small_llama(key_value_heads=4), "F32", changes=changes,
                                   drop=(*drop, "llama.attention.head_count_kv")))
    assert (model.config.rope_base, model.config.key_value_heads, model.config.rope_scaling) == (10000.0, 4, None)


def test_missing_unexpected_and_wrong_tensors_are_named(tmp_path):
    model = small_llama()
    metadata = model_metadata(model.config)
    tensors = model_tensors(model, "F32")
    file = tmp_path / "m.gguf"
    tensors["blk.0.attn_qkv.weight"] = tensors.pop("blk.0.attn_q.weight")
    file.write_bytes(gguf_bytes(metadata, tensors))
    with pytest.raises(ValueError, match="missing blk.0.attn_q.weight; unexpected blk.0.attn_qkv.weight"):
        ft.load(file)
    tensors = model_tensors(model, "F32") | {"rope_freqs.weight": ("F32", np.ones(8, np.float32))}
    file.write_bytes(gguf_bytes(metadata, tensors))
    with pytest.raises(ValueError, match="rope_freqs.weight, a table that scales rotary frequencies"):
        ft.load(file)
    tensors = model_tensors(model, "F32")
    del tensors["token_embd.weight"]
    file.write_bytes(gguf_bytes(metadata, tensors))
    with pytest.raises(ValueError, match="a matrix token_embd.weight"):
        ft.load(file)


# ── methods on a packed model ────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def packed_model(tmp_path):
    return ft.load(write_model(tmp_path / "base.gguf", small_llama(), "Q4_1"), packed=True)[0]


def batches() -> Any:
    ids = np.random.default_rng(3).integers(3, 250, (8, 12))
    return [{"ids": ids[:4]}, {"ids": ids[4:]}]


@pytest.mark.parametrize("method", [
    ft.LoRA(r=4, targets=("attn.[qkvo]", "mlp.up", "mlp.down")), ft.LoRA(r=4, targets="embed"), ft.PromptTuning(p=3),
    ft.PrefixTuning(p=3), ft.Houlsby(m=4),
], ids=lambda m: type(m).__name__)
def test_methods_train_beside_packed_weights(method, packed_model, tmp_path):
    model = packed_model
    before = host(model(IDS))
    base = {name: host(b).copy() for name, b in model.named_buffers().items()}
    ft.attach(model, method)
    history = ft.fit(model, batches(), 30, ft.AdamW(0.02), progress=False)
    assert np.mean(history.losses[-4:]) < 0.97 * np.mean(history.losses[:4])
    trained = host(model(IDS))
    assert abs(trained - before).max() > 1e-2
    with ft.without(model):
        np.testing.assert_array_equal(host(model(IDS)), before)
    ft.save_adapter(model, tmp_path / "adapter")
    ft.detach(model)
    np.testing.assert_array_equal(host(model(IDS)), before)
    for name, buffer in model.named_buffers().items():
        np.testing.assert_array_equal(host(buffer), base[name], err_msg=name)
    ft.load_adapter(model, tmp_path / "adapter")
    np.testing.assert_array_equal(host(model(IDS)), trained)


def test_merging_onto_a_packed_weight_names_both_alternatives(packed_model):
    model = packed_model
    ft.attach(model, ft.LoRA(r=4))
    ft.fit(model, batches(), 4, ft.AdamW(0.02), progress=False)
    expected = host(model(IDS))
    with pytest.raises(ft.CannotMerge, match="keep the adapter beside it, or unpack the base first"):
        ft.merge(model)
    with pytest.raises(ValueError, match="packed|attached"):
        ft.save(model, "/nonexistent")
    np.testing.assert_array_equal(host(model(IDS)), expected)
    ft.unpack(model)
    np.testing.assert_allclose(host(model(IDS)), expected, atol=2e-5 * abs(expected).max())
    ft.merge(model)
    np.testing.assert_allclose(host(model(IDS)), expected, atol=2e-5 * abs(expected).max())


def test_a_packed_adapter_serves_the_dense_model(packed_model, tmp_path):
    """The adapter trained beside packed weights gives the same logits on the dense weights of the same file."""
    ft.attach(packed_model, ft.LoRA(r=4))
    ft.fit(packed_model, batches(), 4, ft.AdamW(0.02), progress=False)
    ft.save_adapter(packed_model, tmp_path / "adapter")
    dense, _ = ft.load(tmp_path / "base.gguf")
    ft.load_adapter(dense, tmp_path / "adapter")
    expected = host(packed_model(IDS))
    np.testing.assert_allclose(host(dense(IDS)), expected, atol=2e-5 * abs(expected).max())

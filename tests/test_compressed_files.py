"""Models with packed weights on disk: written and read bitwise, refused if damaged, and then models like any other."""
from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import dev, host
from packers import PACKERS, pack_all
from safetensors.numpy import load_file, save_file

import tinyft as ft
from tinyft import edit, nn
from tinyft.compress import stored
from tinyft.compress.packing import pack

IDS = np.array([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]])
V = 30


def gpt(layers: int = 2) -> ft.GPT:
    return ft.GPT(ft.GPTConfig(vocab=V, positions=16, width=32, layers=layers, heads=2), seed=1)


def bert() -> ft.BERT:
    return ft.BERT(ft.BERTConfig(vocab=V, positions=16, width=32, layers=2, heads=2), seed=1)


def bert_classifier() -> nn.Module:
    return ft.classifier(bert(), 3)


def llama() -> ft.Llama:
    return ft.Llama(ft.LlamaConfig(V, 16, 32, 2, 2, 1, hidden=64, tied=True), seed=1)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt": gpt, "bert": bert, "bert classifier": bert_classifier, "llama": llama,
}


def tensors(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: host(a) for name, a in model.state_dict().items()}


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """The same tensors and buffers, bit by bit."""
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype, name
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


# ── there and back ───────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", PACKERS)
def test_a_packed_weight_comes_back_to_the_bit(kind, tmp_path):
    model = pack_all(gpt(), PACKERS[kind], embedding=True)
    ft.save(model, tmp_path / "m")
    again, _ = ft.load(tmp_path / "m")
    assert_same(model, again)
    for path, module in model.named_modules():
        if isinstance(module, nn.Packed):
            other = dict(again.named_modules())[path]
            assert type(other) is type(module) and other.shape == module.shape and other.nbytes == module.nbytes
            assert other.settings() == module.settings()
    np.testing.assert_array_equal(host(model(IDS)), host(again(IDS)))


@pytest.mark.parametrize("name", MODELS)
def test_models_of_all_families_come_back(name, tmp_path):
    model = pack_all(MODELS[name](), ft.RTN(4, 16))
    ft.save(model, tmp_path / "m")
    again, _ = ft.load(tmp_path / "m")
    assert_same(model, again)
    np.testing.assert_array_equal(host(model(IDS)), host(again(IDS)))
    ft.save(again, tmp_path / "n")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "m" / file).read_bytes() == (tmp_path / "n" / file).read_bytes()


def test_every_class_is_in_the_table():
    """A packed class that no file can hold is an oversight, here or in stored.classes."""
    found = set()
    todo = [nn.Packed]
    while todo:
        cls = todo.pop()
        ours = [c for c in cls.__subclasses__() if c.__module__.startswith("tinyft.compress.")]
        todo += ours
        if not ours:
            found.add(cls)
    assert found == set(stored.classes().values())
    tested = {type(packer(np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)))
              for packer in PACKERS.values()}
    assert tested == found


@pytest.mark.parametrize("kind", PACKERS)
def test_nbytes_is_true_to_the_file(kind, tmp_path):
    """The file is its header and the arrays of the model, and nothing else."""
    model = pack_all(llama(), PACKERS[kind])
    ft.save(model, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    dense = sum(p.data.nbytes for p in model.parameters())
    packed = sum(m.nbytes for m in model.modules() if isinstance(m, nn.Packed))
    assert file.stat().st_size == header + dense + packed


def test_one_packed_part_of_a_fused_tensor(tmp_path):
    """GPT-2's file holds q, k and v in one tensor; here v is packed, and k and q stay dense."""
    model = gpt()
    ft.compress(model, ft.RTN(4, 8), targets=("blocks.0.attn.v", "mlp.up"))
    ft.save(model, tmp_path / "m")
    again, _ = ft.load(tmp_path / "m")
    assert_same(model, again)
    names = load_file(tmp_path / "m" / "model.safetensors").keys()
    assert "transformer.h.1.attn.c_attn.weight" in names and "transformer.h.0.attn.c_attn.weight" not in names
    assert "transformer.h.0.attn.c_attn.bias" in names


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_the_dtype_of_the_dense_rows_is_that_of_the_load(dtype, tmp_path):
    model = pack_all(gpt(), ft.RTN(4, 8))
    ft.save(model, tmp_path / "m", dtype="float16" if dtype == "float16" else None)
    again, _ = ft.load(tmp_path / "m", dtype=dtype)
    weight = again.blocks[1].mlp.up.weight
    assert weight.dequantize().dtype == dtype and again.embed.weight.dtype == dtype
    assert host(weight.codes).tobytes() == host(model.blocks[1].mlp.up.weight.codes).tobytes()
    np.testing.assert_allclose(host(again(IDS)).astype(float), host(model(IDS)).astype(float), atol=0.02)


def test_a_loaded_model_survives_the_replacement_of_its_files(tmp_path):
    """Large files are mapped, and a save replaces them by a rename."""
    model = ft.GPT(ft.GPTConfig(vocab=300, positions=16, width=256, layers=2, heads=2), seed=1)
    ft.compress(model, ft.RTN(8, 64))
    ft.save(model, tmp_path / "m")
    again, _ = ft.load(tmp_path / "m")
    before = host(again(IDS))
    ft.save(gpt(), tmp_path / "m")
    np.testing.assert_array_equal(host(again(IDS)), before)


def test_unpacked_it_is_a_model_for_all(tmp_path):
    model = pack_all(gpt(), ft.RTN(4, 8))
    y = host(model(IDS))
    ft.save(ft.unpack(model), tmp_path / "m")
    again, _ = ft.load(tmp_path / "m")
    assert not any(isinstance(m, nn.Packed) for m in again.modules())
    np.testing.assert_allclose(host(again(IDS)), y, atol=1e-5)
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())


# ── lies ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
Files = tuple[dict[str, Any], dict[str, np.ndarray]]
WEIGHT = "blocks.0.attn.q.weight"


def entry(config: dict[str, Any], number: int = 0) -> dict[str, Any]:
    return config["quantization_config"]["weights"][number]


def set_setting(key: str, value: Any) -> Callable[[dict, dict], None]:
    def change(config: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        entry(config)[key] = value
    return change


def set_array(key: str, value: Any) -> Callable[[dict, dict], None]:
    """Another array for one weight; a function of the old one, or None to remove it."""
    def change(config: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        old = arrays.pop(f"{WEIGHT}.{key}", None)
        if value is not None:
            arrays[f"{WEIGHT}.{key}"] = value(old)
    return change


def set_entry(key: str, value: Any) -> Callable[[dict, dict], None]:
    def change(config: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        config["quantization_config"][key] = value
    return change


def infinite(bits: np.ndarray) -> np.ndarray:
    out = bits.copy()
    out[0, 0] = 0x7C00
    return out


def not_a_number(bits: np.ndarray) -> np.ndarray:
    out = bits.astype(np.uint32)
    out[0, 0] = 0x7FC00000
    return out


def twice(config: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    entry(config)["names"].append(WEIGHT)


def other_name(name: str) -> Callable[[dict, dict], None]:
    def change(config: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        entry(config)["names"].append(name)
    return change


LIES: dict[str, tuple[Callable[[dict, dict], None], str]] = {
    "another class": (set_setting("class", "os.system"), "wants one of the classes Uniform"),
    "a base class": (set_setting("class", "Grouped"), "wants one of the classes"),
    "no class": (set_setting("class", None), "wants one of the classes"),
    "a list as class": (set_setting("class", ["Uniform"]), "wants one of the classes"),
    "other bits": (set_setting("bits", 3), r"codes wants the shape \(12, 32\), got \(16, 32\)"),
    "no bits": (set_setting("bits", 0), "bits wants a whole number from 1 to 8, got 0"),
    "half bits": (set_setting("bits", 4.0), "bits wants a whole number"),
    "true bits": (set_setting("bits", value=True), "bits wants a whole number"),
    "many bits": (set_setting("bits", 10**30), "bits wants a whole number from 1 to 8"),
    "another group": (set_setting("group", 7), "scale_bits wants the shape"),
    "no group": (set_setting("group", 0), "group wants a whole number from 1 to 32, got 0"),
    "a huge group": (set_setting("group", 1 << 60), "group wants a whole number from 1 to 32"),
    "another kind": (set_setting("kind", "symmetric"), "has no array 'zero_codes'"),
    "an unknown kind": (set_setting("kind", "cubic"), "wants one of 'affine'"),
    "a kind without these bits": (set_setting("kind", "sign"), "take 1 bit"),
    "one setting more": (set_setting("shape", [1 << 40, 1 << 40]), "has no setting 'shape'"),
    "no codes": (set_array("codes", None), "wants the array codes, got none"),
    "no scales": (set_array("scale_bits", None), "wants the array scale_bits, got none"),
    "no zero points": (set_array("zero_codes", None), "wants the array zero_codes, got none"),
    "signed codes": (set_array("codes", lambda a: a.view(np.int8)), "codes wants the dtype uint8, got int8"),
    "fewer codes": (set_array("codes", lambda a: a[:-1]), "codes wants the shape"),
    "flat codes": (set_array("codes", lambda a: a.reshape(-1)), "codes wants the shape"),
    "transposed codes": (set_array("codes", lambda a: np.ascontiguousarray(a.T)), "codes wants the shape"),
    "real scales": (set_array("scale_bits", lambda a: a.view(np.float16)), "scale_bits wants the dtype uint16 or"),
    "an infinite scale": (set_array("scale_bits", infinite), "scale_bits wants finite numbers"),
    "a scale that is NaN": (set_array("scale_bits", not_a_number), "scale_bits wants finite numbers"),
    "no order": (set_array("order", lambda _: np.zeros(32, np.int32)), "an order of the 32 inputs, each once"),
    "an order beyond the inputs": (set_array("order", lambda _: np.arange(32, dtype=np.int32) + 1), "each once"),
    "a negative order": (set_array("order", lambda _: np.arange(32, dtype=np.int32) - 32), "each once"),
    "a long order": (set_array("order", lambda _: np.arange(64, dtype=np.int32)), "order wants the shape"),
    "input scales of 0": (set_array("input_scale_bits", lambda _: np.zeros(32, np.uint16)), "positive input scales"),
    "one array more": (set_array("secret", lambda _: np.zeros(3)), "has no array 'secret'"),
    "an unknown weight": (other_name("blocks.9.attn.q.weight"), "blocks.9.attn.q.weight, which the model does not"),
    "a name with a line break": (other_name("a\nb"), r"names 'a\\nb', which the model does not have"),
    "a weight twice": (twice, "names blocks.0.attn.q.weight twice"),
    "a bias": (other_name("blocks.0.attn.q.bias"), "can be packed"),
    "a norm": (other_name("blocks.0.norm1.weight"), "can be packed"),
    "a dense weight": (other_name("embed.weight"), "wants the array codes, got none"),
    "another form": (set_entry("form", 2), "another version of tinyft wrote it"),
    "no form": (set_entry("form", value=True), "another version of tinyft wrote it"),
    "no list": (set_entry("weights", {}), "wants a list of weights"),
    "no names": (set_entry("weights", [{"class": "Uniform"}]), "wants settings with the names of weights"),
    "a number as name": (set_entry("weights", [{"names": [1]}]), "wants settings with the names of weights"),
    "no weights": (set_entry("weights", []), "the tensors are not those"),
    "another library": (set_entry("library", "x"), "wants quantization_config None"),
}


def write_lie(folder: Path, change: Callable[[dict, dict], None], packer: ft.compress.Rule | None = None) -> None:
    ft.save(pack_all(gpt(), packer or ft.RTN(4, 8)), folder)
    config = json.loads((folder / "config.json").read_text())
    arrays = load_file(folder / "model.safetensors")
    change(config, arrays)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(arrays, folder / "model.safetensors")


@pytest.mark.parametrize("name", LIES)
def test_lies_are_refused_in_one_sentence(name, tmp_path):
    change, message = LIES[name]
    write_lie(tmp_path / "m", change)
    with pytest.raises(ValueError, match=message) as caught:
        ft.load(tmp_path / "m")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_what_is_no_lie_is_read(tmp_path):
    """The writer of the lies writes the truth, too."""
    write_lie(tmp_path / "m", set_setting("bits", 4))
    ft.load(tmp_path / "m")


@pytest.mark.parametrize("kind, bits, code", [("absmax", 4, 15), ("absmax", 3, 7), ("ternary", 2, 3)])
def test_codes_beyond_the_grid_are_refused(kind, bits, code, tmp_path):
    model = pack_all(gpt(), ft.RTN(bits, 8, kind))
    weight = model.blocks[1].mlp.down.weight
    codes = weight.code_matrix().copy()
    codes[-1, -1] = code
    weight.codes = dev(pack(np.ascontiguousarray(codes.T), bits))
    ft.save(model, tmp_path / "m")
    with pytest.raises(ValueError, match=f"blocks.1.mlp.down.weight is damaged: .* codes from 0 to {code - 1}, got"):
        ft.load(tmp_path / "m")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_lies_about_blocks_are_refused(kind, tmp_path):
    ft.save(pack_all(gpt(), PACKERS[kind]), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    good = load_file(file)
    scales = good[f"{WEIGHT}.scale_bits"]
    for wrong, message in [
        ({f"{WEIGHT}.scale_bits": infinite(scales)}, "finite"),
        ({f"{WEIGHT}.scale_bits": scales.astype(np.uint32)}, "dtype uint16"),
        ({f"{WEIGHT}.codes": good[f"{WEIGHT}.codes"][..., :-1].copy()}, "codes wants the shape"),
        ({f"{WEIGHT}.order": np.arange(32, dtype=np.int32)}, "has no array 'order'"),
    ]:
        save_file(good | wrong, file)
        with pytest.raises(ValueError, match=message):
            ft.load(tmp_path / "m")


def minus_128(codes: np.ndarray) -> np.ndarray:
    out = codes.copy()
    out[-1, -1] = -128
    return out


def first_infinite(bits: np.ndarray) -> np.ndarray:
    out = bits.astype(np.uint32)
    out[0] = 0x7F800000
    return out


INT8_LIES: dict[str, tuple[Callable[[dict, dict], None], str]] = {
    "other activations": (set_setting("activations", "minmax"), "activations wants one of 'absmax', 'affine'"),
    "no activations": (set_setting("activations", None), "activations wants one of"),
    "a list of activations": (set_setting("activations", ["absmax"]), "activations wants"),
    "a threshold of 0": (set_setting("threshold", 0), "threshold wants a finite number > 0, got 0"),
    "a threshold in words": (set_setting("threshold", "6"), "threshold wants a finite number > 0"),
    "a true threshold": (set_setting("threshold", value=True), "threshold wants a finite number > 0"),
    "one setting more": (set_setting("bits", 8), "has no setting 'bits'"),
    "no codes": (set_array("codes", None), "wants the array codes, got none"),
    "no scales": (set_array("scale_bits", None), "wants the array scale_bits, got none"),
    "unsigned codes": (set_array("codes", lambda a: a.view(np.uint8)), "codes wants the dtype int8, got uint8"),
    "fewer codes": (set_array("codes", lambda a: a[:-1]), r"codes wants the shape \(32, 32\), got \(31, 32\)"),
    "flat codes": (set_array("codes", lambda a: a.reshape(-1)), "codes wants the shape"),
    "a code of -128": (set_array("codes", minus_128), "codes from -127 to 127, got -128"),
    "real scales": (set_array("scale_bits", lambda a: a.view(np.float32)), "scale_bits wants the dtype uint16 or"),
    "a scale for each group": (set_array("scale_bits", lambda a: a[None]), r"wants the shape \(32,\), got \(1, 32\)"),
    "an infinite scale": (set_array("scale_bits", first_infinite), "scale_bits wants finite numbers"),
    "whole dense weights": (set_array("dense", lambda a: a.astype(np.int8)), "dense wants the dtype float64 or"),
    "fewer dense weights": (set_array("dense", lambda a: a[:-1]), "dense wants the shape"),
    "one array more": (set_array("zero_codes", lambda _: np.zeros(3, np.uint8)), "has no array 'zero_codes'"),
}


@pytest.mark.parametrize("name", INT8_LIES)
def test_lies_about_8_bit_weights_are_refused_in_one_sentence(name, tmp_path):
    change, message = INT8_LIES[name]
    write_lie(tmp_path / "m", change, ft.LLMInt8(outlier_weights="dense"))
    with pytest.raises(ValueError, match=message) as caught:
        ft.load(tmp_path / "m")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_what_is_no_lie_about_8_bit_weights_is_read(tmp_path):
    """Without the dense weights, outliers are multiplied with the rounded ones."""
    write_lie(tmp_path / "m", set_array("dense", None), ft.LLMInt8(outlier_weights="dense"))
    again, _ = ft.load(tmp_path / "m")
    assert again.blocks[0].attn.q.weight.dense is None and again.blocks[1].attn.q.weight.dense is not None


def test_a_class_of_another_library_is_not_written(tmp_path):
    class Mine(nn.Packed):
        shape = (32, 32)

    model = gpt()
    model.blocks[0].attn.q.weight = Mine()
    with pytest.raises(ValueError, match="blocks.0.attn.q.weight is packed: .*got a Mine: unpack the model first"):
        ft.save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


# ── a model like any other ───────────────────────────────────────────────────────────────────────────────────────────
def batches(count: int = 4) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"ids": rng.integers(0, V, (4, 10))} for _ in range(count)]


@pytest.fixture(params=["affine", "reordered", "Q4_1"])
def compressed(request, tmp_path) -> nn.Module:
    """A packed model that went through a file."""
    ft.save(pack_all(llama(), PACKERS[request.param]), tmp_path / "base")
    return ft.load(tmp_path / "base")[0]


def test_it_evaluates_and_generates_as_its_dense_values(compressed, tmp_path):
    dense, _ = ft.load(tmp_path / "base")
    ft.unpack(dense)
    for a, b in zip(ft.evaluate(compressed, batches()).values(), ft.evaluate(dense, batches()).values()):
        assert a == pytest.approx(b, rel=1e-5)
    written = [ft.generate(model, IDS[:, :3], max_new_tokens=6) for model in (compressed, dense)]
    np.testing.assert_array_equal(*written)


def test_lora_trains_on_top_and_leaves_the_base_to_the_bit(compressed, tmp_path):
    before = tensors(compressed)
    y = host(compressed(IDS))
    ft.attach(compressed, ft.LoRA(r=2, targets=("attn.[qv]", "mlp.down")))
    history = ft.fit(compressed, batches(), 12, ft.AdamW(0.02), progress=False)
    assert np.mean(history.losses[-4:]) < np.mean(history.losses[:4])
    tuned = host(compressed(IDS))
    assert abs(tuned - y).max() > 1e-3
    ft.save_adapter(compressed, tmp_path / "adapter")
    ft.detach(compressed)
    np.testing.assert_array_equal(host(compressed(IDS)), y)
    assert before.keys() == tensors(compressed).keys()
    for name, array in tensors(compressed).items():
        assert array.tobytes() == before[name].tobytes(), name

    again, _ = ft.load(tmp_path / "base")
    ft.load_adapter(again, tmp_path / "adapter")
    np.testing.assert_array_equal(host(again(IDS)), tuned)


def test_an_adapter_wants_the_packed_base_that_it_was_trained_on(compressed, tmp_path):
    """Its unpacked form is the same base; another packing, the dense original and one other code are other bases."""
    ft.attach(compressed, ft.LoRA(r=2))
    ft.save_adapter(compressed, tmp_path / "adapter")
    unpacked, _ = ft.load(tmp_path / "base")
    ft.load_adapter(ft.unpack(unpacked), tmp_path / "adapter")
    one_code, _ = ft.load(tmp_path / "base")
    codes = host(one_code.blocks[1].mlp.up.weight.codes).copy()
    codes.reshape(-1)[5] ^= 1
    one_code.blocks[1].mlp.up.weight.codes = dev(codes)
    for other in (llama(), pack_all(llama(), ft.RTN(8, 8)), one_code):
        with pytest.raises(ValueError, match="other weights"):
            ft.load_adapter(other, tmp_path / "adapter")
        assert not edit.attached(other)


def test_merge_names_both_alternatives_and_changes_nothing(compressed):
    ft.attach(compressed, ft.LoRA(r=2))
    before = tensors(compressed)
    with pytest.raises(ft.CannotMerge, match="keep the adapter beside it, or unpack the base first"):
        ft.merge(compressed)
    assert edit.attached(compressed)
    assert all(array.tobytes() == before[name].tobytes() for name, array in tensors(compressed).items())
    y = host(compressed(IDS))
    ft.merge(ft.unpack(compressed))
    np.testing.assert_allclose(host(compressed(IDS)), y, atol=1e-5)


def test_a_run_on_a_packed_base_goes_on_after_a_stop(compressed, tmp_path):
    """The checkpoint holds what trains, and not the base."""
    def run(model: nn.Module, steps: int, out: Path) -> np.ndarray:
        ft.attach(model, ft.LoRA(r=2))
        ft.fit(model, batches(), 8, ft.AdamW(0.02), out=out, resume=True, save_every=4, progress=False,
               on_step=lambda step, terms: stop_at(step, steps))
        return host(model(IDS))

    def stop_at(step: int, steps: int) -> None:
        if step == steps:
            raise KeyboardInterrupt

    whole = run(compressed, 100, tmp_path / "whole")
    stopped, _ = ft.load(tmp_path / "base")
    with pytest.raises(KeyboardInterrupt):
        run(stopped, 6, tmp_path / "run")
    resumed, _ = ft.load(tmp_path / "base")
    np.testing.assert_array_equal(run(resumed, 100, tmp_path / "run"), whole)
    names = load_file(tmp_path / "run" / "checkpoint.safetensors").keys()
    assert not any(".codes" in name for name in names)


def test_a_packed_classifier_predicts(tmp_path):
    """A text classifier with a new head: compressed, saved, loaded; the same classes."""
    tokenizer = ft.data.shipped_tokenizer()
    sizes = ft.BERTConfig(vocab=tokenizer.get_vocab_size(), positions=32, width=32, layers=2, heads=2)
    model = ft.classifier(ft.BERT(sizes, seed=1), 3)
    ft.compress(model, ft.RTN(8, 16))
    texts = ["Return the value.", "import os", "a b"]
    ft.save(model, tmp_path / "m", tokenizer)
    again, loaded_tokenizer = ft.load(tmp_path / "m")
    ours, theirs = ft.predict(model, tokenizer, texts), ft.predict(again, loaded_tokenizer, texts)
    assert ours.labels == theirs.labels
    np.testing.assert_array_equal(ours.probabilities, theirs.probabilities)


def test_a_file_that_asks_for_much_costs_little(tmp_path):
    """Sizes are compared before memory is taken: 10,000 names, and a group and a width far beyond the file."""
    ft.save(pack_all(gpt(), ft.RTN(4, 8)), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    entry(config)["names"] += [f"blocks.{i}.attn.q.weight" for i in range(2, 10_000)]
    config["n_embd"] = 1 << 40
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with ft.peak_memory() as memory, pytest.raises(ValueError):
        ft.load(tmp_path / "m")
    assert memory["bytes"] < 20 * os.path.getsize(tmp_path / "m" / "config.json")

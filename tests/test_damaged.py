"""Damaged and forged model directories and adapters: one sentence, little time and memory, and an unchanged model."""
from __future__ import annotations

import errno
import json
import os
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import host, time_limit
from safetensors.numpy import load_file, save_file
from test_atomic import kills
from tokenizers import Tokenizer, models, pre_tokenizers

from tinyft import (
    GPT,
    AdamW,
    GPTConfig,
    Houlsby,
    LoRA,
    PrefixTuning,
    PromptTuning,
    array,
    attach,
    edit,
    fit,
    load,
    load_adapter,
    save,
    save_adapter,
)
from tinyft.adapters.files import digest
from tinyft.files import read_tensors, write_tensors

CONFIG = GPTConfig(23, 24, 12, 2, 3, 20)
SECONDS = 2                                              # of processor time that a refusal may take
MEGABYTES = 80
NASTY = (None, True, -1, 0, 1 << 70, 1.5, 1e30, "", "x", "\ud800", "a\nb", [], [[]], [None], {}, {"": 0}, {"class": 3})


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    """These tests do not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def one_line(e: BaseException) -> bool:
    return "\n" not in str(e) and 10 < len(str(e)) < 1500


@contextmanager
def frugal() -> Iterator[None]:
    """Fails if the body takes more processor time or memory than a refusal may, or waits."""
    tracemalloc.start()
    try:
        with time_limit(SECONDS, 30 * SECONDS):
            yield
        assert tracemalloc.get_traced_memory()[1] < MEGABYTES << 20
    finally:
        tracemalloc.stop()


def state(model: Any) -> dict[str, Any]:
    """All that a refused adapter must leave as it was."""
    values = {name: host(p).tobytes() for name, p in model.named_parameters().items()}
    trains = {name: p.requires_grad for name, p in model.named_parameters().items()}
    return {"values": values, "trains": trains, "attached": [a.name for a in edit.attached(model)]}


# ── adapters ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """The folder of a good adapter."""
    model = GPT(CONFIG)
    attach(model, LoRA(r=2))
    return save_adapter(model, tmp_path / "adapter")


def refuses(folder: Path, words: str | None = None, errors: Any = (ValueError, FileNotFoundError, LookupError)) -> None:
    """load_adapter refuses the folder in one sentence, and the model is what it was."""
    model = GPT(CONFIG)
    before = state(model)
    with frugal(), pytest.raises(errors, match=words) as e:
        load_adapter(model, folder)
    assert one_line(e.value), str(e.value)
    assert type(e.value) not in (KeyError, IndexError)
    assert state(model) == before


def forge(folder: Path, facts: dict[str, Any], arrays: dict[str, np.ndarray] | None = None) -> None:
    """Write both files with sums that fit."""
    if arrays is None:
        arrays, _ = read_tensors(folder / "adapter.safetensors")
    (folder / "adapter.json").write_text(json.dumps(facts))
    write_tensors(folder / "adapter.safetensors", arrays, {"sum": digest(facts)})


def facts_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter.json").read_text())


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_folder(path: Path) -> None:
    path.mkdir()


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


ODD_FILES = [make_pipe, make_folder, link_to_device, link_to_nothing]


@pytest.mark.parametrize("make", ODD_FILES)
@pytest.mark.parametrize("file", ["adapter.json", "adapter.safetensors"])
def test_no_ordinary_file(make, file, adapter):
    """Reading a pipe waits for ever, and a device has no end."""
    (adapter / file).unlink()
    make(adapter / file)
    refuses(adapter, "is no ordinary file", FileNotFoundError)


def test_json_that_is_deep_long_or_ambiguous(adapter):
    file = adapter / "adapter.json"
    good = file.read_text()
    for content, words in {
        '{"a":' * 100_000: "is damaged",
        '{"a":' + "[" * 50 + "]" * 50 + "}": "at most 40 lists and objects",
        '{"a": ' + "[[], " * 30 + "[]" + "]" * 30 + "}": "it has no base",
        " " * (5 << 20) + good: "wanted at most 4,194,304 bytes",
        good.replace('"seed": 0', '"seed": 0, "seed": 1'): "the key 'seed' stands twice",
        good.replace('"seed": 0', '"\\ud800": 0'): "surrogates not allowed",
        good.replace('"seed": 0', '"seed": NaN'): "wanted finite numbers, got nan",
        good.replace('"alpha": 16.0', '"alpha": 1e999'): "wanted finite numbers, got inf",
        good.replace('"seed": 0', '"seed": ' + "9" * 10_000): "is damaged",
        "{" + ", ".join(f'"{i}": 0' for i in range(200_000)) + ', "0": 1}': "the key '0' stands twice",
    }.items():
        file.write_text(content)
        refuses(adapter, words, ValueError)


def paths_in(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside a value of JSON."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from paths_in(entry, (*path, key))


def replaced(facts: Any, path: tuple, value: Any) -> Any:
    """A copy of the facts with another value at a path."""
    if not path:
        return value
    out = dict(facts) if isinstance(facts, dict) else list(facts)
    out[path[0]] = replaced(facts[path[0]], path[1:], value)
    return out


def test_every_fact_of_another_kind_loads_or_is_refused(adapter):
    """The sums are forged too. A value that the method can work with is no damage."""
    good = facts_of(adapter)
    arrays, _ = read_tensors(adapter / "adapter.safetensors")
    refused = 0
    for path in paths_in(good):
        for value in NASTY:
            facts = replaced(good, path, value)
            forge(adapter, facts, arrays)
            model = GPT(CONFIG)
            before = state(model)
            try:
                with time_limit(SECONDS, 30 * SECONDS):
                    load_adapter(model, adapter)
            except (ValueError, LookupError) as e:
                assert type(e) not in (KeyError, IndexError), (path, value, e)
                assert one_line(e), (path, value, e)
                assert state(model) == before, (path, value)
                refused += 1
            else:
                assert np.isfinite(host(model(np.zeros((1, 3), int)))).all(), (path, value)
    assert refused > 200


@pytest.mark.parametrize("key", ["method", "name", "head", "base"])
def test_missing_keys(key, adapter):
    facts = facts_of(adapter)
    del facts[key]
    forge(adapter, facts)
    refuses(adapter, f"it has no {key}", ValueError)


@pytest.mark.parametrize("key", ["family", "shapes", "numbers", "tensors", "head", "weights"])
def test_missing_keys_of_the_base(key, adapter):
    facts = facts_of(adapter)
    del facts["base"][key]
    forge(adapter, facts)
    refuses(adapter, f"adapter.json is damaged: {key} wants", ValueError)


@pytest.mark.parametrize("seed", [-1, 1.5, True, None, "0", [1, 2], {}, 1 << 200])
def test_seeds_that_are_no_whole_numbers(seed, adapter):
    forge(adapter, facts_of(adapter) | {"seed": seed})
    refuses(adapter, "adapter.json is damaged: seed wants a whole number", ValueError)


FORGED_SIZES = [
    (LoRA(r=2), "r"),
    (Houlsby(m=2), "m"),
    (PromptTuning(p=2), "p"),
    (PromptTuning(p=2, init="uniform"), "p"),
    (PrefixTuning(p=2), "p"),
    (PrefixTuning(p=2, mlp=3), "p"),
    (PrefixTuning(p=2, mlp=3), "mlp"),
]


@pytest.mark.parametrize("size", [1000, 10**5, 10**7, 10**9, 10**15])
@pytest.mark.parametrize("method, field", FORGED_SIZES)
def test_a_forged_rank_takes_no_memory(method, field, size, tmp_path):
    """The file holds a few numbers; the fields claim billions."""
    model = GPT(CONFIG)
    attach(model, method)
    folder = save_adapter(model, tmp_path / "adapter")
    facts = facts_of(folder)
    facts["method"]["fields"][field] = size
    forge(folder, facts)
    refuses(folder, None, ValueError)


@pytest.mark.parametrize("glob", ["a*" * 40, "*a" * 40, "**" * 40, "**a" * 40, "[a-z]*" * 40, "*.*" * 20, "?" * 900])
def test_a_forged_glob_takes_no_time(glob, adapter):
    facts = facts_of(adapter)
    facts["method"]["fields"]["targets"] = [glob, glob + "!"]
    forge(adapter, facts)
    refuses(adapter)


@pytest.mark.parametrize("fields, words", [
    ({"targets": "x" * 20_000}, "texts of at most"),
    ({"targets": ["attn.q"] * 1000}, "at most 100 entries"),
    ({"targets": []}, None),
    ({"targets": 5}, None),
    ({"r": "8"}, None),
    ({"r": -1}, None),
    ({"r": None}, None),
    ({"r" * 300: 1}, None),
    ({"a\nb": 1}, None),
])
def test_fields_that_the_method_cannot_have(fields, words, adapter):
    facts = facts_of(adapter)
    facts["method"]["fields"] |= fields
    forge(adapter, facts)
    refuses(adapter, words, ValueError)


@pytest.mark.parametrize("name", ["", "tinyft.", "tinyft.methods.LoRA.", "os.system", "x" * 5000, "a\nb",
                                  "tinyft.Method", "tinyft.Attached", "\ud800"])
def test_wrong_class_names(name, adapter):
    facts = facts_of(adapter)
    facts["method"]["class"] = name
    forge(adapter, facts)
    refuses(adapter, None, ValueError)


def with_tensor(name: str, value: np.ndarray | None) -> Callable[[dict], dict]:
    """Arrays with another value under a name; None removes it."""
    def change(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        out = {**arrays, name: value}
        return {n: a for n, a in out.items() if a is not None}
    return change


A = "blocks.0.attn.q:A"
WRONG_ARRAYS = {
    "missing": with_tensor(A, None),
    "unexpected": with_tensor("x", np.ones(3)),
    "a name with a line break": with_tensor("x\ny", np.ones(3)),
    "a long name": with_tensor("x" * 100_000, np.ones(3)),
    "another shape": with_tensor(A, np.ones((3, 12), np.float32)),
    "no axes": with_tensor(A, np.float32(1)),
    "empty": with_tensor(A, np.ones((0, 12), np.float32)),
    "whole numbers": with_tensor(A, np.ones((2, 12), np.int64)),
    "truth values": with_tensor(A, np.ones((2, 12), bool)),
    "NaN": with_tensor(A, np.full((2, 12), np.nan, np.float32)),
    "infinite": with_tensor(A, np.full((2, 12), -np.inf, np.float16)),
    "too large": with_tensor(A, np.full((2, 12), 1e300)),
}


@pytest.mark.parametrize("change", WRONG_ARRAYS.values(), ids=list(WRONG_ARRAYS))
def test_wrong_arrays(change, adapter):
    arrays, _ = read_tensors(adapter / "adapter.safetensors")
    forge(adapter, facts_of(adapter), change(arrays))
    refuses(adapter, None, ValueError)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, "bfloat16"])
def test_arrays_of_another_floating_point_dtype_load(dtype, adapter):
    arrays, _ = read_tensors(adapter / "adapter.safetensors")
    forge(adapter, facts_of(adapter), {name: a.astype(dtype) for name, a in arrays.items()})
    model = GPT(CONFIG)
    load_adapter(model, adapter)
    stored = arrays[A].astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(host(model.blocks[0].attn.q.edits["lora"].A), stored)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[1]", "3", ""])
def test_facts_in_the_header_of_another_kind(text, adapter):
    save_file({"a": np.ones(2)}, adapter / "adapter.safetensors", metadata={"facts": text})
    refuses(adapter, "adapter.safetensors is damaged", ValueError)


def test_a_header_without_data(adapter):
    """The header is as long as it says, and claims no bytes, or claims some that are not there."""
    for header in ({}, {"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
                   {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}):
        text = json.dumps(header).encode()
        (adapter / "adapter.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
        refuses(adapter, "adapter.safetensors is damaged", ValueError)


@pytest.mark.parametrize("arguments", [
    {"path": 3}, {"path": None}, {"path": b"adapter"}, {"model": 3}, {"model": None}, {"method": 3}, {"method": "LoRA"},
    {"method": int}, {"name": 3},
])
def test_arguments_of_another_kind(arguments, adapter):
    model = GPT(CONFIG)
    before = state(model)
    with pytest.raises(TypeError) as e:
        load_adapter(**{"model": model, "path": adapter, **arguments})
    assert one_line(e.value)
    assert state(model) == before


def test_saving_what_could_not_be_loaded_again_is_refused(tmp_path):
    for method, spoil in ((LoRA(r=2, alpha=4.0), np.nan), (LoRA(r=2, alpha=4.0), np.inf)):
        model = GPT(CONFIG)
        attach(model, method)
        p = model.blocks[0].attn.q.edits["lora"].A
        p.copy_(np.full(p.shape, spoil, np.float32))
        with pytest.raises(ValueError, match="wants finite numbers"):
            save_adapter(model, tmp_path / "a")
    model = GPT(CONFIG)
    a = attach(model, LoRA(r=2))
    object.__setattr__(a.method, "alpha", float("inf"))
    with pytest.raises(ValueError, match="fields .* cannot be written"):
        save_adapter(model, tmp_path / "a")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file; save_adapter wants a directory"):
        save_adapter(model, tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_seed_of_numpy_is_saved_as_a_number(tmp_path):
    model = GPT(CONFIG)
    attach(model, LoRA(r=2), seed=np.int64(3))
    save_adapter(model, tmp_path)
    fresh = GPT(CONFIG)
    assert load_adapter(fresh, tmp_path).seed == 3


# ── model directories ────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A good model directory."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return save(GPT(CONFIG), tmp_path / "model", words)


def load_refuses(folder: Path, words: str | None = None, errors: Any = (ValueError, FileNotFoundError)) -> None:
    with frugal(), pytest.raises(errors, match=words) as e:
        load(folder)
    assert one_line(e.value), str(e.value)
    assert str(folder) in str(e.value)


@pytest.mark.parametrize("make", ODD_FILES)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_no_ordinary_file_of_a_model(make, file, directory):
    (directory / file).unlink()
    make(directory / file)
    if file == "tokenizer_config.json":                  # an optional file: refused or left out, never waited for
        with frugal():
            try:
                load(directory)
            except (ValueError, FileNotFoundError) as e:
                assert one_line(e)
        return
    load_refuses(directory, "is no ordinary file", FileNotFoundError)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("content, words", [
    ({"weight_map": {"a": "x" * 300 + ".safetensors"}}, "wanted a weight_map"),
    ({"weight_map": {"a": "é" * 150 + ".safetensors"}}, "wanted a weight_map"),
    ({"weight_map": {"a": "../model.safetensors"}}, "wanted a weight_map"),
    ({"weight_map": {"a": "/etc/passwd"}}, "wanted a weight_map"),
    ({"weight_map": {"a": "x\\y.safetensors"}}, "wanted a weight_map"),
    ({"weight_map": {"a": "x\0.safetensors"}}, "wanted a weight_map"),
    ({"weight_map": {"a": "x\n.safetensors"}}, "wanted a weight_map"),
    ({"weight_map": {"a": "\ud800.safetensors"}}, "surrogates not allowed"),
    ({"weight_map": {"a": ["x.safetensors"]}}, "wanted a weight_map"),
    ({"weight_map": {"a": "shard.bin"}}, "wanted a weight_map"),
    ({"weight_map": ["x.safetensors"]}, "wanted a weight_map"),
    ({"weight_map": None}, "wanted a weight_map"),
    ({}, "wanted a weight_map"),
    ([], "wanted a JSON object"),
    ({"weight_map": {}}, "asks for 2 layers; the file holds 0 tensors"),
    ({"weight_map": {"a": "missing.safetensors"}}, "has no missing.safetensors"),
    ({"weight_map": {"a\nb": "shard.safetensors"}}, r"'a\\nb' stands in"),
    ({"weight_map": {"a": "shard.safetensors", "b" * 10_000: "shard.safetensors"}}, "stands in"),
])
def test_an_index_of_shards_that_is_wrong(content, words, directory):
    (directory / "model.safetensors").rename(directory / "shard.safetensors")
    (directory / INDEX).write_text(json.dumps(content))
    load_refuses(directory, words)


def header_only(folder: Path, header: dict[str, Any], data: bytes = b"") -> None:
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(*shape: int, begin: int = 0, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + 4 * int(np.prod(shape))]}


def test_a_header_with_no_data_overlapping_data_or_impossible_shapes(directory):
    header_only(directory, {})
    load_refuses(directory, "the file holds 0 tensors")
    header_only(directory, {"a": entry(0), "b": entry(3, 0)})
    load_refuses(directory)
    header_only(directory, {"a": entry(4)})
    load_refuses(directory, "is damaged")
    header_only(directory, {"a": entry(4), "b": entry(4, begin=8)}, bytes(24))
    load_refuses(directory, "is damaged")
    header_only(directory, {"a": {**entry(4), "shape": [1] * 100 + [4]}}, bytes(16))
    load_refuses(directory, "is damaged")
    for length in (0, 1, 1 << 40, (1 << 64) - 1):
        (directory / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
        load_refuses(directory, "is damaged")
    (directory / "model.safetensors").write_bytes(b"")
    load_refuses(directory, "is damaged")


def test_a_model_with_a_tensor_of_no_entries_is_read(tmp_path):
    """Such tensors are no damage: a file may hold them beside the weights, and read_tensors reads files of nothing."""
    write_tensors(tmp_path / "x", {"empty": np.ones((0, 3), np.float32)}, {"a": 1})
    arrays, facts = read_tensors(tmp_path / "x")
    assert arrays["empty"].shape == (0, 3)
    assert facts == {"a": 1}
    write_tensors(tmp_path / "x", {}, {})
    assert read_tensors(tmp_path / "x") == ({}, {})


def test_every_entry_of_the_config_of_another_kind_loads_or_is_refused(directory, tmp_path):
    """What loads is saved and loads again."""
    good = json.loads((directory / "config.json").read_text())
    good |= {"id2label": {"0": "a"}, "label2id": {"a": 0}, "problem_type": "x", "eos_token_id": 0, "num_labels": 2}
    for path in paths_in(good):
        for value in NASTY:
            (directory / "config.json").write_text(json.dumps(replaced(good, path, value)))
            try:
                with time_limit(SECONDS, 30 * SECONDS):
                    model, _ = load(directory)
            except ValueError as e:
                assert one_line(e), (path, value, e)
                assert str(directory) in str(e), (path, value, e)
            else:
                if value is not None:
                    load(save(model, tmp_path / "again"))


def bpe(**changes: Any) -> bytes:
    """A small tokenizer.json with some entries replaced."""
    out = json.loads(Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).to_str())
    return json.dumps({**out, **changes, "model": {**out["model"], **changes.get("model", {})}}).encode()


CLS = {"SpecialToken": {"id": "[CLS]", "type_id": 0}}
TOKENIZERS = {
    "empty": b"",
    "an empty object": b"{}",
    "a list": b"[]",
    "deep": b'{"model":' * 50_000,
    "bytes": b"\xff\xfe",
    "another kind": bpe(model={"type": "Telepathy"}),
    "ids beyond 32 bits": bpe(model={"vocab": {"a": 1 << 40, "b": 1, "ab": 2}}),
    "negative ids": bpe(model={"vocab": {"a": -1, "b": 1, "ab": 2}}),
    "merges of unknown words": bpe(model={"merges": [["b", "c"]]}),
    "merges that are no pairs": bpe(model={"merges": [5]}),
    # The library panics for these, the last one only when it encodes a text.
    "a prefix longer than a word": bpe(model={"continuing_subword_prefix": "##"}),
    "a table that is none": bpe(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "a special token that is not there": bpe(post_processor={
        "type": "TemplateProcessing", "single": [CLS], "pair": [CLS], "special_tokens": {}}),
}


@pytest.mark.parametrize("content", TOKENIZERS.values(), ids=list(TOKENIZERS))
def test_damaged_tokenizers(content, directory):
    (directory / "tokenizer.json").write_bytes(content)
    load_refuses(directory, "tokenizer.json is damaged", ValueError)


def test_a_sequence_of_normalizers_inside_a_sequence_loads(directory):
    """The library's inner sequence is its own first part: walking through the parts would not end."""
    inner = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}
    (directory / "tokenizer.json").write_bytes(bpe(normalizer={"type": "Sequence", "normalizers": [inner]}))
    _, tokenizer = load(directory)
    assert tokenizer.encode("AB").tokens == ["ab"]


def test_a_panic_of_the_tokenizer_library_is_a_sentence(directory, monkeypatch):
    """A panic of Rust is a BaseException: `except Exception` lets it through. Ctrl-C still gets through."""
    class PanicException(BaseException):
        """As the class of pyo3."""

    def panic(_: str) -> None:
        raise PanicException("called `Option::unwrap()` on a `None` value\nnote: run with `RUST_BACKTRACE=1`")

    def press(_: str) -> None:
        raise KeyboardInterrupt

    class Library:
        """Stands for tokenizers.Tokenizer."""
        from_file = staticmethod(panic)

    for module in ("tinyft.formats.huggingface", "tinyft.formats.tokenizer"):
        monkeypatch.setattr(f"{module}.Tokenizer", Library, raising=False) if known(module) else None
    load_refuses(directory, "tokenizer.json is damaged: called", ValueError)
    Library.from_file = staticmethod(press)
    with pytest.raises(KeyboardInterrupt):
        load(directory)


def known(module: str) -> bool:
    import importlib.util
    return importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("path", ["x" * 300, "x/" + "y" * 300, "a\0b"])
def test_paths_that_no_system_has(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for read in (load, lambda p: load_adapter(GPT(CONFIG), p)):
        with pytest.raises((FileNotFoundError, ValueError)) as e:
            read(path)
        assert one_line(e.value), str(e.value)


def test_arguments_of_another_kind_for_models(directory):
    for call in (lambda: load(3), lambda: load(None), lambda: load(b"x"), lambda: load(directory, "text"),
                 lambda: load(directory, 3), lambda: save(GPT(CONFIG), 3), lambda: save(GPT(CONFIG), None),
                 lambda: save(GPT(CONFIG), directory, "words"), lambda: save(GPT(CONFIG), directory, dtype="text")):
        with pytest.raises(TypeError) as e:
            call()
        assert one_line(e.value), str(e.value)


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────────
class Stop(Exception):
    """Ends a run in the middle."""


def stop_at_2(t: int, T: int) -> float:
    if t == 2:
        raise Stop
    return 1.0


def small_run(folder: Path, schedule: Any = stop_at_2) -> Any:
    """A run of four steps, with LoRA and momentum in float32. Returns the model; a run that is stopped raises Stop."""
    model = GPT(CONFIG)
    attach(model, LoRA(r=2))
    run_on(model, folder, schedule)
    return model


def run_on(model: Any, folder: Path, schedule: Any = stop_at_2) -> None:
    batches = [np.arange(8).reshape(2, 4), np.arange(8, 16).reshape(2, 4)]
    fit(model, batches, 4, AdamW(0.01), schedule=schedule, out=folder, resume=True, save_every=1, progress=False)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    with pytest.raises(Stop):
        small_run(tmp_path)
    return tmp_path / "checkpoint.safetensors"


def rename(arrays: dict[str, np.ndarray], old: str, new: str) -> dict[str, np.ndarray]:
    return {new if name == old else name: a for name, a in arrays.items()}


def test_a_checkpoint_with_a_missing_an_extra_or_a_renamed_slot_is_refused(checkpoint):
    """A slot: a moment of a tensor, the step counter, a value. The model keeps its values."""
    arrays, facts = read_tensors(checkpoint)
    slots = [name for name in arrays if name.startswith(("optimizer/", "model/"))]
    assert {name.split(".")[0] for name in slots} >= {"optimizer/exp_avg", "optimizer/exp_avg_sq", "optimizer/step"}
    wrong = []
    for slot in slots:
        wrong.append(rename(arrays, slot, f"{slot}x"))
        wrong.append({**arrays, f"{slot}x": arrays[slot]})
        wrong.append({**arrays, slot: np.ones(5, np.float32)})
        wrong.append({name: a for name, a in arrays.items() if name != slot})
    for changed in wrong:
        write_tensors(checkpoint, changed, facts)
        model = GPT(CONFIG)
        attach(model, LoRA(r=2))
        before = state(model)
        with pytest.raises(ValueError) as e:
            run_on(model, checkpoint.parent)
        assert one_line(e.value)
        assert state(model) == before
    write_tensors(checkpoint, arrays, facts)
    with pytest.raises(Stop):                            # the good one goes on, to the same step
        small_run(checkpoint.parent)


# ── processes that are killed ────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.skipif(array.backend() == "cupy", reason="a forked process has no device")
def test_a_save_that_is_killed_leaves_the_old_model_or_the_new_one(tmp_path):
    """At any system call; other programs see no new config.json beside old weights, nor the reverse."""
    models_saved = [GPT(CONFIG, seed=1), GPT(CONFIG, seed=2)]
    numbers = [host(model.embed.weight).tobytes() for model in models_saved]
    folder = tmp_path / "model"

    def prepare() -> Path:
        return save(models_saved[0], folder, dtype="float64")

    seen = set()
    for _ in kills(lambda: save(models_saved[1], folder), prepare):
        if (folder / "config.json").exists():            # as transformers reads it
            dtype = json.loads((folder / "config.json").read_text())["torch_dtype"]
            stored = {str(a.dtype) for a in load_file(folder / "model.safetensors").values()}
            assert stored == {dtype}
        model, _ = load(folder)
        seen.add(numbers.index(host(model.embed.weight).tobytes()))
    assert seen == {0, 1}


@pytest.mark.skipif(array.backend() == "cupy", reason="a forked process has no device")
def test_a_save_of_an_adapter_that_is_killed_leaves_the_old_one_or_the_new_one(tmp_path):
    """At any system call."""
    saved = []
    for value in (0.25, 0.5):
        model = GPT(CONFIG)
        attach(model, LoRA(r=2 if value < 0.3 else 3))
        p = model.blocks[0].attn.q.edits["lora"].B
        p.copy_(np.full(p.shape, value, np.float32))
        saved.append(model)

    def prepare() -> Path:
        return save_adapter(saved[0], tmp_path / "adapter")

    seen = set()
    for _ in kills(lambda: save_adapter(saved[1], tmp_path / "adapter"), prepare):
        model = GPT(CONFIG)
        load_adapter(model, tmp_path / "adapter")
        lora = model.blocks[0].attn.q.edits["lora"]
        seen.add((len(host(lora.A)), float(host(lora.B)[0, 0])))
    assert seen == {(2, 0.25), (3, 0.5)}


# ── saving that cannot be ────────────────────────────────────────────────────────────────────────────────────────────
def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("limit", [10, 1000, 5000])
def test_a_model_that_the_disk_has_no_room_for_leaves_the_old_one(limit, directory, tmp_path):
    """The system stops the write."""
    resource = pytest.importorskip("resource", reason="needs POSIX limits")
    before = content(directory)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = GPT(CONFIG, seed=5)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        for path in (directory, tmp_path / "new" / "folder"):
            with pytest.raises(OSError, match="could not write .* untouched") as e:
                save(model, path)
            assert e.value.errno == errno.EFBIG
            assert one_line(e.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(directory) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder in which nobody can write")
def test_a_folder_in_which_nobody_can_write():
    model = GPT(CONFIG)
    attach(model, LoRA(r=2))
    for write in (lambda path: save_adapter(model, path), lambda path: save(GPT(CONFIG), path)):
        for path in ("/proc/tinyft", "/proc/self/tinyft/a"):
            with pytest.raises(OSError, match="could not write") as e:
                write(path)
            assert one_line(e.value)


def test_a_model_is_saved_over_the_file_from_which_it_was_loaded(directory):
    """The file is mapped into memory while it is read; the model keeps its own numbers."""
    model, _ = load(directory)
    values = {name: np.array(host(p)) for name, p in model.named_parameters().items()}
    for p in model.parameters():
        p.copy_(host(p) * 2)
    doubled = save(model, directory)
    again, _ = load(doubled)
    for name, p in again.named_parameters().items():
        np.testing.assert_array_equal(host(p), values[name] * 2)
    assert array.name_of(model.embed.weight.data) == array.backend()

"""A seeded fuzzer for every reader: model directories, GGUF files, adapters, checkpoints, data files, the shipped text.

Each case damages a copy of good files and reads them. Allowed are a sane result, or one sentence of an expected
exception, within SECONDS of processor time; the model is then what it was. Half of the damage is below the checksums:
the files are written again with sums that fit.

    TINYFT_FUZZ=5000 python -m pytest tests/test_fuzz.py -s          more cases of each reader; the default is CASES
    TINYFT_FUZZ_SEED=1234                                            another first seed, or one that failed
"""
from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import lzma
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import gguf_bytes, model_metadata, model_tensors, small_llama, tokenizer_metadata
from helpers import host, time_limit, wrong_answers
from packers import PACKERS
from safetensors.numpy import load_file, save_file
from test_resume import OLD, old_run
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import tinyft as ft
from tinyft import array, edit, nn
from tinyft.adapters.files import digest
from tinyft.commands.rows import ChatFormat, chat_segments, find_labels, message_rows
from tinyft.commands.running import Log, read_config, write_config
from tinyft.commands.tune import DEFAULTS, KINDS
from tinyft.data import text
from tinyft.data.files import read_rows
from tinyft.data.rows import document_batches, segment_batches
from tinyft.files import pack_tensors, read_tensors
from tinyft.pooling import Pooling

CASES = 200 if array.backend() != "strict" else 10      # how damaged files are read is the same on every backend
SECONDS = 1.0
FIRST_SEED = 20_000
EXPECTED = (ValueError, OSError, LookupError, OverflowError)
NASTY = (
    None, True, False, 0, 1, -1, 2, 7, 1 << 31, 1 << 63, 1 << 70, 0.5, -1.5, 1e30, float("nan"), float("inf"), "", "x",
    "a\nb", "\ud800", "é" * 300, "../x", "/dev/zero", [], [[]], [0] * 50, {}, {"": None}, {"class": "x", "fields": {}},
    [[[[[[[[[[0]]]]]]]]]],
)
# Values that metadata of a GGUF file can hold.
WRITABLE = (
    True, False, 0, 1, 2, 3, 7, 1 << 31, 0.5, -1.5, 1e30, float("nan"), float("inf"), "", "x", "a\nb", "é" * 300, ["x"],
    ["x", "x"], ["Ġ t"] * 50, [["x"]], np.arange(300, dtype=np.int32), np.ones(266, np.int32), np.zeros(0, np.float32),
    np.array([1 << 63], np.uint64), np.array([-1], np.int64),
)
IDS = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])

Rng = np.random.Generator


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def flip_bits(data: bytes, rng: Rng) -> bytes:
    out = bytearray(data)
    for _ in range(int(rng.choice([1, 1, 2, 8]))):
        if out:
            out[rng.integers(len(out))] ^= 1 << rng.integers(8)
    return bytes(out)


def cut(data: bytes, rng: Rng) -> bytes:
    return data[:rng.integers(len(data) + 1)]


def cut_out(data: bytes, rng: Rng) -> bytes:
    begin, end = sorted(rng.integers(len(data) + 1, size=2))
    return data[:begin] + data[end:]


def double(data: bytes, rng: Rng) -> bytes:
    begin, end = sorted(rng.integers(len(data) + 1, size=2))
    return data[:end] + data[begin:]


def blank(data: bytes, rng: Rng) -> bytes:
    begin, end = sorted(rng.integers(len(data) + 1, size=2))
    filler = bytes([rng.choice([0, 32, 255])])
    return data[:begin] + filler * (end - begin) + data[end:]


def lengthen(data: bytes, rng: Rng) -> bytes:
    return data + bytes(rng.integers(0, 256, rng.integers(1, 100), dtype=np.uint8))


def noise(data: bytes, rng: Rng) -> bytes:
    return bytes(rng.integers(0, 256, rng.integers(0, 200), dtype=np.uint8))


BYTES = (flip_bits, flip_bits, cut, cut_out, double, blank, lengthen, noise)


def places(values: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value inside a value of JSON."""
    if isinstance(values, (dict, list)):
        for key in list(values) if isinstance(values, dict) else range(len(values)):
            yield values, key
            yield from places(values[key])


def damage_json(values: Any, rng: Rng) -> Any:
    """A copy with one or two values replaced, removed, renamed or exchanged."""
    out = copy.deepcopy(values)
    for _ in range(rng.integers(1, 3)):
        found = list(places(out))
        if not found:
            return out
        container, key = found[rng.integers(len(found))]
        other, other_key = found[rng.integers(len(found))]
        kind = rng.integers(6)
        if kind <= 2:
            container[key] = copy.deepcopy(NASTY[rng.integers(len(NASTY))])
        elif kind == 3:
            del container[key]
        elif kind == 4 and isinstance(container, dict):
            container[f"{key}{rng.integers(10)}"] = container.pop(key)
        elif kind == 5 and not isinstance(other[other_key], (dict, list)):
            container[key] = other[other_key]
    return out


def damage_text(data: bytes, rng: Rng) -> bytes:
    """JSON with damage in its values or, as text, a key that stands twice or a word that is no JSON."""
    try:
        values = json.loads(data)
    except ValueError:
        return flip_bits(data, rng)
    written = json.dumps(damage_json(values, rng))
    if rng.integers(5) == 0 and written.startswith("{") and len(written) > 2:
        first = written[1:].split(",")[0].rstrip("}")
        written = "{" + first + ", " + written[1:]
    return written.encode(errors="surrogatepass")


def damage_header(data: bytes, rng: Rng) -> bytes:
    """A safetensors file with damage in its header, whose length fits."""
    length = int.from_bytes(data[:8], "little")
    header = damage_text(data[8:8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length:]


def damage_arrays(arrays: dict[str, np.ndarray], rng: Rng) -> dict[str, np.ndarray]:
    """Arrays with one missing, added, exchanged, or of another shape, dtype or content."""
    out = dict(arrays)
    names = list(out)
    if not names:
        return {"x": np.ones(3)}
    name = names[rng.integers(len(names))]
    a = out[name]
    kind = rng.integers(9)
    if kind == 0:
        del out[name]
    elif kind == 1:
        out[f"{name}{rng.integers(10)}"] = a
    elif kind == 2:
        other = names[rng.integers(len(names))]
        out[name], out[other] = out[other], out[name]
    elif kind == 3:
        out[name] = a.reshape(-1) if a.ndim != 1 else a[None]
    elif kind == 4:
        out[name] = a.T if a.ndim == 2 else np.concatenate([a.reshape(-1), a.reshape(-1)])
    elif kind == 5:
        with np.errstate(all="ignore"):
            out[name] = a.astype(rng.choice(["int64", "int8", "bool", "float64", "float16", "bfloat16", "uint32"]))
    elif kind == 6 and a.dtype.kind == "f" and a.size:
        out[name] = np.full(a.shape, rng.choice([np.nan, np.inf, -np.inf, 3e38]), a.dtype)
    elif kind == 7:
        out[name] = a.reshape(-1)[:0]
    else:
        out[name] = np.zeros_like(a)
    return out


def damage_files(folder: Path, rng: Rng) -> str:
    """Damage one file of a folder, or exchange two, without regard to sums. Returns a description."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    file = files[rng.integers(len(files))]
    if rng.integers(20) == 0:
        other = files[rng.integers(len(files))]
        a, b = file.read_bytes(), other.read_bytes()
        file.write_bytes(b)
        other.write_bytes(a)
        return f"{file.name} and {other.name} exchanged"
    if rng.integers(20) == 0:
        file.unlink()
        return f"{file.name} removed"
    by_kind = {".json": damage_text, ".safetensors": damage_header}
    damage = by_kind.get(file.suffix)
    if damage is None or rng.integers(2):
        damage = BYTES[rng.integers(len(BYTES))]
    file.write_bytes(damage(file.read_bytes(), rng))
    return f"{file.name}: {damage.__name__}"


# ── readers ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def small_model() -> Any:
    return ft.GPT(ft.GPTConfig(23, 12, 12, 2, 3, 20), seed=1)


def words() -> Tokenizer:
    """A tokenizer with most parts that a tokenizer.json has."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "##d"])}
    out = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    out.pre_tokenizer = pre_tokenizers.Whitespace()
    out.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    out.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
    return out


def state(model: Any) -> dict[str, Any]:
    """All that a refused file must leave as it was."""
    values = {name: host(p).tobytes() for name, p in model.named_parameters().items()}
    trains = {name: p.requires_grad for name, p in model.named_parameters().items()}
    return {"values": values, "trains": trains, "attached": [a.name for a in edit.attached(model)]}


class ModelReader:
    """load: a model directory with a tokenizer."""

    def write(self, folder: Path) -> None:
        ft.save(small_model(), folder, words())
        config = json.loads((folder / "config.json").read_text())
        config |= {"id2label": {"0": "x", "1": "y"}, "label2id": {"x": 0, "y": 1}, "problem_type": None}
        (folder / "config.json").write_text(json.dumps(config))

    def damage(self, folder: Path, rng: Rng) -> str:
        return damage_files(folder, rng)

    def read(self, folder: Path) -> None:
        model, tokenizer = ft.load(folder)
        with np.errstate(all="ignore"):                  # damaged weights may be large
            shape = host(model(IDS % model.config.vocab)).shape
        assert shape[:1] == (2,) and len(shape) in (2, 3)
        if tokenizer is not None:
            with contextlib.suppress(Exception):         # a text that the tokenizer has no words for; a panic is none
                assert len(tokenizer.encode("a b ad x").ids) < 100
        ft.save(model, folder.parent / "again")


class CompressedReader(ModelReader):
    """load: a model directory with packed weights of every kind; its arrays are damaged, or the files."""

    def write(self, folder: Path) -> None:
        model = ft.GPT(ft.GPTConfig(23, 12, 32, 2, 2, 32), seed=1)
        kinds = list(PACKERS.values())
        maps = [module for block in model.blocks for module in block.modules() if isinstance(module, nn.Linear)]
        for i, module in enumerate(maps):
            module.weight = kinds[i % len(kinds)](host(module.weight))
        ft.save(model, folder, words())

    def damage(self, folder: Path, rng: Rng) -> str:
        file = folder / "model.safetensors"
        if rng.integers(2):
            save_file(damage_arrays(load_file(file), rng), file)
            return "forged arrays"
        file = folder / "config.json"
        if rng.integers(2):
            file.write_bytes(damage_text(file.read_bytes(), rng))
            return "forged config"
        return damage_files(folder, rng)


class TokenizerReader(ModelReader):
    """load: a directory whose tokenizer has every other part: BPE, normalizers, truncation, padding."""

    def write(self, folder: Path) -> None:
        pieces = ["<s>", "</s>", "<pad>", *"abcdĠ", "Ġa", "Ġab"]
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        out = Tokenizer(models.BPE(vocabulary, [("Ġ", "a"), ("Ġa", "b")], unk_token="<pad>", byte_fallback=True))
        out.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex("x+"), "a")])
        digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
        out.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=True)])
        out.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
        out.decoder = decoders.ByteLevel()
        out.add_special_tokens(["<s>", "</s>", "<pad>"])
        out.add_tokens([AddedToken("ab", lstrip=True), AddedToken("new word", normalized=True)])
        out.enable_truncation(6, stride=1)
        out.enable_padding(pad_id=2, pad_token="<pad>", length=8)
        ft.save(small_model(), folder, out)

    def damage(self, folder: Path, rng: Rng) -> str:
        file = folder / "tokenizer.json"
        damage = damage_text if rng.integers(4) else BYTES[rng.integers(len(BYTES))]
        file.write_bytes(damage(file.read_bytes(), rng))
        return f"tokenizer.json: {damage.__name__}"


class SentenceReader(ModelReader):
    """load and embed: a RoBERTa with the files of sentence-transformers, some of which become special files."""

    def write(self, folder: Path) -> None:
        sizes = ft.BERTConfig(23, 12, 1, 12, 1, 3, 20, first_position=2, keep_pooler=False)
        model = ft.BERT(sizes, seed=1, head=None)
        model._pooling = Pooling("max", normalize=True, max_tokens=8)
        ft.save(model, folder, words())

    def damage(self, folder: Path, rng: Rng) -> str:
        names = ["modules.json", "1_Pooling/config.json", "sentence_bert_config.json"]
        file = folder / names[rng.integers(len(names))]
        kind = rng.integers(8)
        if kind == 0:
            return damage_files(folder, rng)
        if kind == 1:
            file.unlink()
            make_special(file, rng)
            return f"{file.name} is a special file"
        file.write_bytes(damage_text(file.read_bytes(), rng))
        return f"{file.name}: damage_text"

    def read(self, folder: Path) -> None:
        model, tokenizer = ft.load(folder)
        if tokenizer is None or max(tokenizer.get_vocab().values()) >= model.config.vocab:
            return
        with np.errstate(all="ignore"):
            embeddings = ft.embed(model, tokenizer, ["a b", "d", "a " * 50])
        assert embeddings.shape == (3, model.config.width)
        ft.save(model, folder.parent / "again", tokenizer)


def make_special(file: Path, rng: Rng) -> None:
    """A pipe, a device, a directory or a link to nothing in the place of a file."""
    kind = rng.integers(4)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.symlink_to("/dev/zero")
    elif kind == 2:
        file.mkdir()
    else:
        file.symlink_to("nowhere")


class AdapterReader:
    """load_adapter, onto the base that the adapter was trained on."""

    shape: tuple = (2, 4, 23)                            # of the model's outputs

    def __init__(self, method: Any):
        self.method = method

    save = staticmethod(ft.save_adapter)
    load = staticmethod(ft.load_adapter)

    def write(self, folder: Path) -> None:
        model = self.make()
        ft.attach(model, self.method)
        rng = np.random.default_rng(0)
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(host(p) + rng.standard_normal(p.shape) * 0.1)
        self.save(model, folder)

    def damage(self, folder: Path, rng: Rng) -> str:
        if rng.integers(2):
            return damage_files(folder, rng)
        facts = json.loads((folder / "adapter.json").read_text())
        arrays, _ = read_tensors(folder / "adapter.safetensors")
        forged = "arrays"
        if rng.integers(3):
            forged = "facts"
            facts = damage_json(facts, rng)
        else:
            arrays = damage_arrays(arrays, rng)
        (folder / "adapter.json").write_text(json.dumps(facts))
        (folder / "adapter.safetensors").write_bytes(pack_tensors(arrays, {"sum": digest(facts)}))
        return f"forged {forged}"

    def make(self) -> Any:
        return small_model()

    def read(self, folder: Path) -> None:
        model = self.make()
        before = state(model)
        try:
            attached = self.load(model, folder)
        except BaseException:
            assert state(model) == before, "the model was changed"
            raise
        with np.errstate(all="ignore"):
            assert host(model.eval()(IDS)).shape == self.shape
        ft.detach(model, attached.name)
        assert state(model) == before, "detach did not give the base back"


class ShardedReader(ModelReader):
    """load: a BERT classifier in two shards."""

    def write(self, folder: Path) -> None:
        model = ft.BERT(ft.BERTConfig(23, 12, 2, 12, 2, 3, 20), seed=1)
        ft.save(ft.classifier(model, 3), folder)
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(weights)
        shard_of = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
        for shard in set(shard_of.values()):
            save_file({name: weights[name] for name in names if shard_of[name] == shard}, folder / shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))


class OldAdapterReader(AdapterReader):
    """load_adapter: an adapter of version 0.1."""

    shape = (2, 4, 19)

    def __init__(self) -> None:
        self.base = read_tensors(OLD / "gpt.safetensors")[0]

    def make(self) -> Any:
        model = ft.GPT(ft.GPTConfig(19, 16, 12, 2, 3, 20))
        model.load_state_dict(self.base)
        return model

    def write(self, folder: Path) -> None:
        shutil.copytree(OLD / "gpt-prefix-mlp", folder)


class PeftReader(AdapterReader):
    """load_peft: the files have no checksum, so every damage reaches the checks of names, shapes and settings."""

    config = "adapter_config.json"
    weights = "adapter_model.safetensors"
    save = staticmethod(ft.save_peft)
    load = staticmethod(ft.load_peft)

    def damage(self, folder: Path, rng: Rng) -> str:
        if rng.integers(3) == 0:
            return damage_files(folder, rng)
        if rng.integers(2):
            values = json.loads((folder / self.config).read_text())
            (folder / self.config).write_text(json.dumps(damage_json(values, rng)))
            return "forged config"
        save_file(damage_arrays(load_file(folder / self.weights), rng), folder / self.weights)
        return "forged arrays"


class PeftClassifierReader(PeftReader):
    """load_peft: a LoRA with a new classifier, on a BERT."""

    shape = (2, 3)

    def make(self) -> Any:
        return ft.classifier(ft.BERT(ft.BERTConfig(23, 12, 2, 12, 2, 3, 20), seed=1), 3)


class AdapterHubReader(PeftReader):
    """load_adapterhub."""

    weights = "adapter.safetensors"
    save = staticmethod(ft.save_adapterhub)
    load = staticmethod(ft.load_adapterhub)


class AdapterHubClassifierReader(AdapterHubReader):
    """load_adapterhub: with the head of a classifier, in two files more."""

    shape = (2, 3)

    def make(self) -> Any:
        return ft.classifier(ft.BERT(ft.BERTConfig(23, 12, 2, 12, 2, 3, 20), seed=1, head=None, pooler=True), 3)

    def damage(self, folder: Path, rng: Rng) -> str:
        if rng.integers(2):
            return super().damage(folder, rng)
        return damage_files(folder, rng)


class CheckpointReader:
    """fit(resume=True) from a checkpoint in the middle of a run."""

    def make(self) -> Any:
        model = small_model()
        ft.attach(model, ft.LoRA(r=2))
        return model

    def fit(self, model: Any, folder: Path, steps: int, **arguments: Any) -> Any:
        batches = ft.data.Batches(list(IDS.repeat(2, axis=0)), 2, seed=3)
        return ft.fit(model, batches, 4, ft.AdamW(0.01), out=folder, resume=True, progress=False, **arguments)

    def write(self, folder: Path) -> None:
        class Stop(Exception):
            """Ends the run after two steps."""

        def schedule(t: int, T: int) -> float:
            if t == 2:
                raise Stop
            return 1.0

        with pytest.raises(Stop):
            self.fit(self.make(), folder, 4, schedule=schedule, save_every=1)

    def damage(self, folder: Path, rng: Rng) -> str:
        if rng.integers(3) == 0:
            return damage_files(folder, rng)
        file = folder / "checkpoint.safetensors"
        arrays, facts = read_tensors(file)
        forged = "arrays"
        if rng.integers(2):
            forged = "facts"
            facts = damage_json(facts, rng)
        else:
            arrays = damage_arrays(arrays, rng)
        file.write_bytes(pack_tensors(arrays, facts))
        return f"forged {forged}"

    def read(self, folder: Path) -> None:
        model = self.make()
        before = state(model)
        file = folder / "checkpoint.safetensors"
        content = file.read_bytes() if file.exists() else None
        try:
            with np.errstate(all="ignore"):
                history = self.fit(model, folder, 4)
        except BaseException:
            assert state(model) == before, "the model was changed"
            assert content is None or file.read_bytes() == content, "the checkpoint was changed"
            raise
        assert len(history.losses) <= 4 + 50             # a forged history may be longer than the run


class OldCheckpointReader(CheckpointReader):
    """fit(resume=True) from a checkpoint of version 0.1."""

    def make(self) -> Any:
        model, method, *_ = old_run("run-lora")
        ft.attach(model, method, seed=5)
        return model

    def fit(self, model: Any, folder: Path, steps: int, **arguments: Any) -> Any:
        batches = [{"ids": IDS}]
        return ft.fit(model, batches, 6, ft.AdamW(0.02), out=folder, resume=True, progress=False, **arguments)

    def write(self, folder: Path) -> None:
        shutil.copytree(OLD / "run-lora", folder)


class GGUFReader:
    """load: a GGUF file. Damage of bytes hits its header in most cases; forged metadata fits the format."""

    def __init__(self, kind: str, packed: bool):
        self.kind = kind
        self.packed = packed

    def content(self) -> tuple[dict[str, Any], dict[str, Any]]:
        model = small_llama(layers=1, width=32, hidden=32, heads=2, key_value_heads=1)
        return model_metadata(model.config) | tokenizer_metadata(), model_tensors(model, self.kind)

    def write(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.gguf").write_bytes(gguf_bytes(*self.content()))

    def damage(self, folder: Path, rng: Rng) -> str:
        file = folder / "model.gguf"
        if rng.integers(3) == 0:
            metadata, tensors = self.content()
            names = list(metadata)
            for _ in range(rng.integers(1, 3)):
                name = names[rng.integers(len(names))]
                metadata[name] = WRITABLE[rng.integers(len(WRITABLE))]
            file.write_bytes(gguf_bytes(metadata, tensors))
            return "forged metadata"
        damage = BYTES[rng.integers(len(BYTES))]
        data = file.read_bytes()
        end = len(data) if rng.integers(4) == 0 else int(rng.choice([40, 400, 4000, 8000]))
        file.write_bytes(damage(data[:end], rng) + data[end:])
        return f"{damage.__name__} in the first {end} bytes"

    def read(self, folder: Path) -> None:
        model, tokenizer = ft.load(folder / "model.gguf", packed=self.packed)
        with np.errstate(all="ignore"):
            assert host(model(IDS % model.config.vocab)).shape == (2, 4, model.config.vocab)
        if tokenizer is not None:
            with contextlib.suppress(Exception):
                assert len(tokenizer.encode("a b ad x").ids) < 100


class TextReader:
    """data.snapshot: the shipped text."""

    def write(self, folder: Path) -> None:
        records = [["os", "prose", "train", "Some text."], ["sys", "source", "test", "x = 1"]]
        folder.mkdir()
        (folder / "text.json.xz").write_bytes(lzma.compress(json.dumps({"records": records}).encode()))

    def damage(self, folder: Path, rng: Rng) -> str:
        file = folder / "text.json.xz"
        if rng.integers(2):
            values = json.loads(lzma.decompress(file.read_bytes()))
            file.write_bytes(lzma.compress(json.dumps(damage_json(values, rng)).encode()))
            return "forged records"
        return damage_files(folder, rng)

    def read(self, folder: Path) -> None:
        assets = text.ASSETS
        text.ASSETS = folder
        try:
            for record in text.snapshot.__wrapped__():
                assert all(isinstance(value, str) for value in record), record
        finally:
            text.ASSETS = assets


class RowsReader:
    """read_rows, and the rows as batches: a .jsonl file of one kind, or the same rows in a .csv file."""

    def __init__(self, ending: str, *columns: str):
        self.file = f"rows{ending}"
        self.columns = columns

    def write(self, folder: Path) -> None:
        folder.mkdir()
        turns = [{"role": "user", "content": "Open it"}, {"role": "assistant", "content": "Done"}]
        values = {"text": "Some text,\nof lines", "prompt": "a b", "response": "c", "messages": turns}
        rows = []
        for label in ("good", "bad", "good", "bad"):
            row = {**values, "label": label}
            rows.append({column: row[column] for column in self.columns})
        self.write_values(folder / self.file, rows)

    def write_values(self, file: Path, rows: list) -> None:
        """The rows as lines of JSON, or as a table whose first row names the columns."""
        if file.suffix == ".jsonl":
            content = "\n".join(json.dumps(row) for row in rows)
        else:
            out = io.StringIO()
            writer = csv.writer(out)
            writer.writerow(self.columns)
            for row in rows:
                cells = list(row.values()) if isinstance(row, dict) else [row]
                writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
            content = out.getvalue()
        file.write_bytes(content.encode(errors="surrogatepass"))

    def damage(self, folder: Path, rng: Rng) -> str:
        file = folder / self.file
        if rng.integers(2) and file.suffix == ".jsonl":
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            damaged = damage_json(rows, rng)
            self.write_values(file, damaged if isinstance(damaged, list) else [damaged])
            return "forged rows"
        return damage_files(folder, rng)

    def read(self, folder: Path) -> None:
        rows = read_rows(folder / self.file)
        assert len(rows.rows) == len(rows.lines) > 0 and sorted(rows.lines) == list(rows.lines)
        chats = message_rows(rows, chat=rows.kind == "pairs")
        if chats is not None:
            segments = [chat_segments(messages, ChatFormat("chatml")) for messages in chats]
            batches, _ = segment_batches(segments, ft.data.shipped_tokenizer(), 2, 400, place=rows.line)
            assert sum(len(batch["ids"]) for batch in batches.once()) == len(rows.rows)
        elif rows.kind == "labelled":
            assert len(find_labels(rows)) > 1
        else:
            batches = document_batches([row[0] for row in rows.rows], ft.data.shipped_tokenizer(), 2, 400, 0, rows.line)
            assert all(batch["mask"].any() for batch in batches.once())


class RunReader:
    """The config and the log of a run of `tinyft tune`."""

    def write(self, folder: Path) -> None:
        folder.mkdir()
        write_config(folder, {**DEFAULTS, "model": "base-gpt", "data": "a.jsonl", "set": ["r=8"]})
        lines = [{"step": 0, "test_loss": 2.0}, {"step": 0, "loss": 1.0}]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def damage(self, folder: Path, rng: Rng) -> str:
        if rng.integers(2):
            values = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(damage_json(values, rng)))
            return "forged config"
        return damage_files(folder, rng)

    def read(self, folder: Path) -> None:
        options = read_config(folder, KINDS)
        assert all(type(options[name]) in kinds for name, kinds in KINDS.items())
        log = Log(folder)
        assert all(isinstance(entry["step"], int) for entry in log.entries)
        assert len(log.path.read_text().splitlines()) == len(log.entries)


READERS = {
    "texts": RowsReader(".jsonl", "text"),
    "labels": RowsReader(".csv", "text", "label"),
    "pairs": RowsReader(".jsonl", "prompt", "response"),
    "pairs in a table": RowsReader(".csv", "prompt", "response"),
    "chats": RowsReader(".jsonl", "messages"),
    "chats in a table": RowsReader(".csv", "messages"),
    "run": RunReader(),
    "model": ModelReader(),
    "compressed model": CompressedReader(),
    "shards": ShardedReader(),
    "tokenizer": TokenizerReader(),
    "sentences": SentenceReader(),
    "lora": AdapterReader(ft.LoRA(r=2)),
    "houlsby": AdapterReader(ft.Houlsby(m=2)),
    "prefix": AdapterReader(ft.PrefixTuning(p=2, mlp=3)),
    "prompt": AdapterReader(ft.PromptTuning(p=2)),
    "partial": AdapterReader(ft.Partial(k=1)),
    "adapter of version 0.1": OldAdapterReader(),
    "lora of PEFT": PeftReader(ft.LoRA(r=2, targets=("attn.[qkvo]", "embed"))),
    "prefix of PEFT": PeftReader(ft.PrefixTuning(p=2, shift=True)),
    "prompt of PEFT": PeftReader(ft.PromptTuning(p=2)),
    "classifier of PEFT": PeftClassifierReader(ft.LoRA(r=2)),
    "classifier of AdapterHub": AdapterHubClassifierReader(ft.Houlsby(m=2, norms=False)),
    "adapters of AdapterHub": AdapterHubReader(ft.Houlsby(m=2, norms=False)),
    "checkpoint": CheckpointReader(),
    "checkpoint of version 0.1": OldCheckpointReader(),
    "text": TextReader(),
    "gguf": GGUFReader("F16", packed=False),
    "packed gguf": GGUFReader("Q4_1", packed=True),
}


# ── the fuzzer ───────────────────────────────────────────────────────────────────────────────────────────────────────
def fault(read: Callable[[Path], None], folder: Path) -> str | None:
    """What is wrong with the way in which a reader takes these files; None if nothing is."""
    try:
        with time_limit(SECONDS, 60 * SECONDS):
            read(folder)
    except EXPECTED as e:
        message = str(e)
        if isinstance(e, (KeyError, IndexError, UnicodeError)):
            return f"{type(e).__name__}: {message}"
        if "\n" in message or not 10 <= len(message) <= 1500:
            return f"{type(e).__name__}, no sentence: {message[:300]!r}"
        return None
    except BaseException as e:                           # a panic of Rust is no Exception
        if isinstance(e, KeyboardInterrupt):
            raise
        return f"{type(e).__name__}: {str(e)[:300]}"
    return None


def run_case(reader: Any, good: dict[str, bytes], seed: int, folder: Path) -> str | None:
    """Damage good files, {name: content}, in a folder, and read them; a fault, or None."""
    shutil.rmtree(folder)
    for name, content in good.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    description = reader.damage(folder, np.random.default_rng(seed))
    found = fault(reader.read, folder)
    return f"seed {seed}, {description}: {found}" if found else None


def good_files(reader: Any, folder: Path) -> dict[str, bytes]:
    """{name: content} of files that the reader reads without fault."""
    reader.write(folder)
    assert fault(reader.read, folder) is None
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    """The disk is no part of these tests."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused_in_one_sentence(name, tmp_path):
    reader = READERS[name]
    cases = int(os.environ.get("TINYFT_FUZZ", CASES))
    first = int(os.environ.get("TINYFT_FUZZ_SEED", FIRST_SEED))
    good = good_files(reader, tmp_path / "case")
    faults = []
    for seed in range(first, first + cases):
        found = run_case(reader, good, seed, tmp_path / "case")
        if found:
            faults.append(found)
    assert not faults, f"{len(faults)} of {cases} cases of {name}:\n" + "\n".join(faults[:20])


class Careless:
    """A wrong reader: it believes what the file says."""

    def read(self, folder: Path) -> None:
        facts = json.loads((folder / "adapter.json").read_text())
        assert facts["method"]["fields"]["r"] * 2 + len(facts["base"]["family"]) > 0


@wrong_answers
def test_a_careless_reader_is_caught(tmp_path):
    """The fuzzer can fail."""
    reader = READERS["lora"]
    good = good_files(reader, tmp_path / "case")
    careless = Careless()
    careless.damage = reader.damage
    found = [run_case(careless, good, seed, tmp_path / "case") for seed in range(100)]
    assert sum(f is not None for f in found) > 5

"""embed: one vector for each text, pooled as the model's directory asks; sentence-transformers folders.

Then loading: a large file is mapped, so that nothing is copied; the peak memory is measured in a process of its own.
"""
from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract import noise
from helpers import host, wrong_answers
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

import tinyft as ft
from tinyft import BERT, GPT, BERTConfig, GPTConfig, LoRA, PromptTuning, array, data, embed, files
from tinyft.formats import classifier, load, save
from tinyft.formats.sentence import pooling_files
from tinyft.pooling import MODES, Pooling, pool

TOKENIZER = data.shipped_tokenizer()
V = TOKENIZER.get_vocab_size()
TEXTS = ["", "A list.", " Return the number of items in the container, and raise an error.\n", "x", "def f(x):"] * 3
KINDS = ["bert", "gpt", "llama", "distilbert", "roberta"]
ON_HOST = pytest.mark.skipif(array.backend() != "numpy", reason="only arrays of the host are views into a file")


def make(kind: str, head: str | None = "mlm") -> Any:
    """A small model with large weights, so that its embeddings differ from text to text."""
    settings = {"distilbert": {"token_types": 0, "pooler_activation": "relu"},
                "roberta": {"first_position": 2, "keep_pooler": False}}.get(kind, {})
    if kind == "gpt":
        model = GPT(GPTConfig(V, 32, 12, 2, 3, std=0.5), seed=1)
    elif kind == "llama":
        model = ft.Llama(ft.LlamaConfig(V, 32, 12, 2, 3, std=0.5), seed=1)
    else:
        sizes = {"vocab": V, "positions": 32, "width": 12, "layers": 2, "heads": 3, "std": 0.5}
        model = BERT(BERTConfig(**{**sizes, **settings}), seed=1, head=head)
    return noise(model, std=0.3, seed=2)


def ids_of(kind: str, text: str, longest: int) -> list[int]:
    """The ids that a model reads."""
    text = text.strip()
    if kind in ("gpt", "llama"):
        ids = TOKENIZER.encode(text).ids[:longest]
        return ids or [TOKENIZER.token_to_id("<|endoftext|>")]
    return data.encode(TOKENIZER, text, longest, "bert")


def one_by_one(model: Any, kind: str, mode: str, longest: int = 32) -> np.ndarray:
    """The embeddings, each text alone, in float64."""
    rows = []
    for text in TEXTS:
        ctx = ft.Context()
        model(np.array([ids_of(kind, text, longest)]), ctx)
        h = host(ctx.last_hidden_state)[0].astype(np.float64)                # (T, C)
        rows.append({"mean": h.mean(0), "cls": h[0], "max": h.max(0)}[mode])
    return np.array(rows)


# ── the embeddings ───────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_those_of_each_text_alone(kind, mode):
    model = make(kind)
    want = one_by_one(model, kind, mode)
    for batch_size in (1, 4, 100):
        got = embed(model, TOKENIZER, TEXTS, batch_size=batch_size, pooling=mode)
        assert got.dtype == np.float32 and got.shape == (len(TEXTS), 12) and isinstance(got, np.ndarray)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    unit = embed(model, TOKENIZER, TEXTS, pooling=mode, normalize=True)
    np.testing.assert_allclose(unit, want / np.linalg.norm(want, axis=1, keepdims=True), rtol=1e-4, atol=1e-5)
    short = embed(model, TOKENIZER, TEXTS, pooling=mode, max_len=5)
    np.testing.assert_allclose(short, one_by_one(model, kind, mode, 5), rtol=1e-4, atol=1e-5)


def padding_counts(hidden: Any, mask: Any, mode: str, *, normalize: bool) -> Any:
    """An error: the mean over all positions."""
    return pool(hidden, mask | True, mode, normalize=normalize)


def divided_by_the_sum(hidden: Any, mask: Any, mode: str, *, normalize: bool) -> Any:
    """An error: the embedding is divided by the sum of its entries, not by its length."""
    e = pool(hidden, mask, mode, normalize=False)
    return e / e.sum(axis=1, keepdims=True) if normalize else e


@wrong_answers
@pytest.mark.parametrize("wrong", [padding_counts, divided_by_the_sum])
def test_a_wrong_pooling_is_caught(wrong, monkeypatch):
    monkeypatch.setattr(sys.modules["tinyft.embed"], "pool", wrong)
    with pytest.raises(AssertionError, match="Not equal"):
        test_embeddings_are_those_of_each_text_alone("bert", "mean")


@pytest.mark.parametrize("method", [LoRA(r=2), PromptTuning(p=5)], ids=str)
def test_embeddings_with_a_method(method):
    """The rows of a soft prompt are no part of the mean, and leave fewer positions for the text."""
    model = make("bert")
    before = embed(model, TOKENIZER, TEXTS)
    ft.attach(model, method)
    noise(model, std=0.3, seed=3)
    longest = 27 if isinstance(method, PromptTuning) else 32
    np.testing.assert_allclose(embed(model, TOKENIZER, TEXTS), one_by_one(model, "bert", "mean", longest), rtol=1e-4,
                               atol=1e-5)
    assert np.abs(embed(model, TOKENIZER, TEXTS) - before).max() > 0.01


def test_a_head_and_the_mode_of_the_model_change_nothing():
    """A head is not used, dropout is inactive, and every module keeps its mode. A vocabulary is not scored."""
    model = make("bert", head=None)
    want = embed(model, TOKENIZER, TEXTS)
    for other in (make("bert"), classifier(make("bert"), 3)):
        for name, p in model.named_parameters().items():
            other.named_parameters()[name].copy_(host(p))
        other.train()
        np.testing.assert_array_equal(embed(other, TOKENIZER, TEXTS), want)
        assert all(module.training for module in other.modules())
    rows = []
    masked = make("bert")
    forward = masked.head.forward
    masked.head.forward = lambda x, ctx: rows.append(x.shape[0]) or forward(x, ctx)
    embed(masked, TOKENIZER, TEXTS, batch_size=100)
    assert max(rows) == 1


def without_padding_token() -> Tokenizer:
    """A tokenizer that has [CLS] and [SEP], and no token for padding or for the end of a text."""
    out = Tokenizer(models.WordLevel({"[CLS]": 5, "[SEP]": 6, "[UNK]": 7, "a": 8, "b": 9}, unk_token="[UNK]"))
    out.pre_tokenizer = pre_tokenizers.Whitespace()
    return out


def test_padding_works_without_a_padding_token():
    model = make("bert")
    together = embed(model, without_padding_token(), ["a", "a b a b a b a b b", ""])
    alone = [embed(model, without_padding_token(), [text])[0] for text in ("a", "a b a b a b a b b", "")]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


def test_no_text_gives_no_row():
    assert embed(make("bert"), TOKENIZER, []).shape == (0, 12)


def test_bad_input_is_refused_in_one_sentence():
    model = make("bert")
    faults = [
        (TypeError, "wants a list of texts, got 'a'", {"texts": "a"}),
        (TypeError, "wants a list of texts, got 3", {"texts": ["a", 3]}),
        (ValueError, "batch_size wants a whole number >= 1, got 0", {"batch_size": 0}),
        (ValueError, "pooling wants one of 'mean', 'cls', 'max', got 'sum'", {"pooling": "sum"}),
        (TypeError, "normalize wants True or False, got 1", {"normalize": 1}),
        (ValueError, "max_len of at least 3", {"max_len": 2}),
        (TypeError, "wants a transformer .* got a Linear", {"model": model.blocks[0].attn.q}),
        (TypeError, "wants a model, .* got 3", {"model": 3}),
        (TypeError, "wants a tokenizers.Tokenizer", {"tokenizer": None}),
    ]
    for kind, message, change in faults:
        with pytest.raises(kind, match=message):
            embed(**{"model": model, "tokenizer": TOKENIZER, "texts": ["a"], **change})
    with pytest.raises(ValueError, match=r"special token \[CLS\] or <s>"):
        embed(model, Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), ["a"])
    with pytest.raises(ValueError, match="embed of an empty text wants a tokenizer with"):
        embed(make("gpt"), Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), ["a", ""])


# ── sentence-transformers folders ────────────────────────────────────────────────────────────────────────────────────
def bert_tokenizer() -> Tokenizer:
    """A word-level tokenizer that puts [CLS] and [SEP] around a text."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "A"]
    out = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    out.pre_tokenizer = pre_tokenizers.Whitespace()
    out.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return out


def sentence_folder(folder: Path, pooling: Pooling, head: str | None = None) -> Path:
    """A small BERT with the files of sentence-transformers."""
    model = noise(BERT(BERTConfig(vocab=20, positions=16, width=12, layers=1, heads=3), 1, head, pooler=True), 0.5, 2)
    save(model, folder, bert_tokenizer())
    for name, values in pooling_files(pooling, 12).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normalize", [True, False])
def test_the_folder_decides_on_the_embeddings(mode, normalize, tmp_path):
    """Also after our save, which writes the same files. An argument goes before the folder."""
    pooling = Pooling(mode, normalize, max_tokens=5, lower_case=True)
    model, tokenizer = load(sentence_folder(tmp_path / "m", pooling))
    texts = ["a", "b A b a b", "A"]
    got = embed(model, tokenizer, texts)
    plain = load(tmp_path / "m")[0]
    plain._pooling = None
    lower = [text.lower() for text in texts]
    want = embed(plain, tokenizer, lower, pooling=mode, normalize=normalize, max_len=5)
    np.testing.assert_array_equal(got, want)
    others = [{"pooling": other} for other in MODES if other != mode] + [{"normalize": not normalize}, {"max_len": 16}]
    for change in others:
        assert np.abs(embed(model, tokenizer, texts, **change) - got).max() > 1e-3
    assert np.abs(embed(plain, tokenizer, texts, pooling=mode, normalize=normalize, max_len=5) - got).max() > 1e-3
    save(model, tmp_path / "again", tokenizer)
    again, tokenizer = load(tmp_path / "again")
    assert again._pooling == pooling
    np.testing.assert_array_equal(embed(again, tokenizer, texts), got)


def test_a_head_in_a_sentence_folder_is_that_of_the_tensors(tmp_path):
    """Some folders name the class of the pretrained model in config.json, whose head is not in the file."""
    folder = sentence_folder(tmp_path, Pooling())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    assert load(folder)[0].head is None
    (folder / "modules.json").unlink()
    with pytest.raises(ValueError, match="missing cls.predictions"):
        load(folder)


def test_a_classifier_is_saved_without_the_pooling(tmp_path):
    model, tokenizer = load(sentence_folder(tmp_path / "m", Pooling()))
    save(classifier(model, 3), tmp_path / "classifier", tokenizer)
    assert not (tmp_path / "classifier" / "modules.json").exists()
    assert load(tmp_path / "classifier")[0].head.out_features == 3


def change_json(file: Path, values: Any) -> None:
    """Write other values; a dict of an existing file is extended."""
    if isinstance(values, dict) and file.exists():
        values = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps(values))


def part(kind: str, path: str) -> dict:
    return {"idx": 0, "name": "0", "path": path, "type": f"sentence_transformers.models.{kind}"}


BODY, POOL = part("Transformer", ""), part("Pooling", "1_Pooling")
MODE = "1_Pooling/config.json"
SETTINGS = "sentence_bert_config.json"
FAULTS = [
    ("modules.json", [BODY, POOL, part("Dense", "2_Dense")], "wants the parts .* got 'sentence_.*.Dense'"),
    ("modules.json", [POOL, BODY], "in this order, got Pooling, Transformer"),
    ("modules.json", [BODY], "in this order, got Transformer"),
    ("modules.json", [], "got none"),
    ("modules.json", [3], "wants the parts .* got 3"),
    ("modules.json", [{"type": 3}], "wants the parts .* got 3"),
    ("modules.json", [part("Transformer", "0_Transformer"), POOL], "got it in '0_Transformer'"),
    ("modules.json", [BODY, part("Pooling", "../1_Pooling")], "a folder of this directory, got '../1_Pooling'"),
    ("modules.json", [BODY, part("Pooling", 3)], "a folder of this directory, got 3"),
    ("modules.json", [BODY, part("Pooling", "3_Pooling")], "has no config.json"),
    (MODE, {"word_embedding_dimension": 13}, "word_embedding_dimension wants the model's width 12, got 13"),
    (MODE, {"pooling_mode_lasttoken": True}, "got 'pooling_mode_lasttoken', which this library does not have"),
    (MODE, {"pooling_mode_mean_sqrt_len_tokens": True}, "got 'pooling_mode_mean_sqrt_len_tokens'"),
    (MODE, {"pooling_mode_of_the_future": True}, "got 'pooling_mode_of_the_future'"),
    (MODE, {"pooling_mode_cls_token": True}, "wants one kind of pooling, got mean, cls"),
    (MODE, {"pooling_mode_mean_tokens": False}, "wants one kind of pooling, got none"),
    (MODE, {"pooling_mode_mean_tokens": "yes"}, "wants true or false, got 'yes'"),
    (MODE, {"pooling_mode": "lasttoken"}, "pooling_mode wants one of 'mean', 'cls', 'max', got 'lasttoken'"),
    (SETTINGS, {"max_seq_length": 0}, "max_seq_length wants a whole number of at least 1, got 0"),
    (SETTINGS, {"max_seq_length": True}, "max_seq_length wants .* got True"),
    (SETTINGS, {"do_lower_case": "no"}, "do_lower_case wants true or false, got 'no'"),
    (SETTINGS, {"tokenizer_args": {"x": 1}}, "tokenizer_args wants nothing"),
    ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "default_prompt_name wants null"),
]


@pytest.mark.parametrize("file, values, message", FAULTS)
def test_settings_that_change_the_embeddings_are_refused_by_name(file, values, message, tmp_path):
    folder = sentence_folder(tmp_path, Pooling())
    load(folder)
    change_json(folder / file, values)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_the_kind_of_pooling_under_its_short_key(tmp_path):
    """pooling_mode goes before the keys of the kinds; the key of the mean is true by default."""
    folder = sentence_folder(tmp_path, Pooling())
    change_json(folder / MODE, {"pooling_mode": "cls"})
    assert load(folder)[0]._pooling.mode == "cls"
    (folder / MODE).write_text(json.dumps({"pooling_mode_cls_token": False}))
    assert load(folder)[0]._pooling.mode == "mean"


@pytest.mark.parametrize("name", ["modules.json", MODE, SETTINGS, "config_sentence_transformers.json", "1_Pooling"])
@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "dangling link"])
def test_special_files_are_refused(name, kind, tmp_path):
    """They are not opened: a pipe would wait, and a device has no end."""
    folder = sentence_folder(tmp_path, Pooling())
    place = folder / name
    if place.is_dir():
        (place / "config.json").unlink()
        place.rmdir()
    place.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    elif kind == "directory":
        place.mkdir()
    else:
        place.symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="is no ordinary file|has no config.json"):
        load(folder)


def test_a_save_that_fails_leaves_the_pooling_as_it_was(tmp_path, monkeypatch):
    """The folder of the pooling is written before the others, and put back if they cannot be written."""
    folder = sentence_folder(tmp_path / "m", Pooling("mean"))
    model, tokenizer = load(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    model._pooling = Pooling("cls")
    write = files.write_atomically

    def disk_full(contents: dict) -> None:
        if any(Path(path).name == "config.json" and Path(path).parent.name != "1_Pooling" for path in contents):
            raise OSError("the disk is full")
        write(contents)

    monkeypatch.setattr(sys.modules["tinyft.formats.huggingface"], "write_atomically", disk_full)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="the disk is full"):
            save(model, target, tokenizer)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not [path for path in (tmp_path / "new").rglob("*") if path.is_file()]


# ── large files ──────────────────────────────────────────────────────────────────────────────────────────────────────
LARGE = BERTConfig(vocab=3000, positions=16, width=128, layers=1, heads=4)


def values(model: Any) -> dict[str, bytes]:
    return {name: host(p).tobytes() for name, p in model.named_parameters().items()}


@ON_HOST
def test_a_large_file_is_mapped_and_a_small_one_is_not(tmp_path):
    model = BERT(LARGE, seed=1)
    save(model, tmp_path / "large")
    save(BERT(BERTConfig(vocab=20, positions=16, width=12, layers=1, heads=3)), tmp_path / "small")
    large = load(tmp_path / "large")[0]
    assert all(files.is_mapped(p.data) for p in large.parameters())
    assert values(large) == values(model)
    assert not any(files.is_mapped(p.data) for p in load(tmp_path / "small")[0].parameters())
    assert not any(files.is_mapped(p.data) for p in load(tmp_path / "large", "float16")[0].parameters())


@ON_HOST
def test_a_mapped_model_trains_and_is_saved_in_its_place(tmp_path):
    """Writing to a parameter changes no file, and saving to the same directory changes no other loaded model."""
    save(BERT(LARGE, seed=1), tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    model, other = load(tmp_path)[0], load(tmp_path)[0]
    before = values(other)
    ids = np.arange(12).reshape(2, 6)
    ft.attach(model, ft.Full())
    ft.fit(model, [{"ids": ids, "labels": ids, "mask": ids >= 0}], 2, ft.AdamW(0.01), progress=False)
    ft.merge(model)
    model.embed.weight.data[0] += 1.0                      # in place, where the file is mapped
    assert values(model) != before
    assert (tmp_path / "model.safetensors").read_bytes() == content
    save(model, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() != content
    assert values(other) == before
    assert values(load(tmp_path)[0]) == values(model)


@ON_HOST
def test_tensors_that_are_not_aligned_are_copied(tmp_path):
    """The header may have any length, so the data may start at any byte."""
    model = BERT(LARGE, seed=1)
    save(model, tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8:8 + length].rstrip()
    header += b" " * (-len(header) % 4 + 3)
    file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length:])
    loaded = load(tmp_path)[0]
    assert all(p.data.flags.aligned for p in loaded.parameters())
    assert values(loaded) == values(model)


MEASURE = """
    import sys
    import tinyft as ft
    from tinyft.formats import huggingface

    def most():
        return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

    if sys.argv[3] == "a second copy":
        huggingface.is_mapped = lambda a: False
        huggingface.drop_pages = lambda a: None
    ft.load(sys.argv[2])                                   # a small model, so that all code is there
    before = most()
    model, _ = ft.load(sys.argv[1])
    total = sum(float(p.data.sum()) for p in model.parameters())             # reads every page
    print(most() - before, sum(p.data.nbytes for p in model.parameters()))
"""


@pytest.fixture(scope="module")
def forty_megabytes(tmp_path_factory):
    """{dtype: a directory with a model of 40 MB in float32}, and a small one under "small"."""
    folder = tmp_path_factory.mktemp("large")
    model = BERT(BERTConfig(vocab=2000, positions=64, width=256, layers=12, heads=4), seed=1)
    for dtype in ("float32", "float16", "bfloat16"):
        save(model, folder / dtype, dtype=dtype)
    save(BERT(LARGE), folder / "small")
    return folder


def peak(folder: Path, dtype: str, variant: str) -> tuple[int, int]:
    """(rise of the largest memory of a process that loads a model and reads it all, bytes of its parameters)."""
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(folder / dtype), str(folder / "small"), variant]
    environment = {**os.environ, "TINYFT_BACKEND": "numpy", "OPENBLAS_NUM_THREADS": "1",
                   "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    rise, parameters = done.stdout.split()
    return int(rise), int(parameters)


@ON_HOST
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the largest memory is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_loading_takes_no_second_copy(dtype, forty_megabytes):
    """At most 1.2 times the parameters and one tensor, whatever the dtype of the file; a second copy is found."""
    largest = 2000 * 256 * 4
    rise, parameters = peak(forty_megabytes, dtype, "as it is")
    assert parameters > 39e6
    assert 0.9 * parameters < rise <= 1.2 * parameters + largest
    rise, _ = peak(forty_megabytes, dtype, "a second copy")
    assert rise > 1.2 * parameters + largest

"""transformers beside DistilBERT, RoBERTa, DistilGPT-2 and sentence-transformers folders.

Random small configurations of every class: the same outputs and gradients from their directory, single or in shards, in
32 and 16 bits, with padding on either side; and the same outputs in transformers from a directory that we wrote, also
after a merge and after a step of training. Planted errors are rejected.
"""
from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import dev, host, real_asset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

import tinyft as ft
from tinyft import ops
from tinyft.data import encode, text_batches
from tinyft.formats import classifier, huggingface, layout, load, save
from tinyft.formats.distilbert import DistilBERTFamily
from tinyft.formats.roberta import RoBERTaFamily
from tinyft.nn import Module

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'tinyft[peers]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'tinyft[peers]'")
from test_transformers import agree, near  # noqa: E402
from transformers import (  # noqa: E402
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
)

V, B, T = 50, 4, 9
LENGTHS = np.array([9, 3, 1, 5])
CLASSES = [
    DistilBertModel, DistilBertForMaskedLM, DistilBertForSequenceClassification,
    RobertaModel, RobertaForMaskedLM, RobertaForSequenceClassification,
]
EVERY = pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
PRECISION = pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("float64", 1e-9)])
Batch = dict[str, np.ndarray]


# ── models, batches, outputs ─────────────────────────────────────────────────────────────────────────────────────────
def random_config(kind: Any, seed: int) -> Any:
    """A random small configuration without dropout. The id of padding is never that of a real token."""
    rng = np.random.default_rng(seed)
    heads = int(rng.choice([1, 2, 3]))
    width = heads * int(rng.choice([4, 8]))
    layers = int(rng.integers(1, 4))
    hidden = int(rng.integers(5, 40))
    positions = int(rng.integers(16, 30))
    padding = int(rng.integers(0, 4))
    if issubclass(kind.config_class, DistilBertConfig):
        return DistilBertConfig(
            vocab_size=V, max_position_embeddings=positions, dim=width, n_layers=layers, n_heads=heads,
            hidden_dim=hidden, num_labels=5, pad_token_id=padding, dropout=0.0, attention_dropout=0.0,
            seq_classif_dropout=0.0)
    return RobertaConfig(
        vocab_size=V, max_position_embeddings=positions, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=heads, intermediate_size=hidden, num_labels=5, pad_token_id=padding,
        type_vocab_size=int(rng.integers(1, 3)), layer_norm_eps=float(rng.choice([1e-12, 1e-5, 1e-3])),
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def theirs(kind: Any, config: Any, seed: int = 0) -> Any:
    """A random model of transformers. Its weights are not small, so that a wrong norm or a missing bias shows."""
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def right_padded(rng: np.random.Generator, padding: int) -> Batch:
    """Rows of 9, 3, 1 and 5 tokens, padded on the right."""
    mask = np.arange(T) < LENGTHS[:, None]
    ids = np.where(mask, rng.integers(4, V, (B, T)), padding)
    labels = np.where(mask, rng.integers(0, V, (B, T)), -100)
    return {"ids": ids, "mask": mask, "labels": labels, "classes": rng.integers(0, 5, B)}


def left_padded(b: Batch) -> Batch:
    """The same rows, padded on the left."""
    def moved(a: np.ndarray) -> np.ndarray:
        rows = [np.roll(row, T - length) for row, length in zip(a, LENGTHS, strict=True)]
        return np.stack(rows)
    return {**b, **{key: moved(b[key]) for key in ("ids", "mask", "labels")}}


def their_output(model: Any, b: Batch) -> Any:
    """Their logits, or the last hidden states of a model without a head."""
    out = model(torch.tensor(b["ids"]), attention_mask=torch.tensor(b["mask"].astype(int)))
    return out["logits"] if "logits" in out else out["last_hidden_state"]


def their_values(model: Any, b: Batch) -> np.ndarray:
    """Their output as an array."""
    with torch.no_grad():
        return their_output(model, b).numpy()


def real(out: np.ndarray, b: Batch) -> np.ndarray:
    """The outputs at real tokens; the output itself if it has one row for a sequence."""
    return out[b["mask"]] if out.ndim == 3 else out


def same_output(they: Any, we: Module, b: Batch, tolerance: float) -> None:
    """Both models compute the same at every real token."""
    near(real(host(we(b["ids"], mask=b["mask"])), b), real(their_values(they, b), b), tolerance)


def loaded(model: Any, folder: Path, dtype: str = "float32") -> tuple[Any, Module]:
    """Their model and ours, from one directory."""
    model.save_pretrained(folder)
    return model.to(getattr(torch, dtype)), load(folder, dtype)[0]


# ── outputs and gradients ────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("seed", range(3))
@PRECISION
@EVERY
def test_outputs_with_padding_on_either_side(kind, dtype, tolerance, seed, tmp_path, rng):
    """Padding on the left gives our outputs of the same rows padded on the right. DistilBERT counts padding on the left
    as positions, so only RoBERTa is compared there."""
    they, we = loaded(theirs(kind, random_config(kind, seed), seed), tmp_path, dtype)
    right = right_padded(rng, they.config.pad_token_id)
    same_output(they, we, right, tolerance)
    left = left_padded(right)
    near(real(host(we(left["ids"], mask=left["mask"])), left),
         real(host(we(right["ids"], mask=right["mask"])), right), tolerance)
    if "Roberta" in kind.__name__ and "Classification" not in kind.__name__:     # its classifier reads the padding
        same_output(they, we, left, tolerance)


def gradients(they: Any, we: Module, b: Batch, rng: np.random.Generator) -> tuple[dict, dict]:
    """Our gradients, under their names, and their gradients.

    The loss is the cross-entropy; for a model without a head, the product with a random array."""
    their_out = their_output(they, b)
    our_out = we(b["ids"], mask=b["mask"])
    if their_out.ndim == 3 and their_out.shape[-1] != V:
        direction = rng.standard_normal(their_out.shape) * b["mask"][..., None]
        direction = direction.astype(host(our_out).dtype)
        (their_out * torch.tensor(direction)).sum().backward()
        (our_out * dev(direction)).sum().backward()
    else:
        y = b["labels"] if their_out.ndim == 3 else b["classes"]
        torch.nn.functional.cross_entropy(their_out.flatten(0, -2), torch.tensor(y).flatten()).backward()
        ops.cross_entropy(our_out, dev(y)).backward()
    family = huggingface._family_of_model(we)
    plan = family.plan_of(we)
    ours = {name: np.zeros(p.shape) if p.grad is None else host(p.grad) for name, p in we.named_parameters().items()}
    stored = layout.file_tensors(family.table(plan), ours)
    got = {family.file_name(name, plan): a for name, a in stored.items()}
    want = {name: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for name, p in they.named_parameters()}
    return got, want


@pytest.mark.parametrize("seed", range(2))
@PRECISION
@EVERY
def test_every_gradient(kind, dtype, tolerance, seed, tmp_path, rng):
    """Also: no gradient is zero, except that of the bias of the keys, which a softmax ignores, and of a pooler that the
    output does not read."""
    they, we = loaded(theirs(kind, random_config(kind, seed), seed), tmp_path, dtype)
    got, want = gradients(they, we, right_padded(rng, they.config.pad_token_id), rng)
    agree(got, want, tolerance)
    for name, g in want.items():
        if not name.endswith(("key.bias", "k_lin.bias")) and "pooler" not in name:
            assert np.abs(g).max() > 1e-3, name


# ── planted errors ───────────────────────────────────────────────────────────────────────────────────────────────────
def changed_config(**fields: Any) -> Callable[[Any], Any]:
    """An error: the plan has other settings."""
    def wrong(plan: Any) -> Any:
        values = {name: f(plan.config) for name, f in fields.items()}
        return dataclasses.replace(plan, config=dataclasses.replace(plan.config, **values))
    return wrong


def tanh(config: Any) -> str:
    return "tanh"


def relu(config: Any) -> str:
    return "relu"


def one_earlier(config: Any) -> int:
    return config.first_position - 1


def one_more(config: Any) -> int:
    return config.positions + 1


def large(config: Any) -> float:
    return 0.1


DISTILBERT = (DistilBertForSequenceClassification, DistilBERTFamily)
ROBERTA = (RobertaForSequenceClassification, RoBERTaFamily)
WRONG = {
    "tanh in DistilBERT's classifier": (*DISTILBERT, changed_config(pooler_activation=tanh)),
    "DistilBERT's epsilon": (*DISTILBERT, changed_config(eps=large)),
    "ReLU in RoBERTa's classifier": (*ROBERTA, changed_config(pooler_activation=relu)),
    "positions begin one row earlier": (*ROBERTA, changed_config(first_position=one_earlier, positions=one_more)),
    "RoBERTa's epsilon": (*ROBERTA, changed_config(eps=large)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_plan_is_caught(name, tmp_path, rng, monkeypatch):
    kind, family, wrong = WRONG[name]
    they, we = loaded(theirs(kind, random_config(kind, 0)), tmp_path)
    b = right_padded(rng, they.config.pad_token_id)
    same_output(they, we, b, 1e-4)
    right = family.read_config

    def wrong_plan(self: Any, config: dict, names: Any) -> Any:
        return wrong(right(self, config, names))

    monkeypatch.setattr(family, "read_config", wrong_plan)
    with pytest.raises(AssertionError, match="apart"):
        same_output(they, load(tmp_path)[0], b, 1e-4)


@pytest.mark.parametrize("first, second", [("attn.q", "attn.k"), ("norm1", "norm2"), ("attn.v", "attn.o")])
@pytest.mark.parametrize("kind, family", [DISTILBERT, ROBERTA], ids=["distilbert", "roberta"])
def test_a_wrong_table_is_caught(kind, family, first, second, tmp_path, rng, monkeypatch):
    they = theirs(kind, random_config(kind, 0))
    right = family.table

    def exchanged(self: Any, plan: Any) -> layout.Table:
        table = right(self, plan)
        out = dict(table)
        for name in table:
            if f".{first}." in name:
                other = name.replace(first, second)
                out[name], out[other] = table[other], table[name]
        return out

    monkeypatch.setattr(family, "table", exchanged)
    they, we = loaded(they, tmp_path)
    with pytest.raises(AssertionError, match="apart"):
        same_output(they, we, right_padded(rng, they.config.pad_token_id), 1e-4)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@EVERY
def test_files_of_every_dtype_single_and_in_shards(kind, dtype, shards, tmp_path, rng):
    """A file in 16 bits is read as the same values in float32."""
    they = theirs(kind, random_config(kind, 1)).to(getattr(torch, dtype))
    they.save_pretrained(tmp_path, **({"max_shard_size": "5KB"} if shards else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    same_output(they.float(), load(tmp_path)[0], right_padded(rng, they.config.pad_token_id), 1e-4)


def train_one_step(model: Module, b: Batch) -> None:
    """One step of AdamW on the batch, on whatever trains."""
    labels = b["labels"] if model.head.out_features == V else b["classes"]
    batch = {"ids": b["ids"], "mask": b["mask"], "labels": labels}
    ft.fit(model, [batch], 1, ft.AdamW(0.01), progress=False)


def same_in_transformers(we: Module, kind: Any, folder: Path, b: Batch) -> None:
    """transformers reads what we write: nothing is missing, nothing unexpected, and the outputs are ours."""
    save(we, folder)
    again, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    near(real(their_values(again.eval(), b), b), real(host(we.eval()(b["ids"], mask=b["mask"])), b), 1e-5)


@EVERY
def test_transformers_reads_what_we_write(kind, tmp_path, rng):
    """As it was loaded, after the merge of a trained LoRA, and after a step on all parameters."""
    they, we = loaded(theirs(kind, random_config(kind, 2)), tmp_path / "theirs")
    b = right_padded(rng, they.config.pad_token_id)
    same_in_transformers(we, kind, tmp_path / "loaded", b)
    if we.head is None:
        return
    for method in (ft.LoRA(r=2, targets=("attn.[qkvo]", "mlp.up", "mlp.down")), ft.Full()):
        before = host(we(b["ids"], mask=b["mask"]))
        ft.attach(we, method)
        train_one_step(we, b)
        ft.merge(we)
        assert np.abs(host(we(b["ids"], mask=b["mask"])) - before).max() > 1e-3
        same_in_transformers(we, kind, tmp_path / type(method).__name__, b)


@pytest.mark.parametrize("kind, wanted", [
    (DistilBertModel, DistilBertForSequenceClassification),
    (DistilBertForMaskedLM, DistilBertForSequenceClassification),
    (RobertaModel, RobertaForSequenceClassification),
    (RobertaForMaskedLM, RobertaForSequenceClassification),
], ids=lambda kind: kind.__name__)
def test_a_new_classifier_is_the_one_of_transformers(kind, wanted, tmp_path, rng):
    """Its layers are new and train with the first method. RoBERTa's pooler is not taken for the classifier's layer."""
    they, we = loaded(theirs(kind, random_config(kind, 0)), tmp_path / "theirs")
    pooler = None if we.pooler is None else host(we.pooler.dense.weight)
    classifier(we, 5, seed=1)
    assert we.head_modules == ("head", "pooler")
    assert pooler is None or np.abs(host(we.pooler.dense.weight) - pooler).max() > 0.1
    b = right_padded(rng, they.config.pad_token_id)
    ft.attach(we, ft.LoRA(r=2))
    before = host(we.pooler.dense.weight).copy()
    train_one_step(we, b)
    assert (host(we.pooler.dense.weight) != before).any()
    ft.merge(we)
    same_in_transformers(we, wanted, tmp_path / "saved", b)


def test_an_old_file_of_a_roberta_classifier_may_hold_the_pooler(tmp_path, rng):
    """Files of earlier versions have roberta.pooler beside classifier.dense; the classifier does not read it."""
    kind = RobertaForSequenceClassification
    they = theirs(kind, random_config(kind, 0))
    they.save_pretrained(tmp_path)
    width = they.config.hidden_size
    from safetensors.numpy import load_file, save_file
    tensors = load_file(tmp_path / "model.safetensors")
    pooler = {"roberta.pooler.dense.weight": np.ones((width, width)), "roberta.pooler.dense.bias": np.ones(width)}
    save_file(tensors | pooler, tmp_path / "model.safetensors", {"format": "pt"})
    same_output(they, load(tmp_path)[0], right_padded(rng, they.config.pad_token_id), 1e-4)


# config.json of distilgpt2 as the hub has it, except for its sizes.
DISTILGPT2 = {
    "_num_labels": 1, "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
    "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "id2label": {"0": "LABEL_0"},
    "initializer_range": 0.02, "label2id": {"LABEL_0": 0}, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
    "n_ctx": 32, "n_embd": 24, "n_head": 3, "n_layer": 3, "n_positions": 32, "resid_pdrop": 0.1,
    "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": V,
}


def test_distilgpt2_is_a_gpt2_of_fewer_layers(tmp_path, rng):
    """With its config.json, and with the causal masks that its file holds; also saved back."""
    they = theirs(GPT2LMHeadModel, GPT2Config.from_dict(DISTILGPT2))
    they.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(DISTILGPT2))
    from safetensors.numpy import load_file, save_file
    tensors = load_file(tmp_path / "model.safetensors")
    masks = {f"transformer.h.{i}.attn.bias": np.tri(32, dtype=np.uint8)[None, None] for i in range(3)}
    save_file(tensors | masks, tmp_path / "model.safetensors", {"format": "pt"})
    we, _ = load(tmp_path)
    b = right_padded(rng, 0)
    same_output(they, we, b, 1e-4)
    same_in_transformers(we, GPT2LMHeadModel, tmp_path / "ours", b)


# ── tokenizers ───────────────────────────────────────────────────────────────────────────────────────────────────────
TEXTS = ["hello world", " Hello  wörld, HELLO", "", "世界 hello\n\n<mask> x", "a", "hello " * 40]


def byte_level(folder: Path) -> Tokenizer:
    """RoBERTa's kind of tokenizer in a folder, as transformers ships it: byte-level BPE, <s> text </s>."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "hell", "hello", "Ġw", "<mask>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w")]
    out = Tokenizer(models.BPE(vocabulary, merges))
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.decoder = decoders.ByteLevel()
    out.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    out.add_special_tokens([*special, AddedToken("<mask>", lstrip=True)])
    folder.mkdir(parents=True, exist_ok=True)
    out.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RobertaTokenizer"}))
    return out


def test_a_tokenizer_of_roberta_gives_their_ids(tmp_path):
    """Texts of a classifier are <s> text </s>, and padding is <pad>, both at their ids."""
    tokenizer = byte_level(tmp_path)
    size = tokenizer.get_vocab_size()
    config = RobertaConfig(vocab_size=size, max_position_embeddings=20, hidden_size=8, num_hidden_layers=1,
                           num_attention_heads=2, intermediate_size=8)
    RobertaModel(config).save_pretrained(tmp_path)
    they = AutoTokenizer.from_pretrained(tmp_path)
    model, ours = load(tmp_path)
    assert model.config.positions == 18
    for text in TEXTS:
        want = they(text, truncation=True, max_length=18)["input_ids"]
        assert encode(ours, text, 18, "bert") == want
    batch = next(iter(text_batches((TEXTS, [0] * len(TEXTS)), ours, len(TEXTS), 18, shuffle=False)))
    want = they(TEXTS, truncation=True, max_length=18, padding=True)
    assert (batch["ids"][:, :18] == np.array(want["input_ids"])).all()
    assert (batch["mask"] == np.array(want["attention_mask"])).all()
    save(model, tmp_path / "again", ours)
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    for text in TEXTS:
        assert again(text)["input_ids"] == they(text)["input_ids"]
    assert again.pad_token_id == they.pad_token_id == 1


# ── embeddings ───────────────────────────────────────────────────────────────────────────────────────────────────────
def their_embeddings(folder: Path, texts: list[str], mode: str, *, normalize: bool, longest: int) -> np.ndarray:
    """Embeddings by transformers and PyTorch, one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    out = []
    for text in texts:
        inputs = tokenizer(text.strip(), return_tensors="pt", truncation=True, max_length=longest)
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state[0]
        e = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.max(0).values}[mode]
        out.append(torch.nn.functional.normalize(e, dim=0) if normalize else e)
    return torch.stack(out).numpy()


def sentence_folder(folder: Path, mode: str, *, normalize: bool, longest: int, width: int) -> None:
    """The files of sentence-transformers beside a model."""
    kinds = ["Transformer", "Pooling", "Normalize"][:3 if normalize else 2]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [{"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{kind}"}
               for i, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    names = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
    flags = {f"pooling_mode_{name}": mode == key for key, name in names.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": width, **flags}))
    settings = {"max_seq_length": longest, "do_lower_case": False}
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("mode, normalize", [("mean", True), ("cls", False), ("max", True)])
@pytest.mark.parametrize("kind", [RobertaModel, DistilBertModel, RobertaForMaskedLM], ids=lambda kind: kind.__name__)
def test_embeddings_of_a_random_model(kind, mode, normalize, tmp_path):
    """A head in the file changes nothing; texts are cut at max_seq_length. Also after our save."""
    tokenizer = byte_level(tmp_path)
    config = random_config(kind, 0)
    config.vocab_size = tokenizer.get_vocab_size()
    config.pad_token_id = 1
    theirs(kind, config).save_pretrained(tmp_path)
    width = config.hidden_size
    sentence_folder(tmp_path, mode, normalize=normalize, longest=11, width=width)
    want = their_embeddings(tmp_path, TEXTS, mode, normalize=normalize, longest=11)
    model, tokenizer = load(tmp_path)
    got = ft.embed(model, tokenizer, TEXTS, batch_size=4)
    assert got.dtype == np.float32 and got.shape == (len(TEXTS), width)
    near(got, want, 1e-5)
    others = {"mean": "cls", "cls": "max", "max": "mean"}
    with pytest.raises(AssertionError, match="apart"):
        near(ft.embed(model, tokenizer, TEXTS, pooling=others[mode]), want, 1e-5)
    save(model, tmp_path / "again", tokenizer)
    again, tokenizer = load(tmp_path / "again")
    if model.head is None:
        near(ft.embed(again, tokenizer, TEXTS), want, 1e-5)
        near(their_embeddings(tmp_path / "again", TEXTS, mode, normalize=normalize, longest=11), want, 1e-5)


REAL_TEXTS = [
    "A man is eating food.", "Someone has a meal.", "", "  The new movie is awesome.\n", "世界 こんにちは",
    "def f(x): return x",
    "Stock prices fell on Monday after the central bank raised its rate. " * 40,
]


def test_embeddings_of_minilm(tmp_path):
    """all-MiniLM-L6-v2: the longest text is cut at 256 tokens. Also after our save, in both libraries."""
    folder = real_asset("all-MiniLM-L6-v2")
    want = their_embeddings(folder, REAL_TEXTS, "mean", normalize=True, longest=256)
    model, tokenizer = load(folder)
    got = ft.embed(model, tokenizer, REAL_TEXTS)
    near(got, want, 1e-5)
    assert got[0] @ got[1] > 0.6 > 0.2 > got[0] @ got[3]
    with pytest.raises(AssertionError, match="apart"):
        near(ft.embed(model, tokenizer, REAL_TEXTS, max_len=512), want, 1e-5)
    save(model, tmp_path, tokenizer)
    near(their_embeddings(tmp_path, REAL_TEXTS, "mean", normalize=True, longest=256), want, 1e-5)
    near(ft.embed(*load(tmp_path), REAL_TEXTS), want, 1e-5)


def test_a_bert_that_embeds_learns_as_theirs(tmp_path, rng):
    """MiniLM's class: a BertModel with a pooler that no embedding reads."""
    config = BertConfig(vocab_size=V, max_position_embeddings=16, hidden_size=24, num_hidden_layers=2,
                        num_attention_heads=3, intermediate_size=24, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0, pad_token_id=0)
    they, we = loaded(theirs(BertModel, config), tmp_path)
    got, want = gradients(they, we, right_padded(rng, 0), rng)
    agree(got, want, 1e-4)

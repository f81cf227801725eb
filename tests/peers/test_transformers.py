"""transformers beside formats/: the same files give the same logits and the same gradients, in both directions.

Tiny random models, without dropout. Padded positions are not compared: their outputs mean nothing, and
transformers counts positions from the left edge, where ours counts real tokens.
"""
from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from helpers import dev, host

from tinyft import decode, models, ops
from tinyft.formats import huggingface, layout, load, save
from tinyft.formats.gpt2 import GPT2Family
from tinyft.nn import Context, Module

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'tinyft[peers]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'tinyft[peers]'")
from transformers import (  # noqa: E402
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

V, B, T = 50, 4, 9
GPT2 = GPT2Config(
    vocab_size=V, n_positions=32, n_embd=24, n_layer=2, n_head=3, n_inner=24, num_labels=5, pad_token_id=0,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
BERT = BertConfig(
    vocab_size=V, max_position_embeddings=16, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
    intermediate_size=24, num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
MODELS = {
    "GPT2LMHeadModel": (GPT2LMHeadModel, GPT2),
    "GPT2ForSequenceClassification": (GPT2ForSequenceClassification, GPT2),
    "BertForMaskedLM": (BertForMaskedLM, BERT),
    "BertForSequenceClassification": (BertForSequenceClassification, BERT),
    "BertModel": (BertModel, BERT),
    "BertForPreTraining": (BertForPreTraining, BERT),
    "GPT2Model": (GPT2Model, GPT2),
}
EVERY = pytest.mark.parametrize("name", list(MODELS)[:5])  # the classes that save writes
PRECISION = pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float64", 1e-10)])


def theirs(name: str, seed: int = 0) -> Any:
    """A random model of transformers. Its weights are not small, so that a wrong norm or a missing bias shows."""
    torch.manual_seed(seed)
    kind, config = MODELS[name]
    model = kind(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Rows of 9, 3, 1 and 5 tokens, padded on the right with id 0.

    No other id is 0, since transformers does not train the padding embedding of BERT.
    """
    length = np.array([9, 3, 1, 5])
    mask = np.arange(T) < length[:, None]
    ids = np.where(mask, rng.integers(1, V, (B, T)), 0)
    token_type_ids = np.where(mask, rng.integers(0, 2, (B, T)), 0)
    labels = np.where(mask, rng.integers(0, V, (B, T)), -100)
    classes = rng.integers(0, 5, B)
    return {"ids": ids, "mask": mask, "token_type_ids": token_type_ids, "labels": labels, "classes": classes}


def their_output(model: Any, b: dict[str, np.ndarray]) -> Any:
    """The logits of their model, or its last hidden states if it has no head."""
    inputs = {"input_ids": torch.tensor(b["ids"]), "attention_mask": torch.tensor(b["mask"].astype(int))}
    if "Bert" in type(model).__name__:
        inputs["token_type_ids"] = torch.tensor(b["token_type_ids"])
    out = model(**inputs)
    for name in ("logits", "prediction_logits", "last_hidden_state"):
        if name in out:
            return out[name]
    raise AssertionError("their model returned no logits and no hidden states")


def our_output(model: Module, b: dict[str, np.ndarray]) -> Any:
    """The output of our model."""
    if isinstance(model, models.BERT):
        return model(b["ids"], mask=b["mask"], token_type_ids=b["token_type_ids"])
    return model(b["ids"], mask=b["mask"])


def near(a: np.ndarray, b: np.ndarray, tolerance: float, what: str = "") -> None:
    """Within the tolerance, relative to the largest value of b or to 1."""
    assert a.shape == b.shape, what
    difference = np.abs(a - b).max()
    assert difference <= tolerance * max(np.abs(b).max(), 1), f"{what}: {difference:.3g} apart"


def real(out: np.ndarray, b: dict[str, np.ndarray]) -> np.ndarray:
    """The outputs at real tokens; the output itself if it has one row per sequence."""
    return out[b["mask"]] if out.ndim == 3 else out


def same_output(they: Any, we: Module, b: dict[str, np.ndarray], tolerance: float) -> None:
    """Both models compute the same at every real token."""
    with torch.no_grad():
        want = their_output(they, b).numpy()
    near(real(host(our_output(we, b)), b), real(want, b), tolerance)


def loaded(model: Any, folder: Path, dtype: str) -> tuple[Any, Module]:
    """Their model and ours, from one directory."""
    model.save_pretrained(folder)
    return model.to(getattr(torch, dtype)), load(folder, dtype)[0]


@PRECISION
@EVERY
def test_logits(name, dtype, tolerance, tmp_path, rng):
    they, we = loaded(theirs(name), tmp_path, dtype)
    same_output(they, we, batch(rng), tolerance)


def test_logits_without_the_next_sentence_head(tmp_path, rng):
    """The next-sentence head of a BertForPreTraining is not read."""
    they, we = loaded(theirs("BertForPreTraining"), tmp_path, "float64")
    same_output(they, we, batch(rng), 1e-10)


def test_hidden_states_of_a_gpt2_without_a_head(tmp_path, rng):
    """A GPT2Model gets our tied head; its hidden states are theirs."""
    they, we = loaded(theirs("GPT2Model"), tmp_path, "float64")
    b = batch(rng)
    ctx = Context(mask=b["mask"])
    we(b["ids"], ctx)
    with torch.no_grad():
        want = their_output(they, b).numpy()
    near(real(host(ctx.last_hidden_state), b), real(want, b), 1e-10)


def gradients(they: Any, we: Module, b: dict[str, np.ndarray], rng: np.random.Generator) -> tuple[dict, dict]:
    """Our gradients, under their names and in their layout, and their gradients.

    The loss is the cross-entropy; for a model without a head, the product with a random array.
    """
    their_out = their_output(they, b)
    our_out = our_output(we, b)
    if isinstance(they, BertModel):
        direction = rng.standard_normal(their_out.shape) * b["mask"][..., None]
        direction = direction.astype(host(our_out).dtype)
        (their_out * torch.tensor(direction)).sum().backward()
        (our_out * dev(direction)).sum().backward()
    else:
        y = b["labels"] if their_out.ndim == 3 else b["classes"]
        torch.nn.functional.cross_entropy(their_out.flatten(0, -2), torch.tensor(y).flatten()).backward()
        ops.cross_entropy(our_out, dev(y)).backward()
    family = next(f for f in huggingface.FAMILIES if f.model_type == they.config.model_type)
    plan = family.plan_of(we)
    ours = {name: np.zeros(p.shape) if p.grad is None else host(p.grad) for name, p in we.named_parameters().items()}
    stored = layout.file_tensors(family.table(plan), ours)
    got = {family.file_name(name, plan): a for name, a in stored.items()}
    want = {name: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for name, p in they.named_parameters()}
    return got, want


def agree(got: dict[str, np.ndarray], want: dict[str, np.ndarray], tolerance: float) -> None:
    """The same names, and the same gradient under each."""
    assert got.keys() == want.keys()
    for name in want:
        near(got[name], want[name], tolerance, name)


@PRECISION
@EVERY
def test_every_gradient(name, dtype, tolerance, tmp_path, rng):
    """Also: no gradient is zero, except those that must be. A softmax ignores the bias of the keys, and the loss of a
    BertModel does not reach its pooler."""
    they, we = loaded(theirs(name), tmp_path, dtype)
    got, want = gradients(they, we, batch(rng), rng)
    agree(got, want, tolerance)
    for parameter, g in want.items():
        is_key_bias = parameter.endswith("attention.self.key.bias")
        is_unused_pooler = name == "BertModel" and "pooler" in parameter
        if not is_key_bias and not is_unused_pooler:
            assert np.abs(g).max() > 1e-3, parameter


def forgotten_transpose(table: layout.Table) -> layout.Table:
    """An error on square matrices, which changes no shape."""
    out = dict(table)
    for name, place in table.items():
        if name.endswith("attn.o.weight"):
            out[name] = dataclasses.replace(place, transposed=False)
    return out


def keys_and_values_exchanged(table: layout.Table) -> layout.Table:
    """An error in the order of a fused tensor."""
    other = {None: None, 0: 0, 1: 2, 2: 1}
    return {name: dataclasses.replace(place, third=other[place.third]) for name, place in table.items()}


@pytest.mark.parametrize("wrong", [forgotten_transpose, keys_and_values_exchanged])
def test_a_wrong_table_is_caught(wrong, tmp_path, rng, monkeypatch):
    """The logits show it, and the gradients of the right model put into files by the wrong table show it."""
    they = theirs("GPT2LMHeadModel")
    b = batch(rng)
    right_table = GPT2Family.table

    def wrong_table(family: GPT2Family, plan: Any) -> layout.Table:
        return wrong(right_table(family, plan))

    monkeypatch.setattr(GPT2Family, "table", wrong_table)
    they, we = loaded(they, tmp_path, "float64")
    with pytest.raises(AssertionError, match="apart"):
        same_output(they, we, b, 1e-5)
    monkeypatch.setattr(GPT2Family, "table", right_table)
    we = load(tmp_path, "float64")[0]
    monkeypatch.setattr(GPT2Family, "table", wrong_table)
    got, want = gradients(they, we, b, rng)
    with pytest.raises(AssertionError, match="apart"):
        agree(got, want, 1e-5)


@EVERY
def test_transformers_loads_our_files(name, tmp_path, rng):
    """With nothing missing, nothing unexpected and the same output."""
    they, we = loaded(theirs(name), tmp_path / "theirs", "float32")
    save(we, tmp_path / "ours")
    again, info = type(they).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    b = batch(rng)
    with torch.no_grad():
        assert torch.equal(their_output(again.eval(), b), their_output(they, b))
    after = again.config.to_dict()
    before = they.config.to_dict()
    if "Classification" in name:
        assert again.config.num_labels == they.config.num_labels
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    for key in (*sizes, "pad_token_id", "layer_norm_eps"):
        assert after.get(key) == before.get(key), key


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype, tmp_path, rng):
    """We read their half-precision file as the same values, and they read ours."""
    they = theirs("GPT2LMHeadModel").to(getattr(torch, dtype))
    they.save_pretrained(tmp_path / "theirs")
    we, _ = load(tmp_path / "theirs")
    save(we, tmp_path / "ours", dtype=dtype)
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    b = batch(rng)
    same_output(they.to(torch.float32), we, b, 1e-5)
    same_output(again.eval(), we, b, 1e-5)


def test_shards(tmp_path, rng):
    they = theirs("BertForMaskedLM")
    they.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    same_output(they, load(tmp_path)[0], batch(rng), 1e-5)


SMALL_GPT = models.GPTConfig(vocab=V, positions=16, width=24, layers=2, heads=3)
SMALL_BERT = models.BERTConfig(vocab=V, positions=16, token_types=2, width=24, layers=2, heads=3)


@pytest.mark.parametrize("we, kind", [
    (models.GPT(SMALL_GPT, seed=1), GPT2LMHeadModel),
    (models.BERT(SMALL_BERT, seed=1), BertForMaskedLM),
    (models.BERT(SMALL_BERT, seed=1, head=None, pooler=True), BertModel),
], ids=["GPT", "BERT", "BERT without a head"])
def test_transformers_loads_a_new_model_and_its_tokenizer(we, kind, tmp_path, rng):
    """Models that were made here and never by transformers."""
    words = {"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3, "<|endoftext|>": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    save(we, tmp_path, tokenizer)
    they, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    same_output(they.eval(), we, batch(rng), 1e-5)
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert reader("a b a", add_special_tokens=False)["input_ids"] == tokenizer.encode("a b a").ids == [2, 3, 2]
    assert len(reader) == tokenizer.get_vocab_size()
    assert reader.pad_token_id == 0


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cache", [True, False])
def test_greedy_generation(cache, padded, tmp_path, rng):
    """Twenty tokens, also from prompts of different lengths, padded on the left."""
    they, we = loaded(theirs("GPT2LMHeadModel", seed=3), tmp_path, "float64")
    they.generation_config.pad_token_id = 0
    they.generation_config.eos_token_id = None
    mask = np.ones((3, 5), bool)
    if padded:
        mask = np.arange(5) >= np.array([[0], [3], [1]])
    prompt = np.where(mask, rng.integers(1, V, (3, 5)), 0)
    attention_mask = torch.tensor(mask.astype(int))
    prompt_tensor = torch.tensor(prompt)
    want = they.generate(prompt_tensor, attention_mask=attention_mask, max_new_tokens=20, do_sample=False).numpy()
    got = decode.generate(we, prompt, 20, mask=mask if padded else None, cache=cache)
    assert want.shape == got.shape == (3, 25)
    assert (np.asarray(got) == want).all()
    assert len(np.unique(want[:, 5:])) > 2, "not one token again and again"

"""predict: classes with their probabilities, or continuations; the same as the model gives text by text."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from contract import noise
from helpers import dev, host
from test_half_done import snapshot
from wrong import replaced

import tinyft as ft
from tinyft import BERT, GPT, BERTConfig, GPTConfig, LoRA, PromptTuning, attach, classifier, data, ops, predict
from tinyft.methods import PrefixTuning
from tinyft.predict import batches_by_length, positions_of_prompts, search_texts

TOKENIZER = data.shipped_tokenizer()
V = TOKENIZER.get_vocab_size()
TEXTS = ["", "A list.", "Return the number of items in the container, and raise an error.", "x", "def f(x): return"] * 3
KINDS = ["bert", "gpt"]


def make(kind: str, classes: int | None = 3) -> Any:
    """A small model with large weights, so that its answers differ from text to text."""
    if kind == "gpt":
        model = GPT(GPTConfig(V, 32, 12, 2, 3, std=0.5), seed=1)
    else:
        model = BERT(BERTConfig(V, 32, 2, 12, 2, 3, std=0.5), seed=1)
    return noise(model if classes is None else classifier(model, classes), std=0.3, seed=2)


def one_by_one(model: Any, kind: str, max_len: int) -> np.ndarray:
    """The probabilities, each text alone, without padding."""
    rows = []
    for text in TEXTS:
        ids = data.encode(TOKENIZER, text, max_len, form=kind)
        rows.append(host(ops.softmax(model(np.array([ids]))))[0])
    return np.array(rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [None, LoRA(r=2), PromptTuning(p=5), PrefixTuning(p=4, shift=True)], ids=str)
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_classes_and_probabilities_are_those_of_each_text_alone(kind, method, batch_size):
    model = make(kind)
    if method is not None:
        attach(model, method)
    taken = {PromptTuning: 5, PrefixTuning: 4}.get(type(method), 0)
    assert positions_of_prompts(model) == taken
    labels, probabilities = predict(model, TOKENIZER, TEXTS, batch_size=batch_size)
    wanted = one_by_one(model, kind, 32 - taken)
    np.testing.assert_allclose(probabilities, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert labels == wanted.argmax(axis=1).tolist() and (method or len(set(labels)) > 1)
    short = predict(model, TOKENIZER, TEXTS, max_len=6).probabilities
    np.testing.assert_allclose(short, one_by_one(model, kind, 6), rtol=1e-4, atol=1e-5)


def test_names_come_from_the_argument_or_from_the_models_directory(tmp_path):
    model = make("bert")
    ids = predict(model, TOKENIZER, TEXTS).labels
    assert predict(model, TOKENIZER, TEXTS, names=["a", "b", "c"]).labels == ["abc"[i] for i in ids]
    model._kept_config = {"id2label": {"2": "good", "0": "bad", "1": "fair"}}
    ft.save(model, tmp_path, TOKENIZER)
    again, tokenizer = ft.load(tmp_path)
    assert predict(again, tokenizer, TEXTS).labels == [["bad", "fair", "good"][i] for i in ids]
    assert predict(again, tokenizer, TEXTS, names=("a", "b", "c")).labels == ["abc"[i] for i in ids]
    for not_names in ({"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}, {"0": "bad", "1": "fair"}, None):
        model._kept_config = {"id2label": not_names}
        assert predict(model, TOKENIZER, TEXTS).labels == ids
    for wrong in (["a", "b"], "abc", 5):
        with pytest.raises((ValueError, TypeError), match="predict"):
            predict(model, TOKENIZER, TEXTS, names=wrong)


@pytest.mark.parametrize("method", [None, PromptTuning(p=3)], ids=str)
def test_continuations_are_those_of_each_text_alone_and_do_not_hold_the_text(method):
    model = make("gpt", classes=None)
    if method is not None:
        attach(model, method)
    texts = [text for text in TEXTS if text]
    together = predict(model, TOKENIZER, texts, max_new_tokens=6, batch_size=4)
    assert together == [predict(model, TOKENIZER, [text], max_new_tokens=6)[0] for text in texts]
    ids = TOKENIZER.encode(texts[0], add_special_tokens=False).ids
    out = ft.generate(model, [ids], 6, end=TOKENIZER.token_to_id("<|endoftext|>"))
    assert together[0] == TOKENIZER.decode(out[0, len(ids):].tolist())
    drawn = predict(model, TOKENIZER, texts[:2], max_new_tokens=6, temperature=5.0, rng=np.random.default_rng(0))
    assert drawn != together[:2]


def test_a_text_ends_where_the_model_ends_it_and_an_empty_one_begins_after_the_end_of_a_text():
    model = make("gpt", classes=None)
    end = TOKENIZER.token_to_id("<|endoftext|>")
    first = int(host(model(np.array([[end]])))[0, -1].argmax())
    assert predict(model, TOKENIZER, [""], max_new_tokens=1) == [TOKENIZER.decode([first])]
    row = host(model.embed.weight).copy()
    row[end] = 50 * row[first]                           # now the end is more probable than any other token
    model.embed.weight.copy_(row)
    assert predict(model, TOKENIZER, ["x"], max_new_tokens=9)[0] in ("", TOKENIZER.decode([first]))


@pytest.mark.parametrize("kind, classes", [("bert", 3), ("gpt", 3), ("gpt", None)])
def test_the_mode_of_every_module_stays(kind, classes):
    model = make(kind, classes)
    model.train()
    model.blocks[0].eval()
    before = snapshot(model)
    predict(model, TOKENIZER, TEXTS[1:3], max_new_tokens=6)
    assert snapshot(model) == before
    with pytest.raises(ValueError):
        predict(model, TOKENIZER, TEXTS, names=["a"]) if classes else predict(model, TOKENIZER, ["a b " * 50])
    assert snapshot(model) == before


def test_batches_hold_texts_of_similar_length():
    batches = batches_by_length([[0] * n for n in (5, 1, 4, 2, 3)], 2)
    assert batches == [[1, 3], [4, 2], [0]]
    assert batches_by_length([], 2) == []


def test_no_texts_and_texts_that_are_too_long():
    model = make("bert")
    labels, probabilities = predict(model, TOKENIZER, [])
    assert labels == [] and probabilities.shape == (0, 3)
    assert predict(make("gpt", None), TOKENIZER, []) == []
    assert len(predict(model, TOKENIZER, ["a b c " * 100]).labels) == 1
    with pytest.raises(ValueError, match="texts of at most 12 tokens, since 20 new ones follow.*got one of"):
        predict(make("gpt", None), TOKENIZER, ["a", "a b c " * 100])
    with pytest.raises(TypeError, match="max_len cuts the texts of a classifier"):
        predict(make("gpt", None), TOKENIZER, ["a"], max_len=5)


def test_the_end_that_a_caller_gives_ends_each_text_alone():
    """In a batch the rows that have ended are filled; the filler is no part of a text.

    Every token that the model writes is tried as the end, and one that it does not write."""
    model = make("gpt", None)
    texts = TEXTS[1:4]
    rows = [ft.generate(model, [TOKENIZER.encode(text).ids], 6)[0, -6:] for text in texts]
    ends = set(np.concatenate([host(row) for row in rows]).tolist())
    assert len(ends) > 3
    unwritten = next(end for end in range(model.config.vocab) if end not in ends)
    for end in [*ends, unwritten]:
        together = predict(model, TOKENIZER, texts, max_new_tokens=6, end=end)
        assert together == [predict(model, TOKENIZER, [text], max_new_tokens=6, end=end)[0] for text in texts]


@pytest.mark.parametrize("change, words", [
    ({"model": None}, "wants a model"), ({"tokenizer": None}, "wants a tokenizer"),
    ({"texts": "text"}, "a list of texts"), ({"texts": [1]}, "a list of texts"), ({"texts": None}, "a list of texts"),
    ({"batch_size": 0}, "batch_size"),
    ({"batch_size": 2.5}, "batch_size"), ({"max_new_tokens": -1}, "max_new_tokens"), ({"max_len": 0}, "max_len"),
    ({"temperature": 1.0}, "temperature is an option of language models"), ({"max_len": 2}, "max_len"),
    ({"model": BERT(BERTConfig(9, 9, 2, 4, 1, 2))}, "neither classes nor text"),
    ({"model": BERT(BERTConfig(9, 9, 2, 4, 1, 2), head=None)}, "neither classes nor text")], ids=str)
def test_arguments_of_a_wrong_kind(change, words):
    arguments = {"model": make("bert"), "tokenizer": TOKENIZER, "texts": TEXTS, **change}
    with pytest.raises((TypeError, ValueError), match=words) as caught:
        predict(**arguments)
    assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="names are the names of classes"):
        predict(make("gpt", None), TOKENIZER, TEXTS, names=["a"])


def test_a_batch_that_mixes_lengths_without_a_mask_would_be_noticed():
    """Planted: padding that counts as text changes the probabilities."""
    model = make("bert")
    ids, mask = data.pad([data.encode(TOKENIZER, text, 32) for text in TEXTS])
    without = host(ops.softmax(model(dev(ids))))
    with_mask = host(ops.softmax(model(dev(ids), mask=dev(mask))))
    assert np.abs(without - with_mask).max() > 1e-3


def test_padding_and_truncation_of_the_tokenizer_are_not_applied():
    """Some tokenizer.json files ask for both, in every text."""
    padded = data.shipped_tokenizer()
    padded.enable_padding(length=20)
    padded.enable_truncation(3)
    for kind, classes in (("bert", 3), ("gpt", None)):
        model = make(kind, classes)
        ours = predict(model, padded, TEXTS[1:4], max_new_tokens=5)
        theirs = predict(model, TOKENIZER, TEXTS[1:4], max_new_tokens=5)
        assert ours == theirs if classes is None else np.array_equal(ours.probabilities, theirs.probabilities)
    assert padded.padding is not None and padded.truncation is not None


def check_scores(add_penalty: bool) -> None:
    """score = log P / lp(n) + cp of the best target of each source, with cp by the attention of every step."""
    model = noise(ft.Seq2Seq(ft.Seq2SeqConfig(V, 32, 12, 2, 3), seed=1), std=0.3, seed=2)
    lp = ft.GNMTPenalty(1.0)
    for coverage in (0.0, 0.5):
        for text, (found,) in zip(TEXTS[1:3], search_texts(model, TOKENIZER, TEXTS[1:3], max_new_tokens=4, lp=lp,
                                                          coverage=coverage), strict=True):
            source = [[*TOKENIZER.encode(text).ids, TOKENIZER.token_to_id("<|endoftext|>")]]
            ((best,),) = ft.beam_search(model, None, 4, end=source[0][-1], source_ids=source, lp=lp, coverage=coverage)
            cp = coverage * attended(model, source, best.tokens) if add_penalty else 0.0
            assert found.score == pytest.approx(best.log_prob / lp(len(best.tokens)) + cp, rel=1e-4)


def attended(model: Any, source: list, tokens: tuple[int, ...]) -> float:
    """Σᵢ log min(Σⱼ pᵢⱼ, 1) of the last decoder block, whose heads are averaged; i: tokens of the source, j: steps."""
    found = []
    right = ops.attention

    def recorded(q: ft.Tensor, k: ft.Tensor, *others: ft.Tensor, **settings: Any) -> ft.Tensor:
        found.append((host(q), host(k)))
        return right(q, k, *others, **settings)

    with replaced(ops, "attention", recorded), ft.no_grad():
        model([[model.config.start, *tokens[:-1]]], source_ids=source)
    q, k = found[-1]                                     # (1, H, T, D), (1, H, Ts, D)
    z = np.einsum("hqd,hkd->hqk", q[0], k[0]).astype(np.float64) * q.shape[-1]**-0.5
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    return float(np.log(np.minimum(p.mean(0).sum(0), 1)).sum())


def test_a_score_has_the_coverage_penalty():
    check_scores(add_penalty=True)
    with pytest.raises(AssertionError):
        check_scores(add_penalty=False)

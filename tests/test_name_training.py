"""The training pairs and the start of the shipped encoder-decoder, base-seq2seq."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import host, of_the_host, quality, rejects

import tinyft as ft
from tinyft import array, data
from tinyft import pretrain_names as teacher
from tinyft.data import Pairs
from tinyft.data.name_training import chosen_names, prose_sentences, replaced
from tinyft.data.scores import token_f1
from tinyft.data.word_choice import WordChoice

PAIRS = Pairs(("Return the list of archive files.", "Close it."), ("get_archive_files", "shut_down"))


# ---------------------------------------------------------------------------------------------------- the pairs
def test_sentences_are_of_their_split_alone_and_short():
    found = prose_sentences("train", 12)
    assert len(found) > 5_000 and len(set(found)) == len(found)
    assert max(len(sentence.split()) for sentence in found) == 12
    text = "\n".join(r.text for r in data.snapshot() if r.split == "train" and r.kind != "source")
    assert all(sentence in text for sentence in found[::500])
    valid = prose_sentences("valid", 12)
    assert valid != found and len(set(valid) & set(found)) < 0.05 * len(valid), "a few occur in several modules"
    with pytest.raises(ValueError, match="split"):
        prose_sentences("dev")


def test_chosen_names_are_those_of_word_choice():
    found = chosen_names(PAIRS, ["Open the archive files.", "!"])
    want = WordChoice().fit(PAIRS).predict(["Open the archive files."])
    assert found == Pairs(("Open the archive files.",), tuple(want)), "a text without a name is left out"


TEXTS = ["Return the list of archive files.", "Close it, if it is open.", "HTTP headers (raw).", "a socket waits"]


def is_replacement(old: str, new: str) -> bool:
    """True if `new` is `old` with some words of three letters replaced by such words of TEXTS, capitals kept."""
    words = set(re.findall(r"[a-z]{3,}", " ".join(TEXTS).lower()))
    before, after = re.findall(r"[A-Za-z]+|[^A-Za-z]+", old), re.findall(r"[A-Za-z]+|[^A-Za-z]+", new)
    if len(before) != len(after):
        return False
    for one, other in zip(before, after):
        may_change = len(one) >= 3 and one.isalpha()
        fits = other.lower() in words and other[0].isupper() == one[0].isupper()
        if one != other and not (may_change and fits):
            return False
    return True


def check_replaced(function: Callable) -> None:
    copies = [function(TEXTS, 0.4, 5, copy) for copy in range(30)]
    assert all(is_replacement(old, new) for copy in copies for old, new in zip(TEXTS, copy, strict=True))
    assert copies == [function(TEXTS, 0.4, 5, copy) for copy in range(30)], "seed and number decide"
    assert function(TEXTS, 0.4, 6, 0) not in copies, "no other seed has the same copies"
    assert len({tuple(copy) for copy in copies}) > 28
    unchanged = sum(old == new for copy in copies for old, new in zip(TEXTS, copy))
    assert unchanged < 0.25 * 4 * 30, "a new word is the old one by chance alone"


def lower(texts: list[str], *arguments: Any) -> list[str]:
    return [text.lower() for text in replaced(texts, *arguments)]


def without_points(texts: list[str], *arguments: Any) -> list[str]:
    return [text.replace(".", "") for text in replaced(texts, *arguments)]


def of_another_text(texts: list[str], *arguments: Any) -> list[str]:
    return replaced([f"{text} unknown" for text in texts], *arguments)


def one_copy(texts: list[str], share: float, seed: int, copy: int) -> list[str]:
    return replaced(texts, share, seed, 0)


def seeds_that_overlap(texts: list[str], share: float, seed: int, copy: int) -> list[str]:
    return replaced(texts, share, 0, seed + copy)


def often_nothing(texts: list[str], share: float, seed: int, copy: int) -> list[str]:
    return texts if copy % 3 == 0 else replaced(texts, share, seed, copy)


def test_replaced_words_are_words_of_the_texts():
    check_replaced(replaced)


@pytest.mark.parametrize(
    "wrong", [lower, without_points, of_another_text, one_copy, seeds_that_overlap, often_nothing],
)
def test_wrong_replacements_are_rejected(wrong):
    assert rejects(lambda: check_replaced(wrong))


def test_the_share_of_replaced_words():
    """Rare words come more often than in the texts: with the square root of their number."""
    texts = ["often often often often often often often often often rare"] * 3_000
    words = " ".join(replaced(texts, 0.5)).split()
    # A word of ten is rare. Half of the words are replaced, and a new word is rare with probability 1 / (3 + 1).
    assert words.count("rare") / len(words) == pytest.approx(0.5 * 0.1 + 0.5 * 0.25, abs=0.01)
    different = ["one two three four five six seven eight nine ten"] * 300
    for text, copy in zip(different, replaced(different, 0.0)):
        assert sum(a != b for a, b in zip(text.split(), copy.split())) <= 1, "share 0: one word"


def test_texts_that_cannot_be_replaced():
    with pytest.raises(ValueError, match="replaced wants texts with a word"):
        replaced(["of it", "1 2"])
    with pytest.raises(ValueError, match="share"):
        replaced(TEXTS, 0.6)


def test_a_name_is_spaced_and_joined_again():
    names = [pair.name for pair in data.name_pairs()]
    assert [teacher.joined(teacher.spaced(name)) for name in names] == names


# ---------------------------------------------------------------------------------------------------- the start
def attends_to_one(model: ft.T5) -> tuple[np.ndarray, np.ndarray]:
    """(what cross-attention adds for a source of one token, what the encoder gives for it)"""
    source = model.encode([[3]])
    ctx = ft.Context(source=source)
    x = ft.Tensor(array.normal(np.random.default_rng(0), (1, 2, model.config.width), 1.0))
    with ft.no_grad():
        added = model.decoder[0].cross_attn(x, ctx)
    return host(added)[0], np.broadcast_to(host(source.last_hidden_state)[0], (2, model.config.width))


def test_cross_attention_starts_as_a_copy():
    config = ft.T5Config(vocab=11, width=8, layers=1, heads=2, head_width=4, hidden=8)
    added, read = attends_to_one(teacher.start_copying(ft.T5(config, 0)))
    np.testing.assert_array_equal(added, read)
    added, read = attends_to_one(ft.T5(config, 0))
    assert np.abs(added - read).max() > 0.1, "random maps copy nothing"
    with pytest.raises(ValueError, match="as wide as the model"):
        teacher.start_copying(ft.T5(replace(config, head_width=3), 0))


# ---------------------------------------------------------------------------------------------------- the run
@pytest.fixture
def few(monkeypatch):
    """The recipe on 40 pairs and 80 sentences."""
    full, prose = teacher.real_pairs, prose_sentences("train", 8)[:80]
    monkeypatch.setattr(teacher, "real_pairs", lambda split: Pairs(*(part[:40] for part in full(split))))
    monkeypatch.setattr(teacher, "prose_sentences", lambda split: prose)
    config = ft.T5Config(vocab=400, positions=teacher.MAX_SOURCE, width=16, layers=1, heads=2, head_width=8, hidden=16)
    return teacher.NameRecipe(config, steps=4, batch=8, sentences=2, summaries=1)


@of_the_host
def test_the_tokenizer_gives_names_back(few):
    tokenizer = teacher.train_tokenizer(400)
    unknown = tokenizer.token_to_id("[UNK]")
    for name in teacher.real_pairs("train").responses:
        ids = tokenizer.encode(teacher.spaced(name)).ids
        assert unknown not in ids and teacher.joined(tokenizer.decode(ids)) == name
        assert tokenizer.encode(name.upper()).ids == ids
    assert [tokenizer.id_to_token(i) for i in range(3)] == list(teacher.SPECIAL)


@of_the_host
def test_the_tokenizer_gives_every_name_back():
    tokenizer = teacher.train_tokenizer(1000)
    names = [pair.name for pair in data.name_pairs()]
    assert {"b64encode", "read1"} <= set(names), "digits at the end of a word and inside"
    for name in names:
        assert teacher.joined(tokenizer.decode(tokenizer.encode(teacher.spaced(name)).ids)) == name


@of_the_host
def test_the_training_pairs_are_named_by_word_choice(few):
    real = teacher.real_pairs("train").prompts
    prose = teacher.prose_sentences("train")
    named = teacher.labelled_texts(1, 0)
    assert 0 < len(named) <= len(prose) and {source for source, _ in named} <= set(prose), "unchanged"
    assert len(teacher.labelled_texts(2, 0)) > 1.8 * len(named)
    changed = [source for source, _ in teacher.labelled_texts(0, 3)]
    assert len(changed) == 3 * len(real) and len(set(changed) & set(real)) <= 3, "a word was replaced by itself"
    assert changed != [source for source, _ in teacher.labelled_texts(0, 3, seed=1)]
    names = dict(teacher.labelled_texts(0, 3))
    want = WordChoice().fit(teacher.real_pairs("train")).predict(list(names)[:20])
    assert [teacher.joined(target) for target in list(names.values())[:20]] == want


@of_the_host
def test_a_run_writes_the_model_and_goes_on_from_its_checkpoint(few, tmp_path):
    scores = teacher.pretrain_names(tmp_path / "work", tmp_path, recipe=few)
    folder = tmp_path / teacher.NAME
    model, tokenizer = ft.load(folder)
    assert len(ft.predict(model, tokenizer, ["Close the file."])) == 1
    assert f"{scores['f1']:.3f}" in (folder / "README.md").read_text(encoding="utf-8")
    assert len(json.loads((folder / "history.json").read_text(encoding="utf-8"))["f1"]) == 4
    weights = (folder / "model.safetensors").read_bytes()
    assert teacher.pretrain_names(tmp_path / "work", tmp_path, recipe=few) == scores, "no step is left to take"
    assert (folder / "model.safetensors").read_bytes() == weights


@quality
def test_the_shipped_encoder_decoder_scores_as_its_card_says():
    model, tokenizer = ft.load(teacher.NAME)
    test = teacher.real_pairs("test")
    names = teacher.written_names(model, tokenizer, test.prompts)
    card = (teacher.ASSETS / teacher.NAME / "README.md").read_text(encoding="utf-8")
    f1 = float(token_f1(test.responses, names).mean())
    row = next(line for line in card.splitlines() if line.startswith("| this model"))
    assert float(row.split("|")[2]) == pytest.approx(f1, abs=0.004), "float16 may turn a word in 442 names"

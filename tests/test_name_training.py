"""The training pairs and the start of the shipped encoder-decoder, base-seq2seq."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers import host, of_the_host, quality
from hypothesis import given
from hypothesis import strategies as st

import tinyft as ft
from tinyft import array, data
from tinyft import pretrain_names as teacher
from tinyft.data import Pairs
from tinyft.data.name_training import chosen_names, exchanged, prose_sentences, prose_words
from tinyft.data.scores import name_words, token_f1
from tinyft.data.word_choice import WordChoice

WORDS = ["socket", "weight", "planet"]
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


def test_words_are_lower_case_and_have_three_letters():
    assert prose_words(["The End, of x2 things.", "end"]) == ["end", "the", "things"]


def test_chosen_names_are_those_of_word_choice():
    found = chosen_names(PAIRS, ["Open the archive files.", "!"])
    want = WordChoice().fit(PAIRS).predict(["Open the archive files."])
    assert found == Pairs(("Open the archive files.",), tuple(want)), "a text without a name is left out"


def shared(summary: str, name: str) -> set[str]:
    """The words of a name that the summary has."""
    return set(name_words(name)) & set(data.name_baselines.summary_words(summary))


def is_exchange(old: tuple[str, str], new: tuple[str, str]) -> bool:
    """True if `new` is `old` with shared words replaced, each by one word in summary and name alike."""
    before, after = old[0].split(), new[0].split()
    old_words, new_words = name_words(old[1]), name_words(new[1])
    if len(before) != len(after) or len(old_words) != len(new_words):
        return False
    copied = shared(*old)
    table = dict(zip(old_words, new_words))
    kept = all(word == table[word] for word in old_words if word not in copied)
    for one, other in zip(before, after):
        bare = one.strip(".").lower()
        if other.strip(".").lower() != (table[bare] if bare in copied else bare):
            return False
    return kept


def test_exchanged_words_are_the_same_in_summary_and_name():
    [old] = list(zip(*PAIRS))[:1]
    new = exchanged(PAIRS, WORDS, share=1.0)
    assert is_exchange(old, (new.prompts[0], new.responses[0]))
    assert new.responses[0].startswith("get_") and not shared(*old) & set(name_words(new.responses[0]))
    assert (new.prompts[1], new.responses[1]) == ("Close it.", "shut_down"), "nothing is shared"
    wrong = [
        (old[0], new.responses[0]),                                  # the name alone
        (new.prompts[0], old[1]),                                    # the summary alone
        (new.prompts[0].replace("Return", "Socket"), new.responses[0]),
        (new.prompts[0], new.responses[0].replace("get", "socket")),
    ]
    assert not any(is_exchange(old, pair) for pair in wrong)


@given(st.integers(0, 100), st.sampled_from([0.0, 0.3, 1.0]))
def test_every_exchange_is_one(seed, share):
    found = exchanged(PAIRS, WORDS, seed, share)
    for old, new in zip(zip(*PAIRS), zip(*found)):
        assert is_exchange(old, new)
    if share == 0:
        assert found == PAIRS


def test_a_capital_stays_and_seeds_differ():
    pairs = Pairs(("Archive the files.",) * 8, ("archive",) * 8)
    found = exchanged(pairs, WORDS, 1, 1.0)
    assert {summary.split()[0].lower() for summary in found.prompts} == set(found.responses)
    assert all(summary[0].isupper() for summary in found.prompts)
    assert exchanged(pairs, WORDS, 1, 1.0) == found != exchanged(pairs, WORDS, 2, 1.0)
    with pytest.raises(ValueError, match="exchanged wants at least one"):
        exchanged(pairs, [], 1)


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
    return teacher.NameRecipe(config, steps=4, batch=8, first=(1, 1, 1), last=(1, 0, 2), share=0.5)


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
def test_a_mixture_has_the_pairs_that_were_asked_for(few):
    pairs = list(zip(*teacher.real_pairs("train")))
    real = [(summary, teacher.spaced(name)) for summary, name in pairs]
    assert teacher.mixture(0, 0, 2) == real * 2
    changed = teacher.mixture(0, 2, 0)
    assert len(changed) == 80 and changed[:40] != changed[40:]
    copied = teacher.mixture(1, 0, 0)
    assert 0 < len(copied) <= 40 and {source for source, _ in copied} <= set(teacher.prose_sentences("train"))


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

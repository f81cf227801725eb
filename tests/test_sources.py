"""Pairs of a source and a target: their batches, the targets that an encoder-decoder writes, and the commands on them.

Each check is called with the library's functions, and again with wrong ones, which it must reject.
"""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from command_tools import refusal, result_of, succeed, write_rows
from helpers import wrong_answers

import tinyft as ft
from tinyft import array, data
from tinyft.data import sources
from tinyft.data.files import read_rows
from tinyft.data.sources import encode_source, encode_target, source_batches
from tinyft.predict import positions_of_prompts, predict
from tinyft.train.batch import IGNORE, read_batch

TOKENIZER = data.shipped_tokenizer()
END = TOKENIZER.token_to_id("<|endoftext|>")
START = 0
PAIRS = [("Return the list of files.", "get files"), ("Close it.", "close"), ("Open the file of this name.", "open it"),
         ("Return one.", "one"), ("Return a copy of the whole list of all items.", "copy")]


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def small_model(kind: str = "marian", seed: int = 0) -> ft.Module:
    sizes = {"vocab": 2048, "positions": 48, "width": 16, "layers": 1, "heads": 2}
    return ft.Seq2Seq(ft.Seq2SeqConfig(**sizes), seed) if kind == "marian" else ft.T5(ft.T5Config(**sizes), seed)


# ── batches ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def check_batches() -> None:
    """Each pair once: source and end for the encoder; start, target and end for the decoder; no label at padding."""
    batches, cut = source_batches(PAIRS, TOKENIZER, 2, 40, START, seed=3)
    assert cut == 0
    found = set()
    for batch in batches.once():
        targets = read_batch(batch)
        labels = np.full(targets.ids.shape, IGNORE)
        at = slice(None) if targets.logit_positions is None else targets.logit_positions
        labels.reshape(-1)[at] = targets.labels
        for b in range(len(batch["ids"])):
            source = batch["source_ids"][b][batch["source_mask"][b]].tolist()
            read = targets.ids[b][labels[b] != IGNORE].tolist()
            found.add((tuple(source), tuple(read), tuple(labels[b][labels[b] != IGNORE].tolist())))
    expected = set()
    for source, target in PAIRS:
        expected.add(((*ids_of(source), END), (START, *ids_of(target)), (*ids_of(target), END)))
    assert found == expected


def check_cut() -> None:
    """A long source loses its end, and keeps the end of text."""
    batches, cut = source_batches(PAIRS, TOKENIZER, 5, 6, START)
    (batch,) = batches.once()
    assert batch["source_ids"].shape[1] == 6 and cut == sum(len(ids_of(source)) > 5 for source, _ in PAIRS)
    for source, row, mask in zip(PAIRS, batch["source_ids"], batch["source_mask"]):
        assert row[mask].tolist() == [*ids_of(source[0])[:5], END]


@pytest.mark.parametrize("check", [check_batches, check_cut])
def test_batches_of_sources_and_targets(check):
    check()


def without_end(tokenizer: Any, text: str, max_len: int | None = None) -> tuple[list[int], bool]:
    ids, is_cut = encode_source(tokenizer, text, max_len)
    return ids[:-1], is_cut


def cut_left(tokenizer: Any, text: str, max_len: int | None = None) -> tuple[list[int], bool]:
    ids, _ = encode_source(tokenizer, text)
    return ids[-max_len:], len(ids) > max_len


def cut_with_end(tokenizer: Any, text: str, max_len: int | None = None) -> tuple[list[int], bool]:
    ids, _ = encode_source(tokenizer, text)
    return ids[:max_len], len(ids) > max_len


def unstarted(tokenizer: Any, text: str, start: int) -> list[int]:
    return encode_target(tokenizer, text, start)[1:]


def unended(tokenizer: Any, text: str, start: int) -> list[int]:
    return encode_target(tokenizer, text, start)[:-1]


def ended_start(tokenizer: Any, text: str, start: int) -> list[int]:
    return [END, *encode_target(tokenizer, text, start)[1:]]


WRONG = {
    "a source needs no end of text": ("encode_source", without_end, check_batches),
    "a long source loses its beginning": ("encode_source", cut_left, check_cut),
    "a source that is cut has no end of text": ("encode_source", cut_with_end, check_cut),
    "the decoder begins with the first token of the target": ("encode_target", unstarted, check_batches),
    "a target needs no end of text": ("encode_target", unended, check_batches),
    "the end of text is the start token": ("encode_target", ended_start, check_batches),
}


@wrong_answers
@pytest.mark.parametrize("belief", WRONG)
def test_other_batches_are_noticed(belief, monkeypatch):
    name, wrong, check = WRONG[belief]
    monkeypatch.setattr(sources, name, wrong)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("pair, words", [
    (("", "x"), "row 1: a source wants at least one token, got none"),
    (("x", ""), "row 1: a target wants at least one token, got none"),
    (("x", "word " * 60), "row 1: the target has "),
])
def test_a_bad_pair_is_named(pair, words):
    with pytest.raises(ValueError, match=words):
        source_batches([PAIRS[0], pair], TOKENIZER, 2, 40, START)
    with pytest.raises(ValueError, match="max_len wants"):
        source_batches(PAIRS, TOKENIZER, 2, 1, START)


def test_a_resumed_stream_goes_on_with_the_same_batches():
    ours, _ = source_batches(PAIRS, TOKENIZER, 2, 40, START, seed=1)
    for _ in range(4):
        next(ours)
    theirs, _ = source_batches(PAIRS, TOKENIZER, 2, 40, START)
    theirs.load_state_dict(ours.state_dict())
    for _ in range(4):
        a, b = next(ours), next(theirs)
        assert all(np.array_equal(a[name], b[name]) for name in a)
    other, _ = source_batches(PAIRS[::-1], TOKENIZER, 2, 40, START)
    with pytest.raises(ValueError, match="other examples"):
        other.load_state_dict(ours.state_dict())


# ── the columns of a file ────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("row, kind", [
    ({"source": "a", "target": "b"}, "sources"),
    ({"source": "a", "target": "b", "id": 3}, "sources"),
    ({"text": "a", "source": "web"}, "text"),
    ({"text": "a", "source": "web", "target": "x"}, "text"),
    ({"prompt": "a", "response": "b", "source": "web"}, "pairs"),
    ({"text": "a", "label": "b", "source": "web", "target": "c"}, "labelled"),
])
def test_source_and_target_are_a_kind_of_their_own_where_nothing_else_is(row, kind, tmp_path):
    read = read_rows(write_rows(tmp_path / "a.jsonl", [row]))
    assert read.kind == kind and read.rows[0][0] == "a"


# ── writing targets ──────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", ["marian", "t5"])
def test_a_target_is_what_the_model_writes_for_its_source_alone(kind):
    model = small_model(kind, 3)
    texts = [source for source, _ in PAIRS]
    together = predict(model, TOKENIZER, texts, max_new_tokens=6, batch_size=3)
    for text, written in zip(texts, together, strict=True):
        out = ft.generate(model, None, 6, source_ids=[[*ids_of(text), END]], end=END)[0, 1:].tolist()
        assert written == TOKENIZER.decode(out[:out.index(END)] if END in out else out)
        assert predict(model, TOKENIZER, [text], max_new_tokens=6) == [written]
    assert len(set(together)) > 1
    drawn = predict(model, TOKENIZER, texts, max_new_tokens=6, temperature=9.0, rng=np.random.default_rng(0))
    assert drawn != together
    with pytest.raises(ValueError, match="a source wants at least one token"):
        predict(model, TOKENIZER, [""])
    with pytest.raises(TypeError, match="names are the names of classes"):
        predict(model, TOKENIZER, texts, names=["a"])


def test_a_prompt_before_a_source_takes_positions():
    model = small_model()
    assert positions_of_prompts(model) == 0
    ft.attach(model, ft.PromptTuning(p=3))
    assert positions_of_prompts(model) == 3


# ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────
commands = pytest.mark.skipif(array.backend() == "cupy", reason="commands and files are of the host")


@pytest.fixture(scope="module")
def marian(tmp_path_factory) -> str:
    return str(ft.save(small_model(), tmp_path_factory.mktemp("models") / "marian", TOKENIZER))


@commands
def test_tune_eval_and_generate_take_sources(marian, capsys, tmp_path):
    """An encoder-decoder learns four targets by heart, and writes them. A source stands in no answer."""
    file = write_rows(tmp_path / "train.jsonl", [{"source": s, "target": t} for s, t in PAIRS[:4]])
    tuned = result_of(capsys, "tune", "--model", marian, "--data", file, "--test", file, "--method", "full", "--steps",
                      "120", "--lr", "1e-2", "--batch", "4", "--out", str(tmp_path / "run"))
    assert tuned["test"]["loss"] < 0.2 < tuned["before"]["loss"]
    options = ["--model", marian, "--adapter", str(tmp_path / "run")]
    result = result_of(capsys, "eval", *options, "--data", file, "--generate")
    assert result["exact_match"] == 1 and result["loss"] == pytest.approx(tuned["test"]["loss"], rel=1e-5)
    assert succeed(capsys, "generate", *options, "--prompt", PAIRS[1][0]) == "close\n"
    texts = result_of(capsys, "generate", *options, "--file", file)["texts"]
    assert [text["text"] for text in texts] == [target for _, target in PAIRS[:4]]


@commands
def test_rows_that_an_encoder_decoder_cannot_read_are_refused(marian, capsys, tmp_path):
    text = write_rows(tmp_path / "text.jsonl", [{"text": "a b c"}])
    sentence = refusal(capsys, "eval", "--model", marian, "--data", text)
    assert f"the encoder-decoder Seq2Seq wants rows of source and target, got {text} with rows of text" in sentence
    sentence = refusal(capsys, "generate", "--model", marian, "--prompt", "a", "--chat")
    assert "the encoder-decoder Seq2Seq wants sources, got turns of a chat" in sentence
    sentence = refusal(capsys, "generate", "--model", marian, "--prompt", "")
    assert "a source wants at least one token, got none" in sentence
    assert "wants a model that reads one text" in refusal(capsys, "chat", "--model", marian)
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"source": "a", "target": "b"}])
    sentence = refusal(capsys, "eval", "--model", "base-gpt-small", "--data", pairs)
    assert "a causal language model reads prompt and response" in sentence

"""Data files (data/files.py) and their rows as batches (data/rows.py)."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

import tinyft as ft
from tinyft import array, data
from tinyft.data.files import read_rows
from tinyft.data.rows import document_batches, encode_segments, end_of_text, segment_batches
from tinyft.train.batch import IGNORE, compute_loss, read_batch

pytestmark = pytest.mark.skipif(array.backend() == "cupy", reason="commands and files are of the host")

USER = {"role": "user", "content": "Hello"}
ASSISTANT = {"role": "assistant", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be short."}


def write(folder: Path, name: str, content: str | bytes | list) -> Path:
    """A file with a text, bytes, or one line of JSON for each object."""
    path = folder / name
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---------------------------------------------------------------------------------------------------- good files
@pytest.mark.parametrize("name, content, kind, rows, lines", [
    ("a.txt", "One text.\n\nOf three lines.\n", "text", (("One text.\n\nOf three lines.\n",),), (1,)),
    ("a.jsonl", [{"text": "a"}, {"text": "b", "id": 3}], "text", (("a",), ("b",)), (1, 2)),
    ("a.jsonl", [{"label": 1, "text": "a"}, {"text": "b", "label": 0}], "labelled", (("a", 1), ("b", 0)), (1, 2)),
    ("a.jsonl", '{"prompt": "p", "response": ""}\r\n\n{"prompt": "", "response": "r"}', "pairs",
     (("p", ""), ("", "r")), (1, 3)),
    ("a.jsonl", [{"prompt": "p"}], "prompts", (("p",),), (1,)),
    ("a.jsonl", [{"messages": [SYSTEM, USER, ASSISTANT]}], "chat", (([SYSTEM, USER, ASSISTANT],),), (1,)),
    ("a.jsonl", '{"text": "a\u2028b"}\n', "text", (("a\u2028b",),), (1,)),
    ("a.jsonl", b'\xef\xbb\xbf{"text": "a"}', "text", (("a",),), (1,)),
    ("A.CSV", "text,label\na,x\n\n\"two\nlines\",y\nb,x\n", "labelled", (("a", "x"), ("two\nlines", "y"), ("b", "x")),
     (2, 4, 6)),
    ("a.csv", "id,prompt,response\n1,p,r\n", "pairs", (("p", "r"),), (2,)),
    ("a.csv", 'messages\n"[{""role"": ""user"", ""content"": ""Hello""}]"\n', "chat", (([USER],),), (2,)),
])  # fmt: skip
def test_the_columns_decide_the_kind(name, content, kind, rows, lines, tmp_path):
    read = read_rows(write(tmp_path, name, content))
    assert (read.kind, read.rows, read.lines) == (kind, rows, lines)
    assert read.line(0) == f"line {lines[0]} of {tmp_path / name}"


def test_the_lines_of_a_text_can_be_rows(tmp_path):
    read = read_rows(write(tmp_path, "a.txt", "one\r\n\n  \ntwo"), split_lines=True)
    assert (read.rows, read.lines) == ((("one",), ("two",)), (1, 4))


TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), max_size=30)


@given(st.lists(st.tuples(TEXTS, TEXTS.filter(str.strip)), min_size=1, max_size=5))
def test_jsonl_and_csv_give_the_same_rows(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    as_json = write(folder, "a.jsonl", [{"text": text, "label": label} for text, label in rows])
    with open(folder / "a.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([("text", "label"), *rows])
    assert read_rows(as_json).rows == read_rows(folder / "a.csv").rows == tuple(rows)


# ---------------------------------------------------------------------------------------------------- bad files
ONE = '{"text": "a"}\n'
BAD: list[tuple[str, Any, str]] = [
    ("a.txt", "", "is empty: a data file wants at least one row"),
    ("a.txt", " \n\n", "is empty"),
    ("a.jsonl", "\n\n", "is empty"),
    ("a.csv", "text\n", "is empty"),
    ("a.json", ONE, "wants the ending .txt, .jsonl, .csv, got {file}: did you mean .jsonl?"),
    ("a.parquet", ONE, "wants the ending .txt, .jsonl, .csv, got {file}"),
    ("a.txt", b"good\nbad \xff\n", "line 2 of {file} is not UTF-8"),
    ("a.jsonl", ONE.encode() + b'{"text": "\xc3("}\n', "line 2 of {file} is not UTF-8"),
    ("a.jsonl", ONE + "{'text': 'a'}\n", "line 2 of {file} is no JSON"),
    ("a.jsonl", ONE + '\n{"text": "a"', "line 3 of {file} is no JSON"),
    ("a.jsonl", "[" * 10_000, "line 1 of {file} is nested too deeply"),
    ("a.jsonl", ONE + '["a"]', "line 2 of {file} wants a JSON object, got a list, ['a']"),
    ("a.jsonl", ONE + "null", "line 2 of {file} wants a JSON object, got null"),
    ("a.jsonl", '{"text": "a", "text": "b"}', "line 1 of {file}: the key 'text' stands twice"),
    ("a.jsonl", ONE + '{"text": null}', "line 2 of {file}: text wants a string, got null"),
    ("a.jsonl", ONE + '{"text": 3.5}', "line 2 of {file}: text wants a string, got the number 3.5"),
    ("a.jsonl", '{"text": "a", "label": 1.0}', "line 1 of {file}: label wants a string or a whole number, got the"),
    ("a.jsonl", '{"text": "a", "label": true}', "label wants a string or a whole number, got true"),
    ("a.jsonl", '{"text": "a", "label": ""}', "label wants the name of a class, got an empty string"),
    ("a.jsonl", '{"prompt": "a", "response": ["b"]}', "response wants a string, got a list"),
    ("a.jsonl", r'{"text": "a\ud800"}', "text wants characters of Unicode, got half of one at position 1"),
    ("a.jsonl", ONE + '{"text": "a", "label": 1}',
     "line 2 of {file}: wanted the columns of line 1, text, got text and label"),
    ("a.jsonl", ONE + "{}", "line 2 of {file}: a row wants text, text and label, prompt and response, source"),
    ("a.jsonl", '{"response": "a"}', "source and target, or messages, got response"),
    ("a.jsonl", '{"prompt": "a", "text": "b"}', "messages, got text and prompt"),
    ("a.jsonl", '{"prompt": "a", "completion": "b"}', "got the column 'completion': did you mean 'response'?"),
    ("a.jsonl", '{"txet": "a"}', "got the column 'txet': did you mean 'text'?"),
    ("a.jsonl", '{"text": "a", "labels": 1}', "got the column 'labels': did you mean 'label'?"),
    ("a.csv", "a,b\n1,2\n", "line 1 of {file}: a row wants text"),
    ("a.csv", "text,text\n1,2\n", "line 1 of {file}: the column 'text' stands twice"),
    ("a.csv", "text,label\n\na,b\nc\n", "line 4 of {file} wants 2 cells, got 1"),
    ("a.csv", 'text\n"a\nb\n', "line 2 of {file} is no CSV"),
    ("a.csv", "messages\n[\n", "line 2 of {file}: messages is no JSON"),
    ("a.jsonl", '{"messages": {}}', "messages wants a list of objects with role and content, got an object"),
    ("a.jsonl", '{"messages": []}', "line 1 of {file}: a chat wants a user turn, got none"),
    ("a.jsonl", [{"messages": [USER]}, {"messages": [SYSTEM, ASSISTANT]}],
     "line 2 of {file}: a chat wants a user turn, got none"),
    ("a.jsonl", [{"messages": [ASSISTANT, USER]}], "a chat wants a user turn before the first assistant turn"),
    ("a.jsonl", [{"messages": [USER, SYSTEM]}], "a chat wants its system message at the start, got one later"),
    ("a.jsonl", [{"messages": ["hello"]}], "message 1 wants an object with role and content, got a string, 'hello'"),
    ("a.jsonl", [{"messages": [USER, {"role": "assistant"}]}], "message 2 wants a string content, got only role"),
    ("a.jsonl", [{"messages": [{"role": "user", "content": None}]}], "message 1 wants a string content, got null"),
    ("a.jsonl", [{"messages": [USER, {"role": "asistant", "content": "a"}]}],
     "message 2 wants a role of system, user, assistant, got 'asistant': did you mean 'assistant'?"),
]  # fmt: skip


@pytest.mark.parametrize("name, content, words", BAD, ids=range(len(BAD)))
def test_a_bad_file_is_one_sentence_that_names_the_line(name, content, words, tmp_path):
    file = write(tmp_path, name, content)
    with pytest.raises(ValueError) as error:
        read_rows(file)
    assert words.format(file=file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system with named pipes")
def test_only_ordinary_files_are_opened(tmp_path):
    """A pipe would wait for ever, a device has no end."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "folder.txt", "zero.txt"):
        with pytest.raises(FileNotFoundError, match=f"{name} is no ordinary file"):
            read_rows(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="cannot be read"):
        read_rows(tmp_path / ("x" * 300 + ".txt"))


def test_a_missing_file_names_the_near_one(tmp_path):
    write(tmp_path, "train.jsonl", ONE)
    with pytest.raises(FileNotFoundError) as error:
        read_rows(tmp_path / "trian.jsonl")
    assert str(error.value) == f"{tmp_path} has no trian.jsonl: did you mean {tmp_path / 'train.jsonl'}?"


def test_a_long_cell_is_read_and_the_limit_of_csv_stays(tmp_path):
    limit = csv.field_size_limit()
    read = read_rows(write(tmp_path, "a.csv", "text\n" + "x" * 2 * limit + "\n"))
    assert len(read.rows[0][0]) == 2 * limit and csv.field_size_limit() == limit


# ---------------------------------------------------------------------------------------------------- rows as batches
PAIRS = [
    [("Return the sum of", False), (" two numbers", True)],
    [("Open", False), (" a file and read every line of it", True)],
    [("A longer prompt of several words:", False), (" x", True), ("\nMore:", False), (" y", True)],
]


def words_tokenizer(*special: str) -> Tokenizer:
    """A tokenizer of words, without a token for padding."""
    vocab = {word: i for i, word in enumerate(["?", "a", "b", "c", "d", *special])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def model_of(tokenizer: Tokenizer) -> ft.GPT:
    sizes = {"vocab": tokenizer.get_vocab_size(), "positions": 64, "width": 16, "layers": 1, "heads": 2}
    return ft.GPT(ft.GPTConfig(**sizes), seed=1)


def mean_loss_of_responses(model: ft.GPT, tokenizer: Tokenizer, rows: list) -> float:
    """The definition: −log p(token | all tokens before it), the mean over the tokens of responses, row by row."""
    total = 0.0
    count = 0
    for segments in rows:
        ids, learned = [], []
        for text, is_learned in segments:
            new = tokenizer.encode(text, add_special_tokens=False).ids
            ids += new
            learned += [is_learned] * len(new)
        ids.append(end_of_text(tokenizer))
        learned.append(True)
        logits = array.asnumpy(model(np.array([ids])).data)[0].astype(np.float64)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        for t in range(1, len(ids)):
            if learned[t]:
                total -= np.log(p[t - 1, ids[t]])
                count += 1
    return total / count


def unshifted(batch: dict) -> dict:
    return batch | {"labels": np.where(batch["labels"] == IGNORE, IGNORE, batch["ids"])}


def with_prompts(batch: dict) -> dict:
    labels = np.full_like(batch["ids"], IGNORE)
    labels[:, :-1] = np.where(batch["mask"][:, 1:], batch["ids"][:, 1:], IGNORE)
    return batch | {"labels": np.where(batch["labels"] == IGNORE, labels, batch["labels"])}


def without_the_first_token(batch: dict) -> dict:
    labels = batch["labels"].copy()
    for row in labels:
        row[np.flatnonzero(row != IGNORE)[0]] = IGNORE
    return batch | {"labels": labels}


def without_a_mask(batch: dict) -> dict:
    return batch | {"mask": np.ones_like(batch["mask"]), "labels": np.where(batch["mask"], batch["labels"], 0)}


def loss_of(model: ft.GPT, batch: dict) -> float:
    return float(compute_loss(model, read_batch(batch))[1].data)


def test_the_loss_is_that_of_the_responses_alone():
    """On a shuffled batch with padding, and not for wrong labels."""
    tokenizer = data.shipped_tokenizer()
    model = model_of(tokenizer)
    batches, cut = segment_batches(PAIRS, tokenizer, 3, 40)
    batch = next(batches)
    assert cut == 0 and not batch["mask"].all()
    wanted = mean_loss_of_responses(model, tokenizer, PAIRS)
    assert loss_of(model, batch) == pytest.approx(wanted, rel=1e-5)
    for wrong in (unshifted, with_prompts, without_the_first_token, without_a_mask):
        assert abs(loss_of(model, wrong(batch)) - wanted) > 1e-3, wrong.__name__


def test_logits_are_computed_where_a_label_is_wanted_and_nowhere_else():
    tokenizer = data.shipped_tokenizer()
    batch = next(segment_batches(PAIRS, tokenizer, 3, 40)[0])
    targets = read_batch(batch)
    ctx, _ = compute_loss(model_of(tokenizer), targets)
    count = int((batch["labels"] != IGNORE).sum())
    assert ctx.output.shape[0] == len(targets.labels) == count < batch["mask"].sum()


def test_a_long_prompt_is_cut_on_the_left_and_a_response_never():
    tokenizer = words_tokenizer("<|endoftext|>")
    rows = [[("a b c", False), ("d a", True)], [("a", False), ("b", True)]]
    batches, cut = segment_batches(rows, tokenizer, 2, 3)
    batch = next(batches.once())
    assert cut == 1
    assert batch["ids"][0].tolist() == [3, 4, 1] and batch["labels"][0].tolist() == [4, 1, 5]
    with pytest.raises(ValueError, match="row 0: the response and what follows it have 3 tokens, at most 2 fit"):
        segment_batches(rows, tokenizer, 2, 2)
    with pytest.raises(ValueError, match="row 0: its prompt is cut to fit into 3 tokens, and so is every other prompt"):
        segment_batches(rows[:1], tokenizer, 2, 3)


def test_a_tokenizer_without_padding_and_without_an_end_pads_all_the_same():
    """Padding is masked: any id serves. A model gives the same loss for each of them."""
    tokenizer = words_tokenizer()
    rows = [[("a b", False), ("c d", True)], [("a", False), ("b", True)]]
    batch = next(segment_batches(rows, tokenizer, 2, 8)[0])
    assert (batch["ids"][~batch["mask"]] == 0).all() and not batch["mask"].all()
    model = model_of(tokenizer)
    other = batch | {"ids": np.where(batch["mask"], batch["ids"], 3)}
    assert loss_of(model, batch) == pytest.approx(loss_of(model, other), rel=1e-6)
    assert next(document_batches(["a b c", "d"  " a"], tokenizer, 2, 8))["mask"].sum() == 5


@pytest.mark.parametrize("segments, words", [
    ([], "got none"),
    ([("a b", False)], "got none"),
    ([("", False), ("", True)], "got none"),
    ([("", False), ("a", True)], "got none"),
])
def test_a_row_without_anything_to_learn_is_refused(segments, words):
    with pytest.raises(ValueError, match=words):
        encode_segments(words_tokenizer(), segments)


def test_a_row_that_begins_with_a_response_gets_a_token_to_follow():
    row = encode_segments(words_tokenizer("<|endoftext|>"), [("", False), ("a", True)])
    assert row.ids.tolist() == [5, 1, 5] and row.learned.tolist() == [False, True, True]
    ended = encode_segments(words_tokenizer("<|endoftext|>"), [("b", False), ("a <|endoftext|>", True)])
    assert ended.ids.tolist() == [2, 1, 5], "no second end of text"


def test_long_documents_become_windows_and_short_ones_are_padded():
    tokenizer = words_tokenizer("<|endoftext|>")
    batches = document_batches(["a b c d a", "b c"], tokenizer, 8, 4)
    batch = next(batches.once())
    assert [row[mask].tolist() for row, mask in zip(batch["ids"], batch["mask"])] == [[1, 2, 3, 4], [1, 5], [2, 3, 5]]
    alone = document_batches(["a b c d a"], tokenizer, 8, 4)
    assert next(alone.once())["ids"].tolist() == [[1, 2, 3, 4]], "a single text is a whole file: no end follows"
    with pytest.raises(ValueError, match="row 1: a text wants at least two tokens, got 0"):
        document_batches(["a b", " "], tokenizer, 8, 4)


def test_the_streams_can_be_resumed():
    tokenizer = data.shipped_tokenizer()
    makers = [
        lambda: segment_batches(PAIRS * 5, tokenizer, 2, 40)[0],
        lambda: document_batches([text for row in PAIRS for text, _ in row], tokenizer, 2, 8),
    ]
    for make in makers:
        first = make()
        for _ in range(5):
            next(first)
        state = json.loads(json.dumps(first.state_dict()))
        second = make()
        second.load_state_dict(state)
        for _ in range(9):
            ours, theirs = next(first), next(second)
            assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
        other = segment_batches(PAIRS[::-1] * 5, tokenizer, 2, 40)[0]
        with pytest.raises(ValueError):
            other.load_state_dict(state)

"""The text, the tasks and the batches: properties that can fail, each shown to catch a planted wrong answer."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from helpers import host_only

from tinyft import data, pretrain
from tinyft.data import IGNORE, SPECIAL, SPLITS, Batches, Record
from tinyft.data.text import CLS, END, PAD, SEP
from tinyft.identity import describe

pytestmark = host_only

VOCAB = 2048


@pytest.fixture(scope="module")
def tokenizer():
    return data.shipped_tokenizer()


# ---------------------------------------------------------------------------------------------------- the snapshot


def leaks(records) -> list[str]:
    """The faults of a split: modules in two splits, test modules, and held-out texts that occur in a training text."""
    split_of = {}
    found = []
    for record in records:
        if split_of.setdefault(record.module, record.split) != record.split:
            found.append(f"{record.module} is in {record.split} and {split_of[record.module]}")
        if re.search(r"(^|\.)_?(tests?|idle_test|test_\w*|\w+_tests?)(\.|$)", record.module):
            found.append(f"{record.module} is a test module")
    documentation = [record for record in records if record.kind != "source"]
    training = "\n".join(data.key(record.text) for record in documentation if record.split == "train")
    held_out = [record for record in documentation if record.split != "train"]
    leaked = [record for record in held_out if data.key(record.text) in training]
    return found + [f"text of {record.module}: {record.text}" for record in leaked]


def test_nothing_of_test_or_valid_is_in_training():
    assert leaks(data.snapshot()) == []


@pytest.mark.parametrize(
    "planted",
    [
        lambda r: Record(r.module, r.kind, "train", "Another text of the same module, and an innocent one."),
        lambda r: Record("email.other", "docstring", "train", f"A longer text. {r.text.upper()} It goes on."),
        lambda r: Record("email.other", "prose", "train", r.text.replace(" ", "\n  ")),
        lambda r: Record("ctypes.test.test_arrays", "docstring", "train", "A text of a test module, in no split."),
        lambda r: Record("idlelib.idle_test.mock_tk", "docstring", "valid", "A text of a test module, in no split."),
    ],
)
def test_a_leak_is_found(planted):
    # two packages only, for speed
    records = [record for record in data.snapshot() if record.module.startswith(("email", "json"))]
    assert leaks(records) == []
    victim = next(record for record in records if record.split == "test" and record.kind == "docstring")
    assert len(leaks([*records, planted(victim)])) == 1


def repeated(records) -> list[str]:
    """Paragraphs of prose and docstrings, and whole sources, that occur more than once (case and space ignored)."""
    counts = Counter()
    for record in records:
        parts = [record.text] if record.kind == "source" else record.text.split("\n\n")
        counts.update(map(data.key, parts))
    return [part for part, count in counts.items() if count > 1]


def test_no_paragraph_occurs_twice_in_the_snapshot():
    """A planted copy of a paragraph is found."""
    records = data.snapshot()
    assert repeated(records) == []
    planted = Record("email.other", "prose", "train", f"Something new.\n\n{records[0].text.upper()}")
    assert repeated([*records, planted]) != []


def test_the_snapshot_has_the_declared_kinds_splits_and_size():
    """Also: no doctests or tabs, mostly English words, and the licences of its sources."""
    records = data.snapshot()
    assert {record.kind for record in records} == {"prose", "docstring", "source"}
    assert {record.split for record in records} == set(SPLITS)
    assert (data.text.ASSETS / "text.json.xz").stat().st_size <= 3_000_000
    texts = [record.text for record in records if record.kind != "source"]
    assert not [text for text in texts if ">>>" in text or "\t" in text or len(text.split()) < 4]
    words = " ".join(texts).split()
    assert np.mean([bool(re.fullmatch(r"\W*[A-Za-z][A-Za-z'’/-]*\W*", word)) for word in words]) > 0.85
    licences = (data.text.ASSETS / "LICENSES.txt").read_text("utf-8")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in licences and "NumPy Developers" in licences


def test_pretraining_is_the_split_and_nothing_else(tokenizer):
    """Decoding the ids gives the texts of the split in order: byte-level BPE loses nothing."""
    tokens = data.pretraining("prose", "valid", tokenizer)
    texts = [r.text for r in data.snapshot() if r.split == "valid" and r.kind != "source"]
    ends = np.flatnonzero(tokens == SPECIAL["<|endoftext|>"])
    assert len(ends) == len(texts) and ends[-1] == len(tokens) - 1
    pieces = np.split(tokens, ends + 1)[:-1]
    assert tokenizer.decode_batch([piece[:-1].tolist() for piece in pieces]) == texts
    assert tokens.dtype == np.int64 and tokens.min() >= len(SPECIAL) - 1 and tokens.max() < VOCAB


def test_tokenizer(tokenizer):
    assert tokenizer.get_vocab_size() == VOCAB
    assert {name: tokenizer.token_to_id(name) for name in SPECIAL} == SPECIAL
    # the name of a special token inside a text gives ordinary tokens
    assert min(tokenizer.encode("[MASK] and <|endoftext|> in a text").ids) >= len(SPECIAL)
    ids = data.encode(tokenizer, "Return the length of the list.", 64)
    assert ids[0] == CLS and ids[-1] == SEP and tokenizer.decode(ids[1:-1]) == "Return the length of the list."
    assert data.encode(tokenizer, "one two three four", 4, "gpt")[-1] == END
    assert len(data.encode(tokenizer, "a b c d e f g", 5)) == 5


# ---------------------------------------------------------------------------------------------------- tasks


def bag(text: str) -> Counter:
    return Counter(re.findall(r"\w+", text.lower()))


def bags(texts: tuple[str, ...]) -> Counter:
    """The bags of words of texts, counted."""
    return Counter(frozenset(bag(text).items()) for text in texts)


def check_intact(sentence: str, shown: str, label: int) -> None:
    """Label 1: the sentence is unchanged. Label 0: two different words are swapped and nothing else."""
    if label == 1:
        assert shown == sentence
        return
    a, b = (re.findall(r"\w+(?:['-]\w+)*|[^\w\s]", text) for text in (sentence, shown))
    changed = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    assert len(changed) == 2 and bag(sentence) == bag(shown) and len(sentence) == len(shown)
    i, j = changed
    assert a[i] != a[j] and (a[i], a[j]) == (b[j], b[i])


def test_intact_swaps_two_words_and_nothing_else():
    rng = np.random.default_rng(0)
    for sentence, _ in data.tasks._labelled_by_split(data.tasks._intact_sentences)["valid"]:
        check_intact(sentence, data.swap_two(sentence, rng), 0)


@pytest.mark.parametrize("wrong", ["The cat sat on the mat.", "The mat on the sat cat.", "The cat on sat the mats."])
def test_a_wrong_swap_is_found(wrong):
    with pytest.raises((AssertionError, ValueError)):
        check_intact("The cat sat on the mat.", wrong, 0)


def test_intact_is_balanced_deterministic_and_uses_each_sentence_once():
    task = data.task("intact", 3, 1000)
    again = data.task("intact", 3, 1000)
    other = data.task("intact", 4, 1000)
    assert task.train.texts == again.train.texts and np.array_equal(task.train.labels, again.train.labels)
    assert task.train.texts != other.train.texts
    assert task.test.texts == other.test.texts and task.valid.texts == other.valid.texts  # paired over seeds
    for examples in (task.train, task.valid, task.test):
        assert abs(2 * examples.labels.sum() - len(examples.labels)) <= 1
    whole = data.task("intact")
    assert len(whole.train.texts) == len(set(whole.train.texts)) > 20_000
    pairs = data.tasks._labelled_by_split(data.tasks._intact_sentences)
    originals = [data.key(text) for split in SPLITS for text, _ in pairs[split]]
    assert len(originals) == len(set(originals)) == sum(len(getattr(whole, split).texts) for split in SPLITS)
    common = bags(whole.train.texts) & bags(whole.test.texts)  # sentences of the same words
    assert common.total() < 0.01 * len(whole.test.texts)


def test_intact_sentences_have_six_to_forty_words():
    for examples in (data.task("intact").test, data.task("intact").valid):
        assert all(6 <= len(text.split()) <= 40 for text in examples.texts)


@pytest.mark.parametrize("split", SPLITS)
def test_package_names_are_masked(split):
    task = data.task("package")
    assert unmasked(getattr(task, split), task.classes) == []


def unmasked(examples, classes) -> list[str]:
    """Texts that contain the name of their own package as a word or as a part of a dotted name, in any case."""
    own = [re.compile(rf"(?i)(?<![^\W_]){name}(?![^\W_])") for name in classes]
    return [text for text, label in zip(*examples, strict=True) if own[label].search(text)]


@pytest.mark.parametrize("text", ["Use email.message here.", "The EMAIL is sent.", "See _email_policy.", "(email)"])
def test_an_unmasked_name_is_found(text):
    examples = data.Examples((text,), np.array([data.PACKAGES.index("email")]))
    assert unmasked(examples, data.PACKAGES) == [text]
    assert unmasked(data.Examples((data.mask_names(text),), examples.labels), data.PACKAGES) == []


def test_masking_leaves_other_words_alone():
    text = "XMLParser, BaseHTTPServer, json.loads, http://a, https, recurses, concurrently"
    assert data.mask_names(text) == "_Parser, Base_Server, _.loads, _://a, https, recurses, concurrently"


def test_package_classes():
    from tinyft.assets import make

    assert tuple(make.CLASSES) == data.PACKAGES
    assert all(len(counts) == 4 and min(counts) >= 5 for counts in make.CLASSES.values())
    task = data.task("package")
    for examples in (task.train, task.valid, task.test):
        assert set(examples.labels.tolist()) == set(range(len(task.classes)))  # every class everywhere
    texts = [data.key(text) for split in SPLITS for text in getattr(task, split).texts]
    assert len(texts) == len(set(texts))


def test_classes_have_five_modules_in_the_python_that_runs_this():
    """The recorded counts of modules agree with the standard library of this Python."""
    import os
    import sys
    from pathlib import Path

    from tinyft.assets import make

    version = sys.version_info[:2]
    if not (3, 10) <= version <= (3, 13) or not (Path(os.__file__).parent / "idlelib").exists():
        pytest.skip(f"the counts are of complete Pythons 3.10 to 3.13; this is {version}")
    counts = {package: len(make.modules(Path(os.__file__).parent, package)) for package in make.CLASSES}
    present = {package: count for package, count in counts.items() if count}  # some systems leave tkinter out
    assert present == {package: make.CLASSES[package][version[1] - 10] for package in present}


def test_domain(tokenizer):
    task = data.task("domain", seed=1, train_size=5000, tokenizer=tokenizer)
    assert task.kind == "lm" and len(task.train) == 5000
    assert "def " in tokenizer.decode(task.test[:2000].tolist())
    assert np.array_equal(task.kept, data.pretraining("prose", "test", tokenizer))
    whole = data.pretraining("source", "train", tokenizer)
    starts = np.flatnonzero(whole[:-5000] == task.train[0])
    assert any(np.array_equal(whole[start : start + 5000], task.train) for start in starts)  # consecutive tokens


REAL = np.ones((1, 3), bool)
UNEQUAL = data.Examples(("a",), np.array([0, 1]))
SHIPPED = data.shipped_tokenizer()


def texts(examples, batch_size=1, max_len=8, tokenizer=SHIPPED, **options):
    return data.text_batches(examples, tokenizer, batch_size, max_len, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.task("nonsense"), "one of 'intact', 'package', 'domain', 'names', got 'nonsense'"),
        (lambda: data.task(["intact"]), r"got \['intact'\]"),
        (lambda: data.task("intact", seed="1"), "seed wants a whole number >= 0, got '1'"),
        (lambda: data.task("intact", seed=-1), "seed wants a whole number >= 0, got -1"),
        (lambda: data.task("intact", train_size=0), "train_size wants a whole number >= 1, got 0"),
        (lambda: data.task("intact", train_size=2.5), "train_size wants a whole number >= 1, got 2.5"),
        (lambda: data.task("package", train_size=10**6), "got 1000000"),
        (lambda: data.task("domain", tokenizer="base-gpt"), "tokenizers.Tokenizer .*got 'base-gpt'"),
        (lambda: data.pretraining("poetry"), "kind"),
        (lambda: data.pretraining("prose", "dev"), "split"),
        (lambda: data.pretraining(tokenizer=3), "tokenizers.Tokenizer"),
        (lambda: data.key(3), "a string"),
        (lambda: data.sentences(None), "a string"),
        (lambda: data.mask_names(b"email"), "a string"),
        (lambda: data.swap_two(3, np.random.default_rng(0)), "a string"),
        (lambda: data.swap_two("The cat sat on a mat.", 0), "a random generator"),
        (lambda: data.windows(np.arange(5), 6), "5"),
        (lambda: data.windows(np.arange(5), 0), "T wants a whole number >= 1, got 0"),
        (lambda: data.windows(np.arange(6).reshape(2, 3), 2), r"shape \(2, 3\)"),
        (lambda: data.encode(SHIPPED, "a", 2), "max_len of at least 3"),
        (lambda: data.encode(SHIPPED, "a", "8"), "max_len wants a whole number, got '8'"),
        (lambda: data.encode(SHIPPED, None, 8), "a string, got None"),
        (lambda: data.encode(SHIPPED, "a", 8, "t5"), "form wants one of 'bert', 'gpt', got 't5'"),
        (lambda: data.encode(None, "a", 8), "tokenizers.Tokenizer .*got None"),
        (lambda: data.encode(SHIPPED, "\ud800", 8), "a text that the tokenizer can encode"),
        (lambda: Batches([], 2), "empty"),
        (lambda: Batches([1], 0), "batch_size wants a whole number >= 1, got 0"),
        (lambda: Batches([1], 2.5), "batch_size wants a whole number >= 1, got 2.5"),
        (lambda: Batches([1], batch_size=True), "batch_size .* got True"),
        (lambda: Batches([1], 1, seed="a"), "seed"),
        (lambda: Batches([1], 1, seed=-1), "seed"),
        (lambda: Batches([1], 1, shuffle="no"), "shuffle wants True or False, got 'no'"),
        (lambda: Batches([1], 1, drop_last=None), "drop_last"),
        (lambda: Batches([1], 1, collate=3), "collate"),
        (lambda: Batches((i for i in range(3)), 1), "a sequence"),
        (lambda: Batches("text", 1), "a sequence"),
        (lambda: Batches({"ids": [1]}, 1), "a sequence"),
        (lambda: Batches([1], 2, drop_last=True), "one full batch"),
        (lambda: Batches([1], 1, lengths=[1, 2]), "one length per example, got 2"),
        (lambda: Batches([1], 1, lengths=3), "lengths"),
        (lambda: Batches([1], 1, lengths=["a"]), "lengths"),
        (lambda: next(Batches([[1, 2], [3]], 2)), "token ids of one length"),
        (lambda: next(Batches(["a", "b"], 2)), "token ids of one length, got '[ab]', '[ab]'"),
        (lambda: Batches([1], 1).load_state_dict(None), "the dict of state_dict"),
        (lambda: data.lm_batches("hello", 4, 2), "the ids of a text.* got the text itself, 'hello'"),
        (lambda: data.lm_batches(["hello", "you"], 1, 2), "whole numbers"),
        (lambda: data.lm_batches(np.arange(9.0), 4, 2), "whole numbers"),
        (lambda: data.lm_batches([[1, 2], [3]], 1, 2), "lists of one length"),
        (lambda: data.lm_batches([1, -2, 3], 1, 2), "at least 0; got -2"),
        (lambda: data.lm_batches(None, 4, 2), "got None"),
        (lambda: data.lm_batches([], 4, 2), "at least 4 tokens for T=4, got 0"),
        (lambda: data.lm_batches(np.arange(3), 4, 2), "at least 4 tokens for T=4, got 3"),
        (lambda: data.lm_batches(np.arange(9), 2.5, 2), "T wants a whole number >= 1, got 2.5"),
        (lambda: data.lm_batches(np.arange(9), 4, 0), "batch_size"),
        (lambda: data.mlm_batches(np.arange(99), 2, 4, VOCAB), "T wants a whole number >= 3, got 2"),
        (lambda: data.mlm_batches("hello", 8, 4), "the text itself"),
        (lambda: data.mlm_batches(np.arange(99), 8, 4, p=2), "p wants a finite number"),
        (lambda: data.mlm_batches(np.arange(99), 8, 4, p="all"), "p wants a finite number"),
        (lambda: data.mlm_batches(np.arange(99), 8, 4, 500), "tokenizer of these tokens"),
        (lambda: data.mlm_batches(np.full(99, VOCAB), 8, 4), "below the vocab of 2048, got the id 2048"),
        (lambda: data.pad([[]]), "at least one row with a token"),
        (lambda: data.pad(3), "a sequence"),
        (lambda: data.pad([["a"]]), "whole numbers"),
        (lambda: data.pad([[1.5]]), "whole numbers"),
        (lambda: data.pad([[7]], multiple=0), "multiple"),
        (lambda: data.pad([[7]], 2.5), "max_len"),
        (lambda: data.pad([[7]], pad_id=None), "pad_id"),
        (lambda: data.pad([[7] * 9], 8), "at most 8 tokens, got one of 9"),
        (lambda: data.mlm(np.full((1, 3), CLS), REAL, np.random.default_rng(0), VOCAB), "nothing to predict"),
        (lambda: data.mlm(np.full((1, 3), 9), REAL, np.random.default_rng(0), VOCAB, p=0.0), "p wants a finite"),
        (lambda: data.mlm(np.full((1, 3), 9), REAL, np.random.default_rng(0), 6), "not special, got 6"),
        (lambda: data.mlm(np.full((1, 3), 9), REAL, np.random.default_rng(0), 9, {"[CLS]": 1}), r"one of \[MASK\]"),
        (lambda: data.mlm(np.full((1, 3), 0.5), REAL, np.random.default_rng(0), 9), "float64 ids"),
        (lambda: data.mlm(np.full((1, 3), 9), REAL, 0, 9), "a random generator"),
        (lambda: data.mlm(np.full((2, 3), 9), REAL, np.random.default_rng(0), 9), "a mask of their shape"),
        (lambda: texts(UNEQUAL), "one label per text"),
        (lambda: texts((["a", "b"], [0])), "one label per text, got 2 texts and 1 labels"),
        (lambda: texts([]), "at least one example"),
        (lambda: texts("hello"), "a pair .*; got 'hello'"),
        (lambda: texts(["a", "b", "c"]), r"a pair \(texts, labels\)"),
        (lambda: texts(("hello", [0])), r"a pair .*; got \('hello', \[0\]\)"),
        (lambda: texts(["a", "b"]), r"a pair .*; got \['a', 'b'\]"),
        (lambda: texts((None, [0])), "texts wants a sequence"),
        (lambda: texts((["a"], None)), "labels wants a sequence"),
        (lambda: texts((["a"], ["positive"])), "a label, the number of a class, wants a whole number, got 'positive'"),
        (lambda: texts((["a"], [0.0])), "a label, the number of a class, wants a whole number, got 0.0"),
        (lambda: texts([("a", 1.5)]), "a label, the number of a class, wants a whole number, got 1.5"),
        (lambda: texts([("a", "good")]), "number of its class"),
        (lambda: texts([("a", "good"), ("b", "bad")]), "the number of a class, wants a whole number"),
        (lambda: texts([("a", 10**40)]), r"a class \(0, 1, ...\)"),
        (lambda: texts([("a", -1)]), r"a class \(0, 1, ...\) or -100 for none, got -1"),
        (lambda: texts(([None], [0])), "a string, got None"),
        (lambda: texts([("a", 0)], batch_size=0), "batch_size"),
        (lambda: texts([("a", 0)], max_len=None), "max_len wants a whole number, got None"),
        (lambda: texts([("a", 0)], form="bart"), "form"),
        (lambda: texts([("a", 0)], tokenizer="base-bert"), "tokenizers.Tokenizer"),
        (lambda: texts([("a", 0)], group_by_length=1), "group_by_length wants True or False, got 1"),
    ],
)
def test_bad_input_gets_one_clear_sentence(call, message):
    """Of this library, never of NumPy or Python: one sentence, short, with the wanted and the given value."""
    with pytest.raises((ValueError, TypeError), match=message) as error:
        call()
    assert re.fullmatch(r"[^\n]* wants [^\n]*\bgot\b[^\n]*", str(error.value))
    assert len(str(error.value)) < 300


def test_one_training_example():
    """train_size=1 gives one example, and one token; no size gives all."""
    for name in ("intact", "package"):
        task = data.task(name, seed=2, train_size=1)
        assert len(task.train.texts) == len(task.train.labels) == 1
        assert len(task.test.texts) > 100
    assert data.stretch(TOKENS, seed=2, size=1).shape == (1,)      # the training text of "domain"


def test_writing_to_a_task_does_not_change_the_next_one():
    first = data.task("intact", train_size=3)
    kept = first.test.labels.copy()
    first.test.labels[:] = 7
    assert np.array_equal(data.task("intact", train_size=3).test.labels, kept)


# ---------------------------------------------------------------------------------------------------- batches


def numbers(count: int, **options) -> Batches:
    def collate(chosen, rng):
        return {"ids": np.array(chosen), "noise": rng.random(2)}

    return Batches(np.arange(count), collate=collate, **options)


def epochs_are_whole(epoch, count: int) -> bool:
    """True if each of three epochs, the ids that `epoch()` returns, holds every example exactly once."""
    return all(sorted(epoch()) == list(range(count)) for _ in range(3))


@pytest.mark.parametrize(("count", "size"), [(1, 1), (7, 3), (12, 4), (5, 9)])
def test_every_epoch_visits_everything_once(count, size):
    batches = numbers(count, batch_size=size, seed=count)

    def epoch() -> list[int]:
        return np.concatenate([batch["ids"] for batch in itertools.islice(batches, len(batches))]).tolist()

    assert epochs_are_whole(epoch, count)


def test_drawing_with_replacement_is_found():
    rng = np.random.default_rng(0)
    assert not epochs_are_whole(lambda: rng.integers(12, size=12).tolist(), 12)


def test_shuffle_and_drop_last():
    batches = numbers(10, batch_size=4, seed=1, drop_last=True)
    epochs = [np.concatenate(epoch) for epoch in next_epochs(batches, 3)]
    assert len(batches) == 2 and all(len(set(epoch)) == 8 for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    plain = numbers(10, batch_size=4, shuffle=False)
    assert [batch["ids"].tolist() for batch in itertools.islice(plain, 3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    one, two = (next(numbers(99, batch_size=99, seed=seed))["ids"] for seed in (1, 2))
    assert not np.array_equal(one, two)


def next_epochs(batches: Batches, n: int) -> list[list[np.ndarray]]:
    """The ids of every batch of the next n epochs."""
    epochs = []
    for _ in range(n):
        epochs.append([next(batches)["ids"] for _ in range(len(batches))])
    return epochs


def groups_by_length(batches: Batches, lengths: np.ndarray) -> bool:
    """True if batches hold examples of similar length, and the order is still random.

    Whole epochs; little padding; short and long batches mixed; examples change companions between epochs.
    """
    epochs = next_epochs(batches, 3)
    whole = all(sorted(np.concatenate(epoch)) == list(range(len(lengths))) for epoch in epochs)
    padding = np.mean([lengths[ids].max() - lengths[ids].mean() for ids in epochs[0]])
    longest = [lengths[ids].max() for ids in epochs[0]]
    correlation = np.corrcoef(longest[:-1], longest[1:])[0, 1]
    first = {tuple(sorted(ids)) for ids in epochs[0]}
    second = {tuple(sorted(ids)) for ids in epochs[1]}
    return whole and padding < 3 and abs(correlation) < 0.3 and len(first & second) < 3


LENGTHS = np.random.default_rng(3).integers(1, 64, 1003)


def test_batches_of_like_length():
    assert groups_by_length(numbers(1003, batch_size=8, lengths=LENGTHS, seed=4), LENGTHS)
    last = list(itertools.islice(numbers(1003, batch_size=8, lengths=LENGTHS), 126))[-1]
    assert len(last["ids"]) == 3


def sorted_once(self: Batches) -> np.ndarray:
    return np.argsort(self.lengths, kind="stable")


def fixed_batches(self: Batches) -> np.ndarray:
    order = np.argsort(self.lengths, kind="stable")
    batches = np.random.default_rng(self.epoch).permutation(order[:1000].reshape(-1, 8))
    return np.concatenate([batches.reshape(-1), order[1000:]])


def not_grouped(self: Batches) -> np.ndarray:
    return np.random.default_rng(self.epoch).permutation(len(self.examples))


def pools_in_order(self: Batches) -> np.ndarray:
    order = np.random.default_rng(self.epoch).permutation(1003)
    return np.concatenate([part[np.argsort(self.lengths[part])] for part in np.array_split(order, 8)])


@pytest.mark.parametrize("wrong", [sorted_once, fixed_batches, not_grouped, pools_in_order])
def test_a_wrong_order_by_length_is_found(wrong):
    class Wrong(Batches):
        _epoch_order = wrong

    batches = Wrong(np.arange(1003), 8, collate=lambda chosen, rng: {"ids": np.array(chosen)}, lengths=LENGTHS)
    assert not groups_by_length(batches, LENGTHS)


def test_once_is_everything_in_order_and_moves_nothing():
    batches = numbers(10, batch_size=4, seed=5, drop_last=True)
    next(batches)
    before = batches.state_dict()
    passes = [list(batches.once()) for _ in range(2)]
    assert batches.state_dict() == before
    assert np.concatenate([batch["ids"] for batch in passes[0]]).tolist() == list(range(10))
    assert all(np.array_equal(a["noise"], b["noise"]) for a, b in zip(*passes, strict=True))


def same(a: dict, b: dict) -> bool:
    if a.keys() != b.keys():
        return False
    return all(np.array_equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def resumes(make) -> bool:
    """True if, from every point of two epochs, a new stream that loads the state continues as the first."""
    first = make()
    states = []
    given = []
    for _ in range(2 * len(first) + 2):
        states.append(json.dumps(first.state_dict()))
        given.append(next(first))
    for point in range(len(given)):
        fresh = make()
        fresh.load_state_dict(json.loads(states[point]))
        if not all(same(next(fresh), batch) for batch in given[point:]):
            return False
    return True


def stages() -> pretrain.Stages:
    """Three batches of one length, then batches of another."""
    sources = [data.lm_batches(TOKENS, 16, 4, seed=2), data.mlm_batches(TOKENS, 32, 2, seed=3)]
    return pretrain.Stages(sources, [3, 3])


def test_stages_resume_and_refuse_a_state_of_other_sources():
    """From every point, also in the second source; after a refusal nothing has moved."""
    first = stages()
    for _ in range(8):
        state = json.loads(json.dumps(first.state_dict()))
        again = stages()
        again.load_state_dict(state)
        assert same(next(again), next(first))
    other = pretrain.Stages([data.lm_batches(TOKENS, 16, 4), data.lm_batches(TOKENS, 32, 2)], [3, 3])
    before = other.state_dict()
    for wrong in (state, {**state, "sources": state["sources"][:1]}, {**before, "given": 2.5}):
        with pytest.raises((TypeError, ValueError), match=" wants .* got "):
            other.load_state_dict(wrong)
        assert other.state_dict() == before


TOKENS = np.random.default_rng(0).integers(6, VOCAB, 300)
STREAMS = {
    "plain": lambda: numbers(7, batch_size=3, seed=1),
    "drop_last": lambda: numbers(7, batch_size=3, seed=1, drop_last=True),
    "ordered": lambda: numbers(7, batch_size=3, shuffle=False),
    "by length": lambda: numbers(107, batch_size=3, lengths=np.arange(107) % 13, seed=1),
    "lm": lambda: data.lm_batches(TOKENS, 16, 4, seed=2),
    "mlm": lambda: data.mlm_batches(TOKENS, 16, 4, VOCAB, seed=2),
}


@pytest.mark.parametrize("name", STREAMS)
def test_resume_is_bitwise_from_any_point(name):
    assert resumes(STREAMS[name])


def test_noise_that_is_not_in_the_state_is_found():
    def forgetful():
        rng = np.random.default_rng(0)
        return Batches(np.arange(7), 3, collate=lambda chosen, _: {"ids": np.array(chosen), "noise": rng.random(2)})

    class Unmoved(Batches):
        def load_state_dict(self, state):
            super().load_state_dict({**state, "batch": 0})

    def unmoved():
        return Unmoved(np.arange(7), 3, collate=lambda chosen, _: {"ids": np.array(chosen)})

    assert not resumes(forgetful)
    assert not resumes(unmoved)


def test_the_epoch_of_the_state():
    """It is 0 until the last batch of the first epoch was given, and 1 from the first batch of the second on."""
    batches = numbers(7, batch_size=3)
    for count in (1, 2, 3):
        next(batches)
        state = batches.state_dict()
        assert (state["epoch"], state["batch"]) == (0, count)
    next(batches)
    state = batches.state_dict()
    assert (state["epoch"], state["batch"]) == (1, 1)


@pytest.mark.parametrize("change", [
    {"examples": 8}, {"batch_size": 2}, {"shuffle": False}, {"epoch": None}, {"batch": True},
])
def test_a_state_of_other_batches_is_refused(change):
    batches = numbers(7, batch_size=3)
    before = batches.state_dict()
    with pytest.raises(ValueError, match=next(iter(change))):
        batches.load_state_dict({**before, **change})
    assert batches.state_dict() == before


LABELLED = [("one text", 0), ("two", 1), ("a third", 1)]
TWO_LABELS = [("one text", 1), ("two", 1), ("a third", 1)]
TWO_TEXTS = [("one texts", 0), ("two", 1), ("a third", 1)]
SAME_COUNT = {
    "arrays": (lambda: Batches(np.arange(12).reshape(3, 4), 2), lambda: Batches(np.arange(1, 13).reshape(3, 4), 2)),
    "lists": (lambda: Batches([[1, 2], [3, 4]], 2), lambda: Batches([[1, 2], [4, 3]], 2)),
    "tokens": (lambda: data.lm_batches(np.arange(90), 9, 2), lambda: data.lm_batches(np.arange(90)[::-1], 9, 2)),
    "labels": (lambda: texts(LABELLED), lambda: texts(TWO_LABELS)),
    "texts": (lambda: texts(LABELLED), lambda: texts(TWO_TEXTS)),
    "form": (lambda: texts(LABELLED), lambda: texts(LABELLED, form="gpt")),
    "corruption": (lambda: data.mlm_batches(TOKENS, 9, 2), lambda: data.mlm_batches(TOKENS, 9, 2, p=0.2)),
}


@pytest.mark.parametrize("name", SAME_COUNT)
def test_a_state_of_other_examples_of_the_same_number_is_refused(name):
    """A state without a fingerprint, as older versions wrote it, is taken."""
    make, make_other = SAME_COUNT[name]
    batches = make()
    next(batches)
    state = json.loads(json.dumps(batches.state_dict()))
    other = make_other()
    before = other.state_dict()
    with pytest.raises(ValueError, match="wants a state with the examples of this stream, got one of other examples"):
        other.load_state_dict(state)
    assert other.state_dict() == before
    make().load_state_dict(state)
    del state["content"]
    other.load_state_dict(state)
    assert other.state_dict() == {**before, "batch": 1}


def test_examples_are_read_once_for_their_fingerprint(monkeypatch):
    """Not when the stream is made and not at every state; examples of the user's own class are not read."""
    calls = []
    right = data.batches.fingerprint

    def counted(content):
        calls.append(content)
        return right(content)

    monkeypatch.setattr(data.batches, "fingerprint", counted)
    batches = numbers(7, batch_size=3)
    next(batches)
    assert calls == []
    assert batches.state_dict()["content"] == batches.state_dict()["content"]
    assert len(calls) == 1

    class Lazy:
        def __len__(self):
            return 7

        def __getitem__(self, i):
            return np.array([i])

    assert "content" not in Batches(Lazy(), 2).state_dict()
    assert "content" not in Batches([object(), object()], 2, collate=lambda chosen, rng: {}).state_dict()
    assert len(calls) == 2


@dataclasses.dataclass(frozen=True)
class Padded:
    """A collate; `side` is a field that its class got later."""

    width: int = 3
    side: str = "right"

    def __call__(self, chosen: list, rng: Any) -> dict:
        return {"ids": np.array(chosen)[:, None]}


def test_a_field_with_its_default_value_does_not_change_the_fingerprint(monkeypatch):
    """A position from before the class had the field, or from a version that counted all fields, is gone to."""
    older = dataclasses.make_dataclass("Padded", [("width", int, 3)], namespace={"__call__": Padded.__call__})
    older.__module__, older.__qualname__ = Padded.__module__, Padded.__qualname__

    def stream(collate: Any) -> Batches:
        return Batches(np.arange(7), 3, collate=collate)
    for width in (3, 4):
        old, new = stream(older(width)).state_dict(), stream(Padded(width)).state_dict()
        assert old == new
        with monkeypatch.context() as m:
            m.setattr("tinyft.data.batches.describe_changed", describe)
            counted = stream(Padded(width)).state_dict()
        assert counted != new
        stream(Padded(width)).load_state_dict(counted)
        for other in (Padded(width, "left"), Padded(5)):
            for state in (new, counted):
                with pytest.raises(ValueError, match="got one of other examples"):
                    stream(other).load_state_dict(state)


def test_text_batches_from_plain_lists():
    """Lists, tuples and arrays of texts and labels, and pairs, give the batches of Examples."""
    words = ["one text", "two", "a third"]
    forms = [
        data.Examples(tuple(words), np.array([0, 1, 1])), (words, [0, 1, 1]), (tuple(words), np.array([0, 1, 1], "u1")),
        [words, [False, True, True]], (np.array(words), (0, 1, 1)), LABELLED, tuple(LABELLED),
    ]
    wanted = list(texts(forms[0], 2).once())
    for form in forms[1:]:
        assert all(same(a, b) for a, b in zip(wanted, texts(form, 2).once(), strict=True))
    two = list(texts((["a", "b"], [0, 1]), 2).once())
    assert two[0]["labels"].tolist() == [0, 1]
    assert next(texts([("a", -100)]))["labels"].tolist() == [-100]


def test_padding_and_mask_agree(tokenizer):
    task = data.task("package", train_size=40)
    for form, last in (("bert", SEP), ("gpt", END)):
        batches = data.text_batches(task.train, tokenizer, 8, max_len=44, form=form)
        count = 0
        for batch in batches.once():
            ids, mask, labels = batch["ids"], batch["mask"], batch["labels"]
            assert ids.shape == mask.shape and ids.dtype == labels.dtype == np.int64 and mask.dtype == bool
            assert ids.shape[1] <= 44 and (ids.shape[1] % 8 == 0 or ids.shape[1] == 44)
            assert np.array_equal(mask, ids != PAD)
            assert (np.diff(mask.astype(int), axis=1) <= 0).all()  # padding on the right
            assert (ids[np.arange(len(ids)), mask.sum(1) - 1] == last).all()
            assert np.array_equal(labels, task.train.labels[count : count + len(ids)])
            for row, text in zip(ids, task.train.texts[count : count + len(ids)], strict=True):
                assert row[row != PAD].tolist() == data.encode(tokenizer, text, 44, form)
            count += len(ids)
        assert count == 40


def test_windows():
    assert np.array_equal(data.windows(np.arange(11), 4), [[0, 1, 2, 3], [4, 5, 6, 7]])
    batch = next(data.lm_batches(np.arange(100), 8, 3, shuffle=False))
    assert np.array_equal(batch["ids"], np.arange(24).reshape(3, 8)) and batch["mask"].all() and "labels" not in batch


# ---------------------------------------------------------------------------------------------------- masked LM


def check_mlm(corrupt) -> None:
    """corrupt(ids, mask, rng) keeps BERT's proportions, labels only chosen tokens, changes no special token."""
    rng = np.random.default_rng(1)
    ids = rng.integers(6, VOCAB, (400, 128))
    ids[:, 0], ids[:, -9], ids[:, -8:] = CLS, SEP, PAD
    mask = ids != PAD
    original = ids.copy()
    corrupted, labels = corrupt(ids, mask, rng)
    chosen, free = labels != IGNORE, mask & (ids > 5)
    assert np.array_equal(ids, original) and not (chosen & ~free).any()
    assert np.array_equal(labels[chosen], ids[chosen]) and np.array_equal(corrupted[~chosen], ids[~chosen])
    masked = corrupted[chosen] == SPECIAL["[MASK]"]
    kept = corrupted[chosen] == ids[chosen]
    other = corrupted[chosen][~masked & ~kept]
    shares = np.array([chosen.sum() / free.sum(), masked.mean(), kept.mean(), len(other) / chosen.sum()])
    count = chosen.sum()  # about 7,000
    wanted = np.array([0.15, 0.8, 0.1, 0.1])
    deviation = np.sqrt(wanted * (1 - wanted) / np.array([free.sum(), count, count, count]))
    assert (np.abs(shares - wanted) < 5 * deviation).all()
    assert other.min() > 5 and other.max() < VOCAB and len(set(other)) > 200


def test_mlm_proportions():
    check_mlm(lambda ids, mask, rng: data.mlm(ids, mask, rng, VOCAB, SPECIAL))


def always_masks(ids, mask, rng):
    corrupted, labels = data.mlm(ids, mask, rng, VOCAB)
    return np.where(labels != IGNORE, SPECIAL["[MASK]"], ids), labels


def labels_everything(ids, mask, rng):
    corrupted, labels = data.mlm(ids, mask, rng, VOCAB)
    return corrupted, np.where(mask, ids, IGNORE)


def masks_specials(ids, mask, rng):
    return data.mlm(ids, mask, rng, VOCAB, {"[MASK]": 4})


def masks_padding(ids, mask, rng):
    return data.mlm(ids, np.ones_like(mask), rng, VOCAB, {"[MASK]": 4, "[CLS]": 2, "[SEP]": 3})


def too_many(ids, mask, rng):
    return data.mlm(ids, mask, rng, VOCAB, p=0.2)


def in_place(ids, mask, rng):
    ids[:], labels = data.mlm(ids, mask, rng, VOCAB)
    return ids, labels


@pytest.mark.parametrize("wrong", [always_masks, labels_everything, masks_specials, masks_padding, too_many, in_place])
def test_wrong_mlm_is_found(wrong):
    with pytest.raises(AssertionError):
        check_mlm(wrong)


def test_mlm_always_predicts_something():
    for seed in range(20):
        ids = np.array([[CLS, 9, SEP, PAD]])
        _, labels = data.mlm(ids, ids != PAD, np.random.default_rng(seed), VOCAB, p=1e-9)
        assert labels.tolist() == [[IGNORE, 9, IGNORE, IGNORE]]


def test_mlm_batches_change_their_noise_from_epoch_to_epoch():
    batches = data.mlm_batches(TOKENS, 16, 100, VOCAB, shuffle=False)
    first, second = next(batches), next(batches)
    assert (first["ids"][:, 0] == CLS).all() and (first["ids"][:, -1] == SEP).all()
    assert not np.array_equal(first["labels"], second["labels"])
    rows = np.where(first["labels"] != IGNORE, first["labels"], first["ids"])
    assert np.array_equal(rows[:, 1:-1], data.windows(TOKENS, 14))  # the labels restore the text

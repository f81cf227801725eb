"""The task *names*: its pairs, scores and baselines."""

from __future__ import annotations

import ast
import json
from collections import Counter

import numpy as np
import pytest
from helpers import host_only
from hypothesis import given
from hypothesis import strategies as st

from tinyft import data
from tinyft.assets import make, names
from tinyft.data import SPLITS, NamePair, Pairs
from tinyft.data.name_baselines import CopyWords, NearestSummary, simple_names, summary_words
from tinyft.data.names import read_name
from tinyft.data.scores import bootstrap_interval, exact_match, name_words, token_f1, wilson_interval

pytestmark = host_only

# ---------------------------------------------------------------------------------------------------- the pairs


def leaks(pairs, records) -> list[str]:
    """The faults of the splits: modules, and summaries of valid or test that training has seen."""
    split_of = {record.module: record.split for record in records}
    found = [f"{pair.module} is {pair.split}" for pair in pairs if split_of.get(pair.module) != pair.split]
    found += [f"{pair.module} is a test module" for pair in pairs if make.is_test(pair.module)]
    counts = Counter(names.words(pair.summary) for pair in pairs)
    found += [f"{words} occurs {count} times" for words, count in counts.items() if count > 1]
    training = " ".join(f" {names.words(record.text)} |" for record in records if record.split == "train")
    for pair in pairs:
        if pair.split != "train" and f" {names.words(pair.summary)} " in training:
            found.append(f"{pair.summary} is in the training text")
    return found


def test_nothing_of_a_test_module_is_in_training_or_in_pretraining():
    assert leaks(data.name_pairs(), data.snapshot()) == []


@pytest.mark.parametrize("plant", [
    lambda pair: pair._replace(split="train", summary="A summary that is in no other pair."),
    lambda pair: pair._replace(module="email.test.test_email", summary="A summary that is in no other pair."),
    lambda pair: pair._replace(summary=pair.summary.upper() + "!"),
    lambda pair: NamePair("email.message", "train", pair.summary.lower(), "another_name"),
])
def test_a_planted_pair_is_found(plant):
    pairs = [pair for pair in data.name_pairs() if pair.module.startswith(("email", "json"))]
    records = [record for record in data.snapshot() if record.module.startswith(("email", "json"))]
    assert leaks(pairs, records) == []
    victim = next(pair for pair in pairs if pair.split == "test")
    assert leaks([*pairs, plant(victim)], records)


def test_a_summary_in_the_training_text_is_found():
    pairs = [pair for pair in data.name_pairs() if pair.module.startswith(("email", "json"))]
    records = [record for record in data.snapshot() if record.module.startswith(("email", "json"))]
    victim = next(pair for pair in pairs if pair.split == "test")
    leaked = data.Record("email.message", "docstring", "train", f"A text. {victim.summary}\n\nIt goes on.")
    assert len(leaks(pairs, [*records, leaked])) == 1


def test_there_are_enough_pairs_of_the_declared_form():
    counts = Counter(pair.split for pair in data.name_pairs())
    assert counts["train"] > 3_300 and counts["test"] > 400 and counts["valid"] > 250
    assert names.FILE.stat().st_size <= names.LIMIT
    assert all(names.fits(pair.name, pair.summary) for pair in data.name_pairs())
    assert list(data.name_pairs()) == sorted(data.name_pairs(), key=lambda pair: SPLITS.index(pair.split))


@pytest.mark.parametrize("name, summary", [
    ("getLines", "Return all lines of a file."),
    ("__init__", "Make a file of these lines."),
    ("_lines", "Return all lines of a file."),
    ("on", "Return all lines of a file."),
    ("test_lines", "Return all lines of a file."),
    ("get_lines", "Return lines"),
    ("get_lines", "return all lines of a file."),
    ("get_lines", "Call get_lines of the file."),
    ("lines", "Return lines(n) of a file."),
    ("get_lines", "Get lines -> a list of lines"),
    ("get_lines", "A word " * 13),
])
def test_other_names_and_summaries_are_left_out(name, summary):
    assert names.fits("get_lines", "Return all lines of a file.")
    assert names.fits("lines", "Return all lines of a file.")
    assert not names.fits(name, summary)


def test_the_summary_is_the_first_sentence():
    """Of a function, a method and a coroutine; not of a class, and not of a function without a docstring."""
    source = '''
class Lines:
    """All lines of one file."""
    def read_all(self):
        """Return all ``lines`` of
        the :class:`~io.File`.  They stand in a list.

        A second paragraph."""
    def add(self, line): pass
async def wait_for(seconds):
    "Wait, e.g. for a file? Then go on."
'''
    found = names.functions(ast.parse(source))
    assert sorted(found) == [
        ("Return all `lines` of the `io.File`.", "read_all"), ("Wait, e.g. for a file?", "wait_for"),
    ]


def test_an_earlier_module_keeps_a_summary_and_training_keeps_it_first():
    """Also: a held-out summary that occurs in a training text is left out, wherever it stands there."""
    of_module = {
        "a": [("Return the first line.", "first")],
        "b": [("Return the first  LINE!", "head"), ("Read a line.", "line")],
        "c": [("Read a line.", "read"), ("Return the last line.", "last")], "d": [("Close the file now.", "close")],
    }
    records = [
        ["b", "prose", "train", "Then return the last line. And so on."], ["a", "prose", "test", "A text."],
        ["c", "prose", "valid", "A text."],
    ]
    assert names.pairs(of_module, records) == [
        ["b", "train", "Return the first  LINE!", "head"], ["b", "train", "Read a line.", "line"],
    ]


def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, monkeypatch):
    read = data.name_pairs.__wrapped__
    monkeypatch.setattr(data.names, "ASSETS", tmp_path)
    with pytest.raises(ValueError, match="name_pairs wants the file .* got no readable one"):
        read()
    for content in (b"", b"no xz", _packed([]), _packed({"pairs": [["a", "train", "b"]]}),
                    _packed({"pairs": [["a", "train", "b", 3]]}), _packed({"pairs": [["a", "dev", "b", "c"]]})):
        (tmp_path / "names.json.xz").write_bytes(content)
        with pytest.raises(ValueError, match="name_pairs wants the file"):
            read()


def _packed(value) -> bytes:
    return names.lzma.compress(json.dumps(value).encode())


def test_the_task():
    """The seed chooses and orders training pairs only; no pair changes its partner."""
    task = data.task("names", seed=1, train_size=500)
    again = data.task("names", seed=1, train_size=500)
    other = data.task("names", seed=2, train_size=500)
    assert task.train == again.train != other.train
    assert task.test == other.test and task.valid == other.valid
    assert task.kind == "pairs" and task.metric == "token_f1" and len(task.train.prompts) == 500
    of_split = {split: set() for split in SPLITS}
    for pair in data.name_pairs():
        of_split[pair.split].add((pair.summary, pair.name))
    whole = data.task("names")
    for split in SPLITS:
        assert set(zip(*getattr(whole, split), strict=True)) == of_split[split]
    assert set(zip(*task.train, strict=True)) < of_split["train"]
    module_of = {pair.summary: pair.module for pair in data.name_pairs()}
    first = [module_of[summary] for summary in whole.test.prompts[:50]]
    assert len(set(first)) > 20 and first != sorted(first)  # random order


# ---------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("answer, name", [
    ("write_snapshot", "write_snapshot"),
    ("  Write_Snapshot\n", "write_snapshot"),
    ("```python\ndef write_snapshot(file):\n    pass\n```", "write_snapshot"),
    ("The name of the function is `write_snapshot()`.", "write_snapshot"),
    ('"dump" is a good name.', "dump"),
    ("You can call write_snapshot(file) here.", "write_snapshot"),
    ("The function write_snapshot does it.", "write_snapshot"),
    ("python", "python"),
    ("", ""),
    ("123 ...", ""),
])
def test_the_name_in_an_answer(answer, name):
    assert read_name(answer) == name


# ---------------------------------------------------------------------------------------------------- scores

WORD = st.sampled_from(["get", "set", "is", "file", "line"])
NAME = st.lists(WORD, max_size=5).map("_".join)


def f1_by_hand(name: str, other: str) -> float:
    """2 P R / (P + R), where a word of one name is paired with one equal word of the other."""
    left = [word for word in name.split("_") if word]
    words = [word for word in other.split("_") if word]
    count = len(words)
    common = 0
    for word in left:
        if word in words:
            words.remove(word)
            common += 1
    if not common:
        return 0.0
    precision, recall = common / count, common / len(left)
    return 2 * precision * recall / (precision + recall)


@given(NAME, NAME)
def test_token_f1(name, other):
    assert token_f1([name], [other])[0] == pytest.approx(f1_by_hand(name, other))
    assert token_f1([name], [other]) == token_f1([other], [name])
    assert exact_match([name], [other])[0] == (name == other)
    assert name_words(name.replace("_", " ")) == name_words(name)
    assert name_words(f"_{name}__") == [word for word in name.split("_") if word]


def of_sets(name: str, other: str) -> float:
    a, b = set(name.split("_")), set(other.split("_"))
    return 2 * len(a & b) / (len(a) + len(b))


def recall_only(name: str, other: str) -> float:
    common = (Counter(name.split("_")) & Counter(other.split("_"))).total()
    return common / len(name.split("_"))


def in_place(name: str, other: str) -> float:
    a, b = name.split("_"), other.split("_")
    return 2 * sum(x == y for x, y in zip(a, b)) / (len(a) + len(b))


@pytest.mark.parametrize("wrong", [of_sets, recall_only, in_place])
def test_a_wrong_f1_is_found(wrong):
    examples = [("get_file", "file_get"), ("get_get_file", "get_file"), ("get_file", "get_file_line")]
    assert any(wrong(*pair) != pytest.approx(f1_by_hand(*pair)) for pair in examples)


def bounds_are_wilsons(interval) -> bool:
    """True if both bounds x solve (p − x)² = z² x (1 − x) / n, and stand on both sides of p."""
    for n in (1, 7, 150):
        for successes in {0, 1, n // 3, n}:
            p = successes / n
            low, high = interval(successes, n)
            if not 0 <= low <= p <= high <= 1 or low == high:
                return False
            for x in (low, high):
                if abs((p - x) ** 2 - 1.96**2 * x * (1 - x) / n) > 1e-9:
                    return False
    return True


def wald(successes: int, n: int) -> tuple[float, float]:
    p = successes / n
    half = 1.96 * (p * (1 - p) / n) ** 0.5
    return p - half, p + half


def without_shift(successes: int, n: int) -> tuple[float, float]:
    low, high = wilson_interval(successes, n)
    half = (high - low) / 2
    return max(successes / n - half, 0), min(successes / n + half, 1)


def test_wilson_interval():
    assert bounds_are_wilsons(wilson_interval)
    assert not bounds_are_wilsons(wald) and not bounds_are_wilsons(without_shift)
    assert wilson_interval(0, 150) == pytest.approx((0, 0.02497), abs=1e-4)


def test_the_bootstrap_interval_covers_the_mean_in_95_percent_of_samples():
    """Half the level, or the spread of single values in place of the mean, does not."""
    rng = np.random.default_rng(0)
    covered = {"ours": 0, "half": 0, "of values": 0}
    for trial in range(400):
        values = rng.beta(0.5, 1.5, size=60)
        low, high = bootstrap_interval(values, draws=200, seed=trial)
        centre, half = (low + high) / 2, (high - low) / 4
        covered["ours"] += low <= 0.25 <= high
        covered["half"] += abs(0.25 - centre) <= half
        low, high = np.percentile(values, [2.5, 97.5])
        covered["of values"] += low <= 0.25 <= high
    assert 0.91 <= covered["ours"] / 400 <= 0.98
    assert covered["half"] / 400 < 0.85 and covered["of values"] / 400 > 0.99
    assert bootstrap_interval([0.5]) == (0.5, 0.5)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3) != bootstrap_interval(values)


@pytest.mark.parametrize("call, message", [
    (lambda: read_name(3), "a string, got 3"),
    (lambda: token_f1(["a"], []), "as many predictions as names and at least one, got 0 and 1"),
    (lambda: token_f1([], []), "at least one"),
    (lambda: exact_match("ab", ["a", "b"]), "a list of names"),
    (lambda: exact_match(["a"], [None]), "a string"),
    (lambda: name_words(None), "a string"),
    (lambda: wilson_interval(3, 2), "successes"),
    (lambda: wilson_interval(0, 0), "n wants"),
    (lambda: wilson_interval(1, 2, z=0), "z wants"),
    (lambda: bootstrap_interval([]), "at least one"),
    (lambda: bootstrap_interval([float("nan")]), "finite"),
    (lambda: bootstrap_interval([1.0], draws=0), "draws"),
    (lambda: CopyWords(0), "count"),
    (lambda: CopyWords(2, -1), "least"),
    (lambda: CopyWords(2).fit("ab"), "wants pairs, .summaries, names., got 'ab'"),
    (lambda: NearestSummary().fit((["a b"], ["a", "b"])), "one name for each summary, got 1 and 2"),
    (lambda: CopyWords(2).fit(TRAIN).predict("a summary"), "a sequence"),
])
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


# ---------------------------------------------------------------------------------------------------- baselines

TRAIN = Pairs(
    ("Return the lines of a file.", "Return the words of a text.", "Close the file.", "Open the file.", "Read a line."),
    ("get_lines", "get_words", "close", "open", "read_line"),
)


def test_copied_words_are_words_of_the_summary_in_its_order():
    copied = CopyWords(2).fit(TRAIN).predict(["Close the lines.", "...", "Quite unknown things"])
    assert copied == ["close_lines", "", "quite_unknown"]
    assert CopyWords(1).fit(TRAIN).predict(["The lines of a file."]) == ["lines"]
    assert CopyWords(4, least=0.99).fit(TRAIN).predict(["Close the lines."]) == ["close"]
    test = data.task("names").test
    for summary, name in zip(test.prompts[:50], CopyWords(3).fit(data.task("names").train).predict(test.prompts[:50])):
        words = summary_words(summary)
        positions = [words.index(word) for word in name_words(name)]
        assert positions == sorted(positions) and len(positions) <= 3


def test_the_nearest_summary_gives_its_name():
    nearest = NearestSummary().fit(TRAIN)
    assert nearest.predict(["Close a file.", "The words of the text"]) == ["close", "get_words"]
    assert nearest.predict(TRAIN.prompts) == list(TRAIN.responses)


def test_the_simple_models_on_the_test_split():
    """Copying words reaches a token F1 of about 0.2. A model must beat it, and a name at random is far below."""
    task = data.task("names")
    predicted = simple_names(task.train, task.valid, task.test.prompts)
    f1 = {name: token_f1(task.test.responses, answers).mean() for name, answers in predicted.items()}
    assert 0.20 < f1["copy words"] < 0.25 and 0.18 < f1["copy one word"] < 0.25 and 0.1 < f1["nearest summary"] < 0.2
    shifted = predicted["copy words"][1:] + predicted["copy words"][:1]
    assert token_f1(task.test.responses, shifted).mean() < 0.05

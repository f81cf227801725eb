"""Four real tasks on the shipped text: task("intact"), task("package"), task("domain"), task("names").

The splits are by module: no text of a test module is in training.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .. import checks
from ..keywords import checked_keywords
from ..tokens import plain
from .batches import CHOOSE, FIXED, SWAP, Examples, check_tokens, generator, windows
from .names import NamePair, Pairs, name_pairs
from .text import SPLITS, Record, key, pretraining, snapshot

# The classes of *package*: standard packages with at least five modules in each of Python 3.10-3.13.
# assets/make.py records the counts.
PACKAGES = (
    "asyncio", "concurrent", "ctypes", "curses", "email", "encodings", "http", "idlelib", "importlib", "json",
    "multiprocessing", "tkinter", "turtledemo", "unittest", "urllib", "wsgiref", "xml",
)  # fmt: skip


@checked_keywords
@dataclass(frozen=True)
class Task:
    """A task with its splits.

    kind "classify": splits are Examples. "lm": token arrays, (N,) int64. "pairs": Pairs of prompts and responses.
    """

    name: str
    kind: str  # "classify" | "lm" | "pairs"
    classes: tuple[str, ...]  # names of the labels; () for "lm" and "pairs"
    train: Any
    valid: Any
    test: Any
    metric: str  # "accuracy" | "macro_f1" | "perplexity" | "token_f1"
    kept: Any = None  # "lm": held-out prose (M,), on which forgetting is measured


@checked_keywords
def task(name: str, seed: int = 0, train_size: int | None = None, tokenizer: Tokenizer | None = None) -> Task:
    """One of the real tasks, split by module.

    intact    is a sentence of the documentation intact (1), or were two of its words swapped (0)?
              Balanced. A bag of words cannot tell the classes apart.
    package   which package of the standard library does a docstring come from? 17 classes, imbalanced.
              The names of all classes are masked as "_".
    domain    language modelling of Python source, after pretraining on prose; `kept` is held-out prose.
    names     the first sentence of a docstring -> the name of its function, such as get_archive_files

    seed        chooses, orders and swaps training examples. valid and test are the same for every seed, so that
                results are paired, and their examples are in random order.
    train_size  number of training examples (tokens for "domain"); None takes all.
    tokenizer   for "domain" only; the shipped one by default. See `pretraining`

    ValueError for another name, a negative seed, or a train_size that is less than 1 or more than there is.
    """
    checks.one_of("task: name", name, ("intact", "package", "domain", "names"))
    seed = checks.whole("task: seed", seed, 0)
    if train_size is not None:
        train_size = checks.whole("task: train_size", train_size, 1)
    if tokenizer is not None:
        tokenizer = plain("task", tokenizer)
    if name == "intact":
        return _intact(seed, train_size)
    if name == "package":
        return _package(seed, train_size)
    if name == "names":
        return _names(seed, train_size)
    return _domain(seed, train_size, tokenizer)


def _choose(count: int, seed: int, size: int | None) -> np.ndarray:
    """Indices of `size` of `count` examples, in random order."""
    if size is not None:
        checks.whole("task: train_size", size, 1, count)
    return generator(seed, CHOOSE).permutation(count)[:size]


@functools.cache
def _labelled_by_split(label: Callable[[Record], list[tuple[str, int]]]) -> dict[str, list[tuple[str, int]]]:
    """{split: (text, label) pairs of all records}, in random order. label(record) gives the pairs of one record.

    A text that occurs several times is kept once, in the first split that contains it, training first. So no text is
    in two splits. `key` decides which texts count as the same: it ignores case and white space.
    """
    pairs = {split: [] for split in SPLITS}
    seen = set()
    for record in sorted(snapshot(), key=lambda r: SPLITS.index(r.split)):
        for text, number in label(record):
            if key(text) not in seen:
                seen.add(key(text))
                pairs[record.split].append((text, number))
    return {split: _shuffle(part) for split, part in pairs.items()}


def _shuffle(pairs: list) -> list:
    """The pairs in a random order, the same at each call."""
    order = generator(0, FIXED).permutation(len(pairs))
    return [pairs[i] for i in order]


# ---------------------------------------------------------------------------------------------------- intact
SENTENCE_END = re.compile(r"""(?<=[.!?])\s+(?=["'`*(]?[A-Z])""")
# opening marks, a lower-case word, closing marks
PLAIN = re.compile(r"""(["'`*(\[]*)([a-z]+(?:['-][a-z]+)*)(["'`*)\],;:.!?]*)$""")


@checked_keywords
def sentences(text: str) -> list[str]:
    """The full sentences of 6 to 40 words in a text, at least two thirds of them plain lower-case words.

    They are the examples of *intact*, in which two such words are swapped. A sentence does not go beyond its line.
    """
    checks.instance("sentences: text", text, str, "a string")
    found = []
    for line in text.split("\n"):
        for sentence in SENTENCE_END.split(line):
            words = sentence.split()
            if _is_full_sentence(words) and 3 * len(_swappable_positions(words)) >= 2 * len(words):
                found.append(" ".join(words))
    return found


def _is_full_sentence(words: Sequence[str]) -> bool:
    return 6 <= len(words) <= 40 and words[0][0].isupper() and words[-1][-1] in ".!?"


def _swappable_positions(words: Sequence[str]) -> list[int]:
    """Positions of the plain lower-case words after the first word. [] unless two of these words differ."""
    positions = [i for i, word in enumerate(words) if i > 0 and PLAIN.match(word)]
    different = {PLAIN.match(words[i])[2] for i in positions}
    return positions if len(different) > 1 else []


@checked_keywords
def swap_two(sentence: str, rng: np.random.Generator) -> str:
    """The sentence with two different plain words swapped, chosen at random. Punctuation and capitals do not move.

    Raises ValueError for a sentence without two different lower-case words.
    """
    checks.instance("swap_two: sentence", sentence, str, "a string")
    checks.random_generator("swap_two: rng", rng)
    words = sentence.split()
    positions = _swappable_positions(words)
    if not positions:
        raise ValueError(f"swap_two wants a sentence with two different lower-case words, got {sentence!r}")
    i = positions[rng.integers(len(positions))]
    open_i, word_i, close_i = PLAIN.match(words[i]).groups()
    # A match of PLAIN has three groups: opening marks, the word, closing marks.
    others = [j for j in positions if PLAIN.match(words[j])[2] != word_i]
    j = others[rng.integers(len(others))]
    open_j, word_j, close_j = PLAIN.match(words[j]).groups()
    words[i] = open_i + word_j + close_i
    words[j] = open_j + word_i + close_j
    return " ".join(words)


def _intact_sentences(record: Record) -> list[tuple[str, int]]:
    """(sentence, 1) for each sentence of a record; [] for source code."""
    if record.kind == "source":
        return []
    return [(sentence, 1) for sentence in sentences(record.text)]


def _swap_in_half(texts: Sequence[str], rng: np.random.Generator) -> Examples:
    """The texts with two words swapped in half of them, label 0; the other half is intact, label 1."""
    labels = rng.permutation(np.arange(len(texts)) % 2).astype(np.int64)
    examples = [text if label == 1 else swap_two(text, rng) for text, label in zip(texts, labels, strict=True)]
    return Examples(tuple(examples), labels)


def _intact(seed: int, size: int | None) -> Task:
    """The task *intact*: is a sentence intact (1), or were two of its words swapped (0)?

    The seed chooses and swaps training sentences only. size: their number; None takes all."""
    pool = [sentence for sentence, _ in _labelled_by_split(_intact_sentences)["train"]]
    chosen = [pool[i] for i in _choose(len(pool), seed, size)]
    train = _swap_in_half(chosen, generator(seed, SWAP))
    classes = ("swapped", "intact")
    # _held_out is cached: a caller that writes to the labels must not change the next caller's.
    valid, test = (Examples(e.texts, e.labels.copy()) for e in (_held_out("valid"), _held_out("test")))
    return Task("intact", "classify", classes, train, valid, test, metric="accuracy")


@functools.cache
def _held_out(split: str) -> Examples:
    """The valid or test split of *intact*, the same for every seed."""
    texts = [sentence for sentence, _ in _labelled_by_split(_intact_sentences)[split]]
    return _swap_in_half(texts, generator(0, FIXED, SPLITS.index(split)))


# ---------------------------------------------------------------------------------------------------- package
def _name_pattern(name: str) -> str:
    """A pattern for a package's name as a word or as a part of a dotted or compound name."""
    as_word = rf"(?<![a-z])(?i:{name})(?![a-z])"
    in_compound = rf"(?<=[a-z])(?:{name.upper()}|{name.title()})(?![a-z])"
    return f"{as_word}|{in_compound}"


NAMES = re.compile("|".join(_name_pattern(name) for name in PACKAGES))


@checked_keywords
def mask_names(text: str) -> str:
    """The text with "_" for every class name, also inside longer names: `asyncio.run` -> `_.run`, XMLParser -> _Parser.

    The names of all classes are masked: another package's name would tell which class the text does not have.
    """
    checks.instance("mask_names: text", text, str, "a string")
    return NAMES.sub("_", text)


def _masked_docstring(record: Record) -> list[tuple[str, int]]:
    """[(masked docstring, class)] of a docstring in one of PACKAGES; [] for other records and for short texts."""
    package = record.module.split(".")[0]
    if record.kind != "docstring" or package not in PACKAGES:
        return []
    text = mask_names(record.text)
    if len(text.split()) < 6:
        return []
    return [(text, PACKAGES.index(package))]


def _package(seed: int, size: int | None) -> Task:
    pool = _labelled_by_split(_masked_docstring)
    chosen = [pool["train"][i] for i in _choose(len(pool["train"]), seed, size)]
    train, valid, test = (_examples(pairs) for pairs in (chosen, pool["valid"], pool["test"]))
    return Task("package", "classify", PACKAGES, train, valid, test, metric="macro_f1")


def _examples(pairs: Sequence[tuple[str, int]]) -> Examples:
    texts = tuple(text for text, _ in pairs)
    labels = np.array([label for _, label in pairs], np.int64)
    return Examples(texts, labels)


# ---------------------------------------------------------------------------------------------------- names
def _names(seed: int, size: int | None) -> Task:
    """The task *names*. The seed chooses and orders training pairs only; valid and test are in a fixed random order."""
    pool = {split: [] for split in SPLITS}
    for pair in name_pairs():
        pool[pair.split].append(pair)
    train, valid, test = (_shuffle(pool[split]) for split in SPLITS)
    chosen = [train[i] for i in _choose(len(train), seed, size)]
    train, valid, test = (_pairs(part) for part in (chosen, valid, test))
    return Task("names", "pairs", (), train, valid, test, metric="token_f1")


def _pairs(pairs: Sequence[NamePair]) -> Pairs:
    return Pairs(tuple(pair.summary for pair in pairs), tuple(pair.name for pair in pairs))


# ---------------------------------------------------------------------------------------------------- domain
def _domain(seed: int, size: int | None, tokenizer: Tokenizer | None) -> Task:
    train, valid, test = (pretraining("source", split, tokenizer) for split in SPLITS)
    prose = pretraining("prose", "test", tokenizer)
    return Task("domain", "lm", (), stretch(train, seed, size), valid, test, metric="perplexity", kept=prose)


@checked_keywords
def stretch(tokens: np.ndarray, seed: int, size: int | None) -> np.ndarray:
    """`size` consecutive tokens of (N,) from a random start, wrapping around the end: the training text of *domain*.

    The seed chooses the start. All tokens, as they are, for None. ValueError for a size above N.
    """
    tokens = check_tokens("stretch", tokens)
    if size is None:
        return tokens
    start = _choose(len(tokens), seed, size)[0]
    return np.roll(tokens, -start)[:size]


# The protocol of every perplexity on *domain*. base-gpt has 128 positions, and a soft prompt of 16 rows takes some.
HELD_OUT_T = 112
HELD_OUT_WINDOWS = 128


@checked_keywords
def held_out_batches(
    tokens: np.ndarray, T: int = HELD_OUT_T, count: int = HELD_OUT_WINDOWS, batch_size: int = 16
) -> list[dict[str, np.ndarray]]:
    """Batches for measuring a perplexity: `count` windows of T tokens, at equal distances in a held-out split (N,).

    They stand for all modules of the split. With the defaults they are the protocol of *domain*: the table of
    `tinyft compare`, the README and the lessons give the perplexity on these windows.
    A split of fewer windows is taken whole. Each batch has ids (B, T) and a mask (B, T) that is all True.
    """
    checks.whole("held_out_batches: count", count, least=1)
    checks.whole("held_out_batches: batch_size", batch_size, least=1)
    rows = windows(tokens, T)
    count = min(count, len(rows))
    chosen = rows[np.arange(count) * len(rows) // count]
    batches = []
    for start in range(0, count, batch_size):
        ids = chosen[start : start + batch_size]
        batches.append({"ids": ids, "mask": np.ones(ids.shape, bool)})
    return batches

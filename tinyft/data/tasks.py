"""Real text, and three tasks on it.

    text      snapshot(), shipped_tokenizer(), pretraining(kind, split)    what ships with tinyft: Python's documentation and sources
    tasks     task("intact" | "package" | "domain")                        split by module; no text of a test module is in training
    batches   Batches, text_batches, lm_batches, mlm_batches               of batches.py, named here too: data.lm_batches(...)

Where the text comes from and how it was cleaned and split stands in `tinyft/assets/make.py`.
"""
from __future__ import annotations

import functools
import json
import lzma
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from .batches import CHOOSE, END, FIXED, SWAP, Examples, generator, one_of

ASSETS = Path(__file__).parent.parent / "assets"
SPLITS = ("train", "valid", "test")

# The classes of *package*: standard packages with at least five modules in each of Python 3.10-3.13. assets/make.py records the counts.
PACKAGES = ("asyncio", "concurrent", "ctypes", "curses", "email", "encodings", "http", "idlelib", "importlib", "json", "multiprocessing",
            "tkinter", "turtledemo", "unittest", "urllib", "wsgiref", "xml")  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- text
class Record(NamedTuple):
    """One text of the snapshot."""

    module: str                                                        # "email.message"; "reference.<topic>" for the language reference
    kind: str                                                          # "prose" | "docstring" | "source"
    split: str                                                         # "train" | "valid" | "test", the same for all of a module
    text: str


@functools.cache
def snapshot() -> tuple[Record, ...]:
    """Every text that ships with tinyft, in a fixed order (by kind, then module). Read once, then kept."""
    try:
        records = json.loads(lzma.decompress((ASSETS / "text.json.xz").read_bytes()))["records"]
    except (OSError, lzma.LZMAError, ValueError) as error:
        raise ValueError(f"wanted the text snapshot {ASSETS / 'text.json.xz'}, got no readable one: {error}") from error
    return tuple(Record(*record) for record in records)


def shipped_tokenizer() -> Tokenizer:
    """The shipped byte-level BPE of 2,048 entries, ids 0-5 as in SPECIAL. It adds no special tokens; `encode` does."""
    found = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
    found.encode_special_tokens = True                                                 # "[MASK]" written in a text is text
    return found


def pretraining(kind: str = "prose", split: str = "train", tokenizer: Tokenizer | None = None) -> np.ndarray:
    """All text of a kind ("prose": reference, comments, docstrings; "source": code) and split as ids, (N,) int64, <|endoftext|> after each."""
    one_of("kind", kind, ("prose", "source"))
    one_of("split", split, SPLITS)
    texts = [record.text for record in snapshot() if record.split == split and (record.kind == "source") == (kind == "source")]
    encoded = (tokenizer or shipped_tokenizer()).encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.array([*text.ids, END], np.int64) for text in encoded])


# -------------------------------------------------------------------------------------------------------------- tasks
@dataclass(frozen=True)
class Task:
    """A task with its splits. kind "classify": train, valid, test are Examples. kind "lm": they are token arrays, (N,) int64."""

    name: str
    kind: str                                                          # "classify" | "lm"
    classes: tuple[str, ...]                                           # names of the labels; () for "lm"
    train: Any
    valid: Any
    test: Any
    metric: str                                                        # "accuracy" | "macro_f1" | "perplexity"
    kept: Any = None                                                   # "lm": held-out prose (M,), on which forgetting is measured


def task(name: str, seed: int = 0, train_size: int | None = None, tokenizer: Tokenizer | None = None) -> Task:
    """One of the real tasks, split by module.

    intact    is a sentence of the documentation intact (1), or were two of its words swapped (0)?  Balanced; bags of words tell nothing.
    package   which package of the standard library a docstring comes from, all classes' names masked as "_".  17 classes, imbalanced.
    domain    language modelling of Python source, after pretraining on prose; `kept` is held-out prose.

    seed        chooses, orders and swaps training examples. valid and test are the same for all (results are paired) and well mixed.
    train_size  how many training examples (tokens for "domain"); None is all there are.
    tokenizer   for "domain" only; the shipped one unless given.
    """
    makers = {"intact": _intact, "package": _package, "domain": functools.partial(_domain, tokenizer=tokenizer)}
    one_of("task", name, tuple(makers))
    return makers[name](seed, train_size)


def _choose(count: int, seed: int, size: int | None) -> np.ndarray:
    """Indices of `size` of `count` examples in random order."""
    if size is not None and not 1 <= size <= count:
        raise ValueError(f"wanted a train_size from 1 to {count} (that many there are), got {size}")
    return generator(seed, CHOOSE).permutation(count)[:size]


def key(text: str) -> str:
    """A text without what does not make it different: case and white space."""
    return " ".join(text.lower().split())


SENTENCE_END = re.compile(r"""(?<=[.!?])\s+(?=["'`*(]?[A-Z])""")
PLAIN = re.compile(r"""(["'`*(\[]*)([a-z]+(?:['-][a-z]+)*)(["'`*)\],;:.!?]*)$""")      # opening marks, a lower-case word, closing marks


def sentences(text: str) -> list[str]:
    """The full sentences of 6 to 40 words in a text, at least two thirds of them plain lower-case words."""
    found = []
    for sentence in (part for line in text.split("\n") for part in SENTENCE_END.split(line)):
        words = sentence.split()
        if 6 <= len(words) <= 40 and words[0][0].isupper() and words[-1][-1] in ".!?" and 3 * len(_places(words)) >= 2 * len(words):
            found.append(" ".join(words))
    return found


def _places(words: Sequence[str]) -> list[int]:
    """Positions whose words may be swapped: plain lower-case ones; [] where they are all the same word."""
    places = [i for i, word in enumerate(words) if i > 0 and PLAIN.match(word)]
    return places if len({PLAIN.match(words[i])[2] for i in places}) > 1 else []


def swap_two(sentence: str, rng: np.random.Generator) -> str:
    """The sentence with two different plain words swapped, both chosen at random; punctuation and capitals stay where they are."""
    words = sentence.split()
    places = _places(words)
    if not places:
        raise ValueError(f"wanted a sentence with two different lower-case words, got {sentence!r}")
    i = places[rng.integers(len(places))]
    others = [j for j in places if PLAIN.match(words[j])[2] != PLAIN.match(words[i])[2]]
    j = others[rng.integers(len(others))]
    (open_i, word_i, close_i), (open_j, word_j, close_j) = PLAIN.match(words[i]).groups(), PLAIN.match(words[j]).groups()
    words[i], words[j] = open_i + word_j + close_i, open_j + word_i + close_j
    return " ".join(words)


@functools.cache
def _by_split(items: Callable[[Record], list[tuple[str, int]]]) -> dict[str, list[tuple[str, int]]]:
    """The (text, label) pairs of all records by split, each text once (in the first split that has it), well mixed."""
    found, seen = {split: [] for split in SPLITS}, set()
    for record in sorted(snapshot(), key=lambda record: SPLITS.index(record.split)):
        for text, label in items(record):
            if key(text) not in seen:
                seen.add(key(text))
                found[record.split].append((text, label))
    return {split: [pairs[i] for i in generator(0, FIXED).permutation(len(pairs))] for split, pairs in found.items()}


def _intact_sentences(record: Record) -> list[tuple[str, int]]:
    return [(sentence, 1) for sentence in sentences(record.text)] if record.kind != "source" else []


def _half_swapped(texts: Sequence[str], rng: np.random.Generator) -> Examples:
    labels = rng.permutation(np.arange(len(texts)) % 2).astype(np.int64)
    return Examples(tuple(text if label else swap_two(text, rng) for text, label in zip(texts, labels, strict=True)), labels)


def _intact(seed: int, size: int | None) -> Task:
    pool = [sentence for sentence, _ in _by_split(_intact_sentences)["train"]]
    train = _half_swapped([pool[i] for i in _choose(len(pool), seed, size)], generator(seed, SWAP))
    return Task("intact", "classify", ("swapped", "intact"), train, *_held_out_swaps(), metric="accuracy")


@functools.cache
def _held_out_swaps() -> tuple[Examples, ...]:
    "Valid and test, the same for every seed."
    pool = _by_split(_intact_sentences)
    return tuple(_half_swapped([sentence for sentence, _ in pool[split]], generator(0, FIXED, i)) for i, split in enumerate(SPLITS) if i)


NAMES = re.compile("|".join(rf"(?<![a-z])(?i:{name})(?![a-z])|(?<=[a-z])(?:{name.upper()}|{name.title()})(?![a-z])" for name in PACKAGES))


def mask_names(text: str) -> str:
    """The text with every class name as "_", also as part of a dotted or compound name: `asyncio.run` -> `_.run`, XMLParser -> _Parser.

    All classes' names, not only the own one: otherwise the name of another package would say which class it is not.
    """
    return NAMES.sub("_", text)


def _masked_docstring(record: Record) -> list[tuple[str, int]]:
    package = record.module.split(".")[0]
    if record.kind != "docstring" or package not in PACKAGES:
        return []
    text = mask_names(record.text)
    return [(text, PACKAGES.index(package))] if len(text.split()) >= 6 else []


def _package(seed: int, size: int | None) -> Task:
    pool = _by_split(_masked_docstring)
    chosen = [pool["train"][i] for i in _choose(len(pool["train"]), seed, size)]
    splits = (chosen, pool["valid"], pool["test"])
    made = [Examples(tuple(text for text, _ in pairs), np.array([label for _, label in pairs], np.int64)) for pairs in splits]
    return Task("package", "classify", PACKAGES, *made, metric="macro_f1")


def _domain(seed: int, size: int | None, tokenizer: Tokenizer | None) -> Task:
    train, valid, test = (pretraining("source", split, tokenizer) for split in SPLITS)
    if size is not None:
        start = _choose(len(train), seed, size)[0]
        train = np.roll(train, -start)[:size]                          # a stretch from a random start, around the end if need be
    return Task("domain", "lm", (), train, valid, test, metric="perplexity", kept=pretraining("prose", "test", tokenizer))

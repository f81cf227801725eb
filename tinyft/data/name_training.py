"""Further training pairs for the task *names*: a small model cannot learn to copy words from 3,423 real ones.

    prose_sentences("train")        sentences of the shipped prose, as short as summaries
    chosen_names(pairs, sentences)  (sentence, the name that WordChoice gives it)
    exchanged(pairs, words, seed)   real pairs whose copied words are replaced by others, in summary and name

    "Return the list of archive files."     get_archive_files
    "Return the list of socket weights."    get_socket_weights             exchanged
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .. import checks
from .baselines import check_texts
from .batches import generator
from .name_baselines import check_pairs
from .names import Pairs
from .scores import name_words
from .tasks import sentences
from .text import SPLITS, snapshot
from .word_choice import WordChoice

__all__ = ["chosen_names", "exchanged", "prose_sentences", "prose_words"]

PIECE = re.compile(r"[A-Za-z]+|[^A-Za-z]+")


def prose_sentences(split: str = "train", longest: int = 25) -> list[str]:
    """The full sentences of the shipped prose of a split, of at most `longest` words: each once, in a fixed order.

    Summaries have up to 25 words. `data.sentences` says what a full sentence is; ValueError for another split.
    """
    checks.one_of("prose_sentences: split", split, SPLITS)
    checks.whole("prose_sentences: longest", longest, 1)
    found = []
    for record in snapshot():
        if record.split == split and record.kind != "source":
            found += sentences(record.text)
    return [sentence for sentence in dict.fromkeys(found) if len(sentence.split()) <= longest]


def prose_words(texts: Sequence[str]) -> list[str]:
    """The different words of at least three letters of some texts, in lower case, sorted."""
    found: set[str] = set()
    for text in check_texts("prose_words", texts):
        found.update(re.findall(r"[a-z]{3,}", text.lower()))
    return sorted(found)


def chosen_names(pairs: Pairs, texts: Sequence[str]) -> Pairs:
    """The texts with the names that `WordChoice`, fitted on `pairs`, gives them. A text without words is left out.

    From these pairs a model learns which words of a text belong into a name, and to spell the words that it copies.
    """
    names = WordChoice().fit(pairs).predict(texts)
    kept = [(text, name) for text, name in zip(texts, names, strict=True) if name]
    return Pairs(tuple(text for text, _ in kept), tuple(name for _, name in kept))


def exchanged(pairs: Pairs, words: Sequence[str], seed: int = 0, share: float = 0.7) -> Pairs:
    """Copies of the pairs. Words that stand in both summary and name are replaced by random ones.

    words   to draw from, each with the same probability
    share   the probability that such a word is replaced; summary and name get the same new word

    A model cannot memorise the names of these pairs. ValueError for no words, and for a share outside 0 ... 1.
    """
    summaries, names = check_pairs("exchanged", pairs)
    words = check_texts("exchanged", words)
    checks.number("exchanged: share", share, 0, 1)
    rng = generator(seed, len(words))
    new = [_exchange(summary, name, words, share, rng) for summary, name in zip(summaries, names, strict=True)]
    return Pairs(tuple(summary for summary, _ in new), tuple(name for _, name in new))


def _exchange(summary: str, name: str, words: Sequence[str], share: float, rng: Any) -> tuple[str, str]:
    """One pair with its shared words replaced."""
    pieces = PIECE.findall(summary)
    present = {piece.lower() for piece in pieces}
    replacement: dict[str, str] = {}
    for word in dict.fromkeys(name_words(name)):
        if word in present and rng.random() < share:
            replacement[word] = words[rng.integers(len(words))]
    new_summary = "".join(_like(piece, replacement.get(piece.lower(), piece)) for piece in pieces)
    new_name = "_".join(replacement.get(word, word) for word in name_words(name))
    return new_summary, new_name


def _like(old: str, new: str) -> str:
    """`new`, with a capital if `old` begins with one. A word that was not replaced stays as it is, "HTTP" too."""
    return new.capitalize() if new != old and old[:1].isupper() else new

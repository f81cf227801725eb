"""Training pairs for the encoder-decoder of the task *names*: texts with the names that WordChoice gives them.

    prose_sentences("train")        sentences of the shipped prose, as short as summaries
    replaced(texts)                 the texts with some of their words replaced: as many texts as are wanted
    chosen_names(pairs, texts)      (text, the name that WordChoice gives it)

    "Return the list of archive files."     get_archive_files
    "Return the socket of archive pages."   get_archive_socket_pages       replaced

A network of 1.6 million parameters cannot learn from 3,423 pairs how to choose and copy words. WordChoice can, since it
has a few weights. It is the network's teacher, and gives names to any number of texts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import checks
from .baselines import check_texts
from .batches import generator
from .names import Pairs
from .tasks import sentences
from .text import SPLITS, snapshot
from .word_choice import WordChoice

__all__ = ["chosen_names", "prose_sentences", "replaced"]

WORD = re.compile(r"[a-z]{3,}")
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


def chosen_names(pairs: Pairs, texts: Sequence[str]) -> Pairs:
    """The texts with the names that `WordChoice`, fitted on `pairs`, gives them. A text without words is left out.

    From these pairs a model learns which words of a text belong into a name, and to spell the words that it copies.
    """
    names = WordChoice().fit(pairs).predict(texts)
    kept = [(text, name) for text, name in zip(texts, names, strict=True) if name]
    return Pairs(tuple(text for text, _ in kept), tuple(name for _, name in kept))


def replaced(texts: Sequence[str], share: float = 0.4, seed: int = 0, copy: int = 0) -> list[str]:
    """Copies of the texts, with some of their words replaced by words of the texts.

    share    the mean share of a text's words that are replaced. That of each text is drawn from 0 ... 2 share; at least
             one word is replaced
    copy     the number of the copy: each has other replacements, which a seed decides

    Only words of three or more letters are replaced. A new word is drawn with a probability that grows as the square
    root of its occurrences in the texts: rare words, which are hard to copy, come more often than in real texts.
    ValueError for texts without words, and for a share outside 0 ... 0.5.
    """
    checks.number("replaced: share", share, 0, 0.5)
    counts = Counter(word for text in check_texts("replaced", texts) for word in WORD.findall(text.lower()))
    if not counts:
        raise ValueError("replaced wants texts with a word of three letters, got none")
    words = sorted(counts)
    p = np.sqrt([counts[word] for word in words])
    p /= p.sum()
    rng = generator(seed, checks.whole("replaced: copy", copy, 0))
    return [_replace(text, words, p, 2 * share * rng.random(), rng) for text in texts]


def _replace(text: str, words: Sequence[str], p: np.ndarray, share: float, rng: Any) -> str:
    """One text, with this share of its words replaced, and at least one."""
    pieces = PIECE.findall(text)
    places = [i for i, piece in enumerate(pieces) if WORD.fullmatch(piece.lower())]
    if not places:
        return text
    chosen = rng.permutation(places)[: max(round(share * len(places)), 1)]
    for i, k in zip(chosen, rng.choice(len(words), len(chosen), p=p), strict=True):
        pieces[i] = words[k].capitalize() if pieces[i][:1].isupper() else words[k]
    return "".join(pieces)

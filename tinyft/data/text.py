"""The real text that ships with tinyft: Python's documentation and sources, cleaned and split by module.

    snapshot()                          every text, as Records
    shipped_tokenizer()                 byte-level BPE of 2,048 entries, trained on the training split
    pretraining(kind, split)            all text of one kind and split as one array of token ids

`tinyft/assets/make.py` says where the text comes from and how it was cleaned and split.
"""

from __future__ import annotations

import functools
import json
import lzma
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from .. import checks
from ..keywords import checked_keywords
from ..tokens import plain, special_ids

ASSETS = Path(__file__).parent.parent / "assets"
SPLITS = ("train", "valid", "test")
KINDS = ("prose", "source")

# The special tokens of the shipped tokenizer. Another tokenizer has other ids: see tokens.py.
SPECIAL = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "<|endoftext|>": 5}
PAD = SPECIAL["[PAD]"]
CLS = SPECIAL["[CLS]"]
SEP = SPECIAL["[SEP]"]
END = SPECIAL["<|endoftext|>"]


@checked_keywords
class Record(NamedTuple):
    """One text of the snapshot."""

    module: str  # "email.message"; "reference.<topic>" for the language reference
    kind: str  # "prose" | "docstring" | "source"
    split: str  # "train" | "valid" | "test", the same for all texts of a module
    text: str


@functools.cache
def snapshot() -> tuple[Record, ...]:
    """Every text that ships with tinyft, in a fixed order (by kind, then module). Read from disk once.

    Raises ValueError if the file is missing or damaged.
    """
    path = ASSETS / "text.json.xz"
    try:
        records = [Record(*record) for record in json.loads(lzma.decompress(path.read_bytes()))["records"]]
        if not all(isinstance(value, str) for record in records for value in record):
            raise ValueError("a record holds something other than texts")
    except (OSError, EOFError, lzma.LZMAError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(f"snapshot wants the file {path}, got no readable one: {error}") from error
    return tuple(records)


def shipped_tokenizer() -> Tokenizer:
    """The shipped byte-level BPE of 2,048 entries, ids 0-5 as in SPECIAL. It adds no special tokens; `encode` does."""
    tokenizer = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # a text that contains "[MASK]" contains six ordinary characters
    return tokenizer


@checked_keywords
def pretraining(kind: str = "prose", split: str = "train", tokenizer: Tokenizer | None = None) -> np.ndarray:
    """All text of one kind and split as token ids, (N,) int64, with the end of text after each text.

    kind        "prose": language reference, docstrings and comments;  "source": Python code
    tokenizer   the shipped one by default. Its token for the end of text is <|endoftext|>, or </s>, or the one that
                `load` read as eos_token. The tokenizer is not changed; padding and truncation stored in it are not
                applied

    ValueError for another kind or split, or if the tokenizer has no token for the end of text.
    """
    checks.one_of("pretraining: kind", kind, KINDS)
    checks.one_of("pretraining: split", split, SPLITS)
    tokenizer = shipped_tokenizer() if tokenizer is None else plain("pretraining", tokenizer)
    (end,) = special_ids("pretraining", tokenizer, "eos")
    is_source = kind == "source"
    texts = [r.text for r in snapshot() if r.split == split and (r.kind == "source") == is_source]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.array([*text.ids, end], np.int64) for text in encoded])


@checked_keywords
def key(text: str) -> str:
    """The text in lower case with single spaces. Two texts with the same key count as the same text."""
    checks.instance("key: text", text, str, "a string")
    return " ".join(text.lower().split())

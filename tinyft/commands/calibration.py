"""Calibration data of `tinyft compress`: sequences of tokens from a data file, or from the text that ships."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..data import snapshot
from ..data.batches import windows
from ..data.files import Rows, read_rows
from ..nn import Module
from ..tokens import encode_text, plain, special_ids, special_token
from ..train.batch import is_causal
from .rows import chat_format, message_rows

__all__ = ["calibration_batches"]

BATCH = 4                                                # sequences in a forward pass
SPLIT = "train"                                          # of the text that ships


def calibration_batches(
    model: Module, tokenizer: Tokenizer, path: str | None, count: int, length: int, seed: int,
) -> list[dict[str, np.ndarray]]:
    """Batches of `count` sequences of `length` tokens, drawn without repetition; of all if the text has fewer.

    path   a data file of any kind; None: prose that ships with tinyft

    A model that is not causal gets its special tokens around each sequence. ValueError for a text without tokens, and
    for a length without room for special tokens."""
    tokenizer = plain("compress", tokenizer)
    rng = np.random.default_rng(seed)
    before, after = [], []
    if not is_causal(model):
        before = special_ids("compress", tokenizer, "cls")
        after = special_ids("compress", tokenizer, "sep")
    room = length - len(before) - len(after)
    if room < 1:
        raise ValueError(f"--length wants at least {length - room + 1} tokens for this model, got {length}")
    if path is None:
        tokens = _tokens(tokenizer, _shipped_texts(rng), count * room)
    else:
        rows = read_rows(path)
        tokens = _tokens(tokenizer, _texts_of(rows, tokenizer), None)
    if not tokens:
        raise ValueError(f"--data wants a text with at least one token, got none in {path}")
    found = windows(np.array(tokens), min(room, len(tokens)))
    if len(found) > count:
        found = found[np.sort(rng.choice(len(found), count, replace=False))]
    ids = np.stack([np.array([*before, *row, *after]) for row in found])
    # Labels of the same shape: no position is cut off, as it is from a batch without labels.
    return [{"ids": rows, "labels": rows} for rows in np.split(ids, range(BATCH, len(ids), BATCH))]


def _tokens(tokenizer: Tokenizer, texts: Iterable[str], enough: int | None) -> list[int]:
    """The tokens of texts, one after the other, with the end of text between them; at least `enough`, or all."""
    has_end = special_token(tokenizer, "eos") is not None
    end = special_ids("compress", tokenizer, "eos") if has_end else []
    tokens: list[int] = []
    for text in texts:
        found = encode_text("compress", tokenizer, text)
        tokens += [*end, *found] if tokens and found else found
        if enough is not None and len(tokens) >= enough:
            break
    return tokens


def _shipped_texts(rng: np.random.Generator) -> Iterator[str]:
    """The prose that ships, in a random order."""
    texts = [record.text for record in snapshot() if record.split == SPLIT and record.kind != "source"]
    return (texts[i] for i in rng.permutation(len(texts)))


def _texts_of(rows: Rows, tokenizer: Tokenizer) -> list[str]:
    """The text of each row: a prompt with its response, a chat in the format of the tokenizer."""
    chats = message_rows(rows, chat=False)
    if chats is not None:
        form = chat_format(tokenizer, None)
        return [form.text(messages) for messages in chats]
    if rows.kind in ("pairs", "sources"):
        return [f"{prompt}{response}" for prompt, response in rows.rows]
    first: list[Any] = [row[0] for row in rows.rows]
    return first

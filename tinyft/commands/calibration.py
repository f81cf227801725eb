"""Calibration data of `tinyft compress`, from a data file or from the text that ships.

    a model with one stack     sequences of tokens
    an encoder-decoder         sources with their targets: its cross-attention reads the encoder's output
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..data import snapshot
from ..data.batches import windows
from ..data.files import Rows, read_rows
from ..models import EncoderDecoder
from ..nn import Module
from ..tokens import encode_text, plain, special_ids, special_token
from ..train.batch import is_causal
from .rows import chat_format, check_kind, make_batches, message_rows
from .shipped import read_data

__all__ = ["calibration_batches"]

BATCH = 4                                                # sequences in a forward pass
SPLIT = "train"                                          # of the text that ships
PAIRS = "names"                                          # the pairs that ship


def calibration_batches(
    model: Module, tokenizer: Tokenizer, path: str | None, count: int, length: int, seed: int,
) -> list[dict[str, np.ndarray]]:
    """Batches of `count` sequences of `length` tokens, drawn without repetition; of all if the text has fewer.

    path   a data file of any kind; None: text that ships with tinyft, prose or the pairs of the task `names`

    A model that is not causal gets its special tokens around each sequence. An encoder-decoder gets `count` pairs of a
    source and a target, each of at most `length` tokens.
    ValueError for a text without tokens, for a length without room for special tokens, and for an encoder-decoder and
    rows that are no pairs, or a target that is too long."""
    tokenizer = plain("compress", tokenizer)
    rng = np.random.default_rng(seed)
    if isinstance(model, EncoderDecoder):
        rows = read_data(PAIRS) if path is None else read_rows(path)
        return _pairs(model, tokenizer, rows, count, length, rng)
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


def _pairs(
    model: EncoderDecoder, tokenizer: Tokenizer, rows: Rows, count: int, length: int, rng: np.random.Generator,
) -> list[dict[str, np.ndarray]]:
    """Batches of `count` rows of source and target, drawn without repetition.

    The decoder reads a target up to the token before its end, as in generation."""
    check_kind(rows, model, chat=False)
    if len(rows.rows) > count:
        chosen = np.sort(rng.choice(len(rows.rows), count, replace=False))
        rows = Rows(rows.path, rows.kind, tuple(rows.rows[i] for i in chosen), tuple(rows.lines[i] for i in chosen))
    prepared = make_batches(rows, model, tokenizer, BATCH, length, 0, chat=False, template=None)
    found = []
    for batch in prepared.batches.once():
        ids = batch["ids"][:, :-1]
        # Padding is on the right: a position counts if a real token follows it.
        found.append({**batch, "ids": ids, "mask": batch["mask"][:, 1:], "labels": ids})
    return found


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

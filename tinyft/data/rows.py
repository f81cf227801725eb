"""Rows of prompts and responses, and rows of text, as batches of a causal language model.

    segment_batches      the loss is on the responses only; logits are computed nowhere else. A row has any number of
                         prompts and responses in turn, as a chat has
    document_batches     the loss is on every token

    ids       prompt  prompt  prompt  response  response
    labels    -100    -100    response response end            the label of a position is the id that follows
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .. import checks
from ..tokens import encode_text, padding_id, plain, special_token
from .batches import IGNORE, Batches, pad

__all__ = ["Encoded", "document_batches", "encode_segments", "end_of_text", "segment_batches"]

Segments = Sequence[tuple[str, bool]]  # the texts of a row in order; True: the model learns to write this one
Place = Callable[[int], str]  # the place of row i for an error message, "line 3 of train.jsonl"


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The token ids of a row, (T,) int64, and which of them the model learns to write, (T,) bool."""

    ids: np.ndarray
    learned: np.ndarray

    @property
    def prompt_length(self) -> int:
        """The number of tokens before the first that the model learns to write."""
        return int(np.argmax(self.learned))


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """The id of the token that ends a text; None if the tokenizer has none."""
    token = special_token(tokenizer, "eos")
    return None if token is None else tokenizer.token_to_id(token)


def encode_segments(tokenizer: Tokenizer, segments: Segments) -> Encoded:
    """The tokens of a row. If it ends with a response, an end of text follows, unless the response ends with one.

    Segments are encoded apart, as in generation: there the model gets the tokens of the prompt alone. The row begins
    with an end of text if a response is first: its first token needs one to follow.
    ValueError unless a token of a response follows another token.
    """
    end = end_of_text(tokenizer)
    ids: list[int] = []
    learned: list[bool] = []
    for text, is_learned in segments:
        tokens = encode_text("encode_segments", tokenizer, text)
        ids += tokens
        learned += [is_learned] * len(tokens)
    if end is not None and segments and segments[-1][1] and ids[-1:] != [end]:
        ids.append(end)
        learned.append(True)
    if end is not None and learned and learned[0]:
        ids = [end, *ids]
        learned = [False, *learned]
    if not any(learned[1:]):
        raise ValueError("a row wants a response with a token that follows another one, got none")
    return Encoded(np.array(ids, np.int64), np.array(learned))


def _cut_prompt(row: Encoded, max_len: int) -> tuple[Encoded, bool]:
    """The row with its prompt cut on the left, so that at most max_len tokens are read; True if it was cut.

    The last token of a row is never read, only predicted. ValueError if the response alone does not fit.
    """
    excess = len(row.ids) - 1 - max_len
    if excess <= 0:
        return row, False
    if excess >= row.prompt_length:
        longest = max_len + 1 - min(1, row.prompt_length)
        raise ValueError(f"the response and what follows it have {len(row.ids) - row.prompt_length:,} tokens, "
                         f"at most {longest:,} fit into a context of {max_len:,}")
    return Encoded(row.ids[excess:], row.learned[excess:]), True


def segment_batches(
    rows: Sequence[Segments],
    tokenizer: Tokenizer,
    batch_size: int,
    max_len: int,
    seed: int = 0,
    place: Place = "row {}".format,
) -> tuple[Batches, int]:
    """(batches, number of cut prompts) for learning to write responses: ids, mask and labels (B, T), T <= max_len.

    rows     the segments of each row: [("2 + 2 =", False), (" 4", True)] is a prompt and its response
    max_len  a prompt that is too long is cut on the left; a response is never cut
    place    the place of row i, for an error message

    A batch holds rows of similar length. ValueError, with the place of the row, for a row without a response, for a
    response longer than max_len, and if every prompt would be cut.
    """
    tokenizer = plain("segment_batches", tokenizer)
    checks.whole("segment_batches: max_len", max_len, 1)
    examples = []
    cut = []
    for i, segments in enumerate(rows):
        try:
            row, is_cut = _cut_prompt(encode_segments(tokenizer, segments), max_len)
        except ValueError as e:
            raise ValueError(f"{place(i)}: {e}") from e
        examples.append((row.ids, row.learned))
        cut += [i] if is_cut else []
    if len(cut) == len(examples) > 0:
        longest = max(len(encode_segments(tokenizer, segments).ids) - 1 for segments in rows)
        raise ValueError(f"{place(cut[0])}: its prompt is cut to fit into {max_len} tokens, and so is every other "
                         f"prompt of the data; the longest row has {longest:,} tokens")
    lengths = [len(ids) for ids, _ in examples]
    collate = PadSegments(max_len, padding_id(tokenizer))
    return Batches(examples, batch_size, seed, collate=collate, lengths=lengths), len(cut)


@dataclasses.dataclass(frozen=True)
class PadSegments:
    """The collate of `segment_batches`: (ids, learned) of each row -> ids, mask and labels (B, T)."""

    max_len: int
    pad_id: int

    def __call__(self, chosen: list[tuple[np.ndarray, np.ndarray]], rng: Any) -> dict[str, np.ndarray]:
        ids, mask = pad([ids[:-1] for ids, _ in chosen], self.max_len, pad_id=self.pad_id)
        labels = np.full(ids.shape, IGNORE, np.int64)
        for b, (row, learned) in enumerate(chosen):
            labels[b, : len(row) - 1] = np.where(learned[1:], row[1:], IGNORE)
        return {"ids": ids, "mask": mask, "labels": labels}


def document_batches(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    batch_size: int,
    max_len: int,
    seed: int = 0,
    place: Place = "row {}".format,
) -> Batches:
    """Batches for learning texts, every token of them: ids (B, T) and mask (B, T), T <= max_len.

    A long text is cut into windows of max_len tokens, without overlap. An end of text follows every text but a single
    one, which is a whole file. ValueError, with the place of the text, for one that gives fewer than two tokens.
    """
    tokenizer = plain("document_batches", tokenizer)
    checks.whole("document_batches: max_len", max_len, 2)
    end = end_of_text(tokenizer)
    examples = []
    for i, text in enumerate(texts):
        ids = encode_text("document_batches", tokenizer, text)
        if ids and end is not None and len(texts) > 1:
            ids.append(end)
        if len(ids) < 2:
            raise ValueError(f"{place(i)}: a text wants at least two tokens, got {len(ids)}")
        starts = range(0, len(ids) - 1, max_len)  # the last window has at least two tokens
        examples += [np.array(ids[start : start + max_len], np.int64) for start in starts]
    lengths = [len(ids) for ids in examples]
    return Batches(examples, batch_size, seed, collate=PadDocuments(max_len, padding_id(tokenizer)), lengths=lengths)


@dataclasses.dataclass(frozen=True)
class PadDocuments:
    """The collate of `document_batches`: the ids of each window -> ids and mask (B, T)."""

    max_len: int
    pad_id: int

    def __call__(self, chosen: list[np.ndarray], rng: Any) -> dict[str, np.ndarray]:
        ids, mask = pad(chosen, self.max_len, pad_id=self.pad_id)
        return {"ids": ids, "mask": mask}

"""Batches of prompts and responses: a causal language model learns the response, and the prompt has no labels.

    ids       p1 p2 p3 r1 r2          the prompt and the response, without the last token
    labels     .  . r1 r2 r3          the id that follows, where it is a part of the response; -100 elsewhere
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import checks
from .batches import IGNORE, LARGEST_ID, Batches, check_sequence, check_tokens, pad


@dataclasses.dataclass(frozen=True)
class PadResponses:
    """The collate of `response_batches`: (ids, number of prompt tokens) pairs -> a batch, padded on the right."""

    max_len: int | None
    pad_id: int

    def __call__(self, chosen: list[tuple[np.ndarray, int]], rng: np.random.Generator) -> dict[str, np.ndarray]:
        ids, mask = pad([row[:-1] for row, _ in chosen], self.max_len, pad_id=self.pad_id)
        labels = np.full(ids.shape, IGNORE, np.int64)
        for b, (row, prompt) in enumerate(chosen):
            labels[b, prompt - 1 : len(row) - 1] = row[prompt:]
        return {"ids": ids, "mask": mask, "labels": labels}


def response_batches(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int,
    *,
    max_len: int | None = None,
    pad_id: int = 0,
    seed: int = 0,
    shuffle: bool = True,
    drop_last: bool = False,
    group_by_length: bool = False,
) -> Batches:
    """Batches for learning responses: ids (B, T), mask (B, T), labels (B, T) with -100 at the prompt and at padding.

    rows              (ids of a prompt, ids of its response) pairs, at least one token each. The response's last token
                      should be the one that ends an answer: the model then learns to stop
    max_len           the longest T; None for any. T is rounded up to a multiple of 8, at most max_len
    pad_id            the id at padding; a model gives the same output for any id of its vocabulary
    group_by_length   batches of rows of similar length, for less padding

    ValueError for no row, an empty prompt or response, or a row that is longer than max_len: it names the row.
    TypeError for other rows.
    """
    check_sequence("response_batches: rows", rows)
    if max_len is not None:
        max_len = checks.whole("response_batches: max_len", max_len, 1)
    pad_id = checks.whole("response_batches: pad_id", pad_id, 0, LARGEST_ID)
    grouped = checks.flag("response_batches: group_by_length", group_by_length)
    examples = [_read_row(i, row, max_len) for i, row in enumerate(rows)]
    lengths = [len(ids) for ids, _ in examples] if grouped else None
    return Batches(examples, batch_size, seed, shuffle, PadResponses(max_len, pad_id), drop_last, lengths)


def _read_row(number: int, row: Any, max_len: int | None) -> tuple[np.ndarray, int]:
    """(the ids of the prompt and the response together, the number of prompt tokens)."""
    wanted = f"response_batches: row {number} wants a pair (ids of a prompt, ids of its response)"
    if not isinstance(row, (list, tuple)) or len(row) != 2:
        raise TypeError(f"{wanted}, got {checks.brief(row)}")
    prompt, response = (check_tokens("response_batches", part).astype(np.int64) for part in row)
    if not len(prompt) or not len(response):
        raise ValueError(f"{wanted} with at least one id each, got {len(prompt)} and {len(response)} ids")
    ids = np.concatenate([prompt, response])
    if max_len is not None and len(ids) - 1 > max_len:
        raise ValueError(
            f"response_batches: row {number} wants at most {max_len + 1} ids for max_len={max_len}, got {len(ids)}"
        )
    return ids, len(prompt)

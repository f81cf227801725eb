"""What the tests of encoder-decoders share: pairs, padding, runs, and the comparison with a formula for one row."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from helpers import host

from tinyft import Cache, Context, no_grad
from tinyft.models.encoder_decoder import EncoderDecoder

V = 23                                                   # the vocabulary
Reference = Callable[[Any, list[int], list[int]], np.ndarray]


def pairs(seed: int = 3) -> list[tuple[list[int], list[int]]]:
    """Sources and texts of different lengths."""
    rng = np.random.default_rng(seed)
    lengths = [(5, 4), (2, 6), (7, 1), (1, 3)]
    return [(rng.integers(0, V, n).tolist(), rng.integers(0, V, m).tolist()) for n, m in lengths]


def pad(rows: list[list[int]], *, left: bool, fill: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask), with the padding on the left or on the right."""
    width = max(map(len, rows))
    ids = [[fill] * (width - len(r)) + r if left else r + [fill] * (width - len(r)) for r in rows]
    mask = [[False] * (width - len(r)) + [True] * len(r) for r in rows]
    mask = mask if left else [row[::-1] for row in mask]
    return np.array(ids), np.array(mask)


def run(model: EncoderDecoder, ids: Any, **facts: Any) -> np.ndarray:
    with no_grad():
        return host(model(ids, **facts))


def check_formula(model: EncoderDecoder, right: EncoderDecoder, reference: Reference) -> None:
    """A padded batch, on either side, gives each pair the logits of the formula for it alone.

    right: a model with the weights and the configuration of the formula.
    reference: (right, source, text) -> the logits (T, V) of the formula."""
    for left in (False, True):
        source_ids, source_mask = pad([source for source, _ in pairs()], left=left)
        ids, mask = pad([text for _, text in pairs()], left=left)
        got = run(model, ids, mask=mask, source_ids=source_ids, source_mask=source_mask)
        for i, (source, text) in enumerate(pairs()):
            want = reference(right, source, text)
            assert np.abs(got[i][mask[i]] - want).max() <= 1e-10 * np.abs(want).max()


def in_chunks(model: EncoderDecoder, ids: np.ndarray, mask: Any, source: Context, ends: tuple[int, ...]) -> np.ndarray:
    """The logits of a text that is run in pieces, through a cache."""
    cache = Cache()
    parts = []
    start = 0
    for end in ends:
        part = None if mask is None else mask[:, start:end]
        parts.append(run(model, ids[:, start:end], mask=part, source=source, cache=cache))
        start = end
    return np.concatenate(parts, axis=1)

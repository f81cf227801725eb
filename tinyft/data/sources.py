"""Sources and targets, such as a sentence and its translation, as batches of an encoder-decoder.

    source_ids    x₁  x₂  x₃  end           what the encoder reads
    ids           start  y₁  y₂  end        the decoder's text: the label of a position is the id that follows
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .. import checks
from ..keywords import checked_keywords
from ..tokens import encode_text, padding_id, plain, special_ids
from .batches import LARGEST_ID, Batches, check_sequence, pad
from .names import Pairs

__all__ = ["encode_source", "encode_target", "source_batches"]


def encode_source(tokenizer: Tokenizer, text: str, end: int) -> list[int]:
    """The ids of a source, and the id `end`. ValueError for a text without a token."""
    ids = encode_text("encode_source", tokenizer, text)
    if not ids:
        raise ValueError("a source wants at least one token, got an empty text")
    return ids + [end]


def encode_target(tokenizer: Tokenizer, text: str, max_target: int, start: int, end: int) -> list[int]:
    """The decoder's text of a target: start, the ids of the text, end.

    ValueError for more than max_target ids after `start`: a target is never cut."""
    ids = encode_text("encode_target", tokenizer, text)
    if len(ids) + 1 > max_target:
        raise ValueError(f"a target of {len(ids)} tokens and the end do not fit into {max_target}")
    return [start] + ids + [end]


@checked_keywords
def source_batches(
    pairs: Pairs | Sequence,
    tokenizer: Tokenizer,
    batch_size: int,
    max_source: int,
    max_target: int,
    seed: int = 0,
    *,
    start: int,
    end: int | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
    place: Callable[[int], str] = "row {}".format,
) -> Batches:
    """Batches for learning targets: source_ids and source_mask (B, Ts), ids and mask (B, T). They have no labels.

    pairs        a list of pairs (source, target), both strings; or Pairs(sources, targets)
    max_source   tokens of a source, the end included; a longer one is cut on the right
    max_target   tokens of a target, the end included; a target is never cut
    start        the id with which the decoder's text begins, model.config.start
    end          the id that ends sources and targets; None: the tokenizer's end of text
    shuffle, drop_last   as of Batches
    place        the place of row i, for an error message

    A batch holds rows of similar length. TypeError for texts that are no strings; ValueError, with the place of the
    row, for an empty source and a target that is too long, and for a tokenizer without an end of text."""
    made, _ = source_batches_and_cut(pairs, tokenizer, batch_size, max_source, max_target, seed, start=start, end=end,
                                     shuffle=shuffle, drop_last=drop_last, place=place)
    return made


def source_batches_and_cut(
    pairs: Pairs | Sequence,
    tokenizer: Tokenizer,
    batch_size: int,
    max_source: int,
    max_target: int,
    seed: int,
    *,
    start: int,
    end: int | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
    place: Callable[[int], str],
) -> tuple[Batches, int]:
    """The batches of `source_batches`, which has the arguments, and the number of sources that were cut."""
    tokenizer = plain("source_batches", tokenizer)
    checks.whole("source_batches: max_source", max_source, 2)
    checks.whole("source_batches: max_target", max_target, 1)
    checks.whole("source_batches: start", start, 0, LARGEST_ID)
    checks.function("source_batches: place", place, "a function of the number of a row, which gives its place")
    if end is None:
        [end] = special_ids("source_batches", tokenizer, "eos")
    checks.whole("source_batches: end", end, 0, LARGEST_ID)
    examples = []
    cut = 0
    for i, (source, target) in enumerate(read_pairs("source_batches", pairs)):
        try:
            source_ids = encode_source(tokenizer, source, end)
            target_ids = encode_target(tokenizer, target, max_target, start, end)
        except ValueError as e:
            raise ValueError(f"{place(i)}: {e}") from e
        if len(source_ids) > max_source:
            cut += 1
            source_ids = source_ids[: max_source - 1] + [end]
        examples.append((np.array(source_ids, np.int64), np.array(target_ids, np.int64)))
    lengths = [len(source) + len(target) for source, target in examples]
    collate = PadPairs(max_source, max_target, padding_id(tokenizer))
    return Batches(examples, batch_size, seed, shuffle, collate, drop_last=drop_last, lengths=lengths), cut


@dataclasses.dataclass(frozen=True)
class PadPairs:
    """The collate of `source_batches`: (source ids, target ids) of each row -> a batch, padded on the right.

    A source has at most max_source columns, and a decoder's text at most max_target after the start. They limit the
    padding alone, since no row is longer: they are no part of a stream's fingerprint, and older versions had none."""

    max_source: int = dataclasses.field(compare=False)
    max_target: int = dataclasses.field(compare=False)
    pad_id: int

    def __call__(self, chosen: list[tuple[np.ndarray, np.ndarray]], rng: Any) -> dict[str, np.ndarray]:
        source_ids, source_mask = pad([source for source, _ in chosen], self.max_source, 4, self.pad_id)
        ids, mask = pad([target for _, target in chosen], self.max_target + 1, 2, self.pad_id)
        return {"ids": ids, "mask": mask, "source_ids": source_ids, "source_mask": source_mask}


def read_pairs(name: str, pairs: Any) -> list[tuple[str, str]]:
    """A list of (source, target) from Pairs or a list of pairs; checked.

    name: the function that reads them. TypeError for texts that are no strings; ValueError for Pairs of two lengths."""
    wanted = f"{name}: pairs wants a list of pairs (source, target), or data.Pairs(sources, targets)"
    if not isinstance(pairs, (list, tuple)):
        raise TypeError(f"{wanted}; got {checks.brief(pairs)}")
    if isinstance(pairs, Pairs):
        for part in pairs:
            check_sequence(f"{name}: pairs", part)
        if len(pairs.prompts) != len(pairs.responses):
            raise ValueError(f"{name} wants one target for each source, got {len(pairs.responses)} and "
                             f"{len(pairs.prompts)}")
        pairs = list(zip(pairs.prompts, pairs.responses))
    for pair in pairs:
        if not is_text_pair(pair):
            raise TypeError(f"{wanted}; got {checks.brief(pair)} among them")
    return [(source, target) for source, target in pairs]


def is_text_pair(value: Any) -> bool:
    """True for (source, target): two strings in a tuple or list."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(text, str) for text in value)

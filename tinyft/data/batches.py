"""Batches of examples that can be stopped and resumed at any point, and the encoding of texts into them.

    Batches, text_batches, lm_batches, mlm_batches      endless, shuffled, resumable;  .once() is one plain pass

A batch is a dict of NumPy arrays:  ids (B, T) int64;  mask (B, T) bool, True where a token is real;  labels (B,) int64
for classification, or (B, T) int64 for masked language modelling with -100 where nothing is predicted. Causal
language models need no labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from .text import CLS, PAD, SEP, SPECIAL, check_choice

IGNORE = -100  # the label of a position at which nothing is predicted
CHOOSE, SWAP, FIXED, ORDER, NOISE, ONCE = range(6)  # the purposes of random streams: no two purposes share a stream
STREAM_STATE = ("seed", "epoch", "batch")  # the attributes that determine all batches to come
POOL = 16  # examples are sorted by length within pools of this many batches


def generator(seed: int, *stream: int) -> np.random.Generator:
    """One of many independent random generators of a seed. The same stream numbers give the same generator."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))


class Batches:
    """An endless, resumable stream of batches over a sequence of examples.

    examples    any sequence with a length and integer indices
    collate     (list of examples, rng) -> batch; rng is for random corruption (masked language modelling)
    shuffle     a new order in every epoch; each epoch visits every example exactly once
    drop_last   leave out the last batch of an epoch if it is short; the order decides which examples are left out
    lengths     one per example: batches group examples of similar length, which saves padding;
                the order still changes from epoch to epoch

    Every random draw is a function of (seed, epoch, batch). So `state_dict()` is a few integers, and after
    `load_state_dict(state)` the stream continues bitwise.
    """

    def __init__(
        self,
        examples: Sequence,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        collate: Callable | None = None,
        drop_last: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """Start at the first batch of epoch 0. The class describes the arguments; ValueError if they do not fit.

        collate makes a batch of a list of examples. Without it, the examples are arrays of token ids of one length.
        With lengths, a batch holds examples of similar length.
        """
        if len(examples) == 0:
            raise ValueError("Batches wants at least one example, got an empty dataset")
        if batch_size < 1:
            raise ValueError(f"Batches wants a batch_size of at least 1, got {batch_size}")
        if drop_last and len(examples) < batch_size:
            raise ValueError(
                f"Batches wants at least one full batch of {batch_size} with drop_last, got {len(examples)} examples"
            )
        if lengths is not None and len(lengths) != len(examples):
            raise ValueError(
                f"Batches wants one length per example, got {len(lengths)} lengths and {len(examples)} examples"
            )
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.collate = collate or _stack
        self.drop_last = drop_last
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.epoch = 0
        self.batch = 0  # number of batches of this epoch that were returned
        self._order = self._epoch_order()

    def __len__(self) -> int:
        """Batches in one epoch."""
        full, rest = divmod(len(self.examples), self.batch_size)
        return full + bool(rest and not self.drop_last)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch. After the last batch of an epoch a new epoch begins, in its own order.

        The generator for `collate` depends on (seed, epoch, batch) alone, so a resumed stream gives the same batches.
        NOISE is the number of its random stream: no other use shares it.
        """
        if self.batch == len(self):
            self.epoch += 1
            self.batch = 0
            self._order = self._epoch_order()
        start = self.batch * self.batch_size
        chosen = self._order[start : start + self.batch_size]
        self.batch += 1
        return self._collate(chosen, generator(self.seed, NOISE, self.epoch, self.batch))

    def once(self) -> Iterator[dict[str, np.ndarray]]:
        """Batches of every example once, in the given order, for evaluation. The last batch may be short.

        Each call gives the same batches, random corruption included. The stream does not advance.
        """
        indices = np.arange(len(self.examples))
        for start in range(0, len(indices), self.batch_size):
            chosen = indices[start : start + self.batch_size]
            yield self._collate(chosen, generator(self.seed, ONCE, start))

    def state_dict(self) -> dict[str, int | bool]:
        """The position in the stream with its seed, and the settings that must agree on loading. JSON-able."""
        position = {name: getattr(self, name) for name in STREAM_STATE}
        return position | self._settings()

    def load_state_dict(self, state: Mapping[str, int | bool]) -> None:
        """Go to the position at which `state` was taken, and take its seed.

        ValueError if the state belongs to another number of examples or to other settings; then the stream stays at
        its position. The content of the examples is not compared.
        """
        wanted = []
        for name, value in self._settings().items():
            if state.get(name) != value:
                wanted.append(f"{name} {value}, got {state.get(name)}")
        for name in STREAM_STATE:  # seed, epoch, batch
            value = state.get(name)
            if not isinstance(value, int) or value < 0:
                wanted.append(f"a whole number {name} of at least 0, got {value!r}")
            elif name == "batch" and value > len(self):
                wanted.append(f"a batch of at most {len(self)}, got {value}")
        if wanted:
            raise ValueError(f"Batches.load_state_dict wants a state with {'; '.join(wanted)}")
        for name in STREAM_STATE:
            setattr(self, name, state[name])
        self._order = self._epoch_order()  # depends on the seed and the epoch

    def _settings(self) -> dict[str, int | bool]:
        """The settings that decide the order of the batches: a saved position fits only a stream with the same ones."""
        return {
            "examples": len(self.examples),
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "by_length": self.lengths is not None,
        }

    def _epoch_order(self) -> np.ndarray:
        """The indices of all examples in the order of this epoch, (N,). It depends on seed and epoch alone.

        With `lengths`, examples of similar length are neighbours, so that they share a batch and need little padding.
        """
        if not self.shuffle:
            return np.arange(len(self.examples))
        rng = generator(self.seed, ORDER, self.epoch)
        order = rng.permutation(len(self.examples))
        if self.lengths is None:
            return order
        # Sort by length within pools of POOL batches, then shuffle the batches. The short batch stays last,
        # since __next__ cuts the order every batch_size indices.
        full = len(order) - len(order) % self.batch_size
        pools = np.split(order[:full], range(POOL * self.batch_size, full, POOL * self.batch_size))
        by_length = [pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools]
        batches = np.concatenate(by_length).reshape(-1, self.batch_size)
        return np.concatenate([rng.permutation(batches).reshape(-1), order[full:]])

    def _collate(self, chosen: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return self.collate([self.examples[i] for i in chosen], rng)


# ---------------------------------------------------------------------------------------------------- texts
class Examples(NamedTuple):
    """Texts and their labels, (N,) int64."""

    texts: tuple[str, ...]
    labels: np.ndarray


def windows(tokens: np.ndarray, T: int) -> np.ndarray:
    """(N,) tokens -> (N // T, T): consecutive windows without overlap; the rest at the end is dropped."""
    if T < 1 or len(tokens) < T:
        raise ValueError(f"windows wants T from 1 to {len(tokens)} (the number of tokens), got T={T}")
    count = len(tokens) // T
    return np.asarray(tokens[: count * T]).reshape(count, T)


def encode(tokenizer: Tokenizer, text: str, max_len: int, form: str = "bert") -> list[int]:
    """Token ids of a text, cut to max_len.  "bert": [CLS] x [SEP];  "gpt": x <|endoftext|>.

    A BERT classifies at [CLS], a GPT at the last token. Raises ValueError if max_len leaves no room for the text, or
    if the tokenizer lacks the special tokens.
    """
    check_choice("encode", "form", form, ("bert", "gpt"))
    before, after = (["[CLS]"], ["[SEP]"]) if form == "bert" else ([], ["<|endoftext|>"])
    special = before + after
    room = max_len - len(special)
    if room < 1:
        least = len(special) + 1
        raise ValueError(f"encode wants a max_len of at least {least} (special tokens and one more), got {max_len}")
    ids = [tokenizer.token_to_id(name) for name in special]
    if None in ids:
        raise ValueError(f"encode wants a tokenizer with {' and '.join(special)}, got one without")
    text_ids = tokenizer.encode(text, add_special_tokens=False).ids[:room]
    return ids[: len(before)] + text_ids + ids[len(before) :]


def pad(rows: Sequence[Sequence[int]], max_len: int | None = None, multiple: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids -> ids (B, T) int64, padded on the right with [PAD], and mask (B, T) bool.

    T is the length of the longest row, rounded up to a multiple (few different shapes are faster), at most max_len.
    """
    longest = max((len(row) for row in rows), default=0)
    if longest == 0:
        raise ValueError(f"pad wants at least one row with a token, got {len(rows)} rows and no token")
    if max_len is not None and longest > max_len:
        raise ValueError(f"pad wants rows of at most {max_len} tokens, got one of {longest}")
    T = -(-longest // multiple) * multiple  # rounded up
    if max_len is not None:
        T = min(T, max_len)
    ids = np.full((len(rows), T), PAD, np.int64)
    mask = np.zeros((len(rows), T), bool)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = row
        mask[b, : len(row)] = True
    return ids, mask


def text_batches(
    examples: Examples,
    tokenizer: Tokenizer,
    batch_size: int,
    max_len: int,
    seed: int = 0,
    shuffle: bool = True,
    form: str = "bert",
    drop_last: bool = False,
    group_by_length: bool = False,
) -> Batches:
    """Batches for classification: ids (B, T), mask (B, T), labels (B,), T <= max_len.

    form              "bert" or "gpt", as in `encode`
    group_by_length   batches of texts of similar length, for less padding
    """
    if len(examples.texts) != len(examples.labels):
        raise ValueError(
            f"text_batches wants one label per text, got {len(examples.texts)} texts and {len(examples.labels)} labels"
        )
    pairs = zip(examples.texts, examples.labels, strict=True)
    rows = [(encode(tokenizer, text, max_len, form), int(label)) for text, label in pairs]

    def collate(chosen: list[tuple[list[int], int]], rng: np.random.Generator) -> dict[str, np.ndarray]:
        ids, mask = pad([row for row, _ in chosen], max_len)
        labels = np.array([label for _, label in chosen], np.int64)
        return {"ids": ids, "mask": mask, "labels": labels}

    lengths = [len(row) for row, _ in rows] if group_by_length else None
    return Batches(rows, batch_size, seed, shuffle, collate, drop_last, lengths)


def _stack(chosen: list[np.ndarray], rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
    ids = np.stack(chosen).astype(np.int64)  # (B, T)
    return {"ids": ids, "mask": np.ones(ids.shape, bool)}


def lm_batches(
    tokens: np.ndarray, T: int, batch_size: int, seed: int = 0, shuffle: bool = True, drop_last: bool = False
) -> Batches:
    """Batches for causal language modelling: ids (B, T), mask (B, T) all True.

    The rows are cut from the tokens (N,) without overlap. There are no labels: each token is the label of the token
    before it.
    """
    return Batches(windows(tokens, T), batch_size, seed, shuffle, _stack, drop_last)


def mlm_batches(
    tokens: np.ndarray,
    T: int,
    batch_size: int,
    vocab: int,
    seed: int = 0,
    shuffle: bool = True,
    p: float = 0.15,
    drop_last: bool = False,
) -> Batches:
    """Batches for masked language modelling: ids (B, T) are [CLS] T−2 tokens [SEP], corrupted anew in every epoch.

    `mlm` corrupts them: p is the share of positions that are predicted. Labels are (B, T), -100 at all other positions.
    The tokens (N,) are cut without overlap.
    """
    if T < 3:
        raise ValueError(f"mlm_batches wants T of at least 3 ([CLS], a token, [SEP]), got {T}")

    def collate(chosen: list[np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        batch = _stack([np.concatenate([[CLS], row, [SEP]]) for row in chosen])
        ids, labels = mlm(batch["ids"], batch["mask"], rng, vocab, SPECIAL, p)
        return {"ids": ids, "mask": batch["mask"], "labels": labels}

    return Batches(windows(tokens, T - 2), batch_size, seed, shuffle, collate, drop_last)


def mlm(
    ids: np.ndarray,
    mask: np.ndarray,
    rng: np.random.Generator,
    vocab: int,
    special: Mapping[str, int] = SPECIAL,
    p: float = 0.15,
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupt ids (B, T) for masked language modelling -> (ids, labels), new arrays.   BERT, Devlin et al., 2019, §3.1

    Each real, non-special position is chosen with probability p, at least one in the batch. A chosen token becomes
    [MASK] (80 %) or a random non-special token (10 %), or it stays (10 %). Its label is the original token; all other
    labels are -100. Raises ValueError if no position can be chosen.
    """
    if not 0 < p <= 1:
        raise ValueError(f"mlm wants a probability p in (0, 1], got {p}")
    special_ids = np.array(sorted(special.values()))
    candidates = np.flatnonzero(mask & ~np.isin(ids, special_ids))
    if not len(candidates):
        raise ValueError(f"mlm wants a real token that is not special, got ids {ids.shape} with nothing to predict")
    chosen = candidates[rng.random(len(candidates)) < p]
    if not len(chosen):
        chosen = rng.choice(candidates, 1)
    labels = np.full(ids.shape, IGNORE, np.int64)
    labels.flat[chosen] = ids.flat[chosen]
    corrupted = ids.copy()
    draw = rng.random(len(chosen))
    corrupted.flat[chosen[draw < 0.8]] = special["[MASK]"]
    replaced = chosen[(draw >= 0.8) & (draw < 0.9)]
    ordinary = np.setdiff1d(np.arange(vocab), special_ids)
    corrupted.flat[replaced] = rng.choice(ordinary, len(replaced))
    return corrupted, labels

"""Batches of examples that can be stopped and resumed at any point, and what puts texts into them.

    Batches, text_batches, lm_batches, mlm_batches      endless, shuffled, resumable;  .once() is one plain pass

A batch is a dict of NumPy arrays:  ids (B, T) int64,  mask (B, T) bool, True where a token is real,  labels (B,) int64 for
classification or (B, T) int64 for masked language modelling, -100 where nothing is to be predicted. Causal models need no labels.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

SPECIAL = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "<|endoftext|>": 5}
PAD, CLS, SEP, END = SPECIAL["[PAD]"], SPECIAL["[CLS]"], SPECIAL["[SEP]"], SPECIAL["<|endoftext|>"]
IGNORE = -100                                                          # the label of a position that is not to be predicted
CHOOSE, SWAP, FIXED, ORDER, NOISE, ONCE = range(6)                     # what a random stream is for: no two uses share one
PLACE = ("seed", "epoch", "batch")                                     # where a stream of batches stands
POOL = 16                                                              # batches among which examples are sorted by length


def generator(seed: int, *stream: int) -> np.random.Generator:
    """One of a seed's many independent random generators: the same numbers name the same generator, others another."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))


class Batches:
    """An endless, resumable stream of batches over a sequence of examples.

    examples    anything with a length and integer indices
    collate     (list of examples, rng) -> batch; rng is for noise (masked language modelling)
    shuffle     a new order in every epoch; each epoch visits every example exactly once
    drop_last   leave out an epoch's last batch if it is short (so each epoch leaves out a few examples, others each time)
    lengths     one per example: batches of like length, so that little is padding; still another order in every epoch

    Every random draw is a function of (seed, epoch, batch), so `state_dict()` is a few integers and `load_state_dict(state)` goes on bitwise.
    """

    def __init__(self, examples: Sequence, batch_size: int, seed: int = 0, shuffle: bool = True, collate: Callable | None = None,
                 drop_last: bool = False, lengths: Sequence[int] | None = None) -> None:  # fmt: skip
        if len(examples) == 0:
            raise ValueError("wanted at least one example, got an empty dataset")
        if batch_size < 1:
            raise ValueError(f"wanted a batch_size of at least 1, got {batch_size}")
        if drop_last and len(examples) < batch_size:
            raise ValueError(f"wanted at least one full batch of {batch_size} with drop_last, got {len(examples)} examples")
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.shuffle, self.drop_last, self.collate = shuffle, drop_last, collate or _stack
        self.lengths = None if lengths is None else np.asarray(lengths)
        if lengths is not None and len(lengths) != len(examples):
            raise ValueError(f"wanted one length per example, got {len(lengths)} lengths and {len(examples)} examples")
        self.epoch = self.batch = 0                                                    # the next batch to give
        self._order = self._epoch_order()

    def __len__(self) -> int:
        """Batches in one epoch."""
        full, rest = divmod(len(self.examples), self.batch_size)
        return full + bool(rest and not self.drop_last)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self.batch == len(self):
            self.epoch, self.batch = self.epoch + 1, 0
            self._order = self._epoch_order()
        chosen = self._order[self.batch * self.batch_size :][: self.batch_size]
        self.batch += 1
        return self._make(chosen, generator(self.seed, NOISE, self.epoch, self.batch))

    def once(self) -> Iterator[dict[str, np.ndarray]]:
        """Every example once, in the order given, the last batch short if need be; the same each time. Does not move the stream."""
        everything = np.arange(len(self.examples))
        for start in range(0, len(everything), self.batch_size):
            yield self._make(everything[start : start + self.batch_size], generator(self.seed, ONCE, start))

    def state_dict(self) -> dict[str, int | bool]:
        """Where the stream stands: JSON-able."""
        return {**{name: getattr(self, name) for name in PLACE}, **self._fixed()}

    def load_state_dict(self, state: Mapping[str, int | bool]) -> None:
        """Go on exactly where `state` was taken. Raises ValueError when it was taken over other examples or another batch size."""
        wrong = [f"{name} {value}, got {state.get(name)}" for name, value in self._fixed().items() if state.get(name) != value]
        wrong += [f"an integer {name}, got {state.get(name)!r}" for name in PLACE if not isinstance(state.get(name), int)]
        if wrong:
            raise ValueError(f"wanted a sampler state with {'; '.join(wrong)}")
        self.seed, self.epoch, self.batch = (state[name] for name in PLACE)
        self._order = self._epoch_order()

    def _fixed(self) -> dict[str, int | bool]:
        return {"examples": len(self.examples), "batch_size": self.batch_size, "shuffle": self.shuffle, "drop_last": self.drop_last,
                "by_length": self.lengths is not None}

    def _epoch_order(self) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.examples))
        rng = generator(self.seed, ORDER, self.epoch)
        order = rng.permutation(len(self.examples))
        if self.lengths is None:
            return order
        full, pool = len(order) - len(order) % self.batch_size, POOL * self.batch_size
        pools = [part[np.argsort(self.lengths[part], kind="stable")] for part in (order[i:min(i + pool, full)] for i in range(0, full, pool))]
        batches = np.concatenate([*pools, order[:0]]).reshape(-1, self.batch_size)     # the short batch stays last
        return np.concatenate([rng.permutation(batches).reshape(-1), order[full:]])

    def _make(self, chosen: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return self.collate([self.examples[i] for i in chosen], rng)


# ---------------------------------------------------------------------------------------------------------------- texts
class Examples(NamedTuple):
    """Texts and their labels, (N,) int64."""

    texts: tuple[str, ...]
    labels: np.ndarray


def windows(tokens: np.ndarray, T: int) -> np.ndarray:
    """(N,) tokens -> (N // T, T): consecutive windows without overlap; the rest at the end is dropped."""
    if T < 1 or len(tokens) < T:
        raise ValueError(f"wanted a window of 1 to {len(tokens)} tokens (that many there are), got T={T}")
    count = len(tokens) // T
    return np.asarray(tokens[: count * T]).reshape(count, T)


def encode(tokenizer: Tokenizer, text: str, max_len: int, form: str = "bert") -> list[int]:
    """Token ids of a text, cut to max_len:  "bert": [CLS] x [SEP];   "gpt": x <|endoftext|>, whose last token is classified."""
    one_of("form", form, ("bert", "gpt"))
    before, after = (["[CLS]"], ["[SEP]"]) if form == "bert" else ([], ["<|endoftext|>"])
    room = max_len - len(before) - len(after)
    if room < 1:
        raise ValueError(f"wanted max_len of at least {max_len - room + 1} (special tokens and one more), got {max_len}")
    ids = [tokenizer.token_to_id(name) for name in before + after]
    if None in ids:
        raise ValueError(f"wanted a tokenizer with {' and '.join(before + after)}, got one without")
    return ids[:len(before)] + tokenizer.encode(text, add_special_tokens=False).ids[:room] + ids[len(before):]


def pad(rows: Sequence[Sequence[int]], max_len: int | None = None, multiple: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids -> ids (B, T) int64, padded on the right with [PAD], and mask (B, T) bool.

    T is the longest row's length, rounded up to a multiple (few different shapes are faster) but to no more than max_len.
    """
    longest = max((len(row) for row in rows), default=0)
    if longest == 0:
        raise ValueError(f"wanted at least one row with a token, got {len(rows)} rows and no token")
    if max_len is not None and longest > max_len:
        raise ValueError(f"wanted rows of at most {max_len} tokens, got one of {longest}")
    T = min(-(-longest // multiple) * multiple, max_len or longest + multiple)
    ids, mask = np.full((len(rows), T), PAD, np.int64), np.zeros((len(rows), T), bool)
    for b, row in enumerate(rows):
        ids[b, : len(row)], mask[b, : len(row)] = row, True
    return ids, mask


def text_batches(examples: Examples, tokenizer: Tokenizer, batch_size: int, max_len: int, seed: int = 0, shuffle: bool = True,
                 form: str = "bert", drop_last: bool = False, group_by_length: bool = False) -> Batches:  # fmt: skip
    """Batches for classification: ids (B, T), mask (B, T), labels (B,), T <= max_len. `form` as in `encode`.

    group_by_length: texts of like length together, for less padding."""
    if len(examples.texts) != len(examples.labels):
        raise ValueError(f"wanted one label per text, got {len(examples.texts)} texts and {len(examples.labels)} labels")
    rows = [(encode(tokenizer, text, max_len, form), int(label)) for text, label in zip(*examples, strict=True)]

    def collate(chosen: list[tuple[list[int], int]], rng: np.random.Generator) -> dict[str, np.ndarray]:
        ids, mask = pad([row for row, _ in chosen], max_len)
        return {"ids": ids, "mask": mask, "labels": np.array([label for _, label in chosen], np.int64)}

    return Batches(rows, batch_size, seed, shuffle, collate, drop_last, [len(row) for row, _ in rows] if group_by_length else None)


def _stack(chosen: list[np.ndarray], rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
    ids = np.stack(chosen).astype(np.int64)                                            # (B, T)
    return {"ids": ids, "mask": np.ones(ids.shape, bool)}


def lm_batches(tokens: np.ndarray, T: int, batch_size: int, seed: int = 0, shuffle: bool = True, drop_last: bool = False) -> Batches:
    """Batches for causal language modelling: ids (B, T), mask (B, T) all True; no labels, as each token is the label of the one before."""
    return Batches(windows(tokens, T), batch_size, seed, shuffle, _stack, drop_last)


def mlm_batches(tokens: np.ndarray, T: int, batch_size: int, vocab: int, seed: int = 0, shuffle: bool = True, p: float = 0.15,
                drop_last: bool = False) -> Batches:  # fmt: skip
    """Batches for masked language modelling: [CLS] T-2 tokens [SEP], corrupted by `mlm` anew in every epoch; labels (B, T)."""
    if T < 3:
        raise ValueError(f"wanted T of at least 3 ([CLS], a token, [SEP]), got {T}")

    def collate(chosen: list[np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        batch = _stack([np.concatenate([[CLS], row, [SEP]]) for row in chosen])
        ids, labels = mlm(batch["ids"], batch["mask"], rng, vocab, SPECIAL, p)
        return {"ids": ids, "mask": batch["mask"], "labels": labels}

    return Batches(windows(tokens, T - 2), batch_size, seed, shuffle, collate, drop_last)


def mlm(ids: np.ndarray, mask: np.ndarray, rng: np.random.Generator, vocab: int, special: Mapping[str, int] = SPECIAL,
        p: float = 0.15) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Corrupt ids (B, T) for masked language modelling -> (ids, labels), new arrays.   BERT, Devlin et al., 2019, §3.1

    Each real, non-special position is chosen with probability p, at least one in the batch. A chosen one becomes [MASK] (80 %), a random
    non-special token (10 %) or stays (10 %); its label is what stood there, all other labels are -100.
    """
    if not 0 < p <= 1:
        raise ValueError(f"wanted a probability p in (0, 1], got {p}")
    reserved = np.array(sorted(special.values()))
    free = np.flatnonzero(mask & ~np.isin(ids, reserved))
    if not len(free):
        raise ValueError(f"wanted a real token that is not special in ids of shape {ids.shape}, got none: nothing to predict")
    chosen = free[rng.random(len(free)) < p]
    if not len(chosen):
        chosen = rng.choice(free, 1)
    labels, corrupted = np.full(ids.shape, IGNORE, np.int64), ids.copy()
    labels.flat[chosen] = ids.flat[chosen]
    fate = rng.random(len(chosen))
    corrupted.flat[chosen[fate < 0.8]] = special["[MASK]"]
    random = chosen[(fate >= 0.8) & (fate < 0.9)]
    corrupted.flat[random] = rng.choice(np.setdiff1d(np.arange(vocab), reserved), len(random))
    return corrupted, labels


def one_of(what: str, got: str, wanted: Sequence[str]) -> None:
    if got not in wanted:
        raise ValueError(f"wanted {what} to be one of {', '.join(wanted)}; got {got!r}")

"""Batches of examples that can be stopped and resumed at any point, and the encoding of texts into them.

    Batches, text_batches, lm_batches, mlm_batches      endless, shuffled, resumable;  .once() is one plain pass

A batch is a dict of NumPy arrays:  ids (B, T) int64;  mask (B, T) bool, True where a token is real;  labels (B,) int64
for classification, or (B, T) int64 for masked language modelling with -100 where nothing is predicted. Causal
language models need no labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from .. import checks
from ..identity import describe, describe_changed, fingerprint, rows_as_arrays
from ..keywords import checked_keywords
from ..tokens import all_special, encode_text, padding_id, plain, special_ids
from .text import PAD, SPECIAL, shipped_tokenizer

IGNORE = -100  # the label of a position at which nothing is predicted
CHOOSE, SWAP, FIXED, ORDER, NOISE, ONCE = range(6)  # the purposes of random streams: no two purposes share a stream
STREAM_STATE = ("seed", "epoch", "batch")  # the attributes that determine all batches to come
LARGEST_ID = 2**31 - 1  # of a token; a vocabulary has at most one more
POOL = 16  # examples are sorted by length within pools of this many batches


def generator(seed: int, *stream: int) -> np.random.Generator:
    """One of many independent random generators of a seed. The same stream numbers give the same generator."""
    seed = checks.whole("seed", seed, 0)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))


@checked_keywords
class Batches:
    """An endless, resumable stream of batches over a sequence of examples.

    examples    any sequence with a length and integer indices
    collate     (list of examples, rng) -> batch; rng is for random corruption (masked language modelling).
                The fields of a dataclass are a part of the stream's fingerprint; any other function is not
    shuffle     a new order in every epoch; each epoch visits every example exactly once
    drop_last   leave out the last batch of an epoch if it is short; the order decides which examples are left out
    lengths     one per example: batches group examples of similar length, which saves padding;
                the order still changes from epoch to epoch

    Every random draw is a function of (seed, epoch, batch). So `state_dict()` is a few integers and a fingerprint of
    the examples, and after `load_state_dict(state)` the stream continues bitwise.
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
        """Start at the first batch of epoch 0. The class describes the arguments.

        collate makes a batch of a list of examples. Without it, the examples are arrays of token ids of one length.
        With lengths, a batch holds examples of similar length. TypeError or ValueError for arguments that do not fit.
        """
        check_sequence("Batches: examples", examples)
        batch_size = checks.whole("Batches: batch_size", batch_size, 1)
        seed = checks.whole("Batches: seed", seed, 0)
        shuffle = checks.flag("Batches: shuffle", shuffle)
        drop_last = checks.flag("Batches: drop_last", drop_last)
        if collate is not None:
            checks.function("Batches: collate", collate, "a function (list of examples, rng) -> batch")
        if len(examples) == 0:
            raise ValueError("Batches wants at least one example, got an empty dataset")
        if drop_last and len(examples) < batch_size:
            raise ValueError(
                f"Batches wants at least one full batch of {batch_size} with drop_last, got {len(examples)} examples"
            )
        if lengths is not None:
            lengths = check_lengths(lengths, len(examples))
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.collate = collate or _stack
        self.drop_last = drop_last
        self.lengths = lengths
        self.epoch = 0
        self.batch = 0  # number of batches of this epoch that were returned
        self._order = self._epoch_order()
        self._content: str | None = None  # computed when it is first asked for

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

    def state_dict(self) -> dict[str, int | bool | str]:
        """The position in the stream with its seed, and the settings that must agree on loading. JSON-able.

        "content" is a fingerprint of the examples. The first call reads all of them, about a second for a gigabyte;
        examples that are no array, list or tuple have none.
        """
        position = {name: getattr(self, name) for name in STREAM_STATE}
        state = position | self._settings()
        if self.content():
            state["content"] = self.content()
        return state

    def load_state_dict(self, state: Mapping[str, int | bool | str]) -> None:
        """Go to the position at which `state` was taken, and take its seed.

        ValueError if the state belongs to other examples or to other settings; then the stream stays at its position.
        The content of the examples is compared if both have a fingerprint.
        """
        checks.instance("Batches.load_state_dict: state", state, Mapping, "the dict of state_dict()")
        wanted = []
        for name, value in self._settings().items():
            if state.get(name) != value:
                wanted.append(f"{name} {value}, got {state.get(name)}")
        for name in STREAM_STATE:  # seed, epoch, batch
            value = state.get(name)
            if type(value) is not int or value < 0:
                wanted.append(f"a whole number {name} of at least 0, got {value!r}")
            elif name == "batch" and value > len(self):
                wanted.append(f"a batch of at most {len(self)}, got {value}")
        if not wanted and state.get("content") and not self._has_content(state["content"]):
            wanted.append("the examples of this stream, got one of other examples")
        if wanted:
            raise ValueError(f"Batches.load_state_dict wants a state with {'; '.join(wanted)}")
        for name in STREAM_STATE:
            setattr(self, name, state[name])
        self._order = self._epoch_order()  # depends on the seed and the epoch

    def content(self) -> str:
        """A fingerprint of the examples, and of a collate that is a dataclass; "" for examples that are not compared.

        Computed once. Only arrays, lists and tuples are compared: a class of the user's may read its examples lazily,
        or hold more than its examples. Of the collate, fields with their default values do not count.
        """
        if self._content is None:
            self._content = self._fingerprint(describe_changed)
        return self._content

    def _fingerprint(self, describe_collate: Callable[[Any], Any]) -> str:
        """The fingerprint of the examples and of the description of the collate; "" if there is none."""
        if not isinstance(self.examples, (np.ndarray, list, tuple, range)):
            return ""
        try:
            collate = describe_collate(self.collate) if dataclasses.is_dataclass(self.collate) else None
            return fingerprint([rows_as_arrays(self.examples), self.lengths, collate])
        except TypeError:  # an example of a kind that has no content to read
            return ""

    def _has_content(self, saved: str) -> bool:
        """True unless the examples and the collate have another fingerprint.

        Earlier versions counted all fields of the collate.
        """
        return self.content() in ("", saved) or self._fingerprint(describe) == saved

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
        if self.lengths is None or len(order) < self.batch_size:  # one short batch: nothing to group
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


def check_sequence(name: str, value: Any) -> None:
    """Raise TypeError unless a value has a length and integer indices, and is neither a string nor a mapping."""
    has_indices = isinstance(value, Sized) and callable(getattr(value, "__getitem__", None))
    has_axis = getattr(value, "shape", None) != ()
    if not has_indices or not has_axis or isinstance(value, (str, bytes, Mapping, type)):
        raise TypeError(f"{name} wants a sequence, such as a list or an array; got {checks.brief(value)}")


def check_lengths(lengths: Any, count: int) -> np.ndarray:
    """One length per example as an array, (count,)."""
    check_sequence("Batches: lengths", lengths)
    if len(lengths) != count:
        raise ValueError(f"Batches wants one length per example, got {len(lengths)} lengths and {count} examples")
    return np.array([checks.number("Batches: lengths", length, 0) for length in lengths])


# ---------------------------------------------------------------------------------------------------- texts
@checked_keywords
class Examples(NamedTuple):
    """Texts and their labels, (N,) int64."""

    texts: tuple[str, ...]
    labels: np.ndarray


def read_array(name: str, value: Any) -> np.ndarray:
    """The value as a NumPy array. TypeError for rows of different lengths, and arrays of another library."""
    try:
        return np.asarray(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} wants an array, or lists of one length; got {checks.brief(value)}") from None


def read_examples(name: str, examples: Any) -> Examples:
    """Examples from an object with texts and labels, a pair of these, or a list of pairs (text, label); checked.

    TypeError for texts that are no strings and labels that are no whole numbers; ValueError for another number of
    labels than texts, and for a label that is neither a class (0, 1, ...) nor -100 (none).

    name: the function that reads them; the messages begin with it.
    """
    wanted = f"{name}: examples wants a pair (texts, labels), or a list of pairs (text, number of its class)"
    if getattr(examples, "texts", None) is not None and getattr(examples, "labels", None) is not None:
        examples = (examples.texts, examples.labels)
    if not isinstance(examples, (list, tuple)):
        raise TypeError(f"{wanted}; got {checks.brief(examples)}")
    if all(_is_pair(example) for example in examples):
        texts = [text for text, _ in examples]
        labels = [label for _, label in examples]
    elif len(examples) == 2 and not any(isinstance(part, str) for part in examples):
        texts, labels = examples
    else:
        raise TypeError(f"{wanted}; got {checks.brief(examples)}")
    check_sequence(f"{name}: texts", texts)
    check_sequence(f"{name}: labels", labels)
    if len(texts) != len(labels):
        raise ValueError(f"{name} wants one label per text, got {len(texts)} texts and {len(labels)} labels")
    texts = tuple(checks.instance(f"{name}: a text", text, str, "a string") for text in texts)
    return Examples(texts, np.array([_read_label(name, label) for label in labels], np.int64))


def _is_pair(example: Any) -> bool:
    """True for (text, label): a string and something that is no string."""
    if not isinstance(example, (list, tuple)) or len(example) != 2:
        return False
    return isinstance(example[0], str) and not isinstance(example[1], str)


def _read_label(name: str, label: Any) -> int:
    """A label as a class number, or -100 for none. True and False are the classes 1 and 0."""
    if isinstance(label, (bool, np.bool_)):
        return int(label)
    number = checks.whole(f"{name}: a label, the number of a class,", label)
    if not 0 <= number <= LARGEST_ID and number != IGNORE:
        raise ValueError(f"{name}: a label wants a class (0, 1, ...) or {IGNORE} for none, got {number}")
    return number


def check_tokens(name: str, tokens: Any) -> np.ndarray:
    """Token ids as an array (N,) of integers; a view where they are one. `name` is the function that wants them."""
    wanted = f"{name}: tokens wants the ids of a text, (N,) whole numbers, such as tokenizer.encode(text).ids"
    if isinstance(tokens, (str, bytes)):
        raise TypeError(f"{wanted}; got the text itself, {checks.brief(tokens)}")
    array = read_array(f"{name}: tokens", tokens)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{wanted}; got {checks.brief(tokens)}")
    if array.ndim != 1:
        raise ValueError(f"{wanted}; got an array of shape {array.shape}")
    if array.size and array.min() < 0:
        raise ValueError(f"{wanted} of at least 0; got {array.min()}")
    return array


@checked_keywords
def windows(tokens: np.ndarray, T: int) -> np.ndarray:
    """(N,) tokens -> (N // T, T): consecutive windows without overlap; the rest at the end is dropped.

    TypeError for tokens that are no whole numbers, ValueError for a T outside 1 to N.
    """
    return _cut("windows", tokens, T)


def _cut(name: str, tokens: Any, T: Any, extra: int = 0) -> np.ndarray:
    """The windows of T − extra tokens for the function `name`, whose rows have `extra` special tokens."""
    tokens = check_tokens(name, tokens)
    T = checks.whole(f"{name}: T", T, 1 + extra)
    if len(tokens) < T - extra:
        raise ValueError(f"{name} wants at least {T - extra} tokens for T={T}, got {len(tokens)} of them")
    count = len(tokens) // (T - extra)
    return tokens[: count * (T - extra)].reshape(count, T - extra)


# The kinds of special tokens before and after a text. A BERT classifies at the first token, a GPT at the last.
FORMS = {"bert": (("cls",), ("sep",)), "gpt": ((), ("eos",))}


@checked_keywords
def encode(tokenizer: Tokenizer, text: str, max_len: int, form: str = "bert") -> list[int]:
    """Token ids of a text, cut to max_len.  "bert": [CLS] x [SEP];  "gpt": x <|endoftext|>.

    A BERT classifies at [CLS], a GPT at the last token. The ids of the special tokens are this tokenizer's; padding
    and truncation stored in it are not applied, and it is not changed. Raises ValueError if max_len leaves no room for
    the text, or if the tokenizer lacks a special token.
    """
    tokenizer = plain("encode", tokenizer)
    before, after, room = _special_around("encode", tokenizer, max_len, form)
    return before + encode_text("encode", tokenizer, text)[:room] + after


def _special_around(name: str, tokenizer: Tokenizer, max_len: Any, form: Any) -> tuple[list[int], list[int], int]:
    """The ids before and after every text of this form, and the number of tokens that are left for the text."""
    first, last = FORMS[checks.one_of(f"{name}: form", form, FORMS)]
    count = len(first) + len(last)
    if checks.whole(f"{name}: max_len", max_len) <= count:
        least = count + 1
        raise ValueError(f"{name} wants a max_len of at least {least} (special tokens and one more), got {max_len}")
    before = special_ids(name, tokenizer, *first)
    after = special_ids(name, tokenizer, *last)
    return before, after, max_len - count


@checked_keywords
def pad(
    rows: Sequence[Sequence[int]], max_len: int | None = None, multiple: int = 8, pad_id: int = PAD
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids -> ids (B, T) int64, padded on the right with pad_id, and mask (B, T) bool, False at padding.

    T is the length of the longest row, rounded up to a multiple (few different shapes are faster), at most max_len.
    A model gives the same output for any pad_id of its vocabulary; 0 is the shipped tokenizer's [PAD].
    """
    check_sequence("pad: rows", rows)
    checks.whole("pad: multiple", multiple, 1)
    checks.whole("pad: pad_id", pad_id, 0, LARGEST_ID)
    rows = [check_tokens("pad", row) for row in rows]
    longest = max((len(row) for row in rows), default=0)
    if longest == 0:
        raise ValueError(f"pad wants at least one row with a token, got {len(rows)} rows and no token")
    if max_len is not None and longest > checks.whole("pad: max_len", max_len, 1):
        raise ValueError(f"pad wants rows of at most {max_len} tokens, got one of {longest}")
    T = -(-longest // multiple) * multiple  # rounded up
    if max_len is not None:
        T = min(T, max_len)
    ids = np.full((len(rows), T), pad_id, np.int64)
    mask = np.zeros((len(rows), T), bool)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = row
        mask[b, : len(row)] = True
    return ids, mask


@dataclasses.dataclass(frozen=True)
class PadTexts:
    """The collate of `text_batches`: (ids of a text, label) pairs -> a batch, padded with pad_id."""

    max_len: int
    pad_id: int

    def __call__(self, chosen: list[tuple[np.ndarray, int]], rng: np.random.Generator) -> dict[str, np.ndarray]:
        ids, mask = pad([row for row, _ in chosen], self.max_len, pad_id=self.pad_id)
        labels = np.array([label for _, label in chosen], np.int64)
        return {"ids": ids, "mask": mask, "labels": labels}


@checked_keywords
def text_batches(
    examples: Examples | Sequence,
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

    examples          Examples, a pair of lists (texts, labels), or a list of pairs (text, label). A label is the
                      number of a class: 0, 1, ...; -100 for a text without one
    max_len           longer texts are cut
    form              "bert" or "gpt", as in `encode`
    group_by_length   batches of texts of similar length, for less padding

    TypeError for texts that are no strings, or labels that are no whole numbers. ValueError for another number of
    labels than texts, a max_len without room, or a tokenizer that lacks a special token. The tokenizer is not changed.
    """
    examples = read_examples("text_batches", examples)
    tokenizer = plain("text_batches", tokenizer)
    before, after, room = _special_around("text_batches", tokenizer, max_len, form)
    rows = []
    for text, label in zip(examples.texts, examples.labels.tolist(), strict=True):
        ids = encode_text("text_batches", tokenizer, text)[:room]
        rows.append((np.array(before + ids + after, np.int64), label))
    grouped = checks.flag("text_batches: group_by_length", group_by_length)
    lengths = [len(row) for row, _ in rows] if grouped else None
    collate = PadTexts(max_len, padding_id(tokenizer))
    return Batches(rows, batch_size, seed, shuffle, collate, drop_last, lengths)


def _stack(chosen: list[np.ndarray], rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
    """A batch of token ids of one length. Examples of other kinds need a collate of their own."""
    rows = [np.asarray(row) for row in chosen]
    if any(row.shape != rows[0].shape or row.ndim != 1 or row.dtype.kind not in "iu" for row in rows):
        raise ValueError(
            "Batches without collate wants examples that are token ids of one length, "
            f"got {', '.join(checks.brief(row) for row in chosen[:3])}"
        )
    ids = np.stack(rows).astype(np.int64)  # (B, T)
    return {"ids": ids, "mask": np.ones(ids.shape, bool)}


@checked_keywords
def lm_batches(
    tokens: np.ndarray, T: int, batch_size: int, seed: int = 0, shuffle: bool = True, drop_last: bool = False
) -> Batches:
    """Batches for causal language modelling: ids (B, T), mask (B, T) all True.

    The rows are cut from the tokens (N,), an array or a list of ids, without overlap. There are no labels: each token
    is the label of the token before it. T: at most the model's positions. TypeError for a text or other tokens that
    are no whole numbers, ValueError for fewer tokens than T.
    """
    return Batches(_cut("lm_batches", tokens, T), batch_size, seed, shuffle, _stack, drop_last)


@dataclasses.dataclass(frozen=True)
class MaskTokens:
    """The collate of `mlm_batches`: rows of ids -> [CLS] row [SEP], corrupted by `mlm`."""

    cls: int
    sep: int
    vocab: int
    special: dict[str, int]
    p: float

    def __call__(self, chosen: list[np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        batch = _stack([np.concatenate([[self.cls], row, [self.sep]]) for row in chosen])
        ids, labels = mlm(batch["ids"], batch["mask"], rng, self.vocab, self.special, self.p)
        return {"ids": ids, "mask": batch["mask"], "labels": labels}


@checked_keywords
def mlm_batches(
    tokens: np.ndarray,
    T: int,
    batch_size: int,
    vocab: int | None = None,
    seed: int = 0,
    shuffle: bool = True,
    p: float = 0.15,
    drop_last: bool = False,
    tokenizer: Tokenizer | None = None,
) -> Batches:
    """Batches for masked language modelling: ids (B, T) are [CLS] T−2 tokens [SEP], corrupted anew in every epoch.

    `mlm` corrupts them: p is the share of positions that are predicted. Labels are (B, T), -100 at all other positions.
    The tokens (N,) are cut without overlap.

    tokenizer   that made the tokens, the shipped one by default: its ids of [CLS], [SEP] and [MASK] are written, and
                no special token of it is drawn or predicted
    vocab       the random tokens are drawn below it; the size of the tokenizer's vocabulary unless given

    TypeError for a text or other tokens that are no whole numbers. ValueError for fewer tokens than T − 2, a token
    outside the vocabulary, a tokenizer without a special token, or a vocab of another tokenizer than the shipped one.
    """
    rows = _cut("mlm_batches", tokens, T, extra=2)
    p = checks.number("mlm_batches: p", p, above=0, high=1)
    if vocab is not None:
        vocab = checks.whole("mlm_batches: vocab", vocab, 1, LARGEST_ID + 1)
    if tokenizer is not None:
        tokenizer = plain("mlm_batches", tokenizer)
    else:
        tokenizer = shipped_tokenizer()
        size = tokenizer.get_vocab_size()
        if vocab not in (None, size):
            raise ValueError(
                f"mlm_batches wants the tokenizer of these tokens (tokenizer=...) with a vocab of {vocab}, "
                f"got none, and the shipped one has {size}"
            )
    cls, sep, mask = special_ids("mlm_batches", tokenizer, "cls", "sep", "mask")
    special = {**all_special(tokenizer), "[MASK]": mask}
    if vocab is None:
        vocab = max(tokenizer.get_vocab().values()) + 1
    largest = max(int(rows.max()), *special.values())
    if largest >= vocab:
        raise ValueError(f"mlm_batches wants tokens below the vocab of {vocab}, got the id {largest}")
    return Batches(rows, batch_size, seed, shuffle, MaskTokens(cls, sep, vocab, special, p), drop_last)


@checked_keywords
def mlm(
    ids: np.ndarray,
    mask: np.ndarray,
    rng: np.random.Generator,
    vocab: int,
    special: Mapping[str, int] = SPECIAL,
    p: float = 0.15,
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupt ids (B, T) for masked language modelling -> (ids, labels), new arrays.   BERT, Devlin et al., 2019, §3.1

    mask: (B, T), True at real tokens, False at padding. A position can be chosen if its token is real and not special.
    Each of these is chosen with probability p, independently of the others. If none was, one of them is chosen at
    random. A chosen token becomes [MASK] (80 %) or a random token (10 %), or it stays (10 %). Its label is the original
    token. All other positions keep their token, and their label is -100.

    rng: makes all random choices. vocab: a random token is one of the ids 0 ... vocab − 1 that are not special.
    special: {token: id} of the special tokens, [MASK] among them; the shipped tokenizer's by default.
    Raises ValueError if no position can be chosen, or if all ids below vocab are special.
    """
    ids = read_array("mlm: ids", ids)
    mask = read_array("mlm: mask", mask).astype(bool)
    _check_mlm(ids, mask, rng, vocab, special, p)
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


def _check_mlm(ids: np.ndarray, mask: np.ndarray, rng: Any, vocab: Any, special: Any, p: Any) -> None:
    """Raise TypeError or ValueError unless the arguments of `mlm` fit each other."""
    checks.random_generator("mlm: rng", rng)
    checks.number("mlm: p", p, above=0, high=1)
    checks.whole("mlm: vocab", vocab, 1, LARGEST_ID + 1)
    if ids.dtype.kind not in "iu" or ids.shape != mask.shape:
        raise ValueError(
            f"mlm wants ids (B, T), whole numbers, and a mask of their shape, got {ids.dtype} ids {ids.shape} "
            f"and a mask {mask.shape}"
        )
    if not isinstance(special, Mapping) or "[MASK]" not in special:
        raise ValueError(f"mlm wants the ids of special tokens with one of [MASK], got {checks.brief(special)}")
    if sum(0 <= number < vocab for number in set(special.values())) == vocab:
        raise ValueError(f"mlm wants a vocab with a token that is not special, got {vocab}")

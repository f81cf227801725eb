"""A teacher's outputs on disk: an epoch pays the teacher once, and later epochs and other runs read them.

    cache = TeacherCache("work/teacher", teacher, k=64)
    fit(student, batches, steps, loss=Hinton(cache))

An entry belongs to a row of a batch, whatever batch it comes in: its key is a digest of the row's real ids, of its
source, of its other facts, and of the positions that have a label. It holds the k largest logits of each such position,
largest first, with their classes, and the tail: for some temperatures, the sum over all other classes. The entries lie
in files of many rows, each written at once and never changed.

Random masks make new rows in every epoch, so nothing is found again: of masked language models, cache fixed batches.
A teacher whose outputs for a row depend on its batch (a Switch layer does not; a batch norm would) cannot be cached.
"""
from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ... import array, checks
from ...context import check_range
from ...identity import fingerprint
from ...keywords import checked_keywords
from ...nn import Module
from ...tensor import Tensor
from ...train.batch import Endless, Targets, iterate, read_batch
from .row_files import find_rows, read_row_files, write_row_file
from .soft import CachedTargets, run_teacher

FLUSH = 1 << 22                                          # bytes of new entries, from which on a file is written
TEMPERATURES = (1.0, 2.0)                                # the defaults of WordLevel and of Hinton


@dataclass
class Entry:
    """The teacher's outputs for the n labelled positions of a row.

    values (n, k) logits, columns (n, k) their classes, tails {T: (n,) log Σ exp(z / T) over the other classes}"""
    values: np.ndarray
    columns: np.ndarray
    tails: dict[float, np.ndarray]

    def tail_columns(self, temperatures: Sequence[float]) -> np.ndarray:
        """The tails at these temperatures, (n, S)."""
        return np.stack([self.tails[T] for T in temperatures], axis=-1)


@checked_keywords
class TeacherCache:
    """The k largest logits of a teacher, by row, in a folder.

    folder   of the files; made if it is not there
    teacher  the model; None: only rows that the folder holds can be read
    k        the number of logits of each position; None: all of them
    temperatures   of the losses that will read the cache. `fill` computes the tails for these, from the same pass as
                   the logits. A loss with another temperature works too: the teacher runs again on each row, once

    Exact: the teacher's probabilities of the k classes, and the probability of all other classes together (the tail),
    at the temperature of the loss. Approximated: the others count as one class, so the loss is KL of k + 1
    probabilities. It is at most the loss of the teacher itself, and 0 where student and teacher are the same. It says
    nothing about single classes of the tail. With k=None the loss is that of the teacher itself.

    All entries are held in memory, 8 k + 4 S bytes for a position and S temperatures.

    A run that is resumed wants a cache of the same teacher with the same k. TypeError or ValueError for values without
    meaning, for a folder with outputs of another teacher or with another k, and for a damaged file."""

    def __init__(
        self, folder: str | os.PathLike, teacher: Module | None = None, k: int | None = 64,
        temperatures: Sequence[float] = TEMPERATURES,
    ):
        checks.instance("TeacherCache: folder", folder, (str, os.PathLike), "a path")
        if teacher is not None:
            checks.instance("TeacherCache: teacher", teacher, Module, "a model or None")
        if k is not None:
            checks.whole("TeacherCache: k", k, least=1)
        self._folder = Path(folder)
        self._teacher = teacher
        self._entries: dict[bytes, Entry] = {}
        self._new: list[bytes] = []                      # keys of the entries that are not on disk yet
        self._classes: int | None = None                 # V, once an output is known
        self._passes = 0
        self.of = None if teacher is None else fingerprint(teacher)
        self.k = k
        self._temperatures = read_temperatures(temperatures)
        self._read_files()
        if self.of is None:
            raise ValueError(f"TeacherCache wants a teacher, or a folder that holds the outputs of one; {folder} holds "
                             "none")

    def __len__(self) -> int:
        """The number of rows that can be read at all of the cache's temperatures."""
        return len(self._entries) - len(self._lacking(self._entries, self._temperatures))

    @property
    def passes(self) -> int:
        """The number of rows that the teacher computed, through this object."""
        return self._passes

    # ── reading and writing ──
    def _read_files(self) -> None:
        """Take the entries of all files of the folder.

        Without a teacher, the cache's temperatures become those that all files have."""
        in_files = []
        for file, arrays, facts in read_row_files(self._folder):
            self._check_facts(file, facts)
            self._classes = facts.get("classes")
            in_files.append(facts.get("temperatures", []))
            self._add_file(file, arrays, in_files[-1])
        if self._teacher is None and in_files:
            self._temperatures = sorted(set.intersection(*map(set, in_files)))

    def _check_facts(self, file: Path, facts: dict[str, Any]) -> None:
        """ValueError unless a file is of this teacher with this k. Without a teacher, the first file decides."""
        if self.of is None:
            self.of, self.k = facts.get("of"), facts.get("k")
        if facts.get("of") != self.of:
            raise ValueError(f"TeacherCache wants outputs of this teacher, got {file} of another one: take another "
                             "folder")
        if facts.get("k") != self.k:
            raise ValueError(f"TeacherCache wants k={self.k}, got {file} with k={facts.get('k')}: take another folder")

    def _add_file(self, file: Path, arrays: dict[str, np.ndarray], temperatures: list[float]) -> None:
        """Take the entries of one file, which has tails for these temperatures. ValueError if it is damaged."""
        names = ["values", "columns", "tails"] if temperatures else ["values", "columns"]
        rows = find_rows(file, arrays, names)
        values, columns = arrays["values"], arrays["columns"]
        every_tail = arrays.get("tails", np.zeros((len(values), 0), np.float32))
        if values.shape != columns.shape or every_tail.shape[1:] != (len(temperatures),):
            raise ValueError(f"{file} is damaged: its logits, classes and tails do not fit")
        for key, own in rows:
            self._add(key, Entry(values[own], columns[own], dict(zip(temperatures, every_tail[own].T))))

    def _add(self, key: bytes, entry: Entry) -> None:
        """Take an entry. Tails of other temperatures that the cache has of this row are kept."""
        if key in self._entries:
            entry.tails = self._entries[key].tails | entry.tails
        self._entries[key] = entry

    def _lacking(self, keys: Iterable[bytes], temperatures: Sequence[float]) -> list[int]:
        """The indices of the keys without an entry, or whose entry lacks the tail of one of these temperatures."""
        wanted = set(temperatures)
        indices = []
        for i, key in enumerate(keys):
            entry = self._entries.get(key)
            if entry is None or not (self._is_whole(entry) or entry.tails.keys() >= wanted):
                indices.append(i)
        return indices

    def _is_whole(self, entry: Entry) -> bool:
        """True for an entry with the logits of all classes: it needs no tail."""
        return self.k is None or entry.columns.shape[-1] == self._classes

    def flush(self) -> None:
        """Write all new entries, as one more file. A reader sees the whole file or none."""
        if not self._new:
            return
        entries = [self._entries[key] for key in self._new]
        temperatures = [] if self._is_whole(entries[0]) else self._temperatures
        arrays = {
            "keys": np.frombuffer(b"".join(self._new), np.uint8).reshape(len(entries), -1),
            "counts": np.array([len(entry.values) for entry in entries], np.int64),
            "values": np.concatenate([entry.values for entry in entries]),
            "columns": np.concatenate([entry.columns for entry in entries]),
        }
        if temperatures:
            arrays["tails"] = np.concatenate([entry.tail_columns(temperatures) for entry in entries])
        facts = {"of": self.of, "k": self.k, "temperatures": temperatures, "classes": self._classes}
        write_row_file(self._folder, arrays, facts)
        self._new = []

    # ── use ──
    def fill(self, batches: Iterable) -> int:
        """Compute and write the outputs for all rows of these batches; the number of rows that were new.

        Of an endless `data.Batches`, every example is taken once. A fill that was stopped goes on where it stood."""
        before = self._passes
        for batch in iterate(batches.once() if isinstance(batches, Endless) else batches):
            self.look_up(read_batch(batch))
        self.flush()
        return self._passes - before

    def look_up(self, targets: Targets, temperature: float | None = None) -> CachedTargets:
        """The targets with the teacher's logits, and the tail at a temperature.

        temperature: of the loss; None: no tail is returned. Rows that the cache lacks go through the teacher, all in
        one pass; so do those of which it lacks the tail at this temperature (None: at one of its own temperatures).
        ValueError for a batch of embeddings, and for a row that the cache lacks without a teacher."""
        if isinstance(targets.ids, Tensor):
            raise ValueError("TeacherCache wants batches of ids, got embeddings: these have no key")
        keys = row_keys(targets)
        wanted = self._temperatures if temperature is None else [float(temperature)]
        missing = self._lacking(keys, wanted)
        if missing:
            self._compute(targets, keys, missing, wanted)
        entries = [self._entries[key] for key in keys]
        tail = None
        if temperature is not None and not self._is_whole(entries[0]):
            tail = np.concatenate([entry.tails[float(temperature)] for entry in entries])
        return CachedTargets(
            **vars(targets), teacher_values=np.concatenate([entry.values for entry in entries]),
            teacher_columns=np.concatenate([entry.columns for entry in entries]), teacher_tail=tail,
            teacher_classes=self._classes,
        )

    def _compute(self, targets: Targets, keys: list[bytes], missing: list[int], wanted: Sequence[float]) -> None:
        """Take the teacher's outputs for some rows of a batch into the cache, with the tails of all its temperatures.

        wanted: the temperatures of the caller, which are the cache's from now on."""
        if self._teacher is None:
            tails = " with tails at the temperature " + ", ".join(map(str, wanted)) if wanted else ""
            raise ValueError(f"TeacherCache wants a teacher for the {len(missing)} rows of this batch that "
                             f"{self._folder} does not hold{tails}")
        check_range("token id", targets.ids, self._teacher.embed.in_features,
                    f"the teacher's vocabulary of {self._teacher.embed.in_features}")
        if not set(wanted) <= set(self._temperatures):
            self.flush()                                 # all rows of a file have tails of the same temperatures
            self._temperatures = sorted({*self._temperatures, *wanted})
        rows = row_of_logits(targets)
        logits = array.asnumpy(run_teacher(self._teacher, targets).output.data)
        logits = logits.reshape(-1, logits.shape[-1])                            # (N, V)
        self._classes = logits.shape[-1]
        logits = logits.astype(np.float32)
        values, columns = largest(logits, self.k)
        temperatures = self._temperatures if columns.shape[-1] < self._classes else []
        tails = tail_sums(logits, columns, temperatures)                         # (N, S)
        for key, i in {keys[i]: i for i in missing}.items():                     # two rows may have one key
            own = rows == i
            self._add(key, Entry(values[own], columns[own], dict(zip(temperatures, tails[own].T))))
            self._new.append(key)
        self._passes += len(missing)
        if sum(self._entries[key].values.nbytes for key in self._new) > FLUSH:
            self.flush()


def read_temperatures(temperatures: Any) -> list[float]:
    """The temperatures of a cache, each once, in their order. TypeError or ValueError for values without meaning."""
    if not isinstance(temperatures, (list, tuple)):
        raise TypeError("TeacherCache: temperatures wants a tuple of numbers, such as (1.0, 2.0), "
                        f"got {checks.brief(temperatures)}")
    numbers = [float(checks.number("TeacherCache: a temperature", T, above=0)) for T in temperatures]
    return sorted(set(numbers))


def tail_sums(logits: np.ndarray, columns: np.ndarray, temperatures: list[float]) -> np.ndarray:
    """log Σ exp(z / T) over the classes that are not among the columns, for each temperature: (N, S) float32.

    logits (N, V), columns (N, k), S temperatures. −∞ where k = V: there are no others."""
    if not temperatures:
        return np.zeros((len(logits), 0), np.float32)
    rest = logits.astype(np.float64)
    np.put_along_axis(rest, columns.astype(np.int64), -np.inf, axis=-1)
    top = rest.max(axis=-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)             # −∞ − −∞ is no number
    sums = []
    for T in temperatures:
        with np.errstate(divide="ignore"):               # log 0 = −∞
            sums.append(top[:, 0] / T + np.log(np.exp((rest - top) / T).sum(axis=-1)))
    return np.stack(sums, axis=-1).astype(np.float32)


def largest(logits: np.ndarray, k: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The k largest entries of each row, largest first, and their columns: (N, V) -> (N, k), (N, k).

    columns are int32.  k=None, or a k above V: all V."""
    V = logits.shape[-1]
    if k is None or k >= V:
        columns = np.broadcast_to(np.arange(V), logits.shape)
    else:
        columns = np.sort(np.argpartition(-logits, k - 1, axis=-1)[:, :k], axis=-1)
    values = np.take_along_axis(logits, columns, axis=-1)
    order = np.argsort(-values, axis=-1, kind="stable")
    columns = np.take_along_axis(columns, order, axis=-1).astype(np.int32)
    return np.take_along_axis(values, order, axis=-1), columns


def row_of_logits(targets: Targets) -> np.ndarray:
    """The row of the batch to which each row of logits belongs, (N,)."""
    B, T = targets.ids.shape[:2]
    if targets.logit_positions is not None:
        return np.asarray(targets.logit_positions) // T
    return np.repeat(np.arange(B), len(targets.labels) // B)


def row_keys(targets: Targets) -> list[bytes]:
    """A digest for each row of a batch: of its real ids, its other facts, and the places of its labels.

    Padding does not count: a row has one key in every batch."""
    B, T = targets.ids.shape[:2]
    ids = np.asarray(targets.ids)
    mask = targets.facts.get("mask")
    real = np.ones((B, T), bool) if mask is None else np.asarray(mask)
    labelled = np.zeros((B, T), bool)
    if targets.logit_positions is not None:
        labelled.reshape(-1)[targets.logit_positions] = True
    elif len(targets.labels) == B * T:
        labelled[:] = True
    types = targets.facts.get("token_type_ids")
    per_row = {name: targets.facts[name] for name in ("task", "route") if name in targets.facts}
    source = targets.facts.get("source_ids")
    if source is not None:
        source_mask = targets.facts.get("source_mask")
        source_mask = np.ones(np.shape(source), bool) if source_mask is None else np.asarray(source_mask)
    keys = []
    for b in range(B):
        used = real[b] | labelled[b]
        parts = [ids[b][used], labelled[b][used], real[b][used]]
        if types is not None:
            parts.append(np.asarray(types)[b][used])
        if source is not None:
            parts.append(np.asarray(source)[b][source_mask[b]])
        parts += [np.asarray(value)[b:b + 1] for value in per_row.values()]
        digest = hashlib.blake2b(digest_size=16)
        for part in parts:
            digest.update(np.ascontiguousarray(part, np.int64).tobytes() + b";")
        keys.append(digest.digest())
    return keys


def read_with_teacher(name: str, teacher: Any, batch: Any, temperature: float) -> Targets:
    """Read a batch, with the teacher's logits if the teacher is a cache.  TypeError for a teacher of another kind.

    name, temperature: of the loss."""
    targets = read_batch(batch)
    if isinstance(teacher, TeacherCache):
        return teacher.look_up(targets, temperature)
    checks.instance(f"{name}: teacher", teacher, Module, "a model or a TeacherCache")
    return targets

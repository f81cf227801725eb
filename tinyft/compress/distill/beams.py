"""The K best texts of a teacher for each source, on disk: a source is decoded once, for all methods and epochs.

    beams = TeacherBeams("work/beams", teacher, end=0, max_new_tokens=20, beams=35)
    beams.fill(batches)                                  now; without it, when a batch is first read

An entry belongs to a source, whatever batch the source comes in: its key is a digest of the source's real ids. It holds
the hypotheses of `beam_search`, best first. Each search writes its entries into one new file; files are never changed.
So a process that is killed loses only the search that was running. The next process reads the files of all others.
"""
from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from ... import checks
from ...beam import GNMTPenalty, Hypothesis, beam_search, longest_reach
from ...context import check_range
from ...identity import earlier_fingerprints, fingerprint
from ...keywords import checked_keywords
from ...models.encoder_decoder import EncoderDecoder
from ...train.batch import IGNORE, Endless, Targets, iterate, read_batch
from .row_files import find_rows, read_row_files, write_row_file

PER_HYPOTHESIS = ("lengths", "scores", "log_probs", "ended")            # the arrays of a file with an entry for each


@checked_keywords
class TeacherBeams:
    """The hypotheses of a teacher by beam search for each source, best first, in a folder.

    folder           the folder of the files. It is made if it does not exist. None: no files, entries in memory only
    teacher          an encoder-decoder
    end              the token that ends a text
    max_new_tokens   the longest text, the end included
    beams            K: 5 for sequence-level distillation, 35 for interpolation (Kim and Rush)
    n_best           the number of hypotheses that are kept for each source; None: K
    lp               the length penalty, as in beam_search
    coverage         β ≥ 0, the weight of the coverage penalty, as in beam_search

    TypeError or ValueError for values without meaning, for a folder of another teacher or with other settings, and for
    a damaged file."""

    def __init__(
        self, folder: str | os.PathLike | None, teacher: EncoderDecoder, *, end: int, max_new_tokens: int,
        beams: int = 5, n_best: int | None = None, lp: Callable[[int], float] = GNMTPenalty(),
        coverage: float = 0.0,
    ):
        checks.instance("TeacherBeams: teacher", teacher, EncoderDecoder, "an encoder-decoder")
        if folder is not None:
            checks.instance("TeacherBeams: folder", folder, (str, os.PathLike), "a path or None")
        self.teacher = teacher
        self.end = checks.whole("TeacherBeams: end", end, 0, teacher.embed.in_features - 1)
        self.max_new_tokens = checks.whole("TeacherBeams: max_new_tokens", max_new_tokens, least=1)
        self.beams = checks.whole("TeacherBeams: beams", beams, least=1)
        self.n_best = self.beams if n_best is None else checks.whole("TeacherBeams: n_best", n_best, least=1)
        self.lp = lp
        longest_reach(lp, max_new_tokens)                # raises for a wrong penalty
        self.coverage = float(checks.number("TeacherBeams: coverage", coverage, low=0))
        self.facts = {                                   # written into each file; of: the teacher
            "of": fingerprint(teacher), "end": self.end, "max_new_tokens": self.max_new_tokens, "beams": self.beams,
            "n_best": self.n_best, "lp": fingerprint(lp),
        }
        if self.coverage:                                # files of versions without it hold none
            self.facts["coverage"] = self.coverage
        self._penalties = earlier_fingerprints(lp)       # with those of versions in which lp had fewer fields
        self._folder = None if folder is None else Path(folder)
        self._entries: dict[bytes, list[Hypothesis]] = {}
        self._searches = 0
        if self._folder is not None:
            self._read_files(self._folder)

    def __len__(self) -> int:
        """The number of sources."""
        return len(self._entries)

    @property
    def searches(self) -> int:
        """The number of sources that the teacher has decoded for this object. Entries read from files do not count."""
        return self._searches

    @property
    def unfinished(self) -> int:
        """The number of sources for which no hypothesis has ended within max_new_tokens."""
        count = 0
        for hypotheses in self._entries.values():
            if not any(h.ended for h in hypotheses):
                count += 1
        return count

    def earlier_facts(self) -> list[dict[str, object]]:
        """The facts, and those that earlier versions gave to the same settings."""
        return [{**self.facts, "lp": penalty} for penalty in self._penalties]

    # ── use ──
    def fill(self, batches: Iterable) -> int:
        """Decode all new sources of these batches and write their entries. The result is the number of new sources.

        Of an endless `data.Batches`, every example is taken once. After a stop, call it again: only the sources without
        an entry are decoded."""
        before = self._searches
        if isinstance(batches, Endless):
            batches = batches.once()
        for batch in iterate(batches):
            self.look_up(read_batch(batch))
        return self._searches - before

    def look_up(self, targets: Targets) -> list[list[Hypothesis]]:
        """The hypotheses for each row of a batch, best first. New sources are decoded, all in one search.

        ValueError for a batch without a source, IndexError for a token that the teacher does not have."""
        self.check(targets)
        keys = source_keys(targets)
        rows: dict[bytes, int] = {}                      # the first row of each new source
        for row, key in enumerate(keys):
            if key not in self._entries:
                rows.setdefault(key, row)
        if rows:
            self._search(targets, rows)
        return [self._entries[key] for key in keys]

    def check(self, targets: Targets) -> None:
        """ValueError for a batch without a source, IndexError for one with a token that the teacher does not have."""
        source = targets.facts.get("source_ids")
        if source is None:
            raise ValueError("TeacherBeams wants batches of an encoder-decoder, with source_ids, got one without")
        labels = targets.labels[targets.labels != IGNORE]
        size = self.teacher.embed.in_features
        for tokens in (source, labels):
            check_range("token id", tokens, size, f"the teacher's vocabulary of {size}")

    def _search(self, targets: Targets, rows: dict[bytes, int]) -> None:
        """Decode some rows of a batch, and keep their entries. rows: {key of the source: row of the batch}."""
        index = list(rows.values())
        facts = {}
        for name in ("source_ids", "source_mask", "task"):
            if name in targets.facts:
                facts[name] = np.asarray(targets.facts[name])[index]
        if "route" in targets.facts:
            facts["route"] = [targets.facts["route"][row] for row in index]
        found = beam_search(self.teacher, None, self.max_new_tokens, beams=self.beams, end=self.end, lp=self.lp,
                            coverage=self.coverage, n_best=self.n_best, **facts)
        entries = dict(zip(rows, found, strict=True))
        if self._folder is not None:
            write_row_file(self._folder, pack_entries(entries), self.facts)
        self._entries.update(entries)
        self._searches += len(entries)

    def _read_files(self, folder: Path) -> None:
        """Read the entries of all files of the folder. ValueError for other facts, and for a damaged file."""
        in_words = {"of": "teacher", "lp": "length penalty"}                     # their values are digests
        for file, arrays, found in read_row_files(folder):
            facts = {"coverage": 0.0, **found}
            for name, value in {"coverage": 0.0, **self.facts}.items():
                if facts.get(name) == value or (name == "lp" and facts.get("lp") in self._penalties):
                    continue
                if name in in_words:
                    wanted, got = f"of this {in_words[name]}", f"those of another {in_words[name]}"
                else:
                    wanted, got = f"with {name}={value}", f"those with {name}={facts.get(name)}"
                raise ValueError(f"TeacherBeams wants hypotheses {wanted}, got {got} in {file}: take another folder")
            self._entries.update(unpack_entries(file, arrays))


# ── a file ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def pack_entries(entries: dict[bytes, list[Hypothesis]]) -> dict[str, np.ndarray]:
    """The arrays of a file.

    keys, counts                        for each source: its key, and the number of its hypotheses
    lengths, scores, log_probs, ended   for each hypothesis, source by source; lengths: the number of its tokens
    tokens                              of all hypotheses, one after another"""
    every = [h for hypotheses in entries.values() for h in hypotheses]
    tokens = [np.array(h.tokens, np.int64) for h in every]
    return {
        "keys": np.frombuffer(b"".join(entries), np.uint8).reshape(len(entries), -1),
        "counts": np.array([len(hypotheses) for hypotheses in entries.values()], np.int64),
        "tokens": np.concatenate(tokens),
        "lengths": np.array([len(h.tokens) for h in every], np.int64),
        "scores": np.array([h.score for h in every]),
        "log_probs": np.array([h.log_prob for h in every]),
        "ended": np.array([h.ended for h in every]),
    }


def unpack_entries(file: Path, arrays: dict[str, np.ndarray]) -> dict[bytes, list[Hypothesis]]:
    """The entries of a file from its arrays. ValueError if the arrays' lengths do not fit together."""
    rows = find_rows(file, arrays, PER_HYPOTHESIS, ["tokens"])
    tokens = arrays["tokens"]
    ends = arrays["lengths"].cumsum()                    # where the tokens of each hypothesis end
    if tokens.shape != (arrays["lengths"].sum(),):
        raise ValueError(f"{file} is damaged: its tokens and lengths do not fit")
    texts = [tuple(text.tolist()) for text in np.split(tokens, ends[:-1])]
    facts = [arrays[name].tolist() for name in ("scores", "log_probs", "ended")]
    every = [Hypothesis(*row) for row in zip(texts, *facts, strict=True)]
    return {key: every[own] for key, own in rows}


def source_keys(targets: Targets) -> list[bytes]:
    """The key of each row's source: a digest of its real ids, and of the row's task and route if it has them."""
    source = np.asarray(targets.facts["source_ids"])
    mask = targets.facts.get("source_mask")
    real = np.ones(source.shape, bool) if mask is None else np.asarray(mask)
    keys = []
    for row in range(len(source)):
        digest = hashlib.blake2b(source[row][real[row]].astype(np.int64).tobytes(), digest_size=16)
        for name in ("task", "route"):
            if name in targets.facts:
                digest.update(f";{name}={targets.facts[name][row]}".encode())
        keys.append(digest.digest())
    return keys

"""Sequence-level distillation: the student learns texts that the teacher wrote.  Kim, Rush 2016.  arXiv:1606.07947

    sequence-level    ŷ = the best text of the teacher's beam search for x                 L = − log p(ŷ | x)      §3.2
    interpolation     ỹ = argmax of BLEU(y, gold) over the K best texts y of the beam      L = − log p(ỹ | x)      §3.3

x is a source, gold its target in the data, p the student, q the teacher. Both methods replace the targets of a batch.
The loss stays the cross-entropy:

    beams = TeacherBeams("work/beams", teacher, end=0, max_new_tokens=20, beams=35)
    fit(student, SequenceLevel(beams).map(batches), steps)                                 learns ŷ
    fit(student, Interpolation(beams).map(batches), steps)                                 learns ỹ
    fit(student, SequenceLevel(beams).map(batches), steps, loss=WordLevel(teacher))        learns ŷ and q(· | x, ŷ_<j)

The paper decodes the training sources with K = 5 for ŷ and K = 35 for ỹ. Its student learns ŷ first, and then ỹ.

Departures: BLEU compares tokens, which are often parts of words. The score of a text has the length penalty of
`TeacherBeams`; GNMTPenalty(0.0) is no penalty, and the score is the paper's log q(y | x).
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ... import checks
from ...beam import Hypothesis
from ...identity import fingerprint, qualified_name
from ...keywords import checked_keywords
from ...tensor import Tensor
from ...train.batch import IGNORE, Endless, Resumable, Targets, iterate, read_batch
from .beams import TeacherBeams, source_keys
from .bleu import sentence_bleu
from .cache import row_of_logits


@checked_keywords
@dataclass(frozen=True, eq=False)
class NewTargets:
    """Replaces the target of each row of a batch by a text of the teacher. Subclasses write `choose`."""
    beams: TeacherBeams

    def __post_init__(self) -> None:
        checks.instance(f"{type(self).__name__}: beams", self.beams, TeacherBeams, "a TeacherBeams(folder, teacher)")

    def choose(self, hypotheses: Sequence[Hypothesis], gold: Sequence[int]) -> Hypothesis:
        """The hypothesis that becomes the target of a source.

        hypotheses   the teacher's for this source, best first
        gold         the tokens of its target in the data"""
        raise NotImplementedError(f"{type(self).__name__} has no choose(hypotheses, gold)")

    def choose_all(self, targets: Targets, golds: Sequence[Sequence[int]]) -> list[Hypothesis]:
        """The choice for each row of a batch, which has been read; golds: the data's target of each."""
        found = self.beams.look_up(targets)
        return [self.choose(hypotheses, gold) for hypotheses, gold in zip(found, golds, strict=True)]

    def map(self, batches: Iterable) -> Iterable:
        """The same batches with new targets.

        For endless batches that can be resumed, such as `data.Batches`, the result is endless and can be resumed, too.
        It maps each batch when it is read. Other batches are mapped at once; the result is a list. The teacher decodes
        each source once.
        TypeError if these are no batches; ValueError or IndexError as in `map_batch`."""
        if isinstance(batches, Endless) and isinstance(batches, Resumable):
            return MappedBatches(self, batches)
        return [self.map_batch(batch) for batch in iterate(batches)]

    def map_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """One batch with new targets: ids (B, T), the start token and a text in each row, and their mask.

        It has no labels: the model learns the next tokens of ids. Everything else in the batch stays. ValueError for a
        batch without a source or without tokens as targets, and for one whose ids begin with another token than the
        teacher's start token; IndexError for a token that the teacher does not have."""
        name = type(self).__name__
        targets = read_batch(batch)
        self.beams.check(targets)
        golds = read_golds(name, targets)
        start = self.beams.teacher.config.start
        check_start(name, start, targets)
        rows = [(start, *chosen.tokens) for chosen in self.choose_all(targets, golds)]
        new = {key: value for key, value in batch.items() if key not in ("ids", "mask", "labels")}
        new["ids"], new["mask"] = pad_right(rows, start)
        return new


class SequenceLevel(NewTargets):
    """ŷ: the target of a source is the teacher's best text.       Kim and Rush 2016, §3.2

    beams  a TeacherBeams

    It is the best of the texts that have ended. If none has ended, it is the best of those that were cut off; then the
    target has no end."""

    def choose(self, hypotheses: Sequence[Hypothesis], gold: Sequence[int]) -> Hypothesis:
        """The first hypothesis that has ended, or the first if none has. gold is not used."""
        return complete(hypotheses)[0]


@checked_keywords
@dataclass(frozen=True, eq=False)
class Interpolation(NewTargets):
    """ỹ: the target of a source is that of the teacher's K best texts which is most similar to the data's target.

    beams  a TeacherBeams. With K = 1 it is SequenceLevel

    The similarity is `sentence_bleu` of tokens, without start and end. Of equally similar texts, the one that the
    teacher scores highest. Texts that were cut off count only if none has ended.       Kim and Rush 2016, §3.3

    The choice for a source and a target is made once, and kept in memory for later epochs."""
    _chosen: dict[tuple[bytes, bytes], Hypothesis] = field(default_factory=dict, init=False, repr=False)

    def choose_all(self, targets: Targets, golds: Sequence[Sequence[int]]) -> list[Hypothesis]:
        """As NewTargets.choose_all; BLEU is computed for new rows alone."""
        keys = [(source, np.array(gold, np.int64).tobytes()) for source, gold in zip(source_keys(targets), golds)]
        if not self._chosen.keys() >= set(keys):
            for key, hypotheses, gold in zip(keys, self.beams.look_up(targets), golds, strict=True):
                if key not in self._chosen:
                    self._chosen[key] = self.choose(hypotheses, gold)
        return [self._chosen[key] for key in keys]

    def choose(self, hypotheses: Sequence[Hypothesis], gold: Sequence[int]) -> Hypothesis:
        """The hypothesis with the largest BLEU, among those that have ended; among all, if none has.

        hypotheses   the teacher's for this source, best first. Of several with the largest BLEU, the first is chosen
        gold         the tokens of the source's target in the data: the reference of BLEU

        BLEU compares the tokens without start and end."""
        candidates = complete(hypotheses)
        gold = self.words(gold)
        similarity = [sentence_bleu(self.words(h.tokens), gold) for h in candidates]
        return candidates[int(np.argmax(similarity))]    # the first of the largest: candidates are best first

    def words(self, tokens: Sequence[int]) -> list[int]:
        """The tokens without start and end. The start token is also the padding."""
        special = (self.beams.teacher.config.start, self.beams.end)
        return [token for token in tokens if token not in special]


def complete(hypotheses: Sequence[Hypothesis]) -> Sequence[Hypothesis]:
    """The hypotheses that have ended, in their order; if none has ended, all of them."""
    return [h for h in hypotheses if h.ended] or hypotheses


# ── a batch ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def read_golds(name: str, targets: Targets) -> list[list[int]]:
    """The target of each row of a batch: its labels, without those to ignore.

    ValueError for a batch with one label for each row, and for embeddings instead of ids. name: the method's, for the
    message."""
    B, T = targets.ids.shape[:2]
    if isinstance(targets.ids, Tensor):
        raise ValueError(f"{name} wants batches of ids, got embeddings")
    if targets.logit_positions is None and len(targets.labels) != B * T:
        raise ValueError(f"{name} wants batches of source and target, got one label per row")
    rows = row_of_logits(targets)
    has_label = targets.labels != IGNORE
    return [targets.labels[(rows == row) & has_label].tolist() for row in range(B)]


def check_start(name: str, start: int, targets: Targets) -> None:
    """ValueError unless each row begins with the teacher's start token. name: the method's, for the message."""
    mask = targets.facts.get("mask")
    first = np.zeros(len(targets.ids), int) if mask is None else np.asarray(mask).argmax(axis=1)    # first real column
    begins = np.asarray(targets.ids)[np.arange(len(first)), first]
    if (begins != start).any():
        other = int(begins[begins != start][0])
        raise ValueError(f"{name} wants ids that begin with the teacher's start token {start}, got {other}")


def pad_right(rows: Sequence[Sequence[int]], fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids -> ids (B, T), filled up on the right, and their mask (B, T), T the length of the longest row."""
    T = max(len(row) for row in rows)
    ids = np.full((len(rows), T), fill)
    mask = np.zeros((len(rows), T), bool)
    for b, row in enumerate(rows):
        ids[b, :len(row)] = row
        mask[b, :len(row)] = True
    return ids, mask


class MappedBatches:
    """Endless batches with new targets: the result of `NewTargets.map` for `data.Batches`. They can be resumed.

    A saved position is of one method, teacher and settings. Batches of another method refuse it."""

    def __init__(self, method: NewTargets, batches: Any):
        self.method = method
        self.source = batches
        self._iterator = iter(batches)
        name = qualified_name(type(method))
        self._known = [fingerprint([name, facts]) for facts in method.beams.earlier_facts()]
        self.targets = self._known[0]

    def __len__(self) -> int:
        """Batches in one epoch."""
        return len(self.source)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        return self.method.map_batch(next(self._iterator))

    def once(self) -> Iterator[dict[str, Any]]:
        """Every example once, with its new target."""
        for batch in self.source.once():
            yield self.method.map_batch(batch)

    def state_dict(self) -> dict[str, Any]:
        """The position of the batches, and a fingerprint of the method, its teacher and its settings."""
        return {**self.source.state_dict(), "targets": self.targets}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position. ValueError if it is one of other targets, or of other batches."""
        checks.instance("MappedBatches.load_state_dict: state", state, Mapping, "the dict of state_dict()")
        if state.get("targets") not in self._known:
            raise ValueError("MappedBatches.load_state_dict wants a state with the targets of this method and teacher, "
                             "got one with other targets")
        self.source.load_state_dict({key: value for key, value in state.items() if key != "targets"})
        self._iterator = iter(self.source)

"""The options --loss, --set and --cache of `tinyft distill`: the loss of a run, and the teacher's outputs on disk.

    hinton, word-level     the loss holds the teacher, or with --cache its largest logits
    distilbert, tinybert   the loss holds the teacher
    sequence-level, interpolation     the teacher's texts become the targets; they are on disk before the training
    none                   the labels alone
"""
from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..compress import (
    DistilBERTLoss,
    Hinton,
    Interpolation,
    SequenceLevel,
    TeacherBeams,
    TeacherCache,
    TinyBERTLoss,
    WordLevel,
)
from ..compress.distill.layer_transfer import blocks_of, teacher_blocks
from ..compress.distill.sequence import NewTargets
from ..compress.distill.soft import run_teacher
from ..data import Batches
from ..models import EncoderDecoder
from ..nn import Module
from ..tokens import special_ids
from ..train import CrossEntropy, Loss, read_batch
from .arguments import UsageError
from .plan import SAMPLED, in_words, size, size_of, tokens_of
from .rows import Prepared, first_batches, longest_row
from .settings import loss_class, make_fields, make_loss
from .students import kind_of

__all__ = ["NO_TEACHER", "Objective", "StoreCosts", "check_loss", "fill_store", "make_objective", "measure_store"]

NO_TEACHER = "none"                                      # the --loss of a student that learns alone
LOGITS = 64                                              # of a position, in the cache
ENTRY = 8                                                # bytes of a logit and its class in the cache, or of a token
HYPOTHESIS = 33                                          # bytes of the other facts of a hypothesis
SEARCHED = 4                                             # sources that are decoded for the plan
SECONDS = 5.0                                            # between two lines of progress
BEAMS = {SequenceLevel: 5, Interpolation: 35}            # of the paper


@dataclasses.dataclass(frozen=True)
class Search:
    """The settings of sequence-level distillation and interpolation.

    beams            hypotheses of a source; None: 5 for sequence-level, 35 for interpolation
    max_new_tokens   the longest text of the teacher, its end included; None: of the longest target
    alpha            the share of the word-level loss at the teacher's texts
    """

    beams: int | None = None
    max_new_tokens: int | None = None
    alpha: float = 0.0


@dataclasses.dataclass(frozen=True)
class Objective:
    """The objective of a run.

    loss     of the training. Its teacher is a TeacherCache with --cache
    method   makes the teacher's texts the targets; None: the targets are those of the data
    """

    loss: Loss
    method: NewTargets | None = None

    @property
    def store(self) -> TeacherCache | TeacherBeams | None:
        """The teacher's outputs on disk; None if there are none."""
        if self.method is not None:
            return self.method.beams
        teacher = getattr(self.loss, "teacher", None)
        return teacher if isinstance(teacher, TeacherCache) else None

    @property
    def planned_loss(self) -> Loss:
        """A loss that costs as much in a step: with a cache, the teacher does not run."""
        return CrossEntropy() if isinstance(self.store, TeacherCache) else self.loss

    def batches(self, batches: Batches) -> Any:
        """The batches with the targets of this objective."""
        return batches if self.method is None else self.method.map(batches)


# ── from the options ─────────────────────────────────────────────────────────────────────────────────────────────────
def make_objective(
    options: Mapping[str, Any], folder: Path, student: Module, teacher: Module, tokenizer: Tokenizer,
    targets: list[str], max_len: int,
) -> Objective:
    """The objective that the options describe.

    folder    of the teacher's texts, unless --cache names another
    targets   the targets of the data, for an encoder-decoder

    UsageError for options that do not go together; ValueError for a loss that does not fit the models."""
    name = options["loss"]
    if name == NO_TEACHER:
        if options["set"] or options["cache"]:
            raise UsageError("--loss none has no teacher and no settings: leave --set and --cache out")
        return Objective(CrossEntropy())
    cls = loss_class(name)
    if issubclass(cls, NewTargets):
        return _make_sequence(cls, options, folder, teacher, tokenizer, targets, max_len)
    others = {"width": student.config.width} if issubclass(cls, TinyBERTLoss) else {}
    loss = make_loss(name, options["set"], teacher, **others)
    check_loss(loss, student, teacher)
    if options["cache"] is None:
        return Objective(loss)
    if not isinstance(loss, (Hinton, WordLevel)):
        raise UsageError(f"--cache wants another --loss than {name}: a cache holds logits and no hidden states")
    if kind_of(teacher) == "a masked language model":
        raise ValueError("--cache wants rows that come again, and masks are drawn anew in every epoch")
    temperature = loss.temperature if isinstance(loss, Hinton) else 1.0
    cache = TeacherCache(options["cache"], teacher, options["logits"] or LOGITS, [temperature])
    return Objective(dataclasses.replace(loss, teacher=cache))


def check_loss(loss: Loss, student: Module, teacher: Module) -> None:
    """ValueError unless the loss is one for models of this kind and size."""
    kind = kind_of(teacher)
    is_text = kind in ("a causal language model", "a masked language model")
    if isinstance(loss, WordLevel) and kind not in ("a causal language model", "an encoder-decoder"):
        raise ValueError(f"--loss word-level wants a model that predicts the next token, got {kind}: take hinton")
    if isinstance(loss, DistilBERTLoss) and not is_text:
        raise ValueError(f"--loss distilbert wants a masked or a causal language model, got {kind}: take hinton")
    ours, theirs = student.config, teacher.config
    if isinstance(loss, DistilBERTLoss) and loss.cosine and ours.width != theirs.width:
        raise ValueError(f"--loss distilbert compares hidden states and wants a student with the teacher's width of "
                         f"{theirs.width}, got {ours.width}: --set cosine=0 leaves the comparison out")
    if isinstance(loss, TinyBERTLoss):
        teacher_blocks(loss.layers, len(blocks_of(teacher)), len(blocks_of(student)))        # raises if they do not fit
    if isinstance(loss, TinyBERTLoss) and loss.attention and ours.heads != theirs.heads:
        raise ValueError(f"--loss tinybert compares attention and wants a student with the teacher's {theirs.heads} "
                         f"heads, got {ours.heads}: --set attention=0 leaves the comparison out")


def _make_sequence(
    cls: type[NewTargets], options: Mapping[str, Any], folder: Path, teacher: Module, tokenizer: Tokenizer,
    targets: list[str], max_len: int,
) -> Objective:
    """The objective of the teacher's texts, with the word-level loss if it has a share."""
    if not isinstance(teacher, EncoderDecoder):
        raise ValueError(f"--loss {options['loss']} wants an encoder-decoder, got {kind_of(teacher)}: take word-level")
    if options["logits"] is not None:
        raise UsageError(f"--logits wants a loss of logits, got {options['loss']}")
    search = make_fields(Search, options["set"])
    longest = search.max_new_tokens
    if longest is None:
        longest = min(max_len, longest_row(targets, tokenizer))
    if longest > max_len:
        raise ValueError(f"--set max_new_tokens wants at most {max_len} tokens, the longest row, got {longest}")
    count = BEAMS[cls] if search.beams is None else search.beams
    [end] = special_ids("distill", tokenizer, "eos")
    beams = TeacherBeams(options["cache"] or folder, teacher, end=end, max_new_tokens=longest, beams=count)
    loss = WordLevel(teacher, search.alpha) if search.alpha else CrossEntropy()
    return Objective(loss, cls(beams))


# ── the teacher's outputs ────────────────────────────────────────────────────────────────────────────────────────────
def fill_store(
    store: TeacherCache | TeacherBeams, folder: Path, batches: Batches, out: Path, say: Callable[[str], None],
) -> None:
    """Write the teacher's outputs for all rows into a folder, with a line of progress now and then.

    out: the folder of the run. Rows that an earlier run has written are read. After Ctrl-C, the message names the
    command that goes on."""
    total = len(batches)
    start = last = time.perf_counter()
    try:
        for i, batch in enumerate(batches.once(), 1):
            store.look_up(read_batch(batch))
            now = time.perf_counter()
            if now - last > SECONDS:
                last = now
                say(f"teacher  {i} of {total} batches, about {in_words((now - start) * (total / i - 1))} left")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"while the teacher ran; tinyft distill --resume --out {out} goes on") from None
    finally:
        if isinstance(store, TeacherCache):
            store.flush()
    say(f"teacher  {describe_store(store)}; {size(folder_bytes(folder))} on disk")


def describe_store(store: TeacherCache | TeacherBeams) -> str:
    """The work of the teacher in words."""
    if isinstance(store, TeacherCache):
        return f"ran on {store.passes:,} rows and knows {len(store):,}"
    unfinished = f", of which {store.unfinished:,} have no text with an end" if store.unfinished else ""
    return f"decoded {store.searches:,} sources and knows {len(store):,}{unfinished}"


def folder_bytes(folder: Path) -> int:
    """The bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


@dataclasses.dataclass(frozen=True)
class StoreCosts:
    """The costs of filling a store: seconds for the rows that are missing, and bytes of all rows."""

    seconds: float
    nbytes: int


def measure_store(store: TeacherCache | TeacherBeams, teacher: Module, train: Prepared) -> StoreCosts:
    """The costs of a store, measured on the first batches. Nothing is written."""
    missing = max(0.0, 1 - len(store) / train.rows)
    if isinstance(store, TeacherBeams):
        return _measure_search(store, train, missing)
    sample = first_batches(train.batches, SAMPLED)
    run_teacher(teacher, read_batch(sample[0]))
    start = time.perf_counter()
    run_teacher(teacher, read_batch(sample[1]))
    seconds = (time.perf_counter() - start) / size_of(sample[1])
    positions = sum(len(read_batch(batch).labels) for batch in sample) / len(sample)
    logits = min(store.k or LOGITS, teacher.head.out_features)
    return StoreCosts(missing * seconds * tokens_of(train.batches),
                      round(positions * len(train.batches) * logits * ENTRY))


def _measure_search(store: TeacherBeams, train: Prepared, missing: float) -> StoreCosts:
    """The costs of decoding all sources, from a search in memory for a few of them."""
    (batch,) = first_batches(train.batches, 1)
    few = {name: values[:SEARCHED] for name, values in batch.items()}
    trial = TeacherBeams(None, store.teacher, end=store.end, max_new_tokens=store.max_new_tokens, beams=store.beams)
    start = time.perf_counter()
    found = trial.look_up(read_batch(few))
    seconds = (time.perf_counter() - start) / len(found)
    every = [h for hypotheses in found for h in hypotheses]
    nbytes = sum(ENTRY * len(h.tokens) + HYPOTHESIS for h in every) / len(found)
    return StoreCosts(missing * seconds * train.rows, round(nbytes * train.rows))

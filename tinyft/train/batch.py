"""Reading a batch, and the loss of a model on it.

A batch is a dict of host arrays, or bare ids:

    ids             (B, T) integers, or embeddings (B, T, C) as a Tensor
    mask            (B, T) True where a token is real
    labels          (B,) classes, or (B, T) tokens; -100 where nothing is predicted
    class_weight    (classes,) the weight of each class in the loss
    token_type_ids (B, T), task (B,), route (B,)    are handed to the model
    source_ids, source_mask (B, Ts)     the text that an encoder-decoder's encoder reads; ids are the decoder's

A batch without labels means causal language modelling: predict the next id. For an encoder-decoder this is teacher
forcing: ids are the start token and the target.

    Targets                   a batch as the trainer uses it
    Loss, CrossEntropy        read a batch on the host; compute the loss on the device
    BatchStream               batches without end, which can be resumed
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from .. import array, checks, ops
from ..context import WANTED_TYPES, read_integers, read_mask
from ..keywords import checked_keywords
from ..models.attention import Attention
from ..models.bert import check_token_types
from ..models.blocks import Classifier, check_ids
from ..models.encoder_decoder import EncoderDecoder, check_source
from ..nn import Context, Module
from ..tensor import Tensor

# Keys of a batch that the model receives.
CONTEXT_FACTS = ("mask", "token_type_ids", "task", "route", "source_ids", "source_mask")
IGNORE = -100                                                           # the label of a position without a target
# Keys of other libraries, and their names here.
FOREIGN_KEYS = {
    "input_ids": "ids", "inputs_embeds": "ids", "attention_mask": "mask", "key_padding_mask": "mask",
    "segment_ids": "token_type_ids", "encoder_input_ids": "source_ids", "encoder_attention_mask": "source_mask",
    "decoder_input_ids": "ids", "decoder_attention_mask": "mask",
}
WANTED_SOURCE_IDS = "a batch wants source_ids of shape (B, Ts)"
ONE_LABEL_PER_SEQUENCE = "This model has a sequence classification head: give one label per sequence, shape (B,)"
ONE_LABEL_PER_TOKEN = ("This model gives logits at every position: give one label per token, shape (B, T), "
                       "or add a classifier (tinyft.classifier)")


@checked_keywords
@dataclass
class Targets:
    """A batch as the trainer uses it.

    ids                     the model's input
    facts                   the facts of the batch, such as its mask: keyword arguments of the pass's Context
    labels                  (n,) one per row of logits; IGNORE where nothing is predicted; None if there are no labels
    logit_positions         flat indices, into (B·T,), of the positions at which logits are computed; None: all
    weight                  weight of this batch's mean loss: the number of labels, or the sum of their class weights
    class_weight            (classes,) or None
    output_hidden_states    True if the trainer wants the pass to keep all hidden states
    """
    ids: Any
    facts: dict[str, Any]
    labels: np.ndarray | None
    logit_positions: np.ndarray | None
    weight: float
    class_weight: np.ndarray | None = None
    output_hidden_states: bool = False

    def context(self, rng: np.random.Generator | None = None) -> Context:
        """A Context for one pass over this batch. Dropout is active only if a generator is given."""
        return Context(logit_positions=self.logit_positions, rng=rng, output_hidden_states=self.output_hidden_states,
                       **self.facts)


@checked_keywords
class Loss:
    """A training objective. Subclasses are frozen dataclasses that define `read` and `__call__`.

    Fields may hold a teacher, arrays or data. They are not saved; a checkpoint identifies them by their content.
    """
    hidden_states: ClassVar[bool] = False                               # True: the pass keeps all hidden states

    @property
    def module(self) -> Module | None:
        """A Module that trains with the model. Checkpoints hold it under "loss/"; it is not saved with the model."""
        return None

    def read(self, batch: Any) -> Targets:
        """Read a batch on the host. The result is a `Targets`, or a subclass of it with further arrays."""
        return read_batch(batch)

    def __call__(
        self, model: Module, targets: Targets, rng: np.random.Generator | None = None,
    ) -> tuple[Context, Tensor]:
        """(Context of the model's pass, mean loss). Uses device arrays only, so that the step can be captured.

        The auxiliary losses of the Context that is returned are added by `fit`; those of any other pass do not count.
        """
        raise NotImplementedError(f"{type(self).__name__} has no __call__(model, targets, rng)")

    def check(self, model: Module, targets: Targets) -> None:
        """Raise for ids or labels out of range what the model's pass would raise.

        Called on the host before a step that was captured as a CUDA graph is replayed: a replay runs no Python checks.
        """
        check_ids(targets.ids, model.embed.in_features)
        check_ids(targets.facts.get("source_ids"), model.embed.in_features)
        token_types = getattr(model, "type", None)                      # BERT's table
        if token_types is not None:
            check_token_types(targets.facts.get("token_type_ids"), token_types.in_features)
        if model.head is not None and targets.labels is not None:
            check_labels(targets.labels, model.head.out_features)

    def metrics(self, ctx: Context, targets: Targets) -> dict[str, float]:
        """Further metrics of one batch for `evaluate`, which averages them with the weights of the batches."""
        return {}

    @property
    def original(self) -> Any:
        """The user's object: its class and fields identify the loss in a checkpoint."""
        return self


@dataclass(frozen=True)
class WrappedLoss(Loss):
    """A loss whose class does not derive from Loss. Members that it lacks, except read and __call__, are Loss's."""
    inner: Any

    @property
    def original(self) -> Any:
        return self.inner

    @property
    def hidden_states(self) -> bool:
        return getattr(self.inner, "hidden_states", False)

    @property
    def module(self) -> Module | None:
        return getattr(self.inner, "module", None)

    def read(self, batch: Any) -> Targets:
        return self.inner.read(batch)

    def __call__(
        self, model: Module, targets: Targets, rng: np.random.Generator | None = None,
    ) -> tuple[Context, Tensor]:
        return self.inner(model, targets, rng)

    def check(self, model: Module, targets: Targets) -> None:
        getattr(self.inner, "check", super().check)(model, targets)

    def metrics(self, ctx: Context, targets: Targets) -> dict[str, float]:
        return getattr(self.inner, "metrics", super().metrics)(ctx, targets)


def as_loss(loss: Any) -> Loss:
    """Any loss that a user may give, as a Loss.

    None becomes CrossEntropy(); a Loss is returned itself; an object with read(batch) and __call__(model, targets, rng)
    is wrapped in a WrappedLoss. TypeError for another object, also for a class given in place of its instance."""
    if loss is None:
        return CrossEntropy()
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, type) or not callable(loss) or not callable(getattr(loss, "read", None)):
        name = loss.__name__ if isinstance(loss, type) else type(loss).__name__
        raise TypeError("a loss wants read(batch) and __call__(model, targets, rng), such as an instance of a subclass "
                        f"of tinyft.Loss; got {name}")
    return WrappedLoss(loss)


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """ℓ = − Σᵢ w[yᵢ] log softmax(zᵢ)[yᵢ] / Σᵢ w[yᵢ]        over the labels yᵢ ≠ -100;  w = class_weight or 1

    smoothing   ε of label smoothing: the target of a row is (1 − ε) at its label plus ε/V at each of the V classes, as
                in torch. Vaswani et al. 2017 take 0.1. Perplexity, as `evaluate` gives it, is without smoothing.

    TypeError or ValueError unless 0 <= smoothing < 1."""
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        checks.number("CrossEntropy: smoothing", self.smoothing, low=0, below=1)

    def __call__(
        self, model: Module, targets: Targets, rng: np.random.Generator | None = None,
    ) -> tuple[Context, Tensor]:
        ctx = targets.context(rng)
        logits = model(targets.ids, ctx)                                # (B, classes), (B, T, V) or (n, V)
        return ctx, cross_entropy(model, logits, targets, self.smoothing)


def compute_loss(
    model: Module, targets: Targets, rng: np.random.Generator | None = None,
) -> tuple[Context, Tensor]:
    """(Context of the pass, mean cross-entropy) of a model on one batch, which read_batch has read."""
    checks.instance("compute_loss: model", model, Module, "a model")
    checks.instance("compute_loss", targets, Targets, "Targets, which read_batch(batch) gives")
    return CrossEntropy()(model, targets, rng)


def cross_entropy(model: Module, logits: Tensor, targets: Targets, smoothing: float = 0.0) -> Tensor:
    """The mean cross-entropy of the logits with targets.labels, as a scalar Tensor; weighted by class_weight if given.
    smoothing: ε of label smoothing.

    ValueError if there is not one label per row of logits; IndexError for a label outside the classes."""
    if getattr(model, "head", logits) is None:                          # a model without the attribute gives logits too
        raise ValueError("this model has no head, so it has no logits to compare with labels: "
                         "add one (tinyft.classifier)")
    rows = math.prod(logits.shape[:-1])
    is_classifier = isinstance(getattr(model, "head", None), Classifier)
    # logit_positions come from labels per token, which a sequence classifier does not take.
    if len(targets.labels) != rows or (is_classifier and targets.logit_positions is not None):
        advice = ONE_LABEL_PER_SEQUENCE if is_classifier else ONE_LABEL_PER_TOKEN
        raise ValueError("the loss wants one label per row of logits, "
                         f"got {len(targets.labels)} labels and {rows} rows. {advice}")
    check_labels(targets.labels, logits.shape[-1])
    labels = array.put_like(targets.labels, logits.data)
    class_weight = targets.class_weight
    if class_weight is not None:
        if len(class_weight) != logits.shape[-1]:
            raise ValueError(f"class_weight wants one number for each of the {logits.shape[-1]} classes, "
                             f"got {len(class_weight)}")
        dtype = np.promote_types(logits.dtype, np.float32)              # float32 for 16-bit logits
        class_weight = array.put_like(class_weight, logits.data, dtype)
    return ops.cross_entropy(logits, labels, class_weight, label_smoothing=smoothing)


def check_labels(labels: Any, classes: int) -> None:
    """IndexError if a label, other than IGNORE, is outside 0 ... classes − 1.

    Device arrays are not checked: that would wait for the device."""
    if not isinstance(labels, np.ndarray):
        return
    labels = labels[labels != IGNORE]
    if labels.size == 0:
        return
    smallest = labels.min()
    largest = labels.max()
    if smallest < 0 or largest >= classes:
        raise IndexError(f"label {smallest if smallest < 0 else largest} is outside the {classes} classes of the model")


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def read_batch(batch: Any) -> Targets:
    """Read a batch into Targets. Without labels, the label of each position is the next id, and the last id is cut off.

    ValueError if there is nothing to predict, if a key is missing, or if the shapes do not agree; TypeError if ids or
    labels are not integers.
    """
    if not isinstance(batch, Mapping):
        batch = {"ids": batch}
    _check_keys(batch)
    ids = batch["ids"]
    if not isinstance(ids, Tensor):
        ids = _read_integers("ids", ids, "a batch wants ids of shape (B, T)")
    facts = _read_facts(batch, ids)
    labels = batch.get("labels")
    if labels is None:                                                  # causal language modelling
        if isinstance(ids, Tensor):
            raise ValueError("a batch of embeddings wants labels, got none: there is no next id to predict")
        labels = next_tokens(ids, facts.get("mask"))
        ids = ids[:, :-1]
        for name in ("mask", "token_type_ids"):
            if name in facts:
                facts[name] = facts[name][:, :-1]
    labels = _read_integers("labels", labels, "a batch wants integer labels")
    if labels.shape not in (ids.shape[:1], ids.shape[:2]):
        raise ValueError(f"a batch wants labels of shape {ids.shape[:1]} (a class per row) or {ids.shape[:2]} "
                         f"(a token per position), got {labels.shape}")
    has_label = labels != IGNORE
    if not has_label.any():
        raise ValueError(f"this batch of shape {ids.shape[:2]} has nothing to predict: every label is -100 or padding")
    logit_positions = None                                              # logits at all positions
    if labels.ndim == 2 and not has_label.all():                        # save the logits without a label
        logit_positions = np.flatnonzero(has_label)
    labels = labels.reshape(-1) if logit_positions is None else labels.reshape(-1)[logit_positions]
    class_weight = batch.get("class_weight")
    if class_weight is None:                                            # weight: of the mean loss of this batch
        weight = float(has_label.sum())
    else:
        class_weight = _read_class_weight(class_weight)
        with_label = labels[labels != IGNORE]
        if with_label.min() < 0 or with_label.max() >= len(class_weight):
            raise IndexError(f"labels from {with_label.min()} to {with_label.max()} do not fit "
                             f"a class_weight of {len(class_weight)} classes")
        weight = float(class_weight[with_label].sum())
    return Targets(ids, facts, labels, logit_positions, weight, class_weight)


def _check_keys(batch: Mapping[str, Any]) -> None:
    """ValueError for a batch without ids, and for a key of another library, which would be ignored."""
    for key, ours in FOREIGN_KEYS.items():
        if key in batch:
            raise ValueError(f"a batch wants the key {ours!r}, got {key!r}")
    if batch.get("ids") is None:
        keys = ", ".join(repr(key) for key, value in batch.items() if value is not None) or "nothing"
        raise ValueError(f"a batch wants ids, got {keys}")


def _read_integers(name: str, value: Any, wanted: str) -> np.ndarray:
    """ids, labels or token types as a host array. ValueError for rows of different lengths, TypeError otherwise.

    wanted: the beginning of the sentence. Unsigned integers become int64, since -100 is a label."""
    a = array.asnumpy(read_integers(name, value, wanted))
    return a.astype(np.int64) if a.dtype.kind == "u" else a


def _read_class_weight(value: Any) -> np.ndarray:
    """The weights of the classes, (classes,). ValueError unless they are finite and not negative."""
    wanted = "a batch wants one finite class_weight >= 0 per class"
    try:
        weights = array.asnumpy(value)
    except ValueError:                                                  # lists of different lengths
        raise ValueError(f"{wanted}, got {checks.brief(value)}") from None
    if weights.dtype.kind not in "iuf":
        raise TypeError(f"{wanted}, got {checks.brief(value)}")
    if weights.ndim != 1 or not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError(f"{wanted}, got {checks.brief(value)}")
    return weights


def _read_facts(batch: dict[str, Any], ids: Any) -> dict[str, Any]:
    """The facts of a batch, such as its mask: keyword arguments of the pass's Context, as {name: value}.

    A mask that is True everywhere is left out. ValueError if ids or a fact have a wrong shape.
    """
    axes = 3 if isinstance(ids, Tensor) else 2                          # a Tensor holds embeddings
    if ids.ndim != axes:
        raise ValueError(f"a batch wants ids of shape (B, T), or embeddings (B, T, C); got {ids.shape}")
    facts = {name: batch[name] for name in CONTEXT_FACTS if batch.get(name) is not None}
    if "mask" in facts:
        facts["mask"] = array.asnumpy(read_mask("mask", facts["mask"]))
    if "token_type_ids" in facts:
        facts["token_type_ids"] = _read_integers("token_type_ids", facts["token_type_ids"], WANTED_TYPES)
    for name in ("mask", "token_type_ids"):
        if name in facts and facts[name].shape != ids.shape[:2]:
            raise ValueError(f"a batch wants a {name} of the shape of its ids, {ids.shape[:2]}; "
                             f"got {facts[name].shape}")
    for name in ("task", "route"):
        if name in facts and np.shape(facts[name]) != ids.shape[:1]:
            raise ValueError(f"a batch wants one {name} for each of its {ids.shape[0]} rows, "
                             f"got {checks.brief(facts[name])}")
    _read_source(facts, rows=ids.shape[0])
    for name in ("mask", "source_mask"):
        if name in facts and facts[name].all():
            del facts[name]                                             # attention is faster without a mask
    return facts


def _read_source(facts: dict[str, Any], rows: int) -> None:
    """Read the source of an encoder-decoder among the facts, in place. ValueError for shapes that do not fit.

    rows: the number of rows of ids. A source wants one real token or more in each row."""
    if "source_ids" not in facts:
        if "source_mask" in facts:
            raise ValueError(f"{WANTED_SOURCE_IDS} beside source_mask, got none")
        return
    source = _read_integers("source_ids", facts["source_ids"], WANTED_SOURCE_IDS)
    if source.ndim != 2 or source.shape[0] != rows:
        raise ValueError(f"{WANTED_SOURCE_IDS}, one row for each of its {rows} rows, got {source.shape}")
    if "source_mask" in facts:
        facts["source_mask"] = array.asnumpy(read_mask("source_mask", facts["source_mask"]))
    check_source(source, facts.get("source_mask"))
    facts["source_ids"] = source


def next_tokens(ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """The labels of causal language modelling: for each position but the last, the id that follows.   -> (B, T − 1)

    ids: (B, T) integers. mask: (B, T), True or 1 at real tokens, False or 0 at padding; without it, all are real.
    The label is -100 where a position, or the one that follows it, is padding. Raises ValueError if ids has not two
    axes, or if the mask has another shape than ids.
    """
    wanted = "next_tokens wants ids of shape (B, T)"
    ids = read_integers("ids", ids, wanted)
    if ids.ndim != 2:
        raise ValueError(f"{wanted}, got {ids.shape}")
    real = np.ones(ids.shape, bool) if mask is None else read_mask("mask", mask)
    if real.shape != ids.shape:
        raise ValueError(f"{wanted} and a mask of their shape, got a mask {real.shape}")
    return np.where(real[:, 1:] & real[:, :-1], ids[:, 1:], IGNORE)


# ── a habit ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def is_causal(model: Module) -> bool:
    """True if no position of the text sees a later one: all its attention is causal. The text of an encoder-decoder is
    the decoder's, whose attention to the source sees no text."""
    if isinstance(model, EncoderDecoder):
        modules = [module for block in model.decoder for module in block.modules()]
    else:
        modules = list(model.modules())
    attentions = [module for module in modules if isinstance(module, Attention) and not module.cross]
    return bool(attentions) and all(attention.causal for attention in attentions)


def refuse_copies(batch: Any) -> None:
    """ValueError if the labels of a batch for a causal model are its own ids, so that it would learn to copy its input.

    Elsewhere `labels=ids` is right, since the model shifts them itself. One label that happens to be its own id proves
    nothing, and in "a a a a" the next id is the same: at least two labels must be their own and not the next id.
    """
    if not isinstance(batch, Mapping) or batch.get("labels") is None or isinstance(batch["ids"], Tensor):
        return
    ids = array.asnumpy(batch["ids"])
    labels = array.asnumpy(batch["labels"])
    if labels.shape != ids.shape:                                       # a class per row
        return
    has_label = labels != IGNORE
    if not (labels == ids)[has_label].all():
        return
    is_no_next = has_label.copy()
    is_no_next[:, :-1] &= labels[:, :-1] != ids[:, 1:]
    has_earlier = has_label[:, :-1].any(axis=1)
    is_no_next[:, -1] &= ~has_earlier                                   # the next id is unknown: the others decide
    if is_no_next.sum() >= 2:
        raise ValueError("a causal model wants as label of a position the id that follows, got labels that are the ids "
                         "themselves: leave the labels out, or shift them, labels[:, t] = ids[:, t + 1]")


# ── a stream of batches ──────────────────────────────────────────────────────────────────────────────────────────────
@runtime_checkable
class Resumable(Protocol):
    """Batches that know their own position, such as `data.Batches`."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> None: ...


@runtime_checkable
class Endless(Protocol):
    """Batches without an end, of which `once` gives one pass, such as `data.Batches`."""

    def once(self) -> Iterator: ...


def iterate(batches: Any) -> Iterator:
    """An iterator over the batches. TypeError if they cannot be iterated over, or are one batch itself.

    An array of ids (N, B, T) is N batches; one of fewer axes is one batch, or a row of it."""
    wanted = "batches wants several batches, such as a list or data.Batches"
    is_one_array = array.is_array(batches) and batches.ndim < 3 and batches.dtype != object
    if is_one_array:
        raise TypeError(f"{wanted}, got {checks.brief(batches)}: put one batch of ids (B, T) into a list, [ids]")
    if batches is None or isinstance(batches, (str, bytes, Mapping, Tensor, Module)):
        hint = ": put one batch into a list, [batch]" if isinstance(batches, (Mapping, Tensor)) else ""
        raise TypeError(f"{wanted}, got {checks.brief(batches)}{hint}")
    try:
        return iter(batches)
    except TypeError:
        raise TypeError(f"{wanted}, got {checks.brief(batches)}") from None


class BatchStream:
    """The batches of an iterable, repeated without end.

    A resumed run asks Resumable batches to go to their position. Of any other batches it skips those already taken.
    """

    def __init__(self, batches: Iterable):
        """TypeError if `batches` cannot be iterated over, or is one batch itself."""
        self.iterator = iterate(batches)
        self.batches = batches
        self.count = 0                                                  # batches taken so far

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        """The next batch; after the last one the iterable begins again. ValueError if it then gives none."""
        batch = next(self.iterator, None)
        if batch is None:
            self.iterator = iter(self.batches)
            batch = next(self.iterator, None)
        if batch is None:
            raise ValueError("the batches have come to an end: give a list, or an object that can be iterated again")
        self.count += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position in the batches; JSON-able."""
        if isinstance(self.batches, Resumable):
            return {"own": self.batches.state_dict()}                   # the batches' own position
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the position that `state_dict` gave. ValueError if it is of another kind of batches."""
        checks.instance("the position in the batches", state, Mapping, "a dict")
        if ("own" in state) != isinstance(self.batches, Resumable):
            raise ValueError("this checkpoint is of a run over another kind of batches: "
                             "one has a state_dict, the other is counted")
        if "own" in state:
            self.batches.load_state_dict(state["own"])
            self.iterator = iter(self.batches)
            return
        checks.whole("the number of batches before", state.get("count"), 0)
        if isinstance(self.batches, (list, tuple)) and self.batches:
            self.count = state["count"]
            self.iterator = islice(self.batches, self.count % len(self.batches), None)
        else:                                                           # a new stream: take the batches, and drop them
            while self.count < state["count"]:
                next(self)

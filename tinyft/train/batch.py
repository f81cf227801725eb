"""What a batch asks of a model, and the loss of its answers.

A batch is a dict of host arrays, or bare ids:  ids (B, T);  mask (B, T) True where real;  labels (B,) classes or (B, T) tokens with -100
where nothing is asked;  types, task, route, class_weight.  Without labels it means causal language modelling: predict the next id.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import array, ops
from ..models.blocks import Classifier
from ..nn import Context, Module
from ..tensor import Tensor

FACTS = ("mask", "token_type_ids", "task", "route")               # keys of a batch that a forward pass is told


@dataclass
class Targets:
    "What a batch asks: the ids to feed, the labels wanted, the flat places they are wanted at (None: everywhere), and their weight."
    ids: Any
    facts: dict[str, Any]
    labels: np.ndarray
    logit_positions: np.ndarray | None
    weight: float
    class_weight: np.ndarray | None = None


def read_batch(batch: Any) -> Targets:
    "Read a batch.  ValueError if there is nothing in it to predict, or labels and ids do not go together."
    batch = batch if isinstance(batch, dict) else {"ids": batch}
    ids = batch["ids"] if isinstance(batch["ids"], Tensor) else np.asarray(batch["ids"])
    facts = {k: batch[k] for k in FACTS if batch.get(k) is not None}
    if ids.ndim != (3 if isinstance(ids, Tensor) else 2):
        raise ValueError(f"a batch wants ids of shape (B, T), or embeddings (B, T, C); got {ids.shape}")
    for fact in ("mask", "token_type_ids"):
        if fact in facts and np.shape(facts[fact]) != ids.shape[:2]:
            raise ValueError(f"{fact} has shape {np.shape(facts[fact])}, the ids {ids.shape[:2]}: they go together, one for one")
    if "mask" in facts and np.asarray(facts["mask"]).all():
        del facts["mask"]                                                        # nothing is hidden: attention need not look at it
    labels, cw = batch.get("labels"), batch.get("class_weight")
    if labels is None:                                                           # the next token, where this one and it are real
        labels = next_tokens(ids, facts.get("mask"))
        ids, facts = ids[:, :-1], {k: (v[:, :-1] if k in ("mask", "token_type_ids") else v) for k, v in facts.items()}
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels are integers; got {labels.dtype}")
    if labels.shape not in (ids.shape[:1], ids.shape[:2]):
        raise ValueError(f"labels have shape {labels.shape}; wanted {ids.shape[:1]} (a class per row) or {ids.shape[:2]} (a token per place)")
    asked = labels != -100
    if not asked.any():
        raise ValueError(f"this batch of shape {ids.shape[:2]} has nothing to predict: every label is -100 or padding")
    at = None if asked.all() or labels.ndim == 1 else np.flatnonzero(asked)
    labels = labels.reshape(-1) if at is None else labels.reshape(-1)[at]
    weight = float(asked.sum()) if cw is None else float(np.asarray(cw)[labels[labels != -100]].sum())
    return Targets(ids, facts, labels, at, weight, cw)


def next_tokens(ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    "ids, mask (B, T) -> labels (B, T − 1): what ids[:, :-1] must predict, the next id; -100 where it or the place that predicts it is padding."
    real = np.ones(ids.shape, bool) if mask is None else np.asarray(mask, bool)
    return np.where(real[:, 1:] & real[:, :-1], ids[:, 1:], -100)


def compute_loss(model: Module, q: Targets, rng: np.random.Generator | None = None) -> tuple[Context, Tensor]:
    "The pass and its cross-entropy, averaged over what is asked."
    ctx = Context(logit_positions=q.logit_positions, rng=rng, **q.facts)
    z = model(q.ids, ctx)
    if getattr(model, "head", z) is None:
        raise ValueError("this model has no head, so nothing to compare with labels: put one on it (tinyft.classifier)")
    classes = isinstance(getattr(model, "head", None), Classifier)
    if len(q.labels) != math.prod(z.shape[:-1]) or (classes and q.logit_positions is not None):
        raise ValueError(f"the labels ask for {len(q.labels)} answers, the model gives {math.prod(z.shape[:-1])}: "
                         + ("it tells rows apart, so give a label per row (B,)" if classes else
                            "it speaks at every place, so give token labels (B, T), or put a classifier on it (tinyft.classifier)"))
    check_labels(q.labels, z.shape[-1])
    put = lambda a, dtype=None: None if a is None else array.put_like(a, z.data, dtype)
    return ctx, ops.cross_entropy(z, put(q.labels), put(q.class_weight, np.promote_types(z.dtype, np.float32)))


def check_labels(labels: Any, classes: int) -> None:
    "IndexError for a label that is none of the classes.  Host arrays only: a device is not waited for."
    real = labels[labels != -100] if isinstance(labels, np.ndarray) else np.zeros(0)
    if real.size and not 0 <= real.min() <= real.max() < classes:
        raise IndexError(f"label {real.min() if real.min() < 0 else real.max()} is outside the {classes} classes the model tells apart")

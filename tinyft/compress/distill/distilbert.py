"""DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter.  Sanh, Debut, Chaumond, Wolf 2019.
arXiv:1910.01108

    L = a T² KL(p_t^T ‖ p_s^T) + b CE(y, p_s) + c mean (1 − cos(h_s, h_t))          a = 5,  b = 2,  c = 1,  T = 2

The first and the third term are means over all real tokens, the second is the mean over the tokens with a label: those
that were masked; for GPT-2, all. h (B, T, C) are the last hidden states, after the last norm. The student starts from
layers of its teacher: layers.py. The weights are those of the authors' code.

Departures: with several batches per update, `fit` weights each by its number of real tokens, also in the second term.
To distil at the masked tokens alone, take Hinton.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import array, checks
from ...array import xp
from ...nn import Context, Module
from ...tensor import Tensor
from ...train.batch import IGNORE, Loss, Targets, cross_entropy, read_batch
from .soft import TeacherLogits, check_models, cosine_loss, run_teacher, soft_loss


@dataclass(frozen=True, eq=False)
class DistilBERTLoss(Loss):
    """L = a T² KL(p_t^T ‖ p_s^T) + b CE(y, p_s) + c mean (1 − cos(h_s, h_t)).       Sanh et al. 2019

    teacher      a model with the student's vocabulary, and with its width unless c is 0. It does not train
    temperature  T
    soft, hard, cosine   the weights a, b and c

    The labels are one per token: of masked tokens, or without labels in the batch the next tokens.
    TypeError or ValueError for values without meaning; in a step, ValueError for a teacher of other sizes."""
    teacher: Any
    temperature: float = 2.0
    soft: float = 5.0
    hard: float = 2.0
    cosine: float = 1.0

    def __post_init__(self) -> None:
        checks.number("DistilBERTLoss: temperature", self.temperature, above=0)
        for name in ("soft", "hard", "cosine"):
            checks.number(f"DistilBERTLoss: {name}", getattr(self, name), low=0)
        if not self.soft + self.hard + self.cosine:
            raise ValueError("DistilBERTLoss wants a weight that is not 0, got 0 for soft, hard and cosine")

    def read(self, batch: Any) -> Targets:
        """Targets with logits at all real tokens, label −100 where none is to be predicted; without labels in the
        batch, at the tokens that have a next one.

        ValueError for one label per row: a sequence classifier has Hinton."""
        targets = read_batch(batch)
        B, T = targets.ids.shape[:2]
        if targets.logit_positions is None and len(targets.labels) != B * T:
            raise ValueError(f"DistilBERTLoss wants one label per token, (B, T) = {(B, T)}, got {len(targets.labels)} "
                             "labels: for one label per sequence take Hinton")
        if targets.class_weight is not None:
            raise ValueError("DistilBERTLoss wants batches without class_weight: the loss of its hidden states has no "
                             "classes")
        if not has_labels(batch):                        # next tokens: every token that has one counts
            return targets
        labels = np.full(B * T, IGNORE)
        labels[slice(None) if targets.logit_positions is None else targets.logit_positions] = targets.labels
        mask = targets.facts.get("mask")
        real = np.arange(B * T) if mask is None else np.flatnonzero(mask | (labels.reshape(B, T) != IGNORE))
        targets.labels = labels[real]
        targets.logit_positions = None if len(real) == B * T else real
        targets.weight = float(len(real))
        return targets

    def __call__(
        self, model: Module, targets: Targets, rng: np.random.Generator | None = None,
    ) -> tuple[Context, Tensor]:
        check_models("DistilBERTLoss", model, self.teacher, "a model: a cache holds no hidden states")
        ctx = targets.context(rng)
        logits = model(targets.ids, ctx)                                         # (n, V), or (B, T, V)
        theirs = run_teacher(self.teacher, targets)
        n = math.prod(logits.shape[:-1])
        loss = cross_entropy(model, logits, targets) * self.hard
        if self.soft:
            weight = xp(logits.data).ones(n, loss.dtype)
            soft = soft_loss("DistilBERTLoss", logits, TeacherLogits(theirs.output.data), weight, self.temperature)
            loss = loss + soft * self.soft
        if self.cosine:
            ours, teachers = ctx.last_hidden_state, theirs.last_hidden_state
            if ours.shape != teachers.shape:
                raise ValueError("DistilBERTLoss wants a teacher whose hidden states have the student's shape "
                                 f"{tuple(ours.shape)}, got {tuple(teachers.shape)}")
            loss = loss + cosine_loss(ours, teachers, real_positions(targets, ours)) * self.cosine
        return ctx, loss


def has_labels(batch: Any) -> bool:
    """True if a batch has labels of its own."""
    return isinstance(batch, Mapping) and batch.get("labels") is not None


def real_positions(targets: Targets, hidden: Tensor) -> Any:
    """(B, T) True at the positions of which logits are computed: the real tokens. hidden (B, T, C)"""
    m = xp(hidden.data)
    B, T = hidden.shape[:2]
    if targets.logit_positions is None:
        return m.ones((B, T), bool)
    real = m.zeros(B * T, bool)
    real[array.put_like(targets.logit_positions, hidden.data)] = True
    return real.reshape(B, T)

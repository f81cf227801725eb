"""Distilling the Knowledge in a Neural Network.  Hinton, Vinyals, Dean 2015.  arXiv:1503.02531

    L = (1 − λ) CE(y, p_s) + λ T² KL(p_t^T ‖ p_s^T),     p^T = softmax(z / T),  p = p¹            §2

z_s, z_t the logits of student and teacher, (N, V); y (N,) the labels; means over the rows with a label. The gradient of
the second term is λ T (p_s^T − p_t^T) / N: the factor T² keeps its size comparable as T changes. For a large T,
T² KL is the squared distance of the centred logits over 2 V.

Departures: the paper minimises the cross-entropy with p_t^T. KL differs from it by the entropy of the teacher, so the
gradients are the same, and KL is 0 where the student is the teacher.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import checks
from ...nn import Context, Module
from ...tensor import Tensor
from ...train.batch import Loss, Targets, cross_entropy
from .cache import read_with_teacher
from .soft import row_weights, soft_loss, teacher_logits


@dataclass(frozen=True, eq=False)
class Hinton(Loss):
    """L = (1 − λ) CE(y, p_s) + λ T² KL(p_t^T ‖ p_s^T), means over the labels.     Hinton, Vinyals, Dean 2015

    teacher      a model with the student's vocabulary and classes, or a TeacherCache. It does not train
    temperature  T: 2 to 20; for language 2 to 4
    soft         λ, the share of the teacher; 0: plain cross-entropy

    TypeError or ValueError for values without meaning; in a step, ValueError for a teacher of other sizes."""
    teacher: Any
    temperature: float = 2.0
    soft: float = 0.5

    def __post_init__(self) -> None:
        checks.number("Hinton: temperature", self.temperature, above=0)
        checks.number("Hinton: soft", self.soft, low=0, high=1)

    def read(self, batch: Any) -> Targets:
        """Read a batch; with the teacher's logits, if the teacher is a TeacherCache."""
        return read_with_teacher("Hinton", self.teacher, batch, self.temperature)

    def __call__(
        self, model: Module, targets: Targets, rng: np.random.Generator | None = None,
    ) -> tuple[Context, Tensor]:
        return mixed_loss("Hinton", model, targets, rng, self.teacher, self.temperature, self.soft)


def mixed_loss(
    name: str, model: Module, targets: Targets, rng: np.random.Generator | None, teacher: Any, temperature: float,
    soft: float,
) -> tuple[Context, Tensor]:
    """(Context of the student's pass, (1 − λ) CE + λ T² KL). name: of the loss, for messages. soft: λ"""
    ctx = targets.context(rng)
    logits = model(targets.ids, ctx)
    hard = cross_entropy(model, logits, targets)
    if soft == 0:
        return ctx, hard
    theirs = teacher_logits(name, model, teacher, targets)
    weight = row_weights(targets, logits.data, hard.dtype)
    return ctx, hard * (1 - soft) + soft_loss(name, logits, theirs, weight, temperature) * soft

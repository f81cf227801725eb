"""Sequence-Level Knowledge Distillation, its word-level form.  Kim, Rush 2016.  arXiv:1606.07947

    L = (1 − α) NLL(y) + α Σⱼ KL(q(· | x, y_<j) ‖ p(· | x, y_<j)) / n                              §3.1

q teacher, p student, y_<j the tokens before position j: those of the data, for both. n the number of target tokens.
It is the loss of Hinton et al. with T = 1, at every token of a language model.

Departures: the paper sums over the tokens of a sentence; we take the mean over those of the batch, as for the NLL.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import checks
from ...nn import Context, Module
from ...tensor import Tensor
from ...train.batch import Loss, Targets
from .cache import read_with_teacher
from .hinton import mixed_loss


@dataclass(frozen=True, eq=False)
class WordLevel(Loss):
    """L = (1 − α) NLL + α KL(teacher ‖ student), means over the target tokens.       Kim and Rush 2016, §3.1

    teacher  a model with the student's vocabulary, or a TeacherCache. It does not train
    alpha    α, the share of the teacher

    TypeError or ValueError for values without meaning; in a step, ValueError for a teacher of another vocabulary."""
    teacher: Any
    alpha: float = 0.5

    def __post_init__(self) -> None:
        checks.number("WordLevel: alpha", self.alpha, low=0, high=1)

    def read(self, batch: Any) -> Targets:
        """Read a batch; with the teacher's logits, if the teacher is a TeacherCache."""
        return read_with_teacher("WordLevel", self.teacher, batch, 1.0)

    def __call__(
        self, model: Module, targets: Targets, rng: np.random.Generator | None = None,
    ) -> tuple[Context, Tensor]:
        return mixed_loss("WordLevel", model, targets, rng, self.teacher, 1.0, self.alpha)

"""The parts of all distillation losses: the teacher's pass, its distributions, KL and cosine over real positions.

N rows of logits (one per position or per sequence), V classes, T temperature.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import array, checks, functional, ops, precision
from ...array import Array, xp
from ...nn import Context, Module, evaluation_mode
from ...tensor import Tensor
from ...train.batch import IGNORE, Targets


@dataclass(frozen=True)
class TeacherLogits:
    """The logits of a teacher, without a gradient.

    values (N, V); or, of a cache, the k largest, values (N, k), their classes, columns (N, k), and the number V. tail
    (N,): log Σ exp(z / T) over all other classes; None: it is not known."""
    values: Array
    columns: Array | None = None
    classes: int | None = None
    tail: Array | None = None


def check_models(name: str, student: Module, teacher: Module, wanted: str = "a model or a TeacherCache") -> None:
    """TypeError unless the teacher is a model; ValueError unless it reads the student's ids.

    name: of the loss, for the message.  wanted: the teachers that it takes, in words."""
    checks.instance(f"{name}: teacher", teacher, Module, wanted)
    ours, theirs = student.embed.in_features, teacher.embed.in_features
    if ours != theirs:
        raise ValueError(f"{name} wants a teacher with the student's vocabulary of {ours} tokens, got {theirs} tokens")


def run_teacher(teacher: Module, targets: Targets) -> Context:
    """The Context of the teacher's pass over a batch: in evaluation mode, and not recorded.

    The pass knows the facts of the batch, such as its mask, and the positions at which logits are wanted. After it,
    also after an error, each part of the teacher is in its own mode again."""
    ctx = targets.context()
    with evaluation_mode(teacher):
        teacher(targets.ids, ctx)
    return ctx


def row_weights(targets: Targets, like: Array, dtype: Any) -> Array:
    """The weight of each row of logits, (N,): 0 without a label, else the class weight of its label, or 1."""
    m = xp(like)
    labels = array.put_like(targets.labels, like)
    real = labels != IGNORE
    if targets.class_weight is None:
        return real.astype(dtype)
    class_weight = array.put_like(targets.class_weight, like, dtype)
    return class_weight[m.where(real, labels, 0)] * real


def soft_loss(name: str, logits: Tensor, teacher: TeacherLogits, weight: Array, temperature: float) -> Tensor:
    """`distillation_loss` of a student's logits, (..., V) with N rows, and those of a teacher or of its cache.

    If the tail of a cache is known, its classes count as one, in both distributions. If it is not, the teacher's
    distribution is a softmax over the k classes: it is surer than the true one, and the student unlearns the others.
    weight: (N,).  ValueError unless both have the same rows and classes.  name: of the loss, for the message."""
    logits = wide(logits)
    V = logits.shape[-1]
    logits = logits.reshape(-1, V)
    if teacher.classes not in (None, V):
        raise ValueError(f"{name} wants a teacher with the student's {V} classes, got a cache with {teacher.classes}")
    columns = None if teacher.columns is None else array.put_like(teacher.columns, logits.data)
    wanted = logits.shape if columns is None else columns.shape
    values = array.put_like(teacher.values, logits.data, logits.dtype)
    values = values.reshape(-1, values.shape[-1])
    if values.shape != wanted:
        raise ValueError(f"{name} wants a teacher with the student's logits of shape {tuple(wanted)}, "
                         f"got {tuple(values.shape)}")
    if teacher.tail is not None and columns.shape[-1] < V:
        tail = array.put_like(teacher.tail, logits.data, logits.dtype) * temperature
        values = xp(values).concatenate([values, tail[:, None]], axis=-1)        # (N, k + 1)
        logits = join_others(logits, columns, temperature)                       # (N, k + 1)
        columns = None
    return distillation_loss(logits, Tensor(values), weight, temperature, columns)


def join_others(logits: Tensor, columns: Array, temperature: float) -> Tensor:
    """The logits of k classes, and one for all others together: (N, V), columns (N, k) -> (N, k + 1)

    The softmax at this temperature gives each of the k classes its probability among all V, and the last one the sum of
    the others: its logit is T log Σ exp(z / T)."""
    m = xp(logits.data)
    is_other = m.ones(logits.shape, bool)
    is_other[m.arange(len(columns))[:, None], columns] = False
    lowest = Tensor(m.full(logits.shape, -1e30, logits.dtype))                   # exp of it is 0
    others = ops.where(is_other, logits, lowest)                                 # (N, V)
    top = Tensor(others.data.max(axis=-1, keepdims=True))
    sums = ops.exp((others - top) * (1 / temperature)).sum(axis=-1, keepdims=True)
    return ops.concatenate(ops.gather(logits, columns), ops.log(sums) * temperature + top, axis=-1)


def distillation_loss(
    student: Tensor, teacher: Tensor, weight: Array, temperature: float, columns: Array | None = None,
) -> Tensor:
    """T² Σᵢ wᵢ KL(p_t^T ‖ p_s^T)ᵢ / Σ w,    p^T = softmax(z / T)                 Hinton, Vinyals, Dean 2015, §2

    student  z_s (N, V), logits
    teacher  z_t (N, V); with columns, (N, k): the logits of k classes, over which p_t is a softmax
    weight   w (N,), the weight of each row in the mean; 0 leaves a row out
    columns  (N, k), the classes of the teacher's logits; None: all. p_s is a softmax over all V classes in any case

    Only the student gets a gradient. Without columns the gradient of row i of z_s is T (p_s^T − p_t^T) wᵢ / Σ w: the
    factor T² keeps its size comparable as T changes."""
    log_p = ops.log_softmax(teacher.detach() * (1 / temperature))                # no gradient to the teacher
    log_q = ops.log_softmax(student * (1 / temperature))
    if columns is not None:
        log_q = ops.gather(log_q, columns)                                       # (N, k)
    kl = (ops.exp(log_p) * (log_p - log_q)).sum(axis=-1)                         # (N,)
    return (kl * weight).sum() * (temperature**2) / weight.sum()


def cosine_loss(student: Tensor, teacher: Tensor, real: Array) -> Tensor:
    """Σ (1 − cos(h_s, h_t)) / n over the n real positions.                        Sanh et al. 2019, §3

    student, teacher  h_s and h_t (B, T, C), hidden states; real (B, T), True where a token is real

    Only the student gets a gradient. 0 if no position is real."""
    student = functional.normalize(wide(student), eps=1e-8)
    teacher = functional.normalize(wide(teacher.detach()), eps=1e-8)
    cosine = (student * teacher).sum(axis=-1)                                    # (B, T)
    weight = real / xp(real).maximum(real.sum(), 1)
    return ((1 - cosine) * weight.astype(cosine.dtype)).sum()


def wide(x: Tensor) -> Tensor:
    """A 16-bit tensor in float32; any other one as it is."""
    return ops.cast(x, "float32") if x.dtype in precision.HALVES else x


def teacher_logits(name: str, model: Module, teacher: Any, targets: Targets) -> TeacherLogits:
    """The teacher's logits for a batch: those that a cache put into the targets, or else of a pass.

    name: of the loss, for the messages."""
    if isinstance(targets, CachedTargets):
        return TeacherLogits(targets.teacher_values, targets.teacher_columns, targets.teacher_classes,
                             targets.teacher_tail)
    check_models(name, model, teacher)
    return TeacherLogits(run_teacher(teacher, targets).output.data)


@dataclass
class CachedTargets(Targets):
    """Targets with a teacher's k largest logits for each row of logits, and their classes: both (N, k).

    teacher_tail: (N,), log Σ exp(z / T) of the other classes, or None.  teacher_classes: V, the number of all."""
    teacher_values: np.ndarray | None = None
    teacher_columns: np.ndarray | None = None
    teacher_tail: np.ndarray | None = None
    teacher_classes: int | None = None

"""TinyBERT: distilling BERT for natural language understanding.  Jiao et al. 2019.  arXiv:1909.10351

    L = a MSE(E_s W_e, E_t)                                                                embeddings           eq. 9
      + Σ_m b MSE(H_s[m] W_h, H_t[g(m)]) + c mean_h MSE(A_s[m, h], A_t[g(m), h])           blocks m = 1 ... M   eq. 7, 8
      + d KL(p_t ‖ p_s)                                                                    logits               eq. 10

H[m] (B, T, C) is the output of block m, E the input of the first, and A[m, h] (T, T) the attention scores of head h
before the softmax, α q kᵀ. g(m) = m N / M: a student of M blocks learns from every (N/M)-th block of its teacher. W_e
and W_h (C_t, C_s) train with the student, and are not saved with it. Means over real tokens and pairs of these; for a
causal model, over pairs that it can attend to.

Two stages: general distillation on plain texts with prediction=0, then the task, with all terms.

Departures: the paper's eq. 10 is the cross-entropy with p_t; KL differs from it by the entropy of the teacher and has
the same gradient. W_e and W_h start as the identity where the widths are equal, which the paper leaves open.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ... import array, checks
from ...array import Array, xp
from ...models.attention import Attention
from ...nn import Context, Linear, Module, evaluation_mode
from ...tensor import Tensor
from ...train.batch import IGNORE, Loss, Targets, read_batch
from .distilbert import has_labels
from .layers import block_lists, layer_map
from .soft import TeacherLogits, check_models, row_weights, soft_loss, wide

NAME = "TinyBERTLoss"


class Projections(Module):
    """The maps from the student's width to the teacher's, which train with the student: W_e and W_h (C_t, C_s)."""

    def __init__(self, width: int, teacher_width: int, seed: int):
        rng = np.random.default_rng(seed)
        self.embeddings = Linear(width, teacher_width, rng=rng, bias=False, std=width**-0.5)
        self.hidden = Linear(width, teacher_width, rng=rng, bias=False, std=width**-0.5)
        if width == teacher_width:
            for linear in (self.embeddings, self.hidden):
                linear.weight.copy_(np.eye(width))


@dataclass(frozen=True, eq=False)
class TinyBERTLoss(Loss):
    """Embeddings, hidden states, attention scores and logits of a teacher.       Jiao et al. 2019

    teacher      a model with one stack of blocks and the student's vocabulary. It does not train
    width        the student's
    layers       g: "uniform", every (N/M)-th block; or the teacher's block for each of the student's, counted from 0
    embeddings, hidden, attention, prediction    the weights a, b, c and d; prediction=0 is the general stage
    temperature  T of the logits
    seed         of the projections

    Batches may have labels: then the logits are compared where a label is. Without labels, at all real tokens.
    TypeError or ValueError for values without meaning; in a step, ValueError for models that do not fit each other."""
    hidden_states: ClassVar[bool] = True
    teacher: Any
    width: int
    layers: str | Sequence[int] = "uniform"
    embeddings: float = 1.0
    hidden: float = 1.0
    attention: float = 1.0
    prediction: float = 1.0
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks.instance(f"{NAME}: teacher", self.teacher, Module, "a model: a cache holds no hidden states")
        checks.whole(f"{NAME}: width", self.width, least=1)
        if not isinstance(self.layers, (list, tuple)):
            checks.one_of(f"{NAME}: layers", self.layers, ("uniform",))
        weights = [getattr(self, name) for name in ("embeddings", "hidden", "attention", "prediction")]
        for weight in weights:
            checks.number(f"{NAME}: a weight", weight, low=0)
        if not any(weights):
            raise ValueError(f"{NAME} wants a weight that is not 0, got 0 for all four")
        checks.number(f"{NAME}: temperature", self.temperature, above=0)
        checks.whole(f"{NAME}: seed", self.seed, least=0)
        blocks_of(self.teacher)
        projections = Projections(self.width, self.teacher.config.width, self.seed)
        object.__setattr__(self, "_projections", projections)                    # the dataclass is frozen

    @property
    def module(self) -> Module:
        """The projections, which train with the student."""
        return self._projections

    def read(self, batch: Any) -> Targets:
        """Targets; of a batch without labels, with logits at all real tokens."""
        if has_labels(batch):
            return read_batch(batch)
        batch = batch if isinstance(batch, dict) else {"ids": batch}
        mask = batch.get("mask")
        real = np.ones(array.shape_of(batch.get("ids"))[:2], bool) if mask is None else np.asarray(mask, bool)
        targets = read_batch({**batch, "labels": np.where(real, 0, IGNORE)})     # 0 stands for any label
        return dataclasses.replace(targets, labels=None)

    def __call__(
        self, model: Module, targets: Targets, rng: np.random.Generator | None = None,
    ) -> tuple[Context, Tensor]:
        check_models(NAME, model, self.teacher, "a model")
        chosen = teacher_blocks(self.layers, len(blocks_of(self.teacher)), len(blocks_of(model)))
        ctx = observed_pass(model, targets, rng)
        with evaluation_mode(self.teacher):
            theirs = observed_pass(self.teacher, targets)
        terms = []
        if self.embeddings:
            ours = self.module.embeddings(ctx.hidden_states[0], ctx)
            terms.append(squared_distance(ours, theirs.hidden_states[0], ctx.mask) * self.embeddings)
        for m, block in enumerate(chosen):
            if self.hidden:
                ours = self.module.hidden(ctx.hidden_states[m + 1], ctx)
                terms.append(squared_distance(ours, theirs.hidden_states[block + 1], ctx.mask) * self.hidden)
            if self.attention:
                distance = score_distance(blocks_of(model)[m].attn, ctx, blocks_of(self.teacher)[block].attn, theirs)
                terms.append(distance * self.attention)
        if self.prediction:
            terms.append(self.compare_logits(ctx.output, theirs.output, targets) * self.prediction)
        return ctx, sum(terms[1:], start=terms[0])

    def compare_logits(self, ours: Tensor, theirs: Tensor, targets: Targets) -> Tensor:
        """T² KL(p_t^T ‖ p_s^T), mean over the labels, or over the real tokens if there are none."""
        if targets.labels is None:
            n = ours.size // ours.shape[-1]
            weight = xp(ours.data).ones(n, wide(ours).dtype)
        else:
            weight = row_weights(targets, ours.data, wide(ours).dtype)
        return soft_loss(NAME, ours, TeacherLogits(theirs.data), weight, self.temperature)


# ── blocks ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def blocks_of(model: Module) -> list[Module]:
    """The blocks of a model, bottom to top. ValueError for a model with two stacks."""
    stacks = list(block_lists(model).values())
    if len(stacks) != 1:
        raise ValueError(f"{NAME} wants a model with one stack of blocks, got a {type(model).__name__} with "
                         f"{len(stacks)}")
    return stacks[0]


def teacher_blocks(layers: str | Sequence[int], N: int, M: int) -> list[int]:
    """The teacher's block, of N and counted from 0, for each of the M blocks of the student: g(m) = m N / M.

    ValueError if M does not divide N, and for blocks that are not there, not rising or not M."""
    if not isinstance(layers, str):
        return layer_map(layers, N, M)
    if N % M:
        raise ValueError(f"{NAME}: the student's {M} blocks do not divide the teacher's {N}: give layers=[...]")
    return [(m + 1) * N // M - 1 for m in range(M)]


def observed_pass(model: Module, targets: Targets, rng: np.random.Generator | None = None) -> Context:
    """The Context of a pass that keeps hidden states and attention scores."""
    ctx = targets.context(rng)
    ctx.output_hidden_states = True
    ctx.output_attention_scores = True
    model(targets.ids, ctx)
    return ctx


# ── distances ────────────────────────────────────────────────────────────────────────────────────────────────────────
def squared_distance(ours: Tensor, theirs: Tensor, mask: Array | None) -> Tensor:
    """The mean of (x − y)² over real positions and features.    x, y (B, T, C);  mask (B, T) or None

    Only x gets a gradient. ValueError for two shapes."""
    if ours.shape != theirs.shape:
        raise ValueError(f"{NAME} wants hidden states of the teacher's shape {tuple(theirs.shape)} after the "
                         f"projection, got {tuple(ours.shape)}")
    difference = wide(ours) - wide(theirs.detach())
    rows = (difference * difference).mean(axis=-1)                               # (B, T)
    if mask is None:
        return rows.mean()
    weight = mask / mask.sum()
    return (rows * weight.astype(rows.dtype)).sum()


def score_distance(ours: Attention, ctx: Context, theirs: Attention, teacher_ctx: Context) -> Tensor:
    """The mean of (x − y)² over heads and real pairs of positions, for the attention scores of two modules.

    A pair is real if query and key are, and if a causal query comes no earlier than its key.
    ValueError for another number of heads, and for one causal and one bidirectional model."""
    x, y = ctx.attention_scores(ours), teacher_ctx.attention_scores(theirs)      # (B, H, T, T)
    if x.shape != y.shape or ours.causal != theirs.causal:
        raise ValueError(f"{NAME} wants a teacher with the student's attention, scores of shape {tuple(x.shape)}, "
                         f"got {tuple(y.shape)}: attention=0 leaves them out")
    m = xp(x.data)
    B, T = x.shape[0], x.shape[-1]
    real = m.ones((B, T), bool) if ctx.mask is None else ctx.mask
    pairs = real[:, :, None] & real[:, None, :]                                  # (B, T, T)
    if ours.causal:
        pairs = pairs & m.tril(m.ones((T, T), bool))
    difference = wide(x) - wide(y.detach())
    squares = (difference * difference).mean(axis=1)                             # (B, T, T)
    weight = pairs / pairs.sum()
    return (squares * weight.astype(squares.dtype)).sum()

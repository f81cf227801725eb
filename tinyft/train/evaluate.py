"""Evaluation: the loss, perplexity, accuracy and macro-F1 of a model on batches."""
from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .. import array, checks
from ..keywords import checked_keywords
from ..models.blocks import Classifier
from ..nn import Context, Module, evaluation_mode
from .batch import (
    IGNORE,
    CrossEntropy,
    Endless,
    Loss,
    Targets,
    as_loss,
    cross_entropy,
    is_causal,
    iterate,
    refuse_copies,
)


@checked_keywords
def evaluate(model: Module, batches: Iterable, loss: Loss | None = None) -> dict[str, float]:
    """Metrics over an iterable of batches. Of an endless `data.Batches`, every example is taken once.

    loss                    the mean loss over all labels, without penalties and auxiliary losses
    perplexity, accuracy    if the logits have integer labels;  macro_f1    for a sequence classification head
    further metrics         those of `loss.metrics`, averaged with the weights of the batches

    Dropout is inactive and no gradients are recorded. The mode of every module stays as it was. TypeError for another
    model, loss or batches; ValueError without a batch, and for labels of a causal model that are its own ids.
    """
    checks.instance("evaluate", model, Module, "a model")
    loss = as_loss(loss)
    if isinstance(batches, Endless):
        batches = batches.once()
    batches = iterate(batches)
    wants_next_ids = isinstance(loss, CrossEntropy) and is_causal(model)
    results = Results(model, loss)
    with evaluation_mode(model, *(() if loss.module is None else (loss.module,))):
        for batch in batches:
            targets = loss.read(batch)
            if wants_next_ids:
                refuse_copies(batch)
            targets.output_hidden_states = loss.hidden_states           # kept only if the loss uses them
            with np.errstate(invalid="ignore"):                         # 0 / 0, if no label has a class weight
                ctx, value = loss(model, targets)
            results.add(float(value.data), ctx, targets)
    return results.metrics()


class Results:
    """The values of all batches of one evaluation."""

    def __init__(self, model: Module, loss: Loss):
        """An evaluation without batches so far; `add` adds one."""
        self.model = model
        self.loss = loss
        self.weights: list[float] = []                                  # of the batches' mean losses
        self.means: dict[str, list[float]] = defaultdict(list)          # name -> one mean per batch
        self.predictions: list[np.ndarray] = []                         # (n,) classes or tokens, one array per batch
        self.labels: list[np.ndarray] = []                              # (n,) those expected, IGNORE where none is

    def add(self, loss: float, ctx: Context, targets: Targets) -> None:
        """Add one batch: its mean loss, the Context of its pass with the logits in ctx.output, and its targets.

        Perplexity wants the cross-entropy, which is computed here if the loss is another one.
        """
        self.weights.append(targets.weight)
        self.means["loss"].append(loss)
        if has_labels(ctx, targets):
            if isinstance(self.loss, CrossEntropy) and not self.loss.smoothing:
                self.means["cross_entropy"].append(loss)
            else:
                self.means["cross_entropy"].append(float(cross_entropy(self.model, ctx.output, targets).data))
            logits = array.asnumpy(ctx.output.data)
            self.predictions.append(logits.reshape(len(targets.labels), -1).argmax(-1))
            self.labels.append(targets.labels)
        for name, value in self.loss.metrics(ctx, targets).items():
            self.means[name].append(float(value))

    def metrics(self) -> dict[str, float]:
        """{name: value} over all batches: means with the batches' weights; accuracy and macro-F1 over all labels.

        ValueError if no batch was added, or if no label has a class weight.
        """
        if not self.weights:
            raise ValueError("evaluate wants at least one batch, got no batches")
        if not sum(self.weights):
            raise ValueError("evaluate wants a label whose class weight is not 0, got none")
        further = {name: pool(values, self.weights)[0] for name, values in self.means.items()}
        metrics = {"loss": further.pop("loss")}
        if "cross_entropy" in further:                                  # some batch had labels
            metrics["perplexity"] = pool(self.means["cross_entropy"], self.weights)[1]  # not a mean of perplexities
            del further["cross_entropy"]
            labels = np.concatenate(self.labels)
            predictions = np.concatenate(self.predictions)[labels != IGNORE]
            labels = labels[labels != IGNORE]
            metrics["accuracy"] = float((predictions == labels).mean())
            if isinstance(getattr(self.model, "head", None), Classifier):
                from ..data.baselines import macro_f1
                metrics["macro_f1"] = macro_f1(labels, predictions)
        return metrics | further


def has_labels(ctx: Context, targets: Targets) -> bool:
    """True if every row of the logits has an integer label."""
    labels: Any = targets.labels
    return labels is not None and labels.dtype.kind in "iu" and len(labels) == math.prod(ctx.output.shape[:-1])


def pool(losses: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """The loss and the perplexity of all batches together.

    ℓ = Σ wᵢ ℓᵢ / Σ wᵢ,   perplexity = e^ℓ

    losses: the mean loss ℓᵢ of each batch. weights: the number wᵢ of tokens in each batch. Where ℓ > 700, the
    perplexity is e^700: e^ℓ would overflow. A batch of weight 0 has no mean loss: it is left out.
    """
    loss = sum(w * l for w, l in zip(weights, losses) if w) / sum(weights)
    return loss, math.exp(min(loss, 700))


@checked_keywords
def perplexity(model: Module, batches: Iterable) -> float:
    """e to the mean negative log-likelihood over all tokens of all batches. It is not the mean of perplexities."""
    return evaluate(model, batches)["perplexity"]

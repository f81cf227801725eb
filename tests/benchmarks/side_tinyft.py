"""tinyft's side: the step that `fit` runs, without its bookkeeping."""
from __future__ import annotations

from collections.abc import Callable

from cases import ALPHA, BOTTLENECK, CLASSES, PREFIX, RANK, Case, batch

import tinyft as tf
from tinyft import kernels
from tinyft.objective import objective, question

METHODS = {"lora_qv": lambda: tf.LoRA(r=RANK, alpha=ALPHA, targets="attn.[qv]"), "bitfit": tf.BitFit,
           "lora_all": lambda: tf.LoRA(r=RANK, alpha=ALPHA, targets=("attn.[qkvo]", "mlp.up", "mlp.down")),
           "houlsby": lambda: tf.Houlsby(m=BOTTLENECK), "prefix": lambda: tf.PrefixTuning(p=PREFIX),
           "head": lambda: tf.Partial(k=0)}


def build(c: Case) -> tf.Module:
    kernels.keep_memory()
    if c.model == "gpt":
        model = tf.GPT(tf.GPTConfig(c.V, c.T + PREFIX, c.C, c.L, c.H))
    else:
        model = tf.BERT(tf.BERTConfig(c.V, c.T + PREFIX, 2, c.C, c.L, c.H))
    if c.method == "head":
        tf.classifier(model, classes=CLASSES)
    if c.method in METHODS:
        tf.attach(model, METHODS[c.method]())
    return model.train()


def start(model: tf.Module, c: Case) -> tuple[Callable[[], float], int]:
    "(a training step that returns its loss, how many numbers train)"
    optimizer, asked = tf.AdamW(1e-3).start(tf.trained(model)), question(batch(c))

    def step() -> float:
        _, loss = objective(model, asked)
        loss.backward()
        optimizer.step()
        (optimizer if hasattr(optimizer, "zero_grad") else model).zero_grad()
        return loss.item()
    return step, sum(p.size for p in tf.trained(model).values())

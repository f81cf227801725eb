"""Prompt tuning: The Power of Scale for Parameter-Efficient Prompt Tuning.
Lester, Al-Rfou, Constant, EMNLP 2021.  arXiv:2104.08691

    X ← [P; E(x)]        P (p, C) trains, everything else is frozen                              §2

The prompt has the positions 0 .. p − 1; the text starts at p. The rows of the prompt are dropped
after the last block, so that logits, labels and BERT's [CLS] keep their positions. In an
encoder-decoder, as the paper's T5, the prompt stands before the source. Its rows stay: the decoder
attends to them, and the source mask covers them.

Departures: the rows of P start as embeddings of random tokens, the paper's second choice;
`init="uniform"` is its first, ±0.5. The paper trains with Adafactor at a constant learning rate of
0.3; here it is AdamW.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import array, ops
from ...checks import one_of, whole
from ...edit import Edit, Method, base_modules, stacks, token_embedding
from ...nn import Context, Embedding, Module, Parameter, dense
from ...tensor import Tensor


@dataclass(frozen=True)
class PromptTuning(Method):
    """p: prompt length;  init: "vocabulary" (embeddings of random tokens) or "uniform" (±0.5)."""

    p: int = 20
    init: str = "vocabulary"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("PromptTuning: p", self.p, least=0)
        one_of("PromptTuning: init", self.init, ("vocabulary", "uniform"))

    def find(self, model: Module) -> dict[str, Module]:
        """The token embedding and the last block; of an encoder-decoder, the token embedding.

        TypeError for other stacks."""
        if set(stacks(model)) == {"encoder", "decoder"}:
            return token_embedding(model)
        if len(stacks(model)) != 1:
            names = ", ".join(stacks(model))
            raise TypeError("PromptTuning wants a model with one stack, or with an encoder and a "
                            f"decoder, got {names}")
        (blocks,) = stacks(model).values()
        return {**token_embedding(model), blocks[-1]: base_modules(model)[blocks[-1]]}

    def edit(self, path: str, module: Module, rng: np.random.Generator) -> Edit:
        if isinstance(module, Embedding):
            return SoftPrompt(module, self.p, self.init, rng)
        return Drop(self.p)


class SoftPrompt(Edit):
    """P in front of the embeddings."""

    keeps_shape = False

    def __init__(self, embed: Embedding, p: int, init: str, rng: np.random.Generator):
        if init == "uniform":
            P = rng.uniform(-0.5, 0.5, (p, embed.out_features)).astype(np.float32)
        else:
            tokens = rng.integers(0, embed.in_features, p)
            P = array.asnumpy(dense(embed.weight))[tokens]
        self.P = Parameter(array.asarray(P), decay=False)

    def after(self, x: Any, y: Tensor, ctx: Context) -> Tensor:
        if ctx.past_length:                              # the prompt is in the cache already
            return y
        if ctx.source is not None:                       # of a decoder: its source has the prompt
            return y
        B = y.shape[0]
        p, C = self.P.shape
        ctx.prepend(p)
        return ops.concatenate(ops.broadcast_to(self.P, (B, p, C)), y, axis=1)      # (B, p + T, C)


class Drop(Edit):
    """Remove the rows of the prompt."""

    keeps_shape = False

    def __init__(self, p: int):
        self._p = p

    def after(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        if ctx.past_length:                              # the prompt is in the cache, not in y
            return y
        return y[:, self._p:]

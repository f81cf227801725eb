"""Prompt tuning: The Power of Scale for Parameter-Efficient Prompt Tuning.  Lester, Al-Rfou, Constant, EMNLP 2021.  arXiv:2104.08691

    X ← [P; E(x)]        P (p, C) trains, everything else is frozen                                                      §2

Positions: the prompt stands at 0 .. p − 1, the text starts at p.  Its rows are dropped after the last block, so that logits, labels and
BERT's [CLS] stay where they were.

Departures: rows of P start as embeddings of random tokens (the paper's second choice; `init="uniform"` is its first, ±0.5); the paper's
Adafactor with a constant rate of 0.3 is AdamW here.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import array, ops
from ...edit import Edit, Method
from ...nn import Context, Module, Packed, Parameter
from ...tensor import Tensor


@dataclass(frozen=True)
class PromptTuning(Method):
    "p: prompt length;  init: 'vocabulary' (embeddings of random tokens) or 'uniform' (±0.5)."
    p: int = 20
    init: str = "vocabulary"
    targets: Any = ("embed", "blocks.*")

    def edits(self, found: dict[str, Module], rng: np.random.Generator) -> dict[str, Edit]:
        if self.init not in ("vocabulary", "uniform"):
            raise ValueError(f"PromptTuning's init is 'vocabulary' or 'uniform', not {self.init!r}")
        *_, top = (p for p in found if not p.endswith("embed"))                  # the last block
        return {p: SoftPrompt(m, self.p, self.init, rng) if p.endswith("embed") else Drop(self.p)
                for p, m in found.items() if p.endswith("embed") or p == top}


class SoftPrompt(Edit):
    "P in front of the embeddings."

    def __init__(self, embed: Module, p: int, init: str, rng: np.random.Generator):
        if init == "uniform":
            P = rng.uniform(-0.5, 0.5, (p, embed.out_features)).astype(np.float32)
        else:
            W = embed.weight.dequantize() if isinstance(embed.weight, Packed) else embed.weight.data
            P = array.asnumpy(W)[rng.integers(0, embed.in_features, p)]
        self.P = Parameter(array.asarray(P), decay=False)

    def after(self, x: Any, y: Tensor, ctx: Context) -> Tensor:
        if ctx.past_length:                                                            # the prompt is in the cache already
            return y
        (p, C), B = self.P.shape, y.shape[0]
        ctx.prepend(p)
        return ops.concatenate(ops.broadcast_to(self.P, (B, p, C)), y, axis=1)


class Drop(Edit):
    "The prompt's rows leave again."

    def __init__(self, p: int):
        self._p = p

    def after(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        return y if ctx.past_length else y[:, self._p:]

"""LoRA: Low-Rank Adaptation of Large Language Models.  Hu et al., ICLR 2022.  arXiv:2106.09685

    y = x W₀ᵀ + b + (α/r) (x Aᵀ) Bᵀ          W₀ (out, in) frozen,  A (r, in) ~ U(±1/√in),  B (out, r) = 0         §4.1, eq. 3
    merged:  W = W₀ + (α/r) B A

As a change of the output it costs two thin products and never builds the (out, in) gradient of W.  On an embedding, whose input is
numbers of rows, the weight itself is changed: a tied head reads the same weight, and both see it.

Departures: the paper draws A from a Gaussian; its code, PEFT and we draw it uniformly from ±1/√in (Kaiming, a = √5).
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import array, ops
from ...array import Array
from ...edit import Edit, Method
from ...nn import Context, Dropout, Embedding, Module, Packed, Parameter
from ...tensor import Tensor


@dataclass(frozen=True)
class LoRA(Method):
    "r: rank;  alpha: the update is scaled by alpha/r;  dropout: on the branch's input;  targets: the linear maps (or the embedding) to adapt."
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Any = "attn.[qv]"

    def edit(self, path: str, module: Module, rng: np.random.Generator) -> Edit:
        if len(getattr(vars(module).get("weight"), "shape", ())) != 2:
            raise TypeError(f"LoRA adapts a weight matrix; {path} is a {type(module).__name__} and has none")
        if not 0 < self.r:
            raise ValueError(f"LoRA wants a rank r >= 1, got {self.r}")
        rows, cols = module.weight.shape
        kind = LowRankWeight if isinstance(module, Embedding) else LowRank
        return kind(cols, rows, self.r, self.alpha / self.r, self.dropout, rng)


class LowRank(Edit):
    "s (x Aᵀ) Bᵀ beside the module's output."

    def __init__(self, in_features: int, out_features: int, r: int, s: float, dropout: float, rng: np.random.Generator):
        bound = in_features**-0.5
        self.A = Parameter(array.asarray(rng.uniform(-bound, bound, (r, in_features)).astype(np.float32)))
        self.B = Parameter(array.asarray(np.zeros((out_features, r), np.float32)))
        self.s, self.drop = s, Dropout(dropout)

    def delta(self) -> Array:
        "ΔW = s B A"
        return self.s * (self.B.data @ self.A.data)

    def after(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        return y + ops.linear(ops.linear(self.drop(x, ctx), self.A) * self.s, self.B)      # s on the r-wide side: no array of y's size

    def fold(self, p: dict[str, Array]) -> dict[str, Array]:
        return {**p, "weight": p["weight"] + self.delta()}


class LowRankWeight(LowRank):
    "W + s B A, seen by everyone who reads the weight: what an embedding needs, tied or not.  No dropout: there is no input to thin."
    takes_packed = True
    after, fold = Edit.after, Edit.fold

    def tensor(self, name: str, p: Any) -> Any:
        if name != "weight":
            return p
        return (Tensor(p.dequantize()) if isinstance(p, Packed) else p) + (self.B @ self.A) * self.s

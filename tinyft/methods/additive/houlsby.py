"""Adapters: Parameter-Efficient Transfer Learning for NLP.  Houlsby et al., ICML 2019.  arXiv:1902.00751

    h ← h + W_up g(W_down h + b_down) + b_up        W_down (m, C),  W_up (C, m),  g = GELU                              §2.1, fig. 2

after the attention's output projection and after the MLP, each time before the residual sum; layer norms train too, and the head.
Weights N(0, σ²) cut at 2σ with σ = 1e-2, biases 0: near the identity, not exactly it.

Departures: none in the method; σ is the paper's (its code uses 1e-3).
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import ops
from ...edit import Edit, Method, base_modules, base_parameters, inside
from ...nn import Context, LayerNorm, Linear, Module
from ...tensor import Tensor


@dataclass(frozen=True)
class Houlsby(Method):
    "m: bottleneck width;  std: σ of the initial weights;  norms: whether the base's layer norms train."
    m: int = 64
    std: float = 1e-2
    norms: bool = True
    targets: Any = ("blocks.*.attn", "blocks.*.mlp")

    def edit(self, path: str, module: Module, rng: np.random.Generator) -> Edit:
        return Bottleneck(module.out_features, self.m, self.std, rng)

    def trains(self, model: Module) -> set[str]:
        norms = {path for path, m in base_modules(model).items() if isinstance(m, LayerNorm)}
        names = base_parameters(model)
        return {n for n in names if inside(n, norms) and not inside(n, ["head"])} if self.norms else set()


class Bottleneck(Edit):
    "h + up(gelu(down(h)))"

    def __init__(self, c: int, m: int, std: float, rng: np.random.Generator):
        self.down, self.up = Linear(c, m, rng=rng), Linear(m, c, rng=rng)
        for layer in (self.down, self.up):
            layer.weight.copy_(truncated_normal(rng, layer.weight.shape, std))

    def after(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        return y + self.up(ops.gelu(self.down(y, ctx)), ctx)


def truncated_normal(rng: np.random.Generator, shape: tuple, std: float) -> np.ndarray:
    "N(0, std²), redrawn beyond 2 std."
    z = rng.standard_normal(shape)                       # host
    while (far := abs(z) > 2).any():
        z[far] = rng.standard_normal(int(far.sum()))     # host
    return z * std

"""Adapters: Parameter-Efficient Transfer Learning for NLP.  Houlsby et al., ICML 2019.
arXiv:1902.00751

    h ← h + W_up g(W_down h + b_down) + b_up                                       §2.1, fig. 2
    W_down (m, C),  W_up (C, m),  g = GELU

Each sublayer (attention, cross-attention, MLP) gets one adapter on its output, before the residual
sum. The layer norms train too, and so does the head. Weights are drawn from N(0, σ²), cut at 2σ,
with σ = 1e-2; biases are 0. So the first outputs are near those of the base, not equal to them.

Departures: none in the method; σ is the paper's (its code uses 1e-3).
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import ops
from ...checks import flag, number, whole
from ...edit import (
    Edit,
    Method,
    base_modules,
    base_parameters,
    check_targets,
    inside,
    select,
    sublayers,
)
from ...nn import Context, LayerNorm, Linear, Module, RMSNorm
from ...tensor import Tensor


@dataclass(frozen=True)
class Houlsby(Method):
    """m: bottleneck width;  std: σ of the initial weights;  norms: train the base's layer norms;
    targets: the modules that get an adapter; by default, every sublayer of every stack."""

    m: int = 64
    std: float = 1e-2
    norms: bool = True
    targets: Any = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("Houlsby: m", self.m, least=1)
        number("Houlsby: std", self.std, low=0)
        flag("Houlsby: norms", self.norms)
        if not isinstance(self.targets, tuple) or self.targets:          # () is every sublayer
            check_targets("Houlsby: targets", self.targets)

    def find(self, model: Module) -> dict[str, Module]:
        if self.targets:
            return select(model, self.targets)
        paths = sublayers(model)
        return {path: m for path, m in base_modules(model).items() if path in paths}

    def edit(self, path: str, module: Module, rng: np.random.Generator) -> Edit:
        """The adapter of one module. TypeError for a module whose output has no known width."""
        width = getattr(module, "out_features", None)
        if width is None:
            raise TypeError(f"Houlsby wants modules with out_features, such as attn and mlp; "
                            f"{path} is a {type(module).__name__} and has none")
        return Bottleneck(width, self.m, self.std, rng)

    def trains(self, model: Module) -> set[str]:
        """The names of the tensors of all layer norms, except those inside the head or the pooler.

        A layer norm is a LayerNorm, an RMSNorm, or a module that `sublayers` gives as the norm of a
        sublayer. The head and the pooler are two of `model.top_modules`. GPT's last norm is one of
        them itself, and trains. A norm inside an edit is not one of the base and does not count.
        The result is the empty set if self.norms is False."""
        if not self.norms:
            return set()
        norms = set(sublayers(model).values())
        for path, module in base_modules(model).items():
            if isinstance(module, (LayerNorm, RMSNorm)) and not inside(path, model.top_modules):
                norms.add(path)
        return {name for name in base_parameters(model) if inside(name, norms)}


class Bottleneck(Edit):
    """The adapter of one module: down to m numbers, gelu, and up again, added to the output."""

    def __init__(self, width: int, m: int, std: float, rng: np.random.Generator):
        self.down = Linear(width, m, rng=rng)
        self.up = Linear(m, width, rng=rng)
        for layer in (self.down, self.up):
            layer.weight.copy_(truncated_normal(rng, layer.weight.shape, std))

    def after(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        """The new output y + up(gelu(down(y))) of a module. Gradients reach y, down and up.

        y (..., C): the module's output. x: the module's input, of any shape; it is not used.
        self.down: Linear, C to m. self.up: Linear, m to C. ctx is passed on to both."""
        return y + self.up(ops.gelu(self.down(y, ctx)), ctx)


def truncated_normal(rng: np.random.Generator, shape: tuple, std: float) -> np.ndarray:
    """Random numbers from N(0, std²), none of them beyond ±2 std: a float64 array of this shape.

    A number beyond ±2 std is drawn again, until it lies inside. All numbers come from rng."""
    z = rng.standard_normal(shape)                       # host
    far = abs(z) > 2
    while far.any():
        z[far] = rng.standard_normal(int(far.sum()))     # host
        far = abs(z) > 2
    return z * std

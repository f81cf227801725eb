"""Full fine-tuning: every tensor of the base trains.

    θ ← θ − η AdamW(∇_θ L)
"""
from __future__ import annotations

from dataclasses import dataclass

from ...edit import Method, base_parameters
from ...nn import Module


@dataclass(frozen=True)
class Full(Method):
    """Everything trains. Learning rates of 1e-5 to 1e-3, lower for larger models."""

    def trains(self, model: Module) -> set[str]:
        return set(base_parameters(model))

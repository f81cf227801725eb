"""Full fine-tuning: every tensor of the base trains.

    θ ← θ − η AdamW(∇_θ L)
"""
from __future__ import annotations

from dataclasses import dataclass

from ...edit import Method


@dataclass(frozen=True)
class Full(Method):
    "Everything trains.  Rates of 1e-5 to 1e-3, falling with the size of the model."

    def trains(self, name: str) -> bool:
        return True

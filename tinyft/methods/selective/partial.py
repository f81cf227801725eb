"""Partial fine-tuning: the top k blocks, what stands above them, and the head.  Howard & Ruder, ACL 2018; Houlsby et al. 2019, §3.4.

    trains  {blocks L−k .. L−1}  ∪  {final norm, pooler}  ∪  {head};      k = 0 is the head alone (a linear probe)

Gradients stop below the lowest trained block: nothing is computed there.
Departures: a language model's tied head is the input embedding, which stays frozen; untied heads and new task heads train.
"""
from __future__ import annotations

import re
from dataclasses import dataclass

from ...edit import Method, base_modules, base_parameters
from ...nn import Module


@dataclass(frozen=True)
class Partial(Method):
    """k: the number of blocks that train, from the top."""

    k: int = 1

    def trains(self, model: Module) -> set[str]:
        depth = sum(re.fullmatch(r"blocks\.\d+", p) is not None for p in base_modules(model))
        if not 0 <= self.k <= depth:
            raise ValueError(f"Partial wants 0 <= k <= {depth}, the model's number of blocks; got {self.k}")

        def trains(name: str) -> bool:
            first, *rest = name.split(".")
            if first == "blocks":
                return int(rest[0]) >= depth - self.k
            return first in ("pooler", "head") or (first == "norm" and self.k > 0)      # BERT has no final norm
        return {name for name in base_parameters(model) if trains(name)}

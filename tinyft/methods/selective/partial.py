"""Partial fine-tuning: the top k blocks, what stands above them, and the head.  Howard & Ruder, ACL 2018; Houlsby et al. 2019, §3.4.

    trains  {blocks L−k .. L−1}  ∪  {final norm, pooler}  ∪  {head};      k = 0 is the head alone (a linear probe)

Gradients stop below the lowest trained block: nothing is computed there.
Departures: a language model's tied head is the input embedding, which stays frozen; untied heads and new task heads train.
"""
from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ...edit import Method, base_modules
from ...nn import Module


@dataclass(frozen=True)
class Partial(Method):
    "k: how many blocks train, from the top.  depth is read off the model when the method is attached."
    k: int = 1
    depth: int | None = None

    def prepare(self, model: Module) -> Method:
        depth = sum(re.fullmatch(r"blocks\.\d+", p) is not None for p in base_modules(model))
        if not 0 <= self.k <= depth:
            raise ValueError(f"Partial wants 0 <= k <= {depth}, the model's number of blocks; got {self.k}")
        return replace(self, depth=depth)

    def trains(self, name: str) -> bool:
        first, *rest = name.split(".")
        if first == "blocks":
            return int(rest[0]) >= self.depth - self.k
        return first in ("pooler", "head") or (first == "norm" and self.k > 0)      # BERT has no final norm

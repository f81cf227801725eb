"""Partial fine-tuning: the top k blocks, the modules above them, and the head.
Howard & Ruder, ACL 2018; Houlsby et al., ICML 2019, §3.4.

    trained:  {blocks L−k .. L−1 of every stack}  ∪  {final norm, pooler}  ∪  {head}

With k = 0 the norms stay frozen too, and the head alone trains: a linear probe. No gradient
is computed below the lowest trained block.

Departures: a tied head is the input embedding, which stays frozen. Untied and new heads train.
"""
from __future__ import annotations

from dataclasses import dataclass

from ...checks import whole
from ...edit import Method, base_modules, base_parameters, inside, stacks
from ...nn import LayerNorm, Module, RMSNorm


@dataclass(frozen=True)
class Partial(Method):
    """k: the number of blocks that train, from the top of every stack."""

    k: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("Partial: k", self.k, least=0)

    def trains(self, model: Module) -> set[str]:
        """Names of the tensors of the top k blocks of every stack and of the modules above them.

        With k = 0 the norms above the blocks are left out. ValueError unless every stack has k
        blocks."""
        depth = min(len(blocks) for blocks in stacks(model).values())
        if not 0 <= self.k <= depth:
            raise ValueError(
                f"Partial wants 0 <= k <= {depth}, the model's number of blocks; got {self.k}")
        modules = base_modules(model)
        paths = set(model.top_modules)
        if self.k == 0:
            norms = (LayerNorm, RMSNorm)
            paths = {path for path in paths if not isinstance(modules.get(path), norms)}
        for blocks in stacks(model).values():
            paths.update(blocks[len(blocks) - self.k:])
        return {name for name in base_parameters(model) if inside(name, paths)}

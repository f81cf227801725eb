"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models.
Ben-Zaken, Goldberg, Ravfogel, ACL 2022.  arXiv:2106.10199

    y = W x + b,   LN(x) = g ⊙ (x − μ)/σ + β        only b, β and the new head train            §2

The bias of the keys gets no gradient: q·b_k adds one constant to a row of scores, and softmax
ignores it. With rotary positions it gets one: b_k is rotated by the position of its key.
Learning rates are ten to twenty times those of full fine-tuning.

Departures: none.
"""
from __future__ import annotations

from dataclasses import dataclass

from ...edit import Method, base_modules, base_parameters, is_head
from ...nn import Module


@dataclass(frozen=True)
class BitFit(Method):
    """Every tensor that is the `bias` of its module trains."""

    def trains(self, model: Module) -> set[str]:
        """The names of all biases. ValueError if no module below the head has a bias.

        A tensor is a bias if some module holds it as its attribute `bias`."""
        own = [module.own() for module in base_modules(model).values()]
        biases = {id(tensors["bias"]) for tensors in own if "bias" in tensors}
        names = {name for name, p in base_parameters(model).items() if id(p) in biases}
        if all(is_head(model, name) for name in names):
            raise ValueError("BitFit would train nothing on this model: it has no biases")
        return names

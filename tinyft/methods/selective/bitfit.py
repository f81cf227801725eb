"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models.  Ben-Zaken et al., ACL 2022.  arXiv:2106.10199

    y = W x + b,   LN(x) = g ⊙ (x − μ)/σ + β:      only b and β train, with the new head                                §2

The key's bias gets no gradient: q·b_k adds one constant to a whole row of scores, and softmax does not see it.
Rates are ten to twenty times those of full fine-tuning.
"""
from __future__ import annotations

from dataclasses import dataclass

from ...edit import Method, base_modules, base_parameters, is_head
from ...nn import Module


@dataclass(frozen=True)
class BitFit(Method):
    """Every tensor that is the `bias` of its module trains. Raises ValueError on a model without biases."""

    def trains(self, model: Module) -> set[str]:
        parameters = base_parameters(model)
        biases = {id(m.own()["bias"]) for m in base_modules(model).values() if "bias" in m.own()}
        names = {name for name, p in parameters.items() if id(p) in biases}
        if all(is_head(model, name) for name in names):      # the head alone would not be BitFit
            raise ValueError("BitFit would train nothing on this model: it has no biases")
        return names

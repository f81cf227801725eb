"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models.  Ben-Zaken et al., ACL 2022.  arXiv:2106.10199

    y = W x + b,   LN(x) = g ⊙ (x − μ)/σ + β:      only b and β train, with the new head                                §2

The key's bias gets no gradient: q·b_k adds one constant to a whole row of scores, and softmax does not see it.
Rates are ten to twenty times those of full fine-tuning.
"""
from __future__ import annotations

from dataclasses import dataclass

from ...edit import Method, base_parameters, is_head
from ...nn import Module


@dataclass(frozen=True)
class BitFit(Method):
    "Every tensor whose own name is `bias` trains.  ValueError on a model that has none: the head alone would not be BitFit."

    def prepare(self, model: Module) -> Method:
        if not any(self.trains(n) and not is_head(model, n) for n in base_parameters(model)):
            raise ValueError("BitFit would train nothing on this model: it has no biases")
        return self

    def trains(self, name: str) -> bool:
        return name.split(".")[-1] == "bias"                                     # the last name: T5 has a relative_attention_bias.weight

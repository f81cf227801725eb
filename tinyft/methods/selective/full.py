"""Full fine-tuning: every tensor of the base trains.

    θ ← θ − η AdamW(∇_θ L)

A packed weight has no gradient: LoRA trains beside it.
"""
from __future__ import annotations

from dataclasses import dataclass

from ...edit import Method, base_parameters
from ...nn import Module, Packed

SHOWN = 3                                # names of packed parameters in the error


@dataclass(frozen=True)
class Full(Method):
    """Everything trains. Learning rates of 1e-5 to 1e-3, lower for larger models."""

    def trains(self, model: Module) -> set[str]:
        """The names of all tensors of the base. ValueError, naming them, if some are packed."""
        packed = [path for path, m in model.named_modules() if isinstance(m, Packed)]
        if packed:
            names = ", ".join(packed[:SHOWN]) + (", ..." if len(packed) > SHOWN else "")
            raise ValueError(
                f"Full trains every parameter, and {len(packed)} packed ones cannot train "
                f"({names}): "
                "attach LoRA, which is QLoRA on an NF4 base, or call tinyft.unpack(model) first")
        return set(base_parameters(model))

"""The names that transformers gives to the modules of a model. PEFT and AdapterHub name modules by them.

    blocks.0.attn.q, .k and .v   are   transformer.h.0.attn.c_attn   in a GPT-2 with a head
                                       h.0.attn.c_attn               in the class without a head, and in the table
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .. import array
from ..edit import base_modules, base_parameters, is_head
from ..formats.huggingface import FAMILIES, Family
from ..nn import Module, dense

__all__ = ["ModuleNames", "NamedModule"]


@dataclass(frozen=True)
class NamedModule:
    """A module of transformers that has a weight, and the modules here that hold it.

    name        in transformers, in the class with the model's head
    table_name  in the table of the family, without the prefix of the class
    paths       here, in the order in which the output features of the module belong to them
    transposed  True if its weight is stored (in, out)
    """
    name: str
    table_name: str
    paths: tuple[str, ...]
    transposed: bool


class ModuleNames:
    """The modules of one model, by their names in transformers and by their paths here.

    family, plan  the model's family, and its sizes and head
    modules       every NamedModule, in the order of the family's table
    table_names   {name in the table: NamedModule}
    tensors       {name of a tensor here: its name in transformers}; the parts of a fused tensor have one name there"""

    def __init__(self, model: Module, caller: str):
        """caller: the function that got the model, for the message.

        ValueError for a model, or a head, that no directory of transformers can hold."""
        self.family = family_of(model, caller)
        self.plan = self.family.plan_of(model)
        self.tensors = {}
        weights: dict[str, list[tuple[int, str, bool]]] = {}       # name in the table: (third, path here, transposed)
        for ours, place in self.family.table(self.plan).items():
            self.tensors[ours] = self.family.file_name(place.name, self.plan)
            if place.name.endswith(".weight"):
                part = (place.third or 0, ours.removesuffix(".weight"), place.transposed)
                weights.setdefault(place.name, []).append(part)
        self.modules = []
        for weight, parts in weights.items():
            name = self.family.file_name(weight, self.plan).removesuffix(".weight")
            paths = tuple(path for _, path, _ in sorted(parts))
            self.modules.append(NamedModule(name, weight.removesuffix(".weight"), paths, transposed=parts[0][2]))
        self.table_names = {module.table_name: module for module in self.modules}
        self._of_path = {path: module for module in self.modules for path in module.paths}

    def of_path(self, path: str) -> NamedModule | None:
        """The module of transformers that holds our module at this path; None if transformers has none."""
        return self._of_path.get(path)

    def of_name(self, name: str) -> NamedModule | None:
        """The module of this name in transformers, with or without the prefix of the class; None if there is none."""
        table_name = self.family.table_name(f"{name}.weight")
        return None if table_name is None else self.table_names.get(table_name.removesuffix(".weight"))

    def tied_head(self, model: Module) -> tuple[str, str] | None:
        """(name of the output layer in transformers, path of the embedding here) if the two share a weight, or None."""
        embedding = next((path for path, module in base_modules(model).items() if module.tied), None)
        aliases = list(self.family.aliases(self.plan))
        if embedding is None or not aliases:
            return None
        return aliases[0].removesuffix(".weight"), embedding

    def head_and_pooler(self) -> dict[str, str]:
        """{name here: name in transformers} of the tensors of a classifier and of the layer below it, the pooler.

        Empty for a model without a classifier."""
        if self.plan.head != "classes":
            return {}
        return {ours: theirs for ours, theirs in self.tensors.items() if ours.split(".")[0] in ("head", "pooler")}

    def new_head(self, model: Module) -> dict[str, str]:
        """{name here: name in transformers} of the tensors of a classifier, and of its pooler if that is new."""
        parts = {"head", *getattr(model, "head_modules", ())}
        return {ours: theirs for ours, theirs in self.head_and_pooler().items() if ours.split(".")[0] in parts}

    def is_in_body(self, name: str) -> bool:
        """True if a tensor of this name in transformers is in the part below the head: its class has a prefix there."""
        return self.family.table_name(name) != name

    def differs_from_base(self, model: Module, name: str, stored: np.ndarray) -> bool:
        """True unless a tensor of a file is this model's tensor of the same name in transformers, the tied output layer
        included, as far as the dtypes of the two show it.

        A library that reads such a file would put it in the place of the base's own."""
        table_name = self.family.aliases(self.plan).get(name) or self.family.table_name(name)
        found = [ours for ours, place in self.family.table(self.plan).items() if place.name == table_name]
        if len(found) != 1:
            return True
        path, _, attribute = found[0].rpartition(".")
        own = array.asnumpy(dense(getattr(base_modules(model)[path], attribute)))
        if own.shape != stored.shape:
            return True
        return not (np.array_equal(own.astype(stored.dtype), stored) or np.array_equal(stored.astype(own.dtype), own))

    def new_head_values(self, model: Module, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The values for a new head, {name here: array}, from those of a file; none for a head of the base.

        ValueError for another shape, and for a head that is part of the base and has other values than the file."""
        parameters = base_parameters(model)
        kept = {}
        for name, stored in values.items():
            own = array.asnumpy(parameters[name].data)
            if own.shape != stored.shape:
                raise ValueError(f"the classifier in the file has {name} of the shape {stored.shape}, "
                                 f"this model's has {own.shape}")
            if is_head(model, name):
                kept[name] = stored
            elif not np.array_equal(stored.astype(own.dtype), own):
                part = "classifier" if name.startswith("head.") else "pooler"
                advice = {"classifier": "call tinyft.classifier first, and the file's values replace the new ones",
                          "pooler": "start from a base without a classifier"}
                raise ValueError(f"the file holds a trained {part}, and this model's is a part of its base: "
                                 f"{advice[part]}")
        return kept


def family_of(model: Module, caller: str) -> Family:
    """The family of a model. ValueError if there is none."""
    for family in FAMILIES:
        if family.holds(model):
            return family
    known = ", ".join(dict.fromkeys(family.model.__name__ for family in FAMILIES))
    raise ValueError(f"{caller} wants one of {known}, got a {type(model).__name__}")

"""The protocol of a model family: all that huggingface.py needs to know to read and write its directories.

A new family is one module with a subclass of `Family`, and one line in `huggingface.FAMILIES`.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any

import numpy as np

from ..nn import Module
from .layout import Plan, Table


class Family(ABC):
    """The names, shapes and conventions of one `model_type`.

    model_type  the value of `model_type` in config.json
    model       the class of the model
    tied        {second name: first name} of tensors that a file may hold under two names; the table has the first name.
                If the output layer is tied, its weight is the first entry
    """
    model_type: str
    model: type[Module]
    tied: dict[str, str]

    @abstractmethod
    def table_name(self, name: str) -> str | None:
        """The table's name of a tensor in a file; None for a tensor that is no weight of the model."""

    def aliases(self, plan: Plan) -> dict[str, str]:
        """The entries of `tied` that hold for this plan: for some models config.json says whether the head is tied."""
        return self.tied

    def holds(self, model: Module) -> bool:
        """True if this family writes the model. Several families may share one class."""
        return type(model) is self.model

    @abstractmethod
    def read_config(self, config: dict, names: Collection[str]) -> Plan:
        """The model that config.json describes.

        names  the table names of the file's tensors, which decide on optional parts

        ValueError if the library's model cannot compute what config.json asks for.
        """

    @abstractmethod
    def table(self, plan: Plan) -> Table:
        """{name in the model: FileTensor} of every tensor of the model."""

    @abstractmethod
    def build(self, plan: Plan) -> Module:
        """The model of a plan, with zeros in its matrices. Its head counts as part of the model, not as a new head."""

    @abstractmethod
    def plan_of(self, model: Module) -> Plan:
        """The plan from which `build` makes this model. ValueError if the format has no place for the model's head."""

    @abstractmethod
    def write_config(self, plan: Plan) -> dict[str, Any]:
        """The config.json of a plan."""

    def fallbacks(self, plan: Plan) -> dict[str, Any]:
        """Entries of config.json that are written unless the model's own file or its tokenizer gives them."""
        return {}

    @abstractmethod
    def file_name(self, name: str, plan: Plan) -> str:
        """The name, in the files that transformers writes, of the tensor with this table name."""

    def unused(self, plan: Plan) -> Collection[str]:
        """Table names of tensors that a file may hold and the plan's model does not have. They are not read."""
        return ()

    def check_unused(self, name: str, tensor: np.ndarray, plan: Plan) -> None:
        """Raise ValueError if the plan's model computes something else than this tensor, one of `unused`, says."""
        return None

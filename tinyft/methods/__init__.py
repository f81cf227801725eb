"""Every method, in the taxonomy of the field; one file per paper.

    selective           a subset of the base's own tensors trains
    additive            new modules beside the base
    reparameterized     an update of the weights that has few parameters
"""
from __future__ import annotations

import sys
from typing import NamedTuple

from ..edit import Method
from .additive.houlsby import Houlsby
from .additive.prefix import PrefixTuning
from .additive.prompt import PromptTuning
from .reparameterized.lora import LoRA
from .selective.bitfit import BitFit
from .selective.full import Full
from .selective.partial import Partial

ALL: tuple[type[Method], ...] = (Full, Partial, BitFit, Houlsby, PromptTuning, PrefixTuning, LoRA)

__all__ = [*(cls.__name__ for cls in ALL), "methods", "Entry"]


class Entry(NamedTuple):
    """One row of the table of methods: a class, its family, its paper, a line about its fields."""

    cls: type[Method]
    family: str
    paper: str
    line: str


def methods() -> list[Entry]:
    """Every method class, as a table. Each class is constructible without arguments.

    paper and line are the first lines of the docstrings of the class's file and of the class."""
    table = []
    for cls in ALL:
        family = cls.__module__.split(".")[-2]           # tinyft.methods.<family>.<file>
        paper = sys.modules[cls.__module__].__doc__.strip().splitlines()[0]
        line = (cls.__doc__ or "").strip().splitlines()[0]
        table.append(Entry(cls, family, paper, line))
    return table

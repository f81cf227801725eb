"""Every method, in the taxonomy of the field; one file per paper.

    selective           a subset of the base's own tensors trains
    additive            new parts beside the base
    reparameterized     an update of the weights in few numbers
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

__all__ = ["Full", "Partial", "BitFit", "Houlsby", "PromptTuning", "PrefixTuning", "LoRA", "methods", "Entry"]

ALL: tuple[type[Method], ...] = (Full, Partial, BitFit, Houlsby, PromptTuning, PrefixTuning, LoRA)


class Entry(NamedTuple):
    "One line of the table of methods."
    cls: type[Method]
    family: str
    paper: str
    line: str


def methods() -> list[Entry]:
    "Every method class with its family, its paper and one line.  Each can be made without arguments."
    out = []
    for cls in ALL:
        head = sys.modules[cls.__module__].__doc__.strip().splitlines()[0]
        out.append(Entry(cls, cls.__module__.split(".")[-2], head, (cls.__doc__ or "").strip().splitlines()[0]))
    return out

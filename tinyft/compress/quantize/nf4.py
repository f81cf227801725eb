"""NF4: 4-bit NormalFloat, with double quantization.  Dettmers, Pagnoni, Holtzman, Zettlemoyer, 2023, QLoRA.
arXiv:2305.14314

    ŵ = value[code] · a        a = max |w| of 64 neighbours;   value: 16 quantiles of the normal distribution      §3

The weights of a trained layer are nearly normal, so each of the 16 values stands for about as many weights as any
other. No data is needed. FP4, E2M1 and Dynamic8 are other data types in the same blocks: ../codebooks.py has the
tables, and double quantization.

QLoRA is LoRA on all linear maps of such a base:

    reports = ft.compress(model, ft.NF4())                              every linear map of the blocks: 4.127 bits
    maps = [report.path for report in reports]
    ft.attach(model, ft.LoRA(r=16, targets=maps))                       trains beside the packed weights
    ft.fit(model, batches, steps=200, optimizer=ft.AdamW(lr=2e-4))
    ft.save_adapter(model, "work/adapter")                              the adapter alone

To use it later, load the same base, compress it again, and load the adapter. `merge` refuses to write into 4 bits: keep
the adapter beside the base, or `ft.merge(ft.unpack(model))` for a dense model.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ... import checks
from ..codebooks import Codebook, DoubleScale, get_table, quantize_blocks
from ..rule import Rule, check_weight

__all__ = ["E2M1", "FP4", "NF4", "Dynamic8"]


class InBlocks(Rule):
    """Every weight takes the nearest value of a data type, scaled by the largest magnitude of its block."""

    table: ClassVar[str]
    block: int
    double: bool

    def __post_init__(self) -> None:
        name = type(self).__name__
        checks.whole(f"{name}: block", self.block, least=1)
        checks.flag(f"{name}: double", self.double)

    def __call__(self, W: np.ndarray, H: Any = None) -> Codebook:
        """The packed weight of W (out, in)."""
        W = check_weight(type(self).__name__, W)
        codes, scale = quantize_blocks(W, get_table(self.table), min(self.block, W.shape[1]))
        if self.double:
            scale = DoubleScale.quantize(scale)
        return Codebook(codes, scale, table=self.table, group=self.block)


@dataclass(frozen=True)
class NF4(InBlocks):
    """4-bit NormalFloat.

    block    neighbours in a row that share a scale
    double   True: 8 bits for a scale instead of 32, with a second scale for every 256"""

    table: ClassVar[str] = "nf4"

    block: int = 64
    double: bool = True


@dataclass(frozen=True)
class FP4(InBlocks):
    """bitsandbytes' 4-bit floating point. block, double: as NF4's."""

    table: ClassVar[str] = "fp4"

    block: int = 64
    double: bool = True


@dataclass(frozen=True)
class E2M1(InBlocks):
    """The 4-bit floating point of the Open Compute Project. block, double: as NF4's."""

    table: ClassVar[str] = "e2m1"

    block: int = 64
    double: bool = True


@dataclass(frozen=True)
class Dynamic8(InBlocks):
    """The 8-bit dynamic data type. block, double: as NF4's. A block whose largest magnitude is negative keeps 0.993 of
    it, since −1 is not among the values."""

    table: ClassVar[str] = "dynamic"

    block: int = 256
    double: bool = False

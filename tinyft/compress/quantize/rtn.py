"""Round-to-nearest (RTN): every weight takes the nearest value of its group's grid.

    ŵ = s (clip(rint(w/s) + z, 0, top) − z)          s and z of each group of g neighbours in a row: grids.py

It needs no data. The error of a weight is at most s/2 (affine, symmetric and absmax grids).
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import checks
from ..grids import check_kind, fit_groups
from ..grouped import Uniform
from ..rule import Rule, check_weight

__all__ = ["RTN", "round_to_nearest"]


@dataclass(frozen=True)
class RTN(Rule):
    """Round-to-nearest: each weight alone, without data.

    bits    1 ... 8
    group   weights that share a scale, along a row; None: the whole row
    grid    "affine", "symmetric", "absmax" (at least 2 bits), "ternary" (2 bits), "sign" (1 bit)"""

    bits: int = 4
    group: int | None = 64
    grid: str = "affine"

    def __post_init__(self) -> None:
        check_kind("RTN", self.grid, self.bits)
        if self.group is not None:
            checks.whole("RTN: group", self.group, least=1)

    def __call__(self, W: np.ndarray, H: Any = None) -> Uniform:
        """The packed weight of W (out, in)."""
        return round_to_nearest(W, self.grid, self.bits, self.group, caller="RTN")


def round_to_nearest(W: np.ndarray, kind: str, bits: int, group: int | None = None, *,
                     caller: str = "round_to_nearest", input_scale: np.ndarray | None = None) -> Uniform:
    """W (out, in) on its grid, packed. caller: the name for messages. input_scale: that of the packed weight."""
    W = check_weight(caller, W)
    width = W.shape[1]
    group = width if group is None else min(group, width)
    grids = fit_groups(W, kind, bits, group, half_scales=True)                           # (out, groups)
    codes = grids[:, np.arange(width) // group].encode(W)
    return Uniform.from_grid(codes, grids, kind=kind, bits=bits, group=group, input_scale=input_scale)

"""Rotary positions: queries and keys are rotated by their positions, so that a score depends on the distance alone.

B batch, T time, H heads, D head width.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from .. import checks, ops
from ..array import Array, xp
from ..keywords import checked_keywords
from ..nn import Context
from ..tensor import Tensor


@checked_keywords
@dataclass(frozen=True)
class RotaryScaling:
    """A change of the frequencies of rotary positions, for longer texts than those of pretraining.

    kind "linear": every frequency is divided by `factor`.
    kind "llama3": frequencies of waves longer than `original / low` positions are divided by `factor`; those of waves
    shorter than `original / high` stay; between the two a mean of both is taken (Llama 3.1).

    original: the number of positions in pretraining"""
    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def __post_init__(self) -> None:
        checks.one_of("RotaryScaling: kind", self.kind, ("linear", "llama3"))
        checks.number("RotaryScaling: factor", self.factor, above=0)
        checks.whole("RotaryScaling: original", self.original, least=1)
        checks.number("RotaryScaling: low", self.low, above=0)
        checks.number("RotaryScaling: high", self.high, above=0)
        if self.low >= self.high:
            raise ValueError(f"RotaryScaling wants low < high, got low {self.low} and high {self.high}")

    def apply(self, frequencies: Array) -> Array:
        """The changed frequencies (D/2,), in radians per position."""
        slow = frequencies / self.factor
        if self.kind == "linear":
            return slow
        waves = self.original * frequencies / (2 * math.pi)       # waves in a text of pretraining's length
        share = (waves - self.low) / (self.high - self.low)
        share = xp(frequencies).clip(share, 0, 1)                 # of the unchanged frequency
        return share * frequencies + (1 - share) * slow


class Rotary:
    """Rotary positions: the pair (xᵢ, xᵢ₊D⸝₂) of a head is rotated by the angle position · base^(−2i/D).

    q · k then depends on the distance of their positions alone. The pairs are Llama's: the two halves of a head, not
    neighbours.  Su et al. 2021, §3.2

    width: the width D of a head, an even number. scaling: a change of the frequencies, for long texts."""

    def __init__(self, width: int, *, base: float = 10000.0, scaling: RotaryScaling | None = None):
        if width % 2:
            raise ValueError(f"rotary positions want heads of an even width, got {width}")
        self.width = width
        self.base = base
        self.scaling = scaling

    def __call__(self, x: Tensor, ctx: Context) -> Tensor:
        """x (B, H, T, D), rotated by the positions of ctx."""
        cos, sin = self.factors(x, ctx)
        return ops.rotary(x, cos, sin)

    def frequencies(self, m: ModuleType = np) -> Array:
        """base^(−2i/D) for the pairs i = 0 ... D/2 − 1, in radians per position: (D/2,) float64.

        D is self.width. Unless self.scaling is None, its method `apply` changes them.
        m: the module that makes the array, NumPy or CuPy: a captured step copies nothing to the device."""
        frequencies = self.base ** (-m.arange(0, self.width, 2, dtype=np.float64) / self.width)
        return frequencies if self.scaling is None else self.scaling.apply(frequencies)

    def factors(self, x: Tensor, ctx: Context) -> tuple[Array, Array]:
        """cos and sin of the angles position · frequency for x (B, H, T, D): two arrays (B or 1, 1, T, D).

        The two halves of a head's width are rotated together, so both halves hold the same angles. All layers of a pass
        share the result, which ctx.scratch keeps."""
        key = ("rotary", self.width, self.base, self.scaling, x.shape[2], x.dtype)
        if key not in ctx.scratch:
            positions = ctx.positions()                                          # (B or 1, T)
            m = xp(positions)
            dtype = np.promote_types(x.dtype, np.float32)                        # 16 bits hold no large positions
            frequencies = self.frequencies(m).astype(dtype)
            angles = positions[:, None, :, None].astype(dtype) * frequencies     # (B or 1, 1, T, D/2)
            angles = m.concatenate([angles, angles], axis=-1)
            ctx.scratch[key] = m.cos(angles).astype(x.dtype), m.sin(angles).astype(x.dtype)
        return ctx.scratch[key]

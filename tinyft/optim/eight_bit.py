"""Adam and AdamW whose moments have 8 bits: 2 bytes of state a parameter instead of 8.

8-bit Optimizers via Block-wise Quantization.  Dettmers, Lewis, Shleifer, Zettlemoyer, ICLR 2022.  arXiv:2110.02861

    m = value[code] a,   a = max |m| of the block        v as well, with the values of positive numbers          §2.2
    a step:    m, v in float32;    adam_update;    m, v to 8 bits

A block is 2048 neighbours of one tensor. An outlier spoils the precision of its own block alone. The values are those
of dynamic.py: their relative error is small over seven decades, as moments need it.

Departures: a second moment above 0 takes at least the smallest value above 0.  Rounded to 0, it would leave ε alone
under the fraction, and its parameter would move by many times the learning rate.  Tensors of fewer than 4096 elements
keep moments of 32 bits, as in the authors' code.  Under a mask, the moments of the entries that may not move decay;
they are 0 if these entries never moved.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .. import array, checks
from ..array import Array, xp
from ..dynamic import decode, encode
from ..keywords import checked_keywords
from ..precision import HALVES
from ..tensor import Tensor
from .buffers import Group, Piece, masked_gradient
from .master import MasterWeights
from .optimizers import Adam, AdamW

__all__ = ["Adam8bit", "AdamW8bit"]

SMALL = 4096                                   # elements; a tensor of fewer keeps 32-bit moments
AT_ONCE = 1 << 17                              # elements that are in float32 at a time, at least one block
LARGEST = np.finfo(np.float32).max
SIGNED = (True, False)                         # of m and of v


class Moment8:
    """One moment of one tensor, flat: codes (n,) uint8, and the scale of each block (blocks,) float32."""

    def __init__(self, n: int, block: int, *, signed: bool, like: Array):
        """n zeros, on the device of `like`."""
        m = xp(like)
        self.block = block
        self.signed = signed
        zero = encode(m.zeros(1, np.float32), signed=signed)
        self.codes = m.zeros(n, np.uint8) + zero
        self.scale = m.zeros(-(-n // block), np.float32)

    def read(self, part: slice) -> Array:
        """The numbers in a stretch of whole blocks, float32."""
        numbers = decode(self.codes[part], signed=self.signed)
        for in_blocks, scale in self.by_block(part, numbers):
            in_blocks *= scale
        return numbers

    def write(self, part: slice, numbers: Array) -> None:
        """Round numbers, float32, to 8 bits. numbers is used up."""
        m = xp(numbers)
        positive = None if self.signed else numbers > 0
        for in_blocks, scale in self.by_block(part, numbers):
            scale[...] = m.minimum(abs(in_blocks).max(axis=1, keepdims=True), LARGEST)
            in_blocks /= m.where(scale == 0, np.float32(1), scale)
        codes = encode(numbers, signed=self.signed)
        if positive is not None:
            codes = m.maximum(codes, positive)                       # 1 is the code of the smallest
        self.codes[part] = codes

    def by_block(self, part: slice, numbers: Array) -> Iterator[tuple[Array, Array]]:
        """Views (numbers (blocks, block), scales (blocks, 1)) of the whole blocks of a stretch, then of a short one."""
        first = part.start // self.block
        whole = len(numbers) // self.block
        end = whole * self.block
        if whole:
            yield numbers[:end].reshape(whole, self.block), self.scale[first:first + whole, None]
        if end < len(numbers):
            yield numbers[None, end:], self.scale[first + whole:first + whole + 1, None]

    def move_beside(self, like: Array) -> None:
        """Move to the device of the array `like`."""
        self.codes = array.put_like(array.asnumpy(self.codes), like)
        self.scale = array.put_like(array.asnumpy(self.scale), like)


@dataclass
class Group8(Group):
    """A group whose moments have 8 bits. Each tensor is a piece by itself, so that no block holds two tensors.

    block    elements of a block
    states   {name: [m, v]}"""
    block: int = 0
    states: dict[str, list[Moment8]] = field(default_factory=dict)

    def lay_out(self, moments: int) -> None:
        """As Group.lay_out, with 8-bit moments in `states`, and none in `moments`."""
        super().lay_out(0)
        for name, p in self.tensors.items():
            self.states[name] = [Moment8(p.size, self.block, signed=signed, like=self.w) for signed in SIGNED]

    def move_beside(self, like: Array) -> None:
        """As Group.move_beside."""
        super().move_beside(like)
        for moments in self.states.values():
            for moment in moments:
                moment.move_beside(like)

    def pieces(self) -> list[Piece]:
        """As Group.pieces. The moments of a piece are Moment8."""
        pieces = []
        for name, p in self.tensors.items():
            if p.grad is None:
                continue
            g = masked_gradient(p).reshape(-1)
            if p.mask is None:
                p.grad = g.reshape(p.shape)
            pieces.append(Piece(self.w[self.offsets[name]], g, self.states[name], self.decay))
        return pieces

    def frozen_entries(self, masked_only: bool = False) -> list:
        """As Group.frozen_entries: a tensor without a gradient is no piece. The moments are not among the values."""
        return super().frozen_entries(masked_only=True)

    def named_arrays(self, moment_names: tuple[str, ...]) -> dict[str, Array]:
        """As Group.named_arrays: the codes in the tensor's shape, and the scales."""
        named = super().named_arrays(())                           # master weights
        for name, moments in self.states.items():
            for kind, moment in zip(moment_names, moments):
                named[f"{kind}_8bit.{name}"] = moment.codes.reshape(self.tensors[name].shape)
                named[f"{kind}_scale.{name}"] = moment.scale
        return named

    def named_shapes(self, moment_names: tuple[str, ...]) -> dict[str, tuple]:
        """As Group.named_shapes."""
        named = super().named_shapes(())
        for name, p in self.tensors.items():
            for kind in moment_names:
                named[f"{kind}_8bit.{name}"] = p.shape
                named[f"{kind}_scale.{name}"] = (-(-p.size // self.block),)
        return named


@dataclass
class MasterWeights8(Group8, MasterWeights):
    """Group8 for 16-bit tensors: float32 master weights, 8-bit moments."""


@checked_keywords
class AdamW8bit(AdamW):
    """AdamW with 8-bit moments.      As bitsandbytes' AdamW8bit"""

    def __init__(self, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.01, groups: dict[str, dict] | None = None, block: int = 2048):
        """block: elements that share a scale. For the others see AdamW."""
        super().__init__(lr, betas, eps, weight_decay, groups)
        self.block = checks.whole(f"{type(self).__name__}: block", block, least=1)

    def new_group(self, p: Tensor, lr: float, decay: float) -> Group:
        """As Optimizer.new_group: with 8-bit moments if the tensor is not small."""
        if p.size < SMALL:
            return super().new_group(p, lr, decay)
        kind = MasterWeights8 if p.dtype in HALVES else Group8
        return kind(lr, decay, block=self.block)

    def update(self, piece: Piece, lr: float) -> None:
        """The update in float32, a number of blocks at a time."""
        if not isinstance(piece.moments[0], Moment8):
            super().update(piece, lr)
            return
        n = len(piece.w)
        step = max(AT_ONCE // self.block, 1) * self.block
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            moments = [moment.read(part).astype(piece.w.dtype, copy=False) for moment in piece.moments]
            super().update(Piece(piece.w[part], piece.g[part], moments, piece.decay), lr)
            for moment, numbers in zip(piece.moments, moments):
                moment.write(part, numbers.astype(np.float32, copy=False))


@checked_keywords
class Adam8bit(AdamW8bit, Adam):
    """Adam with 8-bit moments: the decay is inside the gradient.      As bitsandbytes' Adam8bit"""

    def __init__(self, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, groups: dict[str, dict] | None = None, block: int = 2048):
        """As AdamW8bit, without weight decay by default."""
        super().__init__(lr, betas, eps, weight_decay, groups, block)

"""Master weights: the float32 values of tensors that are stored in 16 bits.

A step of a thousandth of a weight is lost in the 8 significant bits of bfloat16, and so are a thousand such steps.
The optimiser therefore updates a float32 copy of the weights, and writes it, rounded, to the tensors.
Micikevicius et al. 2018, §3.1
"""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .. import array
from ..array import Array
from ..precision import to_float32
from .buffers import Group


@dataclass
class MasterWeights(Group):
    """A group of 16-bit tensors.  w and the moments are float32; the tensors are views of `rounded`: w in 16 bits.

    A write from outside is noticed if it goes through p.copy_ or p.mark_written, or puts another array in
    p.data.  A new optimiser starts from the rounded 16-bit values.

    versions   {name: the tensor's version after the last update}
    """
    versions: dict[str, int] = field(default_factory=dict)

    def lay_out(self, moments: int) -> None:
        """Lay the 16-bit tensors out as Group does; then w and the moments become float32 copies."""
        super().lay_out(moments)
        self.rounded = self.w                                      # the tensors are views of this array
        self.w = to_float32(self.rounded)
        self.moments = [to_float32(a) for a in self.moments]
        self.record_versions()

    def reclaim_values(self) -> None:
        """Copy the values that were written to a tensor from outside into w.  All other entries of w stay.

        A tensor p was written from outside if p.data is not its view, self.views[name], or if p.version[0] differs from
        self.versions[name].  Its entries are w[self.offsets[name]].  At the end the data of every tensor is its view
        again, as Group.reclaim_values makes it."""
        written = []
        for name, version in self.versions.items():
            p = self.tensors[name]
            if p.data is not self.views[name] or p.version[0] != version:
                written.append(name)
        Group.reclaim_values(self)
        for name in written:
            self.w[self.offsets[name]] = to_float32(self.views[name]).reshape(-1)

    def move_beside(self, like: Array) -> None:
        """Move w, the moments and `rounded` to the device of the array `like`, where the tensors are already."""
        self.rounded = array.put_like(array.asnumpy(self.rounded), like)
        super().move_beside(like)
        for name, p in self.tensors.items():
            # A tensor that was only moved becomes a view again, so that reclaim_values keeps its master weights.
            if np.array_equal(array.asnumpy(p.data), array.asnumpy(self.views[name])):
                p.data = self.views[name]

    def write_rounded(self) -> None:
        """Round w to 16 bits, into the tensors."""
        self.rounded[...] = self.w

    def record_versions(self) -> None:
        """Remember the version of each tensor, so that later writes from outside are noticed."""
        self.versions = {name: p.version[0] for name, p in self.tensors.items()}

    def kinds(self, moment_names: tuple[str, ...]) -> tuple[str, ...]:
        return (*moment_names, "master")

    def persistent_arrays(self, moment_names: tuple[str, ...]) -> dict[str, Array]:
        return super().persistent_arrays(moment_names) | {"master": self.w}

"""Flat storage: the tensors that an optimiser updates lie end to end in one array.

An optimiser keeps one Group per dtype, learning rate and weight decay.  The values of a group are one flat array `w`,
and each tensor's data becomes a view of it.  The moments are flat arrays of the same length.  An update is then a few
passes over long vectors, however many tensors there are.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .. import array
from ..array import Array, xp
from ..precision import to_float32
from ..tensor import Tensor

LARGE = 1 << 15                                # elements; a larger tensor is updated by itself, its gradient not copied


@dataclass
class Piece:
    """A stretch of a group that is updated at once: values, gradients and moments, flat arrays of one length."""
    w: Array
    g: Array
    moments: list[Array]
    decay: float


class Frozen(NamedTuple):
    """A snapshot of one tensor's values and moments, taken before an update.

    offset: the tensor's slice of the flat arrays.  mask: True at the entries that the update may change; None if it may
    change none.  values: copies of w and of each moment at `offset`."""
    offset: slice
    mask: Array | None
    values: list[Array]


@dataclass
class Group:
    """Tensors of one dtype, learning rate and weight decay, stored end to end.

    tensors   {name: tensor}
    offsets   {name: slice of the flat arrays}
    w         the values of all tensors, flat
    moments   the optimiser's moments, flat, as long as w
    views     {name: the slice of `stored`, in the tensor's shape}: the tensor's data
    """
    lr: float
    decay: float
    tensors: dict[str, Tensor] = field(default_factory=dict)
    rounded = None                             # in MasterWeights: the 16-bit copy of w

    @property
    def stored(self) -> Array:
        """The flat array that the tensors are views of."""
        return self.w if self.rounded is None else self.rounded

    def lay_out(self, moments: int) -> None:
        """Lay the tensors end to end: move their values into one flat array, of which each tensor becomes a view.

        The tensors, {name: tensor} in self.tensors, have one dtype.  Sets
            self.offsets   {name: slice of the flat array}, in the order of self.tensors, but with the tensors of more
                           than LARGE elements last
            self.w         the flat array: all values, in the tensors' dtype
            self.moments   a list of `moments` arrays of zeros, each with w's length and dtype
            self.views     {name: the tensor's slice of w, in the tensor's shape}: they become the tensors' data"""
        small = [name for name, p in self.tensors.items() if p.size <= LARGE]
        large = [name for name, p in self.tensors.items() if p.size > LARGE]
        self.offsets = {}
        end = 0
        for name in small + large:
            start = end
            end = start + self.tensors[name].size
            self.offsets[name] = slice(start, end)
        first = next(iter(self.tensors.values()))
        m = xp(first.data)
        self.w = m.zeros(end, first.dtype)
        self.moments = [m.zeros(end, first.dtype) for _ in range(moments)]
        self.make_views()
        self.reclaim_values()

    def make_views(self) -> None:
        """Make a view of the stored array for each tensor, in the tensor's shape."""
        self.views = {name: self.stored[self.offsets[name]].reshape(p.shape) for name, p in self.tensors.items()}

    def reclaim_values(self) -> None:
        """Copy data that was replaced from outside (p.data = ...) into the flat array, and make it a view again.

        An update writes to the flat array, so the data of every tensor must be a view of it."""
        for name, p in self.tensors.items():
            view = self.views[name]
            if p.data is not view:
                view[...] = p.data
                p.data = view

    def follow_device(self) -> None:
        """Move values and moments to the device that model.to moved the tensors to.

        BackendError if the tensors are on more than one device; TypeError if their dtype has changed."""
        has_moved = False
        for name, p in self.tensors.items():
            view = self.views[name]
            if p.data is view:
                continue
            if p.dtype != view.dtype:
                raise TypeError(f"the tensors of this optimiser were {view.dtype} when it was started, and are "
                                f"{p.dtype} now: start it again")
            has_moved = has_moved or type(p.data) is not type(view)
        if has_moved:
            data = [p.data for p in self.tensors.values()]
            xp(*data)                                              # BackendError if they are on two devices
            self.move_beside(data[0])

    def move_beside(self, like: Array) -> None:
        """Move the flat arrays to the device of the array `like`."""
        self.w = array.put_like(array.asnumpy(self.w), like)
        self.moments = [array.put_like(array.asnumpy(a), like) for a in self.moments]
        self.make_views()

    # ── an update ──
    def pieces(self) -> list[Piece]:
        """The stretches to update, with their gradients.

        All tensors of at most LARGE elements are one piece: their gradients are copied end to end, and each .grad
        becomes a view of the copy, so that clipping changes it too.  A larger tensor is a piece of its own, and its
        gradient stays where it is.  In a piece the gradient of a masked entry is 0, so that it counts neither in the
        norm nor in the moments; the .grad of a tensor with a mask is left alone."""
        small = [name for name in self.offsets if self.tensors[name].size <= LARGE]
        large = list(self.offsets)[len(small):]
        pieces = []
        if any(self.tensors[name].grad is not None for name in small):
            pieces.append(self.joint_piece(small))
        for name in large:
            p = self.tensors[name]
            if p.grad is not None:
                g = masked_gradient(p).reshape(-1)
                if p.mask is None:
                    p.grad = g.reshape(p.shape)
                pieces.append(self.piece(self.offsets[name], g))
        return pieces

    def joint_piece(self, small: list[str]) -> Piece:
        """One piece of all small tensors, which lie at the start of w.

        A tensor without a gradient gets zeros; frozen_entries keeps its values.  Each .grad becomes a view of the
        piece's gradient, unless the tensor has a mask."""
        end = self.offsets[small[-1]].stop
        g = xp(self.w).empty(end, self.w.dtype)
        for name in small:
            p = self.tensors[name]
            offset = self.offsets[name]
            if p.grad is None:
                g[offset] = 0.0
                continue
            g[offset] = masked_gradient(p).reshape(-1)
            if p.mask is None:
                p.grad = g[offset].reshape(p.shape)
        return self.piece(slice(0, end), g)

    def piece(self, offset: slice, g: Array) -> Piece:
        """The piece at this slice of the flat arrays, with the gradient g."""
        return Piece(self.w[offset], g, [a[offset] for a in self.moments], self.decay)

    def frozen_entries(self, masked_only: bool = False) -> list[Frozen]:
        """Snapshots of the entries that an update must not change, to restore them after it.

        These are the entries where a mask is False: with gradient 0, moments and weight decay would still move them.
        Unless masked_only, also the small tensors without a gradient: pieces() updates them with the other small
        tensors."""
        frozen = []
        for name, p in self.tensors.items():
            if p.mask is None and (masked_only or p.grad is not None or p.size > LARGE):
                continue
            mask = None if p.grad is None else xp(p.data).broadcast_to(p.mask, p.shape).reshape(-1)
            offset = self.offsets[name]
            frozen.append(Frozen(offset, mask, [a[offset].copy() for a in (self.w, *self.moments)]))
        return frozen

    def restore(self, frozen: list[Frozen]) -> None:
        """Undo an update at the frozen entries."""
        for offset, mask, values in frozen:
            for a, before in zip((self.w, *self.moments), values):
                a[offset] = before if mask is None else xp(before).where(mask, a[offset].copy(), before)

    def write_rounded(self) -> None:
        """Write the updated values to the tensors.  Here the tensors are views of w already; MasterWeights rounds."""

    def record_versions(self) -> None:
        """Called after each update.  MasterWeights remembers here which writes to the tensors were the optimiser's."""

    # ── state ──
    def kinds(self, moment_names: tuple[str, ...]) -> tuple[str, ...]:
        """The names of persistent_arrays, also before the tensors are laid out."""
        return moment_names

    def persistent_arrays(self, moment_names: tuple[str, ...]) -> dict[str, Array]:
        """The flat arrays that a checkpoint must hold beside the tensors' own values, by name."""
        return dict(zip(moment_names, self.moments))

    def named_arrays(self, moment_names: tuple[str, ...]) -> dict[str, Array]:
        """{"exp_avg.<tensor name>": ...}: what persistent_arrays holds of each tensor, as views in the tensor's shape.
        """
        views = {}
        for kind, flat in self.persistent_arrays(moment_names).items():
            for name, p in self.tensors.items():
                views[f"{kind}.{name}"] = flat[self.offsets[name]].reshape(p.shape)
        return views

    def named_shapes(self, moment_names: tuple[str, ...]) -> dict[str, tuple]:
        """The shapes of named_arrays, also before the tensors are laid out."""
        return {f"{kind}.{name}": p.shape for kind in self.kinds(moment_names) for name, p in self.tensors.items()}


def masked_gradient(p: Tensor) -> Array:
    """The gradient of p, with 0 where p.mask is False; in float32 if the gradient has 16 bits.

    An array that may be written to: a copy of a read-only one, which only a user can have put there."""
    g = to_float32(p.grad)
    if p.mask is not None:
        return xp(g).where(p.mask, g, 0)
    return g if getattr(g.flags, "writeable", True) else g.copy()          # CuPy has no such flag


def read_version_0_1(state: dict[str, np.ndarray], groups: list[Group],
                     moment_names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The optimiser state of version 0.1 in today's form, one name per tensor.

    Version 0.1 stored flat arrays: "t" is the step count, "i.j" the j-th array of the i-th group.  In a flat array the
    tensors of at most 32768 elements come first.  ValueError if the arrays do not fit these groups."""
    limit = 32768
    named = {"step": state["t"]}
    flat_keys = set()
    for i, group in enumerate(groups):
        small = [name for name, p in group.tensors.items() if p.size <= limit]
        large = [name for name, p in group.tensors.items() if p.size > limit]
        total = sum(p.size for p in group.tensors.values())
        for j, kind in enumerate(group.kinds(moment_names)):
            key = f"{i}.{j}"
            flat_keys.add(key)
            if key not in state or state[key].shape != (total,):
                raise ValueError("this optimiser state belongs to other tensors: "
                                 f"its array {key} should have {total} elements")
            end = 0
            for name in small + large:
                p = group.tensors[name]
                start = end
                end = start + p.size
                named[f"{kind}.{name}"] = state[key][start:end].reshape(p.shape)
    extra = sorted(state.keys() - flat_keys - {"t"})
    if extra:
        raise ValueError("this optimiser state belongs to other tensors: "
                         f"nothing here has the arrays {', '.join(extra)}")
    return named

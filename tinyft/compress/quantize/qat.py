"""Quantization-aware training: the forward pass uses rounded weights, the gradient passes straight through.
Bengio, Léonard, Courville, 2013, arXiv:1308.3432; Jacob et al., 2017, arXiv:1712.05877 (QAT).
Learned Step Size Quantization.  Esser et al., 2019.  arXiv:1902.08153 (LSQ)

    ŵ = s (c − z),   q = rint(w/s) + z,   c = clip(q, 0, top)             s, z of each group of g neighbours in a row
    dL/dw = dL/dŵ · 1[0 <= q <= top]                                      the straight-through estimator

s is the step (the scale) of the grid and z its zero point (grids.py). QAT fits both to the weights again in every
forward pass, as round-to-nearest does (rtn.py). LSQ learns s and fixes z = 2^(b−1), so that c − z is one of
−2^(b−1) ... 2^(b−1) − 1:

    dŵ/ds = c − z − w/s  if 0 <= q <= top,  else c − z                                                   LSQ, eq. 3
    times  1/√(n Q),   Q = 2^(b−1) − 1,   n weights share s;   at the start s = 2 mean |w| / √Q              LSQ, §2.2

The true derivative of ŵ is 0 almost everywhere, so gradient descent could not train through it. The weights w stay in
full precision while they train: updates that are smaller than a step add up until ŵ changes.

    ft.attach(model, ft.QAT(bits=3));   ft.fit(model, ...);   ft.pack(model)         packed weights, the same outputs
    ft.merge(model)                                                                 or dense weights ŵ

Departures. The ternary and sign grids pass the gradient where |w| <= 1, as BinaryNet does (Courbariaux et al. 2016).
LSQ has a step for each group, where the paper has one for each layer. A weight is inside the grid if its code q is, as
in PyTorch; the paper compares w/s before rounding, which differs in the last half step. Activations are not rounded.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import array, checks, edit, ops
from ...array import Array, xp
from ...edit import Edit, Method, check_targets
from ...keywords import checked_keywords
from ...nn import Module, Parameter
from ...tensor import Tensor
from ..grids import Grid, check_kind, fit_grid, fixed_zero, join_grids
from ..grouped import Uniform
from ..layerwise import find_targets
from .rtn import RTN, round_to_nearest

__all__ = ["LSQ", "QAT", "pack"]


# ── the methods ──────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class QAT(Method):
    """Train weights through the grid of round-to-nearest.

    bits, group, grid   as RTN's
    targets             globs over paths of linear maps or embeddings; (): every linear map inside the model's blocks

    The weights of these modules train. Attach Full as well to train all other tensors.
    TypeError or ValueError for a setting out of its range."""

    bits: int = 4
    group: int | None = 64
    grid: str = "affine"
    targets: Any = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind("QAT", self.grid, self.bits)
        _check_group_and_targets("QAT", self)

    def find(self, model: Module) -> dict[str, Module]:
        """The modules whose weights are rounded. ValueError for a packed weight."""
        return find_targets(model, RTN(), None if is_default(self.targets) else self.targets)

    def edit(self, path: str, module: Module, rng: np.random.Generator) -> Edit:
        """The edit that rounds the weight of one module."""
        return FakeQuantize(self.grid, self.bits, self.group)

    def trains(self, model: Module) -> set[str]:
        """The names of the weights that are rounded."""
        return {f"{path}.weight" for path in self.find(model)}


@dataclass(frozen=True)
class LSQ(Method):
    """Train weights and the steps of their grid.

    bits      2 ... 8
    group     neighbours in a row that share a step; None: the whole row
    targets   as QAT's

    TypeError or ValueError for a setting out of its range."""

    bits: int = 4
    group: int | None = 64
    targets: Any = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.whole("LSQ: bits", self.bits, 2, 8)
        _check_group_and_targets("LSQ", self)

    def find(self, model: Module) -> dict[str, Module]:
        """The modules whose weights are rounded. ValueError for a packed weight."""
        return find_targets(model, RTN(), None if is_default(self.targets) else self.targets)

    def edit(self, path: str, module: Module, rng: np.random.Generator) -> Edit:
        """The edit that rounds the weight of one module; its steps start from this weight."""
        return LearnedStep(array.asnumpy(module.weight.data), self.bits, self.group)

    def trains(self, model: Module) -> set[str]:
        """The names of the weights that are rounded."""
        return {f"{path}.weight" for path in self.find(model)}


def is_default(targets: Any) -> bool:
    """True for (), which stands for every linear map inside the model's blocks."""
    return isinstance(targets, tuple) and not targets


def _check_group_and_targets(name: str, method: Any) -> None:
    """TypeError or ValueError for a group out of range, or for targets that are no globs. name: for the message."""
    if method.group is not None:
        checks.whole(f"{name}: group", method.group, least=1)
    if not is_default(method.targets):
        check_targets(f"{name}: targets", method.targets)


# ── the edits ────────────────────────────────────────────────────────────────────────────────────────────────────────
class FakeQuantize(Edit):
    """ŵ in place of w, on the grid that is fitted to w in each forward pass."""

    def __init__(self, kind: str, bits: int, group: int | None):
        self.kind = kind
        self.bits = bits
        self.group = group

    def tensor(self, name: str, p: Tensor) -> Tensor:
        """ŵ (out, in) for the weight p (out, in). The gradient reaches w where w is inside the grid."""
        if name != "weight":
            return p
        W = as_float32(p.data)
        rounded, inside = round_weights(W, weight_grid(W, self.kind, self.bits, self.group), self.kind)
        return straight_through(p, rounded.astype(p.dtype, copy=False), inside)

    def pack(self, W: np.ndarray) -> Uniform:
        """The packed weight of W (out, in). Its values are those that `tensor` gives."""
        return round_to_nearest(W, self.kind, self.bits, self.group, caller="pack")


class LearnedStep(Edit):
    """ŵ in place of w, on a grid whose steps s (out, groups), one for each group, train."""

    def __init__(self, W: np.ndarray, bits: int, group: int | None):
        self.bits = bits
        self.group = W.shape[1] if group is None else min(group, W.shape[1])
        starts = np.arange(0, W.shape[1], self.group)
        self._sizes = np.diff(starts, append=W.shape[1])                         # n of each group
        sums = np.add.reduceat(np.abs(W).astype(np.float64), starts, axis=1)     # Σ |w| of each group
        s = 2 * (sums / self._sizes) / np.sqrt(self.most)
        s = np.where(s == 0, 1, s)                                               # a group of zeros: any step will do
        self.s = Parameter(array.asarray(s.astype(np.float32)), decay=False)

    @property
    def most(self) -> int:
        """Q, the largest c − z."""
        return 2**(self.bits - 1) - 1

    def tensor(self, name: str, p: Tensor) -> Tensor:
        """ŵ = s clip(rint(w/s), −Q − 1, Q) for the weight. The gradient reaches w and s."""
        if name != "weight":
            return p
        s = self.steps(p)                                                        # (out, in)
        v = p / s
        m = xp(v.data)
        q = m.rint(v.data)
        inside = (q >= -self.most - 1) & (q <= self.most)
        return straight_through(v, q.clip(-self.most - 1, self.most), inside) * s

    def steps(self, p: Tensor) -> Tensor:
        """The step |s| of each weight, (out, in). The gradient of s is multiplied by 1/√(n Q)."""
        size = ops.absolute(self.s)                                              # an update may give s another sign
        factor = 1 / np.sqrt(self._sizes * self.most)                            # (groups,)
        factor = array.put_like(factor, size.data, size.dtype)
        size = straight_through(size, size.data, factor)
        group_of = np.arange(p.shape[1]) // self.group
        return size[:, array.put_like(group_of, p.data, group_of.dtype)]

    def pack(self, W: np.ndarray) -> Uniform:
        """The packed weight of W (out, in). Its values are those that `tensor` gives."""
        s = np.abs(array.asnumpy(self.s.data)).astype(np.float32)
        of_weight = s[:, np.arange(W.shape[1]) // self.group].astype(W.dtype)
        codes = Grid(of_weight, self.most + 1, 2 * self.most + 1).encode(W)
        return Uniform(codes.astype(np.uint8), s, kind="symmetric", bits=self.bits, group=self.group)


def straight_through(x: Tensor, value: Array, factor: Array) -> Tensor:
    """A Tensor with this value, whose gradient with respect to x is `factor`: value + f x − detach(f x).

    The value and the factor broadcast against x. The last two terms cancel in the value; only f x has a gradient."""
    scaled = x * factor
    return Tensor(value) + (scaled - scaled.detach())


# ── rounding, where the weights lie ──────────────────────────────────────────────────────────────────────────────────
def weight_grid(W: Array, kind: str, bits: int, group: int | None) -> Grid:
    """The grid of each weight of W (out, in), as round_to_nearest fits it. Its scale is (out, in); its zero is (out,
    in) if the kind is affine, else one number. Both are on the device of W.

    Only the numbers that decide a grid, at most two of each group, are copied to the host."""
    out, width = W.shape
    group = width if group is None else min(group, width)
    whole = width // group * group                                               # the inputs in full groups
    parts = [W[:, :whole].reshape(out, -1, group)]                               # (out, groups, g)
    if whole < width:
        parts.append(W[:, None, whole:])
    grids = []
    for part in parts:
        deciding = array.asnumpy(extremes(part, kind))
        grids.append(fit_grid(deciding, kind, bits, half_scales=True)[..., 0])
    grid = join_grids(grids)[:, np.arange(width) // group]                       # of groups, then of weights
    zero = grid.zero
    if fixed_zero(kind, bits) is None:
        zero = array.put_like(zero, W, W.dtype)
    return type(grid)(array.put_like(grid.scale, W, W.dtype), zero, grid.top)


def extremes(W: Array, kind: str) -> Array:
    """The numbers that decide the grid of each group of W (..., g), on the device of W.

    The least and the largest weight, (..., 2); for ternary and sign grids mean |w|, (..., 1)."""
    if kind in ("ternary", "sign"):
        return abs(W).mean(axis=-1, keepdims=True, dtype=np.float64).astype(W.dtype)
    return xp(W).concatenate([W.min(axis=-1, keepdims=True), W.max(axis=-1, keepdims=True)], axis=-1)


def round_weights(W: Array, grid: Grid, kind: str) -> tuple[Array, Array]:
    """(ŵ, inside), both (out, in) as W; inside is True where the gradient passes."""
    if kind == "sign":
        codes = (W >= 0).astype(W.dtype)
    else:
        q = xp(W).rint(W / grid.scale) + grid.zero
        codes = q.clip(0, grid.top)
    if kind in ("ternary", "sign"):
        inside = abs(W) <= 1
    else:
        inside = (q >= 0) & (q <= grid.top)
    return grid.scale * (codes - grid.zero), inside


def as_float32(W: Array) -> Array:
    """W in float32, unless it is float64: the values of a grid have more digits than a 16-bit dtype holds."""
    return W if W.dtype == np.float64 else W.astype(np.float32, copy=False)


# ── after training ───────────────────────────────────────────────────────────────────────────────────────────────────
@checked_keywords
def pack(model: Module, name: str | None = None) -> Module:
    """Replace the weights that QAT or LSQ trained with packed weights on the same grid, and remove the method.

    name   of the attached method; None: the last one

    The outputs stay the same. For QAT, the packed weights are those of `compress` with RTN and the same settings.
    A method that trains the same weights and has no edits, such as Full, is merged with it: its values stay.
    Returns the model. TypeError for another method, LookupError for an unknown name, CannotMerge if other methods
    prevent it; nothing is changed then."""
    edit.check_model("pack", model)
    a = edit.get_attached(model, name)
    if not isinstance(a.method, (QAT, LSQ)):
        raise TypeError(f"pack wants a model with QAT or LSQ attached, got {type(a.method).__name__}")
    modules = edit.base_modules(model)
    weights = {path: modules[path].weight for path in a.edits}
    packed = {}
    for path, rounding in a.edits.items():
        W = array.asnumpy(as_float32(weights[path].data))
        packed[path] = rounding.pack(W)
    plain = [b.name for b in edit.attached(model) if not b.edits and b.base_values.keys() & a.base_values.keys()]
    edit.merge(model, a.name, *plain)
    for path, weight in packed.items():
        dense = weights[path]
        modules[path].weight = weight.to(array.name_of(dense.data), dtype=dense.dtype)
    return model

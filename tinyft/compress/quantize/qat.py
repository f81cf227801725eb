"""Quantization-aware training: the forward pass uses rounded weights, the gradient passes straight through.
Bengio, Léonard, Courville, 2013, arXiv:1308.3432; Jacob et al., 2017, arXiv:1712.05877 (QAT).
Learned Step Size Quantization.  Esser et al., 2019.  arXiv:1902.08153 (LSQ)

    ŵ = s (c − z),   q = rint(w/s) + z,   c = clip(q, 0, top)             s, z of each group of g neighbours in a row
    dL/dw = dL/dŵ · 1[0 <= q <= top]                                      the straight-through estimator

QAT fits s and z to the weights anew in every forward pass, as round-to-nearest does (rtn.py). LSQ learns s, with z in
the middle of the codes, so that c − z = −2^(b−1) ... 2^(b−1) − 1:

    dŵ/ds = c − z − w/s  if 0 <= q <= top,  else c − z                                                   LSQ, eq. 3
    times  1/√(n Q),   Q = 2^(b−1) − 1,   n weights share s;   at the start s = 2 mean |w| / √Q              LSQ, §2.2

The true derivative of ŵ is 0 almost everywhere, so no method with gradients could train through it. The weights w keep
all their digits while they train: an update too small for a step adds up until the weight moves on.

    ft.attach(model, ft.QAT(bits=3));   ft.fit(model, ...);   ft.pack(model)         packed weights, the same outputs
    ft.merge(model)                                                                 or dense weights ŵ

Departures. The ternary and sign grids pass the gradient where |w| <= 1, as BinaryNet does (Courbariaux et al. 2016).
LSQ has a step for each group, the paper one for each layer, and counts a weight as inside by its code, as PyTorch does;
the paper compares w/s itself, which differs in the last half step. Activations are not rounded.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import array, checks, edit, ops
from ...array import Array, xp
from ...edit import Edit, Method, check_targets
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
    targets             globs of the linear maps or embeddings; (): every linear map inside the model's blocks

    The weights of these modules train. Attach Full beside it to train all other tensors as well."""

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
    group     weights that share a step, along a row; None: the whole row
    targets   as QAT's"""

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
        """The edit that rounds the weight of one module, with its first steps."""
        return LearnedStep(array.asnumpy(module.weight.data), self.bits, self.group)

    def trains(self, model: Module) -> set[str]:
        """The names of the weights that are rounded."""
        return {f"{path}.weight" for path in self.find(model)}


def is_default(targets: Any) -> bool:
    """True for (), which stands for every linear map inside the model's blocks."""
    return isinstance(targets, tuple) and not targets


def _check_group_and_targets(name: str, method: Any) -> None:
    """TypeError or ValueError for a group or targets that make no sense. name: of the method, for the message."""
    if method.group is not None:
        checks.whole(f"{name}: group", method.group, least=1)
    if not is_default(method.targets):
        check_targets(f"{name}: targets", method.targets)


# ── the edits ────────────────────────────────────────────────────────────────────────────────────────────────────────
class FakeQuantize(Edit):
    """ŵ in place of w, on the grid that w itself gives."""

    def __init__(self, kind: str, bits: int, group: int | None):
        self.kind = kind
        self.bits = bits
        self.group = group

    def tensor(self, name: str, p: Tensor) -> Tensor:
        """ŵ for the weight, with the gradient of w where w is inside the grid."""
        if name != "weight":
            return p
        W = as_float32(p.data)
        rounded, inside = round_weights(W, weight_grid(W, self.kind, self.bits, self.group), self.kind)
        return straight_through(p, rounded.astype(p.dtype, copy=False), inside)

    def pack(self, W: np.ndarray) -> Uniform:
        """The packed weight of W (out, in), with the values of `tensor`."""
        return round_to_nearest(W, self.kind, self.bits, self.group, caller="pack")


class LearnedStep(Edit):
    """ŵ in place of w, with a step s for each group that trains.    s (out, groups)"""

    def __init__(self, W: np.ndarray, bits: int, group: int | None):
        self.bits = bits
        self.group = W.shape[1] if group is None else min(group, W.shape[1])
        starts = np.arange(0, W.shape[1], self.group)
        self._sizes = np.diff(starts, append=W.shape[1])                         # n of each group
        means = np.add.reduceat(np.abs(W).astype(np.float64), starts, axis=1) / self._sizes
        s = 2 * means / np.sqrt(self.most)
        self.s = Parameter(array.asarray(np.where(s == 0, 1, s).astype(np.float32)), decay=False)

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
        """The step of each weight, (out, in). Its gradient is multiplied by 1/√(n Q)."""
        size = ops.absolute(self.s)                                              # an update may cross 0
        factor = array.put_like(1 / np.sqrt(self._sizes * self.most), size.data, size.dtype)             # (groups,)
        size = straight_through(size, size.data, factor)
        group_of = np.arange(p.shape[1]) // self.group
        return size[:, array.put_like(group_of, p.data, group_of.dtype)]

    def pack(self, W: np.ndarray) -> Uniform:
        """The packed weight of W (out, in), with the values of `tensor`."""
        s = np.abs(array.asnumpy(self.s.data)).astype(np.float32)
        of_weight = s[:, np.arange(W.shape[1]) // self.group].astype(W.dtype)
        codes = Grid(of_weight, self.most + 1, 2 * self.most + 1).encode(W)
        return Uniform(codes.astype(np.uint8), s, kind="symmetric", bits=self.bits, group=self.group)


def straight_through(x: Tensor, value: Array, factor: Array) -> Tensor:
    """A Tensor with this value, and with the gradient of x times `factor`: value + (f x − the number f x)."""
    scaled = x * factor
    return Tensor(value) + (scaled - scaled.detach())


# ── rounding, where the weights lie ──────────────────────────────────────────────────────────────────────────────────
def weight_grid(W: Array, kind: str, bits: int, group: int | None) -> Grid:
    """The grid of each weight of W (out, in), that of round_to_nearest: scale (out, in), zero so or one number.

    Only what a grid depends on, two numbers of each group, goes to the host."""
    out, width = W.shape
    group = width if group is None else min(group, width)
    whole = width // group * group                                               # the inputs in full groups
    parts = [W[:, :whole].reshape(out, -1, group)]
    if whole < width:
        parts.append(W[:, None, whole:])
    grids = [fit_grid(array.asnumpy(extremes(part, kind)), kind, bits, half_scales=True)[..., 0] for part in parts]
    grid = join_grids(grids)[:, np.arange(width) // group]
    zero = grid.zero
    if fixed_zero(kind, bits) is None:
        zero = array.put_like(zero, W, W.dtype)
    return type(grid)(array.put_like(grid.scale, W, W.dtype), zero, grid.top)


def extremes(W: Array, kind: str) -> Array:
    """The least and the largest weight of each group (..., 2), or mean |w| (..., 1): enough to fit its grid."""
    if kind in ("ternary", "sign"):
        return abs(W).mean(axis=-1, keepdims=True, dtype=np.float64).astype(W.dtype)
    return xp(W).concatenate([W.min(axis=-1, keepdims=True), W.max(axis=-1, keepdims=True)], axis=-1)


def round_weights(W: Array, grid: Grid, kind: str) -> tuple[Array, Array]:
    """(ŵ, 1 where the gradient passes), both as W (out, in)."""
    m = xp(W)
    if kind == "sign":
        codes = (W >= 0).astype(W.dtype)
    else:
        q = m.rint(W / grid.scale) + grid.zero
        codes = q.clip(0, grid.top)
    inside = abs(W) <= 1 if kind in ("ternary", "sign") else (q >= 0) & (q <= grid.top)
    return grid.scale * (codes - grid.zero), inside


def as_float32(W: Array) -> Array:
    """W in float32, unless it is float64: grids have more digits than 16-bit numbers."""
    return W if W.dtype == np.float64 else W.astype(np.float32, copy=False)


# ── after training ───────────────────────────────────────────────────────────────────────────────────────────────────
def pack(model: Module, name: str | None = None) -> Module:
    """Replace the weights that QAT or LSQ trained with packed ones on the same grid, and take the method off.

    name   of the attached method; None: the last one

    The outputs stay the same. For QAT this is `compress` with RTN of the same settings, on the trained weights.
    TypeError for another method, LookupError for an unknown name, CannotMerge if other methods are in the way; then
    nothing was changed."""
    edit.check_model("pack", model)
    a = edit.get_attached(model, name)
    if not isinstance(a.method, (QAT, LSQ)):
        raise TypeError(f"pack wants a model with QAT or LSQ attached, got {type(a.method).__name__}")
    modules = edit.base_modules(model)
    weights = {path: modules[path].weight for path in a.edits}
    packed = {path: e.pack(array.asnumpy(as_float32(weights[path].data))) for path, e in a.edits.items()}
    edit.merge(model, a.name)
    for path, weight in packed.items():
        dense = weights[path]
        modules[path].weight = weight.to(array.name_of(dense.data), dtype=dense.dtype)
    return model

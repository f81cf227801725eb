"""Optimisers, gradient clipping and schedules.

An optimiser is made from its hyper-parameters and bound to tensors by `start`; it then owns flat buffers, one per group of tensors
that share a rate and a decay: the tensors become views of one array, their moments lie in two more, and a step is a few passes over
long vectors.  As in PyTorch, clipping scales the `.grad` of the tensors.  What does not train has no state.  Weight decay leaves out
biases, norms, gates and soft prompts: tensors with fewer than two axes, or marked decay=False.

Of tensors in 16 bits it keeps the values in float32 (master weights) and shows them rounded: a step of a thousandth of a weight is lost in
eight bits of fraction, and a thousand such steps are too.      Micikevicius et al. 2018, §3.1
"""
from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import array, dispatch
from ..array import Array, xp
from ..precision import HALVES, widen
from ..tensor import Tensor

__all__ = ["Optimizer", "SGD", "Adam", "AdamW", "constant_schedule", "linear_schedule", "cosine_schedule"]


LARGE = 1 << 15                                          # numbers: a tensor of more is worth a pass of its own


@dataclass
class Group:
    "Tensors of one dtype, rate factor and decay, laid end to end.  w: their values, moments: as many as the optimiser keeps."
    lr: float
    decay: float
    names: list[str] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)

    def lay_out(self, moments: int) -> None:
        """Move the tensors into one flat array, those of more than LARGE numbers last.

        names, tensors: in that order.  w: all values, end to end.  moments: as many arrays of zeros, of w's length and dtype.  slices: where in
        w each tensor lies.  views: that stretch of w in the tensor's shape, which becomes the tensor's data."""
        order = sorted(range(len(self.tensors)), key=lambda i: self.tensors[i].size > LARGE)
        self.names, self.tensors = [self.names[i] for i in order], [self.tensors[i] for i in order]
        m, ends = xp(self.tensors[0].data), np.cumsum([0] + [p.size for p in self.tensors])
        self.slices = [slice(int(a), int(b)) for a, b in zip(ends, ends[1:])]
        self.w, *self.moments = (m.zeros(int(ends[-1]), self.tensors[0].dtype) for _ in range(1 + moments))
        self.look()
        self.gather_values()

    def look(self) -> None:
        "Views of the flat array in the tensors' shapes."
        self.views = [self.w[s].reshape(p.shape) for s, p in zip(self.slices, self.tensors)]

    def gather_values(self) -> None:
        "Take back tensors whose data was replaced from outside."
        for p, view in zip(self.tensors, self.views):
            if p.data is not view:
                view[...] = p.data
                p.data = view

    def follow(self) -> None:
        "Values and moments to where model.to took the tensors.  BackendError if that is more than one place, TypeError if to another dtype."
        if all(p.data is view or (type(p.data) is type(view) and p.dtype == view.dtype) for p, view in zip(self.tensors, self.views)):
            return
        if other := next((p.dtype for p, view in zip(self.tensors, self.views) if p.dtype != view.dtype), None):
            raise TypeError(f"the tensors this optimiser updates were {self.views[0].dtype} when it was started, and are {other} now: start it again")
        xp(*(p.data for p in self.tensors))                                      # raises with both places named
        self.move(lambda a: array.put_like(array.asnumpy(a), self.tensors[0].data))

    def move(self, there: Callable[[Array], Array]) -> None:
        self.w, *self.moments = map(there, (self.w, *self.moments))
        self.look()

    def pieces(self) -> list[Piece]:
        """What there is to update.  A large tensor's gradient is used where it lies; those of the small ones are put end to end, and
        become views of that.  Zero where a mask lets nothing move: what is held counts neither in the norm nor in the moments."""
        out, small = [], [(p, s) for p, s in zip(self.tensors, self.slices) if p.size <= LARGE]
        if any(p.grad is not None for p, _ in small):
            g = xp(self.w).empty(sum(p.size for p, _ in small), self.w.dtype)
            for p, s in small:
                g[s] = 0.0 if p.grad is None else free(p).reshape(-1)
                if p.grad is not None and p.mask is None:
                    p.grad = g[s].reshape(p.shape)
            out.append(self.piece(slice(0, len(g)), g))
        for p, s in zip(self.tensors[len(small):], self.slices[len(small):]):
            if p.grad is not None:
                g = free(p).reshape(-1)
                if p.mask is None:
                    p.grad = g.reshape(p.shape)
                out.append(self.piece(s, g))
        return out

    def piece(self, s: slice, g: Array) -> Piece:
        return Piece(self.w[s], g, [a[s] for a in self.moments], self.decay)

    def held(self, gathered: bool = True) -> list[tuple[slice, Any, list[Array]]]:
        """What an update must not move: (place, where it may move, its values and moments now).  gathered: small tensors are updated
        together, those without a gradient too."""
        out = []
        for p, s in zip(self.tensors, self.slices):
            if p.mask is not None or (gathered and p.grad is None and p.size <= LARGE):
                may = None if p.grad is None else xp(p.data).broadcast_to(p.mask, p.shape).reshape(-1)
                out.append((s, may, [a[s].copy() for a in (self.w, *self.moments)]))
        return out

    def put_back(self, held: list) -> None:
        for s, may, old in held:
            for a, was in zip((self.w, *self.moments), old):
                a[s] = was if may is None else xp(a).where(may, a[s], was)

    def show(self) -> None:
        "Let the tensors see what was updated.  Nothing to do, but for Rounded ones."

    def note(self) -> None:
        "The tensors are as this optimiser has written them: what differs later was written by others."

    shown = None
    kept = property(lambda self: self.moments, doc="what outlives a step and is not the tensors' own")


@dataclass
class Rounded(Group):
    """Tensors in 16 bits.  w and moments are float32; the tensors are views of `shown`: w, rounded.
    What others write is seen by p.copy_, p.touch or another array in p.data.  Whoever starts an optimiser anew starts from what is shown."""
    versions: list[int] = field(default_factory=list)

    def lay_out(self, moments: int) -> None:
        super().lay_out(moments)
        self.shown, self.w, self.moments = self.w, widen(self.w), [widen(a) for a in self.moments]
        self.note()

    def look(self) -> None:
        self.views = [(self.w if self.shown is None else self.shown)[s].reshape(p.shape) for s, p in zip(self.slices, self.tensors)]

    def gather_values(self) -> None:
        """Take the tensors back, as Group does.  w takes the values of those that others wrote to since `note`: by another array in p.data, or into
        it, which p.version[0] counts.  Of all others it keeps what they are too short to show."""
        others = [p.data is not view or p.version[0] != then for p, view, then in zip(self.tensors, self.views, self.versions)]
        Group.gather_values(self)
        for s, view, by_others in zip(self.slices, self.views, others):
            if by_others:
                self.w[s] = widen(view).reshape(-1)

    def move(self, there: Callable[[Array], Array]) -> None:
        self.shown = there(self.shown)
        super().move(there)
        for p, view in zip(self.tensors, self.views):
            if np.array_equal(array.asnumpy(p.data), array.asnumpy(view)):       # moved, and not written to
                p.data = view

    def show(self) -> None:
        self.shown[...] = self.w

    def note(self) -> None:
        self.versions = [p.version[0] for p in self.tensors]

    kept = property(lambda self: [*self.moments, self.w])


@dataclass
class Piece:
    "A stretch of a group: values, gradients and moments, flat arrays of one length."
    w: Array
    g: Array
    moments: list[Array]
    decay: float


def free(p: Tensor) -> Array:
    "The gradient where p may move, zero elsewhere; in float32 if p is in 16 bits."
    g = widen(p.grad)
    return g if p.mask is None else xp(g).where(p.mask, g, 0)


class Optimizer:
    """lr: rate;  weight_decay;  groups: {glob over tensor names: {"lr": ..., "weight_decay": ...}}, the first that matches wins.

    start(named tensors) forgets everything and binds; step(factor, clip) updates from their .grad; state()/load(state) for resuming."""
    n_moments = 0

    def __repr__(self) -> str:
        "The hyper-parameters it was made from: what tells two optimisers apart."
        given = {k: v for k, v in vars(self).items() if k not in ("t", "bound")}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in given.items())})"

    def __init__(self, lr: float, weight_decay: float = 0.0, groups: dict[str, dict] | None = None):
        if not lr > 0 or weight_decay < 0:
            raise ValueError(f"an optimiser wants lr > 0 and weight_decay >= 0; got lr={lr}, weight_decay={weight_decay}")
        for glob, rule in (groups or {}).items():
            if extra := rule.keys() - {"lr", "weight_decay"}:
                raise ValueError(f"a group sets lr and weight_decay; {glob!r} sets {', '.join(sorted(extra))}")
        self.lr, self.weight_decay, self.rules = lr, weight_decay, groups or {}
        self.t, self.bound = 0, []

    def start(self, named: dict[str, Tensor]) -> Optimizer:
        "Bind to these tensors, with fresh moments."
        if not named:
            raise ValueError("nothing trains: attach a method, or call model.parameters() with requires_grad")
        match = lambda glob, name: re.fullmatch(re.escape(glob).replace(r"\*", ".*"), name)
        for glob in self.rules:
            if not any(match(glob, n) for n in named):
                raise LookupError(f"the group {glob!r} holds no tensor that trains; there are {', '.join(list(named)[:4])} ...")
        made: dict[tuple, Group] = {}
        for name, p in named.items():
            rule = next((r for glob, r in self.rules.items() if match(glob, name)), {})
            decays = p.ndim >= 2 if p.decay is None else p.decay
            lr, decay = rule.get("lr", self.lr), rule.get("weight_decay", self.weight_decay) if decays else 0.0
            g = made.setdefault((lr, decay, str(p.dtype)), (Rounded if p.dtype in HALVES else Group)(lr, decay))
            g.names.append(name)
            g.tensors.append(p)
        self.bound, self.t = list(made.values()), 0
        for g in self.bound:
            g.lay_out(self.n_moments)
        return self

    def step(self, factor: float = 1.0, clip: float | None = None, scale: float = 1.0) -> Array:
        """One update at rate factor × lr.  Gradients are first divided by `scale`, what the loss was multiplied with (GradScaler), then
        scaled to a norm of at most `clip`, all together.  Returns the norm before.

        FloatingPointError, with nothing updated, if that norm is not finite."""
        norm = self.advance(factor, clip, scale=scale)
        if array.recording is None:                                              # a captured step does not wait; settle(norm), when it is read
            self.settle(float(norm))
        return norm

    def advance(self, factor: float = 1.0, clip: float | None = None, loss: Array | None = None, scale: float = 1.0) -> Array:
        """step, without waiting for a device to say that the norm is finite: if it is not, nothing is updated, and settle(norm) tells.

        loss: a number that must be finite as well."""
        if not self.bound:
            raise RuntimeError("this optimiser was not started: start(named tensors) says what it updates")
        self.gather()
        norm = dispatch.run(Optimizer.one_by_one, type(self.bound[0].w), self, factor, clip, loss, scale)
        self.touch()
        return norm

    def gather(self) -> None:
        "Follow tensors to another backend, and take back those whose data was replaced from outside."
        for g in self.bound:
            g.follow()
            g.gather_values()

    def touch(self) -> None:
        "Note that the tensors were updated, by this optimiser."
        for g in self.bound:
            for p in g.tensors:
                p.touch()
            g.note()

    def one_by_one(self, factor: float, clip: float | None, loss: Array | None, scale: float) -> Array:
        "advance, as it is defined: piece by piece."
        if array.recording is not None:
            raise array.CannotCapture(f"an update by {type(self).__name__} cannot be captured; one by AdamW can, with kernels")
        if loss is not None and not math.isfinite(float(loss)):
            raise FloatingPointError(f"the loss is {float(loss)}")
        pieces = [g.pieces() for g in self.bound]
        gradients = [piece.g for some in pieces for piece in some]
        for g in gradients if scale != 1 else ():
            g *= 1 / scale
        norm = clip_norm(gradients, clip)
        self.t += 1
        for g, some in zip(self.bound, pieces):
            held = g.held()
            for piece in some:
                self.update(piece, g.lr * factor)
            g.put_back(held)
            g.show()
        return norm

    def settle(self, norm: float) -> None:
        "FloatingPointError if the norm of the last `advance`, which then updated nothing, is not finite."
        if not math.isfinite(norm):
            self.t -= 1
            raise FloatingPointError(f"the gradient's norm is {norm}")

    def update(self, piece: Piece, lr: float) -> None:
        raise NotImplementedError

    def zero_grad(self) -> None:
        "Forget the gradients of what it updates."
        for g in self.bound:
            for p in g.tensors:
                p.grad = None

    def state(self) -> dict[str, np.ndarray]:
        "The moments and the step count, and the values in float32 of what is shown in 16 bits; on the host."
        return {"t": np.array(self.t)} | {k: array.asnumpy(a) for k, a in self.kept().items()}

    def kept(self) -> dict[str, Array]:
        return {f"{i}.{j}": a for i, g in enumerate(self.bound) for j, a in enumerate(g.kept)}

    def load(self, state: dict[str, np.ndarray]) -> None:
        "The state that `state` gave, for an optimiser bound to the same tensors.  ValueError if it is another's."
        mine = {k: v.shape for k, v in self.state().items()}
        if mine != {k: v.shape for k, v in state.items()}:
            raise ValueError("this optimiser state belongs to other tensors: what trains, the groups or the optimiser differ")
        self.t = int(state["t"])
        for k, a in self.kept().items():
            a[...] = array.put_like(state[k], a)
        for g in self.bound:
            g.show()
            g.note()


def clip_norm(gradients: list[Array], limit: float | None) -> Array:
    """The norm of all gradients together; they are scaled in place, by one factor, so that it is at most `limit` (None: no limit).

    n = √Σ g²;   g ← g min(limit / (n + 1e-6), 1).  Returns n, the norm before.      Pascanu et al. 2013

    FloatingPointError, with nothing scaled, if n is not finite."""
    m = xp(*gradients)
    norm = m.sqrt(m.asarray(sum(m.linalg.norm(g)**2 for g in gradients)))
    if not math.isfinite(float(norm)):
        raise FloatingPointError(f"the gradient's norm is {float(norm)}")
    if limit is not None:
        for g in gradients:
            g *= m.minimum(limit / (norm + 1e-6), 1.0)
    return norm


class SGD(Optimizer):
    "u ← μ u + g + λ θ;  θ ← θ − η u      (as torch.optim.SGD)"
    n_moments = 1

    def __init__(self, lr: float, momentum: float = 0.0, weight_decay: float = 0.0, groups: dict[str, dict] | None = None):
        super().__init__(lr, weight_decay, groups)
        self.momentum = momentum

    def update(self, piece: Piece, lr: float) -> None:
        u, = piece.moments
        u *= self.momentum
        u += piece.g + piece.decay * piece.w
        piece.w -= lr * u


class AdamW(Optimizer):
    """m ← β₁ m + (1 − β₁) g;  v ← β₂ v + (1 − β₂) g²;  θ ← θ − η (m̂ / (√v̂ + ε) + λ θ),   m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ)

    Loshchilov & Hutter 2019: the decay acts on θ, not through the gradient."""
    n_moments = 2

    def __init__(self, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01,
                 groups: dict[str, dict] | None = None):
        super().__init__(lr, weight_decay, groups)
        self.betas, self.eps = betas, eps

    def update(self, piece: Piece, lr: float) -> None:
        adam(piece.w, piece.g, *piece.moments, lr, *self.betas, self.eps, piece.decay, self.t)


class Adam(AdamW):
    "AdamW with the decay inside the gradient, g ← g + λ θ (Kingma & Ba 2015); without decay the two are one."

    def __init__(self, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
                 groups: dict[str, dict] | None = None):
        super().__init__(lr, betas, eps, weight_decay, groups)

    def update(self, piece: Piece, lr: float) -> None:
        adam(piece.w, piece.g + piece.decay * piece.w, *piece.moments, lr, *self.betas, self.eps, 0.0, self.t)


def adam_update(w: Array, g: Array, m: Array, v: Array, lr: float, b1: float, b2: float, eps: float, decay: float, t: int) -> None:
    "AdamW's equations on flat arrays of one length, in place."
    m *= b1
    m += (1 - b1) * g
    v *= b2
    v += (1 - b2) * (g * g)
    if decay:
        w *= 1 - lr * decay
    w -= (lr / (1 - b1**t)) * m / (xp(w).sqrt(v) * (1 - b2**t)**-0.5 + eps)


def adam(w: Array, *rest: Any) -> None:
    "adam_update, or its kernel for this kind of array."
    dispatch.run(adam_update, type(w), w, *rest)


# ── schedules: (t, T) -> factor on the rate, t = 0 .. T − 1 ──────────────────────────────────────────────────────────
Schedule = Callable[[int, int], float]


def _warm(warmup: float, after: Callable[[float], float]) -> Schedule:
    "Linear from 0 to 1 over `warmup` steps (a number below 1 is a share of all), then `after` of the share that is done."
    def factor(t: int, T: int) -> float:
        w = round(warmup * T) if 0 < warmup < 1 else int(warmup)
        return (t + 1) / w if t < w else after((t - w) / (T - w))
    return factor


def constant_schedule(warmup: float = 0) -> Schedule:
    "1 after the warm-up."
    return _warm(warmup, lambda s: 1.0)


def linear_schedule(warmup: float = 0) -> Schedule:
    "Falls from 1 to 0 in a straight line after the warm-up."
    return _warm(warmup, lambda s: 1 - s)


def cosine_schedule(warmup: float = 0, floor: float = 0.0) -> Schedule:
    "Falls from 1 to `floor` along half a cosine after the warm-up."
    return _warm(warmup, lambda s: floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * s)))

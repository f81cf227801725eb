"""SGD, Adam and AdamW: the equations, gradient clipping, and the class Optimizer.

The equations are functions of plain arrays, which they update in place:

    θ  parameters      g  gradient      η  learning rate, lr      λ  weight decay      t = 1, 2, ...  number of the step

An Optimizer is made from hyper-parameters; `start` binds it to named tensors.  It stores the tensors end to end
(buffers.py), so that an update is a few passes over long vectors, and keeps float32 master weights of 16-bit tensors
(master.py).  Frozen tensors have no state.  Weight decay applies to matrices: it leaves out tensors with fewer than two
axes (biases, norms, gates) and tensors with `decay=False` (soft prompts).
"""
from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import array, checks, dispatch
from ..array import Array, is_array, xp
from ..keywords import checked_keywords
from ..precision import HALVES
from ..tensor import Tensor
from .buffers import Group, Piece, read_version_0_1
from .master import MasterWeights

__all__ = ["SGD", "Adam", "AdamW", "Optimizer", "adam_update", "clip_norm", "sgd_update"]


# ── the equations ────────────────────────────────────────────────────────────────────────────────────────────────────
def sgd_update(w: Array, g: Array, u: Array, lr: float, momentum: float, decay: float) -> None:
    """u ← μ u + g + λ θ;    θ ← θ − η u

    w: θ, g, u: the velocity; arrays of one length.  w and u are updated in place.  μ: momentum.
    As torch.optim.SGD"""
    u *= momentum
    u += g + decay * w
    w -= lr * u


def adam_update(w: Array, g: Array, m: Array, v: Array, lr: float, b1: float, b2: float, eps: float, decay: float,
                t: int) -> None:
    """m ← β₁ m + (1 − β₁) g;    v ← β₂ v + (1 − β₂) g²;    θ ← θ − η (m̂ / (√v̂ + ε) + λ θ)

    with m̂ = m / (1 − β₁ᵗ) and v̂ = v / (1 − β₂ᵗ).  This is AdamW: the decay acts on θ, not through the gradient.

    w: θ, g, m, v: arrays of one shape.  w, m and v are updated in place; g is only read.  lr: η, b1: β₁, b2: β₂,
    eps: ε, decay: λ.  t: the number of this step, 1 for the first.
    Loshchilov & Hutter 2019"""
    m *= b1
    m += (1 - b1) * g
    v *= b2
    v += (1 - b2) * (g * g)
    if decay:
        w *= 1 - lr * decay
    w -= (lr / (1 - b1**t)) * m / (xp(w).sqrt(v) * (1 - b2**t)**-0.5 + eps)


def squared_norm(g: Array) -> Array:
    """Σ g²"""
    return xp(g).linalg.norm(g)**2


def clip_norm(gradients: list[Array], limit: float | None) -> Array:
    """n = √Σ g²;    g ← g min(limit / (n + 1e-6), 1)

    The sum is over all entries of all arrays.  One factor scales them all, in place, so that their common norm is at
    most `limit`; with the limit None nothing is scaled.  Returns n, the norm before.
    FloatingPointError, with nothing scaled, if n is not finite, with and without a limit.  ValueError unless limit > 0.
    Pascanu et al. 2013"""
    if limit is not None:
        checks.number("limit", limit, above=0)
    if not isinstance(gradients, (list, tuple)) or not all(map(is_array, gradients)):
        raise TypeError(f"clip_norm wants a list of arrays, got {checks.brief(gradients)}")
    m = xp(*gradients)
    norm = m.sqrt(m.asarray(sum(dispatch.run(squared_norm, type(g), g) for g in gradients)))
    if not math.isfinite(float(norm)):
        raise FloatingPointError(f"the gradient's norm is {float(norm)}")
    if limit is not None:
        for g in gradients:
            g *= m.minimum(limit / (norm + 1e-6), 1.0)
    return norm


# ── the optimisers ───────────────────────────────────────────────────────────────────────────────────────────────────
class Optimizer:
    """Base class of the optimisers: learning rates and decay by tensor name, flat storage, clipping, state.

    lr, weight_decay   the hyper-parameters of all tensors
    groups             {glob over tensor names: {"lr": ..., "weight_decay": ...}}: other values for the tensors that the
                       glob matches; the first glob that matches a name wins. A weight decay that is given here acts on
                       vectors too. A learning rate of 0 leaves the tensors as they are

    After `start`, `self.groups` holds the tensors in flat storage, and `self.t` counts the updates.  A subclass names
    its moments in `moment_names` (PyTorch's names, as in state_dict), and implements update(piece, lr)."""
    moment_names: tuple[str, ...] = ()

    def __init__(self, lr: float, weight_decay: float = 0.0, groups: dict[str, dict] | None = None):
        """Keep the hyper-parameters; `start` binds the tensors.

        ValueError for values outside their range, TypeError for values that are no numbers."""
        checks.number("lr", lr, above=0)
        checks.number("weight_decay", weight_decay, 0)
        self.lr = lr
        self.weight_decay = weight_decay
        self.rules = check_rules(groups)
        self.t = 0
        self.groups: list[Group] = []                              # set by `start`

    def __repr__(self) -> str:
        """The class with its hyper-parameters.  A checkpoint holds this text, to recognise another optimiser."""
        fields = [f"{name}={value!r}" for name, value in vars(self).items() if name not in ("t", "groups")]
        return f"{type(self).__name__}({', '.join(fields)})"

    @property
    def equations(self) -> Optimizer:
        """The optimiser that computes the same updates without special storage: itself.  A run may change from one to
        the other."""
        return self

    def update(self, piece: Piece, lr: float) -> None:
        """Update the values and moments of one piece in place."""
        raise NotImplementedError

    # ── binding ──
    def start(self, named: dict[str, Tensor]) -> Optimizer:
        """Bind to these tensors, with moments of zero and no steps taken.  Their data become views of flat arrays.

        Tensors of one learning rate, weight decay and dtype share a Group; 16-bit tensors get float32 master weights.
        ValueError if there are none; LookupError if a glob of `groups` matches none of them.  TypeError unless `named`
        is a dict of Tensors."""
        self.groups = self.make_groups(named)
        self.t = 0
        for group in self.groups:
            group.lay_out(len(self.moment_names))
        return self

    def make_groups(self, named: dict[str, Tensor]) -> list[Group]:
        """The groups of these tensors, not yet laid out: nothing changes.  Errors as those of start."""
        self.check_tensors(named)
        groups: dict[tuple, Group] = {}
        for name, p in named.items():
            lr, decay = self.rates(name, p)
            group = self.new_group(p, lr, decay)
            kind = (lr, decay, str(p.dtype), type(group))
            groups.setdefault(kind, group).tensors[name] = p
        return list(groups.values())

    def new_group(self, p: Tensor, lr: float, decay: float) -> Group:
        """An empty group for tensors such as p."""
        return MasterWeights(lr, decay) if p.dtype in HALVES else Group(lr, decay)

    def check_tensors(self, named: dict[str, Tensor]) -> None:
        """Raise the errors of start."""
        if not isinstance(named, Mapping) or not all(isinstance(p, Tensor) for p in named.values()):
            raise TypeError(f"start wants named tensors, such as model.named_parameters(), got {checks.brief(named)}")
        if not named:
            raise ValueError("nothing trains: attach a method, or call model.parameters() with requires_grad")
        for glob in self.rules:
            if not any(matches(glob, name) for name in named):
                near = difflib.get_close_matches(glob, named, 4, 0.5) or list(named)[:4]
                raise LookupError(f"the group {glob!r} holds no tensor that trains; there are {', '.join(near)} ...")

    def rates(self, name: str, p: Tensor) -> tuple[float, float]:
        """(learning rate, weight decay) of one tensor: of the first glob that matches its name, else of the optimiser.

        The optimiser's weight decay is 0 for vectors, unless p.decay says otherwise; that of a glob always acts."""
        rule = next((rule for glob, rule in self.rules.items() if matches(glob, name)), {})
        lr = rule.get("lr", self.lr)
        if "weight_decay" in rule:
            return lr, rule["weight_decay"]
        decays = p.ndim >= 2 if p.decay is None else p.decay
        return lr, self.weight_decay if decays else 0.0

    # ── a step ──
    def step(self, factor: float = 1.0, clip: float | None = None, scale: float = 1.0) -> Array:
        """One update with the learning rate factor · lr.  Returns the norm of all gradients, before clipping.

        factor: of a learning-rate schedule.  The gradients are first divided by `scale`, the factor of the loss
        (GradScaler); then all of them are scaled to a common norm of at most `clip`.  As in PyTorch, this changes the
        `.grad` of the tensors.  FloatingPointError, with nothing updated, if the norm is not finite; a captured step
        does not raise it: call check_norm(norm) when the norm is read.  ValueError for a negative factor, and unless
        clip and scale are above 0."""
        if array.recording is None:                                # in a captured step the factor is no number
            checks.number("factor", factor, 0)
            checks.number("scale", scale, above=0)
        if clip is not None:
            checks.number("clip", clip, above=0)
        norm = self.launch_step(factor, clip, scale=scale)
        if array.recording is None:
            self.check_norm(float(norm))
        return norm

    def launch_step(self, factor: float = 1.0, clip: float | None = None, loss: Array | None = None,
                    scale: float = 1.0) -> Array:
        """`step`, without waiting for the device.  Nothing is updated if the norm is not finite; see check_norm.

        loss: a scalar; if it is not finite, the norm is not finite either.  Without a kernel for these arrays
        FloatingPointError is raised here, and not only in check_norm."""
        if not self.groups:
            raise RuntimeError("this optimiser was not started: start(named tensors) says what it updates")
        self.reclaim_tensors()
        array_type = type(self.groups[0].w)
        norm = dispatch.run(Optimizer.update_pieces, array_type, self, factor, clip, loss, scale)
        self.mark_written()
        return norm

    def update_pieces(self, factor: float, clip: float | None, loss: Array | None, scale: float) -> Array:
        """Divide the gradients by `scale`, clip them, and update piece by piece.  Returns the norm before clipping.

        The definition of launch_step, in place of which a kernel may run (dispatch.py).  FloatingPointError, with
        nothing updated, if the loss or the norm is not finite."""
        if array.recording is not None:
            raise array.CannotCapture(f"an update by {type(self).__name__} cannot be captured; "
                                      "an update by AdamW can, with kernels")
        if loss is not None and not math.isfinite(float(loss)):
            raise FloatingPointError(f"the loss is {float(loss)}")
        pieces_of_groups = [group.pieces() for group in self.groups]
        gradients = [piece.g for pieces in pieces_of_groups for piece in pieces]
        if scale != 1:
            for g in gradients:
                g *= 1 / scale
        norm = clip_norm(gradients, clip)
        self.t += 1
        for group, pieces in zip(self.groups, pieces_of_groups):
            frozen = group.frozen_entries()                        # masked entries, and tensors without a gradient
            for piece in pieces:
                self.update(piece, group.lr * factor)
            group.restore(frozen)
            group.write_rounded()
        return norm

    def check_norm(self, norm: float) -> None:
        """FloatingPointError if `norm`, the result of the last launch_step, is not finite.

        That step has updated nothing.  It was counted in self.t before its norm was known; the count is taken back."""
        if not math.isfinite(norm):
            self.t -= 1
            raise FloatingPointError(f"the gradient's norm is {norm}")

    def reclaim_tensors(self) -> None:
        """Follow tensors that were moved to another device, and reclaim tensors whose data was replaced."""
        for group in self.groups:
            group.follow_device()
            group.reclaim_values()

    def mark_written(self) -> None:
        """Mark all tensors as written in place, by this optimiser."""
        for group in self.groups:
            for p in group.tensors.values():
                p.mark_written()
            group.record_versions()

    def zero_grad(self) -> None:
        """Set the gradients of all tensors to None."""
        for group in self.groups:
            for p in group.tensors.values():
                p.grad = None

    # ── state ──
    def state_dict(self) -> dict[str, np.ndarray]:
        """The step count, the moments and the master weights: host arrays in the tensors' shapes.

        Keys: "step", "exp_avg.<tensor name>", "master.<tensor name>", ...  On NumPy the arrays are views of the
        optimiser's own: copy them to keep them."""
        state = {"step": np.array(self.t)}
        for key, view in self.named_state().items():
            state[key] = array.asnumpy(view)
        return state

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Load what state_dict of an optimiser of the same tensors gave, or a state of version 0.1 (it has a key "t").

        ValueError, with nothing changed, if the state belongs to other tensors or to another optimiser."""
        state = self.read_state(state, self.groups)
        self.t = int(state["step"])
        for key, view in self.named_state().items():
            view[...] = array.put_like(state[key], view)
        for group in self.groups:
            group.write_rounded()
            group.record_versions()

    def read_state(self, state: dict[str, np.ndarray], groups: list[Group]) -> dict[str, np.ndarray]:
        """A state in today's form, checked against groups that make_groups gave.  Nothing changes.

        ValueError if it belongs to other tensors or to another optimiser."""
        checks.instance("load_state_dict", state, Mapping, "a dict of arrays, from state_dict")
        if "t" in state:
            state = read_version_0_1(state, groups, self.moment_names)
        shapes: dict[str, tuple] = {"step": ()}
        for group in groups:
            shapes |= group.named_shapes(self.moment_names)
        for key in shapes | state:
            if key not in shapes or key not in state or np.shape(state[key]) != shapes[key]:
                raise ValueError("this optimiser state belongs to other tensors: the trained tensors, the groups or "
                                 f"the optimiser differ, first in {key}")
        step = float(state["step"])
        if step < 0 or not step.is_integer():
            raise ValueError(f"the step of an optimiser state wants a whole number >= 0, got {step}")
        return state

    def named_state(self) -> dict[str, Array]:
        """The moments and master weights of each tensor, as views of the flat arrays in the tensor's shape.

        Keys: "exp_avg.<tensor name>", "master.<tensor name>", ..."""
        views = {}
        for group in self.groups:
            views |= group.named_arrays(self.moment_names)
        return views


def check_rules(groups: Any) -> dict[str, dict]:
    """The argument `groups` of an optimiser, {glob: {"lr": ..., "weight_decay": ...}}; {} if it is None.

    TypeError or ValueError if it is of another form, or if a value is out of range."""
    if groups is None:
        return {}
    checks.instance("groups", groups, Mapping, 'a dict {glob: {"lr": ..., "weight_decay": ...}}')
    for glob, rule in groups.items():
        checks.instance("groups", glob, str, "globs over tensor names as keys")
        checks.instance(f"groups[{glob!r}]", rule, Mapping, "a dict of lr and weight_decay")
        extra = sorted(map(str, rule.keys() - {"lr", "weight_decay"}))
        if extra:
            raise ValueError(f"a group sets lr and weight_decay; {glob!r} sets {', '.join(extra)}")
        for name, value in rule.items():
            checks.number(f"groups[{glob!r}]: {name}", value, 0)
    return dict(groups)


def matches(glob: str, name: str) -> bool:
    """True if the glob, in which * stands for any text, matches the whole name."""
    return re.fullmatch(re.escape(glob).replace(r"\*", ".*"), name) is not None


@checked_keywords
class SGD(Optimizer):
    """Stochastic gradient descent with momentum; see sgd_update.      As torch.optim.SGD"""
    moment_names = ("momentum",)

    def __init__(self, lr: float, momentum: float = 0.0, weight_decay: float = 0.0,
                 groups: dict[str, dict] | None = None):
        """ValueError unless 0 <= momentum < 1; for the others see Optimizer."""
        super().__init__(lr, weight_decay, groups)
        checks.number("momentum", momentum, 0, below=1)
        self.momentum = momentum

    def update(self, piece: Piece, lr: float) -> None:
        sgd_update(piece.w, piece.g, *piece.moments, lr, self.momentum, piece.decay)


@checked_keywords
class AdamW(Optimizer):
    """Adam with decoupled weight decay; see adam_update.      Loshchilov & Hutter 2019"""
    moment_names = ("exp_avg", "exp_avg_sq")

    def __init__(self, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.01, groups: dict[str, dict] | None = None):
        """betas: (β₁, β₂).  ValueError unless 0 <= β < 1 and eps >= 0; for the others see Optimizer."""
        super().__init__(lr, weight_decay, groups)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas wants two numbers (β₁, β₂), got {checks.brief(betas)}")
        for beta in betas:
            checks.number("each of betas", beta, 0, below=1)
        checks.number("eps", eps, 0)
        self.betas = betas
        self.eps = eps

    def update(self, piece: Piece, lr: float) -> None:
        self.run_update(piece, piece.g, lr, piece.decay)

    def run_update(self, piece: Piece, g: Array, lr: float, decay: float) -> None:
        """adam_update, or its kernel, on one piece with the gradient g."""
        dispatch.run(adam_update, type(piece.w), piece.w, g, *piece.moments, lr, *self.betas, self.eps, decay, self.t)


@checked_keywords
class Adam(AdamW):
    """AdamW with the decay inside the gradient, g ← g + λ θ.  Without decay the two are the same.

    Kingma & Ba 2015"""

    def __init__(self, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, groups: dict[str, dict] | None = None):
        super().__init__(lr, betas, eps, weight_decay, groups)

    def update(self, piece: Piece, lr: float) -> None:
        self.run_update(piece, piece.g + piece.decay * piece.w, lr, decay=0.0)

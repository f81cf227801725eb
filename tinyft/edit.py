"""The one mechanism by which a model is changed.

    Edit      a small change to one module: another weight, another input, another output
    Method    which modules it edits and how, what of the base trains, what it adds to the loss; a paper's hyper-parameters
    attach, detach, without, merge, count      written once, for every method

A base's names never change: an edit lives beside its module, under `path.edits.<name>`, and goes again without a trace.
"""
from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import array
from .array import Array
from .nn import Context, Module, Packed, Parameter
from .tensor import Tensor


class CannotMerge(Exception):
    "A merge that cannot be exact; says why.  Nothing was changed."


class Edit(Module):
    "One small change to one module.  Its Tensors train, its arrays are buffers; both are saved.  `_x` refers to something owned elsewhere."

    def tensor(self, name: str, p: Any) -> Any:
        "Another weight (or bias) through which the module is read."
        return p

    def before(self, x: Any, ctx: Context) -> Any:
        "Another input."
        return x

    def after(self, x: Any, y: Any, ctx: Context) -> Any:
        "Another output."
        return y

    def fold(self, p: dict[str, Array]) -> dict[str, Array]:
        "The module's own tensors {name: array} with before/after worked in.  Pure.  Or CannotMerge, with the reason."
        raise CannotMerge(f"{type(self).__name__} acts on activations, not on weights")

    def overrides(self, hook: str) -> bool:
        return getattr(type(self), hook) is not getattr(Edit, hook)


class Method:
    """A way to fine-tune: a frozen dataclass of hyper-parameters.  Keeps no state: what changes during training lives in its edits,
    {path: Edit}, so that a run can be saved and resumed."""
    targets: Any = ()                                    # globs over module paths, matched at a path's end: "attn.[qv]", "blocks.*.mlp"

    def edit(self, path: str, module: Module, rng: np.random.Generator) -> Edit | None:
        "The edit for one target, or None."

    def edits(self, found: dict[str, Module], rng: np.random.Generator) -> dict[str, Edit]:
        "The edits for all targets; override to share parts between modules."
        return {p: e for p, m in found.items() if (e := self.edit(p, m, rng)) is not None}

    def trains(self, name: str) -> bool:
        "Which of the base's tensors train as well."
        return False

    def prepare(self, model: Module) -> Method:
        "The method as it is to be attached to this model (a method that counts blocks fills in what it found)."
        return self

    def begin(self, edits: dict[str, Edit], t: int, T: int, rng: np.random.Generator) -> None:
        "Before step t of T: sample a rank, a gate."

    def penalty(self, edits: dict[str, Edit], model: Module, ctx: Context) -> Any:
        "Added to the loss; ctx is this forward pass: its inputs, notes, hidden, out."
        return 0.0

    def step(self, edits: dict[str, Edit], t: int, T: int) -> None:
        "After the update, gradients still there: importances, budgets, masks."

    def phases(self, edits: dict[str, Edit]) -> Iterator[float]:
        "Yields shares of the steps; code between the yields runs between phases.  A phase starts with a fresh optimiser."
        yield 1.0


@dataclass
class Attached:
    "A method on a model: its edits by path, and the base tensors it trains with their values before it came."
    method: Method
    name: str
    edits: dict[str, Edit]
    base: dict[str, Array] = field(default_factory=dict)


# ── finding ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def base_modules(model: Module) -> dict[str, Module]:
    "The model's own modules by path: no edits."
    return {p: m for p, m in model.named_modules() if "edits" not in p.split(".") and not isinstance(m, Packed)}


def base_parameters(model: Module) -> dict[str, Tensor]:
    "The model's own tensors by name: no edits."
    return {n: p for n, p in model.named_parameters().items() if "edits" not in n.split(".")}


def select(model: Module, globs: Any) -> dict[str, Module]:
    """The modules whose paths end in one of the globs: * is one name, ** any number, [qv] one of these letters.  In the order of
    the model.  LookupError, with the nearest names, for a glob that matches nothing."""
    base, hits = base_modules(model), set()
    for g in [globs] if isinstance(globs, str) else globs:
        pattern = re.escape(g).replace(r"\[", "[").replace(r"\]", "]").replace(r"\*\*", ".*").replace(r"\*", r"[^.]*")
        hit = {p for p in base if p and re.search(rf"(\A|\.){pattern}\Z", p)}
        if not hit:
            ends = sorted({".".join(re.sub(r"\.\d+", ".*", p).split(".")[-2:]) for p in base if p})
            near = difflib.get_close_matches(g, ends, 4, 0.3) or ends[:8]
            raise LookupError(f"{g!r} names no module of this model; there are {', '.join(near)} ...")
        hits |= hit
    return {p: m for p, m in base.items() if p in hits}


def is_head(model: Module, name: str) -> bool:
    "Whether a tensor belongs to a new task head."
    return name.split(".")[0] in getattr(model, "head_modules", ())


def attached(model: Module) -> tuple[Attached, ...]:
    return getattr(model, "_attached", ())


def get_attached(model: Module, name: str | None = None) -> Attached:
    "What is attached under this name, or last."
    names = [a.name for a in attached(model)]
    if not names or (name is not None and name not in names):
        raise LookupError(f"{name or 'nothing'!r} is not attached; there is {', '.join(names) or 'nothing'}")
    return attached(model)[-1 if name is None else names.index(name)]


# ── on and off ───────────────────────────────────────────────────────────────────────────────────────────────────────
def attach(model: Module, what: Method | Attached, name: str | None = None, seed: int = 0, train_head: bool = True) -> Attached:
    """Put a method on a model, or put back what `detach` gave.  From then on the model trains what its methods train, nothing else.

    A new task head trains too unless train_head=False.  ValueError if the name is taken or nothing would train."""
    name = name or (what.name if isinstance(what, Attached) else type(what).__name__.lower())
    if any(a.name == name for a in attached(model)):
        raise ValueError(f"{name!r} is attached already; give this one another name: attach(..., name=...)")
    if isinstance(what, Method):
        what = what.prepare(model)
        names, taken = base_parameters(model), {n for b in attached(model) for n in b.base}
        wanted = {n for n in names if what.trains(n) and (train_head or not is_head(model, n))}
        head = {n for n in names if train_head and is_head(model, n)} - taken    # the first method to come carries the head
        edits = what.edits(select(model, what.targets), np.random.default_rng(seed))
        if not edits and not wanted and type(what).penalty is Method.penalty:
            raise ValueError(f"{name} would train nothing on this model: none of its tensors is one that {type(what).__name__} trains")
        mine = {n: names[n].data.copy() for n in names if n in wanted | head}
        a = Attached(what, name, edits, mine)
    else:
        a, a.name = what, name
        _swap(model, a)
    at = base_modules(model)
    for p, e in a.edits.items():
        at[p].edits = {**at[p].edits, name: e}
    model._attached = (*attached(model), a)
    _refresh(model)
    return a


def detach(model: Module, name: str | None = None) -> Attached:
    "Take a method off; the model is what it was before, bitwise.  What comes back goes on again with attach."
    a = get_attached(model, name)
    _uncovered(model, [a])
    for m in base_modules(model).values():
        if a.name in m.edits:
            m.edits = {k: e for k, e in m.edits.items() if k != a.name}
    _swap(model, a)
    model._attached = tuple(b for b in attached(model) if b is not a)
    _refresh(model)
    return a


@contextmanager
def without(model: Module, *names: str) -> Iterator[None]:
    """The model without these methods for the length of a `with`; order and all restored after.  Unnamed: without all that train, so
    that a frozen adapter stays part of the base."""
    names = names or tuple(a.name for a in attached(model) if a.base or any(p.requires_grad for e in a.edits.values() for p in e.parameters()))
    off = [get_attached(model, n) for n in names]
    kept = [(m, m.edits) for m in base_modules(model).values() if m.edits]
    mine = [a for a in reversed(attached(model)) if a in off]
    _uncovered(model, off)
    for m, edits in kept:
        m.edits = {k: e for k, e in edits.items() if k not in names}
    for a in mine:
        _swap(model, a)
    try:
        yield
    finally:
        for m, edits in kept:
            m.edits = edits
        for a in reversed(mine):
            _swap(model, a)


def _uncovered(model: Module, off: list[Attached]) -> None:
    "ValueError if a method that stays trained, after one of these, the same tensors: its values cannot be told apart from theirs."
    here = attached(model)
    for a in off:
        if clash := [b.name for b in here[here.index(a) + 1:] if b not in off and b.base.keys() & a.base.keys()]:
            raise ValueError(f"{', '.join(clash)} trained the same tensors after {a.name}: detach them first")


def _swap(model: Module, a: Attached) -> None:
    "Exchange the base tensors that a trained with the values it keeps: the arrays change places, so a pass on its way to backward keeps its own."
    ps = base_parameters(model)
    for n, was in a.base.items():
        a.base[n], ps[n].data = ps[n].data, array.put_like(was, ps[n].data, ps[n].dtype)


def _refresh(model: Module) -> None:
    "The base trains what its methods train; with no method on it, all of it."
    here = attached(model)
    for n, p in base_parameters(model).items():
        p.requires_grad = not here or any(n in a.base for a in here)


# ── into the weights ─────────────────────────────────────────────────────────────────────────────────────────────────
def merge(model: Module, *names: str) -> Module:
    """Work edits into the base's own weights and drop them: first every weight edit, then every activation edit, in order of
    attachment.  All methods, or those named.  CannotMerge, with the reason, if one of them cannot; then nothing was changed."""
    going = {get_attached(model, n).name for n in names} if names else {a.name for a in attached(model)}
    new: dict[str, dict[str, Array]] = {}
    for path, m in base_modules(model).items():
        order, mine = list(m.edits), [k for k in m.edits if k in going]
        if mine:
            has = lambda hook, keys: any(m.edits[k].overrides(hook) for k in keys)
            rest = order[len(mine):]
            if order[:len(mine)] != mine or (rest and has("before", mine)) or (has("tensor", rest) and has("after", mine)):
                raise CannotMerge(f"{path}: {', '.join(order)} act in this order, so {', '.join(mine)} cannot go first")
            new[path] = _folded(path, m, [m.edits[k] for k in mine])
    written = {f"{path}.{n}" for path, p in new.items() for n in p} | {n for a in attached(model) if a.name in going for n in a.base}
    if clash := [a.name for a in attached(model) if a.name not in going and a.base.keys() & written]:
        raise CannotMerge(f"{clash[0]} trains the same tensors, and to detach it would undo the merge: merge it too, or detach it first")
    for path, m in base_modules(model).items():                                  # nothing was written until all agreed
        for n, w in new.get(path, {}).items():
            getattr(m, n).copy_(w)
        if m.edits:
            m.edits = {k: e for k, e in m.edits.items() if k not in going}
    model._attached = tuple(a for a in attached(model) if a.name not in going)
    _refresh(model)
    return model


def _folded(path: str, m: Module, edits: list[Edit]) -> dict[str, Array]:
    "The module's own tensors that these edits change, with the edits in them."
    if packed := [k for k, v in vars(m).items() if isinstance(v, Packed)]:
        raise CannotMerge(f"{path}.{packed[0]} is packed: keep the adapter beside it, or unpack the base first (tinyft.unpack) and merge then")
    acts = [e for e in edits if e.overrides("after")]                                  # from the weight outwards: first the outputs, in order,
    acts += [e for e in reversed(edits) if e.overrides("before") and not e.overrides("after")]      # then the inputs, the last one first
    if len(acts) > 1 and (both := [type(e).__name__ for e in acts if e.overrides("before") and e.overrides("after")]):
        raise CannotMerge(f"{path}: {both[0]} changes input and output, and is not alone")
    if acts and m.tied:
        raise CannotMerge(f"{path}: its weight is also the head's, and {type(acts[0]).__name__} changes only what {path} gives out")
    p: dict[str, Any] = m.own()
    for e in edits:
        p = {n: e.tensor(n, w) for n, w in p.items()}
    p = {n: w.data for n, w in p.items()}
    for e in acts:
        p = e.fold(p)
    return {n: w for n, w in p.items() if w is not getattr(m, n).data}           # those that changed


def unpack(model: Module) -> Module:
    "Every packed weight as a dense one again, in place: what its codes say, not what it was before it was packed."
    for m in model.modules():
        for name, packed in [(k, v) for k, v in vars(m).items() if isinstance(v, Packed)]:
            setattr(m, name, Parameter(packed.dequantize()))
    _refresh(model)
    return model


# ── counting ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Count:
    "Numbers that train: in edits and base (`trained`), in a new task head (`head`); all numbers of the base (`total`); bytes one task stores."
    trained: int
    head: int
    total: int
    nbytes: int

    def __str__(self) -> str:
        head = f" and {self.head:,} in the head" if self.head else ""
        return f"{self.trained:,} trained ({100 * self.trained / max(self.total, 1):.2f} % of {self.total:,}){head}; {self.nbytes:,} bytes to store"


def trained(model: Module) -> dict[str, Tensor]:
    "What trains, by name."
    return {n: p for n, p in model.named_parameters().items() if p.requires_grad}


def count(model: Module) -> Count:
    "How much trains, beside how much there is.  A mask on a tensor counts only what it lets move."
    free = lambda p: p.size if p.mask is None else int(np.broadcast_to(array.asnumpy(p.mask), p.shape).sum())
    numbers = {n: free(p) for n, p in trained(model).items()}
    head = [n for n in numbers if is_head(model, n)]
    size = sum(p.size for n, p in base_parameters(model).items() if not is_head(model, n)) \
        + sum(int(np.prod(m.shape)) for m in model.modules() if isinstance(m, Packed))
    n_head = sum(numbers[n] for n in head)
    return Count(sum(numbers.values()) - n_head, n_head, size,
                 sum(p.data.nbytes for n, p in trained(model).items()))


def named_state(model: Module, a: Attached) -> dict[str, Any]:
    """{name in a file: Tensor or array} of everything that belongs to a: 'path:name' for its edits, the plain name for a base tensor
    it trains.  Independent of what else is attached; a part that several modules share appears once."""
    first = {id(v): (f"{p}:{n}", v) for p, e in reversed(a.edits.items()) for n, v in {**e.named_parameters(), **e.named_buffers()}.items()}
    return dict(reversed(first.values())) | {n: base_parameters(model)[n] for n in a.base}


def state(model: Module, a: Attached) -> dict[str, np.ndarray]:
    "Copies of everything that belongs to a, on the host."
    return {n: np.array(array.asnumpy(v.data if isinstance(v, Tensor) else v)) for n, v in named_state(model, a).items()}


def load_state(model: Module, a: Attached, arrays: dict[str, np.ndarray]) -> None:
    "Copy everything that belongs to a back in.  ValueError names what is missing, unexpected or of another shape; then nothing was changed."
    at = named_state(model, a)
    wrong = [f"{n} {'is missing' if n not in arrays else 'is not expected' if n not in at else f'has shape {arrays[n].shape}, not {at[n].shape}'}"
             for n in sorted(at.keys() | arrays.keys()) if n not in arrays or n not in at or at[n].shape != arrays[n].shape]
    if wrong:
        raise ValueError(f"{a.name} does not fit: " + "; ".join(wrong[:4]) + (" ..." if len(wrong) > 4 else ""))
    for n, v in at.items():
        if isinstance(v, Tensor):
            v.copy_(arrays[n])
        else:
            v[...] = array.put_like(arrays[n], v, v.dtype)                       # a buffer keeps its identity

"""Fine-tuning methods on a model: attach, detach, merge, count.

    Edit      replaces one module's weight, input or output
    Method    a way to fine-tune: the hyper-parameters of a paper, and the edits that they make
    attach, detach, without, merge, eject, count      written once, for every method

The base is the model without any method. The names of its tensors never change. The edit of an adapter `lora` on the
module `blocks.0.attn.q` is the module `blocks.0.attn.q.edits.lora`; `detach` removes it without a trace.
"""
from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import array, checks, patterns
from .array import Array
from .keywords import checked_keywords
from .nn import Context, Embedding, Module, Packed, Parameter, as_numbers, copy_all
from .tensor import Tensor


class CannotMerge(Exception):
    """Raised when a merge would not be exact; the message names the reason. Nothing was changed."""


# ── what a method is made of ─────────────────────────────────────────────────────────────────────────────────────────
class Edit(Module):
    """One small change to one module.

    Its Tensors train, its arrays are buffers; both are saved. An attribute whose name begins with an underscore refers
    to a part that another module owns: it is used, but not trained or saved here."""

    takes_packed = False                                 # True if `tensor` accepts a Packed weight
    keeps_shape = True                                   # False if `after` gives an output of another shape

    def tensor(self, name: str, p: Any) -> Any:
        """The weight or bias to use in place of p, the module's tensor `name` of the same shape. For Module.read."""
        return p

    def before(self, x: Any, ctx: Context) -> Any:
        """The input to use in place of x, the module's input as the edits before this one changed it."""
        return x

    def after(self, x: Any, y: Any, ctx: Context) -> Any:
        """The output to use in place of y, the module's output for the input x; of y's shape if keeps_shape."""
        return y

    def fold(self, p: dict[str, Array]) -> dict[str, Array]:
        """New arrays for the module's own tensors, p = {name: array}, that make this edit unnecessary.

        The module with the new arrays and without this edit gives the same outputs as with p and this edit. p is not
        written to. Covers `before` and `after`; an edit with `tensor` is merged through `tensor`.
        Raises CannotMerge, with the reason, if no such arrays exist."""
        raise CannotMerge(f"{type(self).__name__} acts on activations, not on weights")

    def overrides(self, hook: str) -> bool:
        """True if this class has its own `tensor`, `before` or `after`."""
        return getattr(type(self), hook) is not getattr(Edit, hook)


@checked_keywords
@dataclass(frozen=True)
class Phase:
    """One phase of a method's training.

    share   the fraction of the run's steps; the shares of a method sum to 1. With 0 only the setup runs
    setup   called once, as setup(model, edits, batches, rng), when the phase starts; not again when a run is resumed.
            It may change values, masks and requires_grad, never names or shapes. The batches that it takes from
            `batches` are not trained on afterwards"""

    share: float
    setup: Callable | None = None


@checked_keywords
class Method:
    """A way to fine-tune: a frozen dataclass of hyper-parameters.

    A method keeps no state. Values that change during training live in its edits, {path: Edit}, so that a run can be
    saved and resumed."""

    targets: Any = ()                                    # globs over module paths, matched at a path's end: "attn.[qv]"
    hidden_states = False                                # True if `penalty` reads ctx.hidden_states

    def __post_init__(self) -> None:
        """Keep NumPy numbers in fields as Python numbers: an np.float64 would turn float32 activations into float64.

        A subclass that checks its fields calls this one first."""
        for name in getattr(type(self), "__dataclass_fields__", ()):
            value = getattr(self, name)
            if isinstance(value, np.generic):
                object.__setattr__(self, name, value.item())     # a frozen dataclass refuses self.name = ...

    def find(self, model: Module) -> dict[str, Module]:
        """The modules to edit, by path: by default those that `targets` names."""
        return select(model, self.targets)

    def edit(self, path: str, module: Module, rng: np.random.Generator) -> Edit | None:
        """The edit of one module, or None."""

    def edits(self, found: dict[str, Module], rng: np.random.Generator) -> dict[str, Edit]:
        """The edits of all modules that `find` gave. Override it to share parts between modules."""
        made = {path: self.edit(path, module, rng) for path, module in found.items()}
        return {path: e for path, e in made.items() if e is not None}

    def trains(self, model: Module) -> set[str]:
        """Names of the base's tensors that train as well, chosen by looking at the model's modules."""
        return set()

    def begin(self, edits: dict[str, Edit], t: int, T: int, rng: np.random.Generator) -> None:
        """Called before the forward pass of step t = 0 ... T − 1 of a training phase: to sample a rank or a gate."""

    def penalty(self, edits: dict[str, Edit], model: Module, ctx: Context) -> Any:
        """A term that is added to the loss, a scalar Tensor or a float. Called once for each micro-batch.

        ctx: the Context of the forward pass of this micro-batch."""
        return 0.0

    def step(self, edits: dict[str, Edit], t: int, T: int) -> None:
        """Called after the update of step t, before the gradients are cleared: for importances, budgets and masks.

        The gradients are unscaled and clipped. Not called for a step that float16 skips."""

    def phases(self) -> list[Phase]:
        """The phases of training, in order. Each starts with a fresh optimiser."""
        return [Phase(1.0)]

    def eject(self, edits: dict[str, Edit]) -> tuple[Method, dict[str, Edit]]:
        """The simpler (method, edits) that give the same outputs after training: a prefix without its MLP."""
        return self, edits


@checked_keywords
@dataclass(eq=False)
class Attached:
    """A method on a model, or one that `detach` took off.

    edits         its edits by module path
    base_values   {name: array} of the base tensors that it trains. While it is attached: their values from before;
                  while it is detached: the trained values
    seed          the seed of the generator that initialised the edits
    is_attached   True while a model has it
    fits          {path: description} of the model, of the modules that it edits and of the base tensors that it
                  trains; kept by `detach`, and compared with the model by `attach`"""

    method: Method
    name: str
    edits: dict[str, Edit]
    base_values: dict[str, Array] = field(default_factory=dict)
    seed: int = 0
    is_attached: bool = False
    fits: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        state = "attached" if self.is_attached else "detached"
        parts = f"{len(self.edits)} edits, {len(self.base_values)} base tensors"
        return f"Attached({self.name!r}, {self.method!r}, {parts}, {state})"


# ── finding parts of a model ─────────────────────────────────────────────────────────────────────────────────────────
def check_model(caller: str, model: Any) -> None:
    """TypeError unless `model` is a Module. caller: the function that got it."""
    if isinstance(model, tuple) and model and isinstance(model[0], Module):
        raise TypeError(f"{caller} wants a model, a Module, got a tuple: "
                        "load gives two values, model, tokenizer = load(path)")
    checks.instance(caller, model, Module, "a model, a Module, as its first argument")


def base_modules(model: Module) -> dict[str, Module]:
    """The model's own modules by path, without edits."""
    return {path: m for path, m in model.named_modules() if not is_in_edit(path) and not isinstance(m, Packed)}


def base_parameters(model: Module) -> dict[str, Tensor]:
    """The model's own tensors by name, without those of edits."""
    return {name: p for name, p in model.named_parameters().items() if not is_in_edit(name)}


def is_in_edit(path: str) -> bool:
    """True if a module or tensor of this name is part of an edit."""
    return "edits" in path.split(".")


def inside(name: str, paths: Iterable[str]) -> bool:
    """True if a tensor or module of this name lies inside one of the modules at these paths."""
    return any(name.startswith(f"{path}.") for path in paths)


def is_head(model: Module, name: str) -> bool:
    """True if a tensor belongs to a new task head."""
    return inside(name, getattr(model, "head_modules", ()))


def select(model: Module, globs: str | Iterable[str], candidates: Iterable[str] | None = None) -> dict[str, Module]:
    """{path: module} of the modules whose paths end in one of the globs, in the order of the model.

    "attn.[qv]" matches "blocks.0.attn.q". "*" stands for one name, "**" for any number of names, "[qv]" for one of
    these letters, "[0-3]" for one of this range. Edits and packed weights are no modules here.

    candidates: the paths that the message names if a glob matches nothing; all modules if None
    Raises LookupError, with the nearest names, for a glob that matches nothing; TypeError or ValueError for a glob that
    is no pattern."""
    modules = base_modules(model)
    chosen = set()
    for glob in check_targets("targets", globs) if globs != () else ():
        hits = {path for path in modules if path and patterns.ends_in(path, glob)}      # "" is the model's own path
        if not hits:
            raise LookupError(f"{glob!r} names no module of this model; {_offer(glob, modules, candidates)}")
        chosen |= hits
    return {path: m for path, m in modules.items() if path in chosen}


def check_targets(name: str, targets: Any) -> list[str]:
    """The globs of a `targets`: one pattern, or a list, tuple or set of them.

    name: the field, for the message. TypeError for another value; ValueError for no pattern, an empty one, one with a
    bracket that has no partner, or a very long one."""
    wanted = f"{name} wants a pattern of module paths such as 'attn.[qv]', or several"
    if not isinstance(targets, (str, list, tuple, set, frozenset)):
        raise TypeError(f"{wanted}, got {checks.brief(targets)}")
    globs = [targets] if isinstance(targets, str) else list(targets)
    for glob in globs:
        if not isinstance(glob, str):
            raise TypeError(f"{wanted}, got {checks.brief(glob)} among them")
        if len(glob) > patterns.LONGEST:
            raise ValueError(f"{wanted}, of at most {patterns.LONGEST} characters, got {len(glob):,}")
        if not patterns.split(glob):
            raise ValueError(f"{wanted}, got {glob!r}")
    if not globs:
        raise ValueError(f"{wanted}, got none")
    return globs


def _offer(glob: str, paths: Iterable[str], candidates: Iterable[str] | None) -> str:
    """For an error message: the endings of paths that resemble the glob, or, if given, the candidates.

    Block numbers are written as *, so a candidate is "blocks.*.attn.q"; at most eight are named."""
    if candidates is None:
        return f"there are {', '.join(_nearest(glob, paths))} ..."
    found = list(dict.fromkeys(re.sub(r"\.\d+", ".*", path) for path in candidates))
    if not found:
        return "it has no module that could be named"
    more = " ..." if len(found) > 8 else ""
    return f"it has {', '.join(found[:8])}{more}"


def _nearest(glob: str, paths: Iterable[str]) -> list[str]:
    """For an error message: up to four endings of the paths that resemble the glob, or else the first eight.

    An ending is a path's last two names, block numbers written as *: "attn.q", "blocks.*"."""
    ends = set()
    for path in paths:
        if path:
            names = re.sub(r"\.\d+", ".*", path).split(".")
            ends.add(".".join(names[-2:]))
    return difflib.get_close_matches(glob, sorted(ends), 4, 0.3) or sorted(ends)[:8]


def stacks(model: Module) -> dict[str, list[str]]:
    """The paths of the blocks of each stack, bottom to top. TypeError if the model does not name its stacks."""
    named = getattr(model, "stacks", None)
    if not named:
        raise TypeError(f"this method wants a model that names its blocks in `stacks`; {type(model).__name__} does not")
    return named


def sublayers(model: Module) -> dict[str, str]:
    """{path of a sublayer: path of its norm} of every block of every stack, in the order in which they run.

    Each block's class names them in `sublayers`, as pairs such as ("attn", "norm1")."""
    modules = base_modules(model)
    found = {}
    for blocks in stacks(model).values():
        for block in blocks:
            for sublayer, norm in modules[block].sublayers:
                found[f"{block}.{sublayer}"] = f"{block}.{norm}"
    return found


def token_embedding(model: Module) -> dict[str, Module]:
    """{path: module} of the embedding of token ids, a model's `embed`. TypeError if the model has none."""
    embed = getattr(model, "embed", None)
    if not isinstance(embed, Embedding):
        raise TypeError(f"this method wants a model with a token embedding `embed`; {type(model).__name__} has none")
    return {path: m for path, m in base_modules(model).items() if m is embed}


def attached(model: Module) -> tuple[Attached, ...]:
    """The methods on a model, in the order in which they were attached."""
    return getattr(model, "_attached", ())


def get_attached(model: Module, name: str | None = None) -> Attached:
    """The method attached under this name; without a name, the last attached. LookupError if there is none.

    TypeError for a name that is no text."""
    check_model("get_attached", model)
    if name is not None and not isinstance(name, str):
        hint = f": its name is {name.name!r}" if isinstance(name, Attached) else ""
        raise TypeError(f"a method is called by its name, such as 'lora', got {checks.brief(name)}{hint}")
    for a in reversed(attached(model)):
        if name is None or a.name == name:
            return a
    names = ", ".join(a.name for a in attached(model))
    if not names:
        raise LookupError("no method is attached to this model, so there is nothing to take off or to save")
    raise LookupError(f"{name!r} is not attached; there is {names}")


# ── attach and detach ────────────────────────────────────────────────────────────────────────────────────────────────
@checked_keywords
def attach(model: Module, method: Method | Attached, name: str | None = None, seed: int = 0,
           train_head: bool = True) -> Attached:
    """Put a method on a model, or put back what `detach` returned. The model is changed in place.

    From then on only the tensors that the attached methods train are trainable. A new task head trains too, with the
    first method that is attached with train_head=True, and is saved with it.

    name        the class's name in lower case if None
    seed        of the initial values; ignored, as train_head is, for what `detach` returned

    TypeError if `method` is no Method; LookupError if no module matches its targets; ValueError if the name is taken,
    if the method has no edits, trains no tensor and adds no penalty, or if what `detach` returned does not fit: it
    belongs to another model, or is attached to one. Then neither the model nor `method` was changed."""
    _check_attach(model, method, name, seed, train_head)
    if name is None:
        name = method.name if isinstance(method, Attached) else type(method).__name__.lower()
    if any(a.name == name for a in attached(model)):
        raise ValueError(f"{name!r} is attached already; give this one another name: attach(..., name=...)")
    if isinstance(method, Attached):
        a = method
        _check_fit(model, a)
    else:
        a = _make(model, method, name, int(seed), train_head)
    modules = base_modules(model)
    if isinstance(method, Attached):
        a.name = name
        _swap_base(model, a)                                # its trained base values go into the model
    for path, e in a.edits.items():
        modules[path].edits = {**modules[path].edits, name: e}      # a new dict: modules without edits share one
    _set_attached(model, (*attached(model), a))
    return a


def _check_attach(model: Any, method: Any, name: Any, seed: Any, train_head: Any) -> None:
    """TypeError or ValueError for an argument of `attach` of another kind."""
    check_model("attach", model)
    _check_not_suspended(model, "attach")
    if not isinstance(method, (Method, Attached)):
        is_class = isinstance(method, type) and issubclass(method, Method)
        hint = f": write {method.__name__}()" if is_class else ""
        raise TypeError("attach wants a Method, such as LoRA(r=8), or what detach gave; "
                        f"got {checks.brief(method)}{hint}")
    check_name("attach: name", name)
    checks.whole("attach: seed", seed, least=0)
    checks.flag("attach: train_head", train_head)


def check_name(what: str, name: Any) -> None:
    """TypeError or ValueError unless the name of an adapter is None or a text with characters. what: the argument."""
    if name is not None and not isinstance(name, str):
        raise TypeError(f"{what} wants a text, such as 'lora', got {checks.brief(name)}")
    if name == "":
        raise ValueError(f"{what} wants a text, such as 'lora', got an empty one")


def _check_fit(model: Module, a: Attached) -> None:
    """ValueError unless a detached adapter belongs to a model like this one: the same modules, of the same shapes."""
    if a.is_attached:
        raise ValueError(f"{a.name} is attached to a model already: detach it there first")
    modules = base_modules(model)
    parameters = base_parameters(model)
    missing = (a.edits.keys() - modules.keys()) | (a.base_values.keys() - parameters.keys())
    if missing:
        raise ValueError(f"{a.name} was attached to another model: this one has no {min(missing)}")
    wanted = {**a.fits, **{name: _describe_array(values) for name, values in a.base_values.items()}}
    here = _describe_base(model, a)
    for path, description in here.items():
        if wanted.get(path, description) != description:
            raise ValueError(f"{a.name} was attached to another model: {path} was {wanted[path]}; "
                             f"here it is {description}")


def _describe_base(model: Module, a: Attached) -> dict[str, str]:
    """{path: description} of the model, of the modules that a method edits, and of the base tensors that it trains."""
    modules = base_modules(model)
    parameters = base_parameters(model)
    described = {"the model": _describe_model(model)}
    described |= {path: _describe_module(modules[path]) for path in a.edits if path in modules}
    return described | {name: _describe_array(parameters[name].data) for name in a.base_values if name in parameters}


def _describe_model(model: Module) -> str:
    """A model's class, the numbers of blocks of its stacks, and the dtype and backend of its first parameter.

    A head is not described: an adapter may be taken off, and put on again after the model got a new head."""
    texts = [f"{len(blocks)} blocks in {name}" for name, blocks in getattr(model, "stacks", {}).items()]
    for p in model.named_parameters().values():
        texts.append(f"{p.dtype} on {p.device}")
        break
    return f"a {type(model).__name__} ({', '.join(texts)})"


def _describe_module(module: Module) -> str:
    """A module's class, the shapes of its own tensors, packed or dense, and its sizes.

    An edit that fits one module fits every other module with the same description."""
    texts = []
    for name, value in module.parts():
        if isinstance(value, (Packed, Tensor)):
            texts.append(f"{name} {tuple(value.shape)}")
        elif type(value) is int:
            texts.append(f"{name} {value}")
    return f"a {type(module).__name__} ({', '.join(texts)})"


def _describe_array(a: Array) -> str:
    """Shape, dtype and backend of an array."""
    return f"of shape {tuple(a.shape)}, {a.dtype} on {array.name_of(a)}"


def _make(model: Module, method: Method, name: str, seed: int, train_head: bool) -> Attached:
    """A new Attached: the method's edits, and copies of the base tensors that it trains. The model is not changed.

    `detach` puts the copies back. A new task head trains too, unless train_head is False or a method attached before
    trains it. ValueError if the method trains an unknown tensor, or if it has no edits, no tensors and no penalty."""
    parameters = base_parameters(model)
    head = {n for n in parameters if is_head(model, n)}
    trained_before = {n for a in attached(model) for n in a.base_values}
    trainable = set(method.trains(model))
    unknown = trainable - parameters.keys()
    if unknown:
        raise ValueError(f"{name} wants to train {min(unknown)}, which is not a tensor of this model")
    edits = method.edits(method.find(model), np.random.default_rng(seed))
    modules = base_modules(model)
    for path, e in edits.items():
        if path not in modules:
            raise ValueError(f"{name} wants to edit {path}, which is not a module of this model")
        checks.instance(f"{name}: the edit of {path}", e, Edit, "an Edit")
    if not train_head:
        trainable -= head
    if not edits and not trainable and type(method).penalty is Method.penalty:
        raise ValueError(f"{name} would train nothing on this model: "
                         f"none of its tensors is one that {type(method).__name__} trains")
    if train_head:
        trainable |= head - trained_before
    base = {n: p.data.copy() for n, p in parameters.items() if n in trainable}
    return Attached(method, name, edits, base, seed)


@checked_keywords
def detach(model: Module, name: str | None = None) -> Attached:
    """Take a method off, the last one if `name` is None: the model is what it was before, bitwise.

    The returned object holds the edits and the trained values of base tensors; `attach` puts it on again. LookupError
    if it is not attached; ValueError if a method attached later trains the same base tensors."""
    check_model("detach", model)
    a = get_attached(model, name)
    _check_not_suspended(model, "detach")
    _check_no_later_training(model, [a])
    _remove_edits(model, {a.name})
    _swap_base(model, a)
    _set_attached(model, tuple(b for b in attached(model) if b is not a))
    return a


@checked_keywords
@contextmanager
def without(model: Module, *names: str) -> Iterator[None]:
    """The model without these methods for the length of a `with`; afterwards everything is as before, order included.

    Without names it takes off every method that trains something, so that a frozen adapter stays part of the base.
    ValueError if a method that stays was attached later and trains the same base tensors."""
    check_model("without", model)
    names = names or tuple(a.name for a in attached(model) if _is_trainable(a))
    wanted = [get_attached(model, n) for n in names]
    off = [a for a in attached(model) if a in wanted]       # in the order in which they were attached
    _check_no_later_training(model, off)
    before = [(m, m.edits) for m in base_modules(model).values() if m.edits]
    _remove_edits(model, names)
    for a in reversed(off):                                 # in reverse: each restores the values from before it
        _swap_base(model, a)
    model._suspended = _is_suspended(model) + 1
    try:
        yield
    finally:
        model._suspended -= 1
        for m, edits in before:
            m.edits = edits
        for a in off:
            _swap_base(model, a)


def _is_suspended(model: Module) -> int:
    """The number of `without` blocks that the model is in."""
    return getattr(model, "_suspended", 0)


def _check_not_suspended(model: Module, caller: str) -> None:
    """RuntimeError inside `with without(model)`, which puts back the edits that it found."""
    if _is_suspended(model):
        raise RuntimeError(f"{caller} cannot change the methods of a model inside `with without(model)`: "
                           "leave the block first")


def _is_trainable(a: Attached) -> bool:
    """True if the method trains a tensor of the base or of one of its edits."""
    return bool(a.base_values) or any(p.requires_grad for e in a.edits.values() for p in e.parameters())


def _remove_edits(model: Module, names: Iterable[str]) -> None:
    """Remove the edits of these methods from all modules."""
    for m in base_modules(model).values():
        if m.edits:
            m.edits = {name: e for name, e in m.edits.items() if name not in names}


def _check_no_later_training(model: Module, off: list[Attached]) -> None:
    """ValueError if a method that stays was attached after one of `off`, and trains the same base tensors.

    The later method continued from the values of the earlier one, so the earlier one cannot be taken off alone."""
    order = attached(model)
    for a in off:
        later = [b for b in order[order.index(a) + 1:] if b not in off]
        clash = [b.name for b in later if b.base_values.keys() & a.base_values.keys()]
        if clash:
            raise ValueError(f"{', '.join(clash)} trained the same tensors after {a.name}: detach them first")


def _swap_base(model: Module, a: Attached) -> None:
    """Exchange the values of the base tensors that a method trains with the values stored in `a.base_values`.

    The arrays are swapped, so that a graph recorded earlier keeps the values it was computed with."""
    parameters = base_parameters(model)
    for name, stored in a.base_values.items():
        p = parameters[name]
        a.base_values[name] = p.data
        p.data = array.put_like(stored, p.data, p.dtype)


def _set_attached(model: Module, methods: tuple[Attached, ...]) -> None:
    """Record which methods are attached, and set requires_grad of the base tensors.

    The base tensors that the methods train are trainable, the others are frozen. Without a method, all are trainable.
    The tensors of edits keep their requires_grad."""
    for a in attached(model):
        if a not in methods:
            a.is_attached = False
            a.fits = _describe_base(model, a)
    for a in methods:
        a.is_attached = True
    model._attached = methods
    trainable = {name for a in methods for name in a.base_values}
    for name, p in base_parameters(model).items():
        p.requires_grad = not methods or name in trainable


def copy_edits(edits: dict[str, Edit]) -> dict[str, Edit]:
    """Copies of edits that share no tensor and no buffer with them. Parts that several edits share stay shared.

    An attribute whose name begins with an underscore refers to a part that the base owns: the copy refers to the same
    one, unless that part belongs to these edits too."""
    modules = [module for e in edits.values() for module in e.modules()]
    owned = {id(module) for module in modules}
    for module in modules:
        owned |= {id(value) for _, value in module.parts()}
    kept = {}                                            # id -> the same object: deepcopy does not copy it
    for module in modules:
        for name, value in vars(module).items():
            if name[0] == "_" and id(value) not in owned:
                kept[id(value)] = value
    return copy.deepcopy(edits, kept)


# ── eject and merge ──────────────────────────────────────────────────────────────────────────────────────────────────
@checked_keywords
def eject(model: Module, name: str | None = None) -> Attached:
    """Replace a method with the simpler form that suffices after training. The model's outputs stay the same.

    A prefix loses the MLP that made it; a method without a simpler form stays as it is. See Method.eject.

    Returns the Attached of the simpler form. The one that `attach` gave is then what `detach` would have given: it
    keeps the trained values for itself, and can be attached again. LookupError if the name is not attached; TypeError
    or ValueError if the method's own `eject` gives something else; then nothing was changed."""
    check_model("eject", model)
    a = get_attached(model, name)
    _check_not_suspended(model, "eject")
    method, edits = a.method.eject(dict(a.edits))
    checks.instance(f"{a.name}: eject", method, Method, "a method and its edits")
    modules = base_modules(model)
    unknown = edits.keys() - modules.keys()
    if unknown:
        raise ValueError(f"{a.name} wants to edit {min(unknown)}, which is not a module of this model")
    ejected = Attached(method, a.name, edits, a.base_values, a.seed)
    own_edits = copy_edits(a.edits)
    own_values = _copy_base(model, a)
    for path, m in modules.items():
        if a.name in m.edits or path in edits:
            replaced = {**m.edits, a.name: edits.get(path)}              # in the same place of the order
            m.edits = {name: e for name, e in replaced.items() if e is not None}     # None: no edit in the new form
    a.edits = own_edits
    a.base_values = own_values
    _set_attached(model, tuple(ejected if b is a else b for b in attached(model)))
    return ejected


def _copy_base(model: Module, a: Attached) -> dict[str, Array]:
    """Copies of the present values of the base tensors that a method trains."""
    parameters = base_parameters(model)
    return {name: parameters[name].data.copy() for name in a.base_values}


@checked_keywords
def merge(model: Module, *names: str) -> Module:
    """Fold the edits of the named methods into the base's own weights, and remove them. No names: all methods.

    On each module: weight edits and then output edits, as they were attached, and then input edits, the last one first.
    LookupError if a name is not attached. CannotMerge, with the reason, if an edit cannot be merged exactly, or if a
    method that stays trains a tensor that would be written; then nothing was changed."""
    check_model("merge", model)
    _check_not_suspended(model, "merge")
    merging = {get_attached(model, n).name for n in names} if names else {a.name for a in attached(model)}
    merged = [a for a in attached(model) if a.name in merging]
    kept = [a for a in attached(model) if a.name not in merging]
    folded: dict[str, dict[str, Array]] = {}                # module path -> {name: the new array}
    for path, m in base_modules(model).items():
        if merging & m.edits.keys():
            _check_order(path, m.edits, merging)
            folded[path] = _fold(path, m, [e for name, e in m.edits.items() if name in merging])
            _check_folded(path, m, folded[path])
    written = {f"{path}.{name}" for path, tensors in folded.items() for name in tensors}
    written |= {name for a in merged for name in a.base_values}      # their trained values stay in the base
    for a in kept:
        if a.base_values.keys() & written:
            raise CannotMerge(f"{a.name} trains the same tensors, and to detach it would undo the merge: "
                              "merge it too, or detach it first")
    # The trained values of base tensors stay in the model, and each method keeps a copy, as after `detach`.
    trained_values = [_copy_base(model, a) for a in merged]
    for path, m in base_modules(model).items():             # no edit raised CannotMerge: write
        for name, w in folded.get(path, {}).items():
            getattr(m, name).copy_(w)
    for a, values in zip(merged, trained_values, strict=True):
        a.base_values = values
    _remove_edits(model, merging)
    _set_attached(model, tuple(kept))
    return model


def _check_folded(path: str, m: Module, folded: dict[str, Array]) -> None:
    """CannotMerge unless every new array is for a tensor of the module, and has its shape."""
    own = m.own()
    for name, w in folded.items():
        if name not in own or tuple(w.shape) != tuple(own[name].shape):
            raise CannotMerge(f"{path}: an edit gives {name} of shape {tuple(w.shape)}, which the module does not have")


def _check_order(path: str, edits: dict[str, Edit], merging: set[str]) -> None:
    """CannotMerge if the edits of a module that stay would no longer see the same weight, input and output.

    A merged edit acts inside the module's weights, and no longer where it stands in the order of the edits. So

        1.  the merged edits must be the first of the module's edits
        2.  if one of them changes the input, no other edit may stay: it would see the input before that change
        3.  if one of them changes the output, no weight edit may stay: it would see the changed weights"""
    first = [name for name in edits if name in merging]
    rest = [name for name in edits if name not in merging]

    def any_overrides(hook: str, names: list[str]) -> bool:
        return any(edits[name].overrides(hook) for name in names)

    in_front = list(edits)[:len(first)] == first                                        # 1
    input_changes = bool(rest) and any_overrides("before", first)                       # 2
    weight_changes = any_overrides("tensor", rest) and any_overrides("after", first)    # 3
    if not in_front or input_changes or weight_changes:
        raise CannotMerge(f"{path}: {', '.join(edits)} act in this order, so {', '.join(first)} cannot go first")


def _fold(path: str, m: Module, edits: list[Edit]) -> dict[str, Array]:
    """{name: new array} for the module's own tensors that these edits change. Nothing is written.

    With the new arrays and without these edits the module gives the same outputs. Raises CannotMerge, with the reason,
    if that is not possible."""
    packed = [name for name, v in vars(m).items() if isinstance(v, Packed)]
    if packed:
        raise CannotMerge(f"{path}.{packed[0]} is packed: keep the adapter beside it, "
                          "or unpack the base first (tinyft.unpack) and merge then")
    # First the edits of weights (`tensor`), in order. Then from the weight outwards: edits of the output (`after`) in
    # order, and edits of the input (`before`) in reverse, since the last of these is the nearest to the weight.
    output_edits = [e for e in edits if e.overrides("after")]
    input_edits = [e for e in edits if e.overrides("before") and not e.overrides("after")]
    activation_edits = output_edits + input_edits[::-1]
    for e in output_edits:
        if e.overrides("before") and len(activation_edits) > 1:
            raise CannotMerge(f"{path}: {type(e).__name__} changes input and output, so it merges only without other "
                              "edits of the input or the output")
    if activation_edits and m.tied:
        raise CannotMerge(f"{path}: its weight is also the head's, "
                          f"and {type(activation_edits[0]).__name__} changes only the input or the output of {path}")
    own = m.own()
    tensors = dict(own)
    for e in edits:
        tensors = {name: e.tensor(name, p) for name, p in tensors.items()}
    arrays = {name: p.data for name, p in tensors.items()}
    for e in activation_edits:
        arrays = e.fold(arrays)
    # A tensor that no edit changed still has its own array.
    return {name: w for name, w in arrays.items() if w is not own[name].data}


@checked_keywords
def unpack(model: Module) -> Module:
    """Replace every packed weight with its dense values, in place, and return the model.

    The values stay those of the packed weight, rounded by the compression; the original ones are lost."""
    check_model("unpack", model)
    unpacked = []                                           # (module, name, its dense weight)
    for m in model.modules():
        for name, weight in vars(m).items():
            if isinstance(weight, Packed):
                unpacked.append((m, name, Parameter(weight.dequantize())))
    for m, name, weight in unpacked:
        setattr(m, name, weight)
    _set_attached(model, attached(model))                   # freezes the new parameters that no method trains
    return model


# ── counting ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@checked_keywords
@dataclass(frozen=True)
class Count:
    """Sizes of a model with its methods.

    trained   trainable parameters in edits and base, without a new task head
    head      trainable parameters in a new task head
    total     all parameters of the base, without a new task head; a packed weight counts its dense entries
    nbytes    bytes of the trainable tensors, head included; buffers are not counted"""

    trained: int
    head: int
    total: int
    nbytes: int

    def __str__(self) -> str:
        head = f" and {self.head:,} in the head" if self.head else ""
        percent = 100 * self.trained / max(self.total, 1)
        return f"{self.trained:,} trained ({percent:.2f} % of {self.total:,}){head}; {self.nbytes:,} bytes to store"


@checked_keywords
def trained(model: Module) -> dict[str, Tensor]:
    """The trainable tensors by name."""
    check_model("trained", model)
    return {name: p for name, p in model.named_parameters().items() if p.requires_grad}


@checked_keywords
def count(model: Module) -> Count:
    """The numbers of trainable and of all parameters. A masked tensor counts only the entries that may move."""
    check_model("count", model)
    sizes = {name: _free_entries(p) for name, p in trained(model).items()}
    head = sum(size for name, size in sizes.items() if is_head(model, name))
    # A Packed weight is a module with buffers, not a parameter.
    dense = sum(p.size for name, p in base_parameters(model).items() if not is_head(model, name))
    packed = sum(int(np.prod(m.shape)) for m in model.modules() if isinstance(m, Packed))
    nbytes = sum(p.data.nbytes for p in trained(model).values())
    return Count(sum(sizes.values()) - head, head, dense + packed, nbytes)


def _free_entries(p: Tensor) -> int:
    """The number of entries that an optimiser may change."""
    return p.size if p.mask is None else int(np.broadcast_to(array.asnumpy(p.mask), p.shape).sum())


# ── state ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def named_state(model: Module, a: Attached) -> dict[str, Any]:
    """{name: Tensor or buffer} of all that belongs to an attached method: its edits, and the base tensors it trains.

    The names are those of the model's state_dict: `blocks.0.attn.q.edits.lora.A`. A part that several modules share
    appears once. Buffers that are not persistent are left out. LookupError if the method is not attached."""
    if a not in attached(model):
        raise LookupError(f"{a.name!r} is not attached to this model")
    in_edits = set()                                        # ids of the tensors and buffers of its edits
    for e in a.edits.values():
        in_edits |= {id(v) for v in e.named_parameters().values()}
        in_edits |= {id(v) for v in e.named_buffers().values()}
    saved = model.state_dict().keys()
    named = {**model.named_parameters(), **model.named_buffers()}
    return {name: v for name, v in named.items() if name in a.base_values or (id(v) in in_edits and name in saved)}


def state_dict(model: Module, a: Attached) -> dict[str, np.ndarray]:
    """Copies, on the host, of everything that belongs to an attached method."""
    values = {name: v.data if isinstance(v, Tensor) else v for name, v in named_state(model, a).items()}
    return {name: np.array(array.asnumpy(v)) for name, v in values.items()}


def load_state_dict(model: Module, a: Attached, arrays: dict[str, np.ndarray]) -> None:
    """Copy arrays, as `state_dict` gave them, into everything that belongs to an attached method.

    Raises ValueError, naming what is missing, unexpected or of another shape, and TypeError for values that are no
    numbers; then nothing was changed."""
    named = named_state(model, a)
    checks.instance("load_state_dict", arrays, Mapping, "a dict {name: array}")
    shapes = {name: tuple(as_numbers(name, values).shape) for name, values in arrays.items()}
    wrong = []
    for name in sorted(named.keys() | arrays.keys()):
        if name not in arrays:
            wrong.append(f"{name} is missing")
        elif name not in named:
            wrong.append(f"{name} is not expected")
        elif tuple(named[name].shape) != shapes[name]:
            wrong.append(f"{name} has shape {shapes[name]}, not {tuple(named[name].shape)}")
    if wrong:
        more = " ..." if len(wrong) > 4 else ""
        raise ValueError(f"{a.name} does not fit: " + "; ".join(wrong[:4]) + more)
    copy_all(named, arrays)

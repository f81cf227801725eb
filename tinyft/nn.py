"""Modules: a tree of parts with names, and the layers that every model is made of.

    Module      a part of a model. `__call__` and `read` apply its edits (edit.py), so that no forward mentions them
    Packed      a compressed weight in a Parameter's place
    Linear, Embedding, TiedHead, LayerNorm, RMSNorm, Dropout
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from . import array, checks, ops, printing
from .array import Array
from .context import Cache, Context
from .keywords import checked_keywords, refuse_keywords
from .tensor import Tensor, no_grad, op

__all__ = [
    "Cache", "Context", "Dropout", "Embedding", "LayerNorm", "Linear", "Module", "Packed", "Parameter", "RMSNorm",
    "TiedHead", "dense", "no_grad",
]


# The dtypes that a model's parameters may have.
FLOATS = tuple(np.dtype(name) for name in ("float64", "float32", "float16")) + (array.bfloat16,)


# Names of devices in PyTorch, and a hint for each.
FOREIGN_BACKENDS = {
    "cuda": "; an NVIDIA GPU is the backend 'cupy'", "gpu": "; an NVIDIA GPU is the backend 'cupy'",
    "cpu": "; the CPU is the backend 'numpy'",
}


class _Missing:
    """The type of the default of an argument for which None is a value."""


MISSING = _Missing()


@checked_keywords
class Parameter(Tensor):
    """A trainable tensor that a module owns.

    decay: True or False, if weight decay applies; None for the rule of the optimisers (matrices yes, vectors no).
    """

    __slots__ = ()

    def __init__(self, data: Any, decay: bool | None = None):
        super().__init__(data, requires_grad=True, decay=decay)


class Module:
    """A part of a model. Its attributes are Parameters, arrays (buffers), Modules, and lists and dicts of these.

    An attribute whose name begins with an underscore is a reference to another module's part: it is used, but it is
    not listed under this module. Subclasses write `forward(x, ctx)`.
    """

    edits: dict[str, Any] = {}                           # adapter name -> Edit; attach sets a new dict on a module
    training = False                                     # unlike in PyTorch; fit switches training mode on and off
    tied = False                                         # True: the weight is also the output layer's weight
    _non_persistent: frozenset[str] = frozenset()        # names of the module's own buffers that are not saved

    def __call__(self, x: Any = MISSING, ctx: Context | None = None, **facts: Any) -> Any:
        """The module's output for the input x, changed by its edits, which act in the order of their attachment.

        Every edit's `before` changes the input; then every edit's `after` changes the output, and gets the same input
        as the forward. The outermost call takes the fields of its Context as keywords, model(ids, mask=...); inner
        calls pass the Context on. TypeError if both are given, or if the input is missing."""
        if type(ctx) is not Context or facts:            # an outermost call, or a wrong argument
            ctx = _context_of_call(self, x, ctx, facts)
        for edit in self.edits.values():
            x = edit.before(x, ctx)
        y = self.forward(x, ctx)
        for edit in self.edits.values():
            y = edit.after(x, y, ctx)
        return y

    def forward(self, x: Any, ctx: Context) -> Any:
        """The module's own computation, without edits."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def read(self, name: str) -> Any:
        """The module's own tensor `name`, changed by the edits of the module.

        Every forward gets its tensors from here. A tied head reads the embedding's weight here as well. TypeError if
        the weight is packed (compressed), and an edit would change it that can change dense weights only."""
        p = getattr(self, name)
        for edit in self.edits.values():
            if isinstance(p, Packed) and edit.overrides("tensor") and not edit.takes_packed:
                raise TypeError(f"{type(edit).__name__} changes the weight itself, and this weight is packed: "
                                "unpack the base first (tinyft.unpack), or use a method that changes outputs")
            p = edit.tensor(name, p)
        return p

    # ── the tree ──
    def parts(self) -> Iterator[tuple[str, Any]]:
        """(name, value) of every attribute of this module whose name has no leading underscore, of any type.

        An underscore marks a reference to another module's part, which is not listed here.
        The entries of lists and dicts come one by one, as `name.0` or `name.key`: an adapter's edit is `edits.lora`."""
        for name, value in vars(self).items():
            if name[0] == "_":
                continue
            if isinstance(value, list):
                for i, entry in enumerate(value):
                    yield f"{name}.{i}", entry
            elif isinstance(value, dict):
                for key, entry in value.items():
                    yield f"{name}.{key}", entry
            else:
                yield name, value

    def named_modules(self, path: str = "") -> Iterator[tuple[str, Module]]:
        """(path, module) of this module and of all below it. A shared module comes once for each of its paths."""
        yield path, self
        for name, value in self.parts():
            if isinstance(value, Module):
                yield from value.named_modules(f"{path}.{name}" if path else name)

    def modules(self) -> Iterator[Module]:
        """This module and all below it."""
        for _, module in self.named_modules():
            yield module

    def own(self, kind: Any = Tensor) -> dict[str, Any]:
        """The module's own tensors by name, without those of its parts; with kind=Array, its own buffers."""
        if kind is Array:
            return {name: value for name, value in self.parts() if array.is_array(value)}
        return {name: value for name, value in self.parts() if isinstance(value, kind)}

    def _named(self, kind: Any, persistent_only: bool = False) -> dict[str, Any]:
        """{full name: value} of all tensors (kind=Tensor) or buffers (kind=Array). A shared one is listed once, under
        its first name."""
        named = {}
        seen = set()
        for path, module in self.named_modules():
            for name, value in module.own(kind).items():
                if id(value) in seen or (persistent_only and name in module._non_persistent):
                    continue
                seen.add(id(value))
                named[f"{path}.{name}" if path else name] = value
        return named

    def named_parameters(self) -> dict[str, Tensor]:
        """{full name: tensor} of this module and of all below it; a shared tensor under its first name."""
        return self._named(Tensor)

    def parameters(self) -> list[Tensor]:
        """All tensors of this module and of all below it."""
        return list(self._named(Tensor).values())

    def named_buffers(self, persistent_only: bool = False) -> dict[str, Array]:
        """{full name: array} of all buffers, or only of those that are saved."""
        return self._named(Array, persistent_only)

    def register_buffer(self, name: str, value: Array, persistent: bool = True) -> None:
        """Keep an array under `name`. It moves with the model.

        persistent=False: the array is not saved, for example because a seed determines it."""
        setattr(self, name, value)
        if not persistent:
            self._non_persistent = self._non_persistent | {name}

    # ── the text that print shows ──
    def extra_repr(self) -> str:
        """The settings of this module that `print` shows, such as "p=0.1". Tensors and parts are shown without it."""
        return ""

    def __repr__(self) -> str:
        """The module as a tree: its parts with their shapes, which of them train, and the numbers of parameters.

        Neighbours of a list that look alike share one line: blocks.0-3. An edit stands below its module, after a +."""
        return printing.describe(self)

    # ── state ──
    def train(self, on: bool = True) -> Module:
        """Set training mode, in which dropout acts, for this module and all below it. TypeError unless on is a bool."""
        on = checks.flag("train", on)
        for module in self.modules():
            module.training = on
        return self

    def eval(self) -> Module:
        """Set evaluation mode."""
        return self.train(False)

    def zero_grad(self) -> None:
        """Set every gradient to None."""
        for p in self.parameters():
            p.grad = None

    def state_dict(self) -> dict[str, Array]:
        """{name: array} of every parameter and persistent buffer: the arrays themselves, not copies."""
        values = {name: p.data for name, p in self.named_parameters().items()}
        return values | self.named_buffers(persistent_only=True)

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Copy arrays into the parameters and saved buffers of their names.

        strict: the names must be exactly the module's. Otherwise only the names in both are copied.
        KeyError if names differ, ValueError if shapes differ, TypeError for a value that is no array of numbers; then
        nothing was changed."""
        checks.instance("load_state_dict", state, Mapping, "a dict {name: array}")
        checks.flag("load_state_dict: strict", strict)
        targets = self.named_parameters() | self.named_buffers(persistent_only=True)
        missing = [name for name in targets if name not in state]
        unexpected = [str(name) for name in state if name not in targets]
        if strict and (missing or unexpected):
            more = " ..." if len(missing) > 5 or len(unexpected) > 5 else ""
            raise KeyError(f"names do not match: missing {missing[:5]}, unexpected {unexpected[:5]}{more}")
        present = {name: target for name, target in targets.items() if name in state}
        copy_all(present, {name: state[name] for name in present})

    def to(self, backend: str | None = None, dtype: Any = None, **unknown: Any) -> Module:
        """Move all parameters and buffers to a backend ("numpy", "cupy"), and the floating-point ones to a dtype.

        None leaves the backend or the dtype as it is. The module itself is changed and returned. Gradients are
        dropped. Arrays that were shared stay shared.

        dtype: float64, float32, float16 or bfloat16, as a name or a NumPy dtype. TypeError for another one, and for an
        unknown keyword; BackendError for a backend that does not exist or cannot be used. Then nothing was changed."""
        refuse_keywords("to", unknown, ("backend", "dtype"))
        _check_backend(backend)
        move = _Mover(backend, None if dtype is None else float_dtype("to", dtype))
        parameters = self.parameters()
        distinct = {id(module): module for module in self.modules()}         # a shared module is listed twice
        for p in parameters:
            move(p.data)
            move(p.mask)
        for module in distinct.values():
            for buffer in module.own(Array).values():
                move(buffer)
        for p in parameters:                             # every array was moved: from here on, nothing can fail
            p.data = move(p.data)
            p.mask = move(p.mask)
            p.grad = None
        for module in distinct.values():                                     # the buffers: attributes that are arrays
            for name, value in list(vars(module).items()):
                if name[0] == "_":                                           # belongs to another module
                    continue
                if isinstance(value, list):
                    value[:] = [move(entry) for entry in value]
                elif isinstance(value, dict):
                    value.update({key: move(entry) for key, entry in value.items()})
                else:
                    setattr(module, name, move(value))
        return self


def copy_all(targets: dict[str, Any], arrays: Mapping[str, Any]) -> None:
    """Write arrays into the tensors and buffers of the same names, or raise and write nothing.

    targets: {name: Tensor or buffer}. arrays: {name: array, Tensor or list of numbers}, with exactly these names.
    A buffer is written in place, since other parts may hold the same array. ValueError, naming the first five, for
    other shapes; TypeError for a value that is no array of numbers."""
    values = {}
    wrong = []
    for name, target in targets.items():
        value = as_numbers(name, arrays[name])
        if tuple(value.shape) != tuple(target.shape):
            wrong.append(f"{name}: {tuple(value.shape)} for {tuple(target.shape)}")
        else:
            like = target.data if isinstance(target, Tensor) else target
            values[name] = array.put_like(value, like, target.dtype)
    if wrong:
        raise ValueError("shapes do not match: " + "; ".join(wrong[:5]))
    for name, target in targets.items():
        if isinstance(target, Tensor):
            target.copy_(values[name])
        else:
            target[...] = values[name]


def as_numbers(name: str, value: Any) -> Array:
    """An array, the array of a Tensor, or nested lists of numbers as an array, where it lies.

    TypeError, beginning with the name, for a value that is no array of real numbers."""
    a = value.data if isinstance(value, Tensor) else value
    if not array.is_array(a):
        try:
            a = np.asarray(a)
        except ValueError:                               # lists of different lengths
            raise TypeError(f"{name} wants an array of real numbers, got rows of different lengths") from None
    if a.dtype.kind not in "biufV":                      # bfloat16 is of kind V
        raise TypeError(f"{name} wants an array of real numbers, got {checks.brief(value)}")
    return a


def float_dtype(name: str, dtype: Any) -> np.dtype:
    """The NumPy dtype of a model's parameters: float64, float32, float16 or bfloat16. TypeError for another one.

    name: the function that got the dtype, for the message."""
    if not _is_dtype(dtype):
        wanted = ", ".join(str(known) for known in FLOATS)
        raise TypeError(f"{name} wants one of the dtypes {wanted}, got {checks.brief(dtype)}")
    return np.dtype(dtype)


def _check_backend(name: Any) -> None:
    """Raise unless `name` is None or a backend: TypeError for another kind of value, BackendError for another name."""
    if name is None or (isinstance(name, str) and name in array.NAMES):
        return
    wanted = f"to wants a backend, one of {', '.join(array.NAMES)}"
    if _is_dtype(name):
        raise TypeError(f"{wanted}, got the dtype {name!r}: write to(dtype=...)")
    if not isinstance(name, str):
        raise TypeError(f"{wanted}, got {checks.brief(name)}")
    remark = FOREIGN_BACKENDS.get(name.split(":")[0], "")
    raise array.BackendError(f"{wanted}, got {name!r}{remark}")


def _is_dtype(value: Any) -> bool:
    """True for a dtype of parameters, or for its name."""
    try:
        return value is not None and np.dtype(value) in FLOATS
    except (TypeError, ValueError):
        return False


class _Mover:
    """Moves arrays to a backend and a dtype, each array once; other values stay as they are."""

    def __init__(self, backend: str | None, dtype: Any):
        self.backend = backend
        self.dtype = dtype
        # id -> (new array, old array). The old array is kept so that its id stays taken.
        self.moved: dict[int, tuple[Array, Array]] = {}

    def __call__(self, value: Any) -> Any:
        """The array on the backend and in the dtype of this mover. Another value is returned as it is.

        An array that was moved before gives the same new array again, so that shared arrays stay shared. Integers and
        Booleans keep their dtype."""
        if not array.is_array(value):
            return value
        if id(value) not in self.moved:
            new = value if self.backend is None else array.to(value, self.backend)
            if self.dtype is not None and new.dtype.kind in "fV":       # bfloat16 is of kind V
                new = new.astype(self.dtype)
            self.moved[id(value)] = new, value
        return self.moved[id(value)][0]


def _context_of_call(module: Module, x: Any, ctx: Any, facts: dict[str, Any]) -> Context:
    """The Context of a module's call on the input x: a new one from the keywords `facts`, or ctx if it is one.

    TypeError for a missing input, for a ctx that is no Context, and for a Context together with keywords."""
    if x is MISSING:
        got = f"only the keywords {', '.join(facts)}" if facts else "nothing"
        raise TypeError(f"a {type(module).__name__} wants its input as the first argument, model(ids, mask=...), "
                        f"got {got}")
    if ctx is None:
        return Context(**facts)
    if not isinstance(ctx, Context):
        raise TypeError(f"the second argument of a module is a Context, got {type(ctx).__name__}: "
                        "pass facts by keyword, model(ids, mask=...)")
    if facts:
        raise TypeError(f"a call takes a Context or keywords, got both: put {', '.join(facts)} into the Context")
    return ctx


@contextmanager
def evaluation_mode(*roots: Module) -> Iterator[None]:
    """Modules in evaluation mode, without recording, for the length of a `with`; then each part in its own mode."""
    modes = [(module, module.training) for root in roots for module in root.modules()]
    for module, _ in modes:
        module.training = False
    try:
        with no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class Packed(Module):
    """A compressed weight W (out, in) in a Parameter's place. Its codes and scales are buffers.

    Subclasses set `shape` and write dequantize(). A subclass that can decompress some rows alone also writes
    dequantize_rows and sets `rows_per_block`: a product then holds at most so many dense rows at a time. A subclass
    that `save` and `load` know writes `settings` and `restore`, and stands in compress/stored.py.

    in_groups   True: codes in groups of one scale each, a Grouped of compress/grouped.py, whose parts kernels read
    unit        an empty buffer, if a subclass has one: its dtype is that of the dense rows. It is not saved
    """

    _non_persistent = frozenset({"unit"})
    in_groups = False
    shape: tuple
    rows_per_block: int | None = None                    # None: one block

    def dequantize(self) -> Array:
        """The dense weight, (out, in)."""
        raise NotImplementedError(f"{type(self).__name__} has no dequantize")

    def dequantize_rows(self, rows: Any) -> Array:
        """W[rows], for a slice or an array of row numbers."""
        return self.dequantize()[rows]

    def prepare(self, x: Array) -> Any:
        """The form in which `product` wants x (N, in), made once for all blocks: here x itself."""
        return x

    def product(self, x: Any, rows: slice) -> Array:
        """x W[rows]ᵀ, for x (N, in) as `prepare` gave it: the part of a product that needs these rows, (N, n)."""
        return x @ self.dequantize_rows(rows).T

    def input_gradient(self, g: Array) -> Array:
        """g W, for the gradient g (N, out) of a product: that of its input, (N, in). W is decompressed again."""
        first, *others = self.blocks()
        dx = g[:, first] @ self.dequantize_rows(first)
        for rows in others:
            dx += g[:, rows] @ self.dequantize_rows(rows)
        return dx

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(a.nbytes for a in self.own(Array).values())

    def settings(self) -> dict[str, Any]:
        """What a file holds beside the saved buffers, as values for JSON. `restore` makes the weight from both."""
        raise NotImplementedError(f"{type(self).__name__} has no settings")

    @classmethod
    def restore(cls, shape: tuple[int, int], stored: Any) -> Packed:
        """The weight (out, in) from the settings and the buffers of a file, a Stored of compress/stored.py.

        ValueError or TypeError for settings and buffers that no weight of this class and shape has."""
        raise NotImplementedError(f"{cls.__name__} has no restore")

    def extra_repr(self) -> str:
        return f"packed {tuple(self.shape)}, {self.nbytes:,} bytes"

    def matmul(self, x: Tensor) -> Tensor:
        """x Wᵀ. x (..., in) -> (..., out). The gradient of x decompresses the weight again, block by block."""
        return _packed_linear(x, packed=self)

    def rows(self, ids: Array) -> Tensor:
        """W[ids], for ids (...) -> (..., in): the lookup of an embedding. No gradient."""
        return Tensor(self.dequantize_rows(ids))

    def blocks(self) -> list[slice]:
        """The rows of each block."""
        n = self.shape[0]
        step = self.rows_per_block or n
        return [slice(start, min(start + step, n)) for start in range(0, n, step)]


@op("... k -> ... n")
def _packed_linear(x, packed=None):
    """y = x Wᵀ, W decompressed block by block.    dx = g W, W decompressed again

    packed: a Packed weight (out, in). A block is a slice of its rows; the dense rows of one block are held at a time.
    W is frozen, so only x gets a gradient. Returns (y, pullbacks), as every op's function."""
    shape = x.shape
    blocks = packed.blocks()

    def forward(a):                                          # a: (N, in)
        prepared = packed.prepare(a)
        first = packed.product(prepared, blocks[0])
        if len(blocks) == 1:
            return first
        y = array.xp(a).empty((a.shape[0], packed.shape[0]), first.dtype)
        y[:, blocks[0]] = first
        for rows in blocks[1:]:
            y[:, rows] = packed.product(prepared, rows)
        return y

    def back(g):                                             # g: the gradient of y
        return packed.input_gradient(ops.flat(g)).reshape(shape)
    y = forward(ops.flat(x))
    return y.reshape(*shape[:-1], packed.shape[0]), (back,)


def dense(weight: Any) -> Array:
    """The dense array of a Parameter or of a Packed weight. For tools such as merge: a forward pass uses `matmul`."""
    return weight.dequantize() if isinstance(weight, Packed) else weight.data


def _linear(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, for a dense or a packed W."""
    if isinstance(weight, Tensor):
        return ops.linear(x, weight, bias)
    y = weight.matmul(x)
    return y if bias is None else y + bias


def _zeros(n: int) -> Array:
    return array.asarray(np.zeros(n, np.float32))


def _ones(n: int) -> Array:
    return array.asarray(np.ones(n, np.float32))


class Linear(Module):
    """y = x Wᵀ + b.    W (out, in) ~ N(0, std²),  b (out,) = 0,  x (..., in) -> (..., out)"""

    def __init__(self, in_features: int, out_features: int, *, rng: np.random.Generator, bias: bool = True,
                 std: float = 0.02):
        """The map with random values from rng. TypeError or ValueError for sizes that are no whole numbers >= 0."""
        checks.whole("Linear: in_features", in_features, least=0)
        checks.whole("Linear: out_features", out_features, least=0)
        checks.random_generator("Linear: rng", rng)
        self.weight: Any = Parameter(array.normal(rng, (out_features, in_features), std))
        self.bias = Parameter(_zeros(out_features)) if bias else None

    in_features = property(lambda self: self.weight.shape[1])
    out_features = property(lambda self: self.weight.shape[0])

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        bias = None if self.bias is None else self.read("bias")
        return _linear(x, self.read("weight"), bias)


class Embedding(Module):
    """y = W[ids].    W (V, C) ~ N(0, std²),  ids (...) -> (..., C).  A Tensor in place of ids passes through."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, rng: np.random.Generator, std: float = 0.02):
        """The table with random values from rng. TypeError or ValueError for sizes that are no whole numbers >= 0."""
        checks.whole("Embedding: num_embeddings", num_embeddings, least=0)
        checks.whole("Embedding: embedding_dim", embedding_dim, least=0)
        checks.random_generator("Embedding: rng", rng)
        self.weight: Any = Parameter(array.normal(rng, (num_embeddings, embedding_dim), std))

    in_features = property(lambda self: self.weight.shape[0])
    out_features = property(lambda self: self.weight.shape[1])

    def forward(self, ids: Any, ctx: Context) -> Tensor:
        if isinstance(ids, Tensor):
            return ids
        weight = self.read("weight")
        return ops.embedding(weight, ids) if isinstance(weight, Tensor) else weight.rows(ids)


class TiedHead(Module):
    """logits = x Eᵀ (+ b).    E is the embedding's weight, read through the embedding's edits.  (..., C) -> (..., V)"""

    def __init__(self, embed: Embedding, *, bias: bool = False):
        embed.tied = True
        self._embed = embed
        self.bias = Parameter(_zeros(embed.in_features)) if bias else None

    in_features = property(lambda self: self._embed.out_features)
    out_features = property(lambda self: self._embed.in_features)

    def extra_repr(self) -> str:
        return f"the weight {tuple(self._embed.weight.shape)} of the token embedding"

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        bias = None if self.bias is None else self.read("bias")
        return _linear(x, self._embed.read("weight"), bias)


class LayerNorm(Module):
    """y = w (x − μ)/σ + b over the last axis.    w = 1, b = 0, both (C,);  σ² = variance + ε"""

    def __init__(self, width: int, *, eps: float = 1e-5):
        """The norm of rows of this width. TypeError or ValueError for a width that is no whole number >= 1."""
        checks.whole("LayerNorm: width", width, least=1)
        self.eps = checks.number("LayerNorm: eps", eps, low=0)
        self.weight = Parameter(_ones(width), decay=False)
        self.bias = Parameter(_zeros(width), decay=False)

    in_features = out_features = property(lambda self: self.weight.shape[0])

    def extra_repr(self) -> str:
        return f"eps={self.eps}"

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return ops.layer_norm(x, self.read("weight"), self.read("bias"), eps=self.eps)


class RMSNorm(Module):
    """y = w x / σ over the last axis.    w = 1, (C,);  σ² = mean x² + ε.      Zhang & Sennrich 2019 (T5, Llama)"""

    def __init__(self, width: int, *, eps: float = 1e-6):
        """The norm of rows of this width. TypeError or ValueError for a width that is no whole number >= 1."""
        checks.whole("RMSNorm: width", width, least=1)
        self.eps = checks.number("RMSNorm: eps", eps, low=0)
        self.weight = Parameter(_ones(width), decay=False)

    in_features = out_features = property(lambda self: self.weight.shape[0])

    def extra_repr(self) -> str:
        return f"eps={self.eps}"

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return ops.rms_norm(x, self.read("weight"), eps=self.eps)


class Dropout(Module):
    """Zero each entry with probability p and scale the others by 1/(1 − p).

    Acts only in training mode and in a pass that has a generator. ValueError unless 0 <= p < 1."""

    def __init__(self, p: float):
        self.p = checks.number("dropout", p)
        if not 0 <= p < 1:
            raise ValueError(f"dropout wants 0 <= p < 1, got {p}")

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def key(self, ctx: Context) -> Any:
        """The random key of this call, or None if dropout is inactive.

        An int; while a step is captured as a CUDA graph, an array of one integer on the device."""
        active = self.training and self.p and ctx.rng is not None
        return ctx.rng.integers(2**63) if active else None

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        key = self.key(ctx)
        return x if key is None else ops.dropout(x, self.p, key)

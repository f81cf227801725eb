"""Tensor, @op and backward: the autograd engine.

    A Tensor is an array and the record of how it was made.  An op computes its value and its pullbacks: for each input
    a function that takes the gradient of the output to the gradient of that input.  `backward` walks the records from
    the loss to the leaves, in reverse topological order, and adds up the gradients.

Three rules make fine-tuning cheap.  A pullback that no trainable leaf needs is dropped when the op runs, together with
the arrays it holds; so nothing is computed for frozen tensors, and the walk never enters a part where nothing trains.
Records are released as the walk passes them.  Only leaves keep a gradient.
"""
from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import array, dispatch, precision
from .array import Array, xp
from .precision import autocast_state, has_16_bit


class ShapeError(ValueError):
    """Arrays whose shapes do not fit an op.  The message holds the op's shape string and the sizes that clash."""


# ── tensors ──────────────────────────────────────────────────────────────────────────────────────────────────────────
class Tensor:
    """An array with a gradient, `.grad`: of its dtype, or float32 if the array has 16 bits.

    data: an array (kept as it is, on its backend), or numbers and lists (float32 on the backend in use).
    mask: None, or booleans; where False, an optimiser changes neither the value nor its moments.
    decay: True or False, if weight decay applies; None for the rule of the optimisers (matrices yes, vectors no).
    """
    __slots__ = ("data", "requires_grad", "grad", "record", "mask", "decay", "version", "__weakref__")

    def __init__(self, data: Any, requires_grad: bool = False, decay: bool | None = None):
        self.data: Array = data if array.is_array(data) else array.asarray(data)
        self.requires_grad = False
        self.grad = None                                       # an Array, after backward
        self.record = None                                     # of the op that made this tensor; None for a leaf
        self.mask = None
        self.decay = decay
        self.version = [0]                                     # writes so far; a list, so that a Record can share it
        if requires_grad:
            self.train(True)

    shape = property(lambda self: self.data.shape)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)
    dtype = property(lambda self: self.data.dtype)
    device = property(lambda self: array.name_of(self.data), doc="the backend: 'numpy', 'cupy' or 'strict'")
    is_leaf = property(lambda self: self.record is None, doc="True if no op made this tensor")

    @property
    def grad_dtype(self) -> np.dtype:
        """The dtype in which gradients accumulate."""
        return np.promote_types(self.dtype, np.float32)

    @property
    def node(self) -> Record | Part | Tensor:
        """The tensor's node in the graph: its record, or itself if it is a leaf."""
        return self if self.record is None else self.record

    def __repr__(self) -> str:
        trains = ", requires_grad=True" if self.requires_grad else ""
        return f"Tensor({array.asnumpy(self.data)!r}{trains})"

    def __len__(self) -> int:
        return len(self.data)

    def numpy(self) -> np.ndarray:
        """The values as a NumPy array."""
        return array.asnumpy(self.data)

    def item(self) -> float:
        """The value of a tensor of one element, as a Python number."""
        return self.data.item()

    def detach(self) -> Tensor:
        """The same array without its history."""
        return Tensor(self.data)

    def to(self, backend: str) -> Tensor:
        """A leaf with the same values on another backend."""
        return Tensor(array.to(self.data, backend), self.requires_grad, self.decay)

    def train(self, on: bool) -> None:
        """Set requires_grad.  TypeError if the dtype is not a floating-point one."""
        if on and np.dtype(self.dtype).kind not in "fV":       # bfloat16 is of kind V
            raise TypeError(f"only floating-point tensors train; this one is {self.dtype}")
        self.requires_grad = on

    def copy_(self, values: Any) -> Tensor:
        """Write into this leaf's own memory.  A backward pass that still needs the old values refuses to run."""
        if not self.is_leaf:
            raise RuntimeError("only a leaf can be written in place; this tensor was computed: make a new one instead")
        self.data[...] = array.put_like(values.data if isinstance(values, Tensor) else values, self.data, self.dtype)
        self.mark_written()
        return self

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError("tensors are not written in place: use where(mask, a, b), or copy_ on a leaf")

    def mark_written(self) -> None:
        """Record that the memory of this leaf was written to."""
        self.version[0] += 1
        precision.writes += 1

    def backward(self, gradient: Any = None, retain_graph: bool = False) -> None:
        """Add d(loss)/d(leaf) to the `.grad` of every trainable leaf.

        gradient: d(loss)/d(self), of this tensor's shape; 1 by default, if this tensor is the loss.  The walk releases
        the graph as it goes; retain_graph=True keeps it for a second walk."""
        gradients = Gradients()
        gradients.add(self.node, _seed(self, gradient))
        order = topological(self)
        while order:                                           # popping frees a node once the walk has passed it
            node = order.pop()
            g, owned = gradients.pop(node)
            if g is None:                                      # no pullback led here
                continue
            if isinstance(node, Tensor):
                node.accumulate(g, owned)
            elif isinstance(node, Part):
                gradients.add_part(node, g)
            else:
                for parent, d in node.pull(g):
                    fitted = _fit(d, parent)
                    if _state.anomaly:
                        _check_gradient(node, fitted)
                    owned = fitted is not d or _is_own(d, g)   # allocated by _fit, or by the pullback
                    gradients.add(parent, fitted, owned)
                if not retain_graph:
                    node.release()

    def accumulate(self, g: Array, owned: bool) -> None:
        """Add g to the `.grad` of this leaf.

        owned: no other code holds the array g, so g itself may become `.grad`; else a copy does."""
        if not self.requires_grad:                             # frozen after its use
            return
        if self.grad is not None:
            g = self.grad + g
        elif not owned:
            g = g.copy()
        self.grad = xp(self.data).asarray(g)                   # a NumPy result without axes is a scalar


# ── the backward pass ────────────────────────────────────────────────────────────────────────────────────────────────
class Gradients:
    """The gradients of one backward pass, by node.

    A gradient that a pullback returns is borrowed: it may be the pullback's own argument, a view, or a broadcast array
    that shows one number many times.  Only an owned array, which nobody else sees, is added to in place."""

    def __init__(self) -> None:
        self.arrays: dict[int, Any] = {}                       # id(node) -> gradient so far
        self.owned: set[int] = set()                           # ids of the nodes whose gradient is an owned array

    def add(self, node: Record | Part | Tensor, g: Array, owned: bool = False) -> None:
        """Add g to the gradient of a node.

        owned: nobody else sees the array g, so that a later call may add to it in place."""
        key = id(node)
        if key not in self.arrays:
            self.arrays[key] = g
            if owned:
                self.owned.add(key)
        elif key in self.owned:
            self.arrays[key] += g
        else:
            self.arrays[key] = self.arrays[key] + g
            self.owned.add(key)

    def add_part(self, part: Part, g: Array) -> None:
        """Store the gradient g of one value of an op that returns several values.

        The gradient of the op's Record is a list with one entry for each value, None where no gradient came."""
        by_value = self.arrays.setdefault(id(part.whole), [None] * part.count)
        by_value[part.i] = g

    def pop(self, node: Record | Part | Tensor) -> tuple[Any, bool]:
        """The complete gradient of a node, None if no gradient reached it; and True if that array is owned."""
        key = id(node)
        g = self.arrays.pop(key, None)
        owned = key in self.owned
        self.owned.discard(key)
        return g, owned


def _seed(root: Tensor, gradient: Any) -> Array:
    """The gradient with which backward from `root` starts: the caller's `gradient`, or 1 for a tensor of one element.

    RuntimeError if nothing trains, or if a larger tensor has no `gradient`; ShapeError for another shape."""
    if not root.requires_grad:
        raise RuntimeError("nothing to do: this tensor depends on no tensor that trains")
    if gradient is None:
        if root.size != 1:
            raise RuntimeError(f"backward from a tensor of shape {root.shape} wants a gradient of that shape")
        return xp(root.data).ones_like(root.data)
    g = array.put_like(gradient.data if isinstance(gradient, Tensor) else gradient, root.data, root.dtype)
    if g.shape != root.shape:
        raise ShapeError(f"backward wants a gradient of shape {root.shape}, got {g.shape}")
    return g


def _fit(d: Array, parent: Record | Part | Tensor) -> Array:
    """The gradient d in the parent's shape and dtype: summed over the axes of broadcasting, then rounded.

    A leaf of 16 bits gets its gradient in float32."""
    if d.shape == parent.shape and d.dtype == parent.dtype and d.itemsize != 2:
        return d
    return precision.rounded(sum_to(d, parent.shape), parent.grad_dtype)


def _is_own(d: Array, given: Any) -> bool:
    """True if a pullback allocated d, or the array of which d is a view, so that it may be added to in place.

    given: the argument of the pullback, an array or a list of arrays; d must share no memory with it."""
    if d is given:
        return False
    arrays = given if isinstance(given, list) else (given,)
    if getattr(d, "base", None) is None:
        return not any(d is a for a in arrays)
    if not d.flags.c_contiguous or not getattr(d.flags, "writeable", True):       # broadcast: one number many times
        return False
    return not any(a is not None and xp(d).may_share_memory(d, a) for a in arrays)


def topological(root: Tensor) -> list[Record | Part | Tensor]:
    """The nodes that need a gradient: the root's and all that it depends on, inputs before outputs.

    The search uses a list as its stack, not recursion, so a deep graph does not exceed Python's recursion limit."""
    order, seen, stack = [], set(), [(root.node, False)]       # stack: (node, True once its parents are in `order`)
    while stack:
        node, parents_done = stack.pop()
        if parents_done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            if not isinstance(node, Tensor):
                stack.extend((p, False) for p in node.parents())
    return order


def sum_to(g: Array, shape: tuple) -> Array:
    """The adjoint of broadcasting: g summed over the axes along which an input of this shape was repeated.

    16-bit gradients are summed in float32."""
    if g.shape == shape:
        return g
    new = g.ndim - len(shape)
    repeated = (new + i for i, n in enumerate(shape) if n == 1 != g.shape[new + i])
    return precision.to_float32(g).sum(axis=(*range(new), *repeated)).reshape(shape)


# ── the graph ────────────────────────────────────────────────────────────────────────────────────────────────────────
class Record:
    """The record of one call of an op.

    A node of the graph is the Record of a computed tensor, or a leaf.  A Record does not hold the value, so the graph
    keeps only the arrays that pullbacks need.

    shape, dtype: of the value.
    pulls: pairs (parent nodes, function from g to one gradient for each of these parents); None once released.
    leaves: a pair (version list, version at the call) for each input that is a leaf."""
    __slots__ = ("name", "shape", "dtype", "pulls", "leaves")
    grad_dtype = property(lambda self: self.dtype)

    def __init__(self, name: str, value: Array, pulls: list, leaves: list):
        self.name = name
        self.shape = value.shape
        self.dtype = value.dtype
        self.pulls = pulls
        self.leaves = leaves

    def parents(self) -> Iterator[Record | Part | Tensor]:
        """The nodes to which the pullbacks lead.  RuntimeError if the record was released."""
        if self.pulls is None:
            raise RuntimeError(f"this graph was walked before and released at {self.name!r}: "
                               "backward(retain_graph=True) keeps it")
        for parents, _ in self.pulls:
            yield from parents

    def pull(self, g: Array) -> Iterator[tuple[Record | Part | Tensor, Array]]:
        """Pairs (parent, gradient), from the gradient g of the value.

        RuntimeError if an input that is a leaf was written in place since the call: pullbacks hold its array, which has
        other values now."""
        for version, then in self.leaves:
            if version[0] != then:
                raise RuntimeError(f"an input of {self.name!r} was written in place after the op used it: "
                                   "its gradient would be wrong")
        for parents, back in self.pulls:
            for parent, d in zip(parents, back(g)):
                if d is not None:
                    yield parent, d

    def release(self) -> None:
        """Drop the pullbacks and the arrays they hold."""
        self.pulls = None


class Part:
    """The node of value number i, where one call of an op returns `count` values; `whole` is the Record of the call."""
    __slots__ = ("whole", "i", "count", "shape", "dtype")
    grad_dtype = property(lambda self: self.dtype)

    def __init__(self, whole: Record, i: int, count: int, value: Array):
        self.whole = whole
        self.i = i
        self.count = count
        self.shape = value.shape
        self.dtype = value.dtype

    def parents(self) -> Iterator[Record]:
        """The record of the call."""
        yield self.whole


# ── ops ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
OPS: dict[str, Callable] = {}                                  # every op by name; the tests walk this table


def op(shapes: str) -> Callable[[Callable], Callable[..., Tensor]]:
    """Make an op of a function on plain arrays that returns (value, pullbacks).

    pullbacks: a tuple with one function g -> gradient per input (None where there is no gradient); or, where inputs
    share costly work, one function (g, needed) -> a gradient per input, needed[i] being True if input i needs one.
    A pullback returns g itself, a view of g, or a new array; the engine undoes broadcasting.
    Keyword arguments get no gradient.
    An op whose value is a tuple returns a tuple of tensors; then g is a list of their gradients, None where none came.
    shapes: such as "... n k, ... k m -> ... n m"; for readers, error messages and tests.

    The function is the op's `definition`; dispatch.py finds faster kernels, precision.py has the 16-bit rules.
    """
    def wrap(definition: Callable) -> Callable[..., Tensor]:
        """The op on Tensors for a definition on plain arrays; also entered in OPS."""
        name = definition.__name__

        @functools.wraps(definition)
        def call(*args: Any, **kwargs: Any) -> Tensor:
            # Run the definition, or a kernel, on the arrays of the arguments, and record the call for backward.
            arrays = [a.data if isinstance(a, Tensor) else a for a in args]
            try:
                xp(*arrays, *kwargs.values())                  # refuses arrays of two backends
                if autocast_state.dtype is None and not has_16_bit(arrays):
                    value, pullbacks = dispatch.run(call, type(arrays[0]), *arrays, **kwargs)
                else:
                    leaves = [isinstance(a, Tensor) and a.record is None for a in args]
                    value, pullbacks = precision.run(call, arrays, kwargs, leaves)
            except (ValueError, TypeError, IndexError, array.BackendError) as e:
                raise _explained(e, name, shapes, arrays) from e
            if _state.anomaly:
                _check_value(name, value, arrays)
            return _recorded(name, args, value, pullbacks)
        call.shapes = shapes
        call.definition = definition
        OPS[name] = call
        return call
    return wrap


def _recorded(name: str, args: tuple, value: Any, pullbacks: Any) -> Tensor | tuple[Tensor, ...]:
    """The value of an op's call as a tensor, or a tuple of them, with a Record if an input needs a gradient.

    Keeps only the pullbacks of inputs that need a gradient: the others are freed, with the arrays they hold."""
    several = isinstance(value, tuple)
    result = tuple(map(_as_tensor, value)) if several else _as_tensor(value)
    needed = [isinstance(a, Tensor) and a.requires_grad for a in args]
    if not (_state.recording and any(needed)):
        return result
    if callable(pullbacks):
        parents = [a.node for a, n in zip(args, needed) if n]
        pulls = [(parents, _joint(pullbacks, needed))]
    else:
        pulls = [((a.node,), _single(back)) for a, back, n in zip(args, pullbacks, needed) if n and back is not None]
    if not pulls:
        return result
    leaves = [(a.version, a.version[0]) for a in args if isinstance(a, Tensor) and a.record is None]
    if several:
        record = Record(name, result[0].data, pulls, leaves)
        for i, y in enumerate(result):
            y.requires_grad = True
            y.record = Part(record, i, len(result), y.data)
    else:
        result.requires_grad = True
        result.record = Record(name, result.data, pulls, leaves)
    return result


def _as_tensor(value: Any) -> Tensor:
    return Tensor(value if array.is_array(value) else np.asarray(value))          # a NumPy scalar is no array


def _single(back: Callable) -> Callable:
    """The pullback of one input in the form of Record.pulls: from g to a tuple of gradients."""
    return lambda g: (back(g),)


def _joint(back: Callable, needed: list[bool]) -> Callable:
    """The joint pullback (g, needed) in the form of Record.pulls: from g to the gradients that are needed."""
    return lambda g: [d for d, n in zip(back(g, needed), needed) if n]


# ── switches ─────────────────────────────────────────────────────────────────────────────────────────────────────────
class _State(threading.local):
    recording = True
    anomaly = False


_state = _State()


@contextlib.contextmanager
def _set(**flags: bool) -> Iterator[None]:
    before = {k: getattr(_state, k) for k in flags}
    vars(_state).update(flags)
    try:
        yield
    finally:
        vars(_state).update(before)


def no_grad() -> contextlib.AbstractContextManager:
    """with no_grad(): ops keep no records, in this thread."""
    return _set(recording=False)


def detect_anomaly() -> contextlib.AbstractContextManager:
    """with detect_anomaly(): the first op whose value or gradient is not finite raises, with its name and shapes."""
    return _set(anomaly=True)


def _is_finite(a: Array) -> bool:
    return bool(xp(a).isfinite(precision.to_float32(a)).all())


def _check_value(name: str, value: Any, arrays: list) -> None:
    """FloatingPointError if a value of an op is not finite."""
    values = value if isinstance(value, tuple) else (value,)
    if not all(_is_finite(v) for v in values):
        raise FloatingPointError(f"{name} gave a value that is not finite; inputs {_sizes(arrays)}")


def _check_gradient(record: Record, g: Array) -> None:
    """FloatingPointError if a gradient that an op's pullback returned is not finite."""
    if not _is_finite(g):
        raise FloatingPointError(f"{record.name} gave back a gradient that is not finite; shape {g.shape}")


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def _sizes(arrays: list) -> str:
    return ", ".join(str(tuple(a.shape)) if array.is_array(a) else repr(a)[:30] for a in arrays)


def _explained(e: Exception, name: str, shapes: str, arrays: list) -> Exception:
    """The library's error for an error e that the op `name` raised: a ShapeError for a ValueError.

    The message holds the shape string of the op, the shapes it got, and the letters that got two sizes."""
    if isinstance(e, array.BackendError):
        return array.BackendError(f"{name}: {e}")
    if not isinstance(e, ValueError):
        # A plain TypeError in place of NumPy's own subclasses, which cannot be made from a message alone.
        kind = TypeError if isinstance(e, TypeError) else type(e)
        return kind(f"{name}({_sizes(arrays)}): {e}")
    sizes: dict[str, set] = {}                                 # letter of the shape string -> its sizes
    for spec, a in zip(shapes.split("->")[0].split(","), arrays):
        letters = re.findall(r"\b[a-z]\b", spec)
        if array.is_array(a):
            for letter, n in zip(letters, a.shape[len(a.shape) - len(letters):]):
                sizes.setdefault(letter, set()).add(n)
    clashes = [f"{letter} is {' and '.join(map(str, sorted(ns)))}" for letter, ns in sizes.items() if len(ns) > 1]
    reason = f"; {'; '.join(clashes)}" if clashes else f": {e}"
    return ShapeError(f"{name} wants {shapes!r}; got {_sizes(arrays)}{reason}")

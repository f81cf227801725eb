"""Tensor, @op and backward: the whole autograd engine.

    A Tensor is an array and the record of how it was made.  An op computes its value and, beside it, its PULLBACKS: for each
    input a function that takes the gradient of the output back to that input.  `backward` walks the records from the loss
    to the leaves, in reverse topological order, and adds up what comes back.

Three rules make fine-tuning cheap.  A pullback that no trainable leaf needs is dropped when the op runs, together with the
arrays it holds; so nothing is computed for what is frozen, and the walk never enters a part where nothing trains.  Records
are released as the walk passes them.  Only leaves keep a gradient.
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


class ShapeError(ValueError):
    "Arrays whose shapes do not fit an op; the message holds the op's shape string and the sizes that clash."


class Tensor:
    """An array with a gradient, `.grad`: of its dtype, or float32 if that has 16 bits.

    Tensor(data, requires_grad=False): `data` is an array (kept as it is, on its backend), or numbers and lists (float32 on
    the backend in use).  `mask`: where False, an optimiser moves neither the value nor its moments.  `decay`: whether
    weight decay applies; None means the rule of optim.py (matrices yes, vectors no).
    """
    __slots__ = ("data", "requires_grad", "grad", "record", "mask", "decay", "version", "__weakref__")

    def __init__(self, data: Any, requires_grad: bool = False, decay: bool | None = None):
        self.data: Array = data if array.is_array(data) else array.asarray(data)
        self.requires_grad, self.grad, self.record = False, None, None
        self.mask, self.decay, self.version = None, decay, [0]
        if requires_grad:
            self.train(True)

    shape = property(lambda self: self.data.shape)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)
    dtype = property(lambda self: self.data.dtype)
    device = property(lambda self: array.name_of(self.data), doc="the backend: 'numpy', 'cupy' or 'strict'")
    is_leaf = property(lambda self: self.record is None)
    of_gradient = property(lambda self: np.promote_types(self.dtype, np.float32), doc="the dtype of .grad, to which more will be added")
    node = property(lambda self: self if self.record is None else self.record, doc="its place in the graph")

    def __repr__(self) -> str:
        return f"Tensor({array.asnumpy(self.data)!r}{', requires_grad=True' if self.requires_grad else ''})"

    def __len__(self) -> int:
        return len(self.data)

    def numpy(self) -> np.ndarray:
        return array.asnumpy(self.data)

    def item(self) -> float:
        return self.data.item()

    def detach(self) -> Tensor:
        "The same array without its history."
        return Tensor(self.data)

    def to(self, backend: str) -> Tensor:
        "A leaf with the same numbers on another backend."
        return Tensor(array.to(self.data, backend), self.requires_grad, self.decay)

    def train(self, on: bool) -> None:
        "Let this leaf collect gradients, or not."
        if on and np.dtype(self.dtype).kind not in "fV":                         # V: bfloat16
            raise TypeError(f"only floating-point tensors train; this one is {self.dtype}")
        self.requires_grad = on

    def copy_(self, values: Any) -> Tensor:
        "Write into this leaf's own memory.  A backward that still needs the old values will refuse to run."
        if not self.is_leaf:
            raise RuntimeError("only a leaf can be written in place; this tensor was computed: make a new one instead")
        self.data[...] = array.put_like(values.data if isinstance(values, Tensor) else values, self.data, self.dtype)
        self.touch()
        return self

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError("tensors are not written in place: use where(mask, a, b), or copy_ on a leaf")

    def touch(self) -> None:
        "Note that the memory of this leaf was written to."
        self.version[0] += 1
        precision.writes += 1

    def backward(self, gradient: Any = None, retain_graph: bool = False) -> None:
        """Add d(self)/d(leaf) to every trainable leaf's `.grad`.

        `gradient` has this tensor's shape; a tensor of one element needs none.  A second walk over the same graph needs
        retain_graph=True in the first."""
        if not self.requires_grad:
            raise RuntimeError("nothing to do: this tensor depends on no tensor that trains")
        if gradient is None and self.size != 1:
            raise RuntimeError(f"backward from a tensor of shape {self.shape} wants a gradient of that shape")
        m = xp(self.data)
        g = m.ones_like(self.data) if gradient is None else array.put_like(
            gradient.data if isinstance(gradient, Tensor) else gradient, self.data, self.dtype)
        if g.shape != self.shape:
            raise ShapeError(f"backward wants a gradient of shape {self.shape}, got {g.shape}")
        grads, ours, order = {id(self.node): g}, set(), topological(self)        # ours: arrays nobody else can see
        while order:                                                             # popping lets go of what was passed
            node = order.pop()
            key = id(node)
            g = grads.pop(key, None)
            if g is None:                                                        # no pullback led here
                continue
            if isinstance(node, Tensor):
                if node.requires_grad:                                           # frozen after its use: nothing to keep
                    new = node.grad + g if node.grad is not None else g if key in ours else g.copy()
                    node.grad = m.asarray(new)                                   # NumPy's 0-d results are scalars
                continue
            if isinstance(node, Part):                                           # the whole gets a list, one gradient for each of its values
                grads.setdefault(id(node.whole), [None] * node.of)[node.i] = g
                continue
            given = g if isinstance(g, list) else [g]
            for p, gp in node.pull(g):
                fitting, k = gp, id(p)
                if gp.shape != p.shape or gp.dtype != p.dtype or gp.itemsize == 2:
                    fitting = precision.rounded(sum_to(gp, p.shape), p.of_gradient)
                shared, gp = fitting is gp and not _ours(gp, given), fitting     # a sum is ours, and what was rounded
                if _state.anomaly and not _finite(gp):
                    raise FloatingPointError(f"{node.name} gave back a gradient that is not finite; shape {gp.shape}")
                if k not in grads:
                    grads[k] = gp
                    ours.discard(k) if shared else ours.add(k)
                elif k in ours:
                    grads[k] += gp
                else:
                    grads[k] = grads[k] + gp
                    ours.add(k)
            if not retain_graph:
                node.release()


def _ours(gp: Array, given: list) -> bool:
    "Whether a pullback made this array, or what it is a view of: then nobody else sees it.  Otherwise it is a view of what the pullback was given."
    if any(gp is g for g in given):
        return False
    if getattr(gp, "base", None) is None:
        return True
    return gp.flags.c_contiguous and not any(g is not None and xp(gp).may_share_memory(gp, g) for g in given)      # no number shown twice


class Record:
    """How a tensor was made: the op's name, the value's shape and dtype, the pullbacks with the nodes they lead to, the version of every leaf read.

    A node is the Record of a computed tensor, or a leaf.  So the graph holds what pullbacks hold, and no value for its own sake."""
    __slots__ = ("name", "shape", "dtype", "pulls", "leaves")
    of_gradient = property(lambda self: self.dtype)

    def __init__(self, name: str, value: Array, pulls: list, leaves: list):
        self.name, self.shape, self.dtype, self.pulls, self.leaves = name, value.shape, value.dtype, pulls, leaves

    def parents(self) -> Iterator[Record | Tensor]:
        if self.pulls is None:
            raise RuntimeError(f"this graph was walked before and released at {self.name!r}: backward(retain_graph=True) keeps it")
        for parents, _ in self.pulls:
            yield from parents

    def pull(self, g: Array) -> Iterator[tuple[Record | Tensor, Array]]:
        for version, then in self.leaves:
            if version[0] != then:
                raise RuntimeError(f"an input of {self.name!r} was written in place after the op used it: its gradient would be wrong")
        for parents, back in self.pulls:
            for p, gp in zip(parents, back(g)):
                if gp is not None:
                    yield p, gp

    def release(self) -> None:
        self.pulls = None


class Part:
    "Value number i of the `of` values that an op gave at once; `whole` is their Record."
    __slots__ = ("whole", "i", "of", "shape", "dtype")
    of_gradient = property(lambda self: self.dtype)

    def __init__(self, whole: Record, i: int, of: int, value: Array):
        self.whole, self.i, self.of, self.shape, self.dtype = whole, i, of, value.shape, value.dtype

    def parents(self) -> Iterator[Record]:
        yield self.whole


def topological(root: Tensor) -> list[Record | Part | Tensor]:
    "Every node the root was made from that needs a gradient, inputs before outputs.  A stack, so deep graphs do not recurse."
    order, seen, stack = [], set(), [(root.node, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            if not isinstance(node, Tensor):
                stack.extend((p, False) for p in node.parents())
    return order


def sum_to(g: Array, shape: tuple) -> Array:
    "The adjoint of broadcasting: sum g over the axes along which an input of this shape was repeated.  16-bit numbers are summed in float32."
    if g.shape == shape:
        return g
    new = g.ndim - len(shape)
    return precision.widen(g).sum(axis=(*range(new), *(new + i for i, n in enumerate(shape) if n == 1 != g.shape[new + i]))).reshape(shape)


def _finite(a: Array) -> bool:
    return bool(xp(a).isfinite(precision.widen(a)).all())


class _State(threading.local):
    recording, anomaly = True, False


_state = _State()
OPS: dict[str, Callable] = {}                                                    # every op by name: the tests walk this table


@contextlib.contextmanager
def _set(**flags: bool) -> Iterator[None]:
    old = {k: getattr(_state, k) for k in flags}
    vars(_state).update(flags)
    try:
        yield
    finally:
        vars(_state).update(old)


def no_grad() -> contextlib.AbstractContextManager:
    "with no_grad(): ops keep no records, in this thread."
    return _set(recording=False)


def detect_anomaly() -> contextlib.AbstractContextManager:
    "with detect_anomaly(): the first op whose value or gradient is not finite raises, with its name and shapes."
    return _set(anomaly=True)


def op(shapes: str) -> Callable[[Callable], Callable[..., Tensor]]:
    """Make an op of a function on plain arrays that returns (value, pullbacks).

    `pullbacks` is a tuple with one function g -> gradient per input (None where there is no gradient), or, where inputs
    share costly work, one function (g, needed) -> a gradient for each input, `needed` telling which of them count.  A
    pullback gives back g itself, a view of it, or what it made; the engine undoes broadcasting.  Arguments by keyword get no gradient.
    A value that is a tuple makes as many tensors; g is then a list, one gradient for each, None where none came.
    16-bit numbers are dealt with as precision.py says.  `shapes`, such as "... n k, ... k m -> ... n m", is for readers, for error
    messages and for the tests.
    """
    def wrap(f: Callable) -> Callable[..., Tensor]:
        name = f.__name__

        @functools.wraps(f)
        def call(*args: Any, **kw: Any) -> Tensor:
            arrays = [a.data if isinstance(a, Tensor) else a for a in args]
            try:
                xp(*arrays, *kw.values())                                        # of two places: refused, where CuPy would copy an index in silence
                given, more = arrays, kw
                if precision.here.to is not None:
                    of_weights = precision.weight if name in precision.PRODUCTS else lambda a: a
                    given, more = precision.given(name, [of_weights(x) if isinstance(a, Tensor) and a.record is None else x
                                                         for a, x in zip(args, arrays)], kw)
                if precision.narrow(given):
                    value, pulls = precision.run(call, name, given, more)
                else:
                    value, pulls = dispatch.run(call, type(given[0]), *given, **more)
            except (ValueError, TypeError, IndexError, array.BackendError) as e:
                raise _explained(e, name, shapes, arrays) from e
            ys = [Tensor(v if array.is_array(v) else np.asarray(v)) for v in (value if isinstance(value, tuple) else (value,))]
            if _state.anomaly and not all(_finite(y.data) for y in ys):
                raise FloatingPointError(f"{name} gave a value that is not finite; inputs {_sizes(arrays)}")
            needed = [isinstance(a, Tensor) and a.requires_grad for a in args]
            if _state.recording and any(needed):
                if callable(pulls):
                    edges = [([a.node for a, n in zip(args, needed) if n], _joint(pulls, needed))]
                else:
                    edges = [((a.node,), _single(b)) for a, b, n in zip(args, pulls, needed) if n and b is not None]
                leaves = [(a.version, a.version[0]) for a in args if isinstance(a, Tensor) and a.record is None]
                whole = Record(name, ys[0].data, edges, leaves)
                for i, y in enumerate(ys if edges else ()):
                    y.requires_grad, y.record = True, whole if len(ys) == 1 else Part(whole, i, len(ys), y.data)
            return tuple(ys) if isinstance(value, tuple) else ys[0]
        call.shapes, call.definition = shapes, f
        OPS[name] = call
        return call
    return wrap


def _single(back: Callable) -> Callable:
    return lambda g: (back(g),)


def _joint(back: Callable, needed: list[bool]) -> Callable:
    return lambda g: [gp for gp, n in zip(back(g, needed), needed) if n]


def _sizes(arrays: list) -> str:
    return ", ".join(str(tuple(a.shape)) if array.is_array(a) else repr(a)[:30] for a in arrays)


def _explained(e: Exception, name: str, shapes: str, arrays: list) -> Exception:
    "The library's error for an array module's error: which op, what it wants, what it got."
    if isinstance(e, array.BackendError):
        return array.BackendError(f"{name}: {e}")
    if not isinstance(e, ValueError):
        return (TypeError if isinstance(e, TypeError) else type(e))(f"{name}({_sizes(arrays)}): {e}")     # NumPy's own want more arguments
    seen: dict[str, set] = {}
    for spec, a in zip(shapes.split("->")[0].split(","), arrays):
        dims = re.findall(r"\b[a-z]\b", spec)
        if array.is_array(a):
            for d, n in zip(dims, a.shape[len(a.shape) - len(dims):]):
                seen.setdefault(d, set()).add(n)
    clash = "; ".join(f"{d} is {' and '.join(map(str, sorted(ns)))}" for d, ns in seen.items() if len(ns) > 1)
    return ShapeError(f"{name} wants {shapes!r}; got {_sizes(arrays)}{'; ' + clash if clash else f': {e}'}")

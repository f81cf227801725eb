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
import copy
import functools
import inspect
import itertools
import operator
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from . import array, dispatch, precision
from .array import Array, xp
from .checks import brief, flag
from .keywords import checked_keywords
from .precision import autocast_state, has_16_bit


class ShapeError(ValueError):
    """Arrays whose shapes do not fit an op.  The message holds the op's shape string and the sizes that clash."""


# ── tensors ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@checked_keywords
class Tensor:
    """An array with a gradient, `.grad`: of its dtype, or float32 if the array has 16 bits.

    data: an array (kept as it is, on its backend), or numbers and lists (float32 on the backend in use).
    requires_grad: True for a leaf that trains.
    decay: True or False, if weight decay applies; None for the rule of the optimisers (matrices yes, vectors no).
    The attribute `mask`: None, or booleans; where False, an optimiser changes neither the value nor its moments.

    x == y is identity, as for any Python object, and tensors are keys of dicts: compare values with x.data == y.data.
    x += y is x = x + y: it gives the name x to a new tensor.

    TypeError for data without numbers, and for an integer tensor that should train; ValueError for lists of unequal
    lengths."""
    __slots__ = ("data", "requires_grad", "grad", "record", "mask", "decay", "version", "__weakref__")
    made = 0                                                   # as a node: a leaf stands before all records

    def __init__(self, data: Any, requires_grad: bool = False, decay: bool | None = None):
        self.data: Array = data if array.is_array(data) else _from_numbers(data)
        if self.data.dtype.kind not in "fiub":
            _check_real("Tensor", self.data)
        self.requires_grad = False
        self.grad = None                                       # an Array, after backward
        self.record = None                                     # of the op that made this tensor; None for a leaf
        self.mask = None
        self.decay = decay if decay is None else flag("decay", decay)
        self.version = [0]                                     # number of the last write; shared by views of one memory
        if requires_grad is not False:
            self.train(requires_grad)

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
        if not self.shape:
            raise TypeError("len wants a tensor with axes, got one of shape ()")
        return len(self.data)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __contains__(self, value: Any) -> bool:
        raise TypeError("`in` does not search a tensor: use (x.data == value).any()")

    def __bool__(self) -> bool:
        return bool(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        if self.dtype.kind not in "iu" or self.size != 1:
            raise TypeError(f"an index wants a tensor of one integer, got {self.dtype} of shape {self.shape}")
        return self.item()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec else str(self)

    def __deepcopy__(self, memo: dict) -> Tensor:
        """A leaf with copies of the values, of `.grad` and of `mask`.  RuntimeError for a computed tensor."""
        if not self.is_leaf:
            raise RuntimeError("only a leaf is copied; this tensor was computed, and its copy would train copies of "
                               "its inputs: give .detach()")
        new = type(self).__new__(type(self))
        for name in ("data", "requires_grad", "grad", "record", "mask", "decay", "version"):
            setattr(new, name, copy.deepcopy(getattr(self, name), memo))
        return new

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values, where NumPy is given a tensor.  TypeError if it needs a gradient: NumPy would drop it."""
        if self.requires_grad:
            raise TypeError("a tensor that needs a gradient does not become a NumPy array by itself: use .numpy()")
        return np.array(self.numpy(), dtype, copy=copy)

    def numpy(self) -> np.ndarray:
        """The values as a NumPy array.

        On NumPy it is the tensor's own array: a write to it changes the tensor, and backward does not notice the write
        unless mark_written() follows.  On a device it is a copy."""
        return array.asnumpy(self.data)

    def item(self) -> float:
        """The value of a tensor of one element, as a Python number.  ValueError for more elements, or none."""
        if self.size != 1:
            raise ValueError(f"a Python number wants a tensor of one element, got one of shape {self.shape}")
        return self.data.item()

    def detach(self) -> Tensor:
        """A leaf with the same array and no history.  A write to one of the two, by copy_, is a write to both."""
        detached = Tensor(self.data)
        detached.version = self.version
        return detached

    def to(self, backend: str) -> Tensor:
        """A leaf with the same values on another backend.

        RuntimeError for a computed tensor that needs a gradient: a move has no pullback."""
        if self.requires_grad and not self.is_leaf:
            raise RuntimeError("only a leaf moves with its gradient; this tensor was computed: move its inputs, "
                               "or give .detach()")
        moved = Tensor(array.to(self.data, backend), self.requires_grad, self.decay)
        moved.mask = None if self.mask is None else array.to(self.mask, backend)
        if moved.data is self.data:
            moved.version = self.version
        return moved

    def train(self, on: bool) -> None:
        """Set requires_grad.  TypeError if the dtype is not a floating-point one."""
        on = flag("requires_grad", on)
        if on and np.dtype(self.dtype).kind not in "fV":       # bfloat16 is of kind V
            raise TypeError(f"only floating-point tensors train; this one is {self.dtype}")
        self.requires_grad = on

    def copy_(self, values: Any) -> Tensor:
        """Write into this leaf's own memory.  A backward pass that still needs the old values refuses to run.

        values: an array, numbers, or a tensor, to which no gradient goes; broadcast to this shape, cast to this dtype.
        RuntimeError for a computed tensor, ShapeError for another shape, ValueError for memory that is read-only."""
        if not self.is_leaf:
            raise RuntimeError("only a leaf can be written in place; this tensor was computed: make a new one instead")
        new = array.put_like(values.data if isinstance(values, Tensor) else values, self.data)
        _check_real("copy_", new)
        if not _broadcasts(new.shape, self.shape):
            raise ShapeError(f"copy_ wants values that broadcast to the shape {self.shape}, got the shape {new.shape}")
        if not _is_writable(self.data):
            raise ValueError("copy_ wants memory that can be written; this tensor's array is read-only")
        self.data[...] = precision.rounded(new, self.dtype)
        self.mark_written()
        return self

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError("tensors are not written in place: use where(mask, a, b), or copy_ on a leaf")

    def mark_written(self) -> None:
        """Record that the memory of this leaf was written to: backward refuses a graph that uses it, or a view of it.
        """
        precision.writes += 1
        self.version[0] = precision.writes

    def backward(self, gradient: Any = None, retain_graph: bool = False) -> None:
        """Add d(loss)/d(leaf) to the `.grad` of every trainable leaf.

        gradient: d(loss)/d(self), an array of this tensor's shape; by default 1, for a tensor of one element.  The
        graph is released on the way; retain_graph=True keeps it for a second backward pass."""
        retain_graph = flag("retain_graph", retain_graph)
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
                continue
            if isinstance(node, Part):
                gradients.add_part(node, g)
                continue
            if isinstance(node, Recomputed):
                order += node.expand(g, gradients)             # its part of the graph, made again: the next to walk
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
            g = dispatch.run(sum_of, type(g), self.grad, g)
        elif not (owned and g.flags.c_contiguous):
            g = g.copy()
        self.grad = xp(self.data).asarray(g)                   # a NumPy result without axes is a scalar


def _from_numbers(data: Any) -> Array:
    """The array for Tensor(data), where data is no array: float32 for Python floats."""
    if isinstance(data, Tensor):
        raise TypeError("Tensor wants an array or numbers, got a Tensor: its detach() is a Tensor of the same array")
    return array.asarray(data)


def _check_real(name: str, a: Array) -> None:
    """TypeError, in the name of a function, unless the array holds real numbers or booleans."""
    if a.dtype.kind not in "fiub" and a.dtype != array.bfloat16:
        raise TypeError(f"{name} wants real numbers, got an array of dtype {a.dtype}")


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
            self.arrays[key] = dispatch.run(add_to, type(g), self.arrays[key], g)
        else:
            self.arrays[key] = dispatch.run(sum_of, type(g), self.arrays[key], g)
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


def sum_of(a: Array, b: Array) -> Array:
    """a + b"""
    return a + b


def add_to(a: Array, b: Array) -> Array:
    """a ← a + b. The result is `a`, or a new number if `a` is a number, which cannot be written to."""
    a += b
    return a


def _seed(root: Tensor, gradient: Any) -> Array:
    """The gradient with which backward from `root` starts: the caller's `gradient`, or 1 for a tensor of one element.

    RuntimeError if nothing trains, or if a larger tensor has no `gradient`; ShapeError for another shape."""
    dtype = root.grad_dtype if root.is_leaf else root.dtype
    if not root.requires_grad:
        raise RuntimeError("nothing to do: this tensor depends on no tensor that trains")
    if gradient is None:
        if root.size != 1:
            raise RuntimeError(f"backward from a tensor of shape {root.shape} wants a gradient of that shape")
        return xp(root.data).ones_like(root.data, dtype=dtype)
    if isinstance(gradient, bool):
        raise TypeError(f"backward wants a gradient of numbers, got {gradient}")
    g = array.put_like(gradient.data if isinstance(gradient, Tensor) else gradient, root.data)
    if g.shape != root.shape:
        raise ShapeError(f"backward wants a gradient of shape {root.shape}, got {g.shape}")
    _check_real("backward", g)
    return precision.rounded(g, dtype)


def _fit(d: Array, parent: Record | Part | Tensor) -> Array:
    """The gradient d in the parent's shape and dtype: summed over the axes of broadcasting, then rounded.

    A leaf of 16 bits gets its gradient in float32."""
    if d.shape == parent.shape and d.dtype == parent.dtype and d.itemsize != 2:
        return d
    if not _broadcasts(parent.shape, d.shape):
        raise ShapeError(f"a pullback wants to return a gradient that broadcasting from {parent.shape} explains, "
                         f"got the shape {d.shape}")
    return precision.rounded(sum_to(d, parent.shape), parent.grad_dtype)


def _is_writable(a: Array) -> bool:
    """True if the array may be written to.  A broadcast view of NumPy may not; CuPy has no such flag."""
    return getattr(a.flags, "writeable", True)


def _broadcasts(shape: tuple, to: tuple) -> bool:
    """True if an array of the first shape broadcasts to the second one."""
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(shape[::-1], to[::-1]))


def _is_own(d: Array, given: Any) -> bool:
    """True if a pullback allocated d, or the array of which d is a view, so that it may be added to in place.

    given: the argument of the pullback, an array or a list of arrays; d must share no memory with it."""
    if d is given:
        return False
    arrays = given if isinstance(given, list) else (given,)
    if not _is_writable(d):                                    # such as a broadcast view: one number many times
        return False
    if getattr(d, "base", None) is None:
        return id(d) not in map(id, arrays)
    if not d.flags.c_contiguous:
        return False
    return not any(a is not None and xp(d).may_share_memory(d, a) for a in arrays)


def topological(root: Tensor) -> list[Record | Part | Tensor]:
    """The root's node and all nodes that it depends on, each once, inputs before outputs.

    Records stand in the order in which they were made, leaves before them.  Inputs that need no gradient have no node
    here."""
    nodes, _ = nodes_below([root.node])
    return nodes


def nodes_below(roots: list, since: int = 0) -> tuple[list, list]:
    """The nodes that the roots depend on: (those made since that number, inputs before outputs; the older ones).

    The search does not go below an older node.  An op's inputs are made before its value, so the order in which the
    nodes were made is a topological one.  The search uses a list as its stack, not recursion, so a deep graph does not
    exceed Python's recursion limit."""
    found = {}                                                 # id -> node
    stack = list(roots)
    while stack:
        node = stack.pop()
        if id(node) not in found:
            found[id(node)] = node
            if node.made >= since and not isinstance(node, Tensor):
                stack.extend(node.parents())
    new = [node for node in found.values() if node.made >= since]
    older = [node for node in found.values() if node.made < since]
    return sorted(new, key=operator.attrgetter("made")), older


def sum_to(g: Array, shape: tuple) -> Array:
    """Undo broadcasting: g summed over the axes along which an input of this shape was repeated.

    g has a shape to which the input broadcasts; the result has the input's shape.  A 16-bit g is summed in float32, and
    the sum is float32."""
    if g.shape == shape:
        return g
    new = g.ndim - len(shape)
    repeated = (new + i for i, n in enumerate(shape) if n == 1 != g.shape[new + i])
    return precision.to_float32(g).sum(axis=(*range(new), *repeated)).reshape(shape)


# ── the graph ────────────────────────────────────────────────────────────────────────────────────────────────────────
_numbers = itertools.count(1)                                  # of the nodes, in the order in which they are made


class Record:
    """The record of one call of an op.

    A node of the graph is the Record of a computed tensor, or a leaf.  A Record does not hold the value, so the graph
    keeps only the arrays that pullbacks need.

    shape, dtype: of the value.
    pulls: pairs (parent nodes, pullback); None once released. A pullback of one input returns its gradient. If `joint`
    is True, there is one pair, and the pullback returns a list with one gradient for each parent.
    versions: those of the tensors whose arrays a pullback may hold: inputs and value.
    writes: the number of in-place writes before the call, in all tensors.
    made: the number of this node; a later node has a larger one.
    """
    __slots__ = ("name", "shape", "dtype", "pulls", "joint", "versions", "writes", "made")
    grad_dtype = property(lambda self: self.dtype)

    def __init__(self, name: str, value: Array, pulls: list, versions: list, *, joint: bool):
        self.name = name
        self.shape = value.shape
        self.dtype = value.dtype
        self.pulls = pulls
        self.joint = joint
        self.versions = versions
        self.writes = precision.writes
        self.made = next(_numbers)

    def parents(self) -> Iterator[Record | Part | Tensor]:
        """The nodes to which the pullbacks lead.  RuntimeError if the record was released."""
        if self.pulls is None:
            raise RuntimeError(f"this graph was walked before and released at {self.name!r}: "
                               "backward(retain_graph=True) keeps it")
        for parents, _ in self.pulls:
            yield from parents

    def pull(self, g: Array) -> Iterator[tuple[Record | Part | Tensor, Array]]:
        """Pairs (parent, gradient), from the gradient g of the value.

        RuntimeError if an input or the value was written in place since the call."""
        self.check_versions()
        for parents, back in self.pulls:
            if not self.joint:
                d = back(g)
                if getattr(d, "shape", None) is None:
                    raise TypeError(f"a pullback of {self.name} wants to return an array, got {brief(d)}")
                yield parents[0], d
                continue
            gradients = back(g)
            # All copies before the first yield: the caller adds to a gradient in place as soon as it has it.
            apart = [None if d is None else _apart(gradients, i) for i, d in enumerate(gradients)]
            for parent, d in zip(parents, apart):
                if d is not None:
                    yield parent, d

    def check_versions(self) -> None:
        """RuntimeError if an input or the value was written in place since the call, directly or through a view of it.

        Pullbacks may hold its array, which has other values now."""
        for version in self.versions:
            if version[0] > self.writes:
                raise RuntimeError(f"the value or an input of {self.name!r} was written in place after the op used it: "
                                   "its gradient would be wrong")

    def release(self) -> None:
        """Drop the pullbacks and the arrays they hold."""
        self.pulls = None


def _apart(gradients: Sequence[Array], i: int) -> Array:
    """Gradient i of a pullback that returned several; a copy if it shares memory with one before it."""
    d = gradients[i]
    for other in gradients[:i]:
        if other is d or (other is not None and d.base is not None and xp(d).may_share_memory(d, other)):
            return d.copy()
    return d


class Part:
    """The node of value number i, where one call of an op returns `count` values; `whole` is the Record of the call."""
    __slots__ = ("whole", "i", "count", "shape", "dtype", "made")
    grad_dtype = property(lambda self: self.dtype)

    def __init__(self, whole: Record, i: int, count: int, value: Array):
        self.made = next(_numbers)
        self.whole = whole
        self.i = i
        self.count = count
        self.shape = value.shape
        self.dtype = value.dtype

    def parents(self) -> Iterator[Record]:
        """The record of the call."""
        yield self.whole


class Recomputed(Record):
    """The node of a part of the graph whose records were dropped.  The backward pass makes them again.

    The pullbacks of the dropped records held most of the memory; this node holds none of it.  `run` computes the values
    of the part again, from the same older tensors and with the same random numbers, and gives them as tensors.

    outputs: the tensors that `run` gives, as they were the first time.  records: the nodes that are dropped.
    older: the nodes of the graph to which they led."""
    __slots__ = ("run", "values")

    def __init__(self, name: str, run: Callable[[], list[Tensor]], outputs: list[Tensor], records: list, older: list):
        versions = {}                                          # id -> version: many records have the same inputs
        for record in records:
            if isinstance(record, Record):
                versions.update({id(version): version for version in record.versions})
        pulls = [(older, None)]
        super().__init__(name, outputs[0].data, pulls, list(versions.values()), joint=True)
        self.run = run
        self.values = [y.data for y in outputs]

    def expand(self, g: list, gradients: Gradients) -> list[Record | Part | Tensor]:
        """Make this part of the graph again, and give its outputs their gradients g.  Returns its nodes, in order.

        g: a list, None for an output without a gradient.  RuntimeError if a tensor was written in place since the first
        run, or if an output has other values now."""
        self.check_versions()
        since = next(_numbers)
        with _set(recording=True):
            outputs = self.run()
        if len(outputs) != len(self.values) or not all(map(_same_bits, outputs, self.values)):
            raise RuntimeError(f"{self.name} gave other values when it ran again for the backward pass: a part of it "
                               "was changed since, or draws random numbers that are not the Context's")
        roots = []
        for y, d in zip(outputs, g):
            if d is not None and y.requires_grad:              # else frozen since
                gradients.add(y.node, d)
                roots.append(y.node)
        nodes, _ = nodes_below(roots, since)
        return nodes

    def release(self) -> None:
        """Drop the older nodes, and the tensors from which `run` starts."""
        self.pulls = self.run = self.values = None


def drop_records(name: str, run: Callable[[], list[Tensor]], outputs: list[Tensor], since: int) -> None:
    """Drop the records that were made since a number, from next_number(), on the way to these outputs.

    run: makes the same outputs again, with new records; called once in each backward pass.  name: for messages.
    Outputs that no trainable tensor leads to, or that are older, stay as they are."""
    new = [y.node.made >= since for y in outputs]
    records, older = nodes_below([y.node for y, is_new in zip(outputs, new) if is_new], since)
    if not records:
        return
    node = Recomputed(name, run, outputs, records, older)
    for i, (y, is_new) in enumerate(zip(outputs, new)):
        if is_new:
            y.record = Part(node, i, len(outputs), y.data)


def next_number() -> int:
    """A number for drop_records: the records made from here on have a larger one."""
    return next(_numbers)


def _same_bits(y: Tensor, value: Array) -> bool:
    """True if y has this value.  An array on a device is not read, since that would wait for the device."""
    if y.data is value:
        return True
    if type(value) is not np.ndarray:
        return y.shape == value.shape and y.dtype == value.dtype
    bits = f"u{value.itemsize}"                                # NaN is equal to itself here
    return y.dtype == value.dtype and np.array_equal(y.data.view(bits), value.view(bits))


# ── ops ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
OPS: dict[str, Callable] = {}                                  # every op by name; the tests walk this table


def op(shapes: str, stops: tuple[str, ...] = ()) -> Callable[[Callable], Callable[..., Tensor]]:
    """Make an op of a function on plain arrays that returns (value, pullbacks).

    pullbacks: a tuple with one function g -> gradient per input (None where there is no gradient); or, where inputs
    share costly work, one function (g, needed) -> a gradient per input, needed[i] being True if input i needs one.
    A pullback returns g itself, a view of g, or a new array; the engine undoes broadcasting.
    A tensor that trains, given to an input without a gradient, is a TypeError.
    An op whose value is a tuple returns a tuple of tensors; then g is a list of their gradients, None where none came.
    shapes: such as "... n k, ... k m -> ... n m"; for readers, error messages and tests.
    stops: names of the inputs at which the gradient stops on purpose.  A tensor that trains may be given there.

    The function is the op's `definition`; dispatch.py finds faster kernels, precision.py has the 16-bit rules.
    """
    def wrap(definition: Callable) -> Callable[..., Tensor]:
        """The op on Tensors for a definition on plain arrays; also entered in OPS."""
        name = definition.__name__

        @functools.wraps(definition)
        def call(*args: Any, **kwargs: Any) -> Tensor:
            # Run the definition, or a kernel, on the arrays of the arguments, and record the call for backward.
            if not args or (kwargs and not PLAIN.issuperset(map(type, kwargs.values()))):
                args, kwargs = _by_position(call, args, kwargs)
            arrays = [a.data if isinstance(a, Tensor) else a for a in args]
            is_plain = PLAIN.issuperset(map(type, arrays))     # all arrays are NumPy's: no further look is needed
            if not is_plain:
                arrays = [a if type(a) in PLAIN else _plain(call, args, a) for a in arrays]
            try:
                if not is_plain:
                    xp(*arrays, *kwargs.values())              # refuses arrays of two backends
                if autocast_state.dtype is None and not has_16_bit(arrays):
                    value, pullbacks = dispatch.run(call, type(arrays[0]), *arrays, **kwargs)
                else:
                    leaves = [isinstance(a, Tensor) and a.record is None for a in args]
                    value, pullbacks = precision.run(call, arrays, kwargs, leaves)
            except (ValueError, TypeError, IndexError, AttributeError, array.BackendError) as e:
                raise _explained(e, call, arrays, kwargs) from e
            if _state.anomaly:
                _check_value(name, value, arrays)
            if isinstance(value, tuple):
                result = tuple(_as_tensor(v, args) for v in value)
            else:
                result = _as_tensor(value, args)
            if _state.recording:
                _record(call, args, result, pullbacks)
            return result
        call.shapes = shapes
        call.definition = definition
        call.stops = stops
        OPS[name] = call
        return call
    return wrap


def _record(call: Callable, args: tuple, result: Tensor | tuple[Tensor, ...], pullbacks: Any) -> None:
    """Give the result of an op's call a Record, if an input needs a gradient.

    Keeps only the pullbacks of inputs that need a gradient: the others are freed, with the arrays they hold.
    TypeError if an input that needs a gradient has no pullback."""
    needed = [isinstance(a, Tensor) and a.requires_grad for a in args]
    if True not in needed:
        return
    joint = callable(pullbacks)
    if joint:
        parents = [a.node for a, n in zip(args, needed) if n]
        pulls = [(parents, _joint(call, pullbacks, needed))]
    else:
        pulls = []
        for a, back, n in zip(args, pullbacks, needed):
            if n and back:
                node = a if a.record is None else a.record     # a.node, without a call: here every op passes
                pulls.append(((node,), back))
        if len(pulls) < sum(needed):
            _check_stops(call, pullbacks, needed)
        if not pulls:
            return
    versions = [a.version for a in args if isinstance(a, Tensor)]
    if isinstance(result, tuple):
        versions += [y.version for y in result]
        record = Record(call.__name__, result[0].data, pulls, versions, joint=joint)
        for i, y in enumerate(result):
            y.requires_grad = True
            y.record = Part(record, i, len(result), y.data)
    else:
        versions.append(result.version)
        result.requires_grad = True
        result.record = Record(call.__name__, result.data, pulls, versions, joint=joint)


def _check_stops(call: Callable, pullbacks: tuple, needed: list[bool]) -> None:
    """TypeError if an input that needs a gradient has no pullback, and the op does not stop the gradient there."""
    for i, is_needed in enumerate(needed):
        back = pullbacks[i] if i < len(pullbacks) else None
        if is_needed and back is None and _parameter(call, i) not in call.stops:
            raise _no_gradient(call, _parameter(call, i))


def _as_tensor(value: Any, args: tuple) -> Tensor:
    """A value of an op as a tensor.

    An input's array, or a view of it, shares the input's version: a write to one is a write to both."""
    if not array.is_array(value):
        value = np.asarray(value)                              # a NumPy scalar is no array
    y = Tensor.__new__(Tensor)                                 # without the checks of Tensor(...), for every op's sake
    y.data = value
    y.requires_grad = False
    y.grad = y.record = y.mask = y.decay = None
    y.version = [0]
    base = value.base                                          # of a view of a view, the array at the end; or None
    for a in args:
        if isinstance(a, Tensor):
            x = a.data
            if x is value or x is base or (base is not None and (x.base is base or _overlap(value, x))):
                y.version = a.version
                break
    return y


def _overlap(value: Array, x: Array) -> bool:
    """True if two arrays of a device may share memory.  For NumPy, False: there `base` tells."""
    return type(value) is not np.ndarray and xp(value).may_share_memory(value, x)


def _joint(call: Callable, back: Callable, needed: list[bool]) -> Callable:
    """The joint pullback (g, needed) in the form of Record.pulls: from g to the gradients that are needed."""
    def joint(g: Any) -> list:
        gradients = back(g, needed)
        for i in range(len(gradients), len(needed)):
            if needed[i]:
                raise _no_gradient(call, _parameter(call, i))
        return [d for d, n in zip(gradients, needed) if n]
    return joint


# ── the arguments of an op ───────────────────────────────────────────────────────────────────────────────────────────
CONTAINERS = (list, tuple)                                     # arguments that may hold tensors
# Types of arguments that hold no tensor, for a quick look.  A slice may hold one: Tensor.__index__ makes it an integer.
PLAIN = {bool, int, float, str, slice, type(None), type(...), np.ndarray}


def _by_position(call: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of an op, where a tensor that was given by keyword is at its position, as its gradient wants it.

    TypeError for a tensor that trains, given to a parameter that has no position."""
    if args and not _holds_tensor(list(kwargs.values())):
        return args, kwargs
    try:
        bound = inspect.signature(call.definition).bind(*args, **kwargs)
    except TypeError as e:
        raise TypeError(f"{call.__name__}: {e}") from None
    bound.apply_defaults()
    if not bound.args:
        raise TypeError(f"{call.__name__} wants one tensor or more, got none")
    plain = {}
    for name, a in bound.kwargs.items():
        if _trains(a):
            raise _no_gradient(call, name)
        plain[name] = _without_tensors(a)
    return bound.args, plain


def _plain(call: Callable, args: tuple, a: Any) -> Any:
    """An argument `a` of an op that is no tensor: with arrays in place of the tensors in a list or a tuple.

    TypeError if one of these trains: a gradient goes to a tensor that is itself an argument."""
    if not _holds_tensor(a):
        return a
    if _trains(a):
        i = next(i for i, b in enumerate(args) if b is a)
        raise _no_gradient(call, _parameter(call, i))
    return _without_tensors(a)


def _holds_tensor(a: Any) -> bool:
    """True for a tensor, and for a list or a tuple that holds one."""
    if not isinstance(a, CONTAINERS):
        return isinstance(a, Tensor)
    return not PLAIN.issuperset(map(type, a)) and any(map(_holds_tensor, a))


def _trains(a: Any) -> bool:
    """True for a tensor that needs a gradient, and for a container that holds one, while calls are recorded."""
    if isinstance(a, CONTAINERS):
        return any(map(_trains, a))
    return _state.recording and isinstance(a, Tensor) and a.requires_grad


def _without_tensors(a: Any) -> Any:
    """An argument with arrays in place of tensors."""
    if isinstance(a, CONTAINERS):
        return type(a)(map(_without_tensors, a))
    return a.data if isinstance(a, Tensor) else a


def _parameter(call: Callable, i: int) -> str:
    """The name of the parameter of an op that takes its positional argument i."""
    names = []
    for parameter in inspect.signature(call.definition).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            return parameter.name
        names.append(parameter.name)
    return names[i]


def _no_gradient(call: Callable, name: str) -> TypeError:
    """The error for a tensor that trains, given to the parameter `name` of an op, which has no gradient for it."""
    return TypeError(f"{call.__name__} has no gradient for its input {name!r}, and a tensor given there trains: "
                     "freeze it, or give its .detach()")


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


def is_recording() -> bool:
    """False inside no_grad: then no pullback of an op is called."""
    return _state.recording


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


def _has_equal_rows(a: list | tuple) -> bool:
    """True if NumPy makes an array of these lists."""
    try:
        array.as_host_array(a)
    except ValueError:
        return False
    except TypeError:
        pass
    return True


def _explained(e: Exception, call: Callable, arrays: list, kwargs: dict[str, Any]) -> Exception:
    """The library's error for an error e that an op raised for these arguments: a ShapeError for a ValueError.

    The message holds the shape string of the op, the shapes it got, and the letters that got two sizes. A TypeError of
    Python's or NumPy's gives way to the parameters of the op; it is the cause of the error."""
    name = call.__name__
    inputs = call.shapes.split("->")[0].split(",")
    if isinstance(e, array.BackendError):
        return array.BackendError(f"{name}: {e}")
    # An op that misses an attribute wants an array in the place of a number or a list; other ops take these.
    others = () if isinstance(e, AttributeError) else (int, float, np.generic, list, tuple)
    parameters = list(inspect.signature(call.definition).parameters.values())
    for a, parameter in zip(arrays, parameters[:len(inputs)]):
        is_left_out = a is None and parameter.default is None
        if not is_left_out and not array.is_array(a) and not isinstance(a, others):
            return TypeError(f"{name} wants a tensor, an array or a number as {parameter.name!r}, got {brief(a)}")
        if isinstance(a, (list, tuple)) and " wants " not in str(e) and not _has_equal_rows(a):
            return ShapeError(f"{name} wants lists of equal lengths as {parameter.name!r}, got {brief(a)}")
    is_of_module = isinstance(getattr(e, "obj", None), ModuleType)         # such as a function that CuPy lacks
    if isinstance(e, (TypeError, AttributeError)) and not is_of_module and " wants " not in str(e):
        keywords = f" and the keywords {', '.join(kwargs)}" if kwargs else ""
        return TypeError(f"{name} wants {inspect.signature(call.definition)}, got ({_sizes(arrays)}){keywords}")
    if not isinstance(e, ValueError):
        # A plain TypeError in place of NumPy's own subclasses, which cannot be made from a message alone.
        kind = TypeError if isinstance(e, TypeError) else type(e)
        return kind(f"{name}({_sizes(arrays)}): {e}")
    sizes: dict[str, set] = {}                                 # letter of the shape string -> its sizes
    for spec, a in zip(inputs, arrays):
        letters = re.findall(r"\b[a-z]\b", spec)
        if array.is_array(a):
            for letter, n in zip(letters[::-1], a.shape[::-1]):            # the letters are the last axes
                sizes.setdefault(letter, set()).add(n)
    clashes = [f"{letter} is {' and '.join(map(str, sorted(ns)))}" for letter, ns in sizes.items() if len(ns) > 1]
    reason = f"; {'; '.join(clashes)}" if clashes else f": {e}"
    return ShapeError(f"{name} wants {call.shapes!r}; got {_sizes(arrays)}{reason}")

"""A whole training step as one CUDA graph, captured once and replayed: one launch in place of hundreds.

A graph holds kernels with their arguments, which are fixed: numbers and addresses.  So

    memory      comes from the graph's own pool, which lives as long as the graph: no other array gets these addresses
    inputs      are copied into arrays that stay; another graph is captured for other shapes
    numbers     that change (learning rates, bias corrections, dropout keys) lie on the device, and are sent before a
                replay
    the stream  is the graph's own, since the default stream cannot be captured; events keep the order with other work

The first two calls run eagerly, which compiles kernels and fills the pool.  They record every number that the host
gives a kernel: a number that differs in the next call would stay wrong in every replay.  Such a step is refused, and so
is a step that waits for the device or transfers host data.
"""
from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from ... import array
from ...array import Array, CannotCapture
from ...optim.optimizers import Optimizer
from ...tensor import Tensor
from . import casts

EAGER_CALLS = 2                                          # calls of the step before the capture
MAX_GRAPHS = 8                                           # of one step: for different shapes, or different ints


class Captured:
    """A step that is replayed, from the third call with arguments of the same shapes.

    fallback: a function for the calls with further shapes, once there are MAX_GRAPHS graphs; None refuses them."""

    def __init__(self, step: Callable, fallback: Callable | None = None):
        self.step = step
        self.fallback = fallback
        self.graphs: dict[str, Recording] = {}
        self.stream = cupy.cuda.Stream(non_blocking=True)

    def __call__(self, *args: Any) -> Any:
        """Run the step eagerly, capture it, or replay its graph, for arguments of this kind.

        The graph's stream waits for earlier work of the caller's stream, and later work there waits for the graph."""
        key = repr(mapped(args, _kind))                      # shapes and dtypes of arrays, values of ints and strings
        if key in self.graphs and self.graphs[key].outdated():           # it would update other arrays
            del self.graphs[key]
        if key not in self.graphs:
            if len(self.graphs) == MAX_GRAPHS and self.fallback:
                return self.fallback(*args)
            if len(self.graphs) == MAX_GRAPHS:
                raise CannotCapture(f"this step is called with too many different shapes or values: {MAX_GRAPHS} "
                                    f"graphs are made, and now {key}.  Pass ids of one shape, and changing values as "
                                    "floats or arrays")
            self.graphs[key] = Recording(self.step, self.stream)
        caller_stream = cupy.cuda.get_current_stream()
        self.stream.wait_event(caller_stream.record())
        try:
            out = self.graphs[key].call(args)
        except BaseException:
            del self.graphs[key]                             # half recorded: the next call begins again
            raise
        caller_stream.wait_event(self.stream.record())
        return out


class Number:
    """The object that a captured step receives for a float argument; `now` is the float in this call.

    It has no arithmetic: a graph would keep the result of the captured call."""
    def __init__(self, now: float):
        self.now = now

    def __float__(self) -> float:
        raise CannotCapture("a float given to a captured step is for optimizer.step(factor) alone: "
                            "give other numbers as arrays")


class Keys:
    """The object that a captured step receives for a generator argument.

    It draws the same dropout keys as the generator, into an array on the device. A replay draws new keys into it."""

    def __init__(self, recording: Recording):
        self.recording = recording
        self.rng = None
        self.count = 0                                       # keys drawn in this call
        self.max_count = 0                                   # keys drawn in the call that drew most
        self.keys = cupy.zeros(4096, np.uint64)

    def begin(self, rng: np.random.Generator) -> None:
        """Begin a call of the step."""
        self.rng = rng
        self.count = 0

    def integers(self, high: int) -> Array:
        """A dropout key on the device, in place of the int that Generator.integers(2**63) gives nn.Dropout.

        During the capture no key is drawn: `send` does it before each replay.  CannotCapture for another kind of draw,
        or for more draws in a call than `keys` has room for."""
        if high != 2**63 or self.count == len(self.keys):
            raise CannotCapture("of a generator given to a captured step only dropout may draw, "
                                f"and {len(self.keys)} times")
        key = self.keys[self.count:self.count + 1]
        if not self.recording.capturing:
            key.set(np.array([self.rng.integers(high)], np.uint64))
        self.count += 1
        self.max_count = max(self.max_count, self.count)
        return key

    def send(self) -> None:
        """Send the keys of a replay to the device."""
        if self.max_count:
            keys = [self.rng.integers(2**63) for _ in range(self.max_count)]
            self.keys[:self.max_count].set(np.array(keys, np.uint64))


class Recording:
    """One graph, and the eager calls before its capture.  It is array.recording while the step runs."""

    def __init__(self, step: Callable, stream: Any):
        self.step = step                                     # the user's function
        self.stream = stream
        self.pool = cupy.cuda.MemoryPool()
        self.calls = 0                                       # of the step so far, replays included
        self.graph = None                                    # set by the capture, after EAGER_CALLS calls
        self.capturing = False
        self.notes: list[tuple] = []                         # (kernel, numbers from the host), of this call
        self.previous_notes: list[tuple] = []                # the same, of the previous call
        self.feeds: list[tuple] = []                         # (array on the device, function that computes it)
        self.fed = 0                                         # feeds of this call so far
        self.optimizers: list[tuple] = []                    # of this call: (optimiser, its groups, their flat arrays)

    # ── called by the library while the step runs ──
    def note(self, kernel: str, numbers: tuple) -> None:
        """Record a kernel, and the numbers that the host gave it."""
        self.notes.append((kernel, numbers))

    def feed(self, f: Callable[[], np.ndarray], shape: tuple) -> Array:
        """A float32 array on the device that holds f() in each call and each replay, such as learning rates.

        The n-th feed of every call is the same array: the graph holds its address.  It is allocated in the first call.
        Memory from the capture itself could be memory that an earlier kernel of the graph has freed and would write to
        again.  During the capture f is not called: `replay` calls it."""
        if self.fed == len(self.feeds):
            self.feeds.append((cupy.empty(shape, np.float32), f))
        a = self.feeds[self.fed][0]
        self.feeds[self.fed] = a, f
        self.fed += 1
        if not self.capturing:
            a.set(f().astype(np.float32))
        return a

    def now(self, number: Any) -> Callable[[], float]:
        """A function that returns a number's value in each call; for a plain number, always the same."""
        if isinstance(number, Number):
            return lambda: number.now
        self.note("optimizer.step", (number,))
        return lambda: number

    # ── a call ──
    def call(self, args: tuple) -> Any:
        """Run the step eagerly (the first EAGER_CALLS times), then capture it once and replay it.  Returns its result.

        All memory comes from the graph's own pool, all work goes to its stream."""
        with cupy.cuda.using_allocator(self.pool.malloc), self.stream:
            if self.calls == 0:
                self.inputs = mapped(args, self.place)       # the step always gets these objects
            mapped(self.inputs, self.put, args)              # this call's values go into them
            self.calls += 1
            if self.calls <= EAGER_CALLS:
                out = self.run()
            else:
                if self.graph is None:
                    self.out = self.record()
                self.replay()
                out = self.out
        with self.stream:
            return mapped(out, _copied)                      # the next call writes to the graph's own arrays

    def replay(self) -> None:
        """Send the numbers that change, launch the graph, and record that the parameters were written to."""
        for a, f in self.feeds:
            a.set(f().astype(np.float32))
        for argument in leaves(self.inputs):
            if isinstance(argument, Keys):
                argument.send()
        self.graph.launch(self.stream)
        for optimizer, *_ in self.optimizers:
            optimizer.mark_written()

    def place(self, a: Any) -> Any:
        """The object that the step gets in every call in place of the argument `a`; `put` gives it the call's value.

        An int or a string stands for itself: another value has another graph."""
        if isinstance(a, np.random.Generator):
            return Keys(self)
        if isinstance(a, (np.ndarray, cupy.ndarray)):
            return cupy.empty(a.shape, a.dtype)
        return Number(a) if isinstance(a, float) else a

    @staticmethod
    def put(placed: Any, a: Any) -> Any:
        """Write this call's argument `a` into the object that `place` made for it."""
        if isinstance(placed, Keys):
            placed.begin(a)
        elif isinstance(placed, Number):
            placed.now = a
        elif isinstance(a, np.ndarray):
            placed.set(a)
        elif isinstance(a, cupy.ndarray):
            placed[...] = a
        return placed

    def run(self) -> Any:
        """Run the Python code of the step, eagerly or while the stream is captured.  Returns the step's result.

        Records the numbers that the host gives to kernels.  CannotCapture if they differ from those of the previous
        call, or if the step leaves gradients behind."""
        self.previous_notes = self.notes
        self.notes = []
        self.optimizers = []
        self.fed = 0
        array.recording = self
        casts.forget()                                       # so that the step casts its parameters, at each replay too
        try:
            out = self.step(*self.inputs)
        finally:
            array.recording = None
        groups = [g for optimizer, *_ in self.optimizers for g in optimizer.groups]
        if any(p.grad is not None for g in groups for p in g.tensors.values()):
            raise CannotCapture("this step leaves gradients behind, and the next step would add to them: "
                                "end it with optimizer.zero_grad()")
        if self.calls > 1 and self.previous_notes != self.notes:
            raise CannotCapture(_difference_message(self.previous_notes, self.notes))
        return out

    def record(self) -> Any:
        """Capture the step as self.graph, without running its kernels.  Returns the arrays that a replay will fill.

        CannotCapture if the step is refused: parameters and optimisers are then as before, and gradients are None.
        Other errors of the step pass through."""
        groups = [g for o, *_ in self.optimizers for g in o.groups]      # of the eager calls; run() starts a new list
        self.stream.synchronize()
        self.capturing = True
        self.stream.begin_capture()
        try:
            out = self.run()
        except BaseException as e:
            for g in groups:
                for p in g.tensors.values():
                    p.grad = None                            # the kernels that would have filled it never ran
            try:
                self.stream.end_capture()
            except cupy.cuda.runtime.CUDARuntimeError:
                pass                                         # the capture is invalid; e has the cause
            is_of_capture = isinstance(e, (RuntimeError, TypeError)) and not isinstance(e, CannotCapture)
            if not is_of_capture:                            # it has its own message, or is the user's own error
                raise
            raise CannotCapture(_explain(e)) from e
        finally:
            self.capturing = False
        self.graph = self.stream.end_capture()
        return out

    def watch(self, opt: Optimizer) -> None:
        """Record an optimiser of this step, with its groups of tensors and their flat arrays."""
        self.optimizers.append((opt, opt.groups, [g.w for g in opt.groups]))

    def outdated(self) -> bool:
        """True if an optimiser was started again, or if its tensors moved to another device since the last call.

        The graph updates the arrays that it was captured with, and these are no longer the optimiser's."""
        for optimizer, groups, values in self.optimizers:
            optimizer.reclaim_tensors()                      # after a move it makes new flat arrays g.w
            if optimizer.groups is not groups or any(g.w is not w for g, w in zip(groups, values)):
                return True
        return False


# ── arguments and results: tuples, lists and dicts ───────────────────────────────────────────────────────────────────
def mapped(tree: Any, f: Callable, *others: Any) -> Any:
    """A tree of f(leaf, leaves of the other trees at the same position).

    tree: tuples, lists and dicts, nested; everything else is a leaf.  The others have the same nesting."""
    if isinstance(tree, (tuple, list)):
        return type(tree)(mapped(a, f, *at(others, i)) for i, a in enumerate(tree))
    if isinstance(tree, dict):
        return {key: mapped(a, f, *at(others, key)) for key, a in tree.items()}
    return f(tree, *others)


def at(trees: tuple, key: Any) -> list:
    """The branch under this index or key, of every tree."""
    return [tree[key] for tree in trees]


def leaves(tree: Any) -> list:
    """The leaves of a tree, in order."""
    out: list = []
    mapped(tree, out.append)
    return out


def _copied(a: Any) -> Any:
    """A copy of a tensor or an array of the step's result; anything else as it is."""
    if isinstance(a, Tensor):
        return Tensor(a.data.copy())
    return a.copy() if array.is_array(a) else a


def _kind(a: Any) -> Any:
    """The part of an argument that is fixed in a graph: an array's dtype and shape, the type of a float or a generator,
    else the value."""
    if isinstance(a, (np.ndarray, cupy.ndarray)):
        return a.dtype.str, a.shape
    return type(a).__name__ if isinstance(a, (float, np.random.Generator)) else a


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _difference_message(before: list[tuple[str, tuple]], now: list[tuple[str, tuple]]) -> str:
    """The message for two calls with different notes, (kernel, numbers from the host): see Recording.notes."""
    for (old_name, old_numbers), (name, numbers) in zip(before, now):
        if old_name != name:
            return f"this step does something else at each call: {old_name} before, {name} now"
        for old, new in zip(old_numbers, numbers):
            if old != new:
                return (f"this step gives {name} a different number at each call, and a replay would repeat the first: "
                        f"{old} before, {new} now.  Pass changing values as arguments of the step: a float for "
                        "optimizer.step, a generator for dropout, arrays for all else")
    return f"this step does something else at each call: {len(before)} operations before, {len(now)} now"


def _explain(e: BaseException) -> str:
    """The message for an error in the capture: the cause, and the innermost line of code outside tinyft and CuPy."""
    libraries = (str(Path(array.__file__).parent), str(Path(cupy.__file__).parent))
    frames = [f for f in traceback.extract_tb(e.__traceback__) if f.filename.endswith(".py")]
    user_frames = [f for f in frames if not f.filename.startswith(libraries)] or frames
    message = str(e).splitlines()[0] if str(e) else type(e).__name__
    cause = message
    if "D2H" in message or "StreamCapture" in message:       # D2H, H2D: CuPy's words for a copy to or from the host
        cause = ("it reads a number from the device, or waits for it "
                 "(float(), item(), asnumpy, a boolean mask as an index ...)")
    elif "H2D" in message:
        cause = "it brings host data to the device: give that to the step as an argument"
    elif isinstance(e, NotImplementedError):
        cause = "CuPy's own product cannot be captured: the kernels are off, or the dtypes differ"
    frame = user_frames[-1]
    line = linecache.getline(frame.filename, frame.lineno).strip()
    return f"this step cannot be captured: {cause}.  {Path(frame.filename).name}, line {frame.lineno}: {line}"

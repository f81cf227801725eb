"""A whole training step, noted once as a CUDA graph and replayed: the host then says one word where it said hundreds.

A graph holds kernels with their arguments: numbers as they were, and addresses.  So

    memory      comes from a pool of the graph's own, which lives as long as the graph: no one else is given those addresses
    inputs      are copied into arrays that stay; of other shapes, another graph is made
    numbers     that change (rates, bias corrections, keys of dropout) lie on the device, and are sent before each replay
    the stream  is one of its own, since the default one cannot be captured; events keep the order with all other work

The first two calls run as they are, which compiles kernels and fills the pool, and are watched: a number that the host gave a kernel, and
that is another at the next call, would be wrong for ever after.  Such a step is refused, as is one that waits for the device or brings host data.
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

WATCHED = 2                                                                      # calls before the one that is noted
GRAPHS = 8                                                                       # shapes a step may come with


class Captured:
    """A step that is replayed, from its third call with arguments of the same shapes.  otherwise: what does the work for more shapes than GRAPHS."""

    def __init__(self, step: Callable, otherwise: Callable | None = None):
        self.step, self.otherwise, self.graphs = step, otherwise, {}
        self.stream = cupy.cuda.Stream(non_blocking=True)

    def __call__(self, *args: Any) -> Any:
        key = repr(mapped(args, _kind))
        if key in self.graphs and self.graphs[key].outdated():
            del self.graphs[key]
        if key not in self.graphs:
            if len(self.graphs) == GRAPHS and self.otherwise:
                return self.otherwise(*args)
            if len(self.graphs) == GRAPHS:
                raise CannotCapture(f"this step comes with ever other shapes or numbers: {GRAPHS} graphs are made, and now {key}.  Pass ids of "
                                    "one shape, and what changes as a float or an array")
            self.graphs[key] = Recording(self.step, self.stream)
        here = cupy.cuda.get_current_stream()
        self.stream.wait_event(here.record())
        try:
            out = self.graphs[key].call(args)
        except BaseException:
            del self.graphs[key]
            raise
        here.wait_event(self.stream.record())
        return out


class Number:
    """A float that was given to the step: `now` at this call.  It has no arithmetic, whose result would be of one call only."""
    def __init__(self, now: float):
        self.now = now

    def __float__(self) -> float:
        raise CannotCapture("a float given to a captured step is for optimizer.step(factor) alone: give other numbers as arrays")


class Keys:
    """A generator that was given to the step: draws what it would, and puts it on the device."""

    def __init__(self, recording: Recording):
        self.recording, self.rng, self.n, self.most = recording, None, 0, 0
        self.drawn = cupy.zeros(4096, np.uint64)

    def begin(self, rng: np.random.Generator) -> None:
        """A call of the step: to be noted, or not."""
        self.rng, self.n = rng, 0

    def integers(self, high: int) -> Array:
        if high != 2**63 or self.n == len(self.drawn):
            raise CannotCapture(f"of a generator given to a captured step only dropout may draw, and {len(self.drawn)} times")
        key = self.drawn[self.n:self.n + 1]
        if not self.recording.noting:
            key.set(np.array([self.rng.integers(high)], np.uint64))
        self.n += 1
        self.most = max(self.most, self.n)
        return key

    def send(self) -> None:
        """The keys of a replay."""
        if self.most:
            self.drawn[:self.most].set(np.array([self.rng.integers(2**63) for _ in range(self.most)], np.uint64))


class Recording:
    """One graph, or the calls on the way to it.  array.recording, while the step runs under it."""

    def __init__(self, step: Callable, stream: Any):
        self.step, self.stream, self.pool, self.calls, self.graph = step, stream, cupy.cuda.MemoryPool(), 0, None
        self.noting, self.notes, self.before, self.feeds, self.fed, self.optimizers = False, [], [], [], 0, []

    # ── what the library tells it ──
    def note(self, what: str, numbers: tuple) -> None:
        """A kernel, and what it was given by the host."""
        self.notes.append((what, numbers))

    def feed(self, f: Callable[[], np.ndarray], shape: tuple) -> Array:
        """An array on the device that holds f() at each call, float32.  The same array at every call, made at the first: were it made while the
        graph is noted, its memory could be what an earlier kernel of the graph has used and let go of, and would write to again."""
        if self.fed == len(self.feeds):
            self.feeds.append((cupy.empty(shape, np.float32), f))
        a = self.feeds[self.fed][0]
        self.feeds[self.fed] = a, f
        self.fed += 1
        if not self.noting:
            a.set(f().astype(np.float32))
        return a

    def now(self, number: Any) -> Callable[[], float]:
        """What a number is at each call: of a plain one, the same."""
        if isinstance(number, Number):
            return lambda: number.now
        self.note("optimizer.step", (number,))
        return lambda: number

    # ── a call ──
    def call(self, args: tuple) -> Any:
        with cupy.cuda.using_allocator(self.pool.malloc), self.stream:
            if self.calls == 0:
                self.inputs = mapped(args, self.place)
            mapped(self.inputs, self.put, args)
            self.calls += 1
            if self.calls <= WATCHED:
                out = self.run()
            else:
                if self.graph is None:
                    self.out = self.record()
                for a, f in self.feeds:
                    a.set(f().astype(np.float32))
                for k in leaves(self.inputs):
                    if isinstance(k, Keys):
                        k.send()
                self.graph.launch(self.stream)
                for o, *_ in self.optimizers:
                    o.mark_written()
                out = self.out
        with self.stream:                                                        # copies: the graph's own arrays are written to by the next call
            return mapped(out, lambda a: Tensor(a.data.copy()) if isinstance(a, Tensor) else a.copy() if array.is_array(a) else a)

    def place(self, a: Any) -> Any:
        """What the step is given for an argument, at every call."""
        if isinstance(a, np.random.Generator):
            return Keys(self)
        if isinstance(a, (np.ndarray, cupy.ndarray)):
            return cupy.empty(a.shape, a.dtype)
        return Number(a) if isinstance(a, float) else a

    @staticmethod
    def put(there: Any, a: Any) -> Any:
        """This call's argument, where the step looks for it."""
        if isinstance(there, Keys):
            there.begin(a)
        elif isinstance(there, Number):
            there.now = a
        elif isinstance(a, np.ndarray):
            there.set(a)
        elif isinstance(a, cupy.ndarray):
            there[...] = a
        return there

    def run(self) -> Any:
        """The step, watched."""
        self.before, self.notes, self.optimizers, self.fed, array.recording = self.notes, [], [], 0, self
        casts.forget()                                                           # parameters are cast within the step, at each replay
        try:
            out = self.step(*self.inputs)
        finally:
            array.recording = None
        if any(p.grad is not None for o, *_ in self.optimizers for g in o.groups for p in g.tensors.values()):
            raise CannotCapture("this step leaves gradients behind, which the next would add to: end it with optimizer.zero_grad()")
        if self.calls > 1 and self.before != self.notes:
            raise CannotCapture(_difference(self.before, self.notes))
        return out

    def record(self) -> Any:
        """The step once more, noted and not done.  Nothing has happened if it is refused."""
        groups = [g for o, *_ in self.optimizers for g in o.groups]
        self.stream.synchronize()
        self.noting = True
        self.stream.begin_capture()
        try:
            out = self.run()
        except BaseException as e:
            for g in groups:
                for p in g.tensors.values():
                    p.grad = None
            try:
                self.stream.end_capture()
            except cupy.cuda.runtime.CUDARuntimeError:
                pass                                                             # spoilt by what is told here
            if not isinstance(e, (RuntimeError, TypeError)) or isinstance(e, CannotCapture):
                raise
            raise CannotCapture(_where(e)) from e
        finally:
            self.noting = False
        self.graph = self.stream.end_capture()
        return out

    def watch(self, opt: Optimizer) -> None:
        """An optimiser of this step, with what it updates."""
        self.optimizers.append((opt, opt.groups, [g.w for g in opt.groups]))

    def outdated(self) -> bool:
        """Whether what the graph updates is no longer what its optimisers would: one was started again, or has followed its tensors elsewhere."""
        for o, *_ in self.optimizers:
            o.reclaim_tensors()
        return any(o.groups is not groups or any(g.w is not w for g, w in zip(groups, values)) for o, groups, values in self.optimizers)


# ── arguments and results: tuples, lists and dicts of things ─────────────────────────────────────────────────────────
def mapped(tree: Any, f: Callable, *others: Any) -> Any:
    """f of every leaf (and of the leaves of others of the same form)."""
    if isinstance(tree, (tuple, list)):
        return type(tree)(mapped(a, f, *(o[i] for o in others)) for i, a in enumerate(tree))
    if isinstance(tree, dict):
        return {k: mapped(a, f, *(o[k] for o in others)) for k, a in tree.items()}
    return f(tree, *others)


def leaves(tree: Any) -> list:
    out: list = []
    mapped(tree, out.append)
    return out


def _kind(a: Any) -> Any:
    """What of an argument a graph is made for."""
    if isinstance(a, (np.ndarray, cupy.ndarray)):
        return a.dtype.str, a.shape
    return type(a).__name__ if isinstance(a, (float, np.random.Generator)) else a


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _difference(before: list, now: list) -> str:
    for (name, a), (other, b) in zip(before, now):
        if name != other:
            return f"this step does something else at each call: {name} before, {other} now"
        if a != b:
            one, two = next((x, y) for x, y in zip(a, b) if x != y)
            return (f"this step gives {name} another number at each call, which a replay could not: {one} before, {two} now.  Give what "
                    "changes to the step as an argument: a float for optimizer.step, a generator for dropout, arrays for all else")
    return f"this step does something else at each call: {len(before)} kernels before, {len(now)} now"


def _where(e: BaseException) -> str:
    """What was refused, and at which line of the step."""
    ours = (str(Path(array.__file__).parent), str(Path(cupy.__file__).parent))
    frames = [f for f in traceback.extract_tb(e.__traceback__) if f.filename.endswith(".py")]
    theirs = [f for f in frames if not f.filename.startswith(ours)] or frames
    said = str(e).splitlines()[0] if str(e) else type(e).__name__
    why = said
    if "D2H" in said or "StreamCapture" in said:
        why = "it reads a number from the device, or waits for it (float(), item(), asnumpy, a boolean mask as an index ...)"
    elif "H2D" in said:
        why = "it brings host data to the device: give that to the step as an argument"
    elif isinstance(e, NotImplementedError):
        why = "CuPy's own product cannot be captured: the kernels are off, or the dtypes differ"
    f = theirs[-1]
    return f"this step cannot be captured: {why}.  {Path(f.filename).name}, line {f.lineno}: {linecache.getline(f.filename, f.lineno).strip()}"

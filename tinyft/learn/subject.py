"""The learner's function as the laws call it: held to the signature, given copies, and watched while it runs.

The learner may use everything of the library except the answer itself: the target raises when the learner's file calls
it.
"""
from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from .. import array
from ..tensor import Tensor
from .diagnose import Unusable, described
from .exercise import Exercise
from .loading import Refused, Stop


class ReferenceUsed(Stop):
    """The learner's code called the function that it is to replace."""


class Changed(AssertionError):
    """The function wrote into its arguments."""


class Unchanged(AssertionError):
    """The function should write into an argument, and did not."""


# ── the signature ────────────────────────────────────────────────────────────────────────────────────────────────────
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def check_signature(exercise: Exercise, function: Callable) -> None:
    """Refused unless the learner's function has the library's arguments, in its order, with a default where it has one.

    The values of the defaults may differ.  Further arguments are allowed if they have defaults.
    """
    wanted = exercise.signature().parameters
    try:
        got = inspect.signature(function).parameters
    except (TypeError, ValueError):
        got = {}
    same_names = list(got)[:len(wanted)] == list(wanted)
    extra = [p for n, p in got.items() if n not in wanted and p.default is p.empty and p.kind not in VARIADIC]
    optional = [n for n, p in wanted.items() if p.default is not p.empty and n in got]
    lost_defaults = [n for n in optional if got[n].default is inspect.Parameter.empty]
    if not same_names or extra or lost_defaults:
        raise Refused(f"{exercise.function} takes {_listed(wanted)}; yours takes {_listed(got)}: "
                      "keep the names, their order and the defaults")


def _listed(parameters: Mapping[str, inspect.Parameter]) -> str:
    """(g, shape=None, ...)."""
    return f"({', '.join(name + _default(p) for name, p in parameters.items())})"


def _default(p: inspect.Parameter) -> str:
    if p.default is p.empty:
        return ""
    return f"={p.default!r}" if len(repr(p.default)) < 12 else "=..."


# ── the answer is closed ─────────────────────────────────────────────────────────────────────────────────────────────
@contextlib.contextmanager
def closed(exercise: Exercise, filename: str) -> Iterator[None]:
    """Within the `with`, the exercise's forbidden functions raise when the file of this name calls them.

    The library can still call them.  Modules that imported such a function by name get its guard too.
    """
    undo: list[tuple[Any, str, Any]] = []                # (module or class, name, what stood there)

    def replace(holder: Any, name: str, stub: Any) -> None:
        undo.append((holder, name, getattr(holder, name)))
        setattr(holder, name, stub)

    for target in exercise.forbidden:
        holder, name = exercise.owner(target)
        real = getattr(holder, name)
        stub = _guard(real, name, filename)
        definition = getattr(real, "definition", None)   # of an op: the function of arrays under @op
        if definition is not None:
            stub.definition = _guard(definition, name, filename)
        replace(holder, name, stub)
        for module in _library_modules():
            for other_name in [k for k, v in vars(module).items() if v is real]:
                replace(module, other_name, stub)
    try:
        yield
    finally:
        for holder, name, before in reversed(undo):
            setattr(holder, name, before)


def _library_modules() -> list[Any]:
    """The imported modules of tinyft, except this engine."""
    return [m for name, m in list(sys.modules.items())
            if name.split(".")[0] == "tinyft" and not name.startswith("tinyft.learn")]


def _guard(real: Callable, name: str, filename: str) -> Callable:
    """The library's function `name`, which raises ReferenceUsed if it is called from the file of this name."""
    @functools.wraps(real)
    def stub(*args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_code.co_filename == filename:
            raise ReferenceUsed(f"this calls the library's own {name}, which is the answer: write it out.  "
                                "The rest of tinyft is yours to use")
        return real(*args, **kwargs)
    return stub


# ── a call ───────────────────────────────────────────────────────────────────────────────────────────────────────────
class Subject:
    """The function under test.  Its arguments are copies on the backend in use, and must come out unchanged.

    An op is called as its definition: arrays -> (value, pullbacks).
    """

    def __init__(self, exercise: Exercise, function: Callable):
        """Refused, with the reason, if `function` cannot be checked, such as for its signature.

        function: the learner's answer; of an exercise in CUDA C, its text.
        """
        function = exercise.usable(function)
        if inspect.unwrap(function) is inspect.unwrap(exercise.reference()):
            raise Refused(f"this is the library's own {exercise.function}: write yours under that name")
        check_signature(exercise, function)
        self.exercise = exercise
        self.f = getattr(function, "definition", function)

    @classmethod
    def of_reference(cls, exercise: Exercise) -> Subject:
        """The library's own function as the subject, without the checks of `__init__`, which would refuse it."""
        made = cls.__new__(cls)
        made.exercise = exercise
        reference = exercise.reference()
        made.f = getattr(reference, "definition", reference)
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result of the function, called with copies of the arguments; of an op, the checked (value, pullbacks).

        Changed, an error, if it wrote to a copy; an in-place exercise gets the arguments themselves and may write.
        """
        args = [self._copy(a) for a in args]
        kwargs = {name: self._copy(a) for name, a in kwargs.items()}
        if self.exercise.in_place:
            return self._call_in_place(args, kwargs)
        named = self._by_name(args, kwargs)
        before = [_host(a) for _, a in named]
        out = self.f(*args, **kwargs)
        for (name, a), old in zip(named, before):
            if old is not None and not _unchanged(_host(a), old):
                raise Changed(f"it changed its argument {name}: compute a new array instead (x = x + 1, not x += 1)")
        return self._op_result(out, len(args)) if self.exercise.is_op else out

    def _by_name(self, args: list, kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
        """(name, argument) for all arguments of a call."""
        return [*zip(self.exercise.signature().parameters, args), *kwargs.items()]

    def _call_in_place(self, args: list, kwargs: dict[str, Any]) -> Any:
        """The result of a function that writes into its arguments.

        Unchanged, an error, if it left an array as it was into which the library's function writes.  Only plain
        arguments are watched: arrays, lists of arrays, numbers."""
        given = [*args, *kwargs.values()]
        if not all(map(_is_plain, given)):
            return self.f(*args, **kwargs)
        named = _arrays_by_name(self._by_name(args, kwargs))
        before = {name: _host(a) for name, a in named.items()}
        expected = self._written_by_library(args, kwargs)
        out = self.f(*args, **kwargs)
        for name in expected:
            if _unchanged(_host(named[name]), before[name]):
                variable = "g" if "[" in name else name
                raise Unchanged(f"{name} is unchanged: `{variable} = ...` makes a new array, which the caller does not "
                                f"see.  Write into the array itself: `{variable}[:] = ...` or `{variable} += ...`")
        return out

    def _written_by_library(self, args: list, kwargs: dict[str, Any]) -> list[str]:
        """The names of the arrays to which the library's function writes other values, for these arguments.

        Empty if it raises."""
        args, kwargs = copy.deepcopy((args, kwargs))
        named = _arrays_by_name(self._by_name(args, kwargs))
        before = {name: _host(a) for name, a in named.items()}
        reference = inspect.unwrap(self.exercise.reference())
        try:
            reference(*args, **kwargs)
        except Exception:
            return []
        return [name for name, a in named.items() if not _unchanged(_host(a), before[name])]

    def _copy(self, a: Any) -> Any:
        """An argument as the learner's function gets it.

        A NumPy array becomes a copy on the backend in use, or on NumPy if exercise.on_host.  Lists, dicts and
        generators are copied.  Anything else, and all arguments of an in-place exercise, are given as they are.
        """
        if self.exercise.in_place:
            return a
        if isinstance(a, np.ndarray) and not self.exercise.on_host:
            return array.asarray(a.copy())
        return copy.deepcopy(a) if isinstance(a, (np.ndarray, list, dict, np.random.Generator)) else a

    def _op_result(self, out: Any, inputs: int) -> tuple[Any, tuple]:
        """The (value, pullbacks) of an op.  Unusable, in one sentence, if the function returned something else.

        out: the result of the function.  inputs: the number of its arguments, each of which wants a pullback or None.
        """
        name = self.exercise.function
        if not (isinstance(out, tuple) and len(out) == 2):
            raise Unusable("an op gives back two things, its value and a tuple of pullbacks; "
                           f"yours gave {described(out)}")
        value, pullbacks = out
        if not array.is_array(value) and not isinstance(value, np.generic):
            raise Unusable(f"the value of {name} should be an array; yours is {described(value)}")
        is_sequence = isinstance(pullbacks, (tuple, list))
        hint = ": a tuple of one is written `(f,)`, with a comma" if callable(pullbacks) and inputs == 1 else ""
        if not is_sequence or len(pullbacks) < inputs or not all(p is None or callable(p) for p in pullbacks):
            plural = "s" if inputs > 1 else ""
            raise Unusable(f"the pullbacks of {name} should be a tuple of functions g -> gradient, one for each of the "
                           f"{inputs} input{plural} (None where there is no gradient); "
                           f"yours is {described(pullbacks)}{hint}")
        return value, tuple(None if p is None else _watched(p) for p in pullbacks)


def _watched(pullback: Callable) -> Callable:
    """The pullback, given copies of NumPy arrays as arrays of the backend in use, and called twice.

    The function that is returned raises Changed, an error, if the pullback wrote to g, and Unusable if it gives another
    result for the same g: backward may pull several times, and other nodes may hold the same g.
    """
    def call(g: Any) -> Any:
        given = array.asarray(g.copy()) if isinstance(g, np.ndarray) else g
        before = _host(given)
        first = pullback(given)
        result = _host(first)
        if before is None or result is None:
            return first
        if not _unchanged(_host(given), before):
            raise Changed("its pullback changed g, which other nodes may hold too: "
                          "compute a new array instead (g = g * p, not g *= p)")
        second = _host(pullback(given))
        if second is None or not _unchanged(second, result):
            raise Unusable("for one and the same g the pullback gives another result when it is called again: "
                           "does it write into an array that it keeps?")
        return first
    return call


def _host(a: Any) -> np.ndarray | None:
    """A copy of an array or tensor as a NumPy array; None for anything else."""
    a = a.data if isinstance(a, Tensor) else a
    return array.asnumpy(a).copy() if array.is_array(a) else None


def _is_plain(a: Any) -> bool:
    """True for an array, a number, text, None, and a list of these."""
    if isinstance(a, (list, tuple)):
        return all(map(_is_plain, a))
    return a is None or isinstance(a, (bool, int, float, str, np.generic)) or array.is_array(a)


def _arrays_by_name(named: list[tuple[str, Any]]) -> dict[str, Any]:
    """{name: array} of all arrays among the arguments; those in a list are named `gradients[0]`, ..."""
    found = {}
    for name, a in named:
        if array.is_array(a):
            found[name] = a
        elif isinstance(a, (list, tuple)):
            found |= {f"{name}[{i}]": entry for i, entry in enumerate(a) if array.is_array(entry)}
    return found


def _unchanged(now: np.ndarray, before: np.ndarray) -> bool:
    """True if two arrays have the same shape and values, NaN too."""
    return np.array_equal(now, before, equal_nan=before.dtype.kind == "f")

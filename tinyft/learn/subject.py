"""The learner's function: read from its file, held to the signature, watched while it is called.

Everything of the library is the learner's to use, but not the answer itself: the target raises when it is called from the learner's file.
"""
from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import inspect
import linecache
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import array
from ..tensor import OPS, Tensor
from .diagnose import Unusable, described
from .exercise import Exercise


class Refused(Exception):
    "The learner's function cannot be checked at all; the message says why in one sentence."


class Stop(BaseException):
    "Ends a check at once, past every `except Exception` in the learner's code."


class ReferenceUsed(Stop):
    "The learner's code called the function that it is to replace."


class Changed(AssertionError):
    "The function wrote into its arguments."


# ── reading the file ─────────────────────────────────────────────────────────────────────────────────────────────────
@functools.singledispatch
def load(exercise: Exercise, path: Path) -> Callable:
    "The function in the learner's file.  Refused, with the line, if the file cannot be read or holds no such function."
    name = f"{path.parent.name}/{path.name}"
    spec = importlib.util.spec_from_file_location(f"work_{exercise.name.replace('.', '_')}", path)
    module, ops, keep = importlib.util.module_from_spec(spec), dict(OPS), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    linecache.checkcache(str(path))
    try:
        spec.loader.exec_module(module)
    except SyntaxError as e:
        raise Refused(f"Python cannot read {name}: {e.msg}, line {e.lineno}" + (f"\n  {e.text.strip()}" if e.text else "")) from None
    except Stop:
        raise
    except (Exception, SystemExit) as e:
        raise Refused(f"{name} ends with {type(e).__name__}{f': {e}' if str(e) else ''} while it is read{said_at(e, str(path))}") from None
    finally:
        sys.dont_write_bytecode = keep
        OPS.clear()
        OPS.update(ops)                                                          # an @op of the learner's does not enter the table
    function = getattr(module, exercise.function, None)
    if not callable(function):
        mine = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        others = f", only {', '.join(mine)}" if mine else ""
        raise Refused(f"{name} has no function {exercise.function}{others}: the check calls it by that name")
    return function


def place(e: BaseException, filename: str) -> tuple[str, int] | None:
    "Where in the learner's file an exception came from: (file, line), of the innermost frame there, causes first."
    while e.__cause__ is not None:
        e = e.__cause__
    found, step = None, e.__traceback__
    while step:
        if step.tb_frame.f_code.co_filename == filename:
            found = (filename, step.tb_lineno)
        step = step.tb_next
    return found


def said_at(e: BaseException, filename: str) -> str:
    at = place(e, filename)
    return f"\n  {Path(at[0]).name}:{at[1]}   {linecache.getline(*at).strip()}" if at else ""


def fits(exercise: Exercise, function: Callable) -> None:
    "Refused unless it takes the reference's arguments."
    want = exercise.signature().parameters
    try:
        got = inspect.signature(function).parameters
    except (TypeError, ValueError):
        got = {}
    extra = [p for n, p in got.items() if n not in want and p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    optional = [n for n in want if want[n].default is not inspect.Parameter.empty and n in got and got[n].default is inspect.Parameter.empty]
    if list(got)[:len(want)] != list(want) or extra or optional:
        given = lambda p: "" if p.default is p.empty else f"={p.default!r}" if len(repr(p.default)) < 12 else "=..."
        show = lambda ps: f"({', '.join(n + given(p) for n, p in ps.items())})"
        raise Refused(f"{exercise.function} takes {show(want)}; yours takes {show(got)}: keep the names, their order and the defaults")


# ── the answer itself is closed ──────────────────────────────────────────────────────────────────────────────────────
@contextlib.contextmanager
def closed(exercise: Exercise, filename: str) -> Iterator[None]:
    "The exercise's target, and whatever else holds the answer, raise when called from this file.  The library goes on using them."
    undo: list[tuple[Any, str, Any]] = []

    def put(holder: Any, name: str, stub: Any) -> None:
        undo.append((holder, name, getattr(holder, name)))
        setattr(holder, name, stub)
    for target in exercise.shut:
        holder, name = exercise.owner(target)
        real = getattr(holder, name)
        stub = _guard(real, name, filename)
        if hasattr(real, "definition"):
            stub.definition = _guard(real.definition, name, filename)
        put(holder, name, stub)
        modules = [m for n, m in list(sys.modules.items()) if n.split(".")[0] == "tinyft" and not n.startswith("tinyft.learn")]
        for m in modules:
            for k in [k for k, v in vars(m).items() if v is real]:
                put(m, k, stub)
    try:
        yield
    finally:
        for holder, name, was in reversed(undo):
            setattr(holder, name, was)


def _guard(real: Callable, name: str, filename: str) -> Callable:
    @functools.wraps(real)
    def stub(*args: Any, **kw: Any) -> Any:
        if sys._getframe(1).f_code.co_filename == filename:
            raise ReferenceUsed(f"this calls the library's own {name}, which is the answer: write it out.  The rest of tinyft is yours to use")
        return real(*args, **kw)
    return stub


# ── calling it ───────────────────────────────────────────────────────────────────────────────────────────────────────
class Subject:
    """The function as the laws call it: arguments are copies on the backend in use, and must come out unchanged.

    An op is called as its definition: arrays -> (value, pullbacks)."""

    def __init__(self, exercise: Exercise, function: Callable):
        function = exercise.usable(function)
        if inspect.unwrap(function) is inspect.unwrap(exercise.reference()):
            raise Refused(f"this is the library's own {exercise.function}: write yours under that name")
        fits(exercise, function)
        self.exercise, self.f = exercise, getattr(function, "definition", function)

    @classmethod
    def of_reference(cls, exercise: Exercise) -> Subject:
        made = cls.__new__(cls)
        made.exercise, reference = exercise, exercise.reference()
        made.f = getattr(reference, "definition", reference)
        return made

    def __call__(self, *args: Any, **kw: Any) -> Any:
        mine, named = [self.put(a) for a in args], {k: self.put(a) for k, a in kw.items()}
        before = [(name, a, _host(a)) for name, a in self.names(mine, named)]
        out = self.f(*mine, **named)
        if not self.exercise.in_place:
            for name, a, was in before:
                if was is not None and not np.array_equal(_host(a), was, equal_nan=was.dtype.kind == "f"):
                    raise Changed(f"it changed its argument {name}: compute a new array instead (x = x + 1, not x += 1)")
        return self.op_result(out, len(mine)) if self.exercise.is_op else out

    def put(self, a: Any) -> Any:
        if self.exercise.in_place:
            return a
        if isinstance(a, np.ndarray) and not self.exercise.on_host:
            return array.asarray(a.copy())
        return copy.deepcopy(a) if isinstance(a, (np.ndarray, list, dict, np.random.Generator)) else a

    def names(self, args: list, kw: dict) -> list[tuple[str, Any]]:
        return [*zip(self.exercise.signature().parameters, args), *kw.items()]

    def op_result(self, out: Any, inputs: int) -> tuple[Any, tuple]:
        "An op's (value, pullbacks), or one sentence on what is no such thing."
        name = self.exercise.function
        if not (isinstance(out, tuple) and len(out) == 2):
            raise Unusable(f"an op gives back two things, its value and a tuple of pullbacks; yours gave {described(out)}")
        value, pulls = out
        if not array.is_array(value) and not isinstance(value, np.generic):
            raise Unusable(f"the value of {name} should be an array; yours is {described(value)}")
        if not isinstance(pulls, (tuple, list)) or len(pulls) < inputs or not all(p is None or callable(p) for p in pulls):
            raise Unusable(f"the pullbacks of {name} should be a tuple of functions g -> gradient, one for each of the {inputs} inputs "
                           f"(None where there is no gradient); yours is {described(pulls)}")
        return value, tuple(p and _on_backend(p) for p in pulls)


def _on_backend(pull: Callable) -> Callable:
    return lambda g: pull(array.asarray(g) if isinstance(g, np.ndarray) else g)


def _host(a: Any) -> np.ndarray | None:
    a = a.data if isinstance(a, Tensor) else a
    return array.asnumpy(a).copy() if array.is_array(a) else None

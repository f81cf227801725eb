"""Laws run on a function: ever larger inputs until one fails, the smallest input that does, and what it says about the error."""
from __future__ import annotations

import contextlib
import io
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, Verbosity, errors, given, settings
from hypothesis import seed as seeded

from .. import array, kernels
from . import sizes
from .diagnose import Mismatch, Unusable, diagnose
from .exercise import Exercise, Law
from .show import Outcome, Problem, said_inputs, said_pair
from .subject import Changed, ReferenceUsed, Refused, Stop, Subject, closed, load, place, said_at

ONE_CALL, ONE_LAW = 2.0, 5.0                                                     # seconds: what runs longer is cut off
LEARNER = settings(
    derandomize=True,                                                            # the same input fails until the code changes
    database=None, deadline=None, print_blob=False, verbosity=Verbosity.quiet,
    report_multiple_bugs=False,                                                  # one at a time
    phases=(Phase.explicit, Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck))


class TooLong(Stop):
    "A call that does not come back."


class Enough(Stop):
    "The time for one law is over: the smallest failing input so far will do."


# ── a whole exercise ─────────────────────────────────────────────────────────────────────────────────────────────────
def check_file(exercise: Exercise, path: Path) -> Iterator[Outcome]:
    "The laws of an exercise on the function in a file, up to the first that fails."
    yield from _check(exercise, str(path.resolve()) if exercise.suffix == ".py" else "", lambda: load(exercise, path.resolve()))


def check_here(exercise: Exercise, function: Callable) -> Iterator[Outcome]:
    "The same on a function of this process."
    code = getattr(getattr(function, "definition", function), "__code__", None)
    yield from _check(exercise, code.co_filename if code else "", lambda: function)


def _check(exercise: Exercise, filename: str, get: Callable[[], Callable]) -> Iterator[Outcome]:
    printed = Printed()
    with kernels.definitions(), closed(exercise, filename):
        try:
            with captured(printed), limited(ONE_CALL):
                function = get()
            subject = Subject(exercise, function)
        except (Refused, Stop) as e:
            yield Outcome("", Problem("refused", message=f"{e}{said_at(e, filename) if isinstance(e, Stop) else ''}", printed=printed.lines()))
            return
        for law in exercise.laws:
            outcome = run(law, subject, filename)
            yield outcome
            if outcome.problem:
                return


def run(law: Law, subject: Subject, filename: str = "", seed: int | None = None, shrink: bool = True) -> Outcome:
    "One law.  Without a seed the inputs are the same every time.  shrink=False only asks whether it holds, with inputs of middle size."
    trial = Trial(law, subject, filename, seed, shrink)
    return Outcome(law.title, trial.search(), time.monotonic() - trial.start)


class Trial:
    "The search for the smallest input that breaks a law."

    def __init__(self, law: Law, subject: Subject, filename: str = "", seed: int | None = None, shrink: bool = True):
        self.law, self.subject, self.filename, self.seed, self.shrink = law, subject, filename, seed, shrink
        self.start, self.tried, self.limit = time.monotonic(), 0, 0
        self.inputs: dict[str, Any] = {}
        self.failed: tuple[BaseException, dict, Printed] | None = None
        self.mismatches: list[Mismatch] = []

    def search(self) -> Problem | None:
        for largest, examples in sizes.GROWING if self.shrink else sizes.GROWING[1:2]:
            self.limit = largest
            sizes.limit(largest)
            try:
                self.explore(examples, self.once)
            except errors.Flaky:
                return self.unsteady()
            except Enough:
                return self.problem()
            except Stop as e:
                return self.problem(e)
            except (Exception, SystemExit):
                if not self.failed:                                              # the engine's own fault
                    raise
                if not self.same_again():
                    return self.unsteady()
                if self.shrink:
                    self.more_mismatches()
                return self.problem()
        return None

    def explore(self, examples: int, test: Callable[[tuple], None]) -> None:
        def law(drawn: tuple) -> None:
            test(drawn)
        law.__qualname__ = law.__name__ = "".join(c if c.isascii() and c.isalnum() else "_" for c in f"{self.subject.exercise.name} {self.law.title}")
        phases = LEARNER.phases if self.shrink else LEARNER.phases[:2]
        conf = settings(LEARNER, max_examples=examples, phases=phases, derandomize=self.seed is None)
        wrapped = given(sizes.draws(self.law.inputs))(law)
        conf(wrapped if self.seed is None else seeded(self.seed)(wrapped))()

    def once(self, drawn: tuple) -> None:
        "The law on one input."
        self.inputs, letters = drawn
        self.tried += 1
        if time.monotonic() - self.start > ONE_LAW:
            raise Enough if self.failed else TooLong(f"after {ONE_LAW:g} seconds only {self.tried} small inputs are done: far too slow")
        printed = Printed()
        try:
            with captured(printed), limited(ONE_CALL):
                self.law.test(self.subject, **self.inputs)
        except BaseException as e:
            if isinstance(e, Mismatch):
                e.sizes = letters
                self.mismatches.append(e)
            self.failed = e, self.inputs, printed
            raise

    def same_again(self) -> bool:
        "Does the input that failed fail in the same way once more?"
        error, inputs, _ = self.failed
        try:
            with captured(Printed()), limited(ONE_CALL):
                self.law.test(self.subject, **inputs)
        except Mismatch as e:
            return isinstance(error, Mismatch) and np.array_equal(e.got, error.got, equal_nan=e.got.dtype.kind == "f")
        except TooLong:
            return True                                                          # a slow moment of the machine is no other answer
        except (Exception, SystemExit) as e:
            return type(e) is type(error)
        return False

    def more_mismatches(self) -> None:
        "What else fails, at larger sizes: it tells 1/2 from 1/n.  The one that is shown stays last."
        if not self.failed or not isinstance(self.failed[0], Mismatch):
            return
        shown, found = self.failed, []

        def note(drawn: tuple) -> None:
            with contextlib.suppress(Exception, SystemExit, TooLong, Enough):
                self.once(drawn)
            if self.failed is not shown and isinstance(self.failed[0], Mismatch):
                found.append(self.failed[0])
        tried = self.tried
        for n in (2, 4):
            sizes.limit(n)
            with contextlib.suppress(Exception):
                self.explore(12, note)
        self.failed, self.tried, self.mismatches = shown, tried, [*found, shown[0]]

    # what came out
    def shown(self) -> list[tuple[str, str]]:
        return said_inputs(self.failed[1] if self.failed else self.inputs)

    def unsteady(self) -> Problem:
        return Problem("returned", self.shown(), "for one and the same input it gives different answers: does it draw random numbers of its own, "
                       "or keep something from call to call?", tried=self.tried)

    def problem(self, stop: Stop | None = None) -> Problem:
        "The failure in words."
        e, _, printed = self.failed or (stop, {}, Printed())
        e = stop or e
        common = dict(inputs=self.shown(), printed=printed.lines(), tried=self.tried, size=self.limit)
        if isinstance(e, NotImplementedError) and (place(e, self.filename) or not self.filename):
            return Problem("unwritten", message="not written yet")
        if isinstance(e, ReferenceUsed):
            return Problem("refused", message=f"{e}{said_at(e, self.filename)}", printed=printed.lines())
        if isinstance(e, TooLong):
            return Problem("stopped", message=f"{e}{said_at(e, self.filename)}", **common)
        if isinstance(e, Mismatch):
            yours, expected = said_pair(e)
            return Problem("mismatch", message=e.what, yours=yours, expected=expected, diagnosis=diagnose(self.mismatches or [e]), **common)
        if isinstance(e, (Unusable, Changed)):
            return Problem("returned", message=str(e), **common)
        if place(e, self.filename) is None and self.filename:
            return Problem("raised", message=f"the check cannot use what your function gives back: {type(e).__name__}: {e}", **common)
        while e.__cause__ is not None:
            e = e.__cause__
        elsewhere = array.backend() != "numpy"
        there = f"\nThe arrays are on the backend {array.backend()!r}: xp(x).exp(x) takes the place of np.exp(x)" if elsewhere else ""
        return Problem("raised", message=f"{type(e).__name__}{f': {e}' if str(e) else ''}{said_at(e, self.filename)}{there}", **common)


# ── what surrounds a call ────────────────────────────────────────────────────────────────────────────────────────────
class Printed(io.StringIO):
    "What was printed, of which the first part is kept; and the warnings."
    KEEP = 4000

    def __init__(self) -> None:
        super().__init__()
        self.lost, self.warned = 0, []

    def write(self, s: str) -> int:
        room = max(self.KEEP - self.tell(), 0)
        self.lost += max(len(s) - room, 0)
        super().write(s[:room])
        return len(s)

    def lines(self) -> list[str]:
        said = [f"{w.category.__name__}: {w.message}   {Path(w.filename).name}:{w.lineno}" for w in self.warned[:3]]
        return [*self.getvalue().splitlines()[:20], *([f"... and {self.lost:,} more characters"] if self.lost else []), *said]


@contextlib.contextmanager
def captured(printed: Printed) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        warnings.simplefilter("default")
        try:
            yield
        finally:
            printed.warned = list(caught)


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    "TooLong, raised in the line that is running, after so many seconds.  Where there is no such alarm, the parent process has the last word."
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise TooLong(f"it was still running after {seconds:g} seconds: an endless loop?")
    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)                           # again and again: what is raised in a callback is lost
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def use_backend(name: str) -> None:
    "Run what follows on another backend.  ValueError, with the reason, where it cannot be."
    try:
        array.use(name)
    except array.BackendError as e:
        raise ValueError(str(e)) from None

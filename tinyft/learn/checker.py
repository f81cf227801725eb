"""Laws checked on a function: ever larger inputs until one fails, then the smallest input that fails, and a diagnosis.
"""
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
from .loading import Refused, Stop, in_words, place, quoted_line, shortened
from .show import Outcome, Problem, inputs_as_text, pair_as_text
from .subject import Changed, ReferenceUsed, Subject, Unchanged, closed

ONE_CALL = 2.0                                           # seconds of computing after which one call is cut off
ONE_LAW = 5.0                                            # seconds of computing after which the search for one law ends
PATIENCE = 4                                             # times as long by the clock, if a call only waits
SEARCH_ONLY = (Phase.explicit, Phase.generate)
LEARNER = settings(
    derandomize=True,                                    # the same input fails until the code changes
    database=None, deadline=None, print_blob=False, verbosity=Verbosity.quiet,
    report_multiple_bugs=False,                          # one error at a time
    phases=(*SEARCH_ONLY, Phase.shrink), suppress_health_check=list(HealthCheck))


class TooLong(Stop):
    """Raised when a call, or the small inputs together, take too long."""


class Enough(Stop):
    """Raised when the time for one law is over and an input has failed: the smallest one so far is reported."""


# ── a whole exercise ─────────────────────────────────────────────────────────────────────────────────────────────────
def check_file(exercise: Exercise, path: Path) -> Iterator[Outcome]:
    """The outcomes of an exercise's laws on the function in a file, up to the first law that fails."""
    path = path.resolve()
    filename = str(path) if exercise.suffix == ".py" else ""
    yield from _check(exercise, filename, lambda: exercise.load(path))


def check_here(exercise: Exercise, function: Callable) -> Iterator[Outcome]:
    """The outcomes of an exercise's laws on a function of this process, up to the first law that fails."""
    code = getattr(getattr(function, "definition", function), "__code__", None)
    yield from _check(exercise, code.co_filename if code else "", lambda: function)


def _check(exercise: Exercise, filename: str, get: Callable[[], Callable]) -> Iterator[Outcome]:
    """The outcomes of an exercise's laws, up to the first law that fails.

    get: returns the learner's function, such as by running his file.  If that fails, the one outcome, without a title,
    says why.  filename: the learner's file, whose lines are quoted and may not call the library's answer; "" if there
    is none.  Meanwhile every op of tinyft runs as its definition, without faster kernels.
    """
    printed = Printed()
    with kernels.definitions(), closed(exercise, filename):
        try:
            with captured(printed), limited(ONE_CALL):
                function = get()
            subject = Subject(exercise, function)
        except Refused as e:
            yield Outcome("", Problem("refused", message=str(e), printed=printed.lines()))
            return
        except Stop as e:
            yield Outcome("", Problem("refused", message=f"{e}{quoted_line(e, filename)}", printed=printed.lines()))
            return
        for law in exercise.laws:
            outcome = run(law, subject, filename)
            yield outcome
            if outcome.problem:
                return


def run(law: Law, subject: Subject, filename: str = "", seed: int | None = None, shrink: bool = True) -> Outcome:
    """Check one law on the subject, the function under test.

    filename: the learner's file, of which errors quote a line; "" if there is none.
    seed: of the random inputs.  With None the inputs are the same every time.
    shrink: False to learn only if the law holds: inputs of one size, no search for the smallest input, no diagnosis
    from further failures.
    """
    start = time.monotonic()
    trial = Trial(law, subject, filename, seed, shrink)
    problem = trial.search()
    printed = trial.printed.lines() if problem is None else []
    return Outcome(law.title, problem, time.monotonic() - start, printed)


class Trial:
    """The search for the smallest input that breaks a law.

    failed: (exception, inputs, output) of the last input that failed, the smallest so far.
    printed: the output for the last input that was tried.
    mismatches: every comparison that failed, for the diagnosis.
    """

    def __init__(self, law: Law, subject: Subject, filename: str = "", seed: int | None = None, shrink: bool = True):
        """The arguments are those of `run`."""
        self.law = law
        self.subject = subject
        self.filename = filename
        self.seed = seed
        self.shrink = shrink
        self.start = time.process_time()                 # a machine may be busy with something else
        self.tried = 0                                   # number of inputs tried
        self.largest = 0                                 # size of the inputs that are being tried
        self.inputs: dict[str, Any] = {}                 # those being tried
        self.failed: tuple[BaseException, dict, Printed] | None = None
        self.mismatches: list[Mismatch] = []
        self.printed = Printed()

    def search(self) -> Problem | None:
        """The problem with the smallest input that was found; None if the law holds.

        The largest size grows from round to round, so the first input that fails is small; Hypothesis makes it smaller.
        """
        rounds = sizes.GROWING if self.shrink else sizes.QUICK
        for largest, examples in rounds:
            self.largest = largest
            sizes.limit(largest)
            try:
                self._explore(examples, self._once)
            except errors.Flaky:                         # Hypothesis: one input failed, and passed when repeated
                return self._unsteady()
            except Enough:                               # the time is over, and an input has failed
                return self._problem()
            except Stop as e:                            # a call took too long, or called the library's answer
                return self._problem(e)
            except (Exception, SystemExit):
                if not self.failed:                      # an error of this engine
                    raise
                if not self.same_again():
                    return self._unsteady()
                if self.shrink:
                    self._collect_mismatches()
                return self._problem()
        return None

    def _explore(self, examples: int, test: Callable[[tuple], None]) -> None:
        """Run `test` on at most `examples` drawn inputs with Hypothesis, until it raises.

        With self.shrink, Hypothesis then runs it on ever simpler inputs, and raises for the simplest that fails.
        """
        def law(drawn: tuple) -> None:
            test(drawn)
        # Hypothesis derives its random numbers from the name, so every law gets a name of its own.
        title = f"{self.subject.exercise.name} {self.law.title}"
        law.__name__ = "".join(c if c.isascii() and c.isalnum() else "_" for c in title)
        law.__qualname__ = law.__name__
        phases = LEARNER.phases if self.shrink else SEARCH_ONLY
        configure = settings(LEARNER, max_examples=examples, phases=phases, derandomize=self.seed is None)
        wrapped = given(sizes.draws(self.law.inputs))(law)
        if self.seed is not None:
            wrapped = seeded(self.seed)(wrapped)
        configure(wrapped)()

    def _once(self, drawn: tuple) -> None:
        """Test the law on drawn inputs.  drawn: (inputs, size of each letter of their shapes).

        What the law raises is stored in self.failed and raised again, for Hypothesis.  After ONE_LAW seconds the search
        ends: Enough if an input has failed, else TooLong.
        """
        self.inputs, letter_sizes = drawn
        self.tried += 1
        if time.process_time() - self.start > ONE_LAW:
            if self.failed:
                raise Enough
            raise TooLong(f"after {ONE_LAW:g} seconds only {self.tried} small inputs are done: far too slow")
        printed = Printed()
        self.printed = printed
        try:
            with captured(printed), limited(ONE_CALL):
                self.law.test(self.subject, **self.inputs)
        except BaseException as e:
            if isinstance(e, Mismatch):
                e.sizes = letter_sizes
                self.mismatches.append(e)
            self.failed = (e, self.inputs, printed)
            raise

    def same_again(self) -> bool:
        """True if the input that failed fails once more: with the same wrong result, or an error of the same type."""
        error, inputs, _ = self.failed
        try:
            with captured(Printed()), limited(ONE_CALL):
                self.law.test(self.subject, **inputs)
        except Mismatch as e:
            is_float = e.got.dtype.kind == "f"
            return isinstance(error, Mismatch) and np.array_equal(e.got, error.got, equal_nan=is_float)
        except TooLong:
            return True                                  # the machine was slow: the function may still give that answer
        except (Exception, SystemExit) as e:
            return type(e) is type(error)
        return False

    def _collect_mismatches(self) -> None:
        """Collect failures at larger sizes in self.mismatches: they tell a missing factor 1/2 from 1/n.

        The failure to report stays the last one; self.failed and self.tried stay as they are.
        """
        if not self.failed or not isinstance(self.failed[0], Mismatch):
            return
        reported = self.failed
        tried = self.tried
        found = []

        def collect(drawn: tuple) -> None:
            with contextlib.suppress(Exception, SystemExit, TooLong, Enough):
                self._once(drawn)
            if self.failed is not reported and isinstance(self.failed[0], Mismatch):
                found.append(self.failed[0])

        for n in (2, 4):
            sizes.limit(n)
            with contextlib.suppress(Exception):
                self._explore(12, collect)                   # 12 inputs of sizes up to n
        self.failed = reported
        self.tried = tried
        self.mismatches = [*found, reported[0]]

    # ── in words ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def _inputs_as_text(self) -> list[tuple[str, str]]:
        return inputs_as_text(self.failed[1] if self.failed else self.inputs)

    def _unsteady(self) -> Problem:
        return Problem("returned", self._inputs_as_text(),
                       "for one and the same input it gives different answers: does it draw random numbers of its own, "
                       "or keep something from call to call?", tried=self.tried)

    def _problem(self, stop: Stop | None = None) -> Problem:
        """The failure in words.  stop: the exception that ended the search, if it was not the failure of a law.

        place(e, filename) is None for an exception without a line in the learner's file.
        """
        e, _, printed = self.failed or (stop, {}, Printed())
        e = stop or e
        if isinstance(e, NotImplementedError) and (place(e, self.filename) or not self.filename):   # the skeleton
            return Problem("unwritten", message="not written yet")
        if isinstance(e, ReferenceUsed):
            return Problem("refused", message=f"{e}{quoted_line(e, self.filename)}", printed=printed.lines())
        common = dict(inputs=self._inputs_as_text(), printed=printed.lines(), tried=self.tried, size=self.largest)
        if isinstance(e, TooLong):
            return Problem("stopped", message=f"{e}{quoted_line(e, self.filename)}", **common)
        if isinstance(e, Mismatch):
            yours, expected = pair_as_text(e)
            sentence = diagnose(self.mismatches or [e])
            return Problem("mismatch", message=e.what, yours=yours, expected=expected, diagnosis=sentence, **common)
        if isinstance(e, (Unusable, Changed, Unchanged)):
            return Problem("returned", message=shortened(str(e)), **common)
        if place(e, self.filename) is None and self.filename:            # the law raised it, on the learner's result
            message = f"the check cannot use what your function gives back: {in_words(e)}"
            return Problem("raised", message=message, **common)
        while e.__cause__ is not None:
            e = e.__cause__
        message = f"{in_words(e)}{quoted_line(e, self.filename)}"
        if array.backend() != "numpy":
            message += f"\nThe arrays are on the backend {array.backend()!r}: xp(x).exp(x) takes the place of np.exp(x)"
        return Problem("raised", message=message, **common)


# ── around a call ────────────────────────────────────────────────────────────────────────────────────────────────────
class Printed(io.StringIO):
    """The beginning of the text that a call printed, and its warnings."""
    KEEP = 4000

    def __init__(self) -> None:
        super().__init__()
        self.lost = 0
        self.warned: list[warnings.WarningMessage] = []

    def write(self, s: str) -> int:
        """Keep the first KEEP characters and count the others."""
        room = max(self.KEEP - self.tell(), 0)
        self.lost += max(len(s) - room, 0)
        super().write(s[:room])
        return len(s)

    @property
    def buffer(self) -> BytesPrinted:
        """The stream of bytes below, as of sys.stdout: sys.stdout.buffer.write(b"...")."""
        return BytesPrinted(self)

    def lines(self) -> list[str]:
        """At most 20 lines of the text, a line with the number of characters not kept, and at most three warnings."""
        found = self.getvalue().splitlines()[:20]
        if self.lost:
            found.append(f"... and {self.lost:,} more characters")
        for w in self.warned[:3]:
            found.append(f"{in_words(w.message)}   {Path(w.filename).name}:{w.lineno}")
        return found


class BytesPrinted(io.RawIOBase):
    """Bytes that are printed, as text at the end of `printed`."""

    def __init__(self, printed: Printed):
        self.printed = printed

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        return self.printed.write(bytes(data).decode("utf-8", "replace"))


@contextlib.contextmanager
def captured(printed: Printed) -> Iterator[None]:
    """Inside the `with`, standard output and standard error go to `printed`; warnings are in printed.warned after it.
    """
    with (warnings.catch_warnings(record=True) as caught,
          contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed)):
        warnings.simplefilter("default")
        try:
            yield
        finally:
            printed.warned = list(caught)


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Inside the `with`, raise TooLong in the line that is running after so many seconds.

    These are seconds of processor time, so that a busy machine ends no right answer. A call that only waits is ended
    after PATIENCE times as many seconds by the clock.

    Only the main thread of a Unix process has such an alarm. Elsewhere nothing happens here; the parent process ends
    the check (isolated.py).
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    processor, clock = time.process_time(), time.monotonic()

    def ring(number: int, frame: Any) -> None:
        is_starved = time.process_time() - processor < 0.9 * seconds
        if is_starved and time.monotonic() - clock < PATIENCE * seconds:
            return                                       # the alarm rings again in half a second
        raise TooLong(f"it was still running after {seconds:g} seconds: an endless loop?")

    old = signal.signal(signal.SIGALRM, ring)
    # The alarm repeats also because an exception raised inside a callback of C code is lost.
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def use_backend(name: str) -> None:
    """Use another backend from now on.  ValueError, with the reason, where it cannot be used."""
    try:
        array.use(name)
    except array.BackendError as e:
        raise ValueError(str(e)) from None

"""Tests of the exercises: the reference passes, the skeleton is "not written", every wrong answer is caught and
explained.
"""
from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

from .. import kernels
from .checker import check_file, run
from .exercise import Exercise, Law, WrongAnswer
from .show import Outcome, Page
from .subject import Subject


def examine(exercise: Exercise, seeds: int = 2) -> list[str]:
    """The faults of an exercise, in sentences; [] if there are none, or if this machine cannot check it (no compiler).

    Its laws must hold for the library's own function, tried with this number of random seeds; they must catch and
    explain every wrong answer, a subtle one by a single law; and the file of `tinyft start` must be "not written".
    """
    if exercise.missing:
        return []
    found = []
    few = len(exercise.hints) != 3 or len(exercise.laws) < 3 or len(exercise.wrong_answers) < 3
    if few or not 1 <= exercise.difficulty <= 5:
        found.append("it wants a difficulty of 1-5, three hints, and at least three laws and three wrong answers")
    if not any(wrong.subtle for wrong in exercise.wrong_answers):
        found.append("no wrong answer is subtle: one that breaks a single law")
    with kernels.definitions():
        for seed in random.sample(range(2**32), seeds):
            found += examine_reference(exercise, seed)
        for wrong in exercise.wrong_answers:
            found += examine_wrong(exercise, wrong)
    return found + examine_skeleton(exercise)


def examine_reference(exercise: Exercise, seed: int) -> list[str]:
    """A fault, in a sentence, for each law that the library's own function breaks; [] as it should be.  seed: of the
    inputs.
    """
    found = []
    for law in exercise.laws:
        problem = run(law, Subject.of_reference(exercise), seed=seed).problem
        if problem:
            found.append(f"the library's own function breaks {law.title!r} (seed {seed}): "
                         f"{problem.message} {problem.diagnosis} {problem.inputs}")
    return found


def examine_wrong(exercise: Exercise, wrong: WrongAnswer) -> list[str]:
    """The faults in how a wrong answer is caught, in sentences; [] if there are none.

    At least one law must break, at a size of at most wrong.size, with a diagnosis that contains wrong.says.  A subtle
    wrong answer must break exactly one law.
    """
    filename = wrong.function.__code__.co_filename if callable(wrong.function) else ""

    def break_law(law: Law, shrink: bool) -> Outcome | None:
        outcome = run(law, Subject(exercise, wrong.function), filename, shrink=shrink)
        return outcome if outcome.problem else None

    broken = []                                          # the laws that it breaks; only a subtle one tries them all
    for law in exercise.laws:
        if break_law(law, shrink=False):                 # quick: inputs of size 2
            broken.append(law)
            if not wrong.subtle:
                break
    examined = broken[:1] or exercise.laws
    first = next(filter(None, (break_law(law, shrink=True) for law in examined)), None)
    if first is None:
        return [f"{wrong.belief!r} is not caught"]
    found = []
    title = first.title
    problem = first.problem
    text = f"{problem.message} {problem.diagnosis}"
    if problem.size > wrong.size:
        found.append(f"{wrong.belief!r} is caught only at size {problem.size}, by {title!r}")
    if wrong.says not in text:
        found.append(f"{wrong.belief!r}: the diagnosis does not say {wrong.says!r}, but: {title!r}: {text}")
    if wrong.subtle and len(broken) != 1:
        titles = ", ".join(repr(law.title) for law in broken)
        found.append(f"{wrong.belief!r} is no subtle error: it breaks {titles or 'none at size 2'}")
    return found


def examine_skeleton(exercise: Exercise) -> list[str]:
    """[the fault] if the check of the file that `tinyft start` writes does not end with "not written"; else []."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{exercise.name}{exercise.suffix}"
        path.write_text(exercise.skeleton(), encoding="utf-8")
        outcomes = list(check_file(exercise, path))
    kinds = [o.problem.kind if o.problem else "passed" for o in outcomes]
    if kinds == ["unwritten"]:
        return []
    return [f"its skeleton is not reported as not written, but as {kinds}: {outcomes[-1].problem}"]


def selftest(chosen: list[Exercise], page: Page) -> bool:
    """Examine exercises, and print one line for each, its faults, and the totals.  True if none has a fault.

    An exercise that this machine cannot check (no compiler) is listed with the reason, and is no fault.
    """
    start = time.monotonic()
    faulty = 0
    for e in chosen:
        if e.missing:
            page.line(f"  {page.sign('todo')} {e.name:<28} {e.missing}")
            continue
        begun = time.monotonic()
        found = examine(e)
        faulty += bool(found)
        sign = page.sign("wrong" if found else "right")
        seconds = page.paint(f"({time.monotonic() - begun:.1f}s)", "faint")
        page.line(f"  {sign} {e.name:<28} {len(e.laws)} laws, {len(e.wrong_answers)} wrong answers caught  {seconds}")
        for sentence in found:
            page.block(sentence, 6)
    examined = [e for e in chosen if not e.missing]
    wrong_answers = sum(len(e.wrong_answers) for e in examined)
    verdict = f"; {faulty} not in order" if faulty else ""
    seconds = time.monotonic() - start
    page.line(f"\n  {len(examined)} exercises, {wrong_answers} wrong answers, {seconds:.1f} s{verdict}")
    return not faulty

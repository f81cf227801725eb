"""Are the exercises themselves right?  The reference passes, the skeleton is not written, every wrong answer is caught and explained."""
from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

from .. import kernels
from .checker import check_file, run
from .exercise import Exercise, Wrong
from .show import Outcome, Page
from .skeleton import skeleton
from .subject import Subject

CAUGHT_AT = 2                                                                    # the largest size a wrong answer may need


def examine(exercise: Exercise, seeds: int = 3) -> list[str]:
    "What is wrong with an exercise, in sentences; [] if nothing is."
    if exercise.missing:
        return []
    found = []
    if not 1 <= exercise.difficulty <= 5 or len(exercise.hints) != 3 or len(exercise.laws) < 3 or len(exercise.wrong) < 3:
        found.append("it wants a difficulty of 1-5, three hints, three laws and three wrong answers at least")
    if not any(w.subtle for w in exercise.wrong):
        found.append("no wrong answer is subtle: one that breaks a single law")
    with kernels.definitions():
        reference = Subject.of_reference(exercise)
        for seed in random.sample(range(2**32), seeds):
            for law in exercise.laws:
                if problem := run(law, reference, seed=seed).problem:
                    found.append(f"the library's own function breaks {law.title!r} (seed {seed}): {problem.message} {problem.diagnosis} "
                                 f"{problem.inputs}")
        for wrong in exercise.wrong:
            found += examine_wrong(exercise, wrong)
    return found + examine_skeleton(exercise)


def examine_wrong(exercise: Exercise, wrong: Wrong) -> list[str]:
    broken: list[Outcome] = []
    for law in exercise.laws:
        filename = wrong.function.__code__.co_filename if callable(wrong.function) else ""
        outcome = run(law, Subject(exercise, wrong.function), filename, shrink=not broken)
        broken += [outcome] if outcome.problem else []
        if broken and not wrong.subtle:
            break
    if not broken:
        return [f"{wrong.belief!r} is not caught"]
    found, first = [], broken[0].problem
    if first.size > CAUGHT_AT:
        found.append(f"{wrong.belief!r} is caught only at size {first.size}, by {broken[0].title!r}")
    if wrong.says not in (said := f"{first.message} {first.diagnosis}"):
        found.append(f"{wrong.belief!r}: the diagnosis does not say {wrong.says!r}, but: {broken[0].title!r}: {said}")
    if wrong.subtle and len(broken) != 1:
        found.append(f"{wrong.belief!r} is no subtle error: it breaks {', '.join(repr(b.title) for b in broken)}")
    return found


def examine_skeleton(exercise: Exercise) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{exercise.name}{exercise.suffix}"
        path.write_text(skeleton(exercise), encoding="utf-8")
        outcomes = list(check_file(exercise, path))
    kinds = [o.problem.kind if o.problem else "passed" for o in outcomes]
    return [] if kinds == ["unwritten"] else [f"its skeleton is not reported as not written, but as {kinds}: {outcomes[-1].problem}"]


def selftest(chosen: list[Exercise], page: Page) -> bool:
    "Examine exercises, one line for each.  True if nothing is wrong."
    start, bad = time.monotonic(), 0
    for e in chosen:
        if e.missing:
            page.line(f"  {page.sign('todo')} {e.name:<28} {e.missing}")
            continue
        begun, found = time.monotonic(), examine(e)
        bad += bool(found)
        page.line(f"  {page.sign('wrong' if found else 'right')} {e.name:<28} {len(e.laws)} laws, {len(e.wrong)} wrong answers caught  "
                  + page.paint(f"({time.monotonic() - begun:.1f}s)", "faint"))
        for sentence in found:
            page.block(sentence, 6)
    chosen = [e for e in chosen if not e.missing]
    page.line(f"\n  {len(chosen)} exercises, {sum(len(e.wrong) for e in chosen)} wrong answers, {time.monotonic() - start:.1f} s"
              + (f"; {bad} not in order" if bad else ""))
    return not bad

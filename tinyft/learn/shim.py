"""The checks as pytest tests, for work/test_exercises.py: one test for each law of each exercise that was started."""
from __future__ import annotations

import io
from functools import cache
from pathlib import Path

from .checker import check_file
from .exercise import find
from .show import Outcome, Page
from .work import Work


@cache
def _outcomes(exercise: str, path: Path, modified: int) -> list[Outcome]:
    """The outcomes of one version of a file: `modified` is its time of modification."""
    return list(check_file(find(exercise), path))


def laws(file: str) -> list[tuple[str, str]]:
    """(exercise, law) of every exercise started in the folder of this file."""
    started = Work(Path(file).parent).started()
    return [(e.name, law.title) for e in reversed(started) for law in e.laws]


def verify(file: str, exercise: str, law: str) -> None:
    """Body of one pytest test: pass if the law holds, fail with the text of `tinyft check` if it does not.

    Skipped if nothing is written, or if an earlier law does not hold.  file: any file in the folder of exercises.
    exercise: its name.  law: its title.  An outcome without a title means that the file cannot be checked at all.
    """
    import pytest
    e = find(exercise)
    path = Work(Path(file).parent).path(e)
    for outcome in _outcomes(exercise, path, path.stat().st_mtime_ns):
        problem = outcome.problem
        if problem and problem.kind == "unwritten":
            pytest.skip("not written yet")
        if problem and outcome.title in ("", law):
            page = Page(io.StringIO())
            page.problem(e, outcome.title, problem)
            pytest.fail(page.out.getvalue(), pytrace=False)
        if outcome.title == law:
            return
    pytest.skip("an earlier law does not hold yet")

"""The checks as pytest tests: what work/test_exercises.py calls.  One test for each law of each exercise that was started."""
from __future__ import annotations

import io
from functools import cache
from pathlib import Path

from .checker import check_file
from .exercise import find
from .show import Outcome, Page
from .work import Work


@cache
def _outcomes(exercise: str, path: Path, changed: int) -> list[Outcome]:
    return list(check_file(find(exercise), path))


def laws(file: str) -> list[tuple[str, str]]:
    "(exercise, law) of everything started in the folder of this file."
    return [(e.name, law.title) for e in Work(Path(file).parent).started()[::-1] for law in e.laws]


def verify(file: str, exercise: str, law: str) -> None:
    "Passes if the law holds, fails with what `tinyft check` would say, is skipped if an earlier law does not hold or nothing is written."
    import pytest
    e = find(exercise)
    path = Work(Path(file).parent).path(e)
    for outcome in _outcomes(exercise, path, path.stat().st_mtime_ns):
        if outcome.problem and outcome.problem.kind == "unwritten":
            pytest.skip("not written yet")
        if outcome.problem and outcome.title in ("", law):
            page = Page(io.StringIO())
            page.problem(e, outcome.title, outcome.problem)
            pytest.fail(page.out.getvalue(), pytrace=False)
        if outcome.title == law:
            return
    pytest.skip("an earlier law does not hold yet")

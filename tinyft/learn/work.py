"""The learner's folder: work/<exercise>.py, what was solved, how many hints were taken, and a shim that shows the checks in an IDE."""
from __future__ import annotations

import json
import time
from pathlib import Path

from ..files import write_atomically
from .exercise import Exercise, exercises, find, of_lesson
from .folders import lessons
from .skeleton import skeleton

SHIM = '''"The checks of the exercises in this folder as tests, for an IDE's test panel:  python -m pytest work"
import pytest

from tinyft.learn.shim import laws, verify


@pytest.mark.parametrize("exercise, law", laws(__file__))
def test(exercise, law):
    verify(__file__, exercise, law)
'''


class Work:
    "A folder of exercises.  progress: {exercise: {solved, hints}}; a damaged progress file counts as empty."

    def __init__(self, folder: Path | str = "work"):
        self.folder = Path(folder)
        self.state = self.folder / ".progress.json"
        try:
            found = json.loads(self.state.read_text(encoding="utf-8"))
            self.progress = {k: v for k, v in found.items() if isinstance(v, dict)}
        except (OSError, ValueError, AttributeError):
            self.progress = {}

    def path(self, e: Exercise) -> Path:
        return self.folder / f"{e.name}{e.suffix}"

    def written(self, e: Exercise) -> Path:
        "The learner's file.  ValueError, with what to do, if there is none."
        if not self.path(e).exists():
            raise ValueError(f"{self.path(e)} is not there: `tinyft start {e.name}` writes it")
        return self.path(e)

    def note(self, e: Exercise, **facts: int | bool) -> None:
        "Remember something of an exercise; written at once, all or nothing."
        self.progress.setdefault(e.name, {}).update(facts)
        write_atomically({self.state: json.dumps(self.progress, indent=1).encode()})

    def solved(self, e: Exercise) -> bool:
        return bool(self.progress.get(e.name, {}).get("solved"))

    def hints(self, e: Exercise) -> int:
        return int(self.progress.get(e.name, {}).get("hints", 0))

    def started(self) -> list[Exercise]:
        "What has a file, the file touched last coming first."
        have = [e for e in exercises().values() if self.path(e).exists()]
        return sorted(have, key=lambda e: -self.path(e).stat().st_mtime)

    def start(self, e: Exercise) -> bool:
        "Write the skeleton; False, and nothing written, if the file is there."
        self.folder.mkdir(parents=True, exist_ok=True)
        shim = self.folder / "test_exercises.py"
        if not shim.exists():
            shim.write_text(SHIM, encoding="utf-8")
        try:
            with open(self.path(e), "x", encoding="utf-8") as f:
                f.write(skeleton(e))
        except FileExistsError:
            return False
        return True

    def reset(self, e: Exercise) -> Path | None:
        "A fresh skeleton; the old file is kept under another name, which is returned."
        path, kept = self.path(e), None
        if path.exists():
            kept = path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}.bak")
            n = 1
            while kept.exists():
                kept, n = kept.with_name(f"{kept.name.removesuffix('.bak')}-{n}.bak"), n + 1
            path.rename(kept)
        self.start(e)
        self.note(e, solved=False)
        return kept

    def chosen(self, names: list[str], whole_lessons: bool = True) -> list[Exercise]:
        "The exercises of these names; a lesson's name is all of its.  Without names: the one worked on last."
        if not names:
            if not (mine := self.started()):
                raise ValueError(f"nothing is started in {self.folder}: `tinyft start` writes the first exercise")
            return mine[:1]
        return [e for name in names for e in (of_lesson(name) if whole_lessons and name in lessons() else [find(name)])]

    def next(self) -> Exercise | None:
        "The first exercise that is not solved."
        return next((e for e in exercises().values() if not self.solved(e)), None)


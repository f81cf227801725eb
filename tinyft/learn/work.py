"""The learner's folder: work/<exercise>.py, the progress, and a test file that shows the checks in an IDE."""
from __future__ import annotations

import json
import time
from pathlib import Path

from ..files import write_atomically
from .exercise import Exercise, exercises, find, of_lesson
from .folders import lessons

SHIM = '''"""The checks of the exercises in this folder as tests, for an IDE's test panel:  python -m pytest work"""
import pytest

from tinyft.learn.shim import laws, verify


@pytest.mark.parametrize("exercise, law", laws(__file__))
def test(exercise, law):
    verify(__file__, exercise, law)
'''


class Work:
    """A folder of exercises.

    progress: {exercise: {"solved": bool, "hints": number taken}}.  A damaged progress file counts as empty.
    """

    def __init__(self, folder: Path | str = "work"):
        self.folder = Path(folder)
        self.file = self.folder / ".progress.json"
        self.progress = self._read()

    def _read(self) -> dict[str, dict]:
        """The progress in the file; {} if the file is missing or damaged."""
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
            return {name: facts for name, facts in found.items() if isinstance(facts, dict)}
        except (OSError, ValueError, AttributeError):
            return {}

    def path(self, e: Exercise) -> Path:
        """The learner's file of an exercise, written or not."""
        return self.folder / f"{e.name}{e.suffix}"

    def written(self, e: Exercise) -> Path:
        """The learner's file.  ValueError, with the command to run, if there is none."""
        if not self.path(e).exists():
            raise ValueError(f"{self.path(e)} is not there: `tinyft start {e.name}` writes it")
        return self.path(e)

    def record(self, e: Exercise, **facts: int | bool) -> None:
        """Save facts about an exercise.  The file is replaced as a whole."""
        self.progress.setdefault(e.name, {}).update(facts)
        write_atomically({self.file: json.dumps(self.progress, indent=1).encode()})

    def solved(self, e: Exercise) -> bool:
        """True if the last check of the exercise passed."""
        return bool(self.progress.get(e.name, {}).get("solved"))

    def hints(self, e: Exercise) -> int:
        """The number of hints taken."""
        return int(self.progress.get(e.name, {}).get("hints", 0))

    def started(self) -> list[Exercise]:
        """The exercises that have a file, the file changed last coming first."""
        found = [e for e in exercises().values() if self.path(e).exists()]
        return sorted(found, key=lambda e: -self.path(e).stat().st_mtime)

    def start(self, e: Exercise) -> bool:
        """Write the learner's file, with the body to be written.  False, and nothing written, if the file exists.

        With the first exercise, test_exercises.py is written too.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        shim = self.folder / "test_exercises.py"
        if not shim.exists():
            shim.write_text(SHIM, encoding="utf-8")
        try:
            with open(self.path(e), "x", encoding="utf-8") as f:
                f.write(e.skeleton())
        except FileExistsError:
            return False
        return True

    def reset(self, e: Exercise) -> Path | None:
        """A fresh skeleton.  The old file is renamed, never deleted; its new path is returned."""
        backup = self._rename(self.path(e)) if self.path(e).exists() else None
        self.start(e)
        self.record(e, solved=False)
        return backup

    @staticmethod
    def _rename(path: Path) -> Path:
        """Rename a file to name.TIME.bak, or name.TIME-1.bak, ... if that exists.  Returns the new path."""
        stem = f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}"
        backup = path.with_name(f"{stem}.bak")
        n = 1
        while backup.exists():
            backup = path.with_name(f"{stem}-{n}.bak")
            n += 1
        path.rename(backup)
        return backup

    def chosen(self, names: list[str]) -> list[Exercise]:
        """The exercises of these names; the name of a lesson stands for all of its exercises.

        Without names: the exercise whose file changed last.
        """
        if not names:
            return [self.chosen_one(names)]
        found = []
        for name in names:
            found += of_lesson(name) if name in lessons() else [find(name)]
        return found

    def chosen_one(self, names: list[str]) -> Exercise:
        """The exercise of the one name in the list; without a name the exercise whose file changed last."""
        if names:
            name, = names
            return find(name)
        started = self.started()
        if not started:
            raise ValueError(f"nothing is started in {self.folder}: `tinyft start` writes the first exercise")
        return started[0]

    def next(self) -> Exercise | None:
        """The first exercise that is not solved."""
        return next((e for e in exercises().values() if not self.solved(e)), None)

"""The learner's folder: work/<exercise>.py, the progress, and a test file that shows the checks in an IDE."""
from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..atomic import write_atomically
from .exercise import Exercise, exercises, find, of_lesson
from .folders import find_lesson

try:
    import fcntl
except ImportError:                                      # Windows
    fcntl = None

TESTS = "test_exercises.py"                              # by which the learner's folder is found
SHIM = '''"""The checks of the exercises in this folder as tests, for an IDE's test panel:  python -m pytest work"""
import pytest

from tinyft.learn.shim import laws, verify


@pytest.mark.parametrize("exercise, law", laws(__file__))
def test(exercise, law):
    verify(__file__, exercise, law)
'''


def find_folder(start: Path) -> Path:
    """The learner's folder: `work` in the folder `start` or in the nearest folder above it that has one with exercises.

    `start` may also be that folder itself, or lie in it. Path("work"), which need not exist, if there is none."""
    for folder in (start, *start.parents):
        if (folder / "work" / TESTS).is_file():
            return Path(os.path.relpath(folder / "work", start))
    return Path("work")


class Work:
    """A folder of exercises.

    progress: {exercise: {"solved": bool, "hints": number taken}}, as it was in the file .progress.json when it was read
    last.  A damaged file counts as empty, a fact of another type as missing.  Entries of another kind are kept.
    """

    def __init__(self, folder: Path | str = "work"):
        self.folder = Path(folder)
        self.file = self.folder / ".progress.json"
        self.progress = self._read()[0]

    def _read(self) -> tuple[dict[str, Any], bool]:
        """(the progress in the file, False);  ({}, True) if the file is damaged, ({}, False) if it is missing or empty.
        """
        try:
            if not self.file.is_file() or not self.file.stat().st_size:
                return {}, False
            found = json.loads(self.file.read_text(encoding="utf-8-sig"))     # Notepad writes a byte order mark
        except (OSError, ValueError, RecursionError):
            return {}, True
        return (found, False) if isinstance(found, dict) else ({}, True)

    def _facts(self, e: Exercise) -> dict[str, Any]:
        found = self.progress.get(e.name)
        return found if isinstance(found, dict) else {}

    @contextlib.contextmanager
    def _updating(self, e: Exercise) -> Iterator[dict[str, Any]]:
        """The facts about an exercise, read anew, which the `with` may change; then they are saved.

        Other processes may write to the file too, so it is read and written under a lock, and the entries of other
        exercises stay as they are in it.  A damaged file is renamed, not overwritten.  OSError, a sentence, if the file
        cannot be written; self.progress has the new facts all the same.
        """
        with contextlib.suppress(OSError):               # write_atomically says why
            self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / ".progress.lock"):
            self.progress, is_damaged = self._read()
            before = self._facts(e)
            facts = dict(before)
            yield facts
            if json.dumps(facts) == json.dumps(before):  # True == 1, but a count is no flag
                return
            self.progress[e.name] = facts
            if not self.folder.is_dir():
                raise OSError(errno.ENOTDIR, f"could not write {self.file}: {self.folder} is no folder")
            if is_damaged:
                self._rename(self.file)
            text = json.dumps(self.progress, indent=1)
            write_atomically({os.path.realpath(self.file): text.encode()})

    def path(self, e: Exercise) -> Path:
        """The learner's file of an exercise, written or not."""
        return self.folder / f"{e.name}{e.suffix}"

    def written(self, e: Exercise) -> Path:
        """The learner's file.  ValueError, with the command to run, if there is none."""
        self._check_folder()
        path = self.path(e)
        if path.is_file():
            return path
        if path.exists():
            kind = "a folder" if path.is_dir() else "no ordinary file"
            raise ValueError(f"{path} wants to be a file with your function, and is {kind}: "
                             f"`tinyft reset {e.name}` puts it aside")
        raise ValueError(f"{path} is not there: `tinyft start {e.name}` writes it")

    def _check_folder(self) -> None:
        """ValueError if something that is no folder stands in the folder's place."""
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise ValueError(f"{self.folder} wants to be the folder of your exercises, and is no folder: "
                             "move it away, or name another folder with --work")

    def record(self, e: Exercise, **facts: int | bool) -> None:
        """Save facts about an exercise.  OSError, a sentence, if the file cannot be written."""
        with self._updating(e) as mine:
            mine.update(facts)

    def take_hint(self, e: Exercise) -> None:
        """Save that one more hint was taken, up to the last.  OSError, a sentence, if the file cannot be written."""
        with self._updating(e) as mine:
            mine["hints"] = min(self.hints(e) + 1, len(e.hints))

    def solved(self, e: Exercise) -> bool:
        """True if the last check of the exercise passed."""
        return self._facts(e).get("solved") is True

    def hints(self, e: Exercise) -> int:
        """The number of hints taken."""
        taken = self._facts(e).get("hints", 0)
        is_number = isinstance(taken, int) and not isinstance(taken, bool)
        return min(max(taken, 0), len(e.hints)) if is_number else 0

    def started(self) -> list[Exercise]:
        """The exercises that have a file, the file changed last coming first."""
        self._check_folder()
        times = {}
        for e in exercises().values():
            with contextlib.suppress(OSError):           # no file, or just moved away by an editor
                times[e.name] = self.path(e).stat().st_mtime
        return [find(name) for name in sorted(times, key=lambda name: -times[name])]

    def version(self, e: Exercise) -> tuple[int, ...] | None:
        """Numbers that change when the learner's file is saved, also by renaming another file; None without a file."""
        try:
            facts = self.path(e).stat()
        except OSError:
            return None
        return facts.st_mtime_ns, facts.st_size, facts.st_ino

    def start(self, e: Exercise) -> bool:
        """Write the learner's file, with the body to be written.  False, and nothing written, if the file exists.

        With the first exercise, test_exercises.py is written too.  OSError, a sentence, if a file cannot be written.
        """
        self._check_folder()
        path = self.path(e)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            is_new = _write_new(path, e.skeleton())
            path = self.folder / TESTS
            _write_new(path, SHIM)
        except OSError as error:
            raise OSError(error.errno, f"could not write {path}: {error.strerror}") from None
        return is_new

    def reset(self, e: Exercise) -> Path | None:
        """A fresh skeleton.  The old file is renamed, never deleted; its new path is returned.

        OSError, a sentence, if the skeleton cannot be written; then the old file has its name again.
        """
        self._check_folder()
        path = self.path(e)
        backup = self._rename(path) if os.path.lexists(path) else None
        try:
            self.start(e)
        except BaseException:
            if backup:
                backup.rename(path)
            raise
        return backup

    @staticmethod
    def _rename(path: Path) -> Path:
        """Rename a file to name.TIME.bak, or name.TIME-1.bak, ... if that exists.  Returns the new path."""
        stem = f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}"
        backup = path.with_name(f"{stem}.bak")
        n = 1
        while os.path.lexists(backup):
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
            lesson = find_lesson(name)
            found += of_lesson(lesson.name) if lesson else [find(name)]
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

    def next(self, after: Exercise | None = None) -> Exercise | None:
        """The first exercise that is not solved, after this one; if there is none, the first of all. None: all are
        solved."""
        every = list(exercises().values())
        names = [e.name for e in every]
        begin = names.index(after.name) + 1 if after else 0
        return next((e for e in every[begin:] + every[:begin] if not self.solved(e)), None)


def _write_new(path: Path, text: str) -> bool:
    """Write a file that does not exist.  False, and nothing written, if it does.  After an error there is no file."""
    try:
        file = open(path, "x", encoding="utf-8")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(text)
    except BaseException:
        path.unlink()
        raise
    return True


@contextlib.contextmanager
def locked(path: Path, seconds: float = 5.0) -> Iterator[None]:
    """Hold the lock file `path` inside the `with`: of several processes, one at a time is inside.

    The system frees the lock when its process ends, however it ends.  The `with` runs without a lock where the platform
    or the file system has none, and if a suspended process holds it for so many seconds.
    """
    try:
        file = open(path, "ab")
    except OSError:
        yield
        return
    with file:                                           # closing the file frees the lock
        _wait_for_lock(file, seconds)
        yield


def _wait_for_lock(file: BinaryIO, seconds: float) -> None:
    """Take the lock of an open file; give up after so many seconds."""
    if fcntl is None:
        return
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:                          # another process has it
            time.sleep(0.01)
        except OSError:                                  # a file system without locks
            return

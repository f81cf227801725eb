"""The folders of the lessons: lessons/NN_name/ holds lesson.py and exercises.py, in a clone and inside the installed
package.

A longer set of exercises continues in exercises_*.py.  A lesson is found by the name of its folder, so there is no
table of lessons in code.
"""
from __future__ import annotations

import dataclasses
import importlib.util
import sys
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Lesson:
    """One lesson.  name: "autograd";  file: the path of its lesson.py."""
    name: str
    file: Path

    @property
    def folder(self) -> str:
        """The name of the lesson's folder: "01_autograd"."""
        return self.file.parent.name

    @cached_property
    def title(self) -> str:
        """The first heading of lesson.py: "01 Tensors and autograd"."""
        for line in self.file.read_text(encoding="utf-8").splitlines():
            if line.startswith("# # "):
                return line.removeprefix("# # ")
        raise ValueError(f"{self.file} wants a first heading, a line such as '# # 01 Tensors and autograd'; got none")


@cache
def lessons() -> dict[str, Lesson]:
    """{name: lesson} of every lesson, in order of their numbers."""
    installed = PACKAGE / "lessons"
    return lessons_in(installed if installed.is_dir() else PACKAGE.parent / "lessons")


def lessons_in(root: Path) -> dict[str, Lesson]:
    """{name: lesson} of the folders NN_name under `root`."""
    files = sorted(root.glob("[0-9][0-9]_*/lesson.py"))
    return {file.parent.name[3:]: Lesson(file.parent.name[3:], file) for file in files}


def find_lesson(name: str) -> Lesson | None:
    """The lesson of this name: autograd, 01 or 01_autograd.  None if there is none."""
    for lesson in lessons().values():
        if name in (lesson.name, lesson.folder, lesson.folder[:2]):
            return lesson
    return None


def exercise_modules(lesson: Lesson) -> list[ModuleType]:
    """The modules exercises.py, exercises_*.py of a lesson, in order.  ValueError if Hypothesis is not installed."""
    try:
        return [_load(lesson, file) for file in sorted(lesson.file.parent.glob("exercises*.py"))]
    except ImportError as e:
        if e.name == "hypothesis":
            raise ValueError("the exercises are checked with Hypothesis, which is not installed: "
                             'pip install "tinyft[lessons]"') from None
        raise


def _load(lesson: Lesson, file: Path) -> ModuleType:
    """One file as a module.  It is registered as lesson_<name>_<file>, so that inspect and pickle find it; it is no
    part of the package tinyft.
    """
    name = f"lesson_{lesson.name}_{file.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module

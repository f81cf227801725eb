"""What an exercise is: a function of the library, what it asks of the learner, the laws it must obey, and wrong answers to it.

The exercises of a lesson stand beside it, in lessons/NN_name/exercises.py and exercises_*.py, in reading order.  A law takes the function under test as its first
argument, the other arguments are drawn (sizes.py).  A wrong answer is what someone writes who believes something that is not so.
"""
from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

from .folders import exercise_modules, lessons


@dataclasses.dataclass(frozen=True)
class Law:
    "title: the law in words;  test(f, **drawn) raises where f breaks it;  inputs: {name: strategy or shape string}, as in sizes.draws."
    title: str
    test: Callable[..., None]
    inputs: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Wrong:
    "belief: what makes it look right;  says: words that the diagnosis must hold;  subtle: it breaks one law only;  function: or its CUDA C."
    belief: str
    function: Callable | str
    says: str
    subtle: bool


@dataclasses.dataclass
class Exercise:
    """target: "module:function" or "module:Class.method", in tinyft;  difficulty 1-5;  minutes: for who knows the lesson;  hints: three, each
    telling more.  closed: other targets that hold the answer, so that they are closed to the learner as well.  in_place: it writes into its
    arguments.  on_host: it works on NumPy arrays whatever the backend.  lines: how many a plain answer needs, where the library's has more."""
    target: str
    difficulty: int
    minutes: int
    hints: tuple[str, str, str]
    closed: tuple[str, ...] = ()
    in_place: bool = False
    on_host: bool = False
    lines: int = 0
    lesson: str = ""
    laws: list[Law] = dataclasses.field(default_factory=list)
    wrong: list[Wrong] = dataclasses.field(default_factory=list)
    suffix: ClassVar[str] = ".py"                                                # of the learner's file, and of the library's
    missing: ClassVar[str] = ""                                                  # why it cannot be checked here, if it cannot

    function = property(lambda self: self.target.split(".")[-1].split(":")[-1], doc="the name the learner's function must have")
    name = property(lambda self: f"{self.lesson}.{self.function}")
    file = property(lambda self: f"tinyft/{self.target.split(':')[0].replace('.', '/')}{self.suffix}", doc="where the library has it")
    shut = property(lambda self: (self.target, *self.closed), doc="what the learner's code may not call")
    is_op = property(lambda self: hasattr(self.reference(), "definition"), doc="an op: arrays -> (value, pullbacks), under @op")

    def owner(self, target: str = "") -> tuple[Any, str]:
        "The module or class that holds the target, and the target's name in it."
        module, path = (target or self.target).split(":")
        *classes, name = path.split(".")
        holder = importlib.import_module(f"tinyft.{module}")
        for c in classes:
            holder = getattr(holder, c)
        return holder, name

    def reference(self) -> Callable:
        holder, name = self.owner()
        return getattr(holder, name)

    def signature(self) -> inspect.Signature:
        return inspect.signature(self.reference())

    def usable(self, function: Any) -> Callable:
        "What the laws can call, made of what the learner gave."
        return function

    def law(self, title: str, **inputs: Any) -> Callable:
        "Decorator of a test(f, **drawn).  Laws are checked in the order they stand: the simple ones first."
        def note(test: Callable) -> Callable:
            self.laws.append(Law(title, test, inputs))
            return test
        return note

    def believe(self, belief: str, says: str, subtle: bool = False) -> Callable:
        "Decorator of a wrong answer."
        def note(f: Callable) -> Callable:
            self.wrong.append(Wrong(belief, f, says, subtle))
            return f
        return note


def exercises() -> dict[str, Exercise]:
    "Every exercise by its name, lesson by lesson."
    return {e.name: e for lesson in lessons() for e in of_lesson(lesson)}


@cache
def of_lesson(lesson: str) -> list[Exercise]:
    "The exercises of one lesson, in order."
    found = [e for m in exercise_modules(lessons()[lesson]) for e in vars(m).values() if isinstance(e, Exercise)]
    for e in found:
        e.lesson = lesson
    return found


def find(name: str) -> Exercise:
    "An exercise by its name, or by the part after the dot if that is one exercise's.  ValueError, with the nearest names, if there is none."
    if name.split(".")[0] in lessons():                                            # one lesson to read, not all
        for e in of_lesson(name.split(".")[0]):
            if e.name == name:
                return e
    every = exercises()
    if same := [e for n, e in every.items() if n.split(".")[1] == name]:
        return same[0]
    near = difflib.get_close_matches(name, [*every, *(n.split(".")[1] for n in every)], 3, 0.5)
    raise ValueError(f"there is no exercise {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else "") + "  `tinyft status` lists them")

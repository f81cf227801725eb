"""An exercise: a function of the library to write again, the laws that it must obey, and wrong answers that break them.

The exercises of a lesson stand beside it, in lessons/NN_name/exercises.py and exercises_*.py, in reading order.
A law takes the function under test as its first argument; its other arguments are drawn at random (sizes.py).
A wrong answer is the code of a typical misconception: it tests the laws, which must reject it.
"""
from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from ..checks import brief
from .folders import exercise_modules, lessons
from .loading import Refused, load_function
from .sources import LibraryFunction, find_function, import_lines


@dataclasses.dataclass(frozen=True)
class Law:
    """One law.

    title: the law in words.  test(f, **drawn): raises where f breaks the law.
    inputs: {name: strategy or shape string}, as sizes.draws takes them.
    """
    title: str
    test: Callable[..., None]
    inputs: dict[str, Any]


class Named(tuple):
    """Several inputs of a law that are drawn together: a tuple.  names: those of its parts, which the learner sees."""
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class WrongAnswer:
    """The answer of a learner who believes something false.

    belief: the misconception in a sentence.  function: the answer; for a kernel, its CUDA C.
    says: words that the diagnosis of the failure must contain.  subtle: the answer breaks one law only.
    size: the largest size of an input that may be needed to catch it; at 7, inputs have fractions.
    """
    belief: str
    function: Callable | str
    says: str
    subtle: bool
    size: int = 2


@dataclasses.dataclass
class Exercise:
    """One exercise in Python.

    target: "module:function" or "module:Class.method", in tinyft.  difficulty: 1 to 5.  minutes: for a reader of the
    lesson. hints: three, each telling more.  may_use: the functions that the answer may use, in words, after "You may
    use: ".  example: one call and its result with numbers, as in a Python session (>>>); the tests run it.  closed:
    other targets that contain the answer, which the learner may not call either. in_place: the function writes into its
    arguments.  on_host: it works on NumPy arrays whatever the backend. lines: the length of a plain answer, where the
    library's is longer.
    """
    target: str
    difficulty: int
    minutes: int
    hints: tuple[str, str, str]
    may_use: str = ""
    example: str = ""
    closed: tuple[str, ...] = ()
    in_place: bool = False
    on_host: bool = False
    lines: int = 0
    lesson: str = ""
    laws: list[Law] = dataclasses.field(default_factory=list)
    wrong_answers: list[WrongAnswer] = dataclasses.field(default_factory=list)
    suffix: ClassVar[str] = ".py"                        # of the learner's file and of the library's
    missing: ClassVar[str] = ""                          # the reason why it cannot be checked on this machine

    @property
    def function(self) -> str:
        """The name that the learner's function must have."""
        return self.target.split(".")[-1].split(":")[-1]

    @property
    def name(self) -> str:
        """The name of the exercise: "autograd.sum_to"."""
        return f"{self.lesson}.{self.function}"

    @property
    def file(self) -> str:
        """The library's file that holds the function, from the root of the repository."""
        return f"tinyft/{self.target.split(':')[0].replace('.', '/')}{self.suffix}"

    @property
    def forbidden(self) -> tuple[str, ...]:
        """The targets that the learner's code may not call."""
        return (self.target, *self.closed)

    @property
    def is_op(self) -> bool:
        """True for an op: a function of arrays under @op that returns (value, pullbacks)."""
        return getattr(self.reference(), "definition", None) is not None

    # ── the library's function ───────────────────────────────────────────────────────────────────────────────────────
    def owner(self, target: str = "") -> tuple[Any, str]:
        """(the module or class that holds the target, its name there).  "": the exercise's own target."""
        module, path = (target or self.target).split(":")
        *classes, name = path.split(".")
        holder = importlib.import_module(f"tinyft.{module}")
        for c in classes:
            holder = getattr(holder, c)
        return holder, name

    def reference(self) -> Callable:
        """The library's function, which is the right answer."""
        holder, name = self.owner()
        return getattr(holder, name)

    def signature(self) -> inspect.Signature:
        """The signature of the library's function."""
        return inspect.signature(self.reference())

    def _definition(self) -> LibraryFunction:
        return find_function(*self.owner())

    def _helpers(self) -> list[LibraryFunction]:
        """The private functions that contain part of the answer: closed, and shown with the solution."""
        private = [t for t in self.closed if t.split(":")[1].startswith("_")]
        return [find_function(*self.owner(t)) for t in private]

    # ── its text ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def source(self) -> str:
        """The solution: the library's function, after the private helpers that contain part of the answer."""
        return "\n\n\n".join(f.text for f in (*self._helpers(), self._definition()))

    def head(self) -> str:
        """The part of the function that the learner is given: decorators, signature and docstring."""
        return self._definition().head

    def statement(self) -> tuple[str, str]:
        """(decorators and signature, docstring)."""
        definition = self._definition()
        return definition.signature, definition.docstring

    def answer_lines(self) -> int:
        """About how many lines the learner has to write."""
        return self.lines or self._definition().body_lines + sum(len(h.node.body) for h in self._helpers())

    def first_line(self) -> str:
        """The first line of the learner's file."""
        title = lessons()[self.lesson].title
        return f"{self.name}: {title}, about {self.minutes} minutes.   Check it with:  tinyft check {self.name}"

    def imports(self) -> str:
        """The import lines of the learner's file: every public name that the library's function and its helpers use,
        except those that are the answer or contain it.
        """
        closed = {t.split(":")[1] for t in self.forbidden}
        return import_lines(self._definition(), self._helpers(), closed)

    def guide(self) -> str:
        """The functions that the answer may use, folded, and the example."""
        parts = []
        if self.may_use:
            parts.append(textwrap.fill(f"You may use: {self.may_use}", 100))
        if self.example:
            parts.append(f"Example:\n{textwrap.indent(textwrap.dedent(self.example).strip(), '    ')}")
        return "\n\n".join(parts)

    def skeleton(self) -> str:
        """The learner's file as `tinyft start` writes it: imports, signature and docstring, with the body left out."""
        n = self.answer_lines()
        guide = self.guide()
        top = f"{self.first_line()}\n\n{guide}\n" if guide else self.first_line()
        return f'''"""{top}"""
from __future__ import annotations

{self.imports()}


{self.head()}
    raise NotImplementedError                            # yours to write, in about {n} line{"s" * (n > 1)}
'''

    # ── the learner's answer ─────────────────────────────────────────────────────────────────────────────────────────
    def load(self, path: Path) -> Any:
        """The answer in the learner's file.  Refused, with the line, if there is none."""
        return load_function(path, self.function, f"work_{self.name.replace('.', '_')}")

    def usable(self, answer: Any) -> Callable:
        """The function that the laws call, made from the learner's answer.  Refused if that is no function."""
        if not callable(answer):
            raise Refused(f"{self.name} wants a function, got {brief(answer)}")
        return answer

    # ── writing an exercise ──────────────────────────────────────────────────────────────────────────────────────────
    def law(self, title: str, **inputs: Any) -> Callable:
        """Decorator that adds a law: test(f, **drawn) raises where f, the function under test, breaks it.

        title: the law in words.  inputs: {argument: strategy or shape string}, from which `drawn` is drawn.
        Laws are checked in the order of the file: put the simple ones first.
        """
        def register(test: Callable) -> Callable:
            self.laws.append(Law(title, test, inputs))
            return test
        return register

    def wrong_answer(self, belief: str, says: str, subtle: bool = False, size: int = 2) -> Callable:
        """Decorator that adds a function as a wrong answer.  belief, says, subtle, size: see WrongAnswer."""
        def register(f: Callable) -> Callable:
            self.wrong_answers.append(WrongAnswer(belief, f, says, subtle, size))
            return f
        return register


# ── all exercises ────────────────────────────────────────────────────────────────────────────────────────────────────
def exercises() -> dict[str, Exercise]:
    """{name: exercise} of all lessons, in reading order."""
    return {e.name: e for lesson in lessons() for e in of_lesson(lesson)}


@cache
def of_lesson(lesson: str) -> list[Exercise]:
    """The exercises of the lesson of this name, in reading order."""
    found = []
    for module in exercise_modules(lessons()[lesson]):
        found += [value for value in vars(module).values() if isinstance(value, Exercise)]
    for e in found:
        e.lesson = lesson                                # exercises.py does not repeat the name
    return found


def find(name: str) -> Exercise:
    """An exercise by its name ("autograd.sum_to"), by its function ("sum_to") or by the path of its file
    ("work/autograd.sum_to.py").

    ValueError, with the nearest names, if there is none, or if several exercises have such a function.
    """
    name = str(name)
    path = Path(name)
    if path.suffix in (".py", ".cu"):
        name = path.stem
    lesson = name.split(".")[0]
    if lesson in lessons():                              # imports the exercises of one lesson instead of all
        for e in of_lesson(lesson):
            if e.name == name:
                return e
    every = exercises()
    found = [e for e in every.values() if e.function == name]
    if len(found) > 1:
        raise ValueError(f"{name!r} is the name of several exercises: {' and '.join(e.name for e in found)}")
    if found:
        return found[0]
    functions = [e.function for e in every.values()]
    suggestion = near_names(name, [*every, *functions, *lessons()])
    raise ValueError(f"there is no exercise {name!r}{suggestion}; `tinyft status` lists them")


def near_names(name: str, names: Iterable[str]) -> str:
    """" (did you mean sum_to or sum_rows?)": the names that are most like this one; "" if none is."""
    by_lower_case = {n.lower(): n for n in names}
    near = difflib.get_close_matches(name.lower(), by_lower_case, 3, 0.5)
    return f" (did you mean {' or '.join(by_lower_case[n] for n in near)}?)" if near else ""

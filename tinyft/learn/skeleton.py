"""What the learner starts from: the library's own source with the body left out.  So exercise, solution and library cannot drift apart."""
from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from functools import singledispatch

from .exercise import Exercise
from .folders import lessons


def definition(exercise: Exercise, target: str = "") -> tuple[list[str], ast.FunctionDef]:
    "The lines of the module that holds a target, and the target's node in it."
    holder, name = exercise.owner(target)
    module = sys.modules[holder.__module__] if inspect.isclass(holder) else holder
    text = inspect.getsource(module)
    body = ast.parse(text).body
    if inspect.isclass(holder):
        body = next(n for n in body if isinstance(n, ast.ClassDef) and n.name == holder.__name__).body
    return text.splitlines(), next(n for n in body if isinstance(n, ast.FunctionDef) and n.name == name)


def first_line(node: ast.FunctionDef | ast.ClassDef) -> int:
    "Where a definition begins: with its decorators."
    return min([node.lineno, *(d.lineno for d in node.decorator_list)])


@singledispatch
def source(exercise: Exercise, target: str = "") -> str:
    "The target as the library has it; with private helpers that hold part of the answer."
    lines, node = definition(exercise, target)
    parts = [] if target else [source(exercise, t) for t in exercise.closed if t.split(":")[1].startswith("_")]
    return "\n\n\n".join([*parts, textwrap.dedent("\n".join(lines[first_line(node) - 1:node.end_lineno]))])


@singledispatch
def head(exercise: Exercise) -> tuple[str, int]:
    "Decorators, signature and docstring; and how many lines the body has."
    lines, node = definition(exercise)
    last = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
    own = node.end_lineno - last + sum(len(helper.body) for helper in helpers(exercise))
    return textwrap.dedent("\n".join(lines[first_line(node) - 1:last])), exercise.lines or own


@singledispatch
def statement(exercise: Exercise) -> tuple[str, str]:
    "Decorators and signature; and the docstring."
    lines, node = definition(exercise)
    return textwrap.dedent("\n".join(lines[first_line(node) - 1:node.body[0].lineno - 1])), ast.get_docstring(node) or ""


def helpers(exercise: Exercise) -> list[ast.FunctionDef]:
    "Private functions that hold part of the answer: closed, and shown with the solution."
    return [definition(exercise, t)[1] for t in exercise.closed if t.split(":")[1].startswith("_")]


@singledispatch
def skeleton(exercise: Exercise) -> str:
    "The learner's file."
    top, lines = head(exercise)
    return f'''"{title(exercise)}"
from __future__ import annotations

{imports(exercise)}


{top}
    raise NotImplementedError                            # yours to write, in about {lines} line{'s' * (lines > 1)}
'''


def title(exercise: Exercise) -> str:
    "The first line of the learner's file."
    return f"{exercise.name}: {lessons()[exercise.lesson].title}, about {exercise.minutes} minutes.   Check it with:  tinyft check {exercise.name}"


def imports(exercise: Exercise) -> str:
    "The import lines for every public name the function uses, but not for itself or what is closed."
    lines, node = definition(exercise)
    holder, _ = exercise.owner()
    module = holder.__module__ if inspect.isclass(holder) else holder.__name__
    closed = {t.split(":")[1] for t in (exercise.target, *exercise.closed)}
    used = {n.id for f in (node, *helpers(exercise)) for n in ast.walk(f) if isinstance(n, ast.Name)} | {"np"}
    tree, found = ast.parse("\n".join(lines)).body, {"import numpy as np": None}
    for n in tree:
        if isinstance(n, (ast.Import, ast.ImportFrom)):
            start = "" if isinstance(n, ast.Import) else n.module or ""
            if getattr(n, "level", 0):
                start = ".".join(module.split(".")[:-n.level] + ([n.module] if n.module else []))
            taken = [a for a in n.names if (a.asname or a.name) in used and a.name not in closed]
            if taken and start != "__future__":
                names = ", ".join(a.name + (f" as {a.asname}" if a.asname and a.asname != a.name else "") for a in taken)
                found[f"from {start} import {names}" if start else f"import {names}"] = None
    own = [n.name for n in tree if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    own += [t.id for n in tree if isinstance(n, ast.Assign) for t in ast.walk(n) if isinstance(t, ast.Name) and isinstance(t.ctx, ast.Store)]
    if taken := sorted({n for n in own if n in used and n not in closed and n[0] != "_"}):
        found[f"from {module} import {', '.join(taken)}"] = None
    plain = sorted(line for line in found if not line.startswith("from tinyft"))
    plain.sort(key=lambda line: line.startswith("import numpy"))                 # the standard library first
    return "\n".join([*plain[:-1], *[""] * (len(plain) > 1), plain[-1], "", *sorted(line for line in found if line not in plain)]).strip()

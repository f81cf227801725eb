"""Functions as they stand in the library's source: their syntax tree, their text, and the imports they need.

The skeleton of an exercise is cut from here, so exercise, solution and library cannot drift apart.
"""
from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
from types import ModuleType
from typing import Any

Definition = ast.FunctionDef | ast.ClassDef


@dataclasses.dataclass(frozen=True)
class LibraryFunction:
    """One function or method of the library.  lines: its module, line by line;  node: its definition in the module's
    syntax tree.
    """
    module: ModuleType
    lines: tuple[str, ...]
    node: ast.FunctionDef

    @property
    def text(self) -> str:
        """Decorators, signature, docstring and body, not indented."""
        return self._text_until(self.node.end_lineno)

    @property
    def signature(self) -> str:
        """Decorators and signature."""
        return self._text_until(self.node.body[0].lineno - 1)

    @property
    def head(self) -> str:
        """Decorators, signature and docstring."""
        return self._text_until(self._last_line_of_head)

    @property
    def docstring(self) -> str:
        """The docstring without its indentation; "" if there is none."""
        return ast.get_docstring(self.node) or ""

    @property
    def body_lines(self) -> int:
        """The number of lines after the docstring."""
        return self.node.end_lineno - self._last_line_of_head

    @property
    def _last_line_of_head(self) -> int:
        first = self.node.body[0]
        return first.end_lineno if self.docstring else first.lineno - 1

    def _text_until(self, last: int) -> str:
        return textwrap.dedent("\n".join(self.lines[first_line(self.node) - 1:last]))


def find_function(holder: Any, name: str) -> LibraryFunction:
    """The function `name` of a module, or the method `name` of a class."""
    module = sys.modules[holder.__module__] if inspect.isclass(holder) else holder
    text = inspect.getsource(module)
    body = ast.parse(text).body
    if inspect.isclass(holder):
        body = _definition(body, ast.ClassDef, holder.__name__).body
    return LibraryFunction(module, tuple(text.splitlines()), _definition(body, ast.FunctionDef, name))


def _definition(body: list[ast.stmt], kind: type, name: str) -> Any:
    return next(node for node in body if isinstance(node, kind) and node.name == name)


def first_line(node: Definition) -> int:
    """The line of the first decorator, or of `def` or `class` where there is none."""
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def import_lines(function: LibraryFunction, helpers: list[LibraryFunction], closed: set[str]) -> str:
    """The import lines, absolute, for the public names that a function and its helpers use, except those in `closed`.

    The names are those that the function's module imports or defines itself.
    """
    module = function.module.__name__
    used = {"np"}
    for f in (function, *helpers):
        used |= {node.id for node in ast.walk(f.node) if isinstance(node, ast.Name)}
    found = {"import numpy as np"}
    own: list[str] = []                                  # names that the module itself defines
    for node in ast.parse("\n".join(function.lines)).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            taken = [a for a in node.names if (a.asname or a.name) in used and a.name not in closed]
            found |= _import_line(node, taken, module)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.append(node.name)
        elif isinstance(node, ast.Assign):
            stored = [t for t in ast.walk(node) if isinstance(t, ast.Name) and isinstance(t.ctx, ast.Store)]
            own += [t.id for t in stored]
    names = sorted({name for name in own if name in used and name not in closed and not name.startswith("_")})
    if names:
        found.add(f"from {module} import {', '.join(names)}")
    return _sorted_imports(found)


def _import_line(node: ast.Import | ast.ImportFrom, names: list[ast.alias], module: str) -> set[str]:
    """{one import line}: the import statement `node` of the module, with these names only, as an absolute import.

    Empty without names, and for `from __future__`, which every learner's file has already.
    """
    if not names:
        return set()
    listed = ", ".join(f"{a.name} as {a.asname}" if a.asname and a.asname != a.name else a.name for a in names)
    if isinstance(node, ast.Import):
        return {f"import {listed}"}
    start = node.module or ""
    if node.level:                                       # a relative import: the number of its dots
        package = module.split(".")[:-node.level]
        start = ".".join([*package, start] if start else package)
    return set() if start == "__future__" else {f"from {start} import {listed}"}


def _sorted_imports(lines: set[str]) -> str:
    """Import lines as text: the standard library, NumPy, tinyft, in groups with a blank line between them."""
    ours = sorted(line for line in lines if line.startswith("from tinyft"))
    numpy = sorted(line for line in lines if line.startswith("import numpy"))
    standard = sorted(lines - set(ours) - set(numpy))
    return "\n\n".join("\n".join(group) for group in (standard, numpy, ours) if group)

"""The library's source files for the house tests, and what an import statement imports."""
from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path

import tinyft

PACKAGE = Path(tinyft.__file__).resolve().parent
Sources = dict[str, str]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
parse = lru_cache(None)(ast.parse)


def module_name(path: Path) -> str:
    """The dotted name of a module of the package; `__init__.py` has the name of its package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


def read_sources() -> Sources:
    """{dotted name: source text} of every module of the package."""
    return {module_name(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


SOURCES = read_sources()
PACKAGES = {module.rpartition(".")[0] for module in SOURCES}


@lru_cache(None)
def functions(text: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function in a source text, nested functions and methods included."""
    return [node for node in ast.walk(parse(text)) if isinstance(node, FUNCTIONS)]


@lru_cache(None)
def import_statements(module: str, text: str, lazy: bool) -> list[tuple[str, str]]:
    """(module, imported name) of every import.

    With `lazy=False`, only the imports that run when the module is imported.
    """
    skipped = set()
    if not lazy:
        skipped = {id(node) for function in functions(text) for node in ast.walk(function)}
    found = []
    for node in ast.walk(parse(text)):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = _absolute(module, node)
            found += [(start, alias.name) for alias in node.names]
    return found


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """The absolute name of the module of a `from ... import ...`."""
    if node.level == 0:
        return node.module or ""
    package = module.split(".") if module in PACKAGES else module.split(".")[:-1]
    base = package[:len(package) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


def imports(sources: Sources, module: str, lazy: bool = True) -> list[str]:
    """Dotted names of the imported modules.

    `from a import b` counts as a.b if a.b is a module of the package, else as a.
    """
    found = []
    for start, name in import_statements(module, sources[module], lazy):
        inner = f"{start}.{name}"
        found.append(inner if inner in sources else start)
    return found


def part(module: str) -> str:
    """The second component of a dotted name: tinyft.models.gpt -> models. Empty for `tinyft` itself."""
    return (module.split(".") + [""])[1]

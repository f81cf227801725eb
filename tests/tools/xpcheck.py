"""Static check that CuPy has every name and keyword that the library uses. Needs neither CuPy nor a GPU.

    python tests/tools/xpcheck.py [FILE_OR_DIR ...]       default: tinyft/;  exit status 1 if there are faults

The strict backend finds the same mistakes when a line runs; this check finds them also on lines that no test runs.

    xp.NAME(..., kw=), xp(x).NAME(..., kw=), m.NAME(..., kw=) where m = xp(...)
        CuPy must have the name and its keywords, and take this number of positional arguments
    np.NAME in the files of DEVICE_FILES
        NumPy's functions are wrong on a device array; its dtypes and constants are allowed

A comment `# host` at the end of a line says that this line works on the host, and exempts it.
"""
from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
API = json.loads((ROOT / "tinyft" / "cupy_api.json").read_text(encoding="utf-8"))

# Files and folders of tinyft/ that work on host data only, and may call any function of NumPy.
HOST_FILES = (
    "data/", "compare/", "cli.py", "strict.py", "memory.py", "formats/", "assets/", "learn/", "kernels/numpy.py",
)
# Files and folders whose functions receive arrays of any backend.
DEVICE_FILES = ("ops.py", "functional.py", "methods/")

FACTORY = "xp"                                             # xp(x), array.xp(x): the array module of x
MODULES = ("xp", "cp", "cupy")                             # names that always mean an array module
# CuPy's own interface, used beside the one that it shares with NumPy.
UNCHECKED = ("cuda", "cupy", "asnumpy", "get_array_module", "ndarray")
ABOUT_DTYPES = {
    "dtype", "finfo", "iinfo", "ndarray", "issubdtype", "isdtype", "promote_types", "can_cast", "broadcast_shapes",
}
# Allowed in asarray(np.zeros(...)): made on the host and moved at once.
CREATING = {"zeros", "ones", "full", "arange", "eye", "array"}
Fault = tuple[int, str]


def check(source: str, device: bool = True) -> list[Fault]:
    """The faults in a file's text as (line, message).

    device  True if the file's functions may receive device arrays, so that np.NAME is a fault
    """
    tree = ast.parse(source)
    faults = set(_module_faults(tree))
    if device:
        faults |= set(_numpy_faults(tree))
    lines = source.splitlines()
    return sorted((n, text) for n, text in faults if not re.search(r"#\s*host\b[^'\"]*$", lines[n - 1]))


def check_tree(root: Path) -> list[str]:
    """The faults of all Python files under `root` (the package's folder), as "file:line: message"."""
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith(HOST_FILES):
            faults = check(path.read_text(encoding="utf-8"), name.startswith(DEVICE_FILES))
            found += [f"{name}:{line}: {text}" for line, text in faults]
    return found


# ── np.NAME where a device array may arrive ──────────────────────────────────────────────────────────────────────────
def _numpy_faults(tree: ast.Module) -> Iterator[Fault]:
    """Uses of NumPy's functions, and of its global random numbers."""
    imported = [alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    aliases = {alias.asname or alias.name for alias in imported if alias.name == "numpy"}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    moves = [call for call in calls if ast.unparse(call.func) in ("asarray", "array.asarray")]
    moved = {id(node) for call in moves for argument in call.args for node in ast.walk(argument)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "numpy":
            names = [a.name for a in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            names = [node.attr]
        else:
            continue
        for name in names:
            is_moved = name in CREATING and id(node) in moved
            if not _is_about_dtypes(name) and name != "random" and not is_moved:
                yield node.lineno, (f"np.{name} is wrong on a device array: take it from xp(x), "
                                    "or mark the line '# host'")
        if names == ["random"] and not _is_generator_type(tree, node):
            yield node.lineno, "np.random: random numbers come from a generator that was passed in"


def _is_about_dtypes(name: str) -> bool:
    """True for dtypes, constants, types and functions of dtypes or shapes."""
    value = getattr(np, name, ...)
    is_dtype = isinstance(value, type) and issubclass(value, np.generic)
    return name in ABOUT_DTYPES or value is None or isinstance(value, float) or is_dtype


def _is_generator_type(tree: ast.Module, random: ast.AST) -> bool:
    """True for np.random.Generator: a type, not a source of random numbers."""
    return any(isinstance(n, ast.Attribute) and n.value is random and n.attr == "Generator" for n in ast.walk(tree))


# ── xp.NAME ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def _module_faults(tree: ast.Module) -> Iterator[Fault]:
    """Uses of array modules that CuPy does not have."""
    calls = {id(n.func): n for n in ast.walk(tree) if isinstance(n, ast.Call)}
    for line, path, node in _uses(tree, set(MODULES)):
        yield from ((line, text) for text in _check_use(path, calls.get(id(node))))


def _uses(scope: ast.AST, modules: set[str]) -> Iterator[tuple[int, str, ast.Attribute]]:
    """Every longest NAME.NAME... taken from an array module, in a scope and in the functions inside it.

    modules  the names that are bound to an array module outside
    """
    bound = _bindings(scope)
    modules = modules - bound.keys()
    modules |= {name for name, is_module in bound.items() if is_module}
    inner = []
    todo = list(ast.iter_child_nodes(scope))
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inner.append(node)
            continue
        names = []
        base = node
        while isinstance(base, ast.Attribute):
            names.append(base.attr)
            base = base.value
        is_module = _is_factory_call(base) or (isinstance(base, ast.Name) and base.id in modules)
        if names and is_module:
            yield node.lineno, ".".join(reversed(names)), node
            todo.append(base)
        else:
            todo += ast.iter_child_nodes(node)
    for function in inner:
        yield from _uses(function, modules)


def _bindings(scope: ast.AST) -> dict[str, bool]:
    """{name: True if it is ever bound to an array module} for the names that a function binds itself."""
    bound: dict[str, bool] = {}
    if isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        a = scope.args
        parameters = [*a.posonlyargs, *a.args, *a.kwonlyargs, *[p for p in (a.vararg, a.kwarg) if p]]
        bound = {p.arg: p.arg in MODULES for p in parameters}
    todo = list(ast.iter_child_nodes(scope))
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        todo += ast.iter_child_nodes(node)
        for target, value in _assignments(node):
            if isinstance(target, ast.Name):
                bound[target.id] = bound.get(target.id, False) or target.id in MODULES or _is_module(value)
    return bound


def _assignments(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    """(target, value) of an assignment; `m, n = xp(x), 3` gives two. The value is None if it is not one expression."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, (ast.Tuple, ast.List)):
                values = node.value.elts if isinstance(node.value, (ast.Tuple, ast.List)) else [None] * len(target.elts)
                yield from zip(target.elts, values)
            else:
                yield target, node.value
    elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)):
        yield node.target, node.value
    elif isinstance(node, (ast.For, ast.comprehension)):
        yield from ((t, None) for t in ast.walk(node.target) if isinstance(t, ast.Name))


def _is_factory_call(node: ast.AST | None) -> bool:
    """True for xp(...) and array.xp(...)."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) in (FACTORY, f"array.{FACTORY}")


def _is_module(value: ast.expr | None) -> bool:
    """True for an expression that is, or may be, an array module."""
    if isinstance(value, ast.IfExp):
        return _is_module(value.body) or _is_module(value.orelse)
    return _is_factory_call(value) or (isinstance(value, ast.Name) and value.id in ("cp", "cupy"))


def _check_use(path: str, call: ast.Call | None) -> Iterator[str]:
    """The faults of one use of CuPy's `path` ("exp", "linalg.norm", "add.at"). `call`: None if it is not called."""
    first, _, last = path.partition(".")
    if first in UNCHECKED or first.startswith("__"):
        return
    ufuncs = API["ufuncs"].split()
    if first in ufuncs and last:
        able = {"at": API["at"], "reduce": API["reduce"], "accumulate": API["reduce"]}.get(last, "").split()
        if first not in able and last != "outer":
            yield f"{path} is not implemented in CuPy"
    elif path in ufuncs:
        yield from _check_arguments(path, "x1 x2 x3 " + API["ufunc"], call)
    elif path in API["functions"]:
        yield from _check_arguments(path, API["functions"][path], call)
    elif first == "random":
        yield "random numbers are drawn on the host, from a generator that was passed in"
    elif not any(name in API["other"].split() for name in (path, first)) and not _is_namespace(path):
        yield f"CuPy has no {path}"


def _is_namespace(path: str) -> bool:
    """True for a submodule with functions, such as "linalg"."""
    return any(name.startswith(path + ".") for name in API["functions"])


def _check_arguments(path: str, signature: str, call: ast.Call | None) -> Iterator[str]:
    """The faults of the arguments of one call."""
    if call is None:
        return
    words = signature.split()
    stars = [w for w in words if w[0] == "*"]
    for keyword in call.keywords:
        if keyword.arg and keyword.arg not in words and not any(w[:2] == "**" for w in stars):
            yield f"CuPy's {path} has no argument {keyword.arg!r}"
    most = words.index(stars[0]) if stars else len(words)
    variadic = any(w != "*" and w[1] != "*" for w in stars)
    if len(call.args) > most and not variadic and not any(isinstance(a, ast.Starred) for a in call.args):
        yield f"CuPy's {path} takes {most} positional arguments, not {len(call.args)}"


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    found = []
    for top in [Path(a) for a in arguments] or [ROOT / "tinyft"]:
        if top.is_dir():
            found += check_tree(top)
        else:
            found += [f"{top}:{line}: {text}" for line, text in check(top.read_text(encoding="utf-8"))]
    print("\n".join(found) or "xpcheck: no fault")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

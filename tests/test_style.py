"""The house rules of a line and of an expression: columns, lambdas, comprehensions, docstrings, type hints.

Each check takes a source text, so that the tests can show planted faults to it.
"""
from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest
from helpers import host_only
from house import FUNCTIONS, SOURCES, functions, parse

pytestmark = host_only

ROOT = Path(__file__).resolve().parents[1]

RIDDLES_LEFT = 5                          # docstrings in tinyft/ that begin with a question word; may only fall
UNDOCUMENTED_LEFT = 60                    # public names in tinyft/ without a docstring; may only fall

COLUMNS = 120
METHOD_COLUMNS = 100                                       # also of the exercises
FUNCTION_LINES = 60                                        # one screen
# `hasattr` of these asks for a feature of the platform or of the thread, not for the kind of an object.
MODULES_AND_LOCALS = {"_local", "os", "signal", "sys", "np"}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DOCUMENTED = (ast.Module, ast.ClassDef, *FUNCTIONS)
QUESTION = re.compile(r"(What|Whether|Where|How|Those|That which|Whose)\b")
# Calls whose boolean argument cannot have a name, or reads without one.
TAKE_BOOLEANS = {
    "append", "asarray", "bool_", "full", "get", "getattr", "grid", "param", "pop", "requires_grad_", "set_axisbelow",
    "set_training_mode", "setattr", "setdefault", "train",
}


@lru_cache(None)
def files() -> dict[str, str]:
    """{path from the root: text} of the library, the tests and the exercises."""
    paths = [*(ROOT / "tinyft").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    paths += (ROOT / "lessons").glob("*/exercises*.py")
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}


# ── the rules: each yields (line, fault) ─────────────────────────────────────────────────────────────────────────────
Faults = Iterator[tuple[int, str]]


def widest(path: str) -> int:
    """The most columns that a line of this file may have."""
    narrow = path.startswith(("tinyft/methods/", "lessons/"))
    return METHOD_COLUMNS if narrow else COLUMNS


def columns(text: str, path: str) -> Faults:
    """Lines wider than the limit of their file."""
    for number, line in enumerate(text.splitlines(), start=1):
        if len(line) > widest(path):
            yield number, f"has {len(line)} columns, at most {widest(path)}"


def function_length(text: str, path: str) -> Faults:
    """Functions longer than one screen."""
    for function in functions(text):
        lines = function.end_lineno - function.lineno + 1
        if lines > FUNCTION_LINES:
            yield function.lineno, f"{function.name} has {lines} lines, at most {FUNCTION_LINES}"


def assigned_lambda(text: str, path: str) -> Faults:
    """Lambdas that are given a name: a `def` says the same and has a name in tracebacks."""
    for node in ast.walk(parse(text)):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and not is_attribute(node):
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            if any(isinstance(value, ast.Lambda) for value in values):
                yield node.lineno, "assigns a lambda"


def is_attribute(node: ast.Assign | ast.AnnAssign | ast.NamedExpr) -> bool:
    """True for `fake.method = ...`: a test puts a small function into an object."""
    return isinstance(node, ast.Assign) and all(isinstance(target, ast.Attribute) for target in node.targets)


def nested_lambda(text: str, path: str) -> Faults:
    """Lambdas inside a lambda."""
    for node in ast.walk(parse(text)):
        if isinstance(node, ast.Lambda) and contains(node.body, ast.Lambda):
            yield node.lineno, "has a lambda inside a lambda"


def nested_comprehension(text: str, path: str) -> Faults:
    """Comprehensions inside a comprehension."""
    for node in ast.walk(parse(text)):
        if isinstance(node, COMPREHENSIONS):
            if any(contains(child, COMPREHENSIONS) for child in ast.iter_child_nodes(node)):
                yield node.lineno, "has a comprehension inside a comprehension"


def contains(node: ast.AST, kinds: type | tuple[type, ...]) -> bool:
    """True if the node, or a node below it, is one of these kinds."""
    return any(isinstance(inner, kinds) for inner in ast.walk(node))


def positional_boolean(text: str, path: str) -> Faults:
    """Calls with True or False as a positional argument."""
    for node in ast.walk(parse(text)):
        if not isinstance(node, ast.Call) or called_name(node) in TAKE_BOOLEANS:
            continue
        if any(isinstance(a, ast.Constant) and isinstance(a.value, bool) for a in node.args):
            yield node.lineno, f"{called_name(node)} has a positional boolean"


def called_name(call: ast.Call) -> str:
    """The last component of the called expression: `array.asarray(...)` -> asarray."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def quotes(text: str, path: str) -> Faults:
    """Docstrings that do not stand in triple double quotes."""
    for node in ast.walk(parse(text)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            expression = node.body[0]
            source = ast.get_source_segment(text, expression) or ""
            if not source.lstrip("rR").startswith('"""'):
                yield expression.lineno, 'has a docstring that is not in """'


def type_hints(text: str, path: str) -> Faults:
    """Public functions, and public methods of public classes, with a parameter or a return value without a type.

    The exercises and the ops are exempt: an op's shape string says more than `Array` would.
    """
    for node in parse(text).body:
        if isinstance(node, FUNCTIONS) and is_public(node) and not is_op(node):
            yield from untyped(node, node.name, has_self=False)
        if isinstance(node, ast.ClassDef) and is_public(node):
            for method in node.body:
                if isinstance(method, FUNCTIONS) and is_public(method):
                    static = "staticmethod" in [ast.unparse(d) for d in method.decorator_list]
                    yield from untyped(method, f"{node.name}.{method.name}", has_self=not static)


def untyped(function: ast.FunctionDef | ast.AsyncFunctionDef, name: str, has_self: bool) -> Faults:
    """The parameters of one function that have no type, and its return value if that has none."""
    a = function.args
    parameters = [*a.posonlyargs, *a.args][has_self:] + a.kwonlyargs
    parameters += [p for p in (a.vararg, a.kwarg) if p is not None]
    missing = [p.arg for p in parameters if p.annotation is None]
    if function.returns is None:
        missing.append("the return value")
    if missing:
        yield function.lineno, f"{name} has no type for {', '.join(missing)}"


def is_public(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """True if the name does not begin with an underscore."""
    return not node.name.startswith("_")


def is_op(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """True for a function under the decorator `@op(...)`."""
    return any(isinstance(d, ast.Call) and called_name(d) == "op" for d in function.decorator_list)


def hasattr_dispatch(text: str, path: str) -> Faults:
    """`hasattr` as a question for the kind of an object: a class or a protocol answers that."""
    for node in ast.walk(parse(text)):
        if isinstance(node, ast.Call) and called_name(node) == "hasattr":
            subject = ast.unparse(node.args[0]) if node.args else ""
            if subject not in MODULES_AND_LOCALS:
                yield node.lineno, f"asks hasattr({subject}, ...)"


Rule = Callable[[str, str], Faults]
EVERYWHERE: list[Rule] = [
    columns, function_length, assigned_lambda, nested_lambda, nested_comprehension, positional_boolean,
]
LIBRARY: list[Rule] = [quotes, type_hints, hasattr_dispatch]


def rules_for(path: str) -> list[Rule]:
    """The rules that a file must follow."""
    if path.startswith("tinyft/"):
        return [*EVERYWHERE, *LIBRARY]
    return EVERYWHERE


@pytest.mark.parametrize("rule", [*EVERYWHERE, *LIBRARY], ids=lambda rule: rule.__name__)
def test_every_file_follows_the_rule(rule):
    faults = []
    for path, text in files().items():
        if rule in rules_for(path):
            faults += [f"{path}:{line}: {fault}" for line, fault in rule(text, path)]
    assert not faults, "\n".join(["", *faults[:20]])


PLANTED: list[tuple[Rule, str]] = [
    (columns, "x" * 121),
    (function_length, "def long():\n" + "    pass\n" * 60),
    (function_length, "class A:\n    async def long(self):\n" + "        pass\n" * 60),
    (assigned_lambda, "f = lambda x: x"),
    (assigned_lambda, "f: Callable = lambda x: x"),
    (assigned_lambda, "a, f = 1, lambda x: x"),
    (assigned_lambda, "g((f := lambda x: x))"),
    (nested_lambda, "apply(lambda x: (lambda y: x + y))"),
    (nested_lambda, "apply(lambda x: map(lambda y: y, x))"),
    (nested_comprehension, "[[x for x in row] for row in rows]"),
    (nested_comprehension, "[x for x in {y for y in rows}]"),
    (nested_comprehension, "any(x for x in rows if all(y for y in x))"),
    (nested_comprehension, "{k: {i: j for i, j in v} for k, v in d}"),
    (positional_boolean, "Attention(width, heads, True)"),
    (positional_boolean, "model.run(False)"),
    (quotes, "'A module.'"),
    (quotes, 'def f():\n    "A function."'),
    (quotes, "class A:\n    '''A class.'''"),
    (type_hints, "def f(x) -> int: ..."),
    (type_hints, "def f(x: int): ..."),
    (type_hints, "def f(*xs) -> int: ..."),
    (type_hints, "def f(*, x) -> int: ..."),
    (type_hints, "class A:\n    def f(self, x) -> int: ..."),
    (type_hints, "class A:\n    @staticmethod\n    def f(x) -> int: ..."),
    (hasattr_dispatch, "if hasattr(batches, 'state'): pass"),
]
ALLOWED: list[tuple[Rule, str]] = [
    (columns, "x" * 120),
    (function_length, "def long():\n" + "    pass\n" * 59),
    (assigned_lambda, "value = sorted(xs, key=lambda x: -x)"),
    (assigned_lambda, "fake.runtime.device = lambda: 0"),
    (nested_lambda, "return a + b, (lambda g: g, lambda g: g)"),
    (nested_comprehension, "[x for row in rows for x in row]"),
    (nested_comprehension, "a = [x for x in xs]\nb = [y for y in a]"),
    (positional_boolean, "Attention(width, heads, causal=True)"),
    (positional_boolean, "getattr(f, 'ready', False)"),
    (quotes, '"""A module."""\ndef f():\n    r"""A function."""\nx = "no docstring"'),
    (type_hints, "def _f(x): ..."),
    (type_hints, "@op('... -> ...')\ndef exp(x): ..."),
    (type_hints, "class A:\n    def f(self, x: int) -> int: ...\n    def __init__(self, x): ..."),
    (hasattr_dispatch, "hasattr(signal, 'setitimer')"),
]


@pytest.mark.parametrize("rule, text", PLANTED)
def test_a_planted_fault_is_caught(rule, text):
    assert list(rule(text, "tinyft/nn.py"))


@pytest.mark.parametrize("rule, text", ALLOWED)
def test_an_allowed_line_is_not_reported(rule, text):
    assert not list(rule(text, "tinyft/nn.py"))


def test_methods_and_exercises_are_narrower():
    for path in ("tinyft/methods/reparameterized/lora.py", "lessons/01_autograd/exercises.py"):
        assert list(columns("x" * 101, path))
        assert not list(columns("x" * 100, path))


# ── docstrings of the whole library ──────────────────────────────────────────────────────────────────────────────────
def riddles(sources: dict[str, str]) -> list[str]:
    """Docstrings that begin with a question word in place of a noun."""
    found = []
    for name, text in sources.items():
        for node in ast.walk(parse(text)):
            doc = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
            if doc and QUESTION.match(doc):
                found.append(f"{name}: {doc.splitlines()[0]}")
    return found


def undocumented(sources: dict[str, str]) -> list[str]:
    """Public functions and classes, and public methods of public classes, without a docstring."""
    found = []
    for name, text in sources.items():
        for node in parse(text).body:
            if not isinstance(node, (ast.ClassDef, *FUNCTIONS)) or not is_public(node):
                continue
            public = [node]
            if isinstance(node, ast.ClassDef):
                public += [m for m in node.body if isinstance(m, (ast.ClassDef, *FUNCTIONS)) and is_public(m)]
            found += [f"{name}: {n.name}" for n in public if ast.get_docstring(n) is None]
    return found


def test_docstrings_begin_with_a_noun_or_an_equation():
    found = riddles(SOURCES)
    assert len(found) <= RIDDLES_LEFT, "\n".join(["", *found])


def test_public_names_have_docstrings():
    found = undocumented(SOURCES)
    assert len(found) <= UNDOCUMENTED_LEFT, "\n".join(["", *found])


def test_riddles_and_silent_names_are_counted():
    for text in ('"""How so."""', 'def f():\n    """Whether it is so."""', 'class A:\n    """What it is."""'):
        assert len(riddles({"m": text})) == 1
    assert not riddles({"m": '"""True if it is so."""\ndef f():\n    """However it is."""'})
    functions_only = "def f(): pass\ndef _g(): pass\n"
    classes = "class A:\n    def h(self): pass\n    def _i(self): pass\nclass _B:\n    def j(self): pass\n"
    assert undocumented({"m": functions_only + classes}) == ["m: f", "m: A", "m: h"]

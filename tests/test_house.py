"""The house rules of the source tree: direction of imports, forbidden calls, cost of importing, documented names.

Each check takes the sources as {module: text}, so that the tests can show planted faults to it.
tests/test_style.py holds the rules for single lines and expressions.
"""
from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import re
import subprocess
import sys

import pytest
from helpers import host_only
from house import PACKAGE, SOURCES, Sources, imports, parse, part

import tinyft
from tinyft.edit import Method
from tinyft.methods import ALL, methods
from tinyft.tensor import OPS

pytestmark = host_only

# ── who may import whom ──────────────────────────────────────────────────────────────────────────────────────────────
# Each part of the core may import the parts before it.
CORE = ["dispatch", "array", "precision", "tensor", "operands", "ops", "functional", "context",
        "recomputation", "printing", "nn", "patterns", "edit"]
BELOW_EDIT = set(CORE) - {"edit"}
MAY_IMPORT: dict[str, set[str]] = {
    **{name: set(CORE[:i]) for i, name in enumerate(CORE)},
    "array": {"dispatch", "strict", "sizes"},              # these two backends are imported when they are chosen
    "strict": set(),
    "sizes": set(),
    "checks": set(),                                       # every part may import these two, which import nothing
    "keywords": set(),
    "atomic": set(),
    "files": {"atomic"},
    "assets": set(),
    "tokens": set(),
    "data": {"tokens", "identity", "files"},
    "identity": {"array", "tensor", "nn"},
    "dynamic": {"array"},
    "optim": {"dispatch", "array", "dynamic", "precision", "tensor", "ops"},
    "kernels": {"dispatch", "atomic", "array", "precision", "tensor", "operands", "ops", "optim", "sizes"},
    "models": BELOW_EDIT,
    "decode": {*BELOW_EDIT, "models"},
    "beam": {*BELOW_EDIT, "models", "decode"},
    "predict": {*BELOW_EDIT, "decode", "beam", "models", "data", "tokens"},
    "pooling": {"array"},
    "embed": {*BELOW_EDIT, "kernels", "models", "data", "tokens", "predict", "pooling"},
    "methods": set(CORE),                                  # a method never imports a model
    "compress": {*CORE, "dynamic", "files", "identity", "models", "beam", "train"},
    "adapters": {*CORE, "files", "identity", "methods", "formats", "models"},    # formats: transformers' names
    "train": {*CORE, "kernels", "files", "identity", "optim", "models", "data"},
    "memory": {*CORE, "sizes", "kernels", "optim", "models", "train"},
    "chat": set(),
    "formats": {*CORE, "files", "models", "tokens", "compress", "pooling"},
}
# The outermost parts may import anything. Only they import each other; `tinyft` itself may import learn.
OUTERMOST = {"compare", "commands", "cli", "pretrain", "pretrain_names", "learn", "doctor", "real"}


def wrong_direction(sources: Sources) -> list[str]:
    """Imports against the table above, imports of lessons or tests, and imports of CuPy outside its two places."""
    found = []
    for module in sources:
        for target in imports(sources, module):
            if not import_allowed(module, target):
                found.append(f"{module} imports {target}")
    return found


def import_allowed(module: str, target: str) -> bool:
    """True if `module` may import `target`."""
    top = target.split(".")[0]
    source, destination = part(module), part(target)
    if top in ("tests", "lessons"):
        return False
    if top == "cupy":
        return source == "array" or module.startswith("tinyft.kernels.cuda")
    if top != "tinyft" or destination in ("", source, "checks", "keywords") or source in OUTERMOST:
        return True
    if source == "":
        return destination == "learn" or destination not in OUTERMOST
    return destination in MAY_IMPORT.get(source, set())


def test_imports_go_outward_only():
    assert wrong_direction(SOURCES) == []
    parts = {part(module) for module in SOURCES} - {""}
    assert parts <= MAY_IMPORT.keys() | OUTERMOST, "a new part of the package wants its line in MAY_IMPORT"


@pytest.mark.parametrize("module, line", [
    ("tinyft.tensor", "from . import ops"),
    ("tinyft.nn", "from .edit import Edit"),
    ("tinyft.ops", "from .nn import Module"),
    ("tinyft.ops", "import cupy"),
    ("tinyft.array", "from .tensor import Tensor"),
    ("tinyft.edit", "from .models import GPT"),
    ("tinyft.methods.selective.full", "from ...models import GPT"),
    ("tinyft.methods.reparameterized.lora", "from ... import models"),
    ("tinyft.methods.selective.full", "from ...train import fit"),
    ("tinyft.models.gpt", "from ..edit import attach"),
    ("tinyft.decode", "from .edit import Edit"),
    ("tinyft.train", "from ..compare import compare"),
    ("tinyft", "from .compare import compare"),
    ("tinyft.data", "import lessons.lora"),
    ("tinyft.nn", "from tests import helpers"),
    ("tinyft.kernels.numpy", "import cupy"),
    ("tinyft.ops", "def f():\n    from .nn import Module"),
    ("tinyft.optim", "import tinyft.nn"),
    ("tinyft.kernels", "from .. import nn"),
    ("tinyft.dispatch", "from . import array"),
    ("tinyft.identity", "from .edit import Method"),
    ("tinyft.adapters", "from ..train import fit"),
])
def test_an_import_in_the_wrong_direction_is_caught(module, line):
    before = SOURCES.get(module, "")
    assert wrong_direction(SOURCES | {module: f"{before}\n{line}\n"})


def import_cycles(sources: Sources) -> list[list[str]]:
    """Cycles of modules that import each other when they are imported."""
    edges = {}
    for module in sources:
        targets = set(imports(sources, module, lazy=False))
        edges[module] = sorted(t for t in targets if t in sources and t != module)
    found, done, path = [], set(), []

    def visit(module: str) -> None:
        if module in path:
            found.append([*path[path.index(module):], module])
        elif module not in done:
            path.append(module)
            for target in edges[module]:
                visit(target)
            path.pop()
            done.add(module)

    for module in sources:
        visit(module)
    return found


def test_the_import_graph_has_no_cycle():
    assert import_cycles(SOURCES) == []


@pytest.mark.parametrize("module, line", [
    ("tinyft.array", "from . import ops"),
    ("tinyft.files", "from . import train"),
    ("tinyft.models.blocks", "from .gpt import GPT"),
    ("tinyft.nn", "from tinyft import Tensor"),
])
def test_a_cycle_is_caught_and_a_lazy_import_is_none(module, line):
    assert import_cycles(SOURCES | {module: SOURCES[module] + f"\n{line}\n"})
    assert not import_cycles(SOURCES | {module: SOURCES[module] + f"\ndef f():\n    {line}\n"})


# ── forbidden calls and notes ────────────────────────────────────────────────────────────────────────────────────────
RUNS_CODE = {"tinyft.learn.lessons"}                       # runs the cells of the lessons that come with the library
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch"}
# Numba pickles what it writes beside the machine code. Who could change such a file could change the code in it.
UNPICKLES = {"tinyft.kernels.compiled.compiler"}
RUNNERS = {"eval", "exec", "compile", "__import__"}
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|Users|tmp|work)/\w+")


def dangers(sources: Sources) -> list[str]:
    """Calls and imports that could run code from a file, notes of unfinished work, and paths of one machine."""
    found = []
    for module, text in sources.items():
        if module not in UNPICKLES:
            found += [f"{module} imports {t}" for t in imports(sources, module) if t.split(".")[0] in UNPICKLERS]
        if module not in RUNS_CODE:
            calls = [node for node in ast.walk(parse(text)) if isinstance(node, ast.Call)]
            found += [f"{module}:{call.lineno} calls {ast.unparse(call.func)}" for call in calls if runs_code(call)]
        found += [f"{module} holds a {match[0]}" for match in UNFINISHED.finditer(text)]
        found += [f"{module} names {match[0]}, a path of one machine" for match in MACHINE_PATH.finditer(text)]
    return found


def runs_code(call: ast.Call) -> bool:
    """True for eval, exec, compile, __import__, and for any call that may allow pickles."""
    if isinstance(call.func, ast.Name) and call.func.id in RUNNERS:
        return True
    for keyword in call.keywords:
        is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if keyword.arg == "allow_pickle" and not is_false:
            return True
    return False


def test_nothing_unpickles_evaluates_or_is_left_undone():
    assert dangers(SOURCES) == []


@pytest.mark.parametrize("line", [
    "import pickle",
    "from pickle import loads",
    "def f():\n    import torch",
    "x = eval('1')",
    "exec('x = 1')",
    "np.load(f, allow_pickle=True)",
    "np.load(f, allow_pickle=flag)",
    "# TODO: this",
    "x = 1  # FIXME",
    "p = '/home/" + "me/x'",
])
def test_a_danger_is_caught(line):
    assert dangers({"tinyft.nn": line + "\n"})


def test_harmless_lookalikes_are_not_reported():
    lines = ["model.eval()", "re.compile('x')", "ast.literal_eval('1')"]
    lines += ["np.load(f, allow_pickle=False)", "todo = 'a pickle'"]
    assert not dangers({"tinyft.nn": "\n".join(lines) + "\n"})


# ── the cost of importing ────────────────────────────────────────────────────────────────────────────────────────────
HEAVY = [
    "matplotlib", "torch", "cupy", "hypothesis", "pytest", "transformers", "scipy", "pandas", "PIL", "dask",
    "numba", "llvmlite", "multiprocessing.pool", "concurrent.futures.process",
    "tinyft.compare", "tinyft.strict", "tinyft.pretrain", "tinyft.cli", "tinyft.learn.checker", "tinyft.learn.exercise",
    "tinyft.data.baselines",
]


def modules_after(code: str) -> set[str]:
    """The names in sys.modules after `code` ran in a new process."""
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "TINYFT_BACKEND": "numpy"}
    command = [sys.executable, "-c", code + "; import sys; print(*sys.modules)"]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_importing_the_library_imports_nothing_heavy():
    dependencies = modules_after("import numpy, ml_dtypes, safetensors.numpy, tokenizers, tqdm")
    added = modules_after("import tinyft") - dependencies
    assert not [name for name in HEAVY if name in added]
    assert len([name for name in added if not name.startswith("tinyft")]) < 60
    assert "tinyft.compare" in modules_after("import tinyft.compare"), "the check would not see a heavy module"


# ── documented names ─────────────────────────────────────────────────────────────────────────────────────────────────
# Every public function and class of the modules below these names has a docstring.
READABLE = ("adapters", "beam", "checks", "decode", "files", "functional", "identity", "methods", "optim", "train")


def undocumented(objects: dict[str, object]) -> list[str]:
    """Names of the objects without a docstring of their own. A dataclass's generated signature does not count."""
    found = []
    for name, thing in objects.items():
        doc = inspect.getdoc(thing) if inspect.ismodule(thing) else getattr(thing, "__doc__", None)
        doc = (doc or "").strip()
        generated = dataclasses.is_dataclass(thing) and doc.startswith(f"{name}(")
        if len(doc) < 10 or generated:
            found.append(name)
    return found


def test_every_public_name_exists_once_and_is_documented():
    names = tinyft.__all__
    assert len(names) == len(set(names))
    assert all(hasattr(tinyft, name) for name in names)
    assert undocumented({name: getattr(tinyft, name) for name in names}) == []
    modules = {m: sys.modules[m] for m in SOURCES if m in sys.modules and SOURCES[m].strip()}
    assert undocumented(modules) == []

    @dataclasses.dataclass
    class Mute:
        x: int = 0

    assert undocumented({"Mute": Mute, "f": lambda x: x}) == ["Mute", "f"]


def silent(module: str, text: str) -> list[str]:
    """Public functions and classes at the top level of a module that have no docstring."""
    public = [n for n in parse(text).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != "_"]
    return [f"{module}.{node.name}" for node in public if not ast.get_docstring(node)]


def test_every_public_function_and_class_of_a_module_is_documented():
    modules = [module for module in SOURCES if part(module) in READABLE]
    assert [name for module in modules for name in silent(module, SOURCES[module])] == []
    assert silent("m", "def f(): pass\ndef _g(): pass\nclass A:\n    'A docstring.'\n") == ["m.f"]


def test_every_op_has_shapes_and_a_docstring_with_its_formula():
    for name, op in OPS.items():
        inputs, arrow, _ = op.shapes.partition("->")
        assert arrow and inputs.strip(), name
        assert len(op.__doc__ or "") > 10, name


def test_every_method_can_be_made_without_arguments_and_is_listed():
    entries = {entry.cls: entry for entry in methods()}
    ours = {cls for cls in Method.__subclasses__() if cls.__module__.startswith("tinyft.methods.")}
    assert set(entries) == set(ALL) == ours
    assert len(methods()) == len(ALL)
    files = {module for module in SOURCES if module.startswith("tinyft.methods.") and module.count(".") == 3}
    assert {cls.__module__ for cls in ALL} == files, "one file per method"
    families = ("selective", "additive", "reparameterized", "nonparametric", "retention")
    for cls, entry in entries.items():
        assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
        assert cls.__bases__ == (Method,), "no method inherits from another"
        assert cls() == cls()
        assert entry.family in families and len(entry.paper) > 10 and len(entry.line) > 10
        assert getattr(tinyft, cls.__name__) is cls and cls.__name__ in tinyft.__all__


def test_the_package_declares_that_it_is_typed():
    assert (PACKAGE / "py.typed").exists()

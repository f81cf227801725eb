"""The house rules, read off the sources: who may import whom, how long a file may be, what may not stand in it, what must be documented.

Each check takes the sources as {module: text}, so that planted faults can be shown to it as well.
"""
from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

import tinyft
from tinyft.edit import Method
from tinyft.methods import ALL, methods
from tinyft.tensor import OPS

PACKAGE = Path(tinyft.__file__).parent
Sources = dict[str, str]


def sources() -> Sources:
    "Every module of the package: dotted name (a package's is its own) -> text."
    out = {}
    for p in sorted(PACKAGE.rglob("*.py")):
        parts = p.relative_to(PACKAGE.parent).with_suffix("").parts
        out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = p.read_text(encoding="utf-8")
    return out


SOURCES = sources()
PACKAGES = {m for m in SOURCES if any(n.startswith(m + ".") for n in SOURCES)}


parse = lru_cache(None)(ast.parse)


@lru_cache(None)
def functions(text: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [n for n in ast.walk(parse(text)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


@lru_cache(None)
def imported(module: str, text: str, lazy: bool) -> list[tuple[str, str]]:
    "(where from, what) of every import; without `lazy`, only of those that run when the module is imported."
    inside = {id(n) for f in functions(text) for n in ast.walk(f)} if not lazy else set()
    out = []
    for node in ast.walk(parse(text)):
        if isinstance(node, ast.Import) and id(node) not in inside:
            out += [(a.name, "") for a in node.names]
        elif isinstance(node, ast.ImportFrom) and id(node) not in inside:
            here = module.split(".") if module in PACKAGES else module.split(".")[:-1]
            start = ".".join(here[:len(here) - node.level + 1] + ([node.module] if node.module else [])) if node.level else node.module
            out += [(start, a.name) for a in node.names]
    return out


def imports(sources: Sources, module: str, lazy: bool = True) -> list[str]:
    "What a module imports, as dotted names: of `from a import b`, a.b if that is a module of ours, else a."
    return [f"{start}.{name}" if f"{start}.{name}" in sources else start for start, name in imported(module, sources[module], lazy)]


# ── who may import whom ──────────────────────────────────────────────────────────────────────────────────────────────
CORE = ["array", "precision", "tensor", "ops", "functional", "nn", "edit"]       # each may import those before it
ABOVE_NN = set(CORE[:6])
MAY: dict[str, set[str]] = {
    **{name: set(CORE[:i]) for i, name in enumerate(CORE)},
    "strict": set(), "data": set(), "files": set(), "assets": set(),
    "optim": {"array", "precision", "tensor", "ops"},
    "kernels": {"array", "precision", "tensor", "ops", "optim"},
    "models": ABOVE_NN, "decode": ABOVE_NN,
    "methods": set(CORE), "compress": set(CORE),           # they know a model by its paths, never by its class
    "adapters": {*CORE, "files"},
    "train": {*CORE, "kernels", "files", "optim", "models", "data"},
    "formats": {*CORE, "files", "models"},
}
MAY["array"] = {"strict"}                                                        # opened when asked for
OUTERMOST = {"compare", "cli", "pretrain", "learn", "memory", "doctor"}          # these import anything; nothing but they imports them,
                                                                                 # but for tinyft.check, which opens the rest of learn when called


def part(module: str) -> str:
    return (module.split(".") + [""])[1]


def wrong_direction(sources: Sources) -> list[str]:
    found = []
    for module in sources:
        me = part(module)
        for target in imports(sources, module):
            top, to = target.split(".")[0], part(target)
            if top in ("tests", "lessons") or (top == "cupy" and me != "array" and not module.startswith("tinyft.kernels.cuda")):
                found.append(f"{module} imports {target}")
            elif top == "tinyft" and to and to != me and me not in OUTERMOST:
                allowed = to not in OUTERMOST - {"learn"} if me == "" else to in MAY.get(me, set())
                if not allowed:
                    found.append(f"{module} imports {target}")
    return found


def test_imports_go_outward_only():
    assert wrong_direction(SOURCES) == []
    assert {part(m) for m in SOURCES} - {""} <= MAY.keys() | OUTERMOST, "a new part of the house: give it its line in MAY"


@pytest.mark.parametrize("module, line", [
    ("tinyft.tensor", "from . import ops"), ("tinyft.nn", "from .edit import Edit"), ("tinyft.ops", "from .nn import Module"),
    ("tinyft.ops", "import cupy"), ("tinyft.array", "from .tensor import Tensor"), ("tinyft.edit", "from .models import GPT"),
    ("tinyft.methods.selective.full", "from ...models import GPT"), ("tinyft.methods.reparameterized.lora", "from ... import models"),
    ("tinyft.methods.selective.full", "from ...train import fit"),
    ("tinyft.models.gpt", "from ..edit import attach"), ("tinyft.decode", "from .edit import Edit"), ("tinyft.train", "from ..compare import compare"),
    ("tinyft", "from .compare import compare"), ("tinyft.data", "import lessons.lora"), ("tinyft.nn", "from tests import helpers"),
    ("tinyft.kernels.numpy", "import cupy"), ("tinyft.ops", "def f():\n    from .nn import Module"), ("tinyft.optim", "import tinyft.nn"),
    ("tinyft.kernels", "from .. import nn")])
def test_an_import_in_the_wrong_direction_is_caught(module, line):
    assert wrong_direction(SOURCES | {module: SOURCES[module] + f"\n{line}\n"})


def cycles(sources: Sources) -> list[list[str]]:
    "Rings of modules that import each other when they are imported."
    edges = {m: sorted({t for t in imports(sources, m, lazy=False) if t in sources and t != m}) for m in sources}
    found, done, path = [], set(), []

    def visit(m: str) -> None:
        if m in path:
            found.append([*path[path.index(m):], m])
        elif m not in done:
            path.append(m)
            for t in edges[m]:
                visit(t)
            done.add(path.pop())
    for m in sources:
        visit(m)
    return found


def test_no_module_imports_itself_by_way_of_others():
    assert cycles(SOURCES) == []
    for module, line in (("tinyft.array", "from . import ops"), ("tinyft.files", "from . import train"),
                         ("tinyft.models.blocks", "from .gpt import GPT"), ("tinyft.nn", "from tinyft import Tensor")):
        assert cycles(SOURCES | {module: SOURCES[module] + f"\n{line}\n"})
    assert not cycles(SOURCES | {"tinyft.array": SOURCES["tinyft.array"] + "\ndef f():\n    from . import ops\n"})      # later is another matter


# ── how long ─────────────────────────────────────────────────────────────────────────────────────────────────────────
LINES, METHOD_LINES, FUNCTION_LINES = 400, (15, 90), 60
LEARN = 1940                                             # the exercise engine and the lesson runner; design: 1,200, but they refuse and explain a
                                                         # lot, and take kernels in CUDA C beside functions
BOOK = {"tinyft.learn.book", "tinyft.learn.annotate"}      # no part of the engine: they make the site, and nothing imports them
                                                         # nor is tinyft.learn.cuda, which runs CUDA C on the CPU: lesson 23's own subject
BUDGETS = {
    "tinyft.tensor": 325,                                # design: 200; ownership of gradients, versions of leaves, several values, 16 bits, anomalies
    "tinyft.edit": 335,                                  # 260; merging is all or nothing, and every refusal is a sentence
    "tinyft.ops": 490,                                   # a table of primitives: as long as there are ops, each on its own readable
    "tinyft.optim.optimizers": 415,                                 # groups of tensors, and of those in 16 bits, beside four optimisers and three schedules
    "tinyft.methods.additive.prefix": 120,               # two papers' worth: the prefix, its reparameterisation by an MLP, its shift of positions
}


def too_long(sources: Sources) -> list[str]:
    found = []
    for module, text in sources.items():
        n, is_method = text.count("\n"), module.count(".") == 3 and module.startswith("tinyft.methods.")
        low, high = METHOD_LINES if is_method else (0, LINES)
        high = BUDGETS.get(module, high)
        if not low <= n <= high:
            found.append(f"{module} has {n} lines; its budget is {low} to {high}")
        found += [f"{module}.{f.name} has {f.end_lineno - f.lineno + 1} lines; a function has one screen, {FUNCTION_LINES}"
                  for f in functions(text) if f.end_lineno - f.lineno >= FUNCTION_LINES]
    engine = sum(text.count("\n") for m, text in sources.items()
                 if m.startswith("tinyft.learn") and ".exercises" not in m and m not in BOOK and not m.startswith("tinyft.learn.cuda"))
    return found + [f"tinyft.learn has {engine} lines; its budget is {LEARN}"] * (engine > LEARN)


def test_every_file_and_function_is_within_its_budget():
    assert too_long(SOURCES) == []
    assert BUDGETS.keys() <= SOURCES.keys()
    grown = lambda m, by: SOURCES | {m: SOURCES[m] + "#\n" * by}
    for module, by in (("tinyft.nn", 400), ("tinyft.tensor", 81), ("tinyft.methods.selective.full", 90), ("tinyft.methods.additive.prefix", 60)):
        assert module in too_long(grown(module, by))[0]
    assert too_long(SOURCES | {"tinyft.methods.selective.full": '"Too little to be a method."\n'})
    assert "tinyft.nn.long has 61 lines" in too_long(SOURCES | {"tinyft.nn": "def long():\n" + "    pass\n" * 60})[0]
    assert not too_long(SOURCES | {"tinyft.nn": "def long():\n" + "    pass\n" * 59})


# ── what may not stand there ─────────────────────────────────────────────────────────────────────────────────────────
RUNS_CODE = {"tinyft.learn.lessons"}                     # its work is to run the cells of the lessons that come with the library
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch"}


def dangers(sources: Sources) -> list[str]:
    "Whatever could run what a file says, and notes of things left undone."
    found = []
    for module, text in sources.items():
        found += [f"{module} imports {t}" for t in imports(sources, module) if t.split(".")[0] in UNPICKLERS]
        for node in ast.walk(parse(text)):
            if isinstance(node, ast.Call) and module not in RUNS_CODE:
                name = node.func.id if isinstance(node.func, ast.Name) else ""
                if name in ("eval", "exec", "compile", "__import__") or any(
                        k.arg == "allow_pickle" and getattr(k.value, "value", True) is not False for k in node.keywords):
                    found.append(f"{module}:{node.lineno} calls {name or 'something with allow_pickle'}")
        found += [f"{module} holds a {m[0]}" for m in re.finditer(r"\b(TODO|FIXME|XXX|HACK)\b", text)]
        found += [f"{module} names {m[0]}, a place on one machine" for m in re.finditer(r"(?<![\w.])/(home|root|Users|tmp|work)/\w+", text)]
    return found


def test_nothing_unpickles_evaluates_or_is_left_undone():
    assert dangers(SOURCES) == []


@pytest.mark.parametrize("line", ["import pickle", "from pickle import loads", "def f():\n    import torch", "x = eval('1')", "exec('x = 1')",
                                  "np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=flag)", "# TODO: this", "x = 1  # FIXME",
                                  "p = '/home/" + "me/x'"])
def test_a_danger_is_caught(line):
    assert dangers({"tinyft.nn": line + "\n"})


def test_what_only_looks_like_a_danger_is_not():
    assert not dangers({"tinyft.nn": "model.eval()\nre.compile('x')\nast.literal_eval('1')\nnp.load(f, allow_pickle=False)\ntodo = 'a pickle'\n"})


# ── what importing costs ─────────────────────────────────────────────────────────────────────────────────────────────
HEAVY = ["matplotlib", "torch", "cupy", "hypothesis", "pytest", "transformers", "scipy", "pandas", "PIL", "dask", "tinyft.compare", "tinyft.strict",
         "tinyft.pretrain", "tinyft.cli", "tinyft.learn.checker",
         "tinyft.learn.exercise", "tinyft.data.baselines", "multiprocessing.pool", "concurrent.futures.process"]


def loaded(code: str) -> set[str]:
    "The modules that are there after running this in a new process."
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "TINYFT_BACKEND": "numpy"}
    out = subprocess.run([sys.executable, "-c", code + "; import sys; print(*sys.modules)"], env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return set(out.stdout.split())


def test_importing_the_library_brings_in_nothing_heavy_and_reads_no_data():
    bare = loaded("import numpy, ml_dtypes, safetensors.numpy, tokenizers, tqdm")
    mine = loaded("import tinyft") - bare
    assert not [m for m in HEAVY if m in mine] and len([m for m in mine if not m.startswith("tinyft")]) < 60
    assert "tinyft.compare" in loaded("import tinyft.compare")                   # the check can see such a thing


# ── what is documented ───────────────────────────────────────────────────────────────────────────────────────────────
def undocumented(things: dict[str, object]) -> list[str]:
    "Names whose object says nothing of its own (a dataclass says its signature by itself)."
    said = {n: (inspect.getdoc(o) if inspect.ismodule(o) else getattr(o, "__doc__", None)) or "" for n, o in things.items()}
    return [n for n, doc in said.items() if len(doc.strip()) < 10 or (dataclasses.is_dataclass(things[n]) and doc.startswith(f"{n}("))]


def test_every_public_name_exists_once_and_is_documented():
    names = tinyft.__all__
    assert len(names) == len(set(names)) and all(hasattr(tinyft, n) for n in names)
    assert undocumented({n: getattr(tinyft, n) for n in names}) == []
    assert undocumented({m: sys.modules[m] for m in SOURCES if m in sys.modules and SOURCES[m].strip()}) == []

    @dataclasses.dataclass
    class Mute:
        x: int = 0
    assert undocumented({"Mute": Mute, "f": lambda x: x}) == ["Mute", "f"]


def test_every_public_function_and_class_of_a_module_is_documented():
    def silent(module: str, text: str) -> list[str]:
        return [f"{module}.{n.name}" for n in parse(text).body
                if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != "_" and not ast.get_docstring(n)]
    readable = [f"tinyft.{m}" for m in ("train.batch", "train.loop", "optim.optimizers", "files", "adapters.files", "decode", "functional")]
    readable += [m for m in SOURCES if ".methods." in m]
    assert [s for m in readable for s in silent(m, SOURCES[m])] == []
    assert silent("m", "def f(): pass\ndef _g(): pass\nclass A:\n    'Said.'\n") == ["m.f"]


def test_every_op_has_shapes_and_a_docstring_with_its_formula():
    for name, f in OPS.items():
        ins, arrow, _ = f.shapes.partition("->")
        assert arrow and ins.strip() and len(f.__doc__ or "") > 10, name


def test_every_method_can_be_made_without_arguments_and_is_listed():
    entries = {e.cls: e for e in methods()}
    mine = {c for c in Method.__subclasses__() if c.__module__.startswith("tinyft.methods.")}
    assert set(entries) == set(ALL) == mine and len(methods()) == len(ALL)
    files = {m for m in SOURCES if m.startswith("tinyft.methods.") and m.count(".") == 3}
    assert {c.__module__ for c in ALL} == files, "one file per method"
    for cls, e in entries.items():
        made = cls()
        assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen and cls.__bases__ == (Method,) and made == cls()
        assert e.family in ("selective", "additive", "reparameterized", "nonparametric", "retention") and len(e.paper) > 10 and len(e.line) > 10
        assert getattr(tinyft, cls.__name__) is cls and cls.__name__ in tinyft.__all__


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").exists()

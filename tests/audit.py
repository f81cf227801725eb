"""Mutation audit: would the tests notice?  `make audit`, or: python tests/audit.py [--quick] [--only ops.py] [--jobs 2]

Takes the library's own source, makes one small error in it (another sign, a dropped factor, a constant doubled, an axis forgotten, a
transpose left out, `=` for `+=`), and runs the tests that touch the function, in a forked child, until one fails.  Errors are made in
values, pullbacks, initial values and scales; not in messages, annotations and checks of arguments.

tests/audit_equivalent.txt lists the mutants that change nothing a test could see, each with the reason:  key  ⟂  reason.
Exit status 1 if fewer than 95 % of the others are killed, or (--quick) if any unlisted one survives.  --quick takes a fixed sample.
"""
from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["HYPOTHESIS_PROFILE"] = "audit"
TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))

import pytest  # noqa: E402

import tinyft  # noqa: E402

PACKAGE = Path(tinyft.__file__).resolve().parent
EQUIVALENT = TESTS / "audit_equivalent.txt"
SUITES = {                                                                       # audited file -> the tests it answers to
    "ops.py": ["test_ops.py", "test_tensor.py"], "functional.py": ["test_ops.py"], "nn.py": ["test_nn.py"],
    "optim/optimizers.py": ["test_optim.py", "test_precision.py"],
    "edit.py": ["test_protocol.py", "test_methods.py"], "methods": ["test_methods.py", "test_protocol.py"],
    "precision.py": ["test_precision.py"], "optim/scaler.py": ["test_precision.py"],
    "models/blocks.py": ["test_models.py"], "models/gpt.py": ["test_models.py"], "models/bert.py": ["test_models.py"]}
LIMIT = 20                                                                       # seconds that a test may take besides; one that hangs is noticed
QUICK = 160
resolved = lru_cache(None)(os.path.realpath)                                     # asked for a million times


# ── the errors ───────────────────────────────────────────────────────────────────────────────────────────────────────
OTHER = {ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult], ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd],
         ast.Lt: [ast.LtE], ast.LtE: [ast.Lt], ast.Gt: [ast.GtE], ast.GtE: [ast.Gt], ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq],
         ast.And: [ast.Or], ast.Or: [ast.And], ast.FloorDiv: [ast.Mult]}
SWAP = {"sum": "mean", "mean": "sum", "max": "min", "maximum": "minimum", "minimum": "maximum", "zeros": "ones", "ones": "zeros"}
DROP = {"t", "flip", "exp", "sqrt", "tanh", "abs", "sign", "tril", "log", "tuple"}       # f(x) -> x
DROP_METHOD = {"swapaxes", "astype", "copy", "transpose", "permute", "detach"}           # x.f(...) -> x
KEEP_LEFT, KEEP_RIGHT = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.Mod), (ast.Add, ast.Mult)


def variants(node: ast.AST) -> Iterator[ast.AST]:
    "Everything that could stand in the place of an expression by mistake."
    if isinstance(node, ast.BinOp):
        yield from (ast.BinOp(node.left, o(), node.right) for o in OTHER.get(type(node.op), []))
        if isinstance(node.op, KEEP_LEFT):
            yield node.left
        if isinstance(node.op, KEEP_RIGHT):
            yield node.right
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield from (ast.Compare(node.left, [o()], node.comparators) for o in OTHER.get(type(node.ops[0]), []))
    elif isinstance(node, ast.BoolOp):
        yield from (ast.BoolOp(o(), node.values) for o in OTHER[type(node.op)])
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.UAdd):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield from map(ast.Constant, [1] if node.value == 0 else [2 * node.value, -node.value])
    elif isinstance(node, ast.IfExp):
        yield from (node.body, node.orelse)
    elif isinstance(node, ast.Attribute) and node.attr == "T":
        yield node.value
    elif isinstance(node, ast.Call):
        f, name = node.func, getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in SWAP:
            new = ast.Attribute(f.value, SWAP[name], f.ctx) if isinstance(f, ast.Attribute) else ast.Name(SWAP[name], f.ctx)
            yield ast.Call(new, node.args, node.keywords)
        if name in DROP and node.args:
            yield node.args[0]
        if name in DROP_METHOD and isinstance(f, ast.Attribute) and (name != "transpose" or node.args):
            yield f.value
        for i, k in enumerate(node.keywords):
            rest = node.keywords[:i] + node.keywords[i + 1:]
            if k.arg == "keepdims":
                yield ast.Call(f, node.args, rest)
            if k.arg == "axis":
                yield ast.Call(f, node.args, [*rest, ast.keyword("axis", ast.Constant(0))])
    elif isinstance(node, ast.AugAssign):
        yield from (ast.AugAssign(node.target, o(), node.value) for o in OTHER.get(type(node.op), []))
        yield ast.Assign([node.target], node.value)
    elif isinstance(node, ast.If) and not any(isinstance(s, ast.Raise) for s in node.body):
        yield ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)


@dataclass
class Mutant:
    "One error: `new` in the place `owner.field[index]`, inside a function of a file."
    file: str
    function: list[str]                                                          # ["Linear", "forward"]
    inner: int                                                                   # first line of the innermost function around it
    line: int
    owner: ast.AST
    place: str
    index: int | None
    old: ast.AST
    new: ast.AST
    arguments: ast.arguments
    in_defaults: bool
    key: str = ""
    killer: str = field(default="", compare=False)

    def put(self, node: ast.AST) -> None:
        if self.index is None:
            setattr(self.owner, self.place, node)
        else:
            getattr(self.owner, self.place)[self.index] = node


SKIPPED = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)


def sites(node: ast.AST, inner: int, is_op: bool, above: tuple = ()) -> Iterator[tuple]:
    "(owner, field, index, old, new, first line of the innermost function, nodes above) for every possible error below a node."
    above = (*above, node)
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "format_spec") or (isinstance(node, ast.Subscript) and name == "ctx"):
            continue
        if isinstance(node, ast.If) and name == "test" and any(isinstance(s, ast.Raise) for s in node.body):
            continue                                                             # a check of arguments
        if isinstance(node, ast.If) and name == "body" and any(isinstance(s, ast.Raise) for s in node.body):
            continue                                                             # what its message says
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, ast.AST) or isinstance(child, SKIPPED):
                continue
            index = i if isinstance(value, list) else None
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue                                                         # a docstring
            negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)      # its sign is changed one step above
            if negative and len(above) > 1 and getattr(getattr(above[-2], "func", None), "attr", "") == "reshape":
                continue                                                         # to NumPy's reshape every negative size is -1
            yield from ((node, name, index, child, new, inner, above) for new in variants(child)
                        if not (negative and isinstance(new, ast.Constant) and new.value < 0))
            if is_op and isinstance(node, ast.Tuple) and isinstance(child, ast.Lambda):
                yield node, name, index, child, ast.Constant(None), inner, above        # a pullback left out
            starts = [getattr(child, "lineno", inner), *(d.lineno for d in getattr(child, "decorator_list", []))] # where a function begins
            here = min(starts) if isinstance(child, (ast.Lambda, ast.FunctionDef)) else inner
            yield from sites(child, here, is_op, above)


def shown(node: ast.AST) -> str:
    return " ".join(ast.unparse(ast.fix_missing_locations(node)).split())


def context(above: tuple, old: ast.AST) -> ast.AST:
    "The smallest expression around an error that a reader recognises."
    around = [old, *reversed(above)] if isinstance(old, ast.expr) else [old]
    best = old
    for node in around:
        if not isinstance(node, (ast.expr, ast.arguments)) and node is not old:
            break
        best = node
        if len(shown(node)) >= 20:
            break
    return best


def mutants_of(file: str) -> tuple[ast.Module, list[Mutant]]:
    tree, out, seen = ast.parse((PACKAGE / file).read_text(encoding="utf-8")), [], Counter()

    def visit(body: list[ast.stmt], path: list[str]) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                visit(node.body, [*path, node.name])
            elif isinstance(node, ast.FunctionDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                is_op = any(isinstance(d, ast.Call) and getattr(d.func, "id", "") == "op" for d in node.decorator_list)
                for owner, place, index, old, new, inner, above in sites(node, first, is_op):
                    m = Mutant(file, [*path, node.name], inner, getattr(old, "lineno", first), owner, place, index, old, new, node.args,
                               node.args in above)
                    top = context(above, old)
                    before = shown(top)
                    m.put(ast.copy_location(new, old))
                    after = shown(new if top is old else top)
                    m.put(old)
                    if before != after:
                        m.key = f"{file}::{'.'.join(m.function)}::{before} -> {after}"
                        seen[m.key] += 1
                        m.key += f" ({seen[m.key]})" * (seen[m.key] > 1)
                        out.append(m)
    visit(tree.body, [])
    return tree, out


# ── putting one in place ─────────────────────────────────────────────────────────────────────────────────────────────
def live(m: Mutant) -> Any:
    "The function as it runs, without its decorators."
    f: Any = importlib.import_module("tinyft." + m.file[:-3].replace("/", "."))
    for name in m.function:
        f = inspect.getattr_static(f, name) if inspect.isclass(f) else vars(f)[name]
    f = getattr(f, "__func__", None) or getattr(f, "fget", None) or f
    return inspect.unwrap(f)


def codes(code: Any) -> Iterator[Any]:
    yield code
    for c in code.co_consts:
        if inspect.iscode(c):
            yield from codes(c)


def install(m: Mutant, tree: ast.Module) -> None:
    "Give the living function the body and the defaults of the mutated source."
    m.put(ast.fix_missing_locations(ast.copy_location(m.new, m.old)))
    f = live(m)
    module = compile(tree, f.__code__.co_filename, "exec")
    old = f.__code__
    f.__code__ = next(c for c in codes(module) if (c.co_name, c.co_firstlineno) == (old.co_name, old.co_firstlineno))
    if m.in_defaults:
        value = lambda d: eval(compile(ast.Expression(d), m.file, "eval"), f.__globals__)
        f.__defaults__ = tuple(map(value, m.arguments.defaults))
        f.__kwdefaults__ = {k.arg: value(d) for k, d in zip(m.arguments.kwonlyargs, m.arguments.kw_defaults) if d is not None}
    forget()


def forget() -> None:
    "Empty the library's caches: what was computed before must be computed again."
    for name, module in list(sys.modules.items()):
        if name.startswith("tinyft"):
            for g in vars(module).values():
                if hasattr(g, "cache_clear") and not isinstance(g, type):
                    g.cache_clear()


# ── running ──────────────────────────────────────────────────────────────────────────────────────────────────────────
class Audit:
    "A pytest plugin: collects the tests as pytest does, runs each once to see what it touches, then goes through the mutants."

    def __init__(self, options: argparse.Namespace, files: list[str]):
        self.options, self.files = options, files
        self.touched: dict[tuple[str, int], list[Any]] = {}
        self.seconds: dict[str, float] = {}
        self.ok, self.failed = False, False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    def passes(self, item: Any) -> bool:
        "Run one test with everything around it set up and torn down."
        self.failed = False
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        return not self.failed

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        say = lambda line: (reporter.ensure_newline(), reporter.write_line(line))
        say(f"{len(session.items)} tests once, to see which functions each touches ...")
        failed = [item.nodeid for item in session.items if not self.watch(item)]
        if failed:
            say("these fail without any mutation; mend them first:\n  " + "\n  ".join(failed))
            return True
        trees, mutants = {}, []
        for file in self.files:
            trees[file], found = mutants_of(file)
            mutants += found
        if self.options.match:
            mutants = [m for m in mutants if re.search(self.options.match, m.key)]
        if self.options.quick:
            listed = equivalents()                                               # the full audit looks whether they survive still
            mutants = [m for m in random.Random(0).sample(mutants, min(QUICK, len(mutants))) if m.key not in listed]
        say(f"{len(mutants)} mutants of {', '.join(self.files)}")
        self.run(session, mutants, trees, say)
        self.ok = self.report(mutants, say)
        return True

    def watch(self, item: Any) -> bool:
        "Run a test unmutated; remember which functions of the library it entered."
        seen: dict[int, Any] = {}
        start = time.process_time()
        forget()

        def look(frame: Any, event: str, arg: Any) -> None:
            seen[id(frame.f_code)] = frame.f_code                                # calls only: no line of a function is followed
        sys.settrace(look)
        try:
            passed = self.passes(item)
        finally:
            sys.settrace(None)
        self.seconds[item.nodeid] = time.process_time() - start
        root = str(PACKAGE)
        for code in seen.values():
            path = resolved(code.co_filename)
            if path.startswith(root):
                self.touched.setdefault((os.path.relpath(path, root).replace(os.sep, "/"), code.co_firstlineno), []).append(item)
        return passed

    def tests(self, m: Mutant) -> list[Any]:
        "The tests that enter the mutated function: those named after it first, then the fast ones."
        items = self.touched.get((m.file, m.inner), [])
        return sorted(items, key=lambda item: (m.function[-1] not in item.name, self.seconds[item.nodeid]))

    def child(self, m: Mutant, tree: ast.Module, out: int) -> None:
        "In a forked process: mutate, test, and leave.  The name of the test that failed goes through the pipe."
        try:
            install(m, tree)
            for item in self.tests(m):
                signal.setitimer(signal.ITIMER_PROF, LIMIT + 10 * self.seconds[item.nodeid])     # the processor's time: a busy machine kills nobody
                if not self.passes(item):
                    os.write(out, item.nodeid.encode()[:500])
                    os._exit(1)
            os._exit(0)
        except BaseException as e:
            os.write(out, f"! {type(e).__name__}: {e}".encode()[:500])
            os._exit(2)

    def run(self, session: pytest.Session, mutants: list[Mutant], trees: dict[str, ast.Module], say: Callable) -> None:
        running: dict[int, tuple[Mutant, int]] = {}
        start = time.perf_counter()
        for done, m in enumerate([*mutants, None]):
            while running and (m is None or len(running) >= self.options.jobs):
                pid, status = os.wait()
                was, pipe = running.pop(pid)
                text = os.read(pipe, 1000).decode(errors="replace")
                os.close(pipe)
                was.killer = "" if status == 0 else text or f"stopped by the clock, or by signal {status & 127}"
            if m is None:
                break
            read, write = os.pipe()
            if (pid := os.fork()) == 0:
                os.close(read)
                null = os.open(os.devnull, os.O_RDWR)
                for fd in (0, 1, 2):
                    os.dup2(null, fd)
                session.config.pluginmanager.unregister(name="terminalreporter")
                self.child(m, trees[m.file], write)
            os.close(write)
            running[pid] = m, read
            if done and done % 100 == 0:
                say(f"  {done} of {len(mutants)}, {time.perf_counter() - start:.0f} s")
        say(f"  {len(mutants)} in {time.perf_counter() - start:.0f} s")

    def report(self, mutants: list[Mutant], say: Callable) -> bool:
        listed = equivalents()
        broken = [m for m in mutants if m.killer.startswith("!")]
        for m in broken:
            say(f"could not be made: {m.key}  {m.killer}")
        mutants = [m for m in mutants if m not in broken]
        alive = [m for m in mutants if not m.killer and m.key not in listed]
        say("")
        for file in self.files:
            mine = [m for m in mutants if m.file == file]
            counted = [m for m in mine if m.killer or m.key not in listed]
            if counted:
                n = sum(bool(m.killer) for m in counted)
                share = f"{n:>5} of {len(counted):<5} killed  {100 * n / len(counted):5.1f} %"
                say(f"{file:<44} {share}  {len(mine) - len(counted):>3} equivalent")
        for m in alive:
            say(f"SURVIVED {m.key}   (line {m.line}; {len(self.tests(m))} tests)")
        stale = [k for k in listed if k in {m.key for m in mutants if m.killer}]
        if not (self.options.quick or self.options.only or self.options.match):
            stale += [k for k in listed if k not in {m.key for m in mutants}]
        for k in stale:
            say(f"listed as equivalent, but killed or gone: {k}")
        counted = sum(bool(m.killer) for m in mutants) + len(alive)
        share = 1 - len(alive) / max(counted, 1)
        say(f"{counted - len(alive)} of {counted} killed: {100 * share:.1f} %")
        return share >= 0.95 and not (self.options.quick and alive) and not broken


def equivalents() -> dict[str, str]:
    lines = [line for line in EQUIVALENT.read_text(encoding="utf-8").splitlines() if line.strip() and line[0] != "#"]
    return {key.strip(): reason.strip() for key, _, reason in (line.partition("⟂") for line in lines)}


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help=f"a fixed sample of {QUICK}, under two minutes")
    p.add_argument("--only", action="append", help="audit these files only (ops.py, methods, ...)")
    p.add_argument("--match", help="audit only mutants whose key this regular expression finds")
    p.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    options = p.parse_args()
    files, suites = [], set()
    for name, tests in SUITES.items():
        there = [t for t in tests if (TESTS / t).exists()]
        if options.only and name not in options.only:
            continue
        if not there:
            print(f"{name}: no tests yet ({', '.join(tests)})")
            continue
        path = PACKAGE / name
        files += sorted(f.relative_to(PACKAGE).as_posix() for f in path.rglob("*.py")) if path.is_dir() else [name] if path.exists() else []
        suites |= set(there)
    bad = [k for k, reason in equivalents().items() if not reason]
    if bad:
        print("without a reason in audit_equivalent.txt:", *bad, sep="\n  ")
        return 1
    audit = Audit(options, [f for f in files if not f.endswith("__init__.py")])
    arguments = ["-q", "-p", "no:cacheprovider", "--rootdir", str(TESTS.parent), *(str(TESTS / s) for s in sorted(suites))]
    status = pytest.main(arguments, plugins=[audit])
    return 0 if audit.ok and status in (0, 5) else 1


if __name__ == "__main__":
    sys.exit(main())

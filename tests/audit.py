"""Mutation audit: would the tests notice an error?

    make audit          or:  python tests/audit.py [--quick] [--only ops.py] [--jobs 2]

The audit makes one small error in the library's source (another sign, a dropped factor, a doubled constant, a forgotten
axis or transpose, `=` for `+=`). It then runs the tests that enter the changed function, in a forked process, until one
fails. Errors are made in values, pullbacks, initial values and scales; not in messages, annotations, checks of
arguments, and functions that Numba compiles.

tests/audit_equivalent.txt lists the mutants whose error no test could see, each with the reason:  key  ⟂  reason.
The exit status is 1 if fewer than 95 % of the other mutants are killed, or with --quick if one of them survives.
--quick takes a fixed sample, which the keys decide.
"""
from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import os
import re
import signal
import sys
import time
import zlib
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
from helpers import wrong_answers  # noqa: E402

import tinyft  # noqa: E402
from tinyft import checks  # noqa: E402

PACKAGE = Path(tinyft.__file__).resolve().parent
EQUIVALENT = TESTS / "audit_equivalent.txt"
# Audited file or folder -> the test files that must notice its errors. Test files that do not exist are left out.
SUITES = {
    "ops.py": ["test_ops.py", "test_attention.py", "test_tensor.py", "test_masks.py", "test_shapes.py",
               "test_numbers.py"],
    "functional.py": ["test_ops.py", "test_attention.py", "test_masks.py", "test_shapes.py", "test_numbers.py"],
    "context.py": ["test_nn.py", "test_attention.py", "test_decode.py", "test_masks.py"],
    "keywords.py": ["test_keywords.py"],
    "nn.py": ["test_nn.py"],
    "edit.py": ["test_protocol.py", "test_methods.py", "test_stacks.py"],
    "methods": ["test_methods.py", "test_protocol.py", "test_stacks.py"],
    **{f"models/{name}.py": ["test_models.py", "test_llama.py", "test_attention.py", "test_stacks.py"]
       for name in ("attention", "bert", "gpt", "llama", "rotary")},
    "models/blocks.py": ["test_models.py", "test_llama.py", "test_attention.py", "test_stacks.py", "test_seq2seq.py",
                         "test_t5.py"],
    "optim/buffers.py": ["test_optim.py", "test_precision.py", "test_paged.py"],
    **{f"optim/{name}.py": ["test_optim.py", "test_precision.py"]
       for name in ("master", "optimizers", "scaler", "schedules")},
    "precision.py": ["test_precision.py"],
    "train/batch.py": ["test_train.py", "test_loss.py", "test_fit_arguments.py"],
    "train/evaluate.py": ["test_train.py", "test_loss.py", "test_fit_arguments.py"],
    "train/phases.py": ["test_train.py"],
    "compress/ggml.py": ["test_ggml.py"],
    **{f"compress/{name}.py": ["test_compress.py", "test_packed_kernels.py", "test_compressed_files.py"]
       for name in ("coded", "grouped")},
    "compress/codebooks.py": ["test_codebooks.py", "test_compressed_files.py"],
    "compress/quantize/nf4.py": ["test_codebooks.py"],
    "compress/quantize/gptq.py": ["test_obq_gptq.py"],
    "compress/quantize/obq.py": ["test_obq_gptq.py"],
    "compress/quantize/awq.py": ["test_awq.py"],
    "compress/quantize/int8.py": ["test_int8.py", "test_compressed_files.py"],
    "compress/quantize/smoothquant.py": ["test_smoothquant.py"],
    "compress/quantize/qat.py": ["test_qat.py"],
    "kernels/packed.py": ["test_packed_kernels.py"],
    **{f"kernels/compiled/{name}.py": ["test_compiled.py"]
       for name in ("cross_entropy", "elementwise", "norms", "shared", "update")},
    "dynamic.py": ["test_eight_bit.py", "test_codebooks.py"],
    "optim/eight_bit.py": ["test_eight_bit.py"],
    "optim/paged.py": ["test_paged.py"],
    "recomputation.py": ["test_recompute.py"],
    "memory": ["test_memory.py"],
    "adapters/combine.py": ["test_protocol.py", "test_methods.py"],
    "decode.py": ["test_decode.py"],
    "beam.py": ["test_beam.py", "test_coverage.py"],
    "models/encoder_decoder.py": ["test_seq2seq.py", "test_t5.py"],
    "models/seq2seq.py": ["test_seq2seq.py"],
    "models/t5.py": ["test_t5.py"],
    "models/moe.py": ["test_moe.py"],
    "compress/distill/beams.py": ["test_sequence.py"],
    "compress/distill/sequence.py": ["test_sequence.py"],
    "compress/distill/bleu.py": ["test_bleu.py"],
    "compress/distill/cache.py": ["test_distill.py", "test_row_files.py"],
    "compress/distill/row_files.py": ["test_row_files.py"],
    "compress/distill/layer_transfer.py": ["test_layer_transfer.py"],
    **{f"compress/distill/{name}.py": ["test_distill.py"]
       for name in ("distilbert", "hinton", "layers", "soft", "switch", "word_level")},
    "data/sources.py": ["test_data_sources.py"],
}
SECONDS = 20                                               # of processor time for a test, plus ten times its usual
WAIT = 5                                                   # times as many seconds on the clock
CHECKS = [name for name, f in vars(checks).items() if getattr(f, "__module__", "") == checks.__name__]
# Decorators of functions that Numba compiles:
COMPILED = {"compiled", "compiled_sum", "inlined", "inlined_sum", "pasted"}
QUICK = 160                                                # mutants in the sample of --quick
real_path = lru_cache(None)(os.path.realpath)              # called about a million times


# ── the errors ───────────────────────────────────────────────────────────────────────────────────────────────────────
OTHER_OPERATOR = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
OTHER_FUNCTION = {
    "sum": "mean",
    "mean": "sum",
    "max": "min",
    "maximum": "minimum",
    "minimum": "maximum",
    "zeros": "ones",
    "ones": "zeros",
}
DROPPED_FUNCTIONS = {"t", "flip", "exp", "sqrt", "tanh", "abs", "sign", "tril", "log", "tuple"}      # f(x) -> x
DROPPED_METHODS = {"swapaxes", "astype", "copy", "transpose", "permute", "detach"}                   # x.f(...) -> x
KEEP_LEFT = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.Mod)                                  # a ∘ b -> a
KEEP_RIGHT = (ast.Add, ast.Mult)                                                                     # a ∘ b -> b


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """Every expression or statement that could stand in the place of this one by mistake."""
    other = OTHER_OPERATOR.get(type(getattr(node, "op", None)))
    if isinstance(node, ast.BinOp):
        if other:
            yield ast.BinOp(node.left, other(), node.right)
        if isinstance(node.op, KEEP_LEFT):
            yield node.left
        if isinstance(node.op, KEEP_RIGHT):
            yield node.right
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        other = OTHER_OPERATOR.get(type(node.ops[0]))
        if other:
            yield ast.Compare(node.left, [other()], node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(other(), node.values)
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.UAdd):
        yield node.operand
    elif isinstance(node, ast.Constant):
        yield from other_constants(node.value)
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.Attribute) and node.attr == "T":
        yield node.value
    elif isinstance(node, ast.Call):
        yield from other_calls(node)
    elif isinstance(node, ast.AugAssign):
        if other:
            yield ast.AugAssign(node.target, other(), node.value)
        yield ast.Assign([node.target], node.value)
    elif isinstance(node, ast.If) and not raises(node):
        yield ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)


def other_constants(value: Any) -> Iterator[ast.Constant]:
    """Other values for a constant: the other boolean; 1 for 0; the double and the negative of another number."""
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, (int, float)):
        if value == 0:
            yield ast.Constant(1)
        else:
            yield ast.Constant(2 * value)
            yield ast.Constant(-value)


def other_calls(node: ast.Call) -> Iterator[ast.AST]:
    """Another function, no function, no keepdims, another axis."""
    f = node.func
    name = getattr(f, "attr", getattr(f, "id", ""))
    if name in OTHER_FUNCTION:
        if isinstance(f, ast.Attribute):
            other = ast.Attribute(f.value, OTHER_FUNCTION[name], f.ctx)
        else:
            other = ast.Name(OTHER_FUNCTION[name], f.ctx)
        yield ast.Call(other, node.args, node.keywords)
    if name in DROPPED_FUNCTIONS and node.args:
        yield node.args[0]
    if name in DROPPED_METHODS and isinstance(f, ast.Attribute) and (name != "transpose" or node.args):
        yield f.value
    for i, keyword in enumerate(node.keywords):
        rest = node.keywords[:i] + node.keywords[i + 1:]
        if keyword.arg == "keepdims":
            yield ast.Call(f, node.args, rest)
        if keyword.arg == "axis":
            yield ast.Call(f, node.args, [*rest, ast.keyword("axis", ast.Constant(0))])


def raises(node: ast.If) -> bool:
    """True for a check of arguments: an `if` whose body raises, or does nothing but call checks."""
    if any(isinstance(statement, ast.Raise) for statement in node.body):
        return True
    return all(is_check(statement) for statement in node.body)


def is_check(statement: ast.AST) -> bool:
    """True for a statement that only checks arguments: a call of one of checks.py, or of a function named check_..."""
    if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)):
        return False
    f = statement.value.func
    name = getattr(f, "attr", getattr(f, "id", ""))
    return name in CHECKS or name.lstrip("_").startswith(("check_", "refuse_"))


@dataclass
class Mutant:
    """One error: the node `new` in the place of `old`, which is `owner.place[index]`, inside a function of a file.

    function     the names around the error, such as ["Linear", "forward"]
    inner        first line of the innermost function or lambda around it
    in_defaults  True if the error stands in the default value of a parameter
    killer       the test that noticed it; empty if none did
    """
    file: str
    function: list[str]
    inner: int
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
        """Put a node in the place."""
        if self.index is None:
            setattr(self.owner, self.place, node)
        else:
            getattr(self.owner, self.place)[self.index] = node


SKIPPED_NODES = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)
SKIPPED_FIELDS = ("annotation", "returns", "decorator_list", "format_spec")


@dataclass
class Site:
    """A possible error: `new` for `old` at `owner.field[index]`.

    above  the nodes around the error, from the function inwards
    """
    owner: ast.AST
    field: str
    index: int | None
    old: ast.AST
    new: ast.AST
    inner: int
    above: tuple


def sites(node: ast.AST, inner: int, is_op: bool, above: tuple = ()) -> Iterator[Site]:
    """Every possible error below a node. `inner`: the first line of the innermost function; `is_op`: True in an @op."""
    above = (*above, node)
    for name, value in ast.iter_fields(node):
        if is_skipped(node, name):
            continue
        children = value if isinstance(value, list) else [value]
        for i, child in enumerate(children):
            if not isinstance(child, ast.AST) or isinstance(child, SKIPPED_NODES):
                continue
            if is_docstring(child) or is_check(child):
                continue
            index = i if isinstance(value, list) else None
            negated = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
            if negated and is_reshape(above):
                continue                                   # to NumPy's reshape every negative size is -1
            for new in variants(child):
                if negated and isinstance(new, ast.Constant) and new.value < 0:
                    continue                               # the sign is changed one node above
                yield Site(node, name, index, child, new, inner, above)
            if is_op and isinstance(node, ast.Tuple) and isinstance(child, ast.Lambda):
                yield Site(node, name, index, child, ast.Constant(None), inner, above)       # a pullback left out
            is_function = isinstance(child, (ast.Lambda, ast.FunctionDef))
            yield from sites(child, first_line(child, inner) if is_function else inner, is_op, above)


def is_skipped(node: ast.AST, name: str) -> bool:
    """True for fields in which no error is made: annotations, decorators, checks of arguments and their messages."""
    if name in SKIPPED_FIELDS:
        return True
    if isinstance(node, ast.Subscript) and name == "ctx":
        return True
    if isinstance(node, ast.keyword) and node.arg == "strict":           # of zip: it checks two lengths
        return True
    return isinstance(node, ast.If) and name in ("test", "body") and raises(node)


def is_docstring(node: ast.AST) -> bool:
    """True for a constant that stands alone as a statement."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def is_reshape(above: tuple) -> bool:
    """True if the node before the last is a call of `reshape`."""
    return len(above) > 1 and getattr(getattr(above[-2], "func", None), "attr", "") == "reshape"


def first_line(node: ast.AST, default: int) -> int:
    """The line at which a function begins for Python: that of its first decorator."""
    decorators = getattr(node, "decorator_list", [])
    return min([getattr(node, "lineno", default), *(d.lineno for d in decorators)])


def source(node: ast.AST) -> str:
    """The source text of a node, on one line."""
    return " ".join(ast.unparse(ast.fix_missing_locations(node)).split())


def context(above: tuple, old: ast.AST) -> ast.AST:
    """The smallest expression around an error that a reader recognises: of at least 20 characters."""
    around = [old, *reversed(above)] if isinstance(old, ast.expr) else [old]
    best = old
    for node in around:
        if not isinstance(node, (ast.expr, ast.arguments)) and node is not old:
            break
        best = node
        if len(source(node)) >= 20:
            break
    return best


def mutants_of(file: str) -> tuple[ast.Module, list[Mutant]]:
    """The syntax tree of a file, and its mutants."""
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    out: list[Mutant] = []
    keys: Counter[str] = Counter()

    def visit(body: list[ast.stmt], path: list[str]) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                visit(node.body, [*path, node.name])
            elif isinstance(node, ast.FunctionDef) and not is_compiled(node):
                for m in mutants_of_function(file, node, [*path, node.name]):
                    keys[m.key] += 1
                    if keys[m.key] > 1:
                        m.key += f" ({keys[m.key]})"
                    out.append(m)

    visit(tree.body, [])
    return tree, out


def is_compiled(node: ast.FunctionDef) -> bool:
    """True for a function that becomes machine code: a change of its Python has no effect."""
    return any(getattr(d, "id", "") in COMPILED for d in node.decorator_list)


def mutants_of_function(file: str, node: ast.FunctionDef, names: list[str]) -> Iterator[Mutant]:
    """The mutants of one function whose source text differs from the original."""
    first = first_line(node, node.lineno)
    is_op = any(isinstance(d, ast.Call) and getattr(d.func, "id", "") == "op" for d in node.decorator_list)
    for s in sites(node, first, is_op):
        line = getattr(s.old, "lineno", first)
        in_defaults = node.args in s.above
        m = Mutant(file, names, s.inner, line, s.owner, s.field, s.index, s.old, s.new, node.args, in_defaults)
        top = context(s.above, s.old)
        before = source(top)
        m.put(ast.copy_location(s.new, s.old))
        after = source(s.new if top is s.old else top)
        m.put(s.old)
        if before != after:
            m.key = f"{file}::{'.'.join(names)}::{before} -> {after}"
            yield m


# ── putting a mutant in place ────────────────────────────────────────────────────────────────────────────────────────
def running_function(m: Mutant) -> Any:
    """The function in the imported library, without its decorators."""
    f: Any = importlib.import_module("tinyft." + m.file[:-3].replace("/", "."))
    for name in m.function:
        f = inspect.getattr_static(f, name) if inspect.isclass(f) else vars(f)[name]
    f = getattr(f, "__func__", None) or getattr(f, "fget", None) or f
    return inspect.unwrap(f)


def code_objects(code: Any) -> Iterator[Any]:
    """A code object and those inside it."""
    yield code
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from code_objects(constant)


def install(m: Mutant, tree: ast.Module) -> None:
    """Give the function in the library the body and the default values of the mutated source."""
    m.put(ast.fix_missing_locations(ast.copy_location(m.new, m.old)))
    f = running_function(m)
    old = f.__code__
    module = compile(tree, old.co_filename, "exec")
    wanted = (old.co_name, old.co_firstlineno)
    f.__code__ = next(c for c in code_objects(module) if (c.co_name, c.co_firstlineno) == wanted)
    if m.in_defaults:
        a = m.arguments
        f.__defaults__ = tuple(evaluate(d, f, m.file) for d in a.defaults)
        keywords = [(k.arg, d) for k, d in zip(a.kwonlyargs, a.kw_defaults) if d is not None]
        f.__kwdefaults__ = {name: evaluate(d, f, m.file) for name, d in keywords}
    clear_caches()


def evaluate(default: ast.expr, f: Any, file: str) -> Any:
    """The value of the expression of a default."""
    return eval(compile(ast.Expression(default), file, "eval"), f.__globals__)


def clear_caches() -> None:
    """Empty the library's caches, so that values from before the mutation are computed again."""
    for f in cached_functions(len(sys.modules)):
        f.cache_clear()


@lru_cache(maxsize=1)
def cached_functions(modules: int) -> list[Any]:
    """The library's functions that keep their values. modules: how many there are; with more, look again."""
    found = []
    for name, module in list(sys.modules.items()):
        if name.startswith("tinyft"):
            found += [f for f in vars(module).values() if hasattr(f, "cache_clear") and not isinstance(f, type)]
    return found


# ── running ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# Process id -> (its mutant, the pipe from which the name of the test is read).
Running = dict[int, tuple[Mutant, int]]


class Audit:
    """A pytest plugin: collects the tests as pytest does, runs each once to see which functions it enters, then goes
    through the mutants."""

    def __init__(self, options: argparse.Namespace, files: list[str]):
        self.options = options
        self.files = files
        self.entered: dict[tuple[str, int], list[Any]] = {}          # (file, first line of a function) -> tests
        self.seconds: dict[str, float] = {}                          # test -> processor time
        self.ok = False
        self.failed = False

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Leave out the tests that plant wrong answers: they say that a check fails, and the check stands beside them.
        """
        items[:] = [item for item in items if wrong_answers.mark not in item.iter_markers("skipif")]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember a failure."""
        self.failed |= report.failed

    def passes(self, item: Any) -> bool:
        """Run one test with its fixtures set up and torn down. True if it passes."""
        self.failed = False
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        return not self.failed

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """The whole audit, in place of pytest's loop over the tests."""
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")

        def say(line: str) -> None:
            reporter.ensure_newline()
            reporter.write_line(line)

        say(f"{len(session.items)} tests once, to see which functions each enters ...")
        failed = [item.nodeid for item in session.items if not self.trace(item)]
        say(f"  {sum(self.seconds.values()):.0f} s of processor time")
        if failed:
            say("these fail without any mutation; mend them first:\n  " + "\n  ".join(failed))
            return True
        trees = {}
        mutants = []
        for file in self.files:
            trees[file], found = mutants_of(file)
            mutants += found
        if self.options.match:
            mutants = [m for m in mutants if re.search(self.options.match, m.key)]
        if self.options.quick:
            listed = equivalents()                         # the full audit checks that these still survive
            sample = sorted(mutants, key=place_in_sample)[:QUICK]
            mutants = [m for m in sample if m.key not in listed]
        say(f"{len(mutants)} mutants of {', '.join(self.files)}")
        self.run(session, mutants, trees, say)
        self.ok = self.report(mutants, say)
        return True

    def trace(self, item: Any) -> bool:
        """Run a test unmutated and remember which functions of the library it entered. True if it passes."""
        codes: dict[int, Any] = {}
        start = time.process_time()
        clear_caches()

        def on_call(frame: Any, event: str, arg: Any) -> None:       # returns None: no line of a function is traced
            codes[id(frame.f_code)] = frame.f_code

        sys.settrace(on_call)
        try:
            passed = self.passes(item)
        finally:
            sys.settrace(None)
        self.seconds[item.nodeid] = time.process_time() - start
        root = str(PACKAGE)
        for code in codes.values():
            path = real_path(code.co_filename)
            if path.startswith(root):
                file = os.path.relpath(path, root).replace(os.sep, "/")
                self.entered.setdefault((file, code.co_firstlineno), []).append(item)
        return passed

    def tests(self, m: Mutant) -> list[Any]:
        """The tests of the file's suites that enter the function: those named after it first, then the fastest."""
        own = suites_of(m.file)
        items = [item for item in self.entered.get((m.file, m.inner), []) if item.path.name in own]
        return sorted(items, key=lambda item: (m.function[-1] not in item.name, self.seconds[item.nodeid]))

    def child(self, m: Mutant, tree: ast.Module, out: int) -> None:
        """The forked process: mutate, test, exit. The name of the test that failed is written to the pipe."""
        try:
            install(m, tree)
            for item in self.tests(m):
                limit = SECONDS + 10 * self.seconds[item.nodeid]
                signal.setitimer(signal.ITIMER_PROF, limit)          # processor time: a busy machine ends no test early
                signal.setitimer(signal.ITIMER_REAL, WAIT * limit)   # but threads may wait for each other for ever
                if not self.passes(item):
                    os.write(out, item.nodeid.encode()[:500])
                    os._exit(1)
            os._exit(0)
        except BaseException as e:
            os.write(out, f"! {type(e).__name__}: {e}".encode()[:500])
            os._exit(2)

    def run(self, session: pytest.Session, mutants: list[Mutant], trees: dict[str, ast.Module], say: Callable) -> None:
        """Test every mutant in a process of its own, `jobs` at a time."""
        running: Running = {}
        start = time.perf_counter()
        for done, m in enumerate(mutants):
            while len(running) >= self.options.jobs:
                self.wait(running)
            self.fork(session, m, trees[m.file], running)
            if done and done % 100 == 0:
                say(f"  {done} of {len(mutants)}, {time.perf_counter() - start:.0f} s")
        while running:
            self.wait(running)
        say(f"  {len(mutants)} in {time.perf_counter() - start:.0f} s")

    def fork(self, session: pytest.Session, m: Mutant, tree: ast.Module, running: Running) -> None:
        """Start the process of one mutant. It writes nothing to the terminal."""
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(null, descriptor)
            session.config.pluginmanager.unregister(name="terminalreporter")
            self.child(m, tree, write)
        os.close(write)
        running[pid] = m, read

    def wait(self, running: Running) -> None:
        """Wait for one process and note the test that killed its mutant."""
        pid, status = os.wait()
        m, pipe = running.pop(pid)
        killer = os.read(pipe, 1000).decode(errors="replace")
        os.close(pipe)
        if status != 0:
            m.killer = killer or f"stopped by the clock, or by signal {status & 127}"

    def report(self, mutants: list[Mutant], say: Callable) -> bool:
        """Print figures by file, survivors and outdated entries of the list. True if the audit passes."""
        listed = equivalents()
        broken = [m for m in mutants if m.killer.startswith("!")]
        for m in broken:
            say(f"could not be made: {m.key}  {m.killer}")
        mutants = [m for m in mutants if m not in broken]
        survivors = [m for m in mutants if not m.killer and m.key not in listed]
        say("")
        for file in self.files:
            of_file = [m for m in mutants if m.file == file]
            counted = [m for m in of_file if m.killer or m.key not in listed]
            if counted:
                killed = sum(bool(m.killer) for m in counted)
                share = f"{killed:>5} of {len(counted):<5} killed  {100 * killed / len(counted):5.1f} %"
                say(f"{file:<44} {share}  {len(of_file) - len(counted):>3} equivalent")
        for m in survivors:
            say(f"SURVIVED {m.key}   (line {m.line}; {len(self.tests(m))} tests)")
        for key in self.outdated(listed, mutants):
            say(f"listed as equivalent, but killed or gone: {key}")
        counted = sum(bool(m.killer) for m in mutants) + len(survivors)
        share = 1 - len(survivors) / max(counted, 1)
        say(f"{counted - len(survivors)} of {counted} killed: {100 * share:.1f} %")
        return share >= 0.95 and not (self.options.quick and survivors) and not broken

    def outdated(self, listed: dict[str, str], mutants: list[Mutant]) -> list[str]:
        """Keys listed as equivalent that a test kills, or that no mutant has any more."""
        killed = {m.key for m in mutants if m.killer}
        out = [key for key in listed if key in killed]
        complete = not (self.options.quick or self.options.only or self.options.match)
        if complete:
            known = {m.key for m in mutants}
            out += [key for key in listed if key not in known]
        return out


def place_in_sample(m: Mutant) -> int:
    """A number that the key alone decides, so that an edit of one function leaves the sample of the others."""
    return zlib.crc32(m.key.encode())


def equivalents() -> dict[str, str]:
    """{key: reason} of the mutants that change nothing a test could see."""
    lines = EQUIVALENT.read_text(encoding="utf-8").splitlines()
    out = {}
    for line in lines:
        if line.strip() and not line.startswith("#"):
            key, _, reason = line.partition("⟂")
            out[key.strip()] = reason.strip()
    return out


def suites_of(file: str) -> list[str]:
    """The test files that must notice the errors of this file."""
    return next(tests for name, tests in SUITES.items() if file == name or file.startswith(name + "/"))


def files_and_suites(only: list[str] | None) -> tuple[list[str], list[str]]:
    """The audited files and their test files. `only`: keys of SUITES, or None for all."""
    files: list[str] = []
    suites: set[str] = set()
    for name, tests in SUITES.items():
        path = PACKAGE / name
        existing = [t for t in tests if (TESTS / t).exists()]
        if (only and name not in only) or not path.exists():
            continue
        if not existing:
            print(f"{name}: no tests yet ({', '.join(tests)})")
            continue
        found = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        files += [f.relative_to(PACKAGE).as_posix() for f in found if f.name != "__init__.py"]
        suites |= set(existing)
    return files, sorted(suites)


def main() -> int:
    """The command. Returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help=f"a fixed sample of {QUICK}, a few minutes")
    p.add_argument("--only", action="append", help="audit these files only (ops.py, methods, ...)")
    p.add_argument("--match", help="audit only mutants whose key this regular expression finds")
    p.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    options = p.parse_args()
    files, suites = files_and_suites(options.only)
    unexplained = [key for key, reason in equivalents().items() if not reason]
    if unexplained:
        print("without a reason in audit_equivalent.txt:", *unexplained, sep="\n  ")
        return 1
    audit = Audit(options, files)
    arguments = ["-q", "-p", "no:cacheprovider", "--rootdir", str(TESTS.parent)]
    arguments += [str(TESTS / name) for name in suites]
    status = pytest.main(arguments, plugins=[audit])
    return 0 if audit.ok and status in (0, 5) else 1


if __name__ == "__main__":
    sys.exit(main())

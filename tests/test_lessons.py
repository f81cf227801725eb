"""Lessons: what each must hold (its header, its length, nothing from later lessons, code quoted and not copied), and
the runner.

That every lesson runs is checked by `make lessons`.  The checks take a lesson as text, so that planted faults can be
shown to them.
"""
from __future__ import annotations

import ast
import inspect
import io
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers import host_only

import tinyft
from tinyft import cli
from tinyft.learn import folders, reading
from tinyft.learn import lessons as runner
from tinyft.learn.draw import figure
from tinyft.learn.exercise import of_lesson
from tinyft.learn.folders import lessons, lessons_in
from tinyft.learn.lessons import Cell, Failed, notebook, parse, quote, run
from tinyft.learn.show import Page

pytestmark = host_only

TEXTS = {name: lesson.file.read_text(encoding="utf-8") for name, lesson in lessons().items()}
FOLDERS = {name: lesson.folder for name, lesson in lessons().items()}
COLUMNS = 88                                              # that the book shows without scrolling
CELL = 20                                                 # lines of a code cell

# The names of the library that a lesson introduces; later lessons may use them too.  A name allows everything below it:
# "ops.mul" allows one op, "data" the whole package.
OPS = ("add sub mul div neg power matmul exp log sqrt tanh sigmoid absolute relu sum mean amax maximum softmax "
       "log_softmax layer_norm")
TEACHES = {
    "autograd": {*(f"ops.{name}" for name in OPS.split()), "Tensor", "no_grad", "detect_anomaly", "tensor", "data",
                 "peak_memory", "use", "backend", "learn.lessons", "learn.draw", "check"},
    "transformer": {"ops", "functional.softmax_attention", "nn", "models", "load", "Context", "Cache", "Module",
                    "Parameter",
                    "GPT", "GPTConfig", "BERT", "BERTConfig", "array", "count"},
    "training": {"optim", "SGD", "Adam", "AdamW", "constant_schedule", "linear_schedule", "cosine_schedule", "fit",
                 "evaluate", "train", "History", "Diverged", "kernels",
                 "classifier", "functional", "batches", "baselines", "strict"},
    "pretraining": {"pretrain", "perplexity", "generate", "decode", "save", "formats"},
    "adapters": {"attach", "detach", "without", "trained", "Method", "edit", "Houlsby", "methods",
                 "adapters"},
    "lora": {"LoRA", "merge", "eject", "unmerge", "save_adapter", "load_adapter", "combine", "adapters.combine"},
    "quantization": {"compress", "Packed", "RTN", "corpus_perplexity", "unpack"},
    "gptq": {"OBQ", "GPTQ"},
    "qlora": {"NF4", "FP4", "E2M1", "Paged", "AdamW8bit", "memory", "CannotMerge", "trained"},
    "distillation": {"compress.distill", "student", "Hinton", "DistilBERTLoss", "TeacherCache"},
    "sequences": {"beam", "GNMTPenalty", "PowerPenalty", "beam_search", "T5", "T5Config", "sentence_bleu", "WordLevel",
                  "SequenceLevel", "Interpolation", "TeacherBeams"},
    "experts": {"SwitchConfig", "dense_student"},
    "gpu": {"kernels.cuda", "learn.loops"},
    "precision": {"precision", "autocast", "GradScaler"},
    "checkpoint": {"Llama", "LlamaConfig", "chat_prompt", "chat_end", "compress", "Packed", "unpack", "CannotMerge",
                   "save_peft", "load_peft"},
}


@cache
def tree(text: str) -> list[ast.Module]:
    return [ast.parse(cell.source) for cell in parse(text) if cell.kind == "code"]


def calls(text: str, function: str) -> list[ast.Call]:
    return [n for cell in tree(text) for n in ast.walk(cell) if isinstance(n, ast.Call) and getattr(n.func, "id", "")
            == function]


# ── the form of a lesson ─────────────────────────────────────────────────────────────────────────────────────────────
DRAWINGS = ("curves", "points", "bars", "heat_map", "diagram", "figure", "number_lines", "histograms")


def header_entry(text: str, mark: str) -> str:
    """The text after **mark:** in the header, up to the next bold word; "" if there is none."""
    found = re.search(rf"\*\*{mark}:\*\*([^*]*)", text)
    return " ".join(found[1].split()) if found else ""


def faults_of_header(name: str, folder: str, functions: list[str], cells: list[Cell]) -> list[str]:
    """What the first and the last cell of a lesson lack. functions: those that its exercises ask for."""
    head = cells[0].source
    found = []
    if cells[0].kind != "markdown" or not head.startswith(f"# {folder[:2]} "):
        found.append(f"the title # {folder[:2]} ...")
    if not re.match(r"\d+ minutes", header_entry(head, "Reading")):
        found.append("**Reading:** N minutes")
    if not header_entry(head, "You need"):
        found.append("**You need:** the lessons and subjects that it builds on")
    listed = re.findall(r"\w+", header_entry(head, "Exercises"))[:len(functions)]
    if sorted(listed) != sorted(functions):
        found.append(f"**Exercises:** {', '.join(functions)}")
    if cells[-1].kind != "markdown" or f"`tinyft start {name}`" not in cells[-1].source:
        found.append(f"`tinyft start {name}` at its end")
    return found


def faults_of_cells(cells: list[Cell]) -> list[str]:
    """What is too long, and what stands in the wrong kind of cell."""
    found = []
    for cell in cells:
        lines = cell.source.splitlines()
        wide = max(map(len, lines)) + (2 if cell.kind == "markdown" else 0)
        if wide > COLUMNS:
            found.append(f"line {cell.line}: a cell of {wide} columns, at most {COLUMNS}")
        if cell.kind != "markdown" and len(lines) > CELL:
            found.append(f"line {cell.line}: a cell of {len(lines)} lines, at most {CELL}")
        if cell.kind == "code":
            has_assert = any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(cell.source)))
            if has_assert != cell.is_check:
                found.append(f"line {cell.line}: assertions stand in a cell `# %% [check]`, and nothing else does")
    questions = [i for i, cell in enumerate(cells) if "**Predict first" in cell.source]
    if not questions:
        found.append("a question before a result: **Predict first**")
    for i in questions:
        if i + 1 == len(cells) or not cells[i + 1].is_answer or cells[i + 1].is_check:
            found.append(f"line {cells[i].line}: after **Predict first** a code cell that shows the result")
    return found


def faults_of_code(text: str) -> list[str]:
    """Code that a reader has to decode, and writing into the library's modules."""
    found = []
    for node in (node for cell in tree(text) for node in ast.walk(cell)):
        if isinstance(node, ast.Assign):
            targets = [dotted(target) for target in node.targets]
            if isinstance(node.value, ast.Lambda):
                found.append(f"a lambda with a name: {targets[0]}")
            if isinstance(node.value, ast.Tuple) and len(node.value.elts) > 2:
                found.append("a tuple assignment of more than two things")
            if any(target.split(".")[0] in ("ft", "tinyft") for target in targets):
                found.append(f"writes into the library: {targets[0]}")
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
            inner = [n for n in ast.walk(node) if n is not node and isinstance(n, type(node))]
            if inner or len(node.generators) > 1:
                found.append("a comprehension inside another")
    if not calls(text, "quote"):
        found.append("a quote of the library")
    if not any(calls(text, drawing) for drawing in DRAWINGS):
        found.append("a picture")
    return found


def faults_of_formulas(cells: list[Cell]) -> list[str]:
    """Formulas of which TeX's commands would be seen in the terminal."""
    page = Page(io.StringIO())
    shown = [reading.plain(cell.source, page) for cell in cells if cell.kind == "markdown"]
    return [f"a formula that is left in TeX: {found[0]}" for text in shown
            for found in re.finditer(r"[^`]\\[a-zA-Z]+", re.sub(r"`[^`]*`", "", text))]


def faults(name: str, folder: str, functions: list[str], text: str) -> list[str]:
    """Everything that is not as a lesson should be."""
    cells = parse(text)
    header = faults_of_header(name, folder, functions, cells)
    return header + faults_of_cells(cells) + faults_of_code(text) + faults_of_formulas(cells)


@pytest.mark.parametrize("name", TEXTS)
def test_a_lesson_has_its_form(name):
    functions = [e.function for e in of_lesson(name)]
    assert faults(name, FOLDERS[name], functions, TEXTS[name]) == []


def test_lessons_stand_in_the_order_of_their_numbers_and_have_at_least_two_exercises():
    assert [name for name in TEACHES if name in FOLDERS] == list(FOLDERS)
    for name, lesson in lessons().items():
        assert lesson.title.startswith(f"{lesson.folder[:2]} ")
        assert len(of_lesson(name)) >= 2


SAMPLE = """# %% [markdown]
# # 01 A lesson
#
# **Reading:** 5 minutes. **You need:** Python.
# **Exercises:** double, halve (about an hour).
#
# About $\\frac{a}{b}$.

# %%
import tinyft as ft
from tinyft.learn.draw import curves
from tinyft.learn.lessons import quote

quote(ft.ops.mul)

# %% [markdown]
# **Predict first.** What is 1 + 1?

# %%
print(1 + 1)
curves({"a line": [1, 2]})

# %% [check]
assert 1 + 1 == 2

# %% [markdown]
# **Exercises:** `tinyft start sample`
"""
PLANTED = [
    ("# # 01 A", "# # A", "the title"),
    ("**Reading:** 5 minutes", "5 minutes", "Reading"),
    ("**You need:** Python.", "", "You need"),
    ("double, halve", "double", "Exercises"),
    ("`tinyft start sample`", "`tinyft start other`", "at its end"),
    ("**Predict first.**", "Now.", "Predict first"),
    ("# %%\nprint(1 + 1)", "# %% [check]\nassert 2\n\n# %%\nprint(1 + 1)", r"after \*\*Predict first"),
    ("# %% [check]\n", "# %%\n", "assertions"),
    ("assert 1 + 1 == 2", "1 + 1", "assertions"),
    ("print(1 + 1)", "\n".join("print(1 + 1)" for _ in range(20)), "a cell of 21 lines"),
    ("print(1 + 1)", f"print({' + '.join('1' * 30)})", "columns"),
    ("# About", f"# About {'much ' * 18}", "columns"),
    ("print(1 + 1)", "f = lambda x: x", "a lambda"),
    ("print(1 + 1)", "a, b, c = 1, 2, 3", "a tuple"),
    ("print(1 + 1)", "ft.ops.mul = None", "writes into"),
    ("print(1 + 1)", "[[i for i in range(j)] for j in range(3)]", "a comprehension"),
    ("quote(ft.ops.mul)", "print(ft.ops.mul)", "a quote"),
    ('curves({"a line": [1, 2]})', "", "a picture"),
    ("$\\frac{a}{b}$", "\\alpha", "left in TeX"),
]


@pytest.mark.parametrize("old, new, fault", PLANTED)
def test_a_lesson_out_of_form_is_caught(old, new, fault):
    assert faults("sample", "01_sample", ["double", "halve"], SAMPLE) == []
    assert old in SAMPLE
    found = faults("sample", "01_sample", ["double", "halve"], SAMPLE.replace(old, new))
    assert any(re.search(fault, sentence) for sentence in found), found


# ── nothing from later lessons ───────────────────────────────────────────────────────────────────────────────────────
def dotted(node: ast.AST) -> str:
    """A name or a chain of attributes as text: "ft.ops.mul"; "" for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def uses(text: str) -> set[str]:
    """The names of the library that a lesson uses, without the leading tinyft: those it imports, and those it reaches
    from a module of it.
    """
    ours: dict[str, str] = {}  # a name in the lesson -> what it is
    found = set()
    for node in (n for cell in tree(text) for n in ast.walk(cell)):
        if isinstance(node, ast.Import):
            for a in node.names:
                if a.name.split(".")[0] == "tinyft":
                    ours[a.asname or "tinyft"] = a.name if a.asname else "tinyft"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tinyft":
            ours |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            found |= {f"{node.module}.{a.name}" for a in node.names}
    for node in (n for cell in tree(text) for n in ast.walk(cell)):
        head, _, rest = dotted(node).partition(".") if isinstance(node, ast.Attribute) else ("", "", "")
        if head in ours:
            found.add(f"{ours[head]}.{rest}")
    found = {f.removeprefix("tinyft.") for f in found} - {"tinyft"}
    # ft.ops on the way to ft.ops.mul is no use of its own.
    return {name for name in found if not is_prefix_of_one(name, found)}


def is_prefix_of_one(name: str, names: set[str]) -> bool:
    """True if one of the names lies below this one: "ops" of "ops.mul"."""
    return any(other.startswith(name + ".") for other in names)


def too_early(name: str, text: str) -> list[str]:
    """The names that a lesson uses before a lesson introduces them."""
    order = list(TEACHES)
    known = set().union(*(TEACHES[n] for n in order[:order.index(name) + 1]))
    return sorted(name for name in uses(text) if not is_allowed(name, known))


def is_allowed(name: str, known: set[str]) -> bool:
    """True if the name, or a name above it, is known."""
    return any(name == k or name.startswith(k + ".") for k in known)


@pytest.mark.parametrize("name", TEXTS)
def test_a_lesson_uses_nothing_from_later_lessons(name):
    assert too_early(name, TEXTS[name]) == []


@pytest.mark.parametrize("line", ["ft.load('base-gpt')", "ft.ops.attention(x, x, x)", "from tinyft.optim import AdamW",
                                  "import tinyft.models as m\nm.GPT()", "from tinyft import fit",
                                  "f = ft.ops\nft.LoRA()",
                                  "from tinyft.ops import gelu"])
def test_what_comes_too_early_is_caught(line):
    assert too_early("autograd", TEXTS["autograd"] + f"\n# %%\n{line}\n")
    assert not too_early("autograd",
                         TEXTS["autograd"] + "\n# %%\nfrom tinyft.ops import mul\ntf.ops.tanh(x).data.attention\n")


# ── quoted, not copied ───────────────────────────────────────────────────────────────────────────────────────────────
def bare(text: str) -> list[str]:
    return [" ".join(line.split("  #")[0].split()) for line in text.splitlines() if line.strip()
            and line.strip()[:1] not in "#\""]


@cache
def library() -> set[tuple[str, ...]]:
    """Every two lines in a row of the library's functions."""
    files = [p for p in Path(tinyft.__file__).parent.rglob("*.py") if "lessons" not in p.parts]
    return {pair for p in files for lines in [bare(p.read_text(encoding="utf-8"))] for pair in zip(lines, lines[1:])}


def copied(text: str) -> list[tuple[str, ...]]:
    """Code that stands in the library as well: two lines in a row, imports and the shortest apart; and code in a text
    cell.
    """
    lines = bare("\n".join(c.source for c in parse(text) if c.kind == "code"))
    pairs = [p for p in zip(lines,
                            lines[1:]) if p in library() and min(map(len,
                                                                     p)) > 12
             and not p[0].startswith(("import", "from"))]
    return pairs + [("a def in a text cell",
                     ) for c in parse(text) if c.kind == "markdown"
                    and re.search(r"^\s*(def|class) \w+", c.source, re.M)]


@pytest.mark.parametrize("name", TEXTS)
def test_the_librarys_code_is_quoted_from_it_and_not_copied(name):
    assert copied(TEXTS[name]) == []
    for call in calls(TEXTS[name], "quote"):
        assert dotted(call.args[0]), "quote wants a name of the library"


def imported(tree: ast.Module) -> dict[str, Any]:
    """{name: value} of what a lesson imports from the library."""
    namespace: dict[str, Any] = {}
    for node in ast.walk(tree):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if any(module.split(".")[0] == "tinyft" for module in modules):
            exec(compile(ast.Module([node], []), "<lesson>", "exec"), namespace)
    return namespace


def missing_names(text: str) -> list[str]:
    """Names of the library that a lesson uses and that do not exist, such as a method that has moved."""
    tree = ast.parse("\n".join(cell.source for cell in parse(text) if cell.kind != "markdown"))
    namespace = imported(tree)
    missing = []
    for node in ast.walk(tree):
        name = dotted(node) if isinstance(node, ast.Attribute) else None
        if not name or name.split(".")[0] not in namespace:
            continue
        value = namespace[name.split(".")[0]]
        for part in name.split(".")[1:]:
            if not hasattr(value, part):
                missing.append(name)
                break
            value = getattr(value, part)
            if not isinstance(value, type) and not inspect.ismodule(value):  # objects have more
                break
    return missing


@pytest.mark.parametrize("name", TEXTS)
def test_what_a_lesson_uses_is_in_the_library(name):
    assert missing_names(TEXTS[name]) == []


def test_a_name_that_has_moved_is_caught():
    start = "# %%\nimport tinyft as ft\nfrom tinyft.compress import Q4_1\n"
    assert missing_names(start + "quote(Q4_1.decode)") == ["Q4_1.decode"]
    assert "ft.nothing.at_all" in missing_names(start + "x = ft.nothing.at_all(1)")
    assert missing_names(start + "x = ft.Tensor(1).data + Q4_1.quantize(W).codes") == []
    with pytest.raises(ImportError):
        missing_names("# %%\nfrom tinyft.compress import Q5_7\n")


def test_a_copy_is_caught():
    softmax = "e = m.exp(x - x.max(axis=-1, keepdims=True))\nreturn e / e.sum(axis=-1, keepdims=True)\n"
    assert copied("# %%\ndef mine(m, x):\n    " + softmax.replace("\n", "\n    "))
    assert copied("# %% [markdown]\n# ```\n# def f(x):\n#     ...\n# ```\n")
    assert not copied("# %%\nimport numpy as np\nfrom hypothesis import strategies as st\nx = 1\n")


def test_quote_prints_the_librarys_own_source(capsys):
    quote(tinyft.ops.tanh)
    out = capsys.readouterr().out
    assert out.startswith("# tinyft/ops.py: tanh\n@op(")
    assert out.count("\n") == 6
    assert "g * (1 - y * y)" in out
    quote(tinyft.models.blocks.PreNormBlock.forward)
    assert "PreNormBlock.forward\ndef forward(self" in capsys.readouterr().out
    quote(tinyft.nn.Dropout)
    assert "class Dropout(Module)" in capsys.readouterr().out
    quote(tinyft.perplexity)
    assert capsys.readouterr().out.startswith("# tinyft/train/evaluate.py: perplexity\ndef perplexity(")
    for foreign in (json.dumps, 3, test_a_copy_is_caught):
        with pytest.raises(ValueError, match="of the library"):
            quote(foreign)


# ── the parser ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_cells_with_their_kinds_numbers_and_lines():
    text = "import os\n\n# %% [markdown]\n# # Title\n#\n# text $x$\n#    indented\n# %%\n\n\nx = 1  # %% not a mark\n"
    text += "\ny = '''\n#%\n'''\n\n# %% a title\n\n#%%\nz = 2\n"
    found = [(c.kind, c.line, c.number) for c in parse(text)]
    assert found == [("code", 1, 1), ("markdown", 4, 0), ("code", 11, 2), ("code", 20, 3)]
    assert parse(text)[1].source == "# Title\n\ntext $x$\n   indented"
    assert parse(text)[2].source.endswith("y = '''\n#%\n'''")
    assert parse("") == parse("# %%\n\n# %% [md]\n\n") == []
    with pytest.raises(ValueError, match="line 3: a text cell"):
        parse("# %% [markdown]\n# text\nx = 1\n")


# ── the runner ───────────────────────────────────────────────────────────────────────────────────────────────────────
SMALL = '''# %% [markdown]
# # 01 A lesson
# About $\\\\alpha \\\\cdot \\\\frac{1}{2}$ and `$code`, **bold**.
#
# | a | b |
# |---|---|
# | 1 | 2 |

# %%
import sys
from tinyft.learn.draw import figure
from tinyft.learn.lessons import show
x = 1
print("said", x)

# %%
fig, ax = figure(2, height=1.0)
ax[0].plot([1, 2])
show("A line.")
figure(height=1.0)
assert x == 1 and __name__ == "__main__"
'''.replace("\\\\", "\\")


@pytest.fixture
def small(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")

    def write(*texts: str) -> Path:
        for i, text in enumerate(texts, 1):
            (tmp_path / f"lessons/0{i}_small{i}").mkdir(parents=True)
            (tmp_path / f"lessons/0{i}_small{i}/lesson.py").write_text(text, encoding="utf-8")
        for module in (folders, reading):
            monkeypatch.setattr(module, "lessons", lambda: lessons_in(tmp_path / "lessons"))
        monkeypatch.chdir(tmp_path)
        return tmp_path / "lessons/01_small1/lesson.py"
    return write


def test_a_lesson_runs_with_what_it_prints_and_draws(small, tmp_path, capsys):
    path, out = small(SMALL), tmp_path / "out"
    out.mkdir()
    (out / "01_small1-7.svg").write_bytes(b"of an older lesson")
    cells = list(run(path, out))
    assert [c.printed for c in cells] == [None, "said 1\n", ""] and capsys.readouterr().out == ""
    assert cells[2].figures == [(out / "01_small1-1.svg", "A line."), (out / "01_small1-2.svg", "")]
    assert sorted(p.name for p in out.iterdir()) == ["01_small1-1.svg", "01_small1-2.svg", "01_small1.ipynb"]
    assert runner._album is None
    made = json.loads((out / "01_small1.ipynb").read_text(encoding="utf-8"))
    assert made == notebook(cells) and (made["nbformat"], made["nbformat_minor"]) == (4, 4)
    text, printing, drawing = made["cells"]
    assert "outputs" not in text
    assert [o["output_type"] for o in printing["outputs"]] == ["stream"]
    assert [o["output_type"] for o in drawing["outputs"]] == ["display_data"] * 2
    assert made["cells"][2]["execution_count"] == 2
    drawn = made["cells"][2]["outputs"][0]["data"]
    assert drawn["image/svg+xml"].startswith("<?xml") and drawn["text/plain"] == "A line."


def test_figures_are_readable_at_640_pixels_and_the_same_in_every_run(small, tmp_path):
    path = small(SMALL)
    first = [file.read_bytes() for cell in run(path, tmp_path / "a") for file, _ in cell.figures]
    second = [file.read_bytes() for cell in run(path, tmp_path / "b") for file, _ in cell.figures]
    assert first == second
    assert b'width="460.8pt"' in first[0]                   # 6.4 inches: 640 pixels


@pytest.mark.parametrize("line, why", [("assert x == 2, 'not two'", "AssertionError: not two"), ("x +", "SyntaxError"),
                                       ("raise SystemExit(3)", "SystemExit: 3"),
                                       ("import tinyft; tinyft.ops.matmul(x, x)",
                                        r"Error: .*tensor\.py, line \d+\)|ops\.py")])
def test_a_failing_cell_is_reported_with_its_line(small, tmp_path, line, why):
    path, seen = small(SMALL + f"\n# %%\nprint('so far')\n\n{line}\n"), []
    with pytest.raises(Failed, match=why) as e:
        for cell in run(path, tmp_path / "out"):
            seen.append(cell)
    n = SMALL.count("\n") + 5
    assert f"lesson.py, line {n}, code cell 3:\n    {line}\n" in str(e.value)
    assert seen[-1].printed in ("so far\n", "")
    assert not (tmp_path / "out/01_small1.ipynb").exists() and runner._album is None


def test_the_command_shows_a_lesson_and_fails_with_it(small, capsys):
    small(SMALL, "# %%\nx = 1\n\n# %%\nassert x == 2\n")
    assert cli.main(["lesson", "small1"]) == 0
    out = capsys.readouterr().out
    assert "\nsaid 1\n" in out
    assert '  │ print("said", x)' in out
    assert "| 1 | 2 |" in out
    assert "A line." in out
    assert "About α · 1/2 and `$code`, bold." in out
    assert cli.main(["lesson", "02"]) == 1 and "code cell 2" in capsys.readouterr().out
    assert cli.main(["lesson", "--all"]) == 1
    out = capsys.readouterr().out
    assert "✓ 01_small1" in out
    assert "2 figures" in out
    assert "✕ 02_small2\n" in out
    assert "AssertionError" in out
    assert cli.main(["lesson", "none"]) == 1 and "small1, small2" in capsys.readouterr().err


QUESTION = """# %% [markdown]
# **Predict first.** How much?

# %%
print(6 * 7)

# %% [check]
assert 6 * 7 == 42
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_terminal", [True, False])
def test_only_a_terminal_waits_between_a_question_and_its_answer(small, tmp_path, monkeypatch, is_terminal):
    out = Terminal() if is_terminal else io.StringIO()
    shown_before = []
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda: shown_before.append(out.getvalue()))
    page = Page(out)
    for cell in run(small(QUESTION), tmp_path / "out"):
        reading.write_cell(cell, page)
    assert len(shown_before) == is_terminal
    for text in shown_before:
        assert "print(6 * 7)" in text
        assert "42" not in text
    assert "\n42\n" in out.getvalue()
    assert "checked" in out.getvalue()
    assert "assert" not in out.getvalue()


def test_a_notebook_for_the_learner_has_no_results_and_is_never_overwritten(small, tmp_path, capsys):
    small(QUESTION)
    assert cli.main(["lesson", "small1", "--notebook"]) == 0
    path = tmp_path / "work/01_small1.ipynb"
    assert "jupyter lab work/01_small1.ipynb" in capsys.readouterr().out
    made = json.loads(path.read_text(encoding="utf-8"))
    question, answer, check = made["cells"]
    assert answer["outputs"] == check["outputs"] == []
    assert answer["execution_count"] is None
    assert check["metadata"]["jupyter"] == {"source_hidden": True}
    path.write_text("my notes", encoding="utf-8")
    assert cli.main(["lesson", "small1", "--notebook"]) == 1
    assert path.read_text(encoding="utf-8") == "my notes"


def test_a_cell_of_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"line 3: a cell wants one of the kinds markdown, md, check, got \[chekc\]"):
        parse("x = 1\n\n# %% [chekc]\nassert x\n")


TEXT = """# # A title
#
# **Reading:** 5 minutes. **You need:** *nothing at all*, or $x$ and
# **this**. The result is about
# 3. Then it goes on.
# **Exercises:** one
#
# Two things:
# - the first, which is
#   long
# - the second, `a*b*c`
#
# `code` begins a paragraph that is folded like any other one, in spite of the mark
# that it begins with.
"""


def test_text_is_folded_with_its_lists_and_without_its_marks(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    out = io.StringIO()
    page = Page(out)
    reading.write_cell(parse("# %% [markdown]\n" + TEXT)[0], page)
    lines = out.getvalue().splitlines()
    assert "Reading: 5 minutes. You need: nothing at all, or x and this. The result is about 3. Then" in out.getvalue()
    assert "Exercises: one" in lines
    assert "- the first, which is long" in lines
    assert "- the second, `a*b*c`" in lines
    assert "Two things:" in lines
    assert any(line.startswith("`code` begins a paragraph") and len(line) > 88 for line in lines)


def test_a_terminal_without_unicode_gets_its_own_signs(small, tmp_path):
    path, out = small(SMALL), open(tmp_path / "page", "w+", encoding="ascii")
    with out:
        for cell in run(path, tmp_path / "out"):
            reading.write_cell(cell, Page(out))
        out.seek(0)
        text = out.read()
    assert "  | x = 1\n" in text
    assert "About alpha cdot" in text
    assert "?" not in text


def test_a_script_saves_its_figures_and_says_where(small, tmp_path, monkeypatch, capsys):
    path = small(SMALL)
    monkeypatch.setattr(runner, "_album", None)
    monkeypatch.setattr(runner.sys.modules["__main__"], "__file__", str(path), raising=False)
    import matplotlib
    matplotlib.use("Agg")
    figure(height=1.0)
    runner.show("One.")
    assert "01_small1-1.svg  One." in capsys.readouterr().out
    assert (tmp_path / "work/figures/01_small1-1.svg").exists()

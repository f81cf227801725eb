"""Lessons: what each must hold (its header, its length, nothing from later lessons, code quoted and not copied), and
the runner.

That every lesson runs is checked by `make lessons`.  The checks take a lesson as text, so that planted faults can be
shown to them.
"""
from __future__ import annotations

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest

import tinyft
from tinyft import cli
from tinyft.learn import folders, reading
from tinyft.learn import lessons as runner
from tinyft.learn.exercise import of_lesson
from tinyft.learn.folders import lessons, lessons_in
from tinyft.learn.lessons import Failed, notebook, parse, quote, run
from tinyft.learn.show import Page

TEXTS = {name: lesson.file.read_text(encoding="utf-8") for name, lesson in lessons().items()}
FOLDERS = {name: lesson.folder for name, lesson in lessons().items()}
LINES = 151

# The names of the library that a lesson introduces; later lessons may use them too.  A name allows everything below it:
# "ops.mul" allows one op, "data" the whole package.
OPS = ("add sub mul div neg power matmul exp log sqrt tanh sigmoid absolute relu sum mean amax maximum softmax "
       "log_softmax layer_norm")
TEACHES = {
    "autograd": {*(f"ops.{name}" for name in OPS.split()), "Tensor", "no_grad", "detect_anomaly", "tensor", "data",
                 "peak_memory", "use",
                 "backend", "learn.lessons", "check"},
    "transformer": {"ops", "functional.softmax_attention", "nn", "models", "load", "Context", "Cache", "Module",
                    "Parameter",
                    "GPT", "GPTConfig", "BERT", "BERTConfig", "array", "count"},
    "training": {"optim", "SGD", "Adam", "AdamW", "constant_schedule", "linear_schedule", "cosine_schedule", "fit",
                 "evaluate", "train", "History", "Diverged", "kernels",
                 "classifier", "functional", "batches", "baselines", "strict"},
    "pretraining": {"pretrain", "perplexity", "generate", "decode", "save", "formats"},
    "gpu": {"kernels.cuda"},
    "precision": {"precision", "autocast", "GradScaler"},
}


@cache
def tree(text: str) -> list[ast.Module]:
    return [ast.parse(cell.source) for cell in parse(text) if cell.kind == "code"]


def calls(text: str, function: str) -> list[ast.Call]:
    return [n for cell in tree(text) for n in ast.walk(cell) if isinstance(n, ast.Call) and getattr(n.func, "id", "")
            == function]


# ── header, length, exercises ────────────────────────────────────────────────────────────────────────────────────────
def named(text: str, mark: str) -> str:
    found = re.search(rf"\*\*{mark}:?\*\*:?([^*]*)", text)
    return " ".join(found[1].split()) if found else ""


def wanting(name: str, text: str) -> list[str]:
    """The parts of its outer form that a lesson lacks."""
    cells, found = parse(text), []
    head, words = cells[0].source, " ".join(c.source for c in cells if c.kind == "markdown")
    exercises = [e.function for e in of_lesson(name)]
    if cells[0].kind != "markdown" or not head.startswith(f"# {FOLDERS[name][:2]} "):
        found.append(f"the title # {FOLDERS[name][:2]} ...")
    found += [f"**{mark}:** in the header" for mark in ("Minutes", "Prerequisites",
                                                        "Exercises") if not named(head, mark)]
    if text.count("\n") > LINES:
        found.append(f"brevity: {text.count(chr(10))} lines, at most {LINES}")
    started = re.findall(r"tinyft start ([\w.]+)", words)
    listed = re.findall(r"[\w.]+", named(head, "Exercises"))[:len(exercises)]
    if sorted(listed) != sorted(exercises) or sorted(set(started)) != sorted(exercises):
        found.append(f"its exercises in the header and as `tinyft start` commands: {', '.join(exercises)}")
    if "**Predict first" not in words:
        found.append("a question before a result: **Predict first**")
    if not any(isinstance(n,
                          ast.Assert) for cell in tree(text)
               for n in ast.walk(cell)) or not calls(text, "quote") or not calls(text, "show"):
        found.append("an assert, a quote and a figure with show")
    return found


@pytest.mark.parametrize("name", TEXTS)
def test_a_lesson_has_its_form(name):
    assert wanting(name, TEXTS[name]) == []


def test_lessons_stand_in_the_order_of_their_numbers_and_have_at_least_two_exercises():
    assert list(FOLDERS) == list(TEACHES)
    for name, lesson in lessons().items():
        assert lesson.title.startswith(f"{lesson.folder[:2]} ") and len(of_lesson(name)) >= 2


@pytest.mark.parametrize("old, new",
                         [("# # 01 T", "# # T"), ("**Minutes:** 30", "30 minutes"), ("**Prerequisites:**", ""),
                                      ("layer_norm, topo", "topo"), ("tinyft start sum_to", "tinyft start sum_too"),
                          ("**Predict first", "**Now"),
                                      ("assert ", "bool or "),
                                      ("quote(", "print("), ("show(", "str("),
                          ("import numpy", "\n" * 30 + "import numpy")])
def test_a_lesson_out_of_form_is_caught(old, new):
    assert old in TEXTS["autograd"] and wanting("autograd", TEXTS["autograd"].replace(old, new))


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
from tinyft.learn.lessons import figure, show
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
    (out / "01_small1-7.png").write_bytes(b"of an older lesson")
    cells = list(run(path, out))
    assert [c.printed for c in cells] == ["", "said 1\n", ""] and capsys.readouterr().out == ""
    assert cells[2].figures == [(out / "01_small1-1.png", "A line."), (out / "01_small1-2.png", "")]
    assert sorted(p.name for p in out.iterdir()) == ["01_small1-1.png", "01_small1-2.png", "01_small1.ipynb"]
    assert runner._album is None
    made = json.loads((out / "01_small1.ipynb").read_text(encoding="utf-8"))
    assert made == notebook(cells) and (made["nbformat"], made["nbformat_minor"]) == (4, 4)
    text, printing, drawing = made["cells"]
    assert "outputs" not in text
    assert [o["output_type"] for o in printing["outputs"]] == ["stream"]
    assert [o["output_type"] for o in drawing["outputs"]] == ["display_data"] * 2
    assert made["cells"][2]["execution_count"] == 2
    drawn = made["cells"][2]["outputs"][0]["data"]
    assert drawn["image/png"].startswith("iVBOR") and drawn["text/plain"] == "A line."


def test_figures_are_readable_at_640_pixels_and_the_same_in_every_run(small, tmp_path):
    path = small(SMALL)
    first = [file.read_bytes() for cell in run(path, tmp_path / "a") for file, _ in cell.figures]
    second = [file.read_bytes() for cell in run(path, tmp_path / "b") for file, _ in cell.figures]
    assert first == second and int.from_bytes(first[0][16:20], "big") == 2 * 640


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
    assert "About α · (1)/(2) and `$code`, bold." in out
    assert cli.main(["lesson", "02"]) == 1 and "code cell 2" in capsys.readouterr().out
    assert cli.main(["lesson", "--all"]) == 1
    out = capsys.readouterr().out
    assert "✓ 01_small1" in out
    assert "2 figures" in out
    assert "✕ 02_small2\n" in out
    assert "AssertionError" in out
    assert cli.main(["lesson", "none"]) == 1 and "small1, small2" in capsys.readouterr().err


def test_a_terminal_without_unicode_gets_its_own_signs(small, tmp_path):
    path, out = small(SMALL), open(tmp_path / "page", "w+", encoding="ascii")
    with out:
        for cell in run(path, tmp_path / "out"):
            reading.write_cell(cell, Page(out))
        out.seek(0)
        text = out.read()
    assert "  | x = 1\n" in text
    assert "About alpha  cdot" in text.replace("alpha cdot", "alpha  cdot")
    assert "?" not in text


def test_a_script_saves_its_figures_and_says_where(small, tmp_path, monkeypatch, capsys):
    path = small(SMALL)
    monkeypatch.setattr(runner, "_album", None)
    monkeypatch.setattr(runner.sys.modules["__main__"], "__file__", str(path), raising=False)
    import matplotlib
    matplotlib.use("Agg")
    runner.figure(height=1.0)
    runner.show("One.")
    assert "01_small1-1.png  One." in capsys.readouterr().out
    assert (tmp_path / "work/figures/01_small1-1.png").exists()

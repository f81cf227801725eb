"""The book: pages hold what they should, in order, and every link leads somewhere.  Rendering is tried where Sphinx is
installed.
"""
from __future__ import annotations

import importlib.util
import inspect
import posixpath
import re
import subprocess
import sys
from functools import lru_cache

import pytest
from helpers import host_only

from tinyft import optim, tensor
from tinyft.learn import annotate, book
from tinyft.learn import lessons as lesson_runner
from tinyft.learn.exercise import exercises
from tinyft.learn.folders import Lesson, lessons

pytestmark = host_only

SMALL = '''"""A module.

    y = a_b * c          \u00a71
    z = 2

Text with *stars* and `code_1`.  arXiv:2106.09685
"""
import os


# \u2500\u2500 first part \u2500\u2500\u2500\u2500
def f(x):
    "y = x.    dx = g"
    s = "# no comment"
    # why it is so,
    # in two lines
    return x + 1                                         # short


class A:
    """Holds n."""

    def g(self):
        return 1

    @property
    def h(self):
        "The h."
        return "a line so long that the comment after it cannot stand beside it", self.g()  # a long comment after it

    def k(self):
        return 2
'''
pages = lru_cache(None)(book.pages)


def test_prose_and_code_of_a_small_module_come_in_order():
    found = annotate.blocks(SMALL)
    assert [(b.name, b.heading) for b in found] == [("", ""), ("f", "first part"), ("", ""), ("A", ""), ("A.h", ""),
                                                    ("A.k", "")]
    assert [b.prose for b in found[1:]] == ["y = x.    dx = g", "why it is so,\nin two lines", "Holds n.", "The h.", ""]
    assert found[1].code == 'def f(x):\n    s = "# no comment"'
    assert found[2].code == "    return x + 1  # short"
    assert found[3].code.splitlines()[:2] == ["class A:", "    def g(self):"]
    assert found[4].code.splitlines()[:3] == ["    @property", "    def h(self):", "        # a long comment after it"]
    text = annotate.page("a/small.py", SMALL, {"f": "Exercise: f"})
    order = ["# small.py", "y = a_b * c    \u00a71", r"\*stars\* and `code_1`", "[arXiv:2106.09685](https://",
             "import os", "## first part",
             '<a id="f"></a>', "y = x.\\\ndx = g", "Exercise: f", "def f(x)", "why it is so", "return x + 1",
             "Holds n.", "class A",
             "The h.", "def k"]
    assert annotate.squeezed(["a" + 9 * " " + "b", "ab" + 8 * " " + "c", "a"]) == ["a     b", "ab    c", "a"]
    places = [text.find(s) for s in order]
    assert -1 not in places and places == sorted(places), dict(zip(order, places))


@pytest.mark.parametrize("module", [tensor, optim, annotate])
def test_no_line_of_code_is_lost(module):
    text = inspect.getsource(module)
    code = "\n".join(b.code for b in annotate.blocks(text))

    def tokens(line):
        return re.findall(r"\w+", re.sub(r"#.*", "", line))

    said = "\n".join(b.prose for b in annotate.blocks(text))
    for line in text.splitlines():
        line = re.sub(r"\s+#.*", "", line).rstrip()
        assert line in code or line.strip().strip('"') in said or tokens(line) == [] or '"""' in line, line


KERNELS = """// y = a_b * c.        arXiv:2106.09685
//
//   two:  y = 2
#include "rows.cuh"

__device__ float f(float x) { return x; }                // no prose of its own

// Adds one.
// T is a type.
extern "C" __global__ void one(T* y, int n) {
  // inside

  y[threadIdx.x] += 1;
}
"""


def test_prose_and_code_of_kernels_come_in_order():
    found = annotate.cuda_blocks(KERNELS)
    assert [b.name for b in found] == ["", "", "one"]
    assert found[1].prose == ""
    assert found[2].prose == "Adds one.\nT is a type."
    code = "\n\n".join(b.code for b in found)
    assert [line for line in KERNELS.splitlines() if line.strip()
            and line[:2] != "//"] == [line for line in code.splitlines() if line.strip()]
    text = annotate.cuda_page("a/small.cu", KERNELS, {"one": "Exercise: one"})
    order = ["# small.cu", r"y = a\_b \* c.", "two:  y = 2", "#include", "no prose of its own", '<a id="one"></a>',
             "Adds one. T is a type.",
             "Exercise: one", "````cuda\nextern", "// inside", "+= 1"]
    places = [text.find(s) for s in order]
    assert -1 not in places and places == sorted(places), dict(zip(order, places))
    bounded = 'extern "C" __global__ void __launch_bounds__(256, 2) two(int n) {\n}\n'
    assert [b.name for b in annotate.cuda_blocks(bounded)] == ["two"]
    assert annotate.first_sentence(KERNELS).startswith("y = a_b")
    assert annotate.first_sentence(SMALL) == "A module."
    assert annotate.first_sentence('"One line."\nimport os\n') == "One line."


def test_every_exercise_has_its_statement_effort_command_and_three_folded_hints():
    for lesson in lessons():
        parts = re.split(r"^## ", pages()[f"exercises/{lesson}"], flags=re.M)[1:]
        mine = [e for e in exercises().values() if e.lesson == lesson]
        assert len(parts) == len(mine) > 0
        for e, part in zip(mine, parts):
            begins = f"def {e.function}(" if e.suffix == ".py" else f'extern "C" __global__ void {e.function}('
            assert part.startswith(annotate.escaped(e.function))
            assert begins in part
            assert f"tinyft check {e.name}" in part
            assert f"about {e.minutes} minutes" in part and part.count("\u2605") == e.difficulty
            folded = re.findall(r'<details class="hint"><summary>Hint (\d) of 3</summary>\n\n(.*?)\n\n</details>', part,
                                re.S)
            assert folded == [(str(n), annotate.escaped(h)) for n, h in enumerate(e.hints, 1)]
            reference = e.reference()
            is_kernel = e.suffix == ".cu"
            doc = e.statement()[1] if is_kernel else inspect.getdoc(getattr(reference, "definition", reference))
            assert doc
            assert annotate.markdown(doc) in part
            assert all(annotate.escaped(law.title) in part for law in e.laws)


def test_every_link_leads_to_a_page_and_every_page_is_reached_from_the_index():
    there = {*(f"/{n}.md" for n in pages()), *(f"/lessons/{lesson.folder}.ipynb" for lesson in lessons().values())}
    for name, text in pages().items():
        if name.startswith("source/"):
            text = re.sub(r"````.*?````", "", text, flags=re.S)
        for target in re.findall(r"\]\((/[^)]*)\)", text):
            assert target in there, (name, target)
        for target, anchor in re.findall(r'href="([^"#]*)#([^"]*)"', text):
            page = posixpath.normpath(posixpath.join(posixpath.dirname(name), target)).removesuffix(".html")
            assert f'<a id="{anchor}"></a>' in pages()[page], (name, target, anchor)
    tree = {line.split("<")[-1].rstrip(">") for part in re.findall(r"```{toctree}(.*?)```", pages()["index"],
                                                                   re.S) for line in part.split()}
    assert {t.rsplit(".", 1)[0] for t in there} - {"/index"} <= tree


def test_mathematics_comes_along_with_its_fonts_and_licence():
    folder = book.HERE / "site" / "mathjax"
    assert "Apache License" in (folder / "LICENSE").read_text(encoding="utf-8")
    assert len(list(folder.rglob("*.woff"))) == 23
    assert "3.2.2" in (folder / "tex-mml-chtml.js").read_text(encoding="utf-8")


@pytest.mark.skipif(not all(importlib.util.find_spec(m) for m in ("myst_nb", "furo")),
                    reason="Sphinx is not installed; make site installs it")
def test_a_page_is_rendered_offline(tmp_path):
    code = f"""
import pathlib
from tinyft.learn import annotate, book
text = annotate.page("a/small.py", {SMALL!r})
out = pathlib.Path({str(tmp_path)!r})
text += "\\nThe square $x^2$, and in a paragraph\\n$$m + 1,\\n= n$$\\nas well.\\n"
assert book.render({{"index.md": text}}, out / "book", out / "site") == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    loaded = re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="([^"]+)"', made)
    assert any("mathjax/tex-mml-chtml.js" in s for s in loaded)
    assert not [s for s in loaded if "//" in s]
    assert all((tmp_path / "site" / s.split("?")[0]).exists() for s in loaded if s[0] != "#")
    assert made.count('class="math notranslate') == 2
    assert "$" not in re.sub("<script.*?</script>", "", made, flags=re.S)
    assert made.index("y = x.") < made.index("Holds n.") < made.index("The h.")


TAGGED = """# %% [markdown]
# # 01 A lesson
#
# **Reading:** 5 minutes. **You need:** Python.
# **Exercises:** none.
#
# The introduction.
# ## A heading
# **Predict first.** How much?

# %%
print(42)

# %% [check]
assert True
"""


def test_the_book_folds_the_answer_to_a_question_and_the_checks():
    cells = lesson_runner.notebook(lesson_runner.parse(TAGGED))["cells"]
    for cell in cells:
        book._prepare_for_book(cell)
    answer, check = cells[1:]
    assert answer["metadata"]["tags"] == ["hide-output"]
    assert check["metadata"]["tags"] == ["hide-cell"]
    assert "tags" not in cells[0]["metadata"]


def test_the_front_page_shows_the_introduction_of_a_lesson_and_none_of_its_headings(tmp_path):
    folder = tmp_path / "01_small"
    folder.mkdir()
    (folder / "lesson.py").write_text(TAGGED, encoding="utf-8")
    lesson = Lesson("autograd", folder / "lesson.py")
    entry = book._lesson_entry(lesson)
    assert "\n\nThe introduction.\n\nReading: 5 minutes" in entry
    assert "A heading" not in entry

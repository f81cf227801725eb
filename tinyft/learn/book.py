"""The book: the lessons with their results, the exercises, and annotated sources, as a site that needs no network.

    make site                  work/site/index.html        (python -m tinyft.learn.book [--out FOLDER])

The lessons are run here, unless their notebooks in work/lessons are newer than all sources.  Everything else is written
from the library itself, as Markdown (pages), of which Sphinx with MyST-NB and Furo makes HTML (render).
MathJax 3.2.2 comes along, in site/mathjax.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import sys
import textwrap
import time
from pathlib import Path

from ..methods import Entry, methods
from .annotate import cuda_page, escaped, first_sentence, markdown, page
from .exercise import Exercise, exercises, of_lesson
from .folders import Lesson, lessons
from .lessons import Failed, paragraphs, parse, run

HERE = Path(__file__).parent
PACKAGE = HERE.parent
CORE = ("tensor", "ops", "nn", "edit", "optim")          # in reading order


# ── the pages, as Markdown ───────────────────────────────────────────────────────────────────────────────────────────
def pages() -> dict[str, str]:
    """{name without ending: Markdown}: index, exercises/<lesson>, source/<module>.  The lessons' pages are notebooks.
    """
    found = {"index": _index()}
    for name, lesson in lessons().items():
        found[f"exercises/{name}"] = _exercises(lesson)
    for module in sources():
        found[f"source/{_page_name(module)}"] = _source_page(module)
    return found


def sources() -> list[str]:
    """The modules that have a page: the core, every method, and the targets of the exercises."""
    every = [*CORE, *(_module(m) for m in methods()), *(_target_module(e) for e in exercises().values())]
    return list(dict.fromkeys(every))


def stars(e: Exercise) -> str:
    """The difficulty as five stars, in HTML."""
    text = "★" * e.difficulty + "☆" * (5 - e.difficulty)
    return f'<span class="stars" title="difficulty {e.difficulty} of 5">{text}</span>'


def _source_page(module: str) -> str:
    """The page of a module's annotated source; a function that an exercise asks for has a link to the exercise.

    module: its name in tinyft, such as "optim.schedules".
    """
    notes = {}                                           # {function: link}
    for e in exercises().values():
        if _target_module(e) == module:
            function = e.target.split(":")[1]            # a target is "module:function"
            notes[function] = f"Exercise: [{e.function}](/exercises/{e.lesson}.md) {stars(e)}"
    path = _file(module)
    write = page if path.suffix == ".py" else cuda_page
    return write(path.relative_to(PACKAGE.parent).as_posix(), path.read_text(encoding="utf-8"), notes)


def _exercises(lesson: Lesson) -> str:
    """The page of a lesson's exercises."""
    link = f"[{lesson.title}](/lessons/{lesson.folder}.ipynb)"
    sections = [f"# Exercises {lesson.folder[:2]}\n\nFor the lesson {link}."]
    sections += [_exercise(e) for e in of_lesson(lesson.name)]
    return "\n".join(sections)


def _exercise(e: Exercise) -> str:
    """One exercise in Markdown: effort, signature, task, laws, commands, three folded hints, a link to the answer."""
    module, name = e.target.split(":")
    signature, task = e.statement()
    language = "python" if e.suffix == ".py" else "cuda"
    effort = f'<span class="effort">about {e.minutes} minutes · {e.name}</span>'
    parts = [f"\n## {escaped(e.function)}\n\n{stars(e)} {effort}\n\n"
             f"````{language}\n{signature}\n````\n\n{markdown(task)}\n"]
    if e.may_use:
        parts.append(f"You may use: {markdown(e.may_use)}\n")
    if e.example:
        parts.append(f"````{language}\n{textwrap.dedent(e.example).strip()}\n````\n")
    parts.append("It is right when:\n")
    parts += [f"- {escaped(law.title)}" for law in e.laws]
    parts.append(f"\n```console\n$ tinyft start {e.name}\n$ tinyft check {e.name}\n```\n")
    for n, hint in enumerate(e.hints, start=1):
        summary = f"<summary>Hint {n} of 3</summary>"
        parts.append(f'<details class="hint">{summary}\n\n{escaped(hint)}\n\n</details>\n')
    link = f'<a href="../source/{_page_name(module)}.html#{name}">{e.file}, {name}</a>'
    parts.append(f"<details><summary>The answer</summary>\n\nThe library's own: {link}\n\n</details>\n")
    return "\n".join(parts)


INTRODUCTION = """# tinyft

Fine-tuning of transformers from scratch: lessons that run, exercises that check themselves, and a library that is \
short enough to be read. Each lesson ends with functions of the library to be written again; when all laws hold, read \
the original.

```console
$ tinyft lesson autograd      # read and run a lesson in the terminal
$ tinyft start                # the next exercise, as a file
$ tinyft check                # what holds, and the smallest input that does not
```

## The path"""


def _index() -> str:
    """The front page, in Markdown: the path of lessons, exercises and sources; then the methods; then the library.

    The toctrees at its end are not shown here: Sphinx makes the navigation of all pages from them.
    """
    parts = [INTRODUCTION]
    parts += [_lesson_entry(lesson) for lesson in lessons().values()]
    parts += ["## The methods", "One file each, and each reads like its paper."]
    parts.append("\n".join(_method_entry(m) for m in methods()))
    parts.append("## The library, in reading order")
    library = [m for m in sources() if not m.startswith("methods")]
    parts.append("\n".join(f"- {_link(m)}: {escaped(_summary(m))}" for m in library))
    path = []
    for lesson in lessons().values():
        path += [f"/lessons/{lesson.folder}", f"/exercises/{lesson.name}"]
    parts.append(_toctree("The path", path))
    parts.append(_toctree("The library", [_toctree_entry(m) for m in library]))
    parts.append(_toctree("The methods", [_toctree_entry(m) for m in sources() if m.startswith("methods")]))
    return "\n\n".join(parts) + "\n"


def _lesson_entry(lesson: Lesson) -> str:
    """A lesson on the front page: title, introduction, minutes, exercises, sources."""
    mine = of_lesson(lesson.name)
    cells = [c for c in parse(lesson.file.read_text(encoding="utf-8")) if c.kind == "markdown"]
    text = cells[0].source
    minutes = re.search(r"\*\*Reading:\*\*\s*(\d+)", text)
    introduction = [p for p in paragraphs(text) if p[:1] not in ("#", "*")]          # no heading, no **Reading:** line
    facts = []
    if minutes:
        facts.append(f"Reading: {minutes[1]} minutes")
    if mine:
        total = sum(e.minutes for e in mine)
        modules = dict.fromkeys(_target_module(e) for e in mine)
        facts.append(f"[{len(mine)} exercises](/exercises/{lesson.name}.md), {total} minutes")
        facts.append(f"Source: {', '.join(_link(m) for m in modules)}")
    heading = f"### [{lesson.title}](/lessons/{lesson.folder}.ipynb)"
    return f"{heading}\n\n{introduction[0] if introduction else ''}\n\n{' · '.join(facts)}"


def _method_entry(method: Entry) -> str:
    name = method.cls.__name__
    return f"- {_link(_module(method), name)}: {escaped(method.paper.removeprefix(f'{name}: '))}"


def _toctree(caption: str, entries: list[str]) -> str:
    listed = "\n".join(entries)
    return f"```{{toctree}}\n:hidden:\n:titlesonly:\n:caption: {caption}\n\n{listed}\n```"


def _toctree_entry(module: str) -> str:
    return f"{module.split('.')[-1]} </source/{_page_name(module)}>"


def _link(module: str, name: str = "") -> str:
    """A link to the page of a module, in Markdown."""
    return f"[{name or module.split('.')[-1]}](/source/{_page_name(module)}.md)"


def _page_name(module: str) -> str:
    return module.replace(".", "/")


def _module(method: Entry) -> str:
    return method.cls.__module__.removeprefix("tinyft.")


def _target_module(e: Exercise) -> str:
    return e.target.split(":")[0]


def _summary(module: str) -> str:
    return first_sentence(_file(module).read_text(encoding="utf-8"))


def _file(module: str) -> Path:
    """A module's source: Python, or CUDA C."""
    stem = PACKAGE.joinpath(*module.split("."))
    candidates = (stem.with_suffix(".py"), stem / "__init__.py", stem.with_suffix(".cu"))
    return next(p for p in candidates if p.exists())


# ── the lessons, with their results ──────────────────────────────────────────────────────────────────────────────────
def executed(out: Path) -> dict[str, str]:
    """{lessons/NN_name: notebook as JSON} of every lesson, run if necessary, with a link to its exercises at the end.

    A notebook in `out` is reused if it is newer than the lesson and the library, and not from a short run
    (TINYFT_FAST).  A short run itself reuses both kinds.
    """
    code = [p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".cu", ".cuh")]
    newest = max(p.stat().st_mtime for p in code)
    found = {}
    for lesson in lessons().values():
        file = out / f"{lesson.folder}.ipynb"
        if not _reusable(file, max(newest, lesson.file.stat().st_mtime)):
            for _ in run(lesson.file, out):              # writes the notebook
                pass
        book = json.loads(file.read_text(encoding="utf-8"))
        for cell in book["cells"]:
            _prepare_for_book(cell)
        next_step = f"**Next:** [the exercises of this lesson](/exercises/{lesson.name}.md)"
        book["cells"].append({"cell_type": "markdown", "metadata": {}, "source": next_step})
        found[f"lessons/{lesson.folder}"] = json.dumps(book, indent=1, ensure_ascii=False)
    return found


def _reusable(file: Path, newest: float) -> bool:
    """True if the notebook `file` exists, is not older than the time `newest`, and is not too short for this run.

    With TINYFT_FAST lessons train for fewer steps; such a notebook is too short for a run without TINYFT_FAST.
    """
    if not file.exists() or file.stat().st_mtime < newest:
        return False
    is_short = json.loads(file.read_text(encoding="utf-8"))["metadata"].get("short", True)
    return not is_short or bool(os.environ.get("TINYFT_FAST"))


def _prepare_for_book(cell: dict) -> None:
    """Tell MyST-NB to fold checks and answers, to colour quoted sources, and to show a single picture with its caption.

    cell: of a notebook, as JSON; its metadata is changed.  A picture's caption is its text/plain (lessons.py).
    """
    tags = cell["metadata"].get("tags", ())
    options = {}
    if "check" in tags:
        cell["metadata"]["tags"] = ["hide-cell"]
        options |= {"code_prompt_show": "The checks of this lesson", "code_prompt_hide": "The checks of this lesson"}
    if "answer" in tags:
        cell["metadata"]["tags"] = ["hide-output"]
        options |= {"code_prompt_show": "The result", "code_prompt_hide": "The result"}
    if "quote(" in cell["source"]:
        options["text_lexer"] = "python"
    data = [output["data"] for output in cell.get("outputs", ()) if "image/svg+xml" in output.get("data", {})]
    if len(data) == 1:
        caption = data[0]["text/plain"]
        options |= {"image": {"alt": caption}, "figure": {"caption": escaped(caption)}}
    if options:
        cell["metadata"]["mystnb"] = options


# ── as HTML ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def render(files: dict[str, str], source: Path, out: Path) -> int:
    """Write the files {name with ending: text} to the folder `source`, and make the site of them in the folder `out`.

    Other files in `source`, of an earlier site, are deleted.  Returns the number of Sphinx's warnings; each is printed.
    """
    from sphinx.application import Sphinx
    for old in [p for p in source.rglob("*") if p.is_file()]:
        if old.relative_to(source).as_posix() not in files:
            old.unlink()
    for name, text in files.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # A file that has not changed keeps its time, so Sphinx does not make its page again.
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    doctrees = source.parent / f".{source.name}"
    app = Sphinx(source, None, out, doctrees, "html", CONFIG, status=None, warning=sys.stderr)
    app.build()
    return app._warncount


CONFIG = {
    "project": "tinyft",
    "extensions": ["myst_nb", "sphinx_copybutton"],
    "html_theme": "furo",
    "html_title": "tinyft",
    "smartquotes": False,
    "myst_enable_extensions": ["dollarmath", "colon_fence"],
    "myst_dmath_double_inline": True,
    "nb_execution_mode": "off",
    "copybutton_exclude": ".linenos, .gp, .go",           # neither numbers, nor prompts, nor results
    "html_show_sourcelink": False,
    "html_copy_source": False,
    "html_static_path": [str(HERE / "site")],
    "html_css_files": ["book.css"],
    "templates_path": [],
    "html_show_copyright": False,
    "html_show_sphinx": False,
    "html_favicon": str(HERE / "site" / "icon.svg"),
    "mathjax_path": "mathjax/tex-mml-chtml.js",
    "mathjax3_config": {"tex": {"macros": {}}},
    "suppress_warnings": ["misc.highlighting_failure"],  # quoted results are not all Python
}


def main(argv: list[str] | None = None) -> int:
    """Make the book.  The exit status is 1 if a lesson does not run or Sphinx warns."""
    parser = argparse.ArgumentParser(prog="python -m tinyft.learn.book", description="make the book")
    parser.add_argument("--out", type=Path, default=Path("work/site"), help="where the site goes (default: work/site)")
    out = parser.parse_args(argv).out
    start = time.perf_counter()
    try:
        notebooks = executed(out.parent / "lessons")
    except Failed as e:
        print(f"a lesson does not run, so there is no book: {e}", file=sys.stderr)
        return 1
    files = {f"{name}.ipynb": text for name, text in notebooks.items()}
    files |= {f"{name}.md": text for name, text in pages().items()}
    warnings = render(files, out.parent / "book", out)
    remark = f", {warnings} warnings" if warnings else ""
    print(f"{out / 'index.html'}: {len(files)} pages, {time.perf_counter() - start:.0f} s{remark}")
    return int(warnings > 0)


if __name__ == "__main__":
    sys.exit(main())

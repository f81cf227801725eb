"""The book: the lessons with their results, the exercises, and the sources with prose beside code, as a site that needs no network.

    make site                  work/site/index.html        (python -m tinyft.learn.book [--out FOLDER])

The lessons are run here, unless their notebooks in work/lessons are newer than all sources; everything else is written from the library itself,
as Markdown (pages), of which Sphinx with MyST-NB and Furo makes HTML (render).  MathJax 3.2.2 comes along, in site/mathjax.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

from ..methods import Entry, methods
from .annotate import cuda_page, escaped, first_sentence, markdown, page
from .exercise import Exercise, exercises, of_lesson
from .folders import Lesson, lessons
from .lessons import Failed, parse, run

HERE = Path(__file__).parent
CORE = ("tensor", "ops", "nn", "edit", "optim")  # in reading order


# ── the pages, as Markdown ───────────────────────────────────────────────────────────────────────────────────────────
def pages() -> dict[str, str]:
    """{name without ending: Markdown} of all pages but the lessons, which are notebooks: index, exercises/<lesson>,
    source/<module>.
    """
    found = {f"exercises/{name}": _exercises(lesson) for name, lesson in lessons().items()}
    for module in sources():
        mine = {e.target.split(":")[1]: f"Exercise: [{e.function}](/exercises/{e.lesson}.md) {stars(e)}"
                for e in exercises().values() if e.target.split(":")[0] == module}
        path = _file(module)
        write = page if path.suffix == ".py" else cuda_page
        found[f"source/{module.replace('.', '/')}"] = write(path.relative_to(HERE.parents[1]).as_posix(), path.read_text(encoding="utf-8"), mine)
    return {"index": _index(), **found}


def sources() -> list[str]:
    """The modules that have a page: the core, every method, and where else an exercise comes from."""
    every = [*CORE, *(_of(m) for m in methods()), *(e.target.split(":")[0] for e in exercises().values())]
    return list(dict.fromkeys(every))


def stars(e: Exercise) -> str:
    return f'<span class="stars" title="difficulty {e.difficulty} of 5">{"★" * e.difficulty}{"☆" * (5 - e.difficulty)}</span>'


def _exercises(lesson: Lesson) -> str:
    """Each exercise of a lesson: effort, what the learner starts from, the laws, how to check, three hints, folded."""
    out = [f"# Exercises {lesson.title[:2]}\n\nFor the lesson [{lesson.title}](/lessons/{lesson.folder}.ipynb)."]
    for e in of_lesson(lesson.name):
        module, name = e.target.split(":")
        signature, said = e.statement()
        language = "python" if e.suffix == ".py" else "cuda"
        out.append(f"\n## {escaped(e.function)}\n\n{stars(e)} <span class=\"effort\">about {e.minutes} minutes · {e.name}</span>\n\n"
                   f"````{language}\n{signature}\n````\n\n{markdown(said)}\n\nIt is right when:\n")
        out += [f"- {escaped(law.title)}" for law in e.laws]
        out.append(f"\n```console\n$ tinyft start {e.name}\n$ tinyft check {e.name}\n```\n")
        out += [f"<details class=\"hint\"><summary>Hint {n} of 3</summary>\n\n{escaped(hint)}\n\n</details>\n" for n, hint in enumerate(e.hints, 1)]
        out.append(f'<details><summary>The answer</summary>\n\nThe library\'s own: '
                   f'<a href="../source/{module.replace(".", "/")}.html#{name}">{e.file}, {name}</a>\n\n</details>\n')
    return "\n".join(out)


def _index() -> str:
    """The path through the book: lesson, exercises, the sources it teaches; then the methods; then the rest."""
    out = ["# tinyft", "Fine-tuning of transformers from scratch: lessons that run, exercises that check themselves, and a library that is short "
           "enough to be read. Each lesson ends with functions of the library to be written again; when all laws hold, read the original.",
           "```console\n$ tinyft lesson autograd      # read and run a lesson in the terminal\n"
           "$ tinyft start                # the next exercise, as a file\n"
           "$ tinyft check                # what holds, and the smallest input that does not\n```", "## The path"]
    for lesson in lessons().values():
        mine = of_lesson(lesson.name)
        taught = dict.fromkeys(e.target.split(":")[0] for e in mine)
        name = f"[{lesson.title}](/lessons/{lesson.folder}.ipynb)"
        text = [c.source for c in parse(lesson.file.read_text(encoding="utf-8")) if c.kind == "markdown"][0]
        minutes = re.search(r"\*\*Minutes:\*\*\s*(\d+)", text)
        about = [p for p in text.split("\n\n") if p[:1] not in ("#", "*")]
        out.append(f"### {name}\n\n{about[0] if about else ''}\n\n" + " · ".join(filter(None, [
            f"Lesson: {minutes[1]} minutes" if minutes else "",
            f"[{len(mine)} exercises](/exercises/{lesson.name}.md), {sum(e.minutes for e in mine)} minutes" if mine else "",
            f"Source: {', '.join(_source(m) for m in taught)}" if taught else ""])))
    out += ["## The methods", "One file each, and each reads like its paper.",
            "\n".join(f"- {_source(_of(m), m.cls.__name__)}: {escaped(m.paper.removeprefix(m.cls.__name__ + ': '))}" for m in methods()),
            "## The library, in reading order", "\n".join(f"- {_source(m)}: {escaped(_says(m))}" for m in sources() if not m.startswith("methods"))]
    path = []
    for lesson in lessons().values():
        path += [f"/lessons/{lesson.folder}", f"/exercises/{lesson.name}"]
    names = {m: f"{m.split('.')[-1]} </source/{m.replace('.', '/')}>" for m in sources()}
    tree = {"The path": path, "The library": [names[m] for m in names if not m.startswith("methods")],
            "The methods": [names[m] for m in names if m.startswith("methods")]}
    out += [f"```{{toctree}}\n:hidden:\n:titlesonly:\n:caption: {caption}\n\n" + "\n".join(entries) + "\n```" for caption, entries in tree.items()]
    return "\n\n".join(out) + "\n"


def _of(method: Entry) -> str:
    return method.cls.__module__.removeprefix("tinyft.")


def _source(module: str, name: str = "") -> str:
    return f"[{name or module.split('.')[-1]}](/source/{module.replace('.', '/')}.md)"


def _says(module: str) -> str:
    return first_sentence(_file(module).read_text(encoding="utf-8"))


def _file(module: str) -> Path:
    """A module's source: Python, or CUDA C."""
    stem = HERE.parent.joinpath(*module.split("."))
    return next(p for p in (stem.with_suffix(".py"), stem / "__init__.py", stem.with_suffix(".cu")) if p.exists())


# ── the lessons, with their results ──────────────────────────────────────────────────────────────────────────────────
def executed(out: Path) -> dict[str, str]:
    """{lessons/NN_name: notebook}; what `out` has of them is taken if it is newer than the lesson and the library, and
    no short run by TINYFT_FAST.
    """
    newest = max(p.stat().st_mtime for p in HERE.parent.rglob("*") if p.suffix in (".py", ".cu", ".cuh"))
    found, short = {}, bool(os.environ.get("TINYFT_FAST"))
    for lesson in lessons().values():
        made = out / f"{lesson.folder}.ipynb"
        read = lambda made=made: json.loads(made.read_text(encoding="utf-8"))
        if not made.exists() or made.stat().st_mtime < max(newest, lesson.file.stat().st_mtime) or read()["metadata"].get("short", True) > short:
            for _ in run(lesson.file, out):
                pass
        book = read()
        for cell in book["cells"]:
            if "quote(" in cell["source"]:  # what it prints is Python
                cell["metadata"]["mystnb"] = {"text_lexer": "python"}
            pictures = [o["data"]["text/plain"] for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
            if len(pictures) == 1:
                cell["metadata"].setdefault("mystnb", {}).update({"image": {"alt": pictures[0]}, "figure": {"caption": escaped(pictures[0])}})
        book["cells"].append({"cell_type": "markdown", "metadata": {}, "source": f"**Next:** [the exercises of this lesson](/exercises/{lesson.name}.md)"})
        found[f"lessons/{lesson.folder}"] = json.dumps(book, indent=1, ensure_ascii=False)
    return found


# ── as HTML ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def render(files: dict[str, str], source: Path, out: Path) -> int:
    """Write the files {name with ending: text} and make the site of them; how many warnings Sphinx had, each of which
    is printed.
    """
    from sphinx.application import Sphinx
    for old in (p for p in source.rglob("*") if p.is_file() and p.relative_to(source).as_posix() not in files):
        old.unlink()
    for name, text in files.items():  # what has not changed keeps its time, and is not made again
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    app = Sphinx(source, None, out, source.parent / f".{source.name}", "html", CONFIG, status=None, warning=sys.stderr)
    app.build()
    return app._warncount


CONFIG = {
    "project": "tinyft", "extensions": ["myst_nb"], "html_theme": "furo", "html_title": "tinyft", "smartquotes": False,
    "myst_enable_extensions": ["dollarmath", "colon_fence"], "myst_dmath_double_inline": True,
    "nb_execution_mode": "off", "html_show_sourcelink": False, "html_copy_source": False,
    "html_static_path": [str(HERE / "site")], "html_css_files": ["book.css"], "templates_path": [], "html_show_copyright": False,
    "mathjax_path": "mathjax/tex-mml-chtml.js", "mathjax3_config": {"tex": {"macros": {}}}, "html_show_sphinx": False,
    # results are not all Python
    "html_favicon": str(HERE / "site" / "icon.svg"), "suppress_warnings": ["misc.highlighting_failure"],
}


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m tinyft.learn.book", description="make the book")
    p.add_argument("--out", type=Path, default=Path("work/site"), help="where the site goes (default: work/site)")
    out, start = p.parse_args(argv).out, time.perf_counter()
    try:
        notebooks = executed(out.parent / "lessons")
    except Failed as e:
        print(f"a lesson does not run, so there is no book: {e}", file=sys.stderr)
        return 1
    files = {f"{n}.ipynb": text for n, text in notebooks.items()} | {f"{n}.md": text for n, text in pages().items()}
    warnings = render(files, out.parent / "book", out)
    print(f"{out / 'index.html'}: {len(files)} pages, {time.perf_counter() - start:.0f} s" + f", {warnings} warnings" * bool(warnings))
    return int(warnings > 0)


if __name__ == "__main__":
    sys.exit(main())

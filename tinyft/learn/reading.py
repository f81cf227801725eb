"""Lessons in the terminal: text folded to the width, code behind a bar, results as they are."""
from __future__ import annotations

import json
import re
import textwrap
import time
from pathlib import Path

from .exercise import near_names
from .folders import Lesson, find_lesson, lessons
from .formulas import to_unicode
from .lessons import Cell, Failed, notebook, paragraphs, parse, run
from .show import Page, width


def read(name: str, out: Path, page: Page) -> bool:
    """Run the lesson of this name (autograd, 01 or 01_autograd), showing text, code and results as they come.

    Its figures, and its notebook if every cell ran, are written to the folder `out`.  True if every cell ran.
    ValueError if there is no such lesson, or no Matplotlib.
    """
    lesson = _lesson(name)
    try:
        for cell in run(lesson.file, out):
            write_cell(cell, page)
    except Failed as e:
        page.line(f"{page.sign('wrong')} {e}")
        return False
    page.line(page.paint(f"with its results, as a notebook:  {out / lesson.folder}.ipynb", "faint"))
    page.line(page.paint(f"without them, to run it yourself:  tinyft lesson {lesson.name} --notebook", "faint"))
    return True


def write_notebook(name: str, folder: Path, page: Page) -> bool:
    """Write folder/NN_name.ipynb, the lesson as a notebook without results, and say how to open it.

    ValueError if there is no such lesson; FileExistsError if the file is there, since it may hold the learner's notes.
    """
    lesson = _lesson(name)
    path = folder / f"{lesson.folder}.ipynb"
    cells = parse(lesson.file.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        file = open(path, "x", encoding="utf-8")
    except FileExistsError:
        raise FileExistsError(f"{path} is there already, and nothing was changed: it may hold notes of yours. "
                              "Rename or delete it to get a new one") from None
    with file:
        json.dump(notebook(cells), file, indent=1, ensure_ascii=False)
    page.line(f"{path}   open it in VS Code, or with Jupyter:  pip install jupyterlab;  jupyter lab {path}")
    return True


def _lesson(name: str) -> Lesson:
    """The lesson of this name. ValueError, with the names that there are, if there is none."""
    lesson = find_lesson(name)
    if lesson is None:
        suggestion = near_names(name, lessons())
        raise ValueError(f"there is no lesson {name!r}{suggestion}; there are {', '.join(lessons()) or 'none here'}")
    return lesson


def run_all(out: Path, page: Page) -> bool:
    """Run every lesson and print one line for each: the seconds and the figures, or the failure.

    Figures and notebooks are written to the folder `out`.  True if every cell of every lesson ran.
    """
    all_ran = True
    for lesson in lessons().values():
        start = time.perf_counter()
        try:
            figures = sum(len(cell.figures) for cell in run(lesson.file, out))
        except Failed as e:
            all_ran = False
            page.line(f"{page.sign('wrong')} {lesson.folder}\n{textwrap.indent(str(e), '    ')}")
            continue
        seconds = time.perf_counter() - start
        noun = "figure " if figures == 1 else "figures"
        page.line(f"{page.sign('right')} {lesson.folder:<20} {seconds:5.1f} s   {figures} {noun}   "
                  f"{out / lesson.folder}.ipynb")
    return all_ran


def write_cell(cell: Cell, page: Page) -> None:
    """Write a cell and its results: text folded, code behind a bar."""
    if cell.kind == "markdown":
        _write_text(cell.source, page)
        return
    if cell.is_check:
        page.line(page.paint(f"  {page.sign('right')} checked", "faint"))
    else:
        bar = "|" if page.plain else "│"
        for line in cell.source.splitlines():
            page.line(page.paint(f"  {bar} {line}", "faint"))
    if cell.is_answer:
        page.wait("Enter shows the result")
    if cell.printed:
        page.line()
        for line in cell.printed.splitlines():
            page.line(line)
    for path, caption in cell.figures:
        page.line(f"\nfigure {path}   {caption}")
    page.line()


def _write_text(markdown: str, page: Page) -> None:
    """Write Markdown paragraph by paragraph, headings in colour.  Tables and blocks of code are not folded."""
    for paragraph in paragraphs(markdown):
        if paragraph[:1] == "|" or paragraph[:3] == "```":
            is_code = paragraph[:3] == "```"
            for row in paragraph.splitlines():
                page.line(row if is_code else plain(row, page))
        else:
            for item in _items(paragraph):
                colour = "arrow" if item[:1] == "#" else ""
                hanging = "  " if re.match(ITEM, item) else ""
                text = " ".join(plain(item, page).lstrip("# ").split())
                for line in textwrap.wrap(text, min(width(), 100), subsequent_indent=hanging):
                    page.line(page.paint(line, colour))
        page.line()


ITEM = r"- |\d+\. "                                       # the mark of a list item
ENTRY = r"\*\*[\w ]+:\*\*"                               # of the header, such as **Reading:**


def _items(paragraph: str) -> list[str]:
    """The items of a list and the entries of a lesson's header, each of which begins a line of its own.

    A line of a sentence may begin with a number or with bold words, too: it begins no item."""
    is_list = re.match(ITEM, paragraph) or re.search(rf":\n({ITEM})", paragraph)
    return re.split(rf"\n(?={ITEM}|{ENTRY})" if is_list else rf"\n(?={ENTRY})", paragraph)


def plain(text: str, page: Page) -> str:
    """A paragraph without Markdown's $, ** and *, its TeX formulas in Unicode.  `Code` stays as it is.

    On a plain page, which cannot show Unicode, TeX's commands become their names.
    """
    def formula(found: re.Match) -> str:
        if page.plain:
            return re.sub(r"[{}]|\\(?=\w)|\\[,; ]", "", found[1])
        return to_unicode(found[1])

    parts = re.split(r"(`[^`]*`)", text)
    for i in range(0, len(parts), 2):                    # between the pieces of code
        parts[i] = re.sub(r"\$\$?(.+?)\$\$?", formula, parts[i], flags=re.S).replace("**", "")
        parts[i] = re.sub(r"(?<![\w*])\*(\w[^*]*)\*(?![\w*])", r"\1", parts[i])            # *italics*
    return "".join(parts)

"""Lessons in the terminal: text folded to the width, code behind a bar, results as they are."""
from __future__ import annotations

import re
import textwrap
import time
from pathlib import Path

from .folders import lessons
from .lessons import Cell, Failed, run
from .show import Page, width


def read(name: str, out: Path, page: Page) -> bool:
    """Run the lesson of this name (autograd, 01 or 01_autograd), showing text, code and results as they come.

    True if every cell ran.
    """
    found = [lesson for lesson in lessons().values() if name in (lesson.name, lesson.folder, lesson.folder[:2])]
    if not found:
        raise ValueError(f"there is no lesson {name!r}; there are {', '.join(lessons()) or 'none here'}")
    try:
        for cell in run(found[0].file, out):
            tell(cell, page)
    except Failed as e:
        page.line(f"{page.sign('wrong')} {e}")
        return False
    page.line(page.paint(f"as a notebook: {out / found[0].folder}.ipynb", "faint"))
    return True


def run_all(out: Path, page: Page) -> bool:
    """Every lesson, one line each.  True if every cell of every lesson ran."""
    right = True
    for lesson in lessons().values():
        start, name = time.perf_counter(), lesson.folder
        try:
            drawn = sum(len(cell.figures) for cell in run(lesson.file, out))
            took = f"{time.perf_counter() - start:5.1f} s   {drawn} figure{' ' if drawn == 1 else 's'}"
            page.line(f"{page.sign('right')} {name:<20} {took}   {out / name}.ipynb")
        except Failed as e:
            right = False
            page.line(f"{page.sign('wrong')} {name}\n{textwrap.indent(str(e), '    ')}")
    return right


def tell(cell: Cell, page: Page) -> None:
    """A cell and its results: text folded, code behind a bar."""
    for line in cell.source.splitlines() if cell.kind == "code" else ():
        page.line(page.paint(f"  {'|' if page.plain else '│'} {line}", "faint"))
    for part in re.split(r"\n\s*\n", re.sub(r"^(#.*)", r"\n\1\n", cell.source, flags=re.M).strip()) if cell.kind == "markdown" else ():
        for row in part.splitlines() if part[:1] in "|`" else re.split(r"\n(?=- |\d+\. |\*\*)", part):
            text = row if part[:3] == "```" else plain(row, page)
            for line in [text] if part[:1] in "|`" else textwrap.wrap(text.lstrip("# "), min(width(), 100)):
                page.line(page.paint(line, "arrow" if row[:1] == "#" else ""))
        page.line()
    for line in ("\n" + cell.printed).splitlines() if cell.printed else ():
        page.line(line)
    for path, caption in cell.figures:
        page.line(f"\nfigure {path}   {caption}")
    if cell.kind == "code":
        page.line()


TEX = "alpha beta gamma epsilon theta lambda mu sigma eta ell partial times cdot sum top le ge approx odot sqrt to dots"
SIGNS = dict(zip(TEX.split(), "αβγεθλμσηℓ∂×·Σᵀ≤≥≈⊙√→…"))


def plain(text: str, page: Page) -> str:
    """A paragraph without Markdown's marks, its mathematics in Unicode as far as a line can hold it.

    `Code` stays as it is.
    """
    def formula(m: re.Match) -> str:
        t = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"(\1)/(\2)", m[1]).replace(r"^\top", r"\top")
        t = re.sub(r"\\([a-zA-Z]+)( ?)", lambda m: m[1] + " " if page.plain else SIGNS.get(m[1], m[1]) + m[2], t)
        return re.sub(r"\\[,; ]", " ", t).replace("{", "").replace("}", "").strip()
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"\$\$?(.+?)\$\$?", formula, p, flags=re.S).replace("**", "") for p in parts[::2]]
    return "".join(parts)

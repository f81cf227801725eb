"""A lesson in the terminal: its text folded to the width, its code behind a bar, its results as they are."""
from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING

from .show import Page, width

if TYPE_CHECKING:
    from .lessons import Cell


def tell(cell: Cell, page: Page) -> None:
    "A cell and its results: text folded, code behind a bar."
    for line in cell.source.splitlines() if cell.kind == "code" else ():
        page.line(page.paint(f"  {'|' if page.plain else '│'} {line}", "faint"))
    for part in re.split(r"\n\s*\n", re.sub(r"^(#.*)", r"\1\n", cell.source, flags=re.M)) if cell.kind == "markdown" else ():
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


GREEK = dict(zip("alpha beta gamma epsilon theta lambda mu sigma eta ell partial times cdot sum top le ge approx odot sqrt to dots".split(), "αβγεθλμσηℓ∂×·Σᵀ≤≥≈⊙√→…"))


def plain(text: str, page: Page) -> str:
    "A paragraph without Markdown's marks, its mathematics in Unicode as far as a line can hold it.  `Code` stays as it is."
    def formula(m: re.Match) -> str:
        t = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"(\1)/(\2)", m[1]).replace(r"^\top", r"\top")
        t = re.sub(r"\\([a-zA-Z]+)( ?)", lambda m: m[1] + " " if page.plain else GREEK.get(m[1], m[1]) + m[2], t)
        return re.sub(r"\\[,; ]", " ", t).replace("{", "").replace("}", "").strip()
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"\$\$?(.+?)\$\$?", formula, p, flags=re.S).replace("**", "") for p in parts[::2]]
    return "".join(parts)

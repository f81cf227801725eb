"""The runner of the lessons: each lessons/NN_name/lesson.py, in percent format, with its output and figures.

    tinyft lesson autograd        one lesson, read in the terminal
    tinyft lesson --all           every lesson: NN_name.ipynb with its results, NN_name-1.svg, ...      (make lessons)

A cell begins with `# %%`; after `# %% [markdown]` it is text, written as comments.  A cell `# %% [check]` holds
assertions: the book folds it, and the terminal shows one line.  A text cell with "**Predict first" asks a question that
the output of the next code cell answers: the book folds that output, and the terminal waits before it.

So a lesson is also a script, and
opens as a notebook in VS Code and with Jupytext.  In a lesson, `quote` prints the library's own source; draw.py draws.
"""
from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .loading import in_words

__all__ = ["quote", "show", "parse", "run", "notebook", "Cell", "Failed"]


# ── for use in a lesson ──────────────────────────────────────────────────────────────────────────────────────────────
def quote(thing: Any) -> None:
    """Print the library's own source of a function, an op, a method or a class.  ValueError if it is not the library's.

    An op is printed as its definition: the function of arrays that @op turned into a function of tensors. The decorator
    of public functions, which checks keywords, is left out.
    """
    thing = inspect.unwrap(getattr(thing, "definition", thing))
    module = getattr(thing, "__module__", "")
    if not module.startswith("tinyft."):
        origin = f"from {module}" if module else "not"
        raise ValueError(f"quote wants something of the library; {thing!r} is {origin}")
    source = textwrap.dedent(inspect.getsource(thing)).rstrip().removeprefix("@checked_keywords\n")
    print(f"# {module.replace('.', '/')}.py: {thing.__qualname__}\n{source}")


def show(caption: str = "") -> None:
    """Show Matplotlib's open figures: in Jupyter under the cell, else saved as NN_name-1.svg, ... and closed.

    `run` chooses their folder.  A lesson that is run as a script writes them to work/figures.
    """
    global _album
    if _album is None:                                   # the lesson is not run by `run`
        if "ipykernel" in sys.modules:
            sys.modules["matplotlib.pyplot"].show()
            return
        script = Path(getattr(sys.modules["__main__"], "__file__", "script/lesson.py")).resolve()
        _album = Album(script.parent.name, Path("work/figures"), announce=True)
    _album.take(caption)


class Album:
    """The figures of a lesson, saved as folder/name-1.svg, ...

    announce: print the path of each.  recent: (path, caption) of the figures since the last cell.
    """

    def __init__(self, name: str, folder: Path, announce: bool = False):
        self.name = name
        self.folder = folder
        self.announce = announce
        self.count = 0
        self.recent: list[tuple[Path, str]] = []

    def take(self, caption: str = "") -> None:
        """Save and close Matplotlib's open figures, and add them to `recent` with this caption."""
        plt = sys.modules.get("matplotlib.pyplot")       # nothing is drawn if it was not imported
        for number in plt.get_fignums() if plt else ():
            self.count += 1                              # the figures of a lesson are numbered from 1
            path = self.folder / f"{self.name}-{self.count}.svg"
            self.folder.mkdir(parents=True, exist_ok=True)
            plt.figure(number).savefig(path, metadata={"Date": None})    # the same picture is the same file
            plt.close(number)
            self.recent.append((path, caption))
            if self.announce:
                print(f"figure: {path}  {caption}".rstrip())


_album: Album | None = None                              # of the lesson that is running


KINDS = {"markdown": "markdown", "md": "markdown", "check": "check"}      # word after # %% -> kind of cell
QUESTION = "**Predict first"


# ── parsing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclasses.dataclass
class Cell:
    """A cell and its results.

    kind: code or markdown (then source has no #).  line: its first in the file.  number: among code cells, from 1.
    is_check: True for a code cell of assertions.  is_answer: True if the cell before asks what this one prints.
    figures: (file, caption).
    """
    kind: str
    source: str
    line: int
    number: int = 0
    is_check: bool = False
    is_answer: bool = False
    printed: str | None = None                           # None: the cell was not run
    figures: list[tuple[Path, str]] = dataclasses.field(default_factory=list)


class Failed(Exception):
    """A cell did not run; the message has the place and the reason."""


def parse(text: str) -> list[Cell]:
    """The cells of a file in percent format, without empty ones.

    A line `# %%` begins a code cell, `# %% [check]` one of assertions, `# %% [markdown]` a text cell, whose lines are
    comments.  ValueError if a text cell holds a line that is not a comment, and for another word in brackets.
    """
    found: list[Cell] = []
    code_cells = 0
    lines = text.splitlines()
    kind = "code"
    start = 1                                            # the first line of the cell
    for n, line in enumerate([*lines, "# %%"], start=1):                 # the added mark ends the last cell
        if not re.match(r"# ?%%(\s|$)", line):
            continue
        while start < n and not lines[start - 1].strip():
            start += 1
        body = "\n".join(lines[start - 1:n - 1]).rstrip()
        if kind == "markdown":
            body = _without_marks(body, start)
        if body and kind == "markdown":
            found.append(Cell(kind, body, start))
        elif body:
            code_cells += 1
            is_answer = bool(found) and QUESTION in found[-1].source
            found.append(Cell("code", body, start, code_cells, is_check=kind == "check", is_answer=is_answer))
        kind = _kind(line, n)
        start = n + 1
    return found


def _kind(line: str, n: int) -> str:
    """The kind of the cell that the line `# %%` of number n begins: "markdown", "check" or "code"."""
    word = re.search(r"\[(\w+)\]", line)
    if word is None:
        return "code"
    if word[1] not in KINDS:
        raise ValueError(f"line {n}: a cell wants one of the kinds {', '.join(KINDS)}, got [{word[1]}]")
    return KINDS[word[1]]


def paragraphs(markdown: str) -> list[str]:
    """The paragraphs of a text cell; a heading is one of its own, also without an empty line around it."""
    headings_apart = re.sub(r"^(#.*)", r"\n\1\n", markdown, flags=re.M).strip()
    return re.split(r"\n\s*\n", headings_apart)


def _without_marks(body: str, start: int) -> str:
    """A text cell without the # of its lines.  start: the number of its first line, for ValueError's message."""
    for n, line in enumerate(body.splitlines(), start):
        if line.strip() and not line.startswith("#"):
            raise ValueError(f"line {n}: a text cell is written in comments; code wants a `# %%` before it")
    return re.sub(r"^# ?", "", body, flags=re.M)


# ── running ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def run(path: Path, out: Path) -> Iterator[Cell]:
    """Run the lesson.py at `path` and yield each cell as soon as it is done, text cells too.

    Figures are written to out/NN_name-K.svg; those of an earlier run are deleted.  The notebook, out/NN_name.ipynb, is
    written at the end.  A cell that fails is yielded too; then Failed is raised with line and reason, and no notebook
    is written.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("lessons draw with Matplotlib, which is not installed: "
                         'pip install "tinyft[lessons]"') from None
    matplotlib.use("Agg")
    name = path.parent.name
    for old in out.glob(f"{name}-*.svg"):
        old.unlink()
    album = Album(name, out)
    variables = {"__name__": "__main__", "__file__": str(path)}
    done = []
    for cell in parse(path.read_text(encoding="utf-8")):
        failure = _run_cell(cell, path, album, variables) if cell.kind == "code" else None
        done.append(cell)
        yield cell
        if failure:
            raise failure
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(notebook(done), indent=1, ensure_ascii=False)
    (out / f"{name}.ipynb").write_text(text, encoding="utf-8")


def _run_cell(cell: Cell, path: Path, album: Album, variables: dict[str, Any]) -> Failed | None:
    """Run one code cell, and store its output and figures in it.  Failed, returned, if it raises; else None.

    variables: the global names of the lesson, which its cells share.  `show` in the cell draws into `album`.
    """
    global _album
    outer = _album
    _album = album
    printed = io.StringIO()
    failure = None
    try:
        with contextlib.redirect_stdout(printed):
            # The empty lines in front make line numbers those of the file.
            code = compile("\n" * (cell.line - 1) + cell.source, str(path), "exec", dont_inherit=True)
            exec(code, variables)
            album.take()                                 # the figures that the cell drew without `show`
    except (Exception, SystemExit) as e:
        failure = Failed(_explain(e, path, cell))
    finally:
        _album = outer
    cell.printed = printed.getvalue()
    cell.figures = album.recent
    album.recent = []
    return failure


def _explain(e: BaseException, path: Path, cell: Cell) -> str:
    """The line of the lesson that failed and the reason; also the line in the library, if it was raised there.

    path: the lesson's file.  cell: the code cell that raised e.
    """
    frames = traceback.extract_tb(e.__traceback__)       # the innermost call is last
    in_lesson = [f.lineno for f in frames if f.filename == str(path)]
    if isinstance(e, SyntaxError):                       # the cell did not compile, so it has no frame
        line = e.lineno
    else:
        line = in_lesson[-1] if in_lesson else cell.line
    text = path.read_text(encoding="utf-8").splitlines()[line - 1].strip() if line else ""
    inside = ""
    if in_lesson and frames[-1].filename != str(path):
        inside = f"   ({frames[-1].filename}, line {frames[-1].lineno})"
    return f"{path}, line {line}, code cell {cell.number}:\n    {text}\n{in_words(e)}{inside}"


def notebook(cells: list[Cell]) -> dict:
    """The cells with their results as a Jupyter notebook (format 4.4), with the figures inside.

    Its metadata `short` is True if the lesson ran short (TINYFT_FAST): book.py then does not reuse it for a full run.
    """
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    short = bool(os.environ.get("TINYFT_FAST"))
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}, "short": short}
    return {"nbformat": 4, "nbformat_minor": 4, "cells": [_notebook_cell(cell) for cell in cells], "metadata": metadata}


def _notebook_cell(cell: Cell) -> dict[str, Any]:
    """The cell as nbformat 4 stores it, with its printed text and its figures as outputs."""
    made: dict[str, Any] = {"cell_type": cell.kind, "metadata": {}, "source": cell.source}
    if cell.kind != "code":
        return made
    if cell.is_check:
        made["metadata"] = {"tags": ["check"], "jupyter": {"source_hidden": True}}
    elif cell.is_answer:
        made["metadata"] = {"tags": ["answer"]}
    outputs: list[dict] = []
    if cell.printed:
        outputs.append({"output_type": "stream", "name": "stdout", "text": cell.printed})
    for path, caption in cell.figures:
        data = {"image/svg+xml": path.read_text(encoding="utf-8"), "text/plain": caption or path.name}
        outputs.append({"output_type": "display_data", "metadata": {}, "data": data})
    was_run = cell.printed is not None
    return made | {"execution_count": cell.number if was_run else None, "outputs": outputs}

"""The lessons: lessons/NN_name/lesson.py in percent format, run in this process, with what they print and draw.

    tinyft lesson autograd        one lesson, read in the terminal
    tinyft lesson --all           every lesson: NN_name.ipynb with its results, NN_name-1.png, ...      (make lessons)

A cell begins with `# %%`; after `# %% [markdown]` it is text, written as comments.  So a lesson is a script as well, and opens as a
notebook in VS Code and with Jupytext.  In a lesson: `quote` prints the library's own source, `figure` and `show` draw.
"""
from __future__ import annotations

import base64
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

__all__ = ["quote", "figure", "show", "parse", "run", "notebook", "Cell", "Failed"]


# ── for use in a lesson ──────────────────────────────────────────────────────────────────────────────────────────────
def quote(thing: Any) -> None:
    """Print the library's own source of a function, an op, a method or a class.

    ValueError if it is not the library's.
    """
    thing = inspect.unwrap(getattr(thing, "definition", thing))
    module = getattr(thing, "__module__", "")
    if not module.startswith("tinyft."):
        raise ValueError(f"quote wants something of the library; {thing!r} is {'from ' + module if module else 'not'}")
    print(f"# {module.replace('.', '/')}.py: {thing.__qualname__}\n{textwrap.dedent(inspect.getsource(thing)).rstrip()}")


STYLE = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "axes.titlesize": 10, "lines.linewidth": 1.8}


def figure(columns: int = 1, height: float = 2.8) -> tuple[Any, Any]:
    """(figure, axes): as wide as the page, 640 pixels; height in hundreds of pixels.

    With several columns, an array of axes.
    """
    import matplotlib.pyplot as plt
    plt.rcParams.update(STYLE)
    return plt.subplots(1, columns, figsize=(6.4, height), layout="constrained")


def show(caption: str = "") -> None:
    """Show what was drawn, under a cell of a notebook or in a file, NN_name-1.png, ...; a lesson run as a script writes
    to work/figures.
    """
    global _album
    if _album is None:
        if "ipykernel" in sys.modules:
            sys.modules["matplotlib.pyplot"].show()
            return
        _album = Album(Path(getattr(sys.modules["__main__"], "__file__", "script/lesson.py")).resolve().parent.name, Path("work/figures"), aloud=True)
    _album.take(caption)


class Album:
    """The figures of a lesson on their way to folder/name-1.png, ..."""

    def __init__(self, name: str, folder: Path, aloud: bool = False):
        # fresh: since the last cell
        self.name, self.folder, self.aloud, self.count, self.fresh = name, folder, aloud, 0, []

    def take(self, caption: str = "") -> None:
        """Save and close the figures that are open."""
        plt = sys.modules.get("matplotlib.pyplot")  # nobody has drawn if it was not imported
        for number in plt.get_fignums() if plt else ():
            self.count += 1
            path = self.folder / f"{self.name}-{self.count}.png"
            self.folder.mkdir(parents=True, exist_ok=True)
            plt.figure(number).savefig(path, dpi=200, metadata={"Software": None})
            plt.close(number)
            self.fresh.append((path, caption))
            if self.aloud:
                print(f"figure: {path}  {caption}".rstrip())


_album: Album | None = None  # of the lesson that runs


# ── parsing ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclasses.dataclass
class Cell:
    """A cell and what it gave.

    kind: code or markdown (source without #). line: its first in the file. number: among code cells, from 1.
    """
    kind: str
    source: str
    line: int
    number: int = 0
    printed: str = ""
    figures: list[tuple[Path, str]] = dataclasses.field(default_factory=list)    # (file, caption)


class Failed(Exception):
    """A cell did not run; the message has the place and the reason."""


def parse(text: str) -> list[Cell]:
    """The cells of a file in percent format.

    Empty ones are left out; ValueError where a text cell holds something else than comments.
    """
    found: list[Cell] = []
    kind, start, lines = "code", 1, text.splitlines()
    for n, line in enumerate([*lines, "# %%"], 1):
        if re.match(r"# ?%%(\s|$)", line):
            while start < n and not lines[start - 1].strip():
                start += 1
            body = "\n".join(lines[start - 1:n - 1]).rstrip()
            if kind == "markdown":
                if bad := [start + i for i, row in enumerate(body.splitlines()) if row.strip() and row[0] != "#"]:
                    raise ValueError(f"line {bad[0]}: a text cell is written in comments; code wants a `# %%` before it")
                body = re.sub(r"^# ?", "", body, flags=re.M)
            if body:
                found.append(Cell(kind, body, start, 1 + sum(c.kind == "code" for c in found) if kind == "code" else 0))
            kind, start = "markdown" if re.search(r"\[(markdown|md)\]", line) else "code", n + 1
    return found


# ── running ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def run(path: Path, out: Path) -> Iterator[Cell]:
    """Run a lesson, giving each cell as soon as it is done; figures go to out/NN_name-K.png, at the end the notebook
    beside them.

    Where a cell fails it is given, and Failed raised with line and reason; no notebook is written then.
    """
    global _album
    try:
        import matplotlib
    except ImportError:
        raise ValueError('lessons draw with Matplotlib, which is not installed: pip install "tinyft[lessons]"') from None
    matplotlib.use("Agg")
    for old in out.glob(f"{path.parent.name}-*.png"):
        old.unlink()
    album, names, done = Album(path.parent.name, out), {"__name__": "__main__", "__file__": str(path)}, []
    for cell in parse(path.read_text(encoding="utf-8")):
        failed, printed = None, io.StringIO()
        if cell.kind == "code":
            kept, _album = _album, album
            try:
                # the empty lines in front make line numbers those of the file
                with contextlib.redirect_stdout(printed):
                    exec(compile("\n" * (cell.line - 1) + cell.source, str(path), "exec", dont_inherit=True), names)
                    album.take()
            except (Exception, SystemExit) as e:
                failed = Failed(_place(e, path, cell))
            finally:
                _album = kept
            cell.printed, cell.figures, album.fresh = printed.getvalue(), album.fresh, []
        done.append(cell)
        yield cell
        if failed:
            raise failed
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{path.parent.name}.ipynb").write_text(json.dumps(notebook(done), indent=1, ensure_ascii=False), encoding="utf-8")


def _place(e: BaseException, path: Path, cell: Cell) -> str:
    """Which line of the lesson failed, and why; and where in the library, if it was raised there."""
    frames = traceback.extract_tb(e.__traceback__)
    mine = [f.lineno for f in frames if f.filename == str(path)]
    line = e.lineno if isinstance(e, SyntaxError) else mine[-1] if mine else cell.line
    text = (path.read_text(encoding="utf-8").splitlines()[line - 1] if line else "").strip()
    inside = f"   ({frames[-1].filename}, line {frames[-1].lineno})" if mine and frames[-1].filename != str(path) else ""
    why = f"{type(e).__name__}{f': {e}' if str(e) else ''}"
    return f"{path}, line {line}, code cell {cell.number}:\n    {text}\n{why}{inside}"


def notebook(cells: list[Cell]) -> dict:
    """The cells with their results as a notebook, format 4.4; figures are inside."""
    made = []
    for cell in cells:
        one: dict[str, Any] = {"cell_type": cell.kind, "metadata": {}, "source": cell.source}
        if cell.kind == "code":
            outputs: list[dict] = [{"output_type": "stream", "name": "stdout", "text": cell.printed}] if cell.printed else []
            outputs += [{"output_type": "display_data", "metadata": {}, "data": {
                "image/png": base64.b64encode(path.read_bytes()).decode(), "text/plain": caption or path.name}} for path, caption in cell.figures]
            one |= {"execution_count": cell.number, "outputs": outputs}
        made.append(one)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"nbformat": 4, "nbformat_minor": 4, "cells": made,
            "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}, "short": bool(os.environ.get("TINYFT_FAST"))}}

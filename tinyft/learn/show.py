"""The text that the learner sees: the law, the smallest input that fails, both results, a diagnosis, the next command.

Plain on a terminal without colour (NO_COLOR) or without Unicode, and folded where it is narrow.
"""
from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import Any

import numpy as np

from .. import array
from ..tensor import Tensor
from .diagnose import Mismatch
from .exercise import Exercise, Named


@dataclasses.dataclass
class Problem:
    """The reason why a law does not hold, in words, so that one process can send it to another.

    kind: mismatch (then yours, expected and diagnosis are set), raised, returned, stopped, refused or unwritten.
    inputs: (name, text).  printed: lines that the function printed for this input.  tried: number of inputs tried.
    size: the largest size that was needed to find it.
    """
    kind: str
    inputs: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    message: str = ""
    yours: str = ""
    expected: str = ""
    diagnosis: str = ""
    printed: list[str] = dataclasses.field(default_factory=list)
    tried: int = 0
    size: int = 0


@dataclasses.dataclass
class Outcome:
    """The result of one law.  title: the law in words.  problem: None if it holds.

    printed: lines that the function printed for the last input, if the law holds.
    """
    title: str
    problem: Problem | None = None
    seconds: float = 0.0
    printed: list[str] = dataclasses.field(default_factory=list)


# ── arrays as text ───────────────────────────────────────────────────────────────────────────────────────────────────
def width() -> int:
    """The columns of the terminal, at least 40."""
    return max(shutil.get_terminal_size((100, 24)).columns, 40)


def as_text(a: Any, with_shape: bool = False) -> str:
    """A value as text: an array in one line if it fits the terminal, else in several."""
    if isinstance(a, Tensor):
        a = a.data
    if not array.is_array(a):
        return f"{a:.6g}" if isinstance(a, float) else repr(a)
    a = array.asnumpy(a)
    room = width() - 18                                  # columns left beside the name of the value
    text = np.array2string(a, precision=5, suppress_small=True, threshold=80, edgeitems=3, max_line_width=max(room, 20))
    flat = " ".join(text.split()).replace("[ ", "[").replace(" ]", "]")
    text = flat if len(flat) <= room else text.replace("\n\n", "\n")
    return f"{text}   shape {a.shape}" if with_shape else text


def inputs_as_text(inputs: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of each input, and of each part of a Named."""
    rows = []
    for name, a in inputs.items():
        parts = dict(zip(a.names, a)) if isinstance(a, Named) else {name: a}
        rows += [(part, as_text(value)) for part, value in parts.items()]
    return rows


def pair_as_text(e: Mismatch) -> tuple[str, str]:
    """The result and the expected one as text, with their shapes, and with their dtypes where these differ.

    Two dtypes of one kind and one size count as the same, whatever their byte order.
    """
    texts = [as_text(a, with_shape=True) for a in (e.got, e.want)]
    same_kind = e.got.dtype.kind == e.want.dtype.kind
    same_size = e.got.dtype.itemsize == e.want.dtype.itemsize
    if not (same_kind and same_size):
        texts = [f"{text}, {a.dtype}" for text, a in zip(texts, (e.got, e.want))]
    return texts[0], texts[1]


def visible(text: str) -> str:
    """The learner's text with its control characters written out: they could move the cursor or change the colours."""
    return "".join(c if c.isprintable() or c in "\t\n" else c.encode("unicode_escape").decode() for c in text)


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# name: (in Unicode, in ASCII)
SIGNS = {"right": ("✓", "ok"), "wrong": ("✕", "x"), "todo": ("·", "-"), "arrow": ("→", "->"), "full": ("★", "*"),
         "empty": ("☆", "."), "x": ("×", "x")}
ASCII = {"ᵀ": "^T", "ˣ": "^x", "²": "^2", "³": "^3", "ᵗ": "^t", "ᵢ": "_i", "ⱼ": "_j", "⁷": "^7", "⁰": "0", "√": "sqrt",
         "Σ": "sum", "π": "pi", "σ": "sigma", "μ": "mu", "ε": "eps", "η": "lr", "ĝ": "g^", "x̂": "x^", "m̂": "m^",
         "v̂": "v^", "−": "-", "·": "*", "≤": "<=", "×": "x", "ℓ": "l"}
COLOURS = {"right": "32", "wrong": "31", "todo": "33", "arrow": "36", "faint": "2"}


class Page:
    """Writes to standard output, or another stream, with the characters and colours that it can show."""

    def __init__(self, out: Any = None):
        self.out = out or sys.stdout
        self.plain = not self._can_show("✓✕→★☆·×")
        is_terminal = getattr(self.out, "isatty", lambda: False)()
        self.colour = is_terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM", "") != "dumb"

    def _can_show(self, text: str) -> bool:
        """True if the encoding of the stream has all characters of the text."""
        try:
            text.encode(getattr(self.out, "encoding", None) or "utf-8")
        except (UnicodeEncodeError, LookupError):
            return False
        return True

    def sign(self, name: str) -> str:
        """One of SIGNS, in its colour."""
        return self.paint(SIGNS[name][self.plain], name)

    def paint(self, text: str, colour: str) -> str:
        """The text in one of COLOURS; any other name leaves it as it is."""
        return f"\033[{COLOURS[colour]}m{text}\033[0m" if self.colour and colour in COLOURS else text

    def line(self, text: str = "") -> None:
        """Write one line.  Characters that the stream cannot show are written in ASCII."""
        if not self._can_show(text):
            for sign, plain in ASCII.items():
                if not self._can_show(sign):
                    text = text.replace(sign, plain)
            encoding = getattr(self.out, "encoding", None) or "utf-8"
            text = text.encode(encoding, "replace").decode(encoding)
        print(text, file=self.out, flush=True)

    def wait(self, text: str) -> None:
        """Write a line and wait for Enter. Nothing happens unless a person reads: input and output are terminals."""
        is_terminal = getattr(self.out, "isatty", lambda: False)()
        if is_terminal and sys.stdin is not None and sys.stdin.isatty():
            print(self.paint(f"  {text} ", "arrow"), end="", file=self.out, flush=True)
            with contextlib.suppress(EOFError):          # Ctrl-D goes on, too
                input()

    def block(self, text: str, indent: int = 4, first: str = "") -> None:
        """Write a text, folded and indented by `indent` columns.

        first   the beginning of the first line, in place of the indent; folded lines then stand below the text after
                an arrow and a space"""
        hanging = len(SIGNS["arrow"][self.plain]) + 1 if first else 0
        lead = first or " " * indent
        for line in text.splitlines() or [""]:
            columns = max(width() - indent - 2, 20)
            for piece in textwrap.wrap(line, columns, subsequent_indent=" " * hanging) or [""]:
                self.line(lead + piece)
                lead = " " * indent

    def named(self, name: str, text: str, pad: int) -> None:
        """Write name = text, the name filled up to `pad` columns, and all lines of an array below its first."""
        lead = f"      {name:<{pad}} = "
        self.line(lead + text.replace("\n", "\n" + " " * len(lead)))

    def stars(self, n: int) -> str:
        """Five stars, n of them full."""
        return SIGNS["full"][self.plain] * n + SIGNS["empty"][self.plain] * (5 - n)

    def report(self, exercise: Exercise, outcomes: Iterable[Outcome]) -> bool:
        """Print one line for each law that holds, then the problem of the first that does not.  True if all hold.

        Then also the lines that the function printed for the last input: a learner who prints wants to see them.
        """
        printed: list[str] = []
        for outcome in outcomes:
            if outcome.problem:
                self.problem(exercise, outcome.title, outcome.problem)
                return False
            seconds = self.paint(f"({outcome.seconds:.1f}s)", "faint")
            self.line(f"  {self.sign('right')} {outcome.title}  {seconds}")
            printed = outcome.printed or printed
        self._printed(printed)
        return True

    def problem(self, exercise: Exercise, title: str, p: Problem) -> None:
        """Write why the law `title` does not hold; "": why the exercise cannot be checked."""
        if p.kind == "unwritten":
            self.line(f"  {self.sign('todo')} not written yet")
            return
        if title:
            self.line(f"  {self.sign('wrong')} {title}")
        if p.inputs:
            self._inputs(p)
        if p.kind == "mismatch":
            self.line(f"    {p.message}:")
            self.named("yours", p.yours, 8)
            self.named("expected", p.expected, 8)
            # With `first`, folded lines stand below the text after the arrow.
            self.block(f"{SIGNS['arrow'][self.plain]} {p.diagnosis}", 4, first=" " * 4)
        else:
            self.line()
            self.block(visible(p.message), 4, first="" if title else f"  {self.sign('wrong')} ")
        self._printed(p.printed)
        if p.kind != "refused":
            self.line(f"\n    Stuck?  tinyft hint {exercise.name}")

    def _printed(self, lines: list[str]) -> None:
        """Write what the learner's function printed, if it did."""
        if lines:
            self.line("\n    Your function printed:")
        for text in lines:
            self.line(f"      {visible(text)[:max(width() - 6, 20)]}")

    def _inputs(self, p: Problem) -> None:
        """Write the inputs of a problem under a line that says if they are the smallest that fail.

        A check that was stopped for its time (kind "stopped") did not search for smaller ones.
        """
        if p.kind == "stopped":
            self.line("\n    With this input:")
        else:
            self.line(f"\n    The smallest input that fails (of {p.tried} tried):")
        pad = max(len(name) for name, _ in p.inputs)
        for name, text in p.inputs:
            self.named(name, text, pad)

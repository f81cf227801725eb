"""What the learner sees: the law in words, the smallest input that fails, yours above the expected, what it may be, and what to do next.

Plain on a terminal without colour (NO_COLOR) or without Unicode, and folded where it is narrow.
"""
from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import array
from ..tensor import Tensor
from .exercise import Exercise

if TYPE_CHECKING:
    from .diagnose import Mismatch


@dataclasses.dataclass
class Problem:
    """Why a law does not hold, in words, so that it can be sent from the process that found it.

    kind: mismatch (yours, expected, diagnosis), raised, returned, stopped, refused or unwritten.  inputs: (name, text).  printed: what the
    function printed for this input.  size: the largest size that was needed to find it."""
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
    "How a law went.  problem: None if it holds."
    title: str
    problem: Problem | None = None
    seconds: float = 0.0


# ── arrays in words ──────────────────────────────────────────────────────────────────────────────────────────────────
def width() -> int:
    return max(shutil.get_terminal_size((100, 24)).columns, 40)


def said(a: Any, shape: bool = False) -> str:
    "A value as text: small arrays in one line, larger ones in several."
    if isinstance(a, Tensor):
        a = a.data
    if not array.is_array(a):
        return f"{a:.6g}" if isinstance(a, float) else repr(a)
    a = array.asnumpy(a)
    text = np.array2string(a, precision=5, suppress_small=True, threshold=80, edgeitems=3, max_line_width=max(width() - 18, 20))
    flat = " ".join(text.split()).replace("[ ", "[").replace(" ]", "]")
    text = flat if len(flat) <= width() - 18 else text.replace("\n\n", "\n")
    return text + (f"   shape {a.shape}" if shape else "")


def said_inputs(inputs: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, said(a)) for name, a in inputs.items()]


def said_pair(e: Mismatch) -> tuple[str, str]:
    "Yours and the expected, with the shapes, and with the dtypes where they differ in kind."
    kinds = e.got.dtype != e.want.dtype and (e.got.dtype.kind != e.want.dtype.kind or e.got.dtype.itemsize != e.want.dtype.itemsize)
    return tuple(said(a, True) + (f", {a.dtype}" if kinds else "") for a in (e.got, e.want))


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────
SIGNS = {"right": ("✓", "ok"), "wrong": ("✕", "x"), "todo": ("·", "-"), "arrow": ("→", "->"), "full": ("★", "*"), "empty": ("☆", "."),
         "x": ("×", "x")}
ASCII = {"ᵀ": "^T", "ˣ": "^x", "²": "^2", "³": "^3", "ᵗ": "^t", "ᵢ": "_i", "ⱼ": "_j", "⁷": "^7", "⁰": "0", "√": "sqrt", "Σ": "sum", "π": "pi",
         "σ": "sigma", "μ": "mu", "ε": "eps", "η": "lr", "ĝ": "g^", "x̂": "x^", "m̂": "m^", "v̂": "v^", "−": "-", "·": "*", "≤": "<=",
         "×": "x", "ℓ": "l"}
COLOURS = {"right": "32", "wrong": "31", "todo": "33", "arrow": "36", "faint": "2"}


class Page:
    "Writes to standard output (or what is given), as well as that can show it."

    def __init__(self, out: Any = None):
        self.out = out or sys.stdout
        self.plain = not self._can("✓✕→★☆·×")
        term = os.environ.get("TERM", "")
        self.colour = "NO_COLOR" not in os.environ and term != "dumb" and getattr(self.out, "isatty", lambda: False)()

    def _can(self, text: str) -> bool:
        try:
            text.encode(getattr(self.out, "encoding", None) or "utf-8")
        except (UnicodeEncodeError, LookupError):
            return False
        return True

    def sign(self, name: str) -> str:
        return self.paint(SIGNS[name][self.plain], name)

    def paint(self, text: str, colour: str) -> str:
        return f"\033[{COLOURS[colour]}m{text}\033[0m" if self.colour and colour in COLOURS else text

    def line(self, text: str = "") -> None:
        "One line; what the terminal has no character for is written in ASCII."
        if not self._can(text):
            for sign, plain in ASCII.items():
                text = text if self._can(sign) else text.replace(sign, plain)
            text = text.encode(self.out.encoding, "replace").decode(self.out.encoding)
        print(text, file=self.out, flush=True)

    def block(self, text: str, indent: int = 4, first: str = "") -> None:
        "A paragraph, folded, every line indented."
        for i, line in enumerate(text.splitlines() or [""]):
            lead = first if i == 0 and first else " " * indent
            bare = SIGNS["arrow"][self.plain] + " " if first else ""
            for piece in textwrap.wrap(line, max(width() - indent - 2, 20), subsequent_indent=" " * (len(bare) * bool(first))) or [""]:
                self.line(lead + piece)
                lead = " " * indent

    def named(self, name: str, text: str, pad: int) -> None:
        "name = text, the lines of an array below each other."
        lead = f"      {name:<{pad}} = "
        self.line(lead + text.replace("\n", "\n" + " " * len(lead)))

    def stars(self, n: int) -> str:
        return SIGNS["full"][self.plain] * n + SIGNS["empty"][self.plain] * (5 - n)

    def report(self, exercise: Exercise, outcomes: Iterable[Outcome]) -> bool:
        "One line for each law that holds, all about the first that does not.  True if all hold."
        for outcome in outcomes:
            if outcome.problem is None:
                self.line(f"  {self.sign('right')} {outcome.title}  {self.paint(f'({outcome.seconds:.1f}s)', 'faint')}")
            else:
                self.problem(exercise, outcome.title, outcome.problem)
                return False
        return True

    def problem(self, exercise: Exercise, title: str, p: Problem) -> None:
        if p.kind == "unwritten":
            self.line(f"  {self.sign('todo')} not written yet")
            return
        if title:
            self.line(f"  {self.sign('wrong')} {title}")
        if p.inputs:
            self.line(f"\n    The smallest input that fails (of {p.tried} tried):" if p.kind != "stopped" else "\n    With this input:")
            pad = max(len(name) for name, _ in p.inputs)
            for name, text in p.inputs:
                self.named(name, text, pad)
        if p.kind == "mismatch":
            self.line(f"    {p.message}:")
            self.named("yours", p.yours, 8)
            self.named("expected", p.expected, 8)
            self.block(f"{SIGNS['arrow'][self.plain]} {p.diagnosis}", 4, " " * 4)
        else:
            self.line()
            self.block(p.message, 4) if title else self.block(p.message, 4, f"  {self.sign('wrong')} ")
        if p.printed:
            self.line("\n    Your function printed:")
            for text in p.printed:
                self.line(f"      {text[:max(width() - 6, 20)]}")
        if p.kind != "refused":
            self.line(f"\n    Stuck?  tinyft hint {exercise.name}")

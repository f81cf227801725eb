"""Annotated source: a module as a page of prose beside code.  The prose is the module's own docstrings and comments.

`blocks` cuts the text of a module; `page` writes it as Markdown (MyST) for Sphinx.  Both read the source each time, so
the page cannot drift from it.
"""
from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import itertools
import re
import textwrap
import tokenize
from collections.abc import Mapping
from types import MappingProxyType

from ..kernels.cuda.cpu_kernel import BOUNDS
from .sources import first_line

WIDE = 88                                                # columns of code beside the prose; longer lines scroll
NO_NOTES: Mapping[str, str] = MappingProxyType({})


@dataclasses.dataclass
class Block:
    """A piece of code and the prose beside it.

    name: of the function or class that begins here.  heading: of the part of the file that begins here.
    """
    name: str = ""
    prose: str = ""
    code: str = ""
    heading: str = ""


def blocks(text: str) -> list[Block]:
    """A module's text, cut where a class or function begins and where a comment stands on lines of its own.

    Every line of code is in one block, in order.  A comment after code stays there, or above it where the line would be
    too long.
    """
    return _Cutter(text).cut()


class _Cutter:
    """The state of `blocks`.

    starts: {first line of a definition: its name}.  documented: the lines of `starts` at which a block begins always;
    at the others, methods without a docstring, one begins only after a documented method, so that they stay together.
    docstrings: {first line: (last line, text)}.  comments: {line: column}.
    """

    def __init__(self, text: str):
        self.lines = text.splitlines()
        self.starts: dict[int, str] = {}
        self.documented: set[int] = set()
        tree = ast.parse(text)
        self.docstrings = _docstring(tree)
        self._add_definitions(tree, "")
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                self._add_definitions(node, f"{node.name}.")
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        self.comments = {t.start[0]: t.start[1] for t in tokens if t.type == tokenize.COMMENT}
        self.found = [Block()]

    def _add_definitions(self, holder: ast.Module | ast.ClassDef, prefix: str) -> None:
        for node in holder.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                line = first_line(node)
                self.starts[line] = prefix + node.name
                if not prefix or ast.get_docstring(node):
                    self.documented.add(line)
                self.docstrings |= _docstring(node)

    def cut(self) -> list[Block]:
        """The blocks of the module that are not empty, in order."""
        n = 1
        while n <= len(self.lines):
            n = self._take(n)
        for b in self.found:
            b.code = re.sub(r"\n{3,}", "\n\n", b.code.strip("\n"))
        return [b for b in self.found if b.prose or b.code or b.heading]

    def _take(self, n: int) -> int:
        """Put line n, or the docstring that begins there, into a block.  Returns the next line."""
        if n in self.starts:
            # A method without a docstring stays in the block before it, unless that block is about another method.
            after_documented_method = bool(self.found[-1].prose) and "." in self.found[-1].name
            if n in self.documented or after_documented_method:
                self._block().name = self.starts[n]
        if n in self.docstrings:
            last, prose = self.docstrings[n]
            block = self.found[-1]
            block.prose = f"{block.prose}\n\n{prose}".strip()
            while last < len(self.lines) and not self.lines[last].strip():
                last += 1
            return last + 1
        line = self.lines[n - 1]
        column = self.comments.get(n)
        if column is None:
            self.found[-1].code += line + "\n"
        elif line[:column].strip():
            self.found[-1].code += _narrow(line, column) + "\n"
        else:
            self._take_comment(line[column:])
        return n + 1

    def _take_comment(self, comment: str) -> None:
        """A comment on a line of its own: the heading of a part, or prose of the code below it."""
        block = self._block()
        heading = re.fullmatch(r"# [─-]{2,} ?(.*?)[ ─-]*", comment)
        if heading:
            block.heading = heading[1]
        else:
            block.prose = f"{block.prose}\n{comment.lstrip('# ')}".strip()

    def _block(self) -> Block:
        """The last block if it has no code yet, else a new one."""
        if self.found[-1].code.strip():
            self.found.append(Block())
        return self.found[-1]


def _docstring(node: ast.AST) -> dict[int, tuple[int, str]]:
    """{its first line: (its last line, the text)}, if the docstring has lines of its own."""
    text = ast.get_docstring(node, clean=False)
    if not text or node.body[0].lineno <= getattr(node, "lineno", 0):
        return {}
    first = node.body[0]
    return {first.lineno: (first.end_lineno, inspect.cleandoc(text))}


def _narrow(line: str, column: int) -> str:
    """A line with a comment at its end: with two spaces between them, or with the comment above."""
    code = line[:column].rstrip()
    comment = line[column:]
    if len(code) + len(comment) + 2 <= WIDE:
        return f"{code}  {comment}"
    indent = re.match(" *", code)[0]
    return f"{indent}{comment}\n{code}"


def cuda_blocks(text: str) -> list[Block]:
    """The blocks of a CUDA C file. A block begins at a line without indentation after a blank line.

    Its first lines that begin with // are its prose. The name of its kernel, if it has one, is its name.
    """
    found = []
    for part in re.split(r"\n\n+(?=\S)", text.strip()):
        comment = re.match(r"(?://[^\n]*(?:\n|$))*", part)[0]
        name = re.search(rf"^extern \"C\" __global__ {BOUNDS}void {BOUNDS}(\w+)", part, re.MULTILINE)
        prose = re.sub(r"^// ?", "", comment, flags=re.MULTILINE).rstrip()
        found.append(Block(name[1] if name else "", prose, part[len(comment):].rstrip()))
    return found


def first_sentence(text: str) -> str:
    """The first line of a file's docstring or comment."""
    return text.lstrip("\"'/ ").splitlines()[0].rstrip("\"'")


# ── as Markdown ──────────────────────────────────────────────────────────────────────────────────────────────────────
def escaped(text: str) -> str:
    """Plain text as Markdown that shows it unchanged, except that `code` is code and arXiv:numbers are links."""
    parts = re.split(r"(`[^`]+`)", text)
    for i in range(0, len(parts), 2):                    # between the pieces of code
        part = re.sub(r"[\\*_\[\]<>$|~{}#%^`]", r"\\\g<0>", parts[i])
        parts[i] = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", part)
    return "".join(parts)


COLUMN_GAP = re.compile(r"\S {3,}\S")                    # three spaces inside a line: a table


def markdown(doc: str) -> str:
    """A docstring as Markdown.  Indented lines and columns stay as they are, paragraphs flow; a wide gap begins a new
    line.
    """
    out = []
    for kind, group in itertools.groupby(doc.splitlines(), _kind_of_row):
        rows = list(group)
        gaps = sum(bool(COLUMN_GAP.search(row)) for row in rows)
        is_table = len(rows) > 1 and gaps > len(rows) / 2
        if kind == "indented" and _is_indented_text(rows):
            out.append("> " + escaped(" ".join(row.strip() for row in rows)))
        elif kind == "indented" or kind == "text" and is_table:
            kept = textwrap.dedent("\n".join(rows)).splitlines()
            out.append("````text\n" + "\n".join(squeezed(kept)) + "\n````")
        elif kind == "text":
            lines = re.split(r" {4,}", " ".join(rows))
            out.append("\\\n".join(escaped(line) for line in lines))
    return "\n\n".join(out)


def _kind_of_row(row: str) -> str:
    if not row.strip():
        return "blank"
    return "indented" if row.startswith("    ") else "text"


def _is_indented_text(rows: list[str]) -> bool:
    """True for sentences over several lines, without columns."""
    return len(rows) > 1 and all(len(row) > 90 and not COLUMN_GAP.search(row) for row in rows[:-1])


def squeezed(rows: list[str]) -> list[str]:
    """Columns closer together: where all rows are blank for more than four columns, four stay."""
    width = max(len(row) for row in rows)
    filled = ["x"] * width
    for i in range(width):
        if all(row[i:i + 1] in ("", " ") for row in rows):
            filled[i] = " "
    for gap in reversed([*re.finditer(r" {5,}", "".join(filled))]):
        rows = [row[:gap.start() + 4] + row[gap.end():] for row in rows]
    return [row.rstrip() for row in rows]


def page(path: str, text: str, notes: Mapping[str, str] = NO_NOTES) -> str:
    """The page of the Python module at `path`, with functions and classes under anchors of their names.

    notes: {name: Markdown to add to its prose}.
    """
    first, *rest = blocks(text)
    parts = [_top(path, text), markdown(first.prose), ""]
    if first.code:
        parts[-1] = (f"<details><summary>what it imports</summary>\n\n````python\n{first.code}\n````\n\n"
                     "</details>\n")
    parts += [_beside(block, notes, "python") for block in rest]
    return "\n".join(parts)


def cuda_page(path: str, text: str, notes: Mapping[str, str] = NO_NOTES) -> str:
    """The page of a file of CUDA C, with kernels under anchors of their names."""
    return "\n".join([_top(path, text), *(_beside(block, notes, "cuda") for block in cuda_blocks(text))])


def _top(path: str, text: str) -> str:
    name = path.split("/")[-1]
    lines = text.count("\n")
    return f"---\nhide-toc: true\n---\n\n# {escaped(name)}\n\n`{path}`, {lines} lines\n"


def _beside(block: Block, notes: Mapping[str, str], language: str) -> str:
    """A block as prose beside code, below the heading of its part."""
    heading = f"## {escaped(block.heading)}\n\n" if block.heading else ""
    anchor = f'<a id="{block.name}"></a>\n\n' if block.name else ""
    prose = "\n\n".join(part for part in (markdown(block.prose), notes.get(block.name, "")) if part)
    prose_box = f":::{{container}} prose\n{prose}\n:::\n" if prose else ""
    code_box = f"````{language}\n{block.code}\n````\n" if block.code else ""
    kept = re.findall(r"````text\n(.*?)````", prose, re.S)
    is_wide = any(len(row) > 52 for text in kept for row in text.splitlines())
    box = "beside wide" if is_wide else "beside"
    return f"{heading}{anchor}::::{{container}} {box}\n{prose_box}{code_box}::::\n"

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
PROSE_COLUMNS = 52                                       # columns of the prose; the page gives a wider table more room
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
        """Parse the module's text: find its definitions, its docstrings and its comments."""
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
        self.found = [Block()]                           # the blocks so far; lines are added to the last one

    def _add_definitions(self, holder: ast.Module | ast.ClassDef, prefix: str) -> None:
        """Add the classes and functions directly inside `holder` to `starts`, `documented` and `docstrings`.

        prefix: "" for the module, "Name." for a class.  A definition of the module begins a block in any case, so it
        counts as documented; a method only with a docstring.
        """
        for node in holder.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                line = first_line(node)
                self.starts[line] = prefix + node.name
                if not prefix or ast.get_docstring(node):
                    self.documented.add(line)
                self.docstrings |= _docstring(node)

    def cut(self) -> list[Block]:
        """The blocks of the module that are not empty, in order."""
        n = 1                                            # number of the line to take next
        while n <= len(self.lines):
            n = self._take(n)
        for b in self.found:
            b.code = re.sub(r"\n{3,}", "\n\n", b.code.strip("\n"))
        return [b for b in self.found if b.prose or b.code or b.heading]

    def _take(self, n: int) -> int:
        """Put line n into the last block, or into a new one if a definition or a comment begins one there.

        A docstring that begins at line n goes into the prose as a whole.  Returns the number of the next line to take.
        """
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
                last += 1                                # skip the blank lines after the docstring
            return last + 1
        line = self.lines[n - 1]
        column = self.comments.get(n)
        if column is None:
            self.found[-1].code += line + "\n"
        elif line[:column].strip():                      # a comment after code
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
    """{first line: (last line, text)} of the docstring of a module, class or function.

    {} if it has none, or one on the line of `def` or `class`: that one stays in the code.
    """
    text = ast.get_docstring(node, clean=False)
    if not text or node.body[0].lineno <= getattr(node, "lineno", 0):
        return {}
    first = node.body[0]
    return {first.lineno: (first.end_lineno, inspect.cleandoc(text))}


def _narrow(line: str, column: int) -> str:
    """A line of code with a comment that begins at `column`, made narrower: only two spaces stay between them.

    If that is still wider than WIDE, the columns that the page shows, the comment moves to a line above the code.
    """
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
    """A docstring as Markdown.

    Tables and indented lines are kept as they are, in a block of text.  Indented sentences become a quotation.  Other
    paragraphs flow; four spaces inside them begin a new line.
    """
    out = []
    for kind, group in itertools.groupby(doc.splitlines(), _kind_of_row):
        rows = list(group)
        rows_with_gap = sum(bool(COLUMN_GAP.search(row)) for row in rows)
        is_table = len(rows) > 1 and rows_with_gap > len(rows) / 2
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
    """True for sentences over several lines, without columns: every row but the last is filled to the margin."""
    return len(rows) > 1 and all(len(row) > 90 and not COLUMN_GAP.search(row) for row in rows[:-1])


def squeezed(rows: list[str]) -> list[str]:
    """The rows of a table with its columns closer together: of more than four blank columns in all rows, four stay."""
    width = max(len(row) for row in rows)
    filled = ["x"] * width                               # " " for a character column that is blank in all rows
    for i in range(width):
        if all(row[i:i + 1] in ("", " ") for row in rows):
            filled[i] = " "
    for gap in reversed([*re.finditer(r" {5,}", "".join(filled))]):      # from the right, so positions stay valid
        rows = [row[:gap.start() + 4] + row[gap.end():] for row in rows]
    return [row.rstrip() for row in rows]


def page(path: str, text: str, notes: Mapping[str, str] = NO_NOTES) -> str:
    """The page, in Markdown, of the Python module at `path`; its functions and classes have anchors of their names.

    text: the module's source.  notes: {name of a function or class: Markdown to add to its prose}.
    """
    first, *rest = blocks(text)                          # first: the module's docstring and its imports
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
    """A block, in Markdown, as prose beside code, below the heading of its part of the file.

    notes: {name: Markdown to add to the prose of the block of this name}.  language: of the code, to colour it.
    """
    heading = f"## {escaped(block.heading)}\n\n" if block.heading else ""
    anchor = f'<a id="{block.name}"></a>\n\n' if block.name else ""
    prose = "\n\n".join(part for part in (markdown(block.prose), notes.get(block.name, "")) if part)
    prose_box = f":::{{container}} prose\n{prose}\n:::\n" if prose else ""
    code_box = f"````{language}\n{block.code}\n````\n" if block.code else ""
    tables = re.findall(r"````text\n(.*?)````", prose, re.S)             # as `markdown` keeps them
    is_wide = any(len(row) > PROSE_COLUMNS for text in tables for row in text.splitlines())
    box = "beside wide" if is_wide else "beside"
    return f"{heading}{anchor}::::{{container}} {box}\n{prose_box}{code_box}::::\n"

"""Annotated source: a module as a page of prose beside code.  The prose is the module's own docstrings and comments.

blocks cuts the text, page writes it as Markdown (MyST) for Sphinx; what is shown is taken from the source each time, so
it cannot drift.
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

from .sources import first_line

WIDE = 88  # columns of code beside the prose; longer lines scroll


@dataclasses.dataclass
class Block:
    """What is said and the code it is said of.

    name: of the function or class that begins here;  heading: of the part of the file that begins here.
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
    tree, lines = ast.parse(text), text.splitlines()
    starts, said = {}, _docstring(tree)  # {line: (name, whether to cut)}, {line: (last, prose)}
    for holder in (tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))):
        for node in holder.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                starts[first_line(node)] = f"{getattr(holder, 'name', '')}.{node.name}".lstrip("."), holder is tree or bool(ast.get_docstring(node))
                said |= _docstring(node)
    comments = {t.start[0]: t.start[1] for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT}
    found, n = [Block()], 0

    def fresh() -> Block:
        if found[-1].code.strip():
            found.append(Block())
        return found[-1]
    while (n := n + 1) <= len(lines):
        line, at = lines[n - 1], comments.get(n)
        # silent methods stay together, or with their class
        if n in starts and (starts[n][1] or found[-1].prose and "." in found[-1].name):
            fresh().name = starts[n][0]
        if n in said:
            last, prose = said[n]
            found[-1].prose, n = f"{found[-1].prose}\n\n{prose}".strip(), last
            while n < len(lines) and not lines[n].strip():
                n += 1
        elif at is not None and not line[:at].strip():
            if part := re.fullmatch(r"\s*# [─-]{2,} ?(.*?)[ ─-]*", line):
                fresh().heading = part[1]
            else:
                block = fresh()
                block.prose = f"{block.prose}\n{line[at:].lstrip('# ')}".strip()
        else:
            found[-1].code += (_narrow(line, at) if at is not None else line) + "\n"
    for b in found:
        b.code = re.sub(r"\n{3,}", "\n\n", b.code.strip("\n"))
    return [b for b in found if b.prose or b.code or b.heading]


def _docstring(node: ast.AST) -> dict[int, tuple[int, str]]:
    """{its first line: (its last line, the text)}, if the docstring has lines of its own."""
    text = ast.get_docstring(node, clean=False)
    first = node.body[0] if text else None
    return {first.lineno: (first.end_lineno, inspect.cleandoc(text))} if text and first.lineno > getattr(node, "lineno", 0) else {}


def _narrow(line: str, at: int) -> str:
    """A line with a comment at its end: without the gap between them, or with the comment above."""
    code, comment = line[:at].rstrip(), line[at:]
    if len(code) + len(comment) + 2 <= WIDE:
        return f"{code}  {comment}"
    return f"{re.match(' *', code)[0]}{comment}\n{code}"


def cuda_blocks(text: str) -> list[Block]:
    """The same of CUDA C: a block to each stretch between blank lines that begins at the margin, its prose the comment
    it begins with.
    """
    found = []
    for part in re.split(r"\n\n+(?=\S)", text.strip()):
        said = re.match(r"(?://[^\n]*(?:\n|$))*", part)[0]
        name = re.search(r"^extern \"C\" __global__ void (\w+)", part, re.MULTILINE)
        found.append(Block(name[1] if name else "", re.sub(r"^// ?", "", said, flags=re.MULTILINE).rstrip(), part[len(said):].rstrip()))
    return found


def first_sentence(text: str) -> str:
    """What a file says of itself in its first line."""
    return text.lstrip("\"'/ ").splitlines()[0].rstrip("\"'")


# ── as Markdown ──────────────────────────────────────────────────────────────────────────────────────────────────────
def escaped(text: str) -> str:
    """Plain text as Markdown that shows it unchanged, but for `code`, which is code, and arXiv:numbers, which are
    links.
    """
    parts = re.split(r"(`[^`]+`)", text)
    parts[::2] = [re.sub(r"[\\*_\[\]<>$|~{}#%^`]", r"\\\g<0>", p) for p in parts[::2]]
    parts[::2] = [re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", p) for p in parts[::2]]
    return "".join(parts)


def markdown(doc: str) -> str:
    """A docstring as Markdown: indented lines and columns stay as they are, paragraphs flow; a wide gap within one
    begins a new line.
    """
    out = []
    for kind, group in itertools.groupby(doc.splitlines(), lambda row: "blank" if not row.strip() else "kept" if row[:4] == "    " else "flows"):
        rows = list(group)
        columns = len(rows) > 1 and sum(bool(re.search(r"\S {3,}\S", row)) for row in rows) > len(rows) / 2
        # sentences
        if kind == "kept" and len(rows) > 1 and all(len(row) > 90 and not re.search(r"\S {3,}\S", row) for row in rows[:-1]):
            out.append("> " + escaped(" ".join(row.strip() for row in rows)))
        elif kind == "kept" or kind == "flows" and columns:
            out.append("````text\n" + "\n".join(squeezed(textwrap.dedent("\n".join(rows)).splitlines())) + "\n````")
        elif kind == "flows":
            out.append("\\\n".join(escaped(part) for part in re.split(r" {4,}", " ".join(rows))))
    return "\n\n".join(out)


def squeezed(rows: list[str]) -> list[str]:
    """Columns closer together: where all rows are blank for more than four columns, four stay."""
    wide = max(map(len, rows))
    blank = "".join(" " if all(row[i:i + 1] in ("", " ") for row in rows) else "x" for i in range(wide))
    for gap in reversed([*re.finditer(r" {5,}", blank)]):
        rows = [row[:gap.start() + 4] + row[gap.end():] for row in rows]
    return [row.rstrip() for row in rows]


def page(path: str, text: str, notes: Mapping[str, str] = MappingProxyType({})) -> str:
    """The page of the module at `path`, functions and classes under anchors of their names.

    notes: {name: Markdown to add to its prose}.
    """
    first, *rest = blocks(text)
    fold = f"<details><summary>what it imports</summary>\n\n````python\n{first.code}\n````\n\n</details>\n" if first.code else ""
    return "\n".join([_top(path, text), markdown(first.prose), fold, *(_beside(b, notes, "python") for b in rest)])


def cuda_page(path: str, text: str, notes: Mapping[str, str] = MappingProxyType({})) -> str:
    """The page of a file of CUDA C, kernels under anchors of their names."""
    return "\n".join([_top(path, text), *(_beside(b, notes, "cuda") for b in cuda_blocks(text))])


def _top(path: str, text: str) -> str:
    return f"---\nhide-toc: true\n---\n\n# {escaped(path.split('/')[-1])}\n\n`{path}`, {text.count(chr(10))} lines\n"


def _beside(b: Block, notes: Mapping[str, str], language: str) -> str:
    """A block as prose beside code, below the heading of its part."""
    heading = f"## {escaped(b.heading)}\n\n" if b.heading else ""
    anchor = f'<a id="{b.name}"></a>\n\n' if b.name else ""
    prose = "\n\n".join(filter(None, [markdown(b.prose), notes.get(b.name, "")]))
    code = f"````{language}\n{b.code}\n````\n" if b.code else ""
    said = f":::{{container}} prose\n{prose}\n:::\n" if prose else ""
    over = " wide" * any(len(row) > 52 for kept in re.findall(r"````text\n(.*?)````", prose, re.S) for row in kept.splitlines())
    return f"{heading}{anchor}::::{{container}} beside{over}\n{said}{code}::::\n"

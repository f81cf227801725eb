"""Make the pairs (summary of a docstring, name of its function):   python -m tinyft.assets.names LIB [LIB ...]

    LIB             as in make.py: folders of standard libraries. The Python that runs this must parse the newest one
    text.json.xz    the snapshot that make.py has made. It says which split a module belongs to
    names.json.xz   {"about": {...}, "pairs": [[module, split, summary, name], ...]}, read by tinyft.data

make.py calls `write` after it has written the snapshot. This command makes the pairs alone, and leaves the snapshot as
it is. The committed file came from Python 3.13.0, 3.12.1, 3.11.7 and 3.10.13 in this order.

A pair comes from a function or a method with a docstring, in a module of the standard library.

    summary     the first sentence of the docstring, on one line: 3 to 25 words that begin with a capital. A signature
                is no summary, and neither is a sentence that contains a name of several words which it should suggest
    name        at least three characters, words of lower-case letters and digits joined by "_": get_lines. Names
                such as getLines, __init__ and _private are left out, since they have other parts

Splitting.  A pair has the split of its module. Two summaries that have the same words (case and punctuation ignored)
are the same summary: it is kept once, in training before valid and test. A summary of valid or test whose words occur
in one piece in a training text of the snapshot, on which the shipped models were pretrained, is left out.
"""

from __future__ import annotations

import ast
import collections
import json
import lzma
import re
import sys
import tokenize
from pathlib import Path

from . import make

FILE = make.HERE / "names.json.xz"
LIMIT = 200_000  # bytes of names.json.xz
WORDS = (3, 25)  # the fewest and the most words of a summary
NAME = re.compile(r"[a-z][a-z0-9]*(?:_[a-z0-9]+)*")
# A sentence ends at a full stop before a capital; marks such as quotes may stand between.
SENTENCE_END = re.compile(r"""(?<=[.!?])\s+(?=["'`(*]?[A-Z])""")


def summary(docstring: str) -> str:
    """The first sentence of a docstring, on one line, without the markup of roles and double backquotes."""
    paragraph = docstring.strip().split("\n\n")[0]
    paragraph = re.sub(r":[\w:-]+:`~?([^`<]*?)(\s*<[^`]*>)?`", r"`\1`", paragraph)  # :func:`x` -> `x`
    line = " ".join(paragraph.replace("``", "`").split())
    return SENTENCE_END.split(line)[0]


def words(text: str) -> str:
    """The lower-case words of a text with single spaces between them: its key when summaries are compared."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def fits(name: str, text: str) -> bool:
    """True if a name and a summary make an example of the task, as the top of this file describes it."""
    if not NAME.fullmatch(name) or len(name) < 3 or make.is_test(name):
        return False
    count = len(text.split())
    if not WORDS[0] <= count <= WORDS[1] or not text[0].isupper() or not text.isprintable():
        return False
    if any(mark in text for mark in ("->", "::", ">>>", f"{name}(")) or make.NOTICE.search(text):
        return False
    shows_name = re.search(rf"(?<!\w){name}(?!\w)", text)
    return not ("_" in name and shows_name)


def functions(tree: ast.Module) -> list[tuple[str, str]]:
    """(summary, name) of each function and method with a docstring, in a fixed order, if they make an example."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            text = summary(ast.get_docstring(node) or "")
            if fits(node.name, text):
                found.append((text, node.name))
    return found


def gather(libs: list[Path]) -> dict[str, list[tuple[str, str]]]:
    """{module: [(summary, name), ...]} of the libraries. An earlier library wins, as in make.gather."""
    files = {}
    for lib in libs:
        files = {**make.modules(lib), **files}
    found = {}
    for module, file in sorted(files.items()):
        if module != "pydoc_data.topics" and not module.startswith(make.NOT_READ):
            with tokenize.open(file) as stream:
                found[module] = functions(make.parse(stream.read()))
    return found


def pairs(of_module: dict[str, list[tuple[str, str]]], records: list[list[str]]) -> list[list[str]]:
    """[module, split, summary, name] of all examples, sorted by split and module.

    of_module   {module: [(summary, name), ...]}
    records     the snapshot, [module, kind, split, text] each

    A module without a text in the snapshot has no split: it is left out.
    """
    split_of = {module: split for module, _, split, _ in records}
    training = " ".join(f" {words(text)} |" for _, _, split, text in records if split == "train")
    found = []
    seen = set()

    def priority(module: str) -> tuple:
        return make.SPLITS.index(split_of[module]), module.startswith("_"), module

    for module in sorted(split_of.keys() & of_module.keys(), key=priority):
        split = split_of[module]
        for text, name in of_module[module]:
            is_pretrained = split != "train" and f" {words(text)} " in training
            if words(text) not in seen and not is_pretrained:
                seen.add(words(text))
                found.append([module, split, text, name])
    return found


def write(libs: list[Path], records: list[list[str]]) -> None:
    """Write names.json.xz and print its size. sys.exit, before it is written, if it is larger than LIMIT."""
    found = pairs(gather(libs), records)
    about = {"python": [lib.name for lib in libs]}
    as_json = json.dumps({"about": about, "pairs": found}, ensure_ascii=False, separators=(",", ":"))
    packed = lzma.compress(as_json.encode(), preset=9 | lzma.PRESET_EXTREME)
    if len(packed) > LIMIT:
        sys.exit(f"names wants at most {LIMIT:,} bytes of names.json.xz, got {len(packed):,}")
    FILE.write_bytes(packed)
    counts = collections.Counter(split for _, split, _, _ in found)
    print(f"pairs: {dict(counts)}, {len(packed):,} bytes of names.json.xz")


def main(libs: list[str]) -> None:
    """Make names.json.xz from the folders of standard libraries and the committed snapshot."""
    folders = [Path(lib) for lib in libs]
    make.check(folders)
    snapshot = json.loads(lzma.decompress((make.HERE / "text.json.xz").read_bytes()))
    write(folders, snapshot["records"])


if __name__ == "__main__":
    main(sys.argv[1:])

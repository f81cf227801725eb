"""Make the snapshot of real text and its tokenizer, by hand, once:   python -m tinyft.assets.make LIB [LIB ...]

    LIB            folder of a Python's standard library (".../lib/python3.13"); a module is taken from the first that has it. The
                   first must be of the Python that runs this: it alone reads its newest syntax and its C modules' docstrings
    text.json.xz   {"about": {...}, "records": [[module, kind, split, text], ...]}, read by tinyft.data
    tokenizer.json byte-level BPE of 2,048 entries, trained on the training split only
    LICENSES.txt   Python's and NumPy's licences, and the notices of single files

The committed files came from Python 3.13.0, 3.12.1, 3.11.7 and 3.10.13 in this order (so that what 3.12 and 3.13 removed, such as
distutils, is there too) and NumPy 2.5.5. They are committed because results must not depend on the Python that runs them.

What is text.  Three kinds of record:
    prose       the language reference (`pydoc_data.topics`, module "reference.<topic>") and the standard library's whole-line comments
    docstring   of a module, class or function of the standard library or NumPy; read with `ast` from source files, no Python module
                is imported. What is written in C (builtins, itertools, NumPy's ufuncs) has them only at run time and is asked for them
    source      of a part of the standard library, without its docstrings and copyright notices

What is cleaned.  Paragraphs are unwrapped; doctests, code, grammar, tables and underlines are dropped; a paragraph that stands in an
earlier record (case and white space apart) is dropped, and so is one of valid or test that is a part of one of training: no paragraph is
in two splits. What is then under 24 characters or four words is dropped.

How it is split.  By module, so that no docstring of a module is in training while its neighbour is in test. Modules fall into groups:
each package of the *package* task, NumPy, the reference's topics, and the rest. A group's largest module trains. The others go, in the
order of a hash of their names, to test, then to valid, while that keeps the split's share of the group (of its docstrings for a package
of the task, of its characters elsewhere); where none fits, the smallest goes. Pretraining and the tokenizer see the training split only.
"""

from __future__ import annotations

import ast
import collections
import hashlib
import importlib
import inspect
import io
import json
import lzma
import os
import re
import sys
import textwrap
import tokenize
import warnings
from pathlib import Path

HERE = Path(__file__).parent
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<|endoftext|>"]             # ids 0 .. 5
VOCABULARY = 2048
SOURCE_CHARACTERS = 4_400_000                                                          # of 12 million: about a million tokens for training
SHARES = {"package": (0.20, 0.10), "other": (0.08, 0.04)}                              # (test, valid) of a group's characters
LIMIT = 3_000_000                                                                      # bytes of text.json.xz
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

# Packages with at least five modules, test modules not counted, in every one of Python 3.10, 3.11, 3.12 and 3.13. Found by `count_modules`
# over the libraries of 3.10.13, 3.11.7, 3.12.1 and 3.13.0; the numbers are the modules in each, and `main` checks those it is given.
# (distutils and lib2to3 were removed, re and tomllib are too new or too small, dbm, html, logging, xmlrpc and zoneinfo too small.)
CLASSES = {
    "asyncio": (31, 33, 33, 33), "concurrent": (5, 5, 5, 5), "ctypes": (9, 9, 9, 9), "curses": (5, 5, 5, 5), "email": (29, 29, 29, 29),
    "encodings": (122, 122, 122, 122), "http": (5, 5, 5, 5), "idlelib": (60, 60, 60, 60), "importlib": (18, 24, 24, 25),
    "json": (5, 5, 5, 5), "multiprocessing": (23, 23, 23, 23), "tkinter": (14, 14, 14, 13), "turtledemo": (21, 21, 21, 21),
    "unittest": (13, 13, 13, 13), "urllib": (6, 6, 6, 6), "wsgiref": (6, 7, 7, 7), "xml": (22, 22, 22, 22),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- which modules


def is_test(module: str) -> bool:
    """Is this a test module: one whose dotted name has a part `test`, `tests`, `idle_test`, `test_*`, `*_test` or `*_tests`?"""
    return any(part in ("test", "tests") or re.match(r"_?test_|.*_tests?$", part) for part in module.split("."))


def modules(lib: Path, package: str = "") -> dict[str, Path]:
    """{dotted name: file} of every module under a library (or one package of it), without tests and what a platform generates."""
    found = {}
    for file in sorted((lib / package).rglob("*.py")):
        parts = list(file.relative_to(lib).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        module = ".".join(parts)
        odd = any(part.startswith(("config-", "_sysconfigdata")) or part in ("site-packages", "lib-dynload") for part in parts)
        if parts and not odd and not is_test(module):
            found[module] = file
    return found


def count_modules(lib: Path) -> dict[str, int]:
    """How many modules each package of a standard library has: the numbers in CLASSES."""
    counts = collections.Counter(module.split(".")[0] for module in modules(lib))
    return {package: n for package, n in sorted(counts.items()) if n >= 5}


# ---------------------------------------------------------------------------------------------------------------- what they say


def parse(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                                # odd escapes in old sources are not our business
        return ast.parse(text)


def docstrings(tree: ast.Module) -> list[str]:
    """Every docstring in a module, outermost first, dedented. NumPy's C functions have theirs in `add_newdoc` calls."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED):
            found.append(ast.get_docstring(node) or "")
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "add_newdoc":
            texts = [part for part in ast.walk(node.args[-1]) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            found += [inspect.cleandoc(part.value) for part in texts if len(part.value) > 40]
    return found


def c_docstrings() -> dict[str, list[str]]:
    """{module: docstrings} of the extension modules of the Python that runs this, and of NumPy's ufuncs."""
    import numpy

    names = set(sys.builtin_module_names) | {file.name.split(".")[0] for file in Path(os.__file__).parent.glob("lib-dynload/*.so")}
    found = {}
    for name in sorted(names):
        if "test" in name or name.startswith("xx"):
            continue
        things = list(vars(importlib.import_module(name)).values())
        things += [member for thing in things if isinstance(thing, type) for member in vars(thing).values()]
        found[name] = [thing.__doc__ for thing in things if isinstance(getattr(thing, "__doc__", None), str)]
    found["numpy._core.umath"] = [thing.__doc__ for thing in vars(numpy).values() if isinstance(thing, numpy.ufunc)]
    return {name: [inspect.cleandoc(text) for text in dict.fromkeys(texts)] for name, texts in found.items()}


def comments(text: str) -> list[str]:
    """Runs of whole-line comments, often the best prose in a library; not the copyright notices."""
    runs, last = [], None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line.strip().startswith("#"):
            row, column = token.start
            if (row - 1, column) != last:
                runs.append([])
            runs[-1].append(re.sub(r"^#+[:!]?", "", token.string))
            last = (row, column)
    return [textwrap.dedent("\n".join(run)) for run in runs]


def notices(raw: dict[str, list[str]]) -> list[str]:
    """The copyright notices a file carries in its comments and at the end of its docstrings: they go to LICENSES.txt."""
    found = [run for run in raw["prose"] if NOTICE.search(run)]
    for text in raw["docstring"]:
        paragraphs = text.split("\n\n")
        first = next((i for i, paragraph in enumerate(paragraphs) if NOTICE.search(paragraph)), len(paragraphs))
        found += ["\n\n".join(paragraphs[first:])] if paragraphs[first:] else []
    return [text.strip() for text in found]


def without_docstrings(text: str, tree: ast.Module) -> str:
    """The source with every docstring gone (`pass` where it was the whole body), trailing space stripped, blank lines at most one."""
    lines = text.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, DOCUMENTED) or ast.get_docstring(node, clean=False) is None:
            continue
        doc = node.body[0]
        first, last = doc.lineno - 1, doc.end_lineno - 1
        before = lines[first].encode()[: doc.col_offset].decode()                      # ast counts bytes
        after = lines[last].encode()[doc.end_col_offset :].decode()
        alone = "pass" if len(node.body) == 1 and not isinstance(node, ast.Module) else ""
        lines[first : last + 1] = [before + alone + after.lstrip("; ")] + [""] * (last - first)
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines)).strip() + "\n"
    head = re.match(r"(#.*\n|\n)*", text)[0]
    return text[len(head) :] if NOTICE.search(head) else text


def reference(file: Path) -> dict[str, str]:
    """{"reference.<topic>": text} of `pydoc_data/topics.py`, read as a literal."""
    [assigned] = [node.value for node in parse(file.read_text("utf-8")).body if isinstance(node, ast.Assign)]
    return {f"reference.{topic}": text for topic, text in ast.literal_eval(assigned).items()}


# ---------------------------------------------------------------------------------------------------------------- cleaning

BULLET = re.compile(r"\s*([-*+•]\s|\(?\w{1,2}[.)]\s|[\w*'\"`.,()\[\]]+\s*(--?|:)\s)")           # "- a", "2) a", "name -- a", "name : a"
NOTICE = re.compile(
    r"(?i)copyright\W+(\(c\)\W*)?(\d{4}|disney)|copyrighttext|permission (to use|is hereby)|all rights reserved|redistribut"
)
WORD = re.compile(r"""["'`*(\[]*[A-Za-z][A-Za-z'’/-]*["'`*)\].,;:!?]*$""")


def is_code(block: str) -> bool:
    """Code, grammar, tables and rulers: what is not sentences."""
    if re.search(r"::=|^\s*(>>>|\$ |%|@\w)|[=+|-]{6}|\|.*\|.*\|", block, re.M) or "\x00" in block:
        return True
    tokens = block.split()
    if sum(bool(WORD.match(token)) for token in tokens) < 0.6 * len(tokens):
        return True
    try:
        return bool(parse(textwrap.dedent(block)).body)                                # a sentence is hardly ever a valid program
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def unwrap(block: str) -> str:
    """One line per item: a line that continues the one above (same indentation, no bullet, the one above was full) is joined to it."""
    out, indent, full = [], -1, False
    for line in block.split("\n"):
        here = len(line) - len(line.lstrip())
        if out and here == indent and not BULLET.match(line) and (full or line.lstrip()[:1].islower()):
            out[-1] += " " + " ".join(line.split())
        else:
            out.append(" ".join(line.split()))
        marker = re.match(r"\s*([-*+•]|\(?\w{1,2}[.)])\s+", line)
        indent = len(marker[0]) if marker else here                                    # an item's own text starts after its mark
        full = len(line.strip()) > 40
    return "\n".join(out)


def key(text: str) -> str:
    return " ".join(text.lower().split())


def clean(text: str, seen: set[str], training: str = "") -> str:
    """Paragraphs of sentences, blank lines between; "" where nothing is left.

    `seen` holds the keys of all paragraphs kept so far. A paragraph that occurs anywhere in `training` is dropped, too.
    """
    text = text.expandtabs().replace("\r", "").replace("\f", "\n")
    text = re.sub(r":[\w:-]+:`~?([^`<]*?)(\s*<[^`]*>)?`", r"`\1`", text)                  # :func:`x` -> `x`
    text = re.sub(r"(?m)^\s*([-=*~^#\"_.+])\1{2,}\s*$", "", text.replace("``", "`"))       # underlines
    text = re.sub(r"(?m)^\s*\.\. .*$|(?m:[ ]+$)", "", text).replace("::\n", ":\n")
    kept = []
    for block in re.split(r"\n\s*\n", text):
        if ">>>" in block:                                                             # a doctest ends at a blank line
            block = block[: block.index(">>>")].rstrip(" \n")
        if len(block.strip()) < 12 or NOTICE.search(block) or is_code(block):
            continue
        paragraph = unwrap(block)
        if key(paragraph) not in seen and key(paragraph) not in training:
            seen.add(key(paragraph))
            kept.append(paragraph)
    whole = "\n\n".join(kept)
    return whole if len(whole) >= 24 and len(whole.split()) >= 4 else ""


# ---------------------------------------------------------------------------------------------------------------- splitting


def group(module: str) -> str:
    """What a module is split within."""
    top = module.split(".")[0]
    return top if top in CLASSES or top in ("numpy", "reference") else "rest"


def order(module: str) -> str:
    return hashlib.sha256(f"tinyft {module}".encode()).hexdigest()


def split(sizes: dict[str, int]) -> dict[str, str]:
    """{module: "train" | "valid" | "test"} for {module: size}, as the text at the top says."""
    groups = collections.defaultdict(list)
    for module in sorted(sizes, key=order):
        groups[group(module)].append(module)
    where = {}
    for name, members in sorted(groups.items()):
        total, largest = sum(sizes[module] for module in members), max(members, key=lambda module: sizes[module])
        for part, share in zip(("test", "valid"), SHARES["package" if name in CLASSES else "other"], strict=True):
            used, free = 0, [module for module in members if module not in where and module != largest]
            for module in free:
                if used + sizes[module] <= share * total:
                    where[module] = part
                    used += sizes[module]
            if not used:
                where[min(free, key=lambda module: sizes[module])] = part
        where.update({module: "train" for module in members if module not in where})
    return where


# ---------------------------------------------------------------------------------------------------------------- making


def gather(libs: list[Path], numpy: Path) -> dict[str, dict[str, list[str]]]:
    """{module: {kind: [raw texts]}} of the libraries, the reference and NumPy."""
    raw = {module: {"prose": [text]} for module, text in reference(libs[0] / "pydoc_data/topics.py").items()}
    files = {}
    for lib in libs:
        files = {**modules(lib), **files}
    files = {**files, **modules(numpy.parent, "numpy")}
    for module, file in sorted(files.items()):
        if module == "pydoc_data.topics" or module.startswith(("lib2to3.pgen2.literals", "this", "antigravity", "__")):
            continue
        with tokenize.open(file) as stream:
            text = stream.read()
        tree, own = parse(text), not module.startswith("numpy")
        raw[module] = {"prose": comments(text) if own else [], "docstring": docstrings(tree)}
        if own:
            raw[module]["source"] = [without_docstrings(text, tree)]
    for module, texts in c_docstrings().items():
        raw.setdefault(module, {}).setdefault("docstring", []).extend(texts)
    return raw


def write_licences(raw: dict[str, dict[str, list[str]]], lib: Path, numpy: Path) -> None:
    """Python's licence, NumPy's own (not those of the compiled code bundled with it: none is here) and single files' notices."""
    own = next(numpy.parent.glob("numpy-*.dist-info/licenses/LICENSE.txt")).read_text("utf-8").split("\n----")[0].strip()
    found = {key(text): text for module, kinds in sorted(raw.items()) if "source" in kinds for text in notices(kinds)}
    python = (lib / "LICENSE.txt").read_text("utf-8").strip()
    parts = {
        "Python: the language reference, docstrings, comments and sources of the standard library": python,
        "NumPy: its docstrings": own,
        "Notices in single files of the standard library": "\n\n----\n\n".join(found.values()),
    }
    rule = "=" * 120
    whole = "\n\n".join(f"{rule}\n{title}\n{rule}\n\n{text}" for title, text in parts.items())
    head = "text.json.xz holds text by others, cleaned and shortened by make.py, under these licences; tinyft's own is MIT.\n\n"
    (HERE / "LICENSES.txt").write_text("\n".join(line.rstrip() for line in (head + whole).splitlines()) + "\n", "utf-8")


def is_table(source: str) -> bool:
    """Mostly data: character maps, lists of names. Nobody learns Python from it."""
    words = re.findall(r"[A-Za-z_]{2,}|\d+|[^\sA-Za-z_\d]", source)
    keywords = sum(word in ("def", "return", "if", "self", "for", "in", "import", "class", "not", "is", "None") for word in words)
    return keywords < 0.05 * len(words) or len(source) < 400


def size(module: str, kinds: dict[str, list[str]]) -> int:
    """What a module counts when its group is split."""
    if group(module) in CLASSES:
        return sum(bool(clean(text, set())) for text in kinds.get("docstring", []))
    return sum(len(clean(text, set())) for kind in ("prose", "docstring") for text in kinds.get(kind, []))


def records(raw: dict[str, dict[str, list[str]]]) -> list[list[str]]:
    """[module, kind, split, text], each text once, train before valid before test so that a repeated paragraph stays in training."""
    sizes = {module: size(module, kinds) for module, kinds in raw.items()}
    where = split({module: n for module, n in sizes.items() if n})
    rank = {"train": 0, "valid": 1, "test": 2}
    found, seen, training = [], set(), ""
    for module in sorted(where, key=lambda module: (rank[where[module]], module.startswith("_"), module)):     # _asyncio after asyncio
        if where[module] != "train" and not training:
            training = "\n".join(sorted(seen))
        for kind in ("prose", "docstring"):
            texts = [clean(text, seen, training) for text in raw[module].get(kind, [])]
            found += [[module, kind, where[module], text] for text in texts if text]
    budget = SOURCE_CHARACTERS
    for module in sorted(where, key=order):
        for text in raw[module].get("source", []):
            if budget > 0 and len(text) < 60_000 and not is_table(text) and key(text) not in seen:
                seen.add(key(text))
                found.append([module, "source", where[module], text])
                budget -= len(text)
    return sorted(found, key=lambda record: (record[1], record[0]))


def train_tokenizer(texts: list[str], path: Path) -> None:
    """Byte-level BPE as GPT-2's, special tokens first. It adds nothing to a text: tinyft.data puts [CLS] and [SEP] there, in the open."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def main(libs: list[str]) -> None:
    if not libs:
        sys.exit("wanted the folders of one or more standard libraries, newest first (.../lib/python3.13); got none")
    import numpy

    folders = [Path(lib) for lib in libs]
    if folders[0].resolve() != Path(os.__file__).parent.resolve():
        sys.exit(f"wanted the library of the Python that runs this, {Path(os.__file__).parent}, first; got {folders[0]}")
    for folder in folders:
        counts = count_modules(folder)
        missing = [package for package in CLASSES if package not in counts]
        if missing:
            sys.exit(f"wanted five modules of each class in {folder}; too few of {', '.join(missing)}")
    raw = gather(folders, Path(numpy.__file__).parent)
    found = records(raw)
    write_licences(raw, folders[0], Path(numpy.__file__).parent)
    about = {"python": [folder.name for folder in folders], "numpy": numpy.__version__, "classes": list(CLASSES)}
    text = json.dumps({"about": about, "records": found}, ensure_ascii=False, separators=(",", ":"))
    packed = lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)
    if len(packed) > LIMIT:
        sys.exit(f"wanted at most {LIMIT:,} bytes of text.json.xz, got {len(packed):,}: lower SOURCE_CHARACTERS")
    (HERE / "text.json.xz").write_bytes(packed)
    train_tokenizer([text for _, _, part, text in found if part == "train"], HERE / "tokenizer.json")
    print(f"{len(found):,} records, {len(packed):,} bytes, sha256 {hashlib.sha256(packed).hexdigest()[:16]}")
    for (kind, part), texts in sorted(collections.Counter((record[1], record[2]) for record in found).items()):
        print(f"  {kind:10} {part:6} {texts:6,} texts  {sum(len(r[3]) for r in found if (r[1], r[2]) == (kind, part)):10,} characters")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Make the snapshot of real text and its tokenizer, by hand, once:   python -m tinyft.assets.make LIB [LIB ...]

    LIB            folder of a Python's standard library (".../lib/python3.13"). A module is taken from the first folder
                   that contains it. The first folder must belong to the Python that runs this script: only this Python
                   can parse its newest syntax and has the docstrings of its C modules
    text.json.xz   {"about": {...}, "records": [[module, kind, split, text], ...]}, read by tinyft.data
    tokenizer.json byte-level BPE of 2,048 entries, trained on the training split only
    names.json.xz  pairs of a docstring's summary and its function's name, made by names.py
    LICENSES.txt   Python's and NumPy's licences, and the notices of single files

The committed files came from Python 3.13.0, 3.12.1, 3.11.7 and 3.10.13 in this order (so that modules which 3.12 and
3.13 removed, such as distutils, are included) and NumPy 2.5.5. They are committed because results must not depend on
the Python that runs them.

Kinds of text.
    prose       the language reference (`pydoc_data.topics`, module "reference.<topic>") and the standard library's
                whole-line comments
    docstring   of a module, class or function of the standard library or NumPy. Docstrings are read from source files
                with `ast`; no Python module is imported. C code (builtins, itertools, NumPy's ufuncs) has docstrings
                only at run time; its modules are imported
    source      of a part of the standard library, without its docstrings and copyright notices

Cleaning.  Paragraphs are unwrapped. Doctests, code, grammar, tables and underlines are dropped. A paragraph of an
earlier record (case and white space ignored) is dropped, and so is a paragraph of valid or test that is a part of a
paragraph of training: no paragraph is in two splits. Texts that are then shorter than 24 characters or four words are
dropped.

Splitting.  By module, so that no docstring of a module is in training while its neighbour is in test. Modules form
groups: each package of the *package* task, NumPy, the reference's topics, and the rest. The largest module of a group
is in training. The others, in the order of a hash of their names, go to test and then to valid, as long as the split's
share of the group is not exceeded (share of docstrings for a package of the task, of characters elsewhere). If no
module fits, the smallest one is taken. Pretraining and the tokenizer use the training split only.
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
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<|endoftext|>"]  # ids 0 .. 5
VOCABULARY = 2048
SOURCE_CHARACTERS = 4_400_000  # of 12 million: about a million tokens for training
SHARES = {"package": (0.20, 0.10), "other": (0.08, 0.04)}  # (test, valid) of a group's size
LIMIT = 3_000_000  # bytes of text.json.xz
SPLITS = ("train", "valid", "test")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

# Packages with at least five modules, without test modules, in each of Python 3.10, 3.11, 3.12 and 3.13, and
# the numbers of modules. Found by `count_modules` in the libraries of 3.10.13, 3.11.7, 3.12.1 and 3.13.0;
# `main` checks the libraries that it is given. (distutils and lib2to3 were removed, re and tomllib are too new
# or too small, and dbm, html, logging, xmlrpc and zoneinfo are too small.)
CLASSES = {
    "asyncio": (31, 33, 33, 33),
    "concurrent": (5, 5, 5, 5),
    "ctypes": (9, 9, 9, 9),
    "curses": (5, 5, 5, 5),
    "email": (29, 29, 29, 29),
    "encodings": (122, 122, 122, 122),
    "http": (5, 5, 5, 5),
    "idlelib": (60, 60, 60, 60),
    "importlib": (18, 24, 24, 25),
    "json": (5, 5, 5, 5),
    "multiprocessing": (23, 23, 23, 23),
    "tkinter": (14, 14, 14, 13),
    "turtledemo": (21, 21, 21, 21),
    "unittest": (13, 13, 13, 13),
    "urllib": (6, 6, 6, 6),
    "wsgiref": (6, 7, 7, 7),
    "xml": (22, 22, 22, 22),
}


# ---------------------------------------------------------------------------------------------------- which modules


def is_test(module: str) -> bool:
    """True if a part of the dotted name is `test`, `tests`, `idle_test`, `test_*`, `*_test` or `*_tests`."""
    return any(part in ("test", "tests") or re.match(r"_?test_|.*_tests?$", part) for part in module.split("."))


def modules(lib: Path, package: str = "") -> dict[str, Path]:
    """{dotted name: file} of the modules of a library or one package, without tests and generated modules."""
    found = {}
    for file in sorted((lib / package).rglob("*.py")):
        parts = list(file.relative_to(lib).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        module = ".".join(parts)
        if parts and not is_test(module) and not any(is_generated(part) for part in parts):
            found[module] = file
    return found


def is_generated(part: str) -> bool:
    """True for a folder or module that belongs to a platform or an installation, not to the library."""
    return part.startswith(("config-", "_sysconfigdata")) or part in ("site-packages", "lib-dynload")


def count_modules(lib: Path) -> dict[str, int]:
    """The number of modules of each package of a standard library: the numbers in CLASSES."""
    counts = collections.Counter(module.split(".")[0] for module in modules(lib))
    return {package: n for package, n in sorted(counts.items()) if n >= 5}


# ---------------------------------------------------------------------------------------------------- what they say


def parse(text: str) -> ast.Module:
    """The syntax tree of a source. Warnings about escapes in old sources are ignored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text)


def docstrings(tree: ast.Module) -> list[str]:
    """Every docstring in a module, outermost first, dedented. NumPy's C functions have theirs in `add_newdoc` calls."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED):
            found.append(ast.get_docstring(node) or "")
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "add_newdoc":
            constants = [part.value for part in ast.walk(node.args[-1]) if isinstance(part, ast.Constant)]
            texts = [value for value in constants if isinstance(value, str)]
            found += [inspect.cleandoc(text) for text in texts if len(text) > 40]
    return found


def c_docstrings() -> dict[str, list[str]]:
    """{module: docstrings} of the extension modules of the Python that runs this, and of NumPy's ufuncs."""
    import numpy

    extensions = Path(os.__file__).parent.glob("lib-dynload/*.so")
    names = set(sys.builtin_module_names) | {file.name.split(".")[0] for file in extensions}
    found = {}
    for name in sorted(names):
        if "test" in name or name.startswith("xx"):
            continue
        objects = list(vars(importlib.import_module(name)).values())
        for cls in [thing for thing in objects if isinstance(thing, type)]:
            objects += vars(cls).values()
        found[name] = distinct_docstrings(objects)
    found["numpy._core.umath"] = distinct_docstrings([f for f in vars(numpy).values() if isinstance(f, numpy.ufunc)])
    return found


def distinct_docstrings(objects: list) -> list[str]:
    """The docstrings of objects at run time, each once, dedented."""
    texts = [getattr(thing, "__doc__", None) for thing in objects]
    texts = [text for text in texts if isinstance(text, str)]
    return [inspect.cleandoc(text) for text in dict.fromkeys(texts)]


def comments(text: str) -> list[str]:
    """The texts of whole-line comments, often the best prose in a library. Adjacent lines are one text."""
    runs = []
    last = None  # row and column of the previous comment
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line.strip().startswith("#"):
            row, column = token.start
            if (row - 1, column) != last:
                runs.append([])
            runs[-1].append(re.sub(r"^#+[:!]?", "", token.string))
            last = (row, column)
    return [textwrap.dedent("\n".join(run)) for run in runs]


def notices(raw: dict[str, list[str]]) -> list[str]:
    """The copyright notices in a file's comments and at the end of its docstrings. They go to LICENSES.txt."""
    found = [run for run in raw["prose"] if NOTICE.search(run)]
    for text in raw["docstring"]:
        paragraphs = text.split("\n\n")
        for i, paragraph in enumerate(paragraphs):
            if NOTICE.search(paragraph):
                found.append("\n\n".join(paragraphs[i:]))
                break
    return [text.strip() for text in found]


def without_docstrings(text: str, tree: ast.Module) -> str:
    """The source without docstrings (`pass` where one was the whole body), trailing spaces and repeated blank lines."""
    lines = text.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, DOCUMENTED) or ast.get_docstring(node, clean=False) is None:
            continue
        doc = node.body[0]
        first, last = doc.lineno - 1, doc.end_lineno - 1
        before = lines[first].encode()[: doc.col_offset].decode()  # ast counts bytes
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


# ---------------------------------------------------------------------------------------------------- cleaning

# "- a", "2) a", "name -- a", "name : a"
BULLET = re.compile(r"\s*([-*+•]\s|\(?\w{1,2}[.)]\s|[\w*'\"`.,()\[\]]+\s*(--?|:)\s)")
NOTICE = re.compile(
    r"(?i)copyright\W+(\(c\)\W*)?(\d{4}|disney)|copyrighttext|permission (to use|is hereby)"
    r"|all rights reserved|redistribut"
)
WORD = re.compile(r"""["'`*(\[]*[A-Za-z][A-Za-z'’/-]*["'`*)\].,;:!?]*$""")


def is_code(block: str) -> bool:
    """True for code, grammar, tables and rulers, which are not sentences."""
    if re.search(r"::=|^\s*(>>>|\$ |%|@\w)|[=+|-]{6}|\|.*\|.*\|", block, re.M) or "\x00" in block:
        return True
    tokens = block.split()
    if sum(bool(WORD.match(token)) for token in tokens) < 0.6 * len(tokens):
        return True
    try:
        return bool(parse(textwrap.dedent(block)).body)  # a sentence is hardly ever a valid program
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def unwrap(block: str) -> str:
    """One line per item: a line that continues the previous line is joined to it.

    It continues the previous line if it has the same indentation and no bullet, and the previous line was full or it
    begins with a lower-case letter.
    """
    items = []
    indent = -1  # where the text of the previous line begins
    full = False  # the previous line was full
    for line in block.split("\n"):
        own_indent = len(line) - len(line.lstrip())
        text = " ".join(line.split())
        if items and own_indent == indent and not BULLET.match(line) and (full or line.lstrip()[:1].islower()):
            items[-1] += " " + text
        else:
            items.append(text)
        marker = re.match(r"\s*([-*+•]|\(?\w{1,2}[.)])\s+", line)
        indent = len(marker[0]) if marker else own_indent  # an item's text begins after its mark
        full = len(line.strip()) > 40
    return "\n".join(items)


def key(text: str) -> str:
    """The text in lower case with single spaces. Two texts with the same key count as the same text."""
    return " ".join(text.lower().split())


def clean(text: str, seen: set[str], training: str = "") -> str:
    """The paragraphs of sentences, separated by blank lines; "" if nothing is left.

    seen        keys of the paragraphs of earlier records; the keys of this text are added
    training    a paragraph whose key is a part of this text is dropped
    """
    text = text.expandtabs().replace("\r", "").replace("\f", "\n")
    text = re.sub(r":[\w:-]+:`~?([^`<]*?)(\s*<[^`]*>)?`", r"`\1`", text)  # :func:`x` -> `x`
    text = re.sub(r"(?m)^\s*([-=*~^#\"_.+])\1{2,}\s*$", "", text.replace("``", "`"))  # underlines
    text = re.sub(r"(?m)^\s*\.\. .*$|(?m:[ ]+$)", "", text)  # directives (.. note::), spaces at the end of a line
    text = text.replace("::\n", ":\n")
    kept = []
    for block in re.split(r"\n\s*\n", text):
        if ">>>" in block:  # a doctest ends at a blank line
            block = block[: block.index(">>>")].rstrip(" \n")
        if len(block.strip()) < 12 or NOTICE.search(block) or is_code(block):
            continue
        paragraph = unwrap(block)
        if key(paragraph) not in seen and key(paragraph) not in training:
            seen.add(key(paragraph))
            kept.append(paragraph)
    whole = "\n\n".join(kept)
    return whole if len(whole) >= 24 and len(whole.split()) >= 4 else ""


# ---------------------------------------------------------------------------------------------------- splitting


def group(module: str) -> str:
    """The group within which a module is split."""
    top = module.split(".")[0]
    return top if top in CLASSES or top in ("numpy", "reference") else "rest"


def order(module: str) -> str:
    """A sort key that shuffles modules, the same on every machine."""
    return hashlib.sha256(f"tinyft {module}".encode()).hexdigest()


def split(sizes: dict[str, int]) -> dict[str, str]:
    """{module: "train" | "valid" | "test"} for {module: size}, as described at the top of this file."""
    groups = collections.defaultdict(list)
    for module in sorted(sizes, key=order):
        groups[group(module)].append(module)
    split_of = {}
    for name, members in sorted(groups.items()):
        shares = SHARES["package" if name in CLASSES else "other"]
        split_of |= split_group({module: sizes[module] for module in members}, shares)
    return split_of


def split_group(sizes: dict[str, int], shares: tuple[float, float]) -> dict[str, str]:
    """{module: split} for one group, {module: size} in the order in which modules are tried.

    shares   the largest shares of test and of valid in the group's size
    """
    total = sum(sizes.values())
    largest = max(sizes, key=sizes.get)
    split_of = {}
    for part, share in zip(("test", "valid"), shares, strict=True):
        used = 0
        free = [module for module in sizes if module not in split_of and module != largest]
        for module in free:
            if used + sizes[module] <= share * total:
                split_of[module] = part
                used += sizes[module]
        if not used:  # no module fits into the share
            split_of[min(free, key=sizes.get)] = part
    for module in sizes:
        split_of.setdefault(module, "train")
    return split_of


# ---------------------------------------------------------------------------------------------------- making


NOT_READ = ("lib2to3.pgen2.literals", "this", "antigravity", "__")


def gather(libs: list[Path], numpy: Path) -> dict[str, dict[str, list[str]]]:
    """{module: {kind: [raw texts]}} of the libraries, the reference and NumPy."""
    topics = reference(libs[0] / "pydoc_data/topics.py")
    raw = {module: {"prose": [text]} for module, text in topics.items()}
    files = {}
    for lib in libs:
        files = {**modules(lib), **files}  # an earlier library wins
    files = {**files, **modules(numpy.parent, "numpy")}
    for module, file in sorted(files.items()):
        if module != "pydoc_data.topics" and not module.startswith(NOT_READ):
            raw[module] = raw_texts(module, file)
    for module, texts in c_docstrings().items():
        raw.setdefault(module, {}).setdefault("docstring", []).extend(texts)
    return raw


def raw_texts(module: str, file: Path) -> dict[str, list[str]]:
    """{kind: [raw texts]} of one module. NumPy gives docstrings only."""
    with tokenize.open(file) as stream:
        text = stream.read()
    tree = parse(text)
    if module.startswith("numpy"):
        return {"prose": [], "docstring": docstrings(tree)}
    return {"prose": comments(text), "docstring": docstrings(tree), "source": [without_docstrings(text, tree)]}


def write_licences(raw: dict[str, dict[str, list[str]]], lib: Path, numpy: Path) -> None:
    """Write Python's licence, NumPy's own licence and the notices of single files.

    NumPy's licence file also has the licences of compiled code bundled with it; no text of that code is here.
    """
    python_licence = (lib / "LICENSE.txt").read_text("utf-8").strip()
    numpy_file = next(numpy.parent.glob("numpy-*.dist-info/licenses/LICENSE.txt"))
    numpy_licence = numpy_file.read_text("utf-8").split("\n----")[0].strip()
    single = {}  # each notice once
    for _, kinds in sorted(raw.items()):
        if "source" in kinds:
            single |= {key(text): text for text in notices(kinds)}
    parts = {
        "Python: the language reference, docstrings, comments and sources of the standard library": python_licence,
        "NumPy: its docstrings": numpy_licence,
        "Notices in single files of the standard library": "\n\n----\n\n".join(single.values()),
    }
    rule = "=" * 120
    whole = "text.json.xz and names.json.xz hold text by others, cleaned and shortened by make.py and names.py, under "
    whole += "these licences; tinyft's own is MIT.\n\n"
    whole += "\n\n".join(f"{rule}\n{title}\n{rule}\n\n{text}" for title, text in parts.items())
    lines = [line.rstrip() for line in whole.splitlines()]
    (HERE / "LICENSES.txt").write_text("\n".join(lines) + "\n", "utf-8")


KEYWORDS = ("def", "return", "if", "self", "for", "in", "import", "class", "not", "is", "None")


def is_table(source: str) -> bool:
    """True for sources that are mostly data, such as character maps and lists of names, and for very short ones."""
    words = re.findall(r"[A-Za-z_]{2,}|\d+|[^\sA-Za-z_\d]", source)
    keywords = sum(word in KEYWORDS for word in words)
    return keywords < 0.05 * len(words) or len(source) < 400


def size(module: str, kinds: dict[str, list[str]]) -> int:
    """The size of a module when its group is split: docstrings for a package of the task, characters elsewhere."""
    if group(module) in CLASSES:
        return sum(bool(clean(text, set())) for text in kinds.get("docstring", []))
    texts = kinds.get("prose", []) + kinds.get("docstring", [])
    return sum(len(clean(text, set())) for text in texts)


def records(raw: dict[str, dict[str, list[str]]]) -> list[list[str]]:
    """[module, kind, split, text] of all texts, sorted by kind and module."""
    sizes = {module: size(module, kinds) for module, kinds in raw.items()}
    split_of = split({module: n for module, n in sizes.items() if n})
    seen: set[str] = set()
    found = documentation(raw, split_of, seen) + sources(raw, split_of, seen)
    return sorted(found, key=lambda record: (record[1], record[0]))


def documentation(
    raw: dict[str, dict[str, list[str]]], split_of: dict[str, str], seen: set[str]
) -> list[list[str]]:
    """The records of prose and docstrings. A paragraph that occurs again is dropped.

    raw         {module: {kind: texts}}
    split_of    {module: split}
    seen        keys of the paragraphs of earlier records; keys are added

    Modules of train come first, so that a repeated paragraph stays in training. In each split modules whose names
    begin with an underscore come last: asyncio before _asyncio.
    """

    def priority(module: str) -> tuple:
        return SPLITS.index(split_of[module]), module.startswith("_"), module

    found = []
    training = ""
    for module in sorted(split_of, key=priority):
        if split_of[module] != "train" and not training:  # the first module after those of training
            training = "\n".join(sorted(seen))
        for kind in ("prose", "docstring"):
            for raw_text in raw[module].get(kind, []):
                text = clean(raw_text, seen, training)
                if text:
                    found.append([module, kind, split_of[module], text])
    return found


def sources(raw: dict[str, dict[str, list[str]]], split_of: dict[str, str], seen: set[str]) -> list[list[str]]:
    """The records of source code, about SOURCE_CHARACTERS in all, each text once."""
    found = []
    budget = SOURCE_CHARACTERS
    for module in sorted(split_of, key=order):
        for text in raw[module].get("source", []):
            if budget > 0 and len(text) < 60_000 and not is_table(text) and key(text) not in seen:
                seen.add(key(text))
                found.append([module, "source", split_of[module], text])
                budget -= len(text)
    return found


def train_tokenizer(texts: list[str], path: Path) -> None:
    """Train byte-level BPE as GPT-2's, special tokens first. It adds no special tokens to a text; tinyft.data does."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def check(folders: list[Path]) -> None:
    """Exit with one sentence unless the folders can be used."""
    if not folders:
        sys.exit("make wants the folders of standard libraries, newest first (.../lib/python3.13); got none")
    own = Path(os.__file__).parent
    if folders[0].resolve() != own.resolve():
        sys.exit(f"make wants the library of the Python that runs it, {own}, first; got {folders[0]}")
    for folder in folders:
        counts = count_modules(folder)
        missing = [package for package in CLASSES if package not in counts]
        if missing:
            sys.exit(f"make wants five modules of each class in {folder}; got fewer of {', '.join(missing)}")


def main(libs: list[str]) -> None:
    """Make all files from the folders of standard libraries, and print their sizes.

    sys.exit, before a file is written, if the text is larger than LIMIT."""
    import numpy

    from . import names

    folders = [Path(lib) for lib in libs]
    check(folders)
    numpy_folder = Path(numpy.__file__).parent
    raw = gather(folders, numpy_folder)
    found = records(raw)
    about = {"python": [folder.name for folder in folders], "numpy": numpy.__version__, "classes": list(CLASSES)}
    as_json = json.dumps({"about": about, "records": found}, ensure_ascii=False, separators=(",", ":"))
    packed = lzma.compress(as_json.encode(), preset=9 | lzma.PRESET_EXTREME)
    if len(packed) > LIMIT:
        sys.exit(f"make wants at most {LIMIT:,} bytes of text.json.xz, got {len(packed):,}: lower SOURCE_CHARACTERS")
    write_licences(raw, folders[0], numpy_folder)
    (HERE / "text.json.xz").write_bytes(packed)
    train_tokenizer([text for _, _, part, text in found if part == "train"], HERE / "tokenizer.json")
    print(f"{len(found):,} records, {len(packed):,} bytes, sha256 {hashlib.sha256(packed).hexdigest()[:16]}")
    texts = collections.defaultdict(list)
    for _, kind, part, text in found:
        texts[kind, part].append(text)
    names.write(folders, found)
    for (kind, part), some in sorted(texts.items()):
        print(f"  {kind:10} {part:6} {len(some):6,} texts  {sum(map(len, some)):10,} characters")


if __name__ == "__main__":
    main(sys.argv[1:])

"""The task *names*: the summary of a docstring -> the name of its function.

    "Return the list of archive files."  ->  get_archive_files

    name_pairs()                  all pairs that ship with tinyft, with their modules and splits
    read_name(answer)             the name in a model's answer

The scores are in scores.py, the baselines in name_baselines.py.
"""

from __future__ import annotations

import functools
import json
import lzma
import re
from typing import NamedTuple

from .. import checks
from ..keywords import checked_keywords
from .text import ASSETS, SPLITS


@checked_keywords
class NamePair(NamedTuple):
    """One example of *names*."""

    module: str  # "email.header"
    split: str  # "train" | "valid" | "test", the split of the module in the snapshot
    summary: str  # the first sentence of a docstring
    name: str  # words of lower-case letters and digits, joined by "_"


@checked_keywords
class Pairs(NamedTuple):
    """Prompts and the responses to learn, as many of one as of the other."""

    prompts: tuple[str, ...]
    responses: tuple[str, ...]


@functools.cache
def name_pairs() -> tuple[NamePair, ...]:
    """Every pair of *names*, in a fixed order (by split, then module). Read from disk once.

    `tinyft/assets/names.py` says where the pairs come from. Raises ValueError if the file is missing or damaged.
    """
    path = ASSETS / "names.json.xz"
    try:
        found = [NamePair(*pair) for pair in json.loads(lzma.decompress(path.read_bytes()))["pairs"]]
        if not all(isinstance(value, str) for pair in found for value in pair):
            raise ValueError("a pair holds something other than texts")
        if not {pair.split for pair in found} <= set(SPLITS):
            raise ValueError("a pair has an unknown split")
    except (OSError, EOFError, lzma.LZMAError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(f"name_pairs wants the file {path}, got no readable one: {error}") from error
    return tuple(found)


# ---------------------------------------------------------------------------------------------------- answers
FENCE = re.compile(r"```[a-z]*\n?")
DEFINITION = re.compile(r"\bdef\s+([A-Za-z_]\w*)")
QUOTED = re.compile(r"[`'\"]([A-Za-z_]\w*)(?:\([^`'\"]*\))?[`'\"]")
CALLED = re.compile(r"\b([A-Za-z_]\w*)\(")
JOINED = re.compile(r"\b([A-Za-z]\w*_\w+)\b")
IDENTIFIER = re.compile(r"[A-Za-z_]\w*")


@checked_keywords
def read_name(answer: str) -> str:
    """The name in an answer, in lower case; "" if there is none.

    An untuned model often answers with a sentence or with code. The name is the first of these that occurs:
    the name after `def`, a name in quotes, a name before "(", a name with "_", the first word.
    """
    checks.instance("read_name: answer", answer, str, "a string")
    text = FENCE.sub("", answer)
    for pattern in (DEFINITION, QUOTED, CALLED, JOINED, IDENTIFIER):
        match = pattern.search(text)
        if match:
            return match[match.lastindex or 0].lower()
    return ""

"""Patterns of module paths, such as "attn.[qv]".

    *        any characters but a dot: one name                  blocks.*.attn
    **       any characters: any number of names                 decoder.**.norm
    [qv]     one of these characters;  [0-3] one of a range;  [!q] any other one

The matcher keeps the set of all places in the pattern that it may be at, and never goes back. So its time is bounded
for every pattern, also for one from a damaged file.
"""
from __future__ import annotations

import re

LONGEST = 1000                                           # characters of a pattern
# One character of a pattern: a set in brackets, not empty; two stars or one; or any other character but a bracket.
TOKEN = re.compile(r"\[!?[^\[\]!][^\[\]]*\]|\*\*|\*|[^\[\]]")


def split(glob: str) -> list[str]:
    """The pattern in pieces: "**", "*", sets such as "[qv]", single characters. Empty if a bracket has no partner."""
    tokens = TOKEN.findall(glob)
    return tokens if "".join(tokens) == glob else []


def ends_in(path: str, glob: str) -> bool:
    """True if the pattern matches the path, or an end of it that begins after a dot."""
    tokens = split(glob)
    starts = [0, *(i + 1 for i, character in enumerate(path) if character == ".")]
    return any(_matches(path[start:], tokens) for start in starts)


def _matches(text: str, tokens: list[str]) -> bool:
    """True if the whole text matches. Time grows with len(text) · len(tokens), whatever the pattern.

    `places` holds the numbers of tokens that may have been used up by the characters so far; a star may match no
    character, so the place behind it is reached with it."""
    places = _with_empty_stars({0}, tokens)
    for character in text:
        reached = set()
        for i in places - {len(tokens)}:
            if tokens[i] in ("*", "**"):
                if tokens[i] == "**" or character != ".":
                    reached.add(i)
            elif _is_in_set(character, tokens[i]):
                reached.add(i + 1)
        places = _with_empty_stars(reached, tokens)
    return len(tokens) in places


def _with_empty_stars(places: set[int], tokens: list[str]) -> set[int]:
    """The places, and those behind the stars that follow them."""
    found = set()
    for i in places:
        found.add(i)
        while i < len(tokens) and tokens[i] in ("*", "**") and i + 1 not in found:
            i += 1
            found.add(i)
    return found


def _is_in_set(character: str, token: str) -> bool:
    """True if a token, a character or a set in brackets, matches this character. "[!a-c]" is all but a, b and c."""
    if token[0] != "[" or len(token) == 1:
        return character == token
    negated = token[1] == "!"
    members = token[2:-1] if negated else token[1:-1]
    ranges = re.findall(r"(.)-(.)|(.)", members)
    inside_set = any(character == single if single else low <= character <= high for low, high, single in ranges)
    return inside_set != negated

"""Patterns of module paths against a slow matcher that tries everything; and patterns made to hang."""
from __future__ import annotations

from helpers import host_only
from hypothesis import given
from hypothesis import strategies as st

from tinyft import patterns

pytestmark = host_only


def slow(text: str, tokens: list[str]) -> bool:
    """True if the whole text matches: every number of characters for every star."""
    if not tokens:
        return not text
    first, rest = tokens[0], tokens[1:]
    if first in ("*", "**"):
        stops = (n for n in range(len(text) + 1) if first == "**" or "." not in text[:n])
        return any(slow(text[n:], rest) for n in stops)
    return bool(text) and patterns._is_in_set(text[0], first) and slow(text[1:], rest)


@given(st.text("ab.", max_size=7), st.lists(st.sampled_from(["a", "b", ".", "*", "**", "[ab]", "[!a]"]), max_size=6))
def test_the_matcher_agrees_with_one_that_tries_everything(path, tokens):
    glob = "".join(tokens)
    pieces = patterns.split(glob)
    starts = [0, *(i + 1 for i, c in enumerate(path) if c == ".")]
    assert patterns.ends_in(path, glob) == any(slow(path[start:], pieces) for start in starts)


def test_the_meaning_of_stars_and_brackets_by_hand():
    yes = [("blocks.0.attn.q", "attn.[qv]"), ("blocks.0.attn.q", "blocks.*.attn.q"), ("blocks.3", "blocks.[0-3]"),
           ("blocks.0.attn.q", "blocks.**"), ("blocks.0.attn.q", "blocks.**.q"), ("a.k", "a.[!qv]"), ("a.q", "**")]
    no = [("blocks.0.attn.qkv", "attn.[qv]"), ("blocks.0.attn.q", "blocks.*.q"), ("blocks.4", "blocks.[0-3]"),
          ("battn.q", "attn.q"), ("a.q", "a.[!qv]"), ("a.x", "a."), ("a-b", "a.b")]
    assert all(patterns.ends_in(path, glob) for path, glob in yes)
    assert not any(patterns.ends_in(path, glob) for path, glob in no)


def test_a_bracket_without_a_partner_is_no_pattern():
    for glob in ("attn.[qv", "attn.qv]", "[]", "[!]", "[[q]]", ""):
        assert patterns.split(glob) == []
    assert patterns.split("a.[qv]*") == ["a", ".", "[qv]", "*"]


def test_a_forged_pattern_does_not_hang():
    """A matcher that goes back would take years for these."""
    path = "encoder.11.crossattention.output.dense"
    for glob in ("*[a-z]" * 60 + "!", "**e" * 80 + "!", "*" * 900 + "!"):
        assert not patterns.ends_in(path, glob)

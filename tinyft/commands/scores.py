"""The scores of generated texts, for `tinyft eval --generate` and `tinyft distill`.

    rows                     exact_match                                   token_f1
    the shipped `names`      the same words: "get lines" is get_lines      of the words
    source and target        the same text                                 of the words
    prompt and response      the same text
    messages                 the same text

White space around a text does not count. The words stand between underscores or spaces, as in data/scores.py.
"""
from __future__ import annotations

from collections.abc import Sequence

from ..data.files import Rows
from ..data.scores import exact_match, token_f1

__all__ = ["score_texts"]

NAMES = "names"                                          # the shipped text whose responses are names of functions


def score_texts(rows: Rows, wanted: Sequence[str], written: Sequence[str]) -> dict[str, float]:
    """{"exact_match": mean, "token_f1": mean} of N written texts; token_f1 only for names and targets of sources.

    rows      the data: their kind and their name decide how a text is compared
    wanted    N responses or targets of the data
    written   N texts of the model, in the same order

    ValueError unless both have the same length, at least 1."""
    wanted = [text.strip() for text in wanted]
    written = [text.strip() for text in written]
    f1 = float(token_f1(wanted, written).mean())         # raises for other lengths
    if rows.path == NAMES and rows.kind == "pairs":
        return {"exact_match": float(exact_match(wanted, written).mean()), "token_f1": f1}
    equal = sum(map(str.__eq__, wanted, written)) / len(wanted)
    if rows.kind == "sources":
        return {"exact_match": equal, "token_f1": f1}
    return {"exact_match": equal}

"""The data of a command: the rows of a file, or of a text that ships with tinyft, by its name.

    names      the first sentence of a docstring -> the name of its function          pairs
    intact     is a sentence intact, or were two of its words swapped?                labels
    package    which package of the standard library does a docstring come from?      labels
    prose      the language reference, docstrings and comments                        texts
    source     Python source code                                                     texts

Training data are of one split, test data of another: no module is in both. Test data are at most HELD_OUT rows, evenly
spread, and of long texts the first LONGEST characters.
"""
from __future__ import annotations

from ..data import Task, snapshot, task
from ..data.files import Rows, read_rows

__all__ = ["SHIPPED", "read_data"]

TASKS = ("names", "intact", "package")
TEXTS = ("prose", "source")
SHIPPED = (*TASKS, *TEXTS)
HELD_OUT = 200
LONGEST = 2000


def read_data(data: str, split: str = "train") -> Rows:
    """The rows of a data file, or of one of SHIPPED.

    split: of a shipped text, "train" or "test"; a file is read whole."""
    if data in TEXTS:
        kind, rows = "text", _texts(data, split, None if split == "train" else LONGEST)
    elif data in TASKS:
        kind, rows = _task_rows(task(data), split)
    else:
        return read_rows(data)
    if split != "train":
        count = min(HELD_OUT, len(rows))
        rows = [rows[i * len(rows) // count] for i in range(count)]
    return Rows(data, kind, tuple(rows), tuple(range(1, len(rows) + 1)))


def _texts(kind: str, split: str, longest: int | None) -> list[tuple[str]]:
    """The texts of one kind and split, each up to `longest` characters."""
    is_source = kind == "source"
    return [(record.text[:longest],) for record in snapshot()
            if record.split == split and (record.kind == "source") == is_source]


def _task_rows(found: Task, split: str) -> tuple[str, list[tuple]]:
    """("pairs", rows of a prompt and a response), or ("labelled", rows of a text and the name of its class)."""
    examples = getattr(found, split)
    if found.kind == "pairs":
        return "pairs", list(zip(examples.prompts, examples.responses, strict=True))
    classes = [found.classes[label] for label in examples.labels]
    return "labelled", list(zip(examples.texts, classes, strict=True))

"""Data files: .txt, .jsonl and .csv, read with every check. The columns of a file decide its kind.

    text                            "text"       texts for a language model
    text, label                     "labelled"   texts and their classes
    prompt, response                "pairs"      a prompt, and the response to learn
    source, target                  "sources"    a text for an encoder, and the text that a decoder writes for it
    prompt                          "prompts"    prompts to continue
    messages                        "chat"       [{"role": "user", "content": "..."}, {"role": "assistant", ...}, ...]

A .txt file is one text. A .jsonl file has one JSON object a line, a .csv file a first line with the names of the
columns; messages in a .csv file are JSON. Other columns are ignored. Every error is one sentence that names the line.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import checks
from ..files import check_ordinary

__all__ = ["COLUMNS", "ENDINGS", "Rows", "describe_line", "near_name", "read_rows"]

ENDINGS = (".txt", ".jsonl", ".csv")
# The kind of a file, and the columns of the list above that it has.
KINDS = {
    "labelled": ("text", "label"),
    "text": ("text",),
    "pairs": ("prompt", "response"),
    "sources": ("source", "target"),
    "prompts": ("prompt",),
    "chat": ("messages",),
}
COLUMNS = ("text", "label", "prompt", "response", "messages")
SOURCES = ("source", "target")  # a kind of their own only without any of COLUMNS: a "source" is often a note
ROLES = ("system", "user", "assistant")
# Columns of other libraries, and their names here.
SYNONYMS = {
    "sentence": "text", "content": "text", "document": "text", "labels": "label", "class": "label",
    "category": "label", "target": "label", "input": "prompt", "question": "prompt", "instruction": "prompt",
    "output": "response", "completion": "response", "answer": "response", "conversations": "messages",
    "conversation": "messages",
}  # fmt: skip
LONGEST_CELL = 1 << 27  # characters of one cell of a .csv file


@dataclass(frozen=True)
class Rows:
    """The rows of a data file.

    path    of the file
    kind    "text", "labelled", "pairs", "sources", "prompts" or "chat"
    rows    tuples of the columns of this kind: (text,), (text, label), (prompt, response), (source, target), (prompt,)
            or (messages,). A label is a string or a whole number; messages are a list of {"role": ..., "content": ...}
    lines   the line of the file at which each row begins, from 1
    """

    path: str
    kind: str
    rows: tuple[tuple, ...]
    lines: tuple[int, ...]

    def line(self, index: int) -> str:
        """The place of a row for an error message: "line 3 of train.jsonl"."""
        return describe_line(self.path, self.lines[index])


def describe_line(path: str | os.PathLike, line: int) -> str:
    """A line of a file in words: "line 3 of train.jsonl"."""
    return f"line {line} of {path}"


def read_rows(path: str | os.PathLike, *, split_lines: bool = False) -> Rows:
    """The rows of a .txt, .jsonl or .csv file.

    split_lines   True: each line of a .txt file is a row, without empty lines; else the whole file is one row

    FileNotFoundError, naming a near file, if there is none or if it is no ordinary file. ValueError, naming the line,
    for a file of another ending, a file without rows, bytes that are not UTF-8, JSON that is damaged, rows of several
    kinds, and values of a wrong kind.
    """
    checks.instance("read_rows: path", path, (str, os.PathLike), "the path of a file")
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        near = near_name(ending, ENDINGS)
        hint = f": did you mean {near}?" if near else ""
        raise ValueError(f"a data file wants the ending {', '.join(ENDINGS)}, got {path}{hint}")
    text = _read_text(path)
    if ending == ".txt":
        found = _lines_of_text(text) if split_lines else _whole_text(text)
    else:
        records = _json_records(path, text) if ending == ".jsonl" else _csv_records(path, text)
        found = _read_records(path, records)
    if not found:
        raise ValueError(f"{path} is empty: a data file wants at least one row")
    kind = found[0][1]
    for line, other, _ in found:
        if other != kind:
            raise ValueError(
                f"{describe_line(path, line)}: wanted the columns of line {found[0][0]}, {_columns(kind)}, "
                f"got {_columns(other)}"
            )
    return Rows(str(path), kind, tuple(row for _, _, row in found), tuple(line for line, _, _ in found))


def near_name(name: str, known: Any) -> str | None:
    """The known name that is most like this one, or None."""
    return next(iter(difflib.get_close_matches(name, list(known), 1, 0.6)), None)


# ---------------------------------------------------------------------------------------------------- the text
def _read_text(path: Path) -> str:
    """The content of an ordinary file of UTF-8. A mark of the byte order at its start is left out."""
    _check_file(path)
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        raise ValueError(f"{describe_line(path, line)} is not UTF-8: {e.reason}") from e


def _check_file(path: Path) -> None:
    """FileNotFoundError, naming a near file of the folder, unless this is an ordinary file."""
    try:
        check_ordinary(path)
    except FileNotFoundError as e:
        near = None
        if not os.path.lexists(path) and path.parent.is_dir():
            near = near_name(path.name, os.listdir(path.parent))
        hint = f": did you mean {path.parent / near}?" if near else ""
        raise FileNotFoundError(f"{e}{hint}") from e
    except (OSError, ValueError) as e:  # a name that is too long, or has a null byte
        raise FileNotFoundError(f"{checks.brief(str(path))} cannot be read ({e})") from e


Found = list[tuple[int, str, tuple]]  # (line, kind, row)


def _whole_text(text: str) -> Found:
    """The one row of a .txt file; no row for a file of white space."""
    return [(1, "text", (text,))] if text.strip() else []


def _lines_of_text(text: str) -> Found:
    """One row for each line of a .txt file that is not empty."""
    lines = text.split("\n")
    return [(i, "text", (line.rstrip("\r"),)) for i, line in enumerate(lines, 1) if line.strip()]


# ---------------------------------------------------------------------------------------------------- records
def _json_records(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of a .jsonl file. Empty lines are left out."""
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also split at U+2028, inside a string
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_object)
        except RecursionError:
            raise ValueError(f"{describe_line(path, number)} is nested too deeply") from None
        except json.JSONDecodeError as e:
            raise ValueError(f"{describe_line(path, number)} is no JSON: {e.msg} at character {e.colno}") from e
        except ValueError as e:
            raise ValueError(f"{describe_line(path, number)}: {e}") from e
        if not isinstance(record, dict):
            raise ValueError(f"{describe_line(path, number)} wants a JSON object, got {_kind_of(record)}")
        yield number, record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. ValueError if a key stands twice in it."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {checks.brief(twice)} stands twice")
    return values


def _csv_records(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, {column: cell}) of a .csv file. Empty lines are left out."""
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        names: list[str] | None = None
        start = 1
        for cells in reader:
            if cells and names is None:
                names = _header(path, start, cells)
            elif cells:
                if len(cells) != len(names):
                    raise ValueError(f"{describe_line(path, start)} wants {len(names)} cells, got {len(cells)}")
                yield start, dict(zip(names, cells))
            start = reader.line_num + 1
    except csv.Error as e:
        raise ValueError(f"{describe_line(path, start)} is no CSV: {e}") from e
    finally:
        csv.field_size_limit(limit)


def _header(path: Path, line: int, cells: list[str]) -> list[str]:
    """The names of the columns. ValueError if a name stands twice."""
    names = [cell.strip() for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{describe_line(path, line)}: the column {checks.brief(name)} stands twice")
    _kind_of_columns(path, line, names)  # an error in the header names the header's line
    return names


# ---------------------------------------------------------------------------------------------------- rows
def _read_records(path: Path, records: Iterator[tuple[int, dict[str, Any]]]) -> Found:
    """The rows of the records, each with its line and its kind."""
    is_csv = path.suffix.lower() == ".csv"
    found = []
    for line, record in records:
        kind = _kind_of_columns(path, line, record)
        if is_csv and kind == "chat":
            record = _with_json(path, line, record)
        try:
            row = tuple(_read_value(column, record[column]) for column in KINDS[kind])
        except (TypeError, ValueError) as e:
            raise ValueError(f"{describe_line(path, line)}: {e}") from e
        found.append((line, kind, row))
    return found


def _kind_of_columns(path: Path, line: int, names: Any) -> str:
    """The kind with these columns. ValueError if there is none; the message names a near column."""
    known = [column for column in COLUMNS if column in names]
    others = [name for name in names if name not in known]
    found = [kind for kind, columns in KINDS.items() if set(columns) == set(known)]
    wanted = (
        f"{describe_line(path, line)}: a row wants text, text and label, prompt and response, source and target, "
        "or messages"
    )
    if not known and all(column in names for column in SOURCES):
        return "sources"
    for name in others:
        near = SYNONYMS.get(name.lower()) or near_name(name.lower(), COLUMNS)
        # Beside a text, a column such as "category" may be anything; beside a prompt, "answer" is the response.
        is_meant = not found or found == ["prompts"] or (found == ["text"] and near_name(name, ["label"]))
        if near and near not in known and is_meant:
            raise ValueError(f"{wanted}, got the column {checks.brief(name)}: did you mean {near!r}?")
    if found:
        return found[0]
    got = " and ".join(known) or ", ".join(map(checks.brief, names)) or "no column"
    raise ValueError(f"{wanted}, got {got}")


def _columns(kind: str) -> str:
    """The columns of a kind in words."""
    return " and ".join(KINDS[kind])


def _with_json(path: Path, line: int, record: dict[str, str]) -> dict[str, Any]:
    """The record of a .csv file with its cell `messages` read as JSON."""
    try:
        messages = json.loads(record["messages"], object_pairs_hook=_object)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{describe_line(path, line)}: messages is no JSON: {e}") from e
    return {**record, "messages": messages}


def _read_value(column: str, value: Any) -> Any:
    """The value of a column, checked. TypeError or ValueError for another kind of value."""
    if column == "messages":
        return _read_messages(value)
    if column == "label" and type(value) is int:
        return value
    if not isinstance(value, str):
        wanted = "a string or a whole number" if column == "label" else "a string"
        raise TypeError(f"{column} wants {wanted}, got {_kind_of(value)}")
    _check_characters(column, value)
    if column == "label" and not value.strip():
        raise ValueError("label wants the name of a class, got an empty string")
    return value


def _check_characters(name: str, text: str) -> None:
    """ValueError for half a character of UTF-16, which JSON can hold and no file of UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{name} wants characters of Unicode, got half of one at position {e.start}") from e


def _read_messages(messages: Any) -> list[dict[str, str]]:
    """The messages of a chat, each {"role": ..., "content": ...}. TypeError or ValueError for anything else.

    A chat wants a user turn before the first assistant turn. A system message stands at its start, or there is none.
    """
    if not isinstance(messages, list):
        raise TypeError(f"messages wants a list of objects with role and content, got {_kind_of(messages)}")
    read = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise TypeError(f"message {number} wants an object with role and content, got {_kind_of(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                got = _kind_of(message[key]) if key in message else f"only {', '.join(message) or 'nothing'}"
                raise TypeError(f"message {number} wants a string {key}, got {got}")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            near = near_name(role, ROLES)
            hint = f": did you mean {near!r}?" if near else ""
            raise ValueError(f"message {number} wants a role of {', '.join(ROLES)}, got {checks.brief(role)}{hint}")
        _check_characters(f"message {number}", content)
        read.append({"role": role, "content": content})
    _check_turns([message["role"] for message in read])
    return read


def _check_turns(roles: list[str]) -> None:
    """ValueError unless a chat has a user turn, no assistant turn before it, and a system message only at its start.

    Two turns of one role may follow each other."""
    if "user" not in roles:
        raise ValueError("a chat wants a user turn, got none")
    turns = roles[1:] if roles[0] == "system" else roles
    if "system" in turns:
        raise ValueError("a chat wants its system message at the start, got one later")
    if turns[0] != "user":
        raise ValueError("a chat wants a user turn before the first assistant turn, got none")


def _kind_of(value: Any) -> str:
    """A value of JSON in words, for an error message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"the number {checks.brief(value)}"
    kinds = {str: "a string", list: "a list", dict: "an object"}
    return f"{kinds[type(value)]}, {checks.brief(value)}"

"""Read GGUF files, and check every length: metadata, and tensors as views of the memory-mapped file.

This module knows the format only, and nothing about models.

    file = read_gguf("model.gguf")
    file.metadata["general.architecture"]                  a number, a text, a Boolean, or a list or array of these
    file.tensors["token_embd.weight"]                      a StoredTensor: its type, its shape, its bytes

All numbers are little-endian. A text is its length (8 bytes) and its UTF-8 bytes.

    "GGUF"   version (4)   number of tensors (8)   number of keys (8)
    for each key:      name   type (4)   value; an array is: type of its entries (4)   number of entries (8)   entries
    for each tensor:   name   number of axes (4)   sizes, the innermost first (8 each)   type (4)   offset (8)
    padding up to a multiple of general.alignment
    the tensors, each at its offset, which counts from the end of the padding

The numbers in brackets are sizes in bytes. Every count, length and offset is compared with the size of the file before
anything is allocated. A damaged file raises a ValueError of one line, and the time and memory that this takes stay
within a small multiple of the file's size.
"""
from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from ..compress import FORMATS
from ..compress.ggml import BLOCK
from ..files import check_ordinary

__all__ = ["GGUFFile", "StoredTensor", "read_gguf"]

VERSIONS = (2, 3)
# The codes of the tensor types that are read. Then those of other types, to name them in an error message.
DENSE_TYPES = {0: "F32", 1: "F16", 30: "BF16"}
PACKED_TYPES = {2: "Q4_0", 3: "Q4_1", 8: "Q8_0"}
OTHER_TYPES = {
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(bfloat16)}
READABLE = (*DTYPES, *FORMATS)
# Metadata: the dtype of a number, by the code of its type.
NUMBERS = {
    0: np.dtype("u1"), 1: np.dtype("i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"),
    5: np.dtype("<i4"), 6: np.dtype("<f4"), 10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8"),
}
BOOLEAN, TEXT, ARRAY = 7, 8, 9                           # the codes of the other types
# The smallest sizes in bytes. With them a count can be compared with the bytes that are left in the file.
LEAST_BYTES = {BOOLEAN: 1, TEXT: 8, ARRAY: 12}           # of an entry of an array, by the code of its type
KEY_BYTES = 8 + 4 + 1                                    # an empty name, its type, a value of one byte
TENSOR_BYTES = 8 + 4 + 8 + 4 + 8                         # an empty name, the number of axes, one size, type, offset
# Limits far above those of real files.
MOST_KEYS = 1 << 16
MOST_TENSORS = 1 << 16
MOST_TEXTS = 1 << 21                                     # in all arrays together; a vocabulary has up to 1 << 18
LONGEST_TEXT = 1 << 22                                   # bytes
LONGEST_NAME = 128                                       # bytes of a tensor's name; llama.cpp takes 64
LONGEST_KEY = 1 << 12
DEEPEST = 4                                              # arrays inside each other
AXES = 4                                                 # of a tensor


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    kind   "F32", "F16", "BF16", "Q4_0", "Q4_1" or "Q8_0"
    shape  in the order of NumPy, the innermost axis last: a weight is (out, in)
    data   its bytes, a view (N,) uint8 of the mapped file"""
    kind: str
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def is_packed(self) -> bool:
        """True for a type of 4 or 8 bits a weight, in blocks along the innermost axis."""
        return self.kind in FORMATS

    def dense(self) -> np.ndarray:
        """The values in their own dtype, a view of the file. For a dense type."""
        return self.data.view(DTYPES[self.kind]).reshape(self.shape)

    def blocks(self) -> np.ndarray:
        """The blocks (..., in/32, bytes) uint8, a view of the file. For a packed type."""
        size = FORMATS[self.kind].block_bytes()
        return self.data.reshape(*self.shape[:-1], self.shape[-1] // BLOCK, size)


@dataclass(frozen=True)
class GGUFFile:
    """The content of a GGUF file: {key: value} of its metadata and {name: tensor}."""
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_gguf(file: Path) -> GGUFFile:
    """The metadata and tensors of one GGUF file, of version 2 or 3.

    FileNotFoundError if it is missing or no ordinary file. ValueError if it is damaged, of another version or byte
    order, or holds a tensor of a type that is not read here."""
    check_ordinary(file)
    try:
        if file.stat().st_size < 8:
            raise ValueError("is damaged: a GGUF file is longer than 8 bytes")
        data = np.memmap(file, np.uint8, "r").view(np.ndarray)       # slices of a plain array cost less
        return _read(Cursor(data))
    except ValueError as e:                              # its message continues the file's name: "is damaged: ..."
        raise ValueError(f"{file} {e}") from e


def _read(cursor: Cursor) -> GGUFFile:
    """The content of the memory-mapped file. The message of a ValueError continues the file's name."""
    check_version(cursor)
    tensor_count = cursor.count("number of tensors", TENSOR_BYTES, MOST_TENSORS)
    key_count = cursor.count("number of keys", KEY_BYTES, MOST_KEYS)
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.text("the name of a key", LONGEST_KEY)
        if key in metadata:
            raise ValueError(f"is damaged: the key {shown(key)} stands twice")
        metadata[key] = cursor.value(f"the value of {shown(key)}")
    entries = {}
    for _ in range(tensor_count):
        name, entry = read_entry(cursor)
        if name in entries:
            raise ValueError(f"is damaged: the tensor {shown(name)} stands twice")
        entries[name] = entry
    return GGUFFile(metadata, place_tensors(cursor, entries, read_alignment(metadata)))


def check_version(cursor: Cursor) -> None:
    """ValueError unless the file begins as a little-endian GGUF file of a version that is read here."""
    magic = bytes(cursor.take(4, "the first four bytes"))
    if magic != b"GGUF":
        raise ValueError(f"is no GGUF file: wanted the first four bytes b'GGUF', got {magic!r}")
    version = cursor.number(NUMBERS[4], "the version")
    if version and version & 0xFFFF == 0:                # a small number with its bytes in the other order
        raise ValueError("holds big-endian numbers: wanted a little-endian GGUF file")
    if version not in VERSIONS:
        raise ValueError(f"is a GGUF file of version {version}: wanted version 2 or 3")


class Cursor:
    """A position in the bytes of a file.

    Each method reads a value at the position and moves the position to the end of the value. It raises ValueError if
    the file is damaged there. what: the name of the value in words, for the message."""

    def __init__(self, data: np.ndarray):
        self.data = data                                 # (N,) uint8
        self.bytes = memoryview(data)
        self.position = 0
        self.texts_left = MOST_TEXTS

    def left(self) -> int:
        """The number of bytes after the position."""
        return len(self.bytes) - self.position

    def take(self, count: int, what: str) -> memoryview:
        """The next bytes."""
        if count > self.left():
            raise ValueError(f"is damaged: {what} ends behind the end of the file")
        start = self.position
        self.position += count
        return self.bytes[start:self.position]

    def number(self, dtype: np.dtype, what: str) -> int | float:
        """The next number, as an int or a float."""
        return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()

    def count(self, what: str, least_bytes: int, most: int) -> int:
        """The next count, in 8 bytes: of things that have at least `least_bytes` bytes each. At most `most`."""
        count = self.number(NUMBERS[10], f"the {what}")
        room = min(most, self.left() // least_bytes)
        if count > room:
            raise ValueError(f"is damaged: the {what} is {count:,}, and at most {room:,} fit")
        return count

    def text(self, what: str, longest: int = LONGEST_TEXT) -> str:
        """The next text."""
        length = self.count(f"length of {what}", 1, longest)
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"is damaged: {what} is no UTF-8 text") from None

    def value(self, what: str) -> Any:
        """The next value of a key: first the code of its type, then the value itself."""
        return self.value_of(self.number(NUMBERS[4], f"the type of {what}"), what, depth=0)

    def value_of(self, code: int, what: str, depth: int) -> Any:
        """The next value of the type with this code. depth: the number of arrays around it."""
        if code in NUMBERS:
            return self.number(NUMBERS[code], what)
        if code == BOOLEAN:
            return bool(self.booleans(1, what)[0])
        if code == TEXT:
            return self.text(what)
        if code == ARRAY:
            return self.array(what, depth + 1)
        raise ValueError(f"is damaged: {what} has the unknown type {code}")

    def array(self, what: str, depth: int) -> Any:
        """The next array. Numbers and Booleans: a NumPy array, a view of the file. Texts and arrays: a list."""
        if depth > DEEPEST:
            raise ValueError(f"is damaged: {what} holds more than {DEEPEST} arrays inside each other")
        code = self.number(NUMBERS[4], f"the type of the entries of {what}")
        if code not in NUMBERS and code not in LEAST_BYTES:
            raise ValueError(f"is damaged: the entries of {what} have the unknown type {code}")
        size = NUMBERS[code].itemsize if code in NUMBERS else LEAST_BYTES[code]
        count = self.count(f"number of entries of {what}", size, len(self.bytes))
        if code in NUMBERS:
            return np.frombuffer(self.take(count * size, what), NUMBERS[code])
        if code == BOOLEAN:
            return self.booleans(count, what)
        self.texts_left -= count                         # arrays count, too: each is a Python object, as a text is
        if self.texts_left < 0:
            raise ValueError(f"is damaged: its lists hold more than {MOST_TEXTS:,} texts and arrays")
        if code == TEXT:
            return self.texts(count, what)
        return [self.array(what, depth + 1) for _ in range(count)]

    def booleans(self, count: int, what: str) -> np.ndarray:
        """The next Booleans, one byte each."""
        values = np.frombuffer(self.take(count, what), np.uint8)
        if (values > 1).any():
            raise ValueError(f"is damaged: {what} wants 0 or 1 for a Boolean, got {values.max()}")
        return values.view(bool)

    def texts(self, count: int, what: str) -> list[str]:
        """The next texts, as from `count` calls of `text`. The loop is written for speed: a vocabulary is long."""
        data = self.bytes
        unpack = struct.Struct("<Q").unpack_from
        end = self.position
        texts = []
        for _ in range(count):
            start = end + 8
            if start > len(data):
                break
            end = start + unpack(data, start - 8)[0]
            if end > len(data):
                break
            texts.append(bytes(data[start:end]))
        if len(texts) < count:
            raise ValueError(f"is damaged: {what} ends behind the end of the file")
        self.position = end
        try:
            return [text.decode() for text in texts]
        except UnicodeDecodeError:
            raise ValueError(f"is damaged: {what} holds a text that is not UTF-8") from None


# ── tensors ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Entry:
    """One row of the table of tensors. offset: in bytes, from the place where the tensors begin."""
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_entry(cursor: Cursor) -> tuple[str, Entry]:
    """(name, entry) of the next tensor in the table."""
    name = cursor.text("the name of a tensor", LONGEST_NAME)
    what = f"the tensor {shown(name)}"
    axes = cursor.number(NUMBERS[4], f"the number of axes of {what}")
    if not 1 <= axes <= AXES:
        raise ValueError(f"is damaged: {what} has {axes} axes; wanted 1 to {AXES}")
    sizes = [cursor.number(NUMBERS[10], f"a size of {what}") for _ in range(axes)]
    if min(sizes) < 1:
        raise ValueError(f"is damaged: {what} has an axis of size 0")
    code = cursor.number(NUMBERS[4], f"the type of {what}")
    offset = cursor.number(NUMBERS[10], f"the offset of {what}")
    shape = tuple(reversed(sizes))
    kind = type_name(code, what)
    return name, Entry(kind, shape, offset, bytes_of(kind, shape, what))


def type_name(code: int, what: str) -> str:
    """The name of a tensor type that is read here. ValueError, with the name, for another one."""
    known = DENSE_TYPES | PACKED_TYPES
    if code not in known:
        named = OTHER_TYPES.get(code, f"number {code}")
        raise ValueError(f"holds {what} of the type {named}; tinyft reads the types {', '.join(READABLE)}")
    return known[code]


def bytes_of(kind: str, shape: tuple[int, ...], what: str) -> int:
    """The size of a tensor in bytes. Python's whole numbers do not overflow, however large a damaged shape is."""
    if kind in DTYPES:
        return math.prod(shape) * DTYPES[kind].itemsize
    if shape[-1] % BLOCK:
        raise ValueError(f"is damaged: {what} of the type {kind} wants rows of a multiple of {BLOCK} weights, "
                         f"got {shape[-1]:,}")
    return math.prod(shape) // BLOCK * FORMATS[kind].block_bytes()


def read_alignment(metadata: dict[str, Any]) -> int:
    """The number of which all offsets of tensors are multiples: general.alignment, or 32 if that is not given."""
    alignment = metadata.get("general.alignment", 32)
    is_power = type(alignment) is int and 8 <= alignment <= 1 << 20 and alignment & (alignment - 1) == 0
    if not is_power:
        raise ValueError("is damaged: general.alignment wants a power of two from 8 to 1,048,576, "
                         f"got {shown(alignment)}")
    return alignment


def place_tensors(cursor: Cursor, entries: dict[str, Entry], alignment: int) -> dict[str, StoredTensor]:
    """{name: tensor}, in the order of the table. The cursor stands at the end of the table.

    ValueError for an offset that is no multiple of the alignment, for data behind the end of the file, and for two
    tensors that share bytes."""
    begin = -(-cursor.position // alignment) * alignment     # rounded up
    end_of_file = len(cursor.bytes)
    tensors = {}
    for name, entry in entries.items():
        if entry.offset % alignment:
            raise ValueError(f"is damaged: the offset of the tensor {shown(name)} is {entry.offset:,}, "
                             f"no multiple of {alignment}")
        start = begin + entry.offset
        if start + entry.nbytes > end_of_file:
            raise ValueError(f"is damaged: the tensor {shown(name)} ends behind the end of the file")
        tensors[name] = StoredTensor(entry.kind, entry.shape, cursor.data[start:start + entry.nbytes])
    in_order = sorted(entries.items(), key=by_offset)
    for (first, a), (second, b) in zip(in_order, in_order[1:], strict=False):
        if a.offset + a.nbytes > b.offset:
            raise ValueError(f"is damaged: the tensors {shown(first)} and {shown(second)} share bytes")
    return tensors


def by_offset(item: tuple[str, Entry]) -> int:
    """The key by which tensors are sorted."""
    return item[1].offset


def is_one_of(value: Any, choices: Iterable[Any]) -> bool:
    """True if the value equals one of the choices and has its class.

    Metadata may hold an array where a text is expected, and `array == text` is no single Boolean."""
    return any(type(value) is type(choice) and value == choice for choice in choices)


def shown(value: Any) -> str:
    """A value of a file, as it stands in an error message: on one line, and cut if it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."

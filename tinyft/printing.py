"""The text that print(module) shows: a tree of its parts, with their shapes and what trains.

    GPT: 2,720 float32 parameters and 64 in edits; 64 train
      lora = LoRA(r=1, alpha=16.0, dropout=0.0, targets='attn.q')

    embed         Embedding           304  frozen    weight (19, 16), tied
    blocks.0-1    2 x PreNormBlock  1,140  32 train  each
      norm1       LayerNorm            32  frozen    weight (16,), bias (16,), eps=1e-05
      ...
        + lora    LowRank              32  trains    A (1, 16), B (16, 1)

Columns: the name; the class; the number of parameters in the part and all below it; what of them trains; the shapes.
A packed weight counts with the entries of its dense form, which are frozen:

      q           Linear          331,776  frozen    bias (576,)
        weight    Uniform         331,776  packed    affine (576, 576), 4 bits in groups of 64, 176,256 bytes
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

from . import array
from .tensor import Tensor

EDITS = "edits."                                         # an edit is the part `edits.<adapter name>` of its module


@runtime_checkable
class Tree(Protocol):
    """A module, as far as it is printed."""

    def parts(self) -> Iterator[tuple[str, Any]]:
        """(name, value) of every attribute: tensors, arrays, modules and settings."""
        ...

    def extra_repr(self) -> str:
        """Settings to show."""
        ...

    def named_parameters(self) -> dict[str, Tensor]:
        """{full name: tensor} of the module and of all below it; a shared tensor once."""
        ...


@runtime_checkable
class PackedTree(Tree, Protocol):
    """A packed weight, as far as it is printed: its settings are shown, and none of its arrays."""

    shape: tuple

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        ...

    def dequantize(self) -> Any:
        """The dense weight."""
        ...


class Row(NamedTuple):
    """One line of the tree."""

    depth: int
    name: str
    kind: str
    count: str
    trains: str
    details: str


def describe(module: Tree) -> str:
    """The whole text for a module: a headline, the attached methods, and one line for each part."""
    details = _details(module)
    head = f"{type(module).__name__}: {_summary(module)}"
    lines = [f"{head}; {details}" if details else head]
    for a in getattr(module, "_attached", ()):           # the methods on a model (edit.py)
        lines.append(f"  {a.name} = {a.method!r}")
    rows = _rows_below(module, depth=0)
    if rows:
        lines += ["", *_aligned(rows)]
    return "\n".join(lines)


def _summary(module: Tree) -> str:
    """The numbers of parameters in words: of the base, in edits, and of those that train."""
    parameters = module.named_parameters()
    packed = _packed_below(module)
    if packed:
        entries = sum(math.prod(weight.shape) for weight in packed)
        nbytes = sum(weight.nbytes for weight in packed)
        more = f"{entries:,} weights packed in {nbytes:,} bytes"
        return f"{_summary_of_parameters(parameters)}; {more}" if parameters else more
    return _summary_of_parameters(parameters)


def _packed_below(module: Tree) -> list[PackedTree]:
    """The packed weights of a module and of all below it, each once."""
    if isinstance(module, PackedTree):
        return [module]
    found: dict[int, PackedTree] = {}
    for _, part in module.parts():
        if isinstance(part, Tree):
            found |= {id(weight): weight for weight in _packed_below(part)}
    return list(found.values())


def _summary_of_parameters(parameters: dict[str, Tensor]) -> str:
    """The numbers of parameters in words; see _summary."""
    if not parameters:
        return "no parameters"
    in_edits = sum(p.size for name, p in parameters.items() if "edits" in name.split("."))
    total = sum(p.size for p in parameters.values()) - in_edits
    trained = sum(p.size for p in parameters.values() if p.requires_grad)
    dtypes = {str(p.dtype) for p in parameters.values()}
    dtype = f"{dtypes.pop()} " if len(dtypes) == 1 else ""
    text = f"{total:,} {dtype}parameters"
    if in_edits:
        text = f"{text} and {in_edits:,} in edits"
    if trained == total + in_edits:
        return f"{text}, all train"
    return f"{text}, all frozen" if trained == 0 else f"{text}; {trained:,} train"


def _rows_below(module: Tree, depth: int) -> list[Row]:
    """The lines of the parts of a module and of all below them. Neighbours of a list that look alike share theirs."""
    parts = [(name, value) for name, value in module.parts() if isinstance(value, Tree)]
    blocks = [_rows_of(name, part, depth) for name, part in parts]
    rows = []
    i = 0
    while i < len(blocks):
        n = 1
        while i + n < len(blocks) and _is_next(parts[i][0], parts[i + n][0], n) and _alike(blocks[i], blocks[i + n]):
            n += 1
        rows += blocks[i] if n == 1 else _shared(blocks[i], n)
        i += n
    return rows


def _rows_of(name: str, part: Tree, depth: int) -> list[Row]:
    """The line of one part, and those of all below it."""
    tensors = part.named_parameters().values()
    total = sum(p.size for p in tensors) + sum(math.prod(weight.shape) for weight in _packed_below(part))
    trained = sum(p.size for p in tensors if p.requires_grad)
    trains = f"{trained:,} train"
    if total == 0:
        trains = ""
    elif trained == total:
        trains = "trains"
    elif trained == 0:
        trains = "packed" if isinstance(part, PackedTree) else "frozen"
    shown = f"+ {name.removeprefix(EDITS)}" if name.startswith(EDITS) else name
    count = f"{total:,}" if total else ""
    return [Row(depth, shown, type(part).__name__, count, trains, _details(part)), *_rows_below(part, depth + 1)]


def _details(module: Tree) -> str:
    """The module's own tensors and buffers with their shapes, and its settings."""
    if isinstance(module, PackedTree):
        return module.extra_repr()
    texts = []
    for name, value in module.parts():
        if isinstance(value, Tensor):
            texts.append(f"{name} {tuple(value.shape)}")
        elif array.is_array(value):
            texts.append(f"{name} {tuple(value.shape)} {value.dtype} buffer")
    if getattr(module, "tied", False):
        texts.append("tied")
    texts.append(module.extra_repr())
    return ", ".join(text for text in texts if text)


def _is_next(first: str, name: str, n: int) -> bool:
    """True if `name` is n places behind `first` in the same list: blocks.2 behind blocks.0, for n = 2."""
    base, _, index = first.rpartition(".")
    return f"{base}." != EDITS and index.isdecimal() and name == f"{base}.{int(index) + n}"


def _alike(rows: list[Row], others: list[Row]) -> bool:
    """True if two parts have the same lines, apart from their own names."""
    return rows[0][2:] == others[0][2:] and rows[1:] == others[1:]


def _shared(rows: list[Row], n: int) -> list[Row]:
    """The lines of n parts that look alike, as one: the name blocks.0-3, the class 4 x PreNormBlock."""
    first = rows[0]
    base, _, index = first.name.rpartition(".")
    details = f"each; {first.details}" if first.details else "each"
    name = f"{base}.{index}-{int(index) + n - 1}"
    return [first._replace(name=name, kind=f"{n} x {first.kind}", details=details), *rows[1:]]


def _aligned(rows: list[Row]) -> list[str]:
    """The lines with their columns below each other."""
    names = ["  " * row.depth + row.name for row in rows]
    name_width = max(len(name) for name in names)
    kind_width = max(len(row.kind) for row in rows)
    count_width = max(len(row.count) for row in rows)
    trains_width = max(len(row.trains) for row in rows)
    lines = []
    for name, row in zip(names, rows):
        columns = [name.ljust(name_width), row.kind.ljust(kind_width), row.count.rjust(count_width),
                   row.trains.ljust(trains_width), row.details]
        lines.append("  ".join(columns).rstrip())
    return lines

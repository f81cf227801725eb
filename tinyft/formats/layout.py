"""The places of a model's tensors in a file, and the conversion in both directions.

A family (gpt2.py, bert.py) gives a table {name in the model: FileTensor}. Reading and writing use the same
table, so they agree.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import array
from ..nn import Module


@dataclass(frozen=True)
class FileTensor:
    """The place of one tensor of the model in a file.

    name        the tensor in the file
    shape       the shape in the model; a weight is (out, in)
    transposed  True if the file stores (in, out): GPT-2's Conv1D; on a square matrix both have the same shape
    third       0, 1 or 2 if the model's tensor is that third of the file's tensor: GPT-2 keeps q, k and v in one c_attn
    is_row      True if the file stores a vector (n,) as a row (1, n): Marian's final_logits_bias
    """
    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    third: int | None = None
    is_row: bool = False

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the file."""
        shape = self.shape
        if self.third is not None:
            shape = (3 * shape[0], *shape[1:])
        if self.is_row:
            shape = (1, *shape)
        return shape[::-1] if self.transposed else shape

    def read(self, stored: np.ndarray) -> np.ndarray:
        """The model's tensor, as a view of the tensor in the file."""
        whole = stored.T if self.transposed else stored
        if self.is_row:
            whole = whole[0]
        if self.third is None:
            return whole
        rows = self.shape[0]
        return whole[self.third * rows:(self.third + 1) * rows]


Table = dict[str, FileTensor]
BLOCK = 1 << 20                                          # bytes


@dataclass(frozen=True)
class Plan:
    """The model that a directory describes.

    config   the sizes, as the model's constructor takes them (GPTConfig, BERTConfig)
    head     "lm", "mlm", "classes" or None
    classes  the number of classes of a "classes" head, else 0
    pooler   True if the model has a pooler (BERT)
    """
    config: Any
    head: str | None
    classes: int = 0
    pooler: bool = False


def file_tensors(table: Table, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{name in the file: array} from {name in the model: array}: the inverse of `FileTensor.read`.

    The parts of a fused tensor are joined in the order of their thirds.
    """
    parts: dict[str, list[tuple[int, np.ndarray]]] = {}
    transposed = {}
    for name, place in table.items():
        part = arrays[name][None] if place.is_row else arrays[name]
        parts.setdefault(place.name, []).append((place.third or 0, part))
        transposed[place.name] = place.transposed
    out = {}
    for name, thirds in parts.items():
        ordered = [array for _, array in sorted(thirds, key=lambda part: part[0])]
        whole = np.concatenate(ordered) if len(ordered) > 1 else ordered[0]
        out[name] = np.ascontiguousarray(whole.T if transposed[name] else whole)
    return out


def cast(a: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """A copy of a in C order and of this dtype. OverflowError if a finite value would become infinite."""
    # A wider dtype holds every value. float16 and bfloat16 are equally wide, but float16 has the smaller range.
    may_overflow = dtype != a.dtype and dtype.itemsize <= a.dtype.itemsize
    b = np.empty(a.shape, dtype)
    for rows in blocks_of(a):
        with np.errstate(over="ignore"):
            b[rows] = a[rows]
        if may_overflow and not np.isfinite(b[rows][np.isfinite(a[rows])]).all():
            raise OverflowError(f"{name} holds a value too large for {dtype}: choose a wider dtype")
    return b


def blocks_of(a: np.ndarray) -> list[Any]:
    """Indices that cut an array into blocks of rows of about BLOCK bytes, so that work on it takes little memory."""
    if a.ndim == 0 or a.nbytes <= BLOCK:
        return [...]
    step = max(1, BLOCK * len(a) // a.nbytes)
    return [slice(start, start + step) for start in range(0, len(a), step)]


class ZeroGenerator(np.random.Generator):
    """A random generator that draws zeros: initialising a model whose values come from a file costs nothing."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))

    def normal(self, loc: float = 0.0, scale: float = 1.0, size: Any = None) -> Any:
        """Zeros of this shape on the backend in use, without memory of their own there either."""
        zero = array.asarray(np.zeros(1, np.float32))
        return array.xp(zero).broadcast_to(zero, size)


def add_stored_classifier(model: Any, classes: int) -> None:
    """Put the classifier of a file on a model, with zeros in its matrices: part of the model, not a new task head."""
    model.new_head(classes, ZeroGenerator())
    model.head_modules = ()


def set_parameters(model: Module, table: Table, read: Callable[[str, FileTensor], Any]) -> Module:
    """Replace the data of every parameter by the array read(its name, its place in the file); return the model.

    The arrays are made one after the other, so that no more than one of them exists twice at any time.
    AssertionError if names or shapes differ: then the family's table is wrong, not the file.
    """
    parameters = model.named_parameters()
    shapes = {name: p.shape for name, p in parameters.items()}
    if shapes != {name: place.shape for name, place in table.items()}:
        raise AssertionError("the tensor table of this family does not describe its model")
    for name, p in parameters.items():
        p.data = read(name, table[name])
    return model

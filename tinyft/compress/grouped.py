"""Packed weights whose codes lie in groups along the rows of W, each group with a scale of its own.

    Grouped     the base class: the stream of codes, the scales, the order of the inputs, the dense weight
    Uniform     w = s (q − z), on the grids of grids.py

In memory, the last axis of every array is `out`, the number of rows of W (see coded.py): the stream of codes is
(bytes, out), and the scales are (groups, out). A row of W has groups = ⌈in / g⌉ groups of g weights. The last one is
shorter if g does not divide `in`.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from .. import array, checks
from ..array import Array, xp
from .checked import Stored
from .coded import Coded, as_bits, from_bits
from .grids import Grid, check_kind, fixed_zero, top_code
from .packing import pack, packed_length, unpack

__all__ = ["Grouped", "Uniform"]


class Grouped(Coded):
    """A weight W (out, in) as codes of b bits; g neighbours in a row of codes are a group and share a scale.

        w = s (level(q) − z) + m         q the code of w;  s, z, m the scale, the zero point and the shift of its group

    level(q) is the number that the code q means. In this class level(q) = q and z = m = 0. A subclass with other levels
    overrides `table_values`; one with zero points or shifts sets zero_point, zero_codes or shift_bits.

    bits              b
    group             g, at most `in`
    codes             (bytes, out) uint8: a packed stream (packing.py) for each row of W
    scale_bits        (groups, out): s, as the bits of float16 or float32 (as_bits in coded.py)
    zero_point        z, if all groups have the same
    zero_codes        None, or z of each group: a packed stream, (bytes, out) uint8
    shift_bits        None, or m of each group, (groups, out), as bits
    order             None, or (in,) int32: code j of a row belongs to the input order[j] (GPTQ's act_order)
    input_scale_bits  None, or (in,), as bits: the codes represent W diag(input_scale), and the columns of the decoded
                      weight are divided by input_scale (AWQ)

    The kernels in kernels/ read these attributes."""

    in_groups = True
    zero_point: float = 0.0
    zero_codes: Array | None = None
    shift_bits: Array | None = None
    order: Array | None = None
    input_scale_bits: Array | None = None
    bits: int
    group: int

    def __init__(
        self, codes: np.ndarray, scale: np.ndarray, *, bits: int, group: int,
        order: np.ndarray | None = None, input_scale: np.ndarray | None = None,
    ):
        """Pack codes (out, in) on the host, whole numbers in 0 ... 2^bits − 1, with their scales (out, groups).

        order, input_scale: (in,), as above. The scales are stored as float16 if that is exact, else as float32.
        TypeError for codes that are no integers. ValueError for codes or bits out of range, other shapes, scales that
        are not finite, input scales that are not positive and an order that is no permutation."""
        name = type(self).__name__
        checks.whole(f"{name}: bits", bits, 1, 8)
        checks.whole(f"{name}: group", group, least=1)
        super().__init__(codes, scale, group)
        self.bits = bits
        self.group = min(group, codes.shape[1])
        self.codes = array.asarray(pack(np.ascontiguousarray(codes.T), bits))            # (bytes, out)
        self.keep_scale(scale)
        self.order = None
        if order is not None:
            self.order = array.asarray(_checked_order(order, codes.shape[1], name))
        self.input_scale_bits = None
        if input_scale is not None:
            if input_scale.shape != (codes.shape[1],) or not (input_scale > 0).all():
                raise ValueError(f"{name} wants a positive input_scale for each of the {codes.shape[1]} inputs")
            self.input_scale_bits = array.asarray(as_bits(input_scale.astype(np.float32), name))

    # ── files ──
    def settings(self) -> dict[str, Any]:
        """{"bits": bits of a code, "group": weights of a full group}."""
        return {"bits": self.bits, "group": self.group}

    @classmethod
    def restore(cls, shape: tuple[int, int], stored: Stored) -> Grouped:
        """As Packed.restore. A subclass calls it first, then takes its own settings and arrays from `stored`."""
        out, width = shape
        packed = cls.without_codes(shape)
        packed.bits = stored.whole("bits", 1, 8)
        packed.group = stored.whole("group", 1, width)
        packed.codes = stored.array("codes", (packed_length(width, packed.bits), out), "uint8")
        packed.restore_scale(stored)
        if stored.has("order"):
            packed.order = stored.array("order", (width,), "int32")
            _checked_order(array.asnumpy(packed.order), width, cls.__name__)
        if stored.has("input_scale_bits"):
            packed.input_scale_bits = stored.numbers("input_scale_bits", (width,), "uint16", "uint32")
            if not (packed.input_scale > 0).all():
                raise ValueError(f"{cls.__name__} wants positive input scales")
        return packed

    def restore_scale(self, stored: Stored) -> None:
        """Take the scales from a file, the array that keep_scale stored. ValueError for another shape or dtype."""
        self.scale_bits = stored.numbers("scale_bits", (self.groups, self.shape[0]), "uint16", "uint32")

    def check_codes(self, top: int) -> None:
        """ValueError if a code is larger than `top`. The codes are unpacked one block of rows at a time."""
        if top == (1 << self.bits) - 1:                                          # then every code of b bits is allowed
            return
        for rows in self.blocks():
            largest = int(unpack(self.codes[:, rows], self.bits, self.shape[1]).max())
            if largest > top:
                raise ValueError(f"{type(self).__name__} wants codes from 0 to {top}, got {largest}")

    def extra_repr(self) -> str:
        more = ""
        if self.order is not None:
            more += ", in another order"
        if self.input_scale_bits is not None:
            more += ", with input scales"
        return f"{tuple(self.shape)}, {self.bits} bits in groups of {self.group}{more}, {self.nbytes:,} bytes"

    # ── parts of the weight ──
    @property
    def groups(self) -> int:
        """The number of groups in a row, ⌈in / g⌉."""
        return -(-self.shape[1] // self.group)                                   # rounded up

    def keep_scale(self, scale: np.ndarray) -> None:
        """Store the scales (out, groups), given on the host."""
        bits = as_bits(np.ascontiguousarray(scale.T), type(self).__name__)
        self.scale_bits = array.asarray(bits)                                    # (groups, out)

    def scales(self, rows: Any) -> Array:
        """The scales of some rows, a slice or an array (n,) of row numbers: (groups, n) float32."""
        return from_bits(self.scale_bits[:, rows])

    @property
    def scale(self) -> Array:
        """The scales (groups, out), float32."""
        return self.scales(slice(None))

    @property
    def input_scale(self) -> Array | None:
        """The input scales (in,), float32, or None."""
        return None if self.input_scale_bits is None else from_bits(self.input_scale_bits)

    def code_matrix(self) -> np.ndarray:
        """The codes (out, in) uint8 on the host. Column j belongs to the input order[j], or to j if order is None."""
        return unpack(array.asnumpy(self.codes), self.bits, self.shape[1]).T

    def table_values(self) -> Array | None:
        """A table of level(q) for every code q, (2^bits,) float32, on the device of the codes. None: level(q) = q."""
        return None

    def levels(self, codes: Array) -> Array:
        """level(q) for codes q (..., n), float32 of the same shape."""
        values = self.table_values()
        return codes.astype(np.float32) if values is None else values[codes]

    def zeros(self, rows: Any) -> Array | float:
        """The zero points of some rows, (groups, n) float32, or one number if all groups have the same."""
        if self.zero_codes is None:
            return self.zero_point
        return unpack(self.zero_codes[:, rows], self.bits, self.groups).astype(np.float32)

    def shifts(self, rows: Any) -> Array | None:
        """The shifts of some rows, (groups, n) float32; None if all are 0."""
        return None if self.shift_bits is None else from_bits(self.shift_bits[:, rows])

    def factors(self, rows: Any) -> tuple[Array, Array | None]:
        """(s, c) with  w = s · level(q) + c,  c = m − s z,  of some rows, for the kernels.

        Each is (groups, n) float32; c is None if it is 0 in all groups."""
        scale = self.scales(rows)
        shift = self.shifts(rows)
        zero = self.zeros(rows)
        if self.zero_codes is None and zero == 0:
            return scale, shift
        constant = scale * -zero
        if shift is not None:
            constant = constant + shift
        return scale, constant

    # ── the dense weight ──
    def columns(self, rows: Any) -> Array:
        """Wᵀ[:, rows], (in, n), for a slice or an array (n,) of row numbers.

        The dtype is that of self.unit: float32, or the one that the model was cast to. The weights are computed in
        float32 and in place: memory holds the float32 result, its codes, and temporary arrays of at most about an
        eighth of the result (see parts). A result in 16 bits is one more copy, half as large."""
        width = self.shape[1]
        codes = unpack(self.codes[:, rows], self.bits, width)                    # (in, n)
        weight = xp(codes).empty(codes.shape, np.float32)
        for part in parts(width):
            weight[part] = self.levels(codes[part])
        scale = self.scales(rows)
        zero = self.zeros(rows)
        shift = self.shifts(rows)
        whole = width // self.group * self.group                                 # the inputs in full groups
        for first, last in ((0, whole), (whole, width)):                         # the full groups, then the short one
            if first == last:
                continue
            size = min(self.group, last - first)
            values = weight[first:last].reshape(-1, size, weight.shape[1])       # a view, (groups, g, n)
            first_group = first // self.group
            own = slice(first_group, first_group + len(values))                  # the groups of these inputs
            values -= zero if self.zero_codes is None else zero[own, None]
            values *= scale[own, None]
            if shift is not None:
                values += shift[own, None]
        if self.order is not None:
            put_in_order(weight, self.order)
        if self.input_scale_bits is not None:
            weight /= self.input_scale[:, None]
        return weight.astype(self.unit.dtype, copy=False)


def parts(n: int) -> list[slice]:
    """The indices 0 ... n − 1 as at most eight slices of equal length; the last may be shorter."""
    step = -(-n // 8)                                                            # rounded up
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def put_in_order(columns: Array, order: Array) -> None:
    """Move row j of columns (in, n) to row order[j], in place; order (in,). An eighth of the n is copied at a time."""
    for part in parts(columns.shape[1]):
        moved = xp(columns).empty_like(columns[:, part])
        moved[order] = columns[:, part]
        columns[:, part] = moved


class Uniform(Grouped):
    """w = s (q − z): a weight on one of the uniform grids of grids.py.

    kind   of the grid: "affine", "symmetric", "absmax", "ternary" or "sign"

    An affine grid has a zero point in each group, stored in zero_codes; all groups of another grid have the same."""

    def __init__(
        self, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None = None, *, kind: str, bits: int, group: int,
        order: np.ndarray | None = None, input_scale: np.ndarray | None = None,
    ):
        """As Grouped. zero: the zero points (out, groups) of an affine grid, whole numbers in 0 ... 2^bits − 1. Other
        grids have None.

        ValueError also for a kind without a grid of so many bits, for zero points that are missing, not wanted, of
        another shape or out of range, and for a grid with values that float32 cannot hold."""
        check_kind("Uniform", kind, bits)
        super().__init__(codes, scale, bits=bits, group=group, order=order, input_scale=input_scale)
        self.kind = kind
        top = top_code(kind, bits)
        shared_zero = fixed_zero(kind, bits)                                     # None: each group has its own
        if shared_zero is None:
            _check_zero_points(zero, kind, scale.shape, top)
        elif zero is not None:
            raise ValueError(f"Uniform: the {kind} grid wants no zero points")
        _check_range(scale, zero if shared_zero is None else shared_zero, top)
        self.zero_codes = None
        if zero is not None:
            whole = np.ascontiguousarray(zero.T).astype(np.int64)                # (groups, out)
            self.zero_codes = array.asarray(pack(whole, bits))                   # a stream along the groups

    @classmethod
    def from_grid(cls, codes: np.ndarray, grid: Grid, *, kind: str, bits: int, group: int, **more: Any) -> Uniform:
        """The packed weight of codes (out, in) on a grid with one scale and one zero point for each row and group.

        The scale of the grid, and its zero if the kind is affine, are (out, groups) or (out, groups, 1). more: order
        and input_scale, as Grouped. Errors as those of Uniform(...)."""
        shape = (codes.shape[0], -(-codes.shape[1] // group))                    # (out, groups), groups = ⌈in / g⌉
        scale = np.asarray(grid.scale).reshape(shape)
        zero = None
        if fixed_zero(kind, bits) is None:
            zero = np.asarray(grid.zero).reshape(shape)
        return cls(codes.astype(np.uint8), scale, zero, kind=kind, bits=bits, group=group, **more)

    def settings(self) -> dict[str, Any]:
        """The settings of Grouped, and {"kind": the kind of the grid}."""
        return {"kind": self.kind, **super().settings()}

    @classmethod
    def restore(cls, shape: tuple[int, int], stored: Stored) -> Uniform:
        """As Packed.restore."""
        packed = super().restore(shape, stored)
        packed.kind = stored.setting("kind")
        check_kind("Uniform", packed.kind, packed.bits)
        if fixed_zero(packed.kind, packed.bits) is None:
            groups, out = packed.scale_bits.shape
            packed.zero_codes = stored.array("zero_codes", (packed_length(groups, packed.bits), out), "uint8")
        packed.check_codes(top_code(packed.kind, packed.bits))
        return packed

    @property
    def zero_point(self) -> float:                       # type: ignore[override]
        """The zero point that all groups share; 0 for an affine grid, whose groups have their own."""
        return fixed_zero(self.kind, self.bits) or 0.0

    @property
    def zero(self) -> Array | float:
        """The zero points (groups, out) float32, or one number if all groups have the same."""
        return self.zeros(slice(None))

    def extra_repr(self) -> str:
        return f"{self.kind} {super().extra_repr()}"


# ── checks ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _check_zero_points(zero: np.ndarray | None, kind: str, shape: tuple[int, ...], top: int) -> None:
    """ValueError unless zero has this shape and holds whole numbers from 0 to top. kind: for the message."""
    if zero is None:
        raise ValueError(f"Uniform: the {kind} grid wants zero points")
    if zero.shape != shape:
        raise ValueError(f"Uniform wants zero points of shape {shape}, got {zero.shape}")
    wrong = zero[(zero != np.rint(zero)) | (zero < 0) | (zero > top)]
    if wrong.size:
        raise ValueError(f"Uniform wants zero points that are whole numbers from 0 to {top}, got {wrong[0]}")


def _check_range(scale: np.ndarray, zero: Any, top: int) -> None:
    """ValueError unless all values s (q − z) of a grid, q = 0 ... top, are finite in float32."""
    steps = np.maximum(zero, top - zero).astype(np.float32)                      # the largest |q − z|, at q = 0 or top
    with np.errstate(over="ignore"):
        largest = scale.astype(np.float32) * steps
    if not np.isfinite(largest).all():
        raise ValueError("Uniform wants values that float32 holds, got a grid that goes beyond them: "
                         "some weights are too close to 3.4e38, the largest float32")


def _checked_order(order: np.ndarray, n: int, name: str) -> np.ndarray:
    """The order (n,) as int32. ValueError unless it is a permutation of 0 ... n − 1. name: for the message."""
    if order.shape != (n,) or not np.array_equal(np.sort(order), np.arange(n)):
        raise ValueError(f"{name} wants an order of the {n} inputs, each once: a permutation of 0 ... {n - 1}")
    return order.astype(np.int32)

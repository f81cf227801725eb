"""LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale.  Dettmers, Lewis, Belkada, Zettlemoyer, 2022.
arXiv:2208.07339

    y = s_x s_w ⊙ (X_q W_qᵀ) + X[:, O] W[:, O]ᵀ                                                                  §3
    W_q = rint(W / s_w) (out, in),  s_w[o] = max_i |W[o, i]| / 127
    X_q = rint(X / s_x) (N, in),    s_x[t] = max |X[t, i]| / 127 over the inputs i outside O;  0 in the columns O
    O   = the inputs i with |X[t, i]| >= threshold for some token t: the outliers

Weights and activations have 8 bits each, with a scale for each row of W and for each token (vector-wise, §3.1). The
product of the whole numbers is exact. A few inputs of large models are 20 times as large as the others; inside X_q
they would leave the others few steps, so they are multiplied in floating point (§3.2). Int8 is the rule without
outliers, LLMInt8 the one with them.

The gradient of X is that of the product with the rounded weight, dX = G Ŵ: the rounding of X counts as the identity
(straight through). It is computed in floating point.

Departures: the columns O are multiplied with the rounded weights, s_w W_q, as in bitsandbytes for weights that are
stored in 8 bits; with outlier_weights="dense" they are multiplied with W, as in the paper, and W is kept as well. A
row of zeros has the scale 1. A GPU multiplies int8 numbers and sums in int32; here the products of at most 1,032
inputs are summed in float32, where all of these sums are exact, and the sums in float64. They are the same numbers.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ... import array, checks
from ...array import Array, xp
from ...nn import FLOATS
from ..checked import Stored
from ..coded import Coded, as_bits, from_bits
from ..grids import fit_grid
from ..rule import Rule, check_weight

__all__ = ["Int8", "Int8Weight", "LLMInt8", "integer_product", "quantize_rows", "zero_point_product"]

TOP = 127                                                # the largest code; −127 is the smallest
ACTIVATIONS = ("absmax", "affine")
OUTLIER_WEIGHTS = ("codes", "dense")
EXACT = 2**24                                            # float32 holds all whole numbers up to it
CHUNK = EXACT // ((TOP + 1) * TOP)                       # 1,032 products of −128 ... 127 and −127 ... 127


# ── the rules ────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Int8(Rule):
    """8-bit weights and 8-bit activations (W8A8): each row of W and each token has a scale of its own.

    activations   "absmax": codes −127 ... 127;  "affine": 256 codes with a zero point for each token, half the steps
                  for inputs of one sign"""

    activations: str = "absmax"

    def __post_init__(self) -> None:
        checks.one_of("Int8: activations", self.activations, ACTIVATIONS)

    def __call__(self, W: np.ndarray, H: Any = None) -> Int8Weight:
        """The packed weight of W (out, in)."""
        W = check_weight("Int8", W)
        return Int8Weight(*quantize_weight(W), activations=self.activations)


@dataclass(frozen=True)
class LLMInt8(Rule):
    """8-bit weights and activations, but the columns of outliers in floating point.

    threshold         an input that reaches it for one token of a batch is an outlier for all of them
    outlier_weights   "codes": outliers are multiplied with the rounded weights;  "dense": with W, which is kept"""

    threshold: float = 6.0
    outlier_weights: str = "codes"

    def __post_init__(self) -> None:
        checks.number("LLMInt8: threshold", self.threshold, above=0)
        checks.one_of("LLMInt8: outlier_weights", self.outlier_weights, OUTLIER_WEIGHTS)

    def __call__(self, W: np.ndarray, H: Any = None) -> Int8Weight:
        """The packed weight of W (out, in)."""
        W = check_weight("LLMInt8", W)
        dense = W if self.outlier_weights == "dense" else None
        return Int8Weight(*quantize_weight(W), threshold=self.threshold, dense=dense)


def quantize_weight(W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes (out, in) int8, scales (out,)) of W (out, in): each row has the scale max |w| / 127."""
    grid = fit_grid(W, "absmax", 8)
    scale = grid.scale[:, 0]
    with np.errstate(over="ignore"):                         # max |w| may be the largest number of float32
        is_beyond = np.isinf(scale.astype(np.float32) * np.float32(TOP))
    return (grid.encode(W) - TOP).astype(np.int8), np.where(is_beyond, scale * (1 - 2**-22), scale)


# ── the packed weight ────────────────────────────────────────────────────────────────────────────────────────────────
class Rounded(NamedTuple):
    """Activations X (N, in) in 8 bits:  X ≈ scale (codes − zero), and the columns that are not rounded.

    codes     (N, in) float32, whole numbers from −128 to 127; 0 in the columns of outliers
    scale     (N, 1) in the dtype of X
    zero      (N, 1) float32, whole numbers from −128 to 127; None: all are 0
    columns   None, or the numbers of the columns of outliers
    outliers  None, or X[:, columns]"""

    codes: Array
    scale: Array
    zero: Array | None = None
    columns: Array | None = None
    outliers: Array | None = None


class Int8Weight(Coded):
    """A weight W (out, in) as int8 codes and a scale for each row, whose products round their input to 8 bits too."""

    def __init__(
        self, codes: np.ndarray, scale: np.ndarray, *, activations: str = "absmax", threshold: float | None = None,
        dense: np.ndarray | None = None,
    ):
        """The weight from codes (out, in) int8, −127 ... 127, and scales (out,), on the host.

        threshold   the smallest outlier; None: no input is one
        dense       W (out, in), to multiply outliers with; None: the rounded weight

        TypeError or ValueError for arrays of other shapes or kinds, and for scales that are not finite."""
        checks.one_of("Int8Weight: activations", activations, ACTIVATIONS)
        super().__init__(codes, scale)
        if codes.dtype != np.int8 or codes.min() < -TOP:
            raise ValueError(f"Int8Weight wants codes of int8 from {-TOP} to {TOP}, "
                             f"got {codes.dtype} from {codes.min()}")
        self.activations = activations
        self.threshold = threshold
        self.codes = array.asarray(np.ascontiguousarray(codes.T))                # (in, out)
        self.scale_bits = array.asarray(as_bits(scale, "Int8Weight"))            # (out,)
        self.dense = None if dense is None else array.asarray(dense)

    def settings(self) -> dict[str, Any]:
        """How activations are rounded, and the smallest outlier."""
        return {"activations": self.activations, "threshold": self.threshold}

    @classmethod
    def restore(cls, shape: tuple[int, int], stored: Stored) -> Int8Weight:
        """As Packed."""
        out, width = shape
        packed = cls.without_codes(shape)
        packed.activations = checks.one_of("Int8Weight: activations", stored.setting("activations"), ACTIVATIONS)
        packed.threshold = stored.setting("threshold")
        if packed.threshold is not None:
            checks.number("Int8Weight: threshold", packed.threshold, above=0)
        packed.codes = stored.array("codes", (width, out), "int8")
        if packed.codes.min() < -TOP:
            raise ValueError(f"Int8Weight wants codes from {-TOP} to {TOP}, got {-TOP - 1}")
        packed.scale_bits = stored.numbers("scale_bits", (out,), "uint16", "uint32")
        packed.dense = stored.array("dense", shape, *map(str, FLOATS)) if stored.has("dense") else None
        return packed

    def extra_repr(self) -> str:
        outliers = "" if self.threshold is None else f", outliers from {self.threshold:g}"
        return f"int8 {tuple(self.shape)}, {self.activations} activations{outliers}, {self.nbytes:,} bytes"

    @property
    def scale(self) -> Array:
        """The scales (out,), float32."""
        return from_bits(self.scale_bits)

    def dequantize_rows(self, rows: Any) -> Array:
        """As Coded: s_w W_q, or W if it is kept."""
        return super().dequantize_rows(rows) if self.dense is None else self.dense[rows]

    def columns(self, rows: Any, inputs: Any = slice(None)) -> Array:
        """As Coded, of the rounded weight. inputs: those that are wanted, Wᵀ[inputs, rows]."""
        w = self.codes[:, rows][inputs] * from_bits(self.scale_bits[rows])       # int8 × float32 is float32
        return w.astype(self.unit.dtype, copy=False)

    # ── products ──
    def prepare(self, x: Array) -> Rounded:
        """The activations x (N, in) in 8 bits. To find the outliers, the host waits for the device."""
        if self.threshold is None:
            return quantize_rows(x, self.activations)
        if array.recording is not None:
            raise array.CannotCapture("LLM.int8() multiplies other columns in each step, and a replay cannot: "
                                      "use Int8, which has no outliers, or do not capture the step")
        columns = xp(x).flatnonzero((abs(x) >= self.threshold).any(axis=0))
        if not len(columns):
            return quantize_rows(x, self.activations)
        inside = x.copy()
        inside[:, columns] = 0
        rounded = quantize_rows(inside, self.activations)
        return rounded._replace(columns=columns, outliers=x[:, columns])

    def product(self, x: Rounded, rows: slice) -> Array:
        """x W[rows]ᵀ, (N, n)"""
        codes = self.codes[:, rows]
        total = integer_product(x.codes, codes)
        if x.zero is not None:
            total = zero_point_product(total, x.zero, codes)
        y = (total * x.scale * from_bits(self.scale_bits[rows])).astype(x.scale.dtype, copy=False)
        if x.columns is not None:
            w = self.columns(rows, x.columns) if self.dense is None else self.dense[rows][:, x.columns].T
            y += x.outliers @ w.astype(y.dtype, copy=False)
        return y


def quantize_rows(x: Array, activations: str = "absmax") -> Rounded:
    """Activations x (N, in), each row with its own scale.

    absmax   s = max |x| / 127,  code = rint(x / s)
    affine   s = (hi − lo) / 255 with lo = min(0, min x), hi = max(0, max x);  zero = rint(−lo / s) − 128,
             code = rint(x / s) + zero, held within −128 ... 127

    A row of zeros has the scale 1. A row with inf or NaN gives NaN in the product."""
    m = xp(x)
    if activations == "absmax":
        scale = abs(x).max(axis=1, keepdims=True) / TOP
        low, zero = -TOP, None
    else:
        lo = m.minimum(x.min(axis=1, keepdims=True), 0)
        hi = m.maximum(x.max(axis=1, keepdims=True), 0)
        scale = hi / 255 - lo / 255                          # hi − lo alone may overflow
        low = -TOP - 1
    scale = m.where(scale == 0, m.ones_like(scale), scale)
    codes = m.rint(x / scale)
    if activations == "affine":
        zero = m.rint(-lo / scale) + low
        codes += zero
        zero = zero.astype(np.float32)
    return Rounded(codes.clip(low, TOP).astype(np.float32), scale, zero)


# ── exact products of whole numbers ──────────────────────────────────────────────────────────────────────────────────
def integer_product(q: Array, codes: Array) -> Array:
    """Q W, exactly.    Q (N, k) float32, whole numbers −128 ... 127;  W (k, n) int8, −127 ... 127

    A sum of 1,032 products is at most 128 · 127 · 1,032 < 2²⁴, so float32 holds every partial sum, in any order of
    the summation. Sums of more products are float64, which is exact up to 2⁵³."""
    total = q[:, :CHUNK] @ codes[:CHUNK].astype(q.dtype)
    if len(codes) <= CHUNK:
        return total
    total = total.astype(np.float64)
    for start in range(CHUNK, len(codes), CHUNK):
        part = slice(start, start + CHUNK)
        total += q[:, part] @ codes[part].astype(q.dtype)
    return total


def zero_point_product(total: Array, zero: Array, codes: Array) -> Array:
    """Σ_i (q_i − z) w_i = Σ_i q_i w_i − z Σ_i w_i, exactly, (N, n) float64.    Jacob et al. 2017, arXiv:1712.05877

    total   Σ_i q_i w_i (N, n), as integer_product gives it
    zero    z (N, 1), whole numbers
    codes   w (k, n) int8. Their own zero point is 0"""
    return total - zero.astype(np.float64) * codes.sum(axis=0, dtype=np.int64)

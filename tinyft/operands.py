"""The arguments of ops: masks, indices, labels and axes of every kind as the arrays that ops compute with, and shapes.

    as_indices, as_mask, as_operand, match_dtypes
                                                  arrays from whole numbers, masks, lists and NumPy numbers of any dtype
    one_axis, some_axes, index_part               the axes of a reduction, the parts of an index
    check_linear, check_norm, attention_shape ... refuse shapes that would only broadcast, or that mean something else

Definitions and kernels call the same functions.  They raise TypeError, ValueError or IndexError with one sentence, in
front of which the engine sets the name of the op and the shapes it got.
"""
from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import array, checks
from .array import Array
from .tensor import Tensor

NUMBERS = {bool, int, float}                                  # Python's take the dtype of the array beside them


FLOATS = (np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16), array.bfloat16)


# ── arrays ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def as_indices(i: Any, like: Array, name: str = "indices") -> Array:
    """Whole numbers of any kind (an array, a list, a number) as an array of int32 or int64; a list beside `like`.

    Arithmetic with −1 or with a length overflows in narrower and in unsigned dtypes, such as the uint8 of an image.
    TypeError for booleans, which would select entries, and for floating-point numbers. name: of the argument."""
    a = _as_array(i, name)
    if a.dtype.kind not in "iu" and a.size:                   # an empty list has the dtype of floating-point numbers
        raise TypeError(f"{name} wants whole numbers, got {a.dtype}")
    if a.dtype.kind != "i" or a.itemsize < 4:
        a = a.astype(np.int64)
    return a if array.is_array(i) else _beside(a, i, like)


def as_mask(mask: Any, like: Array, name: str = "a mask") -> Array:
    """True and False, or 1 and 0 of any dtype, as an array of booleans; a list beside the array `like`.

    ValueError for other numbers, such as 0 and −∞, which are added to scores; a device array is not looked into.
    TypeError for anything but numbers. name: of the argument."""
    a = as_booleans(_as_array(mask, name), f"{name} wants True and False, or 1 and 0")
    return a if array.is_array(mask) else _beside(a, mask, like)


def as_booleans(a: Array, wanted: str) -> Array:
    """An array of True and False, or of 1 and 0 of any dtype, as booleans. wanted: the beginning of an error message.

    TypeError for anything but numbers; ValueError for other numbers, on the host: a device array is not looked into."""
    if a.dtype.kind == "b":
        return a
    if a.dtype.kind not in "iufV":                            # bfloat16 is of kind V
        raise TypeError(f"{wanted}, got {a.dtype}")
    if isinstance(a, np.ndarray):
        others = a[(a != 0) & (a != 1)]
        if others.size:
            raise ValueError(f"{wanted}, got {others.flat[0]}")
    return a != 0


def as_operand(a: Any, like: Array, name: str) -> Array:
    """The array `a`, or a tensor's; host data, such as a list, as an array beside `like`. name: of the argument.

    A list of Python floats takes the floating-point dtype of `like`, as a single Python float does."""
    if array.is_array(a):
        return a
    operand = _beside(_as_array(a, name), a, like)
    is_floats = isinstance(a, (list, tuple)) and operand.dtype == np.float64
    if is_floats and array.is_array(like) and like.dtype.kind in "fV":
        operand = operand.astype(like.dtype)
    return operand


def _as_array(a: Any, name: str) -> Array:
    """The array `a`, or a tensor's; host data as a NumPy array. ValueError for rows of two lengths."""
    if array.is_array(a):
        return a
    if isinstance(a, Tensor):
        return a.data
    try:
        return np.asarray(a)
    except ValueError:
        raise ValueError(f"{name} wants rows of one length, got {checks.brief(a)}") from None


def _beside(a: Array, given: Any, like: Array) -> Array:
    """The array `a`, made of the argument `given`, on the device of `like`. A tensor stays where it is: the user moves
    it."""
    return a if isinstance(given, Tensor) else array.to(a, array.name_of(like))


def match_dtypes(a: Any, b: Any) -> tuple[Any, Any]:
    """Two operands, of which whole numbers take the dtype of floating-point ones beside them, as in PyTorch.

    NumPy alone would compute the product of a float32 array and an int64 mask, or a NumPy number, in float64."""
    a_dtype = getattr(a, "dtype", None)
    b_dtype = getattr(b, "dtype", None)
    if a_dtype is b_dtype is not None or (a_dtype is not None and type(b) in NUMBERS):
        return a, b
    return _weaker(a, b), _weaker(b, a)


def _weaker(a: Any, other: Any) -> Any:
    """`a` with the dtype of the floating-point array `other`, if `a` is a list, a NumPy number or whole numbers."""
    if isinstance(a, np.generic) and array.is_array(other):
        return a.item()                                       # a Python number takes the dtype of any array
    if isinstance(a, (list, tuple)):
        a = as_operand(a, other, "an operand")
    floating = array.is_array(other) and other.dtype.kind in "fV"
    return a.astype(other.dtype) if floating and array.is_array(a) and a.dtype.kind in "iu" else a


# ── axes and indices ─────────────────────────────────────────────────────────────────────────────────────────────────
def one_axis(axis: Any, x: Array) -> int:
    """An axis of x, counted from 0. TypeError unless it is a whole number, ValueError if x lacks it."""
    if type(axis) is not int:
        axis = checks.whole("axis", axis)
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis wants one of the {x.ndim} axes, got {axis}")
    return axis % x.ndim


def some_axes(axis: Any, x: Array, keepdims: bool = False) -> tuple[int, ...] | None:
    """Axes of x, counted from 0, from one axis or several; None, for all axes, stays None.

    ValueError for an axis twice, or that x lacks; TypeError unless keepdims is True or False."""
    if keepdims is not False:
        checks.flag("keepdims", keepdims)
    if axis is None:
        return None
    if type(axis) is int:
        return (one_axis(axis, x),)
    axes = tuple(one_axis(a, x) for a in (axis if isinstance(axis, (tuple, list)) else (axis,)))
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis wants each axis once, got {axis}")
    return axes


def as_float_dtype(dtype: Any) -> np.dtype:
    """A dtype of floating-point numbers from itself or its name. TypeError for anything else."""
    for known in FLOATS:
        if isinstance(dtype, (str, np.dtype, type)) and dtype in (known, str(known), known.type):
            return known
    raise TypeError(f"cast wants one of the dtypes {', '.join(map(str, FLOATS))}, got {checks.brief(dtype)}")


def split_ends(x: Array, counts: Any) -> list[int]:
    """The limits of the parts of x: 0, and the sum of the counts up to each of them.

    ValueError unless the counts are whole numbers >= 0 whose sum is the length of x."""
    wanted = "split wants counts, whole numbers >= 0 whose sum is the length of the first axis"
    ends = [0]
    for count in as_shape(counts, "counts"):
        ends.append(ends[-1] + checks.whole("counts", count, 0))
    if x.ndim == 0 or ends[-1] != x.shape[0]:
        raise ValueError(f"{wanted}; got {checks.brief(counts)}")
    return ends


def as_shape(shape: Any, name: str = "shape") -> tuple[int, ...]:
    """A shape as a tuple of lengths, from a tuple, a list, an array or one whole number. TypeError for anything else.

    NumPy checks the lengths. name: of the argument, which may also be `axes`."""
    if type(shape) is tuple:
        return shape
    if array.is_array(shape) and shape.ndim == 1 and shape.dtype.kind in "iu":
        return tuple(array.asnumpy(shape).tolist())
    if isinstance(shape, list):
        return tuple(shape)
    return (checks.whole(name, shape),)


def check_last_axis(x: Array) -> None:
    """ValueError unless x has a last axis, with one entry or more."""
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError("the last axis wants one entry or more")


def index_part(p: Any, x: Array) -> Any:
    """One part of an index of x: None, Ellipsis, an integer, a slice, or an array of int32, int64 or booleans.

    Whole numbers of another dtype become int64. A list is brought to x's backend; a tensor or an array stays.
    TypeError for anything else, such as a floating-point number; ValueError for lists of unequal lengths."""
    if isinstance(p, (int, slice)) or p is None or p is Ellipsis:
        return p
    if isinstance(p, np.integer):
        return int(p)
    if not (array.is_array(p) or isinstance(p, (Tensor, list, tuple, range))):
        raise TypeError(f"an index wants integers, slices, None, ... or arrays of integers or booleans, got {p!r}")
    p = as_operand(p, x, "an index")
    return p if p.dtype == bool else as_indices(p, x)


# ── shapes ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def check_linear(x: Array, W: Array, b: Array | None) -> None:
    """ValueError unless x Wᵀ + b is defined, and b has one entry for each row of W: a b of length one would fit too."""
    if W.ndim != 2 or x.shape[-1:] != W.shape[1:]:
        raise ValueError("W wants two axes, (out, in), and x a last axis of length `in`")
    if b is not None and b.shape != W.shape[:1]:
        raise ValueError(f"b wants the shape {W.shape[:1]}, one entry for each row of W")


def check_project(x: Array, weights: tuple, biases: tuple, heads: int) -> None:
    """ValueError unless the three linear maps are defined, have the same width, and `heads` divides that width."""
    for W, b in zip(weights, biases):
        check_linear(x, W, b)
    n = weights[0].shape[0]
    if x.ndim < 2 or any(W.shape[0] != n for W in weights):
        raise ValueError("x wants two axes or more, and the three W one shape")
    checks.whole("heads", heads, 1)
    if n % heads:
        raise ValueError(f"heads wants a number that divides the width {n}, got {heads}")


def check_embedding(W: Array, ids: Any) -> Array:
    """The ids as an array of int32 or int64. ValueError unless W is a matrix, TypeError unless ids are whole numbers.
    """
    if W.ndim != 2:
        raise ValueError("W wants two axes, one row for each id")
    return as_indices(ids, W, "ids")


def rows_of(W: Array, ids: Array) -> Array:
    """W[ids]. IndexError, on the host, for an id that W has no row for; a device does not tell."""
    try:
        return W[ids]
    except IndexError:
        host = array.asnumpy(ids)
        outside = host[(host < -len(W)) | (host >= len(W))]
        raise IndexError(f"ids wants rows of W, 0 to {len(W) - 1}, got {outside[0]}") from None


def check_norm(x: Array, eps: float, *parameters: Array) -> None:
    """ValueError unless x has rows, each parameter one entry for each of their columns, and eps is 0 or more."""
    check_last_axis(x)
    if type(eps) is not float or not 0 <= eps < math.inf:
        checks.number("eps", eps, 0)
    row = x.shape[-1:]
    for p in parameters:
        if p.shape != row:
            raise ValueError(f"each of weight and bias wants the shape {row} of a row")


def check_same_shape(*arrays: Array) -> None:
    """ValueError unless all arrays have one shape."""
    shapes = [tuple(a.shape) for a in arrays]
    if len(set(shapes)) > 1:
        raise ValueError("inputs of one shape are wanted")


def rotary_factors(x: Array, cos: Any, sin: Any) -> tuple[Array, Array]:
    """(cos, sin) as arrays beside x, in its dtype. ValueError unless they broadcast to x, of even rows."""
    check_last_axis(x)
    if x.shape[-1] % 2:
        raise ValueError(f"rows of an even length are wanted, got {x.shape[-1]}")
    factors = []
    for name, value in (("cos", cos), ("sin", sin)):
        value = as_operand(value, x, name)
        check_broadcasts(f"rotary wants {name}", value, x.shape)
        factors.append(value if value.dtype == x.dtype else value.astype(x.dtype))
    return factors[0], factors[1]


# ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────────
def attention_masks(q: Array, bias: Any, key_mask: Any, dropout_mask: Any) -> tuple:
    """(bias, key_mask, dropout_mask) as arrays beside q, None where there is none; key_mask as booleans.

    bias and dropout_mask get q's dtype if they hold whole numbers; dropout_mask also if q is float32 or float64.
    TypeError for a bias of booleans; ValueError for a key_mask of other numbers than 1 and
    0."""
    if bias is not None:
        bias = as_operand(bias, q, "bias")
        if bias.dtype == bool:
            raise TypeError("attention wants a bias of numbers, which is added to the scores; a mask is key_mask=...")
        bias = bias.astype(q.dtype) if bias.dtype.kind in "iu" else bias
    if key_mask is not None:
        key_mask = as_mask(key_mask, q, "key_mask")
    if dropout_mask is not None:
        dropout_mask = as_operand(dropout_mask, q, "dropout_mask")
        is_whole = dropout_mask.dtype.kind in "biu"
        if dropout_mask.dtype != q.dtype and (is_whole or q.itemsize > 2):
            dropout_mask = dropout_mask.astype(q.dtype)
    return bias, key_mask, dropout_mask


def attention_shape(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None = None,
    key_mask: Array | None = None,
    dropout_mask: Array | None = None,
) -> tuple[int, ...]:
    """The shape (..., H, Tq, Tk) of the scores of these arrays.

    ValueError for shapes that do not fit; the engine turns it into a ShapeError."""
    if (q.ndim < 2 or k.ndim != q.ndim or k.shape[:-1] != v.shape[:-1]
            or q.shape[-1] != k.shape[-1] or q.shape[:-3] != k.shape[:-3]):
        raise ValueError("attention wants q (..., H, Tq, D), k (..., Hkv, Tk, D) and v (..., Hkv, Tk, E), "
                         f"got {q.shape}, {k.shape} and {v.shape}")
    if q.ndim > 2 and q.shape[-3] != k.shape[-3] and (k.shape[-3] == 0 or q.shape[-3] % k.shape[-3]):
        raise ValueError("attention wants a number of query heads that the number of key/value heads divides, "
                         f"got q {q.shape} and k {k.shape}")
    shape = (*q.shape[:-1], k.shape[-2])
    for name, a in (("bias", bias), ("key_mask", key_mask), ("dropout_mask", dropout_mask)):
        if a is not None:
            check_broadcasts(f"attention wants a {name}", a, shape)
    return shape


def check_broadcasts(wanted: str, a: Array, shape: tuple) -> None:
    """ValueError unless `a` broadcasts to the scores of this shape, without making them larger.

    wanted: the start of the sentence, such as "attention wants a bias"."""
    if a.ndim > len(shape) or any(n not in (1, m) for n, m in zip(a.shape[::-1], shape[::-1])):
        raise ValueError(f"{wanted} that broadcasts to the scores {tuple(shape)}, got {a.shape}")


# ── the loss ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def check_cross_entropy(
    z: Array, y: Any, weight: Any, ignore_index: int, label_smoothing: float,
) -> tuple[Array, Array | None]:
    """(labels (N,), class weights (V,) or None) of a loss on the logits z (..., V).

    TypeError unless the labels and ignore_index are whole numbers; ValueError for other shapes, and for a
    label_smoothing outside 0 .. 1."""
    check_last_axis(z)
    labels = as_indices(y, z, "labels")
    shape = z.shape[:-1]
    if labels.shape != shape and labels.shape != (math.prod(shape),):
        raise ValueError(f"labels wants the shape {shape}, one label for each row of logits")
    if type(ignore_index) is not int:
        checks.whole("ignore_index", ignore_index)
    if type(label_smoothing) is not float or label_smoothing:
        checks.number("label_smoothing", label_smoothing, 0, 1)
    if weight is not None:
        weight = as_operand(weight, z, "weight")
        weight = weight.astype(z.dtype) if weight.dtype.kind in "biu" else weight
        if weight.shape != z.shape[-1:]:
            raise ValueError(f"weight wants the shape {z.shape[-1:]}, one for each class")
    return labels.reshape(-1), weight


def check_labels(labels: Array, real: Array, classes: int) -> None:
    """IndexError if a label that counts (real True) is outside the classes.

    labels, real (N,). Only a host array is looked into: to look into a device array is to wait for the device."""
    if not isinstance(labels, np.ndarray):
        return
    outside = labels[real & ((labels < 0) | (labels >= classes))]
    if outside.size:
        raise IndexError(f"a label wants to be one of the classes 0 to {classes - 1}, got {outside[0]}")

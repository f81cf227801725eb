"""Mixed precision: which ops compute in 16 bits.

                 bits of exponent, fraction     largest      smallest       next after 1
    float32              8          23          3e38         1e-45          1 + 2⁻²³
    bfloat16             8           7          3e38         9e-41          1 + 2⁻⁷
    float16              5          10          65,504       6e-8           1 + 2⁻¹⁰

16-bit numbers are for storage and for matrix products: half the memory, half the traffic, and tensor cores.  They are
not for sums: 256 + 1 is 256 in bfloat16.  So these rules hold wherever an op gets 16-bit inputs:

    an op      computes in float32 and rounds its value once.  A kernel may take 16-bit factors if it sums in float32.
    autocast   PRODUCTS get their inputs in 16 bits, SUMS in float32; all other ops take their inputs as they are (of
               two dtypes the wider one).
    gradients  have the dtype of their tensor, and are summed over a batch before they are rounded; `.grad` is float32.
    weights    that train stay in float32: under autocast the model's own, for a model in 16 bits a copy that the
               optimiser keeps (optim/master.py).
    float16    cannot hold small gradients: the loss is multiplied by a scale, and the gradients are divided by it
               (optim/scaler.py).

NumPy has no fast 16-bit products: there the results are rounded as on a device, and nothing is saved.  (Attention
differs: the kernel on a device also rounds the probabilities, since they are factors of a product.)
"""
from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import checks, dispatch
from .array import Array, bfloat16, is_array
from .keywords import checked_keywords

HALVES = {np.dtype(np.float16), bfloat16}
FLOAT32 = np.dtype(np.float32)
ROUNDABLE = {FLOAT32, *HALVES}                                 # float64 is for checking gradients: no rule changes it

# ── the policy ───────────────────────────────────────────────────────────────────────────────────────────────────────
PRODUCTS = {"linear", "matmul", "project", "attention", "_packed_linear"}
SUMS = {"sum", "mean", "cumsum", "softmax", "log_softmax", "layer_norm", "rms_norm",
        "exp", "log", "power"}                                 # the last three overflow soon
LOSSES = {"cross_entropy"}                                     # their value is float32, with autocast or without
VIEWS = {"reshape", "permute", "transpose", "broadcast_to",
         "split", "cast"}                                      # compute nothing, in either pass
PICKS = {"getitem", "gather", "embedding"}                     # compute nothing; their gradients are sums
MIXING = {"add", "sub", "mul"}                                 # of a float32 and a 16-bit array, computed in float32


class _AutocastState(threading.local):
    """The autocast region of this thread.

    dtype: the dtype in which autocast computes, or None outside a region.
    cache: what kernels/cuda/casts.py keeps for this region, None at its start."""
    dtype: np.dtype | None = None
    cache: Any = None


autocast_state = _AutocastState()
writes = 0                                                     # in-place writes to leaves so far, in all threads


@checked_keywords
@contextlib.contextmanager
def autocast(dtype: Any = "bfloat16", enabled: bool = True) -> Iterator[None]:
    """with autocast("bfloat16"): loss = ...      matrix products in 16 bits, sums in float32.

    For the forward pass and the loss; backward uses the dtypes of the forward pass.  float16 wants a GradScaler as
    well.  enabled=False switches autocast off inside a region.  The region holds for this thread alone.
    TypeError for a dtype other than float16 and bfloat16.      As torch.autocast; Micikevicius et al. 2018"""
    checks.flag("enabled", enabled)
    before = (autocast_state.dtype, autocast_state.cache)
    autocast_state.dtype = half(dtype) if enabled else None
    autocast_state.cache = None                                # 16-bit copies of parameters, of one region
    try:
        yield
    finally:
        autocast_state.dtype, autocast_state.cache = before


def half(dtype: Any) -> np.dtype:
    """float16 or bfloat16, from its name or itself.  TypeError for anything else."""
    with contextlib.suppress(TypeError, ValueError):           # NumPy raises them for what is no dtype
        if np.dtype(dtype) in HALVES:
            return np.dtype(dtype)
    raise TypeError(f"autocast computes in float16 or bfloat16, got {checks.brief(dtype)}")


# ── the wrapper around an op ─────────────────────────────────────────────────────────────────────────────────────────
def run(op: Callable, arrays: list, kwargs: dict[str, Any], leaves: list[bool]) -> tuple:
    """(value, pullbacks) of an op on plain arrays, in mixed precision: cast the inputs under autocast, then compute.

    leaves[i]: input i is a leaf, such as a parameter, whose 16-bit copy is kept.  The engine calls `run` in an autocast
    region, and for an op of which an input has 16 bits.  The first kernel that takes the inputs computes, at last the
    definition."""
    name = op.__name__
    dtype = autocast_state.dtype
    if dtype is not None:
        if name in PRODUCTS:
            arrays = [dispatch.run(cast_parameter, type(a), a, dtype) if leaf else a for a, leaf in zip(arrays, leaves)]
        arrays, kwargs = cast_inputs(name, arrays, kwargs)
    if not has_16_bit(arrays):                                 # no rule is left to apply
        return dispatch.run(op, type(arrays[0]), *arrays, **kwargs)
    for kernel in dispatch.find(op, type(arrays[0])):
        result = compute(kernel, name, arrays, kwargs)
        if result is not NotImplemented:
            return result
    return compute(op.definition, name, arrays, kwargs)


def cast_inputs(name: str, arrays: list, kwargs: dict[str, Any]) -> tuple[list, dict[str, Any]]:
    """The inputs of the op `name` under autocast: PRODUCTS get them in 16 bits, SUMS in float32, other ops as they are.

    PRODUCTS are matmul, linear and the like; their 16-bit dtype is autocast_state.dtype.  `arrays` are the inputs in
    order, `kwargs` those by keyword; the same rule holds for both.  Only arrays whose dtype is ROUNDABLE (float32 or 16
    bits) change: token ids, masks, float64 arrays, None and plain numbers stay.  Returns (list of inputs, dict)."""
    if name in PRODUCTS:
        dtype = autocast_state.dtype
    elif name in SUMS:
        dtype = FLOAT32
    else:
        return arrays, kwargs

    def cast(a: Any) -> Any:
        return rounded(a, dtype) if is_array(a) and a.dtype in ROUNDABLE else a
    return [cast(a) for a in arrays], {k: cast(a) for k, a in kwargs.items()}


def cast_parameter(a: Array, dtype: np.dtype) -> Array:
    """A parameter for a matrix product under autocast: `a` itself, which cast_inputs then rounds to `dtype`.

    This is the definition.  kernels/cuda/casts.py casts the parameters of an optimiser together, once until a write."""
    return a


def compute(f: Callable, name: str, arrays: list, kwargs: dict[str, Any]) -> Any:
    """(value, pullbacks) of an op's definition or kernel f on 16-bit inputs; NotImplemented if the kernel declines.

    name: the op's.  Compute in float32 and round the value to 16 bits; the engine rounds the gradients.  16-bit inputs
    stay as they are for a kernel that sums them in float32 itself (takes_16_bit), and for ops that compute nothing
    (VIEWS, PICKS).  The value stays in float32 if it is a loss, or if the inputs have two dtypes."""
    if name in VIEWS or getattr(f, "takes_16_bit", False):
        return f(*arrays, **kwargs)
    dtypes = {a.dtype for a in arrays if is_array(a) and a.dtype.kind in "fV"}       # bfloat16 is of kind V
    mixes = name in MIXING and len(dtypes) == 2 and FLOAT32 in dtypes                # the array module widens
    if name in PICKS or mixes:
        result = f(*arrays, **kwargs)
    else:
        result = f(*map(to_float32, arrays), **{k: to_float32(a) for k, a in kwargs.items()})
    if result is NotImplemented:
        return NotImplemented
    value, pullbacks = result
    if len(dtypes) == 1 and name not in LOSSES and name not in PICKS:
        dtype, = dtypes
        value = tuple(rounded(v, dtype) for v in value) if isinstance(value, tuple) else rounded(value, dtype)
    if callable(pullbacks):
        return value, _joint_in_float32(pullbacks)
    return value, [back and _in_float32(back) for back in pullbacks]


def _in_float32(back: Callable) -> Callable:
    """A pullback for one input that gets g in float32."""
    return lambda g: back(to_float32(g))


def _joint_in_float32(back: Callable) -> Callable:
    """A joint pullback (g, needed) of several inputs that gets g, an array or a list of arrays, in float32."""
    def joint(g: Any, needed: list[bool]) -> list:
        wide = [to_float32(a) for a in g] if isinstance(g, list) else to_float32(g)
        return back(wide, needed)
    return joint


def takes_16_bit(kernel: Callable) -> Callable:
    """Mark a kernel that takes 16-bit inputs as they are and sums in float32."""
    kernel.takes_16_bit = True
    return kernel


# ── dtypes ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def has_16_bit(arrays: Any) -> bool:
    """True if one of these is an array of 16-bit floating-point numbers."""
    for a in arrays:
        if getattr(a, "itemsize", None) == 2 and getattr(a, "dtype", None) in HALVES:          # a dtype has an itemsize
            return True
    return False


def to_float32(a: Any) -> Any:
    """A 16-bit array in float32, exactly; anything else as it is."""
    return a.astype(np.float32) if is_array(a) and a.dtype in HALVES else a


def widen_half(bits: Array) -> Array:
    """float16 numbers, given as their bits (uint16), as float32, exactly. NumPy's own loop is slow; it has a kernel."""
    return bits.view(np.float16).astype(np.float32)


def rounded(a: Any, dtype: np.dtype) -> Any:
    """The array in this dtype.  Too large a number becomes infinite, without a warning: a GradScaler finds it."""
    if a.dtype == dtype:
        return a
    with np.errstate(over="ignore"):
        return a.astype(dtype)


# ── matrix products of float32 ───────────────────────────────────────────────────────────────────────────────────────
tf32 = False


@checked_keywords
def set_float32_matmul_precision(precision: str) -> None:
    """Set the precision in which a device multiplies float32 matrices, for all threads.

    "highest" computes in float32.  "high" rounds the factors to TF32 (ten bits of fraction) and sums in float32, which
    is several times faster on tensor cores.  NumPy always computes in float32.
    ValueError for another word.      As PyTorch's"""
    global tf32
    if not isinstance(precision, str) or precision not in ("highest", "high"):
        got = checks.brief(precision)
        raise ValueError(f"the precision of float32 products is 'highest' or 'high' (TF32), got {got}")
    tf32 = precision == "high"


def get_float32_matmul_precision() -> str:
    """The word that set_float32_matmul_precision set."""
    return "high" if tf32 else "highest"

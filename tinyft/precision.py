"""Mixed precision: what is computed in 16 bits and what is not.

                 bits of exponent, fraction     largest      smallest       next after 1
    float32              8          23          3e38         1e-45          1 + 2⁻²³
    bfloat16             8           7          3e38         9e-41          1 + 2⁻⁷
    float16              5          10          65,504       6e-8           1 + 2⁻¹⁰

16 bits are for keeping and for multiplying: half the memory, half the traffic, and tensor cores.  They are not for adding up: to 256
bfloat16 cannot add 1.  So, wherever 16-bit numbers meet an op:

    inside     it computes in float32 and rounds what it gives, once.  A kernel may take 16-bit factors as they are, if it adds up in float32.
    autocast   PRODUCTS get their inputs rounded, SUMS get theirs in float32, all others take them as they come (of two kinds, the wider).
    gradients  have the dtype of what they are the gradient of, and are summed over a batch before they are rounded; `.grad` is float32.
    weights    that train stay in float32: under autocast the model's own; of a model in 16 bits, a copy that the optimiser keeps (optim.py).
    float16    has gradients too small for it: the loss is multiplied first, and the gradients divided (scaler.py).

On NumPy, which has no fast products of 16 bits, this rounds as on a device (but inside attention, whose kernel there rounds probabilities,
since they are factors of a product), and saves nothing.
"""
from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import dispatch
from .array import Array, address, bfloat16, is_array, xp

HALVES = {np.dtype(np.float16), bfloat16}
ROUNDABLE = {np.dtype(np.float32), *HALVES}              # float64 is for checking gradients, and stays what it is

# ── the policy ───────────────────────────────────────────────────────────────────────────────────────────────────────
PRODUCTS = {"linear", "matmul", "project", "attention", "_packed_linear"}
SUMS = {"sum", "mean", "cumsum", "softmax", "log_softmax", "layer_norm", "rms_norm", "exp", "log", "power"}      # and what soon overflows
LOSSES = {"cross_entropy"}                               # float32 whatever they are given, with autocast or without
VIEWS = {"reshape", "permute", "transpose", "broadcast_to"}                      # nothing is computed, either way
PICKS = {"getitem", "gather", "embedding"}               # nothing is computed; on the way back, sums
MIXING = {"add", "sub", "mul"}                           # with float32 on the other side: the array module widens as it goes


class _Here(threading.local):
    """What holds in this thread.  to: what autocast computes in, or None;  casts: {address of an array: (it, it in 16 bits)}, as of `writes`.

    An optimiser lays weights out end to end: they are cast together, once in a pass, and lie end to end again."""
    to: np.dtype | None = None
    casts: dict[int, tuple[Array, Array]] = {}
    then = -1


here = _Here()
writes = 0                                               # to leaves, anywhere: casts made before the last one are out of date


@contextlib.contextmanager
def autocast(dtype: Any = "bfloat16", enabled: bool = True) -> Iterator[None]:
    """with autocast("bfloat16"): loss = ...      products in 16 bits, sums in float32, as this file's first lines say.

    For the forward pass and the loss; backward goes the way that forward went.  float16 wants a GradScaler besides.  enabled=False: not
    in this part.  Of this thread alone.  TypeError for another dtype.      As torch.autocast; Micikevicius et al. 2018"""
    to, was = half(dtype) if enabled else None, (here.to, here.casts, here.then)
    here.to, here.casts = to, {}
    try:
        yield
    finally:
        here.to, here.casts, here.then = was


def half(dtype: Any) -> np.dtype:
    "float16 or bfloat16, from its name or itself.  TypeError for anything else."
    with contextlib.suppress(TypeError):                                         # of what NumPy does not know by this name
        if np.dtype(dtype) in HALVES:
            return np.dtype(dtype)
    raise TypeError(f"autocast computes in float16 or bfloat16, got {dtype!r}")


def given(name: str, arrays: list, kw: dict[str, Any]) -> tuple[list, dict[str, Any]]:
    "What the op `name` is given in place of these under autocast: of what is ROUNDABLE, PRODUCTS get it in here.to, SUMS in float32."
    to = here.to if name in PRODUCTS else np.dtype(np.float32) if name in SUMS else None
    if to is None:
        return arrays, kw
    cast = lambda a: rounded(a, to) if is_array(a) and a.dtype in ROUNDABLE else a
    return [cast(a) for a in arrays], {k: cast(a) for k, a in kw.items()}


def weight(a: Array) -> Array:
    "A weight for a product under autocast: rounded with all that an optimiser laid out beside it, once, until a leaf is written to."
    flat = a.base
    if a.dtype != np.float32 or flat is None or flat.ndim != 1 or flat.dtype != a.dtype or not a.flags.c_contiguous:
        return a
    if here.then != writes:
        here.casts.clear()
        here.then = writes
    at = address(flat)
    if at not in here.casts:
        here.casts[at] = flat, rounded(flat, here.to)
    (_, cast), start = here.casts[at], (address(a) - at) // a.itemsize
    return cast[start:start + a.size].reshape(a.shape)


# ── inside an op ─────────────────────────────────────────────────────────────────────────────────────────────────────
def narrow(arrays: Any) -> bool:
    "Whether there is an array of 16-bit floating-point numbers among these."
    for a in arrays:
        if getattr(a, "itemsize", None) == 2 and a.dtype in HALVES:
            return True
    return False


def widen(a: Any) -> Any:
    "16-bit numbers in float32, exactly; anything else as it is."
    return a.astype(np.float32) if is_array(a) and a.dtype in HALVES else a


def rounded(a: Any, dtype: np.dtype) -> Any:
    "a in this dtype; what is too large for it is infinite, and NumPy need not warn of that: a GradScaler finds it."
    if a.dtype == dtype:
        return a
    with np.errstate(over="ignore"):
        return a.astype(dtype)


def run(op: Callable, name: str, arrays: list, kw: dict[str, Any]) -> tuple:
    """dispatch.run for an op of which an input has 16 bits."""
    for kernel in dispatch.find(op, type(arrays[0])):
        result = in_float32(kernel, name)(*arrays, **kw)
        if result is not NotImplemented:
            return result
    return in_float32(op.definition, name)(*arrays, **kw)


def in_float32(f: Callable, name: str) -> Callable:
    "The op's function f, adding up in float32 what comes in 16 bits: arrays -> (value, pullbacks), the value rounded, gradients not yet."
    if name in VIEWS or getattr(f, "takes_halves", False):
        return f

    @functools.wraps(f)
    def wide(*arrays: Any, **kw: Any) -> tuple:
        if not narrow(arrays):
            return f(*arrays, **kw)
        floats = {a.dtype for a in arrays if is_array(a) and a.dtype.kind in "fV"}
        unchanged = name in PICKS or (name in MIXING and len(floats) == 2 and np.dtype(np.float32) in floats)
        result = f(*arrays, **kw) if unchanged else f(*map(widen, arrays), **{k: widen(a) for k, a in kw.items()})
        if result is NotImplemented:
            return NotImplemented
        value, pulls = result
        if not unchanged:
            if len(floats) == 1 and name not in LOSSES:
                value = tuple(rounded(v, *floats) for v in value) if isinstance(value, tuple) else rounded(value, *floats)
        if callable(pulls):
            return value, lambda g, needed: _apart(pulls, [widen(a) for a in g] if isinstance(g, list) else widen(g), needed)
        return value, [back and (lambda g, back=back: back(widen(g))) for back in pulls]
    return wide


def _apart(pulls: Callable, g: Any, needed: list[bool]) -> list:
    "The gradients, none of them the widened g or a view of it: the engine knows only the narrow one, and would add to what two inputs share."
    mine = g if isinstance(g, list) else [g]
    shared = lambda d: any(w is not None and xp(w).may_share_memory(d, w) for w in mine)
    return [d.copy() if d is not None and shared(d) else d for d in pulls(g, needed)]


def takes_halves(kernel: Callable) -> Callable:
    "Note of a kernel that it takes 16-bit numbers as they are, and adds up in float32."
    kernel.takes_halves = True
    return kernel


# ── products of float32 ──────────────────────────────────────────────────────────────────────────────────────────────
tf32 = False


def set_float32_matmul_precision(precision: str) -> None:
    """How exact a device's products of float32 are.  "highest": as float32.  "high": factors rounded to TF32, ten bits of fraction, sums in float32.

    Several times faster on tensor cores; on NumPy it changes nothing.  For all threads.  ValueError for another word.      As PyTorch's"""
    global tf32
    if precision not in ("highest", "high"):
        raise ValueError(f"the precision of float32 products is 'highest' or 'high' (TF32), got {precision!r}")
    tf32 = precision == "high"


def get_float32_matmul_precision() -> str:
    "What set_float32_matmul_precision set."
    return "high" if tf32 else "highest"


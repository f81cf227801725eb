"""PyTorch beside ops.py over random calls: shapes with axes of 0 and 1, vectors, wrong axes, broadcasting, ties.

A call gives the value and the gradients of PyTorch, in float64, or one of the two libraries refuses it; STRICTER and
WIDER name the cases in which only one of them does. Ours refuses in one sentence of its own.
"""
from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from helpers import dev, host

from tinyft import array, ops
from tinyft import functional as F
from tinyft.tensor import Tensor

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'tinyft[peers]'")
TF = torch.nn.functional
CALLS = 60                                               # of each kind
TOLERANCE = 1e-9


@dataclass
class Call:
    """One call: float64 inputs, and the same function of both libraries on tensors."""
    inputs: list[np.ndarray]
    ours: Callable
    theirs: Callable
    what: str = ""


KINDS: dict[str, Callable[[np.random.Generator], Call]] = {}


def kind(make: Callable) -> Callable:
    KINDS[make.__name__] = make
    return make


# ── random arguments ─────────────────────────────────────────────────────────────────────────────────────────────────
def a_shape(rng, most: int = 3, least: int = 0) -> tuple:
    ndim = int(rng.integers(least, most + 1))
    return tuple(int(n) for n in rng.choice([0, 1, 2, 3], ndim, p=[0.1, 0.3, 0.3, 0.3]))


def values(rng, shape: tuple) -> np.ndarray:
    """Normal numbers, or small whole ones, in which many are equal and many are zero."""
    normal = np.asarray(rng.standard_normal(shape))
    return np.round(normal) if rng.random() < 0.3 else normal * rng.choice([1, 1, 30])


def partner(rng, shape: tuple) -> tuple:
    """A shape that broadcasts with this one, most of the time."""
    if rng.random() < 0.15:
        return a_shape(rng)
    cut = shape[int(rng.integers(len(shape) + 1)):]
    return (*a_shape(rng, 1),) * (len(cut) == len(shape)) + tuple(n if rng.random() < 0.7 else 1 for n in cut)


def an_axis(rng, ndim: int) -> int:
    """An axis, now and then one that there is not."""
    return int(rng.integers(-ndim - 1, ndim + 1)) if rng.random() < 0.1 else int(rng.integers(-ndim, max(ndim, 1)))


def some_axes(rng, ndim: int) -> Any:
    if ndim == 0 or rng.random() < 0.2:
        return None
    if rng.random() < 0.5:
        return an_axis(rng, ndim)
    return tuple(an_axis(rng, ndim) for _ in range(rng.integers(1, 3)))


# ── the kinds of calls ───────────────────────────────────────────────────────────────────────────────────────────────
def two_operands(name: str, theirs: Callable) -> None:
    def make(rng) -> Call:
        shape = a_shape(rng)
        return Call([values(rng, shape), values(rng, partner(rng, shape))], getattr(ops, name), theirs)
    make.__name__ = name
    kind(make)


for name, f in (("add", torch.add), ("sub", torch.sub), ("mul", torch.mul), ("div", torch.div),
                ("maximum", torch.maximum)):
    two_operands(name, f)


@kind
def one_operand(rng) -> Call:
    pairs = {"neg": torch.neg, "exp": torch.exp, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "absolute": torch.abs,
             "relu": torch.relu, "silu": TF.silu, "gelu": TF.gelu,
             "gelu_tanh": lambda x: TF.gelu(x, approximate="tanh")}
    name = str(rng.choice(list(pairs)))
    return Call([values(rng, a_shape(rng))], getattr(ops, name), pairs[name], name)


@kind
def matmul(rng) -> Call:
    n, k, m = (int(v) for v in rng.integers(0, 4, 3))
    lead = a_shape(rng, 2)
    a = (k,) if rng.random() < 0.3 else (*lead, n, k)
    b = (k,) if rng.random() < 0.3 else (*partner(rng, lead), k, m)
    if rng.random() < 0.1:
        a = a_shape(rng)
    return Call([values(rng, a), values(rng, b)], ops.matmul, torch.matmul)


@kind
def linear(rng) -> Call:
    n, k = (int(v) for v in rng.integers(0, 4, 2))
    x = (*a_shape(rng, 2), k)
    b = (n,) if rng.random() < 0.7 else a_shape(rng, 2)
    inputs = [values(rng, x), values(rng, (n, k)), values(rng, b)][:3 if rng.random() < 0.7 else 2]
    return Call(inputs, ops.linear, TF.linear)


@kind
def reduction(rng) -> Call:
    name = str(rng.choice(["sum", "mean", "amax"]))
    x = values(rng, a_shape(rng))
    axis = some_axes(rng, x.ndim)
    keepdims = bool(rng.integers(2)) and axis is not None
    theirs = {"sum": torch.sum, "mean": torch.mean, "amax": torch.amax}[name]
    dim = {} if axis is None else {"dim": axis, "keepdim": keepdims}
    return Call([x], lambda x: getattr(ops, name)(x, axis=axis, keepdims=keepdims), lambda x: theirs(x, **dim),
                f"{name} axis={axis}")


@kind
def cumsum(rng) -> Call:
    x = values(rng, a_shape(rng))
    axis = an_axis(rng, x.ndim)
    return Call([x], lambda x: ops.cumsum(x, axis=axis), lambda x: torch.cumsum(x, axis), f"axis={axis}")


@kind
def where(rng) -> Call:
    shape = a_shape(rng)
    mask = rng.random(partner(rng, shape)) < 0.5
    return Call([values(rng, shape), values(rng, partner(rng, shape))], lambda a, b: ops.where(dev(mask), a, b),
                lambda a, b: torch.where(torch.tensor(mask), a, b))


@kind
def gather(rng) -> Call:
    x = values(rng, a_shape(rng, least=1))
    axis = an_axis(rng, x.ndim)
    shape = list(x.shape)
    if -x.ndim <= axis < x.ndim:
        shape[axis] = int(rng.integers(0, 4))
    if rng.random() < 0.2:
        shape = a_shape(rng)
    i = rng.integers(0, 3, shape)
    return Call([x], lambda x: ops.gather(x, dev(i), axis=axis), lambda x: torch.gather(x, axis, torch.tensor(i)),
                f"axis={axis} i={i.tolist()}")


@kind
def embedding(rng) -> Call:
    W = values(rng, a_shape(rng, 3) if rng.random() < 0.2 else (int(rng.integers(1, 4)), int(rng.integers(0, 3))))
    ids = rng.integers(0, 3, a_shape(rng))
    return Call([W], lambda W: ops.embedding(W, dev(ids)), lambda W: TF.embedding(torch.tensor(ids), W))


@kind
def getitem(rng) -> Call:
    x = values(rng, a_shape(rng, least=1))

    def part() -> Any:
        choices = [0, -1, 1, slice(None), slice(1, None), slice(0, 1), None, Ellipsis, [0, 0], [[0], [-1]],
                   np.array([0, 1]), np.array(0)]
        return choices[rng.integers(len(choices))]

    parts = tuple(part() for _ in range(rng.integers(1, 3)))
    index = parts[0] if len(parts) == 1 and rng.random() < 0.7 else parts

    def theirs(x: Any) -> Any:
        if isinstance(index, tuple):
            return x[tuple(torch.tensor(p) if isinstance(p, (np.ndarray, list)) else p for p in index)]
        return x[torch.tensor(index) if isinstance(index, (np.ndarray, list)) else index]
    return Call([x], lambda x: x[index], theirs, f"index={index}")


@kind
def mask_selection(rng) -> Call:
    x = values(rng, a_shape(rng, least=1))
    mask = rng.random(x.shape[:int(rng.integers(1, x.ndim + 1))]) < 0.5
    return Call([x], lambda x: x[dev(mask)], lambda x: x[torch.tensor(mask)])


@kind
def reshape(rng) -> Call:
    x = values(rng, a_shape(rng))
    choices = [(-1,), (x.size,), x.shape[::-1], (1, -1), (x.size, 1), (-1, -1), (2, -1), (-2,), (0, -1), (3,)]
    shape = choices[rng.integers(len(choices))]
    return Call([x], lambda x: ops.reshape(x, shape), lambda x: torch.reshape(x, shape), f"shape={shape}")


@kind
def permute(rng) -> Call:
    x = values(rng, a_shape(rng))
    axes = tuple(int(a) - x.ndim * int(rng.integers(2)) for a in rng.permutation(x.ndim))
    if rng.random() < 0.2:
        axes = tuple(an_axis(rng, x.ndim) for _ in range(rng.integers(4)))
    return Call([x], lambda x: ops.permute(x, axes), lambda x: torch.permute(x, axes), f"axes={axes}")


@kind
def broadcast_to(rng) -> Call:
    x = values(rng, a_shape(rng))
    shape = (*a_shape(rng, 1), *(n if n != 1 else int(rng.integers(0, 4)) for n in x.shape))
    if rng.random() < 0.2:
        shape = a_shape(rng)
    return Call([x], lambda x: ops.broadcast_to(x, shape), lambda x: torch.broadcast_to(x, shape), f"to {shape}")


@kind
def concatenate(rng) -> Call:
    shape = list(a_shape(rng, least=1))
    axis = an_axis(rng, len(shape))
    inputs = []
    for _ in range(rng.integers(1, 4)):
        if -len(shape) <= axis < len(shape):
            shape[axis] = int(rng.integers(0, 4))
        inputs.append(values(rng, tuple(shape) if rng.random() < 0.9 else a_shape(rng)))
    return Call(inputs, lambda *x: ops.concatenate(*x, axis=axis), lambda *x: torch.cat(x, axis), f"axis={axis}")


@kind
def stack(rng) -> Call:
    shape = a_shape(rng)
    axis = int(rng.integers(-len(shape) - 2, len(shape) + 2))
    inputs = [values(rng, shape if rng.random() < 0.9 else shape[::-1]) for _ in range(rng.integers(1, 4))]
    return Call(inputs, lambda *x: F.stack(list(x), axis=axis), lambda *x: torch.stack(x, axis), f"axis={axis}")


@kind
def softmax(rng) -> Call:
    name = str(rng.choice(["softmax", "log_softmax"]))
    return Call([values(rng, a_shape(rng))], getattr(ops, name), lambda x: getattr(TF, name)(x, dim=-1), name)


@kind
def norm(rng) -> Call:
    x = values(rng, a_shape(rng))
    row = x.shape[-1:]
    w = values(rng, row if rng.random() < 0.8 else a_shape(rng))
    b = values(rng, row if rng.random() < 0.8 else a_shape(rng))
    if rng.integers(2):
        return Call([x, w, b], ops.layer_norm, lambda x, w, b: TF.layer_norm(x, row, w, b), "layer_norm")
    return Call([x, w], ops.rms_norm, lambda x, w: TF.rms_norm(x, row, w, 1e-6), "rms_norm")


@kind
def normalize(rng) -> Call:
    x = values(rng, a_shape(rng, least=1))
    axis = an_axis(rng, x.ndim)
    return Call([x], lambda x: F.normalize(x, axis=axis), lambda x: TF.normalize(x, dim=axis), f"axis={axis}")


@kind
def mse_loss(rng) -> Call:
    shape = a_shape(rng)
    return Call([values(rng, shape), values(rng, shape if rng.random() < 0.8 else partner(rng, shape))], F.mse_loss,
                TF.mse_loss)


@kind
def cross_entropy(rng) -> Call:
    lead = a_shape(rng, 2)
    classes = int(rng.integers(1, 4))
    shape = lead if rng.random() < 0.85 else lead[::-1]
    y = np.asarray(rng.choice([-100, -1, 0, 1, 2, 3], shape, p=[0.2, 0.04, 0.4, 0.2, 0.1, 0.06]))
    weight = rng.uniform(0, 2, classes if rng.random() < 0.9 else 2) if rng.integers(2) else None
    smoothing = float(rng.choice([0.0, 0.2, 1.0, 1.5], p=[0.5, 0.3, 0.15, 0.05]))

    def ours(z: Tensor) -> Tensor:
        our_weight = None if weight is None else dev(weight)
        return ops.cross_entropy(z, dev(y), our_weight, label_smoothing=smoothing)

    def theirs(z: Any) -> Any:
        """PyTorch has the classes on axis 1, and takes no leading axis of a single row as we do."""
        if y.shape != tuple(z.shape[:-1]):
            raise ValueError("labels of another shape")
        torch_weight = None if weight is None else torch.tensor(weight)
        return TF.cross_entropy(z.reshape(math.prod(lead), classes), torch.tensor(y).reshape(-1), torch_weight,
                                label_smoothing=smoothing)
    return Call([values(rng, (*lead, classes))], ours, theirs, f"y={y.tolist()} weight={weight} smoothing={smoothing}")


@kind
def attention(rng) -> Call:
    lead = (int(rng.integers(0, 3)), int(rng.integers(1, 3)))
    t, s, d = int(rng.integers(1, 4)), int(rng.integers(0, 4)), int(rng.integers(1, 4))
    mask_shape = tuple(n if rng.random() < 0.6 else 1 for n in (*lead, t, s))
    if rng.random() < 0.2:
        mask_shape = (lead[0] + 1, *mask_shape[1:])
    mask = rng.random(mask_shape) < 0.7
    inputs = [values(rng, (*lead, t, d)), values(rng, (*lead, s, d)), values(rng, (*lead, s, d))]
    dead = ~mask.any(-1, keepdims=True)

    def theirs(q: Any, k: Any, v: Any) -> Any:
        """Queries without keys give NaN in some versions; ours are zeros."""
        seen = torch.tensor(mask) | torch.tensor(dead)
        y = TF.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        if tuple(y.shape) != (*lead, t, d):
            raise ValueError("a mask for another batch")
        return y * torch.tensor(~dead)
    return Call(inputs, lambda q, k, v: ops.attention(q, k, v, key_mask=dev(mask)), theirs, f"mask {mask_shape}")


# ── where one library is stricter ────────────────────────────────────────────────────────────────────────────────────
STRICTER = {                                             # kind -> what ours refuses and PyTorch takes
    "linear": ["b wants the shape", "n is ", "W wants two axes"],                # a bias that broadcasts
    "reduction": ["axis wants one of the 0 axes"],                               # axis 0 of a number
    "cumsum": ["axis wants one of the 0 axes"],
    "softmax": ["one entry or more"],
    "norm": ["one entry or more"],
    "gather": ["indices wants the shape of x"],                                  # fewer rows of indices than of x
    "mse_loss": ["one shape"],
    "cross_entropy": ["one entry or more"],
    "attention": ["a key_mask that broadcasts"],                                 # of no keys
    "concatenate": ["same number of axes", "axis wants one of the 1 axes"],      # of an empty array of one axis
    "embedding": ["ids wants rows of W"],
    "getitem": ["an index wants to fit"],                                       # where nothing is selected
}
WIDER = {                                                # kind -> what PyTorch refuses and ours takes
    "getitem",                                           # more than one ellipsis is an error in both; −1 as an index
    "reshape",
    "gather",                                            # an empty index of another type
    "cross_entropy",
    "attention",                                         # no rows, no keys
    "norm",
}


def outcome(call: Callable, arrays: list, make: Callable, to_host: Callable, rng_covector: int) -> Any:
    """(value, gradients) on the host, or the exception."""
    leaves = [make(a) for a in arrays]
    try:
        y = call(*leaves)
    except (ValueError, TypeError, IndexError, RuntimeError) as e:
        return e
    g = np.asarray(np.cos(np.arange(math.prod(y.shape)) + rng_covector).reshape(tuple(y.shape)))
    if y.requires_grad:
        y.backward(dev(g) if isinstance(y, Tensor) else torch.tensor(g))
    return [to_host(y), *(np.zeros(a.shape) if t.grad is None else to_host(t.grad) for a, t in zip(arrays, leaves))]


def of_torch(t: Any) -> np.ndarray:
    return t.detach().numpy()


def compare(name: str, call: Call, number: int) -> str:
    """What happened: "equal", "both refuse", or the case of STRICTER or WIDER. AssertionError for a difference."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)     # PyTorch's, of shapes that broadcast
        theirs = outcome(call.theirs, call.inputs, lambda a: torch.tensor(a, requires_grad=True), of_torch, number)
        ours = outcome(call.ours, call.inputs, lambda a: Tensor(dev(a), requires_grad=True), host, number)
    about = f"{name} {call.what} of {[a.shape for a in call.inputs]}"
    if isinstance(ours, Exception):
        assert "wants" in str(ours) or name in str(ours), f"{about}: no sentence of ours: {ours}"
        if isinstance(theirs, Exception):
            return "both refuse"
        assert any(words in str(ours) for words in STRICTER.get(name, [])), f"{about}: only ours refuses: {ours}"
        return "ours refuses"
    if isinstance(theirs, Exception):
        assert name in WIDER, f"{about}: only PyTorch refuses: {str(theirs)[:200]}"
        return "theirs refuses"
    for part, (a, b) in enumerate(zip(ours, theirs)):
        assert a.shape == b.shape, f"{about}: shape {a.shape} of part {part}, not {b.shape}"
        largest = np.abs(b[np.isfinite(b)]).max(initial=1)
        np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * largest, err_msg=f"{about}, part {part}")
    return "equal"


@pytest.mark.skipif(array.backend() == "cupy", reason="a device refuses less: it is not asked")
@pytest.mark.parametrize("name", KINDS)
def test_a_random_call_is_pytorchs_or_is_refused(name):
    seen: dict[str, int] = {}
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for i in range(CALLS):
            rng = np.random.default_rng([i, *name.encode()])
            what = compare(name, KINDS[name](rng), i)
            seen[what] = seen.get(what, 0) + 1
    assert seen.get("equal", 0) >= CALLS / 4, seen

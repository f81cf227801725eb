"""PyTorch beside ops.py: the value of every op and its gradient for every input, in float64, to 1e-10.

TABLE holds, for each op, rows of (ours, theirs, inputs): two functions of the same arrays, and how to draw them.  Where a function has a
kink (a tie, a bound, a zero) the inputs are put right on it: there the two libraries must choose the same subgradient."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import dev, host

from tinyft import array, dispatch, nn, ops
from tinyft.tensor import OPS, Tensor

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'tinyft[peers]'")
F = torch.nn.functional

NO_COUNTERPART = {"dropout": "its noise comes from a key of ours; test_ops.py holds it to its definition",
                  "project": "it gives three values; test_ops.py holds it to three of linear, which is compared here"}
TOLERANCE = 1e-10
Draw = Callable[[np.random.Generator], list[np.ndarray]]
TABLE: dict[str, list[tuple[str, Callable, Callable, Draw]]] = {}


def row(op: str, ours: Callable, theirs: Callable, *shapes: Any, draw: Draw | None = None, note: str = "") -> None:
    """One comparison.  Inputs are normal numbers of these shapes, or what `draw` gives."""
    TABLE.setdefault(op, []).append((note, ours, theirs, draw or (lambda rng: [rng.standard_normal(s) for s in shapes])))


def positive(*shapes: Any) -> Draw:
    return lambda rng: [rng.uniform(0.2, 3, s) for s in shapes]


def ties(*shapes: Any) -> Draw:
    """Small whole numbers: many are equal, and many are zero."""
    return lambda rng: [rng.integers(-2, 3, s).astype(np.float64) for s in shapes]


# ── arithmetic ──
row("add", ops.add, torch.add, (3, 1, 4), (2, 4), note="broadcast")
row("sub", ops.sub, torch.sub, (3, 4), (4,), note="broadcast")
row("mul", ops.mul, torch.mul, (2, 3, 1), (3, 4), note="broadcast")
row("div", ops.div, torch.div, draw=lambda rng: [rng.standard_normal((3, 4)), rng.uniform(0.5, 2, (3, 1))], note="broadcast")
row("neg", ops.neg, torch.neg, (3, 4))
row("power", lambda x: ops.power(x, 3), lambda x: x**3, (3, 4))
row("power", lambda x: ops.power(x, -0.5), lambda x: x**-0.5, draw=positive((3, 4)), note="negative, broken")
row("matmul", ops.matmul, torch.matmul, (2, 1, 3, 4), (5, 4, 6), note="broadcast")
row("linear", ops.linear, F.linear, (2, 3, 4), (5, 4), (5,))
row("linear", ops.linear, F.linear, (2, 3, 4), (5, 4), note="no bias")


# ── elementwise ──
for name, f in (("exp", torch.exp), ("tanh", torch.tanh), ("sigmoid", torch.sigmoid), ("silu", F.silu), ("gelu", F.gelu),
                ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"))):
    row(name, OPS[name], f, (3, 4))
    row(name, OPS[name], f, draw=lambda rng: [np.linspace(-12, 12, 97)], note="the tails")
for name, f in (("log", torch.log), ("sqrt", torch.sqrt)):
    row(name, OPS[name], f, draw=positive((3, 4)))
row("absolute", ops.absolute, torch.abs, draw=ties((5, 6)), note="zeros")
row("relu", ops.relu, F.relu, draw=ties((5, 6)), note="zeros")


# ── reductions ──
for name, f in (("sum", torch.sum), ("mean", torch.mean)):
    row(name, OPS[name], f, (3, 4))
    row(name, lambda x, g=OPS[name]: g(x, axis=(0, -1)), lambda x, g=f: g(x, dim=(0, -1)), (2, 3, 4), note="two axes")
    row(name, lambda x, g=OPS[name]: g(x, axis=1, keepdims=True), lambda x, g=f: g(x, dim=1, keepdim=True), (2, 3, 4), note="keepdims")
row("amax", lambda x: ops.amax(x, axis=-1), lambda x: torch.amax(x, dim=-1), (3, 4))
row("amax", lambda x: ops.amax(x, axis=(0, 2)), lambda x: torch.amax(x, dim=(0, 2)), draw=ties((3, 4, 5)), note="ties, two axes")
row("amax", lambda x: ops.amax(x, axis=1, keepdims=True), lambda x: torch.amax(x, dim=1, keepdim=True), draw=ties((3, 4, 5)),
    note="ties, keepdims")
row("amax", ops.amax, torch.amax, draw=ties((3, 4)), note="ties, all")
row("cumsum", ops.cumsum, lambda x: torch.cumsum(x, -1), (3, 4))
row("cumsum", lambda x: ops.cumsum(x, axis=0), lambda x: torch.cumsum(x, 0), (3, 4), note="first axis")


# ── choosing ──
MASK = np.array([[True, False, True, True], [False, False, True, False], [True, True, False, False]])
ROWS = np.array([[2, 0, 2], [1, 1, 0]])
row("where", lambda a, b: ops.where(dev(MASK), a, b), lambda a, b: torch.where(torch.tensor(MASK), a, b), (4,), (3, 1), note="broadcast")
row("maximum", ops.maximum, torch.maximum, draw=ties((5, 6), (5, 6)), note="ties")
row("maximum", ops.maximum, torch.maximum, (3, 1), (4,), note="broadcast")
row("clip", lambda x: ops.clip(x, -1, 1), lambda x: torch.clamp(x, -1, 1), draw=ties((5, 6)), note="at the bounds")
row("clip", lambda x: ops.clip(x, -0.5, 0.7), lambda x: torch.clamp(x, -0.5, 0.7), (5, 6))
row("straight_through", lambda s: ops.straight_through(dev(np.ones((3, 4))), s), lambda s: s + (1 - s).detach(), (3, 4))
row("gather", lambda x: ops.gather(x, dev(ROWS), axis=-1), lambda x: torch.gather(x, -1, torch.tensor(ROWS)), (2, 4), note="twice the same")
row("gather", lambda x: ops.gather(x, dev(ROWS), axis=0), lambda x: torch.gather(x, 0, torch.tensor(ROWS)), (3, 3), note="first axis")
row("embedding", lambda W: ops.embedding(W, dev(ROWS)), lambda W: F.embedding(torch.tensor(ROWS), W), (4, 5), note="twice the same")
row("getitem", lambda x: x[1:, ::2], lambda x: x[1:, ::2], (3, 4), note="slices")
row("getitem", lambda x: x[:, None, -1], lambda x: x[:, None, -1], (3, 4), note="integer and new axis")
row("getitem", lambda x: x[dev(ROWS)], lambda x: x[torch.tensor(ROWS)], (3, 4), note="integers, twice the same")
row("getitem", lambda x: x[dev(np.array([0, 0, 2])), dev(np.array([1, 1, 3]))], lambda x: x[[0, 0, 2], [1, 1, 3]], (3, 4), note="pairs")


# ── shape ──
row("reshape", lambda x: x.reshape(4, -1), lambda x: x.reshape(4, -1), (2, 3, 4))
row("permute", lambda x: x.permute(2, 0, 1), lambda x: x.permute(2, 0, 1), (2, 3, 4))
row("permute", lambda x: x.permute(-1, 0, 1), lambda x: x.permute(-1, 0, 1), (2, 3, 4), note="negative")
row("transpose", ops.transpose, lambda x: x.transpose(-1, -2), (2, 3, 4))
row("broadcast_to", lambda x: ops.broadcast_to(x, (5, 3, 4)), lambda x: torch.broadcast_to(x, (5, 3, 4)), (3, 1))
row("concatenate", lambda *x: ops.concatenate(*x, axis=1), lambda *x: torch.cat(x, 1), (2, 3, 4), (2, 1, 4), (2, 2, 4))
row("concatenate", lambda *x: ops.concatenate(*x, axis=-1), lambda *x: torch.cat(x, -1), (2, 3), (2, 2), note="last axis")


# ── layers ──
row("softmax", ops.softmax, lambda x: F.softmax(x, -1), (2, 3, 5))
row("softmax", ops.softmax, lambda x: F.softmax(x, -1), draw=lambda rng: [rng.standard_normal((3, 5)) * 300], note="large")
row("log_softmax", ops.log_softmax, lambda x: F.log_softmax(x, -1), (2, 3, 5))
row("log_softmax", ops.log_softmax, lambda x: F.log_softmax(x, -1), draw=lambda rng: [rng.standard_normal((3, 5)) * 300], note="large")
for eps in (1e-5, 1e-12, 0.5):
    row("layer_norm", lambda x, w, b, e=eps: ops.layer_norm(x, w, b, eps=e), lambda x, w, b, e=eps: F.layer_norm(x, (6,), w, b, e),
        (2, 3, 6), (6,), (6,), note=f"eps {eps}")
    row("rms_norm", lambda x, w, e=eps: ops.rms_norm(x, w, eps=e), lambda x, w, e=eps: F.rms_norm(x, (6,), w, e), (2, 3, 6), (6,),
        note=f"eps {eps}")

QKV = (2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)           # (B, H, t, d), (B, H, s, d)
SEEN = np.arange(7) < np.array([7, 4])[:, None]          # right padding
CAUSAL = np.tri(5, 7, 2, dtype=bool)                     # five queries after two cached keys
FREE = np.random.default_rng(5).random((2, 3, 5, 7)) < 0.5
FREE[..., 0] = True                                      # every query looks somewhere: nowhere is zeros here and NaN in torch
KEEP = (np.random.default_rng(6).random((2, 3, 5, 7)) < 0.8) / 0.8


def sdpa(mask: np.ndarray | None, scale: float | None = None) -> Callable:
    m = None if mask is None else torch.tensor(mask)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=m, scale=scale)


row("attention", ops.attention, sdpa(None), *QKV)
row("attention", lambda *x: ops.attention(*x, key_mask=dev(SEEN[:, None, None])), sdpa(SEEN[:, None, None]), *QKV, note="padding")
row("attention", lambda *x: ops.attention(*x, key_mask=dev(FREE)), sdpa(FREE), *QKV, note="any mask")
row("attention", lambda *x: ops.attention(*x, causal=True), sdpa(CAUSAL), *QKV, note="causal, cached keys")
row("attention", lambda *x: ops.attention(*x, causal=True), lambda *x: F.scaled_dot_product_attention(*x, is_causal=True),
    *([(2, 3, 5, 4)] * 3), note="causal")
row("attention", lambda *x: ops.attention(*x, key_mask=dev(SEEN[:, None, None]), causal=True), sdpa(SEEN[:, None, None] & CAUSAL), *QKV,
    note="causal and padding")
row("attention", lambda *x: ops.attention(*x, scale=1.0), sdpa(None, 1.0), *QKV, note="scale")
row("attention", lambda *x: ops.attention(*x, dropout_mask=dev(KEEP)),
    lambda q, k, v: (F.softmax(q @ k.transpose(-1, -2) / math.sqrt(4), -1) * torch.tensor(KEEP)) @ v, *QKV, note="dropout's factors")

LABELS = np.array([[1, -100, 4], [0, 2, 2]])
WEIGHT = np.array([0.5, 2.0, 1.0, 3.0, 0.1])


def losses(weight: np.ndarray | None, ignore: int, smoothing: float) -> tuple[Callable, Callable]:
    labels = np.where(LABELS == -100, ignore, LABELS)
    about = dict(ignore_index=ignore, label_smoothing=smoothing)
    mine, its = (None, None) if weight is None else (dev(weight), torch.tensor(weight))
    return (lambda z: ops.cross_entropy(z, dev(labels), weight=mine, **about),
            lambda z: F.cross_entropy(z.flatten(0, 1), torch.tensor(labels).flatten(), its, **about))


for smoothing in (0.0, 0.3):
    for weight, kind in ((None, "no weights"), (WEIGHT, "weights")):
        for ignore in (-100, 2):
            row("cross_entropy", *losses(weight, ignore, smoothing), (2, 3, 5), note=f"smoothing {smoothing}, {kind}, ignore {ignore}")


class Dense(nn.Packed):
    """A packed weight that is its own code."""

    def __init__(self, W: np.ndarray):
        self.W, self.shape = dev(W), W.shape

    def dequantize(self) -> Any:
        return self.W


PACKED = np.random.default_rng(7).standard_normal((5, 4))
row("_packed_linear", lambda x: Dense(PACKED).matmul(x), lambda x: F.linear(x, torch.tensor(PACKED)), (2, 3, 4))

EVERY = [pytest.param(op, i, id=f"{op}{' ' * bool(note)}{note}") for op, rows in TABLE.items() for i, (note, *_) in enumerate(rows)]


def agree(ours: Callable, theirs: Callable, arrays: list[np.ndarray], rng: np.random.Generator) -> None:
    """The same value, and the same gradients of its product with a random covector, which a sum of all entries would not see."""
    mine, torchs = [Tensor(dev(a), requires_grad=True) for a in arrays], [torch.tensor(a, requires_grad=True) for a in arrays]
    y, want = ours(*mine), theirs(*torchs)
    covector = np.asarray(rng.standard_normal(tuple(want.shape)))
    y.backward(dev(covector))
    want.backward(torch.tensor(covector))
    for what, a, b in [("value", host(y), want.detach().numpy())] + [(f"gradient {i}", host(m.grad), t.grad.numpy())
                                                                     for i, (m, t) in enumerate(zip(mine, torchs))]:
        assert a is not None and a.shape == b.shape and a.dtype == np.float64, what
        assert np.abs(a - b).max() <= TOLERANCE * max(np.abs(b).max(), 1), f"{what}: {np.abs(a - b).max():.3g} apart"


@pytest.mark.parametrize("op,i", EVERY)
def test_value_and_gradients(op, i, rng):
    _, ours, theirs, draw = TABLE[op][i]
    for _ in range(3):
        agree(ours, theirs, draw(rng), rng)


def test_every_op_is_in_the_table():
    library = {n for n, f in OPS.items() if f.definition.__module__.split(".")[0] == "tinyft"}
    assert library == TABLE.keys() | NO_COUNTERPART.keys() and not TABLE.keys() & NO_COUNTERPART.keys()


WRONG = {
    "gelu": ops.gelu_tanh, "gelu_tanh": ops.gelu,
    "relu": lambda x: ops.maximum(x, dev(np.zeros(1))),                          # half the gradient at zero
    "sigmoid": lambda x: ops.sigmoid(x) + x * 1e-9,
    "softmax": lambda x: ops.softmax(x) + (x - Tensor(x.data)),                  # the right value
    "log_softmax": lambda x: ops.log_softmax(Tensor(x.data)) + (x - Tensor(x.data)),
    "transpose": lambda x: ops.transpose(x) * (1 + 1e-9)}


@pytest.mark.parametrize("op", WRONG)
def test_wrong_ops_are_caught(op, rng):
    """Another form, another subgradient at a kink, a right value with a wrong gradient, an error of 1e-9: each is refused."""
    caught = 0
    for _, _, theirs, draw in TABLE[op]:
        try:
            agree(WRONG[op], theirs, draw(rng), rng)
        except AssertionError as e:
            assert "apart" in str(e)
            caught += 1
    assert caught


@pytest.mark.skipif(array.backend() != "numpy", reason="these kernels are NumPy's")
@pytest.mark.parametrize("op", ["gelu", "gelu_tanh", "layer_norm", "embedding"])
def test_kernels_in_single_precision(op, rng):
    """The fast drop-ins work in float32, where they are what runs: to 1e-5 of PyTorch."""
    assert dispatch.find(OPS[op], np.ndarray), "the kernels are not installed"
    for note, ours, theirs, _ in TABLE[op]:
        if note == "the tails":
            continue
        shapes = [(40, 6), (6,), (6,)] if op == "layer_norm" else [(40, 6)]
        arrays = [rng.standard_normal(s).astype(np.float32) for s in shapes]
        mine, torchs = [Tensor(a, requires_grad=True) for a in arrays], [torch.tensor(a, requires_grad=True) for a in arrays]
        y, want = ours(*mine), theirs(*torchs)
        g = rng.standard_normal(tuple(want.shape)).astype(np.float32)
        y.backward(g)
        want.backward(torch.tensor(g))
        for a, b in [(y.data, want.detach()), *((m.grad, t.grad) for m, t in zip(mine, torchs))]:
            assert np.abs(a - b.numpy()).max() <= 1e-5 * max(float(b.abs().max()), 1)

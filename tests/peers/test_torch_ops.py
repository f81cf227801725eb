"""PyTorch beside ops.py: the value of every op and its gradient for every input, in float64, to 1e-10.

TABLE holds rows for each op: our function, PyTorch's function and a function that draws the inputs.  Where an op has a
kink (a tie, a bound, a zero), some inputs lie exactly on it: the two libraries must choose the same subgradient there.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from helpers import dev, host

import tinyft as ft
from tinyft import array, dispatch, nn, ops
from tinyft.tensor import OPS, Tensor

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'tinyft[peers]'")
F = torch.nn.functional

NO_COUNTERPART = {
    "dropout": "its mask comes from a key of ours; test_ops.py compares it with plain NumPy",
    "project": "it gives three values; test_ops.py compares it with three linear ops, and linear is compared here",
    "cast": "it gives another dtype; test_ops.py compares it with astype",
}
TOLERANCE = 1e-10
Draw = Callable[[np.random.Generator], list[np.ndarray]]
TABLE: dict[str, list[tuple[str, Callable, Callable, Draw]]] = {}


def row(op: str, ours: Callable, theirs: Callable, *shapes: Any, draw: Draw | None = None, note: str = "") -> None:
    """Add one comparison.  The inputs are normal numbers of these shapes, or the arrays that `draw` returns."""
    TABLE.setdefault(op, []).append((note, ours, theirs, draw or normal(*shapes)))


def normal(*shapes: Any) -> Draw:
    return lambda rng: [rng.standard_normal(s) for s in shapes]


def positive(*shapes: Any) -> Draw:
    return lambda rng: [rng.uniform(0.2, 3, s) for s in shapes]


def ties(*shapes: Any) -> Draw:
    """Small whole numbers: many are equal, and many are zero."""
    return lambda rng: [rng.integers(-2, 3, s).astype(np.float64) for s in shapes]


def large(*shapes: Any) -> Draw:
    return lambda rng: [rng.standard_normal(s) * 300 for s in shapes]


def numerator_and_divisor(rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.standard_normal((3, 4)), rng.uniform(0.5, 2, (3, 1))]


def tails(rng: np.random.Generator) -> list[np.ndarray]:
    return [np.linspace(-12, 12, 97)]


# ── arithmetic ──
row("add", ops.add, torch.add, (3, 1, 4), (2, 4), note="broadcast")
row("sub", ops.sub, torch.sub, (3, 4), (4,), note="broadcast")
row("mul", ops.mul, torch.mul, (2, 3, 1), (3, 4), note="broadcast")
row("div", ops.div, torch.div, draw=numerator_and_divisor, note="broadcast")
row("neg", ops.neg, torch.neg, (3, 4))
row("power", lambda x: ops.power(x, 3), lambda x: x**3, (3, 4))
row("power", lambda x: ops.power(x, -0.5), lambda x: x**-0.5, draw=positive((3, 4)), note="negative, broken")
row("matmul", ops.matmul, torch.matmul, (2, 1, 3, 4), (5, 4, 6), note="broadcast")
row("linear", ops.linear, F.linear, (2, 3, 4), (5, 4), (5,))
row("linear", ops.linear, F.linear, (2, 3, 4), (5, 4), note="no bias")


# ── elementwise ──
ELEMENTWISE = {
    "exp": torch.exp,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
for name, f in ELEMENTWISE.items():
    row(name, OPS[name], f, (3, 4))
    row(name, OPS[name], f, draw=tails, note="the tails")
for name, f in (("log", torch.log), ("sqrt", torch.sqrt)):
    row(name, OPS[name], f, draw=positive((3, 4)))
row("absolute", ops.absolute, torch.abs, draw=ties((5, 6)), note="zeros")
row("relu", ops.relu, F.relu, draw=ties((5, 6)), note="zeros")


# ── reductions ──
for name, f in (("sum", torch.sum), ("mean", torch.mean)):
    row(name, OPS[name], f, (3, 4))
    row(name, partial(OPS[name], axis=(0, -1)), partial(f, dim=(0, -1)), (2, 3, 4), note="two axes")
    row(name, partial(OPS[name], axis=1, keepdims=True), partial(f, dim=1, keepdim=True), (2, 3, 4), note="keepdims")
row("amax", partial(ops.amax, axis=-1), partial(torch.amax, dim=-1), (3, 4))
row("amax", partial(ops.amax, axis=(0, 2)), partial(torch.amax, dim=(0, 2)), draw=ties((3, 4, 5)),
    note="ties, two axes")
row("amax", partial(ops.amax, axis=1, keepdims=True), partial(torch.amax, dim=1, keepdim=True), draw=ties((3, 4, 5)),
    note="ties, keepdims")
row("amax", ops.amax, torch.amax, draw=ties((3, 4)), note="ties, all")
row("cumsum", ops.cumsum, partial(torch.cumsum, dim=-1), (3, 4))
row("cumsum", partial(ops.cumsum, axis=0), partial(torch.cumsum, dim=0), (3, 4), note="first axis")


# ── choosing ──
MASK = np.array([[True, False, True, True], [False, False, True, False], [True, True, False, False]])
ROWS = np.array([[2, 0, 2], [1, 1, 0]])
row("where", lambda a, b: ops.where(dev(MASK), a, b), lambda a, b: torch.where(torch.tensor(MASK), a, b),
    (4,), (3, 1), note="broadcast")
row("maximum", ops.maximum, torch.maximum, draw=ties((5, 6), (5, 6)), note="ties")
row("maximum", ops.maximum, torch.maximum, (3, 1), (4,), note="broadcast")
row("clip", lambda x: ops.clip(x, -1, 1), lambda x: torch.clamp(x, -1, 1), draw=ties((5, 6)), note="at the bounds")
row("clip", lambda x: ops.clip(x, -0.5, 0.7), lambda x: torch.clamp(x, -0.5, 0.7), (5, 6))
row("straight_through", lambda s: ops.straight_through(dev(np.ones((3, 4))), s), lambda s: s + (1 - s).detach(), (3, 4))
row("gather", lambda x: ops.gather(x, dev(ROWS), axis=-1), lambda x: torch.gather(x, -1, torch.tensor(ROWS)),
    (2, 4), note="twice the same")
row("gather", lambda x: ops.gather(x, dev(ROWS), axis=0), lambda x: torch.gather(x, 0, torch.tensor(ROWS)),
    (3, 3), note="first axis")
row("split", lambda x: ops.concatenate(*ops.split(x, (2, 0, 1))[::-1]),
    lambda x: torch.cat(torch.split(x, (2, 0, 1))[::-1]), (3, 4), note="an empty part")
row("embedding", lambda W: ops.embedding(W, dev(ROWS)), lambda W: F.embedding(torch.tensor(ROWS), W),
    (4, 5), note="twice the same")
row("getitem", lambda x: x[1:, ::2], lambda x: x[1:, ::2], (3, 4), note="slices")
row("getitem", lambda x: x[:, None, -1], lambda x: x[:, None, -1], (3, 4), note="integer and new axis")
row("getitem", lambda x: x[dev(ROWS)], lambda x: x[torch.tensor(ROWS)], (3, 4), note="integers, twice the same")
row("getitem", lambda x: x[dev(np.array([0, 0, 2])), dev(np.array([1, 1, 3]))], lambda x: x[[0, 0, 2], [1, 1, 3]],
    (3, 4), note="pairs")


# ── shape ──
row("reshape", lambda x: x.reshape(4, -1), lambda x: x.reshape(4, -1), (2, 3, 4))
row("permute", lambda x: x.permute(2, 0, 1), lambda x: x.permute(2, 0, 1), (2, 3, 4))
row("permute", lambda x: x.permute(-1, 0, 1), lambda x: x.permute(-1, 0, 1), (2, 3, 4), note="negative")
row("transpose", ops.transpose, lambda x: x.transpose(-1, -2), (2, 3, 4))
row("broadcast_to", lambda x: ops.broadcast_to(x, (5, 3, 4)), lambda x: torch.broadcast_to(x, (5, 3, 4)), (3, 1))
row("concatenate", lambda *x: ops.concatenate(*x, axis=1), lambda *x: torch.cat(x, 1), (2, 3, 4), (2, 1, 4), (2, 2, 4))
row("concatenate", lambda *x: ops.concatenate(*x, axis=-1), lambda *x: torch.cat(x, -1), (2, 3), (2, 2),
    note="last axis")


# ── layers ──
row("softmax", ops.softmax, partial(F.softmax, dim=-1), (2, 3, 5))
row("softmax", ops.softmax, partial(F.softmax, dim=-1), draw=large((3, 5)), note="large")
row("log_softmax", ops.log_softmax, partial(F.log_softmax, dim=-1), (2, 3, 5))
row("log_softmax", ops.log_softmax, partial(F.log_softmax, dim=-1), draw=large((3, 5)), note="large")
for eps in (1e-5, 1e-12, 0.5):
    row("layer_norm", partial(ops.layer_norm, eps=eps), lambda x, w, b, eps=eps: F.layer_norm(x, (6,), w, b, eps),
        (2, 3, 6), (6,), (6,), note=f"eps {eps}")
    row("rms_norm", partial(ops.rms_norm, eps=eps), lambda x, w, eps=eps: F.rms_norm(x, (6,), w, eps),
        (2, 3, 6), (6,), note=f"eps {eps}")

ANGLES = np.tile(np.linspace(-3.0, 3.0, 10).reshape(5, 2), 2)                    # (T, D), equal in both halves


def torch_rotary(x):
    """Each pair (xᵢ, xᵢ₊D⸝₂) as a complex number, times e^(i angle)."""
    turned = torch.complex(x[..., :2], x[..., 2:]) * torch.polar(torch.ones(5, 2).double(), torch.tensor(ANGLES[:, :2]))
    return torch.cat([turned.real, turned.imag], dim=-1)


row("rotary", lambda x: ops.rotary(x, dev(np.cos(ANGLES)), dev(np.sin(ANGLES))), torch_rotary, (2, 3, 5, 4))
row("swiglu", ops.swiglu, lambda a, b: F.silu(a) * b, (2, 3, 4), (2, 3, 4))
QKV = (2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)           # (B, H, Tq, D), (B, H, Tk, D) twice
PADDING = np.arange(7) < np.array([7, 4])[:, None]       # (B, Tk) right padding
PADDING = PADDING[:, None, None]                         # (B, 1, 1, Tk)
CAUSAL = np.tri(5, 7, 2, dtype=bool)                     # five queries after two cached keys
ANY_MASK = np.random.default_rng(5).random((2, 3, 5, 7)) < 0.5
ANY_MASK[..., 0] = True                                  # a query without a key gives zeros here, but NaN in PyTorch
DROPOUT_MASK = (np.random.default_rng(6).random((2, 3, 5, 7)) < 0.8) / 0.8


def torch_attention(mask: np.ndarray | None, scale: float | None = None) -> Callable:
    mask = None if mask is None else torch.tensor(mask)
    return partial(F.scaled_dot_product_attention, attn_mask=mask, scale=scale)


def torch_attention_with_dropout(q: Any, k: Any, v: Any) -> Any:
    p = F.softmax(q @ k.transpose(-1, -2) / math.sqrt(4), -1)
    return (p * torch.tensor(DROPOUT_MASK)) @ v


row("attention", ops.attention, torch_attention(None), *QKV)
row("attention", partial(ops.attention, key_mask=dev(PADDING)), torch_attention(PADDING), *QKV, note="padding")
row("attention", partial(ops.attention, key_mask=dev(ANY_MASK)), torch_attention(ANY_MASK), *QKV, note="any mask")
row("attention", partial(ops.attention, causal=True), torch_attention(CAUSAL), *QKV, note="causal, cached keys")
row("attention", partial(ops.attention, causal=True), partial(F.scaled_dot_product_attention, is_causal=True),
    *([(2, 3, 5, 4)] * 3), note="causal")
row("attention", partial(ops.attention, key_mask=dev(PADDING), causal=True), torch_attention(PADDING & CAUSAL), *QKV,
    note="causal and padding")
row("attention", partial(ops.attention, scale=1.0), torch_attention(None, 1.0), *QKV, note="scale")
row("attention", partial(ops.attention, dropout_mask=dev(DROPOUT_MASK)), torch_attention_with_dropout, *QKV,
    note="dropout mask")

LABELS = np.array([[1, -100, 4], [0, 2, 2]])
WEIGHT = np.array([0.5, 2.0, 1.0, 3.0, 0.1])


def losses(weight: np.ndarray | None, ignore: int, smoothing: float) -> tuple[Callable, Callable]:
    """Our cross-entropy and PyTorch's, as functions of the logits."""
    labels = np.where(LABELS == -100, ignore, LABELS)
    settings = dict(ignore_index=ignore, label_smoothing=smoothing)
    our_weight = None if weight is None else dev(weight)
    torch_weight = None if weight is None else torch.tensor(weight)

    def ours(z: Tensor) -> Tensor:
        return ops.cross_entropy(z, dev(labels), weight=our_weight, **settings)

    def theirs(z: Any) -> Any:
        return F.cross_entropy(z.flatten(0, 1), torch.tensor(labels).flatten(), torch_weight, **settings)

    return ours, theirs


for smoothing in (0.0, 0.3):
    for weight, kind in ((None, "no weights"), (WEIGHT, "weights")):
        for ignore in (-100, 2):
            ours, theirs = losses(weight, ignore, smoothing)
            note = f"smoothing {smoothing}, {kind}, ignore {ignore}"
            row("cross_entropy", ours, theirs, (2, 3, 5), note=note)


class Dense(nn.Packed):
    """A packed weight that stores its values unchanged."""

    def __init__(self, W: np.ndarray):
        self.W = dev(W)
        self.shape = W.shape

    def dequantize(self) -> Any:
        return self.W


PACKED = np.random.default_rng(7).standard_normal((5, 4))
row("_packed_linear", lambda x: Dense(PACKED).matmul(x), lambda x: F.linear(x, torch.tensor(PACKED)), (2, 3, 4))

EVERY = [
    pytest.param(op, i, id=f"{op} {note}".strip())
    for op, rows in TABLE.items()
    for i, (note, *_) in enumerate(rows)
]


def agree(ours: Callable, theirs: Callable, arrays: list[np.ndarray], rng: np.random.Generator) -> None:
    """Assert the same value, and the same gradients of its product with a random covector."""
    our_leaves = [Tensor(dev(a), requires_grad=True) for a in arrays]
    torch_leaves = [torch.tensor(a, requires_grad=True) for a in arrays]
    y = ours(*our_leaves)
    expected = theirs(*torch_leaves)
    covector = np.asarray(rng.standard_normal(tuple(expected.shape)))
    y.backward(dev(covector))
    expected.backward(torch.tensor(covector))
    pairs = {"value": (host(y), expected.detach().numpy())}
    for i, (ours_i, theirs_i) in enumerate(zip(our_leaves, torch_leaves)):
        pairs[f"gradient {i}"] = (host(ours_i.grad), theirs_i.grad.numpy())
    for name, (a, b) in pairs.items():
        assert a is not None, name
        assert a.shape == b.shape, name
        assert a.dtype == np.float64, name
        error = np.abs(a - b).max()
        assert error <= TOLERANCE * max(np.abs(b).max(), 1), f"{name}: {error:.3g} apart"


@pytest.mark.parametrize("op, i", EVERY)
def test_value_and_gradients(op, i, rng):
    _, ours, theirs, draw = TABLE[op][i]
    for _ in range(3):
        agree(ours, theirs, draw(rng), rng)


def test_every_op_is_in_the_table():
    library = {n for n, f in OPS.items() if f.definition.__module__.split(".")[0] == "tinyft"}
    assert library == TABLE.keys() | NO_COUNTERPART.keys()
    assert not TABLE.keys() & NO_COUNTERPART.keys()


WRONG = {
    "gelu": ops.gelu_tanh,
    "gelu_tanh": ops.gelu,
    "relu": lambda x: ops.maximum(x, dev(np.zeros(1))),                          # half the gradient at zero
    "sigmoid": lambda x: ops.sigmoid(x) + x * 1e-9,
    "softmax": lambda x: ops.softmax(x) + (x - Tensor(x.data)),                  # right value, wrong gradient
    "log_softmax": lambda x: ops.log_softmax(Tensor(x.data)) + (x - Tensor(x.data)),
    "transpose": lambda x: ops.transpose(x) * (1 + 1e-9),
}


@pytest.mark.parametrize("op", WRONG)
def test_wrong_ops_are_caught(op, rng):
    """Another form, another subgradient at a kink, a right value with a wrong gradient, an error of 1e-9."""
    caught = 0
    for _, _, theirs, draw in TABLE[op]:
        try:
            agree(WRONG[op], theirs, draw(rng), rng)
        except AssertionError as e:
            assert "apart" in str(e)
            caught += 1
    assert caught


@pytest.mark.skipif(array.backend() != "numpy", reason="these kernels are for NumPy arrays")
@pytest.mark.parametrize("op", ["gelu", "gelu_tanh", "layer_norm", "embedding"])
def test_kernels_in_single_precision(op, rng):
    """The kernels run in float32 and agree with PyTorch to 1e-5."""
    assert dispatch.find(OPS[op], np.ndarray), "the kernels are not installed"
    for note, ours, theirs, _ in TABLE[op]:
        if note == "the tails":
            continue
        shapes = [(40, 6), (6,), (6,)] if op == "layer_norm" else [(40, 6)]
        arrays = [rng.standard_normal(s).astype(np.float32) for s in shapes]
        our_leaves = [Tensor(a, requires_grad=True) for a in arrays]
        torch_leaves = [torch.tensor(a, requires_grad=True) for a in arrays]
        y = ours(*our_leaves)
        expected = theirs(*torch_leaves)
        g = rng.standard_normal(tuple(expected.shape)).astype(np.float32)
        y.backward(g)
        expected.backward(torch.tensor(g))
        pairs = [(y.data, expected.detach())]
        pairs += [(ours_i.grad, theirs_i.grad) for ours_i, theirs_i in zip(our_leaves, torch_leaves)]
        for a, b in pairs:
            assert np.abs(a - b.numpy()).max() <= 1e-5 * max(float(b.abs().max()), 1)


def test_the_loss_with_label_smoothing(rng):
    """CrossEntropy(ε) of a model is torch's, with padding and with class weights."""
    model = ft.GPT(ft.GPTConfig(vocab=19, positions=8, width=12, layers=1, heads=2), seed=0).to(dtype=np.float64)
    ids = rng.integers(0, 19, (3, 8))
    mask = np.arange(8) < np.array([8, 3, 5])[:, None]
    labels = np.where(mask[:, 1:], ids[:, 1:], -100)
    for class_weight in (None, rng.uniform(0.5, 2, 19)):
        batch = {"ids": ids, "mask": mask, "class_weight": class_weight}
        loss = ft.CrossEntropy(smoothing=0.1)
        _, value = loss(model, loss.read(batch))
        z = torch.tensor(host(model(ids[:, :-1], mask=mask[:, :-1]))).flatten(0, 1)
        weight = None if class_weight is None else torch.tensor(class_weight)
        expected = F.cross_entropy(z, torch.tensor(labels).flatten(), weight, label_smoothing=0.1)
        assert float(value.data) == pytest.approx(float(expected), rel=1e-10)

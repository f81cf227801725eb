"""HIPS autograd's side: the same GPT in NumPy with gradients by autograd, and Adam over one flat array."""

from __future__ import annotations

from collections.abc import Callable

import autograd.numpy as np
from autograd import value_and_grad
from cases import Case, batch
from numpy.random import default_rng


def build(c: Case) -> dict:
    """The parameters: {name: array}, and for each block a dict of (weight, bias) pairs."""
    rng = default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.02).astype(np.float32)

    def linear(in_features: int, out_features: int) -> tuple:
        return weight(in_features, out_features), np.zeros(out_features, np.float32)

    def norm() -> tuple:
        return np.ones(c.C, np.float32), np.zeros(c.C, np.float32)

    p = {"embed": weight(c.V, c.C), "pos": weight(c.T, c.C), "norm": norm()}
    for i in range(c.L):
        p[f"{i}"] = {
            "norm1": norm(),
            "qkv": linear(c.C, 3 * c.C),
            "o": linear(c.C, c.C),
            "norm2": norm(),
            "up": linear(c.C, 4 * c.C),
            "down": linear(4 * c.C, c.C),
        }
    return p


def layer_norm(x, wb):
    weight, bias = wb
    x = x - np.mean(x, axis=-1, keepdims=True)
    return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(1e-5)) + bias


def linear(x, wb):
    weight, bias = wb
    return np.dot(x, weight) + bias


def gelu(x):
    f = np.float32
    return f(0.5) * x * (f(1) + np.tanh(f(0.7978845608) * (x + f(0.044715) * x * x * x)))


def attention(x, block, c: Case, causal):
    D = c.C // c.H
    qkv = np.reshape(linear(x, block["qkv"]), (c.B, c.T, 3, c.H, D))
    q, k, v = np.transpose(qkv, (2, 0, 3, 1, 4))
    scores = np.matmul(q, np.swapaxes(k, -1, -2)) * np.float32(D**-0.5) + causal
    e = np.exp(scores - np.max(scores, axis=-1, keepdims=True))
    y = np.matmul(e / np.sum(e, axis=-1, keepdims=True), v)
    return linear(np.reshape(np.transpose(y, (0, 2, 1, 3)), (c.B, c.T, c.C)), block["o"])


def loss(p, ids, labels, c: Case, causal):
    """The mean cross-entropy. causal (T, T): -inf above the diagonal."""
    x = p["embed"][ids] + p["pos"][: c.T]
    for i in range(c.L):
        block = p[f"{i}"]
        x = x + attention(layer_norm(x, block["norm1"]), block, c, causal)
        hidden = gelu(linear(layer_norm(x, block["norm2"]), block["up"]))
        x = x + linear(hidden, block["down"])
    rows = c.B * c.T
    z = np.reshape(np.dot(layer_norm(x, p["norm"]), p["embed"].T), (rows, c.V))
    z = z - np.max(z, axis=-1, keepdims=True)
    return np.mean(np.log(np.sum(np.exp(z), axis=-1)) - z[np.arange(rows), labels])


def start(p: dict, c: Case) -> tuple[Callable[[], float], int]:
    """A training step with Adam that returns its loss, and the number of parameters."""
    from autograd.misc.flatten import flatten

    flat, unflatten = flatten(p)
    flat = flat.astype(np.float32)
    state = {"w": flat, "m": 0.0 * flat, "v": 0.0 * flat, "t": 0}
    b = batch(c)
    labels = b["labels"].reshape(-1)
    causal = np.triu(np.full((c.T, c.T), -np.inf, np.float32), 1)
    loss_and_gradient = value_and_grad(lambda w: loss(unflatten(w), b["ids"], labels, c, causal))

    def step() -> float:
        f = np.float32
        state["t"] += 1
        value, g = loss_and_gradient(state["w"])
        m, v, t = state["m"], state["v"], state["t"]
        m += f(0.1) * (g - m)
        v += f(0.001) * (g * g - v)
        m_hat = m / f(1 - 0.9**t)
        v_hat = v / f(1 - 0.999**t)
        state["w"] = state["w"] - f(1e-3) * m_hat / (np.sqrt(v_hat) + f(1e-8))
        return float(value)

    return step, flat.size

"""HIPS autograd's side: the same GPT in NumPy with gradients by autograd, and Adam over a dict of arrays."""
from __future__ import annotations

from collections.abc import Callable

import autograd.numpy as np
from autograd import value_and_grad
from cases import Case, batch
from numpy.random import default_rng


def build(c: Case) -> dict:
    rng = default_rng(0)
    w = lambda *shape: (rng.standard_normal(shape) * 0.02).astype(np.float32)
    zeros, ones = (lambda n: np.zeros(n, np.float32)), (lambda n: np.ones(n, np.float32))
    p = {"embed": w(c.V, c.C), "pos": w(c.T, c.C), "norm": (ones(c.C), zeros(c.C))}
    for i in range(c.L):
        p[f"{i}"] = {"norm1": (ones(c.C), zeros(c.C)), "qkv": (w(c.C, 3 * c.C), zeros(3 * c.C)), "o": (w(c.C, c.C), zeros(c.C)),
                     "norm2": (ones(c.C), zeros(c.C)), "up": (w(c.C, 4 * c.C), zeros(4 * c.C)), "down": (w(4 * c.C, c.C), zeros(c.C))}
    return p


def norm(x, wb):
    x = x - np.mean(x, axis=-1, keepdims=True)
    return wb[0] * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(1e-5)) + wb[1]


def linear(x, wb):
    return np.dot(x, wb[0]) + wb[1]


def loss(p, ids, labels, c: Case, past):
    B, T, D, f = c.B, c.T, c.C // c.H, np.float32
    x = p["embed"][ids] + p["pos"][:T]
    for i in range(c.L):
        b = p[f"{i}"]
        q, k, v = np.transpose(np.reshape(linear(norm(x, b["norm1"]), b["qkv"]), (B, T, 3, c.H, D)), (2, 0, 3, 1, 4))
        s = np.matmul(q, np.swapaxes(k, -1, -2)) * f(D**-0.5) + past
        e = np.exp(s - np.max(s, axis=-1, keepdims=True))
        y = np.matmul(e / np.sum(e, axis=-1, keepdims=True), v)
        x = x + linear(np.reshape(np.transpose(y, (0, 2, 1, 3)), (B, T, c.C)), b["o"])
        h = linear(norm(x, b["norm2"]), b["up"])
        x = x + linear(f(0.5) * h * (f(1) + np.tanh(f(0.7978845608) * (h + f(0.044715) * h * h * h))), b["down"])
    z = np.reshape(np.dot(norm(x, p["norm"]), p["embed"].T), (B * T, c.V))
    z = z - np.max(z, axis=-1, keepdims=True)
    return np.mean(np.log(np.sum(np.exp(z), axis=-1)) - z[np.arange(B * T), labels])


def start(p: dict, c: Case) -> tuple[Callable[[], float], int]:
    from autograd.misc.flatten import flatten
    flat, unflatten = flatten(p)
    state, b = {"w": flat.astype(np.float32), "m": 0.0 * flat.astype(np.float32), "v": 0.0 * flat.astype(np.float32), "t": 0}, batch(c)
    past = np.triu(np.full((c.T, c.T), -np.inf, np.float32), 1)
    grad = value_and_grad(lambda w: loss(unflatten(w), b["ids"], b["labels"].reshape(-1), c, past))

    def step() -> float:
        state["t"] += 1
        value, g = grad(state["w"])
        m, v, t = state["m"], state["v"], state["t"]
        m += np.float32(0.1) * (g - m)
        v += np.float32(0.001) * (g * g - v)
        state["w"] = state["w"] - np.float32(1e-3) * m / np.float32(1 - 0.9**t) / (np.sqrt(v / np.float32(1 - 0.999**t)) + np.float32(1e-8))
        return float(value)
    return step, flat.size

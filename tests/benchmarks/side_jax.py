"""JAX's side: one jitted step of the GPT (forward, backward, AdamW). The step donates the memory of its arguments.

Only GPT, and only full fine-tuning. XLA compiles the step in its first call, which is not timed.

XLA has as many threads on the CPU as the process may use cores. JAX has no setting for the number, and with
XLA_FLAGS=--xla_cpu_multi_thread_eigen=false (JAX 0.10) two threads still share the work. `threads` therefore restricts
the process to n cores, as `taskset` does, before JAX makes its threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import PREFIX, Case, batch

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01
BETA1 = 0.9
BETA2 = 0.999
EPS = 1e-8
jax.config.update("jax_platforms", "cpu")

Parameters = dict[str, Any]  # a tree of arrays; a linear map or norm is (weight, bias)


def threads(n: int) -> None:
    """Restrict the process to the first n of its cores. To be called before JAX computes anything."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:n])


def build(c: Case) -> Parameters:
    """The parameters, float32; the weight of a linear map is (in, out)."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> jax.Array:
        return jnp.asarray(0.02 * rng.standard_normal(shape, dtype=np.float32))

    def linear(in_features: int, out_features: int) -> tuple[jax.Array, jax.Array]:
        return weight(in_features, out_features), jnp.zeros(out_features, jnp.float32)

    def norm() -> tuple[jax.Array, jax.Array]:
        return jnp.ones(c.C, jnp.float32), jnp.zeros(c.C, jnp.float32)

    blocks = []
    for _ in range(c.L):
        block = {"norm1": norm(), "qkv": linear(c.C, 3 * c.C), "o": linear(c.C, c.C)}
        block |= {"norm2": norm(), "up": linear(c.C, 4 * c.C), "down": linear(4 * c.C, c.C)}
        blocks.append(block)
    return {"embed": weight(c.V, c.C), "pos": weight(c.T + PREFIX, c.C), "blocks": blocks, "norm": norm()}


def apply_linear(x: jax.Array, p: tuple[jax.Array, jax.Array]) -> jax.Array:
    """x W + b."""
    weight, bias = p
    return x @ weight + bias


def apply_norm(x: jax.Array, p: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Layer normalisation over the last axis."""
    weight, bias = p
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return weight * centred * jax.lax.rsqrt(variance + 1e-5) + bias


def attention(x: jax.Array, block: Parameters, heads: int) -> jax.Array:
    """Causal self-attention of x (B, T, C)."""
    B, T, C = x.shape
    parts = jnp.split(apply_linear(x, block["qkv"]), 3, axis=-1)
    q, k, v = (part.reshape(B, T, heads, C // heads) for part in parts)
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True)  # (B, T, H, D)
    return apply_linear(y.reshape(B, T, C), block["o"])


def mlp(x: jax.Array, block: Parameters) -> jax.Array:
    """The feed-forward part of a block, with GPT-2's tanh form of GELU."""
    hidden = jax.nn.gelu(apply_linear(x, block["up"]), approximate=True)
    return apply_linear(hidden, block["down"])


def compute_loss(p: Parameters, ids: jax.Array, labels: jax.Array, heads: int) -> jax.Array:
    """The mean cross-entropy of the next tokens.  ids, labels: (B, T)."""
    x = p["embed"][ids] + p["pos"][: ids.shape[1]]
    for block in p["blocks"]:
        x = x + attention(apply_norm(x, block["norm1"]), block, heads)
        x = x + mlp(apply_norm(x, block["norm2"]), block)
    logits = apply_norm(x, p["norm"]) @ p["embed"].T
    log_probabilities = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1).mean()


def adamw(p: jax.Array, g: jax.Array, m: jax.Array, v: jax.Array, t: jax.Array) -> tuple[jax.Array, ...]:
    """The new value and moments of one parameter, at step t = 1, 2, ..."""
    m = BETA1 * m + (1 - BETA1) * g
    v = BETA2 * v + (1 - BETA2) * g**2
    update = (m / (1 - BETA1**t)) / (jnp.sqrt(v / (1 - BETA2**t)) + EPS)
    return p * (1 - LEARNING_RATE * WEIGHT_DECAY) - LEARNING_RATE * update, m, v


def start(p: Parameters, c: Case) -> tuple[Callable[[], float], int]:
    """(a function that takes one step and returns the loss, the number of trained parameters)."""
    data = batch(c)
    ids = jnp.asarray(data["ids"], jnp.int32)
    labels = jnp.asarray(data["labels"], jnp.int32)
    values, tree = jax.tree.flatten(p)
    trained = sum(value.size for value in values)

    def update(values: list, m: list, v: list, t: jax.Array) -> tuple[jax.Array, list, list, list]:
        loss, gradients = jax.value_and_grad(compute_loss)(jax.tree.unflatten(tree, values), ids, labels, c.H)
        updated = []
        for one_parameter in zip(values, jax.tree.leaves(gradients), m, v, strict=True):
            updated.append(adamw(*one_parameter, t))
        values, m, v = (list(column) for column in zip(*updated, strict=True))
        return loss, values, m, v

    jitted = jax.jit(update, donate_argnums=(0, 1, 2))
    state = [values, [jnp.zeros_like(x) for x in values], [jnp.zeros_like(x) for x in values]]
    steps = 0

    def step() -> float:
        nonlocal state, steps
        steps += 1
        loss, *state = jitted(*state, jnp.float32(steps))
        return float(loss)  # waits for the whole step: one computation gives the loss and the new values

    return step, trained

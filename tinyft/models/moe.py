"""The Switch feed-forward: a mixture of experts in which each token visits one expert.

    p = softmax((x ⊙ u) W_rᵀ),   e = argmax p,   y = p_e FFN_e(x)       u ~ U(1 − ε, 1 + ε) in training, else 1

E experts hold E times the parameters of one MLP, and a token costs what it costs in one MLP. The router W_r (E, C)
computes in float32. The gate p_e multiplies the output: this is the only way by which the task trains the router.

Capacity. An expert takes the first C tokens of a row that choose it, C = min(T, max(C_min, ⌊f T / E⌋)) for the T real
tokens of the row. A later one is dropped: its y is 0, so the residual stream hands it on as it is. The capacity holds
for each row alone: the outputs of a row depend neither on the other rows of its batch nor on its padding.

Auxiliary losses, summed over the Switch layers, over the real tokens t of the whole batch:

    balance    α E Σᵢ fᵢ Pᵢ,   fᵢ = the share of tokens that choose expert i, before any is dropped,  Pᵢ = mean p_t[i]
    router_z   c mean (ln Σᵢ e^{z_t[i]})²,   z = (x ⊙ u) W_rᵀ           keeps the logits small; Zoph et al. 2022

Fedus, Zoph and Shazeer 2021, arXiv:2101.03961; Zoph et al. 2022, arXiv:2202.08906.

Departures: the experts start as the MLPs of their model, not from a truncated normal distribution of its own. The paper
counts the capacity over a group of rows, and so does its balance loss; here the groups are the row and the batch.
A pass with a cache counts the tokens of this pass alone, so a token that comes alone is never dropped.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import array, checks, ops, precision
from ..array import Array, xp
from ..nn import Context, Linear, Module
from ..tensor import Tensor
from .config import Config


@dataclass(frozen=True)
class SwitchConfig(Config):
    """The Switch layers of a model: GPTConfig(..., switch=SwitchConfig(experts=8)).

    experts        E
    every          the feed-forward of every second block, or of every n-th, is a Switch layer
    capacity       f in training;  eval_capacity  f in evaluation. With f >= E no token is dropped
    min_capacity   the least capacity C_min, in tokens
    jitter         ε, half the width of the noise of the router's input; 0: no noise
    balance        α of the balance loss;  z_loss  c of the z-loss; 0: without it
    dropout        of the experts; None: as in the other blocks

    TypeError or ValueError, naming the field, for values from which no layer can be built."""
    experts: int = 8
    every: int = 2
    capacity: float = 1.25
    eval_capacity: float = 2.0
    min_capacity: int = 4
    jitter: float = 0.01
    balance: float = 0.01
    z_loss: float = 0.001
    dropout: float | None = None

    def __post_init__(self) -> None:
        for name in ("experts", "every", "min_capacity"):
            checks.whole(f"SwitchConfig: {name}", getattr(self, name), least=1)
        for name in ("capacity", "eval_capacity"):
            checks.number(f"SwitchConfig: {name}", getattr(self, name), above=0)
        for name in ("balance", "z_loss"):
            checks.number(f"SwitchConfig: {name}", getattr(self, name), low=0)
        checks.number("SwitchConfig: jitter", self.jitter, low=0, below=1)
        if self.dropout is not None:
            checks.number("SwitchConfig: dropout", self.dropout, low=0, below=1)

    def layers(self, depth: int) -> list[int]:
        """The indices of the blocks with a Switch layer, in a stack of `depth` blocks."""
        return list(range(self.every - 1, depth, self.every))


def check_switch(name: str, switch: Any, depth: int) -> None:
    """TypeError unless switch is None or a SwitchConfig; ValueError if no block of a stack would be a Switch layer.

    name: of the model's configuration, for the message."""
    if switch is None:
        return
    checks.instance(f"{name}: switch", switch, SwitchConfig, "a SwitchConfig or None")
    if not switch.layers(depth):
        raise ValueError(f"{name}: a Switch layer in every {switch.every} blocks wants {switch.every} layers or more, "
                         f"got {depth}")


def feed_forward(layer: int, switch: SwitchConfig | None, make: Callable[..., Module], *, rng: np.random.Generator,
                 std: float = 0.02) -> Module:
    """The feed-forward of block `layer` of a stack, counted from 0: one MLP, or a SwitchMLP of E of them.

    make: a new MLP, make() or make(dropout=p).  std: of the router's initial weight."""
    if switch is None or (layer + 1) % switch.every:
        return make()
    settings = {} if switch.dropout is None else {"dropout": switch.dropout}
    experts = [make(**settings) for _ in range(switch.experts)]
    return SwitchMLP(experts, switch, rng=rng, std=std)


class SwitchMLP(Module):
    """y = p_e FFN_e(x),  p = softmax(x W_rᵀ),  e = argmax p; 0 for padding and for dropped tokens.    (B, T, C)

    In training mode the router's input has noise, if the pass has a generator, and the capacity is that of training."""

    def __init__(self, experts: list[Module], switch: SwitchConfig, *, rng: np.random.Generator, std: float = 0.02):
        """experts: modules (n, C) -> (n, C) that know in_features, C.  std: of the router's initial weight."""
        width = experts[0].in_features
        self.in_features = self.out_features = width
        self.router = Linear(width, len(experts), rng=rng, bias=False, std=std)
        self.experts = experts
        self._switch = switch

    def extra_repr(self) -> str:
        """The capacity factors of training and of evaluation."""
        return f"capacity={self._switch.capacity}, eval_capacity={self._switch.eval_capacity}"

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """y = p_e FFN_e(x) of a kept token, 0 of a dropped one and of padding.    x (B, T, C) -> (B, T, C)

        Adds the layer's losses to the pass; dropped tokens count in them. ctx.mask (B, T): True at a real token; None:
        all are real."""
        m = xp(x.data)
        real = m.ones(x.shape[:2], dtype=bool) if ctx.mask is None else ctx.mask         # (B, T)
        logits = self.route(x, ctx)                                                      # (B, T, E)
        probabilities, choice, gate = choose_experts(logits)
        chosen = (choice[..., None] == m.arange(len(self.experts))) & real[..., None]    # (B, T, E)
        self.add_losses(logits, probabilities, chosen, ctx)
        kept = within_capacity(chosen, self.capacity(real))                              # (B, T, E)
        y = self.run_experts(x, kept, ctx)
        return y * ops.cast(gate, x.dtype)

    def route(self, x: Tensor, ctx: Context) -> Tensor:
        """The router's logits for x (B, T, C), in float32 also in a 16-bit model and under autocast: (B, T, E)."""
        if x.dtype in precision.HALVES:
            x = ops.cast(x, np.dtype(np.float32))
        noise = self._switch.jitter
        if noise and self.training and ctx.rng is not None:
            u = array.uniform_like(x.data, ctx.rng.integers(2**63)).astype(x.dtype)     # in [0, 1)
            x = x * (1 + noise * (2 * u - 1))
        with precision.autocast(enabled=False):
            return self.router(x, ctx)

    def capacity(self, real: Array) -> Array:
        """The capacity of an expert in each row, in tokens, (B,). real (B, T): True at a real token."""
        switch = self._switch
        factor = switch.capacity if self.training else switch.eval_capacity
        return expert_capacity(real, factor, len(self.experts), switch.min_capacity)

    def add_losses(self, logits: Tensor, probabilities: Tensor, chosen: Array, ctx: Context) -> None:
        """Add the balance loss and the z-loss of this layer to the pass, times their weights α and c.

        logits, probabilities (B, T, E). chosen (B, T, E): True at the expert of a real token."""
        switch = self._switch
        if switch.balance:
            ctx.add_loss("balance", balance_loss(probabilities, chosen) * switch.balance)
        if switch.z_loss:
            ctx.add_loss("router_z", z_loss(logits, chosen.any(axis=-1)) * switch.z_loss)

    def run_experts(self, x: Tensor, kept: Array, ctx: Context) -> Tensor:
        """FFN_e(x) of every kept token, 0 elsewhere: (B, T, C). kept (B, T, E): True at the expert of a kept token.

        An expert computes its own tokens alone: all experts together compute at most B·T rows. An expert without tokens
        computes no row, and its gradient is 0. CannotCapture while a step is captured as a CUDA graph."""
        if array.recording is not None:
            raise array.CannotCapture("a Switch layer reads on the host how many tokens each expert got, which a "
                                      "captured step cannot do: fit it without capture")
        m = xp(kept)
        experts = len(self.experts)
        rows = kept.reshape(-1, experts)                                                 # (N, E)
        counts = self.count(rows)
        total = sum(counts)
        expert = m.where(rows.any(axis=-1), rows.argmax(axis=-1), experts)               # (N,); E: no expert
        # Sorted by expert, and in their order for each expert. The tokens without an expert come last.
        order = m.argsort(expert * len(expert) + m.arange(len(expert)))
        routed = ops.embedding(x.reshape(-1, x.shape[-1]), order[:total])                # (total, C)
        parts = [run(part, ctx) for run, part in zip(self.experts, ops.split(routed, counts))]
        nothing = m.zeros((1, x.shape[-1]), dtype=parts[0].dtype)
        outputs = ops.concatenate(*parts, nothing)                                       # (total + 1, C)
        place = m.minimum(m.argsort(order), total)                                       # of each token in `outputs`
        return ops.embedding(outputs, place).reshape(x.shape)

    def count(self, kept: Array) -> list[int]:
        """The number of tokens that each expert takes. kept (N, E): True at the expert of a kept token."""
        return [int(n) for n in array.asnumpy(kept.sum(axis=0))]


def choose_experts(logits: Tensor) -> tuple[Tensor, Array, Tensor]:
    """p = softmax(z),  e = argmax p,  gate = p_e.

    logits z (..., E) -> p (..., E), e (...) whole numbers, gate (..., 1). Of equal probabilities the first wins. No
    gradient passes through e; the gate passes the task's gradient to the router."""
    probabilities = ops.softmax(logits)
    choice = probabilities.data.argmax(axis=-1)
    gate = ops.gather(probabilities, choice[..., None])
    return probabilities, choice, gate


def expert_capacity(real: Array, factor: float, experts: int, least: int) -> Array:
    """min(n, max(least, ⌊factor n / experts⌋)), the number of tokens that an expert takes of a row: (B,).

    real (B, T): True at a real token, False at padding; n, the number of real tokens of the row."""
    m = xp(real)
    tokens = real.sum(axis=1)                                # (B,)
    share = m.floor(factor * tokens / experts)
    return m.minimum(tokens, m.maximum(share, least))


def within_capacity(chosen: Array, capacity: Array) -> Array:
    """True where an expert takes a token: it is among the first `capacity` of its row that choose the expert. (B, T, E)

    chosen (B, T, E): True at the expert of a token, False in all columns for padding. capacity (B,)."""
    m = xp(chosen)
    counts = m.cumsum(chosen.astype(np.int64), axis=1)       # tokens at each expert, up to this one
    before = counts - chosen                                 # without this one
    return chosen & (before < capacity[:, None, None])


def balance_loss(probabilities: Tensor, chosen: Array) -> Tensor:
    """E Σᵢ fᵢ Pᵢ, a scalar.    fᵢ the share of tokens that choose expert i,  Pᵢ the mean of their probabilities of i

    probabilities (B, T, E). chosen (B, T, E): True at the expert of a real token, before any is dropped; False in all
    columns for padding, which does not count. f has no gradient. 0 without a real token."""
    experts = chosen.shape[-1]
    weight = token_weights(chosen.any(axis=-1), probabilities.dtype)             # (B, T, 1)
    f = (chosen * weight).sum(axis=(0, 1))                                       # (E,)
    P = (probabilities * weight).sum(axis=(0, 1))
    return (P * f).sum() * experts


def z_loss(logits: Tensor, real: Array) -> Tensor:
    """The mean of (ln Σᵢ exp zᵢ)² over the real tokens, a scalar.

    logits z (B, T, E); large ones do not overflow. real (B, T): True at a real token. 0 without a real token."""
    top = logits.data.max(axis=-1, keepdims=True)            # exp of a large number overflows; of z − top it does not
    log_sum = ops.log(ops.exp(logits - top).sum(axis=-1, keepdims=True)) + top   # (B, T, 1)
    return (log_sum * log_sum * token_weights(real, logits.dtype)).sum()


def token_weights(real: Array, dtype: Any) -> Array:
    """(B, T, 1): 1/n at each of the n real tokens of a batch, 0 at padding. Σ (a · weights) is their mean of a."""
    m = xp(real)
    return (real / m.maximum(real.sum(), 1)).astype(dtype)[..., None]

"""The Switch feed-forward against the same formulas in plain NumPy: token by token, expert by expert, in float64.

The checks are called with the library's SwitchMLP, and again with each wrong one of WRONG, which they must reject.
"""
from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from helpers import dev, gradcheck, host, wrong_answers
from wrong import replaced

import tinyft as ft
from tinyft import array, ops
from tinyft.array import xp
from tinyft.models import moe
from tinyft.models.blocks import MLP
from tinyft.models.moe import SwitchConfig, SwitchMLP
from tinyft.nn import Context
from tinyft.tensor import Tensor

C, F = 6, 5                                              # widths: of the model, of the feed-forward
ALPHA, Z = 0.3, 0.2                                      # weights of the two losses: large, so that they are seen


# ── a layer and its reference ────────────────────────────────────────────────────────────────────────────────────────
def make_layer(rng: np.random.Generator, E: int, *, dtype: Any = np.float64, **settings: Any) -> SwitchMLP:
    """A layer whose weights and biases are generic numbers."""
    switch = SwitchConfig(**{"experts": E, "min_capacity": 1, "jitter": 0.0, "balance": ALPHA, "z_loss": Z, **settings})
    experts = [MLP(C, F, activation=ops.relu, rng=rng) for _ in range(E)]
    layer = SwitchMLP(experts, switch, rng=rng).to(dtype=dtype)
    for p in layer.parameters():
        p.copy_(dev(rng.standard_normal(p.shape) * 0.7))
    return layer


@dataclass
class Case:
    """One call of a layer. x (B, T, C); mask (B, T), True at real tokens, or None; trains: the mode of the layer."""
    layer: SwitchMLP
    x: np.ndarray
    mask: np.ndarray | None
    trains: bool = False
    key: int | None = None                               # the seed of the pass's generator; None: no generator


def draw_case(seed: int) -> Case:
    """A random case: one expert or many, tight capacities and wide ones, with and without padding and noise."""
    rng = np.random.default_rng(seed)
    E = int(rng.choice([1, 2, 3, 5]))
    settings = {
        "capacity": float(rng.choice([0.3, 1.0, 1.25, E])),
        "eval_capacity": float(rng.choice([0.5, 2.0, E])),
        "min_capacity": int(rng.choice([1, 2])),
        "jitter": float(rng.choice([0.0, 0.3])),
    }
    B, T = int(rng.integers(1, 4)), int(rng.integers(1, 9))
    mask = None
    if rng.random() < 0.6:
        lengths = rng.integers(0, T + 1, B)
        lengths[rng.integers(B)] = T
        mask = np.arange(T) < lengths[:, None]
        if rng.random() < 0.3:
            mask = mask[:, ::-1].copy()                  # padding on the left
    layer = make_layer(rng, E, **settings)
    key = int(rng.integers(1000)) if rng.random() < 0.7 else None
    return Case(layer, rng.standard_normal((B, T, C)), mask, trains=bool(rng.random() < 0.5), key=key)


CASES = range(60)


def run(case: Case) -> tuple[np.ndarray, dict[str, float]]:
    """(output, auxiliary losses) of the layer."""
    rng = None if case.key is None else np.random.default_rng(case.key)
    mask = None if case.mask is None else dev(case.mask)
    ctx = Context(mask=mask, rng=rng)
    case.layer.train(case.trains)
    y = case.layer(Tensor(dev(case.x)), ctx)
    return host(y), {name: float(value) for name, value in ctx.losses.items()}


def router_noise(case: Case) -> np.ndarray | float:
    """The factors u of the router's input: 1 outside training, without a generator, and without jitter."""
    jitter = case.layer._switch.jitter
    if not (case.trains and case.key is not None and jitter):
        return 1.0
    key = np.random.default_rng(case.key).integers(2**63)
    u = host(array.uniform_like(dev(case.x), key)).astype(np.float64)
    return 1 - jitter + 2 * jitter * u


def dense(expert: MLP, x: np.ndarray) -> np.ndarray:
    """The MLP of one expert on a row x (C,)."""
    up, down = expert.up, expert.down
    hidden = np.maximum(host(up.weight) @ x + host(up.bias), 0)
    return host(down.weight) @ hidden + host(down.bias)


@dataclass
class Routed:
    """The result of the reference: y (B, T, C), the losses, and the expert of every token; −1: none."""
    y: np.ndarray
    losses: dict[str, float]
    expert: np.ndarray
    choice: np.ndarray


def reference(case: Case) -> Routed:
    """The layer, token by token."""
    layer, x = case.layer, case.x
    switch = layer._switch
    B, T, _ = x.shape
    E = len(layer.experts)
    mask = np.ones((B, T), bool) if case.mask is None else case.mask
    z = (x * router_noise(case)) @ host(layer.router.weight).T                   # (B, T, E)
    y = np.zeros_like(x)
    expert = np.full((B, T), -1)
    choice = np.full((B, T), -1)
    probabilities = []
    squares = []
    for b in range(B):
        n = int(mask[b].sum())
        factor = switch.capacity if case.trains else switch.eval_capacity
        room = [min(n, max(switch.min_capacity, int(factor * n / E)))] * E
        for t in np.flatnonzero(mask[b]):
            e = np.exp(z[b, t] - z[b, t].max())
            p = e / e.sum()
            probabilities.append(p)
            squares.append((z[b, t].max() + math.log(e.sum()))**2)
            i = int(p.argmax())
            choice[b, t] = i
            if room[i] > 0:
                room[i] -= 1
                expert[b, t] = i
                y[b, t] = p[i] * dense(layer.experts[i], x[b, t])
    f = np.array([(choice == i).mean(where=mask) for i in range(E)])
    losses = {"balance": ALPHA * E * float(f @ np.mean(probabilities, axis=0)), "router_z": Z * float(np.mean(squares))}
    return Routed(y, losses, expert, choice)


# ── the checks ───────────────────────────────────────────────────────────────────────────────────────────────────────
def near(a: Any, b: Any) -> None:
    np.testing.assert_allclose(host(a), b, rtol=0, atol=1e-12)


def check_layer() -> None:
    """Outputs and losses are those of the reference."""
    for seed in CASES:
        case = draw_case(seed)
        y, losses = run(case)
        expected = reference(case)
        near(y, expected.y)
        assert losses == pytest.approx(expected.losses, abs=1e-12)


def check_one_expert() -> None:
    """With one expert, a Switch layer is its MLP: the gate is 1, and no token is dropped."""
    for seed in range(10):
        case = replace(draw_case(seed), layer=make_layer(np.random.default_rng(seed), 1, jitter=0.3), mask=None)
        y, losses = run(case)
        np.testing.assert_array_equal(y, host(case.layer.experts[0](Tensor(dev(case.x)), Context())))
        assert losses["balance"] == pytest.approx(ALPHA, rel=1e-14)


def check_capacity() -> None:
    """Kept tokens: at most C at each expert; all of them if f >= E; y of the others is 0."""
    dropped = 0
    for seed in CASES:
        case = draw_case(seed)
        y, _ = run(case)
        E = len(case.layer.experts)
        switch = case.layer._switch
        factor = switch.capacity if case.trains else switch.eval_capacity
        mask = np.ones(case.x.shape[:2], bool) if case.mask is None else case.mask
        choice = reference(case).choice
        kept = np.abs(y).max(axis=-1) > 0
        assert not (kept & ~mask).any()
        for b in range(len(y)):
            n = int(mask[b].sum())
            limit = min(n, max(switch.min_capacity, math.floor(factor * n / E)))
            for i in range(E):
                wanted = int((choice[b] == i).sum())
                assert int(kept[b][choice[b] == i].sum()) == min(wanted, limit)
                dropped += wanted - min(wanted, limit)
        if factor >= E:
            assert kept[mask].all()
    assert dropped > 50


def check_permutations() -> None:
    """The order of the experts does not count; nor does the order of the tokens, if none is dropped."""
    for seed in range(20):
        case = draw_case(seed)
        rng = np.random.default_rng(seed)
        y, losses = run(case)
        order = rng.permutation(len(case.layer.experts))
        case.layer.experts = [case.layer.experts[i] for i in order]
        case.layer.router.weight.copy_(dev(host(case.layer.router.weight)[order]))
        same, same_losses = run(case)
        near(same, y)
        assert same_losses == pytest.approx(losses, abs=1e-12)
        case = replace(case, trains=False, mask=None)
        case.layer._switch = replace(case.layer._switch, eval_capacity=float(len(order)))
        tokens = rng.permutation(case.x.shape[1])
        y, _ = run(case)
        moved, _ = run(replace(case, x=case.x[:, tokens]))
        near(moved, y[:, tokens])


def check_rows_and_padding() -> None:
    """A row has the same outputs alone, in a batch, and with other values in its padding."""
    for seed in CASES:
        case = replace(draw_case(seed), key=None)
        y, losses = run(case)
        for b in range(len(y)):
            mask = None if case.mask is None else case.mask[b:b + 1]
            alone, _ = run(replace(case, x=case.x[b:b + 1], mask=mask))
            near(alone[0], y[b])
        if case.mask is None:
            continue
        noisy = np.where(case.mask[..., None], case.x, 7.0)
        same, same_losses = run(replace(case, x=noisy))
        near(same, y)
        assert same_losses == pytest.approx(losses, abs=1e-12)
        longer = np.pad(case.x, ((0, 0), (0, 3), (0, 0)), constant_values=5.0)
        same, same_losses = run(replace(case, x=longer, mask=np.pad(case.mask, ((0, 0), (0, 3)))))
        near(same[:, :y.shape[1]], y)
        assert same_losses == pytest.approx(losses, abs=1e-12)


def check_gradients() -> None:
    """Gradients of the output and both losses, by differences: of x, of the router and of an expert."""
    for seed in range(12):
        case = draw_case(seed)
        layer = case.layer
        rng = np.random.default_rng(seed)
        mask = None if case.mask is None else dev(case.mask)
        layer.train(case.trains)
        names = ["router.weight", "experts.0.up.weight", "experts.0.down.bias"]
        parameters = layer.named_parameters()

        def f(x: Tensor, router: Tensor, up: Tensor, bias: Tensor) -> Tensor:
            layer.router.weight, layer.experts[0].up.weight, layer.experts[0].down.bias = router, up, bias
            noise = None if case.key is None else np.random.default_rng(case.key)
            ctx = Context(mask=mask, rng=noise)
            y = layer(x, ctx)
            losses = ops.concatenate(ctx.losses["balance"].reshape(1), ctx.losses["router_z"].reshape(1))
            return ops.concatenate(y.reshape(-1), losses)

        gradcheck(f, [case.x, *(host(parameters[name]) for name in names)], rng)


def balance_of(z: np.ndarray) -> float:
    """The balance loss over α for logits z (T, E)."""
    layer = make_layer(np.random.default_rng(0), z.shape[1])
    layer.router.weight.copy_(dev(np.eye(z.shape[1], C)))
    x = np.zeros((1, len(z), C))
    x[0, :, :z.shape[1]] = z
    _, losses = run(Case(layer, x, None))
    return losses["balance"] / ALPHA


def check_balance() -> None:
    """α if f or P is uniform, at most α E; and it may lie below α."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        E = int(rng.integers(2, 6))
        z = rng.standard_normal((E, E)) * 3
        rotations = np.concatenate([np.roll(z[:1], i, axis=1) for i in range(E)])
        assert balance_of(rotations) == pytest.approx(1, rel=1e-12)              # f and P are uniform
        z = rng.standard_normal((7, E)) * 4
        assert balance_of(z) <= E
        best = z.max(axis=1, keepdims=True)
        assert balance_of(np.where(z == best, z + 1e3, -1e3)) <= E * (1 + 1e-12)
    assert balance_of(np.array([[50.0, 0, 0, 0]] * 5)) == pytest.approx(4, rel=1e-12)
    assert balance_of(np.zeros((6, 3))) == pytest.approx(1, rel=1e-12)           # P is uniform, all tokens at expert 0
    skewed = np.log([[0.51, 0.49]] * 6 + [[0.01, 0.99]] * 4)
    assert balance_of(skewed) == pytest.approx(0.924, abs=1e-12)


def check_shift_and_copies() -> None:
    """A constant added to all logits changes the z-loss alone. With equal experts, y is the gate times one MLP."""
    for seed in range(20):
        case = draw_case(seed)
        case.x[..., -1] = 1.0
        case.layer._switch = replace(case.layer._switch, jitter=0.0)
        y, losses = run(case)
        shifted = host(case.layer.router.weight).copy()
        shifted[:, -1] += 2.5
        case.layer.router.weight.copy_(dev(shifted))
        same, other = run(case)
        near(same, y)
        assert other["balance"] == pytest.approx(losses["balance"], abs=1e-12)
        assert other["router_z"] != pytest.approx(losses["router_z"], abs=1e-3)
        case.layer.experts = [case.layer.experts[0]] * len(case.layer.experts)
        case = replace(case, trains=False, mask=None)
        case.layer._switch = replace(case.layer._switch, eval_capacity=99.0)
        z = case.x @ host(case.layer.router.weight).T
        p = np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
        y, _ = run(case)
        near(y, p.max(axis=-1, keepdims=True) * host(case.layer.experts[0](Tensor(dev(case.x)), Context())))


def check_ties() -> None:
    """Of equal probabilities the lowest index wins, and the first tokens of a row are kept."""
    layer = make_layer(np.random.default_rng(0), 3, eval_capacity=1.0)
    layer.router.weight.copy_(dev(np.zeros((3, C))))
    x = np.random.default_rng(1).standard_normal((1, 6, C))
    y, _ = run(Case(layer, x, None))
    assert (np.abs(y[0]).max(axis=-1) > 0).tolist() == [True, True, False, False, False, False]
    near(y[0, 0], dense(layer.experts[0], x[0, 0]) / 3)


CHECKS = [check_layer, check_one_expert, check_capacity, check_permutations, check_rows_and_padding, check_gradients,
          check_balance, check_shift_and_copies, check_ties]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_switch_layer_has_the_property(check):
    check()


# ── wrong layers ─────────────────────────────────────────────────────────────────────────────────────────────────────
right_gather = ops.gather
right_forward = SwitchMLP.forward
right_route = SwitchMLP.route
right_losses = SwitchMLP.add_losses
right_run = SwitchMLP.run_experts
right_within = moe.within_capacity
right_capacity = SwitchMLP.capacity


def without_gate(self: SwitchMLP, x: Tensor, ctx: Context) -> Tensor:
    """The gate is the softmax of the one logit that was selected: 1."""
    with replaced(ops, "gather", lambda p, i: Tensor(xp(p.data).ones(i.shape, p.dtype))):
        return right_forward(self, x, ctx)


def gate_without_gradient(self: SwitchMLP, x: Tensor, ctx: Context) -> Tensor:
    with replaced(ops, "gather", lambda p, i: right_gather(Tensor(p.data), i)):
        return right_forward(self, x, ctx)


def dropped_are_lost(self: SwitchMLP, x: Tensor, kept: Any, ctx: Context) -> Tensor:
    """Kept tokens move up: the outputs are put back in order, without the places of the dropped ones."""
    y = right_run(self, x, kept, ctx)
    rows = host(kept).any(axis=-1).reshape(-1)
    order = np.concatenate([np.flatnonzero(rows), np.flatnonzero(~rows)])
    return ops.embedding(y.reshape(-1, C), dev(order)).reshape(x.shape)


def left_sorted(self: SwitchMLP, x: Tensor, kept: Any, ctx: Context) -> Tensor:
    y = right_run(self, x, kept, ctx).reshape(-1, C)
    rows = host(kept).reshape(-1, kept.shape[-1])
    expert = np.where(rows.any(axis=-1), rows.argmax(axis=-1), kept.shape[-1])
    order = np.argsort(expert, kind="stable")
    return ops.embedding(y, dev(order)).reshape(x.shape)


def dropped_stay_as_they_are(self: SwitchMLP, x: Tensor, kept: Any, ctx: Context) -> Tensor:
    """A dropped token's output is its input: added to the residual stream, it counts twice."""
    y = right_run(self, x, kept, ctx)
    return ops.where(kept.any(axis=-1, keepdims=True), y, x)


def balance_without_E(self: SwitchMLP, logits: Tensor, p: Tensor, chosen: Any, ctx: Context) -> None:
    inner = Context()
    right_losses(self, logits, p, chosen, inner)
    ctx.add_loss("balance", inner.losses["balance"] * (1 / len(self.experts)))
    ctx.add_loss("router_z", inner.losses["router_z"])


def balance_by_choice_alone(self: SwitchMLP, logits: Tensor, p: Tensor, chosen: Any, ctx: Context) -> None:
    """f² in the place of f P: as even, but without a gradient."""
    right_losses(self, logits, ops.where(chosen, 1.0, p * 0), chosen, ctx)


def losses_after_dropping(self: SwitchMLP, logits: Tensor, p: Tensor, chosen: Any, ctx: Context) -> None:
    real = chosen.any(axis=-1)
    right_losses(self, logits, p, right_within(chosen, self.capacity(real)), ctx)


def losses_with_padding(self: SwitchMLP, logits: Tensor, p: Tensor, chosen: Any, ctx: Context) -> None:
    all_chosen = p.data.argmax(axis=-1)[..., None] == xp(p.data).arange(p.shape[-1])
    right_losses(self, logits, p, all_chosen, ctx)


def z_of_probabilities(self: SwitchMLP, logits: Tensor, p: Tensor, chosen: Any, ctx: Context) -> None:
    """The 'logits' are the probabilities, as a router returns them that computes its softmax first."""
    right_losses(self, p, p, chosen, ctx)


def capacity_of_the_batch(self: SwitchMLP, real: Any) -> Any:
    """One capacity, from the mean number of tokens."""
    m = xp(real)
    rows = m.ones(real.shape, bool)
    return right_capacity(self, rows)


def capacity_without_least(self: SwitchMLP, real: Any) -> Any:
    factor = self._switch.capacity if self.training else self._switch.eval_capacity
    return xp(real).floor(factor * real.sum(axis=1) / len(self.experts))


def capacity_rounded_up(self: SwitchMLP, real: Any) -> Any:
    factor = self._switch.capacity if self.training else self._switch.eval_capacity
    m = xp(real)
    return m.maximum(m.ceil(factor * real.sum(axis=1) / len(self.experts)), self._switch.min_capacity)


def capacity_of_evaluation(self: SwitchMLP, real: Any) -> Any:
    before, self.training = self.training, False
    result = right_capacity(self, real)
    self.training = before
    return result


def one_more(chosen: Any, capacity: Any) -> Any:
    return right_within(chosen, capacity + 1)


def never_full(chosen: Any, capacity: Any) -> Any:
    """The cumulative sum runs along an axis of length 1."""
    return chosen


def last_tokens_first(chosen: Any, capacity: Any) -> Any:
    return right_within(chosen[:, ::-1], capacity)[:, ::-1]


def over_the_batch(chosen: Any, capacity: Any) -> Any:
    """Positions counted over all rows of the batch, with the capacity of the batch."""
    rows = chosen.reshape(1, -1, chosen.shape[-1])
    return right_within(rows, capacity.sum()[None]).reshape(chosen.shape)


def any_expert(chosen: Any, capacity: Any) -> Any:
    """Positions counted over all experts together."""
    m = xp(chosen)
    before = m.cumsum(chosen.any(axis=-1).astype(np.int64), axis=1) - 1
    return chosen & (before < capacity[:, None] * chosen.shape[-1])[..., None]


def jitter_in_place(self: SwitchMLP, x: Tensor, ctx: Context) -> Tensor:
    """The noise is written into x, so the experts see it, too."""
    seen = []

    def router(noisy: Tensor, ctx: Context) -> Tensor:
        seen.append(noisy)
        return type(self.router).forward(self.router, noisy, ctx)

    def run_experts(layer: SwitchMLP, clean: Tensor, kept: Any, ctx: Context) -> Tensor:
        return right_run(layer, seen[-1], kept, ctx)
    with replaced(self.router, "forward", router), replaced(SwitchMLP, "run_experts", run_experts):
        return right_forward(self, x, ctx)


def jitter_in_evaluation(self: SwitchMLP, x: Tensor, ctx: Context) -> Tensor:
    before, self.training = self.training, True
    result = right_route(self, x, ctx)
    self.training = before
    return result


def one_sided_jitter(self: SwitchMLP, x: Tensor, ctx: Context) -> Tensor:
    """u from (1, 1 + ε)."""
    with replaced(array, "uniform_like", lambda a, key: (1 + array.draw_uniform(a, key)) / 2):
        return right_route(self, x, ctx)


def choice_without_noise(self: SwitchMLP, x: Tensor, ctx: Context) -> Tensor:
    """Noisy logits choose; the gate and the losses come from clean ones."""
    noisy = right_route(self, x, ctx)
    clean = right_route(self, x, Context(mask=ctx.mask))
    best = noisy.data.argmax(axis=-1)[..., None] == xp(x.data).arange(noisy.shape[-1])
    return clean + Tensor(best * 1e-3)


def in_method(name: str, f: Any) -> AbstractContextManager:
    return replaced(SwitchMLP, name, f)


def in_module(name: str, f: Any) -> AbstractContextManager:
    return replaced(moe, name, f)


WRONG: dict[str, tuple[Any, str, Any]] = {
    "The gate is the softmax over the selected expert.": (in_method, "forward", without_gate),
    "The gate is a constant of the backward pass.": (in_method, "forward", gate_without_gradient),
    "Outputs are put back one after the other.": (in_method, "run_experts", dropped_are_lost),
    "The order that sorted the tokens puts them back.": (in_method, "run_experts", left_sorted),
    "A dropped token keeps its value: y = x.": (in_method, "run_experts", dropped_stay_as_they_are),
    "The balance loss is α Σ f P.": (in_method, "add_losses", balance_without_E),
    "Counts are as good as probabilities: α E Σ f².": (in_method, "add_losses", balance_by_choice_alone),
    "Dropped tokens count in no loss.": (in_method, "add_losses", losses_after_dropping),
    "Padding has an expert, so it counts.": (in_method, "add_losses", losses_with_padding),
    "The z-loss takes the router's probabilities.": (in_method, "add_losses", z_of_probabilities),
    "The capacity follows from the length of the batch.": (in_method, "capacity", capacity_of_the_batch),
    "The capacity is ⌊f T / E⌋, whatever its size.": (in_method, "capacity", capacity_without_least),
    "The capacity is rounded up.": (in_method, "capacity", capacity_rounded_up),
    "There is one capacity factor.": (in_method, "capacity", capacity_of_evaluation),
    "Position C is the last one with room.": (in_module, "within_capacity", one_more),
    "A cumulative sum along any axis counts tokens.": (in_module, "within_capacity", never_full),
    "The last tokens are the most important.": (in_module, "within_capacity", last_tokens_first),
    "A group is a batch.": (in_module, "within_capacity", over_the_batch),
    "All experts share their room.": (in_module, "within_capacity", any_expert),
    "Noise of the input is noise of the input.": (in_method, "forward", jitter_in_place),
    "The router's noise belongs to the router.": (in_method, "route", jitter_in_evaluation),
    "u lies in (1, 1 + ε).": (in_method, "route", one_sided_jitter),
    "Noise chooses the expert; the gate is that of the clean input.": (in_method, "route", choice_without_noise),
}


@wrong_answers
@pytest.mark.parametrize("belief", WRONG)
def test_a_wrong_layer_is_caught(belief):
    owner, name, f = WRONG[belief]
    with owner(name, f):
        for check in CHECKS:
            try:
                check()
            except AssertionError:
                return
    pytest.fail(f"no check rejects: {belief}")


REJECTED = {
    check_layer: "There is one capacity factor.",
    check_one_expert: "Noise of the input is noise of the input.",
    check_capacity: "Position C is the last one with room.",
    check_permutations: "The order that sorted the tokens puts them back.",
    check_rows_and_padding: "A group is a batch.",
    check_gradients: "The gate is a constant of the backward pass.",
    check_balance: "The balance loss is α Σ f P.",
    check_shift_and_copies: "The z-loss takes the router's probabilities.",
    check_ties: "The last tokens are the most important.",
}


@wrong_answers
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_check_rejects_a_wrong_layer(check):
    owner, name, f = WRONG[REJECTED[check]]
    with owner(name, f), pytest.raises(AssertionError):
        check()


# ── cost, dtypes, devices ────────────────────────────────────────────────────────────────────────────────────────────
def rows_of_experts(layer: SwitchMLP, x: np.ndarray, mask: np.ndarray | None = None) -> list[int]:
    """The number of rows that each expert computes."""
    counts = []
    right = MLP.forward

    def counted(self: MLP, part: Tensor, ctx: Context) -> Tensor:
        counts.append(len(part.data))
        return right(self, part, ctx)
    with replaced(MLP, "forward", counted):
        layer(Tensor(dev(x)), Context(mask=None if mask is None else dev(mask)))
    return counts


def check_cost() -> None:
    """An expert computes the tokens that it keeps and no other: at most B·T rows in all, whatever E is."""
    for seed in CASES:
        case = replace(draw_case(seed), key=None, trains=False)
        counts = rows_of_experts(case.layer.eval(), case.x, case.mask)
        expert = reference(case).expert
        assert counts == [int((expert == i).sum()) for i in range(len(case.layer.experts))]


def every_expert_computes_every_token(self: SwitchMLP, x: Tensor, kept: Any, ctx: Context) -> Tensor:
    """The one-hot choice multiplies the outputs of all experts: right, at E times the cost."""
    y = x * 0
    for i, expert in enumerate(self.experts):
        y = y + ops.where(kept[..., i:i + 1], expert(x.reshape(-1, C), ctx).reshape(x.shape), 0.0)
    return y


def test_experts_compute_only_their_tokens():
    check_cost()
    with replaced(SwitchMLP, "run_experts", every_expert_computes_every_token):
        check_layer()
        with pytest.raises(AssertionError):
            check_cost()


def test_an_expert_without_tokens_has_a_gradient_of_zero():
    layer = make_layer(np.random.default_rng(0), 3)
    layer.router.weight.copy_(dev(np.zeros((3, C))))                     # all tokens go to expert 0
    layer(Tensor(dev(np.ones((1, 4, C)))), Context()).sum().backward()
    assert np.abs(host(layer.experts[0].up.weight.grad)).max() > 0
    for expert in layer.experts[1:]:
        for p in expert.parameters():
            assert (host(p.grad) == 0).all()


def check_router_precision() -> None:
    """The router computes in float32: close logits of 16-bit inputs differ."""
    layer = make_layer(np.random.default_rng(0), 2, balance=0.0)
    w = np.zeros((2, C))
    w[0, :2] = 1.0, 1.0
    w[1, :2] = 1.0, 1.0 + 2.0**-7
    layer.router.weight.copy_(dev(w))
    x = np.zeros((1, 1, C))
    x[0, 0, :2] = 64.0, 0.25                                             # logits 64.25 and 64.252: equal in bfloat16
    layer.to(dtype="bfloat16")
    ctx = Context()
    y = layer(Tensor(dev(x).astype(array.bfloat16)), ctx)
    assert y.dtype == array.bfloat16
    assert ctx.losses["router_z"].dtype == np.float32
    wide = make_layer(np.random.default_rng(0), 2, dtype=np.float32)
    for p, q in zip(wide.parameters(), layer.parameters()):
        p.copy_(host(q).astype(np.float32))
    expected = wide(Tensor(dev(x.astype(np.float32))), Context())
    np.testing.assert_allclose(host(y).astype(np.float32), host(expected), rtol=0.02, atol=0.02)
    with ft.autocast("bfloat16"):
        ctx = Context()
        wide(Tensor(dev(x.astype(np.float32))), ctx)
    logits = np.array([64.25, 64.25 + 2.0**-9])
    expected_z = Z * (logits.max() + math.log(np.exp(logits - logits.max()).sum()))**2
    assert float(ctx.losses["router_z"]) == pytest.approx(expected_z, rel=1e-6)


def route_in_16_bits(self: SwitchMLP, x: Tensor, ctx: Context) -> Tensor:
    return self.router(x, ctx)


def test_the_router_computes_in_float32():
    check_router_precision()
    with replaced(SwitchMLP, "route", route_in_16_bits), pytest.raises(AssertionError):
        check_router_precision()


def test_capture_is_refused_in_one_sentence(monkeypatch):
    layer = make_layer(np.random.default_rng(0), 2)
    monkeypatch.setattr(array, "recording", object())
    with pytest.raises(ft.CannotCapture, match="how many tokens each expert got.*without capture"):
        layer(Tensor(dev(np.zeros((1, 2, C)))), Context())


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────
V = 17
SWITCH = SwitchConfig(experts=4, min_capacity=1, balance=0.1)


def make_model(kind: str, seed: int = 0, switch: SwitchConfig | None = SWITCH, layers: int = 4,
               **more: Any) -> Any:
    if kind == "gpt":
        return ft.GPT(ft.GPTConfig(V, 16, 12, layers, 3, 20, switch=switch, **more), seed=seed)
    return ft.BERT(ft.BERTConfig(V, 16, 2, 12, layers, 3, 20, switch=switch, **more), seed=seed)


def make_batch(kind: str, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    batch = {"ids": rng.integers(0, V, (3, 9)), "mask": np.arange(9) < np.array([9, 4, 7])[:, None]}
    if kind == "bert":
        batch["labels"] = np.where(batch["mask"], rng.integers(0, V, (3, 9)), -100)
    return batch


KINDS = pytest.mark.parametrize("kind", ["gpt", "bert"])


@KINDS
def test_every_second_block_is_a_switch_layer_and_the_others_start_as_before(kind):
    model = make_model(kind)
    assert [type(block.mlp).__name__ for block in model.blocks] == ["MLP", "SwitchMLP"] * 2
    assert SwitchConfig(every=3).layers(7) == [2, 5]
    plain = make_model(kind, switch=None)
    for name in ("embed.weight", "blocks.0.attn.q.weight", "blocks.0.mlp.up.weight"):
        np.testing.assert_array_equal(host(model.named_parameters()[name]), host(plain.named_parameters()[name]))
    stds = {host(expert.up.weight).std() for expert in model.blocks[1].mlp.experts}
    assert len(stds) == 4, "the experts start from different numbers"
    one = make_model(kind, switch=replace(SWITCH, experts=1))
    assert ft.count(one).total == ft.count(plain).total + 2 * 12                 # two routers of one row


def make_mlp(dropout: float = 0.1) -> MLP:
    return MLP(C, F, activation=ops.relu, rng=np.random.default_rng(0), dropout=dropout)


def test_the_feed_forward_of_a_block_follows_the_settings():
    """Every n-th is a Switch layer, with a dropout of its own if it is given."""
    for every in (1, 2, 3, 4):
        switch = SwitchConfig(2, every)
        layers = [moe.feed_forward(i, switch, make_mlp, rng=np.random.default_rng(0)) for i in range(9)]
        assert [i for i, layer in enumerate(layers) if isinstance(layer, SwitchMLP)] == switch.layers(9)
    for dropout, expected in ((None, 0.1), (0.0, 0.0), (0.4, 0.4)):
        layer = moe.feed_forward(0, SwitchConfig(2, 1, dropout=dropout), make_mlp, rng=np.random.default_rng(0))
        assert [expert.drop.p for expert in layer.experts] == [expected] * 2


def test_a_router_starts_with_a_standard_deviation_of_002():
    switch = SwitchConfig(8, 1)
    z = np.random.default_rng(0).standard_normal((8, C))
    of_a_block = moe.feed_forward(0, switch, make_mlp, rng=np.random.default_rng(0))
    alone = SwitchMLP([make_mlp() for _ in range(8)], switch, rng=np.random.default_rng(0))
    for layer in (of_a_block, alone):
        np.testing.assert_allclose(host(layer.router.weight), 0.02 * z, rtol=1e-5)


@KINDS
def test_a_switch_model_trains_and_logs_its_losses(kind):
    batches = [make_batch(kind, seed) for seed in range(2)]
    history = ft.fit(make_model(kind, dropout=0.1), batches, 12, ft.AdamW(0.02), progress=False)
    assert history.terms.keys() == {"loss", "balance", "router_z"}
    assert history.losses[-1] < history.losses[0] - 0.3
    total = sum(values[0] for values in history.terms.values())
    assert history.losses[0] == pytest.approx(total, rel=1e-6)


@KINDS
def test_recomputation_changes_no_bit_and_accumulation_adds_up(kind):
    batches = [make_batch(kind, seed) for seed in range(2)]
    runs = []
    for recompute in (False, True):
        model = make_model(kind, dropout=0.1)
        history = ft.fit(model, batches, 3, ft.AdamW(0.02), accumulate=2, recompute=recompute, progress=False)
        values = {name: host(p).tobytes() for name, p in model.named_parameters().items()}
        runs.append((history.losses, history.terms, values))
    assert runs[0] == runs[1]
    model = make_model(kind)
    terms = []
    for batch in batches:
        ctx, loss = ft.train.compute_loss(model, ft.train.read_batch(batch))
        terms.append((ft.train.read_batch(batch).weight, float(ctx.losses["balance"])))
    model = make_model(kind, switch=replace(SWITCH, jitter=0.0, capacity=2.0))
    history = ft.fit(model, batches, 1, ft.SGD(1e-9), accumulate=2, progress=False)
    expected = sum(w * value for w, value in terms) / sum(w for w, _ in terms)
    assert history.terms["balance"][0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_switch_model_trains_in_16_bits(dtype):
    batches = [make_batch("gpt")]
    wide = ft.fit(make_model("gpt"), batches, 6, ft.AdamW(0.01), progress=False).losses
    under_autocast = ft.fit(make_model("gpt"), batches, 6, ft.AdamW(0.01), autocast=dtype, progress=False).losses
    narrow = make_model("gpt").to(dtype=dtype)
    in_16_bits = ft.fit(narrow, batches, 6, ft.AdamW(0.01), progress=False).losses
    np.testing.assert_allclose(under_autocast, wide, rtol=0.02)
    np.testing.assert_allclose(in_16_bits, wide, rtol=0.05)
    assert host(narrow(batches[0]["ids"])).dtype == np.dtype(array.bfloat16 if dtype == "bfloat16" else dtype)


def test_a_cached_pass_is_the_full_pass_if_no_token_is_dropped():
    model = make_model("gpt", switch=replace(SWITCH, eval_capacity=4.0)).to(dtype=np.float64)
    ids = make_batch("gpt")["ids"]
    cache = ft.Cache()
    pieces = [host(model(ids[:, t:t + 1], cache=cache)) for t in range(ids.shape[1])]
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), host(model(ids)), rtol=0, atol=1e-12)
    assert ft.generate(model, ids, 3).shape[1] >= 3


def test_lora_on_experts_trains_merges_and_loads(tmp_path):
    model = make_model("gpt").to(dtype=np.float64)
    ft.attach(model, ft.LoRA(r=2, targets="experts.*.up"), seed=1)
    assert len([name for name in ft.trained(model) if name.endswith("edits.lora.A")]) == 8
    ft.fit(model, [make_batch("gpt")], 3, ft.AdamW(0.1), progress=False)
    ids = make_batch("gpt")["ids"]
    tuned = host(model(ids))
    ft.save_adapter(model, tmp_path / "adapter")
    ft.merge(model)
    np.testing.assert_allclose(host(model(ids)), tuned, rtol=0, atol=1e-7)
    fresh = make_model("gpt").to(dtype=np.float64)
    ft.load_adapter(fresh, tmp_path / "adapter")
    np.testing.assert_allclose(host(fresh(ids)), tuned, rtol=0, atol=1e-5)


def load_of(model: Any, batch: dict) -> np.ndarray:
    """The share of real tokens that choose each expert, over the Switch layers."""
    shares = []
    right = SwitchMLP.add_losses

    def counted(self: SwitchMLP, logits: Tensor, p: Tensor, chosen: Any, ctx: Context) -> None:
        shares.append(host(chosen).sum(axis=(0, 1)) / host(chosen).sum())
        right(self, logits, p, chosen, ctx)
    with replaced(SwitchMLP, "add_losses", counted):
        model(batch["ids"], mask=batch["mask"])
    return np.array(shares)


@pytest.mark.skipif(array.backend() != "numpy", reason="a statement about training, the same on every backend")
def test_the_balance_loss_spreads_the_tokens():
    """From routers that prefer one expert: over four seeds, the largest share falls with the loss and not without."""
    largest = {}
    for balance in (0.0, 1.0):
        found = []
        for seed in range(4):
            model = make_model("gpt", seed, replace(SWITCH, balance=balance, z_loss=0.0), layers=2)
            for block in model.blocks[1::2]:
                block.norm2.bias.copy_(dev(np.ones(12)))
                block.mlp.router.weight.copy_(dev(host(block.mlp.router.weight) + 0.05 * np.eye(4, 1)))
            batch = make_batch("gpt", seed)
            ft.fit(model, [batch], 25, ft.AdamW(0.02), progress=False)
            found.append(load_of(model, batch).max())
        largest[balance] = np.mean(found)
    assert largest[1.0] < 0.6
    assert largest[0.0] > largest[1.0] + 0.2


@pytest.mark.parametrize("fields, words", [
    ({"experts": 0}, "SwitchConfig: experts wants a whole number >= 1, got 0"),
    ({"capacity": 0}, "SwitchConfig: capacity wants a finite number > 0, got 0"),
    ({"eval_capacity": -1.0}, "SwitchConfig: eval_capacity wants a finite number > 0"),
    ({"min_capacity": 0}, "SwitchConfig: min_capacity wants a whole number >= 1"),
    ({"every": 0}, "SwitchConfig: every wants a whole number >= 1"),
    ({"jitter": 1.0}, "SwitchConfig: jitter wants a finite number >= 0 and < 1"),
    ({"num_experts": 4}, "experts"),
])
def test_bad_settings_are_refused_in_one_sentence(fields, words):
    with pytest.raises((TypeError, ValueError), match=words):
        SwitchConfig(**fields)


def test_a_model_without_a_switch_layer_is_refused():
    with pytest.raises(ValueError, match="GPTConfig: a Switch layer in every 2 blocks wants 2 layers or more, got 1"):
        ft.GPTConfig(V, 16, 12, 1, 3, switch=SWITCH)
    with pytest.raises(TypeError, match="BERTConfig: switch wants a SwitchConfig or None, got 8"):
        ft.BERTConfig(V, 16, 0, 12, 2, 3, switch=8)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@KINDS
@pytest.mark.parametrize("classes", [0, 3])
def test_a_switch_model_is_saved_and_loaded(kind, classes, tmp_path):
    model = make_model(kind, seed=3)
    if classes:
        ft.classifier(model, classes)
    ft.save(model, tmp_path / "model")
    loaded, _ = ft.load(tmp_path / "model")
    assert loaded.config == model.config
    batch = make_batch(kind)
    expected = host(model(batch["ids"], mask=batch["mask"]))
    np.testing.assert_array_equal(host(loaded(batch["ids"], mask=batch["mask"])), expected)
    assert f'"model_type": "tinyft-switch-{"gpt2" if kind == "gpt" else "bert"}"' in read(tmp_path)
    ft.save(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "model" / "model.safetensors").read_bytes()


def read(path: Any) -> str:
    return (path / "model" / "config.json").read_text()


@pytest.mark.parametrize("old, new, words", [
    ('"experts": 4', '"experts": 5', "blocks.1|expert_4|h.1"),
    ('"experts": 4', '"experts": 1000000000', "asks for 1000000000 experts; the file holds"),
    ('"experts": 4', '"experts": 0', "SwitchConfig: experts wants a whole number >= 1, got 0"),
    ('"experts": 4', '"experts": "4"', "SwitchConfig: experts wants a whole number"),
    ('"experts": 4', '"heads": 4', "config.json wants 'switch' with the fields balance, capacity"),
    ('"every": 2', '"every": 9', "a Switch layer in every 9 blocks wants 9 layers or more, got 4"),
])
def test_a_damaged_description_is_refused(old, new, words, tmp_path):
    ft.save(make_model("gpt"), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(ValueError, match=words):
        ft.load(tmp_path / "model")


def test_a_distilbert_with_experts_has_no_format(tmp_path):
    """make_model's BERT has token types; without a pooler of its kind there is no family for it."""
    model = ft.BERT(ft.BERTConfig(V, 16, 0, 12, 2, 3, 20, switch=SWITCH), seed=0)
    with pytest.raises(ValueError, match="save wants a BERT with the settings of"):
        ft.save(model, tmp_path / "model")


# ── an encoder-decoder ───────────────────────────────────────────────────────────────────────────────────────────────
def make_seq2seq(**more: Any) -> ft.Seq2Seq:
    switch = replace(SWITCH, eval_capacity=4.0)
    return ft.Seq2Seq(ft.Seq2SeqConfig(V, 16, 12, 4, 3, 20, decoder_layers=2, switch=switch, **more), seed=0)


def test_an_encoder_decoder_has_switch_layers_in_both_stacks():
    """Both stacks log one sum of losses; a cached pass is the full pass; padding of the source does not count."""
    model = make_seq2seq().to(dtype=np.float64)
    switched = [type(block.mlp).__name__ == "SwitchMLP" for block in [*model.encoder, *model.decoder]]
    assert switched == [False, True, False, True, False, True]
    rng = np.random.default_rng(0)
    ids, source = rng.integers(0, V, (3, 6)), rng.integers(0, V, (3, 8))
    mask = np.arange(8) < np.array([8, 3, 5])[:, None]
    ctx = Context(source_ids=source, source_mask=mask)
    y = host(model(ids, ctx))
    calls = []
    right = SwitchMLP.add_losses

    def counted(self: SwitchMLP, logits: Tensor, p: Tensor, chosen: Any, inner: Context) -> None:
        alone = Context()
        right(self, logits, p, chosen, alone)
        calls.append(float(alone.losses["balance"]))
        right(self, logits, p, chosen, inner)
    with replaced(SwitchMLP, "add_losses", counted):
        model(ids, source_ids=source, source_mask=mask)
    assert len(calls) == 3
    assert float(ctx.losses["balance"]) == pytest.approx(sum(calls), rel=1e-12)
    near(model(ids, source_ids=np.where(mask, source, 3), source_mask=mask), y)
    cache = ft.Cache()
    encoded = model.encode(source, mask=mask)
    pieces = [host(model(ids[:, t:t + 1], source=encoded, cache=cache)) for t in range(6)]
    near(np.concatenate(pieces, axis=1), y)


def test_an_encoder_decoder_with_experts_trains_and_has_no_format(tmp_path):
    rng = np.random.default_rng(0)
    batch = {"ids": rng.integers(0, V, (4, 6)), "source_ids": rng.integers(0, V, (4, 8))}
    model = make_seq2seq(dropout=0.1)
    history = ft.fit(model, [batch], 12, ft.AdamW(0.02), recompute=True, progress=False)
    assert history.terms.keys() == {"loss", "balance", "router_z"}
    assert history.losses[-1] < history.losses[0] - 0.3
    with pytest.raises(ValueError, match="save wants a Seq2Seq with the settings of marian"):
        ft.save(model, tmp_path / "model")
    with pytest.raises(ValueError, match="Seq2SeqConfig: a Switch layer in every 2 blocks wants 2 layers or more, got"):
        ft.Seq2SeqConfig(V, 16, 12, 4, 3, decoder_layers=1, switch=SWITCH)

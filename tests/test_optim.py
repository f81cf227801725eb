"""Optimisers, clipping, groups, masks, state and schedules, against numbers worked out by hand and against plain NumPy.

Each check named `agrees_*` must also reject the wrong optimisers of the table WRONG.
"""
from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import dev, host, leaf, wrong_answers

import tinyft
from tinyft import (
    BERT,
    GPT,
    SGD,
    Adam,
    AdamW,
    BERTConfig,
    GPTConfig,
    LoRA,
    PrefixTuning,
    array,
    constant_schedule,
    cosine_schedule,
    dispatch,
    kernels,
    linear_schedule,
    optim,
)
from tinyft.files import read_tensors
from tinyft.nn import Linear, Parameter
from tinyft.optim.buffers import Group, Piece
from tinyft.optim.optimizers import Optimizer, adam_update
from tinyft.tensor import Tensor

VERSION_0_1 = Path(__file__).parent / "data" / "version_0_1"


@pytest.fixture(autouse=True, params=[optim.buffers.LARGE, 2], ids=["joint piece", "piece by piece"])
def _large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test twice: its tensors updated together, as small ones are, and each by itself, as large ones are."""
    monkeypatch.setattr(optim.buffers, "LARGE", request.param)


def set_gradients(named: dict[str, Tensor], gradients: dict[str, np.ndarray]) -> None:
    """Give each tensor its gradient; None to a tensor that has no entry."""
    for name, p in named.items():
        g = gradients.get(name)
        p.grad = None if g is None else dev(g, p.dtype)


def train(optimizer: Optimizer, named: dict[str, Tensor], gradients: list[dict], **step: Any) -> dict[str, np.ndarray]:
    """Start the optimiser, take one step per dict of gradients, and return the values."""
    optimizer.start(named)
    for of_step in gradients:
        set_gradients(named, of_step)
        optimizer.step(**step)
    return {name: np.array(host(p)) for name, p in named.items()}


def scalar_path(optimizer: Optimizer, gradients: list[float], start: float = 1.0) -> list[float]:
    """The values of one number after each step."""
    p = leaf(np.array([[start]]))
    optimizer.start({"w": p})
    values = []
    for g in gradients:
        p.grad = dev(np.array([[g]]))
        optimizer.step()
        values.append(float(host(p)[0, 0]))
    return values


def all_moments(optimizer: Optimizer) -> list[np.ndarray]:
    """Copies of the flat moments of all groups."""
    return [np.array(host(m)) for group in optimizer.groups for m in group.moments]


def all_tensors(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.groups for p in group.tensors.values()]


# ── the equations ────────────────────────────────────────────────────────────────────────────────────────────────────
def agrees_with_adam_by_hand(make: type[Optimizer]) -> None:
    path = scalar_path(make(lr=0.1, weight_decay=0.0), [1, 1, -1])
    assert np.allclose(path, [0.9, 0.8, 0.77380074], rtol=0, atol=1e-7)


def agrees_with_decoupled_decay(make: type[Optimizer]) -> None:
    """With a gradient of zero θ shrinks by 1 − ηλ per step and the moments stay zero.

    The factor on the learning rate scales the decay too."""
    p = leaf(np.full((2, 3), 2.0))
    optimizer = make(lr=0.1, weight_decay=0.5)
    after = train(optimizer, {"w": p}, [{"w": np.zeros((2, 3))}] * 3, factor=0.5)["w"]
    assert np.allclose(after, 2.0 * (1 - 0.1 * 0.5 * 0.5)**3, rtol=1e-12)
    assert all(not m.any() for m in all_moments(optimizer))


class NoBiasCorrection(AdamW):
    def update(self, piece: Piece, lr: float) -> None:
        adam_update(piece.w, piece.g, *piece.moments, lr, *self.betas, self.eps, piece.decay, 10**9)


class BiasCorrectionOfTheFirstStep(AdamW):
    def update(self, piece: Piece, lr: float) -> None:
        adam_update(piece.w, piece.g, *piece.moments, lr, *self.betas, self.eps, piece.decay, 1)


class LateBiasCorrection(AdamW):
    def update(self, piece: Piece, lr: float) -> None:
        adam_update(piece.w, piece.g, *piece.moments, lr, *self.betas, self.eps, piece.decay, self.t + 1)


class FreshMoments(AdamW):
    def update(self, piece: Piece, lr: float) -> None:
        for m in piece.moments:
            m[...] = 0
        super().update(piece, lr)


class CoupledDecay(AdamW):
    def update(self, piece: Piece, lr: float) -> None:
        piece.g += piece.decay * piece.w
        adam_update(piece.w, piece.g, *piece.moments, lr, *self.betas, self.eps, 0.0, self.t)


class UnscaledDecay(AdamW):
    def update(self, piece: Piece, lr: float) -> None:
        piece.w *= 1 - piece.decay
        adam_update(piece.w, piece.g, *piece.moments, lr, *self.betas, self.eps, 0.0, self.t)


WRONG = [
    (agrees_with_adam_by_hand, NoBiasCorrection),
    (agrees_with_adam_by_hand, BiasCorrectionOfTheFirstStep),
    (agrees_with_adam_by_hand, LateBiasCorrection),
    (agrees_with_adam_by_hand, FreshMoments),
    (agrees_with_decoupled_decay, CoupledDecay),
    (agrees_with_decoupled_decay, UnscaledDecay),
    (agrees_with_decoupled_decay, Adam),
]


@pytest.mark.parametrize("make", [Adam, AdamW])
def test_adam_takes_the_steps_worked_out_by_hand(make):
    agrees_with_adam_by_hand(make)


def test_adamw_decays_the_weight_and_not_the_gradient():
    agrees_with_decoupled_decay(AdamW)


@wrong_answers
@pytest.mark.parametrize("check, make", WRONG, ids=lambda v: v.__name__)
def test_a_wrong_adam_is_rejected(check, make):
    with pytest.raises(AssertionError):
        check(make)


def test_sgd_with_momentum_and_decay_takes_the_steps_worked_out_by_hand():
    # u: 0.5 -> 0.5·0.5 + 0.5 = 0.75 -> 0.5·0.75 − 0.5 = −0.125
    path = scalar_path(SGD(lr=0.1, momentum=0.5), [0.5, 0.5, -0.5])
    assert np.allclose(path, [0.95, 0.875, 0.8875], atol=1e-12)
    # g + λθ: 1 + 0.2·1 = 1.2 -> θ = 0.88;  u = 0.5·1.2 + 1 + 0.2·0.88 = 1.776 -> θ = 0.7024
    path = scalar_path(SGD(lr=0.1, momentum=0.5, weight_decay=0.2), [1, 1])
    assert np.allclose(path, [0.88, 0.7024], atol=1e-12)


def test_the_decay_of_adam_is_part_of_the_gradient():
    # ε = 1 makes the size of a gradient visible.
    # g + λθ = 0.2 + 0.5·2 = 1.2;  m̂ = 1.2, √v̂ = 1.2 -> θ = 2 − 0.1·1.2/2.2
    path = scalar_path(Adam(lr=0.1, eps=1.0, weight_decay=0.5), [0.2], 2.0)
    assert np.allclose(path, [2 - 0.12 / 2.2], rtol=1e-12)


def test_the_defaults_are_those_of_the_papers():
    assert np.allclose(scalar_path(SGD(0.1), [1, 1]), [0.9, 0.8])
    assert np.allclose(scalar_path(AdamW(0.1), [0]), [1 - 0.1 * 0.01])
    assert scalar_path(Adam(0.1), [0]) == [1]
    assert AdamW(0.1).t == 0
    assert Optimizer(0.1).weight_decay == 0


def test_adam_and_adamw_are_the_same_without_decay_and_differ_with_it():
    gradients = [1.0, 0.5, -2.0, 0.1]
    assert scalar_path(Adam(0.1), gradients) == scalar_path(AdamW(0.1, weight_decay=0.0), gradients)
    coupled = scalar_path(Adam(0.1, weight_decay=0.3), gradients)
    decoupled = scalar_path(AdamW(0.1, weight_decay=0.3), gradients)
    assert np.abs(np.subtract(coupled, decoupled)).min() > 1e-3


def test_an_optimiser_is_printed_with_its_hyper_parameters_alone():
    """Checkpoints hold this text: it must not change, and must not contain the state."""
    optimizer = AdamW(0.02)
    text = "AdamW(lr=0.02, weight_decay=0.01, rules={}, betas=(0.9, 0.999), eps=1e-08)"
    assert repr(optimizer) == text
    train(optimizer, {"w": leaf(np.ones((2, 2)))}, [{"w": np.ones((2, 2))}])
    assert repr(optimizer) == text
    assert repr(SGD(0.02, 0.9)) == "SGD(lr=0.02, weight_decay=0.0, rules={}, momentum=0.9)"


# ── weight decay and learning rate by tensor ─────────────────────────────────────────────────────────────────────────
def a_few_tensors() -> dict[str, Tensor]:
    """One of each kind: a matrix, a bias, a norm, a soft prompt with decay=False, a vector with decay=True."""
    shapes = {"a.weight": (2, 3), "a.bias": (3,), "norm.weight": (3,), "prompt.P": (4, 2), "gate": (2,)}
    named = {name: leaf(np.ones(shape)) for name, shape in shapes.items()}
    named["norm.weight"].decay = False
    named["prompt.P"].decay = False
    named["gate"].decay = True
    return named


def first_values(values: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(v.ravel()[0]) for name, v in values.items()}


def test_biases_norms_and_prompts_do_not_decay_and_a_tensor_marked_for_decay_does():
    named = a_few_tensors()
    after = train(AdamW(0.1, weight_decay=0.5), named, [{name: np.zeros(p.shape) for name, p in named.items()}])
    expected = {"a.weight": 0.95, "a.bias": 1.0, "norm.weight": 1.0, "prompt.P": 1.0, "gate": 0.95}
    assert first_values(after) == pytest.approx(expected)


def test_a_group_sets_learning_rate_and_decay_and_the_first_match_wins():
    named = a_few_tensors()
    groups = {"a.*": {"lr": 0.3}, "a.weight": {"lr": 9.0}, "gate": {"weight_decay": 0.0}}
    gradients = {name: np.ones(p.shape) for name, p in named.items()}
    after = train(SGD(0.1, weight_decay=0.5, groups=groups), named, [gradients])
    expected = {"a.weight": 1 - 0.3 * 1.5, "a.bias": 0.7, "norm.weight": 0.9, "prompt.P": 0.9, "gate": 0.9}
    assert first_values(after) == pytest.approx(expected)


def test_a_decay_that_a_group_names_acts_on_every_tensor_of_the_group():
    """Vectors too, and tensors with decay=False: without such a group they do not decay."""
    named = a_few_tensors()
    no_gradients = {name: np.zeros(p.shape) for name, p in named.items()}
    groups = {"*bias": {"weight_decay": 0.5}, "prompt.*": {"weight_decay": 0.5}, "norm.*": {"lr": 0.2}}
    after = train(AdamW(0.1, weight_decay=0.1, groups=groups), named, [no_gradients])
    expected = {"a.weight": 0.99, "a.bias": 0.95, "norm.weight": 1.0, "prompt.P": 0.95, "gate": 0.99}
    assert first_values(after) == pytest.approx(expected)


def test_a_group_that_matches_nothing_or_sets_something_else_is_an_error():
    with pytest.raises(LookupError, match=r"'b\.\*' holds no tensor"):
        SGD(0.1, groups={"b.*": {"lr": 1.0}}).start(a_few_tensors())
    with pytest.raises(LookupError, match=r"there are norm\.weight"):
        SGD(0.1, groups={"norms.weight": {"lr": 1.0}}).start(a_few_tensors())
    with pytest.raises(ValueError, match="sets momentum"):
        SGD(0.1, groups={"a.*": {"momentum": 1.0}})


# ── masks, and tensors without a gradient ────────────────────────────────────────────────────────────────────────────
def make_sgd() -> Optimizer:
    return SGD(0.1, momentum=0.9, weight_decay=0.1)


def make_adam() -> Optimizer:
    return Adam(0.1, weight_decay=0.1)


def make_adamw() -> Optimizer:
    return AdamW(0.1, weight_decay=0.1)


each_optimizer = pytest.mark.parametrize("make", [make_sgd, make_adam, make_adamw], ids=["sgd", "adam", "adamw"])


@each_optimizer
def test_masked_entries_keep_value_and_moments(make, rng):
    start = rng.standard_normal((3, 4))
    mask = np.array([[True], [False], [True]])
    gradients = [{"w": rng.standard_normal((3, 4))} for _ in range(6)]
    p = leaf(start)
    optimizer = make().start({"w": p})
    for of_step in gradients[:3]:                                  # without a mask, so that there are moments to keep
        set_gradients({"w": p}, of_step)
        optimizer.step()
    before = np.array(host(p))
    moments_before = [m.reshape(3, 4) for m in all_moments(optimizer)]
    p.mask = dev(mask)
    for of_step in gradients[3:]:
        set_gradients({"w": p}, of_step)
        optimizer.step()
    moments = [m.reshape(3, 4) for m in all_moments(optimizer)]
    unmasked = train(make(), {"w": leaf(start)}, gradients)["w"]
    frozen = ~mask[:, 0]
    assert np.array_equal(host(p)[frozen], before[frozen])
    assert all(np.array_equal(m[frozen], earlier[frozen]) for m, earlier in zip(moments, moments_before))
    assert np.allclose(host(p)[~frozen], unmasked[~frozen], rtol=1e-12)          # the other entries are updated as ever
    assert np.abs(unmasked[frozen] - before[frozen]).min() > 1e-3                # without the mask they would change


@each_optimizer
def test_a_tensor_without_a_gradient_keeps_value_and_moments(make, rng):
    named = {name: leaf(rng.standard_normal((2, 2))) for name in "ab"}
    optimizer = make()
    first = train(optimizer, named, [{name: rng.standard_normal((2, 2)) for name in "ab"}])
    moments_before = all_moments(optimizer)
    named["a"].grad = None
    named["a"].mask = dev(np.ones((2, 2), bool))
    named["b"].grad = dev(np.ones((2, 2)))
    assert float(optimizer.step()) == 2                                          # the norm of b's gradient alone
    assert np.array_equal(host(named["a"]), first["a"])
    assert not np.array_equal(host(named["b"]), first["b"])
    a, b = (optimizer.groups[0].offsets[name] for name in "ab")
    for m, earlier in zip(all_moments(optimizer), moments_before):
        assert np.array_equal(m[a], earlier[a])
        assert not np.array_equal(m[b], earlier[b])


# ── clipping ─────────────────────────────────────────────────────────────────────────────────────────────────────────
Step = Callable[[Optimizer, Any], Any]


def clipped_step(optimizer: Optimizer, clip: float | None) -> Any:
    return optimizer.step(clip=clip)


def clipped(step: Step, gradients: dict[str, np.ndarray], clip: float | None) -> dict[str, np.ndarray]:
    """The change of each tensor, negated, after a step of plain SGD over two groups; and the norm."""
    named = {name: leaf(np.zeros(g.shape)) for name, g in gradients.items()}
    optimizer = SGD(1.0, groups={"b": {"lr": 1.0, "weight_decay": 0.1}}).start(named)
    set_gradients(named, gradients)
    norm = step(optimizer, clip)
    return {name: -host(p) for name, p in named.items()} | {"norm": np.array(float(norm))}


def clips_all_gradients_together(step: Step) -> None:
    # Two groups; the common norm is 13.
    gradients = {"a": np.array([[3.0, 0.0]]), "b": np.array([[0.0, 4.0]]), "c": np.array([12.0])}
    for clip, scale in ((6.5, 0.5), (1.3, 0.1), (20.0, 1.0), (None, 1.0)):
        change = clipped(step, gradients, clip)
        assert float(change["norm"]) == pytest.approx(13)
        assert all(np.allclose(change[name], scale * g, rtol=1e-6) for name, g in gradients.items())


def each_tensor_by_its_own_norm(optimizer: Optimizer, clip: float | None) -> float:
    for p in all_tensors(optimizer):
        if clip is not None:
            p.grad = p.grad * min(1.0, clip / float(np.linalg.norm(host(p.grad))))
    optimizer.step()
    return 13.0


def by_the_norm_of_the_first_group(optimizer: Optimizer, clip: float | None) -> float:
    norm = np.linalg.norm(np.concatenate([host(p.grad).ravel() for p in optimizer.groups[0].tensors.values()]))
    for p in all_tensors(optimizer):
        if clip is not None:
            p.grad = p.grad * min(1.0, clip / float(norm))
    optimizer.step()
    return 13.0


def always_to_the_limit(optimizer: Optimizer, clip: float | None) -> float:
    for p in all_tensors(optimizer):
        if clip is not None:
            p.grad = p.grad * (clip / 13)
    optimizer.step()
    return 13.0


def test_clipping_scales_all_gradients_by_one_factor_from_their_common_norm():
    clips_all_gradients_together(clipped_step)


@wrong_answers
@pytest.mark.parametrize("wrong", [each_tensor_by_its_own_norm, by_the_norm_of_the_first_group, always_to_the_limit],
                         ids=lambda f: f.__name__)
def test_wrong_clipping_is_rejected(wrong):
    with pytest.raises(AssertionError):
        clips_all_gradients_together(wrong)


def test_the_smallest_gradients_are_clipped_as_torch_does_it():
    """clip / (norm + 1e-6): with a norm and a clip of 1e-6 the factor is a half."""
    change = clipped(clipped_step, {"a": np.array([[1e-6]]), "b": np.zeros((1, 1))}, 1e-6)
    assert np.allclose(change["a"], 0.5e-6, rtol=1e-9)


def test_masked_entries_do_not_count_in_the_norm():
    p = leaf(np.zeros((2, 1)))
    p.mask = dev(np.array([[True], [False]]))
    p.grad = dev(np.array([[3.0], [1e6]]))
    norm = SGD(1.0).start({"w": p}).step(clip=1.5)
    assert float(norm) == pytest.approx(3)
    assert np.allclose(host(p), [[-1.5], [0.0]], rtol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_updates_nothing(bad):
    p = leaf(np.ones((1, 2)))
    optimizer = AdamW(0.1).start({"w": p})
    p.grad = dev(np.array([[1.0, bad]]))
    with pytest.raises(FloatingPointError, match="norm is (nan|inf)"):
        optimizer.step(clip=1.0)
    assert np.array_equal(host(p), np.ones((1, 2)))
    assert optimizer.t == 0
    assert not any(m.any() for m in all_moments(optimizer))


# ── flat buffers ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_tensors_become_views_of_one_buffer_per_group_with_two_moments(rng):
    shapes = {"a": (3, 4), "b": (2, 2), "c": (5,)}
    named = {name: leaf(rng.standard_normal(shape), np.float32) for name, shape in shapes.items()}
    before = {name: np.array(host(p)) for name, p in named.items()}
    optimizer = AdamW(0.1).start(named)
    assert len(optimizer.groups) == 2                                            # c does not decay
    assert sum(m.size for m in all_moments(optimizer)) == 2 * (12 + 4 + 5)
    assert all(np.array_equal(host(p), before[name]) for name, p in named.items())
    for group in optimizer.groups:
        group.w[...] = 7
    assert all((host(p) == 7).all() and p.data.base is not None for p in named.values())


def test_data_replaced_from_outside_is_copied_into_the_same_buffer():
    p = leaf(np.ones((2, 2)))
    optimizer = SGD(0.5).start({"p": p})
    group = optimizer.groups[0]
    flat = group.w
    p.data = dev(np.full((2, 2), 5.0))
    p.grad = dev(np.ones((2, 2)))
    optimizer.step()
    assert (host(p) == 4.5).all()
    assert (host(group.w) == 4.5).all()
    assert group.w is flat
    assert p.data is group.views["p"]


ELSEWHERE = "strict" if array.backend() == "numpy" else "numpy"


def adamw_with_defaults() -> Optimizer:
    return AdamW(0.1)


def sgd_with_momentum() -> Optimizer:
    return SGD(0.1, momentum=0.9)


@pytest.mark.parametrize("make", [adamw_with_defaults, sgd_with_momentum], ids=["AdamW", "SGD"])
def test_an_optimiser_follows_a_moved_model_with_its_moments_and_masks(make, rng, monkeypatch):
    start = rng.standard_normal((3, 4)).astype(np.float32)
    gradients = rng.standard_normal((4, 3, 4)).astype(np.float32)

    def steps(backends: list[str]) -> list[np.ndarray]:
        """Values and state after each of four steps of one optimiser, each step on one of these backends."""
        layer = Linear(4, 3, rng=np.random.default_rng(0))
        layer.weight.copy_(start)
        layer.weight.mask = dev(start > 0)
        optimizer = make().start(layer.named_parameters())
        out = []
        for backend, g in zip(backends, gradients):
            layer.to(backend)
            layer.weight.grad = array.to(dev(g), backend)
            layer.bias.grad = array.to(dev(g[:, 0]), backend)
            optimizer.step()
            flat_arrays = [a for group in optimizer.groups for a in (group.w, *group.moments)]
            assert {layer.weight.device, *map(array.name_of, flat_arrays)} == {backend}
            out += [np.array(host(layer.weight)), np.array(host(layer.bias))]
            out += [np.array(a) for a in optimizer.state_dict().values()]
        return out

    def close(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
        return all(np.allclose(x, y, rtol=1e-6, atol=1e-7) for x, y in zip(a, b))

    here = array.backend()
    moves = [here, ELSEWHERE, ELSEWHERE, here]
    expected = steps([here] * 4)
    assert close(steps(moves), expected)
    assert not np.array_equal(expected[0], start)

    follow_device = Group.follow_device

    def follow_without_moments(self: Group) -> None:
        follow_device(self)
        for m in self.moments:
            m[...] = 0
    monkeypatch.setattr(Group, "follow_device", follow_without_moments)
    assert not close(steps(moves), expected)


def test_tensors_on_two_devices_and_tensors_of_another_dtype_are_refused():
    layer = Linear(4, 3, rng=np.random.default_rng(0))
    optimizer = AdamW(0.1).start({"a": layer.weight, "b": Parameter(dev(np.ones((2, 2), np.float32)))})
    layer.to(ELSEWHERE)
    with pytest.raises(array.BackendError, match="arrays on .* and .* in one operation"):
        optimizer.step()
    layer = Linear(4, 3, rng=np.random.default_rng(0))
    optimizer = AdamW(0.1).start(layer.named_parameters())
    layer.to(dtype=np.float64)
    layer.weight.grad = dev(np.ones((3, 4)))
    with pytest.raises(TypeError, match="were float32 when it was started, and are float64 now: start it again"):
        optimizer.step()
    assert layer.weight.dtype == np.float64


def test_a_graph_recorded_before_a_step_refuses_to_run_backward():
    p = leaf(np.ones((2, 2)))
    optimizer = SGD(1.0).start({"w": p})
    y = (p * p).sum()
    p.grad = dev(np.ones((2, 2)))
    optimizer.step()
    with pytest.raises(RuntimeError, match="written in place"):
        y.backward()


def test_tensors_of_two_dtypes_train_side_by_side():
    named = {"a": leaf(np.ones((1, 2)), np.float32), "b": leaf(np.ones((1, 2)), np.float64)}
    gradients = {"a": np.ones((1, 2)), "b": np.ones((1, 2))}
    after = train(AdamW(0.1, weight_decay=0), named, [gradients], clip=1.0)
    assert after["a"].dtype == np.float32
    assert after["b"].dtype == np.float64
    assert np.allclose(after["a"], after["b"])
    assert np.allclose(after["b"], 0.9)


def test_a_tensor_of_exactly_the_limit_is_small(monkeypatch):
    monkeypatch.setattr(optim.buffers, "LARGE", 6)
    a, b, c = leaf(np.ones((2, 3))), leaf(np.ones((1, 2))), leaf(np.ones((4, 2)))
    optimizer = AdamW(0.1, weight_decay=0.5).start({"c": c, "a": a, "b": b})
    assert list(optimizer.groups[0].offsets) == ["a", "b", "c"]
    for p in (a, b, c):
        p.grad = dev(np.ones(p.shape))
    optimizer.step()
    assert all((host(p) < 1).all() for p in (a, b, c))
    before = np.array(host(a))
    a.grad = None
    optimizer.step()
    assert np.array_equal(host(a), before)                                       # no gradient: no decay, no momentum
    assert (host(b) < before[0, 0]).all()


def test_a_masked_tensor_keeps_its_gradient_and_another_has_it_clipped():
    p, q = leaf(np.ones((2, 2))), leaf(np.ones((2, 2)))
    p.mask = dev(np.array([[True, False], [True, True]]))
    optimizer = SGD(0.1).start({"p": p, "q": q})
    p.grad = dev(np.full((2, 2), 3.0))
    q.grad = dev(np.full((2, 2), 4.0))
    norm = float(optimizer.step(clip=1.0))
    assert norm == pytest.approx((3 * 9 + 4 * 16)**0.5)
    assert np.array_equal(host(p.grad), np.full((2, 2), 3.0))
    assert np.allclose(host(q.grad), 4 / norm)


def test_launch_step_is_a_step_at_the_full_learning_rate_without_clipping_or_scale():
    a, b = leaf(np.ones((2, 2))), leaf(np.ones((2, 2)))
    one = SGD(0.5).start({"a": a})
    other = SGD(0.5).start({"b": b})
    a.grad = b.grad = dev(np.full((2, 2), 7.0))
    assert float(one.launch_step()) == float(other.step()) == 14
    assert np.array_equal(host(a), host(b))
    assert (host(a) == -2.5).all()


# ── state ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@each_optimizer
def test_an_optimiser_whose_state_was_loaded_continues_bitwise(make, rng):
    def draw() -> dict[str, np.ndarray]:
        return {"a": rng.standard_normal((3, 2)), "b": rng.standard_normal((4,))}

    start = draw()
    gradients = [draw() for _ in range(6)]

    def leaves(values: dict[str, np.ndarray]) -> dict[str, Tensor]:
        return {name: leaf(v) for name, v in values.items()}

    straight = train(make(), leaves(start), gradients, clip=1.0)
    first = make()
    half_way = train(first, leaves(start), gradients[:3], clip=1.0)
    state = {key: np.array(a) for key, a in first.state_dict().items()}

    def resume(load: bool) -> dict[str, np.ndarray]:
        named = leaves(half_way)
        second = make().start(named)
        if load:
            second.load_state_dict(state)
        for of_step in gradients[3:]:
            set_gradients(named, of_step)
            second.step(clip=1.0)
        return {name: host(p) for name, p in named.items()}

    assert all(np.array_equal(v, straight[name]) for name, v in resume(load=True).items())
    assert not any(np.array_equal(v, straight[name]) for name, v in resume(load=False).items())


def test_state_has_one_name_per_tensor_and_the_tensors_shapes():
    named = {"w": leaf(np.ones((2, 3))), "b": leaf(np.ones(3))}
    gradients = {"w": np.arange(6.0).reshape(2, 3), "b": np.array([9.0, 0.0, 1.0])}
    sgd = SGD(0.1, momentum=0.9)
    train(sgd, named, [gradients])
    state = sgd.state_dict()
    assert all(isinstance(a, np.ndarray) for a in state.values())
    assert list(state) == ["step", "momentum.w", "momentum.b"]
    assert state["step"] == 1 and state["step"].shape == ()
    assert np.array_equal(state["momentum.w"], gradients["w"])
    assert np.array_equal(state["momentum.b"], gradients["b"])
    adam = AdamW(0.1, betas=(0.5, 0.75))
    train(adam, named, [gradients])
    state = adam.state_dict()
    assert set(state) == {"step", "exp_avg.w", "exp_avg.b", "exp_avg_sq.w", "exp_avg_sq.b"}
    assert np.array_equal(state["exp_avg.w"], 0.5 * gradients["w"])
    assert np.array_equal(state["exp_avg_sq.b"], 0.25 * gradients["b"]**2)


def test_the_state_of_another_optimiser_is_refused_and_nothing_changes():
    optimizer = AdamW(0.1).start({"w": leaf(np.ones((2, 2)))})
    others = [SGD(0.1).start({"w": leaf(np.ones((2, 2)))}), AdamW(0.1).start({"w": leaf(np.ones((2, 3)))}),
              AdamW(0.1).start({"v": leaf(np.ones((2, 2)))})]
    for other in others:
        train(other, {name: p for group in other.groups for name, p in group.tensors.items()}, [{}])
        with pytest.raises(ValueError, match="belongs to other tensors"):
            optimizer.load_state_dict(other.state_dict())
    assert optimizer.t == 0


def version_0_1_optimizer(run: str) -> Optimizer:
    """The optimiser of a checkpoint of version 0.1, started on tensors of the same names, shapes, dtypes and order."""
    sizes = dict(width=12, positions=16, layers=2, heads=2, hidden=20)
    if run == "run-lora":
        model = GPT(GPTConfig(vocab=19, **sizes))
        tinyft.attach(model, LoRA(r=2, targets="attn.[qv]"))
    elif run == "run-prefix-mlp":
        model = tinyft.classifier(BERT(BERTConfig(vocab=19, **sizes)), 3)
        tinyft.attach(model, PrefixTuning(p=2, mlp=5))
    elif run == "run-full-large":
        model = tinyft.classifier(GPT(GPTConfig(vocab=3000, **sizes)), 3)
    else:
        model = GPT(GPTConfig(vocab=19, **sizes)).to(dtype="float16")
    if run == "run-full-large":
        optimizer = SGD(0.02, momentum=0.9, groups={"*.norm*": {"lr": 0.01}})
    else:
        optimizer = AdamW(0.02)
    return optimizer.start(tinyft.trained(model))


def parts(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names begin with this prefix, without it."""
    return {key[len(prefix):]: a for key, a in arrays.items() if key.startswith(prefix)}


def agrees_with_version_0_1(run: str) -> None:
    """Each tensor gets its own part of the flat arrays of version 0.1."""
    arrays, _ = read_tensors(VERSION_0_1 / run / "checkpoint.safetensors")
    optimizer = version_0_1_optimizer(run)
    optimizer.load_state_dict(parts(arrays, "optimizer/"))
    state = optimizer.state_dict()
    shapes = {name: p.shape for group in optimizer.groups for name, p in group.tensors.items()}
    values = {key.rpartition("/")[2].replace(":", ".edits.lora."): a for key, a in parts(arrays, "value/").items()}
    assert optimizer.t == 3
    for moment in optimizer.moment_names:
        assert all(state[f"{moment}.{name}"].shape == shape for name, shape in shapes.items())
    for flat_key, flat in parts(arrays, "optimizer/").items():
        if flat_key != "t":
            group_index, array_index = map(int, flat_key.split("."))
            kind = [*optimizer.moment_names, "master"][array_index]
            names = version_0_1_order(optimizer.groups[group_index])
            joined = np.concatenate([state[f"{kind}.{name}"].ravel() for name in names])
            assert np.array_equal(joined, flat), f"{kind} of group {group_index}"
    if run == "run-full-large":                                    # no text has a token above 18: no gradient there
        momentum = state["momentum.embed.weight"]
        assert momentum[:19].any()
        assert not momentum[19:].any()
    if run == "run-float16":                                       # a master weight, rounded, is the weight
        masters = parts(state, "master.")
        assert masters.keys() == shapes.keys()
        assert all(np.array_equal(w.astype(np.float16), values[name]) for name, w in masters.items())
    if run == "run-lora":                                          # B began at 0, and moved against its mean gradient
        for name in [name for name in shapes if name.endswith(".B")]:
            assert np.corrcoef(state[f"exp_avg.{name}"].ravel(), values[name].ravel())[0, 1] < -0.4


def version_0_1_order(group: Group) -> list[str]:
    """The order of the tensors in a flat array: large tensors last, otherwise as they were given."""
    return sorted(group.tensors, key=lambda name: group.tensors[name].size > 32768)


VERSION_0_1_RUNS = ["run-lora", "run-prefix-mlp", "run-full-large", "run-float16"]


@pytest.mark.parametrize("run", VERSION_0_1_RUNS)
def test_the_state_of_version_0_1_loads(run):
    agrees_with_version_0_1(run)


@wrong_answers
def test_a_wrong_reading_of_version_0_1_is_rejected(monkeypatch):
    right = optim.optimizers.read_version_0_1

    def in_the_order_of_size(state: dict, groups: list[Group], moment_names: tuple[str, ...]) -> dict:
        reordered = [copy.copy(group) for group in groups]
        for group in reordered:
            group.tensors = dict(sorted(group.tensors.items(), key=lambda item: item[1].size))
        return right(state, reordered, moment_names)
    monkeypatch.setattr(optim.optimizers, "read_version_0_1", in_the_order_of_size)
    with pytest.raises(AssertionError):
        agrees_with_version_0_1("run-prefix-mlp")


def test_in_version_0_1_a_tensor_of_exactly_the_limit_is_small():
    """A flat array of version 0.1 holds tensors of up to 32768 elements first, then the larger ones."""
    tensors = {"larger": leaf(np.zeros(32769)), "limit": leaf(np.zeros(32768)), "small": leaf(np.zeros(2))}
    optimizer = AdamW(0.1).start(tensors)
    numbers = np.arange(32768.0 + 2 + 32769)
    optimizer.load_state_dict({"t": np.array(3), "0.0": numbers, "0.1": -numbers})
    state = optimizer.state_dict()
    for kind, sign in (("exp_avg", 1), ("exp_avg_sq", -1)):
        assert np.array_equal(state[f"{kind}.limit"], sign * numbers[:32768])
        assert np.array_equal(state[f"{kind}.small"], sign * numbers[32768:32770])
        assert np.array_equal(state[f"{kind}.larger"], sign * numbers[32770:])


@each_optimizer
def test_a_step_writes_in_place(make):
    """No step replaces the data of a tensor or an array of the optimiser."""
    p = leaf(np.ones((3, 2)))
    optimizer = make().start({"p": p})
    (group,) = optimizer.groups
    before = [p.data, group.w, group.views["p"], *group.moments]
    for _ in range(2):
        p.grad = dev(np.ones((3, 2)))
        optimizer.step()
    after = [p.data, group.w, group.views["p"], *group.moments]
    assert all(a is b for a, b in zip(before, after))


def test_a_state_of_version_0_1_of_another_run_is_refused():
    arrays, _ = read_tensors(VERSION_0_1 / "run-lora" / "checkpoint.safetensors")
    state = parts(arrays, "optimizer/")
    for other in ("run-prefix-mlp", "run-full-large", "run-float16"):
        optimizer = version_0_1_optimizer(other)
        with pytest.raises(ValueError, match="belongs to other tensors"):
            optimizer.load_state_dict(state)
        assert optimizer.t == 0
    optimizer = version_0_1_optimizer("run-lora")
    for wrong in ({"0.2": state["0.1"]}, {"0.1": state["0.1"][1:]}):
        with pytest.raises(ValueError, match="belongs to other tensors"):
            optimizer.load_state_dict(state | wrong)
    assert optimizer.t == 0


@pytest.mark.parametrize("make, words", [
    (lambda: AdamW(lr=0), "lr wants a finite number > 0, got 0"),
    (lambda: AdamW(lr=-1), "lr wants a finite number > 0, got -1"),
    (lambda: AdamW(lr=math.nan), "lr wants a finite number > 0, got nan"),
    (lambda: AdamW(lr=math.inf), "lr wants a finite number > 0, got inf"),
    (lambda: SGD(lr=0.1, weight_decay=-0.1), "weight_decay wants a finite number >= 0, got -0.1"),
    (lambda: SGD(lr=0.1, weight_decay=math.nan), "weight_decay wants a finite number >= 0, got nan"),
    (lambda: SGD(lr=0.1, momentum=-0.5), "momentum wants a finite number >= 0 and < 1, got -0.5"),
    (lambda: SGD(lr=0.1, momentum=1), "momentum wants a finite number >= 0 and < 1, got 1"),
    (lambda: SGD(lr=0.1, groups={"a": {"lr": -1}}), r"groups\['a'\]: lr wants a finite number >= 0, got -1"),
    (lambda: SGD(lr=0.1, groups={"a": {"weight_decay": math.nan}}), r"groups\['a'\]: weight_decay wants .*got nan"),
    (lambda: SGD(lr=0.1, groups={"a": {"momentum": 0.9}}), "a group sets lr and weight_decay; 'a' sets momentum"),
    (lambda: AdamW(0.1, betas=(1, 1)), "each of betas wants a finite number >= 0 and < 1, got 1"),
    (lambda: AdamW(0.1, betas=(0.9, -0.1)), "each of betas wants a finite number >= 0 and < 1, got -0.1"),
    (lambda: AdamW(0.1, eps=-1e-8), "eps wants a finite number >= 0, got -1e-08"),
    (lambda: constant_schedule(-1), "warmup wants a finite number >= 0, got -1"),
    (lambda: linear_schedule(math.nan), "warmup wants a finite number >= 0, got nan"),
    (lambda: cosine_schedule(2.5), "warmup wants a whole number of steps, or a fraction below 1 .*, got 2.5"),
    (lambda: cosine_schedule(100, 1000), "floor wants a finite number >= 0 and <= 1, got 1000"),
    (lambda: cosine_schedule()(9, 8), "t wants a whole number from 0 to 8, got 9"),
    (lambda: cosine_schedule()(0, 0), "T wants a whole number >= 1, got 0"),
    (lambda: optim.clip_norm([np.ones(2)], -1.0), "limit wants a finite number > 0, got -1.0"),
    (lambda: started().step(factor=-1), "factor wants a finite number >= 0, got -1"),
    (lambda: started().step(clip=0), "clip wants a finite number > 0, got 0"),
    (lambda: started().step(clip=-1.0), "clip wants a finite number > 0, got -1.0"),
    (lambda: started().step(scale=0), "scale wants a finite number > 0, got 0"),
    (lambda: started().load_state_dict({}), "this optimiser state belongs to other tensors"),
    (lambda: optim.GradScaler(init_scale=math.inf), "init_scale wants a finite number, got inf"),
    (lambda: optim.GradScaler().load_state_dict({"scale": -1.0, "good": 0}), "scale wants a finite number > 0"),
    (lambda: optim.GradScaler().load_state_dict({"scale": 1.0}), "load_state_dict wants scale and good"),
    (lambda: AdamW(0.1).start({}), "nothing trains"),
    (lambda: AdamW(0.1).step(), "was not started"),
])
def test_bad_input_gets_one_clear_sentence(make, words):
    with pytest.raises((ValueError, RuntimeError), match=words):
        make()


@pytest.mark.parametrize("make, words", [
    (lambda: AdamW([1.0]), "lr wants a finite number > 0"),
    (lambda: AdamW("0.1"), "lr wants a finite number > 0, got '0.1'"),
    (lambda: AdamW(lr=True), "lr wants a finite number > 0, got True"),
    (lambda: AdamW(0.1, betas=0.9), "betas wants two numbers .* got 0.9"),
    (lambda: AdamW(0.1, betas=(0.9,)), "betas wants two numbers"),
    (lambda: SGD(0.1, groups=[0.1]), "groups wants a dict"),
    (lambda: SGD(0.1, groups={"a": 0.1}), r"groups\['a'\] wants a dict of lr and weight_decay, got 0.1"),
    (lambda: SGD(0.1).start([leaf(np.ones(2))]), "start wants named tensors"),
    (lambda: SGD(0.1).start({"a": np.ones(2)}), "start wants named tensors"),
    (lambda: started().load_state_dict(None), "load_state_dict wants a dict of arrays"),
    (lambda: cosine_schedule("10"), "warmup wants a finite number >= 0, got '10'"),
    (lambda: cosine_schedule()(0.5, 8), "t wants a whole number from 0 to 8, got 0.5"),
    (lambda: optim.GradScaler(growth_interval=2.5), "growth_interval wants a whole number, got 2.5"),
    (lambda: optim.GradScaler(enabled="no"), "enabled wants True or False, got 'no'"),
    (lambda: optim.GradScaler().step(0.1), "step wants an optimiser"),
    (lambda: optim.GradScaler().scale(1.0), "scale wants a Tensor"),
])
def test_a_value_of_a_wrong_kind_gets_one_clear_sentence(make, words):
    with pytest.raises(TypeError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


def started() -> Optimizer:
    return AdamW(0.1).start({"a": leaf(np.ones((2, 2)))})


def test_a_refused_state_changes_nothing():
    """A state that lacks a moment, has one too many, or counts steps below zero."""
    optimizer = started()
    state = {key: np.array(a) for key, a in optimizer.state_dict().items()}
    missing = {key: a for key, a in state.items() if key != "exp_avg_sq.a"}
    for wrong in (missing, state | {"exp_avg.b": np.ones(2)}, state | {"step": np.array(-1)}):
        with pytest.raises(ValueError, match="belongs to other tensors|step of an optimiser state wants"):
            optimizer.load_state_dict(wrong | {"exp_avg.a": np.ones((2, 2))})
        assert optimizer.t == 0
        assert not any(m.any() for m in all_moments(optimizer))


# ── kernels ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [0, 1, 7, (1 << 15) + 3])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_adam_kernel_agrees_with_its_definition(dtype, n, decay, rng):
    from tinyft.kernels.numpy import adam_update as kernel
    defined = [rng.standard_normal(n).astype(dtype) for _ in range(3)] + [rng.random(n).astype(dtype)]      # w, g, m, v
    fast = [a.copy() for a in defined]
    for t in (1, 2, 9):
        g = rng.standard_normal(n).astype(dtype)
        defined[1][...] = g
        fast[1][...] = g
        adam_update(*defined, 1e-2, 0.9, 0.99, 1e-8, decay, t)
        kernel(*fast, 1e-2, 0.9, 0.99, 1e-8, decay, t)
    tol = 1e-6 if dtype is np.float32 else 1e-13
    assert all(a.dtype == dtype and np.allclose(a, b, rtol=tol, atol=tol) for a, b in zip(defined, fast))
    if n > 1:
        adam_update(*defined, 1e-2, 0.9, 0.99, 1e-8, decay, 10)                  # a difference of one step is noticed
        assert not np.allclose(defined[0], fast[0], rtol=tol, atol=tol)


def test_training_uses_the_kernel_on_numpy_only():
    if array.backend() == "numpy":
        assert dispatch.find(adam_update, np.ndarray)
        with kernels.definitions():
            assert not dispatch.find(adam_update, np.ndarray)
    array_types = set()
    for (definition, array_type), registered in dispatch.KERNELS.items():
        if definition is adam_update and registered:
            array_types.add(array_type)
    assert array_types <= {np.ndarray} or array.backend() == "cupy"


@pytest.mark.skipif(array.backend() == "cupy", reason="there the CUDA kernel does this")
def test_a_kernel_for_all_tensors_comes_first_and_its_norm_is_checked_afterwards(monkeypatch):
    calls = []
    norms = [2.0, np.nan, np.nan]

    def kernel(optimizer: Optimizer, factor: float, clip: Any, loss: Any, scale: float) -> Any:
        calls.append((factor, clip, loss, scale))
        optimizer.t += 1
        return dev(np.array(norms.pop(0)))
    p = leaf(np.ones((2, 2)))
    monkeypatch.setitem(dispatch.KERNELS, (Optimizer.update_pieces, type(p.data)), [kernel])
    optimizer = AdamW(0.1).start({"p": p})
    assert float(optimizer.step(0.5, 3.0, scale=4.0)) == 2
    assert calls == [(0.5, 3.0, None, 4.0)]
    assert optimizer.t == 1
    with pytest.raises(FloatingPointError, match="norm is nan"):
        optimizer.step()
    assert optimizer.t == 1
    assert (host(p) == 1).all()
    monkeypatch.setattr(array, "recording", object())              # a captured step does not check its norm
    assert np.isnan(float(optimizer.step()))
    assert optimizer.t == 2


# ── schedules ────────────────────────────────────────────────────────────────────────────────────────────────────────
def factors(schedule: optim.Schedule, T: int) -> np.ndarray:
    return np.array([schedule(t, T) for t in range(T)])


def falls_after_a_warm_up(schedule: optim.Schedule, warmup: int, T: int, floor: float = 0.0) -> None:
    """The factor rises linearly to 1 during the warm-up, then falls strictly to just above the floor."""
    f = factors(schedule, T)
    assert np.allclose(f[:warmup], np.arange(1, warmup + 1) / max(warmup, 1))
    assert f[warmup] == 1
    assert (np.diff(f[warmup:]) < 0).all()
    assert floor < f[-1] < floor + 0.1
    assert schedule(T, T) == pytest.approx(floor)


@pytest.mark.parametrize("make", [linear_schedule, cosine_schedule])
def test_a_schedule_warms_up_falls_to_its_end_and_takes_fractions(make):
    falls_after_a_warm_up(make(warmup=10), 10, 100)
    falls_after_a_warm_up(make(warmup=0.25), 25, 100)
    falls_after_a_warm_up(make(), 0, 50)


@wrong_answers
@pytest.mark.parametrize("make", [linear_schedule, cosine_schedule])
@pytest.mark.parametrize("wrong", [
    lambda right, longer, t, T: right(t + 1, T),
    lambda right, longer, t, T: right(t, 2 * T),
    lambda right, longer, t, T: longer(t, T),
    lambda right, longer, t, T: 1.0,
    lambda right, longer, t, T: right(t, T) * 0.5,
], ids=["a step early", "half the way", "a longer warm-up", "constant", "half the size"])
def test_a_wrong_schedule_is_rejected(make, wrong):
    right = make(10)
    longer = make(11)

    def wrong_schedule(t: int, T: int) -> float:
        return wrong(right, longer, t, T)

    falls_after_a_warm_up(right, 10, 100)
    with pytest.raises(AssertionError):
        falls_after_a_warm_up(wrong_schedule, 10, 100)


def test_the_cosine_schedule_is_a_cosine_and_stops_at_its_floor():
    falls_after_a_warm_up(cosine_schedule(warmup=5, floor=0.1), 5, 100, 0.1)
    assert cosine_schedule()(50, 100) == pytest.approx(0.5)
    assert cosine_schedule()(25, 100) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert cosine_schedule(floor=0.2)(50, 100) == pytest.approx(0.6)
    assert linear_schedule()(25, 100) == pytest.approx(0.75)


def test_a_constant_schedule_is_one_after_its_warm_up():
    assert (factors(constant_schedule(), 7) == 1).all()
    assert np.allclose(factors(constant_schedule(4), 7), [0.25, 0.5, 0.75, 1, 1, 1, 1])
    assert (factors(constant_schedule(1), 7) == 1).all()
    assert (factors(constant_schedule(1.0), 7) == 1).all()         # one step, not all of them
    assert (factors(constant_schedule(100), 7) < 0.1).all()        # the run ends before the warm-up does


def test_a_schedule_is_printed_as_the_call_that_made_it():
    """Checkpoints hold this text, to recognise another schedule."""
    assert repr(cosine_schedule(20, floor=0.1)) == "cosine_schedule(warmup=20, floor=0.1)"
    assert repr(linear_schedule(0.25)) == "linear_schedule(warmup=0.25)"
    assert repr(constant_schedule()) == "constant_schedule(warmup=0)"
    assert cosine_schedule(warmup=4)(4, 4) == 0                    # the end of a run that is all warm-up

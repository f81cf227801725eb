"""Optimisers, clipping, groups, masks and schedules, against numbers worked by hand and against plain NumPy.

Each `agrees_*` is a check that must also refuse the wrong optimisers of the table WRONG.
"""
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from helpers import dev, host, leaf

from tinyft import (
    SGD,
    Adam,
    AdamW,
    array,
    constant_schedule,
    cosine_schedule,
    dispatch,
    kernels,
    linear_schedule,
    optim,
)
from tinyft.nn import Linear, Parameter
from tinyft.optim.optimizers import Optimizer, adam_update
from tinyft.tensor import Tensor


@pytest.fixture(autouse=True, params=[optim.optimizers.LARGE, 2], ids=["put together", "one by one"])
def _large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    "Every test twice: with its tensors updated together, as small ones are, and each where it lies, as large ones are."
    monkeypatch.setattr(optim.optimizers, "LARGE", request.param)


def drive(optimizer: Optimizer, named: dict[str, Tensor], gradients: list[dict], **step) -> dict[str, np.ndarray]:
    "Start, take one step per dict of gradients, and give back the values."
    optimizer.start(named)
    for grads in gradients:
        for n, p in named.items():
            p.grad = None if grads.get(n) is None else dev(grads[n], p.dtype)
        optimizer.step(**step)
    return {n: np.array(host(p)) for n, p in named.items()}


def scalar_path(optimizer: Optimizer, gradients: list[float], start: float = 1.0) -> list[float]:
    "The values one number passes through."
    p, out = leaf(np.array([[start]])), []
    optimizer.start({"w": p})
    for g in gradients:
        p.grad = dev(np.array([[g]]))
        optimizer.step()
        out.append(float(host(p)[0, 0]))
    return out


# ── the rules ────────────────────────────────────────────────────────────────────────────────────────────────────────
def agrees_with_adam_by_hand(make: type[Optimizer]) -> None:
    assert np.allclose(scalar_path(make(lr=0.1, weight_decay=0.0), [1, 1, -1]), [0.9, 0.8, 0.77380074], rtol=0, atol=1e-7)


def agrees_with_decoupled_decay(make: type[Optimizer]) -> None:
    "With no gradient to speak of, θ shrinks by 1 − ηλ a step and the moments stay empty; the rate factor scales the decay too."
    p = leaf(np.full((2, 3), 2.0))
    optimizer = make(lr=0.1, weight_decay=0.5)
    after = drive(optimizer, {"w": p}, [{"w": np.zeros((2, 3))}] * 3, factor=0.5)["w"]
    assert np.allclose(after, 2.0 * (1 - 0.1 * 0.5 * 0.5)**3, rtol=1e-12)
    assert all(not host(m).any() for g in optimizer.bound for m in g.moments)


class NoBiasCorrection(AdamW):
    def update(self, group, lr):
        adam_update(group.w, group.g, *group.moments, lr, *self.betas, self.eps, group.decay, 1)


class LateBiasCorrection(AdamW):
    def update(self, group, lr):
        adam_update(group.w, group.g, *group.moments, lr, *self.betas, self.eps, group.decay, self.t + 1)


class FreshMoments(AdamW):
    def update(self, group, lr):
        for m in group.moments:
            m[...] = 0
        super().update(group, lr)


class CoupledDecay(AdamW):
    def update(self, group, lr):
        group.g += group.decay * group.w
        adam_update(group.w, group.g, *group.moments, lr, *self.betas, self.eps, 0.0, self.t)


class UnscaledDecay(AdamW):
    def update(self, group, lr):
        group.w *= 1 - group.decay
        adam_update(group.w, group.g, *group.moments, lr, *self.betas, self.eps, 0.0, self.t)


WRONG = [(agrees_with_adam_by_hand, NoBiasCorrection), (agrees_with_adam_by_hand, LateBiasCorrection), (agrees_with_adam_by_hand, FreshMoments),
         (agrees_with_decoupled_decay, CoupledDecay), (agrees_with_decoupled_decay, UnscaledDecay), (agrees_with_decoupled_decay, Adam)]


@pytest.mark.parametrize("make", [Adam, AdamW])
def test_adam_takes_the_steps_worked_out_by_hand(make):
    agrees_with_adam_by_hand(make)


def test_adamw_decays_the_weight_and_not_the_gradient():
    agrees_with_decoupled_decay(AdamW)


@pytest.mark.parametrize("check, make", WRONG, ids=lambda v: v.__name__)
def test_a_wrong_adam_is_caught(check, make):
    with pytest.raises(AssertionError):
        check(make)


def test_sgd_with_momentum_and_decay_takes_the_steps_worked_out_by_hand():
    # u: 0.5 -> 0.5·0.5 + 0.5 = 0.75 -> 0.5·0.75 − 0.5 = −0.125
    assert np.allclose(scalar_path(SGD(lr=0.1, momentum=0.5), [0.5, 0.5, -0.5]), [0.95, 0.875, 0.8875], atol=1e-12)
    # g + λθ: 1 + 0.2·1 = 1.2 -> θ = 0.88;  u = 0.5·1.2 + 1 + 0.2·0.88 = 1.776 -> θ = 0.7024
    assert np.allclose(scalar_path(SGD(lr=0.1, momentum=0.5, weight_decay=0.2), [1, 1]), [0.88, 0.7024], atol=1e-12)


def test_adams_decay_is_part_of_the_gradient():
    # ε = 1, so that a gradient's size is seen:  g + λθ = 0.2 + 0.5·2 = 1.2;  m̂ = 1.2, √v̂ = 1.2 -> θ = 2 − 0.1·1.2/2.2
    assert np.allclose(scalar_path(Adam(lr=0.1, eps=1.0, weight_decay=0.5), [0.2], 2.0), [2 - 0.12 / 2.2], rtol=1e-12)


def test_what_is_not_asked_for_is_as_in_the_papers():
    assert np.allclose(scalar_path(SGD(0.1), [1, 1]), [0.9, 0.8]) and np.allclose(scalar_path(AdamW(0.1), [0]), [1 - 0.1 * 0.01])
    assert scalar_path(Adam(0.1), [0]) == [1] and AdamW(0.1).t == 0 and Optimizer(0.1).weight_decay == 0


def test_without_decay_adam_and_adamw_are_one_and_with_it_they_differ():
    grads = [1.0, 0.5, -2.0, 0.1]
    assert scalar_path(Adam(0.1), grads) == scalar_path(AdamW(0.1, weight_decay=0.0), grads)
    one, other = scalar_path(Adam(0.1, weight_decay=0.3), grads), scalar_path(AdamW(0.1, weight_decay=0.3), grads)
    assert np.abs(np.subtract(one, other)).min() > 1e-3


# ── which tensors decay, and at which rate ───────────────────────────────────────────────────────────────────────────
def a_few() -> dict[str, Tensor]:
    "One of each kind: a matrix, a bias, a norm, a soft prompt that says no, a vector that says yes."
    named = {"a.weight": leaf(np.ones((2, 3))), "a.bias": leaf(np.ones(3)), "norm.weight": leaf(np.ones(3)),
             "prompt.P": leaf(np.ones((4, 2))), "gate": leaf(np.ones(2))}
    named["norm.weight"].decay = named["prompt.P"].decay = False
    named["gate"].decay = True
    return named


def test_biases_norms_and_prompts_do_not_decay_and_what_asks_for_decay_does():
    named = a_few()
    after = drive(AdamW(0.1, weight_decay=0.5), named, [{n: np.zeros(p.shape) for n, p in named.items()}])
    assert {n: float(v.ravel()[0]) for n, v in after.items()} == pytest.approx(
        {"a.weight": 0.95, "a.bias": 1.0, "norm.weight": 1.0, "prompt.P": 1.0, "gate": 0.95})


def test_a_group_sets_rate_and_decay_and_the_first_that_matches_wins():
    named = a_few()
    groups = {"a.*": {"lr": 0.3}, "a.weight": {"lr": 9.0}, "gate": {"weight_decay": 0.0}}
    after = drive(SGD(0.1, weight_decay=0.5, groups=groups), named, [{n: np.ones(p.shape) for n, p in named.items()}])
    assert {n: float(v.ravel()[0]) for n, v in after.items()} == pytest.approx(
        {"a.weight": 1 - 0.3 * 1.5, "a.bias": 0.7, "norm.weight": 0.9, "prompt.P": 0.9, "gate": 0.9})


def test_a_group_that_holds_nothing_or_sets_something_else_is_an_error():
    with pytest.raises(LookupError, match=r"'b\.\*' holds no tensor"):
        SGD(0.1, groups={"b.*": {"lr": 1.0}}).start(a_few())
    with pytest.raises(ValueError, match="sets momentum"):
        SGD(0.1, groups={"a.*": {"momentum": 1.0}})


# ── masks, and tensors without a gradient ────────────────────────────────────────────────────────────────────────────
OPTIMIZERS = [lambda: SGD(0.1, momentum=0.9, weight_decay=0.1), lambda: Adam(0.1, weight_decay=0.1), lambda: AdamW(0.1, weight_decay=0.1)]


@pytest.mark.parametrize("make", OPTIMIZERS, ids=["sgd", "adam", "adamw"])
def test_a_mask_holds_value_and_moments_where_it_is_false(make, rng):
    start, mask = rng.standard_normal((3, 4)), np.array([[True], [False], [True]])
    grads = [{"w": rng.standard_normal((3, 4))} for _ in range(6)]
    p, free = leaf(start), leaf(start)
    optimizer = make().start({"w": p})
    for i, g in enumerate(grads):                                                # free for three steps, so that there are moments to keep
        p.mask = dev(mask) if i >= 3 else None
        p.grad = dev(g["w"])
        if i == 3:
            before, moments = np.array(host(p)), [np.array(host(m)).reshape(3, 4) for m in optimizer.bound[0].moments]
        optimizer.step()
    unmasked = drive(make(), {"w": free}, grads)["w"]
    held = ~mask[:, 0]
    assert np.array_equal(host(p)[held], before[held])
    assert all(np.array_equal(host(m).reshape(3, 4)[held], was[held]) for m, was in zip(optimizer.bound[0].moments, moments))
    assert np.allclose(host(p)[~held], unmasked[~held], rtol=1e-12)              # the others move as ever
    assert np.abs(unmasked[held] - before[held]).min() > 1e-3                    # and without a mask these would have, too


@pytest.mark.parametrize("make", OPTIMIZERS, ids=["sgd", "adam", "adamw"])
def test_a_tensor_without_a_gradient_keeps_value_and_moments(make, rng):
    named = {n: leaf(rng.standard_normal((2, 2))) for n in "ab"}
    optimizer = make()
    first = drive(optimizer, named, [{n: rng.standard_normal((2, 2)) for n in "ab"}])
    moments = [np.array(host(m)) for m in optimizer.bound[0].moments]
    named["a"].grad, named["b"].grad, named["a"].mask = None, dev(np.ones((2, 2))), dev(np.ones((2, 2), bool))
    assert float(optimizer.step()) == 2                                          # it counts for nothing in the norm
    assert np.array_equal(host(named["a"]), first["a"]) and not np.array_equal(host(named["b"]), first["b"])
    for m, was in zip(optimizer.bound[0].moments, moments):
        assert np.array_equal(host(m)[:4], was[:4]) and not np.array_equal(host(m)[4:], was[4:])


# ── clipping ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def clipped(step, grads: dict[str, np.ndarray], clip: float | None) -> dict[str, np.ndarray]:
    "By how much plain SGD moved each of several tensors, which lie in two groups."
    named = {n: leaf(np.zeros(g.shape)) for n, g in grads.items()}
    optimizer = SGD(1.0, groups={"b": {"lr": 1.0, "weight_decay": 0.1}}).start(named)
    for n, p in named.items():
        p.grad = dev(grads[n])
    norm = step(optimizer, clip)
    return {n: -host(p) for n, p in named.items()} | {"norm": np.array(float(norm))}


def clips_all_together(step) -> None:
    grads = {"a": np.array([[3.0, 0.0]]), "b": np.array([[0.0, 4.0]]), "c": np.array([12.0])}      # norm 13, over two groups
    for clip, scale in ((6.5, 0.5), (1.3, 0.1), (20.0, 1.0), (None, 1.0)):
        moved = clipped(step, grads, clip)
        assert float(moved["norm"]) == pytest.approx(13)
        assert all(np.allclose(moved[n], scale * g, rtol=1e-6) for n, g in grads.items())


def each_tensor_for_itself(optimizer: Optimizer, clip: float | None) -> float:
    for p in (p for g in optimizer.bound for p in g.tensors):
        p.grad = p.grad * min(1.0, 1.0 if clip is None else clip / float(np.linalg.norm(host(p.grad))))
    optimizer.step()
    return 13.0


def only_the_first_group(optimizer: Optimizer, clip: float | None) -> float:
    norm = np.linalg.norm(np.concatenate([host(p.grad).ravel() for p in optimizer.bound[0].tensors]))
    for p in (p for g in optimizer.bound for p in g.tensors):
        p.grad = p.grad * min(1.0, 1.0 if clip is None else clip / float(norm))
    optimizer.step()
    return 13.0


def always_to_the_norm(optimizer: Optimizer, clip: float | None) -> float:
    for p in (p for g in optimizer.bound for p in g.tensors):
        p.grad = p.grad * (1.0 if clip is None else clip / 13)
    optimizer.step()
    return 13.0


def test_clipping_scales_all_gradients_by_one_number_from_the_norm_of_them_all():
    clips_all_together(lambda optimizer, clip: optimizer.step(clip=clip))


@pytest.mark.parametrize("wrong", [each_tensor_for_itself, only_the_first_group, always_to_the_norm], ids=lambda f: f.__name__)
def test_wrong_clipping_is_caught(wrong):
    with pytest.raises(AssertionError):
        clips_all_together(wrong)


def test_the_smallest_gradients_are_clipped_as_torch_does_it():
    "clip / (norm + 1e-6): with a norm and a clip of 1e-6, a half."
    assert np.allclose(clipped(lambda o, clip: o.step(clip=clip), {"a": np.array([[1e-6]]), "b": np.zeros((1, 1))}, 1e-6)["a"], 0.5e-6, rtol=1e-9)


def test_what_a_mask_holds_does_not_count_in_the_norm():
    p = leaf(np.zeros((2, 1)))
    p.mask, p.grad = dev(np.array([[True], [False]])), dev(np.array([[3.0], [1e6]]))
    norm = SGD(1.0).start({"w": p}).step(clip=1.5)
    assert float(norm) == pytest.approx(3) and np.allclose(host(p), [[-1.5], [0.0]], rtol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_updates_nothing(bad):
    p = leaf(np.ones((1, 2)))
    optimizer = AdamW(0.1).start({"w": p})
    p.grad = dev(np.array([[1.0, bad]]))
    with pytest.raises(FloatingPointError, match="norm is (nan|inf)"):
        optimizer.step(clip=1.0)
    assert np.array_equal(host(p), np.ones((1, 2))) and optimizer.t == 0 and not any(host(m).any() for m in optimizer.bound[0].moments)


# ── flat buffers ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_tensors_become_views_of_one_buffer_with_twice_as_many_numbers_of_state(rng):
    named = {n: leaf(rng.standard_normal(s), np.float32) for n, s in {"a": (3, 4), "b": (2, 2), "c": (5,)}.items()}
    before = {n: np.array(host(p)) for n, p in named.items()}
    optimizer = AdamW(0.1).start(named)
    assert sum(m.size for g in optimizer.bound for m in g.moments) == 2 * (12 + 4 + 5) and len(optimizer.bound) == 2      # c does not decay
    assert all(np.array_equal(host(p), before[n]) for n, p in named.items())
    for g in optimizer.bound:
        g.w[...] = 7
    assert all((host(p) == 7).all() and p.data.base is not None for p in named.values())


def test_data_replaced_from_outside_is_taken_back_into_the_buffer():
    p = leaf(np.ones((2, 2)))
    optimizer = SGD(1.0).start({"w": p})
    p.data = dev(np.full((2, 2), 5.0))
    p.grad = dev(np.ones((2, 2)))
    optimizer.step()
    assert (host(p) == 4).all() and (host(optimizer.bound[0].w) == 4).all()


ELSEWHERE = "strict" if array.backend() == "numpy" else "numpy"


@pytest.mark.parametrize("make", [lambda: AdamW(0.1), lambda: SGD(0.1, momentum=0.9)], ids=["AdamW", "SGD"])
def test_an_optimiser_follows_a_model_that_moved_with_its_moments_and_masks(make, rng, monkeypatch):
    start, g = rng.standard_normal((3, 4)).astype(np.float32), rng.standard_normal((4, 3, 4)).astype(np.float32)

    def steps(route: list[str]) -> list:
        "A step on each of these backends, in one life of model and optimiser."
        layer = Linear(4, 3, rng=np.random.default_rng(0))
        layer.weight.copy_(start)
        layer.weight.mask = dev(start > 0)
        optimizer, out = make().start(layer.named_parameters()), []
        for backend, gradient in zip(route, g):
            layer.to(backend)
            layer.weight.grad, layer.bias.grad = (array.to(dev(a), backend) for a in (gradient, gradient[:, 0]))
            optimizer.step()
            assert {layer.weight.device, *(array.name_of(a) for b in optimizer.bound for a in (b.w, *b.moments))} == {backend}
            out += [np.array(host(layer.weight)), np.array(host(layer.bias)), *(np.array(a) for a in optimizer.state().values())]
        return out
    here, close = array.backend(), lambda a, b: all(np.allclose(x, y, rtol=1e-6, atol=1e-7) for x, y in zip(a, b))
    want = steps([here] * 4)
    assert close(steps([here, ELSEWHERE, ELSEWHERE, here]), want) and not np.array_equal(want[0], start)
    right = optim.optimizers.Group.follow

    def forgets(self: optim.optimizers.Group) -> None:
        right(self)
        for a in self.moments:
            a[...] = 0
    monkeypatch.setattr(optim.optimizers.Group, "follow", forgets)
    assert not close(steps([here, ELSEWHERE, ELSEWHERE, here]), want)


def test_an_optimiser_whose_tensors_are_in_two_places_or_of_another_dtype_says_so():
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


def test_a_step_spoils_a_graph_that_still_needs_the_old_weights():
    p = leaf(np.ones((2, 2)))
    optimizer = SGD(1.0).start({"w": p})
    y = (p * p).sum()
    p.grad = dev(np.ones((2, 2)))
    optimizer.step()
    with pytest.raises(RuntimeError, match="written in place"):
        y.backward()


def test_tensors_of_two_dtypes_train_side_by_side():
    named = {"a": leaf(np.ones((1, 2)), np.float32), "b": leaf(np.ones((1, 2)), np.float64)}
    after = drive(AdamW(0.1, weight_decay=0), named, [{"a": np.ones((1, 2)), "b": np.ones((1, 2))}], clip=1.0)
    assert after["a"].dtype == np.float32 and after["b"].dtype == np.float64 and np.allclose(after["a"], after["b"]) and np.allclose(after["b"], 0.9)


# ── saving and loading ───────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("make", OPTIMIZERS, ids=["sgd", "adam", "adamw"])
def test_an_optimiser_loaded_half_way_goes_on_bitwise(make, rng):
    shapes = {"a": (3, 2), "b": (4,)}
    start, grads = {n: rng.standard_normal(s) for n, s in shapes.items()}, [{n: rng.standard_normal(s) for n, s in shapes.items()} for _ in range(6)]
    fresh = lambda values: {n: leaf(v) for n, v in values.items()}
    straight = drive(make(), fresh(start), grads, clip=1.0)
    one = make()
    half = drive(one, fresh(start), grads[:3], clip=1.0)
    kept = {k: np.array(v) for k, v in one.state().items()}

    def go_on(load: bool) -> dict[str, np.ndarray]:
        named, other = fresh(half), make()
        other.start(named)
        if load:
            other.load(kept)
        for g in grads[3:]:
            for n, p in named.items():
                p.grad = dev(g[n])
            other.step(clip=1.0)
        return {n: host(p) for n, p in named.items()}
    assert all(np.array_equal(v, straight[n]) for n, v in go_on(True).items())
    assert not any(np.array_equal(v, straight[n]) for n, v in go_on(False).items())


def test_the_state_of_another_optimiser_is_refused_and_nothing_changes():
    optimizer = AdamW(0.1).start({"w": leaf(np.ones((2, 2)))})
    for other in (SGD(0.1).start({"w": leaf(np.ones((2, 2)))}), AdamW(0.1).start({"w": leaf(np.ones((2, 3)))})):
        with pytest.raises(ValueError, match="belongs to other tensors"):
            optimizer.load(other.state())
    assert optimizer.t == 0


@pytest.mark.parametrize("make, words", [
    (lambda: AdamW(lr=0), "lr > 0"), (lambda: AdamW(lr=-1), "lr > 0"), (lambda: AdamW(lr=math.nan), "lr > 0"),
    (lambda: SGD(lr=0.1, weight_decay=-0.1), "weight_decay >= 0"), (lambda: AdamW(0.1).start({}), "nothing trains"),
    (lambda: AdamW(0.1).step(), "was not started")])
def test_bad_input_gets_one_clear_sentence(make, words):
    with pytest.raises((ValueError, RuntimeError), match=words):
        make()


# ── the kernel ───────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [0, 1, 7, (1 << 15) + 3])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_adam_kernel_is_its_definition(dtype, n, decay, rng):
    from tinyft.kernels.numpy import adam_update as fast
    one = [rng.standard_normal(n).astype(dtype) for _ in range(3)] + [rng.random(n).astype(dtype)]
    two = [a.copy() for a in one]
    for t in (1, 2, 9):
        g = rng.standard_normal(n).astype(dtype)
        one[1][...] = two[1][...] = g
        adam_update(*one, 1e-2, 0.9, 0.99, 1e-8, decay, t)
        fast(*two, 1e-2, 0.9, 0.99, 1e-8, decay, t)
    tol = 1e-6 if dtype is np.float32 else 1e-13
    assert all(a.dtype == dtype and np.allclose(a, b, rtol=tol, atol=tol) for a, b in zip(one, two))
    if n > 1:
        adam_update(*one, 1e-2, 0.9, 0.99, 1e-8, decay, 10)                      # one step apart is seen
        assert not np.allclose(one[0], two[0], rtol=tol, atol=tol)


def test_training_uses_the_kernel_on_numpy_only():
    if array.backend() == "numpy":
        assert dispatch.find(optim.optimizers.adam_update, np.ndarray)
        with kernels.definitions():
            assert not dispatch.find(optim.optimizers.adam_update, np.ndarray)
    kinds = {kind for (f, kind), found in dispatch.KERNELS.items() if found and f is optim.optimizers.adam_update}
    assert kinds <= {np.ndarray} or array.backend() == "cupy"


# ── schedules ────────────────────────────────────────────────────────────────────────────────────────────────────────
def path(schedule, T: int) -> np.ndarray:
    return np.array([schedule(t, T) for t in range(T)])


def falls_after_a_warm_up(schedule, warm: int, T: int, floor: float = 0.0) -> None:
    "Rises in a straight line to 1 over the warm-up, then falls without a break to just above the floor."
    f = path(schedule, T)
    assert np.allclose(f[:warm], np.arange(1, warm + 1) / max(warm, 1)) and f[warm] == 1
    assert (np.diff(f[warm:]) < 0).all() and floor < f[-1] < floor + 0.1 and schedule(T, T) == pytest.approx(floor)


@pytest.mark.parametrize("make", [linear_schedule, cosine_schedule])
def test_a_schedule_warms_up_falls_all_the_way_and_reads_shares(make):
    falls_after_a_warm_up(make(warmup=10), 10, 100)
    falls_after_a_warm_up(make(warmup=0.25), 25, 100)
    falls_after_a_warm_up(make(), 0, 50)
    for wrong in (lambda t, T: make(10)(t + 1, T), lambda t, T: make(10)(t, 2 * T), lambda t, T: make(11)(t, T), lambda t, T: 1.0,
                  lambda t, T: make(10)(t, T) * 0.5):
        with pytest.raises(AssertionError):
            falls_after_a_warm_up(wrong, 10, 100)


def test_the_cosine_is_a_cosine_and_stops_at_its_floor():
    falls_after_a_warm_up(cosine_schedule(warmup=5, floor=0.1), 5, 100, 0.1)
    assert cosine_schedule()(50, 100) == pytest.approx(0.5) and cosine_schedule()(25, 100) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert cosine_schedule(floor=0.2)(50, 100) == pytest.approx(0.6) and linear_schedule()(25, 100) == pytest.approx(0.75)


def test_a_constant_schedule_is_one_after_its_warm_up():
    assert (path(constant_schedule(), 7) == 1).all() and np.allclose(path(constant_schedule(4), 7), [0.25, 0.5, 0.75, 1, 1, 1, 1])
    assert (path(constant_schedule(1), 7) == 1).all() and (path(constant_schedule(1.0), 7) == 1).all()      # one step, not all of them
    assert (path(constant_schedule(100), 7) < 0.1).all()                                  # stopped before the warm-up ended


# ── small and large ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_tensor_of_exactly_the_limit_is_small(monkeypatch):
    monkeypatch.setattr(optim.optimizers, "LARGE", 6)
    a, b, c = leaf(np.ones((2, 3))), leaf(np.ones((1, 2))), leaf(np.ones((4, 2)))
    optimizer = AdamW(0.1, weight_decay=0.5).start({"c": c, "a": a, "b": b})
    assert optimizer.bound[0].names == ["a", "b", "c"]
    for p in (a, b, c):
        p.grad = dev(np.ones(p.shape))
    optimizer.step()
    assert all((host(p) < 1).all() for p in (a, b, c))
    a.grad, before = None, np.array(host(a))
    optimizer.step()
    assert np.array_equal(host(a), before) and (host(b) < before[0, 0]).all()       # no gradient: neither decay nor moments move it


def test_a_held_tensor_keeps_its_gradient_and_a_free_one_has_it_clipped():
    p, q = leaf(np.ones((2, 2))), leaf(np.ones((2, 2)))
    p.mask = dev(np.array([[True, False], [True, True]]))
    optimizer = SGD(0.1).start({"p": p, "q": q})
    p.grad, q.grad = dev(np.full((2, 2), 3.0)), dev(np.full((2, 2), 4.0))
    norm = float(optimizer.step(clip=1.0))
    assert norm == pytest.approx((3 * 9 + 4 * 16)**0.5) and np.array_equal(host(p.grad), np.full((2, 2), 3.0))
    assert np.allclose(host(q.grad), 4 / norm)


def test_another_array_in_a_tensor_is_taken_back_and_the_flat_one_stays():
    p = leaf(np.ones((2, 2)))
    optimizer = SGD(0.5).start({"p": p})
    flat = optimizer.bound[0].w
    p.data, p.grad = dev(np.full((2, 2), 3.0)), dev(np.ones((2, 2)))
    optimizer.step()
    assert optimizer.bound[0].w is flat and p.data is optimizer.bound[0].views[0] and (host(p) == 2.5).all()


def test_advance_is_a_step_at_the_full_rate_without_clipping_or_scale():
    a, b = leaf(np.ones((2, 2))), leaf(np.ones((2, 2)))
    one, two = SGD(0.5).start({"a": a}), SGD(0.5).start({"b": b})
    a.grad = b.grad = dev(np.full((2, 2), 7.0))
    assert float(one.advance()) == float(two.step()) == 14 and np.array_equal(host(a), host(b)) and (host(a) == -2.5).all()


@pytest.mark.skipif(array.backend() == "cupy", reason="there the kernels do this")
def test_who_updates_all_at_once_is_asked_first_and_settled_after(monkeypatch):
    p, asked = leaf(np.ones((2, 2))), []

    def at_once(opt: Optimizer, factor: float, clip: Any, loss: Any, scale: float) -> Any:
        asked.append((factor, clip, loss, scale))
        opt.t += 1
        return dev(np.array(norms.pop(0)))
    monkeypatch.setitem(dispatch.KERNELS, (Optimizer.one_by_one, type(p.data)), [at_once])
    optimizer, norms = AdamW(0.1).start({"p": p}), [2.0, np.nan, np.nan]
    assert float(optimizer.step(0.5, 3.0, scale=4.0)) == 2 and asked == [(0.5, 3.0, None, 4.0)] and optimizer.t == 1
    with pytest.raises(FloatingPointError, match="norm is nan"):
        optimizer.step()
    assert optimizer.t == 1 and (host(p) == 1).all()
    monkeypatch.setattr(array, "recording", object())                            # a captured step does not wait: whoever reads the norm settles
    assert np.isnan(float(optimizer.step())) and optimizer.t == 2

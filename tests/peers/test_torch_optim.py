"""Fifty steps of SGD, Adam and AdamW beside torch.optim, with random gradients and weight decay."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import dev, host, leaf

from tinyft import SGD, Adam, AdamW
from tinyft.optim import Optimizer

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make test-peers installs it")
pytestmark = pytest.mark.peers

Maker = Callable[[], Optimizer]
TorchMaker = Callable[[Any], Any]

# {name: (our optimiser, parameters -> PyTorch's)}
CASES: dict[str, tuple[Maker, TorchMaker]] = {
    "sgd": (
        lambda: SGD(0.05, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1)),
    "sgd-momentum": (
        lambda: SGD(0.05, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1)),
    "adam": (
        lambda: Adam(0.01, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1)),
    "adamw": (
        lambda: AdamW(0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)),
}


def largest_difference(ours: Maker, theirs: TorchMaker, clip: float | None, factor: float = 1.0) -> float:
    """The largest difference between a weight of ours and PyTorch's in 50 steps over two matrices.

    Both start from the same matrices and get the same random gradients.  clip: the largest norm of the gradients, or
    None; the norms must agree too.  factor: on the learning rate.
    """
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 3), "b": (2, 5)}
    start = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    mine = {name: leaf(v.copy()) for name, v in start.items()}
    other = {name: torch.nn.Parameter(torch.tensor(v)) for name, v in start.items()}
    my_optimizer = ours().start(mine)
    torch_optimizer = theirs(other.values())
    for group in torch_optimizer.param_groups:
        group["lr"] *= factor
    worst = 0.0
    for _ in range(50):
        for name in start:
            g = rng.standard_normal(start[name].shape).astype(np.float32)
            mine[name].grad = dev(g)
            other[name].grad = torch.tensor(g)
        norm = my_optimizer.step(factor, clip=clip)
        if clip:
            torch_norm = torch.nn.utils.clip_grad_norm_(other.values(), clip)
            assert float(norm) == pytest.approx(float(torch_norm), rel=1e-5)
        torch_optimizer.step()
        for name in start:
            difference = np.abs(host(mine[name]) - other[name].detach().numpy()).max()
            worst = max(worst, float(difference))
    return worst


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_fifty_steps_agree_with_torch(name, clip):
    ours, theirs = CASES[name]                                         # weights are about 1, in float32
    assert largest_difference(ours, theirs, clip) < 1e-6
    assert largest_difference(ours, theirs, clip, factor=0.3) < 1e-6


def test_the_comparison_tells_the_optimisers_apart():
    names = list(CASES)                                                # ours beside the next optimiser of PyTorch
    for name, next_name in zip(names, names[1:] + names[:1]):
        assert largest_difference(CASES[name][0], CASES[next_name][1], None) > 1e-3


@pytest.mark.parametrize("name", ["sgd-momentum", "adam", "adamw"])
def test_the_state_has_the_values_of_torch_and_its_names_with_the_tensor_added(name):
    rng = np.random.default_rng(0)
    start = rng.standard_normal((4, 3)).astype(np.float32)
    mine = leaf(start.copy())
    other = torch.nn.Parameter(torch.tensor(start))
    my_optimizer = CASES[name][0]().start({"w": mine})
    torch_optimizer = CASES[name][1]([other])
    for _ in range(3):
        g = rng.standard_normal(start.shape).astype(np.float32)
        mine.grad = dev(g)
        other.grad = torch.tensor(g)
        my_optimizer.step()
        torch_optimizer.step()
    state = my_optimizer.state_dict()
    torch_state = dict(torch_optimizer.state_dict()["state"][0])
    if name == "sgd-momentum":
        # PyTorch's SGD has another name for the momentum, and does not count its steps.
        torch_state = {"momentum": torch_state["momentum_buffer"], "step": 3}
    steps = torch_state.pop("step")
    expected = {f"{kind}.w": value for kind, value in torch_state.items()} | {"step": steps}
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert np.allclose(state[key], np.asarray(value), rtol=1e-6, atol=1e-7)

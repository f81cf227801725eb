"""Fifty steps of SGD, Adam and AdamW beside torch.optim, with random gradients and weight decay."""
from __future__ import annotations

import numpy as np
import pytest
from helpers import dev, host, leaf

from tinyft import SGD, Adam, AdamW

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make test-peers installs it")
pytestmark = pytest.mark.peers

CASES = {
    "sgd": (lambda: SGD(0.05, weight_decay=0.1), lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1)),
    "sgd-momentum": (lambda: SGD(0.05, momentum=0.9, weight_decay=0.1), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1)),
    "adam": (lambda: Adam(0.01, weight_decay=0.1), lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1)),
    "adamw": (lambda: AdamW(0.01, (0.8, 0.95), 1e-6, 0.1), lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)),
}


def apart(ours, theirs, clip: float | None, factor: float = 1.0) -> float:
    "The largest difference in 50 steps over two matrices."
    rng, worst = np.random.default_rng(0), 0.0
    start = {n: rng.standard_normal(s).astype(np.float32) for n, s in {"a": (4, 3), "b": (2, 5)}.items()}
    mine, other = {n: leaf(v.copy()) for n, v in start.items()}, {n: torch.nn.Parameter(torch.tensor(v)) for n, v in start.items()}
    one, two = ours().start(mine), theirs(other.values())
    for group in two.param_groups:
        group["lr"] *= factor
    for _ in range(50):
        for n in start:
            g = rng.standard_normal(start[n].shape).astype(np.float32)
            mine[n].grad, other[n].grad = dev(g), torch.tensor(g)
        norm = one.step(factor, clip=clip)
        if clip:
            assert float(norm) == pytest.approx(float(torch.nn.utils.clip_grad_norm_(other.values(), clip)), rel=1e-5)
        two.step()
        worst = max(worst, *(float(np.abs(host(mine[n]) - other[n].detach().numpy()).max()) for n in start))
    return worst


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_fifty_steps_are_those_of_torch(name, clip):
    ours, theirs = CASES[name]
    assert apart(ours, theirs, clip) < 1e-6
    assert apart(ours, theirs, clip, factor=0.3) < 1e-6


def test_the_comparison_tells_the_rules_apart():
    names = list(CASES)
    for one, other in zip(names, names[1:] + names[:1]):
        assert apart(CASES[one][0], CASES[other][1], None) > 1e-3

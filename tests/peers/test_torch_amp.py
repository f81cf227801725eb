"""torch.amp beside precision.py and scaler.py.

GradScaler has the same scale after every step, and a pass under autocast makes errors of the same size.
"""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import dev, host, leaf

import tinyft as ft
from tinyft import AdamW, GradScaler, ops

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make test-peers installs it")
pytestmark = pytest.mark.peers


# ── the scale ────────────────────────────────────────────────────────────────────────────────────────────────────────
def largest_difference(scaler_class: Any, overflows: list[int], **options: Any) -> float:
    """The largest difference of the scale (relative) or of a weight.  Steps overflow where `overflows` is 1."""
    rng = np.random.default_rng(0)
    start = np.linspace(-1, 1, 6).astype(np.float32)
    p = leaf(start.copy())
    q = torch.nn.Parameter(torch.tensor(start))
    optimizer = AdamW(0.05).start({"p": p})
    torch_optimizer = torch.optim.AdamW([q], lr=0.05, weight_decay=0.0)
    scaler = scaler_class(**options)
    torch_scaler = torch.amp.GradScaler("cpu", **options)
    worst = 0.0
    for overflow in overflows:
        g = rng.standard_normal(6).astype(np.float32)
        scaler.scale((p * dev(g)).sum()).backward()
        torch_scaler.scale((q * torch.tensor(g)).sum()).backward()
        if overflow:
            p.grad[2] = np.inf
            q.grad[2] = np.inf
        scaler.step(optimizer, clip=2.5)
        torch_scaler.unscale_(torch_optimizer)
        torch.nn.utils.clip_grad_norm_([q], 2.5)                           # of norms from 1.5 to 4
        torch_scaler.step(torch_optimizer)
        scaler.update()
        torch_scaler.update()
        optimizer.zero_grad()
        torch_optimizer.zero_grad()
        of_scale = abs(scaler.get_scale() / torch_scaler.get_scale() - 1)
        of_weights = float(np.abs(host(p) - q.detach().numpy()).max())
        worst = max(worst, of_scale, of_weights)
    return worst


OVERFLOWS = [1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]
OPTIONS = [
    {"init_scale": 2.0**10, "growth_interval": 3},
    {"init_scale": 64.0, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_scale_and_the_weights_are_those_of_torch(options):
    assert largest_difference(GradScaler, OVERFLOWS, **options) < 1e-6


class KeepsCounting(GradScaler):
    """Wrong: a skipped step does not reset the count of good steps."""
    def update(self):
        good = self.good_steps
        super().update()
        self.good_steps = self.good_steps if self.finite else good


class NeverDivides(GradScaler):
    """Wrong: the gradients keep the scale."""
    def step(self, optimizer, factor=1.0, clip=None):
        with self.skipping():
            return optimizer.step(factor, clip)


@pytest.mark.parametrize("wrong", [KeepsCounting, NeverDivides])
def test_a_scaler_unlike_that_of_torch_is_noticed(wrong):
    assert largest_difference(wrong, OVERFLOWS, **OPTIONS[0]) > 1e-4


# ── autocast ─────────────────────────────────────────────────────────────────────────────────────────────────────────
Results = dict[str, np.ndarray]


def both_passes(dtype: str, *, enabled: bool) -> tuple[Results, Results]:
    """Logits, loss and the gradients of all parameters of one GPT: of tinyft, and of the same model in PyTorch."""
    model = ft.GPT(ft.GPTConfig(50, 24, 32, 2, 4), seed=3)
    rng = np.random.default_rng(1)
    for p in model.parameters():
        p.copy_(host(p) + rng.standard_normal(p.shape).astype(np.float32) * 0.1)
    ids, labels = rng.integers(0, 50, (2, 4, 20))
    parameters = model.named_parameters()
    W = {n: torch.nn.Parameter(torch.tensor(np.array(host(p)))) for n, p in parameters.items()}
    with ft.autocast(dtype, enabled=enabled):
        logits = model(ids)
        loss = ops.cross_entropy(logits, dev(labels))
    loss.backward()
    ours = {n: host(p.grad) for n, p in parameters.items()}
    ours |= {"logits": host(logits).astype(np.float32), "loss": host(loss)}
    with torch.autocast("cpu", getattr(torch, dtype), enabled=enabled):
        torch_logits = torch_gpt(W, torch.tensor(ids))
        torch_loss = torch.nn.functional.cross_entropy(
            torch_logits.flatten(0, 1).float(), torch.tensor(labels).flatten(),
        )
    torch_loss.backward()
    theirs = {n: p.grad.numpy() for n, p in W.items()}
    theirs |= {"logits": torch_logits.detach().float().numpy(), "loss": torch_loss.detach().numpy()}
    return ours, theirs


def torch_gpt(W: dict, ids: Any) -> Any:
    """The logits of GPT-2 in PyTorch's functions, from weights with the names of tinyft."""
    F = torch.nn.functional
    B, T = ids.shape

    def norm(name: str, x: Any) -> Any:
        return F.layer_norm(x, x.shape[-1:], W[f"{name}.weight"], W[f"{name}.bias"], 1e-5)

    def linear(name: str, x: Any) -> Any:
        return F.linear(x, W[f"{name}.weight"], W[f"{name}.bias"])

    x = W["embed.weight"][ids] + W["pos.weight"][:T]
    is_future = torch.ones(T, T).triu(1).bool()
    for i in range(2):
        block = f"blocks.{i}"
        h = norm(f"{block}.norm1", x)
        q, k, v = (linear(f"{block}.attn.{n}", h).reshape(B, T, 4, 8).transpose(1, 2) for n in "qkv")
        scores = (q @ k.transpose(-1, -2)).float() * 8**-0.5
        p = scores.masked_fill(is_future, -torch.inf).softmax(-1)
        x = x + linear(f"{block}.attn.o", (p @ v).transpose(1, 2).reshape(B, T, -1))
        h = linear(f"{block}.mlp.up", norm(f"{block}.norm2", x))
        x = x + linear(f"{block}.mlp.down", F.gelu(h, approximate="tanh"))
    return F.linear(norm("norm", x), W["embed.weight"])


def errors(dtype: str) -> dict[str, tuple[float, float]]:
    """{result: (error of tinyft, error of torch)}: the distance from the float32 result, relative to its norm."""
    ours_exact, theirs_exact = both_passes(dtype, enabled=False)
    for name, exact in theirs_exact.items():
        assert np.abs(ours_exact[name] - exact).max() < 2e-5 * max(1, np.abs(exact).max()), "the models differ"
    ours, theirs = both_passes(dtype, enabled=True)
    found = {}
    for name, exact in ours_exact.items():
        if "k.bias" not in name:                                           # its gradient is zero
            found[name] = (relative(ours[name], exact), relative(theirs[name], theirs_exact[name]))
    return found


def relative(a: np.ndarray, exact: np.ndarray) -> float:
    """‖a − exact‖ / ‖exact‖."""
    return float(np.linalg.norm(a - exact)) / float(np.linalg.norm(exact))


@pytest.mark.parametrize("dtype, ulp", [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_autocast_rounds_as_much_as_torch(dtype, ulp):
    found = errors(dtype)
    loss, _ = found.pop("loss")
    assert loss < ulp
    for name, (ours, theirs) in found.items():
        assert 0.3 * theirs < ours < 1.5 * theirs, (name, ours, theirs)
        assert 0.4 * ulp < ours < 4 * ulp, (name, ours)
    assert 0.8 < total_ratio(found) < 1.15


def total_ratio(found: dict[str, tuple[float, float]]) -> float:
    """The sum of the errors of tinyft over that of torch."""
    return sum(ours for ours, _ in found.values()) / sum(theirs for _, theirs in found.values())


def test_a_residual_stream_in_16_bits_is_noticed(monkeypatch):
    monkeypatch.setattr(ft.precision, "PRODUCTS", ft.precision.PRODUCTS | {"layer_norm", "add", "embedding"})
    assert total_ratio(errors("bfloat16")) > 1.2

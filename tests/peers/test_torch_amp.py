"""torch.amp beside precision.py and scaler.py: GradScaler's S step by step, and a pass under autocast that rounds as much as theirs."""
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
def apart(ours: Any, pattern: list[int], **how: Any) -> float:
    """The largest difference of S and of a weight, over steps that overflow where the pattern says 1."""
    rng, start, worst = np.random.default_rng(0), np.linspace(-1, 1, 6).astype(np.float32), 0.0
    p, q = leaf(start.copy()), torch.nn.Parameter(torch.tensor(start))
    mine, other = AdamW(0.05).start({"p": p}), torch.optim.AdamW([q], lr=0.05, weight_decay=0.0)
    one, two = ours(**how), torch.amp.GradScaler("cpu", **how)
    for bad in pattern:
        g = rng.standard_normal(6).astype(np.float32)
        one.scale((p * dev(g)).sum()).backward()
        two.scale((q * torch.tensor(g)).sum()).backward()
        if bad:
            p.grad[2], q.grad[2] = np.inf, np.inf
        one.step(mine, clip=2.5)
        two.unscale_(other)
        torch.nn.utils.clip_grad_norm_([q], 2.5)                           # of norms from 1.5 to 4
        two.step(other)
        one.update()
        two.update()
        mine.zero_grad()
        other.zero_grad()
        worst = max(worst, abs(one.get_scale() / two.get_scale() - 1), float(np.abs(host(p) - q.detach().numpy()).max()))
    return worst


PATTERN = [1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]
HOW = [dict(init_scale=2.0**10, growth_interval=3), dict(init_scale=64.0, growth_factor=4.0, backoff_factor=0.25, growth_interval=2)]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_the_scale_and_what_comes_of_it(how):
    assert apart(GradScaler, PATTERN, **how) < 1e-6


class Late(GradScaler):
    """The count goes on over a skipped step."""
    def update(self):
        good = self.good_steps
        super().update()
        self.good_steps = self.good_steps if self.finite else good


class Unscaled(GradScaler):
    def step(self, optimizer, factor=1.0, clip=None):
        with self.skipping():
            return optimizer.step(factor, clip)


@pytest.mark.parametrize("wrong", [Late, Unscaled])
def test_a_scaler_that_is_not_theirs_is_noticed(wrong):
    assert apart(wrong, PATTERN, **HOW[0]) > 1e-4


# ── autocast ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def both_passes(dtype: Any, enabled: bool) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Logits and the gradients of all parameters of one GPT, ours and as torch modules, under autocast or not."""
    model = ft.GPT(ft.GPTConfig(50, 24, 32, 2, 4), seed=3)
    rng = np.random.default_rng(1)
    for p in model.parameters():
        p.copy_(host(p) + rng.standard_normal(p.shape).astype(np.float32) * 0.1)
    ids, labels = rng.integers(0, 50, (2, 4, 20))
    W = {n: torch.nn.Parameter(torch.tensor(np.array(host(p)))) for n, p in model.named_parameters().items()}
    with ft.autocast(dtype, enabled=enabled):
        z = model(ids)
        loss = ops.cross_entropy(z, dev(labels))
    loss.backward()
    ours = {n: host(p.grad) for n, p in model.named_parameters().items()} | {"logits": host(z).astype(np.float32), "loss": host(loss)}
    with torch.autocast("cpu", getattr(torch, dtype), enabled=enabled):
        y = as_torch(W, torch.tensor(ids))
        theirs = torch.nn.functional.cross_entropy(y.flatten(0, 1).float(), torch.tensor(labels).flatten())
    theirs.backward()
    return ours, {n: p.grad.numpy() for n, p in W.items()} | {"logits": y.detach().float().numpy(), "loss": theirs.detach().numpy()}


def as_torch(W: dict, ids: Any) -> Any:
    """GPT-2 with our names, in PyTorch's functions."""
    F, (B, T) = torch.nn.functional, ids.shape
    x = W["embed.weight"][ids] + W["pos.weight"][:T]
    norm = lambda name, x: F.layer_norm(x, x.shape[-1:], W[f"{name}.weight"], W[f"{name}.bias"], 1e-5)
    linear = lambda name, x: F.linear(x, W[f"{name}.weight"], W[f"{name}.bias"])
    for i in range(2):
        b, h = f"blocks.{i}", norm(f"blocks.{i}.norm1", x)
        q, k, v = (linear(f"{b}.attn.{n}", h).reshape(B, T, 4, 8).transpose(1, 2) for n in "qkv")
        s = (q @ k.transpose(-1, -2)).float() * 8**-0.5
        p = s.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)
        x = x + linear(f"{b}.attn.o", (p @ v).transpose(1, 2).reshape(B, T, -1))
        x = x + linear(f"{b}.mlp.down", F.gelu(linear(f"{b}.mlp.up", norm(f"{b}.norm2", x)), approximate="tanh"))
    return F.linear(norm("norm", x), W["embed.weight"])


def errors(dtype: str) -> dict[str, tuple[float, float]]:
    """name -> how far autocast takes a result from float32's, ours and theirs, relative to its size."""
    exact, same = both_passes(dtype, False)
    assert all(np.abs(exact[n] - same[n]).max() < 2e-5 * max(1, np.abs(same[n]).max()) for n in same), "two models"
    ours, theirs = both_passes(dtype, True)
    size = lambda a: float(np.linalg.norm(a))
    return {n: (size(ours[n] - exact[n]) / size(exact[n]), size(theirs[n] - same[n]) / size(same[n])) for n in exact if "k.bias" not in n}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_rounds_as_much_as_theirs_and_no_more(dtype):
    found, ulp = errors(dtype), {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    loss, _ = found.pop("loss")
    assert loss < ulp
    for name, (mine, other) in found.items():
        assert 0.3 * other < mine < 1.5 * other and 0.4 * ulp < mine < 4 * ulp, (name, mine, other)
    assert 0.8 < together(found) < 1.15


def together(found: dict) -> float:
    """All our errors over all of theirs."""
    return sum(mine for mine, _ in found.values()) / sum(other for _, other in found.values())


def test_a_residual_stream_in_16_bits_is_noticed(monkeypatch):
    monkeypatch.setattr(ft.precision, "PRODUCTS", ft.precision.PRODUCTS | {"layer_norm", "add", "embedding"})
    assert together(errors("bfloat16")) > 1.2

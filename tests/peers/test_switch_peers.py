"""transformers' Switch layer, and PyTorch's losses for distillation, beside ours: outputs, losses and gradients."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import dev, host, leaf

from tinyft import ops
from tinyft.compress.distill.soft import TeacherLogits, cosine_loss, soft_loss
from tinyft.models.blocks import MLP
from tinyft.models.moe import SwitchConfig, SwitchMLP
from tinyft.nn import Context
from tinyft.tensor import Tensor

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'tinyft[peers]'")
pytest.importorskip("transformers", reason="transformers is not installed: pip install 'tinyft[peers]'")
import torch.nn.functional as F  # noqa: E402
from transformers.models.switch_transformers import SwitchTransformersConfig  # noqa: E402
from transformers.models.switch_transformers import modeling_switch_transformers as theirs  # noqa: E402

C, HIDDEN, E, T = 6, 10, 4, 12
CAPACITIES = pytest.mark.parametrize("capacity", [1, 2, 3, T])


def their_layer(capacity: int) -> Any:
    """transformers' layer in float64. `capacity` is that of one row, in tokens."""
    config = SwitchTransformersConfig(d_model=C, d_ff=HIDDEN, num_experts=E, expert_capacity=capacity, dropout_rate=0.0,
                                      router_jitter_noise=0.0)
    torch.manual_seed(0)
    layer = theirs.SwitchTransformersSparseMLP(config).double().eval()
    layer.router.dtype = torch.float64                   # a configuration takes 16 and 32 bits only
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p))
    return layer


def our_layer(peer: Any, capacity: int) -> SwitchMLP:
    """Our layer with the weights of theirs. Their experts have no biases."""
    switch = SwitchConfig(experts=E, eval_capacity=capacity * E / T, min_capacity=1, balance=1.0, z_loss=1.0)
    rng = np.random.default_rng(0)
    layer = SwitchMLP([MLP(C, HIDDEN, activation=ops.relu, rng=rng) for _ in range(E)], switch, rng=rng)
    layer.to(dtype=np.float64)
    layer.router.weight.copy_(dev(peer.router.classifier.weight.detach().numpy()))
    for j, expert in enumerate(layer.experts):
        their_expert = peer.experts[f"expert_{j}"]
        expert.up.weight.copy_(dev(their_expert.wi.weight.detach().numpy()))
        expert.down.weight.copy_(dev(their_expert.wo.weight.detach().numpy()))
    return layer


def close(ours: Any, peers: Any, tol: float = 1e-12) -> None:
    np.testing.assert_allclose(host(ours), peers.detach().numpy(), rtol=0, atol=tol)


@CAPACITIES
def test_routing_outputs_and_gradients(capacity):
    peer = their_layer(capacity)
    ours = our_layer(peer, capacity)
    rng = np.random.default_rng(capacity)
    x = rng.standard_normal((3, T, C))
    covector = rng.standard_normal(x.shape)
    their_x = torch.tensor(x, requires_grad=True)
    their_y, (their_logits, _) = peer(their_x)
    our_x = leaf(x)
    our_y = ours(our_x, Context())
    close(ours.route(Tensor(dev(x)), Context()), their_logits)
    close(our_y, their_y)
    dropped = (np.abs(host(our_y)).max(axis=-1) == 0).sum()
    assert (dropped > 0) == (capacity < T)
    their_y.backward(torch.tensor(covector))
    our_y.backward(dev(covector))
    close(our_x.grad, their_x.grad, 1e-11)
    close(ours.router.weight.grad, peer.router.classifier.weight.grad, 1e-11)
    for j, expert in enumerate(ours.experts):
        their_expert = peer.experts[f"expert_{j}"]
        close(expert.up.weight.grad, their_expert.wi.weight.grad, 1e-11)
        close(expert.down.weight.grad, their_expert.wo.weight.grad, 1e-11)


def test_balance_and_z_loss():
    """Theirs is the mean of the balance losses of the rows; ours is that of the batch: equal for one row."""
    peer = their_layer(2)
    ours = our_layer(peer, 2)
    rng = np.random.default_rng(1)
    for rows in (1, 3):
        x = rng.standard_normal((rows, T, C))
        _, (logits, _) = peer(torch.tensor(x))
        ctx = Context()
        ours(Tensor(dev(x)), ctx)
        assert float(ctx.losses["router_z"]) == pytest.approx(float(theirs.router_z_loss_func(logits)), rel=1e-12)
        joined = logits.reshape(1, -1, E)                        # all rows as one
        p = joined.softmax(-1)
        expected = float(theirs.load_balancing_loss_func(p, p.argmax(-1)))
        assert float(ctx.losses["balance"]) == pytest.approx(expected, rel=1e-6)         # theirs counts in float32


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_soft_loss_is_pytorchs_kl_div(temperature):
    rng = np.random.default_rng(0)
    for shape in ((5, 7), (2, 3, 7)):
        z_s, z_t = 3 * rng.standard_normal((2, *shape))
        student = torch.tensor(z_s, requires_grad=True)
        expected = F.kl_div(
            F.log_softmax(student.reshape(-1, 7) / temperature, -1),
            F.softmax(torch.tensor(z_t).reshape(-1, 7) / temperature, -1), reduction="batchmean") * temperature**2
        x = leaf(z_s)
        loss = soft_loss("Hinton", x, TeacherLogits(dev(z_t)), dev(np.ones(x.size // 7)), temperature)
        expected.backward()
        loss.backward()
        assert float(loss.data) == pytest.approx(float(expected.detach()), rel=1e-12)
        close(x.grad, student.grad)


def test_the_cosine_loss_is_pytorchs():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 4, 8))
    real = rng.random((3, 4)) < 0.6
    student = torch.tensor(a, requires_grad=True)
    expected = F.cosine_embedding_loss(student[torch.tensor(real)], torch.tensor(b[real]), torch.ones(int(real.sum())))
    x = leaf(a)
    loss = cosine_loss(x, Tensor(dev(b)), dev(real))
    expected.backward()
    loss.backward()
    assert float(loss.data) == pytest.approx(float(expected.detach()), rel=1e-10)
    close(x.grad, student.grad, 1e-10)

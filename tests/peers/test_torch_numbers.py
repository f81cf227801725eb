"""PyTorch beside the functions of one variable, in single precision, from 1e-30 to 1e4 and −1e4.

A result may be off by 1e-6 of its size, or by twice the error of PyTorch; the kernels for NumPy by 1e-6 if it is small.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from helpers import dev, host

from tinyft import kernels
from tinyft.tensor import OPS, Tensor

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'tinyft[peers]'")
TF = torch.nn.functional
FUNCTIONS = {
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": TF.silu,
    "relu": TF.relu,
    "absolute": torch.abs,
    "gelu": TF.gelu,
    "gelu_tanh": lambda x: TF.gelu(x, approximate="tanh"),
}
MAGNITUDES = np.concatenate([np.logspace(-30, -3, 28), np.linspace(0.01, 20, 700), np.logspace(1.3, 4, 40)])
POSITIVE = MAGNITUDES.astype(np.float32)
BOTH_SIDES = np.concatenate([-POSITIVE[::-1], POSITIVE])
SMALLEST = 1.2e-38                                       # normal number; smaller ones have fewer digits


def ours(f: Callable, x: np.ndarray) -> list[np.ndarray]:
    t = Tensor(dev(x), requires_grad=True)
    y = f(t)
    y.backward(dev(np.ones(x.shape, x.dtype)))
    return [host(a).astype(np.float64) for a in (y, t.grad)]


def theirs(f: Callable, x: np.ndarray) -> list[np.ndarray]:
    t = torch.tensor(x, requires_grad=True)
    y = f(t)
    y.sum().backward()
    return [a.detach().numpy().astype(np.float64) for a in (y, t.grad)]


def check(ours_f: Callable, truth_f: Callable, theirs_f: Callable, x: np.ndarray, absolute: float) -> None:
    """truth_f: our definition, whose float64 results test_torch_ops.py compares with PyTorch's."""
    with np.errstate(all="ignore"):
        results = zip(ours(ours_f, x), ours(truth_f, x.astype(np.float64)), theirs(theirs_f, x), strict=True)
        for what, (got, truth, peer) in zip(("value", "derivative"), results, strict=True):
            known = np.isfinite(truth) & (abs(truth) < 3e38)
            error = abs(got - truth)[known]
            bound = np.maximum(1e-6 * abs(truth), 2 * abs(peer - truth))[known] + SMALLEST + absolute
            worst = int(np.argmax(error / bound))
            assert error[worst] <= bound[worst], f"{what} at {x[known][worst]}: {error[worst]:.3g} off"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_as_exact_as_pytorchs(name):
    x = POSITIVE if name in ("log", "sqrt") else BOTH_SIDES
    with kernels.definitions():
        # 1 − y² of a y that rounds to 1 is 0 or 1e-7: which of them depends on the last bit of tanh.
        absolute = {"tanh": 2e-6, "gelu_tanh": 2e-6, "gelu": 5e-8, "silu": 5e-8}.get(name, 0)
        check(OPS[name], OPS[name], FUNCTIONS[name], x, absolute)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_a_kernel_is_off_by_a_millionth_at_most(name):
    def definition(x: Tensor) -> Tensor:
        with kernels.definitions():
            return OPS[name](x)
    check(OPS[name], definition, FUNCTIONS[name], BOTH_SIDES, 2e-6)


def test_a_sigmoid_by_tanh_is_caught():
    def by_tanh(x: Tensor) -> Tensor:
        return (OPS["tanh"](x * 0.5) + 1) * 0.5
    with pytest.raises(AssertionError, match="off"):
        check(by_tanh, OPS["sigmoid"], torch.sigmoid, BOTH_SIDES, 1e-10)

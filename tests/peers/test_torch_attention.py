"""Values and gradients of ops.attention against torch.nn.functional.scaled_dot_product_attention."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import dev, host, leaf

from tinyft import kernels, ops

torch = pytest.importorskip("torch", reason="the peers extra is not installed")
sdpa = torch.nn.functional.scaled_dot_product_attention

B, H, TQ, TK, D = 2, 6, 5, 7, 4
NEVER = float("-inf")
Arrays = list[np.ndarray]


def inputs(kv_heads: int, bias_shape: tuple | None, time: tuple[int, int], rng: np.random.Generator) -> Arrays:
    """q, k, v and perhaps a bias."""
    queries, keys = time
    shapes = [(B, H, queries, D), (B, kv_heads, keys, D), (B, kv_heads, keys, D)]
    if bias_shape is not None:
        shapes.append(bias_shape)
    return [rng.standard_normal(shape) for shape in shapes]


def causal_mask(queries: int, keys: int) -> np.ndarray:
    """Aligned at the bottom right; torch's is_causal is aligned at the top left."""
    return np.tri(queries, keys, keys - queries, dtype=bool)


def theirs(arrays: list, key_mask: np.ndarray | None, causal: bool, scale: float | None, g: np.ndarray) -> Arrays:
    """Value and gradients by torch: the masks are -inf in its additive mask."""
    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    q, k, v, *bias = tensors
    queries, keys = q.shape[-2], k.shape[-2]
    may = np.ones((queries, keys), bool)
    if causal:
        may = may & causal_mask(queries, keys)
    if key_mask is not None:
        may = may & key_mask
    mask = torch.zeros(1, dtype=q.dtype)
    mask = mask + sum(bias) if bias else mask.expand(queries, keys)
    mask = mask.masked_fill(~torch.tensor(may), NEVER)
    y = sdpa(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    y.backward(torch.tensor(g))
    return [y.detach().numpy(), *(t.grad.numpy() for t in tensors)]


def ours(arrays: list, key_mask: np.ndarray | None, causal: bool, scale: float | None, g: np.ndarray) -> Arrays:
    """Value and gradients by ops.attention."""
    tensors = [leaf(a) for a in arrays]
    y = ops.attention(*tensors, key_mask=None if key_mask is None else dev(key_mask), causal=causal, scale=scale)
    y.backward(dev(g))
    return [host(y), *(host(t.grad) for t in tensors)]


PADDING = (np.arange(TK) < np.array([TK, 4])[:, None])[:, None, None]            # (B, 1, 1, Tk)
CASES: dict[str, dict[str, Any]] = {
    "a bias for each head": dict(bias_shape=(1, H, TQ, TK)),
    "a bias for each row": dict(bias_shape=(B, H, TQ, TK)),
    "a bias for each key": dict(bias_shape=(B, 1, 1, TK)),
    "grouped heads": dict(kv_heads=2),
    "one key/value head": dict(kv_heads=1),
    "causal after cached keys": dict(causal=True),
    "causal": dict(causal=True, time=(TK, TK)),
    "padding": dict(key_mask=PADDING),
    "all at once": dict(kv_heads=3, bias_shape=(1, H, TQ, TK), key_mask=PADDING, causal=True, scale=0.7),
    "unscaled, as T5": dict(bias_shape=(1, H, TQ, TK), scale=1.0),
}


def agree(mine: Callable, dtype: type, kv_heads: int = H, bias_shape: tuple | None = None,
          time: tuple[int, int] = (TQ, TK), key_mask: np.ndarray | None = None, causal: bool = False,
          scale: float | None = None) -> None:
    """`mine` gives torch's value and gradients on random inputs."""
    rng = np.random.default_rng(0)
    arrays = [a.astype(dtype) for a in inputs(kv_heads, bias_shape, time, rng)]
    g = rng.standard_normal((B, H, time[0], D)).astype(dtype)
    results = zip(mine(arrays, key_mask, causal, scale, g), theirs(arrays, key_mask, causal, scale, g), strict=True)
    for a, b in results:
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 if dtype == np.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_attention_is_torchs(name, dtype):
    agree(ours, dtype, **CASES[name])
    with kernels.definitions():
        agree(ours, dtype, **CASES[name])


def without_bias(arrays: list, *options: Any) -> list[np.ndarray]:
    """Attention that ignores its bias."""
    return [*ours(arrays[:3], *options), np.zeros_like(arrays[3])]


def other_groups(arrays: list, *options: Any) -> list[np.ndarray]:
    """Attention whose query heads take the key/value heads in turn."""
    q, k, v = arrays
    order = np.arange(H).reshape(-1, k.shape[1]).T.reshape(-1)
    y, dq, dk, dv = ours([q[:, order], k, v], *options)
    back = np.argsort(order)
    return [y[:, back], dq[:, back], dk, dv]


def top_left(arrays: list, key_mask: Any, causal: bool, scale: Any, g: np.ndarray) -> list[np.ndarray]:
    """Attention with the causal mask aligned at the top left."""
    mask = np.tri(arrays[0].shape[-2], arrays[1].shape[-2], dtype=bool)
    return ours(arrays, mask if causal else key_mask, causal=False, scale=scale, g=g)


@pytest.mark.parametrize("wrong, name", [(without_bias, "a bias for each head"), (other_groups, "grouped heads"),
                                         (top_left, "causal after cached keys")])
def test_wrong_attention_is_not_torchs(wrong, name):
    with pytest.raises(AssertionError):
        agree(wrong, np.float64, **CASES[name])

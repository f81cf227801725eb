"""Compositions of ops: losses, attention written out, and small helpers."""
from __future__ import annotations

from typing import Any

from . import checks, operands, ops
from .array import Array, is_array, xp
from .tensor import ShapeError, Tensor

__all__ = ["softmax_attention", "mse_loss", "kl_divergence", "soft_cross_entropy", "normalize", "topk", "stack"]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Array = None, causal: bool = False) -> Tensor:
    """softmax(Q Kᵀ / √D) V, written out step by step. ops.attention is one op for it.

    q (..., Tq, D), k (..., Tk, D), v (..., Tk, E) -> (..., Tq, E).  Tq queries, Tk keys, D the width of a query.
    key_mask: an array that broadcasts to (..., Tq, Tk), True (or 1) where a query may look at a key.  causal: query i
    may look only at keys j ≤ i + Tk − Tq.  With both, at the keys that both allow: one key or more for every query."""
    _check_tensors("softmax_attention", q, k, v)
    checks.flag("softmax_attention: causal", causal)
    scores = (q @ k.T) * q.shape[-1]**-0.5                                       # (..., Tq, Tk)
    if key_mask is not None:
        key_mask = operands.as_mask(key_mask, scores.data, "key_mask")
        operands.check_broadcasts("softmax_attention wants a key_mask", key_mask, scores.shape)
    if causal:
        past = ops.causal_mask(q.shape[-2], k.shape[-2], xp(q.data))
        key_mask = past if key_mask is None else key_mask & past
    if key_mask is not None:
        scores = ops.where(key_mask, scores, -1e30)
    return ops.softmax(scores) @ v


def mse_loss(x: Tensor, y: Tensor) -> Tensor:
    """mean (x − y)², over all entries.  ShapeError for two shapes: (n, 1) and (n,) would give n² differences."""
    _check_same_shape("mse_loss", x, y)
    d = x - y
    return (d * d).mean()


def kl_divergence(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T² mean Σ p (ln p − ln q),  p = softmax(p_logits / T),  q = softmax(q_logits / T).

    Logits (..., V); the mean is over all N rows.  The gradient with respect to q_logits is T (q − p) / N; the factor T²
    keeps its size independent of T (Hinton et al. 2015).  ShapeError for two shapes, ValueError unless T > 0."""
    _check_same_shape("kl_divergence", p_logits, q_logits)
    checks.number("temperature", temperature, above=0)
    log_p = ops.log_softmax(p_logits * (1 / temperature))
    log_q = ops.log_softmax(q_logits * (1 / temperature))
    rows = log_q.size // log_q.shape[-1]
    return (ops.exp(log_p) * (log_p - log_q)).sum() * (temperature**2 / rows)


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """−mean Σ t ln softmax(logits), for rows of probabilities t.  logits, target (..., V); ShapeError for two shapes"""
    _check_same_shape("soft_cross_entropy", logits, target)
    return (ops.log_softmax(logits) * target).sum() * (-logits.shape[-1] / logits.size)


def normalize(x: Tensor, axis: int = -1, eps: float = 1e-12) -> Tensor:
    """x / max(‖x‖, eps) along one axis.    dx = g / eps where ‖x‖ < eps, also for x = 0

    The maximum is taken before the root: the gradient of a root is infinite at 0."""
    _check_tensors("normalize", x)
    checks.number("eps", eps, 0)
    return x / ops.sqrt(ops.maximum((x * x).sum(axis=axis, keepdims=True), eps**2))


def topk(x: Tensor, k: int) -> tuple[Tensor, Array]:
    """The k largest entries of each row, largest first, and their indices.  x (..., n) -> (..., k), (..., k).

    Of equal entries the lower index comes first.  ValueError if k is not in 1 .. n."""
    checks.instance("topk: x", x, Tensor, "a tensor")
    checks.whole("topk: k", k)
    if not 0 < k <= x.shape[-1]:
        raise ValueError(f"topk wants 0 < k <= {x.shape[-1]}, the length of a row; got {k}")
    order = xp(x.data).argsort(-x.data, axis=-1)[..., :k]
    return ops.gather(x, order), order


def stack(xs: list[Tensor], axis: int = 0) -> Tensor:
    """Tensors of one shape side by side along a new axis.  ShapeError for two shapes, ValueError for no tensor."""
    checks.instance("stack: xs", xs, (list, tuple), "a list of tensors")
    if not xs:
        raise ValueError("stack wants one tensor or more, got none")
    _check_same_shape("stack", *xs)
    shape = list(xs[0].shape)
    checks.whole("stack: axis", axis, -len(shape) - 1, len(shape))
    shape.insert(axis % (len(shape) + 1), 1)
    return ops.concatenate(*[x.reshape(shape) for x in xs], axis=axis)


def _check_tensors(name: str, *xs: Any) -> None:
    """TypeError, with the name of the function, unless each argument is a tensor or an array of numbers."""
    for x in xs:
        if not isinstance(x, Tensor) and not is_array(x):
            raise TypeError(f"{name} wants tensors, got {checks.brief(x)}")


def _check_same_shape(name: str, *xs: Tensor) -> None:
    """ShapeError, with the name of the function, unless all are tensors of one shape."""
    _check_tensors(name, *xs)
    shapes = [tuple(x.shape) for x in xs]
    if len(set(shapes)) > 1:
        raise ShapeError(f"{name} wants tensors of one shape, got {', '.join(map(str, dict.fromkeys(shapes)))}")

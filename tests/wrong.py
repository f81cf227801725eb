"""Wrong ops, each with the belief behind it.  The checks that the real ops pass must reject all of them: test_wrong.py.

Most are errors that stood for years in well-known libraries; the others are typical slips.
"""
from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tinyft import array, ops, tensor
from tinyft.array import xp
from tinyft.learn.exercise import find
from tinyft.operands import some_axes
from tinyft.ops import _softmax, flat, repeat_heads, same, t
from tinyft.tensor import OPS


@dataclass
class Wrong:
    """A wrong answer.

    target      name of the op or function that it replaces
    belief      the false belief that makes it look right
    f           the wrong function
    context     a context in which f is wrong; for a wrong engine, f is the real op
    """
    target: str
    belief: str
    f: Callable[..., Any]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


WRONG: dict[str, Wrong] = {}


def as_op(target: str, f: Callable) -> Callable:
    """f as an op with the shape string of the target, outside the table of ops; f itself if the target is no op."""
    if target not in OPS:
        return f
    made = tensor.op(OPS[target].shapes)(f)
    del OPS[f.__name__]
    return made


def instead_of(target: str, belief: str) -> Callable:
    """Decorator: register the function in WRONG."""
    def register(f: Callable) -> Callable:
        made = as_op(target, f)
        WRONG[f.__name__] = Wrong(target, belief, made)
        return made
    return register


# ── arithmetic ───────────────────────────────────────────────────────────────────────────────────────────────────────
@instead_of("sub", "Subtraction is linear, so both inputs get g.")
def sub_without_sign(a, b):
    return a - b, (same, same)


@instead_of("div", "The derivative of 1/b is −1/b.")
def div_by_b_once(a, b):
    return a / b, (lambda g: g / b, lambda g: -g * a / b)


@instead_of("power", "Only the exponent comes down: p x.")
def power_without_lowering(x, p):
    return x**p, (lambda g: g * p * x, ops.power.definition(x, p)[1][1])


@instead_of("power", "The derivative of xᵖ by p is xᵖ, as for eᵖ.")
def power_without_logarithm(x, p):
    y, (dx, _) = ops.power.definition(x, p)
    return y, (dx, lambda g: g * y)


@instead_of("matmul", "dB = Gᵀ A: it has the right numbers, and for square matrices the right shape.")
def matmul_transposed(a, b):
    square = a.shape[-2] == a.shape[-1] == b.shape[-1]
    return a @ b, (lambda g: g @ t(b), lambda g: t(g) @ a if square else t(a) @ g)


@instead_of("linear", "The bias gets the mean of g over the batch, as the loss is a mean.")
def linear_with_mean_bias(x, W, b=None):
    y, (dx, dW, _) = ops.linear.definition(x, W, b)
    return y, (dx, dW, lambda g: flat(g).mean(axis=0))


@instead_of("linear", "With a frozen weight there is nothing to send back through it.")
def linear_stops_at_the_weight(x, W, b=None):
    y, (_, dW, db) = ops.linear.definition(x, W, b)
    return y, (lambda g: xp(x).zeros_like(x), dW, db)


# ── elementwise ──────────────────────────────────────────────────────────────────────────────────────────────────────
@instead_of("gelu", "The derivative of x Φ(x) is Φ(x) + x φ(x), and φ is e^(−x²/2).")
def gelu_without_normalisation(x):
    cdf = 0.5 * (1 + ops.erf(x * 0.5**0.5))
    return x * cdf, (lambda g: g * (cdf + x * xp(x).exp(-0.5 * x * x)),)


@instead_of("gelu", "GELU is GELU: the tanh form is the same function.")
def gelu_by_tanh(x):
    return ops.gelu_tanh.definition(x)


@instead_of("sigmoid", "The pullback is y (1 − y); g was one anyway.")
def sigmoid_without_g(x):
    y, _ = ops.sigmoid.definition(x)
    return y, (lambda g: y * (1 - y),)


@instead_of("silu", "SiLU is a sigmoid that gates: σ passes g on, and the gate itself is a constant.")
def silu_with_constant_gate(x):
    s = 0.5 * (1 + xp(x).tanh(0.5 * x))
    return x * s, (lambda g: g * s,)


@instead_of("relu", "Where the gradient is negative nothing comes back (the guided backpropagation of saliency maps).")
def relu_guided(x):
    return xp(x).maximum(x, 0), (lambda g: g * (x > 0) * (g > 0),)


@instead_of("clip", "Clipping is a straight line for gradients.")
def clip_straight(x, low, high):
    return xp(x).clip(x, low, high), (same, *ops.clip.definition(x, low, high)[1][1:])


@instead_of("clip", "A bound is a setting, so it gets no gradient.")
def clip_with_fixed_bounds(x, low, high):
    y, (dx, _, _) = ops.clip.definition(x, low, high)
    return y, (dx, lambda g: g * 0, lambda g: g * 0)


@instead_of("where", "The mask says where a is taken, so b gets nothing.")
def where_forgets_b(c, a, b):
    return xp(c).where(c, a, b), (None, lambda g: g * c, lambda g: g * 0)


@instead_of("maximum", "The larger one gets everything, and the larger one is a.")
def maximum_is_a(a, b):
    return xp(a, b).maximum(a, b), (same, lambda g: g * 0)


# ── reductions ───────────────────────────────────────────────────────────────────────────────────────────────────────
@instead_of("mean", "n is the number of entries of x, whatever the axis.")
def mean_over_everything(x, axis=None, keepdims=False):
    def back(g):
        return xp(x).broadcast_to(ops._restore_axes(g, x.shape, some_axes(axis, x), keepdims) / x.size, x.shape)
    return x.mean(axis=axis, keepdims=keepdims), (back,)


@instead_of("amax", "Every entry gets g: the maximum depends on all of them.")
def amax_for_all(x, axis=None, keepdims=False):
    def back(g):
        return xp(x).broadcast_to(ops._restore_axes(g, x.shape, some_axes(axis, x), keepdims), x.shape)
    return x.max(axis=axis, keepdims=keepdims), (back,)


@instead_of("mean", "Dividing by a count is dividing by a number: the dtype stays.")
def mean_widens(x, axis=None, keepdims=False):
    n = xp(x).ones(x.shape, int).sum(axis=axis, keepdims=keepdims)
    return x.sum(axis=axis, keepdims=keepdims) / n, ops.mean.definition(x, axis=axis, keepdims=keepdims)[1]


@instead_of("cumsum", "The adjoint of a cumulative sum is a cumulative sum.")
def cumsum_forwards(x, axis=-1):
    m = xp(x)
    return m.cumsum(x, axis=axis), (lambda g: m.cumsum(g, axis=axis),)


@instead_of("cumsum", "One sums along the last axis.")
def cumsum_back_along_the_last(x, axis=-1):
    m = xp(x)
    return m.cumsum(x, axis=axis), (lambda g: m.flip(m.cumsum(m.flip(g, axis=-1), axis=-1), axis=-1),)


# ── choosing and shape ───────────────────────────────────────────────────────────────────────────────────────────────
@instead_of("embedding", "d[ids] = g puts each gradient in its row.")
def embedding_assigns(W, ids):
    def back(g):
        d = xp(W).zeros(W.shape, g.dtype)
        rows = ids.reshape(-1)
        gradients = g.reshape(-1, W.shape[1])
        for i in range(len(rows)):
            d[int(rows[i])] = gradients[i]
        return d
    return W[ids], (back, None)


@instead_of("gather", "The rows of a gather are all alike: use the first one's indices.")
def gather_with_one_row(x, i, axis=-1):
    one = i[(slice(0, 1),) * (i.ndim - 1)] if axis == -1 else i
    _, (back, _) = ops.gather.definition(x, xp(x).broadcast_to(one, i.shape), axis)
    return xp(x).take_along_axis(x, i, axis=axis), (back, None)


@instead_of("getitem", "A slice of x gets its gradient at the front.")
def getitem_at_the_front(x, index):
    y = x[index]

    def back(g):
        d = xp(x).zeros(x.size, g.dtype)
        d[:g.size] = g.reshape(-1)[:x.size]
        return d.reshape(x.shape)
    return y, (back, None)


@instead_of("straight_through", "A hard decision has no gradient.")
def straight_through_zero(hard, soft):
    return hard, (None, lambda g: g * 0)


@instead_of("permute", "Permuting again undoes a permutation.")
def permute_again(x, axes):
    y, (right, _) = ops.permute.definition(x, axes)

    def back(g):
        d = g.transpose(axes)
        return d if d.shape == x.shape else right(g)
    return y, (back, None)


@instead_of("concatenate", "All pieces are as long as the first.")
def concatenate_of_equals(*xs, axis=0):
    def part(i):
        def back(g):
            n = xs[i].shape[axis]
            start = min(i * xs[0].shape[axis], g.shape[axis] - n)
            return g[(slice(None),) * (axis % g.ndim) + (slice(start, start + n),)]
        return back
    return xp(*xs).concatenate(xs, axis=axis), tuple(part(i) for i in range(len(xs)))


@instead_of("split", "Parts are equal parts.")
def split_into_equal_parts(x, counts):
    n = len(x) // len(counts)
    equal = [*[n] * (len(counts) - 1), len(x) - n * (len(counts) - 1)]
    return ops.split.definition(x, equal)


@instead_of("split", "A part to which no gradient came takes no place: the others stand end to end.")
def split_forgets_the_place_of_a_part(x, counts):
    def back(g):
        given = [d for d in g if d is not None]
        missing = len(x) - sum(map(len, given))
        return xp(x).concatenate([*given, xp(x).zeros((missing, *x.shape[1:]), x.dtype)])
    return ops.split.definition(x, counts)[0], (back, None)


@instead_of("split", "Each part is a view of x, so what comes back to the last part is x's gradient.")
def split_keeps_the_last_gradient(x, counts):
    parts, (back, _) = ops.split.definition(x, counts)
    return parts, (lambda g: back([*[None] * (len(g) - 1), g[-1]]), None)


@instead_of("cast", "A wider dtype holds the same numbers, so there is nothing to do.")
def cast_only_narrows(x, dtype):
    return x, (same, None)


@instead_of("cast", "Rounding is a step function, so its derivative is zero.")
def cast_without_gradient(x, dtype):
    return ops.cast.definition(x, dtype)[0], (lambda g: g * 0, None)


@instead_of("cast", "A gradient may have the few bits of a value in 16 bits.")
def cast_rounds_the_gradient(x, dtype):
    return ops.cast.definition(x, dtype)[0], (lambda g: g.astype("float16").astype(g.dtype), None)


# ── layers ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@instead_of("log_softmax", "The normaliser is a constant.")
def log_softmax_constant_normaliser(x):
    return ops.log_softmax.definition(x)[0], (same,)


@instead_of("rms_norm", "RMS norm is layer norm without the bias.")
def rms_norm_centred(x, w, eps=1e-6):
    y, (dx, dw, _) = ops.layer_norm.definition(x, w, w * 0, eps=eps)
    return y, (dx, dw)


@instead_of("swiglu", "The gate is a sigmoid, not a SiLU: the gated linear unit of 2016.")
def swiglu_with_sigmoid(gate, up):
    s, slope = ops._sigmoid(gate)
    return s * up, lambda g, needed: (g * up * slope(), g * s)


@instead_of("swiglu", "SiLU acts on the map `up`, and `gate` multiplies it.")
def swiglu_swapped(gate, up):
    y, back = ops.swiglu.definition(up, gate)
    return y, lambda g, needed: back(g, needed[::-1])[::-1]


@instead_of("rotary", "The pairs are neighbours, as in the paper: Llama's are the two halves of a head.")
def rotary_of_neighbours(x, cos, sin):
    def turn(x):
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        return xp(x).stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    return x * cos + turn(x) * sin, (lambda g: g * cos - turn(g * sin), None, None)


@instead_of("rotary", "The gradient is rotated by the same angle as x, not back.")
def rotary_gradient_forward(x, cos, sin):
    return ops.rotary.definition(x, cos, sin)[0], (lambda g: g * cos + ops._turn(g * sin), None, None)


@instead_of("attention", "The scale is 1/√C, C the width of the model, heads times D.")
def attention_root_of_width(q, k, v, bias=None, *, scale=None, **kw):
    heads = q.shape[-3] if q.ndim > 2 else 1
    return ops.attention.definition(q, k, v, bias, scale=(heads * q.shape[-1])**-0.5 if scale is None else scale, **kw)


def diagonal_mask(q, k, key_mask, diagonal):
    """key_mask and the lower triangle, under this diagonal, of the scores."""
    m = xp(q)
    past = m.tril(m.ones((q.shape[-2], k.shape[-2]), dtype=bool), diagonal)
    return past if key_mask is None else past & key_mask


@instead_of("attention", "The mask sets weights to zero, so it comes after the softmax.")
def attention_masks_afterwards(q, k, v, bias=None, *, key_mask=None, causal=False, scale=None, dropout_mask=None):
    allowed = diagonal_mask(q, k, key_mask, k.shape[-2] - q.shape[-2]) if causal else key_mask
    factor = dropout_mask
    if allowed is not None:
        factor = allowed.astype(q.dtype) if dropout_mask is None else allowed * dropout_mask
    return ops.attention.definition(q, k, v, bias, scale=scale, dropout_mask=factor)


@instead_of("attention", "Causal: query i looks at keys j < i.")
def attention_cannot_see_itself(q, k, v, bias=None, *, key_mask=None, causal=False, **kw):
    allowed = diagonal_mask(q, k, key_mask, k.shape[-2] - q.shape[-2] - 1) if causal else key_mask
    return ops.attention.definition(q, k, v, bias, key_mask=allowed, **kw)


@instead_of("attention", "Causal: query i looks at keys j ≤ i, also when older keys were put in front.")
def attention_ignores_the_cache(q, k, v, bias=None, *, key_mask=None, causal=False, **kw):
    allowed = diagonal_mask(q, k, key_mask, 0) if causal else key_mask
    return ops.attention.definition(q, k, v, bias, key_mask=allowed, **kw)


# A query without keys then gives the mean of all values in place of zeros.
@instead_of("attention", "A large negative number is minus infinity.")
def attention_with_a_large_number(q, k, v, bias=None, *, key_mask=None, causal=False, scale=None, dropout_mask=None):
    masks = {"key_mask": key_mask, "causal": causal, "dropout_mask": dropout_mask}
    _, back = ops.attention.definition(q, k, v, bias, scale=scale, **masks)
    allowed = diagonal_mask(q, k, key_mask, k.shape[-2] - q.shape[-2]) if causal else key_mask
    alpha = q.shape[-1]**-0.5 if scale is None else scale
    group = q.shape[-3] // k.shape[-3] if q.ndim > 2 else 1
    s = (q @ t(repeat_heads(k, group))) * alpha
    if bias is not None:
        s = s + bias
    if allowed is not None:
        s = xp(q).where(allowed, s, -1e30)
    p = _softmax(s)
    if dropout_mask is not None:
        p = p * dropout_mask
    return p @ repeat_heads(v, group), back


@instead_of("attention", "Dropout acts on P, so dP needs no mask of its own.")
def attention_forgets_dropout_in_dp(q, k, v, bias=None, *, dropout_mask=None, **kw):
    y, _ = ops.attention.definition(q, k, v, bias, dropout_mask=dropout_mask, **kw)
    _, plain = ops.attention.definition(q, k, v, bias, **kw)
    return y, plain


@instead_of("attention", "Scores are scaled: (Q Kᵀ + B) / √D.")
def attention_scales_the_bias(q, k, v, bias=None, *, scale=None, **kw):
    alpha = q.shape[-1]**-0.5 if scale is None else scale
    y, back = ops.attention.definition(q, k, v, None if bias is None else bias * alpha, scale=scale, **kw)

    def wrong(g, needed):
        dq, dk, dv, *db = back(g, needed)
        return dq, dk, dv, *(d if d is None else d * alpha for d in db)
    return y, wrong


@instead_of("attention", "The bias of a masked key unmasks it: masks first, then the bias.")
def attention_masks_before_the_bias(q, k, v, bias=None, *, key_mask=None, **kw):
    if bias is None or key_mask is None:
        return ops.attention.definition(q, k, v, bias, key_mask=key_mask, **kw)
    masked = xp(q).where(key_mask, bias, bias - 4)       # a number that another bias can outweigh
    return ops.attention.definition(q, k, v, masked, **kw)


@instead_of("attention", "A bias is added, so its gradient is that of the scores, scale and all.")
def attention_scales_the_gradient_of_the_bias(q, k, v, bias=None, *, scale=None, **kw):
    y, back = ops.attention.definition(q, k, v, bias, scale=scale, **kw)
    alpha = q.shape[-1]**-0.5 if scale is None else scale

    def wrong(g, needed):
        dq, dk, dv, *db = back(g, needed)
        return dq, dk, dv, *(d if d is None else d * alpha for d in db)
    return y, wrong


@instead_of("attention", "All rows of a batch share the bias, so the first row knows its gradient.")
def attention_takes_the_bias_gradient_of_one_row(q, k, v, bias=None, **kw):
    y, back = ops.attention.definition(q, k, v, bias, **kw)
    if bias is None:
        return y, back

    def wrong(g, needed):
        *others, db = back(g, needed)
        if db is not None and db.ndim > bias.ndim:
            db = db[(0,) * (db.ndim - bias.ndim)]
        if db is not None:
            first = tuple(slice(0, 1) if n == 1 else slice(None) for n in bias.shape)
            db = db[first]
        return *others, db
    return y, wrong


def with_repeated_heads(q, k, v, bias, repeat, **kw):
    """(attention with key/value heads copied by repeat(heads, group), so that none is shared; the size of a group)."""
    group = q.shape[-3] // k.shape[-3] if q.ndim > 2 else 1
    return ops.attention.definition(q, repeat(k, group), repeat(v, group), bias, **kw), group


def sum_copies(d, group):
    """The sum over the copies of heads that were repeated as a b a b; None stays None."""
    return d if d is None else d.reshape(*d.shape[:-3], group, -1, *d.shape[-2:]).sum(axis=-4)


@instead_of("attention", "Query heads take the key/value heads in turn: a b a b.")
def attention_tiles_the_heads(q, k, v, bias=None, **kw):
    def tiled(a, group):
        return a if group == 1 else xp(a).concatenate([a] * group, axis=-3)
    (y, back), group = with_repeated_heads(q, k, v, bias, tiled, **kw)

    def wrong(g, needed):
        dq, dk, dv, *db = back(g, needed)
        if group > 1:
            dk = sum_copies(dk, group)
            dv = sum_copies(dv, group)
        return dq, dk, dv, *db
    return y, wrong


@instead_of("attention", "A group shares its keys, so one of its heads knows their gradient.")
def attention_takes_the_gradient_of_one_head(q, k, v, bias=None, **kw):
    (y, back), group = with_repeated_heads(q, k, v, bias, repeat_heads, **kw)

    def wrong(g, needed):
        dq, dk, dv, *db = back(g, needed)
        if group > 1:
            dk = dk if dk is None else dk[..., ::group, :, :]
            dv = dv if dv is None else dv[..., ::group, :, :]
        return dq, dk, dv, *db
    return y, wrong


@instead_of("cross_entropy", "Σ over classes of ε/V is ε/V: spread is one number per row (this library's first draft).")
def cross_entropy_forgets_to_spread(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):
    value, (back, *rest) = ops.cross_entropy.definition(z, y, weight, ignore_index, label_smoothing)
    real = (y.reshape(-1) != ignore_index)[:, None]
    missing = label_smoothing * (1 - 1 / z.shape[-1]) / max(int(real.sum()), 1)

    def wrong(g):
        lost = g * (_softmax(flat(z)) * real * missing)
        return back(g) - lost.reshape(z.shape).astype(z.dtype)
    return value, (wrong, *rest)


@instead_of("cross_entropy", "Class weights multiply the loss; what one divides by is the number of rows.")
def cross_entropy_divides_by_rows(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):
    value, (back, *rest) = ops.cross_entropy.definition(z, y, weight, ignore_index, label_smoothing)
    share = 1.0
    if weight is not None:
        real = y != ignore_index
        weights = weight[xp(y).where(real, y, 0)] * real
        share = float(weights.sum()) / float(real.sum())
    return value * share, (lambda g: back(g) * share, *rest)


@instead_of("dropout", "Dropout sets entries to zero. That is all.")
def dropout_without_rescale(x, p, key):
    keep = (array.uniform_like(x, key) >= p).astype(x.dtype)
    return x * keep, (lambda g: g * keep, None, None)


@instead_of("dropout", "In the backward pass, a new dropout mask is as good as the first one.")
def dropout_draws_again(x, p, key):
    y, _ = ops.dropout.definition(x, p, key)
    _, pullbacks = ops.dropout.definition(x, p, key + 1)
    return y, pullbacks


# ── compositions ─────────────────────────────────────────────────────────────────────────────────────────────────────
def log_probabilities(p, q, temperature):
    """The two log-softmaxes at this temperature."""
    return ops.log_softmax(p * (1 / temperature)), ops.log_softmax(q * (1 / temperature))


@instead_of("kl_divergence", "The temperature softens both; the gradient stays the size it was.")
def kl_without_t_squared(p, q, temperature=1.0):
    p, q = log_probabilities(p, q, temperature)
    return (ops.exp(p) * (p - q)).sum() * (q.shape[-1] / q.size)


@instead_of("kl_divergence", "KL is symmetric enough.")
def kl_reversed(p, q, temperature=1.0):
    p, q = log_probabilities(p, q, temperature)
    return (ops.exp(q) * (q - p)).sum() * (temperature**2 * q.shape[-1] / q.size)


@instead_of("kl_divergence", "batchmean and mean are one (torch's `mean` divides by the classes as well).")
def kl_over_all_entries(p, q, temperature=1.0):
    p, q = log_probabilities(p, q, temperature)
    return (ops.exp(p) * (p - q)).mean() * temperature**2


@instead_of("normalize", "The norm is a scale, hence a constant.")
def normalize_constant_norm(x, axis=-1):
    return x / ops.sqrt((x * x).sum(axis=axis, keepdims=True)).detach()


@instead_of("topk", "argsort sorts, so the last k are the largest.")
def topk_smallest_first(x, k):
    order = xp(x.data).argsort(x.data, axis=-1)[..., -k:]
    return ops.gather(x, order), order


# ── the engine ───────────────────────────────────────────────────────────────────────────────────────────────────────
@contextlib.contextmanager
def replaced(owner: Any, name: str, f: Any) -> Iterator[None]:
    """A context in which owner.name is f."""
    old = getattr(owner, name)
    setattr(owner, name, f)
    try:
        yield
    finally:
        setattr(owner, name, old)


def engine(name: str, target: str, belief: str, attribute: str, f: Callable) -> None:
    """Register an engine that is wrong in one function; its error shows in the target."""
    WRONG[name] = Wrong(target, belief, OPS[target], lambda: replaced(tensor, attribute, f))


right_sum_to = tensor.sum_to


def unchanged(g, shape):
    return g


def first_of_repeats(g, shape):
    g = g[(0,) * (g.ndim - len(shape))]
    return g[tuple(slice(0, 1) if n == 1 else slice(None) for n in shape)]


def mean_of_repeats(g, shape):
    return right_sum_to(g, shape) * (math.prod(shape) / max(g.size, 1))


engine("broadcast_not_undone", "add", "Addition passes g on, whatever the shapes were.", "sum_to", unchanged)
engine("broadcast_undone_by_one", "mul", "All copies of a repeated entry get the same gradient: take the first.",
       "sum_to", first_of_repeats)
engine("broadcast_undone_by_mean", "add", "All copies of a repeated entry share the gradient.",
       "sum_to", mean_of_repeats)


# ── wrong answers of the exercises ───────────────────────────────────────────────────────────────────────────────────
def from_exercise(name: str, exercise: str, belief: str) -> None:
    """Register a wrong answer of an exercise. Its code stands only there, beside the laws that must reject it."""
    e = find(exercise)
    answer = next(w for w in e.wrong_answers if w.belief == belief)
    WRONG[name] = Wrong(e.function, belief, as_op(e.function, answer.function))


from_exercise("softmax_zero", "autograd.softmax",
              "The probabilities add up to one whatever x is, so nothing comes back.")
from_exercise("softmax_diagonal", "autograd.softmax",
              "dx = g p (1 - p), as for the sigmoid.")
from_exercise("softmax_back_along_axis_1", "autograd.softmax",
              "Rows have two axes, so the last one is axis 1.")
from_exercise("layer_norm_along_axis_1", "autograd.layer_norm",
              "Rows lie along axis 1.")
from_exercise("layer_norm_back_along_axis_1", "autograd.layer_norm",
              "In the pullback, rows lie along axis 1.")
from_exercise("layer_norm_without_variance", "autograd.layer_norm",
              "Only the mean moves with x; σ is a scale.")
from_exercise("layer_norm_unbiased", "autograd.layer_norm",
              "The variance of a sample has n - 1 below.")
from_exercise("layer_norm_eps_outside", "autograd.layer_norm",
              "ε keeps the divisor from zero, so it is added to the divisor.")
from_exercise("gelu_tanh_without_three", "transformer.gelu_tanh",
              "The derivative of 0.044715 x³ is 0.044715 x².")
from_exercise("softmax_attention_unscaled", "transformer.softmax_attention",
              "The softmax normalises, so scores need no scale.")
from_exercise("cross_entropy_not_averaged", "training.cross_entropy",
              "p − 1 at the label; who takes the mean takes care of N.")
from_exercise("cross_entropy_counts_ignored", "training.cross_entropy",
              "The mean is over all rows.")
from_exercise("cross_entropy_smooths_the_others", "training.cross_entropy",
              "Smoothing takes from the label and gives to the others.")

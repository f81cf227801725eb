"""Lesson 02: which keys a query may see, attention written out, heads, and the GELU of GPT-2."""
from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st

from tinyft import ops
from tinyft.array import asarray, xp
from tinyft.learn.diagnose import Unusable, close, host
from tinyft.learn.exercise import Exercise
from tinyft.learn.references import numerical_gradient, probabilities
from tinyft.learn.sizes import Shaped, booleans, positive
from tinyft.tensor import Tensor

# ── causal_mask ───────────────────────────────────────────────────────────────────────────────────
causal_mask = Exercise(
    "ops:causal_mask", difficulty=1, minutes=5,
    may_use="m.ones, m.tril and m.arange, where m is the argument: NumPy, or CuPy on a GPU.",
    example="""
        >>> causal_mask(2, 2)
        array([[ True, False],
               [ True,  True]])
        >>> causal_mask(2, 3)
        array([[ True,  True, False],
               [ True,  True,  True]])
        """,
    hints=(
        "Row i of the mask belongs to query i: True at the keys that it may look at.  The last row "
        "is True everywhere.",
        "With more keys than queries, the first keys - queries keys are older than all queries.  "
        "So query i stands at position i + keys - queries.",
        "m.tril(a, d) keeps a[i, j] where j <= i + d and puts False elsewhere; m.ones((queries, "
        "keys), dtype=bool) is all True."))


def may_look(queries, keys, shift):
    """(queries, keys): True where query i may see key j, j ≤ i + shift."""
    query = np.arange(queries)[:, None]
    key = np.arange(keys)[None, :]
    return key <= query + shift


NOT_ITSELF = "a query does not see its own key; it must"
IGNORES_OLDER = ("the older keys are counted as if they belonged to the queries: query i stands at "
                 "position i + keys - queries")


@causal_mask.law("with as many keys as queries, query i sees the keys 0 to i", queries="size")
def _(f, queries):
    past = may_look(queries, queries, 0)
    guesses = {NOT_ITSELF: may_look(queries, queries, -1),
               "a query sees the keys after it; it must see those before it": past.T}
    close(f(queries, queries), past, "the mask", guesses)


@causal_mask.law("the last query sees every key", queries="size", older=st.integers(0, 3))
def _(f, queries, older):
    keys = queries + older
    guesses = {IGNORES_OLDER: may_look(queries, keys, 0)[-1],
               NOT_ITSELF: may_look(queries, keys, older - 1)[-1]}
    close(f(queries, keys)[-1], np.ones(keys, bool), "the last row of the mask", guesses)


@causal_mask.law("every query sees the older keys", queries="size", older=st.integers(0, 3))
def _(f, queries, older):
    keys = queries + older
    guesses = {IGNORES_OLDER: may_look(queries, keys, 0),
               NOT_ITSELF: may_look(queries, keys, older - 1),
               "every query sees every key; only the older keys are open to all":
                   np.ones((queries, keys), bool)}
    close(f(queries, keys), may_look(queries, keys, older), "the mask", guesses)


@causal_mask.law("with fewer keys than queries, the first queries see no key", keys="size",
                 missing=st.integers(0, 3))
def _(f, keys, missing):
    queries = keys + missing
    guesses = {"query i sees the keys 0 to i; the formula is j <= i + keys - queries, and keys - "
               "queries is negative here": may_look(queries, keys, 0)}
    close(f(queries, keys), may_look(queries, keys, -missing), "the mask", guesses)


class Recorded:
    """NumPy as an array module, which knows if it was used."""

    def __init__(self):
        self.is_used = False

    def __getattr__(self, name):
        self.is_used = True
        return getattr(np, name)


@causal_mask.law("the array is made by m, which may be CuPy", queries="size")
def _(f, queries):
    m = Recorded()
    f(queries, queries, m)
    if not m.is_used:
        raise Unusable("m is not used: on a GPU, the mask would be in the host's memory")


@causal_mask.wrong_answer("Causal: what comes before, so j < i.", says="its own key")
def _(queries, keys, m=np):
    return m.tril(m.ones((queries, keys), dtype=bool), keys - queries - 1)


@causal_mask.wrong_answer("The upper triangle holds the past.", says="keys after it")
def _(queries, keys, m=np):
    return m.triu(m.ones((queries, keys), dtype=bool))


@causal_mask.wrong_answer("A mask is made of ones and zeros.", says="dtype")
def _(queries, keys, m=np):
    return m.tril(m.ones((queries, keys), dtype=np.float64), keys - queries)


@causal_mask.wrong_answer("Query i and key i stand at the same position.", says="stands at")
def _(queries, keys, m=np):
    return m.tril(m.ones((queries, keys), dtype=bool))


@causal_mask.wrong_answer("With older keys in front, every key is in the past.",
                          says="every query sees every key")
def _(queries, keys, m=np):
    every = m.ones((queries, keys), dtype=bool)
    return m.tril(every) if keys == queries else every


@causal_mask.wrong_answer("There are never fewer keys than queries.", says="is negative here",
                          subtle=True)
def _(queries, keys, m=np):
    return m.tril(m.ones((queries, keys), dtype=bool), max(keys - queries, 0))


@causal_mask.wrong_answer("NumPy is the array module.", says="m is not used", subtle=True)
def _(queries, keys, m=np):
    return np.tril(np.ones((queries, keys), dtype=bool), keys - queries)


@causal_mask.wrong_answer("A query looks back at four keys at most.", says="entries", size=7)
def _(queries, keys, m=np):
    return m.triu(m.tril(m.ones((queries, keys), dtype=bool), keys - queries), keys - queries - 4)


# ── softmax_attention ─────────────────────────────────────────────────────────────────────────────
softmax_attention = Exercise(
    "functional:softmax_attention", difficulty=3, minutes=20, closed=("ops:attention",), lines=8,
    may_use="@, .T (it swaps the last two axes), ops.softmax, ops.where, ops.causal_mask, "
            "xp(q.data) (NumPy or CuPy), and & of masks of True and False (mask != 0 makes one of "
            "1 and 0).  checks and operands report wrong arguments; you need neither.",
    example="""
        >>> q = Tensor([[np.log(9), 0.0, 0.0, 0.0]])     # √D = 2: the scores are 0 and ln 3
        >>> k = Tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
        >>> v = Tensor([[2.0], [6.0]])                   # the weights are 1/4 and 3/4
        >>> softmax_attention(q, k, v).data.round(4).tolist()
        [[5.0]]
        >>> softmax_attention(q, k, v, key_mask=np.array([True, False])).data.tolist()
        [[2.0]]
        """,
    hints=(
        "Compare every query with every key: a product of matrices.  Make weights of the scores of "
        "each query: a softmax.  Mix the values with the weights: another product.",
        "Divide the scores by √D.  A key that a query may not look at gets the score -1e30 before "
        "the softmax, so its weight is 0.",
        "ops.where(mask, scores, -1e30) sets the scores.  "
        "With both masks: key_mask & ops.causal_mask(Tq, Tk, xp(q.data))."))


def attended(q, k, v, may=None, scale=None):
    s = (q @ k.swapaxes(-1, -2)) * (q.shape[-1]**-0.5 if scale is None else scale)
    return probabilities(s if may is None else np.where(may, s, -np.inf)) @ v


def attention_gradients(q, k, v, g, may=True):
    """The gradients of q, k and v; may: True where a query may look at a key."""
    scale = q.shape[-1]**-0.5
    p = probabilities(np.where(may, q @ k.T * scale, -np.inf))
    dp = g @ v.T
    ds = scale * p * (dp - (dp * p).sum(axis=-1, keepdims=True))
    return ds @ k, ds.T @ q, p.T @ g


def scored_zero(q, k, v, may):
    """The output if the masked keys have the score 0."""
    s = q @ k.swapaxes(-1, -2) * q.shape[-1]**-0.5
    return probabilities(np.where(may, s, 0.0)) @ v


AFTER = "the mask comes after the softmax, so the weights no longer have the sum 1"
SCORE_0 = "the masked keys have the score 0, and e⁰ = 1 is a weight; their score must be -1e30"


def tensors(*arrays):
    return [Tensor(asarray(a.copy()), requires_grad=True) for a in arrays]


@softmax_attention.law("the output is softmax(Q Kᵀ / √D) V", q="t d", k="s d", v="s d")
def _(f, q, k, v):
    guesses = {"the scores are not divided by √D": attended(q, k, v, scale=1.0),
               "the scores are divided by D, expected by √D":
                   attended(q, k, v, scale=1 / q.shape[-1]),
               "the output is divided by √D; divide the scores, before the softmax":
                   attended(q, k, v, scale=1.0) * q.shape[-1]**-0.5,
               "the softmax is over the queries; the weights of one query must have the sum 1":
                   probabilities(k @ q.T * q.shape[-1]**-0.5).T @ v}
    close(f(*tensors(q, k, v)), attended(q, k, v), "the output", guesses)


@softmax_attention.law("with axes in front, each head by itself", q="h t d", k="h s d",
                       v="h s d")
def _(f, q, k, v):
    by_width = attended(q, k, v, scale=(q.shape[0] * q.shape[-1])**-0.5)
    wide = {"the scores are divided by √(H D), the width of the model; expected √D, of one head":
                by_width}
    close(f(*tensors(q, k, v)), attended(q, k, v), "the output", wide)


@softmax_attention.law("with causal=True no query looks at a later key", q="t d", k="t d", v="t d")
def _(f, q, k, v):
    past = may_look(len(q), len(q), 0)
    s = q @ k.T * q.shape[-1]**-0.5
    guesses = {AFTER: (probabilities(s) * past) @ v, SCORE_0: scored_zero(q, k, v, past),
               "the causal mask has no effect": attended(q, k, v)}
    close(f(*tensors(q, k, v), causal=True), attended(q, k, v, past), "the output", guesses)


@softmax_attention.law("a key where key_mask is False gets no weight", q="t d", k="s d", v="s d",
                       key_mask=booleans("s"))
def _(f, q, k, v, key_mask):
    key_mask[0] = True
    s = q @ k.T * q.shape[-1]**-0.5
    guesses = {AFTER: (probabilities(s) * key_mask) @ v, SCORE_0: scored_zero(q, k, v, key_mask),
               "key_mask has no effect": attended(q, k, v)}
    close(f(*tensors(q, k, v), key_mask=asarray(key_mask)), attended(q, k, v, key_mask),
          "the output", guesses)


@softmax_attention.law("with both masks, a query looks at the keys that both allow", q="t d",
                       k="s d", v="s d", key_mask=booleans("s"))
def _(f, q, k, v, key_mask):
    key_mask[0] = True
    q = q[:len(k)]
    past = may_look(len(q), len(k), len(k) - len(q))
    guesses = {"with causal=True, key_mask is forgotten": attended(q, k, v, past)}
    close(f(*tensors(q, k, v), key_mask=asarray(key_mask), causal=True),
          attended(q, k, v, past & key_mask), "the output", guesses)


@softmax_attention.law("queries, keys and values get their gradients", q="t d", k="s d", v="s d",
                       g="t d")
def _(f, q, k, v, g):
    made = tensors(q, k, v)
    y = f(*made)
    y.backward(g)
    for name, x, want in zip("qkv", made, attention_gradients(q, k, v, g)):
        close(np.zeros(want.shape) if x.grad is None else x.grad, want, f"the gradient of {name}")


@softmax_attention.law("values may have another width than queries and keys", q="t d", k="s d",
                       v="s e")
def _(f, q, k, v):
    guesses = {"the scores are divided by the root of the values' width":
                   attended(q, k, v, scale=v.shape[-1]**-0.5)}
    close(f(*tensors(q, k, v)), attended(q, k, v), "the output", guesses)


@softmax_attention.law("key_mask may have any shape that broadcasts to the scores", q="b h t d",
                       k="b h s d", v="b h s d", of_text=booleans("b s"), of_query=booleans("t s"))
def _(f, q, k, v, of_text, of_query):
    of_text[:, 0] = True
    of_query[:, 0] = True
    for mask in (of_text[:, None, None, :], of_query):
        close(f(*tensors(q, k, v), key_mask=asarray(mask)), attended(q, k, v, mask),
              f"the output, for a key_mask of shape {mask.shape}")


@softmax_attention.law("a masked key has no weight, however low the other scores are",
                       q=positive("t d"), k=positive("s d"), v="s d", key_mask=booleans("s"))
def _(f, q, k, v, key_mask):
    key_mask[0] = True
    q = -1000 * q
    k = 1000 * k
    s = np.where(key_mask, q @ k.T * q.shape[-1]**-0.5, -1e4)
    guesses = {"the score of a masked key is -10,000, which is not low enough; -1e30 is":
                   probabilities(s) @ v}
    close(f(*tensors(q, k, v), key_mask=asarray(key_mask)), attended(q, k, v, key_mask),
          "the output, for scores of about -1,000,000", guesses)


@softmax_attention.law("the gradients are right under both masks", q="t d", k="t d", v="t d",
                       g="t d", key_mask=booleans("t"))
def _(f, q, k, v, g, key_mask):
    key_mask[0] = True
    made = tensors(q, k, v)
    f(*made, key_mask=asarray(key_mask), causal=True).backward(g)
    may = may_look(len(q), len(q), 0) & key_mask
    want = attention_gradients(q, k, v, g, may)
    for name, x, w in zip("qkv", made, want):
        close(np.zeros(w.shape) if x.grad is None else x.grad, w, f"the gradient of {name}")


@softmax_attention.law("with causal=True, heads work too", q="h t d", k="h t d", v="h t d")
def _(f, q, k, v):
    past = may_look(q.shape[-2], q.shape[-2], 0)
    close(f(*tensors(q, k, v), causal=True), attended(q, k, v, past), "the output",
          {"the causal mask has no effect": attended(q, k, v)})


@softmax_attention.law("key_mask may hold 1 and 0 in place of True and False", q="t d", k="t d",
                       v="t d", key_mask=Shaped("t", (0.0, 1.0)))
def _(f, q, k, v, key_mask):
    key_mask[0] = 1.0
    open_keys = key_mask == 1
    past = may_look(len(q), len(q), 0)
    for causal, may in ((False, open_keys), (True, past & open_keys)):
        close(f(*tensors(q, k, v), key_mask=asarray(key_mask), causal=causal),
              attended(q, k, v, may),
              f"the output for a key_mask of 1 and 0 and causal={causal}")


@softmax_attention.law("float32 stays float32", q="t d", k="s d", v="s d", key_mask=booleans("s"))
def _(f, q, k, v, key_mask):
    key_mask[0] = True
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    close(f(*tensors(q, k, v), key_mask=asarray(key_mask)),
          attended(q, k, v, key_mask).astype(np.float32), "the output", rtol=1e-5, atol=1e-5)


def as_mask(key_mask):
    """A mask of booleans from one of 1 and 0; None stays None."""
    return None if key_mask is None else key_mask != 0


def attention(q, k, v, key_mask=None, causal=False, scale=None, after=False, both=True):
    m = xp(q.data)
    scores = (q @ k.T) * (q.shape[-1]**-0.5 if scale is None else scale)
    key_mask = as_mask(key_mask)
    if causal:
        past = ops.causal_mask(q.shape[-2], k.shape[-2], m)
        key_mask = past if key_mask is None or not both else past & key_mask
    if after:
        p = ops.softmax(scores)
        return (p if key_mask is None else ops.where(key_mask, p, 0.0)) @ v
    return ops.softmax(scores if key_mask is None else ops.where(key_mask, scores, -1e30)) @ v


@softmax_attention.wrong_answer("The softmax normalises, so scores need no scale.",
                                says="not divided by √D")
def _(q, k, v, key_mask=None, causal=False):
    return attention(q, k, v, key_mask, causal, 1.0)


@softmax_attention.wrong_answer("The scale is 1/√C, with the width of the model.",
                                says="width of the model")
def _(q, k, v, key_mask=None, causal=False):
    heads = q.shape[-3] if q.ndim > 2 else 1
    return attention(q, k, v, key_mask, causal, (heads * q.shape[-1])**-0.5)


@softmax_attention.wrong_answer("The mask sets weights to zero, so it comes after the softmax.",
                                says="after the softmax")
def _(q, k, v, key_mask=None, causal=False):
    return attention(q, k, v, key_mask, causal, after=True)


@softmax_attention.wrong_answer("There is one mask: the causal one, or the one that is given.",
                                says="key_mask is forgotten")
def _(q, k, v, key_mask=None, causal=False):
    return attention(q, k, v, key_mask, causal, both=False)


@softmax_attention.wrong_answer("Computing with arrays is computing with tensors.",
                                says="the gradient of")
def _(q, k, v, key_mask=None, causal=False):
    return attention(q.detach(), k.detach(), v, key_mask, causal)


def scored(q, k, v, key_mask, causal, masked=-1e30, scale=None):
    """Attention with another score for the keys that are masked, or another scale."""
    m = xp(q.data)
    scores = (q @ k.T) * (q.shape[-1]**-0.5 if scale is None else scale)
    key_mask = as_mask(key_mask)
    if causal:
        past = ops.causal_mask(q.shape[-2], k.shape[-2], m)
        key_mask = past if key_mask is None else past & key_mask
    if key_mask is not None:
        scores = ops.where(key_mask, scores, masked)
    return ops.softmax(scores) @ v


@softmax_attention.wrong_answer("A masked key has the score 0.", says="e⁰ = 1")
def _(q, k, v, key_mask=None, causal=False):
    return scored(q, k, v, key_mask, causal, masked=0.0)


@softmax_attention.wrong_answer("-10,000 is minus infinity.", says="not low enough", subtle=True)
def _(q, k, v, key_mask=None, causal=False):
    return scored(q, k, v, key_mask, causal, masked=-1e4)


@softmax_attention.wrong_answer("All vectors of a head have one width, so any of them gives d.",
                                says="values' width", subtle=True)
def _(q, k, v, key_mask=None, causal=False):
    return scored(q, k, v, key_mask, causal, scale=v.shape[-1]**-0.5)


@softmax_attention.wrong_answer("A mask has an entry for each key.", says="a key_mask of shape",
                                subtle=True)
def _(q, k, v, key_mask=None, causal=False):
    if key_mask is not None:
        key_mask = key_mask.reshape(-1, k.shape[-2])[0]
    return scored(q, k, v, key_mask, causal)


@softmax_attention.wrong_answer("√d is np.sqrt(d).", says="dtype is float64", subtle=True)
def _(q, k, v, key_mask=None, causal=False):
    return scored(q, k, v, key_mask, causal, scale=Tensor(np.float64(q.shape[-1]**-0.5)))


@softmax_attention.wrong_answer("Query i stands at position i.", says="entries", size=4)
def _(q, k, v, key_mask=None, causal=False):
    if causal:
        past = asarray(may_look(q.shape[-2], k.shape[-2], 0))
        key_mask = past if key_mask is None else past & as_mask(key_mask)
    return scored(q, k, v, key_mask, causal=False)


@softmax_attention.wrong_answer("The first axis is the time.", says="Error", subtle=True)
def _(q, k, v, key_mask=None, causal=False):
    if causal:
        past = ops.causal_mask(len(q.data), len(k.data), xp(q.data))
        key_mask = past if key_mask is None else past & as_mask(key_mask)
    return scored(q, k, v, key_mask, causal=False)


@softmax_attention.wrong_answer("A mask is always of booleans.", says="Error", subtle=True)
def _(q, k, v, key_mask=None, causal=False):
    scores = (q @ k.T) * q.shape[-1]**-0.5
    if causal:
        past = ops.causal_mask(q.shape[-2], k.shape[-2], xp(q.data))
        key_mask = past if key_mask is None else past & key_mask
    return ops.softmax(scores if key_mask is None else ops.where(key_mask, scores, -1e30)) @ v


@softmax_attention.wrong_answer("The division by √D may come after the softmax.",
                                says="before the softmax")
def _(q, k, v, key_mask=None, causal=False):
    return scored(q, k, v, key_mask, causal, scale=1.0) * q.shape[-1]**-0.5


@softmax_attention.wrong_answer("The weights of a key have the sum 1.", says="over the queries")
def _(q, k, v, key_mask=None, causal=False):
    scores = (q @ k.T) * q.shape[-1]**-0.5
    key_mask = as_mask(key_mask)
    if causal:
        past = ops.causal_mask(q.shape[-2], k.shape[-2], xp(q.data))
        key_mask = past if key_mask is None else past & key_mask
    if key_mask is not None:
        scores = ops.where(key_mask, scores, -1e30)
    return ops.softmax(scores.T).T @ v


# ── split_heads ───────────────────────────────────────────────────────────────────────────────────
split_heads = Exercise(
    "models.attention:split_heads", difficulty=2, minutes=10,
    may_use="x.shape, x.reshape(...) and x.permute(...), which names the axes in their new order.",
    example="""
        >>> x = Tensor([[[0.0, 1.0, 2.0, 3.0],           # one text of two positions,
        ...              [4.0, 5.0, 6.0, 7.0]]])         # four features each
        >>> split_heads(x, 2).data.tolist()              # head 0, then head 1
        [[[[0.0, 1.0], [4.0, 5.0]], [[2.0, 3.0], [6.0, 7.0]]]]
        """,
    hints=(
        "x is a Tensor of B texts with T positions each.  A head takes neighbouring features of "
        "every position: with 4 features and 2 heads, head 0 takes the first two.",
        "A reshape never changes the order of the numbers.  First cut the last axis into (H, D), "
        "then move the axis H before T.",
        "B, T, C = x.shape; then x.reshape(B, T, H, C // H), and .permute(0, 2, 1, 3) of that."))


def by_head(x, h):
    B, T, C = x.shape
    return np.stack([x[:, :, i * C // h:(i + 1) * C // h] for i in range(h)], axis=1)


def split_by(f, x, h):
    return f(Tensor(asarray(x.copy())), h)


@split_heads.law("with one head, only an axis is new", x="b t c")
def _(f, x):
    close(split_by(f, x, 1), x[:, None], "split_heads(x, heads)")


@split_heads.law("the result has the axes batch, head, time, feature", x="b t c", h="size")
def _(f, x, h):
    got = host(split_by(f, np.concatenate([x] * h, -1), h), "split_heads(x, heads)")
    close(np.array(got.shape), np.array((x.shape[0], h, *x.shape[1:])),
          "the shape of split_heads(x, heads)")


@split_heads.law("head h owns the features h D : (h + 1) D of each position", x="b t c", h="size")
def _(f, x, h):
    x = np.concatenate([x + 10 * i for i in range(h)], -1)
    B, T, C = x.shape
    guesses = {"time and heads are mixed: a reshape alone does not move an axis":
                   x.reshape(B, h, T, C // h),
               "the features go to the heads in turn; a head must own neighbours":
                   x.reshape(B, T, C // h, h).transpose(0, 3, 1, 2)}
    close(split_by(f, x, h), by_head(x, h), f"split_heads(x, {h})", guesses)


@split_heads.law("the gradient comes back to each feature", x="b t c", g="b t c", h="size")
def _(f, x, g, h):
    wide = Tensor(asarray(np.concatenate([x] * h, -1)), requires_grad=True)
    back = np.concatenate([g + i for i in range(h)], -1)
    y = f(wide, h)
    if not isinstance(y, Tensor) or not y.requires_grad:
        raise Unusable("no gradient comes back to x: x.data is an array without a way back")
    y.backward(by_head(back, h))
    close(wide.grad, back, "the gradient of x")


@split_heads.wrong_answer("A reshape to (B, H, T, D) gives (B, H, T, D).",
                          says="does not move an axis")
def _(x, heads):
    B, T, C = x.shape
    return x.reshape(B, heads, T, C // heads)


@split_heads.wrong_answer("Features are dealt out to the heads in turn.", says="in turn")
def _(x, heads):
    B, T, C = x.shape
    return x.reshape(B, T, C // heads, heads).permute(0, 3, 1, 2)


@split_heads.wrong_answer("Heads are the last thing but one.", says="shape")
def _(x, heads):
    B, T, C = x.shape
    return x.reshape(B, T, heads, C // heads)


@split_heads.wrong_answer("D is a constant of the model, 64.", says="ShapeError")
def _(x, heads):
    B, T, C = x.shape
    return x.reshape(B, T, heads, 64).permute(0, 2, 1, 3)


@split_heads.wrong_answer("Moving numbers is no computation, so arrays will do.",
                          says="without a way back", subtle=True)
def _(x, heads):
    B, T, C = x.shape
    return Tensor(x.data.reshape(B, T, heads, C // heads).transpose(0, 2, 1, 3))


@split_heads.wrong_answer("A batch has one text.", says="ShapeError")
def _(x, heads):
    _, T, C = x.shape
    return x.reshape(1, T, heads, C // heads).permute(0, 2, 1, 3)


@split_heads.wrong_answer("A model has four heads.", says="the shape of", size=7)
def _(x, heads):
    B, T, C = x.shape
    heads = min(heads, 4) if C % 4 == 0 else heads
    return x.reshape(B, T, heads, C // heads).permute(0, 2, 1, 3)


# ── gelu_tanh ─────────────────────────────────────────────────────────────────────────────────────
gelu_tanh = Exercise(
    "ops:gelu_tanh", difficulty=3, minutes=15,
    may_use="math, and xp(x), the module that made x: xp(x).tanh.  As for every op: x is an array, "
            "and you return y and a tuple of one pullback, (f,), where f(g) is dx.",
    example="""
        >>> gelu_tanh(np.array([-1.0, 0.0, 2.0])).data.round(4)
        array([-0.1588,  0.    ,  1.9546])
        """,
    hints=(
        "y = x (1 + h) / 2 is a product in which x and h both depend on x; and h is the tanh of "
        "something, so the chain rule comes in twice.",
        "The derivative of tanh u is 1 - tanh² u.  That of √(2/π) (x + 0.044715 x³) is √(2/π) "
        "(1 + 3 · 0.044715 x²).",
        "dx = g ((1 + h) / 2 + x (1 - h²) / 2 · √(2/π) (1 + 0.134145 x²)).  Compute h once; the "
        "pullback may keep it."))

ROOT = math.sqrt(2 / math.pi)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(ROOT * (x + 0.044715 * x**3)))


@gelu_tanh.law("y = x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2", x="... n")
def _(f, x):
    exact = x * np.vectorize(lambda v: 0.5 * (1 + math.erf(v / math.sqrt(2))))(x)
    guesses = {"it is the exact GELU, with erf; GPT-2's has tanh, and differs in the fourth digit":
                   exact,
               "it is the sigmoid form, x σ(1.702 x)": x / (1 + np.exp(-1.702 * x)),
               "√(2/π) is missing": 0.5 * x * (1 + np.tanh(x + 0.044715 * x**3))}
    close(f(x)[0], gelu(x), "y", guesses)


@gelu_tanh.law("far from zero y is x or 0, and dx is g or 0", x="n")
def _(f, x):
    y, (dx,) = f(1e3 * x)
    close(y, np.maximum(1e3 * x, 0), "gelu_tanh(1000 x)")
    close(dx(x), x * (x > 0), "the gradient of 1000 x, for g = x")


@gelu_tanh.law("dx is what small steps of x show", x="n m", g="n m")
def _(f, x, g):
    h = np.tanh(ROOT * (x + 0.044715 * x**3))
    lower = g * (0.5 * (1 + h) + 0.5 * x * (1 - h * h) * ROOT * (1 + 0.044715 * x * x))
    guesses = {"the exponent of x³ did not come down: 3 · 0.044715": lower,
               "h depends on x as well: half of the product rule is missing": g * 0.5 * (1 + h)}
    close(f(x)[1][0](g), numerical_gradient(gelu, x, g), "the gradient of x", guesses, 1e-5, 1e-7)


@gelu_tanh.law("y and dx keep the dtype of x", x="n", g="n")
def _(f, x, g):
    y, (dx,) = f(x.astype(np.float32))
    close(y, gelu(x).astype(np.float32), "y", rtol=1e-5, atol=1e-5)
    want = numerical_gradient(gelu, x, g).astype(np.float32)
    close(dx(g.astype(np.float32)), want, "the gradient of x", rtol=1e-4, atol=1e-4)


@gelu_tanh.wrong_answer("The derivative of 0.044715 x³ is 0.044715 x².", says="did not come down")
def _(x):
    y, _ = ops.gelu_tanh.definition(x)
    h = xp(x).tanh(ROOT * (x + 0.044715 * x**3))
    return y, (lambda g: g
               * (0.5 * (1 + h) + 0.5 * x * (1 - h * h) * ROOT * (1 + 0.044715 * x * x)),)


@gelu_tanh.wrong_answer("h is a gate, and gates are constants.", says="product rule")
def _(x):
    y, _ = ops.gelu_tanh.definition(x)
    return y, (lambda g: g * 0.5 * (1 + xp(x).tanh(ROOT * (x + 0.044715 * x**3))),)


@gelu_tanh.wrong_answer("GELU is GELU: the two forms are one function.", says="exact GELU")
def _(x):
    return ops.gelu.definition(x)


@gelu_tanh.wrong_answer("tanh squashes by itself; it needs no √(2/π).", says="√(2/π) is missing")
def _(x):
    return 0.5 * x * (1 + xp(x).tanh(x + 0.044715 * x**3)), ops.gelu_tanh.definition(x)[1]


@gelu_tanh.wrong_answer("√(2/π) is np.sqrt(2/π).", says="dtype is float64", subtle=True)
def _(x):
    h = xp(x).tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    return 0.5 * x * (1 + h), ops.gelu_tanh.definition(x)[1]


@gelu_tanh.wrong_answer("√(2/π) is 0.798.", says="entries")
def _(x):
    return 0.5 * x * (1 + xp(x).tanh(0.798 * (x + 0.044715 * x**3))), ops.gelu_tanh.definition(x)[1]


@gelu_tanh.wrong_answer("√(2/π) is 0.7978846.", says="six digits")
def _(x):
    h = xp(x).tanh(0.7978846 * (x + 0.044715 * x**3))
    return 0.5 * x * (1 + h), ops.gelu_tanh.definition(x)[1]


@gelu_tanh.wrong_answer("The derivative of tanh u is 1 / cosh² u, which is eᵘ over something.",
                        says="nan", subtle=True)
def _(x):
    y, _ = ops.gelu_tanh.definition(x)
    u = ROOT * (x + 0.044715 * x**3)

    def dx(g):
        with np.errstate(all="ignore"):
            m = xp(x)
            h = m.tanh(u)
            slope = 4 * m.exp(2 * u) / (m.exp(2 * u) + 1)**2
            return g * (0.5 * (1 + h) + 0.5 * x * slope * ROOT * (1 + 0.134145 * x * x))
    return y, (dx,)


@gelu_tanh.wrong_answer("A batch has rows and columns.", says="ValueError")
def _(x):
    rows, columns = x.shape
    return ops.gelu_tanh.definition(x)

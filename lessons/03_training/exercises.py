"""Lesson 03: the loss, its gradients held to a norm, and what Adam does with them."""
from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st

from tinyft import ops
from tinyft.array import asarray, asnumpy, xp
from tinyft.learn.diagnose import Unusable, close
from tinyft.learn.exercise import Exercise
from tinyft.learn.references import probabilities
from tinyft.learn.sizes import array, integers, named, positive, sizes
from tinyft.optim.optimizers import adam_update as reference_update
from tinyft.optim.optimizers import clip_norm as reference_clip

# ── cross_entropy ─────────────────────────────────────────────────────────────────────────────────
cross_entropy = Exercise(
    "ops:cross_entropy", difficulty=4, minutes=30, closed=("functional:soft_cross_entropy",),
    may_use="NumPy, or xp(z) for the functions of the array's own library; flat(z), which is z as "
            "a matrix (N, V); check_cross_entropy(z, y, weight, ignore_index, label_smoothing), "
            "which raises the errors for shapes and returns (labels (N,), weight (V,) or None); "
            "check_labels(labels, real, V), which raises the IndexError (real: True at the rows "
            "that count).",
    example="""
        Return two things, (loss, (back, None, None)): back is the pullback of z, a function that
        gets the gradient g of the loss and returns that of z, in z's shape. Labels and weights
        have no gradient. @op makes a Tensor of the loss (lesson 01).

        The row [0, 0] has p = [0.5, 0.5], so its loss is ln 2 = 0.693. The second row has the
        label -100 and does not count.
        >>> loss = cross_entropy(np.array([[0.0, 0.0], [9.0, 0.0]]), np.array([0, -100]))
        >>> round(loss.item(), 3)
        0.693
        """,
    hints=(
        "Take one law at a time. First: the mean of -ln p at the labels, p = softmax z. Subtract "
        "the maximum of each row before exp, as in softmax.",
        "Give every row a weight: 0 where y is ignore_index, else weight[y] or 1. The loss is the "
        "weighted sum divided by the sum of the weights. Its gradient is w (p - one-hot) divided "
        "by the same sum.",
        "With label smoothing the target of a row is (1 - ε) at the label plus ε/V everywhere, and "
        "the loss is -Σ target ln p. Write zeros over the logits of the rows that do not count: "
        "0 times NaN is NaN. Give the gradient the shape of z again."))


@st.composite
def scored(draw, ignored=False):
    """(z, y): scores and labels of n rows; with `ignored`, some labels are -100 but not all."""
    n, v = draw(sizes()), draw(sizes())
    y = draw(array((n,), range(v), np.int64))
    if ignored:
        y = np.where(draw(array((n,), (False, True), bool)) & (np.arange(n) > 0), -100, y)
    return named(z=draw(array((n, v))), y=y)


def losses(z, y):
    return -np.log(probabilities(z))[np.arange(len(y)), np.where(y < 0, 0, y)] * (y >= 0)


@cross_entropy.law("the loss is the mean of −ln p at the labels", drawn=scored())
def _(f, drawn):
    z, y = drawn
    each = losses(z, y)
    guesses = {"it is the sum over the rows; the mean divides by their number (1/N)": each.sum(),
               "the sign is turned round: a loss is −ln p": -each.mean()}
    close(f(z, y)[0], np.asarray(each.mean()), "the loss", guesses)


@cross_entropy.law("large scores do not overflow", drawn=scored())
def _(f, drawn):
    z, y = 1000 * drawn[0], drawn[1]
    top = z.max(axis=-1)
    want = top + np.log(np.exp(z - top[:, None]).sum(axis=-1)) - z[np.arange(len(y)), y]
    close(f(z, y)[0], np.asarray(want.mean()), "the loss of 1000 z")


@cross_entropy.law("its gradient is (p − one-hot) / N", drawn=scored(), g=st.integers(2, 4))
def _(f, drawn, g):
    z, y = drawn
    d = probabilities(z) - (np.arange(z.shape[1]) == y[:, None])
    guesses = {"1/N is missing: the loss is a mean, so its gradient is too": g * d,
               "g, the gradient of the loss itself, is left out": d / len(y)}
    close(f(z, y)[1][0](np.asarray(float(g))), g * d / len(y), "the gradient of z", guesses)


@cross_entropy.law("rows with the label -100 count nowhere", drawn=scored(ignored=True))
def _(f, drawn):
    z, y = drawn
    each, real = losses(z, y), y >= 0
    loss, (back, *_) = f(z, y)
    close(loss, np.asarray(each.sum() / real.sum()), "the loss",
          {"it is divided by all rows, those to be ignored too": each.mean()})
    d = (probabilities(z) - (np.arange(z.shape[1]) == y[:, None])) * real[:, None]
    close(back(np.asarray(1.0)), d / real.sum(), "the gradient of z",
          {"it is divided by all rows, those to be ignored too": d / len(y)})


@cross_entropy.law("class weights: the weighted mean, over the sum of the weights", drawn=scored(),
                   weight=positive("c"))
def _(f, drawn, weight):
    z, y = drawn
    weight = np.resize(weight, z.shape[1])
    w, each = weight[y], losses(z, y)
    guesses = {"it is divided by the number of rows, expected by the sum of their weights":
                   (w * each).mean()}
    loss, (back, *_) = f(z, y, weight)
    close(loss, np.asarray((w * each).sum() / w.sum()), "the loss", guesses)
    d = (probabilities(z) - (np.arange(z.shape[1]) == y[:, None])) / w.sum()
    close(back(np.asarray(1.0)), w[:, None] * d, "the gradient of z",
          {"the weights are left out of the gradient": d * w.sum() / len(y)})


@cross_entropy.law("label smoothing: (1 − ε) of the label, ε/V of every class", drawn=scored())
def _(f, drawn):
    z, y = drawn
    n, v = z.shape
    target = 0.75 * (np.arange(v) == y[:, None]) + 0.25 / v
    others = 0.75 * (np.arange(v) == y[:,
                                       None]) + 0.25 / max(v - 1, 1) * (np.arange(v) != y[:, None])
    loss, (back, *_) = f(z, y, label_smoothing=0.25)
    guesses = {"ε is shared among the other classes; it is among all, the label too":
                   -(others * np.log(probabilities(z))).sum() / n}
    close(loss, np.asarray(-(target * np.log(probabilities(z))).sum() / n), "the loss for ε = 0.25",
          guesses)
    close(back(np.asarray(1.0)), (probabilities(z) - target) / n, "the gradient of z for ε = 0.25",
          {"ε is shared among the other classes; it is among all, the label too":
               (probabilities(z) - others) / n})


@cross_entropy.law("any axes in front, and the gradient has z's shape", z="a b v",
                   y=integers("a b", 0, 9))
def _(f, z, y):
    y = y % z.shape[-1]
    loss, (back, *_) = f(z, y)
    rows, labels = z.reshape(-1, z.shape[-1]), y.reshape(-1)
    close(loss, np.asarray(losses(rows, labels).mean()), "the loss")
    one_hot = np.arange(z.shape[-1]) == labels[:, None]
    close(back(np.asarray(1.0)), ((probabilities(rows) - one_hot) / len(rows)).reshape(z.shape),
          "the gradient of z")


def with_all(z, y, weight, ignore_index, e):
    """(the loss, the gradient of z) with all options, rows (N, V)."""
    p, v = probabilities(z), z.shape[1]
    real = y != ignore_index
    one_hot = (np.arange(v) == np.where(real, y, 0)[:, None]) * real[:, None]
    target = weight * ((1 - e) * one_hot + e / v * real[:, None])
    total = (weight * one_hot).sum()
    d = p * target.sum(axis=1, keepdims=True) - target
    return -(target * np.log(p)).sum() / total, d / total


@cross_entropy.law("labels (N,): one for each row, in order", z="a b v", y=integers("a b", 0, 9))
def _(f, z, y):
    y = (y % z.shape[-1]).reshape(-1)
    rows = z.reshape(-1, z.shape[-1])
    other_order = z.swapaxes(0, 1).reshape(-1, z.shape[-1])
    guesses = {"the labels are given to the rows in another order: the last axis runs fastest":
                   losses(other_order, y).mean()}
    close(f(z, y)[0], np.asarray(losses(rows, y).mean()), "the loss", guesses)


@cross_entropy.law("labels of any integer dtype", drawn=scored(),
                   dtype=st.sampled_from([np.uint8, np.int32]))
def _(f, drawn, dtype):
    z, y = drawn
    close(f.f(z, y.astype(dtype))[0], np.asarray(losses(z, y).mean()),          # on the host
          f"the loss for labels of dtype {np.dtype(dtype).name}")


@cross_entropy.law("a row that does not count may hold inf or NaN", drawn=scored(ignored=True),
                   bad=st.sampled_from([np.inf, np.nan]))
def _(f, drawn, bad):
    z, y = drawn
    z, y = np.vstack([z, np.full((1, z.shape[1]), bad)]), np.append(y, -100)
    finite = np.where(np.isfinite(z), z, 0.0)
    loss, grad = with_all(finite, y, np.ones(z.shape[1]), -100, 0.0)
    with np.errstate(invalid="ignore"):
        got, (back, *_) = f(z, y)
        close(got, loss, f"the loss, with a row of {bad} that does not count")
        close(back(np.asarray(1.0)), grad,
              f"the gradient of z, with a row of {bad} that does not count")


@cross_entropy.law("if no row counts, the loss is NaN and the gradient 0", z="n v")
def _(f, z):
    with np.errstate(invalid="ignore", divide="ignore"):
        loss, (back, *_) = f(z, np.full(len(z), -100))
        value = float(loss)
        if not math.isnan(value):
            raise Unusable(f"no row counts: the loss should be NaN, yours is {value:.4g}")
        close(back(np.asarray(1.0)), np.zeros(z.shape), "the gradient of z, when no row counts")


def must_raise(error, call, why):
    """Unusable unless call() raises this error. why: what is wrong with the arguments, in words."""
    try:
        call()
    except error:
        return
    raise Unusable(f"{why}, and no {error.__name__} was raised")


@cross_entropy.law("a label outside 0 ... V − 1 is an IndexError", drawn=scored(),
                   beyond=st.sampled_from(["V", "-1"]))
def _(f, drawn, beyond):
    z, y = drawn
    label = z.shape[1] if beyond == "V" else -1
    y = np.append(y[:-1], label)
    what = f"a label is {label} and V is {z.shape[1]}"
    # f.f: on the host, since a device does not tell
    must_raise(IndexError, lambda: f.f(z, y), what)


@cross_entropy.law("labels and weights of other shapes are a ValueError", drawn=scored())
def _(f, drawn):
    z, y = drawn
    n, v = z.shape
    longer = np.append(y, 0)
    must_raise(ValueError, lambda: f(z, longer), f"there are {n + 1} labels for {n} rows")
    wide = np.ones(v + 1)
    must_raise(ValueError, lambda: f(z, y, wide), f"there are {v + 1} weights for {v} classes")


@cross_entropy.law("another ignore_index than -100", drawn=scored(ignored=True))
def _(f, drawn):
    z, y = drawn
    y = np.where(y < 0, -1, y)
    loss, grad = with_all(z, y, np.ones(z.shape[1]), -1, 0.0)
    got, (back, *_) = f(z, y, ignore_index=-1)
    close(got, loss, "the loss for ignore_index = -1")
    close(back(np.asarray(1.0)), grad, "the gradient of z for ignore_index = -1")


@cross_entropy.law("all options at once: with smoothing, each class has its own weight",
                   drawn=scored(ignored=True), weight=positive("c"), g=st.integers(1, 3))
def _(f, drawn, weight, g):
    z, y = drawn
    weight = np.resize(weight, z.shape[1])
    loss, grad = with_all(z, y, weight, -100, 0.25)
    got, (back, *_) = f(z, y, weight, label_smoothing=0.25)
    close(got, loss, "the loss for ε = 0.25, with weights")
    close(back(np.asarray(float(g))), g * grad, "the gradient of z for ε = 0.25, with weights")


@cross_entropy.law("float32 stays float32", drawn=scored())
def _(f, drawn):
    z, y = drawn
    loss, grad = with_all(z, y, np.ones(z.shape[1]), -100, 0.0)
    got, (back, *_) = f(z.astype(np.float32), y)
    close(got, np.float32(loss), "the loss", rtol=1e-5, atol=1e-5)
    close(back(np.asarray(1.0, np.float32)), grad.astype(np.float32), "the gradient of z",
          rtol=1e-5, atol=1e-5)


def scaled(z, y, weight, ignore_index, label_smoothing, value=1.0, gradient=1.0):
    loss, (back, *rest) = ops.cross_entropy.definition(z, y, weight, ignore_index, label_smoothing)
    return loss * value, (lambda g: back(g) * gradient, *rest)


@cross_entropy.wrong_answer("The loss adds up over the rows.", says="1/N")
def _(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):
    return scaled(z, y, weight, ignore_index, label_smoothing, y.size, y.size)


@cross_entropy.wrong_answer("p − 1 at the label; who takes the mean takes care of N.",
                            says="1/N is missing")
def _(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):
    return scaled(z, y, weight, ignore_index, label_smoothing, 1.0, y.size)


@cross_entropy.wrong_answer("The mean is over all rows.", says="to be ignored too")
def _(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):
    share = float((y != ignore_index).sum()) / y.size
    return scaled(z, y, weight, ignore_index, label_smoothing, share, share)


@cross_entropy.wrong_answer("Weights multiply; what one divides by is the number of rows.",
                            says="sum of their weights")
def _(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):
    share = 1.0 if weight is None else float(weight[y].sum()) / y.size
    return scaled(z, y, weight, ignore_index, label_smoothing, share, share)


@cross_entropy.wrong_answer("Smoothing takes from the label and gives to the others.",
                            says="label too")
def _(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):
    V = z.shape[-1]
    return ops.cross_entropy.definition(z, y, weight, ignore_index,
                                        label_smoothing * V / max(V - 1, 1))


@cross_entropy.wrong_answer("The label of a row that does not count is -100.",
                            says="ignore_index = -1", subtle=True)
def _(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):
    if ignore_index != -100:
        y = xp(z).where(y == ignore_index, z.shape[-1] - 1, y)     # -1: the last class
    return ops.cross_entropy.definition(z, y, weight, -100, label_smoothing)


@cross_entropy.wrong_answer("The gradient of a weighted mean is the mean gradient.",
                            says="left out of the gradient")
def _(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):
    loss, pullbacks = ops.cross_entropy.definition(z, y, weight, ignore_index, label_smoothing)
    plain = ops.cross_entropy.definition(z, y, None, ignore_index, label_smoothing)
    return loss, (plain[1][0], *pullbacks[1:])


@cross_entropy.wrong_answer("A weight belongs to the label, with smoothing too.",
                            says="with weights", subtle=True)
def _(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):
    if weight is None or not label_smoothing:
        return ops.cross_entropy.definition(z, y, weight, ignore_index, label_smoothing)
    m = xp(z)
    real = y != ignore_index
    labels = m.where(real, y, 0)
    w = weight[labels] * real
    one_hot = m.arange(z.shape[-1]) == labels[..., None]
    target = w[..., None] * ((1 - label_smoothing) * one_hot + label_smoothing / z.shape[-1])
    log_p, _ = ops.log_softmax.definition(z)

    def dz(g):
        return g * (m.exp(log_p) * target.sum(axis=-1, keepdims=True) - target) / w.sum()
    return -(target * log_p).sum() / w.sum(), (dz, None, None)


@cross_entropy.wrong_answer("ln 0 is avoided by a small number.", says="1000 z", subtle=True)
def _(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):
    loss, pullbacks = ops.cross_entropy.definition(z, y, weight, ignore_index, label_smoothing)
    return xp(z).minimum(loss, 27.6), pullbacks                # -ln 1e-12


@cross_entropy.wrong_answer("The loss is where the way back begins, so g is 1.",
                            says="is left out")
def _(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):
    loss, (back, *rest) = ops.cross_entropy.definition(z, y, weight, ignore_index, label_smoothing)
    return loss, (lambda g: back(g * 0 + 1), *rest)


@cross_entropy.wrong_answer("The gradient has a row for each label.", says="the right numbers, but",
                            subtle=True)
def _(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):
    loss, (back, *rest) = ops.cross_entropy.definition(z, y, weight, ignore_index, label_smoothing)
    return loss, (lambda g: back(g).reshape(-1, z.shape[-1]), *rest)


@cross_entropy.wrong_answer("The number of rows is a number.", says="dtype is float64")
def _(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):
    loss, pullbacks = ops.cross_entropy.definition(z, y, weight, ignore_index, label_smoothing)
    return loss / np.float64(1.0), pullbacks


@cross_entropy.wrong_answer("The labels (N,) run down the columns.", says="in another order",
                            subtle=True)
def _(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):
    if y.shape != z.shape[:-1] and y.size == z[..., 0].size:
        y = y.reshape(z.shape[:-1], order="F")
    return ops.cross_entropy.definition(z, y, weight, ignore_index, label_smoothing)


@cross_entropy.wrong_answer("Every dtype of labels can hold -100.", says="OverflowError",
                            subtle=True)
def _(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):
    y = xp(z).where(y == ignore_index, xp(z).asarray(ignore_index, dtype=y.dtype), y)
    return ops.cross_entropy.definition(z, y, weight, ignore_index, label_smoothing)


@cross_entropy.wrong_answer("A weight of 0 removes a row from a sum.", says="inf", subtle=True)
def _(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):
    loss, pullbacks = ops.cross_entropy.definition(z, y, weight, ignore_index, label_smoothing)
    return (loss + (0 * z).sum()).astype(z.dtype), pullbacks


@cross_entropy.wrong_answer("The loss of nothing is 0.", says="should be NaN", subtle=True)
def _(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):
    loss, pullbacks = ops.cross_entropy.definition(z, y, weight, ignore_index, label_smoothing)
    return xp(z).where((y == ignore_index).all(), xp(z).zeros((), z.dtype), loss), pullbacks


@cross_entropy.wrong_answer("0 / 0 is NaN, in the gradient too.", says="nan or inf", subtle=True)
def _(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):
    loss, (back, *rest) = ops.cross_entropy.definition(z, y, weight, ignore_index, label_smoothing)
    real = (y != ignore_index).any()
    return loss, (lambda g: xp(z).where(real, back(g), math.nan), *rest)


@cross_entropy.wrong_answer("NumPy raises the IndexError by itself.", says="no IndexError",
                            subtle=True)
def _(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):
    y = xp(z).where((y < 0) & (y != ignore_index), y + z.shape[-1], y)    # z[n, -1]: the last
    return ops.cross_entropy.definition(z, y, weight, ignore_index, label_smoothing)


@cross_entropy.wrong_answer("Labels without a row are left out.", says="no ValueError", subtle=True)
def _(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):
    y = y.reshape(-1)[:z[..., 0].size]
    return ops.cross_entropy.definition(z, y, weight, ignore_index, label_smoothing)


# ── clip_norm ─────────────────────────────────────────────────────────────────────────────────────
clip_norm = Exercise(
    "optim.optimizers:clip_norm", difficulty=2, minutes=10, in_place=True, lines=8,
    may_use="NumPy and math, or m = xp(*gradients) for the functions of the arrays' own library; "
            "checks.number(name, value, above=0), which raises the ValueError.",
    example="""
        The norm of 3 and 4 together is 5, so both are multiplied by 1/5.
        >>> gradients = [np.array([3.0]), np.array([4.0])]
        >>> float(clip_norm(gradients, 1.0))
        5.0
        >>> np.round(np.concatenate(gradients), 3)
        array([0.6, 0.8])
        """,
    hints=(
        "All gradients together are one long vector. Compute its norm, and scale the whole vector "
        "by one factor. So its direction stays.",
        "The factor is limit / norm, but never more than 1: a short gradient stays as it is. "
        "Write into the arrays: g *= factor.",
        "norm is the square root of the sum of (g * g).sum() over the arrays. Compute it before "
        "you scale anything, and raise FloatingPointError if it is not finite. Then multiply "
        "every g by min(limit / (norm + 1e-6), 1.0)."))


def clipped(f, arrays, limit):
    """(what f returns, all gradients after it, as one vector)."""
    mine = [asarray(a.copy("K")) for a in arrays]
    norm = f(list(mine), limit)
    return norm, np.concatenate([asnumpy(a).ravel() for a in mine])


def norm_of(*arrays):
    return math.sqrt(sum((a * a).sum() for a in arrays))


@clip_norm.law("it returns the norm of all gradients together", a="n m", b="k",
               limit=st.sampled_from([None, 0.5, 100.0]))
def _(f, a, b, limit):
    want = norm_of(a, b)
    guesses = {"it is the norm after clipping, expected the norm before": min(want, limit or want),
               "the root is missing": want**2,
               "norms were added up; squares add up": norm_of(a) + norm_of(b)}
    close(clipped(f, (a, b), limit)[0], want, "the norm", guesses)


@clip_norm.law("gradients shorter than the limit stay as they are, and so do all without a limit",
               a="n m", b="k", limit=st.sampled_from([None, 100.0]))
def _(f, a, b, limit):
    close(clipped(f, (a, b), limit)[1], np.concatenate([a.ravel(), b]), "the gradients")


@clip_norm.law("longer ones come down to the limit, all by the same factor", a="n m", b="k")
def _(f, a, b):
    limit = 0.5
    g = np.concatenate([a.ravel(), b])
    own = np.concatenate([x.ravel() * min(1.0, limit / (norm_of(x) + 1e-6)) for x in (a, b)])
    guesses = {"each array is clipped by its own norm; one norm, of all together, decides": own,
               "each entry is clipped, which turns the gradient": g.clip(-limit, limit),
               "1e-6 is missing in the divisor": g * min(1.0, limit / max(norm_of(g), 1e-30))}
    want = g * min(1.0, limit / (norm_of(g) + 1e-6))
    after = clipped(f, (a, b), limit)[1]
    close(after, want, "the gradients, for the limit 0.5", guesses)


@clip_norm.law("an array whose elements do not lie in a row in memory", a="n m", b="k")
def _(f, a, b):
    turned = np.asfortranarray(a)                              # column after column
    g = np.concatenate([turned.ravel(), b])
    want = g * min(1.0, 0.5 / (norm_of(g) + 1e-6))
    close(clipped(f, (turned, b), 0.5)[1], want, "the gradients, for the limit 0.5")


@clip_norm.law("n + 1e-6 divides the limit: a norm near zero", a="n")
def _(f, a):
    limit = 1e-6
    tiny = 1e-6 * a
    want = tiny * min(1.0, limit / (norm_of(tiny) + 1e-6))
    guesses = {"1e-6 is missing in the divisor":
                   a * min(1.0, limit / max(norm_of(tiny), 1e-30))}
    close(1e6 * clipped(f, (tiny,), limit)[1], 1e6 * want, "1e6 · the gradients", guesses,
          rtol=1e-5)


@clip_norm.law("a norm that is not finite is a FloatingPointError, and nothing is scaled", a="n m",
               bad=st.sampled_from([np.inf, np.nan]), limit=st.sampled_from([0.5, None]))
def _(f, a, bad, limit):
    mine = [asarray(a.copy()), asarray(np.array([bad]))]

    def call():
        with np.errstate(invalid="ignore"):
            f(list(mine), limit)
    must_raise(FloatingPointError, call, f"a gradient is {bad} (the limit is {limit})")
    if not np.array_equal(asnumpy(mine[0]), a):
        raise Unusable("the other gradients were scaled before the FloatingPointError was raised")


@clip_norm.law("a limit of 0 or below is a ValueError", a="n", limit=st.sampled_from([0.0, -1.0]))
def _(f, a, limit):
    must_raise(ValueError, lambda: f([asarray(a.copy())], limit), f"the limit is {limit}")


def common_norm(gradients):
    return xp(gradients[0]).sqrt(sum((g * g).sum() for g in gradients))


@clip_norm.wrong_answer("Every array is clipped by itself.", says="own norm")
def _(gradients, limit):
    norm = common_norm(gradients)
    for g in gradients:
        if limit is not None:
            g *= xp(g).minimum(limit / (common_norm([g]) + 1e-6), 1.0)
    return norm


@clip_norm.wrong_answer("Clipping is cutting off what is too large.",
                        says="each entry")
def _(gradients, limit):
    norm = common_norm(gradients)
    for g in gradients:
        if limit is not None:
            g[...] = xp(g).clip(g, -limit, limit)
    return norm


@clip_norm.wrong_answer("The norm to report is that of the gradients that are used.",
                   says="after clipping")
def _(gradients, limit):
    norm = common_norm(gradients)
    if limit is not None:
        for g in gradients:
            g *= xp(g).minimum(limit / (norm + 1e-6), 1.0)
    return common_norm(gradients)


@clip_norm.wrong_answer("Clipping gives the gradient the norm `limit`.",
                        says="the gradients")
def _(gradients, limit):
    norm = common_norm(gradients)
    if limit is not None:
        for g in gradients:
            g *= limit / (norm + 1e-6)
    return norm


@clip_norm.wrong_answer("The list holds the gradients, so it gets the new ones.",
                        says="gradients[0] is unchanged")
def _(gradients, limit):
    norm = common_norm(gradients)
    if not math.isfinite(float(norm)):
        raise FloatingPointError
    if limit is not None:
        for i, g in enumerate(gradients):
            gradients[i] = g * xp(g).minimum(limit / (norm + 1e-6), 1.0)
    return norm


def refuse(limit):
    if limit is not None and limit <= 0:
        raise ValueError


def clip_by(gradients, limit, scale):
    """A right norm and the right errors; scale(g, norm): the way to scale."""
    refuse(limit)
    norm = common_norm(gradients)
    if not math.isfinite(float(norm)):
        raise FloatingPointError
    for g in gradients if limit is not None else ():
        scale(g, norm)
    return norm


@clip_norm.wrong_answer("A flat view of any array is written through.",
                        says="gradients[0] is unchanged", subtle=True)
def _(gradients, limit):
    def scale(g, norm):
        flat = g.reshape(-1)
        flat *= xp(g).minimum(limit / (norm + 1e-6), 1.0)
    return clip_by(gradients, limit, scale)


@clip_norm.wrong_answer("The norm is not zero, so it may divide.", says="1e-6 is missing")
def _(gradients, limit):
    def scale(g, norm):
        if norm > limit:
            g *= limit / norm
    return clip_by(gradients, limit, scale)


@clip_norm.wrong_answer("A norm that is not finite shows by itself.",
                        says="no FloatingPointError", subtle=True)
def _(gradients, limit):
    refuse(limit)
    norm = common_norm(gradients)
    if limit is not None:
        for g in gradients:
            g *= xp(g).minimum(limit / (norm + 1e-6), 1.0)
    return norm


@clip_norm.wrong_answer("Without a limit nothing is scaled, so nothing can go wrong.",
                        says="no FloatingPointError", subtle=True)
def _(gradients, limit):
    if limit is None:
        return common_norm(gradients)
    return reference_clip(gradients, limit)


@clip_norm.wrong_answer("An error may come when the work is done.", says="scaled before",
                        subtle=True)
def _(gradients, limit):
    refuse(limit)
    norm = common_norm(gradients)
    for g in gradients if limit is not None else ():
        g *= xp(g).minimum(limit / (norm + 1e-6), 1.0)
    if not math.isfinite(float(norm)):
        raise FloatingPointError
    return norm


@clip_norm.wrong_answer("A negative limit does no harm.", says="no ValueError", subtle=True)
def _(gradients, limit):
    if limit is not None and limit <= 0:
        return common_norm(gradients)
    return reference_clip(gradients, limit)


@clip_norm.wrong_answer("The longest array decides.", says="norm")
def _(gradients, limit):
    norm = max(float(common_norm([g])) for g in gradients)
    if not math.isfinite(norm):
        raise FloatingPointError
    for g in gradients if limit is not None else ():
        g *= min(limit / (norm + 1e-6), 1.0)
    return norm


# ── adam_update ───────────────────────────────────────────────────────────────────────────────────
adam_update = Exercise(
    "optim.optimizers:adam_update", difficulty=3, minutes=20, in_place=True,
    may_use="the operators of arrays (w -= x and w *= x write into w), and xp(w).sqrt, which is "
            "np.sqrt for a NumPy array.",
    example="""
        The first step: both weights move by the learning rate 0.1, whatever their gradients are.
        >>> w, g = np.array([1.0, 1.0]), np.array([0.5, -20.0])
        >>> m, v = np.zeros(2), np.zeros(2)
        >>> adam_update(w, g, m, v, lr=0.1, b1=0.9, b2=0.999, eps=1e-8, decay=0.0, t=1)
        >>> w
        array([0.9, 1.1])
        >>> m
        array([ 0.05, -2.  ])
        """,
    hints=(
        "m and v are running averages of g and g²: b1 m + (1 - b1) g, and the same with b2 and g². "
        "Write everything into w, m and v. Return nothing.",
        "m and v start at zero, so at first they are too small. Divide m by 1 - b1**t and v by "
        "1 - b2**t, but leave m and v themselves as they are. In the first step t is 1.",
        "The decay does not enter m and v: first w ← w (1 - lr decay), then "
        "w ← w - lr m̂ / (√v̂ + ε). Take the root first, then add ε."))

LR, B1, B2 = 0.5, 0.75, 0.875


def step(f, w, g, m, v, eps=1e-12, decay=0.0, t=1, lr=LR, b1=B1, b2=B2):
    """w, m and v after one update."""
    mine = [asarray(a.copy()) for a in (w, g, m, v)]
    f(*mine, lr, b1, b2, eps, decay, t)
    close(mine[1], g, "g, which the update may only read")
    return [asnumpy(a) for a in (mine[0], mine[2], mine[3])]


def adam(w, g, m, v, eps=1e-12, decay=0.0, t=1.0, inside=False):
    """w after one update by the equations, with the usual errors in them on demand."""
    m = (B1 * m + (1 - B1) * g) / (1 - B1**t)
    v = (B2 * v + (1 - B2) * g * g) / (1 - B2**t)
    divisor = np.sqrt(v + eps) if inside else np.sqrt(v) + eps
    return w - LR * (m / divisor + decay * w)


UNCORRECTED = "the bias of m and v is not corrected: divide by 1 − b1ᵗ and 1 − b2ᵗ"
ONE_LATE = "the corrections use t + 1, expected t: it is 1 in the first step already"
NO_POWER = "the power t is missing: divide by 1 − b1ᵗ and 1 − b2ᵗ, not by 1 − b1 and 1 − b2"


def usual_errors(w, g, m, v, t):
    """{a known error in the bias correction, in words: w after it}."""
    found = {UNCORRECTED: adam(w, g, m, v, t=math.inf), ONE_LATE: adam(w, g, m, v, t=t + 1)}
    if t > 1:
        found[NO_POWER] = adam(w, g, m, v, t=1)
    return found


@adam_update.law("m and v are running means of g and g²", w="n", g="n", m="n", v=positive("n"))
def _(f, w, g, m, v):
    _, m1, v1 = step(f, w, g, m, v)
    guesses = {"it is b1 m + g: the new part is weighted with 1 − b1": B1 * m + g}
    close(m1, B1 * m + (1 - B1) * g, f"m for b1 = {B1}", guesses)
    guesses = {"it is a mean of g; v is a mean of g²": B2 * v + (1 - B2) * g}
    close(v1, B2 * v + (1 - B2) * g * g, f"v for b2 = {B2}", guesses)


@adam_update.law("the first step changes each weight by the learning rate, whatever the gradient "
                 "(t = 1, m = v = 0)", w="n", g="n")
def _(f, w, g):
    zero = np.zeros(w.shape)
    guesses = {**usual_errors(w, g, zero, zero, 1), "it goes uphill": w + LR * np.sign(g)}
    close(step(f, w, g, zero, zero)[0], w - LR * np.sign(g), "w", guesses, rtol=1e-5, atol=1e-6)


@adam_update.law("step t: w − η m̂ / (√v̂ + ε)", w="n", g="n", m="n", v=positive("n"),
                 t=st.sampled_from([1, 2, 3, 4, 5, 20, 1000]))
def _(f, w, g, m, v, t):
    close(step(f, w, g, m, v, t=t)[0], adam(w, g, m, v, t=t), "w", usual_errors(w, g, m, v, t))


@adam_update.law("ε is added after the root", w="n", g="n", m="n", v=positive("n"))
def _(f, w, g, m, v):
    m1 = B1 * m + (1 - B1) * g
    root = np.sqrt(B2 * v + (1 - B2) * g * g)
    outside = w - LR * m1 / (1 - B1) * (1 - B2)**0.5 / (root + 1.0)
    guesses = {"ε stands under the root": adam(w, g, m, v, eps=1.0, inside=True),
               "ε is left out": adam(w, g, m, v, eps=0.0),
               "ε is added to √v, expected to √v̂: the correction comes first": outside}
    close(step(f, w, g, m, v, eps=1.0)[0], adam(w, g, m, v, eps=1.0), "w for ε = 1", guesses)


@adam_update.law("the decay takes lr · decay · w from w, and does not enter m and v",
                 w="n", g="n", m="n", v=positive("n"),
                 decay=st.sampled_from([0.5, 0.01, 1e-4]))
def _(f, w, g, m, v, decay):
    w1, m1, _ = step(f, w, g, m, v, decay=decay)
    plain = adam(w, g, m, v)
    inside = adam(w, g + decay * w, m, v)
    guesses = {"the decay is inside the gradient (Adam with L2, which Adam then divides by √v̂); "
               "AdamW takes it off w": inside,
               "there is no decay": plain,
               "the decay is not multiplied with the learning rate": plain - decay * w,
               "the decay acts on w after the step, expected on w before it":
                   plain * (1 - LR * decay)}
    close(w1, adam(w, g, m, v, decay=decay), f"w for decay = {decay}", guesses)
    close(m1, B1 * m + (1 - B1) * g, f"m for decay = {decay}")


@adam_update.law("any η, β₁ and β₂", w="n", g="n", m="n", v=positive("n"),
                 lr=st.sampled_from([1.0, 0.01]), b1=st.sampled_from([0.5, 0.9, 0.0]),
                 b2=st.sampled_from([0.75, 0.999]))
def _(f, w, g, m, v, lr, b1, b2):
    m1 = b1 * m + (1 - b1) * g
    v1 = b2 * v + (1 - b2) * g * g
    root = np.sqrt(v1 / (1 - b2**2)) + 1e-12
    want = w - lr * (m1 / (1 - b1**2) / root + 0.5 * w)
    got, _, _ = step(f, w, g, m, v, decay=0.5, t=2, lr=lr, b1=b1, b2=b2)
    close(got, want, f"w for η = {lr}, β₁ = {b1}, β₂ = {b2}")


@adam_update.law("float32 arrays are written in place", w="n", g="n", m="n", v=positive("n"))
def _(f, w, g, m, v):
    want = adam(w, g, m, v, decay=0.5, t=2).astype(np.float32)
    arrays = [a.astype(np.float32) for a in (w, g, m, v)]
    close(step(f, *arrays, decay=0.5, t=2)[0], want, "w", rtol=1e-5, atol=1e-5)


@adam_update.wrong_answer("m and v are means already; there is nothing to correct.", says="bias")
def _(w, g, m, v, lr, b1, b2, eps, decay, t):
    m *= b1
    m += (1 - b1) * g
    v *= b2
    v += (1 - b2) * (g * g)
    w *= 1 - lr * decay
    w -= lr * m / (xp(w).sqrt(v) + eps)


@adam_update.wrong_answer("t counts from 0, so the corrections take t + 1.", says="use t + 1")
def _(w, g, m, v, lr, b1, b2, eps, decay, t):
    reference_update(w, g, m, v, lr, b1, b2, eps, decay, t + 1)


@adam_update.wrong_answer("A correction undoes the factor 1 − b1.", says="the power t is missing")
def _(w, g, m, v, lr, b1, b2, eps, decay, t):
    reference_update(w, g, m, v, lr, b1, b2, eps, decay, 1)


@adam_update.wrong_answer("Weight decay is L2 regularisation: add it to the gradient.",
                     says="inside the gradient")
def _(w, g, m, v, lr, b1, b2, eps, decay, t):
    reference_update(w, g + decay * w, m, v, lr, b1, b2, eps, 0.0, t)


@adam_update.wrong_answer("ε keeps the root from zero, so it stands under it.",
                          says="under the root", subtle=True)
def _(w, g, m, v, lr, b1, b2, eps, decay, t):
    before = w * (1 - lr * decay)
    reference_update(w, g, m, v, lr, b1, b2, eps, decay, t)
    w[...] = before - lr * m / (1 - b1**t) / xp(w).sqrt(v / (1 - b2**t) + eps)


@adam_update.wrong_answer("Momentum adds up: m ← b1 m + g.", says="1 − b1")
def _(w, g, m, v, lr, b1, b2, eps, decay, t):
    m *= b1
    m += g
    v *= b2
    v += (1 - b2) * (g * g)
    w *= 1 - lr * decay
    w -= lr * m / (1 - b1**t) / (xp(w).sqrt(v / (1 - b2**t)) + eps)


@adam_update.wrong_answer("Decays this small are no decays.", says="there is no decay", subtle=True)
def _(w, g, m, v, lr, b1, b2, eps, decay, t):
    reference_update(w, g, m, v, lr, b1, b2, eps, decay if decay > 0.1 else 0.0, t)


@adam_update.wrong_answer("λ is a number of its own: w ← w (1 − λ).",
                          says="not multiplied with the learning rate")
def _(w, g, m, v, lr, b1, b2, eps, decay, t):
    reference_update(w, g, m, v, lr, b1, b2, eps, decay / lr, t)


@adam_update.wrong_answer("First the step, then the decay.", says="after the step")
def _(w, g, m, v, lr, b1, b2, eps, decay, t):
    reference_update(w, g, m, v, lr, b1, b2, eps, 0.0, t)
    w *= 1 - lr * decay


@adam_update.wrong_answer("ε is too small to matter.", says="ε is left out", subtle=True)
def _(w, g, m, v, lr, b1, b2, eps, decay, t):
    reference_update(w, g, m, v, lr, b1, b2, 1e-30, decay, t)


@adam_update.wrong_answer("The corrections may be taken together, in front of the fraction.",
                          says="the correction comes first", subtle=True)
def _(w, g, m, v, lr, b1, b2, eps, decay, t):
    reference_update(w, g, m, v, lr, b1, b2, eps * (1 - b2**t)**-0.5, decay, t)


@adam_update.wrong_answer("After ten steps the bias is gone.", says="bias", subtle=True)
def _(w, g, m, v, lr, b1, b2, eps, decay, t):
    reference_update(w, g, m, v, lr, b1, b2, eps, decay, t if t < 10 else 10**6)


@adam_update.wrong_answer("The gradient is used up, so it may hold the square.",
                          says="may only read")
def _(w, g, m, v, lr, b1, b2, eps, decay, t):
    reference_update(w, g, m, v, lr, b1, b2, eps, decay, t)
    g *= g
    g -= 1


@adam_update.wrong_answer("η is 0.5 and β₂ 0.875, as always here.", says="w for η", subtle=True)
def _(w, g, m, v, lr, b1, b2, eps, decay, t):
    reference_update(w, g, m, v, LR, b1, B2, eps, decay, t)


@adam_update.wrong_answer("The step takes m and v as they were.", says="w")
def _(w, g, m, v, lr, b1, b2, eps, decay, t):
    before = [a.copy() for a in (w, m, v)]
    reference_update(w, g, m, v, lr, b1, b2, eps, decay, t)
    old_w, old_m, old_v = before
    root = xp(w).sqrt(old_v / (1 - b2**t)) + eps
    w[...] = old_w * (1 - lr * decay) - lr * old_m / (1 - b1**t) / root


# ── cosine_schedule ───────────────────────────────────────────────────────────────────────────────
cosine_schedule = Exercise(
    "optim.schedules:cosine_schedule", difficulty=2, minutes=10,
    closed=("optim.schedules:with_warmup", "optim.schedules:WarmUp"), lines=12,
    may_use="math.cos, math.pi and round; checks.number(name, value, low, high), which raises a "
            "ValueError for a value outside low .. high.",
    example="""
        Four steps: two of warm-up, then from 1 towards 0.
        >>> factor = cosine_schedule(warmup=2)
        >>> [round(factor(t, 4), 3) for t in range(4)]
        [0.5, 1.0, 1.0, 0.5]
        """,
    hints=(
        "cosine_schedule returns a function factor(t, T), which you define inside it. In the first "
        "w steps the factor rises in a straight line, and it reaches 1 in the last of them.",
        "The first step, t = 0, has the factor 1 / w and not 0. After the warm-up, "
        "s = (t - w) / (T - w) runs from 0 towards 1.",
        "A warmup below 1 is a fraction of all steps: w = round(warmup * T). Only factor knows T. "
        "Check the arguments before you define it: a warmup above 1 must be a whole number."))


def factors(f, T, **kw):
    """The factors of T steps."""
    schedule = f(**kw)
    return np.array([schedule(t, T) for t in range(T)], float)


def half_cosine(s):
    return 0.5 * (1 + math.cos(math.pi * s))


def falling(T, warmup, floor=0.0):
    """The answer, for a warm-up in steps."""
    out = []
    for t in range(T):
        if t < warmup:
            out.append((t + 1) / warmup)
        else:
            out.append(floor + (1 - floor) * half_cosine((t - warmup) / max(T - warmup, 1)))
    return np.array(out)


@cosine_schedule.law("half a cosine from 1 towards 0", T=st.integers(1, 8))
def _(f, T):
    line = np.array([1 - t / T for t in range(T)])
    wave = np.array([half_cosine(2 * t / T) for t in range(T)])
    early = np.array([half_cosine(t / max(T - 1, 1)) for t in range(T)])
    guesses = {"it reaches 0 at the last step, expected one step later": early,
               "it falls in a straight line": line, "it is a whole wave: down and up again": wave}
    close(factors(f, T), falling(T, 0), "the factors of T steps", guesses)


@cosine_schedule.law("it falls to the floor", T=st.integers(1, 8),
                     floor=st.sampled_from([0.5, 0.25]))
def _(f, T, floor):
    cut_off = falling(T, 0).clip(floor)
    guesses = {"it is cut off at the floor; the curve should be squeezed above it": cut_off}
    what = f"the factors of {T} steps, floor {floor}"
    close(factors(f, T, floor=floor), falling(T, 0, floor), what, guesses)


@cosine_schedule.law("a warm-up of w steps: 1/w, 2/w, ... 1, then the cosine",
                     T=st.integers(2, 8), w=st.integers(1, 4))
def _(f, T, w):
    from_zero = np.array([t / w if t < w else x for t, x in enumerate(falling(T, w))])
    guesses = {"the factor of the first step is 0, so that step is lost": from_zero}
    what = f"the factors of {T} steps, {w} of them warm-up"
    close(factors(f, T, warmup=w), falling(T, w), what, guesses)


@cosine_schedule.law("a warm-up below 1 is a fraction of all steps", T=st.sampled_from([4, 8]))
def _(f, T):
    what = f"the factors of {T} steps, half of them warm-up"
    close(factors(f, T, warmup=0.5), falling(T, T // 2), what)


WARMUPS = [named(T=8, warmup=0.45, w=4), named(T=8, warmup=0.3, w=2), named(T=5, warmup=0.05, w=0),
           named(T=3, warmup=0.5, w=2)]


@cosine_schedule.law("the fraction is rounded to whole steps", drawn=st.sampled_from(WARMUPS))
def _(f, drawn):
    T, fraction, w = drawn
    guesses = {"the fraction is cut off, expected rounded": falling(T, int(fraction * T)),
               "the fraction is rounded up": falling(T, math.ceil(fraction * T))}
    close(factors(f, T, warmup=fraction), falling(T, w),
          f"the factors of {T} steps, {fraction} of them warm-up", guesses)


@cosine_schedule.law("warm-up and floor together; the warm-up does not begin at the floor",
                     T=st.integers(2, 8), w=st.integers(1, 4), floor=st.sampled_from([0.5, 0.25]))
def _(f, T, w, floor):
    squeezed = floor + (1 - floor) * falling(T, w)
    guesses = {"the warm-up begins at the floor, expected at 0": squeezed,
               "with a warm-up, the floor is forgotten": falling(T, w)}
    close(factors(f, T, warmup=w, floor=floor), falling(T, w, floor),
          f"the factors of {T} steps, {w} of them warm-up, floor {floor}", guesses)


@cosine_schedule.law("one schedule serves any t and T, in any order", T=st.integers(1, 8),
                     other=st.integers(1, 8))
def _(f, T, other):
    schedule = f(warmup=0.25)
    for n in (T, other, T):
        backwards = np.array([schedule(t, n) for t in reversed(range(n))], float)
        close(backwards[::-1], falling(n, round(0.25 * n)),
              f"the factors of {n} steps, the last asked for first")


@cosine_schedule.law("a floor outside 0 ... 1 is a ValueError", floor=st.sampled_from([-0.5, 1.5]))
def _(f, floor):
    must_raise(ValueError, lambda: f(floor=floor), f"the floor is {floor}")


@cosine_schedule.law("a negative warm-up is a ValueError, and so are two and a half steps",
                     warmup=st.sampled_from([-1, -0.5, 2.5]))
def _(f, warmup):
    must_raise(ValueError, lambda: f(warmup=warmup), f"the warm-up is {warmup}")


def refuse_settings(warmup, floor):
    if warmup < 0 or (warmup > 1 and warmup % 1) or not 0 <= floor <= 1:
        raise ValueError


def steps_of(warmup, T):
    return round(warmup * T) if 0 < warmup < 1 else int(warmup)


@cosine_schedule.wrong_answer("The warm-up begins at zero.", says="is lost")
def _(warmup=0, floor=0.0):
    def factor(t, T):
        w = steps_of(warmup, T)
        return t / w if t < w else falling(T, w, floor)[t]
    return factor


@cosine_schedule.wrong_answer("The floor is a lower limit.", says="squeezed")
def _(warmup=0, floor=0.0):
    def factor(t, T):
        w = steps_of(warmup, T)
        return (t + 1) / w if t < w else max(floor, falling(T, w)[t])
    return factor


@cosine_schedule.wrong_answer("A cosine is a wave.", says="whole wave")
def _(warmup=0, floor=0.0):
    def factor(t, T):
        return floor + (1 - floor) * half_cosine(2 * t / T)
    return factor


@cosine_schedule.wrong_answer("A warm-up is a number of steps.",
                              says="factors of 4 steps, half")
def _(warmup=0, floor=0.0):
    def factor(t, T):
        return falling(T, int(warmup), floor)[t]
    return factor


@cosine_schedule.wrong_answer("A fraction of the steps is a whole number of steps.",
                              says="cut off")
def _(warmup=0, floor=0.0):
    def factor(t, T):
        return falling(T, int(warmup * T) if 0 < warmup < 1 else int(warmup), floor)[t]
    return factor


@cosine_schedule.wrong_answer("The factor is never below the floor.", says="begins at the floor",
                              subtle=True)
def _(warmup=0, floor=0.0):
    refuse_settings(warmup, floor)

    def factor(t, T):
        return floor + (1 - floor) * falling(T, steps_of(warmup, T))[t]
    return factor


@cosine_schedule.wrong_answer("T is a constant of the run, so it is read once.",
                              says="the last asked for first", subtle=True)
def _(warmup=0, floor=0.0):
    refuse_settings(warmup, floor)
    found = []

    def factor(t, T):
        found.append(T)
        w = steps_of(warmup, found[0])
        return falling(max(T, w), w, floor)[t]
    return factor


@cosine_schedule.wrong_answer("The last step has the factor of the floor.", says="at the last step")
def _(warmup=0, floor=0.0):
    def factor(t, T):
        w = steps_of(warmup, T)
        if t < w:
            return (t + 1) / w
        return floor + (1 - floor) * half_cosine((t - w) / max(T - 1 - w, 1))
    return factor


@cosine_schedule.wrong_answer("The cosine begins with the first step, below the warm-up.",
                              says="of them warm-up")
def _(warmup=0, floor=0.0):
    def factor(t, T):
        w = steps_of(warmup, T)
        return (t + 1) / w if t < w else falling(T, 0, floor)[t]
    return factor


@cosine_schedule.wrong_answer("A floor above 1 is only a strange choice.", says="the floor is",
                              subtle=True)
def _(warmup=0, floor=0.0):
    refuse_settings(warmup, 0.0)

    def factor(t, T):
        return falling(T, steps_of(warmup, T), floor)[t]
    return factor


@cosine_schedule.wrong_answer("Half a step is cut off.", says="the warm-up is 2.5", subtle=True)
def _(warmup=0, floor=0.0):
    refuse_settings(warmup if warmup <= 1 else int(warmup), floor)

    def factor(t, T):
        return falling(T, steps_of(warmup, T), floor)[t]
    return factor

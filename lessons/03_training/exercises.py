"""Lesson 03: the loss, its gradients held to a norm, and what Adam does with them."""
from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st

from tinyft import ops
from tinyft.array import asarray, asnumpy, xp
from tinyft.learn.diagnose import close
from tinyft.learn.exercise import Exercise
from tinyft.learn.references import probabilities
from tinyft.learn.sizes import array, integers, positive, sizes
from tinyft.optim.optimizers import adam_update as reference_update

# ── cross_entropy ─────────────────────────────────────────────────────────────────────────────────
cross_entropy = Exercise(
    "ops:cross_entropy", difficulty=4, minutes=30, closed=("functional:soft_cross_entropy",),
    hints=(
        "One law at a time: first the mean of -ln p at the labels, p = softmax z.  Take each row's "
        "maximum off before exp, as in softmax.",
        "Give every row a weight: 0 where y is ignore_index, else weight[y] or 1.  The loss is the "
        "weighted sum over the sum of the weights.  Its gradient is w (p - one-hot) over the same "
        "sum.",
        "Label smoothing is a target that is (1 - ε) at the label plus ε/V everywhere; the loss "
        "is -Σ target ln p.  z may have any axes in front: work on z.reshape(-1, V) and give the "
        "gradient z's shape again."))


@st.composite
def scored(draw, ignored=False):
    """(z, y): scores and labels of n rows; with `ignored`, some labels are -100 but not all."""
    n, v = draw(sizes()), draw(sizes())
    y = draw(array((n,), range(v), np.int64))
    if ignored:
        y = np.where(draw(array((n,), (False, True), bool)) & (np.arange(n) > 0), -100, y)
    return draw(array((n, v))), y


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


@cross_entropy.law("its gradient is (p − one-hot) / N", drawn=scored(), g=st.integers(1, 3))
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
    close(f(z, y, weight)[0], np.asarray((w * each).sum() / w.sum()), "the loss", guesses)


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
                   y=integers("a b", 0, 0))
def _(f, z, y):
    loss, (back, *_) = f(z, y)
    rows, labels = z.reshape(-1, z.shape[-1]), y.reshape(-1)
    close(loss, np.asarray(losses(rows, labels).mean()), "the loss")
    close(back(np.asarray(1.0)),
          ((probabilities(rows) - (np.arange(z.shape[-1]) == 0)) / len(rows)).reshape(z.shape),
          "the gradient of z")


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


@cross_entropy.wrong_answer("The mean is over all rows.", says="to be ignored too", subtle=True)
def _(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):
    share = float((y != ignore_index).sum()) / y.size
    return scaled(z, y, weight, ignore_index, label_smoothing, share, share)


@cross_entropy.wrong_answer("Weights multiply; what one divides by is the number of rows.",
                            says="sum of their weights", subtle=True)
def _(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):
    share = 1.0 if weight is None else float(weight[y].sum()) / y.size
    return scaled(z, y, weight, ignore_index, label_smoothing, share, share)


@cross_entropy.wrong_answer("Smoothing takes from the label and gives to the others.",
                            says="label too", subtle=True)
def _(z, y, weight=None, ignore_index=-100, label_smoothing=0.0):
    V = z.shape[-1]
    return ops.cross_entropy.definition(z, y, weight, ignore_index,
                                        label_smoothing * V / max(V - 1, 1))


# ── clip_norm ─────────────────────────────────────────────────────────────────────────────────────
clip_norm = Exercise(
    "optim.optimizers:clip_norm", difficulty=2, minutes=10, in_place=True, hints=(
        "All gradients together are one long vector.  Its norm decides, and one factor scales all "
        "of it, so that the direction stays.",
        "The factor is limit / norm, but never more than 1: a short gradient stays as it is.  "
        "Write into the arrays: g *= factor.",
        "norm = sqrt(sum of (g * g).sum() over the arrays), computed before anything is scaled; "
        "then min(limit / (norm + 1e-6), 1.0) for all of them."))


def clipped(f, arrays, limit):
    """(what f returns, all gradients after it, as one vector)."""
    mine = [asarray(a.copy()) for a in arrays]
    norm = f(mine, limit)
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
    close(clipped(f, (a, b), limit)[0], want, "the norm", guesses, rtol=1e-5)


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
               "each entry is clipped, which turns the gradient": g.clip(-limit, limit)}
    want = g * min(1.0, limit / (norm_of(g) + 1e-6))
    after = clipped(f, (a, b), limit)[1]
    close(after, want, "the gradients, for the limit 0.5", guesses, rtol=1e-5)


def common_norm(gradients):
    return xp(gradients[0]).sqrt(sum((g * g).sum() for g in gradients))


@clip_norm.wrong_answer("Every array is clipped by itself.", says="own norm", subtle=True)
def _(gradients, limit):
    norm = common_norm(gradients)
    for g in gradients:
        if limit is not None:
            g *= xp(g).minimum(limit / (common_norm([g]) + 1e-6), 1.0)
    return norm


@clip_norm.wrong_answer("Clipping is cutting off what is too large.",
                        says="each entry", subtle=True)
def _(gradients, limit):
    norm = common_norm(gradients)
    for g in gradients:
        if limit is not None:
            g[...] = xp(g).clip(g, -limit, limit)
    return norm


@clip_norm.wrong_answer("The norm to report is that of the gradients that are used.",
                   says="after clipping", subtle=True)
def _(gradients, limit):
    norm = common_norm(gradients)
    if limit is not None:
        for g in gradients:
            g *= xp(g).minimum(limit / (norm + 1e-6), 1.0)
    return common_norm(gradients)


@clip_norm.wrong_answer("Clipping gives the gradient the norm `limit`.",
                        says="the gradients", subtle=True)
def _(gradients, limit):
    norm = common_norm(gradients)
    if limit is not None:
        for g in gradients:
            g *= limit / (norm + 1e-6)
    return norm


# ── adam_update ───────────────────────────────────────────────────────────────────────────────────
adam_update = Exercise(
    "optim.optimizers:adam_update", difficulty=3, minutes=20, in_place=True, hints=(
        "m and v are running means of g and g²: b1 m + (1 - b1) g, and the same with b2 and g².  "
        "Everything is written into w, m and v; nothing is returned.",
        "m and v begin at zero, so at first they are too small: m / (1 - b1**t) and v / (1 - "
        "b2**t) correct that.  t counts from 1.",
        "The decay does not enter m and v: w ← w (1 - lr decay).  Then w ← w - lr m̂ / (√v̂ + ε): "
        "first the root, then ε."))

LR, B1, B2 = 0.5, 0.75, 0.9375


def step(f, w, g, m, v, eps=1e-8, decay=0.0, t=1):
    """w, m and v after one update."""
    mine = [asarray(a.copy()) for a in (w, g, m, v)]
    f(*mine, LR, B1, B2, eps, decay, t)
    return [asnumpy(a) for a in (mine[0], mine[2], mine[3])]


def adam(w, g, m, v, eps=1e-8, decay=0.0, t=1, corrected=True, inside=False):
    """w after one update by the equations, with the usual errors in them on demand."""
    m = B1 * m + (1 - B1) * g
    v = B2 * v + (1 - B2) * g * g
    if corrected:
        m = m / (1 - B1**t)
        v = v / (1 - B2**t)
    divisor = np.sqrt(v + eps) if inside else np.sqrt(v) + eps
    return w - LR * (m / divisor + decay * w)


UNCORRECTED = "the bias of m and v is not corrected: divide by 1 − b1ᵗ and 1 − b2ᵗ"


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
    guesses = {UNCORRECTED: adam(w, g, zero, zero, corrected=False),
               "it goes uphill": w + LR * np.sign(g)}
    close(step(f, w, g, zero, zero)[0], w - LR * np.sign(g), "w", guesses, rtol=1e-5, atol=1e-6)


@adam_update.law("step t: w − η m̂ / (√v̂ + ε)", w="n", g="n", m="n", v=positive("n"),
                 t=st.integers(1, 5))
def _(f, w, g, m, v, t):
    guesses = {UNCORRECTED: adam(w, g, m, v, t=t, corrected=False)}
    close(step(f, w, g, m, v, t=t)[0], adam(w, g, m, v, t=t), "w", guesses)


@adam_update.law("ε is added after the root", w="n", g="n", m="n", v=positive("n"))
def _(f, w, g, m, v):
    guesses = {"ε stands under the root": adam(w, g, m, v, eps=1.0, inside=True)}
    close(step(f, w, g, m, v, eps=1.0)[0], adam(w, g, m, v, eps=1.0), "w for ε = 1", guesses)


@adam_update.law("the decay takes lr · decay · w from w, and does not enter m and v",
                 w="n", g="n", m="n", v=positive("n"))
def _(f, w, g, m, v):
    w1, m1, _ = step(f, w, g, m, v, decay=0.5)
    inside = adam(w, g + 0.5 * w, m, v)
    guesses = {"the decay is inside the gradient (Adam with L2, which Adam then divides by √v̂); "
               "AdamW takes it off w": inside}
    close(w1, adam(w, g, m, v, decay=0.5), "w for decay = 0.5", guesses)
    close(m1, B1 * m + (1 - B1) * g, "m for decay = 0.5")


@adam_update.wrong_answer("m and v are means already; there is nothing to correct.", says="bias")
def _(w, g, m, v, lr, b1, b2, eps, decay, t):
    m *= b1
    m += (1 - b1) * g
    v *= b2
    v += (1 - b2) * (g * g)
    w *= 1 - lr * decay
    w -= lr * m / (xp(w).sqrt(v) + eps)


@adam_update.wrong_answer("Weight decay is L2 regularisation: add it to the gradient.",
                     says="inside the gradient", subtle=True)
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


# ── cosine_schedule ───────────────────────────────────────────────────────────────────────────────
cosine_schedule = Exercise(
    "optim.schedules:cosine_schedule", difficulty=2, minutes=10,
    closed=("optim.schedules:with_warmup", "optim.schedules:WarmUp"), hints=(
        "cosine_schedule returns a function factor(t, T).  During the first `warmup` steps the "
        "factor rises in a straight line, and it reaches 1 at the last of them.",
        "Step t = 0 is the first, and should already move: (t + 1) / warmup.  Afterwards let s run "
        "from 0 towards 1: s = (t - warmup) / (T - warmup).",
        "floor + (1 - floor) (1 + cos(π s)) / 2.  A warmup below 1 is a fraction of all steps: "
        "round(warmup T)."))


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
    guesses = {"it falls in a straight line": line, "it is a whole wave: down and up again": wave}
    close(factors(f, T), falling(T, 0), f"the factors of {T} steps", guesses)


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


def steps_of(warmup, T):
    return round(warmup * T) if 0 < warmup < 1 else int(warmup)


@cosine_schedule.wrong_answer("The warm-up begins at zero.", says="is lost")
def _(warmup=0, floor=0.0):
    def factor(t, T):
        w = steps_of(warmup, T)
        return t / w if t < w else falling(T, w, floor)[t]
    return factor


@cosine_schedule.wrong_answer("The floor is a lower limit.", says="squeezed", subtle=True)
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
                              says="factors of 4 steps, half", subtle=True)
def _(warmup=0, floor=0.0):
    def factor(t, T):
        return falling(T, int(warmup), floor)[t]
    return factor

"""Lesson 23, the appendix: layer norm in plain loops, forward and back."""
from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from tinyft import ops
from tinyft.learn.diagnose import Unusable, close, described
from tinyft.learn.exercise import Exercise

F = np.float32
LOOPS = "learn.loops:"


class Single(np.ndarray):
    """An array of which only single numbers may be computed with: an op on a row or on the whole
    array raises Unusable.
    """

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        raise Unusable("it computes with a row or with the whole array "
                       f"(np.{ufunc.__name__}): write a loop over j, and compute with the single "
                       "numbers x[i, j]")


def single(*arrays):
    return [a.view(Single) for a in arrays]


def three(out, names):
    """The three arrays that the learner's function returned."""
    if not (isinstance(out, tuple) and len(out) == 3):
        raise Unusable(f"three arrays are wanted, ({names}); yours is {described(out)}")
    return tuple(np.asarray(a) if isinstance(a, Single) else a for a in out)


def normal(x, eps, ddof=0):
    """(x̂, mean, 1/σ) of each row; the last two (N, 1)."""
    first = x[:, :1]
    mean = first + (x - first).mean(axis=1, keepdims=True)
    c = x - mean
    inverse = 1 / np.sqrt((c * c).sum(axis=1, keepdims=True) / max(x.shape[1] - ddof, 1) + eps)
    return c * inverse, mean, inverse


# ── layer_norm_rows ───────────────────────────────────────────────────────────────────────────────
layer_norm_rows = Exercise(
    f"{LOOPS}layer_norm_rows", difficulty=2, minutes=20, on_host=True,
    may_use="for and range; + − * / of single numbers; math.sqrt; np.empty_like(x) for y, and "
            "np.empty(rows, x.dtype) for an array with a number for each row.",
    example="""
        >>> x = np.array([[1.0, 3.0], [5.0, 5.0]])
        >>> w = np.array([1.0, 10.0])
        >>> b = np.array([0.0, 5.0])
        >>> y, means, inverses = layer_norm_rows(x, w, b, eps=0.25)
        >>> print(y.round(2))
        [[-0.89 13.94]
         [ 0.    5.  ]]
        >>> print(means, inverses.round(2))
        [2. 5.] [0.89 2.  ]
        """,
    hints=(
        "A loop over the rows i, and in it three loops over j, one after another: the sum for the "
        "mean, the sum for the variance, and the outputs.  Each sum begins with 0 in every row.",
        "The mean comes first, and the variance is the sum of (x[i, j] − mean)² over n.  Σ x² / n "
        "− mean² needs one loop less, but it loses its digits where the mean is large.",
        "For a row of equal numbers, add up x[i, j] − x[i, 0] instead of x[i, j]: mean = x[i, 0] "
        "+ total / n.  Then inverse = 1 / math.sqrt(squares / n + eps), and y[i, j] = (x[i, j] − "
        "mean) * inverse * w[j] + b[j]."))
RESULT = "y, means, inverses"
TINY = 1e-12


@layer_norm_rows.law("y is the definition's: x̂ w + b", x="r n", w="n", b="n")
def _(f, x, w, b):
    y = three(f(x, w, b, TINY), RESULT)[0]
    h = normal(x, TINY)[0]
    running = np.cumsum(x, axis=0)                       # sums that go on from row to row
    guesses = {"the variance is divided by n − 1, as of a sample; here it is by n":
                   normal(x, TINY, 1)[0] * w + b,
               "b is missing": h * w, "w is missing": h + b,
               "a row's sum goes on with that of the row before: set it to 0 in every row":
                   carried(x, w, b, running)}
    close(y, h * w + b, "y", guesses, 1e-4, 1e-4)


def carried(x, w, b, running):
    """y if the sum of a row's entries begins with that of the row before."""
    rows, n = x.shape
    mean = running.sum(axis=1, keepdims=True) / n
    c = x - mean
    return c / np.sqrt((c * c).mean(axis=1, keepdims=True) + TINY) * w + b


@layer_norm_rows.law("ε is added to the variance, under the root; it is 1e-5 by default", x="r n",
                     w="n", b="n", eps=st.sampled_from([None, 0.25, 1.0, 4.0]))
def _(f, x, w, b, eps):
    y = three(f(x, w, b) if eps is None else f(x, w, b, eps), RESULT)[0]
    added = 1e-5 if eps is None else eps
    h, _, inverse = normal(x, added)
    sigma = np.sqrt(np.maximum(1 / inverse**2 - added, 0))
    guesses = {"ε is added to σ; it belongs to σ², under the root":
                   h / inverse / (sigma + added) * w + b,
               "ε is 1e-5, whatever eps is": normal(x, 1e-5)[0] * w + b}
    close(y, h * w + b, f"y for ε = {added}", guesses, 1e-6, 1e-6)


@layer_norm_rows.law("the mean and 1/σ of each row", x="r n", w="n", b="n",
                     eps=st.sampled_from([0.25, 1.0]))
def _(f, x, w, b, eps):
    _, means, inverses = three(f(x, w, b, eps), RESULT)
    _, mean, inverse = normal(x, eps)
    close(means, mean[:, 0], "means", {"it is the sum of the row: divide it by n": x.sum(axis=1)})
    guesses = {"it is σ; wanted is 1/σ": 1 / inverse[:, 0],
               "it is 1/σ²: the root is missing": inverse[:, 0]**2,
               "ε is missing": 1 / np.sqrt(np.maximum(x.var(axis=1), 1e-300))}
    close(inverses, inverse[:, 0], f"inverses for ε = {eps}", guesses)


@layer_norm_rows.law("a large mean beside a small σ: in float32, x + 4096 has the x̂ of x",
                     x="r n", w="n", b="n")
def _(f, x, w, b):
    far = (x + 4096).astype(F)
    want = (normal(x, 0.01)[0] * w + b).astype(F)
    y = three(f(far, w.astype(F), b.astype(F), 0.01), RESULT)[0]
    far_error = np.abs(np.asarray(y, np.float64) - want).max() if np.shape(y) == want.shape else 0
    if far_error > 0.1:
        raise Unusable(f"for x + 4096 in float32, y is wrong by {far_error:.2g}: squares near "
                       "4096² = 16,777,216 have no digits left for the variance.  Subtract the "
                       "mean before you square")
    close(y, want, "y for x + 4096", rtol=0.02, atol=0.02)


@layer_norm_rows.law("a row of equal numbers gives y = b exactly: no rounding is left", w="n",
                     b="n")
def _(f, w, b):
    w = np.tile(w, 3)
    b = np.tile(b, 3)
    x = np.full((1, len(w)), 0.1)
    y = three(f(x, w, b), RESULT)[0]
    message = ("the mean of three times 0.1 is rounded, so x − mean is not 0: add up x[i, j] − "
               "x[i, 0] for the mean")
    near = np.shape(y) == x.shape and np.allclose(y, b, 0, 1e-6)
    close(y, b[None], "y for x = 0.1 everywhere", {message: y} if near else None, 0, 0)


@layer_norm_rows.law("float32 stays float32", x="r n", w="n", b="n")
def _(f, x, w, b):
    h, mean, inverse = normal(x, 1.0)
    out = three(f(x.astype(F), w.astype(F), b.astype(F), 1.0), RESULT)
    for a, want, name in zip(out, (h * w + b, mean[:, 0], inverse[:, 0]), RESULT.split(", ")):
        close(a, want.astype(F), name, None, 1e-4, 1e-4, dtype=True)


@layer_norm_rows.law("it computes with single numbers only, as a compiler wants it", x="r n",
                     w="n", b="n")
def _(f, x, w, b):
    y = three(f(*single(x, w, b), 1.0), RESULT)[0]
    close(y, normal(x, 1.0)[0] * w + b, "y for ε = 1")


def rows_of(x, w, b, eps, mean_of, variance_of, add=None):
    """The answer, with the errors of `mean_of` and `variance_of` in it.

    mean_of(row), variance_of(row, mean): of one row, a list of numbers.
    """
    y = np.empty_like(x)
    means = np.empty(len(x), x.dtype)
    inverses = np.empty(len(x), x.dtype)
    for i in range(len(x)):
        row = [x[i, j] for j in range(x.shape[1])]
        means[i] = mean = mean_of(row)
        inverses[i] = inverse = 1 / np.sqrt(variance_of(row, mean) + eps)
        for j in range(x.shape[1]):
            y[i, j] = (row[j] - mean) * inverse * w[j] + b[j]
    return y, means, inverses


def right_mean(row):
    return row[0] + sum(a - row[0] for a in row) / len(row)


def right_variance(row, mean):
    return sum((a - mean)**2 for a in row) / len(row)


@layer_norm_rows.wrong_answer("The variance of a sample has n − 1 below.", says="n − 1")
def _(x, w, b, eps=1e-5):
    def variance_of(row, mean):
        return right_variance(row, mean) * len(row) / max(len(row) - 1, 1)
    return rows_of(x, w, b, eps, right_mean, variance_of)


@layer_norm_rows.wrong_answer("ε keeps the divisor from zero, so it is added to the divisor.",
                              says="under the root")
def _(x, w, b, eps=1e-5):
    y, means, inverses = rows_of(x, w, b, 1e-30, right_mean, right_variance)
    for i in range(len(x)):
        inverse = 1 / (1 / inverses[i] + eps)
        for j in range(x.shape[1]):
            y[i, j] = (x[i, j] - means[i]) * inverse * w[j] + b[j]
        inverses[i] = inverse
    return y, means, inverses


@layer_norm_rows.wrong_answer("The variance is the mean of the squares less the square of the "
                              "mean: one loop less.", says="Subtract the mean", subtle=True)
def _(x, w, b, eps=1e-5):
    def variance_of(row, mean):
        total = x.dtype.type(0)
        for a in row:
            total += a * a
        return max(total / len(row) - mean * mean, x.dtype.type(0))
    return rows_of(x, w, b, eps, right_mean, variance_of)


@layer_norm_rows.wrong_answer("After the scale nothing is left to add.", says="b is missing")
def _(x, w, b, eps=1e-5):
    return rows_of(x, w, 0 * np.asarray(b), eps, right_mean, right_variance)


@layer_norm_rows.wrong_answer("A row is normalised, and that is all.", says="w is missing")
def _(x, w, b, eps=1e-5):
    return rows_of(x, 0 * np.asarray(w) + 1, b, eps, right_mean, right_variance)


@layer_norm_rows.wrong_answer("A sum begins with 0 before the loops.", says="in every row")
def _(x, w, b, eps=1e-5):
    total = [0.0]

    def mean_of(row):
        for a in row:
            total[0] += a
        return total[0] / len(row)
    return rows_of(x, w, b, eps, mean_of, right_variance)


@layer_norm_rows.wrong_answer("Equal numbers less their mean are 0.", says="is rounded",
                              subtle=True)
def _(x, w, b, eps=1e-5):
    def mean_of(row):
        return sum(row) / len(row)
    return rows_of(x, w, b, eps, mean_of, right_variance)


@layer_norm_rows.wrong_answer("The way back divides by σ, so σ is kept.", says="wanted is 1/σ")
def _(x, w, b, eps=1e-5):
    y, means, inverses = rows_of(x, w, b, eps, right_mean, right_variance)
    return y, means, 1 / inverses


@layer_norm_rows.wrong_answer("What was subtracted is the first entry, so squares are about it.",
                              says="the worst")
def _(x, w, b, eps=1e-5):
    def variance_of(row, mean):
        return sum((a - row[0])**2 for a in row) / len(row)
    return rows_of(x, w, b, eps, right_mean, variance_of)


@layer_norm_rows.wrong_answer("ε is a constant of the library.", says="whatever eps is")
def _(x, w, b, eps=1e-5):
    return rows_of(x, w, b, 1e-5, right_mean, right_variance)


@layer_norm_rows.wrong_answer("np.empty(n) has the dtype of its neighbours.",
                              says="the dtype is float64", subtle=True)
def _(x, w, b, eps=1e-5):
    y, means, inverses = rows_of(x, w, b, eps, right_mean, right_variance)
    return y, means.astype(np.float64), inverses.astype(np.float64)


@layer_norm_rows.wrong_answer("A loop over the rows is loop enough; mean() does the rest.",
                              says="single numbers", subtle=True)
def _(x, w, b, eps=1e-5):
    y = np.empty_like(x)
    means = np.empty(len(x), x.dtype)
    inverses = np.empty(len(x), x.dtype)
    for i in range(len(x)):
        means[i] = mean = x[i, 0] + (x[i] - x[i, 0]).mean()
        inverses[i] = inverse = 1 / np.sqrt(((x[i] - mean)**2).mean() + eps)
        y[i] = (x[i] - mean) * inverse * w + b
    return y, means, inverses


# ── layer_norm_rows_backward ──────────────────────────────────────────────────────────────────────
layer_norm_rows_backward = Exercise(
    f"{LOOPS}layer_norm_rows_backward", difficulty=3, minutes=25, on_host=True,
    may_use="for and range; + − * / of single numbers; np.empty_like(x) for dx, and np.zeros(n, "
            "x.dtype) for dw and db.",
    example="""
        >>> g = np.array([[1.0, 2.0]])
        >>> x = np.array([[1.0, 3.0]])
        >>> w = np.array([1.0, 10.0])
        >>> dx, dw, db = layer_norm_rows_backward(g, x, w, np.array([2.0]), np.array([0.5]))
        >>> print(dx, dw, db)
        [[-3.5625  3.5625]] [-0.5  1. ] [1. 2.]
        """,
    hints=(
        "A loop over the rows i, and in it two loops over j.  The first adds up e and e x̂ of the "
        "row; dw[j] and db[j] grow in the same loop.  The second computes dx, which needs both "
        "sums.",
        "x̂ is (x[i, j] − means[i]) * inverses[i], and e is g[i, j] * w[j].  The sums of e and e "
        "x̂ begin with 0 in every row; dw and db begin with 0 once, before the rows.",
        "dx[i, j] = (e − sum_e / n − x̂ * sum_ex / n) * inverses[i];  dw[j] += g[i, j] * x̂;  "
        "db[j] += g[i, j]."))
GRADIENTS = "dx, dw, db"
EPS = 1.0


def back(f, g, x, w):
    """The three gradients of f, for the means and 1/σ of x."""
    _, mean, inverse = normal(np.asarray(x, np.float64), EPS)
    rest = [a[:, 0].astype(x.dtype) for a in (mean, inverse)]
    if isinstance(x, Single):
        rest = single(*rest)
    return three(f(g, x, w, *rest), GRADIENTS)


def right_gradients(g, x, w):
    """(dx, dw, db) by the definition of the library."""
    _, (dx, dw, db) = ops.layer_norm.definition(x, w, 0 * w, eps=EPS)
    return dx(g), dw(g).sum(axis=0), db(g).sum(axis=0)


@layer_norm_rows_backward.law("dx is the definition's", g="r n", x="r n", w="n")
def _(f, g, x, w):
    h, _, inverse = normal(x, EPS)
    e = g * w
    r, n = x.shape
    mean_e = e.mean(axis=1, keepdims=True)
    mean_eh = (e * h).mean(axis=1, keepdims=True)
    guesses = {"the mean moves with x in it, σ does not: the term with x̂ is missing":
                   (e - mean_e) * inverse,
               "σ moves with x in it, the mean does not: mean(e) is missing":
                   (e - h * mean_eh) * inverse,
               "it is e / σ: the mean and σ depend on x too": e * inverse,
               "w is missing: e is g w":
                   (g - g.mean(axis=1, keepdims=True)
                    - h * (g * h).mean(axis=1, keepdims=True)) * inverse,
               "the factor 1/σ is missing": e - mean_e - h * mean_eh,
               "the sums are divided by the number of rows; the means are along a row":
                   (e - n / r * mean_e - h * n / r * mean_eh) * inverse,
               "a row's sums go on with those of the row before: set them to 0 in every row":
                   (e - np.cumsum(mean_e, axis=0) - h * np.cumsum(mean_eh, axis=0)) * inverse}
    close(back(f, g, x, w)[0], right_gradients(g, x, w)[0], "dx", guesses)


@layer_norm_rows_backward.law("dw is the sum of g x̂ over the rows", g="r n", x="r n", w="n")
def _(f, g, x, w):
    h, _, inverse = normal(x, EPS)
    guesses = {"it is the sum of g x: what w is multiplied with is x̂": (g * x).sum(axis=0),
               "it is the sum of g (x − mean): 1/σ is missing": (g * h / inverse).sum(axis=0),
               "it is the sum of g: x̂ is missing": g.sum(axis=0),
               "it is that of the last row: add with +=": (g * h)[-1],
               "it is the sum of g w x̂: w is a factor too many": (g * w * h).sum(axis=0)}
    close(back(f, g, x, w)[1], right_gradients(g, x, w)[1], "dw", guesses)


@layer_norm_rows_backward.law("db is the sum of g over the rows", g="r n", x="r n", w="n")
def _(f, g, x, w):
    guesses = {"it is that of the last row: add with +=": g[-1],
               "it is the sum of g w: b is not multiplied with w": (g * w).sum(axis=0),
               "it is the mean over the rows, expected the sum": g.mean(axis=0)}
    close(back(f, g, x, w)[2], right_gradients(g, x, w)[2], "db", guesses)


@layer_norm_rows_backward.law("float32 stays float32", g="r n", x="r n", w="n")
def _(f, g, x, w):
    out = back(f, g.astype(F), x.astype(F), w.astype(F))
    for a, want, name in zip(out, right_gradients(g, x, w), GRADIENTS.split(", ")):
        close(a, want.astype(F), name, None, 1e-4, 1e-4, dtype=True)


@layer_norm_rows_backward.law("it computes with single numbers only, as a compiler wants it",
                              g="r n", x="r n", w="n")
def _(f, g, x, w):
    close(back(f, *single(g, x, w))[0], right_gradients(g, x, w)[0], "dx")


def gradients(g, x, w, means, inverses, *, at_e=1, at_ex=1, by=None, reset=True):
    """The answer, with the usual errors in it on demand.

    at_e, at_ex: factors of the two means in dx.  by: what their sums are divided by, instead of n.
    reset: False if the sums go on from row to row.
    """
    rows, n = x.shape
    dx = np.empty_like(x)
    dw = np.zeros(n, x.dtype)
    db = np.zeros(n, x.dtype)
    sum_e = 0.0
    sum_ex = 0.0
    for i in range(rows):
        h = [(x[i, j] - means[i]) * inverses[i] for j in range(n)]
        e = [g[i, j] * w[j] for j in range(n)]
        sum_e = sum(e) + (0.0 if reset else sum_e)
        sum_ex = sum(e[j] * h[j] for j in range(n)) + (0.0 if reset else sum_ex)
        for j in range(n):
            means_off = at_e * sum_e / (by or n) + at_ex * h[j] * sum_ex / (by or n)
            dx[i, j] = (e[j] - means_off) * inverses[i]
            dw[j] += g[i, j] * h[j]
            db[j] += g[i, j]
    return dx, dw, db


@layer_norm_rows_backward.wrong_answer("Only the mean moves with x; σ is a scale.",
                                       says="σ does not")
def _(g, x, w, means, inverses):
    return gradients(g, x, w, means, inverses, at_ex=0)


@layer_norm_rows_backward.wrong_answer("The mean is a constant: its gradient is 0.",
                                       says="mean(e) is missing")
def _(g, x, w, means, inverses):
    return gradients(g, x, w, means, inverses, at_e=0)


@layer_norm_rows_backward.wrong_answer("x̂ is x times 1/σ, so the gradient is too.",
                                       says="depend on x too")
def _(g, x, w, means, inverses):
    return gradients(g, x, w, means, inverses, at_e=0, at_ex=0)


@layer_norm_rows_backward.wrong_answer("A sum begins with 0 before the loops.",
                                       says="in every row")
def _(g, x, w, means, inverses):
    return gradients(g, x, w, means, inverses, reset=False)


@layer_norm_rows_backward.wrong_answer("A mean is over the rows.", says="the number of rows")
def _(g, x, w, means, inverses):
    return gradients(g, x, w, means, inverses, by=len(x))


@layer_norm_rows_backward.wrong_answer("The gradient that arrives is that of x̂.",
                                       says="e is g w")
def _(g, x, w, means, inverses):
    dx, _, _ = gradients(g, x, np.ones_like(w), means, inverses)
    return dx, *gradients(g, x, w, means, inverses)[1:]


@layer_norm_rows_backward.wrong_answer("x̂ holds 1/σ already, so dx needs it no more.",
                                       says="factor 1/σ is missing")
def _(g, x, w, means, inverses):
    dx, dw, db = gradients(g, x, w, means, inverses)
    for i in range(len(x)):
        for j in range(len(w)):
            dx[i, j] /= inverses[i]
    return dx, dw, db


@layer_norm_rows_backward.wrong_answer("w is multiplied with x.", says="with is x̂")
def _(g, x, w, means, inverses):
    dx, dw, db = gradients(g, x, w, means, inverses)
    for j in range(len(w)):
        dw[j] = sum(g[i, j] * x[i, j] for i in range(len(x)))
    return dx, dw, db


@layer_norm_rows_backward.wrong_answer("The gradient of w is g.", says="x̂ is missing")
def _(g, x, w, means, inverses):
    dx, _, db = gradients(g, x, w, means, inverses)
    return dx, db.copy(), db


@layer_norm_rows_backward.wrong_answer("The mean may be forgotten where 1/σ is a factor.",
                                       says="dw")
def _(g, x, w, means, inverses):
    dx, dw, db = gradients(g, x, w, means, inverses)
    for j in range(len(w)):
        dw[j] = sum(g[i, j] * (x[i, j] * inverses[i]) for i in range(len(x)))
    return dx, dw, db


@layer_norm_rows_backward.wrong_answer("Every row has its gradient of w, which is written to dw.",
                                       says="add with +=")
def _(g, x, w, means, inverses):
    dx, dw, db = gradients(g, x, w, means, inverses)
    last = len(x) - 1
    for j in range(len(w)):
        dw[j] = g[last, j] * (x[last, j] - means[last]) * inverses[last]
    return dx, dw, db


@layer_norm_rows_backward.wrong_answer("b goes through w.", says="not multiplied with w")
def _(g, x, w, means, inverses):
    dx, dw, db = gradients(g, x, w, means, inverses)
    for j in range(len(w)):
        db[j] *= w[j]
    return dx, dw, db


@layer_norm_rows_backward.wrong_answer("A gradient is a mean.", says="expected the sum")
def _(g, x, w, means, inverses):
    dx, dw, db = gradients(g, x, w, means, inverses)
    for j in range(len(w)):
        db[j] /= len(x)
    return dx, dw, db


@layer_norm_rows_backward.wrong_answer("np.zeros(n) has the dtype of its neighbours.",
                                       says="the dtype is float64", subtle=True)
def _(g, x, w, means, inverses):
    dx, dw, db = gradients(g, x, w, means, inverses)
    return dx, dw.astype(np.float64), db.astype(np.float64)


@layer_norm_rows_backward.wrong_answer("A loop over the rows is loop enough.",
                                       says="single numbers", subtle=True)
def _(g, x, w, means, inverses):
    dx = np.empty_like(x)
    dw = np.zeros(len(w), x.dtype)
    db = np.zeros(len(w), x.dtype)
    for i in range(len(x)):
        h = (x[i] - means[i]) * inverses[i]
        e = g[i] * w
        dx[i] = (e - e.mean() - h * (e * h).mean()) * inverses[i]
        dw += g[i] * h
        db += g[i]
    return dx, dw, db

"""Lesson 01: undoing broadcasting, and three ops with their pullbacks.

The walk through the graph: exercises_graphs.py.
"""
from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from tinyft import ops
from tinyft.learn.diagnose import close, host, undo_broadcasting
from tinyft.learn.exercise import Exercise
from tinyft.learn.references import numerical_gradient, probabilities
from tinyft.learn.sizes import array, positive, sizes

# ── sum_to ────────────────────────────────────────────────────────────────────────────────────────
sum_to = Exercise(
    "tensor:sum_to", difficulty=2, minutes=10, hints=(
        "NumPy repeats an array in two ways: it puts new axes in front, and it stretches axes of "
        "length one.  Every copy of an entry has a gradient of its own, and they add up.",
        "First sum away the axes in front, of which g has g.ndim - len(shape).  Then sum along "
        "each axis where shape has 1 and g has more.",
        "g.sum(axis=(0, 1)) sums over two axes at once, over none with axis=(); keepdims=True "
        "leaves an axis of length one where the sum was."))


@st.composite
def repeated(draw):
    """(shape, g): g has a shape to which `shape` broadcasts."""
    front = [draw(sizes()) for _ in range(draw(st.integers(0, 2)))]
    own = [draw(sizes()) for _ in range(draw(st.integers(0, 2)))]
    shape = tuple(n if draw(st.booleans()) else 1 for n in own)
    return shape, draw(array((*front, *own)))


def added_one_by_one(g, shape):
    """The gradient of an input of this shape, one entry of g at a time."""
    want = np.zeros(shape)
    for i in np.ndindex(g.shape):
        own = i[g.ndim - len(shape):]
        want[tuple(0 if n == 1 else k for k, n in zip(own, shape))] += g[i]
    return want


@sum_to.law("a gradient that has the shape already stays as it is", g="n m")
def _(f, g):
    close(f(g, g.shape), g)


@sum_to.law("new axes in front are summed away", g="k n m")
def _(f, g):
    close(f(g, g.shape[1:]), g.sum(axis=0),
          guesses={"it is the gradient of one copy; the copies add up": g[0]})


@sum_to.law("an axis of length one that was repeated stays, and its copies add up",
            g="n m")
def _(f, g):
    one_copy = "it is the gradient of one copy; the copies add up"
    rows = (1, g.shape[1])
    close(f(g, rows), g.sum(axis=0, keepdims=True), f"sum_to(g, {rows})", {one_copy: g[:1]})
    columns = (g.shape[0], 1)
    close(f(g, columns), g.sum(axis=1, keepdims=True), f"sum_to(g, {columns})",
          {one_copy: g[:, :1]})


@sum_to.law("both at once, in any number: every entry of g is added where it came from",
            drawn=repeated())
def _(f, drawn):
    shape, g = drawn
    close(f(g, shape), added_one_by_one(g, shape))


@sum_to.law("an axis of length zero that was repeated leaves zeros", g="n m")
def _(f, g):
    none = g[:0]
    close(f(none, g.shape[1:]), np.zeros(g.shape[1:]), f"sum_to(g, {g.shape[1:]}) for an empty g")


@sum_to.law("float32 stays float32, and float64 keeps all its digits", g="n m")
def _(f, g):
    single = g.astype(np.float32)
    row = (1, g.shape[1])
    close(f(single, row), single.sum(axis=0, keepdims=True), rtol=1e-5, atol=1e-5)
    close(f(g / 3, row), (g / 3).sum(axis=0, keepdims=True), "sum_to(g / 3, ...)")


@sum_to.wrong_answer("Copies share the gradient, so take their mean.", says="a mean for a sum")
def _(g, shape):
    g = g.mean(axis=tuple(range(g.ndim - len(shape))))
    return g.mean(axis=tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1),
                  keepdims=True)


@sum_to.wrong_answer("All copies hold the same number, so one of them speaks for all.",
                     says="one copy")
def _(g, shape):
    g = g[(0,) * (g.ndim - len(shape))]
    return g[tuple(slice(0, 1) if n == 1 else slice(None) for n in shape)]


@sum_to.wrong_answer("Summing along an axis is summing along an axis.", says="its shape is")
def _(g, shape):
    g = g.sum(axis=tuple(range(g.ndim - len(shape))))
    return g.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1))


@sum_to.wrong_answer("Either axes were put in front or some were stretched, never both.",
                     says="not summed", subtle=True)
def _(g, shape):
    if g.ndim > len(shape):
        return g.sum(axis=tuple(range(g.ndim - len(shape))))
    return g.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1),
                 keepdims=True)


@sum_to.wrong_answer("An array of zeros is an array of zeros.", says="dtype is float64",
                     subtle=True)
def _(g, shape):
    return added_one_by_one(g, shape)


@sum_to.wrong_answer("Single precision is enough inside.", says="six digits", subtle=True)
def _(g, shape):
    return added_one_by_one(g.astype(np.float32), shape).astype(np.float32).astype(g.dtype)


@sum_to.wrong_answer("Gradients are counted, so integers will do.", says="dtype is int64")
def _(g, shape):
    return added_one_by_one(g, shape).astype(np.int64)


@sum_to.wrong_answer("One stretched axis is summed; there is never a second one.",
                     says="not summed")
def _(g, shape):
    g = g.sum(axis=tuple(range(g.ndim - len(shape))))
    for i, n in enumerate(shape):
        if n == 1 != g.shape[i]:
            return g.sum(axis=i, keepdims=True)
    return g


@sum_to.wrong_answer("The first axis is new, if any is.", says="not summed", subtle=True)
def _(g, shape):
    if g.ndim > len(shape):
        g = g.sum(axis=0)
    if g.ndim > len(shape):
        return g
    return g.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)


@sum_to.wrong_answer("Four copies are many.", says="not summed", size=7)
def _(g, shape):
    g = g.sum(axis=tuple(range(g.ndim - len(shape))))
    small = tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] <= 4)
    return g.sum(axis=small, keepdims=True)


# ── matmul ────────────────────────────────────────────────────────────────────────────────────────
matmul = Exercise(
    "ops:matmul", difficulty=2, minutes=10, hints=(
        "An op gives back two things: its value, and a tuple with one function per input that "
        "takes the gradient g of C to the gradient of that input.",
        "dA must have the shape of A, (n, k), and is made of G (n, m) and B (k, m): there is one "
        "way to multiply them that gives that shape.",
        "Stacks of matrices have more axes in front.  ops.t swaps the last two only; .T turns all "
        "of them round."))


def product(a, b):
    """a @ b, or nothing where they do not fit."""
    try:
        return a @ b
    except ValueError:
        return np.zeros(0)


@matmul.law("C = A B", a="n k", b="k m")
def _(f, a, b):
    close(f(a, b)[0], a @ b, "C")


@matmul.law("the gradient of A is G Bᵀ", a="n k", b="k m", g="n m")
def _(f, a, b, g):
    close(f(a, b)[1][0](g), g @ b.T, "the gradient of A",
          {"it is the gradient of B: the two changed places": a.T @ g})


@matmul.law("the gradient of B is Aᵀ G", a="n k", b="k m", g="n m")
def _(f, a, b, g):
    close(f(a, b)[1][1](g), a.T @ g, "the gradient of B",
          {"it is the gradient of A: the two changed places": g @ b.T})


def one_by_one(multiply, left, right):
    """multiply(matrix, matrix) for each pair of matrices of two stacks, with any axes in front."""
    front = left.shape[:-2]
    made = [multiply(left[i], right[i]) for i in np.ndindex(front)]
    return np.stack(made).reshape(*front, *made[0].shape)


@matmul.law("a stack of matrices: each is multiplied by its own", a="... s n k", b="... s k m",
            g="... s n m")
def _(f, a, b, g):
    c, (da, db) = f(a, b)
    close(c, one_by_one(lambda x, y: x @ y, a, b), "C")
    turned = ".T turns all axes round, the stack's too; only the last two should change places"
    close(da(g), one_by_one(lambda x, y: x @ y.T, g, b), "the gradient of A",
          {turned: product(g, b.T)})
    close(db(g), one_by_one(lambda x, y: x.T @ y, a, g), "the gradient of B",
          {turned: product(a.T, g)})


@matmul.law("one B for a whole stack of A: the engine sums what comes back", a="s n k", b="k m",
            g="s n m")
def _(f, a, b, g):
    c, (da, db) = f(a, b)
    close(c, np.stack([x @ b for x in a]), "C")
    close(da(g), np.stack([x @ b.T for x in g]), "the gradient of A")
    summed = undo_broadcasting(host(db(g), "the gradient of B"), b.shape)
    close(summed, sum(x.T @ y for x, y in zip(a, g)), "the gradient of B, summed over the stack")


@matmul.law("float32 stays float32, and float64 keeps all its digits", a="n k", b="k m", g="n m")
def _(f, a, b, g):
    close(f(a / 3, b)[0], a / 3 @ b, "C = (A / 3) B")
    close(f(a / 3, b)[1][1](g), a.T / 3 @ g, "the gradient of B in (A / 3) B")
    a, b, g = (x.astype(np.float32) for x in (a, b, g))
    c, (da, db) = f(a, b)
    close(c, a @ b, "C", rtol=1e-5, atol=1e-5)
    close(da(g), g @ b.T, "the gradient of A", rtol=1e-5, atol=1e-5)
    close(db(g), a.T @ g, "the gradient of B", rtol=1e-5, atol=1e-5)


@matmul.wrong_answer("dB = Gᵀ A: the same letters, the same numbers.", says="transposed")
def _(a, b):
    return a @ b, (lambda g: g @ ops.t(b), lambda g: ops.t(g) @ a)


@matmul.wrong_answer("The first pullback is the one with A in it.", says="changed places")
def _(a, b):
    return a @ b, (lambda g: ops.t(a) @ g, lambda g: g @ ops.t(b))


@matmul.wrong_answer("The gradient of a product is averaged over the rows, as losses are means.",
                     says="a mean for a sum")
def _(a, b):
    return a @ b, (lambda g: g @ ops.t(b), lambda g: ops.t(a) @ g / a.shape[-2])


@matmul.wrong_answer("A transpose is a .T", says=".T")
def _(a, b):
    return a @ b, (lambda g: g @ b.T, lambda g: a.T @ g)


@matmul.wrong_answer("A stack has one axis, so the axes to swap are 1 and 2.", says="AxisError")
def _(a, b):
    def t(x):
        return x if x.ndim < 2 else x.swapaxes(1, 2)
    return a @ b, (lambda g: g @ t(b), lambda g: t(a) @ g)


@matmul.wrong_answer("A stack has one axis in front, and a matrix has none.", says=".T turns",
                     subtle=True)
def _(a, b):
    def t(x):
        return x.transpose(0, 2, 1) if x.ndim == 3 else x.T
    return a @ b, (lambda g: g @ t(b), lambda g: t(a) @ g)


@matmul.wrong_answer("Whole numbers in, whole numbers out.", says="rounded", size=7)
def _(a, b):
    return ops.xp(a).rint(a @ b), (lambda g: g @ ops.t(b), lambda g: ops.t(a) @ g)


@matmul.wrong_answer("More digits do no harm.", says="dtype is float64", subtle=True)
def _(a, b):
    double = a.astype(np.float64)
    return a @ b, (lambda g: g @ ops.t(b), lambda g: ops.t(double) @ g)


@matmul.wrong_answer("The gradient is mine to write to.", says="changed g")
def _(a, b):
    def db(g):
        g *= 1.0
        g += 0.5
        return ops.t(a) @ (g - 0.5)
    return a @ b, (lambda g: g @ ops.t(b), db)


@matmul.wrong_answer("A and B have the same number of axes.", says="ValueError", subtle=True)
def _(a, b):
    def t(x):
        return x.transpose(*range(a.ndim - 2), a.ndim - 1, a.ndim - 2)
    return a @ b, (lambda g: g @ t(b), lambda g: t(a) @ g)


# ── softmax ───────────────────────────────────────────────────────────────────────────────────────
softmax = Exercise(
    "ops:softmax", difficulty=3, minutes=15, closed=("ops:_softmax",), hints=(
        "Each row becomes probabilities: positive, with sum 1.  e^1000 overflows; but a number "
        "taken off all scores of a row changes nothing.",
        "Take off the row's maximum before exp.  Every p of a row depends on every x of it: "
        "dpᵢ/dxⱼ = pᵢ ([i = j] - pⱼ).",
        "With keepdims=True the sums stay beside their rows: dx = p (g - (g p).sum(axis=-1, "
        "keepdims=True))."))


@softmax.law("p = eˣ / Σ eˣ along the last axis", x="n m")
def _(f, x):
    over_everything = np.exp(x) / np.exp(x).sum()
    guesses = {"it is divided by the sum over everything, expected along the last axis: "
               "the wrong axis": over_everything}
    close(f(x)[0], probabilities(x), "p", guesses)


@softmax.law("any number of axes", x="... m")
def _(f, x):
    close(f(x)[0], probabilities(x), "p")


@softmax.law("large scores do not overflow", x="n m")
def _(f, x):
    close(f(1000 * x)[0], probabilities(1000 * x), "softmax(1000 x)")


def back_through(p, g):
    """The Jacobian of each row of p, times the row of g."""
    rows = zip(p.reshape(-1, p.shape[-1]), g.reshape(-1, p.shape[-1]))
    made = [(np.diag(row) - np.outer(row, row)) @ back for row, back in rows]
    return np.stack(made).reshape(p.shape)


@softmax.law("dx = p (g − Σ g p)", x="... n m", g="... n m")
def _(f, x, g):
    p = probabilities(x)
    guesses = {"it is g p (1 - p), the diagonal of the Jacobian alone: each p depends on every x":
                   g * p * (1 - p)}
    if x.ndim > 2:
        guesses["the sum is along axis 1, expected along the last"] = (
            p * (g - (g * p).sum(axis=1, keepdims=True)))
    close(f(x)[1][0](g), back_through(p, g), "the gradient of x", guesses)


@softmax.law("nor do they on the way back", x="n m", g="n m")
def _(f, x, g):
    close(f(1000 * x)[1][0](g), back_through(probabilities(1000 * x), g), "the gradient of 1000 x")


@softmax.law("float32 stays float32", x="n m", g="n m")
def _(f, x, g):
    p = probabilities(x)
    got, (dx,) = f(x.astype(np.float32))
    close(got, p.astype(np.float32), "p", rtol=1e-5, atol=1e-5)
    want = back_through(p, g).astype(np.float32)
    close(dx(g.astype(np.float32)), want, "the gradient of x", rtol=1e-5, atol=1e-5)


@softmax.wrong_answer("Sum means .sum().", says="wrong axis")
def _(x):
    e = ops.xp(x).exp(x - x.max())
    p = e / e.sum()
    return p, ops.softmax.definition(x)[1]


@softmax.wrong_answer("The formula is the program: exp, then divide.", says="nan", subtle=True)
def _(x):
    with np.errstate(all="ignore"):
        e = ops.xp(x).exp(x)
        return e / e.sum(axis=-1, keepdims=True), ops.softmax.definition(x)[1]


@softmax.wrong_answer("dx = g p (1 - p), as for the sigmoid.", says="diagonal of the Jacobian")
def _(x):
    p, _ = ops.softmax.definition(x)
    return p, (lambda g: g * p * (1 - p),)


@softmax.wrong_answer("The probabilities add up to one whatever x is, so nothing comes back.",
                      says="zero everywhere")
def _(x):
    return ops.softmax.definition(x)[0], (lambda g: g * 0,)


@softmax.wrong_answer("Rows have two axes, so the last one is axis 1.", says="along axis 1",
                      subtle=True)
def _(x):
    p = ops.softmax.definition(x)[0]

    def dx(g):
        axis = min(1, g.ndim - 1)
        return p * (g - (g * p).sum(axis=axis, keepdims=True))
    return p, (dx,)


@softmax.wrong_answer("The last axis is axis 1.", says="wrong axis", subtle=True)
def _(x):
    e = ops.xp(x).exp(x - x.max(axis=-1, keepdims=True))
    axis = min(1, x.ndim - 1)
    return e / e.sum(axis=axis, keepdims=True), ops.softmax.definition(x)[1]


@softmax.wrong_answer("One maximum, of all rows, keeps exp in bounds.", says="nan", subtle=True)
def _(x):
    with np.errstate(all="ignore"):
        e = ops.xp(x).exp(x - x.max())
        return e / e.sum(axis=-1, keepdims=True), ops.softmax.definition(x)[1]


@softmax.wrong_answer("A divisor wants an ε.", says="six digits")
def _(x):
    p, back = ops.softmax.definition(x)
    return p / (1 + 1e-8), back


@softmax.wrong_answer("Overflow is a matter of the way forward.", says="nan", subtle=True)
def _(x):
    def dx(g):
        with np.errstate(all="ignore"):
            e = ops.xp(x).exp(x)
            p = e / e.sum(axis=-1, keepdims=True)
            return p * (g - (g * p).sum(axis=-1, keepdims=True))
    return ops.softmax.definition(x)[0], (dx,)


@softmax.wrong_answer("What is kept for the way back may be used up there.",
                      says="when it is called again")
def _(x):
    p = ops.softmax.definition(x)[0]
    kept = p.copy()

    def dx(g):
        nonlocal kept
        mean = (g * kept).sum(axis=-1, keepdims=True)
        kept *= g - mean
        return kept.copy()
    return p, (dx,)


# ── layer_norm ────────────────────────────────────────────────────────────────────────────────────
layer_norm = Exercise(
    "ops:layer_norm", difficulty=4, minutes=25, hints=(
        "Three inputs, so three pullbacks: for x, for w and for b.  The engine sums the last two "
        "over the rows: give it g times what w is multiplied with.",
        "x moves y in three ways: by itself, through the mean, and through σ.  Let ĝ = w g; taking "
        "the mean off x takes mean ĝ off the gradient.",
        "Through σ comes x̂ mean(ĝ x̂): dx = (ĝ - mean ĝ - x̂ mean(ĝ x̂)) / σ, all means along "
        "the last axis with keepdims=True."))


def normalised(x, eps, ddof=0):
    c = x - x.mean(axis=-1, keepdims=True)
    return c / np.sqrt((c * c).sum(axis=-1, keepdims=True) / max(x.shape[-1] - ddof, 1) + eps)


@layer_norm.law("each row of x̂ has mean 0 and variance 1;  y = w x̂ + b", x="... n c", w="c",
                b="c")
def _(f, x, w, b):
    guesses = {"the variance is divided by n - 1, as of a sample; here it is by n":
                   w * normalised(x, 1e-12, 1) + b}
    if x.ndim > 2:
        c = x - x.mean(axis=1, keepdims=True)
        guesses["the mean is along axis 1, expected along the last"] = (
            w * c / np.sqrt((c * c).mean(axis=1, keepdims=True) + 1e-12) + b)
    close(f(x, w, b, eps=1e-12)[0], w * normalised(x, 1e-12) + b, "y", guesses, 1e-4, 1e-4)


@layer_norm.law("ε is added to the variance, under the root; it is 1e-5 by default", x="... n c",
                w="c", b="c", eps=st.sampled_from([None, 0.25, 1.0, 4.0]))
def _(f, x, w, b, eps):
    y, _ = f(x, w, b) if eps is None else f(x, w, b, eps=eps)
    added = 1e-5 if eps is None else eps
    c = x - x.mean(axis=-1, keepdims=True)
    outside = w * c / (np.sqrt((c * c).mean(axis=-1, keepdims=True)) + added) + b
    close(y, w * normalised(x, added) + b, f"y for ε = {added}",
          {"ε is added to σ; it belongs to σ², under the root": outside,
           "ε is 1e-5, whatever eps is": w * normalised(x, 1e-5) + b})


@layer_norm.law("rows far from zero: in float32, x + 4096 has the x̂ of x", x="n c", w="c", b="c")
def _(f, x, w, b):
    far = (x + 4096).astype(np.float32)
    want = (w * normalised(x, 0.01) + b).astype(np.float32)
    y, _ = f(far, w.astype(np.float32), b.astype(np.float32), eps=0.01)
    close(y, want, "y for x + 4096", rtol=0.01, atol=0.02)


@layer_norm.law("the gradient of x is what small steps of x show", x="... n c", w=positive("c"),
                g="... n c")
def _(f, x, w, g):
    h = normalised(x, 1.0)
    gh, s = w * g, np.sqrt(x.var(axis=-1, keepdims=True) + 1.0)
    guesses = {"the mean moves with x in it, σ does not: the term with x̂ is missing":
                   (gh - gh.mean(axis=-1, keepdims=True)) / s,
               "neither the mean nor σ moves with x in it: two terms are missing": gh / s,
               "σ moves with x in it, the mean does not: mean ĝ is missing":
                   (gh - h * (gh * h).mean(axis=-1, keepdims=True)) / s}
    close(f(x, w, 0 * w, eps=1.0)[1][0](g),
          numerical_gradient(lambda x: w * normalised(x, 1.0), x, g), "the gradient of x", guesses,
          1e-5, 1e-7)


@layer_norm.law("the gradients of w and b: g x̂ and g, one row for each row", x="... n c", w="c",
                b="c", g="... n c")
def _(f, x, w, b, g):
    _, (_, dw, db) = f(x, w, b)
    close(dw(g), g * normalised(x, 1e-5), "the gradient of w, before the engine sums it",
          {"it is g x: what w is multiplied with is x̂": g * x})
    close(db(g), g, "the gradient of b, before the engine sums it")


@layer_norm.wrong_answer("Only the mean moves with x; σ is a scale.", says="σ does not",
                         subtle=True)
def _(x, w, b, eps=1e-5):
    y, (_, dw, db) = ops.layer_norm.definition(x, w, b, eps=eps)
    s = ops.xp(x).sqrt(((x - x.mean(axis=-1, keepdims=True))**2).mean(axis=-1, keepdims=True) + eps)
    return y, (lambda g: (w * g - (w * g).mean(axis=-1, keepdims=True)) / s, dw, db)


@layer_norm.wrong_answer("The variance of a sample has n - 1 below.", says="n - 1")
def _(x, w, b, eps=1e-5):
    n, back = x.shape[-1], ops.layer_norm.definition(x, w, b, eps=eps)[1]
    c = x - x.mean(axis=-1, keepdims=True)
    return w * c / ops.xp(x).sqrt((c * c).sum(axis=-1,
                                              keepdims=True) / max(n - 1, 1) + eps) + b, back


@layer_norm.wrong_answer("ε keeps the divisor from zero, so it is added to the divisor.",
                         says="under the root", subtle=True)
def _(x, w, b, eps=1e-5):
    c = x - x.mean(axis=-1, keepdims=True)
    return w * c / (ops.xp(x).sqrt((c * c).mean(axis=-1,
                                                keepdims=True))
                    + eps) + b, ops.layer_norm.definition(x, w, b, eps=eps)[1]


@layer_norm.wrong_answer("Rows lie along axis 1.", says="along axis 1")
def _(x, w, b, eps=1e-5):
    axis = min(1, x.ndim - 1)
    c = x - x.mean(axis=axis, keepdims=True)
    s = ops.xp(x).sqrt((c * c).mean(axis=axis, keepdims=True) + eps)
    return w * c / s + b, ops.layer_norm.definition(x, w, b, eps=eps)[1]


@layer_norm.wrong_answer("On the way back, rows lie along axis 1.", says="entries differ",
                         subtle=True)
def _(x, w, b, eps=1e-5):
    y, (_, dw, db) = ops.layer_norm.definition(x, w, b, eps=eps)
    c = x - x.mean(axis=-1, keepdims=True)
    s = ops.xp(x).sqrt((c * c).mean(axis=-1, keepdims=True) + eps)
    h = c / s

    def dx(g):
        axis = min(1, g.ndim - 1)
        gh = w * g
        through_sigma = h * (gh * h).mean(axis=axis, keepdims=True)
        return (gh - gh.mean(axis=axis, keepdims=True) - through_sigma) / s
    return y, (dx, dw, db)


@layer_norm.wrong_answer("The variance is the mean of the squares less the square of the mean.",
                         says="x + 4096", subtle=True)
def _(x, w, b, eps=1e-5):
    _, back = ops.layer_norm.definition(x, w, b, eps=eps)
    mean = x.mean(axis=-1, keepdims=True)
    variance = (x * x).mean(axis=-1, keepdims=True) - mean * mean
    m = ops.xp(x)
    return w * (x - mean) / m.sqrt(m.maximum(variance, 0) + eps) + b, back


@layer_norm.wrong_answer("ε is a constant of the library.", says="whatever eps is")
def _(x, w, b, eps=1e-5):
    return ops.layer_norm.definition(x, w, b)


@layer_norm.wrong_answer("The way back has no division by zero to fear, so it has no ε.",
                         says="the gradient of x", subtle=True)
def _(x, w, b, eps=1e-5):
    y, (_, dw, db) = ops.layer_norm.definition(x, w, b, eps=eps)
    return y, (ops.layer_norm.definition(x, w, b, eps=1e-12)[1][0], dw, db)


@layer_norm.wrong_answer("w is multiplied with x.", says="x̂", subtle=True)
def _(x, w, b, eps=1e-5):
    y, (dx, _, db) = ops.layer_norm.definition(x, w, b, eps=eps)
    return y, (dx, lambda g: g * x, db)

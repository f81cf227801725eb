"""Lesson 01: undoing broadcasting, and three ops with their pullbacks.

The walk through the graph: exercises_graphs.py.
"""
from __future__ import annotations

import functools

import numpy as np
from hypothesis import strategies as st

from tinyft import ops
from tinyft.learn.diagnose import Unusable, close, host, undo_broadcasting
from tinyft.learn.exercise import Exercise
from tinyft.learn.references import numerical_gradient, probabilities
from tinyft.learn.sizes import Shaped, array, named, positive, sizes
from tinyft.precision import to_float32

# ── sum_to ────────────────────────────────────────────────────────────────────────────────────────
sum_to = Exercise(
    "tensor:sum_to", difficulty=2, minutes=10, hints=(
        "NumPy repeats an array in two ways.  It puts new axes in front, and it stretches axes of "
        "length 1.  Each copy of an entry has its own gradient; add them up.",
        "First sum over the axes in front.  There are g.ndim - len(shape) of them.  Then sum over "
        "each axis that has length 1 in shape and is longer in g.",
        "g.sum(axis=(0, 1)) sums over two axes at once, and axis=() over none.  keepdims=True "
        "keeps each summed axis, with length 1.  Before you sum: g = precision.to_float32(g)."),
    may_use="g.sum(axis=..., keepdims=...), reshape, and precision.to_float32(g), which turns a "
            "16-bit array into float32 and leaves any other array as it is.",
    example="""
        >>> g = np.array([[1., 10.], [2., 20.], [3., 30.]])
        >>> print(sum_to(g, (2,)))
        [ 6. 60.]
        >>> print(sum_to(g, (3, 1)).tolist())
        [[11.0], [22.0], [33.0]]
        """)


@st.composite
def repeated(draw):
    """(shape, g): g has a shape to which `shape` broadcasts."""
    front = [draw(sizes()) for _ in range(draw(st.integers(0, 2)))]
    own = [draw(sizes()) for _ in range(draw(st.integers(0, 2)))]
    shape = tuple(n if draw(st.booleans()) else 1 for n in own)
    return named(shape=shape, g=draw(array((*front, *own))))


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


@sum_to.law("new and stretched axes at once: every entry of g is added to the entry it came from",
            drawn=repeated())
def _(f, drawn):
    shape, g = drawn
    close(f(g, shape), added_one_by_one(g, shape))


@sum_to.law("an input that was repeated zero times gets zeros", g="n m")
def _(f, g):
    none = g[:0]
    close(f(none, g.shape[1:]), np.zeros(g.shape[1:]), f"sum_to(g, {g.shape[1:]}) for an empty g")


@sum_to.law("float32 stays float32, and float64 keeps all its digits", g="n m")
def _(f, g):
    single = g.astype(np.float32)
    row = (1, g.shape[1])
    close(f(single, row), single.sum(axis=0, keepdims=True), rtol=1e-5, atol=1e-5)
    close(f(g / 3, row), (g / 3).sum(axis=0, keepdims=True), "sum_to(g / 3, ...)")


@sum_to.law("a 16-bit gradient is summed in float32, where 2048 + 1 is 2049",
            g=Shaped("n m", (1, 2048, 3), np.float16))
def _(f, g):
    few_digits = ("the sum has only the digits of 16 bits, in which 2048 + 1 is 2048: "
                  "make float32 of g before you sum")
    want = g.astype(np.float32).sum(axis=0)
    close(f(g, g.shape[1:]), want, f"sum_to(g, {g.shape[1:]}) for a float16 g",
          {few_digits: want.astype(np.float16)})


@sum_to.wrong_answer("Copies share the gradient, so take their mean.", says="a mean for a sum")
def _(g, shape):
    g = to_float32(g).mean(axis=tuple(range(g.ndim - len(shape))))
    return g.mean(axis=tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1),
                  keepdims=True)


@sum_to.wrong_answer("All copies hold the same number, so one of them speaks for all.",
                     says="one copy")
def _(g, shape):
    g = g[(0,) * (g.ndim - len(shape))]
    return g[tuple(slice(0, 1) if n == 1 else slice(None) for n in shape)]


@sum_to.wrong_answer("Summing along an axis is summing along an axis.", says="its shape is")
def _(g, shape):
    g = to_float32(g).sum(axis=tuple(range(g.ndim - len(shape))))
    repeated = tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1)
    return to_float32(g).sum(axis=repeated)


@sum_to.wrong_answer("Either axes were put in front or some were stretched, never both.",
                     says="not summed", subtle=True)
def _(g, shape):
    if g.ndim > len(shape):
        return to_float32(g).sum(axis=tuple(range(g.ndim - len(shape))))
    repeated = tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1)
    return to_float32(g).sum(axis=repeated, keepdims=True)


@sum_to.wrong_answer("np.zeros(shape) has the dtype that I need.", says="dtype is float64",
                     subtle=True)
def _(g, shape):
    made = added_one_by_one(g, shape)
    return made.astype(np.float32) if g.itemsize == 2 else made


@sum_to.wrong_answer("Single precision is enough inside.", says="six digits", subtle=True)
def _(g, shape):
    wide = to_float32(g)
    return added_one_by_one(wide.astype(np.float32), shape).astype(np.float32).astype(wide.dtype)


@sum_to.wrong_answer("Gradients are whole numbers.", says="dtype is int64")
def _(g, shape):
    return added_one_by_one(g, shape).astype(np.int64)


@sum_to.wrong_answer("One stretched axis is summed; there is never a second one.",
                     says="not summed")
def _(g, shape):
    g = to_float32(g).sum(axis=tuple(range(g.ndim - len(shape))))
    for i, n in enumerate(shape):
        if n == 1 != g.shape[i]:
            return to_float32(g).sum(axis=i, keepdims=True)
    return g


@sum_to.wrong_answer("The first axis is new, if any is.", says="not summed", subtle=True)
def _(g, shape):
    if g.ndim > len(shape):
        g = to_float32(g).sum(axis=0)
    if g.ndim > len(shape):
        return g
    return to_float32(g).sum(axis=tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)


@sum_to.wrong_answer("Only a few copies have to be added up.", says="not summed", size=7)
def _(g, shape):
    g = to_float32(g).sum(axis=tuple(range(g.ndim - len(shape))))
    small = tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] <= 4)
    return to_float32(g).sum(axis=small, keepdims=True)


@sum_to.wrong_answer("The sum may have the dtype of g.", says="digits of 16 bits", subtle=True)
def _(g, shape):
    return undo_broadcasting(g, shape).astype(g.dtype)


@sum_to.wrong_answer("It is enough that the result is float32.", says="digits of 16 bits",
                     subtle=True)
def _(g, shape):
    summed = undo_broadcasting(g, shape)
    return summed.astype(g.dtype).astype(summed.dtype)


# ── matmul ────────────────────────────────────────────────────────────────────────────────────────
matmul = Exercise(
    "ops:matmul", difficulty=3, minutes=25, lines=12, closed=("ops:_vector_product",), hints=(
        "Return two things: the value, and a tuple with one pullback per input.  dA must have "
        "the shape of A, (n, k).  There is one way to multiply G (n, m) and B (k, m) that gives "
        "this shape.",
        "A stack of matrices has more axes in front.  t(a) swaps the last two axes only; .T turns "
        "all of them round.",
        "For vectors: A = a[None] is a row and B = b[:, None] is a column.  In the pullback give "
        "g the axis of length 1 that C lacks, use the formulas for matrices, and reshape the "
        "result."),
    may_use="@, reshape, indexing with None, and t(a), which swaps the last two axes.  For a "
            "stack of matrices a pullback may leave out the sum over the stack: the engine sums.  "
            "match_dtypes and array are not needed here.",
    example="""
        >>> A = np.array([[1., 2.]])
        >>> B = np.array([[3.], [4.]])
        >>> C, (dA, dB) = matmul.definition(A, B)
        >>> G = np.array([[10.]])
        >>> print(C.tolist(), dA(G).tolist(), dB(G).tolist())
        [[11.0]] [[30.0, 40.0]] [[10.0], [20.0]]
        """)


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


def summed(g, shape):
    """A pullback's gradient, summed to this shape as the engine does; as it is where that fails."""
    g = host(g, "the gradient")
    try:
        fits = np.broadcast_shapes(g.shape, shape) == g.shape
    except ValueError:
        fits = False
    return undo_broadcasting(g, shape) if fits else g


@matmul.law("a vector on the right is a column, and C lacks its axis", a="... n k", b="k",
            g="... n")
def _(f, a, b, g):
    c, (da, db) = f(a, b)
    close(c, (a * b).sum(axis=-1), "C")
    close(summed(da(g), a.shape), g[..., None] * b, "the gradient of A")
    rows = a.reshape(-1, a.shape[-1])
    close(summed(db(g), b.shape), (rows * g.reshape(-1, 1)).sum(axis=0), "the gradient of B")


@matmul.law("a vector on the left is a row, and C lacks its axis", a="k", b="... k m", g="... m")
def _(f, a, b, g):
    c, (da, db) = f(a, b)
    close(c, (a[:, None] * b).sum(axis=-2), "C")
    each = (b * g[..., None, :]).sum(axis=-1).reshape(-1, len(a))
    close(summed(da(g), a.shape), each.sum(axis=0), "the gradient of A")
    close(summed(db(g), b.shape), a[:, None] * g[..., None, :], "the gradient of B")


@matmul.law("two vectors give one number", a="k", b="k", g="")
def _(f, a, b, g):
    c, (da, db) = f(a, b)
    close(c, (a * b).sum(), "C", {"it is the vector of the products: add them up": a * b})
    close(summed(da(g), a.shape), g * b, "the gradient of A")
    close(summed(db(g), b.shape), g * a, "the gradient of B")


def for_matrices(answer):
    """The answer where both factors are matrices or stacks; the library's where one is a vector."""
    @functools.wraps(answer)
    def call(a, b):
        is_vector = min(a.ndim, b.ndim) < 2
        return ops.matmul.definition(a, b) if is_vector else answer(a, b)
    return call


def for_vectors(answer):
    """The library's answer for matrices and stacks; this one where a factor is a vector."""
    @functools.wraps(answer)
    def call(a, b):
        is_vector = min(a.ndim, b.ndim) < 2
        return answer(a, b) if is_vector else ops.matmul.definition(a, b)
    return call


@matmul.wrong_answer("dB = Gᵀ A: the same letters, the same numbers.", says="transposed")
@for_matrices
def _(a, b):
    return a @ b, (lambda g: g @ ops.t(b), lambda g: ops.t(g) @ a)


@matmul.wrong_answer("The first pullback is the one with A in it.", says="changed places")
@for_matrices
def _(a, b):
    return a @ b, (lambda g: ops.t(a) @ g, lambda g: g @ ops.t(b))


@matmul.wrong_answer("The gradient of a product is averaged over the rows, as losses are means.",
                     says="a mean for a sum")
@for_matrices
def _(a, b):
    return a @ b, (lambda g: g @ ops.t(b), lambda g: ops.t(a) @ g / a.shape[-2])


@matmul.wrong_answer("A transpose is a .T", says=".T")
@for_matrices
def _(a, b):
    return a @ b, (lambda g: g @ b.T, lambda g: a.T @ g)


@matmul.wrong_answer("A stack has one axis, so the axes to swap are 1 and 2.", says="AxisError")
@for_matrices
def _(a, b):
    def t(x):
        return x if x.ndim < 2 else x.swapaxes(1, 2)
    return a @ b, (lambda g: g @ t(b), lambda g: t(a) @ g)


@matmul.wrong_answer("A stack has one axis in front, and a matrix has none.", says=".T turns",
                     subtle=True)
@for_matrices
def _(a, b):
    def t(x):
        return x.transpose(0, 2, 1) if x.ndim == 3 else x.T
    return a @ b, (lambda g: g @ t(b), lambda g: t(a) @ g)


@matmul.wrong_answer("Whole numbers in, whole numbers out.", says="rounded", size=7)
@for_matrices
def _(a, b):
    return ops.xp(a).rint(a @ b), (lambda g: g @ ops.t(b), lambda g: ops.t(a) @ g)


@matmul.wrong_answer("A gradient in float64 is never wrong.", says="dtype is float64", subtle=True)
@for_matrices
def _(a, b):
    double = a.astype(np.float64)
    return a @ b, (lambda g: g @ ops.t(b), lambda g: ops.t(double) @ g)


@matmul.wrong_answer("A pullback may write into its argument g.", says="changed g")
@for_matrices
def _(a, b):
    def db(g):
        g *= 1.0
        g += 0.5
        return ops.t(a) @ (g - 0.5)
    return a @ b, (lambda g: g @ ops.t(b), db)


@matmul.wrong_answer("A and B have the same number of axes.", says="ValueError", subtle=True)
@for_matrices
def _(a, b):
    def t(x):
        return x.transpose(*range(a.ndim - 2), a.ndim - 1, a.ndim - 2)
    return a @ b, (lambda g: g @ t(b), lambda g: t(a) @ g)


@matmul.wrong_answer("NumPy's @ knows vectors, so the pullbacks need no care.", says="AxisError")
@for_vectors
def _(a, b):
    return a @ b, (lambda g: g @ ops.t(b), lambda g: ops.t(a) @ g)


@matmul.wrong_answer("A row times a matrix is a row: C keeps the axis of length 1.",
                     says="its shape is", subtle=True)
@for_vectors
def _(a, b):
    c, back = ops.matmul.definition(a, b)
    return (c[..., None, :] if a.ndim < 2 <= b.ndim else c), back


@matmul.wrong_answer("A vector on the right is a column, so its gradient is a column.",
                     says="its shape is", subtle=True)
@for_vectors
def _(a, b):
    c, (da, db) = ops.matmul.definition(a, b)
    return c, (da, (lambda g: db(g)[..., None]) if b.ndim < 2 <= a.ndim else db)


@matmul.wrong_answer("The product of two vectors is the vector of the products.",
                     says="add them up", subtle=True)
@for_vectors
def _(a, b):
    c, back = ops.matmul.definition(a, b)
    return (a * b if a.ndim == b.ndim == 1 else c), back


# ── softmax ───────────────────────────────────────────────────────────────────────────────────────
softmax = Exercise(
    "ops:softmax", difficulty=3, minutes=15, closed=("ops:_softmax",), hints=(
        "Each row becomes probabilities: positive, with the sum 1.  e¹⁰⁰⁰ overflows.  But if you "
        "subtract the same number from all scores of a row, its probabilities stay the same.",
        "Subtract the maximum of each row before exp.  On the way back, every p of a row depends "
        "on every x of it: dpᵢ/dxⱼ = pᵢ ([i = j] − pⱼ).",
        "keepdims=True keeps the sum of a row beside the row: dx = p * (g - (g * p).sum(axis=-1, "
        "keepdims=True))."),
    may_use="xp(x).exp, and max and sum with axis=-1, keepdims=True.  check_last_axis(x) raises "
            "an error for an x without entries in its last axis; you may call it first.",
    example="""
        >>> x = np.array([[0., np.log(3.)]])
        >>> p, (dx,) = softmax.definition(x)
        >>> print(p.round(2))
        [[0.25 0.75]]
        >>> g = np.array([[8., 0.]])
        >>> print(dx(g).round(2))
        [[ 1.5 -1.5]]
        """)


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


@softmax.law("large scores do not overflow in the pullback either", x="n m", g="n m")
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


@softmax.wrong_answer("Parentheses make a tuple: (f).", says="a tuple of one is written `(f,)`")
def _(x):
    p, (back,) = ops.softmax.definition(x)
    return p, (back)


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


@softmax.wrong_answer("Only the forward pass can overflow.", says="nan", subtle=True)
def _(x):
    def dx(g):
        with np.errstate(all="ignore"):
            e = ops.xp(x).exp(x)
            p = e / e.sum(axis=-1, keepdims=True)
            return p * (g - (g * p).sum(axis=-1, keepdims=True))
    return ops.softmax.definition(x)[0], (dx,)


@softmax.wrong_answer("The pullback may overwrite the array that it keeps.",
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
    "ops:layer_norm", difficulty=4, minutes=30, hints=(
        "There are three inputs, so three pullbacks: for x, for w and for b.  The engine sums the "
        "last two over the rows.  So return g times x̂ for w, and g for b.",
        "x moves y in three ways: by itself, through μ, and through σ.  Let ĝ = w g.  The "
        "subtraction of the mean from x becomes the subtraction of mean ĝ from the gradient.",
        "σ adds the term x̂ mean(ĝ x̂): dx = (ĝ − mean ĝ − x̂ mean(ĝ x̂))/σ.  All means are along "
        "the last axis, with keepdims=True."),
    may_use="mean with axis=-1, keepdims=True; xp(x).sqrt; check_norm(x, eps, w, b), which raises "
            "the error for w or b of another shape; and same, the pullback g -> g.",
    example="""
        >>> x = np.array([[1., 3.]])
        >>> w = np.array([1., 10.])
        >>> b = np.array([0., 5.])
        >>> y, (dx, dw, db) = layer_norm.definition(x, w, b, eps=0.0)
        >>> print(y)
        [[-1. 15.]]
        >>> g = np.array([[1., 2.]])
        >>> print(dw(g), db(g))
        [[-1. 2.]] [[1. 2.]]
        """)


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


@layer_norm.law("a row of equal numbers gives x̂ = 0 exactly: no rounding is left", w="c")
def _(f, w):
    w = np.tile(w, 3)
    x = np.full((1, len(w)), 0.1)
    rounding = ("it is nearly 0: the mean of three times 0.1 is rounded; subtract the first entry "
                "of each row before the mean")
    close(f(x, w, 0 * w)[0], 0 * x, "y for x = 0.1 everywhere, b = 0",
          {rounding: w * normalised(x, 1e-5)}, 0, 0)


@layer_norm.law("w or b of another length than a row is an error", x="n c")
def _(f, x):
    row = x.shape[-1:]
    other = (2,) if row == (1,) else (1,)
    for name, shapes in {"w": (other, row), "b": (row, other)}.items():
        w, b = (np.ones(shape) for shape in shapes)
        try:
            f(x, w, b)
        except ValueError:
            continue
        raise Unusable(f"{name} of shape {other} for rows of shape {row} should raise an error: "
                       "NumPy broadcasts it; check_norm refuses it")


def centred_exactly(x):
    first = x[..., :1]
    return x - first - (x - first).mean(axis=-1, keepdims=True)


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
    back = ops.layer_norm.definition(x, w, b, eps=eps)[1]
    c = centred_exactly(x)
    s = ops.xp(x).sqrt((c * c).mean(axis=-1, keepdims=True)) + eps
    return w * c / s + b, back


@layer_norm.wrong_answer("Rows lie along axis 1.", says="along axis 1")
def _(x, w, b, eps=1e-5):
    axis = min(1, x.ndim - 1)
    c = x - x.mean(axis=axis, keepdims=True)
    s = ops.xp(x).sqrt((c * c).mean(axis=axis, keepdims=True) + eps)
    return w * c / s + b, ops.layer_norm.definition(x, w, b, eps=eps)[1]


@layer_norm.wrong_answer("In the pullback, rows lie along axis 1.", says="entries differ",
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
    return w * centred_exactly(x) / m.sqrt(m.maximum(variance, 0) + eps) + b, back


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


@layer_norm.wrong_answer("Equal numbers less their mean are 0.", says="it is nearly 0", subtle=True)
def _(x, w, b, eps=1e-5):
    _, back = ops.layer_norm.definition(x, w, b, eps=eps)
    c = x - x.mean(axis=-1, keepdims=True)
    return w * c / ops.xp(x).sqrt((c * c).mean(axis=-1, keepdims=True) + eps) + b, back


@layer_norm.wrong_answer("NumPy refuses shapes that do not fit.", says="should raise an error",
                         subtle=True)
def _(x, w, b, eps=1e-5):
    if w.shape == b.shape == x.shape[-1:]:
        return ops.layer_norm.definition(x, w, b, eps=eps)
    c = centred_exactly(x)
    return w * c / ops.xp(x).sqrt((c * c).mean(axis=-1, keepdims=True) + eps) + b, (None,) * 3

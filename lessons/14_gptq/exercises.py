"""Lesson 14, OBQ: the weight to round next, the inverse for the weights that are left, a step."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from tinyft.learn.diagnose import close
from tinyft.learn.exercise import Exercise
from tinyft.learn.sizes import draw_array, named, sizes

OBQ = "compress.quantize.obq:"
WHOLE = (1, 2, -1, 3, -2)                                # no zeros: a zero would hide a mistake
D = (1, 2, 3, 5)                                         # costs of different errors never tie


def check(got, want, what, guesses, rtol=1e-9):
    """close, with the guesses that differ from the expected result."""
    wrong = {words: a for words, a in guesses.items() if not np.allclose(a, want, equal_nan=True)}
    close(got, want, what, wrong, rtol=rtol, atol=1e-10)


# ── cheapest ──────────────────────────────────────────────────────────────────────────────────────
cheapest = Exercise(
    f"{OBQ}cheapest", difficulty=2, minutes=15, on_host=True, lines=6,
    may_use="np.abs; np.where(condition, a, b); np.inf; a.argmin, a.argmax and a.any, with "
            "axis=-1.",
    example="""
        Two weights. The first costs 0.2²/2 = 0.02, the second 0.4²/5 = 0.032.
        >>> two = np.ones(2, bool)
        >>> int(cheapest(np.array([0.2, 0.4]), np.array([2.0, 5.0]), two, np.array([1.0])))
        0

        Now the second is 0.7 from the end of its grid, more than half a step of 1. So it comes
        first, although it costs more: 0.7²/5 = 0.098.
        >>> int(cheapest(np.array([0.2, 0.7]), np.array([2.0, 5.0]), two, np.array([1.0])))
        1
        """,
    hints=(
        "Compute the cost of every weight, error² / d.  Give a weight that is not free the cost "
        "np.inf.  Its d may be 0.",
        "Then the weights off their grid: free, with |error| > scale/2.  (The library allows a "
        "billionth more than scale/2, for rounding errors.)  If a row has some, its answer is the "
        "one of largest |error|.",
        "off = np.where(free & (np.abs(error) > scale / 2), np.abs(error), 0).  The answer is "
        "np.where(off.any(axis=-1), off.argmax(axis=-1), cost.argmin(axis=-1))."))


@st.composite
def a_row(draw: Callable, errors: tuple, fixed: bool = False, rows: bool = False):
    """error, d, free and scale of weights (in,), or of rows of them; the errors of a row differ."""
    n = draw(sizes()) + 1
    shape = (draw(sizes()), n) if rows else (n,)
    count = shape[0] if rows else 1
    drawn = [list(draw(st.permutations(errors)))[:n] for _ in range(count)]
    sign = draw_array(draw, shape, (1, -1), np.float64)
    free = np.ones(shape, bool)
    if fixed:
        free = draw_array(draw, shape, (False, True), bool)
        free[..., draw(st.integers(0, n - 1))] = True
    d = np.where(free, draw_array(draw, shape, D, np.float64), 0)
    return named(error=np.array(drawn).reshape(shape) * sign, d=d, free=free)


SMALL = (0.1, 0.2, 0.3, 0.4, 0.15, 0.25, 0.35, 0.45)     # within half a step of a grid with s = 1
LARGE = (0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3, 1.4)
STEP = np.ones(1)


def right_choice(error, d, free, scale=STEP):
    off = np.where(free & (abs(error) > scale / 2), abs(error), 0)
    choice = cheapest_of(error, d, free)
    return np.where(off.any(-1), off.argmax(-1), choice)


def cheapest_of(error, d, free, power=1):
    cost = error**2 / np.where(free, d, 1)**power
    return np.where(free, cost, np.inf).argmin(-1)


def place_among_free(error, d, free):
    """The place of the cheapest weight in the list of the free ones."""
    choice = cheapest_of(error, d, free)
    return (np.cumsum(free, -1) - 1)[..., choice] if free.ndim == 1 else choice


def guessed_choices(error, d, free, scale):
    every = np.ones(free.shape, bool)
    off = free & (abs(error) > scale / 2)
    return {"a weight is off its grid beyond scale/2, not beyond scale": right_choice(
                error, d, free, 2 * scale),
            "a weight off its grid, more than half a step from it, comes before all others":
                cheapest_of(error, d, free),
            "of the weights off their grid it is the cheapest; the largest error comes first":
                cheapest_of(error, d, np.where(off.any(-1, keepdims=True), off, free)),
            "d is left out: a large G_jj makes a weight cheap":
                cheapest_of(error, d, free, power=0),
            "it is the weight of least |error|/d: the cost is error²/d, not (error/d)²":
                cheapest_of(error, d, free, power=2),
            "the cost is multiplied with d; it is divided by it":
                cheapest_of(error, d, free, power=-1),
            "it is the most expensive weight": np.where(
                free, error**2 / np.where(free, d, 1), -1).argmax(-1),
            "a weight that is not free was chosen: it has its value already":
                cheapest_of(error, np.where(free, d, 1), every),
            "it is the place in the list of the free weights; it is wanted in the row":
                place_among_free(error, d, free)}


def check_choice(f, error, d, free, scale=STEP):
    with np.errstate(all="ignore"):
        got = f(error, d, free, scale)
    check(got, right_choice(error, d, free, scale), "the weight to round next",
          guessed_choices(error, d, free, scale))


@cheapest.law("all weights are free: the least error²/d", given=a_row(SMALL))
def _(f, given):
    check_choice(f, *given)


@cheapest.law("weights that are not free do not count; their d is 0",
              given=a_row(SMALL, fixed=True))
def _(f, given):
    check_choice(f, *given)


@cheapest.law("weights off their grid come first, the largest error before the others",
              given=a_row(LARGE, fixed=True))
def _(f, given):
    error, d, free = given
    error = np.where(d == 5, np.sign(error) * 0.4, error)            # some are on their grid
    check_choice(f, error, d, free)


@cheapest.law("half a step is half of the scale of this weight", given=a_row(SMALL))
def _(f, given):
    error, d, free = given
    scale = np.where(np.arange(len(error)) % 2, 0.125, 1.0)          # every second grid is finer
    check_choice(f, error, d, free, scale)


@cheapest.law("each row has its own answer", given=a_row(SMALL + LARGE, rows=True))
def _(f, given):
    check_choice(f, *given)


@cheapest.wrong_answer("The nearest weight is the cheapest.", says="d is left out")
def _(error, d, free, scale):
    return np.where(free, abs(error), np.inf).argmin(-1)


@cheapest.wrong_answer("The cost is (error/d)², so it is error²/d².", says="not (error/d)²")
def _(error, d, free, scale):
    cost = np.where(free, (error / np.where(free, d, 1))**2, np.inf)
    return cost.argmin(-1)


@cheapest.wrong_answer("G is the curvature: a large G_jj makes an error expensive.",
                       says="multiplied with d")
def _(error, d, free, scale):
    return np.where(free, error**2 * d, np.inf).argmin(-1)


@cheapest.wrong_answer("The worst weight comes first.", says="most expensive")
def _(error, d, free, scale):
    return np.where(free, error**2 / np.where(free, d, 1), -1).argmax(-1)


@cheapest.wrong_answer("A weight that has its value has no error left, so it needs no care.",
                       says="not free")
def _(error, d, free, scale):
    return cheapest_of(error, np.where(free, d, 1), np.ones(free.shape, bool))


@cheapest.wrong_answer("argmin of the free weights is the answer.", says="in the list of the free")
def _(error, d, free, scale):
    return np.array((error[free]**2 / d[free]).argmin())


@cheapest.wrong_answer("A weight off its grid needs no care: its error makes it expensive.",
                       says="comes before all others")
def _(error, d, free, scale):
    return cheapest_of(error, d, free)


@cheapest.wrong_answer("Of the weights off their grid, the cheapest comes first.",
                       says="the largest error comes first")
def _(error, d, free, scale):
    off = free & (abs(error) > scale / 2)
    among = np.where(off.any(-1, keepdims=True), off, free)
    return cheapest_of(error, np.where(free, d, 1), among)


@cheapest.wrong_answer("A weight is off its grid when it is a whole step away.",
                       says="not beyond scale")
def _(error, d, free, scale):
    return right_choice(error, d, free, 2 * scale)


@cheapest.wrong_answer("A matrix has one answer.", says="should be an array", subtle=True)
def _(error, d, free, scale):
    choice = right_choice(error, d, free, scale)
    return choice if error.ndim == 1 else choice[0]


# ── eliminate ─────────────────────────────────────────────────────────────────────────────────────
eliminate = Exercise(
    f"{OBQ}eliminate", difficulty=2, minutes=10, on_host=True,
    may_use="np.outer(a, b), the matrix of all products a_i b_k.",
    example="""
        Without its first row and column, H = [[5, 3], [3, 2]] is [[2]], whose inverse is 1/2.
        >>> G = np.array([[2.0, -3.0], [-3.0, 5.0]])
        >>> eliminate(G, 0)
        array([[0. , 0. ],
               [0. , 0.5]])
        """,
    hints=(
        "The entry in row i and column k loses G_ij G_jk / G_jj.",
        "G[:, j] is column j, and G[j] is row j.  np.outer of both is the matrix of all products.",
        "G - np.outer(G[:, j], G[j]) / G[j, j]."))


def upper(draw, n, diagonal=(1, 2)):
    """An upper triangular matrix (n, n) of whole numbers, 1 or −1 above the diagonal."""
    R = np.triu(draw_array(draw, (n, n), (1, -1), np.float64), 1)
    np.fill_diagonal(R, draw_array(draw, (n,), diagonal, np.float64))
    return R


@st.composite
def an_inverse(draw: Callable, more: int = 1, diagonal: bool = False):
    """G (n, n), whole numbers, and one j."""
    n = draw(sizes()) + more
    U = upper(draw, n)
    G = np.diag(np.diagonal(U)) if diagonal else U.T @ U
    return named(G=G, j=draw(st.integers(0, n - 1)))


def removed(a, j):
    """A matrix without row j and column j."""
    return np.delete(np.delete(a, j, 0), j, 1)


def without_j(got, G, j):
    """A result without row j and column j, if it has them."""
    return removed(got, j) if np.shape(got) == G.shape else got


def with_row_and_column(a, G, j):
    """a with row j and column j of G."""
    out = a.copy()
    out[j] = G[j]
    out[:, j] = G[:, j]
    return out


def right_inverse(G, j):
    return G - np.outer(G[:, j], G[j]) / G[j, j]


def guessed_inverses(G, j):
    outer = np.outer(G[:, j], G[j])
    return {"it is the part of G without row j and column j; the inverse of a part of H is another "
            "matrix": removed(G, j),
            "it is added; it is subtracted": removed(G + outer / G[j, j], j),
            "it is not divided by G_jj": removed(G - outer, j),
            "it is divided by G_jj twice": removed(G - outer / G[j, j]**2, j)}


@eliminate.law("a diagonal G: the other entries stay as they are", given=an_inverse(diagonal=True))
def _(f, given):
    G, j = given
    check(without_j(f(G, j), G, j), removed(G, j), "the result without row j and column j", {})


@eliminate.law("the other rows and columns are the inverse of H without row j and column j",
               given=an_inverse())
def _(f, given):
    G, j = given
    check(without_j(f(G, j), G, j), np.linalg.inv(removed(np.linalg.inv(G), j)),
          "the result without row j and column j", guessed_inverses(G, j), rtol=1e-7)


@eliminate.law("row j and column j become 0", given=an_inverse(more=0))
def _(f, given):
    G, j = given
    got = np.array(f(G, j))
    want = right_inverse(G, j)
    if got.shape == G.shape:                             # the other entries are for the laws above
        others = np.arange(len(G)) != j
        got[np.ix_(others, others)] = want[np.ix_(others, others)]
    check(got, want, "the result", {"row j and column j stay as they are; they become 0":
                                    with_row_and_column(want, G, j)})


@eliminate.wrong_answer("The inverse of a part of H is the part of the inverse.",
                        says="is another matrix")
def _(G, j):
    G = G.copy()
    G[j] = 0
    G[:, j] = 0
    return G


@eliminate.wrong_answer("What j explained is given back to the others.", says="it is added")
def _(G, j):
    return G + np.outer(G[:, j], G[j]) / G[j, j]


@eliminate.wrong_answer("The product of row and column is enough.", says="not divided by G_jj")
def _(G, j):
    return G - np.outer(G[:, j], G[j])


@eliminate.wrong_answer("Row and column are both divided by G_jj.", says="twice")
def _(G, j):
    return G - np.outer(G[:, j], G[j]) / G[j, j]**2


@eliminate.wrong_answer("To remove is np.delete.", says="its shape is")
def _(G, j):
    return removed(right_inverse(G, j), j)


@eliminate.wrong_answer("The entries of j have no meaning any more, so they may stay.",
                        says="stay as they are", subtle=True)
def _(G, j):
    return with_row_and_column(right_inverse(G, j), G, j)


# ── obq_step ──────────────────────────────────────────────────────────────────────────────────────
obq_step = Exercise(
    f"{OBQ}obq_step", difficulty=3, minutes=20, on_host=True, in_place=True,
    may_use="eliminate(G, j), the inverse for the weights without j.  w[free] are the free "
            "weights, and w[free] -= a writes into w; G[:] = a writes into G.",
    example="""
        >>> w = np.array([0.25, 0.5])
        >>> G = np.array([[2.0, -3.0], [-3.0, 5.0]])
        >>> free = np.array([True, True])
        >>> float(obq_step(w, G, free, 0, 0.0))
        0.015625
        >>> w
        array([0.   , 0.875])
        >>> G
        array([[0. , 0. ],
               [0. , 0.5]])
        >>> free
        array([False,  True])
        """,
    hints=(
        "Compute error = w[j] − q first, and the loss error² / (2 G_jj).  Then w and G change.",
        "A free weight k moves by −error / G_jj · G_jk.  A weight that is fixed has its value, and "
        "keeps it, whatever G holds in its place.",
        "w[free] -= error / G[j, j] * G[j, free];  w[j] = q;  G[:] = eliminate(G, j);  "
        "free[j] = False;  return the loss."))


@st.composite
def a_step(draw: Callable, fixed: bool = False, more: int = 0):
    """w, G, free, j and q: whole numbers, an error that is not 0."""
    n = draw(sizes()) + more
    U = upper(draw, n)
    j = draw(st.integers(0, n - 1))
    free = np.ones(n, bool)
    if fixed:
        free = draw_array(draw, (n,), (False, True), bool)
        free[(j + 1) % n] = False
        free[j] = True
    w = draw_array(draw, (n,), WHOLE, np.float64)
    q = w[j] + draw(st.sampled_from((2.0, -2.0, 4.0)))
    return named(w=w, G=U.T @ U, free=free, j=j, q=q)


def stepped(f, w, G, free, j, q):
    """(loss, w, G, free) after a step."""
    mine = [w.copy(), G.copy(), free.copy()]
    loss = f(*mine, j, q)
    return loss, *mine


def moved(w, G, free, j, q, factor=1.0, everyone=False):
    """w after a step, with the usual errors in it on demand."""
    out = w.copy()
    others = np.ones(len(w), bool) if everyone else free.copy()
    out[others] -= factor * (w[j] - q) / G[j, j] * G[j, others]
    out[j] = q
    return out


def guessed_weights(w, G, free, j, q):
    return {"the other weights did not move: they make up for the error": moved(
                w, G, free, j, q, factor=0),
            "the other weights moved in the wrong direction": moved(w, G, free, j, q, factor=-1),
            "it is not divided by G_jj": moved(w, G, free, j, q, factor=G[j, j]),
            "it is divided by G_jj twice": moved(w, G, free, j, q, factor=1 / G[j, j]),
            "weights that are fixed moved too: they have their values": moved(
                w, G, free, j, q, everyone=True)}


@obq_step.law("it returns the loss of this step, error² / (2 G_jj)", given=a_step())
def _(f, given):
    w, G, free, j, q = given
    error = w[j] - q
    with np.errstate(all="ignore"):
        got = stepped(f, *given)[0]
    check(got, error**2 / (2 * G[j, j]), "the loss", {
        "the half is missing": error**2 / G[j, j],
        "it is divided by G_jj twice": error**2 / (2 * G[j, j]**2),
        "it is multiplied with G_jj; it is divided by it": error**2 * G[j, j] / 2,
        "the error is not squared": error / (2 * G[j, j])})


@obq_step.law("all weights are free: w_j becomes q, and the others move", given=a_step(more=1))
def _(f, given):
    with np.errstate(all="ignore"):
        got = stepped(f, *given)[1]
    check(got, moved(*given), "w after the step", guessed_weights(*given))


@obq_step.law("weights that are fixed stay, whatever G holds for them",
              given=a_step(fixed=True, more=1))
def _(f, given):
    with np.errstate(all="ignore"):
        got = stepped(f, *given)[1]
    check(got, moved(*given), "w after the step", guessed_weights(*given))


@obq_step.law("G becomes the inverse for the weights without j", given=a_step(more=1))
def _(f, given):
    w, G, free, j, q = given
    with np.errstate(all="ignore"):
        got = removed(stepped(f, *given)[2], j)
    check(got, removed(right_inverse(G, j), j), "G without row j and column j", {
        "G did not change: without j it is another matrix": removed(G, j)})


@obq_step.law("weight j is fixed now, and no other", given=a_step(fixed=True))
def _(f, given):
    w, G, free, j, q = given
    want = free.copy()
    want[j] = False
    with np.errstate(all="ignore"):
        got = stepped(f, *given)[3]
    check(got, want, "free after the step", {"weight j is still free": free})


@obq_step.wrong_answer("To round is to round: the other weights keep their values.",
                       says="did not move")
def _(w, G, free, j, q):
    loss = (w[j] - q)**2 / (2 * G[j, j])
    w[j] = q
    G[:] = right_inverse(G, j)
    free[j] = False
    return loss


@obq_step.wrong_answer("The others move with the error.", says="wrong direction")
def _(w, G, free, j, q):
    loss = (w[j] - q)**2 / (2 * G[j, j])
    w[free] += (w[j] - q) / G[j, j] * G[j, free]
    w[j] = q
    G[:] = right_inverse(G, j)
    free[j] = False
    return loss


@obq_step.wrong_answer("A weight moves by error · G_jk.", says="not divided by G_jj")
def _(w, G, free, j, q):
    loss = (w[j] - q)**2 / (2 * G[j, j])
    w[free] -= (w[j] - q) * G[j, free]
    w[j] = q
    G[:] = right_inverse(G, j)
    free[j] = False
    return loss


@obq_step.wrong_answer("Everyone helps, also the weights that have their values.",
                       says="they have their values")
def _(w, G, free, j, q):
    loss = (w[j] - q)**2 / (2 * G[j, j])
    w -= (w[j] - q) / G[j, j] * G[j]
    w[j] = q
    G[:] = right_inverse(G, j)
    free[j] = False
    return loss


@obq_step.wrong_answer("H does not change, so G does not change.", says="G is unchanged")
def _(w, G, free, j, q):
    loss = (w[j] - q)**2 / (2 * G[j, j])
    w[free] -= (w[j] - q) / G[j, j] * G[j, free]
    w[j] = q
    free[j] = False
    return loss


@obq_step.wrong_answer("First j leaves G, then the others move.", says="nan or inf")
def _(w, G, free, j, q):
    loss = (w[j] - q)**2 / (2 * G[j, j])
    G[:] = right_inverse(G, j)
    w[free] -= (w[j] - q) / G[j, j] * G[j, free]
    w[j] = q
    free[j] = False
    return loss


@obq_step.wrong_answer("The loss is error²/G_jj: the ½ changes no choice.", says="half is missing",
                       subtle=True)
def _(w, G, free, j, q):
    loss = (w[j] - q)**2 / G[j, j]
    w[free] -= (w[j] - q) / G[j, j] * G[j, free]
    w[j] = q
    G[:] = right_inverse(G, j)
    free[j] = False
    return loss


@obq_step.wrong_answer("The caller knows which weight it has rounded.", says="free is unchanged")
def _(w, G, free, j, q):
    loss = (w[j] - q)**2 / (2 * G[j, j])
    w[free] -= (w[j] - q) / G[j, j] * G[j, free]
    w[j] = q
    G[:] = right_inverse(G, j)
    return loss

"""Lesson 14, GPTQ: damping, the factor of the inverse, a block of columns, all blocks."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from tinyft.compress.grids import Grid
from tinyft.learn.diagnose import Unusable, close
from tinyft.learn.exercise import Exercise
from tinyft.learn.sizes import draw_array, named, sizes

GPTQ = "compress.quantize.gptq:"


def check(got, want, what, guesses, rtol=1e-9, dtype=False):
    """close, with the guesses that differ from the expected result."""
    wrong = {words: a for words, a in guesses.items() if not np.allclose(a, want, equal_nan=True)}
    close(got, want, what, wrong, rtol=rtol, atol=1e-10, dtype=dtype)


def upper(draw, n, diagonal=(1, 2)):
    """An upper triangular matrix (n, n) of whole numbers, 1 or −1 above the diagonal."""
    R = np.triu(draw_array(draw, (n, n), (1, -1), np.float64), 1)
    np.fill_diagonal(R, draw_array(draw, (n,), diagonal, np.float64))
    return R


# ── add_damping ───────────────────────────────────────────────────────────────────────────────────
add_damping = Exercise(
    "compress.rule:add_damping", difficulty=1, minutes=10, on_host=True,
    may_use="np.diagonal(H).mean(), np.eye and np.fill_diagonal.",
    example="""
        The mean of 5 and 3 is 4, so λ = 0.25 · 4 = 1.
        >>> add_damping(np.array([[5.0, 3.0], [3.0, 3.0]]), 0.25)
        array([[6., 3.],
               [3., 4.]])
        """,
    hints=(
        "λ is one number for the whole matrix: damp times the mean of the diagonal.",
        "Only the diagonal changes: λ I has λ on the diagonal and 0 elsewhere.  H itself must stay "
        "as it is.",
        "H + damp * np.diagonal(H).mean() * np.eye(len(H))."))
DAMPS = st.sampled_from((1.0, 0.5, 2.0))


@st.composite
def a_hessian(draw: Callable, more: int = 0):
    """H = R Rᵀ (n, n), of whole numbers, for an upper triangular R."""
    R = upper(draw, draw(sizes()) + more)
    return R @ R.T


def with_damping(H, damp):
    return H + damp * np.diagonal(H).mean() * np.eye(len(H))


def guessed_dampings(H, damp):
    d = np.diagonal(H)
    eye = np.eye(len(H))
    return {"H is not damped": H,
            "λ is damp itself; it is damp times the mean of H's diagonal": H + damp * eye,
            "every H_jj grows by a part of itself; all of them grow by the same λ":
                H + damp * d * eye,
            "λ is added to all entries; it belongs on the diagonal": H + damp * d.mean(),
            "the mean is taken over all entries, not over the diagonal": H + damp * H.mean() * eye,
            "λ comes from the sum of the diagonal, not from its mean": H + damp * d.sum() * eye,
            "λ is subtracted": H - damp * d.mean() * eye}


def diagonal_of(a, H):
    """The diagonal of a result, if it has H's shape."""
    return np.diagonal(a) if np.shape(a) == H.shape else a


@add_damping.law("the diagonal: H_jj + damp · mean of the diagonal", H=a_hessian(), damp=DAMPS)
def _(f, H, damp):
    guesses = {words: np.diagonal(a) for words, a in guessed_dampings(H, damp).items()}
    check(diagonal_of(f(H, damp), H), np.diagonal(with_damping(H, damp)),
          "the diagonal of the result", guesses)


@add_damping.law("the entries beside the diagonal stay", H=a_hessian(more=1), damp=DAMPS)
def _(f, H, damp):
    got = np.array(f(H, damp))
    if got.shape == H.shape:
        np.fill_diagonal(got, np.diagonal(H))            # the diagonal is for the law above
    check(got, H, "the result, but for its diagonal", {
        "λ is added to all entries; it belongs on the diagonal":
            H + damp * np.diagonal(H).mean() * (1 - np.eye(len(H)))})


@add_damping.law("damp = 0: nothing changes", H=a_hessian())
def _(f, H):
    check(f(H, 0.0), H, "the result", {})


@add_damping.wrong_answer("H = 2/n Σ x xᵀ is a sum of squares, so it has an inverse as it is.",
                          says="not damped")
def _(H, damp):
    return H.copy()


@add_damping.wrong_answer("λ is the setting `damp`.", says="λ is damp itself")
def _(H, damp):
    return H + damp * np.eye(len(H))


@add_damping.wrong_answer("Each input is damped by a part of its own H_jj.", says="the same λ")
def _(H, damp):
    return H + damp * np.diag(np.diagonal(H))


@add_damping.wrong_answer("NumPy adds a number to a matrix.", says="belongs on the diagonal",
                          subtle=True)
def _(H, damp):
    out = H + damp * np.diagonal(H).mean()
    return out


@add_damping.wrong_answer("The mean of H is H.mean().", says="over all entries")
def _(H, damp):
    return H + damp * H.mean() * np.eye(len(H))


@add_damping.wrong_answer("The trace is the size of a matrix.", says="from the sum")
def _(H, damp):
    return H + damp * np.trace(H) * np.eye(len(H))


@add_damping.wrong_answer("Damping makes a matrix smaller.", says="subtracted")
def _(H, damp):
    return H - damp * np.diagonal(H).mean() * np.eye(len(H))


# ── upper_factor ──────────────────────────────────────────────────────────────────────────────────
upper_factor = Exercise(
    f"{GPTQ}upper_factor", difficulty=2, minutes=15, on_host=True, lines=1,
    closed=(f"{GPTQ}inverse_factor",),
    may_use="np.linalg.cholesky(A), which gives the lower triangular L with A = L Lᵀ; "
            "np.linalg.inv(A); A.T; inverse_upper(R), the inverse of an upper triangular R.",
    example="""
        >>> upper_factor(np.array([[5.0, 2.0], [2.0, 4.0]])).round(4)
        array([[ 0.5 , -0.25],
               [ 0.  ,  0.5 ]])
        """,
    hints=(
        "NumPy's factor is lower triangular: A = L Lᵀ.  Which A do you need, and what is the "
        "transpose of L?",
        "With A = H⁻¹ you have H⁻¹ = L Lᵀ.  You want H⁻¹ = Uᵀ U, so U is Lᵀ.",
        "np.linalg.cholesky(np.linalg.inv(H)).T.  (The library turns H around instead, which saves "
        "an inverse.)"))


@st.composite
def factored(draw: Callable, more: int = 0, diagonal: bool = False):
    """H = R Rᵀ (n, n), of whole numbers."""
    R = upper(draw, draw(sizes()) + more)
    return np.diag(np.diagonal(R)**2) if diagonal else R @ R.T


def right_factor(H):
    return np.linalg.cholesky(np.linalg.inv(H)).T


LOWER = "it is lower triangular: the columns before i would make up for column i"


def guessed_factors(H):
    L = np.linalg.cholesky(H)
    return {"it is the factor of H; it is wanted of the inverse": L.T,
            "it is the lower factor of H; it is wanted of the inverse, and upper": L,
            "it is L with H⁻¹ = L Lᵀ, lower triangular; U is its transpose": right_factor(H).T,
            f"{LOWER}.  It is L⁻¹ of H = L Lᵀ": np.linalg.inv(L),
            "U Uᵀ is H⁻¹; it is Uᵀ U that should be H⁻¹": np.linalg.inv(L).T,
            "it is H⁻¹ itself": np.linalg.inv(H),
            "it is R with H = R Rᵀ; U is its inverse": np.linalg.inv(right_factor(H)),
            "its diagonal is negative": -right_factor(H)}


@upper_factor.law("a diagonal H: 1/√H_jj on the diagonal", H=factored(diagonal=True))
def _(f, H):
    check(f(H), np.diag(1 / np.sqrt(np.diagonal(H))), "U", guessed_factors(H))


@upper_factor.law("U is upper triangular: 0 below its diagonal", H=factored(more=1))
def _(f, H):
    got = np.tril(f(H), -1)
    guesses = {words: np.tril(a, -1) for words, a in guessed_factors(H).items()}
    check(got, np.zeros(H.shape), "the part of U below its diagonal", guesses)


@upper_factor.law("Uᵀ U = H⁻¹", H=factored(more=1))
def _(f, H):
    check(f(H), right_factor(H), "U", guessed_factors(H), rtol=1e-6)


@upper_factor.law("an H that is not positive definite is a LinAlgError", n="size")
def _(f, n):
    try:
        f(-np.eye(n))
    except np.linalg.LinAlgError:
        return
    raise Unusable("H = −I is not positive definite, and no LinAlgError was raised")


@upper_factor.wrong_answer("Cholesky gives the factor: H = L Lᵀ, so U = Lᵀ.", says="of the inverse")
def _(H):
    return np.linalg.cholesky(H).T


@upper_factor.wrong_answer("NumPy's factor of H⁻¹ is the factor.", says="U is its transpose")
def _(H):
    return np.linalg.cholesky(np.linalg.inv(H))


@upper_factor.wrong_answer("L⁻¹ satisfies (L⁻¹)ᵀ L⁻¹ = H⁻¹, so it will do.", says="L⁻¹ of H")
def _(H):
    return np.linalg.inv(np.linalg.cholesky(H))


@upper_factor.wrong_answer("The transposed inverse of L is upper triangular, so it is U.",
                           says="it is Uᵀ U")
def _(H):
    return np.linalg.inv(np.linalg.cholesky(H)).T


@upper_factor.wrong_answer("The factor of H that is upper triangular is U.",
                           says="of the inverse")
def _(H):
    return np.linalg.inv(right_factor(H))


@upper_factor.wrong_answer("The rows of the inverse are what GPTQ needs.", says="H⁻¹ itself")
def _(H):
    return np.linalg.inv(H)


@upper_factor.wrong_answer("A square root has two signs.", says="diagonal is negative")
def _(H):
    return -right_factor(H)


@upper_factor.wrong_answer("A matrix that cannot be factored gets a small number on its diagonal.",
                           says="no LinAlgError", subtle=True)
def _(H):
    if np.diagonal(H).min() <= 0:
        H = np.eye(len(H))
    return right_factor(H)


# ── gptq_block ────────────────────────────────────────────────────────────────────────────────────
gptq_block = Exercise(
    f"{GPTQ}gptq_block", difficulty=3, minutes=25, on_host=True, in_place=True,
    may_use="grid.encode(w) and grid.decode(codes) of the grid = grid_of(i, rest); "
            "np.outer(a, b).  rest[i] is column i of the weight, for all rows.",
    example="""
        >>> from tinyft.compress.grids import Grid
        >>> grid = Grid(scale=np.array([1.0]), zero=0.0, top=3)
        >>> rest = np.array([[0.25], [0.5]])                 # two inputs, one output
        >>> codes, errors = np.zeros((2, 1), np.uint8), np.zeros((2, 1))
        >>> U = np.array([[2.0, -3.0], [0.0, 1.0]])
        >>> gptq_block(rest, codes, errors, U, lambda i, rest: grid, 0, 2)
        >>> codes
        array([[0],
               [1]], dtype=uint8)
        >>> errors
        array([[ 0.125],
               [-0.125]])
        """,
    hints=(
        "One column after the other: ask for its grid, write its codes, write its error.  Then "
        "update the columns after it, up to last − 1, before you look at the next one.",
        "The error of column i is (w − grid.decode(codes)) / U[i, i], where w = rest[i] has all "
        "updates so far.  Column k loses U[i, k] times the error.",
        "In the loop over i:  grid = grid_of(i, rest);  codes[i] = grid.encode(rest[i]);  "
        "errors[i] = (rest[i] - grid.decode(grid.encode(rest[i]))) / U[i, i];  "
        "rest[i + 1:last] -= np.outer(U[i, i + 1:last], errors[i])."))


@st.composite
def a_block(draw: Callable, more: int = 0, around: int = 0, diagonal: tuple = (2,)):
    """rest (in, out), U (in, in), zero points (in, out), and the block first ... last − 1."""
    n = draw(sizes()) + more + 2 * around
    out = draw(sizes())
    rest = draw_array(draw, (n, out), (1.25, 2.75, -1.25, 0.75, -2.75), np.float64)
    return named(rest=rest, U=upper(draw, n, diagonal), first=around, last=n - around)


STEPS = Grid(np.array([1.0]), 100.0, 200)                # the whole numbers −100 ... 100


def whole_numbers(i, rest):
    return STEPS


def run_block(f, rest, U, first, last, grid_of=whole_numbers):
    """(rest, codes, errors) after a block."""
    mine = rest.copy()
    codes = np.full(rest.shape, 255, np.uint8)
    errors = np.full(rest.shape, 7.0)
    f(mine, codes, errors, U, grid_of, first, last)
    return mine, codes, errors


def right_block(rest, U, first, last, factor=1.0, divide=1, stale=False, value=True):
    """(codes, errors) of a block, with the usual errors in them on demand."""
    W = rest.copy()
    codes = np.full(rest.shape, 255, np.uint8)
    errors = np.full(rest.shape, 7.0)
    for i in range(first, last):
        codes[i] = q = STEPS.encode(W[i])
        w = (rest if stale else W)[i]
        errors[i] = (w - (STEPS.decode(q) if value else q)) / U[i, i]**divide
        for k in range(i + 1, last):
            W[k] -= factor * U[i, k] * errors[i]
    return codes, errors


def guessed_blocks(rest, U, first, last):
    given = (rest, U, first, last)
    return {"the columns after it did not move: they make up for its error, with row i of U (below "
            "its diagonal U is 0)": right_block(*given, factor=0),
            "the columns after it moved in the wrong direction": right_block(*given, factor=-1),
            "the error is not divided by U_ii": right_block(*given, divide=0),
            "the error is divided by U_ii twice": right_block(*given, divide=2),
            "the error is taken from the old weight; the updated weight is what is rounded":
                right_block(*given, stale=True),
            "the error is w minus its code; it is w minus the value of the code":
                right_block(*given, value=False)}


def check_codes(f, given):
    want = right_block(*given)[0]
    guesses = {words: codes for words, (codes, _) in guessed_blocks(*given).items()}
    check(run_block(f, *given)[1], want, "the codes", guesses, dtype=True)


def check_errors(f, given):
    want = right_block(*given)[1]
    guesses = {words: errors for words, (_, errors) in guessed_blocks(*given).items()}
    check(run_block(f, *given)[2], want, "the errors", guesses)


@gptq_block.law("a block of one column: its code is that of the nearest value",
                given=a_block(around=1))
def _(f, given):
    rest, U, first, _ = given
    check_codes(f, (rest, U, first, first + 1))


@gptq_block.law("the error of a column is (w − ŵ) / U_ii", given=a_block(around=1))
def _(f, given):
    rest, U, first, _ = given
    check_errors(f, (rest, U, first, first + 1))


@gptq_block.law("the next column has the updates of all before it", given=a_block(more=1))
def _(f, given):
    check_errors(f, given)


@gptq_block.law("the codes are those of the updated columns", given=a_block(more=1))
def _(f, given):
    check_codes(f, given)


@gptq_block.law("columns outside of the block stay: those after it wait", given=a_block(around=1))
def _(f, given):
    rest, U, first, last = given
    got = run_block(f, *given)[0]
    errors = right_block(*given)[1]
    eager = rest.copy()
    eager[last:] -= U[first:last, last:].T @ errors[first:last]
    outside = [*range(first), *range(last, len(rest))]
    check(got[outside], rest[outside], "rest outside of the block", {
        "the columns after the block moved: they wait for the end of the block": eager[outside]})


@gptq_block.law("codes and errors outside of the block stay", given=a_block(around=1))
def _(f, given):
    rest, U, first, last = given
    _, codes, errors = run_block(f, *given)
    outside = [*range(first), *range(last, len(rest))]
    check(codes[outside], np.full_like(codes[outside], 255), "codes outside of the block", {})
    check(errors[outside], np.full_like(errors[outside], 7.0), "errors outside of the block", {})


@gptq_block.law("grid_of gets i, and rest with the updates so far", given=a_block(more=1))
def _(f, given):
    seen = []

    def grid_of(i, rest):
        seen.append((i, rest[i].copy()))
        return STEPS
    run_block(f, *given, grid_of)
    rest, U, first, last = given
    if [i for i, _ in seen] != list(range(first, last)):
        raise Unusable(f"grid_of was asked for the columns {[i for i, _ in seen]}, expected "
                       f"{list(range(first, last))}")
    errors = right_block(*given)[1]
    want = rest - np.triu(U, 1).T @ errors
    check(np.array([w for _, w in seen]), want[first:last], "rest[i] as grid_of gets it", {
        "it is the weight without its updates": rest[first:last]})


def wrong_block(*, feedback=1.0, divide=1, column=False, beyond=False, stale=False, value=True,
                all_grids_first=False):
    """gptq_block with an error in it."""
    def block(rest, codes, errors, U, grid_of, first, last):
        old = rest.copy()
        grids = [grid_of(i, rest) for i in range(first, last)] if all_grids_first else []
        for i in range(first, last):
            grid = grids[i - first] if all_grids_first else grid_of(i, rest)
            q = grid.encode(rest[i])
            codes[i] = q
            w = old[i] if stale else rest[i]
            errors[i] = (w - (grid.decode(q) if value else q)) / U[i, i]**divide
            end = len(rest) if beyond else last
            row = U[i + 1:end, i] if column else U[i, i + 1:end]
            rest[i + 1:end] -= feedback * np.outer(row, errors[i])
    return block


gptq_block.wrong_answer("To round a column is to round a column: no other column moves.",
                        says="did not move")(wrong_block(feedback=0.0))
gptq_block.wrong_answer("The columns after it move with the error.", says="wrong direction")(
    wrong_block(feedback=-1.0))
gptq_block.wrong_answer("An error is w − ŵ.", says="not divided by U_ii")(wrong_block(divide=0))
gptq_block.wrong_answer("U_ii is a square root, so it is squared.", says="divided by U_ii twice")(
    wrong_block(divide=2))
gptq_block.wrong_answer("Column i of W goes with column i of U.", says="with row i of U")(
    wrong_block(column=True))
gptq_block.wrong_answer("Every column after it makes up for the error at once.",
                        says="wait for the end", subtle=True)(wrong_block(beyond=True))
gptq_block.wrong_answer("The error is what the original weight lost.", says="from the old weight")(
    wrong_block(stale=True))
gptq_block.wrong_answer("An error is w minus its code.", says="w minus its code")(
    wrong_block(value=False))
gptq_block.wrong_answer("All grids of a block are known when it begins.",
                        says="without its updates", subtle=True)(wrong_block(all_grids_first=True))


# ── gptq_columns ──────────────────────────────────────────────────────────────────────────────────
gptq_columns = Exercise(
    f"{GPTQ}gptq_columns", difficulty=3, minutes=20, on_host=True,
    may_use="gptq_block(rest, codes, errors, U, grid_of, first, last), the previous exercise; "
            "A.T; np.empty.",
    example="""
        >>> from tinyft.compress.grids import Grid
        >>> grid = Grid(scale=np.array([1.0]), zero=0.0, top=3)
        >>> U = np.array([[2.0, -3.0], [0.0, 1.0]])
        >>> codes, E = gptq_columns(np.array([[0.25, 0.5]]), U, lambda i, rest: grid, block=1)
        >>> codes
        array([[0, 1]], dtype=uint8)
        >>> E
        array([[ 0.125, -0.125]])
        """,
    hints=(
        "rest is a copy of W.T, so that W stays as it is; codes and errors have its shape.  Go "
        "from block to block: range(0, in, block).  The last block may be shorter.",
        "After gptq_block the columns from `last` on lack the updates of this block.  Column k "
        "loses the sum of U[i, k] · errors[i] over the columns i of the block: a matrix product.",
        "rest[last:] -= U[first:last, last:].T @ errors[first:last].  Return codes.T and "
        "errors.T."))


@st.composite
def a_weight(draw: Callable, more: int = 2, even: bool = False, odd: bool = False):
    """W (out, in) and U (in, in); even: `in` is even."""
    n = draw(sizes()) + more
    n += (even and n % 2) + (odd and 1 - n % 2)
    W = draw_array(draw, (draw(sizes()), n), (1.25, 2.75, -1.25, 0.75, -2.75), np.float64)
    return named(W=W, U=upper(draw, n, (2,)))


def in_blocks(W, U, block, late=1.0, again=False, short=False):
    """(codes, errors) of gptq_columns, with the usual errors in them on demand."""
    rest = W.T.copy()
    n = len(rest)
    codes = np.zeros(rest.shape, np.uint8)
    errors = np.zeros(rest.shape)
    end = n - n % block if short and block < n else n
    for first in range(0, end, block):
        last = min(first + block, n)
        found = right_block(rest, U, first, last)
        codes[first:last] = found[0][first:last]
        errors[first:last] = found[1][first:last]
        start = 0 if again else first
        rest[last:] -= late * U[start:last, last:].T @ errors[start:last]
    return codes.T, errors.T


def guessed_columns(W, U, block):
    given = (W, U, block)
    return {"the columns after a block did not get its updates": in_blocks(*given, late=0),
            "the columns after a block moved in the wrong direction": in_blocks(*given, late=-1),
            "they got the updates of earlier blocks again; those they have already": in_blocks(
                *given, again=True),
            "the last, shorter block is missing": in_blocks(*given, short=True)}


def check_columns(f, W, U, block):
    want = in_blocks(W, U, block)
    got = f(W, U, whole_numbers, block)
    if not isinstance(got, tuple) or len(got) != 2:
        raise Unusable("gptq_columns returns two arrays: codes and errors")
    guesses = guessed_columns(W, U, block)
    check(got[1], want[1], "the errors E", {words: E for words, (_, E) in guesses.items()})
    check(got[0], want[0], "the codes", {words: c for words, (c, _) in guesses.items()},
          dtype=True)


@gptq_columns.law("one block holds all columns", given=a_weight(more=0))
def _(f, given):
    check_columns(f, *given, 128)


@gptq_columns.law("blocks of one column", given=a_weight())
def _(f, given):
    check_columns(f, *given, 1)


@gptq_columns.law("blocks of two columns", given=a_weight(even=True))
def _(f, given):
    check_columns(f, *given, 2)


@gptq_columns.law("the last block may be shorter", given=a_weight(odd=True))
def _(f, given):
    check_columns(f, *given, 2)


@gptq_columns.law("W − Ŵ = E U", given=a_weight(even=True))
def _(f, given):
    W, U = given
    codes, E = f(W, U, whole_numbers, 2)
    check(np.asarray(E) @ U, W - STEPS.decode(np.asarray(codes, float)), "E U", {})


def wrong_columns(**error):
    """gptq_columns with an error in it. The grid is that of the laws."""
    def columns(W, U, grid_of, block=128):
        return in_blocks(W, U, block, **error)
    return columns


gptq_columns.wrong_answer("A block is updated inside; that is all.",
                          says="did not get its updates")(wrong_columns(late=0))
gptq_columns.wrong_answer("What a block lost is added to the others.", says="wrong direction")(
    wrong_columns(late=-1))
gptq_columns.wrong_answer("After each block all errors so far count.", says="earlier blocks again")(
    wrong_columns(again=True))
gptq_columns.wrong_answer("The columns are a whole number of blocks.", says="shorter block",
                          subtle=True)(wrong_columns(short=True))


@gptq_columns.wrong_answer("The codes are (in, out), as in the block.", says="transpose")
def _(W, U, grid_of, block=128):
    codes, errors = in_blocks(W, U, block)
    return codes.T, errors.T


@gptq_columns.wrong_answer("A code is an integer, so it has the dtype int64.", says="dtype")
def _(W, U, grid_of, block=128):
    codes, errors = in_blocks(W, U, block)
    return codes.astype(np.int64), errors
